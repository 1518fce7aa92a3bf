"""Merging what leaves into what stays; that it is done right at every step is in test_cache.py, by brute force."""

import pytest
import torch

from adsa import CacheConfig
from adsa.policies import POLICIES
from adsa.storage import CODECS

from .test_cache import B, D, H, layer, run, stream

TOKENS = 64
BOUNDED = sorted(set(POLICIES) - {"full"})


def few_keys(seed=0):
    """A stream whose tokens have one of four keys; the first four have one each."""
    q, k, v = stream(TOKENS, heads=2 * H, seed=seed)
    which = torch.cat([torch.arange(4), torch.randint(4, (TOKENS - 4,), generator=torch.manual_seed(seed))])
    k[:, :, 1:] = k[:, :, 1:5][:, :, which]
    return q, k, v


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("policy", BOUNDED)
def test_tokens_of_equal_keys_lose_nothing(policy, granularity):
    """Their sum is what the slot stands for, so a third of the slots gives the attention of all tokens."""
    q, k, v = few_keys()
    dense = run(layer(CacheConfig("full"), TOKENS), q, k, v)
    cfg = CacheConfig(policy, 20, 4, 5, granularity, merge=True)
    torch.testing.assert_close(run(layer(cfg, TOKENS, heads=2 * H), q, k, v), dense, atol=1e-9, rtol=0)
    without = CacheConfig(policy, 20, 4, 5, granularity, merge=False)
    assert not torch.allclose(run(layer(without, TOKENS, heads=2 * H), q, k, v), dense, atol=1e-3)


@pytest.mark.parametrize("mode", ["evict", "select"])
def test_no_token_is_counted_twice_or_lost(mode):
    """The numbers that the slots stand for sum to the tokens that came, in every head."""
    q, k, v = stream(TOKENS)
    cache = layer(CacheConfig("adsa_plus", 16, 3, 5, mode=mode), TOKENS)

    def watch(cache):
        if mode == "select":
            assert cache.slots.bias is None
            return
        numbers = cache.held()[2][..., 1:].exp().sum(-1)
        torch.testing.assert_close(numbers, torch.full((B, H, 1), float(cache.count), dtype=numbers.dtype))

    run(cache, q, k, v, watch=watch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    q, k, v = few_keys()
    dense = run(layer(CacheConfig("full"), TOKENS), q, k, v)
    halves = [x.to(dtype) for x in (q, k, v)]
    out = run(layer(CacheConfig("adsa_plus", 20, 4, 5), TOKENS, heads=2 * H, dtype=dtype), *halves)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense, atol=0.05, rtol=0)


@pytest.mark.parametrize(("name", "atol"), [("int8", 0.1), ("int4", 0.8)])
def test_of_integers(name, atol):
    """Means are rounded anew when one more token joins."""
    assert name in CODECS
    q, k, v = few_keys()
    dense = run(layer(CacheConfig("full"), TOKENS), q, k, v)
    out = run(layer(CacheConfig("adsa_plus", 20, 4, 5, dtype=name), TOKENS, heads=2 * H), q, k, v)
    torch.testing.assert_close(out, dense, atol=atol, rtol=0)
    assert (out - dense).abs().mean() < atol / 5


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 12, 40])
def test_every_budget_works(budget):
    """Also those smaller than a line, where the last line has to take part."""
    q, k, v = stream(TOKENS)
    assert run(layer(CacheConfig("adsa_plus", budget), TOKENS), q, k, v).isfinite().all()


def test_a_head_has_its_own_queries():
    """Queries of other heads make no difference to what a head keeps."""
    q, k, v = stream(TOKENS, heads=2 * H)
    kept = []
    for changed in (False, True):
        if changed:
            q = q.clone()
            q[:, : q.shape[1] // H] += torch.randn(D, generator=torch.manual_seed(3), dtype=q.dtype)
        cache = layer(CacheConfig("adsa_plus", 16, 3, 5), TOKENS, heads=2 * H)
        run(cache, q, k, v)
        kept.append(cache.positions.sort().values)
    assert torch.equal(kept[0][:, 1], kept[1][:, 1]) and not torch.equal(kept[0][:, 0], kept[1][:, 0])
