"""Fetches released weights: knows their public addresses, resumes what broke off, checks what came.

    python weights.py download                              # what there is
    python weights.py download clip-b32 --out released      # -> released/ViT-B-32.pt
    python weights.py download roberta-base --out released  # -> released/roberta-base/config.json, pytorch_model.bin, …

A file appears under its name only when all of it has come and its size and SHA-256, where published, are right. Until
then its bytes stand in `NAME.partial` and the next call goes on from there. Proxies are taken from the environment
(https_proxy, no_proxy).
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# What there is. Sizes and hashes stand here only where the publisher states them: OpenAI's addresses hold the SHA-256;
# Hugging Face sends both with each large file (see Redirects); GitHub's releases come without.


class File(NamedTuple):
    address: str
    name: str                   # below the directory that the caller chooses; several files of one name share a folder
    about: str
    size: int | None = None     # bytes
    sha256: str | None = None   # lower-case hexadecimal


def clip(sha256, name, about):
    return [File(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}", name, about, sha256=sha256)]


def hub(repository, names, about):
    """Files of a Hugging Face repository, which go into a folder of its name."""
    folder = repository.split("/")[1]
    return [File(f"https://huggingface.co/{repository}/resolve/main/{name}", f"{folder}/{name}", about)
            for name in names.split()]


def hub_vilt(name, about):
    # All of ViLT has BERT's vocabulary and not every repository of it holds a copy: it is taken from BERT's own.
    vocabulary, = hub("google-bert/bert-base-uncased", "vocab.txt", about)
    return [*hub(f"dandelin/{name}", "config.json pytorch_model.bin", f"transformers' ViLT, {about}"),
            vocabulary._replace(name=f"{name}/vocab.txt")]


def github(release, name, about):
    return [File(f"https://github.com/{release}/{name}", name, about)]


_FLM, _VILT = "TencentARC/FLM/releases/download/checkpoints", "dandelin/ViLT/releases/download/200k"

FILES = {       # name -> its files
    "clip-b32": clip("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt", "CLIP B/32"),
    "clip-b16": clip("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt", "CLIP B/16"),
    "clip-l14": clip("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt", "CLIP L/14"),
    "clip-l14-336": clip("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt",
                         "CLIP L/14 at 336 pixels"),
    "roberta-base": hub("FacebookAI/roberta-base", "config.json pytorch_model.bin vocab.json merges.txt", "RoBERTa"),
    "roberta-large": hub("FacebookAI/roberta-large", "config.json pytorch_model.bin vocab.json merges.txt", "RoBERTa"),
    "bert-base-uncased": hub("google-bert/bert-base-uncased", "config.json pytorch_model.bin vocab.txt", "BERT"),
    "flm-pretrain": github(_FLM, "pretrain_4m.ckpt", "FLM pretrained on GCC, SBU, COCO, VG"),
    "flm-vqa": github(_FLM, "pretrain_4M_ft_vqa.ckpt", "FLM fine-tuned on VQAv2 at 576 pixels"),
    "flm-nlvr2": github(_FLM, "pretrain_4m_ft_nlvr2.ckpt", "FLM fine-tuned on NLVR2"),
    "vilt-pretrain": github(_VILT, "vilt_200k_mlm_itm.ckpt", "ViLT pretrained for 200k steps on GCC, SBU, COCO, VG"),
    "vilt-vqa": github(_VILT, "vilt_vqa.ckpt", "ViLT fine-tuned on VQAv2"),
    "vilt-vqa-answers": github(_VILT, "vqa_dict.json", "the answers that the classes of vilt-vqa stand for"),
    "vilt-nlvr2": github(_VILT, "vilt_nlvr2.ckpt", "ViLT fine-tuned on NLVR2"),
    "vilt-irtr-coco": github(_VILT, "vilt_irtr_coco.ckpt", "ViLT fine-tuned on COCO retrieval"),
    "vilt-irtr-f30k": github(_VILT, "vilt_irtr_f30k.ckpt", "ViLT fine-tuned on Flickr30k retrieval"),
    "vilt-b32-mlm": hub_vilt("vilt-b32-mlm", "pretrained, with the language head"),
    "vilt-b32-mlm-itm": hub_vilt("vilt-b32-mlm-itm", "pretrained, with both heads"),
    "vilt-b32-finetuned-vqa": hub_vilt("vilt-b32-finetuned-vqa", "fine-tuned on VQAv2, with its answers"),
    "vilt-b32-finetuned-nlvr2": hub_vilt("vilt-b32-finetuned-nlvr2", "fine-tuned on NLVR2"),
    "vilt-b32-finetuned-coco": hub_vilt("vilt-b32-finetuned-coco", "fine-tuned on COCO retrieval"),
    "vilt-b32-finetuned-flickr30k": hub_vilt("vilt-b32-finetuned-flickr30k", "fine-tuned on Flickr30k retrieval"),
}


def table():
    """The names as text, one line each: name, what it is, the files."""
    width = max(map(len, FILES))
    return "\n".join(f"{name:{width}}  {files[0].about} ({', '.join(Path(file.name).name for file in files)})"
                     for name, files in FILES.items())


def add_arguments(parser):
    parser.add_argument("name", nargs="?", help="what to fetch; without it, the names are listed")
    parser.add_argument("--out", default=".", metavar="DIR", help="where to put it (default: here)")


def run(args):
    print(table() if args.name is None else fetch(args.name, args.out))


# ---------------------------------------------------------------------------------------------------------------------
# Fetching.

def fetch(name, directory=".", tries=5, timeout=60, pause=time.sleep):
    """Fetches the files of a name -> Path of the file, or of the folder where a name stands for several files.

    A connection that fails `tries` times without one new byte is given up; before each further try it is left alone for
    1, 2, 4, … seconds. timeout: seconds of silence after which a connection counts as failed.
    ValueError in one sentence, with the address or the path, for all that goes wrong.
    """
    if name not in FILES:
        raise ValueError(f"{name!r} is not among the files that can be fetched: {', '.join(FILES)}")
    targets = [Path(directory) / file.name for file in FILES[name]]
    for file, target in zip(FILES[name], targets):
        fetch_file(file, target, tries, timeout, pause)
    return targets[0] if len(targets) == 1 else targets[0].parent


def fetch_file(file, target, tries, timeout, pause):
    """One file of `fetch`. A target that exists is kept if its hash is right or not published, else replaced."""
    with local(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            found = sha256_of(target) if file.sha256 else None
            if found == file.sha256:
                return
            print(f"{target}: its SHA-256 is {found}, {file.sha256} is published; fetching it again", file=sys.stderr)
    partial, notes = (target.with_name(target.name + end) for end in (".partial", ".partial.json"))
    failures, furthest = 0, length(partial)
    while True:
        try:
            size, sha256 = receive(file, partial, notes, timeout)
            break
        except (OSError, http.client.HTTPException) as error:       # the network's; those of the disk are ValueErrors
            have, sentence = length(partial), f"{file.address}: {why(error, timeout)}"
            failures = 1 if have > furthest else failures + 1
            furthest = max(have, furthest)
            refused = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429)
            if refused or failures >= tries:
                raise ValueError(sentence + (f"; {have:,} bytes are kept in {partial}" if have else "")) from None
            print(f"{sentence}; trying again in {2 ** (failures - 1)} s", file=sys.stderr)
            pause(2 ** (failures - 1))
    with local(target):
        problem = None
        if size is not None and length(partial) != size:
            problem = f"{length(partial):,} bytes came, expected {size:,}"
        elif sha256 and (found := sha256_of(partial)) != sha256:
            problem = f"the SHA-256 of what came is {found}, expected {sha256}"
        if problem:
            partial.unlink()
        else:
            os.replace(partial, target)
        notes.unlink(missing_ok=True)
    if problem:
        raise ValueError(f"{file.address}: {problem}; the bytes are removed")


def receive(file, partial, notes, timeout):
    """Asks for what is still missing and appends it to `partial` -> (size, SHA-256) that all of it must have, or None.

    Bytes are only appended to those of the same version of the file: `notes` keeps the address and the version that
    `partial` was begun from, the server is asked for the rest of that version, and its answer is checked too.
    An OSError or HTTPException is the network's: worth another try.
    """
    have, version = begun(file.address, partial, notes)
    redirects = Redirects()
    opener = build_opener(redirects)

    def ask(start):
        headers = {"User-Agent": "flm-vilt"} | ({"Range": f"bytes={start}-", "If-Range": version} if start else {})
        return opener.open(Request(file.address, headers=headers), timeout=timeout)

    try:
        response = ask(have)
    except HTTPError as error:
        if error.code != 416 or not have:       # 416: nothing comes after the bytes that are here
            raise
        if content_range(error.headers)[1] == have:
            return file.size or redirects.size or have, file.sha256 or redirects.sha256
        response, have = ask(0), 0
    if response.status == 206 and (content_range(response.headers)[0] != have
                                   or version_of(response.headers) not in (version, None)):
        response.close()
        response, have = ask(0), 0
    with response:
        if response.status == 200:      # the whole file: as asked, or it has changed, or Range means nothing there
            have, total = 0, number(response.headers.get("Content-Length"))
        elif response.status == 206 and have:
            total = content_range(response.headers)[1]
        else:
            raise ValueError(f"{file.address}: the server answered HTTP {response.status}, expected a file")
        if response.headers.get_content_type() == "text/html":
            raise ValueError(f"{file.address}: a web page came instead of the file (a login, or a moved address?)")
        size, sha256 = file.size or redirects.size, file.sha256 or redirects.sha256
        if total and size and total != size:
            raise ValueError(f"{file.address}: the file has {total:,} bytes, expected {size:,}")
        total = size or total
        if not (total or sha256 or response.chunked):
            raise ValueError(f"{file.address}: the server does not tell the length, so a whole file cannot be known "
                             f"from a part")
        with local(partial):
            if not have:        # this order: bytes of one version never stand beside the notes of another
                partial.unlink(missing_ok=True)
                notes.write_text(json.dumps({"address": file.address, "version": version_of(response.headers)}))
            free = shutil.disk_usage(partial.parent).free
            if total and total - have > free:
                raise ValueError(f"{partial.parent}: no space left for {file.name}: it needs {total - have:,} more "
                                 f"bytes, {free:,} are free")
            out = open(partial, "ab", buffering=0)
        with out, tqdm(total=total, initial=have, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := response.read1(1 << 18):
                with local(partial):
                    rest = memoryview(chunk)
                    while rest:         # unbuffered, so that a full disk shows here and not in close()
                        rest = rest[out.write(rest):]
                have += len(chunk)
                bar.update(len(chunk))
            with local(partial):
                os.fsync(out.fileno())
    if total and have < total:
        raise ConnectionError(f"it broke off after {have:,} of {total:,} bytes")
    return total, sha256


class Redirects(HTTPRedirectHandler):
    """Follows redirects and keeps what Hugging Face says of a large file in the first one: .size, .sha256 or None."""
    size = sha256 = None

    def redirect_request(self, request, response, code, message, headers, address):
        if request.type == "https" and not address.startswith("https:"):
            raise ValueError(f"{request.full_url}: redirects to {address}, which is not encrypted")
        etag = headers.get("X-Linked-Etag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", etag):      # small files have a shorter one, git's, which is no SHA-256
            self.sha256 = etag
        self.size = number(headers.get("X-Linked-Size")) or self.size
        return super().redirect_request(request, response, code, message, headers, address)


def begun(address, partial, notes):
    """What an earlier call left: (bytes in `partial`, their version), or (0, None) if nothing can be appended to it."""
    try:
        kept = json.loads(notes.read_text())
    except (OSError, ValueError):
        return 0, None
    if kept["address"] != address or not kept["version"] or not length(partial):
        return 0, None
    return length(partial), kept["version"]


def version_of(headers):
    """What tells one version of a file from another: its ETag, unless it is a weak one, or its date; None without."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def content_range(headers):
    """`bytes 5-9/10` -> (5, 10), `bytes */10` -> (None, 10): first byte, length of the whole file; None if not told."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", ""))
    return (number(match[1]), number(match[2])) if match else (None, None)


def number(text):
    return int(text) if text and text.isdecimal() else None


def length(path):
    return path.stat().st_size if path.exists() else 0


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def local(path):
    """Turns the disk's errors (no space, no permission) into a ValueError in one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def why(error, timeout):
    """A network error in words."""
    if isinstance(error, HTTPError):
        return f"the server answered HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, socket.gaierror):
        return f"the host cannot be found ({reason.strerror})"
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout} s"
    return f"the connection failed ({reason or type(reason).__name__})"
