"""The tensors of an adapter held against the weight that they change, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from surgery.checkpoint.formats import lora, low_rank
from surgery.checkpoint.formats.adapter_config import CONVERT, MERGE, Settings
from surgery.checkpoint.formats.format import Base
from surgery.checkpoint.formats.whole import Fourier, Kernel, Principal
from surgery.checkpoint.tensor import Tensor
from surgery.checkpoint.tied import model_types
from surgery.errors import CheckpointError
from surgery.layout import place

# Models that hold each expert as [in, out].
TURNED = ("gpt_oss", "aria_text", "openai_privacy_filter")
Parts = Mapping[str, Tensor]


class Fit:
    """The weights of a base with what an adapter adds to them.

    Every method returns the changed weight for the weight before, and raises CheckpointError where the two do not fit.
    """

    def __init__(self, weights: Path, settings: Settings, base: Base) -> None:
        self.weights, self.settings, self.base, self.experts = weights, settings, base, low_rank.Experts()

    def _computed(self, before: Tensor, change: lora.Change) -> Tensor:
        """The weight with a change that is made while it is read."""
        return replace(before, data=lora.Computed(self.weights, before, before.dtype, change), start=0)

    def rows(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """Trained rows of an embedding put in their places."""
        rows, indices = parts["trainable_tokens_delta"], self.settings.rows(module)
        if (
            rows.shape != (len(indices), *before.shape[1:])
            or len(before.shape) != 2
            or max(indices, default=0) >= before.shape[0]
        ):
            raise CheckpointError(
                f"{self.weights}: {module} has rows of shape {list(rows.shape)}, where {self.settings.path.name} names "
                f"{len(indices)} tokens and the base has {list(before.shape)}. Give the base that it was made for as `pre`."
            )
        self._floats(module, before, rows)
        return self._computed(before, lora.Replaced(rows, indices))

    def bias(self, module: str, bias: Tensor, before: Tensor) -> Tensor:
        """A bias of B added to the bias of the layer."""
        if bias.shape != before.shape or not self.settings.biased:
            raise CheckpointError(f"{self.weights}: {module}.lora_B.bias is no part of plain LoRA. {MERGE}")
        self._floats(module, before, bias)
        left, right = low_rank.one, partial(low_rank.row, bias)
        return self._computed(before, lora.Added(low_rank.LowRank(left, right, self.settings.scale(module))))

    def weight(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """Factors added to the weight of a linear layer, an embedding or a convolution."""
        embedding = "lora_embedding_A" in parts
        a, b = self._pair(module, parts, "lora_embedding_" if embedding else "lora_")
        self._floats(module, before, a, b)
        rank = self.settings.rank(module)
        if (
            not 2 <= len(a.shape) == len(before.shape) == len(b.shape) <= 5
            or a.shape[2:] != before.shape[2:]
            or set(b.shape[2:]) - {1}
        ):
            raise CheckpointError(
                f"{self.weights}: {module} has A of shape {list(a.shape)}, B of {list(b.shape)} and in the base "
                f"{list(before.shape)}, so it is no linear layer, embedding or convolution. {MERGE}"
            )
        if not a.shape[0] == b.shape[1] == rank:
            raise CheckpointError(
                f"{self.weights}: {module} has A of rank {a.shape[0]} and B of rank {b.shape[1]}, where "
                f"{self.settings.path.name} says {rank}. Save the adapter again."
            )
        sizes = (b.shape[0], a.shape[1])
        transposed = embedding or (len(a.shape) == 2 and (sizes != before.shape or self._is_turned(before)))
        if before.shape[:2] != (sizes[::-1] if transposed else sizes):
            raise self._unfit(module, sizes, before)
        scale = self.settings.scale(module)
        delta = low_rank.low_rank(a, b, scale, transposed=transposed) if len(a.shape) == 2 else Kernel(a, b, scale)
        if self.settings.principal and not embedding and len(a.shape) == 2:
            if transposed and self.settings.principal == "olora":
                raise CheckpointError(
                    f"{self.settings.path}: was begun by olora, which peft does not load for a weight that is stored as "
                    f"[in, out] ({before.name}). {CONVERT}"
                )
            residual = Principal(before, self.settings.principal, rank, scale, transposed)
            before = self._computed(before, lora.Added(residual))
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != self.settings.dora:
            key = f"{module}.lora_magnitude_vector"
            raise CheckpointError(
                f"{self.weights}: {key} is missing, where {self.settings.path.name} sets use_dora. Save the adapter again."
                if self.settings.dora
                else f"{self.weights}: {key} is no part of plain LoRA, whose use_dora is not set. {MERGE}"
            )
        if magnitude is None:
            return self._computed(before, lora.Added(delta, twice=embedding or self.settings.twice))
        if magnitude.entries != sizes[0]:
            raise self._unfit(f"{module}.lora_magnitude_vector", magnitude.shape, before)
        self._floats(module, before, magnitude)
        scaled = lora.ColumnScaled(delta, magnitude) if transposed else lora.RowScaled(delta, magnitude)
        return self._computed(before, scaled)

    @cached_property
    def _turned(self) -> bool:
        """Whether the layers hold their weights as [in, out], like GPT-2: there a bias is as long as dimension 1.

        The setting fan_in_fan_out does not tell: peft goes by the kind of each module, and saves what the last one was.
        """
        for name, tensor in self.base.tensors.items():
            bias = self.base.tensors.get(f"{name.removesuffix('weight')}bias")
            if bias and len(tensor.shape) == 2 and bias.shape == tensor.shape[1:] != tensor.shape[:1]:
                return True
        return False

    def stack(self, key: str, parts: Parts, before: Tensor) -> Tensor:
        """Factors added to a parameter: a matrix, or the stacked matrices [experts, …] of a layer."""
        count = before.shape[0] if len(before.shape) == 3 else 1
        a, b, scale = self._factors(key, parts, before, count)
        sizes, inner = (b.shape[0], a.shape[1]), before.shape[-2:]
        transposed = sizes != inner or (sizes[0] == sizes[1] and bool(model_types(self.base.config) & {*TURNED}))
        if len(before.shape) not in (2, 3) or inner != (sizes[::-1] if transposed else sizes):
            raise self._unfit(key, sizes, before)
        experts = [
            low_rank.LowRank(
                partial(self.experts.b, b, count, number), partial(low_rank.block, a, count, number), scale, transposed
            )
            for number in range(count)
        ]
        return self._computed(before, lora.Added(low_rank.Stacked(experts, inner[0]), twice=True))

    def expert(self, key: str, parts: Parts, number: int, index: int, pieces: int, before: Tensor) -> Tensor:
        """The same for one projection of one expert that the base stores by itself.

        Args:
            number: of the expert.
            index, pieces: which of the projections that the parameter holds.
        """
        count = sum(self._pair(key, parts, "lora_")[0].shape[:1]) // self.settings.rank(key)
        a, b, scale = self._factors(key, parts, before, count)
        rows = b.shape[0] // pieces
        if before.shape != (rows, a.shape[1]) or rows * pieces != b.shape[0] or number >= count:
            raise self._unfit(f"{key} of expert {number}", (rows, a.shape[1]), before)
        left = partial(self.experts.b, b, count, number, slice(index * rows, (index + 1) * rows))
        return self._computed(
            before, lora.Added(low_rank.LowRank(left, partial(low_rank.block, a, count, number), scale), twice=True)
        )

    def multiplied(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """(IA)³: the outputs of a layer, its bias among them, or its inputs, each times a number."""
        vector = parts["ia3_l"]
        self._floats(module, before, vector)
        inputs = vector.shape[:1] == (1,)
        if len(before.shape) == 1 and inputs:
            return before
        axis = 1 if inputs else 0
        if len(before.shape) == 2 and (before.shape[axis] != vector.entries or self._is_turned(before)):
            axis = 1 - axis
        if len(vector.shape) != 2 or before.shape[axis : axis + 1] != (vector.entries,) or len(before.shape) > 2:
            raise self._unfit(f"{module}.ia3_l", vector.shape, before)
        return self._computed(before, lora.Multiplied(vector, axis == 1 or len(before.shape) == 1, before.shape[-1]))

    def adaptive(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """AdaLoRA: α · B·(E∘A) / (r + 10⁻⁵) with E [rank, 1] and the rank r at the beginning (Zhang et al., arXiv 2303.10512)."""
        self._floats(module, before, *parts.values())
        a, b, e = (parts.get(f"lora_{kind}") for kind in "ABE")
        if not (a and b and e) or [len(tensor.shape) for tensor in (a, b, before)] != [2, 2, 2] or len(parts) != 3:
            raise CheckpointError(
                f"{self.weights}: {module} has no matrices A and B with their E. Save the adapter again."
            )
        rank, sizes = a.shape[0], (b.shape[0], a.shape[1])
        transposed = sizes != before.shape or self._is_turned(before)
        if before.shape != (sizes[::-1] if transposed else sizes) or b.shape[1] != rank or e.shape != (rank, 1):
            raise self._unfit(module, sizes, before)
        alpha = self.settings.alpha(module)
        delta = low_rank.LowRank(
            partial(low_rank.numbers, b),
            partial(low_rank.scaled_rows, a, e),
            alpha if alpha > 0 else rank,
            transposed,
            float(np.float32(self.settings.first_rank()) + np.float32(1e-5)),
        )
        return self._computed(before, lora.Added(delta))

    def shared(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """VeRA: diag(b)·B·diag(d)·A, with A and B that all modules share and each takes its size of (arXiv 2310.11454, Eq. 2)."""
        self._floats(module, before, *parts.values())
        if not {"vera_A", "vera_B"} <= parts.keys():
            raise CheckpointError(
                f"{self.weights}: lacks vera_A and vera_B, which all its modules share: it was saved with save_projection=False. "
                f"{MERGE}"
            )
        rows, columns = self._sides(module, before)
        outs = parts["vera_lambda_b"].entries if "vera_lambda_b" in parts else 0
        transposed = outs != rows or self._is_turned(before)
        rows, columns = (columns, rows) if transposed else (rows, columns)
        a, b = parts["vera_A"], parts["vera_B"]
        self._shapes(
            module,
            parts,
            {
                "vera_lambda_b": (rows,),
                "vera_lambda_d": (self.settings.rank(module),),
                "vera_A": (self.settings.rank(module), max(columns, *a.shape[1:2])),
                "vera_B": (max(rows, *b.shape[:1]), self.settings.rank(module)),
            },
        )
        left = partial(low_rank.cut_rows, b, parts["vera_lambda_b"], rows, b.shape[1])
        right = partial(low_rank.cut_rows, a, parts["vera_lambda_d"], a.shape[0], columns)
        return self._computed(before, lora.Added(low_rank.LowRank(left, right, 1.0, transposed)))

    def fourier(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """FourierFT: the real part of a matrix whose spectrum has a few entries (Gao et al., arXiv 2405.03003, Eqs. 2–4)."""
        spectrum = parts["fourierft_spectrum"]
        self._floats(module, before, spectrum)
        if len(before.shape) != 2 or len(spectrum.shape) != 1 or not 0 < spectrum.entries <= before.entries:
            raise self._unfit(module, spectrum.shape, before)
        transposed = bool(self.settings.values.get("fan_in_fan_out")) or self._is_turned(before)
        delta = Fourier(spectrum, before.shape, self.settings.scaling(), self.settings.seed(), transposed)
        return self._computed(before, lora.Added(delta))

    def hadamard(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """LoHa: two products of factors, multiplied entry by entry."""
        rank = self.settings.rank(module)
        rows, columns = self._sides(module, before)
        self._shapes(
            module, parts, {f"hada_w{n}_{k}": (rows, rank) if k == "a" else (rank, columns) for n in "12" for k in "ab"}
        )
        self._floats(module, before, *parts.values())
        one, two = (low_rank.low_rank(parts[f"hada_w{n}_b"], parts[f"hada_w{n}_a"], 1.0) for n in "12")
        return self._computed(before, lora.Added(low_rank.Hadamard(one, two, self.settings.scale(module))))

    def kronecker(self, module: str, parts: Parts, before: Tensor) -> Tensor:
        """LoKr: the Kronecker product of two matrices, each of them whole or a product of factors."""
        self._floats(module, before, *parts.values())
        sides = []
        for side in ("lokr_w1", "lokr_w2"):
            whole, a, b = (parts.get(f"{side}{end}") for end in ("", "_a", "_b"))
            if whole is not None and a is None and b is None:
                shape, factor = self._sides(f"{module}.{side}", whole), partial(low_rank.matrix, whole)
            elif whole is None and a and b and len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]:
                shape, factor = (a.shape[0], b.shape[1]), partial(low_rank.multiplied, a, b)
            else:
                raise CheckpointError(
                    f"{self.weights}: {module} has no pair of lokr_w1 and lokr_w2. Save the adapter again."
                )
            sides.append((shape, factor))
        ((rows, columns), one), ((inner, width), two) = sides
        if (rows * inner, columns * width) != self._sides(module, before):
            raise self._unfit(module, (rows * inner, columns * width), before)
        return self._computed(before, lora.Added(low_rank.Kronecker(one, two, self.settings.scale(module))))

    def _sides(self, module: str, tensor: Tensor) -> tuple[int, int]:
        """Rows and columns of a weight; of a convolution, all that belongs to one output is a row."""
        if len(tensor.shape) < 2 or not tensor.entries:
            raise self._unfit(module, tensor.shape, tensor)
        return tensor.shape[0], tensor.entries // tensor.shape[0]

    def _shapes(self, module: str, parts: Parts, wanted: Mapping[str, tuple[int, ...]]) -> None:
        if parts.keys() != wanted.keys() or any(parts[kind].shape != shape for kind, shape in wanted.items()):
            found, asked = (
                ", ".join(f"{kind} {list(shape)}" for kind, shape in shapes.items())
                for shapes in ({kind: tensor.shape for kind, tensor in parts.items()}, wanted)
            )
            raise CheckpointError(
                f"{self.weights}: {module} has {found}, where the base and {self.settings.path.name} ask for {asked}. Give the "
                "base that it was made for as `pre`."
            )

    def _is_turned(self, before: Tensor) -> bool:
        """Whether a square weight is stored as [in, out]."""
        return before.shape[0] == before.shape[1] and self._turned and place(before.name).layer is not None

    def _factors(self, key: str, parts: Parts, before: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
        """A [experts · r, in] and B [out, experts · r] of a parameter, checked, and s."""
        a, b = self._pair(key, parts, "lora_")
        self._floats(key, before, a, b)
        rank = self.settings.rank(key)
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank * count:
            raise CheckpointError(
                f"{self.weights}: {key} has A of shape {list(a.shape)} and B of shape {list(b.shape)}, which is not rank {rank} "
                f"for {count} experts. Give the base that it was made for as `pre`."
            )
        if self.settings.principal or self.settings.dora:
            raise CheckpointError(f"{self.weights}: {key} is a parameter, to which peft adds plain LoRA alone. {MERGE}")
        return a, b, self.settings.scale(key)

    def _pair(self, module: str, parts: Parts, kind: str) -> tuple[Tensor, Tensor]:
        known = {f"{kind}A", f"{kind}B", "lora_magnitude_vector", "lora_B.bias"}
        if not {f"{kind}A", f"{kind}B"} <= parts.keys() <= known:
            raise CheckpointError(f"{self.weights}: {module} has no pair of A and B. Save the adapter again.")
        return parts[f"{kind}A"], parts[f"{kind}B"]

    def _floats(self, module: str, before: Tensor, *trained: Tensor) -> None:
        if not before.is_float:
            raise CheckpointError(
                f"{before.path}: {before.name} is quantized ({before.dtype}), so nothing can be added to it. Dequantize the base "
                "to bfloat16 first."
            )
        if not all(tensor.is_float for tensor in trained):
            raise CheckpointError(
                f"{self.weights}: {module} is no linear layer or embedding of floating-point numbers. {MERGE}"
            )

    def _unfit(self, module: str, sizes: tuple[int, ...], before: Tensor) -> CheckpointError:
        return CheckpointError(
            f"{self.weights}: {module} fits a weight of shape {list(sizes)}, where the base has {list(before.shape)}. Give the "
            "base that it was made for as `pre`."
        )
