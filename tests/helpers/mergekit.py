"""mergekit, another program that edits task vectors, run in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import Tensors, read_checkpoint, write_checkpoint

PYTHON = os.environ.get("MERGEKIT_PYTHON")
# 20 wide: what `tiny_llama(width=20)` has.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 20,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "vocab_size": 80,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
needs_mergekit = pytest.mark.skipif(
    PYTHON is None, reason="set MERGEKIT_PYTHON=/path/to/venv/bin/python, one that has mergekit 0.1.5"
)


def mergekit(
    folder: Path,
    pre: Tensors,
    fts: list[Tensors],
    method: str,
    dtype: str = "float32",
    *,
    weights: Any,
    recipe: Any = None,
) -> Tensors:
    """Write the models to `folder/pre`, `ft0`, `ft1`, …, merge them to `folder/theirs` and read the result.

    Args:
        method, dtype: of the recipe.
        weights: parameters of each fine-tuned model.
        recipe: further parameters of the merge.
    """
    names = ["pre", *(f"ft{number}" for number in range(len(fts)))]
    for name, tensors in zip(names, (pre, *fts), strict=True):
        write_checkpoint(folder / name, tensors, config=CONFIG)
    document = {
        "merge_method": method,
        "base_model": str(folder / "pre"),
        "dtype": dtype,
        "parameters": recipe or {},
        "models": [{"model": str(folder / name), "parameters": weights} for name in names[1:]],
    }
    (folder / "recipe.yml").write_text(json.dumps(document))
    command = [str(PYTHON), "-m", "mergekit.scripts.run_yaml", "recipe.yml", "theirs", "--no-copy-tokenizer"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
    return read_checkpoint(folder / "theirs")
