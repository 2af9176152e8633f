"""Headers of GGUF files: what the gguf package reads in them, and files that were damaged or made to do damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from helpers.families import FAMILIES
from helpers.gguf_files import MODELS, stored_names, write_gguf

from surgery.checkpoint.formats.gguf import read
from surgery.checkpoint.formats.gguf_header import read_header
from surgery.errors import CheckpointError


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", MODELS["phi3"].build(), "phi3", Type.Q4_0, general__alignment=64)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert [(stored.name, stored.type, stored.shape, stored.begin) for stored in header.tensors] == [
        (tensor.name, tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset)
        for tensor in reader.tensors
    ]
    assert {key: value for key, value in header.metadata.items() if value is not None} == {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
        and field.types[0] != gguf.GGUFValueType.ARRAY
        and key != "tokenizer.chat_template"
    }


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def record(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


ARCHITECTURE = pair("general.architecture", 8, text("llama"))
HEADS = pair("llama.attention.head_count", 4, struct.pack("<I", 4))


def raw_gguf(
    *parts: bytes, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, pairs: int = 1, data: int = 0
) -> bytes:
    header = magic + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts)
    return header + bytes(-len(header) % 32 + data)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (raw_gguf(magic=b"PK\3\4"), "not a GGUF file"),
        (b"GGUF", "truncated"),
        (raw_gguf(version=1), "version 1;"),
        (raw_gguf(version=3 << 24), "big-endian"),
        (raw_gguf(ARCHITECTURE, pairs=1 << 63)[:-32], "truncated"),
        (raw_gguf(ARCHITECTURE, tensors=1 << 63), "truncated"),
        (raw_gguf(ARCHITECTURE, bytes(10_000), pairs=1 << 63), "is there twice"),
        (raw_gguf(ARCHITECTURE, bytes(10_000), tensors=1 << 63), "'' is there twice"),
        (raw_gguf(struct.pack("<Q", 1 << 63)), "truncated"),
        (raw_gguf(text("k" * 70_000)), "a key is too long"),
        (raw_gguf(pair("a", 8, struct.pack("<Q", 1 << 62))), "truncated"),
        (raw_gguf(pair("a", 9, struct.pack("<IQ", 8, 1 << 62))), "truncated"),
        (raw_gguf(pair("a", 9, struct.pack("<IQ", 10, 1 << 62))), "truncated"),
        (raw_gguf(pair("a", 9, struct.pack("<IQ", 9, 1 << 62))), "an array has entries of the type 9"),
        (raw_gguf(pair("a", 99, b"")), "a value has the type 99"),
        (raw_gguf(pair(b"\xff\xfe", 8, text("llama"))), "not UTF-8"),
        (raw_gguf(ARCHITECTURE, ARCHITECTURE, pairs=2), "is there twice"),
        (raw_gguf(pair("general.alignment", 4, struct.pack("<I", 0))), "aligned to 0"),
        (raw_gguf(pair("general.alignment", 4, struct.pack("<I", 48))), "aligned to 48"),
        (raw_gguf(pair("general.alignment", 8, text("x"))), "aligned to x"),
        (raw_gguf(ARCHITECTURE, record("a", (8,)), record("a", (8,)), tensors=2, data=64), "'a' is there twice"),
        (raw_gguf(ARCHITECTURE, record("a", (1, 1, 1, 1, 1)), tensors=1, data=4), "5 dimensions"),
        (raw_gguf(ARCHITECTURE, record("a", (9,)), tensors=1, data=32), "truncated: tensor a should end"),
        (raw_gguf(ARCHITECTURE, record("a", (1 << 63, 1 << 63)), tensors=1, data=32), "truncated: tensor a should end"),
        (raw_gguf(ARCHITECTURE, record("a", (8,), 0, 1 << 63), tensors=1, data=32), "truncated: tensor a should end"),
        (raw_gguf(ARCHITECTURE, record("a", (1 << 60, 0)), tensors=1, data=32), "cannot be cut"),
        (raw_gguf(ARCHITECTURE, record("a", (2, 16), 2), tensors=1, data=32), "cannot be cut into Q4_0 blocks of 32"),
        (raw_gguf(ARCHITECTURE, record("a", (), 2), tensors=1, data=32), "cannot be cut into Q4_0 blocks of 32"),
        (raw_gguf(ARCHITECTURE, record("a", (32,), 999), tensors=1, data=32), "quantization type 999"),
        (raw_gguf(ARCHITECTURE, record("a", (32,), 9), tensors=1, data=64), "cannot dequantize Q8_1"),
        (raw_gguf(pairs=0), "of the architecture None"),
        (raw_gguf(pair("general.architecture", 8, text("rwkv7"))), "the architecture rwkv7, only bloom, gemma,"),
        (raw_gguf(pair("general.architecture", 4, bytes(4))), "of the architecture 0"),
        (raw_gguf(ARCHITECTURE, pair("general.type", 8, text("adapter")), pairs=2), "of the type adapter"),
        (raw_gguf(ARCHITECTURE, pair("split.count", 2, b"\3\0"), pairs=2), "one of 3 parts"),
        (
            raw_gguf(ARCHITECTURE, record("blk.0.ffn_up_exps.weight", (2, 2, 2)), tensors=1, data=32),
            "ffn_up_exps.weight is a mixture of experts",
        ),
        (
            raw_gguf(ARCHITECTURE, record("blk.0.attn_q.weight", (8, 1)), tensors=1, data=32),
            "no number of attention heads",
        ),
        (
            raw_gguf(ARCHITECTURE, HEADS, record("blk.0.attn_q.weight", (12, 1)), pairs=2, tensors=1, data=64),
            "does not fit the number of heads",
        ),
        (
            raw_gguf(ARCHITECTURE, HEADS, record("blk.0.attn_q.bias", ()), pairs=2, tensors=1, data=64),
            "does not fit the number of heads",
        ),
        (
            raw_gguf(ARCHITECTURE, record("output.weight", (1,)), record("lm_head.weight", (1,)), tensors=2, data=64),
            "holds lm_head.weight twice",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path / "model.gguf", {})
    assert said in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")


def test_a_file_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", FAMILIES["qwen2"].build(), "qwen2").read_bytes()
    path = tmp_path / "model.gguf"
    ends = [*range(0, 3_000, 17), *range(3_000, len(whole), 997), len(whole) - 33]
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"truncated|not a GGUF"):
            read(path, {})


def test_no_damage_to_a_header_is_more_than_an_error_or_other_numbers(tmp_path: Path) -> None:
    model = MODELS["llama"].build()
    whole = bytearray(write_gguf(tmp_path / "whole.gguf", model, "llama", Type.Q4_0).read_bytes())
    chat = whole.index(b"x" * 100_000)
    del whole[chat : chat + 100_000]
    whole[chat - 8 : chat] = bytes(8)
    header = whole.index(b"rope_freqs.weight") + 60
    generator, path, refused = np.random.default_rng(0), tmp_path / "model.gguf", 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(0, header, generator.integers(1, 4)):
            damaged[place] = generator.choice([0, 1, 127, 128, 255, damaged[place] ^ 1])
        path.write_bytes(damaged)
        try:
            for tensor in read(path, stored_names(model)).values():
                with tensor.open() as reader:
                    reader.fill(0, memoryview(bytearray(min(tensor.nbytes, 256))))
        except CheckpointError:
            refused += 1
    assert 50 < refused < 300


def test_a_header_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.checkpoint.formats.gguf_header.MAX_HEADER", 1 << 16)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_gguf(pair("a", 9, struct.pack("<IQ", 8, 1 << 50))))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="longer than 65,536 bytes"):
        read(path, {})
