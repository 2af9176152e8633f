"""Two checkpoints held against each other: each tensor of ft with the one of pre that it came from.

Everything that can be refused about a pair is refused here, from headers alone, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.item import Item
from surgery.checkpoint.quantized import holds_codes
from surgery.checkpoint.regroup import Regrouped, regroup
from surgery.checkpoint.source import Checkpoint
from surgery.checkpoint.tensor import Tensor
from surgery.checkpoint.tied import config_of, parted, same_bytes, tied_names
from surgery.checkpoint.vocabulary import new_tokens, other_tokens
from surgery.errors import CheckpointError, PairError
from surgery.layout import align, place, projections, shares_key_values, tower


@dataclass(frozen=True, slots=True)
class Pair:
    """Both checkpoints, held against each other.

    Attributes:
        items: ft's tensors with their bases, in the order of ft's files.
        notes: what the user should know about the pairing.
        tied: the embedding and the head of ft, where it stores both and ties them: an edit gives both the same bits.
        parted: config.json ties a head of ft that has numbers of its own.
    """

    pre: Checkpoint
    ft: Checkpoint
    items: list[Item]
    notes: list[str]
    tied: tuple[str, str] | None = None
    parted: bool = False


def pair(pre: Checkpoint, ft: Checkpoint, *, strict: bool = False) -> Pair:
    """Pair every tensor of ft with its base.

    A model saved with and without its head differs by a prefix ("h.0.…" and "transformer.h.0.…"), which is bridged. A head
    that only ft stores is paired with pre's token embedding when pre has no head at all, since pre's is tied to it. Of an
    embedding or a head with more rows on one side, the rows that both have are paired.

    Args:
        strict: refuse what is otherwise noted: rows or tensors on one side only.

    Raises:
        CheckpointError: quantized weights.
        PairError: shapes or kinds of numbers differ, projections are fused on one side, ft is incomplete, or nothing is shared.
    """
    for checkpoint in (pre, ft):
        for tensor in checkpoint.tensors.values():
            refuse_quantized(tensor)
    _refuse_placeholders(ft, pre)
    names, prefix_note = align(pre.tensors, ft.tensors)
    base = {name: pre.tensors[names[name]] for name in ft.tensors if name in names}
    notes = [*pre.notes, *ft.notes, *([prefix_note] if prefix_note else [])]
    notes += _tie_head(pre, ft, base)
    made = _regroup(pre, ft, base)
    base |= made.base
    if not base:
        raise PairError(
            f"{pre.folder} and {ft.folder} have no tensor name in common, such as {next(iter(ft.tensors))}: "
            "they are not the same model."
        )
    notes += [made.note] if made.note else []
    pre_only = _without(pre.tensors, {tensor.name for tensor in base.values()} | made.used)
    ft_only = _without(ft.tensors, base.keys())
    _refuse_fused(pre, ft, pre_only, ft_only)
    _refuse_incomplete(pre, ft, pre_only, base)
    uneven = _one_sided(pre_only, ft_only)
    added = new_tokens(pre.folder, ft.folder)
    for name, tensor in ft.tensors.items():
        if name in base:
            base[name], note = _shared_rows(base[name], tensor, added)
            uneven += note
    if strict and uneven:
        raise PairError(
            f"{uneven[0][:-1]}, and `strict` allows no such difference between {pre.folder} and {ft.folder}."
        )
    notes += uneven
    if others := other_tokens(pre.folder, ft.folder):
        number, before, after = others[0]
        notes.append(
            f"{len(others):,} ids are another token in ft's tokenizer than in pre's (id {number}: {before!r}, now {after!r}): "
            "their rows are edited like all others. To keep them, leave the embedding and the head out of the edit."
        )
    items = [Item(tensor, base.get(name), place(name)) for name, tensor in ft.tensors.items()]
    unknown = [item.ft.name for item in items if item.place.category == "other" and not item.place.buffer]
    if unknown:
        notes.append(f"{some(unknown, 'has a name', 'have names')} that surgery does not know: kept as in ft.")
    described = pre.folder if ft.borrows else ft.folder
    tied = tied_names(described, ft.tensors)
    apart = tied is None and parted(described, ft.tensors)
    if tied:
        notes.append(f"{tied[1]} is tied to {tied[0]}, and both are stored: they are edited alike.")
    if apart:
        notes.append("The head has numbers of its own, though config.json ties it: the output's config.json does not.")
    return Pair(pre, ft, items, notes, tied, apart)


def _regroup(pre: Checkpoint, ft: Checkpoint, base: Mapping[str, Tensor]) -> Regrouped:
    """Bases for tensors of ft that pre stores together or apart, or transposed."""
    turned = {
        name
        for name, tensor in base.items()
        if tensor.shape != ft.tensors[name].shape and projections(name) is not None
    }
    taken = {tensor.name for name, tensor in base.items() if name not in turned}
    pre_only = [tensor for name, tensor in pre.tensors.items() if name not in taken]
    ft_only = [tensor for name, tensor in ft.tensors.items() if name not in base or name in turned]
    return regroup(pre_only, ft_only, config_of(pre.folder), config_of(ft.folder))


def in_form(other: Checkpoint, first: Checkpoint) -> Checkpoint:
    """A further fine-tuned model with its projections grouped as the first one's are.

    Raises:
        PairError: it lacks some of them.
    """
    names, _ = align(other.tensors, first.tensors)
    made = _regroup(other, first, {name: other.tensors[names[name]] for name in names})
    if not made.base:
        return other
    kept = {name: tensor for name, tensor in other.tensors.items() if name not in made.used}
    return replace(other, tensors=kept | made.base)


def likes(first: Pair, other: Pair, names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a further fine-tuned model that came from the same bases as some of the first one's.

    Args:
        first, other: each paired with the same pre.
        names: in first's ft.

    Returns:
        For each name the other's tensor, with as many rows as pre has; and what the user should know.

    Raises:
        PairError: one is missing, or has another shape.
    """
    # Two tensors may have one base: an embedding and the head that is tied to it.
    found = {(item.pre.name, item.place.category): item.ft for item in other.items if item.pre}
    taken = {}
    for item in first.items:
        if item.pre is None or item.ft.name not in names:
            continue
        tensor = found.get((item.pre.name, item.place.category))
        if tensor is None:
            raise PairError(
                f"{item.ft.name} is in {first.ft.folder} but not in {other.ft.folder}: leave it out with `exclude`, or merge "
                "models that have the same tensors."
            )
        if tensor.shape != item.ft.shape:
            raise PairError(
                f"{item.ft.name} has shape {list(item.ft.shape)} in {item.ft.path} and {list(tensor.shape)} in {tensor.path}: "
                "leave it out with `exclude`, or merge models of one vocabulary."
            )
        taken[item.ft.name] = tensor if tensor.shape == item.pre.shape else tensor.rows(0, item.pre.shape[0])
    held = {item.ft.name for item in first.items} | {
        item.ft.name for item in other.items if item.pre or item.place.buffer
    }
    alone = _without(other.ft.tensors, held)
    return taken, [f"{some(alone, 'is', 'are')} in {other.ft.folder} alone: left out."] if alone else []


def _without(tensors: Mapping[str, Tensor], taken: Collection[str]) -> list[str]:
    return [name for name in tensors if name not in taken]


def refuse_quantized(tensor: Tensor) -> None:
    """Raise CheckpointError where a weight is stored as codes."""
    if holds_codes(tensor):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is quantized ({tensor.dtype}), so its numbers are codes. Dequantize the model to "
            "bfloat16 first."
        )


def _tie_head(pre: Checkpoint, ft: Checkpoint, base: dict[str, Tensor]) -> list[str]:
    if any(place(name).category == "head" and len(tensor.shape) == 2 for name, tensor in pre.tensors.items()):
        return []
    # By the shape in ft, whose vocabulary may be larger than pre's.
    embeddings = {
        ft.tensors[name].shape: tensor
        for name, tensor in reversed(base.items())
        if place(name).category == "embedding" and tensor.shape[1:] == ft.tensors[name].shape[1:]
    }
    notes = []
    for name, tensor in ft.tensors.items():
        if (
            name not in base
            and place(name).category == "head"
            and len(tensor.shape) == 2
            and tensor.shape in embeddings
        ):
            base[name] = embeddings[tensor.shape]
            notes.append(f"pre stores no {name}: paired with {base[name].name}, to which pre's head is tied.")
    return notes


def _shared_rows(pre: Tensor, ft: Tensor, added: tuple[int, int] | None) -> tuple[Tensor, list[str]]:
    """The part of pre that ft has too, and a note where that is not all.

    Args:
        added: how many tokens pre and ft have, where ft has more.
    """
    if pre.is_float != ft.is_float:
        raise PairError(
            f"{ft.name} is {ft.dtype} in {ft.path} and {pre.dtype} in {pre.path}: one side holds no floating-point numbers."
        )
    vocabulary = place(ft.name).category in ("embedding", "head") and ft.is_float and not tower(ft.name)
    if pre.shape == ft.shape:
        if not (vocabulary and added and len(ft.shape) == 2 and added[0] < added[1] <= ft.shape[0]):
            return pre, []
        return pre.rows(0, added[0]), [
            f"{ft.name} has {added[0]:,} tokens on both sides; ft's tokenizer has {added[1] - added[0]:,} more, in rows that are "
            "padding in pre: those rows are kept as in ft."
        ]
    if not (vocabulary and ft.shape and pre.shape and ft.shape[1:] == pre.shape[1:] and pre.shape[0] and ft.shape[0]):
        raise PairError(
            f"{ft.name} has shape {list(ft.shape)} in {ft.path} and {list(pre.shape)} in {pre.path}. The two must be the same "
            "model: check `pre`."
        )
    shared, more = min(pre.shape[0], ft.shape[0]), ft.shape[0] - pre.shape[0]
    if added and added[0] < min(shared, added[1]):  # pre's last rows are padding, where ft may have tokens
        shared, more = added[0], ft.shape[0] - added[0]
    fate = f"{more:,} more in ft: kept as they are" if more > 0 else f"{-more:,} more in pre: left out, as in ft"
    return pre.rows(0, shared), [f"{ft.name} has {shared:,} rows on both sides and {fate}."]


def _refuse_fused(pre: Checkpoint, ft: Checkpoint, pre_only: list[str], ft_only: list[str]) -> None:
    """Refuse a layer whose weights have other names on the two sides: qkv_proj against q_proj, k_proj and v_proj."""
    # The prefix of the stack may differ: the layer and the category tell.
    like: dict[tuple[int | None, str], list[str]] = {}
    for other in pre_only:
        if len(pre.tensors[other].shape) >= 2:
            like.setdefault((place(other).layer, place(other).category), []).append(other)
    for name in ft_only:
        where = place(name)
        if (
            where.layer is None
            or where.category not in ("attention", "feed_forward")
            or len(ft.tensors[name].shape) < 2
        ):
            continue
        others = like.get((where.layer, where.category), [])
        if others:
            raise PairError(
                f"{ft.folder} has {name} {list(ft.tensors[name].shape)} where {pre.folder} has {_shown(others, pre)}: "
                f"{_why_not(name, ft, others, pre)}"
            )


def _shown(names: list[str], checkpoint: Checkpoint) -> str:
    return ", ".join(f"{name} {list(checkpoint.tensors[name].shape)}" for name in names[:3])


def _why_not(name: str, ft: Checkpoint, others: list[str], pre: Checkpoint) -> str:
    """Why tensors of one layer that are called otherwise cannot be paired, and what to do."""
    held = projections(name)
    if held is None or not any(map(projections, others)):
        load = f"M.from_pretrained('{pre.folder}', dtype='auto').save_pretrained('{pre.folder}-again')"
        return (
            "surgery does not know how the one is made of the others, or pre is another model. Have transformers write both "
            f'sides alike: `python -c "from transformers import AutoModelForCausalLM as M; {load}"`, and the same for ft.'
        )
    folder = (ft if len(held.roles) > 1 else pre).folder
    return (
        "fused against split projections, and the sizes do not fit what config.json says of how they lie in the fused one "
        "(model_type, num_attention_heads, num_key_value_heads, head_dim). Put the config.json that the model was published "
        f"with into {folder}."
    )


def _refuse_placeholders(ft: Checkpoint, pre: Checkpoint) -> None:
    """Refuse empty tensors that stand for weights which a training framework keeps elsewhere."""
    for checkpoint in (pre, ft):
        empty = next((tensor for tensor in checkpoint.tensors.values() if _is_placeholder(tensor)), None)
        if empty is not None:
            folder = checkpoint.folder
            raise CheckpointError(
                f"{empty.path}: {empty.name} has shape {list(empty.shape)}, a placeholder that DeepSpeed ZeRO-3 or FSDP saved in "
                f"place of the numbers. Gather them: `python zero_to_fp32.py . whole` in {folder}, or `accelerate merge-weights "
                f"{folder} whole`, and give the folder that this writes."
            )


def _is_placeholder(tensor: Tensor) -> bool:
    """Whether a weight of a known place holds no number."""
    return 0 in tensor.shape and len(tensor.shape) == 1 and place(tensor.name).category != "other"


def _refuse_incomplete(pre: Checkpoint, ft: Checkpoint, pre_only: list[str], base: Mapping[str, Tensor]) -> None:
    """Refuse an ft that lacks some of the weights that it has elsewhere: a part of it was lost.

    A model that was made smaller as a whole, by fewer layers or without any of its biases, is complete; so is one without a whole
    tower (vision, audio, more heads), and one whose last layers take their keys and values from others.
    """
    kept = {tensor.name for tensor in base.values()}
    kinds = {(where.stack, _kind(name)) for name in kept if (where := place(name)).layer is not None}
    towers = {tower(name) for name in kept}
    last: dict[str, int] = {}
    for name in kept:
        where = place(name)
        if where.layer is not None:
            last[where.stack] = max(last.get(where.stack, 0), where.layer)
    sharing = _first_sharing_layer(ft.folder)
    embeddings = [name for name in kept if place(name).category == "embedding"]
    for name in pre_only:
        where = place(name)
        if where.buffer or tower(name) not in towers or _is_copy(name, pre, embeddings):
            continue
        lost = where.category == "embedding" and where.layer is None
        if where.layer is not None:
            shared = sharing is not None and where.layer >= sharing and shares_key_values(name)
            lost = (where.stack, _kind(name)) in kinds and where.layer <= last[where.stack] and not shared
        if lost:
            raise PairError(
                f"{name} is in {pre.tensors[name].path} but missing from {ft.folder}, which has its like in other places: ft is "
                "incomplete. Save it again in full."
            )


def _first_sharing_layer(folder: Path) -> int | None:
    """The first of the last layers that take keys and values from earlier ones (Gemma 3n and 4), by config.json."""
    config = config_of(folder)
    for part in (config.get("text_config"), config):
        if isinstance(part, Mapping):
            shared, layers = part.get("num_kv_shared_layers"), part.get("num_hidden_layers")
            if isinstance(shared, int) and isinstance(layers, int) and shared > 0:
                return layers - shared
    return None


def _is_copy(name: str, pre: Checkpoint, embeddings: Collection[str]) -> bool:
    """Whether pre stores an embedding twice, as T5 did, and ft has the other one."""
    tensor = pre.tensors[name]
    if place(name).category != "embedding":
        return False
    others = (pre.tensors[other] for other in embeddings)
    return any(other.shape == tensor.shape and same_bytes(tensor, other) for other in others)


def _kind(name: str) -> str:
    """The name without its numbers: what it has in common with its like in other layers."""
    return re.sub(r"[0-9]+", "#", name)


def _one_sided(pre_only: list[str], ft_only: list[str]) -> list[str]:
    notes = []
    copied = [name for name in ft_only if not place(name).buffer]
    if copied:
        notes.append(f"{some(copied, 'is', 'are')} in ft alone: copied.")
    left_out = [name for name in pre_only if not place(name).buffer]
    for part in dict.fromkeys(map(tower, left_out)):
        names = [name for name in left_out if tower(name) == part]
        what = f"{some(names, 'is', 'are')} in pre alone"
        notes.append(f"{what}: ft has no {part}, so it is left out." if part else f"{what}: left out, as in ft.")
    return notes


def some(names: list[str], one: str, many: str) -> str:
    """The first names of a list, for a sentence."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {one if len(names) == 1 else many}"
