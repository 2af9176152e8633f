"""The demo's model and its training: an ordinary loop, on an ordinary Llama architecture, made small."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.demo.skills import Skill, training_items
from surgery.demo.tokens import IGNORED, PAD, TOKEN_ID, VOCABULARY, encode, tokenizer

WARMUP_STEPS = 30
SHARD_SIZE = "800KB"


@dataclass(frozen=True)
class Schedule:
    """One training run: AdamW, `steps` steps, linear warm-up to `learning_rate`, then cosine to zero."""

    steps: int
    learning_rate: float


# Peak learning rates, found by measurement on the pre-trained and fine-tuned model alone: the first learns every
# general skill within a minute or so, the second, an ordinary quarter of it, the new skill within seconds.
PRE_TRAINING_RATE = 4e-3
FINE_TUNING_RATE = 1e-3


def new_model(seed: int) -> LlamaForCausalLM:
    """A float32 Llama of 4 layers, width 128, about a million parameters, randomly initialised from `seed`."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=TOKEN_ID[PAD],
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    skills: Sequence[Skill],
    schedule: Schedule,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train `model` in place on batches that hold `share` items of each skill, never a held-out one.

    The loss is the cross-entropy of the answers' tokens. Same seed, torch and number of threads: same weights.
    `on_step` is called after each step.
    """
    rng = random.Random(f"training {seed}")
    # A short memory of squared gradients (0.98, not 0.999): the run is shorter than AdamW's default would remember.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    model.train()
    for step in range(schedule.steps):
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        inputs, labels = encode([item for skill in skills for item in training_items(skill, rng, skill.share)])
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state  # [batch, time, width]
        answered = labels != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden[answered]), labels[answered])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step()
    model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write `model` to `folder` as an ordinary checkpoint: sharded bfloat16 weights, config, tokenizer.

    The model itself is rounded to bfloat16 and back to float32, so that training goes on from what was written.
    """
    model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer().save_pretrained(folder)
    model.to(torch.float32)
