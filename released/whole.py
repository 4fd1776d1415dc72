"""Checkpoint files that are whole: written with checksums, and compared with them when opened.

    write_torch("last.pt", contents)            # OSError names the path; the old file stays
    verify("last.pt")                           # Refused, if a byte is not what was written
    carried("last.pt")                          # "312 entries verified"; "" of a file without sums

A torch file is a zip, which holds a CRC-32 of every entry. A safetensors file holds none, so ours
carry a SHA-256 in their metadata: of the whole file, with zeros in its own place. Other people's
safetensors, and torch's files from before version 1.6, carry none.

Files are read in pieces of a megabyte, not mapped: verifying takes no memory. On one core it takes
0.5 s a GB (zip) or 0.8 s (safetensors).
"""

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError

from storage import disk

CHUNK = 2 ** 20
LARGEST_HEADER = 100_000_000        # safetensors' own limit
# In a safetensors file's metadata. One of the names is still there if a byte of the other changes.
CHECKSUM, SHA256, BLANK = "flm-vilt-checksum", "flm-vilt-sha256:", "0" * 64
STORED = re.compile(rf'"{CHECKSUM}":"{SHA256}([0-9a-f]{{64}})"'.encode())


class Refused(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


# -- writing ---------------------------------------------------------------------------------------

def write_torch(path: str | Path, contents: Any) -> None:
    """Writes a torch file, whole or not at all."""
    with disk.complete_file(path) as partial, system_errors():
        with open(partial, "wb") as file:
            torch.save(contents, file)


def write_safetensors(path: str | Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Writes a safetensors file with a checksum, whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with disk.complete_file(path) as partial, system_errors():
        safetensors.torch.save_file(state, partial, metadata | {CHECKSUM: SHA256 + BLANK})
        with open(partial, "r+b") as file:
            checksum = checksum_of(file)
            file.seek(STORED.search(read_header(file)).start(1))
            file.write(checksum)


@contextmanager
def system_errors() -> Iterator[None]:
    """A full disk and the like, which torch and safetensors report as errors of their own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if not cause:
            raise
        raise OSError(cause.errno, cause.strerror) from error


# -- verifying -------------------------------------------------------------------------------------

def is_zip(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def carried(path: str | Path) -> str:
    """Which checksums `verify` has compared, for people; "" where a file carries none."""
    if is_zip(path):
        with zipfile.ZipFile(path) as archive:
            return f"{len(archive.infolist()):,} entries verified"
    with open(path, "rb") as file:
        return "the whole file verified" if STORED.search(read_header(file)) else ""


def verify(path: str | Path) -> None:
    """Refused or BadZipFile unless a file's bytes match the checksums that it carries."""
    if is_zip(path):
        verify_zip(path)
        return
    with open(path, "rb") as file:
        header = read_header(file)
        has_checksum = CHECKSUM.encode() in header or SHA256.encode() in header
        if has_checksum and checksum_of(file) != STORED.search(header)[1]:
            raise Refused("damaged: its bytes do not match its checksum")


def verify_zip(path: str | Path) -> None:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        check_layout(file, archive, entries)
        for entry in entries:
            with archive.open(entry) as contents:       # compares the CRC at the end
                while contents.read(CHUNK):
                    pass


def check_layout(file: BinaryIO, archive: zipfile.ZipFile, entries: list) -> None:
    """Refused unless entries lie one after the other, from the first byte, as torch writes them.

    Then they are no larger than the file, and all who read it find the same entries.
    """
    end = 0
    unique = {entry.filename for entry in entries}
    odd = not entries or entries[0].header_offset or archive.comment or len(unique) < len(entries)
    for entry in entries:
        file.seek(entry.header_offset + 26)
        name_and_extra = struct.unpack("<HH", file.read(4))
        odd = odd or entry.header_offset < end
        end = entry.header_offset + 30 + sum(name_and_extra) + entry.compress_size
    if odd or end > archive.start_dir:
        raise Refused("damaged: its entries do not lie one after the other, as torch writes them")


def read_header(file: BinaryIO) -> bytes:
    """The first bytes of a safetensors file: a length and a JSON table. Other files give less."""
    file.seek(0)
    length = file.read(8)
    size = int.from_bytes(length, "little")
    return length + file.read(size if size <= LARGEST_HEADER else 0)


def checksum_of(file: BinaryIO) -> bytes:
    """The SHA-256 of a safetensors file, as if its checksum were BLANK."""
    header = read_header(file)
    place = STORED.search(header)
    if not place:
        raise Refused("damaged: its checksum cannot be read")
    digest = hashlib.sha256(header[:place.start(1)] + BLANK.encode() + header[place.end(1):])
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest().encode()
