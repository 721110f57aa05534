"""Stage 03 beyond one plain run: exact gradients in any memory, several processes, signals, full disks, 4 bits, merging."""
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import bench_ablation
import pytest
import torch
from conftest import ROOT, lines, mined_line, refused, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaAttention

from cp_loss import model_nll

OPTIONS = ["--steps", "6", "--anchors", "3", "--every", "3", "--lr", "1e-2"]
TRAINED = ["--steps", "6", "--anchors", "2", "--every", "3", "--lr", "1e-2"]  # conftest's `trained`


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


@pytest.mark.parametrize("only", [None, "positives", "negatives"])
def test_the_objective_by_hand(stage, trained, monkeypatch, only):
    """-log J (signed, alpha 8) and the positives' level: |phi - the base's|, or phi itself after a toxic sentence."""
    stage("03", "--preset", "none")
    module = stage.modules["03"]
    monkeypatch.setattr(sys, "argv", ["03", "--run", str(trained), "--alpha", "8", "--hold", "0.7", "--positives", "2", *(["--only", only] if only else [])])
    args = module.options()
    store, _ = module.read_store(args.prototypes)
    chosen = module.draw(store, torch.arange(0, 9), args, torch.Generator().manual_seed(0))
    nll = store["nll"].double()[chosen] + torch.rand(len(chosen), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    J, level = [], []
    for a in range(9):
        mine = [i for i in range(len(chosen)) if store["anchor"][chosen[i]] == a]
        pos, neg = ([i for i in mine if bool(store["is_positive"][chosen[i]]) == flag] for flag in (True, False))
        phi = {i: float(store["nll"][chosen[i]]) if only == "negatives" and i in pos else float(nll[i]) for i in mine}
        c = sum(phi[i] for i in pos) / len(pos)
        s_pos, s_neg = sum(math.exp(-abs(phi[i] - c)) for i in pos), sum(math.exp(-(phi[i] - c)) for i in neg)
        J.append(-math.log(s_pos / (s_pos + 8 * s_neg)))
        level += [float(nll[i]) if store["context"][a] == 2 else abs(float(nll[i]) - float(store["nll"][chosen[i]])) for i in pos]
        if store["context"][a] == 2:  # the seed, and the toxic sentence in the context, are always drawn
            first = [int((store["anchor"] == a).nonzero()[0]), int(((store["anchor"] == a) & (store["is_positive"] == 0)).nonzero()[0])]
            assert set(first) <= set(chosen.tolist())
    want = (sum(J) / len(J) if only != "positives" else 0) + 0.7 * sum(level) / len(level)
    loss, stats = module.objective(nll, store, chosen, args)
    assert float(loss) == pytest.approx(want, rel=1e-6)
    positive = store["is_positive"][chosen].bool()
    assert float(stats["drift"]) == pytest.approx(float((nll - store["nll"][chosen])[positive].mean()), rel=1e-6)


def test_utility_is_the_divergence_from_the_base(stage, trained, tiny, monkeypatch):
    """Its value and gradient against a literal loop over tokens; 0 where the adapter does nothing yet."""
    stage("03", "--preset", "none")
    module = stage.modules["03"]
    monkeypatch.setattr(sys, "argv", ["03", "--run", str(trained), "--utility", "0.7"])
    args = module.options()
    store, _ = module.read_store(args.prototypes)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    chosen = module.draw(store, torch.arange(0, 4), args, torch.Generator().manual_seed(0))
    assert module.utility_step(model, store, chosen, args).item() == pytest.approx(0, abs=1e-6)
    weights = [w for w in model.parameters() if w.requires_grad]
    for w in weights:
        torch.nn.init.normal_(w, std=0.1)
    model.zero_grad()
    got = module.utility_step(model, store, chosen, args)
    neutral = [i for i in chosen.tolist() if store["is_positive"][i]][:6]
    ids = [int(store["input_ids"][0])] + [int(t) for i in neutral for t in store["input_ids"][store["offsets"][i] + store["start"][i]:store["offsets"][i + 1]]]
    with torch.no_grad(), model.disable_adapter():
        base = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    tuned = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    want = 0.7 * sum((b * (b.log() - q.log())).sum() for b, q in zip(base, tuned)) / len(ids)
    assert got.item() == pytest.approx(want.item(), rel=1e-3) and got > 1e-4
    grads = torch.autograd.grad(want, weights)
    assert all((w.grad - g).norm() <= 1e-3 * g.norm() + 1e-7 for w, g in zip(weights, grads))


def test_two_processes_follow_one(fresh):
    """Plain, and with the layers' weights shared out: 3 anchors on 2 processes are uneven, in rows, passes and parts too."""
    run, command = fresh
    assert subprocess.run(command, capture_output=True).returncode == 0
    one, rows = adapter(run), lines(run / "metrics.jsonl")
    for more in ([], ["--shard", "--checkpointing", "--max-tokens", "50", "--budget", "60"]):
        shutil.rmtree(run / "adapter")
        two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", "--", *command[1:], *more],
                             capture_output=True, text=True)
        assert two.returncode == 0, two.stderr[-2000:]
        assert two.stdout.count("keeps 9,280 of the layers' 18,560 weights" if more else "keeps") == (2 if more else 0), two.stdout
        assert all(torch.allclose(one[k], v, atol=1e-4) for k, v in adapter(run).items())
        for a, b in zip(rows, lines(run / "metrics.jsonl"), strict=True):
            assert a["step"] == b["step"] and all(abs(a[k] - b[k]) < 1e-4 for k in a if k in ("loss", "gap", "drift", "utility_drift", "criterion"))


def test_one_process_told_to_stop_stops_all(fresh):
    run, command = fresh
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29518", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen([*command[:-8], "--steps", "500", *command[-6:]], env=os.environ | place | {"RANK": str(r), "LOCAL_RANK": str(r)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for r in range(2)]
    while not (run / "adapter/state.pt").exists() and pair[0].poll() is None:
        time.sleep(0.005)
    pair[1].send_signal(signal.SIGTERM)
    assert [p.wait(60) for p in pair] == [130, 130], [p.stderr.read()[-1000:] for p in pair]
    saved = torch.load(run / "adapter/state.pt", weights_only=True)["step"]
    assert [r["step"] for r in lines(run / "metrics.jsonl") if r["split"] == "train"] == list(range(1, saved + 1)) and saved < 500


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(fresh, name):
    run, command = fresh
    command = [*command[:-6], "--steps", "20", *command[-4:]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (run / "adapter/state.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(name)
    error = process.communicate()[1]
    assert process.returncode == 130 and "continues" in error
    saved = torch.load(run / "adapter/state.pt", weights_only=True)["step"]
    rows = [r["step"] for r in lines(run / "metrics.jsonl") if r["split"] == "train"]
    assert rows == list(range(1, saved + 1)) and saved < 20
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"from step {saved} of 20" in again.stdout
    got = adapter(run)
    shutil.rmtree(run / "adapter")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert all(torch.equal(got[k], v) for k, v in adapter(run).items())


def test_a_full_disk_keeps_the_last_state(fresh):
    run, command = fresh
    process = subprocess.Popen([*command[:-6], "--steps", "20", *command[-4:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "adapter/state.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = (run / "adapter/state.pt").read_bytes()

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    done = subprocess.run([*command[:-6], "--steps", "20", *command[-4:]], capture_output=True, text=True, preexec_fn=no_room)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "make room" in errors[0] and "Traceback" not in done.stderr
    assert (run / "adapter/state.pt").read_bytes() == before and not (run / "adapter/state.tmp").exists()


def test_a_torn_state_is_ignored(stage, fresh):
    run, _ = fresh
    assert stage("03", "--run", run, *OPTIONS) == 0
    want, state = adapter(run), run / "adapter/state.pt"
    for torn in (state.read_bytes()[:1000], b"", b"junk"):
        state.write_bytes(torn)
        assert stage("03", "--run", run, *OPTIONS) == 0
        assert all(torch.equal(want[k], v) for k, v in adapter(run).items())
        assert [r["step"] for r in lines(run / "metrics.jsonl") if r["split"] == "train"] == list(range(1, 7))


def test_a_finished_run_is_not_lost(stage, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "moved")
    before = {x: x.read_bytes() for x in (run / "metrics.jsonl", run / "adapter/run.json", run / "adapter/adapter_model.safetensors")}
    (run / "metrics.jsonl").write_bytes(before[run / "metrics.jsonl"] + b'{"step": 7, "split": "train"}\n{"step": 8, "sp')
    assert stage("03", "--run", run, *TRAINED, "--budget", 50) == 0  # the same run, elsewhere and in less memory: nothing left to do
    assert all(x.read_bytes() == want for x, want in before.items()) and not list(run.glob("adapter.*"))
    store = load_file(run / "prototypes.safetensors")
    with safe_open(run / "prototypes.safetensors", "pt") as f:
        meta = f.metadata()
    for number, more in ((1, ["--lr", "1e-3"]), (2, ["--lr", "1e-3"])):  # other options; the same ones, other data
        assert stage("03", "--run", run, *TRAINED, *more) == 0
        for x, want in before.items():
            assert (run / f"adapter.{number}" / x.name).read_bytes() == want and (x.suffix == ".json" or x.read_bytes() != want)
        before = {x: x.read_bytes() for x in before}
        save_file(store | {"start": store["start"].clamp(max=3)}, run / "prototypes.safetensors", meta)


def test_a_step_says_what_it_costs(stage, fresh, capsys):
    run, _ = fresh
    assert stage("03", "--run", run, *OPTIONS, "--max-tokens", 1000) == 0
    said = capsys.readouterr().out
    rows = [r for r in lines(run / "metrics.jsonl") if r["split"] == "train"]
    assert f"about {sum(r['tokens'] for r in rows) // 6} tokens a step, one pass" in said and "% full" in said
    assert all(0.5 < r["fill"] <= 1 for r in rows)
    assert stage("03", "--run", run, *OPTIONS, "--seed", 1, "--budget", 100, "--max-tokens", 100) == 0
    said = capsys.readouterr().out
    rows = [r for r in lines(run / "metrics.jsonl") if r["split"] == "train"]
    assert f"up to {max(r['tokens'] for r in rows)} at once, over --budget 100: there two passes, one more forward" in said
    assert all(0.5 < r["fill"] <= 1 for r in rows)


def test_utility_drift_is_that_of_bare_held_out_sentences(trained, tiny):
    store, state = load_file(trained / "prototypes.safetensors"), torch.load(trained / "adapter/state.pt", weights_only=True)
    held = json.loads((trained / "adapter/run.json").read_text())["held_out"]
    chosen = [s for s in range(len(store["nll"])) if store["is_positive"][s] and store["context"][store["anchor"][s]] == 0 and store["seed"][store["anchor"][s]] in held]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), trained / "adapter")
    with torch.no_grad():
        nll = model_nll(model, [store["input_ids"][store["offsets"][s]:store["offsets"][s + 1]] for s in chosen], store["start"][chosen].tolist())
    last = lines(trained / "metrics.jsonl")[-1]
    assert state["best"]["step"] == last["step"] == 6 and len(chosen) == 4
    assert abs((nll - store["nll"][chosen]).mean() - last["utility_drift"]) < 1e-4 and abs(last["utility_drift"]) > 0.01


@pytest.mark.parametrize("context, by, counted", [(0, 0.5, 0.5), (1, 0.25, 0.25), (0, -1.0, 0.0)])
def test_both_drifts_count_in_the_criterion(stage, trained, monkeypatch, context, by, counted):
    """Neutral sentences made less likely, bare (0) or in the contexts trained on (1)."""
    module = stage.modules["03"]
    monkeypatch.setattr(sys, "argv", ["03", "--run", str(trained), "--context", "seed"])
    args = module.options()
    store, meta = module.read_store(args.prototypes)
    moved = (store["context"][store["anchor"]] == context) & store["is_positive"].bool()
    monkeypatch.setattr(module, "phi", lambda model, store, chosen, args: (store["nll"] + by * moved)[chosen])
    got = module.validate(torch.nn.Module(), store, module.split_anchors(store, meta, args)[1], args)
    assert math.isclose(got["criterion"], got["cp"] + counted, abs_tol=1e-5) and math.isclose(got["utility_drift"], by if context == 0 else 0, abs_tol=1e-5)


def test_the_best_state_is_kept(stage, fresh):
    run, _ = fresh
    assert stage("03", "--run", run, *OPTIONS, "--steps", 12, "--lr", 3, "--every", 1, "--warmup", 0, "--hold", 0, "--utility", 0, "--positives", 2) == 0
    rows = [r for r in lines(run / "metrics.jsonl") if r["split"] == "validation"]
    best = torch.load(run / "adapter/state.pt", weights_only=True)["best"]
    assert best["criterion"] == min(r["criterion"] for r in rows) and best["step"] < 12  # it overshoots
    assert all(torch.equal(best["adapter"][k], v) for k, v in adapter(run).items())


def test_checkpointing_and_merging(stage, trained, tiny, tmp_path, monkeypatch):
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    passes, layer = [], LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda *a, **k: passes.append(torch.is_grad_enabled()) or layer(*a, **k))
    assert stage("03", "--run", tmp_path, "--out", tmp_path / "plain/adapter", *TRAINED) == 0
    plain, passes[:] = sum(passes), []
    assert stage("03", "--run", tmp_path, *TRAINED, "--checkpointing", "--merge") == 0
    assert sum(passes) == 2 * plain  # each layer once more, in the backward pass
    assert all(torch.allclose(adapter(trained)[k], v, atol=1e-5) for k, v in adapter(tmp_path).items())
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert [p.suffix for p in (tmp_path / "merged").glob("model*")] == [".safetensors"]
    ids = torch.arange(5, 30)[None]
    assert torch.allclose(tuned(ids).logits, merged(ids).logits, atol=1e-4)


def test_layers_spread_over_devices(stage, trained, tiny, tmp_path):
    shutil.copy(trained / "mined.jsonl", tmp_path)
    assert stage("02", "--run", tmp_path, "--model", tiny, "--dtype", "float32", "--device", "auto") == 0
    assert torch.equal(load_file(tmp_path / "prototypes.safetensors")["nll"], load_file(trained / "prototypes.safetensors")["nll"])
    assert stage("03", "--run", tmp_path, *TRAINED, "--device", "auto") == 0
    assert all(torch.equal(adapter(trained)[k], v) for k, v in adapter(tmp_path).items())


def test_a_base_with_dropout(stage, tiny, tmp_path):
    """None in training: else the passes of a step would see different models, and a resumed run other draws."""
    GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(12)])
    assert stage("02", "--run", tmp_path, "--model", tmp_path / "model", "--dtype", "float32") == 0
    for out, more in (("a", []), ("b", ["--budget", 50]), ("c", ["--checkpointing"])):
        assert stage("03", "--run", tmp_path, "--out", tmp_path / out / "adapter", *OPTIONS, *more) == 0
        assert all(torch.allclose(v, adapter(tmp_path / "a")[k], atol=1e-4) for k, v in adapter(tmp_path / out).items())


def test_bfloat16_points_where_float32_does(stage, trained, tiny, monkeypatch):
    """Over a bfloat16 base LoRA computes in bfloat16, with weights and gradients in float32."""
    stage("03", "--preset", "none")
    module = stage.modules["03"]
    monkeypatch.setattr(sys, "argv", ["03", "--run", str(trained)])
    args = module.options()
    store, _ = module.read_store(args.prototypes)
    chosen, grads = module.draw(store, torch.arange(0, 9), args, torch.Generator().manual_seed(0)), []
    for dtype in (torch.float32, torch.bfloat16):
        model = module.with_lora(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), args)
        torch.manual_seed(0)
        weights = [torch.nn.init.normal_(w, std=0.1) for w in model.parameters() if w.requires_grad]
        module.backward(model, store, chosen, args, (9, int(store["is_positive"][chosen].sum())))
        assert all(w.dtype == w.grad.dtype == torch.float32 for w in weights)
        grads.append(torch.cat([w.grad.flatten() for w in weights]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.99 and 0.9 < grads[1].norm() / grads[0].norm() < 1.1


def test_four_bits(stage, tiny, tmp_path, capsys):
    """nf4 by bitsandbytes: both stages see the same weights, and gradients pass through all layers."""
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(12)])
    assert stage("02", "--run", tmp_path, "--model", tiny, "--dtype", "nf4") == 0
    assert stage("03", "--run", tmp_path, *OPTIONS, "--budget", 50) == 0
    got = adapter(tmp_path)
    assert all(v.abs().max() > 1e-4 for k, v in got.items() if "lora_B" in k)
    rows = [r for r in lines(tmp_path / "metrics.jsonl") if r["split"] == "validation"]
    assert rows[-1]["cp"] < rows[0]["cp"]
    store = load_file(tmp_path / "prototypes.safetensors")
    with safe_open(tmp_path / "prototypes.safetensors", "pt") as f:
        meta = f.metadata()
    save_file(store, tmp_path / "prototypes.safetensors", meta | {"dtype": "float32"})
    refused(capsys, stage("03", "--run", tmp_path, *OPTIONS), "other weights")


# the ablation's peers

def literal(kind: str, nll: list, count: list, base: list, anchor: list, good: list) -> float:
    """Their papers' equations, pair by pair, and the released code's, anchor by anchor."""
    def softplus(x):
        return math.log1p(math.exp(x))
    losses, places = [], {a: [i for i, x in enumerate(anchor) if x == a] for a in anchor}
    if kind == "official":
        for a, b in [(0, 1), (2, 2)]:
            some = [i for i in range(len(nll)) if anchor[i] in (a, b)]
            phi = {i: nll[i] * count[i] / max(count[j] for j in some) for i in some}
            c = sum(phi[i] for i in some if good[i]) / sum(good[i] for i in some)
            for k in sorted({a, b}):
                z = {i: math.exp(-abs(phi[i] - c)) + 100 * (not good[i]) for i in places[k]}
                total = math.log(sum(map(math.exp, z.values())))
                losses.append(sum(total - z[i] for i in places[k] if good[i]) / (sum(good[i] for i in places[k]) + 1))
        return sum(losses) / len(losses)
    for mine in places.values():
        winners, losers = [i for i in mine if good[i]], [i for i in mine if not good[i]]
        for k, n in enumerate(losers):
            p = winners[k % len(winners)]
            logp = {i: (-nll[i] * count[i], -base[i] * count[i]) for i in (p, n)}
            margin = {"dpo": 0.1 * ((logp[p][0] - logp[p][1]) - (logp[n][0] - logp[n][1])), "simpo": 2.0 * (nll[n] - nll[p]) - 1.0}[kind]
            losses.append(softplus(-margin))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["dpo", "simpo", "official"])
def test_peers_losses_are_their_equations(kind):
    rng = torch.Generator().manual_seed(0)
    anchor, good = [0, 0, 0, 1, 1, 2, 2, 2, 2], [1, 0, 0, 1, 0, 1, 1, 0, 0]
    start, length = torch.full((9,), 2), torch.randint(4, 9, (9,), generator=rng)
    nll, base = torch.rand(2, 9, dtype=torch.float64, generator=rng) * 3
    store = {"anchor": torch.tensor(anchor), "is_positive": torch.tensor(good), "nll": base, "start": start, "offsets": torch.tensor([0, *length.cumsum(0)])}
    got = getattr(bench_ablation, kind)(nll, store, torch.arange(9))
    assert abs(got.item() - literal(kind, nll.tolist(), (length - start).tolist(), base.tolist(), anchor, good)) < 1e-9


def test_random_negatives_change_only_what_they_should(trained):
    store = load_file(trained / "prototypes.safetensors")
    held = torch.tensor([0, 1, 2])
    new = bench_ablation.random_negatives(store, held)
    parts = [[x["input_ids"][a:b].tolist() for a, b in zip(x["offsets"], x["offsets"][1:])] for x in (store, new)]
    same = torch.tensor([a == b for a, b in zip(*parts)])
    positive, toxic = store["is_positive"].bool(), store["context"][store["anchor"]] == 2
    assert same[positive].all() and same[~positive & ~toxic].float().mean() < 0.2
    assert all(a[:s] == b[:s] for a, b, s in zip(*parts, store["start"]))  # contexts stay
    apart = [[{tuple(x[s:]) for x, s, a, p in zip(some, store["start"], store["anchor"], positive) if not p and (int(a) in held) == flag} for flag in (True, False)] for some in parts]
    assert apart[0] == apart[1]  # held-out words stay held out
    for a in range(len(store["context"])):
        first = ((store["anchor"] == a) & ~positive).nonzero()[0]
        assert store["context"][a] < 2 or same[first]  # after a toxic sentence itself


def test_front_is_what_nothing_beats():
    assert bench_ablation.front({"a": (1, 9), "b": (2, 5), "c": (2, 6), "d": (3, 5), "e": (4, 1)}) == ["a", "b", "e"]
