"""A CPU's loops do what PyTorch's operations do."""

import copy
import itertools
import math
import shutil

import pytest
import torch

from adsa import CacheConfig, KVCache, Order, native
from adsa.loops import Loops, loops
from adsa.policies import POLICIES
from adsa.similarity import TIE_SINGLE, RunningSimilarity
from adsa.slots import ARRIVAL_BITS, MOST_TOKENS, _ranks
from adsa.storage import CODECS, Plain, Storage
from tests.adsa.test_cache import TOKENS, B, H, config, stream

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++"),
    pytest.mark.skipif(not native.wanted(), reason="no vectors of a kind that loops are written for"),
]
D = 32
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
FORMATS = [
    (Plain(), torch.float32),
    (Plain(), torch.bfloat16),
    *((codec, torch.bfloat16) for codec in CODECS.values()),
    (CODECS["int8"], torch.float32),
]


@pytest.fixture
def called(monkeypatch):
    """Which loops ran."""
    names = set()

    def noted(name):
        loop = getattr(Loops, name)

        def wrapper(self, *args, **kwargs):
            compares = name == "attend" and len(args) > 4 and args[4] is not None
            names.add("compare" if compares else name)
            return loop(self, *args, **kwargs)

        return wrapper

    for name in ("attend", "count_in", "put", "least_worthy", "most_weight", "nearest"):
        monkeypatch.setattr(Loops, name, noted(name))
    return names


def outputs(cfg, dtype=torch.float32, heads=2 * H, dim=D, **given):
    """Of two layers over an image whose last tokens come to fewer rows; and which tokens are left."""
    streams = [stream(heads=heads, dtype=dtype, condition=3, seed=seed, dim=dim) for seed in range(2)]
    shape = {"batch": B, "n_kv_head": H, "n_head": heads, "head_dim": dim, "condition_tokens": 3, "max_tokens": TOKENS}
    valid = torch.tensor([[True] * 3, [False, True, True], [True] * 3])
    kv = KVCache(cfg, n_layer=2, dtype=dtype, device="cpu", valid=valid, **shape, **given)
    found, rows = [], B
    for t in range(2, 3 + TOKENS):
        if t == 30:
            rows = B - 1
            kv.keep_rows(rows)
        if kv.layers[0].slots.order and t > 2:
            kv.layers[0].slots.expect([t - 3], [], torch.tensor([t - 3]))
        for one, of_layer in zip(kv.layers, streams, strict=True):
            q, k, v = (x[:rows, :, 0 if t == 2 else t : t + 1] for x in of_layer)
            found.append(one.attend(q, k, v).clone())
    return found, [one.positions.clone() for one in kv.layers]


def both(monkeypatch, *args, **given):
    """:func:`outputs` without the loops, and with them."""
    with monkeypatch.context() as without:
        without.setenv("ADSA_KERNELS", "0")
        plain = outputs(*args, **given)
    return plain, outputs(*args, **given)


@pytest.mark.parametrize(
    "cfg", [FULL, *LONE, *OTHERS], ids=lambda c: f"{c.policy}-{c.granularity}-{c.mode}-{c.renew_every}-{c.dtype}"
)
def test_loops_change_nothing(called, cfg, monkeypatch):
    (plain, kept), (found, left) = both(monkeypatch, cfg)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, left, kept))
    rule, evicts = cfg.rule, cfg.policy != "full" and cfg.mode == "evict"
    compares = rule.similarity_of is not None
    expected = {"attend": cfg.mode == "evict" and rule.attention_window is None}
    expected["compare"] = expected["attend"] and evicts and compares
    expected["count_in"] = cfg.policy != "full" and compares
    expected["put"] = evicts
    expected["least_worthy"] = evicts and cfg.renewal == 1 and not cfg.merges
    expected["most_weight"] = rule.query_lines > 0
    expected["nearest"] = cfg.merges or rule.query_lines > 0
    assert called == {name for name, used in expected.items() if used}


@pytest.mark.parametrize("cfg", [FULL, config("adsa")], ids=["full", "adsa"])
@pytest.mark.parametrize("given", [{"fixed": True}, {"order": Order(1, 0, TOKENS)}], ids=["fixed", "order"])
def test_other_caches(called, cfg, given, monkeypatch):
    """Those whose steps may be recorded have loops; those of another order than raster order have none."""
    (plain, kept), (found, left) = both(monkeypatch, cfg, **given)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, left, kept))
    names = {"attend", "put"} if cfg == FULL else {"attend", "count_in", "put", "least_worthy"}
    assert called == (names if "fixed" in given else set())


@pytest.mark.parametrize("heads", [H, 2 * H])
@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("policy", ["full", "adsa"])
def test_half_precision(called, policy, dim, heads, monkeypatch):
    """Scores are not rounded to it, nor is what is ranked."""
    cfg = FULL if policy == "full" else config(policy)
    (plain, kept), (found, left) = both(monkeypatch, cfg, torch.bfloat16, dim=dim, heads=heads)
    torch.testing.assert_close(found, plain, atol=2**-8, rtol=2**-7)  # the last bit may be rounded otherwise
    assert all(map(torch.equal, left, kept))
    assert called and found[-1].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, dim", [(torch.float64, 32), (torch.float16, 32), (torch.float32, 40)], ids=str)
def test_what_there_are_no_loops_for(called, dtype, dim):
    outputs(config("adsa"), dtype, dim=dim)
    assert not called and loops(Plain(), dtype, dim) is None


@pytest.mark.parametrize("count", [1, 16, 53])
@pytest.mark.parametrize("joint", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("codec, dtype", FORMATS, ids=lambda x: type(x).__name__ if hasattr(x, "encode") else str(x))
def test_by_its_definition(codec, dtype, joint, count):
    """Of some rows and slots, in double precision."""
    torch.manual_seed(0)
    rows, heads, shared, condition, dim, spare = 4, 3, 2, 5, 64, 3
    loop, groups, mine = loops(codec, dtype, dim), 1 if joint else heads, slice(1, 3)
    stores = [Storage(codec, (rows, heads, condition + count + spare, dim), dtype, "cpu") for _ in "kv"]
    for store in stores:
        store.write(0, 3 * torch.randn(rows, heads, condition + count + spare, dim))
        store.write(condition + count // 2, torch.zeros(rows, heads, 1, dim))
    keys, values = (store.as_written(0, condition + count, mine) for store in stores)
    k, v = (store.read(0, condition + count, mine, torch.float32).double() for store in stores)
    q, bias = torch.randn(2, heads, shared, dim) * dim**-0.5, torch.randn(1, heads, 1, condition + count + spare)
    bias = bias.expand(2, -1, -1, -1).clone()[..., : condition + count]
    bias[1, ..., :3] = -torch.inf
    for of_keys, given in itertools.product((False, True), (bias, bias[:1, :1], None)):
        features, store = (k, stores[0]) if of_keys else (v, stores[1])
        features = features[:, :, condition:]
        exact = RunningSimilarity(2, heads, count, dim, joint=joint, dtype=torch.float64, device="cpu")
        found = RunningSimilarity(rows, heads, count + spare, dim, joint=joint, dtype=dtype, device="cpu")
        for slot in range(count):
            exact.add(slot, features[:, :, slot : slot + 1])
            where = slot if slot % 2 else torch.full((2, groups, 1), slot)
            written = store.as_written(condition, condition + count + spare, mine)
            loop.count_in(written, where, found.total[mine], found.inverse_norm[mine])
        torch.testing.assert_close(found.total[mine].double(), exact.total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.inverse_norm[mine, :, :count].double(), exact.inverse_norm)
        assert not found.total[0].any() and not found.total[3].any()
        similar = torch.empty(2, groups, count)
        comparison = (of_keys, found.total[mine], found.inverse_norm[mine], similar)
        out = loop.attend(q, keys, values, given, comparison)
        scores = q.double() @ k.mT + (0 if given is None else given)
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ v, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(similar.double(), exact.score(features), atol=2 * TIE_SINGLE, rtol=0)
        assert loop.attend(q, keys, values, given).equal(out)
    slots, new = torch.randint(count, (2, groups, 1)), torch.randn(heads, 2, 1, dim).transpose(0, 1)
    mine_too, plain = (copy.deepcopy(stores[0]) for _ in range(2))
    loop.put(mine_too.as_written(condition, condition + count, mine), slots, codec.encode(new.to(dtype)))
    plain.put(condition + slots, new, mine)
    assert all(map(torch.equal, mine_too.parts, plain.parts))


@pytest.mark.parametrize("count", [1, 16, 53])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("codec, dtype", FORMATS, ids=lambda x: type(x).__name__ if hasattr(x, "encode") else str(x))
def test_what_a_policy_asks_of_keys(codec, dtype, groups, count):
    """Weights of several queries, and nearest keys; in double precision."""
    torch.manual_seed(0)
    rows, heads, queries, few, condition, dim, close = 2, 3, 5, 4, 2, 64, 2.0**-10
    loop, store = loops(codec, dtype, dim), Storage(codec, (rows, heads, condition + count + 1, dim), dtype, "cpu")
    store.write(0, torch.randn(rows, heads, condition + count + 1, dim))
    k = store.read(0, condition + count, dtype=torch.float32).double()
    q, bias = torch.randn(rows, heads, queries, dim), torch.randn(rows, heads, 1, condition + count + 1)
    bias[0, ..., 0] = -torch.inf
    for added in (bias[..., : condition + count], None):
        found = loop.most_weight(q, store.as_written(0, condition + count), added, count)
        exact = (q.double() @ k.mT + (0 if added is None else added)).softmax(-1)[..., condition:].amax(2)
        torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-4)
    k, never = k[:, :, condition:], torch.rand(rows, groups, count) < 0.3
    never[..., 0] = False
    never[0, 0] = count == 16  # none may be
    tokens = torch.randint(count, (rows, groups, few))
    left = k.gather(2, tokens.expand(-1, heads, -1).unsqueeze(-1).expand(-1, -1, -1, dim))
    exact = torch.cdist(left, k).square()
    exact = exact.maximum(close * (left.square().sum(-1).unsqueeze(-1) + k.square().sum(-1).unsqueeze(2)))
    exact = exact.sum(1, keepdim=True) if groups == 1 else exact
    exact = exact.masked_fill(never.unsqueeze(2), torch.inf)
    distance, where = loop.nearest(store.as_written(condition, condition + count), tokens, never, close)
    torch.testing.assert_close(distance.double(), exact.amin(-1), atol=1e-4, rtol=1e-4)
    assert where.lt(count).all()
    torch.testing.assert_close(exact.gather(3, where.unsqueeze(3)).squeeze(3), exact.amin(-1), atol=1e-4, rtol=1e-4)


def test_hidden_slots_have_no_weight():
    """Whatever lies there, short of no number at all; and scores are as large as they like."""
    keys, values = torch.zeros(1, 1, 20, D), torch.ones(1, 1, 20, D)
    values[..., 7, :], keys[..., 9, :], keys[..., 10, :] = 1e38, 1e4, -1e4
    bias = torch.zeros(1, 1, 1, 20)
    bias[..., 7] = -torch.inf
    out = loops(Plain(), torch.float32, D).attend(torch.ones(1, 1, 1, D), (keys,), (values,), bias)
    assert out.equal(torch.ones(1, 1, 1, D))


def test_victims():
    """By score, then by arrival; infinite scores are as large as the largest that counts."""
    torch.manual_seed(0)
    for count, prefix, local in ((9, 0, 0), (40, 3, 5), (300, 290, 1)):
        score = torch.randn(3, 2, count).round_()  # with ties
        score[0, 0, ::2], score[0, 1] = -torch.inf, torch.inf
        score[1] *= 1e9
        later = torch.stack([torch.randperm(count - prefix).int() + prefix for _ in range(6)]).view(3, 2, -1)
        arrivals = torch.cat([torch.arange(prefix, dtype=torch.int32).expand(3, 2, -1), later], -1)
        number = torch.tensor(count, dtype=torch.int32)
        stays = arrivals > number - local
        stays[..., :prefix] = True
        exact = _ranks(score, arrivals).masked_fill(stays, 2**62).argmin(-1, keepdim=True)
        numbers = {"largest": 2.0**15 - 1, "fraction": 2.0**28, "bits": ARRIVAL_BITS}
        loop = loops(Plain(), torch.float32, D)
        room = torch.cat([arrivals, arrivals + MOST_TOKENS], -1)[..., :count]  # some slots of more
        assert loop.least_worthy(score, room, number, prefix=prefix, local=local, **numbers).equal(exact)


def test_scores_are_not_broadcast():
    bias = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 9)
    with pytest.raises(ValueError, match="neighbour"):
        x = torch.zeros(1, 1, 9, D)
        loops(Plain(), torch.float32, D).attend(torch.zeros(1, 1, 1, D), (x,), (x,), bias)


def test_a_cache_may_be_copied():
    shape = {"n_layer": 1, "batch": 1, "n_kv_head": 1, "head_dim": D, "condition_tokens": 1, "max_tokens": 9}
    cache = KVCache(CacheConfig("adsa", 4), **shape, dtype=torch.float32, device="cpu")
    assert copy.deepcopy(cache)._all[0].loops is cache._all[0].loops is not None


# Where they come from


SOURCE = "#include <cmath>\n" + 'extern "C" double power(double x) { return std::pow(x, EXPONENT); }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made"))
    path = tmp_path / "power.cpp"
    path.write_text(SOURCE)
    return path


def test_compiled_once(source, tmp_path):
    first, again, other = (native._compiled(source, {"EXPONENT": exponent}) for exponent in (2, 2, 3))
    assert first == again != other
    assert sorted((tmp_path / "made" / "adsa").iterdir()) == sorted([first, other])
    library = native.library(source, EXPONENT=3)
    library.power.restype, library.power.argtypes = native.ctypes.c_double, [native.ctypes.c_double]
    assert math.isclose(library.power(2.0), 8.0)


@pytest.mark.parametrize("fault", ["compiler", "source", "folder", "library"])
def test_where_nothing_compiles(source, fault, tmp_path, monkeypatch):
    """PyTorch does the work, and says so once."""
    if fault == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif fault == "source":
        source.write_text("not C++")
    elif fault == "folder":
        (tmp_path / "made").write_text("no folder")
    else:
        native._compiled(source, {"EXPONENT": 2}).write_bytes(b"cut off")
    why = {"compiler": "no no-such-compiler", "source": "error", "folder": "made", "library": "file too short"}[fault]
    with pytest.warns(UserWarning, match=f"power.cpp can't be compiled.*{why}.*ADSA_KERNELS=0 does without"):
        assert native.library(source, EXPONENT=2) is None
    assert native.library(source, EXPONENT=2) is None


def test_turned_off(monkeypatch):
    assert native.wanted()
    monkeypatch.setenv("ADSA_KERNELS", "0")
    assert not native.wanted() and loops(Plain(), torch.float32, D) is None
    monkeypatch.delenv("ADSA_KERNELS")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not native.wanted()
