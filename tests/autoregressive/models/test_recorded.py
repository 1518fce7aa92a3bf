"""Steps that are recorded and played make the tokens of steps that run.

On tapes, which stand for CUDA graphs.
"""

import pytest
import torch

from adsa import CacheConfig
from adsa.policies import POLICIES
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.recorded import RecordedSteps
from tests.golden import fill_weights
from tests.tape import recorder

SIDE = 12
SHAPE = {"dim": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "block_size": SIDE**2, "vocab_size": 24}
TEXT = {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4}


@pytest.fixture(scope="module", params=["c2i", "t2i"])
def model(request):
    args = SHAPE | (TEXT if request.param == "t2i" else {"num_classes": 5})
    return fill_weights(Transformer(ModelArgs(**args)), 1).double().eval()


def conditions(model, seed):
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "c2i":
        return torch.randint(5, (2,), generator=generator), None
    masks = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]] if seed else [[0, 0, 0, 1], [0, 1, 1, 1]])
    return torch.randn(2, 4, 6, generator=generator, dtype=torch.float64), masks


CACHES = {
    **{name: CacheConfig(name, 70) for name in POLICIES if name != "full"},
    "dense": CacheConfig("full"),
    "by layer": CacheConfig("adsa", 70, granularity="layer"),
    "renewal": CacheConfig("adsa", 70, renew_every=5),
    "unfolded": CacheConfig("adsa", 70, fold_condition=False),
    "merge": CacheConfig("h2o", 70, merge=True),
    "int8": CacheConfig("adsa", 70, dtype="int8"),
    "few": CacheConfig("adsa_plus", 10),
}


@pytest.mark.parametrize("name", CACHES)
def test_played_steps_make_the_same_tokens(model, name):
    """Two batches, one after the other, with guidance; all but a few steps are played."""
    tapes, cache = [], CACHES[name]
    masks = conditions(model, 0)[1]
    kv = new_cache(model, 2, SIDE**2, masks, 2.0, cache, fixed=True)
    steps = RecordedSteps(model, kv, recorder(tapes))
    memory = [tensor.data_ptr() for tensor in kv.tensors()]
    for seed in (0, 1):
        cond, masks = conditions(model, seed)
        if seed:
            kv.reset(None if masks is None else masks.bool().repeat(2, 1))
        seeds = torch.tensor([seed, 7])
        found = generate(model, cond, SIDE**2, cfg_scale=2.0, seeds=seeds, steps=steps)
        expected = generate(model, cond, SIDE**2, masks, cfg_scale=2.0, seeds=seeds, cache=cache)
        assert found.equal(expected) and found.unique().numel() > 10
    assert [tensor.data_ptr() for tensor in kv.tensors()] == memory
    assert kv.layers[1].count == kv.layers[0].slots.clock == SIDE**2 - 1
    assert 0 < len(tapes) < 20


def test_a_cache_in_other_memory_is_not_played(model):
    """As many rows as before, but they lie elsewhere."""
    tapes = []
    steps = RecordedSteps(model, new_cache(model, 2, SIDE**2, conditions(model, 0)[1], fixed=True), recorder(tapes))
    cond, masks = conditions(model, 0)
    with torch.no_grad():
        model(cond_idx=cond, cache=steps.kv)
        token = torch.tensor([[3], [4]])
        for position in range(6):
            if position == 4:
                steps.kv.keep_rows(2)
            pos = torch.tensor([model.config.cls_token_num + position])
            logits = steps(idx=token, input_pos=pos, cache=steps.kv)[0]
    known = token.expand(-1, 6)
    masks = None if masks is None else masks.bool()
    kv = model.new_cache(CacheConfig("full"), 2, SIDE**2, masks)
    with torch.no_grad():
        model(cond_idx=cond, cache=kv)
        for position in range(6):
            pos = torch.tensor([model.config.cls_token_num + position])
            expected = model(idx=known[:, position : position + 1], input_pos=pos, cache=kv)[0]
    torch.testing.assert_close(logits, expected)


def test_guidance_may_end(model):
    tapes = []
    cond, masks = conditions(model, 0)
    cache, rest = CacheConfig("adsa", 70), {"cfg_scale": 2.0, "cfg_interval": 30, "seeds": torch.tensor([1, 2])}
    steps = RecordedSteps(model, new_cache(model, 2, 144, masks, 2.0, cache, fixed=True), recorder(tapes))
    assert generate(model, cond, 144, steps=steps, **rest).equal(generate(model, cond, 144, masks, cache=cache, **rest))


def test_refusals(model):
    kv = new_cache(model, 1, SIDE**2)
    with pytest.raises(ValueError, match="as CUDA graphs, and the model is on the device cpu"):
        RecordedSteps(model, kv)
    with pytest.raises(ValueError, match="of a fixed cache alone"):
        RecordedSteps(model, kv, recorder([]))
    for budget in (70, SIDE**2):
        with pytest.raises(ValueError, match='not for mode "select"'):
            new_cache(model, 1, SIDE**2, cache=CacheConfig("adsa", budget, mode="select"), fixed=True)
    with pytest.raises(ValueError, match="a fixed cache is for raster order"):
        new_cache(model, 1, SIDE**2, zipar_window=4, fixed=True)
    steps = RecordedSteps(model, new_cache(model, 1, SIDE**2, fixed=True), recorder([]))
    with pytest.raises(ValueError, match="give no kv beside them"):
        generate(model, conditions(model, 0)[0][:1], SIDE**2, kv=kv, steps=steps)
