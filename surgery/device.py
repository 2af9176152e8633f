"""The devices that --device can name."""

from __future__ import annotations

import re

import torch

from surgery.errors import OptionError


def find_device(asked: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        OptionError: no such device is here, or the name is none.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cpu":
        return torch.device(asked)
    if not re.fullmatch(r"cuda(:[0-9]+)?", asked):
        raise OptionError(f"`device` must be auto, cpu, cuda or cuda:N, not {asked!r}.")
    if not torch.cuda.is_available():
        raise OptionError("`device` cuda: no CUDA device is available here. Use `device` cpu.")
    device = torch.device(asked)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise OptionError(f"`device` {asked}: there are only {torch.cuda.device_count()} CUDA devices, counted from 0.")
    return device
