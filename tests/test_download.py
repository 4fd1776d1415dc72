"""download.py against a server of our own that does what servers do: breaks off, ignores Range, redirects, lies."""

import argparse
import errno
import hashlib
import http.server
import io
import os
import re
import socket
import threading
import time
import urllib.request
from collections import namedtuple

import numpy as np
import pytest

from released import download
from released.download import FILES, File, fetch

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
HALF = 120_000


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` with ranges and ETags; `steps` are what it does instead for the first requests, one each.

    `sent` counts the bytes of each answer's body and `asked` keeps each request's headers.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.type, self.steps, self.sent, self.asked = DATA, '"1"', "application/x", [], [], []
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
    validators = {"ETag": server.etag} if server.etag else {}
    if match and wanted.get("If-Range", server.etag) == server.etag:
        start = int(match[1])
        if start >= len(data):
            head(handler, 416, 0, Content_Range=f"bytes */{len(data)}")
            return
        head(handler, 206, len(data) - start, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}",
             Content_Type=server.type, **validators)
        data = data[start:]
    else:
        head(handler, 200, len(data), Content_Type=server.type, **validators)
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
    body_from = len(DATA) // 2
    head(handler, 206, len(DATA) - body_from, ETag=handler.server.etag,
         Content_Range=f"bytes {body_from}-{len(DATA) - 1}/{len(DATA)}")
    body(handler, DATA[body_from:])


def fails(code):
    return lambda handler: head(handler, code, 0)


def silent(handler):
    handler.server.released.wait(5)


def redirects(etag, size):
    return lambda handler: head(handler, 302, 0, Location="/elsewhere", X_Linked_Etag=f'"{etag}"', X_Linked_Size=size)


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
    """Fetches x.ckpt from the server -> its path; get.pauses are the seconds that it would have waited."""
    def get(sha256=None, size=None, address=None, **options):
        file = File(address or server.address, "x.ckpt", "a file", size, sha256)
        monkeypatch.setitem(FILES, "x", [file])
        return fetch("x", tmp_path, pause=get.pauses.append, **options)
    get.pauses = []
    return get


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# It arrives.

def test_a_file_arrives_whole_and_alone(server, get, tmp_path):
    assert get(sha256(DATA), len(DATA)).read_bytes() == DATA
    assert left(tmp_path) == ["x.ckpt"] and len(server.asked) == 1 and get.pauses == []


def test_a_name_of_several_files_makes_a_folder(server, tmp_path, monkeypatch):
    names = ["m/config.json", "m/vocab.txt"]
    monkeypatch.setitem(FILES, "x", [File(server.address, name, "") for name in names])
    assert fetch("x", tmp_path / "new") == tmp_path / "new" / "m"
    assert left(tmp_path / "new" / "m") == ["config.json", "vocab.txt"]


def test_a_broken_connection_is_resumed_and_only_missing_bytes_are_sent(server, get, tmp_path, capsys):
    server.steps = [breaks, breaks]
    assert get(sha256(DATA)).read_bytes() == DATA
    assert server.sent == [HALF, HALF, len(DATA) - 2 * HALF]
    assert [asked["Range"] for asked in server.asked] == [None, f"bytes={HALF}-", f"bytes={2 * HALF}-"]
    assert server.asked[1]["If-Range"] == '"1"'
    assert get.pauses == [1, 1]                      # each try brought new bytes: patience starts anew
    said = f"{server.address}: the connection failed (it broke off after 120,000 of 300,000 bytes); trying again in 1 s"
    assert capsys.readouterr().err.splitlines()[0] == said
    assert left(tmp_path) == ["x.ckpt"]


def test_a_server_that_ignores_range_is_read_from_the_start(server, get):
    server.steps = [breaks, ignores_range]
    assert get(sha256(DATA)).read_bytes() == DATA
    assert server.sent == [HALF, len(DATA)]


def test_another_range_than_the_one_asked_for_is_not_appended(server, get, tmp_path):
    server.steps = [breaks, serves_another_range]
    assert get().read_bytes() == DATA
    (tmp_path / "x.ckpt").unlink()
    server.steps = [serves_another_range] * 2        # though no range was asked for
    with pytest.raises(ValueError, match="HTTP 206, expected a file"):
        get()


@pytest.mark.parametrize("second", [serve, glues_blindly])
def test_a_file_that_changes_between_the_halves_is_not_glued_together(server, get, second):
    def changes(handler):
        server.data, server.etag = OTHER, '"2"'
        second(handler)
    server.steps = [breaks, changes]
    assert get().read_bytes() == OTHER               # no hash is known that could have told


def test_without_a_version_from_the_server_nothing_is_resumed(server, get):
    server.etag, server.steps = None, [breaks]
    assert get().read_bytes() == DATA
    assert server.sent == [HALF, len(DATA)]


def test_a_half_from_another_address_is_not_resumed(server, get, tmp_path):
    server.steps = [breaks]
    with pytest.raises(ValueError, match="broke off"):
        get(tries=1)
    server.data = OTHER                              # the same ETag, by chance or by a careless server
    assert get(address=server.address + "?other").read_bytes() == OTHER


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


@pytest.mark.parametrize("begun, answer", [(DATA, []), (DATA + b"more", [len(DATA)])])
def test_all_bytes_there_but_not_yet_renamed_is_finished_without_fetching(server, get, tmp_path, begun, answer):
    server.steps = [breaks]
    with pytest.raises(ValueError):
        get(tries=1)
    (tmp_path / "x.ckpt.partial").write_bytes(begun)
    assert get(sha256(DATA)).read_bytes() == DATA
    assert server.sent[1:] == answer                 # more than all: from the start


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_is_there_is_not_fetched_again(server, get, tmp_path, known):
    (tmp_path / "x.ckpt").write_bytes(DATA)
    get(sha256(DATA) if known else None)
    assert server.asked == []


def test_a_file_that_is_there_with_a_wrong_hash_is_replaced_and_that_is_said(server, get, tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes(OTHER)
    assert get(sha256(DATA)).read_bytes() == DATA
    said = capsys.readouterr().err
    assert sha256(OTHER) in said and sha256(DATA) in said


# ---------------------------------------------------------------------------------------------------------------------
# It is refused, in one sentence.

def test_other_bytes_are_refused_and_removed(server, get, tmp_path):
    server.data = OTHER
    with pytest.raises(ValueError) as error:
        get(sha256(DATA))
    assert str(error.value) == (f"{server.address}: the SHA-256 of what came is {sha256(OTHER)}, "
                                f"expected {sha256(DATA)}; the bytes are removed")
    assert left(tmp_path) == []


def test_another_length_than_the_published_one_is_refused_before_anything_comes(server, get, tmp_path):
    with pytest.raises(ValueError, match="has 300,000 bytes, expected 7"):
        get(size=7)
    assert left(tmp_path) == []


def test_a_body_shorter_than_promised_never_gets_the_final_name(server, get, tmp_path):
    def stuck(handler):
        head(handler, 200, len(DATA), ETag='"1"')
        body(handler, DATA[:HALF])
    server.steps = [stuck] * 9
    with pytest.raises(ValueError) as error:
        get(tries=4)
    assert "it broke off after 120,000 of 300,000 bytes" in str(error.value)
    assert f"120,000 bytes are kept in {tmp_path / 'x.ckpt.partial'}" in str(error.value)
    assert get.pauses == [1, 2, 4] and left(tmp_path) == ["x.ckpt.partial", "x.ckpt.partial.json"]


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
    begin = time.monotonic()
    with pytest.raises(ValueError) as error:
        get(timeout=0.1, tries=2)
    assert str(error.value) == f"{server.address}: no answer within 0.1 s" and time.monotonic() - begin < 3


def test_silence_in_the_middle_is_resumed(server, get):
    def stalls(handler):
        breaks(handler)
        silent(handler)
    server.steps = [stalls]
    assert get(timeout=0.2).read_bytes() == DATA
    assert server.sent == [HALF, len(DATA) - HALF]


def test_an_unknown_host_and_a_closed_port_are_named(get, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        with pytest.raises(ValueError, match=re.escape(f"{closed}: the connection failed (")):
            get(address=closed, tries=2)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError) as error:
        get(address="http://nowhere.invalid/x", tries=1)
    assert str(error.value) == "http://nowhere.invalid/x: the host cannot be found (Name or service not known)"


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


def test_a_chunked_body_that_breaks_off_is_not_taken_for_a_file(server, get):
    def chunked(end):
        def answer(handler):
            head(handler, 200, Transfer_Encoding="chunked")
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(DATA), DATA) + end)
        return answer
    server.steps = [chunked(b""), chunked(b"0\r\n\r\n")]
    assert get().read_bytes() == DATA
    assert get.pauses == [1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is needed to have a full disk")
def test_a_disk_that_fills_up_is_said(get, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "open", lambda path, mode, **more: io.open("/dev/full", mode, **more), raising=False)
    with pytest.raises(ValueError) as error:
        get()
    assert str(error.value) == f"{tmp_path / 'x.ckpt.partial'}: {os.strerror(errno.ENOSPC)}" and get.pauses == []


def test_a_disk_with_too_little_space_is_said_before_anything_comes(get, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(free=299_999))
    with pytest.raises(ValueError, match="no space left for x.ckpt: it needs 300,000 more bytes, 299,999 are free"):
        get()
    assert "x.ckpt" not in left(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(free=300_000))
    assert get().read_bytes() == DATA


def test_a_directory_that_is_a_file_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setitem(FILES, "x", [File(server.address, "x.ckpt", "")])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "file"))):
        fetch("x", tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# Redirects.

def test_the_hash_that_comes_with_a_redirect_is_checked(server, get, tmp_path):
    server.steps = [redirects(sha256(DATA), len(DATA))]
    assert get().read_bytes() == DATA
    (tmp_path / "x.ckpt").unlink()
    server.data, server.steps = OTHER, [redirects(sha256(DATA), len(DATA))]
    with pytest.raises(ValueError, match=f"is {sha256(OTHER)}, expected {sha256(DATA)}"):
        get()
    server.steps = [redirects(sha256(OTHER), len(DATA) + 1)]
    with pytest.raises(ValueError, match="has 300,000 bytes, expected 300,001"):
        get()
    assert left(tmp_path) == []


def test_a_short_etag_is_not_taken_for_a_sha256_and_our_own_hash_wins(server, get, tmp_path):
    server.steps = [redirects("a" * 40, len(DATA))]
    assert get().read_bytes() == DATA
    (tmp_path / "x.ckpt").unlink()
    server.steps = [redirects(sha256(DATA), len(DATA))]
    with pytest.raises(ValueError, match=f"expected {sha256(OTHER)}"):
        get(sha256(OTHER))


def test_resuming_works_through_a_redirect(server, get):
    hop = redirects(sha256(DATA), len(DATA))
    server.steps = [hop, breaks, hop]
    assert get().read_bytes() == DATA
    assert server.sent == [HALF, len(DATA) - HALF]


def test_a_redirect_from_https_to_http_is_not_followed():
    request = urllib.request.Request("https://example.org/x")
    with pytest.raises(ValueError, match="https://example.org/x: redirects to http://example.org/y"):
        download.Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/y")


def test_a_proxy_of_the_environment_is_used(server, get, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert get(address="http://nowhere.invalid/x").read_bytes() == DATA
    assert server.asked[0]["Host"] == "nowhere.invalid"


# ---------------------------------------------------------------------------------------------------------------------
# The table.

def test_every_known_file_has_an_encrypted_address_and_its_own_place():
    files = [file for several in FILES.values() for file in several]
    assert len({file.name for file in files}) == len(files) and len(FILES) >= 20
    for file in files:
        assert file.address.startswith("https://") and file.address.endswith(file.name.split("/")[-1])
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256) and file.sha256 in file.address
    assert all(FILES[name][0].sha256 for name in FILES if name.startswith("clip"))
    for name, several in FILES.items():
        assert len(several) == 1 or {file.name.split("/")[0] for file in several} == {name}


def test_the_command_lists_the_names_or_fetches_one(server, tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    download.add_arguments(parser)
    download.run(parser.parse_args([]))
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(FILES) and "ViT-B-32.pt" in listed
    monkeypatch.setitem(FILES, "x", [File(server.address, "x.ckpt", "")])
    download.run(parser.parse_args(["x", "--out", str(tmp_path)]))
    assert capsys.readouterr().out == f"{tmp_path / 'x.ckpt'}\n"
    with pytest.raises(ValueError, match="'clip-b33' is not among the files that can be fetched: clip-b32, "):
        fetch("clip-b33")
