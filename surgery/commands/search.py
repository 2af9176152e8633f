"""Edits that find their own setting: `--sparsity auto` of the pruning methods, `--optimize` of hma."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from surgery.commands.shared import Limits
from surgery.errors import OptionError
from surgery.evaluation.scoring import Scoring
from surgery.methods import Hma, Method
from surgery.option import chosen, declared_options, flag, option

if TYPE_CHECKING:
    from surgery.comparison.race import Goal
    from surgery.editing.job import Job

AUTO = "auto"
TRIED = "0:1:0.02"  # sparsities
PARTS = 3
SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)  # of a part's ratio from the mean
BESIDE = 0.9  # what is planned before the search, which refuses what a sparsity does not change
WITH_AUTO, WITH_OPTIMIZE = "With --sparsity auto", "With --optimize"
SCORED = ("task", "general", "limit", "cache")


@dataclass(frozen=True)
class Optimize:
    """Whether the ratios of hma are searched for, and under which mean."""

    optimize: bool = option(
        False,
        help="Find the ratios of three parts, under a fixed mean, with the best trade-off between the task and forgetting.",
        panel=WITH_OPTIMIZE,
    )
    mean: float | None = option(None, help="Of the three ratios.", shown="0.3", panel=WITH_OPTIMIZE)


def parts(method: type[Method]) -> list[type]:
    """The options of a method's search, if it has one."""
    if method is Hma:
        return [Optimize, chosen(Scoring, SCORED, panel=WITH_OPTIMIZE)]
    limit = chosen(Limits, ["max_forgetting"], panel=WITH_AUTO)
    return [chosen(Scoring, SCORED, panel=WITH_AUTO), limit] if _has_sparsity(method) else []


def words(method: type[Method]) -> dict[str, dict[str, Any]]:
    """How the method's own options read where they may be searched for."""
    if not _has_sparsity(method):
        return {}
    return {
        "sparsity": {
            "parse": _share_or_auto,
            "metavar": "NUMBER|auto",
            "help": "Share of each tensor's entries that goes back to pre, from 0 to 1; or [b]auto[/b], the one that keeps most "
            "of the task within --max-forgetting.",
        }
    }


def asked(method: type[Method], values: dict[str, Any]) -> str | None:
    """The default output's name where a search is asked for; None where none is. Sets what is planned before it.

    Args:
        values: of the method's options and its search's.

    Raises:
        OptionError: the search lacks an option, or one of its options is given without it.
    """
    if values["depth"] and (values.get("optimize") or values.get("sparsity") == AUTO):
        raise OptionError("`depth` sets the numbers of all depths, so there is nothing to search for.")
    if method is Hma:
        if values["optimize"] and values["ratios"] != Hma().ratios:
            raise OptionError("`optimize` finds the ratios: leave `ratios` out, and give their `mean`.")
        _check(values, ("mean", *SCORED), values["optimize"], "`optimize`", ("task", "general"))
        return "hma-optimized" if values["optimize"] else None
    if not _has_sparsity(method):
        return None
    auto, needed = values["sparsity"] == AUTO, ("task", "general", "max_forgetting")
    _check(values, (*SCORED, "max_forgetting"), auto, "`sparsity` auto", needed)
    if not auto:
        return None
    _goal(values)
    values["sparsity"] = BESIDE
    return f"{method.name}-{AUTO}"


def measures(values: Mapping[str, Any], device: str, job: Job) -> Any:
    """The scoring of a search, and its measures, which are checked here, before a calibration that takes its time."""
    scoring = Scoring(**{name: values[name] for name in SCORED}, device=device)
    scoring.inputs(*map(str, job.inputs))  # which the scores are never kept in
    return scoring, *scoring.measures()


def found(job: Job, values: Mapping[str, Any], device: str, allow_nonfinite: bool, scored: Any) -> Job:
    """The job at the setting that wins, which says so in its report; see `surgery.comparison.auto`.

    Args:
        job: checked, at some setting.
        scored: of `measures`.

    Raises:
        OptionError: no setting was proved to meet the limit.
        KeyboardInterrupt: Ctrl-C.
    """
    from surgery.comparison.auto import auto
    from surgery.comparison.candidates import candidates
    from surgery.comparison.display import race_progress
    from surgery.evaluation.subject import open_subjects

    scoring, tasks, general = scored
    subjects = open_subjects(job.pair.pre.source.typed, job.pair.ft.source.typed)
    tried, _ = candidates(
        job, _tried(job.method, values), partial(_command, type(job.method)), allow_nonfinite=allow_nonfinite
    )
    goal = _goal(values)
    with race_progress() as (observe, tell), scoring.bench([*tasks, *general], observe) as bench:
        made = auto(subjects, tried, tasks, general, bench, goal, tell=tell)
    if made.document["stopped"]:
        raise KeyboardInterrupt
    sentence = made.document["auto"]["sentence"]
    if made.winner is None or made.winner.job is None:
        raise OptionError(sentence)
    best = made.winner.job()
    best.pair.notes.extend([sentence, f"Without the search: {shlex.join(made.winner.commands[0])}"])
    return best


def _goal(values: Mapping[str, Any]) -> Goal:
    """The goal of the search.

    Raises:
        OptionError: the limit is no share.
    """
    from surgery.comparison.race import wanted

    return wanted(values.get("max_forgetting"), None)


def _tried(method: Method, values: Mapping[str, Any]) -> list[Method]:
    """The settings that race."""
    from surgery.comparison.grid import numbers

    if not isinstance(method, Hma):
        return [replace(method, sparsity=value) for value in numbers(TRIED, "sparsity")]  # type: ignore[call-arg]
    mean = _mean(values)
    moved = (shifts for shifts in product(SHIFTS, repeat=PARTS) if abs(sum(shifts)) < 1e-9)
    ratios = [tuple(round(mean + shift, 9) for shift in shifts) for shifts in moved]
    return [Hma(parts) for parts in ratios if all(0 <= ratio <= 1 for ratio in parts)]


def planned(job: Job, values: Mapping[str, Any]) -> None:
    """Note in a dry run that a search would follow."""
    if isinstance(job.method, Hma):
        _mean(values)
    what = "ratios" if isinstance(job.method, Hma) else "sparsity"
    job.pair.notes.append(f"The {what} would be searched for.")


def _has_sparsity(method: type[Method]) -> bool:
    return not method.merges and any(one.name == "sparsity" for one in declared_options(method))


def _mean(values: Mapping[str, Any]) -> float:
    from surgery.methods.scope import share

    mean = 0.3 if values["mean"] is None else float(values["mean"])
    share("mean", mean)
    return mean


def _share_or_auto(text: str) -> float | str:
    try:
        return AUTO if text == AUTO else float(text)
    except ValueError:
        raise ValueError(f"takes a number or auto, not {text!r}.") from None


def _check(values: Mapping[str, Any], names: Sequence[str], wanted: bool, by: str, needed: Sequence[str]) -> None:
    """Refuse a search without its options, and its options without the search."""
    for name in names:
        missing = values[name] in (None, ())
        if wanted and name in needed and missing:
            raise OptionError(f"{by} needs {', '.join(f'`{one}`' for one in needed)}.")
        if not wanted and not missing:
            raise OptionError(f"`{name}` goes with {by} only.")


def _command(kind: type[Method], method: Method) -> list[str]:
    """The command line for a setting: the one that was typed, without the search."""
    from surgery.comparison.grid import setting_words

    flags = {flag("optimize"), flag("resume")}
    own = [one.name for part in parts(kind) for one in declared_options(part)]
    valued = {flag(name) for name in own} - flags | set(setting_words(method)[:1])
    return [*_without(["surgery", *sys.argv[1:]], flags, valued), *setting_words(method)]


def _without(line: Sequence[str], flags: set[str], valued: set[str]) -> list[str]:
    """The words of a command line without some options and their values."""
    kept, skip = [], False
    for word in line:
        name, equals, _ = word.partition("=")
        if skip or name in flags:
            skip = False
        elif name in valued:
            skip = not equals
        else:
            kept.append(word)
    return kept
