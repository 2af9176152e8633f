"""A parameter's blocks, cut out of what a step needs of it: copies where a block's rows lie apart, views where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from surgery.optim.blocks import Blocks, Runs
from surgery.optim.piece import Piece


@dataclass(frozen=True)
class Part:
    """One block, or this process's part of it.

    Attributes:
        tensors: of the parameter, the gradient and the state, each of the block's shape.
        piece: where this process's part lies in the block; None: it is all of it.
        whole: the tensors that `tensors` were cut from, or are.
        dim, rows: the block's rows of those, along a dimension; None: all, or neighbours, so that `tensors` are views.
    """

    tensors: Mapping[str, torch.Tensor]
    piece: Piece | None
    whole: Mapping[str, torch.Tensor]
    dim: int = 0
    rows: torch.Tensor | None = None

    def write_back(self, flat: Mapping[str, torch.Tensor]) -> Callable[[], None] | None:
        """A function that copies flattened tensors to where they came from; None where they are there already."""
        changed = [name for name in flat if name != "gradient" and flat[name].data_ptr() != _pointer(self, name)]
        if self.rows is None and not changed:
            return None

        def copy() -> None:
            for name in changed:
                block = flat[name].view(self.tensors[name].shape)
                if self.rows is None:
                    self.tensors[name].copy_(block)
                else:
                    self.whole[name].index_copy_(self.dim, self.rows, block)

        return copy


def _pointer(part: Part, name: str) -> int:
    return part.tensors[name].data_ptr() if part.rows is None else 0


def parts(
    held: Mapping[str, torch.Tensor], piece: Piece | None, shape: tuple[int, ...], blocks: Blocks | None
) -> Iterator[Part]:
    """Cut tensors into the blocks of their parameter.

    Args:
        held: equally shaped: this process's part of the parameter, of its gradient, and of its state.
        piece: where that part lies in the whole parameter; None: it is the whole.
        shape: of the whole parameter.
        blocks: None: it is one block.
    """
    if blocks is None:
        yield Part(held, piece, held)
        return
    dim, runs = blocks
    labels = _labels(runs, shape[dim])
    begin, count = (piece.offset[dim], piece.shape[dim]) if piece else (0, shape[dim])
    for block in sorted({number for number, _ in runs}):
        rows = (labels[begin : begin + count] == block).nonzero().flatten()
        at = None if piece is None else _within(piece, dim, labels, begin, block, len(rows))
        if dim == 0 and len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
            near = {name: tensor.narrow(0, int(rows[0]), len(rows)) for name, tensor in held.items()}
            yield Part(near, at, held)
            continue
        rows = rows.to(held["param"].device)
        yield Part({name: tensor.index_select(dim, rows) for name, tensor in held.items()}, at, held, dim, rows)


def _labels(runs: Runs, size: int) -> torch.Tensor:
    """The block of each row, int64 [size]."""
    numbers, counts = zip(*runs, strict=True)
    period = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(counts))
    return period.repeat(size // len(period))


def _within(piece: Piece, dim: int, labels: torch.Tensor, begin: int, block: int, count: int) -> Piece:
    """A process's part of a block: its rows are neighbours in the block, since they are all that lie in its range."""
    before, whole = int((labels[:begin] == block).sum()), int((labels == block).sum())

    def put(sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
        return (*sizes[:dim], size, *sizes[dim + 1 :])

    return replace(
        piece, whole=put(piece.whole, whole), shape=put(piece.shape, count), offset=put(piece.offset, before)
    )
