"""The pictures: the numbers beside the masks, what is read from runs, that PNG files come out."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import masks
from sources.shards import Writer
from storage.files import CAPTIONS, NLVR2
from tools import figures, plot, plot_examples

pytestmark = pytest.mark.slow       # matplotlib alone takes seconds

CHESS = "a girl plays chess".split()            # n = 6: the words and </s> make 5 tokens


def draw(*argv):
    """Runs a command and returns the size of the PNG file that it wrote."""
    plot.main([str(a) for a in argv])
    with Image.open(argv[-1]) as image:
        assert image.format == "PNG"
        return image.size


def refusal(*argv):
    with pytest.raises(SystemExit) as error:
        plot.main([str(a) for a in argv])
    message = str(error.value)
    assert message.startswith("plot.py: ") and "\n" not in message
    return message


# -- masks -----------------------------------------------------------------------------------------

def test_rates_are_those_counted_by_hand():
    mlm, ar, prefix, alone, spans = plot.draw_panels(CHESS, prefix=2)
    assert plot.rates(mlm) == pytest.approx((1 / 5, 1 / 5))         # one word, hidden everywhere
    assert plot.rates(ar) == pytest.approx((4 / 5, (4 + 3 + 2 + 1) / 20))    # no row predicts "a"
    assert plot.rates(prefix) == pytest.approx((3 / 5, (3 + 2 + 1) / 15))    # girl, plays, chess
    assert plot.rates(alone) == pytest.approx((1, 1 / 5))           # the word itself, nothing else
    assert plot.rates(spans)[0] == 1


def test_rates_of_large_spans_are_the_rate_asked_for_on_average():
    corruption = [plot.rates(plot.draw_panels(CHESS, rate=0.6, seed=seed)[4])[1]
                  for seed in range(400)]
    assert np.mean(corruption) == pytest.approx(0.6, abs=0.02)


def test_no_row_that_predicts_is_drawn_as_seeing_its_answer():
    for seed in range(20):
        for panel in plot.draw_panels(CHESS, seed=seed):
            assert panel.targets
            for row, target in panel.targets.items():
                assert not (panel.left | panel.right)[row, target], (panel.title, row)


@pytest.mark.parametrize("mask, number", [
    ("bidirectional_mask", 0), ("left_to_right_mask", 1), ("prefix_mask", 2),
    ("reconstructor_mask", 3), ("reconstructor_mask", 4)])
def test_each_panel_is_drawn_from_the_models_own_mask(monkeypatch, mask, number):
    before = plot.draw_panels(CHESS)[number]
    original = getattr(masks, mask)
    monkeypatch.setattr(masks, mask, lambda *args: ~original(*args))
    after = plot.draw_panels(CHESS)[number]
    assert not np.array_equal(before.left | before.right, after.left | after.right)


def test_left_and_right_context_of_flm_meet_at_the_word():
    panel = plot.draw_panels(CHESS)[3]
    row, column = np.indices((6, 6))
    assert np.array_equal(panel.left[1:], ((column < row) & (column > 0))[1:])
    assert np.array_equal(panel.right[1:], (column > row)[1:])


def test_masks_writes_a_picture_into_a_new_directory(tmp_path):
    assert draw("masks", "--out", tmp_path / "docs" / "masks.png") == (1500, 1140)


@pytest.mark.parametrize("flags, part", [
    (["--caption", "a girl"], "--caption of 2 words"), (["--rate", "1.5"], "--rate"),
    (["--prefix", "6"], "--prefix")])
def test_masks_refuses_what_does_not_fit(tmp_path, flags, part):
    assert part in refusal("masks", "--out", tmp_path / "x.png", *flags)


# -- curves ----------------------------------------------------------------------------------------

FLM_RUN = [{"step": 0, "val_loss": 6.0, "val_reconstructed_accuracy": 0.0},
           {"step": 10, "loss": 5.0, "reconstructed_accuracy": 0.1, "seconds": 20.0},
           {"step": 20, "loss": 4.0, "reconstructed_accuracy": 0.2, "seconds": 30.0},
           {"step": 15, "val_loss": 4.5, "val_reconstructed_accuracy": 0.15}]
AR_RUN = [{"step": 10, "loss": 5.5, "left_to_right_accuracy": 0.05, "seconds": 5.0},
          {"step": 20, "lr": 0.1, "seconds": 9.0}]


def run_directory(path, lines, end="\n", global_batch=8):
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
    (path / "config.json").write_text(json.dumps({"settings": {"global_batch": global_batch}}))
    return str(path)


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    for end in ('\n{"step": 30, "lo', "\n[", "\n"):
        run = run_directory(tmp_path / f"run{len(end)}", FLM_RUN, end=end)
        assert plot.read_metrics(run) == FLM_RUN


def test_a_broken_line_inside_is_named(tmp_path):
    run = run_directory(tmp_path / "run", FLM_RUN)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"loss"\n{"step": 30}\n')
    assert "line 5" in refusal("curves", run, "--out", tmp_path / "x.png")


def test_each_x_axis_measures_what_it_says(tmp_path):
    run = run_directory(tmp_path / "run", FLM_RUN, global_batch=8)
    assert plot.horizontal(run, FLM_RUN, "step").tolist() == [0, 10, 20, 15]
    assert plot.horizontal(run, FLM_RUN, "samples").tolist() == [0, 80, 160, 120]
    assert plot.horizontal(run, FLM_RUN, "seconds").tolist() == [0, 20, 30, 25]


def test_the_clock_of_a_resumed_run_goes_on(tmp_path):
    resumed = [{"step": 10, "seconds": 8.0}, {"step": 20, "seconds": 5.0},
               {"step": 30, "seconds": 9.0}]
    assert plot.horizontal("run", resumed, "seconds").tolist() == [8, 13, 17]


def test_the_accuracy_shown_belongs_to_the_loss_shown():
    names = {"left_to_right_accuracy", "reconstructed_accuracy", "right_to_left_accuracy"}
    assert plot.accuracy_key("loss", names) == "reconstructed_accuracy"
    assert plot.accuracy_key("right_to_left_loss", names) == "right_to_left_accuracy"
    assert plot.accuracy_key("itm_loss", names) is None
    assert plot.accuracy_key("loss", {"left_to_right_accuracy"}) == "left_to_right_accuracy"


def test_curves_of_runs_with_different_keys_share_a_picture(tmp_path, capsys):
    flm_run = run_directory(tmp_path / "flm", FLM_RUN, end='\n{"st')
    ar_run = run_directory(tmp_path / "ar", AR_RUN)
    out = tmp_path / "curves.png"
    assert draw("curves", flm_run, ar_run, "--x", "seconds", "--out", out) == (1500, 630)
    draw("curves", flm_run, tmp_path / "ar" / "metrics.jsonl", "--key", "lr", "--out", out)
    assert f"{flm_run}: no lr in it" in capsys.readouterr().out


def test_curves_refuses_missing_and_empty_runs_in_one_sentence(tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "metrics.jsonl" in refusal("curves", tmp_path / "nowhere" / "metrics.jsonl", *out)
    empty = run_directory(tmp_path / "new", [], end="")
    assert "--key loss: none of the runs has it" in refusal("curves", empty, *out)
    run = run_directory(tmp_path / "run", FLM_RUN)
    assert "--key los: none of the runs has it" in refusal("curves", run, "--key", "los", *out)
    (tmp_path / "run" / "config.json").unlink()
    assert "config.json" in refusal("curves", run, "--x", "samples", *out)
    assert not (tmp_path / "x.png").exists()


# -- words, align, sheet ---------------------------------------------------------------------------

def encoded(color, size=(60, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def captions(tmp_path):
    """An Arrow file of three pictures, the last of which cannot be decoded."""
    path = tmp_path / "toy_caption_test.arrow"
    with Writer(path, CAPTIONS) as out:
        for image in (encoded((250, 0, 0)), encoded((0, 0, 250)), b"no picture"):
            out.write({"image": image, "caption": ["a"], "image_id": "0", "split": "test"})
    return str(path)


def write(path, contents):
    path.write_text(json.dumps(contents))
    return path


def words_file(captions, path, **changes):
    tokens = ["a", " red"] + [" ring", " and"] * 20
    example = {"file": captions, "row": 0, "other_file": captions, "other_row": 1, "tokens": tokens,
               "guesses": {"right image": tokens, "another image": tokens[::-1],
                           "no image": tokens}} | changes
    row = {"right image": 0.9, "another image": 0.2, "no image": 0.1}
    result = {"accuracy": {"colours": row, "shapes": row}, "words": {"colours": 30, "shapes": 40},
              "examples": [example]}
    return write(path / "words.json", {"test": result, "holdout": result | {"examples": []}})


def alignment(captions, words):
    """That of a caption with a picture of 2 x 3 patches."""
    return {"file": captions, "row": 0, "tokens": ["a"] + [" dog"] * words, "grid": [2, 3],
            "plan": [[0.05, 0.75, 0.05, 0.05, 0.05, 0.05]] + [[1 / 6] * 6] * words}


ANSWERED = {"row": 0, "images": ["image"], "text": "is it red?", "answer": "no",
            "truth": "yes / $red", "right": False}


def sheet_file(captions, path, *examples):
    examples = [ANSWERED | {"file": captions} | example for example in examples]
    return write(path / "examples.json", {"title": "VQA, val", "examples": examples})


def test_words_writes_a_picture(captions, tmp_path):
    assert draw("words", words_file(captions, tmp_path), "--out", tmp_path / "x.png")[0] == 1500


def test_align_writes_a_picture(captions, tmp_path):
    path = write(tmp_path / "align.json", [alignment(captions, 18)])
    assert draw("align", path, "--out", tmp_path / "x.png")[0] == 1500


def test_sheet_writes_a_picture_although_one_cannot_be_decoded(captions, tmp_path, capsys):
    examples = sheet_file(captions, tmp_path, {}, {"row": 1, "right": True}, {"row": 2, "text": ""})
    assert draw("sheet", examples, "--out", tmp_path / "x.png")[0] == 1500
    assert "toy_caption_test.arrow row 2" in capsys.readouterr().out


def test_sheet_shows_both_pictures_of_a_pair(tmp_path):
    path = tmp_path / "nlvr2.arrow"
    with Writer(path, NLVR2) as out:
        out.write({"image_0": encoded("red"), "image_1": encoded("blue", (20, 60)),
                   "questions": ["?"], "answers": ["True"], "identifier": "0",
                   "identifiers": ["0-0"]})
    examples = sheet_file(str(path), tmp_path, {"images": ["image_0", "image_1"]})
    assert draw("sheet", examples, "--out", tmp_path / "x.png")[0] == 1500
    left, right = (plot_examples.read_picture(path, 0, name) for name in ("image_0", "image_1"))
    both = plot_examples.side_by_side([left, right])
    assert np.array_equal(both[:40, :60], left) and np.array_equal(both[:, -20:], right)


def test_of_a_words_picture_the_patch_is_clear_that_it_is_carried_to(captions):
    figure, axes = figures.open_grid(1, 9, 1)
    plot_examples.draw_alignment(axes[0], alignment(captions, 1), range(2))
    _, first_word, second_word = axes[0, :3]
    fog = first_word.images[1].get_alpha()
    assert fog.shape == (2, 3) and fog[0, 1] == 0 and (np.delete(fog, 1) > 0.7).all()
    assert not second_word.images[1].get_alpha().any()      # carried anywhere: all is as clear
    assert [axis.get_xlabel() for axis in (first_word, second_word)] == ["75 %", "17 %"]


@pytest.mark.parametrize("changes, says, color", [
    ({}, "✗ no (truth: yes / $red)", figures.VERMILLION),
    ({"truth": ""}, "✗ no", figures.VERMILLION),
    ({"answer": "yes", "right": True}, "✓ yes", figures.GREEN),
    ({"answer": "", "truth": "", "right": True}, "✓ right", figures.GREEN),
    ({"answer": "", "truth": "", "right": False}, "✗ wrong", figures.VERMILLION),
    ({"answer": "a dog", "right": None}, "a dog", figures.INK)])
def test_an_answer_is_marked_by_sign_and_colour_and_wrong_ones_show_the_truth(changes, says, color):
    assert plot_examples.verdict(ANSWERED | changes) == (says, color)


def test_examples_are_spread_evenly():
    assert plot_examples.spread(list(range(24)), 3) == [0, 12, 23]
    assert plot_examples.spread([1, 2], 12) == [1, 2]


@pytest.mark.parametrize("command, wrong", [
    ("words", ["{}", "[1]", '{"test": {"accuracy": {}}}']),
    ("align", ["[]", "{}", '[{"tokens": ["a"], "plan": [[1]]}]']),
    ("sheet", ["[]", "{}", '{"title": "t", "examples": [{}]}'])])
def test_another_file_than_the_expected_one_is_named(tmp_path, command, wrong):
    path, out = tmp_path / "x.json", ("--out", tmp_path / "x.png")
    assert "x.json" in refusal(command, path, *out)         # there is no such file
    for contents in wrong:
        path.write_text(contents)
        assert "x.json: not what " in refusal(command, path, *out)
    assert not (tmp_path / "x.png").exists()


def test_rows_and_columns_that_a_file_does_not_have_are_named(captions, tmp_path):
    out = ("--out", tmp_path / "x.png")
    gone = words_file(captions, tmp_path, other_file=str(tmp_path / "gone.arrow"))
    assert "gone.arrow: there is no such file" in refusal("words", gone, *out)
    assert "has 3 rows, no row 7" in refusal("words", words_file(captions, tmp_path, row=7), *out)
    examples = sheet_file(captions, tmp_path, {"images": ["image_0"]})
    assert "has no column image_0" in refusal("sheet", examples, *out)


def test_numbers_below_one_are_refused():
    assert "--examples 0" in refusal("sheet", "x.json", "--examples", "0")
    assert "--words 0" in refusal("align", "x.json", "--words", "0")
