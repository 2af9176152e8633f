"""The command line: what it imports, what it shows where, and that every option says what it is for."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.checkpoints import fine_tuned, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.command import SURGERY, call, contents, surgery

import surgery as package
from surgery.commands import app
from surgery.methods import METHODS
from surgery.option import declared_options

PAIR = ("--pre", "pre", "--ft", "ft")
ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "huggingface_hub", "matplotlib")
# options -> the default output
DEFAULTS = {
    ("fapm",): "ft-fapm-0.9",
    ("fapm", "--sparsity", "1"): "ft-fapm-1",
    ("magnitude", "--sparsity", "0.75"): "ft-magnitude-0.75",
    ("half-reset",): "ft-half-reset-0.5",
    ("hma", "--ratios", "0.3,0.2"): "ft-hma-0.3-0.2",
    ("ties",): "ft-ties-0.8",
    ("dare", "--drop-rate", "0.5"): "ft-dare-0.5",
}


def commands() -> dict[str, Any]:
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


EDITS = ["fapm", "magnitude", "half-reset", "hma", "ties", "dare"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_llama_pair(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [["--help"], ["fapm", "--help"], ["--version"], ["fapm", *PAIR], ["hma", *PAIR, "--dry-run"], ["diff", *PAIR]],
)
def test_heavy_libraries_are_not_imported(root: Path, words: list[str]) -> None:
    script = (
        "import sys; from surgery.__main__ import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY} if name in sys.modules], code)"
    )
    done = surgery(*words, cwd=root, command=[sys.executable, "-c", script])
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_version() -> None:
    assert call("--version", cwd=ROOT) == (0, f"surgery {package.__version__}\n", "")


def test_launcher_of_a_checkout() -> None:
    done = surgery("--version", cwd=ROOT, command=[sys.executable, "cli.py"])
    assert done.stdout == f"surgery {package.__version__}\n"


@pytest.mark.parametrize("name", [*EDITS, "wanda", "extract", "apply", "verify", "diff", "demo"])
def test_every_command_and_every_option_has_help(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert len(command.params) >= 2
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"
    code, out, err = call(name, "--help", cwd=ROOT)
    assert (code, err) == (0, "")
    for parameter in command.params:
        assert parameter.opts[-1] in out


@pytest.mark.parametrize("name", METHODS)
def test_sweep_says_of_a_methods_options_what_the_methods_own_command_says(name: str) -> None:
    told = {one.name: one.help for one in commands()["sweep"].params}
    for one in declared_options(METHODS[name]):
        assert one.option.swept or re.search(rf"\b{name}\b[^:]*: {re.escape(one.option.help)}", told[one.name])


def test_every_command_is_listed() -> None:
    code, out, _ = call(cwd=ROOT)
    assert code == 0
    assert all(name in out for name in commands())
    assert call("--help", cwd=ROOT)[1] == out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(root: Path, shell: str) -> None:
    done = surgery(cwd=root, command=["surgery"], _SURGERY_COMPLETE=f"source_{shell}", env=_path())
    assert (done.returncode, "surgery" in done.stdout) == (0, True)
    words = {"COMP_WORDS": "surgery ma", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "surgery ma"}
    words["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    done = surgery(cwd=root, command=["surgery"], _SURGERY_COMPLETE=f"complete_{shell}", **words, env=_path())
    assert "magnitude" in done.stdout, done.stderr
    assert "hma" not in done.stdout


def test_show_completion(root: Path) -> None:
    done = surgery(
        cwd=root,
        command=["bash", "-c", "surgery --show-completion bash; true"],
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
        env=_path(),
    )
    assert "_SURGERY_COMPLETE" in done.stdout, done.stderr


def _path() -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("words", DEFAULTS, ids=" ".join)
def test_the_default_output_is_beside_ft_and_named_after_the_method(root: Path, words: tuple[str, ...]) -> None:
    (root / "here").mkdir()
    code, out, err = call(*words, "--pre", "../pre", "--ft", "../ft/", cwd=root / "here")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"Wrote {root / DEFAULTS[words]}"
    assert (root / DEFAULTS[words] / "config.json").exists()
    assert f"# {DEFAULTS[words]}\n" in (root / DEFAULTS[words] / "README.md").read_text()


def test_of_a_folder_given_as_a_point(root: Path) -> None:
    code, out, _ = call("hma", "--pre", "../pre", "--ft", ".", cwd=root / "ft")
    assert (code, out.splitlines()[-1]) == (0, f"Wrote {root / 'ft-hma-0.5'}")


@pytest.mark.parametrize("method", EDITS)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_dry_run_writes_nothing(root: Path, method: str, more: list[str]) -> None:
    before = contents(root)
    code, out, err = call(method, *PAIR, "--dry-run", *more, cwd=root)
    assert (code, err) == (0, "")
    assert contents(root) == before
    weights = sum(tensor.nbytes for tensor in tiny_llama().values())
    if more:
        plan = json.loads(out)
        assert plan["bytes"] == weights
        assert plan["device"].startswith("the processor, which keeps up with its disk")
        assert sum(row["tensors"] for row in plan["plan"]) == len(tiny_llama())
    else:
        assert all(word in out for word in ("attention", "feed-forward", "norm", "embedding", "head", "kB"))
        assert "Device: the processor, which keeps up" in out
        assert "Nothing was written" in out


def test_json_is_the_file(root: Path) -> None:
    done = surgery("fapm", *PAIR, "--json", cwd=root, PYTHONIOENCODING="ascii")
    assert done.stdout.encode() == (root / "ft-fapm-0.9/surgery-report.json").read_bytes()
    report = json.loads(done.stdout)
    assert report["command"] == ["surgery", "fapm", *PAIR, "--json"]
    assert {"surgery", "python", "numpy"} <= report["versions"].keys()
    assert (report["pre"]["typed"], report["ft"]["revision"]) == ("pre", None)
    line = next(line for line in report["tensors"] if line["category"] == "attention")
    assert line["kept"] + line["pruned"] == line["entries"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_terminal(root: Path, encoding: str) -> None:
    done = surgery("hma", *PAIR, cwd=root, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "200"}, {"FORCE_COLOR": "1"}, {}]
)
def test_80_columns_and_no_progress_in_a_pipe(root: Path, environment: dict[str, str]) -> None:
    done = surgery("fapm", *PAIR, "--out", "o", cwd=root, env=environment)
    assert done.stderr == ""
    if "FORCE_COLOR" not in environment:
        assert "\x1b" not in done.stdout
    *lines, last = plain(done.stdout)
    assert last == f"Wrote {root / 'o'}"
    assert max(map(len, lines)) <= 80
    *lines, last = plain(surgery("fapm", *PAIR, "--dry-run", cwd=root, env=environment).stdout)
    assert last.startswith("Nothing was written. The output would be")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [["--help"], ["fapm", "--help"], ["half-reset", "--help"], ["demo", "--help"]])
def test_help_in_80_columns_without_colour(root: Path, words: list[str]) -> None:
    done = surgery(*words, cwd=root, NO_COLOR="1", COLUMNS="80")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def plain(text: str) -> list[str]:
    """Lines without their colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize(("term", "shown"), [("xterm", True), ("dumb", False)])
def test_progress_on_a_terminal(tmp_path: Path, term: str, shown: bool) -> None:
    pre = tiny_llama(width=512)
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": term, "SURGERY_KERNELS": "numpy", "COLUMNS": "80"}
    process = subprocess.Popen(
        [*SURGERY, "fapm", *PAIR], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=follower, text=True
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert process.stdout is not None
    with process.stdout as stdout:
        assert "\x1b" not in stdout.read()
    assert process.wait() == 0
    assert bool(re.search(rb"[MG]B/s", seen)) is shown, seen[-500:]


def test_one_worker_and_many_make_the_same_bytes(root: Path) -> None:
    found = []
    for workers in ("1", "2", "7"):
        assert call("fapm", *PAIR, "--out", "out", "--workers", workers, "--force", cwd=root)[0] == 0
        found.append({name: mark for name, mark in contents(root / "out").items() if name.startswith("model")})
    assert found[0] == found[1] == found[2]
