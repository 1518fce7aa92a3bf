"""Two-dimensional rotary position embedding of LlamaGen.

The first half of a head's dimensions encodes the row of a token, the second half its column. Pairs are interleaved:
dimensions (2j, 2j + 1) turn together. Condition tokens have an all-zero table (cos = sin = 0), so that their rotated
queries and keys are exactly zero; released weights rely on it.
"""

import torch
from torch import Tensor


def rope_table(grid_size: int, head_dim: int, base: float = 10000.0, cls_token_num: int = 120) -> Tensor:
    """Cosines and sines for every position of a sequence, on the CPU.

    Args:
        grid_size: image tokens per row and column.
        head_dim: dimensions of one attention head, a multiple of 4.
        base: the frequency base.
        cls_token_num: condition tokens in front of the image; their rows are zero.

    Returns:
        float32 ``[cls_token_num + grid_size**2, head_dim / 2, 2]``, the last axis being (cos, sin).
    """
    half = head_dim // 2
    # An explicit device, so that the table is real even when the model is built on the meta device.
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half
    axis = torch.outer(torch.arange(grid_size, device="cpu").float(), 1.0 / base**exponents)  # [grid, half / 2]
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # raster order
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(cls_token_num, *table.shape[1:]), table])


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: ``[B, S, H, D]``.
        table: ``[S, D / 2, 2]``, the rows of :func:`rope_table` for these S positions.

    Returns:
        ``[B, S, H, D]`` in the dtype of ``x``; the arithmetic is at least float32.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]  # [S, 1, D / 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
