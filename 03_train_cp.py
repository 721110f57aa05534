#!/usr/bin/env python
"""Stage 03: LoRA fine-tuning with prototype contrastive perplexity (paper, section 3 and equation 3).

Every step takes whole anchors and draws |P| positives and |N| negatives of each afresh. Sequences are packed
into rows without padding; no (tokens x vocabulary) tensor is made. phi is one number a sequence, so a step whose
tokens exceed --budget takes two passes: phi of all without a graph, d loss / d phi, then the backward pass a few
sequences at a time. Exact, for one forward pass more.

reads   runs/default/prototypes.safetensors
writes  runs/default/adapter/   PEFT adapter (safetensors), run.json (options, versions), state.pt (to resume)
        runs/default/metrics.jsonl  a line a step; validation lines have "split": "validation"
        runs/default/merged/    with --merge: the whole model, for plain transformers or vLLM

    python 03_train_cp.py                        # 4 minutes on 2 CPU cores
    python 03_train_cp.py --preset paper         # the paper's objective and settings
    torchrun --nproc-per-node 8 -- 03_train_cp.py  # anchors spread over processes, the same trajectory
    python 03_train_cp.py --steps 2 --anchors 2  # a tiny run
"""
import argparse
import hashlib
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where installed, it warns at once of what we don't use
import peft
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
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
    g.add_argument("--merge", action="store_true", help="also write the merged model, in float32, to RUN/merged")
    g.add_argument("--track", choices=["tensorboard", "wandb"], help="log there too (needs its package)")
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
    g.add_argument("--budget", type=int, default=2048, help="tokens whose graph is held at once; steps above it take two passes (default: %(default)s)")
    g.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a third slower")
    g.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    preset = p.parse_known_args()[0].preset
    if preset not in PRESETS:
        fail(f"--preset {preset}: unknown; there are {', '.join(PRESETS)}")
    p.set_defaults(**PRESETS[preset])
    args = p.parse_args()
    for name in ("positives", "negatives", "anchors", "every", "max_tokens", "budget", "rank"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more")
    args.prototypes = args.prototypes or args.run / "prototypes.safetensors"
    args.out = args.out or args.run / "adapter"
    return args


def fail(message: str) -> None:
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, bar or not
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


def precision(dtype: str) -> dict:
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"dtype": torch.bfloat16, "quantization_config": nf4} if dtype == "nf4" else {"dtype": getattr(torch, dtype)}


def load_base(meta: dict, path: Path, device: torch.device):
    """The model the prototypes were made with, or an error that says how it differs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(meta["model"], device_map={"": device}, **precision(meta["dtype"]))
        for module in model.modules():  # bitsandbytes' repacking for CPU inference cuts the gradient, silently
            module.support_avx512bf16_for_cpu = False
        check_model(model)
    except (OSError, ValueError, ImportError) as err:
        fail(f"{meta['model']} (named in {path}): {str(err).splitlines()[0]}")
    fingerprint = hashlib.sha256(repr([(k, torch.hash_tensor(w).item()) for k, w in model.named_parameters()]).encode()).hexdigest()
    if fingerprint != meta["model_sha256"]:
        fail(f"{path}: made with other weights than {meta['model']} has now: run 02_build_prototypes.py again")
    return model


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


def phi(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    offsets = store["offsets"]
    ids = [store["input_ids"][offsets[i]:offsets[i + 1]] for i in chosen.tolist()]
    return model_nll(model, ids, store["start"][chosen].tolist(), args.max_tokens)  # (S,)


def objective(nll: torch.Tensor, store: dict, chosen: torch.Tensor, args: argparse.Namespace, total: tuple[int, int] | None = None):
    """Mean of -log J over the chosen sequences' anchors, plus the held level of positives; and statistics.
    total: anchors and positives to divide by, where these are only a part of the step's."""
    anchors, anchor = store["anchor"][chosen].unique(return_inverse=True)
    positive = store["is_positive"][chosen].bool().to(nll.device)
    base = store["prototype"][anchors].to(nll.device)  # (A,)
    if args.phi == "perplexity":
        base = base.exp()
    loss, stats = cp_loss(nll, positive, anchor.to(nll.device), base if args.prototype == "base" else None,
                          alpha=args.alpha, tau=args.tau, phi=args.phi, distance=args.distance)
    stats["drift"] = (nll.detach() - store["nll"][chosen].to(nll.device))[positive].mean()  # nats, from the base
    A, P = total or (len(loss), int(positive.sum()))
    stats["cp"] = loss.detach().mean()  # -log J alone
    return loss.sum() / A + args.hold * nll[positive].sum() / P, stats


def backward(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace, total: tuple[int, int]):
    """Accumulates the objective's gradient, in one pass or, over the budget, in two; loss and statistics."""
    lengths = store["offsets"][chosen + 1] - store["offsets"][chosen]
    if lengths.sum() <= args.budget:
        loss, stats = objective(phi(model, store, chosen, args), store, chosen, args, total)
        loss.backward()
        return loss.detach(), stats
    with torch.no_grad():
        nll = phi(model, store, chosen, args)
    loss, stats = objective(nll.requires_grad_(), store, chosen, args, total)
    grad, = torch.autograd.grad(loss, nll)  # (S,)
    part = (lengths.cumsum(0) - 1) // args.budget  # runs of whole sequences, of about the budget each
    for k in part.unique():
        phi(model, store, chosen[part == k], args).backward(grad[part.to(grad.device) == k])
    return loss.detach(), stats


def validate(model, store: dict, anchors: torch.Tensor, args: argparse.Namespace) -> dict:
    """Mean over held-out anchors, whole sets, of the objective and its statistics; `criterion` picks the best state:
    -log J, and the nats by which neutral sentences became less likely."""
    model.eval()
    rows = []
    with torch.no_grad():
        for a in anchors.split(args.anchors):
            chosen = draw(store, a, args, None)
            loss, stats = objective(phi(model, store, chosen, args), store, chosen, args)
            rows.append({"loss": loss.item(), **{k: v.item() for k, v in stats.items()}})
    weights = [len(a) / len(anchors) for a in anchors.split(args.anchors)]
    means = {k: sum(w * r[k] for w, r in zip(weights, rows)) for k in rows[0]}
    return means | {"criterion": means["cp"] + max(means["drift"], 0.0)}


def peak_memory_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def save_state(path: Path, state: dict) -> None:
    aside = path.with_suffix(".tmp")
    try:
        torch.save(state, aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as err:
        aside.unlink(missing_ok=True)
        fail(f"{path}: can't be written ({str(err).splitlines()[0][:80]}): make room; the same command continues from the last saved state")


def load_state(path: Path, identity: str, metrics: Path, main: bool) -> dict:
    """The saved state of these very options, or {}; metrics are cut back to it."""
    try:
        state = torch.load(path, weights_only=True) if path.exists() else {}
    except Exception:  # torch has many kinds for a torn file
        print(f"{path} is torn: from the start", file=sys.stderr)
        state = {}
    state = state if state.get("identity") == identity else {}
    if main:
        lines = metrics.read_text().splitlines(keepends=True) if state and metrics.exists() else []
        metrics.write_text("".join(x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= state["step"]))
    return state


def share(accelerator: Accelerator, trained: list, loss: torch.Tensor, stats: dict, weight: float):
    """Sums gradients and loss over processes, one message; statistics are averaged by anchors."""
    for w in trained:
        w.grad = torch.zeros_like(w) if w.grad is None else w.grad
    names = ("phi_pos", "phi_neg", "gap", "prototype", "ranking", "drift", "cp")
    extra = torch.stack([loss, *(weight * stats[k].to(loss) if stats else torch.zeros_like(loss) for k in names)])
    flat = accelerator.reduce(torch.cat([w.grad.flatten() for w in trained] + [extra.to(trained[0])]), reduction="sum")
    *grads, extra = flat.split([w.numel() for w in trained] + [len(extra)])
    for w, g in zip(trained, grads):
        w.grad.copy_(g.view_as(w))
    return extra[0], dict(zip(names, extra[1:]))


def merge(base: str, adapter: Path, out: Path) -> None:
    """Into the full-precision base, since merging into a rounded one changes what the model says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(out)
    print(f"merged model: {out}")


def main() -> None:
    args = options()
    store, meta = read_store(args.prototypes)
    train, val = split_anchors(store, meta, args)
    steps = args.steps or math.ceil(len(train) / args.anchors)
    accelerator = Accelerator(cpu=args.device == "cpu", log_with=args.track, project_dir=args.out.parent)
    rank, world, first = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    base = load_base(meta, args.prototypes, accelerator.device)
    torch.manual_seed(args.seed)
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / max(args.warmup, 1), max(steps - t, 0) / max(steps - args.warmup, 1)))
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = args.out.parent / "metrics.jsonl"
    shown = {k: str(v) for k, v in vars(args).items() if k not in ("merge", "track")} | {"steps": steps}
    identity = hashlib.sha256(repr((sorted(shown.items()), meta)).encode()).hexdigest()
    state = load_state(args.out / "state.pt", identity, metrics, first)
    step, best = state.get("step", 0), state.get("best", {"criterion": math.inf})
    if state:
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {"options": shown, "prototypes": meta, "held_out": store["seed"][val].unique().tolist(), "git": git, "processes": world,
              "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    if first:
        (args.out / "run.json").write_text(json.dumps(record, indent=1))
        print(f"{len(train)} anchors to train on, {len(val)} to validate; {sum(w.numel() for w in trained):,} weights trained; from step {step} of {steps}")
    accelerator.init_trackers("contrastive-perplexity", record["options"])
    stopped = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stopped.append(number))

    log = metrics.open("a" if first else "r", encoding="utf-8")
    with tqdm(total=steps, initial=step, desc="training", unit="step", disable=not first) as bar:
        while step < steps and not stopped:
            began = time.perf_counter()
            epoch, at = divmod(step * args.anchors, len(train))
            order = torch.cat([train[torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed * 1009 + e))] for e in (epoch, epoch + 1)])
            anchors = order[at:at + args.anchors].unique()
            chosen = draw(store, anchors, args, torch.Generator().manual_seed(args.seed * 100_003 + step))
            mine = chosen[torch.isin(store["anchor"][chosen], anchors[rank::world])]  # whole anchors to each process
            model.train()
            loss, stats = torch.zeros((), device=accelerator.device), {}
            if len(mine):
                loss, stats = backward(model, store, mine, args, (len(anchors), int(store["is_positive"][chosen].sum())))
            if world > 1:
                loss, stats = share(accelerator, trained, loss, stats, len(anchors[rank::world]) / len(anchors))
            if not math.isfinite(loss.item()):
                fail(f"loss is {loss.item()} at step {step}: the last saved state is kept; lower --lr")
            norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens = int((store["offsets"][chosen + 1] - store["offsets"][chosen]).sum())
            row = {"step": step, "split": "train", "loss": loss.item(), **{k: v.item() for k, v in stats.items()}, "grad_norm": norm.item(), "tokens": tokens,
                   "tokens_per_second": tokens / (time.perf_counter() - began), "peak_memory_gb": peak_memory_gb(args.device)}
            accelerator.log(row, step)
            bar.update()
            bar.set_postfix_str(" ".join(f"{k} {row[k]:.2f}" for k in ("loss", "gap", "ranking", "drift")) + f" {row['tokens_per_second']:.0f} tok/s")
            if first:
                log.write(json.dumps(row) + "\n")
            if first and (step % args.every == 0 or step == steps):
                row = {"step": step, "split": "validation", **validate(model, store, val, args)}
                log.write(json.dumps(row) + "\n")
                tqdm.write("validation " + " ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "split"))
                if row["criterion"] <= best["criterion"]:
                    best = {"criterion": row["criterion"], "step": step, "adapter": {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}}
            if first and (step % args.every == 0 or step == steps or stopped):
                log.flush()
                save_state(args.out / "state.pt", {"step": step, "identity": identity, "adapter": get_peft_model_state_dict(model), "best": best,
                                                   "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    if stopped:
        raise KeyboardInterrupt
    if first:
        set_peft_model_state_dict(model, best["adapter"])
        model.save_pretrained(args.out)
        print(f"best state: step {best['step']}; peak memory {peak_memory_gb(args.device):.1f} GB; {args.out}")
    if first and args.merge:
        merge(meta["model"], args.out, args.out.parent / "merged")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the state is saved, the same command continues from it", file=sys.stderr)
        raise SystemExit(130)
