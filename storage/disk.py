"""The disk, which fills up, is shared, and fails: files that are whole, one writer, one sentence.

    with complete_file("runs/x/last.pt") as partial:    # its name appears when all of it is there
        ...
    with one_writer(Path("runs/x/.lock"), "runs/x"):    # a second process is told who writes there
        ...
    with command("train.py"):       # what goes wrong becomes a sentence, without a traceback
        ...
    answers = read_json("answers.json", list)           # ValueError names the file
"""

import errno
import io
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:             # Windows: no locks
    fcntl = None

# What to do about an error of the system.
ADVICE = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some space and start again",
    errno.EFBIG: "a limit on the size of files stands in the way (ulimit -f)",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EACCES: "its permissions do not allow it",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENAMETOOLONG: "choose a shorter name",
}


# -- writing ---------------------------------------------------------------------------------------

@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """Yields another name to write to. The file gets its own when the block ends without an error.

    It is on the disk by then, not only in the system's memory, so a crash of the machine leaves the
    old file or the new one. After an error nothing has changed. An OSError names the path.
    """
    path = Path(path)
    # A name of its own for each writer: two that write the same file do not mix their bytes.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with naming(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)                       # atomic
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *other_names: Path) -> Iterator[None]:
    """An OSError that names no file, or one of some other names, names this path instead."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, *map(str, other_names)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with complete_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def also_as(path: Path, other: Path) -> None:
    """Gives a file's contents a second name: a hard link where the disk has them, else a copy."""
    with complete_file(other) as partial:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)


def sync_folder(folder: Path) -> None:
    """Puts a folder's list of names on the disk, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def remove_partials(folder: Path, *names: str) -> None:
    """Removes what a killed writer left of files with these names ("*.pt"). Hold the lock."""
    for name in names:
        for partial in folder.glob(f"{name}.????????.partial"):
            partial.unlink(missing_ok=True)


@contextmanager
def one_writer(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock file during the block. ValueError names the process that holds it already.

    The system frees the lock of a process that ends, however it ends: a file that was left behind
    locks nothing. On a disk without locks the block runs unprotected. The folder of the
    lock is removed in the end if it was made for it and is empty.
    """
    new_folder = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = None
    while file is None:
        file = open(lock, "a+")
        if not hold(file, what):
            break
        if not os.path.exists(lock) or not os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
            file.close()        # its owner ended meanwhile and removed this file: take a new one
            file = None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
            if new_folder:
                lock.parent.rmdir()
        file.close()


def hold(file: IO, what: str) -> bool:
    """Locks an open file -> False where the disk knows no locks. ValueError if it is locked."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return False
        file.seek(0)
        holder = file.read() or "another process"
        raise ValueError(f"{what}: {holder} is writing there; wait until it ends, or choose "
                         "another --out") from None


# -- reading ---------------------------------------------------------------------------------------

def read_json(path: str | Path, what: type | None = None) -> Any:
    """The contents of a JSON file; ValueError names a file that holds something else.

    what=list: a list of strings is expected.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({shortened(error)})") from None
    if what is list:
        if not isinstance(contents, list) or not all(isinstance(item, str) for item in contents):
            raise ValueError(f"{path}: a JSON list of strings is expected")
    return contents


def typed(argument: str) -> str:
    """A text of the command line as it was typed, also in a locale without Unicode."""
    return os.fsencode(argument).decode("utf-8", errors="replace")


# -- what went wrong -------------------------------------------------------------------------------

def shortened(words: object, limit: int = 200) -> str:
    """Any object's text in one line of at most `limit` characters."""
    line = " ".join(str(words)[:10 * limit].split())
    return line if len(line) <= limit else f"{line[:limit]} …"


def sentence_of(error: Exception) -> str:
    """An error in one line: what, where, and for the system's own errors what to do."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:     # in a data-loading process
        return shortened(text.strip().splitlines()[-1].partition(": ")[2], 2000)
    if not isinstance(error, OSError) or not error.errno:
        return shortened(error, 2000) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    advice = ADVICE.get(error.errno)
    return f"{where}{error.strerror}{f'; {advice}' if advice else ''}"


@contextmanager
def command(name: str, when_stopped: str = "") -> Iterator[None]:
    """Ends the program with one sentence for what users can mend; Ctrl-C ends it with one too.

    With DEBUG set in the environment the traceback comes instead. A character that the terminal
    does not know is printed as its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        more = f"; {when_stopped}" if when_stopped else ""
        print(f"{name}: stopped{more}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError) as error:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(f"{name}: {sentence_of(error)}")
