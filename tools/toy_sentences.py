"""What is said about the drawn world: captions, questions, statements about two pictures.

All that is said is true, or known to be false. Words alone give nothing away: a caption's words can
be told from the picture, and the words of a question or statement say little about its answer.
Each function that draws lots takes `rng`, a random.Random: the same seed gives the same sentences.
"""

import itertools
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from tools.toy_world import (COLOURS, HELD_OUT, KINDS, NUMBERS, PLACES, RELATIONS, SIZES, Noun,
                             Scene, Shape, is_at, relation)

# --------------------------------------------------------------------------------------------------
# Phrases.

# What a noun phrase mentions, and how often.
FORMS = {"colour kind": 50, "size colour kind": 26, "kind": 10, "size kind": 8, "colour": 6}


def describe(shape: Shape, scene: Scene, rng: random.Random,
             fits: Callable[[Shape], bool] = lambda shape: True) -> Noun:
    """A noun phrase for the shape. If one word of it is hidden, the picture still tells that word.

    fits: what the rest of the caption says. In "a ? above the red ring" only shapes above it count.
    Where no form is so clear, the phrase has all its words.
    """
    def is_told(hidden):                # the phrase without this word still fits one shape only
        others = {name: word for name, word in words.items() if name != hidden}
        return sum(fits(other) for other in Noun(**others).within(scene)) == 1

    forms = rng.choices(list(FORMS), list(FORMS.values()), k=6)
    for form in [*forms, "colour kind", "size colour kind"]:
        words = {name: getattr(shape, name) for name in form.split()}
        if all(is_told(name) for name in words):
            break
    noun = Noun(**words)
    definite = noun.number(scene) == 1 and rng.random() < 0.4
    return noun._replace(count="the" if definite else "a")


def relation_phrase(word: str, rng: random.Random) -> str:
    """"left" -> "to the left of" or another wording of the same."""
    if word in ("left", "right"):
        return rng.choice((f"to the {word} of", f"{word} of", f"on the {word} of"))
    return word


def place_phrase(place: str) -> str:
    """"top left" -> "in the top left corner"."""
    if " " in place:
        return f"in the {place} corner"
    known = {"middle": "in the middle", "top": "at the top", "bottom": "at the bottom"}
    return known.get(place, f"on the {place} side")


def clear_relations(scene: Scene) -> list[tuple[Shape, str, Shape]]:
    """All (a, word, b) that are clear in the picture, such as (star, "above", ring)."""
    return [(a, relation(a, b), b) for a, b in itertools.permutations(scene.shapes, 2)
            if relation(a, b)]


def relation_clause(a: Shape, word: str, b: Shape, scene: Scene, rng: random.Random) -> str:
    first = describe(a, scene, rng, lambda s: relation(s, b) == word)
    firsts = first.within(scene)
    second = describe(b, scene, rng, lambda s: any(relation(f, s) == word for f in firsts))
    where = relation_phrase(word, rng)
    return rng.choice((f"{first} {where} {second}",
                       f"{first} is {where} {second}",
                       f"{first} sits {where} {second}",
                       f"{where} {second} is {first}",
                       f"{where} {second} there is {first}"))


def places_of(shape: Shape) -> list[str]:
    return [place for place in PLACES if is_at(shape, place)]


def place_clause(shape: Shape, scene: Scene, rng: random.Random) -> str:
    place = rng.choice(places_of(shape))
    noun = describe(shape, scene, rng, lambda s: is_at(s, place))
    where = place_phrase(place)
    return rng.choice((f"{noun} {where}", f"{noun} is {where}", f"{where} there is {noun}"))


def listing(shapes: list[Shape], scene: Scene, rng: random.Random, pair=(" and ",)) -> str:
    """"a red star, a ring and a cross". pair: what may stand between two."""
    nouns = [str(describe(shape, scene, rng)) for shape in shapes]
    joint = rng.choice(pair if len(nouns) == 2 else (" and ", ", and "))
    if len(nouns) == 1:
        return nouns[0]
    return ", ".join(nouns[:-1]) + joint + nouns[-1]


# --------------------------------------------------------------------------------------------------
# Captions. Each function gives the clauses of one content.

def one_shape(scene: Scene, opening: str, rng: random.Random) -> str:
    shape = rng.choice(scene.shapes)
    noun = Noun("the", kind=shape.kind)
    if rng.random() < 0.3 and noun.number(scene) == 1:
        return f"{noun} is " + rng.choice((shape.colour, f"{shape.size} and {shape.colour}"))
    return opening + str(describe(shape, scene, rng))


def some_shapes(scene: Scene, opening: str, rng: random.Random) -> str:
    number = min(len(scene.shapes), rng.choice((2, 2, 3)))
    return opening + listing(rng.sample(scene.shapes, number), scene, rng, (" and ", " with "))


def counted_shapes(scene: Scene, opening: str, rng: random.Random) -> str:
    """A number and what it counts, with some of those or some of the rest."""
    opening = opening.replace(" is ", " are ").replace("this are ", "")
    total = len(scene.shapes)
    nouns = [Noun(NUMBERS[total])]
    for kind in KINDS:
        same = Noun(kind=kind).number(scene)
        if same > 1:
            nouns += [Noun(NUMBERS[same], kind=kind)] * 2   # rarer, so twice as likely to be named
    noun = rng.choice(nouns)
    counted = noun.within(scene)
    rest = [shape for shape in scene.shapes if shape not in counted]
    if not rest and total > 4:
        joint, named = " with ", rng.sample(counted, 2)
    elif not rest or rng.random() < 0.3:
        joint, named = ": ", rng.sample(counted, len(counted))
    else:
        joint, named = rng.choice((" with ", " and ", ", ")), rng.sample(rest, min(len(rest), 2))
    return opening + str(noun) + joint + listing(named, scene, rng)


def related_shapes(scene: Scene, opening: str, rng: random.Random) -> str:
    related = clear_relations(scene)
    a, word, b = rng.choice(related)
    text = relation_clause(a, word, b, scene, rng)
    more = [(other, c) for shape, other, c in related if shape == a and c != b]
    if more and rng.random() < 0.2:                         # a second relation of the same shape
        other, c = rng.choice(more)
        return (f"{describe(a, scene, rng)} is "
                f"{relation_phrase(word, rng)} {describe(b, scene, rng)} and "
                f"{relation_phrase(other, rng)} {describe(c, scene, rng)}")
    return add_opening(opening, text) + another_shape(scene, (a, b), rng)


def placed_shape(scene: Scene, opening: str, rng: random.Random) -> str:
    shape = rng.choice([shape for shape in scene.shapes if places_of(shape)])
    text = place_clause(shape, scene, rng)
    return add_opening(opening, text) + another_shape(scene, (shape,), rng)


def add_opening(opening: str, text: str) -> str:
    """The opening before a phrase without a verb; other clauses stand alone."""
    if re.match("(a|the) ", text) and not re.search(r"\b(is|sits)\b", text):
        return opening + text
    return text


def another_shape(scene: Scene, named: tuple[Shape, ...], rng: random.Random) -> str:
    """Often, something about a shape that has not been named; else nothing."""
    others = [shape for shape in scene.shapes if shape not in named]
    if not others or rng.random() >= 0.45:
        return ""
    shape = rng.choice(others)
    clauses = [str(describe(shape, scene, rng))]
    if places_of(shape):
        clauses.append(place_clause(shape, scene, rng))
    # One is used; that all are drawn keeps the worlds of a seed as they have always been.
    clauses += [relation_clause(*triple, scene, rng) for triple in clear_relations(scene)
                if triple[0] == shape][:1]
    return rng.choice((", and ", ", ", ", while ", " and ")) + rng.choice(clauses)


OPENINGS = ("", "", "there is ", "here is ", "this is ", "we see ", "a picture of ",
            "this image shows ")


def one_caption(scene: Scene, rng: random.Random) -> str:
    several = len(scene.shapes) > 1
    weights = {one_shape: 6,
               some_shapes: 14 if several else 0,
               related_shapes: 40 if clear_relations(scene) else 0,
               counted_shapes: 14 if several else 0,
               placed_shape: 26 if any(map(places_of, scene.shapes)) else 0}
    content = rng.choices(list(weights), list(weights.values()))[0]
    return content(scene, rng.choice(OPENINGS), rng)


def captions(scene: Scene, rng: random.Random, number: int = 5) -> list[str]:
    """True captions of the scene, as different as it allows, the longest first.

    They are in lower case and have no final full stop.
    """
    found = []
    for _ in range(4 * number):
        caption = one_caption(scene, rng)
        if caption not in found:
            found.append(caption)
        if len(found) == number:
            break
    found += [rng.choice(found) for _ in range(number - len(found))]
    return sorted(found, key=lambda caption: -caption.count(" "))


# --------------------------------------------------------------------------------------------------
# Questions (VQA). The right answer is drawn first and the words second, in the same way for each
# answer. So the words alone say as little as they can about the answer.

ANSWERS = [*COLOURS, *KINDS, *"012345", "yes", "no"]


def may_be_named(pair: tuple[str, str], *scenes: Scene) -> bool:
    """Whether a (colour, kind) may be named: a held-out one only where scenes show such pairs."""
    if pair not in HELD_OUT:
        return True
    return any(shown in HELD_OUT for scene in scenes for shown in scene.pairs)


def unique_name(shape: Shape, scene: Scene, rng: random.Random) -> Noun:
    """"the star", "the red star" or "the red shape": a phrase that fits this shape alone."""
    nouns = [Noun("the", kind=shape.kind),
             Noun("the", colour=shape.colour, kind=shape.kind),
             Noun("the", colour=shape.colour)]
    return rng.choice([noun for noun in nouns if noun.number(scene) == 1])


def ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    nouns = []
    for shape in scene.shapes:
        nouns += [Noun("the", kind=shape.kind), Noun("the", shape.size, kind=shape.kind)]
    nouns = [noun for noun in nouns if noun.number(scene) == 1]
    if not nouns:
        return None
    noun = rng.choice(nouns)
    question = rng.choice((f"what colour is {noun}?", f"which colour does {noun} have?"))
    return question, noun.within(scene)[0].colour


def ask_kind(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.shapes)
    question = rng.choice((f"what is the {shape.colour} shape?", f"which shape is {shape.colour}?"))
    return question, shape.kind


def ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    noun = Noun()
    form = rng.choice(("shape", "size", "kind"))
    if form == "size":
        noun = Noun(size=rng.choice(tuple(SIZES)))
    elif form == "kind":
        # First the answer, then a kind that has it. Otherwise nearly all answers would be 0 and 1.
        numbers = {kind: Noun(kind=kind).number(scene) for kind in KINDS}
        answer = rng.choice(sorted(set(numbers.values())))
        noun = Noun(kind=rng.choice([kind for kind in KINDS if numbers[kind] == answer]))
    question = rng.choice((f"how many {noun.plural} are there?",
                           f"how many {noun.plural} do you see?"))
    return question, str(noun.number(scene))


def ask_existence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        pair, answer = rng.choice(scene.pairs), "yes"
    else:
        # A near miss. Colour and kind are both there, but apart; or, as often, only one of them is.
        colours, kinds = (set(words) for words in zip(*scene.pairs, strict=True))
        misses = {0: [], 1: [], 2: []}                  # by how many of the two are there
        for colour, kind in itertools.product(COLOURS, KINDS):
            if (colour, kind) not in scene.pairs and may_be_named((colour, kind), scene):
                misses[(colour in colours) + (kind in kinds)].append((colour, kind))
        pair, answer = rng.choice(misses[rng.choice((1, 2))] or misses[1]), "no"
    return rng.choice(("is there a {} {}?", "do you see a {} {}?")).format(*pair), answer


def ask_size(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    # Both drawn freely, and not from the shapes: most of those are small or most are big.
    size, asked = (rng.choice(tuple(SIZES)) for _ in range(2))
    shapes = [shape for shape in scene.shapes if shape.size == size]
    if len(shapes) in (0, len(scene.shapes)):
        return None
    name = unique_name(rng.choice(shapes), scene, rng)
    return f"is {name} {asked}?", "yes" if asked == size else "no"


def ask_relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    related = clear_relations(scene)
    if not related:
        return None
    a, word, b = rng.choice(related)
    answer = "yes"
    if rng.random() >= 0.5:
        word, answer = rng.choice([other for other in RELATIONS if other != word]), "no"
    name = unique_name(a, scene, rng)
    return f"is {name} {relation_phrase(word, rng)} {unique_name(b, scene, rng)}?", answer


def ask_what(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """What is above the ring: asked where one shape clearly is, and no other comes near to it."""
    def could_be(s, word, b):
        right, down = s.x - b.x, s.y - b.y
        ahead = {"left": -right, "right": right, "above": -down, "below": down}[word]
        aside = abs(down) if word in ("left", "right") else abs(right)
        return ahead > 6 and ahead > 0.75 * aside

    clear = [(a, word, b) for a, word, b in clear_relations(scene)
             if not any(could_be(s, word, b) for s in scene.shapes if s not in (a, b))]
    if not clear:
        return None
    a, word, b = rng.choice(clear)
    place = f"{relation_phrase(word, rng)} {unique_name(b, scene, rng)}"
    return rng.choice(((f"what is {place}?", a.kind),
                       (f"what colour is the shape {place}?", a.colour)))


QUESTIONS = (ask_colour, ask_kind, ask_count, ask_existence, ask_size, ask_relation, ask_what)
# What is asked of a training picture: two of EASY, and more of what is learned late. Asked as
# rarely as the rest, "what is left of the ring?" was a guess: it takes two looks at the picture,
# the second from where the first has led (docs/LOG.md).
EASY = (ask_colour, ask_kind, ask_existence, ask_size)
OFTEN = (*[ask_count] * 2, *[ask_relation] * 6, *[ask_what] * 3)


def questions(scene: Scene, rng: random.Random, training: bool = False) -> list[tuple[str, str]]:
    """(question, answer): one of each of QUESTIONS that the scene allows, answers from ANSWERS.

    training: two of EASY and all of OFTEN in their place; what comes out twice is asked once.
    """
    asks = [*rng.sample(EASY, 2), *OFTEN] if training else QUESTIONS
    asked = [ask(scene, rng) for ask in asks]
    asked = list(dict.fromkeys(pair for pair in asked if pair is not None))
    rng.shuffle(asked)
    return asked


# --------------------------------------------------------------------------------------------------
# Statements about two pictures (NLVR2). One picture is the first, and shows a noun a times; the
# other shows it b times. A claim is about a, b and sometimes a number n.

PRESENT = ("the {side} image contains {a}", "there is {a} in the {side} image")
MORE = ("there are more {many} in the {side} image than in the {other} image",
        "the {side} image contains more {many} than the {other} image")
IN_TOTAL = ("there are {n} {many} in total", "the two images contain {n} {many} together")
# Which nouns, the claim, its wordings. {side}: the first picture, left or right.
CLAIMS = (
    ("objects", lambda a, b, n: a > 0, PRESENT),
    ("pairs", lambda a, b, n: a > 0, PRESENT),
    ("objects", lambda a, b, n: a > 0 and b == 0,
     ("the {side} image contains {a} but the {other} image does not",
      "there is {a} in the {side} image but not in the {other} one")),
    ("kinds", lambda a, b, n: a == n, ("there are exactly {n} {many} in the {side} image",)),
    ("objects", lambda a, b, n: a > 0 and b > 0, ("both images contain {a}",
                                                  "there is {a} in each of the two images")),
    ("objects", lambda a, b, n: (a > 0) != (b > 0), ("exactly one image contains {a}",
                                                     "{a} is in only one of the two images")),
    ("pairs", lambda a, b, n: a > 0 or b > 0, ("at least one image contains {a}",
                                               "there is {a} in the left or in the right image")),
    ("pairs", lambda a, b, n: a == 0 and b == 0, ("neither image contains {a}",
                                                  "{a} is in none of the two images")),
    ("kinds", lambda a, b, n: a > b, MORE),
    ("sizes", lambda a, b, n: a > b, MORE),
    ("shapes", lambda a, b, n: a > b, MORE),
    ("kinds", lambda a, b, n: a == 2 * b,
     ("the {side} image contains twice as many {many} as the {other} image",)),
    ("kinds", lambda a, b, n: a == b,
     ("both images contain the same number of {many}",
      "there are as many {many} in the left image as in the right image")),
    ("kinds", lambda a, b, n: a + b == n, IN_TOTAL),
    ("shapes", lambda a, b, n: a + b == n, IN_TOTAL),
    ("kinds", lambda a, b, n: (a == 2) != (b == 2), ("exactly one image contains two {many}",)),
)


class Statement(NamedTuple):
    """A sentence about two pictures. side: which is the first; number: n of the claim."""
    wording: str
    claim: Callable[[int, int, int], bool]
    noun: Noun
    side: str
    number: int

    def __str__(self):
        other = "left" if self.side == "right" else "right"
        return self.wording.format(a=self.noun, many=self.noun.plural, side=self.side, other=other,
                                   n=NUMBERS[self.number])

    def holds(self, left: Scene, right: Scene) -> bool | None:
        """Whether it is true; None where it makes no sense: "twice as many stars" where none is."""
        a, b = self.noun.number(left), self.noun.number(right)
        if "{a}" not in self.wording and a + b < 2:
            return None
        if "twice" in self.wording and (a == 0 or b == 0):
            return None
        if self.side == "right":
            a, b = b, a
        return self.claim(a, b, self.number)


def nouns_for(group: str, left: Scene, right: Scene) -> list[Noun]:
    """The nouns of a group of CLAIMS that can be spoken of."""
    pairs = {*left.pairs, *right.pairs}
    colours, kinds = (set(words) for words in zip(*pairs, strict=True))
    if group == "shapes":
        return [Noun("a")]
    if group == "sizes":
        return [Noun("a", size) for size in SIZES]
    if group == "kinds":
        return [Noun("a", kind=kind) for kind in KINDS if kind in kinds]
    if group == "objects":
        return [Noun("a", None, *pair) for pair in sorted(pairs)]
    # "pairs": also those that are nowhere, though their colour and their kind are
    return [Noun("a", None, colour, kind) for colour, kind in itertools.product(COLOURS, KINDS)
            if colour in colours and kind in kinds and may_be_named((colour, kind), left, right)]


def statement(left: Scene, right: Scene, rng: random.Random) -> Statement | None:
    """A Statement about two scenes, as often true as false.

    A claim is used only if it can be made both truly and falsely of these two scenes; a coin
    decides which. None if there is no such claim.
    """
    for group, claim, wordings in rng.sample(CLAIMS, len(CLAIMS)):
        wording = rng.choice(wordings)
        sides = ("left", "right") if "{side}" in wording else ("left",)
        found = {True: [], False: [], None: []}
        for noun in nouns_for(group, left, right):
            total = noun.number(left) + noun.number(right)
            numbers = range(max(2, total - 1), min(10, total + 1) + 1) if "{n}" in wording else (0,)
            for side, number in itertools.product(sides, numbers):
                reading = Statement(wording, claim, noun, side, number)
                found[reading.holds(left, right)].append(reading)
        if found[True] and found[False]:
            return rng.choice(found[rng.random() < 0.5])
    return None
