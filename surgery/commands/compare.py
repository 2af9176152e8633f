"""The command that scores checkpoints: compare."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.commands.edit import Pre
from surgery.commands.scoring import AsJson, Ft, Report, scoring_command
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from surgery.evaluation.scoring import Scoring


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("compare")(scoring_command(_compare))


def _compare(
    pre: Pre,
    ft: Ft,
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CKPT",
            help="Further models: folders, hub ids, adapters, or task vectors of surgery extract. NAME=CKPT names a row.",
            show_default=False,
        ),
    ] = None,
    report: Report = None,
    as_json: AsJson = False,
    *,
    scoring: "Scoring",
) -> None:
    """Score models on the fine-tuned task and on general ability: which forgets less at the same task score?

    Kept is the task's score as a share of ft's; forgot is pre's average of the general scores less the model's. Losses and
    perplexities count there by how likely a token is, compared with ft and with pre. Needs pip install 'model-surgery\\[eval]'.
    """
    from surgery.comparison.compare import compare
    from surgery.comparison.display import scoring_progress, show
    from surgery.comparison.folder import Folder
    from surgery.evaluation.subject import open_subjects

    folder = Folder(report) if report else None
    subjects = open_subjects(pre, ft, checkpoints or ())
    tasks, general = scoring.measures()
    with scoring_progress(len(subjects)) as observe:
        document = compare(subjects, tasks, general, scoring, command=["surgery", *sys.argv[1:]], observe=observe)
    show(document, folder, as_json=as_json)
    if document["stopped"]:
        raise KeyboardInterrupt
    if document["failed"]:
        raise CheckpointError(document["failed"][0])
