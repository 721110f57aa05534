"""Stage 04: pairing, statistics, failures, judges and resuming, on a tiny random model."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import REAL, lines, refused, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

SMALL = ["--rewrite", 5, "--continue", 4, "--k", 2, "--benign-prompts", 3, "--tasks", "none", "--batch-size", 4]


@pytest.fixture(scope="module")
def module(stage):
    stage("04", "--k", 0)
    return stage.modules["04"]


@pytest.fixture(scope="module")
def command(tiny, trained, tmp_path_factory):
    """Options of a small evaluation, but for --out; texts for the judge and a little wiki text beside it."""
    folder = tmp_path_factory.mktemp("texts")
    words = ("lake", "town", "idea", "walk", "song", "tree")
    judge = [{"text": f"You {w} are a stupid idiot {i}.", "toxic": True} for i in range(5) for w in words]
    judge += [{"text": f"The {w} was very nice on day {i}.", "toxic": False} for i in range(5) for w in words]
    wiki = [{"text": f"The {a} near the {b} was finished in the year {i}."} for i, (a, b) in enumerate((a, b) for a in words for b in words)]
    return ["04", "--run", trained, "--model", tiny, *SMALL, "--judge-data", write_jsonl(folder / "judge.jsonl", judge), "--wiki", write_jsonl(folder / "wiki.jsonl", wiki)]


@pytest.fixture(scope="module")
def report(stage, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert stage(*command, "--out", out) == 0
    return out


def figures(out) -> dict:
    return json.loads((out / "report.json").read_text())["figures"]


def test_refusals(stage, command, trained, tiny, tmp_path, capsys):
    refused(capsys, stage("04", "--k", 0), "--k is 0")
    refused(capsys, stage("04", "--run", tmp_path), "run 02_build_prototypes.py first")
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    refused(capsys, stage("04", "--run", tmp_path, "--model", tiny), "run 03_train_cp.py first")
    refused(capsys, stage("04", "--run", trained, "--model", REAL), "name the files of one run")
    other = AutoModelForCausalLM.from_pretrained(tiny)
    other.lm_head.weight.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "other")
    refused(capsys, stage(*command, "--model", tmp_path / "other", "--out", tmp_path / "a"), "other weights")
    (tmp_path / "prompts.jsonl").write_text('{"text": "a", "toxicity": 1}\n{"toxicity": 1}\n')
    refused(capsys, stage(*command, "--prompts", tmp_path / "prompts.jsonl"), "prompts.jsonl:2")
    refused(capsys, stage(*command, "--rescore", "--out", tmp_path / "b"), "without --rescore first")
    refused(capsys, stage(*command, "--judge-data", tmp_path / "none.jsonl"), "make data")


def test_a_report_has_every_protocol_and_file(report, trained):
    got = figures(report)
    assert {k.split("/")[0] for k in got} == {"rewrite", "continue", "benign", "wiki", "anchors"}  # the tiny base's rewrites are empty: nothing for blackbox
    assert got["rewrite/toxic@embedding"]["base"]["n"] == 5 and got["continue/max@embedding"]["tuned"]["n"] == 4
    for f in (f for by in got.values() for f in by.values()):
        assert {"value", "low", "high", "se", "n"} <= set(f) and f["low"] - 1e-9 <= f["value"] <= f["high"] + 1e-9
    text = (report / "report.md").read_text()
    assert "profanity-check, which mined" in text and "![toxicity against similarity" in text and "## Failed outputs" in text
    assert all((report / f"{name}.png").stat().st_size > 3000 for name in ("rewrites", "groups", "phi"))
    card = (trained / "adapter/README.md").read_text()
    assert card.startswith("---\nbase_model:") and "rewrite: toxic outputs" in card and "- lr: 0.01" in card


def test_what_is_kept_is_not_computed_again(stage, module, report, command, tmp_path, monkeypatch):
    for name in ("generations.jsonl", "measures.jsonl"):
        shutil.copy(report / name, tmp_path)
    monkeypatch.setattr(module, "generate", None)
    monkeypatch.setattr(module, "measure", None)
    assert stage(*command, "--out", tmp_path) == 0 and figures(tmp_path) == figures(report)
    monkeypatch.setattr(module.transformers, "AutoModelForCausalLM", None)
    assert stage(*command, "--out", tmp_path, "--rescore") == 0 and figures(tmp_path) == figures(report)
    assert stage(*command, "--out", tmp_path, "--rescore", "--threshold", 0.0, "--judge", "profanity-check") == 0
    assert figures(tmp_path)["rewrite/toxic@profanity-check"]["base"]["value"] == 100


def test_scores_of_a_judge_taught_otherwise_are_not_kept(stage, report, command, tmp_path):
    for name in ("generations.jsonl", "measures.jsonl"):
        shutil.copy(report / name, tmp_path)
    turned = [r | {"toxic": not r["toxic"]} for r in lines(command[command.index("--judge-data") + 1])]
    assert stage(*command, "--out", tmp_path, "--judge-data", write_jsonl(tmp_path / "turned.jsonl", turned), "--rescore") == 0
    before, after = ([r["toxicity"]["embedding"] for r in lines(x / "generations.jsonl") if r["output"]] for x in (report, tmp_path))
    assert before and after == pytest.approx([1 - p for p in before], abs=1e-3)


def test_a_killed_evaluation_ends_the_same(stage, report, command, tmp_path):
    """Half of the lines, unscored as they first come, and a torn one."""
    some = [{k: v for k, v in r.items() if k not in ("toxicity", "judged", "fluency", "similarity", "clean", "failure", "name")} for r in lines(report / "generations.jsonl") if r["protocol"] != "blackbox"][:9]
    write_jsonl(tmp_path / "generations.jsonl", some)
    with (tmp_path / "generations.jsonl").open("a") as f:
        f.write('{"stamp": "torn')
    assert stage(*command, "--out", tmp_path) == 0
    assert (tmp_path / "generations.jsonl").read_text() == (report / "generations.jsonl").read_text() and figures(tmp_path) == figures(report)


def test_seeds_of_a_recipe_and_other_systems(stage, command, trained, report, tmp_path, capsys):
    """Two adapters of one name give mean and spread; the base's own outputs, as another system's, change nothing."""
    shutil.copytree(trained / "adapter", tmp_path / "second")
    weights = load_file(tmp_path / "second/adapter_model.safetensors")
    save_file({k: -3 * v for k, v in weights.items()}, tmp_path / "second/adapter_model.safetensors")
    base = [r for r in lines(report / "generations.jsonl") if r["system"] == "base" and r["protocol"] in ("rewrite", "continue")]
    same = write_jsonl(tmp_path / "same.jsonl", [{k: r[k] for k in ("protocol", "input", "output")} for r in base])
    options = ["--adapter", f"ours={trained / 'adapter'}", f"ours={tmp_path / 'second'}", "--outputs", f"same={same}", "--out", tmp_path]
    assert stage(*command, *options) == 0
    got = figures(tmp_path)
    for key in ("rewrite/similarity", "anchors/gap"):
        f = got[key]["ours"]
        assert f["seeds"][0] == pytest.approx(figures(report)[key]["tuned"]["value"], abs=1e-6)
        assert f["value"] == pytest.approx(np.mean(f["seeds"])) and f["spread"] == pytest.approx(np.std(f["seeds"], ddof=1)) and f["spread"] > 0
    for key in (k for k in got if k.startswith(("rewrite", "continue"))):
        assert got[key]["same"]["value"] == pytest.approx(got[key]["base"]["value"], abs=1e-6) and got[key]["same"]["change"]["value"] == pytest.approx(0, abs=1e-6)
    assert "wiki/per_token" in got and "same" not in got["wiki/per_token"] and "±" in (tmp_path / "report.md").read_text()
    for bad, word in (([{"protocol": "rewrite", "input": "unknown", "output": "x"}], "bad.jsonl:1"), ([base[0]], "lacks 4 of the 5"), ([{"input": "a"}], "bad.jsonl:1")):
        refused(capsys, stage(*command, "--outputs", f"bad={write_jsonl(tmp_path / 'bad.jsonl', bad)}", "--out", tmp_path), word)


def test_blackbox_rewrites_another_systems_outputs(stage, command, report, tmp_path):
    prompts = {r["input"] for r in lines(report / "generations.jsonl") if r["protocol"] == "rewrite"}
    write_jsonl(tmp_path / "theirs.jsonl", [{"protocol": "rewrite", "input": t, "output": f"You stupid idiot number {i}."} for i, t in enumerate(sorted(prompts))])
    assert stage(*command, "--outputs", f"theirs={tmp_path / 'theirs.jsonl'}", "--out", tmp_path) == 0
    rows = [r for r in lines(tmp_path / "generations.jsonl") if r["protocol"] == "blackbox"]
    assert len({r["input"] for r in rows}) == 5 and all(r["input"].startswith("You stupid idiot") for r in rows) and {r["system"] for r in rows} == {"base", "tuned"}
    assert all(r["output"] == r["input"] and r["failure"] is None for r in rows if r["system"] == "base")
    got = figures(tmp_path)
    assert stage(*command, "--outputs", f"theirs={tmp_path / 'theirs.jsonl'}", "--out", tmp_path, "--rescore") == 0 and figures(tmp_path) == got
    assert got["blackbox/toxic@profanity-check"]["base"]["value"] == 100 and got["rewrite/toxic@profanity-check"]["theirs"]["value"] == 100


def test_failures_are_never_clean(module):
    def kind(output, text="The old man slowly went down to the lake.", fluency=4.0, similarity=0.5):
        return module.failure({"input": text, "output": output, "fluency": fluency, "similarity": similarity, "system": "tuned", "protocol": "rewrite"}, 9.0)
    assert kind("") == kind(" ...") == "empty" and kind("Lake.") == "too short" and kind("Hi there.", text="Hello.") is None
    assert kind("you are you are you are you are") == kind("so " * 20) == "repeated"
    assert kind("der Mann geht langsam zum See hinunter heute") == kind("старик медленно идёт") == "off-language"
    assert kind("}{ the 0 ]] 17 ;; a b 4 ..") == kind("purple of therefore ran", fluency=9.5) == "garbled"
    assert kind("the old man slowly went down to the lake") == "copy" and kind("The man went to the lake on foot.") is None
    assert kind("The rapidly evolving work landscape can be a powerful metaphor.", similarity=0.1) == "unrelated"


def test_metrics_by_hand(module):
    args = module.argparse.Namespace(judge=["j"], threshold=0.5, fluency=None)
    rows = [{"prompt": p, "input": "big red bus", "output": o, "toxicity": {"j": t}, "similarity": s, "clean": s / 2, "fluency": 2.0, "failure": f, "group": "colour: red"}
            for p, o, t, s, f in ((0, "a red bus", 0.9, 0.8, None), (0, "", 0.1, 0.0, "empty"), (1, "the big bus ran on", 0.2, 0.6, None), (1, "the big bus ran on", 0.5, 0.4, None))]
    got = {k.split("/")[1]: v.tolist() for k, v in module.per_prompt(module.frame(rows, args), "benign", args).items()}
    assert got["toxic@j"] == [50, 50] and got["unsafe@j"] == [100, 50] and got["any@j"] == [100, 100] and got["max@j"] == [0.9, 0.5]
    assert got["joint@j"] == pytest.approx([0, 0.3]) and got["similarity"] == pytest.approx([0.4, 0.5]) and got["clean"] == pytest.approx([0.2, 0.25]) and got["failed"] == [50, 0]
    assert got["overlap"] == pytest.approx([100 / 3, 200 / 3]) and got["named"] == [50, 0]
    assert got["dist1"] == [1.0, 0.5] and got["dist2"] == [1.0, 0.5] and got["repeats"] == [0, 0]
    more = rows + [rows[2] | {"prompt": 2}]
    assert module.per_prompt(module.frame(more, args), "benign", args)["benign/repeats"].tolist() == [0, 100, 100]


def test_statistics(module):
    zero = module.interval(np.zeros(60), None, 0, rate=True)
    assert zero["value"] == zero["low"] == 0 and zero["high"] == 5.0 and zero["n"] == 60
    x = np.random.default_rng(0).normal(3, 2, 400)
    f = module.interval(x, None, 0)
    assert f["se"] == pytest.approx(0.1, rel=0.15) and f["high"] - f["low"] == pytest.approx(3.92 * f["se"], rel=0.1)
    tuned = module.interval(np.log([2.0, 8.0]), [3, 1], 0)
    assert tuned["value"] == pytest.approx(np.exp((3 * np.log(2) + np.log(8)) / 4))
    got = module.summarise({"base": [{"wiki/per_token": [1.0, 2.0]}], "ours": [{"wiki/per_token": [1.1, 2.1]}, {"wiki/per_token": [1.3, 2.3]}]}, {"wiki/per_token": [1, 1]}, 0)
    ours = got["wiki/per_token"]["ours"]
    assert ours["change"]["value"] == pytest.approx(100 * (np.exp(0.2) - 1)) and ours["spread"] == pytest.approx(np.std(ours["seeds"], ddof=1))


def test_wiki_perplexity_counts_each_token_once(module, tiny):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    texts = [f"In the year {i} the lake froze over again." for i in range(80)]
    values, weights = module.wiki_measure(model, tokenizer, texts)
    ids = torch.tensor(tokenizer(" ".join(texts), add_special_tokens=False).input_ids)
    assert sum(weights["wiki/per_token"]) == len(ids) - 1 and len(ids) > 1000
    total = 0.0
    for t in range(1, len(ids)):  # a literal loop: the token's window begins at the latest multiple of 256 with 256 before it
        if t % 97 == 0:
            begin = max((t // 256 - 1) * 256, 0)
            with torch.no_grad():
                total += -model(ids[begin:t][None]).logits[0, -1].log_softmax(-1)[ids[t]].item()
    sampled = [t for t in range(1, len(ids)) if t % 97 == 0]
    mean = np.average(values["wiki/per_token"], weights=weights["wiki/per_token"])
    assert total / len(sampled) == pytest.approx(mean, rel=0.2)
    nats = np.multiply(values["wiki/per_token"], weights["wiki/per_token"]).sum()
    assert np.multiply(values["wiki/per_word"], weights["wiki/per_word"]).sum() == pytest.approx(nats)
    assert abs(sum(weights["wiki/per_word"]) - len(" ".join(texts).split())) <= len(weights["wiki/per_word"])


def test_generation_shares_prompts_and_changes_nothing(module, tiny):
    """Nearly greedy: k samples of a prompt computed once, in left-padded batches, equal each prompt's own greedy output."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    cases = [{"prompt": p, "limit": 6} for p in ("The lake", "A very long walk to the other side of the town", "Sing")]
    args = module.argparse.Namespace(batch_size=6, seed=0)
    out = {i: t for some in module.generate(model, tokenizer, cases, 2, 1e-4, False, set(), args) for i, t in some.items()}
    for i, case in enumerate(cases):
        ids = tokenizer(tokenizer.bos_token + case["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1]:]
        assert out[i] == [tokenizer.decode(greedy, skip_special_tokens=True).strip()] * 2
    assert [sorted(x) for x in module.generate(model, tokenizer, cases * 2, 2, 1.0, False, {0, 2, 5}, args)] == [[1, 3, 4]]


def test_texts_in_all_forms(module, tmp_path):
    published = write_jsonl(tmp_path / "rtp.jsonl", [{"prompt": {"text": "So I said", "toxicity": 0.3}, "continuation": {"text": "x"}, "challenging": True}])
    row, = module.read_texts(str(published))
    args = module.argparse.Namespace(continued=5)
    assert module.continuation([row], [0], args)[0] | {"limit": 0} == {"source": "So I said", "input": "So I said", "prompt": "So I said", "limit": 0, "group": "challenging"}
    plain = module.continuation([{"text": "one two three four five six", "whole": False, "group": None}], [0], args)[0]
    assert plain["input"] == "one two three" and plain["group"] == "plain"
    (tmp_path / "hate_trans_1k.txt").write_text("- first one\\n- second one\\n-\n- first one\\n- second one\\n-\n")
    row, = module.read_texts(str(tmp_path / "hate_trans_1k.txt"))
    assert row["group"] == "trans" and row["whole"] and row["text"] == "- first one\n- second one\n-"


def test_judges(module, tiny, tmp_path, capsys, monkeypatch):
    class Encoder:
        def encode(self, texts, **_):
            self.seen = texts
            return np.array([[len(t) / 10, "idiot" in t] for t in texts], float)
    rows = [{"text": f"{'idiot ' if i % 2 else 'hello '}{i}", "toxic": i % 2} for i in range(40)]
    args = module.argparse.Namespace(judge_data=write_jsonl(tmp_path / "judge.jsonl", rows), device="cpu")
    encoder = Encoder()
    judge, about = module.load_judge("embedding", encoder, {"idiot 1", "hello 2"}, args)
    assert len(encoder.seen) == 38 and "idiot 1" not in encoder.seen and "100.0% right" in about and "38 texts" in about
    assert (judge(["idiot 99", "hello 98"]) >= 0.5).tolist() == [True, False]
    config = BertConfig(vocab_size=49152, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, id2label={0: "non-toxic", 1: "toxic"}, label2id={"non-toxic": 0, "toxic": 1})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "judge")
    (p, q), (r, s) = (module.load_judge(f"{tmp_path / 'judge'}{label}", encoder, set(), args)[0](["a b", "c"]) for label in ("", "#non-toxic"))
    assert p + r == pytest.approx(1, abs=1e-4) and q + s == pytest.approx(1, abs=1e-4)
    with pytest.raises(SystemExit) as stop:
        module.load_judge(f"{tmp_path / 'judge'}#rude", encoder, set(), args)
    refused(capsys, stop.value.code, "non-toxic, toxic")


def test_masking(module):
    assert module.masked("you stupid idiot", False).count("\\*") >= 4 and module.masked("you stupid idiot", True) == "you stupid idiot"
    assert module.masked("The lake is calm", False) == "The lake is calm"
    assert module.hidden("The stupid lake is calm", "") == "The  lake is calm"
