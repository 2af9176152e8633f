"""Where texts begin and turns end, by real tokenizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_lm import make_tokenizer
from tokenizers import processors

from surgery.data import limit
from surgery.data.encode import end_of_turn, prompt_ids, without_beginning
from surgery.errors import OptionError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml() -> Any:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_turn_ends_with_the_templates_token_and_not_with_eos() -> None:
    tokenizer = chatml()
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id


def test_a_template_without_such_a_token_has_none() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_a_beginning_that_the_tokenizer_adds_is_taken_off() -> None:
    tokenizer = make_tokenizer(bos=True)
    assert without_beginning(tokenizer, "<s>one") == "<s>one"  # it adds none
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert without_beginning(tokenizer, "<s>one") == "one"
    assert without_beginning(tokenizer, "one") == "one"
    assert tokenizer(without_beginning(tokenizer, "<s>one")).input_ids == tokenizer("one").input_ids


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "SECONDS", 0.5)
    tokenizer = chatml()
    tokenizer.chat_template = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(OptionError, match="may never end"):
        prompt_ids(tokenizer, [{"role": "user", "content": "a"}], Path("model"))
    assert end_of_turn(chatml()) is not None  # the alarm is off again


def test_a_regular_expression_that_explodes_is_stopped() -> None:
    with pytest.raises(limit.TooLong), limit.within(0.5):
        re.match(r"(a+)+$", "a" * 60 + "b")
