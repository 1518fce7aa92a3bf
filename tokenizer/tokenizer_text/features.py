"""Text features on disk: a prompt that was encoded once needs no encoder any more."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenizer.files import atomic_file
from tokenizer.tokenizer_text.encoder import TextEncoder, TextEncoderError


class FeatureCache:
    """A folder of text features, one file per prompt, in front of an encoder.

    A file is named by the hash of the encoder's fingerprint and the cleaned prompt, and holds the features of the
    prompt's tokens without padding. Any number of processes may share a folder: files appear whole or not at all. One
    that is damaged, or of something else, is written anew.

    Args:
        folder: made when it is needed.
        encoder: its weights are loaded if something is missing, and only then.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: TextEncoder):
        self.folder, self.encoder = Path(folder), encoder
        self._encoder_key = json.dumps(encoder.fingerprint(), sort_keys=True)

    def features_of(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What :meth:`TextEncoder.encode` gives, from disk where it is there.

        Args:
            prompts: B of them.

        Returns:
            features [B, L, C] and mask [B, L], on the encoder's device.

        Raises:
            TextEncoderError: the encoder can't be used, or the folder not be written.
        """
        return self.encoder.pad([self._rows(text) for text in self.encoder.prepare(prompts)])

    def _rows(self, text: str) -> Tensor:
        key = f"{self._encoder_key}\n{text}"
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        rows = self._read(path, key)
        if rows is None:
            rows = self.encoder.rows(text)
            self._write(path, key, rows)
        return rows

    def _read(self, path: Path, key: str) -> Tensor | None:
        """Features [n, C]; None if they aren't there as they should be."""
        try:
            with safe_open(path, "pt") as file:
                if file.metadata() != {"key": key}:
                    return None
                rows = file.get_tensor("features")
        except (FileNotFoundError, SafetensorError):
            return None
        except OSError as error:
            raise TextEncoderError(
                f"{path} can't be read ({error.strerror or error}); choose another folder"
            ) from error
        fits = rows.ndim == 2 and 0 < len(rows) <= self.encoder.max_length and rows.shape[1] == self.encoder.dim
        return rows if fits and rows.dtype == self.encoder.dtype else None

    def _write(self, path: Path, key: str, rows: Tensor) -> None:
        content = save({"features": rows.cpu().contiguous()}, {"key": key})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(content)
        except OSError as error:
            raise TextEncoderError(
                f"{path} can't be written ({error.strerror or error}): free some space there, or choose another folder"
            ) from error
