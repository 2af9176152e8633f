"""Run a model on many samples with one block of its weights in memory at a time.

Every batch of samples is a forward pass of its own, as its architecture wrote it, in a greenlet: a function that can stop in the
middle. A pass stops where it enters a block (a layer, an embedding, a norm), until all the others stand there too. Then the
block's weights are read, each pass goes through it, and the weights are let go. So every weight is read once (a tied one once in
each place), no pass has to be told what a layer's arguments are, and memory holds one block and the passes' activations, whatever
the number of layers. A pass ends at the head, whose input is all that is wanted: no logits are made.

accelerate's offload hooks would read the whole model once per batch, or hold all samples in every intermediate result. Threads
would do as greenlets do, but each would get a pool of OpenMP workers and an arena of malloc of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.calibrate.norms import Recorder
from surgery.checkpoint.pair import refuse_quantized
from surgery.checkpoint.source import Checkpoint
from surgery.checkpoint.tied import same_bytes
from surgery.errors import CheckpointError, OptionError, SurgeryError, out_of_memory, reason
from surgery.methods.wanda import Norm
from surgery.model.skeleton import call_arguments, fill_tables, skeleton
from surgery.model.weights import Weights, main_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tensors that passes may have in common: masks of several windows, a bias for the encoder and one for the decoder.
KINDS = 8
CPU = torch.device("cpu")
# (blocks done, blocks in all)
Advance = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A module that is loaded as a whole, and the parameters and buffers in it, by their names in the model."""

    name: str
    module: torch.nn.Module
    weights: tuple[str, ...]


class Shared:
    """Lets all passes use one copy of what depends on the length of the samples alone: masks, and T5's position biases.

    They have as many entries as tokens squared, so that one for each pass would take more than the activations.
    """

    def __init__(self) -> None:
        self.known: list[torch.Tensor] = []

    def share(self, tensor: torch.Tensor) -> None:
        """Point a tensor to a known equal one, or make it known."""
        for other in self.known:
            if other.data_ptr() == tensor.data_ptr():
                return
            if (other.shape, other.dtype) == (tensor.shape, tensor.dtype) and torch.equal(other, tensor):
                tensor.set_(other)  # type: ignore[call-overload]
                return
        # Anything else, such as attention weights that a model returns, differs from sample to sample.
        if len(self.known) < KINDS:
            self.known.append(tensor)


class _Finished(Exception):
    """A pass has come to the head: logits are not needed."""


def measure(
    checkpoint: Checkpoint,
    folder: Path,
    tokens: torch.Tensor,
    *,
    device: torch.device = CPU,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    advance: Advance | None = None,
    checksums: dict[str, str] | None = None,
) -> dict[str, Norm]:
    """The norm of every input feature of every weight matrix, over all tokens.

    A head that is tied to the embedding counts for both. Without a norm are weights that no token reaches (a vision tower), those
    that are no factor of a matrix product (embeddings, convolutions), and those whose parts have different inputs.

    Args:
        checkpoint: the weights, in any format.
        folder: where config.json lies.
        tokens: int64 [samples, length].
        batch: samples in one forward pass.
        dtype: to compute in; the checkpoint's by default.
        advance: called after every block.
        checksums: takes the checksum of every tensor that was read; see `surgery.checkpoint.fingerprint`.

    Returns:
        By the names of the tensors in the checkpoint.

    Raises:
        CheckpointError: the model cannot be built or run from these files, or its activations are not finite.
        OptionError: it does not take text, or not these tokens, or memory runs out.
    """
    for tensor in checkpoint.tensors.values():
        refuse_quantized(tensor)
    dtype = dtype or main_dtype(checkpoint.tensors.values())
    model = skeleton(folder, dtype)
    weights = Weights(model, checkpoint, dtype, device, {} if checksums is None else checksums)
    stored = set(weights.absent)
    fill_tables(model, stored, device, folder)
    weights.free(stored)
    _check_tokens(model, tokens, folder)
    recorder = Recorder(weights.absent, device)
    blocks, resident = cut(model, stored)
    weights.load(resident)
    try:
        with torch.inference_mode(), recorder:
            batches = torch.split(tokens.to(device), batch)
            _run(model, blocks, weights, recorder, batches, advance or (lambda done, total: None))
    except SurgeryError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OptionError(
                "The calibration does not fit into memory. Give fewer `samples`, a shorter `seq_len`, or `device` cpu."
            ) from error
        raise CheckpointError(
            f"{folder}: transformers cannot run {type(model).__name__} on text ({reason(error)}). Use a method that needs no "
            "calibration."
        ) from error
    norms = {name: norm for name, sums in recorder.sums.items() if (norm := sums.norm()) is not None}
    named = weights.names_of(norms)
    return named | _tied_embedding(weights, norms)


def _head(model: PreTrainedModel) -> tuple[str, torch.nn.Module | None]:
    """The matrix that makes logits, and its name."""
    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next(((name, module) for name, module in model.named_modules() if module is head), ("", None))


def cut(model: PreTrainedModel, stored: set[str]) -> tuple[list[Block], list[str]]:
    """Cut a model into blocks: the entries of its lists of layers, and outside them each module that owns weights but the head.

    Args:
        stored: the parameters and buffers that come from the checkpoint.

    Returns:
        The blocks, and the weights of modules that contain blocks; these stay in memory, and are small.
    """
    blocks: list[Block] = []
    resident: list[str] = []
    head = _head(model)[1]
    seen = {id(head)}

    def visit(module: torch.nn.Module, name: str, listed: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        inside = tuple(full for full in _weights(module, name, True) if full in stored)
        own = [full for full in _weights(module, name, False) if full in stored]
        container = isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
        if inside and not container and (listed or (own and not _has_layers(module))):
            blocks.append(Block(name, module, inside))
            return
        resident.extend(own)
        for key, child in module.named_children():
            visit(child, f"{name}.{key}" if name else key, isinstance(module, torch.nn.ModuleList))

    visit(model, "", False)
    return blocks, resident


def _weights(module: torch.nn.Module, name: str, recurse: bool) -> Iterator[str]:
    prefix = f"{name}." if name else ""
    for inner, _ in module.named_parameters(recurse=recurse, remove_duplicate=False):
        yield prefix + inner
    for inner, _ in module.named_buffers(recurse=recurse, remove_duplicate=False):
        yield prefix + inner


def _has_layers(module: torch.nn.Module) -> bool:
    return any(isinstance(child, torch.nn.ModuleList) and len(child) for child in module.modules())


def _run(
    model: PreTrainedModel,
    blocks: list[Block],
    weights: Weights,
    recorder: Recorder,
    batches: tuple[torch.Tensor, ...],
    advance: Advance,
) -> None:
    try:
        from greenlet import getcurrent, greenlet
    except ImportError:
        raise OptionError("Calibration needs greenlet: pip install 'model-surgery[wanda]'.") from None
    scheduler = getcurrent()
    name, head = _head(model)
    originals = [(block.module, block.module.forward) for block in blocks]
    shared = Shared()

    def pass_through(batch: torch.Tensor) -> None:
        with contextlib.suppress(_Finished):
            model(**call_arguments(model, batch))

    def enter(block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for tensor in recorder.take_squares():
            shared.share(tensor)
        scheduler.switch(block)  # comes back when the block is loaded
        return forward(*args, **kwargs)

    def finish(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder.head(f"{name}.weight", tuple(weights.meta[f"{name}.weight"].shape), inputs)
        raise _Finished

    if head is not None:
        head.forward = finish
    for block, (module, forward) in zip(blocks, originals, strict=True):
        # A module's forward, as accelerate's hooks do: some code asks for its signature.
        module.forward = functools.wraps(forward)(functools.partial(enter, block, forward))
    try:
        waiting = []
        for batch in batches:
            started = greenlet(pass_through)
            block = started.switch(batch)
            if not started.dead:
                waiting.append((started, block))
        done = 0
        while waiting:
            block = waiting[0][1]
            recorder.watch(weights.load(block.weights))
            still = []
            for started, at in waiting:
                following = started.switch() if at is block else at
                if not started.dead:
                    still.append((started, following))
            waiting = still
            recorder.watch({})
            weights.free(block.weights)
            done += 1
            advance(min(done, len(blocks)), len(blocks))
    finally:
        for module, forward in originals:
            module.forward = forward


def _check_tokens(model: PreTrainedModel, tokens: torch.Tensor, folder: Path) -> None:
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and tokens.numel() and int(tokens.max()) >= rows:
        raise OptionError(
            f"{folder}: the tokenizer gives token {int(tokens.max())}, and the model has only {rows:,}. Give the tokenizer that "
            "belongs to the model."
        )


def _tied_embedding(weights: Weights, norms: dict[str, Norm]) -> dict[str, Norm]:
    """A head's norms, for the embedding that shares its numbers and is stored beside it."""
    found = {}
    for target, source in weights.model.all_tied_weights_keys.items():
        for one, other in ((target, source), (source, target)):
            origin = weights.origins.get(other)
            if one in norms and other not in norms and origin and origin.transform is None:
                names = [each.sources[0][1] for each in (weights.origins.get(one), origin) if each]
                if same_bytes(
                    *(weights.checkpoint.tensors[name] for name in (names[0], names[-1]))
                ):  # training may part them
                    found[names[-1]] = norms[one]
    return found
