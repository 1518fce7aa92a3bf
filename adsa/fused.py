"""Whether there are Triton kernels for a device; elsewhere PyTorch's operations give the same results."""

import functools
import os
import warnings
from importlib.util import find_spec

import torch


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels are for tensors on this device, with sums of this dtype. ADSA_KERNELS=0 turns them off."""
    if device.type != "cuda" or dtype == torch.float64 or os.environ.get("ADSA_KERNELS") == "0":
        return False
    return _compiles(device)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Tried once: besides a GPU that it knows, Triton wants a C compiler, Python's headers and a folder to write to."""
    if find_spec("triton") is None:
        return False
    try:
        from adsa import kernels

        of = torch.ones(1, 1, 1, device=device)
        kernels.similarity(of.unsqueeze(0), of, of, 1.0)
    except Exception as error:  # of many kinds
        warnings.warn(
            f"Triton can't compile here, so that steps are slower: {error}. ADSA_KERNELS=0 does without", stacklevel=2
        )
        return False
    return True
