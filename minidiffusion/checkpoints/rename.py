"""Names on disk become ours, and ours theirs: key tables as rules, applied strictly both ways.

A table's row names modules, whose weight and bias go along, or whole tensors. Either side may be
several tensors, which are laid one below the other: our keys and values lie in one matrix.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["same", "conv", "transposed", "swapped"]
Shape = tuple[int, ...]
SHOWN = 5
LEAVES = ("weight", "bias")


class As(NamedTuple):
    """Their side of a row that they store in another form.

    Weights as 1x1 convolutions or transposed; weights and biases with their halves swapped.
    """

    names: tuple[str, ...]
    form: Form


Theirs = str | tuple[str, ...] | As
Table = Mapping[str | tuple[str, ...], Theirs]
"""Ours to theirs."""


class Rule(NamedTuple):
    """Tensors of ours and of theirs that hold the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = "same"


def conv(*names: str) -> As:
    return As(names, "conv")


def transposed(*names: str) -> As:
    return As(names, "transposed")


def swapped(*names: str) -> As:
    return As(names, "swapped")


def stored(row: Theirs) -> As:
    """Their side of a row and its form."""
    return row if isinstance(row, As) else As(listed(row), "same")


def listed(side: str | tuple[str, ...]) -> tuple[str, ...]:
    return (side,) if isinstance(side, str) else side


def mapped(table: Table, ours: Callable[[str], str], theirs: Callable[[str], str]) -> Table:
    """The table with other names on either side."""
    rows: dict[str | tuple[str, ...], Theirs] = {}
    for mine, row in table.items():
        names, form = stored(row)
        rows[tuple(map(ours, listed(mine)))] = As(tuple(map(theirs, names)), form)
    return rows


def within(ours: str, theirs: str, table: Table) -> Table:
    """The rows of a part that lies here in ours and there in theirs."""
    return mapped(table, lambda name: ours + name, lambda name: theirs + name)


def repeated(table: Table, count: int) -> Table:
    """``{}`` on both sides as each number below the count."""
    rows: dict[str | tuple[str, ...], Theirs] = {}
    for number in range(count):
        fill = partial(_filled, number)
        rows |= mapped(table, fill, fill)
    return rows


def _filled(number: int, name: str) -> str:
    return name.format(number)


def rules(table: Table, ours: Iterable[str], prefix: str = "") -> list[Rule]:
    """A rule for every tensor of ours; the rows of what a network lacks are passed over.

    prefix stands before all their names. Raises LookupError where the table has no row.
    """
    left, made = set(ours), []
    for mine, row in table.items():
        mine = listed(mine)
        names, form = stored(row)
        for leaf in ("",) if mine[0].endswith(LEAVES) else ("", ".weight", ".bias"):
            here = tuple(name + leaf for name in mine)
            if left.issuperset(here):
                left.difference_update(here)
                there = tuple(f"{prefix}{name}{leaf}" for name in names)
                same = leaf == ".bias" and form != "swapped"
                made.append(Rule(here, there, "same" if same else form))
    if left:
        raise LookupError(f"no row for {sorted(left)[:SHOWN]}")
    return made


def their_shapes(made: Iterable[Rule], ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors that a file of theirs must hold for a network of ours."""
    found: dict[str, Tensor] = {}
    for rule in made:
        rows = sum(ours[name][0] for name in rule.ours) // len(rule.theirs)
        shape = (rows, *ours[rule.ours[0]][1:])
        found |= dict.fromkeys(rule.theirs, FORMS[rule.form](torch.empty(shape, device="meta")))
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


FORMS: dict[Form, Callable[[Tensor], Tensor]] = {
    "same": lambda tensor: tensor,
    "conv": lambda tensor: tensor[..., None, None],
    "transposed": lambda tensor: tensor.mT,
    "swapped": lambda tensor: tensor.roll(len(tensor) // 2, dims=0),
}
BACK = FORMS | {"conv": lambda tensor: tensor.flatten(1)}
"""Ours as they store it, and back: but for the swapped ones views, which nothing is written to."""


def cut(pieces: Sequence[Tensor], lengths: Sequence[int]) -> Iterator[list[Tensor]]:
    """What lies one below the other, cut anew into so many rows each."""
    rest = list(pieces)
    for length in lengths:
        taken: list[Tensor] = []
        while length:
            head = rest.pop(0)
            taken.append(head[:length])
            if len(head) > length:
                rest.insert(0, head[length:])
            length -= len(taken[-1])
        yield taken


class Renamed(Mapping[str, Tensor]):
    """A file's tensors under our names, or a network's under theirs; none is read before its turn.

    shapes: of the side that is asked for, ours or theirs.
    """

    def __init__(
        self, made: Iterable[Rule], source: Mapping[str, Tensor], shapes: Mapping[str, Shape],
        to: Literal["ours", "theirs"],
    ) -> None:  # fmt: skip
        self.source, self.shapes, self.to = source, shapes, to
        self.rules = {name: rule for rule in made for name in getattr(rule, to)}

    def pieces(self, name: str) -> list[Tensor]:
        """Views that lie one below the other in this tensor."""
        rule = self.rules[name]
        there, here = (rule.theirs, rule.ours) if self.to == "ours" else (rule.ours, rule.theirs)
        found = [self.source[one] for one in there]
        if self.to == "ours":
            found = [BACK[rule.form](one) for one in found]
            lengths = [self.shapes[one][0] for one in here]
            return next(p for one, p in zip(here, cut(found, lengths), strict=True) if one == name)
        lengths = [sum(map(len, found)) // len(here)] * len(here)
        mine = next(p for one, p in zip(here, cut(found, lengths), strict=True) if one == name)
        return [FORMS[rule.form](one) for one in mine]

    def __getitem__(self, name: str) -> Tensor:
        found = self.pieces(name)
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


def check(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: object) -> None:
    """Raises ValueError, one line, unless exactly these names with these shapes are there."""
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    complaints = [
        f"{len(names)} {what}: {named(names)}"
        for what, names in (
            ("unknown keys", sorted(found.keys() - wanted.keys())),
            ("missing keys", sorted(wanted.keys() - found.keys())),
            ("wrong shapes", wrong),
        )
        if names
    ]
    if complaints:
        raise ValueError(f"{where}: {'; '.join(complaints)}")


def named(names: Sequence[str]) -> str:
    """The first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    wanted = re.compile(pattern)
    return {name for name in names if wanted.fullmatch(name)}
