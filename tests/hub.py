# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for the Hub on this machine, for the real client: models and data sets are folders, and commits change them.

It answers what `huggingface_hub`, `transformers` and `datasets` ask for when they load from the Hub and push to it. A client is
pointed at it by `environment()`, which must be set before those packages are imported.
"""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_local"
USER = "someone"


class Hub:
    """
    Context manager that serves `root/models/<owner>/<name>` and `root/datasets/<owner>/<name>`.

    Args:
        root (`Path`): The folder. Models that are pushed appear in it.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.commits: list[tuple[str, str]] = []  # the repository and the message of each
        self.uploads: dict[str, bytes] = {}  # what was sent by git-lfs, by its hash
        self.broken = False  # whether commits are refused
        self.closed = False

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that takes this for the Hub and `home` for its cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # whose servers there is no stand-in for
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer("HEAD")

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        if self.hub.closed:  # on a connection that the client keeps
            self.close_connection = True
            return None
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        if method == "PUT" and path.startswith("lfs/"):
            self.hub.uploads[path.removeprefix("lfs/")] = body
            return self._send(b"")
        if path.startswith("api/"):
            return self._api(method, path.removeprefix("api/"), parse_qs(url.query), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs(json.loads(body))
        kind, path = ("datasets", path.removeprefix("datasets/")) if path.startswith("datasets/") else ("models", path)
        if "/resolve/" in path:
            repository, _, rest = path.partition("/resolve/")
            return self._file(kind, repository, rest.partition("/")[2])
        self._missing("RepoNotFound")

    # ---- Reading ---------------------------------------------------------------

    def _file(self, kind: str, repository: str, name: str) -> None:
        folder = self.hub.root / kind / repository
        if not folder.is_dir():
            return self._missing("RepoNotFound")
        if not (folder / name).is_file():
            return self._missing("EntryNotFound", {"X-Repo-Commit": _sha(folder)})
        content = (folder / name).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": _sha(folder),
            "Accept-Ranges": "bytes",
        }
        status = 200
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            content, status = part, 206
        self._send(content, headers, status=status, kind="application/octet-stream")

    def _api(self, method: str, path: str, query: dict, body: bytes) -> None:
        if path == "whoami-v2":
            return self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if path == "repos/create":
            return self._create(json.loads(body))
        if path == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        kind, owner, name, *rest = [*path.split("/"), "", ""][: max(3, path.count("/") + 1)]
        folder = self.hub.root / kind / owner / name
        if kind not in ("models", "datasets") or not (owner and name and folder.is_dir()):
            return self._missing("RepoNotFound")
        if not rest or rest[0] == "revision":
            return self._json(_info(kind, f"{owner}/{name}", folder))
        if rest[0] == "tree":
            return self._json(
                _tree(folder, "/".join(rest[2:]), "recursive" in query and query["recursive"] != ["False"])
            )
        if rest[0] == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            entries = [_entry(folder, folder / path) for path in wanted if (folder / path).exists()]
            return self._json(entries)
        if rest[0] == "preupload":
            files = [_preupload(folder, file) for file in json.loads(body)["files"]]
            return self._json({"files": files})
        if rest[0] == "commit" and method == "POST":
            return self._commit(f"{owner}/{name}", folder, body)
        self._missing("EntryNotFound")

    # ---- Writing ---------------------------------------------------------------

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send(b'{"error": "Invalid username or password."}', status=401)
        return False

    def _create(self, wanted: dict) -> None:
        if not self._may_write():
            return
        repository = f"{wanted.get('organization') or USER}/{wanted['name']}"
        folder = self.hub.root / f"{wanted.get('type') or 'model'}s" / repository
        existed = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.hub.url}/{repository}", "name": repository}, status=409 if existed else 200)

    def _lfs(self, wanted: dict) -> None:
        if not self._may_write():
            return
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, folder: Path, body: bytes) -> None:
        if not self._may_write():
            return
        if self.hub.broken:
            return self._send(b'{"error": "You have reached your quota."}', status=403)
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
                continue
            target = folder / value["path"]
            if operation["key"].startswith("deleted"):
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            lfs = operation["key"] == "lfsFile"
            target.write_bytes(self.hub.uploads[value["oid"]] if lfs else base64.b64decode(value["content"]))
        self.hub.commits.append((repository, message))
        sha = _sha(folder)
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{sha}", "commitOid": sha, "success": True})

    # ---- Sending ---------------------------------------------------------------

    def _json(self, content, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status=status)

    def _missing(self, code: str, headers: dict | None = None) -> None:
        message = {"error": "Repository not found" if code == "RepoNotFound" else "Entry not found"}
        status = 404
        self._send(json.dumps(message).encode(), {"X-Error-Code": code, **(headers or {})}, status=status)

    def _send(
        self, content: bytes, headers: dict | None = None, *, status: int = 200, kind: str = "application/json"
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha(folder: Path) -> str:
    """The commit: it is another one when a file is."""
    digest = hashlib.sha1()
    for path in _files(folder):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _info(kind: str, repository: str, folder: Path) -> dict:
    return {
        "id": repository,
        "modelId": repository,
        "author": repository.partition("/")[0],
        "sha": _sha(folder),
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "private": False,
        "disabled": False,
        "gated": False,
        "downloads": 0,
        "likes": 0,
        "tags": ["license:apache-2.0"],
        "siblings": [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)],
    }


def _tree(folder: Path, below: str, recursive: bool) -> list[dict]:
    start = folder / below
    found = start.rglob("*") if recursive else start.glob("*")
    return [_entry(folder, path) for path in sorted(found)]


def _entry(folder: Path, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "path": path.relative_to(folder).as_posix(), "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    return {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "oid": hashlib.sha1(content).hexdigest(),
        "size": len(content),
    }


def _preupload(folder: Path, file: dict) -> dict:
    binary = file["path"].endswith((".safetensors", ".bin", ".png", ".pt"))
    return {
        "path": file["path"],
        "uploadMode": "lfs" if binary else "regular",
        "shouldIgnore": False,
        "oid": None,
    }
