"""Where models are scored: one after another in one place in memory, on the same measures, each only once."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.checksum import weights_fingerprint
from surgery.errors import CheckpointError, OptionError, SurgeryError
from surgery.evaluation.cache import Cache
from surgery.evaluation.scores import Measure, Scores
from surgery.evaluation.subject import Subject
from surgery.provenance import versions

if TYPE_CHECKING:
    from surgery.model.language_model import LanguageModel

# (label of the model, name of the measure, items done, items in all)
Observe = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Scored:
    """A model and what was measured on it.

    Attributes:
        fingerprint: of its weights.
        scores: by the measures' names.
        distance: D from pre; effective_sparsity: share of the entries whose value is pre's. None for pre itself.
    """

    subject: Subject
    fingerprint: str
    scores: dict[str, Scores]
    distance: float | None
    effective_sparsity: float | None


class Bench:
    """Scores models on measures.

    Args:
        measures: with names that differ.
        cache: where scores are kept between runs.
        device, dtype, batch: of the model; see `surgery.model.language_model.LanguageModel`.
        observe: told of the progress.

    Raises:
        OptionError: a library is missing, there is no measure, or two have one name.
    """

    def __init__(
        self,
        measures: Sequence[Measure],
        *,
        cache: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch: int = 8,
        observe: Observe = lambda *_: None,
    ) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise OptionError("Scoring models needs transformers: pip install 'model-surgery[eval]'.")
        from surgery.device import find_device

        if not measures:
            raise OptionError("There is nothing to measure. Give a file or a task with `task` and `general`.")
        names = [measure.name for measure in measures]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError(f"{twice.pop()} is measured twice. Leave one of them out.")
        self.measures, self.cache, self.observe = measures, Cache(cache), observe
        self.device, self.dtype, self.batch = find_device(device), dtype, batch
        self._folder = tempfile.TemporaryDirectory(prefix="surgery-")
        self._model: LanguageModel | None = None
        self._surroundings = ""

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._model = None
        self._folder.cleanup()

    def score(self, subject: Subject) -> Scored:
        """Score a model, but for what is known already.

        Raises:
            SurgeryError: it cannot be scored.
        """
        surroundings = subject.surroundings()
        try:
            return self._score(subject, surroundings)
        except SurgeryError as error:
            # What transformers reads is laid out in a folder of ours, of which nobody knows, and which is gone by then.
            error.args = (subject.named(str(error), self._laid_out(surroundings)),)
            raise

    def _score(self, subject: Subject, surroundings: str) -> Scored:
        self.observe(subject.label, "reading", 0, 0)
        # Where nothing can be known, the weights are read into the model at once.
        known = self.cache.folder is not None
        fingerprint = (
            weights_fingerprint(subject.checkpoint) if known else self._load(subject, surroundings).fingerprint
        )
        scores: dict[str, Scores] = {}
        for measure in self.measures:
            key = self._key(fingerprint, surroundings, measure)
            found = self.cache.find(key)
            if found is None:
                model = self._load(subject, surroundings, fingerprint)
                found = measure.score(model, partial(self.observe, subject.label, measure.name))
                self.cache.keep(key, found)
            scores[measure.name] = found
        return Scored(subject, fingerprint, scores, *subject.against())

    def _load(self, subject: Subject, surroundings: str, fingerprint: str | None = None) -> LanguageModel:
        """The model with the subject's weights in it, which are read unless those with the fingerprint are there."""
        from surgery.model.language_model import LanguageModel

        if self._model is None or self._surroundings != surroundings:
            self._model = None  # before the next one takes memory
            folder = self._laid_out(surroundings)
            if not folder.exists():
                folder.mkdir()
                subject.lay_out(folder)
            self._model = LanguageModel(
                folder, subject.checkpoint, device=self.device, dtype=self.dtype, batch=self.batch
            )
            self._surroundings = surroundings
        elif self._model.fingerprint != fingerprint:
            self._model.load(subject.checkpoint)
        if fingerprint is not None and self._model.fingerprint != fingerprint:
            raise CheckpointError(
                f"{subject.checkpoint.folder}: its files changed while surgery read them. Run it again."
            )
        return self._model

    def _laid_out(self, surroundings: str) -> Path:
        return Path(self._folder.name) / surroundings

    def _key(self, fingerprint: str, surroundings: str, measure: Measure) -> dict[str, Any]:
        return {
            "weights": fingerprint,
            "beside": surroundings,
            "measure": measure.settings,
            "device": self.device.type,
            "dtype": self.dtype,
            "versions": {**versions(), "transformers": version("transformers")},
        }
