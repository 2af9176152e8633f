"""A LoRA adapter of mlx-lm: adapter_config.json beside adapters.safetensors, added to its base on reading.

    ft = pre + s · (a·b)ᵀ

with a [in, r] and b [r, out], and s as adapter_config.json gives it (`lora_parameters.scale`), not divided by r.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from surgery.checkpoint.formats import adapter, lora
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError
from surgery.layout import align

NAME, CONFIG, WEIGHTS = "mlx adapter", "adapter_config.json", "adapters.safetensors"
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[ab])")
FUSE = "Fuse it with `mlx_lm.fuse --model BASE --adapter-path {folder} --de-quantize`, and give the folder that this writes."


def read(config: Path, weights: Path, base: Base) -> dict[str, Tensor]:
    """Every tensor of the fine-tuned model, in the order and under the names of the base's.

    Args:
        config: adapter_config.json.
        weights: adapters.safetensors.
        base: the model that it was made for.

    Raises:
        CheckpointError: not a plain LoRA adapter of mlx-lm, damaged, or made for another model.
    """
    way = FUSE.format(folder=weights.parent)
    settings = read_json(config)
    kind, parameters = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if kind not in ("lora", "full"):
        raise CheckpointError(f"{config}: is an adapter of mlx-lm of the type {kind}, not lora. {way}")
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in read_header(weights).tensors.items():
        match = FACTOR.fullmatch(key)
        if match and len(tensor.shape) == 2 and tensor.is_float:
            factors.setdefault(match["module"], {})[match["kind"]] = tensor
        elif match or key.endswith(".m"):
            raise CheckpointError(f"{weights}: {key} is no part of plain LoRA. {way}")
        else:
            whole[key] = tensor
    if factors and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise CheckpointError(f"{config}: says no lora_parameters.scale. {way}")
    names, _ = align(base.tensors, [*(f"{module}.weight" for module in factors), *whole])
    tuned = dict(base.tensors)
    for key, tensor in whole.items():
        if key not in names:
            raise adapter.no_base(weights, key)
        tuned[names[key]] = adapter.replaced(weights, tensor, base.tensors[names[key]])
    for module, pair in factors.items():
        if f"{module}.weight" not in names:
            raise adapter.no_base(weights, f"{module}.weight")
        before = tuned[names[f"{module}.weight"]]
        if pair.keys() != {"a", "b"} or pair["a"].shape[1] != pair["b"].shape[0]:
            raise CheckpointError(f"{weights}: {module} has no pair of lora_a and lora_b. Save the adapter again.")
        if before.shape != (pair["b"].shape[1], pair["a"].shape[0]):
            raise CheckpointError(
                f"{weights}: {module} has shape {[pair['b'].shape[1], pair['a'].shape[0]]}, and {before.name} of the base "
                f"{list(before.shape)}. Give the base that it was made for."
            )
        delta = lora.low_rank(pair["b"], pair["a"], float(scale or 0), transposed=True)
        tuned[before.name] = replace(
            before, data=lora.Computed(weights, before, before.dtype, lora.Added(delta)), start=0
        )
    return tuned


def _find(names: Collection[str]) -> Choice | None:
    if CONFIG not in names or WEIGHTS not in names:
        return None
    return Choice(NAME, (CONFIG, WEIGHTS), beside=any(name in names for name in adapter.WHOLE))


def _open(folder: Path, choice: Choice, base: Base | None) -> Opened:
    return adapter.opened(folder, choice, base, read)


FORMAT = Format(NAME, _find, _open, borrows=True, needs_base=True)
