"""Networks without weights: the names and shapes of the real ones, at no cost."""

import subprocess
import sys

import pytest

from minidiffusion.models import DiTConfig, MLPConfig, UNetConfig, create, hollow

CONFIGS = [
    UNetConfig(channels=32, groups=8, classes=3, pooled_width=4),
    DiTConfig(size="tiny", rows=8, columns=8, classes=3),
    MLPConfig(width=8, depth=1, classes=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_hollow_has_the_names_and_shapes_and_no_numbers(config) -> None:
    full, empty = create(config).state_dict(), hollow(create, config).state_dict()
    assert {name: w.shape for name, w in empty.items()} == {n: w.shape for n, w in full.items()}
    assert all(w.is_meta and w.dtype == full[name].dtype for name, w in empty.items())


def test_hollow_does_not_wake_the_compiler() -> None:
    """On the meta device torch draws normal numbers through its compiler: 2 s of imports."""
    code = (
        "import sys; from minidiffusion.models import UNetConfig, create, hollow\n"
        "hollow(create, UNetConfig(classes=3)); print('torch._dynamo' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
