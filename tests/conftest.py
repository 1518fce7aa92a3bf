"""For all tests."""

import gc
import os
import shutil

import torch

if not torch.cuda.is_available():  # before anything imports Triton, which then interprets its kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"
if not shutil.which("g++"):  # without a warning of each test
    os.environ["ADSA_KERNELS"] = "0"


def pytest_collection_finish(session):
    """What is imported by now stays: the garbage collector need not look at all of it again and again."""
    gc.collect()
    gc.freeze()
