"""The four downstream tasks.

The original's recorded logits and losses, and what their batches hold.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (ANSWERS, TOL, finetune, original, task_on, write_captions, write_questions,
                      write_world)

import flm
import layers
import pictures
import recipes
import tasks
import train
import vilt
import weights
from training.settings import Settings

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("tasks"))


def collated(task, split="train", train_mode=True, count=6, epoch=0):
    dataset = task.dataset(task.table(task.settings, split), train_mode)
    samples = [dataset[epoch, i] for i in range(count)]
    return samples, *task.collate(samples)


# -- the original's recorded numbers ---------------------------------------------------------------

def samples_of(ids, pad=1, **more):
    return [{"ids": row[row != pad].tolist()} | {name: values[i] for name, values in more.items()}
            for i, row in enumerate(ids)]


def assert_losses(model, batch, expected):
    """The mean over the batch, as the loop takes it, is the original's loss."""
    (name, (total, hits)), = model(batch).items()
    torch.testing.assert_close(total / len(batch["image"]), expected, **TOL)
    return hits.item()


@torch.no_grad()
def test_the_published_recipes_train_on_the_published_splits(tmp_path, capsys):
    """Flickr30k's retrieval on train and val, FLM's VQA on train and all of val.

    --hold-out keeps val apart.
    """
    for split, rows in (("train", 8), ("val", 4), ("test", 2)):
        write_captions(tmp_path / f"f30k_caption_karpathy_{split}.arrow", rows, seed=rows)
    for name, rows in (("train", 9), ("trainable_val", 4), ("rest_val", 2), ("val", 6)):
        write_questions(tmp_path / f"vqav2_{name}.arrow", rows, rows)
    (tmp_path / "vqav2_answers.json").write_text(json.dumps(ANSWERS))

    def rows(task, recipe, *more):
        settings, _ = train.parse(["--task", task, "--recipe", recipe, "--data", str(tmp_path),
                                   "--out", "o", *more])
        return {split: len(tasks.TASKS[task].table(settings, split)) for split in ("train", "val")}
    for recipe in ("flm-b32", "vilt"):
        assert rows("retrieval", recipe) == {"train": 12, "val": 4}
    assert rows("vqa", "flm-b32") == {"train": 15, "val": 2}
    assert rows("vqa", "vilt") == rows("vqa", "flm-b32", "--hold-out") == {"train": 13, "val": 2}
    with pytest.raises(SystemExit):
        train.main(["--list-recipes"])
    told = capsys.readouterr().out
    assert told.count("splits=train+val") == 3 and "hold_out" not in told


def test_vqa_logits_targets_and_loss_are_the_originals(tmp_path):
    model, inputs, outputs = original("vqa", tmp_path)
    batch = {"ids": inputs["text_ids"], "image": inputs["image"][0]}
    samples = samples_of(batch["ids"], labels=inputs["vqa_labels"], scores=inputs["vqa_scores"])
    assert tasks.VQA(Settings(), model.config, None).draw(samples, batch) == {"vqa": 4}
    assert torch.equal(batch["targets"], outputs["vqa_targets"])
    torch.testing.assert_close(layers.task_logits(model, batch), outputs["vqa_logits"], **TOL)
    assert_losses(model, batch, outputs["vqa_loss"])


@torch.no_grad()
def test_nlvr2_logits_and_loss_are_the_originals(tmp_path):
    model, inputs, outputs = original("nlvr2", tmp_path)
    batch = {"ids": inputs["text_ids"], "image": inputs["image_0"][0],
             "image_1": inputs["image_1"][0],
             "label": torch.tensor(inputs["answers"]).long()}
    torch.testing.assert_close(layers.task_logits(model, batch), outputs["nlvr2_logits"], **TOL)
    hits = assert_losses(model, batch, outputs["nlvr2_loss"])
    assert hits == (outputs["nlvr2_logits"].argmax(1) == batch["label"]).sum()


@torch.no_grad()
def test_retrievals_scores_and_loss_are_the_originals(tmp_path):
    model, inputs, outputs = original("irtr", tmp_path)
    names = ("text", "false_text_0", "false_text_1", "false_text_2")
    texts = [inputs[f"{name}_ids"].masked_fill(inputs[f"{name}_masks"] == 0, 1) for name in names]
    # an image's, one after the other
    samples = [{"ids": rows[0], "others": list(rows[1:])} for rows in zip(*texts)]
    ids = torch.stack(tasks.Retrieval(Settings(), model.config, None).texts(samples))
    batch = {"ids": ids, "image": inputs["image"][0]}
    torch.testing.assert_close(layers.task_logits(model, batch).view(4, 4), outputs["scores"],
                               **TOL)
    hits = assert_losses(model, batch, outputs["irtr_loss"])
    assert hits == (outputs["scores"].argmax(1) == 0).sum()


@torch.no_grad()
def test_captioning_learns_from_the_stream_that_does_not_know_the_next_word(tmp_path):
    """The published command learns from the reconstructor, which has read the answer.

    Recorded beside it is the right loss.
    """
    model, inputs, outputs = original("ar_flm_backbone", tmp_path)
    model = replaced_objective(model)
    batch = {"ids": inputs["text_ids"], "image": inputs["image"][0]}
    counts = tasks.Caption(Settings(), model.config, None).draw(samples_of(batch["ids"]), batch)
    total, _ = model(batch)["left_to_right"]
    assert counts == {"left_to_right": int((batch["ids"][:, 2:] != 1).sum())}
    torch.testing.assert_close(total / counts["left_to_right"], outputs["loss_if_text_feats1"],
                               **TOL)


def replaced_objective(model):
    """The model as captioning adapts it: the forward stream alone."""
    adapted = weights.model_of(tasks.Caption.adapt(model.config)).eval()
    adapted.load_state_dict({name: model.state_dict()[name] for name in adapted.state_dict()})
    return adapted


# -- batches ---------------------------------------------------------------------------------------

def test_vqa_targets_are_the_soft_scores_at_their_labels(world):
    task = task_on(world, "vqa")
    samples, batch, notes = collated(task, count=18)
    for sample, target in zip(samples, batch["targets"], strict=True):
        expected = {label: np.float32(score)
                    for label, score in zip(sample["labels"], sample["scores"])}
        assert {i: value for i, value in enumerate(target.tolist())
                if value} == pytest.approx(expected)
    assert notes["counts"] == {"vqa": 18} and {0, 2} < {len(sample["labels"]) for sample in samples}


def test_a_label_past_the_end_of_the_answer_list_is_named(world, tmp_path):
    for path in world.glob("mine_vqa_t*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine_vqa_answers.json").write_text('["yes"]')
    sentence = (r"mine_vqa_train.arrow row \d: "
                r"label \d is past the end of the answer list, which has 1 answers")
    with pytest.raises(ValueError, match=sentence):
        collated(replace_data(task_on(world, "vqa"), tmp_path))
    with pytest.raises(FileNotFoundError, match="no answer list"):
        tasks.VQA.answers(Settings(data=str(world), datasets=("other",)))


def replace_data(task, folder):
    settings = replace(task.settings, data=str(folder))
    return type(task)(settings, task.adapt(task.config, settings), task.tok)


@pytest.mark.parametrize("kind", ["flm", "vilt"])
def test_nlvr2_batches_hold_both_pictures_and_whether_the_statement_is_true(world, kind):
    task = task_on(world, "nlvr2", kind)
    samples, batch, _ = collated(task, train_mode=False)
    table = task.table(task.settings, "train")
    shape = tasks.shape_of(task.config)
    for i, sample in enumerate(samples):
        for which, name in enumerate(("image", "image_1")):
            expected = pictures.decode(table.image(i, which), shape)
            assert torch.equal(batch[name][i, :, :expected.shape[1], :expected.shape[2]], expected)
            if kind == "vilt":
                rows, columns = (side // 16 for side in expected.shape[1:])
                place = batch["patches" if which == 0 else "patches_1"][i]
                assert batch["sizes" if which == 0 else "sizes_1"][i].tolist() == [rows, columns]
                wide = batch[name].shape[3] // 16
                assert place[place >= 0].tolist() == [r * wide + c for r in range(rows)
                                                      for c in range(columns)]
        assert batch["label"][i] == (table.cell("answers", i)[0].as_py() == "True")
    assert 0 < batch["label"].sum() < len(samples)
    assert ("patches_1" in batch) == (kind == "vilt")


def test_vilt_shows_few_patches_of_both_pictures_in_training_and_all_in_evaluation(world):
    task = task_on(world, "nlvr2", "vilt")
    _, trained, _ = collated(task)
    _, evaluated, _ = collated(task, train_mode=False)
    for name in ("patches", "patches_1"):
        assert (trained[name] >= 0).sum(1).max() == 7 and (evaluated[name] >= 0).sum(1).max() > 7
    assert not torch.equal(trained["patches"], trained["patches_1"])


def test_captions_are_framed_end_with_one_full_stop_and_predict_from_bos_to_the_end(world):
    task = task_on(world, "caption", max_tokens=38)
    samples, batch, notes = collated(task)
    tok, table = task.tok, task.table(task.settings, "train")
    rows = set(batch["left_to_right_rows"].tolist())
    predicted = 0
    for i, (sample, row) in enumerate(zip(samples, batch["ids"])):
        ids, n = sample["ids"], len(sample["ids"])
        assert ids[:2] == [tok.cls_id, tok.ids["<bos>"]]
        assert ids[-2:] == [tok.ids["<eos>"], tok.sep_id]
        assert tok.decode(ids[2:-2]) == table.text(i).rstrip(".") + "."
        here = [r - i * len(row) for r in rows if r // len(row) == i]
        # <bos> says the first word, <eos> says </s>
        assert sorted(here) == list(range(1, n - 1))
        predicted += n - 2
    assert notes["counts"] == {"left_to_right": predicted}
    assert task.config.loss_weights == {"left_to_right": 1.0}
    assert [tasks.full_stop(t) for t in ("a dog", "a dog.", "a dog . ", "A. B..")] == [
        "a dog.", "a dog.", "a dog.", "A. B."]


def test_a_long_caption_is_cut_before_its_end_is_put_on(world):
    samples, _, notes = collated(task_on(world, "caption", max_tokens=7), count=24)
    eos, sep = samples[0]["ids"][-2:]
    assert max(len(s["ids"]) for s in samples) == 7 and notes["cut"] > 0
    assert all(s["ids"][-2:] == [eos, sep] for s in samples)


@pytest.mark.parametrize("kind", ["flm", "vilt"])
def test_retrieval_batches_have_the_own_caption_first_and_then_others_new_in_every_epoch(
        world, kind):
    task = task_on(world, "retrieval", kind, false_captions=5)
    table = task.table(task.settings, "train")
    dataset = task.dataset(table, True)
    row_of = {}
    for i in range(len(dataset)):
        row_of.setdefault(tuple(dataset.tokens(i)[0]), set()).add(int(table.row_of[i]))
    drawn = {}
    for epoch in (0, 1, 0):
        samples, batch, notes = collated(task, epoch=epoch)
        texts = [tuple(row[row != 1].tolist()) for row in batch["ids"]]
        assert len(texts) == 6 * len(samples)
        assert len(batch["image"]) == len(samples) and notes["samples"] == 6
        for k, sample in enumerate(samples):
            own, *others = texts[6 * k:6 * k + 6]
            assert own == tuple(dataset.tokens(k)[0]) and sample["row"] in row_of[own]
            assert all(row_of[other] - {sample["row"]} for other in others)
        assert epoch not in drawn or drawn[epoch] == texts
        drawn[epoch] = texts
    assert drawn[0] != drawn[1]


def test_captions_of_one_image_alone_have_no_false_ones(world, tmp_path):
    write_captions(tmp_path / "one_caption_train.arrow", 1, captions=3)
    task = task_on(world, "retrieval")
    task.settings = replace(task.settings, data=str(tmp_path))
    sentence = "one_caption_train.arrow: captions of one image only, so none is false"
    with pytest.raises(ValueError, match=sentence):
        collated(task, count=1)


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "retrieval", "caption"])
@pytest.mark.parametrize("kind", ["flm", "mlm", "ar", "vilt"])
def test_every_task_trains_every_parameter_it_has(world, name, kind):
    if (name, kind) == ("caption", "vilt"):
        with pytest.raises(ValueError, match="ViLT reads from both sides only"):
            task_on(world, name, kind)
        return
    task = task_on(world, name, kind, false_captions=2)
    _, batch, notes = collated(task)
    torch.manual_seed(0)
    model = weights.model_of(task.config)
    results = model(train.to_device(batch, torch.device("cpu"), task.config))
    assert set(results) == set(task.config.loss_weights) == set(notes["counts"])
    sum(loss for loss, _ in results.values()).backward()
    untrained = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # a softmax over captions ignores it
    assert untrained <= ({"head.bias"} if name == "retrieval" else set())


@torch.no_grad()
@pytest.mark.parametrize("name, kind",
                         [("vqa", "flm"), ("nlvr2", "vilt"), ("retrieval", "mlm"), ("vqa", "ar"),
                          ("retrieval", "vilt")])
def test_what_a_head_says_does_not_depend_on_the_rest_of_the_batch(world, name, kind):
    """Neither on padding, nor on other pictures' shapes, nor on which rows are computed.

    Either all rows are, or the class row alone.
    """
    task = task_on(world, name, kind, false_captions=2)
    torch.manual_seed(3)
    model = weights.model_of(task.config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    dataset = task.dataset(task.table(task.settings, "train"), False)
    samples = [dataset[0, i] for i in range(7)]
    ready = lambda some: train.to_device(task.collate(some)[0], torch.device("cpu"), task.config)
    together = layers.task_logits(model, ready(samples))
    alone = torch.cat([layers.task_logits(model, ready([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, **TOL)
    batch = ready(samples)
    text = model.encode_text(batch["ids"])                                     # all rows
    pooled = [model.fuse(layers.encode_batch_images(model, batch, which), text).pooled
              for which in range(2 if name == "nlvr2" else 1)]
    torch.testing.assert_close(model.head(torch.cat(pooled, -1)), together, **TOL)
    assert together.std(0).min() > 1e-2         # or nothing was compared


# -- captions that share an image ------------------------------------------------------------------

PAIRS = [("pretrain", "flm"), ("pretrain", "mlm"), ("pretrain", "ar"), ("pretrain", "vilt"),
         ("vqa", "flm"), ("vqa", "vilt"),
         ("nlvr2", "mlm"), ("caption", "flm")]


def groups_of(table, most):
    """The keys of all texts of a table in groups, the smaller ones among the others."""
    return [(0, *[int(i) for i in texts[first:first + most]]) for row in range(len(table))
            for texts in [np.flatnonzero(table.row_of == row)]
            for first in range(0, len(texts), most)]


def with_repeated_images(batch):
    """The same batch with an image for each text.

    As if all texts had come one by one and drawn the same.
    """
    image_of = batch["image_of"]
    repeated = {name: value for name, value in batch.items() if name != "image_of"}
    for name in {"image", "image_1", "sizes", "patches", "hidden_patches"} & batch.keys():
        repeated[name] = batch[name][image_of]
    for name in {"other_image", "shown_image"} & batch.keys():
        repeated[name] = torch.tensor([image_of.tolist().index(number)
                                       for number in batch[name].tolist()])
    return repeated


@pytest.mark.parametrize("name, kind", PAIRS)
def test_texts_that_share_an_image_give_the_losses_and_gradients_of_as_many_copies_of_it(
        world, name, kind):
    task = task_on(world, name, kind)
    task.config = replace(task.config,
                          **({"itm": True, "pooler": True} if name == "pretrain" else {}))
    table = task.table(task.settings, "train")
    samples = task.dataset(table, True).samples(groups_of(table, 2))
    # a row has one statement here: every second one takes the images before it
    if name == "nlvr2":
        for sample in samples[1::2]:
            sample["shares_image"] = True
    batch, notes = task.collate(samples)
    assert 1 < len(batch["image"]) == notes["samples"] < len(batch["ids"]) == len(samples)
    torch.manual_seed(0)
    model = weights.model_of(task.config).double()
    found = []
    for some in (batch, with_repeated_images(batch)):
        ready = tasks.to_device(some, torch.device("cpu"), task.config)
        ready = {key: value.double() if value.is_floating_point() else value
                 for key, value in ready.items()}
        model.zero_grad()
        results = model(ready)
        sum(loss for loss, _ in results.values()).backward()
        found.append(({key: loss.item() for key, (loss, _) in results.items()},
                      [p.grad.clone() for p in model.parameters()]))
    (losses, gradients), (expected_losses, expected) = found
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["flm", "vilt"])
def test_a_batch_without_groups_is_what_it_was(world, kind):
    _, batch, _ = collated(task_on(world, "pretrain", kind))
    assert "image_of" not in batch and len(batch["image"]) == len(batch["ids"]) == 6


@pytest.mark.parametrize("kind, shown", [("flm", "other_image"), ("vilt", "shown_image")])
def test_wrong_images_come_from_other_groups_and_same_image_says_where_they_are_of_the_same_row(
        world, kind, shown):
    task = task_on(world, "pretrain", kind)
    task.config = replace(task.config, itm=True, pooler=True)
    dataset = task.dataset(task.table(task.settings, "train"), True)
    for epoch in range(5):
        # rows 0 1 2 2 3
        samples = dataset.samples([(epoch, 0, 1), (epoch, 2, 3), (epoch, 4), (epoch, 5),
                                   (epoch, 6, 7)])
        batch, _ = task.collate(samples)
        assert batch["image_of"].tolist() == [0, 0, 1, 1, 2, 3, 4, 4]
        own, row_of_image = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 2, 2, 3])
        assert torch.equal(batch["same_image"], row_of_image[batch[shown]] == own)
        if kind == "flm":
            assert (batch["other_image"] != batch["image_of"]).all()
        else:
            # half of the captions
            assert (batch["shown_image"] != batch["image_of"]).sum() == 4


# -- from the pretrained model to the fine-tuned one -----------------------------------------------

def test_fine_tuning_begins_from_the_pretrained_weights_and_carries_all_that_evaluation_needs(
        world, tmp_path, capsys):
    checkpoint = finetune(world, "vqa", "flm", tmp_path, "--lr", 0)
    before, after = weights.load(world / "flm.pt"), weights.load(checkpoint)
    assert (after.task, after.answer_list, after.config.head) == ("vqa", ANSWERS, "vqa")
    assert len(after.tokenizer) == len(before.tokenizer)
    shared = [name for name in after.state_dict() if name in before.state_dict()]
    assert all(torch.equal(after.state_dict()[name], before.state_dict()[name]) for name in shared)
    assert set(after.state_dict()) - set(shared) == {f"head.{k}.{w}" for k in (0, 1, 3)
                                                     for w in ("weight", "bias")}
    assert "fresh" in capsys.readouterr().out


def test_retrieval_begins_from_image_text_matching(world, tmp_path):
    checkpoint = finetune(world, "retrieval", "flm", tmp_path, "--lr", 0, "--false-captions", 2)
    assert torch.equal(weights.load(checkpoint).head.weight[0],
                       weights.load(world / "flm.pt").itm_head.weight[1])


def test_captioning_grows_the_vocabulary_by_two_and_keeps_the_others_rows(world, tmp_path):
    after, before = weights.load(finetune(world, "caption", "flm", tmp_path, "--lr",
                                          0)), weights.load(world / "flm.pt")
    size = len(before.tokenizer)
    assert [after.tokenizer.ids[token] for token in ("<bos>", "<eos>")] == [size, size + 1]
    assert after.config.vocab_size == size + 2
    assert torch.equal(after.embed.word.weight[:size], before.embed.word.weight)
    assert (after.config.objective, after.config.pooler, after.config.itm) == ("ar", False, False)


def test_captioning_a_vilt_is_refused_in_a_sentence(world, tmp_path):
    with pytest.raises(SystemExit,
                       match="train.py: captioning needs a model that can read from left to right"):
        finetune(world, "caption", "vilt", tmp_path)


@pytest.mark.slow
def test_a_resumed_fine_tuning_equals_one_that_never_stopped(world, tmp_path):
    for kind in ("flm", "vilt"):
        more = "--save-every", 1, "--steps", 3, "--dropout", 0.1, "--eval-every", 2, "--augment"
        whole = finetune(world, "nlvr2", kind, tmp_path / kind / "whole", *more, "--keep", 1)
        again = tmp_path / kind / "again"
        again.mkdir()
        (again / "last.pt").write_bytes((whole.parent / "step_1.pt").read_bytes())
        path = finetune(world, "nlvr2", kind, again, *more, "--resume", "--keep", 1)
        resumed = weights.read(path)["model"]
        for name, tensor in weights.read(whole)["model"].items():
            assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("task", [task for task in recipes.RECIPES if task != "pretrain"])
def test_every_recipe_can_be_asked_for(task):
    for recipe, row in recipes.RECIPES[task].items():
        settings, flags = train.parse(["--task", task, "--recipe", recipe, "--data", "x", "--out",
                                       "y"])
        assert {**vars(settings), **flags}.items() >= {k: v for k, v in row.items()}.items()
        assert isinstance(recipes.MODELS[row["model"]],
                          vilt.Config if "vilt" in recipe else flm.Config)


@pytest.mark.slow
def test_with_another_answer_list_the_head_starts_from_random_weights_and_no_run_resumes(
        world, tmp_path, capsys):
    for path in (*world.glob("mine_vqa_*"), world / "flm.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    finetune(tmp_path, "vqa", "flm", tmp_path / "a", "--lr", 0)
    (tmp_path / "a.pt").write_bytes((tmp_path / "a/last.pt").read_bytes())
    finetune(tmp_path, "vqa", "a", tmp_path / "same", "--seed", 5, "--lr", 0)
    assert "starts from random weights" not in capsys.readouterr().out
    (tmp_path / "mine_vqa_answers.json").write_text(json.dumps(ANSWERS[::-1]))
    finetune(tmp_path, "vqa", "a", tmp_path / "other", "--seed", 5, "--lr", 0)
    printed = capsys.readouterr().out
    assert "the head starts from random weights" in printed
    assert "a.pt, " in printed and "questions of 9 images" in printed
    first, same, other = (weights.load(tmp_path / name / "last.pt")
                          for name in ("a", "same", "other"))
    for name in ("head.0.weight", "head.3.weight"):
        assert torch.equal(first.state_dict()[name], same.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert torch.equal(first.vit.position, other.vit.position)
    assert other.answer_list == ANSWERS[::-1]
    with pytest.raises(SystemExit, match="--resume with another answer list"):
        finetune(tmp_path, "vqa", "flm", tmp_path / "a", "--lr", 0, "--resume")


@pytest.mark.parametrize("task, kind, arguments, sentence", [
    ("retrieval", "flm", ("--false-captions", 0), "--false-captions 0: at least 1"),
    ("retrieval", "flm", ("--captions-per-image", 2),
     "--captions-per-image 2: retrieval shows an image with one true caption"),
    ("vqa", "flm", ("--recipe", "vilt", "--datasets", "mine"),
     "--recipe vilt starts from a model of vilt; .*flm.pt is one of flm"),
    ("vqa", "vilt", ("--recipe", "flm-b32", "--datasets", "mine"),
     "--recipe flm-b32 starts from a model of flm; .*vilt.pt is one of vilt"),
    ("vqa", "flm", ("--label-smoothing", 0.1),
     "--label-smoothing 0.1: is for words, which head vqa does not predict"),
    ("caption", "flm", ("--label-smoothing", 1.5), "label_smoothing 1.5 is outside 0..1"),
])
def test_fine_tuning_that_makes_no_sense_is_refused_in_a_sentence(
        world, tmp_path, task, kind, arguments, sentence):
    with pytest.raises(SystemExit, match=f"^train.py: .*{sentence}"):
        finetune(world, task, kind, tmp_path / "out", *arguments)
