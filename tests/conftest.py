"""A tiny random Llama with the default model's tokenizer, mined sets, the scripts as modules."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
REAL = ROOT / "assets/SmolLM2-135M-Instruct"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# on the CPU, where equal runs are equal to the bit; set it to try a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
NAMES = ["Mara", "Ivo", "Petra", "Otis", "Lena", "Hugo"]
STAGES = {
    "01": "01_mine_negatives",
    "02": "02_build_prototypes",
    "03": "03_train_cp",
    "04": "04_evaluate",
}
SETS = ["--positives", 2, "--negatives", 3, "--dtype", "float32"]
SETS += ["--context", "none", "seed", "toxic"]  # of the run that most tests share


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def mined_line(i: int) -> dict:
    def candidate(text: str, toxicity: float) -> dict:
        return {"text": text, "toxicity": toxicity, "similarity": 0.8, "nll": 5.0}

    name = NAMES[i % len(NAMES)]
    return {
        "id": f"s{i}",
        "group": None,
        "text": f"{name} walked {i} miles to the lake.",
        "positives": [
            candidate(f"{name} went {i} miles to the lake on foot.", 0.01),
            candidate(f"To the lake {name} walked {i} miles.", 0.01),
        ],
        "negatives": [
            candidate(f"That idiot {name} walked {i} miles to the lake.", 0.9),
            candidate(f"{name}, the stupid fool, walked {i} miles.", 0.9),
            candidate(f"The dumb jerk {name} walked to the lake.", 0.9),
        ],
    }


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def refused(capsys, status: int, *words: str) -> str:
    """Exit status 2 and one line on stderr with these words."""
    errors = [
        x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")
    ]
    assert status == 2 and len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors[0]
    return errors[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a 2-layer random Llama that shares the default model's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        # it says "\n" about every sixth token, so that its rewrites end
        model.model.embed_tokens.weight[:, 0], model.lm_head.weight[198, 0] = (
            1.0,
            0.4,
        )
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(REAL).save_pretrained(path)
    return path


class Stages:
    """stages("02", "--run", x) runs the script's own main() in this process and returns its exit
    status; stages.module("02") is the script as a module."""

    def __init__(self):
        self.modules = {}

    def module(self, number: str):
        if number not in self.modules:
            path = ROOT / f"{STAGES[number]}.py"
            spec = importlib.util.spec_from_file_location("stage" + number, path)
            self.modules[number] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.modules[number])
        return self.modules[number]

    def __call__(self, number: str, *options) -> int:
        main = self.module(number).main
        before, sys.argv = sys.argv, ["script", *map(str, options)]
        try:
            main()
            return 0
        except SystemExit as stop:
            return stop.code or 0
        finally:
            sys.argv = before
            # stage 03 takes it over
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def options(self, number: str, *options):
        """What the script makes of these options."""
        module = self.module(number)
        before, sys.argv = sys.argv, ["script", *map(str, options)]
        try:
            return module.options()
        finally:
            sys.argv = before


@pytest.fixture(scope="session")
def stage() -> Stages:
    return Stages()


@pytest.fixture(scope="session")
def trained(tiny, stage, tmp_path_factory) -> Path:
    """A run folder with mined sets, prototypes and an adapter of the tiny model."""
    run = tmp_path_factory.mktemp("run")
    write_jsonl(run / "mined.jsonl", [mined_line(i) for i in range(12)])
    assert stage("02", "--run", run, "--model", tiny, *SETS) == 0
    steps = ["--steps", 6, "--anchors", 2, "--every", 3, "--lr", 1e-2]
    assert stage("03", "--run", run, *steps) == 0
    return run
