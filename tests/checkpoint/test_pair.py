"""How the tensors of two checkpoints find each other, and which pairs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import Tensors, tiny_llama, write_checkpoint

from surgery.checkpoint.hub import resolve
from surgery.checkpoint.pair import Pair, pair
from surgery.checkpoint.source import open_checkpoint
from surgery.checkpoint.tensor import Span
from surgery.errors import CheckpointError, PairError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def paired(folder: Path, pre: Tensors, ft: Tensors) -> Pair:
    write_checkpoint(folder / "pre", pre)
    write_checkpoint(folder / "ft", ft, shards=2)
    return pair(
        open_checkpoint(resolve(str(folder / "pre"), companions=False)),
        open_checkpoint(resolve(str(folder / "ft"), companions=False)),
    )


def bases(found: Pair) -> dict[str, str | None]:
    return {item.ft.name: item.pre.name if item.pre else None for item in found.items}


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_the_same_names_are_paired_in_the_order_of_fts_shards(tmp_path: Path) -> None:
    found = paired(tmp_path, tiny_llama(), tiny_llama())
    assert bases(found) == {name: name for name in tiny_llama()}
    assert found.notes == []
    order = [(item.ft.path.name, item.ft.data.begin) for item in found.items if isinstance(item.ft.data, Span)]
    assert len(order) == len(found.items)
    assert order == sorted(order)


@pytest.mark.parametrize("prefix", ["base_model.", "transformer."])
@pytest.mark.parametrize("side", ["pre", "ft"])
def test_a_prefix_that_one_side_lacks_is_bridged(side: str, prefix: str, tmp_path: Path) -> None:
    bare = {f"h.{layer}.attn.c_attn.weight": torch.zeros(4, 12) for layer in range(2)} | {"ln_f.weight": torch.zeros(4)}
    whole = {prefix + name: tensor for name, tensor in bare.items()}
    found = paired(tmp_path, *((bare, whole) if side == "pre" else (whole, bare)))
    assert all(
        ft != pre and ft.removeprefix(prefix) == (pre or "").removeprefix(prefix) for ft, pre in bases(found).items()
    )
    assert any(repr(prefix) in note for note in found.notes)


def test_a_head_that_only_ft_stores_is_paired_with_pres_embedding(tmp_path: Path) -> None:
    found = paired(tmp_path, without(tiny_llama(), HEAD), tiny_llama())
    assert bases(found)[HEAD] == EMBEDDING
    assert any(HEAD in note and EMBEDDING in note for note in found.notes)


def test_a_head_that_only_pre_stores_is_left_out(tmp_path: Path) -> None:
    found = paired(tmp_path, tiny_llama(), without(tiny_llama(), HEAD))
    assert HEAD not in bases(found)
    assert any(HEAD in note for note in found.notes)


def test_a_head_of_another_size_is_nobodys_tied_embedding(tmp_path: Path) -> None:
    ft = tiny_llama() | {HEAD: torch.zeros(3, 16, dtype=torch.bfloat16)}
    found = paired(tmp_path, without(tiny_llama(), HEAD), ft)
    assert bases(found)[HEAD] is None
    assert any(HEAD in note and "ft alone" in note for note in found.notes)


@pytest.mark.parametrize("side", ["pre", "ft"])
def test_rotary_buffers_on_one_side_are_no_error(side: str, tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    sides = {"pre": tiny_llama(), "ft": tiny_llama()}
    sides[side] |= buffer
    found = paired(tmp_path, sides["pre"], sides["ft"])
    assert bases(found).get(*buffer) is None
    assert found.notes == []


def test_a_name_that_no_rule_knows_is_reported_and_not_editable(tmp_path: Path) -> None:
    extra = {"model.layers.0.something.new": torch.zeros(4, 4)}
    found = paired(tmp_path, tiny_llama() | extra, tiny_llama() | extra)
    (item,) = (item for item in found.items if item.ft.name in extra)
    assert not item.editable
    assert any("something.new" in note and "does not know" in note for note in found.notes)


@pytest.mark.parametrize(
    ("pre", "ft", "says"),
    [
        ({}, {Q: None}, f"{Q} is in .* but missing from .*ft"),
        ({}, {EMBEDDING: None}, f"{EMBEDDING} is in .* but missing"),
        ({}, {Q: torch.zeros(8, 16)}, rf"{Q} has shape \[8, 16\] in .*ft.* and \[16, 16\] in .*pre"),
        ({}, {EMBEDDING: torch.zeros(64, 8)}, rf"{EMBEDDING} has shape"),
        ({}, {NORM: torch.zeros(8)}, rf"{NORM} has shape"),
        ({"steps": torch.zeros(2)}, {"steps": torch.zeros(2, dtype=torch.int64)}, "steps is I64 in .*ft.* and F32 in"),
    ],
)
def test_refused_pairs(
    pre: dict[str, torch.Tensor | None], ft: dict[str, torch.Tensor | None], says: str, tmp_path: Path
) -> None:
    sides = [
        {name: tensor for name, tensor in (tiny_llama() | changes).items() if tensor is not None}
        for changes in (pre, ft)
    ]
    with pytest.raises(PairError, match=says):
        paired(tmp_path, *sides)


def test_two_models_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="no tensor name in common"):
        paired(tmp_path, {"a.weight": torch.zeros(2)}, {"b.weight": torch.zeros(2)})


@pytest.mark.parametrize("side", ["pre", "ft"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_instead_of_numbers_are_refused(side: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sides = {"pre": tiny_llama(), "ft": tiny_llama()}
    sides[side][Q] = torch.zeros(16, 16, dtype=dtype)
    with pytest.raises(CheckpointError, match=rf"{side}.*: {Q} is quantized .*Dequantize"):
        paired(tmp_path, sides["pre"], sides["ft"])


@pytest.mark.parametrize(("pre_rows", "ft_rows"), [(64, 70), (70, 64)])
def test_of_a_vocabulary_that_grew_or_was_padded_the_shared_rows_are_paired(
    pre_rows: int, ft_rows: int, tmp_path: Path
) -> None:
    def sized(rows: int) -> Tensors:
        return tiny_llama() | {name: torch.randn(rows, 16).bfloat16() for name in (EMBEDDING, HEAD)}

    found = paired(tmp_path, sized(pre_rows), sized(ft_rows))
    for item in found.items:
        if item.ft.name in (EMBEDDING, HEAD):
            assert item.pre
            assert (item.pre.shape, item.ft.shape) == ((64, 16), (ft_rows, 16))
    assert sum("64 rows on both sides and 6 more in " in note for note in found.notes) == 2


def test_a_head_that_fts_larger_vocabulary_untied_is_paired_with_pres_embedding(tmp_path: Path) -> None:
    grown = {name: torch.randn(70, 16).bfloat16() for name in (EMBEDDING, HEAD)}
    assert bases(paired(tmp_path, without(tiny_llama(), HEAD), tiny_llama() | grown))[HEAD] == EMBEDDING


@pytest.mark.parametrize(
    ("pre", "ft", "says"),
    [
        ({}, {HEAD: None}, f"{HEAD} is in pre alone"),
        ({HEAD: None}, {HEAD: torch.zeros(3, 16)}, f"{HEAD} is in ft alone"),
        ({}, {EMBEDDING: torch.zeros(66, 16)}, f"{EMBEDDING} has 64 rows on both sides and 2 more in ft"),
    ],
)
def test_strict_refuses_what_is_otherwise_noted(
    pre: dict[str, torch.Tensor | None], ft: dict[str, torch.Tensor | None], says: str, tmp_path: Path
) -> None:
    sides = [
        {name: tensor for name, tensor in (tiny_llama() | changes).items() if tensor is not None}
        for changes in (pre, ft)
    ]
    assert any(says in note for note in paired(tmp_path, *sides).notes)
    opened = [open_checkpoint(resolve(str(tmp_path / side), companions=False)) for side in ("pre", "ft")]
    with pytest.raises(PairError, match=says.replace(".", r"\.") + ".*`strict`"):
        pair(*opened, strict=True)


def test_strict_allows_what_matches(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    paired(tmp_path, tiny_llama(), tiny_llama() | buffer)
    opened = [open_checkpoint(resolve(str(tmp_path / side), companions=False)) for side in ("pre", "ft")]
    assert pair(*opened, strict=True).notes == []


@pytest.mark.parametrize("side", ["pre", "ft"])
def test_fused_projections_are_refused_where_the_config_does_not_say_how_they_lie(side: str, tmp_path: Path) -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    split = tiny_llama()
    joined = without(split, *(f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in parts))
    for layer in range(2):
        pieces = [split[f"model.layers.{layer}.{part}.weight"] for part in parts]
        joined[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = torch.cat(pieces)
    with pytest.raises(PairError, match=r"fused against split.*num_key_value_heads.*Put the config\.json.*" + side):
        paired(tmp_path, *((joined, split) if side == "pre" else (split, joined)))


def test_projections_in_a_form_that_is_not_known_are_refused_with_a_command(tmp_path: Path) -> None:
    split = tiny_llama()
    joined = {name.replace("mlp.gate_proj", "mlp.w12"): tensor for name, tensor in split.items()}
    with pytest.raises(PairError, match=r"w12.*gate_proj.*does not know how.*save_pretrained"):
        paired(tmp_path, split, joined)


def test_a_model_with_fewer_layers_is_whole(tmp_path: Path) -> None:
    found = paired(tmp_path, tiny_llama(layers=3), tiny_llama(layers=2))
    assert any("layers.2." in note and "in pre alone" in note for note in found.notes)


def test_a_model_that_lacks_a_layer_in_the_middle_is_incomplete(tmp_path: Path) -> None:
    middle = [name for name in tiny_llama(layers=3) if ".1." in name]
    with pytest.raises(PairError, match="incomplete"):
        paired(tmp_path, tiny_llama(layers=3), without(tiny_llama(layers=3), *middle))


def test_a_model_without_any_of_its_biases_is_whole(tmp_path: Path) -> None:
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(16) for layer in range(2)}
    found = paired(tmp_path, tiny_llama() | biases, tiny_llama())
    assert any("q_proj.bias" in note and "in pre alone" in note for note in found.notes)
    with pytest.raises(PairError, match="incomplete"):
        paired(tmp_path / "one", tiny_llama() | biases, tiny_llama() | dict([biases.popitem()]))
