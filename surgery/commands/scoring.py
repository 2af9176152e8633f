"""The options of commands that score models: compare and sweep."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.evaluation.scoring import Scoring

SCORES, WORK = "Scores", "Work"

OPTIONS: dict[str, Any] = {
    "task": Annotated[
        list[str] | None,
        typer.Option(
            help="The fine-tuned task: a .txt, .jsonl, .json or .parquet file, a folder of them, or a task of "
            "lm-evaluation-harness. FILE:METRIC names a file's metric. Repeatable.",
            show_default=False,
            rich_help_panel=SCORES,
        ),
    ],
    "general": Annotated[
        list[str] | None,
        typer.Option(help="General ability, likewise.", show_default=False, rich_help_panel=SCORES),
    ],
    "metric": Annotated[
        str | None,
        typer.Option(
            help="Of --task: [b]loss[/b] of the answers, or generated answers that are [b]exact[/b], [b]numeric[/b] (the final "
            "number) or like by [b]rouge-l[/b]; choices by [b]acc[/b] or [b]acc_norm[/b].",
            show_default="by the file's fields",
            rich_help_panel=SCORES,
        ),
    ],
    "limit": Annotated[
        int | None,
        typer.Option(help="The first so many items of each.", show_default="all", rich_help_panel=SCORES),
    ],
    "prompt_field": Annotated[
        str | None,
        typer.Option(help="Field that holds the question.", show_default="by the names", rich_help_panel=SCORES),
    ],
    "completion_field": Annotated[
        str | None,
        typer.Option(help="Field that holds the answer.", show_default="by the names", rich_help_panel=SCORES),
    ],
    "seq_len": Annotated[int, typer.Option(help="Tokens in a window of plain text.", rich_help_panel=SCORES)],
    "max_new_tokens": Annotated[int, typer.Option(help="Tokens of a generated answer.", rich_help_panel=SCORES)],
    "batch_size": Annotated[int, typer.Option(help="Sequences in one forward pass.", rich_help_panel=WORK)],
    "dtype": Annotated[
        str,
        typer.Option(
            help="To compute in: float32, bfloat16 or float16. [b]auto[/b] is float32 on a processor, on a GPU the checkpoint's.",
            rich_help_panel=WORK,
        ),
    ],
    "device": Annotated[
        str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.", rich_help_panel=WORK)
    ],
    "cache": Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep scores here, and do not compute again what is here.",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ],
}
Ft = Annotated[str, typer.Option(help="The fine-tuned model or LoRA adapter, likewise.", show_default=False)]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write a page (index.html), plots, results.json and .csv to this folder.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON, each item too.")]


def scoring_command(act: Callable[..., None]) -> Callable[..., None]:
    """A command with its own options, which come first, and those of scoring, which it takes as `scoring`."""
    own = dict(inspect.signature(act).parameters)
    del own["scoring"]
    defaults = {entry.name: entry.default for entry in fields(Scoring)}

    def command(**values: Any) -> None:
        options = {name: values.pop(name) for name in OPTIONS}
        options |= {name: tuple(options[name] or ()) for name in ("task", "general")}
        act(scoring=Scoring(**options), **values)

    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=option,
            default=defaults[name] if defaults[name] != () else None,
        )
        for name, option in OPTIONS.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
    command.__signature__ = inspect.Signature([*parameters, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *shared]}
    command.__doc__ = act.__doc__
    return command
