"""Half fine-tuning (HFT paper, §2 and Algorithm 1): a random half of the blocks' tensors is frozen for a round of training.

What is frozen is what Half-Reset would reset: `surgery.methods.half_reset.choose` draws for both. A frozen tensor keeps its bits
and costs no gradient, no optimizer state and no multiplication for its gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import OptionError
from surgery.layout import adapted, place
from surgery.methods.half_reset import ALSO, LEVELS, choose
from surgery.methods.scope import one_of, share

if TYPE_CHECKING:
    import torch

# The attribute of a module that holds the names of those of its parameters that are frozen for this round. Modules outlive
# what wrappers do with parameters.
_MARK = "_half_frozen"


@dataclass(frozen=True)
class Freeze:
    """The tensors that one round of half fine-tuning freezes.

    Attributes:
        ratio, level, seed: as asked for.
        names: of the frozen tensors, in the model's order and words.
        frozen, parameters: how many entries are frozen, and how many the model has; a tied tensor counts once.
        layers, layers_trained: how many entries the transformer layers have, and how many of these are trained.
    """

    ratio: float
    level: str
    seed: int
    names: tuple[str, ...]
    frozen: int
    parameters: int
    layers: int
    layers_trained: int

    @property
    def share(self) -> float:
        """The share of the model's parameters that is frozen."""
        return self.frozen / self.parameters

    @property
    def trainable(self) -> float:
        """The share of the transformer layers' parameters that is trained, as the paper counts (its footnote 1)."""
        return self.layers_trained / self.layers


def half_freeze(
    model: torch.nn.Module,
    ratio: float = 0.5,
    level: str = "category",
    seed: int = 0,
    also: Collection[str] = (),
    counts: Mapping[str, Sequence[int]] | None = None,
) -> Freeze:
    """Freeze a random half of the blocks' tensors for one round, and unfreeze those of the round before.

    Call it before the optimizer is made, or before each round: a frozen parameter has no gradient, and every optimizer leaves it
    alone. Parameters that the caller froze stay frozen. With LoRA the factors of a matrix go with it.

    Args:
        model: a transformer; its parameters' requires_grad is set, and gradients of what is frozen are dropped.
        ratio: the share of tensors that is frozen, in [0, 1].
        level: "category", "layer" or "model", as in Half-Reset.
        seed: the draw, an integer ≥ 0: another one for another round.
        also: what to freeze outside the blocks: "embedding", "head", "norm" (the final norm). By default they are trained.
        counts: category ("attention", "feed_forward", "norm") -> how many of its matrices are frozen in the first layer, the
            second, …, over and over, in the ratio's place: {"attention": [2], "feed_forward": [1, 2]} is the paper's half.

    Raises:
        OptionError: an argument outside its range, or no parameter belongs to a layer.
    """
    share("ratio", ratio)
    one_of("level", level, LEVELS)
    for group in also:
        one_of("also", group, ALSO)
    if seed < 0:
        raise OptionError(f"seed must be 0 or greater, not {seed}.")
    parameters = dict(model.named_parameters())
    if not any(place(name).layer is not None for name in parameters):
        raise OptionError("No parameter of the model belongs to a layer, so there is no half to freeze.")
    plain = {name: adapted(name) for name in parameters}
    chosen = choose(set(plain.values()), ratio, level, seed, also, counts)
    return _frozen(model, {name for name in parameters if plain[name] in chosen}, (ratio, level, seed))


def train_only(model: torch.nn.Module, category: str, first: int, end: int) -> Freeze:
    """Freeze all but one category of a range of layers (CoFiTune: the feed-forward of some), as `half_freeze` freezes.

    Args:
        category: of `surgery.layout`.
        first, end: the layers that are trained, and the one behind them.

    Raises:
        OptionError: the range holds nothing of that category.
    """
    kept = set()
    for name, _ in model.named_parameters():
        where = place(name)
        if where.category == category and where.layer is not None and first <= where.layer < end:
            kept.add(name)
    if not kept:
        raise OptionError(
            f"Layers {first} to {end - 1} have nothing of {category.replace('_', '-')}. Give other layers."
        )
    names = {name for name, _ in model.named_parameters()} - kept
    return _frozen(model, names, (0.0, category, 0))


def _frozen(model: torch.nn.Module, chosen: Collection[str], asked: tuple[float, str, int]) -> Freeze:
    """Freeze parameters for a round, and unfreeze those of the round before.

    Args:
        chosen: names of parameters.
        asked: ratio, level and seed.
    """
    parameters = dict(model.named_parameters())
    for module in model.modules():
        for name in vars(module).pop(_MARK, ()):
            module.get_parameter(name).requires_grad_(True)
    names = tuple(name for name in parameters if name in chosen)
    for name in names:
        parameter = parameters[name]
        if parameter.requires_grad:
            path, _, own = name.rpartition(".")
            vars(model.get_submodule(path)).setdefault(_MARK, []).append(own)
        parameter.requires_grad_(False)
        parameter.grad = None
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    frozen = sum(sizes[name] for name in names)
    inner = [name for name in parameters if place(name).layer is not None]
    trained = sum(sizes[name] for name in inner if parameters[name].requires_grad)
    return Freeze(*asked, names, frozen, sum(sizes.values()), sum(sizes[name] for name in inner), trained)
