"""Choose the rows of a round: hold some out for evaluation, and replay a part of what came before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.data.encode import prompt_ids, rendered_ids, without_beginning
from surgery.data.rows import Row
from surgery.errors import OptionError
from surgery.train.encode import answers, same

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 200  # answers whose rendering is compared


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows at random into those to train on and those to evaluate on; at least one of the latter if share is above 0.

    Raises:
        OptionError: none would be left to train on.
    """
    if not share:
        return rows, []
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise OptionError(f"`eval_split` {share} leaves none of {len(rows)} rows to train on. Give more data.")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in sorted(chosen)]


def replayed(memory: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Draw a share of what is remembered, at random and in its order; none comes twice."""
    chosen = random.Random(seed).sample(range(len(memory)), round(share * len(memory)))
    return [memory[place] for place in sorted(chosen)]


def begun_once(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[Row], str | None]:
    """Rows whose texts spell out no beginning-of-text token that the tokenizer adds by itself, and a sentence if some did."""
    changed, plain = 0, list[Row]()
    for row in rows:
        name = "text" if "text" in row else "prompt"
        text = row.get(name)
        bare = without_beginning(tokenizer, text) if isinstance(text, str) else text
        changed += bare != text
        plain.append({**row, name: bare} if bare != text else row)
    if not changed:
        return rows, None
    return plain, (
        f"{changed:,} rows begin with {tokenizer.bos_token}, which the tokenizer adds by itself: they are learnt with one."
    )


def parted_prompts(tokenizer: PreTrainedTokenizerBase, rows: list[Row], folder: Path) -> str | None:
    """A warning where the chat template begins an answer otherwise when it asks for one than when it shows one.

    A model asked so (with "<think>" at the end, say) then stands at a place that it never learnt.

    Raises:
        CheckpointError, OptionError: the template cannot render a row.
    """
    parts = (part for row in rows for part in (answers(row) if "messages" in row else [row]))
    chats = list(
        islice((row for row in parts if isinstance(row.get("prompt"), list) and "completion" in row), LOOKED_AT)
    )
    parted, example = 0, ""
    for row in chats:
        asked = prompt_ids(tokenizer, row["prompt"], folder, tools=row.get("tools"))
        shown = rendered_ids(tokenizer, row["prompt"] + row["completion"], folder, tools=row.get("tools"))
        begin = same(asked, shown)
        if begin < len(asked):
            parted += 1
            example = str(tokenizer.decode(asked[begin:]))
    if not parted:
        return None
    return (
        f"Warning: in {parted:,} of {len(chats):,} answers that were looked at, the chat template ends the prompt with "
        f"{example!r} when it asks for an answer, and not when it shows one: the model is trained without it, and will be asked "
        "with it."
    )
