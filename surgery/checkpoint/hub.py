"""Turn what the user typed into a local folder: a path as it stands, or a hub repository fetched into the hub's own cache.

An existing path always wins, so `./ft@v1` and a folder named like a hub id are never looked up. Of a repository only
one set of weights, config.json and, for the fine-tuned side, the small files a loader needs are fetched.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import re
import stat
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.companions import travels
from surgery.checkpoint.formats import FORMATS, choose
from surgery.errors import CheckpointError, HubError

# huggingface_hub is slow to import, so only the functions that talk to the hub import it.

CONFIG = "config.json"

_REPO = re.compile(r"(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_REVISION = re.compile(r"[^\s~^:?*\[\\\x00-\x1f\x7f/-][^\s~^:?*\[\\\x00-\x1f\x7f]*")
_TIMEOUT = 30.0  # seconds for the first answer; the library itself would wait for ever

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from and where its files lie."""

    typed: str
    folder: Path
    repo: str | None  # hub id, None for a local folder
    revision: str | None  # commit sha, None for a local folder
    file: str | None = None  # the one file that was named, where it was not a folder


def resolve(typed: str, *, companions: bool) -> Source:
    """Find the folder of a checkpoint, fetching it from the hub where `typed` is no local path.

    Args:
        typed: a local folder or file, or a hub id `name` or `org/name` with an optional `@revision` (branch, tag or sha).
        companions: also fetch the small files beside the weights (tokenizer, generation config, remote code).

    Raises:
        CheckpointError: there is no such folder, it may not be read, or the repository's index is malformed.
        HubError: the repository cannot be fetched.
    """
    path = _local(typed)
    if path is not None and path.is_file():
        return Source(typed, path.parent, None, None, path.name)
    if path is not None:
        return Source(typed, path, None, None)
    repo, revision = _hub_id(typed)
    folder = _fetch(repo, revision, companions)
    return Source(typed, folder, repo, folder.name)  # the cache names a snapshot's folder after its commit


def _local(typed: str) -> Path | None:
    """Return the folder or file `typed` names, None where nothing exists by that name."""
    if not typed:
        return None
    try:
        path = Path(typed).expanduser()
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path
        if not stat.S_ISDIR(mode):
            raise CheckpointError(f"{typed!r} is neither a folder nor a file: give the folder of a checkpoint.")
        next(path.iterdir(), None)  # needs the right to list
        with suppress(FileNotFoundError):
            (path / CONFIG).stat()  # needs the right to traverse
    except PermissionError as error:
        raise CheckpointError(
            f"no permission to read the folder {typed!r}: ask its owner for read and search rights (chmod u+rx)."
        ) from error
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(f"{typed!r} is a link to {str(path.readlink())!r}, which does not exist.") from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody-here, a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"no such folder {typed!r} ({reason}): check the path.") from error
    return path


def _hub_id(typed: str) -> tuple[str, str | None]:
    """Split `org/name@revision`, refusing what can only have been meant as a path."""
    repo, at, revision = typed.partition("@")
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise CheckpointError(
            f"no such folder {typed!r}: check the path (a hub id is name or org/name, with an optional @revision)."
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(
            f"no such folder {typed!r}, and {revision!r} is no revision of a hub id: "
            "write a branch, tag or commit after the @."
        )
    return repo, revision if at else None


def _fetch(repo: str, revision: str | None, companions: bool) -> Path:
    """Return the snapshot folder: from the hub, or from its cache where the hub is out of reach."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return _download(repo, revision, companions)
    # RuntimeError is what hf_xet raises, ValueError what comes of an answer that is no JSON.
    except (_http_error(), OSError, RuntimeError, ValueError) as error:
        if _is_away(error):
            folder = _cached(repo, revision, companions)
            if folder is not None:
                if not is_offline_mode():
                    _log.warning("The hub cannot be reached: using the cached copy %s of %s.", folder.name[:12], repo)
                return folder
        raise _explain(error, repo, revision) from error


def _download(repo: str, revision: str | None, companions: bool) -> Path:
    """Fetch what `_wanted` names at the commit that `revision` is now."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
    if info.sha is None:
        raise ValueError("no commit in the answer")
    sha = info.sha
    names = [sibling.rfilename for sibling in info.siblings or []]

    def read_index(name: str) -> bytes:
        return Path(hf_hub_download(repo, name, revision=sha)).read_bytes()

    wanted = _wanted(repo, names, companions, read_index)
    # The patterns are matched by fnmatch: a bracket in a file's name must stand for itself.
    folder = Path(snapshot_download(repo, revision=sha, allow_patterns=[glob.escape(name) for name in wanted]))
    # A fetch by sha leaves no note of what the branch or tag was; one by name does, for a later run without network.
    hf_hub_download(repo, wanted[0], revision=revision or "main")
    if missing := _missing(folder, wanted):
        raise ConnectionError(f"{missing[0]} did not arrive")
    return folder


def _cached(repo: str, revision: str | None, companions: bool) -> Path | None:
    """Return the cached snapshot that `revision` was when last seen, None where it is not there as a whole."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[CONFIG], local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    try:
        names = [file.path for file in get_cached_repo_tree(repo, revision=folder.name)]
    except CachedRepoTreeNotFoundError:  # fetched file by file, by another program
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        wanted = _wanted(repo, names, companions, lambda name: (folder / name).read_bytes())
    except (HubError, FileNotFoundError):  # its weights were never fetched
        return None
    return None if _missing(folder, wanted) else folder


def _missing(folder: Path, wanted: Collection[str]) -> list[str]:
    return [name for name in wanted if not (folder / name).is_file()]


def _wanted(repo: str, names: Collection[str], companions: bool, read_index: Callable[[str], bytes]) -> list[str]:
    """Choose among a repository's files `names`: the weights, config.json and, where asked for, the companions.

    `read_index` is called only where there is an index.
    """
    choice = choose(names, f"the hub repository {repo!r}", HubError)
    weights = list(choice.files)
    if choice.index:
        weights = [choice.index, *_shards(repo, choice.index, read_index(choice.index), names)]
    if companions and CONFIG not in names and not FORMATS[choice.format].borrows:
        raise HubError(f"the hub repository {repo!r} has no {CONFIG}, so nothing could load the result: add it there.")
    beside = (name for name in names if name == CONFIG or (companions and travels(name)))
    return list(dict.fromkeys([*weights, *beside]))


def _shards(repo: str, index: str, text: bytes, names: Collection[str]) -> list[str]:
    """Return the shards an index names, each once, refusing any that lies outside the repository."""
    try:
        shards = list(dict.fromkeys(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} of {repo!r} has no readable weight_map: ask its owner to upload it again."
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or {"/", "\\", "\0"} & set(shard):
            raise CheckpointError(
                f"{index} of {repo!r} names {shard!r}, which is not a file beside it: refused, ask its owner."
            )
        if shard not in names:
            raise CheckpointError(
                f"{index} of {repo!r} names the shard {shard!r}, which the repository does not have: "
                "ask its owner to complete the upload."
            )
    if not shards:
        raise CheckpointError(f"{index} of {repo!r} names no shard: ask its owner to complete the upload.")
    return shards


def _is_away(error: Exception) -> bool:
    """Say whether the hub could not be asked, as against having said no."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(
        error, (_http_error(), LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    )


def _http_error() -> type[Exception]:
    """Return the base of the hub library's network errors, its own and those of httpx or httpx2 beneath it."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def _explain(error: Exception, repo: str, revision: str | None) -> HubError:
    """Turn what the hub library raised into one sentence with the way out."""
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    at = "" if revision is None else f"@{revision}"
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, its base
        said = (
            f"the hub repository {repo!r} is gated: accept its licence on its page, then log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    elif isinstance(error, RepositoryNotFoundError):
        said = (
            f"there is no folder {repo + at!r} here and no hub repository {repo!r} that you may see: check the name, "
            "or if it is private log in with `hf auth login` or set HF_TOKEN."
        )
    elif isinstance(error, RevisionNotFoundError):
        said = f"the hub repository {repo!r} has no revision {revision!r}: give a branch, tag or commit that it has."
    elif full:
        said = (
            f"disk full while fetching {repo!r} into {HF_HUB_CACHE}: free some space, "
            "or set HF_HOME to a folder on a larger disk."
        )
    elif isinstance(error, PermissionError):
        said = f"no permission to write to the hub cache {HF_HUB_CACHE}: set HF_HOME to a folder of your own."
    elif is_offline_mode():
        said = (
            f"there is no folder {repo + at!r} here, and HF_HUB_OFFLINE is set while no complete copy of it is in the "
            f"cache {HF_HUB_CACHE}: unset HF_HUB_OFFLINE, or give a local folder."
        )
    elif isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        said = f"the hub refused your token for {repo!r}: log in again with `hf auth login` or correct HF_TOKEN."
    elif isinstance(error, HfHubHTTPError):
        said = (
            f"the hub answered {error.response.status_code} for {repo + at!r}, and no complete copy is in the cache: "
            "try again later, or give a local folder."
        )
    elif _is_away(error):
        said = (
            f"there is no folder {repo + at!r} here, and the hub cannot be reached while no complete copy of it is "
            "in the cache: check the network and HF_ENDPOINT, or give a local folder."
        )
    else:
        reason = (str(error).splitlines() or [""])[0]
        said = (
            f"fetching {repo + at!r} from the hub broke off ({type(error).__name__}: {reason}): "
            "check HF_ENDPOINT and proxies and run it again; what has arrived is kept."
        )
    return HubError(said)
