"""The command that scores methods at many settings, without writing them: sweep."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from surgery.calibrate.options import Calibration
from surgery.commands.builder import command
from surgery.commands.shared import FORCE, Checks, Pair, Shown, with_norms
from surgery.errors import OptionError
from surgery.evaluation.scoring import Scoring
from surgery.methods import METHODS
from surgery.option import Declared, Option, chosen, declared_options, flag, option, united
from surgery.processes import is_first

if TYPE_CHECKING:
    from surgery.comparison.sweep import Edits
    from surgery.methods import Method

SETTINGS, CHOICE = "Settings", "Choice"
# Of a calibration, whose seed is not that of the methods.
TEXT = ("calibration", "samples", "norms")


@dataclass(frozen=True)
class Methods:
    """The methods that are tried."""

    method: str = option("fapm,magnitude,hma", help=f"{', '.join(METHODS)}: one, or several with commas.")


@dataclass(frozen=True)
class Choosing:
    """Whether one setting is chosen, and where it goes."""

    choose: str | None = option(
        None,
        help='Find the setting within "forgetting<=0.01" that keeps most of the task, or within "retention>=0.99" that '
        "forgets least: chosen on half of the items, and proved on the other half.",
        panel=CHOICE,
    )
    out: Path | None = option(None, help="Write the chosen checkpoint to this folder.", panel=CHOICE)
    force: bool = option(False, help=FORCE, panel=CHOICE)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    texts = chosen(Calibration, TEXT, panel=SETTINGS)
    kinds = [*METHODS.values(), texts]
    command(
        app,
        "sweep",
        [Pair, Methods, united(kinds, changed=_words), Choosing, Checks, Shown, Scoring],
        _sweep,
    )


def _words(one: Declared, having: Sequence[type]) -> Option:
    """How an option of some methods reads in a sweep."""
    if one.option.swept is None:
        told: dict[str, list[type]] = {}  # methods may mean different things by one name
        for kind in having:
            text = next(other.option.help for other in declared_options(kind) if other.name == one.name)
            told.setdefault(text, []).append(kind)
        return replace(
            one.option, help=" ".join(f"{_of(kinds)}: {text}" for text, kinds in told.items()), panel=SETTINGS
        )
    of = _of(having)
    tried = "words with commas." if one.kind is str else "numbers with commas, or first:last:step."
    if one.option.parse is not None:
        words = "".join(f", or [b]{name}[/b], those of the paper" for name in one.option.swept.named)
        tried = f"one setting, or a range first:last:step of single numbers{words}. Repeatable."
    return replace(
        one.option, help=f"{of}: {tried}", panel=SETTINGS, shown=one.option.swept.grid, parse=None, tried=True
    )


def _of(kinds: Sequence[type]) -> str:
    """Name the methods that have an option: "Of fapm, magnitude and wanda"; one of none is of those that are calibrated."""
    named = [str(kind.name) for kind in kinds if hasattr(kind, "name")]
    *names, last = named or [kind.name for kind in METHODS.values() if kind.calibrated]
    return f"Of {', '.join(names)} and {last}" if names else f"Of {last}"


def _sweep(
    pair: Pair, chosen: Methods, given: Any, choosing: Choosing, checks: Checks, shown: Shown, scoring: Scoring
) -> None:
    """Score methods at many settings, each edited in memory: which setting forgets less at the same task score?

    A row is byte for byte the checkpoint that the method's own command would write. Settings are tried from coarse to fine.
    Ctrl-C shows what is done, and with --cache the same command goes on from there. Needs pip install 'model-surgery\\[eval]'.
    """
    from surgery.checkpoint.output import check_output
    from surgery.comparison.display import scoring_progress, show
    from surgery.comparison.folder import Folder
    from surgery.comparison.grid import command_words, interleaved, label, named, settings
    from surgery.comparison.race import parse_goal
    from surgery.comparison.sweep import Edits, sweep
    from surgery.display import say
    from surgery.editing.job import plan
    from surgery.evaluation.spread import spread
    from surgery.evaluation.subject import open_subjects
    from surgery.methods.method import main_option, swept_options

    kinds = [named(name) for name in dict.fromkeys(word.strip() for word in chosen.method.split(","))]
    values = {name: value for name, value in vars(given).items() if value not in (None, ())}
    calibrated = {name: values[name] for name in TEXT if name in values}
    _check(values, kinds)
    if choosing.out and not choosing.choose:
        raise OptionError("`out` is for the chosen checkpoint: give `choose` too.")
    goal = parse_goal(choosing.choose) if choosing.choose else None
    swept = {one.name for kind in kinds for one in swept_options(kind)}
    typed = {name: value for name, value in values.items() if name in swept}
    fixed = {name: value for name, value in values.items() if name not in swept}
    groups = [settings(kind, typed, fixed) for kind in kinds]
    calibrating = [kind for kind in kinds if kind.calibrated]
    if calibrating and not ({"calibration", "norms"} & calibrated.keys()):
        raise OptionError(f"{calibrating[0].name} needs a text, `calibration`, or norms that were kept, `norms`.")
    job = plan(pair.pre, pair.ft, groups[0][0], strict=checks.strict)
    target = check_output(choosing.out, job.inputs, force=choosing.force) if choosing.out else None
    jobs = {kind.name: job for kind in kinds}
    subjects = open_subjects(pair.pre, pair.ft)
    more = [*(["--out", str(choosing.out)] if choosing.out else [])]
    more += ["--allow-nonfinite"] if checks.allow_nonfinite else []
    words = [word for name, value in calibrated.items() for word in (flag(name), str(value))]

    def line(one: Method) -> list[str]:
        return command_words(one, pair.pre, pair.ft, [*(words if one.calibrated else []), *more])

    edits = Edits(subjects, jobs, line, allow_nonfinite=checks.allow_nonfinite)
    edits.check(one for group in groups for one in group)
    inputs = [*job.inputs, *scoring.inputs(pair.pre, pair.ft)]
    tasks, general = scoring.measures()
    folder = Folder(shown.report, inputs) if shown.report and is_first() else None
    for kind in calibrating:
        at, name = kinds.index(kind), main_option(kind).name
        jobs[kind.name] = with_norms(job, groups[at][0], calibrated, scoring.device)
        normed: Any = jobs[kind.name].method
        groups[at] = [replace(normed, **{name: getattr(one, name)}) for one in groups[at]]
    with scoring_progress(2 + sum(map(len, groups))) as observe:
        rows = [edits.subject(method) for method in interleaved(groups)]
        mine = spread([*subjects, *rows], [*tasks, *general], scoring, observe)
        if mine is None:
            return
        found = sweep(
            edits,
            groups,
            tasks,
            general,
            mine,
            goal=goal,
            command=["surgery", *sys.argv[1:]],
            observe=observe,
        )
    try:  # the chosen checkpoint first: whoever reads our output may go away before its end
        if target and found.best is not None:
            _write(edits, found.best, found.document["choice"]["sentence"], target, choosing.force)
    finally:
        show(found.document, folder, as_json=shown.as_json)
    if found.document["stopped"]:
        raise KeyboardInterrupt
    if goal and found.best is None:
        raise OptionError(found.document["choice"]["sentence"])
    if found.best is None or shown.as_json:
        return
    say(f"The command for {label(found.best)}: {shlex.join(line(found.best))}")
    if target:
        say(f"Wrote {target}")


def _check(values: Mapping[str, Any], kinds: Sequence[type[Method]]) -> None:
    """Refuse an option of methods that are not swept.

    Raises:
        OptionError: there is one.
    """
    for name in values:
        having = [
            kind.name
            for kind in METHODS.values()
            if any(one.name == name for one in declared_options(kind)) or (kind.calibrated and name in TEXT)
        ]
        if not {kind.name for kind in kinds} & set(having):
            raise OptionError(f"`{name}` is for {', '.join(having)}, none of which is swept.")


def _write(edits: Edits, method: Method, sentence: str, out: Path, force: bool) -> None:
    """Write the checkpoint of a setting, whose report says how it was chosen."""
    from surgery.display import progress
    from surgery.editing.run import run

    job = edits.job(method)
    job.pair.notes.append(sentence)
    with progress(job.reading) as advance:
        run(
            replace(job, out=out, replace=force),
            allow_nonfinite=edits.allow_nonfinite,
            command=edits.commands(method),
            advance=advance,
        )
