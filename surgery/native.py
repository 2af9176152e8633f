"""The compiled kernels (`kernels.c`), where there was a C compiler at installation: the same bits as the numpy code, faster."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path
from typing import ClassVar


class Native:
    """The compiled kernels, and the types and scores that they know."""

    dtypes: ClassVar = {"BF16": 0, "F16": 1, "F32": 2}
    scores: ClassVar = {"fapm": 0, "magnitude": 1}

    def __init__(self, path: Path) -> None:
        pointer, size, code, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
        self.library = ctypes.CDLL(str(path))
        self.library.abs_sum.argtypes = [code, pointer, size]
        self.library.abs_sum.restype = ctypes.c_double
        self.library.distance.argtypes = [code, pointer, code, pointer, size, pointer]
        self.library.compare.argtypes = [
            *(code, pointer, code, pointer, size, ctypes.c_uint64, code),
            *(pointer, pointer, pointer),
        ]
        self.library.blend.argtypes = [number, number, code, pointer, code, pointer, size, pointer, pointer, pointer]
        self.library.count.argtypes = [
            code,
            number,
            number,
            number,
            code,
            pointer,
            code,
            pointer,
            size,
            pointer,
            pointer,
        ]
        self.library.checksum.argtypes = [pointer, size, ctypes.c_uint64, pointer]
        self.library.checksum.restype = None
        for prune_words in (self.library.prune16, self.library.prune32):
            prune_words.argtypes = [code, number, number, code, pointer, pointer, code, pointer, size, pointer, pointer]


def _load() -> Native | None:
    if os.environ.get("SURGERY_KERNELS") == "numpy":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernels" + suffix)
        if path.exists():
            return Native(path)
    return None


compiled = _load()
