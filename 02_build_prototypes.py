#!/usr/bin/env python
"""Stage 02: tokenise the mined sets, and phi and prototypes under the base model (section 3.1).

phi(x) is nats per token over the tokens of x, given x's context (a BOS, and a prompt if there is
one). Each mined line becomes anchors of up to three kinds, by --context, by default the first two:
  none    the paper's: bare sentences. The context is the BOS alone (the EOS where there is none).
  toxic   after "Sentence: <negative>\\nParaphrase:", the negatives of most of its words: positives
          are the seed and those mined; negatives are that sentence itself, so that copying it
          counts against the model, and the other toxic ones. The first of each are `required`:
          always drawn.
  seed    after the seed in that prompt: positives and negatives as mined. With it outputs were a
          little farther from their input.

reads   runs/default/mined*.jsonl; or own pairs: --mined pairs.tsv, a toxic text and clean ones a
        line, with tabs between
writes  runs/default/prototypes.safetensors  input_ids (tokens,), offsets (S + 1,), start (S,)
        where phi begins, anchor (S,) ascending, is_positive (S,), required (S,), nll (S,),
        prototype (A,), seed (A,) the mined line, the last of its text, held_out (A,) for
        validation, context (A,) 0 none, 1 seed, 2 toxic; metadata: format, model,
        load (from_pretrained's arguments, JSON), model's, tokenizer's and mined files' sha256,
        phi, prompt, tensors (their checksum)

    python 02_build_prototypes.py                   # a minute on 2 CPU cores
    python 02_build_prototypes.py --context none --positives 15 --negatives 15   # the paper's
"""

import argparse
import hashlib
import json
import logging
import math
import sys
from pathlib import Path
from typing import Literal

from tap import Tap

CONTEXTS = ("none", "seed", "toxic")


class Count(int):
    """1 or more, below a billion"""

    def __new__(cls, text):
        if not 1 <= int(text) < 10**9:
            raise argparse.ArgumentTypeError(f"{text}: must be {cls.__doc__}")
        return int(text)


class Rate(float):
    """from 0 to 1"""

    def __new__(cls, text):
        if not 0 <= float(text) <= 1:
            raise argparse.ArgumentTypeError(f"{text}: must be {cls.__doc__}")
        return float(text)


def fail(message):
    # one line, however many a library has
    print(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    raise SystemExit(2)


class Options(Tap):
    run: Path = Path("runs/default")  # folder of this run
    mined: list[Path] | None = None  # instead of RUN/mined*.jsonl; .tsv: toxic and clean texts
    out: Path | None = None  # instead of RUN/prototypes.safetensors
    model: str = "assets/SmolLM2-135M-Instruct"  # path or hub id
    context: list[Literal[CONTEXTS]] = ["none", "toxic"]  # paper: none
    toxic_contexts: Count = 3  # a mined line's at most (ours)
    positives: Count = 1  # an anchor's at most; 03 draws 1
    negatives: Count = 2  # an anchor's at most; 03 draws 2
    close: Rate = 0.65
    """similarity to its seed of a positive, if any has it, and of a toxic context (ours)"""
    prompt: str = "Sentence: {}\nParaphrase:"
    """context of seed and toxic anchors; stage 04 rewrites with it (ours)"""
    validation: Rate = 0.1  # share of mined lines held out
    max_tokens: Count = 512  # at once; more on a GPU
    device: str | None = None  # auto: layers over all devices
    dtype: Literal["bfloat16", "float32", "nf4"] | None = None
    """of the base, in stages 03 and 04 too; default: the faster (paper: 4 bits)"""


Options.error = staticmethod(fail)


def options():
    args = Options(
        underscores_to_dashes=True,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    if "{}" not in args.prompt:
        fail(f"--prompt {args.prompt!r}: needs a {{}} where the sentence goes")
    if args.mined is None:
        args.mined = sorted(args.run.glob("mined*.jsonl")) or [args.run / "mined.jsonl"]
    args.out = args.out or args.run / "prototypes.safetensors"
    if args.out.suffix != ".safetensors":
        fail(f"--out {args.out}: give a .safetensors file")
    return args


if __name__ == "__main__":
    options()  # slips and --help need not wait for what follows

logging.disable(logging.WARNING)  # libraries', of what we don't use

import pandas as pd
import torch
from pydantic import BaseModel, Field
from safetensors.torch import save
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from cp_loss import (
    best_device,
    best_dtype,
    encode,
    fingerprint,
    load_model,
    model_nll,
    sequence_nll,
)

FORMAT = "cp-prototypes-2"
NF4 = {  # as from_pretrained takes it; the paper's precision
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}


class Candidate(BaseModel, strict=True, allow_inf_nan=False, str_strip_whitespace=True):
    text: str = Field(min_length=1, pattern="^.+$")  # a line
    similarity: float = 1.0
    overlap: float = 1.0


class Mined(BaseModel, strict=True, str_strip_whitespace=True):
    id: str | int
    text: str = Field(min_length=1, pattern="^.+$")
    positives: list[Candidate]
    negatives: list[Candidate]


def pair_line(text, name):
    """A mined line's JSON, of a toxic text and one or more clean ones with tabs between."""
    toxic, first, *more = text.decode("utf-8-sig").rstrip().split("\t")
    sets = {"positives": [{"text": x} for x in (first, *more)], "negatives": [{"text": toxic}]}
    return json.dumps({"id": name, "text": toxic} | sets)


def read_mined(paths):
    """All lines, by id, so that parts give the same store in any order."""
    lines = {}
    for path in paths:
        if not path.is_file():
            fail(f"{path} not found: give --mined, or run 01_mine_negatives.py first")
        for n, text in enumerate(path.open("rb"), 1):
            try:
                if path.suffix == ".tsv":
                    text = pair_line(text, f"{path}:{n}")
                line = Mined.model_validate_json(text)
            except ValueError as err:
                why = str(err).split(" [type")[0]
                fail(f"{path}:{n}: {why}: mend or delete it, or run stage 01 again")
            if lines.setdefault(line.id, line) is not line:
                fail(f"{path}:{n}: id {line.id!r} stands more than once: delete one")
    return [lines[name] for name in sorted(lines, key=str)]


def make_anchors(seed, line, args):
    """(number of its mined line, kind, sentence in the context, positives, negatives) of each."""

    def near(candidates):
        return [c.text for c in candidates if c.similarity >= args.close]

    if not line.positives or not line.negatives:
        return []
    clean = near(line.positives) or [line.positives[0].text]
    toxic = [c.text for c in line.negatives]
    anchors = [(seed, "none", "", clean, toxic)]
    if line.text in toxic:
        contexts = [line.text]
    else:
        anchors.append((seed, "seed", line.text, clean, toxic))
        closest_first = sorted(line.negatives, key=lambda c: -c.overlap)
        contexts = near(closest_first)[: args.toxic_contexts]
        clean = [line.text, *clean]
    for text in contexts:
        others = [x for x in toxic if x != text]
        anchors.append((seed, "toxic", text, clean, [text, *others]))
    return [a for a in anchors if a[1] in args.context]


def tokenise(anchors, tokenizer, args):
    """ids, start, anchor, is_positive, required: a tuple each, a sequence's at the same place."""
    rows = []
    for number, (_, kind, context, positives, negatives) in enumerate(anchors):
        sets = (
            (True, positives[: args.positives]),
            (False, negatives[: args.negatives]),
        )
        for is_positive, texts in sets:
            for text in texts:
                if kind == "none":
                    ids, start = encode(tokenizer, text)
                else:  # the newline that ends a paraphrase counts, so that ending is learnt too
                    ids, start = encode(tokenizer, f" {text}\n", args.prompt.replace("{}", context))
                required = kind == "toxic" and text == texts[0]
                rows.append((ids, start, number, is_positive, required))
    return tuple(zip(*rows))


@torch.no_grad()
def base_phi(model, ids, start, max_tokens):
    """Nats per token, (S,)."""
    nll = []
    with tqdm(total=len(ids), desc="phi", unit="sequence") as bar:
        for i in range(0, len(ids), 256):
            some = slice(i, i + 256)
            nll.append(model_nll(model, ids[some], start[some], max_tokens).float().cpu())
            bar.update(len(nll[-1]))
    return torch.cat(nll)


def hold_out(seed, share):
    """Which anchors (A,) are of the mined lines that only validate."""
    lines = seed.unique()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    return torch.isin(seed, lines[order[: math.ceil(len(lines) * share)]])


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def describe(model, tokenizer, args):
    """The store's metadata."""
    return {
        "format": FORMAT,
        "mined_sha256": sha256(*(p.read_bytes() for p in sorted(args.mined))),
        "model": args.model,
        "model_sha256": fingerprint(model.named_parameters()),
        "phi": "nll: mean nats per token from `start` on, the first given a BOS (EOS if none)",
        "prompt": args.prompt,
        "tokenizer_sha256": sha256(tokenizer.backend_tokenizer.to_str().encode()),
    }


def write(store, metadata, path):
    """Aside, then renamed. In sorted order, which safetensors' header has not: what is equal is
    equal byte by byte."""
    data = save(store, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors are aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{path}.tmp")
    aside.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    aside.replace(path)


def main():
    args = options()
    lines = read_mined(args.mined)
    number = {line.text: i for i, line in enumerate(lines)}  # a text's lines are held out together
    anchors = [a for line in lines for a in make_anchors(number[line.text], line, args)]
    if not anchors:
        fail(
            f"--mined {' '.join(map(str, args.mined))}, --context {' '.join(args.context)}: "
            "empty, or no anchor has both sets"
        )
    disable_progress_bar()
    args.device = args.device or best_device()
    try:
        args.dtype = args.dtype or best_dtype(args.device.replace("auto", best_device()))
        how = {"dtype": args.dtype}
        if args.dtype == "nf4":
            how = {"dtype": "bfloat16", "quantization_config": NF4}
        model, tokenizer = load_model(args.model, args.device, **how)
    except (ValueError, RuntimeError, AssertionError) as err:
        fail(f"{str(err)[:300]}: --model and --device must name what is there")
    print(f"{len(anchors)} anchors of {len(lines)} lines; {args.dtype} on {args.device}")

    ids, start, anchor, is_positive, required = tokenise(anchors, tokenizer, args)
    nll = base_phi(model, ids, start, args.max_tokens)
    anchor, good = torch.tensor(anchor), torch.tensor(is_positive)
    seed = torch.tensor([a[0] for a in anchors])
    kinds = [a[1] for a in anchors]
    store = {
        "input_ids": torch.cat(ids).int(),
        "offsets": torch.tensor([0, *map(len, ids)]).cumsum(0),
        "start": torch.tensor(start, dtype=torch.int32),
        "anchor": anchor,
        "is_positive": good,
        "required": torch.tensor(required),
        "nll": nll,
        "prototype": sequence_nll(nll[good], anchor[good], len(anchors)),
        "seed": seed,
        "held_out": hold_out(seed, args.validation),
        "context": torch.tensor([CONTEXTS.index(k) for k in kinds]),
    }
    metadata = describe(model, tokenizer, args) | {"load": json.dumps(how)}
    write(store, metadata | {"tensors": fingerprint(store.items())}, args.out)
    columns = {"context": [kinds[a] for a in anchor], "positive": good, "phi": nll}
    table = pd.DataFrame(columns).groupby(["context", "positive"]).phi
    print(table.describe(percentiles=[0.05, 0.5, 0.95]).round(2).to_string())
    print(f"{len(ids)} sequences, {len(store['input_ids'])} tokens; {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except (IndexError, OSError, RuntimeError) as err:
        fail(f"{str(err)[:300]}: make room; memory: lower --max-tokens; an index: shorter texts")
