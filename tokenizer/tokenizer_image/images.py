"""Images in and out: crops, the [-1, 1] range and back, atomic PNG files, grids, and folders of images by class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from tokenizer.files import atomic_file

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageError(RuntimeError):
    """An image or an image folder that cannot be used; the message names the file and the way out."""


def load_rgb(path: str | Path) -> Image.Image:
    """Read an image file whole, as RGB, transparent pixels on white. Raises ImageError if it can't be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: not a readable image ({error}); replace or delete the file") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop to size x size: box-halve while the short side is at least twice the size, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    return from_uint8(np.asarray(image.convert("RGB")))


def from_uint8(array: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(array)).movedim(-1, -3).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]: 127.5 x + 128, clamped and truncated like LlamaGen."""
    return images.mul(127.5).add(128.0).clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def save_image_atomic(path: str | Path, image: np.ndarray | Image.Image) -> None:
    """Write uint8 [H, W, 3] (or a PIL image) as PNG; the name appears only once the file is whole."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def image_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    padding: int = 4,
    background: tuple[int, int, int] = (255, 255, 255),
    font_size: int = 12,
) -> Image.Image:
    """Equal-sized uint8 [H, W, 3] images in rows of `columns`, each with an optional caption below it."""
    if len(images) == 0 or columns < 1:
        raise ValueError(f"image_grid needs images and columns >= 1, got {len(images)} images, columns={columns}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    height, width = images[0].shape[:2]
    line = font_size + 6 if captions is not None else 0
    rows = -(-len(images) // columns)
    cell_w, cell_h = width + padding, height + line + padding
    grid = Image.new("RGB", (columns * cell_w + padding, rows * cell_h + padding), background)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(font_size)
    for i, image in enumerate(images):
        x, y = padding + (i % columns) * cell_w, padding + (i // columns) * cell_h
        grid.paste(Image.fromarray(image), (x, y))
        if captions is not None:
            text = captions[i]
            while text and draw.textlength(text, font=font) > width:
                text = text[:-1]
            draw.text((x + width // 2, y + height + 2), text, fill=(0, 0, 0), font=font, anchor="ma")
    return grid


def list_image_folder(root: str | Path) -> tuple[list[Path], list[int], list[str]]:
    """The images of root/<class folder>/..., sorted: (files, class index of each, class folder names).

    Raises ImageError if the folder is missing or holds no images.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageError(f"{root}: no such folder; expected one folder per class inside it (ImageFolder layout)")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in EXTENSIONS)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ImageError(f"{root}: no images ({', '.join(sorted(EXTENSIONS))}) in its {len(classes)} class folders")
    return files, labels, classes
