"""Stage 03: exact gradients in any memory, several processes, signals, full disks, 4 bits."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GPT2Config,
    OPTConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from conftest import ROOT, SETS, lines, mined_line, refused, write_jsonl
from cp_loss import fingerprint, model_nll

# conftest's `trained`
TRAINED = ["--steps", 6, "--anchors", 2, "--every", 3, "--lr", 1e-2]
OPTIONS = ["--steps", 6, "--anchors", 3, "--every", 3, "--lr", 1e-2]
# weights of one size: at a random model's tiny gradients Adam makes much of rounding
OPTIONS += ["--alpha", 3, "--hold", 0.6, "--utility", 5, "--rank", 16]
LONG = ["--steps", 20, "--anchors", 3, "--every", 3, "--lr", 1e-2]


def adapter(run) -> dict:
    return load_file(run / "adapter/adapter_model.safetensors")


def metrics(run, split: str) -> list[dict]:
    return [
        r
        for r in lines(run / "adapter.training/metrics.jsonl")
        if r["split"] == split
    ]


def close(a: dict, b: dict, atol: float = 0.0) -> bool:
    for name, value in b.items():
        if not torch.allclose(a[name], value, rtol=0, atol=atol):
            return False
    return a.keys() == b.keys()


def command(run, *options) -> list[str]:
    return [
        sys.executable,
        ROOT / "03_train_cp.py",
        "--run",
        run,
        *map(str, options),
    ]


def ranked(rank: str, port: str) -> dict:
    """The environment of one of two processes."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    place |= {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
    return os.environ | place


def started(run, *options, **how) -> subprocess.Popen:
    """A training that has just saved its first state."""
    state = run / "adapter.training/state.pt"
    how = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
    } | how
    process = subprocess.Popen(command(run, *options), **how)
    deadline = time.time() + 120
    while not state.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    return process


@pytest.fixture
def fresh(trained, tmp_path):
    """A run folder with prototypes and nothing trained."""
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def long_run(trained, stage, tmp_path_factory):
    """A whole run of LONG, to compare interrupted ones with."""
    run = tmp_path_factory.mktemp("long")
    shutil.copy(trained / "prototypes.safetensors", run)
    assert stage("03", "--run", run, *LONG) == 0
    return run


def lora(tiny, **how):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny, **how)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def scattered(model) -> list:
    """The weights that train, made random: LoRA starts with B = 0, which hides A's gradient."""
    torch.manual_seed(0)
    weights = [w for w in model.parameters() if w.requires_grad]
    return [torch.nn.init.normal_(w, std=0.1) for w in weights]


# the objective


@pytest.mark.parametrize(
    "options",
    [[], ["--phi", "perplexity", "--distance", "absolute", "--prototype", "base"]],
)
def test_two_passes_give_the_gradient_of_one(stage, trained, tiny, options):
    module = stage.module("03")
    args = stage.options(
        "03", "--run", trained, "--tau", 9, "--utility", 0, *options
    )
    store, _ = module.read_store(args)
    model = lora(tiny)
    weights = scattered(model)
    chosen = module.draw(store, torch.arange(4, 10), args, module.generator(0))

    def gradient(budget):
        args.budget = budget
        model.zero_grad()
        loss, _ = module.gradient(model, store, chosen, args)
        return loss, torch.cat([w.grad.flatten() for w in weights])

    tokens = sum(len(store.ids[i]) for i in chosen)
    loss, whole = gradient(tokens)
    assert whole.norm() > 1e-3
    for budget in (1, 30, 100, tokens - 1):
        other, parts = gradient(budget)
        assert math.isclose(loss, other, rel_tol=1e-5)
        assert (parts - whole).norm() / whole.norm() < 1e-4


ANCHORS = [3, 7, 16, 22, 41]


def by_hand(nll: list, store, chosen, prototype) -> tuple[list, list]:
    """-log J of every anchor (signed, alpha 8), and every positive's level."""
    J, level = [], []
    for a in ANCHORS:
        phi = {True: [], False: []}
        for value, i in zip(nll, chosen):
            if store.anchor[i] == a:
                phi[bool(store.is_positive[i])].append(value)
                away = abs(value - float(store.nll[i]))
                if store.context[a] == 2:  # after a toxic sentence
                    away = value
                if store.is_positive[i]:
                    level.append(away)
        c = sum(phi[True]) / len(phi[True])
        if prototype == "base":
            c = float(store.prototype[a])
        s_pos = sum(math.exp(-abs(x - c)) for x in phi[True])
        s_neg = sum(math.exp(-(x - c)) for x in phi[False])
        J.append(-math.log(s_pos / (s_pos + 8 * s_neg)))
    return J, level


@pytest.mark.parametrize("prototype", ["batch", "base"])
def test_the_objective_by_hand(stage, trained, prototype):
    """-log J and the positives' level: |phi - the base's|, or phi after a toxic sentence."""
    module = stage.module("03")
    options = ["--alpha", 8, "--hold", 0.7, "--positives", 2]
    options += ["--prototype", prototype]
    args = stage.options("03", "--run", trained, *options)
    store, _ = module.read_store(args)
    chosen = module.draw(store, torch.tensor(ANCHORS), args, module.generator(0))
    nll = store.nll.double()[chosen]
    nll = nll + torch.rand(len(chosen), generator=module.generator(1))
    J, level = by_hand(nll.tolist(), store, chosen, prototype)
    loss, stats = module.objective(nll, store, chosen, args)
    want = sum(J) / len(ANCHORS) + 0.7 * sum(level) / len(level)
    assert float(loss) == pytest.approx(want, rel=1e-6)
    positive = store.is_positive[chosen]
    assert stats["cp"] == pytest.approx(sum(J) / len(ANCHORS), rel=1e-6)
    drift = (nll - store.nll[chosen])[positive].mean()
    assert stats["drift"] == pytest.approx(float(drift))


def test_the_bases_prototype_as_a_perplexity(stage, trained):
    """Of phi the prototype's own, nothing is lost by distance: J is |P| of |P| + alpha |N|."""
    module = stage.module("03")
    options = ["--phi", "perplexity", "--prototype", "base", "--hold", 0]
    args = stage.options("03", "--run", trained, *options)
    store, _ = module.read_store(args)
    chosen = module.draw(store, torch.tensor(ANCHORS), args, module.generator(0))
    nll = store.prototype[store.anchor[chosen]]
    loss, _ = module.objective(nll, store, chosen, args)
    assert float(loss) == pytest.approx(math.log(1 + 10 * 2), rel=1e-3)


def test_required_sequences_are_always_drawn(stage, trained):
    """After a toxic sentence the seed, to come near, and that sentence, to get away from."""
    module = stage.module("03")
    args = stage.options("03", "--run", trained, "--positives", 1, "--negatives", 2)
    store, _ = module.read_store(args)
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    for seed in range(5):
        chosen = module.draw(
            store, torch.arange(60), args, module.generator(seed)
        ).tolist()
        assert len(chosen) == len(set(chosen)) == 60 * 3
        assert set(store.required.nonzero().flatten().tolist()) <= set(chosen)
    required = [
        tokenizer.decode(store.ids[i]) for i in store.required.nonzero().flatten()
    ]
    copies = 0
    for text in required:
        context, answer, _ = text.split("Sentence: ")[1].split("\n")
        copies += answer == f"Paraphrase: {context}"
    assert len(required) == 72 and copies == 36


def test_an_epoch_has_every_training_anchor_once(stage, trained, tiny):
    """Of the contexts given, none held out; another --seed has another order and LoRA."""
    module = stage.module("03")
    given = ["--run", trained, "--anchors", 10, "--context", "none", "toxic"]
    args, other = (stage.options("03", *given, "--seed", s) for s in (0, 1))
    store, _ = module.read_store(args)
    made = [module.batch(store, args, step) for step in range(1, 6)]
    seen = torch.cat([store.anchor[x].unique() for x in made[:4]]).sort()[0]
    wanted = (store.context != 1) & ~store.held_out
    assert torch.equal(seen, wanted.nonzero().flatten()) and len(seen) == 40
    assert torch.equal(
        store.anchor[made[4]].unique(), store.anchor[made[0]].unique()
    )
    assert not torch.equal(made[4], made[0])  # drawn anew
    anchors = store.anchor[module.batch(store, other, 1)].unique()
    assert not torch.equal(anchors, store.anchor[made[0]].unique())
    models = [
        module.with_lora(AutoModelForCausalLM.from_pretrained(tiny), x)
        for x in (args, other)
    ]
    weights = [next(w for w in m.parameters() if w.requires_grad) for m in models]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("name, most", [("--positives", 2), ("--negatives", 3)])
def test_larger_sets_than_stage_02_keeps_are_no_secret(
    stage, trained, capsys, name, most
):
    module = stage.module("03")
    module.read_store(stage.options("03", "--run", trained, name, most))
    assert not capsys.readouterr().err
    module.read_store(stage.options("03", "--run", trained, name, most + 1))
    said = capsys.readouterr().err
    assert "at most 2 positives and 3 negatives" in said and "stage 02" in said


def test_utility_is_the_divergence_from_the_base(stage, trained, tiny):
    """Value and gradient against a literal loop over tokens; 0 where the adapter does nothing."""
    module = stage.module("03")
    args = stage.options("03", "--run", trained, "--utility", 0.7)
    store, _ = module.read_store(args)
    model = lora(tiny)
    chosen = module.draw(store, torch.arange(0, 8), args, module.generator(0))
    assert store.is_positive[chosen].sum() > 6
    assert module.utility_step(model, store, chosen, args) == pytest.approx(
        0, abs=1e-6
    )
    weights = scattered(model)
    model.zero_grad()
    got = module.utility_step(model, store, chosen, args)
    ids = [int(store.input_ids[0])]
    for i in [i for i in chosen if store.is_positive[i]][:6]:
        ids += store.ids[i][store.start[i] :].tolist()
    with torch.no_grad(), model.disable_adapter():
        base = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    tuned = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    want = (
        0.7
        * sum((b * (b.log() - q.log())).sum() for b, q in zip(base, tuned))
        / len(ids)
    )
    assert got == pytest.approx(want.item(), rel=1e-3) and got > 1e-4
    for w, g in zip(weights, torch.autograd.grad(want, weights)):
        assert (w.grad - g).norm() <= 1e-3 * g.norm() + 1e-7


def test_utility_is_of_few_tokens(stage, trained, tiny):
    """Six paragraphs would be more than a model has learned positions for."""
    module = stage.module("03")
    args = stage.options("03", "--run", trained)
    store, _ = module.read_store(args)
    store.ids = [x.repeat(30) for x in store.ids]
    chosen = module.draw(store, torch.arange(0, 4), args, module.generator(0))
    model, widths = lora(tiny), []
    model.get_input_embeddings().register_forward_hook(
        lambda *given: widths.append(given[-1].shape[1])
    )
    module.utility_step(model, store, chosen, args)
    assert widths == [512, 512]


def test_bfloat16_points_where_float32_does(stage, trained, tiny):
    """Over a bfloat16 base LoRA computes in bfloat16, with weights and gradients in float32."""
    module, grads = stage.module("03"), []
    args = stage.options("03", "--run", trained)
    store, _ = module.read_store(args)
    chosen = module.draw(store, torch.arange(0, 9), args, module.generator(0))
    for dtype in (torch.float32, torch.bfloat16):
        model = module.with_lora(
            AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), args
        )
        weights = scattered(model)
        module.gradient(model, store, chosen, args)
        assert all(w.dtype == w.grad.dtype == torch.float32 for w in weights)
        grads.append(torch.cat([w.grad.flatten() for w in weights]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.99
    assert 0.9 < grads[1].norm() / grads[0].norm() < 1.1


# validation


def test_the_untrained_adapter_gives_what_stage_02_stored(stage, trained, tiny):
    """Also after a prompt, whose own tokens don't count."""
    module = stage.module("03")
    args = stage.options("03", "--run", trained)
    store, _ = module.read_store(args)
    model = module.with_lora(AutoModelForCausalLM.from_pretrained(tiny), args)
    with torch.no_grad():
        nll = module.phi(model, store, torch.arange(len(store.nll)), args)
    torch.testing.assert_close(nll, store.nll, rtol=0, atol=1e-4)
    assert (trained / "adapter.training/phi.png").stat().st_size > 5000


def test_utility_drift_is_that_of_bare_held_out_sentences(trained, tiny):
    store = load_file(trained / "prototypes.safetensors")
    anchor, chosen = store["anchor"], []
    for s in range(len(anchor)):
        bare = store["context"][anchor[s]] == 0
        if store["is_positive"][s] and bare and store["held_out"][anchor[s]]:
            chosen.append(s)
    ids = store["input_ids"].long().split(store["offsets"].diff().tolist())
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(base, trained / "adapter")
    with torch.no_grad():
        nll = model_nll(
            model, [ids[s] for s in chosen], store["start"][chosen].tolist()
        )
    best = min(metrics(trained, "validation")[1:], key=lambda r: r["criterion"])
    assert len(chosen) == 4 and abs(best["utility_drift"]) > 0.01
    drift = (nll - store["nll"][chosen]).mean().item()
    assert drift == pytest.approx(best["utility_drift"], abs=1e-4)


@pytest.mark.parametrize(
    "context, by, counted", [(0, 0.5, 0.5), (1, 0.25, 0.25), (0, -1.0, 0.0)]
)
def test_both_drifts_count_in_the_criterion(
    stage, trained, monkeypatch, context, by, counted
):
    """Neutral sentences made less likely, bare (0) or in the contexts trained on (1)."""
    module = stage.module("03")
    args = stage.options("03", "--run", trained, "--context", "seed")
    store, _ = module.read_store(args)
    moved = (store.context[store.anchor] == context) & store.is_positive

    def phi(_model, _store, chosen, _args):
        return (store.nll + by * moved)[chosen]

    monkeypatch.setattr(module, "phi", phi)
    got, _ = module.validate(None, store, args, 1)
    assert math.isclose(got["criterion"], got["cp"] + counted, abs_tol=1e-5)
    assert math.isclose(
        got["utility_drift"], by if context == 0 else 0, abs_tol=1e-5
    )


def test_validations_are_of_one_draw(stage, trained, monkeypatch):
    """Of sets larger than what is drawn."""
    module = stage.module("03")
    args = stage.options("03", "--run", trained, "--negatives", 1)
    store, _ = module.read_store(args)
    monkeypatch.setattr(module, "phi", lambda _a, store, some, _b: store.nll[some])
    rows = [module.validate(None, store, args, step)[0] for step in range(9)]
    assert all(row | {"step": 0} == rows[0] for row in rows)


def test_the_best_state_is_kept(stage, fresh, monkeypatch):
    """Of validations that get worse after step 4, not the last one's."""
    module, seen = stage.module("03"), {}
    validate, weights = module.validate, module.get_peft_model_state_dict

    def worse_after_4(model, store, args, step):
        row, nll = validate(model, store, args, step)
        seen[step] = {k: v.clone() for k, v in weights(model).items()}
        return row | {"criterion": abs(step - 4)}, nll

    monkeypatch.setattr(module, "validate", worse_after_4)
    assert stage("03", "--run", fresh, *OPTIONS, "--every", 1) == 0
    state = torch.load(fresh / "adapter.training/state.pt", weights_only=True)
    assert state["best"] == 0 and state["step"] == 6
    assert close(seen[4], adapter(fresh)) and close(seen[6], state["adapter"])
    assert not close(seen[4], seen[6])


def test_the_best_before_an_interrupt_stays_best(stage, fresh, monkeypatch):
    module, stopped = stage.module("03"), []
    validate = module.validate

    def best_at_2(model, store, args, step):
        if step == 4 and not stopped:
            stopped.append(step)
            raise SystemExit(9)
        row, nll = validate(model, store, args, step)
        return row | {"criterion": abs(step - 2)}, nll

    monkeypatch.setattr(module, "validate", best_at_2)
    task = ["03", "--run", fresh, *OPTIONS, "--every", 1]
    assert stage(*task) == 9
    best = fresh / "adapter.training/best/adapter_model.safetensors"
    kept = load_file(best)
    assert stage(*task) == 0 and close(kept, adapter(fresh))


def test_rates_and_clipping(stage, trained, monkeypatch):
    """A tenth of the steps up, the others down to nothing; a gradient's norm is 1 at most."""
    module, weight = stage.module("03"), torch.nn.Parameter(torch.zeros(1))
    args = stage.options("03", "--run", trained, "--steps", 20, "--lr", 19)
    store, _ = module.read_store(args)
    monkeypatch.setattr(module, "gradient", lambda *_: (1.0, {}))
    model, rates = torch.nn.ParameterList([weight]), []
    model.device = weight.device
    optimizer = torch.optim.SGD([weight], lr=1)
    for step in range(1, 21):
        weight.grad = torch.full((1,), 5.0)
        module.train_step(model, optimizer, store, args, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([9.5, *range(19, 0, -1)])
    assert weight.item() == pytest.approx(-sum(rates), rel=1e-4)


def test_the_adapters_readme_has_a_snippet_that_runs(trained):
    text = (trained / "adapter/README.md").read_text()
    assert "library_name: peft" in text and "{" not in text.split("```")[2]
    code = text.split("```python\n")[1].split("```")[0]
    task = [sys.executable, "-c", code]
    done = subprocess.run(
        task, capture_output=True, text=True, cwd=trained / "adapter"
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_folder_has_one_run_at_a_time(stage, fresh):
    held = pytest.raises(OSError, match="training.lock")
    with FileLock(fresh / "adapter.training.lock"), held:
        stage("03", "--run", fresh, *OPTIONS)
    assert not (fresh / "adapter.training").exists()


def test_processes_need_anchors_each(stage, trained, monkeypatch, capsys):
    """Also held-out ones, of which there are ten."""
    state = SimpleNamespace(num_processes=11, is_main_process=False)
    monkeypatch.setattr(stage.module("03"), "PartialState", lambda **_: state)
    given = ["--run", trained, "--anchors", 20]
    refused(capsys, stage("03", *given), "10 to validate", "a process needs one")


# one run, interrupted in every way


def test_two_processes_follow_one(stage, fresh, tmp_path):
    """3 anchors on 2 processes are uneven; in one pass and in two."""
    assert stage("03", "--run", fresh, *OPTIONS) == 0
    one, rows = adapter(fresh), lines(fresh / "adapter.training/metrics.jsonl")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
    ]
    for port, more in (
        ("29517", []),
        ("29519", ["--checkpointing", "--budget", 60]),
    ):
        out = tmp_path / port
        task = command(fresh, "--out", out, *OPTIONS, *more)[1:]
        two = [*torchrun, "--master-port", port, "--", *task]
        done = subprocess.run(two, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("from step") == 1  # a process of each would say so
        assert close(one, load_file(out / "adapter_model.safetensors"), 1e-4)
        for a, b in zip(
            rows, lines(tmp_path / f"{port}.training/metrics.jsonl"), strict=True
        ):
            for k in ("step", "loss", "gap", "drift"):
                assert abs(a[k] - b[k]) < 1e-4


def test_one_process_told_to_stop_stops_all(fresh):
    options = ["--steps", 500, *OPTIONS[2:]]
    second = subprocess.Popen(
        command(fresh, *options),
        env=ranked("1", "29518"),
        stderr=subprocess.DEVNULL,
    )
    first = started(fresh, *options, env=ranked("0", "29518"))
    second.send_signal(signal.SIGTERM)
    assert first.wait(60) == second.wait(60) == 130, first.stderr.read()[-1000:]
    saved = torch.load(fresh / "adapter.training/state.pt", weights_only=True)[
        "step"
    ]
    steps = [r["step"] for r in metrics(fresh, "train")]
    assert steps == list(range(1, saved + 1)) and saved < 500


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_ends_the_same(stage, fresh, long_run, name, capsys):
    """SIGTERM and SIGINT save first; after any of them the same command goes on, bit for bit."""
    process = started(fresh, *LONG)
    process.send_signal(name)
    error = process.communicate()[1]
    saved = torch.load(fresh / "adapter.training/state.pt", weights_only=True)[
        "step"
    ]
    assert saved < 20
    if name != signal.SIGKILL:
        assert process.returncode == 130 and "continues" in error
        assert [r["step"] for r in metrics(fresh, "train")] == list(
            range(1, saved + 1)
        )
    assert stage("03", "--run", fresh, *LONG) == 0
    assert f"from step {saved} of 20" in capsys.readouterr().out
    assert close(adapter(long_run), adapter(fresh))
    said = [
        [(r["step"], r["loss"]) for r in metrics(x, "train")]
        for x in (long_run, fresh)
    ]
    assert said[0] == said[1] and [step for step, _ in said[1]] == list(
        range(1, 21)
    )


def test_a_full_disk_keeps_the_last_state(fresh):
    process = started(fresh, *LONG)
    process.kill()
    process.wait()
    state = fresh / "adapter.training/state.pt"
    before = state.read_bytes()

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)
        )

    task = command(fresh, *LONG)
    done = subprocess.run(task, capture_output=True, text=True, preexec_fn=no_room)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr[-2000:]
    assert "same command continues" in errors[0] and "Traceback" not in done.stderr
    assert state.read_bytes() == before and not state.with_suffix(".tmp").exists()


def test_a_torn_state_is_ignored(stage, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    want = adapter(run)
    for torn in (b"junk", (run / "adapter.training/state.pt").read_bytes()[:1000]):
        (run / "adapter.training/state.pt").write_bytes(torn)
        shutil.rmtree(run / "adapter")
        assert stage("03", "--run", run, *TRAINED) == 0
        assert close(want, adapter(run))
        assert [r["step"] for r in metrics(run, "train")] == list(range(1, 7))


def test_a_finished_adapter_whose_state_is_torn_stays(
    stage, trained, tmp_path, capsys
):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "adapter.training/state.pt").write_bytes(b"junk")
    status = stage("03", "--run", run, *TRAINED, "--lr", 1e-3)
    refused(capsys, status, "without a whole state", "--out")
    assert close(adapter(trained), adapter(run))
    assert metrics(run, "train") == metrics(trained, "train")


def test_a_notebooks_way_to_draw_does_not_matter(fresh):
    environ = os.environ | {"MPLBACKEND": "module://of_a_notebook"}
    task = command(fresh, "--steps", 1, *OPTIONS[2:])
    done = subprocess.run(task, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (fresh / "adapter.training/phi.png").exists()
    assert "Warning" not in done.stderr


def test_processes_resume_from_one_state(fresh, tmp_path):
    """Each of two machines has its own folder, of which the first alone holds a state."""
    assert subprocess.run(command(fresh, *OPTIONS)).returncode == 0
    shutil.rmtree(fresh / "adapter")
    other = shutil.copytree(fresh, tmp_path / "other")
    shutil.rmtree(other / "adapter.training")
    how = {"stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen(command(run, *OPTIONS), env=ranked(rank, "29521"), **how)
        for rank, run in (("0", fresh), ("1", other))
    )
    said = second.communicate(timeout=60)[1]
    first.kill()  # it waits for the second
    first.communicate()
    assert "share the folder" in said and second.returncode == 2


def test_a_finished_run_is_not_lost(stage, trained, tmp_path, capsys):
    """The same run, elsewhere and in less memory, has nothing left to do; another is refused."""
    run = shutil.copytree(trained, tmp_path / "moved")

    def contents():
        files = [p for p in run.rglob("*") if p.is_file() and p.name != "run.json"]
        return {p: p.read_bytes() for p in files}

    before = contents()
    assert stage("03", "--run", run, *TRAINED, "--budget", 50) == 0
    assert contents() == before
    refused(
        capsys,
        stage("03", "--run", run, *TRAINED, "--lr", 1e-3),
        "other lr",
        "--out",
    )
    store = load_file(run / "prototypes.safetensors")
    with safe_open(run / "prototypes.safetensors", "pt") as f:
        meta = f.metadata()
    store["start"] = store["start"].clamp(max=3)
    meta["tensors"] = fingerprint(store.items())
    save_file(store, run / "prototypes.safetensors", meta)
    refused(
        capsys,
        stage("03", "--run", run, *TRAINED),
        "other prototypes",
        "remove both",
    )
    after = contents()
    assert all(
        after[p] == x
        for p, x in before.items()
        if p.name != "prototypes.safetensors"
    )
    shutil.rmtree(run / "adapter.training")
    refused(capsys, stage("03", "--run", run, *TRAINED), "exists", "--out")


# models


def test_checkpointing_computes_layers_again(stage, trained, fresh, monkeypatch):
    passes, layer = [], LlamaAttention.forward

    def counted(*args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return layer(*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    assert stage("03", "--run", fresh, "--out", fresh / "plain", *TRAINED) == 0
    plain, passes[:] = sum(passes), []
    assert stage("03", "--run", fresh, *TRAINED, "--checkpointing") == 0
    assert sum(passes) == 2 * plain  # each layer once more, in the backward pass
    assert close(adapter(trained), adapter(fresh), 1e-5)


def test_layers_spread_over_devices(stage, trained, tiny, tmp_path):
    shutil.copy(trained / "mined.jsonl", tmp_path)
    options = ["--model", tiny, "--device", "auto", *SETS]
    assert stage("02", "--run", tmp_path, *options) == 0
    stores = [
        load_file(run / "prototypes.safetensors") for run in (trained, tmp_path)
    ]
    assert torch.equal(stores[0]["nll"], stores[1]["nll"])
    assert stage("03", "--run", tmp_path, *TRAINED, "--device", "auto") == 0
    assert close(adapter(trained), adapter(tmp_path))


GPT2 = GPT2Config(
    vocab_size=49152,
    n_embd=32,
    n_layer=2,
    n_head=4,
    resid_pdrop=0.5,
    embd_pdrop=0.5,
    attn_pdrop=0.5,
)
OPT = OPTConfig(
    vocab_size=49152,
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    dropout=0.5,
)


FALCON = FalconConfig(
    vocab_size=49152,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_dropout=0.5,
    attention_dropout=0.5,
)


# as modules; by a function, of a module's own number and of the config's
@pytest.mark.parametrize("config", [GPT2, OPT, FALCON])
def test_a_base_with_dropout(stage, tiny, tmp_path, config):
    """None in training: else the passes of a step would see different models, and a resumed run
    other draws."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(12)])
    options = ["--model", tmp_path / "model", "--dtype", "float32"]
    assert stage("02", "--run", tmp_path, *options) == 0
    got = []
    for out, more in (
        ("a", []),
        ("b", ["--budget", 50]),
        ("c", ["--checkpointing"]),
    ):
        assert (
            stage("03", "--run", tmp_path, "--out", tmp_path / out, *OPTIONS, *more)
            == 0
        )
        got.append(load_file(tmp_path / out / "adapter_model.safetensors"))
    assert close(got[0], got[1], 1e-3) and close(got[0], got[2], 1e-3)


def test_four_bits(stage, tiny, tmp_path, capsys):
    """nf4 by bitsandbytes: both stages see the same weights, and gradients pass all layers."""
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(12)])
    assert stage("02", "--run", tmp_path, "--model", tiny, "--dtype", "nf4") == 0
    assert stage("03", "--run", tmp_path, *OPTIONS, "--budget", 50) == 0
    got = adapter(tmp_path)
    assert all(v.abs().max() > 1e-4 for k, v in got.items() if "lora_B" in k)
    rows = metrics(tmp_path, "validation")
    assert rows[-1]["cp"] < rows[0]["cp"]
    store = load_file(tmp_path / "prototypes.safetensors")
    with safe_open(tmp_path / "prototypes.safetensors", "pt") as f:
        meta = f.metadata() | {"load": json.dumps({"dtype": "float32"})}
    shutil.rmtree(tmp_path / "adapter.training")
    shutil.rmtree(tmp_path / "adapter")
    save_file(store, tmp_path / "prototypes.safetensors", meta)
    refused(capsys, stage("03", "--run", tmp_path, *OPTIONS), "other weights")
