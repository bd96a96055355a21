"""A small Hub on loopback: the HTTP endpoints that huggingface_hub uses to push a model and to load it."""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_of_the_tests"
LFS_SUFFIXES = (".safetensors", ".onnx", ".data", ".png")


def blob_oid(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """Files by path after the last commit; files kept apart by every pull request; oids of the commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"initial").hexdigest()])
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)


class LocalHub(ThreadingHTTPServer):
    """
    Args:
        drop: Requests whose connection is cut once: `"lfs"` in the middle of an upload, `"commit"` before a commit is
            made, `"response"` after it.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.drop: list[str] = []

    def handle_error(self, request, client_address):
        pass  # clients whose connection was cut

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *args):
        pass

    # The answers

    def answer(self, content, status: int = 200, **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def wants_drop(self, kind: str) -> bool:
        if kind in self.server.drop:
            self.server.drop.remove(kind)
            return True
        return False

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # The routes

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.server.requests.append(f"{self.command} {path}")
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, name)(**match.groupdict())
        self.body()
        self.refuse(404, "RepoNotFound" if "/api/models/" not in path else "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @property
    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo: str) -> Repository | None:
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self.is_authorized):
            self.refuse(404 if self.is_authorized else 401, "RepoNotFound")
            return None
        return found

    def create(self) -> None:
        body = json.loads(self.body())
        if not self.is_authorized:
            return self.refuse(401, "Unauthorized")
        repo = f"{body['organization']}/{body['name']}"
        if repo in self.server.repositories:
            url = f"{self.server.endpoint}/{repo}"
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        self.server.repositories[repo] = Repository(body.get("visibility") == "private")
        self.answer({"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def validate_yaml(self) -> None:
        self.body()
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        if (found := self.repository(repo)) is None:
            return
        answers = []
        for file in files:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            held = found.files.get(file["path"])
            oid = None
            if held is not None:
                oid = hashlib.sha256(held).hexdigest() if mode == "lfs" else blob_oid(held)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for item in json.loads(self.body())["objects"]:
            if item["oid"] not in self.server.lfs:
                href = f"{self.server.endpoint}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        self.server.uploads.append(oid)
        if self.wants_drop("lfs"):
            self.rfile.read(1000)
            return self.cut()
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.lfs[oid] = content
        self.answer(b"")

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if self.wants_drop("commit"):
            return self.cut()
        if (found := self.repository(repo)) is None:
            return
        if not self.is_authorized:
            return self.refuse(403, "Forbidden")
        files = dict(found.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
        oid = hashlib.sha1(json.dumps(sorted((path, blob_oid(data)) for path, data in files.items())).encode())
        url = f"{self.server.endpoint}/{repo}"
        answer = {"commitUrl": f"{url}/commit/{oid.hexdigest()}", "commitOid": oid.hexdigest()}
        if "create_pr" in self.query:
            found.pull_requests.append(files)
            answer["pullRequestUrl"] = f"{url}/discussions/{len(found.pull_requests)}"
        else:
            found.files = files
            found.commits.append(oid.hexdigest())
        if self.wants_drop("response"):
            return self.cut()
        self.answer(answer)

    def info(self, repo: str, revision: str | None = None) -> None:
        if (found := self.repository(repo)) is not None:
            siblings = [{"rfilename": path} for path in found.files]
            fields = {"id": repo, "modelId": repo, "sha": found.commits[-1], "private": found.private}
            self.answer({**fields, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if (found := self.repository(repo)) is None:
            return
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in found.files if path.startswith(prefix)]
        if folder and not paths:
            return self.refuse(404, "EntryNotFound")
        files = [(path, found.files[path]) for path in paths]
        self.answer([{"type": "file", "path": path, "size": len(data), "oid": blob_oid(data)} for path, data in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self.repository(repo)) is None:
            return
        if revision not in ("main", found.commits[-1]):
            return self.refuse(404, "RevisionNotFound")
        if path not in found.files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found.commits[-1])
        content = found.files[path]
        self.answer(content, ETag=f'"{blob_oid(content)}"', X_Repo_Commit=found.commits[-1])


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", "preupload"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", "commit"),
    (rf"GET /api/models/{REPO}", "info"),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", "info"),
    (rf"GET /api/models/{REPO}/tree/{REVISION}(/(?P<folder>.+))?", "tree"),
    (rf"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]
