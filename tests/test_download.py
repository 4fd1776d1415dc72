"""Downloads, from a server of our own that does what servers do: breaks off, refuses, changes."""

import errno
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from released import download
from released.download import FILES, fetch, fetch_address, published_sha256

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
HALF = 120_000
ROOT = Path(__file__).resolve().parents[1]


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` with ranges and ETags; `steps` are what it does instead for the first requests.

    `sent` counts the bytes of each answer's body and `asked` keeps each request's headers.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag = DATA, '"1"'
        self.steps, self.sent, self.asked = [], [], []
        self.released = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.headers)
        step = self.server.steps.pop(0) if self.server.steps else serve
        self.close_connection = True
        step(self)


def answer(handler, code, data=b"", length=None, **headers):
    handler.send_response(code)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.server.sent.append(len(data))
    handler.wfile.write(data)


def serve(handler, stop=None):
    """The right answer, cut off after `stop` bytes."""
    server, wanted = handler.server, handler.headers
    data, match = server.data, re.fullmatch(r"bytes=(\d+)-", wanted.get("Range", ""))
    version = {"ETag": server.etag} if server.etag else {}
    start = int(match[1]) if match and wanted.get("If-Range", server.etag) == server.etag else 0
    if start >= len(data):
        answer(handler, 416, length=0, Content_Range=f"bytes */{len(data)}")
    elif start:
        answer(handler, 206, data[start:][:stop], len(data) - start, **version,
               Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
    else:
        answer(handler, 200, data[:stop], len(data), **version)


def breaks(handler):
    serve(handler, HALF)


def ignores_range(handler):
    del handler.headers["Range"]
    serve(handler)


def glues_blindly(handler):
    """A range is served whatever If-Range says, as some stores do; the ETag tells the truth."""
    del handler.headers["If-Range"]
    serve(handler)


def serves_another_range(handler):
    start = len(DATA) // 2
    answer(handler, 206, DATA[start:], len(DATA) - start, ETag=handler.server.etag,
           Content_Range=f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")


def fails(code):
    return lambda handler: answer(handler, code, length=0)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_port}/x.ckpt"
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def get(server, tmp_path, monkeypatch):
    """Fetches x.ckpt -> its path; get.pauses are the seconds that it would have waited."""
    def get(sha256="", address=None, **options):
        fetch_address(address or server.address, tmp_path / "x.ckpt", sha256, **options)
        return tmp_path / "x.ckpt"
    get.pauses = []
    monkeypatch.setattr(download.time, "sleep", get.pauses.append)
    return get


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# -- it arrives ------------------------------------------------------------------------------------

def test_a_broken_connection_is_resumed_and_only_missing_bytes_are_sent(
        server, get, tmp_path, capsys):
    server.steps = [breaks, breaks]
    assert get(sha256(DATA)).read_bytes() == DATA
    assert server.sent == [HALF, HALF, len(DATA) - 2 * HALF]
    ranges = [asked["Range"] for asked in server.asked]
    assert ranges == [None, f"bytes={HALF}-", f"bytes={2 * HALF}-"]
    assert get.pauses == [1, 1]         # each try brought new bytes, so the waiting starts again
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{server.address}: it broke off after 120,000 of 300,000 bytes; trying again in 1 s")
    assert left(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize("second", [ignores_range, serves_another_range])
def test_another_part_than_the_one_asked_for_is_not_appended(server, get, second):
    server.steps = [breaks, second]
    assert get().read_bytes() == DATA       # no hash is known that could have told


@pytest.mark.parametrize("second", [serve, glues_blindly])
def test_a_file_that_changes_between_the_halves_is_not_glued_together(server, get, second):
    def changes(handler):
        server.data, server.etag = OTHER, '"2"'
        second(handler)
    server.steps = [breaks, changes]
    assert get().read_bytes() == OTHER


def test_without_a_version_from_the_server_nothing_is_resumed(server, get):
    server.etag, server.steps = None, [breaks]
    assert get().read_bytes() == DATA
    assert server.sent == [HALF, len(DATA)]


def test_an_interrupted_process_leaves_its_half_for_the_next(server, get, tmp_path, monkeypatch):
    class Bar(download.tqdm):
        def update(self, n):
            raise KeyboardInterrupt
    server.steps = [breaks]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "tqdm", Bar)
        get()
    kept = (tmp_path / "x.ckpt.partial").stat().st_size
    assert 0 < kept <= HALF and not (tmp_path / "x.ckpt").exists()
    assert get().read_bytes() == DATA
    assert server.sent[1] == len(DATA) - kept


def test_a_half_that_is_as_long_as_the_file_is_fetched_again(server, get, tmp_path):
    server.steps = [breaks]
    with pytest.raises(ValueError):
        get(tries=1)
    (tmp_path / "x.ckpt.partial").write_bytes(DATA)
    assert get(sha256(DATA)).read_bytes() == DATA


def test_a_file_that_is_there_is_fetched_again_only_if_its_hash_is_wrong(
        server, get, tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(OTHER)
    get()
    get(sha256(OTHER))
    assert server.asked == []
    assert get(sha256(DATA)).read_bytes() == DATA
    said = capsys.readouterr().err
    assert sha256(OTHER) in said and sha256(DATA) in said


def test_a_proxy_of_the_environment_is_used(server, get, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert get(address="http://nowhere.invalid/x").read_bytes() == DATA
    assert server.asked[0]["Host"] == "nowhere.invalid"


# -- it is refused, in one sentence ----------------------------------------------------------------

def test_other_bytes_are_refused_and_removed(server, get, tmp_path):
    server.data = OTHER
    with pytest.raises(ValueError) as error:
        get(sha256(DATA))
    assert str(error.value) == (
        f"{server.address}: the SHA-256 of what came is {sha256(OTHER)}, expected {sha256(DATA)}; "
        f"the bytes are removed")
    assert "x.ckpt" not in left(tmp_path) and "x.ckpt.partial" not in left(tmp_path)


def test_a_body_shorter_than_promised_never_gets_the_final_name(server, get, tmp_path):
    def stuck(handler):
        answer(handler, 200, DATA[:HALF], len(DATA), ETag='"1"')
    server.steps = [stuck] * 9
    with pytest.raises(ValueError) as error:
        get(tries=4)
    assert "it broke off after 120,000 of 300,000 bytes" in str(error.value)
    assert f"120,000 bytes are kept in {tmp_path / 'x.ckpt.partial'}" in str(error.value)
    assert get.pauses == [1, 2, 4] and "x.ckpt" not in left(tmp_path)


def test_a_refusal_is_final_and_a_failing_server_is_asked_again(server, get, tmp_path):
    server.steps = [fails(404), fails(500), fails(503)]
    with pytest.raises(ValueError) as error:
        get()
    assert str(error.value) == f"{server.address}: HTTP Error 404: Not Found"
    assert get.pauses == [] and left(tmp_path) == []
    assert get().read_bytes() == DATA
    assert get.pauses == [1, 2]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again_and_the_half_that_came_is_kept(server, get, code):
    server.steps = [breaks, fails(code)]
    assert get(sha256(DATA)).read_bytes() == DATA
    # answers are counted as their threads end
    assert sorted(server.sent) == [0, HALF, len(DATA) - HALF] and get.pauses == [1, 2]


def test_two_downloads_of_one_file_do_not_mix_their_bytes(server, get, tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from storage.disk import one_writer
        with one_writer(Path(sys.argv[1]), ""):
            print(flush=True)
            sys.stdin.read()"""
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / ".x.ckpt.lock"], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match=f"x.ckpt: process {other.pid} on .* is writing there"):
        get()
    assert server.asked == []
    other.communicate()
    assert get().read_bytes() == DATA and left(tmp_path) == ["x.ckpt"]


def test_the_bytes_are_on_the_disk_before_they_get_the_files_name(get, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, real=real, name=name: (
            done.append(name), real(*arguments)))
    get()
    assert done[:2] == ["fsync", "replace"]


def test_silence_is_a_timeout_and_a_closed_port_is_named(server, get):
    server.steps = [lambda handler: server.released.wait(5)] * 2
    with pytest.raises(ValueError, match=f"^{server.address}: .*timed out"):
        get(timeout=0.1, tries=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        with pytest.raises(ValueError, match=re.escape(f"{closed}: ") + ".*refused"):
            get(address=closed, tries=2)


def test_a_file_of_unknown_length_is_refused(server, get):
    server.steps = [lambda handler: answer(handler, 200, DATA)]
    with pytest.raises(ValueError, match="does not tell the length"):
        get()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full plays the full disk")
def test_a_disk_that_fills_up_is_said(get, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(ValueError) as error:
        get()
    full_disk = os.strerror(errno.ENOSPC)
    assert str(error.value) == f"{tmp_path / 'x.ckpt.partial'}: {full_disk}" and not get.pauses


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "file"))):
        fetch("clip-b32", tmp_path / "file")


# -- the Hub ---------------------------------------------------------------------------------------

def test_files_of_the_hub_come_by_its_package_into_one_folder(tmp_path, monkeypatch):
    asked = []

    def hf_hub_download(repository, name, local_dir):
        asked.append((repository, name, local_dir))

    fake = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    folder = tmp_path / "new/vilt-b32-mlm"
    assert fetch("vilt-b32-mlm", tmp_path / "new") == folder
    assert asked == [("dandelin/vilt-b32-mlm", "config.json", folder),
                     ("dandelin/vilt-b32-mlm", "pytorch_model.bin", folder),
                     ("google-bert/bert-base-uncased", "vocab.txt", folder)]
    asked.clear()
    clip = "vit_base_patch32_clip_224.openai"
    assert fetch(f"timm/{clip}", tmp_path) == tmp_path / clip / "open_clip_model.safetensors"
    assert asked == [(f"timm/{clip}", "open_clip_model.safetensors", tmp_path / clip)]


def test_what_the_hub_refuses_is_one_sentence(tmp_path, monkeypatch):
    """The real package, offline: nothing is asked of the network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as error:
        fetch("roberta-base", tmp_path)
    sentence = str(error.value)
    assert sentence.startswith("FacebookAI/roberta-base: config.json cannot be fetched from the")
    assert "\n" not in sentence


def test_without_the_hubs_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError) as error:
        fetch("roberta-base", tmp_path)
    assert str(error.value) == ("FacebookAI/roberta-base is on the Hugging Face Hub, which needs "
                                "a package: pip install '.[hub]'")


# -- the table -------------------------------------------------------------------------------------

def test_every_known_file_has_an_encrypted_address_or_a_place_on_the_hub():
    assert len(FILES) >= 20
    for name, (_, files) in FILES.items():
        for file in files:
            assert file.startswith("https://") or re.fullmatch(r"[\w-]+/[\w.-]+/[\w.]+", file)
        if name.startswith("clip"):
            assert published_sha256(files[0]) in download.PUBLISHED
    assert len(download.PUBLISHED) == 4


def test_names_are_listed_and_an_unknown_one_is_refused():
    lines = download.table().splitlines()
    assert [line.split()[0] for line in lines] == list(FILES) and "ViT-B-32.pt" in lines[0]
    with pytest.raises(ValueError, match="^'clip-b33' is none of the files .*: clip-b32, "):
        fetch("clip-b33")
