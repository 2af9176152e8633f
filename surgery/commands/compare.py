"""The command that scores checkpoints: compare."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import typer

from surgery.commands.builder import command
from surgery.commands.shared import Pair, Shown
from surgery.errors import CheckpointError
from surgery.evaluation.scoring import Scoring
from surgery.option import option
from surgery.processes import is_first


@dataclass(frozen=True)
class Others:
    """Models beside the pair."""

    checkpoints: tuple[str, ...] = option(
        (),
        help="Further models: folders, hub ids, adapters, or task vectors of surgery extract. NAME=CKPT names a row.",
        metavar="CKPT",
        argument=True,
    )


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(
        app,
        "compare",
        [Pair, Others, Shown, Scoring],
        _compare,
    )


def _compare(pair: Pair, others: Others, shown: Shown, scoring: Scoring) -> None:
    """Score models on the fine-tuned task and on general ability: which forgets less at the same task score?

    Kept is the task's score as a share of ft's; forgot is pre's average of the general scores less the model's. Losses and
    perplexities count there by how likely a token is, compared with ft and with pre. Needs pip install 'model-surgery\\[eval]'.
    """
    from surgery.comparison.compare import compare
    from surgery.comparison.display import scoring_progress, show
    from surgery.comparison.folder import Folder
    from surgery.evaluation.spread import spread
    from surgery.evaluation.subject import open_subjects

    inputs = scoring.inputs(pair.pre, pair.ft, *others.checkpoints)
    folder = Folder(shown.report, inputs) if shown.report and is_first() else None
    subjects = open_subjects(pair.pre, pair.ft, others.checkpoints)
    tasks, general = scoring.measures(general=False)
    with scoring_progress(len(subjects)) as observe:
        mine = spread(subjects, [*tasks, *general], scoring, observe)
        if mine is None:
            return
        document = compare(subjects, tasks, general, mine, command=["surgery", *sys.argv[1:]], observe=observe)
    show(document, folder, as_json=shown.as_json)
    if document["stopped"]:
        raise KeyboardInterrupt
    if document["failed"]:
        raise CheckpointError(document["failed"][0])
