"""KV caches that keep within a budget (arXiv 2506.18226, section 4.2).

A :class:`LayerCache` owns the keys and values of one layer, and its attention. Its slots are

    [ condition tokens | image tokens, in no particular order ]

with the position of every image token beside them. Until the image slots are full it is a dense cache; from then on
each new token takes the slot of a victim that the policy names, so that memory never grows and no slot is ever empty.

Nothing here waits for the device: victims are tensors, and the host only counts steps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adsa.attention import AttentionRecord
from adsa.config import CacheConfig
from adsa.order import Order
from adsa.similarity import RunningSimilarity
from adsa.storage import CODECS, Plain, Storage

# Scores become fixed-point numbers with the position in the low bits: one integer order, ties included.
_FRACTION = 2.0**28
_LARGEST = 2.0**15 - 1
_POSITION_BITS = 18
MOST_TOKENS = (1 << _POSITION_BITS) - 1  # image tokens that a cache can tell apart
_NEVER = 1 << 62  # more than any rank; added, since masked_fill is several times as slow on a CPU


def _ranks(score: Tensor, position: Tensor) -> Tensor:
    """int64 keys whose order is that of (score, position). ``[B, G, N]`` each."""
    wide = score.to(torch.promote_types(score.dtype, torch.float32)).clamp(-_LARGEST, _LARGEST)
    return torch.add(position, (wide * _FRACTION).round().long(), alpha=1 << _POSITION_BITS)


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


class LayerCache:
    """Keys and values of one layer.

    Each of the ``batch`` rows chooses for itself, and so do the two halves of guidance, which the paper leaves open.

    Args:
        config: what to keep.
        batch: rows B, both halves of guidance included.
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
        condition_came: condition tokens that came in so far.
        count: image tokens that came in so far.
        filled: how many of them are here.
        capacity: image tokens that there is room for: the budget, or ``max_tokens`` when nothing is ever evicted.
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
        valid: Tensor | None = None,
        columns: int | None = None,
        order: Order | None = None,
    ):
        if valid is not None and valid.shape != (batch, condition_tokens):
            raise ValueError(f"valid must be [{batch}, {condition_tokens}] (rows, condition), not {[*valid.shape]}")
        if max_tokens > MOST_TOKENS:
            raise ValueError(f"max_tokens {max_tokens} is beyond the {MOST_TOKENS} tokens a cache can tell apart")
        dtype = config.torch_dtype or dtype
        self.config = config
        self.policy = config.rule
        self.budget = config.slots(max_tokens)
        self.prefix, self.local = config.split
        self.selects = config.mode == "select" and self.budget < max_tokens
        self.evicts = config.mode == "evict" and self.budget < max_tokens
        self.capacity = self.budget if self.evicts else max_tokens
        self.count = self.filled = self._evicted = 0
        self._first_of_step = 0  # the arrival that the tokens now coming in begin with
        self.max_tokens, self.columns = max_tokens, columns or math.isqrt(max_tokens)

        # What is added to scores takes the queries' dtype, but on the CPU, whose kernels take float32 as well.
        wide = torch.promote_types(dtype, torch.float32) if torch.device(device).type == "cpu" else dtype
        self.condition_tokens, self.condition_came = condition_tokens, 0
        self.folds = config.fold_condition and condition_tokens > 1
        self.condition_slots = fold_bias(torch.ones(1), wide).shape[-1] if self.folds else condition_tokens
        size = self.condition_slots + self.capacity
        codec = CODECS.get(config.dtype, Plain())
        self._k, self._v = (Storage(codec, (batch, n_kv_head, size, head_dim), dtype, device) for _ in "kv")
        self.dtype, self.device, self.batch = dtype, torch.device(device), batch
        # Added to attention scores: what padding and folding need. None where every score counts as it is.
        self._bias = None
        if self.folds or valid is not None:
            self._bias = torch.zeros(batch, 1, 1, size, dtype=wide, device=device)
        self._valid = None if valid is None else valid.to(device=device, dtype=torch.bool)

        joint = config.granularity == "layer"
        self.groups = 1 if joint else n_kv_head
        self._arrivals = self._ranking = self.similarity = self.attention = None
        self._seen = None  # mode "select": the slots that the newest query sees, until its weights are on record
        self.order, self._places = order, None
        if order is not None:
            self._check_order(order)
            self._places = torch.tensor(order.positions, dtype=torch.int32).to(device)
        if self.evicts or order is not None:
            arrivals = torch.arange(self.capacity, dtype=torch.int32, device=device)
            self._arrivals = arrivals.expand(batch, self.groups, -1).contiguous()
        ranked = config.renew_every if self.evicts else self.budget - self.prefix - self.local
        if self.selects or (self.evicts and ranked > 1):
            self._ranking = torch.zeros(batch, self.groups, ranked, dtype=torch.int64, device=device)
        if self.policy.similarity_of and (self.evicts or self.selects):
            self.similarity = RunningSimilarity(
                batch, n_kv_head, self.capacity, head_dim, joint=joint, dtype=dtype, device=device
            )
        if self.policy.attention_window is not None and (self.evicts or self.selects):
            self.attention = AttentionRecord(
                batch,
                self.groups,
                self.capacity,
                window=self.policy.attention_window,
                dtype=torch.promote_types(dtype, torch.float32),
                device=device,
            )

    def _check_order(self, order: Order) -> None:
        """Raises ValueError if this cache can't take tokens in this order."""
        if self.selects:
            raise ValueError('a cache in mode "select" takes tokens in raster order only, as each query has its own')
        if not self.evicts:
            return
        # Tokens that come in together, and those that hold a place for another, stay as well.
        held = max(map(len, order.awaited))
        taken = self.prefix + max(self.local, order.width) - 1 + held
        if self.budget - taken < self.config.renew_every:
            raise ValueError(
                f"cache budget {self.budget} is too small for tokens that come {order.width} at a time: prefix "
                f"{self.prefix}, the newest {max(self.local, order.width)} and {held} that hold another's place always "
                f"stay, and one ranking needs {self.config.renew_every} that may go"
            )

    # What policies see: the image tokens now cached, N of them.

    @property
    def used(self) -> bool:
        return self.count > 0 or self.condition_came > 0

    @property
    def newest(self) -> int:
        """Position of the token that the choice is made for: the incoming one, or in mode "select" the last cached."""
        if self.order is not None:
            return self.order.positions[self.count]
        return self.count - 1 if self.selects else self.count

    @property
    def k(self) -> Tensor:
        """Keys of the cached image tokens, ``[B, H, N, D]``."""
        return self._k.read(self.condition_slots, self.condition_slots + self.filled)

    @property
    def v(self) -> Tensor:
        """Values of the cached image tokens, ``[B, H, N, D]``."""
        return self._v.read(self.condition_slots, self.condition_slots + self.filled)

    @property
    def arrivals(self) -> Tensor:
        """When the cached image tokens came, counted from 0, int32 ``[B, G, N]``; G = H by head, 1 by layer."""
        if self._arrivals is None:  # nothing is ever evicted
            slots = torch.arange(self.filled, dtype=torch.int32, device=self.device)
            return slots.expand(self.batch, self.groups, -1)
        return self._arrivals[:, :, : self.filled]

    @property
    def positions(self) -> Tensor:
        """Raster positions of the cached image tokens, int32 ``[B, G, N]``."""
        return self.arrivals if self._places is None else self._places[self.arrivals.long()]

    @property
    def age(self) -> Tensor:
        """How many tokens came since each of the cached ones, int32 ``[B, G, N]``; 0 for the newest."""
        return (self.count - 1 if self.selects else self.count) - self.arrivals

    def came(self) -> Tensor:
        """How many tokens of each line there have been before the incoming one, int64 ``[lines]``."""
        lines = -(-self.max_tokens // self.columns)
        if self.order is None:
            return (self.newest - self.columns * torch.arange(lines, device=self.device)).clamp(0, self.columns)
        places = sorted(set(self.order.positions[: self.count]))
        lengths = [0] * lines
        for place in places:
            lengths[place // self.columns] += 1
        return torch.tensor(lengths).to(self.device)

    # The two things a cache does: take tokens in, and attend.

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Insert, evict, attend.

        The first call takes all condition tokens, which attend to each other causally; later ones image tokens, as
        :meth:`update` does. Tokens that come in together see each other and all that is here, up to their own place.

        Args:
            q: ``[B, Hq, S, D]``, rotated; Hq is a multiple of H.
            k, v: ``[B, H, S, D]``, the keys rotated.

        Returns:
            ``[B, Hq, S, D]``, in the dtype of ``q``.
        """
        if not self._has_condition:
            if k.shape[2] != self.condition_tokens:
                raise ValueError(
                    f"attend takes all {self.condition_tokens} condition tokens at once, and these are {k.shape[2]}"
                )
            mask = self._condition_mask(q)
            self.insert_condition(k, v)
            return _attention(q, k, v, mask)
        keys, values, bias = self.update(k, v)
        attend = _attention if self.attention is None else self._watched_attention
        return attend(q.to(keys.dtype), keys, values, bias).to(q.dtype)

    @property
    def _has_condition(self) -> bool:
        return self.condition_came == self.condition_tokens

    def insert_condition(self, k: Tensor, v: Tensor) -> None:
        """Store condition tokens, folded into one slot if the config says so. ``k``, ``v``: ``[B, H, T, D]``.

        Folding: keys of zero give each of the n valid tokens the score 0, so together they are exactly one token
        with the score ln(n) and the mean of their values.

        They may come in parts, unless they are folded or some are padding.

        Raises:
            ValueError: for more tokens than the cache was made for, or parts of what must come at once.
        """
        first, self_contained = self.condition_came, not self.folds and self._valid is None
        left = self.condition_tokens - first
        if k.shape[2] > left or (k.shape[2] < left and not self_contained):
            raise ValueError(
                f"the cache takes {left} {'more ' if first else ''}condition tokens"
                f"{'' if self_contained else ', at once'}; these are {k.shape[2]}, after {self.count} image tokens"
            )
        self.condition_came += k.shape[2]
        valid, self._valid = self._valid, None
        if self.folds:
            wide = torch.promote_types(v.dtype, torch.float32)
            weight = torch.ones(v.shape[0], v.shape[2], device=v.device) if valid is None else valid
            weight = weight.to(wide)
            n = weight.sum(1)
            mean = (v * weight[:, None, :, None]).sum(2, keepdim=True) / n.clamp(min=1).view(-1, 1, 1, 1)
            self._v.write(0, mean.expand(-1, -1, self.condition_slots, -1))
            self._bias[..., : self.condition_slots] = fold_bias(n, self._bias.dtype)[:, None, None]
            return
        self._k.write(first, k)
        self._v.write(first, v)
        if valid is not None:
            self._bias[..., : self.condition_tokens].masked_fill_(~valid[:, None, None, :], -torch.inf)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in image tokens, one after the other, each evicting another if there is no room.

        Args:
            k, v: ``[B, H, S, D]``; S is 1 in raster order, and up to ``order.width`` in another.

        Returns:
            Keys and values to attend to, ``[B, H, C + N, D]`` with the condition first, and a bias
            ``[B, 1 or H, 1 or S, C + N]`` to add to the scores, or None.

        Raises:
            ValueError: for too many tokens at once, before the condition, or beyond ``max_tokens``.
        """
        most = 1 if self.order is None else self.order.width
        if not self._has_condition or not 1 <= k.shape[2] <= most:
            raise ValueError(
                f"update takes {'one image token' if most == 1 else f'up to {most} image tokens'} at a time, after the "
                f"condition's {self.condition_tokens}; these are {k.shape[2]}, "
                f"{'after' if self._has_condition else 'before'} it"
            )
        self._first_of_step = self.count
        for one_k, one_v in zip(k.split(1, dim=2), v.split(1, dim=2), strict=True):
            self._enter(one_k, one_v)
        if self.selects and self.count > self.budget:
            return self._selection()
        return *self.read(), self._step_bias()

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is here, condition first: ``[B, H, C + N, D]``, views where that is possible."""
        end = self.condition_slots + self.filled if self._has_condition else self.condition_came
        return self._k.read(0, end), self._v.read(0, end)

    def insert(self, k: Tensor, v: Tensor) -> None:
        """Take in image tokens that are known beforehand, as :meth:`update` one after the other would.

        Args:
            k, v: ``[B, H, S, D]``, any number of tokens, in raster order.

        Raises:
            ValueError: before the condition, in another order, in mode "select", or beyond ``max_tokens``.
        """
        if not self._has_condition or self.order is not None or self.selects:
            raise ValueError(
                "image tokens are inserted after the condition, in raster order, and where none is left out for a time"
            )
        for one_k, one_v in zip(k.split(1, dim=2), v.split(1, dim=2), strict=True):
            self._first_of_step = self.count
            self._enter(one_k, one_v)

    def _enter(self, k: Tensor, v: Tensor) -> None:
        """One image token. ``[B, H, 1, D]``."""
        own = None if self.order is None else self.order.replaces.get(self.count)
        if own is not None:
            self._replace((self.arrivals == own).long().argmax(-1, keepdim=True), k, v)
        elif self.filled < self.capacity:
            self._append(k, v)
        elif self.evicts:
            self._replace(self._victim(), k, v)
        else:
            raise ValueError(f"the cache was made for {self.capacity} image tokens, and this is one more")
        self.count += 1

    def _step_bias(self) -> Tensor | None:
        """What is added to the scores of the tokens that came in last, ``[B, 1 or H, 1 or S, C + N]``, or None."""
        end = self.condition_slots + self.filled
        bias = None if self._bias is None else self._bias[..., :end]
        if self.order is None:
            return bias
        places = self.order.positions[self._first_of_step : self.count]
        if self.order.furthest[self.count - 1] <= min(places):
            return bias
        mine = self._places[self._first_of_step : self.count].unsqueeze(-1)
        later = self.positions.unsqueeze(2) > mine  # [B, G, S, N]: of the rows above, queries see nothing below them
        dtype = self.dtype if bias is None else bias.dtype
        hidden = torch.zeros(*later.shape[:3], end, dtype=dtype, device=later.device)
        hidden[..., self.condition_slots :].masked_fill_(later, -torch.inf)
        return hidden if bias is None else hidden + bias

    def _append(self, k: Tensor, v: Tensor) -> None:
        self._k.write(self.condition_slots + self.filled, k)
        self._v.write(self.condition_slots + self.filled, v)
        if self.order is not None:
            self._arrivals[:, :, self.filled] = self.count
        if self.similarity is not None:
            store, new = self._featured(k, v)
            self.similarity.append(self.filled, store.rounded(new))
        self.filled += 1

    def _replace(self, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Write a token over another. ``slot``: int64 ``[B, G, 1]``, counted from the first image slot."""
        self._arrivals.scatter_(2, slot, self.count)
        index = slot + self.condition_slots
        if self.similarity is not None:
            store, new = self._featured(k, v)
            self.similarity.replace(slot, store.pick(index), store.rounded(new))
        if self.attention is not None:
            self.attention.replace(slot)
        self._k.put(index, k)
        self._v.put(index, v)

    def _featured(self, k: Tensor, v: Tensor) -> tuple[Storage, Tensor]:
        """What the policy compares: where it is stored, and the new token's."""
        return (self._k, k) if self.policy.similarity_of == "k" else (self._v, v)

    def _victim(self) -> Tensor:
        """The slot to free, ``[B, G, 1]``: the least worthy of the previous tokens (section 4.2).

        One ranking names the victims of ``renew_every`` steps.
        """
        step = self._evicted % self.config.renew_every
        self._evicted += 1
        if step == 0:
            first = self.prefix  # the prefix never leaves the first slots
            arrivals = self.arrivals[..., first:]
            ranks = _ranks(self.policy.score(self)[..., first:], arrivals)
            ranks = ranks.add(arrivals > min(self.count - self.local, self._first_of_step - 1), alpha=_NEVER)
            for held in () if self.order is None else self.order.awaited[self.count]:
                ranks = ranks.add(arrivals == held, alpha=_NEVER)
            if self._ranking is None:
                return ranks.argmin(-1, keepdim=True) + first
            self._ranking.copy_(ranks.topk(self._ranking.shape[-1], largest=False, sorted=True).indices + first)
        return self._ranking[:, :, step : step + 1]

    def _selection(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and bias of condition, prefix, the chosen, and local (Eqs. 1-5); slots are in raster order."""
        count, kept = self.count, self._ranking.shape[-1]
        if (count - self.budget - 1) % self.config.renew_every == 0:
            previous = slice(self.prefix, count - self.local)
            score, position = self.policy.score(self)[..., previous], self.positions[..., previous]
            ranks = _ranks(score, (1 << _POSITION_BITS) - 1 - position)
            self._ranking.copy_(ranks.topk(kept).indices + self.prefix)
        raster = torch.arange(self.condition_slots + count, device=self.device).expand(self.batch, self.groups, -1)
        first, last = raster[..., : self.condition_slots + self.prefix], raster[..., -self.local :]
        chosen = torch.cat([first, self._ranking + self.condition_slots, last], dim=-1)
        if self.attention is not None:
            self._seen = chosen[..., self.condition_slots :] - self.condition_slots
        bias = None if self._bias is None else self._bias[..., : chosen.shape[2]]  # image slots all have bias 0
        return self._k.pick(chosen), self._v.pick(chosen), bias

    def _watched_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of the tokens that came in last, whose weights go on record. Shapes as in :meth:`attend`."""
        wide = self.attention.weights.dtype  # as in the fused kernels: rounded scores would be off by percents
        queries, shared = q.shape[2], q.shape[1] // k.shape[1]
        q = q.unflatten(1, (k.shape[1], shared)).flatten(2, 3).to(wide)  # [B, H, Hq / H * S, D]
        scores = (q @ k.to(wide).mT * q.shape[-1] ** -0.5).unflatten(2, (shared, queries))
        if bias is not None:
            scores = scores + bias.unsqueeze(2)
        weights = scores.softmax(-1)  # [B, H, Hq / H, S, C + N]
        seen = weights[..., self.condition_slots :].sum(2)
        if self.groups == 1:
            seen = seen.sum(1, keepdim=True)
        slots, self._seen = self._seen, None
        for index, of_query in enumerate(seen.unbind(2)):
            self.attention.add(self._first_of_step + index, of_query, slots)
        return (weights.flatten(2, 3).to(v.dtype) @ v).unflatten(2, (shared, queries)).flatten(1, 2)

    def _condition_mask(self, q: Tensor) -> Tensor | None:
        """bool ``[B, 1, T, T]``: causal, padding seen by nobody but itself. None if there is nothing to mask."""
        length = q.shape[2]
        if length == 1:
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if self._valid is None:
            return causal
        return (causal & self._valid[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=q.device)

    # The cache as a thing that takes up memory.

    def tensors(self) -> dict[str, Tensor]:
        """Everything allocated, by name."""
        named = {"bias": self._bias, "arrivals": self._arrivals, "ranking": self._ranking, "places": self._places}
        for record in (self.similarity, self.attention):
            if record is not None:
                named |= record.tensors()
        named |= self.kv_tensors()
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def kv_tensors(self) -> dict[str, Tensor]:
        """Keys and values as they lie in memory, by name."""
        stores = (("k", self._k), ("v", self._v))
        return {f"{name}{i or ''}": part for name, store in stores for i, part in enumerate(store.parts)}

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first ``rows`` rows, and free their memory."""
        self.select_rows(torch.arange(rows, device=self.device))

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order. ``rows``: int64 ``[R]``; one may stand there several times."""
        self.batch = len(rows)
        for store in (self._k, self._v):
            store.select_rows(rows)
        for name in ("_bias", "_arrivals", "_ranking"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows))
        for record in (self.similarity, self.attention):
            if record is not None:
                record.select_rows(rows)

    def move_kv(self, device: torch.device | str) -> None:
        """Move keys and values to another device, and back before the next token. Bookkeeping stays."""
        for store in (self._k, self._v):
            store.to(device)


class KVCache:
    """One :class:`LayerCache` per layer; arguments as there, and ``n_layer``."""

    def __init__(self, config: CacheConfig, *, n_layer: int, **shape):
        self.config = config
        self.batch: int = shape["batch"]
        self.max_tokens: int = shape["max_tokens"]
        self.order: Order | None = shape.get("order")
        self.layers = [LayerCache(config, **shape) for _ in range(n_layer)]

    @property
    def slots(self) -> int:
        """Image tokens that a step attends to at most."""
        return self.layers[0].budget

    @property
    def used(self) -> bool:
        """Whether any token has come in."""
        return self.layers[0].used

    @property
    def condition_slots(self) -> int:
        """Slots that the condition takes, beside the budget."""
        return self.layers[0].condition_slots

    def nbytes(self) -> int:
        """Bytes really allocated, by the storages behind the tensors, bookkeeping included."""
        return allocated(self.layers)

    def kv_nbytes(self) -> int:
        """Bytes of keys and values alone: 2 * layers * B * H * (C + slots in memory) * bytes of a vector, which are D *
        bytes per number, or what :mod:`adsa.storage` says."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.kv_tensors().values())

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first ``rows`` rows of the batch, as when guidance ends."""
        self.batch = rows
        for layer in self.layers:
            layer.keep_rows(rows)


def allocated(layers: list[LayerCache]) -> int:
    """Bytes of the storages behind all tensors of these layers."""
    storages = [t.untyped_storage() for layer in layers for t in layer.tensors().values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
