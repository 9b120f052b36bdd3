"""The published weights of LPIPS, as `scripts/build_lpips.py` leaves them in the user's cache."""

from pathlib import Path
from typing import Literal

from minidiffusion.checkpoints.pickles import one_line
from minidiffusion.checkpoints.reader import read_metadata, read_safetensors
from minidiffusion.models.lpips import LPIPS, LPIPSConfig
from minidiffusion.typed import build


def default_path(network: Literal["alex", "vgg"] = "alex") -> Path:
    return Path.home() / ".cache" / "minidiffusion" / f"lpips_{network}.safetensors"


def load_lpips(path: Path | str | None = None) -> LPIPS:
    """LPIPS with the weights of a file, else with AlexNet's in the user's cache.

    In evaluation mode, in float32, and no weight takes a gradient. Raises FileNotFoundError with
    the command that fetches them, ValueError where the file holds something else.
    """
    path = Path(path or default_path())
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no weights of LPIPS; fetch them: python scripts/build_lpips.py {path}"
        )
    facts = read_metadata(path)
    config = build(LPIPSConfig, {"network": facts.get("network", "alex")}, str(path))
    network = LPIPS(config)
    try:
        network.load_state_dict(read_safetensors(path))
    except RuntimeError as error:  # torch names the tensors that are not as they should be
        raise ValueError(f"{path}: not the weights of LPIPS: {one_line(error)}") from error
    return network.eval().requires_grad_(False)
