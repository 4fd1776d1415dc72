"""One model, pictures and text in, an answer out."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import generate
from data import decode, pad_pictures, pad_texts
from layers import encode_batch_images
from tasks import BOS, EOS, normalized, patch_layout, shape_of


def picture_batch(config, pictures, device):
    """Pictures, uint8 (3, h, w) each, as the batch that `flm.see` takes, on the device."""
    batch = patch_layout(config, pictures) | {"image": pad_pictures(pictures)}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | {"image": normalized(config, batch["image"])}


def open_picture(path, config):
    """A picture file as the model sees it, uint8 (3, H, W); one sentence for what is no picture."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    try:
        return decode(path.read_bytes(), shape_of(config))
    except Exception as error:              # Pillow's readers raise what the broken bytes lead to
        raise ValueError(f"{path}: not a picture that can be read ({error or type(error).__name__})") from None


def look_at(model, paths):
    """Pictures, encoded."""
    device = next(model.parameters()).device
    return encode_batch_images(model, picture_batch(model.config, [open_picture(path, model.config) for path in paths], device))


def token_ids(model, text):
    """One text with `<s>` and `</s>`, (1, L); one that is too long is refused."""
    tok = model.tokenizer
    ids = [tok.cls_id, *tok.encode(text), tok.sep_id]
    if len(ids) > model.config.max_tokens:
        raise ValueError(f"a text of {len(ids)} tokens; this model reads at most {model.config.max_tokens}: {text!r:.60}")
    return torch.tensor([ids], device=next(model.parameters()).device)


@torch.no_grad()
def ask(model, path, question, k=5):
    """The k likeliest answers to a question -> [(answer, share)], shares by the sigmoid that the model was trained with."""
    if k < 1:
        raise ValueError(f"{k} answers: at least 1 is expected")
    text = model.encode_text(token_ids(model, question), class_only=True)
    shares = model.head(model.fuse(look_at(model, [path]), text).pooled)[0].sigmoid()
    best = shares.topk(min(k, len(shares)))
    return [(model.answer_list[i], share) for share, i in zip(best.values.tolist(), best.indices.tolist())]


def write_captions(model, visual, max_tokens=None, beams=1, **how):
    """Captions of pictures already encoded -> list of strings.   how: see generate.generate

    max_tokens: None: 30, or as many as the model has positions for.
    """
    tok = model.tokenizer
    if beams > model.config.vocab_size:
        raise ValueError(f"{beams} beams: the vocabulary has {model.config.vocab_size} words to begin them with")
    if not {BOS, EOS} <= tok.ids.keys():
        raise ValueError(f"a model without {BOS} and {EOS} in its vocabulary: train.py --task caption makes one that writes")
    ids, _ = generate.generate(model, visual, [tok.ids[BOS]], [tok.ids[EOS], tok.sep_id],
                               min(30, model.config.max_tokens - 2) if max_tokens is None else max_tokens, beams, **how)
    return [tok.decode(caption, skip_special=True).strip() for caption in ids]


@torch.no_grad()
def compare(model, left, right, sentence):
    """Is the sentence true of the two pictures? -> its probability"""
    text = model.encode_text(token_ids(model, sentence), class_only=True)
    device = next(model.parameters()).device
    pooled = []
    for which, path in enumerate((left, right)):
        batch = picture_batch(model.config, [open_picture(path, model.config)], device)
        suffix = "_1" if which else ""
        pooled.append(model.fuse(encode_batch_images(model, {name + suffix: value for name, value in batch.items()}, which), text).pooled)
    return model.head(torch.cat(pooled, dim=-1)).softmax(-1)[0, 1].item()


@torch.no_grad()
def search(model, text, paths):
    """Pictures in the order in which they fit a text -> [(path, score)]; one is encoded at a time."""
    encoded = model.encode_text(token_ids(model, text), class_only=True)
    return sorted(((str(path), match_score(model, look_at(model, [path]), encoded).item()) for path in paths), key=lambda p: -p[1])


@torch.no_grad()
def fill(model, path, text, rounds=3):
    """Fills every `<mask>` of a text -> (the whole text, [(word, probability)]).

    FLM predicts all blanks at once, each from the words on both of its sides; where there are several, it then reads the
    text with its own guesses in it and predicts each once more, `rounds` times in all or until nothing changes. Models of
    objective mlm (ViLT too) see the masks themselves. ValueError for models that read from one side only.
    """
    tok, c, mask = model.tokenizer, model.config, model.tokenizer.tokens[model.tokenizer.mask_id]
    if c.objective not in ("flm", "mlm") or c.head != "vocab":
        raise ValueError(f"blanks are filled by a pretrained model of objective flm or mlm; this is {c.objective} with head {c.head}")
    text = text.replace("<mask>", mask).replace("[MASK]", mask)
    ids = [tok.cls_id, *tok.encode(text, specials=True), tok.sep_id]
    blanks = [i for i, token in enumerate(ids) if token == tok.mask_id]
    if not blanks:
        raise ValueError(f"there is no {mask} in {text!r}")
    visual = look_at(model, [path])
    for _ in range(rounds if c.objective == "flm" and len(blanks) > 1 else 1):
        before = list(ids)
        read = torch.tensor([ids], device=next(model.parameters()).device)
        shares = model.vocab_logits(model.fuse(visual, model.encode_text(read)).reconstructed[0, blanks]).softmax(-1)
        shares[:, [tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id]] = 0
        best = shares.max(-1)
        for i, token in zip(blanks, best.indices.tolist()):
            ids[i] = token
        if ids == before:
            break
    words = [tok.decode([ids[i]]).strip() for i in blanks]
    return tok.decode(ids[1:-1]), list(zip(words, best.values.tolist()))


def match_score(model, visual, text):
    """How well captions go with images: the retrieval head's score, or what a pretrained model's matching says.   -> (B,)"""
    pooled = model.fuse(visual, text).pooled
    if model.config.head == "retrieval":
        return model.head(pooled)[:, 0].float()
    return model.itm_head(pooled).float().log_softmax(-1)[:, 1]


class Gallery:
    """Images and captions of a split, encoded when they are wanted.

    rows (I,): the table's rows of the images; numbers (T,): its captions.
    unreadable: a line for each picture so far that cannot be decoded, and is black; cut: how many captions are too long.
    """

    def __init__(self, model, dataset, rows, numbers, device):
        self.model, self.dataset, self.rows, self.numbers, self.device = model, dataset, rows, numbers, device
        self.unreadable, self.cut = [], 0

    def image(self, i):
        pictures, wrong = self.dataset.pictures(int(self.rows[i]))
        self.unreadable += wrong
        return encode_batch_images(self.model, picture_batch(self.model.config, pictures, self.device))

    def tokens(self):
        """The token ids of all captions, in order."""
        tokens = [self.dataset.tokens(i) for i in self.numbers]
        self.cut = sum(cut for _, cut in tokens)
        return [ids for ids, _ in tokens]

    def texts(self, tokens):
        ids = pad_texts(tokens, self.model.config.pad_id).to(self.device)
        return self.model.encode_text(ids, class_only=True)


@torch.no_grad()
def fill_scores(gallery, scores, mine, texts_at_once=256, quiet=False):
    """Scores the images `mine` with all captions: fills those rows of scores (I, T) that still hold a NaN.

    scores may be a file that several processes and an interrupted run share: a row appears in it whole or not at all.
    """
    tokens = gallery.tokens()
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    chunks = [order[first:first + texts_at_once] for first in range(0, len(order), texts_at_once)]
    texts = [gallery.texts([tokens[i] for i in chunk])
             for chunk in tqdm(chunks, "captions", unit="batch", leave=False, disable=quiet)]
    todo = [i for i in mine if np.isnan(scores[i]).any()]
    for i in tqdm(todo, "images", unit="image", leave=False, disable=quiet):
        visual, line = gallery.image(i), np.full(len(tokens), -np.inf, dtype=np.float32)
        for chunk, text in zip(chunks, texts):
            line[chunk] = match_score(gallery.model, visual, text).cpu().numpy()
        scores[i] = line
