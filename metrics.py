"""The official scores of the downstream tasks, without the official programs.

    vqa_accuracy(predictions, annotations)      VQA v2: agreement with ten annotators, in percent
    nlvr2_scores(predictions, examples)         NLVR2: accuracy and consistency, in 0..1
    caption_scores(predictions, references)     COCO captions: BLEU, ROUGE-L, CIDEr-D
    recall_at_k(scores, image_of_text)          retrieval: R@1, R@5, R@10 both ways, in 0..1

Predictions and annotations have the layout of the official files: what `json.load` returns, and
for NLVR2 the lines of the prediction file. Each example must be predicted exactly once, otherwise
it is a ValueError: a score over some of the examples cannot be compared with anything.
"""

import importlib.util
import math
import re
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from ptb import ptb_tokens
from storage.disk import shortened


def annotated(annotations: dict, read: Callable[[dict], tuple], names: str) -> list[tuple]:
    """read(row) of each row of an official file, {"annotations": [row, …]}."""
    try:
        rows = list(map(read, annotations["annotations"]))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError('the official layout is expected, {"annotations": […]}, each with '
                         f"{names} ({shortened(error)})") from None
    if not rows:
        raise ValueError("nothing to score: the list of annotations is empty")
    return rows


def paired(predictions: Iterable[tuple], expected: Iterable, what: str) -> dict:
    """{id: prediction} of (id, prediction) pairs; ValueError unless each expected id has one.

    42 and "42" are the same id, since JSON makes strings of an object's keys. The ids of the
    result are written as in `expected`.
    """
    predictions = [(str(key), value) for key, value in predictions]
    expected = {str(key): key for key in expected}
    given = Counter(key for key, _ in predictions)
    missing = [key for key in expected if key not in given]
    unknown = [key for key in given if key not in expected]
    repeated = [key for key, count in given.items() if count > 1]
    for keys, problem in ((missing, "have no prediction"),
                          (unknown, "are predicted but not among those asked"),
                          (repeated, "are predicted more than once")):
        if keys:
            raise ValueError(f"{len(keys)} {what} {problem}, the first is {keys[0]}: "
                             f"{len(predictions)} predictions for {len(expected)} {what}")
    return {expected[key]: value for key, value in predictions}


# --------------------------------------------------------------------------------------------------
# VQA

CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word               # without one apostrophe: with all
                for word in CONTRACTED for i, char in enumerate(word) if char == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"        # the wrong way round, as in the official table
NUMBERS = "none one two three four five six seven eight nine ten".split()
NUMBER_WORDS = {"zero": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """A VQA answer as the official scorer compares it.

    A punctuation mark becomes a space, or nothing if the answer has it next to a space or has a
    comma between digits. Full stops go unless a digit follows. Letters become lower case, number
    words to ten become digits, articles go, contractions get their apostrophe. Hyphens count as
    punctuation; colons and apostrophes do not.

    >>> [normalize_answer(answer) for answer in ("The two t-shirts.", "dont know", "1,000", "5:30")]
    ['2 t shirts', "don't know", '1000', '5:30']
    """
    answer = one_line(answer)
    digits_comma = re.search(r"\d,\d", answer)
    text = answer
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        glued = mark + " " in answer or " " + mark in answer or digits_comma
        text = text.replace(mark, "" if glued else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    words = [NUMBER_WORDS.get(word, word) for word in words]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join([CONTRACTIONS.get(word, word) for word in words])


def soft_score(count: int) -> float:
    """The training target of an answer that `count` of the ten annotators gave."""
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(count, 4)]


def vqa_accuracy(predictions: list[dict], annotations: dict) -> dict:
    """The official VQA v2 accuracy in percent, rounded to two digits (Antol et al. 2015).

        accuracy = 1/10 sum_i min(1, n_i / 3)

    where n_i of the annotators other than i gave the predicted answer. It is 0, 30, 60, 90, 100
    if 0, 1, 2, 3, 4 or more annotators gave it. Answers are normalised on both sides, except
    where all ten annotators wrote the same: then the prediction must be that very string.

    predictions: [{"question_id", "answer"}]
    annotations: {"annotations": [{"question_id", "answer_type", "answers": [{"answer"}]}]}
    Returns {"overall", "yes/no", "number", "other", "per_question": {question_id: accuracy}};
    a type that has no questions is nan.
    """
    def read(row):
        truth = [one_line(answer["answer"]) for answer in row["answers"]]
        of_types = isinstance(row["question_id"], int | str) and isinstance(row["answer_type"], str)
        if not truth or not of_types:
            raise TypeError(f"question {row['question_id']}")
        return row["question_id"], truth, row["answer_type"]

    rows = annotated(annotations, read, "question_id, answers, answer_type")
    answered = [(row["question_id"], row["answer"]) for row in predictions]
    predicted = paired(answered, [question for question, _, _ in rows], "questions")
    accuracies = {}
    by_type = {"yes/no": [], "number": [], "other": []}
    for question, truth, answer_type in rows:
        form = normalize_answer if len(set(truth)) > 1 else one_line
        agrees = [form(answer) == form(predicted[question]) for answer in truth]
        left_out = [min(1, (sum(agrees) - agree) / 3) for agree in agrees]
        accuracies[question] = sum(left_out) / len(left_out)
        by_type.setdefault(answer_type, []).append(accuracies[question])

    def percent(values):
        return round(100 * sum(values) / len(values), 2) if values else math.nan

    scores = {"overall": percent(accuracies.values())}
    scores |= {name: percent(values) for name, values in by_type.items()}
    scores["per_question"] = {question: percent([value]) for question, value in accuracies.items()}
    return scores


# --------------------------------------------------------------------------------------------------
# NLVR2

def nlvr2_scores(predictions: Iterable[str], examples: Iterable[dict],
                 subsets: dict[str, Iterable[str]] | None = None) -> dict[str, float]:
    """Accuracy and consistency in 0..1, as the official script counts them (Suhr et al. 2019).

        accuracy    = examples judged right / examples
        consistency = sentences judged right with every one of their image pairs / sentences

    An identifier is split-set-pair-sentence; the examples of a sentence differ in the pair alone.

    predictions: the lines "identifier,True" or "identifier,False" of an official prediction file
    examples: [{"identifier", "label": "True" or "False"}]
    subsets: {name: identifiers}, such as the official balanced and unbalanced parts
    Returns {"accuracy", "consistency"} and "NAME accuracy", "NAME consistency" for each subset.
    """
    pairs = []
    for line in predictions:
        identifier, comma, answer = line.strip().rpartition(",")
        if comma:                                   # the last line may be blank
            pairs.append((identifier, answer))
    labels = {row["identifier"]: is_true(row["label"], row["identifier"]) for row in examples}
    predicted = paired(pairs, labels, "examples")
    right = {name: is_true(predicted[name], name) == label for name, label in labels.items()}
    scores = accuracy_and_consistency(right, right, "")
    for subset, names in (subsets or {}).items():
        scores |= accuracy_and_consistency(right, names, f"{subset} ")
    return scores


def accuracy_and_consistency(right: dict[str, bool], names: Iterable[str], prefix: str) -> dict:
    """Both scores of the examples `names`; right: {identifier: was it judged right?}."""
    judged = []
    sentences = {}                                  # sentence -> one bool for each image pair
    for name in names:
        parts = name.split("-")
        if len(parts) < 4:
            raise ValueError(f"identifier {name!r}: split-set-pair-sentence is expected, "
                             "such as dev-850-0-1")
        del parts[2]
        sentences.setdefault(tuple(parts), []).append(right[name])
        judged.append(right[name])
    if not judged:
        raise ValueError(f"no examples in subset {prefix.strip()!r}: nothing to score")
    return {prefix + "accuracy": sum(judged) / len(judged),
            prefix + "consistency": sum(map(all, sentences.values())) / len(sentences)}


def is_true(answer: object, identifier: str) -> bool:
    word = str(answer).strip().lower()
    if word not in ("true", "false"):
        raise ValueError(f"example {identifier!r}: True or False is expected, not "
                         f"{shortened(repr(answer))}")
    return word == "true"


# --------------------------------------------------------------------------------------------------
# Captions

Words = list[str]


def apart(words: Words) -> Words:
    """Words without a space in them: a number that has one becomes two."""
    return " ".join(words).split()


def ngrams(words: Words) -> Counter:
    """How often each 1- to 4-gram occurs, {tuple of words: count}."""
    counts = Counter()
    for n in range(1, 5):
        for start in range(len(words) - n + 1):
            counts[tuple(words[start:start + n])] += 1
    return counts


def bleu(candidates: list[Words], references: list[list[Words]]) -> tuple[list, list]:
    """BLEU-1..4 (Papineni et al. 2002) of the corpus and of each image.

        BLEU-n = min(1, exp(1 - r / c)) (p_1 ... p_n)^(1/n)

    p_k is the share of the candidate's k-grams that occur in a reference, each counted at most as
    often as in the reference that has most of it. c is the candidate's length and r that of the
    reference closest to it, the shorter of two. The corpus score adds up all counts, then divides.
    candidates: the words of each image's caption; references: those of each of its references.
    """
    def score(counts):
        right, total, (length, closest) = counts[:4], counts[4:8], counts[8:]
        product = 1.0
        scores = []
        for n in range(4):
            product *= (right[n] + 1e-15) / (total[n] + 1e-9)       # the official guard: no 0 / 0
            scores.append(product ** (1 / (n + 1)))
        ratio = (length + 1e-15) / (closest + 1e-9)
        brevity = math.exp(min(0, 1 - 1 / ratio))
        return [value * brevity for value in scores]

    counts = np.zeros((len(candidates), 10), np.int64)
    for row, words, refs in zip(counts, candidates, references, strict=True):
        most = Counter()
        for ref in refs:
            most |= ngrams(ref)                                     # union: the larger count
        for gram, count in (ngrams(words) & most).items():          # intersection: the smaller
            row[len(gram) - 1] += count
        row[4:8] = np.maximum(0, len(words) - np.arange(4))
        _, closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)
        row[8:] = len(words), closest
    return score(counts.sum(axis=0)), [score(row) for row in counts]


def rouge_l(words: Words, refs: list[Words], beta: float = 1.2) -> float:
    """ROUGE-L of one caption (Lin 2004), from its longest common subsequences with the references.

        P = max LCS / candidate length    R = max LCS / reference length
        ROUGE-L = (1 + beta^2) P R / (R + beta^2 P)

    P and R are the best over the references, each for itself.
    """
    precision = recall = 0.0
    for ref in refs:
        row = [0] * (len(ref) + 1)                  # row[j]: LCS of the words so far and ref[:j]
        for word in words:
            diagonal = 0                            # the previous row's value left of j
            for j, other in enumerate(ref, 1):
                above = row[j]
                row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
                diagonal = above
        if row[-1]:
            precision = max(precision, row[-1] / len(words))
            recall = max(recall, row[-1] / len(ref))
    if precision == 0:
        return 0.0
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


def cider(candidates: list[Words], references: list[list[Words]], sigma: float = 6.0) -> list:
    """CIDEr of each image as the COCO scorer computes it, which is CIDEr-D (Vedantam et al. 2015).

        g_n(caption)  = the vector of (count of an n-gram) log(images / images that have it)
        CIDEr-D_n     = 10 mean_r min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)
                               exp(-(length of c - length of r)^2 / (2 sigma^2))
        CIDEr-D       = the mean of CIDEr-D_1 ... CIDEr-D_4

    for a candidate c and its references r. An image has an n-gram if one of its references has it,
    so a single image, or the same references everywhere, score 0.
    """
    references = [[ngrams(ref) for ref in refs] for refs in references]
    frequency = Counter()
    for refs in references:
        frequency.update(set().union(*refs))
    log_images = math.log(len(references))

    def vector(counts):
        """-> {n-gram: weight}, the norms (4,) for n = 1..4, the length in words"""
        weights = {}
        squares = [0.0] * 4
        length = 0
        for gram, count in counts.items():
            weights[gram] = count * (log_images - math.log(max(1, frequency[gram])))
            squares[len(gram) - 1] += weights[gram] ** 2
            if len(gram) == 1:
                length += count
        return weights, np.sqrt(squares), length

    scores = []
    for words, refs in zip(candidates, references, strict=True):
        weights, norm, length = vector(ngrams(words))
        total = 0.0
        for ref_weights, ref_norm, ref_length in map(vector, refs):
            products = np.zeros(4)
            for gram, weight in ref_weights.items():
                products[len(gram) - 1] += min(weights.get(gram, 0), weight) * weight
            norms = norm * ref_norm
            cosines = np.divide(products, norms, out=products, where=norms > 0)
            penalty = math.exp(-(length - ref_length) ** 2 / (2 * sigma ** 2))
            total += cosines.mean() * penalty
        scores.append(10 * total / len(refs))
    return scores


def caption_scores(predictions: list[dict], references: dict, official: bool = False) -> dict:
    """The scores of the official COCO caption scorer.

    predictions: [{"image_id", "caption"}]
    references: {"annotations": [{"image_id", "caption"}]}, several captions for each image
    Returns {"Bleu_1", …, "Bleu_4", "ROUGE_L", "CIDEr", "per_image": {image_id: the same scores}},
    BLEU and ROUGE-L in 0..1, CIDEr in 0..10.

    With `official`, words come from the Java tokenizer, and "METEOR" and "SPICE" are added. That
    needs Java and the extra `metrics` (ValueError if one is missing); SPICE is left out with a
    warning if it fails.
    """
    captions = {}
    read = itemgetter("image_id", "caption")
    for image, caption in annotated(references, read, "image_id, caption"):
        captions.setdefault(image, []).append(caption)
    described = [(row["image_id"], row["caption"]) for row in predictions]
    predicted = paired(described, captions, "images")
    if official:
        extra, candidate_words, reference_words = official_scores(predicted, captions)
    else:
        extra = {}
        candidate_words = [ptb_tokens(predicted[image]) for image in captions]
        reference_words = [list(map(ptb_tokens, refs)) for refs in captions.values()]

    rouges = list(map(rouge_l, candidate_words, reference_words))
    # To ROUGE-L alone, a number with a space in it is one word.
    candidate_words = list(map(apart, candidate_words))
    reference_words = [list(map(apart, refs)) for refs in reference_words]
    corpus, images = bleu(candidate_words, reference_words)
    table = {}                                      # name -> (of the corpus, of each image)
    for n in range(4):
        table[f"Bleu_{n + 1}"] = corpus[n], [row[n] for row in images]
    ciders = cider(candidate_words, reference_words)
    table |= {"ROUGE_L": (np.mean(rouges), rouges), "CIDEr": (np.mean(ciders), ciders)} | extra
    scores = {name: float(of_corpus) for name, (of_corpus, _) in table.items()}
    scores["per_image"] = {}
    for i, image in enumerate(captions):
        scores["per_image"][image] = {name: float(rows[i]) for name, (_, rows) in table.items()}
    return scores


def check_official_tools() -> None:
    """ValueError if something that the official caption scorer needs is missing."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError("the official caption scorer needs pycocoevalcap: "
                         "pip install -e .[metrics]")
    if not shutil.which("java"):
        raise ValueError("the official caption scorer needs a Java runtime, the command `java`")


def official_scores(predictions: dict, references: dict) -> tuple[dict, list, list]:
    """What Java computes, from {image: caption} and {image: [caption]}.

    Returns {"METEOR": (of the corpus, of each image), "SPICE": …}, the words of the predictions,
    and the words of the references.
    """
    check_official_tools()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    given = PTBTokenizer().tokenize({key: [{"caption": predictions[key]}] for key in references})
    truth = PTBTokenizer().tokenize({key: [{"caption": caption} for caption in captions]
                                     for key, captions in references.items()})
    scores = {"METEOR": Meteor().compute_score(truth, given)}
    models = Path(spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
    try:
        if not models.is_file():
            raise FileNotFoundError("no models; `python -m pycocoevalcap.spice.get_stanford_models`"
                                    " downloads them")
        mean, rows = spice.Spice().compute_score(truth, given)
        by_id = dict(zip(sorted(truth), rows, strict=True))         # it sorts the images
        scores["SPICE"] = mean, [by_id[key]["All"]["f"] for key in references]
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        warnings.warn(f"SPICE is left out: {error}", stacklevel=3)
    candidate_words = [given[key][0].split(" ") for key in references]
    reference_words = [[text.split(" ") for text in truth[key]] for key in references]
    return scores, candidate_words, reference_words


# --------------------------------------------------------------------------------------------------
# Retrieval

def recall_at_k(scores: np.ndarray, image_of_text: Sequence[int] | np.ndarray,
                ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k in both directions, in 0..1.

        ir_rK = texts with their image among the K best of all images / texts
        tr_rK = images with one of their texts among the K best of all texts / images with a text

    Of equal scores, the one with the higher row or column number comes first. That order does not
    know the truth, so a model that scores all pairs alike is at chance and not at 1.

    scores (images, texts): higher is better. The matrix may be larger than the memory.
    image_of_text (texts,): the row of each text's image
    """
    scores, image_of_text = np.asarray(scores), np.asarray(image_of_text)
    if image_of_text.shape != scores.shape[1:] or not set(image_of_text) <= set(range(len(scores))):
        raise ValueError("scores (images, texts) and for each text the row of its image are "
                         f"expected, not shapes {scores.shape} and {image_of_text.shape}")
    for image, row in enumerate(scores):
        if np.isnan(row).any():
            raise ValueError(f"a score of image {image} is not a number")

    def best(row):
        return np.argsort(row, kind="stable")[::-1][:max(ks)]

    ir = [best(scores[:, text]) == image for text, image in enumerate(image_of_text)]       # (T, K)
    tr = [image_of_text[best(scores[image])] == image for image in np.unique(image_of_text)]
    recalls = {f"ir_r{k}": float(np.array(ir)[:, :k].any(axis=1).mean()) for k in ks}
    return recalls | {f"tr_r{k}": float(np.array(tr)[:, :k].any(axis=1).mean()) for k in ks}
