"""Perplexity on running text: exp of the mean loss per token, over windows that follow each other.

A window's first token is given; each of the others is predicted from those before it in the window. Where the text begins anew
is the tokenizer's end-of-text token, as in calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.data.draw import drawn
from surgery.data.encode import encode
from surgery.errors import OptionError
from surgery.evaluation.measures.file import File, Maker
from surgery.evaluation.scores import Kind, Scores, digest, picked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.model.language_model import Advance, LanguageModel

CHARACTERS = 16  # of text for each token that is wanted, at first
MARGIN = 64  # tokens at the end of a text that was cut: not those of the whole text


@dataclass(eq=False)
class Perplexity:
    """The measure.

    Attributes:
        documents: the text.
        seq_len: tokens in a window; at most what the model takes. The last window may be shorter.
        windows: only the first ones; None for all.
        sample: only so many, drawn at random.
    """

    name: str
    documents: list[str] = field(repr=False)
    seq_len: int = 512
    windows: int | None = None
    sample: int | None = None
    kind: Kind = field(default="perplexity", init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = {
            "measure": "perplexity",
            "items": digest(self.documents),
            "seq_len": self.seq_len,
            "windows": self.windows,
            **({"sample": self.sample} if self.sample else {}),
        }

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model; a window is an item, and weighs as many tokens as are predicted in it."""
        from surgery.model.likelihood import loglikelihoods

        length = min(self.seq_len, model.length or self.seq_len)
        wanted = None if self.windows is None else self.windows * length
        tokens = _tokens(model.tokenizer, self.documents, wanted)
        cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        cut = [window for window in cut if len(window) > 1]
        if not cut:
            raise OptionError(f"{self.name}: holds no two tokens of text. Give more.")
        places = picked(drawn(len(cut), self.sample), only)
        windows = [cut[place] for place in places]
        found = loglikelihoods(model, [(window[:1], window[1:]) for window in windows], advance)
        weights = np.array([len(window) - 1 for window in windows], np.float64)
        values = -np.array(found) / weights
        items = [{"first_token": place * length} for place in places]
        return Scores(self.kind, values, weights, items, {"seq_len": length} if length < self.seq_len else {})


def _tokens(tokenizer: PreTrainedTokenizerBase, documents: list[str], wanted: int | None) -> list[int]:
    """The first tokens of the documents, joined."""
    stream: list[int] = []
    end = tokenizer.eos_token_id
    for text in documents:
        # A tokenizer may put the end of the text there itself.
        if stream and isinstance(end, int) and stream[-1] != end:
            stream.append(end)
        stream += _begin(tokenizer, text, None if wanted is None else wanted - len(stream))
        if wanted is not None and len(stream) >= wanted:
            return stream[:wanted]
    return stream


def _begin(tokenizer: PreTrainedTokenizerBase, text: str, wanted: int | None) -> list[int]:
    """The tokens of a text, at least as many as are wanted where it has them; of a long one, only its beginning is looked at."""
    size = len(text) if wanted is None else CHARACTERS * (wanted + MARGIN)
    while size < len(text):
        tokens = encode(tokenizer, text[:size])
        if len(tokens) >= (wanted or 0) + MARGIN:
            return tokens
        size *= 2
    return encode(tokenizer, text)


def _make(file: File) -> Perplexity | None:
    options = file.options
    if file.is_plain:
        if file.metric not in (None, "perplexity"):
            raise OptionError(
                f"{file.typed}: is plain text, which has a perplexity, not {file.metric}. Give records for {file.metric}."
            )
        return Perplexity(file.name, [file.text()], options.seq_len, options.limit, options.sample)
    if file.metric not in (None, "perplexity") or (file.metric is None and not file.is_text):
        return None
    if not file.is_text:
        raise OptionError(
            f"{file.typed}: perplexity needs running text, in a field text. Choose loss, or name the field."
        )
    return Perplexity(file.name, [row["text"] for row in file.rows], options.seq_len, options.limit, options.sample)


PERPLEXITY = Maker(("perplexity",), _make)
