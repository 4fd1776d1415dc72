"""What a pretrained model reads from its pictures: words that it cannot know without looking.

    python -m tools.probe words runs/toy/last.pt --data data/toy
        accuracy of groups of words with the right image, another image and no image
    python -m tools.probe align runs/vilt/last.pt --data data/toy
        the patches to which ViLT's optimal transport carries each word
    python -m tools.probe look runs/toy/last.pt --data data/toy
        the patches that each word looks at, in each layer and rolled out

`words` asks a language model for every word of a group (colours, shapes, relations) in captions it
has never seen, three times: with the right image, with another caption's image, and with a black
one. What it gets right only with the right image, it read from the image.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import vilt
from batches import evaluation_batches
from data import CaptionDataset, Captions, pad_texts, token_lengths
from eval import REQUIRED, add_commands, at_least, one_model
from layers import encode_batch_images
from predict import choose_datasets, device_of, finite, no_split, picture_batch
from released.named import beside
from storage.disk import read_json, write_text
from storage.files import find_files
from storage.tar_index import table_of
from tasks import shape_of
from tools.look import look_at
from training import machine

IMAGES = ("right image", "another image", "no image")


# -------------------------------------------------------------------------------------------------
# words

@torch.no_grad()
def reconstruct(model, visual, ids: Tensor) -> Tensor:
    """The model's guess for every token of every caption, from the context its objective allows.

    flm         row i of the reconstructor, all words at once
    mlm         position i masked, one pass per position
    ar, prefix  the next word of the left-to-right stream; the first word has no guess, but <pad>

    visual of B images, ids (B, L) -> (B, L) int64. ValueError if the model's scores are not finite.
    """
    c = model.config

    def best(x):
        return finite(model.vocab_logits(x)).argmax(-1)

    if c.objective == "flm":
        return best(model.fuse(visual, model.encode_text(ids)).reconstructed)
    guess = torch.full_like(ids, c.pad_id)
    if c.objective == "mlm":
        for i in range(1, ids.shape[1]):
            masked = ids.clone()
            masked[:, i] = torch.where(ids[:, i] == c.pad_id, c.pad_id, c.mask_id)
            fused = model.fuse(visual, model.encode_text(masked))
            guess[:, i] = best(fused.reconstructed[:, i])
    else:
        fused = model.fuse(visual, model.encode_text(ids))
        guess[:, 2:] = best(fused.left_to_right[:, 1:-1])
    return guess


def words_of(ids: list[int], tok) -> list[tuple[str, list[int]]]:
    """A caption's words and their token positions; `<s>` and `</s>` are no words."""
    inner = ids[1:-1]
    starts = [i for i, is_start in enumerate(tok.word_starts(inner)) if is_start]
    words = []
    for start, end in zip(starts, [*starts[1:], len(inner)], strict=True):
        word = tok.decode(inner[start:end]).strip().lower()
        words.append((word, list(range(start + 1, end + 1))))
    return words


def word_table(model, table: Captions, groups: dict[str, list[str]], captions: int = 2000,
               batch: int = 100, examples: int = 12) -> dict:
    """Accuracy of the words of each group with each of IMAGES.

    groups: {name: [words]}; a word of several tokens is right if all of them are.
    captions: at most this many are asked, evenly spread over the table; batch: at once.
    -> {"accuracy": {group: {image: share}}, "words": {group: count}, "examples": [...]}, the last
    as `tools.plot words` takes them
    """
    c, tok = model.config, model.tokenizer
    group_of = {word: name for name, words in groups.items() for word in words}
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    numbers = spread(len(dataset), captions)
    shown = {numbers[k] for k in spread(len(numbers), examples)}
    hits = {name: dict.fromkeys(IMAGES, 0) for name in groups}
    asked, found = dict.fromkeys(groups, 0), []
    # Models that read from the left have no guess for the first word.
    first = 2 if c.objective in ("ar", "prefix") else 1

    def texts(ids):
        return [tok.decode([token]) for token in ids]

    batches = evaluation_batches(token_lengths(table, tok, numbers), numbers, batch)
    for keys in tqdm(batches, desc="words", unit="batch", leave=False):
        samples = [dataset[key] for key in keys]
        # The other image is that of the row half the table away.
        other_rows = [(sample["row"] + len(table) // 2) % len(table) for sample in samples]
        others = [dataset[0, table.first_of(row)] for row in other_rows]
        guesses = guesses_of(model, samples, others)
        for b, sample in enumerate(samples):
            ids = sample["ids"]
            for word, positions in words_of(ids, tok):
                group = group_of.get(word)
                if group is None or positions[0] < first:
                    continue
                asked[group] += 1
                for name in IMAGES:
                    hits[group][name] += all(guesses[name][b][i] == ids[i] for i in positions)
            if sample["index"] in shown:
                file, row = table.place(sample["row"])
                other_file, other_row = table.place(other_rows[b])
                found.append({
                    "file": file, "row": row, "other_file": other_file, "other_row": other_row,
                    "tokens": texts(ids[1:-1]),
                    "guesses": {name: texts(guesses[name][b][1:len(ids) - 1]) for name in IMAGES}})
    accuracy = {group: {name: hits[group][name] / max(1, asked[group]) for name in IMAGES}
                for group in groups}
    return {"accuracy": accuracy, "words": asked, "examples": found}


def spread(count: int, some: int) -> list[int]:
    """At most `some` of range(count), evenly spread."""
    some = min(count, some)
    return [k * count // some for k in range(some)]


def guesses_of(model, samples: list[dict], others: list[dict]) -> dict[str, list]:
    """{image: guesses of all samples, lists of token ids}, for each of IMAGES."""
    c, device = model.config, device_of(model)
    ids = pad_texts([sample["ids"] for sample in samples], c.pad_id).to(device)         # (B, L)
    right = picture_batch(c, [sample["image"] for sample in samples], device)
    other = picture_batch(c, [sample["image"] for sample in others], device)
    black = right | {"image": torch.zeros_like(right["image"])}
    guesses = {}
    for name, pictures in zip(IMAGES, (right, other, black), strict=True):
        guesses[name] = reconstruct(model, encode_batch_images(model, pictures), ids).tolist()
    return guesses


def words(args):
    path = Path(args.groups or Path(args.data) / "toy_words.json")
    groups, results = read_json(path), {}
    if not isinstance(groups, dict) or not all(isinstance(some, list) for some in groups.values()):
        raise ValueError(f"{path}: a JSON file {{group: [words]}} is expected")
    with one_model(args, "pretrain") as model:
        for split, table in tables(args, model, args.splits or ["test", "holdout"]).items():
            found = word_table(model, table, groups, args.captions)
            results[split] = found
            print(f"\n{split:<12}" + "".join(f"{name:>15}" for name in IMAGES) + f"{'words':>9}")
            for group, accuracy in found["accuracy"].items():
                shares = "".join(f"{100 * accuracy[name]:>13.1f} %" for name in IMAGES)
                print(f"{group:<12}{shares}{found['words'][group]:>9}")
    write(args, "words.json", results)


# -------------------------------------------------------------------------------------------------
# align

@torch.no_grad()
def alignments(model, table: Captions, captions: int) -> list[dict]:
    """ViLT's optimal transport of some captions' words to the patches of their pictures.

    Beside each caption's own picture stands the distance to the next caption's picture.
    captions: at most this many, evenly spread over the table.
    -> [{file, row, tokens, grid [h, w], plan [token][patch] (the share of each patch in the token's
        mass), distance, other_distance}]
    """
    c, tok, device = model.config, model.tokenizer, device_of(model)
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    samples = [dataset[0, number] for number in spread(len(dataset), captions)]
    ids = pad_texts([sample["ids"] for sample in samples], tok.pad_id).to(device)
    text, found = model.encode_text(ids), []
    for shown in (samples, samples[1:] + samples[:1]):
        pictures = picture_batch(c, [sample["image"] for sample in shown], device)
        visual = encode_batch_images(model, pictures)
        found.append(model.align(visual, text, model.fuse(visual, text), ids == c.sep_id))
    (distance, plan), (other_distance, _) = found           # (B,), (B, K, L)
    finite(distance)
    shares = plan / plan.sum(1, keepdim=True).clamp(min=1e-9)
    result = []
    for b, sample in enumerate(samples):
        file, row = table.place(sample["row"])
        h, w = (side // c.patch_size for side in sample["image"].shape[1:])
        end = len(sample["ids"]) - 1                        # the position of [SEP]
        of_tokens = shares[b, :h * w, 1:end].T              # (tokens, patches)
        result.append({
            "file": file, "row": row, "grid": [h, w],
            "tokens": [tok.decode([token]) for token in sample["ids"][1:end]],
            "plan": [[round(share, 4) for share in line] for line in of_tokens.tolist()],
            "distance": distance[b].item(), "other_distance": other_distance[b].item()})
    return result


def align(args):
    with one_model(args) as model:
        if not isinstance(model, vilt.ViLT):
            raise ValueError(f"{args.checkpoint}: word-patch alignment is ViLT's; this is no ViLT")
        table = tables(args, model, [args.split])[args.split]
        found = alignments(model, table, args.captions)
    own = np.array([a["distance"] for a in found])
    other = np.array([a["other_distance"] for a in found])
    print(f"{len(found)} captions: their words are {own.mean():.3f} from the patches of their own "
          f"picture, {other.mean():.3f} from another's; nearer to their own: {(own < other).sum()}")
    write(args, "align.json", found)


# -------------------------------------------------------------------------------------------------
# look

def looks(model, table: Captions, captions: int) -> list[dict]:
    """What the words of some captions look at in their own pictures, by tools.look.

    captions: at most this many, evenly spread over the table.
    -> [{file, row, tokens, grid [h, w], maps {name: [token][patch] (shares)}}]
    """
    c, tok, result = model.config, model.tokenizer, []
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    for number in tqdm(spread(len(dataset), captions), "looks", unit=" captions", leave=False):
        sample = dataset[0, number]
        found = look_at(model, sample["image"], torch.tensor([sample["ids"]],
                                                             device=device_of(model)))
        maps = {}
        for name, map_of in found.named_maps().items():     # (n, h, w)
            of_tokens = map_of[1:-1].flatten(1)                                 # (tokens, patches)
            maps[name] = [[round(share, 4) for share in line] for line in of_tokens.tolist()]
        file, row = table.place(sample["row"])
        result.append({"file": file, "row": row, "grid": list(map_of.shape[1:]),
                       "tokens": found.tokens[1:-1], "maps": maps})
    return result


def look(args):
    with one_model(args) as model:
        found = looks(model, tables(args, model, [args.split])[args.split], args.captions)
    print(f"{len(found)} captions: {', '.join(found[0]['maps'])}")
    write(args, "look.json", found)


# -------------------------------------------------------------------------------------------------

def tables(args, model, splits: list[str]) -> dict[str, Captions]:
    """The captions of these splits; one that is not there is left out, but not all of them."""
    datasets = choose_datasets(model, args.data, args.datasets, "caption")
    paths = {split: find_files(args.data, datasets, split) for split in splits}
    if not any(paths.values()):
        raise no_split(args.data, datasets, " or ".join(splits), "caption")
    return {split: table_of(some) for split, some in paths.items() if some}


def write(args, name: str, contents):
    """Writes JSON to --out, or under this name beside the checkpoint."""
    path = Path(args.out or beside(args.checkpoint, name))
    write_text(path, json.dumps(contents) + "\n")
    print(f"wrote {path}")


DATA_FLAGS = [
    ("--data DIR", REQUIRED, "folder of Arrow files"),
    ("--datasets NAME…", None, "datasets in it; default: those that the model was trained on"),
]
COMMANDS = {
    words: ("accuracy of groups of words with the right, another and no image", [
        *DATA_FLAGS,
        ("--splits NAME…", None, "parts of the data; default: test holdout"),
        ("--groups FILE", None, "JSON {group: [words]}; default: toy_words.json of --data"),
        ("--captions N", 2000, "at most this many captions are asked, evenly spread"),
        ("--out FILE", None, "results, JSON; default: words.json beside the checkpoint")]),
    align: ("which patches ViLT's optimal transport carries each word to", [
        *DATA_FLAGS,
        ("--split NAME", "test", "part of the data"),
        ("--captions N", 100, "at most this many captions are shown, evenly spread"),
        ("--out FILE", None, "results, JSON; default: align.json beside the checkpoint")]),
    look: ("which patches each word looks at, in each layer and rolled out", [
        *DATA_FLAGS,
        ("--split NAME", "test", "part of the data"),
        ("--captions N", 300, "at most this many captions are read, evenly spread"),
        ("--out FILE", None, "results, JSON; default: look.json beside the checkpoint")]),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tools.probe",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser, COMMANDS)
    with machine.running("probe.py"):
        args = parser.parse_args(argv)
        at_least(1, "--captions", args.captions)
        args.run(args)


if __name__ == "__main__":
    main()
