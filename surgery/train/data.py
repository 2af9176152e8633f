"""Choose the rows of a round: hold some out for evaluation, and replay rows of earlier tasks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.data.encode import prompt_ids, rendered_ids, without_beginning
from surgery.data.rows import Row
from surgery.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 200  # chats whose rendering is compared


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


def replayed(rows: list[Row], old: list[Row], ratio: float, seed: int) -> list[Row]:
    """Append old rows, drawn at random, so that they make up the share `ratio` of the result.

    No old row comes twice before each has come once.
    """
    count, draw = round(ratio / (1 - ratio) * len(rows)), random.Random(seed)
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += draw.sample(old, min(len(old), count - len(drawn)))
    return rows + drawn


def begun_once(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[Row], str | None]:
    """Rows whose texts spell out no beginning-of-text token that the tokenizer adds by itself, and a sentence if some did."""
    changed, plain = 0, list[Row]()
    for row in rows:
        name = "text" if "text" in row else "prompt"
        text = row.get(name)
        bare = without_beginning(tokenizer, text) if isinstance(text, str) else text
        changed += bare != text
        plain.append({**row, name: bare})
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
    chats = [row for row in rows if isinstance(row.get("prompt"), list) and "completion" in row][:LOOKED_AT]
    parted, example = 0, ""
    for row in chats:
        asked = prompt_ids(tokenizer, row["prompt"], folder, tools=row.get("tools"))
        shown = rendered_ids(tokenizer, row["prompt"] + row["completion"], folder, tools=row.get("tools"))
        same = next(
            (at for at, (a, b) in enumerate(zip(asked, shown, strict=False)) if a != b), min(len(asked), len(shown))
        )
        if same < len(asked):
            parted += 1
            example = str(tokenizer.decode(asked[same:]))
    if not parted:
        return None
    return (
        f"Warning: in {parted:,} of {len(chats):,} chats that were looked at, the chat template ends the prompt with {example!r} "
        "when it asks for an answer, and not when it shows one: the model is trained without it, and will be asked with it."
    )
