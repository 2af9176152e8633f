"""The demo's training: an ordinary loop of AdamW, the same for pre-training and fine-tuning."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from surgery.demo.skills import Skill, training_items
from surgery.demo.tokens import IGNORED, encode

WARMUP_STEPS = 30


@dataclass(frozen=True)
class Schedule:
    """One training run: AdamW, `steps` steps, linear warm-up to `learning_rate`, then cosine to zero."""

    steps: int
    learning_rate: float


# Peak learning rates, found by measurement on the pre-trained and fine-tuned model alone: the first learns every
# general skill within a minute or so, the second, an ordinary quarter of it, the new skill within seconds.
PRE_TRAINING_RATE = 4e-3
FINE_TUNING_RATE = 1e-3


def train(
    model: LlamaForCausalLM,
    skills: Sequence[Skill],
    schedule: Schedule,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train `model` in place on batches that hold `share` items of each skill, never a held-out one.

    The loss is the cross-entropy of the answers' tokens. Same seed, torch and number of threads: the same weights.
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
