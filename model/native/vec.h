// Vectors as wide as the processor's registers, in the compiler's own notation, and the functions computed on them.
// The same source becomes AVX-512, AVX2 or whatever the target has; only dot products of bfloat16 and int8, which no
// compiler finds by itself, are written for a processor (`linear.h`).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core.h"

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));

static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vec load(const uint16_t* p) {  // bfloat16: the upper half of a float
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

template <class T> static inline vec load_some(const T* p, int num) {  // the first `num` numbers, then zeros
    if (num >= WIDTH) return load(p);
    T part[WIDTH] = {};
    if (num > 0) std::memcpy(part, p, num * sizeof(T));
    return load(part);
}

static inline float total(vec v) {  // always in the same order
    float part[WIDTH];
    store(part, v);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

static inline vec larger(vec a, vec b) { return a > b ? a : b; }

static inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
static inline uint16_t narrow(float x) {  // to the nearest bfloat16, to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline vec rounded(vec x) {  // to the nearest bfloat16, to even; a NaN stays one
    uvec bits = (uvec)x;
    return x == x ? (vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u) : x;
}
static inline void store_halves(uint16_t* p, vec x) {  // of numbers that are bfloat16 already
    hvec h = __builtin_convertvector((uvec)x >> 16, hvec);
    std::memcpy(p, &h, sizeof h);
}

// e**x: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] (the coefficients are those of the Cephes library's expf);
// 0 below -87, where minus infinity belongs. NaN gives NaN.
static inline vec exponential(vec x) {
    vec lowest = vec{} - 87.0f, highest = vec{} + 88.0f;
    vec in = x < lowest ? lowest : x;
    in = in > highest ? highest : in;
    vec shifted = in * 1.44269504088896341f + 12582912.0f;  // the sum's lowest bits are n
    vec n = shifted - 12582912.0f;
    vec r = in - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vec scaled = (vec)((ivec)p + ((ivec)shifted << 23));
    return x < -87.0f ? vec{} : x == x ? scaled : x;
}

static inline vec silu(vec x) { return x / (1.0f + exponential(-x)); }

static inline vec activate(int kind, vec x) {
    if (kind == SILU) return silu(x);
    if (kind == RELU) return x > 0.0f || x != x ? x : vec{};
    if (kind == GELU_TANH) {  // x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)
        vec u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exponential(-2.0f * u));
    }
    float part[WIDTH];
    store(part, x);
    for (float& y : part) y = 0.5f * y * (1.0f + std::erf(y * 0.70710678118654752f));
    return load(part);
}
