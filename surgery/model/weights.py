"""A model's parameters out of a checkpoint, a few at a time, and the way back from a parameter to the tensors it came from.

transformers renames tensors while it loads them, and joins or cuts some: Mixtral's experts.N.w1 and w3 become one gate_up_proj.
Its own table of these conversions is applied here to the names first, and to the numbers of one block when they are needed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.dtypes import INTEGER_BITS, torch_type
from surgery.checkpoint.source import Checkpoint
from surgery.checkpoint.tensor import Tensor
from surgery.engines.stream import Tick, stream, workers
from surgery.errors import CheckpointError, reason
from surgery.methods.wanda import Norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_BYTES = 1 << 22


@dataclass
class Origin:
    """Where a parameter, or several, come from.

    Attributes:
        transform: transformers' conversion; None where a tensor is taken as it is.
        sources: (pattern of the transform, name in the checkpoint, name before the conversion).
    """

    transform: Any
    sources: list[tuple[str, str, str]] = field(default_factory=list)


class Weights:
    """The parameters of a model, loaded and freed by name.

    Args:
        model: with its parameters on the meta device.
        checkpoint: what it is loaded from.
        dtype: the type that the model was built in.
        device: where parameters go.
        checksums: takes the checksum of every tensor that is read, by its name; see `surgery.checkpoint.fingerprint`.

    Raises:
        CheckpointError: the checkpoint lacks a parameter, or one has another shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        checksums: dict[str, str],
    ) -> None:
        self.model, self.checkpoint, self.device, self.checksums = model, checkpoint, device, checksums
        self.meta: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        self.dtypes = self._dtypes(dtype)
        self.origins: dict[str, Origin] = {}
        self._assign()
        self.tied: dict[str, str] = {}  # parameter that is not stored -> the one it shares its numbers with
        self._tie()
        self._check()
        self.absent = {name: self._absent(name) for name in self.meta if self.tied.get(name, name) in self.origins}

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read parameters and put them in their modules.

        Returns:
            Those that were loaded, by the name of the one whose origin they have.
        """
        wanted: dict[int, tuple[Origin, dict[str, list[str]]]] = {}
        for name in names:
            stored = self.tied.get(name, name)
            if stored in self.origins:
                origin = self.origins[stored]
                wanted.setdefault(id(origin), (origin, {}))[1].setdefault(stored, []).append(name)
        loaded: dict[str, torch.Tensor] = {}

        def make_worker(tick: Tick) -> Callable[[tuple[Origin, dict[str, list[str]]]], None]:
            def fill(piece: tuple[Origin, dict[str, list[str]]]) -> None:
                origin, targets = piece
                dtype = self.dtypes[next(iter(targets))]
                values = self._convert(origin, functools.partial(self._read, dtype=dtype, tick=tick))
                for stored, here in targets.items():
                    loaded[stored] = values[stored].to(self.device)
                    for name in here:
                        self._put(name, loaded[stored])

            return fill

        # On threads, since an edited tensor is computed while it is read.
        stream(wanted.values(), make_worker, workers(None), lambda _: None)
        return loaded

    def free(self, names: Iterable[str]) -> None:
        """Let go of parameters."""
        for name in names:
            self._put(name, self.absent[name])

    def names_of(self, norms: Mapping[str, Norm]) -> dict[str, Norm]:
        """The norms of parameters, under the names of the checkpoint.

        Raises:
            CheckpointError: a tensor was converted in a way that cannot be followed.
        """
        named: dict[str, Norm] = {}
        done: set[int] = set()
        for name, norm in norms.items():
            origin = self.origins[self.tied.get(name, name)]
            if origin.transform is None:
                named[origin.sources[0][1]] = norm
            elif id(origin) not in done:
                done.add(id(origin))
                mine = {target: norms[target] for target in self._targets(origin) if target in norms}
                named |= self._revert(origin, mine)
        return named

    def _assign(self) -> None:
        """Find the parameter that each tensor of the checkpoint becomes (after convert_and_load_state_dict_in_model)."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self.model.base_model_prefix
        for name in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.meta)
            if target not in self.meta and name in self.meta:
                target, pattern = name, None
            if target not in self.meta:
                continue  # the model does not use it
            if pattern is None:
                self.origins[target] = Origin(None, [("", name, name)])
                continue
            transform = by_pattern[pattern]
            if target not in self.origins or self.origins[target].transform is not transform:
                self.origins[target] = Origin(transform)
                for pattern_of_other in transform.target_patterns[1:]:
                    other = target.replace(transform.target_patterns[0], pattern_of_other)
                    if other in self.meta:
                        self.origins[other] = self.origins[target]
            self.origins[target].sources.append((pattern, name, apply_renamings(name, renamings)))

    def _tie(self) -> None:
        pairs = self.model.all_tied_weights_keys
        for name in self.meta:
            if name in self.origins:
                continue
            root = pairs.get(name, name)
            group = [root, *(target for target, source in pairs.items() if source == root)]
            stored = next((other for other in group if other in self.origins), None)
            if stored is not None:
                self.tied[name] = stored

    def _check(self) -> None:
        folder = self.checkpoint.folder
        for name, parameter in self.meta.items():
            origin = self.origins.get(self.tied.get(name, name))
            if origin is None:
                if isinstance(parameter, torch.nn.Parameter):
                    raise CheckpointError(
                        f"{folder}: has no tensor {name}, which {type(self.model).__name__} needs to run. Check that config.json "
                        "belongs to these weights."
                    )
                continue
            for _, source, _ in origin.sources:
                tensor = self.checkpoint.tensors[source]
                if not tensor.is_float and tensor.dtype not in INTEGER_BITS:
                    raise CheckpointError(
                        f"{tensor.path}: {source} has the type {tensor.dtype}, which cannot be run here."
                    )
                if origin.transform is None and tensor.shape != parameter.shape:
                    raise CheckpointError(
                        f"{tensor.path}: {source} has shape {list(tensor.shape)} where config.json makes it "
                        f"{list(parameter.shape)}. Check that config.json belongs to these weights."
                    )
        for origin in {id(origin): origin for origin in self.origins.values() if origin.transform}.values():
            self._convert(origin, self._shape)

    def _dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Some parameters are kept in float32 whatever the model's type."""
        from transformers.core_model_loading import build_glob_alternation

        dtypes = {name: parameter.dtype for name, parameter in self.meta.items()}
        plan = self.model._get_dtype_plan(dtype)
        if plan:
            pattern, groups, _ = build_glob_alternation(list(plan))
            for name in dtypes:
                if (found := pattern.search(name)) and found.lastgroup:
                    dtypes[name] = plan[groups[found.lastgroup]]
        return dtypes

    def _convert(self, origin: Origin, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that come from an origin.

        Args:
            read: gives a tensor of the checkpoint.
        """
        targets = self._targets(origin)
        if origin.transform is None:
            return {targets[0]: read(origin.sources[0][1])}
        transform = copy.deepcopy(origin.transform)
        for pattern, name, _ in origin.sources:
            transform.add_tensor(targets[0], name, pattern, read(name))
        try:
            made = transform.convert(targets[0], model=self.model, config=self.model.config)
        except Exception as error:
            raise CheckpointError(
                f"{self.checkpoint.folder}: transformers cannot make {targets[0]} from {origin.sources[0][1]} and its like "
                f"({reason(error)}). Check that the checkpoint is complete and config.json belongs to it."
            ) from error
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name in targets:
            shape = list(values[name].shape) if name in values else None
            if shape != list(self.meta[name].shape):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {origin.sources[0][1]} and what belongs to it make {name} of shape {shape} where "
                    f"config.json makes it {list(self.meta[name].shape)}. Check that the checkpoint is complete and config.json "
                    "belongs to it."
                )
        return values

    def _targets(self, origin: Origin) -> list[str]:
        return [name for name, other in self.origins.items() if other is origin]

    def _read(self, name: str, dtype: torch.dtype, tick: Tick) -> torch.Tensor:
        tensor = self.checkpoint.tensors[name]
        value = torch.empty(tensor.shape, dtype=torch_type(tensor.dtype))
        checksum = Checksum() if name not in self.checksums else None
        if tensor.nbytes:
            view = memoryview(value.reshape(-1).view(torch.uint8).numpy())
            with tensor.open() as reader:
                for start in range(0, tensor.nbytes, READ_BYTES):
                    tick(reader.fill(start, view[start : start + READ_BYTES]))
                    if checksum:
                        checksum.add(start, view[start : start + READ_BYTES])
        if checksum:
            self.checksums[name] = checksum.text()
        return value.to(dtype) if tensor.is_float else value

    def _shape(self, name: str) -> torch.Tensor:
        return torch.empty(self.checkpoint.tensors[name].shape, device="meta")

    def _absent(self, name: str) -> torch.Tensor:
        """A stand-in for a parameter that is not loaded: one NaN that has the parameter's shape, type and device.

        Models ask for all three before they call the module. `Recorder` refuses to compute with it.
        """
        shape, dtype = self.meta[name].shape, self.dtypes[name]
        fill = torch.nan if dtype.is_floating_point else 0
        return torch.full((1,) * len(shape), fill, dtype=dtype, device=self.device).expand(shape)

    def _put(self, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            if not isinstance(value, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
            module._parameters[leaf] = value

    def _revert(self, origin: Origin, norms: Mapping[str, Norm]) -> dict[str, Norm]:
        """The norms of what an origin was made of.

        transformers' conversion is run backwards on tensors that hold, at every entry, the number of its norm.
        """
        targets = self._targets(origin)
        if set(targets) != set(norms):
            return {}  # a part of it has no norm
        reverse = origin.transform.reverse_transform()
        values: list[Any] = []
        tokens: list[Any] = []
        for name in targets:
            norm = norms[name]
            shape = self.meta[name].shape
            numbers = (
                torch.arange(norm.values.size, dtype=torch.int32).add(sum(map(len, values))).view(norm.values.shape)
            )
            numbers = numbers.unsqueeze(-1 if norm.transposed else -2).expand(shape)
            renamed, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(renamed, name, pattern, numbers)
            values.append(norm.values.reshape(-1))
            tokens.append(np.repeat(norm.tokens, norm.values.shape[-1]))
        first, _ = reverse.rename_source_key(targets[0])
        try:
            made = reverse.convert(first, model=self.model, config=self.model.config)
        except Exception as error:
            raise CheckpointError(self._lost(origin.sources[0][1])) from error
        all_values, all_tokens = np.concatenate(values), np.concatenate(tokens)
        found = {}
        for _, name, before in origin.sources:
            marks = next((mark for key, mark in made.items() if _same(key, before)), None)
            if marks is None:
                raise CheckpointError(self._lost(name))
            marks = marks[0] if isinstance(marks, list) else marks
            if tuple(marks.shape) != self.checkpoint.tensors[name].shape:
                raise CheckpointError(self._lost(name))
            if torch.equal(marks, marks[..., :1, :].expand(marks.shape)):
                transposed, numbers = False, marks[..., 0, :]
            elif torch.equal(marks, marks[..., :1].expand(marks.shape)):
                transposed, numbers = True, marks[..., 0]
            else:
                raise CheckpointError(self._lost(name))
            chosen = numbers.numpy()
            seen = all_tokens[chosen[..., 0]]
            found[name] = Norm(all_values[chosen], transposed, seen.astype(np.int64) if seen.ndim else int(seen))
        return found

    def _lost(self, name: str) -> str:
        return (
            f"{self.checkpoint.tensors[name].path}: transformers changes {name} while it loads in a way that surgery cannot "
            "follow. Leave it out with `exclude`, or use another method."
        )


def _same(made: str, before: str) -> bool:
    """Whether two names differ by a model's prefix at most."""
    return made == before or made.endswith("." + before) or before.endswith("." + made)


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating-point type that most entries are stored in.

    Raises:
        CheckpointError: there is none.
    """
    entries: dict[str, int] = {}
    for tensor in tensors:
        if tensor.is_float:
            entries[tensor.dtype] = entries.get(tensor.dtype, 0) + tensor.entries
    if not entries:
        raise CheckpointError("The checkpoint holds no floating-point tensor.")
    return torch_type(max(entries, key=lambda dtype: entries[dtype]))
