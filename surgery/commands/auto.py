"""Edits that find their own setting: `--sparsity auto` of fapm, magnitude and wanda, `--optimize` of hma."""

import inspect
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.commands.edit import edit_command
from surgery.commands.scoring import OPTIONS
from surgery.errors import OptionError

if TYPE_CHECKING:
    from surgery.comparison.sweep import Edits
    from surgery.editing.job import Job
    from surgery.evaluation.scoring import Scoring
    from surgery.methods import Method

AUTO = "auto"
TRIED = "0:1:0.01"  # sparsities
MOST = 33  # of them, where scores are not monotone: every 0.03
BESIDE = 0.9  # what is planned before the search, which refuses what a sparsity does not change


def auto_sparsity(make_method: "Callable[..., Method]", complete: "Callable[..., Job] | None" = None) -> Any:
    """The command of a pruning method whose --sparsity may be "auto".

    Args:
        make_method, complete: as for `edit_command`.
    """
    panel = "With --sparsity auto"
    sparsity = Annotated[
        float,
        typer.Option(
            parser=_share_or_auto,
            metavar="NUMBER|auto",
            help="Share of each tensor's entries that goes back to pre, from 0 to 1; or [b]auto[/b], the one that keeps most of "
            "the task within --max-forgetting.",
        ),
    ]
    most = Annotated[
        float | None,
        typer.Option(
            help="How far the general score may fall below pre's: 0.01 is a point of accuracy, or one percent of likelihood.",
            show_default=False,
            rich_help_panel=panel,
        ),
    ]
    more = [*_scores(panel), _parameter("max_forgetting", most)]

    def make(**own: Any) -> "Method":
        search = {entry.name: own.pop(entry.name) for entry in more}
        auto = own["sparsity"] == AUTO
        _check(search, auto, "--sparsity auto", ("task", "general", "max_forgetting"))
        if auto and not math.isfinite(search["max_forgetting"]):
            raise OptionError(f"--max-forgetting must be a number, such as 0.01, not {search['max_forgetting']}.")
        return make_method(**own | ({"sparsity": BESIDE} if auto else {}))

    def finish(job: "Job", device: str, dry_run: bool, **own: Any) -> "Job":
        scoring = _scoring(own, device) if own["sparsity"] == AUTO else None
        # Before the calibration of wanda, which takes its time.
        measures = scoring.measures() if scoring and not dry_run else ([], [])
        if complete:
            job = complete(job, device, dry_run, **own)
        if not scoring:
            return job
        if dry_run:
            job.pair.notes.append("The sparsity would be searched for.")
            return job
        from surgery.comparison.choose import Limit
        from surgery.comparison.display import scoring_progress
        from surgery.comparison.grid import numbers
        from surgery.comparison.sweep import sweep

        edits = _edits(job, own, device, more, "sparsity")
        settings = [replace(job.method, sparsity=value) for value in numbers(TRIED, "--sparsity")]  # type: ignore[type-var]
        with scoring_progress(None) as observe:
            found = sweep(
                edits,
                [settings],
                *measures,
                scoring,
                limit=Limit("forgetting", own["max_forgetting"]),
                most=MOST,
                observe=observe,
            )
        if found.document["stopped"]:
            raise KeyboardInterrupt
        if found.best is None:
            raise OptionError(found.document["choice"]["sentence"])
        return _noted(edits, found.best, found.document["choice"]["sentence"])

    return edit_command(
        _signed(make, make_method, {"sparsity": _parameter("sparsity", sparsity, BESIDE)}, more),
        finish,
        lambda **own: f"{make_method.__name__.strip('_')}-{AUTO}" if own["sparsity"] == AUTO else None,
    )


def optimizing(make_method: "Callable[..., Method]") -> Any:
    """The command of hma, which may find its ratios."""
    panel = "With --optimize"
    optimize = Annotated[
        bool,
        typer.Option(
            "--optimize",
            help="Find the ratios of three parts, under a fixed mean, with the best mean of retention and 1 − forgetting: 25 "
            "settings are scored at most.",
            rich_help_panel=panel,
        ),
    ]
    mean = Annotated[float | None, typer.Option(help="Of the three ratios.", show_default="0.3", rich_help_panel=panel)]
    more = [_parameter("optimize", optimize, False), _parameter("mean", mean), *_scores(panel)]
    default = inspect.signature(make_method).parameters["ratios"].default

    def make(**own: Any) -> "Method":
        search = {entry.name: own.pop(entry.name) for entry in more}
        asked = search.pop("optimize")
        if asked and own["ratios"] != default:
            raise OptionError("--optimize finds the ratios: leave --ratios out, and give their --mean.")
        _check(search, asked, "--optimize", ("task", "general"))
        return make_method(**own)

    def finish(job: "Job", device: str, dry_run: bool, **own: Any) -> "Job":
        if not own["optimize"]:
            return job
        from surgery.comparison.display import scoring_progress
        from surgery.comparison.optimize import optimize
        from surgery.methods.scope import share

        center = 0.3 if own["mean"] is None else own["mean"]
        share("mean", center)
        if dry_run:
            job.pair.notes.append("The ratios would be searched for.")
            return job
        scoring = _scoring(own, device)
        tasks, general = scoring.measures()
        edits = _edits(job, own, device, more, "ratios")
        with scoring_progress(None) as observe:
            best, sentence = optimize(edits, center, tasks, general, scoring, observe=observe)
        return _noted(edits, best, sentence)

    return edit_command(
        _signed(make, make_method, {}, more), finish, lambda **own: "hma-optimized" if own["optimize"] else None
    )


def _scores(panel: str) -> list[inspect.Parameter]:
    """What the search scores on; surgery sweep has more options."""
    found = []
    for name in ("task", "general", "limit", "cache"):
        kind, option = OPTIONS[name].__origin__, OPTIONS[name].__metadata__[0]
        words = {"help": option.help, "metavar": option.metavar, "show_default": option.show_default}
        found.append(_parameter(name, Annotated[kind, typer.Option(**words, rich_help_panel=panel)]))
    return found


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _signed(
    make: "Callable[..., Method]",
    make_method: "Callable[..., Method]",
    changed: dict[str, inspect.Parameter],
    more: Sequence[inspect.Parameter],
) -> "Callable[..., Method]":
    """`make` with the options and the help of `make_method`, some of them changed, and more."""
    own = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(make_method).parameters.items()
    }
    signed = wraps(make_method)(make)
    signed.__signature__ = inspect.Signature([*(own | changed).values(), *more])  # type: ignore[attr-defined]
    return signed


def _share_or_auto(text: Any) -> Any:
    """A number, or the word "auto"."""
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number, nor auto.") from None


def _check(search: dict[str, Any], asked: bool, option: str, needed: Sequence[str]) -> None:
    """Refuse a search without its options, and its options without the search."""
    for name, value in search.items():
        if asked and name in needed and value in (None, []):
            raise OptionError(f"{option} needs {', '.join(map(_flag, needed))}.")
        if not asked and value not in (None, []):
            raise OptionError(f"{_flag(name)} goes with {option} only.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _scoring(own: dict[str, Any], device: str) -> "Scoring":
    from surgery.evaluation.scoring import Scoring

    return Scoring(
        task=tuple(own["task"]), general=tuple(own["general"]), limit=own["limit"], cache=own["cache"], device=device
    )


def _edits(job: "Job", own: dict[str, Any], device: str, more: Sequence[inspect.Parameter], setting: str) -> "Edits":
    """The job at any setting, and the command line for it: the one that was typed, without the search."""
    from surgery.comparison.grid import setting_words
    from surgery.comparison.sweep import Edits
    from surgery.evaluation.subject import open_subjects

    typed = ["surgery", *sys.argv[1:]]
    flags = {"--optimize", "--resume"}
    valued = {_flag(entry.name) for entry in more} | {f"--{setting}"}
    subjects = open_subjects(job.pair.pre.source.typed, job.pair.ft.source.typed)
    return Edits(
        subjects,
        {job.method.name: job},
        lambda method: [*_without(typed, flags, valued - flags), *setting_words(method)],
        device,
        own["allow_nonfinite"],
    )


def _without(words: Sequence[str], flags: set[str], valued: set[str]) -> list[str]:
    """Words of a command line without some options and their values."""
    kept, skip = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        if skip or option in flags:
            skip = False
        elif option in valued:
            skip = not equals
        else:
            kept.append(word)
    return kept


def _noted(edits: "Edits", method: "Method", sentence: str) -> "Job":
    """The job at the chosen setting, which says so in its report."""
    job = edits.job(method)
    job.pair.notes.extend([sentence, f"Without the search: {shlex.join(edits.commands(method))}"])
    return job
