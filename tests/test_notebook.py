"""The tour: it runs from top to bottom, and what is committed is what such a run left."""

import json
import re
import sys

import pytest

from tools import notebook
from conftest import ROOT, trained_toy

TOUR = ROOT / "docs" / "tour.ipynb"


def cells(kind):
    return [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == kind]


def test_the_committed_tour_was_run_once_from_top_to_bottom():
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"
                or output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    # captions, masks, gradients, one caption, heat maps, training
    assert len(pictures) >= 6


def test_the_committed_tour_is_small_and_shows_no_folder_of_the_machine_that_ran_it():
    assert TOUR.stat().st_size < 1_000_000
    assert not re.search(r"/(tmp|home|root|work|Users)/", TOUR.read_text(encoding="utf-8"))


def test_every_code_cell_is_python():
    for cell in cells("code"):
        compile("".join(cell["source"]), "tour.ipynb", "exec")


def write(path, *sources):
    cell = dict(cell_type="code", execution_count=None, metadata={}, outputs=[])
    contents = {"cells": [cell | {"id": f"c{k}", "source": source}
                          for k, source in enumerate(sources)],
                "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
                "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(contents))
    return path


@pytest.fixture
def client():
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[notebook]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[notebook]'")


@pytest.mark.slow
def test_outputs_are_written_and_a_cell_that_fails_is_named(client, tmp_path):
    path = write(tmp_path / "x.ipynb", "print(6 * 7)", "x = 1")
    notebook.main([str(path)])
    code = json.loads(path.read_text())["cells"]
    assert code[0]["outputs"][0]["text"] == ["42\n"] and code[1]["execution_count"] == 2
    before = write(path, "print(1)", "1 / 0", "print(2)").read_text()
    sentence = (r"^notebook.py: .*x.ipynb: code cell 2 fails: "
                r"ZeroDivisionError: division by zero$")
    with pytest.raises(SystemExit, match=sentence):
        notebook.main([str(path)])
    assert path.read_text() == before


def test_what_is_no_notebook_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "x.ipynb").write_text("hello")
    sentence = "^notebook.py: .*(x.ipynb: not a notebook|is not installed: pip install)"
    with pytest.raises(SystemExit, match=sentence):
        notebook.main([str(tmp_path / "x.ipynb")])
    monkeypatch.setitem(sys.modules, "nbformat", None)
    sentence = r"^notebook.py: nbformat is not installed: pip install '.\[notebook\]'$"
    with pytest.raises(SystemExit, match=sentence):
        notebook.main([str(tmp_path / "x.ipynb")])


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(client, monkeypatch):
    """Its assertions hold too.

    By hand is the model's, a query's gradient is 0, the losses agree.
    """
    checkpoint = trained_toy()
    if checkpoint.parent.name != "models":          # by default the tour opens the released one
        monkeypatch.setenv("MODEL", str(checkpoint))
    ran = notebook.run(TOUR)
    committed = cells("code")
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert [len(cell.outputs) > 0 for cell in code] == [len(cell["outputs"]) > 0
                                                        for cell in committed]
