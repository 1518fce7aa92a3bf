"""What holds for every policy and every way to use it."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adsa import CacheConfig, KVCache, LayerCache
from adsa.policies import POLICIES
from adsa.similarity import TIE_SINGLE, mean_cosine_similarity
from adsa.slots import Slots, fold_bias
from tests.reference import Attention

B, H, D, TOKENS = 3, 2, 8, 40
BOUNDED = sorted(set(POLICIES) - {"full"})
WAYS = list(itertools.product(BOUNDED, ["head", "layer"], ["evict", "select"], [1, 4]))
UNWATCHED = [
    way
    for way in WAYS
    if way[2] == "evict" and POLICIES[way[0]].attention_window is None and not POLICIES[way[0]].query_lines
]


def config(policy, granularity="head", mode="evict", renew_every=1, **kwargs):
    split = {"budget": 16, "prefix": 3, "local": 5}
    return CacheConfig(policy, granularity=granularity, mode=mode, renew_every=renew_every, **split | kwargs)


def layer(
    cfg, tokens=TOKENS, condition=1, dtype=torch.float64, valid=None, batch=B, device="cpu", heads=H
) -> LayerCache:
    shape = {"batch": batch, "n_kv_head": H, "head_dim": D, "condition_tokens": condition, "max_tokens": tokens}
    return LayerCache(Slots(cfg, dtype=dtype, device=device, valid=valid, n_head=heads, **shape))


def stream(tokens=TOKENS, heads=H, batch=B, condition=1, dtype=torch.float64, seed=0, dim=D):
    """q, k, v of the condition and of every image token; some values repeat, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, condition + tokens, dim, generator=generator).to(dtype) for h in (heads, H, H))
    repeats = torch.randint(min(6, tokens), (tokens,), generator=generator)
    v[:, :, condition:] = torch.where((repeats % 2 == 0)[:, None], v[:, :, condition + repeats], v[:, :, condition:])
    q[:, :, :condition] = 0
    k[:, :, :condition] = 0
    return q, k, v


def run(cache, q, k, v, condition=1, watch=lambda cache: None):
    """Feed a stream; outputs of the image tokens, ``[B, Hq, tokens, D]``."""
    cache.attend(q[:, :, :condition], k[:, :, :condition], v[:, :, :condition])
    outputs = []
    for t in range(condition, q.shape[2]):
        outputs.append(cache.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1]))
        watch(cache)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_are_independent(way):
    """A row's output is the same alone and in a batch."""
    q, k, v = stream()
    together = run(layer(config(*way)), q, k, v)
    for row in range(B):
        alone = run(layer(config(*way), batch=1), *(t[row : row + 1] for t in (q, k, v)))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "way",
    [
        ("head", "evict", 1, False),
        ("head", "evict", 3, True),
        ("layer", "evict", 4, False),
        ("layer", "evict", 1, True),
        ("head", "select", 4, None),
        ("layer", "select", 1, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", BOUNDED)
def test_every_step_equals_brute_force(policy, way):
    """By the literal definition: queries in groups, more tokens than any window of attention, and a row that leaves."""
    tokens, queries = 64, 2 * H
    q, k, v = stream(tokens, heads=queries)
    q[..., :20, 0] += 4  # what was attended to is not any more, so that windows differ from sums of all
    q[..., 20:, 0] -= 4
    granularity, mode, renew_every, merge = way
    cache = layer(config(policy, granularity, mode, renew_every, merge=merge), tokens, heads=queries)
    out = [cache.attend(q[:, :, :1], k[:, :, :1], v[:, :, :1])]
    for t in range(1, 1 + tokens):
        if t == 40:
            q, k, v = q[:-1], k[:-1], v[:-1]
            cache.slots.keep_rows(B - 1)
        out.append(cache.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1]))
    choice = {"policy": policy, "budget": 16, "prefix": 3, "local": 5, "mode": mode, "renew_every": renew_every}
    choice["merge"] = bool(merge)
    for row in range(B - 1):
        literal = Attention(queries, H, 8, choice, granularity)
        literal.condition(v[row, :, 0].numpy())
        for t in range(1, 1 + tokens):
            token = (*(x[row, :, t].numpy() for x in (q, k, v)), t - 1, False)
            expected = torch.from_numpy(literal.images([token])[0])
            torch.testing.assert_close(out[t][row, :, 0], expected, atol=1e-9, rtol=0, msg=lambda m, t=t: f"{t}: {m}")


@pytest.mark.parametrize(("policy", "mode"), [("snapkv", "evict"), ("r_kv", "select"), ("lines", "evict")])
def test_compiles_no_graph_for_each_step(policy, mode):
    """Policies that look at attention: those of windows have a row for each query."""
    q, k, v = stream()
    expected = run(layer(config(policy, mode=mode)), q, k, v)
    counter, cache = CompileCounter(), layer(config(policy, mode=mode))
    torch._dynamo.reset()
    cache.attend = torch.compile(cache.attend, backend=counter)
    torch.testing.assert_close(run(cache, q, k, v), expected, atol=1e-12, rtol=0)
    assert 2 <= counter.frame_count <= 6


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_enough_budget_is_dense(way):
    q, k, v = stream()
    dense = run(layer(CacheConfig("full")), q, k, v)
    for budget in (TOKENS, TOKENS + 7):
        torch.testing.assert_close(run(layer(config(*way, budget=budget)), q, k, v), dense, atol=0, rtol=0)
    assert not torch.allclose(run(layer(config(*way)), q, k, v), dense)


@pytest.mark.parametrize("way", [("full",), *WAYS], ids=str)
def test_never_waits_for_the_device(way):
    """The host reads no tensor: on the meta device, where tensors have no values, any such read is an error."""
    cfg = CacheConfig("full") if way == ("full",) else config(*way)
    q, k, v = (t.to("meta") for t in stream(condition=3))
    valid = torch.ones(B, 3, dtype=torch.bool, device="meta")
    cache = layer(cfg, condition=3, valid=valid, device="meta")
    assert run(cache, q, k, v, condition=3).shape == (B, H, TOKENS, D)


def test_dense_is_causal_attention():
    q, k, v = stream(heads=2 * H)
    out = run(layer(CacheConfig("full")), q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected[:, :, 1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", [way for way in WAYS if way[2] == "evict"], ids=str)
def test_evicting_cache_holds_what_it_says(way):
    """Prefix and local always present, positions distinct, slots hold the token of their position, no memory grows."""
    q, k, v = stream()
    cache = layer(config(*way, merge=False))
    start = {name: (t.data_ptr(), t.shape) for name, t in cache.slots.tensors().items()}

    def watch(cache):
        now = {name: (t.data_ptr(), t.shape) for name, t in cache.slots.tensors().items()}
        assert now == start
        positions = cache.positions
        newest = cache.count - 1
        assert positions.shape[-1] == min(16, cache.count)
        required = {*range(min(3, newest + 1)), *range(max(0, newest - 4), newest + 1)}
        for kept in positions.flatten(0, 1).tolist():
            assert len(set(kept)) == len(kept) and required <= set(kept) and max(kept) == newest
        index = positions.long().expand(B, H, -1).unsqueeze(-1).expand(-1, -1, -1, D)
        assert torch.equal(cache.k, k[:, :, 1:].gather(2, index))
        assert torch.equal(cache.v, v[:, :, 1:].gather(2, index))

    run(cache, q, k, v, watch=watch)


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_select_can_bring_a_token_back(granularity):
    """In selection a token left out may return; that is what tells it from eviction."""
    q, k, v = stream(tokens=64)
    cache, seen = layer(config("adsa", granularity, "select"), tokens=64), []
    run(
        cache,
        q,
        k,
        v,
        watch=lambda c: seen.append(set() if c.count <= 16 else set(c.slots.tensors()["ranking"][0, 0].tolist())),
    )
    returned = [t for t in range(18, 64) if (seen[t] - seen[t - 1]) & set(range(3, t - 5))]
    assert returned


def test_renewal_ranks_once_for_several_steps():
    calls = []

    class Counting(type(POLICIES["adsa"])):
        def score(self, layer):
            calls.append(layer.count)
            return super().score(layer)

    for mode, first in (("evict", 16), ("select", 17)):
        calls.clear()
        cache = layer(config("adsa", mode=mode, renew_every=6))
        cache.slots.policy = Counting()
        run(cache, *stream())
        assert calls == list(range(first, TOKENS + (mode == "select"), 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", BOUNDED)
def test_half_precision_cache(policy, dtype):
    """A half-precision cache under a float32 model: half the memory, nearly the same attention."""
    q, k, v = stream(dtype=torch.float32)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    full = layer(config(policy), dtype=torch.float32)
    half = layer(config(policy, dtype=name), dtype=torch.float32)
    out, expected = run(half, q, k, v), run(full, q, k, v)
    assert out.dtype == torch.float32 and half.k.dtype == dtype
    assert half.slots.tensors()["k"].nbytes * 2 == full.slots.tensors()["k"].nbytes
    if policy in ("window", "streaming", "random", "uniform", "neighborhood"):  # positions do not depend on rounding
        assert torch.equal(half.positions.sort().values, full.positions.sort().values)
    torch.testing.assert_close(out[:, :, :16], expected[:, :, :16], atol=0.03, rtol=0)  # until the first choice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_watching_attention_costs_no_precision(dtype):
    """Large scores of half-precision queries and keys are not rounded before the softmax."""
    q, k, v = stream(16, dtype=dtype)
    q = 8 * q
    exact = run(layer(CacheConfig("full"), 16), *(x.double() for x in (q, k, v)))
    watched, fused = (
        (run(layer(cfg, 17, dtype=dtype), q, k, v) - exact).abs().mean() for cfg in (config("h2o"), CacheConfig("full"))
    )
    assert 0 < watched < 1.5 * fused


def test_little_attention_is_ranked_too():
    """Where nearly all attention goes to one token, the others still leave in the order of theirs."""
    q, k, v = stream(tokens=5, batch=1)
    q[:], k[:], k[..., 0] = 0, 0, torch.tensor([0, 40, 3, 1, 2, 0])
    q[..., 0] = D**0.5
    cache = layer(config("tova", budget=4, prefix=0, local=1), tokens=5, batch=1)
    run(cache, q, k, v)
    assert cache.positions.tolist() == [[[0, 1, 4, 3]] * H]


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("common", [0.0, 1.0, 3.0])
def test_victims_are_the_most_redundant(dtype, granularity, common):
    """In any precision, by Eqs. 2-4 in float64 on the same values; ``common``: how alike all tokens are."""
    tokens, budget, prefix, local = 96, 32, 4, 8
    q, k, v = stream(tokens)
    v = ((v + common * torch.ones(D)) * 50).to(dtype)  # large enough that their sums overflow float16
    q, k = q.to(dtype), k.to(dtype)
    cache = layer(CacheConfig("adsa", budget, prefix, local, granularity), tokens, dtype=dtype)
    cached = [set(range(budget)) for _ in range(B * cache.slots.groups)]

    def watch(cache):
        p = cache.count - 1
        if p < budget:
            return
        features = v[:, :, 1:].double()
        features = features.transpose(1, 2).flatten(2).unsqueeze(1) if granularity == "layer" else features
        for row, positions in enumerate(cache.positions.flatten(0, 1).tolist()):
            before = sorted(cached[row])
            (gone,) = cached[row] - set(positions)
            score = mean_cosine_similarity(features.flatten(0, 1)[row, before])
            previous = [i for i, j in enumerate(before) if prefix <= j <= p - local]
            assert before.index(gone) in previous
            assert score[before.index(gone)] >= score[previous].max() - 2 * TIE_SINGLE
            cached[row] = set(positions)

    run(cache, q, k, v, watch=watch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_slots_of_half_precision_weigh_n(dtype):
    n = torch.arange(1, 257).float()
    weight = fold_bias(n, dtype).double().exp().sum(-1)
    torch.testing.assert_close(weight, n.double(), rtol=4e-4, atol=0)
    assert fold_bias(torch.zeros(1), dtype).tolist() == [[-torch.inf, -torch.inf]]
    torch.testing.assert_close(fold_bias(n, torch.float64).exp().sum(-1).float(), n)


@pytest.mark.parametrize("lengths", [(1, 5, 9), (9, 9, 9), (4, 2, 7)])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_fold_is_exact(policy, lengths):
    """Text tokens with zero keys, as one slot: the same attention to 1e-10, for prompts of any length."""
    condition = 9
    q, k, v = stream(condition=condition)
    valid = torch.arange(condition) >= condition - torch.tensor(lengths)[:, None]
    outputs, slots = [], []
    for fold in (True, False):
        cfg = CacheConfig("full", fold_condition=fold) if policy == "full" else config(policy, fold_condition=fold)
        cache = layer(cfg, condition=condition, valid=valid)
        outputs.append(run(cache, q, k, v, condition=condition))
        slots.append(cache.slots.condition_slots)
    assert slots == [1, 9]
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=0)
    # and padding is really not seen
    reference = v[0, :, condition - lengths[0] : condition + 1]
    scores = torch.zeros(H, lengths[0] + 1, dtype=torch.float64)
    scores[:, -1] = (q[0, :, condition] * k[0, :, condition]).sum(-1) / D**0.5
    expected = (scores.softmax(-1).unsqueeze(-1) * reference).sum(1)
    torch.testing.assert_close(outputs[1][0, :, 0], expected, atol=1e-10, rtol=0)


def test_condition_attention_masks_padding():
    condition, lengths = 6, (2, 6, 4)
    q, k, v = stream(condition=condition)
    q[:], k[:] = torch.randn(2, B, H, condition + TOKENS, D, dtype=torch.float64, generator=torch.manual_seed(1))
    valid = torch.arange(condition) >= condition - torch.tensor(lengths)[:, None]
    cache = layer(CacheConfig("full", fold_condition=False), condition=condition, valid=valid)
    out = cache.attend(*(t[:, :, :condition] for t in (q, k, v)))
    for row, n in enumerate(lengths):
        part = [t[row : row + 1, :, condition - n : condition] for t in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True)
        torch.testing.assert_close(out[row : row + 1, :, -n:], alone, atol=1e-12, rtol=0)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "renew_every"), [("evict", 1), ("evict", 5), ("select", 1)])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nbytes(policy, mode, renew_every, dtype):
    """Bytes allocated are those of the formula, and nothing is allocated later."""
    cfg = CacheConfig("full") if policy == "full" else config(policy, "head", mode, renew_every)
    shape = {"batch": B, "n_kv_head": H, "head_dim": D, "condition_tokens": 1, "max_tokens": TOKENS}
    kv = KVCache(cfg, n_layer=4, dtype=dtype, device="cpu", **shape)
    budget = TOKENS if policy == "full" else 16
    slots = TOKENS if mode == "select" else budget
    keys_and_values = 2 * 4 * B * H * (1 + slots) * D * dtype.itemsize
    positions = 0 if slots == TOKENS else 4 * B * H * slots * 4
    order = (
        0
        if policy == "full"
        else 4 * B * H * 8 * (8 if mode == "select" else renew_every * (renew_every > 1 or cfg.merges))
    )
    sums = 4 * B * H * (D + slots) * 4 if POLICIES[policy].similarity_of else 0
    window = POLICIES[policy].attention_window
    attention = 0 if window is None else 4 * B * H * max(1, window) * slots * 4
    queries = 4 * B * H * 6 * D * dtype.itemsize if POLICIES[policy].query_lines else 0  # of a line of 6
    merging = 4 * B * H * ((1 + slots) * 4 + renew_every * 8) if cfg.merges else 0
    expected = keys_and_values + positions + order + sums + attention + queries + merging
    assert kv.slots == budget
    assert kv.kv_nbytes() == keys_and_values
    assert kv.nbytes() == expected
    q, k, v = stream(dtype=dtype)
    for t in range(1 + TOKENS):
        for cache in kv.layers:
            cache.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert kv.nbytes() == expected
    kv.keep_rows(1)
    assert kv.nbytes() * B == expected


def test_too_many_tokens():
    q, k, v = stream(tokens=5)
    with pytest.raises(ValueError, match="made for 4 image tokens"):
        run(layer(CacheConfig("full"), tokens=4), q, k, v)


def test_out_of_order_is_refused():
    q, k, v = stream(condition=3)
    with pytest.raises(ValueError, match="all 3 condition tokens at once, and these are 2"):
        layer(CacheConfig("full"), condition=3).attend(*(t[:, :, :2] for t in (q, k, v)))
    with pytest.raises(ValueError, match="1, before it"):
        layer(CacheConfig("full"), condition=3).update(k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match="these are 2, after it"):
        run(layer(CacheConfig("full"), condition=1), *(t[:, :, :3] for t in (q, k, v)), condition=1)  # fine so far
        layer(CacheConfig("full"), condition=0).attend(*(t[:, :, :2] for t in (q, k, v)))
    with pytest.raises(ValueError, match=r"valid must be \[3, 3\]"):
        layer(CacheConfig("full"), condition=3, valid=torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("way", [("full",), *UNWATCHED], ids=str)
@pytest.mark.parametrize("first", [1, 30])
def test_known_tokens_come_in_as_if_one_after_the_other(way, first):
    """And the condition before them in parts."""
    cfg = CacheConfig("full", fold_condition=False) if way == ("full",) else config(*way, fold_condition=False)
    _, k, v = stream(condition=4)
    one, several = (layer(cfg, condition=4) for _ in range(2))
    one.insert_condition(k[:, :, :4], v[:, :, :4])
    for begin, end in ((0, 1), (1, 4)):
        several.insert_condition(k[:, :, begin:end], v[:, :, begin:end])
        assert torch.equal(several.read()[0], k[:, :, :end])
    for t in range(4, 4 + TOKENS):
        expected = one.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
        if t == 3 + first:
            several.insert(k[:, :, 4 : t + 1], v[:, :, 4 : t + 1])
        elif t > 3 + first:
            got = several.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
            assert torch.equal(several.positions, one.positions)


def test_tokens_that_cannot_be_inserted():
    _, k, v = stream(condition=4)
    with pytest.raises(ValueError, match="takes 3 more condition tokens; these are 4"):
        parts = layer(CacheConfig("full", fold_condition=False), condition=4)
        parts.insert_condition(k[:, :, :1], v[:, :, :1])
        parts.insert_condition(k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="takes 4 condition tokens, at once; these are 1"):
        layer(CacheConfig("full"), condition=4).insert_condition(k[:, :, :1], v[:, :, :1])
    for cache in (layer(CacheConfig("full"), condition=4), layer(config("adsa", mode="select"), condition=0)):
        with pytest.raises(ValueError, match="inserted after the condition, in raster order"):
            cache.insert(k, v)


def test_only_keys_and_values_move():
    cache = layer(config("adsa"), dtype=torch.float32)
    run(cache, *stream(dtype=torch.float32))
    cache.slots.move_kv("meta")
    kept = cache.slots.kv_tensors().keys()
    assert {name for name, tensor in cache.slots.tensors().items() if tensor.is_meta} == kept == {"k", "v"}


def test_no_condition():
    """A cache for a model without condition tokens starts with the first image token."""
    q, k, v = stream(tokens=4)
    q, k, v = (t[:, :, 1:] for t in (q, k, v))
    cache = layer(CacheConfig("full"), tokens=4, condition=0)
    out = torch.cat([cache.attend(q[:, :, [t]], k[:, :, [t]], v[:, :, [t]]) for t in range(4)], dim=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_fold_in_half_precision():
    """ln(n) does not suffer from the cache's precision: 120 tokens weigh 120, to the rounding of the values."""
    condition = 120
    q, k, v = stream(tokens=3, condition=condition, dtype=torch.bfloat16)
    outputs = []
    for fold in (True, False):
        cfg = CacheConfig("full", fold_condition=fold)
        outputs.append(run(layer(cfg, 3, condition, torch.bfloat16), q, k, v, condition=condition))
    torch.testing.assert_close(*outputs, atol=4e-3, rtol=0)
