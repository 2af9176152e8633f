"""Where a checkpoint or a task vector may go, and how it takes the place of an earlier one.

Never over an input, and never over what surgery did not write: see `surgery.paths.apart` and `surgery.checkpoint.listing`.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from surgery.checkpoint.durable import tried
from surgery.checkpoint.listing import WAY_OUT, remove_output, stranger
from surgery.errors import OutputError
from surgery.paths import Kind, apart

REPOSITORIES = (".git", ".hg", ".svn")
# How file systems without hard links refuse one.
NO_LINKS = {None, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}


def check_file(out: Path, inputs: Sequence[Path], kind: Kind, *, force: bool) -> Path:
    """Return the real path of a file to write, if it may be written.

    Raises:
        OutputError: it belongs to an input, is a folder, has another ending, or exists and `force` is not given or surgery did
            not write it.
    """
    real = apart(out, inputs, "out", replaced=False)
    if real.is_dir():
        raise OutputError(f"{out}: is a folder, and the {kind.name} is a file. Choose another `out`.")
    if os.path.lexists(real):
        if not force:
            raise OutputError(f"{out}: exists already. Replace it with `force` or choose another `out`.")
        if not real.is_file() or (real.stat().st_size and not kind.ours(real)):
            raise OutputError(
                f"{out}: `force` replaces only a {kind.name} that surgery wrote, and this is none. {WAY_OUT}"
            )
    if real.suffix not in kind.endings:
        raise OutputError(
            f"{out}: the {kind.name} is a safetensors file. Give `out` a name that ends with {kind.endings[0]}."
        )
    return real


def check_output(out: Path, inputs: Sequence[Path], *, force: bool) -> Path:
    """Return the real path of the output folder, if it may be written.

    Raises:
        OutputError: it is, lies in, or contains an input; it exists and `force` is not given; it holds anything that surgery did
            not write; or it is a place that is never replaced (a home folder, a repository, …).
    """
    real = apart(out, inputs, "out")
    if not os.path.lexists(real):
        if not force and (old := _set_aside(real)):
            raise OutputError(
                f"{real}: a run was killed while it replaced this checkpoint, which is now {old[0]}. Rename that back, or "
                "replace it with `force`."
            )
        return real
    if not real.is_dir():
        raise OutputError(f"{out}: is a file. Choose another `out`.")
    if not force:
        raise OutputError(f"{out}: exists already. Replace it with `force` or choose another `out`.")
    check_replaced(real)
    return real


def check_replaced(folder: Path) -> None:
    """Check that everything in a folder is surgery's own.

    Raises:
        OutputError: it is not, or the folder is a place that is never replaced.
    """
    try:
        reason = _never(folder) or stranger(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read ({error.strerror}). Choose another `out`.") from None
    if reason:
        raise OutputError(f"{folder}: {reason}")


def _never(folder: Path) -> str | None:
    """Why a folder is never replaced, whatever is in it: the end of a sentence about it."""
    other = "Choose another `out`."
    if folder == folder.parent or os.path.ismount(folder):
        return f"is the root of a file system. {other}"
    for home in _homes():
        if folder == home or folder in home.parents:
            return f"is or holds a home folder. {other}"
    here = Path(os.path.realpath(Path.cwd()))
    if folder == here or folder in here.parents:
        return f"is or holds the current folder. {other}"
    for name in REPOSITORIES:
        if os.path.lexists(folder / name):
            return f"is a repository: it holds {name}. {other}"
    return None


def _homes() -> set[Path]:
    found = {os.path.realpath(os.path.expanduser("~"))}  # noqa: PTH111
    try:
        import pwd

        found.add(os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir))
    except (ImportError, KeyError):  # Windows; a user without an entry, as in a container
        pass
    return set(map(Path, found))


def _aside(out: Path) -> str:
    """Return the beginning of the names under which an output that is being replaced stands for a moment."""
    return f".{out.name}.surgery-old"


def _set_aside(out: Path) -> list[Path]:
    """Return the earlier outputs that a killed run set aside, and nothing that merely has such a name."""
    try:
        found = sorted(path for path in out.parent.iterdir() if path.name.startswith(_aside(out)))
        return [path for path in found if path.is_dir() and not path.is_symlink() and stranger(path) is None]
    except OSError:
        return []


def appear(folder: Path, out: Path, *, replace: bool) -> Path | None:
    """Give a finished folder its name; an earlier output that has it is set aside, for `tidy` to remove.

    Returns:
        Where the earlier output stands now; None where there was none.

    Raises:
        OutputError: there is something at `out`, and `replace` is not given, or it is not surgery's.
    """
    old = None
    if os.path.lexists(out):
        if not replace:
            raise OutputError(f"{out}: appeared while surgery worked. Choose another `out`.")
        check_replaced(out)
        old = out.with_name(_aside(out))
        if os.path.lexists(old):
            old = out.with_name(f"{_aside(out)}-{secrets.token_hex(4)}")
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old is not None and not os.path.lexists(out):
            old.rename(out)
        raise
    return old


def appear_file(made: Path, out: Path, kind: Kind, *, replace: bool) -> None:
    """Give a finished file its name; an earlier one of surgery gives way to it at once.

    Raises:
        OutputError: there is something at `out`, and `replace` is not given, or it is not surgery's.
    """
    if replace and os.path.lexists(out):
        if not out.is_file() or out.is_symlink() or (out.stat().st_size and not kind.ours(out)):
            raise OutputError(f"{out}: is no {kind.name} of surgery any more. {WAY_OUT}")
        made.replace(out)
        return
    try:
        os.link(made, out, follow_symlinks=False)  # unlike a rename, it replaces nothing
    except FileExistsError:
        raise OutputError(f"{out}: appeared while surgery worked. Choose another `out`.") from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) not in NO_LINKS or os.path.lexists(out):
            raise
        made.replace(out)


def tidy(out: Path, old: Path | None) -> list[str]:
    """Remove the earlier outputs that were set aside for this one. Nothing is raised: the output has appeared.

    Args:
        old: the one that `appear` set aside.

    Returns:
        A sentence for each that could not be removed as a whole.
    """
    found: list[Path] = []
    tried(lambda: found.extend(_set_aside(out)), "")
    left = []
    for aside in found:
        left += tried(partial(remove_output, aside), f"{aside}: is left of the output that was replaced")
    if old is not None and not left and os.path.lexists(old):
        left.append(
            f"{old}: is the output that was replaced, and not all in it is surgery's. Look into it and remove it."
        )
    return left
