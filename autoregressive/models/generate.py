"""The decode loop: condition in, image tokens out, through any KV cache."""

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from adsa import CacheConfig, KVCache
from autoregressive.models.adaptive import AdaptiveWindow
from autoregressive.models.gpt import Transformer
from autoregressive.models.recorded import RecordedSteps
from autoregressive.models.sampling import draw, guide, probabilities, uniform_noise
from autoregressive.models.schedule import Pass, Schedule


def new_cache(
    model: Transformer,
    batch: int,
    max_new_tokens: int,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cache: CacheConfig | None = None,
    zipar_window: int | None = None,
    *,
    fixed: bool = False,
) -> KVCache:
    """The cache that :func:`generate` makes for these arguments; ``batch`` counts images. ``fixed``: for ``steps``."""
    if emb_masks is not None and model.config.model_type == "c2i":
        raise ValueError("a class-conditional model has no text to mask: emb_masks must be None")
    rows = 2 if cfg_scale > 1.0 else 1
    valid = None if emb_masks is None else emb_masks.bool().repeat(rows, 1)
    order = Schedule(max_new_tokens, model.config.grid_size, zipar_window).order
    config = cache or CacheConfig(policy="full")
    return model.new_cache(config, rows * batch, max_new_tokens, valid, order, fixed=fixed)


def logits_of(
    model: Transformer,
    cond: Tensor,
    kv: KVCache,
    schedule: Schedule,
    known: Tensor,
    waiting: Collection[int] | None = None,
    steps: RecordedSteps | None = None,
) -> Iterator[tuple[Tensor, Pass]]:
    """Run the model pass by pass.

    Args:
        model, cond: one row of ``cond`` for each row of the cache.
        kv: made for the same schedule; it may lose the second half of its rows on the way.
        schedule: what goes in when.
        known: int64 ``[B, N]``, the tokens. The caller writes those that are drawn before going on.
        waiting: where the caller notes which tokens may change, as :meth:`Schedule.walk` takes it; None: none ever.
        steps: of this model and cache, to be played where that is possible; None: each runs anew.

    Yields:
        Logits ``[rows, P, V]`` for the P tokens that the pass draws, and the pass.
    """
    yield model(cond_idx=cond, cache=kv)[0][:, -1:], Pass((), (), (0,), (0,))
    for step, (positions, sources, rows) in schedule.on(known.device, waiting):
        if schedule.order is not None:
            kv.expect(step.positions, step.stand_ins, positions)
        idx = known.index_select(1, sources).repeat(kv.batch // len(known), 1)
        logits, _ = (steps or model)(idx=idx, input_pos=positions + model.config.cls_token_num, cache=kv)
        if len(step.rows) < len(step.positions):
            logits = logits.index_select(1, rows)
        yield logits, step


@torch.no_grad()
def generate(
    model: Transformer,
    cond: Tensor,
    max_new_tokens: int,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: float = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    cache: CacheConfig | None = None,
    seeds: Tensor | None = None,
    kv: KVCache | None = None,
    start: Tensor | None = None,
    zipar_window: int | None = None,
    zipar_adaptive: bool = False,
    steps: RecordedSteps | None = None,
) -> Tensor:
    """Sample image tokens.

    Args:
        model: in eval mode; its ``forward`` may be compiled.
        cond: int ``[B]`` class ids, or ``[B, T, caption_dim]`` text features, left-padded with zeros.
        max_new_tokens: N, at most ``model.config.block_size``.
        emb_masks: ``[B, T]``, 1 where a text token is no padding; None: all valid. Guidance masks its unconditional
            half alike, as LlamaGen does.
        cfg_scale: guidance: logits = uncond + (cond - uncond) * cfg_scale. At 1 or less there is no unconditional half.
        cfg_interval: if above -1, guidance ends after this many decode steps (0 is the second token), and so does the
            computation of the unconditional half. Steps are passes, of which ZipAR has fewer.
        temperature, top_k, top_p: applied in this order; top_k = 0 and top_p = 1 are off.
        sample_logits: draw; if False, take the most likely token.
        cache: what to keep (:class:`adsa.CacheConfig`). None: everything.
        seeds: int ``[B]``, one per image. The noise of an image depends on its seed alone, not on the batch. None:
            drawn from torch's global generator.
        kv: an unused cache from :func:`new_cache`, for callers who want to look at it; it stands for ``emb_masks`` and
            ``cache``, which are then not given. None: made here.
        start: int ``[B, n]``, n up to N: the first n tokens are these, and the others keep the noise of their steps. So
            an image that starts with its own first tokens and has its own seed is that image. None: all are drawn.
        zipar_window: decode several rows at once (:class:`~autoregressive.models.schedule.Schedule`); None: raster
            order.
        zipar_adaptive: the window is the smallest one, and each row's as wide as its first token needs
            (:class:`~autoregressive.models.adaptive.AdaptiveWindow`). Rows begin for the whole batch at once, so an
            image then depends on its batch.
        steps: of this model, recorded (:class:`~autoregressive.models.recorded.RecordedSteps`), with the unused cache
            that they were made for; it stands for ``kv``.

    Returns:
        int64 ``[B, N]`` on the device of ``cond``. While decoding, tokens leave for host memory (section 4.2 of the
        paper).

    Raises:
        ValueError: for arguments that do not fit the model or each other.
    """
    batch, device = len(cond), cond.device
    if model.training:
        raise ValueError("generate needs the model in eval mode: call model.eval() first")
    if not 1 <= max_new_tokens <= model.config.block_size:
        raise ValueError(f"max_new_tokens must be 1 to {model.config.block_size} (block_size), not {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if zipar_adaptive and zipar_window is None:
        raise ValueError("zipar_adaptive needs zipar_window, the smallest window that a row may begin with")
    _check_condition(model, cond)
    seeds = torch.randint(2**62, (batch,)) if seeds is None else torch.as_tensor(seeds)
    if seeds.shape != (batch,):
        raise ValueError(f"seeds of shape {[*seeds.shape]} for {batch} images: generate takes one per image")
    schedule = Schedule(max_new_tokens, model.config.grid_size, zipar_window)
    if steps is not None:
        if kv is not None or steps.model is not model:
            raise ValueError("steps come with a cache of their own, and are of one model: give no kv beside them")
        kv = steps.kv
    if kv is None:
        kv = new_cache(model, batch, max_new_tokens, emb_masks, cfg_scale, cache, zipar_window)
    elif emb_masks is not None or cache is not None:
        raise ValueError("emb_masks and cache belong to new_cache when kv is given")
    elif (kv.used, kv.batch, kv.order) != (
        False,
        batch * (1 + (cfg_scale > 1.0)),
        schedule.order,
    ) or kv.max_tokens < max_new_tokens:
        raise ValueError(
            f"kv is {'used' if kv.used else 'unused'} and has {kv.batch} rows for {kv.max_tokens} tokens; needed is an "
            f"unused one for {batch} images, cfg_scale {cfg_scale}, {max_new_tokens} tokens and zipar_window "
            f"{zipar_window}: make it by new_cache"
        )
    given = 0
    known = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=device)
    if start is not None:
        _check_start(start, batch, max_new_tokens, model.config.vocab_size)
        given = start.shape[1]
        known[:, :given] = start

    # An image's first N numbers are for its draws, whatever follows them.
    kinds = 3 if zipar_adaptive else 1
    noise = torch.zeros(kinds, max_new_tokens, batch, device=device)
    if sample_logits:
        noise.copy_(uniform_noise(seeds, kinds * max_new_tokens).T.unflatten(0, (kinds, -1)))
    adaptive = AdaptiveWindow(noise[1:]) if zipar_adaptive else None
    waiting = None if adaptive is None else adaptive.waiting
    pinned = device.type == "cuda"
    tokens = torch.empty(max_new_tokens, batch, dtype=torch.long, pin_memory=pinned)
    guided = cfg_scale > 1.0
    if guided:
        cond = torch.cat([cond, model.null_condition(cond)])
    for number, (logits, step) in enumerate(logits_of(model, cond, kv, schedule, known, waiting, steps)):
        positions = step.draws
        if adaptive is not None or max(positions) >= given:
            logits = (guide(logits, cfg_scale) if guided else logits).flatten(0, 1)
            if sample_logits:
                uniform = torch.stack([noise[0, position] for position in positions], dim=1).flatten()
                probs = probabilities(logits, temperature, top_k, top_p)
                drawn = draw(probs, uniform)
            else:
                drawn = logits.argmax(-1)
            drawn = drawn.view(batch, -1)
            if adaptive is not None:
                probs = probs if sample_logits else F.one_hot(drawn, logits.shape[-1]).to(logits.dtype)
                adaptive.settle(step, probs.view(*drawn.shape, -1), drawn)
            for position, token in zip(positions, drawn.unbind(1), strict=True):
                if position >= given:
                    known[:, position] = token
        for position in positions:
            tokens[position].copy_(known[:, position], non_blocking=pinned)
        if guided and -1 < cfg_interval < number:
            guided = False
            kv.keep_rows(batch)
    if pinned:
        torch.cuda.synchronize(device)
    return tokens.T.contiguous().to(device)


def _check_start(start: Tensor, batch: int, tokens: int, codes: int) -> None:
    """Raises ValueError for tokens that no image of the batch can start with."""
    if start.ndim != 2 or start.is_floating_point():
        raise ValueError(f"start must be whole numbers [B, n], not {start.dtype} {[*start.shape]}")
    if len(start) != batch or start.shape[1] > tokens:
        raise ValueError(f"start of shape {[*start.shape]} for {batch} images of {tokens} tokens")
    if start.numel() and not 0 <= int(start.min()) <= int(start.max()) < codes:
        raise ValueError(
            f"tokens to start with must be 0 to {codes - 1}; these are {int(start.min())} to {int(start.max())}"
        )


def _check_condition(model: Transformer, cond: Tensor) -> None:
    """Raises ValueError for classes or features that the model has no embedding for."""
    if model.config.model_type == "c2i":
        classes = model.config.num_classes
        if cond.ndim != 1 or cond.is_floating_point():
            raise ValueError(f"class ids must be whole numbers [B], not {cond.dtype} {[*cond.shape]}")
        if len(cond) and not 0 <= int(cond.min()) <= int(cond.max()) <= classes:
            raise ValueError(
                f"class ids must be 0 to {classes - 1} (or {classes}, the null class); these are {int(cond.min())} to "
                f"{int(cond.max())}"
            )
    elif cond.ndim != 3:
        raise ValueError(f"text features must be [B, T, caption_dim], not {[*cond.shape]}")
