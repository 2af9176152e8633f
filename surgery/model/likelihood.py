"""How likely a model finds texts, many at once.

Logits are made only where a token is scored, since those of a vocabulary of 150,000 take 5 GB for 8 texts of 1,024 tokens. A
context with several continuations, such as a question with its choices, is read once where the model's cache allows it.
"""

from __future__ import annotations

import inspect
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

    def keep(batch: Sequence[int], scores: Sequence[float]) -> None:
        nonlocal done
        for index, score in zip(batch, scores, strict=True):
            found[index] = score
        done += len(batch)
        advance(done, len(fitted))

    branches = _branches(fitted) if _remembers(model) else {}
    alone = sorted(set(range(len(fitted))) - {index for group in branches.values() for index in group})
    with model.running():
        for batch in batches([fitted[index] for index in alone], model.batch, vocabulary):
            keep([alone[at] for at in batch], _score(model, [fitted[alone[at]] for at in batch]))
        groups = list(branches.values())
        joined = [(fitted[group[0]][0], [token for index in group for token in fitted[index][1]]) for group in groups]
        size = max(1, model.batch // max(map(len, groups), default=1))
        for batch in batches(joined, size, vocabulary):
            members = [index for at in batch for index in groups[at]]
            keep(members, _score_branches(model, [[fitted[index] for index in groups[at]] for at in batch]))
    return found


def _branches(pairs: Sequence[Pair]) -> dict[tuple[int, ...], list[int]]:
    """Indices of the pairs whose context others have too, by the context."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if continuation:
            groups.setdefault(tuple(context), []).append(index)
    return {context: group for context, group in groups.items() if len(group) > 1 and len(context) > 1}


def _remembers(model: LanguageModel) -> bool:
    """Whether every layer keeps the keys and values of all tokens, so that what was read once can be gone on from."""
    config = model.model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        kinds == {"full_attention"}
        and window is None
        and not getattr(type(model.model), "_is_stateful", False)
        and {"past_key_values", "use_cache"} <= set(inspect.signature(type(model.model).forward).parameters)
    )


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
    losses = _losses(model, logits_of(model, pairs), wanted)
    ends = np.cumsum(counts)
    return [-float(losses[end - count : end].sum()) for end, count in zip(ends, counts, strict=True)]


def _losses(model: LanguageModel, logits: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """−log p of each wanted token, float64 [tokens].

    Raises:
        CheckpointError: one is no number.
    """
    step = max(1, PIECE // logits.shape[-1])
    pieces = [
        cross_entropy(logits[start : start + step].float(), wanted[start : start + step], reduction="none")
        for start in range(0, len(wanted), step)
    ]
    losses: np.ndarray = torch.cat(pieces).double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise CheckpointError(
            f"{model.folder}: the model's logits are not finite when it computes in {str(model.dtype).removeprefix('torch.')}. "
            "Give `dtype` float32; if it says so again, the weights are broken."
        )
    return losses


def _score_branches(model: LanguageModel, groups: Sequence[Sequence[Pair]]) -> list[float]:
    """The scores of several continuations of each context, group by group: contexts are read once, padded on the left."""
    net: Any = model.model
    device, contexts = model.device, [group[0][0] for group in groups]
    ids, mask = padded(contexts, left=True)
    origins = torch.tensor([at for at, group in enumerate(groups) for _ in group])
    continuations = [continuation for group in groups for _, continuation in group]
    last = Places(
        ids.shape, torch.arange(len(groups), device=device), torch.full((len(groups),), ids.shape[1] - 1).to(device)
    )
    with _at_head(model, last):
        read = net(**_going_on(net, ids, mask, None), use_cache=True)
    first = _chosen(read.logits, last)[origins.to(device)]
    totals = -_losses(model, first, torch.tensor([tokens[0] for tokens in continuations], device=device))
    longer = [at for at, tokens in enumerate(continuations) if len(tokens) > 1]
    if longer:
        cache, kept = read.past_key_values, origins[longer]
        cache.batch_select_indices(kept.to(device))
        texts = [continuations[at][:-1] for at in longer]
        more, there = padded(texts)
        rows = torch.tensor([row for row, text in enumerate(texts) for _ in text], device=device)
        columns = torch.tensor([column for text in texts for column in range(len(text))], device=device)
        places = Places(more.shape, rows, columns)
        with _at_head(model, places):
            output = net(**_going_on(net, more, torch.cat([mask[kept], there], 1), cache), use_cache=True)
        wanted = torch.tensor([token for at in longer for token in continuations[at][1:]], device=device)
        losses = _losses(model, _chosen(output.logits, places), wanted)
        np.subtract.at(totals, np.repeat(longer, [len(text) for text in texts]), losses)
    return [float(total) for total in totals]


def _chosen(logits: torch.Tensor, at: Places) -> torch.Tensor:
    """The logits at some places, [places, vocabulary], of those that a model gave back, which may be these alone."""
    return logits[0] if logits.shape[:2] == (1, len(at.rows)) else logits[at.rows, at.columns]


def _going_on(net: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> dict[str, Any]:
    """Arguments of a call for the tokens that follow those in the cache.

    Args:
        ids: int64 [texts, length].
        mask: 1 where a token is, of those in the cache too, int64 [texts, all].
    """
    device = net.device
    arguments = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "past_key_values": cache}
    if "position_ids" in inspect.signature(type(net).forward).parameters:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(device)
    return arguments


def padded(texts: Sequence[list[int]], token: int = PAD, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of one length, padded on the right or the left, int64 [texts, length], and where they are, likewise."""
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), token, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        there = slice(length - len(text), length) if left else slice(len(text))
        ids[row, there] = torch.tensor(text, dtype=torch.int64)
        mask[row, there] = 1
    return ids, mask


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
    if other is None:
        return _chosen(logits, at)
    if logits.shape[:2] != (1, 2 * len(at.rows)):
        raise CheckpointError(f"{model.folder}: {type(model.model).__name__} has no head that surgery can ask.")
    return logits[0]


def states_of(model: LanguageModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """Inputs of the head where each token of the continuations is predicted, [tokens, width]; see `logits_of`."""
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
    """Arguments of a call, and where each token is predicted: where the one before it stands."""
    texts = [(context + continuation)[:-1] for context, continuation in pairs]
    counts = [len(continuation) for _, continuation in pairs]
    ids, mask = padded(texts)
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
