"""Training speed, memory and time to a gap: ours, TRL's DPO, and the official code's arithmetic,
on the same mined sequences.

    .venv/bin/pip install --no-deps trl==1.16.0        # the peer
    .venv/bin/python tests/bench_training.py           # after `make all` or stage 02
    .venv/bin/python tests/bench_training.py --gap 1   # seconds to a gap 1 nat above the base's

Same base, same LoRA (weights in float32), AdamW, sequences drawn alike: 9 anchors a step, each with
a positive and two negatives after the same context. Ours is the whole step, --utility's passes over
neutral text in its time but not in its tokens; DPO pairs each negative with a positive, whose
tokens count each time since it computes them each time. Real tokens a second leave out padding. A
way has a process of its own; memory is its peak above what it held with the model loaded. Ways take
turns. The gap is stage 03's: negatives' mean phi less positives', here over 12 held-out anchors,
looked at every fourth step with the clock stopped; no warm-up or decay, so that nobody's schedule
decides.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tap import Tap

from bench_ablation import PAIRS, load_stage, pairs
from cp_loss import best_device

training = load_stage()
OPTIONS = PAIRS.replace("--utility 0 --hold 0 ", "")
WAYS = {
    "ours": 3e-4,
    "ours --utility 0": 3e-4,
    "ours --budget 400": 3e-4,
    "ours --checkpointing": 3e-4,
    "official": 2.2e-5,
    "trl": 1e-5,
    "trl checkpointing": 1e-5,
    "trl checkpointing precomputed pairwise": 1e-5,
}
RACE = [  # each at its usual rate, and at ours
    ("ours", 3e-4),
    ("official", 3e-4),
    ("official", 2.2e-5),
    ("trl", 1e-5),
    ("trl", 3e-4),
]


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in status if x.startswith(key))


def memory(device, peak: bool = False) -> float:
    if device.type == "cuda":
        cuda = torch.cuda
        return cuda.max_memory_allocated() if peak else cuda.memory_allocated()
    return resident("VmHWM" if peak else "VmRSS")


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def official(model, store, chosen, args):
    """All rows padded to the longest, logits of every position in float32, then the objective."""
    ids = [store.ids[i].long() for i in chosen]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (S, L)
    width, length = (
        torch.arange(batch.shape[1]),
        torch.tensor([len(x) for x in ids]),
    )
    real = width < length[:, None]
    scored = (real & (width >= store.start[chosen][:, None]))[:, 1:].to(
        model.device
    )
    batch = batch.to(model.device)
    with training.autocast(model):
        out = model(batch, attention_mask=real.to(model.device), use_cache=False)
    logp = out.logits[:, :-1].float().log_softmax(-1)
    token = -logp.gather(2, batch[:, 1:, None])[..., 0]  # (S, L - 1)
    nll = (token * scored).sum(1) / scored.sum(1)
    loss, _ = training.objective(nll.cpu(), store, chosen, args)
    loss.backward()


class Clock:
    """Seconds of training, the first step left out; with a target also the held-out gap, while the
    clock stands."""

    def __init__(self, model, store, args, target: float, limit: float):
        self.model, self.store, self.args = model, store, args
        self.target, self.limit, self.before = target, limit, memory(model.device)
        self.steps, self.seconds = -1, 0.0
        self.gaps = [self.gap()] if target else []
        self.start = time.perf_counter()

    @torch.no_grad()
    def gap(self) -> float:
        draw = training.draw(
            self.store, self.store.few, self.args, training.generator(0)
        )
        nll = training.phi(self.model, self.store, draw, self.args).cpu()
        return training.objective(nll, self.store, draw, self.args)[1]["gap"]

    def tick(self) -> bool:
        """After each step; whether to stop."""
        wait(self.model.device)
        self.steps += 1
        if self.steps or self.target:
            self.seconds += time.perf_counter() - self.start
        if self.target and self.steps % 4 == 3:
            self.gaps.append(self.gap())
        self.start = time.perf_counter()
        if not self.target:
            return False
        return (
            self.gaps[-1] >= self.gaps[0] + self.target or self.seconds > self.limit
        )

    def result(self, tokens: list) -> dict:
        rate = sum(tokens[1 : self.steps + 1]) / self.seconds
        peak = memory(self.model.device, True) - self.before
        out = {
            "rate": rate,
            "memory": peak,
            "seconds": self.seconds,
            "steps": self.steps + 1,
        }
        return out | ({"rise": self.gaps[-1] - self.gaps[0]} if self.target else {})


def train(step, model, optimizer, store, picks, args, clock) -> dict:
    """`step` of every pick, until the clock has enough."""
    for chosen in picks:
        step(model, store, chosen, args)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if clock.tick():
            break
    return clock.result(
        [sum(len(store.ids[i]) for i in chosen) for chosen in picks]
    )


def measure(way: str, lr: float, given) -> dict:
    kind, *more = way.split()
    own = more if kind == "ours" else []
    sys.argv = ["03", "--run", str(given.run), *OPTIONS.split(), *own]
    args = training.options()
    args.device = args.device or best_device()
    store, meta = training.read_store(args)
    order = torch.randperm(len(store.validation), generator=training.generator(0))
    store.few = store.validation[order[:12]]
    how = json.loads(meta["load"])
    base, tokenizer = training.load_model(meta["model"], args.device, **how)
    steps = 1000 if given.gap else given.steps
    picks = [training.batch(store, args, s) for s in range(1, steps + 2)]
    if kind == "trl":
        return dpo(more, base, tokenizer, store, picks, (lr, given, args))
    model = training.with_lora(base, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    clock = Clock(model, store, args, given.gap, given.limit)
    step = training.gradient if kind == "ours" else official
    return train(step, model, optimizer, store, picks, args, clock)


def preferences(tokenizer, store, picks) -> tuple:
    """Each negative with a positive of its anchor, and the tokens of each step's pairs."""
    from datasets import Dataset

    rows, sizes = [], []
    for chosen in picks:
        size = 0
        for winner, loser in zip(
            *(chosen[x].tolist() for x in pairs(store, chosen))
        ):
            start = int(store.start[winner])
            prompt = (
                tokenizer.decode(store.ids[winner][1:start]) or tokenizer.bos_token
            )
            good, bad = (
                tokenizer.decode(store.ids[i][start:]) for i in (winner, loser)
            )
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
            size += len(store.ids[winner]) + len(store.ids[loser])
        sizes.append(size)
    return Dataset.from_list(rows), sizes


def dpo(more: list, base, tokenizer, store, picks, settings: tuple) -> dict:
    import transformers
    from trl import DPOConfig, DPOTrainer

    lr, given, args = settings
    rows, sizes = preferences(tokenizer, store, picks)
    clocks, reference = [], []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            clocks.append(Clock(model, store, args, given.gap, given.limit))

        def on_step_end(self, _args, _state, control, **__):
            control.should_training_stop |= clocks[0].tick()

    class Trainer(DPOTrainer):
        def _precompute_ref_logps(self, *args):
            began = time.perf_counter()
            done = super()._precompute_ref_logps(*args)
            reference.append((time.perf_counter() - began) / len(picks))  # a step's
            return done

    torch.manual_seed(0)
    each = len(rows) // len(picks)
    small = each if "pairwise" in more else 1  # micro-batches of one pair
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=each // small,
            gradient_accumulation_steps=small,
            max_steps=len(picks),
            learning_rate=lr,
            lr_scheduler_type="constant",
            use_cpu=args.device == "cpu",
            bf16=base.dtype == torch.bfloat16,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing="checkpointing" in more,
            precompute_ref_log_probs="precomputed" in more,
            max_length=None,
        )
        trainer = Trainer(
            model=base,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=training.lora_config(args),
            callbacks=[Watch()],
        )
        trainer.train()
        trainer.model.unload()
    clocks[0].seconds += sum(reference) * clocks[0].steps
    return clocks[0].result(sizes)


class Options(Tap):
    run: Path = Path("runs/default")
    steps: int = 8  # timed a process
    turns: int = 2  # processes a way
    gap: float = 0  # race to this rise of the gap, nats
    limit: float = 300  # seconds a race takes at most
    way: str | None = None  # of a process
    lr: float | None = None  # of a process


def child(way: str, lr: float) -> dict:
    """What `measure` says in a process of its own."""
    task = [sys.executable, *sys.argv, "--way", way, "--lr", str(lr)]
    done = subprocess.run(task, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    form = RawDescriptionHelpFormatter
    args = Options(description=__doc__, formatter_class=form).parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.lr, args)))
        return
    if args.gap:
        print(
            "| way | learning rate | seconds | steps | rise |\n"
            + "| --- " * 5
            + "|"
        )
        for way, lr in RACE:
            got = child(way, lr)
            reached = "" if got["rise"] >= args.gap else "not in "
            took = f"{reached}{got['seconds']:.0f} | {got['steps']} | {got['rise']:+.2f}"
            print(f"| {way} | {lr:g} | {took} |", flush=True)
        return
    got = {way: [] for way in WAYS}
    for _ in range(args.turns):
        for way, lr in WAYS.items():
            got[way].append(child(way, lr))
    print(
        "| way | real tokens/s | ours / it | peak above the model, GB |\n| --- | --- | --- | --- |"
    )
    rate = {
        w: statistics.median(g["rate"] for g in some) for w, some in got.items()
    }
    for w, some in got.items():
        peak = statistics.median(g["memory"] for g in some) / 1e9
        print(
            f"| {w} | {rate[w]:.0f} | {rate['ours'] / rate[w]:.2f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
