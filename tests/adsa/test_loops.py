"""A CPU's loops do what PyTorch's operations do."""

import copy
import itertools
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adsa import CacheConfig, KVCache, LayerCache, Order, native
from adsa.loops import Loops, loops
from adsa.policies import POLICIES
from adsa.similarity import TIE_SINGLE, RunningSimilarity
from adsa.slots import MOST_TOKENS, _ranks
from adsa.storage import CODECS, Plain, Storage
from tests.adsa.test_cache import TOKENS, B, H, config, stream

needs_loops = pytest.mark.skipif(not native.wanted(), reason="no g++, or no vectors that loops are written for")
WIDTHS = sorted(native._VECTORS)[: 2 if native._capability() == "AVX512" else 1]  # of vectors that work here
SOURCE = Path(loops.__code__.co_filename).with_suffix(".cpp")
D = 32
FULL = CacheConfig("full")
PLUS_OF_FEW = [(9, 1, 5), (12, 4, 5), (12, 0, 8)]  # candidates are more than may leave
LONE = [
    config(policy, renew_every=renew) for policy, renew in itertools.product(sorted(set(POLICIES) - {"full"}), (1, 4))
]
OTHERS = [
    *(CacheConfig("full", dtype=dtype) for dtype in ("int8", "int4")),
    *(CacheConfig("adsa_plus", budget, prefix, 1, renew_every=renew) for budget, prefix, renew in PLUS_OF_FEW),
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


def loop_of(width, codec, dtype, dim, monkeypatch):
    """As on a processor whose vectors are so wide."""
    monkeypatch.setattr(native, "_capability", lambda: width)
    written = loops(codec, dtype, dim)._made_of
    return Loops(native.library.__wrapped__(SOURCE, FORMAT=written[0], HEAD_DIM=written[1]), *written)


@pytest.fixture
def called(monkeypatch):
    """Which loops ran."""
    names = set()

    def noted(name):
        loop = getattr(Loops, name)

        def wrapper(self, *args, **kwargs):
            names.add("compare" if kwargs.get("comparison") else "weigh" if kwargs.get("weights") is not None else name)
            return loop(self, *args, **kwargs)

        return wrapper

    for name in ("attend", "count_in", "put", "least_worthy", "merge", "rank"):
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


@needs_loops
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
    expected["weigh"] = evicts and rule.attention_window is not None
    expected["compare"] = evicts and compares
    expected["count_in"] = cfg.policy != "full" and compares
    expected["least_worthy"] = evicts and cfg.renewal == 1 and not cfg.merges
    expected["rank"] = rule.query_lines > 0
    expected["merge"] = cfg.merges and not compares
    assert called == {name for name, used in expected.items() if used}


@needs_loops
@pytest.mark.parametrize("cfg", [FULL, config("adsa")], ids=["full", "adsa"])
@pytest.mark.parametrize("given", [{"fixed": True}, {"order": Order(1, 0, TOKENS)}], ids=["fixed", "order"])
def test_other_caches(called, cfg, given, monkeypatch):
    """Those whose steps may be recorded, and those of another order than raster order."""
    (plain, kept), (found, left) = both(monkeypatch, cfg, **given)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, left, kept))
    names = set() if cfg == FULL else {"count_in"}
    if "fixed" in given and cfg != FULL:
        names |= {"least_worthy"}
    assert called == names | {"attend"}


@needs_loops
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


@needs_loops
@pytest.mark.parametrize("dtype, dim", [(torch.float64, 32), (torch.float16, 32), (torch.float32, 40)], ids=str)
def test_what_there_are_no_loops_for(called, dtype, dim):
    outputs(config("adsa"), dtype, dim=dim)
    assert not called and loops(Plain(), dtype, dim) is None


@needs_loops
@pytest.mark.parametrize("count", [1, 16, 53])
@pytest.mark.parametrize("joint", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("codec, dtype", FORMATS, ids=lambda x: type(x).__name__ if hasattr(x, "encode") else str(x))
@pytest.mark.parametrize("width", WIDTHS)
def test_by_its_definition(width, codec, dtype, joint, count, monkeypatch):
    """Of some rows and slots, in double precision."""
    torch.manual_seed(0)
    rows, heads, shared, queries, condition, dim, spare = 4, 3, 2, 3, 5, 64, 3
    loop, groups, mine = loop_of(width, codec, dtype, dim, monkeypatch), 1 if joint else heads, slice(1, 3)
    stores = [Storage(codec, (rows, heads, condition + count + spare, dim), dtype, "cpu") for _ in "kv"]
    for store in stores:
        store.write(0, 3 * torch.randn(rows, heads, condition + count + spare, dim))
        store.write(condition + count // 2, torch.zeros(rows, heads, 1, dim))
    keys, values = (store.as_written(0, condition + count, mine) for store in stores)
    k, v = (store.read(0, condition + count, mine, torch.float32).double() for store in stores)
    q = torch.randn(2, queries, heads * shared, dim).transpose(1, 2)
    bias = torch.randn(2, heads, queries, condition + count + spare)[..., : condition + count]
    bias[1, ..., :3] = -torch.inf
    for of_keys, given in itertools.product((False, True), (bias, bias[:1, :1], bias[:, :1, :1], None)):
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
        similar, seen = torch.empty(2, groups, count), torch.empty(2, groups, queries, count)
        comparison = (of_keys, found.total[mine], found.inverse_norm[mine], similar)
        out = loop.attend(q, keys, values, given, first=condition, comparison=comparison, weights=seen)
        scores = q.double().unflatten(1, (heads, shared)) * dim**-0.5 @ k.mT.unsqueeze(2)
        weights = (scores + (0 if given is None else given.unsqueeze(2))).softmax(-1)  # [2, H, Hq / H, S, C + N]
        torch.testing.assert_close(out.double(), (weights @ v.unsqueeze(2)).flatten(1, 2), atol=1e-5, rtol=1e-4)
        weights = weights[..., condition:].sum((1, 2) if joint else 2).view_as(seen)
        torch.testing.assert_close(seen.double(), weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(similar.double(), exact.score(features), atol=2 * TIE_SINGLE, rtol=0)
        assert loop.attend(q, keys, values, given).equal(out)
        half = loop.attend(q.bfloat16(), keys, values, given)
        assert half.dtype == torch.bfloat16
        assert half.equal(loop.attend(q.bfloat16().float(), keys, values, given).bfloat16())
        assert loop.attend(q.double(), keys, values, given).equal(out.double())
    slots, new = torch.randint(count, (2, groups, 1)), torch.randn(heads, 2, 1, dim).transpose(0, 1)
    mine_too, plain = (copy.deepcopy(stores[0]) for _ in range(2))
    loop.put(mine_too.as_written(condition, condition + count, mine), slots, codec.encode(new.to(dtype)))
    plain.put(condition + slots, new, mine)
    assert all(map(torch.equal, mine_too.parts, plain.parts))


@needs_loops
@pytest.mark.parametrize("lie", ["alike", "each in its way", "with gaps"])
@pytest.mark.parametrize("slot", [4, "for each"])
@pytest.mark.parametrize("joint", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("codec, dtype", FORMATS, ids=lambda x: type(x).__name__ if hasattr(x, "encode") else str(x))
def test_a_token_that_comes_in(codec, dtype, of_keys, joint, slot, lie):
    """Attention with it is that after it was put in and counted, to the last bit."""
    torch.manual_seed(0)
    rows, heads, condition, count, spare, mine = 4, 3, 2, 21, 3, slice(1, 3)
    loop, groups = loops(codec, dtype, D), 1 if joint else heads
    stores = [Storage(codec, (rows, heads, condition + count + spare, D), dtype, "cpu") for _ in "kv"]
    for store in stores:
        store.write(0, torch.randn(rows, heads, condition + count + spare, D))
    record = RunningSimilarity(rows, heads, count + spare, D, joint=joint, dtype=dtype, device="cpu")
    for tensor in (record.total, record.inverse_norm):
        tensor.normal_()
    slot = slot if isinstance(slot, int) else torch.randint(count, (2, groups, 1))
    k, v = (x.to(dtype) for x in torch.randn(2, 2, heads, 1, D))
    if lie == "each in its way":
        k = k.transpose(0, 1).contiguous().transpose(0, 1)
    elif lie == "with gaps":
        k, v = torch.cat([k, v], dim=1).split(heads, dim=1)
    q, made = torch.randn(2, heads, 1, D), []
    for together in (True, False):
        stores = copy.deepcopy(stores) if together else stores
        total, norm = (tensor[mine].clone() for tensor in (record.total, record.inverse_norm))
        new = slot, codec.encode(k), codec.encode(v)
        if not together:
            for store, x in zip(stores, (k, v), strict=True):
                where = slot if not isinstance(slot, int) else torch.full((2, 1, 1), slot)
                store.put(condition + where, x, mine)
            features = stores[not of_keys].as_written(condition, condition + count, mine)
            loop.count_in(features, slot, total, norm)
            new = None
        parts = [store.as_written(0, condition + count, mine) for store in stores]
        similar = torch.empty(2, groups, count)
        out = loop.attend(q, *parts, first=condition, new=new, comparison=(of_keys, total, norm, similar))
        made.append((out, similar, total, norm, *(part.clone() for store in stores for part in store.parts)))
    assert all(map(torch.equal, *made))


@needs_loops
@pytest.mark.parametrize("held", [[], [29, 31]])
@pytest.mark.parametrize("count", [16, 53])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("codec, dtype", FORMATS, ids=lambda x: type(x).__name__ if hasattr(x, "encode") else str(x))
@pytest.mark.parametrize("width", WIDTHS)
def test_ranking_by_its_definition(width, codec, dtype, groups, count, held, monkeypatch):
    """Whom the last line's queries miss least, and the nearest key; in double precision."""
    torch.manual_seed(0)
    rows, heads, shared, queries, condition, dim, close, line, prefix, local = 2, 3, 2, 5, 2, 64, 2.0**-10, 4, 3, 2
    few, named = 6, 3
    loop = loop_of(width, codec, dtype, dim, monkeypatch)
    store = Storage(codec, (rows, heads, condition + count + 1, dim), dtype, "cpu")
    store.write(0, torch.randn(rows, heads, condition + count + 1, dim))
    k = store.read(0, condition + count, dtype=torch.float32).double()
    q = (3 * torch.randn(rows, queries, heads * shared, dim)).to(dtype).transpose(1, 2)
    bias = torch.randn(rows, heads, 1, condition + count + 1)
    bias[0, ..., 0] = -torch.inf
    arrivals = torch.stack([torch.randperm(count) for _ in range(rows * groups)]).view(rows, groups, count)
    arrivals = (arrivals + 20).int()
    now = 20 + count
    if count == 16:
        arrivals[0, 0] = torch.arange(now - count, now)  # those that stay are of the last line, but for a few
        line = 14
    room = torch.cat([arrivals, arrivals], -1)[..., :count]  # some slots of more
    for added in (bias[..., : condition + count], None):
        scores = q.double().unflatten(1, (heads, shared)).flatten(2, 3) * dim**-0.5 @ k.mT
        most = (scores + (0 if added is None else added)).softmax(-1)[..., condition:].amax(2)
        odds = most / (1 - most).clamp(min=1e-4)
        odds = odds.amax(1, keepdim=True) if groups == 1 else odds
        gaps = torch.cdist(k, k)[..., condition:, condition:].square()
        square = k[:, :, condition:].square().sum(-1)
        gaps = gaps.maximum(close * (square.unsqueeze(-1) + square.unsqueeze(2)))
        gaps = gaps.sum(1, keepdim=True) if groups == 1 else gaps  # [rows, G, N, N]
        kept = torch.isin(arrivals, torch.tensor(held, dtype=torch.int32))
        stays = kept | (arrivals > now - local)
        stays[..., :prefix] = True
        candidates = odds.masked_fill(stays, torch.inf).topk(few, largest=False).indices

        def targets(leave, kept=kept, gaps=gaps):
            never = torch.zeros_like(kept).scatter_(2, leave, True) | kept
            recent = never | (arrivals >= now - line)
            never = torch.where(recent.all(-1, keepdim=True), never, recent)
            left = gaps.gather(2, leave.unsqueeze(3).expand(-1, -1, -1, count))
            return left.masked_fill(never.unsqueeze(2), torch.inf).min(-1)

        worth = odds.gather(2, candidates).log() + targets(candidates).values.log() / 2
        exact = candidates.gather(2, worth.topk(named, largest=False).indices)
        for merges in (True, False):
            found, into = loop.rank(
                q, store.as_written(0, condition + count), added, room, torch.tensor(now, dtype=torch.int32),
                line=line, prefix=prefix, local=local, held=held, few=few, named=named, merges=merges, close=close,
                largest=2.0**15 - 1, fraction=2.0**28,
            )  # fmt: skip
            assert found.equal(exact)
            assert into.equal(targets(exact).indices) if merges else into is None


@needs_loops
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_merging_by_its_definition(width, dtype, groups, monkeypatch):
    """Means by counts, which are added up."""
    torch.manual_seed(0)
    rows, heads, slots, dim = 4, 3, 9, 64
    loop = loop_of(width, Plain(), dtype, dim, monkeypatch)
    keys, values = torch.randn(2, rows, heads, slots + 2, dim).to(dtype)
    counts = torch.randint(1, 9, (rows, heads, 1, slots + 2)).float()
    bias = counts.log()
    slot, into = torch.randint(4, (rows, groups, 1)), torch.randint(4, (rows, groups, 1)) + 4
    before = [x.clone() for x in (keys, values, bias)]
    loop.merge((keys[:, :, 1:-1],), (values[:, :, 1:-1],), slot, into, bias[..., 1:-1])
    leaves, stays = (index.expand(rows, heads, 1) + 1 for index in (slot, into))
    one, two = (counts.squeeze(2).gather(2, index).double() for index in (leaves, stays))
    for x, old in ((keys, before[0]), (values, before[1])):
        where = [index.unsqueeze(-1).expand(-1, -1, -1, dim) for index in (leaves, stays)]
        a, b = (old.double().gather(2, index) for index in where)
        mean = (a * (one / (one + two)).unsqueeze(-1) + b * (two / (one + two)).unsqueeze(-1)).to(dtype)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x, old.scatter(2, where[1], mean), atol=4 * eps, rtol=eps)
        assert x.scatter(2, where[1], 0.0).equal(old.scatter(2, where[1], 0.0))
    expected = before[2].squeeze(2).scatter(2, stays, (one + two).log().float())
    torch.testing.assert_close(bias.squeeze(2), expected, atol=1e-6, rtol=1e-6)


@needs_loops
def test_hidden_slots_have_no_weight():
    """Whatever lies there, short of no number at all; and scores are as large as they like."""
    keys, values = torch.zeros(1, 1, 20, D), torch.ones(1, 1, 20, D)
    values[..., 7, :], keys[..., 9, :], keys[..., 10, :] = 1e38, 1e4, -1e4
    bias = torch.zeros(1, 1, 1, 20)
    bias[..., 7] = -torch.inf
    out = loops(Plain(), torch.float32, D).attend(torch.ones(1, 1, 1, D), (keys,), (values,), bias)
    assert out.equal(torch.ones(1, 1, 1, D))


@needs_loops
def test_victims():
    """By score, then by arrival; infinite scores are as large as the largest that counts."""
    torch.manual_seed(0)
    for count, prefix, local in ((9, 0, 0), (40, 3, 5), (300, 290, 1)):
        score = torch.randn(3, 2, count).round_()  # with ties
        score[0, 0, ::2], score[0, 1] = -torch.inf, torch.inf
        score[1] *= 1e9
        score[2, 0, ::3], score[2, 1] = torch.nan, torch.nan  # counts as 0
        later = torch.stack([torch.randperm(count - prefix).int() + prefix for _ in range(6)]).view(3, 2, -1)
        arrivals = torch.cat([torch.arange(prefix, dtype=torch.int32).expand(3, 2, -1), later], -1)
        number = torch.tensor(count, dtype=torch.int32)
        stays = arrivals > number - local
        stays[..., :prefix] = True
        exact = (
            _ranks(score.nan_to_num(0.0, torch.inf, -torch.inf), arrivals)
            .masked_fill(stays, 2**62)
            .argmin(-1, keepdim=True)
        )
        numbers = {"largest": 2.0**15 - 1, "fraction": 2.0**28}
        loop = loops(Plain(), torch.float32, D)
        room = torch.cat([arrivals, arrivals + MOST_TOKENS], -1)[..., :count]  # some slots of more
        assert loop.least_worthy(score, room, number, prefix=prefix, local=local, **numbers).equal(exact)


def one_step(seed=0, rows=2, policy="adsa_plus", **given):
    """A cache that is full, and a token that comes."""
    torch.manual_seed(seed)
    shape = {"n_layer": 1, "n_kv_head": 2, "head_dim": D, "condition_tokens": 1, "max_tokens": 40}
    kv = KVCache(config(policy, **given), batch=rows, dtype=torch.float32, device="cpu", **shape)
    stream = torch.randn(30, 3, rows, 2, 1, D)
    for token in stream[:-1]:
        kv.layers[0].attend(*token)
    return kv.layers[0], stream[-1]


@needs_loops
def test_threads_do_not_matter():
    """They are PyTorch's."""
    made, library = [], native.library(SOURCE, FORMAT="BFloat16", HEAD_DIM=D)
    for threads in (1, 4):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            made.append([outputs(cfg, torch.bfloat16) for cfg in (config("adsa"), config("adsa_plus"))])
            assert library.omp_get_max_threads() == threads
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(*made, atol=0, rtol=0)


@needs_loops
@pytest.mark.parametrize("policy", ["adsa", "adsa_plus"])
def test_other_defaults_are_not_the_loops(policy, monkeypatch):
    """Of a program that makes tensors of another kind, on another device."""
    (cache, token), (other, _) = (one_step(policy=policy) for _ in range(2))
    expected, before = cache.attend(*token), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = other.attend(*token)
    finally:
        torch.set_default_dtype(before)
    assert found.equal(expected) and other.positions.equal(cache.positions)


@needs_loops
@pytest.mark.parametrize("policy", ["adsa", "keydiff", "r_kv", "adsa_plus"])
def test_inference_mode_and_then_without(policy, monkeypatch):
    streams = stream(dim=D, dtype=torch.float32)
    shape = {"batch": B, "n_kv_head": H, "head_dim": D, "condition_tokens": 1, "max_tokens": TOKENS}

    def run(*modes):
        kv = KVCache(config(policy), n_layer=1, dtype=torch.float32, device="cpu", **shape)
        found = []
        for t in range(1 + TOKENS):
            with modes[t // 25]():
                found.append(kv.layers[0].attend(*(x[:, :, t : t + 1] for x in streams)).clone())
        return found

    expected = run(torch.no_grad, torch.no_grad)
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        torch.testing.assert_close(run(*modes), expected, atol=0, rtol=0)


@needs_loops
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_what_wants_gradients_has_no_loops(wanted, called):
    """None is cut out of a graph: a query, a key or a value."""
    cache, token = one_step(policy="adsa")
    called.clear()
    token = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(token)]
    cache.attend(*token).sum().backward()
    assert called.isdisjoint({"attend", "compare"})
    assert token[wanted].grad.any()


@needs_loops
def test_a_cache_that_is_used_again():
    streams = stream(dim=D, dtype=torch.float32)
    shape = {"batch": B, "n_kv_head": H, "head_dim": D, "condition_tokens": 1, "max_tokens": TOKENS}
    kv = KVCache(config("adsa"), n_layer=1, dtype=torch.float32, device="cpu", **shape)
    made = []
    for _ in range(2):
        made.append([kv.layers[0].attend(*(x[:, :, t : t + 1] for x in streams)).clone() for t in range(1 + TOKENS)])
        kv.reset()
    torch.testing.assert_close(*made, atol=0, rtol=0)


@needs_loops
@pytest.mark.parametrize("policy", ["adsa", "adsa_plus"])
def test_a_compiler_finds_no_loops(policy, called):
    (cache, token), (other, _) = (one_step(policy=policy) for _ in range(2))
    expected = cache.attend(*token)
    called.clear()
    torch._dynamo.reset()
    counter = CompileCounter()
    found = torch.compile(LayerCache.attend, backend=counter)(other, *token)
    assert counter.frame_count and not called
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert other.positions.equal(cache.positions)


@needs_loops
def test_wrong_shapes_are_told():
    """C++ would read past the end."""
    cache, (q, k, v) = one_step(policy="adsa", rows=2)
    loop, slots = cache.slots.loops, cache.slots
    keys, values, _ = slots.as_written(slice(0, 2))
    comparison = slots.comparison(slice(0, 2))
    slot, new, bias = torch.zeros(2, 2, 1).long(), ((k,), (v,)), torch.zeros(2, 2, 1, keys[0].shape[2])
    ranks = {"line": 4, "prefix": 0, "local": 1, "held": [], "few": 2, "named": 1, "merges": True}
    ranks |= {"close": 0.1, "largest": 1.0, "fraction": 1.0}
    for call in (
        lambda: loop.attend(q[:1], keys, values),
        lambda: loop.attend(q[..., :16], keys, values),
        lambda: loop.attend(torch.cat([q, q[:, :1]], 1), keys, values),
        lambda: loop.attend(q, keys, values, torch.zeros(1, 1, 1, 1).expand(1, 1, 1, keys[0].shape[2])),
        lambda: loop.attend(q, keys, values, torch.zeros(1, 1, 1, 3)),
        lambda: loop.attend(q, keys, values, first=1, comparison=(*comparison[:3], comparison[3][:1])),
        lambda: loop.attend(q, keys, values, first=2, comparison=comparison),
        lambda: loop.attend(q, keys, values, first=1, weights=torch.zeros(2, 2, 1, 3)),
        lambda: loop.attend(q, keys, values, first=1, new=(slot[:1], *new)),
        lambda: loop.attend(q, keys, values, first=1, new=(slot[:, :1], *new), comparison=comparison),
        lambda: loop.attend(q, keys, values, first=1, new=(slot, *new[:1], (v[:1],))),
        lambda: loop.attend(q, keys, values, first=1, new=(slot, *new[:1], (v.double(),))),
        lambda: loop.attend(q, tuple(x.to("meta") for x in keys), values),
        lambda: loop.count_in(keys, torch.zeros(2, 1, 1).long(), *comparison[1:3]),
        lambda: loop.put(keys, torch.zeros(1, 2, 1).long(), (k,)),
        lambda: loop.put(keys, torch.zeros(2, 2, 1).long(), (k[:1],)),
        lambda: loop.attend(q, keys, values, first=1, new=(99, *new)),
        lambda: loop.attend(q, tuple(x.bfloat16() for x in keys), values),
        lambda: loop.merge(keys, values, slot[:1], slot, bias),
        lambda: loop.merge(keys, values, slot, slot, bias[:1]),
        lambda: loop.merge(keys, values, slot, slot, bias[..., :3]),
        lambda: loop.rank(q[:1], keys, None, slots.arrivals, slots.clock, **ranks),
        lambda: loop.rank(q, keys, bias[..., :3], slots.arrivals, slots.clock, **ranks),
        lambda: loop.rank(q, keys, None, slots.arrivals[:1], slots.clock, **ranks),
        lambda: loop.merge(keys, values, torch.zeros(2, 0, 1).long(), torch.zeros(2, 0, 1).long(), bias),
        lambda: loop.put(keys, torch.zeros(2, 3, 1).long(), (k,)),
        lambda: loop.rank(q, keys, None, slots.arrivals, slots.clock.long(), **ranks),
        lambda: loop.rank(q[:, :, :0], keys, None, slots.arrivals, slots.clock, **ranks),
        lambda: loop.rank(q, keys, None, slots.arrivals, slots.clock, **(ranks | {"named": 3})),
        lambda: slots._least(torch.zeros(2, 1, 16), slice(0, 2)),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(ValueError, match="must be"):
        cache.attend(q[:1], k[:1], v[:1])


@needs_loops
def test_scores_in_double_precision_are_not_rounded(monkeypatch):
    cache, token = one_step(policy="adsa")
    monkeypatch.setattr(type(cache.slots.policy), "score", lambda _, slots: 1000 - 1e-6 * slots.arrivals.double())
    last = cache.positions.clone()
    last[last > cache.count - 5] = -1
    cache.attend(*token)
    assert not (cache.positions == last.amax(-1, keepdim=True)).any()


@needs_loops
def test_a_cache_may_be_copied():
    cache = one_step()[0].slots
    assert copy.deepcopy(cache).loops._made_of == cache.loops._made_of
    assert pickle.loads(pickle.dumps(cache.loops)).attend is not None


# Where they come from


POWER = "#include <cmath>\n" + 'extern "C" double power(double x) { return std::pow(x, EXPONENT); }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made"))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "power.cpp"
    path.write_text(POWER)
    return path


@needs_loops
def test_compiled_once(source, tmp_path):
    first, again, other = (native._compiled(source, {"EXPONENT": exponent}) for exponent in (2, 2, 3))
    assert first == again != other
    assert sorted((tmp_path / "made" / "adsa").iterdir()) == sorted([first, other])
    other.write_bytes(b"cut off")  # is made again
    library = native.library(source, EXPONENT=3)
    library.power.restype, library.power.argtypes = native.ctypes.c_double, [native.ctypes.c_double]
    assert math.isclose(library.power(2.0), 8.0)


@needs_loops
@pytest.mark.parametrize("compiler", ["g++ -g0", "no-such-compiler", "false"])
def test_compilers(source, compiler, monkeypatch):
    """CXX may have arguments; and need not be there, nor be able to."""
    monkeypatch.setenv("CXX", compiler)
    assert native._compilers() == [compiler.split(), ["g++"]]
    assert native.library(source, EXPONENT=2) is not None


@needs_loops
def test_an_older_compiler(source, tmp_path, monkeypatch):
    """That doesn't know all instructions: those which it knows are used."""
    compiler = tmp_path / "older"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mnew*) echo "error: unrecognized" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "_EXTRAS", {"new": ("is_available", "-mnew")})
    monkeypatch.setattr(native, "_capability", lambda: "AVX512")
    assert [command[1:] for command in native._commands()] == [["-mnew"], []] * 2
    assert native.library(source, EXPONENT=2) is not None


@pytest.mark.parametrize("fault", ["compiler", "source", "folder", "home"])
def test_where_nothing_compiles(source, fault, tmp_path, monkeypatch):
    """PyTorch does the work, and says so once."""
    if fault == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif fault == "source":
        compiler = tmp_path / "g++"
        compiler.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('error: of some kind')\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(native.shutil, "which", lambda name: name)
    if fault == "folder":
        (tmp_path / "made").write_text("no folder")
    if fault == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    monkeypatch.setattr(native, "_capability", lambda: "AVX2")
    why = {"compiler": r"there is no g\+\+", "source": "error: of some kind", "folder": "made", "home": "no home"}[
        fault
    ]
    native._tell.cache_clear()
    with pytest.warns(UserWarning, match=f"power.cpp can't be compiled.*{why}.*ADSA_KERNELS=0 does without"):
        assert native.library(source, EXPONENT=2) is None
    assert native.library(source, EXPONENT=2) is None


def test_turned_off(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(native, "_capability", lambda: "AVX2")
    monkeypatch.setenv("ADSA_KERNELS", "0")
    assert not native.wanted() and loops(Plain(), torch.float32, D) is None
    monkeypatch.setattr(native, "_capability", lambda: "DEFAULT")
    monkeypatch.delenv("ADSA_KERNELS")
    assert not native.wanted() and loops(Plain(), torch.float32, D) is None
