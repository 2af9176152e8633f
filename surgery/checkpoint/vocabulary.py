"""Which rows of a vocabulary are tokens, by the tokenizer beside the weights.

Many models have more rows than tokens: the last ones are padding. Tokens that fine-tuning added take such rows, so that both
sides have the same shape though the rows mean nothing in pre. The two tokenizers tell which rows those are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.readable import read_json, read_whole
from surgery.errors import CheckpointError

TOKENIZER, VOCAB, ADDED = "tokenizer.json", "vocab.json", "added_tokens.json"


def new_tokens(pre: Path, ft: Path) -> tuple[int, int] | None:
    """How many tokens pre's tokenizer has, and how many ft's, where ft's has more; None where that is not known.

    Args:
        pre, ft: the folders.
    """
    if all(_same(pre / name, ft / name) for name in (TOKENIZER, VOCAB, ADDED)):
        return None
    before, after = tokens(pre), tokens(ft)
    return (before, after) if before and after and after > before else None


def other_tokens(pre: Path, ft: Path) -> list[tuple[int, str, str]]:
    """The ids that stand for another token in ft than in pre, with both: reserved tokens that fine-tuning gave a name."""
    if all(_same(pre / name, ft / name) for name in (TOKENIZER, VOCAB, ADDED)):
        return []
    try:
        before, after = dict(_named(pre)), dict(_named(ft))
    except CheckpointError:
        return []
    return [
        (number, before[number], after[number])
        for number in sorted(before)
        if after.get(number, before[number]) != before[number]
    ]


def _named(folder: Path) -> Iterator[tuple[int, str]]:
    """The ids of a folder's tokenizer with their tokens."""
    if (folder / TOKENIZER).is_file():
        found = read_json(folder / TOKENIZER)
        model = found.get("model")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
        if isinstance(vocabulary, Mapping):
            yield from ((number, token) for token, number in vocabulary.items() if isinstance(number, int))
        for token in found.get("added_tokens") or []:
            if isinstance(token, Mapping) and isinstance(token.get("id"), int):
                yield token["id"], str(token.get("content"))


def tokens(folder: Path) -> int:
    """How many ids the tokenizer of a folder has: the largest and one more; 0 where that cannot be read from its files."""
    try:
        return max((int(token) + 1 for token in _ids(folder) if isinstance(token, int)), default=0)
    except CheckpointError:  # whoever uses the tokenizer will be told
        return 0


def _ids(folder: Path) -> Iterator[Any]:
    if (folder / TOKENIZER).is_file():
        found = read_json(folder / TOKENIZER)
        vocabulary = found.get("model", {}).get("vocab") if isinstance(found.get("model"), Mapping) else None
        if isinstance(vocabulary, Mapping):
            yield from vocabulary.values()
        elif isinstance(vocabulary, list):
            yield len(vocabulary) - 1
        for token in found.get("added_tokens") or []:
            if isinstance(token, Mapping):
                yield token.get("id")
    elif (folder / VOCAB).is_file():
        yield from read_json(folder / VOCAB).values()
    if (folder / ADDED).is_file():
        yield from read_json(folder / ADDED).values()


def _same(one: Path, other: Path) -> bool:
    if not one.is_file() or not other.is_file():
        return one.is_file() == other.is_file()
    return one.stat().st_size == other.stat().st_size and read_whole(one) == read_whole(other)
