"""One model, pictures and text in, an answer out.

    model = open_model("runs/toy-vqa/last.pt", task="vqa")
    ask(model, "photo.jpg", "what is on the table?", k=2)       # [("plate", 0.61), ("cup", 0.22)]
    describe(model, "photo.jpg", beams=5)                       # "a red cup on a table."
    compare(model, "left.jpg", "right.jpg", "both show a cup")  # 0.93, the probability of "true"
    search(model, "a red cup", ["a.jpg", "b.jpg"])              # [("b.jpg", 2.7), ("a.jpg", -4.1)]
    rank(model, "a.jpg", ["a red cup", "a dog"])                # [("a red cup", 3.1), …]
    fill(model, "photo.jpg", "a <mask> cup")                    # ("a red cup", [("red", 0.88)])

A picture is a file's path or a PIL image. docs/PYTHON.md shows each function at work.

Scores of all pairs of a data set's images and captions: retrieval.py.

Letters: B captions, L text length, D width.
All functions run on the device where the model is, under the caller's autocast.
"""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import flm
import generate
import tokenizer
import vilt
import weights
from layers import encode_batch_images, task_logits
from pictures import check_size, decode, pad_pictures, resized, upright
from storage import disk, files
from tasks import BOS, EOS, Config, Model, patch_layout, shape_of, task_of, to_device

Picture = str | Path | Image.Image          # a picture file, or a picture in memory

# -------------------------------------------------------------------------------------------------
# A model, and the data that it is asked about.

def open_model(path: str | Path, task: str | None = None,
               tokenizer_folder: str | Path = "") -> Model:
    """A checkpoint's model, in eval mode on the CPU, with its tokenizer.

    task: what the model is wanted for (a name of tasks.TASKS), or None for anything.
    tokenizer_folder: for files that carry no tokenizer, the folder of vocab.json and merges.txt, or
    of vocab.txt.
    ValueError for a model that cannot do the task, and for a tokenizer of another size.
    """
    model = weights.load(path)
    try:
        check_task(model, task, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if model.tokenizer is None:
        if not tokenizer_folder:
            raise ValueError(f"{path} carries no tokenizer: --tokenizer DIR must name the "
                             "directory of its files")
        model.tokenizer = tokenizer.load(tokenizer_folder)
    known = model.config.vocab_size
    writes_captions = model.task == "caption"
    if writes_captions:         # a released file's tokenizer lacks <bos> and <eos>, which come last
        task_of("caption", model.config).add_special_tokens(model.tokenizer)
    have = len(model.tokenizer)
    if have > known or (writes_captions and have < known):
        raise ValueError(f"{tokenizer_folder or path}: a tokenizer of {have} tokens; the model "
                         f"knows {known}")
    return model


def check_task(model: Model, task: str | None, path: str | Path = "CHECKPOINT") -> None:
    """ValueError for a model that cannot do a task. Its sentence says which command makes one."""
    c, others = model.config, ""
    if task == "pretrain":
        able = c.head == "vocab"
    elif task == "caption":
        able = model.task == "caption"
    elif task == "retrieval":
        able = c.head == "retrieval" or c.itm
        others = " (or one pretrained with image-text matching, --itm)"
    else:
        able = task is None or c.head == task
    if not able:
        raise ValueError(f"a model of task {model.task} with head {c.head}; needed is what "
                         f"train.py --task {task} --load {path} makes{others}")


def choose_datasets(model: Model, folder: str | Path, asked: Sequence[str],
                    kind: str) -> tuple[str, ...]:
    """The datasets of a folder that a model is asked about.

    They are those asked for, else those that the model was trained on, else the only one there is.
    kind: caption, vqa or nlvr2.
    """
    if asked:
        return tuple(asked)
    there = list(files.splits_of(folder, kind)) or files.known_datasets(folder, kind)
    trained = tuple(name for name in model.about["datasets"] or () if name in there)
    if not trained and len(there) > 1:
        raise ValueError(f"{folder}: --datasets must name one of {', '.join(there)}")
    return trained or tuple(there)


def no_split(folder: str | Path, datasets: Iterable[str], split: str, kind: str) -> Exception:
    """The error for datasets without a split; it says which splits they have."""
    splits = files.splits_of(folder, kind)
    there = [f"{name} has {', '.join(splits.get(name, ())) or 'none'}" for name in datasets]
    return FileNotFoundError(f"{folder}: no {kind} files of split {split!r}: {'; '.join(there)}")


def device_of(model: Model) -> torch.device:
    return next(model.parameters()).device


def finite(logits: Tensor) -> Tensor:
    """The logits, unchanged. ValueError if one is not a finite number."""
    if not logits.isfinite().all():
        raise ValueError("the model's scores are not finite numbers (NaN or infinity): its weights "
                         "are broken, or the precision is too low for them")
    return logits


# -------------------------------------------------------------------------------------------------
# Its inputs.

def open_picture(picture: Picture, config: Config) -> Tensor:
    """A picture as the model sees it, uint8 (3, H, W); one sentence for what is no picture."""
    in_memory = isinstance(picture, Image.Image)
    name = "the picture" if in_memory else picture
    if not in_memory and not Path(picture).is_file():
        raise FileNotFoundError(f"{name}: there is no such picture")
    try:
        if not in_memory:
            return decode(Path(picture).read_bytes(), shape_of(config))
        check_size(picture)
        return resized(upright(picture), shape_of(config))
    except Exception as error:              # Pillow's readers raise whatever broken bytes lead to
        reason = disk.shortened(error) or type(error).__name__
        raise ValueError(f"{name}: not a picture that can be read ({reason})") from None


def picture_batch(config: Config, pictures: Sequence[Tensor], device: torch.device) -> dict:
    """Pictures, uint8 (3, h, w) each, as the batch that layers.encode_batch_images takes.

    `image` (N, 3, H, W) is normalised; a ViLT's batch also says where its patches are.
    """
    batch = {"image": pad_pictures(pictures), **patch_layout(config, pictures)}
    return to_device(batch, device, config)


def encode_pictures(model: Model, pictures: Iterable[Picture]) -> Tensor | vilt.Visual:
    """Pictures, encoded: the visual of that many images, which `model.fuse` takes."""
    opened = [open_picture(picture, model.config) for picture in pictures]
    return encode_batch_images(model, picture_batch(model.config, opened, device_of(model)))


def token_ids(model: Model, text: str) -> Tensor:
    """A text with `<s>` and `</s>`, int64 (1, L). ValueError for one that is too long."""
    tok = model.tokenizer
    if tok is None:
        raise ValueError("this model carries no tokenizer: model.tokenizer = tokenizer.load(DIR)")
    return checked_ids(model, [tok.cls_id, *tok.encode(text), tok.sep_id], text)


def blanked_ids(model: Model, text: str) -> Tensor:
    """A text in which `<mask>` or `[MASK]` stands for a blank, as token_ids returns it."""
    tok = model.tokenizer
    mask = tok.tokens[tok.mask_id]
    text = text.replace("<mask>", mask).replace("[MASK]", mask)
    return checked_ids(model, [tok.cls_id, *tok.encode(text, specials=True), tok.sep_id], text)


def checked_ids(model: Model, ids: list[int], text: str) -> Tensor:
    """ids as int64 (1, L), on the model's device. ValueError if the model reads fewer."""
    if len(ids) > model.config.max_tokens:
        raise ValueError(f"a text of {len(ids)} tokens; this model reads at most "
                         f"{model.config.max_tokens}: {text!r:.60}")
    return torch.tensor([ids], device=device_of(model))


# -------------------------------------------------------------------------------------------------
# Answers about single pictures.

# What the files of the formats that are opened (pictures.FORMATS) are called.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@torch.no_grad()
def ask(model: Model, picture: Picture, question: str, k: int = 5) -> list[tuple[str, float]]:
    """The k most likely answers to a question about a picture -> [(answer, probability)].

    The best first. Each probability is a sigmoid, as in training, so they do not add up to 1.
    """
    check_task(model, "vqa")
    if k < 1:
        raise ValueError(f"{k} answers: at least 1 is expected")
    if not model.answer_list:
        raise ValueError("this model carries no answer list: weights.py convert --answers FILE "
                         "puts one in")
    batch = picture_batch(model.config, [open_picture(picture, model.config)], device_of(model))
    batch["ids"] = token_ids(model, question)
    shares = finite(task_logits(model, batch)).float()[0].sigmoid()         # (answers,)
    best = shares.topk(min(k, len(shares)))
    answers = [model.answer_list[i] for i in best.indices.tolist()]
    return list(zip(answers, best.values.tolist(), strict=True))


@torch.no_grad()
def describe(model: Model, picture: Picture, max_tokens: int | None = None, beams: int = 1,
             length_penalty: float = 1.0, no_repeat: int = 0, top_p: float | None = None,
             temperature: float = 1.0, seed: int = 0) -> str:
    """Writes a caption for a picture.   The settings are those of generate.generate."""
    return write_captions(
        model, encode_pictures(model, [picture]), max_tokens, beams, length_penalty=length_penalty,
        no_repeat=no_repeat, top_p=top_p, temperature=temperature, seeds=[seed])[0]


@torch.no_grad()
def write_captions(model: Model, visual: Tensor, max_tokens: int | None = None, beams: int = 1,
                   **decoding: object) -> list[str]:
    """Captions of N encoded pictures, visual (N, P, D) -> N strings.

    max_tokens: None means 30, or as many as the model has positions for.
    decoding: further settings of generate.generate.
    """
    check_task(model, "caption")
    tok, c = model.tokenizer, model.config
    if beams > c.vocab_size:
        raise ValueError(f"{beams} beams: the vocabulary has only {c.vocab_size} words")
    if not {BOS, EOS} <= tok.ids.keys():
        raise ValueError(f"a model without {BOS} and {EOS} in its vocabulary: train.py --task "
                         "caption makes one that writes")
    if max_tokens is None:
        max_tokens = min(30, c.max_tokens - 2)
    captions, _ = generate.generate(model, visual, [tok.ids[BOS]], [tok.ids[EOS], tok.sep_id],
                                    max_tokens, beams, **decoding)
    return [tok.decode(ids, skip_special=True).strip() for ids in captions]


@torch.no_grad()
def compare(model: Model, left: Picture, right: Picture, sentence: str) -> float:
    """The probability that a sentence about two pictures is true."""
    check_task(model, "nlvr2")
    batch = {"ids": token_ids(model, sentence)}
    for suffix, picture in (("", left), ("_1", right)):
        pictures = [open_picture(picture, model.config)]
        for name, value in picture_batch(model.config, pictures, device_of(model)).items():
            batch[name + suffix] = value
    return finite(task_logits(model, batch)).float()[0].softmax(-1)[1].item()


def match_score(model: Model, visual: Tensor | vilt.Visual, text: flm.Text | vilt.Text) -> Tensor:
    """How well captions and images match, the higher the better -> float32 (B,).

    It is the output of a retrieval head, or else the log-probability of a match that image-text
    matching learned in pretraining. visual: of one image for all of the B captions, or of B images.
    """
    pooled = model.fuse(visual, text).pooled                                # (B, D)
    if model.config.head == "retrieval":
        return finite(model.head(pooled))[:, 0].float()
    return finite(model.itm_head(pooled)).float().log_softmax(-1)[:, 1]


def picture_files(names: Iterable[str | Path]) -> list[Path]:
    """The picture files that are meant: files, folders with all below them, and patterns.

    Each comes once; those of a folder or a pattern are sorted. FileNotFoundError for a name without
    any.
    """
    found = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            there = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES]
        elif path.is_file():
            there = [path]
        else:
            there = sorted(map(Path, glob.glob(str(name), recursive=True)))
            there = [file for file in there if file.is_file()]
        if not there:
            what = "there are no pictures in it" if path.is_dir() else "there is no such picture"
            raise FileNotFoundError(f"{name}: {what}")
        found |= dict.fromkeys(there)
    return list(found)


@torch.no_grad()
def search(model: Model, text: str, pictures: Sequence[Picture],
           unreadable: list[str] | None = None) -> list[tuple[Picture, float]]:
    """Pictures in the order in which they fit a text -> [(picture, match_score)], the best first.

    The text is encoded once. One file is in memory at a time.
    unreadable: a list takes a sentence for each file that is no picture, as long as one is.
    """
    check_task(model, "retrieval")
    encoded = model.encode_text(token_ids(model, text), class_only=True)
    found, wrong = [], []
    bar = tqdm(pictures, "pictures", unit=" pictures", leave=False, disable=len(pictures) < 2)
    for picture in bar:
        try:
            opened = [open_picture(picture, model.config)]
        except (OSError, ValueError) as error:
            wrong.append(error)
            if unreadable is None:
                raise
            continue
        visual = encode_batch_images(model, picture_batch(model.config, opened, device_of(model)))
        found.append((picture, match_score(model, visual, encoded).item()))         # (1,)
    if wrong and not found:
        raise wrong[0]
    if wrong:
        unreadable += map(disk.sentence_of, wrong)
    return sorted(found, key=lambda pair: -pair[1])


@torch.no_grad()
def rank(model: Model, picture: Picture, texts: Sequence[str]) -> list[tuple[str, float]]:
    """Texts in the order in which they fit a picture -> [(text, match_score)], the best first.

    The picture is encoded once.
    """
    check_task(model, "retrieval")
    visual = encode_pictures(model, [picture])
    found = []
    for text in texts:
        encoded = model.encode_text(token_ids(model, text), class_only=True)
        found.append((text, match_score(model, visual, encoded).item()))            # (1,)
    return sorted(found, key=lambda pair: -pair[1])


@torch.no_grad()
def fill(model: Model, picture: Picture, text: str,
         rounds: int = 3) -> tuple[str, list[tuple[str, float]]]:
    """Fills every `<mask>` of a text about a picture -> (the whole text, [(word, probability)]).

    FLM predicts all blanks at once, each from the words on both sides of it. If there are several,
    it reads the text with its guesses in it and predicts each once more. It does so until nothing
    changes, at most `rounds` times in all. Models of objective mlm, such as ViLT, read the masks
    themselves, once.
    ValueError for models that read from one side only.
    """
    check_reads_both_sides(model)
    tok = model.tokenizer
    ids = blanked_ids(model, text)
    if tok.mask_id not in ids:
        raise ValueError(f"there is no {tok.tokens[tok.mask_id]} in {text!r}")
    visual = encode_pictures(model, [picture])
    filled, found = fill_blanks(model, visual, ids, rounds)
    words = [(tok.decode([token]).strip(), share) for token, share in found]
    return tok.decode(filled[0, 1:-1].tolist()), words


def check_reads_both_sides(model: Model) -> None:
    """ValueError for a model that cannot say a word from what stands on both sides of it."""
    c = model.config
    if c.objective not in ("flm", "mlm") or c.head != "vocab":
        raise ValueError("blanks are filled by a pretrained model of objective flm or mlm; this is "
                         f"{c.objective} with head {c.head}")


def fill_blanks(model: Model, visual: Tensor | vilt.Visual, ids: Tensor,
                rounds: int = 3) -> tuple[Tensor, list[tuple[int, float]]]:
    """What `fill` does, with token ids (1, L) -> (those of the whole text, [(id, probability)])."""
    blanks = (ids[0] == model.config.mask_id).nonzero()[:, 0]               # positions
    if model.config.objective == "mlm" or len(blanks) == 1:
        rounds = 1
    for _ in range(rounds):
        share, guess = token_shares(model, visual, ids, blanks).max(-1)     # (blanks,)
        before = ids
        ids = ids.index_copy(1, blanks, guess[None])                        # (1, L)
        if torch.equal(ids, before):
            break
    return ids, list(zip(guess.tolist(), share.tolist(), strict=True))


def token_shares(model: Model, visual: Tensor | vilt.Visual, ids: Tensor,
                 positions: Tensor) -> Tensor:
    """The probability of every token at some positions of a text, float32 (positions, V).

    visual: of one image. ids (1, L). FLM never reads what stands at the position itself; a model of
    objective mlm does, so it must be `<mask>`. Special tokens are no words and have 0.
    """
    tok = model.tokenizer
    fused = model.fuse(visual, model.encode_text(ids))
    logits = finite(model.vocab_logits(fused.reconstructed[0, positions]))  # (positions, V)
    shares = logits.float().softmax(-1)
    shares[:, [tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id]] = 0
    return shares
