"""Encoded bytes -> pictures -> tensors: what is opened, how it is resized, what the models get.

    shape = Square(224)                         # CLIP's; ViLT's is Whole(384, 32)
    pixels = decode(encoded, shape)             # uint8 (3, 224, 224)
    images = normalize(torch.stack([pixels]))   # float32 (1, 3, 224, 224)

Tensors stay uint8 until they are on the device: a quarter of the bytes to move.

With `--decode-on-device` a loading process hands the JPEGs over as they are (keep_jpeg), and the
device decodes and resizes those of a batch together (Undecoded).
"""

import io
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from storage.disk import shortened


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
    (width, height), kept = shape(*image.size)
    if not fast:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)                     # (3, H, W)
    if fast:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    return middle(pixels, kept).contiguous()


def middle(pixels: Tensor, kept: tuple[int, int]) -> Tensor:
    """The middle (…, height, width) of larger pictures."""
    width, height = kept
    top, left = round((pixels.shape[-2] - height) / 2), round((pixels.shape[-1] - width) / 2)
    return pixels[..., top:top + height, left:left + width]


def normalize(images: Tensor, mean: tuple = CLIP_MEAN, std: tuple = CLIP_STD) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, on the device it is on: (x / 255 - mean) / std."""
    # Made on the CPU: a tensor that is made of numbers on a GPU waits for all that runs there.
    mean, std = (torch.tensor(v)[:, None, None].to(images.device, non_blocking=True)
                 for v in (mean, std))
    return (images.float() / 255 - mean) / std


def pad_pictures(pictures: list[Tensor]) -> Tensor:
    """uint8 (3, h, w) of any shapes -> (B, 3, H, W), each at the top left, black around it."""
    H = max(picture.shape[1] for picture in pictures)
    W = max(picture.shape[2] for picture in pictures)
    if all(picture.shape[1:] == (H, W) for picture in pictures):
        return torch.stack(pictures)
    out = pictures[0].new_zeros(len(pictures), 3, H, W)
    for place, picture in zip(out, pictures, strict=True):
        place[:, :picture.shape[1], :picture.shape[2]] = picture
    return out


# -------------------------------------------------------------------------------------------------
# Decoded on the device.

# JPEGs that a device decodes together; what lies between them and their tensors is large.
TOGETHER = 64
# Larger ones are left to Pillow, which decodes them at 1/8: they would fill the device's memory.
MOST_PIXELS = 2 ** 24


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that the device will decode."""
    encoded: np.ndarray         # uint8 (bytes,)
    size: tuple[int, int]       # width and height as stored
    resize: Shape
    where: str                  # what to call it: "FILE row 3"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, h, w) of the tensor that it becomes."""
        _, (width, height) = self.resize(*self.size)
        return 3, height, width


def keep_jpeg(encoded: Encoded, shape: Shape, where: str) -> Jpeg | None:
    """A JPEG for the device, if every decoder makes the same of it; None: Pillow must decode it.

    So it is whole (its end mark is there), upright, and grey or YCbCr. Decoders differ in what
    they do with a torn file, with CMYK, and with EXIF's orientation.
    Raises what open_header raises.
    """
    image = open_header(encoded)
    encoded = np.frombuffer(encoded, np.uint8)
    plain = (image.format == "JPEG" and image.mode in ("L", "RGB")
             and image.info.get("adobe_transform", 1) == 1          # 0: the numbers are RGB
             and turn_of(image) is None and encoded[-2:].tobytes() == b"\xff\xd9"
             and image.width * image.height <= MOST_PIXELS)
    return Jpeg(encoded, image.size, shape, where) if plain else None


class Undecoded:
    """The pictures of a batch, some of them JPEGs. It crosses processes, and is then `decoded`.

    The bytes of all JPEGs lie in one tensor: each of their own would need a file handle.
    """

    def __init__(self, pictures: list[Tensor | Jpeg]):
        jpegs = {b: picture for b, picture in enumerate(pictures) if isinstance(picture, Jpeg)}
        self.pictures = [None if b in jpegs else picture for b, picture in enumerate(pictures)]
        self.encoded = torch.from_numpy(np.concatenate([one.encoded for one in jpegs.values()]))
        self.lengths = [len(one.encoded) for one in jpegs.values()]             # in bytes
        self.places = list(jpegs)                                               # in the batch
        self.resize = next(iter(jpegs.values())).resize
        self.where = [one.where for one in jpegs.values()]

    def __len__(self) -> int:
        return len(self.pictures)

    def decoded(self, device: torch.device) -> tuple[Tensor, list[str]]:
        """-> uint8 (B, 3, H, W) on the device, and a line for each picture that could not be read.

        Those are black. Only a file that looks whole, and is not, can be among them: what can be
        told without decoding was told by keep_jpeg.
        """
        pictures, unreadable = list(self.pictures), []
        jpegs = self.encoded.split(self.lengths)
        for first in range(0, len(jpegs), TOGETHER):
            some = slice(first, first + TOGETHER)
            same_size = defaultdict(list)           # they are resized together
            full = decode_jpegs(jpegs[some], self.where[some], device, unreadable)
            for place, pixels in zip(self.places[some], full, strict=True):
                same_size[pixels.shape].append((place, pixels))
            for alike in same_size.values():
                places, pixels = zip(*alike, strict=True)
                resized = resize_on_device(torch.stack(pixels), self.resize)
                for place, picture in zip(places, resized, strict=True):
                    pictures[place] = picture
        return pad_pictures([picture.to(device) for picture in pictures]), unreadable


def decode_jpegs(jpegs: Sequence[Tensor], where: Sequence[str], device: torch.device,
                 unreadable: list[str]) -> list[Tensor]:
    """JPEGs, uint8 (bytes,) on the CPU -> uint8 (3, H, W) on the device, as large as they are.

    On a GPU that is nvJPEG's work. What torchvision refuses Pillow decodes; what that refuses too
    is black, and gets a line in `unreadable`.
    """
    try:
        return decode_together(jpegs, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error):              # no fault of a file
            raise
        if len(jpegs) > 1:                          # it does not say which one
            return [pixels for jpeg, name in zip(jpegs, where, strict=True)
                    for pixels in decode_jpegs([jpeg], [name], device, unreadable)]
    encoded = jpegs[0].numpy().tobytes()
    try:
        image = open_image(encoded)
    except Exception as error:              # Pillow's readers raise whatever broken bytes lead to
        unreadable.append(f"{where[0]}: {shortened(error) or type(error).__name__}")
        image = Image.new("RGB", open_header(encoded).size)
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)]


def decode_together(jpegs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """torchvision's decoder: RuntimeError where it refuses one of the JPEGs."""
    from torchvision.io import ImageReadMode, decode_jpeg           # slow to import
    if device.type == "cuda":
        # It decodes in a stream of its own, and into memory that this stream's kernels may still
        # read (pytorch/vision#9606): so they must have ended.
        torch.cuda.current_stream(device).synchronize()
    decoded = decode_jpeg(list(jpegs), ImageReadMode.RGB, device)
    return [pixels.expand(3, -1, -1) for pixels in decoded]


def check_decoder(device: torch.device) -> None:
    """ValueError where no JPEG can be decoded on a device.

    Without it a missing library would look like files that only Pillow can read, all of them.
    """
    Image.new("RGB", (64, 64), "red").save(out := io.BytesIO(), "JPEG")
    jpeg = torch.from_numpy(np.frombuffer(out.getvalue(), np.uint8).copy())
    try:
        decode_together([jpeg, jpeg], device)
    except RuntimeError as error:
        raise ValueError(f"--decode-on-device: torchvision cannot decode JPEGs on {device} "
                         f"({shortened(error)})") from None


def resize_on_device(pictures: Tensor, shape: Shape) -> Tensor:
    """uint8 (N, 3, H, W), pictures of one size -> (N, 3, h, w) of a shape, as Pillow resizes them.

    Pillow resizes the width, rounds to grey levels, and then resizes the height. So does this.
    """
    (width, height), kept = shape(pictures.shape[3], pictures.shape[2])
    pixels = pictures.float()
    for size in ((pictures.shape[2], width), (height, width)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return middle(pixels, kept).to(torch.uint8)
