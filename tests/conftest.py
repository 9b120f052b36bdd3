"""Shapes and types of every annotated function are checked while the tests run."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from jaxtyping import install_import_hook

hook = install_import_hook("minidiffusion", "beartype.beartype")

import torch

# Tensors here are small: a second thread would only wait for the first.
torch.set_num_threads(int(os.environ.get("MINIDIFFUSION_TEST_THREADS", "1")))
