"""The walls of the house: what is loaded when, who may know what, how long a thing may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import minidiffusion

ROOT = Path(minidiffusion.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def test_importing_the_package_costs_next_to_nothing() -> None:
    heavy = ["torch", "PIL", "rich", "numpy", "yaml", "matplotlib", "safetensors", "jaxtyping"]
    code = f"import sys, minidiffusion; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_table_of_verbs_needs_no_torch() -> None:
    code = (
        "import sys; from minidiffusion.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize("name", minidiffusion.__all__)
def test_every_public_name_resolves_and_says_what_it_is(name: str) -> None:
    thing = getattr(minidiffusion, name)
    assert callable(thing) and thing.__doc__


def test_public_names_are_those_of_the_table() -> None:
    assert set(minidiffusion.__all__) == set(minidiffusion._PLACES)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        minidiffusion.lod  # noqa: B018


def test_dir_shows_what_is_public_and_nothing_else() -> None:
    assert dir(minidiffusion) == sorted([*minidiffusion.__all__, "__version__"])


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A function's lines but those of its documentation."""
    first = node.body[0]
    words = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    spent = (first.end_lineno or 0) - first.lineno + 1 if words else 0
    return (node.end_lineno or 0) - node.lineno + 1 - spent


def test_files_and_functions_stay_short() -> None:
    long = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert not {name: count for name, count in long.items() if count > 320}
    counts = {f"{f}: {n.name}": code_lines(n) for f, t in TREES.items() for n in functions(t)}
    assert not {name: count for name, count in counts.items() if count > 40}


def test_every_file_says_what_it_is_for() -> None:
    silent = [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "base", "manager"}
    assert not [path for path in ROOT.rglob("*") if path.stem in drawers]


def mentions(word: str) -> set[str]:
    return {name for name, path in FILES.items() if re.search(word, path.read_text())}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported at run time: not those that only the type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        yield from imports(node)


def importers(package: str) -> set[str]:
    found = {name: {word.split(".")[0] for word in imports(t)} for name, t in TREES.items()}
    return {name for name, words in found.items() if package in words}


def test_one_place_names_devices() -> None:
    assert mentions(r"\bcuda\b") <= {"device.py", "training/parallel.py"}


def test_who_knows_the_picture_library() -> None:
    assert importers("PIL") == {"data/pictures.py", "data/sheets.py"}


def test_who_may_use_what() -> None:
    rooms = {
        package: {name.split("/")[0] for name in importers(package)}
        for package in ("rich", "matplotlib", "argparse", "yaml", "safetensors")
    }
    assert rooms["rich"] | rooms["matplotlib"] | rooms["argparse"] <= {"cli"}
    assert rooms["yaml"] <= {"cli", "training"} and rooms["safetensors"] == {"checkpoints"}
    assert not importers("pickle") | importers("marshal") | importers("shelve")


def called(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


BANNED = {"torch.load", "eval", "exec", "compile", "__import__", "yaml.load", "yaml.full_load"}
BANNED |= {"yaml.unsafe_load", "np.save", "torch.save", "os.system", "pickle.load", "pickle.loads"}
ALLOWED = {
    # A user's own preprocessing function, from a file that the user's own recipe names.
    ("data/dataset.py", "spec.loader.exec_module"),
}
"""Calls that could run what a file holds, and where one is meant to."""


def test_nothing_in_a_file_is_executed() -> None:
    found = {
        (file, name)
        for file, tree in TREES.items()
        for _, name in called(tree)
        if name in BANNED or name.endswith((".exec_module", ".find_class", "Unpickler"))
    }
    assert found == ALLOWED


def test_numpy_is_told_to_run_nothing() -> None:
    loads = [(f, call) for f, t in TREES.items() for call, name in called(t) if name == "np.load"]
    for file, call in loads:
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert words.get("allow_pickle") == "False", file


CALLS: dict[str, Callable[[str], bool]] = {
    "print": lambda file: file.startswith("cli/"),
    "input": lambda file: False,
}


@pytest.mark.parametrize("name", CALLS)
def test_only_the_command_talks(name: str) -> None:
    found = {file for file, tree in TREES.items() for _, call in called(tree) if call == name}
    assert not [file for file in found if not CALLS[name](file)]


def test_only_training_goes_backwards() -> None:
    found = {f for f, t in TREES.items() for _, name in called(t) if name.endswith(".backward")}
    assert {file.split("/")[0] for file in found} == {"training"}
