"""A LoRA or DoRA adapter of mlx-lm: adapter_config.json beside adapters.safetensors, put on its base on reading.

    LoRA    ft = pre + s · (a·b)ᵀ,    a [in, r], b [r, out];  of an embedding  pre + s · a·b,  a [rows, r], b [r, columns]
    DoRA    ft = m · that / ‖that‖    for each row, m [rows]

with s as adapter_config.json gives it (`lora_parameters.scale`), not divided by r. Of experts a is [experts · r, in] and b
[experts, out, r]. The sums are those of `lora`; MLX rounds to the type of the weight in between.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from surgery.checkpoint.formats import adapter, lora, low_rank
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, plain
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError
from surgery.layout import align, place, projections

NAME, CONFIG, WEIGHTS = "mlx adapter", "adapter_config.json", "adapters.safetensors"
FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<kind>[ab])|(?P<magnitude>m))")
FUSE = "Fuse it with `mlx_lm.fuse --model BASE --adapter-path {folder} --de-quantize`, and give the folder that this writes."


def read(config: Path, weights: Path, base: Base) -> dict[str, Tensor]:
    """Every tensor of the fine-tuned model, in the order and under the names of the base's.

    Args:
        config: adapter_config.json.
        weights: adapters.safetensors.
        base: the model that it was made for.

    Raises:
        CheckpointError: not an adapter of mlx-lm that surgery reads, damaged, or made for another model.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in read_header(weights).tensors.items():
        if match := FACTOR.fullmatch(key):
            factors.setdefault(match["module"], {})[match["kind"] or "m"] = tensor
        else:
            whole[key] = tensor
    scale = _scale(config, needed=bool(factors))
    names, _ = align(base.tensors, [*(f"{module}.weight" for module in factors), *whole])
    tuned = dict(base.tensors)
    for key, tensor in whole.items():
        if key not in names:
            raise adapter.no_base(weights, key)
        tuned[names[key]] = adapter.replaced(weights, tensor, base.tensors[names[key]])
    experts = adapter.single_experts(base.tensors)
    for module, parts in factors.items():
        for name, change in _changes(weights, module, parts, names, experts, tuned, scale):
            before = tuned[name]
            tuned[name] = replace(before, data=lora.Computed(weights, before, before.dtype, change), start=0)
    return tuned


def _scale(config: Path, *, needed: bool) -> float:
    """s, checked."""
    way = FUSE.format(folder=config.parent)
    settings = read_json(config)
    kind, parameters = settings.get("fine_tune_type", "lora"), plain(settings.get("lora_parameters"))
    if kind not in ("lora", "dora", "full"):
        raise CheckpointError(f"{config}: is an adapter of mlx-lm of the type {kind}, not lora or dora. {way}")
    if parameters.get("alpha", parameters.get("rank")) != parameters.get("rank"):
        raise CheckpointError(
            f"{config}: has lora_parameters.alpha, by which early versions of mlx-lm multiplied scale (scale · alpha / rank) and "
            "later ones do not. Put the product into scale, where it was an early one, and remove alpha."
        )
    scale = parameters.get("scale", None if needed else 0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise CheckpointError(f"{config}: says no lora_parameters.scale. {way}")
    return float(scale)


def _changes(
    weights: Path,
    module: str,
    parts: Mapping[str, Tensor],
    names: Mapping[str, str],
    experts: adapter.Experts,
    tensors: Mapping[str, Tensor],
    scale: float,
) -> list[tuple[str, lora.Change]]:
    """The changes that the factors of one module make: names of the base's tensors, each with its change."""
    key = f"{module}.weight"
    if not {"a", "b"} <= parts.keys() or not all(tensor.is_float for tensor in parts.values()):
        raise CheckpointError(f"{weights}: {module} has no pair of lora_a and lora_b. Save the adapter again.")
    a, b, m = parts["a"], parts["b"], parts.get("m")
    found = projections(key)
    if len(b.shape) == 3 and len(a.shape) == 2 and b.entries and found and key not in names:
        count, rows, rank = b.shape
        places = {number: experts.get((found.module, found.roles[0], number)) for number in range(count)}
        singles = [(number, name) for number, name in places.items() if name is not None]
        if len(singles) < count or m is not None:
            raise adapter.no_base(weights, key)
        for _, name in singles:
            _check(weights, module, (rows, a.shape[1]), tensors[name], a.shape[0] == count * rank)
        return [
            (
                name,
                lora.Added(
                    low_rank.LowRank(
                        partial(low_rank.page, b, number), partial(low_rank.block, a, count, number), scale
                    )
                ),
            )
            for number, name in singles
        ]
    if key not in names:
        raise adapter.no_base(weights, key)
    name = names[key]
    embedding = place(name).category == "embedding"
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{weights}: {module} is no linear layer. {FUSE.format(folder=weights.parent)}")
    sizes = (a.shape[0], b.shape[1]) if embedding else (b.shape[1], a.shape[0])
    _check(weights, module, sizes, tensors[name], a.shape[1] == b.shape[0] and (m is None or m.shape == sizes[:1]))
    delta = low_rank.LowRank(
        partial(low_rank.numbers, a), partial(low_rank.numbers, b), scale, transposed=not embedding
    )
    return [(name, lora.Added(delta) if m is None else lora.RowScaled(delta, m))]


def _check(weights: Path, module: str, sizes: tuple[int, ...], before: Tensor, fit: bool) -> None:
    if before.shape != sizes or not fit or not before.is_float:
        raise CheckpointError(
            f"{weights}: {module} has shape {list(sizes)}, and {before.name} of the base {list(before.shape)} ({before.dtype}). "
            "Give the base that it was made for, in floating-point numbers."
        )


def _find(names: Collection[str]) -> Choice | None:
    if CONFIG not in names or WEIGHTS not in names:
        return None
    return Choice(NAME, (CONFIG, WEIGHTS), beside=any(name in names for name in adapter.WHOLE))


def _open(folder: Path, choice: Choice, base: Base | None) -> Opened:
    return adapter.opened(folder, choice, base, read)


FORMAT = Format(NAME, _find, _open, borrows=True, needs_base=True)
