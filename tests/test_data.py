"""Arrow files, pictures, masking and the order of the batches."""

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import struct

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import WORDS, arrow, picture, write_captions, write_questions, write_statements
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import pictures
from batches import GlobalBatches, draw_groups, evaluation_batches
from data import CaptionDataset, Captions, Questions, Statements, mask_words, pad_texts
from sources.shards import Writer
from storage import disk, files
from storage.files import CAPTIONS
from tokenizer import BPE


@pytest.fixture(scope="module")
def tok():
    return BPE.train([" ".join(WORDS)] * 3, 330)


# -- files -----------------------------------------------------------------------------------------

def test_captions_and_images_come_back_in_order_from_several_files(tmp_path):
    files = [write_captions(tmp_path / f"{i}.arrow", rows, seed=i, captions=3)
             for i, rows in enumerate((20, 1, 9))]
    table = Captions(files)
    expected = [(row, text) for f in files for row in pa.ipc.open_file(f).read_all().to_pylist()
                for text in row["caption"]]
    assert len(table) == 30 and len(table.row_of) == len(expected) == 90
    for i, (row, text) in enumerate(expected):
        assert table.text(i) == text and bytes(table.image(table.row_of[i])) == row["image"]
    assert table.place(20) == (str(files[1]), 0) and table.place(29) == (str(files[2]), 8)


def test_sliced_and_uneven_caption_lists_are_indexed_right(tmp_path):
    """Arrow batches may start inside their buffers (a sliced table).

    Rows may have no caption.
    """
    rows = [{"image": b"x", "caption": ["é" * i + str(j) for j in range(i % 4)], "image_id": "",
             "split": ""} for i in range(40)]
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
                        ("none",
                         pa.table({"image": [b"x"],
                                   "caption": pa.array([[]], pa.list_(pa.string()))}))):
        path = str(tmp_path / f"{name}.arrow")
        with pa.OSFile(path, "wb") as f, pa.ipc.new_file(f, table.schema) as out:
            out.write_table(table)


@pytest.mark.parametrize("name, message", [
    ("absent", "no such file"), ("cut", "not a complete"), ("text", "not a complete"),
                                           ("empty", "not a complete"),
    ("column", "no column caption"), ("type", "list<string> expected"), ("none", "no captions")])
def test_bad_files_are_named_in_one_sentence(tmp_path, name, message):
    broken_files(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Captions([tmp_path / f"{name}.arrow"])
    assert f"{name}.arrow" in str(error.value) and "\n" not in str(error.value)


def in_a_child(function):
    """(exit status, peak memory in MB) of a function in a forked process, which it may kill."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    _, status, usage = os.wait4(pid, 0)
    return status, usage.ru_maxrss >> 10


KINDS = {"c": (Captions, write_captions), "q": (Questions, write_questions),
         "s": (Statements, write_statements)}


def read_all_of(table):
    list(table.texts())
    for i, row in enumerate(table.row_of):
        table.text(i), table.details(i), table.place(row)
        for which in range(len(table.IMAGES)):
            bytes(table.image(row, which) or b"")


def test_a_damaged_file_neither_ends_the_interpreter_nor_takes_gigabytes(tmp_path):
    """It is refused in one sentence with its name, or every cell can be read."""
    rng = np.random.default_rng(0)
    whole = {}
    for name, (_, write) in KINDS.items():
        write(tmp_path / name, 12, 1)
        # its pictures would hide what matters
        table = pa.ipc.open_file(str(tmp_path / name)).read_all()
        for i, column in enumerate(table.column_names):
            if column.startswith("image") and column != "image_id":
                table = table.set_column(i, column, pa.array([b"x"] * len(table)))
        arrow(tmp_path / name,
              {column: table[column].combine_chunks() for column in table.column_names})
        whole[name] = (tmp_path / name).read_bytes()

    def read_damaged():
        for k in range(200):
            name = "cqs"[k % 3]
            damaged, path = bytearray(whole[name]), tmp_path / "x"
            for _ in range(rng.integers(1, 4)):
                place = int(rng.integers(len(damaged) - 8))
                if rng.random() < 0.5:
                    damaged[place] = rng.choice([0, 1, 2, 127, 128, 255])
                else:
                    struct.pack_into("<q", damaged, place & ~7,
                                     int(rng.choice([-1, 2 ** 31, 2 ** 40, -2 ** 63])))
            path.write_bytes(damaged[:len(damaged) - int(rng.integers(0, 9) == 0)])
            try:
                read_all_of(KINDS[name][0]([path]))
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    status, peak = in_a_child(read_damaged)
    assert status == 0 and peak < before + 500


def test_compressed_batches_are_refused_before_they_are_unpacked(tmp_path):
    """Ten kilobytes of zeros that would become a gigabyte."""
    table = pa.table({"image": [b""] * 2, "caption": [["a"], ["\0" * (1 << 24)]]})
    for codec in ("lz4", "zstd"):
        path = tmp_path / codec
        with pa.ipc.new_file(str(path), table.schema,
                             options=pa.ipc.IpcWriteOptions(compression=codec)) as out:
            out.write_table(table)
        with pytest.raises(ValueError,
                           match=f"{codec}: not a complete.* are compressed; write it without"):
            Captions([path])
    grey = pa.table({"image": [b""], "caption": [["a"]],
                     "split": pa.array(["train"]).dictionary_encode()})
    with pa.ipc.new_file(str(path), grey.schema) as out:
        out.write_table(grey)
    # dictionaries elsewhere do not matter
    assert Captions([path]).text(0) == "a"


TEXTS = pa.array([["a", "b"], ["c"]])
IMAGES = pa.array([b"x", b"y"])


@pytest.mark.parametrize("columns", [
    {"image": IMAGES.cast(pa.large_binary())},
                                     {"caption": TEXTS.cast(pa.large_list(pa.large_string()))},
    {"caption": TEXTS.cast(pa.list_(pa.large_string()))},
                                     {"image_id": pa.array([1, 2], pa.uint8())},
    {"image_id": pa.array(["1", "2"], pa.large_string())}, {"image": pa.array([None, b"y"])}])
def test_wide_types_are_read_as_the_schemas(tmp_path, columns):
    arrow(tmp_path / "x", {"image": IMAGES, "caption": TEXTS} | columns)
    table = Captions([tmp_path / "x"])
    assert list(table.texts()) == [table.text(i) for i in range(3)] == ["a", "b", "c"]
    assert table.row_of.tolist() == [0, 0, 1] and bytes(table.image(1)) == b"y"


@pytest.mark.parametrize("name, values, sentence", [
    ("image", IMAGES.dictionary_encode(), "image is dictionary.*, binary expected"),
    ("image", IMAGES.cast(pa.binary_view()), "image is binary_view, binary expected"),
    ("image", IMAGES.cast(pa.binary(1)), r"image is fixed_size_binary\[1\], binary expected"),
    ("image", pa.array(["x", "y"]), "image is string, binary expected"),
    ("caption", pa.array(["a", "b"]), "caption is string, list<string> expected"),
    ("caption", pa.array([[b"a"], [b"b"]]), "caption is list<binary>, list<string> expected"),
    ("caption", pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)),
     "caption is fixed_size_list.*, list<string> expected"),
    ("caption", pa.array([["a"], ["b"]], pa.list_view(pa.string())),
     "caption is list_view<string>, list<string> expected"),
    ("image_id", pa.array([1.0, 2.0]), "image_id is double, string expected"),
    ("caption", pa.array([["a"], None]), "row 1: null in caption"),
    ("caption", pa.array([["a"], ["b", None]]), "row 1: null in caption"),
    ("image_id", pa.array(["1", None]), "row 1: null in image_id")])
def test_other_types_and_nulls_are_refused_in_one_sentence(tmp_path, name, values, sentence):
    arrow(tmp_path / "x", {"image": IMAGES, "caption": TEXTS} | {name: values})
    with pytest.raises(ValueError, match=f"x.*{sentence}"):
        Captions([tmp_path / "x"])


def test_a_hundred_files_are_read_with_sixty_four_descriptors(tmp_path):
    paths = [tmp_path / f"{i:03}" for i in range(100)]
    for i, path in enumerate(paths):
        arrow(path, {"image": [b"x"], "caption": [[str(i)]]})

    def read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        table = Captions(paths)
        expected = [str(i) for i in range(100)]
        assert [table.text(i) for i in range(100)] == expected == list(table.texts())
        assert len(table.files) == 16 and table.place(99) == (str(paths[99]), 0)
        assert table.rows_of_files() == [[path.name, 1] for path in paths]
        table.files.clear()
        with pytest.raises(OSError) as error:
            taken = [os.open("/dev/null", os.O_RDONLY)
                     for _ in range(65 - len(os.listdir("/proc/self/fd")))]
            table.text(0), taken
        assert (error.value.errno, error.value.filename) == (errno.EMFILE, str(paths[0]))

    assert in_a_child(read)[0] == 0


def test_the_systems_errors_are_not_taken_for_damage(tmp_path, monkeypatch):
    def forbidden(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    path = write_captions(tmp_path / "x.arrow", 1)
    monkeypatch.setattr(files, "open", forbidden, raising=False)
    with pytest.raises(PermissionError) as error:
        Captions([path])
    assert disk.sentence_of(error.value).startswith(f"{path}: Permission denied")
    with pytest.raises(ValueError, match="it is no file"):
        Captions([tmp_path])


def test_a_file_that_was_replaced_is_not_read_unchecked(tmp_path):
    table = Captions([write_captions(tmp_path / "x.arrow", 3)])
    write_captions(tmp_path / "x.arrow", 4)
    with pytest.raises(ValueError, match="x.arrow: has changed since it was opened first"):
        pickle.loads(pickle.dumps(table)).text(0)


# -- labels ----------------------------------------------------------------------------------------

VQA_COLUMNS = {"image": [b"x", b"y"], "questions": [["a", "b"], ["c"]],
               "question_id": [[1, 2], [3]],
               "answer_labels": [[[0, 7], []], [[1]]], "answer_scores": [[[0.3, 1.0], []], [[0.9]]]}


@pytest.mark.parametrize("columns, sentence", [
    ({"answer_labels": [[[0, 7], []], [[-1]]]}, "row 1: a label below 0"),
    ({"answer_scores": [[[0.3, 1.0], []], [[float("nan")]]]}, "row 1: a score that is not"),
    ({"answer_scores": [[[0.3, 1e30], []], [[0.9]]]}, "row 0: a score that is not"),
    ({"answer_scores": [[[0.3, 0.0], []], [[0.9]]]}, "row 0: a score that is not"),
    ({"answer_scores": [[[0.3, 1.0], []], [[0.9, 1.0]]]},
     "row 1: not one of answer_scores for each"),
    ({"answer_scores": [[[0.3], [1.0]], [[0.9]]]}, "row 0: not one of answer_scores for each"),
    ({"answer_scores": [[], [[0.9]]]}, "row 0: not one of answer_scores for each"),
    ({"answer_labels": [[[0, 7]], [[1]]], "answer_scores": [[[0.3, 1.0]], [[0.9]]]},
     "row 0: not one list of answer_labels"),
    ({"question_id": [[1, 2], []]}, "row 1: not one question_id for each question"),
    ({"question_id": [[1, None], [3]]}, "row 0: null in question_id"),
    ({"answer_labels": [[[0, 7], []], [[None]]]}, "row 1: null in answer_labels"),
    ({"answer_labels": [[[0, 7], None], [[1]]]}, "row 0: null in answer_labels"),
    ({"answer_labels": [[["a", "b"], []], [["c"]]]},
     "answer_labels is list<list<string>>, list<list<int64>> expected")])
def test_wrong_labels_of_questions_are_refused_with_their_row(tmp_path, columns, sentence):
    arrow(tmp_path / "x", VQA_COLUMNS)
    table = Questions([tmp_path / "x"])
    assert (table.largest_label, table.largest_place) == (7, f"{tmp_path / 'x'} row 0")
    assert table.details(2) == {"labels": [1], "scores": [0.9], "question_id": 3}
    arrow(tmp_path / "x", VQA_COLUMNS | columns)
    with pytest.raises(ValueError, match=sentence):
        Questions([tmp_path / "x"])


@pytest.mark.parametrize("empty", [[[], []], [[[], []], [[]]]])
def test_questions_without_answers_are_those_of_tests(tmp_path, empty):
    arrow(tmp_path / "x", VQA_COLUMNS | {"answer_labels": empty, "answer_scores": empty})
    table = Questions([tmp_path / "x"])
    assert table.largest_label == -1
    assert table.details(1) == {"labels": [], "scores": [], "question_id": 2}


@pytest.mark.parametrize("answers, sentence", [
    ([["True"], ["true"]], "row 1: an answer that is neither"),
                                               ([["yes"], ["True"]],
                                                "row 0: an answer that is neither"),
    ([["True"], [None]], "row 1: null in answers"),
                                               ([["True"], []],
                                                "row 1: not one answer for each statement"),
    ([[1], [0]], "answers is list<int64>, list<string> expected"), ([["True"], ["False"]], ""),
                                               ([[True], [False]], "")])
def test_statements_are_true_or_false_and_nothing_else(tmp_path, answers, sentence):
    arrow(tmp_path / "x",
          {"image_0": [b"", b""], "image_1": [b"", b""], "questions": [["a"], ["b"]],
           "identifier": ["dev-0-0-0", "dev-1-0-0"], "answers": answers})
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            Statements([tmp_path / "x"])
    else:
        table = Statements([tmp_path / "x"])
        assert [table.details(i)["label"] for i in range(2)] == [1, 0]


# -- names -----------------------------------------------------------------------------------------

def test_dataset_names_find_vilts_files(tmp_path):
    names = ["coco_caption_karpathy_train.arrow", "coco_caption_karpathy_restval.arrow",
             "coco_caption_karpathy_val.arrow",
             "vg.arrow", "sbu_0.arrow", "sbu_10.arrow", "conceptual_caption_train_3.arrow",
             "mine_caption_train.arrow"]
    for name in names:
        (tmp_path / name).touch()
    found = lambda split, *sets: [p.name for p in files.find_files(tmp_path, sets, split)]
    assert found("train", "coco") == names[:2]
    assert found("val", "coco") == [names[2]] and found("val", "vg") == []
    assert found("train", "sbu", "gcc") == names[4:7] and found("train", "mine") == [names[7]]
    assert sorted(found("train")) == sorted(names[:2] + names[3:])
    with pytest.raises(FileNotFoundError, match="f30k"):
        found("train", "f30k")


def test_a_folder_without_training_files_can_be_evaluated(tmp_path):
    for name in ("mine_caption_test.arrow", "coco_caption_karpathy_test.arrow", "a_vqa_val.arrow",
                 "nlvr2_test1.arrow",
                 "x_nlvr2_dev.arrow", "conceptual_caption_val_0.arrow"):
        (tmp_path / name).touch()
    assert files.splits_of(tmp_path) == {"coco": ["test"], "gcc": ["val"], "mine": ["test"]}
    assert files.splits_of(tmp_path, "nlvr2") == {"nlvr2": ["test"], "x": ["val"]}
    assert files.known_datasets(tmp_path, "vqa") == ["a"]
    assert [p.name for p in files.find_files(tmp_path, (), "val", "vqa")] == ["a_vqa_val.arrow"]
    with pytest.raises(FileNotFoundError, match="a_vqa_train.arrow expected"):
        files.find_files(tmp_path, (), "train", "vqa")
    # what is trained on is validated on its own files only
    (tmp_path / "b_vqa_train.arrow").touch()
    assert files.find_files(tmp_path, (), "val", "vqa") == []


def test_json_that_is_none_is_named(tmp_path):
    path = tmp_path / "x.json"
    for text, sentence in (("[", "x.json: not JSON"), ("[1]", "x.json: a JSON list of strings"),
                           ("{}", "list of strings")):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            disk.read_json(path, list)


# -- pictures --------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(40, 32), (32, 40), (17, 90), (31, 31)])
def test_decoding_equals_torchvisions_clip_transform(size):
    from torchvision import transforms as T
    encoded = picture(0, size)
    clip = T.Compose([T.Resize(24, T.InterpolationMode.BICUBIC), T.CenterCrop(24), T.PILToTensor()])
    assert torch.equal(pictures.decode(encoded, pictures.Square(24)),
                       clip(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.mark.parametrize("size, mean, most", [((90, 120), 0.1, 2), ((800, 600), 2, 60)])
def test_fast_decoding_shows_the_same_picture(size, mean, most):
    """The second picture is decoded at a quarter of its size by libjpeg.

    It is softer, but the same picture.
    """
    encoded = picture(3, size)
    exact, fast = (pictures.decode(encoded, pictures.Square(64), fast=fast).float()
                   for fast in (False, True))
    assert 0 < (exact - fast).abs().mean() < mean and (exact - fast).abs().max() <= most


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_colour_mode_becomes_rgb(mode):
    image, out = Image.open(io.BytesIO(picture(1))), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(out, "JPEG" if mode == "CMYK" else "PNG")
    decoded = pictures.decode(out.getvalue(), pictures.Square(16))
    assert decoded.shape == (3, 16, 16) and decoded.float().std() > 5


def encoded(image, format="PNG", **more):
    image.save(out := io.BytesIO(), format, **more)
    return out.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_of_a_camera_is_turned_upright(format, turn):
    upright = Image.open(io.BytesIO(picture(4, (48, 32)))).resize((24, 16))
    stored = {turn: upright.transpose(back) for turn, back in {
        # the inverse of what TURNS does
        2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.items()} | {1: upright}
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    more = options.get(format, {})
    found = pictures.open_image(encoded(stored[turn], format, exif=exif, **more))
    assert found.size == (24, 16)
    assert np.abs(np.asarray(found, int) - np.asarray(upright, int)).max() < 16


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60))
def test_broken_exif_does_not_make_a_picture_unreadable(tags):
    image = Image.new("RGB", (8, 8), (9, 200, 30))
    turned = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + tags)
    assert pictures.open_image(turned).getpixel((3, 3))[1] > 180


@pytest.mark.parametrize("dtype, values, expected", [
    (np.int32, [200, 100, 0], [200, 100, 0]), (np.int32, [65535, 25700, 0], [255, 100, 0]),
    (np.int32, [2 ** 31 - 1, 2 ** 30, -5], [255, 127, 0]),
                                                     (np.uint16, [65535, 25600, 0], [255, 100, 0]),
    (np.float32, [1, 0.5, 0], [255, 127, 0]), (np.float32, [1.1, 0.5, -0.1], [255, 127, 0]),
    (np.float32, [200, 100, np.nan], [200, 100, 0]), (np.float32, [np.inf, 0.5, -np.inf],
                                                      [255, 127, 0]),
    (np.float32, [1e30, 5e29, 0], [255, 127, 0]), (np.float32, [np.nan, 0, 0], [0, 0, 0])])
def test_wide_numbers_are_scaled_and_neither_black_nor_white(dtype, values, expected):
    image = pictures.open_image(encoded(Image.fromarray(np.array([values], dtype)), "TIFF"))
    assert np.abs(np.asarray(image)[0, :, 0].astype(int) - expected).max() <= 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size, fine",
                         [((60_000, 1), False), ((1, 60_000), False), ((101, 1), False),
                          ((100, 1), True),
                          ((9500, 9500), False)])
def test_a_picture_too_long_or_too_large_counts_as_undecodable_before_it_is_decoded(size, fine):
    bomb = encoded(Image.new("1", size))
    for read in (pictures.open_image, pictures.open_header,
                 lambda b: pictures.decode(b, pictures.Square(64)),
                 lambda b: pictures.decode(b, pictures.Whole(64, 16), fast=True)):
        if fine:
            read(bomb)
        else:
            with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels; at most"):
                read(bomb)


def test_normalisation_is_clips():
    from torchvision.transforms import Normalize
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    torch.testing.assert_close(pictures.normalize(images),
                               Normalize(pictures.CLIP_MEAN, pictures.CLIP_STD)(images / 255.0))


def test_undecodable_images_are_replaced_by_the_next_row_and_named(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 10, broken={3, 4, 9})])
    dataset = CaptionDataset(table, tok, pictures.Square(16), 50, train=True)
    sample = dataset[0, 7]                                          # row 3, its second caption
    assert sample["row"] == 5 and sample["index"] == 10 and len(sample["unreadable"]) == 2
    assert sample["unreadable"][0].startswith(f"{tmp_path / 'a.arrow'} row 3: ")
    assert sample["ids"][1:-1] == tok.encode(table.text(10)) and not dataset[0, 0]["unreadable"]
    # the last row's follower is the first
    assert dataset[0, 18]["row"] == 0


def test_an_undecodable_image_is_named_once_for_its_group_which_moves_on_to_the_next_row(
        tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 6, captions=3, broken={1, 2})])
    dataset = CaptionDataset(table, tok, pictures.Square(16), 50, train=True)
    # row 0; the first and third caption of row 1
    samples = dataset.samples([(0, 0), (0, 3, 5)])
    assert [sample["row"] for sample in samples] == [0, 3, 3]
    assert [sample["index"] for sample in samples] == [0, 9, 10]
    assert [len(sample["unreadable"]) for sample in samples] == [0, 2, 0]
    assert [sample["shares_image"] for sample in samples] == [False, False, True]


def test_a_group_that_moves_on_to_an_image_with_fewer_captions_keeps_its_size(tmp_path, tok):
    files = [write_captions(tmp_path / "a.arrow", 1, captions=3, broken={0}),
             write_captions(tmp_path / "b.arrow", 2, captions=2)]
    dataset = CaptionDataset(Captions(files), tok, pictures.Square(16), 50, train=True)
    assert [sample["index"] for sample in dataset.samples([(0, 0, 1, 2)])] == [3, 4, 3]


def test_a_group_is_the_same_captions_with_its_image_decoded_once_and_augmented_by_the_first(
        tmp_path, tok, monkeypatch):
    table = Captions([write_captions(tmp_path / "a.arrow", 4, captions=3)])
    dataset = CaptionDataset(table, tok, pictures.Square(16), 50, True, augment=True)
    one_by_one = [dataset[2, i] for i in (3, 5, 4, 6)]
    decoded, decode = [], pictures.decode
    monkeypatch.setattr(data, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    samples = dataset.samples([(2, 3, 5, 4), (2, 6)])
    assert len(decoded) == 2
    assert [sample["ids"] for sample in samples] == [sample["ids"] for sample in one_by_one]
    assert all(sample["image"] is samples[0]["image"] for sample in samples[:3])
    for k in (0, 3):
        assert torch.equal(samples[k]["image"], one_by_one[k]["image"])
        assert samples[k]["rng"].random() == one_by_one[k]["rng"].random()
    # or all would mask the same
    assert len({sample["rng"].random() for sample in samples}) == 4


def test_the_loader_asks_for_groups_as_a_whole(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 8, captions=3)])
    dataset = CaptionDataset(table, tok, pictures.Square(16), 50, True)
    sampler = GlobalBatches(data.token_lengths(table, tok), 12, 0, 1, table.row_of, 2)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler.micro_batches(0, 4, 6),
                                         collate_fn=list)
    found = [[(sample["index"], sample["shares_image"]) for sample in samples]
             for samples in loader]
    keys = list(sampler.micro_batches(0, 4, 6))
    assert found == [[(i, place > 0) for _, *group in batch for place, i in enumerate(group)]
                     for batch in keys]
    assert any(shares for batch in found for _, shares in batch)


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 4)])
    draw = lambda seed, epoch, i: CaptionDataset(table, tok, pictures.Square(16), 50, True, seed,
                                                 augment=True)[epoch, i]
    state = torch.random.get_rng_state()
    a, b, c, d = draw(0, 1, 2), draw(0, 1, 2), draw(0, 2, 2), draw(1, 1, 2)
    assert torch.equal(a["image"], b["image"]) and a["rng"].random() == b["rng"].random()
    assert not torch.equal(a["image"], c["image"]) or not torch.equal(a["image"], d["image"])
    # augmentation leaves the global generator alone
    assert torch.equal(state, torch.random.get_rng_state())


def test_long_captions_are_cut_and_counted(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 4)])
    samples = [CaptionDataset(table, tok, pictures.Square(16), 7, True)[0, i] for i in range(8)]
    for sample, i in zip(samples, range(8)):
        ids = tok.encode(table.text(i))
        assert sample["ids"] == [tok.cls_id, *ids[:5], tok.sep_id]
        assert sample["cut"] == (len(ids) > 5)
    assert {s["cut"] for s in samples} == {True, False}


def test_batches_are_padded_to_a_multiple():
    texts = [[0, 5, 2], [0] + [6] * 8 + [2]]
    assert pad_texts(texts, 1, 8).shape == (2, 16) and pad_texts(texts, 1).shape == (2, 10)
    assert pad_texts(texts, 1, 8, limit=13).shape == (2, 13)
    assert pad_texts(texts, 1, 4).tolist()[0] == [0, 5, 2] + [1] * 9
    assert pad_texts(texts, 1, (4, 12, 20)).shape == (2, 12)
    assert pad_texts(texts, 1, (10, 5)).shape == (2, 10)
    assert pad_texts(texts, 1, (4, 6), limit=13).shape == (2, 13)
    assert pad_texts(texts, 1, (4, 6)).shape == (2, 10)


# -- masking ---------------------------------------------------------------------------------------

def test_masking_takes_whole_words_at_the_asked_rate():
    rng, ids = np.random.default_rng(0), [0] + list(range(10, 28)) + [2]
    # 12 words: of two tokens and of one, in turn
    starts = [True, False, True] * 6
    word = np.cumsum(starts)
    replacements = np.arange(200, 300)
    picked_share, fates = 0, {"mask": 0, "random": 0, "kept": 0}
    for _ in range(4000):
        masked, picked = mask_words(ids, starts, 0.15, 4, replacements, rng)
        words = set(word[picked - 1])
        assert len(words) in (1, 2)
        assert set(picked) == {i + 1 for i, w in enumerate(word) if w in words}
        assert masked[0] == 0 and masked[-1] == 2
        picked_share += len(words) / 12
        for i in range(len(ids)):
            if i not in picked:
                assert masked[i] == ids[i]
            else:
                fates["mask" if masked[i] == 4 else "kept" if masked[i] == ids[i]
                      else "random"] += 1
                assert masked[i] in (4, ids[i]) or masked[i] >= 200
    assert abs(picked_share / 4000 - 0.15) < 0.004
    total = sum(fates.values())
    assert abs(fates["mask"] / total - 0.8) < 0.02 and abs(fates["random"] / total - 0.1) < 0.02


def test_short_captions_lose_at_least_one_word_and_empty_ones_none():
    rng = np.random.default_rng(0)
    assert all(len(mask_words([0, 7, 8, 2], [True, True], 0.15, 4, np.array([9]), rng)[1]) == 1
               for _ in range(50))
    ids, picked = mask_words([0, 2], [], 0.15, 4, np.array([9]), rng)
    assert ids.tolist() == [0, 2] and len(picked) == 0


# -- order -----------------------------------------------------------------------------------------

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
            dealt = [
                list(GlobalBatches(LENGTHS, 96, 0).micro_batches(step, step + 1, micro, r, world))
                for r in range(world)]
            shown = sorted(k for rank in dealt for batch in rank for k in batch)
            assert shown == sorted(everything)
            assert {len(b) for rank in dealt for b in rank} == {micro}
            assert len({len(rank) for rank in dealt}) == 1


def test_processes_get_equal_work_when_each_has_several_micro_batches():
    """Padded tokens of the busiest process against those of the idlest, over a step."""
    lengths = np.sort(np.random.default_rng(0).integers(5, 50, 4096))
    # 16, 8, 4 and 2 micro-batches each
    for micro, limit in ((32, 1.02), (64, 1.02), (128, 1.05), (256, 1.2)):
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
    # no curriculum from short to long
    assert abs(np.corrcoef(means, np.arange(25))[0, 1]) < 0.5
    with pytest.raises(ValueError, match="--bucket 0"):
        GlobalBatches(LENGTHS, 20, 0, 0)


@pytest.mark.parametrize("bucket, recorded",
                         [(1, "8c78f3ee72fb11b1"), (3, "0b20444e039db56c"),
                          (50, "48b10f0870adf595")])
def test_without_groups_the_order_is_that_of_runs_before_there_were_groups(bucket, recorded):
    """Or a run that was started then would go on with other captions.

    The digests are of that code.
    """
    sampler = GlobalBatches(LENGTHS, 100, 1, bucket)
    order = np.stack([sampler.batch(step) for step in range(25)]).astype("<i8")
    assert hashlib.blake2b(order.tobytes(), digest_size=8).hexdigest() == recorded


# Captions of images: from none to nine of each.
COUNTS = np.random.default_rng(6).integers(0, 10, 230)
ROW_OF = np.repeat(np.arange(len(COUNTS)), COUNTS)[:1003]


def grouped(most, size, bucket=1, seed=0):
    return GlobalBatches(LENGTHS, size, seed, bucket, ROW_OF, most)


@pytest.mark.parametrize("most", [2, 3, 5])
def test_groups_are_of_one_image_as_few_as_can_be_and_drawn_anew_in_every_epoch(most):
    counts, partners = np.bincount(ROW_OF), []
    for epoch in range(2):
        group_of = draw_groups(LENGTHS, ROW_OF, most, np.random.default_rng(epoch))
        groups = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
        assert {len(group) for group in groups} == set(range(1, most + 1))
        assert all(len(set(ROW_OF[group])) == 1 for group in groups)
        assert len(groups) == sum(-(-count // most) for count in counts)
        partners.append({tuple(group) for group in groups if len(group) > 1})
    assert 0 < len(partners[0] & partners[1]) < 0.9 * len(partners[0])


def test_captions_of_like_length_share_a_group():
    spread = lambda group_of: np.mean([np.ptp(LENGTHS[group_of == group])
                                       for group in range(group_of.max() + 1)])
    rng = np.random.default_rng(0)
    shuffled = np.lexsort((rng.random(1003), ROW_OF))                       # within each image
    by_length = spread(draw_groups(LENGTHS, ROW_OF, 2, rng))
    by_chance = spread(draw_groups(np.arange(1003)[shuffled], ROW_OF, 2, rng))
    assert by_length < 0.5 * by_chance


@pytest.mark.parametrize("most, bucket", [(2, 1), (2, 4), (5, 1), (5, 4)])
def test_with_groups_every_epoch_shows_every_caption_once_in_batches_of_the_asked_size(
        most, bucket):
    sampler, seen = grouped(most, 100, bucket), []
    for epoch in range(2):
        keys = [key for batch in sampler.micro_batches(10 * epoch, 10 * epoch + 10, 25)
                for key in batch]
        assert all(key[0] == epoch for key in keys)
        seen.append([number for _, *group in keys for number in group])
        assert len(seen[-1]) == len(set(seen[-1])) == 1000
        assert all(len(group) <= most and len(set(ROW_OF[group])) == 1 for _, *group in keys)
        # Only ends of micro-batches, of which there are 40, cut a group in two.
        whole = len(set(sampler.group_of[seen[-1]]))
        assert whole <= len(keys) <= whole + 40
    assert seen[0] != seen[1]


def test_with_groups_the_global_batch_is_the_same_for_any_number_of_processes():
    whole = {step: sorted(grouped(3, 96).batch(step)) for step in (3, 25)}
    for world, micro in ((1, 96), (1, 24), (2, 24), (4, 24), (3, 8)):
        for step, everything in whole.items():
            dealt = [list(grouped(3, 96).micro_batches(step, step + 1, micro, rank, world))
                     for rank in range(world)]
            sizes = {sum(len(group) for _, *group in batch) for rank in dealt for batch in rank}
            assert sizes == {micro} and len({len(rank) for rank in dealt}) == 1
            assert sorted(n for rank in dealt for batch in rank for _, *group in batch
                          for n in group) == everything


@pytest.mark.parametrize("bucket", [1, 4])
def test_with_groups_resuming_at_a_step_is_never_having_stopped(bucket):
    sampler = lambda start: grouped(2, 100, bucket).micro_batches(start, 25, 50)
    assert list(sampler(0))[2 * 17:] == list(sampler(17))


def test_micro_batches_of_groups_are_sorted_by_their_longest_caption():
    for batch in zip(*[iter(grouped(2, 500).micro_batches(0, 2, 50))] * 10):
        longest = [max(LENGTHS[number] for _, *group in micro for number in group)
                   for micro in batch]
        assert longest == sorted(longest)


def test_a_global_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="only 1003 captions"):
        GlobalBatches(LENGTHS, 2000, 0)


def test_evaluation_sees_each_caption_exactly_once():
    batches = evaluation_batches(LENGTHS[::2], range(0, 1003, 2), 64)
    assert sorted(i for batch in batches for _, i in batch) == list(range(0, 1003, 2))


def test_real_captions_in_a_published_global_batch_leave_little_padding(shared):
    """At most a tenth of the tokens of the published batch is padding.

    It has 4,096 captions, in micro-batches of 64.
    """
    roberta = BPE.load(shared / "tokenizers/roberta-base/vocab.json",
                       shared / "tokenizers/roberta-base/merges.txt")
    texts = [s["raw"]
             for image in json.load(open(shared / "data/coco_small/dataset.json"))["images"]
             for s in image["sentences"]]
    tokens = np.array([len(roberta.encode(t)) + 2 for t in texts] * 4)
    sampler = GlobalBatches(tokens, 4096, 0)
    padded = sum(len(b) * tokens[[i for _, i in b]].max() for b in sampler.micro_batches(0, 1, 64))
    assert 1 - tokens[sampler.batch(0)].sum() / padded < 0.1


def test_token_lengths_count_what_the_model_will_see(tmp_path, tok):
    table = Captions([write_captions(tmp_path / "a.arrow", 9)])
    dataset = CaptionDataset(table, tok, pictures.Square(16), 50, True)
    lengths = data.token_lengths(table, tok)
    assert lengths.tolist() == [len(dataset[0, i]["ids"]) for i in range(18)]
    assert data.token_lengths(table, tok, [3, 17]).tolist() == lengths[[3, 17]].tolist()


def test_shards_that_img2dataset_left_are_found_without_being_named(tmp_path):
    for name in ("mine_00000.arrow", "mine_00001.arrow", "other_caption_val.arrow"):
        write_captions(tmp_path / name, 2)
    assert files.splits_of(tmp_path) == {"mine": ["train"], "other": ["val"]}
    found = [path.name for path in files.find_files(tmp_path, (), "train")]
    assert found == ["mine_00000.arrow", "mine_00001.arrow"]
