#!/usr/bin/env python
"""Stage 03: LoRA fine-tuning with prototype contrastive perplexity (paper, section 3 and equation 3).

Every step takes whole anchors and draws |P| positives and |N| negatives of each afresh. Sequences are packed
end to end into rows; no (tokens x vocabulary) tensor is made but for the few tokens of --utility. phi is one
number a sequence, so a step whose tokens exceed --budget takes two passes: phi of all without a graph, d loss / d phi,
then the backward pass a few sequences at a time. Exact, for one forward pass more.

reads   runs/default/prototypes.safetensors
writes  runs/default/adapter/   PEFT adapter (safetensors), run.json (options, versions), state.pt (to resume)
        runs/default/metrics.jsonl  a line a step; validation lines have "split": "validation"
        runs/default/merged/    with --merge: the whole model, for plain transformers or vLLM

    python 03_train_cp.py                        # 3 minutes on 2 CPU cores, 3.5 GB
    python 03_train_cp.py --preset paper         # the paper's objective and settings
    torchrun --nproc-per-node 8 -- 03_train_cp.py  # anchors spread over processes, the same trajectory
    torchrun --nproc-per-node 8 -- 03_train_cp.py --shard  # for a base that one device can't hold
    python 03_train_cp.py --steps 2 --anchors 2  # a tiny run
"""
import argparse
import hashlib
import itertools
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
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, reduce
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from cp_loss import check_model, cp_loss, forwards, model_nll, pack

FORMAT = "cp-prototypes-1"
PRESETS = {  # the paper's: one epoch, batch 2 x accumulation 3, on a 4-bit base (here: the base as loaded)
    "default": {},
    "paper": {"context": ["none"], "phi": "perplexity", "distance": "absolute", "prototype": "batch", "alpha": 1.0, "tau": 1.0,
              "hold": 0.0, "utility": 0.0, "lr": 2.2e-5, "anchors": 6, "positives": 3, "negatives": 5, "steps": None},
}
FREE = ("preset", "run", "prototypes", "out", "merge", "track", "max_tokens", "budget", "checkpointing", "shard", "device")  # may change from a start to the next
STATS = ("cp", "phi_pos", "phi_neg", "gap", "prototype", "ranking", "drift", "prototype_drift")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="default", help=f"one of {', '.join(PRESETS)}: sets defaults that options still override")
    g = p.add_argument_group("files")
    g.add_argument("--run", type=Path, default=Path("runs/default"), help="folder of this run (default: %(default)s)")
    g.add_argument("--prototypes", type=Path, help="default: RUN/prototypes.safetensors")
    g.add_argument("--out", type=Path, help="adapter folder, metrics.jsonl goes beside it; default: RUN/adapter")
    g.add_argument("--merge", action="store_true", help="also write the merged model, in float32, to RUN/merged")
    g.add_argument("--track", choices=["tensorboard", "wandb"], help="log there too (needs its package)")
    g = p.add_argument_group("objective")
    g.add_argument("--context", nargs="+", choices=["none", "seed", "toxic"], default=["none", "seed", "toxic"], help="which anchors to train on (paper: none)")
    g.add_argument("--phi", choices=["nll", "perplexity"], default="nll", help="paper's text: perplexity; official code: nll (default: %(default)s)")
    g.add_argument("--distance", choices=["absolute", "signed"], default="signed", help="paper: absolute (default: %(default)s)")
    g.add_argument("--prototype", choices=["batch", "base"], default="batch", help="mean phi of the drawn positives (paper), or the base model's (default: %(default)s)")
    g.add_argument("--alpha", type=float, default=10.0, help="weight of negatives; higher: cleaner, less similar (paper: 1.0, 1.1; default: %(default)s)")
    g.add_argument("--tau", type=float, default=1.0, help="temperature; small: only the nearest negatives count (ours; default: %(default)s)")
    g.add_argument("--hold", type=float, default=0.6, help="weight of the positives' level, see `objective`; 0: they drift away (ours; default: %(default)s)")
    g.add_argument("--utility", type=float, default=5.0, help="weight of the KL divergence from the base on neutral text; 0: wiki perplexity rises (ours; default: %(default)s)")
    g.add_argument("--only", choices=["positives", "negatives"], help="the paper's ablations: the level of positives alone, or their phi fixed in J; the first copies, the second garbles")
    g.add_argument("--positives", type=int, default=1, help="|P| drawn a step (paper: 1 to 5; default: %(default)s)")
    g.add_argument("--negatives", type=int, default=2, help="|N| drawn a step (paper: 5 to 8; default: %(default)s)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, default=80, help="default: %(default)s; the paper preset: one epoch")
    g.add_argument("--anchors", type=int, default=9, help="anchors a step (paper: 2 x 3; default: %(default)s)")
    g.add_argument("--lr", type=float, default=3e-4, help="paper: 2.2e-5; above 5e-4 a small model garbles (default: %(default)s)")
    g.add_argument("--warmup", type=int, default=8, help="steps to the full learning rate, then linear to 0 (default: %(default)s)")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm at most (default: %(default)s)")
    g.add_argument("--rank", type=int, default=16, help="LoRA r; its alpha is 2 r (default: %(default)s)")
    g.add_argument("--validation", type=float, default=0.1, help="share of mined lines held out (default: %(default)s)")
    g.add_argument("--every", type=int, default=20, help="steps between validations and saved states (default: %(default)s)")
    g.add_argument("--max-tokens", type=int, default=1024, help="tokens computed at once; more on a GPU (default: %(default)s)")
    g.add_argument("--budget", type=int, default=2048, help="tokens whose graph is held at once; steps above it take two passes (default: %(default)s)")
    g.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a third slower")
    g.add_argument("--shard", action="store_true", help="under torchrun: spread the frozen layers over the processes (FSDP), for a base that one device can't hold")
    g.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="auto: layers spread over this process' devices (default: %(default)s)")
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
            meta, store = dict(sorted((f.metadata() or {}).items())), {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as err:
        fail(f"{path}: not a safetensors file ({err}): run 02_build_prototypes.py again")
    if meta.get("format") != FORMAT:
        fail(f"{path}: format {meta.get('format')!r}, this needs {FORMAT!r}: run 02_build_prototypes.py again")
    return store, meta


def precision(dtype: str) -> dict:
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"dtype": torch.bfloat16, "quantization_config": nf4} if dtype == "nf4" else {"dtype": getattr(torch, dtype)}


def load_base(meta: dict, path: Path, device: torch.device | str):
    """The model the prototypes were made with, or an error that says how it differs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(meta["model"], device_map="auto" if device == "auto" else {"": device}, **precision(meta["dtype"]))
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


def draw(store: dict, anchors: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Sequence numbers: up to |P| and |N| of each anchor at random."""
    chosen = []
    for a in anchors.tolist():
        mine = (store["anchor"] == a).nonzero().flatten()
        for flag, n in ((True, args.positives), (False, args.negatives)):
            pool = mine[store["is_positive"][mine] == flag]
            fixed = int(store["context"][a] == 2)  # after a toxic sentence always its seed, to come near, and itself, to get away from
            chosen.append(torch.cat([pool[:fixed], pool[fixed:][torch.randperm(len(pool) - fixed, generator=generator)]])[:n])
    return torch.cat(chosen)


def padded(lengths: list[int], max_tokens: int) -> int:
    """Tokens that are computed for sequences of these lengths: theirs and the padding at rows' ends."""
    return sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in forwards(lengths, max_tokens))


def most(n: int, args: argparse.Namespace) -> int:
    return max(gather_object([n])) if args.shard else n  # of any process: gathering layers needs them all, as often


def lengths(store: dict, chosen: torch.Tensor) -> list[int]:
    return (store["offsets"][chosen + 1] - store["offsets"][chosen]).tolist()


def mixed(model):
    """Over a bfloat16 base LoRA computes in bfloat16 too; its weights stay in float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)


def phi(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    count = len(forwards(lengths(store, chosen), args.max_tokens))
    more = most(count, args) - count
    ids = [store["input_ids"][store["offsets"][i]:store["offsets"][i + 1]] for i in chosen.tolist()]
    with mixed(model):
        nll = model_nll(model, ids, store["start"][chosen].tolist(), args.max_tokens) if count else torch.zeros(0, device=model.device)  # (S,)
        for _ in range(more):  # forwards that count for nothing
            nll = nll + 0 * model_nll(model, [torch.zeros(2, dtype=torch.long)]).sum()
    return nll


def objective(nll: torch.Tensor, store: dict, chosen: torch.Tensor, args: argparse.Namespace, total: tuple[int, int] | None = None):
    """Mean of -log J over the chosen sequences' anchors, plus the positives' held level: |phi - the base's|, or after a toxic
    sentence phi itself, since there the base's is no aim; and statistics.
    total: anchors and positives to divide by, where these are only a part of the step's."""
    anchors, anchor = store["anchor"][chosen].unique(return_inverse=True)
    positive = store["is_positive"][chosen].bool().to(nll.device)
    base = store["prototype"][anchors].to(nll.device)  # (A,)
    if args.phi == "perplexity":
        base = base.exp()
    before = store["nll"][chosen].to(nll.device)
    J = lambda nll: cp_loss(nll, positive, anchor.to(nll.device), base if args.prototype == "base" else None,  # noqa: E731
                            alpha=args.alpha, tau=args.tau, phi=args.phi, distance=args.distance)
    loss, stats = J(nll)
    if args.only == "negatives":  # the paper's ablation: J with the positives as the base has them
        loss, _ = J(torch.where(positive, before, nll))
    stats["drift"] = (nll.detach() - before)[positive].mean()  # nats, from the base
    stats["prototype_drift"] = stats["prototype"] - base.mean()
    stats["cp"] = loss.detach().mean()  # -log J alone
    A, P = total or (len(loss), int(positive.sum()))
    level = (nll - before * (store["context"][anchors] < 2)[anchor].to(nll.device)).abs()
    return loss.sum() / A * (args.only != "positives") + args.hold * level[positive].sum() / P, stats


def backward(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace, total: tuple[int, int]):
    """Accumulates the objective's gradient, in one pass or, over the budget, in two; loss and statistics."""
    parts = pack(lengths(store, chosen), args.budget)  # whole sequences whose graph is held at once
    passes = most(len(parts), args)
    with torch.set_grad_enabled(passes == 1):
        nll = phi(model, store, chosen, args)
    at = nll.detach().requires_grad_()
    loss, stats = objective(at, store, chosen, args, total) if len(chosen) else (at.sum(), {})
    grad, = torch.autograd.grad(loss, at)  # (S,)
    if passes == 1:
        nll.backward(grad)
    else:
        for part in parts + [[]] * (passes - len(parts)):
            part = torch.tensor(part, dtype=torch.long)
            phi(model, store, chosen[part], args).backward(grad[part.to(grad.device)])
    return loss.detach(), stats


def batch(store: dict, train: torch.Tensor, args: argparse.Namespace, step: int) -> torch.Tensor:
    """Sequence numbers of a step: anchors in an order anew each epoch, a draw of each one's sets."""
    epoch, at = divmod(step * args.anchors, len(train))
    order = torch.cat([train[torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed * 1009 + e))] for e in (epoch, epoch + 1)])
    return draw(store, order[at:at + args.anchors].unique(), args, torch.Generator().manual_seed(args.seed * 100_003 + step))


def own(store: dict, chosen: torch.Tensor, rank: int) -> torch.Tensor:
    """The part of a step's sequences that a process takes: whole anchors."""
    anchors = store["anchor"][chosen].unique()
    return chosen[torch.isin(store["anchor"][chosen], anchors[rank::PartialState().num_processes])]


def utility_step(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Accumulates the gradient of --utility x KL(base || tuned) of next tokens, over six of the step's neutral sentences as running text."""
    some, mine = chosen[store["is_positive"][chosen].bool()][:6].tolist(), PartialState().is_main_process
    if not mine and not args.shard:
        return torch.zeros((), device=model.device)
    parts = [store["input_ids"][store["offsets"][i] + store["start"][i]:store["offsets"][i + 1]] for i in some]
    ids = torch.cat([store["input_ids"][:1], *parts]).long()[None].to(model.device)  # (1, T), about 120 tokens after a BOS
    with mixed(model):
        with torch.no_grad(), model.disable_adapter():
            base = model(ids).logits[0].float().log_softmax(-1)  # (T, V)
        tuned = model(ids).logits[0].float().log_softmax(-1)
    loss = mine * args.utility * F.kl_div(tuned, base, reduction="none", log_target=True).sum(1).mean()
    loss.backward()
    return loss.detach()


def train_step(model, store: dict, chosen: torch.Tensor, args: argparse.Namespace, stopped: list):
    """Gradients, loss and statistics of a step, and whether any process was told to stop, all summed over processes."""
    mine, anchors = own(store, chosen, PartialState().process_index), len(store["anchor"][chosen].unique())
    loss, stats = torch.zeros((), device=model.device), {}
    if len(mine) or args.shard:
        loss, stats = backward(model, store, mine, args, (anchors, int(store["is_positive"][chosen].sum())))
    if args.utility:
        loss = loss + utility_step(model, store, chosen, args)
    if PartialState().num_processes == 1:
        return loss, stats, bool(stopped)
    weight, trained = len(store["anchor"][mine].unique()) / anchors, [w for w in model.parameters() if w.requires_grad]
    extra = torch.stack([loss, loss.new_tensor(len(stopped)), *(weight * stats[k].to(loss) if stats else torch.zeros_like(loss) for k in STATS)])
    flat = [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in trained]
    *grads, extra = reduce(torch.cat([*flat, extra.to(flat[0])]), "sum").split([*map(len, flat), len(extra)])  # one message
    for w, g in zip(trained, grads):
        w.grad = g.view_as(w).clone()
    return extra[0], dict(zip(STATS, extra[2:])), bool(extra[1])


@torch.no_grad()
def validate(model, store: dict, anchors: torch.Tensor, args: argparse.Namespace) -> dict:
    """The objective and its statistics over held-out anchors, always the same draw; utility_drift is phi of the neutral sentences held
    out, bare where the store has them so, against the base's. criterion: -log J, and the nats by which neutral text became less likely."""
    held = torch.isin(store["seed"], store["seed"][anchors])  # (A,)
    bare = held & (store["context"] == 0)
    neutral = (store["is_positive"].bool() & (bare if bare.any() else held)[store["anchor"]]).nonzero().flatten()
    chosen = draw(store, anchors, args, torch.Generator().manual_seed(0))
    mine = torch.cat([chosen, neutral]).unique()[PartialState().process_index::PartialState().num_processes]
    own_nll = phi(model, store, mine, args)
    nll = reduce(torch.zeros(len(store["nll"]), device=own_nll.device).index_put((mine.to(own_nll.device),), own_nll), "sum")
    loss, stats = objective(nll[chosen], store, chosen, args)
    means = {"loss": loss.item(), **{k: v.item() for k, v in stats.items()}, "utility_drift": (nll.cpu() - store["nll"])[neutral].mean().item()}
    return means | {"criterion": means["cp"] + max(means["drift"], means["utility_drift"], 0.0)}


def peak_memory_gb(device: str) -> float:
    if device != "cpu" and torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def check(step: int, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        fail(f"loss is {values[0]}, gradient {values[-1]} at step {step}: the last saved state is kept; lower --lr")


def keep(path: Path, write) -> None:
    """Written aside and renamed: at any moment whole."""
    aside = path.with_suffix(".tmp")
    try:
        write(aside)
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as err:
        aside.unlink(missing_ok=True)
        fail(f"{path}: can't be written ({str(err).splitlines()[0][:80]}): make room; the same command continues from the last saved state")


def resume(args: argparse.Namespace, identity: str) -> dict:
    """The saved state of this very run, or a first one; another run's is moved out of the way, metrics are cut back to the state."""
    path, metrics = args.out / "state.pt", args.out.parent / "metrics.jsonl"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except Exception:  # torch has many kinds for a torn file
        print(f"{path} is torn: from the start", file=sys.stderr)
        state = {}
    if state.get("identity") != identity:
        state = {"identity": identity, "step": 0, "best": {"criterion": math.inf}}
    PartialState().wait_for_everyone()  # all have read, now one writes
    if PartialState().is_main_process:
        if not state["step"] and (path.exists() or (args.out / "adapter_model.safetensors").exists()):
            old = next(x for n in itertools.count(1) if not (x := args.out.with_name(f"{args.out.name}.{n}")).exists())
            if metrics.exists():
                os.replace(metrics, args.out / "metrics.jsonl")
            args.out.rename(old)
            print(f"{args.out} held a run of other options or data: it is kept in {old}")
        args.out.mkdir(parents=True, exist_ok=True)
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        keep(metrics, lambda x: x.write_text("".join(r for r in lines if r.endswith("}\n") and json.loads(r)["step"] <= state["step"])))
    return state


def shard(model, device: torch.device) -> None:
    """Each process keeps a part of every layer's frozen weights and gathers a layer as it is needed. Embeddings, head and LoRA
    stay whole, so that gradients and files are those of one process."""
    backbone = model.get_base_model().base_model
    layers = next(m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList))
    frozen = {w for w in layers.parameters() if not w.requires_grad}
    whole = set(model.parameters()) - frozen
    for module in (*layers, backbone):
        fully_shard(module, reshard_after_forward=True, ignored_params=whole)
    for w in whole:
        w.data = w.data.to(device)
    kept = sum(w.to_local().numel() for w in layers.parameters() if isinstance(w, DTensor))
    print(f"process {PartialState().process_index} keeps {kept:,} of the layers' {sum(w.numel() for w in frozen):,} weights")


def finish(model, best: dict, filled: list, meta: dict, args: argparse.Namespace) -> None:
    """The best state as a PEFT adapter and, if wanted, merged into the full-precision base: a rounded one would say other things."""
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(args.out)
    keep(args.out / "adapter_model.safetensors", lambda x: save_file(best["adapter"], x, {"format": "pt"}))
    waste = f"rows {sum(filled) / len(filled):.1%} full; " if filled else ""
    print(f"best state: step {best['step']}; {waste}peak memory {peak_memory_gb(args.device):.1f} GB; {args.out}")
    if args.merge:
        out = args.out.parent / "merged"
        base = transformers.AutoModelForCausalLM.from_pretrained(meta["model"], dtype=torch.float32)
        PeftModel.from_pretrained(base, args.out).merge_and_unload().save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(meta["model"]).save_pretrained(out)
        print(f"merged model: {out}")


def with_lora(base, args: argparse.Namespace):
    torch.manual_seed(args.seed)
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # no dropout, which would differ between a step's passes; layers recompute in training mode only
        module.training = isinstance(module, GradientCheckpointingLayer)
        module.cast_input_dtype_enabled = False  # peft's casts to float32 take half as long as the model; see `mixed`
    return model


def set_up(args: argparse.Namespace, store: dict, meta: dict, accelerator: Accelerator):
    """Model with LoRA, optimizer and schedule, as the saved state of this run has them; and that state."""
    several = accelerator.num_processes > 1
    device = accelerator.device if several else args.device
    if several and args.device == "auto" or args.shard and (not several or meta["dtype"] == "nf4"):
        fail("--device auto is for one process; --shard for several by torchrun, on a base that is not in 4 bits")
    model = with_lora(load_base(meta, args.prototypes, "cpu" if args.shard else device), args)
    if args.shard:
        shard(model, device)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / max(args.warmup, 1), max(args.steps - t, 0) / max(args.steps - args.warmup, 1)))
    shown = {k: str(v) for k, v in vars(args).items()}
    identity = repr(([(k, v) for k, v in shown.items() if k not in FREE], meta, [(k, torch.hash_tensor(v).item()) for k, v in sorted(store.items())]))
    state = resume(args, hashlib.sha256(identity.encode()).hexdigest())
    if state["step"]:
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if accelerator.is_main_process and state["step"] < args.steps:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {"options": shown, "prototypes": meta, "held_out": store["seed"][split_anchors(store, meta, args)[1]].unique().tolist(), "git": git,
                  "processes": accelerator.num_processes, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        keep(args.out / "run.json", lambda x: x.write_text(json.dumps(record, indent=1)))
    accelerator.init_trackers("contrastive-perplexity", shown)
    return model, optimizer, schedule, state


def choice(store: dict, train: torch.Tensor, args: argparse.Namespace, step: int) -> str:
    """One pass or two, by the next hundred steps."""
    world, coming = PartialState().num_processes, [batch(store, train, args, s) for s in range(step, args.steps)[:100]]
    sizes = [sum(lengths(store, own(store, chosen, r))) for chosen in coming for r in range(world)] or [0]
    return f"about {sum(sizes) * world // len(sizes)} tokens a step, " + (
        "one pass" if max(sizes) <= args.budget else f"up to {max(sizes)} at once, over --budget {args.budget}: there two passes, one more forward")


def main() -> None:
    args = options()
    store, meta = read_store(args.prototypes)
    train, val = split_anchors(store, meta, args)
    args.steps = args.steps or math.ceil(len(train) / args.anchors)
    accelerator = Accelerator(cpu=args.device == "cpu", log_with=args.track, project_dir=args.out.parent)
    first, world = accelerator.is_main_process, accelerator.num_processes
    model, optimizer, schedule, state = set_up(args, store, meta, accelerator)
    best, trained = state["best"], optimizer.param_groups[0]["params"]
    if first:
        print(f"{len(train)} anchors to train on, {len(val)} to validate; from step {state['step']} of {args.steps}; {choice(store, train, args, state['step'])}")
    stopped, stop, filled, utility = [], False, [], "-"
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stopped.append(number))

    log = open(args.out.parent / "metrics.jsonl" if first else os.devnull, "a", buffering=1, encoding="utf-8")
    with log, tqdm(total=args.steps, initial=state["step"], desc="training", unit="step", disable=not first) as bar:
        for step in range(state["step"] + 1, args.steps + 1):
            began = time.perf_counter()
            chosen = batch(store, train, args, step - 1)
            loss, stats, stop = train_step(model, store, chosen, args, stopped)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
            check(step, loss.item(), norm.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            tokens = sum(lengths(store, chosen))
            filled.append(tokens / sum(padded(lengths(store, own(store, chosen, r)), args.max_tokens) for r in range(world)))
            row = {"step": step, "split": "train", "loss": loss.item(), **{k: v.item() for k, v in stats.items()}, "grad_norm": norm.item(), "tokens": tokens,
                   "fill": filled[-1], "tokens_per_second": tokens / (time.perf_counter() - began), "peak_memory_gb": peak_memory_gb(args.device)}
            log.write(json.dumps(row) + "\n")
            accelerator.log(row, step)
            bar.update()
            bar.set_postfix_str("loss {loss:.2f} gap {gap:.2f} ranking {ranking:.2f} drift: prototype {prototype_drift:+.2f} utility {utility} "
                                "{tokens_per_second:.0f} tok/s".format(**row, utility=utility))
            due = step % args.every == 0 or step == args.steps
            if due:
                row = {"step": step, "split": "validation", **validate(model, store, val, args)}
                check(step, row["criterion"])
                log.write(json.dumps(row) + "\n")
                utility = f"{row['utility_drift']:+.2f}"
                if first:
                    tqdm.write("validation " + " ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "split"))
                if row["criterion"] <= best["criterion"]:
                    best = {"criterion": row["criterion"], "step": step, "adapter": {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}}
            if first and (due or stop):
                state |= {"step": step, "adapter": get_peft_model_state_dict(model), "best": best, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                keep(args.out / "state.pt", lambda x: torch.save(state, x))
            if stop:
                break
    accelerator.wait_for_everyone()
    if stop:
        raise KeyboardInterrupt
    if first:
        finish(model, best, filled, meta, args)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the state is saved, the same command continues from it", file=sys.stderr)
        raise SystemExit(130)
    except OSError as err:  # a full disk, mostly
        fail(f"{err}: the same command continues from the last saved state")
