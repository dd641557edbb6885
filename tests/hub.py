"""A stand-in for the Hub's endpoint: the calls that huggingface_hub makes to push a model, and what it has then."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "standinstandinstandin"  # of nobody


@dataclass
class Repo:
    """One repository: files of each branch, and its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: list[dict[str, Any]] = field(default_factory=list)


class Hub:
    """What the Hub holds, and how it is to answer.

    Attributes:
        repos: by name.
        requests: method and path of each, in order.
        refuse: status by the beginning of a path: answered in place of doing what is asked.
        words: what a refusal says.
        taken: names of repositories that are none of the user's models.
        ignored: files that the repository's .gitignore names.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, int] = {}
        self.words = "no"
        self.ignored: set[str] = set()
        self.taken: set[str] = set()
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Status and content of an answer."""
        for begin, status in self.refuse.items():
            if path.startswith(begin):
                return status, {"error": self.words}
        if method == "PUT" and path.startswith("/objects/"):
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": f"Invalid credentials: {token}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repos or name in self.taken:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name] = Repo(private=asked["visibility"] == "private")
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(item) for item in json.loads(body)["objects"]]}
        return self._of_repo(path, body)

    def _object(self, item: dict[str, Any]) -> dict[str, Any]:
        upload = {"actions": {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}}
        return item | ({} if item["oid"] in self.objects else upload)

    def _of_repo(self, path: str, body: bytes) -> tuple[int, Any]:
        _, api, kind, owner, name, *rest = path.split("/")
        repo = self.repos.get(f"{owner}/{name}")
        if (api, kind) != ("api", "models") or repo is None:
            return 404, {"error": "Repository not found"}
        verb, branch = (rest[0], unquote(rest[1])) if rest else ("revision", "main")
        if verb == "branch":
            if branch in repo.branches:
                return 409, {"error": "Reference already exists"}
            repo.branches[branch], repo.heads[branch] = dict(repo.branches["main"]), repo.heads["main"]
            return 200, {}
        branch = next((known for known, head in repo.heads.items() if head == branch), branch)
        if branch not in repo.branches:
            return 404, {"error": "Invalid rev id"}
        files = repo.branches[branch]
        if verb == "revision":
            siblings = [{"rfilename": file} for file in files]
            head = repo.heads[branch]
            return 200, {"id": f"{owner}/{name}", "sha": head, "private": repo.private, "siblings": siblings}
        if verb == "preupload":
            asked = json.loads(body)
            ignored = self.ignored if "gitIgnore" not in asked else set()
            return 200, {"files": [self._mode(file["path"], files, ignored) for file in asked["files"]]}
        assert verb == "commit"
        return 200, self._commit(f"{owner}/{name}", branch, [json.loads(line) for line in body.splitlines()])

    def _mode(self, path: str, files: dict[str, bytes], ignored: set[str]) -> dict[str, Any]:
        large = path.endswith(".safetensors")
        found = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": path in ignored}
        if path in files:
            content = files[path]
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            found["oid"] = hashlib.sha256(content).hexdigest() if large else git
        return found

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> dict[str, str]:
        repo = self.repos[name]
        files = repo.branches[branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append({"branch": branch, "message": lines[0]["value"]["summary"]})
        repo.heads[branch] = hashlib.sha1(f"{branch}{len(repo.commits)}".encode()).hexdigest()
        return {"commitUrl": f"{self.url}/{name}/commit/{repo.heads[branch]}", "commitOid": repo.heads[branch]}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Let a stand-in answer on a port of this machine; `hub.url` is its endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            status, content = hub.answer(self.command, path, body, self.headers.get("Authorization"))
            data = json.dumps(content).encode()
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
                if content["error"] == "Repository not found":
                    self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *arguments: object) -> None:
            pass

    with served(Handler) as hub.url:
        yield hub


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free port of this machine, for as long as the block runs; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
