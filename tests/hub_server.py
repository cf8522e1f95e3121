"""A small Hugging Face Hub on this machine, for `HF_ENDPOINT`: the part of its HTTP API that pushes and loads need.

Repositories with branches and commits, files sent in a commit or by LFS, private repositories, tokens that may read or
write, ranges of bytes, and the error codes by which huggingface_hub tells one refusal from another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".png")
"""Files that go by LFS, whatever their size."""


def front_matter_fault(card: str) -> str | None:
    """What the Hub would not understand in a model card: no mapping, or results not where it looks for them."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else {}
        if not isinstance(fields, dict):
            return "metadata is not a mapping"
        for result in (result for entry in fields.get("model-index", []) for result in entry["results"]):
            _ = result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"], result["metrics"]
    except (yaml.YAMLError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class RefusedError(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | headers


@dataclass
class Repo:
    """Files by commit, commits by branch; `log` has the messages of all commits."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        """Make these files (path -> SHA-256) the head of a branch."""
        parent = self.branches.get(branch)
        sha = hashlib.sha1(json.dumps([parent, files, message], sort_keys=True).encode()).hexdigest()
        self.branches[branch], self.commits[sha] = sha, files
        self.log.append(message)
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch or the SHA of a commit stands for."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclass
class Hub:
    """What the server knows.

    Attributes:
        folder: holds the contents of files, by SHA-256.
        tokens: token -> (user, `read` or `write`).
        requests: method and path of every request, in order.
        url: where it listens.
    """

    folder: Path
    tokens: dict[str, tuple[str, str]]
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def store(self, content: bytes) -> str:
        """Keep a content; its SHA-256."""
        sha = hashlib.sha256(content).hexdigest()
        (self.folder / sha).write_bytes(content)
        return sha

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file."""
        repo = self.repos[repo_id]
        return (self.folder / repo.commits[repo.resolve(revision)][path]).read_bytes()

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        """The paths of a commit's files."""
        repo = self.repos[repo_id]
        return sorted(repo.commits[repo.resolve(revision)])


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def handle_request(self) -> None:
        """Find the route, and answer what it returns as JSON, or what it refuses."""
        self.hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self.user, self.role = self.who()
            for methods, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    answer = action(self, *match.groups())
                    return None if answer is None else self.answer(200, json.dumps(answer).encode())
            raise RefusedError(404, message=f"no such route: {self.command} {path}")
        except RefusedError as refused:
            self.answer(refused.status, json.dumps({"error": str(refused)}).encode(), **refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (names that http.server looks for)

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        """Send a status, headers and, but for HEAD, the content."""
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (defaults | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing on stderr."""

    # Who may do what

    def who(self) -> tuple[str | None, str | None]:
        """The user of the token and what it is for; none without a token."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, (None, None))

    def readable(self, repo_id: str) -> Repo:
        """A repository that the user may see; one that it may not see looks like one that does not exist."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split("/")[0] != self.user):
            raise RefusedError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, repo_id: str) -> Repo:
        """A repository that the user may change."""
        self.check_writes(repo_id.split("/")[0])
        return self.readable(repo_id)

    def check_writes(self, owner: str) -> None:
        """Refuse users without a token, with one that may only read, and those of others' repositories."""
        if self.user is None:
            raise RefusedError(401, message="Invalid username or password.")
        if self.role != "write" or self.user != owner:
            raise RefusedError(403, message=f"You don't have the rights to write to {owner}'s repositories")

    # Repositories

    def whoami(self) -> dict:
        if self.user is None:
            raise RefusedError(401, message="Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    def create(self) -> dict | None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        self.check_writes(owner)
        repo_id = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.answer(409, json.dumps(url | {"error": "You already created this model repo"}).encode())
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repos[repo_id] = repo = Repo(private)
        repo.commit("main", {}, "initial commit")
        return url

    def info(self, repo_id: str, revision: str | None) -> dict:
        repo = self.readable(repo_id)
        sha = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        return {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, repo_id: str, revision: str, folder: str | None) -> list[dict]:
        repo = self.readable(repo_id)
        files = repo.commits[repo.resolve(revision)]
        inside = {path: sha for path, sha in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise RefusedError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        return [
            {"type": "file", "oid": sha[:40], "size": (self.hub.folder / sha).stat().st_size, "path": path}
            for path, sha in sorted(inside.items())
        ]

    def branch(self, repo_id: str, name: str) -> dict:
        repo = self.writable(repo_id)
        if name in repo.branches:
            raise RefusedError(409, message=f"Reference already exists: {name}")
        repo.branches[name] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        return {"ref": name}

    # Commits

    def validate_yaml(self) -> dict | None:
        fault = front_matter_fault(json.loads(self.body)["content"])
        answer = {"errors": [{"message": fault}] if fault else [], "warnings": []}
        return self.answer(400, json.dumps(answer).encode()) if fault else answer

    def preupload(self, repo_id: str, revision: str) -> dict:
        self.writable(repo_id).resolve(revision)
        return {
            "files": [
                {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
                for path in (file["path"] for file in json.loads(self.body)["files"])
            ]
        }

    def lfs_batch(self, repo_id: str) -> dict:
        self.writable(repo_id)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if not (self.hub.folder / entry["oid"]).exists():
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, message="the content has another SHA-256")
        self.hub.store(self.body)
        return {}

    def commit(self, repo_id: str, branch: str) -> dict:
        repo = self.writable(repo_id)
        files, message = dict(repo.commits[repo.resolve(branch)]), ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile" and (self.hub.folder / value["oid"]).exists():
                files[value["path"]] = value["oid"]
            else:
                raise RefusedError(400, message=f"this Hub cannot commit {key} {value.get('path')}")
        sha = repo.commit(branch, files, message)
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}

    # Files

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """A file; large ones lie elsewhere, as on the Hub."""
        repo = self.readable(repo_id)
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit}
        sha = repo.commits[commit].get(path)
        if sha is None:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {revision!r}", **headers)
        if not path.endswith(LARGE):
            return self.send_content(sha, **headers)
        size = str((self.hub.folder / sha).stat().st_size)
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # another host: it must not be sent the token
        headers |= {"Location": f"{elsewhere}/lfs/{sha}", "X-Linked-Size": size, "X-Linked-Etag": f'"{sha}"'}
        return self.answer(302, b"", **headers)

    def send_content(self, sha: str, **headers: str) -> None:
        """A content, or the range of it that was asked for."""
        content = (self.hub.folder / sha).read_bytes()
        headers |= {"ETag": f'"{sha}"', "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, content, **headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.answer(206, content[start : end + 1], **headers)


REPO, REVISION = r"([^/]+/[^/]+)", r"(.+?)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    ("GET HEAD", "/lfs/([0-9a-f]{64})", Handler.send_content),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
)


class Server(ThreadingHTTPServer):
    """The server of one Hub."""

    daemon_threads = True

    def __init__(self, hub: Hub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve a Hub while the block runs; its URL."""
    server = Server(hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
