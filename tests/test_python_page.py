"""The examples of docs/PYTHON.md print what the page says, with the models of models/."""

import doctest
import re

import pytest
from conftest import ROOT, picture

from released.named import model_names

PAGE = (ROOT / "docs/PYTHON.md").read_text(encoding="utf-8")
BLOCKS = r"```python\n(.*?)```"
FIRST, *SECTIONS = [section for section in PAGE.split("\n## ") if ">>>" in section]
LOAD = r'weights\.load\("([\w-]+)"\)'


def examples(section):
    return "".join(re.findall(BLOCKS, section, re.S))


def failures(source, names):
    """How many examples print something else; `names` gets what they define."""
    test = doctest.DocTestParser().get_doctest(source, names, "docs/PYTHON.md", None, None)
    runner = doctest.DocTestRunner()
    runner.run(test, clear_globs=False)
    names.update(test.globs)
    return runner.failures


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n")[0])
def test_examples_print_what_the_page_says(section):
    missing = set(re.findall(LOAD, section)) - set(model_names())
    if missing:
        pytest.skip(f"models/ has no {', '.join(missing)}: `make models` makes it")
    names = {}
    assert failures(examples(FIRST), names) == 0
    assert failures(examples(section), names) == 0


README = re.findall(BLOCKS, (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("code", README)
def test_the_code_of_the_readme_runs(code, tmp_path, monkeypatch):
    missing = set(re.findall(LOAD, code)) - set(model_names())
    if missing:
        pytest.skip(f"models/ has no {', '.join(missing)}: `make models` makes it")
    (tmp_path / "photo.jpg").write_bytes(picture(1))
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_each_section_loads_a_model_and_a_wrong_print_is_found():
    assert len(SECTIONS) >= 4 and all(re.search(LOAD, section) for section in SECTIONS)
    assert failures(">>> 1 + 1\n3\n", {}) == 1
