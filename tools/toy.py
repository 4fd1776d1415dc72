"""A drawn world: coloured shapes with captions, questions and statements, as Arrow files.

    python -m tools.toy make --out data/toy                   # 20,000 training pictures, 64 x 64
    python -m tools.toy make --out data/toy --images 2000     # the first 2,000 of the same pictures
    python -m tools.toy true runs/toy-caption/caption/captions_test_results.json --data data/toy
    python -m tools.toy pointed runs/vilt/align.json --data data/toy
    python -m tools.toy pointed runs/toy/look.json --data data/toy

`make` writes

    toy_caption_{train,val,test,holdout}.arrow   pictures, five captions each
    toy_vqa_{train,val,test,holdout}.arrow       the same pictures, up to thirteen questions each
    toy_nlvr2_{train,dev,test,holdout}.arrow     pairs of other pictures, half as many
    toy_scenes.jsonl                             what is in each picture
    toy_vqa_answers.json                         the answer that each label stands for
    toy_words.json                               groups of words, for `python -m tools.probe words`

Everything is a function of (seed, split, index), so a smaller world is the beginning of a larger
one. Because each scene is known, `true` can tell whether a caption is true of it, and `pointed`
whether a word's patch shows what it names. Scenes and truth are in toy_world.py, sentences in
toy_sentences.py.
"""

import argparse
import functools
import io
import json
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import Captions
from sources.shards import Writer
from storage import disk
from storage.disk import complete_file, read_json
from storage.files import CAPTIONS, NLVR2, VQA
from tools.toy_sentences import ANSWERS, captions, questions, statement
from tools.toy_world import (COLOURS, KINDS, PLURAL, RELATIONS, SINGULAR, Scene, Shape, draw,
                             is_true, sample_scene)

SPLITS = ("train", "val", "test", "holdout")
NLVR2_SPLITS = dict(zip(SPLITS, ("train", "dev", "test", "holdout"), strict=True))
SCENES = "toy_scenes.jsonl"
# Colours and kinds are not among them: a pair that no caption shows, such as a red star, would be
# learned as always wrong.
EXCHANGE = {"across": ["left", "right"], "along": ["above", "below"], "edges": ["top", "bottom"],
            "sizes": ["small", "big"], "numbers": ["two", "three", "four", "five"]}


# --------------------------------------------------------------------------------------------------
# Rows of the files.

def encode(image: Image.Image) -> bytes:
    """JPEG bytes without colour subsampling, which would blur the small shapes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def picture_rows(seed: int, size: int, split: str, index: int) -> tuple[dict, dict, str]:
    """Picture `index` of a split: its row of the captions, its row of VQA, its line of SCENES."""
    rng = random.Random(f"{seed} {split} {index}")     # a hash of the text, alike on every machine
    scene = sample_scene(rng, split == "holdout")
    image = encode(draw(scene, size, rng))
    image_id = SPLITS.index(split) * 10 ** 8 + index
    caption_row = {"image": image, "caption": captions(scene, rng), "image_id": str(image_id),
                   "split": split}
    asked = questions(scene, rng, training=split == "train")
    vqa_row = {"image": image, "image_id": image_id, "split": split,
               "questions": [question for question, _ in asked],
               "answers": [[answer] for _, answer in asked],
               "answer_labels": [[ANSWERS.index(answer)] for _, answer in asked],
               "answer_scores": [[1.0]] * len(asked),
               "question_id": [image_id * 100 + k for k in range(len(asked))]}
    line = {"split": split, "image_id": image_id, "shapes": [astuple(s) for s in scene.shapes]}
    return caption_row, vqa_row, json.dumps(line) + "\n"


def partner(scene: Scene, rng: random.Random, held_out: bool) -> Scene:
    """A second scene that mostly has some shapes of the first.

    By chance alone they would have little in common, so there would be little to say of both.
    """
    number = min(len(scene.shapes), rng.choice((0, 1, 1, 2)))
    return sample_scene(rng, held_out, rng.sample(scene.pairs, number))


def pair_row(seed: int, size: int, split: str, index: int) -> tuple[dict, list[Scene]]:
    """Pair `index` of a split: its row of NLVR2, and the two scenes."""
    rng = random.Random(f"{seed} nlvr2 {split} {index}")
    held_out = split == "holdout"
    while True:
        scene = sample_scene(rng, held_out)
        scenes = [scene, partner(scene, rng, held_out)]
        rng.shuffle(scenes)
        said = statement(*scenes, rng)
        if said is None:
            continue
        # Half of the sentences move to scenes of which the opposite holds. So each single sentence
        # is as often true as false, and who reads only the words cannot beat chance.
        keep = rng.random() < 0.5
        truth = said.holds(*scenes) is keep
        # "nine stars together": very rarely no such scenes are found. Then start again.
        for _ in range(500):
            if said.holds(*scenes) is truth:
                left, right = (encode(draw(scene, size, rng)) for scene in scenes)
                pair = f"toy_{NLVR2_SPLITS[split]}-{index}-0"
                return {"image_0": left, "image_1": right, "questions": [str(said)],
                        "answers": [str(truth)], "identifier": pair,
                        "identifiers": [f"{pair}-1"]}, scenes
            side = rng.randrange(2)
            scenes[side] = partner(scenes[1 - side], rng, held_out)


# --------------------------------------------------------------------------------------------------
# Files.

def make(out: str | Path, images: int = 20000, eval_images: int = 1000, size: int = 64,
         seed: int = 0, workers: int | None = None):
    """Writes the files of the world into a folder. Any number of `workers` writes the same bytes.

    size: side of a picture in pixels. ValueError for a number that is too small.
    """
    out = Path(out)
    # Below 32 pixels the small shapes cannot be told apart.
    for flag, number, least in (("--images", images, 1), ("--eval-images", eval_images, 1),
                                ("--size", size, 32)):
        if number < least:
            raise ValueError(f"{flag} {number}: at least {least} is expected")
    rows = {split: images if split == "train" else eval_images for split in SPLITS}
    pairs = {split: max(1, number // 2) for split, number in rows.items()}
    total = sum(rows.values()) + sum(pairs.values())
    with multiprocessing.Pool(workers) as pool, tqdm(total=total, unit=" rows") as bar:
        def drawn(make_row, split, number):
            row_of = functools.partial(make_row, seed, size, split)
            for row in pool.imap(row_of, range(number), chunksize=100):
                yield row
                bar.update()

        with complete_file(out / SCENES) as partial_path, open(partial_path, "w") as scenes:
            for split in SPLITS:
                with Writer(out / f"toy_caption_{split}.arrow", CAPTIONS) as captioned, \
                        Writer(out / f"toy_vqa_{split}.arrow", VQA) as asked:
                    for caption_row, vqa_row, line in drawn(picture_rows, split, rows[split]):
                        captioned.write(caption_row)
                        asked.write(vqa_row)
                        scenes.write(line)
        for split in SPLITS:
            with Writer(out / f"toy_nlvr2_{NLVR2_SPLITS[split]}.arrow", NLVR2) as stated:
                for row, _ in drawn(pair_row, split, pairs[split]):
                    stated.write(row)
    words = {"colours": list(COLOURS), "shapes": [*KINDS, *(PLURAL[kind] for kind in KINDS)],
             "relations": list(RELATIONS)}
    disk.write_text(out / "toy_exchange.json", json.dumps(EXCHANGE, indent=1) + "\n")
    disk.write_text(out / "toy_words.json", json.dumps(words, indent=1) + "\n")
    disk.write_text(out / "toy_vqa_answers.json", json.dumps(ANSWERS, indent=1) + "\n")


def load_scenes(path: str | Path) -> dict[str, Scene]:
    """toy_scenes.jsonl -> {image_id as a string, as in the caption files: Scene}."""
    scenes = {}
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            scenes[str(row["image_id"])] = Scene(tuple(Shape(*shape) for shape in row["shapes"]))
    return scenes


# --------------------------------------------------------------------------------------------------
# Captions that a model wrote.

def judge(results: str | Path, data: str | Path) -> dict:
    """How many captions of a results file are true of their scenes, by `is_true`.

    results: JSON, [{"image_id": str or int, "caption": str}], as `eval.py caption` writes it.
    data: the folder of the toy world.
    Returns {"captions", "true", "false", "unknown": counts, "share": true / captions}. Unknown are
    captions that the world's grammar does not produce.
    """
    rows, scenes = read_json(results), load_scenes(Path(data) / SCENES)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{results}: not a list of captions, as `eval.py caption` writes it")
    counts = {True: 0, False: 0, None: 0}
    for number, row in enumerate(rows):
        match row:
            case {"image_id": image_id, "caption": str(text)} if str(image_id) in scenes:
                counts[is_true(text, scenes[str(image_id)])] += 1
            case _:
                raise ValueError(f"{results} entry {number}: the image_id of a picture in "
                                 f"{data}/{SCENES} and its caption are expected")
    return {"captions": len(rows), "true": counts[True], "false": counts[False],
            "unknown": counts[None], "share": counts[True] / len(rows)}


def print_truth(results: str, data: str, out: str | None):
    """The command `true`."""
    found = judge(results, data)
    print(f"{results}: {found['true']:,} of {found['captions']:,} captions are true of their scene "
          f"({100 * found['share']:.1f} %); {found['false']:,} are false, {found['unknown']:,} are "
          "sentences that the world's grammar does not know")
    if out:
        disk.write_text(out, json.dumps(found) + "\n")
        print(f"wrote {out}")


# --------------------------------------------------------------------------------------------------
# Words and the patches that they are carried to, or look at.

def pointing(maps: str | Path, data: str | Path) -> dict[str, dict]:
    """How often the heaviest patch of a colour's or a kind's name holds a shape that it names.

    A shape is in the patch of its centre; a word of several tokens has the mean of their shares.
    maps: JSON, as `python -m tools.probe align` or `look` writes it about the toy world.
    Returns {map: {"colours" and "kinds": {"words", "right": share, "chance": share of the patches
    that would have been right}}}, without a group that no word is of. The map of `align` is called
    "transport".
    """
    scenes, tables, found = load_scenes(Path(data) / SCENES), {}, {}
    for entry in read_json(maps):
        path = Path(data) / Path(entry["file"]).name
        if path not in tables:
            tables[path] = Captions([path])
        scene = scenes.get(tables[path].cell("image_id", entry["row"]).as_py())
        if scene is None:
            raise ValueError(f"{maps}: the pictures of {path.name} are not those of "
                             f"{data}/{SCENES}")
        maps_of_entry = entry["maps"] if "maps" in entry else {"transport": entry["plan"]}
        for name, of_tokens in maps_of_entry.items():
            for word, shares in words_and_shares(entry["tokens"], of_tokens):
                group = "colours" if word in COLOURS else "kinds"
                kind = SINGULAR.get(word, word)
                named = {patch_of(shape, entry["grid"]) for shape in scene.shapes
                         if word == shape.colour or kind == shape.kind}
                if named:
                    heaviest = max(range(len(shares)), key=shares.__getitem__)
                    answer = (heaviest in named, len(named) / len(shares))
                    found.setdefault(name, {}).setdefault(group, []).append(answer)
    return {name: {group: share_right(answers) for group, answers in groups.items()}
            for name, groups in found.items()}


def share_right(answers: list[tuple[bool, float]]) -> dict:
    """Answers and the chance of each to be right -> their number and means."""
    right, chance = (sum(column) / len(answers) for column in zip(*answers, strict=True))
    return {"words": len(answers), "right": right, "chance": chance}


def words_and_shares(tokens: list[str],
                     of_tokens: list[list[float]]) -> Iterator[tuple[str, list[float]]]:
    """The words of a caption, each with the mean share that its tokens have of every patch."""
    words = []
    for token, shares in zip(tokens, of_tokens, strict=True):
        if token.startswith(" ") or not words:
            words.append((token.strip(), [shares]))
        else:
            before, parts = words.pop()
            words.append((before + token, [*parts, shares]))
    for word, parts in words:
        yield word, [sum(column) / len(parts) for column in zip(*parts, strict=True)]


def patch_of(shape: Shape, grid: list[int]) -> int:
    """The number of the patch in which a shape's centre is, of a grid of [rows, columns]."""
    rows, columns = grid
    return int(shape.y * rows / 64) * columns + int(shape.x * columns / 64)


def print_pointing(maps: str, data: str):
    """The command `pointed`."""
    print("share of the words whose heaviest patch holds a shape that they name")
    for name, groups in pointing(maps, data).items():
        shares = [f"{group} {100 * found['right']:5.1f} % of {found['words']:,} "
                  f"(chance {100 * found['chance']:.1f} %)" for group, found in groups.items()]
        print(f"{name:<26}{'   '.join(shares)}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m tools.toy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, usage, says):
        p = commands.add_parser(name, help=says, description=says, usage=f"%(prog)s {usage}")
        p.set_defaults(run=run)
        return p.add_argument

    add = command("make", make, "--out DIR [flags]", "draw the world and write its files")
    add("--out", required=True, metavar="DIR", help="folder to write into")
    add("--images", type=int, default=20000,
        help="number of training pictures, twice that of NLVR2 training pairs (default 20000)")
    add("--eval-images", type=int, default=1000,
        help="number of pictures in each of val, test and holdout (default 1000)")
    add("--size", type=int, default=64, help="side of a picture, in pixels (default 64)")
    add("--seed", type=int, default=0, help="another seed, another world (default 0)")
    add("--workers", type=int,
        help="number of processes that draw (default: one for each CPU core)")
    add = command("true", print_truth, "RESULTS_JSON --data DIR [--out FILE]",
                  "tell what share of a model's captions are true of their scenes")
    add("results", metavar="RESULTS_JSON", help="what `eval.py caption` wrote about the toy world")
    add("--data", required=True, metavar="DIR", help=f"folder of the toy world, with {SCENES}")
    add("--out", metavar="FILE", help="JSON file for the counts (default: only print)")
    add = command("pointed", print_pointing, "JSON --data DIR",
                  "tell how often a word looks at, or is carried to, a shape that it names")
    add("maps", metavar="JSON", help="what `python -m tools.probe align` or `look` wrote")
    add("--data", required=True, metavar="DIR", help=f"folder of the toy world, with {SCENES}")
    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    with disk.command("toy.py"):
        run(**options)


if __name__ == "__main__":
    main()
