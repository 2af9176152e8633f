"""A checkpoint in a folder: its tensors, in whatever format they lie, and how its files are cut."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.companions import companions
from surgery.checkpoint.container import Container, Shard
from surgery.checkpoint.formats import FORMATS, Base, Choice, adapter, choose, mlx, single
from surgery.checkpoint.formats.format import Opened
from surgery.checkpoint.hub import Source, resolve
from surgery.checkpoint.quantized import dequantize
from surgery.checkpoint.tensor import Tensor
from surgery.checkpoint.tied import CONFIG, config_of
from surgery.errors import CheckpointError, PairError
from surgery.layout import unwrapped

# Factors of an adapter among a model's weights.
UNMERGED = re.compile(
    r"\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_[ab]|hada_w\d_[ab]|lokr_w\d(?:_[ab])?|trainable_tokens_delta|oft_R|ia3_l)(?:\.|$)"
)
ADAPTERS = (adapter.NAME, mlx.NAME)
# How deep a folder is searched for an adapter: "run/checkpoint-500/adapter".
DEPTH = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk; no weights in memory.

    Attributes:
        format: a name in `surgery.checkpoint.formats.FORMATS`.
        tensors: every tensor, by name, in the order of the files. Where an index exists, it decides which shard holds one.
        files: the files that the weights are read from, by name.
        container: how the safetensors files are cut; None for another format.
        notes: what the user should know of how it was read.
        inside: the folder inside in which an adapter lies with a tokenizer of its own; "" for the folder itself.
        quantized: the name of the quantization that its weights are stored in; "" where they are plain numbers.
    """

    source: Source
    format: str
    tensors: dict[str, Tensor]
    files: dict[str, Path]
    container: Container | None
    notes: tuple[str, ...] = ()
    inside: str = ""
    quantized: str = ""

    @property
    def folder(self) -> Path:
        """Where the files beside the weights lie."""
        return self.source.folder / self.inside

    @property
    def borrows(self) -> bool:
        """Whether its format lacks config.json and tokenizer: the output's come from pre."""
        return FORMATS[self.format].borrows


def open_both(pre: str, *tuned: str) -> tuple[Checkpoint, list[Checkpoint]]:
    """Open a pre-trained model and the models that were fine-tuned from it, reading headers only.

    Args:
        pre, tuned: folders, files, or hub ids with an optional `@revision`.

    Raises:
        CheckpointError, HubError: as `open_checkpoint`.
        PairError: two that need each other's names.
    """
    sources = [resolve(typed, companions=True) for typed in tuned]
    formats = [FORMATS[weights_of(source).format] for source in sources]
    base = resolve(pre, companions=any(format.borrows for format in formats))
    choice = weights_of(base, adapters=False)
    if FORMATS[choice.format].needs_base and not FORMATS[choice.format].endings:
        made_for = adapter.made_for(base.folder / choice.inside / adapter.CONFIG)
        raise CheckpointError(
            f"{base.folder}: is an adapter, so it cannot be `pre`. Give the model that it was made for"
            + (f", {made_for}." if made_for else ".")
        )
    if FORMATS[choice.format].needs_base:
        if formats[0].needs_base:
            raise PairError(
                f"{base.folder} and {sources[0].folder} both need the tensor names of the other side. Give one of them in the "
                "Hugging Face format."
            )
        first = open_checkpoint(sources[0])
        opened = open_checkpoint(base, other=first)
        return opened, [first, *(open_checkpoint(source, other=opened) for source in sources[1:])]
    opened = open_checkpoint(base, adapters=False)
    return opened, [open_checkpoint(source, other=opened) for source in sources]


def weights_of(source: Source, *, adapters: bool = True) -> Choice:
    """Which files of a folder hold its weights.

    Args:
        adapters: an adapter beside a whole model is part of it.

    Raises:
        CheckpointError: there are none, or it is not clear which.
    """
    if source.file:
        return single(source.file, [path.name for path in source.folder.iterdir()], str(source.folder))
    try:
        choice = choose(list(_names(source.folder)), str(source.folder), CheckpointError, adapters=adapters)
    except CheckpointError as error:
        inner = _inside(source.folder)
        if len(inner) == 1:
            (name, choice), *_ = inner.items()
            note = f"The weights of {source.folder} lie in its folder {name}."
            inside = f"{name}/{choice.inside}" if choice.inside else name
            return replace(choice, inside=inside, notes=(*choice.notes, note))
        if inner:
            raise CheckpointError(
                f"{source.folder}: has no weights itself, and {len(inner)} folders that do ({_some(inner)}). Give one, such as "
                f"{source.folder / sorted(inner)[-1]}."
            ) from None
        raise error
    if choice.format in ADAPTERS:  # peft saves the first adapter in the folder itself, and others in folders inside
        others = [name for name, inner in _inside(source.folder).items() if inner.format in ADAPTERS]
        if others:
            note = (
                f"{source.folder} holds further adapters ({_some(others)}): the one in the folder itself is meant. For another "
                f"give its folder, such as {source.folder / others[0]}."
            )
            return replace(choice, notes=(*choice.notes, note))
    return choice


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:4])


def _inside(folder: Path) -> dict[str, Choice]:
    """The folders inside that hold weights: of an adapter, or a model that was saved as a folder with a file's name.

    Where there are none, the nearest adapters further inside.
    """
    level = [folder]
    for depth in range(DEPTH):
        level = [path for outer in level for path in _folders(outer)]
        found = {}
        for path in level:
            with suppress(CheckpointError, OSError):
                choice = choose(list(_names(path)), str(path), CheckpointError)
                if depth == 0 or choice.format in ADAPTERS:
                    found[path.relative_to(folder).as_posix()] = choice
        if found:
            return found
    return {}


def _folders(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "optim")))
    return []


def open_checkpoint(source: Source, *, other: Checkpoint | None = None, adapters: bool = True) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        source: its folder.
        other: the other side of the pair, for an adapter or a GGUF file.
        adapters: an adapter beside a whole model is part of it.

    Raises:
        CheckpointError: missing, damaged, or in a format that surgery does not read.
    """
    choice = weights_of(source, adapters=adapters)
    notes = list(choice.notes)
    if choice.beside:  # as transformers loads it
        other = open_checkpoint(source, adapters=False)
        notes.append(f"{source.folder} holds a model and an adapter beside it: the model with the adapter is meant.")
    base = (
        Base(other.tensors, other.files, other.container, config_of(other.folder), other.source.typed)
        if other
        else None
    )
    opened, quantized = FORMATS[choice.format].open(source.folder / choice.inside, choice, base), ""
    if not FORMATS[choice.format].needs_base:
        opened, quantized = dequantize(opened, config_of(source.folder), source.folder / CONFIG)
    notes += [note for note in opened.notes if note not in notes]
    if factor := next((name for name in opened.tensors if UNMERGED.search(name)), None):
        path, config = opened.tensors[factor].path, source.folder / choice.inside / adapter.CONFIG
        if not (config.is_file() and adapters):
            raise CheckpointError(
                f"{path}: holds a LoRA that is not merged ({factor}), beside the weights of its base. Load it with peft, call "
                "merge_and_unload, and give the folder of what save_pretrained writes then; or put the adapter's "
                f"{adapter.CONFIG}, which says r and lora_alpha, beside it."
            )
        own = Base(opened.tensors, opened.files, config=config_of(source.folder))
        opened = Opened(adapter.merged(config, path, own), {**opened.files, adapter.CONFIG: config})
        notes.append(f"{path} holds a LoRA that is not merged: it was added as {adapter.CONFIG} says.")
    if not opened.tensors:
        raise CheckpointError(f"{source.folder}: the checkpoint holds no tensor.")
    tensors, container = _unwrapped(opened.tensors, opened.container)
    if tensors is not opened.tensors:
        first, plain = next(pair for pair in zip(opened.tensors, tensors, strict=True) if pair[0] != pair[1])
        notes.append(f"{first} and its like are called {plain} from here on: what training put before it is gone.")
    equipped = choice.format in ADAPTERS and companions(source.folder / choice.inside, only_known=True)
    inside = choice.inside if equipped else ""
    return Checkpoint(source, choice.format, tensors, opened.files, container, tuple(notes), inside, quantized)


def _unwrapped(tensors: dict[str, Tensor], container: Container | None) -> tuple[dict[str, Tensor], Container | None]:
    """Tensors under the names that transformers loads: without what torch.compile, FSDP, DDP or Lightning put into them."""
    names = {name: unwrapped(name) for name in tensors}
    plain = names.values()
    if all(name.startswith("model.") for name in plain) and any(name.startswith("model.model.") for name in plain):
        names = {
            name: plain.removeprefix("model.") for name, plain in names.items()
        }  # a LightningModule's `self.model`
    if len(set(names.values())) < len(names) or all(name == plain for name, plain in names.items()):
        return tensors, container
    renamed = {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}
    if container is not None:
        shards = {
            file: Shard(tuple(names[name] for name in shard.names), shard.metadata)
            for file, shard in container.shards.items()
        }
        container = Container(shards, container.index)
    return renamed, container


def _names(folder: Path) -> Iterator[str]:
    """The files of a folder, and those of Meta's own folder in it; the names of folders end with a slash."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path.name
        elif path.name == "original":
            yield from (f"original/{inner.name}" for inner in path.iterdir())
        else:
            yield f"{path.name}/"
