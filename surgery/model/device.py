"""Where a model runs."""

from __future__ import annotations

import torch


def find_device(asked: str) -> torch.device:
    """The device that an option names: "auto" is a GPU where there is one.

    Raises:
        OptionError: there is no such device.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked != "cpu":
        from surgery.engines import cuda

        return cuda.find_device(asked)
    return torch.device(asked)
