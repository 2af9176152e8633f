"""The demo's vocabulary: one token per word, so that nothing has to be downloaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from surgery.demo.skills import DIGITS, EQUALS, LETTERS, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<pad>"
END = "</s>"
UNKNOWN = "<unk>"
VOCABULARY = (PAD, END, UNKNOWN, EQUALS, "copy", "reverse", "sort", "add", "recall", *DIGITS, *LETTERS)
TOKEN_ID = {word: index for index, word in enumerate(VOCABULARY)}
IGNORED = -100


def encode(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Items as next-token prediction: (inputs, labels), both int64 [items, longest line − 1]; a line ends with `END`.

    The label at a position is the token that follows it where that token belongs to the answer or is its end, and
    `IGNORED` elsewhere: prompts are not trained on. Lines are padded on the right, so under causal attention no position that
    counts can see the padding, and no attention mask is needed.
    """
    width = max(len(item.prompt) + len(item.answer) for item in items)
    inputs: list[list[int]] = []
    labels: list[list[int]] = []
    for item in items:
        line = [TOKEN_ID[word] for word in (*item.prompt, *item.answer, END)]
        padding = width + 1 - len(line)
        inputs.append(line[:-1] + [TOKEN_ID[PAD]] * padding)
        labels.append([IGNORED] * (len(item.prompt) - 1) + line[len(item.prompt) :] + [IGNORED] * padding)
    return torch.tensor(inputs), torch.tensor(labels)


def tokenizer() -> "PreTrainedTokenizerFast":
    """A word-level tokenizer of the vocabulary, so that the checkpoints load like any other."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast  # its constructor is untyped
    fast: PreTrainedTokenizerFast = make(tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
    return fast
