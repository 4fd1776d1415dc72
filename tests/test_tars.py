"""Tars are trained on as they lie: rows, order, losses and refusals are those of Arrow files."""

import errno
import io
import json
import os
import pickle
import re
import tarfile

import pyarrow as pa
import pytest
from conftest import (TRAIN, WORDS, assert_same, checked, noise_picture, picture, prepare_main, put,
                      skipped, tar, together, train_command, train_outcome)

import eval as evaluation
import train
from data import Captions
from storage import disk, tar_index, tars
from storage.files import find_files, known_datasets, splits_of
from storage.tar_index import SCHEMA, TarCaptions, table_of
from tokenizer import BPE

RETRIEVAL = ("--task", "retrieval", "--false-captions", 2)


def members(first, count):
    """Pictures with captions as img2dataset writes them: jpg, json, txt."""
    found = []
    for number in range(first, first + count):
        words = [WORDS[(number * 7 + k) % len(WORDS)] for k in range(2 + number % 7)]
        found += [(f"{number:09}.jpg", picture([0, number])),
                  (f"{number:09}.json", b'{"caption": "of the json"}'),
                  (f"{number:09}.txt", " ".join(words).encode())]
    return found


def write_index(path, rows, about):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
        out.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA), about)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tars to train and validate on, the Arrow files that prepare.py makes of them, a tokenizer."""
    root = tmp_path_factory.mktemp("tars")
    tar(root / "cc/00000.tar", members(0, 30))
    tar(root / "cc/00001.tar", members(10_000, 29))
    tar(root / "cc/val/00000.tar", members(20_000, 12))
    prepare_main("img2dataset", root / "cc", "--out", root / "arrow")
    prepare_main("img2dataset", root / "cc/val", "--out", root / "arrow")
    (root / "arrow/val_00000.arrow").rename(root / "arrow/cc_caption_val.arrow")
    BPE.train([" ".join(WORDS)] * 3, 330).save(root / "tok")
    return root


def run_flags(world, data, out, *more):
    """train.py's flags for some tars or Arrow files."""
    return train_command(world, out, *TRAIN, "--data", data, *more)


def same_rows(a, b):
    assert a.row_of.tolist() == b.row_of.tolist() and list(a.texts()) == list(b.texts())
    for row in range(len(a)):
        assert bytes(a.image(row)) == bytes(b.image(row))
        assert a.cell("image_id", row).as_py() == b.cell("image_id", row).as_py()
        assert a.place(row)[1] == b.place(row)[1]


# -- the same as Arrow files -----------------------------------------------------------------------

def test_a_tar_holds_the_rows_of_the_arrow_file_made_from_it(world):
    for split in ("train", "val"):
        tables = [table_of(find_files(world / name, (), split)) for name in ("cc", "arrow")]
        assert [type(table) for table in tables] == [TarCaptions, Captions]
        same_rows(*tables)
    copy = pickle.loads(pickle.dumps(tables[0]))                # as it travels to a worker
    assert not copy.tars and not copy.files
    same_rows(copy, tables[1])


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--workers", 2), RETRIEVAL], ids=["pretrain", "retrieval"])
def test_tars_and_arrow_files_give_the_same_losses_bit_for_bit(world, tmp_path, more):
    for name in ("cc", "arrow"):
        train.main(run_flags(world, world / name, tmp_path / name, *more))
    assert_same(train_outcome(tmp_path / "cc"), train_outcome(tmp_path / "arrow"), 0)
    files = json.loads((tmp_path / "cc/config.json").read_text())["files"]
    assert files == {"train": [str(world / "cc/00000.tar"), str(world / "cc/00001.tar")],
                     "val": [str(world / "cc/val/00000.tar")]}


@pytest.mark.slow
def test_a_run_on_a_pattern_of_tars_resumes_as_if_it_had_never_stopped(world, tmp_path):
    flags = (world / "cc/{00000..00001}.tar", tmp_path / "whole", "--dropout", 0.1)
    train.main(run_flags(world, *flags, "--keep", 4))
    put(tmp_path / "part/last.pt", (tmp_path / "whole/step_4.pt").read_bytes())
    train.main(run_flags(world, *flags, "--out", tmp_path / "part", "--resume"))
    losses, whole = train_outcome(tmp_path / "whole")
    after, part = train_outcome(tmp_path / "part")
    assert losses[-3:] == after
    assert all((whole[name] == part[name]).all() for name in whole)


def test_a_resumed_run_refuses_tars_with_other_rows(world, tmp_path):
    for name in ("00000.tar", "00001.tar"):
        put(tmp_path / "cc" / name, (world / "cc" / name).read_bytes())
    flags = run_flags(world, tmp_path / "cc", tmp_path / "run", "--eval-every", 0)
    train.main(flags)
    tar(tmp_path / "cc/00001.tar", members(10_000, 31))
    with pytest.raises(SystemExit, match=r"other data than the run's.*'00001.tar', 31\]"):
        train.main([*flags, "--resume"])


@pytest.mark.slow
def test_two_processes_write_the_indexes_together(world, tmp_path):
    for number in range(5):
        tar(tmp_path / f"cc/{number}.tar", members(100 * number, 5))
    together(2, run_flags(world, tmp_path / "cc", tmp_path / "run", "--steps", 2))
    found = sorted(path.name for path in tmp_path.glob("cc/*.index"))
    assert found == [f"{number}.tar.index" for number in range(5)]


@pytest.mark.slow
def test_eval_check_and_stats_open_tars(world, tmp_path, capsys):
    train.main(run_flags(world, world / "cc", tmp_path / "run", *RETRIEVAL, "--steps", 1))
    ask = ["retrieval", str(tmp_path / "run/last.pt"), "--device", "cpu"]
    scores = []
    for name in ("cc", "arrow"):
        evaluation.main([*ask, "--data", str(world / name), "--datasets", "cc", "--split", "val",
                         "--out", str(tmp_path / name)])
        scores.append(next((tmp_path / name).glob("*_scores.json")).read_text())
    assert scores[0] == scores[1]
    with pytest.raises(SystemExit, match="no caption files of split 'test': cc has train, val"):
        evaluation.main([*ask, "--data", str(world / "cc")])
    capsys.readouterr()
    status, printed = checked(capsys, world / "cc", "--workers", "1")
    assert status == 0 and printed.count("good") == 3 and "30 images, 30 captions" in printed
    prepare_main("stats", world / "cc", "--workers", "1", "--out", tmp_path / "sheet.png")
    assert capsys.readouterr().out.count(" images, ") == 3
    assert (tmp_path / "sheet.png").stat().st_size > 1000


# -- where they lie --------------------------------------------------------------------------------

def test_tars_are_found_by_patterns_and_in_folders(tmp_path):
    trained = ["cc/train/08.tar", "cc/train/09.tar", "cc/train/10.tar"]
    others = ["cc/val/0.tar", "sbu/a.tar", "sbu/b.tar", "sbu/test/c.tar", "other/x.txt"]
    for name in (*trained, *others):
        put(tmp_path / name, b"")

    def names(data, split, *datasets):
        found = find_files(tmp_path / data, datasets, split)
        return [str(path.relative_to(tmp_path)) for path in found]

    for data in ("cc", "cc/train", "cc/train/{08..10}.tar", "cc/train/*.tar",
                 "cc/{train/{08,09},train/1?}.tar"):
        assert names(data, "train") == trained, data
    assert names("cc", "val") == names("cc/train/{08..09}.tar", "val") == ["cc/val/0.tar"]
    assert names("sbu/a.tar", "train") == ["sbu/a.tar"] and names("sbu", "val") == []
    assert names("sbu/a.tar", "test") == ["sbu/test/c.tar"]
    assert splits_of(tmp_path) == {"cc": ["train", "val"], "sbu": ["train", "test"]}
    assert known_datasets(tmp_path / "cc") == ["cc"]
    assert names(".", "train") == [*trained, "sbu/a.tar", "sbu/b.tar"]
    assert names(".", "train", "sbu") == ["sbu/a.tar", "sbu/b.tar"]
    # As prepare.py may write it there: nothing is trained on twice.
    put(tmp_path / "sbu/sbu_0.arrow", b"")
    assert names("sbu", "train") == ["sbu/sbu_0.arrow"]


@pytest.mark.parametrize("data, sentence", [
    ("{0..3}.tar", r"2\.tar: there is no such file \(2 of 4 are missing\)"),
    ("9.tar", r"9\.tar: there is no such file"), ("*x.tar", "there is no such file"),
    ("{0..9999999}.tar", "more than 1,000 files"),
    ("{0..99}{0..99}.tar", "more than 1,000 files"),
    ("{0..99999999999999999999}.tar", "more than 1,000 files"),
    ("{1}.tar", "first..last"), ("{3..1}.tar", "larger than the last"),
    ("none", "there is no such directory")])
def test_a_pattern_that_names_nothing_is_refused_in_a_sentence(
        tmp_path, monkeypatch, data, sentence):
    monkeypatch.setattr(tars, "MOST_NAMES", 1000)
    for name in "01":
        put(tmp_path / f"{name}.tar", b"")
    with pytest.raises((OSError, ValueError), match=sentence):
        find_files(tmp_path / data, (), "train")
    with pytest.raises(FileNotFoundError, match="no tars of dataset 'sbu'"):
        find_files(tmp_path, ["sbu"], "train")


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_tasks_without_captions_refuse_tars_in_a_sentence(world, tmp_path, task):
    sentence = f"cc: .tar files hold captions, .*; {task} needs Arrow files"
    with pytest.raises(SystemExit, match=sentence):
        train.main(run_flags(world, world / "cc", tmp_path / "run", "--task", task))


# -- indexes ---------------------------------------------------------------------------------------

def test_an_index_is_written_once_and_again_when_the_tar_has_changed(tmp_path):
    path, index = tmp_path / "0.tar", tmp_path / "0.tar.index"
    tar(path, members(0, 4))
    table = TarCaptions([path])
    first = index.stat().st_ino
    assert len(table) == len(TarCaptions([path])) == 4 and index.stat().st_ino == first
    tar(path, members(0, 7))
    with pytest.raises(ValueError, match="0.tar: has changed since it was indexed"):
        table.image(0)
    again = TarCaptions([path])
    assert len(again) == 7 and bytes(again.image(6)) == picture([0, 6])
    with pytest.raises(ValueError, match="0.tar.index: has changed since it was opened"):
        pickle.loads(pickle.dumps(table)).text(0)
    index.write_bytes(index.read_bytes()[:-20])                 # no whole file
    assert len(TarCaptions([path])) == 7


def test_two_runs_that_index_together_do_not_disturb_each_other(tmp_path):
    tar(tmp_path / "0.tar", members(0, 4))
    table = TarCaptions([tmp_path / "0.tar"])
    (tmp_path / "0.tar.index").unlink()
    TarCaptions([tmp_path / "0.tar"])
    assert pickle.loads(pickle.dumps(table)).text(3) == table.text(3)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_indexes_of_a_read_only_folder_lie_in_the_cache(tmp_path, monkeypatch, capsys, number):
    real = disk.complete_file

    def read_only(path):
        if path.parent == tmp_path / "a":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    tar(tmp_path / "a/0.tar", members(0, 3))
    tar(tmp_path / "b/0.tar", members(0, 4))
    monkeypatch.setattr(tar_index, "complete_file", read_only)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(table_of([tmp_path / "a/0.tar", tmp_path / "b/0.tar"])) == 7
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'a'}: cannot be written to, so the indexes of its tars "
                              f"are in {tmp_path / 'cache/flm'}")
    assert not list(tmp_path.glob("a/*.index")) and list(tmp_path.glob("b/*.index"))
    assert len(table_of([tmp_path / "a/0.tar"])) == 3 and not capsys.readouterr().out


def test_indexes_and_tars_share_the_files_that_may_be_open(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.tar" for i in range(9)]
    for i, path in enumerate(paths):
        tar(path, members(i, 1))
    monkeypatch.setattr(tar_index, "most_open_files", lambda: 4)
    table = TarCaptions(paths)
    for row in (*range(9), *range(9)):
        assert bytes(table.image(row)) == picture([0, row])
        assert len(table.files) <= 2 and len(table.tars) <= 2


@pytest.mark.parametrize("image, sentence", [
    ([0], r"0.tar.index row 1: image is not \[offset, size\]"), ([-1, 5], "outside of the tar"),
    ([5, -1], "outside of the tar"), ([2 ** 62, 2 ** 62], "outside of the tar"),
    ([10, 2 ** 40], "outside of the tar"), ([None, 5], "null in image")])
def test_an_index_that_leads_out_of_its_tar_is_refused(tmp_path, image, sentence):
    path, index = tmp_path / "0.tar", tmp_path / "0.tar.index"
    tar(path, members(0, 3))
    TarCaptions([path])
    batch, about = pa.ipc.open_file(index.read_bytes()).get_batch_with_custom_metadata(0)
    rows = batch.to_pylist()
    rows[1]["image"] = image
    write_index(index, rows, about)
    with pytest.raises(ValueError, match=sentence):
        TarCaptions([path])


@pytest.mark.parametrize("about", [
    b"", b"{", b"[]", b'{"format": 1}', b"[" * 100_000,
    b'{"format": 1, "size": 1, "mtime_ns": 1, "left_out": 3}'])
def test_an_index_that_says_nothing_of_its_tar_is_written_again(tmp_path, about):
    tar(tmp_path / "0.tar", members(0, 3))
    write_index(tmp_path / "0.tar.index", [], {"about": about})
    assert len(TarCaptions([tmp_path / "0.tar"])) == 3


# -- damage ----------------------------------------------------------------------------------------

def test_what_cannot_be_used_is_counted_and_named_as_prepare_does_it(tmp_path, capsys):
    path, log = tmp_path / "cc/0.tar", tmp_path / "cc/0.tar.skipped.jsonl"
    tar(path, [
        ("0.jpg", noise_picture(0)), ("0.txt", b"kept"),
        ("1.jpg", noise_picture(1)), ("1.json", b'{"captions": ["two", "", " of them"]}'),
        ("2.jpg", b"no picture"), ("2.txt", b"x"),
        ("3.jpg", noise_picture(3)),
        ("4.txt", b"the download failed"),
        ("5.jpg", noise_picture(5)), ("5.txt", b" \n"),
        ("0.jpg", noise_picture(6)), ("0.txt", b"the key comes again"),
        ("7.jpg", b""), ("7.txt", b"empty"),
        ("8.jpg", noise_picture(8)), ("8.txt", b"\xff\xfe"),
        ("c/9.x.JPG", b"z"), ("c/9.webp", noise_picture(9, format="WEBP")),
        ("c/9.txt", "é".encode())])
    prepare_main("img2dataset", tmp_path / "cc", "--out", tmp_path / "arrow")
    capsys.readouterr()
    table = table_of([path])
    same_rows(table, Captions([tmp_path / "arrow/cc_0.arrow"]))
    assert skipped(log) == skipped(tmp_path / "arrow/cc_0.skipped.jsonl")
    assert list(skipped(log)) == ["1", "2", "3", "4", "5", "0", "7", "8"]
    printed = capsys.readouterr().out
    assert printed.startswith("left out of 1 tars: ") and "2 undecodable" in printed
    assert f"(each is named in {log})" in printed
    table_of([path])                                            # the next run says so too
    assert capsys.readouterr().out == printed


def test_a_picture_that_breaks_off_inside_is_named_when_it_is_decoded(world, tmp_path, capsys):
    some = members(0, 20)
    some[9] = (some[9][0], picture(3, (400, 300))[:-3000])
    tar(tmp_path / "cc/0.tar", some)
    train.main(run_flags(world, tmp_path / "cc", tmp_path / "run", "--max-unreadable", 1))
    named = (tmp_path / "run/unreadable_0.txt").read_text()
    assert named.startswith(f"{tmp_path / 'cc/0.tar'} 000000003: ")
    capsys.readouterr()
    status, printed = checked(capsys, tmp_path / "cc/0.tar", "--workers", "1")
    assert status == 1 and "WRONG: 1 pictures that cannot be read" in printed


def test_a_tar_that_breaks_off_gives_what_it_has_and_says_so(tmp_path, capsys):
    path = tmp_path / "0.tar"
    tar(path, members(0, 6))
    whole = path.read_bytes()
    fifth = [match.start() for match in re.finditer(rb"\d{9}\.jpg", whole)][4]
    bad_header = whole[:fifth] + bytes([1]) * 512 + whole[fifth + 512:]
    for data in (whole[:fifth + 700], whole[:fifth + 200], whole[:fifth], bad_header, whole):
        path.write_bytes(data)
        table = table_of([path])
        printed = capsys.readouterr().out
        assert len(table) == (6 if data == whole else 4)
        assert all(bytes(table.image(row)) == picture([0, row]) for row in range(len(table)))
        if data == whole:
            assert not printed
        else:
            assert str(path) in printed and printed.endswith("; what comes before is used\n")
    path.write_bytes(whole[:fifth])
    status, printed = checked(capsys, path, "--workers", "1")
    assert status == 1 and f"WRONG: {path} is " in printed
    for data in (b"", whole[:300], b"x" * 5000, bytes(10240)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="0.tar: no captions in it"):
            table_of([path])


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a/../../x.jpg"])
def test_a_name_that_leads_out_of_the_tar_is_refused(tmp_path, name):
    tar(tmp_path / "0.tar", [(name, noise_picture()), ("x.txt", b"x")])
    with pytest.raises(ValueError, match="0.tar: the path .* leaves the folder"):
        TarCaptions([tmp_path / "0.tar"])
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_links_devices_and_odd_names_are_no_rows(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as file:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE),
                           ("c.jpg", tarfile.FIFOTYPE), ("d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        for key in ("e\udcff", "f"):
            for end, data in (("jpg", noise_picture()), ("txt", b"x")):
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    put(tmp_path / "0.tar", whole.getvalue())
    table = TarCaptions([tmp_path / "0.tar"])
    assert [table.cell("image_id", row).as_py() for row in range(len(table))] == ["f"]
    assert skipped(tmp_path / "0.tar.skipped.jsonl")["e\udcff"] == "image_id is not Unicode"


def test_a_tar_that_is_written_to_meanwhile_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    tar(path, members(0, 3))
    real = tars.Tar.samples

    def growing(self):
        yield from real(self)
        with open(path, "ab") as file:
            file.write(bytes(512))

    monkeypatch.setattr(tars.Tar, "samples", growing)
    with pytest.raises(ValueError, match="0.tar: changes while it is read"):
        TarCaptions([path])
