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
constexpr int VECTOR_ROWS = WIDTH == 16 ? 8 : WIDTH == 8 ? 2 : 1;
#if defined(__AMX_TILE__)
constexpr int MOST_ROWS = 32;  // two tiles' worth
#else
constexpr int MOST_ROWS = VECTOR_ROWS;
#endif
constexpr int SPARE_BYTES = 4096;  // beyond the last panel, which a kernel may look at and multiplies by 0

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

template <class P> static inline const typename P::W* panel_of(const Linear& m, int panel) {
    int64_t groups = (m.num_in + P::GROUP - 1) / P::GROUP;
    return (const typename P::W*)m.weights + panel * groups * P::GROUP * PANEL;
}

// The sums of one row -> its numbers, scaled, with bias.
template <class P>
static inline void finish_row(const typename P::Sum (&sums)[VECS], const Linear& m, int panel, float scale, float* out) {
    vec wide[VECS];
    finish(sums, wide, m, panel * PANEL, scale);
    for (int v = 0; v < VECS; ++v) {
        if (m.bias) wide[v] += load(m.bias + panel * PANEL + v * WIDTH);
        store(out + v * WIDTH, wide[v]);
    }
}

// `out` [R][PANEL]: R rows times one panel. `scales`: of the rows, for int8.
template <class P, int R>
static void tile(const Linear& m, int panel, const typename P::X* x, int64_t stride, const float* scales, float* out) {
    typename P::Sum sums[R][VECS];
    sums_of<P, R>(panel_of<P>(m, panel), x, stride, m.num_in, sums);
    for (int r = 0; r < R; ++r) finish_row<P>(sums[r], m, panel, scales[r], out + r * PANEL);
}

#if defined(__AMX_TILE__)
// The same with the processor's matrix unit: 16 rows by 16 channels, 64 bytes of each row, at a time.
struct Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

static inline void shape_tiles(int num) {  // 0 to 5: sums, 6: rows, 7: weights
    alignas(64) Tiles tiles;
    for (int i = 0; i < 8; ++i) tiles.bytes[i] = 64, tiles.rows[i] = uint8_t(i < 7 && num < 16 ? num : 16);
    _tile_loadconfig(&tiles);
}

// Tiles are named by literal numbers in the instructions, so this can't be a loop.
#define DOT_CHANNELS(part, low, high)                                 \
    _tile_loadd(7, b + part * 64, PANEL * 4);                         \
    _tile_loadd(6, a, stride);                                        \
    if constexpr (P::GROUP == 2) { _tile_dpbf16ps(low, 6, 7); }       \
    else { _tile_dpbusd(low, 6, 7); }                                 \
    if (both) {                                                       \
        _tile_loadd(6, a + 16 * stride, stride);                      \
        if constexpr (P::GROUP == 2) { _tile_dpbf16ps(high, 6, 7); }  \
        else { _tile_dpbusd(high, 6, 7); }                            \
    }
#define STORE(low, high)                                              \
    _tile_stored(low, sums + low * 16, PANEL * 4);                    \
    if (both) { _tile_stored(high, sums + 16 * PANEL + low * 16, PANEL * 4); }

// At most 16 rows, or 32.
template <class P>
static void matrix_tile(const Linear& m, int panel, const void* x, int64_t stride, const float* scales, int num,
                        float* out) {
    auto a = (const char*)x, b = (const char*)panel_of<P>(m, panel);
    stride *= sizeof(typename P::X);
    bool both = num == 32;
    shape_tiles(num);  // and makes them 0
    for (int k = 0; k < m.num_in; k += 16 * P::GROUP, a += 64, b += 16 * PANEL * 4) {
        DOT_CHANNELS(0, 0, 3)
        DOT_CHANNELS(1, 1, 4)
        DOT_CHANNELS(2, 2, 5)
    }
    alignas(64) int32_t sums[32 * PANEL];
    STORE(0, 3)
    STORE(1, 4)
    STORE(2, 5)
    for (int r = 0; r < num; ++r) {
        typename P::Sum row[VECS];
        std::memcpy(row, sums + r * PANEL, sizeof row);
        finish_row<P>(row, m, panel, scales[r], out + r * PANEL);
    }
}
#undef DOT_CHANNELS
#undef STORE
#endif

#if defined(__AMX_TILE__)
// One row in bfloat16, rounded as the matrix unit rounds it: of each 32 inputs the even and the odd ones have sums of
// their own (Intel's instruction set reference, TDPBF16PS). A single row waits for memory, and this waits less.
static void row_as_tile(const Linear& m, int panel, const uint16_t* x, float* out) {
    const uint16_t* w = panel_of<BFloat16>(m, panel);
    vec sums[VECS] = {};
    for (int k = 0; k < m.num_in; k += 32) {
        vec even[VECS] = {}, odd[VECS] = {};
        for (int pair = 0; pair < 32; pair += 2, w += 2 * PANEL) {
            float first = widen(x[k + pair]), second = widen(x[k + pair + 1]);
#pragma GCC unroll 3
            for (int v = 0; v < VECS; ++v) {
                __builtin_prefetch((const char*)(w + v * 2 * WIDTH) + 3072);
                uvec pairs;
                std::memcpy(&pairs, w + v * 2 * WIDTH, sizeof pairs);
                even[v] += (vec)(pairs << 16) * first;
                odd[v] += (vec)(pairs & 0xffff0000u) * second;
            }
        }
        for (int v = 0; v < VECS; ++v) sums[v] += even[v] + odd[v];
    }
    finish_row<BFloat16>(sums, m, panel, 1.0f, out);
}
#endif

// The same for any number of rows up to MOST_ROWS.
template <class P>
static void tile(const Linear& m, int panel, const void* rows, int64_t stride, const float* scales, int num,
                 float* out) {
    auto x = (const typename P::X*)rows;
#if defined(__AMX_TILE__)
    // bfloat16 always, since the unit rounds in its own way; int8 is exact either way, and faster so from a few rows on.
    if constexpr (P::GROUP == 2)
        if (num == 1) return row_as_tile(m, panel, x, out);
    if (P::GROUP == 2 || (P::GROUP == 4 && num >= 4)) {
        int first = num < 32 && num > 16 ? 16 : num;
        matrix_tile<P>(m, panel, x, stride, scales, first, out);
        if (first < num)
            matrix_tile<P>(m, panel, x + first * stride, stride, scales + first, num - first, out + first * PANEL);
        return;
    }
    for (; num > VECTOR_ROWS; num -= VECTOR_ROWS, scales += VECTOR_ROWS) {
        tile<P, VECTOR_ROWS>(m, panel, x, stride, scales, out);
        x += VECTOR_ROWS * stride, out += VECTOR_ROWS * PANEL;
    }
#endif
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
