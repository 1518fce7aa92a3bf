"""Writing keys and values; and as integers: how far off they may be, and that a cache holds what they stand for."""

import pytest
import torch
import torch.nn.functional as F

from adsa import CacheConfig, KVCache
from adsa.policies import POLICIES
from adsa.storage import CODECS, Plain, Storage

from .test_cache import TOKENS, WAYS, B, D, H, config, layer, run, stream


def vectors(dim, dtype=torch.float64):
    """Of all sizes, some in one place far out, some constant, some zero."""
    x = torch.randn(4, 3, 20, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x * torch.logspace(-6, 3, 20, dtype=torch.float64)[:, None]
    x[0, 0, :, 0] *= 50
    x[1, 0], x[1, 1] = 0.3, 0
    return x.to(dtype)


def store(name, x):
    storage = Storage(CODECS[name], x.shape, x.dtype, "cpu")
    storage.write(0, x)
    return storage


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 64, 100])
def test_int8_is_off_by_half_a_step(dim, dtype):
    x = vectors(dim, dtype)
    back = store("int8", x).read(0, 20).double()
    most = x.double().abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps  # of the product itself, on top of the step's own 2^-11
    bound = most / 254 + most * (2.0**-10 + rounding) + 127 * 2.0**-25  # the last: of steps too small for fp16
    assert ((back - x.double()).abs() <= bound).all()
    assert (back[1, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "group"), [(8, 8), (64, 32), (100, 25), (256, 32)])
def test_int4_is_off_by_half_a_step_of_its_group(dim, group, dtype):
    x = vectors(dim, dtype)
    back = store("int4", x).read(0, 20).double().unflatten(-1, (-1, group))
    groups = x.double().unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = groups.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps
    bound = (high - low) / 30 + largest * (2.0**-9 + 3 * rounding) + 16 * 2.0**-24
    assert ((back - groups).abs() <= bound).all()


def test_int4_groups_do_not_share_a_far_out_number():
    x = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    x[..., 40] = 1000
    back = store("int4", x).read(0, 1)
    assert (back - x)[..., :32].abs().max() < 0.2 < (back - x)[..., 32:].abs().max()


@pytest.mark.parametrize(("name", "per_vector"), [("int8", 64 + 2), ("int4", 32 + 4 * 2)])
def test_bytes(name, per_vector):
    x = vectors(64, torch.bfloat16)
    assert sum(part.nbytes for part in store(name, x).parts) == x[..., 0].numel() * per_vector


@pytest.mark.parametrize("name", CODECS)
def test_slots_are_written_and_read_one_by_one(name):
    x = vectors(8)
    storage = store(name, x)
    whole = storage.read(0, 20).clone()
    slots = torch.tensor([[[3], [7], [19]]]).expand(4, -1, -1)
    storage.put(slots, x[:, :, 5:6])
    assert torch.equal(storage.pick(slots), whole[:, :, 5:6])
    for head, slot in enumerate((3, 7, 19)):
        whole[:, head, slot] = whole[:, head, 5]
    assert torch.equal(storage.read(0, 20), whole)
    storage.keep(lambda part: part[:2])
    assert torch.equal(storage.read(4, 9), whole[:2, :, 4:9])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("way", [("full",), *WAYS], ids=str)
def test_a_cache_of_integers_is_the_cache_of_what_they_stand_for(way, name):
    """But for merging, whose means are rounded anew."""
    q, k, v = stream()
    rounded = [store(name, x).read(0, x.shape[2]) for x in (k, v)]
    plain, integers = (
        CacheConfig("full", dtype=dtype) if way == ("full",) else config(*way, dtype=dtype, merge=False)
        for dtype in (None, name)
    )
    expected = run(layer(plain), q, *rounded)
    torch.testing.assert_close(run(layer(integers), q, k, v), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float64) for name in CODECS), (None, torch.bfloat16)])
@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        *(
            (policy, mode)
            for policy in ("full", "adsa", "adsa_plus", "h2o", "streaming")
            for mode in ("evict", "fixed")
        ),
        *((policy, "select") for policy in ("adsa", "h2o", "streaming")),
    ],
)
def test_attention_by_parts(policy, mode, name, dtype, monkeypatch):
    """Of two layers, with groups of queries, padding and a row that leaves: one row at a time, or all at once."""
    how = {"dtype": name, **({"mode": mode} if mode == "select" else {})}
    cfg = CacheConfig("full", **how) if policy == "full" else config(policy, merge=None, **how)
    streams = [stream(heads=2 * H, condition=3, seed=seed) for seed in range(2)]
    valid = torch.tensor([[True] * 3, [False, True, True], [False, False, True]])
    shape = {"batch": B, "n_kv_head": H, "n_head": 2 * H, "head_dim": D, "condition_tokens": 3, "max_tokens": TOKENS}

    def outputs():
        kv = KVCache(cfg, n_layer=2, dtype=dtype, device="cpu", valid=valid, fixed=mode == "fixed", **shape)
        rows = B
        for step in [slice(0, 3), *(slice(t, t + 1) for t in range(3, 3 + TOKENS))]:
            if step.start == 30:
                rows = B - 1
                kv.keep_rows(rows)
            for one, of_layer in zip(kv.layers, streams, strict=True):
                yield one.attend(*(x[:rows, :, step].to(dtype) for x in of_layer))

    whole = list(outputs())
    monkeypatch.setattr("adsa.slots.IN_LAST_CACHE", 1)
    for mine, expected in zip(outputs(), whole, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12 if name else 0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [None, *CODECS])
def test_attention_is_wide(name, dtype):
    """Scores, weights and sums are of float32 or wider: the result is rounded once."""
    cache = layer(CacheConfig("full", dtype=name), dtype=dtype)
    for q, k, v in zip(*(x.to(dtype).split(1, dim=2) for x in stream()), strict=True):
        out = cache.attend(q, k, v)
    assert out.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    keys, values, _ = cache.held(dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q.double(), keys.double(), values.double())
    error = (out.double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + 8 * torch.finfo(wide).eps).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("policy", POLICIES)
def test_memory_of_a_cache(policy, name):
    """That of the formula, from the first step to the last."""
    cfg = CacheConfig("full", dtype=name) if policy == "full" else config(policy, dtype=name)
    cache = layer(cfg, dtype=torch.float32)
    parts = {"int8": D + 2, "int4": D // 2 + 4}[name]
    expected = 2 * B * H * (1 + cache.slots.capacity) * parts
    assert sum(part.nbytes for part in cache.slots.kv_tensors().values()) == expected
    before = {key: tensor.shape for key, tensor in cache.slots.tensors().items()}
    run(cache, *stream(dtype=torch.float32))
    assert {key: tensor.shape for key, tensor in cache.slots.tensors().items()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 3])
def test_put_writes_where_each_row_and_head_says(dtype, heads):
    generator = torch.Generator().manual_seed(0)
    store = Storage(Plain(), (4, 3, 5, 2), dtype, "cpu")
    slot = torch.randint(5, (2, heads, 1), generator=generator)
    new = torch.randn(2, 3, 1, 2, generator=generator).to(dtype)
    expected = torch.zeros(4, 3, 5, 2, dtype=dtype)
    for row in range(2):
        for head in range(3):
            expected[1 + row, head, slot[row, head % heads, 0]] = new[row, head, 0]
    store.put(slot, new, slice(1, 3))
    assert store.parts[0].equal(expected)


def test_a_default_device_is_not_the_caches():
    q, k, v = stream(dtype=torch.float32)
    expected = run(layer(config("adsa"), dtype=torch.float32), q, k, v)
    with torch.device("meta"):
        assert torch.equal(run(layer(config("adsa"), dtype=torch.float32), q, k, v), expected)
