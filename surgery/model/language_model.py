"""A language model that is scored: built once, filled with the weights of one checkpoint after another.

The weights come from a `Checkpoint`, whatever it lies in: a folder of any format, an adapter on its base, or an edit that is
carried out while it is read. Code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.checkpoint.checksum import weights_fingerprint
from surgery.checkpoint.source import Checkpoint
from surgery.errors import CheckpointError, OptionError, SurgeryError, out_of_memory, reason
from surgery.model.pretrained import load_tokenizer, max_positions
from surgery.model.skeleton import fill_tables, skeleton
from surgery.model.weights import Weights, main_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# (items done, items in all)
Advance = Callable[[int, int], None]

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computing_dtype(asked: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The type to compute in: "auto" is the checkpoint's own where the device has matrix units for it, else float32.

    A GPU has them for every type, a processor for bfloat16 at most (Intel's AMX). Without them bfloat16 is slower than float32.

    Raises:
        OptionError: no such type is known.
        CheckpointError: the checkpoint holds no floating-point tensor.
    """
    if asked != "auto":
        return named_dtype(asked)
    own = main_dtype(checkpoint.tensors.values())
    if device.type == "cpu":
        return own if own == torch.bfloat16 and bfloat16_units() else torch.float32
    return own


def named_dtype(name: str) -> torch.dtype:
    """The type that `dtype` names.

    Raises:
        OptionError: no such type is known.
    """
    if name not in DTYPES:
        raise OptionError(f"`dtype` is auto, {', '.join(DTYPES)}, not {name}.")
    return DTYPES[name]


def bfloat16_units() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


class LanguageModel:
    """A model and its tokenizer.

    Attributes:
        model: in eval mode; ask it under `torch.inference_mode()`.
        tokenizer: the checkpoint's.
        length: tokens that the model takes at most; None where nothing limits them.
        batch: sequences in one forward pass.
        device: where the model is.
        fingerprint: of the weights that it holds.

    Args:
        folder: where config.json and the tokenizer lie.
        checkpoint: the first weights.
        device: to run on.
        dtype: to compute in.
        batch: sequences in one forward pass.

    Raises:
        CheckpointError: the model cannot be built from these files, or writes no text.
        OptionError: it does not take text, or an option is wrong.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        *,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        batch: int = 8,
    ) -> None:
        if batch < 1:
            raise OptionError(f"`batch_size` must be 1 or more, not {batch}.")
        self.folder, self.batch, self.device, self.dtype = folder, batch, device, dtype
        self.model: PreTrainedModel = skeleton(folder, self.dtype)
        if not self.model.can_generate() or self.model.config.is_encoder_decoder:
            raise CheckpointError(
                f"{folder}: {type(self.model).__name__} is no causal language model, so it cannot be scored. Give another one."
            )
        for part in (self.model.config, self.model.config.get_text_config(decoder=True)):
            part.use_cache = True
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.length = max_positions(self.model.config)
        self._weights: Weights | None = None
        self.load(checkpoint)

    @classmethod
    @contextmanager
    def lent(cls, network: PreTrainedModel, folder: Path, *, batch: int = 8) -> Iterator[LanguageModel]:
        """A model that is in memory for another purpose, such as its training; inside it is in eval mode, with a cache of keys.

        Args:
            folder: where its configuration and tokenizer lie.
        """
        self = cls.__new__(cls)
        parameter = next(iter(network.parameters()))
        self.model, self.folder, self.batch = network, folder, batch
        self.device, self.dtype = parameter.device, parameter.dtype
        self.tokenizer, self.length = load_tokenizer(folder), max_positions(network.config)
        self._weights, self.fingerprint = None, ""
        parts = (network.config, network.config.get_text_config(decoder=True))
        before, training = [getattr(part, "use_cache", None) for part in parts], network.training
        try:
            network.train(False)
            for part in parts:
                part.use_cache = True
            yield self
        finally:
            network.train(training)
            for part, kept in zip(parts, before, strict=True):
                part.use_cache = kept

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint with the same configuration; those before are let go of first.

        Raises:
            CheckpointError: it lacks a parameter, or one has another shape.
        """
        before, checksums = self._weights, dict[str, str]()
        self.fingerprint = ""  # of no weights, should the loading fail
        if before is not None:
            before.free(before.absent)
        self._weights = Weights(self.model, checkpoint, self.dtype, self.device, checksums)
        stored = set(self._weights.absent)
        if before is None:
            fill_tables(self.model, stored, self.device, self.folder)
        elif lacking := sorted(before.absent.keys() - stored):
            raise CheckpointError(
                f"{checkpoint.folder}: lacks {lacking[0]}, which the checkpoint before it has. Score it in a run of its own."
            )
        self._weights.load(stored)
        self.fingerprint = weights_fingerprint(checkpoint, checksums)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model may be asked; what it cannot do becomes an error of ours.

        Raises:
            OptionError: memory runs out.
            CheckpointError: transformers cannot run the model.
        """
        try:
            with torch.inference_mode():
                yield
        except SurgeryError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise OptionError("Scoring does not fit into memory. Give a smaller `batch_size`.") from error
            raise CheckpointError(
                f"{self.folder}: transformers cannot run {type(self.model).__name__} on this text ({reason(error)}). Check that "
                "the tokenizer and config.json belong to the weights."
            ) from error
