"""How likely a model finds texts, many at once.

Logits are made only where a token is scored, since those of a vocabulary of 150,000 take 5 GB for 8 texts of 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear, pad

from surgery.errors import CheckpointError, OptionError
from surgery.model.language_model import Advance, LanguageModel
from surgery.model.skeleton import call_arguments

# A context, and how the text goes on.
Pair = tuple[list[int], list[int]]

LOGITS = 1 << 27  # of one forward pass, unless one text alone has more
PIECE = 1 << 24  # logits that are taken to float32 at once
PAD = 0  # any token: no token sees one to its right


def loglikelihoods(model: LanguageModel, pairs: Sequence[Pair], advance: Advance) -> list[float]:
    """Score continuations, in batches of about the same length, padded on the right.

    A context that is longer than the model takes is cut; see `fit`.

    Args:
        pairs: token ids of contexts, at least one each, and of their continuations.

    Returns:
        For each pair, Σ log p(token | all before it) over the continuation's tokens. It does not depend on the batch size but for
        rounding.

    Raises:
        CheckpointError: an id is not in the model's vocabulary, or a logit is no number.
        OptionError: a continuation is longer than the model takes, or memory runs out.
    """
    fitted, _ = fit(model, pairs)
    vocabulary = check_ids(model, (ids for pair in fitted for ids in pair))
    found = [0.0] * len(fitted)
    done = 0
    with model.running():
        for batch in batches(fitted, model.batch, vocabulary):
            for index, score in zip(batch, _score(model, [fitted[index] for index in batch]), strict=True):
                found[index] = score
            done += len(batch)
            advance(done, len(fitted))
    return found


def fit(model: LanguageModel, pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """Pairs that the model takes: a context is cut from the left, as lm-evaluation-harness does.

    Returns:
        The pairs, and how many contexts were cut.

    Raises:
        OptionError: a continuation alone is too long.
    """
    if model.length is None:
        return list(pairs), 0
    fitted, cut = [], 0
    for context, continuation in pairs:
        # The last token is only predicted, never read.
        room = model.length + 1 - len(continuation)
        if room < 1:
            begins = " ".join(str(model.tokenizer.decode(continuation[:12])).split())
            raise OptionError(
                f'The text to be scored that begins with "{begins}" has {len(continuation):,} tokens, and the model takes '
                f"{model.length:,}. Shorten it, or leave it out."
            )
        fitted.append((context[-room:], continuation))
        cut += len(context) > room
    return fitted, cut


def check_ids(model: LanguageModel, texts: Iterator[list[int]]) -> int:
    """The size of the model's vocabulary, in which all token ids must be.

    Raises:
        CheckpointError: one is not.
    """
    embedding: Any = model.model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    most = max((max(ids) for ids in texts if ids), default=0)
    if most >= vocabulary:
        raise CheckpointError(
            f"{model.folder}: the tokenizer makes the token {most}, and the model has {vocabulary:,}. Copy the tokenizer that "
            "belongs to the model."
        )
    return vocabulary


def batches(pairs: Sequence[Pair], size: int, vocabulary: int) -> Iterator[list[int]]:
    """Indices of pairs, the longest first, so that what does not fit into memory fails at once."""
    batch: list[int] = []
    scored = 0
    for index in sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1])):
        more = len(pairs[index][1])
        if batch and (len(batch) == size or (scored + more) * vocabulary > LOGITS):
            yield batch
            batch, scored = [], 0
        batch.append(index)
        scored += more
    if batch:
        yield batch


def _score(model: LanguageModel, pairs: Sequence[Pair]) -> list[float]:
    counts = [len(continuation) for _, continuation in pairs]
    wanted = torch.tensor([token for _, continuation in pairs for token in continuation], device=model.device)
    if not len(wanted):
        return [0.0] * len(pairs)
    logits = logits_of(model, pairs)
    step = max(1, PIECE // logits.shape[-1])
    losses = []
    for start in range(0, len(wanted), step):
        piece, tokens = logits[start : start + step], wanted[start : start + step]
        losses.append(cross_entropy(piece.float(), tokens, reduction="none").double().cpu())
    loss = torch.cat(losses).numpy()
    if not np.isfinite(loss).all():
        raise CheckpointError(
            f"{model.folder}: the model's logits are not finite when it computes in {str(model.dtype).removeprefix('torch.')}. "
            "Give `dtype` float32; if it says so again, the weights are broken."
        )
    ends = np.cumsum(counts)
    return [-float(loss[end - count : end].sum()) for end, count in zip(ends, counts, strict=True)]


@dataclass(frozen=True, eq=False)
class Head:
    """Another model's head, and what it is given: its logits are made in the same forward pass, and scaled or capped alike.

    Attributes:
        states: what enters the head where a token is predicted, [tokens, width].
        weight, bias: of the head, [vocabulary, width] and [vocabulary].
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def logits_of(model: LanguageModel, pairs: Sequence[Pair], other: Head | None = None) -> torch.Tensor:
    """The logits that predict each token of the continuations, [tokens, vocabulary], the pairs one behind the other.

    Args:
        pairs: a batch; at least one continuation has a token.
        other: its logits follow, of as many tokens.

    Raises:
        CheckpointError: another head is given, and this model's own cannot be reached.
    """
    arguments, at = _arguments(model, pairs)
    with _at_head(model, at, other=other):
        logits: torch.Tensor = model.model(**arguments).logits
    if logits.shape[:2] == (1, len(at.rows) * (1 if other is None else 2)):
        return logits[0]
    if other is not None:
        raise CheckpointError(f"{model.folder}: {type(model.model).__name__} has no head that surgery can ask.")
    return logits[at.rows, at.columns]


def states_of(model: LanguageModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """What enters the head where each token of the continuations is predicted, [tokens, width]; see `logits_of`."""
    arguments, at = _arguments(model, pairs)
    seen: list[torch.Tensor] = []
    with _at_head(model, at, seen=seen):
        model.model(**arguments)
    if len(seen) != 1:
        raise CheckpointError(f"{model.folder}: {type(model.model).__name__} has no head that surgery can ask.")
    return seen[0][0]


@dataclass(frozen=True, eq=False)
class Places:
    """Where tokens are predicted: the shape [texts, length] of a batch, and rows and columns in it, int64 [tokens]."""

    shape: torch.Size
    rows: torch.Tensor
    columns: torch.Tensor


def _arguments(model: LanguageModel, pairs: Sequence[Pair]) -> tuple[dict[str, Any], Places]:
    """What to call the model with, and where each token is predicted: where the one before it stands."""
    texts = [(context + continuation)[:-1] for context, continuation in pairs]
    counts = [len(continuation) for _, continuation in pairs]
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), PAD, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        mask[row, : len(text)] = 1
    places = [range(len(text) - count, len(text)) for text, count in zip(texts, counts, strict=True)]
    rows = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(counts)).to(model.device)
    columns = torch.tensor([column for places_of_row in places for column in places_of_row], device=model.device)
    arguments: dict[str, Any] = call_arguments(model.model, ids.to(model.device))
    if not mask.all():
        arguments["attention_mask"] = mask.to(model.device)  # positions count from 0 on the left by themselves
    return arguments, Places(ids.shape, rows, columns)


@contextmanager
def _at_head(
    model: LanguageModel, at: Places, *, other: Head | None = None, seen: list[torch.Tensor] | None = None
) -> Iterator[None]:
    """Inside, the head makes logits at some places only, [1, places, vocabulary]; what a model does to logits then is as ever.

    Args:
        at: the places.
        other: its logits are put behind the model's own.
        seen: takes what enters the head there, [1, places, width].
    """
    head = model.model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def choose(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not inputs or inputs[0].shape[:-1] != at.shape:
            return None
        chosen = inputs[0][at.rows, at.columns][None]
        if seen is not None:
            seen.append(chosen)
        return (chosen, *inputs[1:])

    def add(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if other is None or output.shape[:2] != (1, len(at.rows)):
            return output
        more = linear(other.states, other.weight, other.bias)[None]
        return torch.cat([output, pad(more, (0, output.shape[-1] - more.shape[-1]))], dim=1)

    if head is None:
        yield
        return
    hooks = [head.register_forward_pre_hook(choose), head.register_forward_hook(add)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
