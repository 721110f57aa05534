#!/usr/bin/env python
"""Stage 03: LoRA fine-tuning with prototype contrastive perplexity (paper, section 3, equation 3).

Every step takes whole anchors and draws up to |P| positives and |N| negatives of each (by default
all that stage 02 keeps). Sequences are packed into rows, where an anchor's share their context; no
(tokens x vocabulary) tensor is made but for the few tokens of --utility. phi is one number a
sequence. So processes share out a step's sequences and exchange phi; each computes the same
objective and goes backward through its own sequences with its share of d loss / d phi. Where their
tokens exceed --budget, phi is taken without a graph first and the backward pass made a few
sequences at a time: exact, for one forward pass more.

reads   runs/default/prototypes.safetensors
writes  runs/default/adapter/            PEFT adapter (safetensors), its README, the tokenizer
        runs/default/adapter.training/   metrics.jsonl (a line a step; validation lines have
                                         "split": "validation"), run.json (options, versions),
                                         phi.png (phi before and after), state.pt (to resume)

    python 03_train_cp.py                        # 4 minutes on 2 CPU cores, 3.6 GB
    python 03_train_cp.py --preset paper         # the paper's objective and settings
    torchrun --nproc-per-node 8 -- 03_train_cp.py  # the same trajectory on 8 devices
    python 03_train_cp.py --steps 2 --anchors 2  # a tiny run
"""

import argparse
import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from tap import Tap
from tqdm import tqdm

FORMAT, CONTEXTS = "cp-prototypes-2", ("none", "seed", "toxic")
PAPER = (  # its objective and settings; one epoch, batch 2 x accumulation 3
    "--context none --phi perplexity --distance absolute --alpha 1 --hold 0 --utility 0 "
    "--lr 2.2e-5 --rank 16 --anchors 6 --positives 3 --negatives 5 --steps 0"
)
CARD = """\
# {model}, tuned with contrastive perplexity

Made to rewrite texts without an attribute (toxicity, by default) that its training negatives have
and its positives lack. Licence and language are those of {model} and of the mined texts.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter = "."  # this folder; adapter_config.json says where the base is
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
text = {prompt!r}.replace("{{}}", "That idiot forgot the damn tickets.")
text = (tokenizer.bos_token or tokenizer.eos_token) + text
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
said = model.generate(**ids, max_new_tokens=40, stop_strings="\\n", tokenizer=tokenizer)
print(tokenizer.decode(said[0, ids.input_ids.shape[1] :]))
```
"""
# May change when a run is continued: they change nothing but rounding.
FREE = ("preset", "run", "out", "budget", "checkpointing", "device")


class Count(int):
    """1 or more, below a billion"""

    least = 1

    def __new__(cls, text):
        if not cls.least <= int(text) < 10**9:
            raise argparse.ArgumentTypeError(f"{text}: must be {cls.__doc__}")
        return int(text)


class Whole(Count):
    """0 or more, below a billion"""

    least = 0


class Weight(float):
    """0 or more, finite"""

    def __new__(cls, text):
        if not 0 <= float(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be {cls.__doc__}")
        return float(text)


def fail(message):
    # one line, however many a library has, and of its own, bar or not
    tqdm.write(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    raise SystemExit(2)


class Options(Tap):
    preset: Literal["paper"] | None = None  # its settings; options still override them
    run: Path = Path("runs/default")  # folder of this run
    out: Path | None = None  # instead of RUN/adapter; OUT.training goes beside it
    # objective
    context: list[Literal[CONTEXTS]] = [*CONTEXTS]  # of those in the store (paper: none)
    phi: Literal["nll", "perplexity"] = "nll"  # paper: perplexity
    distance: Literal["absolute", "signed"] = "signed"  # paper: absolute
    prototype: Literal["batch", "base"] = "batch"
    """mean phi of the drawn positives (paper), or the base's: of perplexities the geometric"""
    alpha: Weight = 10.0  # of negatives; higher: cleaner, less similar (paper: 1.0, 1.1)
    tau: Weight = 1.0  # small: only near negatives count (ours)
    hold: Weight = 1.2  # of the positives' level, see `objective`; 0: they drift away (ours)
    utility: Weight = 10.0
    """of KL from the base on neutral text; 0: wiki perplexity rises (ours)"""
    positives: Count = 1  # |P| drawn (paper: 1 to 5)
    negatives: Count = 2  # |N| drawn (paper: 5 to 8)
    # optimisation
    steps: Whole = 60  # 0: one epoch (paper)
    anchors: Count = 9  # a step (paper: 2 x 3)
    lr: Weight = 5e-4  # (paper: 2.2e-5)
    rank: Count = 64  # LoRA r; its alpha is 2 r
    every: Count = 60  # steps between validations, saves
    budget: Count = 2048  # tokens at once; GPU: more
    checkpointing: bool = False  # less memory, a third slower
    seed: Whole = 0  # of anchors, draws and LoRA
    device: str | None = None  # auto: layers over all devices


Options.error = staticmethod(fail)


def options():
    form = argparse.RawDescriptionHelpFormatter
    how = {"description": __doc__, "formatter_class": form, "underscores_to_dashes": True}
    args = Options(**how).parse_args()
    if args.preset:
        args = Options(**how).parse_args(PAPER.split() + sys.argv[1:])
    args.out = args.out or args.run / "adapter"
    if not args.tau:
        fail("--tau must be above 0")
    return args


if __name__ == "__main__":
    options()  # slips and --help need not wait for what follows

logging.disable(logging.WARNING)  # libraries', of what we don't use
logging.captureWarnings(True)
os.environ["MPLBACKEND"] = "agg"  # a notebook names its own

import pandas as pd
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from accelerate.utils import reduce
from filelock import FileLock
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers.modeling_layers import GradientCheckpointingLayer

from cp_loss import cp_loss, fingerprint, load_model, model_nll


def generator(seed):
    return torch.Generator().manual_seed(seed)


# Data: which anchors, and which of their sequences


def read_store(args):
    """Stage 02's tensors by name, with `ids` and `size`, each sequence's tokens and their number,
    and `train` and `validation`, numbers of the anchors in use; its metadata."""
    path = args.run / "prototypes.safetensors"
    try:
        with safe_open(path, "pt") as f:
            meta, tensors = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}
    except (OSError, SafetensorError) as err:
        fail(f"{path}: not a safetensors file ({err}): run 02_build_prototypes.py first")
    if [meta.get("format"), meta.get("tensors")] != [FORMAT, fingerprint(tensors.items())]:
        fail(f"{path}: damaged, or its format not {FORMAT}: run 02_build_prototypes.py again")
    store = argparse.Namespace(**tensors)
    store.size = store.offsets.diff()
    store.ids = store.input_ids.split(store.size.tolist())
    wanted = torch.isin(store.context, torch.tensor([CONTEXTS.index(c) for c in args.context]))
    store.train = (wanted & ~store.held_out).nonzero().flatten()
    store.validation = (wanted & store.held_out).nonzero().flatten()
    fewest = min(len(store.train), len(store.validation), args.anchors)
    if fewest < PartialState().num_processes:
        fail(
            f"{path}: {len(store.train)} anchors to train on, {len(store.validation)} to validate, "
            f"{args.anchors} a step, with context {' '.join(args.context)}: a process needs one of "
            "each; mine more seeds or build these in stage 02"
        )
    most = [store.anchor[x].bincount().max() for x in (store.is_positive, ~store.is_positive)]
    if PartialState().is_main_process and (args.positives > most[0] or args.negatives > most[1]):
        tqdm.write(
            f"{path}: anchors hold at most {most[0]} positives and {most[1]} negatives: stage 02 "
            "keeps more by its --positives and --negatives",
            file=sys.stderr,
        )
    return store, meta


def draw(store, anchors: Tensor, args, random):
    """Sequence numbers: up to |P| and |N| of each anchor at random, the required ones first."""
    chosen = []
    for a in anchors:
        own = (store.anchor == a).nonzero().flatten()
        rank = torch.rand(len(own), generator=random) + store.required[own]
        order = own[rank.argsort(descending=True)]
        positive = store.is_positive[order]
        chosen += [order[positive][: args.positives], order[~positive][: args.negatives]]
    return torch.cat(chosen)


def batch(store, args, step) -> Tensor:
    """A step's sequences: anchors in random order, round after round, a draw of each one's sets."""
    order = torch.randperm(len(store.train), generator=generator(args.seed))
    at = torch.arange((step - 1) * args.anchors, step * args.anchors) % len(order)
    return draw(store, store.train[order[at]].unique(), args, generator(args.seed * 100_003 + step))


# Objective and gradient


def autocast(model):
    """Over a bfloat16 base LoRA computes in bfloat16 too; its weights stay in float32."""
    on = model.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=on)


def phi(model, store, chosen, args) -> Tensor:
    """Nats per token of each chosen sequence, (S,)."""
    ids, start = [store.ids[i] for i in chosen], store.start[chosen].tolist()
    # few at once are padded less; launches cost a GPU more
    at_once = 512 if model.device.type == "cpu" else args.budget
    with autocast(model):
        return model_nll(model, ids, start, at_once)


def shared_phi(model, store, chosen, args):
    """phi of all chosen sequences (S,) on the CPU, the places in it of those that this process
    computed, and their phi with its graph."""
    process = PartialState()
    places = torch.arange(len(chosen)).tensor_split(process.num_processes)[process.process_index]
    local = phi(model, store, chosen[places], args)
    everyone = torch.zeros(len(chosen), device=local.device)
    everyone[places.to(local.device)] = local.detach()
    return reduce(everyone, "sum").cpu(), places, local


def objective(nll: Tensor, store, chosen: Tensor, args):
    """The loss, and statistics, floats. Positives are held at the base's phi; after a toxic
    sentence, where the base's is no aim, they are made likelier."""
    anchors, anchor = store.anchor[chosen].unique(return_inverse=True)
    positive, base = store.is_positive[chosen], store.nll[chosen]  # (S,)
    prototype = None
    if args.prototype == "base":
        prototype = store.prototype[anchors]  # (A,)
        prototype = prototype.exp() if args.phi == "perplexity" else prototype
    loss, stats = cp_loss(
        nll,
        positive,
        anchor,
        prototype,
        alpha=args.alpha,
        tau=args.tau,
        phi=args.phi,
        distance=args.distance,
        aim=base * (store.context[anchors] != 2)[anchor],
        hold=args.hold,
    )
    stats["drift"] = (nll.detach() - base)[positive].mean()
    return loss.mean(), {name: value.item() for name, value in stats.items()}


def utility_step(model, store, chosen, args):
    """Accumulates the gradient of --utility x KL(base || tuned) of next tokens, over six of the
    step's neutral sentences as running text, about 120 tokens."""
    some = chosen[store.is_positive[chosen]][:6]
    texts = [store.ids[i][store.start[i] :] for i in some]
    ids = torch.cat([store.input_ids[:1], *texts])[None, :512]  # (1, T), a BOS first
    ids = ids.to(model.device)
    with autocast(model):
        model.base_model.disable_adapter_layers()  # model.disable_adapter() first inspects them all
        with torch.no_grad():
            base = model(ids).logits[0].float().log_softmax(-1)  # (T, V)
        model.base_model.enable_adapter_layers()
        tuned = model(ids).logits[0].float().log_softmax(-1)
    loss = args.utility * F.kl_div(tuned, base, reduction="batchmean", log_target=True)
    loss.backward()
    return loss.item()


def gradient(model, store, chosen, args):
    """Gives every process the gradient of the whole step; the step's loss and statistics."""
    process = PartialState()
    one_pass = store.size[chosen].sum().item() <= args.budget * process.num_processes
    with torch.set_grad_enabled(one_pass):
        nll, places, local = shared_phi(model, store, chosen, args)
    nll.requires_grad_()
    loss, stats = objective(nll, store, chosen, args)
    (share,) = torch.autograd.grad(loss, nll)
    share = share[places].to(local.device)
    if one_pass:
        local.backward(share)
    else:
        # of the part that a sequence is in
        number = store.size[chosen[places]].cumsum(0) // args.budget
        for part in (number == k for k in number.unique()):
            phi(model, store, chosen[places[part]], args).backward(share[part.to(share.device)])
    loss = loss.item()
    if args.utility and process.is_main_process:
        loss += utility_step(model, store, chosen, args)
    if process.num_processes > 1:
        grads = [w.grad for w in model.parameters() if w.grad is not None]
        vector_to_parameters(reduce(parameters_to_vector(grads), "sum"), grads)
    return loss, stats


def train_step(model, optimizer, store, args, step):
    """One step of the optimizer; its line of metrics."""
    began, chosen = time.perf_counter(), batch(store, args, step)
    loss, stats = gradient(model, store, chosen, args)
    (group,) = optimizer.param_groups
    norm = clip_grad_norm_(group["params"], 1.0).item()
    if not math.isfinite(loss + norm):
        fail(f"loss is {loss}, gradient {norm} at step {step}: the last state is kept; lower --lr")
    warmup = math.ceil(args.steps / 10)  # then linear to 0
    group["lr"] = args.lr * min(step / warmup, (args.steps - step + 1) / (args.steps - warmup + 1))
    optimizer.step()
    optimizer.zero_grad()
    row = {"step": step, "split": "train", "loss": loss, **stats, "grad_norm": norm}
    row["tokens"] = store.size[chosen].sum().item()
    row["tokens_per_second"] = row["tokens"] / (time.perf_counter() - began)
    memory = psutil.Process().memory_info().rss
    if model.device.type != "cpu":
        memory = torch.accelerator.max_memory_allocated(model.device)
    row["memory_gb"] = memory / 1e9
    return row


# Validation


def validate(model, store, args, step):
    """The objective and its statistics over held-out anchors, always the same draw; utility_drift
    is phi of their neutral sentences, bare where the store has them so, less the base's.
    criterion: -log J, and the nats by which neutral text became less likely. And phi (S,)."""
    held = store.held_out[store.anchor]
    nll = store.nll  # the base's, as step 0 has it
    if step:
        with torch.no_grad():
            now, _, _ = shared_phi(model, store, held.nonzero().flatten(), args)
        nll = nll.masked_scatter(held, now)
    chosen = draw(store, store.validation, args, generator(0))
    loss, stats = objective(nll[chosen], store, chosen, args)
    neutral = store.is_positive & held
    bare = neutral & (store.context == 0)[store.anchor]
    away = (nll - store.nll)[bare if bare.any() else neutral].mean().item()
    row = {"step": step, "split": "validation", "loss": loss.item(), **stats}
    row |= {"utility_drift": away, "criterion": row["cp"] + max(row["drift"], away, 0.0)}
    return row, nll


def draw_phi(nll, store, path):
    """Histograms of held-out sequences' phi less their anchor's prototype, before and after."""
    c = store.prototype[store.anchor]
    sets = ["positives" if good else "negatives" for good in store.is_positive]
    table = pd.DataFrame({"base": store.nll - c, "tuned": nll - c, "set": sets})
    held = table[store.held_out[store.anchor].numpy()]
    axes = held.plot.hist(
        by="set", bins=40, histtype="step", xlabel="phi less prototype, nats a token", sharex=True
    )
    axes[0].figure.savefig(path)


# Model, state and files


def lora_config(args):
    return LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def with_lora(base, args):
    torch.manual_seed(args.seed)
    model = get_peft_model(base, lora_config(args))
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    for module in [model.config, *model.modules()]:
        # no dropout, which would differ between passes; layers recompute in training mode only
        module.training = isinstance(module, GradientCheckpointingLayer)
        for name in vars(module):
            if "dropout" in name:  # which some call as a function
                setattr(module, name, 0.0)
        module.cast_input_dtype_enabled = False  # peft's casts to float32 are slow; see `autocast`
    return model


def write(path, save):
    """Aside, then renamed: at any moment whole."""
    aside = path.with_suffix(".tmp")
    try:
        save(aside)
        aside.replace(path)
    except (OSError, RuntimeError) as err:
        aside.unlink(missing_ok=True)
        fail(f"{path}: {str(err).splitlines()[0][:80]}: make room; the same command continues")


def resume(folder, args, record):
    """The last saved state of this very run, or a first one."""
    path = folder / "state.pt"
    state = {"step": 0, "rows": [], "best": math.inf, "record": record}
    try:
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch has many kinds for a torn file
        print(f"{path} is torn: from the start", file=sys.stderr)
    if args.out.exists() and not state["step"]:
        fail(f"{args.out} exists, without a whole state in {folder}: give another --out")
    other = [k for k in record if state["record"].get(k) != record[k]]
    if other:
        fail(f"{args.out}, {folder}: other {', '.join(other)}: remove both, or give another --out")
    return state


def set_up(meta, folder, args):
    """Model with LoRA, tokenizer, optimizer and state, as last saved."""
    process = PartialState()
    args.device = args.device or str(process.device)
    record = {k: str(getattr(args, k)) for k in args.class_variables if k not in FREE}
    record["prototypes"] = meta
    state = resume(folder, args, record)
    if reduce(torch.tensor(state["step"], device=process.device), "max") > state["step"]:
        fail(f"{folder}: lacks the state that another process has: share the folder")
    try:
        base, tokenizer = load_model(meta["model"], args.device, **json.loads(meta["load"]))
    except ValueError as err:
        fail(f"{err}: mend --device, or give 02_build_prototypes.py a --model that is there")
    if fingerprint(base.named_parameters()) != meta["model_sha256"]:
        fail(f"{meta['model']}: other weights than stage 02 saw: run 02_build_prototypes.py again")
    model = with_lora(base, args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    if state["step"]:
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    if process.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        record["device"] = args.device
        record["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
        write(folder / "run.json", lambda x: x.write_text(json.dumps(record, indent=1)))
        print(f"{base.dtype} on {args.device}, from step {state['step']} of {args.steps}")
    return model, tokenizer, optimizer, state


def save(folder, state):
    lines = [json.dumps(row) + "\n" for row in state["rows"]]
    write(folder / "metrics.jsonl", lambda x: x.write_text("".join(lines)))
    write(folder / "state.pt", lambda x: torch.save(state, x))


def export(model, tokenizer, meta, out):
    """What one would upload. Not atomic: a run killed here makes it anew before its next state."""
    try:
        out.mkdir(exist_ok=True)
        (out / "README.md").write_text(CARD.format(**meta), "utf-8")  # which peft adds to
        model.save_pretrained(out, save_embedding_layers=False)
        tokenizer.save_pretrained(out)
    except Exception as err:  # each library has its own for a full disk
        fail(f"{out}: {err}: make room; the same command continues")


def main():
    args = options()
    transformers.utils.logging.disable_progress_bar()
    process = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available())
    store, meta = read_store(args)
    args.steps = args.steps or math.ceil(len(store.train) / args.anchors)
    folder = Path(f"{args.out}.training")
    first, stopped = process.is_main_process, []
    lock = FileLock(f"{folder}.lock", 0)  # one run a folder
    if first:
        lock.acquire()
    model, tokenizer, optimizer, state = set_up(meta, folder, args)
    if not state["rows"]:
        state["rows"].append(validate(model, store, args, 0)[0])
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopped.append(True))

    bar = tqdm(range(state["step"] + 1, args.steps + 1), "training", disable=not first)
    for step in bar:
        row = train_step(model, optimizer, store, args, step)
        state["rows"].append(row)
        bar.set_postfix_str(
            f"loss {row['loss']:.2f} gap {row['gap']:.2f} drift {row['drift']:+.2f}"
        )
        stop = reduce(torch.tensor(len(stopped), device=model.device), "sum") > 0
        due = step % args.every == 0 or step == args.steps
        if due:
            row, nll = validate(model, store, args, step)
            state["rows"].append(row)
            if first and row["criterion"] <= state["best"]:
                state["best"] = row["criterion"]
                draw_phi(nll, store, folder / "phi.png")
                export(model, tokenizer, meta, folder / "best")
        if first and (due or stop):
            adapter, moments = get_peft_model_state_dict(model), optimizer.state_dict()
            save(folder, state | {"step": step, "adapter": adapter, "optimizer": moments})
        if stop:
            raise KeyboardInterrupt
    if first and not args.out.exists():
        (folder / "best").replace(args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the last state is kept, the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except (IndexError, OSError, RuntimeError) as err:  # a full disk, mostly
        fail(
            f"{str(err)[:300]}: the same command continues (a lock: another run holds it; memory: "
            "a lower --budget; an index: shorter texts); without OUT.training it begins anew"
        )
