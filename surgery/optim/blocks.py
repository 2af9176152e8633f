"""The blocks of a model's parameters that MoFO filters apart: Q, K and V of a projection that holds all three.

The paper's partition has Q, K and V in separate tensors (its D.4). GPT-NeoX (Pythia), Bloom, Falcon, GPT-2, Phi-3, MPT and others
store them in one, whose rows go to Q, K and V in an order that the model's code fixes and its configuration gives the sizes of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.layout import holds_q_k_v

if TYPE_CHECKING:
    import torch

# Runs of neighbouring rows: (number of their block, how many), over and over until the tensor ends.
Runs = tuple[tuple[int, int], ...]
# The dimension of a tensor along which its blocks alternate, and how. Plain numbers, since a state dict holds it.
Blocks = tuple[int, Runs]

Q, K, V = 0, 1, 2


@dataclass(frozen=True)
class _Sizes:
    """Heads of the queries and of the keys and values, and the rows of each."""

    heads: int
    kv_heads: int
    dim: int


def _together(sizes: _Sizes) -> Runs:
    return ((Q, sizes.heads * sizes.dim), (K, sizes.kv_heads * sizes.dim), (V, sizes.kv_heads * sizes.dim))


def _by_head(sizes: _Sizes) -> Runs:
    return ((Q, sizes.dim), (K, sizes.dim), (V, sizes.dim))


def _by_group(sizes: _Sizes) -> Runs:
    return ((Q, sizes.heads // sizes.kv_heads * sizes.dim), (K, sizes.dim), (V, sizes.dim))


def _falcon(config: Any) -> Callable[[_Sizes], Runs]:
    if config.new_decoder_architecture:
        return _by_group
    return _one_key if config.multi_query else _by_head


def _one_key(sizes: _Sizes) -> Runs:
    return ((Q, sizes.heads * sizes.dim), (K, sizes.dim), (V, sizes.dim))


def _codegen(sizes: _Sizes) -> Runs:
    rows = sizes.heads * sizes.dim // 4  # it was trained on four cores, and puts V before K
    return ((Q, rows), (V, rows), (K, rows))


# model_type -> how its rows lie; one that is not here has all of Q first, then K, then V.
_ORDERS: Mapping[str, Callable[[Any], Callable[[_Sizes], Runs]]] = {
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"), lambda _: _by_head),
    "falcon": _falcon,
    "gpt_bigcode": lambda config: _one_key if config.multi_query else _by_head,
    "codegen": lambda _: _codegen,
}


def fused_blocks(model: torch.nn.Module) -> dict[torch.Tensor, Blocks]:
    """Return the parameters that hold Q, K and V in one, with how they lie; none where the configuration does not fit the shapes.

    Args:
        model: of transformers, with its `config`.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return {}
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int) or not heads:
        return {}
    inner = getattr(config, "attn_config", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    kv_heads = kv_heads or getattr(inner, "kv_n_heads", None) or heads
    sizes = _Sizes(heads, kv_heads, getattr(config, "head_dim", None) or hidden // heads)
    order = _ORDERS.get(config.model_type, lambda _: _together)
    runs = order(config)(sizes)
    found: dict[torch.Tensor, Blocks] = {}
    for name, parameter in model.named_parameters():
        if holds_q_k_v(name):
            rows = sum(count for _, count in runs)
            # The outputs' dimension: [out, in] in a Linear, [in, out] in GPT-2's Conv1D.
            fits = [dim for dim, size in enumerate(parameter.shape) if size > hidden and size % rows == 0]
            if len(fits) == 1:
                found[parameter] = (fits[0], runs)
    return found
