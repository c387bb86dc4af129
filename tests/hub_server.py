"""A server on loopback that speaks the part of the hub's API by which files are uploaded, with faults on request."""

import base64
import hashlib
import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_ATokenOfTheTests"
LARGE = (".safetensors", ".gguf")  # files that go by LFS
BREAK = 0  # in place of a status: the connection is closed in the middle of the request


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # messages


@dataclass
class HubState:
    """What the hub holds, and what it was asked.

    Attributes:
        repos: by id.
        objects: contents of large files by SHA-256.
        requests: "METHOD step" of each request, in order.
        faults: step to the answers of the next requests: a status, or a status with a message.
        metadata_errors: what is wrong with the metadata of the next card.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: defaultdict[str, list] = field(default_factory=lambda: defaultdict(list))
    metadata_errors: list[str] = field(default_factory=list)

    def reset(self) -> None:
        """Forget all but the address."""
        for part in (self.repos, self.objects, self.requests, self.faults, self.metadata_errors):
            part.clear()

    def count(self, request: str) -> int:
        return self.requests.count(request)


class Handler(BaseHTTPRequestHandler):
    state: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):  # noqa: A002 - named by the base class
        pass

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self):
        path = self.path.split("?")[0]
        step, repo_id = self.step_of(path)
        if step is None:  # of the client's own affairs
            self.answer(404)
            return
        self.state.requests.append(f"{self.command} {step}")
        fault = self.state.faults[step].pop(0) if self.state.faults[step] else None
        if fault == BREAK:
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is not None:
            status, message = fault if isinstance(fault, tuple) else (fault, f"fault of {step}")
            code = {"X-Error-Code": "RepoNotFound"} if step == "info" and status in (401, 404) else {}
            self.answer(status, {"error": message}, **code)
        elif step != "object" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif step in ("info", "preupload", "commit", "batch") and repo_id not in self.state.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            getattr(self, f"on_{step}")(repo_id, body)

    def step_of(self, path: str) -> tuple[str | None, str]:
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return (rest[0] if rest and rest[0] != "revision" else "info"), f"{owner}/{name}"
        if path.endswith(".git/info/lfs/objects/batch"):
            return "batch", path[1:].removesuffix(".git/info/lfs/objects/batch")
        if path.startswith("/objects/"):
            return "object", path.removeprefix("/objects/")
        return {"/api/repos/create": "create", "/api/validate-yaml": "metadata"}.get(path), ""

    def answer(self, status: int, data: object = None, **headers: str):
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def on_info(self, repo_id, body):
        repo = self.state.repos[repo_id]
        files = [{"rfilename": name} for name in repo.files]
        sha = f"{len(repo.commits):040x}"
        self.answer(200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": files})

    def on_create(self, _, body):
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo_id in self.state.repos else 200
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.state.repos.setdefault(repo_id, Repo(private))
        self.answer(status, {"url": f"{self.state.url}/{repo_id}"})

    def on_metadata(self, _, body):
        errors = [{"message": message} for message in self.state.metadata_errors]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def on_preupload(self, repo_id, body):
        files = self.state.repos[repo_id].files
        answer = []
        for file in json.loads(body)["files"]:
            name, mode = file["path"], "lfs" if file["path"].endswith(LARGE) else "regular"
            oid = blob_id(files[name], mode) if name in files else None
            answer.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answer})

    def on_batch(self, _, body):
        objects = []
        for item in json.loads(body)["objects"]:
            href = f"{self.state.url}/objects/{item['oid']}?X-Amz-Signature=secret"
            there = item["oid"] in self.state.objects
            objects.append(item if there else item | {"actions": {"upload": {"href": href}}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def on_object(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.objects[oid] = body
        self.answer(200)

    def on_commit(self, repo_id, body):
        repo = self.state.repos[repo_id]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.state.objects[value["oid"]]
            else:
                self.answer(400, {"error": f"{line['key']} is not known here"})
                return
        oid = f"{len(repo.commits):040x}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.state.url}/{repo_id}/commit/{oid}"})


def blob_id(content: bytes, mode: str) -> str:
    """What the hub tells of a file that is there: the digest of a large one, else its id in git."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def serve_hub():
    """Yield the state of a server that runs until the generator is closed."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), {"state": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
