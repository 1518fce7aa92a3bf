"""Compiled loops do what PyTorch's operations do."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adsa import CacheConfig, KVCache, compiled
from adsa.policies import POLICIES
from adsa.slots import _least
from adsa.storage import Plain
from tests.adsa.test_cache import TOKENS, B, D, H, config, stream

FULL = CacheConfig("full")
LONE = [
    config(policy, renew_every=renew) for policy, renew in itertools.product(sorted(set(POLICIES) - {"full"}), (1, 4))
]
OTHERS = [
    *(CacheConfig("full", dtype=dtype) for dtype in ("int8", "int4")),
    *(config(policy, granularity="layer") for policy in ("adsa", "keydiff", "adsa_plus")),
    *(config("adsa", dtype=dtype) for dtype in ("int8", "int4")),
    config("keydiff", dtype="int8", merge=True),
    config("adsa", mode="select"),
]


@pytest.fixture
def by_operations(monkeypatch):
    """The loops' own definitions, operation by operation; how often each was called."""
    called = []

    def loop(function):
        return lambda *args: called.append(function.__name__) or function(*args)

    for module in ("adsa.cache", "adsa.slots"):
        monkeypatch.setattr(f"{module}.loop", loop)
    return called


def outputs(cfg, dtype=torch.float64, heads=2 * H, *, loops):
    """Of two layers over an image whose last tokens come to fewer rows; and which tokens are left."""
    streams = [stream(heads=heads, dtype=dtype, condition=3, seed=seed) for seed in range(2)]
    shape = {"batch": B, "n_kv_head": H, "n_head": heads, "head_dim": D, "condition_tokens": 3, "max_tokens": TOKENS}
    valid = torch.tensor([[True] * 3, [False, True, True], [True] * 3])
    kv = KVCache(cfg, n_layer=2, dtype=dtype, device="cpu", valid=valid, compiled=loops, **shape)
    found, rows = [], B
    for t in range(2, 3 + TOKENS):
        if t == 30:
            rows = B - 1
            kv.keep_rows(rows)
        for one, of_layer in zip(kv.layers, streams, strict=True):
            q, k, v = (x[:rows, :, 0 if t == 2 else t : t + 1] for x in of_layer)
            found.append(one.attend(q, k, v).clone())
    return found, [one.positions.clone() for one in kv.layers]


@pytest.mark.parametrize(
    "cfg", [FULL, *LONE, *OTHERS], ids=lambda c: f"{c.policy}-{c.granularity}-{c.mode}-{c.renew_every}-{c.dtype}"
)
def test_loops_change_nothing(by_operations, cfg, monkeypatch):
    plain, kept = outputs(cfg, loops=False)
    assert not by_operations
    for part in (1, 2**20):
        monkeypatch.setattr("adsa.slots.IN_LAST_CACHE", part)
        found, left = outputs(cfg, loops=True)
        torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)
        assert all(map(torch.equal, left, kept))
    used = {FULL: {"attention"}, config("adsa"): {"attention", "compared_attention", "join", "_least"}}
    assert set(by_operations) == used.get(cfg, set(by_operations))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["full", "adsa"])
def test_loops_of_other_numbers(by_operations, policy, dtype):
    """Scores are not rounded to half precision, nor is what is ranked."""
    cfg = FULL if policy == "full" else config(policy)
    (plain, kept), (found, left) = (outputs(cfg, dtype, loops=loops) for loops in (False, True))
    torch.testing.assert_close(found, plain, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    assert all(map(torch.equal, left, kept))
    assert by_operations and found[-1].dtype == dtype


def test_compiles_no_graph_for_each_step(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    loops = {f: torch.compile(f, backend=counter) for f in (compiled.attention, compiled.compared_attention)}
    monkeypatch.setattr("adsa.cache.loop", loops.get)
    monkeypatch.setattr("adsa.slots.loop", lambda function: function)
    cfg = config("adsa", renew_every=3)
    torch.testing.assert_close(outputs(cfg, loops=True), outputs(cfg, loops=False), atol=1e-12, rtol=0)
    assert 2 <= counter.frame_count <= 6


def test_in_cpp():
    """What users run; two of the loops, as each takes the compiler some seconds."""
    torch._dynamo.reset()
    keys, values = torch.randn(2, B, H, 20, D).bfloat16()
    q, total, inverse_norm = torch.randn(B, H, 2, D), torch.randn(B, H, D), torch.rand(B, H, 17)
    bias, similarities = torch.randn(B, 1, 1, 20), torch.empty(2, B, H, 17)
    of = (q, (keys,), (values,), Plain(), bias, False, total, inverse_norm)
    found = compiled.loop(compiled.compared_attention)(*of, similarities[0])
    torch.testing.assert_close(found, compiled.compared_attention(*of, similarities[1]))
    torch.testing.assert_close(*similarities)
    arrivals = torch.randperm(17).int().expand(B, H, 17)
    of = (similarities[0], arrivals, torch.tensor(17), 3, 5)
    assert compiled.loop(_least)(*of).equal(_least(*of))


def test_a_gpus_caches_are_not_compiled():
    shape = {"n_layer": 1, "batch": 1, "n_kv_head": 1, "head_dim": 4, "condition_tokens": 1, "max_tokens": 9}
    with pytest.raises(ValueError, match="caches are compiled on a CPU, and this one is on meta"):
        KVCache(FULL, dtype=torch.float32, device="meta", compiled=True, **shape)


def test_without_a_compiler(monkeypatch):
    def broken(function):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(compiled, "loop", broken)
    assert compiled.failure.__wrapped__() == "No working C++ compiler found"
