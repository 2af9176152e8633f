"""Load the model to train from a Hugging Face checkpoint, and write the result as one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from surgery.checkpoint.companions import companions
from surgery.checkpoint.container import MAX_SHARD_SIZE, split
from surgery.checkpoint.dtypes import torch_type
from surgery.checkpoint.formats import FORMATS
from surgery.checkpoint.formats.safetensors import INDEX
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.pair import refuse_quantized
from surgery.checkpoint.source import Checkpoint, open_checkpoint, weights_of
from surgery.checkpoint.tensor import Tensor, read_bytes
from surgery.errors import CheckpointError, out_of_memory, reason
from surgery.layout import align, place, tower
from surgery.model import pretrained
from surgery.model.skeleton import read_config
from surgery.model.weights import main_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"


def open_model(typed: str) -> Checkpoint:
    """The model to train, by its headers.

    Args:
        typed: a folder, or a hub id with an optional `@revision`.

    Raises:
        CheckpointError, HubError: it cannot be read, or transformers could not train it.
    """
    source = resolve(typed, companions=True)
    if source.file or FORMATS[weights_of(source).format].borrows:
        raise CheckpointError(f"{typed}: cannot be trained. Give the folder of a model in the Hugging Face format.")
    opened = open_checkpoint(source)
    if opened.quantized:
        raise CheckpointError(
            f"{opened.folder}: the weights are quantized ({opened.quantized}), so they cannot be trained. Dequantize the "
            "model to bfloat16 first."
        )
    for tensor in opened.tensors.values():
        refuse_quantized(tensor)
    if not (opened.folder / CONFIG).is_file():
        raise CheckpointError(f"{opened.folder / CONFIG}: no such file, and the model cannot be built without it.")
    return opened


def load_model(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """Build the model with its weights in `dtype`. Code that comes with it is never run.

    Raises:
        CheckpointError: transformers cannot build it, or the checkpoint lacks a part of it.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # its result depends on output_loading_info
    try:
        model, found = auto.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise _not_built(checkpoint, error) from error
    missing = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: lacks {missing[0]}{' and others' if len(missing) > 1 else ''}, or has it in another shape, as "
            f"{type(model).__name__} needs it. Give a complete language model."
        )
    built: PreTrainedModel = model
    return built


def blank_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model without its weights, on the meta device, which takes no memory.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # untyped
    config = read_config(checkpoint.folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise _not_built(checkpoint, error) from error
    return model


def _not_built(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}: transformers cannot build a language model of it ({reason(error)}). Its architecture must be "
        "one that transformers itself knows."
    )


def load_tokenizer(folder: Path, *, chat: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        chat: a chat template is needed.

    Raises:
        CheckpointError: there is none, or it lacks an end-of-text token or that template.
    """
    tokenizer = pretrained.load_tokenizer(folder)
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no eos_token, so the model could not learn where an answer ends. Name one in "
            "tokenizer_config.json."
        )
    if chat and tokenizer.chat_template is None:
        raise CheckpointError(
            f"{folder}: the data is chat messages, and the tokenizer has no chat template. Add chat_template.jinja, or give "
            "prompts and completions as text."
        )
    return tokenizer


def stored_types(checkpoint: Checkpoint, dtype: str | None) -> Callable[[str], torch.dtype]:
    """Return the dtype in which each parameter is written, by name: `dtype`, or if that is None its dtype in the start model."""
    stored = {tensor.name: torch_type(tensor.dtype) for tensor in checkpoint.tensors.values() if tensor.is_float}
    most = main_dtype(checkpoint.tensors.values())
    return lambda name: getattr(torch, dtype) if dtype else stored.get(name, most)


def cast(model: PreTrainedModel, dtypes: Callable[[str], torch.dtype]) -> None:
    """Cast the parameters in place; buffers stay as they are."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes(name))


def save_model(model: PreTrainedModel, checkpoint: Checkpoint, folder: Path, dtype: str | None) -> list[str]:
    """Write a complete checkpoint: the model's weights, and every other file as the start model has it.

    Args:
        model: trained, its weights in the types to write.
        checkpoint: the start model.
        dtype: what all of them have, for config.json; None for that of the start model.

    Returns:
        The tensors that were not trained, since only the start model around the trained one has them: they are carried over.
    """
    _save_weights(model, folder)
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("model"):
            path.unlink()
    carried = complete(checkpoint, folder)
    copy_companions(checkpoint, folder)
    for path in folder.glob("*.safetensors"):  # safetensors lets nobody else read them
        shutil.copymode(folder / CONFIG, path)
    if dtype is not None:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        config.pop("torch_dtype", None)
        (folder / CONFIG).write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    return carried


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights. The start model's own generation_config.json is copied, which transformers may refuse to save."""
    from transformers import GenerationConfig

    plain: Any = GenerationConfig
    own, model.generation_config = model.generation_config, plain()
    try:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    finally:
        model.generation_config = own


def save_adapter(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a LoRA adapter, as peft does, for the model that it was trained on."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = checkpoint.source.repo or str(checkpoint.folder.resolve())
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the files that a loader needs beside the weights."""
    for name, path in companions(checkpoint.folder).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def complete(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Put what was trained back into the model that it is a part of: a text model into its multimodal one, say.

    Args:
        checkpoint: the start model.
        folder: the trained weights, which get the names and the files of the start model where that has more.

    Returns:
        The names of the tensors that were carried over; none where the start model has no more than was trained.
    """
    trained = open_checkpoint(resolve(str(folder), companions=False))
    names, _ = align(trained.tensors, checkpoint.tensors)  # in the start model -> as trained
    lacking = [name for name in checkpoint.tensors if name not in names and not place(name).buffer]
    lacking = [name for name in lacking if tower(name)]
    if not lacking:
        return []
    container = checkpoint.container or split(checkpoint.tensors, MAX_SHARD_SIZE)
    whole = folder / "whole"
    whole.mkdir()
    for file, shard in container.shards.items():
        held = {
            name: _loaded(trained.tensors[names[name]] if name in names else checkpoint.tensors[name])
            for name in shard.names
        }
        save_file(held, whole / file, shard.metadata)
    for path in trained.files.values():
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    if container.index is not None:
        weight_map = {name: file for file, shard in container.shards.items() for name in shard.names}
        (folder / INDEX).write_text(
            json.dumps({"metadata": container.index, "weight_map": weight_map}, indent=2) + "\n"
        )
    for path in whole.iterdir():
        path.rename(folder / path.name)
    whole.rmdir()
    return lacking


def _loaded(tensor: Tensor) -> torch.Tensor:
    """A tensor in memory."""
    raw = bytearray(read_bytes(tensor))
    return (
        torch.frombuffer(raw, dtype=torch_type(tensor.dtype)).reshape(tensor.shape)
        if raw
        else torch.empty(tensor.shape, dtype=torch_type(tensor.dtype))
    )


def check_can_be_saved(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Save what is small of a model before it is trained, so that a fault shows at once.

    Raises:
        CheckpointError: transformers refuses to write its configuration.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        try:
            model.config.save_pretrained(folder)
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.folder / CONFIG}: transformers cannot write it again ({reason(error)}), so the trained model could "
                "not be saved. Correct it."
            ) from error
