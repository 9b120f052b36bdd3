"""Pictures become batches. A configuration (a row of DATASETS) opens into a Dataset."""

from minidiffusion.data.dataset import Batch, Dataset, Mapped, Tensors, load_function, mapped
from minidiffusion.data.fashion import FASHION_CLASSES, MNIST, FashionMNIST
from minidiffusion.data.folder import Folder, Pictures
from minidiffusion.data.loader import batches, order
from minidiffusion.data.pictures import (
    BadPicture,
    grid,
    load_picture,
    read_metadata,
    save_png,
    to_pil,
    to_pixels,
)
from minidiffusion.data.toys import Toy

Config = FashionMNIST | MNIST | Folder | Toy
DATASETS: dict[str, type[Config]] = {data.name: data for data in (FashionMNIST, MNIST, Folder, Toy)}

__all__ = [
    "DATASETS",
    "FASHION_CLASSES",
    "MNIST",
    "BadPicture",
    "Batch",
    "Dataset",
    "FashionMNIST",
    "Folder",
    "Mapped",
    "Pictures",
    "Tensors",
    "Toy",
    "batches",
    "grid",
    "load_function",
    "load_picture",
    "mapped",
    "order",
    "read_metadata",
    "save_png",
    "to_pil",
    "to_pixels",
]
