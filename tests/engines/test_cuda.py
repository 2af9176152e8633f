"""The engine of a GPU against the streaming one: the same bytes and the same counts.

The first test runs the GPU engine's code on torch's CPU device, so that it is checked on every machine; the second, on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import read_checkpoint, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.device import find_device
from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.engines import resident
from surgery.engines.cpu import CpuEngine
from surgery.engines.cuda import CudaEngine
from surgery.engines.results import Result
from surgery.errors import CheckpointError, OptionError
from surgery.methods import METHODS, Breadcrumbs, DgHard, Fapm, Hma, Intruder, Magnitude
from surgery.methods.actions import Step

SHAPES = {
    "model.embed_tokens.weight": (67, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (700, 1024),  # more than a sample
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.norm.weight": (16,),
}


class Memory:
    """A sink that keeps what it is given."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def write(self, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.data[offset : offset + len(view)] = view


def make_pair(folder: Path, pre_dtype: torch.dtype, ft_dtype: torch.dtype) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    pre = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    ft = {name: value + 1e-3 * torch.randn(value.shape, generator=generator) for name, value in pre.items()}
    pre["model.layers.0.mlp.up_proj.weight"][:3] = 0
    ft["model.layers.0.mlp.up_proj.weight"][1:9] = pre["model.layers.0.mlp.up_proj.weight"][1:9]
    write_checkpoint(folder / "pre", {name: value.to(pre_dtype) for name, value in pre.items()})
    write_checkpoint(folder / "ft", {name: value.to(ft_dtype) for name, value in ft.items()})
    return folder / "pre", folder / "ft"


def edited(engine: CpuEngine | CudaEngine, step: Step) -> tuple[bytes, Result]:
    sink = Memory(step.ft.nbytes)
    result = engine.run(step, sink)
    return bytes(sink.data), result


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize(
    ("pre_dtype", "ft_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_same_bytes_as_the_streaming_engine(
    tmp_path: Path, method: Any, pre_dtype: torch.dtype, ft_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "CHUNK", 100_003)  # several chunks, that end in the middle of rows
    pre, ft = make_pair(tmp_path, pre_dtype, ft_dtype)
    streaming = CpuEngine(lambda _: None)
    whole = CudaEngine(lambda _: None, torch.device("cpu"))
    for step in prepare(pre, ft, method()).steps:
        expected, counts = edited(streaming, step)
        actual, other = edited(whole, step)
        if method in (DgHard, Intruder):  # whose decompositions are other libraries'
            ours, theirs = (torch.frombuffer(bytearray(side), dtype=ft_dtype).double() for side in (expected, actual))
            torch.testing.assert_close(theirs, ours, rtol=torch.finfo(ft_dtype).eps, atol=1e-12)
            assert other.differ == pytest.approx(counts.differ, rel=1e-3)
            continue
        assert actual == expected, step.ft.name
        assert (other.kept, other.pruned) == (counts.kept, counts.pruned)
        assert other.before2 == pytest.approx(counts.before2, rel=1e-6)
        assert other.differ == counts.differ
        assert other.after2 == pytest.approx(counts.after2, rel=1e-6)


def test_refuses_what_is_not_finite(tmp_path: Path) -> None:
    pre, _ = make_pair(tmp_path, torch.float32, torch.float32)
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = float("nan")
    write_checkpoint(tmp_path / "broken", tensors)
    job = prepare(pre, tmp_path / "broken", Fapm())
    step = next(step for step in job.steps if "1.self_attn.q_proj" in step.ft.name)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight holds NaN"):
        edited(CudaEngine(lambda _: None, torch.device("cpu")), step)


def test_each_expert_of_a_stack_has_a_threshold_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    pre = {name: torch.randn(3, 40, 30, generator=generator)}
    ft = {name: pre[name] + 0.01 * torch.randn(3, 40, 30, generator=generator) * torch.arange(1, 4)[:, None, None]}
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    (step,) = prepare(tmp_path / "pre", tmp_path / "ft", Fapm(0.75, group="expert")).steps
    expected, counts = edited(CpuEngine(lambda _: None), step)
    actual, other = edited(CudaEngine(lambda _: None, torch.device("cpu")), step)
    assert actual == expected
    assert counts.kept == other.kept == 3 * 300


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many bytes each new tensor has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in before:
                self.sizes.append(value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("method", [Fapm(), Hma(), Breadcrumbs()], ids=["fapm", "hma", "breadcrumbs"])
def test_nothing_but_the_bytes_of_a_tensor_is_there_at_full_length(
    tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "CHUNK", 50_000)
    pre, ft = make_pair(tmp_path, torch.bfloat16, torch.bfloat16)
    engine = CudaEngine(lambda _: None, torch.device("cpu"))
    step = next(step for step in prepare(pre, ft, method).steps if "up_proj" in step.ft.name)
    with Storages() as storages:
        edited(engine, step)
    largest = sorted(storages.sizes)[::-1]
    assert largest[:2] == [step.ft.nbytes] * 2  # pre and ft, as they are stored
    assert largest[2] <= 8 * 128 * 512 < step.ft.nbytes  # the positions of the sample


def test_too_small_a_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    pre, ft = make_pair(tmp_path, torch.float32, torch.float32)
    engine = CudaEngine(lambda _: None, torch.device("cpu"))
    monkeypatch.setattr(engine, "_load", full)
    step = next(step for step in prepare(pre, ft, Fapm()).steps if "up_proj" in step.ft.name)
    with pytest.raises(OptionError, match=r"up_proj\.weight does not fit into the memory of cpu.*Give fewer `workers`"):
        edited(engine, step)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "CUDA"])
def test_device_names(name: str) -> None:
    with pytest.raises(OptionError, match="`device` must be"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_said() -> None:
    with pytest.raises(OptionError, match="no CUDA device"):
        find_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [DgHard(), Intruder(epsilon=0.999)], ids=["dg-hard", "intruder"])
def test_gpu_decomposes_the_same(tmp_path: Path, method: Any) -> None:
    pre, ft = make_pair(tmp_path, torch.float32, torch.float32)
    run(prepare(pre, ft, method, out=tmp_path / "cpu"), device="cpu")
    run(prepare(pre, ft, method, out=tmp_path / "gpu"), device="cuda")
    ours, theirs = read_checkpoint(tmp_path / "cpu"), read_checkpoint(tmp_path / "gpu")
    base = read_checkpoint(ft)
    assert any(not torch.equal(ours[name], base[name]) for name in ours)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", [Fapm(), Magnitude(), Hma()], ids=["fapm", "magnitude", "hma"])
def test_gpu_writes_the_same_bytes(tmp_path: Path, method: Any, dtype: torch.dtype) -> None:
    pre, ft = make_pair(tmp_path, dtype, dtype)
    on_cpu = run(prepare(pre, ft, method, out=tmp_path / "cpu"), device="cpu")
    on_gpu = run(prepare(pre, ft, method, out=tmp_path / "gpu"), device="cuda")
    assert [line["checksum"] for line in on_gpu["tensors"]] == [line["checksum"] for line in on_cpu["tensors"]]
    assert (tmp_path / "gpu" / "model.safetensors").read_bytes() == (
        tmp_path / "cpu" / "model.safetensors"
    ).read_bytes()
