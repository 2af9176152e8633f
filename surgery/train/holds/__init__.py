"""Ways to stay near the start while training. One is a file here and a line in `HOLDS`."""

from __future__ import annotations

from surgery.train.holds.adalora import AdaLora
from surgery.train.holds.distance import Distance
from surgery.train.holds.ewc import Ewc
from surgery.train.holds.gem import Gem
from surgery.train.holds.hold import Hold
from surgery.train.holds.mixout import Mixout
from surgery.train.holds.proximal import Proximal
from surgery.train.holds.soft_mask import SoftMask
from surgery.train.settings import Settings

# In the order in which they act: what is projected or masked is the gradient of the whole loss.
HOLDS: tuple[type[Hold], ...] = (Mixout, Distance, Ewc, Gem, SoftMask, Proximal, AdaLora)


def holds_of(settings: Settings) -> list[Hold]:
    """The holds that the settings ask for."""
    return [hold for kind in HOLDS if (hold := kind.of(settings)) is not None]
