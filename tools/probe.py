"""What a pretrained model reads from its pictures: words that it cannot know without looking.

    python -m tools.probe words runs/toy/last.pt --data data/toy
        accuracy of groups of words with the right image, another image and no image
    python -m tools.probe align runs/vilt/last.pt --data data/toy
        the patches to which ViLT's optimal transport carries each word

`words` asks a language model for every word of a group (colours, shapes, relations) in captions it
has never seen, three times: with the right image, with another caption's image, and with a black
one. What it gets right only with the right image, it read from the image.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import files
import machine
import vilt
from data import CaptionDataset, Captions, evaluation_batches, pad_texts, token_lengths
from eval import REQUIRED, add_commands
from files import find_files
from layers import encode_batch_images
from predict import choose_datasets, finite, no_split, open_model, picture_batch
from tasks import shape_of

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


def word_table(model, table: Captions, groups: dict[str, list[str]], device: torch.device,
               captions: int = 2000, batch: int = 100, examples: int = 12) -> dict:
    """Accuracy of the words of each group with each of IMAGES.

    groups: {name: [words]}; a word of several tokens is right if all of them are.
    captions: at most this many are asked, evenly spread over the table; batch: at once.
    -> {"accuracy": {group: {image: share}}, "words": {group: count}, "examples": [...]}
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

    batches = evaluation_batches(token_lengths(table, tok, numbers), numbers, batch)
    for keys in tqdm(batches, desc="words", unit="batch", leave=False):
        samples = [dataset[key] for key in keys]
        others = [another(dataset, sample) for sample in samples]
        guesses = guesses_of(model, samples, others, device)
        for b, (sample, other) in enumerate(zip(samples, others, strict=True)):
            ids = sample["ids"]
            for word, positions in words_of(ids, tok):
                group = group_of.get(word)
                if group is None or positions[0] < first:
                    continue
                asked[group] += 1
                for name in IMAGES:
                    hits[group][name] += all(guesses[name][b][i] == ids[i] for i in positions)
            if sample["index"] in shown:
                guessed = {name: guesses[name][b][1:len(ids) - 1] for name in IMAGES}
                found.append(word_example(table, tok, sample, other, guessed))
    accuracy = {group: {name: hits[group][name] / max(1, asked[group]) for name in IMAGES}
                for group in groups}
    return {"accuracy": accuracy, "words": asked, "examples": found}


def spread(count: int, some: int) -> list[int]:
    """At most `some` of range(count), evenly spread."""
    some = min(count, some)
    return [k * count // some for k in range(some)]


def another(dataset: CaptionDataset, sample: dict) -> dict:
    """A sample with another picture: that of the row half the table away."""
    table = dataset.table
    row = (sample["row"] + len(table) // 2) % len(table)
    return dataset[0, int(table.row_of.searchsorted(row))]


def guesses_of(model, samples: list[dict], others: list[dict], device) -> dict[str, list]:
    """{image: guesses of all samples, lists of token ids}, for each of IMAGES."""
    c = model.config
    ids = pad_texts([sample["ids"] for sample in samples], c.pad_id).to(device)
    right = picture_batch(c, [sample["image"] for sample in samples], device)
    other = picture_batch(c, [sample["image"] for sample in others], device)
    black = right | {"image": torch.zeros_like(right["image"])}
    guesses = {}
    for name, pictures in zip(IMAGES, (right, other, black), strict=True):
        guesses[name] = reconstruct(model, encode_batch_images(model, pictures), ids).tolist()
    return guesses


def word_example(table: Captions, tok, sample: dict, other: dict, guessed: dict) -> dict:
    """A caption for `tools.plot words`: its pictures, its tokens and what was guessed for them."""
    (file, row), (other_file, other_row) = table.place(sample["row"]), table.place(other["row"])

    def texts(ids):
        return [tok.decode([token]) for token in ids]
    return {"file": file, "row": row, "other_file": other_file, "other_row": other_row,
            "tokens": texts(sample["ids"][1:-1]),
            "guesses": {name: texts(ids) for name, ids in guessed.items()}}


def words(args):
    place = machine.set_up(args.device, args.precision)
    model = open_model(args.checkpoint, "pretrain", args.tokenizer).to(place.device)
    groups = read_groups(Path(args.groups or Path(args.data) / "toy_words.json"))
    datasets = choose_datasets(model, args.data, args.datasets, "caption")
    results = {}
    for split in args.splits or ("test", "holdout"):
        files = find_files(args.data, datasets, split)
        if not files:
            continue
        with place.autocast():
            found = word_table(model, Captions(files), groups, place.device, args.captions)
        results[split] = found
        print(f"\n{split:<12}" + "".join(f"{name:>15}" for name in IMAGES) + f"{'words':>9}")
        for group, accuracy in found["accuracy"].items():
            shares = "".join(f"{100 * accuracy[name]:>13.1f} %" for name in IMAGES)
            print(f"{group:<12}{shares}{found['words'][group]:>9}")
    if not results:
        wanted = " or ".join(args.splits or ("test", "holdout"))
        raise no_split(args.data, datasets, wanted, "caption")
    write(args, "words.json", results)


def read_groups(path: Path) -> dict[str, list[str]]:
    """{group: [words]} of a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: a JSON file {{group: [words]}} is expected here "
                                "(--groups names another)")
    groups = files.read_json(path)
    if isinstance(groups, dict) and all(isinstance(some, list) for some in groups.values()):
        return groups
    raise ValueError(f"{path}: a JSON file {{group: [words]}} is expected")


# -------------------------------------------------------------------------------------------------
# align

@torch.no_grad()
def alignments(model, table: Captions, numbers: list[int], device: torch.device) -> list[dict]:
    """ViLT's optimal transport of some captions' words to the patches of their pictures.

    Beside each caption's own picture stands the distance to the next caption's picture.
    numbers: which of the table's captions.
    -> [{file, row, tokens, grid [h, w], plan [token][patch] (the share of each patch in the token's
        mass), distance, other_distance}]
    """
    c, tok = model.config, model.tokenizer
    dataset = CaptionDataset(table, tok, shape_of(c), c.max_tokens, train=False)
    samples = [dataset[0, number] for number in numbers]
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
    place = machine.set_up(args.device, args.precision)
    model = open_model(args.checkpoint, None, args.tokenizer).to(place.device)
    if not isinstance(model, vilt.ViLT):
        raise ValueError(f"{args.checkpoint}: word-patch alignment is ViLT's; this is no ViLT")
    datasets = choose_datasets(model, args.data, args.datasets, "caption")
    files = find_files(args.data, datasets, args.split)
    if not files:
        raise no_split(args.data, datasets, args.split, "caption")
    table = Captions(files)
    numbers = spread(len(table.row_of), args.captions)
    with place.autocast():
        found = alignments(model, table, numbers, place.device)
    own = sum(a["distance"] for a in found) / len(found)
    other = sum(a["other_distance"] for a in found) / len(found)
    nearer = sum(a["distance"] < a["other_distance"] for a in found)
    print(f"{len(found)} captions: their words are {own:.3f} from the patches of their own "
          f"picture, {other:.3f} from another's; nearer to their own: {nearer} of {len(found)}")
    write(args, "align.json", found)


# -------------------------------------------------------------------------------------------------

def write(args, name: str, contents):
    """Writes JSON to --out, or under this name beside the checkpoint."""
    path = Path(args.out or Path(args.checkpoint).with_name(name))
    path.write_text(json.dumps(contents) + "\n")
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
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tools.probe",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser, COMMANDS)
    args = parser.parse_args(argv)
    try:
        if args.captions < 1:
            raise ValueError(f"--captions {args.captions}: at least 1 is expected")
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"probe.py: {error}")
    finally:
        machine.tear_down()


if __name__ == "__main__":
    main()
