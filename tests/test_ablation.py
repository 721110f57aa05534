"""What tests/bench_ablation.py compares with: the peers' losses, and random negatives."""

import copy
import math
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import bench_ablation
import bench_rl


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def literal_pairs(kind: str, s: Namespace) -> float:
    """DPO's and SimPO's equations, pair by pair."""
    losses = []
    for a in sorted(set(s.anchor)):
        places = [i for i, b in enumerate(s.anchor) if a == b]
        winners = [i for i in places if s.good[i]]
        losers = [i for i in places if not s.good[i]]
        for k, n in enumerate(losers):
            p = winners[k % len(winners)]
            margin = 2.0 * (s.nll[n] - s.nll[p]) - 1.0
            if kind == "dpo":
                better = s.count[p] * (s.base[p] - s.nll[p])
                worse = s.count[n] * (s.base[n] - s.nll[n])
                margin = 0.1 * (better - worse)
            losses.append(softplus(-margin))
    return sum(losses) / len(losses)


def literal_official(s: Namespace) -> float:
    """The released code's, micro-batches of two anchors: 0 and 1, then 2."""
    losses = []
    for two in ((0, 1), (2,)):
        some = [i for i, a in enumerate(s.anchor) if a in two]
        longest = max(s.count[i] for i in some)
        phi = {i: s.nll[i] * s.count[i] / longest for i in some}
        positives = [phi[i] for i in some if s.good[i]]
        c = sum(positives) / len(positives)
        for a in two:
            z = {}
            for i in (i for i in some if s.anchor[i] == a):
                z[i] = math.exp(-abs(phi[i] - c)) + 100 * (not s.good[i])
            total = math.log(sum(map(math.exp, z.values())))
            wrong = [total - v for i, v in z.items() if s.good[i]]
            losses.append(sum(wrong) / (len(wrong) + 1))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["dpo", "simpo", "official"])
def test_peers_losses_are_their_equations(kind):
    rng = torch.Generator().manual_seed(0)
    anchor = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    good = [1, 0, 0, 1, 0, 1, 1, 0, 0]
    start = torch.full((9,), 2)
    length = torch.randint(4, 9, (9,), generator=rng)
    nll, base = torch.rand(2, 9, dtype=torch.float64, generator=rng) * 3
    store = Namespace(
        anchor=torch.tensor(anchor),
        is_positive=torch.tensor(good).bool(),
        nll=base,
        start=start,
        offsets=torch.tensor([0, *length.cumsum(0)]),
    )
    got = getattr(bench_ablation, kind)(nll, store, torch.arange(9))
    plain = Namespace(
        anchor=anchor,
        good=good,
        nll=nll.tolist(),
        base=base.tolist(),
        count=(length - start).tolist(),
    )
    want = literal_pairs(kind, plain)
    if kind == "official":
        want = literal_official(plain)
    assert abs(got.item() - want) < 1e-9


def test_random_negatives_change_only_what_they_should(stage, trained):
    store, _ = stage.module("03").read_store(stage.options("03", "--run", trained))
    new = copy.copy(store)
    bench_ablation.random_negatives(new)
    same = [a.tolist() == b.tolist() for a, b in zip(store.ids, new.ids)]
    same = torch.tensor(same)
    fixed = store.is_positive | store.required
    assert same[fixed].all()
    assert same[~fixed].float().mean() < 0.3
    words = []
    for some in (store, new):
        sets = {True: set(), False: set()}
        for i, (ids, start) in enumerate(zip(some.ids, store.start)):
            assert ids[:start].equal(store.ids[i][:start])  # contexts stay
            if not store.is_positive[i]:
                held_out = bool(store.held_out[store.anchor[i]])
                sets[held_out].add(tuple(ids[start:].tolist()))
        words.append(sets)
    assert words[0] == words[1]  # held-out words stay held out


def test_every_recipe_is_known_to_stage_03(stage):
    peers = ("paper", "official", "dpo", "simpo")
    for recipe, options in bench_ablation.RECIPES.items():
        args, peer = stage.options("03", *options.split()), recipe.startswith(peers)
        wanted = (80, 16) if peer else (60, 64)
        assert (args.steps, args.rank) == wanted, recipe


def test_larger_sets_are_of_the_runs_model_and_dtype(
    trained, tmp_path, monkeypatch
):
    """Else stage 04 refuses their adapters beside the others."""
    shutil.copy(trained / "prototypes.safetensors", tmp_path)
    commands, given = [], ["--run", tmp_path, "--recipes", "official", "--seeds", 1]
    monkeypatch.setattr(
        bench_ablation, "call", lambda task, *_: commands.append(task)
    )
    monkeypatch.setattr(bench_ablation, "results", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench_ablation.py", *map(str, given)])
    bench_ablation.main()
    large, train, _ = commands
    assert large[0] == "02_build_prototypes.py" and large[-1] == "float32"
    assert train[2] == large[4].parent == tmp_path / "ablation/large"


@pytest.mark.parametrize(
    "recipe", ["ours", "dpo-1e-4", "negatives-only", "random-negatives"]
)
def test_a_recipe_trains_and_keeps_its_last_state(stage, trained, tmp_path, recipe):
    module = bench_ablation.load_stage()
    bench_ablation.change(module, recipe)
    stage.modules["ablation"] = module
    options = bench_ablation.RECIPES[recipe].split()
    out = tmp_path / recipe
    few = ["--steps", 2, "--anchors", 2]
    assert stage("ablation", "--run", trained, "--out", out, *options, *few) == 0
    state = torch.load(tmp_path / f"{recipe}.training/state.pt", weights_only=True)
    assert state["best"] == -2 and (out / "adapter_model.safetensors").exists()


def test_reinforcement_rewards_clean_answers_near_to_their_sentence():
    class Encoder:
        def encode(self, texts, **_):
            return np.array(
                [[1.0, 0.0] if "train" in x else [0.0, 1.0] for x in texts]
            )

    sentence = "The idiot missed the train."
    answers = [" He missed the train.\nSo", f" {sentence}", "\n", " Soup."]
    answers.append(" The damn bastard missed the train.")
    got = bench_rl.rewarded(Encoder())(answers, 5 * [sentence])
    assert got[0] > 0.9 and got[1:4] == [0, 0, 0] and got[4] < 0.1
