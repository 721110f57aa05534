"""Stages 02 and 03 on one GPU at the shapes of the paper's models, with random weights.

    .venv/bin/pip install --no-deps trl==1.16.0                  # the peer
    .venv/bin/python tests/bench_shapes.py                       # after `make all` or stage 02
    .venv/bin/python tests/bench_shapes.py --shapes mistral-7b --bits 4

The sequences are the run's, their tokens made to fit the vocabulary: lengths are real, phi is not,
which costs the same. `default` has stage 03's sets, 9 anchors with |P| = 1 and |N| = 2; `paper` 9
and `large` 36 with 3 and 5, for which an anchor's sequences repeat. A step is the whole of it,
--utility's passes in its time but not in its tokens. Peak: share of a bare product's rate, 8,192 a
side in bfloat16; operations are those of the step's products, without attention's and
recomputation. Memory is the peak above the weights. Parts are of three further steps, with the
clock waiting for the GPU at each border. `full logits, padded` and TRL's DPO get the same draws;
DPO pairs each negative with a positive, whose tokens count each time; it runs with cuDNN's
attention, torch's own choice, and without, as all our stages do.
"""

import gc
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from typing import Literal
from unittest import mock

import bitsandbytes as bnb
import tokenizers
import torch
import transformers
from tap import Tap
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from bench_training import Clock, dpo, memory, official, train, training, wait
from cp_loss import best_device, linear_nll, model_nll

BIG = {"num_key_value_heads": 8, "intermediate_size": 14336}
SHAPES = {
    "mistral-7b": MistralConfig(vocab_size=32000, sliding_window=None, **BIG),
    "llama-3-8b": LlamaConfig(vocab_size=128256, **BIG),
    "gemma-2-9b": Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        num_hidden_layers=42,
        num_attention_heads=16,
        head_dim=256,
        **BIG,
    ),
    "tiny": LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
SETS = {
    "default": "",
    "paper": "--positives 3 --negatives 5",
    "large": "--positives 3 --negatives 5 --anchors 36",
}
WAYS = [
    "ours",
    "ours --utility 0",
    "ours --checkpointing",
    "full logits, padded",
    "TRL DPO",
    "TRL DPO without cuDNN",
]


def seconds(run, device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def matrix_peak(device) -> float:
    """Operations a second of one product in bfloat16."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    times = [seconds(lambda: a @ b, device) for _ in range(20)]
    return 2 * n**3 / statistics.median(times[5:])


def build(name: str, bits: int, device):
    """The model, random, in bfloat16 or with its layers' products in nf4."""
    with device:
        base = transformers.AutoModelForCausalLM.from_config(
            SHAPES[name], dtype=torch.bfloat16
        )
    base.requires_grad_(False).eval()
    if bits == 4:
        for block in base.model.layers.modules():
            for key, linear in block.named_children():
                if type(linear) is torch.nn.Linear:
                    setattr(block, key, quantized(linear))
        base.is_loaded_in_4bit = True
    return base


def quantized(linear):
    out = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4", module=out)
    out.weight = weight.to(linear.weight.device)
    return out


def numbers(size: int):
    """A tokenizer whose tokens are numbers."""
    words = {f"{i};": i for i in range(size)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0;"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        ";", "merged_with_previous"
    )
    plain.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="1;", eos_token="2;", pad_token="2;"
    )


def settings(way: str, sets: str, given):
    own = way.split()[1:] if way.startswith("ours") else []
    sys.argv = ["03", "--run", str(given.run), "--budget", "16384", "--rank", "16"]
    sys.argv += ["--device", given.device, *SETS[sets].split(), *own]
    return training.options()


def parts_of(model, optimizer, store, picks, args) -> dict:
    """Shares of a step's time, by part."""
    spent, device = Counter(), model.device

    def watched(name, run):
        def timed(*a, **k):
            out = []
            spent[name] += seconds(lambda: out.append(run(*a, **k)), device)
            return out[0]

        return timed

    ours = {name: getattr(training, name) for name in ("objective", "utility_step")}
    ours = {name: watched(name, run) for name, run in ours.items()}
    ours["phi"] = watched("forward", training.phi)
    head = watched("head", linear_nll)
    step = watched("all", training.gradient)
    with (
        mock.patch.multiple(training, **ours),
        mock.patch("cp_loss.linear_nll", head),
    ):
        for chosen in picks:
            step(model, store, chosen, args)
            watched("optimizer", optimizer.step)()
    spent["backward"] = spent.pop("all") - sum(
        spent[k] for k in ("forward", "objective", "utility_step")
    )
    spent["trunk"] = spent.pop("forward") - spent["head"]
    return {name: took / spent.total() for name, took in spent.items()}


def ours_or_official(way: str, base, store, picks, args, given) -> dict:
    model = training.with_lora(base, args)
    ours = way.startswith("ours")
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        clock = Clock(model, store, args, 0, 0)
        step = training.gradient if ours else official
        out = train(step, model, optimizer, store, picks, args, clock)
        if ours:
            out["parts"] = parts_of(model, optimizer, store, picks[:3], args)
            work = sum(operations(base, store, c, args.utility) for c in picks[1:])
            out["share"] = work / out["seconds"] / given.peak
        return out
    finally:
        model.base_model.gradient_checkpointing_disable()
        model.unload()


def operations(base, store, chosen, utility: float) -> float:
    """Of a step's products, once each, a shared context's too: forward, and backward to what is
    not frozen."""
    neutral = chosen[store.is_positive[chosen]][:6]  # utility_step's
    contexts = {tuple(store.ids[i][: store.start[i]].tolist()) for i in chosen}
    scored = [len(store.ids[i]) - int(store.start[i]) for i in chosen]
    alone = 1 + sum(len(store.ids[i]) - int(store.start[i]) for i in neutral)
    alone *= utility > 0
    config = base.config
    head = config.vocab_size * config.hidden_size
    lora = trunk = 0
    for name, module in base.model.named_modules():
        if "lora_" in name and hasattr(module, "weight"):
            lora += module.weight.numel()
        elif name.endswith("base_layer"):
            trunk += module.in_features * module.out_features
    size = sum(scored) + sum(map(len, contexts))
    ours = size * (4 * trunk + 6 * lora) + sum(scored) * 4 * head
    return ours + alone * (6 * trunk + 8 * lora + 6 * head)


def measure(way: str, sets: str, base, store, given) -> dict:
    args = settings(way, sets, given)
    picks = [training.batch(store, args, s) for s in range(1, given.steps + 2)]
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # load_model switches it off for all stages; transformers and TRL leave it on
    torch.backends.cuda.enable_cudnn_sdp(way == "TRL DPO")
    if way.startswith("TRL DPO"):
        given.gap = given.limit = 0
        settled = 1e-5, given, args
        return dpo([], base, numbers(base.config.vocab_size), store, picks, settled)
    return ours_or_official(way, base, store, picks, args, given)


def read(vocabulary: int, given):
    """The run's anchors, each with its positives and negatives again and again, to 3 and 5."""
    store, _ = training.read_store(settings("ours", "default", given))
    some = []
    for a in store.anchor.unique():
        own = (store.anchor == a).nonzero().flatten()
        for good, count in ((True, 3), (False, 5)):
            of_kind = own[store.is_positive[own].bool() == good]
            some.append(of_kind.repeat(count)[:count])
    some = torch.cat(some)
    store.ids = [store.ids[i] % vocabulary for i in some]
    for name in ("anchor", "start", "is_positive", "required", "nll"):
        setattr(store, name, getattr(store, name)[some])
    return store


def scoring(base, store) -> float:
    """Stage 02's tokens a second, 64 sequences."""
    chosen = store.ids[:64]

    def run():
        with torch.no_grad():
            model_nll(base, chosen, max_tokens=16384)

    times = [seconds(run, base.device) for _ in range(5)]
    return sum(map(len, chosen)) / statistics.median(times[1:])


class Options(Tap):
    run: Path = Path("runs/default")
    shapes: list[Literal[*SHAPES]] = list(SHAPES)[:3]
    bits: list[Literal[4, 16]] = [16, 4]
    ways: list[Literal[*WAYS]] = [*WAYS]
    sets: list[Literal[*SETS]] = [*SETS]
    steps: int = 20  # timed
    device: str = best_device()


def main() -> None:
    form = RawDescriptionHelpFormatter
    given = Options(description=__doc__, formatter_class=form).parse_args()
    device = torch.device(given.device)
    given.peak = matrix_peak(device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, {given.peak / 1e12:.0f} TFLOP/s")
    print("| shape | way | real tokens/s | of the peak | GB | s a step | parts |")
    for name in given.shapes:
        for bits in given.bits:
            run_shape(name, bits, given)


def run_shape(name: str, bits: int, given) -> None:
    gc.collect()
    base = build(name, bits, torch.device(given.device))
    store = read(base.config.vocab_size, given)
    kind = f"| {name}, {bits} bits, {memory(base.device) / 1e9:.1f} GB"
    print(f"{kind} | stage 02 | {scoring(base, store):.0f} | | | | |", flush=True)
    for way in given.ways:
        for sets in given.sets:
            if sets != "default" and not way.startswith("ours"):
                continue
            began = time.perf_counter()
            try:
                got = measure(way, sets, base, store, given)
            except Exception as err:  # one that doesn't fit: the others go on
                print(
                    f"{kind} | {way}, {sets} | {str(err).splitlines()[0]} |",
                    flush=True,
                )
                continue
            share = f"{got['share']:.0%}" if "share" in got else ""
            parts = got.get("parts", {})
            parts = ", ".join(f"{k} {v:.0%}" for k, v in sorted(parts.items()))
            each = got["seconds"] / (got["steps"] - 1)
            print(
                f"{kind} | {way}, {sets} | {got['rate']:.0f} | {share} "
                f"| {got['memory'] / 1e9:.1f} | {each:.3f} | {parts} |",
                flush=True,
            )
            print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
