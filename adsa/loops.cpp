// A CPU's loops over keys and values, which are read once and as they lie in memory. adsa/loops.py calls them.
//
// HEAD_DIM is D. FORMAT is one of the classes below, by which a vector of D numbers is read from a slot's parts.
// A slot's number counts from the first slot of the first row and head; parts have no gaps between slots.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <numeric>
#include <type_traits>
#include <vector>

#include "vectors.h"

constexpr int D = HEAD_DIM, VECTORS = D / LANES;
constexpr int64_t AHEAD = 6;  // heads, of which memory is told
static_assert(VECTORS % 2 == 0, "vectors are read two at a time");

typedef int16_t Shorts __attribute__((vector_size(2 * LANES), aligned(1)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

namespace {  // of this library alone: others in the process have another D, or another FORMAT

// A head's vector. A format's BYTES are those of its parts. Where PAIRED, every two of them hold 2 * LANES numbers, the
// even ones and then the odd ones: so they come out of memory without being put in order, and products don't care.
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
    float* x;
    Float32(void* const* parts) : x(static_cast<float*>(parts[0])) {}
    Wide operator[](int64_t slot) const { return load<Wide>(x + slot * D); }
};

struct BFloat16 {
    static constexpr bool PAIRED = true;
    static constexpr int64_t BYTES[] = {2 * D};
    uint16_t* x;
    BFloat16(void* const* parts) : x(static_cast<uint16_t*>(parts[0])) {}
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
    Int8(void* const* parts)
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
    Int4(void* const* parts)
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

// A vector goes into a slot. Only adsa.storage writes integers.
template <class F>
static inline void write(F& to, int64_t slot, const Wide& wide) {
    float y[D];
    std::memcpy(y, &wide, sizeof y);
    if constexpr (std::is_same_v<F, Float32>) std::memcpy(to.x + slot * D, y, sizeof y);
    if constexpr (std::is_same_v<F, BFloat16>)
        for (int d = 0; d < D; d++) to.x[slot * D + d] = to_bfloat16(y[place(d)]);
}

// A slot will be read soon, from wherever it lies.
template <class F>
static inline void expect(const F& from, int64_t slot) {
    if constexpr (std::is_same_v<F, Float32> || std::is_same_v<F, BFloat16>)
        for (int64_t byte = 0; byte < F::BYTES[0]; byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(from.x + slot * D) + byte);
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
template <class Many>
static inline void multiply_block(const Format& x, int64_t slot, Many many, const Wide& vector, float* found) {
    Floats each[LANES] = {};
    for (int s = 0; s < many; s++) each[s] = products(vector, x[slot + s]);
    const Floats all = sums(each);
    std::memcpy(found, &all, sizeof all);
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

// Rows of LANES numbers to columns.
template <int HALF = LANES / 2>
static inline void transpose(Floats* x) {
    Ints upper, lower;
    for (int lane = 0; lane < LANES; lane++) {
        upper[lane] = lane & HALF ? LANES + lane - HALF : lane;
        lower[lane] = lane & HALF ? LANES + lane : lane + HALF;
    }
    for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) {
            const Floats a = x[i], b = x[i + HALF];
            x[i] = __builtin_shuffle(a, b, upper);
            x[i + HALF] = __builtin_shuffle(a, b, lower);
        }
    if constexpr (HALF > 1) transpose<HALF / 2>(x);
}

namespace {

// A head's vectors number by number, LANES slots side by side: for products with many others. Two numbers of bfloat16
// count as one, where they are multiplied in pairs.
struct Columns {
    static constexpr int TOGETHER = 8;  // of the others: their sums stay in registers
#ifdef __AVX512BF16__
    static constexpr bool PAIRS = std::is_same_v<Format, BFloat16>;
#else
    static constexpr bool PAIRS = false;
#endif
    static constexpr int NUMBERS = PAIRS ? D / 2 : D;
    const Format& from;
    int64_t count, width, padded;
    std::vector<float> numbers, others;
    Columns(const Format& from, int64_t count, int64_t most)
        : from(from), count(count), width((count + LANES - 1) / LANES * LANES),
          padded((most + TOGETHER - 1) / TOGETHER * TOGETHER), numbers(width * NUMBERS), others(padded * NUMBERS) {}

    template <class F>
    static void copy(const F& from, int64_t slot, float* to) {
        if constexpr (PAIRS) std::memcpy(to, from.x + slot * D, 2 * D);
        else {
            const Wide wide = from[slot];
            std::memcpy(to, &wide, sizeof wide);
        }
    }

    void read(int64_t slot) {
        in_blocks(count, [&](int64_t n, auto many) {
            float each[LANES][NUMBERS] = {};
            for (int s = 0; s < many; s++) copy(from, slot + n + s, each[s]);
            for (int i = 0; i < NUMBERS; i += LANES) {
                Floats square[LANES];
                for (int s = 0; s < LANES; s++) square[s] = load<Floats>(&each[s][i]);
                transpose(square);
                std::memcpy(&numbers[n * NUMBERS + i * LANES], square, sizeof square);
            }
        });
    }

    // Vector number i of the others: that of a slot, or a query, which becomes bfloat16 if slots are.
    void put(int64_t i, int64_t slot) { copy(from, slot, &others[i * NUMBERS]); }
    void put(int64_t i, const void* q, bool half, int64_t at) {
        float* const to = &others[i * NUMBERS];
        if constexpr (PAIRS) {
            uint16_t narrow[D];
            const float* const wide = static_cast<const float*>(q) + at;
            if (!half)
                for (int d = 0; d < D; d++) narrow[d] = to_bfloat16(wide[d]);
            std::memcpy(to, half ? static_cast<const uint16_t*>(q) + at : narrow, sizeof narrow);
        } else {
            const Wide wide = query(q, half, at, 1);
            std::memcpy(to, &wide, sizeof wide);
        }
    }

    // The sum and products of pairs.
    static Floats dots(const Floats& sum, const Floats& a, const Floats& b) {
#ifdef __AVX512BF16__
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return sum;
#endif
    }

    static Floats add(const Floats& sum, const Floats& x, const float* other) {
        if constexpr (!PAIRS) return sum + x * *other;
        return dots(sum, x, (Floats)(load<int32_t>(other) + Ints{}));
    }

    // Of each slot with itself, to [width].
    void squares(float* found) const {
        for (int64_t n = 0; n < width; n += LANES) {
            Floats sum = {};
            for (int d = 0; d < NUMBERS; d++) {
                const Floats x = load<Floats>(&numbers[n * NUMBERS + d * LANES]);
                sum = PAIRS ? dots(sum, x, x) : sum + x * x;
            }
            std::memcpy(found + n, &sum, sizeof sum);
        }
    }

    // Of so many others with each slot, to [padded, width].
    void multiply(int64_t many, float* found) const {
        for (int64_t i = 0; i < many; i += TOGETHER)
            for (int64_t n = 0; n < width; n += LANES) {
                Floats sum[TOGETHER] = {};
                for (int d = 0; d < NUMBERS; d++) {
                    const Floats x = load<Floats>(&numbers[n * NUMBERS + d * LANES]);
                    for (int j = 0; j < TOGETHER; j++) sum[j] = add(sum[j], x, &others[(i + j) * NUMBERS + d]);
                }
                for (int j = 0; j < TOGETHER; j++) std::memcpy(found + (i + j) * width + n, &sum[j], sizeof sum[j]);
            }
    }
};

}  // namespace

// The least of all numbers, which come as vectors of(0), of(LANES), of(2 * LANES) ...
template <class Of>
static inline float least(int64_t width, Of of) {
    Floats found = of(0);
    for (int64_t n = LANES; n < width; n += LANES) {
        const Floats x = of(n);
        found = x < found ? x : found;
    }
    float all = found[0];
    for (int lane = 1; lane < LANES; lane++) all = std::min(all, found[lane]);
    return all;
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

// Scores, scaled where there is a bias, to weights, but for a factor: the inverse of what is returned.
static inline float exponentials(float* score, const float* bias, int64_t count, float scale = 1) {
    float most = -INFINITY, all = 0;
    if (bias)
#pragma omp simd
        for (int64_t n = 0; n < count; n++) score[n] = score[n] * scale + bias[n];
#pragma omp simd reduction(max : most)
    for (int64_t n = 0; n < count; n++) most = std::max(most, score[n]);
#pragma omp simd reduction(+ : all)
    for (int64_t n = 0; n < count; n++) {
        score[n] = exponential(score[n] - most);
        all += score[n];
    }
    return all;
}

// A score as it is ranked; what is no number counts as 0.
static inline float in_steps(float score, float largest, float fraction) {
    return score == score ? std::nearbyint(std::min(std::max(score, -largest), largest) * fraction) : 0;
}

// Vector number `from` of new ones becomes vector number `to` of these.
static inline void copy(void* const* parts, int64_t to, const void* const* made, int64_t from) {
    for (size_t part = 0; part < std::size(Format::BYTES); part++) {
        const int64_t bytes = Format::BYTES[part];
        char* const there = static_cast<char*>(parts[part]) + to * bytes;
        std::memcpy(there, static_cast<const char*>(made[part]) + from * bytes, bytes);
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

#pragma GCC visibility push(protected)  // no other library's function of the same name is called here
extern "C" {

// Each row r, and group of heads, in turn:
//
// 1. If there are new keys: those of head h, vectors r * new_row + h * new_head of the new parts, go with the values
//    into slot slots[r * groups + g], or where there are no slots, into slot `at`; counted from the first one on. Where
//    similarities are wanted, the unit vector of key (of_keys) or value enters total [rows, heads, D].
// 2. Attention. q: query s of head h of row r begins at r * q_row + h * q_head + s * q_query, in numbers; those of one
//    head of keys follow each other. out: [rows, queries, heads * shared, D], like q bfloat16 (half) or float32. Keys
//    and values of row r, head h: count slots from r * row + h * head on. Added to their scores, q times scale: bias[r
//    * bias_row + h * bias_head + s * bias_query + n], if there is a bias.
// 3. If they are wanted: weights that each query's attention gives to slots from the first one on, [rows, groups,
//    queries, count - first]; similarities of these slots to all that is counted, [rows, groups, count - first], by the
//    inverse norms [rows, groups, norms].
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
                        const int64_t mine_out = (r * queries + number) * heads * shared + h * shared + which;
                        put_out(out, half, mine_out * D, mix, all);
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
    void* const* parts, int64_t rows, int64_t heads, int64_t row, int64_t head, int64_t groups,
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

// A token of each row and head, in slots [rows, groups], becomes part of another: counts, as logarithms, add up in the
// bias, where bias[r * bias_row + h * bias_head] is slot 0's; keys and values are means by them. Not of integers.
void merge(
    void* const* key_parts, void* const* value_parts, int64_t rows, int64_t heads, int64_t row, int64_t head,
    int64_t groups, const int64_t* slots, const int64_t* into, float* bias, int64_t bias_row, int64_t bias_head) {
    Format stored[] = {key_parts, value_parts};
#pragma omp parallel for collapse(2) schedule(static) if (rows * heads > 256)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t group = r * groups + h / (heads / groups), first = r * row + h * head;
            const int64_t ahead = std::min(h + AHEAD, heads - 1), its_group = r * groups + ahead / (heads / groups);
            for (const Format& of : stored)
                for (const int64_t slot : {slots[its_group], into[its_group]})
                    expect(of, r * row + ahead * head + slot);
            float* const counts = bias + r * bias_row + h * bias_head;
            const float leaves = counts[slots[group]], stays = counts[into[group]], more = std::max(leaves, stays);
            const float both = more + std::log(std::exp(leaves - more) + std::exp(stays - more));
            const float share = std::exp(leaves - both);
            for (Format& of : stored) {
                Wide mean = of[first + into[group]];
                const Wide other = of[first + slots[group]];
                for (int i = 0; i < VECTORS; i++) mean.x[i] += (other.x[i] - mean.x[i]) * share;
                write(of, first + into[group], mean);
            }
            counts[into[group]] = both;
        }
}

// The ranking of adsa.policies.adsa_plus, of each row and group of heads: slots of the least worthy tokens, the least
// first, found [rows, groups, named]; and of the tokens that these are to be merged into, if `into` is given. Slots
// count from the first one that is not the condition's.
//
// q, half, q_row, q_head, q_query, scale, bias: as of attend, of the queries that are asked. arrivals [rows, groups,
// count - first], arrivals_row from a group to the next. Tokens stay that are among the first prefix ones, the newest
// local ones or those held; nothing is merged into a token of the last line, if there are others, or into one that
// doesn't stay. few: candidates at most, at least `named`, and no fewer tokens than that may leave.
void rank(
    const void* q, int64_t half, int64_t q_row, int64_t q_head, int64_t q_query, float scale, int64_t rows,
    int64_t heads, int64_t shared, int64_t queries, int64_t groups, int64_t count, int64_t first, int64_t row,
    int64_t head, void* const* key_parts, const float* bias, int64_t bias_row, int64_t bias_head,
    const int32_t* arrivals, int64_t arrivals_row, const int32_t* number, int64_t line, int64_t prefix, int64_t local,
    const int32_t* held, int64_t helds, int64_t few, int64_t named, float close, float largest, float fraction,
    int64_t* found, int64_t* into) {
    const Format keys(key_parts);
    const int64_t together = heads / groups, asked = shared * queries;
#pragma omp parallel
    {
        Columns columns(keys, count, std::max(asked, few));
        const int64_t width = columns.width;
        std::vector<float> room((columns.padded + few + 5) * width + 2 * columns.padded);
        float *const made = room.data(), *const apart = made + columns.padded * width;
        float *const odds = apart + few * width;
        float *const added = odds + width, *const order = added + width, *const square = order + width;
        float *const barred_by = square + width, *const inverse = barred_by + width;
        float* const worth = inverse + columns.padded;
        std::vector<int32_t> arrival(width), leaves(width), held_here(width), candidate(few), ranks(few);
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t group = r * groups + g, begin = g * together, end = begin + together;
                const int32_t now = *number, *const came = arrivals + group * arrivals_row;
                // The largest weights.
                std::fill(odds, odds + width, 0.f);
                for (int64_t h = begin; h < end; h++) {
                    columns.read(r * row + h * head);
                    for (int64_t i = 0; i < asked; i++)
                        columns.put(
                            i, q, half, r * q_row + (h * shared + i / queries) * q_head + i % queries * q_query);
                    columns.multiply(asked, made);
                    std::fill(added, added + count, 0.f);
                    if (bias) std::copy_n(bias + r * bias_row + h * bias_head, count, added);
                    std::fill(added + count, added + width, -INFINITY);
                    for (int64_t i = 0; i < asked; i++)
                        inverse[i] = 1 / exponentials(made + i * width, added, width, scale);
                    for (int64_t n = 0; n < width; n += LANES) {
                        Floats most = load<Floats>(odds + n);
                        for (int64_t i = 0; i < asked; i++) {
                            const Floats weight = load<Floats>(made + i * width + n) * inverse[i];
                            most = weight > most ? weight : most;
                        }
                        std::memcpy(odds + n, &most, sizeof most);
                    }
                }
                // Candidates: of least odds among those that may leave.
                std::copy_n(came, count - first, arrival.begin() + first);
#pragma omp simd
                for (int64_t n = 0; n < width; n++) {
                    odds[n] = std::max(odds[n] / std::max(1 - odds[n], 1e-4f), 1.17549435e-38f);
                    const bool stays = n < first + prefix || n >= count || arrival[n] > now - local;
                    order[n] = stays ? INFINITY : odds[n];
                }
                if (helds)
                    for (int64_t n = first; n < count; n++)
                        if ((held_here[n] = std::find(held, held + helds, arrival[n]) != held + helds))
                            order[n] = INFINITY;
                std::fill(leaves.begin(), leaves.end(), 0);
                std::fill(candidate.begin(), candidate.end(), first);
                int64_t some = 0;
                for (; some < few; some++) {
                    const float lowest = least(width, [&](int64_t n) { return load<Floats>(order + n); });
                    if (lowest == INFINITY) break;  // all others stay
                    candidate[some] = std::find(order + first, order + count - 1, lowest) - order;
                    order[candidate[some]] = INFINITY;
                    leaves[candidate[some]] = 1;
                }
                // Distances.
                std::fill(apart, apart + some * width, 0.f);
                for (int64_t h = begin; h < end; h++) {
                    if (together > 1) columns.read(r * row + h * head);
                    for (int64_t i = 0; i < some; i++) columns.put(i, r * row + h * head + candidate[i]);
                    columns.multiply(some, made);
                    columns.squares(square);
                    for (int64_t i = 0; i < some; i++)
                        for (int64_t n = 0; n < width; n += LANES) {
                            const Floats both = load<Floats>(square + n) + square[candidate[i]];
                            const Floats gap = both - 2 * load<Floats>(made + i * width + n), lowest = both * close;
                            const Floats sum = load<Floats>(apart + i * width + n) + (gap > lowest ? gap : lowest);
                            std::memcpy(apart + i * width + n, &sum, sizeof sum);
                        }
                }
                // What nothing is merged into; of the last line if there are others.
                const auto bar = [&] {
                    const int32_t newest = now - line;
                    float lowest = INFINITY;
#pragma omp simd reduction(min : lowest)
                    for (int64_t n = 0; n < width; n++) {
                        const bool barred = n < first || n >= count || leaves[n] || held_here[n];
                        barred_by[n] = barred || arrival[n] >= newest ? INFINITY : 0;
                        lowest = std::min(lowest, barred_by[n]);
                    }
                    if (lowest > 0)
                        for (int64_t n = first; n < count; n++) barred_by[n] = leaves[n] || held_here[n] ? INFINITY : 0;
                };
                const auto distance = [&](int64_t i) {
                    return least(width, [&](int64_t n) {
                        return load<Floats>(apart + i * width + n) + load<Floats>(barred_by + n);
                    });
                };
                bar();
                for (int64_t i = 0; i < some; i++) {
                    const float ln = std::log(odds[candidate[i]]) + std::log(distance(i)) / 2;
                    worth[i] = in_steps(ln, largest, fraction);
                }
                std::iota(ranks.begin(), ranks.end(), 0);
                const auto sorted = ranks.begin() + std::min(named, some);
                std::partial_sort(ranks.begin(), sorted, ranks.begin() + some, [&](int32_t a, int32_t b) {
                    if (worth[a] != worth[b]) return worth[a] < worth[b];
                    return arrival[candidate[a]] < arrival[candidate[b]];
                });
                for (int64_t k = 0; k < named; k++) found[group * named + k] = candidate[ranks[k]] - first;
                if (!into) continue;
                for (int64_t k = named; k < some; k++) leaves[candidate[ranks[k]]] = 0;
                bar();
                for (int64_t k = 0; k < named; k++) {
                    const float* const mine = apart + ranks[k] * width;
                    const float nearest = distance(ranks[k]);
                    int64_t n = first;
                    while (n < count - 1 && !(mine[n] + barred_by[n] == nearest)) n++;
                    into[group * named + k] = n - first;
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
            return arrival[n] > stay ? INFINITY : in_steps(mine[n], largest, fraction);
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
#pragma GCC visibility pop
