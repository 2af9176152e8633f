"""Tiny models to calibrate, and the inputs of their weights by hooks on the model that transformers itself loads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from helpers.families import FAMILIES
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import Checkpoint, open_checkpoint
from surgery.model.skeleton import call_arguments

NOT_TEXT = ("whisper", "vit", "vit_base")
# A weight of the model, entry [e] where experts are stacked, and the token vectors that it was multiplied with.
Seen = dict[tuple[str, int], list[torch.Tensor]]


def saved(folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Checkpoint:
    FAMILIES[family].build(seed=seed, dtype=dtype).save_pretrained(folder)
    return opened(folder)


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve(str(folder), companions=False))


def sample_tokens(count: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def hooked(folder: Path, family: str, tokens: torch.Tensor) -> tuple[Any, Seen]:
    """The model that transformers loads, and the inputs of its weights, by hooks on its modules."""
    auto = getattr(transformers, FAMILIES[family].auto)
    model = auto.from_pretrained(folder, experts_implementation="eager").eval()
    seen: Seen = defaultdict(list)

    def linear(name: str) -> Callable[[Any, Any], None]:
        return lambda module, args: seen[f"{name}.weight", -1].extend(args[0].reshape(-1, args[0].shape[-1]))

    def experts(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            given = [*args, *kwargs.values()]
            if len(given) == 1:  # Llama 4: every token to every expert, 0 where it was not sent
                sent = given[0].view(len(module.gate_up_proj), -1, given[0].shape[-1])
                rows = [(row, e) for e, some in enumerate(sent) for row in some if row.any()]
            else:
                rows = [(given[0][t], int(e)) for t, chosen in enumerate(given[1]) for e in chosen]
            for x, e in rows:
                up = module.gate_up_proj[e]
                bias = module.gate_up_proj_bias[e] if hasattr(module, "gate_up_proj_bias") else 0
                both = (x @ up if up.shape[0] == len(x) else up @ x) + bias
                if hasattr(module, "_apply_gate"):
                    middle = module._apply_gate(both[None])[0]
                else:
                    gate, value = both.chunk(2)
                    middle = module.act_fn(gate) * value
                seen[f"{name}.gate_up_proj", e].append(x)
                seen[f"{name}.down_proj", e].append(middle)

        return hook

    def mamba(name: str, rank: int) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, out: seen[f"{name}.dt_proj.weight", -1].extend(out[..., :rank].reshape(-1, rank))

    for name, module in model.named_modules():
        if hasattr(module, "dt_proj"):  # used without being called
            module.x_proj.register_forward_hook(mamba(name, module.time_step_rank))
        kind = type(module).__name__
        if (
            isinstance(module, torch.nn.Linear)
            or kind in ("Conv1D", "FalconLinear")
            or kind.endswith(("Router", "Gate"))
        ):
            if getattr(module, "weight", None) is not None:
                module.register_forward_pre_hook(linear(name))
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            module.register_forward_pre_hook(experts(name), with_kwargs=True)
    with torch.no_grad():
        for sample in tokens:
            model(**call_arguments(model, sample[None]))
    return model, seen


def double_loop(rows: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    """‖X_k‖₂ as it is written."""
    total = [0.0] * len(rows[0])
    for row in rows:
        for k, value in enumerate(row.tolist()):
            total[k] += value * value
    return np.sqrt(total)


def expected(
    model: Any, seen: Seen, stored: dict[str, torch.Tensor]
) -> dict[str, tuple[np.ndarray[Any, Any], int, int]]:
    """(norms, tokens, expert) of every tensor of the checkpoint, which is found by its numbers, not by its name."""
    weights = {(name, -1): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    for (name, e), _ in seen.items():
        if e >= 0:
            weights[name, e] = model.get_parameter(name)[e]
    loops = {key: double_loop(rows) for key, rows in seen.items()}
    found = {}
    for name, tensor in stored.items():
        for key in loops:
            whole = weights[key].detach()
            slices = [(0, tensor)] if tensor.ndim == 2 else list(enumerate(tensor)) if tensor.ndim == 3 else []
            for e, part in slices:
                pieces = [whole, *(whole.chunk(2) if key[1] >= 0 else ())]
                if any(piece.shape == part.shape and torch.equal(piece, part) for piece in pieces):
                    found[f"{name}#{e}" if tensor.ndim == 3 else name] = (loops[key], len(seen[key]), e)
    return found
