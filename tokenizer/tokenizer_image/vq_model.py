"""The image tokenizer: a convolutional encoder and decoder around an l2-normalised codebook (LlamaGen's VQ-GAN).

Parameter names and shapes are those of LlamaGen's released `vq_ds16_c2i.pt` and `vq_ds8_c2i.pt`, which load strictly.
`VQ_models` names the registered sizes; "VQ-8-Demo" is the small one that ships with the project.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.pretrained import Pretrained

USAGE_WINDOW = 65536  # how many of the last indices `codebook_used` remembers; fixed by the released checkpoints


@dataclass
class ModelArgs:
    """Sizes of a tokenizer. The defaults are LlamaGen's; `ch` and `num_res_blocks` are constants there."""

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    codebook_show_usage: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    encoder_ch_mult: Sequence[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_ch_mult: Sequence[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    z_channels: int = 256
    dropout_p: float = 0.0
    ch: int = 128
    num_res_blocks: int = 2  # of each encoder level; a decoder level has one more

    @property
    def downsample_size(self) -> int:
        """Pixels along one side of a token."""
        return 2 ** (len(self.encoder_ch_mult) - 1)


def nonlinearity(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as divide a small model's channels evenly."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with pre-normalisation, added to (a 1x1 projection of) the input."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2) for proj in (self.q, self.k, self.v))  # [B, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves height and width. The padding is on the right and below only, as in the released weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks (attention after each, if asked for), then a change of resolution, if any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float):
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, dropout) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


def _middle(channels: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(
        [ResnetBlock(channels, channels, dropout), AttnBlock(channels), ResnetBlock(channels, channels, dropout)]
    )


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> features [B, z_channels, H/f, W/f]."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int, dropout: float):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        channels, last = ch, len(ch_mult) - 1
        for i, mult in enumerate(ch_mult):
            level = Level(channels, ch * mult, num_res_blocks, i == last, dropout)
            channels = ch * mult
            if i < last:
                level.downsample = Downsample(channels)
            self.conv_blocks.append(level)
        self.mid = _middle(channels, dropout)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            h = block(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] -> image [B, 3, f*h, f*w]."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int, dropout: float):
        super().__init__()
        channels, last = ch * ch_mult[-1], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = _middle(channels, dropout)
        self.conv_blocks = nn.ModuleList()
        for i, mult in enumerate(reversed(ch_mult)):
            level = Level(channels, ch * mult, num_res_blocks + 1, i == 0, dropout)
            channels = ch * mult
            if i < last:
                level.upsample = Upsample(channels)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the adaptive GAN weight compares gradients at."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            h = block(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class VectorQuantizer(nn.Module):
    """Nearest codebook entry, with straight-through gradients; both sides are l2-normalised at every use if asked."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_e, self.e_dim, self.l2_norm = args.codebook_size, args.codebook_embed_dim, args.codebook_l2_norm
        self.beta, self.entropy_loss_ratio = args.commit_loss_beta, args.entropy_loss_ratio
        self.show_usage = args.codebook_show_usage
        self.bypass = 0.0  # share of images that training decodes from their unquantised features; set by the trainer
        self.embedding = nn.Embedding(self.n_e, self.e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / self.n_e, 1.0 / self.n_e)
        if self.l2_norm:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        if self.show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))

    def codebook(self) -> Tensor:
        """The entries as they are compared and returned, [n_e, e_dim]."""
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight

    def forward(self, z: Tensor) -> tuple[Tensor, tuple, tuple]:
        """Quantise z [B, e_dim, h, w].

        Returns (z_q like z, (vq, commitment, entropy loss, usage), (None, None, indices [B*h*w] in raster order)); the
        losses are None and usage is 0 outside of training.
        """
        with torch.autocast(z.device.type, enabled=False):  # in half precision, near entries change places
            z_q, losses, indices = self._quantize(z.to(torch.promote_types(z.dtype, torch.float32)))
        return z_q.to(z.dtype), losses, (None, None, indices)

    def _quantize(self, z: Tensor) -> tuple[Tensor, tuple, Tensor]:
        b, c, h, w = z.shape
        z = z.permute(0, 2, 3, 1).reshape(-1, c)
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        codebook = self.codebook().to(z.dtype)
        distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
        indices = distances.argmin(1)
        z_q = codebook[indices]

        vq_loss = commit_loss = entropy_loss = None
        usage = 0
        if self.training:
            vq_loss = (z_q - z.detach()).square().mean()
            commit_loss = self.beta * (z_q.detach() - z).square().mean()
            entropy_loss = self.entropy_loss_ratio * _entropy_loss(-distances) if self.entropy_loss_ratio else 0.0
            if self.show_usage:
                usage = self._record(indices)
            if self.bypass:
                skipped = torch.rand(b, 1, 1, device=z.device) < self.bypass
                z_q = torch.where(skipped, z.view(b, h * w, c), z_q.view(b, h * w, c)).view(-1, c)
        z_q = z + (z_q - z).detach()
        return z_q.view(b, h, w, c).permute(0, 3, 1, 2), (vq_loss, commit_loss, entropy_loss, usage), indices

    def _record(self, indices: Tensor) -> Tensor:
        """Slide the window of used indices on; return the fraction of entries within it."""
        recent = indices[-USAGE_WINDOW:].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat([self.codebook_used[recent.numel() :], recent]))
        used = torch.zeros(self.n_e, device=indices.device).scatter_(0, self.codebook_used.long(), 1.0)
        return used.mean()

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None, channel_first=True) -> Tensor:
        """Rows of the codebook for integer indices of any layout.

        shape is (B, C, H, W) with channel_first, (B, H, W, C) without; None gives [numel, e_dim].
        """
        z_q = self.codebook()[indices.reshape(-1).long()]
        if shape is None:
            return z_q
        if not channel_first:
            return z_q.view(tuple(shape))
        b, c, h, w = shape
        return z_q.view(b, h, w, c).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def restart_dead_codes(self, z: Tensor) -> int:
        """Move entries that the usage window has not seen onto rows drawn from encoder outputs z [B, e_dim, h, w].

        Returns how many were moved. Draws from torch's global generator.
        """
        dead = torch.ones(self.n_e, dtype=torch.bool, device=z.device)
        dead[self.codebook_used.long()] = False
        z = z.permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        count = min(int(dead.sum()), z.shape[0])
        chosen = dead.nonzero().flatten()[torch.randperm(int(dead.sum()))[:count]]
        self.embedding.weight[chosen] = z[torch.randperm(z.shape[0])[:count]].to(self.embedding.weight.dtype)
        return count


def _entropy_loss(affinity: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each sample's soft assignment minus the entropy of the mean assignment; affinity [N, n_e]."""
    log_p = F.log_softmax(affinity / temperature, dim=-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


class VQModel(nn.Module, Pretrained, library_name="adsa"):
    """Images in [-1, 1], [B, 3, H, W], to codes and back; H and W are multiples of `config.downsample_size`."""

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config = config
        sizes = (config.num_res_blocks, config.z_channels, config.dropout_p)
        self.encoder = Encoder(config.ch, config.encoder_ch_mult, *sizes)
        self.decoder = Decoder(config.ch, config.decoder_ch_mult, *sizes)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def encode_features(self, x: Tensor) -> Tensor:
        """What the quantiser is given: [B, codebook_embed_dim, H/f, W/f], before normalisation."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, tuple, tuple]:
        """x [B, 3, H, W] -> (quant [B, C, h, w], losses, (None, None, indices)); see VectorQuantizer.forward."""
        return self.quantize(self.encode_features(x))

    def decode(self, quant: Tensor) -> Tensor:
        """quant [B, C, h, w] -> image [B, 3, H, W], nominally in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: Sequence[int], channel_first: bool = True) -> Tensor:
        """Integer codes with B*h*w elements, shape (B, codebook_embed_dim, h, w) -> image [B, 3, H, W], not clamped."""
        return self.decode(self.quantize.get_codebook_entry(code_b, shape, channel_first))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple]:
        """x [B, 3, H, W] -> (reconstruction like x, losses)."""
        quant, losses, _ = self.encode(x)
        return self.decode(quant), losses


def _register(**sizes):
    def build(**kwargs) -> VQModel:
        return VQModel(ModelArgs(**{**sizes, **kwargs}))

    return build


VQ_models = {
    "VQ-16": _register(encoder_ch_mult=[1, 1, 2, 2, 4], decoder_ch_mult=[1, 1, 2, 2, 4]),
    "VQ-8": _register(encoder_ch_mult=[1, 2, 2, 4], decoder_ch_mult=[1, 2, 2, 4]),
    "VQ-8-Demo": _register(
        encoder_ch_mult=[1, 2, 4, 8],
        decoder_ch_mult=[1, 2, 4, 8],
        ch=16,
        num_res_blocks=1,
        z_channels=128,
        codebook_size=4096,
    ),
}
