"""Retrieval: every image against every caption, with all that is not pairwise computed once.

Images and captions are encoded once each; only the fusion of a pair is computed for every pair, of the reconstructor the
class query alone. An image's keys and values are computed once for a whole batch of captions.
(Command: `eval.py retrieval`.)

Letters: I images, T captions, N pairs that something is fitted on, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import pad_texts
from flm import see
from probe import picture_batch


def fit(model, visual, text):
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
        return see(self.model, picture_batch(self.model.config, pictures, self.device))

    def tokens(self):
        """The token ids of all captions, in order."""
        tokens = [self.dataset.tokens(i) for i in self.numbers]
        self.cut = sum(cut for _, cut in tokens)
        return [ids for ids, _ in tokens]

    def texts(self, tokens):
        ids = pad_texts(tokens, self.model.config.pad_id).to(self.device)
        return self.model.encode_text(ids, class_only=True)


@torch.no_grad()
def fill_scores(gallery, scores, mine, candidates=None, texts_at_once=256, quiet=False):
    """Scores the images `mine` with all captions: fills those rows of scores (I, T) that still hold a NaN.

    scores may be a file that several processes and an interrupted run share: a row appears in it whole or not at all.
    candidates (I, T) bool: only these pairs are scored, all others get minus infinity.
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
            if candidates is not None:
                wanted = np.flatnonzero(candidates[i, chunk])
                if not len(wanted):
                    continue
                chunk, text = chunk[wanted], text[torch.from_numpy(wanted).to(gallery.device)]
            line[chunk] = fit(gallery.model, visual, text).cpu().numpy()
        scores[i] = line


# ---------------------------------------------------------------------------------------------------------------------
# The approximate mode: a cheap score says which pairs are worth scoring.

@torch.no_grad()
def features(gallery, quiet=False):
    """The mean token of each image and of each caption, from the encoders alone.   -> (I, D), (T, D) float64"""
    images, texts = [], []
    for i in tqdm(range(len(gallery.rows)), "image features", leave=False, disable=quiet):
        visual = gallery.image(i)
        images.append((visual if torch.is_tensor(visual) else visual.tokens)[0].double().mean(0).cpu())
    for ids in tqdm(gallery.tokens(), "caption features", leave=False, disable=quiet):
        text = gallery.texts([ids])
        tokens = text.streams.flatten(1, 2) if hasattr(text, "streams") else text.tokens            # (1, S L, D)
        texts.append(tokens[0].double().mean(0).cpu())
    return torch.stack(images), torch.stack(texts)


def canonical_directions(x, y, dimensions=64, ridge=0.1):
    """Canonical correlation analysis: x (N, D), y (N, D') -> two functions into one space, where pairs have a high cosine.

    (Hotelling 1936; the covariances get `ridge` times their mean variance on the diagonal, as N is small.)
    """
    whiten = []
    for rows in (x, y):
        centred = rows - rows.mean(0)
        covariance = centred.T @ centred / len(rows)
        values, vectors = torch.linalg.eigh(covariance + ridge * covariance.diagonal().mean() * torch.eye(rows.shape[1]))
        whiten.append(vectors / values.clamp(min=1e-12).sqrt() @ vectors.T)                         # covariance^-1/2
    u, strength, v = torch.linalg.svd(whiten[0] @ (x - x.mean(0)).T @ (y - y.mean(0)) @ whiten[1] / len(x))
    maps = whiten[0] @ u[:, :dimensions] * strength[:dimensions], whiten[1] @ v.T[:, :dimensions]
    return [lambda rows, mean=mean, to=to: F.normalize((rows - mean) @ to, dim=-1)
            for mean, to in zip((x.mean(0), y.mean(0)), maps)]


def shortlist(gallery, known, image_of_known, k, quiet=False):
    """The k likeliest captions of each image and the k likeliest images of each caption, by a cheap score.

    The cheap score is the cosine of canonical_directions between features, fitted on the pairs of another gallery,
    `known`, whose caption j belongs to its image image_of_known[j].   -> (I, T) bool
    """
    images, texts = features(known, quiet)
    to_image, to_text = canonical_directions(images[torch.as_tensor(image_of_known)], texts)
    images, texts = features(gallery, quiet)
    cheap = to_image(images) @ to_text(texts).T                                                     # (I, T)
    chosen = torch.zeros_like(cheap, dtype=torch.bool)
    chosen.scatter_(1, cheap.topk(min(k, cheap.shape[1]), dim=1).indices, True)
    chosen.scatter_(0, cheap.topk(min(k, cheap.shape[0]), dim=0).indices, True)
    return chosen.numpy()
