"""TRL's trainers, with additions: no network, counts of truncated rows, the pull towards θ0, a stop when the loss is not finite.

The training loop, the loss, the cutting and packing of rows are TRL's and transformers' own; for preferences all of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from surgery.data.rows import Row
from surgery.errors import OptionError
from surgery.optim import MoFO, fused_blocks
from surgery.train import sharding
from surgery.train.adapter import adapter_config
from surgery.train.encode import IGNORED, Encoded
from surgery.train.holds.hold import Hold
from surgery.train.holds.memory import resting
from surgery.train.losses import ASKING, LOSSES, NORMAL, Loss, Strength
from surgery.train.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "sqrt": "inverse_sqrt"}
# A logged step: its number, of how many, and what the trainer says of it.
Advance = Callable[[int, int, dict[str, float]], None]


class _Glue:
    """The additions that both trainers share.

    Attributes:
        cut: of each data set, rows longer than the limit: (truncated, dropped since nothing to learn was left).
        alike: pairs of which both answers are the same after the cut; they are left out.
    """

    def __init__(self, *args: Any, holds: Sequence[Hold], **kwargs: Any) -> None:
        self.holds, self.cut, self.alike = holds, dict[str, tuple[int, int]](), 0
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Do nothing: TRL would report the run to its authors."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: surgery writes a model card of its own."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer. MoFO is told which parameters hold several blocks, as they are now: sharding replaces them."""
        inner: Any = self
        kind, options = inner.optimizer_cls_and_kwargs
        if kind is MoFO:
            inner.optimizer_cls_and_kwargs = kind, {**options, "blocks": fused_blocks(inner.model)}
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        inner: Any = self
        with ExitStack() as passing:
            for hold in self.holds:
                passing.enter_context(hold.passing(inner.model))
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if inner.accelerator.sync_gradients:  # the last part of a step
            for hold in self.holds:
                hold.gradients(inner.model)
        return loss


@dataclass(frozen=True)
class Objective:
    """A term that is minimised beside or in place of the data's negative log-likelihood.

    Attributes:
        name: of the loss, "nll" or one of `surgery.train.losses`.
        strength: of it.
        start: the start model, where the loss asks it and there is no adapter to take off.
        own: rows of own text, and λ of their loss.
    """

    name: str = "nll"
    strength: Strength = NORMAL
    start: PreTrainedModel | None = None
    own: tuple[Sequence[Encoded], float] = ((), 0.0)


class Sft(_Glue, SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning."""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        self.objective, self.part = objective, 0
        super().__init__(*args, **kwargs)
        if objective.start is not None:
            start: Any = objective.start
            start.requires_grad_(False).eval().to(self.accelerator.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a part of a batch. What is held out is always scored by the negative log-likelihood."""
        name = self.objective.name if self.model.training else "nll"
        self.args.loss_type = "dft" if name == "dft" else "nll"
        asked = partial(self._weighed, model, LOSSES[name]) if name in LOSSES else model
        loss = super().compute_loss(asked, inputs, return_outputs, num_items_in_batch)
        rows, weight = self.objective.own
        if rows and self.model.training:
            found = model(**self._own(rows), use_cache=False, fused_lm_head=True)
            own = -found.log_probs.sum() / found.label_mask.sum().clamp(min=1)
            self._metrics["train"]["own_loss"].append(float(own.detach()))
            # As a part of a mean over the parts of a step, which the trainer takes by itself where it counts no tokens.
            loss = loss + weight * own / (self.parts if num_items_in_batch is not None else 1)
        return loss

    @property
    def parts(self) -> int:
        """Parts that a step's batch goes through the model in."""
        return int(self.args.gradient_accumulation_steps)

    def _own(self, rows: Sequence[Encoded]) -> Any:
        """The next passages, which depend on the step alone: a run that is resumed goes on with the same ones."""
        count = self.args.per_device_train_batch_size
        turn = (self.state.global_step * self.parts + self.part) * self.accelerator.num_processes
        begin = (turn + self.accelerator.process_index) * count
        self.part = (self.part + 1) % self.parts
        batch = self.data_collator([rows[(begin + place) % len(rows)] for place in range(count)])
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _weighed(self, model: Any, loss: Loss, **inputs: Any) -> FusedCausalLMOutput:
        """Run the model on a batch; its output has minus the loss of each token where its log-probability stands else."""
        labels, _ = inputs.pop("labels")[:, 1:], inputs.pop("fused_lm_head")
        seen = labels != IGNORED
        found = model(**inputs)
        logits, targets = found.logits[:, :-1][seen].float(), labels[seen]
        start = self._start(inputs)[:, :-1][seen].float() if self.objective.name in ASKING else None
        each = loss(logits, targets, start, self.objective.strength)
        with torch.no_grad():
            logs = torch.log_softmax(logits, -1)
            fields = {
                "log_probs": -each,
                "entropy": -(logs.exp() * logs).sum(-1),
                "is_top1": (logits.argmax(-1) == targets).float(),
            }

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(seen.shape).masked_scatter(seen, values)

        told = {name: spread(values) for name, values in {**fields, "log_probs": -each}.items()}
        return FusedCausalLMOutput(**told, label_mask=seen, aux_loss=getattr(found, "aux_loss", None))

    @torch.no_grad()
    def _start(self, inputs: Any) -> torch.Tensor:
        """The start model's logits."""
        if self.objective.start is not None:
            return self.objective.start(**inputs).logits  # type: ignore[no-any-return]
        plain: Any = self.accelerator.unwrap_model(self.model)
        with resting(plain), plain.disable_adapter():
            return plain(**inputs).logits  # type: ignore[no-any-return]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        whole = super()._prepare_dataset(dataset, processing_class, _unlimited(args), False, *rest)
        long = sum(len(tokens) > args.max_length for tokens in whole["input_ids"])
        done = super()._prepare_dataset(whole, processing_class, args, packing, *rest)
        dropped = 0 if packing else len(whole) - len(done)
        self.cut[rest[-1]] = (long - dropped, dropped)
        _check_left(done, args)
        return done


class Dpo(_Glue, DPOTrainer):  # type: ignore[misc]
    """Direct preference optimisation."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        whole = super()._prepare_dataset(dataset, processing_class, _unlimited(args), name)
        limit = args.max_length
        done = whole.filter(lambda row: len(row["prompt_ids"]) < limit)
        long = sum(
            len(prompt) + max(len(chosen), len(rejected)) > limit
            for prompt, chosen, rejected in zip(
                done["prompt_ids"], done["chosen_ids"], done["rejected_ids"], strict=True
            )
        )
        self.cut[name] = (long, len(whole) - len(done))
        _check_left(done, args)
        apart = done.filter(lambda row: _cut(row, "chosen_ids", limit) != _cut(row, "rejected_ids", limit))
        self.alike += len(done) - len(apart)
        if not len(apart):
            raise OptionError(
                f"The two answers of every pair are the same in the first {limit} tokens, so there is nothing to learn. Raise "
                "`seq_len`, or correct the data."
            )
        return apart


def _cut(row: Any, answer: str, limit: int) -> list[int]:
    """An answer as far as it fits behind its prompt."""
    return list(row[answer][: limit - len(row["prompt_ids"])])


class Afterwards(TrainerCallback):
    """Lets the holds change the weights after each step."""

    def __init__(self, holds: Sequence[Hold]) -> None:
        self.holds = holds

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        optimizer = given["optimizer"]
        for hold in self.holds:
            hold.stepped(model, getattr(optimizer, "optimizer", optimizer))


class Watch(TrainerCallback):
    """Stop a training whose loss or gradient is not finite, before the trainer saves that state."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        for name, value in (("loss", logs["loss"]), ("norm of the gradient", logs.get("grad_norm", 0.0))):
            if not math.isfinite(value):
                raise OptionError(
                    f"Step {state.global_step}: the {name} is {value}, so training was stopped. Lower `lr`, or look for broken "
                    "rows in the data."
                )
        self.advance(state.global_step, state.max_steps, logs)


def build(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    held_out: list[Row],
    *,
    reference: PreTrainedModel | None,
    holds: Sequence[Hold],
    objective: Objective,
    folder: Path,
    processes: int,
    seed: int,
    epochs: float,
    advance: Advance,
) -> Sft | Dpo:
    """Make the trainer of one round.

    Args:
        rows, held_out: encoded (`surgery.train.encode`), or preferences.
        reference: the start model again, for DPO on all weights.
        holds: what keeps the training near its start.
        objective: of a training that is not on preferences.
        folder: what the trainer saves on its way.
        seed: of the order of the rows.
        epochs: times through the rows.

    Raises:
        OptionError: no row is short enough to learn from, or there is a token that the model does not have.
    """
    from datasets import Dataset

    embedding: Any = model.get_input_embeddings()
    padding = tokenizer.pad_token_id
    if padding is not None and padding >= embedding.num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do that the model has
    at_once, parts = settings.parts(processes)
    accelerated = torch.cuda.is_available()
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": at_once,
        "per_device_eval_batch_size": at_once,
        "gradient_accumulation_steps": parts,
        "num_train_epochs": epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.rate,
        "lr_scheduler_type": SCHEDULERS[settings.schedule],
        "lr_scheduler_kwargs": {"timescale": 1}
        if settings.schedule == "sqrt"
        else None,  # η / √t, t = 1 after the warm-up
        "warmup_steps": settings.warmup if settings.warmup < 1 else int(settings.warmup),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "max_length": settings.seq_len,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 1,
        "save_total_limit": 1,
        "eval_strategy": "no" if not held_out else "steps" if settings.eval_every else "epoch",
        "eval_steps": settings.eval_every or 1,
        "use_cpu": not torch.accelerator.is_available(),  # else processes on CPUs would not find each other
        "bf16": accelerated and torch.cuda.is_bf16_supported() and settings.dtype == "float32",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": seed,
        "data_seed": seed,
        "report_to": [] if settings.log == "none" else [settings.log],
        "disable_tqdm": True,
        "dataloader_pin_memory": accelerated,
        "ddp_find_unused_parameters": False,
        "log_level_replica": "error",  # the first process says what there is to say
        **(sharding.OPTIONS if settings.fsdp else {}),
    }
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_list(rows),
        "eval_dataset": Dataset.from_list(held_out) if held_out else None,
        "processing_class": tokenizer,
        "callbacks": [Watch(advance), Afterwards(holds)],
        "peft_config": adapter_config(settings) if settings.task == "dpo" else None,  # else it is on
        "holds": holds,
    }
    config: Any
    if settings.task == "dpo":
        config = DPOConfig(**options, beta=settings.beta)
    else:
        config = SFTConfig(**options, packing=settings.packing, eval_packing=False)
    if settings.fsdp:
        sharding.allow_on_cpu()
    trainer: Sft | Dpo
    if settings.task == "dpo":
        trainer = Dpo(args=config, ref_model=reference, **common)
    else:
        trainer = Sft(args=config, objective=objective, **common)
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        if dataset is not None:
            _check_tokens(dataset, tokenizer, embedding.num_embeddings)
    trainer.optimizer_cls_and_kwargs = optimizer(settings)  # which DPOTrainer does not take as an argument
    trainer.remove_callback(PrinterCallback)
    return trainer


def optimizer(settings: Settings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and arguments; the trainer adds the parameters and their weight decay."""
    if settings.optim == "mofo":
        names = ("alpha", "filter", "form", "seed")
        return MoFO, {"lr": settings.rate, **{name: getattr(settings, name) for name in names}}
    if settings.optim == "lion":
        from surgery.optim.lion import Lion

        return Lion, {"lr": settings.rate}
    if settings.optim == "sgd":
        return torch.optim.SGD, {"lr": settings.rate}
    return torch.optim.AdamW, {"lr": settings.rate, "fused": True}


def _unlimited(args: Any) -> Any:
    args = copy.copy(args)
    args.max_length = None
    return args


def _check_left(dataset: Any, args: Any) -> None:
    if not len(dataset):
        raise OptionError(
            f"No row is left to learn from: every prompt alone fills `seq_len` {args.max_length}. Raise it."
        )


def _check_tokens(dataset: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise OptionError if the tokenizer does not fit the model's embedding, which has `rows` rows."""
    columns = [
        name for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names
    ]
    largest = max((max(row[name], default=-1) for row in dataset for name in columns), default=-1)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise OptionError(
            f"The data holds the token {token!r}, number {largest:,}, and the model's embedding has {rows:,} rows, from 0. Use "
            "the tokenizer that belongs to the model, or give the embedding more rows."
        )
