"""Runs of a method, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import Tensors, read_checkpoint, write_checkpoint

from surgery.editing import run
from surgery.job import prepare
from surgery.methods import METHODS, Method

# The registry, for calls with any options.
MAKE: dict[str, Callable[..., Method]] = {**METHODS}


def edit(folder: Path, pre: Tensors, ft: Tensors, method: Method, *, shards: int = 1, **options: Any) -> Tensors:
    """Write both sides into `folder`, run the method there, and read the result."""
    write_checkpoint(folder / "pre", pre, shards=shards)
    write_checkpoint(folder / "ft", ft, shards=shards)
    run(prepare(folder / "pre", folder / "ft", method, out=folder / "out"), **options)
    return read_checkpoint(folder / "out")
