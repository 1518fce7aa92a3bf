"""What stands for CUDA graphs where there is no GPU.

A tape notes each operation with the tensors that it worked on, and does the same to the same memory again. What the
host knew when it was recorded is part of it, as of a graph. It can't tell the host's memory from the device's.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.models import gpt, packed

# Some of what waits for the device, or needs memory of the host, and a CUDA graph can't have.
BARRED = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal"}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.result = [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in BARRED
        if name in ("index", "index_put_", "_index_put_impl_"):
            assert not any(x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)), "a mask"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def play(self):
        for func, args, kwargs, before in self.calls:
            now = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if (
                    isinstance(old, torch.Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


def operations_alone(monkeypatch):
    """A tape doesn't hear the loops in C++, which a model on a CPU has."""
    monkeypatch.setattr(gpt, "kernels_for", lambda x: None)
    monkeypatch.setattr(packed, "multiplies", lambda dtype: None)


def recorder(tapes):
    """For RecordedSteps; the tapes go into the list. As graphs share memory, playing one spoils the others' results."""

    def played(tape):
        for other in tapes:
            if other is not tape and other.result is not None:
                other.result.fill_(torch.nan)
        tape.play()

    def record(step):
        tape = Tape()
        with tape:
            tape.result = step()
        tapes.append(tape)
        return tape.result, lambda: played(tape)

    return record
