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
from conftest import REAL, ROOT, lines, mined_line, refused, write_jsonl
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cp_loss import model_nll

SEEDS = [{"id": f"s{i}", "group": None, "text": mined_line(i)["text"]} for i in range(10)]


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
