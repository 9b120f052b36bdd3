"""The file of LPIPS's weights: there and back, missing, or another."""

from pathlib import Path

import pytest
import torch

from minidiffusion.checkpoints.lpips import load_lpips
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.models.lpips import LPIPS, LPIPSConfig


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path, wanted = tmp_path / "vgg.safetensors", LPIPS(LPIPSConfig("vgg"))
    write_safetensors(wanted.state_dict(), path, {"network": "vgg"})
    found = load_lpips(path)
    assert found.config == wanted.config and not found.training
    assert not any(weight.requires_grad for weight in found.parameters())
    rows = zip(found.state_dict().values(), wanted.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in rows)


def test_a_missing_file_is_named_with_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = tmp_path / ".cache" / "minidiffusion" / "lpips_alex.safetensors"
    with pytest.raises(FileNotFoundError) as error:
        load_lpips()
    assert str(error.value) == (
        f"{wanted}: no weights of LPIPS; fetch them: python scripts/build_lpips.py {wanted}"
    )


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_safetensors({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: not the weights of LPIPS") as error:
        load_lpips(path)
    assert "\n" not in str(error.value)
    write_safetensors({"weight": torch.ones(2)}, path, {"network": "squeeze"})
    with pytest.raises(ValueError, match=r"other\.safetensors.*'squeeze'"):
        load_lpips(path)
