"""What the demo page shows, without Gradio.

Words, answers, scenes, masks, and what visitors do wrong.
"""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import predict
import weights
from conftest import noise_picture, vilt_model, write_page_models, TINY_VILT
from released import named
from tools import demo, demo_answers as answers, demo_pictures as pictures
from tools.toy_world import Scene, Shape, is_true


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_page_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(paths):
    return answers.open_models(paths)


@pytest.fixture
def drawn(tmp_path):
    return answers.draw_scene(tmp_path, 5)


def only(models, tab):
    [model] = models.able[tab].values()
    return model


# -- the models ------------------------------------------------------------------------------------

def test_each_model_serves_the_tab_of_its_task_alone(models, paths):
    assert {tab: list(able) for tab, able in models.able.items()} == {
        "Fill in": [str(paths[0])], "Ask": [str(paths[1])], "Compare": [str(paths[2])],
        "Search": [str(paths[3])], "Describe": [str(paths[4])]}
    assert answers.missing_tabs(models) == ""


def test_the_page_names_every_tab_that_is_missing_and_the_command_that_makes_it(paths):
    said = answers.missing_tabs(answers.open_models(paths[:2]))
    assert re.findall(r"^- \*\*(.+?)\*\*", said, re.M) == ["Describe", "Compare", "Search"]
    for command in ("`make caption`", "`make nlvr2`", "`make retrieval`", "--task nlvr2 --load"):
        assert command in said


def test_without_checkpoints_it_opens_what_make_left_and_a_name_of_models_first(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "MODELS", tmp_path)
    assert answers.existing_defaults() == []
    for path in ("runs/toy/last.pt", "runs/toy-vqa/last.pt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "toy.safetensors").touch()
    assert answers.existing_defaults() == ["toy", "runs/toy-vqa/last.pt"]


def test_a_model_that_no_tab_can_use_is_named(tmp_path, paths):
    saved = weights.read(paths[4])
    weights.save(tmp_path / "ar.pt", saved["model"], weights.config_of(saved), "pretrain",
                 saved["tokenizer"])
    missing = answers.missing_tabs(answers.open_models([tmp_path / "ar.pt"]))
    assert f"`{tmp_path / 'ar.pt'}` is of no use here" in missing


# -- fill in ---------------------------------------------------------------------------------------

def test_every_word_has_the_probability_that_the_model_gives_it_and_blanks_are_those_of_fill(
        models, drawn):
    model = only(models, "Fill in")
    reading = answers.read_words(model, drawn.path, "a ___ star, and a <mask> ring")
    text, words = predict.fill(model, drawn.path, "a <mask> star, and a <mask> ring")
    assert model.tokenizer.decode(reading.ids[0, 1:-1].tolist()) == text
    assert [word.text for word in reading.words if word.was_blank] == [word for word, _ in words]
    fused = model.fuse(predict.encode_pictures(model, [drawn.path]), model.encode_text(reading.ids))
    shares = model.vocab_logits(fused.reconstructed[0]).softmax(-1)         # (L, V)
    for position, word in enumerate(reading.words, 1):
        assert word.share == pytest.approx(shares[position, reading.ids[0, position]].item(),
                                           abs=1e-5)
        chances = [share for _, share in word.choices]
        assert chances == sorted(chances, reverse=True)


def test_a_text_without_blanks_keeps_its_words(models, drawn):
    reading = answers.read_words(only(models, "Fill in"), drawn.path, "a red star")
    assert "".join(" " * word.starts + word.text for word in reading.words).strip() == "a red star"
    assert not any(word.was_blank for word in reading.words)


def test_words_of_a_masked_language_model_do_not_know_themselves(tmp_path, paths):
    """Else the word that stands there would change what the model says in its place."""
    tok = predict.open_model(paths[0]).tokenizer
    model = vilt_model(replace(TINY_VILT, vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id,
                               sep_id=tok.sep_id, mask_id=tok.mask_id))
    model.tokenizer, model.task = tok, "pretrain"
    path = answers.draw_scene(tmp_path, 1).path
    one, other = (answers.read_words(model, path, f"a {word} star").words
                  for word in ("red", "big"))
    assert one[1].text != other[1].text and one[1].choices == other[1].choices
    found = pictures.look_for(model, answers.read_words(model, path, "a red star"), 1)
    assert found.tokens[2].strip() == tok.tokens[tok.mask_id]
    assert pictures.maps(found, 1).width > 100


def test_the_row_of_the_mask_hides_the_word_itself_and_colours_the_two_streams(models, drawn):
    model = only(models, "Fill in")
    reading = answers.read_words(model, drawn.path, "a red star")
    i = next(i for i, word in enumerate(reading.words) if word.text == "red")
    row = pictures.mask_row(pictures.look_for(model, reading, i), i)
    kinds = re.findall(r'class="(left|right|hidden own)"', row)
    assert kinds == ["left"] * i + ["hidden own"] + ["right"] * (len(reading.words) - i - 1)


def test_what_visitors_type_is_text_and_not_html(models, drawn):
    reading = answers.read_words(only(models, "Fill in"), drawn.path, "<b> <script>")
    found = pictures.look_for(only(models, "Fill in"), reading, 0)
    for shown in (answers.word_table(reading), pictures.mask_row(found, 0)):
        assert "<script" not in shown and "&lt;" in shown


# -- bad input -------------------------------------------------------------------------------------

def refusal(function, *arguments):
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    says = answers.sentence(error.value)
    assert "\n" not in says and "Traceback" not in says
    return says


def test_bad_pictures_and_texts_get_a_sentence(models, tmp_path, monkeypatch):
    model = only(models, "Fill in")
    text = tmp_path / "notes.png"
    text.write_text("no picture at all")
    assert "not a picture that can be read" in refusal(answers.read_words, model, str(text),
                                                       "a star")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(noise_picture(size=(400, 300))[:300])
    assert "not a picture" in refusal(answers.read_words, model, str(broken), "a star")
    dot = tmp_path / "dot.png"
    Image.new("RGB", (1, 1), "red").save(dot)
    assert answers.read_words(model, str(dot), "a star").words
    said = refusal(answers.read_words, model, str(dot), "star " * 500)
    said = said.replace("this model reads at most 88", "at most 88 are read")
    assert "at most 88 are read" in said
    for empty in ("", "  ", None):
        assert refusal(answers.read_words, model, str(dot), empty) == "Type a text first."
    assert refusal(answers.read_words, model, None, "a star").startswith("Choose a picture first")
    with open(tmp_path / "big.jpg", "wb") as big:
        big.truncate(40_000_000)
    said = refusal(answers.read_words, model, str(tmp_path / "big.jpg"), "a star")
    assert "big.jpg: a file of 40 MB; at most 30 MB" in said


def test_a_sentence_does_not_tell_where_uploads_lie():
    error = ValueError("/tmp/demo_x/9f3c/my photo.jpg: not a picture that can be read (truncated)")
    sentence = answers.sentence(error, "/tmp/demo_x")
    assert sentence == "my photo.jpg: not a picture that can be read (truncated)"


def test_a_turned_photograph_is_read_upright(models, drawn, tmp_path):
    image, exif = Image.open(drawn.path), Image.Exif()
    # stored turned to the left: turn it to the right to see it
    exif[0x0112] = 6
    image.save(tmp_path / "plain.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    one, other = (answers.read_words(only(models, "Fill in"), str(tmp_path / name),
                                     "a red star").words
                  for name in ("plain.png", "turned.png"))
    assert one == other


# -- describe, search ------------------------------------------------------------------------------

def test_a_description_in_each_way_is_that_of_predict(models, drawn):
    model = only(models, "Describe")
    expected = [predict.describe(model, drawn.path), predict.describe(model, drawn.path, beams=3),
                predict.describe(model, drawn.path, top_p=0.8, temperature=1.3, seed=4)]
    assert [answers.describe(model, drawn.path, how, 3, 0.8, 1.3, 4)
            for how in answers.HOW] == expected


def test_a_search_keeps_the_pictures_and_names_what_it_left_out(models, tmp_path):
    drawn = [answers.draw_scene(tmp_path, seed).path for seed in range(3)]
    for name, contents in (("notes.txt", b"words"), ("wrong.jpg", b"words")):
        (tmp_path / name).write_bytes(contents)
    found, left_out = answers.search(only(models, "Search"), "a red star",
                                     [*drawn, *map(str, (tmp_path / "notes.txt",
                                                         tmp_path / "wrong.jpg"))])
    assert {path for path, _ in found} == set(drawn)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert len(left_out) == 2 and "notes.txt" in left_out[0] and "wrong.jpg" in left_out[1]


@pytest.mark.parametrize("text, files, says", [
    ("", ["a.jpg"], "Type a text"), ("a star", [], "Choose pictures first"),
                                               ("a star", None, "Choose pictures first"),
    ("a star", ["a.txt", "b"], "None of the 2 files"),
                                               ("a star", [f"{i}.jpg" for i in range(501)],
                                                "at most 500")])
def test_a_search_without_sense_gets_a_sentence(models, text, files, says):
    assert says in refusal(answers.search, only(models, "Search"), text, files)


def test_texts_are_ranked_once_each(models, drawn):
    found = answers.rank(only(models, "Search"), drawn.path,
                         "a red star\n\n a red star \na blue ring")
    assert sorted(text for text, _ in found) == ["a blue ring", "a red star"]
    assert "at most 50" in refusal(answers.rank, only(models, "Search"), drawn.path,
                                   "\n".join(map(str, range(51))))
    assert "Type some texts" in refusal(answers.rank, only(models, "Search"), drawn.path, "\n \n")


# -- scenes ----------------------------------------------------------------------------------------

def test_all_that_is_said_of_a_drawn_scene_is_true(tmp_path):
    for seed in range(20):
        drawn = answers.draw_scene(tmp_path, seed)
        assert all(drawn.truth(caption) for caption in drawn.captions)
        said = answers.facts(drawn)
        line = said.splitlines()[0]
        shapes = line.removeprefix("**In this scene:** ").removesuffix(".").split("; ")
        assert len(shapes) == len(drawn.scene.shapes) and all(map(drawn.truth, shapes))
        assert not any(map(drawn.truth, answers.wrong_captions(drawn, seed)))


def test_the_picture_shows_the_scene(tmp_path):
    drawn = answers.draw_scene(tmp_path, 3)
    pixels = np.asarray(Image.open(drawn.path).convert("RGB")).astype(int)
    ground = np.median(pixels, axis=(0, 1))
    for shape in drawn.scene.shapes:
        x, y, r = (round(value * answers.SIDE / 64) for value in (shape.x, shape.y, 7.2))
        near = pixels[max(0, y - r):y + r, max(0, x - r):x + r]
        assert (abs(near - ground).sum(-1) > 60).mean() > 0.05


def test_two_scenes_come_with_a_statement_that_is_as_often_false(tmp_path):
    truths = [answers.draw_pair(tmp_path, seed)[3] for seed in range(30)]
    assert 5 <= sum(truths) <= 25


def test_a_verdict_is_that_of_the_world():
    scene = Scene((Shape("star", "red", "big", 20, 10),))
    drawn = answers.Drawn("", scene, [], [])
    assert [answers.mark(drawn.truth(text))
            for text in ("a red star", "a blue star", "blue sky")] == ["✓ true", "✗ false", "?"]
    assert is_true("a red star", scene)


# -- masks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", pictures.OBJECTIVES)
def test_every_objective_is_drawn_with_its_rates(objective):
    picture, says = pictures.masks("a girl plays chess", objective, 0.4, 2, 0)
    assert picture.width > 300 and np.asarray(picture).std() > 10
    assert {"FLM": "5 of 5", "MLM": " of 5", "AR": "4 of 5", "Prefix": "3 of 5"}[objective] in says


@pytest.mark.parametrize("text, prefix, says", [
    ("", 1, "0 words; 2 to 12"), ("word", 1, "1 words; 2 to 12"),
                                                ("word " * 500, 1, "500 words; 2 to 12"),
    ("a girl plays", 3, "leaves none of 3")])
def test_a_sentence_that_does_not_fit_gets_a_sentence(text, prefix, says):
    assert says in refusal(pictures.masks, text, "Prefix", 0.4, prefix, 0)


def test_extreme_sentences_are_drawn():
    for objective, rate in (("FLM", 1), ("MLM", 0), ("MLM", 1), ("AR", 0)):
        pictures.masks("$x$ _y_ ^z^ <b> ein Mädchen " + "x" * 300, objective, rate, 1, 0)


# -- the command -----------------------------------------------------------------------------------

def test_without_gradio_the_command_names_the_extra(monkeypatch, paths):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "gradio" else find(name, *more))
    with pytest.raises(SystemExit) as stop:
        demo.main([str(paths[0])])
    assert str(stop.value) == "demo.py: the page needs a package: pip install '.[demo]'"
