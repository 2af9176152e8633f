"""The command line's outermost frame: runs the app and turns an error into one sentence and an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.text import readable

INTERRUPTED = 130
# As a shell says of a program that SIGPIPE ended: 128 + 13.
UNREAD = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `surgery` with the given arguments, by default the process's.

    Returns:
        The exit code: 0; 1 after an error, which is one sentence on standard error; 130 after Ctrl-C; 141 where the reader of
        the output went away, as `head` does.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the next file that is opened would take its number
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(arguments)
    except BrokenPipeError:
        pass
    except SystemExit as error:
        # Click and rich leave so when the reader of their output went away.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
    # The interpreter flushes both once more when it ends; it would complain of the closed pipe.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.isatty():
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return UNREAD


def _run(arguments: Sequence[str] | None) -> int:
    try:
        from surgery.commands import app

        code = app(args=arguments, prog_name="surgery", standalone_mode=False)
        sys.stdout.flush()
    except SurgeryError as error:
        from surgery.option import with_flags

        return _fail(with_flags(str(error)))
    except BrokenPipeError:
        raise
    except MemoryError:
        return _fail("Not enough memory for the largest tensor. Try --workers 1.")
    except OSError as error:
        return _fail(f"{error.filename or 'Standard output'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # Wrong usage. Which class that is depends on typer's version.
        if type(error).__name__ == "Abort":
            code = INTERRUPTED
        elif hasattr(error, "format_message"):
            command = getattr(getattr(error, "ctx", None), "command_path", "surgery")
            return _fail(f"{error.format_message().rstrip('.')}. See `{command} --help`.")
        else:
            raise
    if code == INTERRUPTED:
        print("Stopped.", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(sentence: str) -> int:
    print(f"error: {readable(sentence)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
