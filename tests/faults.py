"""Networks with a fault of one part in 10,000, which every test of parity has to find."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from rounding import Run, all_in_float64, check_parity, in_float64, run_both, several

FAULT = 1 + 1e-4


def faulty(network: Any) -> Iterator[tuple[str, Any]]:
    """Copies, each with one fault: in a weight or a norm's epsilon, of every kind of module one.

    A kind is a type of module under one name, such as the Linear called out.
    """
    seen = set()
    for name, module in network.named_modules():
        kind = type(module).__name__, name.rsplit(".", 1)[-1]
        for part in ("weight", "eps"):
            if kind in seen or getattr(module, part, None) is None:
                continue
            wrong = deepcopy(network)
            place = wrong.get_submodule(name)
            if part == "eps":
                place.eps *= FAULT
            else:
                place.weight.data.mul_(FAULT)
            yield f"{name}.{part}", wrong
        seen.add(kind)


@torch.no_grad()
def assert_faults_are_found(ours: Run, theirs: Run, network: Any, *given: Any) -> None:
    """assert_parity(ours, theirs, network, *given) fails for every fault of the network."""
    right = run_both(ours, theirs, network, *given)
    with all_in_float64():
        network, *rest = in_float64((network, *given))
        for name, wrong in faulty(network):
            exact = several(ours(wrong, *rest))
            with pytest.raises(AssertionError):
                for (found, usual, _, truth), one in zip(right, exact, strict=True):
                    check_parity(found, usual, one, truth)
                pytest.fail(f"not found: {name}")
