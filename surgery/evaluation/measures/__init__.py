"""What a user names -> what is measured: files of text, questions or sentences, and tasks of lm-evaluation-harness.

    .txt, or records with "text"                    perplexity
    sentence_good, sentence_bad                     acc: the share of pairs where the good one is likelier
    choices, options or endings                     acc, or acc_norm
    question and answer, or what `surgery.data.rows`     loss of the answer; or exact, numeric or rouge-l of one that is generated
      knows beside them

The first record decides, unless a metric is named. Files are read and checked here, before any model is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from surgery.data.encode import Message
from surgery.data.records import ENDINGS, records
from surgery.data.rows import Row, read
from surgery.errors import OptionError
from surgery.evaluation.measures import choices
from surgery.evaluation.measures.answer_loss import AnswerLoss
from surgery.evaluation.measures.generated import NEXT_QUESTION, Generated
from surgery.evaluation.measures.matching import METRICS, final_number, words
from surgery.evaluation.measures.perplexity import Perplexity
from surgery.evaluation.scores import Measure
from surgery.paths import exists, expanded

PLAIN = ".txt"
DATA = (PLAIN, *ENDINGS)
SPLITS = ("train", "test", "valid", "validation", "val", "dev", "eval", "data")  # what many files are called
KNOWN = ("perplexity", "loss", *METRICS, "acc", "acc_norm")


@dataclass(frozen=True)
class Source:
    """What one word of the user's names: a file and perhaps a metric, or a task of the harness."""

    typed: str
    file: Path | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Options:
    """What holds for every file; see `find_measures`."""

    metric: str | None
    limit: int | None
    seq_len: int
    max_new_tokens: int
    prompt_field: str | None
    completion_field: str | None
    keep_reasoning: bool


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
        specs: each a file, `FILE:METRIC`, a folder of files, or a task of lm-evaluation-harness (what is no path and does not end
            like a data file; or a .yaml file); or several of them with commas between.
        metric: of every file that names none itself.
        limit: only the first items of each: rows, questions, pairs, or windows of text.
        seq_len: tokens in a window of text.
        max_new_tokens: of a generated answer.
        prompt_field, completion_field: fields of a record that hold the question and its answer; the latter alone is plain text.
        keep_reasoning: generated answers are compared with what the model thought before them.
        taken: names that other measures have.

    Raises:
        OptionError: a file cannot be read or used, or an option is wrong.
    """
    _check(metric, limit, seq_len, max_new_tokens)
    options = Options(metric, limit, seq_len, max_new_tokens, prompt_field, completion_field, keep_reasoning)
    sources = [source for spec in specs for source in _sources(spec)]
    if specs and not sources:
        raise OptionError(f"{specs[0]!r} names no file and no task. Give a file, or a task of lm-evaluation-harness.")
    tasks = [source for source in sources if source.file is None]
    if metric is not None and sources and len(tasks) == len(sources):
        raise OptionError(
            f"`metric` {metric} is for files, and {tasks[0].typed} is a task of lm-evaluation-harness, which has its own. "
            "Leave `metric` out."
        )
    measures: list[Measure] = []
    names = set(taken)
    files = [source for source in sources if source.file]
    for harness, group in groupby(sources, key=lambda source: source.file is None):
        if harness:
            from surgery.evaluation.measures.harness import harness_measures

            measures += harness_measures([source.typed for source in group], limit=limit)
        else:
            measures += [_measure(source, _name(source, files, names), options) for source in group]
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


def _measure(source: Source, name: str, options: Options) -> Measure:
    file, metric, limit = source.typed, source.metric or options.metric, options.limit
    if Path(file).suffix.lower() == PLAIN:
        if metric not in (None, "perplexity"):
            raise OptionError(
                f"{file}: is plain text, which has a perplexity, not {metric}. Give records for {metric}."
            )
        plain = _plain(expanded(file))
        if not plain.strip():
            raise OptionError(f"{file}: holds no text. Check the file.")
        return Perplexity(name, _sound(file, [plain]), options.seq_len, limit)
    first = next((record for _, record in records(file)), None)
    if isinstance(first, Mapping) and options.prompt_field is None and options.completion_field is None:
        if choices.is_pair(first) and metric in (None, "acc"):
            return choices.MinimalPairs(name, _items(file, limit, choices.minimal_pair))
        if choices.is_question(first) and metric in (None, "acc", "acc_norm"):
            return choices.MultipleChoice(name, _items(file, limit, choices.question), metric == "acc_norm")
    if metric in ("acc", "acc_norm"):
        wanted = " or ".join([", ".join(choices.CHOICES), *([", ".join(choices.PAIR)] if metric == "acc" else [])])
        raise OptionError(f"{file}: {metric} needs the fields {wanted}. Choose another metric, or rename the fields.")
    data = read(file, prompt=options.prompt_field, completion=options.completion_field)
    rows = _sound(file, data.rows)
    text = "text" in rows[0]
    if metric == "perplexity" or (metric is None and text):
        if not text:
            raise OptionError(
                f"{file}: perplexity needs running text, in a field text. Choose loss, or name the field."
            )
        return Perplexity(name, [row["text"] for row in rows], options.seq_len, limit)
    if metric in (None, "loss"):
        return AnswerLoss(name, rows[:limit])
    if text:
        raise OptionError(f"{file}: {metric} needs questions and answers, and this is plain text. Choose perplexity.")
    questions = [_reference(file, number, row, metric) for number, row in enumerate(rows[:limit], 1)]
    stop = NEXT_QUESTION if data.kind == "question–answer" else None
    return Generated(name, questions, metric, options.max_new_tokens, stop, options.keep_reasoning)


def _items(file: str, limit: int | None, make: Callable[[str, Mapping[str, Any]], Any]) -> list[Any]:
    found: list[Any] = []
    for where, record in records(file):
        if len(found) == limit:
            break
        if not isinstance(record, Mapping):
            raise OptionError(f"{where}: is no record with fields. Correct or remove it.")
        found.append(make(where, record))
    return _sound(file, found)


def _reference(file: str, number: int, row: Row, metric: str) -> tuple[str | list[Message], str]:
    """A row's prompt and the answer that is wanted.

    Raises:
        OptionError: the metric finds nothing in the answer to compare with.
    """
    completion = row["completion"]
    answer = str(completion if isinstance(completion, str) else completion[-1]["content"]).strip()
    comparable = {"exact": bool(answer), "numeric": final_number(answer) is not None, "rouge-l": bool(words(answer))}
    if not comparable[metric]:
        what = {"exact": "text", "numeric": "number", "rouge-l": "word of a–z and 0–9"}[metric]
        raise OptionError(
            f"{file}: answer {number} has no {what}, which {metric} needs. Remove it, or choose another metric."
        )
    return row["prompt"], answer


def _plain(path: Path) -> str:
    if not path.is_file():
        raise OptionError(f"{path}: is no regular file but a pipe or a device, which surgery never reads. Give a file.")
    try:
        return path.read_text(encoding="utf-8-sig")  # as Windows saves it, too
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None


def _sound(file: str, items: list[Any]) -> list[Any]:
    """Items that tokenizers can take: JSON can hold what is no text."""
    try:
        json.dumps(items, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise OptionError(f"{file}: holds {broken!r}, half of a character. Correct or remove the record.") from None
    return items
