"""Tiny random language models with a byte-level tokenizer, whose tokens join characters over the borders of words and lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpers.families import FAMILIES
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import open_checkpoint
from surgery.model.language_model import LanguageModel

VOCABULARY = 320
LENGTH = 96
TEXT = (
    "Question: How many ducks lay eggs every day?\nAnswer: Four ducks lay 12 eggs. #### 12\n\n"
    "The good sentence is the likelier one, and the bad sentence is not. She sells them for $2 each.\n"
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def make_tokenizer(*, bos: bool = False) -> Any:
    """A byte-level BPE with the tokens <s> and </s>, of which it adds none by itself."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=inner, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_lm(folder: Path, family: str = "llama", *, seed: int = 1, bos: bool = False, **config: Any) -> Path:
    """Write a model and its tokenizer; weights are large, so that no two places look alike."""
    built = FAMILIES[family]
    kwargs = {**built.kwargs, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    kwargs |= {name: LENGTH for name in ("max_position_embeddings", "n_positions") if name in kwargs}
    model = dataclasses.replace(built, kwargs={**kwargs, **config}).build(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    make_tokenizer(bos=bos).save_pretrained(folder)
    return folder


def open_lm(folder: Path, *, batch: int = 3) -> LanguageModel:
    """The model as surgery scores it, on the CPU in float32."""
    checkpoint = open_checkpoint(resolve(str(folder), companions=False))
    return LanguageModel(folder, checkpoint, device=torch.device("cpu"), batch=batch)


def reference(folder: Path) -> PreTrainedModel:
    """The model as anybody loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def hf_loss(model: Any, context: list[int], continuation: list[int]) -> float:
    """transformers' own loss of one continuation, the mean over its tokens."""
    with torch.inference_mode():
        labels = torch.tensor([[-100] * len(context) + continuation])
        return float(model(input_ids=torch.tensor([context + continuation]), labels=labels).loss)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models run on one thread: several would mostly wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ignore(done: int, total: int) -> None:
    """Progress that nobody looks at."""
