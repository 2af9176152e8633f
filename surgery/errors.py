"""The errors that a user can cause. The command line prints each as one sentence and exits with code 1.

A message names the file or tensor it is about and says the way out.
"""


class SurgeryError(Exception):
    """Base of every error that is the input's or the caller's, not the program's."""


class CheckpointError(SurgeryError):
    """A checkpoint cannot be read: missing, truncated, malformed, quantized, or not a checkpoint at all."""


class PairError(SurgeryError):
    """Two checkpoints do not belong together: other shapes, a missing layer, fused against split projections."""


class OptionError(SurgeryError):
    """An option has a value that cannot be meant: sparsity 1.5, a pattern that matches nothing."""


class OutputError(SurgeryError):
    """The output cannot be written: it exists, lies inside an input, the disk is full, no permission."""


class HubError(SurgeryError):
    """A hub repository cannot be fetched: missing, gated, or the network is away."""


def reason(error: BaseException) -> str:
    """A library's error in one line, to quote in a sentence of our own."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of its GPU: torch says so in several ways."""
    names = {kind.__name__ for kind in type(error).__mro__}
    told = ("DefaultCPUAllocator", "can't allocate memory", "out of memory")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )
