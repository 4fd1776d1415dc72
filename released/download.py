"""Where released files lie, and how to fetch them.

    print(fetch("clip-b32", "weights"))         # weights/ViT-B-32.pt

Files of the Hugging Face Hub are fetched by its own package, which knows tokens, offline use and
resuming. All others come by a plain download: the bytes stand in NAME.partial until the file is
whole and its SHA-256, where published, is right; the next call goes on from there.
Proxies are taken from the environment (https_proxy, no_proxy).
"""

import hashlib
import http.client
import os
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, build_opener

from tqdm import tqdm


class File(NamedTuple):
    name: str               # below the folder that the caller chooses
    about: str
    address: str = ""       # of a plain download
    repository: str = ""    # or else on the Hub
    sha256: str = ""        # lower-case hexadecimal, where the publisher states it


def clip(sha256: str, name: str, about: str) -> list[File]:
    """OpenAI's addresses hold the SHA-256."""
    address = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}"
    return [File(name, about, address, sha256=sha256)]


def github(release: str, name: str, about: str) -> list[File]:
    return [File(name, about, f"https://github.com/{release}/{name}")]


def hub(repository: str, names: str, about: str) -> list[File]:
    """Files of a Hub repository, which go into a folder of its name."""
    folder = repository.split("/")[1]
    return [File(f"{folder}/{name}", about, repository=repository) for name in names.split()]


def hub_vilt(name: str, about: str) -> list[File]:
    """transformers' ViLT. Not every repository of it has a vocabulary: it comes from BERT's own."""
    files = hub(f"dandelin/{name}", "config.json pytorch_model.bin", f"transformers' ViLT, {about}")
    return [*files, File(f"{name}/vocab.txt", about, repository="google-bert/bert-base-uncased")]


FLM = "TencentARC/FLM/releases/download/checkpoints"
VILT = "dandelin/ViLT/releases/download/200k"
ROBERTA_FILES = "config.json pytorch_model.bin vocab.json merges.txt"

FILES = {       # name -> its files
    "clip-b32": clip("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
                     "ViT-B-32.pt", "CLIP B/32"),
    "clip-b16": clip("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                     "ViT-B-16.pt", "CLIP B/16"),
    "clip-l14": clip("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
                     "ViT-L-14.pt", "CLIP L/14"),
    "clip-l14-336": clip("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
                         "ViT-L-14-336px.pt", "CLIP L/14 at 336 pixels"),
    "timm/vit_base_patch32_clip_224.openai": hub(
        "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors",
        "OpenAI's CLIP B/32, on the Hub"),
    "roberta-base": hub("FacebookAI/roberta-base", ROBERTA_FILES, "RoBERTa"),
    "roberta-large": hub("FacebookAI/roberta-large", ROBERTA_FILES, "RoBERTa"),
    "bert-base-uncased": hub("google-bert/bert-base-uncased",
                             "config.json pytorch_model.bin vocab.txt", "BERT"),
    "flm-pretrain": github(FLM, "pretrain_4m.ckpt", "FLM pretrained on GCC, SBU, COCO, VG"),
    "flm-vqa": github(FLM, "pretrain_4M_ft_vqa.ckpt", "FLM fine-tuned on VQAv2 at 576 pixels"),
    "flm-nlvr2": github(FLM, "pretrain_4m_ft_nlvr2.ckpt", "FLM fine-tuned on NLVR2"),
    "vilt-pretrain": github(VILT, "vilt_200k_mlm_itm.ckpt",
                            "ViLT pretrained for 200k steps on GCC, SBU, COCO, VG"),
    "vilt-vqa": github(VILT, "vilt_vqa.ckpt", "ViLT fine-tuned on VQAv2"),
    "vilt-vqa-answers": github(VILT, "vqa_dict.json", "the answers that vilt-vqa chooses from"),
    "vilt-nlvr2": github(VILT, "vilt_nlvr2.ckpt", "ViLT fine-tuned on NLVR2"),
    "vilt-irtr-coco": github(VILT, "vilt_irtr_coco.ckpt", "ViLT fine-tuned on COCO retrieval"),
    "vilt-irtr-f30k": github(VILT, "vilt_irtr_f30k.ckpt", "ViLT fine-tuned on Flickr30k retrieval"),
    "vilt-b32-mlm": hub_vilt("vilt-b32-mlm", "pretrained, with the language head"),
    "vilt-b32-mlm-itm": hub_vilt("vilt-b32-mlm-itm", "pretrained, with both heads"),
    "vilt-b32-finetuned-vqa": hub_vilt(
        "vilt-b32-finetuned-vqa", "fine-tuned on VQAv2, with its answers"),
    "vilt-b32-finetuned-nlvr2": hub_vilt("vilt-b32-finetuned-nlvr2", "fine-tuned on NLVR2"),
    "vilt-b32-finetuned-coco": hub_vilt("vilt-b32-finetuned-coco", "fine-tuned on COCO retrieval"),
    "vilt-b32-finetuned-flickr30k": hub_vilt(
        "vilt-b32-finetuned-flickr30k", "fine-tuned on Flickr30k retrieval"),
}
PUBLISHED = {file.sha256 for files in FILES.values() for file in files if file.sha256}


def table() -> str:
    """The names as text, one line each: name, what it is, its files."""
    width = max(map(len, FILES))
    lines = []
    for name, files in FILES.items():
        parts = ", ".join(Path(file.name).name for file in files)
        lines.append(f"{name:{width}}  {files[0].about} ({parts})")
    return "\n".join(lines)


def fetch(name: str, directory: str | Path = ".") -> Path:
    """Fetches the files of a name. Returns the file, or the folder of a name of several files.

    A file that is there already is kept, unless its published SHA-256 says that it is another.
    ValueError in one sentence, with the address or the path, for all that goes wrong.
    """
    if name not in FILES:
        raise ValueError(f"{name!r} is none of the files that can be fetched: {', '.join(FILES)}")
    for file in FILES[name]:
        target = Path(directory) / file.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{target.parent}: {error.strerror}") from None
        if file.repository:
            fetch_from_hub(file, target)
        else:
            fetch_address(file, target)
    return target if len(FILES[name]) == 1 else target.parent


def fetch_from_hub(file: File, target: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{file.repository} is on the Hugging Face Hub, which needs a package: "
                         f"pip install '.[hub]'") from None
    try:
        hf_hub_download(file.repository, target.name, local_dir=target.parent)
    except Exception as error:      # of the Hub, of the network or of the disk: many types
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file.repository}: {target.name} cannot be fetched from the Hub: "
                         f"{first_line}") from error


# -- one plain download that resumes ---------------------------------------------------------------

NETWORK_ERRORS = (URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def fetch_address(file: File, target: Path, tries: int = 5, timeout: float = 60,
                  pause: Callable[[float], None] = time.sleep) -> None:
    """Fetches one address to `target`.

    It gives up after `tries` failures in a row without one new byte, and waits 1, 2, 4, … seconds
    before each further try. timeout: seconds of silence after which a connection has failed.
    """
    if target.exists():
        found = sha256_of(target) if file.sha256 else ""
        if found == file.sha256:
            return
        print(f"{target}: its SHA-256 is {found}, {file.sha256} is published; fetching it again",
              file=sys.stderr)
    partial = target.with_name(target.name + ".partial")
    failures = 0
    while True:
        before = length(partial)
        try:
            receive(file, partial, timeout)
            break
        except NETWORK_ERRORS as error:
            have = length(partial)
            failures = 1 if have > before else failures + 1
            sentence = f"{file.address}: {why(error, timeout)}"
            if is_final(error) or failures >= tries:
                kept = f"; {have:,} bytes are kept in {partial}" if have else ""
                raise ValueError(sentence + kept) from None
        except OSError as error:
            raise ValueError(f"{partial}: {error.strerror or error}") from None
        seconds = 2 ** (failures - 1)
        print(f"{sentence}; trying again in {seconds} s", file=sys.stderr)
        pause(seconds)
    found = sha256_of(partial) if file.sha256 else ""
    if found != file.sha256:
        partial.unlink()
        raise ValueError(f"{file.address}: the SHA-256 of what came is {found}, expected "
                         f"{file.sha256}; the bytes are removed")
    os.replace(partial, target)
    version_file(partial).unlink(missing_ok=True)


def receive(file: File, partial: Path, timeout: float) -> None:
    """Asks for what is still missing of a file and appends it to `partial`.

    The server's ETag names the version of the file. Bytes of two versions are never put together:
    only the rest of the version at hand is asked for, and its answer is checked too.
    """
    version = version_file(partial)
    start = length(partial) if version.exists() else 0
    headers = {"User-Agent": "flm-vilt"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    try:
        response = build_opener().open(Request(file.address, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416:                   # nothing comes after the bytes that are here
            partial.unlink(missing_ok=True)
            raise ConnectionError("what is here does not fit the file there") from None
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError(f"{file.address}: a web page came instead of the file "
                             f"(a login, or a moved address?)")
        etag = response.headers.get("ETag", "")
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status == 206 and not (start and resumes and etag == version.read_text()):
            partial.unlink(missing_ok=True)
            raise ConnectionError("another part of the file came, or of another version")
        if response.status == 200:              # all of it: as asked, or because it has changed
            start = 0
        if response.length is None and not file.sha256:
            raise ValueError(f"{file.address}: the server does not tell the length, so a whole "
                             f"file cannot be known from a part")
        total = None if response.length is None else start + response.length
        if not start:
            partial.unlink(missing_ok=True)     # before the version changes
            write_version(version, etag)
        append(response, partial, start, total, file.name)
    if total is not None and length(partial) < total:
        raise ConnectionError(f"it broke off after {length(partial):,} of {total:,} bytes")


def append(response, partial: Path, start: int, total: int | None, name: str) -> None:
    bar = tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=None)
    with open(partial, "ab") as out, bar:
        while chunk := response.read1(1 << 18):
            out.write(chunk)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())


def version_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def write_version(path: Path, etag: str) -> None:
    """Remembers the version; a weak ETag or none cannot name one, and nothing is resumed then."""
    if etag.startswith('"'):
        path.write_text(etag)
    else:
        path.unlink(missing_ok=True)


def length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_final(error: Exception) -> bool:
    """Did the server refuse, so that asking again is of no use?"""
    if not isinstance(error, HTTPError):
        return False
    return error.code < 500 and error.code not in (408, 429)


def why(error: Exception, timeout: float) -> str:
    """A network error in words."""
    if isinstance(error, HTTPError):
        return f"the server answered HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout} s"
    return f"the connection failed ({reason or type(reason).__name__})"
