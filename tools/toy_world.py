"""The drawn world: scenes of coloured shapes, their pictures, and what is true of them.

    >>> scene = Scene((Shape("star", "red", "big", 20, 10), Shape("ring", "blue", "small", 20, 50)))
    >>> [is_true(text, scene) for text in ("a red star above the ring", "two stars", "blue sky")]
    [True, False, None]

Lengths and positions are in 64ths of the picture's side, whatever size is drawn; y points down.
Each function that draws lots takes `rng`, a random.Random: the same seed gives the same world.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# --------------------------------------------------------------------------------------------------
# Scenes. No colour begins with a vowel: "an" would give away "orange" without the picture.

COLOURS = {"red": (215, 25, 30), "green": (20, 140, 45), "blue": (30, 70, 215),
           "yellow": (245, 215, 20), "purple": (120, 35, 155), "pink": (255, 130, 195),
           "cyan": (30, 195, 220), "black": (25, 25, 25)}
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 4.5, "big": 7.2}                     # radius
# Shapes stand loosely on a grid of 4 x 4. A ViT whose patches are the grid's cells sees each shape
# nearly whole, and learns within minutes. With shapes anywhere it learned colours in that time, but
# few kinds (docs/LOG.md).
CELL, LOOSE = 16, 2
RELATIONS = ("left", "right", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURAL = {"shape": "shapes", "circle": "circles", "square": "squares", "triangle": "triangles",
          "star": "stars", "cross": "crosses", "ring": "rings"}
SINGULAR = {many: one for one, many in PLURAL.items()}
# Name of a place -> where a centre there is along x and y, between two numbers.
START, MIDDLE, END, ANYWHERE = (0, 22), (23, 41), (42, 64), (0, 64)
PLACES = {"top left": (START, START), "top": (ANYWHERE, START), "top right": (END, START),
          "left": (START, ANYWHERE), "middle": (MIDDLE, MIDDLE), "right": (END, ANYWHERE),
          "bottom left": (START, END), "bottom": (ANYWHERE, END), "bottom right": (END, END)}
# Never together outside the holdout split, in pictures or in words. They show whether a model can
# combine what it has only seen apart.
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
    shapes: tuple[Shape, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(colour, kind) of each shape."""
        return [(shape.colour, shape.kind) for shape in self.shapes]


def sample_scene(rng: random.Random, held_out: bool = False,
                 include: Sequence[tuple[str, str]] = ()) -> Scene:
    """A scene of 1 to 5 shapes that do not touch.

    All colours are different. So are all kinds, except in a quarter of the scenes of two or more
    shapes, which repeat one. No pair of HELD_OUT occurs; with `held_out`, at least one does.
    include: (colour, kind) pairs that must occur.
    """
    drawn = rng.choices((1, 2, 3, 4, 5), (12, 22, 24, 22, 20))[0]
    count = max(len(include) + held_out, drawn)
    new = count - len(include)
    while True:
        repeats = rng.choices((0, 1, 2), (75, 17, 8))[0]
        colours = [colour for colour, _ in include]
        kinds = [kind for _, kind in include]
        colours += rng.sample([colour for colour in COLOURS if colour not in colours], new)
        kinds += rng.sample([kind for kind in KINDS if kind not in kinds], new)
        for i in range(min(repeats, new, count - 1)):
            kinds[-1 - i] = kinds[0]
        pairs = list(zip(colours, kinds, strict=True))
        if any(pair in HELD_OUT for pair in pairs) == held_out:
            break
    rng.shuffle(pairs)
    while True:
        shapes = place_shapes(pairs, rng)
        if shapes is not None:
            return Scene(tuple(rng.sample(shapes, count)))


def place_shapes(pairs: list[tuple[str, str]], rng: random.Random) -> list[Shape] | None:
    """Shapes of these (colour, kind) pairs at random places; None if one of them finds no room."""
    shapes = []
    sizes = sorted(rng.choices(tuple(SIZES), k=len(pairs)))     # the big ones first
    for (colour, kind), size in zip(pairs, sizes, strict=True):
        place = find_room(SIZES[size], shapes, rng)
        if place is None:
            return None
        shapes.append(Shape(kind, colour, size, *place))
    return shapes


def find_room(radius: float, others: list[Shape], rng: random.Random) -> tuple[float, float] | None:
    """A random centre for a shape that touches no other; None after ten tries."""
    for _ in range(10):
        x, y = (CELL * (rng.randrange(4) + 0.5) + rng.uniform(-LOOSE, LOOSE) for _ in "xy")
        x, y = (min(max(value, radius + 0.5), 63.5 - radius) for value in (x, y))
        if all(math.hypot(x - s.x, y - s.y) > radius + SIZES[s.size] + 0.5 for s in others):
            return round(x, 1), round(y, 1)
    return None


# --------------------------------------------------------------------------------------------------
# Drawing.

def corners(number: int, *radii: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon around the origin, the first on top. Two radii: a star."""
    turn = 2 * math.pi / number
    return [(radius * math.sin(i * turn), -radius * math.cos(i * turn))
            for i, radius in zip(range(number), itertools.cycle(radii))]


ARM, HALF = 1.0, 0.34                                  # a cross's arm: length, half the width
OUTLINES = {                                           # in radii
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": corners(3, 1.15),
    "star": corners(10, 1.15, 0.45),
    "cross": [(-HALF, -ARM), (HALF, -ARM), (HALF, -HALF),
              (ARM, -HALF), (ARM, HALF), (HALF, HALF),
              (HALF, ARM), (-HALF, ARM), (-HALF, HALF),
              (-ARM, HALF), (-ARM, -HALF), (-HALF, -HALF)],
}


def draw(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of size x size pixels; tints and noise are random."""
    scale = 2 * size / 64                              # drawn at twice the size, for smooth edges
    grey = rng.randint(214, 234)
    ground = tuple(grey + rng.randint(-6, 6) for _ in "rgb")
    image = Image.new("RGB", (2 * size, 2 * size), ground)
    pen = ImageDraw.Draw(image)
    for s in scene.shapes:
        r = SIZES[s.size]
        fill = tuple(max(0, min(255, c + rng.randint(-10, 10))) for c in COLOURS[s.colour])
        box = [scale * value for value in (s.x - r, s.y - r, s.x + r, s.y + r)]
        if s.kind == "circle":
            pen.ellipse(box, fill)
        elif s.kind == "ring":
            pen.ellipse(box, None, fill, round(scale * 0.38 * r))
        else:
            pen.polygon([(scale * (s.x + r * dx), scale * (s.y + r * dy))
                         for dx, dy in OUTLINES[s.kind]], fill)
    pixels = np.asarray(image.reduce(2)).astype(np.int16)
    noise = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size, 1) % 7
    return Image.fromarray((pixels + noise - 3).clip(0, 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Meaning: what a noun phrase, a relation and a place say about a scene.

class Noun(NamedTuple):
    """A noun phrase such as "a small red circle"; what is None or "shape" is left open.

    >>> str(Noun("two", colour="red", kind="cross"))
    'two red crosses'
    """
    count: str | None = None    # "a", "the", "some" or a number; None: no article
    size: str | None = None
    colour: str | None = None
    kind: str = "shape"

    def matches(self, shape: Shape) -> bool:
        return (self.size in (None, shape.size)
                and self.colour in (None, shape.colour)
                and self.kind in ("shape", shape.kind))

    def within(self, scene: Scene) -> list[Shape]:
        """The shapes that the phrase may stand for."""
        return [shape for shape in scene.shapes if self.matches(shape)]

    def number(self, scene: Scene) -> int:
        return len(self.within(scene))

    @property
    def plural(self) -> str:
        """The phrase without its article, for several: "small red circles"."""
        return " ".join(word for word in (self.size, self.colour, PLURAL[self.kind]) if word)

    def __str__(self):
        if self.count in NUMBERS[2:]:
            return f"{self.count} {self.plural}"
        return " ".join(word for word in (self.count, self.size, self.colour, self.kind) if word)


def relation(a: Shape, b: Shape) -> str | None:
    """The word of RELATIONS that says where a is, seen from b; None where the picture is unclear.

    Clear means: at least 12 apart along one axis, and at least 1.5 times as far as along the other.
    """
    dx, dy = a.x - b.x, a.y - b.y
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if far < 12 or far < 1.5 * near:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def is_at(shape: Shape, place: str) -> bool:
    """Whether the shape is clearly at a place of PLACES."""
    (left, right), (top, bottom) = PLACES[place]
    return left < shape.x < right and top < shape.y < bottom


# --------------------------------------------------------------------------------------------------
# Truth. The grammar of captions:
#
#     caption   = clause {("," | "and" | "with" | "while" | ":") clause}
#     clause    = [opening] (noun [[verb] predicate] | predicate [verb noun])
#     predicate = relation noun | place | size | colour
#
# A clause without a noun goes on about the last one: "the star is big and above the ring".

def one_of(words) -> str:
    """A regular expression for any of the words."""
    return "(" + "|".join(words) + ")"


JOINT = r"\s*(?:[,;:]\s*(?:and|with|while)\b|[,;:]|\b(?:and|with|while)\b)\s*"
VERB = r"(?:there )?(?:is|are|sits|lies)"
OPENING = (r"(?:(?:there|here) (?:is|are)|this is"
           r"|(?:a|the|this) (?:picture|image|drawing) (?:of|shows)|(?:we|you) (?:can )?see)")
NOUN = (rf"(?:{one_of(('a', 'the') + NUMBERS[1:6])} )?(?:{one_of(SIZES)} )?"
        rf"(?:{one_of(COLOURS)} )?{one_of([*PLURAL, *SINGULAR])}")
RELATION = r"(?:(?:(?:to|on) the )?(left|right) of|(above|below))"
LONGEST_FIRST = sorted(PLACES, key=len, reverse=True)       # else "top" is read of "top left"
PLACE = rf"(?:in|at|on) the {one_of(LONGEST_FIRST)}(?: corner| side)?"
ATTRIBUTE = one_of([*SIZES, *COLOURS])


class Predicate(NamedTuple):
    """What is said of a shape: a relation to a noun, or a place, a size or a colour without one."""
    word: str
    noun: Noun | None = None

    def holds(self, shape: Shape, scene: Scene) -> bool:
        if self.word in PLACES and self.noun is None:
            return is_at(shape, self.word)
        if self.noun is None:
            return self.word in (shape.size, shape.colour)
        others = self.noun.within(scene)
        if self.noun.count == "the" and len(others) != 1:
            return False
        return any(relation(shape, other) == self.word for other in others)


class Reader:
    """Reads a clause from left to right. Each method takes what it finds, or returns None."""

    def __init__(self, text: str):
        self.rest = text

    def take(self, pattern: str) -> re.Match | None:
        found = re.match(pattern + r"(?:\s+|$)", self.rest)
        if found:
            self.rest = self.rest[found.end():]
        return found

    def noun(self) -> Noun | None:
        found = self.take(NOUN)
        if found is None:
            return None
        count, size, colour, kind = found.groups()
        plural = kind in SINGULAR
        if count and plural != (count in NUMBERS[2:]):      # "two circle", "a circles"
            return None
        if plural:
            return Noun(count or "some", size, colour, SINGULAR[kind])
        return Noun(count, size, colour, kind)

    def predicate(self) -> Predicate | None:
        found = self.take(RELATION)
        if found:
            noun = self.noun()
            return noun and Predicate(found[1] or found[2], noun)
        found = self.take(PLACE) or self.take(ATTRIBUTE)
        return found and Predicate(found[1])


def parse(caption: str) -> list[tuple[Noun, list[Predicate]]] | None:
    """The nouns of a caption and what is said of each; None if the grammar does not produce it."""
    said = []
    for text in re.split(JOINT, caption.lower().strip().rstrip(".")):
        reader = Reader(text.strip())
        reader.take(OPENING)
        noun = reader.noun()
        verb = reader.take(VERB)
        predicate = reader.predicate()
        if predicate and not noun and reader.take(VERB):    # "above the ring there is a star"
            noun = reader.noun()
            if noun is None:
                return None
        if reader.rest or (verb and not predicate):         # unknown words, or "a star is"
            return None
        if noun:
            said.append((noun, []))
        if predicate and said:
            said[-1][1].append(predicate)
        elif not noun:
            return None
    return said


def is_true(caption: str, scene: Scene) -> bool | None:
    """Whether the caption describes the scene; None if the grammar does not produce the caption.

    "a" is at least one, and every new "a" is another shape. "the" is the only one. A number is
    exactly that many. Relations and places hold only where they are clear (`relation`, `is_at`).
    """
    said = parse(caption)
    if said is None:
        return None
    candidates = []             # for each "a": the shapes that it may stand for
    for noun, predicates in said:
        fitting = [shape for shape in noun.within(scene)
                   if all(predicate.holds(shape, scene) for predicate in predicates)]
        if noun.count in NUMBERS:
            fits = len(fitting) == NUMBERS.index(noun.count)
        elif noun.count == "the":
            fits = len(fitting) == noun.number(scene) == 1
        elif noun.count == "some":
            fits = len(fitting) >= 2
        else:
            fits = len(fitting) >= 1
            candidates.append(fitting)
        if not fits:
            return False
    # Can each "a" have a shape that no other "a" has?
    return any(all(shape in fitting for shape, fitting in zip(chosen, candidates, strict=True))
               for chosen in itertools.permutations(scene.shapes, len(candidates)))
