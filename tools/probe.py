"""What a pretrained model reads from its pictures: the words it can say only by looking, and ViLT's alignments.

`word_table` asks a language model for every word of a group (colours, shapes, relations) in captions it has never seen,
three times: with the right image, with another caption's image, and with a blank one. Only what the first has beyond the
other two was read from the picture. `alignments` shows to which patches ViLT's optimal transport carries each word.
(Commands: `eval.py words` and `eval.py align`.)
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import vilt
from data import CaptionDataset, Captions, evaluation_batches, find_files, pad_texts, token_lengths
from eval import choose_datasets, no_split, open_model
from layers import encode_batch_images
from predict import picture_batch
from tasks import shape_of

IMAGES = ("right image", "another image", "no image")


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
        guess[:, 2:] = model.vocab_logits(fused.left_to_right[:, 1:-1]).argmax(-1)
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
        guesses = {name: reconstruct(model, encode_batch_images(model, pictures), ids).tolist() for name, pictures in shown.items()}
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
        visual = encode_batch_images(model, picture_batch(c, [s["image"] for s in pictures], device))
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


# ---------------------------------------------------------------------------------------------------------------------
# What a pretrained model reads from its pictures.

def words(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(args, "pretrain").to(device)
    groups_path = Path(args.groups or Path(args.data) / "toy_words.json")
    if not groups_path.is_file():
        raise FileNotFoundError(f"{groups_path}: a JSON file {{group: [words]}} is expected here (--groups names another)")
    groups = data.read_json(groups_path)
    if not isinstance(groups, dict) or not all(isinstance(some, list) for some in groups.values()):
        raise ValueError(f"{groups_path}: a JSON file {{group: [words]}} is expected")
    datasets = choose_datasets(args, model, "caption")
    results = {}
    for split in args.splits:
        files = find_files(args.data, datasets, split)
        if files:
            results[split] = word_table(model, Captions(files), groups, device, args.captions)
            print_table(split, results[split])
    if not results:
        raise no_split(args.data, datasets, " or ".join(args.splits))
    out = Path(args.out or Path(args.checkpoint).with_name("words.json"))
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")


def align(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(args).to(device)
    if not isinstance(model, vilt.ViLT):
        raise ValueError(f"{args.checkpoint}: word-patch alignment is ViLT's; this is another model")
    datasets = choose_datasets(args, model, "caption")
    files = find_files(args.data, datasets, args.split)
    if not files:
        raise no_split(args.data, datasets, args.split)
    table = Captions(files)
    count = min(args.captions, len(table.row_of))
    found = alignments(model, table, [k * len(table.row_of) // count for k in range(count)], device)
    nearer = sum(a["distance"] < a["other_distance"] for a in found)
    print(f"{count} captions: their words are {sum(a['distance'] for a in found) / count:.3f} from the patches of their own "
          f"picture, {sum(a['other_distance'] for a in found) / count:.3f} from another's; nearer to their own: "
          f"{nearer} of {count}")
    out = Path(args.out or Path(args.checkpoint).with_name("align.json"))
    out.write_text(json.dumps(found) + "\n")
    print(f"wrote {out}")


def print_table(split, result):
    print(f"\n{split:<12}" + "".join(f"{name:>15}" for name in IMAGES) + f"{'words':>9}")
    for group, row in result["accuracy"].items():
        print(f"{group:<12}" + "".join(f"{100 * row[name]:>13.1f} %" for name in IMAGES) + f"{result['words'][group]:>9}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, says in ((words, "accuracy of groups of words with the right, another and no image"),
                           (align, "which patches ViLT's optimal transport carries each word to")):
        p = commands.add_parser(function.__name__, help=says, description=says)
        p.add_argument("checkpoint")
        p.add_argument("--tokenizer", help="directory of vocab.json and merges.txt, or vocab.txt; for files that carry none")
        p.set_defaults(run=function)
        p.add_argument("--data", required=True, help="directory of Arrow files")
        p.add_argument("--datasets", nargs="*", default=(), help="names of datasets in it; default: what was trained on")
        p.add_argument("--out", help=f"default: {function.__name__}.json beside the checkpoint")
        p.add_argument("--captions", type=int, default=2000 if function is words else 100, help="at most so many, evenly spread")
        if function is words:
            p.add_argument("--splits", nargs="+", default=["test", "holdout"])
            p.add_argument("--groups", help="JSON file {group: [words]}; default DATA/toy_words.json")
        else:
            p.add_argument("--split", default="test")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"probe.py: {error}")


if __name__ == "__main__":
    main()
