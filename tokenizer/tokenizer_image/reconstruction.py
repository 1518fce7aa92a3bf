"""Measure a tokenizer: reconstruct a folder of images, print PSNR, colour error and codebook use as JSON.

    python tokenizer/tokenizer_image/reconstruction.py --data-path imagenet/val --image-size 384 \\
        --vq-model VQ-16 --vq-ckpt pretrained_models/vq_ds16_c2i.pt --results-dir results/reconstruction

--results-dir gets pictures.png (originals above reconstructions) and metrics.json.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from autoregressive.models.checkpoint import CheckpointError, load_model
from tokenizer.tokenizer_image.images import (
    ImageError,
    center_crop,
    from_uint8,
    image_grid,
    list_image_folder,
    load_rgb,
    save_image_atomic,
    to_uint8,
)
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel


def load_images(root: Path, size: int, count: int) -> list[np.ndarray]:
    """`count` images of an image folder (0: all), spread evenly, as uint8 [size, size, 3]."""
    files, _, _ = list_image_folder(root)
    chosen = np.linspace(0, len(files) - 1, min(count or len(files), len(files))).astype(int)
    return [np.asarray(center_crop(load_rgb(files[i]), size)) for i in chosen]


@torch.no_grad()
def reconstruct(model: VQModel, images: list[np.ndarray], device: torch.device, batch: int = 16):
    """Reconstruct whole images.

    Returns ({"val_psnr": mean over images, in dB, "val_color_error": mean |difference| of an image's mean colour, in
    255ths, "val_codes_used": how many different codes}, the reconstructions as uint8 [H, W, 3]).
    """
    model.eval()
    reconstructions, codes = [], []
    for i in range(0, len(images), batch):
        x = from_uint8(np.stack(images[i : i + batch])).to(device)
        quant, _, (_, _, indices) = model.encode(x)
        reconstructions += list(to_uint8(model.decode(quant)))
        codes.append(indices.cpu())
    model.train()
    a, b = np.stack(images).astype(np.float32), np.stack(reconstructions).astype(np.float32)
    error = np.square(a - b).mean((1, 2, 3))
    metrics = {
        "val_psnr": float((10 * np.log10(255**2 / np.maximum(error, 1e-3))).mean()),
        "val_color_error": float(np.abs(a.mean((1, 2)) - b.mean((1, 2))).mean()),
        "val_codes_used": int(torch.cat(codes).unique().numel()),
    }
    return metrics, reconstructions


def save_pictures(path: Path, images: list[np.ndarray], reconstructions: list[np.ndarray], columns: int = 12) -> None:
    """Rows of originals, each above the row of its reconstructions."""
    chosen = np.linspace(0, len(images) - 1, min(3 * columns, len(images))).astype(int)
    rows = []
    for start in range(0, len(chosen), columns):
        row = chosen[start : start + columns]
        blank = [np.full_like(images[0], 255)] * (columns - len(row))
        rows += [images[i] for i in row] + blank + [reconstructions[i] for i in row] + blank
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_atomic(path, image_grid(rows, columns, padding=2))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="images, one folder per class")
    add("--vq-model", choices=list(VQ_models), default="VQ-16")
    add("--vq-ckpt", type=Path, required=True)
    add("--codebook-size", type=int, help="default: the model's own")
    add("--codebook-embed-dim", type=int, default=8)
    add("--image-size", type=int, default=256)
    add("--images", type=int, default=0, help="how many, spread evenly over the folder; 0: all")
    add("--results-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        sizes = {"codebook_size": args.codebook_size} if args.codebook_size else {}
        model = VQ_models[args.vq_model](codebook_embed_dim=args.codebook_embed_dim, **sizes)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        load_model(model, args.vq_ckpt, device=device)
        images = load_images(args.data_path, args.image_size, args.images)
    except (ImageError, CheckpointError) as error:
        sys.exit(f"reconstruction: {error}")
    metrics, reconstructions = reconstruct(model, images, device)
    metrics = {name.removeprefix("val_"): value for name, value in metrics.items()} | {"images": len(images)}
    save_pictures(args.results_dir / "pictures.png", images, reconstructions)
    (args.results_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
