"""Stage 01: seeds, the local generator, servers good and bad, judges, the rule and resuming."""

import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from conftest import REAL, ROOT, lines, mined_line, refused, write_jsonl
from cp_loss import encode, load_model, model_nll

LOOSE = ["--toxic", 0, "--benign", 1, "--similar", -1, "--length", 3]
LOOSE += [
    "--rude",
    2,
    "--clean",
    2,
    "--rounds",
    2,
    "--chunk",
    4,
    "--dtype",
    "float32",
]
SEEDS = [
    {"id": f"s{i}", "group": None, "text": mined_line(i)["text"]} for i in range(10)
]
KINDS = ("positives", "negatives", "rejected")


@pytest.fixture(scope="module")
def mining(stage):
    stage("01", "--seeds", "missing")  # loads the module
    return stage.modules["01"]


@pytest.fixture
def options(mining, monkeypatch):
    def parse(*given):
        monkeypatch.setattr(sys, "argv", ["01", *map(str, given)])
        return mining.options()

    return parse


def candidates(path: Path) -> list[dict]:
    return [c for line in lines(path) for kind in KINDS for c in line[kind]]


# Seeds


def test_formats_of_seeds(mining, options, tmp_path):
    def texts(*given):
        seeds = mining.read_seeds(options("--seeds", *given))
        return [(seed["group"], seed["text"]) for seed in seeds]

    plain = tmp_path / "plain.txt"
    plain.write_text("One line.\n\n  Another line. \nOne line.\n")
    assert texts(plain) == [(None, "One line."), (None, "Another line.")]

    toxigen = tmp_path / "neutral_left_handed_1k.txt"
    toxigen.write_text(
        "- a one\\n- b two\\n-\n- b two\\n- c three, and - more\\n-\n"
    )
    wanted = [("left_handed", x) for x in ("a one", "b two", "c three, and - more")]
    assert texts(toxigen) == wanted
    both = [*wanted[:1], (None, "One line.")]
    assert texts(toxigen, plain, "--limit", 1) == both
    assert texts(toxigen, "--limit", 3) == wanted
    whole = [r"a one\n- b two\n", r"b two\n- c three, and - more\n"]
    paper = texts(toxigen, "--preset", "paper")
    assert paper == [("left_handed", text) for text in whole]
    odd = tmp_path / "odd.txt"
    odd.write_bytes("\ufeffOne\u2028line.\r\nTwo.".encode())
    assert texts(odd) == [(None, "One\u2028line."), (None, "Two.")]
    odd.write_text("\t\n\u3000\nA tab.\t\n A wide space.\u3000\n\xa0- Hard.\xa0\n")
    seeds = mining.read_seeds(options("--seeds", odd, "--limit", 2))
    assert [seed["text"] for seed in seeds] == ["A tab.", "A wide space."]
    for seed in seeds:  # as a resumed run reads it
        assert mining.parse(json.dumps(seed), odd) == seed

    rows = [{"sentence": x} for x in ("From a data set.\n", None)]
    write_jsonl(tmp_path / "set/train.jsonl", rows)
    seeds = write_jsonl(
        tmp_path / "s.jsonl", [{"id": 1, "group": "g", "text": "A seed. "}]
    )
    both = texts(seeds, f"datasets:{tmp_path / 'set'}:train:sentence")
    assert both == [("g", "A seed."), (None, "From a data set.")]


def test_columns_within_columns(mining, options, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": {"text": "Two\nlines."}}])
    prompt = f"datasets:{tmp_path}:train:prompt"
    (seed,) = mining.read_seeds(options("--seeds", f"{prompt}.text"))
    assert seed["text"] == "Two lines."
    with pytest.raises(SystemExit):  # all of a row's fields
        mining.read_seeds(options("--seeds", prompt))


def test_groups_that_the_official_code_leaves_out(
    mining, options, tmp_path, capsys
):
    files = [tmp_path / f"neutral_{name}_1k.txt" for name in ("trans", "women")]
    for path in files:
        path.write_text(f"- of {path.name}\\n-\n")

    def groups(*given):
        seeds = mining.read_seeds(options("--seeds", *files, *given))
        return [seed["group"] for seed in seeds], capsys.readouterr().out

    said = "1 seeds of 2 texts, others left out, repeated, empty or over --limit\n"
    assert groups("--preset", "paper") == (["women"], said)
    assert groups() == (
        ["trans", "women"],
        said.replace("1 seeds of 2", "2 seeds of 4"),
    )


BAD_SEEDS = {
    None: ["seeds.jsonl", "make data"],
    "": ["seeds.jsonl:1", "EOF"],
    '{"id": 1, "text": "a b"}\n{oops\n': ["seeds.jsonl:2", "Invalid JSON"],
    '{"id": 1}\n': ["seeds.jsonl:1", "text", "required"],
    '{"id": 1, "text": " "}\n': ["seeds.jsonl:1", "at least 1 character"],
    '{"id": 1, "text": "a\\nb"}\n': ["seeds.jsonl:1", "pattern"],
    "[1]\n": ["seeds.jsonl:1"],
    '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n': [
        "seeds.jsonl",
        "more than once",
    ],
}


@pytest.mark.parametrize("content", BAD_SEEDS)
def test_refuses_bad_seeds(stage, tmp_path, capsys, content):
    seeds = tmp_path / "seeds.jsonl"
    if content is not None:
        seeds.write_text(content)
    status = stage("01", "--seeds", seeds, "--run", tmp_path / "run")
    refused(capsys, status, *BAD_SEEDS[content])
    assert not (tmp_path / "run/mined.jsonl").exists()


def test_refuses_bad_options(stage, tmp_path, capsys):
    bad = [("--rude", 0), ("--temperature", 0), ("--temperature", "nan")]
    for name, value in [*bad, ("--length", -1)]:
        refused(capsys, stage("01", f"{name}={value}"), name, str(value))
    spec = f"datasets:{tmp_path}/none:train:text"
    refused(capsys, stage("01", "--seeds", spec), spec)
    for name, how in (
        ("a.csv", "ascii"),
        ("a.jsonl.gz", "ascii"),
        ("a.txt", "utf-16"),
    ):
        (tmp_path / name).write_bytes("text\nA seed, äh.\n".encode(how, "replace"))
        refused(capsys, stage("01", "--seeds", tmp_path / name), name)
    refused(capsys, stage("01", "--seeds", tmp_path), str(tmp_path))
    refused(capsys, stage("01", "--out", tmp_path / "x.json"), "--out", ".jsonl")
    refused(
        capsys,
        stage("01", "--generator", "http://me:key@host/v1#m"),
        "OPENAI_API_KEY",
    )


@pytest.mark.parametrize(
    "option", [("--encoder", "/none"), ("--judge", "/none"), ("--device", "cuda:9")]
)
def test_models_that_cannot_be_had(stage, tiny, tmp_path, capsys, option):
    seeds = write_jsonl(tmp_path / "s.jsonl", [{"id": 1, "text": "A seed."}])
    given = ["--model", tiny, "--seeds", seeds, "--run", tmp_path, *option]
    refused(capsys, stage("01", *given), "models: ")


def test_a_judge_may_mind_no_word(stage, mining, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "toxic_words", lambda *_: [])
    seeds = write_jsonl(
        tmp_path / "s.jsonl",
        [{"id": 1, "text": "A seed is here, and it has room for many words."}],
    )
    small = ["--rounds", 1, "--rude", 1, "--clean", 1, "--run", tmp_path]
    assert stage("01", "--model", tiny, "--seeds", seeds, *small) == 0


def test_a_foreign_file_is_not_cut(stage, tmp_path, capsys):
    path = tmp_path / "notes.jsonl"
    path.write_text("my notes")
    seeds = write_jsonl(tmp_path / "s.jsonl", [{"id": 1, "text": "A seed."}])
    refused(capsys, stage("01", "--seeds", seeds, "--out", path), "notes.jsonl:1")
    assert path.read_text() == "my notes"


# The rule

SEED = "The cat sat on the mat."


def entry(mining, kind, text, toxicity, similarity, nll):
    scores = {"toxicity": toxicity, "similarity": similarity, "nll": nll}
    ratio = len(text.split()) / len(SEED.split())
    same = {"length_ratio": ratio, "overlap": mining.overlap(SEED, text)}
    return {"kind": kind, "text": text} | scores | same


POSITIVE = {
    "the cat sat upon a mat": (0.0, 0.9, 4.0, "kept"),
    "The cat sat on the mat!": (0.0, 1.0, 4.0, "copy"),
    "on mats the cat sat down": (0.0, 0.8, 6.0, "kept"),
    "a mat had the cat on it": (0.0, 0.7, 1.0, "more than wanted"),
    "a damned cat on the mat": (0.9, 0.9, 4.0, "judge"),
}
NEGATIVE = {
    "the dumb cat sat on the mat": (0.9, 0.9, 9.0, "more than wanted"),
    "the stupid cat sat on the mat": (0.9, 0.9, 5.5, "kept"),
    "that idiot of a cat sat on mats": (0.9, 0.9, 4.8, "kept"),
    "that idiot of a cat sat on mats ": (0.9, 0.9, 4.8, "near-duplicate"),
    "that idiot of a cat sat on the mats": (0.9, 0.9, 4.7, "near-duplicate"),
    "the cat sat on the mat": (0.9, 0.9, 5.0, "copy"),
    "cat": (0.9, 0.9, 5.0, "length"),
    "the dumb cat lay all day on a mat by the door": (0.9, 0.9, 5.0, "length"),
    "the kind cat sat on the mat": (0.1, 0.9, 5.0, "judge"),
    "the dumb dog ran up the hill": (0.9, 0.2, 5.0, "meaning"),
    "Rude: the dumb cat on the mat": (0.9, 0.9, 5.0, "prompt leftover"),
    "I'm sorry, the dumb cat": (0.9, 0.9, 5.0, "refusal"),
    "dumb dumb cat on a dumb": (0.9, 0.9, 5.0, "repetition"),
}


def test_selection_rule(mining, options):
    args = options("--keep-positives", 2, "--keep-negatives", 2)
    pool = [entry(mining, "positive", text, *x[:3]) for text, x in POSITIVE.items()]
    pool += [
        entry(mining, "negative", text, *x[:3]) for text, x in NEGATIVE.items()
    ]
    line = {"text": SEED, "positives": [], "negatives": [], "rejected": list(pool)}
    for _ in range(2):  # another round with nothing new changes nothing
        mining.select(line, args)
        rules = {
            (c["kind"], c["text"]): c["rule"] for kind in KINDS for c in line[kind]
        }
        wanted = {("positive", text): x[3] for text, x in POSITIVE.items()}
        wanted |= {("negative", text): x[3] for text, x in NEGATIVE.items()}
        assert rules == wanted
        # the most similar first; the nearest to the positives' mean nll of 5 first
        assert [c["nll"] for c in line["positives"]] == [4.0, 6.0]
        assert [c["nll"] for c in line["negatives"]] == [4.8, 5.5]
        assert [c["nll_distance"] for c in line["negatives"]] == [0.2, 0.5]
        # a positive's would change its rank
        assert all("nll_distance" not in c for c in line["positives"])
        assert sum(len(line[kind]) for kind in KINDS) == len(pool)


def test_scores_by_hand(mining, options, tiny):
    """Each candidate's own, and with its own seed."""
    model, tokenizer = load_model(str(tiny), "cpu", dtype="float32")

    def encode_all(texts, **_):
        return np.array([[0.6, 0.8] if "dog" in x else [1, 0] for x in texts])

    def judge(texts):
        return [0.9 if "damn" in x else 0.1 for x in texts]

    drawn = [({"text": SEED}, "The damn cat sat on the mat.")]
    drawn += [({"text": "A cat came."}, "A dog came by here.")]
    scorers = model, tokenizer, Namespace(encode=encode_all), judge
    made = mining.score(drawn, "negative", scorers, options("--toxic", 0))
    assert [c["similarity"] for c in made] == [1, 0.6]
    assert [c["toxicity"] for c in made] == [0.9, 0.1]
    assert [c["length_ratio"] for c in made] == [1.1667, 1.6667]
    assert [c["overlap"] for c in made] == [0.9231, 0.5]
    ids = encode(tokenizer, drawn[0][1])[0]
    with torch.no_grad():
        assert made[0]["nll"] == pytest.approx(
            model_nll(model, [ids]).item(), abs=1e-3
        )
    assert "nll" not in made[1]  # too long, so never kept


def test_a_round_is_for_those_that_lack_a_kind(mining, options, monkeypatch):
    """A little hotter, with other examples. The second seed has enough from the first one on."""
    args = options("--rounds", 2, "--rude", 3, "--clean", 2, "--insert", 0)
    args.prompts, asked = mining.PROMPTS[None], []

    def generate(prompts, _limit, count, temperature):
        asked.append((len(prompts), count, temperature, prompts[0]))
        return []

    def select(line, _args):
        line["positives"], line["negatives"] = (
            [0] * 3 * ("b" in line["text"]),
        ) * 2

    monkeypatch.setattr(mining, "score", lambda drawn, *_: [{} for _ in drawn])
    monkeypatch.setattr(mining, "select", select)
    seeds = [{"id": x, "text": x} for x in "abc"]
    mining.mine_chunk(seeds, generate, [None], args)
    assert [x[:3] for x in asked] == [
        (3, 2, 0.7),
        (2, 3, 0.7),
        (2, 2, 0.75),
        (2, 3, 0.75),
    ]
    assert asked[0][3] != asked[2][3] and asked[1][3] != asked[3][3]


def test_as_many_insertions_as_asked_for(mining, options, monkeypatch):
    """And each seed itself once, in the first round only."""
    args, drawn = options("--rounds", 2, "--insert", 5), []
    args.prompts = mining.PROMPTS[None]

    def score(some, *_):
        drawn.extend(some)
        return [{} for _ in some]

    monkeypatch.setattr(mining, "score", score)
    monkeypatch.setattr(mining, "select", lambda *_: None)
    monkeypatch.setattr(mining, "toxic_words", lambda *_: ["awful"])
    seeds = [{"id": x, "text": f"The {x} is on the table."} for x in "ab"]
    mining.mine_chunk(seeds, lambda *_: [], [None, None], args)
    assert Counter(line["id"] for line, _ in drawn) == {"a": 6, "b": 6}
    assert all(text.replace("awful ", "") == line["text"] for line, text in drawn)
    assert any("awful" in text for _, text in drawn)


def test_paper_preset_takes_the_best_by_rouge(mining, options):
    args = options("--preset", "paper", "--keep-negatives", 3)
    assert (args.rude, args.clean, args.rounds, args.limit, args.insert) == (
        20,
        20,
        1,
        500,
        0,
    )
    assert (args.keep_positives, args.keep_negatives) == (15, 3)
    pool = []
    for i in (3, 9, 1, 7):
        made = entry(mining, "negative", f"word {i}", 0.0, 0.0, 1.0)
        pool.append(made | {"overlap": i / 10})
    line = {"text": "A seed.", "positives": [], "negatives": [], "rejected": pool}
    pool.append(
        made | {"text": "She, she and herself: herself, herself", "overlap": 0.5}
    )
    mining.select(line, args)
    assert [c["overlap"] for c in line["negatives"]] == [0.9, 0.7, 0.5]
    prompt = (
        "### HUMAN: Paraphrase the following sentence in a very toxic way. make "
    )
    prompt += "sure each sentence is toxic: A seed. ### RESPONSE:"
    args.prompts = mining.PROMPTS["paper"]
    assert mining.make_prompts("negative", ["A seed."], 0, args) == [prompt]


def test_toxic_seeds_are_negatives_of_their_clean_rewrites(
    stage, mining, options, tiny, tmp_path
):
    text = "<Ann> That idiot forgot the damn tickets"  # a "prompt leftover", too
    seeds = write_jsonl(tmp_path / "seeds.jsonl", [{"id": 1, "text": text}])
    how = ["--seeds", seeds, "--model", tiny, "--rounds", 1, "--insert", 0]
    for preset, rule in (["--preset", "toxic"], "kept"), ([], "copy"):
        run = tmp_path / rule
        assert stage("01", *how, *preset, "--run", run) == 0
        (line,) = lines(run / "mined.jsonl")
        made = line["negatives"] + line["rejected"]
        (own,) = (c for c in made if c["text"] == text)
        assert (own["kind"], own["rule"]) == ("negative", rule)
    clean = entry(
        mining, "positive", "the old cat sat on the mat in the hall", 0.1, 0.9, 5.0
    )
    clean |= {"overlap": 0.95, "length_ratio": 1.0}
    assert mining.reason(clean, options()) == "copy"
    args = options("--preset", "toxic")
    assert mining.reason(clean, args) is None and args.insert == 0
    assert mining.reason(clean | {"overlap": 1.0}, args) == "copy"
    args.prompts = mining.PROMPTS["toxic"]
    asked = {
        kind: mining.make_prompts(kind, [text], 0, args)[0]
        for kind in mining.ENOUGH
    }
    assert asked["positive"].endswith(f"Rude: {text}\nPolite:")
    assert asked["negative"].endswith(f"Sentence: {text}\nParaphrase:")


def test_examples_of_another_attribute(
    stage, mining, tiny, tmp_path, capsys, monkeypatch
):
    asked, path = [], tmp_path / "formal.json"
    monkeypatch.setattr(
        mining.LocalGenerator,
        "__call__",
        lambda _, prompts, *__: asked.extend(prompts) or [],
    )
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:1])
    how = ["--seeds", seeds, "--model", tiny, "--run", tmp_path, "--examples", path]
    how += ["--out", path.with_suffix(".jsonl")]  # whose record must go elsewhere
    end = "Formal: {}\nInformal:"
    texts = {"positive": "Formal: So.\nAgain: {yes}\n\n" + end, "negative": end}
    path.write_text(json.dumps(texts))
    assert stage("01", *how, "--rounds", 1, "--insert", 0) == 0
    end = end.replace("{}", SEEDS[0]["text"])
    assert asked == ["Formal: So.\nAgain: {yes}\n\n" + end, end]
    text = (tmp_path / "miningformal.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert record["options"]["prompts"] == texts
    path.write_text(json.dumps(texts | {"positive": texts["negative"]}))
    changed = stage("01", *how, "--rounds", 1, "--insert", 0)
    refused(capsys, changed, "other seeds or options")
    for bad in ("Formal:", "{}\n\nFormal:", ""):
        path.write_text(json.dumps(texts | {"negative": bad}))
        refused(capsys, stage("01", *how), "formal.json", "negative")


def test_a_file_that_is_not_there(tmp_path):
    script, path = ROOT / "01_mine_negatives.py", tmp_path / "formal.json"
    task = [sys.executable, script, "--run", tmp_path, "--examples", path]
    done = subprocess.run(task, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "formal.json" in done.stderr


# Judges

JUDGES = [
    (["non-toxic", "toxic"], "", 1),
    (["toxic", "neutral"], "", 0),
    (["a", "b"], "#b", 1),
    (["Toxic"], "", None),
    (["toxic", "offensive"], "", 0),
    (["non-toxic", "fine"], "", None),
    (["non-toxic", "toxic"], "#toxicity", None),
]


@pytest.mark.parametrize("labels, name, toxic", JUDGES)
def test_judges_by_label(mining, tmp_path, capsys, labels, name, toxic):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=2,
        id2label=dict(enumerate(labels)),
        label2id={x: i for i, x in enumerate(labels)},
    )
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    tokenizer.save_pretrained(tmp_path)
    if toxic is None:
        with pytest.raises(SystemExit) as stop:
            mining.load_judge(f"{tmp_path}{name}", "cpu")
        refused(capsys, stop.value.code, "which means toxic", *labels)
        return
    texts = ["a sentence", "one that is longer"]
    for text, got in zip(
        texts, mining.load_judge(f"{tmp_path}{name}", "cpu")(texts)
    ):
        z = model(**tokenizer(text, return_tensors="pt")).logits[0]
        p = z.sigmoid() if len(labels) == 1 else z.softmax(0)
        assert abs(got - p[toxic].item()) < 1e-5


def test_a_judge_that_lacks_weights_is_refused(mining, tmp_path, capsys):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=99, num_hidden_layers=1, **small)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        mining.load_judge(str(tmp_path), "cpu")
    refused(capsys, stop.value.code, "lacks weights", "score.weight")


@pytest.mark.parametrize(
    "text", ["Он забыл билеты.", "彼は切符を忘れた。", "Straße!"]
)
def test_overlap_knows_all_letters(mining, text):
    assert mining.overlap(text, text) == 1 and mining.overlap(text, "Yes") == 0


# The local generator


def test_local_generation_is_the_models_own(mining, options):
    """Near greedy, shared prefix, rows that leave and all: line by line what generate() says."""
    args = options("--dtype", "float32")
    model, tokenizer = mining.load_model(args.model, "cpu", dtype="float32")
    texts = [seed["text"] for seed in SEEDS[:4]] + ["It rained."]
    args.prompts = mining.PROMPTS[None]
    prompts = mining.make_prompts("negative", texts, 0, args)
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left"
    )
    how = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 2}
    made = model.generate(**inputs, **how)[:, inputs.input_ids.shape[1] :]
    wanted = []
    for i, text in enumerate(
        tokenizer.batch_decode(made, skip_special_tokens=True)
    ):
        if "\n" in text:
            wanted += 2 * [(i, text.split("\n")[0].strip())]
    computed = []

    def count(_, inputs):
        computed.append(inputs[0].numel())

    generate = mining.LocalGenerator(model, tokenizer, args)
    with model.get_input_embeddings().register_forward_pre_hook(count):
        assert sorted(generate(prompts, 14, 2, 1e-4)) == wanted
    args.batch_size = 5  # two prompts at once
    assert sorted(generate(prompts, 14, 2, 1e-4)) == wanted
    sampled = 2 * 14 * len(prompts)
    prompted = 2 * inputs.attention_mask.sum()
    assert 3 < len(wanted) < 10 and sum(computed) < prompted / 5 + sampled


FEW = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | FEW
UNUSUAL = {
    "ignores": transformers.FalconConfig(**SMALL, initializer_range=0.2),
    "window": transformers.MistralConfig(
        **SMALL,
        intermediate_size=64,
        num_key_value_heads=2,
        sliding_window=16,
        initializer_range=0.2,
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_attention_sees_the_examples(mining, options, kind):
    """Attention that ignores what is registered, or has a window shorter than the prompt: without
    a shared prefix the first step's logits are the model's own."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(UNUSUAL[kind]).eval()
    tokenizer = AutoTokenizer.from_pretrained(REAL, padding_side="left")
    args, seen = options(), []
    generate = mining.LocalGenerator(model, tokenizer, args)
    forward = generate.forward
    generate.forward = lambda *how: seen.append(forward(*how)) or seen[-1]
    args.prompts = mining.PROMPTS[None]
    prompts = mining.make_prompts("negative", ["It rained.", "So it did."], 0, args)
    generate(prompts, 1, 1, 1.0)
    for logits, prompt in zip(seen[0], prompts):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        want = model(ids).logits[0, -1]
        assert torch.allclose(logits, want, atol=1e-5), (logits - want).abs().max()


@pytest.mark.parametrize(
    "said, line",
    [
        (' "He left early." \nSentence:', "He left early."),
        ('\nShe said, "He left."', 'She said, "He left."'),
        ('"He left," she said.', '"He left," she said.'),
        ('"He left," she said, "early."', '"He left," she said, "early."'),
    ],
)
def test_a_lines_own_quotation_marks_stay(mining, said, line):
    assert mining.first_line(said) == line


def test_names_of_groups_are_not_toxic(mining):
    """By the default judge: a sentence is what it is without them, insults stay insults."""
    judge = mining.load_judge("profanity-check", "cpu")
    names = ["", "gay", "Deaf", "transgender", "queer", "overweight", "Black"]
    texts = [f"My {name} neighbor sang." for name in names]
    assert max(mining.predict_prob(texts)) > 0.2 > max(judge(texts))
    assert len(set(judge(texts))) == 1
    insults = ["My stupid gay neighbor sang.", "Whitey!"]
    assert min(judge(insults)) > 0.5


def test_toxic_words_are_inserted(mining):
    """Words that the judge minds, common ones oftener, in the gaps; nothing else changes."""
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    judge = mining.load_judge("profanity-check", "cpu")
    words = Counter(mining.toxic_words(judge, tokenizer))
    assert len(words) > 50 and min(mining.predict_prob([*words])) >= 0.9
    assert all(word.isalpha() and len(word) >= 4 for word in words)
    # profanity-check minds these, too, but people call themselves so
    names = ["homosexual", "queer", "queers"]
    assert min(mining.predict_prob(names)) >= 0.9 and not words.keys() & set(names)
    size = {word: len(tokenizer.tokenize(f" {word}")) for word in words}
    assert {(size[word], n) for word, n in words.items()} == {
        (1, 9),
        (2, 2),
        (3, 1),
    }
    text = "The man gave his dog to that friend of Anna."
    made = [mining.insert(text, ["awful"], random.Random(i)) for i in range(400)]
    assert {x.replace("awful ", "") for x in made} == {text}
    count = sum(x.count("awful") for x in made)
    assert 0.12 < count / (400 * text.count(" ")) < 0.18
    assert mining.insert("Sang.", ["awful"], random.Random(0)) == "Sang."


# Resuming


@pytest.fixture(scope="module")
def run(stage, tiny, tmp_path_factory):
    """Mines the ten seeds into a folder."""
    seeds = write_jsonl(tmp_path_factory.mktemp("seeds") / "seeds.jsonl", SEEDS)

    def run(folder):
        assert (
            stage("01", "--seeds", seeds, "--model", tiny, "--run", folder, *LOOSE)
            == 0
        )
        return folder / "mined.jsonl"

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def test_a_run_and_its_summary(whole):
    mined = lines(whole)
    assert [line["id"] for line in mined] == [seed["id"] for seed in SEEDS]
    sizes = [(len(line["positives"]), len(line["negatives"])) for line in mined]
    assert sum(n for _, n in sizes) >= 5
    fields = {
        "kind",
        "text",
        "toxicity",
        "similarity",
        "length_ratio",
        "overlap",
        "rule",
    }
    assert all(fields <= set(c) for c in candidates(whole))
    kept = [c for line in mined for c in line["positives"] + line["negatives"]]
    assert all(c["nll"] > 0 and c["rule"] == "kept" for c in kept)

    summary = json.loads((whole.parent / "mining.json").read_text())
    assert "error" not in summary["options"] and summary["options"]["chunk"] == 4
    assert summary["anchors"] == 10
    assert summary["both"] == sum(p > 0 and n > 0 for p, n in sizes)
    rules = Counter((c["kind"], c["rule"]) for c in candidates(whole))
    means = {(row["kind"], row["rule"]): row for row in summary["candidates"]}
    assert {k: row["n"] for k, row in means.items()} == rules
    kept = [c["overlap"] for line in mined for c in line["positives"]]
    mean = means["positive", "kept"]["overlap"]
    assert mean == pytest.approx(sum(kept) / len(kept), abs=1e-4)


def test_a_killed_run_ends_with_the_same_anchors(run, whole, tmp_path):
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    # inside a line, at its end, between chunks
    for cut in (ends[5] + 1, len(content) - 1, ends[2], ends[3]):
        (tmp_path / "mined.jsonl").write_bytes(content[:cut])
        assert run(tmp_path).read_bytes() == content
    assert json.loads((tmp_path / "mining.json").read_text())["anchors"] == 10


def test_another_seed_draws_otherwise(stage, mining, options, tiny, tmp_path):
    """Rewrites, of a prompt with one example, so that no order of examples differs; and that."""
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:4])
    example = dict.fromkeys(
        mining.ENOUGH, "A: It rained.\nB: Water fell.\n\nA: {}\nB:"
    )
    (tmp_path / "examples.json").write_text(json.dumps(example))
    given = [
        "--seeds",
        seeds,
        "--model",
        tiny,
        "--examples",
        tmp_path / "examples.json",
    ]
    said, prompts = [], []
    for seed in (0, 1):
        run = [*given, "--run", tmp_path / str(seed), "--seed", seed, "--insert", 0]
        assert stage("01", *run, *LOOSE) == 0
        drawn = candidates(tmp_path / f"{seed}/mined.jsonl")
        said.append({c["text"] for c in drawn if c["overlap"] < 1})
        args = options("--seed", str(seed))
        args.prompts = mining.PROMPTS[None]
        prompts += mining.make_prompts("negative", ["It rained."], 0, args)
    assert len(said[0] & said[1]) < len(said[0]) / 2
    assert prompts[0] != prompts[1]


def test_other_options_do_not_continue_a_file(stage, whole, tiny, tmp_path, capsys):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    (tmp_path / "mined.jsonl").write_bytes(whole.read_bytes())
    given = ["--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE]
    different = [
        ["--similar", 0.3],
        ["--rude", 9],
        ["--seed", 1],
        ["--generator", REAL],
    ]
    for other in different:
        refused(capsys, stage("01", *given, *other), "other seeds or options")
    with FileLock(tmp_path / "mined.jsonl.lock"), pytest.raises(OSError):
        stage("01", *given)
    assert (tmp_path / "mined.jsonl").read_bytes() == whole.read_bytes()
    assert stage("01", *given) == 0


def test_each_option_shapes_the_lines_or_is_known_not_to(mining, options, tmp_path):
    """`made_by` names them one by one: a new option must be put there, or here."""
    free = {"seeds", "run", "out", "limit", "device", "dtype", "batch_size"}
    free |= {"concurrency", "chunk"}
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:1])
    args = options("--seeds", seeds)
    args.prompts = {}  # of --examples
    (before,) = mining.read_seeds(args)
    for name in args.class_variables.keys() - free:
        usual = getattr(args, name)
        setattr(args, name, "other")
        (after,) = mining.read_seeds(args)
        assert after["made_by"] != before["made_by"], name
        setattr(args, name, usual)


def test_kill_9(run, whole, tiny, tmp_path):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    given = ["--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE]
    command = [sys.executable, ROOT / "01_mine_negatives.py", *map(str, given)]
    mined = tmp_path / "mined.jsonl"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (mined.exists() and mined.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(mined.read_bytes().splitlines()) < len(SEEDS)
    assert run(tmp_path).read_bytes() == whole.read_bytes()


def test_files_of_several_machines_are_read_together(stage, tiny, tmp_path, capsys):
    """As README splits seeds: each part has its --out, stage 02 reads them in any order."""
    parts = []
    for i in range(3):
        seeds = write_jsonl(tmp_path / f"seeds-{i}.jsonl", SEEDS[i::3])
        parts.append(tmp_path / f"mined-{i}.jsonl")
        command = [
            "01",
            "--seeds",
            seeds,
            "--model",
            tiny,
            "--out",
            parts[i],
            *LOOSE,
        ]
        assert stage(*command) == 0
        assert (tmp_path / f"mining-{i}.json").exists()
    stores = []
    for k, given in enumerate(([], ["--mined", *parts[::-1]])):
        out = tmp_path / f"{k}.safetensors"
        common = ["--run", tmp_path, "--model", tiny, "--dtype", "float32"]
        assert stage("02", *common, "--out", out, *given) == 0
        stores.append(load_file(out))
    assert all(torch.equal(stores[0][k], stores[1][k]) for k in stores[0])
    capsys.readouterr()
    status = stage(
        "02", "--run", tmp_path, "--model", tiny, "--mined", parts[0], parts[0]
    )
    refused(capsys, status, "more than once")


def test_refuses_an_output_of_other_seeds_or_with_a_bad_line(
    stage, whole, tiny, tmp_path, capsys
):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    given = ["--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE]
    more, out = json.dumps(mined_line(1)) + "\n", tmp_path / "mined.jsonl"
    bad = {
        "{oops\n" + more: "mined.jsonl:1",
        more: "other seeds",
        whole.read_text() + more: "mined.jsonl:11",
    }
    for content, words in bad.items():
        out.write_text(content)
        refused(capsys, stage("01", *given), words)
        assert out.read_text() == content


# Servers

LOCK = threading.Lock()
BAD_PLAN = [
    "hang",
    "500",
    "half",
    "ok",
    "text",
    "torn",
    "none",
    "stream",
    "500",
    "half",
]


class BadServer(BaseHTTPRequestHandler):
    """Answers each completion by the next of `plan`; the "ok" ones are numbered."""

    plan, answered = iter(()), 0

    def log_message(self, *_):
        pass

    def send(self, body: bytes, status=200, kind="application/json", length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with LOCK:
            way = next(self.plan, "ok")
            BadServer.answered += way == "ok"
            text = f" the dumb cat number {BadServer.answered} sat on a mat\nRude: more"
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        about = {"id": "x", "object": "text_completion", "created": 0, "model": "m"}
        good = json.dumps(about | {"choices": [choice]}).encode()
        cut = json.dumps(
            about | {"choices": [choice | {"finish_reason": "length"}]}
        )
        if way == "hang":
            time.sleep(1)
        elif way == "drip":
            self.send(b" ", length=99)
            for _ in range(30):
                time.sleep(0.1)
                self.wfile.write(b" ")
        elif way == "half":
            self.send(good[:40], length=len(good))
        else:
            answers = {
                "ok": (good,),
                "cut": (cut.encode(),),
                "500": (b'{"error": {"message": "bad key sk-secret"}}', 500),
                "text": (b"<html>busy</html>", 200, "text/html"),
                "torn": (good[:40],),
                "surrogate": (good.replace(b"mat", b"\\ud83d"),),
                "none": (json.dumps(about | {"choices": []}).encode(),),
                "stream": (b'data: {"choices": [{"te', 200, "text/event-stream"),
            }
            self.send(*answers[way])


@pytest.fixture
def bad_server(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    BadServer.plan, BadServer.answered = iter(()), 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    server.handle_error = print  # of clients that are gone
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#m"
    server.shutdown()


def test_a_bad_server_loses_and_repeats_nothing(stage, bad_server, tiny, tmp_path):
    BadServer.plan = iter([*BAD_PLAN, "cut"])  # what was cut is no line
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:2])
    command = ["01", "--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE]
    command += ["--rounds", 1, "--insert", 0, "--generator", bad_server]
    assert stage(*command) == 0
    said = [
        c["text"]
        for c in candidates(tmp_path / "mined.jsonl")
        if c["rule"] != "copy"
    ]
    assert len(said) == len(set(said)) == BadServer.answered == 7


def test_an_answer_that_is_no_text_ends_with_a_line(bad_server, tiny, tmp_path):
    """Half of a UTF-16 pair, which JSON allows."""
    BadServer.plan = itertools.repeat("surrogate")
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:1])
    task = [sys.executable, ROOT / "01_mine_negatives.py", "--seeds", seeds]
    task += ["--model", tiny, "--run", tmp_path, "--generator", bad_server]
    done = subprocess.run(task, capture_output=True, text=True)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr[-2000:]
    assert "mined.answers" in errors[0] and "Traceback" not in done.stderr


def test_an_address_that_cannot_be_one(stage, tiny, tmp_path, capsys):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:1])
    given = ["--seeds", seeds, "--model", tiny, "--run", tmp_path]
    status = stage("01", *given, "--generator", "http://localhost:port/v1#m")
    refused(capsys, status, "port")


def test_a_whole_answer_has_a_time(mining, bad_server, tmp_path, monkeypatch):
    """Each byte of a dripping one is in time; it would take 3 seconds."""
    timeout = mining.asyncio.timeout
    monkeypatch.setattr(
        mining.asyncio, "timeout", lambda seconds: timeout(seconds / 1000)
    )
    BadServer.plan = iter(["drip"])
    answers = tmp_path / "answers"
    args = Namespace(generator=bad_server, concurrency=1, answers=answers)
    began = time.time()
    assert mining.server_generator(args)(["a"], 9, 1, 1.0)[0][1]
    assert 0.5 < time.time() - began < 2.5


def test_a_servers_answers_are_kept_as_they_come(stage, bad_server, tiny, tmp_path):
    """24 in all, and none asked for twice, though it ended after 21; one is cut, one line torn."""
    plan = ["cut", *["ok"] * 20]
    BadServer.plan = itertools.chain(plan, itertools.repeat("500"))
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:6])
    command = ["01", "--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE]
    command += ["--rounds", 1, "--insert", 0, "--generator", bad_server]
    # in order: what fails ends nothing that goes well
    command += ["--concurrency", 1]
    assert stage(*command) == 2 and len(lines(tmp_path / "mined.jsonl")) == 4
    kept = tmp_path / "mined.answers"
    assert kept.read_text().count("\n") == 5
    with kept.open("a") as file:
        file.write('\n{"torn')
    BadServer.plan = iter(())
    assert stage(*command) == 0
    assert BadServer.answered == 23 and not kept.exists()
    said = [c["text"] for c in candidates(tmp_path / "mined.jsonl")]
    assert all(any(f"number {i} " in text for text in said) for i in range(1, 24))


@pytest.mark.parametrize("way", ["500", "text", "none", "torn"])
def test_a_server_that_stays_bad_is_a_clear_end(
    stage, bad_server, tiny, tmp_path, capsys, monkeypatch, way
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    BadServer.plan = itertools.chain(["ok"] * 16, itertools.repeat(way))
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:6])
    command = ["01", "--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE]
    command += ["--rounds", 1, "--generator", bad_server]
    status = stage(*command)
    line = refused(capsys, status, "127.0.0.1", "same command continues")
    assert "sk-secret" not in line and len(lines(tmp_path / "mined.jsonl")) == 4
    BadServer.plan = iter(())
    assert stage(*command) == 0
    mined = lines(tmp_path / "mined.jsonl")
    assert [line["id"] for line in mined] == [seed["id"] for seed in SEEDS[:6]]


@pytest.fixture(scope="module")
def server():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = Path(sys.executable).parent / "transformers"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, "serve", REAL, *where], **quiet)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait()


@pytest.mark.parametrize("preset", [[], ["--preset", "paper"]])
def test_transformers_serve(stage, tmp_path, server, preset):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:2])
    command = [
        "01",
        "--seeds",
        seeds,
        "--run",
        tmp_path,
        *LOOSE,
        "--length",
        9,
        "--rounds",
        1,
    ]
    command += [*preset, "--generator", f"{server}#{REAL}", "--concurrency", 2]
    assert stage(*command) == 0
    made = [
        c["text"]
        for c in candidates(tmp_path / "mined.jsonl")
        if c["rule"] != "copy"
    ]
    assert len(made) >= (
        2 if preset else 6
    )  # few lines end after the paper's prompts
    assert all(len(text) > 3 and "\n" not in text for text in made)
