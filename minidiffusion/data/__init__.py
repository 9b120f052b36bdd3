"""Pictures become batches. A configuration (a row of DATASETS) opens into a Dataset."""

from minidiffusion.data.dataset import Batch, Dataset, Mapped, Tensors, load_function, mapped
from minidiffusion.data.emoji import Emoji, Pair
from minidiffusion.data.fashion import FASHION_CLASSES, MNIST, FashionMNIST
from minidiffusion.data.folder import Folder, Pictures
from minidiffusion.data.loader import batches
from minidiffusion.data.order import order
from minidiffusion.data.pictures import (
    BadPicture,
    load_picture,
    read_metadata,
    save_png,
    to_pil,
    to_pixels,
)
from minidiffusion.data.shards import Shards, Tars
from minidiffusion.data.shardwriter import Parts, write_shards
from minidiffusion.data.sheets import grid
from minidiffusion.data.toys import Toy

Config = FashionMNIST | MNIST | Emoji | Folder | Shards | Toy
DATASETS: dict[str, type[Config]] = {
    data.name: data for data in (FashionMNIST, MNIST, Emoji, Folder, Shards, Toy)
}

__all__ = [
    "DATASETS",
    "FASHION_CLASSES",
    "MNIST",
    "BadPicture",
    "Batch",
    "Dataset",
    "Emoji",
    "FashionMNIST",
    "Folder",
    "Mapped",
    "Pair",
    "Parts",
    "Pictures",
    "Shards",
    "Tars",
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
    "write_shards",
]
