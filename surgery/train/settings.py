"""The settings of a training run, with the MoFO paper's values as defaults, and the YAML file that can hold them.

MoFO D.3: 2 epochs of batches of 128 sequences of at most 1,024 tokens, learning rate 2e-5 (LoRA: 1e-4) with 3% warm-up and
cosine decay, α = 15%. HFT A.2.3: half of the tensors frozen; DPO with learning rate 5e-7 and batches of 32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import OptionError
from surgery.methods.half_reset import ALSO, LEVELS
from surgery.methods.scope import finite, one_of, share
from surgery.option import option
from surgery.train.together import check_together

TASKS = ("sft", "dpo")
OPTIMIZERS = ("adamw", "mofo", "hft", "lion", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "sqrt")
FILTERS = ("momentum", "gradient", "mv", "random")
FORMS = ("adam", "gd")
DTYPES = ("float32", "bfloat16")
LOGS = ("none", "tensorboard", "wandb")
# Sequences that go through the model together where --accumulation is not given.
TOGETHER = 8
# Of a round of continual training, where --eval-split is not given.
HELD_OUT = 0.05
# What --replay calls the rows of earlier rounds, and what the start model writes.
ROUNDS, SELF = "rounds", "self"
LOSSES = ("nll", "dft", "eaft", "asft", "kl")
GEMS = ("gem", "a-gem")
NOT_NEGATIVE = (
    "warmup",
    "weight_decay",
    "clip",
    "l1",
    "l2",
    "ewc",
    "proximal",
    "own_weight",
    "eaft_alpha",
    "kl_weight",
)
# Whole numbers from 1 on.
WHOLE = ("own_passages", "own_tokens", "memory_rows")
# What may differ between a run and the one that resumes it.
NEUTRAL = ("log", "save_every")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _layers(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    words = text.split(":")
    if len(words) != 2 or not all(word.strip().isdigit() for word in words) or int(words[0]) >= int(words[1]):
        raise ValueError(f"takes the first layer and the one behind the last, such as 8:16, not {text!r}.")
    return tuple(map(int, words))


def _counts(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not all(word.isdigit() for word in words):
        raise ValueError(f"takes whole numbers with commas between them, such as 1,2, not {text!r}.")
    return tuple(map(int, words))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, _words(text)))
    except ValueError:
        raise ValueError(f"takes numbers with commas between them, such as 5,3,7, not {text!r}.") from None


# Headings of the options.
DATA, EVAL, STEPS, OPTIM, KEEP, OUTPUT = (
    "Data",
    "Evaluation",
    "Length and speed",
    "Optimizer",
    "Staying near the start",
    "Output",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run. A value of None stands for a default that depends on the others: see the properties.

    Attributes:
        model, data, out: where from and where to; several files are rounds, one after the other.
        batch_size: sequences in a step, over all processes and accumulation.
        accumulation: parts that a step's batch goes through the model in, on each process.
        warmup: steps, or below 1 the share of all steps.
        eval_data: the test of each of `data`; see `surgery.evaluation.measures.spec`.
        epochs: of each round, or one number for all.
        fsdp: the weights are shared out over the processes.
        dtype: what the weights are held in while they are trained.
        save_dtype: what they are written in; None for what each tensor of the model is stored in.
        hft: the share of tensors that is frozen; None trains all, but for optim "hft".
        lora: the rank; None trains the weights themselves.
    """

    model: str = option(help="The model to start from: a folder, or a hub id with an optional @revision.", shown=False)
    data: tuple[str, ...] = option(
        help="A .jsonl, .json or .parquet file, or a data set on the hub (name or name:subset). Given more than once: rounds "
        "of continual training, in that order.",
        shown=False,
    )
    out: Path = option(help="Folder for the result.", shown=False)
    task: str = option("sft", help="[b]sft[/b], or [b]dpo[/b] on preferences.")
    optim: str = option(
        "adamw",
        help="[b]adamw[/b], [b]mofo[/b] (momentum-filtered), [b]hft[/b] (AdamW on half of the tensors), [b]lion[/b] or "
        "[b]sgd[/b].",
    )
    prompt_field: str | None = option(
        None, help="Field of a record that holds the prompt.", shown="detected", panel=DATA
    )
    completion_field: str | None = option(
        None,
        help="Field that holds the answer; alone, it is text to train on as a whole.",
        shown="detected",
        panel=DATA,
    )
    completion_only: bool = option(True, help="Learn the answers only, not the prompts.", panel=DATA)
    packing: bool = option(False, help="Put several short rows into one sequence.", panel=DATA)
    seq_len: int = option(
        1024, help="Tokens at most, and at most what the model takes; longer rows are cut.", panel=DATA
    )
    sample: int | None = option(None, help="So many rows of each file, drawn at random.", shown="all", panel=DATA)
    max_chars: int | None = option(None, help="Leave out rows with more characters.", shown="none", panel=DATA)
    eval_split: float | None = option(
        None,
        help="Share of the rows that is held out and evaluated after each epoch.",
        shown="0, with several --data and no --eval-data 0.05",
        panel=EVAL,
    )
    eval_data: tuple[str, ...] = option(
        (),
        help="The task's own test, scored after the round: FILE:METRIC, or what else surgery compare takes. One for each --data, "
        "in the same order.",
        shown=False,
        panel=EVAL,
    )
    eval_every: int | None = option(
        None, help="Evaluate after so many steps too.", shown="after each epoch or round", metavar="STEPS", panel=EVAL
    )
    eval_limit: int | None = option(None, help="The first so many items of each test.", shown="all", panel=EVAL)
    max_new_tokens: int = option(256, help="Tokens of a generated answer.", panel=EVAL)
    epochs: tuple[float, ...] = option(
        (2.0,),
        help="Times through the data; with several --data one number for all, or one for each: 5,3,7.",
        metavar="NUMBERS",
        parse=_numbers,
        panel=STEPS,
    )
    max_steps: int | None = option(None, help="Steps, in place of --epochs.", panel=STEPS)
    batch_size: int | None = option(
        None, help="Rows in a step, all processes and accumulation together.", shown="128, dpo 32", panel=STEPS
    )
    accumulation: int | None = option(
        None,
        help="Parts in which a step's rows go through the model: more take less memory.",
        shown="8 rows at once",
        panel=STEPS,
    )
    gradient_checkpointing: bool = option(False, help="Compute activations twice, to keep fewer.", panel=STEPS)
    fsdp: bool = option(False, help="Share the weights out over the processes of torchrun (FSDP2).", panel=STEPS)
    dtype: str = option(
        "float32",
        help="What the weights are held in meanwhile: float32 (on a GPU with bfloat16 arithmetic) or bfloat16.",
        panel=STEPS,
    )
    lr: float | None = option(None, help="Peak learning rate.", shown="2e-5, with LoRA 1e-4, dpo 5e-7", panel=OPTIM)
    schedule: str = option("cosine", help="After the warm-up: cosine, linear, constant, or sqrt (η / √t).", panel=OPTIM)
    warmup: float = option(0.03, help="Steps of warm-up, or below 1 their share.", panel=OPTIM)
    weight_decay: float = option(0.0, help="Of matrices, decoupled.", panel=OPTIM)
    clip: float = option(1.0, help="Largest norm of the gradient; 0 for any.", panel=OPTIM)
    alpha: float = option(0.15, help="mofo: share of each tensor's entries that a step updates.", panel=OPTIM)
    filter: str = option(
        "momentum",
        help="mofo: which entries, those of the largest momentum, gradient, mv (m / √v), or random.",
        panel=OPTIM,
    )
    form: str = option(
        "adam", help="mofo: what moves the entries, [b]adam[/b], or [b]gd[/b], plain gradient descent.", panel=OPTIM
    )
    hft: float | None = option(
        None,
        help="Freeze this share of the tensors, under any optimizer; a new draw each round.",
        shown="0.5 with --optim hft",
        metavar="RATIO",
        panel=KEEP,
    )
    level: str = option("category", help="hft: draw by category, layer or model, as half-reset.", panel=KEEP)
    frozen_attention: tuple[int, ...] = option(
        (),
        help="hft: freeze so many attention matrices of the first layer, the second, …, over and over.",
        metavar="COUNTS",
        shown=False,
        parse=_counts,
        panel=KEEP,
    )
    frozen_feed_forward: tuple[int, ...] = option(
        (),
        help="hft: likewise of the feed-forward matrices: 1,2 takes turns.",
        metavar="COUNTS",
        shown=False,
        parse=_counts,
        panel=KEEP,
    )
    freeze: tuple[str, ...] = option(
        (),
        help="Freeze what lies outside the layers: embedding, head, norm (the final one), with commas.",
        metavar="GROUPS",
        shown=False,
        parse=_words,
        panel=KEEP,
    )
    l1: float = option(0.0, help="λ of a penalty λ ‖θ − θ0‖₁.", panel=KEEP)
    l2: float = option(0.0, help="λ of a penalty λ ‖θ − θ0‖².", panel=KEEP)
    mixout: float = option(
        0.0, help="Probability that an entry of a matrix is θ0's in a pass through the model.", panel=KEEP
    )
    lora: int | None = option(None, help="Train LoRA adapters, and merge them.", metavar="RANK", panel=KEEP)
    peft: str | None = option(
        None,
        help="Train an adapter of any type that peft has: adalora, ia3, vera, p_tuning, …",
        metavar="TYPE",
        panel=KEEP,
    )
    keep_adapter: bool = option(False, help="Write the adapter itself.", panel=KEEP)
    replay: tuple[str, ...] = option(
        (),
        help="What to remember: a file or data set of older data; [b]rounds[/b], the rows of earlier rounds; or [b]self[/b], "
        "text that the start model writes. Repeatable. The first of several rounds takes in no file.",
        metavar="WHAT",
        panel=KEEP,
    )
    replay_ratio: float = option(0.1, help="Share of the remembered rows that a round takes in.", panel=KEEP)
    own_weight: float = option(1.0, help="replay self: λ of its loss, beside the data's.", panel=KEEP)
    own_passages: int = option(128, help="replay self: passages that the start model writes.", panel=KEEP)
    own_tokens: int = option(64, help="replay self: tokens of a passage, at most.", panel=KEEP)
    loss: str = option(
        "nll",
        help="Of a token: [b]nll[/b]; [b]dft[/b], times its probability; [b]eaft[/b], times how unsure the model is; [b]kl[/b], "
        "with a pull on what is predicted; [b]asft[/b], dft with that pull.",
        panel=KEEP,
    )
    eaft_alpha: float = option(1.0, help="eaft: the power of the entropy.", panel=KEEP)
    kl_weight: float = option(0.05, help="kl and asft: λ of KL(start ‖ model).", panel=KEEP)
    ewc: float = option(0.0, help="λ of elastic weight consolidation, by what is remembered.", panel=KEEP)
    gem: str | None = option(
        None,
        help="Turn each gradient so that it does not raise the loss on what is remembered: [b]gem[/b], on each part of it, or "
        "[b]a-gem[/b], on all of it.",
        metavar="KIND",
        panel=KEEP,
    )
    proximal: float = option(0.0, help="λ of a proximal step towards the start, behind the optimizer's.", panel=KEEP)
    soft_mask: bool = option(False, help="V-SoftMask: smaller gradients of units that matter in general.", panel=KEEP)
    cofitune: tuple[int, ...] = option(
        (),
        help="CoFiTune: train the feed-forward of these layers alone, with V-SoftMask; 8:16 is layers 8 to 15.",
        metavar="LAYERS",
        shown=False,
        parse=_layers,
        panel=KEEP,
    )
    memory_rows: int = option(64, help="ewc, gem: rows of each part of the memory; soft-mask: of the data.", panel=KEEP)
    beta: float = option(0.1, help="dpo: how strongly it holds to the start model.", panel=KEEP)
    seed: int = option(0, help="Of the order, the draws and new weights.")
    save_dtype: str | None = option(
        None, help="float32 or bfloat16.", shown="as in the model, tensor by tensor", panel=OUTPUT
    )
    save_every: int | None = option(
        None, help="Save a state to --resume from.", shown="never", metavar="STEPS", panel=OUTPUT
    )
    log: str = option("none", help="none, tensorboard or wandb.", panel=OUTPUT)

    def __post_init__(self) -> None:
        choices = {
            "task": TASKS,
            "optim": OPTIMIZERS,
            "schedule": SCHEDULES,
            "filter": FILTERS,
            "form": FORMS,
            "log": LOGS,
            "loss": LOSSES,
        }
        for name, allowed in {**choices, "dtype": DTYPES, "level": LEVELS}.items():
            one_of(name, getattr(self, name), allowed)
        for group in self.freeze:
            one_of("freeze", group, ALSO)
        if self.gem is not None:
            one_of("gem", self.gem, GEMS)
        if self.save_dtype is not None:
            one_of("save_dtype", self.save_dtype, DTYPES)
        for name in ("hft", "replay_ratio", "mixout", "eval_split"):
            share(name, getattr(self, name) or 0.0)
        for number in self.epochs or (0.0,):
            finite("epochs", number)
            if number <= 0:
                raise OptionError(f"`epochs` must be greater than 0, not {number:g}.")
        if len(self.epochs) not in (1, len(self.data)):
            raise OptionError(
                f"`epochs` has {len(self.epochs)} numbers, and there are {len(self.data)} `data`. Give one, or as many."
            )
        for name in ("alpha", "beta", "rate"):
            finite(_field(name), getattr(self, name))
            if getattr(self, name) <= 0:
                raise OptionError(f"`{_field(name)}` must be greater than 0, not {getattr(self, name)}.")
        share("alpha", self.alpha)
        for name in NOT_NEGATIVE:
            finite(_field(name), getattr(self, name))
            if getattr(self, name) < 0:
                raise OptionError(f"`{name}` must be 0 or greater, not {getattr(self, name)}.")
        counted = ("batch", "max_steps", "accumulation", "save_every", "lora", "seq_len", "sample", "max_chars", *WHOLE)
        for name in (*counted, "eval_every", "eval_limit", "max_new_tokens"):
            value, least = getattr(self, name), 2 if name == "seq_len" else 1
            if value is not None and value < least:
                raise OptionError(f"`{_field(name)}` must be at least {least}, not {value}.")
        if not 0 <= self.seed < 1 << 32:
            raise OptionError(f"`seed` must be from 0 to {(1 << 32) - 1}, not {self.seed}.")
        if self.mixout == 1 or self.eval_split == 1:
            raise OptionError("`mixout` and `eval_split` must be below 1.")
        if not self.data:
            raise OptionError("`data` is missing. Give a .jsonl, .json or .parquet file, or a data set on the hub.")
        check_together(self._given())

    def _given(self) -> dict[str, bool]:
        """Name of an option, or of a value that it has -> whether it is asked for."""
        own = {field.name: bool(getattr(self, field.name)) for field in dataclasses.fields(self)}
        other = {"rounds": self.multi, "dpo": self.task == "dpo", "by_level": self.level != "category"}
        other |= {"weighed": self.loss != "nll", "memory": bool(self.replay) or self.multi}
        other |= {"adapted": self.adapted, "adalora": (self.peft or "").lower() == "adalora"}
        other |= {
            "replay_rounds": ROUNDS in self.replay,
            "gd": self.form == "gd",
            "mv": self.filter == "mv",
            "mofo": self.optim == "mofo",
            "held_out": self.held_out > 0,
        }
        return own | other | {"hft": self.frozen is not None, "all_learnt": not self.completion_only}

    @property
    def multi(self) -> bool:
        """Whether there is more than one round."""
        return len(self.data) > 1

    @property
    def older(self) -> tuple[str, ...]:
        """The files and data sets of older data."""
        return tuple(name for name in self.replay if name not in (ROUNDS, SELF))

    @property
    def own_text(self) -> bool:
        """Whether the start model's own text is learnt."""
        return SELF in self.replay

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained, and not the weights themselves."""
        return self.lora is not None or self.peft is not None

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return 5e-7 if self.task == "dpo" else 1e-4 if self.adapted else 2e-5

    @property
    def batch(self) -> int:
        """Sequences in a step."""
        if self.batch_size is not None:
            return self.batch_size
        return 32 if self.task == "dpo" else 128

    @property
    def frozen(self) -> float | None:
        """The share of the layers' tensors that is frozen, where no count says it; None where all are trained."""
        return 0.5 if self.hft is None and (self.optim == "hft" or self.frozen_counts) else self.hft

    @property
    def frozen_counts(self) -> dict[str, tuple[int, ...]]:
        """Category -> how many of its matrices are frozen, layer by layer."""
        counts = {"attention": self.frozen_attention, "feed_forward": self.frozen_feed_forward}
        return {category: numbers for category, numbers in counts.items() if numbers}

    @property
    def held_out(self) -> float:
        """The share of each file's rows that is not trained on."""
        if self.eval_split is not None:
            return self.eval_split
        return HELD_OUT if self.multi and not self.eval_data else 0.0

    def epochs_of(self, number: int) -> float:
        """Times through the data of a round, counted from 1."""
        return self.epochs[number - 1 if len(self.epochs) > 1 else 0]

    def parts(self, processes: int) -> tuple[int, int]:
        """How a step's batch is divided: (sequences at once on each process, accumulation).

        Raises:
            OptionError: it cannot be cut so.
        """
        share, rest = divmod(self.batch, processes)
        if rest:
            raise OptionError(
                f"`batch_size` {self.batch} cannot be shared by {processes} processes. Choose a multiple."
            )
        parts = self.accumulation
        if parts is None:
            parts = next(count for count in range(1, share + 1) if share % count == 0 and share // count <= TOGETHER)
        if share % parts:
            raise OptionError(
                f"`accumulation` {parts} does not divide the {share} sequences of a step. Choose a divisor."
            )
        return share // parts, parts

    def as_json(self) -> dict[str, Any]:
        """Return plain values under the options' names, with defaults filled in."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        values |= {"out": str(self.out)}
        values |= {"lr": self.rate, "batch_size": self.batch, "hft": self.frozen, "eval_split": self.held_out}
        return {name.replace("_", "-"): value for name, value in values.items()}


def _field(name: str) -> str:
    """The field that a property fills in where it is None."""
    return {"rate": "lr", "batch": "batch_size"}.get(name, name)
