"""The files beside the weights that a loader needs: they travel from ft to the output, and are fetched from a hub.

Everything travels but what is known to be something else: weights in any format, the state of a training, what surgery writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from surgery.errors import CheckpointError

WEIGHTS = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .onnx_data .gguf .ggml .ot .tflite .mlmodel .npz .pkl .pickle "
    ".distcp".split()
)
STAY_ENDINGS = (
    *WEIGHTS,
    *".index.json .lock .tmp .incomplete .zip .tar .gz .7z .parquet .png .jpg .jpeg .gif .mp4 .pdf".split(),
)
STAY_NAMES = tuple(
    "surgery-report.json surgery-journal.jsonl surgery-train.yaml surgery-own-text.jsonl trainer_state.json training_args.json"
    " latest zero_to_fp32.py adapter_config.json params.json checklist.chk consolidated.index.json".split()
)
STAY_BEGINNINGS = (".", "readme", "events.out.tfevents")
STAY_FOLDERS = tuple(
    ". checkpoint- round- global_step runs wandb logs original onnx openvino coreml __pycache__".split()
)
# The modules after the transformer in a sentence-transformers model, "2_Dense/model.safetensors", have weights of their own.
MODULE = re.compile(r"[0-9]+_[A-Z][^/]*/[^/]+\.(safetensors|bin)")
KNOWN = re.compile(
    r"((\w+_)?config|tokenizer\w*|special_tokens_map|added_tokens|vocab|chat_template)\.json|merges\.txt|vocab\.txt|\w+\.model"
    r"|chat_template\.jinja"
)


def travels(name: str) -> bool:
    """Whether a loader may need the file with this name, relative to the checkpoint with forward slashes."""
    path = PurePosixPath(name)
    base = path.name.lower()
    return (
        not any(folder.startswith(STAY_FOLDERS) for folder in path.parts[:-1])
        and base not in STAY_NAMES
        and not base.startswith(STAY_BEGINNINGS)
        and (not base.endswith(STAY_ENDINGS) or MODULE.fullmatch(name) is not None)
    )


def companions(folder: Path, *, only_known: bool = False) -> dict[str, Path]:
    """The files of a checkpoint to copy: name in the output, with its folder -> path. Links to files are followed.

    Args:
        only_known: only what is surely a loader's, since the folder may hold anything: it is that of a single file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    if only_known:
        found = {name: path for name, path in found.items() if KNOWN.fullmatch(name)}
    for path in found.values():
        if not path.exists():
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which does not exist. Restore or remove it."
            )
        if not path.is_file():
            raise CheckpointError(
                f"{path}: is no regular file but a pipe, a device or a socket, which surgery never reads. Remove it."
            )
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{path}: no permission to read it. Change its mode or run as its owner.")
    return found


def _walk(folder: Path, inside: str = "") -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not path.is_symlink() and not path.name.startswith(STAY_FOLDERS):
                yield from _walk(path, f"{inside}{path.name}/")
        elif travels(inside + path.name):
            yield path
