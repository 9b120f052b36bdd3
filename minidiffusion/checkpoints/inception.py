"""The key table of the FID Inception weights as TorchScript keeps them, in both directions."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minidiffusion.checkpoints.torchscript import read_torchscript
from minidiffusion.models.inception import Inception

PREFIX = "net.layers."
LEAVES = {"weight": "weight", "beta": "shift", "mean": "mean", "var": "variance"}
STEM = {"conv": "0", "conv_1": "1", "conv_2": "2", "conv_3": "4", "conv_4": "5"}
A = {
    "conv": "0.0",
    "tower.conv": "1.0",
    "tower.conv_1": "1.1",
    "tower_1.conv": "2.0",
    "tower_1.conv_1": "2.1",
    "tower_1.conv_2": "2.2",
    "tower_2.conv": "3.1",
}
B = {
    "conv": "0.0",
    "tower.conv": "1.0",
    "tower.conv_1": "1.1",
    "tower.conv_2": "1.2",
}
C = A | {"tower.conv_2": "1.2", "tower_1.conv_3": "2.3", "tower_1.conv_4": "2.4"}
D = {
    "tower.conv": "0.0",
    "tower.conv_1": "0.1",
    "tower_1.conv": "1.0",
    "tower_1.conv_1": "1.1",
    "tower_1.conv_2": "1.2",
    "tower_1.conv_3": "1.3",
}
E = {
    "conv": "0.0",
    "tower_conv": "1.0",
    "tower_mixed_conv": "1.1.0.0",
    "tower_mixed_conv_1": "1.1.1.0",
    "tower_1_conv": "2.0",
    "tower_1_conv_1": "2.1",
    "tower_1_mixed_conv": "2.2.0.0",
    "tower_1_mixed_conv_1": "2.2.1.0",
    "tower_2_conv": "3.1",
}
BLOCKS = (A, A, A, B, C, C, C, C, D, E, E)


def key_table() -> dict[str, str]:
    """The file's names, each with ours."""
    rows = {theirs: f"stem.{ours}" for theirs, ours in STEM.items()}
    for number, block in enumerate(BLOCKS):
        mixed = f"mixed_{number}" if number else "mixed"
        rows |= {f"{mixed}.{theirs}": f"blocks.{number}.{ours}" for theirs, ours in block.items()}
    return {
        f"{PREFIX}{theirs}.{their_leaf}": f"{ours}.{our_leaf}"
        for theirs, ours in rows.items()
        for their_leaf, our_leaf in LEAVES.items()
    }


def from_file_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(tensors, key_table())


def to_file_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(tensors, {ours: theirs for theirs, ours in key_table().items()})


def renamed(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Every name must be in the table, and every name of the table must be there."""
    for problem, keys in (
        ("unknown", tensors.keys() - table.keys()),
        ("missing", table.keys() - tensors.keys()),
    ):
        if keys:
            raise ValueError(f"{len(keys)} {problem} keys: {', '.join(sorted(keys)[:5])}")
    return {table[key]: tensor for key, tensor in tensors.items()}


def load_inception(path: Path | str) -> Inception:
    """The network with the weights of a TorchScript file; nothing in the file is run."""
    network = Inception()
    try:
        network.load_state_dict(from_file_names(read_torchscript(path)), assign=True)
    except (ValueError, RuntimeError) as error:  # torch names the tensors of a wrong shape
        raise ValueError(f"{path}: not the FID Inception weights: {error}") from error
    return network.eval().requires_grad_(False)
