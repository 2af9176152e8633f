"""The engine of whole tensors against the streaming one: the same bytes and the same counts.

The first test runs the GPU engine's code on torch's CPU device, so that it is checked on every machine; the second, on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import read_checkpoint, write_checkpoint

from surgery.device import find_device
from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.engines.cpu import CpuEngine
from surgery.engines.cuda import CudaEngine
from surgery.engines.results import Result
from surgery.errors import CheckpointError, OptionError
from surgery.methods import METHODS, DgHard, Fapm, Intruder, Magnitude
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
    tmp_path: Path, method: Any, pre_dtype: torch.dtype, ft_dtype: torch.dtype
) -> None:
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
@pytest.mark.parametrize("method", [Fapm(), Magnitude()], ids=["fapm", "magnitude"])
def test_gpu_selects_the_same(tmp_path: Path, method: Any) -> None:
    pre, ft = make_pair(tmp_path, torch.bfloat16, torch.bfloat16)
    on_cpu = run(prepare(pre, ft, method, out=tmp_path / "cpu"), device="cpu")
    on_gpu = run(prepare(pre, ft, method, out=tmp_path / "gpu"), device="cuda")
    for cpu_line, gpu_line in zip(on_cpu["tensors"], on_gpu["tensors"], strict=True):
        # Scores may round differently in the last bit, which can move entries that tie with the threshold.
        assert abs(cpu_line["kept"] - gpu_line["kept"]) <= 2 + cpu_line["entries"] // 100_000
