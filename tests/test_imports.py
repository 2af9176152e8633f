"""The house: no circle of imports, no import from a lower room to an upper one; the tests have the tree of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms from the lowest to the highest: a room imports itself and those before it.
ORDER = (
    *(
        "errors",
        "interrupt",
        "processes",
        "paths",
        "option",
        "text",
        "display",
        "pictures",
        "native",
        "layout",
        "checkpoint",
        "provenance",
        "device",
        "methods",
    ),
    *("engines", "data", "model", "editing", "diff", "calibrate", "evaluation", "comparison", "optim", "train", "api"),
    *("__init__", "demo", "commands", "__main__"),
)
Imports = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Every module under surgery/ by its name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / "surgery").rglob("*.py"))
    }


def imports(root: Path) -> Imports:
    """Module -> the modules of surgery that it imports: at its top, in functions, and for types alike."""
    found = modules(root)
    return {name: set(_imported(path, name, found.keys())) - {name} for name, path in found.items()}


def _imported(path: Path, name: str, known: Set[str]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "surgery")
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            if source.split(".")[0] == "surgery":
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield inner if inner in known else source


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def upwards(found: Imports) -> list[str]:
    """The imports against the order."""
    return [
        f"{module} imports {other}"
        for module, others in found.items()
        for other in sorted(others)
        if ORDER.index(room(other)) > ORDER.index(room(module))
    ]


def circles(found: Imports) -> set[frozenset[str]]:
    """The sets of modules of which each imports each, if by a detour."""
    reached = {module: _reached(module, found) for module in found}
    return {
        frozenset(other for other in others if module in reached.get(other, ()))
        for module, others in reached.items()
        if module in others
    }


def _reached(module: str, found: Mapping[str, Set[str]]) -> set[str]:
    seen, todo = set[str](), [module]
    while todo:
        new = found.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in modules(ROOT)} == set(ORDER)


def test_no_import_runs_upwards() -> None:
    assert upwards(imports(ROOT)) == []


def test_no_imports_go_in_circles() -> None:
    assert circles(imports(ROOT)) == set()


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("layout", "from surgery.api import edit", "surgery.layout imports surgery.api"),
        ("layout", "from surgery import api", "surgery.layout imports surgery.api"),
        ("layout", "import surgery.api", "surgery.layout imports surgery.api"),
        ("layout", "from surgery import edit", "surgery.layout imports surgery"),
        ("methods/fapm", "def f():\n    from ..engines import cpu", "surgery.methods.fapm imports surgery.engines.cpu"),
        ("methods/fapm", "def f():\n    from ..layout import place", None),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str, wrong: str | None) -> None:
    for name in ("__init__", "api", "layout", "methods/__init__", "methods/fapm", "engines/__init__", "engines/cpu"):
        path = tmp_path / "surgery" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line if name == module else "")
    (tmp_path / "surgery/engines/cpu.py").write_text("from surgery.methods.fapm import f")
    found = imports(tmp_path)
    assert upwards(found) == ([wrong] if wrong else [])
    around = {frozenset({"surgery.methods.fapm", "surgery.engines.cpu"})}
    assert circles(found) == (around if "cpu" in line else set())


def test_the_readme_names_every_folder_of_the_code_in_the_order_of_imports() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Layout of the code")[1].split("\n## ")[0]
    named = re.findall(r"^    surgery/(\S+)  +\S", section, re.MULTILINE)
    folders = [name.rstrip("/") for name in named if name.endswith("/")]
    expected = {str(path.parent.relative_to(ROOT / "surgery")) for path in (ROOT / "surgery").rglob("*.py")} - {"."}
    assert len(folders) == len(set(folders))
    assert set(folders) == expected
    for name in set(named) - {f"{folder}/" for folder in folders}:
        assert (ROOT / "surgery" / name).is_file()
    places = [ORDER.index(name.split("/")[0].removesuffix(".py")) for name in named]
    assert places == sorted(places)


def test_no_test_imports_a_test() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong = [name for name in names if any(part.startswith("test_") for part in name.split("."))]
            assert not wrong, f"{path} imports {wrong}"


def test_the_tests_have_the_tree_of_the_code() -> None:
    def folders(base: Path) -> set[str]:
        return {str(path.parent.relative_to(base)) for path in base.rglob("*.py")}

    tests = {name for name in folders(ROOT / "tests") if not name.startswith("helpers")}
    assert tests <= folders(ROOT / "surgery")
