"""Half-Reset: how many tensors of each layer and category are drawn, and which."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from helpers.checkpoints import fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.reference.formulas import same_bits
from helpers.runs import edit

from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.errors import OptionError
from surgery.methods.half_reset import HalfReset, choose

LAYERS = 22
KINDS = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "feed_forward",
    "mlp.up_proj": "feed_forward",
    "mlp.down_proj": "feed_forward",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
}
MATRICES = {"attention": 4, "feed_forward": 3, "norm": 2}
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
NAMES = [f"model.layers.{layer}.{module}.weight" for layer in range(LAYERS) for module in KINDS] + OUTSIDE


def counts(chosen: set[str], layers: int = LAYERS) -> dict[str, list[int]]:
    """How many tensors of each category are chosen, layer by layer."""
    found = Counter((int(name.split(".")[2]), KINDS[name.split(".", 3)[3].rpartition(".")[0]]) for name in chosen)
    return {category: [found[layer, category] for layer in range(layers)] for category in MATRICES}


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_by_category_half_of_each_layer(seed: int) -> None:
    found = counts(choose(NAMES, 0.5, "category", seed))
    assert found["attention"] == [2] * LAYERS
    assert found["norm"] == [1] * LAYERS
    assert sorted(found["feed_forward"]) == [1] * 11 + [2] * 11


def test_the_layers_with_the_larger_half_and_the_tensors_are_drawn_anew_by_each_seed() -> None:
    draws = [choose(NAMES, 0.5, "category", seed) for seed in range(20)]
    assert len({frozenset(draw) for draw in draws}) == 20
    assert len({tuple(counts(draw)["feed_forward"]) for draw in draws}) == 20
    share = Counter(name for draw in draws for name in draw)
    assert all(2 <= share[name] <= 18 for name in NAMES[:-3]), "each tensor is chosen about half of the time"


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 1 / 3, 0.6, 0.75, 0.9, 1.0])
def test_other_ratios_spread_floor_and_ceiling(ratio: float) -> None:
    found = counts(choose(NAMES, ratio, "category", 5))
    for category, size in MATRICES.items():
        assert set(found[category]) <= {math.floor(ratio * size), math.ceil(ratio * size)}
        assert abs(sum(found[category]) - ratio * size * LAYERS) <= 0.5


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_by_layer_whole_layers(ratio: float) -> None:
    chosen = choose(NAMES, ratio, "layer", 5)
    whole = {int(name.split(".")[2]) for name in chosen}
    assert chosen == {name for name in NAMES[:-3] if int(name.split(".")[2]) in whole}
    assert abs(len(whole) - ratio * LAYERS) <= 0.5
    if ratio == 0.5:
        assert whole in ({*range(0, LAYERS, 2)}, {*range(1, LAYERS, 2)}), "every other layer"


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_by_model_a_share_of_all_block_matrices(ratio: float) -> None:
    chosen = choose(NAMES, ratio, "model", 5)
    assert abs(len(chosen) - ratio * 7 * LAYERS) <= 0.5
    assert not any("norm" in name for name in chosen)
    assert chosen.isdisjoint(OUTSIDE)
    if ratio == 0.5:
        assert len(set(counts(chosen)["attention"])) > 1, "not layer by layer"


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_a_bias_goes_with_its_weight(level: str) -> None:
    names = NAMES + [name.replace(".weight", ".bias") for name in NAMES]
    for seed in range(5):
        chosen = choose(names, 0.5, level, seed)
        assert chosen == choose(NAMES, 0.5, level, seed) | {name for name in chosen if name.endswith("bias")}
        assert {name.rpartition(".")[0] for name in chosen if name.endswith("bias")} == {
            name.rpartition(".")[0] for name in chosen if name.endswith("weight")
        }


def test_the_order_of_the_names_does_not_matter() -> None:
    assert choose(NAMES, 0.5) == choose(reversed(NAMES), 0.5)


def test_two_stacks_are_halved_each_by_itself() -> None:
    stem = "{}.block.{}.layer.0.SelfAttention.{}.weight"
    names = [
        stem.format(side, layer, module) for side in ("encoder", "decoder") for layer in range(3) for module in "qkvo"
    ]
    found = Counter(tuple(name.split(".")[:3]) for name in choose(names, 0.5))
    assert set(found.values()) == {2}
    assert len(found) == 6


EXPECTED = [
    "0.input_layernorm",
    "0.mlp.down_proj",
    "0.mlp.gate_proj",
    "0.self_attn.k_proj",
    "0.self_attn.v_proj",
    "1.input_layernorm",
    "1.mlp.up_proj",
    "1.self_attn.o_proj",
    "1.self_attn.v_proj",
]


def test_the_draw_of_seed_0_is_what_it_always_was() -> None:
    """A change here changes what every published `--seed` means."""
    names = [name for name in NAMES if name.startswith(("model.layers.0.", "model.layers.1."))]
    assert sorted(name.split(".", 2)[2].removesuffix(".weight") for name in choose(names, 0.5)) == EXPECTED


def test_the_command_resets_whole_tensors(tmp_path: Path) -> None:
    pre = tiny_llama(layers=4)
    ft = fine_tuned(pre)
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    report = run(prepare(tmp_path / "pre", tmp_path / "ft", HalfReset(seed=2), out=tmp_path / "out"))
    out = read_checkpoint(tmp_path / "out")
    reset = {name for name in ft if same_bits(out[name], pre[name])}
    assert all(same_bits(out[name], ft[name]) for name in ft.keys() - reset)
    found = counts(reset, layers=4)
    assert (found["attention"], found["norm"], sum(found["feed_forward"])) == ([2] * 4, [1] * 4, 6)
    entries = sum(pre[name].numel() for name in reset)
    assert report["totals"]["pruned"] == entries
    assert report["totals"]["achieved_sparsity"] == entries / sum(tensor.numel() for tensor in pre.values())


@pytest.mark.parametrize("also", [(), ("embedding",), ("head",), ("norm",), ("embedding", "head", "norm")])
def test_what_is_outside_the_layers_is_reset_only_when_asked(also: tuple[str, ...], tmp_path: Path) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, HalfReset(also=also))
    names = {"embedding": OUTSIDE[0], "norm": OUTSIDE[1], "head": OUTSIDE[2]}
    for group, name in names.items():
        assert same_bits(out[name], (pre if group in also else ft)[name])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ratio": 1.5}, "`ratio`"),
        ({"ratio": float("nan")}, "`ratio`"),
        ({"level": "row"}, "`level`"),
        ({"seed": -1}, "`seed`"),
        ({"also": ("router",)}, "`also`"),
    ],
)
def test_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        HalfReset(**options)  # type: ignore[arg-type]
