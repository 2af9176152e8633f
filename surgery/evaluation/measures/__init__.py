"""Turn what a user names into measures: files of text, questions or sentences, and tasks of lm-evaluation-harness.

    self                                            divergence on text that the base model writes
    .txt, or records with "text"                    perplexity
    sentence_good, sentence_bad                     acc: the share of pairs where the good one is likelier
    choices, options or endings                     acc, or acc_norm
    question and answer, or what `surgery.data.rows`     loss of the answer; or how well one that is generated matches it:
      knows beside them                                  see `surgery.evaluation.measures.matching`

Several of them can be a group, whose score is the mean of theirs. The first record decides, unless a metric is named. Files
are read and checked here, before any model is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path

from surgery.errors import OptionError
from surgery.evaluation.measures import answer_loss, choices, generated, own_text, perplexity
from surgery.evaluation.measures.file import File, Maker, Options
from surgery.evaluation.measures.group import Group
from surgery.evaluation.measures.own_text import OwnText
from surgery.evaluation.measures.spec import Source, sources
from surgery.evaluation.scores import Measure
from surgery.paths import local

SPLITS = ("train", "test", "valid", "validation", "val", "dev", "eval", "data")  # what many files are called

# In the order in which they are asked whether a file is for them.
MEASURES: tuple[Maker, ...] = (
    choices.MINIMAL_PAIRS,
    choices.MULTIPLE_CHOICE,
    perplexity.PERPLEXITY,
    answer_loss.ANSWER_LOSS,
    generated.GENERATED,
)
KNOWN = tuple(dict.fromkeys(metric for maker in MEASURES for metric in maker.metrics))


def find_measures(
    specs: Sequence[str],
    *,
    metric: str | None = None,
    limit: int | None = None,
    sample: int | None = None,
    max_chars: int | None = None,
    seq_len: int = 512,
    max_new_tokens: int = 256,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    keep_reasoning: bool = False,
    confirm_run_unsafe_code: bool = False,
    taken: Collection[str] = (),
) -> list[Measure]:
    """The measures that a user names, in that order.

    Args:
        specs: each a file, `FILE:METRIC`, a folder of files, "self", or a task of lm-evaluation-harness (what is no path and does
            not end like a data file; or a .yaml file); or several of them with commas between; see
            `surgery.evaluation.measures.spec`.
        metric: of every file that names none itself.
        limit: only the first items of each: rows, questions, pairs, windows or passages of text.
        sample: only so many items of each, drawn at random, the same each time.
        max_chars: records with more characters are left out.
        seq_len: tokens in a window of text.
        max_new_tokens: of a generated answer.
        prompt_field, completion_field: fields of a record that hold the question and its answer; the latter alone is plain text.
        keep_reasoning: generated answers are compared with what the model thought before them.
        confirm_run_unsafe_code: programs that the model writes are run; see `surgery.evaluation.sandbox`.
        taken: names that other measures have.

    Raises:
        OptionError: a file cannot be read or used, or an option is wrong.
    """
    _check(metric, limit=limit, sample=sample, max_chars=max_chars, seq_len=seq_len, max_new_tokens=max_new_tokens)
    options = Options(limit, seq_len, max_new_tokens, prompt_field, completion_field, keep_reasoning, max_chars, sample)
    named = [source for spec in specs for source in sources(spec, KNOWN)]
    if specs and not named:
        raise OptionError(f"{specs[0]!r} names no file and no task. Give a file, or a task of lm-evaluation-harness.")
    tasks = [source for source in named if source.is_task]
    if metric is not None and named and len(tasks) == len(named):
        raise OptionError(
            f"`metric` {metric} is for files, and {tasks[0].typed} is a task of lm-evaluation-harness, which has its own: "
            f"{tasks[0].typed}:metric=NAME. Leave `metric` out."
        )
    measures: list[Measure] = []
    names = set(taken)
    files = [source for source in named if source.file]
    for (harness, group), members in groupby(named, key=lambda source: (source.is_task, source.group)):
        if harness:
            from surgery.evaluation.measures.harness import harness_measures

            asked = [(source.typed, source.options) for source in members]
            found = harness_measures(asked, limit=limit, sample=sample, unsafe=confirm_run_unsafe_code, taken=names)
        else:
            found = [
                _measure(File(source.typed, _name(source, files, names), source.metric or metric, options))
                if source.file
                else OwnText(limit or sample or own_text.PASSAGES)
                for source in members
            ]
        names |= {measure.name for measure in found}
        if group is not None and measures and isinstance(last := measures[-1], Group) and last.name == group:
            measures[-1] = Group(group, [*last.members, *found])
        else:
            measures += found if group is None else [Group(group, found)]
    return measures


def inputs(specs: Sequence[str]) -> list[Path]:
    """The files and folders here that some words name.

    Raises:
        OptionError: one names a file that is not there, or something unknown.
    """
    whole = [typed for spec in specs for typed in (spec, spec.rpartition(":")[0]) if typed]
    return local(*whole, *(source.typed for spec in specs for source in sources(spec, KNOWN)))


def _check(metric: str | None, *, limit: int | None, sample: int | None, **numbers: int | None) -> None:
    if metric is not None and metric not in KNOWN:
        raise OptionError(f"`metric` {metric} is unknown. Choose from {', '.join(KNOWN)}.")
    if limit is not None and sample is not None:
        raise OptionError("`limit` takes the first items and `sample` draws some. Leave one of the two out.")
    for name, value in {"limit": limit, "sample": sample, **numbers}.items():
        least = 2 if name == "seq_len" else 1
        if value is not None and value < least:
            raise OptionError(f"`{name}` must be {least} or more, not {value}.")


def _name(source: Source, files: Sequence[Source], taken: set[str]) -> str:
    """The shortest name that says something and that no other file has."""
    forms: list[Callable[[Path], str]] = [
        lambda path: f"{path.absolute().parent.name}/{path.stem}" if path.stem in SPLITS else path.stem,
        lambda path: f"{path.absolute().parent.name}/{path.stem}",
        lambda path: str(path),
    ]
    for form in forms:
        for tail in (False, True):
            names = [form(Path(other.typed)) + (f":{other.metric}" if tail and other.metric else "") for other in files]
            mine = names[files.index(source)]
            if names.count(mine) == 1 and mine not in taken:
                return mine
    raise OptionError(f"{source.typed}: is given twice. Leave one out.")


def _measure(file: File) -> Measure:
    """The first kind of measure that a file is for."""
    found = next((measure for maker in MEASURES if (measure := maker.make(file)) is not None), None)
    if found is None:
        raise OptionError(f"{file.typed}: {file.metric} does not fit its fields. Choose from {', '.join(KNOWN)}.")
    return found
