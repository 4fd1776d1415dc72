"""What a pretrained model reads from its pictures: the words it can say only by looking, and ViLT's alignments.

`word_table` asks a language model for every word of a group (colours, shapes, relations) in captions it has never seen,
three times: with the right image, with another caption's image, and with a blank one. Only what the first has beyond the
other two was read from the picture. `alignments` shows to which patches ViLT's optimal transport carries each word.
(Commands: `eval.py words` and `eval.py align`.)
"""

import torch
from tqdm import tqdm

from data import CaptionDataset, evaluation_batches, pad_pictures, pad_texts, token_lengths
from flm import see
from tasks import normalized, places, shape_of

IMAGES = ("right image", "another image", "no image")


def picture_batch(config, pictures, device):
    """Pictures, uint8 (3, h, w) each, as the batch that `flm.see` takes, on the device."""
    batch = places(config, pictures) | {"image": pad_pictures(pictures)}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return batch | {"image": normalized(config, batch["image"])}


@torch.no_grad()
def reconstruct(model, visual, ids):
    """The model's guess for every token of every caption, each from all the context its objective allows.

    flm: row i of the reconstructor, all words at once. mlm: position i masked, one pass per position. ar, prefix: the
    forward stream's next word, so the first word has no guess (it gets `<pad>`).
    visual (B, P, D), ids (B, L) -> (B, L) int64
    """
    c = model.config
    guess = torch.full_like(ids, c.pad_id)
    if c.objective == "flm":
        guess = model.vocab_logits(model.fuse(visual, model.encode_text(ids)).reconstructed).argmax(-1)
    elif c.objective == "mlm":
        for i in range(1, ids.shape[1]):
            masked = ids.clone()
            masked[:, i] = torch.where(ids[:, i] == c.pad_id, c.pad_id, c.mask_id)
            fused = model.fuse(visual, model.encode_text(masked))
            guess[:, i] = model.vocab_logits(fused.reconstructed[:, i]).argmax(-1)
    else:
        fused = model.fuse(visual, model.encode_text(ids))
        guess[:, 2:] = model.vocab_logits(fused.forward[:, 1:-1]).argmax(-1)
    return guess


def words_of(sample, tok):
    """A sample's words with their places: [(word, [token positions])]; `<s>` and `</s>` are none."""
    inner = sample["ids"][1:-1]
    starts = [i for i, start in enumerate(tok.word_starts(inner)) if start] + [len(inner)]
    return [(tok.decode(inner[a:b]).strip().lower(), list(range(a + 1, b + 1))) for a, b in zip(starts, starts[1:])]


def word_table(model, table, groups, device, captions=2000, batch=100, examples=12):
    """Accuracy of the words of each group with each of IMAGES, over at most so many captions, evenly spread.

    groups: {name: [words]}; a word of several tokens is right if all of them are. Returns
    {"accuracy": {group: {image: share}}, "words": {group: count}, "examples": […]}.
    """
    tok, c = model.tokenizer, model.config
    group_of = {word: name for name, words in groups.items() for word in words}
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    count = min(captions, len(dataset))
    numbers = [k * len(dataset) // count for k in range(count)]
    shown_numbers = {numbers[k * count // examples] for k in range(min(examples, count))}
    hits = {name: dict.fromkeys(IMAGES, 0) for name in groups}
    asked, examples_shown = dict.fromkeys(groups, 0), []
    for keys in tqdm(evaluation_batches(token_lengths(table, tok, numbers), numbers, batch), desc="words", unit="batch",
                     leave=False):
        samples = [dataset[key] for key in keys]
        # another picture: of a row half the table away, so not this caption's own
        others = [dataset[0, int(table.row_of.searchsorted((s["row"] + len(table) // 2) % len(table)))] for s in samples]
        ids = pad_texts([s["ids"] for s in samples], tok.pad_id).to(device)
        right, other = (picture_batch(c, [s["image"] for s in some], device) for some in (samples, others))
        shown = dict(zip(IMAGES, (right, other, right | {"image": torch.zeros_like(right["image"])})))
        guesses = {name: reconstruct(model, see(model, pictures), ids).tolist() for name, pictures in shown.items()}
        for b, sample in enumerate(samples):
            for word, positions in words_of(sample, tok):
                group = group_of.get(word)
                if group is None or c.objective in ("ar", "prefix") and positions[0] == 1:
                    continue                                # (the first word has no guess from the left)
                asked[group] += 1
                for name in IMAGES:
                    hits[group][name] += all(guesses[name][b][i] == sample["ids"][i] for i in positions)
            if sample["index"] in shown_numbers:
                (path, row), (other_path, other_row) = table.place(sample["row"]), table.place(others[b]["row"])
                examples_shown.append({"file": path, "row": row, "other_file": other_path, "other_row": other_row,
                                       "tokens": [tok.decode([t]) for t in sample["ids"][1:-1]],
                                       "guesses": {name: [tok.decode([t]) for t in guesses[name][b][1:len(sample["ids"]) - 1]]
                                                   for name in IMAGES}})
    return {"accuracy": {g: {n: hits[g][n] / max(1, asked[g]) for n in IMAGES} for g in groups}, "words": asked,
            "examples": examples_shown}


@torch.no_grad()
def alignments(model, table, numbers, device):
    """ViLT's optimal transport of some captions' words to the patches of their pictures, and of another picture.

    -> [{file, row, tokens, grid [h, w], plan [token][patch] (the share of each patch in the token's mass),
        distance, other_distance}]
    """
    c, tok = model.config, model.tokenizer
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    samples = [dataset[0, i] for i in numbers]
    ids = pad_texts([s["ids"] for s in samples], tok.pad_id).to(device)
    text, found = model.encode_text(ids), []
    for pictures in (samples, samples[1:] + samples[:1]):
        visual = see(model, picture_batch(c, [s["image"] for s in pictures], device))
        found.append(model.align(visual, text, model.fuse(visual, text), ids == c.sep_id))
    (distance, plan), (other, _) = found
    shares = (plan / plan.sum(1, keepdim=True).clamp(min=1e-9)).transpose(1, 2)                     # (B, L, K)
    result = []
    for b, sample in enumerate(samples):
        path, row = table.place(sample["row"])
        h, w = (side // c.patch_size for side in sample["image"].shape[1:])
        n = len(sample["ids"]) - 1
        result.append({"file": path, "row": row, "tokens": [tok.decode([t]) for t in sample["ids"][1:n]], "grid": [h, w],
                       "plan": [[round(share, 4) for share in line] for line in shares[b, 1:n, :h * w].tolist()],
                       "distance": distance[b].item(), "other_distance": other[b].item()})
    return result
