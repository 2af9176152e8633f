"""Hub ids wherever a path goes: the same result as from folders, the commit in the report, and only what is needed fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.checkpoints import INDEX, SHARDS, tiny_llama_pair
from helpers.command import contents, is_one_sentence, surgery
from helpers.hub_server import TOKEN, Hub, hub

NOISE = {"README.md": b"card", "pytorch_model.bin": b"pickle", "optimizer.pt": b"state", "original/params.json": b"{}"}
NEEDED = {*SHARDS, INDEX, "config.json"}
EDITED = {*SHARDS, INDEX, "config.json", "tokenizer.json"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path) as running:
        yield running


@pytest.fixture
def root(tmp_path: Path, server: Hub) -> Path:
    """Local folders `pre` and `ft`, and both on the hub, with what must not be fetched beside them."""
    tiny_llama_pair(tmp_path)
    (tmp_path / "ft/tokenizer.json").write_text("{}")
    for side, repo in (("pre", "org/base"), ("ft", "tuned")):
        files = {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()}
        server.add(repo, files | NOISE | {"tokenizer.json": b"{}"}, tag="v1")
        server.add(repo, files | {"config.json": b'{"later": 1}'})
    return tmp_path


def run(server: Hub, root: Path, *words: str, **env: str) -> tuple[int, str, str]:
    done = surgery(*words, cwd=root, env={"HF_HUB_OFFLINE": "0", **server.env, **env})
    return done.returncode, done.stdout, done.stderr


def fetched(server: Hub, repo: str) -> set[str]:
    return {name.removeprefix(f"{repo}/") for name in server.fetched if name.startswith(f"{repo}/")}


def test_both_from_the_hub(server: Hub, root: Path) -> None:
    code, _, err = run(server, root, "fapm", "--pre", "pre", "--ft", "ft", "--out", "local/out")
    assert (code, err) == (0, "")
    assert server.requests == []
    code, out, err = run(server, root, "fapm", "--pre", "org/base@v1", "--ft", "tuned@v1")
    assert (code, err) == (0, "")
    # Of a hub id, the output lies in the current folder.
    assert out.splitlines()[-1] == f"Wrote {root / 'tuned-fapm-0.9'}"
    local, remote = contents(root / "local/out"), contents(root / "tuned-fapm-0.9")
    assert local.keys() == remote.keys()
    assert {name for name in local if local[name] != remote[name]} == {"README.md", "surgery-report.json"}
    assert fetched(server, "org/base") == NEEDED
    assert fetched(server, "tuned") == EDITED

    report = json.loads((root / "tuned-fapm-0.9/surgery-report.json").read_text())
    for side, repo in (("pre", "org/base"), ("ft", "tuned")):
        found = server.snapshot(repo, "v1")
        assert not isinstance(found, int)
        assert (report[side]["repo"], report[side]["revision"]) == (repo, found[0])
    header = (root / "tuned-fapm-0.9/README.md").read_text().split("---")[1]
    assert 'base_model:\n- "tuned"\n- "org/base"\n' in header


def test_one_from_the_hub(server: Hub, root: Path) -> None:
    code, out, err = run(server, root, "hma", "--pre", "org/base", "--ft", "./ft", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["output"] == str(root / "ft-hma-0.5")
    assert fetched(server, "org/base") == NEEDED
    assert not (root / "ft-hma-0.5").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("org/gated", ("gated", "hf auth login")),
        ("org/missing", ("no hub repository 'org/missing'", "HF_TOKEN")),
        ("org/base@v9", ("no revision 'v9'",)),
    ],
)
@pytest.mark.parametrize("side", ["pre", "ft"])
def test_refused_by_the_hub(server: Hub, root: Path, typed: str, said: tuple[str, ...], side: str) -> None:
    server.add("org/gated", root / "pre")
    server.gated.add("org/gated")
    others = {"pre": "pre", "ft": "ft"} | {side: typed}
    code, out, err = run(server, root, "fapm", "--pre", others["pre"], "--ft", others["ft"])
    assert (code, out) == (1, "")
    assert is_one_sentence(err), err
    assert all(part in err for part in said)
    assert not list(root.glob("*fapm*"))


def test_a_gated_repository_with_a_token(server: Hub, root: Path) -> None:
    server.add("org/gated", root / "pre")
    server.gated.add("org/gated")
    code, _, err = run(server, root, "fapm", "--pre", "org/gated", "--ft", "ft", HF_TOKEN=TOKEN)
    assert (code, err) == (0, "")


def test_no_server(server: Hub, root: Path) -> None:
    code, _, err = run(server, root, "fapm", "--pre", "org/base", "--ft", "ft", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1
    assert is_one_sentence(err), err
    assert "cannot be reached" in err
