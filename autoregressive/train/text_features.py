"""Captions and their text features on disk: what train_t2i.py reads.

A captions file is JSON Lines, one image a line: {"image": "folder/name.png", "captions": ["a cat", "a black cat"]},
images relative to the file's own folder. A feature folder, made by extract_text_features.py, holds

    captions.jsonl            a copy of the captions file
    job.json                  encoder, its files, max_length, ...: what the features depend on
    NNNNN.npy                 float16 [rows, C]: features of up to SHARD texts, one after the other, without padding
    NNNNN.lengths.npy         int32 [texts]: rows of each text
    meta.json                 the same, and caption_dim, numbers of texts, ...; written last

Texts are the different captions of the file in order of appearance; each is encoded once.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.train.training import MappedArray, TrainingError

SHARD = 4096  # texts in a file: what an interrupted job makes again at most


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by image. Raises TrainingError, naming file and line, for what isn't a captions file."""
    found: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # in a caption there may be other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: no readable captions file ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, captions = Path(row["image"]), row["captions"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            wanted = '{"image": "name.png", "captions": ["a cat"]}'
            raise TrainingError(f"{path}, line {number}: expected {wanted} ({error!r})") from error
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise TrainingError(f"{path}, line {number}: captions of {image} must be a list of one or more texts")
        if image.is_absolute():
            raise TrainingError(f"{path}, line {number}: {image} must be relative to the folder of this file")
        if image.as_posix() in found:
            raise TrainingError(f"{path}, line {number}: {image} is there twice; give it one line with all captions")
        found[image.as_posix()] = captions
    if not found:
        raise TrainingError(f"{path} holds no captions")
    return found


def texts_of(captions: dict[str, list[str]]) -> list[str]:
    """The different captions in order of appearance."""
    return list(dict.fromkeys(text for texts in captions.values() for text in texts))


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    """Features and lengths of a shard."""
    return folder / f"{shard:05d}.npy", folder / f"{shard:05d}.lengths.npy"


class TextFeatures:
    """A feature folder, memory-mapped.

    Attributes:
        meta: its meta.json.
        captions: captions by image.
    """

    def __init__(self, path: Path):
        if not (path / "meta.json").exists():
            raise TrainingError(
                f"{path} has no meta.json: make it with autoregressive/train/extract_text_features.py "
                "(started again, it finishes an interrupted job)"
            )
        self.path, self.meta = path, json.loads((path / "meta.json").read_text())
        self.captions = read_captions(path / "captions.jsonl")
        texts = texts_of(self.captions)
        self.index = {text: i for i, text in enumerate(texts)}
        self.shards = []
        for shard in range(-(-len(texts) // SHARD)):
            features, lengths = shard_files(path, shard)
            offsets = np.concatenate([[0], np.load(lengths).cumsum()])
            self.shards.append((MappedArray(features), offsets))

    @property
    def identity(self) -> dict[str, str]:
        """What tells these features from others, for people and for comparison."""
        digest = hashlib.sha256((self.path / "captions.jsonl").read_bytes())
        digest.update((self.path / "meta.json").read_bytes())
        return {"the text features": f"{len(self.index)} texts, sha256 {digest.hexdigest()[:16]}"}

    def __getitem__(self, text: str) -> np.ndarray:
        """Features of one of the captions: float16 [rows, C]."""
        shard, i = divmod(self.index[text], SHARD)
        features, offsets = self.shards[shard]
        return features[offsets[i] : offsets[i + 1]]

    def padded(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Features float32 [length, C], left-padded with zeros, and which of them are no padding, bool [length]."""
        rows = self[text]
        features = torch.zeros(length, self.meta["caption_dim"])
        features[length - len(rows) :] = torch.from_numpy(np.array(rows))
        return features, torch.arange(length) >= length - len(rows)
