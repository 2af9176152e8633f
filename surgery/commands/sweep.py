"""The command that scores methods at many settings, without writing them: sweep."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.commands.edit import AllowNonfinite, Exclude, Include, Pre, Rest, ScopeName, Strict, make_scope
from surgery.commands.scoring import AsJson, Ft, Report, scoring_command
from surgery.errors import OptionError

if TYPE_CHECKING:
    from surgery.comparison.sweep import Edits
    from surgery.evaluation.scoring import Scoring
    from surgery.methods import Method

SETTINGS, CHOICE = "Settings", "Choice"
# Methods that each option of a setting is for, and what is tried where it is not given.
USED = {
    "sparsity": (("fapm", "magnitude", "wanda", "ties"), "0.5:0.95:0.05"),
    "drop_rate": (("dare",), "0.5:0.9:0.1"),
    "ratio": (("half-reset",), "0.25:0.75:0.25"),
    "seed": (("half-reset", "dare"), "0"),
    "ratios": (("hma",), "0.1:0.9:0.1"),
    "calibration": (("wanda",), None),
    "samples": (("wanda",), None),
    "norms": (("wanda",), None),
}


def _setting(name: str, text: str) -> typer.models.OptionInfo:
    default = USED[name][1] or False
    found: typer.models.OptionInfo = typer.Option(help=text, show_default=default, rich_help_panel=SETTINGS)
    return found


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("sweep")(scoring_command(_sweep))


def _sweep(
    pre: Pre,
    ft: Ft,
    method: Annotated[
        str, typer.Option(help="fapm, magnitude, wanda, half-reset, hma, ties, dare: one, or several with commas.")
    ] = "fapm,magnitude,hma",
    sparsity: Annotated[
        str | None,
        _setting("sparsity", "Of fapm, magnitude, wanda and ties: numbers with commas, or first:last:step."),
    ] = None,
    drop_rate: Annotated[str | None, _setting("drop_rate", "Of dare, likewise.")] = None,
    ratio: Annotated[str | None, _setting("ratio", "Of half-reset, likewise.")] = None,
    seed: Annotated[str | None, _setting("seed", "Of half-reset and dare, with each ratio or rate.")] = None,
    ratios: Annotated[
        list[str] | None,
        _setting(
            "ratios",
            "Of hma: one setting (0.3,0.2,0.1), a range of plain averages (0.1:0.9:0.1), or [b]paper[/b], the 15 triples of the "
            "MoFO paper's E.5. Repeatable.",
        ),
    ] = None,
    calibration: Annotated[str | None, _setting("calibration", "Of wanda: text to run ft on, once.")] = None,
    samples: Annotated[int | None, _setting("samples", "Of wanda: stretches of that text, 128 unless given.")] = None,
    norms: Annotated[
        Path | None, _setting("norms", "Of wanda: norms that surgery wanda --save-norms kept, in place of a text.")
    ] = None,
    scope: ScopeName = "all",
    rest: Rest = "ft",
    include: Include = None,
    exclude: Exclude = None,
    choose: Annotated[
        str | None,
        typer.Option(
            help='Find the setting within "forgetting<=0.01" that keeps most of the task, or within "retention>=0.99" that '
            "forgets least. Along one number of one method by bisection, where the scores are monotone enough.",
            show_default=False,
            rich_help_panel=CHOICE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the chosen checkpoint to this folder.", show_default=False, rich_help_panel=CHOICE),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint at --out.", rich_help_panel=CHOICE)
    ] = False,
    strict: Strict = False,
    allow_nonfinite: AllowNonfinite = False,
    report: Report = None,
    as_json: AsJson = False,
    *,
    scoring: "Scoring",
) -> None:
    """Score methods at many settings, each edited in memory: which setting forgets less at the same task score?

    A row is byte for byte the checkpoint that the method's own command would write. Settings are tried from coarse to fine.
    Ctrl-C shows what is done, and with --cache the same command goes on from there. Needs pip install 'model-surgery\\[eval]'.
    """
    from surgery import display
    from surgery.calibrate.run import Calibration, calibrated
    from surgery.checkpoint.output import check_output
    from surgery.comparison.choose import parse_limit
    from surgery.comparison.display import scoring_progress, show
    from surgery.comparison.folder import Folder
    from surgery.comparison.grid import Grid, command_words, label, numbers, triples, whole_numbers
    from surgery.comparison.sweep import Edits, sweep
    from surgery.editing.job import plan, replan
    from surgery.evaluation.subject import open_subjects
    from surgery.methods import Wanda

    given = {
        "sparsity": sparsity,
        "drop_rate": drop_rate,
        "ratio": ratio,
        "seed": seed,
        "ratios": ratios,
        "calibration": calibration,
        "samples": samples,
        "norms": norms,
    }
    names = list(dict.fromkeys(word.strip() for word in method.split(",")))
    given = _completed(given, names)
    if out and not choose:
        raise OptionError("--out is for the chosen checkpoint: give --choose too.")
    limit = parse_limit(choose) if choose else None
    grid = Grid(
        numbers(str(given["sparsity"]), "--sparsity"),
        numbers(str(given["drop_rate"]), "--drop-rate"),
        numbers(str(given["ratio"]), "--ratio"),
        whole_numbers(str(given["seed"]), "--seed"),
        triples(ratios or [str(given["ratios"])], "--ratios"),
        make_scope(scope, rest, include, exclude),
    )
    groups = [grid.methods(name) for name in names]
    if "wanda" in names and not (calibration or norms):
        raise OptionError("wanda needs a text, --calibration, or norms that were kept, --norms.")
    job = plan(pre, ft, groups[0][0], strict=strict)
    target = check_output(out, job.inputs, force=force) if out else None
    jobs = dict.fromkeys(names, job)
    subjects = open_subjects(pre, ft)
    more = [*(["--out", str(out)] if out else []), *(["--allow-nonfinite"] if allow_nonfinite else [])]
    words = [*_words("calibration", calibration), *_words("samples", samples), *_words("norms", norms)]

    def command(one: "Method") -> list[str]:
        return command_words(one, pre, ft, [*(words if one.name == "wanda" else []), *more])

    edits = Edits(subjects, jobs, command, allow_nonfinite=allow_nonfinite)
    edits.check(one for group in groups for one in group)
    tasks, general = scoring.measures()
    folder = Folder(report) if report else None
    if "wanda" in names:
        wanted = Calibration(calibration, norms, samples=samples or Calibration.samples)
        with display.calibrating() as blocks:
            # Notes of the calibration are of no concern to the other methods.
            alone = replace(replan(job, Wanda(scope=grid.scope)), pair=replace(job.pair, notes=[*job.pair.notes]))
            jobs["wanda"] = calibrated(alone, wanted, device=scoring.device, advance=blocks)
        normed: Any = jobs["wanda"].method
        groups[names.index("wanda")] = [replace(normed, sparsity=value) for value in grid.sparsity]
    with scoring_progress(None if limit else 2 + sum(map(len, groups))) as observe:
        found = sweep(
            edits,
            groups,
            tasks,
            general,
            scoring,
            limit=limit,
            command=["surgery", *sys.argv[1:]],
            observe=observe,
        )
    try:  # the chosen checkpoint first: whoever reads our output may go away before its end
        if target and found.best is not None:
            _write(edits, found.best, found.document["choice"]["sentence"], target, force)
    finally:
        show(found.document, folder, as_json=as_json)
    if found.document["stopped"]:
        raise KeyboardInterrupt
    if limit and found.best is None:
        raise OptionError(found.document["choice"]["sentence"])
    if found.best is None or as_json:
        return
    display.say(f"The command for {label(found.best)}: {shlex.join(command(found.best))}")
    if target:
        display.say(f"Wrote {target}")


def _completed(given: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The settings with their defaults.

    Raises:
        OptionError: one is given for methods that are not swept.
    """
    for name, value in given.items():
        methods, _ = USED[name]
        if value and not set(methods) & set(names):
            raise OptionError(f"--{name.replace('_', '-')} is for {', '.join(methods)}, none of which is swept.")
    return {name: value or USED[name][1] for name, value in given.items()}


def _write(edits: "Edits", method: "Method", sentence: str, out: Path, force: bool) -> None:
    """Write the checkpoint of a setting, whose report says how it was chosen."""
    from surgery import display
    from surgery.editing.run import run

    job = edits.job(method)
    job.pair.notes.append(sentence)
    with display.progress(job.reading) as advance:
        run(
            replace(job, out=out, replace=force),
            allow_nonfinite=edits.allow_nonfinite,
            command=edits.commands(method),
            advance=advance,
        )


def _words(name: str, value: object) -> list[str]:
    return [f"--{name}", str(value)] if value else []
