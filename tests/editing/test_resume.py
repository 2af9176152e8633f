"""A killed run: nothing that a loader would accept is left, and `--resume` brings the bytes of a run that was never killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.checkpoints import fine_tuned, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.command import SLOW, contents, is_one_sentence, surgery
from helpers.outputs import as_output
from safetensors import SafetensorError, safe_open

from surgery.checkpoint.listing import REPORT

JOURNAL = "surgery-journal.jsonl"
ENVIRONMENT = {**os.environ, "SURGERY_KERNELS": "numpy", "PYTHONPATH": str(Path(__file__).parents[2])}
# method -> options
RUNS = {
    "fapm": ["--sparsity", "0.8"],
    "hma": ["--ratios", "0.3,0.1"],
    "half-reset": ["--seed", "4"],
    "ties": ["--ft", "pre"],
}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of 40 MB, which keeps one worker busy for a while."""
    root = tmp_path_factory.mktemp("big")
    pre = tiny_llama(layers=6, width=512)
    write_checkpoint(root / "pre", pre, shards=3)
    write_checkpoint(root / "ft", fine_tuned(pre), shards=3)
    (root / "ft/tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def root(big: Path) -> Iterator[Path]:
    yield big
    for path in big.iterdir():
        if path.name not in ("pre", "ft"):
            shutil.rmtree(path)


def words(method: str, *more: str) -> list[str]:
    return [method, "--pre", "pre", "--ft", "ft", "--out", "out", "--workers", "1", *RUNS[method], *more]


def draft(root: Path) -> Path:
    return root / ".out.surgery-draft"


def journal(root: Path) -> list[bytes]:
    try:
        return (draft(root) / JOURNAL).read_bytes().splitlines()
    except FileNotFoundError:
        return []


def killed(root: Path, command: list[str], lines: int, delay: float = 0.0) -> None:
    """Start a run that kills itself: see `helpers.slow_surgery`."""
    process = subprocess.Popen([*SLOW, *command], cwd=root, env=ENVIRONMENT | {"SURGERY_KILL": f"{lines},{delay}"})
    assert process.wait() == -signal.SIGKILL


def loadable(folder: Path) -> list[str]:
    found = []
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "np"):
                found.append(path.name)
        except SafetensorError:
            continue
    return found


def whole(root: Path, command: list[str]) -> dict[str, str]:
    """What a run that nobody stops makes."""
    done = surgery(*command, cwd=root, SURGERY_KERNELS="numpy")
    assert done.returncode == 0, done.stderr
    made = contents(root / "out")
    shutil.rmtree(root / "out")
    return made


def assert_unloadable(root: Path) -> None:
    """No loader takes the draft for a model, unless the kill came after the report, between the headers and the rename."""
    assert (draft(root) / REPORT).exists() or loadable(draft(root)) == []


@pytest.mark.parametrize("method", RUNS)
def test_kill_and_resume(root: Path, method: str) -> None:
    expected = whole(root, words(method))
    draw = random.Random(method)
    for _ in range(3):
        killed(root, words(method), draw.randint(1, 30), draw.random() * 0.05)
        assert not (root / "out").exists()
        assert_unloadable(root)
        if draw.random() < 0.5:  # and once more
            killed(root, words(method, "--resume"), len(journal(root)) + draw.randint(0, 5))
            assert_unloadable(root)
        before = len(journal(root))
        done = surgery(*words(method, "--resume"), cwd=root, SURGERY_KERNELS="numpy")
        assert done.returncode == 0, done.stderr
        assert before >= 1
        assert contents(root / "out") == expected
        assert sorted(path.name for path in root.iterdir()) == ["ft", "out", "pre"]
        shutil.rmtree(root / "out")


def test_entered_tensors_are_not_computed_again(root: Path) -> None:
    """A byte that is changed in one of them is still changed in the output: it was taken on trust."""
    killed(root, words("fapm"), 6)
    entered = json.loads(journal(root)[1])["tensor"]
    weight_map = json.loads((root / "ft/model.safetensors.index.json").read_text())["weight_map"]
    shard = weight_map[entered]
    with safe_open(root / "ft" / shard, "np") as file:
        assert entered in file.keys()  # noqa: SIM118
    header = (root / "ft" / shard).read_bytes()
    length = int.from_bytes(header[:8], "little")
    begin = json.loads(header[8 : 8 + length])[entered]["data_offsets"][0]
    size = (root / "ft" / shard).stat().st_size - 8 - length
    with (draft(root) / shard).open("r+b") as file:
        file.seek(-size + begin, os.SEEK_END)
        old = file.read(2)
        file.seek(-2, os.SEEK_CUR)
        file.write(bytes(byte ^ 1 for byte in old))
    changed = bytes(byte ^ 1 for byte in old)
    assert surgery(*words("fapm", "--resume"), cwd=root, SURGERY_KERNELS="numpy").returncode == 0
    with (root / "out" / shard).open("rb") as file:
        file.seek(-size + begin, os.SEEK_END)
        assert file.read(2) == changed


def test_a_torn_journal(root: Path) -> None:
    expected = whole(root, words("fapm"))
    for tail in (b'{"tensor": "model.layers.0.mlp', b"\0" * 100, b"{}\n[]\n"):
        killed(root, words("fapm"), 4)
        with (draft(root) / JOURNAL).open("ab") as file:
            file.write(tail)
        assert surgery(*words("fapm", "--resume"), cwd=root, SURGERY_KERNELS="numpy").returncode == 0
        assert contents(root / "out") == expected
        shutil.rmtree(root / "out")


@pytest.mark.parametrize("first", [b"", b"{", b"[]\n", b"\0\0\0\n", b"null\n"])
def test_a_journal_that_says_nothing_is_a_fresh_start(root: Path, first: bytes) -> None:
    draft(root).mkdir()
    (draft(root) / JOURNAL).write_bytes(first)
    (draft(root) / "stale.safetensors").write_bytes(b"stale")
    assert surgery(*words("half-reset", "--resume"), cwd=root).returncode == 0
    assert not (root / "out/stale.safetensors").exists()


def test_a_resume_of_another_run_is_refused_and_the_draft_kept(root: Path) -> None:
    killed(root, words("fapm"), 4)
    before = contents(root)
    others = [
        words("fapm", "--resume", "--sparsity", "0.7"),
        words("fapm", "--resume", "--scope", "linear"),
        words("fapm", "--resume", "--allow-nonfinite"),
        words("hma", "--resume"),
        words("fapm", "--resume", "--pre", "ft"),
        [word.replace("ft", "pre") if word == "ft" else word for word in words("fapm", "--resume")],
    ]
    for other in others:
        done = surgery(*other, cwd=root, SURGERY_KERNELS="numpy")
        assert done.returncode == 1
        assert is_one_sentence(done.stderr)
        assert "--resume" in done.stderr
        assert contents(root) == before
    # An input that was saved again.
    shard = next((root / "ft").glob("*.safetensors"))
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    done = surgery(*words("fapm", "--resume"), cwd=root, SURGERY_KERNELS="numpy")
    assert (done.returncode, "differs in ft" in done.stderr) == (1, True)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert surgery(*words("fapm", "--resume"), cwd=root, SURGERY_KERNELS="numpy").returncode == 0


def test_a_resume_with_another_further_model_is_refused(root: Path) -> None:
    killed(root, words("ties"), 4)
    for further, says in ((["--ft", "ft"], "differs in ft 3"), ([], "differs in ft 2")):
        other = (
            words("ties", "--resume", *further)
            if further
            else [*words("ties", "--resume")[:-3], "--ft", "ft", "--resume"]
        )
        done = surgery(*other, cwd=root, SURGERY_KERNELS="numpy")
        assert (done.returncode, says in done.stderr) == (1, True), done.stderr


def test_a_fresh_run_replaces_a_killed_draft(root: Path) -> None:
    expected = whole(root, words("hma"))
    killed(root, words("fapm"), 4)
    (draft(root) / "stale-00001-of-00009.safetensors").write_bytes(b"stale")
    (draft(root) / "stale").mkdir()
    done = surgery(*words("hma"), cwd=root, SURGERY_KERNELS="numpy")
    assert done.returncode == 0, done.stderr
    assert contents(root / "out") == expected
    assert not draft(root).exists()


def test_files_of_the_killed_run_do_not_stay_in_a_resumed_one(root: Path) -> None:
    expected = whole(root, words("fapm"))
    killed(root, words("fapm"), 4)
    (draft(root) / "merges.txt").write_text("of a tokenizer that ft has no more")
    assert surgery(*words("fapm", "--resume"), cwd=root, SURGERY_KERNELS="numpy").returncode == 0
    assert contents(root / "out") == expected


def test_resume_with_nothing_to_resume_just_runs(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path)
    done = surgery("fapm", "--pre", "pre", "--ft", "ft", "--resume", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "ft-fapm-0.9/config.json").exists()) == (0, True)


def test_a_second_run_on_the_same_output_is_refused(root: Path) -> None:
    process = subprocess.Popen([*SLOW, *words("fapm")], cwd=root, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not journal(root):
        time.sleep(0.001)
    for more in ([], ["--resume"], ["--force"]):
        process.send_signal(signal.SIGSTOP)
        done = surgery(*words("fapm", *more), cwd=root, SURGERY_KERNELS="numpy")
        process.send_signal(signal.SIGCONT)
        assert done.returncode == 1
        assert is_one_sentence(done.stderr)
        assert "another surgery run is writing it" in done.stderr
    assert process.wait() == 0
    assert contents(root / "out") == whole_again(root)


def whole_again(root: Path) -> dict[str, str]:
    (root / "out").rename(root / "first")
    return whole(root, words("fapm"))


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    """The old checkpoint still stands under another name, which is said; --force goes on from there."""
    tiny_llama_pair(tmp_path)
    old = as_output(write_checkpoint(tmp_path / ".out.surgery-old", tiny_llama()))
    command = ["fapm", "--pre", "pre", "--ft", "ft", "--out", "out"]
    before = contents(tmp_path)
    done = surgery(*command, cwd=tmp_path)
    assert (done.returncode, contents(tmp_path)) == (1, before)
    assert is_one_sentence(done.stderr)
    assert str(old) in done.stderr
    assert surgery(*command, "--force", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft", "out", "pre"]


def test_a_replacement_shows_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    """Watched all the time: never a mixture, never less than a whole checkpoint."""
    tiny_llama_pair(tmp_path)
    (tmp_path / "ft/tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    as_output(write_checkpoint(out, {"stale": tiny_llama()["lm_head.weight"]}, shards=3))
    allowed, seen = [contents(out)], set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                folder = os.open(out, os.O_RDONLY)
            except FileNotFoundError:
                continue
            names = frozenset(os.listdir(folder)) - {JOURNAL}  # noqa: PTH208
            # A folder that was replaced while it was listed is being removed.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(folder), out.stat()):
                    seen.add(names)
            os.close(folder)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for method in ("fapm", "hma", "fapm"):
            done = surgery(method, "--pre", "pre", "--ft", "ft", "--out", "out", "--force", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            allowed.append(contents(out))
    finally:
        stop.set()
        watcher.join()
    assert seen <= {frozenset(state) for state in allowed}
    assert len(seen) == 2
    assert not list(out.glob("*-of-00003*"))


def test_an_output_that_appears_meanwhile_is_not_replaced(root: Path) -> None:
    process = subprocess.Popen([*SLOW, *words("fapm")], cwd=root, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not journal(root):
        time.sleep(0.001)
    (root / "out").mkdir()
    (root / "out/thesis.tex").write_text("mine")
    said = process.communicate()[1]
    assert process.returncode == 1
    assert is_one_sentence(said)
    assert "appeared while surgery worked" in said
    assert (root / "out/thesis.tex").read_text() == "mine"
    assert not draft(root).exists()


@pytest.mark.parametrize("what", ["a shard of the draft", "the draft", "a shard of ft"])
def test_files_that_vanish_or_change_meanwhile(root: Path, what: str) -> None:
    process = subprocess.Popen([*SLOW, *words("fapm")], cwd=root, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while len(journal(root)) < 2:
        time.sleep(0.001)
    shard = next((root / "ft").glob("*.safetensors"))
    status = shard.stat()
    process.send_signal(signal.SIGSTOP)
    if what == "a shard of the draft":
        (draft(root) / shard.name).unlink()
    elif what == "the draft":
        shutil.rmtree(draft(root))
    else:
        os.utime(shard)
    process.send_signal(signal.SIGCONT)
    said = process.communicate()[1]
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert process.returncode == 1
    assert is_one_sentence(said), said
    assert sorted(path.name for path in root.iterdir()) == ["ft", "pre"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.editing.job import prepare
    from surgery.editing.run import run
    from surgery.methods.hma import Hma

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    pre, ft = tiny_llama_pair(tmp_path)
    run(prepare(pre, ft, Hma(), out=tmp_path / "out"))
    assert (tmp_path / "out/config.json").exists()
