"""Captions, word by word, with nothing computed twice: greedy, beam search, sampling.

    visual = model.encode_image(images)                                              # (M, P, D), once
    captions, scores = generate(model, visual, prompt=[bos], stop=[eos])             # the likeliest word each time
    captions, scores = generate(model, visual, [bos], [eos], beams=5)                # the likeliest caption, nearly
    captions, scores = generate(model, visual, [bos], [eos], top_p=0.9, seeds=range(len(visual)))    # one of the likely

The model is one whose every word predicts the next (objective ar), fine-tuned on `<s> <bos> w1 … wk <eos> </s>`.

What the cache is: word t looks at the words up to itself, no word ever looks at a later one. So once computed, the rows of
w1 … wt never change, and all that later words want of them are their keys and values in each layer's self-attention. Each
step computes one row per caption, the last one's, and adds its keys and values to those that were kept. The image's keys
and values, in the cross-attentions, are the same at every step and for all captions of the image. And `<s>` is not computed
at all: it reads every word, but no word reads it.

Letters: M images, W beams (running captions of an image), B = M W rows, n tokens so far, P image tokens, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F

import flm


# ---------------------------------------------------------------------------------------------------------------------
# The next word's logits, in two ways. Both are asked for the whole captions so far, (B, n) without `<s>`.

def uncached_logits(model, visual, ids):
    """The logits of the next word, as the model is defined: visual (M, P, D), ids (B, n) without `<s>` -> (B, V)."""
    ids = F.pad(ids, (1, 0), value=model.config.cls_id)
    return model.vocab_logits(model.fuse(visual, model.encode_text(ids)).left_to_right[:, -1])


class Uncached:
    """Computes all words again for each new one: slow, and what `Cached` must equal."""

    def __init__(self, model, visual):
        self.model, self.visual = model, visual

    def next_logits(self, ids):
        return uncached_logits(self.model, self.visual, ids)

    def keep(self, rows, images):
        self.visual = self.visual[images]


class Words:
    """Keys and values of the words so far in one layer's self-attention, (B, heads, n, d) each."""

    def __init__(self):
        self.kept = None

    def extend(self, *new):
        # Copying what was there costs under a hundredth of a step (base size, 4 captions of 20 tokens): no buffer is needed.
        self.kept = new if self.kept is None else tuple(torch.cat(pair, dim=2) for pair in zip(self.kept, new))
        return self.kept

    def keep(self, rows):
        self.kept = tuple(x[rows] for x in self.kept)


class Cached:
    """Computes each word once."""

    def __init__(self, model, visual):
        self.model, self.said = model, 0
        self.image = [layer.cross_attention.keys_and_values(visual) for layer in model.fusion_layers]   # (M, heads, P, d)
        self.text_words = [Words() for _ in model.text_layers]
        self.fusion_words = [Words() for _ in model.fusion_layers]

    def next_logits(self, ids):
        """ids (B, n): the captions of the last call, each with new words at its end -> (B, V)."""
        model, (B, n) = self.model, ids.shape
        place = torch.arange(self.said, n, device=ids.device)                                   # (new,)
        # One new word sees all there is. Several (the prompt's) see what is left of them, and themselves.
        mask = None if len(place) == 1 else (torch.arange(n, device=ids.device) <= place[:, None]).expand(B, -1, -1)
        x = model.embed(ids[:, self.said:], 3 + place[None])                # RoBERTa counts from 2, and that is `<s>`
        for layer, words in zip(model.text_layers, self.text_words):
            x = layer(x, mask, past=words)                                                      # (B, new, D)
        x = model.text_to_fusion(x) + model.token_type[0]
        for layer, words, image in zip(model.fusion_layers, self.fusion_words, self.image):
            x = layer(x, mask, memory=image, past=words)
        self.said = n
        return model.vocab_logits(x[:, -1])

    def keep(self, rows, images):
        """Goes on with these rows of the last call only, in this order (a row may come twice), and with these images."""
        for words in self.text_words + self.fusion_words:
            words.keep(rows)
        if len(images) < len(self.image[0][0]):
            self.image = [(k[images], v[images]) for k, v in self.image]


def next_log_probs(decoder, ids, no_repeat):
    """The log-probabilities of the next word, -inf for what must not come: (B, n) -> (B, V) float32."""
    log_probs = F.log_softmax(decoder.next_logits(ids).float(), dim=-1)
    log_probs[:, decoder.model.config.pad_id] = -torch.inf              # a caption with holes is none
    return forbid_repeats(log_probs, ids, no_repeat) if no_repeat else log_probs


def forbid_repeats(log_probs, ids, size):
    """-inf for every token that would say an n-gram of `size` tokens a second time (Paulus et al. 2017, section 2.5).

    log_probs (B, V), ids (B, n): a token is out if somewhere the last size - 1 tokens stand before it already.
    """
    B, n = ids.shape
    if n < size:
        return log_probs
    grams = ids.unfold(1, size, 1)                                                              # (B, n - size + 1, size)
    again = (grams[:, :, :-1] == ids[:, None, n - size + 1:]).all(-1)
    return log_probs.scatter_reduce(1, grams[:, :, -1], torch.where(again, -torch.inf, torch.inf), "amin")


# ---------------------------------------------------------------------------------------------------------------------
# Which word comes next.

def word_by_word(decoder, ids, stop, max_tokens, no_repeat, choose):
    """One caption per image; `choose(log_probs (A, V), step, alive (A,))` picks the next token of those that go on.

    ids (M, n): the prompts -> M lists of tokens, and M sums of log-probabilities.
    """
    tokens = ids.new_full((len(ids), max_tokens), -1)
    scores = torch.zeros(len(ids), device=ids.device)
    alive = torch.arange(len(ids), device=ids.device)           # the images whose captions have not ended
    for step in range(max_tokens):
        log_probs = next_log_probs(decoder, ids, no_repeat)
        token = choose(log_probs, step, alive)                                                  # (A,)
        tokens[alive, step] = token
        scores[alive] += log_probs.gather(1, token[:, None])[:, 0]
        ids = torch.cat([ids, token[:, None]], dim=1)
        going = (~torch.isin(token, stop)).nonzero()[:, 0]
        if len(going) < len(alive):
            ids, alive = ids[going], alive[going]
            decoder.keep(going, going)
        if not len(alive):
            break
    ends = {-1, *stop.tolist()}
    return [[t for t in row if t not in ends] for row in tokens.tolist()], scores.tolist()


def nucleus_sample(log_probs, draw, top_p, temperature):
    """Draws from the nucleus: the fewest likeliest tokens that have top_p together (Holtzman et al. 2020, section 3.1).

    log_probs (B, V); draw (B,) float64 in [0, 1): the random numbers, all the chance there is -> tokens (B,).
    """
    p, token = (log_probs.double() / temperature).softmax(-1).sort(descending=True)
    reached = p.cumsum(-1)                                                                      # (B, V)
    last = (reached < top_p).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)                    # (B, 1) of the nucleus
    place = (reached <= draw[:, None] * reached.gather(1, last)).sum(-1, keepdim=True)
    return token.gather(1, place)[:, 0]


def beam_search(decoder, ids, stop, max_tokens, no_repeat, beams, length_penalty):
    """The best captions that a search finds which goes on with the `beams` likeliest of an image at each length.

    A caption of n tokens, its stop token counted, has the score (sum of log-probabilities) / n^length_penalty. (Google's
    translator, Wu et al. 2016, eq. 14, divides by ((5 + n) / 6)^a.) Of each image the best `beams` that ended are kept; its
    search is over when none that runs beats the worst of them at its present length. These are the rules of transformers'
    `generate` (early_stopping=False); with one beam they are greedy decoding.
    ids (M, n): the prompts -> M lists of tokens, and M sums of log-probabilities.
    """
    start = ids.shape[1]
    ended = [[] for _ in ids]                   # per image: (score, sum of log-probabilities, tokens), the best first
    alive = list(range(len(ids)))               # the images whose search is not over: A
    running = torch.zeros(len(ids), 1, device=ids.device)       # (A, W) sums of log-probabilities; W is 1 at first
    for length in range(1, max_tokens + 1):
        A, W = running.shape
        log_probs = next_log_probs(decoder, ids, no_repeat)                                     # (A W, V)
        V = log_probs.shape[1]
        sums = (running[:, :, None] + log_probs.view(A, W, V)).flatten(1)                       # (A, W V)
        # A caption can end in each stop token: among so many candidates at least `beams` go on.
        sums, candidate = sums.topk(min(beams * (1 + len(stop)), W * V))                        # (A, C), the best first
        token = candidate % V
        row = candidate // V + W * torch.arange(A, device=ids.device)[:, None]                  # whose caption goes on
        ends = torch.isin(token, stop) | (length == max_tokens)

        for a, c in ends[:, :beams].nonzero().tolist():         # the others stand in for those that end, no more
            words = ids[row[a, c], start:].tolist()
            if token[a, c] not in stop:
                words.append(token[a, c].item())
            total = sums[a, c].item()
            ended[alive[a]].append((total / length ** length_penalty, total, words))
        if length == max_tokens:
            break
        running, chosen = sums.masked_fill(ends, -torch.inf).topk(min(beams, sums.shape[1]))    # (A, W), the best first
        going = []
        for a, best in enumerate((running[:, 0] / length ** length_penalty).tolist()):
            kept = ended[alive[a]] = sorted(ended[alive[a]], reverse=True)[:beams]
            if best > (kept[-1][0] if len(kept) == beams else -torch.inf):
                going.append(a)
        if not going:
            break
        alive = [alive[a] for a in going]
        going = torch.tensor(going, device=ids.device)
        running, chosen = running[going], chosen[going]
        rows = row[going].gather(1, chosen).flatten()
        ids = torch.cat([ids[rows], token[going].gather(1, chosen).view(-1, 1)], dim=1)
        decoder.keep(rows, going)
    best = [max(captions) for captions in ended]
    return [words for _, _, words in best], [total for _, total, _ in best]


# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, visual, prompt, stop, max_tokens=30, beams=1, length_penalty=1.0, no_repeat=0,
             top_p=None, temperature=1.0, seeds=None, cache=True):
    """Writes a caption for each of M images -> captions, M lists of token ids, and M sums of their log-probabilities.

    model: an FLM of objective ar, in eval mode. visual (M, P, D): encode_image's.
    prompt: the ids that all captions begin with, `<bos>` and perhaps words; stop: the ids that end one. Captions hold
    neither. The sums hold the stop token, and no prompt.
    max_tokens: a caption that has not ended after so many tokens is cut there.
    beams: more than 1: beam search, with `length_penalty`; see `beam_search`.
    no_repeat: n-grams of this size come once at most; 0: no such rule. 3 helps a model that babbles; but "a small red
        circle above a small red square" is no babble.
    top_p: draws each word from the likeliest that have this probability together, 1.0 from all. temperature: logits are
        divided by it first. seeds: for each image what numpy's default_rng takes, so that a caption does not depend on
        what else is in the batch. None: the likeliest word.
    cache=False: the same by `uncached_logits`.
    ValueError in one sentence for a model that writes no captions, and for settings that make no sense.
    """
    check(model, visual, prompt, max_tokens, beams, no_repeat, top_p, temperature, seeds)
    ids = torch.tensor(prompt, device=visual.device).expand(len(visual), -1)                    # (M, n)
    stop = torch.tensor(stop, device=visual.device, dtype=torch.int64)
    if not len(visual):
        return [], []
    decoder = (Cached if cache else Uncached)(model, visual)
    if beams > 1:
        return beam_search(decoder, ids, stop, max_tokens, no_repeat, beams, length_penalty)
    if top_p is None:
        return word_by_word(decoder, ids, stop, max_tokens, no_repeat, lambda log_probs, step, alive: log_probs.argmax(-1))
    draws = np.stack([np.random.default_rng(seed).random(max_tokens) for seed in seeds])
    draws = torch.from_numpy(draws).to(visual.device)                                           # (M, max_tokens)
    return word_by_word(decoder, ids, stop, max_tokens, no_repeat, lambda log_probs, step, alive:
                        nucleus_sample(log_probs, draws[alive, step], top_p, temperature))


def check(model, visual, prompt, max_tokens, beams, no_repeat, top_p, temperature, seeds):
    """ValueError where `generate` was asked for what it cannot do."""
    c = model.config
    if not isinstance(model, flm.FLM) or c.objective != "ar" or c.head != "vocab":
        what = f"a {type(model).__name__} of objective {getattr(c, 'objective', 'mlm')} with head {c.head}"
        raise ValueError("captions are written by an FLM of objective ar with head vocab, which train.py --task caption makes "
                         f"of a pretrained FLM; this is {what}")
    if model.training:
        raise ValueError("captions are written in eval mode: call model.eval() first")
    if not prompt or c.pad_id in prompt or not 0 <= min(prompt) <= max(prompt) < c.vocab_size:
        raise ValueError(f"prompt {list(prompt)}: at least one id (`<bos>`) of 0..{c.vocab_size - 1}, no padding, is expected")
    needed = 1 + len(prompt) + max_tokens - 1           # `<s>` before them, and nobody reads the last
    if max_tokens < 1 or needed > c.max_tokens:
        raise ValueError(f"max_tokens {max_tokens} after a prompt of {len(prompt)}: at least 1 and at most "
                         f"{c.max_tokens - len(prompt)} are expected, the model has positions for {c.max_tokens} tokens")
    if beams < 1 or no_repeat < 0:
        raise ValueError(f"beams {beams}, no_repeat {no_repeat}: at least 1 beam and 0 tokens are expected")
    if top_p is not None and (beams > 1 or not 0 < top_p <= 1 or temperature <= 0):
        raise ValueError(f"top_p {top_p}, temperature {temperature}, beams {beams}: sampling needs a top_p of 0 < p <= 1, "
                         "a temperature above 0 and 1 beam")
    if top_p is not None and (seeds is None or len(seeds) != len(visual)):
        raise ValueError(f"sampling needs seeds, one for each of the {len(visual)} images")
