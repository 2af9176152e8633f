"""Which tensors the pruning methods prune, and what becomes of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, tiny_llama
from helpers.reference.formulas import same_bits
from helpers.runs import edit

from surgery.errors import OptionError
from surgery.methods.fapm import Fapm
from surgery.methods.magnitude import Magnitude
from surgery.methods.scope import Scope

LAYER = "model.layers.0."
EXTRA = {
    f"{LAYER}self_attn.q_proj.bias": torch.full((16,), 0.5),
    f"{LAYER}block_sparse_moe.gate.weight": torch.full((4, 16), 0.5),
    f"{LAYER}block_sparse_moe.experts.gate_up_proj": torch.full((4, 16, 8), 0.5),
    f"{LAYER}a_name_of_its_own.weight": torch.full((4, 16), 0.5),
}
ATTENTION = {f"{LAYER}self_attn.{letter}_proj.weight" for letter in "qkvo"}
FEED_FORWARD = {f"{LAYER}mlp.{word}_proj.weight" for word in ("gate", "up", "down")} | {
    f"{LAYER}block_sparse_moe.experts.gate_up_proj"
}
ENDS = {"model.embed_tokens.weight", "lm_head.weight"}
NORMS = {"model.norm.weight", f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"}
REST = NORMS | {f"{LAYER}self_attn.q_proj.bias", f"{LAYER}block_sparse_moe.gate.weight"}


def returned(folder: Path, scope: Scope, sparsity: float = 1.0) -> set[str]:
    """The tensors that a run at sparsity 1 made pre's."""
    pre: Tensors = {name: tensor.float() for name, tensor in tiny_llama(layers=1).items()} | EXTRA
    ft = fine_tuned(pre)
    out = edit(folder, pre, ft, Magnitude(sparsity, scope))
    found = {name for name in out if same_bits(out[name], pre[name])}
    assert all(same_bits(out[name], ft[name]) for name in out.keys() - found)
    return found


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Scope(), ATTENTION | FEED_FORWARD | ENDS),
        (Scope("linear"), ATTENTION | FEED_FORWARD),
        (Scope(rest="pre"), ATTENTION | FEED_FORWARD | ENDS | REST),
        (Scope("linear", "pre"), ATTENTION | FEED_FORWARD | ENDS | REST),
        (Scope(include=("self_attn",)), ATTENTION),
        (Scope(include=("q_proj", "k_proj")), {f"{LAYER}self_attn.{letter}_proj.weight" for letter in "qk"}),
        (Scope(exclude=("self_attn", "^lm_head")), FEED_FORWARD | {"model.embed_tokens.weight"}),
        (Scope(include=("self_attn",), exclude=("[qkv]_proj",)), {f"{LAYER}self_attn.o_proj.weight"}),
    ],
)
def test_what_is_pruned(scope: Scope, expected: set[str], tmp_path: Path) -> None:
    assert returned(tmp_path, scope) == expected


def test_rest_is_independent_of_the_sparsity(tmp_path: Path) -> None:
    assert returned(tmp_path, Scope("linear", "pre"), sparsity=0.0) == ENDS | REST


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {option: ("self_attn", "atention")}
    with pytest.raises(OptionError, match=f"`{option}` 'atention' matches no tensor"):
        returned(tmp_path, Scope(**patterns))


def test_a_scope_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to prune"):
        returned(tmp_path, Scope(include=("norm",)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"include": ("(",)}, "`include`"),
        ({"exclude": ("*",)}, "`exclude`"),
        ({"scope": "some"}, "`scope`"),
        ({"rest": "base"}, "`rest`"),
    ],
)
def test_scope_options_are_checked_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Scope(**options)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Fapm, Magnitude])
def test_sparsity_is_checked_by_name(method: type[Fapm] | type[Magnitude], sparsity: float) -> None:
    with pytest.raises(OptionError, match="`sparsity` must be between 0 and 1"):
        method(sparsity)
