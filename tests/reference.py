"""A slow, literal decoder to hold the project's caches to: NumPy, float64, one row, one head, one token at a time.

Written from the definitions (reference formulas of the paper and of LlamaGen) without any of the code under test.
Similarities are the quadratic matrix of Eq. 2; a cache is a Python list of (position, key, value).
"""

import numpy as np

TIE = 1e-8  # scores closer than this count as equal


def mean_similarity(vectors: list[np.ndarray]) -> np.ndarray:
    """Eqs. 2 and 3, by the whole matrix."""
    unit = np.array([v / np.linalg.norm(v) for v in vectors])
    return (unit @ unit.T).mean(axis=1)


def hashed(position: int, head: int) -> float:
    x = position + 2**18 * (head + 1)
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return (x ^ (x >> 16)) / 2**32


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Of two keys, ``[heads, D]``; of a head at least a thousandth of what the squares of its two keys add up to."""
    squares = [max(np.sum((a - b) ** 2), (a @ a + b @ b) / 1024) for a, b in zip(one, other, strict=True)]
    return np.sqrt(np.sum(squares))


def merging_cost(cached: list[int], chooser: "Choice") -> np.ndarray:
    """ln of the largest odds that a query of the last line gives each token, times how far its key is from the nearest.

    The nearest of those that take others in; for the twice as many tokens as a ranking names that have the least odds.
    The others come after these.
    """
    odds, first = [], len(chooser.conditions)
    for part in range(len(chooser.heads)):
        for query in (query for queries in chooser.queries[-chooser.columns :] for query in queries[part]):
            weights = chooser.attention_of(query, part, cached)[0][first:]
            odds.append(weights / np.maximum(1 - weights, 1e-4))
    odds = dict(zip(cached, np.max(odds, axis=0), strict=True))
    p = len(chooser.values) - 1
    free = [j for j in cached[chooser.prefix :] if j <= p - chooser.local and j not in chooser.stand_ins]
    few = sorted(free, key=odds.get)[: 2 * max(chooser.renew_every, chooser.width, len(cached) - chooser.budget)]
    here = p + (chooser.mode == "select")
    stay = [j for j in cached if j not in few and j not in chooser.stand_ins]
    stay = [j for j in stay if j < here - chooser.columns] or stay
    worth = {j: 1000 + np.log(odds[j]) for j in cached}
    for i in few:
        nearest = min(distance(chooser.keys[i], chooser.keys[j]) for j in stay)
        worth[i] = np.log(odds[i]) + np.log(nearest)
    return np.array([worth[j] for j in cached])


def redundancy(policy: str, cached: list[int], chooser: "Choice") -> np.ndarray:
    """How willingly a policy lets go of each cached token before the newest is attended to, higher = sooner."""
    values, keys = [chooser.values[j].ravel() for j in cached], [chooser.keys[j].ravel() for j in cached]
    newest, columns, seen = len(chooser.values) - 1, chooser.columns, chooser.attention
    here, places = chooser.places[newest], [chooser.places[j] for j in cached]
    window = {"tova": 1, "r_kv": 8, "snapkv": 32}.get(policy, 0)  # the last queries; 0: all
    mass = np.array([sum(a.get(j, 0) for a in seen[-window:]) for j in cached])
    if policy == "adsa":
        return mean_similarity(values)
    if policy == "adsa_plus":
        return -merging_cost(cached, chooser)
    if policy == "adsa_inverse":
        return -mean_similarity(values)
    if policy in ("window", "streaming"):
        return -np.array(cached, dtype=float)
    if policy == "random":
        return -np.array([hashed(j, chooser.heads[0]) for j in places])
    if policy == "uniform":
        return np.array([float(int(f"{j:032b}"[::-1], 2)) for j in places]) / 2**32
    if policy == "neighborhood":
        rows, across = np.divmod(places, columns)
        return (rows - here // columns) ** 2 + (across - here % columns) ** 2.0
    if policy in ("h2o", "tova", "snapkv"):
        return -mass
    if policy == "keydiff":
        return mean_similarity(keys)
    if policy == "knorm":
        return -np.round(2**16 / np.linalg.norm(keys, axis=1)) / 2**16
    if policy == "r_kv":
        return 0.9 * softmax(mean_similarity(keys)) - 0.1 * mass / mass.sum()
    if policy == "lines":
        worth = {}
        for line in {j // columns for j in places}:
            members = [i for i, j in enumerate(places) if j // columns == line]
            came = {j for j in chooser.places[:newest] if j // columns == line}
            worth[line] = np.mean([mass[i] / max(1, newest - cached[i]) for i in members])
            worth[line] -= 1000 * (len(members) < len(came))
        return -np.array([worth[j // columns] for j in places])
    raise ValueError(policy)


def by_worth(scores: np.ndarray, positions: list[int], highest_first: bool) -> list[int]:
    """Positions in order of their scores; those that tie in order of position."""
    remaining = dict(zip(positions, scores, strict=True))
    order = []
    while remaining:
        best = max(remaining.values()) if highest_first else min(remaining.values())
        tied = [position for position, score in remaining.items() if abs(score - best) < TIE]
        order.append(min(tied))
        del remaining[order[-1]]
    return order


class Choice:
    """The tokens that one chooser (a head, or all heads of a layer) keeps, step by step, by number of arrival.

    Keeps the whole history of keys, values, raster places and attention; ``cached`` is what an evicting cache still
    holds.
    """

    def __init__(self, policy, budget, prefix, local, mode, renew_every, merge=False, *, heads, columns, width=1):
        self.merge, self.heads = merge, heads
        self.numbers = []  # of tokens that each stands for
        self.queries, self.conditions = [], []  # [its heads, queries of one, D]; (key, value) [its heads, D] each
        self.policy, self.budget, self.prefix, self.local = policy, budget, prefix, local
        self.mode, self.renew_every, self.columns, self.width = mode, renew_every, columns, width
        self.keys, self.values, self.places = [], [], []
        self.attention = []  # {arrival: weight} of each query
        self.stand_ins = set()  # arrivals that wait for the place's own token
        self.cached, self.queue, self.chosen, self.rankings = [], [], [], 0

    def enter(self, tokens) -> list[int]:
        """Tokens come in at once: (key, value, place, stands in) each. Which may their queries see?"""
        waiting = [self.places[j] for j in self.stand_ins]
        fresh = sum(place not in waiting for _, _, place, _ in tokens)
        surplus = len(self.cached) + fresh - self.budget
        for index, (key, value, place, stands_in) in enumerate(tokens):
            p = len(self.values)
            self.keys.append(key)
            self.values.append(value)
            self.places.append(place)
            self.numbers.append(1)
            if index == 0 and self.mode == "evict" and surplus > 0 and self.policy != "full":
                victims = self.victims(surplus)
            own = [j for j in self.stand_ins if self.places[j] == place]
            if stands_in:
                self.stand_ins.add(p)
            if own:
                self.stand_ins -= set(own)
                self.cached[self.cached.index(own[0])] = p
                continue
            if self.mode == "evict" and self.policy != "full" and len(self.cached) == self.budget:
                victim, target = victims.pop(0)
                self.cached.remove(victim)
                if self.merge:
                    self.join(victim, target)
            self.cached.append(p)
        return self.selected(p) if self.mode == "select" and self.policy != "full" else list(self.cached)

    def attention_of(self, query, part, visible):
        """Weights of the condition tokens and of these, and their values."""
        tokens = self.conditions + [(self.keys[j], self.values[j]) for j in visible]
        numbers = np.array([1] * len(self.conditions) + [self.numbers[j] for j in visible])
        scores = np.array([query @ key[part] for key, _ in tokens]) / np.sqrt(len(query)) + np.log(numbers)
        return softmax(scores), np.array([value[part] for _, value in tokens])

    def join(self, victim: int, target: int) -> None:
        """One token stands for two: the mean of both, by the numbers that they stand for, and all their attention."""
        n, m = self.numbers[victim], self.numbers[target]
        for x in (self.keys, self.values):
            x[target] = (n * x[victim] + m * x[target]) / (n + m)
        self.numbers[target] = n + m
        for weights in self.attention:
            weights[target] = weights.get(target, 0) + weights.pop(victim, 0)

    def victims(self, count: int) -> list[tuple[int, int | None]]:
        """Of those that were there before the newest, and what each is merged into.

        One ranking serves several steps, and at least one.
        """
        p = len(self.values) - 1
        most = max(self.renew_every, self.width)
        if most - len(self.queue) >= self.renew_every or len(self.queue) < count:
            scores = redundancy(self.policy, self.cached, self)
            previous = [j for j in self.cached[self.prefix :] if j <= p - self.local and j not in self.stand_ins]
            scores = np.array([scores[self.cached.index(j)] for j in previous])
            leaving = by_worth(scores, previous, highest_first=True)[:most]
            stay = [j for j in self.cached if j not in leaving and j not in self.stand_ins]
            stay = [j for j in stay if j < p - self.columns] or stay
            nearest = [min(stay, key=lambda j, i=i: distance(self.keys[i], self.keys[j])) for i in leaving]
            self.queue = list(zip(leaving, nearest, strict=True))
        found, self.queue = self.queue[:count], self.queue[count:]
        return found

    def selected(self, p: int) -> list[int]:
        if p + 1 <= self.budget:
            return list(range(p + 1))
        if self.rankings % self.renew_every == 0:
            history = list(range(p + 1))
            scores = redundancy(self.policy, history, self)
            previous = [j for j in history if self.prefix <= j <= p - self.local]
            order = by_worth(scores[previous], previous, highest_first=False)
            self.chosen = order[: self.budget - self.prefix - self.local]
        self.rankings += 1
        return list(range(self.prefix)) + self.chosen + list(range(p - self.local + 1, p + 1))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


class Attention:
    """One layer's attention for one row.

    Args:
        n_head, n_kv_head: heads of queries; of keys and values.
        columns: image tokens in a line.
        choice: keyword arguments of :class:`Choice`.
        granularity: "head" or "layer".
    """

    def __init__(self, n_head, n_kv_head, columns, choice, granularity):
        self.n_head, self.n_kv, self.shared = n_head, n_kv_head, n_head // n_kv_head
        heads = [[head] for head in range(n_kv_head)] if granularity == "head" else [list(range(n_kv_head))]
        self.choices = [Choice(**choice, heads=mine, columns=columns) for mine in heads]
        self.conditions = []  # values [H, D] of valid condition tokens

    def condition(self, v, k=None):
        """``[Hq, D]`` of one condition token where queries and keys are zero, as LlamaGen's: the mean over them so far.

        ``k``: None where they are. ``v`` and it: ``[H, D]``.
        """
        k = np.zeros_like(v) if k is None else k
        self.conditions.append(v)
        for chooser in self.choices:
            chooser.conditions.append((k[chooser.heads], v[chooser.heads]))
        return np.repeat(np.mean(self.conditions, axis=0), self.shared, axis=0)

    def images(self, tokens):
        """``[Hq, D]`` of each of the tokens that come at once: (q ``[Hq, D]``, k, v ``[H, D]``, place, stands in)."""
        outs = [np.zeros_like(q) for q, *_ in tokens]
        for chooser in self.choices:
            mine = chooser.heads
            seen = chooser.enter([(k[mine], v[mine], place, stands_in) for _, k, v, place, stands_in in tokens])
            for (q, _, _, place, _), out in zip(tokens, outs, strict=True):
                visible, record = [j for j in seen if chooser.places[j] <= place], {}
                queries = q.reshape(self.n_kv, self.shared, -1)[mine]
                for part, head in enumerate(mine):
                    for index, query in enumerate(queries[part]):
                        weights, values = chooser.attention_of(query, part, visible)
                        out[head * self.shared + index] = weights @ values
                        for j, weight in zip(visible, weights[len(self.conditions) :], strict=True):
                            record[j] = record.get(j, 0) + weight
                chooser.attention.append(record)
            chooser.queries += [q.reshape(self.n_kv, self.shared, -1)[mine] for q, *_ in tokens]
        return outs


class Decoder:
    """LlamaGen's transformer for one row.

    Args:
        state: name -> float64 array, LlamaGen's names.
        n_head, n_kv_head, grid: shape of the attention, and tokens per row of the image.
        choice, granularity: as :class:`Attention` takes them.
    """

    def __init__(self, state, n_head, n_kv_head, grid, choice, granularity):
        self.w, self.n_head, self.n_kv, self.grid = state, n_head, n_kv_head, grid
        self.dim = state["tok_embeddings.weight"].shape[1]
        self.head_dim = self.dim // n_head
        self.n_layer = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        self.attention = [Attention(n_head, n_kv_head, grid, choice, granularity) for _ in range(self.n_layer)]

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean() + 1e-5) * self.w[name]

    def rotate(self, x, position):
        """``[H, D]`` at an image position; row frequencies in the first half of the head, column's in the second."""
        half = self.head_dim // 2
        freq = (10000.0 ** -(np.arange(0, half, 2, dtype=np.float32) / half)).astype(np.float32)
        row, column = divmod(position, self.grid)
        angle = np.concatenate([row * freq, column * freq]).astype(np.float32)
        cos, sin = np.cos(angle).astype(float), np.sin(angle).astype(float)
        out = np.empty_like(x)
        out[:, 0::2] = x[:, 0::2] * cos - x[:, 1::2] * sin
        out[:, 1::2] = x[:, 1::2] * cos + x[:, 0::2] * sin
        return out

    def block(self, tokens, i, feeds):
        """Tokens that come at once through one layer; ``feeds``: (place, stands in) of each, or None: a condition's."""
        name = f"layers.{i}."
        ready = []
        for x, feed in zip(tokens, feeds, strict=True):
            qkv = self.w[name + "attention.wqkv.weight"] @ self.norm(x, name + "attention_norm.weight")
            q = qkv[: self.dim].reshape(self.n_head, self.head_dim)
            k, v = qkv[self.dim :].reshape(2, self.n_kv, self.head_dim)
            if feed is not None:
                q, k = self.rotate(q, feed[0]), self.rotate(k, feed[0])
            ready.append((q, k, v, *(feed or ())))
        outs = [self.attention[i].condition(ready[0][2])] if feeds == [None] else self.attention[i].images(ready)
        return [self.rest(x, out, name) for x, out in zip(tokens, outs, strict=True)]

    def rest(self, x, out, name):
        x = x + self.w[name + "attention.wo.weight"] @ out.ravel()
        h = self.norm(x, name + "ffn_norm.weight")
        gate = self.w[name + "feed_forward.w1.weight"] @ h
        hidden = gate / (1 + np.exp(-gate)) * (self.w[name + "feed_forward.w3.weight"] @ h)
        return x + self.w[name + "feed_forward.w2.weight"] @ hidden

    def step(self, tokens, feeds):
        """Embeddings in, logits for the token after each out."""
        for i in range(self.n_layer):
            tokens = self.block(tokens, i, feeds)
        return [self.w["output.weight"] @ self.norm(x, "norm.weight") for x in tokens]


def zipar(columns, lines, window, unsure=()):
    """ZipAR by its rule, pass by pass: lists of (place, place whose token goes in there, place drawn or None).

    The second row begins when the first is whole, another when the row above has ``window`` tokens more; but not while
    the place of its first token is in ``unsure``.
    """
    drawn = [1] + [0] * (lines - 1)
    waiting = []
    while drawn[-1] < columns:
        feeds, before = [], list(drawn)
        ends = [r for r in range(lines) if before[r] == columns]
        for place in [p for p in waiting if before[p // columns] == columns]:
            waiting.remove(place)
            feeds.append((place, place, None))
        for r in range(lines):
            may = r == 0 or before[r - 1] >= (columns if r == 1 else window)
            if before[r] == columns or not (before[r] or may):
                continue
            place = r * columns + before[r] - 1
            source = place
            if before[r] == 0 and r - 1 not in ends:
                source = ends[-1] * columns + columns - 1
                waiting = [p for p in waiting if p != place] + [place]
            elif before[r] == 0 and (place, place, None) in feeds:
                feeds.remove((place, place, None))
            feeds.append((place, source, place + 1))
            drawn[r] += 1
        yield sorted(feeds)
        for place in unsure:
            drawn[place // columns] = 0


class Image:
    """One class-conditional image, with or without guidance.

    Args:
        cfg_scale, uniform: as :func:`decode` takes them.
        passes: of the schedule, for the most tokens that come at once.
        decoder: the other arguments of :class:`Decoder`.
    """

    def __init__(self, state, label, *, cfg_scale, uniform, passes, **decoder):
        null = len(state["cls_embedding.embedding_table.weight"]) - 1
        self.state, self.cfg_scale, self.uniform, self.tokens = state, cfg_scale, uniform, {}
        labels = [label, null] if cfg_scale > 1 else [label]
        self.rows = [Decoder(state, **decoder) for _ in labels]
        for chooser in (c for row in self.rows for layer in row.attention for c in layer.choices):
            chooser.width = max(map(len, passes))
        embeddings = [state["cls_embedding.embedding_table.weight"][c] for c in labels]
        first = [row.step([x], [None])[0] for row, x in zip(self.rows, embeddings, strict=True)]
        self.tokens[0] = self.drawn(self.distribution(first), 0)

    def distribution(self, logits):
        logits = logits[0] if len(logits) == 1 else logits[1] + (logits[0] - logits[1]) * self.cfg_scale
        return softmax(logits) if self.uniform is not None else (np.arange(len(logits)) == np.argmax(logits)) * 1.0

    def drawn(self, probabilities, number):
        u = 0.0 if self.uniform is None else self.uniform[number]
        return int(np.searchsorted(np.cumsum(probabilities), u * probabilities.sum(), side="right"))

    def step(self, feeds):
        """One pass: {place drawn: its distribution}."""
        embeddings = [self.state["tok_embeddings.weight"][self.tokens[source]] for _, source, _ in feeds]
        flags = [(place, place != source) for place, source, _ in feeds]
        logits = [row.step(embeddings, flags) for row in self.rows]
        return {
            target: self.distribution([of_row[index] for of_row in logits])
            for index, (_, _, target) in enumerate(feeds)
            if target is not None
        }


def decode(
    state, label, steps, *, n_head, n_kv_head, grid, choice, granularity, cfg_scale=1.0, uniform=None, window=None
):
    """Tokens of one class-conditional image: greedy, or by the numbers of ``uniform`` through the inverse CDF."""
    shape = {"n_head": n_head, "n_kv_head": n_kv_head, "choice": choice, "granularity": granularity, "grid": grid}
    raster = [[(p, p, p + 1)] for p in range(steps - 1)]
    passes = raster if window is None else list(zipar(grid, steps // grid, window))
    image = Image(state, label, cfg_scale=cfg_scale, uniform=uniform, passes=passes, **shape)
    for feeds in passes:
        for place, probabilities in image.step(feeds).items():
            image.tokens[place] = image.drawn(probabilities, place)
    return [image.tokens[place] for place in range(steps)]


def decode_adaptively(
    state, labels, steps, *, n_head, n_kv_head, grid, choice, granularity, cfg_scale=1.0, uniform=None, window
):
    """Tokens of images that are decoded together by ZipAR with an adaptive window, and the number of passes.

    ``uniform`` holds ``3 * steps`` numbers for each image: for the draws, the tests, and what is drawn anew.
    """
    shape = {"n_head": n_head, "n_kv_head": n_kv_head, "choice": choice, "granularity": granularity, "grid": grid}
    least = list(zipar(grid, steps // grid, window))
    images = [
        Image(state, label, cfg_scale=cfg_scale, uniform=numbers, passes=least, **shape)
        for label, numbers in zip(labels, uniform or [None] * len(labels), strict=True)
    ]
    unsure, count, tests, before, passed = set(), 1, {}, {}, {}
    for feeds in zipar(grid, steps // grid, window, unsure):
        count += 1
        early = {target for place, source, target in feeds if place != source}
        for number, image in enumerate(images):
            for place, now in image.step(feeds).items():
                if (number, place) not in before:
                    image.tokens[place] = image.drawn(now, place)
                elif not passed[number, place]:
                    token, old = image.tokens[place], before[number, place]
                    index = place + tests[place] + 1
                    test = 0.5 if image.uniform is None else image.uniform[steps + index]
                    passed[number, place] = bool(test < min(1, now[token] / old[token]))
                    if not passed[number, place]:
                        image.tokens[place] = image.drawn(np.maximum(now - old, 0), 2 * steps + index)
                if place in early:
                    before[number, place] = now
                    passed.setdefault((number, place), False)
        tests = {place: tests.get(place, -1) + 1 for place in early}
        unsure.clear()
        unsure |= {p for p in early if not all(passed[number, p] for number in range(len(images)))}
    return [[image.tokens[place] for place in range(steps)] for image in images], count
