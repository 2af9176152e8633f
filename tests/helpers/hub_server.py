"""A model hub on loopback: as much of the HTTP interface as huggingface_hub needs to list and fetch a repository.

The repositories lie in a folder; every request is noted, so that a test can say what was never asked for.

    with hub(tmp_path) as server:
        server.add("org/base", {"config.json": b"{}", "model.safetensors": data}, tag="v1")
        subprocess.run([sys.executable, "-m", "surgery", "fapm", "--pre", "org/base@v1", ...], env=server.env)
        assert "org/base/pytorch_model.bin" not in server.fetched
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_let-me-in"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class Hub:
    """The repositories and what was asked of them; `env` is the environment that sends a process here.

    Attributes:
        gated: repositories whose files only a request with `TOKEN` may have. As on a real hub, anyone may list them.
        status: answer every request with this status, where set.
        requests: method and quoted path of each request, in order of arrival.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()
        self.status: int | None = None
        self.requests: list[tuple[str, str]] = []
        self.env: dict[str, str] = {}
        self._revisions: dict[str, dict[str, str]] = {}

    def add(self, repo: str, files: Mapping[str, bytes] | Path, *, branch: str = "main", tag: str | None = None) -> str:
        """Commit `files` (contents by name, or a folder) to `branch` and return the commit's sha."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + b"\0" + data)
        sha = digest.hexdigest()
        for name, data in files.items():
            path = self.root / repo / sha / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        revisions = self._revisions.setdefault(repo, {})
        revisions |= {branch: sha, sha: sha} | ({tag: sha} if tag else {})
        return sha

    @property
    def fetched(self) -> set[str]:
        """Files whose contents were sent, as `org/name/file`."""
        return {
            f"{match[1]}/{unquote(match[2])}"
            for method, path in self.requests
            if method == "GET" and (match := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path))
        }

    def snapshot(self, repo: str, revision: str) -> tuple[str, Path] | int:
        """Return sha and folder of a revision, or the status to answer with: 401 for the repository, 404 for it."""
        if repo not in self._revisions:
            return 401
        sha = self._revisions[repo].get(revision)
        return 404 if sha is None else (sha, self.root / repo / sha)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path  # still quoted: in refs%2Fpr%2F3 the slashes belong to the revision
        self.hub.requests.append((self.command, path))
        if self.hub.status is not None:
            self._send(self.hub.status)
        elif match := re.fullmatch(r"/api/models/(.+)/tree/(.+)", path):
            self._list(match[1], unquote(match[2]), tree=True)
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self._list(match[1], unquote(match[2] or "main"), tree=False)
        elif match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._send(404)

    def _list(self, repo: str, revision: str, *, tree: bool) -> None:
        found = self._snapshot(repo, revision)
        if found is None:
            return
        sha, folder = found
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        answer: object
        if tree:
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in names.items()
            ]
        else:
            answer = {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in names]}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        found = self._snapshot(repo, revision)
        if found is None:
            return
        sha, folder = found
        commit = {"X-Repo-Commit": sha}
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, headers=commit | {"X-Error-Code": "GatedRepo"})
            return
        path = folder / name
        if not path.is_file():
            self._send(404, headers=commit | {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = commit | {"ETag": f'"{_oid(data)}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, size = int(match[1]), len(data)
            end = min(int(match[2] or size - 1), size - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            self._send(206, data[start : end + 1], headers)
        else:
            self._send(200, data, headers)

    def _snapshot(self, repo: str, revision: str) -> tuple[str, Path] | None:
        found = self.hub.snapshot(repo, revision)
        if isinstance(found, int):
            self._send(found, headers={"X-Error-Code": {401: "RepoNotFound", 404: "RevisionNotFound"}[found]})
            return None
        return found

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    """Return the name git gives a file's contents, which the hub uses as its ETag."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """Serve an empty hub on a free port; its repositories and the cache that `env` names lie in `folder`."""
    served = Hub(folder / "hub-repositories")
    handler = type("Handler", (_Handler,), {"hub": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        ours = {
            name: value for name, value in os.environ.items() if not name.startswith("HF_") and name not in _PROXIES
        }
        served.env = ours | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(folder / "hub-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
