"""Recipes side by side: every one trained on the same mined data with several seeds, evaluated by stage 04, drawn in the plane
of toxicity against similarity and against wiki perplexity.

    make ablation                                        # all recipes, three seeds, two at a time; what is done is not done again
    .venv/bin/python tests/bench_ablation.py --recipes ours paper-nll dpo-1e-4 --seeds 1   # with all of stage 04's protocols

reads   RUN/prototypes.safetensors (stage 02's)
writes  RUN/ablation/RECIPE.SEED/adapter and report, RUN/ablation/report (stage 04's, all together), RUN/ablation/results.jsonl (a
        line a recipe, every figure with its interval, change and seeds), RUN/ablation/plane.png; the table goes to stdout

All recipes take stage 03's steps, LoRA, packing and, but where named, its anchors and draws. Peers' losses replace its
objective. The last state is kept, not the one that our criterion likes. After arguments of its own and a `--` those of
stage 04. A run is done again when its options, the prototypes, stage 03 or cp_loss.py are others.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for stage 03
PAPER = "--preset paper --steps 80 --lr 3e-4"  # at its own rate of 2.2e-5 so few steps change nothing
PLAIN = "--utility 0 --hold 0"
TWO = "--anchors 7 --positives 2 --negatives 2"  # 28 sequences a step, where ours has 27
RECIPES = {  # stage 03's options; the first of the peers' names is their loss
    "ours": "",
    "no-utility": "--utility 0", "no-hold": "--hold 0", "absolute": "--distance absolute", "base-prototype": "--prototype base",
    "bare-only": "--context none", "perplexity": "--phi perplexity", "alpha-1": "--alpha 1",
    "paper-nll": f"{PAPER} --phi nll", "paper-nll-1e-4": f"{PAPER} --phi nll --lr 1e-4", "paper-perplexity": PAPER,
    "positives-only": "--only positives --utility 0", "negatives-only": f"--only negatives {PLAIN}",
    "one-each": "--anchors 14 --positives 1 --negatives 1", "seven-each": "--anchors 2 --positives 7 --negatives 7",  # as many sequences a step
    "random-negatives": "",
    "official": f"{PAPER} --phi nll --positives 5 --negatives 5",
    **{f"{peer}-{lr}": f"{PLAIN} {TWO} --lr {lr}" for peer in ("dpo", "simpo") for lr in ("3e-5", "1e-4", "3e-4")},
}


# Peers' losses, from phi (S,) in nats a token of the chosen sequences

def pairs(store: dict, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in `chosen` of each negative and of a positive of its anchor."""
    winners, losers = [], []
    for a in store["anchor"][chosen].unique():
        mine = (store["anchor"][chosen] == a).nonzero().flatten()
        good = store["is_positive"][chosen][mine].bool()
        losers.append(mine[~good])
        winners.append(mine[good][torch.arange(len(losers[-1])) % int(good.sum())])
    return torch.cat(winners), torch.cat(losers)


def dpo(nll, store, chosen, beta=0.1):
    """Rafailov et al. 2023; the base's log-probabilities are stage 02's."""
    count = (store["offsets"][chosen + 1] - store["offsets"][chosen] - store["start"][chosen]).to(nll)
    reward, (w, l) = beta * count * (store["nll"][chosen].to(nll) - nll), pairs(store, chosen)  # (S,)
    return -F.logsigmoid(reward[w] - reward[l]).mean()


def simpo(nll, store, chosen, beta=2.0, gamma=1.0):
    """Meng et al. 2024, with its usual margin gamma / beta = 0.5."""
    w, l = pairs(store, chosen)  # noqa: E741
    return -F.logsigmoid(beta * (nll[l] - nll[w]) - gamma).mean()


def official(nll, store, chosen, alpha=100.0):
    """The released code's arithmetic: phi averaged over the longest sequence's length, one prototype for all positives of two
    anchors, exp(-distance) as logits, alpha added to the negatives', cross-entropy with every positive a label of 1. Left out:
    its padding (an EOS) counts here as 0 nats, sentences end in no EOS, and it draws random negatives as well."""
    anchors, losses = store["anchor"][chosen].unique(), []
    count = (store["offsets"][chosen + 1] - store["offsets"][chosen] - store["start"][chosen]).to(nll)
    for two in anchors.split(2):
        some = torch.isin(store["anchor"][chosen], two)
        phi, good = nll * count / count[some].max(), store["is_positive"][chosen].bool()
        score = torch.exp(-(phi - phi[some & good].mean()).abs()) + alpha * ~good.to(nll.device)
        for a in two:
            mine = store["anchor"][chosen] == a
            losses.append(-score[mine].log_softmax(0)[good[mine]].sum() / (good[mine].sum() + 1))
    return torch.stack(losses).mean()


def random_negatives(store: dict, held: torch.Tensor) -> dict:
    """Every negative's words become those of another sentence's negative, held-out anchors apart; a toxic context's own
    sentence stays."""
    ids = [store["input_ids"][a:b] for a, b in zip(store["offsets"], store["offsets"][1:])]
    kind, generator = store["context"][store["anchor"]], torch.Generator().manual_seed(0)
    negative = ~store["is_positive"].bool()
    before = torch.cat([torch.tensor([-1]), torch.where(negative, store["anchor"], -1)[:-1]])
    movable = negative & ((kind < 2) | (before == store["anchor"]))  # all but the first of a toxic context
    new = list(ids)
    for k in range(6):
        some = (movable & (kind == k % 3) & (torch.isin(store["anchor"], held) == (k < 3))).nonzero().flatten()
        for i, j in zip(some.tolist(), some[torch.randperm(len(some), generator=generator)].tolist()):
            new[i] = torch.cat([ids[i][:store["start"][i]], ids[j][store["start"][j]:]])
    return store | {"input_ids": torch.cat(new), "offsets": torch.tensor([0, *map(len, new)]).cumsum(0)}


def train(recipe: str, seed: str, run: Path, out: Path) -> None:
    """Stage 03 with this recipe's objective."""
    spec = importlib.util.spec_from_file_location("training", ROOT / "03_train_cp.py")
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    loss, theirs, read = recipe.split("-")[0], stage.objective, stage.read_store
    stage.validate = lambda *_: {"criterion": 0.0, "utility_drift": math.nan}  # the last state is kept, so none is measured
    if peer := {"dpo": dpo, "simpo": simpo, "official": official}.get(loss):
        def objective(nll, store, chosen, args, total=None):
            return peer(nll, store, chosen), theirs(nll.detach(), store, chosen, args, total)[1]
        stage.objective = objective
    if recipe == "random-negatives":
        def read_store(path):
            store, meta = read(path)
            return random_negatives(store, stage.split_anchors(store, meta, stage.options())[1]), meta
        stage.read_store = read_store
    sys.argv = ["03_train_cp.py", "--run", str(run), "--out", str(out), "--seed", seed, *shlex.split(RECIPES[recipe])]
    stage.main()


def call(command: list, log: Path, threads: int) -> None:
    with log.open("w") as f:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        sys.exit(f"{log}: failed, status {done.returncode}; its end says why" + " (killed: for want of memory? --jobs 1 needs less)" * (done.returncode < 0))


def one(recipe: str, seed: int, first: Path, run: Path, threads: int, more: list[str]) -> None:
    """Trains and evaluates; the base's outputs and measures are taken from the first one's report."""
    here = run / "ablation" / f"{recipe}.{seed}"
    report = here / "report"
    report.mkdir(parents=True, exist_ok=True)
    made = [run / "prototypes.safetensors", ROOT / "03_train_cp.py", ROOT / "cp_loss.py"]
    key = hashlib.sha256(repr([RECIPES[recipe], more, *(x.read_bytes() for x in made)]).encode()).hexdigest()
    if (here / "key").exists() and (here / "key").read_text() == key:
        return
    call([__file__, "--run", run, "--train", recipe, seed, here / "adapter"], here / "train.log", threads)  # what is whole is kept
    for name in ("generations.jsonl", "measures.jsonl"):
        if not (report / name).exists() and (first / name).exists():
            shutil.copy(first / name, report / name)
    call(["04_evaluate.py", "--run", run, "--adapter", f"{recipe}={here / 'adapter'}", "--out", report, *more], here / "evaluate.log", threads)
    (here / "key").write_text(key)
    print(f"{recipe}, seed {seed}: done", flush=True)


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Those that no other beats on both axes; low is good on both."""
    return [a for a, (x, y) in points.items() if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points.values())]


def draw(figures: dict, names: list[str], judge: str, out: Path) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True)
    for ax, key, sign, what in ((axes[0], "rewrite/similarity", -1, "similarity of output to input"), (axes[1], "wiki/per_token", 1, "wiki perplexity, per token")):
        best = front({n: (sign * figures[key][n]["value"], figures[f"rewrite/unsafe@{judge}"][n]["value"]) for n in names})
        for n in names:
            x, y = figures[key][n], figures[f"rewrite/unsafe@{judge}"][n]
            colour = "#D55E00" if n == "ours" else "#000000" if n == "base" else "#0072B2"
            bars = [[[f["value"] - f["low"]], [f["high"] - f["value"]]] for f in (y, x)]
            ax.errorbar(x["value"], y["value"], *(bars if key != "wiki/per_token" else bars[:1]), fmt="o" if n in best else "x", ms=6, color=colour, lw=0.5, alpha=0.8)
            ax.annotate(n, (x["value"], y["value"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
        ax.set(xlabel=what, ylim=(0, 102), title="dots: no other is better on both axes")
    if max(f["value"] for f in figures["wiki/per_token"].values()) > 2 * figures["wiki/per_token"]["base"]["value"]:
        axes[1].set_xscale("log")
    axes[0].set(ylabel=f"toxic or failed rewrites, % (judge: {judge})")
    fig.tight_layout()
    fig.savefig(out, dpi=110)


def results(out: Path, names: list[str]) -> None:
    """All runs' outputs in one report, the lines, the figure and the table."""
    record = json.loads((out / "report/report.json").read_text())
    figures, judges = record["figures"], [k.split("@")[1] for k in record["figures"] if k.startswith("rewrite/toxic@")]
    judge = judges[-1]  # not the one that mined, where there are two
    names = ["base", *names]
    (out / "results.jsonl").write_text("".join(json.dumps({"recipe": n, "options": RECIPES.get(n), "figures": {k: f[n] for k, f in figures.items() if n in f}}) + "\n" for n in names))
    draw(figures, names, judge, out / "plane.png")
    columns = {**{f"rewrite/toxic@{j}": f"toxic, {j}" for j in judges}, f"rewrite/unsafe@{judge}": "the same or failed", "rewrite/similarity": "similarity",
               "rewrite/clean": "to the input less its toxic words", "rewrite/failed": "failed", "wiki/per_token": "wiki perplexity"}
    print("| | seeds | " + " | ".join(columns.values()) + " |\n" + "| --- " * (len(columns) + 2) + "|")
    for n in names:
        cells = [figures[k][n] for k in columns]
        text = [f"{f['value']:.2f}" if k in ("rewrite/similarity", "rewrite/clean") else f"{f['value']:.1f}" + (f" ±{f['spread']:.1f}" if "spread" in f else "") for k, f in zip(columns, cells)]
        print(f"| {n} | {len(cells[0].get('seeds', [0]))} | " + " | ".join(text) + " |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/default"), help="default: %(default)s")
    p.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    p.add_argument("--seeds", type=int, default=3, help="training seeds (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=2, help="runs at once, each on its share of the cores (default: %(default)s)")
    p.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = p.parse_args(sys.argv[1:at]), sys.argv[at + 1:]
    args.run = args.run.resolve()
    if min(args.seeds, args.jobs) < 1:
        p.error("--seeds and --jobs: give 1 or more")
    if args.train:
        train(args.train[0], args.train[1], args.run, Path(args.train[2]))
        sys.exit()
    out, threads = args.run / "ablation", max(os.cpu_count() // args.jobs, 1)
    todo = [(r, s) for s in range(args.seeds) for r in args.recipes]
    first = out / f"{args.recipes[0]}.0/report"
    one(*todo[0], first, args.run, os.cpu_count(), more)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: one(*job, first, args.run, threads, more), todo[1:]))
    (out / "report").mkdir(exist_ok=True)
    for name in ("generations.jsonl", "measures.jsonl"):
        (out / "report" / name).write_text("".join(dict.fromkeys(line for r, s in todo for line in (out / f"{r}.{s}/report" / name).open())))
    call(["04_evaluate.py", "--run", args.run, "--rescore", "--out", out / "report", "--adapter", *(f"{r}={out / f'{r}.{s}' / 'adapter'}" for r, s in todo), *more], out / "report.log", os.cpu_count())
    results(out, args.recipes)
