"""What all commands print with: nothing from a file commands the terminal, and a terminal of ASCII has all it needs."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest
from rich.text import Text

from surgery.display import PLAIN, Terminal, Words, meter, new_progress, new_table, print_notes

ROOT = Path(__file__).parent.parent
BAD = "\x1b[2J\x9b31m\u202e[bold]x[/bold]:smile:\r\n\tend"
# The modules that may write to a terminal, and what they may call for it.
PRINTERS = {
    ("display.py", "Console"),
    ("display.py", "write"),
    ("__main__.py", "print"),
    ("train/display.py", "print"),
    ("commands/__init__.py", "echo"),
}


def printed(width: int = 80, encoding: str = "utf-8") -> tuple[Terminal, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    return Terminal(file=file, width=width, color_system="truecolor", force_terminal=True), file


def text_of(file: io.TextIOWrapper) -> str:
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(file.encoding)


def test_lines_cells_titles_and_notes_are_readable() -> None:
    console, file = printed()
    table = new_table(BAD, "Action", BAD)
    table.title = BAD
    table.add_row(BAD, BAD, BAD)
    console.print(BAD, soft_wrap=True)
    console.print(table, soft_wrap=True)
    print_notes(console, [BAD])
    shown = Text.from_ansi(text_of(file)).plain  # without rich's own bold
    assert all(mark.isprintable() or mark == "\n" for mark in shown)
    assert "[bold]x[/bold]:smile:" in shown
    assert r"\x1b[2J\x9b31m\u202e" in shown


def test_notes_name_options_of_the_command_line_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "Look at what they wrote (`as_json`), or allow less with `max_forgetting`; `nothing` is no option."
    for flags, said in (
        ({"as_json": "--json", "max_forgetting": "--max-forgetting"}, "(--json), or allow less with --max-forgetting;"),
        ({}, "(`as_json`), or allow less with `max_forgetting`;"),
    ):
        monkeypatch.setattr("surgery.option.FLAGS", flags)
        console, file = printed(width=200)
        print_notes(console, [note])
        assert f"Note: Look at what they wrote {said} `nothing` is no option." in Text.from_ansi(text_of(file)).plain


def test_the_commands_say_what_their_parameters_are_called() -> None:
    import surgery.commands  # which makes them
    from surgery.option import with_flags

    assert surgery.commands.app
    assert with_flags("`as_json`, `max_forgetting`, `eval_data`") == "--json, --max-forgetting, --eval-data"


def test_a_terminal_of_ascii_gets_ascii() -> None:
    console, file = printed(encoding="ascii")
    console.print("‖Δ‖ ± – ∞ ◆ " + meter(1, 1, 4) + meter(1, 3, 4), soft_wrap=True)
    assert text_of(file).split() == ["|d|", "+-", "-", "inf", ">", "#####"]
    assert all("".join(chr(key)).isascii() is False and str(value).isascii() for key, value in PLAIN.items())


@pytest.mark.parametrize(
    ("value", "largest", "bar"), [(0, 1, ""), (1, 1, "████"), (1, 2, "██"), (1, 32, "▏"), (0, 0, "")]
)
def test_a_bar_is_full_for_the_largest(value: float, largest: float, bar: str) -> None:
    assert meter(value, largest, 4) == bar


def test_progress_is_shown_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_progress() as bar:
        bar.update(bar.add_task(BAD, total=2), advance=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with new_progress() as bar:
        bar.update(bar.add_task(BAD, total=2), advance=1)
        words = bar.columns[0]
        assert isinstance(words, Words)
        (line,) = [words.render(task) for task in bar.tasks]
    assert str(line) == r"\x1b[2J\x9b31m\u202e[bold]x[/bold]:smile:\r\n\tend"
    assert new_progress(silent=True).disable


def test_nothing_else_writes_to_a_terminal() -> None:
    found = set()
    for path in (ROOT / "surgery").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            last = name.rpartition(".")[2]
            if last in ("print", "echo", "secho", "Console") and not name.startswith(("console.", "self.bar.console")):
                found.add((str(path.relative_to(ROOT / "surgery")), last))
            if isinstance(node, ast.Call) and name.startswith("sys.std") and last == "write":
                found.add((str(path.relative_to(ROOT / "surgery")), last))
            if isinstance(node, ast.ClassDef) and "Console" in map(ast.unparse, node.bases):
                found.add((str(path.relative_to(ROOT / "surgery")), "Console"))
    assert found == PRINTERS
