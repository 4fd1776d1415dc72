"""A drawn world: coloured shapes with captions, questions and statements, in the same Arrow files as the real data.

    python toy.py --out data/toy                      # 20,000 training pictures of 64 x 64 in about half a minute
    python toy.py --out data/toy --images 2000        # the first 2,000 of the same pictures

Everything is a pure function of (seed, split, index), so a smaller world is a prefix of a larger one. Because the whole
scene is known, so is the truth of every sentence: `is_true("a red star above the ring", scene)`.

Lengths and positions are in 64ths of the picture's side, y pointing down, whatever size is drawn.
"""

import argparse
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import CAPTIONS, NLVR2, VQA, Writer

# ---------------------------------------------------------------------------------------------------------------------
# The world. No colour begins with a vowel: "an" would give away "orange" without a look at the picture.

COLOURS = {"red": (215, 25, 30), "green": (20, 140, 45), "blue": (30, 70, 215), "yellow": (245, 215, 20),
           "purple": (120, 35, 155), "pink": (255, 130, 195), "cyan": (30, 195, 220), "black": (25, 25, 25)}
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 4.5, "big": 7.2}                     # radius
# Shapes stand loosely on a grid of 4 x 4. A ViT whose patches are its cells meets each shape nearly whole, and minutes of
# training are then enough; with shapes anywhere the same minutes taught colours, but few kinds (docs/LOG.md).
CELL, LOOSE = 16, 2
RELATIONS = ("left", "right", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURAL = {"shape": "shapes", "cross": "crosses", **{kind: kind + "s" for kind in KINDS if kind != "cross"}}
PLACES = {"top left": (0, 0), "top": (None, 0), "top right": (1, 0), "left": (0, None), "middle": (.5, .5),
          "right": (1, None), "bottom left": (0, 1), "bottom": (None, 1), "bottom right": (1, 1)}
# Never seen together outside the holdout split, in pictures or in words: does the model compose what it learned apart?
HELD_OUT = frozenset({("red", "star"), ("green", "ring"), ("blue", "triangle"),
                      ("yellow", "cross"), ("purple", "circle"), ("black", "square")})


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    size: str
    x: float      # of the centre
    y: float


@dataclass(frozen=True)
class Scene:
    shapes: tuple

    @property
    def pairs(self):
        return [(shape.colour, shape.kind) for shape in self.shapes]


def sample_scene(rng, held_out=False, include=()):
    """A scene of 1..5 shapes that do not touch, `rng` a random.Random.

    Colours are all different; kinds too, but for a quarter of the scenes of two or more, which repeat one. No pair of
    HELD_OUT occurs, or with `held_out` at least one. `include`: (colour, kind) pairs that must be there.
    """
    n = max(len(include) + held_out, rng.choices((1, 2, 3, 4, 5), (12, 22, 24, 22, 20))[0])
    new = n - len(include)
    while True:
        repeats = rng.choices((0, 1, 2), (75, 17, 8))[0]
        colours, kinds = ([pair[i] for pair in include] for i in (0, 1))
        colours += rng.sample([colour for colour in COLOURS if colour not in colours], new)
        kinds += rng.sample([kind for kind in KINDS if kind not in kinds], new)
        for i in range(min(repeats, new, n - 1)):
            kinds[-1 - i] = kinds[0]
        pairs = list(zip(colours, kinds))
        if any(pair in HELD_OUT for pair in pairs) == held_out:
            break
    rng.shuffle(pairs)
    while True:   # throw the shapes in one by one, the big ones first; where one finds no room, start again
        shapes = []
        for (colour, kind), size in zip(pairs, sorted(rng.choices(tuple(SIZES), k=n))):
            r = SIZES[size]
            for _ in range(10):
                x, y = (CELL * (rng.randrange(4) + 0.5) + rng.uniform(-LOOSE, LOOSE) for _ in "xy")
                x, y = (min(max(v, r + 0.5), 63.5 - r) for v in (x, y))
                if all(math.hypot(x - s.x, y - s.y) > r + SIZES[s.size] + 0.5 for s in shapes):
                    shapes.append(Shape(kind, colour, size, round(x, 1), round(y, 1)))
                    break
            else:
                break
        if len(shapes) == n:
            return Scene(tuple(rng.sample(shapes, n)))


def _points(corners, *radii):
    """Corners of a regular polygon (of a star, with two radii in turn) around the origin, the first one on top."""
    turn = 2 * math.pi / corners
    return [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in zip(range(corners), itertools.cycle(radii))]


_A, _W = 1.0, 0.34   # length and half the width of a cross's arm
OUTLINES = {"square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)], "triangle": _points(3, 1.15),
            "star": _points(10, 1.15, .45),
            "cross": [(-_W, -_A), (_W, -_A), (_W, -_W), (_A, -_W), (_A, _W), (_W, _W),
                      (_W, _A), (-_W, _A), (-_W, _W), (-_A, _W), (-_A, -_W), (-_W, -_W)]}   # in radii


def draw(scene, size, rng):
    """The scene as an RGB PIL image of size x size pixels; `rng` tints ground and colours and adds noise."""
    scale = 2 * size / 64   # drawn at twice the size and averaged: smooth edges, cheaply
    grey = rng.randint(214, 234)
    ground = tuple(grey + rng.randint(-6, 6) for _ in "rgb")
    image = Image.new("RGB", (2 * size, 2 * size), ground)
    pen = ImageDraw.Draw(image)
    for s in scene.shapes:
        r = SIZES[s.size]
        fill = tuple(max(0, min(255, c + rng.randint(-10, 10))) for c in COLOURS[s.colour])
        if s.kind in OUTLINES:
            pen.polygon([(scale * (s.x + r * dx), scale * (s.y + r * dy)) for dx, dy in OUTLINES[s.kind]], fill)
        else:
            box = [scale * v for v in (s.x - r, s.y - r, s.x + r, s.y + r)]
            pen.ellipse(box, *((fill,) if s.kind == "circle" else (None, fill, round(scale * .38 * r))))
    pixels = np.asarray(image.reduce(2)).astype(np.int16)
    noise = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size, 1) % 7
    return Image.fromarray((pixels + noise - 3).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Meaning: what a noun phrase, a relation and a place say about a scene.

class Noun(NamedTuple):
    """A noun phrase, "a small red circle"; what is None or "shape" is left open.

    >>> str(Noun("two", colour="red", kind="cross"))
    'two red crosses'
    """
    count: str = None    # a, the, one, two, ...; None: no article
    size: str = None
    colour: str = None
    kind: str = "shape"

    def matches(self, shape):
        return ((self.size is None or self.size == shape.size) and (self.colour is None or self.colour == shape.colour)
                and (self.kind == "shape" or self.kind == shape.kind))

    def within(self, scene):
        return [shape for shape in scene.shapes if self.matches(shape)]

    def __str__(self):
        kind = PLURAL[self.kind] if self.count in NUMBERS[2:] else self.kind
        return " ".join(word for word in (self.count, self.size, self.colour, kind) if word)


def relation(a, b):
    """The one word of RELATIONS that says where shape a is, seen from b; None where the picture leaves it open.

    Clear means: 12 or more apart along one axis, and half as much again as along the other.
    """
    dx, dy = a.x - b.x, a.y - b.y
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if far < 12 or far < 1.5 * near:
        return None
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


def is_at(shape, place):
    """Is the shape in that place of PLACES: within the outer third along each named axis, or near the middle?"""
    def along(value, where):
        return where is None or (value < 22 if where == 0 else value > 42 if where == 1 else 23 < value < 41)
    return along(shape.x, PLACES[place][0]) and along(shape.y, PLACES[place][1])


# The grammar of captions:   caption   = clause {("," | "and" | "with" | "while" | ":") clause}
#                            clause    = [opening] (noun [[verb] predicate] | predicate [verb noun])
#                            predicate = relation noun | place | size | colour
# A clause without a noun goes on about the last one: "the star is big and above the ring".

def _any(words):
    return "(" + "|".join(words) + ")"


_JOIN = r"\s*(?:[,;:]\s*(?:and|with|while)\b|[,;:]|\b(?:and|with|while)\b)\s*"
_VERB = r"(?:there )?(?:is|are|sits|lies)"
_OPENING = (r"(?:(?:there|here) (?:is|are)|this is|(?:a|the|this) (?:picture|image|drawing) (?:of|shows)"
            r"|(?:we|you) (?:can )?see)")
_NOUN = (rf"(?:{_any(('a', 'the') + NUMBERS[1:6])} )?(?:{_any(SIZES)} )?(?:{_any(COLOURS)} )?"
         rf"{_any([*PLURAL, *PLURAL.values()])}")
_RELATION = r"(?:(?:(?:to|on) the )?(left|right) of|(above|below))"
_PLACE = rf"(?:in|at|on) the {_any(sorted(PLACES, key=len, reverse=True))}(?: corner| side)?"
_ATTRIBUTE = _any([*SIZES, *COLOURS])


class _Reader:
    """Reads one clause from left to right; each method takes what it finds and returns None if it is not there."""

    def __init__(self, text):
        self.rest = text

    def take(self, pattern):
        found = re.match(pattern + r"(?:\s+|$)", self.rest)
        if found:
            self.rest = self.rest[found.end():]
        return found

    def noun(self):
        found = self.take(_NOUN)
        if found is None:
            return None
        count, size, colour, kind = found.groups()
        singular = kind if kind in PLURAL else next(k for k in PLURAL if PLURAL[k] == kind)
        if count and (count in NUMBERS[2:]) == (kind == singular):
            return None   # "two circle", "a circles"
        return Noun(count if count or kind == singular else "some", size, colour, singular)

    def predicate(self):
        """A function (shape, scene) -> bool."""
        if found := self.take(_RELATION):
            word, noun = found[1] or found[2], self.noun()
            return noun and (lambda shape, scene: any(relation(shape, b) == word for b in noun.within(scene))
                             and (noun.count != "the" or len(noun.within(scene)) == 1))
        if found := self.take(_PLACE):
            return lambda shape, scene: is_at(shape, found[1])
        if found := self.take(_ATTRIBUTE):
            return lambda shape, scene: found[1] in (shape.size, shape.colour)


def _parse(caption):
    """caption -> [(Noun, [predicate, ...]), ...], or None when the grammar does not produce it."""
    clauses = []
    for text in re.split(_JOIN, caption.lower().strip().rstrip(".")):
        reader = _Reader(text.strip())
        reader.take(_OPENING)
        noun = reader.noun()
        verb = reader.take(_VERB)
        predicate = reader.predicate()
        if noun is None and predicate and (verb := reader.take(_VERB)):   # "above the ring there is a star"
            noun = reader.noun()
            if noun is None:
                return None
        if reader.rest or not (noun or predicate and clauses) or verb and not predicate:
            return None
        if noun:
            clauses.append((noun, []))
        if predicate:
            clauses[-1][1].append(predicate)
    return clauses or None


def is_true(caption, scene):
    """Does the caption describe the scene? True, False, or None where the grammar above does not produce the caption.

    "a" is at least one, and every new "a" is another shape; "the" is the only one; a number is exactly that many;
    relations and places hold only where they are clear (`relation`, `is_at`).

    >>> scene = Scene((Shape("star", "red", "big", 20, 10), Shape("ring", "blue", "small", 20, 50)))
    >>> [is_true(text, scene) for text in ("a red star above the ring", "two stars", "the sky is blue")]
    [True, False, None]
    """
    clauses = _parse(caption)
    if clauses is None:
        return None
    candidates = []   # for each "a": the shapes that it may stand for
    for noun, predicates in clauses:
        fitting = [s for s in noun.within(scene) if all(predicate(s, scene) for predicate in predicates)]
        if noun.count in NUMBERS:
            if len(fitting) != NUMBERS.index(noun.count):
                return False
        elif noun.count == "the":
            if not fitting or len(noun.within(scene)) != 1:
                return False
        elif noun.count == "some":   # "circles"
            if len(fitting) < 2:
                return False
        else:
            candidates.append(fitting)
    if len(candidates) > len(scene.shapes):
        return False
    return any(all(shape in fitting for shape, fitting in zip(chosen, candidates))
               for chosen in itertools.permutations(scene.shapes, len(candidates)))


# ---------------------------------------------------------------------------------------------------------------------
# Captions.

_FORMS = ("colour kind", "size colour kind", "kind", "size kind", "colour")   # what a noun phrase mentions, how often
_FORM_WEIGHTS = (50, 26, 10, 8, 6)


def _describe(shape, scene, rng, fits=lambda shape: True):
    """A noun phrase for the shape, such that with any one word hidden the picture still tells that word, if possible.

    `fits` is what the rest of the caption says: in "a ? above the red ring" only the shapes above it are in question.
    """
    for form in rng.choices(_FORMS, _FORM_WEIGHTS, k=6) + ["colour kind", "size colour kind"]:
        words = {name: getattr(shape, name) for name in form.split()}
        hidden = [Noun(**{k: v for k, v in words.items() if k != name}) for name in words]
        if all(sum(map(fits, noun.within(scene))) == 1 for noun in hidden):
            break
    noun = Noun(**words)   # in the last form, with all its words, where no form is enough
    return noun._replace(count="the" if len(noun.within(scene)) == 1 and rng.random() < .4 else "a")


def _where(word, rng):
    return rng.choice((f"to the {word} of", f"{word} of", f"on the {word} of")) if word in ("left", "right") else word


def _place(place):
    return f"in the {place} corner" if " " in place else {"middle": "in the middle", "top": "at the top",
                                                          "bottom": "at the bottom"}.get(place, f"on the {place} side")


def _related(scene):
    """All (a, word, b) that are clear in the picture."""
    return [(a, relation(a, b), b) for a, b in itertools.permutations(scene.shapes, 2) if relation(a, b)]


def _relation_clause(a, word, b, scene, rng):
    first = _describe(a, scene, rng, lambda s: relation(s, b) == word)
    second = _describe(b, scene, rng, lambda s: any(relation(f, s) == word for f in first.within(scene)))
    where = _where(word, rng)
    return rng.choice((f"{first} {where} {second}", f"{first} is {where} {second}", f"{first} sits {where} {second}",
                       f"{where} {second} is {first}", f"{where} {second} there is {first}"))


def _place_clause(shape, scene, rng):
    place = rng.choice([place for place in PLACES if is_at(shape, place)])
    noun = _describe(shape, scene, rng, lambda s: is_at(s, place))
    return rng.choice((f"{noun} {_place(place)}", f"{noun} is {_place(place)}", f"{_place(place)} there is {noun}"))


def _list(shapes, scene, rng, pair=(" and ",)):
    nouns = [str(_describe(shape, scene, rng)) for shape in shapes]
    last = rng.choice(pair if len(nouns) == 2 else (" and ", ", and "))
    return last.join(filter(None, (", ".join(nouns[:-1]), nouns[-1])))


def _counted(scene, rng):
    """A number and what it counts, with some of those or some of the rest."""
    n = len(scene.shapes)
    nouns = [Noun(NUMBERS[n])]
    for kind in KINDS:
        k = sum(s.kind == kind for s in scene.shapes)
        nouns += [Noun(NUMBERS[k], kind=kind)] * 2 if k > 1 else []   # rarer, so twice as likely to be spoken of
    noun = rng.choice(nouns)
    counted = noun.within(scene)
    rest = [s for s in scene.shapes if s not in counted]
    if not rest and n > 4:
        return f"{noun} with {_list(rng.sample(counted, 2), scene, rng)}"
    if not rest or rng.random() < .3:
        return f"{noun}: {_list(rng.sample(counted, len(counted)), scene, rng)}"
    return f"{noun}{rng.choice((' with ', ' and ', ', '))}{_list(rng.sample(rest, min(len(rest), 2)), scene, rng)}"


def _caption(scene, rng):
    n = len(scene.shapes)
    related = _related(scene)
    placed = [s for s in scene.shapes if any(is_at(s, place) for place in PLACES)]
    weights = {"one": 6, "list": 14 if n > 1 else 0, "relation": 40 if related else 0,
               "count": 14 if n > 1 else 0, "place": 26 if placed else 0}
    content = rng.choices(list(weights), list(weights.values()))[0]
    opening = rng.choice(("", "", "there is ", "here is ", "this is ", "we see ", "a picture of ", "this image shows "))

    if content == "one":
        shape = rng.choice(scene.shapes)
        noun = Noun("the", kind=shape.kind)
        if rng.random() < .3 and len(noun.within(scene)) == 1:
            return f"{noun} is " + rng.choice((shape.colour, f"{shape.size} and {shape.colour}"))
        return opening + str(_describe(shape, scene, rng))
    if content == "list":
        return opening + _list(rng.sample(scene.shapes, min(n, rng.choice((2, 2, 3)))), scene, rng, (" and ", " with "))
    if content == "count":
        return opening.replace(" is ", " are ").replace("this are ", "") + _counted(scene, rng)

    if content == "relation":
        a, word, b = rng.choice(related)
        text = _relation_clause(a, word, b, scene, rng)
        more = [(w, c) for x, w, c in related if x == a and c != b]
        if more and rng.random() < .2:   # a second relation of the same subject
            other, c = rng.choice(more)
            return f"{_describe(a, scene, rng)} is {_where(word, rng)} {_describe(b, scene, rng)} and " \
                   f"{_where(other, rng)} {_describe(c, scene, rng)}"
        used = {a, b}
    else:
        a = rng.choice(placed)
        text = _place_clause(a, scene, rng)
        used = {a}
    if not re.search(r"\b(is|sits)\b", text) and re.match("(a|the) ", text):
        text = opening + text
    others = [s for s in scene.shapes if s not in used]
    if others and rng.random() < .45:   # something about another shape
        shape = rng.choice(others)
        clauses = [str(_describe(shape, scene, rng))]
        if shape in placed:
            clauses.append(_place_clause(shape, scene, rng))
        clauses += [_relation_clause(*triple, scene, rng) for triple in related if triple[0] == shape][:1]
        text += rng.choice((", and ", ", ", ", while ", " and ")) + rng.choice(clauses)
    return text


def captions(scene, rng, n=5):
    """n true captions of the scene, as different as it allows, the longest first; lower case, no final full stop."""
    found = {}
    for _ in range(4 * n):
        found.setdefault(_caption(scene, rng))
        if len(found) == n:
            break
    found = list(found)
    found += [rng.choice(found) for _ in range(n - len(found))]
    return sorted(found, key=lambda caption: -caption.count(" "))


# ---------------------------------------------------------------------------------------------------------------------
# Questions (VQA) and statements about two pictures (NLVR2). Which answer is right is drawn first and the words second,
# alike for each answer, so that the words alone say as little about it as they can.

ANSWERS = [*COLOURS, *KINDS, *"012345", "yes", "no"]


def _allowed(pair, *scenes):
    """May this pair be mentioned? A held-out pair only where pictures show held-out pairs."""
    return pair not in HELD_OUT or any(p in HELD_OUT for scene in scenes for p in scene.pairs)


def _name(shape, scene, rng):
    """"the star", "the red star" or "the red shape": a phrase that fits this shape alone."""
    nouns = [Noun("the", kind=shape.kind), Noun("the", None, shape.colour, shape.kind), Noun("the", None, shape.colour)]
    return rng.choice([noun for noun in nouns if len(noun.within(scene)) == 1])


def _ask_colour(scene, rng):
    nouns = [(noun, s.colour) for s in scene.shapes
             for noun in (Noun("the", kind=s.kind), Noun("the", s.size, None, s.kind)) if len(noun.within(scene)) == 1]
    if nouns:
        noun, colour = rng.choice(nouns)
        return rng.choice((f"what colour is {noun}?", f"which colour does {noun} have?")), colour


def _ask_kind(scene, rng):
    shape = rng.choice(scene.shapes)
    return rng.choice((f"what is the {shape.colour} shape?", f"which shape is {shape.colour}?")), shape.kind


def _ask_count(scene, rng):
    form = rng.choice(("shape", "size", "kind"))
    if form == "kind":   # first the answer, then one of the kinds that have it: else nearly all answers are 0 and 1
        count = {kind: sum(s.kind == kind for s in scene.shapes) for kind in KINDS}
        answer = rng.choice(sorted(set(count.values())))
        noun = Noun("two", kind=rng.choice([kind for kind in KINDS if count[kind] == answer]))
    else:
        noun = Noun("two", rng.choice(tuple(SIZES)) if form == "size" else None)
    things = str(noun).removeprefix("two ")
    return rng.choice((f"how many {things} are there?", f"how many {things} do you see?")), str(len(noun.within(scene)))


def _ask_existence(scene, rng):
    if rng.random() < .5:
        pair, answer = rng.choice(scene.pairs), "yes"
    else:   # a near miss: colour and kind are both there, but apart; or, as often, only one of them is
        colours, kinds = ({pair[i] for pair in scene.pairs} for i in (0, 1))
        misses = {both: [p for p in itertools.product(COLOURS, KINDS)
                         if p not in scene.pairs and (p[0] in colours) + (p[1] in kinds) == both and _allowed(p, scene)]
                  for both in (1, 2)}
        pair, answer = rng.choice(misses[rng.choice((1, 2))] or misses[1]), "no"
    return rng.choice(("is there a {} {}?", "do you see a {} {}?")).format(*pair), answer


def _ask_size(scene, rng):
    size, asked = (rng.choice(tuple(SIZES)) for _ in (1, 2))   # not that of any shape: big ones are rarer
    shapes = [shape for shape in scene.shapes if shape.size == size]
    if 0 < len(shapes) < len(scene.shapes):
        return f"is {_name(rng.choice(shapes), scene, rng)} {asked}?", "yes" if asked == size else "no"


def _ask_relation(scene, rng):
    if related := _related(scene):
        a, word, b = rng.choice(related)
        asked, answer = (word, "yes") if rng.random() < .5 else (rng.choice([w for w in RELATIONS if w != word]), "no")
        return f"is {_name(a, scene, rng)} {_where(asked, rng)} {_name(b, scene, rng)}?", answer


def _ask_what(scene, rng):
    """What is above the ring: asked where one shape clearly is, and no other comes near to it."""
    def maybe(s, word, b):
        ahead = {"left": b.x - s.x, "right": s.x - b.x, "above": b.y - s.y, "below": s.y - b.y}[word]
        aside = abs(s.y - b.y) if word in ("left", "right") else abs(s.x - b.x)
        return ahead > 6 and ahead > .75 * aside
    clear = [(a, word, b) for a, word, b in _related(scene)
             if not any(maybe(s, word, b) for s in scene.shapes if s not in (a, b))]
    if clear:
        a, word, b = rng.choice(clear)
        place = f"{_where(word, rng)} {_name(b, scene, rng)}"
        return rng.choice(((f"what is {place}?", a.kind), (f"what colour is the shape {place}?", a.colour)))


QUESTIONS = (_ask_colour, _ask_kind, _ask_count, _ask_existence, _ask_size, _ask_relation, _ask_what)


def questions(scene, rng):
    """[(question, answer), ...]: one of each of QUESTIONS that the scene allows, with answers from ANSWERS."""
    found = [pair for ask in QUESTIONS if (pair := ask(scene, rng))]
    rng.shuffle(found)
    return found


# A statement counts a noun in both pictures, a times in the first and b times in the second, and claims something of
# (a, b, n). Columns: which nouns, the claim, the wordings. {side}: either picture may be the first; {n}: a number.
CLAIMS = (
    ("objects", lambda a, b, n: a, ("the {side} image contains {a}", "there is {a} in the {side} image")),
    ("pairs", lambda a, b, n: a, ("the {side} image contains {a}", "there is {a} in the {side} image")),
    ("objects", lambda a, b, n: a and not b, ("the {side} image contains {a} but the {other} image does not",
                                              "there is {a} in the {side} image but not in the {other} one")),
    ("kinds", lambda a, b, n: a == n, ("there are exactly {n} {many} in the {side} image",)),
    ("objects", lambda a, b, n: a and b, ("both images contain {a}", "there is {a} in each of the two images")),
    ("objects", lambda a, b, n: bool(a) != bool(b), ("exactly one image contains {a}",
                                                     "{a} is in only one of the two images")),
    ("pairs", lambda a, b, n: a or b, ("at least one image contains {a}",
                                       "there is {a} in the left or in the right image")),
    ("pairs", lambda a, b, n: not a and not b, ("neither image contains {a}", "{a} is in none of the two images")),
    *((group, lambda a, b, n: a > b, ("there are more {many} in the {side} image than in the {other} image",
                                      "the {side} image contains more {many} than the {other} image"))
      for group in ("kinds", "sizes", "shapes")),
    ("kinds", lambda a, b, n: a == 2 * b, ("the {side} image contains twice as many {many} as the {other} image",)),
    ("kinds", lambda a, b, n: a == b, ("both images contain the same number of {many}",
                                       "there are as many {many} in the left image as in the right image")),
    *((group, lambda a, b, n: a + b == n, ("there are {n} {many} in total", "the two images contain {n} {many} together"))
      for group in ("kinds", "shapes")),
    ("kinds", lambda a, b, n: (a == 2) != (b == 2), ("exactly one image contains two {many}",)),
)


def _nouns(group, left, right):
    colours, kinds = ({pair[i] for scene in (left, right) for pair in scene.pairs} for i in (0, 1))
    if group == "pairs":   # also those that are nowhere, though their colour and their kind are
        return [Noun("a", None, *pair) for pair in itertools.product(COLOURS, KINDS)
                if pair[0] in colours and pair[1] in kinds and _allowed(pair, left, right)]
    return {"objects": [Noun("a", None, *pair) for pair in sorted({*left.pairs, *right.pairs})],
            "kinds": [Noun("a", kind=kind) for kind in KINDS if kind in kinds],
            "sizes": [Noun("a", size) for size in SIZES], "shapes": [Noun("a")]}[group]


def _holds(wording, claim, noun, side, n, left, right):
    """Is the claim true of the two scenes? None where it would be idle: "twice as many stars" where there is none."""
    a, b = len(noun.within(left)), len(noun.within(right))
    if "{a}" not in wording and a + b < 2 or "twice" in wording and not a * b:
        return None
    return bool(claim(b, a, n) if side == "right" else claim(a, b, n))


def statement(left, right, rng):
    """(sentence, holds): a sentence about two scenes, and holds(left, right) -> True, False, None (it makes no sense).

    A claim is used only if it can be made both truly and falsely of these two scenes, and a coin decides which. Returns
    None where there is no such claim.
    """
    for group, claim, wordings in rng.sample(CLAIMS, len(CLAIMS)):
        wording, found = rng.choice(wordings), {True: [], False: [], None: []}
        for noun in _nouns(group, left, right):
            total = len(noun.within(left) + noun.within(right))
            numbers = range(max(2, total - 1), min(10, total + 1) + 1) if "{n}" in wording else (None,)
            for side, n in itertools.product(("left", "right") if "{side}" in wording else ("left",), numbers):
                holds = functools.partial(_holds, wording, claim, noun, side, n)
                found[holds(left, right)].append((noun, side, n, holds))
        if found[True] and found[False]:
            noun, side, n, holds = rng.choice(found[rng.random() < .5])
            many = str(noun._replace(count="two")).removeprefix("two ")
            return wording.format(a=noun, many=many, side=side, other={"left": "right", "right": "left"}[side],
                                  n=n and NUMBERS[n]), holds
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Files.

SPLITS = ("train", "val", "test", "holdout")


def encode(image):
    """JPEG bytes without colour subsampling, which would blur the small shapes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _picture(seed, size, split, index):
    """Picture `index` of a split: its row of the captions, its row of VQA, its line of toy_scenes.jsonl."""
    rng = random.Random(f"{seed} {split} {index}")   # seeded by a hash of the text, the same on every machine
    scene = sample_scene(rng, split == "holdout")
    image = encode(draw(scene, size, rng))
    image_id = SPLITS.index(split) * 10 ** 8 + index
    texts, asked = captions(scene, rng), questions(scene, rng)
    return ({"image": image, "caption": texts, "image_id": str(image_id), "split": split},
            {"image": image, "image_id": image_id, "split": split,
             "questions": [question for question, _ in asked], "answers": [[answer] for _, answer in asked],
             "answer_labels": [[ANSWERS.index(answer)] for _, answer in asked],
             "answer_scores": [[1.0]] * len(asked), "question_id": [image_id * 10 + k for k in range(len(asked))]},
            json.dumps({"split": split, "image_id": image_id, "shapes": [astuple(s) for s in scene.shapes]}) + "\n")


def _partner(scene, rng, held_out):
    """A second scene that mostly has some shapes of the first; by chance there would be little to say of both."""
    shared = rng.sample(scene.pairs, min(len(scene.shapes), rng.choice((0, 1, 1, 2))))
    return sample_scene(rng, held_out, shared)


def _pair(seed, size, split, index):
    """Pair `index` of a split: its row of NLVR2, and the two scenes."""
    rng, held_out = random.Random(f"{seed} nlvr2 {split} {index}"), split == "holdout"
    while True:
        scene = sample_scene(rng, held_out)
        scenes = [scene, _partner(scene, rng, held_out)]
        rng.shuffle(scenes)
        found = statement(*scenes, rng)
        if found is None:
            continue
        sentence, holds = found
        # A second coin: half of the sentences move to scenes of which the opposite holds. So each single sentence is as
        # often true as false, and no reader of the words alone can beat chance.
        truth = holds(*scenes) is (rng.random() < .5)
        for _ in range(500):   # "nine stars together": very rarely there is no such pair, then start again
            if holds(*scenes) is truth:
                left, right = (encode(draw(scene, size, rng)) for scene in scenes)
                return {"image_0": left, "image_1": right, "questions": [sentence], "answers": [str(truth)],
                        "identifier": f"toy_{'dev' if split == 'val' else split}-{index}-0-1"}, scenes
            side = rng.randrange(2)
            scenes[side] = _partner(scenes[1 - side], rng, held_out)


def make(out, images=20000, eval_images=1000, size=64, seed=0, workers=None):
    """Writes the world into the folder `out`; the same arguments give the same bytes, for any number of `workers`.

        toy_caption_{train,val,test,holdout}.arrow   pictures, five captions each
        toy_vqa_{train,val,test,holdout}.arrow       the same pictures, six or seven questions each
        toy_nlvr2_{train,dev,test,holdout}.arrow     pairs of other pictures, half as many
        toy_scenes.jsonl                             what is in each picture (`load_scenes`)
        toy_vqa_answers.json, toy_words.json         the answer of each label; the word groups for evaluation
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; a folder is expected")
    if size < 32:
        raise ValueError(f"--size {size}: below 32 pixels the small shapes cannot be told apart")
    if images < 1 or eval_images < 1:
        raise ValueError(f"--images {images} --eval-images {eval_images}: at least one picture is needed of each")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: at least one process is needed")
    out.mkdir(parents=True, exist_ok=True)
    rows = {split: images if split == "train" else eval_images for split in SPLITS}
    pairs = {split: max(1, n // 2) for split, n in rows.items()}
    total = sum(rows.values()) + sum(pairs.values())
    with multiprocessing.Pool(workers) as pool, tqdm(total=total, unit=" rows") as bar:
        def write(make_row, split, n, *files):
            for parts in pool.imap(functools.partial(make_row, seed, size, split), range(n), chunksize=100):
                for file, part in zip(files, parts):
                    file.write(part)
                bar.update()

        with open(out / "toy_scenes.jsonl.partial", "w") as scenes:
            for split in SPLITS:
                with Writer(out / f"toy_caption_{split}.arrow", CAPTIONS) as captioned, \
                        Writer(out / f"toy_vqa_{split}.arrow", VQA) as asked:
                    write(_picture, split, rows[split], captioned, asked, scenes)
        os.replace(out / "toy_scenes.jsonl.partial", out / "toy_scenes.jsonl")
        for split in SPLITS:
            with Writer(out / f"toy_nlvr2_{'dev' if split == 'val' else split}.arrow", NLVR2) as stated:
                write(_pair, split, pairs[split], stated)
    words = {"colours": list(COLOURS), "shapes": [*KINDS, *map(PLURAL.get, KINDS)], "relations": list(RELATIONS)}
    (out / "toy_words.json").write_text(json.dumps(words, indent=1) + "\n")
    (out / "toy_vqa_answers.json").write_text(json.dumps(ANSWERS, indent=1) + "\n")


def load_scenes(path):
    """toy_scenes.jsonl -> {image_id as a string, as in the caption files: Scene}."""
    with open(path) as lines:
        rows = map(json.loads, lines)
        return {str(row["image_id"]): Scene(tuple(Shape(*shape) for shape in row["shapes"])) for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write into")
    parser.add_argument("--images", type=int, default=20000, help="training pictures (20000); half as many NLVR2 pairs")
    parser.add_argument("--eval-images", type=int, default=1000, help="pictures in each of val, test, holdout (1000)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes (one per core)")
    options = parser.parse_args()
    try:
        make(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(2, f"toy.py: {error}\n")


if __name__ == "__main__":
    main()
