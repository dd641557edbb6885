"""A stand-in for the Hub that has something to download: models and data sets of one commit each."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import served

COMMIT = "c0ffee" + "0" * 34


class Downloads:
    """What there is, and what was asked for.

    Attributes:
        repos: files by `models/org/name` or `datasets/org/name`.
        requests: method and path of each, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
            files = self.repos.get(f"{kind}/{name}")
            if files is None:
                return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
            entries = [self._entry(file, content) for file, content in files.items()]
            if rest[:1] == ["paths-info"]:
                wanted = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
                return 200, {}, json.dumps([entry for entry in entries if entry["path"] in wanted]).encode()
            if rest[:1] == ["tree"]:
                return 200, {}, json.dumps(entries).encode()
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": [], "gated": False}
            return 200, {}, json.dumps(info | {"downloads": 0, "likes": 0}).encode()
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if parts[0] == "datasets" else parts
        content = self.repos.get(f"{kind}/{'/'.join(parts[:2])}", {}).get("/".join(parts[4:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}, b""
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve(hub: Downloads) -> Iterator[Downloads]:
    """Let it answer on a port of this machine; `hub.url` is its endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, headers, content = hub.answer(self.command, path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    with served(Handler) as hub.url:
        yield hub
