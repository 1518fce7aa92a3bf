"""The kernels give what PyTorch's operations give: where there is no GPU, in Triton's interpreter."""

import copy
import functools
import importlib

import pytest
import torch

from adsa import CacheConfig, KVCache, slots
from adsa.similarity import TIE_SINGLE, RunningSimilarity
from adsa.slots import Slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton", reason="Triton is for CUDA, and not on all systems that PyTorch is on")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("count", "dim"), [(1, 8), (70, 6), (64, 16), (130, 20)])
def test_similarity(dtype, joint, count, dim):
    """Of a part of the slots, with equal features, zeros and padding of the last dimension."""
    generator = torch.Generator().manual_seed(count)
    v = torch.randn(3, 2, count + 5, dim, generator=generator).to(DEVICE, dtype)
    v[:, :, count // 2] = v[:, :, 0]
    v[1, :, count // 3] = 0
    of = RunningSimilarity(3, 2, count + 5, dim, joint=joint, dtype=dtype, device=DEVICE)
    of.fused = False
    for slot in range(count):
        of.add(slot, v[:, :, slot : slot + 1])
    seen = v[:, :, :count]
    expected = of.score(seen)
    of.fused = True
    found = of.score(seen)
    assert found.shape == (3, 1 if joint else 2, count) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 * TIE_SINGLE)
    assert (found != expected).float().mean() < 0.05
    assert found[..., count // 2].equal(found[..., 0]) or count // 3 in (0, count // 2)
    assert found.div(TIE_SINGLE).frac().eq(0).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_ranks(groups):
    """The order of scores and arrivals, ties, numbers out of range, and who stays: exactly."""
    kernels = importlib.import_module("adsa.kernels")
    generator = torch.Generator().manual_seed(0)
    for prefix, local in ((0, 1), (5, 20), (70, 1)):
        of = Slots(
            CacheConfig("adsa", 90, prefix=prefix, local=local),
            batch=2,
            n_kv_head=3,
            head_dim=4,
            condition_tokens=1,
            max_tokens=400,
            dtype=torch.float32,
            device=DEVICE,
        )
        of.groups, of.filled = groups, 90
        of.clock.fill_(300)
        order = torch.rand(2, groups, 300, generator=generator).argsort(-1)[..., :90]
        of._arrivals = order.int().to(DEVICE)
        scores = torch.randn(2, groups, 90, generator=generator).mul(10.0 ** torch.arange(-8, 1).repeat(10)).to(DEVICE)
        scores[..., 40:44], scores[..., 50], scores[..., 51] = 0.25, torch.inf, -1e30
        expected = slots._ranks(scores, of.arrivals).add_(of.staying(slice(None)), alpha=slots._NEVER)
        numbers = {"largest": slots._LARGEST, "fraction": slots._FRACTION, "bits": slots.ARRIVAL_BITS}
        stay = {"prefix": prefix, "local": local, "never": slots._NEVER}
        found = kernels.ranks(scores, of.arrivals, of.clock, **stay, **numbers)
        assert found.equal(expected)


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig("adsa", 12),
        CacheConfig("adsa", 12, granularity="layer", renew_every=3),
        CacheConfig("keydiff", 12, merge=True),
        CacheConfig("h2o", 12, dtype="int8"),
        CacheConfig("adsa", 12, dtype="int8"),
    ],
    ids=str,
)
def test_a_cache_keeps_the_same_tokens(config):
    generator = torch.Generator().manual_seed(0)
    shape = {"n_layer": 2, "batch": 3, "n_kv_head": 2, "head_dim": 8, "condition_tokens": 1, "max_tokens": 36}
    both = []
    for use in (False, True):
        cache = KVCache(config, **shape, dtype=torch.float32, device=DEVICE)
        generator.manual_seed(1)
        for each in cache._all:
            each.fused = use
            if each.similarity is not None:
                each.similarity.fused = use
        outputs = []
        for _ in range(36):
            for layer in cache.layers:
                q, k, v = torch.randn(3, 3, 2, 1, 8, generator=generator).to(DEVICE)
                outputs.append(layer.attend(q, k, v))
        both.append((torch.stack(outputs[2:]), [layer.slots.arrivals for layer in cache.layers]))
    (plain, kept), (fused, also) = both
    assert all(mine.equal(theirs) for mine, theirs in zip(kept, also, strict=True))
    torch.testing.assert_close(fused, plain)


def test_a_cache_may_be_copied():
    """As transformers does to go on from one prompt several times."""
    shape = {"n_layer": 1, "batch": 1, "n_kv_head": 1, "head_dim": 4, "condition_tokens": 1, "max_tokens": 9}
    cache = KVCache(CacheConfig("adsa", 4), **shape, dtype=torch.float32, device=DEVICE)
    cache._all[0].fused = cache._all[0].similarity.fused = True
    assert copy.deepcopy(cache)._all[0].similarity.fused


def test_where_triton_does_not_compile(monkeypatch):
    """PyTorch does the work, and says so once; or silently where that is asked for."""
    fused = importlib.import_module("adsa.fused")
    kernels = importlib.import_module("adsa.kernels")
    monkeypatch.setattr(fused, "_compiles", functools.cache(fused._compiles.__wrapped__))

    def broken(*_):
        raise RuntimeError("Failed to find C compiler")

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(fused.torch, "ones", lambda *shape, device: torch.zeros(shape))
    assert fused.fused(cuda, torch.bfloat16) and not fused.fused(cuda, torch.float64)
    assert not fused.fused(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(kernels, "similarity", broken)
    other = torch.device("cuda", 1)
    with pytest.warns(UserWarning, match="Failed to find C compiler. ADSA_KERNELS=0 does without"):
        assert not fused.fused(other, torch.float32)
    assert not fused.fused(other, torch.float32)
    monkeypatch.setenv("ADSA_KERNELS", "0")
    assert not fused.fused(cuda, torch.bfloat16)
