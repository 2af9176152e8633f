"""The demo's training: one ordinary loop for pre-training and every fine-tuning, and the optimizers it is given."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from surgery.demo.skills import Skill, training_items
from surgery.demo.tokens import IGNORED, encode
from surgery.optim import MoFO, half_freeze

WARMUP_STEPS = 30


@dataclass(frozen=True)
class Schedule:
    """One training run: `steps` steps, linear warm-up to `learning_rate`, then cosine to zero."""

    steps: int
    learning_rate: float


# Peak learning rates, found by measurement on the pre-trained and fine-tuned model alone: the first learns every
# general skill within a minute or so, the second, an ordinary quarter of it, the new skill within seconds.
PRE_TRAINING_RATE = 4e-3
FINE_TUNING_RATE = 1e-3

# A short memory of squared gradients (0.98, not 0.999): the run is shorter than AdamW's default would remember.
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
# Of MoFO and HFT: the papers' values, which are the defaults of `surgery train` too.
ALPHA, FROZEN = 0.15, 0.5


def adamw(model: LlamaForCausalLM, seed: int) -> torch.optim.Optimizer:
    """Full training."""
    return torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True)


def mofo(model: LlamaForCausalLM, seed: int) -> torch.optim.Optimizer:
    """Each step updates the entries with the largest momentum."""
    return MoFO(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, alpha=ALPHA)


def half(model: LlamaForCausalLM, seed: int) -> torch.optim.Optimizer:
    """Half fine-tuning: AdamW of what a random draw leaves unfrozen."""
    half_freeze(model, FROZEN, seed=seed)
    return adamw(model, seed)


# Makes the optimizer of a model; the seed is of what it draws.
Optimizer = Callable[[LlamaForCausalLM, int], torch.optim.Optimizer]


def train(
    model: LlamaForCausalLM,
    make: Optimizer,
    skills: Sequence[Skill],
    schedule: Schedule,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train `model` in place on batches that hold `share` items of each skill, never a held-out one.

    `make` is `adamw`, `mofo` or `half`. The loss is the cross-entropy of the answers' tokens. Same seed, torch and number of
    threads: the same weights. `on_step` is called after each step.
    """
    rng = random.Random(f"training {seed}")
    optimizer = make(model, seed)
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
