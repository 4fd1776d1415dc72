"""The toy world: its sentences are true, words alone tell nothing, data.py reads its files.

Truth is computed again here from the shapes, without the grammar of toy_world.py.
"""

import collections
import doctest
import hashlib
import io
import itertools
import json
import math
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from storage.files import CAPTIONS, NLVR2, VQA
from tools import toy, toy_world
from tools.toy_sentences import ANSWERS
from tools.toy_world import (COLOURS, HELD_OUT, KINDS, NUMBERS, RELATIONS, SINGULAR, SIZES, Scene,
                             Shape, is_true)

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

GROUPS = (list(COLOURS), list(KINDS), list(SIZES), ["left", "right"], ["above", "below"],
          list(NUMBERS[2:6]))


@pytest.fixture(scope="module")
def world():
    """2,000 scenes with their captions and questions."""
    found = []
    for i in range(2000):
        rng = random.Random(i)
        scene = toy.sample_scene(rng)
        found.append((scene, toy.captions(scene, rng), toy.questions(scene, rng)))
    return found


@pytest.fixture(scope="module")
def asked_of(world):
    """The scenes with the questions of evaluation, and with those of training."""
    trained = [toy.questions(scene, random.Random(i), training=True)
               for i, (scene, _, _) in enumerate(world)]
    scenes = [scene for scene, _, _ in world]
    return {"evaluation": [(scene, asked) for scene, _, asked in world],
            "training": list(zip(scenes, trained, strict=True))}


@pytest.fixture(scope="module")
def pairs():
    """2,000 rows of NLVR2 with their scenes, the pictures left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "draw", lambda *_: None)
        patch.setattr(toy, "encode", lambda _: b"")
        return [toy.pair_row(0, 64, "train", i) for i in range(2000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    toy.make(out, images=120, eval_images=40, workers=2)
    return out


def table(path):
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


# ---- scenes and pictures

def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(toy_world).failed == 0


def test_shapes_neither_touch_nor_leave_the_picture_and_colours_never_repeat(world):
    for scene, _, _ in world:
        assert len({s.colour for s in scene.shapes}) == len(scene.shapes) <= 5
        for s in scene.shapes:
            assert SIZES[s.size] <= min(s.x, s.y) and max(s.x, s.y) <= 64 - SIZES[s.size]
        for a, b in itertools.combinations(scene.shapes, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size]
    repeats = [len({s.kind for s in scene.shapes}) < len(scene.shapes) for scene, _, _ in world]
    assert .15 < np.mean(repeats) < .28


def test_held_out_pairs_are_spread_and_only_the_holdout_has_them(world):
    assert len(HELD_OUT) == len({c for c, _ in HELD_OUT}) == len({k for _, k in HELD_OUT}) == 6
    assert not any(set(scene.pairs) & HELD_OUT for scene, _, _ in world)
    for i in range(300):
        assert set(toy.sample_scene(random.Random(i), held_out=True).pairs) & HELD_OUT


def test_words_of_training_never_name_a_held_out_pair(world, pairs):
    names = re.compile("|".join(f"{colour} {kind}" for colour, kind in HELD_OUT))
    texts = [row["questions"][0] for row, _ in pairs]
    for _, captions, asked in world:
        texts += captions + [question for question, _ in asked]
    assert not [text for text in texts if names.search(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_drawn_where_it_stands_in_its_colour(kind):
    table = np.array(list(COLOURS.values()))
    for number, colour in enumerate(COLOURS):
        scene = Scene((Shape(kind, colour, "big", 20, 30),))
        jpeg = toy.encode(toy.draw(scene, 64, random.Random(0)))
        pixels = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
        drawn = np.abs(pixels - pixels[60, 60]).sum(2) > 120   # far from the ground's colour
        ys, xs = np.nonzero(drawn)
        assert len(xs) > 60 and abs(xs.mean() + .5 - 20) < 1 and abs(ys.mean() + .5 - 30) < 1
        assert xs.min() >= 7 and xs.max() <= 33 and ys.min() >= 17 and ys.max() <= 43
        nearest = np.abs(pixels[drawn][:, None] - table).sum(2).argmin(1)
        assert np.mean(nearest == number) > .5, colour   # the rest is the edge


# ---- captions

def test_every_caption_is_true_of_its_scene(world):
    assert [(text, scene) for scene, captions, _ in world for text in captions
            if not is_true(text, scene)] == []


def test_every_caption_is_read_as_it_was_meant_by_another_reader(world):
    """Plain "colour kind" phrases are in the picture; counts of all shapes are right."""
    phrase = rf"(?:(small|big) )?({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b"
    for scene, captions, _ in world:
        for text in captions:
            for size, colour, kind in re.findall(phrase, text):
                named = [s for s in scene.shapes if (s.colour, s.kind) == (colour, kind)]
                assert any(size in ("", s.size) for s in named), text
            for number in re.findall(r"(\w+) shapes", text):
                assert NUMBERS.index(number) == len(scene.shapes), text


def test_another_word_in_its_place_is_nearly_always_false(world):
    """So a hidden attribute word is told by the picture: every other word of its group is wrong."""
    wrong = collections.defaultdict(list)
    for scene, captions, _ in world[:400]:
        for text, group in itertools.product(captions, GROUPS):
            for found in re.finditer(rf"\b({'|'.join(group)})\b", text):
                others = [text[:found.start()] + word + text[found.end():] for word in group
                          if word != found[0]]
                wrong[group[0]].append(not any(is_true(other, scene) for other in others))
    assert len(wrong) == 6 and all(np.mean(values) > .9 for values in wrong.values()), \
        {name: np.mean(values) for name, values in wrong.items()}


def test_captions_of_another_scene_are_mostly_false(world):
    others = world[1:] + world[:1]
    truths = [is_true(text, other)
              for (_, captions, _), (other, _, _) in zip(world, others, strict=True)
              for text in captions]
    assert None not in truths and np.mean(truths) < .08


def test_captions_vary_in_length_and_detail(world):
    texts = [text for _, captions, _ in world for text in captions]
    words = [text.split() for text in texts]
    assert 9.5 < np.mean([len(w) for w in words]) < 12.5 and max(map(len, words)) <= 32
    assert min(map(len, words)) <= 3 and len(set(texts)) > .8 * len(texts)
    assert all(len(set(captions)) == 5 for _, captions, _ in world)
    assert .35 < np.mean([bool(set(w) & set(RELATIONS)) for w in words]) < .5
    has = [set(re.findall(r"\w+", text)) for text in texts]
    assert np.mean([bool(w & set(COLOURS) and w & {*KINDS, *SINGULAR}) for w in has]) > .93


def test_the_first_caption_of_a_scene_is_its_longest():
    """It is the one that retrieval asks with (`--captions 1`)."""
    rng = random.Random(3)
    for _ in range(50):
        lengths = [len(text.split()) for text in toy.captions(toy.sample_scene(rng), rng)]
        assert lengths == sorted(lengths, reverse=True)


def test_words_of_a_group_are_equally_frequent(world):
    texts = [text for _, captions, _ in world for text in captions]
    counts = collections.Counter(re.findall(r"\w+", " ".join(texts)))
    for group in (COLOURS, KINDS, ("above", "below"), ("left", "right")):
        share = np.array([counts[word] for word in group]) / sum(counts[word] for word in group)
        assert np.abs(share * len(group) - 1).max() < .2, dict(zip(group, share, strict=True))


# star (big, red) over ring (small, blue), cross (small, green) to the right of the star,
# second ring bottom right
SCENE = Scene((Shape("star", "red", "big", 15, 15), Shape("ring", "blue", "small", 15, 50),
               Shape("cross", "green", "small", 50, 15), Shape("ring", "pink", "big", 50, 48)))


@pytest.mark.parametrize("text, truth", [
    ("a red star", True), ("A small red star.", False), ("the ring", False),
    ("two rings and a cross", True), ("a ring and a ring", True), ("a star and a star", False),
    ("one star, two rings, one cross", True), ("four shapes: a star, two rings and a cross", True),
    ("rings", True), ("stars", False), ("three shapes", False),
    ("the star is to the left of the cross", True), ("the star is right of the cross", False),
    ("a star above a ring and left of the green cross", True),
    ("above the blue ring there is a big star", True),
    ("the star is left of the ring", False),                # which of the rings?
    ("the star is left of the pink ring", False),           # diagonal: not clear
    ("a star in the top left corner, and a pink ring on the right side", True),
    ("the cross is in the middle", False),
    ("the star is big and red", True), ("the star is small and red", False),
    ("the sky is blue", None), ("two ring", None), ("a rings", None), ("", None),
    ("above the ring", None), ("a red", None), ("a star is", None), ("and", None),
])
def test_is_true_reads(text, truth):
    assert is_true(text, SCENE) is truth


# ---- questions

def named(text, scene):
    """The shapes that "the small red star", "circles" or "shape" may be, read word by word."""
    words = [SINGULAR.get(word, word) for word in text.split()]
    return [s for s in scene.shapes
            if {*words} <= {"the", "a", "shape", s.kind, s.colour, s.size}]


def beside(a, word, b):
    x, y = a.x - b.x, a.y - b.y
    ahead, aside = {"left": (-x, y), "right": (x, y), "above": (-y, x), "below": (y, x)}[word]
    return ahead >= 12 and ahead >= 1.5 * abs(aside)


WHERE = r"(?:(?:to|on) the )?(left|right|above|below)(?: of)? (the .*)"


def answer(question, scene):
    """The answer worked out again; fails where the question has none or more than one."""
    text = question.removesuffix("?")
    if found := re.fullmatch(rf"what (is|colour is the shape) {WHERE}", text):
        (target,) = named(found[3], scene)
        (shape,) = [s for s in scene.shapes if beside(s, found[2], target)]
        return shape.kind if found[1] == "is" else shape.colour
    if found := re.fullmatch(rf"is (the .*?) {WHERE}", text):
        (a,), (b,) = named(found[1], scene), named(found[3], scene)
        return "yes" if beside(a, found[2], b) else "no"
    if found := re.fullmatch(r"is (the .*) (small|big)", text):
        (shape,) = named(found[1], scene)
        return "yes" if shape.size == found[2] else "no"
    if found := re.fullmatch(r"(?:is there|do you see) (a .*)", text):
        return "yes" if named(found[1], scene) else "no"
    if found := re.fullmatch(r"how many (.*) (?:are there|do you see)", text):
        return str(len(named(found[1], scene)))
    if found := re.fullmatch(r"(?:what colour is|which colour does) (the .*?)(?: have)?", text):
        (shape,) = named(found[1], scene)
        return shape.colour
    found = re.fullmatch(r"what is (the .*)|which shape is (.*)", text)
    (shape,) = named(found[1] or found[2], scene)
    return shape.kind


@pytest.mark.parametrize("use", ["evaluation", "training"])
def test_every_answer_is_right(asked_of, use):
    assert [(question, given, scene) for scene, asked in asked_of[use] for question, given in asked
            if answer(question, scene) != given] == []


@pytest.mark.parametrize("use", ["evaluation", "training"])
def test_answers_are_balanced_and_in_the_list(asked_of, use):
    counts = collections.Counter(given for _, asked in asked_of[use] for _, given in asked)
    assert set(counts) <= set(ANSWERS) and len(set(ANSWERS)) == len(ANSWERS)
    assert abs(counts["yes"] / (counts["yes"] + counts["no"]) - .5) < .02
    for group in (COLOURS, KINDS):
        share = np.array([counts[word] for word in group]) / sum(counts[word] for word in group)
        assert np.abs(share * len(group) - 1).max() < .25, dict(zip(group, share, strict=True))
    assert max(counts[digit] for digit in "012345") < .4 * sum(counts[digit] for digit in "012345")


def naive_bayes(rows):
    """Accuracy of a reader of the words alone, that counts words and word pairs.

    It counts in the first half of the rows, and is scored on the second.
    """
    def features(text):
        words = text.split()
        return {*words, *itertools.pairwise(words)}
    half = len(rows) // 2
    seen = {True: collections.Counter(), False: collections.Counter()}
    for text, label in rows[:half]:
        seen[label].update(features(text))
    total = {label: sum(label == other for _, other in rows[:half]) for label in seen}

    def score(text, label):
        shares = [(seen[label][f] + 1) / (total[label] + 2) for f in features(text)]
        return sum(map(math.log, shares)) + math.log(total[label])
    return np.mean([(score(text, True) > score(text, False)) == label
                    for text, label in rows[half:]])


@pytest.mark.parametrize("use", ["evaluation", "training"])
def test_the_words_of_a_question_alone_do_not_tell_yes_from_no(asked_of, use):
    rows = [(question, given == "yes") for _, asked in asked_of[use] for question, given in asked
            if given in ("yes", "no")]
    assert len(rows) > 4000 and naive_bayes(rows) < .55


def test_evaluation_asks_each_kind_once_and_training_asks_mostly_about_relations(asked_of):
    kinds = {"what": "what.* (of|above|below) ", "is": "is .* (of|above|below) "}

    def count(kind, asked):
        return sum(bool(re.match(kinds[kind], question)) for question, _ in asked)

    evaluated, trained = ([asked for _, asked in asked_of[use]] for use in asked_of)
    assert max(map(len, evaluated)) == 7
    assert max(count(kind, asked) for kind in kinds for asked in evaluated) == 1
    share = {kind: count(kind, sum(trained, [])) / sum(map(len, trained)) for kind in kinds}
    assert .4 < share["is"] < .5 and .15 < share["what"] < .25, share
    for asked in trained:
        assert len({question for question, _ in asked}) == len(asked) <= 13


# ---- statements

def statement_truth(text, left, right):
    """The truth worked out again by a reader of patterns."""
    scenes = {"left": left, "right": right}

    def count(what, side):
        return len(named(what, scenes[side]))

    def matches(*patterns):
        found = re.fullmatch("|".join(patterns), text)
        return found and [group for group in found.groups() if group]

    if found := matches(r"the (\w+) image contains twice as many (.*) as the (\w+) image"):
        side, what, other = found
        return count(what, side) == 2 * count(what, other)
    if found := matches(r"the (\w+) image contains more (.*) than the (\w+) image"):
        side, what, other = found
        return count(what, side) > count(what, other)
    if found := matches(r"there are more (.*) in the (\w+) image than in the (\w+) image"):
        what, side, other = found
        return count(what, side) > count(what, other)
    if found := matches(r"both images contain the same number of (.*)",
                        r"there are as many (.*) in the left image as in the right image"):
        return count(found[0], "left") == count(found[0], "right")
    if found := matches(r"there are (\w+) (.*) in total",
                        r"the two images contain (\w+) (.*) together"):
        number, what = found
        return count(what, "left") + count(what, "right") == NUMBERS.index(number)
    if found := matches(r"exactly one image contains two (.*)"):
        return (count(found[0], "left") == 2) != (count(found[0], "right") == 2)
    if found := matches(r"there are exactly (\w+) (.*) in the (\w+) image"):
        number, what, side = found
        return count(what, side) == NUMBERS.index(number)
    if found := matches(r"the (\w+) image contains a (\w+ \w+) but the (\w+) image does not"):
        side, what, other = found
        return count(what, side) > 0 and count(what, other) == 0
    if found := matches(r"there is a (\w+ \w+) in the (\w+) image but not in the (\w+) one"):
        what, side, other = found
        return count(what, side) > 0 and count(what, other) == 0
    if found := matches(r"the (\w+) image contains a (\w+ \w+)"):
        side, what = found
        return count(what, side) > 0
    if found := matches(r"there is a (\w+ \w+) in the (left|right) image"):
        what, side = found
        return count(what, side) > 0
    (what,) = re.findall(r"\ba (\w+ \w+)", text)
    present = (count(what, "left") > 0) + (count(what, "right") > 0)
    return {"both images contain _": present == 2,
            "there is _ in each of the two images": present == 2,
            "exactly one image contains _": present == 1,
            "_ is in only one of the two images": present == 1,
            "at least one image contains _": present > 0,
            "there is _ in the left or in the right image": present > 0,
            "neither image contains _": present == 0,
            "_ is in none of the two images": present == 0}[text.replace(f"a {what}", "_")]


def test_every_statement_is_what_it_says_it_is(pairs):
    for row, scenes in pairs:
        truth = statement_truth(row["questions"][0], *scenes)
        assert str(truth) == row["answers"][0], (row, scenes)


def test_no_statement_is_truer_than_another(pairs):
    rows = [(row["questions"][0], row["answers"][0] == "True") for row, _ in pairs]
    assert abs(np.mean([truth for _, truth in rows]) - .5) < .03
    by_template = collections.defaultdict(list)
    slots = rf"\b({'|'.join([*COLOURS, *KINDS, *SINGULAR, *SIZES, *NUMBERS])})\b"
    for text, truth in rows:
        template = re.sub(r"left|right", "side", re.sub(rf"(?:{slots} ?)+", "_ ", text))
        by_template[template].append(truth)
    for template, truths in by_template.items():
        # 4.4 standard deviations
        assert abs(np.mean(truths) - .5) < 2.2 / math.sqrt(len(truths)), template
    assert len(by_template) > 10 and naive_bayes(rows) < .54


def test_neither_picture_alone_decides_most_statements(pairs):
    """With the other picture replaced by that of another pair, the truth often changes."""
    changed = []
    for (row, (left, _)), (_, (_, other)) in itertools.pairwise(pairs[:1001]):
        changed.append(str(statement_truth(row["questions"][0], left, other)) != row["answers"][0])
    assert np.mean(changed) > .25


# ---- files

def test_files_have_the_schemas_and_rows_that_data_reads(folder):
    for split, n in dict(train=120, val=40, test=40, holdout=40).items():
        captions, vqa = (table(folder / f"toy_{name}_{split}.arrow") for name in ("caption", "vqa"))
        nlvr2 = table(folder / f"toy_nlvr2_{'dev' if split == 'val' else split}.arrow")
        assert (captions.schema, vqa.schema, nlvr2.schema) == (CAPTIONS, VQA, NLVR2)
        assert (len(captions), len(vqa), len(nlvr2)) == (n, n, n // 2)
        assert captions["image"] == vqa["image"] and set(captions["split"].to_pylist()) == {split}
        assert captions["image_id"].to_pylist() == [str(i) for i in vqa["image_id"].to_pylist()]
        assert Image.open(io.BytesIO(nlvr2["image_1"][0].as_py())).size == (64, 64)
    assert not list(folder.glob("*.partial"))


def test_numbers_of_pictures_questions_and_pairs_are_unique_over_all_splits(folder):
    vqa = [row for path in folder.glob("toy_vqa_*.arrow") for row in table(path).to_pylist()]
    images = [row["image_id"] for row in vqa]
    questions = [i for row in vqa for i in row["question_id"]]
    stated = []
    for path in folder.glob("toy_nlvr2_*.arrow"):
        stated += [name for names in table(path)["identifiers"].to_pylist() for name in names]
    assert all(len(ids) == len(set(ids)) > 100 for ids in (questions, images, stated))
    assert "toy_train-17-0-1" in stated and "toy_dev-0-0-1" in stated


def test_scenes_on_disk_are_those_of_the_captions(folder):
    scenes = toy.load_scenes(folder / "toy_scenes.jsonl")
    for split in toy.SPLITS:
        rows = table(folder / f"toy_caption_{split}.arrow").to_pylist()
        for row in rows:
            scene = scenes[row["image_id"]]
            assert all(is_true(text, scene) for text in row["caption"])
            assert bool(set(scene.pairs) & HELD_OUT) == (split == "holdout")


def test_labels_are_places_in_the_answer_list_and_words_are_listed(folder):
    answers = json.loads((folder / "toy_vqa_answers.json").read_text())
    for row in table(folder / "toy_vqa_train.arrow").to_pylist():
        assert [[answers[i] for i in labels] for labels in row["answer_labels"]] == row["answers"]
        assert row["answer_scores"] == [[1.0]] * len(row["questions"])
    words = json.loads((folder / "toy_words.json").read_text())
    assert set(words) == {"colours", "shapes", "relations"} and "crosses" in words["shapes"]


def test_the_same_seed_gives_the_same_bytes_and_a_smaller_world_is_a_prefix(folder, tmp_path):
    toy.make(tmp_path / "again", images=120, eval_images=40, workers=1)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    toy.make(tmp_path / "small", images=10, eval_images=1, workers=1)
    toy.make(tmp_path / "other", images=10, eval_images=1, workers=1, seed=1)
    small, whole, other = (table(path / "toy_caption_train.arrow")
                           for path in (tmp_path / "small", folder, tmp_path / "other"))
    assert small.to_pylist() == whole.slice(0, 10).to_pylist() != other.to_pylist()


def test_the_world_of_a_seed_stays_what_it_was():
    """Published numbers are of this world. Pixels are left out: Pillow's JPEG may change."""
    said = hashlib.sha256()
    for split, index in itertools.product(toy.SPLITS, range(20)):
        caption_row, vqa_row, line = toy.picture_rows(0, 64, split, index)
        pair_row, _ = toy.pair_row(0, 64, split, index)
        said.update(json.dumps([caption_row["caption"], vqa_row["questions"], vqa_row["answers"],
                                line, pair_row["questions"], pair_row["answers"]]).encode())
    assert said.hexdigest()[:16] == "cf8b86d1b8316f37"


def test_make_refuses_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal("make", "--out", tmp_path / "file", "--workers", 1)
    assert "--size 31" in refusal("make", "--out", tmp_path, "--size", 31)
    assert "--images 0" in refusal("make", "--out", tmp_path, "--images", 0)


# ---- captions of a model

def refusal(*argv):
    with pytest.raises(SystemExit) as error:
        toy.main([str(a) for a in argv])
    message = str(error.value)
    assert message.startswith("toy.py: ") and "\n" not in message
    return message


def write_results(path, *rows):
    entries = [{"image_id": image_id, "caption": text} for image_id, text in rows]
    path.write_text(json.dumps(entries))
    return path


def test_true_counts_captions_of_their_own_scene_only(folder, tmp_path, capsys):
    rows = table(folder / "toy_caption_test.arrow").to_pylist()
    # eval.py writes numbers for image ids that are numbers
    own = [(int(row["image_id"]), row["caption"][0] + ".") for row in rows]
    others = [(row["image_id"], other["caption"][0]) for row, other in itertools.pairwise(rows)]
    found = toy.judge(write_results(tmp_path / "own.json", *own), folder)
    assert found == {"captions": 40, "true": 40, "false": 0, "unknown": 0, "share": 1.0}
    found = toy.judge(write_results(tmp_path / "others.json", *others), folder)
    assert found["false"] > 30 and found["true"] + found["false"] == 39
    mixed = write_results(tmp_path / "mixed.json", *own[:2], (own[2][0], "a photo of a dog"),
                          (own[3][0], ""))
    toy.main(["true", str(mixed), "--data", str(folder), "--out", str(tmp_path / "truth.json")])
    assert "2 of 4 captions are true of their scene (50.0 %)" in capsys.readouterr().out
    assert json.loads((tmp_path / "truth.json").read_text()) == {
        "captions": 4, "true": 2, "false": 0, "unknown": 2, "share": 0.5}


def test_true_names_the_file_and_entry_that_it_cannot_judge(folder, tmp_path):
    results = tmp_path / "results.json"
    assert "results.json" in refusal("true", results, "--data", folder)
    for contents, says in (("[]", "not a list"), ("{}", "not a list"),
                           ('[{"image_id": 1}]', "entry 0"),
                           ('[{"image_id": 123456, "caption": "a ring"}]', "entry 0")):
        results.write_text(contents)
        message = refusal("true", results, "--data", folder)
        assert says in message and "results.json" in message
    assert "toy_scenes.jsonl" in refusal("true", results, "--data", tmp_path)


def test_a_word_points_at_the_patch_of_the_shape_that_it_names(tmp_path, capsys):
    toy.make(tmp_path, images=1, eval_images=3, workers=1)
    scene = toy.load_scenes(tmp_path / toy.SCENES)[str(2 * 10 ** 8)]        # the first of test
    shape = scene.shapes[0]
    column, row = int(shape.x // 16), int(shape.y // 16)
    there = [float(k == 4 * row + column) for k in range(16)]
    elsewhere = there[1:] + there[:1]
    half = [share / 2 for share in there]
    word = shape.colour
    entry = {"file": "anywhere/toy_caption_test.arrow", "row": 0, "grid": [4, 4],
             "tokens": [word[:2], word[2:], " is", f" {shape.kind}"],
             "plan": [half, there, elsewhere, elsewhere]}
    path = tmp_path / "align.json"
    path.write_text(json.dumps([entry]))
    found = toy.pointing(path, tmp_path)["transport"]
    assert found["colours"] == {"words": 1, "right": 1.0, "chance": 1 / 16}
    same_kind = [s for s in scene.shapes if s.kind == shape.kind]
    assert found["kinds"]["words"] == 1 and found["kinds"]["chance"] == len(same_kind) / 16
    assert found["kinds"]["right"] == any(4 * int(s.y // 16) + int(s.x // 16)
                                          == elsewhere.index(1.0) for s in same_kind)
    toy.main(["pointed", str(path), "--data", str(tmp_path)])
    assert "colours 100.0 % of 1 (chance 6.2 %)" in capsys.readouterr().out
    plan = entry.pop("plan")
    path.write_text(json.dumps([entry | {"maps": {"layer 1": plan, "layer 2": [elsewhere] * 4}}]))
    found = toy.pointing(path, tmp_path)
    assert (found["layer 1"]["colours"]["right"], found["layer 2"]["colours"]["right"]) == (1, 0)
