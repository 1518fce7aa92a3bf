"""From options to models, and from conditions and seeds to images: what all sampling scripts share."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from adsa import CacheConfig, KVCache
from autoregressive.models.checkpoint import load_model, read_state_dict
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer, compiled
from autoregressive.models.packed import pack
from autoregressive.models.quantize import quantize
from autoregressive.models.recorded import RecordedSteps
from autoregressive.sample.options import ROOT, ModelOptions, OptionError, Options, near, shown
from tokenizer.files import fingerprint
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Blueprint:
    """What the options and the checkpoints' own metadata say about the two models, before any weight is read.

    Attributes:
        options: the :class:`ModelOptions` with every None filled in but that of quantize; precision by the kind of
            device.
        gpt: the GPT on the meta device: its shape without its weights.
        vq: likewise the tokenizer.
        grid: image tokens along a side.

    Raises:
        OptionError: what is given does not fit together.
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, options: ModelOptions, device: torch.device):
        self.options = options
        text = options.gpt_type == "t2i"
        demo = "configs/demo_t2i.yaml" if text else "configs/demo.yaml"
        gpt_name, gpt_args = _metadata(options.gpt_ckpt, "model.gpt_ckpt", demo)
        self.vq = tokenizer_on_meta(options, demo)
        size = options.downsample_size

        name = options.gpt_model or gpt_name or ("GPT-XL" if text else "GPT-B")
        options.gpt_model = _registered(name, GPT_models, "model.gpt_model")
        if options.gpt_model != gpt_name:
            gpt_args = {}
        told = {key: gpt_args.get(key) for key in ("num_classes", "cls_token_num", "model_type", "caption_dim")}
        if told["model_type"] not in (None, options.gpt_type):
            raise OptionError(
                f"{options.gpt_ckpt}: a {told['model_type']} model, and model.gpt_type is {options.gpt_type}"
            )
        if options.image_size is None:
            tokens = gpt_args.get("block_size")
            options.image_size = math.isqrt(tokens) * size if tokens else 512 if text else 384
        if options.image_size % size:
            raise OptionError(
                f"model.image_size {options.image_size} is not a multiple of {options.vq_model}'s {size} pixels"
            )
        self.grid = options.image_size // size
        if options.num_classes is None:
            options.num_classes = told["num_classes"] or 1000
        if options.cls_token_num is None:
            options.cls_token_num = told["cls_token_num"] or (120 if text else 1)
        if options.caption_dim is None:
            options.caption_dim = told["caption_dim"] or ModelArgs.caption_dim
        given = {
            "model_type": options.gpt_type,
            "vocab_size": options.codebook_size,
            "block_size": self.grid**2,
            "num_classes": options.num_classes,
            "cls_token_num": options.cls_token_num,
            "caption_dim": options.caption_dim,
        }
        # Metadata tells all fields; a registered size is only a name for some of them.
        build = (lambda **args: Transformer(ModelArgs(**args))) if "dim" in gpt_args else GPT_models[options.gpt_model]
        self.gpt = _on_meta(build, gpt_args | given, options.gpt_ckpt)
        if options.precision is None:
            options.precision = "bf16" if device.type == "cuda" or options.quantize else "none"

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return self.grid**2

    def load_gpt(self, device: torch.device) -> Transformer:
        """:attr:`gpt` with its weights, ready for inference, in the options' precision. To be called once.

        Raises:
            CheckpointError: the weights can't be read or don't fit.
        """
        dtype = PRECISIONS[self.options.precision]
        model = load_model(self.gpt, self.options.gpt_ckpt, device=device, dtype=dtype)
        return pack(quantize(model) if self.options.quantize else model)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Name, size and hash of both checkpoints, by their option."""
        paths = {"model.gpt_ckpt": self.options.gpt_ckpt, "model.vq_ckpt": self.options.vq_ckpt}
        return {key: fingerprint(path) for key, path in paths.items()}


def tokenizer_on_meta(options: ModelOptions, demo: str = "configs/demo.yaml") -> VQModel:
    """The tokenizer on the meta device, by what the options and its checkpoint say; fills in its options.

    Raises:
        OptionError, CheckpointError: as :class:`Blueprint`.
    """
    vq_name, vq_args = _metadata(options.vq_ckpt, "model.vq_ckpt", demo)
    options.vq_model = _registered(options.vq_model or vq_name or "VQ-16", VQ_models, "model.vq_model")
    if options.vq_model != vq_name:
        vq_args = {}
    given = {"codebook_size": options.codebook_size, "codebook_embed_dim": options.codebook_embed_dim}
    vq = _on_meta(VQ_models[options.vq_model], vq_args | _not_none(given), options.vq_ckpt)
    options.codebook_size, options.codebook_embed_dim = vq.config.codebook_size, vq.config.codebook_embed_dim
    size = vq.config.downsample_size
    if options.downsample_size not in (None, size):
        raise OptionError(f"model.downsample_size is {options.downsample_size}, but {options.vq_model}'s is {size}")
    options.downsample_size = size
    return vq


def _metadata(path: str | None, key: str, demo: str) -> tuple[str | None, dict[str, Any]]:
    """(registered name, ModelArgs fields) that a .safetensors file tells about its model; (None, {}) if it doesn't."""
    if path is None:
        raise OptionError(
            f"{key} is not given. `--config {shown(ROOT / demo)}` samples the models that ship with the project; the "
            f"README tells where released weights go"
        )
    read_state_dict(path)  # maps the file: a missing or damaged one is told before anything else happens
    if not path.endswith(".safetensors"):
        return None, {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return metadata.get("model"), json.loads(metadata.get("args", "{}"))
    except ValueError as error:
        raise OptionError(f"{key}: {path}: its metadata `args` is not JSON: {error}") from error


def _registered(name: str, table: Mapping[str, Any], key: str) -> str:
    if name not in table:
        raise OptionError(f"{key} {name!r} is not registered{near(name, list(table))}; known: {', '.join(table)}")
    return name


def _not_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _on_meta(build, args: dict[str, Any], path: str | None) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(**args).eval().requires_grad_(False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{path}: its sizes make no model: {error}") from error


def image_seeds(seed: int, total: int) -> np.ndarray:
    """One seed per image, int64 [total], from the run's seed and the image's index alone."""
    sequences = (np.random.SeedSequence(seed, spawn_key=(index,)) for index in range(total))
    return np.array([s.generate_state(1, np.uint64)[0] >> np.uint64(1) for s in sequences], dtype=np.int64)


class Sampler:
    """GPT and tokenizer on a device: conditions and seeds in, uint8 images out.

    Args:
        blueprint: which models.
        options: `sampling` and `cache` are used.
        device: where.

    Attributes:
        cache: the :class:`CacheConfig` in use; may be changed between calls.
        seconds: time spent, by phase ("gpt", "vq"); the device is waited for.
        cache_report: slots and bytes of the largest cache so far.

    Raises:
        CheckpointError: the weights can't be read or don't fit.
    """

    def __init__(self, blueprint: Blueprint, options: Options, device: torch.device):
        self.tokens_per_image = blueprint.tokens
        self.sampling, self.cache, self.device = options.sampling, options.cache_config(), device
        torch.set_float32_matmul_precision("high")  # TF32, as LlamaGen samples
        torch.backends.cudnn.deterministic = True
        model = blueprint.options
        self.records, self._steps, self._made_for = model.cuda_graphs, None, None
        if self.records and device.type != "cuda":
            raise OptionError(f"model.cuda_graphs needs a CUDA device, and this one is {device}; leave it out")
        if model.compile and device.type == "cpu":
            raise OptionError("model.compile is for a GPU: on a CPU it makes steps slower; leave it out")
        try:  # an impossible cache or window is told before weights are read
            window = self.sampling.zipar_window
            new_cache(blueprint.gpt, 1, blueprint.tokens, None, 1.0, self.cache, window, fixed=self.records)
        except ValueError as error:
            raise OptionError(str(error)) from error
        self.gpt = blueprint.load_gpt(device)
        self.vq: VQModel = load_model(blueprint.vq, model.vq_ckpt, device=device, dtype=torch.float32)
        if model.compile:
            self.gpt.forward = compiled(self.gpt.forward)
        self.reset()

    def reset(self) -> None:
        """Forget what was measured so far."""
        self.seconds = {"gpt": 0.0, "vq": 0.0}
        self.cache_report: dict[str, int] = {}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - start

    def tokens(
        self,
        cond: Tensor,
        seeds: Tensor,
        masks: Tensor | None = None,
        count: int | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Sample image tokens: int64 [B, N] on the device.

        Args:
            cond: int [B] class ids, or text features [B, T, caption_dim] of any floating-point type.
            seeds: int64 [B].
            masks: [B, T], 1 where a text token is no padding.
            count: stop after this many tokens; None: a whole image.
            start: int [B, n], the first tokens of each image; None: all are sampled.
        """
        options, count = self.sampling, count or self.tokens_per_image
        with self._timed("gpt"):
            if cond.is_floating_point():
                cond = cond.to(self.gpt.tok_embeddings.weight.dtype)
            window, steps = options.zipar_window, None
            if self.records:
                steps = self._recorded(len(cond), count, masks)
                kv = steps.kv
            else:
                kv = new_cache(self.gpt, len(cond), count, masks, options.cfg_scale, self.cache, window)
            if len(cond) > self.cache_report.get("images_per_batch", 0):
                self.cache_report = describe(kv, len(cond))
            return generate(
                self.gpt,
                cond.to(self.device),
                count,
                cfg_scale=options.cfg_scale,
                cfg_interval=options.cfg_interval,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seeds=seeds,
                kv=None if steps else kv,
                steps=steps,
                start=start,
                zipar_window=window,
                zipar_adaptive=options.zipar_adaptive,
            )

    def _recorded(self, batch: int, count: int, masks: Tensor | None) -> RecordedSteps:
        """The steps of the last batch with their cache, emptied, if these fit; else new ones."""
        scale, made_for = self.sampling.cfg_scale, (batch, count, masks is None, self.cache)
        rows = 2 if scale > 1.0 else 1
        if self._made_for == made_for:
            self._steps.kv.reset(None if masks is None else masks.bool().repeat(rows, 1))
        else:
            self._steps = self._made_for = None  # its memory goes first
            kv = new_cache(self.gpt, batch, count, masks, scale, self.cache, fixed=True)
            self._steps, self._made_for = RecordedSteps(self.gpt, kv), made_for
        return self._steps

    def images(self, tokens: Tensor, size: int) -> np.ndarray:
        """Decode tokens [B, N] to uint8 [B, size, size, 3], see :func:`decode_images`."""
        with self._timed("vq"):
            return decode_images(self.vq, tokens.to(self.device), size)


@torch.no_grad()
def decode_images(vq: VQModel, tokens: Tensor, size: int, *, antialias: bool = False) -> np.ndarray:
    """Decode the tokens of square images, [B, N] on the model's device, to uint8 [B, size, size, 3].

    A few images go at a time: the tokenizer's activations are larger than the models.

    Args:
        vq: the tokenizer.
        tokens: codes, in raster order.
        size: pixels along a side; the images are scaled to it (bicubic) where the tokenizer makes others.
        antialias: scale as images are scaled down properly; else as LlamaGen does, which is not antialiased.
    """
    grid, parts = math.isqrt(tokens.shape[1]), []
    for part in tokens.split(8 if tokens.device.type == "cuda" else 1):
        decoded = vq.decode_code(part, (len(part), vq.config.codebook_embed_dim, grid, grid))
        if decoded.shape[-1] != size:
            decoded = F.interpolate(decoded, size=(size, size), mode="bicubic", antialias=antialias)
        parts.append(to_uint8(decoded))
    return np.concatenate(parts)


def describe(kv: KVCache, images: int) -> dict[str, int]:
    """Slots and bytes of a cache, for reports."""
    return {
        "slots": kv.slots,
        "condition_slots": kv.condition_slots,
        "images_per_batch": images,
        "kv_bytes": kv.kv_nbytes(),
        "bytes": kv.nbytes(),
    }


def cache_title(cache: CacheConfig, tokens: int) -> str:
    """How captions and tables call a cache: 'dense' or 'ADSA-256 of 576'."""
    return "dense" if cache.policy == "full" else f"{cache.policy.upper()}-{cache.slots(tokens)} of {tokens}"


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: on CUDA those of torch's allocator, elsewhere those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak_memory(device: torch.device) -> None:
    """Count :func:`peak_memory` from now on, where that is possible: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
