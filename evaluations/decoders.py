"""What the benchmark times: this project's decoding, and what others do instead, all behind one interface.

A decoder has a ``model`` that is called as :class:`Transformer` is, and makes caches for it, so that the same
:func:`generate` and the same step drive every one of them.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from adsa import CacheConfig, KVCache
from adsa.storage import CODECS, Plain
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.gpt import Transformer
from autoregressive.models.recorded import RecordedSteps
from autoregressive.models.sampling import draw, guide, probabilities

# Decoders


class Decoder:
    """Our model with a cache of ours.

    Args:
        name: in tables.
        model: whose steps are timed; its ``forward`` may be compiled.
        config: of the cache.
        records: whether steps are CUDA graphs.
    """

    window: int | None = None  # of ZipAR

    def __init__(self, name: str, model: Any, config: CacheConfig | None = None, *, records: bool = False):
        self.name, self.model, self.config, self.records = name, model, config, records
        self.splits = not records  # whether the parts of a step can be told apart
        self.budget = config.budget if config else None
        self.codec = CODECS.get(config.dtype if config else None, Plain())

    def new_cache(self, rows: int, tokens: int) -> Any:
        """An empty cache. ``rows``: both halves of guidance included."""
        return self.model.new_cache(self.config, rows, tokens, fixed=self.records)

    def fill(self, kv: Any, count: int) -> None:
        """Take random keys and values in, as of the condition and `count` image tokens.

        A cache that evicts takes no more than it holds: it is as full as it will be.
        """
        args, weight = self.model.config, self.model.tok_embeddings.weight
        shape = (2, kv.batch, args.kv_heads, 1, args.head_dim)
        for layer in kv.layers:
            condition = (*shape[:3], args.cls_token_num, args.head_dim)
            layer.insert_condition(*torch.randn(condition, device=weight.device, dtype=weight.dtype))
        slots = kv.layers[0].slots
        watched = slots.attention is not None or slots.queries is not None
        for _ in range(min(slots.capacity, count)):
            for layer in kv.layers:
                k, v = torch.randn(shape, device=weight.device, dtype=weight.dtype)
                if watched:  # else nobody looks at what attention would make of it
                    q = torch.randn(kv.batch, args.n_head, 1, args.head_dim, device=weight.device, dtype=weight.dtype)
                    layer.attend(q, k, v)
                else:
                    layer.enter(k, v)

    def attended(self, kv: Any, tokens: int, steps: int) -> float:
        """Slots, condition included, that a step attends to: the mean over the last `steps` of `tokens` steps.

        For others than ours too it is what they need to attend to, whatever they do attend to.
        """
        condition = kv.condition_slots if self.config else self.model.config.cls_token_num
        most = self.budget or tokens
        return condition + statistics.mean(min(position + 1, most) for position in range(tokens - steps, tokens))

    def vector_bytes(self) -> float:
        """Of a key, or of a value, as the cache holds it."""
        dim, dtype = self.model.config.head_dim, self.model.tok_embeddings.weight.dtype
        return sum(part.nbytes for part in self.codec.encode(torch.zeros(dim, dtype=dtype)))


class ZipAR(Decoder):
    """Our model, several rows of the image at once (:class:`~autoregressive.models.schedule.Schedule`).

    Args:
        name, model, config: as of :class:`Decoder`.
        window: of the schedule.
    """

    def __init__(self, name: str, model: Transformer, config: CacheConfig, window: int):
        super().__init__(name, model, config)
        self.window, self.splits = window, False

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """Raises ValueError for a budget that is too small for the tokens of a pass."""
        return new_cache(self.model, rows, tokens, cache=self.config, zipar_window=self.window)

    @contextmanager
    def passes(self, device: torch.device) -> Iterator[list[float]]:
        """Afterwards, the list has the seconds from each pass inside to the next."""
        clock, seconds = Clock(device), []
        hook = self.model.register_forward_pre_hook(lambda *_: clock.mark())
        try:
            yield seconds
        finally:
            hook.remove()
        seconds += clock.seconds()


class UpstreamLayer:
    """LlamaGen's cache of one layer: as long as the whole sequence from the start, all of it attended under a mask."""

    def __init__(self, cache: "UpstreamCache", shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.cache = cache
        self.k, self.v = torch.zeros(2, *shape, dtype=dtype, device=device).unbind()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :meth:`adsa.LayerCache.attend`."""
        keys, values = self.update(k, v)
        times = q.shape[1] // k.shape[1]  # copies even when it is 1
        keys, values = keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.cache.rows)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write at the sequence's positions, and return all slots."""
        self.k[:, :, self.cache.position] = k
        self.v[:, :, self.cache.position] = v
        return self.k, self.v


class UpstreamCache:
    """One :class:`UpstreamLayer` per layer, and the causal mask, which upstream has for every row of the batch."""

    def __init__(self, model: Transformer, batch: int, tokens: int):
        args, weight = model.config, model.tok_embeddings.weight
        length = -(-(args.cls_token_num + tokens) // 8) * 8
        self.batch, self.max_tokens, self.used, self.order = batch, tokens, False, None
        self.mask = torch.ones(length, length, dtype=torch.bool, device=weight.device).tril().repeat(batch, 1, 1)
        shape = (batch, args.kv_heads, length, args.head_dim)
        self.layers = [UpstreamLayer(self, shape, weight.dtype, weight.device) for _ in range(args.n_layer)]

    def begin(self, position: Tensor) -> None:
        """The next tokens are at these positions of the sequence."""
        self.position, self.rows = position, self.mask[:, None, position]

    def kv_nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def nbytes(self) -> int:
        """Bytes of keys, values and mask."""
        return self.kv_nbytes() + self.mask.nbytes


class UpstreamModel:
    """Our model, called with an :class:`UpstreamCache` and without fused attention, which upstream turns off."""

    def __init__(self, model: Transformer):
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *, cache: UpstreamCache, input_pos: Tensor | None = None, **tokens: Tensor) -> tuple:
        if input_pos is None:
            cache.begin(torch.arange(self.config.cls_token_num, device=cache.mask.device))
        else:
            cache.begin(input_pos)
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(cache=cache, input_pos=input_pos, **tokens)


class Upstream(Decoder):
    """LlamaGen's own way of caching and attending (:class:`UpstreamLayer`) in our model."""

    def __init__(self, name: str, model: Transformer):
        super().__init__(name, UpstreamModel(model))

    def new_cache(self, rows: int, tokens: int) -> UpstreamCache:
        return UpstreamCache(self.model.model, rows, tokens)

    def fill(self, kv: UpstreamCache, count: int) -> None:
        args = self.model.config
        kv.begin(torch.arange(args.cls_token_num + count, device=kv.mask.device))
        for layer in kv.layers:
            shape = (2, kv.batch, args.kv_heads, len(kv.position), args.head_dim)
            layer.update(*torch.randn(shape, device=layer.k.device, dtype=layer.k.dtype))


class HFCache:
    """A cache of transformers, with what :func:`generate` asks of a cache."""

    def __init__(self, past: Any, rows: int, tokens: int):
        self.past, self.batch, self.max_tokens, self.used, self.order = past, rows, tokens, False, None

    def kv_nbytes(self) -> int:
        """Bytes of keys and values; 0 before the first token, as transformers allocates then."""
        if hasattr(self.past, "kv_nbytes"):  # an ADSACache
            return self.past.kv_nbytes()
        tensors = [t for layer in self.past.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return self.past.nbytes() if hasattr(self.past, "nbytes") else self.kv_nbytes()


class HFModel:
    """transformers' Llama of a model's shape and on its weights, called as :class:`Transformer` is.

    Its positions are of one dimension, so that it computes something else, at the same cost. The condition is as many
    tokens of the vocabulary.
    """

    def __init__(self, model: Transformer):
        import transformers  # slow to import

        args = self.config = model.config
        self.training, self.null_condition, self.tok_embeddings = False, model.null_condition, model.tok_embeddings
        config = transformers.LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.dim,
            intermediate_size=args.ffn_dim,
            num_hidden_layers=args.n_layer,
            num_attention_heads=args.n_head,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            max_position_embeddings=args.cls_token_num + args.block_size,
            rms_norm_eps=args.norm_eps,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.llama = transformers.LlamaForCausalLM(config).eval()
        self.llama.load_state_dict(_llama_weights(model), strict=True, assign=True)
        rotary = self.llama.model.rotary_emb  # its table is no weight, and on the meta device
        self.llama.model.rotary_emb = type(rotary)(config).to(model.tok_embeddings.weight.device)
        self.llama.requires_grad_(False)
        self.forward = self.llama.forward

    def __call__(
        self, *, cache: HFCache, cond_idx: Tensor | None = None, idx: Tensor | None = None, input_pos=None
    ) -> tuple[Tensor, None]:
        """float32 logits ``[B, 1, vocab_size]``, and None."""
        if cond_idx is not None:
            shape = (len(cond_idx), self.config.cls_token_num)
            idx = torch.zeros(shape, dtype=torch.long, device=cond_idx.device)
            input_pos = torch.arange(shape[1], device=cond_idx.device)
        output = self.forward(
            input_ids=idx,
            position_ids=input_pos.unsqueeze(0),
            cache_position=input_pos,  # what transformers 4 writes a static cache by
            past_key_values=cache.past,
            use_cache=True,
        )
        logits = output.logits[:, -1:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), None


def _llama_weights(model: Transformer) -> dict[str, Tensor]:
    """Views of our weights, by transformers' names."""
    weights = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for i, layer in enumerate(model.layers):
        heads = [n * model.config.head_dim for n in layer.attention.heads]
        q, k, v = layer.attention.wqkv.weight.split(heads)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attention.wo.weight,
            "mlp.gate_proj": layer.feed_forward.w1.weight,
            "mlp.up_proj": layer.feed_forward.w3.weight,
            "mlp.down_proj": layer.feed_forward.w2.weight,
            "input_layernorm": layer.attention_norm.weight,
            "post_attention_layernorm": layer.ffn_norm.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    return weights


class HF(Decoder):
    """transformers' Llama with its DynamicCache, its StaticCache, or an ADSACache.

    Args:
        name, model: as of :class:`Decoder`.
        cache: "dynamic", "static", or what an ADSACache keeps.
    """

    def __init__(self, name: str, model: HFModel, cache: str | CacheConfig):
        super().__init__(name, model)
        self.cache, self.splits = cache, False
        if isinstance(cache, CacheConfig):
            self.budget, self.codec = cache.budget, CODECS.get(cache.dtype, Plain())

    def new_cache(self, rows: int, tokens: int) -> HFCache:
        """Raises ValueError for a policy that needs attention of its own."""
        import transformers

        from adsa.hf import ADSACache

        config, condition = self.model.llama.config, self.model.config.cls_token_num
        if self.cache == "static":
            past = transformers.StaticCache(config=config, max_cache_len=condition + tokens)
        elif self.cache == "dynamic":
            past = transformers.DynamicCache(config=config)
        else:
            past = ADSACache(self.cache, config, image_start=condition, max_tokens=tokens)
        return HFCache(past, rows, tokens)

    def fill(self, kv: HFCache, count: int) -> None:
        args, weight = self.model.config, self.model.tok_embeddings.weight
        count = min(count, self.budget or count)  # one that evicts takes no more than it holds
        where = torch.arange(args.cls_token_num + count, device=weight.device)
        for layer in range(args.n_layer):
            shape = (2, kv.batch, args.kv_heads, len(where), args.head_dim)
            k, v = torch.randn(shape, device=weight.device, dtype=weight.dtype)
            kv.past.update(k.clone(), v.clone(), layer, {"cache_position": where})


# Time and memory


class Clock:
    """Moments on the device's own time line: nothing waits until the seconds between them are asked for."""

    def __init__(self, device: torch.device):
        self.device, self.moments = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each moment and the next."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        if self.device.type != "cuda":
            return [end - start for start, end in pairs]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def _median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    for _ in range(2):
        work()
    clock = Clock(device)
    clock.mark()
    for _ in range(repeats):
        work()
        clock.mark()
    return statistics.median(clock.seconds())


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the roofline is made of, measured now.

    Returns:
        "bytes_per_second": of a copy much larger than any cache, reads and writes counted, or of reading alone, as
        most of a step is, where that moves more; "flops_per_second": of a product of square matrices in this dtype.
    """
    cuda = device.type == "cuda"
    source = torch.empty(2**30 if cuda else 2**29, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source).zero_()
    copy = _median_seconds(lambda: target.copy_(source), device)
    read = _median_seconds(lambda: source.view(torch.int64).sum(), device)
    n = 8192 if cuda else 768
    a, b, out = torch.randn(3, n, n, device=device, dtype=dtype)
    product = _median_seconds(lambda: torch.mm(a, b, out=out), device)
    return {"bytes_per_second": source.nbytes * max(2 / copy, 1 / read), "flops_per_second": 2 * n**3 / product}


def bytes_in_use(device: torch.device, *, peak: bool = False) -> int:
    """Bytes of torch's allocator, now or at most since :func:`forget`; on the CPU what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def forget(device: torch.device) -> None:
    """Give unused memory back, and count the peak from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def demand(model: Transformer, rows: int, attended: float, vector_bytes: float) -> dict[str, float]:
    """What a decode step of this model can't do without.

    Args:
        model: which.
        rows: both halves of guidance included.
        attended, vector_bytes: slots, and bytes of a key or a value in each, see :class:`Decoder`.

    Returns:
        "weight_bytes": of all layers, the last norm and the head (of embeddings a step reads a row only); "kv_bytes":
        of the keys and values attended to, each read once; "bytes", both; "flops": of matrix products and attention.
    """
    args = model.config
    each = args.dim * (args.n_head + 2 * args.kv_heads) * args.head_dim + args.dim**2 + 3 * args.dim * args.ffn_dim
    products = args.n_layer * each + args.vocab_size * args.dim  # however they lie in memory
    others = [x for part in (model.layers, model.norm, model.output) for x in part.parameters() if x.ndim == 1]
    weight_bytes = products * model.output.weight.element_size() + sum(x.nbytes for x in others)
    slots = args.n_layer * rows * attended
    kv_bytes = 2 * slots * args.kv_heads * vector_bytes
    return {
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "bytes": weight_bytes + kv_bytes,
        "flops": 2 * rows * products + 4 * slots * args.head_dim * args.n_head,
    }


class Stepper:
    """Decode steps that go on from a filled cache: forward, guidance, the draw of a token.

    Args:
        decoder: which.
        kv: filled.
        images: rows are as many, or twice as many if guided.
        guided: whether there is an unconditional half.
        position: of the next image token.
        forward: called as the model is; None: the decoder's model.
    """

    def __init__(
        self, decoder: Decoder, kv: Any, images: int, guided: bool, position: int, forward: Callable | None = None
    ):
        model, device = decoder.model, decoder.model.tok_embeddings.weight.device
        self.model, self.kv, self.guided, self.device = model, kv, guided, device
        self.forward = forward or model
        self.token = torch.zeros(images, dtype=torch.long, device=device)
        self.noise = torch.rand(images, device=device)
        self.position = torch.tensor([model.config.cls_token_num + position], device=device)

    def step(self) -> None:
        """One more token."""
        idx = self.token.repeat(2 if self.guided else 1).unsqueeze(1)
        logits = self.forward(idx=idx, input_pos=self.position, cache=self.kv)[0][:, -1]
        if self.guided:
            logits = guide(logits, 3.0)
        self.token = draw(probabilities(logits), self.noise)
        self.position += 1

    def time(self, steps: int) -> list[float]:
        """Seconds of each of the next steps."""
        clock = Clock(self.device)
        clock.mark()
        for _ in range(steps):
            self.step()
            clock.mark()
        return clock.seconds()

    def trace(self, steps: int, path: Path) -> None:
        """Leave torch.profiler's trace of the next steps, for chrome://tracing or ui.perfetto.dev."""
        with profile() as profiler:
            self.time(steps)
        profiler.export_chrome_trace(str(path))

    def breakdown(self, steps: int) -> dict[str, float]:
        """Mean seconds of the parts of a step; they sum to the step, which the measuring itself makes longer.

        A CPU's loops write to the cache, and compare, as they attend: that is attention here.

        Only where :attr:`Decoder.splits`.
        """
        names = ("advance", "chosen", "compare", "cache", "attend", "head", "step")
        spans: dict[str, list[Clock]] = {name: [] for name in names}

        def timed(name: str, function: Callable) -> Callable:
            def call(*args):
                clock = Clock(self.device)
                spans[name].append(clock)
                clock.mark()
                result = function(*args)
                clock.mark()
                return result

            return call

        def head(*_) -> None:
            spans["head"].append(Clock(self.device))
            spans["head"][-1].mark()

        hook = self.model.output.register_forward_pre_hook(head)
        slots = dict.fromkeys(layer.slots for layer in self.kv.layers if hasattr(layer, "slots"))  # upstream has none
        for each in slots:
            each.advance, each.chosen = timed("advance", each.advance), timed("chosen", each.chosen)
            each.multiply, each.compared = timed("compare", each.multiply), timed("compare", each.compared)
        takes = "_write" if slots else "update"
        for layer in self.kv.layers:
            setattr(layer, takes, timed("cache", getattr(layer, takes)))
            layer.attend = timed("attend", layer.attend)
        try:
            for _ in range(steps):
                whole = Clock(self.device)
                whole.mark()
                self.step()
                whole.mark()
                spans["step"].append(whole)
                spans["head"][-1].moments.append(whole.moments[-1])
        finally:
            hook.remove()
            for layer in self.kv.layers:
                delattr(layer, takes)
                del layer.attend
            for each in slots:
                del each.advance, each.chosen, each.multiply, each.compared
        spent = {name: sum(sum(clock.seconds()) for clock in clocks) / steps for name, clocks in spans.items()}
        return {
            "selection": spent["advance"] + spent["chosen"] + spent["compare"],
            "cache writes": spent["cache"],
            "attention": spent["attend"] - spent["cache"] - spent["advance"] - spent["chosen"] - spent["compare"],
            "head and sampling": spent["head"],
            "projections and FFN": spent["step"] - spent["attend"] - spent["head"],
        }


def time_image(decoder: Decoder, kv: Any, images: int, guided: bool, tokens: int) -> float:
    """Seconds of a whole decode into an unused cache; of recorded steps, after those that record them."""
    args, weight = decoder.model.config, decoder.model.tok_embeddings.weight
    if args.model_type == "c2i":
        cond = torch.zeros(images, dtype=torch.long, device=weight.device)
    else:
        cond = torch.randn(images, args.cls_token_num, args.caption_dim).to(weight)
    options = {"cfg_scale": 3.0 if guided else 1.0, "seeds": torch.arange(images)}
    if decoder.records:
        options["steps"] = RecordedSteps(decoder.model, kv)
        for _ in range(2):  # a kind of step is recorded when it comes again
            generate(decoder.model, cond, tokens, **options)
            kv.reset()
    else:
        options |= {"kv": kv, "zipar_window": decoder.window}
    clock = Clock(weight.device)
    clock.mark()
    generate(decoder.model, cond, tokens, **options)
    clock.mark()
    return clock.seconds()[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that there is no memory left, on any device."""
    told = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA's, cuBLAS', the CPU allocator's
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in str(error) for each in told)
