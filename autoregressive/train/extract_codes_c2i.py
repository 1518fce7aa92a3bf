"""Turn images into tokenizer codes for train_c2i.py (one folder per class, as ImageNet) or train_t2i.py (any folders).

    python autoregressive/train/extract_codes_c2i.py --data-path imagenet/train --code-path codes/train384 \\
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --image-size 384 --ten-crop
    torchrun --nproc_per_node 8 autoregressive/train/extract_codes_c2i.py ...      # the same on eight GPUs
    python autoregressive/train/extract_codes_c2i.py --data-path photos/captions.jsonl ...     # with captions

Writes job.json (what the codes depend on), images.json (file names), codes.npy (uint16 or int32 [images, variants,
tokens], raster order), labels.npy (int32 [images]; -1: unreadable and skipped) and, once all is done, meta.json. An
interrupted job, started again with the same flags, goes on where it was.
"""

import argparse
import fnmatch
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from autoregressive.models.checkpoint import CheckpointError, load_model
from autoregressive.train.text_features import read_captions
from autoregressive.train.training import HelpFormatter, TrainingError, differences, join_processes
from tokenizer.files import atomic_file, fingerprint, remove_partial, write_json
from tokenizer.tokenizer_image.images import (
    ImageError,
    center_crop,
    image_to_tensor,
    list_image_folder,
    load_rgb,
)
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQ_models


class ExtractError(RuntimeError):
    """Flags that do not fit each other or an interrupted job's files; the message says what to change."""


def variants(image: Image.Image, args: argparse.Namespace, index: int) -> list[Image.Image]:
    """The views of one image that get codes; the plain centre crop is always the first.

    With --ten-crop: centre and corners of a crop --crop-range larger. With --jitter N: N more, slightly shrunk and
    shifted on white. With --flip: the mirror image of each, after them.
    """
    views = [center_crop(image, args.image_size)]
    size = args.image_size
    if args.ten_crop:
        large = center_crop(image, round(size * args.crop_range))
        far = large.width - size
        corners = [(far // 2, far // 2), (0, 0), (far, 0), (0, far), (far, far)]
        views = [large.crop((x, y, x + size, y + size)) for x, y in corners]
    rng = np.random.default_rng((args.global_seed, index))
    for _ in range(args.jitter):
        small = round(size * rng.uniform(0.9, 1.0))
        canvas = Image.new("RGB", (size, size), (255, 255, 255))
        corner = tuple(int(c) for c in rng.integers(0, size - small + 1, 2))
        canvas.paste(views[0].resize((small, small), Image.Resampling.BICUBIC), corner)
        views.append(canvas)
    return views + [ImageOps.mirror(view) for view in views] if args.flip else views


class VariantDataset(Dataset):
    """(index, images [V, 3, S, S] in [-1, 1]); the images are None for a file that can't be decoded."""

    def __init__(self, files: list[Path], indices: np.ndarray, args: argparse.Namespace):
        self.files, self.indices, self.args = files, indices, args

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str]:
        index = int(self.indices[position])
        try:
            image = load_rgb(self.files[index])
        except ImageError as error:
            return index, None, str(error)
        return index, torch.stack([image_to_tensor(view) for view in variants(image, self.args, index)]), ""


def blank_tokens(images: Tensor, downsample: int) -> Tensor:
    """Which tokens of images [B, 3, H, W] are pure white, and their eight neighbours too: bool [B, tokens].

    A tokenizer that sees the whole image gives such tokens hundreds of codes that all decode to white. A GPT would
    spend itself on predicting which; with one code for all, a plain background costs next to nothing.
    """
    ink = 1 - images.amin(1, keepdim=True)
    return (F.max_pool2d(ink, 3 * downsample, downsample, downsample) == 0).flatten(1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="images, one folder per class; or a captions file (.jsonl)")
    add("--code-path", type=Path, required=True, help="folder to write")
    add("--vq-model", choices=list(VQ_models), default="VQ-16")
    add("--vq-ckpt", type=Path, required=True)
    add("--codebook-size", type=int, help="default: the model's own")
    add("--codebook-embed-dim", type=int, default=8)
    add("--classes", nargs="+", metavar="GLOB", help="only class folders that match; they are numbered in sorted order")
    add("--skip-classes", nargs="+", metavar="GLOB", default=[], help="class folders to leave out")
    add("--image-size", type=int, default=256)
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="add the mirror image of every variant")
    add("--ten-crop", action="store_true", help="centre and corner crops instead of the centre crop")
    add("--crop-range", type=float, default=1.1, help="size of the image that --ten-crop cuts from, in image sizes")
    add("--jitter", type=int, default=0, help="further variants, slightly shrunk and shifted on white")
    add(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that can't be decoded, and list them in meta.json",
    )
    add("--blank", action="store_true", help="one code for all tokens that are white to beyond their neighbours")
    add("--batch-size", type=int, default=32, help="images per process, each with its variants")
    add("--global-seed", type=int, default=0)
    add("--num-workers", type=int, default=24)
    return parser.parse_args(argv)


def list_images(path: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of an image folder, or of a captions file: there an image's folder is its class."""
    if path.suffix != ".jsonl":
        return list_image_folder(path)
    files = [path.parent / name for name in read_captions(path)]
    classes = sorted({file.parent.name for file in files})
    number = {name: i for i, name in enumerate(classes)}
    return files, [number[file.parent.name] for file in files], classes


def select_classes(
    root: Path, patterns: list[str] | None, skipped: list[str] = ()
) -> tuple[list[Path], np.ndarray, list[str]]:
    """Files, labels and class names of the classes that match a pattern and no skipped one; see list_images."""
    files, labels, classes = list_images(root)

    def matches(name: str, globs: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, glob) for glob in globs)

    kept = [i for i, name in enumerate(classes) if matches(name, patterns or ["*"]) and not matches(name, skipped)]
    number = {old: new for new, old in enumerate(kept)}
    pairs = [(file, number[label]) for file, label in zip(files, labels, strict=True) if label in number]
    if not pairs:
        raise ExtractError(
            f"no images in the folders of {root} that --classes {' '.join(patterns or ['*'])} and "
            f"--skip-classes {' '.join(skipped)} leave"
        )
    return [file for file, _ in pairs], np.array([label for _, label in pairs], np.int32), [classes[i] for i in kept]


def describe_job(args: argparse.Namespace, config: ModelArgs, names: list[str], classes: list[str]) -> dict:
    """What the codes depend on, by the flag that says it."""
    tokenizer = fingerprint(args.vq_ckpt)
    digest = hashlib.sha256("\n".join([*classes, "", *names]).encode()).hexdigest()
    return {
        "--data-path": f"{len(names)} images of {len(classes)} classes, sha256 of their names {digest[:16]}",
        "--vq-model": args.vq_model,
        "--vq-ckpt": f"{tokenizer['bytes']} bytes, sha256 of blocks {tokenizer['sha256_of_blocks'][:16]}",
        "--codebook-size": config.codebook_size,
        "--codebook-embed-dim": config.codebook_embed_dim,
        "--image-size": args.image_size,
        "--flip": args.flip,
        "--ten-crop": args.ten_crop,
        "--crop-range": args.crop_range if args.ten_crop else None,
        "--jitter": args.jitter,
        "--global-seed": args.global_seed if args.jitter else None,
        "--blank": args.blank,
    }


def start_job(folder: Path, job: dict, names: list[str]) -> None:
    """Write job.json and images.json, or make sure that the folder is of this job. Raises ExtractError if it isn't."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    path = folder / "job.json"
    if path.exists():
        told = "; ".join(differences(json.loads(path.read_text()), job))
        if told:
            raise ExtractError(
                f"{folder} holds codes of another job: {told}. Give it the same to go on, or choose another --code-path"
            )
    elif (folder / "codes.npy").exists():
        raise ExtractError(
            f"{folder} holds codes but no job.json, so what they were made from can't be told: delete the folder, or "
            "choose another --code-path"
        )
    else:
        for name, content in (("images.json", names), ("job.json", job)):
            write_json(folder / name, content)


def create_codes(path: Path, shape: tuple[int, int, int], codebook_size: int) -> None:
    """Make the array on disk, if it isn't there: images not yet encoded hold the dtype's largest value."""
    if path.exists():
        return
    dtype = np.dtype(np.uint16 if codebook_size < 2**16 - 1 else np.int32)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    blank = np.full(shape[1:], np.iinfo(dtype).max, dtype).tobytes()
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(shape[0]):
            file.write(blank)


@torch.no_grad()
def extract(args: argparse.Namespace) -> None:
    """Fill the code folder; see the module's docstring."""
    accelerator = join_processes()
    rank, world, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    sizes = {"codebook_size": args.codebook_size} if args.codebook_size else {}
    model = VQ_models[args.vq_model](codebook_embed_dim=args.codebook_embed_dim, **sizes)
    load_model(model, args.vq_ckpt).eval().to(accelerator.device)
    downsample = model.config.downsample_size
    if args.image_size % downsample:
        raise ExtractError(f"--image-size {args.image_size} is not a multiple of {args.vq_model}'s {downsample} pixels")

    files, labels, classes = select_classes(args.data_path, args.classes, args.skip_classes)
    root = args.data_path.parent if args.data_path.suffix == ".jsonl" else args.data_path
    names = [file.relative_to(root).as_posix() for file in files]
    if main_process:
        start_job(args.code_path, describe_job(args, model.config, names, classes), names)
    accelerator.wait_for_everyone()
    if (args.code_path / "meta.json").exists():
        accelerator.print(f"{args.code_path} is complete (it has meta.json): nothing to do")
        return

    white = torch.ones(1, 3, args.image_size, args.image_size, device=accelerator.device)
    blank_code = model.encode(white)[2][2].cpu().mode().values.item() if args.blank else None
    views = ((5 if args.ten_crop else 1) + args.jitter) * (2 if args.flip else 1)
    shape = (len(files), views, (args.image_size // downsample) ** 2)
    if main_process:
        create_codes(args.code_path / "codes.npy", shape, model.config.codebook_size)
    accelerator.wait_for_everyone()
    codes = np.load(args.code_path / "codes.npy", mmap_mode="r+")
    pending = np.flatnonzero(codes[:, -1, -1] == np.iinfo(codes.dtype).max)[rank::world]
    accelerator.wait_for_everyone()  # or a slow process would take what a fast one has done for not its own

    loader = DataLoader(
        VariantDataset(files, pending, args), args.batch_size, num_workers=args.num_workers, collate_fn=list
    )
    for batch in tqdm(loader, disable=not main_process, desc="extract codes", unit="batch"):
        for _, images, error in batch:
            if images is None and not args.skip_unreadable:
                raise ExtractError(f"{error}, or pass --skip-unreadable")
        batch = [(index, images) for index, images, _ in batch if images is not None]
        if batch:
            x = torch.cat([images for _, images in batch]).to(accelerator.device)
            found = model.encode(x)[2][2].view(len(x), -1)
            if args.blank:
                found[blank_tokens(x, downsample)] = blank_code
            found = found.view(len(batch), views, -1).cpu().numpy()
            for (index, _), code in zip(batch, found, strict=True):
                codes[index] = code
    codes.flush()
    accelerator.wait_for_everyone()
    if not main_process:
        return
    unreadable = np.flatnonzero(codes[:, -1, -1] == np.iinfo(codes.dtype).max).tolist()
    labels[unreadable] = -1
    with atomic_file(args.code_path / "labels.npy") as file:
        np.save(file, labels)
    used = np.zeros(model.config.codebook_size, bool)
    for i in np.flatnonzero(labels >= 0):
        used[codes[i]] = True
    meta = {
        "tokenizer": fingerprint(args.vq_ckpt),
        "vq_model": args.vq_model,
        "codebook_size": model.config.codebook_size,
        "codebook_embed_dim": model.config.codebook_embed_dim,
        "codes_used": int(used.sum()),
        "image_size": args.image_size,
        "downsample_size": downsample,
        "blank_code": blank_code,
        "images": int((labels >= 0).sum()),
        "variants": views,
        "tokens": shape[2],
        "classes": classes,
        "unreadable": [names[i] for i in unreadable],
    }
    write_json(args.code_path / "meta.json", meta)
    size = f"{meta['images']} images x {views} variants x {shape[2]} tokens"
    print(f"{args.code_path}: {size}, {meta['codes_used']} codes in use")


def main(argv: list[str] | None = None) -> None:
    try:
        extract(parse_args(argv))
    except (ExtractError, TrainingError, ImageError, CheckpointError, OSError) as error:
        sys.exit(f"extract_codes_c2i: {error}")


if __name__ == "__main__":
    main()
