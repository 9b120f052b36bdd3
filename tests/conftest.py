"""Shapes and types of every annotated function are checked while the tests run."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from jaxtyping import install_import_hook

hook = install_import_hook("minidiffusion", "beartype.beartype")

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
