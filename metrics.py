"""The official scores of the downstream tasks, without the official programs.

    vqa_accuracy(predictions, annotations)      VQA v2: agreement with ten annotators, percent
    nlvr2_scores(predictions, examples)         NLVR2: accuracy and consistency, shares of 1
    caption_scores(predictions, references)     COCO captions: BLEU, ROUGE-L, CIDEr (METEOR and SPICE with Java)
    recall_at_k(scores, image_of_text)          retrieval: R@1, R@5, R@10 both ways, shares of 1

Predictions come in the layout of the official result files. Each of them must be there exactly once: one that is
missing, unknown or given twice is a ValueError, because a score over part of the questions compares with nothing.
"""

import importlib.util
import math
import re
import shutil
import subprocess
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np


def columns(rows, names, what):
    """The named entries of each row, a dict, as tuples; ValueError names the first row that lacks one."""
    for i, row in enumerate(rows):
        missing = [name for name in names if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{what} {i} has no {missing[0]!r}; each needs {', '.join(names)}")
        yield tuple(row[name] for name in names)


def paired(predictions, expected, what):
    """Predictions, as (id, value) pairs, -> {id: value}, after checking that each expected id has exactly one.

    42 and "42" are the same id (JSON makes strings of an object's keys); the expected spelling is returned.
    """
    spelled = {str(key): key for key in expected}
    predictions = [(spelled.get(str(key), key), value) for key, value in predictions]
    given = Counter(key for key, _ in predictions)
    for problem, keys in [("have no prediction", [key for key in expected if key not in given]),
                          ("are predicted but not among those asked", [key for key in given if key not in expected]),
                          ("are predicted more than once", [key for key in given if given[key] > 1])]:
        if keys:
            raise ValueError(f"{len(keys)} {what} {problem}, the first is {keys[0]!r}: "
                             f"{len(predictions)} predictions for {len(expected)} {what}")
    return dict(predictions)


# ---------------------------------------------------------------------------------------------------------------------
# VQA.

# A word that lacks exactly one of its apostrophes gets it back.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTIONS for i in range(len(word)) if word[i] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"        # the wrong way round in the official table, hence here
NUMBER_WORDS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBER_WORDS["none"] = "0"


def one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer):
    """A VQA answer as the official scorer compares it.

    A punctuation mark becomes a space, or nothing where the answer has it next to a space or has a comma between
    digits. Full stops go unless a digit follows. Lower case; number words to ten become digits; articles go;
    contractions get their apostrophe. Hyphens count as punctuation, colons and apostrophes do not.

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
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_score(count):
    """The training target of an answer that `count` of the ten annotators gave: 0, 0.3, 0.6, 0.9, then 1."""
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(count, 4)]


def vqa_accuracy(predictions, annotations):
    """The official VQA v2 accuracy in percent, rounded to two digits as its scorer prints it.

    An answer's accuracy is min(1, n / 3), where n of the other annotators gave it, averaged over leaving out each of
    the ten: 0, 30, 60, 90, 100 for 0, 1, 2, 3, 4 who agree (Antol et al. 2015). Answers are normalised on both sides,
    but not where all ten annotators wrote the same: then the prediction must be that very string.
    predictions: [{"question_id", "answer"}] or {question_id: answer}; annotations: the official file or its list.
    Returns {"overall", "yes/no", "number", "other", "per_question": {question_id: accuracy}}; a type of which there is
    no question is nan.
    """
    if isinstance(annotations, dict):
        annotations = annotations.get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise ValueError("no annotations: nothing to score; the official layout is {\"annotations\": [...]}")
    if not isinstance(predictions, dict):
        predictions = columns(predictions, ("question_id", "answer"), "prediction")
    else:
        predictions = predictions.items()
    annotations = list(columns(annotations, ("question_id", "answers", "answer_type"), "annotation"))
    predicted = paired(predictions, {question: None for question, _, _ in annotations}, "questions")
    accuracies, by_type = {}, {"yes/no": [], "number": [], "other": []}
    for question, answers, answer_type in annotations:
        truth = [one_line(answer["answer"]) for answer in answers]
        form = normalize_answer if len(set(truth)) > 1 else one_line
        agrees = [form(answer) == form(predicted[question]) for answer in truth]
        left_out = [min(1, (sum(agrees) - agree) / 3) for agree in agrees]
        accuracies[question] = sum(left_out) / len(left_out)
        by_type.setdefault(answer_type, []).append(accuracies[question])

    def percent(values):
        return round(100 * sum(values) / len(values), 2) if values else math.nan

    return {"overall": percent(accuracies.values()), **{name: percent(values) for name, values in by_type.items()},
            "per_question": {question: round(100 * value, 2) for question, value in accuracies.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# NLVR2.

def nlvr2_scores(predictions, examples, subsets=None):
    """Accuracy and consistency as the official script counts them, shares of 1.

    Consistency is the share of sentences that are judged right with every one of their pairs of images (Suhr et al.
    2019). Examples of one sentence differ only in the third part of their identifier: split-set-pair-sentence.
    predictions: {identifier: True or "True"}, or the lines "identifier,True" of an official prediction file;
    examples: [{"identifier", "label": "True" or "False"}]; subsets: {name: identifiers}, such as the official balanced
    and unbalanced parts. Returns {"accuracy", "consistency"} and "NAME accuracy", "NAME consistency" of each subset.
    """
    if isinstance(predictions, dict):
        pairs = predictions.items()
    else:
        pairs = [tuple(line.strip().rsplit(",", 1)) for line in predictions if line.strip()]
        for pair in pairs:
            if len(pair) != 2:
                raise ValueError(f"prediction {pair[0]!r}: a line 'identifier,True' or 'identifier,False' is expected")
    labels = {name: truth_value(label, name) for name, label in columns(examples, ("identifier", "label"), "example")}
    predicted = paired(pairs, labels, "examples")
    right = {name: truth_value(predicted[name], name) == label for name, label in labels.items()}
    scores = {}
    for prefix, names in {"": right, **{f"{name} ": names for name, names in (subsets or {}).items()}}.items():
        sentences = {}
        for name in names:
            if name not in right:
                raise ValueError(f"subset {prefix.strip()!r}: {name!r} is not among the {len(right)} examples")
            parts = name.split("-")
            if len(parts) < 4:
                raise ValueError(f"identifier {name!r}: split-set-pair-sentence is expected, such as dev-850-0-1")
            sentences.setdefault((*parts[:2], *parts[3:]), []).append(right[name])
        if not sentences:
            raise ValueError(f"no examples{' in subset ' + repr(prefix.strip()) if prefix else ''}: nothing to score")
        scores[prefix + "accuracy"] = sum(map(sum, sentences.values())) / sum(map(len, sentences.values()))
        scores[prefix + "consistency"] = sum(map(all, sentences.values())) / len(sentences)
    return scores


def truth_value(value, identifier):
    """True or "true" -> True, False or "false" -> False, in any case."""
    word = str(value).strip().lower()
    if word not in ("true", "false"):
        raise ValueError(f"example {identifier!r}: True or False is expected, not {value!r}")
    return word == "true"


# ---------------------------------------------------------------------------------------------------------------------
# Captions. First the words: the official scorer compares what the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1
# makes of captions. The rules below describe its behaviour on English prose; they were found by asking it.

# Their full stop belongs to the word; so does that of a single letter.
ABBREVIATIONS = """adj adm adv al ala alex apr ariz assn asst atty aug ave bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
    govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md mfg mich minn mlle mme mo mon mont
    mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof pte ptes pty ptys pvt rd rep
    reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed
    wis wisc wm wyo""".split()
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop".split()
# After a single letter and a full stop, these begin a sentence.
STARTERS = """A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now
    Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet
    You""".split()


def token_pattern():
    """The regular expression of one token; the first rule that matches counts, so longer forms stand first."""
    letter, char = r"[^\W\d_¼-¾⅓⅔²³¹⁰-₉]", r"[^\W_¼-¾⅓⅔²³¹⁰-₉]"      # char: a letter or a digit
    end = rf"(?!{letter})"
    clitic = rf"'(?:s|d|m|ll|re|ve){end}"
    alone = rf"(?!{char}|{clitic}|[.!?]{letter})"
    name = rf"[dlno]'(?!(?:ll|re|ve){end}){letter}{{2,}}"
    word = rf"{char}+(?:-{letter}{char}*)*"
    head = rf"(?:(?:{letter}\.)+{letter}?|{name}|\d+(?:[.,]\d+)+{char}*|{char}+\.?)"
    rules = [
        r"https?://[^\s<>\"]*[^\s<>\".,;:!?)]",
        r"[a-z0-9][\w.-]*@[\w.-]*\w",                                       # me@home.org
        rf"@{letter}\w*|\#{letter}+",                                       # #hashtag
        r"</?[a-z][\w.-]*\s*/?>",                                           # <unk>
        rf"[<>]?[:;=]['-]?(?-i:[()DPO|\]\\])(?!{char})",                    # :-)
        r"'n'|'n(?=\s|$)",                                                  # rock 'n' roll
        r"'\d\d(?:s|(?=\s|$))",                                             # '80s
        r"'t(?=is|was)|'(?:em|till?|cause)",                                # 'tis
        rf"n't{end}|{clitic}",                                              # is|n't, dog|'s
        r"\.{3,}",
        rf"(?:c'mon|c'est|s'mores|nor'easter|cap'n|ev'ry|e'er|dunkin'|somethin'|ol'){end}",
        rf"{word}(?:/{word}){{1,2}}",                                       # and/or, 9/11/2001
        rf"{head}(?:[-_‐‑](?:(?:{letter}\.){{2,}}|{name}|{char}+))+(?:\.(?=[,:;]))?",      # 3-year-old, 1.5-mile
        rf"{char}+\.(?=[,:;])",
        name,                                                               # o'clock
        rf"{letter}+[aeiouy]'(?!(?:s|d|m|ll|re|ve){end})(?-i:[aeiouA-Z]){letter}*",        # ma'am, Hawai'i
        rf"[djly]'(?!(?:s|d|m|ll|re|ve){end})(?={letter})",                 # y'|all
        rf"{letter}{char}*?(?=n't)",                                  # is|n't
        rf"can(?=not{alone})|(?:gon|wan)(?=na{alone})|got(?=ta{alone})|(?:gim|lem)(?=me{alone})",
        r"(?-i:[A-Z]+(?:&[A-Z]+)+|[A-Z]+\$)",                               # B&W, US$
        rf"(?:{letter}\.){{2,}}{end}|ph\.d\.",                              # U.S., a.m.
        rf"{letter}{char}*(?:[.!?]{letter}{char}*)+",                       # flickr.com
        rf"(?:{'|'.join(ABBREVIATIONS)})\.|(?:{'|'.join(BEFORE_NUMBERS)})\.(?=\s?\d)",
        rf"{letter}\.(?!\s+(?-i:{'|'.join(STARTERS)})\s)",                  # J. Smith
        r"[-+]?\d*(?:[.:,]\d+)+|-{2,}|[-+]\d+",                             # 5:30, -5
        rf"{char}+",
        r"\*+|_+|\#+|@+|[?!]+|\S"]
    return re.compile("|".join(rules), re.IGNORECASE)


TOKEN = token_pattern()
CLITIC = re.compile(r"'(?:s|d|m|t|ll|re|ve)|n't", re.IGNORECASE)
SYMBOLS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "€": "$", "¤": "$",
           "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
REMOVED = set(".,:;?!-'`\"“”‘‛«»‹›–—―…‐‑‒‥")


def ptb_tokens(text):
    """A caption's words as the official COCO scorer sees them: Penn Treebank tokens, lower case, no punctuation.

    The official list of punctuation spells brackets in capitals and so misses them; runs such as "!!" are not in it.
    A caption is read alone, and its last full stop belongs to a single letter before it ("a letter B."); the official
    program reads all captions as one text, where this depends on the next one's first word.

    >>> " | ".join(ptb_tokens("A dog's toy isn't well-made, costs $5.50 (U.S.) and cannot roll."))
    "a | dog | 's | toy | is | n't | well-made | costs | $ | 5.50 | -lrb- | u.s. | -rrb- | and | can | not | roll"
    """
    words = []
    text = text.replace("\u00ad", "")                               # soft hyphens
    for match in TOKEN.finditer(text.replace("’", "'")):
        token = match.group()
        if token in REMOVED or set(token) == {"."} or set(token) == {"-"} and len(token) < 5:
            continue
        if not CLITIC.fullmatch(token):
            token = text[match.start():match.end()]                 # other words keep a typographic apostrophe
        if len(token) == 1 and (unicodedata.category(token)[0] in "CM" or ord(token) > 0xffff):
            continue                                                # emoji and invisible characters
        if len(token) > 1 and token[-1] in "()":                    # a smiley
            token = token[:-1] + SYMBOLS[token[-1]]
        words.append(SYMBOLS.get(token, token).lower())
    return words


def ngrams(words):
    """Counts of the 1- to 4-grams of a list of words."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def bleu(candidates, references):
    """BLEU-1..4 (Papineni et al. 2002) -> (corpus [4], images [[4]]).

    (p_1 · … · p_n)^(1/n) · min(1, exp(1 - r / c)): p_k is the share of the candidate's k-grams that occur in a
    reference, counted at most as often as in the reference that has most of them; c is the candidate's length, r that
    of the reference closest to it, the shorter of two. The corpus score adds up all counts before it divides.
    candidates: [words] of each image; references: [[words]].
    """
    def score(right, total, length, closest):
        product, scores = 1.0, []
        for n in range(4):
            product *= (right[n] + 1e-15) / (total[n] + 1e-9)       # the official guards against 0 / 0
            scores.append(product ** (1 / (n + 1)))
        ratio = (length + 1e-15) / (closest + 1e-9)
        return [s * math.exp(min(0, 1 - 1 / ratio)) for s in scores]

    statistics = []
    for words, refs in zip(candidates, references):
        most = Counter()
        for ref in refs:
            most |= ngrams(ref)                                     # union: the larger count
        right = [0] * 4
        for gram, count in (ngrams(words) & most).items():          # intersection: the smaller count
            right[len(gram) - 1] += count
        closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        statistics.append((np.array(right), np.maximum(0, len(words) - np.arange(4)), len(words), closest))
    return score(*map(sum, zip(*statistics))), [score(*row) for row in statistics]


def rouge_l(words, refs, beta=1.2):
    """ROUGE-L of one caption (Lin 2004): F of the longest common subsequence, recall weighing beta² times precision.

    Precision (LCS / candidate length) and recall (LCS / reference length) are each the best over the references.
    """
    precision = recall = 0.0
    for ref in refs:
        row = [0] * (len(ref) + 1)                                  # row[j]: LCS of the words so far and ref[:j]
        for word in words:
            before = 0                                              # the previous row's value left of j
            for j, other in enumerate(ref, 1):
                before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
        if row[-1]:
            precision, recall = max(precision, row[-1] / len(words)), max(recall, row[-1] / len(ref))
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision) if precision else 0.0


def cider(candidates, references, sigma=6.0):
    """CIDEr as the COCO scorer computes it, which is the paper's CIDEr-D (Vedantam et al. 2015) -> [images].

    For n = 1..4, a caption is a vector of its n-grams' counts times log(images / images whose references have it). Its
    similarity to a reference is a cosine in which the candidate's entries are clipped to the reference's, times
    exp(-(difference of lengths)² / 2 sigma²). The score is 10 x the mean over n and references.
    Document frequencies are those of these references: a single image, or the same ones everywhere, score 0.
    """
    references = [[ngrams(ref) for ref in refs] for refs in references]
    frequency = Counter(gram for refs in references for gram in set().union(*refs))
    log_images = math.log(len(references))

    def vector(counts):
        weights = {gram: count * (log_images - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}
        squares = [0.0] * 4
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight ** 2
        return weights, np.sqrt(squares), sum(count for gram, count in counts.items() if len(gram) == 1)

    scores = []
    for words, refs in zip(candidates, references):
        weights, norm, length = vector(ngrams(words))
        total = 0.0
        for ref_weights, ref_norm, ref_length in map(vector, refs):
            products = np.zeros(4)
            for gram in weights.keys() & ref_weights.keys():
                products[len(gram) - 1] += min(weights[gram], ref_weights[gram]) * ref_weights[gram]
            norms = norm * ref_norm
            cosines = np.divide(products, norms, out=products, where=norms > 0)
            total += cosines.mean() * math.exp(-(length - ref_length) ** 2 / (2 * sigma ** 2))
        scores.append(10 * total / len(refs))
    return scores


def caption_scores(predictions, references, tokenize=ptb_tokens, official=False):
    """The scores of the official COCO caption scorer.

    predictions: the official results list [{"image_id", "caption"}], {image_id: caption} or pycocoevalcap's
    {image_id: [caption]}; references: the official annotation file's dict or {image_id: [captions]}; tokenize: caption
    -> words.
    Returns {"Bleu_1", …, "Bleu_4", "ROUGE_L", "CIDEr", "per_image": {image_id: the same scores}}, BLEU and ROUGE-L in
    0..1, CIDEr in 0..10. With `official`, words come from the Java tokenizer, and "METEOR" and "SPICE" are added: that
    needs Java and the extra `metrics` (ValueError says what lacks); SPICE is left out with a warning where it fails.
    """
    if isinstance(references, dict) and "annotations" in references:
        captions = {}
        for key, caption in columns(references["annotations"], ("image_id", "caption"), "annotation"):
            captions.setdefault(key, []).append(caption)
        references = captions
    if not isinstance(predictions, dict):
        predictions = columns(predictions, ("image_id", "caption"), "prediction")
    else:
        predictions = predictions.items()
    predictions = {key: one_caption(key, value) for key, value in paired(predictions, references, "images").items()}
    empty = [key for key, captions in references.items() if not captions]
    if empty or not references:
        raise ValueError(f"image {empty[0]!r} has no reference caption" if empty else "no images: nothing to score")
    ids = list(references)                                          # the order of all that follows
    if official:
        extra, candidate_words, reference_words = official_scores(predictions, references)
    else:
        extra, candidate_words = {}, [tokenize(predictions[key]) for key in ids]
        reference_words = [[tokenize(caption) for caption in references[key]] for key in ids]

    corpus_bleu, image_bleus = bleu(candidate_words, reference_words)
    table = {f"Bleu_{n + 1}": (corpus_bleu[n], [row[n] for row in image_bleus]) for n in range(4)}
    rouges = [rouge_l(words, refs) for words, refs in zip(candidate_words, reference_words)]
    ciders = cider(candidate_words, reference_words)
    table |= {"ROUGE_L": (np.mean(rouges), rouges), "CIDEr": (np.mean(ciders), ciders), **extra}
    per_image = {key: {name: float(rows[i]) for name, (_, rows) in table.items()} for i, key in enumerate(ids)}
    return {**{name: float(corpus) for name, (corpus, _) in table.items()}, "per_image": per_image}


def one_caption(key, value):
    """A caption, or a list of one -> the caption."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str):
        raise ValueError(f"image {key!r}: one caption is expected, not {value!r:.60}")
    return value


def check_official_tools():
    """ValueError that says what the official caption scorer lacks here; to be asked before captions are written."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError("the official caption scorer needs pycocoevalcap: pip install -e .[metrics]")
    if not shutil.which("java"):
        raise ValueError("the official caption scorer needs Java, but there is no command `java`: install a runtime")


def official_scores(predictions, references):
    """Java's part: ({"METEOR": (corpus, images), "SPICE": …}, words of the candidates, words of the references)."""
    check_official_tools()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    tokens = PTBTokenizer()
    candidates = tokens.tokenize({key: [{"caption": predictions[key]}] for key in references})
    references = tokens.tokenize({key: [{"caption": c} for c in captions] for key, captions in references.items()})
    scores = {"METEOR": Meteor().compute_score(references, candidates)}
    models = Path(spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
    try:
        if not models.is_file():
            raise FileNotFoundError("no models; `python -m pycocoevalcap.spice.get_stanford_models` downloads them")
        mean, rows = spice.Spice().compute_score(references, candidates)
        by_id = dict(zip(sorted(references), rows))                 # it sorts the images
        scores["SPICE"] = mean, [by_id[key]["All"]["f"] for key in references]
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        warnings.warn(f"SPICE is left out: {error}")
    return (scores, [candidates[key][0].split() for key in references],
            [[caption.split() for caption in references[key]] for key in references])


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval.

def recall_at_k(scores, image_of_text, ks=(1, 5, 10), chunk=256):
    """Recall at k in both directions, shares of 1.

    ir_rK: the share of texts whose image is among the K best of all images; tr_rK: the share of images that have one of
    their own texts among the K best of all texts (an image without a text is only a distractor).
    scores (images, texts), a tensor or an array; image_of_text (texts,): the row of each text's image. Of equal scores
    the one with the higher row or column number comes first: an order that knows nothing of the truth, so a model that
    scores all pairs alike is at chance and not at 1. Rows are compared `chunk` at a time; the matrix is not copied.
    """
    if hasattr(scores, "detach"):                                   # a tensor; NumPy has no bfloat16
        scores = scores.detach().cpu()
        scores = scores.float().numpy() if str(scores.dtype) == "torch.bfloat16" else scores.numpy()
    if hasattr(image_of_text, "detach"):
        image_of_text = image_of_text.cpu()
    scores, image_of_text = np.asarray(scores), np.asarray(image_of_text)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    images, texts = scores.shape if scores.ndim == 2 else (0, 0)
    if images == 0 or image_of_text.shape != (texts,) or texts == 0:
        raise ValueError(f"scores (images, texts) and one image number for each text are expected, not shapes "
                         f"{scores.shape} and {image_of_text.shape}")
    if not np.issubdtype(image_of_text.dtype, np.integer) or image_of_text.min() < 0 or image_of_text.max() >= images:
        raise ValueError(f"image_of_text must hold whole numbers from 0 to {images - 1}, the rows of the scores")
    text_numbers = np.arange(texts)
    own = scores[image_of_text, text_numbers]                       # (T,) each text with its image
    best = np.full(images, -np.inf, own.dtype)
    np.maximum.at(best, image_of_text, own)                         # (I,) each image with its best text …
    hit = own == best[image_of_text]
    last = np.full(images, -1)
    np.maximum.at(last, image_of_text[hit], text_numbers[hit])      # … and where that is, the last one if several
    text_rank, image_rank = np.zeros(texts, np.int64), np.zeros(images, np.int64)       # how many stand before it
    for start in range(0, images, chunk):
        rows = scores[start:start + chunk]                          # (C, T)
        numbers = np.arange(start, start + len(rows))
        if np.isnan(rows).any():
            row, text = np.argwhere(np.isnan(rows))[0]
            raise ValueError(f"the score of image {start + row} with text {text} is not a number")
        text_rank += np.count_nonzero((rows > own) | (rows == own) & (numbers[:, None] > image_of_text), axis=0)
        of_row, behind = best[numbers][:, None], text_numbers > last[numbers][:, None]
        image_rank[numbers] = np.count_nonzero((rows > of_row) | (rows == of_row) & behind, axis=1)
    image_rank = image_rank[last >= 0]
    return {**{f"ir_r{k}": float((text_rank < k).mean()) for k in ks},
            **{f"tr_r{k}": float((image_rank < k).mean()) for k in ks}}
