"""Every method on tiny models of the ten core families, saved by transformers and loaded back by it.

What is expected is written tensor by tensor with `reference.formulas`, into a checkpoint of its own; both are loaded, so that a
name, shape, type or order of experts that transformers would read otherwise shows in the parameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import Tensors, read_checkpoint, write_checkpoint
from helpers.families import CORE, FAMILIES
from helpers.reference.formulas import blend, dare, hma_part, prune, same_bits
from helpers.runs import MAKE
from transformers import PreTrainedModel

from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.methods import METHODS, Method
from surgery.methods.dare import draw

Pair = tuple[str, Path]
RATIOS = (0.3, 0.2, 0.1)


def perturb(model: PreTrainedModel, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture(scope="module", params=CORE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A family's name and the folder with its pre and ft, in several shards."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, scale in (("pre", 0.01), ("ft", 0.003)):
        model = FAMILIES[request.param].build(seed=1, dtype=torch.bfloat16)
        perturb(model, seed=2, scale=0.01)  # so that norms are not all ones, nor biases zeros
        if name == "ft":
            perturb(model, seed=3, scale=scale)
        model.save_pretrained(folder / name, max_shard_size="25KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    return request.param, folder


def load(family: str, folder: Path) -> PreTrainedModel:
    """The model, when every key of the checkpoint is the model's and the other way round."""
    auto = getattr(transformers, FAMILIES[family].auto)
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    loaded: PreTrainedModel = model
    logits = loaded(torch.arange(3, 11)[None]).logits
    assert torch.isfinite(logits).all()
    return loaded


def edit(folder: Path, out: Path, method: Method) -> Tensors:
    run(prepare(folder / "pre", folder / "ft", method, out=out))
    return read_checkpoint(out)


def check(family: str, folder: Path, out: Path, expected: Tensors) -> None:
    """The files hold what is expected, and transformers reads it from them."""
    written = read_checkpoint(out)
    assert written.keys() == expected.keys()
    assert [name for name in expected if not same_bits(written[name], expected[name])] == []
    literal = write_checkpoint(out.with_name("expected"), expected)
    (literal / "config.json").write_bytes((folder / "ft" / "config.json").read_bytes())
    got, wanted = load(family, out).state_dict(), load(family, literal).state_dict()
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(got[name], wanted[name])] == []


def layer_of(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.mark.parametrize("method", ["fapm", "magnitude"])
def test_pruning(pair: Pair, method: str, tmp_path: Path) -> None:
    family, folder = pair
    pre, ft = read_checkpoint(folder / "pre"), read_checkpoint(folder / "ft")
    edit(folder, tmp_path / "out", MAKE[method](sparsity=0.9))
    routers = [name for name in ft if name.endswith(".gate.weight")]
    assert len(routers) == (3 if family == "mixtral" else 0)
    expected = {
        name: prune(method, pre[name], ft[name], 0.9) if ft[name].dim() > 1 and name not in routers else ft[name]
        for name in ft
    }
    check(family, folder, tmp_path / "out", expected)


def test_half_reset(pair: Pair, tmp_path: Path) -> None:
    family, folder = pair
    pre, ft = read_checkpoint(folder / "pre"), read_checkpoint(folder / "ft")
    out = edit(folder, tmp_path / "out", MAKE["half-reset"](seed=1))
    reset = {name for name in ft if same_bits(out[name], pre[name])}
    assert all(layer_of(name) is not None for name in reset)
    for layer in range(3):
        # Tensors of a layer that have a module of their own, less the routers.
        modules = {name.rpartition(".")[0] for name in ft if layer_of(name) == layer if ".gate." not in name}
        chosen = {name.rpartition(".")[0] for name in reset if layer_of(name) == layer}
        assert {name for name in ft if name.rpartition(".")[0] in chosen} <= reset, "biases go with their weights"
        assert len(modules) / 2 - 2 <= len(chosen) <= len(modules) / 2 + 2
    check(family, folder, tmp_path / "out", {name: (pre if name in reset else ft)[name] for name in ft})


def test_hma(pair: Pair, tmp_path: Path) -> None:
    family, folder = pair
    pre, ft = read_checkpoint(folder / "pre"), read_checkpoint(folder / "ft")
    edit(folder, tmp_path / "out", MAKE["hma"](ratios=RATIOS))

    def alpha(name: str) -> float:
        layer = layer_of(name)
        if layer is not None:
            return RATIOS[hma_part(3, layer, 3)]
        return RATIOS[0] if re.search(r"embed_tokens|embed_positions|embed_in|wte|wpe", name) else RATIOS[-1]

    check(family, folder, tmp_path / "out", {name: blend(pre[name], ft[name], alpha(name)) for name in ft})


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"wanda"}))  # whose norms tests/calibrate looks at
def test_a_tied_head_that_one_side_stores(name: str, tmp_path: Path) -> None:
    """qwen2's head is its embedding. Whichever side writes it down, the output is ft's container and loads."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    mains: dict[str, dict[str, Any]] = {
        "hma": {"ratios": (0.3,)},
        "lines": {"alpha": 0.7},
        "salience": {},
        "dg-hard": {},
        "intruder": {"epsilon": 0.99},
        "half-reset": {},
        "dare": {"drop_rate": 0.5},
    }
    main = mains.get(name, {"sparsity": 0.5})
    folders = {}
    for side, seed in (("pre", 1), ("ft", 2)):
        model = FAMILIES["qwen2"].build(seed=1, dtype=torch.bfloat16)
        perturb(model, seed, 0.003)
        model.save_pretrained(tmp_path / side)
        tensors = read_checkpoint(tmp_path / side)
        assert head not in tensors
        folders[side] = tmp_path / side
        stored = write_checkpoint(tmp_path / f"{side}-head", tensors | {head: tensors[embedding].clone()})
        (stored / "config.json").write_bytes((tmp_path / side / "config.json").read_bytes())
    plain = run_pair(tmp_path, "pre", "ft", MAKE[name](**main))
    assert run_pair(tmp_path, "pre-head", "ft", MAKE[name](**main)).keys() == plain.keys()
    for pre in ("pre", "pre-head"):
        out = run_pair(tmp_path, pre, "ft-head", MAKE[name](**main))
        assert out.keys() == plain.keys() | {head}
        assert all(same_bits(out[key], plain[key]) for key in plain)
        base, ft = read_checkpoint(tmp_path / "pre")[embedding], read_checkpoint(tmp_path / "ft")[embedding]
        if name in ("fapm", "magnitude", "ties"):
            assert same_bits(out[head], prune("magnitude" if name == "ties" else name, base, ft, 0.5))
        elif name == "dare":
            assert same_bits(out[head], dare(base, [ft], [draw(0, 0.5, embedding, 0, 0, ft.numel())], 0.5))
        elif name in ("half-reset", "hma", "lines"):
            assert same_bits(out[head], ft if name == "half-reset" else blend(base, ft, 0.3))
        else:
            assert same_bits(out[head], plain[embedding])


def run_pair(folder: Path, pre: str, ft: str, method: Method) -> Tensors:
    out = folder / f"{pre}+{ft}"
    run(prepare(folder / pre, folder / ft, method, out=out))
    load("qwen2", out)
    return read_checkpoint(out)


@pytest.mark.parametrize(("pre", "ft"), [("bare", "whole"), ("whole", "bare"), ("bare", "bare")])
@pytest.mark.parametrize("name", METHODS)
def test_gpt2_with_and_without_its_prefix(name: str, pre: str, ft: str, tmp_path: Path) -> None:
    """`transformer.h.0…` from the model with its head, `h.0…` from the one without: the same tensors, the same edit."""
    for side, seed in (("pre", 1), ("ft", 2)):
        model = FAMILIES["gpt2"].build(seed=1)
        perturb(model, seed, 0.003)
        model.save_pretrained(tmp_path / f"{side}-whole")
        bare = model.base_model
        assert isinstance(bare, PreTrainedModel)
        bare.save_pretrained(tmp_path / f"{side}-bare")
    outs = []
    for number, (one, other) in enumerate((("whole", "whole"), (pre, ft))):
        out = tmp_path / f"out{number}"
        run(prepare(tmp_path / f"pre-{one}", tmp_path / f"ft-{other}", MAKE[name](), out=out))
        outs.append({key.removeprefix("transformer."): tensor for key, tensor in read_checkpoint(out).items()})
    same = [key for key in outs[0] if same_bits(outs[0][key], outs[1][key])]
    if name in ("half-reset", "dare") and ft == "bare":  # the draw is by name
        assert outs[0].keys() == outs[1].keys()
    else:
        assert same == list(outs[0])
    assert any(key.startswith("transformer.") for key in read_checkpoint(out)) == (ft == "whole")
