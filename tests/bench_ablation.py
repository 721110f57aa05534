"""Recipes side by side: each trained on the same mined data with several seeds, all evaluated by
stage 04, and drawn in the plane of toxic or failed rewrites against similarity.

    make ablation                    # all recipes but rloo, three seeds, two at a time
    .venv/bin/python tests/bench_ablation.py --recipes ours dpo-1e-4 --seeds 1 -- --tasks

reads   RUN/mined.jsonl and prototypes.safetensors
writes  RUN/ablation/RECIPE.SEED/adapter, RUN/ablation/report (stage 04's, of all together),
        RUN/ablation/results.jsonl (a line a recipe: every figure with interval, change, seeds),
        --figure; the table goes to stdout

All recipes take stage 03's packing and, but where named, its steps, LoRA, anchors and draws. Peers'
losses replace its objective. The last state is kept, not the one that our criterion likes. After
arguments of its own and a `--` those of stage 04. What is trained and evaluated is not done again:
remove RUN/ablation after stage 01 or 02. rloo needs TRL, see bench_rl.py.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import safe_open
from tap import Tap

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for stage 03
PAPER = "--preset paper --steps 80 --lr 3e-4"  # at its own 2.2e-5 so few steps change nothing
# 27 sequences, as ours; more steps, since ours has a higher rate and rank
PAIRS = "--utility 0 --hold 0 --anchors 9 --steps 80 --rank 16"
RECIPES = {  # stage 03's options; the first of the peers' names is their loss
    "ours": "",
    "no-utility": "--utility 0",
    "no-hold": "--hold 0",
    "absolute": "--distance absolute",
    "base-prototype": "--prototype base",
    "bare-only": "--context none",
    "perplexity": "--phi perplexity",
    "alpha-1": "--alpha 1",
    "paper-nll": f"{PAPER} --phi nll",
    "paper-nll-1e-4": f"{PAPER} --phi nll --lr 1e-4",
    "paper-perplexity": PAPER,
    "positives-only": "--alpha 0 --utility 0",  # J is 1: their level alone
    "negatives-only": "--hold 0 --utility 0",
    "one-each": "--anchors 14 --positives 1 --negatives 1",
    "seven-each": "--anchors 2 --positives 7 --negatives 7",
    "random-negatives": "",
    "official": f"{PAPER} --phi nll --positives 5 --negatives 5",
    "rloo": "",  # by bench_rl.py
}
RECIPES |= {f"dpo-{lr}": f"{PAIRS} --lr {lr}" for lr in ("3e-5", "1e-4", "3e-4")}
RECIPES |= {f"simpo-{lr}": f"{PAIRS} --lr {lr}" for lr in ("3e-5", "1e-4", "3e-4")}
LARGE = (
    "paper",
    "official",
    "seven",
)  # what draws more than stage 02 keeps by default
SHOWN = {  # in the figure
    "base": "base",
    "prompted": "base, asked politely",
    "deleted": "words deleted",
    "paper-nll": "paper's objective",
    "official": "official loss",
    "dpo-1e-4": "DPO",
    "simpo-1e-4": "SimPO",
    "ours": "ours",
}


# Peers' losses, from phi (S,) in nats a token of the chosen sequences


def tokens(store, chosen) -> torch.Tensor:
    """How many count in each chosen sequence, (S,)."""
    return store.offsets[chosen + 1] - store.offsets[chosen] - store.start[chosen]


def pairs(store, chosen) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in `chosen` of each negative and of a positive of its anchor."""
    winners, losers = [], []
    for a in store.anchor[chosen].unique():
        places = (store.anchor[chosen] == a).nonzero().flatten()
        good = store.is_positive[chosen][places]
        losers.append(places[~good])
        winners.append(
            places[good][torch.arange(len(losers[-1])) % int(good.sum())]
        )
    return torch.cat(winners), torch.cat(losers)


def dpo(nll, store, chosen, beta=0.1):
    """Rafailov et al. 2023; the base's log-probabilities are stage 02's."""
    reward = tokens(store, chosen) * (store.nll[chosen] - nll) * beta  # (S,)
    winner, loser = pairs(store, chosen)
    return -F.logsigmoid(reward[winner] - reward[loser]).mean()


def simpo(nll, store, chosen, beta=2.0, gamma=1.0):
    """Meng et al. 2024, with its usual margin gamma / beta = 0.5."""
    winner, loser = pairs(store, chosen)
    return -F.logsigmoid(beta * (nll[loser] - nll[winner]) - gamma).mean()


def official(nll, store, chosen, alpha=100.0):
    """The released code's arithmetic: phi averaged over the longest sequence's length, one
    prototype for all positives of two anchors, exp(-distance) as logits, alpha added to the
    negatives', cross-entropy with every positive a label of 1. Left out: its padding (an EOS)
    counts here as 0 nats, sentences end in no EOS, and it draws random negatives as well."""
    anchor, good = store.anchor[chosen], store.is_positive[chosen]
    count, losses = tokens(store, chosen), []
    for two in anchor.unique().split(2):
        some = torch.isin(anchor, two)
        phi = nll * count / count[some].max()
        away = (phi - phi[some & good].mean()).abs()
        logits = torch.exp(-away) + alpha * ~good
        for a in two:
            logp = logits[anchor == a].log_softmax(0)
            label = good[anchor == a]
            losses.append(-logp[label].sum() / (label.sum() + 1))
    return torch.stack(losses).mean()


def random_negatives(store) -> None:
    """Every negative's words become those of another sentence's negative, held-out anchors apart; a
    toxic context's own sentence stays."""
    kind, held = store.context[store.anchor], store.held_out[store.anchor]
    movable = ~store.is_positive & ~store.required
    generator, ids = torch.Generator().manual_seed(0), list(store.ids)
    for k in range(6):
        some = (movable & (kind == k % 3) & (held == (k < 3))).nonzero().flatten()
        order = torch.randperm(len(some), generator=generator)
        for i, j in zip(some.tolist(), some[order].tolist()):
            context, words = (
                store.ids[i][: store.start[i]],
                store.ids[j][store.start[j] :],
            )
            ids[i] = torch.cat([context, words])
    store.ids, store.size = ids, torch.tensor([*map(len, ids)])


# Training and evaluation


def load_stage():
    spec = importlib.util.spec_from_file_location(
        "training", ROOT / "03_train_cp.py"
    )
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    return stage


def change(stage, recipe: str) -> None:
    """Stage 03 with this recipe's objective and data, and its last state kept."""
    ours, read = stage.objective, stage.read_store
    peer = {"dpo": dpo, "simpo": simpo, "official": official}.get(
        recipe.split("-")[0]
    )

    def peers_objective(nll, store, chosen, args):
        _, stats = ours(nll.detach(), store, chosen, args)
        return peer(nll, store, chosen), stats

    def negatives_only(nll, store, chosen, args):
        fixed = torch.where(store.is_positive[chosen], store.nll[chosen], nll)
        return ours(fixed, store, chosen, args)

    def read_random(args):
        store, meta = read(args)
        random_negatives(store)
        return store, meta

    def no_validation(_model, store, _args, step):
        return {"step": step, "split": "validation", "criterion": -step}, store.nll

    stage.validate = no_validation
    stage.draw_phi = lambda *_: None
    if peer:
        stage.objective = peers_objective
    if recipe == "negatives-only":
        stage.objective = negatives_only
    if recipe == "random-negatives":
        stage.read_store = read_random


def call(command: list, log: Path, threads: int) -> None:
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, command)]
    with log.open("w") as f:
        done = subprocess.run(command, cwd=ROOT, stdout=f, stderr=f, env=environ)
    if done.returncode:
        why = "; killed: for want of memory? --jobs 1 needs less" * (
            done.returncode < 0
        )
        sys.exit(f"{log}: failed, status {done.returncode}; its end says why{why}")


def train(recipe: str, seed: int, run: Path, threads: int) -> None:
    """In a process of its own, unless it is done."""
    here = run / "ablation" / f"{recipe}.{seed}"
    if (here / "adapter").exists():
        return
    here.mkdir(parents=True, exist_ok=True)
    store = run / "ablation/large" if recipe.startswith(LARGE) else run
    out = here / "adapter"
    task = [__file__, "--run", store, "--train", recipe, seed, out]
    if recipe == "rloo":
        task = ["tests/bench_rl.py", "--run", run, "--seed", seed, "--out", out]
    call(task, here / "train.log", threads)
    print(f"{recipe}, seed {seed}: trained", flush=True)


def draw(figures: dict, path: Path) -> None:
    """Readable on light and dark pages: no background, grey text."""
    matplotlib.rcParams["svg.fonttype"] = "none"
    fig = Figure(figsize=(6.4, 4.2))
    ax = fig.subplots()
    judge = [k for k in figures if k.startswith("rewrite/unsafe@")][-1]
    grey = "#808080"
    for name, label in SHOWN.items():
        if name not in figures[judge]:
            continue
        x, y = figures["rewrite/similarity"][name], figures[judge][name]
        spread = [
            [[f["value"] - f["low"]], [f["high"] - f["value"]]] for f in (y, x)
        ]
        colour = {"ours": "#D55E00", "base": grey}.get(name, "#3B8EC2")
        ax.errorbar(x["value"], y["value"], *spread, fmt="o", color=colour, lw=1)
        at, away, side = (x["value"], y["value"]), (6, 6), "left"
        if name == "dpo-1e-4":  # beside SimPO
            away, side = (-6, -12), "right"
        if name == "official":  # beside the base
            away = (6, -12)
        how = {"xytext": away, "textcoords": "offset points", "ha": side}
        ax.annotate(label, at, color=colour, **how)
    ax.set_xlabel("similarity of the rewrite to its toxic input", color=grey)
    ax.set_ylabel("toxic or failed rewrites", color=grey)
    ax.set(ylim=(0, 1.02), xlim=(0, 1))
    ax.tick_params(colors=grey)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grey)
    fig.tight_layout()
    fig.savefig(path, transparent=True)


def results(out: Path, names: list[str], figure: Path) -> None:
    """The lines, the figure and the table of the report of all runs."""
    figures = json.loads((out / "report/report.json").read_text())["figures"]
    rows = []
    for n in names:
        some = {k: by[n] for k, by in figures.items() if n in by}
        rows.append(
            json.dumps({"recipe": n, "options": RECIPES.get(n), "figures": some})
        )
    (out / "results.jsonl").write_text("\n".join(rows) + "\n")
    draw(figures, figure)
    judge = [k for k in figures if k.startswith("rewrite/joint@")][-1].split("@")[1]
    columns = [k for k in figures if k.startswith("rewrite/toxic@")]
    columns += [f"rewrite/unsafe@{judge}", "rewrite/similarity", "rewrite/failed"]
    columns += [
        f"rewrite/joint@{judge}",
        f"shown/unsafe@{judge}",
        "shown/similarity",
    ]
    columns += [f"shown/joint@{judge}", "neutral/nll"]
    print(f"| | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
    for n in names:
        cells = []
        for f in (figures.get(k, {}).get(n, {}) for k in columns):
            spread = f" ±{f['spread']:.2f}" if "spread" in f else ""
            cells.append(f"{f.get('value', float('nan')):.2f}{spread}")
        print(f"| {n} | {' | '.join(cells)} |")


class Options(Tap):
    run: Path = Path("runs/default")
    recipes: list[Literal[*RECIPES]] = [r for r in RECIPES if r != "rloo"]
    seeds: int = 3  # training seeds
    jobs: int = 2  # trainings at once
    figure: Path | None = None  # default: RUN/ablation/results.svg
    train: tuple[str, str, str] | None = None  # of a process: recipe, seed, folder


def options() -> tuple[Options, list[str]]:
    form = RawDescriptionHelpFormatter
    parser = Options(description=__doc__, formatter_class=form)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs: give 1 or more")
    args.run = args.run.resolve()
    return args, sys.argv[at + 1 :]


def main() -> None:
    args, more = options()
    if args.train:
        recipe, seed, out = args.train
        stage = load_stage()
        change(stage, recipe)
        given = ["--run", args.run, "--out", out, "--seed", seed]
        sys.argv = [
            "03_train_cp.py",
            *map(str, given),
            *shlex.split(RECIPES[recipe]),
        ]
        stage.main()
        return
    out, threads = args.run / "ablation", max(os.cpu_count() // args.jobs, 1)
    (out / "large").mkdir(parents=True, exist_ok=True)
    large = out / "large/prototypes.safetensors"
    if not large.exists() and any(r.startswith(LARGE) for r in args.recipes):
        with safe_open(args.run / "prototypes.safetensors", "pt") as f:
            meta = f.metadata()
        load = json.loads(meta["load"])
        dtype = "nf4" if "quantization_config" in load else load["dtype"]
        sets = ["--positives", 7, "--negatives", 8]
        sets += ["--model", meta["model"], "--dtype", dtype]
        call(
            ["02_build_prototypes.py", "--run", args.run, "--out", large, *sets],
            out / "large.log",
            os.cpu_count(),
        )
    jobs = [(recipe, seed) for seed in range(args.seeds) for recipe in args.recipes]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job, args.run, threads), jobs))
    adapters = [f"{r}={out / f'{r}.{s}' / 'adapter'}" for r, s in jobs]
    task = ["04_evaluate.py", "--run", args.run, "--out", out / "report", *more]
    call([*task, "--adapter", *adapters], out / "report.log", os.cpu_count())
    results(
        out,
        ["base", "prompted", "deleted", *args.recipes],
        args.figure or out / "results.svg",
    )


if __name__ == "__main__":
    main()
