"""What a user names -> what is measured: files of text, questions or sentences, and tasks of lm-evaluation-harness.

    self                                            divergence on text that the base model writes
    .txt, or records with "text"                    perplexity
    sentence_good, sentence_bad                     acc: the share of pairs where the good one is likelier
    choices, options or endings                     acc, or acc_norm
    question and answer, or what `surgery.data.rows`     loss of the answer; or how well one that is generated matches it:
      knows beside them                                  see `surgery.evaluation.measures.matching`

The first record decides, unless a metric is named. Files are read and checked here, before any model is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from surgery.data.records import ENDINGS
from surgery.errors import OptionError
from surgery.evaluation.measures import answer_loss, choices, generated, own_text, perplexity
from surgery.evaluation.measures.file import PLAIN, File, Maker, Options
from surgery.evaluation.measures.own_text import OwnText
from surgery.evaluation.scores import Measure
from surgery.paths import exists, expanded

DATA = (PLAIN, *ENDINGS)
SPLITS = ("train", "test", "valid", "validation", "val", "dev", "eval", "data")  # what many files are called


@dataclass(frozen=True)
class Source:
    """What one word of the user's names: a file and perhaps a metric, the base's own text, or a task of the harness."""

    typed: str
    file: Path | None = None
    metric: str | None = None

    @property
    def is_task(self) -> bool:
        """Whether it is a task of the harness."""
        return self.file is None and self.typed != own_text.NAME


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
    seq_len: int = 512,
    max_new_tokens: int = 256,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    keep_reasoning: bool = False,
    taken: Collection[str] = (),
) -> list[Measure]:
    """The measures that a user names, in that order.

    Args:
        specs: each a file, `FILE:METRIC`, a folder of files, "self", or a task of lm-evaluation-harness (what is no path and does
            not end like a data file; or a .yaml file); or several of them with commas between.
        metric: of every file that names none itself.
        limit: only the first items of each: rows, questions, pairs, windows or passages of text.
        seq_len: tokens in a window of text.
        max_new_tokens: of a generated answer.
        prompt_field, completion_field: fields of a record that hold the question and its answer; the latter alone is plain text.
        keep_reasoning: generated answers are compared with what the model thought before them.
        taken: names that other measures have.

    Raises:
        OptionError: a file cannot be read or used, or an option is wrong.
    """
    _check(metric, limit, seq_len, max_new_tokens)
    options = Options(limit, seq_len, max_new_tokens, prompt_field, completion_field, keep_reasoning)
    sources = [source for spec in specs for source in _sources(spec)]
    if specs and not sources:
        raise OptionError(f"{specs[0]!r} names no file and no task. Give a file, or a task of lm-evaluation-harness.")
    tasks = [source for source in sources if source.is_task]
    if metric is not None and sources and len(tasks) == len(sources):
        raise OptionError(
            f"`metric` {metric} is for files, and {tasks[0].typed} is a task of lm-evaluation-harness, which has its own. "
            "Leave `metric` out."
        )
    measures: list[Measure] = []
    names = set(taken)
    files = [source for source in sources if source.file]
    for harness, group in groupby(sources, key=lambda source: source.is_task):
        if harness:
            from surgery.evaluation.measures.harness import harness_measures

            measures += harness_measures([source.typed for source in group], limit=limit)
        else:
            measures += [
                _measure(File(source.typed, _name(source, files, names), source.metric or metric, options))
                if source.file
                else OwnText(limit or own_text.PASSAGES)
                for source in group
            ]
        names |= {measure.name for measure in measures}
    return measures


def _check(metric: str | None, limit: int | None, seq_len: int, max_new_tokens: int) -> None:
    if metric is not None and metric not in KNOWN:
        raise OptionError(f"`metric` {metric} is unknown. Choose from {', '.join(KNOWN)}.")
    for name, value, least in (("limit", limit, 1), ("seq_len", seq_len, 2), ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and value < least:
            raise OptionError(f"`{name}` must be {least} or more, not {value}.")


def _sources(spec: str) -> list[Source]:
    """What a word of the command line names."""
    if not spec.strip():
        return []
    if spec == own_text.NAME:
        return [Source(spec)]
    whole = _source(spec)
    if whole or "," not in spec:
        return whole or [Source(spec)]
    return [source for part in spec.split(",") if part.strip() for source in _sources(part.strip())]


def _source(spec: str) -> list[Source]:
    """Files, with a metric or not; none where the word is no path."""
    head, _, tail = spec.rpartition(":")
    for typed, metric in ((spec, None), (head, tail)):
        path = expanded(typed)
        there = exists(path)
        if not typed or "," in (metric or "") or not (there or (path.suffix.lower() in DATA and "," not in typed)):
            continue
        if metric is not None and metric not in KNOWN:
            raise OptionError(f"{spec}: {metric or 'an empty word'} is no metric. Choose from {', '.join(KNOWN)}.")
        if not there:
            raise OptionError(f"{typed}: no such file. Check the path.")
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in DATA and file.is_file())
            if not files:
                raise OptionError(
                    f"{typed}: is a folder without a {', '.join(DATA)} file. Give files, or a folder of them."
                )
            return [Source(str(file), file, metric) for file in files]
        if path.suffix.lower() in (".yaml", ".yml") and metric is None:
            return [Source(spec)]
        if path.suffix.lower() not in DATA:
            raise OptionError(f"{typed}: is no {', '.join(DATA)} file. Rename or convert it.")
        return [Source(typed, path, metric)]
    return []


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
