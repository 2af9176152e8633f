"""The output while it is being written: it appears at once or not at all.

A run fills a hidden sibling of the output folder, `.NAME.surgery-draft`, and renames it when everything in it is on disk. Until
then its shards have no header, so that no loader accepts them. A journal says which tensors are complete and durable: a tensor
is entered after its bytes were synced, so a killed run, or a machine that lost power, can be resumed where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.durable import (
    explained,
    lock,
    postponed,
    same_file,
    sync_file,
    sync_folder,
    uninterrupted,
)
from surgery.checkpoint.formats.safetensors import encode_header
from surgery.checkpoint.listing import JOURNAL, REPORT, listing
from surgery.checkpoint.output import appear, tidy
from surgery.checkpoint.tensor import Tensor
from surgery.errors import OutputError
from surgery.text import dumps

SYNC_SECONDS = 0.5
WRITE_BYTES = 1 << 20


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
        self.folder = out.with_name(f".{out.name}.surgery-draft")
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
        self.made: list[Path] = []
        self.left: list[str] = []
        self.stop = threading.Event()
        self.failure: OSError | None = None
        self.locked = self.committed = False
        self.resume, self.extra = resume, extra
        self.syncer = threading.Thread(target=self._sync_now_and_then, daemon=True)

    def __enter__(self) -> Draft:
        try:
            # Ctrl-C waits until it is known what there is to remove.
            with explained(self.folder), postponed():
                self._make_folder()
                self._open_journal(self.resume)
                self._open_shards(self.extra)
                self.syncer.start()
        except BaseException:
            self._stop_syncer()
            self._discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self._stop_syncer()
            if not self.committed:
                self._discard()

    def sink(self, name: str) -> Sink:
        """Where the bytes of a tensor go."""
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
            for name, header in self.headers.items():
                _write(self.files[name], header, 0)
                os.fsync(self.files[name])
                if not same_file(self.files[name], self.folder / name):
                    raise OutputError(f"{self.folder / name}: was removed while surgery wrote it. Run it again.")
            sync_folder(self.folder)
            with uninterrupted():
                self._appear()

    def _appear(self) -> None:
        old = appear(self.folder, self.out, replace=self.replace)
        self.committed = True
        # Only now: until the folder has its name, the journal's lock keeps other runs out of it.
        with contextlib.suppress(OSError):
            (self.out / JOURNAL).unlink()
            sync_folder(self.out)
            sync_folder(self.out.parent)
        self._close()
        self.left = tidy(self.out, old)

    def _make_folder(self) -> None:
        missing = self.folder.parent
        while not missing.exists():
            self.made.append(missing)
            missing = missing.parent
        self.folder.mkdir(parents=True, exist_ok=True)

    def _open_journal(self, resume: bool) -> None:
        path = self.folder / JOURNAL
        # "a" creates without truncating: the lock comes before the first change.
        journal = path.open("a+b")
        if not lock(journal.fileno()) or not same_file(journal.fileno(), path):
            journal.close()
            raise OutputError(f"{self.out}: another surgery run is writing it. Wait for it or choose another `out`.")
        self.journal, self.locked = journal, True
        self.journal.seek(0)
        lines = self.journal.read().split(b"\n")
        try:
            found, records = json.loads(lines[0]), _records(lines[1:])
        except ValueError:
            found, records = None, {}
        resume = resume and isinstance(found, dict)
        if resume:
            changed = {key for key in found | self.identity if found.get(key) != self.identity.get(key)} - {"command"}
            if changed:
                self.journal.close()
                self.locked = False
                raise OutputError(
                    f"{self.out}: `resume` needs the run that was stopped, but this one differs in "
                    f"{', '.join(sorted(changed))}. Repeat that command, or start afresh without `resume`."
                )
            self.identity = found
            self.done = {name: record for name, record in records.items() if name in self.places}
        for leftover in self.folder.iterdir():
            if leftover.name != JOURNAL and not (resume and leftover.name in self.sizes):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.journal.truncate(0)
        self._enter([(name, record) for name, record in self.done.items()], identity=True)

    def _open_shards(self, extra: int) -> None:
        for name in self.sizes:
            self.files[name] = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        written = sum(os.fstat(file).st_blocks * 512 for file in self.files.values())
        needed, free = sum(self.sizes.values()) + extra, shutil.disk_usage(self.folder).free
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
            except OSError as error:
                self.failure = error
                return

    def _sync(self) -> None:
        count = len(self.pending)
        entries, self.pending[:count] = self.pending[:count], []
        if entries:
            for name in {self.places[tensor][0] for tensor, _ in entries}:
                os.fsync(self.files[name])
            self._enter(entries)

    def _enter(self, entries: Sequence[tuple[str, dict[str, Any]]], *, identity: bool = False) -> None:
        lines = [self.identity] if identity else []
        lines += [{"tensor": name, "record": record} for name, record in entries]
        self.journal.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def _stop_syncer(self) -> None:
        self.stop.set()
        if self.syncer.is_alive():
            self.syncer.join()

    def _close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files = {}
        self.journal.close()

    def _discard(self) -> None:
        """Remove what this run made; nothing where another run holds the draft."""
        with uninterrupted():
            if self.locked:
                shutil.rmtree(self.folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # of lines that a full disk refused before, and refuses again
                    self._close()
            for folder in (self.folder, *self.made):
                with contextlib.suppress(OSError):
                    folder.rmdir()


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


def _records(lines: list[bytes]) -> dict[str, dict[str, Any]]:
    """The journal's entries up to the first line that was cut short."""
    records = {}
    for line in lines:
        try:
            entry = json.loads(line)
            records[entry["tensor"]] = entry["record"]
        except (ValueError, KeyError, TypeError):
            break
    return records
