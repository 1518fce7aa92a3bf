"""ZipAR: which token goes in when, and decoding by it, token for token against the literal decoder."""

import pytest
import torch

from adsa import CacheConfig
from adsa.policies import POLICIES
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.sampling import uniform_noise
from autoregressive.models.schedule import Schedule
from evaluations.perplexity import token_losses
from tests.autoregressive.models.test_cache_parity import GRID, LABELS, TOKENS, expected, tiny
from tests.reference import zipar


@pytest.mark.parametrize(
    ("columns", "lines", "window"), [(6, 6, 2), (6, 6, 1), (6, 4, 5), (24, 24, 8), (5, 2, 3), (7, 1, 3), (32, 32, 11)]
)
def test_passes_are_those_of_the_rule(columns, lines, window):
    schedule = Schedule(columns * lines, columns, window)
    made = [
        [(p, s, step.draws[step.rows.index(i)] if i in step.rows else None) for i, (p, s) in enumerate(pairs)]
        for step in schedule.passes
        for pairs in [list(zip(step.positions, step.sources, strict=True))]
    ]
    assert made == list(zipar(columns, lines, window))
    assert len(made) + 1 == columns + max(0, (lines - 2) * window + columns if lines > 1 else 0)


def test_eight_tokens_ahead_take_224_passes():
    assert len(Schedule(576, 24, 8).passes) + 1 == 224  # the condition's is the first


@pytest.mark.parametrize("window", [None, 6])
def test_a_whole_row_ahead_is_raster_order(window):
    schedule = Schedule(36, 6, window)
    assert schedule.order is None
    assert [(p.positions, p.sources, p.draws) for p in schedule.passes] == [((i,), (i,), (i + 1,)) for i in range(35)]


def settings(policy, granularity, renew_every=1, budget=20):
    prefix, local = {"window": (0, budget - 10), "streaming": (4, budget - 14)}.get(policy, (3, 5))
    choice = {"policy": policy, "budget": budget, "prefix": prefix, "local": local, "mode": "evict"}
    if policy == "full":
        return CacheConfig("full"), choice | {"prefix": 0, "local": 0, "renew_every": 1}
    choice |= {"renew_every": renew_every, "merge": POLICIES[policy].merges}
    return CacheConfig(granularity=granularity, **choice), choice


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("window", "granularity", "n_kv_head", "renew_every"),
    [(2, "head", 2, 1), (4, "layer", None, 1), (3, "head", None, 2)],
)
def test_equals_brute_force(policy, window, granularity, n_kv_head, renew_every):
    model, seeds = tiny(n_kv_head=n_kv_head), torch.tensor([5, 6, 7])
    cache, choice = settings(policy, granularity, renew_every)
    tokens = generate(model, torch.tensor(LABELS), TOKENS, cfg_scale=1.5, cache=cache, seeds=seeds, zipar_window=window)
    noise = uniform_noise(seeds, TOKENS)
    assert tokens.tolist() == expected(model, choice, granularity, 1.5, noise, window)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_greedy_and_other_windows_equal_brute_force(window, cfg_scale):
    model = tiny()
    cache, choice = settings("adsa", "head", budget=26)
    options = {"cfg_scale": cfg_scale, "sample_logits": False, "zipar_window": window}
    tokens = generate(model, torch.tensor(LABELS), TOKENS, cache=cache, **options)
    assert tokens.tolist() == expected(model, choice, "head", cfg_scale, None, window)


def test_integers_are_decoded_in_parts(monkeypatch):
    """A pass of several tokens, some hidden from others: one row of the batch at a time, or all at once."""
    options = {"cfg_scale": 1.5, "cache": CacheConfig("adsa", 20, dtype="int8"), "zipar_window": 2}
    options["seeds"] = torch.tensor([5, 6, 7])
    whole = generate(tiny(), torch.tensor(LABELS), TOKENS, **options)
    monkeypatch.setattr("adsa.slots.IN_LAST_CACHE", 1)
    assert generate(tiny(), torch.tensor(LABELS), TOKENS, **options).equal(whole)


def test_the_window_changes_the_image():
    model, seeds = tiny(), torch.arange(3)
    made = [
        generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds, zipar_window=window).tolist() for window in (6, 4, 2)
    ]
    assert (
        made[0] != made[1] != made[2] and made[0] == generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds).tolist()
    )


@pytest.mark.parametrize("policy", ["full", "adsa", "h2o"])
def test_images_go_on_from_their_own_tokens(policy):
    model, seeds = tiny(), torch.arange(3)
    cache, _ = settings(policy, "head")
    options = {"seeds": seeds, "cache": cache, "zipar_window": 2, "cfg_scale": 1.5}
    whole = generate(model, torch.tensor(LABELS), TOKENS, **options)
    for n in (1, 8, 25):
        assert torch.equal(generate(model, torch.tensor(LABELS), TOKENS, start=whole[:, :n], **options), whole)


@pytest.mark.parametrize("policy", ["full", "adsa", "tova"])
def test_memory_keeps_within_the_budget(policy):
    """The places that stand-ins hold are given to the tokens they stand for: no slot more than in raster order."""
    model = tiny()
    cache, _ = settings(policy, "head")
    kv = new_cache(model, 3, TOKENS, cache=cache, zipar_window=2)
    before = kv.nbytes()
    generate(model, torch.tensor(LABELS), TOKENS, kv=kv, zipar_window=2)
    layer = kv.layers[0]
    assert kv.nbytes() == before and layer.slots.filled == min(TOKENS - 1, kv.slots)
    for places in layer.positions.flatten(0, 1).tolist():
        assert len(set(places)) == layer.slots.filled
    came = [place in step.stand_ins for step in Schedule(TOKENS, GRID, 2).passes for place in step.positions]
    stand_ins = {arrival for arrival, stands_in in enumerate(came) if stands_in}
    assert len(stand_ins) == 4 and not stand_ins & set(layer.slots.arrivals.flatten().tolist())


def test_teacher_forcing_follows_the_schedule():
    model = tiny()
    tokens = torch.randint(24, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    raster = token_losses(model, tokens, torch.tensor([1, 2]))
    assert torch.equal(token_losses(model, tokens, torch.tensor([1, 2]), zipar_window=6), raster)
    ahead = token_losses(model, tokens, torch.tensor([1, 2]), zipar_window=2)
    assert torch.allclose(ahead[:, : 2 * GRID], raster[:, : 2 * GRID])  # two rows go in raster order
    assert not torch.isclose(ahead[:, 2 * GRID :], raster[:, 2 * GRID :]).any(1).all()


@pytest.mark.parametrize(
    ("tokens", "cache", "window", "message"),
    [
        (TOKENS, None, 7, "window must be 1 to 6"),
        (TOKENS, None, 0, "window must be 1 to 6"),
        (TOKENS - 1, None, 2, "whole rows, and 35 tokens"),
        (TOKENS, CacheConfig("adsa", 12, 3, 4, mode="select"), 2, "raster order only"),
        (TOKENS, CacheConfig("adsa", 10, 3, 7), 2, "budget 10 is too small for tokens that come 4 at a time"),
    ],
)
def test_what_cannot_be_is_told(tokens, cache, window, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), torch.tensor(LABELS), tokens, cache=cache, zipar_window=window)


@pytest.mark.parametrize(
    ("policy", "budget", "window", "most", "more"),
    [
        ("window", 20, 2, {"local": 12}, {"local": 13}),
        ("streaming", 20, 1, {"prefix": 2, "local": 6}, {"local": 7}),
        ("adsa_plus", 14, 2, {"renew_every": 8}, {"renew_every": 9}),
    ],
)
def test_what_nobody_gave_leaves_room_for_the_tokens_of_a_pass(policy, budget, window, most, more):
    model, seeds = tiny(), torch.arange(3)

    def tokens(**given):
        cache = CacheConfig(policy, budget, **given)
        return generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds, cache=cache, zipar_window=window).tolist()

    assert tokens() == tokens(**most)
    with pytest.raises(ValueError, match="is too small"):
        tokens(**more)


def test_a_cache_is_told_what_comes():
    model, order = tiny(), Schedule(TOKENS, GRID, 2).order
    kv = model.new_cache(CacheConfig("full"), 1, TOKENS, order=order)
    model(cond_idx=torch.tensor([1]), cache=kv)
    at = torch.tensor([0])
    with pytest.raises(ValueError, match="1 tokens come in, and 0 were announced"):
        model(idx=at[None], input_pos=at + 1, cache=kv)
    with pytest.raises(ValueError, match=r"made for Order.* 3 that hold another's place"):
        kv.expect((0, 1, 2), {0, 1, 2}, torch.arange(3))
    kv.expect((0,), (), at)
    model(idx=at[None], input_pos=at + 1, cache=kv)
    assert kv.layers[0].positions.tolist() == [[[0]] * 4]


def test_a_cache_of_another_schedule_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="zipar_window 2: make it by new_cache"):
        generate(model, torch.tensor(LABELS), TOKENS, kv=new_cache(model, 3, TOKENS), zipar_window=2)
