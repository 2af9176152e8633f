"""Every error that a user can cause: one sentence that names the place and the way out, exit code 1, and the disk as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import (
    INDEX,
    SHARDS,
    WEIGHT,
    change_header,
    change_index,
    change_tensors,
    fine_tuned,
    tiny_llama,
    tiny_llama_pair,
    write_checkpoint,
)
from helpers.command import SLOW, SURGERY, call, contents, is_one_sentence, refused, surgery
from helpers.outputs import as_output
from safetensors.torch import load_file

PAIR = ("--pre", "pre", "--ft", "ft")
NOBODY = 65534

Damage = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a pair of two shards each, `pre` and `ft`."""
    tiny_llama_pair(tmp_path)
    return tmp_path


def _truncate(path: Path, nbytes: int) -> None:
    os.truncate(path, path.stat().st_size - nbytes)


def _claim(path: Path, length: int, size: int) -> None:
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, size)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _folder_with(folder: Path, name: str) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / name).write_text("mine")


def _shard_called(folder: Path, name: str) -> None:
    (folder / SHARDS[1]).rename(folder / name)
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
    renamed = {tensor: name for tensor, shard in shards.items() if shard == SHARDS[1]}
    change_index(folder, lambda index: index["weight_map"].update(renamed))


def _holding(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[WEIGHT][0].fill_(value)


def _retype(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})


def _outside(root: Path, name: str) -> None:
    """Another file that would do, and an index that points to it."""
    (root / "outside").mkdir()
    shutil.copy(root / "ft" / SHARDS[1], root / "outside" / "x.safetensors")
    target = name.format(root=root)
    change_index(root / "ft", lambda index: index["weight_map"].update({WEIGHT: target}))


# name -> (what is done to the folder, what the sentence says)
FAULTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no folder": (lambda root: shutil.rmtree(root / "ft"), ("ft", "no folder")),
    "an empty folder": (
        lambda root: _emptied(root / "ft"),
        ("ft: is not a checkpoint", "model.safetensors"),
    ),
    "a file": (lambda root: _as_file(root / "ft"), ("ft: is no checkpoint", "Give the folder")),
    "no config": (lambda root: (root / "ft/config.json").unlink(), ("ft: config.json is missing", "Copy it there")),
    "a broken config": (lambda root: (root / "ft/config.json").write_text("{"), ("ft/config.json", "not valid JSON")),
    "a config that is a list": (lambda root: (root / "ft/config.json").write_text("[]"), ("ft/config.json", "object")),
    "a truncated shard": (lambda root: _truncate(root / "ft" / SHARDS[0], 10), (SHARDS[0], "truncated", "Download")),
    "a truncated shard of pre": (
        lambda root: _truncate(root / "pre" / SHARDS[1], 10),
        (f"pre/{SHARDS[1]}", "truncated"),
    ),
    "an empty shard": (lambda root: os.truncate(root / "ft" / SHARDS[0], 0), (SHARDS[0], "truncated")),
    "a header beyond the file": (lambda root: _claim(root / "ft" / SHARDS[0], 1 << 63, 999), (SHARDS[0], "999")),
    "a header of gigabytes": (
        lambda root: _claim(root / "ft" / SHARDS[0], 100_000_001, 100_000_100),
        (SHARDS[0], "100,000,001 bytes", "more than safetensors allows"),
    ),
    "a header that is no JSON": (lambda root: _claim(root / "ft" / SHARDS[0], 100, 200), (SHARDS[0], "not JSON")),
    "overlapping offsets": (
        lambda root: change_header(
            root / "ft" / SHARDS[1],
            lambda header: header[WEIGHT].update(data_offsets=header["model.norm.weight"]["data_offsets"]),
        ),
        (SHARDS[1], "header is damaged"),
    ),
    "an index that is no JSON": (lambda root: (root / "ft" / INDEX).write_text("{"), (f"ft/{INDEX}", "not valid JSON")),
    "an index without a map": (lambda root: (root / "ft" / INDEX).write_text("{}"), (f"ft/{INDEX}", "no weight_map")),
    "a shard that is missing": (lambda root: (root / "ft" / SHARDS[1]).unlink(), (INDEX, SHARDS[1], "missing")),
    "a shard of pre that is missing": (lambda root: (root / "pre" / SHARDS[0]).unlink(), (f"pre/{INDEX}", SHARDS[0])),
    "an index that names a missing tensor": (
        lambda root: change_index(root / "ft", lambda index: index["weight_map"].update(ghost=SHARDS[0])),
        (f"ft/{INDEX}", SHARDS[0], "ghost"),
    ),
    "an index that points outside": (lambda root: _outside(root, "../outside/x.safetensors"), (INDEX, "../outside/x")),
    "an index with an absolute path": (
        lambda root: _outside(root, "{root}/outside/x.safetensors"),
        (INDEX, "/outside/x"),
    ),
    "an index that names the card": (
        lambda root: _shard_called(root / "ft", "README.md"),
        (INDEX, "README.md", "no safetensors file"),
    ),
    "a weight that ft lacks": (
        lambda root: change_tensors(root / "ft", lambda tensors: tensors.pop(WEIGHT)),
        (WEIGHT, "missing from ft"),
    ),
    "another shape": (
        lambda root: change_tensors(root / "ft", lambda tensors: tensors.update({WEIGHT: torch.zeros(4, 4)})),
        (WEIGHT, "[4, 4]", "check --pre"),
    ),
    "another model": (
        lambda root: change_tensors(
            root / "pre", lambda tensors: [tensors.update({f"x{name}": tensors.pop(name)}) for name in list(tensors)]
        ),
        ("no tensor name in common",),
    ),
    "NaN in ft": (
        lambda root: change_tensors(root / "ft", _holding(float("nan"))),
        (WEIGHT, "NaN", "--allow-nonfinite"),
    ),
    "Inf in ft": (
        lambda root: change_tensors(root / "ft", _holding(float("-inf"))),
        (WEIGHT, "Inf", "--allow-nonfinite"),
    ),
    "NaN in pre": (lambda root: change_tensors(root / "pre", _holding(float("nan"))), (WEIGHT, "NaN", "pre/")),
    "Inf in pre": (lambda root: change_tensors(root / "pre", _holding(float("inf"))), (WEIGHT, "Inf", "pre/")),
    "int8": (lambda root: change_tensors(root / "ft", _retype(torch.int8)), (WEIGHT, "quantized (I8)", "Dequantize")),
    "uint8 in pre": (lambda root: change_tensors(root / "pre", _retype(torch.uint8)), (WEIGHT, "quantized (U8)")),
    "fp8": (
        lambda root: change_tensors(root / "ft", _retype(torch.float8_e4m3fn)),
        (WEIGHT, "quantized (F8_E4M3)", "Dequantize"),
    ),
    "packed int32": (
        lambda root: change_tensors(
            root / "ft",
            lambda tensors: tensors.update({WEIGHT.replace("weight", "qweight"): torch.zeros(2, 2, dtype=torch.int32)}),
        ),
        ("up_proj.qweight", "quantized (I32)"),
    ),
    "a tokenizer that is a broken link": (
        lambda root: (root / "ft/tokenizer.json").symlink_to("../blobs/gone"),
        ("ft/tokenizer.json", "../blobs/gone", "does not exist"),
    ),
    "a shard that is a folder": (
        lambda root: _as_folder(root / "ft" / SHARDS[0]),
        (SHARDS[0], "cannot be read"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_inputs(root: Path, name: str) -> None:
    damage, says = FAULTS[name]
    damage(root)
    refused(root, "fapm", *PAIR, says=says)


@pytest.mark.parametrize("name", ["no folder", "a truncated shard", "NaN in ft"])
def test_faults_of_the_inputs_in_a_process_of_its_own(root: Path, name: str) -> None:
    damage, says = FAULTS[name]
    damage(root)
    before = contents(root)
    done = surgery("fapm", *PAIR, cwd=root)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_sentence(done.stderr), done.stderr
    assert all(part in done.stderr for part in says)
    assert contents(root) == before


def test_an_index_is_not_followed_outside(root: Path) -> None:
    """The file outside must not even be opened: it is a pipe, on which an open would wait for ever."""
    (root / "outside").mkdir()
    os.mkfifo(root / "outside/x.safetensors")
    for side in ("ft", "pre"):
        change_index(root / side, lambda index: index["weight_map"].update({WEIGHT: "../outside/x.safetensors"}))
        refused(root, "hma", *PAIR, says=("refused",))


@pytest.mark.parametrize("method", ["fapm", "magnitude", "half-reset", "hma"])
@pytest.mark.parametrize("side", ["pre", "ft"])
def test_nonfinite_numbers_pass_when_allowed(root: Path, method: str, side: str) -> None:
    change_tensors(root / side, lambda tensors: [_holding(value)(tensors) for value in (float("inf"), float("nan"))])
    code, out, err = call(method, *PAIR, "--out", "out", "--allow-nonfinite", cwd=root)
    assert (code, WEIGHT in out) == (0, True), err
    report = json.loads((root / "out/surgery-report.json").read_text())
    assert [line["name"] for line in report["tensors"] if line.get("nonfinite")] == [WEIGHT]


def test_nonfinite_numbers_of_a_tensor_that_is_not_edited_are_noted(root: Path) -> None:
    norm = "model.norm.weight"
    change_tensors(root / "ft", lambda tensors: tensors[norm].fill_(float("nan")))
    code, out, _ = call("fapm", *PAIR, "--out", "out", cwd=root)
    assert (code, norm in out) == (0, True)
    assert any(norm in note for note in json.loads((root / "out/surgery-report.json").read_text())["notes"])
    assert load_file(root / "out/model.safetensors")[norm].isnan().all()
    refused(root, "hma", "--pre", "pre", "--ft", "ft", says=(norm, "NaN"))


def test_nonfinite_numbers_of_a_tensor_that_only_ft_has_are_noted(root: Path) -> None:
    change_tensors(root / "ft", lambda tensors: tensors.update({"score.weight": torch.full((2, 3), float("inf"))}))
    code, _, _ = call("fapm", *PAIR, "--out", "out", cwd=root)
    assert code == 0
    notes = json.loads((root / "out/surgery-report.json").read_text())["notes"]
    assert any("NaN or Inf" in note and "score.weight" in note for note in notes)


def test_force_spares_a_folder_with_training_checkpoints(root: Path) -> None:
    write_checkpoint(root / "run", {"stale": torch.zeros(2)})
    (root / "run/checkpoint-500").mkdir()
    as_output(root / "run")
    refused(root, "fapm", *PAIR, "--out", "run", "--force", says=("run: holds the folder checkpoint-500", "--out"))


# command and options -> what the sentence says
OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("fapm", *PAIR, "--sparsity", "1.5"): ("--sparsity", "between 0 and 1", "1.5"),
    ("magnitude", *PAIR, "--sparsity", "-0.1"): ("--sparsity", "-0.1"),
    ("fapm", *PAIR, "--sparsity", "nan"): ("--sparsity", "nan"),
    ("fapm", *PAIR, "--sparsity", "abc"): ("--sparsity", "number", "surgery fapm --help"),
    ("half-reset", *PAIR, "--ratio", "inf"): ("--ratio", "inf"),
    ("half-reset", *PAIR, "--level", "both"): ("--level", "category, layer, model", "both"),
    ("half-reset", *PAIR, "--seed", "-1"): ("--seed", "-1"),
    ("half-reset", *PAIR, "--seed", "abc"): ("--seed", "integer"),
    ("half-reset", *PAIR, "--also", "biases"): ("--also", "biases"),
    ("hma", *PAIR, "--ratios", "x"): ("--ratios", "'x'", "0.3,0.2,0.1"),
    ("hma", *PAIR, "--ratios", "0.3,,"): ("--ratios", "'0.3,,'"),
    ("hma", *PAIR, "--ratios", ""): ("--ratios", "0.3,0.2,0.1"),
    ("hma", *PAIR, "--ratios", "0.3,1.2"): ("--ratios", "1.2"),
    ("hma", *PAIR, "--ratios", "nan"): ("--ratios", "nan"),
    ("hma", *PAIR, "--ratios", "0.3,0.2,0.1"): ("--ratios", "3 numbers", "2 layers"),
    ("fapm", *PAIR, "--include", "("): ("--include '('", "not a regular expression"),
    ("fapm", *PAIR, "--exclude", "x{4294967296}"): ("--exclude", "not a regular expression"),
    ("fapm", *PAIR, "--include", "nothing-of-this"): ("--include 'nothing-of-this'", "matches no tensor"),
    ("fapm", *PAIR, "--exclude", "mlp", "--exclude", "MLP"): ("--exclude 'MLP'", "matches no tensor"),
    ("fapm", *PAIR, "--include", "norm"): ("No tensor is in scope", "--include"),
    ("fapm", *PAIR, "--scope", "most"): ("--scope", "all, linear", "most"),
    ("fapm", *PAIR, "--rest", "both"): ("--rest", "ft, pre", "both"),
    ("fapm", *PAIR, "--device", "tpu"): ("--device", "tpu"),
    ("fapm", *PAIR, "--workers", "0"): ("--workers", "0"),
    ("fapm", *PAIR, "--workers", "-3"): ("--workers", "-3"),
    ("fapm", *PAIR, "--dry-run", "--workers", "0"): ("--workers", "0"),
    ("fapm", *PAIR, "--dry-run", "--device", "tpu"): ("--device", "tpu"),
    ("fapm", "--ft", "ft"): ("--pre", "--help"),
    ("fapm", "--pre", "pre"): ("--ft", "--help"),
    ("fapm", *PAIR, "--no-such-option"): ("--no-such-option", "surgery fapm --help"),
    ("operate",): ("operate", "surgery --help"),
    ("hma", "--pre", "", "--ft", "ft"): ("no such folder ''",),
    ("hma", "--pre", "pre", "--ft", "a\nb\x1b[2J"): (r"\n", r"\x1b"),
}


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_options_are_refused_by_name(root: Path, words: tuple[str, ...]) -> None:
    refused(root, *words, says=OPTIONS[words])


# --out and other options -> (what is made first, what the sentence says)
OUTPUTS: dict[tuple[str, ...], tuple[Damage, tuple[str, ...]]] = {
    ("ft",): (lambda root: None, ("ft", "inside the input", "another --out")),
    ("pre", "--force"): (lambda root: None, ("inside the input pre",)),
    ("ft/out",): (lambda root: None, ("inside the input ft",)),
    ("./ft/../ft/a/b", "--force"): (lambda root: None, ("inside the input ft",)),
    (".", "--force"): (lambda root: None, ("contains the input",)),
    ("link", "--force"): (lambda root: (root / "link").symlink_to("ft"), ("inside the input ft",)),
    ("link/out",): (lambda root: (root / "link").symlink_to("pre"), ("inside the input pre",)),
    ("out",): (lambda root: (root / "out").mkdir(), ("out: exists already", "--force")),
    ("file", "--force"): (lambda root: (root / "file").write_text("mine"), ("file: is a file",)),
    ("file/out",): (lambda root: (root / "file").write_text("mine"), ("file",)),
    ("mine", "--force"): (
        lambda root: _folder_with(root / "mine", "thesis.tex"),
        ("mine: holds", "no surgery-report.json"),
    ),
    ("node", "--force"): (
        lambda root: _folder_with(root / "node", "config.json"),
        ("node: holds config.json, and no surgery-report.json",),
    ),
    ("n" * 300,): (lambda root: None, ("nnn", "too long")),
    ("~no-such-user/out",): (lambda root: None, ("~no-such-user", "no such user")),
}


@pytest.mark.parametrize("words", OUTPUTS, ids=lambda words: " ".join(words)[:20])
def test_outputs_that_are_refused(root: Path, words: tuple[str, ...]) -> None:
    damage, says = OUTPUTS[words]
    damage(root)
    refused(root, "half-reset", *PAIR, "--out", *words, says=says)


def test_an_input_of_links_into_the_output_is_refused(root: Path) -> None:
    (root / "ft").rename(root / "real")
    (root / "ft").mkdir()
    for path in (root / "real").iterdir():
        (root / "ft" / path.name).symlink_to(path)
    refused(root, "hma", *PAIR, "--out", "real", "--force", says=("real", "contains the input"))


DROPPED = f"""
import contextlib, io, os, sys
import surgery.editing.run, surgery.editing.display, surgery.provenance, rich.progress
from surgery.__main__ import main
with contextlib.redirect_stderr(io.StringIO()):  # imports the rest, which may lie where only root can look
    assert main(["hma", "--pre", "./nowhere", "--ft", "./nowhere"]) == 1
    surgery.provenance.versions()
if os.geteuid() == 0:
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("locked", "mode", "says"),
    [
        (f"ft/{SHARDS[0]}", 0o000, (f"ft/{SHARDS[0]}", "no permission to read")),
        (f"pre/{INDEX}", 0o000, (f"pre/{INDEX}", "no permission to read")),
        ("ft/config.json", 0o000, ("ft/config.json", "no permission to read")),
        ("ft/tokenizer.json", 0o000, ("ft/tokenizer.json", "no permission to read")),
        ("ft", 0o000, ("'ft'", "no permission")),
        ("pre", 0o444, ("'pre'", "no permission")),
        (".", 0o555, ("ft-fapm-0.9", "no permission to write", "another --out")),
    ],
)
def test_no_permission(locked: str, mode: int, says: tuple[str, ...]) -> None:
    root = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        tiny_llama_pair(root)
        (root / "ft/tokenizer.json").write_text("{}")
        if os.geteuid() == 0:
            for path in (root, *root.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        before = contents(root)
        (root / locked).chmod(mode)
        done = surgery("fapm", "--pre", "pre", "--ft", "ft", cwd=root, command=[sys.executable, "-c", DROPPED])
        (root / locked).chmod(0o755)
        assert done.returncode == 1, done.stdout
        assert is_one_sentence(done.stderr), done.stderr
        for part in says:
            assert part in done.stderr
        assert "no such file" not in done.stderr.lower()
        assert contents(root) == before
    finally:
        shutil.rmtree(root)


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of its own that holds `nbytes`."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_seen_before_the_work(root: Path) -> None:
    with small_disk(root / "disk", 16 << 10):
        refused(root, "fapm", *PAIR, "--out", "disk/a/b/out", says=("disk/a/b/out", "bytes free", "Make room"))


def test_a_disk_with_nothing_left(root: Path) -> None:
    with small_disk(root / "disk", 16 << 10) as disk:
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 10))
        refused(root, "fapm", *PAIR, "--out", "disk/out", says=("disk is full", "Make room"))


@pytest.mark.parametrize("free", [1 << 12, 1 << 13, 1 << 14, 1 << 15])
def test_a_disk_that_fills_with_companions(root: Path, free: int) -> None:
    """Their bytes fit and their blocks do not, so that it is only seen when they are copied."""
    for number in range(60):
        (root / f"ft/vocab-{number}.txt").write_text("x")
    weights = sum(path.stat().st_size for path in (root / "ft").glob("*.safetensors"))
    with small_disk(root / "disk", (weights + free + 0x7FFF) & ~0xFFF):
        refused(root, "fapm", *PAIR, "--out", "disk/out", says=("disk is full", "Make room"))


@pytest.mark.parametrize("left", [0.0, 0.4, 0.8])
def test_a_disk_that_another_program_fills(tmp_path: Path, left: float) -> None:
    pre = tiny_llama(width=256)
    write_checkpoint(tmp_path / "pre", pre, shards=2)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre), shards=2)
    size = sum(path.stat().st_size for path in (tmp_path / "ft").glob("*.safetensors"))
    with small_disk(tmp_path / "disk", 2 * size) as disk:

        def fill() -> None:
            while not list(disk.glob(".*/*.safetensors")):
                time.sleep(0.001)
            with (disk / "filler").open("wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, int((2 - left) * size) & ~0xFFF)

        filling = threading.Thread(target=fill, daemon=True)
        filling.start()
        words = ("fapm", *PAIR, "--out", "disk/out", "--workers", "1")
        done = surgery(*words, cwd=tmp_path, command=SLOW, SURGERY_KERNELS="numpy")
        filling.join()
        assert done.returncode == 1
        assert is_one_sentence(done.stderr), done.stderr
        assert "disk is full" in done.stderr
        assert os.listdir(disk) == ["filler"]  # noqa: PTH208


def test_a_limit_on_the_size_of_files(root: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *SURGERY]
    before = contents(root)
    done = surgery("fapm", *PAIR, cwd=root, command=limited)
    assert done.returncode == 1
    assert is_one_sentence(done.stderr), done.stderr
    assert "ulimit -f" in done.stderr
    assert contents(root) == before


class Trap:
    """Raises an error at the n-th operation on files that the program makes, as a full disk or Ctrl-C would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
        self.error, self.at, self.count, self.lock = error, at, 0, threading.Lock()
        for owner, name in (
            *((os, name) for name in ("pwrite", "fsync", "ftruncate", "mkdir", "rename")),
            (shutil, "copyfile"),
            (Path, "write_bytes"),
        ):
            monkeypatch.setattr(owner, name, self._guarded(getattr(owner, name)))

    def _guarded(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if isinstance(self.error, KeyboardInterrupt) and (
                threading.current_thread() is not threading.main_thread()
                or signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            ):
                return operation(*arguments, **options)
            with self.lock:
                self.count += 1
                mine = self.count == self.at
            if mine:
                raise self.error
            return operation(*arguments, **options)

        return guarded


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk", "^C"]
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_a_fault_at_every_operation(
    root: Path,
    error: BaseException,
    old: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (root / "ft/tokenizer.json").write_text("{}")
    if old:
        as_output(write_checkpoint(root / "deep/out", {"old": torch.ones(3)}))
    before = contents(root)
    force = ["--force"] if old else []
    at = 0
    while True:
        at += 1
        with monkeypatch.context() as patched:
            trap = Trap(patched, error, at)
            code, _, err = call("magnitude", *PAIR, "--out", "deep/out", "--workers", "1", *force, cwd=root)
        if trap.count < at:
            break
        if code == 0:  # past the point of no return: the output is there, as a whole
            after = contents(root)
            assert after["deep/out/model.safetensors.index.json"]
            assert {name.split("/")[0] for name in after} == {"pre", "ft", "deep"}
            assert os.listdir(root / "deep") == ["out"]  # noqa: PTH208
            shutil.rmtree(root / "deep/out" if old else root / "deep")
            if old:
                as_output(write_checkpoint(root / "deep/out", {"old": torch.ones(3)}))
            continue
        if isinstance(error, OSError):
            assert code == 1
            assert is_one_sentence(err), err
            assert "disk is full" in err
        else:
            assert (code, err) == (130, "Stopped.\n")
        assert contents(root) == before, at
    assert code == 0
    assert at > 20


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c(tmp_path: Path, presses: int) -> None:
    pre = tiny_llama(width=512)
    write_checkpoint(tmp_path / "pre", pre, shards=2)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre), shards=2)
    before = contents(tmp_path)
    environment = {**os.environ, "SURGERY_KERNELS": "numpy", "PYTHONPATH": str(Path(__file__).parents[2])}
    for wait in (0.0, 0.0, 0.001, 0.002, 0.005, 0.05, 0.1):
        process = subprocess.Popen(
            [*SLOW, "fapm", *PAIR, "--workers", "1"],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list(tmp_path.glob(".*/*.safetensors")):
            time.sleep(0.002)
        time.sleep(wait)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert process.stderr is not None
        assert process.stderr.read() == "Stopped.\n"
        process.stderr.close()
        # The second may find the interpreter on its way out; to a shell that is 130 too.
        assert process.wait() in ((130,) if presses == 1 else (130, -signal.SIGINT))
        assert contents(tmp_path) == before


def test_a_pipe_that_nobody_reads(root: Path) -> None:
    """The reader of the table goes away; the output is there all the same, and no traceback."""
    done = surgery("fapm", *PAIR, cwd=root, command=["bash", "-c", '"$@" | true', "-", *SURGERY])
    assert done.stderr == ""
    assert (root / "ft-fapm-0.9/config.json").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_files_that_are_written(root: Path, closed: str) -> None:
    """A file that is opened next would take the number of a closed one, and what is printed would go there."""
    done = surgery("fapm", *PAIR, "--json", cwd=root, command=["bash", "-c", f'"$@" {closed}', "-", *SURGERY])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((root / "ft-fapm-0.9/surgery-report.json").read_text())["method"] == "fapm"
