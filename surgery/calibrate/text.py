"""Calibration text -> samples of tokens: windows cut out of running text, as in locuslab/wanda, with no padding.

Documents are tokenised one at a time, with the special tokens that the tokenizer adds to a text of its own accord, and joined
with its end-of-text token between them. Out of what was read `count` windows that do not overlap are cut at random places. Of a
large source only the beginning is read: four times as many tokens as are wanted.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.calibrate.model import read_config, reason
from surgery.errors import CheckpointError, HubError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
FIELDS = ("text", "messages")
READ_FACTOR = 4
PIECE = 1 << 16  # characters of a plain text that are tokenised at once
MAX_LINE = 1 << 26  # characters
MAX_JSON = 1 << 28  # bytes of a JSON file that is no JSON Lines
# Their positions begin after the padding's, so that many fewer tokens fit.
AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text")


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
    trust_remote_code: bool = False,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Cut samples out of calibration text.

    Args:
        calibration: a .txt, .jsonl, .json or .parquet file, or the id of a data set on the hub, `name` or `name:subset`.
        folder: where the tokenizer and config.json lie.
        count: samples; fewer where the text does not hold as many without overlap.
        length: tokens in each; at most what the model takes.
        seed: of the places; same seed, same samples, on any machine.
        text_field: the field of a record; otherwise "text", or "messages" through the tokenizer's chat template.
        trust_remote_code: allow a tokenizer that is code in the folder.

    Returns:
        int64 [n, length] with n ≤ count; and what they are, for a report and for `surgery.calibrate.cache`.

    Raises:
        OptionError: the text cannot be read, or is too short.
        CheckpointError: there is no tokenizer.
        HubError: the data set cannot be fetched.
    """
    if count < 1 or length < 2:
        raise OptionError("--samples must be at least 1 and --seq-len at least 2.")
    most = max_positions(read_config(folder))
    tokenizer = _tokenizer(folder, trust_remote_code)
    notes = []
    if most is not None and most < length:
        notes.append(f"The model takes {most:,} tokens at most: samples are as long.")
        length = most
    stream = _tokens(_pieces(calibration, text_field, tokenizer), tokenizer, READ_FACTOR * count * length)
    found = min(count, len(stream) // length)
    if not found:
        raise OptionError(
            f"{calibration}: holds {len(stream):,} tokens, fewer than one sample of {length:,}. Give more text or a smaller "
            "--seq-len."
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


def max_positions(config: Any) -> int | None:
    """How many tokens a model takes, by its configuration of transformers; None where nothing limits it."""
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))
    if not isinstance(most, int) or most < 1:
        return None
    return most - text.pad_token_id - 1 if text.model_type in AFTER_PADDING else most


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers finds no tokenizer that it can read ({reason(error)}). Copy tokenizer.json and "
            "tokenizer_config.json from the base model."
        ) from error
    tokenizer.model_max_length = 1 << 62  # else it warns of long documents
    return tokenizer


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
    path = Path(calibration).expanduser()
    ending = path.suffix.lower()
    if path.is_dir():
        raise OptionError(f"{path}: is a folder. Give --calibration a file, or the id of a data set on the hub.")
    if path.exists() and ending not in ENDINGS:
        raise OptionError(f"{path}: calibration text is read from {', '.join(ENDINGS)}. Rename or convert it.")
    if not path.exists() and ending in ENDINGS:
        raise OptionError(f"{path}: no such file. Check --calibration.")
    try:
        if ending == ".txt":
            yield from _plain(path)
            return
        if ending == ".parquet":
            records = _parquet(path, field)
        elif ending in ENDINGS:
            records = _json(path)
        else:
            records = _hub(calibration)
        for where, record in records:
            yield _piece(where, record, field, tokenizer)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check --calibration.") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None


def _plain(path: Path) -> Iterator[Piece]:
    with path.open(encoding="utf-8") as file:
        first = True
        while text := file.read(PIECE):
            yield Piece(text + file.readline(PIECE), first)  # up to the end of a line, if it is not far
            first = False


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        start = file.read(1)
        while start and start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from _json_list(path)
            return
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise OptionError(f"{path}: line {number} is longer than {MAX_LINE:,} characters. Split the document.")
            if line.strip():
                yield f"{path}, line {number}", _parse(line, f"{path}: line {number} is not JSON")


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    if path.stat().st_size > MAX_JSON:
        raise OptionError(
            f"{path}: is a JSON list of more than {MAX_JSON:,} bytes. Save it with one record a line (.jsonl)."
        )
    for number, record in enumerate(_parse(path.read_text(encoding="utf-8"), f"{path}: is not JSON")):
        yield f"{path}, record {number + 1}", record


def _parse(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{complaint} ({error}). Correct it, or save it with one record a line (.jsonl).") from None


def _parquet(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise OptionError(f"{path}: reading Parquet needs pyarrow: pip install 'model-surgery[wanda]'.") from None
    try:
        number = 0
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in ([field] if field else FIELDS) if name in names][:1]
            if not wanted:
                yield str(path), dict.fromkeys(names)
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except ArrowException as error:
        raise OptionError(f"{path}: cannot be read as Parquet ({reason(error)}). Check --calibration.") from error


def _hub(calibration: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise OptionError(
            f"{calibration}: is no file, and a data set from the hub needs datasets: pip install 'model-surgery[wanda]'."
        ) from None
    name, _, subset = calibration.partition(":")
    try:
        records = load_dataset(name, subset or None, split="train", streaming=True)
        for number, record in enumerate(records):
            yield f"{calibration}, record {number + 1}", record
    except Exception as error:
        raise HubError(
            f"{calibration}: is no file, and cannot be fetched as a data set from the hub ({reason(error)}). Check "
            "--calibration."
        ) from error


def _piece(where: str, record: Any, field: str | None, tokenizer: PreTrainedTokenizerBase) -> Piece:
    if isinstance(record, str) and field is None:
        return Piece(record)
    if not isinstance(record, dict):
        raise OptionError(f"{where}: is no record with fields. Give --calibration records with a field of text.")
    wanted = field or next((name for name in FIELDS if name in record), None)
    if wanted is None or wanted not in record:
        there = ", ".join(map(str, record)) or "none"
        raise OptionError(f"{where}: has no field {field or 'text or messages'}. Name one with --text-field: {there}.")
    value = record[wanted]
    if isinstance(value, str):
        return Piece(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return Piece(_render(where, value, tokenizer), rendered=True)
    raise OptionError(
        f"{where}: field {wanted} holds neither text nor chat messages. Name another one with --text-field."
    )


def _render(where: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise OptionError(
            f"{where}: holds chat messages, and the tokenizer has no chat template. Give text, or a model with a template."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        raise OptionError(
            f"{where}: the chat template cannot render these messages ({reason(error)}). Correct or remove the record."
        ) from error
