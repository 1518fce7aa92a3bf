"""Where image tokens lie, what is known of each, and whose slot is taken next (arXiv 2506.18226, section 4.2).

Which token leaves when token p comes depends on what was there before it, and so is known for all layers before the
first of them sees p. :class:`Slots` therefore holds the rows of all layers one under the other, and ranks them at once:
the selection costs a few operations a step, however many layers there are.
"""

import math

import torch
from torch import Tensor

from adsa.attention import AttentionRecord
from adsa.config import CacheConfig
from adsa.order import Order
from adsa.similarity import RunningSimilarity
from adsa.storage import CODECS, Plain, Storage

# Scores become fixed-point numbers with the arrival in the low bits: one integer order, ties included.
_FRACTION = 2.0**28
_LARGEST = 2.0**15 - 1
ARRIVAL_BITS = 18
_NEVER = 1 << 62  # more than any rank; added, since masked_fill is several times as slow on a CPU


def _ranks(score: Tensor, arrival: Tensor) -> Tensor:
    """int64 keys whose order is that of (score, arrival). ``[R, G, N]`` each."""
    wide = score.to(torch.promote_types(score.dtype, torch.float32)).clamp(-_LARGEST, _LARGEST)
    return torch.add(arrival, (wide * _FRACTION).round().long(), alpha=1 << ARRIVAL_BITS)


def fold_bias(n: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores of the slots that stand for n tokens of score 0 and one common value: exponentials that sum to n.

    One slot with ln(n) does; but in half precision ln(n) would be off by a percent, and there two slots share n.

    Args:
        n: ``[B]``, at least float32.
        dtype: of the result.

    Returns:
        ``[B, 1]`` or ``[B, 2]``.
    """
    if torch.finfo(dtype).bits >= 32:
        return n.log().unsqueeze(-1).to(dtype)
    most = (n.log() * (1 - torch.finfo(dtype).eps)).to(dtype)  # never above ln(n), however it is rounded
    rest = (n - most.to(n.dtype).exp()).log()
    return torch.stack([most, rest.to(dtype)], dim=-1)


class Slots:
    """The slots of one or more layers, R = layers * B rows; what policies see is ``[R, ...]``.

    Each row chooses for itself, and so do the two halves of guidance, which the paper leaves open.

    Args:
        config: what to keep.
        layers: how many; they take their tokens in step.
        batch: rows B of a layer, both halves of guidance included.
        n_kv_head: H.
        head_dim: D.
        condition_tokens: T, how many tokens come before the image. Never evicted. The paper leaves open whether they
            count within the budget and within the mean of Eq. 3; here they do neither.
        max_tokens: image tokens that will be decoded.
        dtype: of keys and values, unless ``config.dtype`` says otherwise.
        device: where.
        valid: bool ``[B, T]``, which condition tokens are no padding; None: all.
        columns: image tokens in a line; None: the image is square and has ``max_tokens``.
        order: in which the image tokens come in; None: in raster order. First and newest tokens, which always stay, are
            then the first and the newest to come.

    Attributes:
        condition_slots: those before the image's.
        bias: what is added to scores for padding and folding, ``[B, 1, 1, slots]``; None: nothing.
        count: image tokens that came in so far.
        filled: how many of them are here, in the first slots of the image.
        capacity: image tokens that there is room for: the budget, or ``max_tokens`` when nothing is ever evicted.
        stored_k, stored_v: :class:`Storage`, condition slots included.
        targets: where the tokens of this step go, one after the other: a slot for all, or int64 ``[R, G, 1]``; counted
            from the first image slot.
        similarity, attention: what the policy wants to know of each token, or None.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        batch: int,
        n_kv_head: int,
        head_dim: int,
        condition_tokens: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        layers: int = 1,
        valid: Tensor | None = None,
        columns: int | None = None,
        order: Order | None = None,
    ):
        if valid is not None and valid.shape != (batch, condition_tokens):
            raise ValueError(f"valid must be [{batch}, {condition_tokens}] (rows, condition), not {[*valid.shape]}")
        if max_tokens >= 1 << ARRIVAL_BITS:
            raise ValueError(
                f"max_tokens {max_tokens} is beyond the {1 << ARRIVAL_BITS} positions a cache can tell apart"
            )
        dtype = config.torch_dtype or dtype
        self.config, self.policy = config, config.rule
        self.layers, self.batch, self.dtype, self.device = layers, batch, dtype, torch.device(device)
        self.budget = config.slots(max_tokens)
        self.prefix, self.local = config.split
        self.selects = config.mode == "select" and self.budget < max_tokens
        self.evicts = config.mode == "evict" and self.budget < max_tokens
        self.capacity = self.budget if self.evicts else max_tokens
        self.max_tokens, self.columns, self.order = max_tokens, columns or math.isqrt(max_tokens), order
        self.count = self.filled = 0
        self.targets: list[int | Tensor] = []
        self.hidden: Tensor | None = None

        rows, joint = layers * batch, config.granularity == "layer"
        self.groups = 1 if joint else n_kv_head
        # What is added to scores takes the queries' dtype, but on the CPU, whose kernels take float32 as well.
        wide = torch.promote_types(dtype, torch.float32) if self.device.type == "cpu" else dtype
        self.condition_tokens, self.valid = condition_tokens, None if valid is None else valid.to(device, torch.bool)
        self.folds = config.fold_condition and condition_tokens > 1
        self.condition_slots = fold_bias(torch.ones(1), wide).shape[-1] if self.folds else condition_tokens
        size = self.condition_slots + self.capacity
        self.bias: Tensor | None = None
        if self.folds or valid is not None:
            self.bias = torch.zeros(batch, 1, 1, size, dtype=wide, device=device)
        shape = (rows, n_kv_head, size, head_dim)
        codec = CODECS.get(config.dtype, Plain())
        self.stored_k, self.stored_v = (Storage(codec, shape, dtype, device) for _ in "kv")
        self._places = None if order is None else torch.tensor(order.positions, dtype=torch.int32).to(device)
        self._arrivals = self._ranking = self.similarity = self.attention = None
        # One ranking names the victims of renew_every tokens, and of all that come at once.
        self._ranked = max(config.renew_every, 1 if order is None else order.width)
        self._taken = self._ranked
        if order is not None:
            self._check_order(order)
        if self.evicts or order is not None:
            arrivals = torch.arange(self.capacity, dtype=torch.int32, device=device)
            self._arrivals = arrivals.expand(rows, self.groups, -1).contiguous()
        if self.selects or (self.evicts and self._ranked > 1):
            named = self.budget - self.prefix - self.local if self.selects else self._ranked
            self._ranking = torch.zeros(rows, self.groups, named, dtype=torch.int64, device=device)
        if self.policy.similarity_of and (self.evicts or self.selects):
            self.similarity = RunningSimilarity(
                rows, n_kv_head, self.capacity, head_dim, joint=joint, dtype=dtype, device=device
            )
        if self.policy.attention_window is not None and (self.evicts or self.selects):
            self.attention = AttentionRecord(
                rows,
                self.groups,
                self.capacity,
                window=self.policy.attention_window,
                dtype=torch.promote_types(dtype, torch.float32),
                device=device,
            )

    def _check_order(self, order: Order) -> None:
        """Raises ValueError if tokens can't come in this order."""
        if self.selects:
            raise ValueError('a cache in mode "select" takes tokens in raster order only, as each query has its own')
        if not self.evicts:
            return
        held = max(map(len, order.awaited))  # those that hold a place for another stay as well
        spare = self.budget - self.prefix - (self.local - 1) - held
        if spare < self._ranked:
            raise ValueError(
                f"cache budget {self.budget} is too small for tokens that come {order.width} at a time: beside prefix "
                f"{self.prefix}, local {self.local} and {held} that hold another's place, {max(0, spare)} "
                f"may go, and one ranking needs {self._ranked}"
            )

    # What policies see: the image tokens now cached, N of them.

    @property
    def newest(self) -> int:
        """Position of the token that the choice is made for: the incoming one, or in mode "select" the last cached."""
        if self.order is not None:
            return self.order.positions[self.count]
        return self.count - 1 if self.selects else self.count

    @property
    def k(self) -> Tensor:
        """Keys, ``[R, H, N, D]``."""
        return self.stored_k.read(self.condition_slots, self.condition_slots + self.filled)

    @property
    def v(self) -> Tensor:
        """Values, ``[R, H, N, D]``."""
        return self.stored_v.read(self.condition_slots, self.condition_slots + self.filled)

    @property
    def arrivals(self) -> Tensor:
        """When the tokens came, counted from 0, int32 ``[R, G, N]``; G = H by head, 1 by layer."""
        if self._arrivals is None:  # nothing is ever evicted
            slots = torch.arange(self.filled, dtype=torch.int32, device=self.device)
            return slots.expand(self.layers * self.batch, self.groups, -1)
        return self._arrivals[:, :, : self.filled]

    @property
    def positions(self) -> Tensor:
        """Raster positions, int32 ``[R, G, N]``."""
        return self.arrivals if self._places is None else self._places[self.arrivals.long()]

    @property
    def age(self) -> Tensor:
        """How many tokens came since each, int32 ``[R, G, N]``."""
        return (self.count - 1 if self.selects else self.count) - self.arrivals

    def came(self) -> Tensor:
        """How many tokens of each line there have been before the incoming one, int64 ``[lines]``."""
        lines = -(-self.max_tokens // self.columns)
        if self.order is None:
            return (self.newest - self.columns * torch.arange(lines, device=self.device)).clamp(0, self.columns)
        lengths = [0] * lines
        for place in set(self.order.positions[: self.count]):
            lengths[place // self.columns] += 1
        return torch.tensor(lengths).to(self.device)

    # A step: tokens of all layers come in.

    def advance(self, tokens: int) -> None:
        """Find slots for so many tokens that come in at once, and take note of them as if they were there.

        Raises:
            ValueError: there is no room, and nothing may be evicted.
        """
        if self.evicts:  # else nobody asks before the layers have done so
            self.settle()
        coming = [self.count + index for index in range(tokens)]
        own = [None if self.order is None else self.order.replaces.get(arrival) for arrival in coming]
        evicted = max(0, self.filled + own.count(None) - self.capacity)
        if evicted and not self.evicts:
            raise ValueError(f"the cache was made for {self.capacity} image tokens, and this is one more")
        victims = self._victims(evicted) if evicted else None
        self.targets = []
        for arrival, held in zip(coming, own, strict=True):
            if held is not None:  # takes over from the token that held its place
                slot = (self.arrivals == held).long().argmax(-1, keepdim=True)
            elif self.filled < self.capacity:
                self.targets.append(self.filled)
                if self.order is not None:
                    self._arrivals[:, :, self.filled] = arrival
                self.filled += 1
                continue
            else:
                slot = victims[:, :, :1]
                victims = victims[:, :, 1:]
            self.targets.append(slot)
            if self.similarity is not None:
                self.similarity.remove(slot, self._featured.pick(slot + self.condition_slots))
            if self.attention is not None:
                self.attention.forget(slot)
            self._arrivals.scatter_(2, slot, arrival)
        self.count += tokens
        self.hidden = None if self.order is None else self._later(tokens)

    def settle(self) -> None:
        """Count the tokens of the last step among those to be similar to. To be called when all layers have them."""
        if self.similarity is None:
            return
        first = self.condition_slots
        for slot in self.targets:
            if isinstance(slot, int):
                new = self._featured.read(first + slot, first + slot + 1)
            else:
                new = self._featured.pick(first + slot)
            self.similarity.add(slot, new)
        self.targets = []

    @property
    def _featured(self) -> Storage:
        """What the policy compares."""
        return self.stored_k if self.policy.similarity_of == "k" else self.stored_v

    def _victims(self, tokens: int) -> Tensor:
        """Slots to free, ``[R, G, tokens]``: those of the least worthy previous tokens (section 4.2)."""
        if self._taken >= self.config.renew_every or self._taken + tokens > self._ranked:
            first = self.prefix  # the prefix never leaves the first slots
            arrivals = self.arrivals[..., first:]
            stays = arrivals > self.count - self.local
            for held in () if self.order is None else self.order.awaited[self.count]:
                stays = stays | (arrivals == held)
            ranks = _ranks(self.policy.score(self)[..., first:], arrivals).add(stays, alpha=_NEVER)
            self._taken = 0
            if self._ranking is None:
                self._taken = 1
                return ranks.argmin(-1, keepdim=True) + first
            self._ranking.copy_(ranks.topk(self._ranked, largest=False, sorted=True).indices + first)
        self._taken += tokens
        return self._ranking[:, :, self._taken - tokens : self._taken]

    def chosen(self) -> Tensor:
        """Mode "select": prefix, the most worthy previous tokens, and local (Eqs. 1-5), int64 ``[R, G, budget]``."""
        if self._taken >= self.config.renew_every:
            previous = slice(self.prefix, self.count - self.local)
            score, arrival = self.policy.score(self)[..., previous], self.arrivals[..., previous]
            ranks = _ranks(score, (1 << ARRIVAL_BITS) - 1 - arrival)
            self._ranking.copy_(ranks.topk(self._ranking.shape[-1]).indices + self.prefix)
            self._taken = 0
        self._taken += 1
        slots = torch.arange(self.count, device=self.device).expand(self.layers * self.batch, self.groups, -1)
        return torch.cat([slots[..., : self.prefix], self._ranking, slots[..., -self.local :]], dim=-1)

    def _later(self, tokens: int) -> Tensor | None:
        """-inf for what the newest tokens must not see: places behind their own. ``[R, G, tokens, C + N]`` or None."""
        places = self.order.positions[self.count - tokens : self.count]
        if self.order.furthest[self.count - 1] <= min(places):
            return None
        mine = self._places[self.count - tokens : self.count].unsqueeze(-1)
        later = self.positions.unsqueeze(2) > mine
        hidden = torch.zeros(*later.shape[:3], self.condition_slots + self.filled, dtype=self.dtype, device=self.device)
        hidden[..., self.condition_slots :].masked_fill_(later, -torch.inf)
        return hidden

    # As a thing that takes up memory.

    def tensors(self) -> dict[str, Tensor]:
        """Everything allocated, by name."""
        named = {"bias": self.bias, "places": self._places, "arrivals": self._arrivals, "ranking": self._ranking}
        for record in (self.similarity, self.attention):
            if record is not None:
                named |= record.tensors()
        named |= self.kv_tensors()
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def kv_tensors(self) -> dict[str, Tensor]:
        """Keys and values as they lie in memory, by name."""
        stores = (("k", self.stored_k), ("v", self.stored_v))
        return {f"{name}{i or ''}": part for name, store in stores for i, part in enumerate(store.parts)}

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first ``rows`` rows of each layer, and free their memory."""
        self.settle()

        def kept(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (self.layers, self.batch))[:, :rows].flatten(0, 1).clone()

        for record in (self.stored_k, self.stored_v, self.similarity, self.attention):
            if record is not None:
                record.keep(kept)
        for name in ("_arrivals", "_ranking"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, kept(tensor))
        self.bias = None if self.bias is None else self.bias[:rows].clone()
        self.batch = rows
