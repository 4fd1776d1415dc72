"""The scores equal those recorded from the official programs, or are counted by hand."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from ptb import ptb_tokens


def load(shared, name):
    return json.loads((shared / "fixtures" / name).read_text())


# -- VQA -----------------------------------------------------------------------------------------

def annotations(*answers, kind="other"):
    """The official annotation file of questions 1, 2, ...; for each, what ten annotators wrote."""
    rows = []
    for number, ten in enumerate(answers, 1):
        rows.append({"question_id": number, "answer_type": kind,
                     "answers": [{"answer": answer} for answer in ten]})
    return {"annotations": rows}


def answered(*answers):
    """The official results file of questions 1, 2, ..."""
    return [{"question_id": n, "answer": answer} for n, answer in enumerate(answers, 1)]


def test_vqa_accuracy_equals_the_official_scorer_on_every_question(shared):
    official = load(shared, "vqa_eval/official.json")
    scores = metrics.vqa_accuracy(load(shared, "vqa_eval/predictions.json"),
                                  load(shared, "vqa_eval/annotations.json"))
    per_question = {str(number): value for number, value in scores["per_question"].items()}
    assert per_question == official["per_question"]
    assert scores["overall"] == official["accuracy"]["overall"]
    by_type = {name: scores[name] for name in ("yes/no", "number", "other")}
    assert by_type == official["accuracy"]["perAnswerType"]


@pytest.mark.parametrize("agreeing, percent",
                         [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (9, 100)])
def test_vqa_accuracy_counts_annotators_leaving_each_out_once(agreeing, percent):
    truth = annotations(["red"] * agreeing + ["blue"] * (10 - agreeing))
    scores = metrics.vqa_accuracy(answered("Red."), truth)
    assert scores["per_question"] == {1: percent}
    assert scores["overall"] == scores["other"] == percent and math.isnan(scores["number"])


def test_vqa_answers_of_one_mind_are_compared_as_they_are_written():
    truth = annotations(["two"] * 10, ["two"] * 9 + ["2 dogs"])
    assert metrics.vqa_accuracy(answered("2", "2"), truth)["per_question"] == {1: 0, 2: 100}
    assert metrics.vqa_accuracy(answered(" two\n", "two"), truth)["overall"] == 100


def test_vqa_question_ids_may_be_strings():
    predictions = [{"question_id": "1", "answer": "a"}]
    assert metrics.vqa_accuracy(predictions, annotations(["a"] * 10))["per_question"] == {1: 100}


@pytest.mark.parametrize("answer, normal", [
    ("A red, big dog", "red big dog"),                      # a comma next to a space vanishes
    ("red,big", "red big"), ("yes/no", "yes no"),           # elsewhere a mark becomes a space
    ("red/blue, green", "red blue green"),                  # each mark by itself …
    ("1,000 b/w", "1000 bw"),                               # … but 1,000 removes all of them
    ("4.5 ft.", "4.5 ft"), ("p.m.", "pm"), ("t-shirt", "t shirt"),
    ("None", "0"), ("ten", "10"), ("eleven", "eleven"), ("the", ""),
    ("isnt it Hes there", "isn't it he's there"), ("shed", "shed"), ("couldn'tve", "couldn't've"),
    ("somebody'd", "somebodyd"), ("man's", "man's"), ("5:30", "5:30"),
    ("what\nis\tit", "what is it")])
def test_normalize_answer(answer, normal):
    assert metrics.normalize_answer(answer) == normal


@pytest.mark.parametrize("predictions, sentence", [
    (answered("a"), "2 questions have no prediction, the first is 2: 1 predictions for 3"),
    (answered(*"abcde"), "2 questions are predicted but not among.* is 4: 5"),
    (answered(*"abc") + answered("a"), "1 questions are predicted more than once.* is 1: 4")])
def test_vqa_predictions_that_are_not_complete_are_refused(predictions, sentence):
    with pytest.raises(ValueError, match=sentence):
        metrics.vqa_accuracy(predictions, annotations(*[["a"] * 10] * 3))


def test_scores_of_nothing_are_refused():
    for nothing in ([], {"annotations": []}, {"annotations": [{"id": 2}]}, {"questions": []}, 5):
        for score in (metrics.vqa_accuracy, metrics.caption_scores):
            with pytest.raises(ValueError, match="nothing to score|the official layout"):
                score([], nothing)


@pytest.mark.parametrize("change", [
    {"question_id": []}, {"question_id": None}, {"answers": []}, {"answers": None},
    {"answers": [{"answer": 5}]}, {"answers": [{"reply": "a"}]}, {"answers": ["a"]},
    {"answer_type": {}}, {"answer_type": None}])
def test_annotations_of_other_types_are_one_sentence_and_no_traceback(change):
    wrong = annotations(["a"] * 10)
    wrong["annotations"][0] |= change
    with pytest.raises(ValueError, match="the official layout is expected") as error:
        metrics.vqa_accuracy(answered("a"), wrong)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_soft_scores_of_training_targets():
    assert [metrics.soft_score(n) for n in range(12)] == [0, 0.3, 0.6, 0.9] + [1] * 8


@pytest.mark.parametrize("text, count", [("cat " * 50_000, 50_000), ("c" * 200_000, 1),
                                         ("a__" * 15_000, 30_000), ("http://,." * 20_000, 1)])
def test_a_caption_of_a_megabyte_is_cut_into_words_in_a_second(text, count):
    """A fifth of one here. Rules that look ahead to the end, for each word again, take minutes."""
    begun = time.process_time()
    assert len(ptb_tokens(text)) == count
    assert time.process_time() - begun < 5


# -- NLVR2 ---------------------------------------------------------------------------------------

# Two groups of two sentences, each about three pairs of images.
LABELS = {"dev-0-0-0": True, "dev-0-1-0": False, "dev-0-2-0": True,
          "dev-0-0-1": False, "dev-0-1-1": True, "dev-0-2-1": False,
          "dev-1-0-0": False, "dev-1-1-0": True, "dev-1-2-0": False,
          "dev-1-0-1": True, "dev-1-1-1": False, "dev-1-2-1": True}
EXAMPLES = [{"identifier": name, "label": str(label)} for name, label in LABELS.items()]
RIGHT = [f"{name},{label}" for name, label in LABELS.items()]


def test_nlvr2_consistency_wants_all_pairs_of_a_sentence_right():
    one_wrong = [line.replace("dev-1-2-0,False", "dev-1-2-0,True") for line in RIGHT]
    assert metrics.nlvr2_scores(RIGHT, EXAMPLES) == {"accuracy": 1, "consistency": 1}
    scores = metrics.nlvr2_scores(one_wrong, EXAMPLES, {
        "first": [name for name in LABELS if name.startswith("dev-0")],
        "second": [name for name in LABELS if name.startswith("dev-1")]})
    assert scores == {"accuracy": 11 / 12, "consistency": 3 / 4,
                      "first accuracy": 1, "first consistency": 1,
                      "second accuracy": 5 / 6, "second consistency": 1 / 2}
    always = metrics.nlvr2_scores([f"{name},True" for name in LABELS], EXAMPLES)
    assert always == {"accuracy": 1 / 2, "consistency": 0}


def test_nlvr2_reads_the_official_prediction_file(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("\n".join(RIGHT).replace("True", "true") + "\n\n")
    with open(path) as lines:
        assert metrics.nlvr2_scores(lines, EXAMPLES)["accuracy"] == 1


@pytest.mark.parametrize("lines, sentence", [
    (RIGHT[:1], "11 examples have no prediction, the first is dev-0-1-0"),
    (RIGHT + ["dev-9-0-0,True"], "1 examples are predicted but not among.*dev-9-0-0"),
    (RIGHT + RIGHT[1:2], "1 examples are predicted more than once.*dev-0-1-0"),
    ([f"{name},maybe" for name in LABELS], "'dev-0-0-0': True or False is expected, not 'maybe'"),
    (LABELS, "12 examples have no prediction")])
def test_nlvr2_refuses_what_the_official_script_cannot_count(lines, sentence):
    with pytest.raises(ValueError, match=sentence):
        metrics.nlvr2_scores(lines, EXAMPLES)


def test_nlvr2_refuses_other_identifiers_and_subsets():
    with pytest.raises(ValueError, match="'dev-0': split-set-pair-sentence"):
        metrics.nlvr2_scores(["dev-0,True"], [{"identifier": "dev-0", "label": "True"}])
    with pytest.raises(ValueError, match="no examples in subset 'balanced'"):
        metrics.nlvr2_scores(RIGHT, EXAMPLES, {"balanced": set()})


# -- Captions ------------------------------------------------------------------------------------

def captions(*texts):
    """Rows of an official file for images 1, 2, ..."""
    return [{"image_id": n, "caption": text} for n, text in enumerate(texts, 1)]


def fakecap(shared):
    """The 126 results and references that the official scorer scored."""
    return (load(shared, "caption_eval/results_fakecap_126.json"),
            load(shared, "caption_eval/captions_val2017_126.json"))


def test_caption_scores_equal_the_official_scorer(shared):
    official = load(shared, "caption_eval/fakecap126_official_scores.json")
    scores = metrics.caption_scores(*fakecap(shared))
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    for name in names:
        assert scores[name] == pytest.approx(official["corpus"][name], abs=1e-12)
    assert len(scores["per_image"]) == len(official["per_image"]) == 126
    for image, row in scores["per_image"].items():
        expected = {name: official["per_image"][str(image)][name] for name in names}
        assert row == pytest.approx(expected, abs=1e-12)


def test_tokens_equal_the_java_tokenizer(shared):
    recorded = load(shared, "caption_eval/fakecap126_tokenized.json")
    results, references = fakecap(shared)
    for name, rows in [("gts", references["annotations"]), ("res", results)]:
        ours = {}
        for row in rows:
            tokens = " ".join(ptb_tokens(row["caption"]))
            ours.setdefault(str(row["image_id"]), []).append(tokens)
        assert ours == recorded[name]


# What Stanford CoreNLP 3.4.1 printed for these, without punctuation; ~ is U+00A0. It needs no Java.
TOKENS = """
He'll say it isn't the boys' dog, can't he? = he 'll say it is n't the boys dog ca n't he
I cannot tell; they're gonna go, wanna bet? = i can not tell they 're gon na go wan na bet
A "big" sign (red) [new] {x} = a big sign -lrb- red -rrb- -lsb- new -rsb- -lcb- x -rcb-
Mr. Smith of St. Louis vs. the U.S. team at 5 p.m. = \
mr. smith of st. louis vs. the u.s. team at 5 p.m.
No. 5 said no. The end, etc. = no. 5 said no the end etc.
It costs $5.99, €5 or 50% of 1,000 at 5:30pm = it costs $ 5.99 $ 5 or 50 % of 1,000 at 5:30 pm
a well-known 3-year-old - and -- and --- so... on.... = a well-known 3-year-old and and so on
black/white and/or w/o a w/ sign 1/2 24/7 a//b = black/white and/or w/o a w / sign 1/2 24/7 a / / b
rock 'n' roll, o'clock, O'Brien, ma'am, '80s, 1950's = \
rock 'n' roll o'clock o'brien ma'am '80s 1950 's
'tis a 'quoted' word = 't is a quoted word
a 5'10" man, 5x7 frame, -5 degrees, 10ft., 5.5ft = a 5 10 man 5x7 frame -5 degrees 10ft. 5.5 ft
AT&T, B&W, b&w & more, #1 in #cats by @me, a@b.org = \
at&t b&w b & w & more # 1 in #cats by @me a@b.org
it’s “smart” – a café—now… ½ cup = it 's smart a café now 1/2 cup
wow!!! really?! yes! www.flickr.com man.A <unk> a_b * ** = \
wow !!! really ?! yes www.flickr.com man.a <unk> a_b * **
plan B. The letter C. Zebras eat = plan b the letter c. zebras eat
a smiley :) and :-( = a smiley :-rrb- and :--lrb-
1 1/2 cups, 7-1/2 in. or 10 3/4 = 1~1/2 cups 7-1/2 in or 10~3/4
call 800 555 1212 or (555) 123-4567 = call 800~555~1212 or -lrb-555-rrb-~123-4567
1-800-555-1212, +44 20 7946 0958, 212 555-1212 = 1-800-555-1212 +44~20~7946~0958 212~555-1212
20 30 40, 2 of 3/4, 12 3456, 9/11-2001 = 20 30 40 2 of 3/4 12 3456 9/11-2001
y'all d'you rock'n'roll I've shouldn't've = y' all d'you rock 'n' roll i 've should n't 've
"""


@pytest.mark.parametrize("line", TOKENS.strip().split("\n"))
def test_tokens_of_what_captions_may_hold(line):
    caption, tokens = line.rsplit(" = ", 1)
    assert " ".join(ptb_tokens(caption)) == tokens.replace("~", "\xa0")


def test_a_number_with_a_space_is_one_word_to_rouge_and_two_to_the_others():
    """As in the official scorers: their BLEU and CIDEr split at any space, their ROUGE-L at " "."""
    scores = metrics.caption_scores(captions("1 1/2", "dog"), {
        "annotations": captions("1 1/3", "dog")})["per_image"][1]
    assert scores["ROUGE_L"] == 0 and scores["Bleu_1"] == pytest.approx(1 / 2)


def test_bleu_counted_by_hand():
    # 2 words too few: exp(1 - 6/4). "the" occurs twice, in a reference once. Of three 2-grams,
    # "the cat" alone is right.
    candidate = "the the cat sat".split()
    references = ["the cat did not sit there".split(), "a dog ran far away today".split()]
    corpus, images = metrics.bleu([candidate], [references])
    assert corpus == pytest.approx(images[0])
    brevity = math.exp(1 - 6 / 4)
    assert corpus[:2] == pytest.approx([brevity * 2 / 4, brevity * math.sqrt(2 / 4 * 1 / 3)])
    assert corpus[2] < 1e-4


def test_bleu_takes_the_closest_reference_length_and_adds_counts_before_dividing():
    words = "a b c d e f g h".split()
    corpus, _ = metrics.bleu([words[:4]], [[words[:3], words[:5]]])     # 3 and 5 are as close: 3
    assert corpus[0] == pytest.approx(1)
    corpus, images = metrics.bleu([words[:4], ["x", "y"]], [[words[:4]], [["z", "w"]]])
    assert [row[0] for row in images] == pytest.approx([1, 0], abs=1e-6)
    assert corpus[0] == pytest.approx(4 / 6)


def test_rouge_l_counted_by_hand():
    # best precision 3/4 (first reference), best recall 3/5 (first) and 2/2 (second)
    score = metrics.rouge_l("a x b c".split(), ["a b y c z".split(), "b c".split()])
    assert score == pytest.approx((1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75))
    assert metrics.rouge_l("a b".split(), ["c d".split()]) == 0
    assert metrics.rouge_l([], ["c d".split()]) == 0


def test_cider_counted_by_hand():
    # Words of one image only weigh log 2, the shared "the" nothing. Image 1 is exact. Image 2 has
    # two of three rare 1-grams: cosine sqrt(2/3); two of three 2-grams: the same; one of two
    # 3-grams: sqrt(1/2); no 4-gram. It is one word shorter: exp(-1 / 72).
    candidates = ["the a b c d".split(), "the q r".split()]
    references = [["the a b c d".split()], ["the q r s".split()]]
    image_2 = 10 * (2 * math.sqrt(2 / 3) + math.sqrt(1 / 2)) / 4 * math.exp(-1 / 72)
    assert metrics.cider(candidates, references) == pytest.approx([10, image_2])
    assert metrics.cider(candidates[:1], references[:1]) == [0]         # no idea what is rare


TEXTS = "a red bus on a road", "two dogs run in the snow"
REFERENCES = {"annotations": captions(*TEXTS)}


def test_perfect_captions_have_the_highest_scores():
    scores = metrics.caption_scores(captions(*TEXTS), REFERENCES)
    names = "Bleu_4", "ROUGE_L", "CIDEr"
    assert [scores[name] for name in names] == pytest.approx([1, 1, 10])
    assert json.loads(json.dumps(scores))["per_image"]["2"]["CIDEr"] == pytest.approx(10)


def test_an_empty_caption_scores_zero():
    scores = metrics.caption_scores(captions("", "."), REFERENCES)
    assert [scores[name] for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr")] == [0, 0, 0, 0]


@pytest.mark.parametrize("predictions, sentence", [
    (captions("a"), "1 images have no prediction, the first is 2"),
    (captions("a", "b", "c"), "1 images are predicted but not among those asked, the first is 3"),
    (captions("a", "b") * 2, "2 images are predicted more than once, the first is 1")])
def test_captions_that_are_not_complete_are_refused(predictions, sentence):
    with pytest.raises(ValueError, match=sentence):
        metrics.caption_scores(predictions, REFERENCES)


def test_official_scorer_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pycocoevalcap: pip install -e \.\[metrics\]"):
        metrics.caption_scores(captions(*TEXTS), REFERENCES, official=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SPICE is left out")
def test_java_gives_the_recorded_meteor_and_our_tokens(shared):
    pytest.importorskip("pycocoevalcap", reason="the extra `metrics` is not installed")
    if not shutil.which("java"):
        pytest.skip("no Java")
    official = load(shared, "caption_eval/fakecap126_official_scores.json")["corpus"]
    java = metrics.caption_scores(*fakecap(shared), official=True)
    ours = metrics.caption_scores(*fakecap(shared))
    assert java["METEOR"] == pytest.approx(official["METEOR"], abs=1e-6)
    assert all(java[name] == ours[name] for name in ours if name != "per_image")
    real = []
    real += [line.rsplit(" = ", 1)[0] for line in TOKENS.strip().split("\n") if "~" in line]
    for image in json.loads((shared / "data/coco_small/dataset.json").read_text())["images"]:
        real += [sentence["raw"] for sentence in image["sentences"]]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    tokens = PTBTokenizer().tokenize({0: [{"caption": text} for text in real]})[0]
    assert [" ".join(ptb_tokens(text)) for text in real] == tokens


# -- Retrieval -----------------------------------------------------------------------------------

def test_recall_equals_the_recorded_one(shared):
    tasks = torch.load(shared / "fixtures/flm/seed3_downstream.pt", weights_only=True)["tasks"]
    recorded = tasks["irtr"]["outputs"]
    assert recorded["metric_iids"].tolist() == list(range(12))
    recalls = metrics.recall_at_k(recorded["metric_scores"], recorded["metric_tiids"])
    assert list(recalls) == ["ir_r1", "ir_r5", "ir_r10", "tr_r1", "tr_r5", "tr_r10"]
    assert [float(np.float32(r)) for r in recalls.values()] == recorded["metric_ir1_5_10_tr1_5_10"]


def slow_recall(scores, image_of_text, k):
    """By sorting each row and column; of equal scores the later one comes first."""
    images, texts = scores.shape
    ir = []
    for t in range(texts):
        ranked = sorted(range(images), key=lambda i: (scores[i, t], i))
        ir.append(image_of_text[t] in ranked[-k:])
    tr = []
    for i in sorted(set(image_of_text)):
        ranked = sorted(range(texts), key=lambda t: (scores[i, t], t))
        tr.append(any(image_of_text[t] == i for t in ranked[-k:]))
    return np.mean(ir), np.mean(tr)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 6),
       st.integers(0, 2 ** 32))
def test_recall_equals_sorting_also_with_ties(images, texts, values, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, values, (images, texts)).astype(np.float32)    # few values: many ties
    scores[rng.random((images, texts)) < 0.1] = -np.inf
    image_of_text = rng.integers(0, images, texts)                          # some images have none
    recalls = metrics.recall_at_k(scores, image_of_text, ks=(1, 3))
    for k in (1, 3):
        expected = slow_recall(scores, image_of_text.tolist(), k)
        assert (recalls[f"ir_r{k}"], recalls[f"tr_r{k}"]) == expected


@pytest.mark.parametrize("value", [0.0, 1.0, -np.inf])
def test_equal_scores_everywhere_are_at_chance(value):
    recalls = metrics.recall_at_k(np.full((20, 100), value), np.repeat(np.arange(20), 5))
    assert recalls == {"ir_r1": 1 / 20, "ir_r5": 5 / 20, "ir_r10": 10 / 20,
                       "tr_r1": 1 / 20, "tr_r5": 1 / 20, "tr_r10": 2 / 20}


@pytest.mark.parametrize("scores, image_of_text, sentence", [
    (np.array([[0.0, 1.0], [np.nan, 1.0]]), [0, 1], "a score of image 1 is not a number"),
    (np.zeros((2, 3)), [0, 1], r"not shapes \(2, 3\) and \(2,\)"),
    (np.zeros(3), [0, 1, 2], "not shapes"),
    (np.zeros((2, 2)), [0, 2], "the row of its image")])
def test_recall_refuses(scores, image_of_text, sentence):
    with pytest.raises(ValueError, match=sentence):
        metrics.recall_at_k(scores, image_of_text)
