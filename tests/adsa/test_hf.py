"""ADSACache under the public generate() of each family of models: against the library's own cache, and brute force."""

import contextlib
import copy
import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adsa import CacheConfig, LayerCache
from adsa.hf import ADSACache, ADSALayer, adsa_attention, bounded, main, plan
from adsa.policies import POLICIES
from adsa.slots import Slots
from tests.reference import Attention

from .hf_models import FAMILIES, PROMPT, TOKENS, build, draw, llama_config, prompts

BUDGET = {"budget": 10, "prefix": 2, "local": 4}
BOUNDED = [name for name in POLICIES if name != "full"]
# Which attention, and what for.
USES = [("eager", "adsa"), ("sdpa", "adsa"), ("adsa", "adsa_plus")]
GUIDED = {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[0, 7, 8], [0, 0, 8], [6, 7, 8]])}


def configured(policy="adsa", **options) -> CacheConfig:
    return CacheConfig(policy, **BUDGET | options)


def cached(model, policy="adsa", **options) -> ADSACache:
    fields = CacheConfig.__dataclass_fields__
    config = configured(policy, **{k: v for k, v in options.items() if k in fields})
    return ADSACache(config, model.config, **{"columns": 5} | {k: v for k, v in options.items() if k not in fields})


def layer_of(config, max_tokens):
    return ADSALayer(config, None, max_tokens, None, n_head=4)


class Literal(transformers.DynamicCache):
    """The dense cache, whose image tokens attend by the literal definition."""

    latest = None  # the cache whose attention comes next

    def __init__(self, model, policy, *, columns=5, image_start=None, **options):
        super().__init__()
        text, config = model.config.get_text_config(decoder=True), configured(policy, **options)
        choice = {"policy": policy, **BUDGET, "mode": config.mode, "renew_every": config.renewal}
        heads = text.num_attention_heads, text.num_key_value_heads
        self.new = functools.partial(
            Attention, *heads, columns, choice | {"merge": config.merges}, granularity=config.granularity
        )
        self.image_start, self.rows = image_start, {}

    def update(self, k, v, *args, **kwargs):
        Literal.latest = self
        return super().update(k, v, *args, **kwargs)

    def attend(self, layer, q, k, v, mask):
        """``[B, Hq, 1, D]`` of a single image token; None for a prompt, whose tokens see all before them."""
        begin = k.shape[2] - q.shape[2]
        self.image_start = k.shape[2] if self.image_start is None else self.image_start
        out = []
        for row, attention in enumerate(self.rows.setdefault(layer, [self.new() for _ in k])):
            for t in range(begin, k.shape[2]):
                token = q[row, :, t - begin].numpy(), k[row, :, t].numpy(), v[row, :, t].numpy()
                if t >= self.image_start:
                    out.append(attention.images([(*token, t - self.image_start, False)])[0])
                elif mask[row, 0, -1, t] == 0:
                    attention.condition(token[2], token[1])
        return torch.from_numpy(np.stack(out)).unsqueeze(2) if out and q.shape[2] == 1 else None

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.rows = {i: [copy.deepcopy(rows[b]) for b in beam_idx] for i, rows in self.rows.items()}


def literal_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """By its formula."""
    out = Literal.latest.attend(module.layer_idx, query, key, value, attention_mask)
    if out is None:
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling + attention_mask
        out = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("literal", literal_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("literal", eager_mask)


def logits(model, cache, **kwargs):
    """Of every step, ``[rows, TOKENS, vocabulary]``."""
    out = draw("", model, cache, return_dict_in_generate=True, output_logits=True, **kwargs)
    return torch.stack(out.logits, dim=1)


@contextlib.contextmanager
def watching(monkeypatch, seen):
    """Put (layer, keys handed out, bytes of keys and values, bytes of all) into ``seen`` at each step."""
    update = ADSALayer.update

    def watched(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        slots = self.core.slots
        storages = [tensor.untyped_storage() for tensor in slots.tensors().values()]
        total = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        seen.append((id(self), keys.shape[2], sum(t.nbytes for t in slots.kv_tensors().values()), total))
        return keys, values

    with monkeypatch.context() as patch:
        patch.setattr(ADSALayer, "update", watched)
        yield


@pytest.mark.parametrize(("attention", "policy"), USES)
@pytest.mark.parametrize("family", FAMILIES)
def test_enough_budget_gives_the_librarys_tokens(family, attention, policy):
    model = build(family, attention, torch.float32)
    expected = draw(family, model, seed=2)
    assert len(expected.unique()) > 5
    for budget in (TOKENS, 2 * TOKENS):
        assert torch.equal(draw(family, model, cached(model, policy, budget=budget), seed=2), expected)
    assert not torch.equal(draw(family, model, cached(model, policy), seed=2), expected)


@pytest.mark.parametrize("policy", ["adsa", "adsa_plus", "h2o"])
@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_never_holds_more_than_it_says(family, dtype, policy, monkeypatch):
    """Keys handed out at every step, and bytes, which never change."""
    model, seen = build(family, "adsa", torch.bfloat16), []
    cache = cached(model, policy, dtype=dtype)
    with watching(monkeypatch, seen):
        draw(family, model, cache)
    rows, dim = (6 if family == "janus" else 3), 8
    vector = {None: 2 * dim, "int8": dim + 2, "int4": dim // 2 + 4}[dtype]
    assert {kv for _, _, kv, _ in seen} == {2 * rows * 2 * (PROMPT + 10) * vector}
    assert {2 * total for *_, total in seen} == {cache.nbytes()}
    lengths = [keys for layer, keys, *_ in seen if layer == id(cache.layers[0])]
    steps = len(lengths) - 1
    assert steps == TOKENS - 1
    assert lengths == [PROMPT] + [PROMPT + min(10, 1 + step) for step in range(steps)]
    assert cache.get_seq_length() == PROMPT + steps
    assert cache.kv_nbytes() == 2 * 2 * rows * 2 * (PROMPT + 10) * vector
    config = configured(policy, dtype=dtype)
    assert cache.nbytes() == rows * plan(config, model.config, prompt=PROMPT, tokens=TOKENS, dtype=torch.bfloat16)


@pytest.mark.parametrize(("attention", "policy"), USES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force(family, attention, policy):
    """Heads in groups, and rows padded on the left, where float64 allows that: eager attention makes NaN of padding."""
    model, (ids, mask) = build(family, attention), prompts()
    inputs = (ids, mask) if attention != "eager" else (ids.clamp(min=6), torch.ones_like(mask))
    tokens = draw(family, model, cached(model, policy), inputs=inputs)
    model.set_attn_implementation("literal")
    literal = Literal(model, policy)
    assert torch.equal(draw(family, model, literal, inputs=inputs), tokens)
    assert len(literal.rows) == 2


@pytest.mark.parametrize(
    "way",
    [
        *itertools.product(["head", "layer"], ["evict", "select"], [1, 3], [False]),
        ("head", "evict", 3, True),
        ("layer", "evict", 1, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", BOUNDED)
def test_every_policy_equals_brute_force(policy, way):
    options = dict(zip(("granularity", "mode", "renew_every", "merge"), way, strict=True))
    rule = POLICIES[policy]
    plain = rule.attention_window is None and not rule.query_lines and not options["merge"]
    model = build("llama", "sdpa" if plain else "adsa")
    out = logits(model, cached(model, policy, **options, max_tokens=TOKENS))
    model.set_attn_implementation("literal")
    torch.testing.assert_close(out, logits(model, Literal(model, policy, **options)), atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("janus", "glm_image")])
def test_flex_attention(family):
    """Where transformers has it; kernels are not compiled here, as the CPU's fail for the library's own caches too."""
    model = build(family, "flex_attention")
    with torch.compiler.set_stance("force_eager"):
        tokens = draw(family, model, cached(model))
    model.set_attn_implementation("literal")
    assert torch.equal(draw(family, model, Literal(model, "adsa")), tokens)


@pytest.mark.parametrize("policy", ["adsa", "adsa_plus", "h2o"])
def test_padding_is_not_seen(policy):
    """A row gets what it gets alone, without padding."""
    model, (ids, mask) = build("llama", "adsa"), prompts()
    together = logits(model, cached(model, policy), do_sample=False)
    for row, valid in enumerate(mask.bool()):
        alone = logits(
            model,
            cached(model, policy),
            inputs=(ids[row : row + 1, valid], mask[row : row + 1, valid]),
            do_sample=False,
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("budget", [10, TOKENS])
@pytest.mark.parametrize("policy", ["adsa", "adsa_plus"])
def test_beams(policy, budget):
    model, options = build("llama", "adsa"), {"num_beams": 3, "do_sample": False}
    tokens = draw("llama", model, cached(model, policy, budget=budget), **options)
    if budget == TOKENS:
        assert torch.equal(tokens, draw("llama", model, **options))
        return
    model.set_attn_implementation("literal")
    assert torch.equal(tokens, draw("llama", model, Literal(model, policy), **options))


@pytest.mark.parametrize("policy", ["adsa", "adsa_plus"])
def test_guidance_of_emu3(policy, monkeypatch):
    """Both caches are bounded, and give what brute force does."""
    model, seen = build("emu3", "adsa"), []
    with watching(monkeypatch, seen), bounded(model, configured(policy), columns=5) as caches:
        tokens = draw("emu3", model, **GUIDED)
    assert [cache.get_seq_length() for cache in caches] == [PROMPT + TOKENS - 1, 3 + TOKENS - 1]
    assert max(keys for _, keys, *_ in seen) == PROMPT + 10
    assert {kv for _, _, kv, _ in seen} == {2 * 3 * 2 * (prompt + 10) * 8 * 8 for prompt in (PROMPT, 3)}
    with bounded(model, configured(policy, budget=TOKENS), columns=5):
        enough = draw("emu3", model, **GUIDED)
    dense = draw("emu3", model, **GUIDED)
    assert torch.equal(enough, dense) and not torch.equal(tokens, dense)

    literals = []

    def supply(module, args, kwargs):
        if not isinstance(kwargs.get("past_key_values"), Literal):
            literals.append(Literal(model, policy))
            kwargs["past_key_values"] = literals[-1]
        return args, kwargs

    model.set_attn_implementation("literal")
    model.register_forward_pre_hook(supply, with_kwargs=True)
    assert torch.equal(draw("emu3", model, **GUIDED), tokens)
    assert len(literals) == 2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "janus"])
def test_bounded_is_the_same_as_a_cache_given(family):
    model = build(family)
    with bounded(model, CacheConfig("adsa", **BUDGET)) as caches:
        tokens = draw(family, model)
    assert torch.equal(tokens, draw(family, model, cached(model))) and len(caches) == 1
    assert not torch.equal(tokens, draw(family, model))


def test_what_is_never_bounded_is_told():
    model = build("janus")
    told = r"JanusForConditionalGeneration\.forward began no.*past_key_values=ADSACache"
    with pytest.raises(ValueError, match=told), bounded(model, CacheConfig("adsa", **BUDGET)):
        draw("janus", model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("chunk", [None, 5, 8])
@pytest.mark.parametrize(
    ("image_start", "policy", "merge"),
    [*itertools.product([4, 8, 16, 20], ["adsa"], [False, True]), *((start, "adsa_plus", True) for start in (16, 20))],
)
def test_image_start(image_start, policy, merge, chunk):
    """The prompt may hold image tokens, or only a part of what comes before the image, and may come in parts."""
    model, way = build("llama", "adsa"), {"image_start": image_start, "merge": merge}
    options = {"inputs": prompts(length=16), "prefill_chunk_size": chunk}
    out = logits(model, cached(model, policy, **way), **options)
    model.set_attn_implementation("literal")
    expected = logits(model, Literal(model, policy, **way), **options)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [None, "int8", "int4", "bf16"])
@pytest.mark.parametrize("mode", ["evict", "select"])
@pytest.mark.parametrize("policy", BOUNDED)
def test_layer_hands_out_what_the_core_attends_to(policy, mode, dtype):
    """Of whatever precision the cache is, keys and values come in the model's."""
    config = configured(policy, mode=mode, dtype=dtype, fold_condition=False)
    layer = layer_of(config, 20)
    shape = {"batch": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "condition_tokens": 4, "max_tokens": 20}
    core = LayerCache(Slots(config, **shape, dtype=torch.float32, device="cpu"))
    q, k, v = torch.randn(3, 3, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    q = torch.cat([q, q.flip(0)], dim=1)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    for first, end in [(0, 4), *((t, t + 1) for t in range(4, 24))]:
        expected = core.attend(*(x[:, :, first:end] for x in (q, k, v)))
        sizes = layer.get_mask_sizes(end - first)
        keys, values = layer.update(k[:, :, first:end], v[:, :, first:end])
        assert sizes == (keys.shape[2], 0) and layer.get_seq_length() == end
        assert keys.dtype == values.dtype == torch.float32
        out, _ = adsa_attention(module, q[:, :, first:end], keys, values, None)
        torch.testing.assert_close(out.transpose(1, 2), expected, atol=0.02 if dtype == "bf16" else 1e-5, rtol=0)


def test_reset_begins_anew():
    """With another prompt of another length, and another number of rows."""
    model, (ids, mask) = build("llama"), prompts(2)
    inputs = ids[:, 3:], mask[:, 3:]
    cache = cached(model)
    draw("llama", model, cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0
    assert torch.equal(draw("llama", model, cache, inputs=inputs), draw("llama", model, cached(model), inputs=inputs))


@pytest.mark.parametrize("way", itertools.product(BOUNDED, ["evict", "select"], [1, 3]), ids=str)
def test_rows_can_be_repeated_and_selected(way):
    """As if the rows had been so from the beginning. Some of their prompts are padded."""
    policy, mode, renew_every = way
    config = configured(policy, mode=mode, renew_every=renew_every, fold_condition=False)
    q, k, v = torch.randn(3, 3, 2, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.arange(5) >= torch.tensor([0, 2, 1]).view(3, 1, 1, 1)
    changes = [
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([5, 0])), [2, 0]),
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [0, 0]),
        (lambda layer: layer.batch_select_indices(torch.tensor([True, False])), [0]),
    ]

    def step(layer, rows, part):
        """Keys, values, and what attention to them gives if the layer has its own."""
        handed = (*layer.update(k[rows, :, part], v[rows, :, part]),)
        out = layer.attend(q[rows, :, part].repeat(1, 2, 1, 1), valid[rows], None) if layer.attends else None
        return handed if out is None else (*handed, out)

    layer, rows = layer_of(config, 30), [0, 1, 2]
    alone = [layer_of(config, 30) for _ in rows]
    for index, t in enumerate(range(4, 30)):
        if index % 6 == 5:
            change, rows = changes[index // 6]
            change(layer)
        part = slice(t, t + 1) if index else slice(0, 5)
        expected = [step(one, [row], part) for row, one in enumerate(alone)]
        for got, *singles in zip(step(layer, rows, part), *expected, strict=True):
            wanted = torch.cat([singles[row] for row in rows])
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    assert layer.core.slots.batch == 1


# Compiling takes ten seconds each: scripts/test_transformers.sh does them all.
COMPILED = [(family, *use) for family in FAMILIES for use in USES[1:]]


@pytest.mark.parametrize(
    ("family", "attention", "policy"),
    COMPILED
    if os.environ.get("COMPILE_ALL")
    else [one for one in COMPILED if one[:2] in (("llama", "sdpa"), ("janus", "adsa"))],
)
def test_compiles_no_graph_for_each_step(family, attention, policy):
    """Once full, and ranked twice, each step has its graph, without a break; one graph if it ranks each time.

    It takes long: scripts/test_transformers.sh asks for all.
    """
    model = build(family, attention)
    expected = draw(family, model, cached(model, policy))
    counter, frames = CompileCounter(), []
    torch._dynamo.reset()
    module = model.model.language_model if family in ("janus", "glm_image") else model
    compiled = torch.compile(module.forward, backend=counter, fullgraph=True)

    def counting(*args, **kwargs):
        frames.append(counter.frame_count)
        return compiled(*args, **kwargs)

    module.forward = counting
    assert torch.equal(draw(family, model, cached(model, policy)), expected)
    assert len(frames) == TOKENS and 2 <= counter.frame_count <= 8
    assert len(set(frames[14 if policy == "adsa" else 18 :])) == 1


def test_refusals():
    model = build("llama")
    own = (
        ("h2o", False, ""),
        ("adsa", True, " with merge"),
        ("adsa_plus", False, ""),
        ("adsa_plus", True, " with merge"),
    )
    for policy, merge, more in own:
        told = rf"'{policy}'{more} does the attention.* is 'sdpa': before .*set_attn_implementation\(\"adsa\"\)"
        with pytest.raises(ValueError, match=told):
            cached(model, policy, merge=merge)
    with pytest.raises(ValueError, match=r"policy 'full' holds every image token.*max_tokens=N"):
        ADSACache(CacheConfig("full"), model.config)
    with pytest.raises(ValueError, match='mode "select" holds every'):
        cached(model, mode="select")
    model.set_attn_implementation("adsa")
    for policy, merge in (("neighborhood", False), ("adsa_plus", False), ("adsa", True)):
        with pytest.raises(ValueError, match=rf"'{policy}'.* looks at lines.*columns=N"):
            cached(model, policy, merge=merge, columns=None)
    with pytest.raises(ValueError, match="image_start must be a whole number of tokens, at least 0, not -1"):
        cached(model, image_start=-1)
    sliding = transformers.Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="Qwen2Config has sliding_attention"):
        ADSACache(CacheConfig("adsa", 10), sliding)
    with pytest.raises(ValueError, match=r"Mistral.*has sliding_window"):
        ADSACache(CacheConfig("adsa", 10), transformers.MistralConfig(sliding_window=8))
    flash = llama_config()
    flash._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r'flash_attention_2 finds padding.*attn_implementation="sdpa"'):
        ADSACache(CacheConfig("adsa", 10), flash)


def test_a_models_own_scaling_is_kept():
    """Twice the scaling is as good as twice the queries."""
    outs = []
    for scaling, queries in ((2, 1), (1, 2)):
        model = build("llama", "adsa")
        for layer in model.model.layers:
            layer.self_attn.scaling *= scaling
            layer.self_attn.q_proj.weight.data *= queries
        outs.append([logits(model, cached(model, policy)) for policy in ("adsa_plus", "h2o")])
    torch.testing.assert_close(*outs, atol=1e-9, rtol=0)


def test_attention_that_asks_for_no_function_is_told():
    """Bloom's is a class of its own: to set "adsa" does nothing, and a model that was loaded so doesn't obey."""
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("adsa")
    with pytest.raises(ValueError, match=r"is '(eager|sdpa)': before the cache is made"):
        cached(model, "adsa_plus")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="adsa")
    with pytest.raises(ValueError, match=r"was not asked for that of the last ones.*or it is a class of its own"):
        draw("bloom", model, cached(model, "adsa_plus"))


def test_attention_that_no_longer_obeys_is_told():
    """From one step to the next; a new sequence can begin with the same cache."""
    model, step = build("llama", "adsa"), torch.tensor([[7]] * 3)
    cache = cached(model, "adsa_plus")
    draw("llama", model, cache)
    model.set_attn_implementation("sdpa")
    model(step, past_key_values=cache)
    with pytest.raises(ValueError, match=r'no longer "adsa" \(call model\.set_attn'):
        model(step, past_key_values=cache)
    cache.reset()
    model.set_attn_implementation("adsa")
    assert torch.equal(draw("llama", model, cache), draw("llama", model, cached(model, "adsa_plus")))


def test_what_adsas_attention_refuses():
    layer, module = layer_of(configured("adsa_plus"), 25), torch.nn.Module()
    k, q = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 4, 5, 8).double()
    keys, values = layer.update(k, k)
    with pytest.raises(ValueError, match=r"without this model's softcap, position_bias: take another policy"):
        adsa_attention(module, q, keys, values, None, softcap=30.0, position_bias=k, s_aux=None)
    with pytest.raises(ValueError, match=r"wants a mask of bool, not torch\.float64"):
        adsa_attention(module, q, keys, values, torch.zeros(2, 1, 5, 5).double())
    with pytest.raises(ValueError, match="several attentions share the keys"):
        adsa_attention(module, q, keys, values, None)
    model = build("llama", "adsa")
    for policy in ("adsa_plus", "h2o"):
        with pytest.raises(ValueError, match=rf"'{policy}'.*, one by one, and these are 2 at once: end the prompt"):
            model(torch.tensor([[7, 8]]), past_key_values=cached(model, policy, image_start=0))


def test_tokens_that_cannot_come_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match=r"\d more tokens came at once after a prompt of 3.*image_start=N"):
        draw("llama", model, cached(model), prefill_chunk_size=3)
    cache = cached(model, image_start=PROMPT)
    draw("llama", model, cache)
    with pytest.raises(ValueError, match="2 tokens came at once after some had been evicted"):
        model(torch.tensor([[7, 8]] * 3), past_key_values=cache)
    with pytest.raises(ValueError, match='mode "select" takes image tokens one at a time, and these are 2'):
        model(torch.tensor([[7, 8]]), past_key_values=cached(model, mode="select", max_tokens=20, image_start=0))
    with pytest.raises(ValueError, match="can't take tokens back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="differ in shape"):
        cached(model).update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4), 0)


class Stream(contextlib.nullcontext):
    """In place of a GPU's."""

    def wait_stream(self, other):
        pass


def test_offloading(monkeypatch):
    """Of three layers only those at work are here. What is away has no values, and must be fetched to be read."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    away, most = {}, []

    def move(slots, device):
        stores = slots.stored_k, slots.stored_v
        if isinstance(device, str):  # "cpu"; on the way back it is the layer's own device
            away[id(slots)] = [store.parts for store in stores]
            for store in stores:
                store.parts = [part.to("meta") for part in store.parts]
        elif id(slots) in away:
            for store, parts in zip(stores, away.pop(id(slots)), strict=True):
                store.parts = parts
        most.append(
            sum(not layer.core.slots.stored_k.parts[0].is_meta for layer in cache.layers if layer.core is not None)
        )

    monkeypatch.setattr(Slots, "move_kv", move)
    config = llama_config()
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    expected = draw("llama", model, cached(model))
    cache = cached(model, offloading=True)
    assert torch.equal(draw("llama", model, cache), expected)
    assert len(most) > 2 * TOKENS and max(most[6:]) == 2 and min(most) == 0


def test_importing_adsa_imports_no_transformers():
    code = "import sys, adsa; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_planner(family, tmp_path, capsys):
    """Its numbers are those of the formula: slots, bytes of keys, values and bookkeeping, images that fit."""
    model = build(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    sizes = ["--budget", "256", "--tokens", "576", "--prompt", "40", "--memory", "0.25", "1"]
    main([str(tmp_path), *sizes, "--guidance", "--dtype", "fp32"])
    table = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| dense", "| adsa"))
    ]
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    dense = 2 * 2 * 2 * 2 * 8 * 4 * 616
    adsa = 2 * 2 * (2 * 2 * 8 * 4 * 296 + 2 * 256 * 4 + 2 * 8 * 4 + 2 * 256 * 4)
    for row, slots, need in zip(table, ("40 + 576", "40 + 256"), (dense, adsa), strict=True):
        assert row[1:] == [slots, f"{need / 2**20:.1f}"] + [
            f"{(int(m * 2**30) - weights) // need}{end}" for m, end in ((0.25, ""), (1, " |"))
        ]


def test_planner_reads_a_file_and_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama_config().to_dict() | {"architectures": None}))
    for more in (
        ["--cache-dtype", "int8"],
        ["--policy", "adsa_plus"],
        ["--policy", "tova"],
        ["--policy", "adsa_plus", "--tokens", "24", "--columns", "6"],
    ):
        main([str(path), "--budget", "8", "--tokens", "16", *more])
        assert "handed out 72 keys" in capsys.readouterr().out
    for arguments, message in (
        ([str(path), "--budget", "8", "--tokens", "16", "--policy", "tovah"], "'tovah'.*did you mean 'tova'"),
        (
            [str(path), "--budget", "8", "--tokens", "24", "--policy", "adsa_plus"],
            "and 24 tokens are no square: .*--columns N",
        ),
        ([str(tmp_path / "none"), "--budget", "8", "--tokens", "16"], "none: no folder or file here, and as a name"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
