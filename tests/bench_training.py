"""Training speed, memory and time to a gap: ours, TRL's DPO, and the official code's arithmetic, on the same mined sequences.

    .venv/bin/pip install --no-deps trl==1.16.0        # the peer
    .venv/bin/python tests/bench_training.py           # after `make all` or stage 02
    .venv/bin/python tests/bench_training.py --gap 1   # seconds of training to a gap 1 nat above the base's, each way in a process of its own

Same base in bfloat16, same LoRA (computed in bfloat16, weights in float32), AdamW, sequences drawn alike: 7
anchors a step, each with 2 positives and 2 negatives after the same contexts. Ours is the whole step, --utility's two
passes over neutral text in its time but not in its tokens; DPO pairs each negative with a positive, whose tokens count each
time since it computes them each time. Real tokens a second leave out padding. A way has a process of its own; memory is
its peak above what it held with the model loaded. Ways take turns. The gap is stage 03's: negatives' mean phi less
positives', here over 12 held-out anchors, looked at every fourth step with the clock stopped; no warm-up or decay, so that
nobody's schedule decides.
"""
import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_ablation import TWO, pairs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
spec = importlib.util.spec_from_file_location("training", ROOT / "03_train_cp.py")
training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)


def resident(key: str) -> int:
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))


def memory(device, peak: bool = False) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resident("VmHWM" if peak else "VmRSS")


def official(model, store, chosen, args):
    """All rows padded to the longest, logits of every position in float32, then the objective."""
    ids = [store["input_ids"][store["offsets"][i]:store["offsets"][i + 1]].long() for i in chosen.tolist()]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)  # (S, L)
    width, start = torch.arange(batch.shape[1]), store["start"][chosen]
    length = torch.tensor([len(x) for x in ids])
    scored = ((width >= start[:, None]) & (width < length[:, None]))[:, 1:].to(model.device)
    with training.mixed(model):
        logits = model(batch, attention_mask=(width < length[:, None]).to(model.device), use_cache=False).logits[:, :-1].float()
    token = -logits.log_softmax(-1).gather(2, batch[:, 1:, None])[..., 0]  # (S, L - 1)
    nll = (token * scored).sum(1) / scored.sum(1)
    loss, _ = training.objective(nll, store, chosen, args)
    loss.backward()


class Clock:
    """Seconds of training, the first step left out; with a target also the held-out gap, while the clock stands."""

    def __init__(self, model, store, val, args, target: float, limit: float):
        self.model, self.store, self.val, self.args, self.target, self.limit = model, store, val, args, target, limit
        self.steps, self.seconds, self.gaps = -1, 0.0, [self.gap()] if target else []
        self.start = time.perf_counter()

    def gap(self) -> float:
        return training.validate(self.model, self.store, self.val, self.args)["gap"]

    def tick(self) -> bool:
        """After each step; whether to stop."""
        _ = self.model.device.type == "cuda" and torch.cuda.synchronize()
        self.steps += 1
        self.seconds += time.perf_counter() - self.start if self.steps or self.target else 0
        if self.target and self.steps % 4 == 3:
            self.gaps.append(self.gap())
        self.start = time.perf_counter()
        return bool(self.target) and (self.gaps[-1] >= self.gaps[0] + self.target or self.seconds > self.limit)

    def result(self, tokens: list, before: float) -> dict:
        gap = {"seconds": self.seconds, "steps": self.steps + 1, "rise": self.gaps[-1] - self.gaps[0]} if self.target else {}
        return {"rate": sum(tokens[1:self.steps + 1]) / self.seconds, "memory": memory(self.model.device, True) - before, **gap}


def measure(way: str, lr: float, run: Path, steps: int, target: float, limit: float) -> dict:
    kind, *more = way.split()
    sys.argv = ["03", "--run", str(run), *TWO.split(), *(more if kind == "ours" else [])]
    args = training.options()
    store, meta = training.read_store(args.prototypes)
    model = training.load_base(meta, args.prototypes, torch.device(args.device))
    train, val = training.split_anchors(store, meta, args)
    picks = [training.batch(store, train, args, s) for s in range(steps + 1)]
    tokens = [sum(training.lengths(store, c)) for c in picks]
    val = val[torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:12]]
    before = memory(model.device)
    if kind == "trl":
        lora = training.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return dpo(more, model, lora, lr, store, meta, picks, before, lambda model: Clock(model, store, val, args, target, limit))
    model = training.with_lora(model, args)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    clock = Clock(model, store, val, args, target, limit)
    for chosen in picks:
        if kind == "ours":
            training.train_step(model, store, chosen, args, [])
        else:
            official(model, store, chosen, args)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if clock.tick():
            break
    return clock.result(tokens, before)


def dpo(more: list, model, lora, lr: float, store, meta, picks, before: float, make_clock) -> dict:
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    tokenizer = transformers.AutoTokenizer.from_pretrained(meta["model"])
    rows, sizes = [], []
    for chosen in picks:  # one step's pairs: each negative with a positive of its anchor
        size = 0
        for p, n in zip(*(chosen[x].tolist() for x in pairs(store, chosen))):
            text = [tokenizer.decode(store["input_ids"][store["offsets"][i]:store["offsets"][i + 1]][part]) for i in (p, n)
                    for part in (slice(1, int(store["start"][i])), slice(int(store["start"][i]), None))]
            rows.append({"prompt": text[0] or tokenizer.bos_token, "chosen": text[1], "rejected": text[3]})
            size += sum(int(store["offsets"][i + 1] - store["offsets"][i]) for i in (p, n))
        sizes.append(size)
    count, clocks, reference = len(rows) // len(picks), [], []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            clocks.append(make_clock(model))

        def on_step_end(self, _, state, control, **__):
            control.should_training_stop |= clocks[0].tick()

    class Trainer(DPOTrainer):
        def _precompute_ref_logps(self, *args):
            began = time.perf_counter()
            done = super()._precompute_ref_logps(*args)
            reference.append((time.perf_counter() - began) / len(picks))  # a step's part of it
            return done
    small = count if "pairwise" in more else 1  # micro-batches of one pair
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, per_device_train_batch_size=count // small, gradient_accumulation_steps=small, max_steps=len(picks), learning_rate=lr,
                           lr_scheduler_type="constant", use_cpu=model.device.type == "cpu", bf16=True, report_to=[], logging_steps=1000, save_strategy="no",
                           disable_tqdm=True, gradient_checkpointing="checkpointing" in more, precompute_ref_log_probs="precomputed" in more, max_length=None)
        trainer = Trainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora, callbacks=[Watch()])
        trainer.train()
    clocks[0].seconds += sum(reference) * clocks[0].steps
    return clocks[0].result(sizes, before)


WAYS = {"ours": 3e-4, "ours --utility 0": 3e-4, "ours --budget 400": 3e-4, "ours --checkpointing": 3e-4, "ours --checkpointing --budget 100 --max-tokens 100": 3e-4, "official": 2.2e-5,
        "trl": 1e-5, "trl checkpointing": 1e-5, "trl checkpointing precomputed pairwise": 1e-5}
RACE = [("ours", 3e-4), ("official", 3e-4), ("official", 2.2e-5), ("trl", 1e-5), ("trl", 3e-4)]  # each at its usual rate, and at ours

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/default"), help="its prototypes are used (default: %(default)s)")
    p.add_argument("--steps", type=int, default=8, help="timed steps a process (default: %(default)s)")
    p.add_argument("--turns", type=int, default=2, help="processes a way (default: %(default)s)")
    p.add_argument("--gap", type=float, default=0, help="race to this rise of the held-out gap, in nats, instead")
    p.add_argument("--limit", type=float, default=300, help="seconds of training a race takes at most (default: %(default)s)")
    p.add_argument("--way", help=argparse.SUPPRESS)
    p.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.lr, args.run, args.steps, args.gap, args.limit)))
        sys.exit()

    def child(way: str, lr: float) -> dict:
        command = [sys.executable, __file__, "--run", args.run, "--steps", str(1000 if args.gap else args.steps), "--gap", str(args.gap), "--limit", str(args.limit)]
        done = subprocess.run([*command, "--way", way, "--lr", str(lr)], capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else sys.exit(done.stderr[-2000:])
    if args.gap:
        print(f"| way | learning rate | seconds to +{args.gap:g} nats | steps | rise |\n| --- | --- | --- | --- | --- |")
        for way, lr in RACE:
            got = child(way, lr)
            print(f"| {way} | {lr:g} | {'' if got['rise'] >= args.gap else 'not in '}{got['seconds']:.0f} | {got['steps']} | {got['rise']:+.2f} |", flush=True)
        sys.exit()
    got = {way: [] for way in WAYS}
    for _ in range(args.turns):
        for way, lr in WAYS.items():
            got[way].append(child(way, lr))
    rate, peak = ({w: statistics.median(g[k] for g in got[w]) for w in WAYS} for k in ("rate", "memory"))
    print("| way | real tokens/s | ours is faster by | peak above the model, GB | ours takes |\n| --- | --- | --- | --- | --- |")
    for w in WAYS:
        print(f"| {w} | {rate[w]:.0f} | {rate['ours'] / rate[w]:.2f} | {peak[w] / 1e9:.2f} | {peak['ours'] / peak[w]:.2f} |")
