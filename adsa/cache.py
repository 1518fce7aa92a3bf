"""KV caches that keep within a budget (arXiv 2506.18226, section 4.2).

A :class:`LayerCache` holds the keys and values of one layer, and its attention. Its slots are

    [ condition tokens | image tokens, in no particular order ]

with the number of arrival of every image token beside them. Until the image slots are full it is a dense cache; from
then on each new token takes the slot of a victim that the policy names, so that memory never grows and no slot is ever
empty. :mod:`adsa.slots` names the victims, for all layers at once.

Nothing here waits for the device: victims are tensors, and the host only counts steps.
"""

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adsa.config import CacheConfig
from adsa.order import Order
from adsa.slots import Slots, fold_bias


class LayerCache:
    """Keys and values of one layer.

    Args:
        slots: what it has its rows of.
        layer: its number. Layers that share slots take their tokens one after the other, the first one first.

    Attributes:
        condition_came: condition tokens that came into this layer so far.
        count: image tokens likewise.
    """

    def __init__(self, slots: Slots, layer: int = 0):
        self.slots, self.layer = slots, layer
        self.condition_came = self.count = 0
        self._seen: Tensor | None = None  # mode "select": the slots that the newest query sees

    @property
    def rows(self) -> slice:
        """Its rows of what all layers share."""
        return slice(self.layer * self.slots.batch, (self.layer + 1) * self.slots.batch)

    @property
    def used(self) -> bool:
        """Whether any token has come in."""
        return self.count > 0 or self.condition_came > 0

    @property
    def _has_condition(self) -> bool:
        return self.condition_came == self.slots.condition_tokens

    @property
    def k(self) -> Tensor:
        """Keys of the cached image tokens, ``[B, H, N, D]``."""
        return self.slots.stored_k.read(self.slots.condition_slots, self._end, self.rows)

    @property
    def v(self) -> Tensor:
        """Values of the cached image tokens, ``[B, H, N, D]``."""
        return self.slots.stored_v.read(self.slots.condition_slots, self._end, self.rows)

    @property
    def _weighs(self) -> bool:
        """Whether attention is two products with a softmax between, and not PyTorch's fused operation.

        It is where its weights are wanted. And on a CPU, whose fused one takes up to three times as long for a single
        query in half precision, up to half as long again in float32, and about as long for several.
        """
        return self.slots.attention is not None or self.slots.on_cpu

    @property
    def _end(self) -> int:
        return self.slots.condition_slots + self.slots.filled

    @property
    def positions(self) -> Tensor:
        """Raster positions of the cached image tokens, int32 ``[B, G, N]``; G = H by head, 1 by layer."""
        return self.slots.positions[self.rows]

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
            if k.shape[2] != self.slots.condition_tokens:
                raise ValueError(
                    f"attend takes all {self.slots.condition_tokens} condition tokens at once, and these are "
                    f"{k.shape[2]}"
                )
            mask = self._condition_mask(q)
            self.insert_condition(k, v)
            return _fused_attention(q, k, v, mask)
        slots = self.slots
        if slots.selects or not self._weighs:
            return self.attend_to(q, *self.update(k, v))
        self._admit(k.shape[2])
        self._note(q)
        compares = slots.compares(self.rows)
        looped = slots.loops is not None and not slots.graded(q, k, v)
        out = (self._looped if looped else self._read_once)(q, k, v, compares)
        if compares:
            slots.compared(self.rows)
        return out

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Attention to what :meth:`update` returned, by the queries of the tokens that it took in.

        To be called once for each update, as what the policy wants to know of queries and weights is noted here.
        ``q`` and the result: ``[B, Hq, S, D]``, in the dtype of ``q``.
        """
        self._note(q)
        if not self._weighs:
            bias = None if bias is None else bias.to(self.slots.wide)
            return _fused_attention(q.to(keys.dtype), keys, values, bias).to(q.dtype)
        shared = bias is None or len(bias) == 1  # by all rows
        return self._weighed(q, keys.shape[2], lambda part: (keys[part], values[part], bias if shared else bias[part]))

    def _note(self, q: Tensor) -> None:
        """What the policy wants to know of queries."""
        if self.slots.queries is not None:
            clock = self.slots.clock if self.slots.fixed or torch.compiler.is_compiling() else None
            self.slots.queries.add(self.count, clock, q, self.rows)

    def insert_condition(self, k: Tensor, v: Tensor) -> None:
        """Store condition tokens, folded into one slot if the config says so. ``k``, ``v``: ``[B, H, T, D]``.

        Folding: keys of zero give each of the n valid tokens the score 0, so together they are exactly one token
        with the score ln(n) and the mean of their values.

        They may come in parts, unless they are folded.

        Raises:
            ValueError: for more tokens than the cache was made for, or parts of what must come at once.
        """
        slots, rows, first = self.slots, self.rows, self.condition_came
        left = slots.condition_tokens - first
        if k.shape[2] > left or (k.shape[2] < left and slots.folds):
            more, at_once = "more " * (first > 0), ", at once" * slots.folds
            raise ValueError(
                f"the cache takes {left} {more}condition tokens{at_once}; these are {k.shape[2]}, after "
                f"{self.count} image tokens"
            )
        self.condition_came += k.shape[2]
        if not slots.folds:
            slots.stored_k.write(first, k, rows)
            slots.stored_v.write(first, v, rows)
            if slots.valid is not None:
                self.hide_condition(slots.valid)
            return
        wide = torch.promote_types(v.dtype, torch.float32)
        weight = torch.ones(v.shape[0], v.shape[2], device=v.device) if slots.valid is None else slots.valid
        weight = weight.to(wide)
        n = weight.sum(1)
        mean = (v * weight[:, None, :, None]).sum(2, keepdim=True) / n.clamp(min=1).view(-1, 1, 1, 1)
        slots.stored_v.write(0, mean.expand(-1, -1, slots.condition_slots, -1), rows)
        slots.bias[rows, ..., : slots.condition_slots] = fold_bias(n, slots.wide)[:, None, None]

    def hide_condition(self, valid: Tensor) -> None:
        """No image token sees the condition tokens that are padding. Of slots that were made with a ``valid``.

        Args:
            valid: bool ``[B, up to T]``, of the first condition tokens.
        """
        self.slots.bias[self.rows, ..., : valid.shape[1]].masked_fill_(~valid[:, None, None, :], -torch.inf)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in image tokens, each evicting another if there is no room.

        Args:
            k, v: ``[B, H, S, D]``; S is 1 in raster order, and up to ``order.width`` in another.

        Returns:
            Keys and values to attend to, ``[B, H, C + N, D]`` with the condition first, and a bias
            ``[B, 1 or H, 1 or S, C + N]`` to add to the scores, or None.

        Raises:
            ValueError: as :meth:`enter`.
        """
        self.enter(k, v)
        return self._selection() if self.slots.selects and self.slots.count > self.slots.budget else self.held()

    def enter(self, k: Tensor, v: Tensor) -> None:
        """Take in image tokens as :meth:`update` does, and leave all that attention is for to the caller.

        Raises:
            ValueError: for too many tokens at once, before the condition, beyond ``max_tokens``, or if the layers
                don't take their tokens in step.
        """
        self._admit(k.shape[2])
        self._write(k, v)

    def _admit(self, tokens: int) -> None:
        """Find slots for so many tokens, or raise as :meth:`enter`."""
        most = 1 if self.slots.order is None else self.slots.order.width
        if not self._has_condition or not 1 <= tokens <= most:
            raise ValueError(
                f"update takes {'one image token' if most == 1 else f'up to {most} image tokens'} at a time, after the "
                f"condition's {self.slots.condition_tokens}; these are {tokens}, "
                f"{'after' if self._has_condition else 'before'} it"
            )
        self._advance(tokens)

    def insert(self, k: Tensor, v: Tensor) -> None:
        """Take in image tokens that are known beforehand, as :meth:`update` one after the other would.

        Args:
            k, v: ``[B, H, S, D]``, any number of tokens, in raster order.

        Raises:
            ValueError: before the condition, in another order, in mode "select", beyond ``max_tokens``; where layers
                share their slots, as all of them must have a token before the next one comes; or for a policy that
                wants to see attention or queries.
        """
        slots = self.slots
        if slots.attention is not None or slots.queries is not None:
            raise ValueError(f"cache policy {slots.config.policy!r} needs each token's query: use attend")
        if not self._has_condition or slots.order is not None or slots.selects or slots.layers > 1:
            raise ValueError(
                "image tokens are inserted after the condition, in raster order, where none is left out for a time, "
                "and into a cache of one layer"
            )
        for one_k, one_v in zip(k.split(1, dim=2), v.split(1, dim=2), strict=True):
            self._advance(1)
            self._write(one_k, one_v)

    def _advance(self, tokens: int) -> None:
        if self.layer == 0:
            self.slots.advance(tokens)
        self.count += tokens
        if self.count != self.slots.count:
            raise ValueError(f"layer {self.layer} has {self.count} image tokens, and the first one {self.slots.count}")

    def _write(self, k: Tensor, v: Tensor) -> None:
        """Image tokens that come in at once, ``[B, H, S, D]``, into the slots that were found."""
        slots, rows = self.slots, self.rows
        for index, slot in enumerate(slots.targets):
            for store, x in ((slots.stored_k, k), (slots.stored_v, v)):
                x = x[:, :, index : index + 1]
                if isinstance(slot, int):
                    store.write(slots.condition_slots + slot, x, rows)
                else:
                    slots.put(store, slot, x, rows)
        if slots.selects:
            slots.settle()

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is here, condition first: ``[B, H, C + N, D]``, views where that is possible."""
        slots, rows = self.slots, self.rows
        end = slots.condition_slots + slots.filled if self._has_condition else self.condition_came
        return slots.stored_k.read(0, end, rows), slots.stored_v.read(0, end, rows)

    def held(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and bias of all that is here, as :meth:`update` returns them.

        Args:
            rows: some of its rows; None: all.
            dtype: of keys and values; None: the cache's.
        """
        rows = self.rows if rows is None else rows
        keys, values, bias = self.slots.held(rows, dtype)
        return keys, values, self._hiding(bias, rows)

    def _hiding(self, bias: Tensor | None, rows: slice) -> Tensor | None:
        """A bias of these rows, and of what the newest tokens must not see."""
        if (hidden := self.slots.hidden) is None:
            return bias
        return hidden[rows] if bias is None else hidden[rows] + bias

    def _selection(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and bias of condition, prefix, the chosen, and local (Eqs. 1-5)."""
        slots = self.slots
        chosen = slots.chosen()
        if slots.attention is not None:
            self._seen = chosen
        condition = torch.arange(slots.condition_slots, device=slots.device).expand(*chosen.shape[:2], -1)
        index = torch.cat([condition, chosen + slots.condition_slots], dim=-1)
        bias = None if slots.bias is None else slots.bias[..., : index.shape[2]]  # image slots all have bias 0
        return slots.stored_k.pick(index), slots.stored_v.pick(index), bias

    def _looped(self, q: Tensor, k: Tensor, v: Tensor, compares: bool) -> Tensor:
        """Tokens into their slots, and attention to all that is here, by a CPU's loops; with similarities, if it
        ``compares``."""
        slots, rows, new, weights = self.slots, self.rows, None, None
        if k.shape[2] == 1:
            new = slots.written(k, v, rows)
        else:  # of an order, which never compares here
            self._write(k, v)
        keys, values, bias = slots.as_written(rows)
        if (bias := self._hiding(bias, rows)) is not None:
            bias = bias.float()
        if slots.attention is not None:
            weights = q.new_empty(
                slots.batch, slots.groups, q.shape[2], slots.reach - slots.condition_slots, dtype=torch.float32
            )
        comparison = slots.comparison(rows) if compares else None
        out = slots.loops.attend(
            q, keys, values, bias, first=slots.condition_slots, new=new, comparison=comparison, weights=weights
        )
        if weights is not None:
            self._note_weights(weights, None, rows)
        return out

    def _read_once(self, q: Tensor, k: Tensor, v: Tensor, compares: bool) -> Tensor:
        """As :meth:`_looped`, by PyTorch's operations."""
        slots = self.slots
        self._write(k, v)
        if compares:
            slots.join(self.rows)

        def read(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            rows = self._rows_of(part)
            keys, values, bias = self.held(rows, slots.wide)
            if compares:
                slots.multiply(rows, keys, values)
            return keys, values, bias

        return self._weighed(q, slots.reach, read, compares)

    def _rows_of(self, part: slice) -> slice:
        """Some of this layer's rows among those of all layers."""
        return slice(self.rows.start + part.start, self.rows.start + part.stop)

    def _weighed(
        self,
        q: Tensor,
        length: int,
        read: Callable[[slice], tuple[Tensor, Tensor, Tensor | None]],
        compares: bool = False,
    ) -> Tensor:
        """Attention of the tokens that came in last, in float32 or wider. Rounded scores would be off by percents.

        A CPU makes keys and values of half precision or integers wide a few rows at a time, while its caches hold them.

        Args:
            q: as of :meth:`attend`.
            length: slots.
            read: keys, values and bias of some rows, as :meth:`update` returns them.
            compares: whether that does more with them.
        """
        slots, of = self.slots, self.slots.stored_k
        where, self._seen = self._seen, None
        heads, wide = of.heads, torch.promote_types(of.dtype, torch.float32)
        queries, shared = q.shape[2], q.shape[1] // heads
        scaled = q.unflatten(1, (heads, shared)).flatten(2, 3).to(wide) * q.shape[-1] ** -0.5  # [B, H, Hq / H * S, D]

        def attended(part: slice) -> Tensor:
            keys, values, bias = read(part)
            scores = (scaled[part] @ keys.to(wide).mT).unflatten(2, (shared, queries))
            if bias is not None:
                scores = scores + bias.unsqueeze(2)
            weights = scores.softmax(-1)  # [rows, H, Hq / H, S, C + N]
            if slots.attention is not None:
                seen = weights[..., slots.condition_slots :].sum(2)  # [rows, H, S, N]
                seen = seen.sum(1, keepdim=True) if slots.groups == 1 else seen
                self._note_weights(seen, None if where is None else where[part], self._rows_of(part))
            out = weights.flatten(2, 3).to(slots.wide) @ values.to(slots.wide)
            return out.unflatten(2, (shared, queries)).flatten(1, 2).to(q.dtype)

        if not slots.on_cpu or (of.parts[0].dtype == wide and not compares):
            return attended(slice(0, slots.batch))
        return slots.in_parts(attended, heads * length * q.shape[3], slots.batch, once=True)

    def _note_weights(self, weights: Tensor, where: Tensor | None, rows: slice) -> None:
        """Put weights on record, ``[rows, G, S, N]``."""
        queries = weights.shape[2]
        for index, of_query in enumerate(weights.unbind(2)):
            self.slots.attention.add(self.slots.clock, queries - index, of_query, where, rows)

    def _condition_mask(self, q: Tensor) -> Tensor | None:
        """bool ``[B, 1, T, T]``: causal, padding seen by nobody but itself. None if there is nothing to mask."""
        length = q.shape[2]
        if length == 1:
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if self.slots.valid is None:
            return causal
        return (causal & self.slots.valid[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=q.device)


class KVCache:
    """One :class:`LayerCache` per layer.

    Args:
        config, shape: as :class:`~adsa.slots.Slots` takes them.
        n_layer: how many layers.
    """

    def __init__(self, config: CacheConfig, *, n_layer: int, **shape):
        self.config = config
        if config.mode == "select":  # the choice depends on the newest token, so each layer waits for its own
            self.layers = [LayerCache(Slots(config, **shape)) for _ in range(n_layer)]
        else:
            shared = Slots(config, layers=n_layer, **shape)
            self.layers = [LayerCache(shared, layer) for layer in range(n_layer)]

    @property
    def _all(self) -> list[Slots]:
        return list(dict.fromkeys(layer.slots for layer in self.layers))

    @property
    def batch(self) -> int:
        """Rows, both halves of guidance included."""
        return self.layers[0].slots.batch

    @property
    def max_tokens(self) -> int:
        """Image tokens that it was made for."""
        return self.layers[0].slots.max_tokens

    @property
    def order(self) -> Order | None:
        """That which it was made for; None: raster order."""
        return self.layers[0].slots.order

    def expect(self, places: Sequence[int], held: Collection[int], positions: Tensor) -> None:
        """Before each pass of a cache with an :class:`~adsa.order.Order`: where the tokens that come in next belong.

        Args:
            places: their raster positions, ascending.
            held: those of these that the token only holds until the place's own comes.
            positions: ``places`` as an int tensor on the device.

        Raises:
            ValueError: for more than the order allows.
        """
        self.layers[0].slots.expect(places, held, positions)

    @property
    def fixed(self) -> bool:
        """Whether its steps can be recorded."""
        return self.layers[0].slots.fixed

    @property
    def slots(self) -> int:
        """Image tokens that a step attends to at most."""
        return self.layers[0].slots.budget

    @property
    def used(self) -> bool:
        """Whether any token has come in."""
        return self.layers[0].used

    @property
    def condition_slots(self) -> int:
        """Slots that the condition takes, beside the budget."""
        return self.layers[0].slots.condition_slots

    def tensors(self) -> list[Tensor]:
        """Everything that grows with rows or slots and lasts, but for scores that one step may leave for the next."""
        return [tensor for slots in self._all for tensor in slots.tensors().values()]

    def nbytes(self) -> int:
        """Bytes really allocated for :meth:`tensors`, by the storages behind them, bookkeeping included."""
        storages = [tensor.untyped_storage() for tensor in self.tensors()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def kv_nbytes(self) -> int:
        """Bytes of keys and values alone: 2 * layers * B * H * (C + slots in memory) * bytes of a vector, which are D *
        bytes per number, or what :mod:`adsa.storage` says."""
        return sum(tensor.nbytes for slots in self._all for tensor in slots.kv_tensors().values())

    def phase(self) -> tuple | None:
        """Of a fixed cache, what the operations of the next token's step depend on; None: on what no other step has."""
        return self.layers[0].slots.phase()

    def tick(self) -> None:
        """A step was played that had been recorded in this :meth:`phase`: take note of it on the host."""
        self.layers[0].slots.tick()
        for layer in self.layers:
            layer.count += 1

    def reset(self, valid: Tensor | None = None) -> None:
        """Forget all tokens, and be as new, in the same memory.

        Args:
            valid: of the next ones, as the cache was made with.

        Raises:
            ValueError: given to a cache that was made without, or not to one that was made with it.
        """
        for slots in self._all:
            slots.reset(valid)
        for layer in self.layers:
            layer.condition_came = layer.count = 0

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first ``rows`` rows of the batch, as when guidance ends."""
        for slots in self._all:
            slots.keep_rows(rows)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and bias is not None and bias.ndim == 4 and bias.shape[1] > 1:
        bias = bias.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=shared > 1)
