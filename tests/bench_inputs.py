"""Bad inputs and options, made at random: each must end with exit status 2 and one line, or with a
result.

    HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q tests/bench_inputs.py   # 320 of them: 2 minutes
    INPUTS=1000 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q tests/bench_inputs.py -k file
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from conftest import STAGES, mined_line, write_jsonl

COUNT = int(os.environ.get("INPUTS", 40))  # of a stage's files, and of its options
VALUES = [None, [], {}, [[]], "", " ", "{}", "a\nb", True, -1, 0, 0.5, 10**30]
VALUES += [float("nan"), float("inf"), "x " * 3000, "ä\u2028\ufeff", "'\"\\"]
GIVEN = [
    "nan",
    "inf",
    "-1",
    "0",
    "0.5",
    "1",
    "",
    " ",
    "x",
    "/none",
    "/",
    "{}",
    "1e30",
]
TEXTS = [
    {
        "text": f"You are a stupid idiot about the {x}.",
        "group": None,
        "name": "idiot",
    }
    for x in ("lake", "town", "idea", "walk")
]


def change(value, chance):
    """Something inside becomes another thing, or goes."""
    if chance.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return chance.choice(VALUES)
    value = value.copy()
    key = chance.choice(
        list(value) if isinstance(value, dict) else range(len(value))
    )
    if chance.random() < 0.2:
        del value[key]
    else:
        value[key] = change(value[key], chance)
    return value


def spoil(rows: list, chance) -> bytes:
    """Lines of which one is changed, as a value or as bytes."""
    texts = [json.dumps(row).encode() for row in rows]
    i = chance.randrange(len(texts))
    at = chance.randrange(len(texts[i]))
    ways = {
        "value": lambda: json.dumps(change(rows[i], chance)).encode(),
        "cut": lambda: texts[i][:at],
        "bytes": lambda: texts[i][:at] + chance.randbytes(3) + texts[i][at:],
        "twice": lambda: texts[i] + b"\n" + texts[i],
        "surrogate": lambda: texts[i].replace(b"e", b"\\ud800"),
        "deep": lambda: b"[" * 100_000,
    }
    (way,) = chance.choices(list(ways), [3, 1, 1, 1, 1, 1])
    texts[i] = ways[way]()
    return b"\n".join(texts) + b"\n" * chance.randrange(2)


def flip(data: bytes, chance) -> bytes:
    """A few bytes other than they were, or some of the end gone."""
    data = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(min(len(data), 4000))] = chance.randrange(256)
    return bytes(
        data[: chance.choice([len(data), len(data) - 9, len(data) // 2, 7])]
    )


@pytest.fixture
def prepare(tiny, trained, tmp_path):
    """A stage's usual options on files of its own, and those files."""

    def files(number: str) -> tuple:
        run = tmp_path / "run"
        given = ["--run", run]
        if number == "01":
            seeds = [{"id": i, "text": TEXTS[i]["text"]} for i in range(2)]
            path = write_jsonl(tmp_path / "seeds.jsonl", seeds)
            for name in ("rounds", "rude", "clean", "insert", "chunk"):
                given += [f"--{name}", 1]
            return [*given, "--model", tiny, "--seeds", path], [path]
        run.mkdir()
        if number == "02":
            path = write_jsonl(run / "mined.jsonl", list(map(mined_line, range(3))))
            pairs = run / "pairs.tsv"
            pairs.write_text("".join(f"{x['text']}\tThe lake.\n" for x in TEXTS))
            return [*given, "--model", tiny, "--mined", path, pairs], [path, pairs]
        prototypes = shutil.copy(trained / "prototypes.safetensors", run)
        if number == "03":
            return [*given, "--steps", 1, "--anchors", 2], [prototypes]
        shutil.copytree(trained / "adapter", run / "adapter")
        names = ("rewrite", "benign", "continue")
        texts = [write_jsonl(tmp_path / f"{x}.jsonl", TEXTS) for x in names]
        weights = [
            run / f"adapter/adapter_{x}"
            for x in ("config.json", "model.safetensors")
        ]
        small = ["--tasks", "--limit", 4, "--k", 1, "--texts", *texts]
        return [*given, *small], [*texts, *weights, prototypes]

    return files


def ends_well(stage, capsys, number: str, given: list) -> None:
    capsys.readouterr()
    try:
        status = stage(number, *given)
    except OSError:  # one line, too: where the script is run as such
        return
    errors = capsys.readouterr().err.splitlines()
    errors = [line for line in errors if line.startswith("error: ")]
    assert (status, len(errors)) in ((0, 0), (2, 1)), (given, errors)


@pytest.mark.parametrize("seed", range(COUNT))
@pytest.mark.parametrize("number", STAGES)
def test_file(stage, prepare, capsys, number, seed):
    chance = random.Random(f"{number} {seed}")
    given, paths = prepare(number)
    path = Path(chance.choice(paths))
    if path.suffix in (".safetensors", ".tsv"):
        path.write_bytes(flip(path.read_bytes(), chance))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()), chance)))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_bytes(spoil(rows, chance))
    ends_well(stage, capsys, number, given)


@pytest.mark.parametrize("seed", range(COUNT))
@pytest.mark.parametrize("number", STAGES)
def test_option(stage, prepare, tmp_path, capsys, number, seed):
    chance = random.Random(f"{number} {seed}")
    given, _ = prepare(number)
    names = [
        f"--{x.replace('_', '-')}" for x in stage.options(number).class_variables
    ]
    names = [x for x in names if x not in ("--preset", "--steps", "--seeds")]
    for name in chance.sample(names, chance.randrange(1, 3)):
        value = chance.choice(GIVEN)
        if name in ("--run", "--out"):
            end = chance.choice(["", ".jsonl", ".safetensors"])
            value = f"{tmp_path}/{value}{end}"
        given = [*given, f"{name}={value}"]
    ends_well(stage, capsys, number, given)
