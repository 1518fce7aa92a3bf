"""Weights in the order in which oneDNN's CPU kernels read them: they are laid out once, and not again in every step."""

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer
from autoregressive.models.quantize import replace_linear_layers


class PackedLinear(nn.Module):
    """A linear layer without bias for inference on a CPU: the same product, its sums in another order.

    Args:
        linear: whose weights are taken. It stays as it is.

    Attributes:
        weight: ``[out, in]``, opaque to all but oneDNN.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        assert linear.bias is None
        # 64 is a guess at the rows of a step, which decides the order; 1 to 2048 rows take as long by any guess.
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 64)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of the weight's dtype -> ``[..., out]``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`pack` is for such weights: oneDNN has kernels for them here."""
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: Transformer) -> Transformer:
    """Put a :class:`PackedLinear` in place of every linear layer of the blocks, and of the head.

    Args:
        model: with its weights loaded; changed in place. It can't be trained, saved or moved from then on, nor its
            ``forward`` compiled.

    Returns:
        The same model.
    """
    return replace_linear_layers(model, PackedLinear)
