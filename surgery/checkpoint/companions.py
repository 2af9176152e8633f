"""The files beside the weights that a loader needs: they travel from ft to the output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from surgery.checkpoint.source import Checkpoint
from surgery.errors import CheckpointError

# Weights in any format, optimizer and trainer state, and what surgery writes itself.
LEFT_OUT_ENDINGS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".gguf",
        ".ot",
        ".distcp",
        ".npz",
        ".pkl",
    ),
    *(".safetensors.index.json", ".bin.index.json", ".lock", ".tmp", ".incomplete"),
)
LEFT_OUT_NAMES = (
    "README.md",
    "surgery-report.json",
    "surgery-journal.jsonl",
    "trainer_state.json",
    "training_args.json",
    "latest",
    "zero_to_fp32.py",
)
LEFT_OUT_FOLDERS = (
    "checkpoint-",
    "global_step",
    "runs",
    "wandb",
    "logs",
    "original",
    "onnx",
    "openvino",
    "coreml",
    "__pycache__",
)


def companions(ft: Checkpoint) -> dict[str, Path]:
    """Files to copy: name in the output, with its folder -> path. Links are followed; hidden files stay behind.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return {path.relative_to(ft.folder).as_posix(): path for path in _walk(ft.folder)}


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith(LEFT_OUT_FOLDERS):
                yield from _walk(path)
        elif path.name in LEFT_OUT_NAMES or path.name.endswith(LEFT_OUT_ENDINGS):
            continue
        elif path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which does not exist. Restore or remove it."
            )
        elif path.is_file():
            if not os.access(path, os.R_OK):
                raise CheckpointError(f"{path}: no permission to read it. Change its mode or run as its owner.")
            yield path
