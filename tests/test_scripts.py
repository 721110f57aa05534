"""Stages 02 and 03, run on a tiny random model; then all four, on the default model end to end."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from conftest import REAL, ROOT, lines, mined_line, refused, write_jsonl
from cp_loss import fingerprint, model_nll

SEEDS = [
    {"id": f"s{i}", "group": None, "text": mined_line(i)["text"]} for i in range(4)
]


def metadata(path) -> dict:
    with safe_open(path, "pt") as f:
        return f.metadata()


@pytest.mark.parametrize("script", sorted(ROOT.glob("0*.py")), ids=lambda x: x.name)
def test_help_and_slips_need_no_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for option, status in (("--help", 0), ("--sede", 2)):
        done = subprocess.run(
            [sys.executable, script, option],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == status, done.stderr
        assert done.stderr.count("\n") == (status > 0)


@pytest.mark.parametrize("number", ["01", "02", "03", "04"])
def test_documents_name_options_that_exist(number, stage):
    """In commands of README, Makefile and the scripts' own headers; help says each one's use."""
    (script,) = ROOT.glob(f"{number}*.py")
    texts = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("0*.py")]
    text = "\n".join(x.read_text() for x in texts)
    commands = re.findall(script.name + r"((?:\\\n|[^\n#`&])*)", text)
    used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", " ".join(commands)))
    args = stage.options(number)
    assert used and used <= args._option_string_actions.keys()
    code = script.read_text()
    assert not [
        x for x in args.class_variables if not re.search(rf"\bargs\.{x}\b", code)
    ]
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True)
    assert not re.search(rb"default=[^)]*\)\s+--", shown.stdout)


# 02


def test_prototypes_hold_what_the_model_says(trained, tiny):
    """phi of each sequence alone, by the model's own loss over the tokens that count."""
    store = load_file(trained / "prototypes.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for s in range(0, len(store["nll"]), 17):
        ids = store["input_ids"][
            store["offsets"][s] : store["offsets"][s + 1]
        ].long()
        labels = ids.clone()
        labels[: store["start"][s]] = -100
        with torch.no_grad():
            assert (
                abs(model(ids[None], labels=labels[None]).loss - store["nll"][s])
                < 1e-3
            )
    for a in range(len(store["prototype"])):
        mine = (store["anchor"] == a) & store["is_positive"]
        assert torch.isclose(store["nll"][mine].mean(), store["prototype"][a])


def test_prototypes_format(trained):
    store = load_file(trained / "prototypes.safetensors")
    kinds = {
        "input_ids": "int32",
        "offsets": "int64",
        "start": "int32",
        "anchor": "int64",
    }
    kinds |= {
        "nll": "float32",
        "prototype": "float32",
        "is_positive": "bool",
        "required": "bool",
    }
    assert {k: str(store[k].dtype)[6:] for k in kinds} == kinds
    assert torch.bincount(store["context"]).tolist() == [12, 12, 36]
    assert store["required"].sum() == 2 * 36 and (store["anchor"].diff() >= 0).all()
    held = store["seed"][store["held_out"]].unique()
    assert (
        len(held) == 2
        and not torch.isin(store["seed"][~store["held_out"]], held).any()
    )
    meta = metadata(trained / "prototypes.safetensors")
    assert meta["format"] == "cp-prototypes-2" and json.loads(meta["load"]) == {
        "dtype": "float32"
    }
    assert {
        "model",
        "model_sha256",
        "tokenizer_sha256",
        "mined_sha256",
        "phi",
    } <= set(meta)


def test_sets_are_cut_to_what_training_draws(stage, tiny, tmp_path):
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(3)])
    sets = ["--positives", 1, "--negatives", 2, "--toxic-contexts", 1]
    assert stage("02", "--run", tmp_path, "--model", tiny, *sets) == 0
    store = load_file(tmp_path / "prototypes.safetensors")
    assert torch.bincount(store["context"]).tolist() == [3, 0, 3]
    assert torch.bincount(store["anchor"]).tolist() == [3] * 6
    assert torch.bincount(store["anchor"][store["is_positive"]]).tolist() == [1] * 6


def test_what_an_anchor_is_made_of(stage):
    """Hardest negatives first; toxic contexts with most of the seed's words; after one of them the
    seed, and that sentence, come first and are required."""
    module = stage.module("02")
    args = stage.options("02", "--toxic-contexts", 2)

    def candidate(text, similarity, overlap):
        return {"text": text, "similarity": similarity, "overlap": overlap}

    line = {
        "id": "a",
        "text": "Seed.",
        "positives": [candidate("Far.", 0.5, 0.1), candidate("Near.", 0.9, 0.1)],
        "negatives": [
            candidate("Hard.", 0.9, 0.2),
            candidate("Close.", 0.9, 0.8),
            candidate("Else.", 0.5, 0.9),
        ],
    }
    anchors = module.make_anchors(0, module.Mined.model_validate(line), args)
    assert [a[1:3] for a in anchors] == [
        ("none", ""),
        ("toxic", "Close."),
        ("toxic", "Hard."),
    ]
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    ids, start, _, good, required = module.tokenise(anchors, tokenizer, args)
    said = [tokenizer.decode(x[s:]).strip() for x, s in zip(ids, start)]
    wanted = "Near. Hard. Close. Seed. Close. Hard. Seed. Hard. Close."
    assert said == wanted.split()
    assert good == (True, False, False) * 3
    assert required == (False,) * 3 + (True, True, False) * 2


def sequences(store) -> list:
    ids = store["input_ids"].split(store["offsets"].diff().tolist())
    columns = ids, store["is_positive"], store["required"], store["start"]
    return sorted([x.tolist() for x in row] for row in zip(*columns))


def test_own_pairs_start_here(stage, tiny, tmp_path, capsys):
    """A toxic text and its clean version a line, as README says; no scores, ids are numbers."""
    rows = []
    for i in range(10):
        line = mined_line(i)
        toxic, clean = line["negatives"][0]["text"], line["text"]
        sets = {"positives": [{"text": clean}], "negatives": [{"text": toxic}]}
        rows.append({"id": i, "text": toxic} | sets)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    run = ["--run", tmp_path]
    assert stage("02", *run, "--mined", pairs, "--model", tiny) == 0
    store = load_file(tmp_path / "prototypes.safetensors")
    texts = [[row["text"], row["positives"][0]["text"]] for row in rows]
    table = tmp_path / "pairs.tsv"
    table.write_text("\r\n".join("\t".join([*x, ""]) for x in texts), "utf-8-sig")
    out = ["--out", tmp_path / "tsv.safetensors"]
    assert stage("02", *run, "--mined", table, "--model", tiny, *out) == 0
    other = load_file(out[1])
    assert sequences(other) == sequences(store)
    for content in (b"one\ttwo\n\n", b"one\ttwo\n\xff\tthree\n"):
        table.write_bytes(content)
        status = stage("02", *run, "--mined", table, "--model", tiny)
        refused(capsys, status, "pairs.tsv:2")
    assert torch.bincount(store["context"]).tolist() == [10, 0, 10]
    assert torch.bincount(store["anchor"]).tolist() == [2] * 20
    assert stage("03", *run, "--steps", 2, "--anchors", 2) == 0
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def test_a_texts_lines_are_held_out_together(stage, tiny, tmp_path):
    rows = [
        f"The dumb fool {i % 5} left.\tThe man {i % 5} left {i}." for i in range(20)
    ]
    spaced = "\n".join(row.replace("\t", " \t ") for row in rows)
    stores = []
    for name, text in (("plain", "\n".join(rows)), ("spaced", spaced)):
        pairs = tmp_path / f"{name}.tsv"
        pairs.write_text(text)
        given = ["--run", tmp_path, "--mined", pairs, "--model", tiny]
        assert stage("02", *given, "--validation", 0.3) == 0
        stores.append(load_file(tmp_path / "prototypes.safetensors"))
    assert sequences(stores[0]) == sequences(stores[1])
    store = stores[0]
    assert len(store["seed"].unique()) == 5
    held = store["seed"][store["held_out"]].unique()
    assert len(held) == 2 and torch.equal(
        torch.isin(store["seed"], held), store["held_out"]
    )


def test_a_text_beyond_a_models_positions_ends_with_a_line(tiny, tmp_path):
    config = GPT2Config(
        vocab_size=49152, n_embd=32, n_layer=1, n_head=2, n_positions=32
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.tsv").write_text(f"{'dumb ' * 40}\t{'kind ' * 40}")
    script, given = ROOT / "02_build_prototypes.py", ["--mined", "pairs.tsv"]
    task = [sys.executable, script, *given, "--model", "model", "--run", "."]
    done = subprocess.run(task, cwd=tmp_path, capture_output=True, text=True)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "shorter" in errors[0]


def test_parts_are_read_together_in_any_order(stage, tiny, tmp_path, capsys):
    rows, stores = [mined_line(i) for i in range(6)], []
    parts = [write_jsonl(tmp_path / f"mined-{i}.jsonl", rows[i::2]) for i in (0, 1)]
    for k, given in enumerate(([], ["--mined", *parts[::-1]])):
        out = tmp_path / f"{k}.safetensors"
        assert (
            stage("02", "--run", tmp_path, "--model", tiny, "--out", out, *given)
            == 0
        )
        stores.append(load_file(out))
    assert all(torch.equal(stores[0][k], stores[1][k]) for k in stores[0])
    one, other = (tmp_path / f"{k}.safetensors" for k in (0, 1))
    data = one.read_bytes()
    assert data == other.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = list(header["__metadata__"])
    assert names == sorted(names) and len(names) > 8
    capsys.readouterr()
    twice = stage(
        "02", "--run", tmp_path, "--model", tiny, "--mined", parts[0], parts[0]
    )
    refused(capsys, twice, "more than once")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["run 01_mine_negatives.py first"]),
        ("", ["empty"]),
        (json.dumps(mined_line(0)) + "\n{torn", ["mined.jsonl:2"]),
        ('{"id": "a", "text": "b"}', ["mined.jsonl:1", "positives"]),
        (json.dumps(mined_line(0) | {"text": 3}), ["mined.jsonl:1", "text"]),
        (
            json.dumps(mined_line(0) | {"text": "a\nb"}),
            ["mined.jsonl:1", "pattern"],
        ),
        (
            json.dumps(mined_line(0)).replace("on foot", "on\\nfoot"),
            ["mined.jsonl:1", "pattern"],
        ),
        (json.dumps(mined_line(0) | {"text": "\ud800"}), ["mined.jsonl:1"]),
        (
            json.dumps(mined_line(0)).replace("0.8", "NaN"),
            ["mined.jsonl:1", "finite"],
        ),
        (json.dumps(mined_line(0)).replace("lake", "\0\xff"), ["mined.jsonl:1"]),
        (json.dumps(mined_line(0) | {"negatives": []}), ["no anchor has both"]),
        (json.dumps(mined_line(0) | {"positives": []}), ["no anchor has both"]),
        (2 * (json.dumps(mined_line(0)) + "\n"), ["more than once"]),
    ],
)
def test_prototypes_refuse_bad_input(stage, tiny, tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "mined.jsonl").write_text(content, encoding="latin-1")
    refused(capsys, stage("02", "--run", tmp_path, "--model", tiny), *words)
    assert not (tmp_path / "prototypes.safetensors").exists()


def test_refuses_bad_options(stage, trained, tiny, tmp_path, capsys):
    refused(capsys, stage("02", "--run", trained, "--negatives", 0), "--negatives")
    refused(capsys, stage("02", "--run", trained, "--prompt", "Say it:"), "{}")
    refused(
        capsys, stage("02", "--run", trained, "--model", tmp_path), str(tmp_path)
    )
    bad = [("--close", "nan"), ("--validation", -0.1), ("--toxic-contexts", 0)]
    for name, value in [*bad, ("--out", "notes.txt"), ("--device", "cuda:9")]:
        refused(capsys, stage("02", "--run", trained, f"{name}={value}"), name)
    (tmp_path / "a.safetensors").mkdir()
    command = [sys.executable, ROOT / "02_build_prototypes.py", "--run", trained]
    command += ["--model", tiny, "--out", tmp_path / "a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_make_refuses_a_run_with_a_space():
    given = ["make", "-n", "all", "RUN=runs/my run"]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no spaces" in done.stderr


def test_other_braces_of_a_prompt_are_text(stage, tiny, tmp_path):
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(i) for i in range(2)])
    prompt = ["--prompt", '{"say": {}} {0}:']
    assert stage("02", "--run", tmp_path, "--model", tiny, *prompt) == 0


def test_a_tokenizer_larger_than_its_model_is_refused(
    stage, tiny, tmp_path, capsys
):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "mined.jsonl", [mined_line(0)])
    given = ["--run", tmp_path, "--model", tmp_path / "model"]
    refused(capsys, stage("02", *given), "fewer tokens than its tokenizer")


def test_a_tokenizer_without_bos_and_eos_is_refused(
    stage, trained, tiny, tmp_path, capsys
):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    given = ["--mined", trained / "mined.jsonl", "--model", tmp_path / "model"]
    refused(capsys, stage("02", "--run", tmp_path, *given), "model", "NoneType")


# 03


def test_training_lowers_the_loss_and_plain_peft_loads_it(trained, tiny):
    rows = lines(trained / "adapter.training/metrics.jsonl")
    train = [r for r in rows if r["split"] == "train"]
    held_out = [r for r in rows if r["split"] == "validation"]
    assert [r["step"] for r in train] == list(range(1, 7))
    assert [r["step"] for r in held_out] == [0, 3, 6]
    objective = {"loss", "phi_pos", "phi_neg", "gap", "cp", "drift"}
    assert objective | {"grad_norm", "tokens_per_second", "memory_gb"} <= set(
        train[0]
    )
    assert held_out[2]["loss"] < held_out[0]["loss"]
    names = {p.name for p in (trained / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert "state.pt" not in names
    base, ids = AutoModelForCausalLM.from_pretrained(tiny), [torch.arange(5, 20)]
    with torch.no_grad():
        before = model_nll(base, ids)
        model = PeftModel.from_pretrained(base, trained / "adapter")
        assert not torch.allclose(model_nll(model, ids), before, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model_nll(model, ids), before)


def test_paper_preset_and_its_overrides(stage):
    args = stage.options("03", "--preset", "paper", "--phi", "nll")
    assert (args.distance, args.prototype, args.hold) == ("absolute", "batch", 0.0)
    assert (args.lr, args.context, args.phi, args.steps) == (
        2.2e-5,
        ["none"],
        "nll",
        0,
    )
    args = stage.options("03", "--preset", "paper")
    assert (args.phi, args.alpha, args.utility) == ("perplexity", 1.0, 0.0)
    assert (args.anchors, args.positives, args.negatives) == (6, 3, 5)


def test_no_steps_are_one_epoch(stage, trained, tmp_path):
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    given = ["--run", tmp_path, "--preset", "paper", "--anchors", 5]
    assert stage("03", *given) == 0  # of ten bare anchors
    rows = lines(tmp_path / "adapter.training/metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 2]


def test_training_refuses(stage, trained, tmp_path, capsys):
    refused(
        capsys, stage("03", "--run", tmp_path), "run 02_build_prototypes.py first"
    )
    refused(capsys, stage("03", "--preset", "best"), "--preset", "paper")
    bad = [("--positives", 0), ("--alpha", "nan"), ("--hold", -1), ("--lr", "inf")]
    for name, value in [*bad, ("--tau", 0), ("--steps", -1), ("--utility", "much")]:
        refused(capsys, stage("03", "--run", trained, f"{name}={value}"), name)
    path = tmp_path / "prototypes.safetensors"
    store, meta = load_file(trained / path.name), metadata(trained / path.name)
    save_file(store, path, meta | {"format": "cp-prototypes-0"})
    refused(capsys, stage("03", "--run", tmp_path), "cp-prototypes-2", "run 02")
    save_file(store, path, meta | {"model_sha256": "0"})
    refused(capsys, stage("03", "--run", tmp_path), "other weights")
    for name, x in store.items():
        spoilt = x.clone()
        spoilt[0] = ~x[0] if x.dtype == torch.bool else x[0] + 1
        for other in (x[:-1], spoilt):
            save_file(store | {name: other}, path, meta)
            refused(capsys, stage("03", "--run", tmp_path), "damaged", "run 02")
    store["held_out"] = torch.zeros(60, dtype=torch.bool)
    save_file(store, path, meta | {"tensors": fingerprint(store.items())})
    refused(capsys, stage("03", "--run", tmp_path), "0 to validate")
    path.write_bytes(b"torn")
    refused(capsys, stage("03", "--run", tmp_path), "not a safetensors file")
    assert not (tmp_path / "adapter").exists()


def test_training_stops_on_a_loss_that_is_not_finite(
    stage, trained, tmp_path, capsys
):
    save_file(
        load_file(trained / "prototypes.safetensors"),
        tmp_path / "prototypes.safetensors",
        metadata(trained / "prototypes.safetensors"),
    )
    wild = ["--steps", 9, "--anchors", 2, "--lr", 1e30, "--every", 100]
    refused(capsys, stage("03", "--run", tmp_path, *wild), "loss is", "--lr")
    names = {p.name for p in (tmp_path / "adapter.training").iterdir()}
    assert names == {"run.json"}  # no spoilt state
    assert not (tmp_path / "adapter").exists()


# all four, on the default model


def run_script(script: str, *options) -> str:
    command = [sys.executable, ROOT / script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_end_to_end_on_the_default_model(tmp_path):
    run = ["--run", tmp_path]
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    run_script(
        "01_mine_negatives.py", *run, "--rude", 12, "--rounds", 2, "--seeds", seeds
    )
    mined = lines(tmp_path / "mined.jsonl")
    assert sum(bool(x["positives"] and x["negatives"]) for x in mined) >= 2
    negatives = [n for x in mined for n in x["negatives"]]
    assert all(n["toxicity"] >= 0.5 and n["similarity"] >= 0.5 for n in negatives)
    run_script("02_build_prototypes.py", *run, "--validation", 0.3)
    run_script("03_train_cp.py", *run, "--steps", 2, "--anchors", 2)
    small = ["--limit", 4, "--items", 3, "--k", 2, "--tasks", "piqa", "wiki"]
    run_script("04_evaluate.py", *run, *small)
    figures = json.loads((tmp_path / "report/report.json").read_text())["figures"]
    figure = figures["rewrite/unsafe@tox-block"]["base"]
    assert figure["n"] == 4 and figure["low"] <= figure["value"] <= figure["high"]
    assert 4 < figures["wiki/nll_word"]["base"]["value"] < 8
    assert figures["wiki/nll_word"]["base"]["n"] == 3
    assert 0 <= figures["piqa/acc"]["base"]["value"] <= 1
    for row in lines(tmp_path / "report/generations.jsonl"):
        assert {"toxicity@profanity-check", "toxicity@tox-block", "failure"} <= set(
            row
        )
    assert (tmp_path / "report/rewrites.png").stat().st_size > 5000
    text = (tmp_path / "report/report.md").read_text()
    for word in ("tuned after base", "deleted", "prompted", "toxic words cut"):
        assert word in text
