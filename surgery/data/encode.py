"""Texts -> token ids, as each measure wants them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.limit import SECONDS, TooLong, within
from surgery.data.rows import Row
from surgery.errors import CheckpointError, OptionError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
MARK = "what-somebody-says"


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokenise a text.

    Args:
        special: with the special tokens that the tokenizer adds of its own accord.
    """
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prefix(tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """The token before the first: the beginning of a text, or else the end of another, as lm-evaluation-harness has it.

    Raises:
        CheckpointError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise CheckpointError(
        f"{folder}: the tokenizer has neither bos_token nor eos_token to begin a text with. Name one in tokenizer_config.json."
    )


def parts(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, folder: Path
) -> tuple[list[int], list[int]]:
    """A context and its continuation, tokenised together, as lm-evaluation-harness does.

    Blanks at the end of the context go to the continuation, whose tokens include them.
    """
    bare = context.rstrip()
    if not bare:
        return [prefix(tokenizer, folder)], encode(tokenizer, context + continuation, special=False)
    whole, first = _open(tokenizer, context + continuation), _open(tokenizer, bare)
    return whole[: len(first)], whole[len(first) :]


def learnt(tokenizer: PreTrainedTokenizerBase, row: Row, folder: Path) -> tuple[list[int], list[int]]:
    """A row as TRL's SFTTrainer makes it: what is given, and the tokens that are learnt, the end of the text among them.

    Of a row without a prompt all tokens are learnt but the first, which nothing predicts.

    Raises:
        CheckpointError, OptionError: the tokenizer has no chat template, or it does not take the messages.
    """
    end = str(tokenizer.eos_token or "")
    if "text" in row:
        whole = encode(tokenizer, without_beginning(tokenizer, _ended(row["text"], end)))
        return whole[:1], whole[1:]
    first = prompt_ids(tokenizer, row["prompt"], folder, tools=row.get("tools"))
    if isinstance(row["prompt"], list):
        whole = _rendered(tokenizer, row["prompt"] + row["completion"], folder, prompt=False, tools=row.get("tools"))
    else:
        whole = encode(tokenizer, row["prompt"] + _ended(row["completion"], end))
    same = next(
        (at for at, (a, b) in enumerate(zip(first, whole, strict=False)) if a != b), min(len(first), len(whole))
    )
    split = max(same, 1)
    return whole[:split], whole[split:]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], folder: Path, *, tools: str | None = None
) -> list[int]:
    """A prompt, text or chat, up to where the answer begins.

    Args:
        tools: what a chat's assistant may call, as JSON.

    Raises:
        CheckpointError, OptionError: the tokenizer has no chat template, or it does not take the messages.
    """
    if isinstance(prompt, list):
        return _rendered(tokenizer, prompt, folder, prompt=True, tools=tools)
    return _open(tokenizer, prompt)


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **options: Any) -> Any:
    """Call the tokenizer's `apply_chat_template` within a limit of time: a template is a program of somebody else's.

    Raises:
        OptionError: it took too long.
        Exception: whatever the template raises.
    """
    try:
        with within():
            return tokenizer.apply_chat_template(list(messages), **options)
    except TooLong:
        raise OptionError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template took more than {SECONDS:g} seconds for one chat, "
            "so it may never end. Correct chat_template.jinja, or take it from the base model."
        ) from None


def rendered_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], folder: Path, *, tools: str | None = None
) -> list[int]:
    """A whole chat, as the template renders it.

    Raises:
        CheckpointError, OptionError: the tokenizer has no chat template, or it does not take the messages.
    """
    return _rendered(tokenizer, messages, folder, prompt=False, tools=tools)


def rendered_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], folder: Path, *, tools: str | None = None
) -> str:
    """A whole chat as text, as the template renders it.

    Raises:
        CheckpointError, OptionError: the tokenizer has no chat template, or it does not take the messages.
    """
    return str(_template(tokenizer, messages, folder, tools=tools, tokenize=False))


def without_beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the beginning-of-text token that it spells out, where the tokenizer adds one by itself."""
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not text.startswith(bos):
        return text
    added = encode(tokenizer, "a")[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if added else text


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer, if that is a special one; None where there is no template."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        text = str(apply_template(tokenizer, turns, tokenize=False))
    except Exception:  # a template that takes no such chat has no end to look for
        return None
    tail = encode(tokenizer, text.rpartition(MARK)[2], special=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return tail[0] if tail and tail[0] in special else None


def open_turn(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """A chat up to where the user's first message begins; None where no chat template renders such a chat."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = str(apply_template(tokenizer, [{"role": "user", "content": MARK}], tokenize=False))
    except Exception:  # a template that takes no such chat opens none
        return None
    opened = encode(tokenizer, text.partition(MARK)[0], special=False)
    return opened if MARK in text and opened else None


def _open(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on, without the end that some tokenizers put to every text."""
    tokens = encode(tokenizer, text)
    ended = len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return tokens[:-1] if ended else tokens


def _ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], folder: Path, *, prompt: bool, tools: str | None = None
) -> list[int]:
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompt}
    return list(_template(tokenizer, messages, folder, tools=tools, **options)["input_ids"])


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], folder: Path, *, tools: str | None, **options: Any
) -> Any:
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"{folder}: the data is chat messages, and the tokenizer has no chat template. Add chat_template.jinja, or give "
            "other data."
        )
    try:
        return apply_template(tokenizer, messages, tools=json.loads(tools) if tools else None, **options)
    except OptionError:
        raise
    except Exception as error:
        first = messages[0]["content"][:40]
        raise OptionError(
            f'The chat template cannot render the messages that begin with "{first}" ({reason(error)}). Correct or remove the '
            "record."
        ) from error
