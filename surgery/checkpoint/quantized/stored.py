"""Parts that every scheme of quantization shares: the stored tensors of a checkpoint, and tensors computed from codes.

A scheme is a function that takes `Stored` and returns `Made`. Shapes and types are checked there, from headers; the numbers are
computed a slab at a time, while they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import RAW, Array, Floats, narrow, widen
from surgery.checkpoint.tensor import Reader, Tensor
from surgery.errors import CheckpointError

AGAIN = "Download or save the checkpoint again."
# Entries that are computed at once: 1 MiB of float32.
SLAB = 1 << 18

# By the name of a stored tensor: the tensor that stands in its place, or None where it is a part of another.
Made = dict[str, Tensor | None]
# The entries [first, last) of a tensor, flat. `first` is at the beginning of a slab.
Values = Callable[[int, int], Floats]


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint whose weights are codes, by its headers.

    Attributes:
        tensors: by name, as they are stored.
        config: what config.json says of the quantization.
        dtype: the type of the numbers that are made: "BF16", "F16" or "F32".
        where: the file to name when the configuration is wrong.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    dtype: str
    where: Path

    def part(self, name: str, of: Tensor, dtypes: Sequence[str] = ("F32", "BF16", "F16")) -> Tensor:
        """A tensor that belongs to the codes of another.

        Raises:
            CheckpointError: it is missing, or of another type.
        """
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{of.path}: {of.name} is quantized, and {name}, which its numbers need, is missing. {AGAIN}"
            )
        if found.dtype not in dtypes:
            raise CheckpointError(
                f"{found.path}: {name} has the type {found.dtype} in place of {' or '.join(dtypes)}. {AGAIN}"
            )
        return found


def unfit(tensor: Tensor, of: Tensor) -> CheckpointError:
    """The error for a part whose shape does not fit the codes."""
    return CheckpointError(
        f"{tensor.path}: {tensor.name} of shape {list(tensor.shape)} does not fit {of.name}, which is quantized and has shape "
        f"{list(of.shape)}. {AGAIN}"
    )


def check_shape(tensor: Tensor, of: Tensor, *shapes: Sequence[int]) -> None:
    """Raise CheckpointError where a part of a quantized tensor has none of these shapes."""
    if tensor.shape not in [tuple(shape) for shape in shapes]:
        raise unfit(tensor, of)


class Scheme(Protocol):
    """How the numbers of one tensor are made of stored ones."""

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The stored tensors, the codes first."""

    def start(self, readers: Sequence[Reader]) -> Values:
        """Begin to compute, with the sources opened for reading."""


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized:
    """The data of a tensor that is computed from codes.

    Attributes:
        entries: how many there are.
        slab: entries that are computed at once.
        through: the types that a number in float32 is rounded to, one after the other; the last is the tensor's.
    """

    scheme: Scheme
    entries: int
    slab: int
    through: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.scheme.sources[0].path

    def open(self) -> OpenDequantized:
        return OpenDequantized(self)


@dataclass(slots=True, eq=False)
class OpenDequantized:
    """Codes opened for reading, with the slab that was computed last."""

    data: Dequantized
    readers: list[Reader] = field(default_factory=list)
    number: int = -1
    held: memoryview = field(default_factory=lambda: memoryview(b""))
    values: Values | None = None

    def read(self, offset: int, view: memoryview) -> None:
        dtype = self.data.through[-1]
        slab_bytes, done = self.data.slab * RAW[dtype].itemsize, 0
        while done < len(view):
            number, cut = divmod(offset + done, slab_bytes)
            if number != self.number:
                self._compute(number)
            part = self.held[cut : cut + len(view) - done]
            if not part:
                raise EOFError
            view[done : done + len(part)] = part
            done += len(part)

    def _compute(self, number: int) -> None:
        if self.values is None:
            self.readers = [tensor.open() for tensor in self.data.scheme.sources]
            self.values = self.data.scheme.start(self.readers)
        first = number * self.data.slab
        last = min(first + self.data.slab, self.data.entries)
        if first >= last:
            raise EOFError
        with np.errstate(all="ignore"):
            numbers = self.values(first, last)
            *before, last_type = self.data.through
            for dtype in before:
                numbers = widen(dtype, narrow(numbers, dtype))
            raw = narrow(numbers, last_type)
        self.held, self.number = memoryview(np.ascontiguousarray(raw).view(np.uint8).ravel()), number

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.readers, self.values, self.held, self.number = [], None, memoryview(b""), -1


def dequantized(
    name: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, *, slab: int = 0, via: str = "F32"
) -> Tensor:
    """A tensor of numbers that are computed from codes.

    Args:
        dtype: its type.
        slab: entries that are computed at once; by default rows of the last dimension, as many as `SLAB` holds.
        via: the type that the scheme's own library computes in, to which a number is rounded first.
    """
    entries = math.prod(shape)
    width = shape[-1] if shape else 1
    slab = slab or max(SLAB // max(width, 1), 1) * width
    through = (dtype,) if via in ("F32", dtype) else (via, dtype)
    return Tensor(name, dtype, shape, Dequantized(scheme, entries, max(slab, 1), through))


def taken(reader: Reader, first: int, last: int) -> NDArray[np.uint8]:
    """The bytes [first, last) of an open tensor."""
    held = bytearray(last - first)
    reader.fill(first, memoryview(held))
    return np.frombuffer(held, np.uint8)


def whole(reader: Reader, kind: type[Any] = np.uint8) -> Array:
    """All of an open tensor that is small enough for memory, in its shape, as numbers of a type of numpy's."""
    found: Array = taken(reader, 0, reader.tensor.nbytes).view(kind).reshape(reader.tensor.shape)
    return found


def as_floats(dtype: str, raw: NDArray[np.uint8]) -> Floats:
    """Bytes of floating-point numbers, or of exponents (F8_E8M0, U8: 2^(byte - 127)), as float32."""
    if dtype in ("F8_E8M0", "U8"):
        powers: Floats = powers_of_two()[raw]
        return powers
    return widen(dtype, raw.view(RAW[dtype]))


def floats(reader: Reader) -> Floats:
    """All of a small tensor as `as_floats` gives it, in its shape."""
    return as_floats(reader.tensor.dtype, taken(reader, 0, reader.tensor.nbytes)).reshape(reader.tensor.shape)


def powers_of_two() -> Floats:
    """2^(byte - 127) for each byte, the E8M0 of the OCP Microscaling formats; 2^128 is infinite, as in transformers."""
    with np.errstate(over="ignore"):
        found: Floats = np.ldexp(np.float32(1), np.arange(-127, 129, dtype=np.int32))
    return found


def integer(config: Mapping[str, Any], where: Path, *keys: str) -> int:
    """A whole number of the configuration under the first of some keys that it has.

    Raises:
        CheckpointError: it is missing or no such number.
    """
    value = next((config[key] for key in keys if key in config), None)
    if type(value) is not int:
        raise CheckpointError(f"{where}: quantization_config has no whole number as {keys[0]}. {AGAIN}")
    return value
