"""Stage 01's local generator against plain `model.generate`, and its memory against the number of seeds.

    .venv/bin/python tests/bench_mining.py            # 10 minutes on 2 CPU cores, most of them for the peers: useful tokens a second
    .venv/bin/python tests/bench_mining.py --memory   # 2 minutes: peak memory at 1,000 and 100,000 seeds

Useful tokens come before the newline that ends a rewrite; all else a way computes is waste. Prompts, samples a
prompt, limits and sampling are the same, turns alternate. For memory, generation and scores are a recorded stream.
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
spec = importlib.util.spec_from_file_location("mining", ROOT / "01_mine_negatives.py")
mining = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mining)


def plain(model, tokenizer, prompts, limits, count, stop):
    """Useful tokens of count samples of each prompt, in batches of like length."""
    useful, rows = 0, sorted((p for p in prompts for _ in range(count)), key=len)
    whole = model.get_output_embeddings().register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))  # a view has torch copy the head for every row
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for i in range(0, len(rows), 96):
        batch = tokenizer(rows[i:i + 96], return_tensors="pt", padding=True)
        out = model.generate(**batch, do_sample=True, temperature=0.7, top_k=50, max_new_tokens=max(limits), eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
        for text in tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True):
            useful += len(tokenizer(text.split("\n")[0]).input_ids) if "\n" in text else 0
    whole.remove()
    return useful


def speed(args) -> None:
    sys.argv = ["01", "--limit", "16"]
    options = mining.options()
    model, tokenizer = mining.load_lm(options.model, options)
    texts = [s["text"] for s in mining.read_seeds(options)]
    prompts, limits = mining.make_prompts("negative", texts, 0, options), [int(1.6 * len(t) / 3) + 8 for t in texts]
    ours = mining.LocalGenerator(model, tokenizer, mining.predict_prob, options)

    def run_ours():
        before = ours.kept
        ours(prompts, limits, 12, 0.7)
        return ours.kept - before

    ways = {"plain generate": lambda: plain(model, tokenizer, prompts, limits, 12, tokenizer.eos_token_id),
            "generate, stopped at newlines": lambda: plain(model, tokenizer, prompts, limits, 12, ours.stop.nonzero().flatten().tolist()), "ours": run_ours}
    rates = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        for name, way in ways.items():
            torch.manual_seed(turn)
            start = time.perf_counter()
            useful = way()
            if turn:  # the first is for warming up
                rates[name].append(useful / (time.perf_counter() - start))
    for name, r in rates.items():
        print(f"{name:30s} {statistics.median(r):6.1f} useful tokens/s [{min(r):.1f}, {max(r):.1f}]; ours is {statistics.median(rates['ours']) / statistics.median(r):.1f} times that")


def memory_at(n: int) -> None:
    """One process: stage 01 over n seeds, all models replaced."""
    class Recorded:
        def __init__(self, *_):
            self.n = 0

        def __call__(self, prompts, limits, count, temperature, push=False):
            self.n += 1
            return [[f"the cat number {self.n} of {i} sat on mat {j}" for j in range(count)] for i in range(len(prompts))]

        def speed(self):
            return "recorded"

    mining.LocalGenerator = Recorded
    mining.load_lm = lambda *_: (None, None)
    mining.SentenceTransformer = lambda *_, **__: None
    mining.score = lambda texts, seeds, *_: [{"text": t, "toxicity": 0.9 * (i % 2), "similarity": 0.8, "nll": 5.0, "length_ratio": 1.0, "overlap": 0.5} for i, t in enumerate(texts)]
    mining.overlap = lambda a, b: 0.0
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/seeds.jsonl", "w") as f:
            f.writelines(json.dumps({"id": f"seed-{i:06d}", "text": "the cat sat on a mat that was number nine"}) + "\n" for i in range(n))
        sys.argv = ["01", "--seeds", f"{folder}/seeds.jsonl", "--run", folder]
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mining.main()
        print(f"{n} seeds: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB, {start / 1e3:.0f} MB before the first")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")
    p.add_argument("--memory", action="store_true", help="measure memory instead")
    p.add_argument("--at", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.at:
        memory_at(args.at)
    elif args.memory:
        for n in (1_000, 100_000):
            print(subprocess.run([sys.executable, __file__, "--at", str(n)], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    else:
        speed(args)
