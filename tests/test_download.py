"""Downloads, from a server of our own that does what servers do: breaks off, refuses, changes."""

import errno
import hashlib
import http.server
import os
import re
import socket
import sys
import threading
import types

import numpy as np
import pytest

from released import download
from released.download import FILES, File, fetch, fetch_address

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
HALF = 120_000


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` with ranges and ETags; `steps` are what it does instead for the first requests.

    `sent` counts the bytes of each answer's body and `asked` keeps each request's headers.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.type = DATA, '"1"', "application/x"
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


def head(handler, code, length=None, **headers):
    handler.send_response(code)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Connection", "close")
    handler.end_headers()


def body(handler, data):
    handler.server.sent.append(len(data))
    handler.wfile.write(data)


def serve(handler, stop=None):
    """The right answer, cut off after `stop` bytes."""
    server, wanted = handler.server, handler.headers
    data, match = server.data, re.fullmatch(r"bytes=(\d+)-", wanted.get("Range", ""))
    more = {"Content_Type": server.type} | ({"ETag": server.etag} if server.etag else {})
    if match and wanted.get("If-Range", server.etag) == server.etag:
        start = int(match[1])
        if start >= len(data):
            head(handler, 416, 0, Content_Range=f"bytes */{len(data)}")
            return
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        head(handler, 206, len(data) - start, Content_Range=span, **more)
        data = data[start:]
    else:
        head(handler, 200, len(data), **more)
    body(handler, data[:stop])


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
    head(handler, 206, len(DATA) - start, ETag=handler.server.etag,
         Content_Range=f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
    body(handler, DATA[start:])


def fails(code):
    return lambda handler: head(handler, code, 0)


def silent(handler):
    handler.server.released.wait(5)


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
def get(server, tmp_path):
    """Fetches x.ckpt -> its path; get.pauses are the seconds that it would have waited."""
    def get(sha256="", address=None, **options):
        file = File("x.ckpt", "a file", address or server.address, sha256=sha256)
        target = tmp_path / "x.ckpt"
        fetch_address(file, target, pause=get.pauses.append, **options)
        return target
    get.pauses = []
    return get


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


# -- it arrives ------------------------------------------------------------------------------------

def test_a_file_arrives_whole_and_alone(server, get, tmp_path):
    assert get(sha256(DATA)).read_bytes() == DATA
    assert left(tmp_path) == ["x.ckpt"] and len(server.asked) == 1 and get.pauses == []


def test_a_broken_connection_is_resumed_and_only_missing_bytes_are_sent(
        server, get, tmp_path, capsys):
    server.steps = [breaks, breaks]
    assert get(sha256(DATA)).read_bytes() == DATA
    assert server.sent == [HALF, HALF, len(DATA) - 2 * HALF]
    ranges = [asked["Range"] for asked in server.asked]
    assert ranges == [None, f"bytes={HALF}-", f"bytes={2 * HALF}-"]
    assert get.pauses == [1, 1]         # each try brought new bytes, so the waiting starts again
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{server.address}: the connection failed (it broke off after 120,000 of 300,000 bytes); "
        f"trying again in 1 s")
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


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_half_that_is_as_long_as_the_file_or_longer_is_fetched_again(server, get, tmp_path, more):
    server.steps = [breaks]
    with pytest.raises(ValueError):
        get(tries=1)
    (tmp_path / "x.ckpt.partial").write_bytes(DATA + more)
    assert get(sha256(DATA)).read_bytes() == DATA


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_is_there_is_not_fetched_again(server, get, tmp_path, known):
    (tmp_path / "x.ckpt").write_bytes(DATA)
    get(sha256(DATA) if known else "")
    assert server.asked == []


def test_a_file_that_is_there_with_a_wrong_hash_is_replaced_and_that_is_said(
        server, get, tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(OTHER)
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
        head(handler, 200, len(DATA), ETag='"1"')
        body(handler, DATA[:HALF])
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
    assert str(error.value) == f"{server.address}: the server answered HTTP 404 Not Found"
    assert get.pauses == [] and left(tmp_path) == []
    assert get().read_bytes() == DATA
    assert get.pauses == [1, 2]


def test_a_server_that_keeps_failing_is_given_up(server, get):
    server.steps = [fails(500)] * 9
    with pytest.raises(ValueError, match="HTTP 500 Internal Server Error$"):
        get()
    assert len(server.asked) == 5 and get.pauses == [1, 2, 4, 8]


def test_silence_is_a_timeout(server, get):
    server.steps = [silent, silent]
    with pytest.raises(ValueError) as error:
        get(timeout=0.1, tries=2)
    assert str(error.value) == f"{server.address}: no answer within 0.1 s"


def test_an_unknown_host_and_a_closed_port_are_named(get, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        with pytest.raises(ValueError, match=re.escape(f"{closed}: the connection failed (")):
            get(address=closed, tries=2)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match="^http://nowhere.invalid/x: .*service not known"):
        get(address="http://nowhere.invalid/x", tries=1)


def test_a_web_page_is_no_checkpoint(server, get, tmp_path):
    server.type = "text/html; charset=utf-8"
    with pytest.raises(ValueError, match="a web page came instead of the file"):
        get()
    assert left(tmp_path) == []


def test_without_a_length_a_file_is_accepted_only_if_its_end_can_be_known(server, get):
    def endless(handler):
        head(handler, 200)
        body(handler, server.data)
    server.steps = [endless, endless]
    with pytest.raises(ValueError, match="does not tell the length"):
        get()
    assert get(sha256(DATA)).read_bytes() == DATA


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full plays the full disk")
def test_a_disk_that_fills_up_is_said(get, tmp_path, monkeypatch):
    def full(path, mode):
        return open("/dev/full", mode)
    monkeypatch.setattr(download, "open", full, raising=False)
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
        asked.append((repository, name))
        (local_dir / name).write_text(repository)

    fake = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    folder = fetch("vilt-b32-mlm", tmp_path / "new")
    assert folder == tmp_path / "new/vilt-b32-mlm"
    assert asked == [("dandelin/vilt-b32-mlm", "config.json"),
                     ("dandelin/vilt-b32-mlm", "pytorch_model.bin"),
                     ("google-bert/bert-base-uncased", "vocab.txt")]
    assert left(folder) == ["config.json", "pytorch_model.bin", "vocab.txt"]
    asked.clear()
    clip = "vit_base_patch32_clip_224.openai"
    assert fetch(f"timm/{clip}", tmp_path) == tmp_path / clip / "open_clip_model.safetensors"
    assert asked == [(f"timm/{clip}", "open_clip_model.safetensors")]


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

def test_every_known_file_has_an_encrypted_address_or_a_repository_and_its_own_place():
    files = [file for several in FILES.values() for file in several]
    assert len({file.name for file in files}) == len(files) and len(FILES) >= 20
    for file in files:
        assert bool(file.address) != bool(file.repository)
        if file.address:
            name = file.name.split("/")[-1]
            assert file.address.startswith("https://") and file.address.endswith(name)
        if file.sha256:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.sha256 in file.address
    assert all(FILES[name][0].sha256 for name in FILES if name.startswith("clip"))
    for name, several in FILES.items():
        assert len(several) == 1 or {file.name.split("/")[0] for file in several} == {name}


def test_names_are_listed_and_an_unknown_one_is_refused():
    lines = download.table().splitlines()
    assert [line.split()[0] for line in lines] == list(FILES) and "ViT-B-32.pt" in lines[0]
    with pytest.raises(ValueError, match="^'clip-b33' is none of the files .*: clip-b32, "):
        fetch("clip-b33")
