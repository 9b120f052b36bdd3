"""The tensors of a TorchScript archive, read as data.

An archive is a zip: code, a pickle of the module's attributes, and the tensors' bytes. The code
stays unread, and the pickle is not unpickled: `pickles` interprets it on dicts and tuples.
"""

import zipfile
from pathlib import Path

from torch import Tensor

from minidiffusion.checkpoints.archives import ZIP, open_archive
from minidiffusion.checkpoints.reader import map_file


def read_torchscript(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a saved module by its dotted name, parameters and buffers alike.

    Each is a copy, and the checksum of every member is verified. Raises ValueError, in one line.
    """
    path = Path(path)
    data = map_file(path)
    try:
        if data[:4] != ZIP:
            raise ValueError("not a TorchScript archive")
        tensors = open_archive(path, data)[0]
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"member {damaged!r} is damaged: its checksum is wrong")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {name: tensor.read().clone() for name, tensor in tensors.items()}
