"""The house itself.

Imports run one way, files hold one idea, and the maps lead to what is there.
"""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each file imports only from those before it. weights and released/ are the door to other people's
# checkpoints, prepare and sources/ that to other people's downloads.
ORDER = """
    storage.disk vocabulary wordpiece tokenizer pictures storage.tars storage.files storage.rebuilt
    data
    storage.tar_index exchange batches losses layers masks flm vilt recipes tasks released weights
    training.machine training.parallel training.flops training.loggers training.settings
    training.optimizer training.memory training.report training.plan training.checkpoints
    training.loading training.runs training.switches training.fitting train
    generate ptb metrics predict retrieval evaluation eval
    sources prepare tools tests""".split()
# Their files have each a place of its own; a file of another folder has its folder's.
FOLDERS = {"storage", "training"}


def modules():
    """(name, path) of every module outside the tests."""
    for folder in (".", "storage", "training", "released", "sources", "tools"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if folder == ".":
                yield path.stem, path
            elif folder not in FOLDERS:
                yield folder, path
            elif path.name != "__init__.py":
                yield f"{folder}.{path.stem}", path


def imported(path):
    """The places of this project that a file imports from, but for type checkers alone."""
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in FOLDERS:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module]
        else:
            continue
        for name in found:
            folder, _, rest = name.partition(".")
            names.add(f"{folder}.{rest.partition('.')[0]}" if folder in FOLDERS else folder)
    return names & set(ORDER)


@pytest.mark.parametrize("name, path", modules(),
                         ids=lambda value: value if isinstance(value, str) else value.name)
def test_imports_run_one_way(name, path):
    assert name in ORDER, f"{path.name} has no place in the house yet"
    allowed = set(ORDER[:ORDER.index(name)])
    if path.parent != ROOT and "." not in name:
        allowed.add(name)
    assert imported(path) <= allowed


def test_the_core_knows_neither_its_tools_nor_its_toy():
    for name, path in modules():
        if name != "tools":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) tools\b", text, re.M), path


@pytest.mark.parametrize("name, path", modules(),
                         ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_file_is_read_in_one_sitting(name, path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 525


def public_functions(node, prefix=""):
    """(name, function, whether it takes self or cls) of what a module or class offers."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, f"{child.name}.")
        elif isinstance(child, ast.FunctionDef) and (
                child.name == "__init__" or not child.name.startswith("_")):
            static = any(ast.unparse(decorator) == "staticmethod"
                         for decorator in child.decorator_list)
            yield prefix + child.name, child, bool(prefix) and not static


@pytest.mark.parametrize("name, path",
                         [(name, path) for name, path in modules() if name != "tools"],
                         ids=lambda value: value if isinstance(value, str) else value.name)
def test_public_functions_say_what_they_take_and_return(name, path):
    untyped = []
    for name, function, is_method in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        a = function.args
        taken = [*a.posonlyargs, *a.args, *a.kwonlyargs,
                 *filter(None, (a.vararg, a.kwarg))][is_method:]
        untyped += [f"{name}: {argument.arg}" for argument in taken if argument.annotation is None]
        if function.returns is None and function.name != "__init__":
            untyped.append(f"{name}: what it returns")
    assert not untyped, path.name


def places():
    """(file, dotted name) of every place that a map names.

    The README writes `file.py`: `name`, flm.py writes file.name.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## Where to find what"):]
    table = table[:table.index("\n## ", 5)]
    for line in table.splitlines():
        for file, names in re.findall(r"`([\w/]+)\.py`:((?: `[\w.]+`,?)+)", line):
            for name in re.findall(r"`([\w.]+)`", names):
                yield file.replace("/", "."), name
    head = ast.get_docstring(ast.parse((ROOT / "flm.py").read_text(encoding="utf-8")))
    rows = head[head.index("Where to find what"):].split("\n\n")[0].splitlines()[1:]
    for row in rows:
        yield from re.findall(r"\b(\w+)\.([\w.]+)", row[40:])


@pytest.mark.parametrize("file, name", sorted(set(places())))
def test_the_maps_lead_to_what_is_there(file, name):
    thing = importlib.import_module(file)
    for part in name.split("."):
        fields = getattr(thing, "__dataclass_fields__", {})
        assert hasattr(thing, part) or part in fields, f"{file}.{name}"
        thing = getattr(thing, part, None)


def test_nothing_called_data_or_eval_is_installed_into_site_packages():
    setup = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "py-modules = []" in setup and "packages = []" in setup


class Parser(Exception):
    """Carries a command's parser out of its main function."""


@pytest.mark.parametrize("module",
                         ["tokenizer", "train", "eval", "weights", "prepare", "tools.toy",
                          "tools.plot", "tools.probe",
                          "tools.bench", "tools.compare", "tools.gpu", "tools.gpu_page",
                          "tools.cards", "tools.demo", "tools.notebook"])
def test_every_flag_of_every_command_says_what_it_does(module, monkeypatch):
    def carry(self, *_, **__):
        raise Parser(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", carry)
    with pytest.raises(Parser) as carried:
        importlib.import_module(module).main([])
    parsers = [carried.value.args[0]]
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                assert action.help, f"{parser.prog} {action.option_strings or action.dest}"
