"""Writes the file tree at the end of the README: each module and its docstring's first line."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "configs": "recipes: one YAML file a run",
    "benchmarks": "figures beside peers, each by one command; RESULTS.md",
    "docs": "from noise to picture, Stable Diffusion, a notebook; recipes; troubleshooting",
    "scripts": "the judges, the shipped pictures, the documentation's pictures, this tree",
    "tests": "mirrors the package",
}


def purpose(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].rstrip(".")


def tree() -> str:
    lines = ["minidiffusion/"]
    package = ROOT / "minidiffusion"
    for path in sorted(package.rglob("*.py"), key=lambda p: (len(p.relative_to(package).parts), p)):
        if path.name != "__init__.py" and path.parent == package:
            lines.append(f"  {path.name:<24}{purpose(path)}")
    for folder in sorted(p for p in package.iterdir() if (p / "__init__.py").exists()):
        lines.append(f"  {folder.name + '/':<24}{purpose(folder / '__init__.py')}".rstrip())
        for path in sorted(folder.rglob("*.py")):
            name = str(path.relative_to(folder))
            if path.name != "__init__.py":
                lines.append(f"    {name:<22}{purpose(path)}")
    assets = "the shipped pictures, judges and merges, each with its licence beside it"
    lines.append(f"  {'assets/':<24}{assets}")
    lines += [f"{name + '/':<26}{text}" for name, text in FOLDERS.items()]
    return "\n".join(lines)


def with_tree(readme: str) -> str:
    """The README with its last code block replaced by today's tree."""
    head, mark, _ = readme.rpartition("## The house\n")
    return f"{head}{mark}\n```\n{tree()}\n```\n"


if __name__ == "__main__":
    page = ROOT / "README.md"
    fresh = with_tree(page.read_text())
    if "--check" in sys.argv:
        sys.exit(fresh != page.read_text() and "README.md: run scripts/make_tree.py")
    page.write_text(fresh)
