"""`surgery.checkpoint.hub`: what is typed becomes a folder; only what is needed is asked of the hub.

The hub library reads its environment when it is imported, so every resolution runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_server import TOKEN, Hub, hub

from surgery.checkpoint.companions import travels
from surgery.checkpoint.hub import Source, resolve
from surgery.errors import CheckpointError

CONFIG = {"config.json": b'{"model_type": "llama"}'}
SINGLE = CONFIG | {"model.safetensors": b"weights of one file"}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}})
SHARDED = CONFIG | {
    "model.safetensors.index.json": INDEX.encode(),
    "model-1.safetensors": b"first",
    "model-2.safetensors": b"second",
}
COMPANIONS = {
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "generation_config.json": b'{"top_k": 1}',
    "modeling_own.py": b"# code",
    "LICENSE": b"terms",
    "additional_chat_templates/tools [v2].jinja": b"{{ tools }}",
}
NOISE = {
    ".gitattributes": b"x",
    "README.md": b"card",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "model.fp16.safetensors": b"half",
    "optimizer.pt": b"state",
    "trainer_state.json": b"{}",
    "model.gguf": b"quantized",
    "original/consolidated.00.pth": b"raw",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"graph",
    "onnx/config.json": b"{}",
}

SCRIPT = """
import json, sys
from surgery.checkpoint.hub import resolve
from surgery.errors import SurgeryError
try:
    source = resolve(sys.argv[1], companions=sys.argv[2] == "companions")
    answer = {"folder": str(source.folder), "repo": source.repo, "revision": source.revision, "typed": source.typed}
except SurgeryError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
answer["hub imported"] = "huggingface_hub" in sys.modules
print(json.dumps(answer))
"""

# The download meets a full disk: what the library's own writes raise is put in place of the transfer.
FULL_DISK = """
import errno, huggingface_hub.file_download as library
def http_get(*args, **kwargs):
    raise OSError(errno.ENOSPC, "from the transfer")
library.http_get = http_get
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path) as running:
        yield running


def run(
    server: Hub, typed: str, *, companions: bool = False, cwd: Path | None = None, before: str = "", **env: str
) -> dict[str, Any]:
    """Resolve `typed` in a process of its own; the answer holds the source's fields, or the error and its message."""
    done = subprocess.run(
        [sys.executable, "-c", before + SCRIPT, typed, "companions" if companions else "weights"],
        env=server.env | env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    answer["stderr"] = done.stderr
    return answer


def files(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def under(repo: str, *names: str) -> set[str]:
    return {f"{repo}/{name}" for name in names}


@contextmanager
def not_root() -> Iterator[None]:
    """Drop the rights that let root read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_single_file_without_companions(server: Hub) -> None:
    sha = server.add("org/base", SINGLE | COMPANIONS | NOISE)
    answer = run(server, "org/base")
    assert (answer["typed"], answer["repo"], answer["revision"]) == ("org/base", "org/base", sha)
    assert files(answer["folder"]) == set(SINGLE)
    assert server.fetched == under("org/base", *SINGLE)
    assert answer["stderr"] == ""  # no progress bar where stderr is no terminal


def test_single_file_with_companions(server: Hub) -> None:
    server.add("tuned", SINGLE | COMPANIONS | NOISE)
    answer = run(server, "tuned", companions=True)
    assert files(answer["folder"]) == {*SINGLE, *COMPANIONS}
    assert server.fetched == under("tuned", *SINGLE, *COMPANIONS)


def test_sharded_fetches_exactly_the_shards_of_the_index(server: Hub) -> None:
    server.add("org/base", SHARDED | NOISE | {"model-3.safetensors": b"stale"})
    answer = run(server, "org/base")
    assert files(answer["folder"]) == set(SHARDED)
    assert server.fetched == under("org/base", *SHARDED)


def test_a_single_file_stands_before_an_index(server: Hub) -> None:
    server.add("org/base", SHARDED | SINGLE)
    run(server, "org/base")
    assert server.fetched == under("org/base", *SINGLE)


def test_the_only_safetensors_file_is_taken_whatever_its_name(server: Hub) -> None:
    server.add("org/base", CONFIG | {"weights.safetensors": b"w", "sub/other.safetensors": b"o"})
    assert files(run(server, "org/base")["folder"]) == {"config.json", "weights.safetensors"}


def test_revisions_by_tag_branch_and_sha(server: Hub) -> None:
    old = server.add("org/base", SINGLE, tag="v1")
    new = server.add("org/base", SINGLE | {"model.safetensors": b"newer"})
    side = server.add("org/base", SINGLE | {"model.safetensors": b"aside"}, branch="refs/pr/3")
    for typed, sha in (("@v1", old), ("", new), ("@refs/pr/3", side), (f"@{old}", old)):
        answer = run(server, f"org/base{typed}")
        assert answer["revision"] == sha, typed
        assert Path(answer["folder"]).name == sha


def test_an_existing_folder_wins_and_the_hub_library_is_not_imported(server: Hub, tmp_path: Path) -> None:
    server.add("org/base", SINGLE)
    for name in ("org/base", "ft@v1", "org/base@main"):
        (tmp_path / name).mkdir(parents=True)
    for typed in ("org/base", "ft@v1", "./ft@v1", "org/base@main", str(tmp_path / "ft@v1")):
        answer = run(server, typed, cwd=tmp_path)
        assert (answer["repo"], answer["revision"], answer["hub imported"]) == (None, None, False)
        assert tmp_path / answer["folder"] == tmp_path / typed
    assert server.requests == []


@pytest.mark.parametrize(
    "typed",
    ["./nowhere", "./nowhere@v1", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "a b", "org/--x", "", "x@", "x@../y"],
)
def test_a_path_that_does_not_exist(typed: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as raised:
        resolve(typed, companions=False)
    assert repr(typed) in str(raised.value)


def test_a_file_is_taken_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    assert resolve(str(path), companions=False) == Source(str(path), tmp_path, None, None, "model.safetensors")


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a folder nor a file"):
        resolve(str(tmp_path / "pipe"), companions=False)


def test_a_broken_link_and_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CheckpointError, match="is a link to 'nowhere', which does not exist"):
        resolve(str(tmp_path / "gone"), companions=False)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(str(tmp_path / "circle"), companions=False)


@pytest.mark.parametrize(
    ("mode", "below"), [(0o000, ""), (0o444, ""), (0o111, ""), (0o000, "/ft"), (0o444, "/ft"), (0o000, "/nowhere")]
)
def test_no_permission_is_said_so(tmp_path: Path, mode: int, below: str) -> None:
    folder = tmp_path / "locked"
    (folder / "ft").mkdir(parents=True)
    folder.chmod(mode)
    try:
        with not_root(), pytest.raises(CheckpointError, match="no permission"):
            resolve(f"{folder}{below}", companions=False)
    finally:
        folder.chmod(0o755)


def test_gated(server: Hub) -> None:
    server.add("org/gated", SHARDED)
    server.gated.add("org/gated")
    answer = run(server, "org/gated")
    assert answer["error"] == "HubError"
    assert "'org/gated' is gated: accept its licence" in answer["message"]
    assert "hf auth login" in answer["message"]
    assert "HF_TOKEN" in answer["message"]
    assert files(run(server, "org/gated", HF_TOKEN=TOKEN)["folder"]) == set(SHARDED)


def test_missing_repository_and_missing_revision(server: Hub) -> None:
    server.add("org/base", SINGLE)
    answer = run(server, "org/bsae@v1")
    assert answer["error"] == "HubError"
    assert "no folder 'org/bsae@v1' here and no hub repository 'org/bsae' that you may see" in answer["message"]
    answer = run(server, "org/base@v9")
    assert answer["error"] == "HubError"
    assert "'org/base' has no revision 'v9'" in answer["message"]


def test_without_network_the_cache_serves(server: Hub) -> None:
    sha = server.add("org/base", SHARDED | COMPANIONS, tag="v1")
    online = run(server, "org/base@v1")
    asked = len(server.requests)
    offline = run(server, "org/base@v1", HF_HUB_OFFLINE="1")
    assert (offline["folder"], offline["revision"]) == (online["folder"], sha)
    assert offline["stderr"] == ""
    assert len(server.requests) == asked
    # Another program fetches file by file, and leaves no list of what the repository holds.
    shutil.rmtree(Path(online["folder"]).parents[1] / "trees")
    assert run(server, "org/base@v1", HF_HUB_OFFLINE="1")["folder"] == online["folder"]
    unreachable = run(server, "org/base@v1", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable["folder"] == online["folder"]
    assert "using the cached copy" in unreachable["stderr"]
    server.status = 503
    assert run(server, "org/base@v1")["folder"] == online["folder"]


def test_without_network_an_incomplete_copy_does_not_serve(server: Hub) -> None:
    server.add("org/base", SHARDED | COMPANIONS)
    folder = run(server, "org/base")["folder"]
    # Fetched without the tokenizer: to edit from this copy would lose it.
    answer = run(server, "org/base", companions=True, HF_HUB_OFFLINE="1")
    assert (answer["error"], "HF_HUB_OFFLINE is set" in answer["message"]) == ("HubError", True)
    (Path(folder) / "model-2.safetensors").unlink()
    answer = run(server, "org/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert (answer["error"], "cannot be reached" in answer["message"]) == ("HubError", True)


def test_nothing_cached(server: Hub) -> None:
    answer = run(server, "org/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["error"] == "HubError"
    assert "no folder 'org/base' here, and the hub cannot be reached" in answer["message"]
    answer = run(server, "org/base", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in answer["message"]


def test_other_answers(server: Hub) -> None:
    server.add("org/base", SINGLE)
    for status in (400, 401, 403, 404, 429, 500):
        server.status = status
        answer = run(server, "org/base")
        assert answer["error"] == "HubError"
        assert "refused your token" in answer["message"] if status == 401 else f"answered {status}" in answer["message"]


def test_an_endpoint_that_is_no_hub(server: Hub) -> None:
    server.status = 200
    answer = run(server, "org/base")
    assert answer["error"] == "HubError"
    assert "check HF_ENDPOINT" in answer["message"]


@pytest.mark.parametrize("shard", ["../outside/x.safetensors", "/etc/x.safetensors", "..", "a\\b.safetensors", 7])
def test_an_index_that_points_outside_is_refused(server: Hub, shard: object) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": shard}}).encode()
    server.add("org/base", SHARDED | {"model.safetensors.index.json": index})
    answer = run(server, "org/base")
    assert answer["error"] == "CheckpointError"
    assert repr(shard) in answer["message"]
    assert server.fetched == under("org/base", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b'{"weight_map": {"a": "model-9.safetensors"}}', "'model-9.safetensors', which the repository does not have"),
        (b'{"weight_map": {}}', "names no shard"),
        (b'{"weight_map": {"a": ["x"]}}', "weight_map"),
        (b"[]", "weight_map"),
        (b"{", "weight_map"),
    ],
)
def test_a_malformed_index(server: Hub, index: bytes, said: str) -> None:
    server.add("org/base", SHARDED | {"model.safetensors.index.json": index})
    answer = run(server, "org/base")
    assert answer["error"] == "CheckpointError"
    assert said in answer["message"]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (CONFIG | {"tf_model.h5": b"h5"}, "tf_model.h5, which surgery does not read"),
        (CONFIG | {"unet/model.safetensors": b"part"}, "not a checkpoint: it has neither model.safetensors nor"),
        (CONFIG | {"a.safetensors": b"a", "b.safetensors": b"b"}, "2 safetensors files"),
        ({"adapter_config.json": b"{}"}, "an adapter without its weights"),
        ({"model.safetensors": b"w"}, "has no config.json"),
    ],
)
def test_nothing_to_edit(server: Hub, contents: dict[str, bytes], said: str) -> None:
    server.add("org/base", contents)
    answer = run(server, "org/base", companions=True)
    assert answer["error"] == "HubError"
    assert said in answer["message"]
    assert server.fetched == set()


def test_disk_full_and_a_cache_that_may_not_be_written(server: Hub, tmp_path: Path) -> None:
    server.add("org/base", SINGLE)
    answer = run(server, "org/base", before=FULL_DISK)
    assert answer["error"] == "HubError"
    assert "disk full while fetching 'org/base'" in answer["message"]
    assert "HF_HOME" in answer["message"]
    answer = run(server, "org/base", before=FULL_DISK.replace("ENOSPC", "EACCES"))
    assert "no permission to write to the hub cache" in answer["message"]


@pytest.mark.parametrize("name", [*COMPANIONS, "vocab.txt", "chat_template.jinja", "special_tokens_map.json"])
def test_travels(name: str) -> None:
    assert travels(name)


@pytest.mark.parametrize(
    "name",
    [*NOISE, *sorted((SHARDED | SINGLE).keys() - CONFIG.keys()), "events.out.tfevents.1", "readme.txt", "runs/x/y"],
)
def test_stays(name: str) -> None:
    assert not travels(name)
