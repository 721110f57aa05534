#!/usr/bin/env python
"""Stage 03: LoRA fine-tuning with prototype contrastive perplexity (paper, section 3 and equation 3).

Every step takes whole anchors and draws |P| positives and |N| negatives of each afresh. Sequences are packed
into rows without padding; no (tokens x vocabulary) tensor is made.

reads   runs/default/prototypes.safetensors
writes  runs/default/adapter/   PEFT adapter (safetensors), run.json (options, versions), state.pt (to resume)
        runs/default/metrics.jsonl  a line a step; validation lines have "split": "validation"

    python 03_train_cp.py                        # 4 minutes on 2 CPU cores
    python 03_train_cp.py --preset paper         # the paper's objective and settings
    python 03_train_cp.py --steps 2 --anchors 2  # a tiny run
"""
import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from cp_loss import check_model, cp_loss, model_nll

FORMAT = "cp-prototypes-1"
PRESETS = {  # the paper's: one epoch, batch 2 x accumulation 3, on a 4-bit base (here: the base as loaded)
    "default": {},
    "paper": {"context": ["none"], "phi": "perplexity", "distance": "absolute", "prototype": "batch", "alpha": 1.0, "tau": 1.0,
              "hold": 0.0, "lr": 2.2e-5, "anchors": 6, "positives": 3, "negatives": 5, "steps": None},
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="default", help=f"one of {', '.join(PRESETS)}: sets defaults that options still override")
    g = p.add_argument_group("files")
    g.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of this run (default: %(default)s)")
    g.add_argument("--prototypes", type=Path, help="default: RUN/prototypes.safetensors")
    g.add_argument("--out", type=Path, help="adapter folder; default: RUN/adapter")
    g = p.add_argument_group("objective")
    g.add_argument("--context", nargs="+", choices=["none", "seed", "toxic"], default=["none", "seed", "toxic"], help="which anchors to train on (paper: none)")
    g.add_argument("--phi", choices=["nll", "perplexity"], default="nll", help="paper's text: perplexity; official code: nll (default: %(default)s)")
    g.add_argument("--distance", choices=["absolute", "signed"], default="signed", help="paper: absolute (default: %(default)s)")
    g.add_argument("--prototype", choices=["batch", "base"], default="batch", help="mean phi of the drawn positives (paper), or the base model's (default: %(default)s)")
    g.add_argument("--alpha", type=float, default=2.0, help="weight of negatives; higher: cleaner, less similar (paper: 1.0, 1.1; default: %(default)s)")
    g.add_argument("--tau", type=float, default=1.0, help="temperature; small: only the nearest negatives count (ours; default: %(default)s)")
    g.add_argument("--hold", type=float, default=1.0, help="weight of the positives' mean nll beside -log J; 0: they drift away (ours; default: %(default)s)")
    g.add_argument("--positives", type=int, default=2, help="|P| drawn a step (paper: 1 to 5; default: %(default)s)")
    g.add_argument("--negatives", type=int, default=4, help="|N| drawn a step (paper: 5 to 8; default: %(default)s)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=80, help="default: %(default)s; the paper preset: one epoch")
    g.add_argument("--anchors", type=int, default=4, help="anchors a step (paper: 2 x 3; default: %(default)s)")
    g.add_argument("--lr", type=float, default=3e-4, help="paper: 2.2e-5; above 5e-4 a small model garbles (default: %(default)s)")
    g.add_argument("--warmup", type=int, default=8, help="steps to the full learning rate, then linear to 0 (default: %(default)s)")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm at most (default: %(default)s)")
    g.add_argument("--rank", type=int, default=16, help="LoRA r; its alpha is 2 r (default: %(default)s)")
    g.add_argument("--validation", type=float, default=0.1, help="share of mined lines held out (default: %(default)s)")
    g.add_argument("--every", type=int, default=20, help="steps between validations and saved states (default: %(default)s)")
    g.add_argument("--max-tokens", type=int, default=512, help="tokens a packed row; more on a GPU (default: %(default)s)")
    g.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    preset = p.parse_known_args()[0].preset
    if preset not in PRESETS:
        fail(f"--preset {preset}: unknown; there are {', '.join(PRESETS)}")
    p.set_defaults(**PRESETS[preset])
    args = p.parse_args()
    for name in ("positives", "negatives", "anchors", "every", "max_tokens", "rank"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more")
    args.prototypes = args.prototypes or args.run / "prototypes.safetensors"
    args.out = args.out or args.run / "adapter"
    return args


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_store(path: Path) -> tuple[dict, dict]:
    if not path.is_file():
        fail(f"{path} not found: run 02_build_prototypes.py first")
    try:
        with safe_open(path, "pt") as f:
            meta, store = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as err:
        fail(f"{path}: not a safetensors file ({err}): run 02_build_prototypes.py again")
    if meta.get("format") != FORMAT:
        fail(f"{path}: format {meta.get('format')!r}, this needs {FORMAT!r}: run 02_build_prototypes.py again")
    return store, meta


def load_base(meta: dict, path: Path, args: argparse.Namespace):
    """The model the prototypes were made with, or an error that says how it differs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(meta["model"], dtype=getattr(torch, meta["dtype"]))
        check_model(model)
    except (OSError, ValueError) as err:
        fail(f"{meta['model']} (named in {path}): {str(err).splitlines()[0]}")
    fingerprint = hashlib.sha256(repr([(k, torch.hash_tensor(w).item()) for k, w in model.named_parameters()]).encode()).hexdigest()
    if fingerprint != meta["model_sha256"]:
        fail(f"{path}: made with other weights than {meta['model']} has now: run 02_build_prototypes.py again")
    return model.to(args.device)


def split_anchors(store: dict, meta: dict, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchor numbers for training and validation, apart by mined line."""
    seeds = store["seed"].unique()
    held = seeds[torch.randperm(len(seeds), generator=torch.Generator().manual_seed(0))[:math.ceil(len(seeds) * args.validation)]]
    wanted = torch.isin(store["context"], torch.tensor([meta["contexts"].split().index(c) for c in args.context]))
    is_held = torch.isin(store["seed"], held)
    train, val = (wanted & ~is_held).nonzero().flatten(), (wanted & is_held).nonzero().flatten()
    if not len(train) or not len(val):
        fail(f"{args.prototypes}: {len(train)} anchors to train on and {len(val)} to validate with context "
             f"{' '.join(args.context)}: mine more seeds or build these contexts in stage 02")
    return train, val


def draw(store: dict, anchors: torch.Tensor, args: argparse.Namespace, generator: torch.Generator | None) -> torch.Tensor:
    """Sequence numbers: up to |P| and |N| of each anchor at random; all of them without a generator."""
    chosen = []
    for a in anchors.tolist():
        mine = (store["anchor"] == a).nonzero().flatten()
        for flag, n in ((True, args.positives), (False, args.negatives)):
            pool = mine[store["is_positive"][mine] == flag]
            chosen.append(pool if generator is None else pool[torch.randperm(len(pool), generator=generator)[:n]])
    return torch.cat(chosen)


def objective(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace):
    """Mean of -log J over the chosen sequences' anchors, plus the held level of positives; and statistics."""
    offsets, device = store["offsets"], model.device
    ids = [store["input_ids"][offsets[i]:offsets[i + 1]] for i in chosen.tolist()]
    nll = model_nll(model, ids, store["start"][chosen].tolist(), args.max_tokens)  # (S,)
    anchors, anchor = store["anchor"][chosen].unique(return_inverse=True)
    positive = store["is_positive"][chosen].bool().to(device)
    base = store["prototype"][anchors].to(device)  # (A,)
    if args.phi == "perplexity":
        base = base.exp()
    loss, stats = cp_loss(nll, positive, anchor.to(device), base if args.prototype == "base" else None,
                          alpha=args.alpha, tau=args.tau, phi=args.phi, distance=args.distance)
    stats["drift"] = (nll.detach() - store["nll"][chosen].to(device))[positive].mean()  # nats, from the base
    return loss.mean() + args.hold * nll[positive].mean(), stats


def validate(model, store: dict, anchors: torch.Tensor, args: argparse.Namespace) -> dict:
    """Mean over held-out anchors, whole sets, of the objective and its statistics."""
    rows = []
    with torch.no_grad():
        for a in anchors.split(args.anchors):
            loss, stats = objective(model, store, draw(store, a, args, None), args)
            rows.append({"n": len(a), "loss": loss.item(), **{k: v.item() for k, v in stats.items()}})
    total = sum(r.pop("n") for r in [dict(r) for r in rows])
    return {k: sum(r[k] * r["n"] for r in rows) / total for k in rows[0] if k != "n"}


def peak_memory_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def save_state(path: Path, model, optimizer, schedule, step: int, identity: str) -> None:
    aside = path.with_suffix(".tmp")
    torch.save({"step": step, "identity": identity, "adapter": get_peft_model_state_dict(model),
                "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, aside)
    os.replace(aside, path)


def resume(path: Path, model, optimizer, schedule, identity: str, metrics: Path) -> int:
    """The step to go on from: 0 without a state of these very options."""
    state = torch.load(path, weights_only=True) if path.exists() else {"identity": None}
    if state["identity"] != identity:
        metrics.write_text("")
        return 0
    set_peft_model_state_dict(model, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    kept = [x for x in metrics.read_text().splitlines(keepends=True) if x.endswith("}\n") and json.loads(x)["step"] <= state["step"]]
    metrics.write_text("".join(kept))
    return state["step"]


def main() -> None:
    args = options()
    store, meta = read_store(args.prototypes)
    train, val = split_anchors(store, meta, args)
    steps = args.steps or math.ceil(len(train) / args.anchors)
    base = load_base(meta, args.prototypes, args)
    torch.manual_seed(args.seed)
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / max(args.warmup, 1), max(steps - t, 0) / max(steps - args.warmup, 1)))
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = args.out.parent / "metrics.jsonl"
    shown = {k: str(v) for k, v in vars(args).items()} | {"steps": steps}
    identity = hashlib.sha256(repr((sorted(shown.items()), meta)).encode()).hexdigest()
    step = resume(args.out / "state.pt", model, optimizer, schedule, identity, metrics)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {"options": shown, "prototypes": meta, "held_out": store["seed"][val].unique().tolist(), "git": git, "torch": torch.__version__,
              "transformers": transformers.__version__, "peft": peft.__version__}
    (args.out / "run.json").write_text(json.dumps(record, indent=1))
    print(f"{len(train)} anchors to train on, {len(val)} to validate; {sum(w.numel() for w in trained):,} weights trained; from step {step} of {steps}")

    bar = tqdm(total=steps, initial=step, desc="training", unit="step")
    log = metrics.open("a", encoding="utf-8")
    while step < steps:
        began = time.perf_counter()
        epoch, at = divmod(step * args.anchors, len(train))
        order = torch.cat([train[torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed * 1009 + e))] for e in (epoch, epoch + 1)])
        chosen = draw(store, order[at:at + args.anchors].unique(), args, torch.Generator().manual_seed(args.seed * 100_003 + step))
        model.train()
        loss, stats = objective(model, store, chosen, args)
        if not math.isfinite(loss.item()):
            bar.close()
            fail(f"loss is {loss.item()} at step {step}: the last saved state is kept; lower --lr")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens = int((store["offsets"][chosen + 1] - store["offsets"][chosen]).sum())
        row = {"step": step, "split": "train", "loss": loss.item(), **{k: v.item() for k, v in stats.items()}, "grad_norm": norm.item(),
               "tokens_per_second": tokens / (time.perf_counter() - began), "peak_memory_gb": peak_memory_gb(args.device)}
        log.write(json.dumps(row) + "\n")
        bar.update()
        bar.set_postfix_str(" ".join(f"{k} {row[k]:.2f}" for k in ("loss", "gap", "ranking", "drift")) + f" {row['tokens_per_second']:.0f} tok/s")
        if step % args.every == 0 or step == steps:
            model.eval()
            row = {"step": step, "split": "validation", **validate(model, store, val, args)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            tqdm.write("validation " + " ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "split"))
            save_state(args.out / "state.pt", model, optimizer, schedule, step, identity)
    bar.close()
    model.save_pretrained(args.out)
    print(f"peak memory {peak_memory_gb(args.device):.1f} GB; {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last saved state", file=sys.stderr)
        raise SystemExit(130)
