"""The Hub, played by a small server on this machine.

It speaks the calls that huggingface_hub makes.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import TRAIN_FLM, WORDS, free_port, picture, tiny, write_captions

import eval
import tokenizer
import train
import vilt
import weights
from released import hub
from tokenizer import BPE

huggingface_hub = pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_test"


class Server(http.server.ThreadingHTTPServer):
    """Repositories in memory: name -> {"private", "main": a commit}.

    commits: sha -> {path: bytes}. asked: its requests.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.commits, self.asked = {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def put(self, name, files, private=False):
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.repositories[name] = {"private": private, "main": sha}
        return sha


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, contents, code=200, **headers):
        data = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code, kind=""):
        self.answer({"error": kind}, code, X_Error_Code=kind, X_Error_Message=kind)

    def repository(self, name):
        """A repository that the asker may see, or None after a refusal."""
        found = self.server.repositories.get(name)
        if not found or (found["private"]
                         and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refuse(404, "RepoNotFound")
            return None
        return found

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for pattern, serve in ((r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", self.info),
                               (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
                               (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.file)):
            match = re.fullmatch(pattern, path)
            if match:
                return serve(*match.groups())
        self.refuse(404)

    do_HEAD = do_GET

    def commit(self, name, revision):
        found = self.repository(name)
        if found is None:
            return None
        sha = found["main"] if revision in (None, "main") else revision
        if sha not in self.server.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha

    def info(self, name, revision):
        sha = self.commit(name, revision)
        if sha:
            self.answer({"id": name, "modelId": name, "sha": sha,
                         "private": self.server.repositories[name]["private"],
                         "tags": [],
                         "siblings": [{"rfilename": path} for path in self.server.commits[sha]]})

    def tree(self, name, revision):
        sha = self.commit(name, revision)
        if sha:
            self.answer([{"type": "file", "path": path, "size": len(data),
                          "oid": hashlib.sha1(data).hexdigest()}
                         for path, data in self.server.commits[sha].items()])

    def file(self, name, revision, path):
        sha = self.commit(name, revision)
        if sha:
            data = self.server.commits[sha].get(path)
            if data is None:
                return self.refuse(404, "EntryNotFound")
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)

    def do_POST(self):
        self.server.asked.append(f"{self.command} {self.path.partition('?')[0]}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = asked["name"]
            if asked.get("organization"):
                name = f"{asked['organization']}/{name}"
            if name in self.server.repositories:
                return self.answer({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
            self.server.put(name, {},
                            bool(asked.get("private")) or asked.get("visibility") == "private")
            return self.answer({"url": f"{self.server.address}/{name}"})
        name = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]
        if "/preupload/" in self.path:
            return self.answer({"files": [{"path": file["path"], "uploadMode": "regular",
                                           "shouldIgnore": False}
                                          for file in json.loads(body)["files"]]})
        lines, repository = map(json.loads, body.splitlines()), self.server.repositories[name]
        new = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
               if line["key"] == "file"}
        sha = self.server.put(name, self.server.commits[repository["main"]] | new,
                              repository["private"])
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha,
                     "pullRequestUrl": None})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub without repositories, which huggingface_hub asks.

    The cache is empty, there is no token, and tmp_path is the working directory.
    """
    from huggingface_hub import constants
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN",
                 "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # What the package reads from HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported.
    for name, value in (("ENDPOINT", server.address), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                        ("HF_HUB_OFFLINE", False),
                        ("HF_TOKEN_PATH", str(tmp_path / "token")),
                        ("HF_STORED_TOKENS_PATH", str(tmp_path / "tokens")),
                        ("HUGGINGFACE_CO_URL_TEMPLATE",
                         server.address + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(constants, name, value)
    hub.fetch_model.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    hub.fetch_model.cache_clear()


def checkpoint_bytes(seed=0):
    """A tiny model of ours, as the bytes of a safetensors file."""
    tok = BPE.train([" ".join(WORDS)] * 3, 300)
    model = tiny(seed, vocab_size=len(tok), mask_id=tok.mask_id, pooler=False)
    weights.save("made.safetensors", model.state_dict(), model.config, "pretrain",
                 weights.pack_tokenizer(tok))
    return Path("made.safetensors").read_bytes()


def go_offline(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch_model.cache_clear()


def word(address):
    return weights.load(address).embed.word.weight


# -- opening ---------------------------------------------------------------------------------------

def test_a_model_of_the_hub_opens_and_nothing_else_of_it_is_fetched(server):
    server.put("owner/small",
               {"model.safetensors": checkpoint_bytes(), "README.md": b"#",
                "pytorch_model.bin": b"0" * 99})
    assert torch.equal(word("hf:owner/small"), word("made.safetensors"))
    fetched = [line for line in server.asked if line.startswith("GET") and "/resolve/" in line]
    # and nothing else
    assert [line.rsplit("/")[-1] for line in fetched] == ["model.safetensors"]
    asked = len(server.asked)
    weights.load("hf:owner/small")
    assert len(server.asked) == asked               # one process sees one version, and asks once


def test_a_revision_is_another_version_of_the_same_repository(server):
    old = server.put("owner/small", {"model.safetensors": checkpoint_bytes(0)})
    before = word("made.safetensors")
    server.put("owner/small", {"model.safetensors": checkpoint_bytes(1)})
    assert torch.equal(word(f"hf:owner/small@{old}"), before)
    assert torch.equal(word("hf:owner/small"), word("made.safetensors"))
    assert not torch.equal(word("hf:owner/small"), before)


def test_a_folder_of_transformers_opens_with_its_vocabulary_and_older_weights(server):
    """A repository with pytorch_model.bin alone, as transformers' ViLTs are."""
    config = replace(vilt.PRESETS["vilt-toy"], layers=1, vocab_size=9, pad_id=0, cls_id=2, sep_id=3)
    model = weights.model_of(config)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]
    model.tokenizer = tokenizer.WordPiece({piece: i for i, piece in enumerate(pieces)})
    weights.export(model, "out")
    torch.save(safetensors.torch.load_file("out/model.safetensors"), "out/pytorch_model.bin")
    server.put("dandelin/tiny",
               {name: Path("out", name).read_bytes()
                for name in ("pytorch_model.bin", "config.json", "vocab.txt")})
    found = weights.load("hf:dandelin/tiny")
    assert found.tokenizer.encode("dog") == [5]
    assert torch.equal(found.patch.weight, model.patch.weight)


def test_commands_take_an_address_of_the_hub(server, capsys):
    server.put("owner/small", {"model.safetensors": checkpoint_bytes()})
    Path("x.jpg").write_bytes(picture(0))
    write_captions(Path("mine_caption_train.arrow"), 8)
    eval.main(["fill", "hf:owner/small", "x.jpg", "a <mask> cat"])
    weights.main(["info", "hf:owner/small"])
    train.main(["--task", "caption", "--load", "hf:owner/small", "--data", ".", "--out", "tuned",
                "--steps", "1", "--global-batch", "2",
                "--device", "cpu", "--workers", "0", "--eval-every", "0"])
    assert "hf:owner/small" in Path("tuned/config.json").read_text()


@pytest.mark.parametrize("address, message", [
    ("hf:small", "'small' is no repository of the Hub: OWNER/NAME is expected"),
    ("hf:owner/../x", "is no repository of the Hub"),
    ("hf:owner/none", "hf:owner/none: the Hub has no such repository, or it is private"),
    ("hf:owner/secret",
     "hf:owner/secret: the Hub has no such repository, "
     "or it is private and your token does not open it"),
    ("hf:owner/empty", "hf:owner/empty: it has none of model.safetensors"),
    ("hf:owner/small@v9", "hf:owner/small@v9: the repository has no such revision")])
def test_what_is_not_there_is_one_sentence(address, message, server):
    server.put("owner/small", {"model.safetensors": b""})
    server.put("owner/secret", {"model.safetensors": b""}, private=True)
    server.put("owner/empty", {"README.md": b"#"})
    with pytest.raises(SystemExit) as stop:
        weights.main(["info", address])
    sentence = stop.value.code
    assert str(sentence).startswith("weights.py: ")
    assert message in sentence and "\n" not in sentence


def test_a_private_repository_opens_with_its_token(server, monkeypatch):
    server.put("owner/secret", {"model.safetensors": checkpoint_bytes()}, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert torch.equal(word("hf:owner/secret"), word("made.safetensors"))


@pytest.mark.parametrize("how", ["offline", "gone"])
def test_of_a_hub_that_is_not_reached_what_was_fetched_opens_and_all_else_is_one_sentence(
        how, server, monkeypatch):
    from huggingface_hub import constants
    server.put("owner/small", {"model.safetensors": checkpoint_bytes()})
    weights.load("hf:owner/small")
    go_offline(monkeypatch)
    if how == "gone":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert torch.equal(word("hf:owner/small"), word("made.safetensors"))
    with pytest.raises(ValueError,
                       match="^hf:owner/other: the Hub is not reached .*was not fetched before$"):
        weights.load("hf:owner/other")


def test_without_the_package_the_sentence_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    sentence = (r"^owner/small is on the Hugging Face Hub, which needs a package: "
                r"pip install '.\[hub\]'$")
    for load in (lambda: weights.load("hf:owner/small"),
                 lambda: hub.push(Path("."), "owner/small", False)):
        with pytest.raises(ValueError, match=sentence):
            load()


# -- pushing ---------------------------------------------------------------------------------------

@pytest.fixture
def run(server):
    """A run of two steps in secret/run, on data in secret/data."""
    Path("secret/data").mkdir(parents=True)
    write_captions(Path("secret/data/mine_caption_train.arrow"), 12)
    write_captions(Path("secret/data/mine_caption_val.arrow"), 4, seed=1)
    BPE.train([" ".join(WORDS)] * 3, 330).save(Path("secret/tok"))
    train.main([*TRAIN_FLM, "--task", "pretrain", "--data", str(Path("secret/data").absolute()),
                "--tokenizer", "secret/tok",
                "--out", "secret/run", "--steps", "2", "--global-batch", "4", "--eval-every", "2",
                "--log-every", "1"])
    return Path("secret/run")


def push(*arguments):
    weights.main(["push", *map(str, arguments)])


def test_what_is_pushed_opens_as_it_was_with_a_card_that_tells_no_paths(
        server, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(run, "owner/mine")
    assert f"wrote {server.address}/owner/mine (private)" in capsys.readouterr().out
    assert server.repositories["owner/mine"]["private"]
    files = server.commits[server.repositories["owner/mine"]["main"]]
    assert set(files) >= {"model.safetensors", "config.json", "README.md", "vocab.json",
                          "merges.txt"}
    assert not any(b"secret" in data for data in files.values())
    text = files["README.md"].decode()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    trained = [line for line in reports if "seconds" in line][-1]
    validated = [line for line in reports if "val_loss" in line][-1]
    assert f"| loss | {trained['loss']:.4f} | {validated['val_loss']:.4f} |" in text
    assert "FLM with" in text and "| data | data |" in text
    assert 'weights.load("hf:owner/mine")' in text
    assert json.loads(files["config.json"])["config"]["width"] == 16
    whole, found = weights.load(run / "last.pt"), weights.load("hf:owner/mine")
    assert found.config == whole.config
    assert found.tokenizer.encode("red cat") == whole.tokenizer.encode("red cat")
    assert all(torch.equal(tensor, found.state_dict()[name])
               for name, tensor in whole.state_dict().items())
    push(run / "last.pt", "owner/mine")             # again, by its checkpoint


def test_a_public_repository_is_made_and_written_only_when_that_is_said(server, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(run, "owner/open", "--public")
    assert not server.repositories["owner/open"]["private"]
    before = server.repositories["owner/open"]["main"]
    sentence = "owner/open: it exists and is public; --public says that this is meant"
    with pytest.raises(SystemExit, match=sentence):
        push(run, "owner/open")
    assert server.repositories["owner/open"]["main"] == before


def test_a_push_that_cannot_be_is_one_sentence_and_makes_no_repository(server, run, monkeypatch):
    for token, arguments, message in (
            ("", (run, "owner/mine"),
             "owner/mine: the Hub wants to know who pushes, by a token that may write"),
            ("hf_other", (run, "owner/mine"),
             "owner/mine: the token may not do this; one that may write is needed"),
            (TOKEN, (run, "mine"), "'mine' is no repository of the Hub"),
            (TOKEN, ("made", "owner/mine"),
             "made: not the folder of a run, which has config.json and metrics.jsonl")):
        Path("made").mkdir(exist_ok=True)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(SystemExit) as stop:
            push(*arguments)
        assert message in stop.value.code and "\n" not in stop.value.code
    assert not server.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    go_offline(monkeypatch)
    with pytest.raises(SystemExit,
                       match="owner/mine: the Hub is not asked, because HF_HUB_OFFLINE is set$"):
        push(run, "owner/mine")


@pytest.mark.slow
def test_the_variables_of_the_environment_lead_to_the_same(server):
    """Another process, with HF_ENDPOINT; and one with HF_HUB_OFFLINE=1 after the server is gone."""
    server.put("owner/small", {"model.safetensors": checkpoint_bytes()})
    environment = {**os.environ, "HF_ENDPOINT": server.address,
                   "HF_HOME": str(Path("home").absolute()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "weights.py"), "info", "hf:owner/small"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0 and "hf:owner/small" in first.stdout, first.stderr
    asked = len(server.asked)
    offline = subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"},
                             capture_output=True, text=True)
    assert offline.stdout == first.stdout and len(server.asked) == asked
