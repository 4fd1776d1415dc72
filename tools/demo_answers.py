"""What the demo page shows, computed: models that are opened, words, answers, drawn scenes.

    models = open_models(existing_defaults())           # those of models/, or of `make`
    drawn = draw_scene("scenes", seed=7)                # a picture, and what is true of it
    reading = read_words(models.able["Fill in"]["toy"], drawn.path, "a ___ square")
    reading.words[1].choices                            # [("red", 0.97), ("pink", 0.02), …]

tools/demo_page.py lays it out. Here is nothing of Gradio, and nothing is computed that predict.py
computes. What a visitor can mend is a ValueError or an OSError, whose `sentence` the page shows.
"""

import html
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import predict
from predict import Model
from released.named import model_names
from storage import disk
from tools.toy import pair_row, picture_rows
from tools.toy_sentences import place_phrase, places_of
from tools.toy_world import COLOURS, KINDS, PLURAL, Noun, Scene, Shape, is_true

LARGEST = 30                    # MB of a picture file
MOST_PICTURES, MOST_TEXTS = 500, 50

# -------------------------------------------------------------------------------------------------
# The models of a page.

class Tab(NamedTuple):
    """A tab that needs a model."""
    model: str                  # of models/, which the page opens by default
    run: str                    # of the Makefile, where there is no models/
    task: str                   # of train.py
    command: str                # makes such a model of the toy world


TABS = {
    "Fill in": Tab("toy", "runs/toy/last.pt", "pretrain", "make"),
    "Ask": Tab("toy-vqa", "runs/toy-vqa/last.pt", "vqa", "make vqa"),
    "Describe": Tab("toy-caption", "runs/toy-caption/last.pt", "caption", "make caption"),
    "Compare": Tab("toy-nlvr2", "runs/toy-nlvr2/last.pt", "nlvr2", "make nlvr2"),
    "Search": Tab("toy-retrieval", "runs/toy-retrieval/last.pt", "retrieval", "make retrieval"),
}


@dataclass
class Models:
    """The models that were opened, and what they can do."""
    able: dict[str, dict[str, Model]]       # tab -> checkpoint -> model
    unused: list[str]                       # checkpoints that no tab can use


def open_models(checkpoints: Sequence[str | Path], device: str | torch.device = "cpu",
                tokenizer_folder: str | Path = "") -> Models:
    """Opens checkpoints and finds the tabs that each can serve.

    checkpoints: anything that weights.load opens.
    """
    models = Models({tab: {} for tab in TABS}, [])
    for checkpoint in dict.fromkeys(map(str, checkpoints)):
        model = predict.open_model(checkpoint, None, tokenizer_folder).to(device)
        tabs = [tab for tab in TABS if is_able(model, tab)]
        for tab in tabs:
            models.able[tab][checkpoint] = model
        if not tabs:
            models.unused.append(checkpoint)
    return models


def existing_defaults() -> list[str]:
    """The checkpoints of TABS that exist: by name in models/, else what `make` trained."""
    names, found = model_names(), []
    for tab in TABS.values():
        if tab.model in names:
            found.append(tab.model)
        elif Path(tab.run).exists():
            found.append(tab.run)
    return found


def is_able(model: Model, tab: str) -> bool:
    """Whether a model can do what a tab offers."""
    try:
        if tab == "Fill in":
            predict.check_reads_both_sides(model)
        else:
            predict.check_task(model, TABS[tab].task)
    except ValueError:
        return False
    return True


def missing_tabs(models: Models) -> str:
    """Markdown: which tabs are not there, and which commands make the models that they need."""
    lines = []
    for name, tab in TABS.items():
        if models.able[name]:
            continue
        source = "" if tab.task == "pretrain" else " --load CHECKPOINT"
        lines.append(f"- **{name}** needs a model of task {tab.task}. `{tab.command}` makes one of "
                     f"the toy world, `python train.py --task {tab.task}{source} …` one of your "
                     "data.")
    for checkpoint in models.unused:
        lines.append(f"- `{checkpoint}` is of no use here: it reads texts from one side only, or "
                     "has no head that answers.")
    if not lines:
        return ""
    return "\n".join(["**What is missing here**", "", *lines, "",
                      "Then start this page with it: `python -m tools.demo RUN/last.pt …`, one "
                      "checkpoint or several."])


# -------------------------------------------------------------------------------------------------
# What visitors give.

def checked_picture(path: str | None, what: str = "a picture") -> str:
    """The path of a picture, unchanged. ValueError where there is none, or it is too large."""
    if not path:
        raise ValueError(f"Choose {what} first, or let a scene be drawn.")
    megabytes = Path(path).stat().st_size / 1e6
    if megabytes > LARGEST:
        raise ValueError(f"{Path(path).name}: a file of {megabytes:.0f} MB; at most {LARGEST} MB "
                         "are expected.")
    return path


def checked_text(text: str | None, what: str) -> str:
    """A text without spaces at its ends. ValueError for an empty one."""
    text = (text or "").strip()
    if not text:
        raise ValueError(f"Type {what} first.")
    return text


def sentence(error: Exception, folder: str | Path = "") -> str:
    """An error in a sentence. folder: of uploads, whose paths are none of a visitor's business."""
    return without(folder, disk.sentence_of(error)) if folder else disk.sentence_of(error)


def without(folder: str | Path, text: str) -> str:
    """A text in which only the file's name stays of a path below a folder.

    >>> without("/tmp/demo", "/tmp/demo/9f3c/photo.jpg: not a picture")
    'photo.jpg: not a picture'
    """
    return re.sub(re.escape(f"{folder}/") + r"([^/\s]+/)*", "", text)


# -------------------------------------------------------------------------------------------------
# Fill in: every word at once.

class Word(NamedTuple):
    """A token of a text, and what the model says in its place."""
    text: str
    starts: bool                            # it begins a word; else it goes on with one
    share: float                            # its probability
    choices: list[tuple[str, float]]        # the likeliest tokens, the best first
    was_blank: bool


@dataclass
class Reading:
    """A text about a picture, as a model reads it."""
    picture: str
    ids: Tensor                             # (1, L), every blank filled
    words: list[Word]                       # of the positions 1 .. L - 2


@torch.no_grad()
def read_words(model: Model, picture: str | None, text: str | None, choices: int = 3) -> Reading:
    """Fills the blanks of a text, then asks for every word of it, given all others.

    A blank is `<mask>` or `___`. The words of FLM are asked at once, those of objective mlm one by
    one: each is masked in turn.
    """
    predict.check_reads_both_sides(model)
    picture = checked_picture(picture)
    text = re.sub("_{2,}", "<mask>", checked_text(text, "a text"))
    text = re.sub(r"(?<=\w)(?=<mask>)|(?<=<mask>)(?=\w)", " ", text)        # "a___dog"
    ids, tok = predict.blanked_ids(model, text), model.tokenizer
    visual = predict.encode_pictures(model, [picture])
    blanks = (ids[0, 1:-1] == tok.mask_id).tolist()
    if any(blanks):
        ids, _ = predict.fill_blanks(model, visual, ids)
    positions = torch.arange(1, ids.shape[1] - 1, device=ids.device)
    if model.config.objective == "flm":
        shares = predict.token_shares(model, visual, ids, positions)        # (words, V)
    else:
        one_by_one = []
        for position in positions[:, None]:
            masked = ids.index_fill(1, position, tok.mask_id)
            one_by_one.append(predict.token_shares(model, visual, masked, position))
        shares = torch.cat(one_by_one)                                      # (words, V)

    def text_of(token):
        return tok.decode([token]).strip() or "␣"

    inner, words = ids[0, 1:-1].tolist(), []
    best, starts = shares.topk(choices), tok.word_starts(inner)
    for i, token in enumerate(inner):
        said = map(text_of, best.indices[i].tolist())
        pairs = list(zip(said, best.values[i].tolist(), strict=True))
        share = shares[i, token].item()
        words.append(Word(text_of(token), starts[i], share, pairs, blanks[i]))
    return Reading(picture, ids, words)


def word_table(reading: Reading) -> str:
    """HTML: each word with its probability and the model's choices."""
    rows = []
    for word in reading.words:
        text = html.escape(word.text if word.starts else f"·{word.text}")
        if word.was_blank:
            text = f"<b>{text}</b>"
        choices = [f"{html.escape(said)} <small>{percent(share)}</small>"
                   for said, share in word.choices]
        rows.append([text, bar(word.share), *choices])
    count = len(reading.words[0].choices)
    names = ["first choice", "second", "third"][:count]
    return table(["word", "likelihood", *names], rows)


# -------------------------------------------------------------------------------------------------
# Describe, Search.

HOW = {"Greedy": "the likeliest word each time",
       "Beam search": "the likeliest caption that several running ones lead to",
       "Sampling": "words drawn by their probability"}


def describe(model: Model, picture: str | None, how: str, beams: int = 5, top_p: float = 0.9,
             temperature: float = 1.0, seed: int = 0) -> str:
    """A caption for a picture, written in one of the ways of HOW."""
    settings = {}
    if how == "Beam search":
        settings = {"beams": int(beams)}
    elif how == "Sampling":
        settings = {"top_p": top_p, "temperature": temperature, "seed": int(seed)}
    return predict.describe(model, checked_picture(picture), **settings)


def search(model: Model, text: str | None,
           files: Sequence[str] | None) -> tuple[list[tuple[str, float]], list[str]]:
    """Uploaded pictures, the best for a text first -> ([(path, score)], what was left out).

    Files that are not named like pictures are left out: a folder holds other things too.
    """
    text = checked_text(text, "a text to search for")
    if not files:
        raise ValueError("Choose pictures first, or let scenes be drawn.")
    named = [path for path in files if Path(path).suffix.lower() in predict.SUFFIXES]
    left_out = [f"{Path(path).name}: not named like a picture" for path in files
                if path not in named]
    if len(named) > MOST_PICTURES:
        raise ValueError(f"{len(named)} pictures; at most {MOST_PICTURES} at once are expected "
                         "here. `python eval.py search` takes any number.")
    if not named:
        raise ValueError(f"None of the {len(files)} files is named like a picture "
                         f"({', '.join(predict.SUFFIXES)}).")
    small = []
    for path in named:
        try:
            small.append(checked_picture(path))
        except ValueError as error:
            left_out.append(str(error))
    if not small:
        raise ValueError(left_out[0])
    return predict.search(model, text, small, left_out), left_out


def rank(model: Model, picture: str | None, lines: str | None) -> list[tuple[str, float]]:
    """Texts, one on each line, in the order in which they fit a picture -> [(text, score)]."""
    texts = checked_text(lines, "some texts, each on a line,").splitlines()
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"{len(texts)} texts; at most {MOST_TEXTS} are expected here.")
    return predict.rank(model, checked_picture(picture), texts)


# -------------------------------------------------------------------------------------------------
# Scenes of the toy world, of which all is known.

SIDE = 256                      # pixels of a drawn picture; a model resizes it as any photograph


class Drawn(NamedTuple):
    """A drawn picture, and what is true of it."""
    path: str
    scene: Scene
    captions: list[str]                     # the longest first
    questions: list[tuple[str, str]]        # with their answers

    def truth(self, text: str) -> bool | None:
        """Whether a sentence is true of the scene; None for one of another grammar."""
        return is_true(text, self.scene)


def new_seed() -> int:
    return random.randrange(10 ** 6)


def draw_scene(folder: str | Path, seed: int) -> Drawn:
    """Draws a scene as those that the toy models are tested on, into a picture file."""
    caption_row, vqa_row, line = picture_rows(seed, SIDE, "test", 0)
    scene = Scene(tuple(Shape(*shape) for shape in json.loads(line)["shapes"]))
    path = Path(folder) / f"scene_{seed}.jpg"
    path.write_bytes(caption_row["image"])
    asked = [(question, answers[0])
             for question, answers in zip(vqa_row["questions"], vqa_row["answers"], strict=True)]
    return Drawn(str(path), scene, caption_row["caption"], asked)


def draw_pair(folder: str | Path, seed: int) -> tuple[str, str, str, bool]:
    """Draws two scenes -> (left picture, right picture, a statement about them, its truth)."""
    row, _ = pair_row(seed, SIDE, "test", 0)
    paths = []
    for side, name in (("left", "image_0"), ("right", "image_1")):
        path = Path(folder) / f"scene_{seed}_{side}.jpg"
        path.write_bytes(row[name])
        paths.append(str(path))
    return *paths, row["questions"][0], row["answers"][0] == "True"


def with_blanks(caption: str, count: int = 2) -> str:
    """A caption of the toy world with blanks in the place of its first colours and kinds.

    No two of them are neighbours: with both hidden, "a ___ ___" leaves open what each is.

    >>> with_blanks("a red star above a big ring, and two blue circles")
    'a ___ star above a big ___, and two blue circles'
    """
    names = {*COLOURS, *KINDS, *PLURAL.values()}
    parts = re.split(r"(\w+)", caption)             # at odd places the words
    last, left = -2, count
    for i in range(1, len(parts), 2):
        if left and parts[i] in names and i > last + 2:
            parts[i], last, left = "___", i, left - 1
    return "".join(parts)


def facts(drawn: Drawn) -> str:
    """Markdown: the shapes of a drawn scene, and captions that are true of it."""
    shapes = []
    for shape in drawn.scene.shapes:
        noun = Noun("a", shape.size, shape.colour, shape.kind)
        place = max(places_of(shape), key=len, default="")
        shapes.append(f"{noun} {place_phrase(place)}" if place else str(noun))
    captions = [f"- {caption}" for caption in dict.fromkeys(drawn.captions)]
    return "\n".join([f"**In this scene:** {'; '.join(shapes)}.", "", "**True captions of it:**",
                      "", *captions])


def answers_known(drawn: Drawn) -> str:
    """Markdown: questions about a drawn scene with their answers."""
    return "\n".join(["**Questions with their true answers:**", "",
                      *(f"- {question} *{answer}*" for question, answer in drawn.questions)])


def verdict(truth: bool | None) -> str:
    """The truth of a sentence about a drawn scene, in words."""
    if truth is None:
        return "The toy world's grammar does not know this sentence."
    return "True of this scene." if truth else "False of this scene."


def mark(truth: bool | None) -> str:
    """A verdict's mark: true, false, not known."""
    return {True: "✓ true", False: "✗ false", None: "?"}[truth]


def known_of_pair(truth: bool) -> str:
    """Markdown: whether the statement about two drawn scenes is true."""
    return f"**Known of these scenes:** the statement is {'true' if truth else 'false'}."


def wrong_captions(drawn: Drawn, seed: int, count: int = 3) -> list[str]:
    """Captions of other scenes that are false of this one."""
    found, rng = [], random.Random(seed)
    while len(found) < count:
        caption = rng.choice(picture_rows(rng.randrange(10 ** 6), 32, "test", 0)[0]["caption"])
        if drawn.truth(caption) is False and caption not in found:
            found.append(caption)
    return found


# -------------------------------------------------------------------------------------------------
# HTML, for words and numbers side by side.

def percent(share: float) -> str:
    """
    >>> [percent(share) for share in (0.934, 0.004, 0.0)]
    ['93 %', '0.4 %', '0.0 %']
    """
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def bar(share: float) -> str:
    """A probability as a bar with its number."""
    return (f'<span class="share"><span style="width: {100 * share:.0f}%"></span></span> '
            f"{percent(share)}")


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table. Cells are HTML: whoever makes them escapes what visitors typed."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
