"""Models of images and texts (CLIP, Radford et al., arXiv:2103.00020): open_clip's, with preprocessing and tokenizer.

| model | weights |
|---|---|
| an architecture that open_clip knows, as `ViT-B-32` | a tag, as `openai`, from the Hugging Face Hub; or a file |
| `hf-hub:REPOSITORY` | on the Hub, with open_clip_config.json |
| `local-dir:FOLDER` | in the folder, with open_clip_config.json |

Where a folder's open_clip_config.json names MiniLM for its text, that is the one which comes with the requirements, and
the folder holds the other weights. The demo's is such a folder, pretrained_models/demo/clip.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from autoregressive.sample.run_folder import bar_interval
from evaluations.extractors import EvaluationError, Resized, hub_source, missing_weights
from evaluations.features import ImageSet, extract, gathered, own_batches
from tokenizer.tokenizer_text.encoder import load_text_encoder

TAG = "openai"
OFFLINE = (
    "--clip-model local-dir:pretrained_models/demo/clip needs no network, but knows emoji alone, and its numbers "
    "compare with its own only"
)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
FROZEN = "text.transformer."  # the weights that MiniLM brings
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Clip:
    """A CLIP in float32, at first on the CPU; see :func:`load_clip`, which makes it.

    Args:
        name: for results.
        model: open_clip's, with its preprocess_cfg.
        tokenize: texts -> int64 [N, length]; None: it is for images only.

    Attributes:
        images: the image tower as an extractor; its features are the embeddings, not normalised.
    """

    def __init__(self, name: str, model: nn.Module, tokenize: Callable[[list[str]], Tensor] | None):
        self.name, self.tokenize = name, tokenize
        self.model = model.float().eval().requires_grad_(False)
        self.images = image_extractor(model)

    @cached_property
    def weights(self) -> str:
        """The start of a sha256 of all weights."""
        digest = hashlib.sha256()
        for key, tensor in self.model.state_dict().items():
            digest.update(key.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, float32 [N, D] of length 1. What doesn't fit into the context is cut."""
        tokens = self.tokenize(list(texts)).to(self.model.logit_scale.device)
        return F.normalize(self.model.encode_text(tokens), dim=-1).cpu().numpy()


class ImageTower(nn.Module):
    """The image half of an open_clip model, as far as Resized needs it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.model.encode_image(x)}


def image_extractor(model: nn.Module) -> Resized:
    """What makes embeddings, not normalised, of uint8 images by an open_clip model and its preprocess_cfg."""
    import open_clip  # here and below, since the import takes seconds and cached features do without

    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    return Resized(ImageTower(model), size, config["mean"], config["std"], config["interpolation"])


class Squares:
    """Images as a CLIP takes them: the centre, scaled first to `resolution` (Lanczos), then to the CLIP's size.

    Both by Pillow on 8 bits, as in GigaGAN's evaluation.

    Args:
        images: the set.
        size, interpolation: the CLIP's.
        resolution: pixels along a side; None: only scale to the CLIP's size.
    """

    def __init__(self, images: ImageSet, size: int, interpolation: str, resolution: int | None = None):
        self.images, self.size, self.resolution = images, size, resolution
        self.filter = Image.Resampling[interpolation.upper()]
        self.path, self.identity, self.state = images.path, images.identity, images.state

    def __len__(self) -> int:
        return len(self.images)

    def cache(self, name: str) -> Path:
        return self.images.cache(name)

    def read(self, index: int) -> np.ndarray:
        image = Image.fromarray(self.images.read(index))
        side = min(image.size)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
        if self.resolution:
            image = image.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)
        return np.asarray(image.resize((self.size, self.size), self.filter))


def clip_title(name: str, pretrained: str | None = None) -> str:
    """What results call a CLIP; the arguments are those of :func:`load_clip`."""
    if name.startswith("local-dir:"):
        return "/".join(Path(name.removeprefix("local-dir:")).resolve().parts[-2:])
    return name if ":" in name else f"{name}/{Path(pretrained or TAG).name}"


def load_clip(name: str, pretrained: str | None = None, images_only: bool = False) -> Clip:
    """A CLIP with its weights; see the module's table.

    Args:
        name: the model.
        pretrained: tag or file of the weights of a named architecture; None: OpenAI's. With a tag, the activation is
            what the weights were trained with; for a file of weights that want QuickGELU, name `NAME-quickgelu`.
        images_only: do without its tokenizer.

    Raises:
        EvaluationError: there is no such model, or its weights can't be had.
        TextEncoderError: it needs MiniLM, which can't be used.
    """
    import open_clip

    told, source, config = clip_title(name, pretrained), name, {}
    if ":" in name:
        if pretrained is not None:
            raise EvaluationError(f"{name} has its weights with it, so that --pretrained {pretrained} has no place")
        if name.startswith("local-dir:"):
            folder = Path(name.removeprefix("local-dir:"))
            if (found := _minilm_config(folder)) is not None:
                model, tokenize = minilm_clip(found)
                _load_trained(model, folder / WEIGHTS)
                return Clip(told, model, tokenize)
    else:
        pretrained = TAG if pretrained is None else pretrained
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained in tags:
            config = open_clip.get_pretrained_cfg(name, pretrained)
            source = hub_source(config.get("hf_hub"), WEIGHTS, config.get("url"))
        elif pretrained and Path(pretrained).is_file() and name in open_clip.list_models():
            source = pretrained
        else:
            known = f"the tags of {name} are {', '.join(tags)}" if tags else "open_clip.list_pretrained() names them"
            raise EvaluationError(f"open_clip has no weights {pretrained!r} of a model {name!r}; {known}")
    try:
        model = open_clip.create_model(
            name,
            pretrained=pretrained,
            force_quick_gelu=bool(config.get("quick_gelu")),  # as the weights were trained, whatever NAME says
            require_pretrained=True,
            pretrained_text=False,
        )
        return Clip(told, model, None if images_only else open_clip.get_tokenizer(name))
    except Exception as error:
        raise missing_weights(f"open_clip/{told}", source, error, *([] if images_only else [OFFLINE])) from error


def minilm_clip(config: dict[str, Any]) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """An untrained CLIP with MiniLM as its text transformer, and its tokenizer.

    Args:
        config: of open_clip_config.json.

    Raises:
        TextEncoderError: MiniLM is not installed.
        EvaluationError: open_clip can't make a model of this.
    """
    import open_clip
    import transformers
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    folder = str(load_text_encoder("minilm").folder)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports MiniLM's pooler, which isn't wanted
    try:
        text = config["model_cfg"]["text_cfg"]
        if text["hf_model_name"] != MINILM:
            raise ValueError(f"its hf_model_name is {text['hf_model_name']}, not {MINILM}")
        text = text | {"hf_model_name": folder}
        model = open_clip.CustomTextCLIP(**config["model_cfg"] | {"text_cfg": text})
        preprocess = merge_preprocess_dict(PreprocessCfg(), config["preprocess_cfg"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"{CONFIG}: open_clip can't make a model of it ({error!r})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    open_clip.set_model_preprocess_cfg(model, preprocess | {"size": model.visual.image_size})
    model.lock_text_tower()
    tokenizer = HFTokenizer(folder, context_length=text["context_length"])

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts)
        return tokens[:, : (tokens != tokenizer.tokenizer.pad_token_id).sum(1).max()]

    return model, tokenize


def ready_clip(name: str, pretrained: str | None, state: PartialState) -> Clip:
    """:func:`load_clip` for all processes, on their devices."""
    torch.backends.cudnn.allow_tf32 = False  # embeddings are to be the same on all GPUs
    with state.local_main_process_first():  # which may have to fetch the weights
        clip = load_clip(name, pretrained)
    clip.images.to(state.device)
    return clip


def embed_images(
    clip: Clip, images: ImageSet, resolution: int | None, state: PartialState, *, batch_size: int, workers: int
) -> np.ndarray | None:
    """Embeddings of images, float32 [N, D] of length 1, on the main process; kept beside the images.

    Called by all processes alike. See :class:`Squares` and :func:`evaluations.features.extract`.
    """
    name = f"clip-{clip.weights}" + (f"-{resolution}px" if resolution else "")
    squares = Squares(images, clip.images.size, clip.images.interpolation, resolution)
    found = extract(squares, name, lambda: clip.images, state, batch_size=batch_size, workers=workers)
    if found is None:
        return None
    return found.features / np.linalg.norm(found.features, axis=1, keepdims=True)


def embed_texts(clip: Clip, texts: Sequence[str], state: PartialState, *, batch_size: int) -> np.ndarray | None:
    """Embeddings of texts, float32 [N, D] of length 1, on the main process. Called by all processes alike."""
    batches, found = own_batches(state, len(texts), batch_size), []
    with tqdm(
        total=sum(map(len, batches)),
        desc="embeddings of texts",
        unit=" texts",
        disable=not state.is_main_process,
        mininterval=bar_interval(),
    ) as bar:
        for batch in batches:
            found.append(clip.texts([texts[i] for i in batch]))
            bar.update(len(batch))
    parts = gathered(state, found)
    return np.concatenate([batch for part in parts for batch in part]) if state.is_main_process else None


def _minilm_config(folder: Path) -> dict[str, Any] | None:
    """What open_clip_config.json says, if it names MiniLM; else open_clip reads the folder by itself."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config if config["model_cfg"]["text_cfg"].get("hf_model_name") == MINILM else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _load_trained(model: nn.Module, path: Path) -> None:
    """Load all weights but the frozen ones."""
    try:
        found = model.load_state_dict(load_file(path), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise EvaluationError(f"{path}: does not fit the {CONFIG} beside it ({told})") from error
    wrong = [name for name in found.missing_keys if not name.startswith(FROZEN)] + found.unexpected_keys
    if wrong:
        raise EvaluationError(f"{path}: does not fit the {CONFIG} beside it ({wrong[0]} is missing, or unknown there)")
