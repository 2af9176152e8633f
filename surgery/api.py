"""The Python interface: what the commands do, as functions.

    import surgery

    pair = surgery.open_pair("pre", "ft")
    repaired = surgery.edit(pair, "fapm", sparsity=0.9)
    scores = surgery.evaluate(repaired, ["test.jsonl"])
    found = surgery.compare(pair, {"fapm": repaired, "mofo": "./ckpt-mofo"}, task=["test.jsonl"], general=["wikitext.txt"])
    print(found)
    best = surgery.auto(pair, task=["test.jsonl"], max_forgetting=0.01)
    print(best.sentence)

A model is a folder, a file, a hub id with an optional `@revision`, a LoRA adapter, a task vector of `surgery extract`, or an
edit, whether it was written or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.output import check_output
from surgery.checkpoint.pair import Pair, pair
from surgery.checkpoint.source import Checkpoint, open_both
from surgery.editing.job import Job, plan_pair
from surgery.errors import OptionError
from surgery.evaluation.scoring import Scoring
from surgery.evaluation.subject import Subject, base_subject, edited_subject, open_base, open_subject, tuned_subject
from surgery.methods import METHODS, Method
from surgery.paths import local

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from surgery.evaluation.scores import Scores


@dataclass(frozen=True)
class Edit:
    """An edited model. Its tensors are made when they are read, so that it takes no memory and no disk.

    Attributes:
        job: the planned edit.
        out: the checkpoint that was written, if one was.
        report: what `surgery-report.json` in it holds.
    """

    job: Job
    out: Path | None = None
    report: dict[str, Any] | None = None


Model = str | Path | Edit
Measures = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Comparison:
    """Models on one table: printed as text, shown in a notebook as a table.

    Attributes:
        document: everything, down to items, as in results.json.
    """

    document: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each model: label, scores, retention, forgetting, distance, effective_sparsity, pareto, …"""
        rows: list[dict[str, Any]] = self.document["rows"]
        return rows

    def __str__(self) -> str:
        from surgery.comparison.display import as_text

        return as_text(self.document)

    def _repr_html_(self) -> str:
        from surgery.comparison.page.table import table

        return table(self.document)

    def pareto(self) -> Figure:
        """Retention against forgetting, with intervals."""
        from surgery.comparison.plot import pareto

        return pareto(self.document)

    def skills(self) -> Figure:
        """The score on each measure."""
        from surgery.comparison.plot import skills

        return skills(self.document)

    def curves(self) -> Figure:
        """Scores against the setting of each method that has several."""
        from surgery.comparison.plot import curves

        return curves(self.document)

    def write(self, folder: str | Path) -> Path:
        """Write the page, the pictures, results.json and .csv; returns the page.

        Raises:
            OutputError: the folder cannot be written, or holds something else.
        """
        from surgery.comparison.folder import PAGE, Folder

        Folder(Path(folder), local(*(row["checkpoint"] for row in self.rows))).write(self.document)
        return Path(folder) / PAGE


@dataclass(frozen=True)
class Search(Comparison):
    """The result of `auto`: the comparison on the items that prove, with the claim.

    Attributes:
        model: the winner, an edit or a model that is there; None where nothing was proved to meet the limit.
    """

    model: Model | None = None

    @property
    def sentence(self) -> str:
        """The result in plain words."""
        return str(self.document["auto"]["sentence"])


def open_pair(pre: str | Path, ft: str | Path) -> Pair:
    """Open a pre-trained model and its fine-tune, reading headers only.

    Raises:
        SurgeryError: one cannot be read, or they do not belong together.
    """
    base, (tuned,) = open_both(str(pre), str(ft))
    return pair(base, tuned)


def edit(
    pair: Pair,
    method: str | Method = "fapm",
    *,
    out: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    **parameters: Any,
) -> Edit:
    """Edit the task vector of a pair.

    Args:
        method: a name in `surgery.methods.METHODS`, or such a method with its parameters.
        out: write the checkpoint to this folder; without it nothing is written, and nothing done until the result is read.
        force: replace an earlier output of surgery that is there.
        device: of the writing, as `surgery fapm --device`.
        parameters: of the method, as its class has them: sparsity=0.9, ratios=(0.3, 0.2, 0.1), …

    Raises:
        OptionError: there is no such method, or its parameters do not fit it or the model.
        SurgeryError: the output cannot be written.
    """
    from surgery.editing.run import run

    job = plan_pair(pair, _method(method, parameters))
    if out is None:
        return Edit(job)
    target = check_output(Path(out), job.inputs, force=force)
    return Edit(job, target, run(replace(job, out=target, replace=force), device=device))


def evaluate(
    model: Model,
    measures: Measures,
    *,
    pre: str | Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Scores]:
    """Score one model.

    Args:
        measures: files, `FILE:METRIC`, folders of files, or tasks of lm-evaluation-harness; one, or several.
        pre: what an adapter, a GGUF file or a task vector builds on.
        metric: of the files; by default what their fields allow.
        limit: items of each measure at most, the first ones.
        options: others of `surgery.evaluation.scoring.Scoring`: batch_size, device, cache, …

    Returns:
        By the measures' names.

    Raises:
        SurgeryError: the model or a measure is not as it should be.
    """
    from surgery.evaluation.scores import BasedMeasure

    scoring = Scoring(limit=limit, **options)
    found = scoring.find(_names(measures), metric=metric)
    if based := [measure.name for measure in found if isinstance(measure, BasedMeasure)]:
        raise OptionError(f"{based[0]} compares a model with its base: use `surgery.compare`.")
    with scoring.bench(found) as bench:
        return bench.score(_subject(model, None if pre is None else open_base(str(pre)))).scores


def compare(
    pair: Pair,
    models: Model | Sequence[Model] | Mapping[str, Model] = (),
    *,
    task: Measures,
    general: Measures,
    metric: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Comparison:
    """Score pre, ft and others, and put them on one table: what each kept of the task, and what it forgot.

    Args:
        models: beside the pair; names for their rows as keys. One that cannot be scored has no row, and a note says why.
        task, general: measures, as for `evaluate`.
        metric: of the task's files.
        limit: items of each measure at most, the first ones.
        options: others of `surgery.evaluation.scoring.Scoring`.

    Raises:
        OptionError: two rows have one name.
        SurgeryError: a model cannot be opened, or pre, ft or a measure is not as it should be.
    """
    from surgery.comparison import compare as comparison

    scoring = Scoring(task=_names(task), general=_names(general), metric=metric, limit=limit, **options)
    named: Iterable[tuple[str | None, Model]]
    if isinstance(models, Mapping):
        named = ((str(label), model) for label, model in models.items())
    else:
        named = ((None, model) for model in ([models] if isinstance(models, Model) else models))
    subjects = [base_subject(pair.pre), tuned_subject(pair)]
    subjects += [_subject(model, pair.pre, label) for label, model in named]
    labels = [subject.label for subject in subjects]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise OptionError(f"Two rows are named {twice.pop()}. Give models with names: {{name: model}}.")
    return Comparison(comparison.compare(subjects, *scoring.measures(), scoring))


def auto(
    pair: Pair,
    *,
    task: Measures,
    general: Measures = ("self",),
    max_forgetting: float | None = None,
    min_retention: float | None = None,
    models: Mapping[str, Model] | None = None,
    methods: Sequence[str] | None = None,
    metric: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    seconds: float | None = None,
    **options: Any,
) -> Search:
    """Find the model between pre and ft that keeps the task and forgets least, and prove it, as `surgery auto` does.

    Args:
        task, general: measures, as for `evaluate`; "self" is the divergence on text that pre writes.
        max_forgetting, min_retention: the limit, a share; with neither, the best trade-off is found.
        models: further candidates, by their names.
        methods: that are tried; by default all that need no calibration and are not slow.
        metric: of the task's files.
        limit: items of each measure at most, the first ones.
        seed: of the halves into which items are dealt.
        seconds: that it may take, about.
        options: others of `surgery.evaluation.scoring.Scoring`.

    Raises:
        OptionError: both limits are given, there are too few items, or none is given and ft is no better than pre on the task.
        SurgeryError: a model cannot be opened, or pre, ft or a measure is not as it should be.
    """
    from surgery.comparison.auto import auto as search
    from surgery.comparison.candidates import averaged, candidates, default_methods, existing, untried
    from surgery.comparison.grid import command_words
    from surgery.comparison.race import wanted

    goal = wanted(max_forgetting, min_retention)
    scoring = Scoring(task=_names(task), general=_names(general), metric=metric, limit=limit, **options)
    tried = default_methods(methods)
    if not tried:
        raise OptionError(f"There is nothing to try. Choose `methods` from {', '.join(METHODS)}.")
    job = plan_pair(pair, tried[0])

    def line(method: Method) -> list[str]:
        return command_words(method, pair.pre.source.typed, pair.ft.source.typed)

    found, notes = candidates(job, tried, line)
    if methods is None:
        found += averaged(job, line, out=job.out)
        notes += untried(calibrated=False)
    subjects = [base_subject(pair.pre), tuned_subject(pair)]
    there = [_subject(model, pair.pre, label) for label, model in (models or {}).items()]
    tasks, measures = scoring.measures()
    with scoring.bench([*tasks, *measures]) as bench:
        made = search(
            subjects,
            [existing(subjects[1]), *map(existing, there), *found],
            tasks,
            measures,
            bench,
            goal,
            seed=seed,
            seconds=seconds,
            notes=notes,
        )
    winner = made.winner
    model = None if winner is None else Edit(winner.job()) if winner.job else winner.subject().checkpoint.source.typed
    return Search(made.document, model)


def _names(measures: Measures) -> tuple[str, ...]:
    return tuple(map(str, [measures] if isinstance(measures, str | Path) else measures))


def _method(method: str | Method, parameters: dict[str, Any]) -> Method:
    if not isinstance(method, str):
        if parameters:
            raise OptionError(f"{method.name} has its parameters already. Leave out {', '.join(parameters)}.")
        return method
    if method not in METHODS:
        raise OptionError(f"There is no method {method}. Choose from {', '.join(METHODS)}.")
    try:
        return METHODS[method](**parameters)
    except TypeError as error:
        raise OptionError(f"{method}: {str(error).rpartition('() ')[2]}. See help(surgery.methods).") from None


def _subject(model: Model, pre: Checkpoint | None, label: str | None = None) -> Subject:
    if isinstance(model, Edit):
        return edited_subject(model.job, label=label)
    return open_subject(str(model), pre, label=label)
