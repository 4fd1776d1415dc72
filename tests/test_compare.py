"""A comparison is fair to every moment and contender, and goes on where it was stopped.

And its arithmetic is right.
"""

import json
import re
import shlex
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ANSWERS, TRAIN_FLM, WORDS, caption, tiny, write_captions, write_questions

import data
import flm
import tokenizer
import train
import weights
from tokenizer import BPE
from tools import (compare, compare_contenders, compare_page, compare_plan, compare_quality,
                   compare_result, compare_run)
from tools.compare_contenders import CONTENDERS, Contender
from tools.compare_quality import ALL, BOTH, LEFT, Quality
from tools.compare_result import Curve
from tools.compare_run import Track
from training.loading import batches_of

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

GROUPS = {"colours": ["red", "blue", "green"], "animals": ["dog", "cat"]}
# What makes a contender of the table tiny. (The comparison itself decides on the device and the
# loading processes.)
SIZES = " ".join(TRAIN_FLM[:TRAIN_FLM.index("--device")])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for seed, split in enumerate(("train", "val", "test")):
        write_captions(root / f"mine_caption_{split}.arrow", 60 if split == "train" else 9,
                       seed=seed)
    BPE.train([" ".join(WORDS)] * 3, 330).save(root / "tok")
    (root / "toy_words.json").write_text(json.dumps(GROUPS))
    return root


class Clock:
    """Every look at it is a hundredth of a second later, so each training step takes as long."""

    def __init__(self):
        self.now = 0.0

    def process_time(self):
        self.now += 0.01
        return self.now


def tiny_flags(world):
    return f"{SIZES} --tokenizer {world / 'tok'} --global-batch 8 --bucket 1"


def in_small(patch, world):
    """Tiny contenders in the place of the table -> the flags of a comparison of seconds.

    The clock counts steps.
    """
    sizes = tiny_flags(world)
    patch.setattr(compare_plan, "CONTENDERS", [
        Contender("FLM", sizes, principal=True),
        Contender("MLM", f"{sizes} --objective mlm", principal=True),
        Contender("AR", f"{sizes} --objective ar")])
    patch.setattr(compare_run, "time", Clock())
    return ["--data", str(world), "--minutes", str(0.16 / 60), "--moments", "2", "--seeds", "2",
            "--decay", "0.4",
            "--workers", "1", "--device", "cpu", "--captions", "12", "--tasks"]


@pytest.fixture
def small(world, monkeypatch):
    # it takes longer than all the rest
    monkeypatch.setattr(compare_page, "draw", lambda *_: None)
    return in_small(monkeypatch, world)


def moments_of(out, *folders):
    """The moments of runs, but for the times."""
    found = {}
    for folder in folders:
        for moment in json.loads((out / folder / "moments.json").read_text()):
            kept = {key: value for key, value in moment.items() if not key.endswith("seconds")}
            found[folder, moment["moment"]] = kept
    return found


RUNS = ("flm-0", "flm-1", "mlm-0", "mlm-1", "ar-0")


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """A comparison from its beginning to its end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_page, "draw", lambda *_: None)
        compare.main([*in_small(patch, world), "--rates", "1", "--out", str(out)])
    return out


# -- the command -----------------------------------------------------------------------------------

def test_it_ends_with_tables_pictures_and_all_that_they_need(undisturbed, capsys):
    before = (undisturbed / "compare.md").read_text()
    (undisturbed / "compare.md").unlink()
    compare.main(["--out", str(undisturbed), "--report"])
    assert (undisturbed / "compare.md").read_text() == before and before in capsys.readouterr().out
    for name in ("compare.json", "compare.md", "compare.png", "variants.png", "plan.json",
                 "flm-1/moment_2.pt"):
        assert (undisturbed / name).stat().st_size, name
    assert not (undisturbed / ".lock").exists()
    found = json.loads((undisturbed / "compare.json").read_text())
    assert {c["name"]: len(c["runs"]) for c in found["contenders"]} == {"FLM": 2, "MLM": 2, "AR": 1}
    for contender in found["contenders"]:
        assert contender["steps"] == [8, 16] and contender["warmup"] == 0
        for run in contender["runs"]:
            assert [(moment["branched_at"], moment["steps"])
                    for moment in run["moments"]] == [(5, 8), (10, 16)]
            # the trunk until the branch, and the branch: all steps, each once
            for moment in run["moments"]:
                assert moment["seconds"] == pytest.approx(0.01 * moment["steps"])
                steps = moment["steps"] - moment["branched_at"]
                assert moment["branch_seconds"] == pytest.approx(0.01 * steps)


def test_ways_of_asking_are_never_mixed(undisturbed):
    """Words asked from the left and from both sides stand in rows of their own.

    They are compared with their own kind alone.
    """
    found = json.loads((undisturbed / "compare.json").read_text())
    ways = {c["name"]: [set(moment["cloze"]) for run in c["runs"] for moment in run["moments"]]
            for c in found["contenders"]}
    assert all(way == {BOTH, LEFT} for way in ways["FLM"])
    assert all(way == {BOTH} for way in ways["MLM"]) and all(way == {LEFT} for way in ways["AR"])
    rows = {(row["yardstick"], row["contender"]) for row in found["times"]}
    for group in (*GROUPS, ALL):
        assert {who for yardstick, who in rows if yardstick == f"{group}, {BOTH}"} == {"FLM", "MLM"}
        assert {who for yardstick, who in rows if yardstick == f"{group}, {LEFT}"} == {"FLM", "AR"}
    assert {row["contender"]: row["yardstick"].endswith(BOTH)
            for row in found["ratios"]} == {"MLM": True, "AR": False}


@pytest.mark.parametrize("where", [7, 31, 35, 52])
def test_an_interrupted_comparison_goes_on_to_the_same_moments(
        small, undisturbed, tmp_path, monkeypatch, where):
    """Interrupted in a measurement of speed, in a trunk, and in two branches.

    One branch is that of a first moment, the other that of a second one.
    """
    small += ["--only", "FLM", "AR", "--seeds", "1", "--rates", "1"]
    steps, step = [], train.train_step

    def interrupted(*arguments):
        steps.append(arguments)
        if len(steps) == where:
            raise KeyboardInterrupt
        step(*arguments)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            compare.main([*small, "--out", str(out)])
    assert stop.value.code == 130
    compare.main([*small, "--out", str(out)])
    assert moments_of(out, "flm-0", "ar-0") == moments_of(undisturbed, "flm-0", "ar-0")
    for run in ("flm-0", "ar-0"):
        a, b = (weights.read(folder / run / "moment_2.pt")["model"]
                for folder in (out, undisturbed))
        assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_more_seeds_and_contenders_add_to_what_is_there(small, undisturbed, world, tmp_path,
                                                        monkeypatch):
    out = tmp_path / "more"
    shutil.copytree(undisturbed, out)
    trained, advance = [], compare_plan.advance
    monkeypatch.setattr(compare_plan, "advance",
                        lambda track, *rest: trained.append(track.out) or advance(track, *rest))
    more = [*small, "--rates", "1", "--out", str(out)]
    compare.main([*more, "--only", "AR", "--all-seeds", "--contender",
                  f"MLM 60 %: {tiny_flags(world)} --objective mlm --lr 1e-3"])
    assert {out.rpartition("/")[2] for out in trained} == {"ar-1", "mlm-60-0", "mlm-60-1"}
    assert moments_of(out, *RUNS) == moments_of(undisturbed, *RUNS)
    found = json.loads((out / "compare.json").read_text())["contenders"]
    assert {c["name"]: (len(c["runs"]), c["rate"]) for c in found}["MLM 60 %"] == (2, 1e-3)
    with pytest.raises(SystemExit,
                       match="was begun with captions 12, not 13; choose another --out"):
        compare.main([*more, "--captions", "13"])


def test_the_best_rate_of_a_search_is_trained_with(small, world, tmp_path, monkeypatch):
    """Each objective by its own way of asking.

    A contender added to the table takes the rate of its objective.
    """
    tried, rates = [], {}

    def rate_of(track):
        lr, muon = (float(track.flags[track.flags.index(flag) + 1])
                    for flag in ("--lr", "--muon-lr"))
        assert muon == pytest.approx(5 * lr)        # the search is for both together
        return lr

    def found(track, steps, quality, way):
        tried.append((track.out.rpartition("/")[2], way, steps))
        return -abs(rate_of(track) - (4e-3 if way == BOTH else 2e-3))

    def advance(track, moment, steps, quality):
        rates[track.out.rpartition("/")[2], moment] = rate_of(track)
        share = {"right": 0.5, "another": 0.2, "words": 5}
        return {"moment": moment, "steps": steps, "seconds": 0.01 * steps, "device": "cpu",
                "tasks": {},
                "cloze": {way: {group: share for group in (*GROUPS, ALL)} for way in (BOTH, LEFT)}}

    for name, function in (("try_rate", found), ("advance", advance),
                           ("measure_speed", lambda track: 0.01)):
        monkeypatch.setattr(compare_plan, name, function)
    added = f"MLM 60 %: {tiny_flags(world)} --objective mlm --mask-rate 0.6"
    compare.main([*small, "--seeds", "1", "--out", str(tmp_path), "--contender", added])
    assert sorted(tried) == sorted((f"{name}-{factor}", way, 5) for factor in ("0.5", "1", "2")
                                   for name, way in (("flm", BOTH), ("mlm", BOTH),
                                                     ("ar", LEFT)))
    assert rates == {(run, moment): pytest.approx(2e-3 if run == "ar-0" else 4e-3)
                     for run in ("flm-0", "mlm-0", "ar-0", "mlm-60-0") for moment in (1, 2)}
    text = (tmp_path / "compare.md").read_text()
    assert re.search(r"\| MLM \| all words, both sides \| 1.0e-03: .*, 2.0e-03: .*, \*\*4.0e-03: ",
                     text)
    assert "4.0e-03 (of MLM)" in text


def test_a_diverged_trial_of_a_rate_is_a_bad_one_not_the_end(tmp_path, monkeypatch):
    def diverged(*arguments):
        raise compare_plan.Halt("the loss is not finite")

    monkeypatch.setattr(compare_plan, "advance", diverged)
    (tmp_path / "last.pt").touch()
    assert compare_plan.try_rate(Track(str(tmp_path), (), 0, 0.2), 10, None, BOTH) == 0
    assert not (tmp_path / "last.pt").exists()


def test_two_processes_find_what_one_finds(small, undisturbed, tmp_path):
    """The plan of steps is given: real clocks differ."""
    out = tmp_path / "two"
    out.mkdir()
    (out / "plan.json").write_text((undisturbed / "plan.json").read_text())
    compare.main([*small, "--rates", "1", "--workers", "2", "--only", "FLM", "--out", str(out)])
    assert moments_of(out, "flm-0", "flm-1") == moments_of(undisturbed, "flm-0", "flm-1")


@pytest.mark.parametrize("error, becomes",
                         [(SystemExit(130), KeyboardInterrupt), (BrokenProcessPool(), ValueError),
                          (ValueError("as it is"), ValueError)])
def test_a_process_that_is_stopped_or_killed_ends_the_command_in_a_sentence(error, becomes):
    class Pool:
        def submit(self, *_):
            future = Future()
            future.set_exception(error)
            return future

    with pytest.raises(becomes,
                       match=None if becomes is KeyboardInterrupt
                       else "the same command goes on|as it is"):
        list(compare.as_they_finish([None], Pool()))


def test_what_cannot_be_done_is_said_in_a_sentence(small, world, tmp_path):
    for sentence, *flags in (
            ("contender 'x': unrecognized arguments: --mask-rats 0.5", "--contender",
             "x: --mask-rats 0.5"),
            ("contender 'x': .*mask_rate", "--contender", "x: --mask-rate 3"),
            ("contender 'x': --steps is decided by the comparison", "--contender", "x: --steps 5"),
            ("contender 'x': No closing quotation", "--contender", "x: --objective 'mlm"),
            ("contender 'x': model vilt-toy has none of the objectives", "--contender",
             "x: --model vilt-toy"),
            ("--contender 'x': NAME: FLAGS is expected", "--contender", "x"),
            ("--contender: each needs a name of its own", "--contender", "FLM: --mask-rate 0.5"),
            ("--only 'GPT': one of FLM, MLM, AR is expected", "--only", "GPT"),
            ("--minutes 0.0: more than 0", "--minutes", "0"),
            ("--seeds 0: at least 1", "--seeds", "0"),
            ("--decay 1.5: a share", "--decay", "1.5"),
            ("--rates 1.0 0.0: each must be above 0", "--rates", "1", "0"),
            ("--tasks dance: one of vqa", "--tasks", "dance"),
            ("--task-moments 3: 1 to 2", "--task-moments", "3"),
            ("--recipe tiny: one of toy", "--recipe", "tiny"),
            ("mine_caption_test.arrow: not JSON", "--groups",
             str(world / "mine_caption_test.arrow")),
            ("there is no such directory", "--data", str(tmp_path / "nowhere")),
            ("too short: FLM has 1 steps", "--minutes", str(0.02 / 60))):
        with pytest.raises(SystemExit, match=f"^compare.py: .*({sentence})"):
            compare.main([*small, "--rates", "1", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit, match="there is no comparison here yet"):
        compare.main(["--out", str(tmp_path / "none"), "--report"])


# -- runs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_a_branch_ends_with_the_model_of_a_run_of_its_own_length(world, tmp_path, decay):
    """With spans and dropout, so random numbers matter.

    The second branch comes from a trunk that was saved and resumed.
    """
    flags = [*TRAIN_FLM, "--task", "pretrain", "--data", str(world), "--tokenizer",
             str(world / "tok"), "--global-batch", "16",
             "--bucket", "2", "--corruption-rate", "0.3", "--dropout", "0.1", "--lr", "3e-3",
             "--clip", "1", "--seed", "5"]
    track = Track(str(tmp_path / "track"), tuple(flags), 3, decay)
    found = [compare_run.advance(track, k, steps, Quality(GROUPS, "test", 4))
             for k, steps in ((1, 9), (2, 17))]
    assert [moment["branched_at"] for moment in found] == ([7, 13] if decay < 1 else [3, 3])
    assert found[1]["trunk_seconds"] >= found[0]["trunk_seconds"] > 0
    for k, steps in ((1, 9), (2, 17)):
        alone = Track(str(tmp_path / f"alone_{k}"), track.flags, track.warmup, decay)
        train.main([*alone.command(steps), "--save-every", "0"])
        branch, whole = (weights.read(path)
                         for path in (tmp_path / f"track/moment_{k}.pt",
                                      tmp_path / f"alone_{k}/last.pt"))
        assert branch["step"] == whole["step"] == steps
        assert branch["model"].keys() == whole["model"].keys()
        assert all(torch.equal(branch["model"][name], tensor)
                   for name, tensor in whole["model"].items())
    # what eval.py, tools.probe and --load open
    model = weights.load(tmp_path / "track/moment_2.pt")
    assert model.tokenizer and model.task == "pretrain"
    assert not (tmp_path / "track/next.pt").exists()


def test_a_trunk_that_is_past_a_branch_is_refused(world, tmp_path):
    track = Track(str(tmp_path),
                  (*TRAIN_FLM, "--data", str(world), "--tokenizer", str(world / "tok"),
                   "--global-batch", "16"), 2, 0.2)
    compare_run.advance(track, 2, 12, Quality(GROUPS, "test", 4))
    sentence = "its trunk is at step 10, and its next branch leaves it at step 4: remove the folder"
    with pytest.raises(ValueError, match=sentence):
        compare_run.advance(track, 1, 5, Quality(GROUPS, "test", 4))


@pytest.mark.parametrize("flags", [
    "", "--corruption-rate 0.4 --prediction-rate 0.5", "--objective mlm --mask-rate 0.4",
                                   "--objective ar", "--objective prefix",
    "--left-to-right-weight 0 --right-to-left-weight 0"])
def test_the_originals_way_has_the_same_losses(world, tmp_path, flags):
    """Theirs: captions padded to 50, and the head on every row.

    Ours: captions padded to the longest, and the head on the rows that predict.
    """
    batches, common = [], [*TRAIN_FLM, "--data", str(world), "--tokenizer", str(world / "tok"),
                           "--global-batch", "8", "--seed", "1"]
    for name, more in (("ours", []), ("original", ["--pad-to", "50"])):
        track = Track(str(tmp_path / name), (*common, *flags.split(), *more), 2, 0.2,
                      every_row=name == "original")
        run, state, log = compare_run.open_trunk(track)
        batch, notes = next(batches_of(run, 0))
        batches.append((batch, notes["counts"]))
        torch.manual_seed(0)
        assert (state.model is state.bare) == (name == "ours")
    (ours, counts), (original, theirs) = batches
    assert original["ids"].shape[1] == 50 > ours["ids"].shape[1] and counts == theirs
    prepared = [train.to_device(batch, torch.device("cpu"), run.config)
                for batch in (ours, original)]
    # Rows that pad a list of rows (--pad-to with lengths) say nothing.
    for name in run.config.loss_weights:
        rows = prepared[1][f"{name}_rows"]
        prepared[1][f"{name}_rows"] = torch.cat([rows, rows.new_full((3,), -1)])
    expected, found = state.bare(prepared[0]), state.model(prepared[1])
    assert found.keys() == expected.keys()
    for name, (loss, hits) in expected.items():
        assert found[name][0].item() == pytest.approx(loss.item(), rel=1e-5)
        assert found[name][1] == hits


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.folder)
def test_every_contender_of_the_table_takes_training_steps(world, tmp_path, contender):
    flags = (*TRAIN_FLM, "--data", str(world), "--tokenizer", str(world / "tok"), "--global-batch",
             "8", *shlex.split(contender.flags))
    track = Track(str(tmp_path), flags, 2, 0.2, contender.every_row)
    assert compare_run.measure_speed(track, steps=1) > 0


def test_a_loss_of_weight_0_is_not_computed(world, tmp_path):
    """Neither in training nor in validation.

    The others are the same, and every parameter is still trained.
    """
    flags = (*TRAIN_FLM, "--data", str(world), "--tokenizer", str(world / "tok"), "--global-batch",
             "8")
    none = ("--left-to-right-weight", "0", "--right-to-left-weight", "0")
    results = []
    for name, more in (("all", ()), ("one", none)):
        run, state, log = compare_run.open_trunk(Track(str(tmp_path / name), (*flags, *more), 2,
                                                       0.2))
        batch, notes = next(batches_of(run, 0))
        results.append(state.model(train.to_device(batch, torch.device("cpu"), run.config)))
        assert set(results[-1]) == set(notes["counts"]) == set(run.config.loss_weights)
    everything, one = results
    assert run.config.loss_weights == {"reconstructed": 1.0}
    assert torch.equal(one["reconstructed"][0], everything["reconstructed"][0])
    one["reconstructed"][0].backward()
    assert [name for name, p in state.bare.named_parameters() if p.grad is None
            or not p.grad.any()] == []
    train.main([*flags, *none, "--steps", "2", "--eval-every", "1", "--save-every", "1", "--out",
                str(tmp_path / "run")])
    train.main([*flags, *none, "--steps", "3", "--eval-every", "1", "--out", str(tmp_path / "run"),
                "--resume"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {key for line in lines for key in line if key.endswith("_loss")} == {
        "reconstructed_loss", "val_loss", "val_reconstructed_loss"}


# -- what models are asked -------------------------------------------------------------------------

def asked(world, objective, guess, monkeypatch, **changes):
    """cloze of a model whose guesses are those of a function of the true ids."""
    tok = tokenizer.load(world / "tok")
    model = tiny(objective=objective, vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id,
                 sep_id=tok.sep_id,
                 mask_id=tok.mask_id, **changes)
    monkeypatch.setattr(compare_quality, "guesses", lambda model, visual, ids: {
        way: guess(ids) for way in compare_quality.ways_of_asking(model.config)})
    table = data.Captions([world / "mine_caption_test.arrow"])
    return table, compare_quality.cloze(model, tok, table, Quality(GROUPS, "test", 1000), batch=5)


def test_every_word_is_asked_and_counts_once(world, monkeypatch):
    table, found = asked(world, "flm", lambda ids: ids, monkeypatch)
    texts = [text.split() for text in table.texts()]
    for group, words in (*GROUPS.items(), (ALL, WORDS)):
        both, left = found[BOTH][group], found[LEFT][group]
        assert both["words"] == sum(word in words for text in texts for word in text)
        assert left["words"] == sum(word in words for text in texts for word in text[1:])
        assert both["right"] == both["another"] == left["right"] == left["another"] == 1
    _, wrong = asked(world, "mlm", lambda ids: torch.full_like(ids, 5), monkeypatch)
    assert set(wrong) == {BOTH} and all(row["right"] == 0 for row in wrong[BOTH].values())


@torch.no_grad()
def test_guesses_know_what_the_way_of_asking_allows_and_no_more():
    """A changed word moves no guess of itself.

    Words from the fifth on move, from the left, guesses behind it alone.
    """
    model, ids = tiny(objective="flm"), caption(9, 9)
    visual = model.encode_image(torch.randn(1, 3, 24, 24))
    base = compare_quality.guesses(model, visual, ids)
    one, many = {BOTH: set(), LEFT: set()}, {BOTH: set(), LEFT: set()}
    for word in range(10, 90, 2):
        for moved, words in ((one, [word]), (many, [word, word + 1, 99 - word])):
            changed = ids.clone()
            changed[0, 5:5 + len(words)] = torch.tensor(words)
            for way, guess in compare_quality.guesses(model, visual, changed).items():
                moved[way] |= set(torch.nonzero(guess[0] != base[way][0]).flatten().tolist())
    assert 5 not in one[BOTH] | one[LEFT]
    assert {1, 2, 3, 4} & many[BOTH] and min(many[LEFT]) > 5
    assert base[LEFT][0, :2].tolist() == [1, 1]


def test_only_what_was_trained_is_asked():
    assert compare_quality.ways_of_asking(flm.Config()) == [BOTH, LEFT]
    assert compare_quality.ways_of_asking(flm.Config(left_to_right_weight=0.0)) == [BOTH]
    assert compare_quality.ways_of_asking(flm.Config(objective="mlm")) == [BOTH]
    assert compare_quality.ways_of_asking(flm.Config(objective="prefix")) == [LEFT]


def test_words_come_with_the_data_or_from_a_file_or_from_the_list_of_frequent_ones(world, tmp_path):
    assert compare_quality.open_quality(str(world), "", 5) == Quality(GROUPS, "test", 5)
    (tmp_path / "words.json").write_text(json.dumps({"a": ["red"]}))
    given = compare_quality.open_quality(str(world), str(tmp_path / "words.json"), 5)
    assert given.groups == {"a": ["red"]}
    write_captions(tmp_path / "mine_caption_val.arrow", 3)
    own = compare_quality.open_quality(str(tmp_path), "", 5)
    assert own.split == "val"
    assert {"people", "animals", "colours", "numbers", "verbs"} < own.groups.keys()
    words = [word for group in own.groups.values() for word in group]
    assert len(words) == len(set(words)) and all(word == word.lower() for word in words)


def test_tasks_are_scored_by_the_commands_that_everybody_runs(world, tmp_path, monkeypatch, small):
    """From moment_K.pt, for principals with their first seed; the score stands at its moment."""
    write_questions(world / "mine_vqa_train.arrow", 60, 1)
    write_questions(world / "mine_vqa_val.arrow", 11, 2)
    (world / "mine_vqa_answers.json").write_text(json.dumps(ANSWERS))
    out = tmp_path / "tasks"
    flags = [*small, "vqa", "--rates", "1", "--task-steps", "3", "--out", str(out)]
    units = [unit for stage in compare_plan.Comparison(compare.parse(flags)).stages()
             for unit in stage if unit.kind == "task"]
    assert [(u.contender.name, u.seed, u.moment) for u in units] == [
        (name, 0, k) for k in (1, 2) for name in ("FLM", "MLM")]
    compare.main([*flags, "--moments", "1", "--seeds", "1", "--only", "FLM"])
    moments = moments_of(out, "flm-0")
    assert 0 <= moments["flm-0", 1]["tasks"]["vqa"]["overall"] <= 1
    config = json.loads((out / "flm-0/vqa_1/config.json").read_text())
    assert config["settings"]["load"].endswith("flm-0/moment_1.pt")
    assert not list((out / "flm-0/vqa_1").glob("*.pt"))
    assert "## Seconds until VQA" in (out / "compare.md").read_text()
    sentence = "train.py: .*nowhere.pt: there is no such checkpoint .*log.txt has all of it"
    with pytest.raises(ValueError, match=sentence):
        compare_quality.task_scores("vqa", str(tmp_path / "nowhere.pt"), str(tmp_path / "x"), 3, 0,
                                    str(world), "toy", "test", "cpu")


# -- results ---------------------------------------------------------------------------------------

def curve(*points):
    return Curve(*np.array(points, float).T)


def test_the_time_to_a_quality_lies_on_straight_lines_between_moments():
    some = curve((10, 0.1), (20, 0.3), (30, 0.2), (40, 0.6))
    assert compare_result.time_to(some, 0.2) == (15, False)
    assert compare_result.time_to(some, 0.3) == (20, False)
    assert compare_result.time_to(some, 0.5) == (pytest.approx(37.5), False)
    # by its first moment: nobody knows when
    assert compare_result.time_to(some, 0.05) == (10, True)
    assert compare_result.time_to(some, 0.7) is None


def test_the_ratio_is_that_of_the_times_to_the_rivals_best_quality():
    ours = [curve((10, 0.2), (20, 0.6), (30, 0.9))]
    rival = [curve((10, 0.1), (20, 0.2), (30, 0.4), (40, 0.3))]
    found = compare_result.compare(rival, ours)
    assert found["quality"] == 0.4 and found["ratio"] == 2
    assert found["seconds"] == {"rival": 30, "ours": 15}
    assert found["interval"] is None and found["within"] == {"rival": False, "ours": False}


def test_the_interval_spans_the_ratios_of_resampled_seeds():
    ours = [curve((10, 0.0), (20, 1.0))] * 3
    rivals = [curve((10, 0.0), (end, 0.5)) for end in (30, 30, 60)]
    low, high = compare_result.compare(rivals, ours)["interval"]
    # The mean ends are 30, 40, 50 and 60, in 8, 12, 6 and 1 of 27 draws: the last one lies above
    # the 95th percent.
    assert low == pytest.approx(30 / 15) and high == pytest.approx(50 / 15)
    same = compare_result.compare([rivals[0]] * 3, ours)
    assert same["interval"] == pytest.approx([2, 2]) and same["ratio"] == pytest.approx(2)


def test_a_quality_that_is_never_reached_is_said_and_counts_against_ours():
    slow, fast = [curve((10, 0.0), (20, 0.1))] * 2, [curve((10, 0.3), (20, 0.8))] * 2
    never = compare_result.compare(fast, slow)
    assert never["ratio"] is None and never["seconds"]["ours"] is None
    assert never["interval"] == [0, 0]
    row = {"yardstick": "y", "contender": "c", "another": None, "last": 20}
    table = compare_page.ratio_table([row | never])
    assert "| not within 20 s | FLM does not get there | 0.0 - 0.0 |" in table
    early = compare_result.compare(slow, fast)
    assert "| 20 s | within 10 s | at least 2.0 |" in compare_page.ratio_table([row | early])


def record(seconds, right, way=BOTH, **tasks):
    return {"moment": 1, "steps": 10, "seconds": seconds, "device": "cpu", "tasks": tasks,
            "cloze": {way: {"red": {"right": right, "another": 0.1, "words": 5},
                            ALL: {"right": right, "another": 0.1, "words": 9}}}}


def summary(**contenders):
    found = {"options": {"groups": {"red": ["red"]}}, "contenders": [
        {"name": name, "objective": name,
         "runs": [{"seed": k, "moments": moments} for k, moments in enumerate(runs)]}
        for name, runs in contenders.items()]}
    compare_result.add_results(found)
    return found


def test_seeds_are_averaged_over_the_moments_that_all_have():
    found = summary(flm=[[record(10, 0.2), record(20, 0.6)], [record(12, 0.4)]])
    [row] = [row for row in found["times"] if row["yardstick"] == "red, both sides"]
    assert row["seeds"] == 2 and row["last"] == 11
    assert row["best"] == pytest.approx(0.3) and row["another"] == pytest.approx(0.1)


def test_rivals_are_compared_by_the_yardsticks_that_both_have():
    found = summary(flm=[[record(10, 0.2, vqa={"overall": 0.4}),
                          record(20, 0.6, vqa={"overall": 0.6})]],
                    mlm=[[record(10, 0.1), record(40, 0.4, vqa={"overall": 0.5})]],
                    ar=[[record(10, 0.9, LEFT)]])
    ratios = {(row["yardstick"], row["contender"]): row["ratio"] for row in found["ratios"]}
    assert ratios == {("red, both sides", "mlm"): pytest.approx(40 / 15),
                      ("all words, both sides", "mlm"): pytest.approx(40 / 15),
                      ("VQA", "mlm"): pytest.approx(40 / 15)}
    assert {row["contender"] for row in found["times"] if row["yardstick"].endswith(LEFT)} == {"ar"}


def test_the_table_of_contenders_is_one_that_train_py_takes(world):
    """Every line parses, and has a name and folder of its own.

    It takes its rate from a line that searches for one.
    """
    options = SimpleNamespace(recipe="toy", data=str(world), device="")
    table = compare_contenders.CONTENDERS
    sources = {c.name for c in table if not c.rate_of}
    objectives = {c.name: compare_contenders.settings_of(c, options)[1].objective for c in table}
    assert len({c.folder for c in table}) == len(table)
    assert set(objectives.values()) == set(flm.OBJECTIVES)
    for c in table:
        assert not c.rate_of or (c.rate_of in sources
                                 and objectives[c.rate_of] == objectives[c.name])
    assert [c.name for c in table if c.principal] == ["FLM", "MLM 15 %", "MLM 40 %", "AR"]
