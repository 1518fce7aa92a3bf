"""The reference's own images through the tokenizer and back: no GPT can be expected to come nearer to the reference."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.models.checkpoint import load_model
from autoregressive.sample.job import start_processes
from autoregressive.sample.run_folder import bar_interval
from autoregressive.sample.sampler import Blueprint, decode_images
from evaluations.paper.protocol import ClassTask
from evaluations.paper.runs import reference_images
from tokenizer.tokenizer_image.images import center_crop, from_uint8, load_rgb, save_image_atomic

BATCH = 16


def reconstructed(task: ClassTask, resize: str = "llamagen") -> Path:
    """A folder of the VQ reconstructions of the reference's images, made or finished first if need be.

    Images are cropped and scaled to the model's size as for its training, encoded, decoded, and scaled to the size of
    the samples.

    Args:
        task: of a protocol.
        resize: how they are scaled, see :class:`ClassTask`.

    Raises:
        EvaluationError: the images are not there.
    """
    pictures = reference_images(task)
    options = task.options()
    state = start_processes(options.run.cpu)
    blueprint = Blueprint(options.model, state.device)
    size = options.run.image_size_eval or min(256, options.model.image_size)
    about = [pictures.identity, blueprint.fingerprints()["model.vq_ckpt"], options.model.image_size, size, resize]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    folder = task.sample_dir / f"vq_reconstructions-{len(pictures)}-{resize}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(len(pictures)) if not (folder / f"{i:06d}.png").exists()]
    if not missing:
        return folder
    vq = load_model(blueprint.vq, options.model.vq_ckpt, device=state.device, dtype=torch.float32)
    with tqdm(total=len(missing), desc="VQ reconstructions", unit=" images", mininterval=bar_interval()) as bar:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            cropped = [np.asarray(center_crop(load_rgb(pictures.files[i]), options.model.image_size)) for i in batch]
            with torch.no_grad():
                _, _, (_, _, codes) = vq.encode(from_uint8(np.stack(cropped)).to(state.device))
            images = decode_images(vq, codes.reshape(len(batch), -1), size, antialias=resize == "antialias")
            for i, image in zip(batch, images, strict=True):
                save_image_atomic(folder / f"{i:06d}.png", image)
            bar.update(len(batch))
    return folder
