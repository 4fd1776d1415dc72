"""Encoded bytes -> pictures -> tensors: what is opened, how it is resized, what the models get.

    shape = Square(224)                         # CLIP's; ViLT's is Whole(384, 32)
    pixels = decode(encoded, shape)             # uint8 (3, 224, 224)
    images = normalize(torch.stack([pixels]))   # float32 (1, 3, 224, 224)

Tensors stay uint8 until they are on the device: a quarter of the bytes to move.
"""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor


@dataclass(frozen=True)
class Square:
    """CLIP's shape: the shorter side becomes `side` pixels, and the square in the middle is kept.

    >>> Square(224)(640, 480)   # width, height -> those of the resized image, and of what is kept
    ((298, 224), (224, 224))
    """
    side: int

    def __call__(self, width: int, height: int):
        longer = int(self.side * max(width, height) / min(width, height))
        size = (self.side, longer) if width <= height else (longer, self.side)
        return size, (self.side, self.side)


@dataclass(frozen=True)
class Whole:
    """ViLT's shape: the whole image, its shorter side about `shorter` pixels.

    The longer side has at most 1333/800 times as many. Both are floored to multiples of the patch.

    >>> Whole(384, 32)(500, 375)
    ((512, 384), (512, 384))
    """
    shorter: int
    patch: int

    def __call__(self, width: int, height: int):
        scale, longest = self.shorter / min(width, height), int(1333 / 800 * self.shorter)
        sides = (self.shorter, scale * height)
        if height < width:
            sides = (scale * width, self.shorter)
        if max(sides) > longest:    # in two steps, as the original: one product rounds differently
            scale = longest / max(sides)
            sides = (sides[0] * scale, sides[1] * scale)
        patches = [max(1, int(side + 0.5) // self.patch) for side in sides]
        size = tuple(self.patch * count for count in patches)
        return size, size


Shape = Square | Whole

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# What is opened at all. Pillow knows more formats, but some of its readers start programs (EPS).
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
# A picture may be this many times as long as wide. Resized by its shorter side, 60,000 x 1 pixels
# would become 34 million x 576.
LONGEST = 100
# EXIF's orientation -> what makes the picture upright.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
# Pillow warns of many pixels, which open_header refuses, and of tags that nobody here reads.
warnings.filterwarnings("ignore", module="PIL")

Encoded = bytes | memoryview | pa.Buffer


def open_image(encoded: Encoded,
               draft: Callable[[int, int], tuple[int, int]] | None = None) -> Image.Image:
    """Encoded bytes -> the upright picture, RGB. Of several frames it is the first.

    draft: (width, height) as stored -> the size that is needed at least. libjpeg then decodes a
    JPEG at 1/2, 1/4 or 1/8 where that still has the pixels.
    Raises whatever Pillow's readers raise for what is no picture; ValueError for one too large.
    """
    image = open_header(encoded)
    if draft and image.format == "JPEG":
        image.draft("RGB", draft(*image.size))
    image.load()
    return upright(image)


def open_header(encoded: Encoded) -> Image.Image:
    """Encoded bytes -> a picture of which nothing is decoded yet. ValueError for one too large."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"in none of the formats {', '.join(FORMATS)}") from None
    check_size(image)
    return image


def check_size(image: Image.Image) -> None:
    """ValueError for a picture with too many pixels, or much longer than wide."""
    width, height = image.size
    if width * height > Image.MAX_IMAGE_PIXELS or max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{width} x {height} pixels; at most {Image.MAX_IMAGE_PIXELS:,} pixels, "
                         f"and {LONGEST} times as long as wide, are opened")


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture as RGB, standing as its EXIF says."""
    turn = turn_of(image)
    image = to_rgb(image)
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright that is loaded; None where EXIF does not say."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:           # Pillow raises whatever broken EXIF leads to; the picture is fine
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Pillow alone would clip numbers of more than 8 bits, to white or black.

    Sixteen bits are scaled to eight. Wider numbers do not say what white is. It is 1 (of floats),
    255 or 65535, the first that no pixel is more than twice as much; else it is the largest pixel.
    NaN is black.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        eight_bits = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(eight_bits.astype(np.uint8))
    elif image.mode in ("I", "F"):
        pixels = np.array(image, np.float32)
        largest = pixels.max(where=np.isfinite(pixels), initial=0)
        whites = (1, 255, 65535, largest) if image.mode == "F" else (255, 65535, largest)
        white = next(white for white in whites if largest <= 2 * white)
        np.nan_to_num(pixels, copy=False, nan=0, posinf=white, neginf=0)
        pixels = pixels.clip(0, white, out=pixels) * np.float32(255 / white)
        image = Image.fromarray(pixels.astype(np.uint8))
    return image.convert("RGB")


def decode(encoded: Encoded, shape: Shape, fast: bool = False,
           augment: Callable[[Image.Image], Image.Image] | None = None) -> Tensor:
    """Encoded bytes -> uint8 (3, H, W) of a shape (Square or Whole), resized bicubically.

    fast, for training: libjpeg decodes at 1/2, 1/4 or 1/8 where that still has the pixels, and
    torch resizes instead of Pillow: 2.3 times as fast, and equal to within 2 grey levels.
    augment: a PIL -> PIL function, applied before the resize, as the originals' fine-tuning does.
    Raises whatever open_image raises.
    """
    def needed(width, height):
        scale = min(shape(width, height)[0]) / min(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)

    image = open_image(encoded, needed if fast else None)
    if augment is not None:
        image = augment(image)
    return resized(image, shape, fast)


def resized(image: Image.Image, shape: Shape, fast: bool = False) -> Tensor:
    """An RGB picture -> uint8 (3, H, W) of a shape. fast: torch resizes it, see `decode`."""
    (width, height), (kept_width, kept_height) = shape(*image.size)
    if not fast:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)                     # (3, H, W)
    if fast:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = round((width - kept_width) / 2), round((height - kept_height) / 2)
    return pixels[:, top:top + kept_height, left:left + kept_width].contiguous()


def normalize(images: Tensor, mean: tuple = CLIP_MEAN, std: tuple = CLIP_STD) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, on the device it is on: (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    return (images.float() / 255 - mean) / std
