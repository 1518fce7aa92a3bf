// What the project's loops share: vectors of the processor's size.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

template <class T>
static inline T load(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

static inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = load<uint32_t>(&x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    return load<float>(&bits);
}

// Within 2 units in the last place; 0 below -87.
static inline float exponential(float x) {
    const float n = std::nearbyint(std::max(x, -87.f) * 1.44269504f);
    const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, std::max(x, -87.f)));  // |r| < 0.35
    float p = std::fma(r, 1.f / 5040, 1.f / 720);  // the exponential's series
    p = std::fma(p, r, 1.f / 120);
    p = std::fma(p, r, 1.f / 24);
    p = std::fma(p, r, 1.f / 6);
    p = std::fma(p, r, 0.5f);
    p = std::fma(std::fma(p, r, 1.f), r, 1.f);
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.f ? 0 : p * power;
}
