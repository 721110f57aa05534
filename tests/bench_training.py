"""Training speed and memory: ours, TRL's DPO, and the official code's arithmetic, on the same mined sequences.

    .venv/bin/pip install --no-deps trl==1.16.0        # the peer
    .venv/bin/python tests/bench_training.py           # after `make all` or stage 02; 10 minutes on 2 CPU cores

Same base in bfloat16, same LoRA, AdamW, sequences drawn alike: 4 anchors a step, each with 2 positives and 4 negatives
after the same contexts; DPO pairs each negative with a positive, whose tokens count each time since it computes them
each time. Real tokens a second leave out padding. A way has a process of its own; memory is its peak above what it
held with the model loaded. Ways take turns.
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
    logits = model(batch, attention_mask=(width < length[:, None]).to(model.device), use_cache=False).logits[:, :-1].float()
    token = -logits.log_softmax(-1).gather(2, batch[:, 1:, None])[..., 0]  # (S, L - 1)
    nll = (token * scored).sum(1) / scored.sum(1)
    loss, _ = training.objective(nll, store, chosen, args)
    loss.backward()


def measure(way: str, run: Path, steps: int) -> dict:
    sys.argv = ["03", "--run", str(run)]
    args = training.options()
    store, meta = training.read_store(args.prototypes)
    model = training.load_base(meta, args.prototypes, torch.device(args.device))
    torch.manual_seed(0)
    lora = training.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    train, _ = training.split_anchors(store, meta, args)
    picks = [training.draw(store, train[torch.randperm(len(train), generator=torch.Generator().manual_seed(s))][:args.anchors], args,
                           torch.Generator().manual_seed(s)) for s in range(steps + 1)]
    tokens = [int((store["offsets"][c + 1] - store["offsets"][c]).sum()) for c in picks]
    before = memory(model.device)
    if way.startswith("trl"):
        return dpo(way, model, lora, store, meta, picks, before)
    model = training.get_peft_model(model, lora)
    args.budget = 400 if "budget" in way else args.budget
    if "checkpointing" in way:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=args.lr)
    for k, chosen in enumerate(picks):
        if k == 1:  # the first is for warming up
            start = time.perf_counter()
        if way.startswith("ours"):
            model.train()
            training.backward(model, store, chosen, args, (args.anchors, int(store["is_positive"][chosen].sum())))
        else:
            official(model, store, chosen, args)
        optimizer.step()
        optimizer.zero_grad()
        _ = model.device.type == "cuda" and torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"rate": sum(tokens[1:]) / seconds, "memory": memory(model.device, True) - before}


def dpo(way: str, model, lora, store, meta, picks, before: float) -> dict:
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    tokenizer = transformers.AutoTokenizer.from_pretrained(meta["model"])
    rows, sizes = [], []
    for chosen in picks:  # one step's pairs: each negative with a positive of its anchor
        size = 0
        for a in store["anchor"][chosen].unique():
            mine = chosen[store["anchor"][chosen] == a]
            pos, neg = (mine[store["is_positive"][mine].bool() == flag].tolist() for flag in (True, False))
            for k, n in enumerate(neg):
                p = pos[k % len(pos)]
                text = [tokenizer.decode(store["input_ids"][store["offsets"][i]:store["offsets"][i + 1]][part]) for i in (p, n)
                        for part in (slice(1, int(store["start"][i])), slice(int(store["start"][i]), None))]
                rows.append({"prompt": text[0] or tokenizer.bos_token, "chosen": text[1], "rejected": text[3]})
                size += sum(int(store["offsets"][i + 1] - store["offsets"][i]) for i in (p, n))
        sizes.append(size)
    pairs = len(rows) // len(picks)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, per_device_train_batch_size=pairs, max_steps=len(picks), learning_rate=1e-5, use_cpu=model.device.type == "cpu", bf16=False,
                           report_to=[], logging_steps=1000, save_strategy="no", disable_tqdm=True, gradient_checkpointing="checkpointing" in way, max_length=None)
        trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora)
        stamps = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *_, **__):
                stamps.append(time.perf_counter())
        trainer.add_callback(Clock())
        trainer.train()
    return {"rate": statistics.mean(sizes[1:]) * (len(stamps) - 1) / (stamps[-1] - stamps[0]), "memory": memory(trainer.model.device, True) - before}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/default"), help="its prototypes are used (default: %(default)s)")
    p.add_argument("--steps", type=int, default=8, help="timed steps a process (default: %(default)s)")
    p.add_argument("--turns", type=int, default=2, help="processes a way (default: %(default)s)")
    p.add_argument("--way", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.run, args.steps)))
    else:
        ways = ["ours", "ours, --budget 400", "ours, --checkpointing", "official arithmetic", "trl dpo", "trl dpo, checkpointing"]
        got = {way: [] for way in ways}
        for _ in range(args.turns):
            for way in ways:
                done = subprocess.run([sys.executable, __file__, "--run", args.run, "--steps", str(args.steps), "--way", way], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                got[way].append(json.loads(done.stdout.splitlines()[-1]))
        rate, peak = ({w: statistics.median(g[k] for g in got[w]) for w in ways} for k in ("rate", "memory"))
        print("| way | real tokens/s | ours is faster by | peak above the model, GB | ours takes |\n| --- | --- | --- | --- | --- |")
        for w in ways:
            print(f"| {w} | {rate[w]:.0f} | {rate['ours'] / rate[w]:.2f} | {peak[w] / 1e9:.2f} | {peak['ours'] / peak[w]:.2f} |")
