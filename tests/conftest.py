"""For all tests."""

import gc
import os
import shutil

import torch

if not torch.cuda.is_available():  # before anything imports Triton, which then interprets its kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

from adsa import native

if not any(shutil.which(compiler[0]) for compiler in native._compilers()):  # told once, and not as errors of tests
    native.wanted = lambda: False


def pytest_collection_finish(session):
    """What is imported by now stays: the garbage collector need not look at all of it again and again."""
    gc.collect()
    gc.freeze()
