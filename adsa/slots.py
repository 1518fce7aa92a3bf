"""Where image tokens lie, what is known of each, and whose slot is taken next (arXiv 2506.18226, section 4.2).

Which token leaves when token p comes depends on what was there before it, and so is known for all layers before the
first of them sees p. :class:`Slots` therefore holds the rows of all layers one under the other, and ranks them at once:
the selection costs a few operations a step, however many layers there are.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from adsa.attention import AttentionRecord
from adsa.config import CacheConfig
from adsa.fused import fused
from adsa.loops import Loops, loops
from adsa.order import Order
from adsa.queries import QueryRecord
from adsa.similarity import RunningSimilarity, mean_similarities
from adsa.storage import CODECS, Plain, Storage

# Scores become fixed-point numbers with the arrival in the low bits: one integer order, ties included.
_FRACTION = 2.0**28
_LARGEST = 2.0**15 - 1
ARRIVAL_BITS = 18
MOST_TOKENS = (1 << ARRIVAL_BITS) - 1  # image tokens that can be told apart
CLOSE = 2.0**-10  # keys nearer than this are as good as equal; less is lost in a product's rounding, TF32's above all
BUCKET = 64  # slots; of a fixed cache that is not full, steps look at the next multiple
# Numbers that are worked on at a time, see Slots.in_parts.
IN_CACHE, IN_LAST_CACHE, ON_GPU = 2**18, 2**20, 2**25
_NEVER = 1 << 62  # more than any rank; added, since masked_fill is several times as slow on a CPU


def _ranks(score: Tensor, arrival: Tensor) -> Tensor:
    """int64 keys whose order is that of (score, arrival). ``[R, G, N]`` each."""
    wide = score.to(torch.promote_types(score.dtype, torch.float32)).clamp(-_LARGEST, _LARGEST)
    return wide.mul_(_FRACTION).round_().long().mul_(1 << ARRIVAL_BITS).add_(arrival)


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
        n_head: Hq, heads of queries; None: H.
        head_dim: D.
        condition_tokens: T, how many tokens come before the image. Never evicted. The paper leaves open whether they
            count within the budget and within the mean of Eq. 3; here they do neither.
        max_tokens: image tokens that will be decoded.
        dtype: of keys and values, unless ``config.dtype`` says otherwise.
        device: where.
        valid: bool ``[B, T]``, which condition tokens are no padding; None: all.
        columns: image tokens in a line; None: the image is square and has ``max_tokens``.
        order: of tokens that don't come in raster order; None: they do. First and newest tokens, which always stay, are
            then the first and the newest to come.
        fixed: steps of one :meth:`phase` are the same operations on the same memory, so that one can be recorded, as a
            CUDA graph is, and played for the others. Until the cache is full, which a dense one never is, attention
            goes to some empty slots as well, under a mask.

    Attributes:
        condition_slots: those before the image's.
        bias: what is added to scores, ``[R, 1 or H, 1, slots]``, for padding, folding, and slots that stand for several
            tokens; None: nothing.
        count: image tokens that came in so far.
        clock: the same on the device, int32 without dimensions: a step that reads nothing else of the count can be
            recorded once and played again.
        filled: how many of them are here, in the first slots of the image.
        ranked: how many victims one ranking names, in mode "evict".
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
        n_head: int | None = None,
        layers: int = 1,
        valid: Tensor | None = None,
        columns: int | None = None,
        order: Order | None = None,
        fixed: bool = False,
    ):
        if valid is not None and valid.shape != (batch, condition_tokens):
            raise ValueError(f"valid must be [{batch}, {condition_tokens}] (rows, condition), not {[*valid.shape]}")
        if (most := max_tokens if order is None else order.arrivals) > MOST_TOKENS:
            raise ValueError(f"max_tokens {most} is beyond the {MOST_TOKENS} tokens a cache can tell apart")
        dtype = config.torch_dtype or dtype
        config = config if order is None else config.fitted(order)
        self.config, self.policy = config, config.rule
        self.layers, self.batch, self.dtype, self.device = layers, batch, dtype, torch.device(device)
        self.budget = config.slots(max_tokens)
        self.prefix, self.local = config.split
        self.selects = config.mode == "select" and self.budget < max_tokens
        self.evicts = config.mode == "evict" and self.budget < max_tokens
        if fixed and (config.mode == "select" or order is not None):
            raise ValueError(
                'a fixed cache is for raster order and not for mode "select", whose attention grows token by token'
            )
        self.capacity = self.budget if self.evicts else max_tokens
        self.max_tokens, self.columns, self.order = max_tokens, columns or math.isqrt(max_tokens), order
        self.count = self.filled = 0
        self.clock = torch.zeros((), dtype=torch.int32, device=device)
        self.targets: list[int | Tensor] = []
        self._room: dict[bool, Tensor] = {}  # for keys and for values, see _read
        self._similarities: Tensor | None = None  # room for them, which holds those of rows up to _compared
        self._compared = 0
        self.hidden: Tensor | None = None
        # With an order: the places that tokens came to, {place: the arrival that holds it for another}, and what comes
        # next: {place: whether it is only held}.
        self._came: set[int] = set()
        self._held: dict[int, int] = {}
        self._coming: dict[int, bool] = {}

        rows, joint = layers * batch, config.granularity == "layer"
        self.groups = 1 if joint else n_kv_head
        # What attention computes in: on a GPU in the fused kernels' dtype, which what is added to scores must have.
        self.wide = wide = torch.promote_types(dtype, torch.float32) if self.device.type == "cpu" else dtype
        self.condition_tokens = condition_tokens
        self.valid = None if valid is None else valid.to(device, torch.bool, copy=True)  # a reset writes into it
        self.folds = config.fold_condition and condition_tokens > 1
        self.condition_slots = fold_bias(torch.ones(1), wide).shape[-1] if self.folds else condition_tokens
        size = self.condition_slots + self.capacity
        self.merges = config.merges and self.evicts
        self.bias: Tensor | None = None
        if self.merges or self.folds or valid is not None:
            # Of merged tokens the numbers differ by head, and must not be rounded each time that one more comes.
            heads, dtypes = (n_kv_head, torch.promote_types(dtype, torch.float32)) if self.merges else (1, wide)
            self.bias = torch.zeros(rows, heads, 1, size, dtype=dtypes, device=device)
        shape = (rows, n_kv_head, size, head_dim)
        codec = CODECS.get(config.dtype, Plain())
        self.stored_k, self.stored_v = (Storage(codec, shape, dtype, device) for _ in "kv")
        self._places = None if order is None else torch.zeros(order.arrivals, dtype=torch.int32, device=device)
        self._arrivals = self._ranking = self.similarity = self.attention = None
        # One ranking names the victims of renew_every tokens, and of all that come at once.
        self.renewal = config.renewal
        self.ranked = max(self.renewal, 1 if order is None else order.width)
        self._taken = self.ranked
        if order is not None:
            self._check_order(order)
        self.fixed, self._target, self._empty = fixed, None, None
        self._memory = 0  # how often tensors were replaced
        self._loops = loops(codec, dtype, head_dim) if self.device.type == "cpu" else None
        self.fused = order is None and fused(self.device, dtype)  # whether a kernel ranks
        if fixed:
            self._target = torch.zeros(rows, self.groups, 1, dtype=torch.int64, device=device)
        if self.evicts or order is not None:
            arrivals = torch.arange(self.capacity, dtype=torch.int32, device=device)
            self._arrivals = arrivals.expand(rows, self.groups, -1).contiguous()
        if self.selects or (self.evicts and (self.ranked > 1 or self.merges)):
            named = self.budget - self.prefix - self.local if self.selects else self.ranked
            self._ranking = torch.zeros(rows, self.groups, named, dtype=torch.int64, device=device)
        self._into = self.queries = None
        if self.merges:
            self._into = torch.zeros(rows, self.groups, self.ranked, dtype=torch.int64, device=device)
        if self.policy.query_lines and (self.evicts or self.selects):
            window = self.policy.query_lines * self.columns
            self.queries = QueryRecord(rows, n_head or n_kv_head, head_dim, window=window, dtype=dtype, device=device)
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
        spare = self.config.spare(order)
        if spare < self.ranked:
            raise ValueError(
                f"cache budget {self.budget} is too small for tokens that come {order.width} at a time: beside prefix "
                f"{self.prefix}, local {self.local} and {order.held} that hold another's place, {max(0, spare)} "
                f"may go, and one ranking needs {self.ranked}"
            )

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU runs one operation after the other; a compiler finds its own way."""
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    @property
    def loops(self) -> Loops | None:
        """A CPU's loops for these keys and values; None: there are none, or a compiler is at work."""
        return None if torch.compiler.is_compiling() else self._loops

    def graded(self, *tensors: Tensor) -> bool:
        """Whether gradients are wanted of what is here, or of these: then loops would cut them off."""
        if not torch.is_grad_enabled():
            return False
        return any(x.requires_grad for x in (*tensors, *self.stored_k.parts, *self.stored_v.parts))

    # What policies see: the image tokens now cached, N of them.

    @property
    def newest(self) -> int | Tensor:
        """Position of the token that the choice is made for: the incoming one, or in mode "select" the last cached."""
        return self._number if self.order is None else next(iter(self._coming))

    @property
    def _number(self) -> Tensor:
        """As which that token came."""
        return self.clock - 1 if self.selects else self.clock

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
        return self._number - self.arrivals

    def came(self) -> Tensor:
        """How many tokens of each line there have been before the incoming one, int64 ``[lines]``."""
        lines = -(-self.max_tokens // self.columns)
        if self.order is None:
            return (self.newest - self.columns * torch.arange(lines, device=self.device)).clamp(0, self.columns)
        lengths = [0] * lines
        for place in self._came:
            lengths[place // self.columns] += 1
        return torch.tensor(lengths).to(self.device)

    def held(self, rows: slice, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of all that is here, ``[rows, H, C + N, D]``, condition first, and what is added to scores.

        The last is ``[rows, 1 or H, 1, C + N]`` or None. ``dtype``: of keys and values; None: the cache's. Those of
        another dtype may be overwritten by what is read next.
        """
        keys, bias = self.held_keys(rows, dtype)
        return keys, self._read(self.stored_v, 0, keys.shape[2], rows, dtype), bias

    def held_keys(self, rows: slice, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """As :meth:`held`, but for the values."""
        return self._read(self.stored_k, 0, self.reach, rows, dtype), self._added(rows)

    def as_written(self, rows: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """As :meth:`held`, but keys and values as the codec wrote them, ``[rows, H, C + N, n]`` each."""
        keys, values = (store.as_written(0, self.reach, rows) for store in (self.stored_k, self.stored_v))
        return keys, values, self._added(rows)

    @property
    def reach(self) -> int:
        """How many slots attention looks at."""
        return self.condition_slots + (self.filled if self._empty is None else self._bound(self.filled))

    def _added(self, rows: slice) -> Tensor | None:
        """What is added to scores, ``[1 or rows, 1 or H, 1, C + N]``."""
        bias = None if self.bias is None else self.bias[rows, ..., : self.reach]
        if self._empty is None:
            return bias
        return self._empty if bias is None else bias + self._empty

    def most_weight(self, q: Tensor, rows: slice) -> Tensor:
        """The largest weight that the attention of any of several queries gives to each image token.

        ``q``: ``[rows, Hq, Q, D]``, rotated. Returns ``[rows, H, N]``, of at least float32.
        """
        heads = self.stored_k.heads
        q = q.unflatten(1, (heads, -1)).flatten(2, 3).to(torch.promote_types(q.dtype, torch.float32))
        q = q * q.shape[-1] ** -0.5
        keys, bias = self.held_keys(rows, self.wide)
        scores = q @ keys.to(q.dtype).mT  # [rows, H, Hq / H * Q, C + N]
        if bias is not None:
            scores += bias
        return scores.softmax(-1)[..., self.condition_slots :].amax(2)

    def _read(self, store: Storage, first: int, end: int, rows: slice, dtype: torch.dtype | None) -> Tensor:
        """As :meth:`Storage.read`, but that a CPU makes numbers wide in the same memory again and again.

        An allocator may give such memory back each time, so that the system clears new pages for the next: five times
        the work of attention.
        """
        if not self.on_cpu or dtype != self.wide:
            return store.read(first, end, rows, dtype)
        room = self._room.get(store is self.stored_k)
        if room is None:
            one_row = store.heads * store.parts[0].shape[2] * store.dim
            with torch.inference_mode(False):  # it may be written to outside of that as well
                room = torch.empty(max(IN_LAST_CACHE, one_row), dtype=dtype, device=self.device)
            self._room[store is self.stored_k] = room
        return store.read(first, end, rows, dtype, room)

    # A step: tokens of all layers come in.

    def expect(self, places: Sequence[int], held: Collection[int], positions: Tensor) -> None:
        """With an order: where the tokens that come in next belong, as :meth:`~adsa.cache.KVCache.expect` takes it."""
        arrivals = self.count + len(places)
        still = (self._held.keys() - set(places)) | set(held)
        if arrivals > self.order.arrivals or len(still) > self.order.held:
            raise ValueError(
                f"the cache was made for {self.order}; with these there would be {arrivals} arrivals, and {len(still)} "
                f"that hold another's place"
            )
        self._coming = {place: place in held for place in places}
        self._places[self.count : arrivals] = positions

    def advance(self, tokens: int) -> None:
        """Find slots for so many tokens that come in at once, and take note of them as if they were there.

        Raises:
            ValueError: there is no room, and nothing may be evicted.
        """
        if self.evicts:  # else nobody asks before the layers have done so
            self.settle()
        if self.order is not None and len(self._coming) != tokens:
            raise ValueError(f"{tokens} tokens come in, and {len(self._coming)} were announced: call expect before")
        coming = [self.count + index for index in range(tokens)]
        numbers = self.clock.view(1)
        if tokens > 1:
            numbers = numbers + torch.arange(tokens, dtype=torch.int32, device=self.device)
        own = [self._held.get(place) for place in self._coming] or [None] * tokens
        evicted = max(0, self.filled + own.count(None) - self.capacity)
        if evicted and not self.evicts:
            raise ValueError(f"the cache was made for {self.capacity} image tokens, and this is one more")
        self._empty = None
        victims, into = self._victims(evicted) if evicted else (None, None)
        self.targets, self._compared = [], 0
        for arrival, held in zip(numbers.split(1), own, strict=True):
            if held is not None:  # takes over from the token that held its place
                slot = (self.arrivals == held).long().argmax(-1, keepdim=True)
            elif self.filled < self.capacity:
                self.targets.append(self._fill(arrival) if self.fixed else self.filled)
                if self.order is not None:
                    self._arrivals[:, :, self.filled] = arrival
                self.filled += 1
                continue
            else:
                slot, victims = victims[:, :, :1], victims[:, :, 1:]
                if self.merges:
                    self._merge(slot, into[:, :, :1])
                    into = into[:, :, 1:]
            if self.fixed:
                slot = self._target.copy_(slot)
            self.targets.append(slot)
            if self.similarity is not None:
                self.similarity.remove(slot, self._featured.pick(slot + self.condition_slots, dtype=self.wide))
            if self.attention is not None:
                self.attention.forget(slot)
            if self.merges:
                heads = self.bias.shape[1]
                self.bias.scatter_(3, (slot + self.condition_slots).unsqueeze(2).expand(-1, heads, -1, -1), 0.0)
            self._arrivals.scatter_(2, slot, arrival.expand_as(slot))
        self.count += tokens
        self.clock += tokens
        if self.order is not None:
            self._arrived(coming)

    def put(self, store: Storage, slot: Tensor, x: Tensor, rows: slice) -> None:
        """A token into its slot, int64 ``[R, G, 1]``. ``x``: ``[B, H, 1, D]``, for these rows."""
        first = self.condition_slots
        if self.loops is None or x.requires_grad:
            store.put(first + slot[rows], x, rows)
        else:
            to = store.as_written(first, first + self.capacity, rows)
            self.loops.put(to, slot[rows], store.codec.encode(x.to(store.dtype)))

    def written(self, k: Tensor, v: Tensor, rows: slice) -> tuple[int | Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A token that comes in alone, ``[B, H, 1, D]`` for these rows, as :meth:`adsa.loops.Loops.attend` takes it."""
        (slot,), stores = self.targets, (self.stored_k, self.stored_v)
        keys, values = (store.codec.encode(x.to(store.dtype)) for store, x in zip(stores, (k, v), strict=True))
        return slot if isinstance(slot, int) else slot[rows], keys, values

    def _fill(self, arrival: Tensor) -> Tensor:
        """Of a fixed cache: the next empty slot, and a note of those behind it. ``arrival``: int ``[1]``."""
        end = self.condition_slots + self._bound(self.filled + 1)
        empty = torch.arange(end, device=self.device) > self.condition_slots + arrival
        self._empty = torch.zeros(1, 1, 1, end, dtype=self.wide, device=self.device).masked_fill_(empty, -torch.inf)
        return self._target.copy_(arrival)

    def _bound(self, filled: int) -> int:
        """How many slots a step looks at that leaves so many filled, in a fixed cache that was not full before."""
        return min(-(-filled // BUCKET) * BUCKET, self.capacity)

    def phase(self) -> tuple | None:
        """What the operations of the next token's step depend on; None: on what no other step has."""
        if not self.fixed or not self.count:
            return None
        if self.filled < self.capacity:
            return self._memory, "filling", self._bound(self.filled + 1)
        taken = 0 if self._ranking is None or self._due(1) else self._taken
        return self._memory, "full", taken, 0 if self.queries is None else self.queries.filled

    def tick(self) -> None:
        """A step was played: all that the host knows of it. The device has done the rest."""
        if self.filled < self.capacity:
            self.filled += 1
        else:
            self._taken = 1 if self._due(1) else self._taken + 1
        self.count += 1
        if self.queries is not None:
            self.queries.count = self.count

    def reset(self, valid: Tensor | None = None) -> None:
        """Forget all tokens, in place. ``valid``: of the next ones, as at first."""
        if (valid is None) != (self.valid is None):
            raise ValueError("a cache that was made with valid needs it, and one without takes none")
        if valid is not None:
            self.valid.copy_(valid)
        self.count = self.filled = 0
        self._taken, self.targets, self.hidden, self._empty = self.ranked, [], None, None
        self._compared = 0
        self._came, self._held, self._coming = set(), {}, {}
        self.clock.zero_()
        for tensor in self.tensors().values():  # keys and values too: what is masked must not be NaN either
            tensor.zero_()
        if self._arrivals is not None:
            self._arrivals.copy_(torch.arange(self.capacity, dtype=torch.int32, device=self.device))
        if self.queries is not None:
            self.queries.count = 0

    def settle(self) -> None:
        """Count the tokens of the last step among those to be similar to. To be called when all layers have them."""
        if self.similarity is None:
            return
        rows = slice(self._compared, self.layers * self.batch)
        if rows.start < rows.stop:
            self.join(rows)
        self.targets = []

    # Similarities can be found while attention has keys and values at hand, to read these from memory once. For each
    # layer in turn: compares? Then for all of its rows join and multiply, with its tokens in place, or a comparison,
    # by loops that put them there and count them; compared.

    def compares(self, rows: slice) -> bool:
        """Whether the next token will ask for :meth:`similarities`, and those of a layer's rows can be found before."""
        if self.similarity is None or not self.evicts or self.order is not None or self.fixed or not self.on_cpu:
            return False
        ranks = self.filled == self.capacity and self._due(1) and self.count < self.max_tokens
        return ranks and rows.start == self._compared

    def join(self, rows: slice) -> None:
        """Count the new tokens of these rows among those to be similar to."""
        first, record = self.condition_slots, self.similarity
        for slot in self.targets:
            mine = slot if isinstance(slot, int) else slot[rows]
            if self.loops is not None:
                features = self._featured.as_written(first, first + self.capacity, rows)
                self.loops.count_in(features, mine, record.total[rows], record.inverse_norm[rows])
            elif isinstance(mine, int):
                record.add(mine, self._featured.read(first + mine, first + mine + 1, rows, self.wide), rows)
            else:
                record.add(mine, self._featured.pick(first + mine, rows, self.wide), rows)

    def multiply(self, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Of some of a layer's rows. ``keys``, ``values``: of all slots, ``[rows, H, C + N, D]``."""
        # All, as a product of a part would be of a copy.
        dots = self.similarity.dots(keys if self._compares_keys else values, rows)[..., self.condition_slots :]
        self._found(rows).copy_(mean_similarities(dots, self.similarity.inverse_norm[rows]))

    def comparison(self, rows: slice) -> tuple[bool, Tensor, Tensor, Tensor]:
        """What :meth:`adsa.loops.Loops.attend` wants to know, which multiplies."""
        found = self._found(rows)
        return self._compares_keys, self.similarity.total[rows], self.similarity.inverse_norm[rows], found

    def compared(self, rows: slice) -> None:
        """All of a layer's rows have their similarities."""
        self._compared = rows.stop

    def _found(self, rows: slice) -> Tensor:
        """Where these rows' similarities go to: for all steps the same memory, see :meth:`_read`."""
        if self._similarities is None:
            shape = (self.layers * self.batch, self.groups, self.capacity)
            with torch.inference_mode(False):  # it may be written to outside of that as well
                self._similarities = torch.empty(shape, dtype=self.similarity.total.dtype, device=self.device)
        return self._similarities[rows]

    def similarities(self) -> Tensor:
        """s_i (Eq. 3) of what the policy compares, ``[R, G, N]``, which may be overwritten."""
        if self._compared == self.layers * self.batch:
            self._compared = 0
            return self._similarities
        first, end, store = self.condition_slots, self.condition_slots + self.filled, self._featured
        whole = store.dtype == self.similarity.total.dtype or self.similarity.fused
        as_is = whole and self.config.dtype not in CODECS
        heads, dim = self.similarity.total.shape[1:]
        numbers = heads * self.filled * (1 if as_is else dim)
        return self.in_parts(
            lambda rows: self.similarity.score(self._read(store, first, end, rows, self.wide), rows), numbers, once=True
        )

    @property
    def _featured(self) -> Storage:
        """What the policy compares."""
        return self.stored_k if self._compares_keys else self.stored_v

    @property
    def _compares_keys(self) -> bool:
        return self.policy.similarity_of == "k"

    def _victims(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Slots to free, ``[R, G, tokens]``: those of the least worthy previous tokens (section 4.2).

        And the slots to merge what is there into, or None.
        """
        if self._due(tokens):
            self._taken = 0
            found, into = self.policy.victims(self)
            if self._ranking is None:
                self._taken = 1
                return found, None
            self._ranking.copy_(found)
            if self.merges:
                self._into.copy_(into)
        taken = slice(self._taken, self._taken + tokens)
        self._taken += tokens
        return self._ranking[:, :, taken], self._into[:, :, taken] if self.merges else None

    def victims_by_score(self, score: Tensor) -> tuple[Tensor, Tensor | None]:
        """By score, ``[R, G, N]``, the slots whose tokens are to leave, as :meth:`Policy.victims` tells them."""
        found = self.in_parts(
            lambda rows: self._least(score, rows), 0 if self._loops_rank else self.groups * self.filled
        )
        if not self.merges:
            return found, None
        leave = torch.zeros_like(self.arrivals, dtype=torch.bool).scatter_(2, found, True)
        numbers = found[0].numel() * self.filled
        return found, self.in_parts(lambda rows: self.nearest(found[rows], rows, leave[rows])[1], numbers)

    def victims_by_queries(self, few: int) -> tuple[Tensor, Tensor | None]:
        """As :meth:`adsa.loops.Loops.rank` finds them; where there are loops. ``few``: candidates."""
        rows = slice(0, self.layers * self.batch)
        return self.loops.rank(
            self.queries.read(rows),
            self.stored_k.as_written(0, self.reach, rows),
            self._added(rows),
            self.arrivals,
            self._number,
            line=self.columns,
            prefix=self.prefix,
            local=self.local,
            held=list(self._held.values()),
            few=few,
            named=self.ranked,
            merges=self.merges,
            close=CLOSE,
            largest=_LARGEST,
            fraction=_FRACTION,
        )

    def _due(self, tokens: int) -> bool:
        """Whether so many victims need a new ranking."""
        return self._taken >= self.renewal or self._taken + tokens > self.ranked

    def _least(self, score: Tensor, rows: slice) -> Tensor:
        """Of these rows the slots that may leave, the least worthy first: ``[rows, G, as many as are ranked]``."""
        score, arrivals = score[rows], self.arrivals[rows]
        numbers = {"prefix": self.prefix, "local": self.local, "largest": _LARGEST, "fraction": _FRACTION}
        if self._loops_rank and score.dtype != torch.float64:
            return self.loops.least_worthy(score.float(), arrivals, self._number, **numbers)
        if self.fused and score.dtype == torch.float32 and not torch.compiler.is_compiling():
            from adsa import kernels  # needs Triton

            ranks = kernels.ranks(score, arrivals, self._number, never=_NEVER, bits=ARRIVAL_BITS, **numbers)
        else:
            ranks = _ranks(score, arrivals).add_(self.staying(rows), alpha=_NEVER)
        if self._ranking is None:
            return ranks.argmin(-1, keepdim=True)
        return ranks.topk(self.ranked, largest=False, sorted=True).indices

    @property
    def _loops_rank(self) -> bool:
        """Whether a CPU's loop names the one victim of a ranking, which doesn't know of tokens that hold a place."""
        return self.loops is not None and self._ranking is None and self.order is None

    def staying(self, rows: slice) -> Tensor:
        """Which tokens may not leave, bool ``[rows, G, N]``: prefix, local window, what holds another's place."""
        arrivals = self.arrivals[rows]
        stays = arrivals > self._number - self.local
        stays[..., : self.prefix].fill_(True)  # the prefix never leaves the first slots
        return self._or_held(stays, arrivals)

    def _or_held(self, mask: Tensor, arrivals: Tensor) -> Tensor:
        """A mask of tokens, ``[rows, G, N]``, with those that hold another's place."""
        for held in self._held.values():
            mask = mask | (arrivals == held)
        return mask

    def in_parts(
        self, function: Callable[[slice], Tensor], numbers: int, rows: int | None = None, *, once: bool = False
    ) -> Tensor:
        """``function`` of all rows, a part of them at a time: as many as a CPU's caches hold, or on a GPU as are little
        beside a model.

        Args:
            function: of some rows -> ``[as many, ...]``.
            numbers: that a row takes; 0: all rows at a time.
            rows: how many; None: those of all layers.
            once: the numbers are written and read once, so that a CPU may have them in its last cache.
        """
        rows = self.layers * self.batch if rows is None else rows
        most = ON_GPU if self.device.type != "cpu" else IN_LAST_CACHE if once else IN_CACHE
        step = max(1, most // max(1, numbers))
        if step >= rows:
            return function(slice(0, rows))
        found = None
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            made = function(part)
            # Not a list of parts, which would lie where the next part's numbers were to go: glibc then gets new pages
            # for these each time, which takes several times as long as all the rest.
            found = made.new_empty(rows, *made.shape[1:]) if found is None else found
            found[part] = made
        return found

    def nearest(self, slots: Tensor, rows: slice, leave: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens may be merged into, and how unlike it is: those that stay, but for the last line's, whose tokens
        the next line will look at one by one.

        Args:
            slots: of these tokens, int64 ``[rows, G, L]``.
            rows: these.
            leave: which tokens don't stay, bool ``[rows, G, N]``.

        Returns:
            The square of the distance between keys, ``[rows, G, L]``, at least CLOSE times the sum of both keys'
            squares; and the slot of the nearest, int64 of that shape.
        """
        first, end = self.condition_slots, self.condition_slots + self.filled
        arrivals = self.arrivals[rows]
        leave = self._or_held(leave, arrivals)
        never = leave | (arrivals >= self.clock - self.columns)
        never = torch.where(never.all(-1, keepdim=True), leave, never)  # where nothing is older
        keys = self._read(self.stored_k, first, end, rows, self.wide)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        square = torch.linalg.vector_norm(keys, dim=-1).square_()  # [rows, H, N]
        mine = slots.expand(-1, keys.shape[1], -1)
        left = self.stored_k.pick(first + slots, rows, keys.dtype)
        both = square.gather(2, mine).unsqueeze(-1) + square.masked_fill(never, torch.inf).unsqueeze(2)
        found = torch.baddbmm(both.flatten(0, 1), left.flatten(0, 1), keys.flatten(0, 1).mT, alpha=-2)
        found = torch.maximum(found.view_as(both), both.mul_(CLOSE))
        return (found.sum(1, keepdim=True) if self.groups == 1 else found).min(-1)

    def _merge(self, slot: Tensor, into: Tensor) -> None:
        """A token that leaves becomes part of another. int64 ``[R, G, 1]`` each."""
        first, heads = self.condition_slots, self.bias.shape[1]
        if self.loops is not None and self.loops.merges and self.similarity is None and not self.graded():
            keys, values = (store.as_written(first, first + self.capacity) for store in (self.stored_k, self.stored_v))
            self.loops.merge(keys, values, slot, into, self.bias[..., first:])
            if self.attention is not None:
                self.attention.merge(slot, into)
            return
        leaves, stays = (index + first for index in (slot, into))
        numbers = [
            self.bias.gather(3, index.unsqueeze(2).expand(-1, heads, -1, -1)).squeeze(3) for index in (leaves, stays)
        ]
        both = torch.logaddexp(*numbers)  # [R, H, 1]
        share = (numbers[0] - both).exp().unsqueeze(-1)
        if self.similarity is not None:
            self.similarity.remove(into, self._featured.pick(stays, dtype=self.wide))
        for store in (self.stored_k, self.stored_v):
            old, new = (store.pick(index, dtype=share.dtype) for index in (stays, leaves))
            store.put(stays, old + (new - old) * share)
        self.bias.scatter_(3, stays.unsqueeze(2).expand(-1, heads, -1, -1), both.unsqueeze(3))
        if self.similarity is not None:
            self.similarity.add(into, self._featured.pick(stays, dtype=self.wide))
        if self.attention is not None:
            self.attention.merge(slot, into)

    def chosen(self) -> Tensor:
        """Mode "select": prefix, the most worthy previous tokens, and local (Eqs. 1-5), int64 ``[R, G, budget]``."""
        if self._taken >= self.renewal:
            previous = slice(self.prefix, self.count - self.local)
            score, arrival = self.policy.score(self)[..., previous], self.arrivals[..., previous]
            ranks = _ranks(score, (1 << ARRIVAL_BITS) - 1 - arrival)
            self._ranking.copy_(ranks.topk(self._ranking.shape[-1]).indices + self.prefix)
            self._taken = 0
        self._taken += 1
        slots = torch.arange(self.count, device=self.device).expand(self.layers * self.batch, self.groups, -1)
        return torch.cat([slots[..., : self.prefix], self._ranking, slots[..., -self.local :]], dim=-1)

    def _arrived(self, arrivals: Sequence[int]) -> None:
        """Take note of where the tokens that came in belong, and of what they must not see."""
        places, self._coming = self._coming, {}
        for arrival, (place, held) in zip(arrivals, places.items(), strict=True):
            self._held.pop(place, None)
            if held:
                self._held[place] = arrival
        self._came.update(places)
        self.hidden = None if max(self._came) <= min(places) else self._later(len(places))

    def _later(self, tokens: int) -> Tensor:
        """-inf where the newest tokens must not look: at places behind their own. ``[R, G, tokens, C + N]``."""
        mine = self._places[self.count - tokens : self.count].unsqueeze(-1)
        later = self.positions.unsqueeze(2) > mine
        hidden = torch.zeros(*later.shape[:3], self.condition_slots + self.filled, dtype=self.dtype, device=self.device)
        hidden[..., self.condition_slots :].masked_fill_(later, -torch.inf)
        return hidden

    # As a thing that takes up memory.

    def tensors(self) -> dict[str, Tensor]:
        """Everything that grows with rows or slots and lasts, by name."""
        named = {"bias": self.bias, "places": self._places, "arrivals": self._arrivals}
        named |= {"ranking": self._ranking, "into": self._into, "target": self._target}
        for record in (self.similarity, self.attention, self.queries):
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
        self.select_rows(torch.arange(rows, device=self.device))

    def select_rows(self, rows: Tensor) -> None:
        """Of each layer, keep these rows, in this order. ``rows``: int64 ``[n]``; one may stand there several times."""
        self.settle()
        self.targets, self.hidden = [], None
        self._similarities, self._compared = None, 0
        self._memory += 1

        def kept(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (self.layers, self.batch)).index_select(1, rows.to(tensor.device)).flatten(0, 1)

        for record in (self.stored_k, self.stored_v, self.similarity, self.attention, self.queries):
            if record is not None:
                record.keep(kept)
        for name in ("bias", "_arrivals", "_ranking", "_into", "_target"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, kept(tensor))
        self.valid = None if self.valid is None else self.valid.index_select(0, rows.to(self.valid.device))
        self.batch = len(rows)

    def move_kv(self, device: torch.device | str) -> None:
        """Move keys and values to another device, and back before the next token. Bookkeeping stays."""
        self._memory += 1
        for store in (self.stored_k, self.stored_v):
            store.to(device)
