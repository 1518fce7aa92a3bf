"""Losses of the tokenizer: reconstruction, perceptual (LPIPS), and a PatchGAN with its adaptive weight."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LossError(RuntimeError):
    """Loss weights that can't be used; the message names the file and the way out."""


def reconstruction_loss(kind: str, x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean "l1" or "l2" (squared) error, or "l1l2", the sum of both."""
    if kind not in ("l1", "l2", "l1l2"):
        raise ValueError(f"reconstruction loss {kind!r}; expected l1, l2 or l1l2")
    loss = x.new_zeros(())
    if "l1" in kind:
        loss = loss + F.l1_loss(reconstruction, x)
    if "l2" in kind:
        loss = loss + F.mse_loss(reconstruction, x)
    return loss


def color_loss(x: Tensor, reconstruction: Tensor, cell: int = 8) -> Tensor:
    """Mean absolute error of the two opponent colours (red-green, yellow-blue) of cell x cell means.

    Pixel losses are mostly brightness: a small tokenizer driven by them alone learns shapes long before hues.
    """
    red, green, blue = F.avg_pool2d(reconstruction - x, cell).unbind(1)
    return 0.5 * ((red - green).abs().mean() + (0.5 * (red + green) - blue).abs().mean())


class LPIPS(nn.Module):
    """Learned perceptual distance over five stages of VGG16 (Zhang et al. 2018, arXiv:1801.03924).

    Args:
        path: state dict of `lpips.LPIPS(net="vgg")` saved with torch.save, which holds VGG16 and the linear heads.
    """

    # the convolutions of VGG16's five stages, by their index in torchvision's vgg16().features
    STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, path: str | Path):
        super().__init__()
        channels = 3
        self.stages, self.heads = nn.ModuleList(), nn.ModuleList()
        for indices, width in zip(self.STAGES, self.CHANNELS, strict=True):
            convs = []
            for _ in indices:
                convs.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.stages.append(nn.ModuleList(convs))
            self.heads.append(nn.Conv2d(width, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self._load(Path(path))
        self.eval().requires_grad_(False)

    def _load(self, path: Path) -> None:
        try:
            given = torch.load(path, map_location="cpu", weights_only=True)
            state = {}
            for s, indices in enumerate(self.STAGES):
                for i, index in enumerate(indices):
                    for kind in ("weight", "bias"):
                        state[f"stages.{s}.{i}.{kind}"] = given[f"net.slice{s + 1}.{index}.{kind}"]
                state[f"heads.{s}.weight"] = given[f"lin{s}.model.1.weight"]
            self.load_state_dict(state | {"shift": self.shift, "scale": self.scale})
        except Exception as error:
            raise LossError(
                f'{path}: not the state dict of lpips.LPIPS(net="vgg") ({error!r}); make it with that package '
                "(torch.save(model.state_dict(), path)) or train with --perceptual-weight 0"
            ) from error

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of two batches [B, 3, H, W] in [-1, 1]."""
        features = (torch.cat([x, y]) - self.shift) / self.scale
        total = x.new_zeros(())
        for s, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if s:
                features = F.max_pool2d(features, 2)
            for conv in stage:
                features = F.relu(conv(features))
            unit_x, unit_y = F.normalize(features, dim=1, eps=1e-10).chunk(2)
            total = total + head((unit_x - unit_y).square()).mean()
        return total


class PatchDiscriminator(nn.Module):
    """PatchGAN: one real/fake logit per overlapping patch (Isola et al. 2017, arXiv:1611.07004)."""

    def __init__(self, ndf: int = 64, layers: int = 3):
        super().__init__()
        blocks = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = ndf
        for i in range(1, layers + 1):
            width = ndf * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        blocks.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """Logits [B, 1, h, w] of each of the batches [B, 3, H, W], which is normalised by its own statistics alone."""
        return [self.main(x) for x in batches]


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """ "hinge" or "vanilla" loss of the discriminator's logits."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ValueError(f"discriminator loss {kind!r}; expected hinge or vanilla")


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """ "hinge" or "non-saturating" loss of the decoder, from the discriminator's logits of its images."""
    if kind == "hinge":
        return -fake.mean()
    if kind == "non-saturating":
        return F.softplus(-fake).mean()
    raise ValueError(f"generator loss {kind!r}; expected hinge or non-saturating")


def adaptive_weight(rec_loss: Tensor, gan_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last layer (Esser et al. 2021, arXiv:2012.09841)."""
    rec_grad = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)[0]
    gan_grad = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)[0]
    return (rec_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
