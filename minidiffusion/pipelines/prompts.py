"""What is to be drawn, as users say it: texts, or the names or numbers of classes."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from minidiffusion.typed import unknown

Prompt = str | int | Sequence[int | str] | Tensor | None


def repeated(prompt: Prompt, count: int) -> tuple[list[int | str] | None, int]:
    """Each prompt ``count`` times in turn, and how many rows of nothing stand for no prompt."""
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    if prompt is None:
        return None, count
    return [one for one in listed(prompt) for _ in range(count)], count


def class_number(label: int | str, classes: Sequence[str]) -> int:
    """The number of a class by its name or number. Raises ValueError for what is none."""
    if isinstance(label, str) and not label.isdecimal():
        if label not in classes:
            raise unknown("label", f"unknown {label!r}", label, classes)
        return classes.index(label)
    if not 0 <= int(label) < len(classes):
        raise ValueError(f"label: must be 0..{len(classes) - 1}, got {int(label)}")
    return int(label)


def worded(prompts: Iterable[int | str]) -> list[str]:
    prompts = list(prompts)
    for one in prompts:
        if not isinstance(one, str):
            raise ValueError(f"prompt: expected text, got {one!r}")
    return [str(one) for one in prompts]


def listed(prompt: Prompt) -> list[int | str]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    return [prompt] if isinstance(prompt, int | str) else list(prompt or [])
