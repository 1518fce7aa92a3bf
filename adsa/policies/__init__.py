"""Eviction policies, by the name that configs use."""

from adsa.policies.adsa import Adsa
from adsa.policies.base import Policy
from adsa.policies.recency import Full, Streaming, Window

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Full(), Adsa(), Window(), Streaming())}

__all__ = ["POLICIES", "Policy"]
