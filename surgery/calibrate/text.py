"""Calibration text -> samples of tokens: windows cut out of running text, as in locuslab/wanda, with no padding.

Documents are tokenised one at a time, with the special tokens that the tokenizer adds to a text of its own accord, and joined
with its end-of-text token between them. Out of what was read `count` windows that do not overlap are cut at random places. Of a
large source only the beginning is read: four times as many tokens as are wanted.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.data.encode import apply_template
from surgery.data.records import ENDINGS, local, records
from surgery.errors import OptionError, reason
from surgery.model.pretrained import load_tokenizer, max_positions
from surgery.model.skeleton import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = ".txt"
FIELDS = ("text", "messages")
READ_FACTOR = 4
PIECE = 1 << 16  # characters of a plain text that are tokenised at once


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text: a document, or what follows of one. `rendered` by a chat template, which has put the special tokens in."""

    text: str
    first: bool = True
    rendered: bool = False


def samples(
    calibration: str,
    folder: Path,
    *,
    count: int = 128,
    length: int = 2048,
    seed: int = 0,
    text_field: str | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Cut samples out of calibration text.

    Args:
        calibration: a .txt, .jsonl, .json or .parquet file, or the id of a data set on the hub, `name` or `name:subset`.
        folder: where the tokenizer and config.json lie.
        count: samples; fewer where the text does not hold as many without overlap.
        length: tokens in each; at most what the model takes.
        seed: of the places; same seed, same samples, on any machine.
        text_field: the field of a record; otherwise "text", or "messages" through the tokenizer's chat template.

    Returns:
        int64 [n, length] with n ≤ count; and what they are, for a report and for `surgery.calibrate.cache`.

    Raises:
        OptionError: the text cannot be read, or is too short.
        CheckpointError: there is no tokenizer.
        HubError: the data set cannot be fetched.
    """
    if count < 1 or length < 2:
        raise OptionError("`samples` must be at least 1 and `seq_len` at least 2.")
    most = max_positions(read_config(folder))
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = 1 << 62  # else it warns of long documents
    notes = []
    if most is not None and most < length:
        notes.append(f"The model takes {most:,} tokens at most: samples are as long.")
        length = most
    stream = _tokens(_pieces(calibration, text_field, tokenizer), tokenizer, READ_FACTOR * count * length)
    found = min(count, len(stream) // length)
    if not found:
        raise OptionError(
            f"{calibration}: holds {len(stream):,} tokens, fewer than one sample of {length:,}. Give more text or a smaller "
            "`seq_len`."
        )
    if found < count:
        notes.append(f"{calibration} holds {len(stream):,} tokens: {found} samples instead of {count}.")
    # A uniform choice among all ways to lay the windows out: the text that is left over falls into the gaps at random.
    draw = random.Random(seed)
    spare = len(stream) - found * length
    gaps = sorted(draw.randrange(spare + 1) for _ in range(found))
    rows = [stream[gap + index * length : gap + (index + 1) * length] for index, gap in enumerate(gaps)]
    tokens = torch.tensor([list(row) for row in rows], dtype=torch.int64)
    description = {
        "calibration": calibration,
        "text_field": text_field,
        "samples": found,
        "length": length,
        "seed": seed,
        "tokens_read": len(stream),
        "tokens_sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        "notes": notes,
    }
    return tokens, description


def _tokens(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, enough: int) -> array[int]:
    stream = array("q")
    end = tokenizer.eos_token_id
    for piece in pieces:
        # A tokenizer may put the end of the text there itself.
        if piece.first and stream and isinstance(end, int) and stream[-1] != end:
            stream.append(end)
        special = piece.first and not piece.rendered
        stream.extend(tokenizer(piece.text, add_special_tokens=special)["input_ids"])
        if len(stream) >= enough:
            break
    return stream


def _pieces(calibration: str, field: str | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    path = local(calibration, (PLAIN, *ENDINGS))
    if path is not None and path.suffix.lower() == PLAIN:
        yield from _plain(path)
        return
    for where, record in records(calibration, fields=(field,) if field else FIELDS, streaming=True):
        yield _piece(where, record, field, tokenizer)


def _plain(path: Path) -> Iterator[Piece]:
    first = True
    try:
        with path.open(encoding="utf-8") as file:
            while text := file.read(PIECE):
                yield Piece(text + file.readline(PIECE), first)  # up to the end of a line, if it is not far
                first = False
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None


def _piece(where: str, record: Any, field: str | None, tokenizer: PreTrainedTokenizerBase) -> Piece:
    if isinstance(record, str) and field is None:
        return Piece(record)
    if not isinstance(record, dict):
        raise OptionError(f"{where}: is no record with fields. Give `calibration` records with a field of text.")
    wanted = field or next((name for name in FIELDS if name in record), None)
    if wanted is None or wanted not in record:
        there = ", ".join(map(str, record)) or "none"
        raise OptionError(f"{where}: has no field {field or 'text or messages'}. Name one with `text_field`: {there}.")
    value = record[wanted]
    if isinstance(value, str):
        return Piece(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return Piece(_render(where, value, tokenizer), rendered=True)
    raise OptionError(
        f"{where}: field {wanted} holds neither text nor chat messages. Name another one with `text_field`."
    )


def _render(where: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise OptionError(
            f"{where}: holds chat messages, and the tokenizer has no chat template. Give text, or a model with a template."
        )
    try:
        return str(apply_template(tokenizer, messages, tokenize=False))
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(
            f"{where}: the chat template cannot render these messages ({reason(error)}). Correct or remove the record."
        ) from error
