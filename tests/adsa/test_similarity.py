import pytest
import torch

from adsa import KVCache
from adsa.similarity import RunningSimilarity, mean_cosine_similarity
from adsa.slots import Slots

from .test_cache import TOKENS, B, D, H, config, stream

N = 10


def test_definition():
    v = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    r = 0.5**0.5
    expected = torch.tensor([1 + r, 1 + r, 2 * r + 1, 0], dtype=torch.float64) / 4
    torch.testing.assert_close(mean_cosine_similarity(v), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_running_equals_definition(joint):
    """Through appends and replacements, zero vectors included."""
    generator = torch.Generator().manual_seed(0)
    running = RunningSimilarity(B, H, N, D, joint=joint, dtype=torch.float64, device="cpu")
    cache = torch.zeros(B, H, N, D, dtype=torch.float64)

    def check(count):
        v = cache[:, :, :count]
        features = v.transpose(1, 2).flatten(2).unsqueeze(1) if joint else v
        torch.testing.assert_close(running.score(v), mean_cosine_similarity(features), atol=4e-9, rtol=0)

    for slot in range(N):
        new = torch.randn(B, H, 1, D, generator=generator, dtype=torch.float64) * (slot != 3)
        cache[:, :, slot : slot + 1] = new
        running.add(slot, new)
        check(slot + 1)
    for step in range(50):
        new = torch.randn(B, H, 1, D, generator=generator, dtype=torch.float64) * (step % 7 != 0)
        slot = torch.randint(N, (B, 1 if joint else H, 1), generator=generator)
        index = slot.unsqueeze(-1).expand_as(new)
        running.remove(slot, cache.gather(2, index))
        running.add(slot, new)
        cache.scatter_(2, index, new)
        check(N)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_features_tie(dtype):
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(1, 1, 300, 64, generator=generator).to(dtype)
    v[:, :, [7, 131, 299]] = v[:, :, 50:51].clone()
    running = RunningSimilarity(1, 1, 300, 64, joint=False, dtype=dtype, device="cpu")
    for slot in range(300):
        running.add(slot, v[:, :, slot : slot + 1])
    score = running.score(v)[0, 0]
    assert len({score[i].item() for i in (7, 50, 131, 299)}) == 1
    assert score.unique().numel() > 200


@pytest.mark.parametrize(
    ("dtype", "integers"), [(torch.float64, None), (torch.float64, "int8"), (torch.bfloat16, None)]
)
@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize(("policy", "renew_every"), [("adsa", 1), ("adsa", 3), ("keydiff", 1), ("r_kv", 2)])
def test_scores_are_found_while_attention_reads(policy, renew_every, granularity, integers, dtype, monkeypatch):
    """As they are found later, layer by layer or for some layers alone, in parts or not, and with fewer rows midway."""
    cfg = config(policy, granularity, renew_every=renew_every, dtype=integers)
    streams = [stream(heads=2 * H, dtype=dtype, seed=seed) for seed in range(3)]
    shape = {"batch": B, "n_kv_head": H, "n_head": 2 * H, "head_dim": D, "condition_tokens": 1, "max_tokens": TOKENS}
    read = []

    def score(slots):
        before = slots._compared
        found = similarities(slots)
        read.append(before < slots.layers * slots.batch)
        return found

    def outputs(attend):
        """Which layers take tokens in and attend at once."""
        kv, rows, made = KVCache(cfg, n_layer=3, dtype=dtype, device="cpu", **shape), B, []
        read.clear()
        for t in range(1 + TOKENS):
            if t == 30:
                rows = B - 1
                kv.keep_rows(rows)
            for one, at_once, of_layer in zip(kv.layers, attend, streams, strict=True):
                q, k, v = (x[:rows, :, t : t + 1] for x in of_layer)
                made.append(one.attend(q, k, v) if at_once or not t else one.attend_to(q, *one.update(k, v)))
        return made

    similarities = Slots.similarities
    monkeypatch.setattr(Slots, "similarities", score)
    apart = outputs([False] * 3)
    assert all(read) and len(read) > 5
    for part in (1, 2**20):
        monkeypatch.setattr("adsa.slots.IN_LAST_CACHE", part)
        for attend in ([True] * 3, [True, False, True], [False, True, True], [True, True, False]):
            for mine, expected in zip(outputs(attend), apart, strict=True):
                torch.testing.assert_close(mine, expected, atol=1e-9 if dtype == torch.float64 else 0.03, rtol=0)
            if all(attend):
                assert sum(read) == (renew_every == 1), "for the step before which a row has left, where it ranks"
            else:
                assert all(read)
