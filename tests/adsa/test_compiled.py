"""Compiled loops do what PyTorch's operations do."""

import itertools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adsa import CacheConfig, KVCache, Order, compiled
from adsa.policies import POLICIES
from adsa.similarity import TIE_SINGLE
from adsa.slots import least_worthy
from adsa.storage import CODECS, Plain
from tests.adsa.test_cache import TOKENS, B, D, H, config, stream

FULL = CacheConfig("full")
LONE = [
    config(policy, renew_every=renew) for policy, renew in itertools.product(sorted(set(POLICIES) - {"full"}), (1, 4))
]
OTHERS = [
    *(CacheConfig("full", dtype=dtype) for dtype in ("int8", "int4")),
    *(config(policy, granularity="layer") for policy in ("adsa", "keydiff", "adsa_plus")),
    *(config("adsa", dtype=dtype) for dtype in ("int8", "int4")),
    config("adsa", fold_condition=False),
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


def outputs(cfg, dtype=torch.float64, heads=2 * H, *, loops, **given):
    """Of two layers over an image whose last tokens come to fewer rows; and which tokens are left."""
    streams = [stream(heads=heads, dtype=dtype, condition=3, seed=seed) for seed in range(2)]
    shape = {"batch": B, "n_kv_head": H, "n_head": heads, "head_dim": D, "condition_tokens": 3, "max_tokens": TOKENS}
    valid = torch.tensor([[True] * 3, [False, True, True], [True] * 3])
    kv = KVCache(cfg, n_layer=2, dtype=dtype, device="cpu", valid=valid, compiled=loops, **shape, **given)
    found, rows = [], B
    for t in range(2, 3 + TOKENS):
        if t == 30:
            rows = B - 1
            kv.keep_rows(rows)
        if kv.order and t > 2:
            kv.expect([t - 3], [], torch.tensor([t - 3]))
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
    rule, evicts = cfg.rule, cfg.policy != "full" and cfg.mode == "evict"
    expected = {"attention": cfg.mode == "evict" and rule.attention_window is None}
    expected["count_in"] = evicts and rule.similarity_of is not None
    expected["compared_attention"] = expected["attention"] and expected["count_in"]
    expected["least_worthy"] = evicts and cfg.renewal == 1 and not cfg.merges
    assert set(by_operations) == {name for name, used in expected.items() if used}


@pytest.mark.parametrize("cfg", [FULL, config("adsa")], ids=["full", "adsa"])
@pytest.mark.parametrize("given", [{"fixed": True}, {"order": Order(1, 0, TOKENS)}], ids=["fixed", "order"])
def test_other_caches(by_operations, cfg, given):
    """Those whose steps may be recorded have loops; those of another order than raster order have none."""
    (plain, kept), (found, left) = (outputs(cfg, loops=loops, **given) for loops in (False, True))
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)
    assert all(map(torch.equal, left, kept))
    loops = {"attention"} if cfg == FULL else {"attention", "count_in", "least_worthy"}
    assert set(by_operations) == (loops if "fixed" in given else set())


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


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_in_cpp():
    """What users run; some of the loops, as each takes the compiler some seconds."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    assert compiled.failure() is None
    keys, values = torch.randn(2, B, H, 20, D).bfloat16()
    q, total, inverse_norm = torch.randn(B, H, 2, D), torch.randn(B, H, D), torch.rand(B, H, 17)
    bias, similarities = torch.randn(B, 1, 1, 20), torch.empty(2, B, H, 17)
    bias[1, ..., :2] = -torch.inf
    of = (q, (keys,), (values,), Plain(), bias, False, total, inverse_norm)
    found = compiled.loop(compiled.compared_attention)(*of, similarities[0])
    torch.testing.assert_close(found, compiled.compared_attention(*of, similarities[1]))
    torch.testing.assert_close(*similarities, atol=TIE_SINGLE, rtol=0)
    integers = [CODECS["int4"].encode(x) for x in (keys, values)]
    of = (q, *integers, CODECS["int4"], bias)
    torch.testing.assert_close(compiled.loop(compiled.attention)(*of), compiled.attention(*of))
    arrivals = torch.randperm(17).int().expand(B, H, 17)
    of = (similarities[0], arrivals, torch.tensor(17), 3, 5)
    assert compiled.loop(least_worthy)(*of).equal(least_worthy(*of))


def test_a_gpus_caches_are_not_compiled():
    shape = {"n_layer": 1, "batch": 1, "n_kv_head": 1, "head_dim": 4, "condition_tokens": 1, "max_tokens": 9}
    with pytest.raises(ValueError, match="caches are compiled on a CPU, and this one is on meta"):
        KVCache(FULL, dtype=torch.float32, device="meta", compiled=True, **shape)


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_without_a_compiler(monkeypatch):
    """What torch says then is told in one line."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "loop", torch.compile)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        why = compiled.failure.__wrapped__()
    assert why.startswith("InvalidCxxCompiler: No working C++ compiler found") and "\n" not in why
