"""The decode loop: seeds, guidance, limits, half precision, compilation."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adsa import CacheConfig, native
from adsa.loops import Loops
from adsa.policies import POLICIES
from autoregressive.models import sampling
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer, compiled
from autoregressive.models.sampling import draw, filter_top_p, revise, uniform_noise
from tests.golden import fill_weights

TOKENS = 36
CACHES = {
    "dense": None,
    "adsa": CacheConfig("adsa", 12, 3, 4),
    "adsa-layer-select": CacheConfig("adsa", 12, 3, 4, "layer", "select", 2),
    "streaming": CacheConfig("streaming", 12),
    "window": CacheConfig("window", 12),
}


@pytest.fixture(scope="module")
def model():
    args = ModelArgs(dim=64, n_layer=2, n_head=4, block_size=TOKENS, vocab_size=64, num_classes=10)
    return fill_weights(Transformer(args), 7)


@pytest.fixture(scope="module")
def t2i():
    shape = {"dim": 64, "n_layer": 2, "n_head": 4, "block_size": TOKENS, "vocab_size": 64}
    return fill_weights(Transformer(ModelArgs(model_type="t2i", caption_dim=8, cls_token_num=7, **shape)), 8)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_image_depends_on_its_seed_alone(model, cache, cfg_scale):
    labels, seeds = torch.tensor([1, 5, 5, 9, 0]), torch.tensor([11, 12, 11, 2**62, 0])
    options = {"cfg_scale": cfg_scale, "cache": cache, "top_k": 40, "top_p": 0.95, "temperature": 1.1}
    together = generate(model, labels, TOKENS, seeds=seeds, **options)
    assert together.dtype == torch.int64 and together.shape == (5, TOKENS)
    for order in ([4, 2, 0], [1], [3, 1]):
        assert torch.equal(generate(model, labels[order], TOKENS, seeds=seeds[order], **options), together[order])
    assert not torch.equal(together[1], together[2])


def test_unseeded_follows_the_global_generator(model):
    labels = torch.tensor([1, 1])
    torch.manual_seed(0)
    first = generate(model, labels, TOKENS)
    torch.manual_seed(0)
    assert torch.equal(generate(model, labels, TOKENS), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(generate(model, labels, TOKENS), first)


def test_prefix_of_a_longer_decode(model):
    labels, seeds = torch.tensor([1, 2]), torch.tensor([3, 4])
    whole = generate(model, labels, TOKENS, seeds=seeds)
    for n in (1, 2, 20):
        assert torch.equal(generate(model, labels, n, seeds=seeds), whole[:, :n])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["evict", "select"])
def test_an_image_goes_on_from_its_own_tokens(model, policy, mode):
    """Its own first tokens and its own seed make the image; another seed makes another from there on."""
    cache = CacheConfig(policy) if policy == "full" else CacheConfig(policy, 12, mode=mode)
    labels, seeds = torch.tensor([1, 5]), torch.tensor([11, 12])
    options = {"cfg_scale": 2.0, "cache": cache}
    whole = generate(model, labels, TOKENS, seeds=seeds, **options)
    for n in (0, 1, 20, TOKENS):
        assert torch.equal(generate(model, labels, TOKENS, seeds=seeds, start=whole[:, :n], **options), whole)
    other = generate(model, labels, TOKENS, seeds=seeds + 9, start=whole[:, :20].int(), **options)
    assert torch.equal(other[:, :20], whole[:, :20]) and (other[:, 20:] != whole[:, 20:]).any(1).all()


def test_interval_counts_the_given_tokens(model):
    labels, seeds = torch.tensor([1, 5]), torch.tensor([1, 2])
    options = {"cfg_scale": 3.0, "cfg_interval": 5, "seeds": seeds, "cache": CACHES["adsa"]}
    whole = generate(model, labels, TOKENS, **options)
    assert torch.equal(generate(model, labels, TOKENS, start=whole[:, :15], **options), whole)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_interval_drops_the_unconditional_half(model, cache, monkeypatch):
    """Beyond cfg_interval the second half is not computed, and the tokens are those of computing and ignoring it."""
    labels, seeds, rows = torch.tensor([1, 5]), torch.tensor([1, 2]), []
    hook = model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    kv = new_cache(model, 2, TOKENS, cfg_scale=3.0, cache=cache)
    tokens = generate(model, labels, TOKENS, cfg_scale=3.0, cfg_interval=5, seeds=seeds, kv=kv)
    hook.remove()
    assert rows == [4] * 7 + [2] * (TOKENS - 7)  # the condition, decode steps 0 to 5, the rest
    assert kv.layers[0].k.shape[0] == 2
    always = generate(model, labels, TOKENS, cfg_scale=3.0, seeds=seeds, cache=cache)
    calls = []

    def guide_at_first(logits, scale):
        calls.append(scale)
        return sampling.guide(logits, scale) if len(calls) <= 7 else logits.chunk(2)[0]

    with monkeypatch.context() as patch:
        patch.setattr("autoregressive.models.generate.guide", guide_at_first)
        ignored = generate(model, labels, TOKENS, cfg_scale=3.0, seeds=seeds, cache=cache)
    assert len(calls) == TOKENS and torch.equal(tokens, ignored)
    never = generate(model, labels, TOKENS, cfg_scale=1.0, seeds=seeds, cache=cache)
    assert not torch.equal(tokens, always) and not torch.equal(tokens, never)
    beyond = generate(model, labels, TOKENS, cfg_scale=3.0, cfg_interval=TOKENS, seeds=seeds, cache=cache)
    assert torch.equal(beyond, always)


@pytest.mark.parametrize("cfg_scale", [1.0, 7.5])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_prompts_of_different_length_share_a_batch(t2i, cache, cfg_scale):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(7) >= torch.tensor([[2], [6], [0]])).float()
    features = torch.randn(3, 7, 8, generator=generator) * mask[..., None]
    seeds = torch.arange(3)
    options = {"cfg_scale": cfg_scale, "cache": cache}
    together = generate(t2i, features, TOKENS, mask, seeds=seeds, **options)
    for i in range(3):
        alone = generate(t2i, features[i : i + 1], TOKENS, mask[i : i + 1], seeds=seeds[i : i + 1], **options)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("cfg_scale", [1.0, 7.5])
@pytest.mark.parametrize("mode", ["evict", "select"])
@pytest.mark.parametrize("policy", POLICIES)
def test_folding_the_text_changes_nothing(policy, mode, cfg_scale):
    """Several text tokens as one slot, for prompts of several lengths: the same tokens, whatever is evicted."""
    shape = {"dim": 64, "n_layer": 3, "n_head": 4, "block_size": TOKENS, "vocab_size": 64, "cls_token_num": 7}
    model = fill_weights(Transformer(ModelArgs(model_type="t2i", caption_dim=8, **shape)), 8).double()
    mask = (torch.arange(7) >= torch.tensor([[2], [6], [0]])).double()
    features = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0)).double() * mask[..., None]
    budget = {} if policy == "full" else {"budget": 12, "mode": mode}
    tokens = {}
    for fold in (True, False):
        kv = new_cache(model, 3, TOKENS, mask, cfg_scale, CacheConfig(policy, fold_condition=fold, **budget))
        assert kv.condition_slots == (1 if fold else 7)
        tokens[fold] = generate(model, features, TOKENS, cfg_scale=cfg_scale, seeds=torch.arange(3), kv=kv)
    assert torch.equal(tokens[True], tokens[False])
    assert len(tokens[True].unique()) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_half_precision_model(t2i, cache, dtype):
    args = ModelArgs(**vars(t2i.config))
    model = fill_weights(Transformer(args), 8).to(dtype)
    mask = (torch.arange(7) >= torch.tensor([[2], [6]])).to(dtype)
    features = torch.randn(2, 7, 8).to(dtype) * mask[..., None]
    tokens = generate(model, features, TOKENS, mask, cfg_scale=2.0, cache=cache, seeds=torch.arange(2))
    assert tokens.min() >= 0 and tokens.max() < 64 and len(tokens.unique()) > 8


@pytest.mark.parametrize(
    "cache",
    [None, CACHES["adsa"], CacheConfig("adsa", 12, 3, 4, renew_every=3), CACHES["adsa-layer-select"]],
    ids=["dense", "evict", "renew", "select"],
)
def test_compiled_equals_eager_without_recompiling_every_step(model, cache):
    labels, seeds = torch.tensor([1, 5]), torch.tensor([1, 2])
    eager = generate(model, labels, TOKENS, cfg_scale=2.0, cache=cache, seeds=seeds)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = fill_weights(Transformer(model.config), 7)
    compiled.forward = torch.compile(compiled.forward, backend=counter)
    assert torch.equal(generate(compiled, labels, TOKENS, cfg_scale=2.0, cache=cache, seeds=seeds), eager)
    first = counter.frame_count
    assert 2 <= first <= 8
    assert torch.equal(generate(compiled, labels, TOKENS, cfg_scale=2.0, cache=cache, seeds=seeds), eager)
    assert counter.frame_count <= first + 1


@pytest.mark.skipif(not native.wanted(), reason="no g++, or no vectors that loops are written for")
@pytest.mark.parametrize("steps", [{}, {"zipar_window": 2}, {"zipar_window": 2, "zipar_adaptive": True}], ids=str)
@pytest.mark.parametrize(
    "cache",
    [
        None,
        CacheConfig("adsa", 18, 2, 4, "layer"),
        CacheConfig("adsa", 18, 2, 4, dtype="int8"),
        CacheConfig("keydiff", 18, 2, 4, renew_every=4),
        CacheConfig("adsa_plus", 18, 2, 4),
        CacheConfig("h2o", 18, 2, 4),
    ],
    ids=lambda cache: cache and cache.policy,
)
def test_loops_change_no_token(cache, steps, monkeypatch):
    """Of a model whose heads are large enough for a CPU's loops, which also take several tokens at once."""
    shape = {"dim": 128, "n_layer": 2, "n_head": 4, "block_size": TOKENS, "vocab_size": 64}
    wide = fill_weights(Transformer(ModelArgs(model_type="t2i", caption_dim=8, cls_token_num=7, **shape)), 8)
    masks = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    options = {"cfg_scale": 2.0, "cache": cache, "seeds": torch.tensor([1, 2]), "emb_masks": masks, **steps}
    torch.manual_seed(0)
    text = torch.randn(2, 7, 8)
    used = []
    attend = Loops.attend
    monkeypatch.setattr(
        Loops, "attend", lambda self, q, *args, **more: used.append(q.shape[2]) or attend(self, q, *args, **more)
    )
    looped = generate(wide, text, TOKENS, **options)
    assert (max(used) > 1) == bool(steps)
    monkeypatch.setenv("ADSA_KERNELS", "0")
    used.clear()
    assert torch.equal(generate(wide, text, TOKENS, **options), looped) and not used


def test_as_many_graphs_as_caches_want(monkeypatch):
    """Torch's own limit is below what caches that grow, of several dtypes, want."""
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    with torch._dynamo.config.patch(recompile_limit=8):
        assert compiled(abs) == ("compiled", abs)
        assert torch._dynamo.config.recompile_limit == 256


def test_no_kernel_comes_between_what_is_compiled(model, monkeypatch):
    """Nor does looking for one."""
    for name in ("adsa.slots.fused", "adsa.similarity.fused"):
        monkeypatch.setattr(name, lambda *_: True)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = fill_weights(Transformer(model.config), 7)
    compiled.forward = torch.compile(compiled.forward, backend=counter)
    rest = {"cfg_scale": 2.0, "cache": CACHES["adsa"], "seeds": torch.tensor([1, 2])}
    tokens = generate(compiled, torch.tensor([1, 5]), TOKENS, **rest)
    assert 2 <= counter.frame_count <= 8
    monkeypatch.undo()
    assert tokens.equal(generate(model, torch.tensor([1, 5]), TOKENS, **rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "1 to 36"),
        ({"max_new_tokens": 37}, "1 to 36 .block_size., not 37"),
        ({"seeds": torch.arange(3)}, r"seeds of shape \[3\] for 2 images"),
        ({"temperature": -1.0}, "temperature must be 0 or more, not -1.0"),
        ({"cond": torch.tensor([1, 11])}, "0 to 9 .or 10, the null class.; these are 1 to 11"),
        ({"cond": torch.tensor([[1], [2]])}, r"whole numbers \[B\]"),
        ({"emb_masks": torch.ones(2, 1)}, "no text to mask"),
        ({"start": torch.zeros(2, 5, dtype=torch.long)}, r"start of shape \[2, 5\] for 2 images of 4 tokens"),
        ({"start": torch.zeros(3, 2, dtype=torch.long)}, r"start of shape \[3, 2\] for 2 images"),
        ({"start": torch.zeros(2, dtype=torch.long)}, r"whole numbers \[B, n\], not torch.int64 \[2\]"),
        ({"start": torch.zeros(2, 2)}, r"whole numbers \[B, n\], not torch.float32"),
        ({"start": torch.tensor([[0], [64]])}, "0 to 63; these are 0 to 64"),
    ],
)
def test_bad_arguments(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"cond": torch.tensor([1, 2]), "max_new_tokens": 4} | change))


def test_kv_must_fit(model):
    cond, cache = torch.tensor([1, 2]), CacheConfig("window", 12)
    kv = new_cache(model, 2, 8, cache=cache)
    tokens = generate(model, cond, 8, seeds=torch.arange(2), kv=kv)
    assert torch.equal(tokens, generate(model, cond, 8, seeds=torch.arange(2), cache=cache))
    fresh = new_cache(model, 2, 8)
    for change, message in (
        ({"kv": kv}, "kv is used"),
        ({"kv": fresh, "cache": cache}, "belong to new_cache"),
        ({"kv": fresh, "cfg_scale": 2.0}, "unused and has 2 rows for 8 tokens"),
        ({"kv": fresh, "max_new_tokens": 9}, "unused and has 2 rows for 8 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, **({"cond": cond, "max_new_tokens": 8} | change))


def test_training_mode_is_refused():
    model = Transformer(ModelArgs(dim=64, n_layer=1, n_head=4, block_size=4, vocab_size=8, num_classes=3))
    with pytest.raises(ValueError, match="eval"):
        generate(model, torch.tensor([0]), 4)


def test_guidance_needs_a_null_class():
    args = ModelArgs(dim=64, n_layer=1, n_head=4, block_size=4, vocab_size=8, num_classes=3, class_dropout_prob=0.0)
    model = Transformer(args).eval()
    assert generate(model, torch.tensor([0]), 4).shape == (1, 4)
    with pytest.raises(ValueError, match="no null class"):
        generate(model, torch.tensor([0]), 4, cfg_scale=2.0)


def test_temperature_then_top_k_then_top_p():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # probabilities 0.4, 0.3, 0.2, 0.1
    cases = {
        (1.0, 0, 1.0): [0.4, 0.3, 0.2, 0.1],
        (0.5, 0, 1.0): [16 / 30, 9 / 30, 4 / 30, 1 / 30],
        (1.0, 2, 1.0): [4 / 7, 3 / 7, 0, 0],
        (1.0, 0, 0.6): [4 / 7, 3 / 7, 0, 0],
        (0.5, 0, 0.53): [1, 0, 0, 0],  # temperature first: at 1, two tokens are needed for 0.53
        (1.0, 3, 0.74): [4 / 7, 3 / 7, 0, 0],  # of the best three, two have 7/9; of all four, three are needed for 0.74
    }
    for (temperature, top_k, top_p), expected in cases.items():
        result = sampling.probabilities(logits, temperature, top_k, top_p)
        torch.testing.assert_close(result, torch.tensor([expected], dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 20.0])
def test_top_p_is_that_of_a_whole_sort(spread):
    """Whether or not only the likely tokens are sorted, and with ties."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(8, 512, generator=generator, dtype=torch.float64) * spread * 8).round() / 8
    logits[:, ::7] = -torch.inf
    for top_p in (0.001, 0.3, 0.9, 0.999):
        kept = filter_top_p(logits, top_p)
        for row, found in zip(logits, kept, strict=True):
            order = np.argsort(-row.numpy(), kind="stable")
            mass = row.softmax(0).numpy()[order].cumsum()
            first = order[: np.argmax(mass > top_p) + 1]
            assert sorted(found.isfinite().nonzero().flatten().tolist()) == sorted(first.tolist())
            assert torch.equal(found[first], row[first])


def test_zero_temperature_is_greedy(model):
    cond = torch.tensor([1, 5])
    assert torch.equal(
        generate(model, cond, TOKENS, temperature=0.0), generate(model, cond, TOKENS, sample_logits=False)
    )


def test_draw_follows_the_distribution():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniform = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(draw(probs.expand(4000, -1), uniform), minlength=6)
    assert counts.tolist() == [0, 1000, 0, 2000, 1000, 0]


def test_draw_at_the_edges():
    """Never a token of probability zero, at either end."""
    probs = torch.tensor([[0.0, 0.3, 0.7, 0.0]])
    assert draw(probs, torch.tensor([0.0])).item() == 1
    assert draw(probs, torch.tensor([1 - 2**-24])).item() == 2
    logits = torch.randn(64, 16384, generator=torch.Generator().manual_seed(0))
    probs = filter_top_p(logits, 0.5).softmax(-1)
    token = draw(probs, torch.full((64,), 1 - 2**-24))
    assert (probs.gather(1, token[:, None]) > 0).all()


def test_revised_tokens_follow_the_new_distribution():
    old, new = torch.tensor([[0.5, 0.25, 0.25, 0.0]]), torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    grid = (torch.arange(64) + 0.5) / 64
    first, test, again = (numbers.flatten() for numbers in torch.meshgrid(grid, grid, grid, indexing="ij"))
    token = draw(old.expand(len(first), -1), first)
    made, stays = revise(token, old.expand(len(first), -1), new.expand(len(first), -1), test, again)
    assert torch.equal(made[stays], token[stays])
    assert stays.double().mean() == torch.minimum(old, new).sum()  # as many as can
    share = torch.bincount(made, minlength=4) / len(made)
    assert torch.allclose(share, new[0], atol=0.01)  # thirds of 64 are no whole numbers


def test_noise_is_one_stream_per_seed():
    noise = uniform_noise(torch.tensor([4, 9, 4]), 100)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(uniform_noise(torch.tensor([9]), 50)[0], noise[1, :50])
    assert noise.min() >= 0 and noise.max() < 1


def test_demo_size_is_in_the_registry():
    assert "GPT-Demo" in GPT_models


def test_wrong_shapes_are_told(t2i, model):
    with pytest.raises(ValueError, match=r"text features \[2, 5, 8\] given, \['B', 7, 8\] expected"):
        generate(t2i, torch.zeros(2, 5, 8), 4)
    with pytest.raises(ValueError, match="37 image tokens given, and block_size is 36"):
        model(torch.zeros(1, 37, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(ValueError, match="multiple of 4"):
        ModelArgs(dim=12, n_head=2)
    with pytest.raises(ValueError, match="perfect square"):
        ModelArgs(block_size=12)
