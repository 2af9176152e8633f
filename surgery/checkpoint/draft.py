"""The output while it is being written: it appears at once or not at all.

A run fills a hidden folder beside the output, `.NAME.surgery-draft` (see `surgery.checkpoint.beside`), and renames it when
everything in it is on disk. Until then its shards have no header, so that no loader accepts them: headers are written last, when
the report is in place, and are the first thing that a resumed run takes away. The folder's marker is a journal that says which
tensors are complete and durable: a tensor is entered after its bytes were synced, so that a killed run, or a machine that lost
power, can be resumed where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.checkpoint.beside import Beside
from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.durable import explained, same_file, sync_file, sync_folder, tried
from surgery.checkpoint.formats.safetensors import encode_header
from surgery.checkpoint.listing import JOURNAL, REPORT, listing
from surgery.checkpoint.output import appear, tidy
from surgery.checkpoint.tensor import Tensor
from surgery.errors import OutputError
from surgery.interrupt import postponed, uninterrupted
from surgery.text import dumps

SYNC_SECONDS = 0.5
WRITE_BYTES = 1 << 20
UNREADABLE = bytes(8)  # in place of a header's length


class Draft:
    """The folder that becomes the output.

    Entering it makes or resumes the folder; leaving it without `commit` removes it, so that an error or Ctrl-C leaves nothing
    behind.

    Args:
        out: the output folder, checked.
        shards: for each file name, its tensors in the order of their data, and the header's metadata.
        identity: what the run is: inputs, method, options. A draft is resumed only by the same run, but for its "command".
        resume: continue the draft of a killed run.
        replace: a folder that is at `out` in the end may be replaced.
        extra: bytes of the files that `commit` will add.

    Raises:
        OutputError: another run writes it, it cannot be resumed, or the disk is too small or not writable.
    """

    def __init__(
        self,
        out: Path,
        shards: Mapping[str, tuple[Sequence[Tensor], dict[str, str]]],
        identity: Mapping[str, Any],
        *,
        resume: bool,
        replace: bool = False,
        extra: int = 0,
    ) -> None:
        self.out, self.replace = out, replace
        self.place = Beside(out, "surgery-draft", JOURNAL)
        self.identity = json.loads(json.dumps(identity))
        self.headers: dict[str, bytes] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.sizes: dict[str, int] = {}
        for name, (tensors, metadata) in shards.items():
            self.headers[name], begins = encode_header(tensors, metadata)
            self.places |= {tensor: (name, begin) for tensor, begin in begins.items()}
            self.sizes[name] = len(self.headers[name]) + sum(tensor.nbytes for tensor in tensors)
        self.done: dict[str, dict[str, Any]] = {}
        self.files: dict[str, int] = {}
        self.locks = {name: threading.Lock() for name in shards}
        self.pending: list[tuple[str, dict[str, Any]]] = []
        self.left: list[str] = []
        self.stop = threading.Event()
        self.failure: Exception | None = None
        self.committed = self.kept = False
        self.resume, self.extra = resume, extra
        self.syncer = threading.Thread(target=self._sync_now_and_then, daemon=True)

    @property
    def folder(self) -> Path:
        """The folder that becomes the output."""
        return self.place.folder

    def __enter__(self) -> Draft:
        try:
            # Ctrl-C waits until it is known what there is to remove.
            with explained(self.folder), postponed():
                self._begin(self.place.take())
                self._open_shards()
                self.syncer.start()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with uninterrupted():
            self._stop_syncer()
            if self.committed:
                return
            left = [] if self.kept else self.place.remove()
            self._close()
            if left and isinstance(error, OutputError):
                error.args = (f"{error} {left[0]}",)

    def sink(self, name: str) -> Sink:
        """Return where to write the bytes of a tensor."""
        shard, begin = self.places[name]
        return Sink(self.files[shard], begin, self.locks[shard])

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Enter a tensor whose bytes were all written, with what the report says of it."""
        if self.failure is not None:
            raise self.failure
        self.done[name] = record
        self.pending.append((name, record))

    def commit(
        self, files: Mapping[str, bytes], copies: Mapping[str, Path], report: dict[str, Any] | None = None
    ) -> None:
        """Add headers, files and copies, make everything durable, and let the output appear.

        Args:
            files: name in the output, which may have a folder in it -> content.
            copies: likewise -> file to copy.
            report: what becomes the output's report; gets the list of the output's files.
        """
        self._stop_syncer()
        with explained(self.folder):
            if self.failure is not None:
                raise self.failure
            if not self.place.stands():
                raise OutputError(f"{self.folder}: was removed while surgery wrote into it. Run it again.")
            for name, path in copies.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                sync_file(target)
            for name, content in files.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                sync_file(target)
            if report is not None:
                report["files"] = listing(self.folder)
                (self.folder / REPORT).write_bytes(dumps(report))
                sync_file(self.folder / REPORT)
            for folder in sorted({(self.folder / name).parent for name in (*copies, *files, REPORT)}):
                sync_folder(folder)
            for name, header in self.headers.items():
                _write(self.files[name], header, 0)
                os.fsync(self.files[name])
                if not same_file(self.files[name], self.folder / name):
                    raise OutputError(f"{self.folder / name}: was removed while surgery wrote it. Run it again.")
            with uninterrupted():
                old = appear(self.folder, self.out, replace=self.replace)
                self.committed = True
                self._tidy(old)

    def _tidy(self, old: Path | None) -> None:
        """Remove what the output does not need; nothing in here may fail, since the output has appeared."""
        journal = self.out / JOURNAL
        # Only now: until the folder has its name, the journal's lock keeps other runs out of it.
        self.left += tried(journal.unlink, f"{journal}: is no part of the output, and could not be removed")
        tried(lambda: sync_folder(self.out), "")
        tried(lambda: sync_folder(self.out.parent), "")
        tried(self._close, "")
        self.left += tidy(self.out, old)

    def _begin(self, journal: bytes) -> None:
        """Continue what the journal tells of, or start afresh."""
        if journal and self.resume:
            first, *lines = journal.split(b"\n")
            found = json.loads(first)
            found = {key: value for key, value in found.items() if key not in ("surgery", "output")}
            changed = {key for key in found | self.identity if found.get(key) != self.identity.get(key)} - {"command"}
            if changed:
                self.kept = True
                raise OutputError(
                    f"{self.out}: `resume` needs the run that was stopped, but this one differs in "
                    f"{', '.join(sorted(changed))}. Repeat that command, or start afresh without `resume`."
                )
            if self._without_headers():
                self.identity = found
                records, size = _records(lines)
                self.done = {name: record for name, record in records.items() if name in self.places}
                self.place.clear(keep=self.sizes)
                self.place.cut(len(first) + 1 + size)
                return
        self.place.clear()
        self.place.begin(**self.identity)

    def _without_headers(self) -> bool:
        """Take the headers of a killed run's shards away, before anything else; False if a shard cannot be trusted."""
        for name in self.sizes:
            try:
                file = self.place.open(name, os.O_RDWR)
            except FileNotFoundError:
                continue
            except OSError:
                return False
            try:
                _write(file, UNREADABLE, 0)
                os.fsync(file)
            finally:
                os.close(file)
        return True

    def _open_shards(self) -> None:
        for name in self.sizes:
            self.files[name] = self.place.open(name, os.O_RDWR | os.O_CREAT)
        written = sum(os.fstat(file).st_blocks * 512 for file in self.files.values())
        needed, free = sum(self.sizes.values()) + self.extra, shutil.disk_usage(self.folder).free
        if needed > free + written:
            raise OutputError(
                f"{self.out}: the disk has {free + written:,} bytes free, the output needs {needed:,}. Make room or choose "
                "another `out`."
            )
        for name, size in self.sizes.items():
            os.ftruncate(self.files[name], size)

    def _sync_now_and_then(self) -> None:
        while not self.stop.wait(SYNC_SECONDS):
            try:
                self._sync()
            except Exception as error:  # the caller hears of it in `finish` or `commit`
                self.failure = error
                return

    def _sync(self) -> None:
        count = len(self.pending)
        entries, self.pending[:count] = self.pending[:count], []
        if entries:
            for name in {self.places[tensor][0] for tensor, _ in entries}:
                os.fsync(self.files[name])
            self._enter(entries)

    def _enter(self, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
        lines = [{"tensor": name, "record": record} for name, record in entries]
        self.place.append(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def _stop_syncer(self) -> None:
        self.stop.set()
        if self.syncer.is_alive():
            self.syncer.join()

    def _close(self) -> None:
        files, self.files = self.files, {}
        for file in files.values():
            tried(partial(os.close, file), "")
        self.place.release()


class Sink:
    """The place of one tensor in its shard."""

    def __init__(self, file: int, begin: int, lock: threading.Lock) -> None:
        self.file, self.begin, self.lock = file, begin, lock
        self.checksum = Checksum()

    def write(self, offset: int, data: Any) -> None:
        """Put bytes at an offset from the tensor's first byte; each byte once."""
        view = memoryview(data).cast("B")
        self.checksum.add(offset, view)
        # One writer a file: the kernel's own lock would let the others spin.
        for start in range(0, len(view), WRITE_BYTES):
            with self.lock:
                _write(self.file, view[start : start + WRITE_BYTES], self.begin + offset + start)


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def _records(lines: list[bytes]) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the journal's entries up to the first line that was cut short, and how many bytes they take."""
    records, size = dict[str, dict[str, Any]](), 0
    for line in lines[:-1]:
        try:
            entry = json.loads(line)
            records[entry["tensor"]] = entry["record"]
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        size += len(line) + 1
    return records, size
