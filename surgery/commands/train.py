"""The command that fine-tunes: train."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from surgery.commands.builder import command
from surgery.commands.builder import typed as as_typed
from surgery.errors import OptionError
from surgery.option import declared_options, option
from surgery.train.settings import OUTPUT, Settings


@dataclass(frozen=True)
class Given:
    """The options that are no settings of the training."""

    preset: str | None = option(
        None,
        help="A paper's settings: [b]fapm[/b] (§4), [b]hft[/b] (A.2.3) or [b]mofo[/b] (D.3); with several --data those of its "
        "continual training. Options that are given win.",
        metavar="PAPER",
    )
    config: Path | None = option(None, metavar="FILE", help="Options in YAML; those on the command line win.")
    dry_run: bool = option(False, help="Show the rounds and what would be frozen, and train nothing.", panel=OUTPUT)
    resume: bool = option(False, help="Continue a run that broke off.", panel=OUTPUT)
    force: bool = option(False, help="Replace an earlier output of surgery at --out.", panel=OUTPUT)
    plot: Path | None = option(
        None,
        metavar="FILE",
        help="With several --data: draw the tasks' scores after each round to FILE.png, .svg or .pdf. Needs matplotlib.",
        panel=OUTPUT,
    )
    as_json: bool = option(False, flag="--json", help="Print the report as JSON.", panel=OUTPUT)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(
        app,
        "train",
        [Settings, Given],
        _train,
        complete=_configured,
    )


def _configured(values: dict[str, Any], typed: frozenset[str]) -> dict[str, Any]:
    """The options with those of the --config file, where they were not typed, and else those of the --preset.

    Raises:
        OptionError: the file cannot be read, or something has to be given and is not.
    """
    from surgery.train.config import read_config
    from surgery.train.presets import preset

    found = read_config(values["config"]) if values["config"] is not None else {}
    given = values | {name: value for name, value in found.items() if name not in typed}
    if values["preset"] is not None:
        paper = preset(values["preset"], dpo=given["task"] == "dpo", rounds=len(given["data"] or ()))
        parse = {one.name: one.option.parse for one in declared_options(Settings)}
        for name in paper.keys() - typed - found.keys():
            given[name] = parsed(as_typed(paper[name])) if (parsed := parse[name]) else paper[name]
    for name in ("model", "data", "out"):
        if not given[name]:
            raise OptionError(f"`{name}` is missing. Give it here or in `config`.")
    return given


def _train(settings: Settings, given: Given) -> None:
    """Fine-tune a model with MoFO, half fine-tuning (HFT) or the papers' baselines; the result is an ordinary checkpoint.

    TRL does the training. Data is chat (messages), instruction (instruction, input, output), prompt and completion, question and
    answer, text, or for dpo prompt, chosen and rejected; the first record decides. Defaults are the MoFO paper's. The result has
    the model's dtype, tokenizer and configuration. Needs pip install 'model-surgery\\[train]'.
    """
    from contextlib import ExitStack

    from surgery.paths import OutFile, local
    from surgery.train.display import Screen
    from surgery.train.plan import Observer, plan
    from surgery.train.run import train

    if given.plot is not None:
        from surgery.pictures import PICTURE, check_matplotlib, render

        if not settings.multi:
            raise OptionError("`plot` draws the scores of several tasks: give more than one `data`, or leave it out.")
        check_matplotlib()
    with ExitStack() as places:
        screen = places.enter_context(Screen(quiet=given.as_json))
        if given.dry_run:
            screen.show_plan(plan(settings, Observer(screen.say)))
            return
        picture = None
        if given.plot and screen.leads:
            inputs = local(settings.model, *settings.data, *settings.older)
            picture = places.enter_context(OutFile(given.plot, PICTURE, "plot", inputs))
        report = train(
            settings,
            force=given.force,
            resume=given.resume,
            command=["surgery", *sys.argv[1:]],
            observer=Observer(screen.say, screen.step),
        )
        if picture is not None:
            from surgery.train.plot import heat_map

            picture.write(render(heat_map(report), picture.path.suffix.lower()[1:]))
    screen.show(report, settings.out)
    if picture is not None:
        screen.say(f"Wrote {picture.path}")
