"""Arrow files, pictures, masking and the order of the batches."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import WORDS, picture, write_captions
from PIL import Image

import data
import disk
import files
from data import CaptionDataset, Captions, GlobalBatches, evaluation_batches, mask_words, pad_texts
from files import CAPTIONS
from sources.shards import Writer
from tokenizer import BPE


@pytest.fixture(scope="module")
def tok():
    return BPE.train([" ".join(WORDS)] * 3, 330)


# -- files -------------------------------------------------------------------------------------------------------------

def test_captions_and_images_come_back_in_order_from_several_files(tmp_path):
    files = [write_captions(tmp_path / f"{i}.arrow", rows, seed=i, captions=3) for i, rows in enumerate((20, 1, 9))]
    table = Captions(files)
    expected = [(row, text) for f in files for row in pa.ipc.open_file(f).read_all().to_pylist() for text in row["caption"]]
    assert len(table) == 30 and len(table.row_of) == len(expected) == 90
    for i, (row, text) in enumerate(expected):
        assert table.text(i) == text and bytes(table.image(table.row_of[i])) == row["image"]
    assert table.place(20) == (str(files[1]), 0) and table.place(29) == (str(files[2]), 8)


def test_sliced_and_uneven_caption_lists_are_indexed_right(tmp_path):
    """Arrow batches may start inside their buffers (a sliced table), and rows may have no caption."""
    rows = [{"image": b"x", "caption": ["é" * i + str(j) for j in range(i % 4)], "image_id": "", "split": ""} for i in range(40)]
    whole = pa.Table.from_pylist(rows, schema=CAPTIONS)
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as f, pa.ipc.new_file(f, CAPTIONS) as out:
        out.write_table(whole.slice(5, 10))
        out.write_table(whole.slice(20))
    table = Captions([tmp_path / "s.arrow"])
    kept = rows[5:15] + rows[20:]
    assert list(table.texts()) == [t for row in kept for t in row["caption"]]
    assert table.row_of.tolist() == [r for r, row in enumerate(kept) for _ in row["caption"]]
    assert [table.text(i) for i in range(len(table.row_of))] == list(table.texts())


def test_a_table_travels_to_workers_without_its_open_files(tmp_path):
    table = Captions([write_captions(tmp_path / "a.arrow", 5)])
    copy = pickle.loads(pickle.dumps(table))
    assert not copy.files and copy.text(3) == table.text(3)


def test_an_interrupted_writer_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        with Writer(tmp_path / "a.arrow", CAPTIONS) as out:
            out.write({"image": b"x", "caption": [], "image_id": "", "split": ""})
            raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_row_with_other_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="caption"):
        with Writer(tmp_path / "a.arrow", CAPTIONS) as out:
            out.write({"image": b"x"})


def broken_files(tmp_path):
    good = write_captions(tmp_path / "good.arrow", 30).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.arrow").write_text("hello")
    (tmp_path / "empty.arrow").write_bytes(b"")
    for name, table in (("column", pa.table({"image": [b"x"], "text": ["a"]})),
                        ("type", pa.table({"image": [b"x"], "caption": ["a"]})),
                        ("none", pa.table({"image": [b"x"], "caption": pa.array([[]], pa.list_(pa.string()))}))):
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as out:
            out.write_table(table)


@pytest.mark.parametrize("name, message", [
    ("absent", "no such file"), ("cut", "not a complete Arrow"), ("text", "not a complete Arrow"), ("empty", "not a complete"),
    ("column", "no column caption"), ("type", "list<string> expected"), ("none", "no captions")])
def test_bad_files_are_named_in_one_sentence(tmp_path, name, message):
    broken_files(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Captions([tmp_path / f"{name}.arrow"])
    assert f"{name}.arrow" in str(error.value) and "\n" not in str(error.value)


def test_dataset_names_find_vilts_files(tmp_path):
    names = ["coco_caption_karpathy_train.arrow", "coco_caption_karpathy_restval.arrow", "coco_caption_karpathy_val.arrow",
             "vg.arrow", "sbu_0.arrow", "sbu_10.arrow", "conceptual_caption_train_3.arrow", "mine_caption_train.arrow"]
    for name in names:
        (tmp_path / name).touch()
    found = lambda split, *sets: [p.name for p in files.find_files(tmp_path, sets, split)]
    assert found("train", "coco") == names[:2] and found("val", "coco") == [names[2]] and found("val", "vg") == []
    assert found("train", "sbu", "gcc") == names[4:7] and found("train", "mine") == [names[7]]
    assert sorted(found("train")) == sorted(names[:2] + names[3:])
    with pytest.raises(FileNotFoundError, match="f30k"):
        found("train", "f30k")


def test_a_folder_without_training_files_can_be_evaluated(tmp_path):
    for name in ("mine_caption_test.arrow", "coco_caption_karpathy_test.arrow", "a_vqa_val.arrow", "nlvr2_test1.arrow",
                 "x_nlvr2_dev.arrow", "conceptual_caption_val_0.arrow"):
        (tmp_path / name).touch()
    assert files.splits_of(tmp_path) == {"coco": ["test"], "gcc": ["val"], "mine": ["test"]}
    assert files.splits_of(tmp_path, "nlvr2") == {"nlvr2": ["test"], "x": ["val"]}
    assert files.known_datasets(tmp_path, "vqa") == ["a"]
    assert [p.name for p in files.find_files(tmp_path, (), "val", "vqa")] == ["a_vqa_val.arrow"]
    with pytest.raises(FileNotFoundError, match="a_vqa_train.arrow expected"):
        files.find_files(tmp_path, (), "train", "vqa")
    (tmp_path / "b_vqa_train.arrow").touch()                # what is trained on is validated on its own files only
    assert files.find_files(tmp_path, (), "val", "vqa") == []


def test_json_that_is_none_is_named(tmp_path):
    path = tmp_path / "x.json"
    for text, sentence in (("[", "x.json: not JSON"), ("[1]", "x.json: a JSON list of strings"), ("{}", "list of strings")):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            disk.read_json(path, list)


# -- pictures ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(40, 32), (32, 40), (17, 90), (31, 31)])
def test_decoding_equals_torchvisions_clip_transform(size):
    from torchvision import transforms as T
    encoded = picture(0, size)
    clip = T.Compose([T.Resize(24, T.InterpolationMode.BICUBIC), T.CenterCrop(24), T.PILToTensor()])
    assert torch.equal(data.decode(encoded, data.Square(24)), clip(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.mark.parametrize("size, mean, most", [((90, 120), 0.1, 2), ((800, 600), 2, 60)])
def test_fast_decoding_shows_the_same_picture(size, mean, most):
    """The second picture is decoded at a quarter of its size by libjpeg: softer, but the same picture."""
    encoded = picture(3, size)
    exact, fast = (data.decode(encoded, data.Square(64), fast=fast).float() for fast in (False, True))
    assert 0 < (exact - fast).abs().mean() < mean and (exact - fast).abs().max() <= most


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_colour_mode_becomes_rgb(mode):
    image, out = Image.open(io.BytesIO(picture(1))), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(out, "JPEG" if mode == "CMYK" else "PNG")
    decoded = data.decode(out.getvalue(), data.Square(16))
    assert decoded.shape == (3, 16, 16) and decoded.float().std() > 5


def test_normalisation_is_clips():
    from torchvision.transforms import Normalize
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    torch.testing.assert_close(data.normalize(images), Normalize(data.CLIP_MEAN, data.CLIP_STD)(images / 255.0))


def test_undecodable_images_are_replaced_by_the_next_row_and_named(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 10, broken={3, 4, 9})])
    dataset = CaptionDataset(table, tok, data.Square(16), 50, train=True)
    sample = dataset[0, 7]                                          # row 3, its second caption
    assert sample["row"] == 5 and sample["index"] == 10 and len(sample["unreadable"]) == 2
    assert sample["unreadable"][0].startswith(f"{tmp_path / 'a.arrow'} row 3: ")
    assert sample["ids"][1:-1] == tok.encode(table.text(10)) and not dataset[0, 0]["unreadable"]
    assert dataset[0, 18]["row"] == 0                               # the last row's follower is the first


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 4)])
    draw = lambda seed, epoch, i: CaptionDataset(table, tok, data.Square(16), 50, True, seed, augment=True)[epoch, i]
    state = torch.random.get_rng_state()
    a, b, c, d = draw(0, 1, 2), draw(0, 1, 2), draw(0, 2, 2), draw(1, 1, 2)
    assert torch.equal(a["image"], b["image"]) and a["rng"].random() == b["rng"].random()
    assert not torch.equal(a["image"], c["image"]) or not torch.equal(a["image"], d["image"])
    assert torch.equal(state, torch.random.get_rng_state())         # augmentation leaves the global generator alone


def test_long_captions_are_cut_and_counted(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 4)])
    samples = [CaptionDataset(table, tok, data.Square(16), 7, True)[0, i] for i in range(8)]
    for sample, i in zip(samples, range(8)):
        ids = tok.encode(table.text(i))
        assert sample["ids"] == [tok.cls_id, *ids[:5], tok.sep_id] and sample["cut"] == (len(ids) > 5)
    assert {s["cut"] for s in samples} == {True, False}


def test_batches_are_padded_to_a_multiple():
    texts = [[0, 5, 2], [0] + [6] * 8 + [2]]
    assert pad_texts(texts, 1, 8).shape == (2, 16) and pad_texts(texts, 1).shape == (2, 10)
    assert pad_texts(texts, 1, 8, limit=13).shape == (2, 13)
    assert pad_texts(texts, 1, 4).tolist()[0] == [0, 5, 2] + [1] * 9


# -- masking -----------------------------------------------------------------------------------------------------------

def test_masking_takes_whole_words_at_the_asked_rate():
    rng, ids = np.random.default_rng(0), [0] + list(range(10, 28)) + [2]
    starts = [True, False, True] * 6                                # 12 words: of two tokens and of one, in turn
    word = np.cumsum(starts)
    replacements = np.arange(200, 300)
    picked_share, fates = 0, {"mask": 0, "random": 0, "kept": 0}
    for _ in range(4000):
        masked, picked = mask_words(ids, starts, 0.15, 4, replacements, rng)
        words = set(word[picked - 1])
        assert len(words) in (1, 2) and set(picked) == {i + 1 for i, w in enumerate(word) if w in words}
        assert masked[0] == 0 and masked[-1] == 2
        picked_share += len(words) / 12
        for i in range(len(ids)):
            if i not in picked:
                assert masked[i] == ids[i]
            else:
                fates["mask" if masked[i] == 4 else "kept" if masked[i] == ids[i] else "random"] += 1
                assert masked[i] in (4, ids[i]) or masked[i] >= 200
    assert abs(picked_share / 4000 - 0.15) < 0.004
    total = sum(fates.values())
    assert abs(fates["mask"] / total - 0.8) < 0.02 and abs(fates["random"] / total - 0.1) < 0.02


def test_short_captions_lose_at_least_one_word_and_empty_ones_none():
    rng = np.random.default_rng(0)
    assert all(len(mask_words([0, 7, 8, 2], [True, True], 0.15, 4, np.array([9]), rng)[1]) == 1 for _ in range(50))
    ids, picked = mask_words([0, 2], [], 0.15, 4, np.array([9]), rng)
    assert ids.tolist() == [0, 2] and len(picked) == 0


# -- order -------------------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(5).integers(3, 60, 1003)


@pytest.mark.parametrize("bucket", [1, 3, 50])
def test_every_epoch_shows_every_caption_once_in_another_order(bucket):
    sampler = GlobalBatches(LENGTHS, 100, 1, bucket)
    epochs = [np.concatenate([sampler.batch(10 * e + k) for k in range(10)]) for e in range(2)]
    for order in epochs:
        assert len(set(order)) == 1000
    assert set(epochs[0]) != set(epochs[1])                         # other captions sit out
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_global_batch_is_the_same_for_any_number_of_processes():
    whole = {s: list(GlobalBatches(LENGTHS, 96, 0).micro_batches(s, s + 1, 96))[0] for s in (3, 25)}
    for world, micro in ((1, 24), (2, 24), (4, 24), (2, 48), (3, 8)):
        for step, everything in whole.items():
            dealt = [list(GlobalBatches(LENGTHS, 96, 0).micro_batches(step, step + 1, micro, r, world)) for r in range(world)]
            assert sorted(k for rank in dealt for batch in rank for k in batch) == sorted(everything)
            assert {len(b) for rank in dealt for b in rank} == {micro} and len({len(rank) for rank in dealt}) == 1


def test_processes_get_equal_work_when_each_has_several_micro_batches():
    """Padded tokens of the busiest process against those of the idlest, over a step."""
    lengths = np.sort(np.random.default_rng(0).integers(5, 50, 4096))
    for micro, limit in ((32, 1.02), (64, 1.02), (128, 1.05), (256, 1.2)):           # 16, 8, 4 and 2 micro-batches each
        work = []
        for rank in range(8):
            batches = GlobalBatches(lengths, 4096, 0).micro_batches(0, 1, micro, rank, 8)
            work.append(sum(micro * lengths[[i for _, i in batch]].max() for batch in batches))
        assert max(work) / min(work) < limit, micro


@pytest.mark.parametrize("bucket", [1, 4])
def test_resuming_at_a_step_is_never_having_stopped(bucket):
    sampler = lambda start: GlobalBatches(LENGTHS, 100, 0, bucket).micro_batches(start, 25, 50)
    assert list(sampler(0))[2 * 17:] == list(sampler(17))


def test_micro_batches_hold_captions_of_like_length():
    batches = list(GlobalBatches(LENGTHS, 500, 0).micro_batches(0, 2, 50))
    spread = [np.ptp(LENGTHS[[i for _, i in batch]]) for batch in batches]
    assert max(spread) < np.ptp(LENGTHS) / 4


def test_small_batches_from_one_bucket_hold_captions_of_like_length_and_come_in_random_order():
    fair, bucketed = (GlobalBatches(LENGTHS, 20, 0, bucket) for bucket in (1, 25))
    spread = lambda sampler: np.mean([np.ptp(LENGTHS[sampler.batch(step)]) for step in range(50)])
    assert spread(bucketed) < spread(fair) / 8
    means = np.array([LENGTHS[bucketed.batch(step)].mean() for step in range(25)])
    assert abs(np.corrcoef(means, np.arange(25))[0, 1]) < 0.5          # no curriculum from short to long
    with pytest.raises(ValueError, match="--bucket 0"):
        GlobalBatches(LENGTHS, 20, 0, 0)


def test_a_global_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="only 1003 captions"):
        GlobalBatches(LENGTHS, 2000, 0)


def test_evaluation_sees_each_caption_exactly_once():
    batches = evaluation_batches(LENGTHS[::2], range(0, 1003, 2), 64)
    assert sorted(i for batch in batches for _, i in batch) == list(range(0, 1003, 2))


def test_real_captions_in_a_published_global_batch_leave_little_padding(shared):
    """At most a tenth of the tokens of the published batch (4,096 in micro-batches of 64) is padding."""
    roberta = BPE.load(shared / "tokenizers/roberta-base/vocab.json", shared / "tokenizers/roberta-base/merges.txt")
    texts = [s["raw"] for image in json.load(open(shared / "data/coco_small/dataset.json"))["images"] for s in image["sentences"]]
    tokens = np.array([len(roberta.encode(t)) + 2 for t in texts] * 4)
    sampler = GlobalBatches(tokens, 4096, 0)
    padded = sum(len(b) * tokens[[i for _, i in b]].max() for b in sampler.micro_batches(0, 1, 64))
    assert 1 - tokens[sampler.batch(0)].sum() / padded < 0.1


def test_token_lengths_count_what_the_model_will_see(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 9)])
    dataset = CaptionDataset(table, tok, data.Square(16), 50, True)
    lengths = data.token_lengths(table, tok)
    assert lengths.tolist() == [len(dataset[0, i]["ids"]) for i in range(18)]
    assert data.token_lengths(table, tok, [3, 17]).tolist() == lengths[[3, 17]].tolist()


def test_shards_that_img2dataset_left_are_found_without_being_named(tmp_path):
    for name in ("mine_00000.arrow", "mine_00001.arrow", "other_caption_val.arrow"):
        write_captions(tmp_path / name, 2)
    assert files.splits_of(tmp_path) == {"mine": ["train"], "other": ["val"]}
    assert [path.name for path in files.find_files(tmp_path, (), "train")] == ["mine_00000.arrow", "mine_00001.arrow"]
