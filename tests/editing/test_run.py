"""The streaming loop: what the output is as a container, what is left beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import INDEX, fine_tuned, read_checkpoint, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.runs import MAKE
from safetensors import safe_open

from surgery.__main__ import main
from surgery.editing import run as editing
from surgery.editing.job import prepare
from surgery.methods import METHODS
from surgery.methods.fapm import Fapm

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
COMMANDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fapm": (["--sparsity", "0.7", "--scope", "linear"], {"sparsity": 0.7}),
    "magnitude": (["--sparsity", "0.25"], {"sparsity": 0.25}),
    "breadcrumbs": (["--sparsity", "0.3", "--top", "0.2"], {"sparsity": 0.3, "top": 0.2}),
    "salience": (["--threshold", "0.25"], {"threshold": 0.25}),
    "half-reset": (["--ratio", "0.4", "--seed", "5", "--level", "model"], {"ratio": 0.4, "seed": 5, "level": "model"}),
    "hma": (["--ratios", "0.3,0.2"], {"ratios": (0.3, 0.2)}),
    "lines": (["--alpha", "0.4", "--outside", "alpha"], {"alpha": 0.4, "outside": "alpha"}),
    "dg-hard": (["--scale", "0.8"], {"scale": 0.8}),
    "intruder": (["--epsilon", "0.99", "--k", "3"], {"epsilon": 0.99, "k": 3}),
    "ties": (["--sparsity", "0.6", "--lam", "0.5"], {"sparsity": 0.6, "lam": 0.5}),
    "dare": (["--drop-rate", "0.3", "--lam", "0.5", "--seed", "5"], {"drop_rate": 0.3, "lam": 0.5, "seed": 5}),
}


def layout(folder: Path) -> dict[str, Any]:
    """Of each shard: its metadata and, in the order of the data, names, types and shapes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.offset_keys()
            parts = [(name, file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in names]
            found[path.name] = (file.metadata(), parts)
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_the_output_has_fts_container(name: str, shards: int, tmp_path: Path) -> None:
    pre = tiny_llama(F32)
    mixed = {key: tensor.to((BF16, F16, F32)[place % 3]) for place, (key, tensor) in enumerate(fine_tuned(pre).items())}
    write_checkpoint(tmp_path / "pre", pre, shards=2)
    ft = write_checkpoint(tmp_path / "ft", mixed, shards=shards, config={"model_type": "llama", "of": "ft"})
    companions = {
        "tokenizer.json": "{}",
        "generation_config.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tool.jinja": "{{ y }}",
    }
    for file, text in (companions | {"README.md": "of ft", "optimizer.pt": "state"}).items():
        (ft / file).parent.mkdir(exist_ok=True)
        (ft / file).write_text(text)
    (tmp_path / "pre" / "vocab.json").write_text("{}")
    out = tmp_path / "out"
    editing.run(prepare(tmp_path / "pre", ft, MAKE[name](), out=out))
    assert layout(out) == layout(ft)
    assert all((out / file).read_bytes() == (ft / file).read_bytes() for file in (*companions, "config.json"))
    if shards > 1:
        assert json.loads((out / INDEX).read_text()) == json.loads((ft / INDEX).read_text())
    expected = {*layout(ft), *companions, "config.json", "README.md", "surgery-report.json"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {INDEX} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft", "out", "pre"], "nothing is left beside it"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_writes_what_the_library_writes(name: str, tmp_path: Path) -> None:
    pre, ft = tiny_llama_pair(tmp_path)
    words, options = COMMANDS[name]
    assert main([name, "--pre", str(pre), "--ft", str(ft), "--out", str(tmp_path / "cli"), *words]) == 0
    if name == "fapm":
        from surgery.methods.scope import Scope

        options = options | {"scope": Scope("linear")}
    editing.run(prepare(pre, ft, MAKE[name](**options), out=tmp_path / "library"))
    for path in (tmp_path / "library").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cli" / path.name).read_bytes()


def test_a_dry_job_writes_nothing_and_knows_the_size(tmp_path: Path) -> None:
    pre, ft = tiny_llama_pair(tmp_path)
    job = prepare(pre, ft, Fapm())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft", "pre"]
    assert job.nbytes == sum(tensor.nbytes for tensor in read_checkpoint(ft).values())
    assert job.out == tmp_path.resolve() / "ft-fapm-0.9"


@pytest.mark.parametrize("name", METHODS)
def test_progress_adds_up(name: str, tmp_path: Path) -> None:
    pre, ft = tiny_llama_pair(tmp_path)
    job = prepare(pre, ft, MAKE[name](), out=tmp_path / "out")
    steps: list[int] = []
    editing.run(job, advance=steps.append)
    assert all(step >= 0 for step in steps)
    weights = sum(tensor.nbytes for tensor in read_checkpoint(ft).values())
    assert 2 * weights <= sum(steps) <= job.reading


def test_a_pair_that_does_not_differ_is_said_with_what_else_lies_there(tmp_path: Path) -> None:
    from helpers.command import call

    tensors = tiny_llama()
    for side in ("pre", "ft"):
        write_checkpoint(tmp_path / side, tensors)
    (tmp_path / "ft/adapter_model.bin").write_bytes(b"x")
    code, out, _ = call("fapm", "--pre", "pre", "--ft", "ft", "--out", "out", cwd=tmp_path)
    said = " ".join(out.split())
    assert code == 0
    assert "the same numbers everywhere" in said
    assert "adapter_model.bin" in said
