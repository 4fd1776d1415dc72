"""Where released files lie, and how to fetch them.

    print(fetch("clip-b32", "weights"))         # weights/ViT-B-32.pt

Files of the Hugging Face Hub are fetched by its own package, which knows tokens, offline use and
resuming. All others come by a plain download. Their bytes stand in NAME.partial until the file is
whole and its SHA-256, where published, is right. The next call continues from there.
Proxies are taken from the environment (https_proxy, no_proxy).
"""

import hashlib
import http.client
import importlib
import os
import re
import ssl
import sys
import time
from pathlib import Path
from types import ModuleType
from urllib.error import HTTPError, URLError
from urllib.request import Request, build_opener

from tqdm import tqdm

from storage.disk import one_writer, sync_folder

CLIP = "https://openaipublic.azureedge.net/clip/models"        # /SHA-256/NAME
FLM = "https://github.com/TencentARC/FLM/releases/download/checkpoints"
VILT = "https://github.com/dandelin/ViLT/releases/download/200k"
ROBERTA_FILES = ("config.json", "pytorch_model.bin", "vocab.json", "merges.txt")
BERT_WORDS = "google-bert/bert-base-uncased/vocab.txt"
TIMM_CLIP = "timm/vit_base_patch32_clip_224.openai"


def hub(repository: str, *names: str) -> list[str]:
    return [f"{repository}/{name}" for name in names]


def hub_vilt(name: str, about: str) -> tuple[str, list[str]]:
    """transformers' ViLT. Not every repository of it has a vocabulary: it comes from BERT's own."""
    files = [*hub(f"dandelin/{name}", "config.json", "pytorch_model.bin"), BERT_WORDS]
    return f"transformers' ViLT, {about}", files


# Name -> (what it is, its files). A file is an address, or REPOSITORY/FILE on the Hub.
FILES = {
    "clip-b32": ("CLIP B/32", [
        f"{CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"]),
    "clip-b16": ("CLIP B/16", [
        f"{CLIP}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt"]),
    "clip-l14": ("CLIP L/14", [
        f"{CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"]),
    "clip-l14-336": ("CLIP L/14 at 336 pixels", [
        f"{CLIP}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/"
        "ViT-L-14-336px.pt"]),
    TIMM_CLIP: ("OpenAI's CLIP B/32, on the Hub", hub(TIMM_CLIP, "open_clip_model.safetensors")),
    "roberta-base": ("RoBERTa", hub("FacebookAI/roberta-base", *ROBERTA_FILES)),
    "roberta-large": ("RoBERTa", hub("FacebookAI/roberta-large", *ROBERTA_FILES)),
    "bert-base-uncased": ("BERT", hub(
        "google-bert/bert-base-uncased", "config.json", "pytorch_model.bin", "vocab.txt")),
    "flm-pretrain": ("FLM pretrained on GCC, SBU, COCO, VG", [f"{FLM}/pretrain_4m.ckpt"]),
    "flm-vqa": ("FLM fine-tuned on VQAv2 at 576 pixels", [f"{FLM}/pretrain_4M_ft_vqa.ckpt"]),
    "flm-nlvr2": ("FLM fine-tuned on NLVR2", [f"{FLM}/pretrain_4m_ft_nlvr2.ckpt"]),
    "vilt-pretrain": ("ViLT pretrained for 200k steps on GCC, SBU, COCO, VG",
                      [f"{VILT}/vilt_200k_mlm_itm.ckpt"]),
    "vilt-vqa": ("ViLT fine-tuned on VQAv2", [f"{VILT}/vilt_vqa.ckpt"]),
    "vilt-vqa-answers": ("the answers that vilt-vqa chooses from", [f"{VILT}/vqa_dict.json"]),
    "vilt-nlvr2": ("ViLT fine-tuned on NLVR2", [f"{VILT}/vilt_nlvr2.ckpt"]),
    "vilt-irtr-coco": ("ViLT fine-tuned on COCO retrieval", [f"{VILT}/vilt_irtr_coco.ckpt"]),
    "vilt-irtr-f30k": ("ViLT fine-tuned on Flickr30k retrieval", [f"{VILT}/vilt_irtr_f30k.ckpt"]),
    "vilt-b32-mlm": hub_vilt("vilt-b32-mlm", "pretrained, with the language head"),
    "vilt-b32-mlm-itm": hub_vilt("vilt-b32-mlm-itm", "pretrained, with both heads"),
    "vilt-b32-finetuned-vqa": hub_vilt(
        "vilt-b32-finetuned-vqa", "fine-tuned on VQAv2, with its answers"),
    "vilt-b32-finetuned-nlvr2": hub_vilt("vilt-b32-finetuned-nlvr2", "fine-tuned on NLVR2"),
    "vilt-b32-finetuned-coco": hub_vilt("vilt-b32-finetuned-coco", "fine-tuned on COCO retrieval"),
    "vilt-b32-finetuned-flickr30k": hub_vilt(
        "vilt-b32-finetuned-flickr30k", "fine-tuned on Flickr30k retrieval"),
}


def published_sha256(address: str) -> str:
    """The SHA-256 that an address holds, in lower-case hexadecimal, or ""."""
    match = re.search(r"/([0-9a-f]{64})/", address)
    return match[1] if match else ""


PUBLISHED = {published_sha256(file) for _, files in FILES.values() for file in files} - {""}


def table() -> str:
    """The names as text, one line each: name, what it is, its files."""
    lines = []
    for name, (about, files) in FILES.items():
        parts = ", ".join(Path(file).name for file in files)
        lines.append(f"{name:38} {about} ({parts})")
    return "\n".join(lines)


def fetch(name: str, directory: str | Path = ".") -> Path:
    """Fetches the files of a name. Returns the file; of several, their folder, directory/NAME.

    A file that is there already is kept, unless its published SHA-256 says that it is another.
    ValueError in one sentence, with the address or the path, for all that goes wrong.
    """
    if name not in FILES:
        raise ValueError(f"{name!r} is none of the files that can be fetched: {', '.join(FILES)}")
    folder = Path(directory)
    _, files = FILES[name]
    for file in files:
        if file.startswith("https://"):
            fetch_address(file, folder / Path(file).name, published_sha256(file))
        else:
            folder = Path(directory) / Path(name).name
            fetch_from_hub(file, folder)
    return folder / Path(files[0]).name if len(files) == 1 else folder


def package(what: str) -> ModuleType:
    """huggingface_hub. ValueError says what needs it where it is not installed."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(f"{what} is on the Hugging Face Hub, which needs a package: "
                         f"pip install '.[hub]'") from None


def fetch_from_hub(file: str, folder: Path) -> None:
    repository, _, name = file.rpartition("/")
    hub = package(repository)
    try:
        hub.hf_hub_download(repository, name, local_dir=folder)
    except Exception as error:      # of the Hub, of the network or of the disk: many types
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{repository}: {name} cannot be fetched from the Hub: "
                         f"{first_line}") from error


# -- one plain download that resumes ---------------------------------------------------------------

NETWORK_ERRORS = (URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
LATER = (408, 429)      # refusals for now: it took too long, there are too many requests


def fetch_address(address: str, target: Path, sha256: str = "", tries: int = 5,
                  timeout: float = 60) -> None:
    """Fetches one address to `target`.

    It gives up after `tries` failures in a row without one new byte, and waits 1, 2, 4, … seconds
    before each further try. timeout: seconds of silence after which a connection has failed.
    """
    if target.exists():
        found = sha256_of(target) if sha256 else ""
        if found == sha256:
            return
        print(f"{target}: its SHA-256 is {found}, {sha256} is published; fetching it again",
              file=sys.stderr)
    partial = target.with_name(target.name + ".partial")
    try:
        with one_writer(target.with_name(f".{target.name}.lock"), str(target)):
            download(address, target, partial, sha256, tries, timeout)
    except OSError as error:
        raise ValueError(f"{error.filename or partial}: {error.strerror or error}") from None


def download(address: str, target: Path, partial: Path, sha256: str, tries: int,
             timeout: float) -> None:
    """fetch_address, when no other process writes to the target."""
    failures, before = 0, length(partial)
    while True:
        try:
            receive(address, partial, timeout)
            break
        except NETWORK_ERRORS as error:
            code = error.code if isinstance(error, HTTPError) else 0
            refused = 400 <= code < 500 and code not in LATER
            failures = 1 if length(partial) > before else failures + 1
            before = length(partial)
            if refused or failures >= tries:
                kept = f"; {before:,} bytes are kept in {partial}" if before else ""
                raise ValueError(f"{address}: {error}{kept}") from None
            seconds = 2 ** (failures - 1)
            print(f"{address}: {error}; trying again in {seconds} s", file=sys.stderr)
            time.sleep(seconds)
    found = sha256_of(partial) if sha256 else ""
    if found != sha256:
        partial.unlink()
        raise ValueError(f"{address}: the SHA-256 of what came is {found}, expected {sha256}; "
                         f"the bytes are removed")
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    sync_folder(target.parent)
    version_file(partial).unlink(missing_ok=True)


def receive(address: str, partial: Path, timeout: float) -> None:
    """Asks for what is still missing of a file and appends it to `partial`.

    The server's ETag names the version of the file. Bytes of two versions are never put together:
    If-Range asks for the rest of the version at hand, or for all of another.
    """
    version = version_file(partial)
    start = length(partial) if version.exists() else 0
    headers = {"User-Agent": "flm-vilt"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    try:
        response = build_opener().open(Request(address, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416:                   # nothing comes after the bytes that are here
            partial.unlink(missing_ok=True)
            raise ConnectionError("what is here does not fit the file there") from None
        raise
    with response:
        if response.length is None:
            raise ValueError(f"{address}: the server does not tell the length, so a whole file "
                             f"cannot be known from a part")
        etag = response.headers.get("ETag", "")
        if response.status == 206:              # the rest of the file, if all is right
            came = response.headers.get("Content-Range", "")
            if not came.startswith(f"bytes {start}-") or etag != version.read_text():
                partial.unlink()
                raise ConnectionError("another part of the file came, or of another version")
        else:                                   # all of it: as asked, or because it has changed
            start = 0
            partial.unlink(missing_ok=True)
            version.unlink(missing_ok=True)
            if etag.startswith('"'):            # a weak ETag cannot name a version
                version.write_text(etag)
        total = start + response.length
        with open(partial, "ab") as out, tqdm(total=total, initial=start, desc=partial.stem,
                                              unit="B", unit_scale=True, disable=None) as bar:
            while chunk := response.read1(1 << 18):
                out.write(chunk)
                bar.update(len(chunk))
    if length(partial) < total:
        raise ConnectionError(f"it broke off after {length(partial):,} of {total:,} bytes")


def version_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
