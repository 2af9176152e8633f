"""The formats that weights lie in, and which of a folder's files they are.

One module a format turns its files into `Tensor`s; this one decides which format a folder or a hub repository has, from the names
of its files alone, so that only what is needed is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from surgery.errors import SurgeryError

SAFETENSORS, PYTORCH, META, ADAPTER, GGUF = "safetensors", "pytorch", "meta", "adapter", "gguf"

# Safetensors first, then torch's; a single file before an index: all as in transformers.
SETS = (
    (SAFETENSORS, "model.safetensors", "model.safetensors.index.json"),
    (PYTORCH, "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PARAMS = "params.json"
PART = re.compile(r"consolidated\.[0-9]{2}\.pth")
# Meta's own files, beside the Hugging Face ones of a Llama 3 repository.
ORIGINAL = "original/"
BY_ENDING = {
    ".safetensors": SAFETENSORS,
    ".bin": PYTORCH,
    ".pth": PYTORCH,
    ".pt": PYTORCH,
    ".gguf": GGUF,
}
# What a training leaves beside the weights in the same formats.
NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state\w*|scaler|\w*mp_rank\w*|tokenizer\w*)\.(bin|pth?)|adapter_model\..*"
)
UNREADABLE = (".h5", ".msgpack", ".onnx", ".ckpt", ".pkl", ".npz", ".ot", ".tflite", ".distcp")


@dataclass(frozen=True, slots=True)
class Choice:
    """The files that hold a model's weights.

    Attributes:
        format: one of this module's names of formats.
        files: the files to read, relative to the folder; with an index, those that it names come on top.
        index: the index that names the shards, if there is one.
    """

    format: str
    files: tuple[str, ...]
    index: str | None = None


def choose(names: Collection[str], where: str, error: type[SurgeryError]) -> Choice:
    """Which of a folder's files are its weights.

    Args:
        names: the files, relative to the folder, with forward slashes.
        where: the folder or repository, for a message.
        error: what to raise.

    Raises:
        SurgeryError: there are none, or it is not clear which.
    """
    weights, single, index = SETS[0]
    if single in names:
        return Choice(weights, (single,))
    if index in names:
        return Choice(weights, (), index)
    if ADAPTER_CONFIG in names and (adapter := [name for name in ADAPTER_WEIGHTS if name in names]):
        return Choice(ADAPTER, (ADAPTER_CONFIG, adapter[0]))
    loose = sorted(
        name for name in names if "/" not in name and not name.startswith(".") and not NO_WEIGHTS.fullmatch(name)
    )
    found = [name for name in loose if name.endswith(".safetensors")]
    if len(found) == 1:
        return Choice(SAFETENSORS, (found[0],))
    if found:
        raise error(
            f"{where} has {len(found)} safetensors files but no {index} that says how they belong together: give the one you "
            "mean by its own path."
        )
    weights, single, index = SETS[1]
    if single in names:
        return Choice(weights, (single,))
    if index in names:
        return Choice(weights, (), index)
    for folder in ("", ORIGINAL):
        parts = sorted(name for name in names if name.startswith(folder) and PART.fullmatch(name[len(folder) :]))
        if parts and folder + PARAMS in names:
            return Choice(META, (folder + PARAMS, *parts))
        if parts:
            raise error(
                f"{where} has {parts[0]} but no {folder}{PARAMS}, which says how many heads the model has: put it there."
            )
    for ending in (".pth", ".pt", ".bin", ".gguf"):
        found = [name for name in loose if name.endswith(ending)]
        if len(found) == 1:
            return Choice(BY_ENDING[ending], (found[0],))
        if found:
            raise error(f"{where} has {len(found)} {ending} files: give the one you mean by its own path.")
    if ADAPTER_CONFIG in names:
        raise error(f"{where} is an adapter without its weights, {ADAPTER_WEIGHTS[0]}: put them there.")
    other = next((name for name in sorted(names) if name.endswith(UNREADABLE)), None)
    if other:
        raise error(
            f"{where} has {other}, which surgery does not read: load it with transformers and give what save_pretrained writes."
        )
    raise error(f"{where} is not a checkpoint: it has neither {SETS[0][1]} nor any other weights that surgery reads.")
