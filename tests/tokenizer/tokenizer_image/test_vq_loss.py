"""Values of the losses on inputs whose answer is known."""

import math

import pytest
import torch

from tokenizer.tokenizer_image.vq_loss import (
    LPIPS,
    LossError,
    PatchDiscriminator,
    adaptive_weight,
    color_loss,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)


def test_reconstruction_loss():
    x, y = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    assert [reconstruction_loss(kind, x, y).item() for kind in ("l1", "l2", "l1l2")] == [0.5, 0.25, 0.75]
    with pytest.raises(ValueError, match="l3"):
        reconstruction_loss("l3", x, y)


def test_color_loss_sees_hue_and_not_brightness():
    x = torch.zeros(1, 3, 16, 16)
    assert color_loss(x, x + 0.5).item() == pytest.approx(0, abs=1e-6)
    green = x + torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    assert color_loss(x, green).item() == pytest.approx(0.5 * (1 + 0.5))
    checkered = green * torch.tensor([1.0, -1.0]).repeat(8)  # no hue on average
    assert color_loss(x, checkered).item() == pytest.approx(0, abs=1e-6)


def test_gan_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss("hinge", real, fake) == pytest.approx(0.5 * (0.5 + 0.75))
    assert generator_loss("hinge", fake) == pytest.approx(0.75)
    zero = torch.zeros(2)
    assert discriminator_loss("vanilla", zero, zero).item() == pytest.approx(math.log(2))
    assert generator_loss("non-saturating", zero).item() == pytest.approx(math.log(2))
    for function, arguments in ((discriminator_loss, (zero, zero)), (generator_loss, (zero,))):
        with pytest.raises(ValueError, match="wasserstein"):
            function("wasserstein", *arguments)


def test_patch_discriminator_has_one_logit_per_patch_and_keeps_batches_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(ndf=4)
    real, fake = torch.rand(2, 3, 64, 64), 5 * torch.rand(2, 3, 64, 64)
    alone, (together, _) = discriminator(real), discriminator(real, fake)
    assert together.shape == (2, 1, 6, 6)
    assert torch.equal(together, alone[0])


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.ones(4, requires_grad=True)
    assert adaptive_weight((6 * weight).sum(), (2 * weight).sum(), weight).item() == pytest.approx(3, rel=1e-3)


def test_lpips_reads_the_packages_weights(tmp_path):
    torch.manual_seed(0)
    state, channels = {}, 3
    for s, (indices, width) in enumerate(zip(LPIPS.STAGES, LPIPS.CHANNELS, strict=True)):
        for index in indices:
            state[f"net.slice{s + 1}.{index}.weight"] = torch.randn(width, channels, 3, 3) / (9 * channels) ** 0.5
            state[f"net.slice{s + 1}.{index}.bias"] = torch.zeros(width)
            channels = width
        state[f"lin{s}.model.1.weight"] = torch.rand(1, width, 1, 1)
    torch.save(state, tmp_path / "lpips.pth")
    lpips = LPIPS(tmp_path / "lpips.pth")
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert lpips(x, x).item() == 0
    near = x + 0.1 * (y - x)
    assert 0 < lpips(x, near) < lpips(x, y)
    assert not any(p.requires_grad for p in lpips.parameters())

    del state["net.slice3.12.bias"]
    torch.save(state, tmp_path / "cut.pth")
    for name in ("cut.pth", "absent.pth"):
        with pytest.raises(LossError, match=name):
            LPIPS(tmp_path / name)
