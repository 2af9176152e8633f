"""Post-hoc model surgery: edit the task vector of a fine-tuned checkpoint, tensor by tensor.

`open_pair`, `edit`, `evaluate`, `compare` and `auto` are the Python interface; see `surgery.api`.
"""

from typing import TYPE_CHECKING, Any

from surgery.provenance import VERSION as __version__

__all__ = ["__version__", "auto", "compare", "edit", "evaluate", "open_pair"]

if TYPE_CHECKING:
    from surgery.api import auto, compare, edit, evaluate, open_pair


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    from surgery import api  # only now: the command line starts faster without

    return getattr(api, name)
