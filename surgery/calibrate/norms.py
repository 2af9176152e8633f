"""‖X_k‖₂ of every input feature k of every weight matrix, gathered while a model runs.

A `Recorder` watches the matrix products (Sun et al. 2023, arXiv 2306.11695, §2). Where one operand is a weight, or a view of one,
the squares of the other are added up over all tokens, in float64. Which dimension is contracted tells how the weight is stored:
[out, in] as torch.nn.Linear does, or [in, out] as GPT-2's Conv1D and gpt-oss's experts. Where the view begins tells the expert.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from surgery.errors import CheckpointError
from surgery.methods.wanda import Norm

# Rows of an input that are squared at a time.
ROWS = 4096


class Room:
    """Where the sums of all weights lie, side by side.

    They outlive the blocks. One by one they would lie between the weights and the activations, and hold their memory in pieces
    that nothing else fits in.
    """

    def __init__(self, weights: Iterable[torch.Tensor], device: torch.device) -> None:
        size = sum(math.prod(w.shape[:-2]) * max(w.shape[-2:]) for w in weights if w.ndim in (2, 3))
        self.space, self.used = torch.zeros(size, dtype=torch.float64, device=device), 0

    def zeros(self, count: int) -> torch.Tensor:
        """float64 [count]."""
        if self.used + count > len(self.space):  # a weight with several inputs
            return torch.zeros(count, dtype=torch.float64, device=self.space.device)
        self.used += count
        return self.space[self.used - count : self.used]


@dataclass
class Sums:
    """The sums for one weight so far.

    Attributes:
        shape: the weight's.
        squares, tokens: by (expert, first output row, transposed): float64 [k] on the model's device, and token vectors.
    """

    shape: tuple[int, ...]
    room: Room
    squares: dict[tuple[int, int, bool], torch.Tensor] = field(default_factory=dict)
    tokens: dict[tuple[int, int, bool], int] = field(default_factory=dict)

    def add(self, expert: int, first: int, transposed: bool, rows: torch.Tensor, *, skip_zeros: bool = False) -> None:
        """Add token vectors, [tokens, k]."""
        key = (expert, first, transposed)
        if key not in self.squares:
            self.squares[key] = self.room.zeros(rows.shape[1])
            self.tokens[key] = 0
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            self.squares[key] += some.float().square().sum(0, dtype=torch.float64)
            self.tokens[key] += int(some.any(1).sum()) if skip_zeros else len(some)

    def check(self, name: str) -> None:
        """Refuse NaN and infinity.

        Raises:
            CheckpointError: some input was not finite.
        """
        if not all(bool(total.isfinite().all()) for total in self.squares.values()):
            raise CheckpointError(
                f"{name}: its input holds NaN or infinity when the model runs on the calibration text, so it cannot be scored. "
                "Check the fine-tuned weights, or run in a wider type."
            )

    def norm(self) -> Norm | None:
        """The norms; None where parts of the weight have different inputs, or no product was seen."""
        ways = {transposed for _, _, transposed in self.squares}
        if len(ways) != 1:
            return None
        transposed = ways.pop()
        experts, k = math.prod(self.shape[:-2]), self.shape[-2 if transposed else -1]
        values, tokens = np.zeros((experts, k), np.float32), np.zeros(experts, np.int64)
        seen: dict[int, torch.Tensor] = {}
        for (expert, first, way), total in self.squares.items():
            if expert in seen and not torch.equal(seen[expert], total):
                return None
            seen[expert] = total
            values[expert] = total.sqrt().float().cpu().numpy()
            tokens[expert] = self.tokens[expert, first, way]
        return Norm(values, transposed, tokens) if len(self.shape) > 2 else Norm(values[0], transposed, int(tokens[0]))


class Recorder(TorchFunctionMode):
    """While it is entered, adds up the inputs of the weights that are `watch`ed.

    Args:
        absent: what stands for weights that are not loaded, by name; to compute with one is an error.
        device: where the model runs.

    Attributes:
        sums: by the names given to `watch`.
    """

    def __init__(self, absent: Mapping[str, torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self.room = Room(absent.values(), device)
        self.absent = {tensor.untyped_storage().data_ptr(): name for name, tensor in absent.items()}
        self.sums: dict[str, Sums] = {}
        self.squares: list[weakref.ref[torch.Tensor]] = []
        # By the address of their storage; with the tensor itself, so that no other one takes the address.
        self.watched: dict[int, tuple[str, torch.Tensor]] = {}

    def watch(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Look for these from now on, and only for these; none stops.

        Raises:
            CheckpointError: the inputs of those that were watched so far were not finite.
        """
        for name, _ in self.watched.values():
            if name in self.sums:
                self.sums[name].check(name)
        self.watched = {
            weight.untyped_storage().data_ptr(): (name, weight)
            for name, weight in weights.items()
            if weight.ndim in (2, 3) and weight.is_contiguous() and weight.is_floating_point() and weight.numel()
        }

    def head(self, name: str, shape: tuple[int, ...], inputs: torch.Tensor) -> None:
        """Record the input of an output head, [..., k], whose product is not taken."""
        self._sums(name, shape).add(0, 0, False, inputs.reshape(-1, inputs.shape[-1]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            left, right, contracted = _PRODUCTS[func](args, kwargs)
            self._product(left, right, contracted)
        result = func(*args, **kwargs)
        if func in _CASTS:
            self._follow(args[0], result)
        if isinstance(result, torch.Tensor) and func.__name__ != "__get__":
            self._refuse_absent(args)
            if result.ndim == 4 and result.shape[-1] == result.shape[-2] > 1:
                self.squares.append(weakref.ref(result))
        return result

    def take_squares(self) -> list[torch.Tensor]:
        """The tensors [.., .., T, T] that were made since the last call and are still held: masks, position biases."""
        squares, self.squares = self.squares, []
        return [tensor for square in squares if (tensor := square()) is not None]

    def _refuse_absent(self, args: Any) -> None:
        for arg in args:
            if isinstance(arg, torch.Tensor) and (name := self.absent.get(arg.untyped_storage().data_ptr())):
                raise CheckpointError(
                    f"{name}: the model uses it outside the module that it belongs to, so it cannot be run layer by layer. "
                    "Use a method that needs no calibration."
                )

    def _product(self, left: Any, right: Any, contracted: int) -> None:
        found = self._find(right)
        if found is not None:
            self._add(*found, right, contracted, left)
        elif (found := self._find(left)) is not None and getattr(right, "ndim", 0) >= 2:
            self._add(*found, left, -1, right.transpose(-1, -2))

    def _find(self, tensor: Any) -> tuple[str, torch.Tensor] | None:
        if not self.watched or not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
            return None
        return self.watched.get(tensor.untyped_storage().data_ptr())

    def _follow(self, source: Any, result: Any) -> None:
        """A cast copy of a whole weight stands for it."""
        found = self._find(source)
        if found and result.shape == source.shape == found[1].shape and result.is_contiguous():
            self.watched[result.untyped_storage().data_ptr()] = (found[0], result)

    def _add(self, name: str, weight: torch.Tensor, view: torch.Tensor, contracted: int, inputs: torch.Tensor) -> None:
        a, b = weight.shape[-2:]
        size, step, offset = view.shape[contracted], view.stride(contracted), view.storage_offset()
        if step == 1 and size == b:
            transposed, first = False, offset % (a * b) // b
        elif step == b and size == a:
            transposed, first = True, offset % b
        else:  # a part of the input features: no norm
            return
        sums = self._sums(name, tuple(weight.shape))
        if view.ndim == 2:
            sums.add(offset // (a * b), first, transposed, inputs.reshape(-1, size))
        elif weight.ndim == 3 and inputs.ndim == 3 and len(view) == len(weight) == len(inputs):
            # One product for all experts (Llama 4): what was not routed to one is 0.
            for expert, rows in enumerate(inputs):
                sums.add(expert, first, transposed, rows, skip_zeros=True)

    def _sums(self, name: str, shape: tuple[int, ...]) -> Sums:
        return self.sums.setdefault(name, Sums(shape, self.room))


def _operands(at: int, left: str, right: str, contracted: int) -> Callable[[Any, Any], tuple[Any, Any, int]]:
    """How a function names the two factors: positions from `at` on, or keywords."""

    def read(args: Any, kwargs: Any) -> tuple[Any, Any, int]:
        one = args[at] if len(args) > at else kwargs.get(left)
        two = args[at + 1] if len(args) > at + 1 else kwargs.get(right)
        return one, two, contracted

    return read


_MATMUL, _MM = _operands(0, "input", "other", -2), _operands(0, "input", "mat2", -2)
_PRODUCTS: dict[Any, Callable[[Any, Any], tuple[Any, Any, int]]] = {
    torch.nn.functional.linear: _operands(0, "input", "weight", -1),
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
    torch.mm: _MM,
    torch.Tensor.mm: _MM,
    torch.bmm: _MM,
    torch.Tensor.bmm: _MM,
    torch.addmm: _operands(1, "mat1", "mat2", -2),
    torch.baddbmm: _operands(1, "batch1", "batch2", -2),
}
_CASTS = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type, torch.Tensor.double}
