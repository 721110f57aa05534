#!/usr/bin/env python
"""Stage 02: tokenise the mined sets and compute phi and the prototypes under the base model (section 3.1).

phi(x) is nats per token over the tokens of x, given x's context (a BOS, and a prompt if there is one). Each
mined line becomes anchors of up to three kinds, by --context:
  none    the paper's: bare sentences. The context is the BOS alone (the EOS where a tokenizer has none).
  seed    after "Paraphrase: <seed>": positives and negatives as mined.
  toxic   after "Paraphrase: <one of its own negatives>": positives as mined, with the seed; negatives are the
          other toxic sentences and that sentence itself, so that copying it counts against the model.

reads   runs/default/mined.jsonl
writes  runs/default/prototypes.safetensors  input_ids (tokens,), offsets (S + 1,), start (S,) where phi begins,
        anchor (S,), is_positive (S,), nll (S,), prototype (A,), seed (A,) the mined line, context (A,) 0/1/2;
        metadata: format, model, model_sha256, tokenizer_sha256, phi, prompt, contexts, dtype, mined_sha256

    python 02_build_prototypes.py                   # 3 minutes on 2 CPU cores
    python 02_build_prototypes.py --context none    # the paper's anchors
"""
import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, logging

from cp_loss import check_model, model_nll

FORMAT = "cp-prototypes-1"
CONTEXTS = ("none", "seed", "toxic")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of this run (default: %(default)s)")
    p.add_argument("--mined", type=Path, nargs="+", help="mined files, in any order; default: RUN/mined*.jsonl")
    p.add_argument("--out", type=Path, help="default: RUN/prototypes.safetensors")
    p.add_argument("--model", default="assets/SmolLM2-135M-Instruct", help="target LM: path or hub id (default: %(default)s)")
    p.add_argument("--context", nargs="+", choices=CONTEXTS, default=list(CONTEXTS), help="which anchors to make (paper: none; default: all)")
    p.add_argument("--toxic-contexts", type=int, default=3, help="anchors after a toxic sentence that a mined line has at most (ours; default: %(default)s)")
    p.add_argument("--close", type=float, default=0.65, help="least similarity to its seed of a positive, if any has it, and of a toxic context (ours; default: %(default)s)")
    p.add_argument("--prompt", default="Sentence: {}\nParaphrase:", help="context of seed and toxic anchors; stage 04 rewrites with it (ours)")
    p.add_argument("--max-tokens", type=int, default=1024, help="tokens computed at once; more on a GPU (default: %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="auto: layers spread over all devices (default: %(default)s)")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "nf4"], help="of the base, in stages 03 and 04 too; nf4 needs bitsandbytes (default: %(default)s)")
    args = p.parse_args()
    args.mined = args.mined or sorted(args.run.glob("mined*.jsonl")) or [args.run / "mined.jsonl"]
    args.out = args.out or args.run / "prototypes.safetensors"
    if "{}" not in args.prompt:
        fail(f"--prompt {args.prompt!r}: needs a {{}} where the sentence goes")
    return args


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def precision(dtype: str) -> dict:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"dtype": torch.bfloat16, "quantization_config": nf4} if dtype == "nf4" else {"dtype": getattr(torch, dtype)}


def read_mined(paths: list[Path]) -> list[dict]:
    lines, seen = [], set()
    for path in paths:
        if not path.is_file():
            fail(f"{path} not found: run 01_mine_negatives.py first")
        for n, text in enumerate(path.open(encoding="utf-8"), 1):
            try:
                line = json.loads(text)
                line["id"], [p["text"] for p in line["positives"]], [p["text"] for p in line["negatives"]], line["text"]
            except (ValueError, KeyError, TypeError):
                fail(f"{path}:{n}: not a line of stage 01: mend or delete it (a torn last line: run stage 01 again)")
            if line["id"] in seen:
                fail(f"{path}:{n}: id {line['id']!r} stands more than once: delete one")
            seen.add(line["id"])
            lines.append(line)
    if not lines:
        fail(f"{paths[0]} is empty: run 01_mine_negatives.py again")
    return sorted(lines, key=lambda x: str(x["id"]))  # so that shards give the same store in any order


def make_anchors(line: dict, args: argparse.Namespace) -> list[tuple[str, str, list[str], list[str]]]:
    """(context kind, context sentence, positives, negatives) of each anchor of a mined line."""
    near = lambda some: [c["text"] for c in some if c.get("similarity", 1) >= args.close]  # noqa: E731
    clean, toxic = near(line["positives"]) or [line["positives"][0]["text"]], [c["text"] for c in line["negatives"]]
    anchors = []
    if "none" in args.context:
        anchors.append(("none", "", clean, toxic))
    if "seed" in args.context:
        anchors.append(("seed", line["text"], clean, toxic))
    if "toxic" in args.context:
        closest = near(sorted(line["negatives"], key=lambda c: -c["similarity"]))[:args.toxic_contexts]
        anchors += [("toxic", c, [line["text"], *clean], [c, *(x for x in toxic if x != c)]) for c in closest]  # the first of each: always drawn
    return anchors


def tokenise(anchors: list, tokenizer, prompt: str) -> tuple[list[torch.Tensor], list[int]]:
    """Token ids of every sequence in order, and where phi begins in each."""
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    ids, start = [], []
    for kind, context, positives, negatives in anchors:
        for text in positives + negatives:
            if kind == "none":
                before, after = first, tokenizer(text, add_special_tokens=False).input_ids
            else:  # the newline that ends a paraphrase counts, so that ending is learnt too
                before = first + tokenizer(prompt.format(context), add_special_tokens=False).input_ids
                after = tokenizer(" " + text, add_special_tokens=False).input_ids + newline
            ids.append(torch.tensor(before + after, dtype=torch.int32))
            start.append(len(before))
    return ids, start


def describe(name: str, values: np.ndarray) -> str:
    q = np.percentile(values, [5, 25, 50, 75, 95])
    return f"  {name:10s} n {len(values):5d}  mean {values.mean():5.2f}  5/25/50/75/95%: " + " ".join(f"{x:5.2f}" for x in q)


def main() -> None:
    args = options()
    lines = read_mined(args.mined)
    usable = [(i, x) for i, x in enumerate(lines) if x["positives"] and x["negatives"]]
    if not usable:
        fail(f"{args.mined[0]}: no anchor has both positives and negatives: loosen stage 01's --similar or --toxic")
    print(f"{len(usable)} of {len(lines)} mined lines have positives and negatives; the others are left out")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto" if args.device == "auto" else {"": args.device}, **precision(args.dtype)).eval()
        for module in model.modules():  # bitsandbytes would repack for CPU inference; stage 03 can't train such weights
            module.support_avx512bf16_for_cpu = False
        check_model(model)
    except (OSError, ValueError, ImportError) as err:
        fail(f"{args.model}: {str(err).splitlines()[0]}")

    anchors, seed = [], []
    for i, line in usable:
        made = make_anchors(line, args)
        anchors, seed = anchors + made, seed + [i] * len(made)
    ids, start = tokenise(anchors, tokenizer, args.prompt)
    is_positive = torch.tensor([flag for _, _, p, n in anchors for flag in [True] * len(p) + [False] * len(n)])
    anchor = torch.tensor([a for a, (_, _, p, n) in enumerate(anchors) for _ in p + n])
    nll = []
    with torch.no_grad():
        for i in tqdm(range(0, len(ids), 64), desc="phi", unit="x64 sequences"):
            nll.append(model_nll(model, ids[i:i + 64], start[i:i + 64], args.max_tokens).float().cpu())
    nll = torch.cat(nll)
    total = torch.zeros(len(anchors)).index_add(0, anchor[is_positive], nll[is_positive])
    prototype = total / torch.bincount(anchor[is_positive])

    tensors = {"input_ids": torch.cat(ids), "offsets": torch.tensor([0, *np.cumsum([len(x) for x in ids])]),
               "start": torch.tensor(start, dtype=torch.int32), "anchor": anchor, "is_positive": is_positive, "nll": nll,
               "prototype": prototype, "seed": torch.tensor(seed), "context": torch.tensor([CONTEXTS.index(a[0]) for a in anchors])}
    # the base weights' fingerprint, made alike in stage 03
    fingerprint = hashlib.sha256(repr([(k, torch.hash_tensor(w).item()) for k, w in model.named_parameters()]).encode()).hexdigest()
    metadata = {"format": FORMAT, "model": args.model, "model_sha256": fingerprint, "dtype": args.dtype,
                "tokenizer_sha256": hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
                "phi": "nll: mean nats per token from `start` on, first token given BOS (EOS if none)",
                "prompt": args.prompt, "contexts": " ".join(CONTEXTS),
                "mined_sha256": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(args.mined))).hexdigest()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    aside = args.out.with_suffix(".tmp")
    save_file(tensors, aside, metadata)
    os.replace(aside, args.out)

    above = nll < prototype[anchor]
    for k, kind in enumerate(CONTEXTS):
        mine = (tensors["context"] == k)[anchor]
        if mine.any():
            print(f"\ncontext {kind}: {int((tensors['context'] == k).sum())} anchors; phi in nats per token")
            print(describe("positives", nll[mine & is_positive].numpy()))
            print(describe("negatives", nll[mine & ~is_positive].numpy()))
            print(f"  negatives more probable than their prototype: {above[mine & ~is_positive].float().mean():.1%}")
    print(f"\n{len(ids)} sequences, {len(tensors['input_ids'])} tokens; {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130)
