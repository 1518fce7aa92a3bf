"""A budget for the image tokens of other people's models: ADSA's caches under Hugging Face's ``generate()``.

    from adsa import CacheConfig
    from adsa.hf import ADSACache

    config = CacheConfig(policy="adsa", budget=256, prefix=32, local=128)
    model.generate(**inputs, past_key_values=ADSACache(config, model.config))

Policies that look at queries or attention weights, and those that merge tokens, as adsa_plus does, need an attention of
their own, which importing this module gives to transformers under the name "adsa":

    model.set_attn_implementation("adsa")       # or from_pretrained(..., attn_implementation="adsa")

What attention gets is ``[prompt | image slots]``, without a gap. Masks stay exact, though slots are in no particular
order: transformers masks padding by column, and padding stands in the prompt alone; a single query sees all else.

    python -m adsa.hf MODEL_OR_CONFIG --budget 256 --tokens 576

plans memory: slots, bytes and the largest batch, without loading weights.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adsa.cache import LayerCache
from adsa.config import DTYPES, CacheConfig
from adsa.slots import MOST_TOKENS, Slots


class ADSALayer(CacheLayerMixin):
    """One layer of an :class:`ADSACache`. Memory is allocated when the first tokens come.

    Attributes:
        core: the :class:`LayerCache` that does the work; None before the first tokens.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False  # the prompt's length, which the size depends on, comes with the first tokens
    # The host counts steps, and generate() would record a CUDA graph for each of them. Compiling by hand is fine.
    is_compileable = False

    def __init__(
        self, config: CacheConfig, image_start: int | None, max_tokens: int | None, columns: int | None, n_head: int
    ):
        # Without super().__init__(), which sets attributes that are properties here.
        self.config, self.image_start, self.max_tokens, self.columns = config, image_start, max_tokens, columns
        self.n_head, self.attends = n_head, _attends(config)
        self.core: LayerCache | None = None
        self._awaits_queries = False
        self._image: tuple[Tensor, Tensor, Tensor | None] | None = None  # what an image token's query attends to

    @property
    def is_initialized(self) -> bool:
        return self.core is not None

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, prompt + image slots, D]``, or None before the first tokens."""
        return None if self.core is None else self.core.read()[0]

    @property
    def values(self) -> Tensor | None:
        """``[B, H, prompt + image slots, D]``, or None before the first tokens."""
        return None if self.core is None else self.core.read()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        if value_states is not None and value_states.shape != key_states.shape:
            raise ValueError(
                f"keys {[*key_states.shape]} and values {[*value_states.shape]} differ in shape; ADSACache wants one"
            )
        batch, heads, length, dim = key_states.shape
        prompt = length if self.image_start is None else self.image_start
        slots = Slots(
            self.config,
            batch=batch,
            n_kv_head=heads,
            n_head=self.n_head,
            head_dim=dim,
            condition_tokens=prompt,
            max_tokens=self.max_tokens or MOST_TOKENS,
            dtype=key_states.dtype,
            device=key_states.device,
            # Which of them are padding, the first queries' mask will tell.
            valid=torch.ones(batch, prompt, dtype=torch.bool) if self.attends else None,
            columns=self.columns,
        )
        self.core = LayerCache(slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take tokens in. ``[B, H, S, D]`` each.

        Of several tokens that come at once, each sees all that was here and those before it, as in a prompt; then the
        image tokens among them compete for slots, one after the other.

        Returns:
            Keys and values to attend to, ``[B, H, N, D]``: the prompt's, then those of image tokens.

        Raises:
            ValueError: for several tokens at once where they can't be masked rightly; if the queries of those before
                should have come to :meth:`attend`, and didn't.
        """
        if self._awaits_queries:
            raise ValueError(
                f"{_own(self.config)}, and was not asked for that of the last ones: either the model's attention is no "
                'longer "adsa" (call model.set_attn_implementation("adsa")), or it is a class of its own that takes no '
                "attention function of transformers (take another policy)"
            )
        if self.core is None:
            self.lazy_initialization(key_states, value_states)
        core, length = self.core, key_states.shape[2]
        of_prompt = min(length, core.slots.condition_tokens - core.condition_came)
        if length == 1 and not of_prompt:
            image = core.update(key_states, value_states)
            return self._hand_out(image[0].to(key_states.dtype), image[1].to(value_states.dtype), image)
        self._check_block(length - of_prompt)
        keys, values = key_states, value_states
        if core.used:
            before = core.read()
            keys = torch.cat([before[0].to(keys.dtype), keys], dim=2)
            values = torch.cat([before[1].to(values.dtype), values], dim=2)
        if of_prompt:
            core.insert_condition(key_states[:, :, :of_prompt], value_states[:, :, :of_prompt])
        if of_prompt < length:
            core.insert(key_states[:, :, of_prompt:], value_states[:, :, of_prompt:])
        return self._hand_out(keys, values)

    def _hand_out(self, keys: Tensor, values: Tensor, image=None) -> tuple[Tensor, Tensor]:
        """These keys and values; the keys with a note for :func:`adsa_attention` to find this layer by."""
        if self.attends:
            keys.adsa_layer, self._awaits_queries, self._image = self, True, image
        return keys, values

    def attend(self, query: Tensor, attention_mask: Tensor | None, scaling: float | None) -> Tensor | None:
        """Attention to what :meth:`update` handed out; to be called once for each time.

        Args:
            query: ``[B, Hq, S, D]``, of the tokens that came in.
            attention_mask: bool ``[B, 1, S, N]``, as transformers makes it for sdpa, or None.
            scaling: of scores; None: D^-0.5.

        Returns:
            ``[B, Hq, 1, D]`` for an image token; None for a prompt, which attends as in any cache.

        Raises:
            ValueError: if called a second time; for a mask of numbers.
        """
        if not self._awaits_queries:
            raise ValueError("several attentions share the keys of one layer, which ADSACache doesn't know how to rank")
        image, self._image, self._awaits_queries = self._image, None, False
        if image is not None:
            usual = query.shape[-1] ** -0.5
            return self.core.attend_to(query if scaling in (None, usual) else query * (scaling / usual), *image)
        if attention_mask is not None:
            if attention_mask.dtype != torch.bool:
                raise ValueError(f"{_own(self.config)}, and wants a mask of bool, not {attention_mask.dtype}")
            self.core.hide_condition(attention_mask[:, 0, -1, : self.core.condition_came])
        return None

    def _check_block(self, image_tokens: int) -> None:
        """Raises ValueError if several tokens can't come in at once."""
        core = self.core
        if not image_tokens:
            return
        if self.image_start is None:
            raise ValueError(
                f"{image_tokens} more tokens came at once after a prompt of {core.slots.condition_tokens}. If the "
                "prompt comes in parts, or has image tokens, say where they begin: ADSACache(..., image_start=N)"
            )
        if core.slots.queries is not None or core.slots.attention is not None:
            raise ValueError(
                f"{_own(self.config)}, one by one, and these are {image_tokens} at once: end the prompt where the "
                "image begins, or take another policy"
            )
        if core.slots.selects:
            raise ValueError(f'mode "select" takes image tokens one at a time, and these are {image_tokens}')
        if core.count > core.slots.filled:
            raise ValueError(
                f"{image_tokens} tokens came at once after some had been evicted, where causal masks don't fit any "
                "more. Feed them one at a time, or begin with a new cache"
            )

    def get_seq_length(self) -> int:
        """Tokens that came in so far, evicted ones included: positions derive from it."""
        return 0 if self.core is None else self.core.condition_came + self.core.count

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """How many keys the next ``update`` will return, and 0: the first of them is always the first token."""
        if isinstance(query_length, Tensor):  # the positions of the queries, before transformers 5
            query_length = query_length.shape[0]
        total = self.get_seq_length() + query_length
        if self.core is None or query_length > 1:
            return total, 0
        return min(total, self.core.slots.condition_tokens + self.core.slots.budget), 0

    def get_max_length(self) -> int:
        """-1: any number of tokens may come."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def reset(self) -> None:
        """Forget everything, the length of the prompt included, and free the memory."""
        self.core, self._image, self._awaits_queries = None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, as beams need it. ``beam_idx``: int64 ``[B]``."""
        if self.core is not None:
            self.core.slots.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after the other."""
        if self.core is not None:
            slots = self.core.slots
            slots.select_rows(torch.arange(slots.batch, device=slots.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. ``indices``: int64 ``[R]`` or bool ``[B]``."""
        if self.core is not None:
            slots = self.core.slots
            slots.select_rows(torch.arange(slots.batch, device=slots.device)[indices.to(slots.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError, but for 0 tokens."""
        if tokens_to_remove:
            raise ValueError("ADSACache can't take tokens back, as assisted decoding must: what they evicted is gone")

    def offload(self) -> None:
        """Keys and values to the CPU."""
        if self.core is not None:
            self.core.slots.move_kv("cpu")

    def prefetch(self) -> None:
        """Keys and values back to the layer's device."""
        if self.core is not None:
            self.core.slots.move_kv(self.core.slots.device)


def adsa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function "adsa": sdpa, but for keys of an :class:`ADSALayer` that asks for queries.

    Arguments and result are those of any such function.

    Raises:
        ValueError: for models whose scores take more than scaling.
    """
    layer = getattr(key, "adsa_layer", None)
    if layer is not None:
        more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if more:
            raise ValueError(f"{_own(layer.config)}, without this model's {', '.join(more)}: take another policy")
        out = layer.attend(query, attention_mask, scaling)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("adsa", adsa_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("adsa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class ADSACache(Cache):
    """A cache for ``generate(past_key_values=...)`` that keeps within a budget of image tokens, per layer and row.

    Args:
        config: what to keep. ``fold_condition`` is of no effect: only LlamaGen's text keys are zero.
        model_config: of the model, ``model.config``.
        image_start: how many tokens come before the image; they are kept apart, never evicted, and don't count within
            the budget; padding must be among them. None: those of the first forward pass, which is the prompt.
        max_tokens: image tokens there will be. Policy "full" and mode "select" allocate memory for them, and need it;
            others evict nothing if the budget is no less.
        columns: tokens in a line of the image, for merging and policies that look at places or lines. None: it is
            square and has ``max_tokens``.
        offloading: keep all layers' keys and values in the CPU's memory but those of the layers at work.

    Raises:
        ValueError: for a policy that needs attention "adsa" where the model has another one; for a model that doesn't
            attend to all of the past in each layer; for flash attention, whose padding masks can't be met.
    """

    def __init__(
        self,
        config: CacheConfig,
        model_config: transformers.PretrainedConfig,
        *,
        image_start: int | None = None,
        max_tokens: int | None = None,
        columns: int | None = None,
        offloading: bool = False,
    ):
        _check(config, image_start, max_tokens, columns)
        text = _text_config(model_config)
        attention = getattr(text, "_attn_implementation", None) or ""
        if "flash" in attention:
            raise ValueError(
                f"{attention} finds padding by counting from the newest key, which is wrong for a cache that evicts: "
                'use attn_implementation="sdpa" (on a GPU it runs flash kernels too, where no mask is needed)'
            )
        if _attends(config) and attention != "adsa":
            raise ValueError(
                f"{_own(config)}, and this model's attention is {attention!r}: before the cache is made, call "
                'model.set_attn_implementation("adsa")'
            )
        config = replace(config, fold_condition=False)
        layers = [
            ADSALayer(config, image_start, max_tokens, columns, text.num_attention_heads)
            for _ in range(text.num_hidden_layers)
        ]
        super().__init__(layers=layers, offloading=offloading)

    def _cores(self) -> list[LayerCache]:
        return [layer.core for layer in self.layers if layer.core is not None]

    def nbytes(self) -> int:
        """Bytes really allocated, by the storages behind the tensors, bookkeeping included."""
        return sum(_allocated(core) for core in self._cores())

    def kv_nbytes(self) -> int:
        """Bytes of keys and values alone."""
        return sum(tensor.nbytes for core in self._cores() for tensor in core.slots.kv_tensors().values())


@contextmanager
def bounded(model: transformers.PreTrainedModel, config: CacheConfig, **options) -> Iterator[list[ADSACache]]:
    """Inside, each sequence that ``model`` begins gets an :class:`ADSACache` in place of the library's own cache.

    For models that decode with more than one cache, as Emu3 does: guidance makes another one, out of the user's reach.

        with bounded(model, config) as caches:
            model.generate(**inputs, guidance_scale=3.0, negative_prompt_ids=...)

    Args:
        model: whose ``forward`` takes ``past_key_values``.
        config, options: as :class:`ADSACache` takes them.

    Yields:
        The caches, in the order in which they came into use.

    Raises:
        ValueError: none did, as ``forward`` was never called: Janus decodes by a part of the model. Give such a model
            its cache by ``past_key_values``.
    """
    caches: list[ADSACache] = []

    def supply(module, args, kwargs):
        given = kwargs.get("past_key_values")
        if (
            kwargs.get("use_cache") is False
            or isinstance(given, ADSACache)
            or (given is not None and given.get_seq_length())
        ):
            return None
        caches.append(ADSACache(config, module.config, **options))
        return args, kwargs | {"past_key_values": caches[-1]}

    handle = model.register_forward_pre_hook(supply, with_kwargs=True)
    try:
        yield caches
    finally:
        handle.remove()
    if not caches:
        raise ValueError(
            f"{type(model).__name__}.forward began no sequence, so nothing was bounded; give generate() its cache: "
            "past_key_values=ADSACache(...)"
        )


def _allocated(core: LayerCache) -> int:
    """Bytes of the storages behind all tensors of a layer."""
    storages = [tensor.untyped_storage() for tensor in core.slots.tensors().values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _attends(config: CacheConfig) -> bool:
    """Whether a cache must do the attention to image tokens itself."""
    return config.merges or config.rule.query_lines > 0 or config.rule.attention_window is not None


def _own(config: CacheConfig) -> str:
    """How messages about that begin."""
    return f"cache policy {config.policy!r}{' with merge' * config.merges} does the attention to image tokens itself"


def _check(config: CacheConfig, image_start: int | None, max_tokens: int | None, columns: int | None) -> None:
    """Raises ValueError for what no model can have."""
    for name, value, low in (("image_start", image_start, 0), ("max_tokens", max_tokens, 1), ("columns", columns, 1)):
        if value is not None and (not isinstance(value, int) or value < low):
            raise ValueError(f"{name} must be a whole number of tokens, at least {low}, not {value!r}")
    if max_tokens is None and (config.policy == "full" or config.mode == "select"):
        what = "policy 'full'" if config.policy == "full" else 'mode "select"'
        raise ValueError(f"{what} holds every image token: say how many there will be, ADSACache(..., max_tokens=N)")
    if columns is None and (config.rule.planar or config.rule.query_lines or config.merges):
        what = f"cache policy {config.policy!r}{' with merge' * config.merges} looks at lines of the image"
        if max_tokens is None:
            raise ValueError(f"{what}: ADSACache(..., columns=N)")
        if math.isqrt(max_tokens) ** 2 != max_tokens:
            raise ValueError(
                f"{what}, and {max_tokens} tokens are no square: ADSACache(..., columns=N), or --columns N"
            )


def _text_config(model_config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The decoder's part of a configuration. Raises ValueError if not every layer attends to all of the past."""
    text = model_config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if not getattr(text, "layer_types", None):
        kinds |= {name for name in ("sliding_window", "attention_chunk_size") if getattr(text, name, None) is not None}
    if kinds or not hasattr(text, "num_hidden_layers"):
        raise ValueError(
            f"ADSACache is for models whose layers all attend to all of the past; {type(text).__name__} "
            f"{'has ' + ', '.join(sorted(kinds)) if kinds else 'names no layers'}"
        )
    return text


# The memory planner.


def plan(
    config: CacheConfig,
    model_config: transformers.PretrainedConfig,
    *,
    prompt: int,
    tokens: int,
    dtype: torch.dtype,
    columns: int | None = None,
) -> int:
    """Bytes of an :class:`ADSACache` per row, bookkeeping included.

    Args:
        config: what to keep.
        model_config: of the model.
        prompt: tokens before the image.
        tokens: image tokens.
        dtype: of the model.
        columns: as :class:`ADSACache` takes them.
    """
    text = _text_config(model_config)
    heads, dim = _heads(text)
    layer = ADSALayer(replace(config, fold_condition=False), prompt, tokens, columns, text.num_attention_heads)
    layer.lazy_initialization(torch.empty(1, heads, 1, dim, dtype=dtype))
    return text.num_hidden_layers * _allocated(layer.core)


def _heads(text: transformers.PretrainedConfig) -> tuple[int, int]:
    """(heads of keys and values, their size)."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _parameters(model_config: transformers.PretrainedConfig) -> tuple[str, int]:
    """Name of the model's class and number of its parameters; none of them is allocated."""
    name = (model_config.architectures or [""])[0]
    with torch.device("meta"):
        if hasattr(transformers, name):
            model = getattr(transformers, name)(model_config)
        else:
            model = transformers.AutoModel.from_config(model_config)
    return type(model).__name__, sum(parameter.numel() for parameter in model.parameters())


def _fed(
    config: CacheConfig,
    text: transformers.PretrainedConfig,
    prompt: int,
    tokens: int,
    dtype: torch.dtype,
    columns: int | None,
) -> tuple[int, int]:
    """(most keys ever handed out, most bytes ever allocated) by one layer that a prompt and an image went through."""
    heads, dim = _heads(text)
    layer = ADSALayer(replace(config, fold_condition=False), prompt, tokens, columns, text.num_attention_heads)
    generator = torch.Generator().manual_seed(0)
    keys = most = 0
    for length in [prompt] * (prompt > 0) + [1] * tokens:
        k, v = torch.randn(2, 1, heads, length, dim, generator=generator).to(dtype)
        keys = max(keys, layer.update(k, v)[0].shape[2])
        if layer.attends:
            layer.attend(k.repeat_interleave(text.num_attention_heads // heads, dim=1), None, None)
        most = max(most, _allocated(layer.core))
    return keys, most


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m adsa.hf",
        description="Plan the memory of a model's cache, dense and within a budget, without loading its weights; and "
        "check the plan by feeding one layer of the model's shape on the CPU.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CONFIG", help="folder, config.json, or name on the Hugging Face hub")
    add("--budget", type=int, required=True, metavar="N", help="slots for image tokens, per layer and row")
    add("--tokens", type=int, required=True, metavar="T", help="image tokens to be decoded")
    add("--prompt", type=int, default=64, help="tokens before the image (default: 64)")
    add("--columns", type=int, metavar="N", help="tokens in a line of the image (default: it is square)")
    add("--policy", default="adsa", help="which tokens stay (default: adsa)")
    add("--cache-dtype", choices=sorted(DTYPES), help="of keys and values (default: the model's)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="bf16", help="of the model (default: bf16)")
    add("--guidance", action="store_true", help="two rows an image, as classifier-free guidance takes")
    add("--memory", type=float, nargs="+", default=[24, 80], metavar="GIB", help="of the device (default: 24 80)")
    args = parser.parse_args(argv)
    try:
        report, agrees = _report(args)
    except (ValueError, OSError) as error:
        sys.exit(f"adsa.hf: {error}")
    print(report)
    if not agrees:
        sys.exit("adsa.hf: the layer took more than planned")


def _report(args: argparse.Namespace) -> tuple[str, bool]:
    """The planner's text, and whether a layer that was fed kept to it."""
    try:
        model_config = transformers.AutoConfig.from_pretrained(args.model)
    except (ValueError, OSError) as error:
        here = "" if Path(args.model).exists() else "no folder or file here, and as a name on the hub: "
        raise ValueError(f"{args.model}: {here}{error}") from error
    config = CacheConfig(args.policy, args.budget, dtype=args.cache_dtype)
    _check(config, args.prompt, args.tokens, args.columns)
    text, dtype, rows = _text_config(model_config), DTYPES[args.dtype], 1 + args.guidance
    heads, dim = _heads(text)
    name, parameters = _parameters(model_config)
    weights = parameters * dtype.itemsize
    lines = [
        f"{name}: {text.num_hidden_layers} layers, {heads} key/value heads of {dim}, "
        f"{parameters / 1e9:.2f} B parameters, {weights / 2**30:.2f} GiB in {args.dtype}",
        "",
        f"| cache | slots | MiB an image | {' | '.join(f'images at once in {m:g} GiB' for m in args.memory)} |",
        "|---" * (3 + len(args.memory)) + "|",
    ]
    sizes = {"prompt": args.prompt, "tokens": args.tokens, "dtype": dtype, "columns": args.columns}
    for label, cache in (("dense", CacheConfig("full")), (args.policy, config)):
        need = rows * plan(cache, model_config, **sizes)
        fits = [max(0, int((m * 2**30 - weights) // need)) for m in args.memory]
        slots = f"{args.prompt} + {cache.slots(args.tokens)}"
        lines.append(f"| {label} | {slots} | {need / 2**20:.1f} | {' | '.join(map(str, fits))} |")
    keys, most = _fed(config, text, **sizes)
    planned = plan(config, model_config, **sizes) // text.num_hidden_layers
    lines += [
        "",
        f"Weights and cache alone, {'two rows' if args.guidance else 'one row'} an image. One layer that "
        f"{args.prompt} + {args.tokens} tokens went through handed out {keys} keys and held {most:,} bytes at most; "
        f"planned: {args.prompt + config.slots(args.tokens)} keys, {planned:,} bytes.",
    ]
    return "\n".join(lines), keys <= args.prompt + config.slots(args.tokens) and most <= planned


if __name__ == "__main__":
    main()
