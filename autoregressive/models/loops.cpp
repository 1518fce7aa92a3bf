// A CPU's loops for a step of decoding, between its products and in them. autoregressive/models/loops.py calls them.
//
// A step has few rows and waits for the weights of its linear layers. These lie in blocks of OUTPUTS outputs; a block
// holds STEP inputs of each of its outputs, then the next STEP inputs of each, and so on: memory is read in order, once.
// FORMAT is one of the classes below, by which they are multiplied. All other numbers are as its inputs.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <type_traits>
#include <vector>

#include "../../adsa/vectors.h"

constexpr int ROWS = LANES == 16 ? 8 : 2;  // at a time: their sums stay in registers
constexpr int VECTORS = OUTPUTS / LANES;
constexpr int64_t SMALL = 1 << 17;  // products that take no longer than waking another thread
constexpr int64_t TOGETHER = 128;   // rows that go from product to product while a cache holds them

namespace {  // of this library alone: others in the process have another FORMAT

// Rows of inputs as products take them: here as they are, with sums of float32.
template <class T>
struct Plain {
    typedef T Number;
    typedef Floats Sum;
    static constexpr int AT_A_TIME = ROWS;
    const T* x;
    int64_t inputs;
    Plain(const void* x, int64_t, int64_t inputs) : x(static_cast<const T*>(x)), inputs(inputs) {}
    Sum none(int64_t) const { return Sum{}; }
    Floats total(const Sum& sum) const { return sum; }
    float factor(int64_t) const { return 1; }
};

struct Float32 : Plain<float> {
    using Plain::Plain;
    static constexpr int STEP = 1;
    typedef Floats Weights;
    void add(Sum& sum, const Weights& weights, int64_t row, int64_t k) const { sum += weights * x[row * inputs + k]; }
};

struct BFloat16 : Plain<uint16_t> {
    using Plain::Plain;
    static constexpr int STEP = 2;
#ifdef __AVX512BF16__
    typedef __m512bh Weights;
    void add(Sum& sum, const Weights& weights, int64_t row, int64_t k) const {
        const __m512i pair = _mm512_set1_epi32(load<int32_t>(x + row * inputs + k));
        sum = (Sum)_mm512_dpbf16_ps((__m512)sum, weights, (__m512bh)pair);
    }
#else
    typedef Ints Weights;
    void add(Sum& sum, const Weights& weights, int64_t row, int64_t k) const {
        const uint16_t* pair = x + row * inputs + k;
        sum += (Floats)(weights << 16) * from_bfloat16(pair[0]);
        sum += (Floats)(weights & int32_t(0xffff0000)) * from_bfloat16(pair[1]);
    }
#endif
};

#ifdef __AVX512VNNI__
// Weights are bytes, the integer + 128. Inputs, bf16, become integers of 16 bits, with one step for each row, and those
// two of 8 bits, so that all sums are exact.
struct Int8 {
    typedef uint16_t Number;
    static constexpr int STEP = 4, AT_A_TIME = ROWS / 2;
    typedef __m512i Weights;
    struct Sum {
        __m512i high, low;
    };
    int64_t inputs;
    std::vector<int8_t> parts;    // [row][high and low][inputs]
    std::vector<int32_t> offset;  // [row][high and low]: what 128 more in each weight adds
    std::vector<float> step;      // [row]
    Int8(const void* given, int64_t rows, int64_t inputs)
        : inputs(inputs), parts(2 * rows * inputs), offset(2 * rows), step(rows) {
        const uint16_t* const x = static_cast<const uint16_t*>(given);
#pragma omp parallel for schedule(static) if (rows * inputs > SMALL)
        for (int64_t r = 0; r < rows; r++) {
            const uint16_t* const from = x + r * inputs;
            int32_t most = 0, highs = 0, lows = 0;
#pragma omp simd reduction(max : most)  // bits of absolute values are in their order
            for (int64_t k = 0; k < inputs; k++) most = std::max(most, from[k] & 0x7fff);
            const float largest = from_bfloat16(most);
            const bool finite = largest < INFINITY;
            step[r] = finite ? largest / 32512 : NAN;
            const float factor = finite && largest > 1e-30f ? 32512 / largest : 0;
            int8_t *const high = &parts[2 * r * inputs], *const low = high + inputs;
#pragma omp simd reduction(+ : highs, lows)
            for (int64_t k = 0; k < inputs; k++) {
                const int32_t whole = finite ? int32_t(std::nearbyint(from_bfloat16(from[k]) * factor)) : 0;
                const int32_t below = int32_t(uint32_t(whole) << 24) >> 24;
                low[k] = int8_t(below);
                high[k] = int8_t((whole - below) >> 8);
                highs += (whole - below) >> 8;
                lows += below;
            }
            offset[2 * r] = 128 * highs;
            offset[2 * r + 1] = 128 * lows;
        }
    }
    Sum none(int64_t row) const {
        return {_mm512_set1_epi32(-offset[2 * row]), _mm512_set1_epi32(-offset[2 * row + 1])};
    }
    void add(Sum& sum, const Weights& weights, int64_t row, int64_t k) const {
        const int8_t* const at = &parts[2 * row * inputs + k];
        sum.high = _mm512_dpbusd_epi32(sum.high, weights, _mm512_set1_epi32(load<int32_t>(at)));
        sum.low = _mm512_dpbusd_epi32(sum.low, weights, _mm512_set1_epi32(load<int32_t>(at + inputs)));
    }
    Floats total(const Sum& sum) const {
        return __builtin_convertvector((Ints)sum.high, Floats) * 256 + __builtin_convertvector((Ints)sum.low, Floats);
    }
    float factor(int64_t row) const { return step[row]; }
};
#endif

using Format = FORMAT;
using Number = Format::Number;

}  // namespace

static inline float wide(Number x) {
    if constexpr (std::is_same_v<Number, float>) return x;
    else return from_bfloat16(x);
}

static inline Number rounded(float x) {
    if constexpr (std::is_same_v<Number, float>) return x;
    else return to_bfloat16(x);
}

// So many rows' products with a block of weights. Its outputs are `count`, the first of them at `out`.
template <int MANY>
static void block(
    const Format& rows, int64_t row, const uint8_t* weights, const float* scale, Number* out, int64_t inputs,
    int64_t outputs, int64_t count) {
    Format::Sum sums[MANY][VECTORS];
    for (int r = 0; r < MANY; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = rows.none(row + r);
    for (int64_t k = 0; k < inputs; k += Format::STEP) {
        Format::Weights some[VECTORS];
        for (int v = 0; v < VECTORS; v++) some[v] = load<Format::Weights>(weights + v * 4 * LANES);
        weights += VECTORS * 4 * LANES;
        for (int r = 0; r < MANY; r++)
            for (int v = 0; v < VECTORS; v++) rows.add(sums[r][v], some[v], row + r, k);
    }
    for (int r = 0; r < MANY; r++) {
        float totals[OUTPUTS];
        for (int v = 0; v < VECTORS; v++) {
            const Floats total = rows.total(sums[r][v]);
            std::memcpy(totals + v * LANES, &total, sizeof total);
        }
        const float factor = rows.factor(row + r);
        for (int n = 0; n < count; n++)
            out[(row + r) * outputs + n] = rounded(totals[n] * (scale ? scale[n] * factor : factor));
    }
}

template <int MANY, class... Rest>
static void last(int64_t many, const Format& rows, int64_t row, Rest... rest) {
    if (many == MANY) return block<MANY>(rows, row, rest...);
    if constexpr (MANY > 1) last<MANY - 1>(many, rows, row, rest...);
}

// A token's heads, size numbers in all. to may be from.
static inline void rotate(const Number* from, const float* angles, Number* to, int64_t size, int64_t dim) {
    for (int64_t h = 0; h < size; h += dim)
#pragma omp simd
        for (int64_t n = 0; n < dim; n += 2) {
            const float even = wide(from[h + n]), odd = wide(from[h + n + 1]);
            to[h + n] = rounded(even * angles[n] - odd * angles[n + 1]);
            to[h + n + 1] = rounded(odd * angles[n] + even * angles[n + 1]);
        }
}

// Room for so many numbers, until this thread asks again.
static Number* room(int64_t count) {
    static thread_local std::vector<Number> numbers;
    if (int64_t(numbers.size()) < count) numbers.resize(count);
    return numbers.data();
}

#pragma GCC visibility push(protected)  // no other library's function of the same name is called here
extern "C" {

// x: [count, inputs]; out: [count, outputs], of the same numbers; weights: blocks; scale: [outputs], or none.
void multiply(
    const void* x, const uint8_t* weights, const float* scale, void* out, int64_t count, int64_t inputs,
    int64_t outputs) {
    const Format rows(x, count, inputs);
    const int64_t size = inputs / Format::STEP * OUTPUTS * 4, blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static) if (count * inputs * outputs > SMALL)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = b * OUTPUTS, many = std::min<int64_t>(OUTPUTS, outputs - first);
        Number* const to = static_cast<Number*>(out) + first;
        for (int64_t row = 0; row < count; row += Format::AT_A_TIME)
            last<Format::AT_A_TIME>(
                std::min<int64_t>(Format::AT_A_TIME, count - row), rows, row, weights + b * size,
                scale ? scale + first : nullptr, to, inputs, outputs, many);
    }
}

// x, out: [rows, dim]. Rounded where PyTorch's operations round.
void rms_norm(const Number* x, const Number* weight, Number* out, int64_t rows, int64_t dim, float eps) {
#pragma omp parallel for schedule(static) if (rows * dim > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const Number* const from = x + r * dim;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t n = 0; n < dim; n++) squares += wide(from[n]) * wide(from[n]);
        const float inverse = 1 / std::sqrt(squares / dim + eps);
#pragma omp simd
        for (int64_t n = 0; n < dim; n++)
            out[r * dim + n] = rounded(wide(rounded(wide(from[n]) * inverse)) * wide(weight[n]));
    }
}

// x: [rows, tokens, heads, dim], without gaps within a token; out without any; table: [tokens, dim / 2, 2].
void rope(
    const Number* x, const float* table, Number* out, int64_t rows, int64_t tokens, int64_t heads, int64_t dim,
    int64_t row, int64_t token) {
    const int64_t size = heads * dim;
#pragma omp parallel for collapse(2) schedule(static) if (rows * tokens * size > SMALL)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < tokens; t++) {
            Number* const to = out + (r * tokens + t) * size;
            rotate(x + r * row + t * token, table + t * dim, to, size, dim);
        }
}

// gate, up, out: [count]. Rounded where PyTorch's operations round.
void swiglu(const Number* gate, const Number* up, Number* out, int64_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > SMALL)
    for (int64_t n = 0; n < count; n++) {
        const float x = wide(gate[n]), small = exponential(-std::abs(x));
        out[n] = rounded(wide(rounded((x < 0 ? x * small : x) / (1 + small))) * wide(up[n]));
    }
}

// A block up to its attention. x: [rows, tokens, dim]; qkv: [rows, tokens, outputs], of which the first size ones are
// rotated, heads of head_dim.
void before_attention(
    const Number* x, const Number* norm, const uint8_t* weights, const float* scale, const float* table, Number* qkv,
    int64_t rows, int64_t tokens, int64_t dim, int64_t outputs, int64_t size, int64_t head_dim, float eps) {
    const int64_t all = rows * tokens;
    Number* const normed = room(std::min(all, TOGETHER) * dim);
    for (int64_t first = 0; first < all; first += TOGETHER) {
        const int64_t many = std::min(all - first, TOGETHER);
        rms_norm(x + first * dim, norm, normed, many, dim, eps);
        multiply(normed, weights, scale, qkv + first * outputs, many, dim, outputs);
    }
#pragma omp parallel for schedule(static) if (all * size > SMALL)
    for (int64_t t = 0; t < all; t++) {
        Number* const token = qkv + t * outputs;
        rotate(token, table + t % tokens * head_dim, token, size, head_dim);
    }
}

// A block from its attention on. x, attended, out: [rows, dim]. Weights: of the FFN, [hidden, dim], but the last ones.
void after_attention(
    const Number* x, const Number* attended, const uint8_t* wo, const float* wo_scale, const Number* norm,
    const uint8_t* w1, const float* w1_scale, const uint8_t* w3, const float* w3_scale, const uint8_t* w2,
    const float* w2_scale, Number* out, int64_t rows, int64_t dim, int64_t hidden, float eps) {
    const int64_t most = std::min(rows, TOGETHER);
    Number *const normed = room(most * (2 * dim + 2 * hidden)), *const made = normed + most * dim;
    Number *const gate = made + most * dim, *const up = gate + most * hidden;
    for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t many = std::min(rows - first, TOGETHER), count = many * dim;
        Number* const to = out + first * dim;
        const auto add = [&](const Number* before) {
#pragma omp simd
            for (int64_t n = 0; n < count; n++) to[n] = rounded(wide(before[n]) + wide(made[n]));
        };
        multiply(attended + first * dim, wo, wo_scale, made, many, dim, dim);
        add(x + first * dim);
        rms_norm(to, norm, normed, many, dim, eps);
        multiply(normed, w1, w1_scale, gate, many, dim, hidden);
        multiply(normed, w3, w3_scale, up, many, dim, hidden);
        swiglu(gate, up, gate, many * hidden);
        multiply(gate, w2, w2_scale, made, many, hidden, dim);
        add(to);
    }
}
}
#pragma GCC visibility pop
