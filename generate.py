"""Captioning: writes a caption word by word, by greedy decoding, beam search or sampling.

Token layout    position   0    1      2  …  k+1  k+2    k+3
                token      <s>  <bos>  w1 …  wk   <eos>  </s>

What predicts   The model is an FLM of objective ar; `train.py --task caption` makes it. Its only
                text stream is `left_to_right`: row i knows the image and the tokens 1..i. The
                vocabulary head reads row i and scores token i + 1. So the row of <bos> predicts
                w1, and that of wk predicts <eos>.

Decoding        Decoding starts with the prompt <bos>. At each step the row of the last token
                scores all tokens, one is chosen and appended, until a stop token (<eos> or
                </s>) or `max_tokens`.

    visual = model.encode_image(images)                                 # (M, P, D), once
    captions, scores = generate(model, visual, [bos], [eos])            # greedy: the likeliest word
    captions, scores = generate(model, visual, [bos], [eos], beams=5)   # beam search
    captions, scores = generate(model, visual, [bos], [eos], top_p=0.9, seeds=range(M))  # sampling

Nothing is computed twice. No token looks at a later one, so the rows of tokens 1..i never change.
Later tokens need only their keys and values in each layer's self-attention, which a `KVCache`
keeps. So each step computes one row per caption. The image's keys and values, in the
cross-attentions, are the same at every step and for all captions of the image. `<s>` is not
computed at all: it reads every token, but no token reads it.

Letters: M images, A images with unfinished captions, W beams (running captions of an image),
B rows of a batch (A, or A W), n tokens so far without `<s>`, P image tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flm
from layers import Mask

# -------------------------------------------------------------------------------------------------
# The next word's logits, in two ways. Both take whole captions so far, ids (B, n) without `<s>`.

def uncached_logits(model: flm.FLM, visual: Tensor, ids: Tensor) -> Tensor:
    """The logits of the next word, straight from the model's definition.

    visual (M, P, D), ids (B, n) -> (B, V)
    """
    ids = F.pad(ids, (1, 0), value=model.config.cls_id)                     # (B, 1 + n)
    fused = model.fuse(visual, model.encode_text(ids))
    return model.vocab_logits(fused.left_to_right[:, -1])


class Uncached:
    """Computes all words again for each new one: slow, and what `Cached` must equal."""

    def __init__(self, model: flm.FLM, visual: Tensor):
        self.model, self.visual = model, visual

    def next_logits(self, ids: Tensor) -> Tensor:
        return uncached_logits(self.model, self.visual, ids)

    def select(self, rows: Tensor, images: Tensor) -> None:
        self.visual = self.visual[images]


class KVCache:
    """Keys and values of the words so far in one layer's self-attention, (B, heads, n, d) each."""

    def __init__(self):
        self.keys = self.values = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends those of new words, (B, heads, new, d) -> those of all, (B, heads, n, d)."""
        # Copying the old ones takes under a hundredth of a step (base size, 4 captions of 20
        # tokens), so a buffer of the final length would gain nothing.
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class Cached:
    """Computes each word once.   visual (M, P, D)"""

    def __init__(self, model: flm.FLM, visual: Tensor):
        self.model = model
        self.length = 0             # tokens of each caption that are in the caches
        self.text_caches = [KVCache() for _ in model.text_layers]
        self.fusion_caches = [KVCache() for _ in model.fusion_layers]
        # keys and values of the image in each fusion layer, (M, heads, P, d)
        self.image = [layer.cross_attention.keys_and_values(visual)
                      for layer in model.fusion_layers]

    def next_logits(self, ids: Tensor) -> Tensor:
        """ids (B, n): the captions of the last call, each with new words at its end -> (B, V)."""
        model, (B, n) = self.model, ids.shape
        index = torch.arange(self.length, n, device=ids.device)             # (new,)
        mask = None                 # a single new word sees all there is
        if len(index) > 1:          # each word of a prompt sees itself and the words left of it
            columns = torch.arange(n, device=ids.device)
            mask = Mask.of((columns <= index[:, None]).expand(B, -1, -1))   # (B, new, n)
        # RoBERTa counts positions from 2, and 2 is `<s>`.
        x = model.embed(ids[:, self.length:], 3 + index[None])[:, None]     # (B, 1, new, D)
        for layer, cache in zip(model.text_layers, self.text_caches, strict=True):
            x = layer(x, mask, cache=cache)
        x = model.text_to_fusion(x) + model.token_type[0]
        fusion = zip(model.fusion_layers, self.fusion_caches, self.image, strict=True)
        for layer, cache, image in fusion:
            x = layer(x, mask, image, cache)
        self.length = n
        return model.vocab_logits(x[:, 0, -1])

    def select(self, rows: Tensor, images: Tensor) -> None:
        """Goes on with these rows of the last call, in this order, and with these of the images.

        A row may come twice. Each image has the same number of neighbouring rows.
        """
        for cache in self.text_caches + self.fusion_caches:
            cache.select(rows)
        if len(images) < len(self.image[0][0]):
            self.image = [(keys[images], values[images]) for keys, values in self.image]


def next_log_probs(decoder: Cached | Uncached, ids: Tensor, no_repeat: int) -> Tensor:
    """Log-probabilities of the next word, -inf for what must not come: (B, n) -> (B, V) float32."""
    log_probs = F.log_softmax(decoder.next_logits(ids).float(), dim=-1)
    log_probs[:, decoder.model.config.pad_id] = -torch.inf      # padding is no word of a caption
    if no_repeat:
        return forbid_repeats(log_probs, ids, no_repeat)
    return log_probs


def forbid_repeats(log_probs: Tensor, ids: Tensor, size: int) -> Tensor:
    """-inf for every token that would repeat an n-gram of `size` tokens (Paulus et al. 2017, 2.5).

    A token is forbidden if it has already followed the last size - 1 tokens somewhere.
    log_probs (B, V), ids (B, n) -> (B, V)
    """
    B, n = ids.shape
    if n < size:
        return log_probs
    grams = ids.unfold(1, size, 1)                                  # (B, n - size + 1, size)
    beginnings, followers = grams[:, :, :-1], grams[:, :, -1]
    last = ids[:, None, n - size + 1:]                                      # (B, 1, size - 1)
    again = (beginnings == last).all(-1)                                    # (B, n - size + 1)
    ceiling = torch.where(again, -torch.inf, torch.inf)
    return log_probs.scatter_reduce(1, followers, ceiling, "amin")


# -------------------------------------------------------------------------------------------------
# Greedy decoding and sampling: one caption per image.

Captions = tuple[list[list[int]], list[float]]  # tokens, and their sums of log-probabilities


def word_by_word(decoder: Cached | Uncached, ids: Tensor, stop: Tensor, max_tokens: int,
                 no_repeat: int, choose: Callable[[Tensor, int, Tensor], Tensor]) -> Captions:
    """Writes one caption per image from prompts ids (M, n).

    choose(log_probs (A, V), step, alive (A,)) picks the next token of each of the images `alive`.
    """
    tokens = ids.new_full((len(ids), max_tokens), -1)
    scores = torch.zeros(len(ids), device=ids.device)
    alive = torch.arange(len(ids), device=ids.device)       # the images with unfinished captions
    for step in range(max_tokens):
        log_probs = next_log_probs(decoder, ids, no_repeat)                 # (A, V)
        token = choose(log_probs, step, alive)                              # (A,)
        tokens[alive, step] = token
        scores[alive] += log_probs.gather(1, token[:, None])[:, 0]
        ids = torch.cat([ids, token[:, None]], dim=1)                       # (A, n)
        going_on = (~torch.isin(token, stop)).nonzero()[:, 0]
        if len(going_on) == 0:
            break
        if len(going_on) < len(alive):
            ids, alive = ids[going_on], alive[going_on]
            decoder.select(going_on, going_on)
    no_words = {-1, *stop.tolist()}
    captions = [[token for token in row if token not in no_words] for row in tokens.tolist()]
    return captions, scores.tolist()


def nucleus_sample(log_probs: Tensor, draw: Tensor, top_p: float, temperature: float) -> Tensor:
    """Draws from the nucleus (Holtzman et al. 2020, 3.1) -> tokens (B,).

    The nucleus is the smallest set of likeliest tokens with a total probability of at least top_p.
    log_probs (B, V); draw (B,) float64 in [0, 1): the random numbers, the only source of chance.
    """
    p, token = (log_probs.double() / temperature).softmax(-1).sort(descending=True)
    cumulative = p.cumsum(-1)                                               # (B, V)
    last = (cumulative < top_p).sum(-1, keepdim=True)           # (B, 1), the nucleus's last token
    last = last.clamp(max=p.shape[1] - 1)                       # (rounding may miss 1.0)
    threshold = draw[:, None] * cumulative.gather(1, last)                  # (B, 1)
    chosen = (cumulative <= threshold).sum(-1, keepdim=True)
    return token.gather(1, chosen)[:, 0]


# -------------------------------------------------------------------------------------------------
# Beam search: the W best running captions of each image.

class Ended(NamedTuple):
    """A caption that has ended. Of two, the one with the higher score is better."""
    score: float            # total / length^length_penalty
    total: float            # sum of log-probabilities
    words: list[int]


def beam_search(decoder: Cached | Uncached, ids: Tensor, stop: Tensor, max_tokens: int,
                no_repeat: int, beams: int, length_penalty: float) -> Captions:
    """Writes the best caption that beam search finds for each image, from prompts ids (M, n).

    At each length the `beams` likeliest running captions of an image are continued. A caption of
    n tokens, its stop token counted, has the score

        (sum of log-probabilities) / n^length_penalty

    (Google's translator, Wu et al. 2016, eq. 14, divides by ((5 + n) / 6)^a.) The best `beams`
    ended captions of each image are kept. Its search is over when no running caption has a better
    score at its present length than the worst of them. These are the rules of transformers'
    `generate` with early_stopping=False; with one beam they are greedy decoding.
    """
    prompt, stop_tokens = ids.shape[1], set(stop.tolist())
    ended = [[] for _ in ids]                               # of each image, the best first
    alive = list(range(len(ids)))                           # the A images whose search goes on
    totals = torch.zeros(len(ids), 1, device=ids.device)    # (A, W), W = 1 at first: of what runs
    for length in range(1, max_tokens + 1):
        A, W = totals.shape
        log_probs = next_log_probs(decoder, ids, no_repeat)                 # (A W, V)
        V = log_probs.shape[1]
        extended = totals[:, :, None] + log_probs.view(A, W, V)             # (A, W, V)
        # Each running caption may end in every stop token. Among this many candidates, at least
        # `beams` do not end.
        count = min(beams * (1 + len(stop)), W * V)
        sums, candidate = extended.view(A, W * V).topk(count)               # (A, C), the best first
        beam, token = candidate // V, candidate % V                         # (A, C)
        row = beam + W * torch.arange(A, device=ids.device)[:, None]        # (A, C), of ids
        ends = torch.isin(token, stop) | (length == max_tokens)             # (A, C)

        # Of the candidates that end, only those among the best `beams` count.
        images, places = ends[:, :beams].nonzero(as_tuple=True)             # (E,) each
        for a, last, total, words in zip(
                images.tolist(), token[images, places].tolist(), sums[images, places].tolist(),
                ids[row[images, places], prompt:].tolist(), strict=True):
            if last not in stop_tokens:                     # cut at max_tokens
                words.append(last)
            ended[alive[a]].append(Ended(total / length ** length_penalty, total, words))
        if length == max_tokens:
            break

        running = sums.masked_fill(ends, -torch.inf)                        # (A, C)
        totals, chosen = running.topk(min(beams, count))                    # (A, W), the best first
        going_on = []
        for a, best in enumerate((totals[:, 0] / length ** length_penalty).tolist()):
            kept = sorted(ended[alive[a]], reverse=True)[:beams]
            ended[alive[a]] = kept
            if len(kept) < beams or best > kept[-1].score:
                going_on.append(a)
        if not going_on:
            break
        alive = [alive[a] for a in going_on]
        going_on = torch.tensor(going_on, device=ids.device)
        totals, chosen = totals[going_on], chosen[going_on]                 # (A, W)
        rows = row[going_on].gather(1, chosen).flatten()                    # (A W,)
        tokens = token[going_on].gather(1, chosen).flatten()                # (A W,)
        ids = torch.cat([ids[rows], tokens[:, None]], dim=1)                # (A W, n)
        decoder.select(rows, going_on)
    best = [max(captions) for captions in ended]
    return [caption.words for caption in best], [caption.total for caption in best]


# -------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model: flm.FLM, visual: Tensor, prompt: Sequence[int], stop: Sequence[int],
             max_tokens: int = 30, beams: int = 1, length_penalty: float = 1.0, no_repeat: int = 0,
             top_p: float | None = None, temperature: float = 1.0, seeds: Sequence | None = None,
             cache: bool = True) -> Captions:
    """Writes a caption for each of M images -> (M lists of token ids, M sums of log-probabilities).

    model       an FLM of objective ar, in eval mode
    visual      (M, P, D), from encode_image
    prompt      the ids that all captions begin with: `<bos>`, perhaps words after it
    stop        the ids that end a caption. The lists hold neither the prompt nor a stop token.
                The sums count the stop token and not the prompt.
    max_tokens  a caption that has not ended after this many tokens is cut there
    beams       number of beams; more than 1: beam search, see `beam_search` for length_penalty
    no_repeat   n-grams of this size come at most once; 0: no such rule. 3 helps a model that
                repeats itself, but "a small red circle above a small red square" is good English.
    top_p       draw each word from the likeliest ones with this total probability; 1.0: from all
    temperature logits are divided by it before a word is drawn
    seeds       of sampling: for each image what numpy's default_rng takes. So a caption does not
                depend on the other images of the batch.
    cache       False: the same captions, by `uncached_logits`
    ValueError for a model that writes no captions, and for settings without meaning.
    """
    check(model, len(visual), prompt, max_tokens, beams, no_repeat, top_p, temperature, seeds)
    if len(visual) == 0:
        return [], []
    ids = torch.tensor(prompt, device=visual.device).expand(len(visual), -1)                # (M, n)
    stop = torch.tensor(stop, device=visual.device, dtype=torch.int64)
    decoder = Cached(model, visual) if cache else Uncached(model, visual)

    def likeliest(log_probs, step, alive):
        return log_probs.argmax(-1)

    def sampled(log_probs, step, alive):
        return nucleus_sample(log_probs, draws[alive, step], top_p, temperature)

    if beams > 1:
        found = beam_search(decoder, ids, stop, max_tokens, no_repeat, beams, length_penalty)
    elif top_p is None:
        found = word_by_word(decoder, ids, stop, max_tokens, no_repeat, likeliest)
    else:
        draws = np.stack([np.random.default_rng(seed).random(max_tokens) for seed in seeds])
        draws = torch.from_numpy(draws).to(visual.device)                   # (M, max_tokens)
        found = word_by_word(decoder, ids, stop, max_tokens, no_repeat, sampled)
    if np.isnan(found[1]).any():
        raise ValueError("the model's scores are not numbers (NaN): its weights are broken, or the "
                         "precision is too low for them")
    return found


def check(model: flm.FLM, images: int, prompt: Sequence[int], max_tokens: int, beams: int,
          no_repeat: int, top_p: float | None, temperature: float, seeds: Sequence | None) -> None:
    """ValueError for arguments of `generate` that cannot be; `images` is their number."""
    c = model.config
    writes = isinstance(model, flm.FLM) and c.objective == "ar" and c.head == "vocab"
    if not writes:
        raise ValueError(
            "captions are written by an FLM of objective ar with head vocab, which train.py --task "
            f"caption makes of a pretrained FLM; this is a {type(model).__name__} of objective "
            f"{c.objective} with head {c.head}")
    if model.training:
        raise ValueError("captions are written in eval mode: call model.eval() first")

    if len(prompt) == 0:
        raise ValueError("prompt []: at least one id is expected, that of <bos>")
    if c.pad_id in prompt:
        raise ValueError(f"prompt {list(prompt)}: no padding ({c.pad_id}) is expected")
    if min(prompt) < 0 or max(prompt) >= c.vocab_size:
        raise ValueError(f"prompt {list(prompt)}: ids of 0..{c.vocab_size - 1} are expected")
    # `<s>` has a position too, and the last token needs none, since nothing reads it.
    most = c.max_tokens - len(prompt)
    if not 1 <= max_tokens <= most:
        raise ValueError(f"max_tokens {max_tokens} after a prompt of {len(prompt)}: at least 1 and "
                         f"at most {most} are expected; the model has positions for {c.max_tokens}")
    if beams < 1:
        raise ValueError(f"beams {beams}: at least 1 is expected")
    if no_repeat < 0:
        raise ValueError(f"no_repeat {no_repeat}: at least 0 tokens are expected")

    if top_p is None:
        return
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: sampling needs a top_p of 0 < p <= 1")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: sampling needs a temperature above 0")
    if beams > 1:
        raise ValueError(f"beams {beams} with top_p {top_p}: sampling needs 1 beam")
    if seeds is None or len(seeds) != images:
        raise ValueError(f"sampling needs seeds, one for each of the {images} images")
