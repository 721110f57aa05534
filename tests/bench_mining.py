"""Stage 01's local generator against plain `model.generate`, and its memory against the number of
seeds.

    .venv/bin/python tests/bench_mining.py            # 10 minutes on 2 CPU cores: useful tokens/s
    .venv/bin/python tests/bench_mining.py --memory   # 2 minutes: peak at 1,000 and 100,000 seeds

Useful tokens come before the newline that ends a rewrite; all else a way computes is waste.
Prompts, samples a prompt, limit and sampling are the same, turns alternate. For memory, generation
and scores are a recorded stream.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
spec = importlib.util.spec_from_file_location(
    "mining", ROOT / "01_mine_negatives.py"
)
mining = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mining)
COUNT = 12  # samples a prompt


def contiguous(_, inputs):
    """A hook of the LM head: given a view, torch would copy the head for every row."""
    return (inputs[0].contiguous(),)


def generate_plainly(model, tokenizer, prompts, limit, stop) -> list[str]:
    """Samples by `model.generate`, in batches of like length."""
    rows = sorted((p for p in prompts for _ in range(COUNT)), key=len)
    how = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 50,
        "max_new_tokens": limit,
    }
    how |= {"eos_token_id": stop, "pad_token_id": tokenizer.eos_token_id}
    lines = []
    with model.get_output_embeddings().register_forward_pre_hook(contiguous):
        for i in range(0, len(rows), 96):
            some = rows[i : i + 96]
            batch = tokenizer(
                some, return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            out = model.generate(**batch, **how)[:, batch.input_ids.shape[1] :]
            texts = tokenizer.batch_decode(out, skip_special_tokens=True)
            lines += [text.split("\n")[0] for text in texts if "\n" in text]
    return lines


def speed(repeats: int) -> None:
    sys.argv = ["01", "--limit", "16"]
    args = mining.options()
    args.device = args.device or mining.best_device()
    args.dtype = args.dtype or mining.best_dtype(args.device)
    model, tokenizer = mining.load_model(args.model, args.device, dtype=args.dtype)
    texts = [seed["text"] for seed in mining.read_seeds(args)]
    args.prompts = mining.PROMPTS
    prompts = mining.make_prompts("negative", texts, 0, args)
    limit = int(1.6 * max(map(len, texts)) / 3) + 8
    generator = mining.LocalGenerator(model, tokenizer, args)

    def plain():
        return generate_plainly(
            model, tokenizer, prompts, limit, tokenizer.eos_token_id
        )

    def stopped():
        return generate_plainly(
            model, tokenizer, prompts, limit, generator.stop.tolist()
        )

    def ours():
        return [text for _, text in generator(prompts, limit, COUNT, 0.7)]

    ways = {
        "plain generate": plain,
        "generate, stopped at newlines": stopped,
        "ours": ours,
    }
    rates = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            torch.manual_seed(turn)
            start = time.perf_counter()
            useful = sum(map(len, tokenizer(way()).input_ids))
            if turn:  # the first is for warming up
                rates[name].append(useful / (time.perf_counter() - start))
    best = statistics.median(rates["ours"])
    for name, some in rates.items():
        rate = statistics.median(some)
        spread = f"[{min(some):.1f}, {max(some):.1f}]"
        print(
            f"{name:30s} {rate:6.1f} useful tokens/s {spread}; ours is {best / rate:.1f} times"
        )


class Recorded:
    """A generator that makes no tokens."""

    def __init__(self, *_):
        self.calls = 0

    def __call__(self, prompts, limit, count, temperature):
        self.calls += 1
        text = f"the cat number {self.calls} sat on mat {limit} at {temperature}"
        return [
            (i, f"{text} {k}") for i in range(len(prompts)) for k in range(count)
        ]


def recorded_scores(drawn, kind, *_) -> list[dict]:
    same = {
        "kind": kind,
        "similarity": 0.8,
        "nll": 5.0,
        "length_ratio": 1.0,
        "overlap": 0.5,
    }
    toxicity = [0.9 * (i % 2) for i in range(len(drawn))]
    return [
        {"text": text, "toxicity": t} | same
        for (_, text), t in zip(drawn, toxicity)
    ]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def memory_at(n: int) -> None:
    """One process: stage 01 over n seeds, all models replaced."""
    mining.LocalGenerator = Recorded
    mining.load_model = lambda *_, **__: (None, None)
    mining.SentenceTransformer = lambda *_, **__: None
    mining.score = recorded_scores
    mining.overlap = lambda *_: 0.0
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/seeds.jsonl", "w") as f:
            for i in range(n):
                seed = {
                    "id": f"seed-{i:06d}",
                    "text": f"the cat sat on mat number {i}",
                }
                f.write(json.dumps(seed) + "\n")
        sys.argv = ["01", "--seeds", f"{folder}/seeds.jsonl", "--run", folder]
        before = peak()
        mining.main()
        print(f"{n} seeds: peak {peak():.0f} MB, {before:.0f} MB before the first")


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--repeats", type=int, default=3, help="timed turns")
    p.add_argument("--memory", action="store_true", help="measure memory instead")
    p.add_argument("--at", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.at:
        memory_at(args.at)
    elif args.memory:
        for n in (1_000, 100_000):
            command = [sys.executable, __file__, "--at", str(n)]
            made = subprocess.run(
                command, capture_output=True, text=True, check=True
            )
            print(made.stdout.splitlines()[-1])
    else:
        speed(args.repeats)
