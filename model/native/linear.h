// Rows times a packed matrix, a few rows and one panel at a time.
//
// Each output is one chain of additions over the inputs in their order, whatever the number of rows: so in float32 a
// row's result never depends on which other rows there are. int8 sums are exact; bfloat16 has the same chain.
#pragma once
#include "vec.h"
#if defined(__AVX512BF16__) || defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int VECS = PANEL / WIDTH;
// Rows whose sums fit the registers beside the weights: 24 of 32 in AVX-512, 12 of 16 else.
constexpr int MOST_ROWS = WIDTH == 16 ? 8 : WIDTH == 8 ? 2 : 1;

// How each precision multiplies: X is what one number of a row is stored as, `GROUP` of them are multiplied at a time.
struct Float32 {
    typedef float X;
    typedef float W;
    typedef vec Sum;
    static constexpr int GROUP = 1;
    typedef vec Weights;
    static Weights weights(const W* w) { return load(w); }
    static void multiply(Sum& sum, Weights w, const X* x) { sum += w * *x; }
};

struct BFloat16 {
    typedef uint16_t X;
    typedef uint16_t W;
    typedef vec Sum;
    static constexpr int GROUP = 2;
#if defined(__AVX512BF16__)
    typedef __m512bh Weights;
    static Weights weights(const W* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static void multiply(Sum& sum, Weights w, const X* x) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        sum = (vec)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_set1_epi32(pair));
    }
#else
    struct Weights { vec even, odd; };
    static Weights weights(const W* w) {
        uvec pairs;
        std::memcpy(&pairs, w, sizeof pairs);
        return {(vec)(pairs << 16), (vec)(pairs & 0xffff0000u)};
    }
    static void multiply(Sum& sum, Weights w, const X* x) {
        sum += w.even * widen(x[0]);
        sum += w.odd * widen(x[1]);
    }
#endif
};

struct Int8 {  // rows are stored with 128 added, as the processor's instruction wants them
    typedef uint8_t X;
    typedef int8_t W;
    typedef ivec Sum;
    static constexpr int GROUP = 4;
#if defined(__AVX512VNNI__)
    typedef __m512i Weights;
    static Weights weights(const W* w) { return _mm512_loadu_si512(w); }
    static void multiply(Sum& sum, Weights w, const X* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        sum = (ivec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), w);
    }
#elif defined(__AVX2__)
    struct Weights { __m256i even, odd; };
    static Weights weights(const W* w) {
        __m256i all = _mm256_loadu_si256((const __m256i*)w);
        return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
    }
    static void multiply(Sum& sum, Weights w, const X* x) {
        __m256i even = _mm256_set1_epi32(x[0] | x[2] << 16), odd = _mm256_set1_epi32(x[1] | x[3] << 16);
        sum += (ivec)_mm256_madd_epi16(w.even, even) + (ivec)_mm256_madd_epi16(w.odd, odd);
    }
#else
    typedef ivec Weights;
    static Weights weights(const W* w) {
        ivec all;
        std::memcpy(&all, w, sizeof all);
        return all;
    }
    static void multiply(Sum& sum, Weights w, const X* x) {
        sum += (w << 24 >> 24) * int32_t(x[0]) + (w << 16 >> 24) * int32_t(x[1]);
        sum += (w << 8 >> 24) * int32_t(x[2]) + (w >> 24) * int32_t(x[3]);
    }
#endif
};

// Sums of R rows for the channels of one panel. `stride`: numbers from one row to the next.
template <class P, int R>
static inline void sums_of(const typename P::W* w, const typename P::X* x, int64_t stride, int num_in,
                           typename P::Sum (&sums)[R][VECS]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECS; ++v) sums[r][v] = typename P::Sum{};
    for (int k = 0; k < num_in; k += P::GROUP, w += PANEL * P::GROUP) {
        typename P::Weights part[VECS];
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) {
            __builtin_prefetch((const char*)(w + v * WIDTH * P::GROUP) + (R > 2 ? 1024 : 4096));
            part[v] = P::weights(w + v * WIDTH * P::GROUP);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < VECS; ++v) P::multiply(sums[r][v], part[v], x + r * stride + k);
    }
}

static inline void finish(const ivec (&sums)[VECS], vec (&out)[VECS], const Linear& m, int channel, float scale) {
    for (int v = 0; v < VECS; ++v) {
        ivec shift;
        std::memcpy(&shift, m.sums + channel + v * WIDTH, sizeof shift);
        out[v] = __builtin_convertvector(sums[v] - shift, vec) * scale * load(m.scales + channel + v * WIDTH);
    }
}
static inline void finish(const vec (&sums)[VECS], vec (&out)[VECS], const Linear&, int, float) {
    for (int v = 0; v < VECS; ++v) out[v] = sums[v];
}

// `out` [R][PANEL]: R rows times one panel, scaled, with bias. `scales`: of the rows, for int8.
template <class P, int R>
static void tile(const Linear& m, int panel, const typename P::X* x, int64_t stride, const float* scales, float* out) {
    typename P::Sum sums[R][VECS];
    int64_t groups = (m.num_in + P::GROUP - 1) / P::GROUP;
    sums_of<P, R>((const typename P::W*)m.weights + panel * groups * P::GROUP * PANEL, x, stride, m.num_in, sums);
    for (int r = 0; r < R; ++r) {
        vec wide[VECS];
        finish(sums[r], wide, m, panel * PANEL, scales[r]);
        for (int v = 0; v < VECS; ++v) {
            if (m.bias) wide[v] += load(m.bias + panel * PANEL + v * WIDTH);
            store(out + r * PANEL + v * WIDTH, wide[v]);
        }
    }
}

// The same for any number of rows up to MOST_ROWS.
template <class P>
static void tile(const Linear& m, int panel, const void* rows, int64_t stride, const float* scales, int num, float* out) {
    auto x = (const typename P::X*)rows;
    switch (num) {
        case 1: return tile<P, 1>(m, panel, x, stride, scales, out);
#if defined(__AVX2__)
        case 2: return tile<P, 2>(m, panel, x, stride, scales, out);
#endif
#if defined(__AVX512F__)
        case 3: return tile<P, 3>(m, panel, x, stride, scales, out);
        case 4: return tile<P, 4>(m, panel, x, stride, scales, out);
        case 5: return tile<P, 5>(m, panel, x, stride, scales, out);
        case 6: return tile<P, 6>(m, panel, x, stride, scales, out);
        case 7: return tile<P, 7>(m, panel, x, stride, scales, out);
        case 8: return tile<P, 8>(m, panel, x, stride, scales, out);
#endif
    }
}
