"""Where an output may go: never over an input, nor over what surgery did not write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import OutputError


def check_file(out: Path, inputs: Sequence[Path], *, force: bool) -> Path:
    """The real path of a file to write, if it may be written.

    Raises:
        OutputError: it is or lies in an input, its folder does not exist, or it exists and `force` is not given.
    """
    real = Path(os.path.realpath(out.expanduser()))
    for path in inputs:
        taken = Path(os.path.realpath(path))
        if real == taken or taken in real.parents:
            raise OutputError(f"{out}: is in the input {path}, which is never written to. Choose another `out`.")
    if real.is_dir():
        raise OutputError(f"{out}: is a folder, and the task vector is a file. Choose another `out`.")
    if real.exists() and not force:
        raise OutputError(f"{out}: exists already. Replace it with `force` or choose another `out`.")
    if real.suffix != ".safetensors":
        raise OutputError(
            f"{out}: the task vector is a safetensors file. Give `out` a name that ends with .safetensors."
        )
    return real


def check_output(out: Path, inputs: Sequence[Path], *, force: bool) -> Path:
    """The real path of the output folder, if it may be written.

    Raises:
        OutputError: it is, lies in, or contains an input; or it exists and `force` is not given, or is no checkpoint.
    """
    try:
        out = Path(os.path.realpath(out.expanduser()))
    except RuntimeError:
        raise OutputError(f"{out}: there is no such user. Choose another `out`.") from None
    for folder in inputs:
        real = Path(os.path.realpath(folder))
        if out == real or real in out.parents:
            raise OutputError(
                f"{out}: the output is inside the input {folder}, which is never written to. Choose another `out`."
            )
        if out in real.parents:
            raise OutputError(f"{out}: the output contains the input {folder}. Choose another `out`.")
    if not out.exists():
        if _old(out).exists() and not force:
            raise OutputError(
                f"{out}: a run was killed while it replaced this checkpoint, which is now {_old(out)}. Rename that back, or "
                "replace it with `force`."
            )
        return out
    if not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose another `out`.")
    if not force:
        raise OutputError(f"{out}: exists already. Replace it with `force` or choose another `out`.")
    names = os.listdir(out)  # noqa: PTH208
    if names and not any(name == REPORT or name.endswith((".safetensors", ".bin")) for name in names):
        raise OutputError(
            f"{out}: `force` replaces only a checkpoint, and this folder holds none. Choose another `out`."
        )
    inner = next((name for name in sorted(names) if name.startswith("checkpoint-") and (out / name).is_dir()), None)
    if inner:
        raise OutputError(f"{out}: holds {inner} of a training run, which `force` would delete. Choose another `out`.")
    return out


def _old(out: Path) -> Path:
    """Where the checkpoint that is being replaced stands for a moment."""
    return out.with_name(f".{out.name}.surgery-old")


def appear(folder: Path, out: Path, *, replace: bool) -> Path:
    """Give a finished folder its name.

    Returns:
        Where the checkpoint that it replaced stands now, to be removed; nothing is there where it replaced none.

    Raises:
        OutputError: there is something at `out`, and `replace` is not given.
    """
    old = _old(out)
    if out.exists():
        if not replace:
            raise OutputError(f"{out}: appeared while surgery worked. Choose another `out`.")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    return old


REPORT = "surgery-report.json"
