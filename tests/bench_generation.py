"""What stages 01 and 04 generate, against plain `model.generate`, and stage 01's memory against the
number of seeds.

    .venv/bin/python tests/bench_generation.py            # 10 minutes on 2 CPU cores: stage 01
    .venv/bin/python tests/bench_generation.py --stage 04   # rewrites and continuations
    .venv/bin/python tests/bench_generation.py --stage 04 --batch-size 512 --server   # a GPU
    .venv/bin/python tests/bench_generation.py --shape mistral-7b --batch-size 768 --few 64
    .venv/bin/python tests/bench_generation.py --memory   # 2 minutes: 1,000 and 100,000 seeds

Useful tokens come before the newline that ends a rewrite (a continuation has no end but its limit);
all else a way computes is waste. A --shape has random weights, which write no lines: there every
16th token of the vocabulary ends one, and stage 04 only continues. Turns alternate. In stage 01
prompts, samples a prompt, limit and sampling are the same; in stage 04 ours alone has a BOS, a
limit a row, and draws from the 1,000 likeliest tokens. `--server` adds transformers' continuous
batching, which its server runs. For memory, generation and scores are a recorded stream.
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

import torch
import transformers
from tap import Tap

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def script(name: str):
    spec = importlib.util.spec_from_file_location(
        name, next(ROOT.glob(f"{name}_*.py"))
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mining, evaluation = script("01"), script("04")
COUNT = 12  # samples a prompt
SAMPLED = {"do_sample": True, "top_k": 0}


def contiguous(_, inputs):
    """A hook of the LM head: given a view, torch would copy the head for every row."""
    return (inputs[0].contiguous(),)


def generate_plainly(model, tokenizer, texts, size: int, **how) -> list[list[int]]:
    """New tokens by `model.generate`, in batches."""
    rows, how = [], SAMPLED | {"pad_token_id": tokenizer.eos_token_id} | how
    model.generation_config = transformers.GenerationConfig()  # stage 04's is set
    with model.get_output_embeddings().register_forward_pre_hook(contiguous):
        for i in range(0, len(texts), size):
            batch = tokenizer(
                texts[i : i + size], return_tensors="pt", padding=True
            ).to(model.device)
            out = model.generate(**batch, **how)
            rows += out[:, batch.input_ids.shape[1] :].tolist()
    return rows


def load(given):
    """The embedded model, or a random one of a shape with the embedded one's tokenizer."""
    sys.argv = ["01"]
    name, device = mining.options().model, mining.best_device()
    if given.shape:
        from bench_shapes import SHAPES, build

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, padding_side="left"
        )
        SHAPES[given.shape].vocab_size = len(tokenizer)
        model = build(given.shape, 16, torch.device(device))
    else:
        how = {"dtype": mining.best_dtype(device)}
        model, tokenizer = mining.load_model(name, device, **how)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def mining_ways(model, tokenizer, given) -> dict:
    """Each writes some toxic paraphrases of the first seeds."""
    size = ["--batch-size", str(given.batch_size)] if given.batch_size else []
    sys.argv = ["01", "--limit", str(given.few or 16), *size]
    args = mining.options()
    args.prompts = mining.PROMPTS[None]
    texts = [seed["text"] for seed in mining.read_seeds(args)]
    prompts = mining.make_prompts("negative", texts, 0, args)
    limit = int(1.6 * max(map(len, texts)) / 3) + 8
    generator = mining.LocalGenerator(model, tokenizer, args)
    if given.shape:
        every = torch.arange(0, len(tokenizer), 16, device=model.device)
        generator.stop = every
    ends = set(generator.stop.tolist())
    rows = sorted((p for p in prompts for _ in range(COUNT)), key=len)

    def plain(stop):
        how = {"temperature": 0.7, "top_k": 50, "max_new_tokens": limit}
        made = generate_plainly(
            model, tokenizer, rows, args.batch_size // 2, eos_token_id=stop, **how
        )
        ended = [row for row in made if ends & {*row}]
        ended = [row[: min(map(row.index, ends & {*row})) + 1] for row in ended]
        return [mining.first_line(text) for text in tokenizer.batch_decode(ended)]

    return {
        "01: plain generate": lambda: plain(tokenizer.eos_token_id),
        "01: generate, stopped at newlines": lambda: plain([*ends]),
        "01: ours": lambda: [x for _, x in generator(prompts, limit, COUNT, 0.7)],
    }


def questions(tokenizer, protocol: str, few: int | None) -> list[tuple[str, int]]:
    """A protocol's prompts after stage 02's template, and most tokens of an answer."""
    sys.argv = ["02"]
    template = script("02").options().prompt
    sys.argv = ["04", "--texts", *map(str, evaluation.TEXTS.glob("*.jsonl"))]
    cases = evaluation.read_cases(tokenizer, template, evaluation.options())
    cases = cases[cases.protocol == protocol].sort_values("limit")
    if protocol == "continue":  # DExperts' samples a prompt
        cases = cases.loc[cases.index.repeat(25)]
    return list(zip(cases.text, cases.limit))[:few]


def answering_ways(model, tokenizer, protocol: str, given) -> dict:
    """Each answers a protocol's prompts."""
    asked = questions(tokenizer, protocol, given.few)
    texts, limits = zip(*asked)
    size = given.batch_size or 64
    temperature, stop = (1.0, None) if protocol == "continue" else (0.1, "\n")
    how = {"temperature": temperature, "top_p": 0.9, "max_new_tokens": max(limits)}

    def plain():
        return generate_plainly(model, tokenizer, texts, size, **how)

    def server():
        ends = {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = transformers.GenerationConfig(do_sample=True, **how, **ends)
        ids = tokenizer(list(texts)).input_ids
        made = model.generate_batch(inputs=ids, generation_config=config)
        return [out.generated_tokens for out in made.values()]

    def cut(rows):
        made = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.split("\n")[0] if stop else text for text in made]

    def ours():
        made = []
        for i in range(0, len(asked), size):
            some = asked[i : i + size]
            made += evaluation.generate(model, tokenizer, temperature, stop, some)
        return made

    name = f"04, {protocol}"
    ways = {f"{name}: plain generate": lambda: cut(plain()), f"{name}: ours": ours}
    if given.server:
        ways[f"{name}: continuous batching"] = lambda: cut(server())
    return ways


def speed(given) -> None:
    model, tokenizer = load(given)
    if given.stage == "01":
        groups = [mining_ways(model, tokenizer, given)]
    else:
        protocols = ["continue"] if given.shape else ["rewrite", "continue"]
        groups = [answering_ways(model, tokenizer, p, given) for p in protocols]
    for ways in groups:
        compare(ways, tokenizer, given.repeats)


def compare(ways: dict, tokenizer, repeats: int) -> None:
    rates = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            torch.manual_seed(turn)
            torch.backends.cuda.enable_cudnn_sdp(
                "ours" not in name
            )  # as its users have it
            start = time.perf_counter()
            useful = sum(map(len, tokenizer(way()).input_ids))
            if turn:  # the first is for warming up
                rates[name].append(useful / (time.perf_counter() - start))
    (best,) = [statistics.median(rates[name]) for name in rates if "ours" in name]
    for name, some in rates.items():
        rate = statistics.median(some)
        spread = f"[{min(some):.1f}, {max(some):.1f}]"
        hours = 10_000 * 25 * 20 / rate / 3600
        size = f"; DExperts' size: {hours:.2f} h" if "continue" in name else ""
        print(
            f"{name:35s} {rate:6.1f} useful tokens/s {spread}; ours is {best / rate:.1f} times"
            + size,
            flush=True,
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
        sys.argv = [
            "01",
            "--seeds",
            f"{folder}/seeds.jsonl",
            "--run",
            folder,
            "--insert",
            "0",
        ]
        before = peak()
        mining.main()
        print(f"{n} seeds: peak {peak():.0f} MB, {before:.0f} MB before the first")


class Options(Tap):
    stage: Literal["01", "04"] = "01"
    shape: str | None = None  # of bench_shapes.py, random weights
    batch_size: int | None = None  # default: the stage's
    few: int | None = None  # first so many seeds (default 16) or answers
    server: bool = False  # continuous batching, too
    repeats: int = 3  # timed turns
    memory: bool = False  # measure memory instead
    at: int | None = None  # of a process of --memory


if __name__ == "__main__":
    how = {"formatter_class": RawDescriptionHelpFormatter, "description": __doc__}
    args = Options(underscores_to_dashes=True, **how).parse_args()
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
        speed(args)
