"""bench gpu: every row runs, each is kept when it is there, and what fails is a row too."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import bench, gpu, gpu_page, gpu_rows, gpu_runs, gpu_steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def different_rows():
    """Of the rows that differ in a size or in a number of workers alone, the first."""
    rows = {}
    for row in gpu_rows.table():
        told = {name: value for name, value in row.told.items()
                if name not in ("micro_batch", "workers")}
        rows.setdefault((row.function, re.sub(r"'\d+'", "", repr(told))), row)
    return rows.values()


@pytest.mark.parametrize("whole_runs", [True, False], ids=["whole runs", "steps"])
def test_every_row_runs_on_a_cpu_in_the_small_setting(tmp_path, whole_runs):
    """So that no minute on a GPU is lost to a typing error."""
    place = gpu_steps.Place(torch.device("cpu"), True, tmp_path)
    torch.compiler.set_stance("force_eager")
    try:
        for row in different_rows():
            if (row.function.__module__ == gpu_runs.__name__) != whole_runs:
                continue
            found = row.function(place, **row.told)
            assert found and all(number is None or number == number
                                 for number in found.values()), row.name
            if row.group == "step":
                assert found["pairs_per_second"] > 0 and found["tflops"] > 0
                assert found["gigabytes"] > 0
    finally:
        torch.compiler.set_stance("default")


def test_calls_are_timed_in_a_row_and_the_device_is_waited_for_now_and_then(tmp_path, monkeypatch):
    """By a clock that goes on by four milliseconds with each call."""
    waits, calls = [], []
    monkeypatch.setattr(gpu_steps.time, "perf_counter", lambda: 0.004 * len(calls))
    monkeypatch.setattr(gpu_steps.Place, "wait", lambda self: waits.append(len(calls)))
    place = gpu_steps.Place(torch.device("cpu"), False, tmp_path)
    seconds = place.seconds(lambda: calls.append(None), at_least=0.121)
    assert seconds == pytest.approx(0.004)
    # after three to warm up; after one, of which ten make a third of the time; after each ten
    assert waits == [3, 4, 14, 24, 34, 44]


@pytest.fixture
def rows(monkeypatch):
    """Three rows: a good one, one that is too large, one that is wrong."""
    def too_large(place):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(place):
        raise ValueError("two\nlines")

    made = [gpu_rows.Row("good", "a good one", 1, lambda place: {"pairs_per_second": 7.0}),
            gpu_rows.Row("large", "a large one", 1, too_large),
            gpu_rows.Row("wrong", "a wrong one", 1, wrong)]
    monkeypatch.setattr(gpu_rows, "table", lambda: made)
    return made


class Sender(list):
    send = list.append


def test_what_fails_is_a_row_and_the_next_one_goes_on(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "setsid", lambda: None)
    sent = Sender()
    gpu.work(["large", "wrong", "good"], "cpu", False, str(tmp_path), sent)
    found = {name: result for kind, name, result in sent if kind == "done"}
    assert found["large"]["failed"] == "out of memory"
    assert found["wrong"]["failed"] == "ValueError: two lines"
    assert found["good"]["pairs_per_second"] == 7.0


def test_a_process_is_left_after_a_profile_and_after_an_error_of_cuda(rows, tmp_path, monkeypatch):
    """The one can make what follows slower, the other makes it fail."""
    def broken(place):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    rows += [gpu_rows.Row("profile", "", 1, lambda place: {"kernels": 7}, {}, "launches"),
             gpu_rows.Row("broken", "", 1, broken)]
    monkeypatch.setattr(os, "setsid", lambda: None)
    for name in ("profile", "broken"):
        sent = Sender()
        gpu.work(["good", name, "large"], "cpu", False, str(tmp_path), sent)
        assert [row for kind, row, _ in sent if kind == "done"] == ["good", name]


class Leaving:
    """A worker that measures one row, and then dies."""

    def __init__(self, names, args, device):
        self.messages = [("done", names[0], {"took": 1.0}), ("begins", names[0], None)]
        self.process = SimpleNamespace(exitcode=-6)

    def next_message(self, seconds):
        return self.messages.pop() if self.messages else None

    def stop(self):
        pass


def test_a_process_that_dies_after_its_row_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Worker", Leaving)
    rows, found = [gpu_rows.Row(name, "", 1, None) for name in "ab"], {"rows": {}}
    gpu.measure(SimpleNamespace(out=tmp_path / "x.json"), "cpu", found, rows, float("inf"))
    assert list(found["rows"]) == ["a", "b"]


def test_a_row_that_does_not_fit_leaves_the_time_to_shorter_ones(tmp_path, monkeypatch):
    """The first row takes its time: then the long one fits no more, and the short one does."""
    now = [0.0]

    class Slow(Leaving):
        def __init__(self, names, *more):
            self.messages = [message for name in reversed(names)
                             for message in (("done", name, {"took": 1.0}),
                                             ("begins", name, None))]

        def next_message(self, seconds):
            message = self.messages.pop()
            now[0] += 30 if message == ("done", "first", {"took": 1.0}) else 0
            return message

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "Worker", Slow)
    rows = [gpu_rows.Row(name, "", seconds, None)
            for name, seconds in (("first", 5), ("long", 60), ("short", 5))]
    found = {"rows": {}}
    gpu.measure(SimpleNamespace(out=tmp_path / "x.json"), "cpu", found, rows, 80.0)
    assert list(found["rows"]) == ["first", "short"]


def run(tmp_path, *more):
    bench.main(["gpu", "--small", "--device", "cpu", "--out", str(tmp_path / "gpu.json"),
                "--scratch", str(tmp_path / "s"), *more])
    return json.loads((tmp_path / "gpu.json").read_text())["rows"]


def test_a_second_call_goes_on_with_what_is_missing(tmp_path):
    first = run(tmp_path, "--rows", "copy")
    both = run(tmp_path, "--rows", "copy", "peak fp32")
    assert list(first) == ["copy"] and set(both) == {"copy", "peak fp32"}
    assert both["copy"] == first["copy"]
    assert both["peak fp32"]["peak_tflops"] > 0


def test_no_row_begins_that_cannot_end_in_time(tmp_path):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        run(tmp_path, "--rows", "toy", "--minutes", "0.2")
    assert time.monotonic() - began < 10


class Crashing:
    """A worker that begins a row and dies, then one that hangs in the next."""
    started = []

    def __init__(self, names, args, device):
        self.started.append(names)
        self.messages = [("begins", names[0], None)]
        self.process = SimpleNamespace(exitcode=-11)

    def next_message(self, seconds):
        if self.messages:
            return self.messages.pop()
        if len(self.started) > 1:
            raise TimeoutError
        return None

    def stop(self):
        pass


def test_a_row_that_crashes_and_one_that_hangs_are_written_down(tmp_path, monkeypatch):
    Crashing.started = []
    monkeypatch.setattr(gpu, "Worker", Crashing)
    rows = [gpu_rows.Row("crashes", "", 1, None), gpu_rows.Row("hangs", "", 1, None)]
    found = {"rows": {}}
    gpu.measure(SimpleNamespace(out=tmp_path / "x.json"), "cpu", found, rows, float("inf"))
    assert found["rows"] == {"crashes": {"failed": "the process ended with -11"},
                             "hangs": {"failed": "stopped after 64 s"}}
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert Crashing.started == [["crashes", "hangs"], ["hangs"]]


def test_a_command_that_is_ended_ends_its_worker(tmp_path):
    arguments = ["--small", "--device", "cpu", "--rows", "toy", "--out", str(tmp_path / "gpu.json"),
                 "--scratch", str(tmp_path / "s")]
    process = subprocess.Popen([sys.executable, "-m", "tools.bench", "gpu", *arguments], cwd=ROOT)
    scratch = tmp_path / "s"            # the worker makes it before its first row
    try:
        wait_until(scratch.exists)
        process.terminate()
        assert process.wait(20) == 143
        wait_until(lambda: not any(str(scratch) in line for line in command_lines()))
    finally:
        process.kill()


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def command_lines():
    """Of all processes; a row's own runs are told the scratch folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace")
        except OSError:                 # it has ended
            pass


def test_results_of_another_card_are_not_mixed(tmp_path):
    run(tmp_path, "--rows", "copy")
    path = tmp_path / "gpu.json"
    path.write_text(path.read_text().replace('"card": "cpu', '"card": "another cpu'))
    with pytest.raises(SystemExit, match="measured with card another cpu.*choose another --out"):
        run(tmp_path, "--rows", "copy")


MEASURED = {"card": "NVIDIA H100 80GB HBM3", "small": False, "torch": "2.11.0", "python": "3.12",
            "gigabytes": 79.6, "cores": 16,
            "cuda": "13.0", "cudnn": 91000,
            "rows": {"peak bf16": {"peak_tflops": 800.0, "took": 3.0},
                     "step 256": {"pairs_per_second": 4000.0, "tflops": 320.0, "gigabytes": 30.0,
                                  "took": 9.0},
                     "step 1024": {"failed": "out of memory", "took": 2.0}}}


def test_a_page_says_card_numbers_failures_and_what_was_not_reached(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(MEASURED))
    gpu_page.main([str(tmp_path / "gpu.json"), "--out", str(tmp_path / "docs")])
    page = (tmp_path / "docs/GPU.md").read_text()
    assert "NVIDIA H100 80GB HBM3, 80 GB" in page and "torch 2.11.0, CUDA 13.0" in page
    assert ("| base-b32 at 256 | 4,000 pairs/s; 320 TFLOP/s on real tokens; "
            "40.0 % of the measured peak; 30 GB at the peak |") in page
    assert "| base-b32 at 1024 | out of memory |" in page
    assert "copy within the memory" in page.split("## Not reached")[1]
    assert (tmp_path / "docs/gpu.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("change", [{"small": True}, {"cuda": None}])
def test_a_cpu_is_not_dressed_as_a_gpu(change, tmp_path):
    found = {key: value for key, value in (MEASURED | change).items() if value is not None}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="a page of a GPU needs a GPU"):
        gpu_page.main([str(tmp_path / "gpu.json"), "--out", str(tmp_path / "docs")])


def test_a_machine_that_lacks_a_library_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "not_there"))
    with pytest.raises(SystemExit, match="lacks not_there: carry their wheels"):
        run(tmp_path)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_slurm_script_is_sound():
    done = subprocess.run(["shellcheck", str(ROOT / "docs/train.slurm")], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
