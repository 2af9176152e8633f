"""torch's distributed checkpoints: read byte by byte as they were saved, by one process and by two, and none can run code."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, raw, read_all, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call, refused
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from surgery.checkpoint.formats import distributed
from surgery.checkpoint.source import open_both

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A folder with pre and what two processes saved of ft, and ft's tensors."""
    folder = tmp_path_factory.mktemp("distributed")
    pre = tiny_llama()
    ft = fine_tuned(pre) | {"model.layers.0.self_attn.odd": torch.randn(3, 5, 7), "model.layers.0.scale": torch.ones(1)}
    write_checkpoint(folder / "pre", pre)
    torch.save(ft, folder / "ft.pt")
    worker = [sys.executable, str(ROOT / "tests/helpers/distributed_worker.py"), "ft.pt", "."]
    ranks = [subprocess.Popen([*worker, rank, "2"], cwd=folder, stderr=subprocess.PIPE, text=True) for rank in "01"]
    for rank in ranks:
        _, said = rank.communicate(timeout=300)
        assert rank.returncode == 0, said[-4000:]
    return folder, ft


def same(folder: Path, ft: Tensors) -> None:
    """A side of a pair has these tensors, however they are read."""
    found = open_both(str(folder.parent / "pre"), str(folder))[1][0].tensors
    assert found.keys() == ft.keys()
    for name, tensor in ft.items():
        assert found[name].shape == tuple(tensor.shape)
        assert read_all(found[name]) == raw(tensor), name
        assert read_all(found[name], seed=1) == raw(tensor), name


@pytest.mark.parametrize("name", ["app", "run", "run/pytorch_model_fsdp_0"])
def test_what_two_processes_saved_is_pieced_together(shared: tuple[Path, Tensors], name: str, tmp_path: Path) -> None:
    folder, ft = shared
    shutil.copytree(folder / name, tmp_path / "ft")
    shutil.copytree(folder / "pre", tmp_path / "pre")
    same(tmp_path / "ft", ft)
    edit = ("half-reset", "--ratio", "0", "--pre", "pre", "--ft", "ft", "--out", "out")
    code, out, err = call(*edit, cwd=tmp_path)
    assert code == 0, err
    written = read_checkpoint(tmp_path / "out")
    assert written.keys() == ft.keys()
    assert all(torch.equal(written[key], ft[key]) for key in ft)
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "pre/config.json").read_bytes()
    assert ("no part of the model were left out" in " ".join(out.split())) == (name == "app")


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "ema beside it"])
def test_what_one_process_saved(tmp_path: Path, form: str) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre) | {"model.empty": torch.empty(0, 4), "model.turned": torch.randn(6, 4).T}
    write_checkpoint(tmp_path / "pre", pre)
    forms: dict[str, Any] = {
        "plain": ft,
        "model": {"model": ft},
        "state_dict": {"state_dict": ft},
        "ema beside it": {"model": ft, "ema": fine_tuned(ft), "step": torch.tensor(7)},
    }
    dcp.save(forms[form], checkpoint_id=tmp_path / "ft", no_dist=True)
    same(tmp_path / "ft", ft)


def changed(folder: Path, change: Any) -> Path:
    """A distributed checkpoint with its metadata as a function leaves it."""
    dcp.save({"model": tiny_llama()}, checkpoint_id=folder / "ft", no_dist=True)
    write_checkpoint(folder / "pre", tiny_llama())
    path = folder / "ft" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(change(metadata) or pickle.dumps(metadata))
    return path


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def a_box_that_is_missing(metadata: Metadata) -> None:
    described: Any = metadata.state_dict_metadata["model.lm_head.weight"]
    described.size = torch.Size((128, 16))


def a_box_twice(metadata: Metadata) -> None:
    described: Any = metadata.state_dict_metadata["model.lm_head.weight"]
    described.chunks.append(described.chunks[0])
    described.size = torch.Size((128, 16))


def another_type(metadata: Metadata) -> None:
    described: Any = metadata.state_dict_metadata["model.lm_head.weight"]
    described.properties.dtype = torch.float32


def placed(metadata: Metadata, **fields: Any) -> None:
    info = metadata.storage_data[MetadataIndex("model.lm_head.weight", torch.Size((0, 0)))]
    for name, value in fields.items():
        setattr(info, name, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: b"x", "its pickle is damaged"),
        (lambda _: pickle.dumps({"a": 1}), "its pickle is damaged"),
        (lambda _: b"\x80\x04]r\xff\xff\xff\x7f.", "its pickle is damaged"),  # a memo of 2³¹ places
        (lambda _: b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "its pickle is damaged"),  # 2⁴⁰ bytes
        (lambda m: setattr(m, "planner_data", Code()), "holds a builtins.print"),
        (a_box_that_is_missing, "do not make up [128, 16]"),
        (a_box_twice, "do not make up [128, 16]"),
        (another_type, "is F32 [64, 16]"),
        (lambda m: placed(m, length=1 << 40), "truncated"),
        (lambda m: placed(m, offset=-1), "does not say where"),
        (lambda m: placed(m, offset=1), "is not a file of torch.save"),
        (lambda m: placed(m, relative_path="../pre/model.safetensors"), "which is no file of this folder"),
        (lambda m: placed(m, relative_path="__1_0.distcp"), "Copy the files of all processes and machines"),
        (lambda m: placed(m, transform_descriptors=["zstd"]), "accelerate merge-weights"),
    ],
)
def test_what_its_metadata_says_is_not_believed(
    tmp_path: Path, change: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(tmp_path, change)
    refused(tmp_path, "fapm", "--pre", "pre", "--ft", "ft", says=(says,))
    assert capsys.readouterr().out == ""


def test_an_optimizer_alone_is_refused(shared: tuple[Path, Tensors]) -> None:
    folder, _ = shared
    code, _, err = call("fapm", "--pre", "pre", "--ft", "run/optimizer_0", cwd=folder)
    assert code == 1
    assert "without the weights of a model" in err


def test_megatrons_checkpoints_are_refused_by_their_name(tmp_path: Path) -> None:
    changed(tmp_path, lambda _: None)
    torch.save({"args": None}, tmp_path / "ft" / "common.pt")
    (tmp_path / "ft" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    refused(tmp_path, "fapm", "--pre", "pre", "--ft", "ft", says=("Megatron",))


def test_the_command_that_a_refusal_names_joins_the_pieces(shared: tuple[Path, Tensors], tmp_path: Path) -> None:
    from accelerate.utils import merge_fsdp_weights

    folder, ft = shared
    merge_fsdp_weights(str(folder / "run/pytorch_model_fsdp_0"), str(tmp_path))
    found = read_checkpoint(tmp_path)
    assert found.keys() == ft.keys()
    assert all(torch.equal(found[name], ft[name]) for name in ft)


def test_boxes_that_leave_a_hole_or_overlap_are_told() -> None:
    def tiled(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        made: Any = [distributed.Box(offsets, sizes, None) for offsets, sizes in boxes]  # type: ignore[arg-type]
        return distributed._tiled((4, 6), made)

    assert tiled(((0, 0), (4, 6)))
    assert tiled(((0, 0), (1, 6)), ((1, 0), (3, 6)))
    assert tiled(((0, 0), (1, 2)), ((0, 2), (1, 4)), ((1, 0), (3, 2)), ((1, 2), (3, 4)))
    assert not tiled(((0, 0), (4, 5)))
    assert not tiled(((0, 0), (2, 6)), ((1, 0), (3, 6)))
    assert not tiled(((0, 0), (1, 2)), ((0, 2), (1, 4)), ((1, 0), (3, 2)))
    assert not tiled(((0, 0), (4, 6)), ((0, 0), (4, 6)))
