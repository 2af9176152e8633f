"""The hidden folder of a training beside its output, `.NAME.surgery-train`, so that the result appears whole or not at all.

    settings.json    what the run is; the lock that keeps other runs out
    round-1/…        what the trainer saves to continue from (--save-every)
    result/          what becomes the output

It goes away with the run, unless the run broke off and there is something to continue from.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.checkpoint.beside import Beside
from surgery.checkpoint.durable import explained, sync_file, sync_folder, tried
from surgery.checkpoint.output import appear, tidy
from surgery.errors import OutputError
from surgery.interrupt import postponed, uninterrupted
from surgery.train.settings import NEUTRAL

STATE = "trainer_state.json"


class Work:
    """The folder, from the first check to the result.

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
        self.place = Beside(out, "surgery-train", "settings.json")
        self.usual = self.place.folder
        self.identity = json.loads(json.dumps(identity))
        self.left: list[str] = []

    @property
    def folder(self) -> Path:
        """Where the trainer saves."""
        return self.place.folder

    @property
    def result(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "result"

    def __enter__(self) -> Work:
        if not self.leader:
            return self
        kept = False
        try:
            with explained(self.folder), postponed():
                text = self.place.take()
                kept = bool(text) and self.resume
                if self.folder != self.usual:  # where the other processes of a run would not find it
                    raise OutputError(
                        f"{self.usual}: is there, and is not surgery's. Move it away, or choose another `out`."
                    )
                self._begin(text)
        except BaseException:
            if kept:
                self.place.release()
            else:
                self.left += self.place.remove()
            raise
        return self

    def _begin(self, text: bytes) -> None:
        self.resume = self.resume and bool(text)  # there is nothing to resume in a new folder
        if self.resume:
            try:
                found = json.loads(text)["settings"]
                changed = {key for key in found | self.identity if found.get(key) != self.identity.get(key)}
            except (ValueError, TypeError, AttributeError, KeyError):
                raise OutputError(f"{self.folder}: its settings.json is damaged. Remove the folder.") from None
            changed -= {name.replace("_", "-") for name in NEUTRAL}
            if changed:
                raise OutputError(
                    f"{self.out}: `resume` needs the run that broke off, but this one differs in {', '.join(sorted(changed))}. "
                    "Repeat that command, or start afresh without `resume`."
                )
            self.place.clear(keep=[path.name for path in self.folder.iterdir() if path != self.result])
        else:
            self.place.clear()
            self.place.begin(settings=self.identity)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.leader:
            return
        with uninterrupted():
            if kind is None or self.last() is None:
                self.left += self.place.remove()
            self.place.release()

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
        """Make the result durable and let it appear. After that nothing fails: what cannot be removed is in `left`."""
        with explained(self.folder):
            for path in sorted(self.result.rglob("*")):
                if path.is_file():
                    sync_file(path)
                else:
                    sync_folder(path)
            sync_folder(self.result)
            with uninterrupted():
                old = appear(self.result, self.out, replace=self.replace)
                tried(lambda: sync_folder(self.out.parent), "")
                self.left += tidy(self.out, old)


def _complete(state: Path) -> bool:
    """Whether the trainer wrote a whole state; it writes this file last."""
    try:
        return isinstance(json.loads(state.read_bytes()), dict)
    except (OSError, ValueError):
        return False
