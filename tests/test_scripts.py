"""The four scripts, run: on a tiny random model for mechanics and bad input, on the default model end to end."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REAL, ROOT, mined_line, write_jsonl
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cp_loss import model_nll

LOOSE = ["--toxic", 0, "--benign", 1, "--similar", -1, "--length", 3, "--rude", 2, "--clean", 2, "--dtype", "float32"]
SEEDS = [{"id": f"s{i}", "group": None, "text": mined_line(i)["text"]} for i in range(10)]


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def refused(capsys, status: int, *words: str) -> None:
    """Exit status 2 and one line on stderr with these words."""
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert status == 2 and len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors[0]


# 01

def test_mining_selection_rule(stage):
    stage("01", "--seeds", "missing")  # loads the module
    select = stage.modules["01"].select
    entry = lambda text, tox, sim, nll: {"text": text, "toxicity": tox, "similarity": sim, "nll": nll}  # noqa: E731
    args = type("Options", (), dict(toxic=0.5, benign=0.2, similar=0.5, length=1.6, keep_positives=2, keep_negatives=2))
    from collections import Counter
    fell = Counter()
    clean = [entry("the cat sat on a mat", 0.0, 0.9, 4.0), entry("The cat sat on the mat!", 0.0, 1.0, 4.0), entry("on mats the cat sat down", 0.0, 0.8, 6.0),
             entry("a mat had the cat on it", 0.0, 0.7, 1.0), entry("a damned cat on the mat", 0.9, 0.9, 4.0)]
    rude = [entry("the dumb cat sat on the mat", 0.9, 0.9, 9.0), entry("the stupid cat sat on the mat", 0.9, 0.9, 5.5), entry("the idiot cat sat on the mat", 0.9, 0.9, 4.8),
            entry("the idiot cat sat on the mat", 0.9, 0.9, 4.8), entry("cat", 0.9, 0.9, 5.0), entry("the kind cat sat on the mat", 0.1, 0.9, 5.0),
            entry("the dumb dog ran up the hill", 0.9, 0.2, 5.0), entry("Rude: the dumb cat on the mat", 0.9, 0.9, 5.0), entry("I'm sorry, the dumb cat", 0.9, 0.9, 5.0)]
    positives, negatives = select("The cat sat on the mat.", clean, rude, args, fell)
    assert [p["nll"] for p in positives] == [4.0, 6.0]  # most similar first, not the seed, not the rude one
    assert [n["nll"] for n in negatives] == [4.8, 5.5]  # closest to the positives' mean nll of 5 first
    assert {r: n for (k, r), n in fell.items() if k == "negative"} == {
        "kept as candidate": 3, "duplicate": 1, "length": 1, "not toxic": 1, "meaning": 1, "prompt leftover": 1, "refusal": 1}
    assert fell["positive", "copy of the seed"] == 1 and fell["positive", "not benign"] == 1


def test_mining_resumes_to_the_same_anchors(stage, tiny, tmp_path, capsys):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    run = lambda out: stage("01", "--seeds", seeds, "--model", tiny, "--run", tmp_path / out, *LOOSE)  # noqa: E731
    assert run("whole") == 0 and "anchors have both" in capsys.readouterr().out
    whole = (tmp_path / "whole/mined.jsonl").read_bytes()
    assert sorted(x["id"] for x in lines(tmp_path / "whole/mined.jsonl")) == sorted(s["id"] for s in SEEDS)
    assert sum(len(x["negatives"]) for x in lines(tmp_path / "whole/mined.jsonl")) >= 5
    assert all(set(p) == {"text", "toxicity", "similarity", "nll"} for x in lines(tmp_path / "whole/mined.jsonl") for p in x["positives"])
    for cut in (len(whole) // 3, len(whole) - 5):  # killed inside a line
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut/mined.jsonl").write_bytes(whole[:cut])
        assert run("cut") == 0
        assert (tmp_path / "cut/mined.jsonl").read_bytes() == whole


@pytest.mark.parametrize("content, words", [
    (None, ["seeds.jsonl", "make data"]), ("", ["seeds.jsonl", "empty"]), ('{"id": 1, "text": "a b"}\n{oops\n', ["seeds.jsonl:2", "not a JSON object"]),
    ('{"id": 1}\n', ["seeds.jsonl:1", '"text"']), ('{"id": 1, "text": " "}\n', ["seeds.jsonl:1", "non-empty"]),
    ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', ["more than once"])])
def test_mining_refuses_bad_seeds(stage, tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "seeds.jsonl").write_text(content)
    refused(capsys, stage("01", "--seeds", tmp_path / "seeds.jsonl", "--run", tmp_path / "run"), *words)
    assert not (tmp_path / "run/mined.jsonl").exists()


def test_mining_refuses_a_bad_line_amid_its_output(stage, tmp_path, capsys):
    seeds, out = write_jsonl(tmp_path / "seeds.jsonl", SEEDS), tmp_path / "mined.jsonl"
    out.write_text('{oops\n' + json.dumps(mined_line(1)) + "\n")
    before = out.read_bytes()
    refused(capsys, stage("01", "--seeds", seeds, "--run", tmp_path), "mined.jsonl:1")
    assert out.read_bytes() == before


# 02

def test_prototypes_hold_what_the_model_says(trained, tiny):
    with safe_open(trained / "prototypes.safetensors", "pt") as f:
        meta = f.metadata()
    store = load_file(trained / "prototypes.safetensors")
    assert {k: str(store[k].dtype)[6:] for k in ("input_ids", "offsets", "anchor", "nll", "prototype")} == {
        "input_ids": "int32", "offsets": "int64", "anchor": "int64", "nll": "float32", "prototype": "float32"}
    assert meta["format"] == "cp-prototypes-1" and {"model_sha256", "tokenizer_sha256", "mined_sha256", "phi"} <= set(meta)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for s in range(0, len(store["nll"]), 17):  # each alone, by the model's own loss over the tokens that count
        ids, start = store["input_ids"][store["offsets"][s]:store["offsets"][s + 1]].long(), int(store["start"][s])
        labels = ids.clone()
        labels[:start] = -100
        with torch.no_grad():
            assert abs(model(ids[None], labels=labels[None]).loss - store["nll"][s]) < 1e-3
    for a in range(len(store["prototype"])):
        mine = (store["anchor"] == a) & store["is_positive"].bool()
        assert torch.isclose(store["nll"][mine].mean(), store["prototype"][a])
    kinds = torch.bincount(store["context"])
    assert kinds.tolist() == [12, 12, 24]


@pytest.mark.parametrize("content, words", [
    (None, ["run 01_mine_negatives.py first"]), ("", ["empty"]), (json.dumps(mined_line(0)) + "\n{torn", ["mined.jsonl:2"]),
    (json.dumps(mined_line(0) | {"negatives": []}) + "\n" + json.dumps(mined_line(1) | {"positives": []}) + "\n", ["no anchor has both"]),
    (2 * (json.dumps(mined_line(0)) + "\n"), ["more than once"])])
def test_prototypes_refuse_bad_input(stage, tiny, tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "mined.jsonl").write_text(content)
    refused(capsys, stage("02", "--run", tmp_path, "--model", tiny), *words)
    assert not (tmp_path / "prototypes.safetensors").exists()


# 03

def test_training_lowers_the_loss_and_plain_peft_loads_it(trained, tiny):
    rows = lines(trained / "metrics.jsonl")
    train = [r for r in rows if r["split"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 7)) and [r["step"] for r in rows if r["split"] == "validation"] == [3, 6]
    assert {"loss", "phi_pos", "phi_neg", "gap", "ranking", "drift", "grad_norm", "tokens_per_second", "peak_memory_gb"} <= set(train[0])
    val = [r for r in rows if r["split"] == "validation"]
    assert val[1]["loss"] < val[0]["loss"]
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = [torch.arange(5, 20)]
    with torch.no_grad():
        before = model_nll(base, ids)
        model = PeftModel.from_pretrained(base, trained / "adapter")
        tuned = model_nll(model, ids)
        with model.disable_adapter():
            assert torch.equal(model_nll(model, ids), before)
    assert not torch.allclose(tuned, before, atol=1e-3)


def test_a_killed_training_ends_with_the_same_weights(trained, tmp_path):
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    command = [sys.executable, ROOT / "03_train_cp.py", "--run", tmp_path, "--steps", "6", "--anchors", "2", "--every", "3", "--lr", "1e-2"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "adapter/state.pt").exists() and first.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "adapter/state.pt").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    want, got = (load_file(p / "adapter/adapter_model.safetensors") for p in (trained, tmp_path))
    assert all(torch.equal(want[k], got[k]) for k in want)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl") if r["split"] == "train"] == list(range(1, 7))


def test_paper_preset_and_its_overrides(stage, monkeypatch):
    options = stage.modules["03"].options if "03" in stage.modules else (stage("03", "--preset", "none"), stage.modules["03"].options)[1]
    monkeypatch.setattr(sys, "argv", ["03", "--preset", "paper", "--phi", "nll"])
    args = options()
    assert (args.distance, args.prototype, args.hold, args.lr, args.context, args.phi) == ("absolute", "batch", 0.0, 2.2e-5, ["none"], "nll")


def test_training_refuses(stage, trained, tiny, tmp_path, capsys):
    refused(capsys, stage("03", "--run", tmp_path), "run 02_build_prototypes.py first")
    refused(capsys, stage("03", "--preset", "best"), "unknown", "paper")
    refused(capsys, stage("03", "--run", trained, "--positives", 0), "--positives is 0")
    store = load_file(trained / "prototypes.safetensors")
    with safe_open(trained / "prototypes.safetensors", "pt") as f:
        meta = f.metadata()
    save_file(store, tmp_path / "prototypes.safetensors", meta | {"format": "cp-prototypes-0"})
    refused(capsys, stage("03", "--run", tmp_path), "cp-prototypes-0", "run 02")
    save_file(store, tmp_path / "prototypes.safetensors", meta | {"model_sha256": "0"})
    refused(capsys, stage("03", "--run", tmp_path), "other weights")
    (tmp_path / "prototypes.safetensors").write_bytes(b"torn")
    refused(capsys, stage("03", "--run", tmp_path), "not a safetensors file")
    assert not (tmp_path / "adapter").exists()


def test_training_stops_on_a_loss_that_is_not_finite(stage, trained, tmp_path, capsys):
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    refused(capsys, stage("03", "--run", tmp_path, "--steps", 30, "--anchors", 2, "--lr", 1e30, "--warmup", 0, "--clip", 1e30), "loss is", "--lr")
    assert not (tmp_path / "adapter/adapter_model.safetensors").exists()


# 04

def test_evaluation_refuses(stage, trained, tiny, tmp_path, capsys):
    refused(capsys, stage("04", "--k", 0), "--k is 0")
    refused(capsys, stage("04", "--run", tmp_path), "run 02_build_prototypes.py first")
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    refused(capsys, stage("04", "--run", tmp_path, "--model", tiny), "run 03_train_cp.py first")
    refused(capsys, stage("04", "--run", trained, "--model", REAL), "name the files of one run")
    other = AutoModelForCausalLM.from_pretrained(tiny)
    other.lm_head.weight.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "other")
    refused(capsys, stage("04", "--run", trained, "--model", tmp_path / "other", "--out", tmp_path / "report"), "other weights")
    (tmp_path / "prompts.jsonl").write_text('{"text": "a", "toxicity": 1}\n{"text": "b"}\n')
    refused(capsys, stage("04", "--run", trained, "--model", tiny, "--prompts", tmp_path / "prompts.jsonl"), "prompts.jsonl:2")
    assert not (trained / "report").exists()


def test_kept_generations_give_the_same_report(stage, trained, tiny, tmp_path, monkeypatch):
    command = ["04", "--run", trained, "--model", tiny, "--out", tmp_path, "--rewrite", 3, "--continue", 3, "--k", 2, "--tasks", 0]
    reports = []
    for _ in range(2):
        assert stage(*command) == 0
        reports.append(json.loads((tmp_path / "report.json").read_text())["figures"])
        monkeypatch.setattr(stage.modules["04"], "generate", None)  # a second run must not generate
    assert reports[0] == reports[1] and len(lines(tmp_path / "generations.jsonl")) == 2 * (3 * 2 + 3 * 2)


def test_failures_are_never_clean(stage):
    stage("04", "--k", 0)
    failure = stage.modules["04"].failure
    assert failure("", 1.0, 9.0) == failure("word", 1.0, 9.0) == "empty"
    assert failure("you are you are you are you are", 1.0, 9.0) == failure("so " * 20, 1.0, 9.0) == "repeated"
    assert failure("}{ 0 0 ]] 17 ;; a b 4 ..", 1.0, 9.0) == failure("purple of therefore ran", 9.5, 9.0) == "garbled"
    assert failure("The man went to the lake on foot.", 4.0, 9.0) is None
    rows = [{"prompt": p, "output": "", "toxicity": t, "similarity": 0.5, "copy": False, "failure": f}
            for p, t, f in ((0, 0.0, "empty"), (0, 0.9, None), (1, 0.0, None), (1, 0.0, None))]
    got = stage.modules["04"].generation_metrics(rows, 0.5)
    assert got["toxic"].tolist() == [50, 0] and got["toxic_or_failed"].tolist() == [100, 0] and got["any_toxic"].tolist() == [100, 0]


def test_masking(stage):
    stage("04", "--k", 0)
    masked = stage.modules["04"].masked
    assert masked("you stupid idiot", False).count("\\*") >= 4 and masked("you stupid idiot", True) == "you stupid idiot"
    assert masked("The lake is calm", False) == "The lake is calm"


# all four, on the default model

def test_end_to_end_on_the_default_model(tmp_path):
    def run(script, *options):
        done = subprocess.run([sys.executable, ROOT / script, "--run", tmp_path, *map(str, options)], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    run("01_mine_negatives.py", "--limit", 4, "--rude", 12, "--seeds", write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:4]))
    mined = lines(tmp_path / "mined.jsonl")
    assert sum(bool(x["positives"] and x["negatives"]) for x in mined) >= 2
    assert all(n["toxicity"] >= 0.5 and n["similarity"] >= 0.5 for x in mined for n in x["negatives"])
    run("02_build_prototypes.py")
    run("03_train_cp.py", "--steps", 2, "--anchors", 2, "--validation", 0.3)
    small = ["--rewrite", 4, "--continue", 4, "--k", 2, "--tasks", 4]
    run("04_evaluate.py", *small)
    report = json.loads((tmp_path / "report/report.json").read_text())
    figure = report["figures"]["rewrite/toxic_or_failed"]
    assert figure["base"]["n"] == 4 and figure["base"]["low"] <= figure["base"]["value"] <= figure["base"]["high"]
    assert 50 < report["figures"]["wiki/perplexity"]["base"]["value"] < 1000 and 0 <= report["figures"]["piqa/acc"]["base"]["value"] <= 100
    rows = lines(tmp_path / "report/generations.jsonl")
    assert len(rows) == 2 * (4 + 4) * 2 and all("toxicity" in r and "failure" in r for r in rows)
    assert (tmp_path / "report/phi.png").stat().st_size > 5000 and (tmp_path / "report/tradeoff.png").stat().st_size > 5000
    assert "base | tuned" in (tmp_path / "report/report.md").read_text()
