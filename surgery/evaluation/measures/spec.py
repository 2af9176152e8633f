"""Read the words of `--task` and `--general`: files, the base's own text, tasks of the harness, and groups of them.

hellaswag,arc_easy                       two tasks
test.jsonl:numeric                       a file and how it is scored
gsm8k:filter=flexible-extract,shots=8    a task and its options; see `surgery.evaluation.measures.harness_options`
commonsense=hellaswag,arc_easy           a group, whose score is the mean of theirs
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgery.data.records import ENDINGS
from surgery.errors import OptionError
from surgery.evaluation.measures import own_text
from surgery.evaluation.measures.file import PLAIN
from surgery.evaluation.measures.harness_options import KEYS, HarnessOptions
from surgery.paths import exists, expanded

DATA = (PLAIN, *ENDINGS)
GROUP = re.compile(r"([^=:,/\\]+)=(.+)", re.DOTALL)
WITH_OPTIONS = re.compile(r"(.+?):(\w+=.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One thing that a user names: a file and perhaps a metric, the base's own text, or a task of the harness.

    Attributes:
        options: of a task.
        group: the name of the group that it is in.
    """

    typed: str
    file: Path | None = None
    metric: str | None = None
    options: HarnessOptions = field(default_factory=HarnessOptions)
    group: str | None = None

    @property
    def is_task(self) -> bool:
        """Whether it is a task of the harness."""
        return self.file is None and self.typed != own_text.NAME


def sources(spec: str, metrics: Collection[str]) -> list[Source]:
    """Split a word of the command line into the things that it names.

    Args:
        metrics: that a file may be scored by.

    Raises:
        OptionError: it names a file that is not there, or something unknown.
    """
    grouped = GROUP.fullmatch(spec)
    if not grouped or any(typed and exists(expanded(typed)) for typed in (spec, spec.rpartition(":")[0])):
        return list(_listed(spec, metrics))
    name, members = grouped[1].strip(), list(_listed(grouped[2], metrics))
    if name in KEYS:
        raise OptionError(f"{spec}: {name} is an option of a task. Write the task before it: TASK:{spec}.")
    if len(members) < 2:
        raise OptionError(
            f"{spec}: a group has two or more members. Give more, with commas between, or leave out {name}=."
        )
    return [replace(member, group=name) for member in members]


def _listed(spec: str, metrics: Collection[str]) -> Iterator[Source]:
    if not spec.strip():
        return
    if spec == own_text.NAME:
        yield Source(spec)
        return
    whole = _file(spec, metrics)
    if whole or "," not in spec:
        yield from whole or [_task(spec)]
        return
    parts: list[str] = []
    for part in filter(None, map(str.strip, spec.split(","))):
        more = part.partition("=")
        if parts and more[1] and more[0] in KEYS and WITH_OPTIONS.fullmatch(parts[-1]):
            parts[-1] += f",{part}"  # another option of the task before
        else:
            parts.append(part)
    for part in parts:
        if "," in part:
            yield _task(part)
        else:
            yield from _listed(part, metrics)


def _task(spec: str) -> Source:
    """A task of the harness with its options."""
    found = WITH_OPTIONS.fullmatch(spec)
    return Source(found[1], options=HarnessOptions.read(spec, found[2])) if found else Source(spec)


def _file(spec: str, metrics: Collection[str]) -> list[Source]:
    """Files, with a metric or not; none where the word is no path."""
    head, _, tail = spec.rpartition(":")
    for typed, metric in ((spec, None), (head, tail)):
        path = expanded(typed)
        there = exists(path)
        if not typed or re.search("[,=]", metric or ""):
            continue
        if not (there or (path.suffix.lower() in DATA and "," not in typed)):
            continue
        if metric is not None and metric not in metrics:
            raise OptionError(f"{spec}: {metric or 'an empty word'} is no metric. Choose from {', '.join(metrics)}.")
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
