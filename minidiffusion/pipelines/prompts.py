"""What is to be drawn, as users say it: texts, or the names or numbers of classes."""

from collections.abc import Sequence

from torch import Tensor

Prompt = str | int | Sequence[int | str] | Tensor | None


def repeated(prompt: Prompt, count: int) -> tuple[list[int | str] | None, int]:
    """Each prompt ``count`` times in turn, and how many rows of nothing stand for no prompt."""
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    if prompt is None:
        return None, count
    return [one for one in listed(prompt) for _ in range(count)], count


def worded(prompts: list[int | str]) -> list[str]:
    for one in prompts:
        if not isinstance(one, str):
            raise ValueError(f"prompt: expected text, got {one!r}")
    return [str(one) for one in prompts]


def listed(prompt: Prompt) -> list[int | str]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    return [prompt] if isinstance(prompt, int | str) else list(prompt or [])
