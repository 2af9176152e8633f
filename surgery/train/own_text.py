"""The start model's own text (`--replay self`): passages that it wrote, sampled once, and learnt beside the data.

    loss = task + λ · NLL of a batch of its own passages                  (arXiv 2505.13811, 2605.26097)

They are written as those of the measure of the same name are (`surgery.evaluation.measures.own_text`), by another seed, so that
what is measured was not trained on. The file lies beside the work while it goes on, and then in the result.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import torch

from surgery.checkpoint.source import Checkpoint
from surgery.evaluation.measures.own_text import written
from surgery.model.language_model import LanguageModel
from surgery.train.encode import IGNORED, Encoded

FILE = "surgery-own-text.jsonl"
# Seeds below are the measure's.
FIRST_SEED = 1000


def own_text(
    checkpoint: Checkpoint, folder: Path, *, passages: int, tokens: int, seed: int, keep: bool
) -> list[Encoded]:
    """Return the passages that the start model writes, or wrote when the run began.

    Args:
        folder: where they are kept.
        tokens: of a passage, at most.
        keep: write them there, where they are not.

    Raises:
        CheckpointError, OptionError: the model cannot write.
    """
    path = folder / FILE
    if path.is_file():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = LanguageModel(checkpoint.folder, checkpoint, device=device or torch.device("cpu"))
    pairs = written(model, passages, tokens, FIRST_SEED + 3 * seed, lambda *_: None)
    text = [str(model.tokenizer.decode(found)) for _, found in pairs]
    del model
    gc.collect()
    rows = [{"input_ids": [*given, *found], "labels": [IGNORED] * len(given) + found} for given, found in pairs]
    if keep:
        lines = [json.dumps({**row, "text": shown}) for row, shown in zip(rows, text, strict=True)]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return rows
