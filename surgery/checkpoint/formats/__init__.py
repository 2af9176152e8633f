"""The formats that weights lie in, and which of a folder's files they are.

One module a format: it finds its files by their names, so that only what is needed is fetched from a hub, and turns them into
`Tensor`s. A new one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Collection

from surgery.checkpoint.formats import adapter, gguf, meta, mlx, pytorch, safetensors
from surgery.checkpoint.formats.foreign import explained
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear
from surgery.errors import SurgeryError

__all__ = ["FORMATS", "Base", "Choice", "Format", "Opened", "by_ending", "choose"]

# In the order in which they are looked for: an adapter changes what lies beside it, safetensors come before torch's own files.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (adapter.FORMAT, mlx.FORMAT, safetensors.FORMAT, pytorch.FORMAT, meta.FORMAT, gguf.FORMAT)
}


def by_ending(file: str) -> Format | None:
    """The format of a single file."""
    return next((format for format in FORMATS.values() if file.endswith(format.endings)), None)


def choose(names: Collection[str], where: str, error: type[SurgeryError], *, adapters: bool = True) -> Choice:
    """Which of a folder's files are its weights.

    Args:
        names: the files, relative to the folder, with forward slashes; those of its folders end with one.
        where: the folder or repository, for a message.
        error: what to raise.
        adapters: an adapter beside a whole model is part of it.

    Raises:
        SurgeryError: there are none, or it is not clear which.
    """
    for format in FORMATS.values():
        try:
            choice = format.find(names)
        except Unclear as unclear:
            raise error(f"{where}: has {unclear}") from None
        if choice and (adapters or not choice.beside):
            return choice
    if adapter.CONFIG in names:
        raise error(f"{where}: is an adapter without its weights, {adapter.WEIGHTS[0]}. Put them there.")
    if sentence := explained(names, where):
        raise error(f"{where}: {sentence}")
    raise error(
        f"{where}: is not a checkpoint: it has neither {safetensors.SINGLE} nor any other weights that surgery reads."
    )
