"""Weights in the order in which a CPU's kernels read them: they are laid out once, and not again in every step."""

import torch
from torch import Tensor, nn

from adsa import LayerCache
from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.models.loops import Loops, Weights, multiplies
from autoregressive.models.quantize import Int8Linear, replace_linear_layers


class BlockedLinear(nn.Module):
    """A linear layer without bias for inference on a CPU, by the project's own loops.

    Args:
        layer: whose weights are taken. It stays as it is.
        loops: for weights of that dtype.

    Attributes:
        weight: blocks of 32 outputs, see :meth:`Loops.blocks`.
        scale: float32 ``[out]`` of integers, else None.
    """

    def __init__(self, layer: nn.Linear | Int8Linear, loops: Loops):
        super().__init__()
        self.loops, self.outputs = loops, len(layer.weight)
        self.weight = nn.Parameter(loops.blocks(layer.weight.detach()), requires_grad=False)
        scale = layer.scale.detach().float() if isinstance(layer, Int8Linear) else None
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    @property
    def weights(self) -> Weights:
        """As the loops take them."""
        return self.weight, self.scale

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of the layer's dtype -> ``[..., out]``."""
        return self.loops.multiply(x, self.weight, self.outputs, self.scale)


class BlockedBlock(nn.Module):
    """A :class:`TransformerBlock` for inference on a CPU: two calls of the project's own loops, and its attention.

    Results are those of the block's own norms and layers by such loops, to the last bit. Nothing is dropped, and hooks
    of modules within it aren't called.

    Args:
        block: whose linear layers are all a :class:`BlockedLinear`. They, and its norms, become this block's.
        loops: theirs.
    """

    def __init__(self, block: TransformerBlock, loops: Loops):
        super().__init__()
        self.loops = loops
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.ffn_norm, self.feed_forward = block.ffn_norm, block.feed_forward

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """As the block's."""
        loops, attention, ffn, norm = self.loops, self.attention, self.feed_forward, self.attention_norm
        qkv = loops.before_attention(x, norm.weight, norm.eps, attention.wqkv.weights, table, attention.heads)
        attended, norm = attention.mix(*qkv, mask, cache), self.ffn_norm
        weights = [layer.weights for layer in (ffn.w1, ffn.w3, ffn.w2)]
        wo, hidden = attention.wo.weights, ffn.w1.outputs
        return loops.after_attention(x, attended, wo, norm.weight, norm.eps, weights, hidden)


class PackedLinear(nn.Module):
    """A linear layer without bias for inference on a CPU, by oneDNN: the same product, its sums in another order.

    Args:
        linear: whose weights are taken. It stays as it is.

    Attributes:
        weight: ``[out, in]``, opaque to all but oneDNN.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        # 64 is a guess at the rows of a step, which decides the order; 1 to 2048 rows take as long by any guess.
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 64)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of the weight's dtype -> ``[..., out]``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def pack(model: Transformer) -> Transformer:
    """Put what is fastest in place of the blocks, and of every linear layer in them and for the head, integers or not.

    Args:
        model: with its weights loaded; changed in place. On a CPU it can't be trained, saved, moved or cast from then
            on, nor its ``forward`` compiled. Elsewhere, and where there is nothing faster, layers stay as they are.

    Returns:
        The same model.
    """
    replace_linear_layers(model, _packed)
    for index, block in enumerate(model.layers):
        model.layers[index] = _joined(block)
    return model


def _joined(block: TransformerBlock) -> nn.Module:
    attention, ffn, norms = block.attention, block.feed_forward, (block.attention_norm, block.ffn_norm)
    layers = [attention.wqkv, attention.wo, ffn.w1, ffn.w3, ffn.w2]
    found = {layer.loops if isinstance(layer, BlockedLinear) else None for layer in layers}
    if len(found) > 1 or None in found or any(norm.weight.dtype != layers[0].loops.takes for norm in norms):
        return block
    return BlockedBlock(block, layers[0].loops)


def _packed(layer: nn.Linear | Int8Linear) -> nn.Module:
    weight, integers = layer.weight, isinstance(layer, Int8Linear)
    if not weight.is_cpu or getattr(layer, "bias", None) is not None:
        return layer
    loops, of = multiplies(weight.dtype), layer.scale.dtype if integers else weight.dtype
    if loops is not None and of == loops.takes and weight.shape[1] % loops.together == 0:
        return BlockedLinear(layer, loops)
    return PackedLinear(layer) if not integers and _by_onednn(weight.dtype) else layer


def _by_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
