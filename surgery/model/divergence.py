"""How far a model's predictions are from a base model's on given text: KL(base ‖ model) over the whole vocabulary, token
by token.

The base's probabilities at T tokens would take T × vocabulary numbers. What is kept instead is what enters the base's
head, T × width, and the head itself, from which they are computed again, exactly, in the forward pass of the other
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div, log_softmax

from surgery.errors import CheckpointError
from surgery.model.language_model import Advance, LanguageModel
from surgery.model.likelihood import PIECE, Head, Pair, batches, check_ids, logits_of, states_of


@dataclass(frozen=True, eq=False)
class Base:
    """A base model's predictions on some texts.

    Attributes:
        pairs: the texts: a context, and the tokens that are predicted.
        states: for each text, what enters the head where its tokens are predicted, [tokens, width].
        weight, bias: of the head.
    """

    pairs: Sequence[Pair]
    states: list[torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor | None


def remember(model: LanguageModel, pairs: Sequence[Pair], advance: Advance = lambda *_: None) -> Base:
    """Ask a base model once, for `divergences`.

    Args:
        pairs: token ids of contexts, at least one each, and of what follows, at least one each; they fit into the model.

    Raises:
        CheckpointError: the model has no head that can be asked, or an id is not in its vocabulary.
        OptionError: memory runs out.
    """
    check_ids(model, (ids for pair in pairs for ids in pair))
    net: Any = model.model
    head = net.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise CheckpointError(f"{model.folder}: {type(net).__name__} has no head that surgery can ask.")
    states, done = list[Any]([None]) * len(pairs), 0
    with model.running():
        for batch in batches(pairs, model.batch, 2 * head.out_features):
            found = states_of(model, [pairs[index] for index in batch])
            counts = [len(pairs[index][1]) for index in batch]
            for index, part in zip(batch, torch.split(found, counts), strict=True):
                states[index] = part.clone()
            done += len(batch)
            advance(done, len(pairs))
        bias = head.bias
        return Base(pairs, states, head.weight.detach().clone(), None if bias is None else bias.detach().clone())


def divergences(model: LanguageModel, base: Base, chosen: Sequence[int], advance: Advance) -> np.ndarray:
    """KL(base ‖ model) of some of the base's texts, the mean over each text's tokens, in nats.

    Args:
        chosen: positions in `base.pairs`.

    Returns:
        float64 [chosen], 0 or more.

    Raises:
        CheckpointError: the model has a smaller vocabulary than the base, no head that can be asked, or gives no numbers.
        OptionError: memory runs out.
    """
    pairs = [base.pairs[index] for index in chosen]
    vocabulary, known = check_ids(model, (ids for pair in pairs for ids in pair)), base.weight.shape[0]
    if vocabulary < known:
        raise CheckpointError(
            f"{model.folder}: has {vocabulary:,} tokens and the base {known:,}, so their predictions do not compare. Give other "
            "general measures."
        )
    found, done = np.zeros(len(pairs)), 0
    with model.running():
        for batch in batches(pairs, model.batch, 2 * vocabulary):
            parts = [pairs[index] for index in batch]
            states = torch.cat([base.states[chosen[index]] for index in batch])
            logits = logits_of(model, parts, Head(states, base.weight, base.bias))
            own, theirs = logits[: len(states)], logits[len(states) :, :known]
            step = max(1, PIECE // vocabulary)
            # A token that only the model has takes its share of the model's probability, and has none in the base.
            each = torch.cat(
                [
                    kl_div(
                        log_softmax(own[start : start + step].float(), -1)[:, :known],
                        log_softmax(theirs[start : start + step].float(), -1),
                        log_target=True,
                        reduction="none",
                    ).sum(-1)
                    for start in range(0, len(states), step)
                ]
            )
            counts = [len(tokens) for _, tokens in parts]
            for index, part in zip(batch, torch.split(each.double().cpu(), counts), strict=True):
                found[index] = max(0.0, float(part.mean()))
            done += len(batch)
            advance(done, len(pairs))
    if not np.isfinite(found).all():
        raise CheckpointError(
            f"{model.folder}: the model's logits are not finite, so the weights are broken. Check them."
        )
    return found
