"""torch's own files: read bit by bit as `torch.load` reads them, and none can make surgery run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, raw, read_all, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call, refused

from surgery.checkpoint.formats import pytorch
from surgery.checkpoint.tensor import Span
from surgery.errors import CheckpointError

TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
INDEX = "pytorch_model.bin.index.json"


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def views() -> Tensors:
    """Tensors that share one storage and lie in it in all sorts of orders."""
    whole = torch.randn(6, 8, 10)
    return {
        "whole": whole,
        "tied": whole,
        "transposed": whole[0].T,
        "permuted": whole.permute(2, 0, 1),
        "rows": whole[1:3],
        "columns": whole[..., 3:5],
        "every third": whole[:, ::3],
        "scalar": whole[2, 3, 4],
        "expanded": whole[0, :1].expand(5, 10),
        "empty": whole[:0],
        "odd": whole.view(-1)[7:16],
    }


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_each_type_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randint(0, 2, (5, 3, 8), dtype=torch.uint8).to(dtype)
    path = saved(tmp_path / "a.bin", {"a": value, "b": value[1:].transpose(0, 2)})
    found, wanted = pytorch.read(path), torch.load(path, weights_only=True)
    assert list(found) == ["a", "b"]
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape)
        assert read_all(found[name]) == read_all(found[name], seed=1) == raw(tensor)
    from safetensors.torch import save

    header = save({"a": value})
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["a"]["dtype"] == found["a"].dtype


@pytest.mark.parametrize("gathered", [1, 7, 1 << 18])
def test_each_order_of_entries_is_read_as_torch_reads_it(
    tmp_path: Path, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "GATHERED", gathered)
    path = saved(tmp_path / "a.bin", views())
    found, wanted = pytorch.read(path), torch.load(path, weights_only=True)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape)
        assert read_all(found[name]) == raw(tensor), name
        assert read_all(found[name], seed=2) == raw(tensor), name
    assert isinstance(found["whole"].data, Span)
    assert found["tied"].data == found["whole"].data


def test_rows_of_a_transposed_matrix_are_its_rows(tmp_path: Path) -> None:
    matrix = torch.randn(7, 9)
    (found,) = pytorch.read(saved(tmp_path / "a.pt", {"a": matrix.T})).values()
    assert read_all(found.rows(2, 5)) == raw(matrix.T[2:5])


def test_older_versions_of_torch_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.bin", views())
    wanted = pytorch.read(path)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    assert type(pytorch._without_numbers()).__name__ == "FakeTensorMode"
    assert pytorch.read(path) == wanted


def test_what_was_saved_on_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    value = torch.randn(3)
    path = saved(tmp_path / "a.bin", {"a": value})
    assert b"cuda:3" in path.read_bytes()
    assert read_all(pytorch.read(path)["a"]) == raw(value)


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_state_dict_among_other_things(tmp_path: Path, key: str) -> None:
    value = torch.randn(3)
    other = {"epoch": 3, "step": torch.tensor(7), "optimizer": {"state": {0: torch.ones(2)}}, "name": "x"}
    path = saved(tmp_path / "a.pt", other | {key: {"a": torch.nn.Parameter(value), "version": 1}})
    found = pytorch.read(path)
    assert list(found) == ["a"]
    assert read_all(found["a"]) == raw(value)


def test_entries_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    value = {"a": torch.ones(2), "version": 1, "extra": {"b": torch.ones(1)}, 3: torch.ones(1), "note": None}
    assert list(pytorch.read(saved(tmp_path / "a.bin", value))) == ["a"]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_no_file_can_run_code(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "a.bin"
    value = {"a": torch.ones(2), "b": Payload(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value["b"]))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"would run code \(posix.mkdir\)" if kind == "zip" else "plain pickle"):
        pytorch.read(path)
    assert not mark.exists()
    # That the payload is live: what does not refuse it runs it.
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"would run code \(torch.nn.modules.linear.Linear\)"):
        pytorch.read(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": torch.ones(2, dtype=torch.complex128)}, "tensor a is stored as torch.complex128"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is stored as torch.float32, torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "tensor a .* not yet negated or conjugated"),
        ({"a": torch.ones(2, device="meta")}, "tensor a has no numbers in the file"),
        ([torch.ones(2)], "holds no state dict"),
        ({"epoch": 1}, "holds no state dict"),
        ({"model": {"a": torch.ones(1)}, "module": {"a": torch.ones(1)}}, "more than one state dict"),
        ({"__metadata__": torch.ones(1)}, "a tensor named '__metadata__'"),
        ({"half \ud800": torch.ones(1)}, r"a tensor named 'half \\ud800'"),
    ],
)
def test_what_safetensors_could_not_hold_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        pytorch.read(saved(tmp_path / "a.bin", value))


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    codes = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointError, match="quantized or nested"):
        pytorch.read(saved(tmp_path / "a.bin", {"a": codes}))


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match="TorchScript program"):
        pytorch.read(tmp_path / "a.pt")


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a file of torch.save again with other records; torch then looks each of them up by its name."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".format_version")}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name.partition("/")[2], data))
    return path


def test_an_archive_that_was_packed_again_is_read(tmp_path: Path) -> None:
    value = torch.randn(50)
    path = repacked(saved(tmp_path / "a.bin", {"a": value}), lambda name, data: data)
    assert read_all(pytorch.read(path)["a"]) == raw(value)


def test_a_storage_longer_than_its_record_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.randn(50), "b": torch.randn(50)})
    repacked(path, lambda name, data: data[:-1] if name == "data/0" else data)
    with pytest.raises(CheckpointError, match="tensor a reaches beyond the record"):
        pytorch.read(path)


def test_a_record_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "a.bin", {"a": torch.randn(50)}), lambda name, data: data)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"data/0"))
    data[entry + 20 : entry + 28] = 2 * (1 << 30).to_bytes(4, "little")  # stored and true size
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="data/0 does not fit in it"):
        pytorch.read(path)


def test_compressed_and_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.zeros(5000)})
    repacked(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        pytorch.read(path)
    repacked(path, lambda name, data: b"big" if name == "byteorder" else data)
    with pytest.raises(CheckpointError, match="big-endian"):
        pytorch.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["a/byteorder", "a/BYTEORDER", "b/byteorder"])
def test_a_second_record_of_one_name_is_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.zeros(50)})
    assert zipfile.ZipFile(path).namelist()[0].startswith("a/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"little")
    with pytest.raises(CheckpointError, match="two records of one name"):
        pytorch.read(path)


def test_an_encrypted_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.zeros(50)})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2")
    data[entry + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        pytorch.read(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not a file of torch.save. Download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x02}q\x00.", "plain pickle"),
        (b"PK\3\4", "zip archive cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        pytorch.read(tmp_path / "a.bin")


def test_another_zip_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("a/b", b"")
    with pytest.raises(CheckpointError, match=r"not one of torch\.save"):
        pytorch.read(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        pytorch.read(tmp_path / "b.bin")


def test_truncated_and_damaged_files_are_refused_or_do_no_harm(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(3, 5), "b": torch.randn(4).half(), "c": torch.randn(4, 4).T}, buffer)
    whole, path, chosen, refusals = buffer.getvalue(), tmp_path / "a.bin", random.Random(0), 0
    for attempt in range(400):
        data = bytearray(whole)
        if attempt % 4 == 0:
            del data[chosen.randrange(len(data)) :]
        else:
            for _ in range(1 + attempt % 3):
                data[chosen.randrange(len(data))] = chosen.randrange(256)
        path.write_bytes(data)
        try:
            found = pytorch.read(path)
        except CheckpointError:
            refusals += 1
            continue
        for tensor in found.values():
            assert len(read_all(tensor)) == tensor.nbytes <= len(whole)
    assert refusals > 150


def test_no_compiler_is_imported(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.ones(1)})
    script = (
        "import sys; from pathlib import Path; from surgery.checkpoint.formats import pytorch; "
        f"pytorch.read(Path({str(path)!r})); print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def as_bin(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    """The checkpoint that transformers 4 wrote with safe_serialization=False."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    files = [f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin" for number in range(shards)]
    weight_map = {name: files[position * shards // len(tensors)] for position, name in enumerate(tensors)}
    for file in files:
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One pair in each form: safetensors, one .bin, three .bin, and a .pth beside a config.json."""
    pre = tiny_llama()
    for side, tensors in (("pre", pre), ("ft", fine_tuned(pre))):
        write_checkpoint(tmp_path / side, tensors)
        as_bin(tmp_path / f"{side}-bin", tensors)
        as_bin(tmp_path / f"{side}-bins", tensors, shards=3)
        as_bin(tmp_path / f"{side}-pth", {}).joinpath("pytorch_model.bin").unlink()
        # As a training leaves it: among other things, a matrix transposed.
        stored = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        torch.save({"state_dict": stored, "epoch": 2}, tmp_path / f"{side}-pth" / "last.pth")
    return tmp_path


@pytest.mark.parametrize("method", ["fapm", "hma", "half-reset"])
@pytest.mark.parametrize(
    ("pre", "ft"),
    [("pre-bin", "ft"), ("pre", "ft-bin"), ("pre-bins", "ft-bins"), ("pre-pth/last.pth", "ft-pth/last.pth")],
)
def test_the_output_is_that_of_safetensors(root: Path, pre: str, ft: str, method: str) -> None:
    assert call(method, "--pre", "pre", "--ft", "ft", "--out", "wanted", cwd=root)[0] == 0
    code, _, err = call(method, "--pre", pre, "--ft", ft, "--out", "out", cwd=root)
    assert (code, err) == (0, "")
    wanted, found = read_checkpoint(root / "wanted"), read_checkpoint(root / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[name]) == raw(tensor)
    assert (root / "out/config.json").exists()


def test_the_output_is_cut_by_size(root: Path) -> None:
    words = ("--pre", "pre-bins", "--ft", "ft-bins", "--max-shard-size", "5KB")
    assert call("fapm", *words, "--out", "out", cwd=root)[0] == 0
    files = sorted(path.name for path in (root / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    weight_map = json.loads((root / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(weight_map.values())) == files
    assert weight_map.keys() == tiny_llama().keys()


def test_the_command_refuses_in_one_sentence(root: Path) -> None:
    mark = root / "it ran"
    torch.save({"a": Payload(mark)}, root / "pre-bin/pytorch_model.bin")
    words = ("--pre", "pre-bin", "--ft", "ft", "--out", "out")
    refused(root, "fapm", *words, says=("pre-bin/pytorch_model.bin", "would run code (posix.mkdir)"))
    assert not mark.exists()
    (root / "pre-bin/pytorch_model.bin").write_bytes((root / "ft-bin/pytorch_model.bin").read_bytes()[:9000])
    refused(root, "fapm", *words, says=("pre-bin/pytorch_model.bin", "truncated or damaged"))
