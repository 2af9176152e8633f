"""The measures that models are scored on, and how: options that `surgery compare`, `surgery sweep` and Python share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import OptionError
from surgery.option import option
from surgery.paths import apart, local

if TYPE_CHECKING:
    from surgery.evaluation.bench import Bench, Observe
    from surgery.evaluation.scores import Measure


SCORES, WORK = "Scores", "Work"
# What is passed on to `surgery.evaluation.measures.find_measures`.
MEASURED = (
    *(
        "limit",
        "sample",
        "max_chars",
        "prompt_field",
        "completion_field",
        "seq_len",
        "max_new_tokens",
        "keep_reasoning",
    ),
    "confirm_run_unsafe_code",
)


@dataclass(frozen=True)
class Scoring:
    """Measures and settings.

    Attributes:
        task: the downstream task, a file, a folder of files, or a task of lm-evaluation-harness; several are averaged.
        general: general ability, likewise; or "self", see `surgery.evaluation.measures.own_text`.
        metric: of the tasks that are files, where their fields allow several; see `surgery.evaluation.measures`.
        limit: items of each measure at most, the first ones.
        sample: items of each measure at most, drawn at random, the same each time.
        max_chars: of a record, which is left out where it has more.
        prompt_field, completion_field: of records with other names for them.
        seq_len: tokens of a window of text.
        max_new_tokens: of a generated answer.
        confirm_run_unsafe_code: programs that the model writes are run; see `surgery.evaluation.sandbox`.
        keep_reasoning: a generated answer is compared with what the model thought before it.
        batch_size: sequences in one forward pass.
        dtype, device: to compute in and on; see `surgery.model.language_model.LanguageModel`.
        cache: a folder to keep scores in.
    """

    task: tuple[str, ...] = option(
        (),
        help="The fine-tuned task: a .txt, .jsonl, .json or .parquet file, a folder of them, or a task of "
        "lm-evaluation-harness. FILE:METRIC names a file's metric, TASK:metric=NAME,filter=NAME,shots=N,chat=yes a task's; "
        "GROUP=ONE,OTHER averages several. Repeatable.",
        shown=False,
        panel=SCORES,
    )
    general: tuple[str, ...] = option(
        (),
        help="General ability, likewise; or [b]self[/b]: the divergence from pre on text that pre itself writes, which needs no "
        "data.",
        shown=False,
        panel=SCORES,
    )
    metric: str | None = option(
        None,
        help="Of --task: [b]loss[/b] of the answers, or generated answers that are [b]exact[/b], [b]numeric[/b] (the final "
        "number) or like by [b]rouge-l[/b], [b]f1[/b], [b]em[/b] or [b]edit-similarity[/b]; choices by [b]acc[/b] or "
        "[b]acc_norm[/b].",
        shown="by the file's fields",
        panel=SCORES,
    )
    limit: int | None = option(None, help="The first so many items of each.", shown="all", panel=SCORES)
    sample: int | None = option(None, help="So many items of each, drawn at random.", shown="all", panel=SCORES)
    max_chars: int | None = option(None, help="Leave out records with more characters.", shown="none", panel=SCORES)
    prompt_field: str | None = option(None, help="Field that holds the question.", shown="by the names", panel=SCORES)
    completion_field: str | None = option(None, help="Field that holds the answer.", shown="by the names", panel=SCORES)
    seq_len: int = option(512, help="Tokens in a window of plain text.", panel=SCORES)
    max_new_tokens: int = option(256, help="Tokens of a generated answer.", panel=SCORES)
    keep_reasoning: bool = option(
        False,
        help="Compare a generated answer with its <think>…</think> before it, which is else taken off.",
        panel=SCORES,
    )
    confirm_run_unsafe_code: bool = option(
        False,
        help="Run the programs that a model writes (HumanEval, MBPP), in processes without network that cannot change a file.",
        panel=SCORES,
    )
    batch_size: int = option(8, help="Sequences in one forward pass.", panel=WORK)
    dtype: str = option(
        "auto",
        help="To compute in: float32, bfloat16 or float16. [b]auto[/b] is pre's own where the device is fast at it, or float32.",
        panel=WORK,
    )
    device: str = option("auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N.", panel=WORK)
    cache: Path | None = option(
        None, help="Keep scores here, and do not compute again what is here.", metavar="DIR", panel=WORK
    )

    def inputs(self, *models: str) -> list[Path]:
        """The files and folders here that are read: of the measures, and of models as the user typed them (NAME=MODEL too).

        Raises:
            OptionError: one is not there.
            OutputError: the folder for scores lies in one of them.
        """
        from surgery.evaluation.measures import inputs

        names = (name for typed in models for name in (typed, typed.partition("=")[2]) if name)
        found = local(*names) + inputs([*self.task, *self.general])
        if self.cache:
            apart(Path(self.cache), found, "cache", replaced=False)
        return found

    def measures(self, *, general: bool = True) -> tuple[list[Measure], list[Measure]]:
        """The measures of the task and of general ability, checked before any work.

        Raises:
            OptionError: a file or an option is not as it should be, or one of the two is missing.
        """
        from surgery.evaluation.measures import own_text

        if own_text.NAME in self.task:
            raise OptionError(f"`task` {own_text.NAME}: is a measure of general ability. Give it with `general`.")
        for name, specs in (("task", self.task), ("general", self.general)):
            if not specs and (general or name == "task"):
                raise OptionError(f"`{name}` is missing. Give a file, or a task of lm-evaluation-harness.")
        task = self.find(self.task, metric=self.metric)
        return task, self.find(self.general, taken=[measure.name for measure in task])

    def find(self, specs: Sequence[str], *, metric: str | None = None, taken: Sequence[str] = ()) -> list[Measure]:
        """The measures that some words name, with these settings.

        Args:
            metric: of the files among them.
            taken: names that other measures have.

        Raises:
            OptionError: a file or an option is not as it should be.
        """
        from surgery.evaluation.measures import find_measures

        return find_measures(specs, metric=metric, taken=taken, **{name: getattr(self, name) for name in MEASURED})

    def bench(self, measures: Sequence[Measure], observe: Observe = lambda *_: None) -> Bench:
        """Where models are scored on these measures.

        Raises:
            OptionError: a library or a device is missing, or two measures have one name.
        """
        from surgery.evaluation.bench import Bench

        return Bench(
            measures, cache=self.cache, device=self.device, dtype=self.dtype, batch=self.batch_size, observe=observe
        )
