"""Stage 03 beyond one plain run: exact gradients in any memory, several processes, signals, full disks, 4 bits, merging."""
import math
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, lines, mined_line, refused, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cp_loss import model_nll

OPTIONS = ["--steps", "6", "--anchors", "3", "--every", "3", "--lr", "1e-2"]


def adapter(run) -> dict:
    return load_file(run / "adapter/adapter_model.safetensors")


@pytest.fixture
def fresh(trained, tmp_path):
    """A run folder with prototypes and nothing trained, and the command that trains there."""
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    return tmp_path, [sys.executable, str(ROOT / "03_train_cp.py"), "--run", str(tmp_path), *OPTIONS]


@pytest.mark.parametrize("phi, distance, prototype", [("nll", "signed", "batch"), ("perplexity", "absolute", "base")])
def test_two_passes_give_the_gradient_of_one(stage, trained, tiny, monkeypatch, phi, distance, prototype):
    stage("03", "--preset", "none")
    module = stage.modules["03"]
    monkeypatch.setattr(sys, "argv", ["03", "--run", str(trained), "--phi", phi, "--distance", distance, "--prototype", prototype, "--tau", "9"])
    args = module.options()
    store, meta = module.read_store(args.prototypes)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained_weights = [w for w in model.parameters() if w.requires_grad]
    for w in trained_weights:
        torch.nn.init.normal_(w, std=0.1)  # LoRA starts with B = 0, which hides A's gradient
    chosen = module.draw(store, torch.arange(4, 10), args, torch.Generator().manual_seed(0))
    total, tokens = (6, int(store["is_positive"][chosen].sum())), int((store["offsets"][chosen + 1] - store["offsets"][chosen]).sum())

    def gradient(budget):
        args.budget = budget
        model.zero_grad()
        loss, _ = module.backward(model, store, chosen, args, total)
        return loss, torch.cat([w.grad.flatten() for w in trained_weights])
    loss, whole = gradient(tokens)
    assert whole.norm() > 1e-3
    for budget in (1, 30, 100, tokens - 1):
        other, parts = gradient(budget)
        assert math.isclose(loss, other, rel_tol=1e-5) and (parts - whole).norm() / whole.norm() < 1e-4


def test_two_processes_follow_one(fresh, tiny):
    run, command = fresh
    assert subprocess.run(command, capture_output=True).returncode == 0
    one, rows = adapter(run), lines(run / "metrics.jsonl")
    shutil.rmtree(run / "adapter")
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", "--", *command[1:]], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-2000:]
    assert all(torch.allclose(one[k], v, atol=1e-4) for k, v in adapter(run).items())  # 3 anchors on 2 processes: uneven
    for a, b in zip(rows, lines(run / "metrics.jsonl"), strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["gap"] - b["gap"]) < 1e-4


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(fresh, name):
    run, command = fresh
    command = [*command[:-6], "--steps", "60", *command[-4:]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (run / "adapter/state.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(name)
    error = process.communicate()[1]
    assert process.returncode == 130 and "continues" in error
    saved = torch.load(run / "adapter/state.pt", weights_only=True)["step"]
    rows = [r["step"] for r in lines(run / "metrics.jsonl") if r["split"] == "train"]
    assert rows == list(range(1, saved + 1)) and saved < 60
    assert subprocess.run(command, capture_output=True).returncode == 0
    got = adapter(run)
    shutil.rmtree(run / "adapter")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert all(torch.equal(got[k], v) for k, v in adapter(run).items())


def test_a_full_disk_keeps_the_last_state(fresh):
    run, command = fresh
    process = subprocess.Popen([*command[:-6], "--steps", "60", *command[-4:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "adapter/state.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = (run / "adapter/state.pt").read_bytes()

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    done = subprocess.run([*command[:-6], "--steps", "60", *command[-4:]], capture_output=True, text=True, preexec_fn=no_room)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "make room" in errors[0] and "Traceback" not in done.stderr
    assert (run / "adapter/state.pt").read_bytes() == before and not (run / "adapter/state.tmp").exists()


def test_a_torn_state_is_ignored(fresh):
    run, command = fresh
    assert subprocess.run(command, capture_output=True).returncode == 0
    want, state = adapter(run), run / "adapter/state.pt"
    for torn in (state.read_bytes()[:1000], b"", b"junk"):
        state.write_bytes(torn)
        assert subprocess.run(command, capture_output=True).returncode == 0
        assert all(torch.equal(want[k], v) for k, v in adapter(run).items())
        assert [r["step"] for r in lines(run / "metrics.jsonl") if r["split"] == "train"] == list(range(1, 7))


def test_the_best_state_is_kept(fresh):
    run, command = fresh
    assert subprocess.run([*command, "--steps", "12", "--lr", "1", "--every", "1", "--warmup", "0"], capture_output=True).returncode == 0
    rows = [r for r in lines(run / "metrics.jsonl") if r["split"] == "validation"]
    best = torch.load(run / "adapter/state.pt", weights_only=True)["best"]
    assert best["criterion"] == min(r["criterion"] for r in rows) and best["step"] < 12  # it diverges
    assert all(torch.equal(best["adapter"][k], v) for k, v in adapter(run).items())


def test_checkpointing_and_merging(fresh, tiny):
    run, command = fresh
    assert subprocess.run(command, capture_output=True).returncode == 0
    plain = adapter(run)
    assert subprocess.run([*command, "--checkpointing", "--merge"], capture_output=True).returncode == 0
    assert all(torch.allclose(plain[k], v, atol=1e-5) for k, v in adapter(run).items())
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert [p.suffix for p in (run / "merged").glob("model*")] == [".safetensors"]
    ids = torch.arange(5, 30)[None]
    assert torch.allclose(tuned(ids).logits, merged(ids).logits, atol=1e-4)


def test_four_bits(stage, tiny, tmp_path, capsys):
    """nf4 by bitsandbytes: both stages see the same weights, and gradients pass through all layers."""
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(12)])
    assert stage("02", "--run", tmp_path, "--model", tiny, "--dtype", "nf4") == 0
    assert stage("03", "--run", tmp_path, *OPTIONS, "--budget", 50) == 0
    got = adapter(tmp_path)
    assert all(v.abs().max() > 1e-4 for k, v in got.items() if "lora_B" in k)
    rows = [r for r in lines(tmp_path / "metrics.jsonl") if r["split"] == "validation"]
    assert rows[-1]["cp"] < rows[0]["cp"]
    from safetensors import safe_open
    from safetensors.torch import save_file
    store = load_file(tmp_path / "prototypes.safetensors")
    with safe_open(tmp_path / "prototypes.safetensors", "pt") as f:
        meta = f.metadata()
    save_file(store, tmp_path / "prototypes.safetensors", meta | {"dtype": "float32"})
    refused(capsys, stage("03", "--run", tmp_path, *OPTIONS), "other weights")
