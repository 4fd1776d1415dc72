"""The pictures: the numbers shown beside the masks, what is read from runs, and that PNGs come out."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import data
import flm
import plot

CHESS = "a girl plays chess".split()            # n = 6, so m = 5 tokens can be predicted: the words and </s>


def png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert path.stat().st_size < 200_000
        return image.size


def run_directory(path, lines, end="\n", global_batch=8):
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
    (path / "config.json").write_text(json.dumps({"settings": {"global_batch": global_batch}}))
    return str(path)


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
    monkeypatch.setattr(flm, "forward_mask", flm.bidirectional_mask)
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
AR_RUN = [{"step": 10, "loss": 5.5, "forward_accuracy": 0.05, "seconds": 5.0}, {"step": 20, "lr": 0.1, "seconds": 9.0}]


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
    rows = [{"step": 1, "forward_accuracy": 0.1, "reconstructed_accuracy": 0.1, "val_reverse_accuracy": 0.1}]
    assert plot.accuracy_key("loss", rows) == "reconstructed_accuracy"
    assert plot.accuracy_key("reverse_loss", rows) == "reverse_accuracy"
    assert plot.accuracy_key("itm_loss", rows) is None
    assert plot.accuracy_key("loss", AR_RUN) == "forward_accuracy"


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

def words_file(tmp_path, **changes):
    arrow = tmp_path / "toy_caption_test.arrow"
    with data.Writer(arrow, data.CAPTIONS) as out:
        for k in range(3):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), (80 * k, 0, 200)).save(buffer, "PNG")
            out.write({"image": buffer.getvalue(), "caption": ["a"], "image_id": str(k), "split": "test"})
    tokens = ["a", " red"] + [" ring", " and"] * 20
    example = {"file": str(arrow), "row": 0, "other_row": 2, "tokens": tokens,
               "guesses": {"right image": tokens, "another image": tokens[::-1], "no image": tokens}} | changes
    row = {"right image": 0.9, "another image": 0.2, "no image": 0.1}
    result = {"accuracy": {"colours": row, "shapes": row}, "words": {"colours": 30, "shapes": 40},
              "examples": [example]}
    (tmp_path / "words.json").write_text(json.dumps({"test": result, "holdout": result | {"examples": []}}))
    return tmp_path / "words.json"


def test_words_picture_is_written(tmp_path):
    plot.main(["words", str(words_file(tmp_path)), "--out", str(tmp_path / "words.png")])
    width, height = png(tmp_path / "words.png")
    assert width == 1500 and height > 600


def test_long_guesses_wrap_within_their_column():
    placed = []

    class Page:
        def text(self, x, y, text, **style):
            placed.append((x + len(text) * plot.LETTER, y, text, style.get("color")))

    tokens = ["t", "wo"] + [" circles"] * 20
    lines = plot.write(Page(), tokens, [False] * 21 + [True], 1.0, 2.0, 3.0)
    assert max(right for right, *_ in placed) <= 4.0 + 1e-9
    assert lines == len({y for _, y, *_ in placed}) > 1
    assert "".join(text for *_, text, _ in placed).replace(" ", "") == "".join(tokens).replace(" ", "")
    assert [color for *_, color in placed] == [None] * 21 + [plot.VERMILLION]


def test_words_refuses_in_one_sentence(tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "there is no such file" in refusal("words", tmp_path / "no.json", *out)
    for content in ("{", "{}", "[1]", '{"test": {"accuracy": {}}}'):
        (tmp_path / "bad.json").write_text(content)
        assert "not a table" in refusal("words", tmp_path / "bad.json", *out)
    assert "there is no such file" in refusal("words", words_file(tmp_path, file=str(tmp_path / "gone.arrow")), *out)
    assert "has 3 rows, no row 7" in refusal("words", words_file(tmp_path, row=7), *out)


@pytest.mark.parametrize("argv", [["--help"], ["masks", "--help"], ["curves", "--help"], ["words", "--help"]])
def test_help_is_printed(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(argv)
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
