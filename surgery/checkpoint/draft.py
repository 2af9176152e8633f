"""The output while it is being written: it appears at once or not at all.

A run fills a hidden folder beside the output, `.NAME.surgery-draft` (see `surgery.checkpoint.beside`), and renames it when
everything in it is on disk. Until then its shards have no header, so that no loader accepts them: headers are written last, when
the report is in place, and are the first thing that a resumed run takes away. The folder's marker is a journal that says which
tensors are complete and durable: a tensor is entered after its bytes were synced, so that a killed run, or a machine that lost
power, can be resumed where it stopped. Several processes may fill one folder, each with a journal of its own
(`surgery.checkpoint.part`): the marker then says what the run is, and gets their entries when all have come.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.checkpoint.beside import Beside
from surgery.checkpoint.durable import append, explained, lock, same_file, sync_file, sync_folder, tried
from surgery.checkpoint.formats.safetensors import encode_header
from surgery.checkpoint.listing import JOURNAL, REPORT, listing
from surgery.checkpoint.output import appear, tidy
from surgery.checkpoint.part import Part
from surgery.checkpoint.sink import Sink, write_at
from surgery.checkpoint.tensor import Tensor
from surgery.errors import OutputError
from surgery.interrupt import postponed, uninterrupted
from surgery.text import dumps

SYNC_SECONDS = 0.5
UNREADABLE = bytes(8)  # in place of a header's length
PART = re.compile(r"surgery-journal-[0-9]+-of-[0-9]+\.jsonl")
COMPLETE = b'{"complete": true}\n'  # the last line of a part's journal


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
        part: the share of this process, if it is not alone. Without `complete`, what is its own in the folder is removed.

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
        part: Part | None = None,
    ) -> None:
        self.out, self.replace, self.part = out, replace, part
        self.place = Beside(out, "surgery-draft", JOURNAL, shared=part is not None)
        self.journal: int | None = None  # of a part
        self.waiting: list[Part] = []
        self.identity = json.loads(json.dumps(identity))
        self.headers: dict[str, bytes] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.sizes: dict[str, int] = {}
        for name, (tensors, metadata) in shards.items():
            self.headers[name], begins = encode_header(tensors, metadata)
            self.places |= {tensor: (name, begin) for tensor, begin in begins.items()}
            self.sizes[name] = len(self.headers[name]) + sum(tensor.nbytes for tensor in tensors)
        # The files that this process writes.
        self.own = list(self.sizes) if part is None else part.files(self.sizes)
        self.done: dict[str, dict[str, Any]] = {}
        self.files: dict[str, int] = {}
        self.locks = {name: threading.Lock() for name in shards}
        self.pending: list[tuple[str, dict[str, Any]]] = []
        self.left: list[str] = []
        self.stop = threading.Event()
        self.failure: Exception | None = None
        self.committed = self.kept = self.merged = False
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
                found = self.place.take()
                if self.part is None:
                    self._begin(found)
                else:
                    self._join(found, self.part)
                self._open_shards(self.own)
                if self.part is not None:
                    self.place.let_others()
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
            left = [] if self.kept else self.place.remove() if self.part is None else self._leave(self.part)
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

    def remaining(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors that this process has yet to write."""
        return [name for name in names if name not in self.done and self.places[name][0] in self.own]

    def complete(self) -> bool:
        """Make what this process wrote durable, when all its tensors are finished.

        Returns:
            Whether it has to `commit`: it is alone, or the last part. Else `waiting` has the parts that are outstanding; none if
            another process has just let the output appear.
        """
        if self.part is None:
            return True
        self._stop_syncer()
        with explained(self.folder):
            if self.failure is not None:
                raise self.failure
            self._sync()
            assert self.journal is not None
            append(self.journal, COMPLETE)
            if not self.place.take_again():
                self.kept = True
                return False
            if not self.merged:
                journals = {part: self.place.read(part.journal) for part in self.part.all}
                self.waiting = [part for part, content in journals.items() if not content.endswith(COMPLETE)]
                if self.waiting:
                    self.kept = True
                    self.place.let_others()
                    return False
                for content in journals.values():
                    self.done |= _records(content.split(b"\n"))[0]
                # From here on the draft is that of one process.
                self.place.cut(self.place.read(JOURNAL).index(b"\n") + 1)
                self._enter(list(self.done.items()), None)
            self.place.clear(keep=self.sizes)
            self._open_shards([name for name in self.sizes if name not in self.files])
        return True

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
                write_at(self.files[name], header, 0)
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
        self._check_parts()
        if journal and self.resume:
            first, *lines = journal.split(b"\n")
            found, changed = self._told(first)
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

    def _told(self, first: bytes) -> tuple[dict[str, Any], set[str]]:
        """The identity in a journal's first line, and in what it differs from this run's."""
        found = json.loads(first)
        found = {key: value for key, value in found.items() if key not in ("surgery", "output")}
        return found, {key for key in found | self.identity if found.get(key) != self.identity.get(key)} - {"command"}

    def _join(self, journal: bytes, part: Part) -> None:
        """Begin the draft of several processes, or join it, and continue this one's part or start it afresh."""
        first, *lines = journal.split(b"\n")
        found, changed = self._told(first) if journal else ({}, set())
        if changed and self.resume:
            self.kept = True
            raise OutputError(
                f"{self.out}: `resume` needs the run that was stopped, but this one differs in "
                f"{', '.join(sorted(changed))}. Repeat that command, or start afresh without `resume`."
            )
        records, _ = _records(lines)
        whole = bool(journal) and records.keys() >= self.places.keys()
        if not journal or changed or (whole and not self.resume):
            self._check_parts()
            self.place.clear()
            self.place.begin(**self.identity)
            records, whole = {}, False
        else:
            self.identity = found
        self.journal = self.place.open(part.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if not lock(self.journal):
            self.kept = True
            raise OutputError(f"{self.out}: another process writes part {part} of it. Give each a part of its own.")
        if not self._without_headers():
            raise OutputError(f"{self.folder}: holds a shard that is no file of surgery's own. Remove the folder.")
        self.merged = whole
        if not whole:
            own, size = _records(self.place.read(part.journal).split(b"\n")) if self.resume else ({}, 0)
            os.ftruncate(self.journal, size)
            records = own
        self.done = {name: record for name, record in records.items() if name in self.places}

    def _check_parts(self) -> None:
        """Raise OutputError while other processes write parts into the folder."""
        for name in self.place.names():
            if PART.fullmatch(name):
                file = self.place.open(name, os.O_RDWR)
                try:
                    if not lock(file):
                        self.kept = True
                        raise OutputError(
                            f"{self.out}: another surgery run is writing it. Wait for it or choose another `out`."
                        )
                finally:
                    os.close(file)

    def _leave(self, part: Part) -> list[str]:
        """Remove what is this part's own; the folder too, if no other part has anything in it."""
        if self.journal is None or not self.place.take_again():
            return []
        if any(PART.fullmatch(name) and name != part.journal for name in self.place.names()):
            for name in (*self.own, part.journal):
                tried((self.folder / name).unlink, "")
            return []
        return self.place.remove()

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
                write_at(file, UNREADABLE, 0)
                os.fsync(file)
            finally:
                os.close(file)
        return True

    def _open_shards(self, names: Collection[str]) -> None:
        for name in names:
            self.files[name] = self.place.open(name, os.O_RDWR | os.O_CREAT)
        written = sum(os.fstat(self.files[name]).st_blocks * 512 for name in names)
        needed, free = sum(self.sizes[name] for name in names) + self.extra, shutil.disk_usage(self.folder).free
        if needed > free + written:
            raise OutputError(
                f"{self.out}: the disk has {free + written:,} bytes free, the output needs {needed:,}. Make room or choose "
                "another `out`."
            )
        for name in names:
            os.ftruncate(self.files[name], self.sizes[name])

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
            self._enter(entries, self.journal)

    def _enter(self, entries: Sequence[tuple[str, dict[str, Any]]], journal: int | None) -> None:
        """Add entries to a part's journal, or to the draft's."""
        lines = [{"tensor": name, "record": record} for name, record in entries]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if journal is None:
            self.place.append(content)
        else:
            append(journal, content)

    def _stop_syncer(self) -> None:
        self.stop.set()
        if self.syncer.is_alive():
            self.syncer.join()

    def _close(self) -> None:
        files, self.files = self.files, {}
        journal, self.journal = self.journal, None
        for file in (*files.values(), *(() if journal is None else (journal,))):
            tried(partial(os.close, file), "")
        self.place.release()


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
