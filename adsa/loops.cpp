// A CPU's loops over keys and values, which are read once and as they lie in memory. adsa/loops.py calls them.
//
// HEAD_DIM is D. FORMAT is one of the classes below, by which a vector of D numbers is read from a slot's parts.
// A slot's number counts from the first slot of the first row and head; parts have no gaps between slots.

#include <vector>

#include "vectors.h"

constexpr int D = HEAD_DIM, VECTORS = D / LANES;
static_assert(VECTORS % 2 == 0, "vectors are read two at a time");

typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(1)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

namespace {  // of this library alone: others in the process have another D, or another FORMAT

// A head's vector. A format's BYTES are those of its parts. Where PAIRED, every two of them hold 2 * LANES numbers, the even ones and then the odd ones: so they
// come out of memory without being put in order, and products don't care.
struct Wide {
    Floats x[VECTORS];
};

static inline float from_half(uint16_t bits) {
    const uint32_t scaled = uint32_t(bits & 0x7fff) << 13 | uint32_t(bits & 0x8000) << 16;
    float value;
    std::memcpy(&value, &scaled, 4);
    return value * 0x1p112f;  // of finite numbers, subnormal ones as well
}

struct Float32 {
    static constexpr bool PAIRED = false;
    static constexpr int64_t BYTES[] = {4 * D};
    const float* x;
    Float32(const void* const* parts) : x(static_cast<const float*>(parts[0])) {}
    Wide operator[](int64_t slot) const { return load<Wide>(x + slot * D); }
};

struct BFloat16 {
    static constexpr bool PAIRED = true;
    static constexpr int64_t BYTES[] = {2 * D};
    const uint16_t* x;
    BFloat16(const void* const* parts) : x(static_cast<const uint16_t*>(parts[0])) {}
    Wide operator[](int64_t slot) const {
        Wide wide;
        for (int i = 0; i < VECTORS; i += 2) {
            const Ints pairs = load<Ints>(x + slot * D + i * LANES);
            wide.x[i] = (Floats)(pairs << 16);
            wide.x[i + 1] = (Floats)(pairs & int32_t(0xffff0000));
        }
        return wide;
    }
};

struct Int8 {
    static constexpr bool PAIRED = true;
    static constexpr int64_t BYTES[] = {D, 2};
    const int8_t* codes;
    const uint16_t* steps;
    Int8(const void* const* parts)
        : codes(static_cast<const int8_t*>(parts[0])), steps(static_cast<const uint16_t*>(parts[1])) {}
    Wide operator[](int64_t slot) const {
        Wide wide;
        const float step = from_half(steps[slot]);
        for (int i = 0; i < VECTORS; i += 2) {
            const Ints pairs = __builtin_convertvector(load<Shorts>(codes + slot * D + i * LANES), Ints);
            wide.x[i] = __builtin_convertvector((pairs << 24) >> 24, Floats) * step;
            wide.x[i + 1] = __builtin_convertvector(pairs >> 8, Floats) * step;
        }
        return wide;
    }
};

struct Int4 {
    static constexpr bool PAIRED = true;
    static constexpr int GROUP = 32;
    static constexpr int64_t BYTES[] = {D / 2, D / GROUP * 2, D / GROUP * 2};
    const uint8_t* pairs;
    const uint16_t *lows, *steps;
    Int4(const void* const* parts)
        : pairs(static_cast<const uint8_t*>(parts[0])),
          lows(static_cast<const uint16_t*>(parts[1])),
          steps(static_cast<const uint16_t*>(parts[2])) {}
    Wide operator[](int64_t slot) const {
        Wide wide;
        for (int i = 0; i < VECTORS; i += 2) {
            const int64_t group = (slot * D + i * LANES) / GROUP;
            const float low = from_half(lows[group]), step = from_half(steps[group]);
            const Ints both = __builtin_convertvector(load<Bytes>(pairs + (slot * D + i * LANES) / 2), Ints);
            wide.x[i] = __builtin_convertvector(both >> 4, Floats) * step + low;
            wide.x[i + 1] = __builtin_convertvector(both & 15, Floats) * step + low;
        }
        return wide;
    }
};

using Format = FORMAT;

}  // namespace

// Where number d of a vector lies in a Wide.
static inline int place(int d) {
    const int pair = d / (2 * LANES) * (2 * LANES), in = d % (2 * LANES);
    return Format::PAIRED ? pair + in / 2 + in % 2 * LANES : d;
}

static inline Wide arranged(const float* x) {
    float y[D];
    for (int d = 0; d < D; d++) y[place(d)] = x[d];
    return load<Wide>(y);
}

static inline Floats products(const Wide& a, const Wide& b) {
    Floats sum = a.x[0] * b.x[0];
    for (int i = 1; i < VECTORS; i++) sum += a.x[i] * b.x[i];
    return sum;
}

// In each run of 2 * HALF lanes, sums of lanes HALF apart: those of a, then those of b.
template <int HALF>
static inline Floats halves(Floats a, Floats b) {
    Ints left, right;
    for (int lane = 0; lane < LANES; lane++) {
        const int run = lane / (2 * HALF) * (2 * HALF), in = lane % (2 * HALF);
        left[lane] = run + in % HALF + (in < HALF ? 0 : LANES);
        right[lane] = left[lane] + HALF;
    }
    return __builtin_shuffle(a, b, left) + __builtin_shuffle(a, b, right);
}

// The sum of each vector's lanes, of LANES vectors: with fewer instructions than one after the other.
template <int HALF = LANES / 2>
static inline Floats sums(Floats* x) {
    for (int i = 0; i < HALF; i++) x[i] = halves<HALF>(x[i], x[i + HALF]);
    if constexpr (HALF == 1)
        return x[0];
    else
        return sums<HALF / 2>(x);
}

static inline float sum(Floats x) {
    float all = 0;
    for (int lane = 0; lane < LANES; lane++) all += x[lane];
    return all;
}

// use(n, m) for n = 0, LANES, 2 * LANES ..., with m tokens from there on: a constant, but for the last ones.
template <class Use>
static inline void in_blocks(int64_t count, Use use) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) use(n, std::integral_constant<int, LANES>());
    if (n < count) use(n, int(count - n));
}

// Products of a vector with LANES slots, or as many as there are.
template <class Vectors, class Many>
static inline void multiply_block(const Vectors& x, int64_t slot, Many many, const Wide& vector, float* found) {
    Floats each[LANES] = {};
    for (int s = 0; s < many; s++) each[s] = products(vector, x[slot + s]);
    const Floats all = sums(each);
    std::memcpy(found, &all, sizeof all);
}

// Products of a vector with all slots.
template <class Vectors>
static inline void multiply(const Vectors& x, int64_t slot, int64_t count, const Wide& vector, float* found) {
    in_blocks(count, [&](int64_t n, auto many) { multiply_block(x, slot + n, many, vector, found + n); });
}

// The sum of all slots by weights; and products of them with another vector.
template <bool COMPARE>
static inline Wide mixed(
    const Format& x, int64_t slot, int64_t count, const float* weights, const Wide& other, float* dots) {
    Wide mix = {};
    in_blocks(count, [&](int64_t n, auto many) {
        Floats each[LANES] = {};
        for (int s = 0; s < many; s++) {
            const Wide one = x[slot + n + s];
            for (int i = 0; i < VECTORS; i++) mix.x[i] += weights[n + s] * one.x[i];
            if (COMPARE) each[s] = products(other, one);
        }
        if (COMPARE) {
            const Floats all = sums(each);
            std::memcpy(dots + n, &all, sizeof all);
        }
    });
    return mix;
}

// Scores to weights, but for a factor: the inverse of what is returned.
static inline float exponentials(float* score, const float* bias, int64_t count) {
    float most = -INFINITY, all = 0;
    if (bias)
        for (int64_t n = 0; n < count; n++) score[n] += bias[n];
#pragma omp simd reduction(max : most)
    for (int64_t n = 0; n < count; n++) most = std::max(most, score[n]);
#pragma omp simd reduction(+ : all)
    for (int64_t n = 0; n < count; n++) {
        score[n] = exponential(score[n] - most);
        all += score[n];
    }
    return all;
}

// Of a query's numbers, or of an output's, which are float32 or bfloat16.
static inline Wide query(const void* q, bool half, int64_t at, float scale) {
    float x[D];
    const auto* const narrow = static_cast<const uint16_t*>(q) + at;
    if (half)
        for (int d = 0; d < D; d++) x[d] = from_bfloat16(narrow[d]) * scale;
    else
        for (int d = 0; d < D; d++) x[d] = static_cast<const float*>(q)[at + d] * scale;
    return arranged(x);
}

static inline void put_out(void* out, bool half, int64_t at, const Wide& mix, float divisor) {
    float x[D];
    std::memcpy(x, &mix, sizeof x);
    auto* const narrow = static_cast<uint16_t*>(out) + at;
    if (half)
        for (int d = 0; d < D; d++) narrow[d] = to_bfloat16(x[place(d)] / divisor);
    else
        for (int d = 0; d < D; d++) static_cast<float*>(out)[at + d] = x[place(d)] / divisor;
}

// Vector number `from` of new ones becomes vector number `to` of these.
static inline void copy(void* const* parts, int64_t to, const void* const* made, int64_t from) {
    for (size_t part = 0; part < std::size(Format::BYTES); part++) {
        const int64_t bytes = Format::BYTES[part];
        std::memcpy(static_cast<char*>(parts[part]) + to * bytes, static_cast<const char*>(made[part]) + from * bytes, bytes);
    }
}

// Unit vectors of some heads' tokens, one from each, enter the total [heads, D]. slot, head: as of a format.
static inline void count_one(
    const Format& features, int64_t slot, int64_t head, int64_t heads, float* total, float* inverse_norm) {
    float square = 0;
    for (int64_t h = 0; h < heads; h++) {
        const Wide one = features[slot + h * head];
        square += sum(products(one, one));
    }
    const float inverse = square > 0 ? 1 / std::sqrt(square) : 0;
    *inverse_norm = inverse;
    for (int64_t h = 0; h < heads; h++) {
        const Wide one = features[slot + h * head];
        float mine[D], *const sums = total + h * D;
        std::memcpy(mine, &one, sizeof mine);
        for (int d = 0; d < D; d++) sums[d] += mine[place(d)] * inverse;
    }
}

extern "C" {

// Each row r, and group of heads, in turn:
//
// 1. If there are new keys: those of head h, vectors r * new_row + h * new_head of the new parts, go with the values into
//    slot slots[r * groups + g], or where there are no slots, into slot `at`; counted from the first one on. Where
//    similarities are wanted, the unit vector of key (of_keys) or value enters total [rows, heads, D].
// 2. Attention. q: query s of head h of row r begins at r * q_row + h * q_head + s * q_query, in numbers; those of one head
//    of keys follow each other. out: [rows, queries, heads * shared, D], like q bfloat16 (half) or float32. Keys and values
//    of row r, head h: count slots from r * row + h * head on. Added to their scores, q times scale: bias[r * bias_row + h *
//    bias_head + s * bias_query + n], if there is a bias.
// 3. If they are wanted: weights that each query's attention gives to slots from the first one on, [rows, groups, queries,
//    count - first]; similarities of these slots to all that is counted, [rows, groups, count - first], by the inverse
//    norms [rows, groups, norms].
void attend(
    const void* q, int64_t half, int64_t q_row, int64_t q_head, int64_t q_query, float scale, void* out, int64_t rows,
    int64_t heads, int64_t shared, int64_t queries, int64_t groups, int64_t count, int64_t first, int64_t row,
    int64_t head, void* const* key_parts, void* const* value_parts, const float* bias, int64_t bias_row,
    int64_t bias_head, int64_t bias_query, const void* const* new_keys, const void* const* new_values, int64_t new_row,
    int64_t new_head, const int64_t* slots, int64_t at, float* weights, float* similarities, int64_t of_keys,
    float* total, float* inverse_norm, int64_t norms, float tie) {
    const Format keys(key_parts), values(value_parts), &features = of_keys ? keys : values;
    const int64_t together = heads / groups, after = count - first;
    const float steps = 1 / (std::max<int64_t>(1, after) * double(tie));
#pragma omp parallel
    {
        std::vector<float> room(2 * (count + LANES) + after);
        float *const score = room.data(), *const dots = score + count + LANES, *const all_dots = dots + count + LANES;
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t group = r * groups + g, begin = g * together, end = begin + together;
                if (new_keys) {
                    const int64_t slot = slots ? slots[group] : at;
                    for (int64_t h = begin; h < end; h++) {
                        const int64_t to = r * row + h * head + first + slot, from = r * new_row + h * new_head;
                        copy(key_parts, to, new_keys, from);
                        copy(value_parts, to, new_values, from);
                    }
                    if (similarities)
                        count_one(
                            features, r * row + begin * head + first + slot, head, together,
                            total + (r * heads + begin) * D, inverse_norm + group * norms + slot);
                }
                float* const seen = weights ? weights + group * queries * after : nullptr;
                if (seen) std::fill(seen, seen + queries * after, 0.f);
                std::fill(all_dots, all_dots + after, 0.f);
                for (int64_t h = begin; h < end; h++) {
                    const int64_t slot = r * row + h * head;
                    const Wide other = similarities ? arranged(total + (r * heads + h) * D) : Wide{};
                    for (int64_t s = 0; s < shared * queries; s++) {
                        const int64_t which = s / queries, number = s % queries;
                        const Wide mine =
                            query(q, half, r * q_row + (h * shared + which) * q_head + number * q_query, scale);
                        const bool compares = similarities && s == 0;
                        in_blocks(count, [&](int64_t n, auto many) {
                            multiply_block(keys, slot + n, many, mine, score + n);
                            if (compares && of_keys) multiply_block(keys, slot + n, many, other, dots + n);
                        });
                        const int64_t added = r * bias_row + h * bias_head + number * bias_query;
                        const float all = exponentials(score, bias ? bias + added : bias, count);
                        const Wide mix = compares && !of_keys ? mixed<true>(values, slot, count, score, other, dots)
                                                              : mixed<false>(values, slot, count, score, other, dots);
                        put_out(out, half, ((r * queries + number) * heads * shared + h * shared + which) * D, mix, all);
                        if (seen)
                            for (int64_t n = 0; n < after; n++) seen[number * after + n] += score[first + n] / all;
                    }
                    if (similarities)
                        for (int64_t n = 0; n < after; n++) all_dots[n] += dots[first + n];
                }
                if (similarities)
                    for (int64_t n = 0; n < after; n++)
                        similarities[group * after + n] =
                            std::nearbyint(all_dots[n] * inverse_norm[group * norms + n] * steps) * tie;
            }
    }
}

// A token's unit vector enters the total. slots: [rows, groups], or null: slot at for all.
void count_in(
    const void* const* parts, int64_t rows, int64_t heads, int64_t row, int64_t head, int64_t groups,
    const int64_t* slots, int64_t at, float* total, float* inverse_norm, int64_t norms) {
    const Format features(parts);
    const int64_t together = heads / groups;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t slot = slots ? slots[r * groups + g] : at, h = g * together;
            count_one(
                features, r * row + h * head + slot, head, together, total + (r * heads + h) * D,
                inverse_norm + (r * groups + g) * norms + slot);
        }
}

// A token of each row and head goes into slots [rows, groups]: vectors r * new_row + h * new_head of the new parts.
void put(
    void* const* parts, int64_t rows, int64_t heads, int64_t row, int64_t head, int64_t groups, const int64_t* slots,
    const void* const* made, int64_t new_row, int64_t new_head) {
#pragma omp parallel for collapse(2) schedule(static) if (rows * heads > 256)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            copy(
                parts, r * row + h * head + slots[r * groups + h / (heads / groups)], made, r * new_row + h * new_head);
}

// The largest weight that any of q [rows, heads, queries, D] gives to each slot from the first one on: most [rows, heads,
// count - first]. Otherwise as in attend.
void most_weight(
    const float* q, float* most, int64_t rows, int64_t heads, int64_t queries, int64_t count, int64_t row, int64_t head,
    const void* const* parts, const float* bias, int64_t bias_row, int64_t bias_head, int64_t first) {
    const Format keys(parts);
#pragma omp parallel
    {
        std::vector<Wide> wide(count);
        std::vector<float> room(count + LANES);
        float* const score = room.data();
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t h = 0; h < heads; h++) {
                float* const found = most + (r * heads + h) * (count - first);
                const float* const query = q + (r * heads + h) * queries * D;
                const float* const added = bias ? bias + r * bias_row + h * bias_head : nullptr;
                for (int64_t n = 0; n < count; n++) wide[n] = keys[r * row + h * head + n];
                std::fill(found, found + count - first, 0.f);
                for (int64_t i = 0; i < queries; i++) {
                    multiply(wide, 0, count, arranged(query + i * D), score);
                    const float inverse = 1 / exponentials(score, added, count);
                    for (int64_t n = 0; n < count - first; n++)
                        found[n] = std::max(found[n], score[first + n] * inverse);
                }
            }
    }
}

// Of each of tokens [rows, groups, few], which are slots, the nearest among the slots that may be [rows, groups, count]:
// where it is, and the square of the distance, which is at least close times the sum of both squares.
void nearest(
    const void* const* parts, int64_t rows, int64_t heads, int64_t count, int64_t row, int64_t head, int64_t groups,
    const int64_t* tokens, int64_t few, const bool* never, float close, float* distance, int64_t* where) {
    const Format keys(parts);
    const int64_t together = heads / groups;
#pragma omp parallel
    {
        std::vector<Wide> wide(count);
        std::vector<float> room(2 * count + LANES + few * count);
        float *const square = room.data(), *const dots = square + count, *const sums = dots + count + LANES;
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t* const mine = tokens + (r * groups + g) * few;
                std::fill(sums, sums + few * count, 0.f);
                for (int64_t h = g * together; h < (g + 1) * together; h++) {
                    for (int64_t n = 0; n < count; n++) {
                        wide[n] = keys[r * row + h * head + n];
                        square[n] = sum(products(wide[n], wide[n]));
                    }
                    for (int64_t i = 0; i < few; i++) {
                        multiply(wide, 0, count, wide[mine[i]], dots);
                        for (int64_t n = 0; n < count; n++) {
                            const float both = square[mine[i]] + square[n];
                            sums[i * count + n] += std::max(both - 2 * dots[n], both * close);
                        }
                    }
                }
                const bool* const not_here = never + (r * groups + g) * count;
                for (int64_t i = 0; i < few; i++) {
                    float* const mine = sums + i * count;
                    float least = INFINITY;
                    for (int64_t n = 0; n < count; n++) mine[n] = not_here[n] ? INFINITY : mine[n];
#pragma omp simd reduction(min : least)
                    for (int64_t n = 0; n < count; n++) least = std::min(least, mine[n]);
                    const int64_t at = (r * groups + g) * few + i;
                    distance[at] = least;
                    where[at] = std::min<int64_t>(count - 1, std::find(mine, mine + count, least) - mine);
                }
            }
    }
}

// Of each row of scores and of arrivals [rows, count], the slot that adsa.slots ranks first among those that may leave.
void least_worthy(
    const float* score, const int32_t* arrivals, int64_t rows, int64_t count, int64_t arrivals_row,
    const int32_t* number, int64_t prefix, int64_t local, float largest, float fraction, int64_t* found) {
    const int64_t stay = *number - local;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* const mine = score + r * count;
        const int32_t* const arrival = arrivals + r * arrivals_row;
        const auto steps = [&](int64_t n) {  // of the order of scores; those of tokens that stay come last
            const float rounded = std::nearbyint(std::min(std::max(mine[n], -largest), largest) * fraction);
            return arrival[n] > stay ? INFINITY : rounded;
        };
        float least = INFINITY;
        int32_t first = INT32_MAX, slot = 0;
#pragma omp simd reduction(min : least)
        for (int64_t n = prefix; n < count; n++) least = std::min(least, steps(n));
#pragma omp simd reduction(min : first)
        for (int64_t n = prefix; n < count; n++) first = std::min(first, steps(n) == least ? arrival[n] : INT32_MAX);
#pragma omp simd reduction(max : slot)
        for (int64_t n = prefix; n < count; n++) slot = std::max(slot, arrival[n] == first ? int32_t(n) : 0);
        found[r] = slot;
    }
}
}
