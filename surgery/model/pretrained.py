"""Read what lies beside the weights in a folder: the tokenizer, and the limits that the configuration states.

Code that comes with a model is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Their positions begin after the padding's, so that many fewer tokens fit.
AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers finds no tokenizer that it can read ({reason(error)}). Copy tokenizer.json and "
            "tokenizer_config.json from the base model."
        ) from error
    return tokenizer


def max_positions(config: Any) -> int | None:
    """How many tokens a model takes, by its configuration of transformers; None where nothing limits it."""
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))
    if not isinstance(most, int) or most < 1:
        return None
    return most - text.pad_token_id - 1 if text.model_type in AFTER_PADDING else most
