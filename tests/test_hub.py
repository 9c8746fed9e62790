"""Names on the hub: from the cache, or downloaded from a server here that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from minillm import ModelConfig, Transformer, cli, default_params, load, save
from minillm.hf.hub import find_folder
from minillm.load import export_hugging_face
from minillm.log import run_command
from minillm.tokenizer import ByteTokenizer

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'minillm[hf]'")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00001.safetensors": bytes(range(256)) * 40,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
}
UNWANTED = {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "README.md": b"# model"}
REPOSITORY = WANTED | UNWANTED


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the commit of a repository, its files, and each file."""

    asked: list[str]  # of one server

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if "some/gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "some/model" not in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path == "/api/models/some/model/revision/main":
            return self.answer(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
        if path.startswith(f"/api/models/some/model/tree/{COMMIT}"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in REPOSITORY.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        data = REPOSITORY[path.removeprefix(f"/some/model/resolve/{COMMIT}/")]
        marks = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return self.answer(200, data, marks)

    do_HEAD = do_GET

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    handler = type("OneHub", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def find(tmp_path, endpoint, *calls, **environment):
    """What a process with this HF_ENDPOINT and a cache in tmp_path answers to each call: a path or an error."""
    script = """
import json, sys
from minillm import ModelConfig, Transformer, cli, default_params, load, save
from minillm.hf.hub import find_folder
from minillm.load import export_hugging_face
from minillm.log import run_command
from minillm.tokenizer import ByteTokenizer
for name, download in json.loads(sys.argv[1]):
    try:
        print(find_folder(name, download))
    except ValueError as error:
        print(f"ValueError: {error}".replace(chr(10), " "))
"""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **environment}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_name_is_downloaded_when_asked_and_then_found_without_the_network(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    name = "some/model"
    before, downloaded, after = find(tmp_path, endpoint, (name, False), (name, True), (name, False))
    assert before.startswith(f"ValueError: {name}: does not exist here, and no model of that name is in the cache")
    assert f"`minillm import {name} OUT --download`" in before
    assert after == downloaded
    snapshot = tmp_path / "cache" / "hub" / "models--some--model" / "snapshots" / COMMIT
    assert downloaded == str(snapshot)
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == WANTED
    asked = len(hub.RequestHandlerClass.asked)
    assert asked > 0
    offline, refused = find(tmp_path, endpoint, (name, False), ("some/other", True), HF_HUB_OFFLINE="1")
    assert offline == downloaded
    assert refused == "ValueError: some/other: cannot be downloaded while HF_HUB_OFFLINE is set"
    assert len(hub.RequestHandlerClass.asked) == asked  # a name in the cache asks nobody


def test_what_cannot_be_downloaded_says_why(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    gated, unknown = find(tmp_path, endpoint, ("some/gated", True), ("some/other", True))
    assert gated == (
        f"ValueError: some/gated: is not given to everybody; accept its terms at {endpoint}/some/gated, then set "
        "HF_TOKEN to your token"
    )
    assert unknown.startswith(f"ValueError: some/other: there is no such model at {endpoint}")


def test_a_hub_that_does_not_answer_is_named_with_the_way_to_a_mirror(tmp_path):
    [closed] = find(tmp_path, "http://127.0.0.1:9", ("some/model", True))
    assert closed.startswith("ValueError: some/model: http://127.0.0.1:9 does not answer (")
    assert closed.endswith("; HF_ENDPOINT names a mirror")


def test_a_folder_here_comes_before_a_name_and_no_path_is_taken_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert str(find_folder("some/model", download=True)) == "some/model"
    for path in ("/some/other", "./some/other", "../other", "a/b/c", "C:\\model", "some/", ""):
        assert str(find_folder(path, download=True)) == str(type(tmp_path)(path))  # load says what is wrong with it


def test_without_the_package_a_name_says_which_extra_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"some/model: does not exist here; .* pip install 'minillm\[hf\]'"):
        find_folder("some/model")


def test_a_model_in_the_cache_is_loaded_and_imported_by_its_name(tmp_path, monkeypatch):
    model = Transformer(ModelConfig(vocab_size=272, dim=16, n_layers=1, n_heads=2, max_seq_len=32)).eval()
    saved = save(model, ByteTokenizer(), tmp_path / "saved")
    repository = tmp_path / "hub" / "models--some--model"
    export_hugging_face(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tokens = torch.arange(20)[None]
    loaded, tokenizer = load("some/model")
    assert torch.equal(loaded(tokens), model(tokens))
    assert tokenizer.encode("hen") == ByteTokenizer().encode("hen")
    assert default_params("some/model").stop_token_ids == (2,)
    assert run_command(cli.dispatch, ["import", "some/model", "imported"]) == 0
    assert torch.equal(load("imported")[0](tokens), model(tokens))
    with pytest.raises(ValueError, match="some/other: does not exist here, and no model of that name is in the cache"):
        load("some/other")
