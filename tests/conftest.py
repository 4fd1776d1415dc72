"""What several test files need: where the shared material lies, and small Arrow files made on the spot."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)        # tiny models: a second thread only waits, and on a busy machine it waits long

SHARED = Path(os.environ.get("FLM_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")


@pytest.fixture(scope="session")
def shared():
    """Real photographs, captions and tokenizer tables, which are not ours to ship."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: real photographs, captions and tokenizer tables are needed")
    return SHARED


def picture(seed, size=(40, 32), format="JPEG"):
    """A smooth random picture, encoded."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, format, quality=95)
    return out.getvalue()


WORDS = ("a red blue green small big dog cat house tree car on under near the with two three old new white black "
         "running sitting sleeping").split()


def write_captions(path, rows, seed=0, captions=2, broken=(), batch_rows=7, sizes=((40, 32),)):
    """A caption file of `rows` random pictures, of these sizes in turn; rows in `broken` hold bytes that are no picture."""
    import data
    rng = np.random.default_rng(seed)
    with data.Writer(path, data.CAPTIONS, batch_rows=batch_rows) as out:
        for row in range(rows):
            texts = [" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(captions)]
            image = b"not a picture" if row in broken else picture([seed, row], sizes[row % len(sizes)])
            out.write({"image": image, "caption": texts, "image_id": str(row), "split": "train"})
    return path
