"""The documentation says what is so: quoted lines, links, pictures, tables, commands, examples."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from minidiffusion.cli.main import VERBS, parser
from minidiffusion.cli.train import overrides
from minidiffusion.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
QUOTE = re.compile(r"# (minidiffusion/[\w/]+\.py)(?::([\w.]+))?")


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def prose(page):
    return BLOCK.sub("", page.read_text())


@pytest.fixture(scope="module")
def make_docs():
    return importlib.import_module("make_docs")


def test_there_are_eight_chapters_and_the_index_names_each():
    chapters = sorted((DOCS / "from-noise-to-picture").glob("*.md"))
    assert [int(chapter.name.split("-")[0]) for chapter in chapters] == list(range(1, 9))
    index = (DOCS / "README.md").read_text()
    assert all(f"({chapter.relative_to(DOCS)})" in index for chapter in chapters)


# --- quoted code ---------------------------------------------------------------------------------


def quotes():
    """(page, file, function, line, position among the lines quoted from there)."""
    for page in PAGES:
        for block in blocks(page, "python"):
            if not QUOTE.match(block):
                continue
            for line in filter(None, map(str.strip, block.splitlines())):
                if head := QUOTE.fullmatch(line):
                    found = [page.name, head[1], head[2], []]
                    yield found
                else:
                    found[3].append(line)


def source(file, name):
    """The lines of a function, method or class, or of the whole file."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split(".") if name else []:
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        assert node is not None, f"{file} has no {name}"
    lines = text.splitlines()
    return [line.strip() for line in (lines[node.lineno - 1 : node.end_lineno] if name else lines)]


@pytest.mark.parametrize("quote", list(quotes()), ids=lambda q: f"{q[0]}:{q[1]}:{q[2]}")
def test_every_quoted_line_is_really_there_and_in_this_order(quote):
    _, file, name, lines = quote
    assert lines, "a heading without a line"
    there = iter(source(file, name))
    for line in lines:
        assert any(line == real for real in there), f"{file}:{name} has no line (here): {line}"


def test_every_chapter_quotes_the_code():
    quoting = {quote[0] for quote in quotes()}
    assert all(page.name in quoting for page in (DOCS / "from-noise-to-picture").glob("*.md"))


def test_a_changed_line_would_be_noticed():
    lines = source("minidiffusion/diffusion/levels.py", "Level.mix")
    assert any("self.alpha" in line for line in lines)
    assert not any("_kept" in line for line in lines)


# --- links and pictures --------------------------------------------------------------------------


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for address in LINK.findall(prose(page)):
        if "://" in address:
            continue
        place, _, anchor = address.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {address}"
        assert not anchor or anchor in anchors(target), f"{page.name}: no heading for {address}"


def test_pictures_are_small_and_all_are_shown(make_docs):
    pictures = sorted(make_docs.PICTURES.glob("*.png"))
    shown = " ".join(prose(page) for page in PAGES)
    sizes = [picture.stat().st_size for picture in pictures]
    assert max(sizes) < 120_000 and sum(sizes) < 1_000_000
    assert {picture.stem for picture in pictures} - {"samples", "strip"} == set(make_docs.DRAWN)
    assert all(f"pictures/{name}.png" in shown for name in make_docs.DRAWN)


def test_a_picture_is_drawn_without_training(make_docs, tmp_path):
    make_docs.save(make_docs.ladders(), tmp_path / "ladders.png")
    assert (tmp_path / "ladders.png").read_bytes()[:4] == b"\x89PNG"


# --- the tables of keys --------------------------------------------------------------------------


def test_the_tables_of_keys_are_up_to_date_and_explained(make_docs):
    page = (DOCS / "recipes.md").read_text()
    assert make_docs.with_tables(page) == page, "run: python scripts/make_docs.py ladders"
    assert "TODO" not in page, "a key has no meaning yet: write it into its row"
    listed = {key for key, _, _ in make_docs.ROW.findall(page)}
    assert listed == {key for key, *_ in make_docs.recipe_keys()}


def test_the_generator_adds_a_new_key_and_keeps_written_meanings(make_docs):
    page = (DOCS / "recipes.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `run.clip`"))
    assert "TODO" in make_docs.with_tables(page.replace(row + "\n", ""))
    changed = page.replace(row, row.replace("1.0", "7.0"))
    assert changed != page and make_docs.with_tables(changed) == page


# --- commands ------------------------------------------------------------------------------------


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["torchrun"]:
                    words = words[words.index("-m") + 1 :]
                if words[:1] == ["minidiffusion"]:
                    yield pytest.param(words[1:], id=" ".join(words))


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_is_understood(words, monkeypatch):
    assert words[0] in VERBS
    arguments = parser(words).parse_args(words)
    if words[0] == "train" and arguments.recipe:
        monkeypatch.chdir(ROOT)
        load_recipe(arguments.recipe, overrides(arguments))


def test_every_option_in_the_text_exists():
    """Options that stand in the prose and tables, outside of blocks."""
    known = {"--help"}
    for verb in VERBS:
        known |= set(re.findall(r"--[\w.-]+", _help(verb)))
    foreign = {"--nproc-per-node", "--master-port"}
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", prose(page)):
            assert option.rstrip(".") in known | foreign, f"{page.name}: {option}"


def _help(verb):
    top = parser([verb])
    (verbs,) = (action for action in top._actions if hasattr(action, "choices") and action.choices)
    found = verbs.choices[verb]
    nested = (one for one in found._actions if isinstance(one, argparse._SubParsersAction))
    jobs = [job for one in nested for job in one.choices.values()]
    return "".join(one.format_help() for one in (found, *jobs))


# --- the example ---------------------------------------------------------------------------------


def test_the_python_example_runs(monkeypatch, capsys):
    (example,) = (b for b in blocks(DOCS / "recipes.md", "python") if b.startswith("# example"))
    monkeypatch.chdir(ROOT)
    shorter = example.replace('"run.steps": 300', '"run.steps": 3')
    assert shorter != example
    exec(compile(shorter, "docs/recipes.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_the_preprocessing_example_runs(tmp_path):
    import torch

    from minidiffusion.data import Tensors, load_function, mapped

    (code,) = (b for b in blocks(DOCS / "recipes.md", "python") if b.startswith("# harder.py"))
    (tmp_path / "harder.py").write_text(code)
    data = mapped(
        Tensors(torch.full((2, 1, 4, 4), 0.9)), load_function(f"{tmp_path}/harder.py:harder")
    )
    assert data.batch([0, 1]).x.eq(1).all()


def test_other_python_blocks_run(monkeypatch):
    """Short examples of the chapters that quote nothing."""
    ran = 0
    for page in (DOCS / "from-noise-to-picture").glob("*.md"):
        for block in blocks(page, "python"):
            if not QUOTE.match(block):
                exec(compile(block, page.name, "exec"), {})
                ran += 1
    assert ran and "minidiffusion" in sys.modules
