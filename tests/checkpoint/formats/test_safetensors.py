"""safetensors files: nothing in a header is believed before it was checked; what is written, safetensors reads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from surgery.checkpoint.formats.safetensors import encode_header, read_header
from surgery.checkpoint.tensor import Span, Tensor
from surgery.errors import CheckpointError

A: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B: dict[str, Any] = {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}


def file(folder: Path, header: Any, nbytes: int = 22) -> Path:
    """A safetensors file with a header, as JSON or as its bytes, and `nbytes` of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    return path


# what is wrong -> (header, what the sentence says)
DAMAGED: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{'a': 1}", "not JSON"),
    "no UTF-8": (b'{"a\xff": {}}', "not JSON"),
    "UTF-16": ("{}".encode("utf-16"), "not JSON"),
    "too deep": (b"[" * 200_000, "not JSON"),
    "a list": ([], "no JSON object"),
    "a name twice": (b'{"a": %b, "a": %b}' % (json.dumps(A).encode(), json.dumps(B).encode()), "names a tensor twice"),
    "overlap": ({"a": A, "b": B | {"data_offsets": [14, 20]}}, "b overlaps"),
    "the same place twice": ({"a": A, "b": A}, "overlaps"),
    "a hole": ({"a": A, "b": B | {"shape": [2], "data_offsets": [18, 22]}}, "b leaves a hole"),
    "a hole at the start": ({"b": B}, "b leaves a hole"),
    "beyond the file": ({"a": A, "b": B | {"shape": [4], "data_offsets": [16, 24]}}, "truncated: tensor b"),
    "bytes to spare": ({"a": A}, "6 bytes follow"),
    "too few bytes for the shape": ({"a": A | {"shape": [2, 3]}, "b": B}, "tensor a span 16 bytes"),
    "turned offsets": ({"a": A | {"data_offsets": [16, 0]}, "b": B}, "tensor a span -16"),
    "a negative offset": ({"a": A | {"data_offsets": [-16, 0]}}, "entry for tensor a"),
    "a negative shape": ({"a": A | {"shape": [-2, -2]}, "b": B}, "entry for tensor a"),
    "a huge shape": ({"a": A | {"shape": [10**4000, 10**4000]}, "b": B}, "entry for tensor a"),
    "a long shape": ({"a": A | {"shape": [2**62] * 400}, "b": B}, "tensor a"),
    "a shape of fractions": ({"a": A | {"shape": [2.0, 2.0]}, "b": B}, "entry for tensor a"),
    "a shape of truths": ({"a": A | {"shape": [True, True]}, "b": B}, "entry for tensor a"),
    "a shape that is a word": ({"a": A | {"shape": "22"}, "b": B}, "entry for tensor a"),
    "a shape of NaN": (json.dumps({"a": A | {"shape": [float("nan")]}}).encode(), "entry for tensor a"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}, "b": B}, "entry for tensor a"),
    "three offsets": ({"a": A | {"data_offsets": [0, 8, 16]}, "b": B}, "entry for tensor a"),
    "a type that is a list": ({"a": A | {"dtype": ["F32"]}, "b": B}, "entry for tensor a"),
    "an entry that is no object": ({"a": [A], "b": B}, "entry for tensor a"),
    "an unknown type": ({"a": A | {"dtype": "F31"}, "b": B}, "type F31"),
    "half a character": (b'{"\\ud800": %b, "b": %b}' % (json.dumps(A).encode(), json.dumps(B).encode()), "damaged"),
    "metadata that is a list": ({"__metadata__": ["pt"], "a": A, "b": B}, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"step": 1}, "a": A, "b": B}, "__metadata__"),
    "metadata of half a character": ({"__metadata__": {"note": "\ud800"}, "a": A, "b": B}, "__metadata__"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_header(tmp_path: Path, fault: str) -> None:
    header, said = DAMAGED[fault]
    path = file(tmp_path, header)
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("raw", [b"", b"1234567", (9).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}"])
def test_a_length_that_the_file_does_not_have(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "model.safetensors")


def test_random_damage_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    """Bytes at random: one sentence, or a header whose tensors lie in the file."""
    raw = save({"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}, metadata={"format": "pt"})
    path = tmp_path / "model.safetensors"
    draw, refused = random.Random(0), 0
    for _ in range(2000):
        damaged = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(raw) - 22)] = draw.choice(
                b'\x00\xff0123456789-.{}[]",:\\u' + bytes([draw.randrange(256)])
            )
        path.write_bytes(damaged[: draw.choice([len(raw), len(raw), draw.randrange(len(raw))])])
        try:
            header = read_header(path)
        except CheckpointError:
            refused += 1
            continue
        assert sum(tensor.nbytes for tensor in header.tensors.values()) == 22
        for tensor in header.tensors.values():
            assert isinstance(tensor.data, Span)
            assert 8 < tensor.data.begin <= tensor.data.begin + tensor.nbytes <= path.stat().st_size
    assert refused > 1000


def test_read_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(2, 3, dtype=torch.float16),
        "b": torch.ones(()),
        "c": torch.ones(0, 5),
        "d": torch.ones(3, dtype=torch.bool),
        "é ü 層": torch.ones(1, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt", "note": "Größe"}))
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "Größe"}
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in header.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }


def test_safetensors_reads_what_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    # Five bytes first: what follows is not aligned, as in any shard with an odd number of booleans.
    shapes = {"mask": ("BOOL", (5,)), "層": ("BF16", (2, 3)), "empty": ("F32", (0, 9)), "b": ("F32", ())}
    wanted = [Tensor(name, dtype, shape, Span(path, 0)) for name, (dtype, shape) in shapes.items()]
    header, placed = encode_header(wanted, {"format": "pt"})
    assert len(header) % 8 == 0
    path.write_bytes(header + bytes(range(21)))
    found = read_header(path).tensors.values()
    assert {tensor.name: tensor.data for tensor in found} == {name: Span(path, begin) for name, begin in placed.items()}
    assert list(placed) == list(shapes)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, (_, shape) in shapes.items():
            assert tuple(opened.get_tensor(name).shape) == shape
        assert opened.get_tensor("mask").view(torch.uint8).tolist()[1:] == [1, 2, 3, 4]
