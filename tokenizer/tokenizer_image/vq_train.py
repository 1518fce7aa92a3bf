"""Train an image tokenizer on a folder of images (one folder per class, as ImageNet; the classes are not used).

    python tokenizer/tokenizer_image/vq_train.py --data-path imagenet/train --val-path imagenet/val \\
        --lpips-weights lpips_vgg.pth --results-dir results/vq16
    torchrun --nproc_per_node 8 tokenizer/tokenizer_image/vq_train.py ...      # the same on eight GPUs

A run folder holds log.jsonl, checkpoints/, and samples/ (validation images above their reconstructions). Started again
with the same folder, a run goes on from its last checkpoint and makes the very steps an unbroken run would have made.
"""

import argparse
import hashlib
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch._functorch.config
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.models.checkpoint import CheckpointError, load_model
from autoregressive.train.training import (
    Ema,
    HelpFormatter,
    TrainingError,
    TrainingRun,
    add_training_flags,
    build_accelerator,
    build_optimizer,
    set_learning_rate,
    swapped_weights,
    writing,
)
from tokenizer.tokenizer_image.images import (
    ImageError,
    from_uint8,
    list_image_folder,
    load_rgb,
)
from tokenizer.tokenizer_image.reconstruction import load_images, reconstruct, save_pictures
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
from tokenizer.tokenizer_image.vq_model import USAGE_WINDOW, VQ_models, VQModel


class CropDataset(Dataset):
    """Random square crops, flipped half of the time; an item is a function of (seed, epoch, index) alone.

    The short side is first resized to size x u, u uniform in `resize_range`, but never enlarged beyond the file's own
    (unless that is smaller than the crop).
    """

    def __init__(self, files: list[Path], size: int, resize_range: tuple[float, float], seed: int, cache: bool):
        self.files, self.size, self.resize_range, self.seed = files, size, resize_range, seed
        self.cached = [np.asarray(load_rgb(path)) for path in files] if cache else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Image [3, size, size] in [-1, 1]."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image = Image.fromarray(self.cached[index]) if self.cached else load_rgb(self.files[index])
        short = min(image.size)
        target = max(self.size, min(short, round(self.size * rng.uniform(*self.resize_range))))
        if target != short:
            scale = target / short
            shape = (max(self.size, round(image.width * scale)), max(self.size, round(image.height * scale)))
            filter_ = Image.Resampling.BOX if scale <= 0.5 else Image.Resampling.BICUBIC
            image = image.resize(shape, filter_)
        left = rng.integers(image.width - self.size + 1)
        top = rng.integers(image.height - self.size + 1)
        array = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return from_uint8(array[:, ::-1] if rng.random() < 0.5 else array)


# May change when a run goes on, besides FREE_FLAGS: validation, and where things lie.
FREE_VQ_FLAGS = {"data_path", "val_path", "val_images", "val_image_size", "cache_images", "lpips_weights"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="training images, one folder per class")
    add("--val-path", type=Path, help="held-out images for PSNR and the pictures in samples/")
    add("--val-images", type=int, default=256, help="how many of them, spread evenly")
    add("--vq-model", choices=list(VQ_models), default="VQ-16")
    add("--vq-ckpt", type=Path, help="start from these weights (--finetune in LlamaGen)")
    add("--codebook-size", type=int, help="default: the model's own")
    add("--codebook-embed-dim", type=int, default=8)
    add("--codebook-l2-norm", action=argparse.BooleanOptionalAction, default=True)
    add("--commit-loss-beta", type=float, default=0.25)
    add("--entropy-loss-ratio", type=float, default=0.0)
    add(
        "--codebook-restart-every",
        type=int,
        default=0,
        help=f"steps between restarts of entries that none of the last {USAGE_WINDOW} tokens used; 0: never",
    )
    add("--codebook-restart-until", type=int, help="the last step at which entries are restarted; default: the end")
    add(
        "--bypass",
        type=float,
        default=0.0,
        help="share of images decoded unquantised, so that codes don't miss features",
    )
    add("--bypass-until", type=int, default=0, help="the step at which that ends")
    add("--dropout-p", type=float, default=0.0)
    add("--freeze-encoder", action="store_true", help="train the decoder alone; existing codes stay valid")
    add("--image-size", type=int, default=256, help="side of the training crops")
    add("--val-image-size", type=int, help="side of the validation images; default: --image-size")
    add("--resize-range", type=float, nargs=2, default=(1.0, 1.25), help="short side before cropping, in crop sides")
    add("--cache-images", action="store_true", help="decode all training images into memory first")
    add("--reconstruction-weight", type=float, default=1.0)
    add("--reconstruction-loss", choices=("l1", "l2", "l1l2"), default="l2")
    add("--color-weight", type=float, default=0.0, help="of the error of local hues; helps small models without LPIPS")
    add("--codebook-weight", type=float, default=1.0, help="of the codebook's losses together")
    add("--perceptual-weight", type=float, default=1.0)
    add("--lpips-weights", type=Path, help='state dict of lpips.LPIPS(net="vgg"); needed unless --perceptual-weight 0')
    add("--disc-weight", type=float, default=0.5, help="0: no GAN")
    add("--disc-start", type=int, default=20000, help="the step at which the GAN starts")
    add("--disc-dim", type=int, default=64, help="channels of its first layer")
    add("--disc-loss", choices=("hinge", "vanilla"), default="hinge")
    add("--gen-loss", choices=("hinge", "non-saturating"), default="hinge")
    add("--disc-adaptive-weight", action="store_true")
    add_training_flags(
        parser, epochs=40, global_batch_size=128, num_workers=16, beta2=0.95, weight_decay=5e-2, ema_decay=0.9999
    )
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace) -> VQModel:
    """The tokenizer that the flags describe, with weights from --vq-ckpt if given."""
    sizes = {"codebook_size": args.codebook_size} if args.codebook_size else {}
    model = VQ_models[args.vq_model](
        codebook_embed_dim=args.codebook_embed_dim,
        codebook_l2_norm=args.codebook_l2_norm,
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=args.entropy_loss_ratio,
        dropout_p=args.dropout_p,
        **sizes,
    )
    if args.vq_ckpt:
        load_model(model, args.vq_ckpt)
    if args.freeze_encoder:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    return model


def train(args: argparse.Namespace) -> None:
    """Run until the last step, or until SIGTERM / SIGINT, which saves a checkpoint first."""
    if args.perceptual_weight and not args.lpips_weights:
        raise TrainingError("--perceptual-weight needs --lpips-weights FILE; without it pass --perceptual-weight 0")
    if args.freeze_encoder and args.codebook_restart_every:
        raise TrainingError(
            "--codebook-restart-every moves the codebook, which --freeze-encoder keeps: drop one of them"
        )
    if args.gradient_accumulation_steps != 1:
        raise TrainingError("--gradient-accumulation-steps is not supported by this trainer; use more processes")
    accelerator = build_accelerator(args)
    device = accelerator.device
    torch.manual_seed(args.global_seed)
    model = build_model(args).to(device)
    optimizer = build_optimizer(model, args)
    gan = args.disc_weight > 0
    discriminator = PatchDiscriminator(args.disc_dim).to(device) if gan else None
    disc_optimizer = build_optimizer(discriminator, args) if gan else None
    lpips = LPIPS(args.lpips_weights).to(device) if args.perceptual_weight else None
    ema = Ema(model, args.ema_decay) if args.ema else None

    files, _, _ = list_image_folder(args.data_path)
    names = "\n".join(file.relative_to(args.data_path).as_posix() for file in files)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    dataset = CropDataset(files, args.image_size, tuple(args.resize_range), args.global_seed, args.cache_images)
    parts = {"model": model, "optimizer": optimizer}
    if gan:
        parts |= {"discriminator": discriminator, "optimizer_disc": disc_optimizer}
    run = TrainingRun(
        args,
        accelerator,
        len(files),
        {"the images": f"{len(files)}, sha256 of their names {digest}"},
        parts,
        ema,
        about={"name": args.vq_model, "config": asdict(model.config)},
        free=FREE_VQ_FLAGS,
    )
    validation = []
    if args.val_path and accelerator.is_main_process:
        validation = load_images(args.val_path, args.val_image_size or args.image_size, args.val_images)

    # channels_last: the convolution kernels of every device prefer it
    model = model.to(memory_format=torch.channels_last)
    raw = model
    model, optimizer = accelerator.prepare(model, optimizer)
    if gan:
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)
    if args.compile and args.disc_adaptive_weight:
        torch._functorch.config.donated_buffer = False  # its gradients go through the compiled graph more than once
    forward = torch.compile(model) if args.compile else model
    raw.train()
    if args.freeze_encoder:
        raw.quantize.eval()  # no codebook losses, and the usage window stays as it is

    def evaluate() -> None:
        if not validation:
            return
        with swapped_weights(raw, ema.weights if ema else None):
            metrics, reconstructions = reconstruct(raw, validation, device)
        if args.freeze_encoder:
            raw.quantize.eval()
        run.log.write(step=run.step, **metrics)
        path = args.results_dir / "samples" / f"{run.step:07d}.png"
        with writing(path):
            save_pictures(path, validation, reconstructions)
        run.meter.reset()

    tokens = args.global_batch_size // accelerator.num_processes * (args.image_size // raw.config.downsample_size) ** 2
    restart_every = args.codebook_restart_every
    restart_until = run.steps if args.codebook_restart_until is None else args.codebook_restart_until
    with closing(run.batches(dataset)) as batches:
        for x in batches:
            x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
            rate = run.learning_rate()
            set_learning_rate(optimizer, rate)
            known = run.step * tokens >= USAGE_WINDOW  # which entries are used: the window is full
            if restart_every and run.step % restart_every == 0 and run.step <= restart_until and known:
                restart_codes(raw, x, accelerator, optimizer)

            raw.quantize.bypass = args.bypass if run.step < args.bypass_until else 0.0
            reconstruction, (vq, commit, entropy, usage) = forward(x)
            rec = args.reconstruction_weight * reconstruction_loss(args.reconstruction_loss, x, reconstruction)
            values = {"rec": rec}
            loss = rec
            if args.color_weight:
                values["color"] = color = color_loss(x, reconstruction)
                loss = loss + args.color_weight * color
            if lpips:
                values["perceptual"] = perceptual = lpips(x, reconstruction)
                loss = loss + args.perceptual_weight * perceptual
            gan_now = gan and run.step >= args.disc_start
            if gan_now:
                # not through DDP, which would wait for gradients of the discriminator
                critic = accelerator.unwrap_model(discriminator).requires_grad_(False)
                adversarial = generator_loss(args.gen_loss, critic(reconstruction)[0])
                weight = args.disc_weight
                if args.disc_adaptive_weight:
                    weight = weight * adaptive_weight(loss, adversarial, raw.decoder.last_layer)
                values["gen"] = adversarial
                loss = loss + weight * adversarial
            if vq is not None:
                loss = loss + args.codebook_weight * (vq + commit + entropy)
                values |= {"vq": vq, "commit": commit, "usage": usage}
            values["loss"] = loss
            accelerator.backward(loss)
            if args.max_grad_norm:
                values["grad_norm"] = accelerator.clip_grad_norm_(raw.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update(raw)

            if gan_now:
                set_learning_rate(disc_optimizer, rate)
                critic.requires_grad_(True)
                real, fake = discriminator(x, reconstruction.detach())
                values["disc"] = disc = discriminator_loss(args.disc_loss, real, fake)
                accelerator.backward(args.disc_weight * disc)
                if args.max_grad_norm:
                    accelerator.clip_grad_norm_(discriminator.parameters(), args.max_grad_norm)
                disc_optimizer.step()
                disc_optimizer.zero_grad(set_to_none=True)

            run.count(values)
            if run.due(args.eval_every):
                evaluate()
            if run.due(args.ckpt_every):
                run.save()
    run.finish()


@torch.no_grad()
def restart_codes(model: VQModel, x: Tensor, accelerator, optimizer) -> None:
    """Restart the codebook's unused entries from the main process's batch, and hand the result to all."""
    weight = model.quantize.embedding.weight
    before = weight.detach().clone()
    model.quantize.restart_dead_codes(model.encode_features(x))
    if accelerator.num_processes > 1:
        weight.copy_(broadcast(weight.detach().clone(), from_process=0))
    moved = (weight != before).any(1)
    for name in ("exp_avg", "exp_avg_sq"):  # the momentum of a dead entry would drag its successor away
        state = optimizer.state.get(weight, {})
        if name in state:
            state[name][moved] = 0


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, ImageError, LossError, CheckpointError) as error:
        sys.exit(f"vq_train: {error}")


if __name__ == "__main__":
    main()
