"""Hub ids, against a local server with a small part of the hub's protocol."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoint_files import llama_tensors, write_config, write_safetensors, write_sharded_llama
from full_set import full_except

from jcrosslora.checkpoint import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# One interpreter per case, because huggingface_hub reads its settings at import.
SCRIPT = """
import sys, json
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import CheckpointError
try:
    base = open_base(sys.argv[1], revision=sys.argv[2] or None)
    print(json.dumps({"name": base.name, "revision": base.revision, "layers": base.dims.layers,
                      "files": sorted(p.name for p in base.path.iterdir()), "digest": base.digest()}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves `folder` as org/model; org/gated is gated, everything else does not exist."""

    folder: Path

    def log_message(self, format, *args):  # noqa: A002 - named by the base class
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith(("/org/gated", "/api/models/org/gated")):
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif not path.startswith(("/org/model/", "/api/models/org/model")):
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif "/nope" in path:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id: nope")
        elif path.startswith("/api/"):
            self.api(path)
        else:
            self.file(self.folder / path.rsplit("/", 1)[1])

    do_HEAD = do_GET

    def api(self, path: str):
        names = sorted(p.name for p in self.folder.iterdir())
        if "/tree/" in path:
            answer = [{"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0"} for n in names]
        else:
            answer = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    def file(self, path: Path):
        if not path.exists():
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        body = path.read_bytes()
        self.answer(200, body, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(body).hexdigest()}"')


@pytest.fixture
def hub(tmp_path: Path):
    folder = write_sharded_llama(tmp_path / "repo")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "model.onnx"):
        (folder / name).write_bytes(b"must not be fetched")
    (folder / "tokenizer.json").write_text("{}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(
    cache: Path, endpoint: str, ref: str = "org/model", revision: str = "", script: str = SCRIPT, **settings: str
) -> dict:
    root = Path(__file__).parents[1]
    environment = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(root), "HOME": str(cache)}
    environment |= {"PATH": "/usr/bin:/bin", "HF_HUB_DISABLE_XET": "1", **settings}
    command = [sys.executable, "-c", script, ref, revision]
    done = subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in result.get("error", "")
    return result


def test_only_json_and_the_needed_shards_are_fetched_and_then_used_offline(hub, tmp_path: Path):
    _, endpoint = hub
    online = resolve(tmp_path / "cache", endpoint)
    assert online["name"] == "org/model"
    assert online["revision"] == COMMIT
    assert online["files"] == sorted([
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ])  # fmt: skip
    # No server answers on the discard port, so all files come from the cache.
    offline = resolve(tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline == online


@pytest.mark.full
def test_a_model_of_one_file_is_fetched(hub, tmp_path: Path):
    folder, endpoint = hub
    for path in folder.glob("model*"):
        path.unlink()
    write_safetensors(folder / "model.safetensors", {name: ("F32", array) for name, array in llama_tensors().items()})
    assert resolve(tmp_path / "cache", endpoint)["files"] == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.full
def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(hub, tmp_path: Path):
    folder, endpoint = hub
    write_config(folder, model_type="mamba")
    assert "'mamba' is not supported" in resolve(tmp_path / "cache", endpoint)["error"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


TORCH = """
import sys, json
from pathlib import Path
import jcrosslora as jcl
from jcrosslora.adapter.folder import AdapterPaths
from jcrosslora.distill.sources.opening import load_model
try:
    load_model(jcl.TorchModel(sys.argv[1], device="cpu"), AdapterPaths("none", "PEFT", Path("none/weights")))
except jcl.JCrossLoRAError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.mark.full
def test_a_base_that_torch_runs_is_fetched_without_its_pickles(hub, tmp_path: Path):
    pytest.importorskip("peft")
    folder, endpoint = hub
    write_config(folder, model_type="its-own")
    assert "transformers cannot load it" in resolve(tmp_path / "cache", endpoint, script=TORCH)["error"]
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.parent.name == COMMIT}
    assert fetched == {path.name for path in folder.iterdir() if path.suffix == ".json" or path.name[:6] == "model-"}


@pytest.mark.parametrize(
    ("ref", "revision", "named"),
    full_except(
        [
            ("org/missing", "", "RepositoryNotFoundError"),
            ("org/gated", "", "GatedRepoError"),
            ("org/model", "nope", "RevisionNotFoundError"),
            ("org/a..b", "", "HFValidationError"),
        ],
        [("org/missing", "", "RepositoryNotFoundError")],
    ),
)
def test_a_hub_error_is_one_line(hub, tmp_path: Path, ref: str, revision: str, named: str):
    error = resolve(tmp_path / "cache", hub[1], ref, revision)["error"]
    assert ref in error
    assert named in error or "LocalEntryNotFoundError" in error
    assert "check the name, the revision and your access to it" in error


@pytest.mark.full
def test_a_model_that_is_not_cached_is_refused_offline(tmp_path: Path):
    (tmp_path / "cache").mkdir()
    error = resolve(tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")["error"]
    assert "org/model: no such local folder" in error


def test_without_a_network_one_short_line_comes_at_once(tmp_path: Path):
    (tmp_path / "cache").mkdir()
    begun = time.monotonic()
    error = resolve(tmp_path / "cache", "http://127.0.0.1:9")["error"]
    assert time.monotonic() - begun < 15  # on a slow machine; the client's own attempts take 25 s of waiting
    said = "org/model: no such local folder, not whole in the hub's cache, and the hub cannot be reached"
    assert error == f"{said} (http://127.0.0.1:9 does not answer): check the network, or give the folder of a copy"


@pytest.mark.full
def test_a_missing_shard_is_named_offline(hub, tmp_path: Path):
    resolve(tmp_path / "cache", hub[1])
    next((tmp_path / "cache").rglob("model-00002*")).unlink()
    error = resolve(tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")["error"]
    # Some versions of huggingface_hub notice the incomplete snapshot themselves.
    assert "model-00002-of-00002.safetensors is neither" in error or "not whole in the hub's cache" in error


@pytest.mark.full
def test_a_repository_without_safetensors_is_refused(hub, tmp_path: Path):
    folder, endpoint = hub
    for path in folder.glob("model*"):
        path.unlink()
    error = resolve(tmp_path / "cache", endpoint)["error"]
    assert "choose a safetensors model" in error


@pytest.mark.full
def test_a_repository_of_gguf_files_is_refused_with_advice(hub, tmp_path: Path):
    folder, endpoint = hub
    for path in folder.iterdir():
        path.unlink()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"must not be fetched")
    error = resolve(tmp_path / "cache", endpoint)["error"]
    assert error.startswith("org/model: the repository has no config.json")
    assert "download" in error
    assert "give its path" in error


@pytest.mark.parametrize(
    ("ref", "valid"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("gpt2", False),
        ("./org/name", False),
        ("org/name/more", False),
        ("org/x.gguf", False),
        ("org\\name", False),
        ("../name", False),
        ("org/", False),
    ],
)
def test_hub_ids_are_recognised_by_their_form(ref: str, valid: bool):
    assert is_hub_id(ref) == valid
