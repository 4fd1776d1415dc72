"""The pictures: the numbers shown beside the masks, what is read from runs, and that PNGs come out."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import data
import flm
from tools import plot

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

RED, BLUE = (250, 0, 0), (0, 0, 250)
CHESS = "a girl plays chess".split()            # n = 6, so m = 5 tokens can be predicted: the words and </s>


def png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert path.stat().st_size < 200_000
        return image.size


class Page:
    """Remembers what is drawn on it."""

    def __init__(self):
        self.texts, self.marks = [], []

    def text(self, x, y, text, **style):
        self.texts.append((x, y, text, style.get("color")))

    def plot(self, x, y, form=None, **style):
        self.marks += [(form, style["color"])] * (form is not None)


def run_directory(path, lines, end="\n", global_batch=8):
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
    (path / "config.json").write_text(json.dumps({"settings": {"global_batch": global_batch}}))
    return str(path)


def where(path, color, near=0):
    """The box of a colour in a picture: left, top, right, bottom. None where it has no such pixel."""
    with Image.open(path) as image:
        alike = (np.abs(np.asarray(image.convert("RGB")).astype(int) - color) <= near).all(-1)
    ys, xs = np.nonzero(alike)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def refusal(*argv):
    with pytest.raises(SystemExit) as error:
        plot.main([str(a) for a in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


# -- masks -------------------------------------------------------------------------------------------------------------

def test_rates_are_those_counted_by_hand():
    mlm, ar, prefix, alone, spans = plot.draw_panels(CHESS, prefix=2)
    assert plot.rates(mlm) == pytest.approx((1 / 5, 1 / 5))                             # one word, hidden everywhere
    assert plot.rates(ar) == pytest.approx((4 / 5, (4 + 3 + 2 + 1) / 20))          # "a" has no row that predicts it
    assert plot.rates(prefix) == pytest.approx((3 / 5, (3 + 2 + 1) / 15))               # rows girl, plays, chess
    assert plot.rates(alone) == pytest.approx((1, 1 / 5))                               # the word itself, nothing else
    assert plot.rates(spans)[0] == 1


def test_rates_of_large_spans_are_the_rate_asked_for_on_average():
    corruption = [plot.rates(plot.draw_panels(CHESS, rate=0.6, seed=seed)[4])[1] for seed in range(400)]
    assert np.mean(corruption) == pytest.approx(0.6, abs=0.02)


def test_no_row_that_predicts_is_drawn_as_seeing_its_answer():
    for seed in range(20):
        for panel in plot.draw_panels(CHESS, seed=seed):
            assert panel.targets
            for row, target in panel.targets.items():
                assert not (panel.left | panel.right)[row, target], (panel.title, row)


def test_a_change_of_the_models_masks_changes_the_picture(monkeypatch):
    monkeypatch.setattr(flm, "left_to_right_mask", flm.bidirectional_mask)
    assert plot.draw_panels(CHESS)[1].right.any()


def test_left_and_right_context_of_flm_meet_at_the_word():
    panel = plot.draw_panels(CHESS)[3]
    row, column = np.indices((6, 6))
    assert np.array_equal(panel.left[1:], ((column < row) & (column > 0))[1:])
    assert np.array_equal(panel.right[1:], (column > row)[1:])


def test_masks_picture_is_written_into_a_new_directory(tmp_path):
    plot.main(["masks", "--out", str(tmp_path / "docs" / "masks.png")])
    width, height = png(tmp_path / "docs" / "masks.png")
    assert width == 1500 and 900 < height < 1300


@pytest.mark.parametrize("flags, part", [
    (["--caption", "a girl"], "--caption of 2 words"), (["--rate", "1.5"], "--rate"), (["--prefix", "6"], "--prefix")])
def test_masks_refuses_what_does_not_fit(tmp_path, flags, part):
    assert part in refusal("masks", "--out", tmp_path / "x.png", *flags)


# -- curves ------------------------------------------------------------------------------------------------------------

FLM_RUN = [{"step": 0, "val_loss": 6.0, "val_reconstructed_accuracy": 0.0},
           {"step": 10, "loss": 5.0, "reconstructed_accuracy": 0.1, "seconds": 20.0},
           {"step": 20, "loss": 4.0, "reconstructed_accuracy": 0.2, "seconds": 30.0},
           {"step": 15, "val_loss": 4.5, "val_reconstructed_accuracy": 0.15}]
AR_RUN = [{"step": 10, "loss": 5.5, "left_to_right_accuracy": 0.05, "seconds": 5.0}, {"step": 20, "lr": 0.1, "seconds": 9.0}]


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    for end in ('\n{"step": 30, "lo', "\n[", "\n"):
        run = run_directory(tmp_path / f"run{len(end)}", FLM_RUN, end=end)
        assert plot.read_metrics(run) == FLM_RUN


def test_a_broken_line_inside_is_named(tmp_path):
    run = run_directory(tmp_path / "run", FLM_RUN)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n{"step": 30}\n')
    assert "line 5" in refusal("curves", run, "--out", tmp_path / "x.png")


def test_each_x_axis_measures_what_it_says(tmp_path):
    run = run_directory(tmp_path / "run", FLM_RUN, global_batch=8)
    assert plot.horizontal(run, FLM_RUN, "step").tolist() == [0, 10, 20, 15]
    assert plot.horizontal(run, FLM_RUN, "samples").tolist() == [0, 80, 160, 120]
    assert plot.horizontal(run, FLM_RUN, "seconds").tolist() == [0, 20, 30, 25]    # validation stands in between
    resumed = [{"step": 10, "seconds": 8.0}, {"step": 20, "seconds": 5.0}, {"step": 30, "seconds": 9.0}]
    assert plot.horizontal(run, resumed, "seconds").tolist() == [8, 13, 17]        # a resumed run's clock starts anew


def test_the_accuracy_shown_belongs_to_the_loss_shown():
    rows = [{"step": 1, "left_to_right_accuracy": 0.1, "reconstructed_accuracy": 0.1, "val_right_to_left_accuracy": 0.1}]
    assert plot.accuracy_key("loss", rows) == "reconstructed_accuracy"
    assert plot.accuracy_key("right_to_left_loss", rows) == "right_to_left_accuracy"
    assert plot.accuracy_key("itm_loss", rows) is None
    assert plot.accuracy_key("loss", AR_RUN) == "left_to_right_accuracy"


def test_curves_of_runs_with_different_keys_share_a_picture(tmp_path, capsys):
    runs = [run_directory(tmp_path / "flm", FLM_RUN, end='\n{"st'), run_directory(tmp_path / "ar", AR_RUN)]
    out = tmp_path / "curves.png"
    plot.main(["curves", *runs, "--x", "seconds", "--out", str(out)])
    assert png(out) == (1500, 630)
    plot.main(["curves", runs[0], str(tmp_path / "ar" / "metrics.jsonl"), "--key", "lr", "--out", str(out)])
    assert f"{runs[0]}: no lr in it" in capsys.readouterr().out


def test_curves_refuses_missing_and_empty_runs_in_one_sentence(tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "there is no such file" in refusal("curves", tmp_path / "nowhere", *out)
    assert "no complete line" in refusal("curves", run_directory(tmp_path / "new", [], end=""), *out)
    run = run_directory(tmp_path / "run", FLM_RUN)
    assert "--key los: none of the runs has it" in refusal("curves", run, "--key", "los", *out)
    (tmp_path / "run" / "config.json").unlink()
    assert "global_batch" in refusal("curves", run, "--x", "samples", *out)
    assert not (tmp_path / "x.png").exists()


# -- words -------------------------------------------------------------------------------------------------------------

def arrow_file(path, schema, colors, size=(40, 30)):
    """Rows of plain pictures; of a schema with two, a row has two of the colours."""
    columns = [column.name for column in schema if column.name.startswith("image") and column.name != "image_id"]
    with data.Writer(path, schema) as out:
        for k in range(0, len(colors), len(columns)):
            row = dict.fromkeys(schema.names)
            for column, color in zip(columns, colors[k:]):
                buffer = io.BytesIO()
                Image.new("RGB", size, color).save(buffer, "PNG")
                row[column] = buffer.getvalue()
            out.write(row)
    return str(path)


def words_file(tmp_path, **changes):
    arrow = arrow_file(tmp_path / "toy_caption_test.arrow", data.CAPTIONS, [(80 * k, 0, 200) for k in range(3)])
    tokens = ["a", " red"] + [" ring", " and"] * 20
    example = {"file": arrow, "row": 0, "other_file": arrow, "other_row": 2, "tokens": tokens,
               "guesses": {"right image": tokens, "another image": tokens[::-1], "no image": tokens}} | changes
    row = {"right image": 0.9, "another image": 0.2, "no image": 0.1}
    result = {"accuracy": {"colours": row, "shapes": row}, "words": {"colours": 30, "shapes": 40},
              "examples": [example]}
    (tmp_path / "words.json").write_text(json.dumps({"test": result, "holdout": result | {"examples": []}}))
    return tmp_path / "words.json"


def test_words_picture_is_written_with_the_other_picture_from_its_own_file(tmp_path):
    other, out = arrow_file(tmp_path / "other.arrow", data.CAPTIONS, [RED] * 3), tmp_path / "words.png"
    plot.main(["words", str(words_file(tmp_path, other_file=other)), "--out", str(out)])
    width, height = png(out)
    assert width == 1500 and height > 600
    assert where(out, (0, 0, 200), near=8) and where(out, RED, near=8) and not where(out, (160, 0, 200), near=8)


def test_long_guesses_wrap_within_their_column():
    page, tokens = Page(), ["t", "wo"] + [" circles"] * 20
    lines = plot.write(page, tokens, [False] * 21 + [True], 1.0, 2.0, 3.0)
    assert max(x + len(text) * plot.LETTER for x, _, text, _ in page.texts) <= 4.0 + 1e-9
    assert lines == len({y for _, y, *_ in page.texts}) > 1
    assert "".join(text for *_, text, _ in page.texts).replace(" ", "") == "".join(tokens).replace(" ", "")
    assert [color for *_, color in page.texts] == [None] * 21 + [plot.VERMILLION]


def test_words_refuses_in_one_sentence(tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "there is no such file" in refusal("words", tmp_path / "no.json", *out)
    for content in ("{", "{}", "[1]", '{"test": {"accuracy": {}}}'):
        (tmp_path / "bad.json").write_text(content)
        assert "not what `eval.py words` writes" in refusal("words", tmp_path / "bad.json", *out)
    assert "there is no such file" in refusal("words", words_file(tmp_path, file=str(tmp_path / "gone.arrow")), *out)
    assert "has 3 rows, no row 7" in refusal("words", words_file(tmp_path, row=7), *out)


# -- align -------------------------------------------------------------------------------------------------------------

def align_file(tmp_path, **changes):
    """One caption of two words on a picture of 2 x 3 patches: one goes to the top middle, one anywhere."""
    arrow = arrow_file(tmp_path / "toy_caption_test.arrow", data.CAPTIONS, [RED], size=(60, 40))
    found = {"file": arrow, "row": 0, "tokens": ["a", " dog"], "grid": [2, 3],
             "plan": [[0.05, 0.75, 0.05, 0.05, 0.05, 0.05], [1 / 6] * 6]} | changes
    (tmp_path / "align.json").write_text(json.dumps([found]))
    return tmp_path / "align.json"


def test_of_a_words_picture_the_patch_is_clear_that_it_is_carried_to(tmp_path):
    page = Page()
    page.imshow = lambda picture, extent, aspect: page.marks.append(picture[:, :, 0])
    [alignment] = json.loads(align_file(tmp_path).read_text())
    plot.draw_alignment(page, alignment, 0, 16)
    main, first, second = page.marks
    assert (main == 250).all() and (second == 250).all()                # carried anywhere: all patches are as clear
    h, w = first.shape
    assert h / 2 == w / 3                                               # of whole patches
    clear = first == 250
    assert clear[:h // 2, w // 3:2 * w // 3].all() and clear.sum() == h // 2 * (w // 3)
    assert [text for _, _, text, _ in page.texts] == ["a", "75 %", "dog", "17 %"]


def test_long_captions_are_continued_on_a_new_line(tmp_path):
    tokens = [f" w{k}" for k in range(plot.WORDS_A_LINE + 3)]
    [alignment] = json.loads(align_file(tmp_path, tokens=tokens, plan=[[1 / 6] * 6] * len(tokens)).read_text())
    page = Page()
    page.imshow = lambda picture, extent, aspect: page.marks.append(extent)
    height = plot.draw_alignment(page, alignment, 0, 16)
    assert len({top for *_, top in page.marks[1:]}) == 2
    assert max(right for _, right, *_ in page.marks) <= plot.WIDTH
    assert max(bottom for _, _, bottom, _ in page.marks) <= height
    assert height == plot.draw_alignment(None, alignment, 0, 16)


def test_align_picture_is_written(tmp_path):
    plot.main(["align", str(align_file(tmp_path)), "--out", str(tmp_path / "align.png")])
    assert png(tmp_path / "align.png")[0] == 1500
    assert where(tmp_path / "align.png", RED)


def test_align_refuses_in_one_sentence(tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "there is no such file" in refusal("align", tmp_path / "no.json", *out)
    for content in ("{", "[]", "{}", "[1]", '[{"tokens": ["a"], "grid": [1, 1], "plan": [[1]]}]'):
        (tmp_path / "bad.json").write_text(content)
        assert "not what `eval.py align` writes" in refusal("align", tmp_path / "bad.json", *out)
    assert "not what" in refusal("align", align_file(tmp_path, grid=[2, 2]), *out)
    assert "has 1 rows, no row 4" in refusal("align", align_file(tmp_path, row=4), *out)


# -- sheet -------------------------------------------------------------------------------------------------------------

ANSWERED = {"row": 0, "images": ["image"], "text": "is it red?", "answer": "no", "truth": "yes / red", "right": False}


def sheet_file(tmp_path, *examples, images=("image",)):
    schema = data.NLVR2 if len(images) == 2 else data.CAPTIONS
    arrow = arrow_file(tmp_path / "some.arrow", schema, [RED, BLUE], size=(60, 20))
    examples = [ANSWERED | {"file": arrow, "images": images} | example for example in examples]
    (tmp_path / "examples.json").write_text(json.dumps({"title": "VQA, val", "examples": examples}))
    return str(tmp_path / "examples.json")


def drawn(**changes):
    page = Page()
    height = plot.draw_answer(page, ANSWERED | changes, 1.0, 2.0, 2.0)
    assert height == pytest.approx(plot.draw_answer(None, ANSWERED | changes, 1.0, 2.0, 2.0))
    assert all(2.0 < y < 2.0 + height for _, y, *_ in page.texts)
    return {text: color for _, _, text, color in page.texts}, page.marks


def test_wrong_answers_are_marked_as_wrong_and_the_truth_stands_beside_them():
    texts, marks = drawn()
    assert texts == {"is it red?": plot.INK, "no": plot.VERMILLION, "truth: yes / red": plot.INK}
    assert marks == [("s", plot.VERMILLION)]
    assert "truth: " not in drawn(truth="")[0]


def test_right_answers_have_another_mark_in_form_and_colour_and_no_truth():
    texts, marks = drawn(answer="yes", right=True)
    assert texts == {"is it red?": plot.INK, "yes": plot.GREEN}
    assert marks == [("o", plot.GREEN)]


def test_a_picture_that_is_the_answer_is_called_right_or_wrong():
    assert drawn(answer="", truth="", right=True)[0] == {"is it red?": plot.INK, "right": plot.GREEN}
    assert drawn(answer="", truth="", right=False)[0] == {"is it red?": plot.INK, "wrong": plot.VERMILLION}


def test_what_cannot_be_judged_is_neither_marked_nor_counted():
    assert drawn(text="", answer="a dog", right=None) == ({"a dog": plot.INK}, [])
    assert plot.score_line([{"right": None}]) == ""
    assert plot.score_line([{"right": r} for r in (True, None, False, True)]) == "2 of these 3 right (67 %)"


def test_lines_fit_and_lose_no_word():
    for text in ("what is this " * 8, "W" * 60, "a $x$ b", "two\nlines", ""):
        lines = plot.wrap(text, 1.5, 10, "bold")
        assert "".join(lines).replace(" ", "") == "".join(text.split())
        assert all(0 < plot.text_width(line, 10, "bold") <= 1.5 for line in lines)


def test_sheet_shows_whole_pictures_and_marks_each_answer(tmp_path):
    out = tmp_path / "sheet.png"
    plot.main(["sheet", sheet_file(tmp_path, {}, {"row": 1, "right": True}), "--out", str(out)])
    assert png(out)[0] == 1500
    (left, top, right, bottom), blue = where(out, RED), where(out, BLUE)
    assert (right - left) / (bottom - top) == pytest.approx(3, rel=0.03)    # nothing is cut off or squeezed
    assert right < blue[0]
    green, vermillion = (where(out, [int(255 * c) for c in plot.matplotlib.colors.to_rgb(color)], near=1)
                         for color in (plot.GREEN, plot.VERMILLION))
    assert left <= vermillion[0] < right < blue[0] <= green[0]


def test_both_pictures_of_a_pair_are_shown_the_left_one_left(tmp_path):
    out = tmp_path / "sheet.png"
    plot.main(["sheet", sheet_file(tmp_path, {}, images=("image_0", "image_1")), "--out", str(out)])
    (left, top, right, bottom), blue = where(out, RED), where(out, BLUE)
    assert right <= blue[0] and (top, bottom) == (blue[1], blue[3])
    assert (right - left) / (bottom - top) == pytest.approx(3, rel=0.03)


def test_examples_are_spread_evenly():
    assert plot.spread(list(range(24)), 3) == [0, 12, 23]
    assert plot.spread([1, 2], 12) == [1, 2]
    assert plot.spread([], 12) == []


def test_a_picture_that_cannot_be_decoded_is_black_and_named(tmp_path, capsys):
    arrow = tmp_path / "broken.arrow"
    with data.Writer(arrow, data.CAPTIONS) as out:
        out.write({"image": b"no picture", "caption": ["a"], "image_id": "0", "split": "test"})
    picture = plot.read_picture(str(arrow), 0, plot.inside(2, 2))
    assert picture.shape == (225, 300, 3) and not picture.any()
    assert "broken.arrow row 0" in capsys.readouterr().out


def test_sheet_refuses_in_one_sentence(tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "there is no such file" in refusal("sheet", tmp_path / "no.json", *out)
    for content in ("{", "[]", "{}", '{"title": "t", "examples": []}', '{"title": "t", "examples": [{}]}',
                    '{"title": "t", "examples": "ab"}'):
        (tmp_path / "bad.json").write_text(content)
        assert "not what eval.py" in refusal("sheet", tmp_path / "bad.json", *out)
    for wrong in ({"right": "yes"}, {"answer": None}, {"images": []}):
        assert "not what eval.py" in refusal("sheet", sheet_file(tmp_path, wrong), *out)
    assert "has 2 rows, no row 2" in refusal("sheet", sheet_file(tmp_path, {"row": 2}), *out)
    assert "has no column image_0" in refusal("sheet", sheet_file(tmp_path, {"images": ["image_0"]}), *out)
    with pytest.raises(SystemExit):
        plot.main(["sheet", sheet_file(tmp_path, {}), "--examples", "0"])
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("argv", [["--help"], ["masks", "--help"], ["curves", "--help"], ["words", "--help"],
                                  ["align", "--help"], ["sheet", "--help"]])
def test_help_is_printed(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(argv)
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
