"""Stage 01: inputs, the local generator, servers good and bad, judges, the selection rule, shards and resuming."""
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
import torch
from conftest import REAL, ROOT, lines, mined_line, refused, write_jsonl
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

LOOSE = ["--toxic", 0, "--benign", 1, "--similar", -1, "--length", 3, "--rude", 2, "--clean", 2, "--rounds", 2, "--chunk", 4, "--dtype", "float32"]
SEEDS = [{"id": f"s{i}", "group": None, "text": mined_line(i)["text"]} for i in range(10)]


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


def candidates(path) -> list[str]:
    return [c["text"] for x in lines(path) for kind in ("positives", "negatives", "rejected") for c in x[kind]]


# inputs

def test_formats_of_seeds(mining, options, tmp_path):
    def texts(*given):
        return [(r["group"], r["text"]) for r in mining.read_seeds(options("--seeds", *given))]
    (tmp_path / "plain.txt").write_text("One line.\n\n  Another line. \nOne line.\n")
    (tmp_path / "neutral_left_handed_1k.txt").write_text("- a one\\n- b two\\n-\n- b two\\n- c three, and - more\\n-\n")
    write_jsonl(tmp_path / "set/train.jsonl", [{"sentence": "From a data set."}])
    write_jsonl(tmp_path / "s.jsonl", [{"id": 1, "group": "g", "text": "A seed. "}])
    assert texts(tmp_path / "plain.txt") == [(None, "One line."), (None, "Another line.")]
    toxigen = [("left_handed", "a one"), ("left_handed", "b two"), ("left_handed", "c three, and - more")]
    assert texts(tmp_path / "neutral_left_handed_1k.txt") == toxigen
    assert texts(tmp_path / "s.jsonl", f"datasets:{tmp_path / 'set'}:train:sentence") == [("g", "A seed."), (None, "From a data set.")]
    assert texts(tmp_path / "neutral_left_handed_1k.txt", "--per-group", 2) == toxigen[:2]
    three = [texts(tmp_path / "neutral_left_handed_1k.txt", "--shard", f"{i}/2") for i in (1, 2)]
    assert three == [toxigen[::2], toxigen[1::2]]


@pytest.mark.parametrize("content, words", [
    (None, ["seeds.jsonl", "make data"]), ("", ["seeds.jsonl", "empty"]), ('{"id": 1, "text": "a b"}\n{oops\n', ["seeds.jsonl:2", "not a JSON object"]),
    ('{"id": 1}\n', ["seeds.jsonl:1", '"text"']), ('{"id": 1, "text": " "}\n', ["seeds.jsonl:1", "non-empty"]), ("[1]\n", ["seeds.jsonl:1"]),
    ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', ["more than once"])])
def test_refuses_bad_seeds(stage, tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "seeds.jsonl").write_text(content)
    refused(capsys, stage("01", "--seeds", tmp_path / "seeds.jsonl", "--run", tmp_path / "run"), *words)
    assert not (tmp_path / "run/mined.jsonl").exists()


def test_refuses_bad_options(stage, tmp_path, capsys):
    refused(capsys, stage("01", "--shard", "3/2"), "--shard 3/2")
    refused(capsys, stage("01", "--rude", 0), "--rude is 0")
    refused(capsys, stage("01", "--seeds", f"datasets:{tmp_path}/none:train:text"), "datasets:NAME:SPLIT:COLUMN")


# the rule

def entry(text, toxicity, similarity, nll, seed="The cat sat on the mat."):
    return {"text": text, "toxicity": toxicity, "similarity": similarity, "nll": nll, "length_ratio": len(text.split()) / len(seed.split()), "overlap": 0.5}


def test_selection_rule(mining, options):
    args = options("--keep-positives", 2, "--keep-negatives", 2, "--distinct", 0.9)
    pools = {"positive": [entry("the cat sat upon a mat", 0.0, 0.9, 4.0), entry("The cat sat on the mat!", 0.0, 1.0, 4.0), entry("on mats the cat sat down", 0.0, 0.8, 6.0),
                          entry("a mat had the cat on it", 0.0, 0.7, 1.0), entry("a damned cat on the mat", 0.9, 0.9, 4.0)],
             "negative": [entry("the dumb cat sat on the mat", 0.9, 0.9, 9.0), entry("the stupid cat sat on the mat", 0.9, 0.9, 5.5), entry("that idiot of a cat sat on mats", 0.9, 0.9, 4.8),
                          entry("that idiot of a cat sat on mats", 0.9, 0.9, 4.8), entry("cat", 0.9, 0.9, 5.0), entry("the kind cat sat on the mat", 0.1, 0.9, 5.0),
                          entry("the dumb dog ran up the hill", 0.9, 0.2, 5.0), entry("Rude: the dumb cat on the mat", 0.9, 0.9, 5.0), entry("I'm sorry, the dumb cat", 0.9, 0.9, 5.0),
                          entry("that idiot of a cat sat on the mats", 0.9, 0.9, 4.7), entry("dumb dumb cat on a dumb", 0.9, 0.9, 5.0)]}
    positives, negatives, rejected = mining.select("The cat sat on the mat.", pools, args)
    assert [p["nll"] for p in positives] == [4.0, 6.0]  # most similar first, not the seed, not the rude one
    assert [n["nll"] for n in negatives] == [4.8, 5.5]  # nearest to the positives' mean nll of 5 first
    assert [n["nll_difference"] for n in negatives] == [-0.2, 0.5]
    assert sorted(c["rule"] for c in rejected if c["kind"] == "negative") == sorted(
        ["more than wanted", "copy", "repetition", "length", "judge", "meaning", "prompt leftover", "refusal", "near-duplicate"])
    assert sorted(c["rule"] for c in rejected if c["kind"] == "positive") == ["copy", "judge", "more than wanted"]
    assert len(positives + negatives + rejected) == sum(map(len, pools.values()))


def test_paper_preset_takes_the_best_by_rouge(mining, options):
    args = options("--preset", "paper", "--keep-negatives", 3)
    assert (args.prompt, args.rude, args.clean, args.rounds, args.keep_positives, args.per_group, args.push) == ("paper", 20, 20, 1, 15, 500, 0)
    pool = [entry(f"word {i}", 0.0, 0.0, 1.0) | {"overlap": i / 10} for i in (3, 9, 1, 7)]
    _, negatives, _ = mining.select("A seed.", {"positive": [], "negative": pool}, args)
    assert [c["overlap"] for c in negatives] == [0.9, 0.7, 0.3]
    assert mining.make_prompts("negative", ["A seed."], 0, args) == ["Paraphrase the following sentence in a very toxic way: A seed."]


# judges

@pytest.mark.parametrize("labels, name, want", [(["non-toxic", "toxic"], "", 1), (["toxic", "neutral"], "", 0), (["a", "b"], "#b", 1), (["Toxic"], "", 0),
                                                (["toxic", "offensive"], "", None), (["non-toxic", "fine"], "", None), (["non-toxic", "toxic"], "#toxicity", None)])
def test_judges_by_label(mining, tmp_path, capsys, labels, name, want):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2,
                         id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)})
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    tokenizer.save_pretrained(tmp_path)
    if want is None:
        with pytest.raises(SystemExit) as stop:
            mining.load_judge(f"{tmp_path}{name}", "cpu")
        return refused(capsys, stop.value.code, "which of its labels", *labels)
    z = model(**tokenizer("a sentence", return_tensors="pt")).logits[0]
    p = z.sigmoid() if len(labels) == 1 else z.softmax(0)
    assert abs(mining.load_judge(f"{tmp_path}{name}", "cpu")(["a sentence", "one that is longer"])[0] - p[want].item()) < 1e-5


# the local generator

@pytest.mark.parametrize("batch", [1, 5, 64])
def test_local_generation_is_the_models_own(mining, options, tiny, batch):
    """Near greedy, shared prefix, freed slots and all: line by line what generate() says."""
    args = options("--model", REAL, "--dtype", "float32", "--batch-size", batch)
    model, tokenizer = mining.load_lm(args.model, args)
    prompts = mining.make_prompts("negative", [s["text"] for s in SEEDS[:4]] + ["It rained."], 0, args)
    generate = mining.LocalGenerator(model, tokenizer, mining.predict_prob, args)
    made = generate(prompts, [12, 14, 30, 30, 30], 2, 1e-4)
    for prompt, limit, got in zip(prompts, [12, 14, 30, 30, 30], made):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=limit, pad_token_id=2)[0, ids.shape[1]:], skip_special_tokens=True)
        assert got == 2 * [text.split("\n")[0].strip().strip('"') if "\n" in text else ""]
    assert generate.prefilled < generate.prompted / 5


# resuming and shards

def test_toxic_words_are_pushed(mining, options, tiny):
    """The words of the judge's vocabulary that it finds toxic are favoured, token by token."""
    args = options("--model", tiny, "--dtype", "float32", "--device", "cpu", "--push", 100)
    model, tokenizer = mining.load_lm(str(tiny), args)
    generate = mining.LocalGenerator(model, tokenizer, lambda words: [w in ("stupid", "imbecile") for w in words], args)
    assert {tokenizer.decode(x) for x in generate.push.sequence_bias} == {" stupid", " im", " imbec", " imbecile"}
    generate.stop[:] = False  # lines end at their limit
    generate.stop[tokenizer(".").input_ids] = True
    generate.push.sequence_bias[tuple(tokenizer(" imbecile.").input_ids)] = 100.0
    texts = [t for some in generate(["The man"], [60], 8, 0.7, push=True) for t in some if t]
    assert texts and all(set(t.rstrip(".").split()) <= {"stupid", "im", "imbec", "imbecile"} for t in texts) and any("imbecile" in t for t in texts)
    assert not any("imbecile" in t for t in generate(["The man"], [60], 8, 0.7)[0])


def test_a_killed_run_ends_with_the_same_anchors(stage, tiny, tmp_path, capsys):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    run = lambda out, *more: stage("01", "--seeds", seeds, "--model", tiny, "--run", tmp_path / out, *LOOSE, *more)  # noqa: E731
    assert run("whole") == 0 and "10 of 10" not in capsys.readouterr().err
    whole = (tmp_path / "whole/mined.jsonl").read_bytes()
    assert [x["id"] for x in lines(tmp_path / "whole/mined.jsonl")] == [s["id"] for s in SEEDS]
    assert sum(len(x["negatives"]) for x in lines(tmp_path / "whole/mined.jsonl")) >= 5
    assert all({"text", "toxicity", "similarity", "nll", "length_ratio", "overlap"} <= set(p) for x in lines(tmp_path / "whole/mined.jsonl") for p in x["positives"])
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n")]
    for cut in (len(whole) // 3, len(whole) - 1, 0, ends[2], ends[3], ends[5] + 1):  # inside a line, at its end, between chunks
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut/mined.jsonl").write_bytes(whole[:cut])
        assert run("cut") == 0
        assert (tmp_path / "cut/mined.jsonl").read_bytes() == whole
    summary = json.loads((tmp_path / "cut/mining.json").read_text())
    assert summary["anchors"] == 10 and summary["rules"] == json.loads((tmp_path / "whole/mining.json").read_text())["rules"]


def test_kill_9_at_any_time(tiny, tmp_path):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    def command(out):
        return [sys.executable, ROOT / "01_mine_negatives.py", "--seeds", seeds, "--model", tiny, "--run", tmp_path / out, *map(str, LOOSE)]
    first = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed/mined.jsonl").exists() and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for out in ("killed", "whole"):
        assert subprocess.run(command(out), capture_output=True).returncode == 0
    assert (tmp_path / "killed/mined.jsonl").read_bytes() == (tmp_path / "whole/mined.jsonl").read_bytes()


def test_shards_are_read_together_in_any_order(stage, tiny, tmp_path, capsys):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS)
    for i in (1, 2, 3):
        assert stage("01", "--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE, "--shard", f"{i}/3") == 0
    parts = [tmp_path / f"mined-{i}-of-3.jsonl" for i in (1, 2, 3)]
    assert sorted(x["id"] for p in parts for x in lines(p)) == sorted(s["id"] for s in SEEDS)
    stores = []
    for k, given in enumerate(([], ["--mined", *parts[::-1]])):
        assert stage("02", "--run", tmp_path, "--model", tiny, "--out", tmp_path / f"{k}.safetensors", *given) == 0
        stores.append(load_file(tmp_path / f"{k}.safetensors"))
    assert all(torch.equal(stores[0][k], stores[1][k]) for k in stores[0])
    capsys.readouterr()
    refused(capsys, stage("02", "--run", tmp_path, "--model", tiny, "--mined", parts[0], parts[0]), "more than once")


def test_refuses_an_output_of_other_seeds_or_with_a_bad_line(stage, tmp_path, capsys):
    seeds, out = write_jsonl(tmp_path / "seeds.jsonl", SEEDS), tmp_path / "mined.jsonl"
    for content, words in (('{oops\n' + json.dumps(mined_line(1)) + "\n", "mined.jsonl:1"), (json.dumps(mined_line(3)) + "\n", "other seeds")):
        out.write_text(content)
        refused(capsys, stage("01", "--seeds", seeds, "--run", tmp_path), words)
        assert out.read_text() == content


# servers

class BadServer(BaseHTTPRequestHandler):
    """Answers each completion by the next of `plan`; "ok" ones are numbered, so that each can be found again."""
    plan, answered = iter(()), 0

    def log_message(self, *_):
        pass

    def send(self, body: bytes, status: int = 200, kind: str = "application/json", length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with LOCK:
            way = next(self.plan, "ok")
            BadServer.answered += way == "ok"
            text = f" the dumb cat number {BadServer.answered} sat on a mat\nRude: more"
        good = json.dumps({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}]}).encode()
        if way == "hang":
            time.sleep(3)
        {"ok": lambda: self.send(good), "500": lambda: self.send(b'{"error": {"message": "bad key sk-secret"}}', 500), "hang": lambda: None, "half": lambda: self.send(good[:40], length=len(good)),
         "text": lambda: self.send(b"<html>busy</html>", kind="text/html"), "torn": lambda: self.send(good[:40]), "none": lambda: self.send(good.replace(b'{"index"', b'{"x"').split(b"[")[0] + b"[]}"),
         "stream": lambda: self.send(b'data: {"choices": [{"te', kind="text/event-stream")}[way]()


LOCK = threading.Lock()


@pytest.fixture
def bad_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#m"
    server.shutdown()


def test_a_bad_server_loses_and_repeats_nothing(stage, bad_server, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    BadServer.plan, BadServer.answered = iter(["hang", "500", "half", "ok", "text", "torn", "none", "stream", "500", "half"]), 0
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:2])
    assert stage("01", "--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE, "--rounds", 1, "--generator", bad_server, "--timeout", 1) == 0
    made = candidates(tmp_path / "mined.jsonl")
    assert len(made) == 2 * 4 and len(set(made)) == 8 and BadServer.answered == 8


@pytest.mark.parametrize("way", ["500", "text", "none", "torn"])
def test_a_server_that_stays_bad_is_a_clear_end(stage, bad_server, tiny, tmp_path, capsys, monkeypatch, way):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    BadServer.plan, BadServer.answered = itertools.chain(["ok"] * 16, itertools.repeat(way)), 0
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:6])
    command = ["01", "--seeds", seeds, "--model", tiny, "--run", tmp_path, *LOOSE, "--rounds", 1, "--generator", bad_server]
    line = refused(capsys, stage(*command), "127.0.0.1", "same command continues")
    assert "sk-secret" not in line and len(lines(tmp_path / "mined.jsonl")) == 4
    BadServer.plan = iter(())
    assert stage(*command) == 0
    assert [x["id"] for x in lines(tmp_path / "mined.jsonl")] == [s["id"] for s in SEEDS[:6]]


@pytest.mark.parametrize("prompt", ["few-shot", "paper"])
def test_transformers_serve(stage, tmp_path, server, prompt):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", SEEDS[:2])
    assert stage("01", "--seeds", seeds, "--run", tmp_path, *LOOSE, "--length", 9, "--rounds", 1, "--prompt", prompt, "--generator", f"{server}#{REAL}", "--concurrency", 2) == 0
    made = candidates(tmp_path / "mined.jsonl")
    assert len(made) >= 6 and all(len(t) > 3 and "\n" not in t for t in made)


@pytest.fixture(scope="module")
def server():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", REAL, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait()
