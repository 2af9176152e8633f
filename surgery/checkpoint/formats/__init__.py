"""The formats that weights lie in, and which of a folder's files they are.

One module a format: it finds its files by their names, so that only what is needed is fetched from a hub, and turns them into
`Tensor`s. A new one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Collection

from surgery.checkpoint.formats import adapter, distributed, gguf, meta, mlx, pytorch, safetensors
from surgery.checkpoint.formats.foreign import explained
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear
from surgery.errors import CheckpointError, SurgeryError

__all__ = ["FORMATS", "Base", "Choice", "Format", "Opened", "choose", "single"]

# In the order in which they are looked for: an adapter changes what lies beside it, safetensors come before torch's own files.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        adapter.FORMAT,
        mlx.FORMAT,
        safetensors.FORMAT,
        distributed.FORMAT,
        pytorch.FORMAT,
        meta.FORMAT,
        gguf.FORMAT,
    )
}


def single(file: str, names: Collection[str], where: str) -> Choice:
    """The choice of a single file, with the configuration beside it that an adapter needs.

    Args:
        names: the files of its folder.
        where: its folder.

    Raises:
        CheckpointError: it is in no format, or lacks its configuration.
    """
    if (choice := _of_adapter(file)) and adapter.CONFIG not in names:
        raise CheckpointError(f"{where}: {_lacks_config(file)}")
    if choice:
        return choice
    format = next((format for format in FORMATS.values() if file.endswith(format.endings)), None)
    if format is None:
        raise CheckpointError(f"{where}/{file}: is no checkpoint. Give the folder that holds one.")
    return Choice(format.name, (file,))


def _of_adapter(file: str) -> Choice | None:
    """The choice of a file with the name of an adapter's weights, and of its configuration."""
    return adapter.FORMAT.find((file, adapter.CONFIG)) or mlx.FORMAT.find((file, adapter.CONFIG))


def _lacks_config(file: str) -> str:
    return (
        f"{file} lies there without {adapter.CONFIG}, which says how the adapter is scaled (r, lora_alpha). Copy it from where "
        "the adapter was trained: peft's save_pretrained writes both."
    )


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
    if file := next((name for name in names if _of_adapter(name)), None):
        raise error(f"{where}: {_lacks_config(file)}")
    if sentence := explained(names, where):
        raise error(f"{where}: {sentence}")
    raise error(
        f"{where}: is not a checkpoint: it has neither {safetensors.SINGLE} nor any other weights that surgery reads."
    )
