import pytest

from adsa import CacheConfig
from adsa.config import DTYPES
from adsa.names import CACHE_DTYPES, POLICY_NAMES
from adsa.policies import POLICIES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "asda", "budget": 8}, "did you mean 'adsa'"),
        ({"policy": "adsa"}, "needs a budget"),
        ({"policy": "full", "budget": 8}, "takes no budget"),
        ({"budget": 0}, "at least 1, not 0"),
        ({"budget": 16.0}, "whole number"),
        ({"budget": 16, "prefix": -1}, "prefix must be at least 0, not -1"),
        ({"budget": 16, "local": 0}, "local must be at least 1, not 0"),
        ({"budget": 16, "prefix": 10, "local": 7}, "budget 16 is too small: prefix 10 and local 7 take 17"),
        ({"budget": 16, "local": 20}, "budget 16 is too small: prefix 0 and local 20 take 20"),
        ({"budget": 16, "prefix": 6, "local": 6, "renew_every": 6}, "has only 5 tokens that may go"),
        ({"budget": 16, "renew_every": 0}, "renew_every must be at least 1, not 0"),
        ({"budget": 16, "granularity": "heads"}, "did you mean 'head'"),
        ({"budget": 16, "mode": "drop"}, "one of evict, select"),
        ({"budget": 16, "dtype": "int6"}, "dtype must be one of .*, not 'int6' .did you mean 'int8'"),
        ({"budget": 16, "dtype": [1]}, "dtype must be one of"),
        ({"budget": 16, "fold_condition": 1}, "true or false"),
        ({"budget": 16, "merge": 1}, "merge must be true or false"),
        ({"budget": 16, "merge": True, "mode": "select"}, 'merge is for mode "evict"'),
        ({"policy": "full", "merge": True}, "takes no merge"),
        ({"budget": 4, "prefix": 0, "local": 1, "merge": True, "renew_every": 4}, "has only 3 tokens that may go"),
        ({"bugdet": 16}, "unknown cache key 'bugdet' .did you mean 'budget'"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig.from_dict(values)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"full"}))
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 256])
def test_default_splits_are_possible(policy, budget):
    prefix, local = CacheConfig(policy, budget).split
    assert prefix >= 0 and local >= 1 and prefix + local <= budget


def test_splits():
    assert CacheConfig("adsa", 256).split == (32, 128)
    assert CacheConfig("adsa", 256, prefix=200).split == (200, 56)
    assert CacheConfig("adsa", 256, local=240).split == (16, 240)
    assert CacheConfig("streaming", 256).split == (32, 224)
    assert CacheConfig("window", 256).split == (0, 256)
    assert CacheConfig("window", 256, renew_every=8).split == (0, 249)  # evicting by age, 8 at a time
    assert CacheConfig("adsa_plus", 96).split == (12, 1)
    assert CacheConfig("full").slots(576) == 576
    assert CacheConfig("adsa", 256).slots(576) == 256
    assert CacheConfig("adsa", 256).slots(100) == 100


def test_renewal():
    assert [CacheConfig("adsa", 96).renewal, CacheConfig("adsa", 96, renew_every=5).renewal] == [1, 5]
    assert [CacheConfig("adsa_plus", budget).renewal for budget in (96, 12, 5, 1)] == [12, 11, 4, 1]
    assert CacheConfig("adsa_plus", 96, prefix=60, local=30).renewal == 7  # only seven tokens may go
    assert CacheConfig("full").renewal == 1


def test_merging():
    assert CacheConfig("adsa_plus", 96).merges and CacheConfig("adsa", 96, merge=True).merges
    for cache in (CacheConfig("adsa", 96), CacheConfig("adsa_plus", 96, merge=False), CacheConfig("full")):
        assert not cache.merges
    assert not CacheConfig("adsa_plus", 96, mode="select").merges


def test_names_that_are_told_without_torch():
    assert (*POLICIES,) == POLICY_NAMES
    assert (*DTYPES,) == CACHE_DTYPES
