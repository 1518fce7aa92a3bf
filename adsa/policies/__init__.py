"""Eviction policies, by the name that configs use."""

from adsa.policies.adsa import Adsa, AdsaInverse
from adsa.policies.adsa_plus import AdsaPlus
from adsa.policies.attention import H2O, Lines, SnapKV, Tova
from adsa.policies.base import Policy
from adsa.policies.keys import RKV, KeyDiff, KNorm
from adsa.policies.places import Neighborhood, Random, Uniform
from adsa.policies.recency import Full, Streaming, Window

_ALL = (
    Full(),
    Adsa(),
    AdsaInverse(),
    AdsaPlus(),
    Window(),
    Streaming(),
    Random(),
    Uniform(),
    Neighborhood(),
    H2O(),
    Tova(),
    SnapKV(),
    Lines(),
    KeyDiff(),
    KNorm(),
    RKV(),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in _ALL}

__all__ = ["POLICIES", "Policy"]
