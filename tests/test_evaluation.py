"""Stage 04: pairing, statistics, failures, judges, servers, resuming, on a tiny random model."""

import json
import shutil
import threading
from argparse import Namespace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig
from transformers import BertForSequenceClassification as Classifier

from conftest import REAL, lines, refused, write_jsonl
from cp_loss import load_model, model_nll

SMALL = ["--rewrite", 5, "--continue", 4, "--k", 2, "--benign-prompts", 3]
SMALL += ["--tasks", "none"]
WORDS = ("lake", "town", "idea", "walk", "song", "tree")
JUDGED = [
    {"text": f"You {w} are a stupid idiot {i}.", "toxic": True}
    for i in range(5)
    for w in WORDS
]
JUDGED += [
    {"text": f"The {w} was very nice on day {i}.", "toxic": False}
    for i in range(5)
    for w in WORDS
]
WIKI = [
    {"text": f"The {a} near the {b} was finished early."}
    for a in WORDS
    for b in WORDS
]


@pytest.fixture(scope="module")
def module(stage):
    stage("04", "--k", 0)
    return stage.modules["04"]


@pytest.fixture(scope="module")
def command(trained, tmp_path_factory):
    """Options of a small evaluation, but for --out."""
    folder = tmp_path_factory.mktemp("texts")
    judged = write_jsonl(folder / "judge.jsonl", JUDGED)
    wiki = write_jsonl(folder / "wiki.jsonl", WIKI)
    return ["04", "--run", trained, *SMALL, "--judge-data", judged, "--wiki", wiki]


@pytest.fixture(scope="module")
def report(stage, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert stage(*command, "--out", out) == 0
    return out


def figures(out) -> dict:
    return json.loads((out / "report.json").read_text())["figures"]


def test_refusals(stage, command, trained, tiny, tmp_path, capsys):
    refused(capsys, stage("04", "--k", 0), "--k")
    refused(capsys, stage("04", "--outputs", "base=x"), "a name of its own")
    refused(
        capsys, stage("04", "--run", tmp_path), "run 02_build_prototypes.py first"
    )
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    refused(capsys, stage("04", "--run", tmp_path), "run 03_train_cp.py first")
    other = AutoModelForCausalLM.from_pretrained(tiny)
    other.lm_head.weight.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "other")
    made = trained / "prototypes.safetensors"
    with safe_open(made, "pt") as file:
        meta = file.metadata() | {"model": str(tmp_path / "other")}
    save_file(load_file(made), tmp_path / "prototypes.safetensors", meta)
    options = ["--adapter", trained / "adapter", "--run", tmp_path]
    status = stage(*command, *options, "--out", tmp_path / "a")
    refused(capsys, status, "other weights", "name the files of one run")
    (tmp_path / "prompts.jsonl").write_text(
        '{"text": "a", "toxicity": 1}\n{"toxicity": 1}\n'
    )
    refused(
        capsys,
        stage(*command, "--prompts", tmp_path / "prompts.jsonl"),
        "prompts.jsonl:2",
    )
    refused(
        capsys,
        stage(*command, "--judge-data", tmp_path / "none.jsonl"),
        "make assets data",
    )
    refused(
        capsys,
        stage(*command, "--wiki", tmp_path / "none.jsonl"),
        "none.jsonl",
        "make assets",
    )
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_another_base_is_refused(
    stage, command, trained, tmp_path, capsys
):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    made = {"prototypes": {"model_sha256": "0"}}
    (tmp_path / "adapter.training").mkdir()
    (tmp_path / "adapter.training/run.json").write_text(json.dumps(made))
    status = stage(*command, "--adapter", tmp_path / "adapter", "--out", tmp_path)
    refused(capsys, status, "other weights", "name the files of one run")


def test_a_report_has_every_protocol_and_file(report):
    got = figures(report)
    # the tiny base's rewrites are empty: nothing for the black box
    protocols = {key.split("/")[0] for key in got if "," not in key}
    assert protocols == {"rewrite", "continue", "benign", "wiki"}
    assert got["rewrite/toxic@embedding"]["base"]["n"] == 5
    assert got["continue/max@embedding"]["tuned"]["n"] == 4
    for f in (f for by_system in got.values() for f in by_system.values()):
        assert {"value", "low", "high", "se", "n"} <= set(f)
        assert f["low"] - 1e-9 <= f["value"] <= f["high"] + 1e-9
    text = (report / "report.md").read_text()
    for part in (
        "It mined, too",
        "![toxicity against similarity",
        "benign, ",
    ):
        assert part in text
    assert (
        "failed: " in text
        and "Cohen's kappa" in text
        and "8 words in a row" in text
    )
    assert (report / "rewrites.png").stat().st_size > 3000
    record = json.loads((report / "report.json").read_text())
    assert {
        "command",
        "seed",
        "options",
        "versions",
        "git",
        "device",
        "notes",
    } <= set(record)
    assert any(
        path.endswith("adapter_model.safetensors") for path in record["sha256"]
    )
    assert any(path.endswith("generations.jsonl") for path in record["sha256"])


def test_what_is_kept_is_not_computed_again(
    stage, module, report, command, tmp_path, monkeypatch
):
    """Without the functions that ask a model; print answers with nothing."""
    shutil.copytree(report / "kept", tmp_path / "kept")
    monkeypatch.setattr(module, "generate", print)
    monkeypatch.setattr(module, "model_nll", None)
    assert stage(*command, "--out", tmp_path) == 0
    assert figures(tmp_path) == figures(report)
    options = ["--threshold", 0.0, "--judge", "profanity-check"]
    assert stage(*command, "--out", tmp_path, *options) == 0
    assert (
        figures(tmp_path)["rewrite/toxic@profanity-check"]["base"]["value"] == 100
    )


def test_scores_of_a_judge_taught_otherwise_are_not_kept(
    stage, report, command, tmp_path
):
    shutil.copytree(report / "kept", tmp_path / "kept")
    turned = write_jsonl(
        tmp_path / "turned.jsonl",
        [row | {"toxic": not row["toxic"]} for row in JUDGED],
    )
    assert stage(*command, "--out", tmp_path, "--judge-data", turned) == 0
    before, after = (
        [
            row["toxicity"]["embedding"]
            for row in lines(x / "generations.jsonl")
            if row["output"]
        ]
        for x in (report, tmp_path)
    )
    assert before and after == pytest.approx([1 - p for p in before], abs=1e-3)


def test_a_killed_evaluation_ends_the_same(stage, report, command, tmp_path):
    """Some units are there, one up to a line and a torn one, one with nothing but a torn line."""
    shutil.copytree(report / "kept", tmp_path / "kept")
    kept = sorted((tmp_path / "kept").iterdir())
    continued = [path for path in kept if path.name.startswith("continue")]
    for path in kept[::3]:
        path.unlink()
    whole = continued[0].read_bytes() if continued[0].exists() else b""
    first, *_ = whole.split(b"\n")
    continued[0].write_bytes(first + b'\n["torn' if first else b'["torn')
    continued[1].write_bytes(b"[")
    assert stage(*command, "--out", tmp_path) == 0
    for name in ("generations.jsonl", *(f"kept/{path.name}" for path in kept)):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes(), name
    assert figures(tmp_path) == figures(report)


def test_seeds_of_a_recipe_and_other_systems(
    stage, command, trained, report, tmp_path
):
    """Two adapters of one name give mean and spread; the base's own outputs, as another system's,
    change nothing."""
    shutil.copytree(trained / "adapter", tmp_path / "second")
    file = tmp_path / "second/adapter_model.safetensors"
    save_file({name: -3 * x for name, x in load_file(file).items()}, file)
    base = [
        row
        for row in lines(report / "generations.jsonl")
        if row["system"] == "base"
    ]
    base = [row for row in base if row["protocol"] in ("rewrite", "continue")]
    same = [
        {key: row[key] for key in ("protocol", "input", "output")} for row in base
    ]
    same = write_jsonl(tmp_path / "same.jsonl", same)
    options = [
        "--adapter",
        f"ours={trained / 'adapter'}",
        f"ours={tmp_path / 'second'}",
    ]
    assert (
        stage(*command, *options, "--outputs", f"same={same}", "--out", tmp_path)
        == 0
    )
    got, single = figures(tmp_path), figures(report)
    for key in ("rewrite/similarity", "wiki/per_token"):
        f = got[key]["ours"]
        assert f["seeds"][0] == pytest.approx(
            single[key]["tuned"]["value"], abs=1e-6
        )
        assert (
            f["spread"] == pytest.approx(np.std(f["seeds"], ddof=1))
            and f["spread"] > 0
        )
    f = got["rewrite/similarity"]["ours"]
    assert f["value"] == pytest.approx(np.mean(f["seeds"]))
    for key in (key for key in got if key.startswith(("rewrite", "continue"))):
        own, theirs = got[key]["base"], got[key]["same"]
        assert theirs["value"] == pytest.approx(own["value"], abs=1e-6)
        assert theirs["change"]["value"] == pytest.approx(0, abs=1e-6)
    assert (
        "same" not in got["wiki/per_token"]
        and "±" in (tmp_path / "report.md").read_text()
    )


def test_outputs_that_do_not_fit_are_refused(
    stage, command, report, tmp_path, capsys
):
    shutil.copytree(report / "kept", tmp_path / "kept")
    first = next(
        x for x in lines(report / "generations.jsonl") if x["protocol"] == "rewrite"
    )
    unknown = {"protocol": "rewrite", "input": "unknown", "output": "x"}
    cases = (
        (unknown, "lacks 5 of the 5"),
        (first, "lacks 4 of the 5"),
        ({"input": "a"}, "bad.jsonl:1"),
    )
    for row, word in cases:
        bad = write_jsonl(tmp_path / "bad.jsonl", [row])
        status = stage(*command, "--outputs", f"bad={bad}", "--out", tmp_path)
        refused(capsys, status, word)


def test_blackbox_rewrites_another_systems_outputs(
    stage, command, report, tmp_path
):
    rows = lines(report / "generations.jsonl")
    prompts = sorted({row["input"] for row in rows if row["protocol"] == "rewrite"})
    theirs = [
        {
            "protocol": "rewrite",
            "input": text,
            "output": f"You stupid idiot number {i}.",
        }
        for i, text in enumerate(prompts)
    ]
    theirs = write_jsonl(tmp_path / "theirs.jsonl", theirs)
    assert stage(*command, "--outputs", f"theirs={theirs}", "--out", tmp_path) == 0
    rows = [
        x
        for x in lines(tmp_path / "generations.jsonl")
        if x["protocol"] == "blackbox"
    ]
    assert len({row["input"] for row in rows}) == 5
    assert all(row["input"].startswith("You stupid idiot") for row in rows)
    assert {row["system"] for row in rows} == {"base", "tuned"}
    asked = [row for row in rows if row["system"] == "base"]
    assert all(
        row["output"] == row["input"] and row["failure"] is None for row in asked
    )
    got = figures(tmp_path)
    assert got["blackbox/toxic@profanity-check"]["base"]["value"] == 100
    assert got["rewrite/toxic@profanity-check"]["theirs"]["value"] == 100


class Answers(BaseHTTPRequestHandler):
    """A completions endpoint that says what it was asked, or something that is no answer."""

    asked: list = []
    broken = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(
            body | {"path": self.path, "key": self.headers["Authorization"]}
        )
        text = f" The {body['model']} walked slowly to the lake."
        text = text if body.get("stop") else text + "\nmore"
        reply = [] if self.broken else {"choices": [{"text": text, "index": 0}]}
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_server_is_a_system(
    stage, command, report, server, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    shutil.copytree(report / "kept", tmp_path / "kept")
    options = ["--server", f"lora={server}#man", "--out", tmp_path]
    assert stage(*command, *options) == 0
    rows = [
        x for x in lines(tmp_path / "generations.jsonl") if x["system"] == "lora"
    ]
    counts = pd.Series([row["protocol"] for row in rows]).value_counts().to_dict()
    assert (
        counts == {"rewrite": 5, "continue": 8, "benign": 3}
        and len(Answers.asked) == 16
    )
    asked = Answers.asked[0]
    assert (
        asked["path"].endswith("/v1/completions")
        and asked["key"] == "Bearer secret-key"
    )
    assert {x["model"] for x in Answers.asked} == {"man"} and asked["top_p"] == 0.9
    by_stop = {(x["temperature"], json.dumps(x.get("stop"))) for x in Answers.asked}
    assert len(by_stop) == 2 and (1.0, "null") in by_stop
    assert all(
        20 <= x["max_tokens"] <= 200 for x in Answers.asked if x["temperature"] == 1
    )
    said = {row["output"] for row in rows if row["protocol"] == "rewrite"}
    assert said == {"The man walked slowly to the lake."}
    got = figures(tmp_path)
    assert (
        got["rewrite/failed"]["lora"]["n"] == 5
        and "lora" not in got["wiki/per_token"]
    )
    assert stage(*command, *options) == 0 and len(Answers.asked) == 16  # kept
    monkeypatch.setattr(Answers, "broken", True)
    options[1] = f"lora={server}#other"
    said = refused(capsys, stage(*command, *options), server, "run this again")
    assert "secret-key" not in said


def test_failures_are_never_clean(module):
    source = "The old man slowly went down to the lake."

    def kind(output, text=source, fluency=4.0, similarity=0.5):
        row = {
            "input": text,
            "output": output,
            "fluency": fluency,
            "similarity": similarity,
        }
        return module.failure(row | {"system": "tuned", "protocol": "rewrite"}, 9.0)

    assert kind("") == kind(" ...") == "empty"
    assert kind("Lake.") == "too short" and kind("Hi there.", text="Hello.") is None
    assert kind("you are you are you are you are") == kind("so " * 20) == "repeated"
    assert kind("der Mann geht langsam zum See hinunter heute") == "off-language"
    assert kind("старик медленно идёт") == "off-language"
    assert kind("}{ the 0 ]] 17 ;; a b 4 ..") == "garbled"
    assert kind("purple of therefore ran", fluency=9.5) == "garbled"
    assert kind("the old man slowly went down to the lake") == "copy"
    assert kind("The man went to the lake on foot.") is None
    vague = "The rapidly evolving work landscape can be a powerful metaphor."
    assert kind(vague, similarity=0.1) == "unrelated"


def test_metrics_by_hand(module):
    said = (
        (0, "a blind cat", 0.9, 0.8, None),
        (0, "", 0.1, 0.0, "empty"),
        (1, "the big cat ran on", 0.2, 0.6, None),
        (1, "the big cat ran on", 0.5, 0.4, None),
    )
    unit = {"system": "base", "seed": 0, "protocol": "benign", "group": "body"}
    rows = []
    for prompt, output, p, s, failure in said:
        row = {"prompt": prompt, "input": "big Blind cat", "output": output}
        scores = {
            "toxicity": {"j": p},
            "similarity": s,
            "clean": s / 2,
            "fluency": 2.0,
        }
        rows.append(unit | row | scores | {"failure": failure})
    outputs = pd.DataFrame(rows)
    outputs["failure"] = pd.Series([row["failure"] for row in rows], dtype=object)
    long = module.long_frame(outputs, 0.5)
    got = {
        key: some.sort_values("prompt").value.tolist()
        for key, some in long.groupby("metric")
    }
    assert got["toxic@j"] == [50, 50] and got["unsafe@j"] == [100, 50]
    assert got["any@j"] == [100, 100] and got["max@j"] == [0.9, 0.5]
    assert got["joint@j"] == pytest.approx([0, 0.3])
    assert got["similarity"] == pytest.approx([0.4, 0.5])
    assert got["clean"] == pytest.approx([0.2, 0.25])
    assert got["failed"] == got["empty"] == [50, 0] and got["named"] == [50, 0]
    assert got["dist1"] == [1.0, 0.5] and got["dist2"] == [1.0, 0.5]
    long = module.long_frame(outputs.assign(protocol="continue"), 0.5)
    assert not {"similarity", "clean", "joint@j", "named"} & set(long.metric)


def test_groups_are_protocols(module):
    row = {"protocol": "benign", "group": "body", "value": 1.0}
    rows = [row | {"metric": metric} for metric in ("named", "toxic@j", "failed")]
    rows.append(row | {"metric": "named", "group": None})
    made = module.by_group(pd.DataFrame(rows))
    assert made.protocol.tolist() == ["benign, body"] * 2
    assert made.metric.tolist() == ["named", "toxic@j"]


def test_statistics(module):
    zero = module.interval(np.zeros(2000), 60, is_rate=True)
    assert (
        zero["value"] == zero["low"] == 0
        and zero["high"] == 5.0
        and zero["n"] == 60
    )
    x = np.random.default_rng(0).normal(3, 2, 400)
    one = {
        "protocol": "p",
        "metric": "joint",
        "system": "base",
        "seed": 0,
        "weight": np.nan,
    }
    f = module.summarise(
        pd.DataFrame({"value": x, "prompt": range(400)}).assign(**one)
    )
    f = f["p/joint"]["base"]
    assert f["value"] == pytest.approx(x.mean())
    assert f["se"] == pytest.approx(0.1, rel=0.15)
    assert f["high"] - f["low"] == pytest.approx(3.92 * f["se"], rel=0.1)
    rows = [
        {
            "system": system,
            "seed": seed,
            "prompt": i,
            "value": i + more,
            "weight": 1 + i,
        }
        for system, seed, more in (
            ("base", 0, 1.0),
            ("ours", 0, 1.1),
            ("ours", 1, 1.3),
        )
        for i in (0, 1)
    ]
    long = pd.DataFrame(rows).assign(protocol="wiki", metric="per_token")
    base, ours = module.summarise(long)["wiki/per_token"].values()
    assert base["value"] == pytest.approx(np.exp(5 / 3))
    assert ours["change"]["value"] == pytest.approx(100 * (np.exp(0.2) - 1))
    assert ours["seeds"] == pytest.approx(np.exp([5 / 3 + 0.1, 5 / 3 + 0.3]))
    assert ours["spread"] == pytest.approx(np.std(ours["seeds"], ddof=1))


def test_wiki_perplexity_counts_each_token_once(module, tiny, tmp_path):
    model, tokenizer = load_model(str(tiny), "cpu")
    texts = [f"In the year {i} the lake froze over again." for i in range(80)]
    args = Namespace(out=tmp_path, tasks=["none"])
    system = ("base", ["x"], None, [])
    made = module.measure(system, model, tokenizer, texts, ["The lake."], args)
    per_token = made[made.metric == "per_token"].astype({"weight": int})
    ids = torch.tensor(
        tokenizer(" ".join(texts), add_special_tokens=False).input_ids
    )
    assert per_token.weight.sum() == len(ids) - 1 and len(ids) > 1000
    total = 0.0
    for begin in range(
        0, len(ids) - 256, 256
    ):  # each window by the model's own loss
        window, start = ids[begin : begin + 512], 256 if begin else 1
        with torch.no_grad():
            logits = model(window[None]).logits[0, start - 1 : -1].log_softmax(-1)
        total -= logits.gather(1, window[start:, None]).sum().item()
    assert (per_token.value * per_token.weight).sum() == pytest.approx(
        total, rel=1e-5
    )


def test_perplexity_of_inputs(module, tiny, tmp_path):
    model, tokenizer = load_model(str(tiny), "cpu")
    texts = ["The lake.", "A walk to the other side of the town."]
    args = Namespace(out=tmp_path, tasks=["none"])
    system = ("base", ["x"], None, [])
    inputs = module.measure(system, model, tokenizer, ["One."], texts, args)
    inputs = inputs[inputs.metric == "inputs"]
    given = [torch.tensor([1, *tokenizer(text).input_ids]) for text in texts]
    assert inputs.value.tolist() == pytest.approx(
        model_nll(model, given).tolist(), rel=1e-5
    )
    assert inputs.weight.tolist() == [len(x) - 1 for x in given]


def test_generation_shares_prompts_and_changes_nothing(module, tiny):
    """Nearly greedy: k samples of a prompt computed once, in left-padded batches, equal each
    prompt's own greedy output."""
    model, tokenizer = load_model(str(tiny), "cpu")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["The lake", "A very long walk to the other side of the town", "Sing"]
    rows = [
        {"text": text, "limit": 6, "sample": j} for text in prompts for j in (0, 1)
    ]
    got = module.generate(model, tokenizer, pd.DataFrame(rows), 1e-4, None)
    for i, prompt in enumerate(prompts):
        prompt = tokenizer.bos_token + prompt
        ids = tokenizer(
            prompt, return_tensors="pt", add_special_tokens=False
        ).input_ids
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        text = tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)
        assert got[2 * i : 2 * i + 2] == [text, text]


def test_texts_in_all_forms(module, tmp_path):
    prompt = {"text": "So I said", "toxicity": 0.3}
    published = [
        {"prompt": prompt, "continuation": {"text": "x"}, "challenging": True}
    ]
    published = write_jsonl(tmp_path / "rtp.jsonl", published)
    (row,) = module.read_rows(str(published), partial(module.as_input, "continue"))
    assert row == ("So I said", "challenging")
    (row,) = module.read_rows(str(published), partial(module.as_input, "rewrite"))
    assert row is None  # not toxic
    row = module.as_input(
        "toxigen", {"text": "a", "whole": True, "target_group": "b"}
    )
    assert row == ("a", "b")
    unknown = {"prompt": {"text": "one two three four", "toxicity": None}}
    assert module.as_input("rewrite", unknown) is None
    row = module.as_input("continue", {"text": "one two three four five six"})
    assert row == ("one two three", None)
    row = module.as_input(
        "benign", {"passage": "The Muslim and the gay man sat down."}
    )
    assert row[1] == "religion"
    assert module.as_input("benign", {"text": "They sat down."}) is None
    toxigen = tmp_path / "hate_trans_1k.txt"
    toxigen.write_text("- first one\\n- second one\\n-\n")
    (row,) = module.read_rows(str(toxigen), partial(module.as_input, "toxigen"))
    assert row == ("- first one\n- second one\n-", "hate_trans_1k")


def test_judges(module, tiny, tmp_path, capsys):
    class Encoder:
        seen = []

        def encode(self, texts, **_):
            self.seen += texts
            return np.array(
                [[len(text) / 10, "idiot" in text] for text in texts], float
            )

    rows = [
        {"text": f"{'idiot ' if i % 2 else 'hello '}{i} x", "toxic": i % 2}
        for i in range(40)
    ]
    data = write_jsonl(tmp_path / "judge.jsonl", rows)
    args, encoder = Namespace(judge_data=str(data), device="cpu"), Encoder()
    judge, about = module.load_judge(
        "embedding", encoder, ["idiot 1 x", "hello 2 x"], args
    )
    assert len(encoder.seen) == 38 and "idiot 1 x" not in encoder.seen
    assert "100.0% right" in about and "38 texts" in about
    assert (judge(["idiot 99", "hello 98"]) >= 0.5).tolist() == [True, False]

    path, labels = tmp_path / "judge", {0: "non-toxic", 1: "toxic"}
    config = BertConfig(
        vocab_size=49152, hidden_size=16, num_hidden_layers=1, id2label=labels
    )
    config.num_attention_heads, config.intermediate_size = 2, 16
    Classifier(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    one, other = (
        module.load_judge(f"{path}{label}", encoder, [], args)[0](["a b", "c"])
        for label in ("", "#non-toxic")
    )
    assert one + other == pytest.approx(np.ones(2), abs=1e-4)
    with pytest.raises(SystemExit) as stop:
        module.load_judge(f"{path}#rude", encoder, [], args)
    refused(capsys, stop.value.code, "non-toxic, toxic")


def test_local_tasks(module, tiny, monkeypatch):
    monkeypatch.chdir(REAL.parent.parent)
    for name, choices in (
        ("piqa", 2),
        ("openbookqa", 4),
        ("commonsense_qa", 5),
        ("boolq", 2),
    ):
        items = module.local_task(name)["custom_dataset"]()["test"]
        assert len(items) > 400 and max(len(x["choices"]) for x in items) == choices
        assert items[0]["query"].endswith("Answer:")
        assert max(items["gold"]) == choices - 1
    assert module.local_task("gsm8k") == "gsm8k"
    rows = module.task_items(*load_model(str(tiny), "cpu"), 4, "boolq")
    assert [row["prompt"] for row in rows] == [0, 1, 2, 3]
    assert {row["value"] for row in rows} <= {0, 100} and rows[0]["metric"] == "acc"


def test_masking(module):
    assert module.hidden("you stupid idiot", "\\*").count("\\*") >= 4
    assert module.hidden("The lake is calm", "\\*") == "The lake is calm"
    assert module.hidden("The stupid lake is calm", "") == "The  lake is calm"
