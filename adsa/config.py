"""The `cache:` section of a configuration."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from adsa.order import Order
from adsa.policies import POLICIES, Policy
from adsa.storage import CODECS

# What the cache's numbers are read as; None: the model's.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
DTYPES |= dict.fromkeys(CODECS)


@dataclass(frozen=True)
class CacheConfig:
    """Which image tokens a KV cache keeps. A budget of n + K + m slots (arXiv 2506.18226, Eqs. 1-5).

    Attributes:
        policy: one of :data:`adsa.policies.POLICIES`; "full" is the dense cache.
        budget: slots for image tokens, per layer and row. Condition tokens are held apart and don't count.
        prefix: n, how many of the first image tokens always stay. None: the policy's default for the budget.
        local: m, how many of the most recent always stay, the newest included. None: likewise.
        granularity: "head" if each attention head chooses for itself, "layer" if the heads of a layer choose together,
            by their V side by side. The paper leaves it open. By "layer", what adsa costs is less by a quarter at 256
            of 576 tokens (results/sweeps), and what adsa_plus costs at 96 is twice as much (results/headtohead/parts).
        mode: "evict" (what leaves is gone, memory is bounded by the budget; the paper's tables) or "select" (the whole
            history stays in memory, and the choice is made anew: a token left out can come back. Each step copies the
            chosen keys and values together. With adsa, results are worse: results/sweeps).
        renew_every: how many steps one ranking serves; 1 is the paper, and 8 are as good (results/sweeps). None: the
            policy's default, where the budget allows.
        merge: merge what leaves into the nearest key of those that stay, other than the last line's: the mean of both,
            weighted by the tokens that they stand for, whose number is added to scores by its logarithm. Mode "evict"
            alone. None: the policy's default.
        dtype: of the cache: "fp32", "fp16", "bf16" or "fp64"; "int8" or "int4" for integers with scales
            (:mod:`adsa.storage`), which are read as the model's dtype, or on a CPU's way to attention as float32; None:
            the model's.
        fold_condition: hold text tokens, whose keys are zero in LlamaGen, as one slot that is exactly their sum. Only
            valid for models with such keys.

    Raises:
        ValueError: for impossible values, with the numbers in the message.
    """

    policy: str = "adsa"
    budget: int | None = None
    prefix: int | None = None
    local: int | None = None
    granularity: str = "head"
    mode: str = "evict"
    renew_every: int | None = None
    merge: bool | None = None
    dtype: str | None = None
    fold_condition: bool = True

    def __post_init__(self):
        for name, choices in (("policy", POLICIES), ("granularity", ("head", "layer")), ("mode", ("evict", "select"))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"cache {name} must be one of {', '.join(choices)}, not {value!r}{_near(value, choices)}"
                )
        if self.dtype is not None and not (isinstance(self.dtype, str) and self.dtype in DTYPES):
            raise ValueError(
                f"cache dtype must be one of {', '.join(DTYPES)} or None, not {self.dtype!r}{_near(self.dtype, DTYPES)}"
            )
        for name, low in (("budget", 1), ("prefix", 0), ("local", 1), ("renew_every", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"cache {name} must be a whole number of tokens, not {value!r}")
            if value < low:
                raise ValueError(f"cache {name} must be at least {low}, not {value}")
        for name in ("fold_condition", "merge"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name == "fold_condition"):
                raise ValueError(f"cache {name} must be true or false, not {value!r}")
        if self.merge and self.mode == "select":
            raise ValueError('cache merge is for mode "evict": in mode "select" nothing leaves')
        if self.policy == "full":
            given = [name for name in ("budget", "prefix", "local", "merge") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"cache policy 'full' keeps every token and takes no {', '.join(given)}")
            return
        if self.budget is None:
            raise ValueError(f"cache policy {self.policy!r} needs a budget: how many image tokens it may keep")
        prefix, local = self.split
        if prefix + local > self.budget:
            raise ValueError(
                f"cache budget {self.budget} is too small: prefix {prefix} and local {local} take {prefix + local}"
            )
        spare = min(self.budget - prefix - local + 1, max(1, self.budget - self.merges))
        if self.mode == "evict" and self.renewal > spare:
            raise ValueError(
                f"cache renew_every {self.renew_every} is too large: with budget {self.budget}, prefix {prefix} and "
                f"local {local}, one ranking has only {spare} tokens that may go"
            )

    @classmethod
    def from_dict(cls, values: Mapping) -> "CacheConfig":
        """From a YAML section; an unknown key is a ValueError that suggests the nearest name."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"unknown cache key {key!r}{_near(key, names)}; known: {', '.join(names)}")
        return cls(**values)

    @property
    def rule(self) -> Policy:
        return POLICIES[self.policy]

    @property
    def split(self) -> tuple[int, int]:
        """(prefix, local): those given, or the policy's own for this budget."""
        if self.budget is None:
            return 0, 0
        prefix, local = self.rule.split(self.budget)
        if self.prefix is not None:
            prefix = self.prefix
            local = min(local, self.budget - prefix)
        if self.local is not None:
            local = self.local
            prefix = min(prefix, max(0, self.budget - local)) if self.prefix is None else prefix
        elif self.mode == "evict":  # a ranking that serves many steps needs that many tokens to choose from
            local = min(local, self.budget - prefix - (self.renew_every or 1) + 1)
        return prefix, max(local, 1)

    @property
    def renewal(self) -> int:
        """How many steps one ranking serves: as given, or the policy's own where there are tokens enough."""
        if self.renew_every is not None or self.budget is None:
            return self.renew_every or 1
        prefix, local = self.split
        return max(1, min(self.rule.renewal, self.budget - prefix - local + 1, self.budget - self.merges))

    def spare(self, order: Order) -> int:
        """How many tokens one ranking can let go if they come in such an order."""
        prefix, local = self.split
        # The first ranking may come when there is room for all but one of the tokens that come in. Those that hold
        # another's place stay as well.
        here = self.budget - (order.width - 1) - order.held
        return min(here - prefix - (local - 1), here - self.merges)

    def fitted(self, order: Order) -> "CacheConfig":
        """The same with the numbers that it comes to where tokens come in such an order.

        What was left to the policy gives way to the tokens of a pass: first ``local``, then ``renew_every``.
        """
        if self.budget is None or self.mode == "select":
            return self
        prefix, local = self.split
        if self.local is None:
            here = self.budget - (order.width - 1) - order.held
            local = max(1, min(local, here - prefix - max(self.renew_every or 1, order.width) + 1))
        made = replace(self, prefix=prefix, local=local)
        return replace(made, renew_every=self.renew_every or max(1, min(made.renewal, made.spare(order))))

    @property
    def merges(self) -> bool:
        """Whether what leaves is merged into what stays."""
        return self.mode == "evict" and (self.rule.merges if self.merge is None else self.merge)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """What keys and values are held as; None: the model's, or integers that are read as such."""
        return DTYPES.get(self.dtype)

    def slots(self, max_tokens: int) -> int:
        """How many image tokens one decode of ``max_tokens`` attends to at most."""
        return max_tokens if self.budget is None else min(self.budget, max_tokens)


def _near(value, choices) -> str:
    match = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
