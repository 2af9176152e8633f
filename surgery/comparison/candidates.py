"""The candidates of `surgery auto`: every method of the registry at the settings that it declares, variants, and combinations.

    settings       each method over its own grids, the random ones with several seeds
    linear         a pruning method on attention and feed-forward alone, embedding and head staying ft's
    named          settings that a method names, such as the paper's ratios for different parts of the depth
    by depth       a pruning method that prunes more towards one end of the model
    then averaged  what a pruning method leaves, averaged with pre

Most of these wait: they are tried where a neighbour of theirs, which is tried at once, does well.

A method that is added to the registry is tried by itself.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from surgery.checkpoint.pair import pair
from surgery.comparison.grid import command_words, label, line, settings
from surgery.editing.edited import Edited
from surgery.editing.job import Job, plan_pair, replan
from surgery.errors import OptionError
from surgery.evaluation.subject import Subject, edited_subject
from surgery.methods import METHODS, Hma, Method, parameters
from surgery.methods.method import main_option
from surgery.option import build, declared_options, value_of

SEEDS = (0, 1, 2)
# Of a grid, those that are tried in a variant: enough to see whether the variant is worth more.
THINNED = 3
AVERAGED = (0.4, 0.2)
TILT = 0.1  # from the middle of the model to an end


@dataclass(frozen=True)
class Candidate:
    """One model that may win.

    Attributes:
        label: its name.
        method: whose settings it is of; None for a model that exists already.
        subject: opens it, reading headers only.
        commands: command lines that make it, one after the other.
        job: plans what writes it; None for a model that exists already.
        recipe: what is done to the pair: with the pair, a key to its weights. None where they depend on more.
        line, place: see `surgery.comparison.race.Standing`.
        after: labels of others; it is tried once one of them does well. At once where there are none.
    """

    label: str
    method: str | None
    subject: Callable[[], Subject]
    commands: tuple[tuple[str, ...], ...] = ()
    job: Callable[[], Job] | None = None
    recipe: dict[str, Any] | None = None
    line: Hashable | None = None
    place: float = 0.0
    after: tuple[str, ...] = ()


def candidates(
    job: Job,
    methods: Sequence[Method],
    command: Callable[[Method], Sequence[str]],
    *,
    calibrated: dict[str, Job] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[list[Candidate], list[str]]:
    """Settings as candidates.

    Args:
        job: some planned edit of the pair.
        methods: the settings.
        command: the command line of a setting.
        calibrated: planned edits of methods that need input norms, by the methods' names.

    Returns:
        The candidates, and a sentence for each setting that does not fit the model.
    """
    found, notes, waiting = list[Candidate](), dict[str, None](), _waiting(methods)
    for method in methods:
        planned = (calibrated or {}).get(method.name, job)
        try:
            replan(planned, method)
        except OptionError as error:
            notes.setdefault(f"{label(method)} was not tried: {error}")
            continue
        after = waiting.get(label(method), ())
        found.append(replace(_candidate(planned, method, command, allow_nonfinite), after=after))
    return found, list(notes)


def default_methods(names: Collection[str] | None = None, *, calibrated: bool = False) -> list[Method]:
    """The settings of all methods but the slow ones, or of those that are named.

    Args:
        calibrated: those that need input norms, too.
    """
    found: dict[str, Method] = {}
    for kind in METHODS.values():
        wanted = not kind.slow if names is None else kind.name in names
        if wanted and (not kind.calibrated or calibrated):
            found |= {label(method): method for method in _settings(kind)}
    return list(found.values())


def untried(*, calibrated: bool) -> list[str]:
    """Sentences about the methods that `default_methods` leaves out."""
    found = []
    for kind in METHODS.values():
        if kind.calibrated and not calibrated:
            found.append(f"{kind.name} was not tried, since it needs a text: `calibration`.")
        elif kind.slow:
            found.append(f"{kind.name} was not tried, since an edit takes longer than a score: name it with `method`.")
    return found


def averaged(
    job: Job, command: Callable[[Method], Sequence[str]], *, out: Path, allow_nonfinite: bool = False
) -> list[Candidate]:
    """Every pruning method, then averaged with pre.

    Args:
        job: some planned edit of the pair.
        command: the command line of a setting.
        out: the folder that the second command is to write, and after which the first one's is named.
    """
    found = []
    for kind in METHODS.values():
        if kind.merges or kind.calibrated or not _prunes(kind):
            continue
        for first in _thinned(settings(kind)):
            made = [_averaged(job, first, Hma((ratio,)), command, out, allow_nonfinite) for ratio in AVERAGED]
            found += [made[0], *(replace(one, after=(made[0].label,)) for one in made[1:])]
    return found


def existing(subject: Subject) -> Candidate:
    """A model that is there already: ft, or one that the user names."""
    return Candidate(subject.label, None, lambda: subject)


def _settings(kind: type[Method]) -> Iterator[Method]:
    names, plain = {one.name for one in declared_options(kind)}, settings(kind)
    if "seed" in names:
        plain = settings(kind, {"seed": [",".join(map(str, SEEDS))]})
    yield from plain
    main = main_option(kind)
    for named in main.option.swept.named if main.option.swept else ():
        yield from settings(kind, {main.name: [named]})
    if _prunes(kind) and "scope" in names and not kind.merges:
        yield from _thinned(settings(kind, fixed={"scope": "linear"}))
        for method in _thinned(settings(kind)):
            number = place(method)
            lower, higher = max(round(number - TILT, 9), 0.0), min(round(number + TILT, 9), 1.0)
            yield from (build(kind, {"depth": ends}) for ends in ((lower, higher), (higher, lower)))


def _waiting(methods: Sequence[Method]) -> dict[str, tuple[str, ...]]:
    """Find what settings wait for: every second one on a line for those beside it, a variant for the nearest plain one."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in dict.fromkeys(map(type, methods)):
        own = [method for method in methods if type(method) is kind]
        plain = sorted((method for method in own if _is_plain(method, own[0])), key=place)
        for at in range(1, len(plain), 2):
            found[label(plain[at])] = tuple(label(one) for one in (*plain[at - 1 : at], *plain[at + 1 : at + 2]))
        for method in own:
            if plain and not _is_plain(method, own[0]):
                found[label(method)] = (label(min(plain, key=lambda one: abs(place(one) - place(method)))),)
    return found


def _is_plain(method: Method, first: Method) -> bool:
    """Whether a setting is on the line of the first one of its method: only the main number differs, and is one number."""
    return line(method) is not None and line(method) == line(first)


def place(method: Method) -> float:
    """The main number of a setting, or the mean of several."""
    if method.depth:
        return fmean(method.depth)
    value = value_of(method, main_option(type(method)).name)
    return fmean(value) if isinstance(value, tuple) else float(value)


def _prunes(kind: type[Method]) -> bool:
    return main_option(kind).name == "sparsity"


def _thinned(methods: Sequence[Method]) -> list[Method]:
    """A few of the settings along a line, evenly spread, without its ends."""
    return [methods[(2 * part + 1) * len(methods) // (2 * THINNED)] for part in range(THINNED)]


def _candidate(
    job: Job, method: Method, command: Callable[[Method], Sequence[str]], allow_nonfinite: bool
) -> Candidate:
    name, words = label(method), tuple(command(method))

    def subject() -> Subject:
        made = edited_subject(replan(job, method), label=name, allow_nonfinite=allow_nonfinite)
        return replace(made, command=list(words))

    return Candidate(
        name,
        method.name,
        subject,
        (words,),
        lambda: replan(job, method),
        None if method.calibrated else {"steps": [_step(method)], "allow_nonfinite": allow_nonfinite},
        line(method),
        place(method),
    )


def _averaged(
    job: Job,
    first: Method,
    second: Hma,
    command: Callable[[Method], Sequence[str]],
    out: Path,
    allow_nonfinite: bool,
) -> Candidate:
    between = out.with_name(f"{out.name}-{first.title()}")
    before = [*command(first), "--out", str(between)]
    after = command_words(second, before[before.index("--pre") + 1], str(between))
    name = f"{label(first)}, {label(second)}"

    def planned() -> Job:
        pruned = Edited(replan(job, first), allow_nonfinite=allow_nonfinite)
        both = pair(job.pair.pre, pruned.checkpoint)
        both.notes.append(f"Before this, ft was pruned in memory, as by: {shlex.join(before)}")
        return plan_pair(both, second)

    def subject() -> Subject:
        made = edited_subject(planned(), label=name, allow_nonfinite=allow_nonfinite)
        return replace(made, command=after)

    steps = [_step(first), _step(second)]
    return Candidate(
        name,
        f"{first.name}, {second.name}",
        subject,
        (tuple(before), tuple(after)),
        planned,
        {"steps": steps, "allow_nonfinite": allow_nonfinite},
        (first.name, second.ratios),
        place(first),
    )


def _step(method: Method) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps({"method": method.name, **parameters(method)}))
    return found
