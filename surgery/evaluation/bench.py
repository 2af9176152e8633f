"""Where models are scored: one after another in one place in memory, on the same measures, each only once."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.checksum import weights_fingerprint
from surgery.errors import CheckpointError, OptionError, SurgeryError
from surgery.evaluation.cache import Cache
from surgery.evaluation.scores import BasedMeasure, Measure, Scores, digest
from surgery.evaluation.subject import Subject
from surgery.provenance import versions

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True, eq=False)
class _Known:
    """A model that is scored, by digests of what it is."""

    subject: Subject
    surroundings: str
    fingerprint: str


class Bench:
    """Scores models on measures.

    Args:
        measures: with names that differ.
        cache: where scores are kept between runs.
        device, dtype, batch: of the model; see `surgery.model.language_model`. The first model that is scored decides what the
            dtype "auto" is for all of them.
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
        from surgery.model.language_model import named_dtype

        if not measures:
            raise OptionError("There is nothing to measure. Give a file or a task with `task` and `general`.")
        names = [measure.name for measure in measures]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError(f"{twice.pop()} is measured twice. Leave one of them out.")
        if dtype != "auto":
            named_dtype(dtype)
        self.measures, self.cache, self.observe = measures, Cache(cache), observe
        self.device, self.dtype, self.batch = find_device(device), dtype, batch
        self._folder = tempfile.TemporaryDirectory(prefix="surgery-")
        self._model: LanguageModel | None = None
        self._surroundings = ""
        self._held: Subject | None = None
        self._base: _Known | None = None
        self._computing: torch.dtype | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._model = None
        self._folder.cleanup()

    def score(self, subject: Subject, only: Mapping[str, Sequence[int]] | None = None) -> Scored:
        """Score a model, but for what is known already. The first one is the base of measures that compare with a base.

        Args:
            only: the positions of the items to score it on, by the names of the measures; all items of all measures by default.

        Raises:
            SurgeryError: it cannot be scored.
        """
        surroundings = subject.surroundings()
        with self._naming(subject, surroundings):
            return self._score(subject, surroundings, only)

    def fingerprint(self, subject: Subject) -> str:
        """The fingerprint of a model's weights, which may be read into memory for it, and are scored there next.

        Raises:
            SurgeryError: they cannot be read.
        """
        surroundings = subject.surroundings()
        with self._naming(subject, surroundings):
            return self._fingerprint(subject, surroundings)

    @contextmanager
    def _naming(self, subject: Subject, surroundings: str) -> Iterator[None]:
        """Inside, errors name the user's files: what transformers reads lies in a folder of ours, which is gone by then."""
        try:
            yield
        except SurgeryError as error:
            error.args = (subject.named(str(error), self._laid_out(surroundings)),)
            raise

    def _score(self, subject: Subject, surroundings: str, only: Mapping[str, Sequence[int]] | None) -> Scored:
        self.observe(subject.label, "reading", 0, 0)
        self._dtype(subject)
        model = _Known(subject, surroundings, self._fingerprint(subject, surroundings))
        if self._base is None:
            self._base = model
            for measure in self.measures:
                if isinstance(measure, BasedMeasure):
                    measure.bind(f"{model.fingerprint} {surroundings}")
        scores = {
            measure.name: self._measured(measure, model, None if only is None else only[measure.name])
            for measure in self.measures
            if only is None or measure.name in only
        }
        return Scored(subject, model.fingerprint, scores, *subject.against())

    def _fingerprint(self, subject: Subject, surroundings: str) -> str:
        """The fingerprint of a model's weights. Where nothing can be known, they are read into memory at once."""
        if self.cache.folder is None:
            return self._load(subject, surroundings).fingerprint
        if subject.recipe is None:
            return weights_fingerprint(subject.checkpoint)
        key = {"recipe": subject.recipe, "surgery": versions()["surgery"]}
        found = self.cache.find_fingerprint(key)
        if found is None:
            found = self._load(subject, surroundings).fingerprint
            self.cache.keep_fingerprint(key, found)
        return found

    def _measured(self, measure: Measure, model: _Known, only: Sequence[int] | None) -> Scores:
        """A model's scores on a measure, all of them or those of some items; computed where they are not kept."""
        key = self._key(model.fingerprint, model.surroundings, measure)
        found = self.cache.find(key)
        if found is not None:
            return found if only is None else found.at(only)
        if isinstance(measure, BasedMeasure) and model is self._base:
            found = self._asked(measure)
            return found if only is None else found.at(only)
        if only is not None:
            key |= {"only": digest(list(map(int, only)))}
            found = self.cache.find(key)
        if found is None:
            if isinstance(measure, BasedMeasure) and not measure.asked:
                self._asked(measure)
            net = self._load(model.subject, model.surroundings, model.fingerprint)
            found = measure.score(net, partial(self.observe, model.subject.label, measure.name), only)
            self.cache.keep(key, found)
        return found

    def _asked(self, measure: BasedMeasure) -> Scores:
        """The base's own scores on a measure that compares with it."""
        assert self._base is not None
        base, label = self._base, self._base.subject.label
        key = self._key(base.fingerprint, base.surroundings, measure)
        known = self.cache.find(key)
        net = self._load(base.subject, base.surroundings, base.fingerprint)
        found = measure.ask(net, known, partial(self.observe, label, measure.name))
        if known is None:
            self.cache.keep(key, found)
        return found

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
                folder, subject.checkpoint, device=self.device, dtype=self._dtype(subject), batch=self.batch
            )
            self._surroundings = surroundings
        elif self._held is not subject and self._model.fingerprint != fingerprint:
            self._held = None  # whose weights are let go of, should these not load
            self._model.load(subject.checkpoint)
        self._held = subject
        if fingerprint is not None and self._model.fingerprint != fingerprint:
            raise CheckpointError(
                f"{subject.checkpoint.folder}: its files changed while surgery read them. Run it again."
            )
        return self._model

    def _dtype(self, subject: Subject) -> torch.dtype:
        """The type that all models are computed in."""
        from surgery.model.language_model import computing_dtype

        if self._computing is None:
            self._computing = computing_dtype(self.dtype, self.device, subject.checkpoint)
        return self._computing

    def _laid_out(self, surroundings: str) -> Path:
        return Path(self._folder.name) / surroundings

    def _key(self, fingerprint: str, surroundings: str, measure: Measure) -> dict[str, Any]:
        return {
            "weights": fingerprint,
            "beside": surroundings,
            "measure": measure.settings,
            "device": self.device.type,
            "dtype": str(self._computing),
            "versions": {**versions(), "transformers": version("transformers")},
        }
