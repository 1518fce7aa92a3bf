"""LlamaGen's transformer, written afresh with LlamaGen's parameter names, so that released checkpoints load strictly.

A sequence is ``cls_token_num`` condition tokens (1 class token, or 120 text tokens) followed by ``block_size`` image
tokens in raster order. There is no other position embedding than 2-D RoPE, and no BOS: the condition plays that part.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adsa import KVCache, LayerCache, Order
from adsa.fused import fused
from autoregressive.models.loops import Loops, loops
from autoregressive.models.pretrained import Pretrained
from autoregressive.models.rope import apply_rope, rope_table


@dataclass
class ModelArgs:
    """Shape and regularisation of a :class:`Transformer`. Names and defaults are LlamaGen's."""

    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None  # None: n_head
    multiple_of: int = 256  # the FFN's hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0

    num_classes: int = 1000
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1  # how often training drops the condition, for classifier-free guidance
    model_type: str = "c2i"  # or "t2i"

    vocab_size: int = 16384
    cls_token_num: int = 1
    block_size: int = 256  # image tokens, a perfect square

    def __post_init__(self):
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type must be 'c2i' or 't2i', not {self.model_type!r}")
        if round(self.block_size**0.5) ** 2 != self.block_size:
            raise ValueError(f"block_size must be a perfect square (tokens of a square image), not {self.block_size}")
        if self.dim % self.n_head:
            raise ValueError(f"dim {self.dim} is not a multiple of n_head {self.n_head}")
        if self.head_dim % 4:
            raise ValueError(
                f"dim {self.dim} / n_head {self.n_head} must be a multiple of 4, for RoPE in two dimensions"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def grid_size(self) -> int:
        return round(self.block_size**0.5)

    @property
    def ffn_dim(self) -> int:
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for whole samples and rescales the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


def _drop_some(cond: Tensor, null: Tensor, rate: float) -> Tensor:
    """Put the null condition in place of whole samples, at random: what guidance will guide away from."""
    drop = torch.rand(len(cond), device=cond.device) < rate
    return torch.where(drop.view(-1, *[1] * (cond.ndim - 1)), null, cond)


class LabelEmbedder(nn.Module):
    """Class ids to one condition token; the id ``num_classes`` is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def null(self, labels: Tensor) -> Tensor:
        if self.dropout_prob == 0:
            raise ValueError(
                "this model was built with class_dropout_prob=0 and has no null class: cfg_scale must be 1"
            )
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels: Tensor) -> Tensor:
        """``[B]`` or ``[B, 1]`` int -> ``[B, 1, dim]``."""
        labels = labels.view(-1)
        if self.training and self.dropout_prob > 0:
            labels = _drop_some(labels, self.null(labels), self.dropout_prob)
        return self.embedding_table(labels).unsqueeze(1)


class MLP(nn.Module):
    def __init__(self, in_features: int, features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, features, bias=False)
        self.fc2 = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features to condition tokens. The null caption is a buffer: random, never trained, part of the weights."""

    def __init__(self, caption_dim: int, dim: int, dropout_prob: float, token_num: int):
        super().__init__()
        self.cap_proj = MLP(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(token_num, caption_dim) / caption_dim**0.5)
        self.dropout_prob = dropout_prob

    def null(self, caption: Tensor) -> Tensor:
        return self.uncond_embedding.to(caption.dtype).expand_as(caption)

    def forward(self, caption: Tensor) -> Tensor:
        """``[B, T, caption_dim]`` -> ``[B, T, dim]``."""
        if caption.shape[1:] != self.uncond_embedding.shape:
            raise ValueError(
                f"text features {list(caption.shape)} given, {['B', *self.uncond_embedding.shape]} expected"
            )
        if self.training and self.dropout_prob > 0:
            caption = _drop_some(caption, self.null(caption), self.dropout_prob)
        return self.cap_proj(caption)


def kernels_for(x: Tensor) -> types.ModuleType | Loops | None:
    """What does a block's operations on such a tensor in one pass each, or None: PyTorch's operations have to do.

    On a GPU :mod:`autoregressive.models.kernels`, on a CPU :class:`~autoregressive.models.loops.Loops`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if x.is_cpu:
        return loops(x.dtype)
    if not fused(x.device, x.dtype):
        return None
    from autoregressive.models import kernels  # needs Triton

    return kernels


def compiled(function: Callable) -> Callable:
    """``function`` by torch.compile, whose limit of graphs is raised: a cache that grows, a full one, of each dtype."""
    import torch._dynamo.config as dynamo  # slow to import

    for name in ("recompile_limit", "cache_size_limit"):  # the second is its name before torch 2.7
        if hasattr(dynamo, name):
            setattr(dynamo, name, max(256, getattr(dynamo, name)))
    return torch.compile(function)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := kernels_for(x)) is not None and self.weight.dtype == x.dtype:
            return kernels.rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.dropout = nn.Dropout(args.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        kernels = kernels_for(gate)
        return self.dropout(self.w2(F.silu(gate) * up if kernels is None else kernels.swiglu(gate, up)))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = (args.n_head, args.kv_heads, args.kv_heads)
        self.head_dim = args.head_dim
        self.wqkv = nn.Linear(args.dim, sum(self.heads) * args.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.attn_dropout_p = args.attn_dropout_p
        self.resid_dropout = nn.Dropout(args.resid_dropout_p)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """``[B, S, dim]`` -> the same; without a cache causal, or by ``mask``; with one, as the cache decides."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([sum(self.heads[:2]), self.heads[2]], dim=2)
        kernels = kernels_for(qk)
        qk = apply_rope(qk, table) if kernels is None else kernels.rope(qk, table)
        q, k = qk.split(self.heads[:2], dim=2)
        return self.resid_dropout(self.wo(self.mix(q, k, v, mask, cache)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Values by attention: ``[B, S, heads, D]`` each, queries and keys rotated, -> ``[B, S, dim]``."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, S, D]
        if cache is not None:
            out = cache.attend(q, k, v)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=self.attn_dropout_p if self.training else 0.0,
                enable_gqa=self.heads[0] != self.heads[1],
            )
        return out.transpose(1, 2).flatten(2)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, drop_path: float):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        h = x + self.drop_path(self.attention(self.attention_norm(x), table, mask, cache))
        return h + self.drop_path(self.feed_forward(self.ffn_norm(h)))


class Transformer(nn.Module, Pretrained, library_name="adsa"):
    """The whole model: embeddings, ``n_layer`` blocks, norm and an untied output head.

    Attributes:
        config: its :class:`ModelArgs`.
        freqs_cis: RoPE table, float32. No parameter and no buffer, as in LlamaGen: not in the state dict, and not cast
            by ``.to(dtype)``; it moves to the device of its input by itself.
    """

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config = config
        if config.model_type == "c2i":
            self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, config.class_dropout_prob)
        else:
            self.cls_embedding = CaptionEmbedder(
                config.caption_dim, config.dim, config.class_dropout_prob, config.cls_token_num
            )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        rates = torch.linspace(0, config.drop_path_rate, config.n_layer, device="cpu").tolist()
        self.layers = nn.ModuleList(TransformerBlock(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.freqs_cis = rope_table(config.grid_size, config.head_dim, config.rope_base, config.cls_token_num)
        self.apply(self._init_weights)
        nn.init.zeros_(self.output.weight)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def null_condition(self, cond: Tensor) -> Tensor:
        """The unconditional half of guidance: the null class, or the null caption; same shape as ``cond``."""
        return self.cls_embedding.null(cond)

    def new_cache(
        self,
        config,
        batch: int,
        max_tokens: int,
        valid: Tensor | None = None,
        order: Order | None = None,
        *,
        fixed: bool = False,
    ) -> KVCache:
        """An empty KV cache that fits this model.

        Args:
            config: :class:`adsa.CacheConfig`.
            batch: rows, both halves of guidance included.
            max_tokens: image tokens that will be decoded.
            valid: bool ``[batch, T]``, which condition tokens are no padding; None: all.
            order: bounds of another order than raster order (:class:`adsa.Order`); None: raster order.
            fixed: for :class:`~autoregressive.models.recorded.RecordedSteps`.
        """
        weight = self.tok_embeddings.weight
        return KVCache(
            config,
            n_layer=self.config.n_layer,
            batch=batch,
            n_kv_head=self.config.kv_heads,
            n_head=self.config.n_head,
            head_dim=self.config.head_dim,
            condition_tokens=self.config.cls_token_num,
            max_tokens=max_tokens,
            dtype=weight.dtype,
            device=weight.device,
            valid=valid,
            columns=self.config.grid_size,
            order=order,
            fixed=fixed,
        )

    def forward(
        self,
        idx: Tensor | None = None,
        cond_idx: Tensor | None = None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the loss where there are targets. One of three calls:

        * ``idx`` and ``cond_idx``: whole sequences, for training and for validation losses.
        * ``cond_idx`` and ``cache``: the condition enters the cache; logits for the first image token.
        * ``idx``, ``input_pos`` and ``cache``: image tokens enter the cache; logits for those after them.

        Args:
            idx: int ``[B, S]`` image tokens. In training ``tokens[:, :-1]``.
            cond_idx: int ``[B]`` class ids, or ``[B, T, caption_dim]`` text features.
            input_pos: int ``[S]`` positions of ``idx`` in the sequence, condition tokens counted.
            targets: int ``[B, N]``, the image tokens that the logits should predict.
            mask: bool ``[B, 1, L, L]``, who attends to whom, for whole sequences; None: causal.
            valid: ``[B]`` of 0 and 1, which samples count in the loss.
            cache: from :meth:`new_cache`.

        Returns:
            float32 logits ``[B, N, vocab_size]``, aligned with ``targets`` (N = S + 1 for whole sequences, 1 for the
            condition, S for image tokens), and the mean cross-entropy or None.
        """
        if cond_idx is not None:
            embeddings = self.cls_embedding(cond_idx)
            if idx is not None:
                embeddings = torch.cat([embeddings, self.tok_embeddings(idx)], dim=1)
        elif idx is not None and input_pos is not None and cache is not None:
            embeddings = self.tok_embeddings(idx)
        else:
            raise ValueError("forward needs cond_idx (with or without idx), or idx with input_pos and a cache")
        if idx is not None and idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} image tokens given, and block_size is {self.config.block_size}")
        if (cache is None) != (cond_idx is not None and idx is not None):
            raise ValueError("whole sequences (idx and cond_idx) go without a cache, anything else needs one")

        if self.freqs_cis.device != embeddings.device:
            self.freqs_cis = self.freqs_cis.to(embeddings.device)
        table = self.freqs_cis[: embeddings.shape[1]] if cond_idx is not None else self.freqs_cis[input_pos]

        x = self.tok_dropout(embeddings)
        for i, layer in enumerate(self.layers):
            x = layer(x, table, mask, None if cache is None else cache.layers[i])
        if cond_idx is not None:
            x = x[:, self.config.cls_token_num - 1 :]  # the last condition token predicts the first image token
        logits = self.output(self.norm(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

        if targets is None:
            return logits, None
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        if valid is None:
            return logits, losses.mean()
        weights = valid[:, None].expand(targets.shape).flatten().to(losses.dtype)
        return logits, (losses * weights).sum() / weights.sum().clamp(min=1)

    def get_fsdp_wrap_module_list(self) -> list[nn.Module]:
        return list(self.layers)


# name: (n_layer, n_head, dim). The last ones are this project's own, small enough for a laptop's CPU.
_SIZES = {
    "GPT-B": (12, 12, 768),  # 111M
    "GPT-L": (24, 16, 1024),  # 343M
    "GPT-XL": (36, 20, 1280),  # 775M
    "GPT-XXL": (48, 24, 1536),  # 1.4B
    "GPT-XXXL": (48, 40, 2560),  # 3.9B
    "GPT-1B": (22, 32, 2048),  # 1.2B
    "GPT-3B": (24, 32, 3200),  # 3.1B
    "GPT-7B": (32, 32, 4096),  # 6.6B
    "GPT-Demo": (8, 4, 256),
}


def _build(name: str, **kwargs) -> Transformer:
    n_layer, n_head, dim = _SIZES[name]
    return Transformer(ModelArgs(n_layer=n_layer, n_head=n_head, dim=dim, **kwargs))


GPT_models = {name: partial(_build, name) for name in _SIZES}
