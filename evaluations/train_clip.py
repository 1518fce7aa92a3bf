"""Train a small CLIP on captioned images: an image tower, and a projection of MiniLM's text features.

    python evaluations/train_clip.py --config pretrained_models/demo/clip/open_clip_config.json \\
        --captions photos/captions.jsonl --val-captions photos/captions_val.jsonl --results-dir results/clip
    torchrun --nproc_per_node 8 evaluations/train_clip.py ...      # the same on eight GPUs

A captions file has an image a line: {"image": "folder/name.png", "captions": ["a cat", "a black cat"]}. Each epoch
draws one of an image's captions and a random crop. MiniLM stays as it is, so that its features are made once. The
config is open_clip's, with sentence-transformers/all-MiniLM-L6-v2 as hf_model_name.

A run folder holds log.jsonl, checkpoints/ and text_features.npz. Started again with the same folder, a run goes on from
its last checkpoint and makes the very steps an unbroken run would have made. export.py makes weights of it.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm import tqdm

from autoregressive.train.text_features import read_captions, texts_of
from autoregressive.train.training import (
    Ema,
    HelpFormatter,
    TrainingError,
    TrainingRun,
    add_training_flags,
    build_accelerator,
    build_optimizer,
    seed_step,
    set_learning_rate,
    swapped_weights,
    writing,
)
from evaluations.clip import Squares, image_extractor, minilm_clip
from evaluations.extractors import EvaluationError, Resized
from evaluations.features import Features, kept_features, write_features
from evaluations.retrieval import CaptionedImages, retrieval
from tokenizer.tokenizer_image.images import ImageError, load_rgb
from tokenizer.tokenizer_text.encoder import TextEncoderError

CROP_AREA, CROP_RATIO = (0.6, 1.0), (0.85, 1.18)  # of the random crops
JITTER = 0.2  # of brightness, contrast and saturation; hues are left alone, since captions name colours
MAX_SCALE = 100.0  # of the logits, as in CLIP


class Trained(nn.Module):
    """The parts of a CLIP that are trained, under the names that they have there."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.visual, self.logit_scale = clip.visual, clip.logit_scale
        self.text = nn.ModuleDict({"proj": clip.text.proj})

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of length 1, [B, D] each, and the scale of the logits.

        Args:
            images: normalised, [B, 3, size, size].
            features: MiniLM's, [B, C].
        """
        return F.normalize(self.encode_image(images), dim=-1), self.embed_texts(features), self.logit_scale.exp()

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def embed_texts(self, features: Tensor) -> Tensor:
        return F.normalize(self.text["proj"](features), dim=-1)


class CropDataset(Dataset):
    """Random crops with one of their captions; an item is a function of (seed, epoch, index) alone.

    An item is (image [3, size, size], normalised; text features [C]).

    Args:
        folder: what the images' names are relative to.
        captions: by image.
        features: of texts, [texts, C].
        place: of each text in `features`.
        tower: for its size and its mean and deviation of colours.
        seed: of crops, jitter and captions.
    """

    def __init__(
        self,
        folder: Path,
        captions: dict[str, list[str]],
        features: Tensor,
        place: dict[str, int],
        tower: Resized,
        seed: int,
    ):
        self.files = [folder / name for name in captions]
        self.texts = [[place[text] for text in texts] for texts in captions.values()]
        self.features, self.seed = features, seed
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(tower.size, CROP_AREA, CROP_RATIO, transforms.InterpolationMode.BICUBIC),
                transforms.ColorJitter(JITTER, JITTER, JITTER),
                transforms.ToTensor(),
                transforms.Normalize(tower.mean.flatten().tolist(), tower.std.flatten().tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        texts = self.texts[index]
        with torch.random.fork_rng(devices=[]):
            seed_step(self.seed, epoch, index)
            text = texts[int(torch.randint(len(texts), ()))]
            return self.transform(load_rgb(self.files[index])), self.features[text]


@torch.inference_mode()
def text_features(
    clip: nn.Module, tokenize: Callable[[list[str]], Tensor], texts: list[str], device: torch.device, keep: Path
) -> Tensor:
    """What the text tower makes of texts before its projection, float32 [N, C]; read from a file if they are there."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    found = kept_features(keep, digest)
    if found is None:
        tower = clip.text.to(device).eval()
        proj, tower.proj = tower.proj, nn.Identity()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length need little padding
        features = None
        for start in tqdm(range(0, len(texts), 64), desc="text features", unit=" x 64 texts", disable=None):
            part = order[start : start + 64]
            rows = tower(tokenize([texts[i] for i in part]).to(device)).cpu().numpy()
            features = np.empty((len(texts), rows.shape[1]), np.float32) if features is None else features
            features[part] = rows
        tower.proj = proj
        found = Features("minilm", digest[:16], 0, np.empty((0, 2), int), features)
        with writing(keep):
            keep.parent.mkdir(parents=True, exist_ok=True)
            write_features(keep, found, digest)
    return torch.from_numpy(found.features)


@torch.no_grad()
def accuracy(model: Trained, tower: Resized, images: Tensor, features: Tensor) -> dict[str, float]:
    """Retrieval accuracy of uint8 images [N, 3, size, size] and MiniLM's features of their captions [N, C]."""
    embedded = torch.cat([F.normalize(tower(part)["features"], dim=-1) for part in images.split(64)])
    found = retrieval(embedded.cpu().numpy(), model.embed_texts(features).cpu().numpy())
    return {f"val_{name}": value for name, value in found.items()}


# May change when a run goes on, besides FREE_FLAGS: files that are told by their content, and validation.
FREE_CLIP_FLAGS = {"config", "captions", "val_captions"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="open_clip_config.json of the model")
    add("--captions", type=Path, required=True, help="captions file (.jsonl) of the training images")
    add("--val-captions", type=Path, help="the same of held-out images, for retrieval accuracy by their first captions")
    add_training_flags(parser, epochs=40, lr=1e-3, lr_schedule="cosine", beta2=0.98, weight_decay=0.1, num_workers=4)
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Run until the last step, or until SIGTERM / SIGINT, which saves a checkpoint first."""
    if args.gradient_accumulation_steps != 1:
        raise TrainingError(
            "--gradient-accumulation-steps: images are told from all others of their step, so that it can't be made in "
            "parts; use more processes"
        )
    accelerator = build_accelerator(args)
    device = accelerator.device
    try:
        config = json.loads(args.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{args.config}: not readable as JSON ({error})") from error
    captions = read_captions(args.captions)
    held_out = CaptionedImages(args.val_captions) if args.val_captions else None

    torch.manual_seed(args.global_seed)
    clip, tokenize = minilm_clip(config)
    texts = list(dict.fromkeys(texts_of(captions) + (held_out.texts if held_out else [])))
    with accelerator.local_main_process_first():
        features = text_features(clip, tokenize, texts, device, args.results_dir / "text_features.npz")
    place = {text: index for index, text in enumerate(texts)}
    model = Trained(clip).to(device)
    del clip  # and MiniLM with it
    tower = image_extractor(model).to(device)
    dataset = CropDataset(args.captions.parent, captions, features, place, tower, args.global_seed)

    optimizer = build_optimizer(model, args)
    ema = Ema(model, args.ema_decay) if args.ema else None
    digest = hashlib.sha256(args.captions.read_bytes()).hexdigest()[:16]
    run = TrainingRun(
        args,
        accelerator,
        len(dataset),
        {"the captions": f"of {len(dataset)} images, sha256 {digest}", "the model": config},
        {"model": model, "optimizer": optimizer},
        ema,
        about={"name": "CLIP", "config": config},
        free=FREE_CLIP_FLAGS,
        notes={"texts": len(texts)},
    )
    if held_out and accelerator.is_main_process:
        squares = Squares(held_out, tower.size, tower.interpolation)
        pictures = np.stack([squares.read(index) for index in range(len(squares))])
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
        their_features = features[[place[text] for text in held_out.texts]].to(device)

    model = model.to(memory_format=torch.channels_last)  # which the convolutions of every device prefer
    raw = model
    model, optimizer = accelerator.prepare(model, optimizer)
    forward = torch.compile(model) if args.compile else model
    loss_of = open_clip.ClipLoss(
        local_loss=True,
        gather_with_grad=True,
        cache_labels=True,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    raw.train()
    with closing(run.batches(dataset)) as batches:
        for batch in batches:
            images, features = (t.to(device, non_blocking=True) for t in batch)
            images = images.contiguous(memory_format=torch.channels_last)
            set_learning_rate(optimizer, run.learning_rate())
            loss = loss_of(*forward(images, features))
            accelerator.backward(loss)
            values = {"loss": loss, "scale": raw.logit_scale.exp()}
            if args.max_grad_norm:
                values["grad_norm"] = accelerator.clip_grad_norm_(raw.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                raw.logit_scale.clamp_(0, math.log(MAX_SCALE))
            if ema:
                ema.update(raw)

            run.count(values)
            if run.due(args.eval_every) and held_out and accelerator.is_main_process:
                with swapped_weights(raw, ema.weights if ema else None):
                    raw.eval()
                    run.log.write(step=run.step, **accuracy(raw, tower, pictures, their_features))
                    raw.train()
                run.meter.reset()
            if run.due(args.ckpt_every):
                run.save()
    run.finish()


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, EvaluationError, TextEncoderError, ImageError, OSError) as error:
        sys.exit(f"train_clip: {error}")


if __name__ == "__main__":
    main()
