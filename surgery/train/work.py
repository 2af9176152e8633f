"""The hidden folder of a training beside its output, `.NAME.surgery-train`, so that the result appears whole or not at all.

    settings.json    what the run is; the lock that keeps other runs out
    round-1/…        what the trainer saves to continue from (--save-every)
    result/          what becomes the output

It goes away with the run, unless the run broke off and there is something to continue from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.checkpoint.durable import explained, lock, same_file, sync_file, sync_folder, uninterrupted
from surgery.checkpoint.output import appear, tidy
from surgery.errors import OutputError
from surgery.train.settings import NEUTRAL

STATE = "trainer_state.json"


class Work:
    """The folder, used from the first check to the result.

    Args:
        out: the output folder, checked.
        identity: the settings; a run is resumed only by the same.
        resume: continue a run that broke off.
        replace: a checkpoint at `out` may be replaced.
        leader: this is the process that writes; the others of a distributed run only look.

    Raises:
        OutputError: another run is there, or it cannot be resumed.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], *, resume: bool, replace: bool, leader: bool = True
    ) -> None:
        self.out, self.resume, self.replace, self.leader = out, resume, replace, leader
        self.folder = out.with_name(f".{out.name}.surgery-train")
        self.result = self.folder / "result"
        self.identity = json.loads(json.dumps(identity))

    def __enter__(self) -> Work:
        if not self.leader:
            return self
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "settings.json"
            self.file = path.open("a+", encoding="utf-8")
            if not lock(self.file.fileno()) or not same_file(self.file.fileno(), path):
                self.file.close()
                raise OutputError(f"{self.out}: another surgery run is writing it. Wait or choose another `out`.")
            try:
                self._begin()
            except BaseException:
                self.file.close()
                raise
        return self

    def _begin(self) -> None:
        self.file.seek(0)
        text = self.file.read()
        if not text and not any(path.name != "settings.json" for path in self.folder.iterdir()):
            self.resume = False  # a new folder
        if self.resume:
            try:
                found = json.loads(text)
                changed = {key for key in found | self.identity if found.get(key) != self.identity.get(key)}
            except (ValueError, TypeError, AttributeError):
                raise OutputError(f"{self.folder}: its settings.json is damaged. Remove the folder.") from None
            changed -= {name.replace("_", "-") for name in NEUTRAL}
            if changed:
                raise OutputError(
                    f"{self.out}: `resume` needs the run that broke off, but this one differs in {', '.join(sorted(changed))}. "
                    "Repeat that command, or start afresh without `resume`."
                )
        for path in self.folder.iterdir():
            if path.name != "settings.json" and not (self.resume and path != self.result):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.file.truncate(0)
        self.file.write(json.dumps(self.identity))
        self.file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.leader:
            return
        with uninterrupted():
            self.file.close()
            if kind is None or self.last() is None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def round(self, number: int) -> Path:
        """The folder in which the trainer of a round saves; rounds are counted from 1."""
        return self.folder / f"round-{number}"

    def saved(self, number: int) -> Path | None:
        """The last complete state of a round."""
        found = [
            (int(path.name.rpartition("-")[2]), path)
            for path in self.round(number).glob("checkpoint-*")
            if path.name.rpartition("-")[2].isdigit() and _complete(path / STATE)
        ]
        return max(found)[1] if found else None

    def last(self) -> Path | None:
        """The last complete state of all rounds."""
        rounds = sorted(int(path.name[6:]) for path in self.folder.glob("round-*"))
        return next((saved for number in reversed(rounds) if (saved := self.saved(number))), None)

    def finish(self) -> None:
        """Move the result to the output."""
        with explained(self.folder):
            for path in sorted(self.result.rglob("*")):
                if path.is_file():
                    sync_file(path)
            sync_folder(self.result)
            with uninterrupted():
                old = appear(self.result, self.out, replace=self.replace)
                sync_folder(self.out.parent)
                tidy(self.out, old)


def _complete(state: Path) -> bool:
    """Whether the trainer wrote a whole state; it writes this file last."""
    try:
        return isinstance(json.loads(state.read_bytes()), dict)
    except (OSError, ValueError):
        return False
