"""A small server that speaks the Hugging Face hub's protocol over local folders, on 127.0.0.1.

FOLDER/datasets/ORG/NAME/... and FOLDER/models/ORG/NAME/... are the repositories. `HF_ENDPOINT=server.url` points a process
at it; `server.bytes_sent` counts what it gave out, `server.asked` holds every (method, path) in order.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHUNK = 65_536


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if match := API.fullmatch(path):
            kind, name, what, _, inside = match.groups()
            self.answer_api(self.server.folder / kind / name, name, what, inside or "", body)
        elif match := FILE.fullmatch(path):
            kind, name, _, file = match.groups()
            self.answer_file(self.server.folder / (kind or "models/").rstrip("/") / name, file)
        else:
            self.refuse("EntryNotFound")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on the screen of the tests."""

    def answer_api(self, repo: Path, name: str, what: str | None, inside: str, body: bytes) -> None:
        if not repo.is_dir():
            return self.refuse("RepoNotFound")
        if what == "tree":
            pattern = "**/*" if "recursive=true" in self.path.lower() else "*"
            return self.json([entry(repo, path) for path in sorted((repo / inside).glob(pattern))])
        if what == "paths-info":
            paths = [repo / path for path in json.loads(body)["paths"]]
            return self.json([entry(repo, path) for path in paths if path.exists()])
        files = [{"rfilename": path.relative_to(repo).as_posix()} for path in sorted(repo.rglob("*")) if path.is_file()]
        return self.json({"id": name, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": files})

    def answer_file(self, repo: Path, file: str) -> None:
        path = repo / file
        if not path.is_file():
            return self.refuse("EntryNotFound" if repo.is_dir() else "RepoNotFound")
        data, first = path.read_bytes(), 0
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, size = 200, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send(status, data, headers)

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str) -> None:
        self.send(404, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(data), CHUNK):
                self.wfile.write(data[start : start + CHUNK])
                self.server.bytes_sent += len(data[start : start + CHUNK])


def entry(repo: Path, path: Path) -> dict:
    """How the hub describes one file or folder."""
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


@contextmanager
def hub(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve the repositories below `folder`; yields the server with `url`, `asked` and `bytes_sent`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.folder, server.asked, server.bytes_sent = folder, [], 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
