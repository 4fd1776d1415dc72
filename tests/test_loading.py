"""How batches come to the loop: JPEGs decoded on the device, ahead of the steps; and workers.

The device is the CPU here. What a GPU makes of a JPEG is a row of `python -m tools.bench gpu`.
"""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import (TRAIN, TRAIN_VILT, finetune, noise_picture, picture, train_command,
                      train_outcome, write_caption_world, write_captions, write_world)

import pictures
import train
from pictures import Square, Undecoded, Whole, decode, keep_jpeg, open_image, pad_pictures
from storage.files import CAPTIONS
from sources.shards import Writer
from training import loading
from training.flops import Work
from training.loading import batches_of, decoded_ahead, workers_needed
from training.machine import Machine, find_device
from training.runs import open_run

CPU = torch.device("cpu")
SHAPES = [Square(24), Whole(48, 16)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def all_tasks(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("tasks"))


def run_on(world, out, *more, **how):
    settings, flags = train.parse(train_command(world, out, *TRAIN, *more, **how))
    return open_run(settings, flags, Machine(0, 1, CPU, "fp32"))


def difference(some, others):
    return (some.int() - others.int()).abs().max().item()


# -- The door --------------------------------------------------------------------------------------

def turned(way):
    exif = Image.Exif()
    exif[0x0112] = way
    return noise_picture(1, exif=exif, quality=95)


def rgb_inside():
    """A JPEG whose numbers are red, green and blue, as Adobe's mark says."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(noise_picture(2))).convert("RGB")
    image.save(out, "JPEG", keep_rgb=True, quality=95)
    return out.getvalue()


LEFT_TO_PILLOW = {
    "png": noise_picture(0, format="PNG"), "cmyk": noise_picture(0, mode="CMYK"),
    "turned": turned(6), "red, green, blue": rgb_inside(),
    "more after its end": noise_picture(3) + b"\0\0"}


@pytest.mark.parametrize("what", LEFT_TO_PILLOW)
def test_what_decoders_differ_about_is_left_to_pillow(what):
    assert keep_jpeg(LEFT_TO_PILLOW[what], Square(24), "x") is None


@pytest.mark.parametrize("encoded", [noise_picture(4), noise_picture(4, mode="L"), turned(1),
                                     noise_picture(4, progressive=True)],
                         ids=["colours", "grey", "upright", "progressive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_device_decodes_and_resizes_as_pillow_does(encoded, shape):
    jpeg = keep_jpeg(encoded, shape, "x")
    exact = decode(encoded, shape)
    assert jpeg.shape == exact.shape
    found, unreadable = Undecoded([jpeg]).decoded(CPU)
    assert not unreadable and difference(found[0], exact) <= 1


def test_a_picture_too_large_for_the_device_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr("pictures.MOST_PIXELS", 40 * 30)
    assert keep_jpeg(noise_picture(0, size=(40, 30)), Square(24), "x")
    assert keep_jpeg(noise_picture(0, size=(41, 30)), Square(24), "x") is None


def test_a_torn_file_and_no_picture_at_all_are_named_as_ever(tmp_path):
    path = tmp_path / "a.arrow"
    whole = noise_picture(5, size=(64, 64))
    with Writer(path, CAPTIONS) as out:
        for image in (whole, whole[:len(whole) // 2], b"no picture", whole):
            out.write({"image": image, "caption": ["a dog"], "image_id": "", "split": "train"})
    run = run_on(write_caption_world(tmp_path / "world"), tmp_path / "out")
    dataset = run.task.dataset(run.task.TABLE([path]), train=True)
    found = []
    for keeps in (False, True):
        dataset.keeps_jpegs = keeps
        sample = dataset[0, 1]
        found.append((sample["row"], sample["unreadable"]))
    assert found[0] == found[1] and found[0][0] == 3
    assert [line.split(": ")[0] for line in found[1][1]] == [f"{path} row 1", f"{path} row 2"]


# -- Decoding --------------------------------------------------------------------------------------

def test_a_batch_of_all_kinds_becomes_what_pillow_makes_of_it():
    encoded = [*LEFT_TO_PILLOW.values(), *(picture(seed, size) for seed in range(5)
                                           for size in ((40, 32), (30, 50)))]
    for shape in SHAPES:
        kept = [keep_jpeg(one, shape, "x") or decode(one, shape) for one in encoded]
        found, unreadable = Undecoded(kept).decoded(CPU)
        exact = pad_pictures([decode(one, shape) for one in encoded])
        assert not unreadable and found.shape == exact.shape and difference(found, exact) <= 1


def test_real_photographs_become_what_pillow_makes_of_them(shared):
    encoded = [path.read_bytes() for path in sorted((shared / "data/coco_small").rglob("*.jpg"))]
    assert len(encoded) >= 8
    for shape in (Square(224), Whole(384, 32)):
        kept = [keep_jpeg(one, shape, "x") for one in encoded[:12]]
        found, _ = Undecoded([jpeg for jpeg in kept if jpeg]).decoded(CPU)
        exact = pad_pictures([decode(one, shape) for one, jpeg in zip(encoded, kept) if jpeg])
        assert len(found) and difference(found, exact) <= 2


def test_many_pictures_are_decoded_some_at_a_time(monkeypatch):
    monkeypatch.setattr("pictures.TOGETHER", 3)
    asked = []
    decode_jpeg = __import__("torchvision").io.decode_jpeg
    monkeypatch.setattr("torchvision.io.decode_jpeg",
                        lambda some, *how: asked.append(len(some)) or decode_jpeg(some, *how))
    encoded = [picture(seed) for seed in range(8)]
    found, _ = Undecoded([keep_jpeg(one, Square(24), "x") for one in encoded]).decoded(CPU)
    assert asked == [3, 3, 2]
    assert difference(found, torch.stack([decode(one, Square(24)) for one in encoded])) <= 1


def looks_whole():
    """A JPEG whose end is there, and whose tables are not."""
    whole = picture(6)
    tables = whole.index(b"\xff\xdb")
    return whole[:tables] + b"\xff\xfe" + whole[tables + 2:]        # a comment in their place


def test_a_file_that_only_looks_whole_is_black_and_named_and_spoils_no_other():
    files = [picture(1), looks_whole(), picture(2)]
    with pytest.raises(Exception):
        open_image(files[1])
    jpegs = [keep_jpeg(one, Square(24), f"a.arrow row {row}") for row, one in enumerate(files)]
    assert all(jpegs)
    found, unreadable = Undecoded(jpegs).decoded(CPU)
    assert [line.split(": ")[0] for line in unreadable] == ["a.arrow row 1"]
    assert not found[1].any()
    for row in (0, 2):
        assert difference(found[row], decode(files[row], Square(24))) <= 1


def test_what_torchvision_refuses_pillow_decodes(monkeypatch):
    refuse = lambda *_: (_ for _ in ()).throw(RuntimeError("not this one"))
    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    encoded = picture(7)
    found, unreadable = Undecoded([keep_jpeg(encoded, Square(24), "x")]).decoded(CPU)
    assert not unreadable and difference(found[0], decode(encoded, Square(24))) <= 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"),
                                   RuntimeError("CUDA error: an illegal memory access")])
def test_a_device_that_fails_is_no_unreadable_picture(monkeypatch, error):
    fail = lambda *_: (_ for _ in ()).throw(error)
    monkeypatch.setattr("torchvision.io.decode_jpeg", fail)
    with pytest.raises(type(error), match=str(error)):
        Undecoded([keep_jpeg(picture(7), Square(24), "x")]).decoded(CPU)


def test_a_device_that_decodes_nothing_is_told_of_before_the_run(world, tmp_path, monkeypatch):
    """Else Pillow would decode everything, in a single thread, and nobody would know."""
    refuse = lambda *_: (_ for _ in ()).throw(RuntimeError("not compiled with nvJPEG"))
    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    with pytest.raises(SystemExit, match="torchvision cannot decode JPEGs on cpu .not compiled"):
        train.main(train_command(world, tmp_path / "out", *TRAIN, "--decode-on-device"))


def test_a_gpu_is_done_with_its_memory_before_torchvision_decodes_into_it(monkeypatch):
    """pytorch/vision#9606: pictures would be overwritten while they are resized."""
    done = []
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr("torchvision.io.decode_jpeg", lambda *_: done.append("decoded") or [])
    pictures.decode_together([], torch.device("cuda"))
    assert done == ["waited", "decoded"]


# -- Ahead of the steps ----------------------------------------------------------------------------

def numbered(count, taken):
    for number in range(count):
        taken.append(number)
        yield {"number": number}, {"unreadable": []}


def test_batches_are_decoded_so_many_ahead_in_another_thread_and_in_order():
    taken, threads = [], []

    def batches():
        for one in numbered(9, taken):
            threads.append(threading.current_thread())
            yield one

    found = decoded_ahead(batches(), CPU, 3)
    assert next(found)[0]["number"] == 0
    deadline = threading.Event()
    for _ in range(200):
        if len(taken) == 4:
            break
        deadline.wait(0.01)
    deadline.wait(0.05)
    assert taken == [0, 1, 2, 3]            # the one that was given, and three more
    assert [batch["number"] for batch, _ in found] == list(range(1, 9))
    assert threading.main_thread() not in threads


def test_an_error_of_a_loading_process_reaches_the_loop():
    def batches():
        yield {}, {"unreadable": []}
        raise ValueError("100 images in a row cannot be decoded")

    found = decoded_ahead(batches(), CPU, 2)
    next(found)
    with pytest.raises(ValueError, match="100 images"):
        next(found)


def test_a_loop_that_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    found = decoded_ahead(numbered(100, []), CPU, 4)
    next(found)
    assert threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, TRAIN_VILT], ids=["flm", "vilt"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_wherever_they_are_decoded(world, tmp_path, sizes, workers):
    how, found = {"sizes": sizes} if sizes else {}, []
    for more in ((), ("--decode-on-device",)):
        run = run_on(world, tmp_path / "run", "--workers", workers, "--captions-per-image", 2,
                     *more, **how)
        found.append([batch for batch, _ in batches_of(run, 0)])
    assert len(found[0]) == len(found[1]) == 6
    for plain, ours in zip(*found, strict=True):
        assert plain.keys() == ours.keys()
        for name, tensor in plain.items():
            if name == "image":     # libjpeg decodes the other's at a half, where that suffices
                assert ours[name].dtype == torch.uint8 and ours[name].shape == tensor.shape
                assert (ours[name].float() - tensor.float()).abs().mean() < 2
            else:
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_decoded_on_the_device_learns_the_same(world, tmp_path):
    losses = []
    for name, more in (("plain", ()), ("device", ("--decode-on-device",))):
        train.main(train_command(world, tmp_path / name, *TRAIN, *more))
        losses.append([line["loss"] for line in train_outcome(tmp_path / name)[0]
                       if "loss" in line])
    assert losses[0] and losses[1] == pytest.approx(losses[0], abs=0.02)


def test_a_run_that_goes_on_gets_the_batches_that_were_left(world, tmp_path):
    run = run_on(world, tmp_path / "run", "--decode-on-device")
    whole, rest = ([batch["image"] for batch, _ in batches_of(run, step)] for step in (0, 4))
    assert len(rest) == 2 and all(map(torch.equal, rest, whole[4:]))


@pytest.mark.slow
def test_a_file_that_only_looks_whole_is_counted_and_named_by_the_run(world, tmp_path):
    for split in ("train", "val"):
        write_captions(tmp_path / f"mine_caption_{split}.arrow", 20)
    with Writer(tmp_path / "torn_caption_train.arrow", CAPTIONS) as out:
        out.write({"image": looks_whole(), "caption": ["a dog"] * 4, "image_id": "", "split": ""})
    (tmp_path / "tok").symlink_to(world / "tok")
    train.main(train_command(tmp_path, tmp_path / "out", *TRAIN, "--decode-on-device",
                             "--max-unreadable", 1))
    lines, _ = train_outcome(tmp_path / "out")
    named = (tmp_path / "out/unreadable_0.txt").read_text().splitlines()
    assert lines and named
    assert all("torn_caption_train.arrow row 0: " in line for line in named)


@pytest.mark.slow
def test_both_pictures_of_a_statement_are_decoded_on_the_device(all_tasks, tmp_path):
    for kind in ("flm", "vilt"):
        assert finetune(all_tasks, "nlvr2", kind, tmp_path / kind, "--decode-on-device").exists()


def test_augmented_pictures_are_not_decoded_on_the_device(world, tmp_path, capsys):
    with pytest.raises(SystemExit, match="--decode-on-device does not go with --augment"):
        train.main(train_command(world, tmp_path / "out", *TRAIN, "--decode-on-device",
                                 "--augment"))


# -- Workers ---------------------------------------------------------------------------------------

class Watched:
    """A machine with a GPU, as far as loading asks."""
    data_rank, data_world, device = 0, 1, torch.device("cuda")

    def __init__(self):
        self.said = []

    def say(self, *words):
        self.said.append(" ".join(words))

    def largest(self, number):
        return number


def asking(workers=-1, lengths=(10, 14)):
    return SimpleNamespace(settings=SimpleNamespace(workers=workers), machine=Watched(),
                           sampler=SimpleNamespace(lengths=np.array(lengths)))


@pytest.mark.parametrize("milliseconds, cores, expected", [
    (3.0, 64, 18), (3.0, 12, 12), (0.5, 64, 3), (0.001, 64, 1)])
def test_there_are_as_many_workers_as_the_device_needs_and_the_cores_allow(
        monkeypatch, milliseconds, cores, expected):
    monkeypatch.setattr(loading, "seconds_per_sample", lambda *_: milliseconds / 1000)
    monkeypatch.setattr(loading, "core_share", lambda: cores)
    # 0.6 of 790 TFLOP/s at 68 + 12 GFLOP a pair: 5,925 pairs a second
    work = Work(per_pair=68e9, per_token=1e9, peak=790e12, measured=True)
    run = asking()
    assert workers_needed(run, work, 0) == expected
    assert "5,925 a second" in run.machine.said[0]


def test_workers_that_were_asked_for_are_taken_without_a_measurement(monkeypatch):
    monkeypatch.setattr(loading, "seconds_per_sample", None)
    assert workers_needed(asking(workers=3), None, 0) == 3


def test_every_process_has_the_workers_of_the_first(monkeypatch):
    run = asking()
    run.machine.largest = lambda number: max(number, 7)
    assert workers_needed(run, None, 0) == 7


@pytest.mark.parametrize("more", [(), ("--decode-on-device",)])
def test_a_sample_is_timed_as_the_run_makes_it(world, tmp_path, monkeypatch, more):
    monkeypatch.setattr(loading, "SECONDS", 0.02)
    run, made = run_on(world, tmp_path / "run", *more), []
    collate = run.task.collate
    monkeypatch.setattr(run.task, "collate",
                        lambda samples: made.append(collate(samples)) or made[-1])
    seconds = loading.seconds_per_sample(run, 0)
    assert 0 < seconds < 0.02
    assert all(isinstance(batch["image"], Undecoded) == bool(more) for batch, _ in made)


def test_a_cpu_keeps_its_cores_for_the_model(world, tmp_path):
    run = run_on(world, tmp_path / "run", "--workers", -1)
    assert workers_needed(run, None, 0) == 0 and find_device("cpu", 1, 0) == CPU
