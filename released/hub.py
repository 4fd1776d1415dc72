"""Models on the Hugging Face Hub: fetched when they are opened, and pushed with a card.

    fetch_model("owner/name@v1")            # the folder of that version in the Hub's cache
    push(folder, "owner/name", public=False)    # "https://huggingface.co/owner/name (private)"

The Hub's own package does the work. It knows tokens (HF_TOKEN, `hf auth login`), its cache and
offline use (HF_HUB_OFFLINE=1). What goes wrong there becomes one sentence here.
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from released.download import package
from released.files import WEIGHTS

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BESIDE = ("config.json", "vocab.txt")       # what else opening a folder reads
LOGIN = "`hf auth login`, or the variable HF_TOKEN, gives one"


def check_name(repository: str) -> None:
    """ValueError unless this is OWNER/NAME."""
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository of the Hub: OWNER/NAME is expected")


@functools.cache
def fetch_model(address: str) -> Path:
    """The folder in the Hub's cache that has the weights of OWNER/NAME, or of OWNER/NAME@REVISION.

    Files that are not there yet are fetched; of several forms of the weights only the one that is
    read. Offline, what was fetched before is found. The answer is kept, so that a process sees one
    version even if a newer one is pushed meanwhile. ValueError in a sentence.
    """
    repository, _, revision = address.partition("@")
    check_name(repository)
    hub = package(repository)
    with one_sentence(f"hf:{address}"):
        for name in WEIGHTS:
            stem, ending = Path(name).stem, Path(name).suffix
            patterns = [name, f"{name}.index.json", f"{stem}-*{ending}", *BESIDE]
            folder = Path(hub.snapshot_download(repository, revision=revision or None,
                                                allow_patterns=patterns))
            if (folder / name).exists() or (folder / f"{name}.index.json").exists():
                return folder
    raise ValueError(f"hf:{address}: it has none of {', '.join(WEIGHTS)}")


def check_push(repository: str) -> None:
    """ValueError in a sentence for what is known to be missing before anything is uploaded."""
    check_name(repository)
    hub = package(repository)
    if not hub.get_token():
        raise ValueError(f"{repository}: the Hub wants to know who pushes, by a token that may "
                         f"write: {LOGIN}")


def push(folder: Path, repository: str, public: bool) -> str:
    """Uploads the files of a folder to OWNER/NAME, which is made if it is new.

    Returns its address, and who sees it, in words. One that is public already is refused unless
    `public`; one that is private stays so. ValueError in a sentence.
    """
    check_push(repository)
    hub = package(repository)
    with one_sentence(repository):
        api = hub.HfApi(library_name="flm-vilt")
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        is_private = api.repo_info(repository).private
        if not public and not is_private:
            raise ValueError("it exists and is public; --public says that this is meant")
        api.upload_folder(repo_id=repository, folder_path=folder,
                          commit_message="Model and card")
    return f"{address} ({'private' if is_private else 'public'})"


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """What the Hub, the network or its package says, as a ValueError that begins with a name."""
    from huggingface_hub import errors
    try:
        yield
    except errors.GatedRepoError:
        reason = "its owner lets in only who has asked on its page"
    except errors.RepositoryNotFoundError:
        reason = ("the Hub has no such repository, or it is private and your token does not open "
                  f"it ({LOGIN})")
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except errors.LocalEntryNotFoundError:
        reason = ("the Hub is not reached (HF_HUB_OFFLINE is set, or there is no connection), and "
                  "it was not fetched before")
    except errors.OfflineModeIsEnabled:
        reason = "the Hub is not asked, because HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            reason = f"the token may not do this; one that may write is needed ({LOGIN})"
        else:
            reason = f"the Hub answers {status}: {first_line(error)}"
    except Exception as error:      # of its package, of the network or of the disk: many types
        reason = first_line(error)
    else:
        return
    raise ValueError(f"{name}: {reason}")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
