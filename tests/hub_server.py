"""A server on the loopback that answers as the Hub does: files of commits, repositories, pushes, pull requests."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants


class HubServer:
    """
    Attributes:
        url: For `HF_ENDPOINT`.
        requests: What was asked, as `"GET /path"`.
        refs: For each repository, the commits of its branches and pull requests.
        pull_requests: Descriptions of the pull requests, in their order.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[str] = []
        self.refs: dict[str, dict[str, str]] = {}
        self.pull_requests: list[str] = []
        self._commits: dict[str, dict[str, bytes]] = {}

    def add(self, repo: str, folder: Path, *names: str) -> str:
        """Commit files of a folder to the main branch, and return the commit."""
        return self.commit(repo, {name: (folder / name).read_bytes() for name in names})

    def commit(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        parent = self.refs.setdefault(repo, {}).get("main", "")
        content = self._commits.get(parent, {}) | files
        commit = hashlib.sha1(f"{repo}{parent}{ref}{sorted(files)}".encode()).hexdigest()
        self._commits[commit] = content
        self.refs[repo][ref] = commit
        return commit

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a branch, pull request or commit."""
        return self._commits.get(self.refs.get(repo, {}).get(revision, revision))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        match words:
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                self._json({"url": f"{self.hub.url}/{repo}"}, 409 if repo in self.hub.refs else 200)
                self.hub.refs.setdefault(repo, {}) or self.hub.commit(repo, {})
            case ["api", "models", owner, name, "preupload", _]:
                files = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                self._json({"files": modes})
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", revision, body, "create_pr" in parse_qs(url.query))
            case ["api", "models", owner, name, *rest]:
                self._info(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *path]:
                self._file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._missing("RepoNotFound")

    def _commit(self, repo: str, revision: str, body: bytes, create_pr: bool) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {
            operation["value"]["path"]: base64.b64decode(operation["value"]["content"])
            for operation in operations
            if operation["key"] == "file"
        }
        number = len(self.hub.pull_requests) + 1
        commit = self.hub.commit(repo, files, f"refs/pr/{number}" if create_pr else revision)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
        if create_pr:
            self.hub.pull_requests.append(header["value"]["description"])
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self._json(answer)

    def _info(self, repo: str, rest: list[str]) -> None:
        kind, revision, folder = rest[0] if rest else "", rest[1] if len(rest) > 1 else "main", "/".join(rest[2:])
        files = self.hub.files(repo, revision)
        if files is None:
            self._missing("RevisionNotFound" if repo in self.hub.refs else "RepoNotFound")
        elif kind == "tree":
            found = [name for name in files if name.startswith(f"{folder}/" if folder else "")]
            if found:
                self._json([{"type": "file", "path": name, "oid": "", "size": len(files[name])} for name in found])
            else:
                self._missing("EntryNotFound")
        else:
            commit = self.hub.refs[repo].get(revision, revision)
            self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files], "tags": []})

    def _file(self, repo: str, revision: str, path: str) -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            self._missing("RevisionNotFound" if repo in self.hub.refs else "RepoNotFound")
            return
        headers = {"X-Repo-Commit": self.hub.refs[repo].get(revision, revision)}
        if path not in files:
            self._missing("EntryNotFound", headers)
            return
        self._send(files[path], 200, headers | {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'})

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(b"", 404, (headers or {}) | {"X-Error-Code": code})

    def _json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server until the end of the context."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, offline: bool = False) -> None:
    """Let `huggingface_hub` and transformers use a server, and the caches in `home`."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.utils._cache_assets, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
