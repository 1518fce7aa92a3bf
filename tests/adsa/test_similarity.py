import pytest
import torch

from adsa.similarity import RunningSimilarity, mean_cosine_similarity

B, H, N, D = 2, 3, 10, 5


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
