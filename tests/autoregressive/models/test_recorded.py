"""Steps that are recorded and played make the tokens of steps that run.

On tapes, which stand for CUDA graphs; and where there is a GPU, on these as well.
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


DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(scope="module", params=[f"{kind} {device}" for device in DEVICES for kind in ("c2i", "t2i")])
def model(request):
    kind, device = request.param.split()
    args = SHAPE | (TEXT if kind == "t2i" else {"num_classes": 5})
    return fill_weights(Transformer(ModelArgs(**args)), 1).double().eval().to(device)


def device_of(model):
    return model.output.weight.device


def conditions(model, seed):
    generator, device = torch.Generator().manual_seed(seed), device_of(model)
    if model.config.model_type == "c2i":
        return torch.randint(5, (2,), generator=generator).to(device), None
    masks = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]] if seed else [[0, 0, 0, 1], [0, 1, 1, 1]])
    return torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).to(device), masks.to(device)


def recorded(model, kv, tapes):
    return RecordedSteps(model, kv, recorder(tapes) if device_of(model).type == "cpu" else None)


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
    steps = recorded(model, kv, tapes)
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
    assert device_of(model).type == "cuda" or 0 < len(tapes) < 20


def test_a_cache_in_other_memory_is_not_played(model):
    """As many rows as before, but they lie elsewhere."""
    cond, masks = conditions(model, 0)
    token = torch.tensor([[3], [4]], device=cond.device)
    fixed, plain = (new_cache(model, 2, SIDE**2, masks, fixed=fixed) for fixed in (True, False))
    steps = recorded(model, fixed, [])
    with torch.no_grad():
        for kv, step in ((fixed, steps), (plain, model)):
            model(cond_idx=cond, cache=kv)
            for position in range(model.config.cls_token_num, model.config.cls_token_num + 6):
                if position == model.config.cls_token_num + 4:
                    kv.keep_rows(2)
                found = step(idx=token, input_pos=torch.tensor([position], device=cond.device), cache=kv)[0].clone()
                if kv is fixed:
                    played = found
    torch.testing.assert_close(played, found)


def test_guidance_may_end(model):
    cond, masks = conditions(model, 0)
    cache, rest = CacheConfig("adsa", 70), {"cfg_scale": 2.0, "cfg_interval": 30, "seeds": torch.tensor([1, 2])}
    steps = recorded(model, new_cache(model, 2, 144, masks, 2.0, cache, fixed=True), [])
    assert generate(model, cond, 144, steps=steps, **rest).equal(generate(model, cond, 144, masks, cache=cache, **rest))


def test_refusals():
    model = Transformer(ModelArgs(**SHAPE, num_classes=5)).eval()
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
        generate(model, torch.tensor([0]), SIDE**2, kv=kv, steps=steps)
