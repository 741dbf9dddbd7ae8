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
constexpr int AHEAD = 1024, TILES_AHEAD = 2048;  // bytes: where memory is asked for before it is needed

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

// Sums of R rows for the channels of S neighbouring panels. `stride`: numbers from one row to the next.
template <class P, int R, int S>
static inline void sums_of(const typename P::W* w, int64_t next, const typename P::X* x, int64_t stride, int num_in,
                           typename P::Sum (&sums)[S][R][VECS]) {
    for (int s = 0; s < S; ++s)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECS; ++v) sums[s][r][v] = typename P::Sum{};
    for (int k = 0; k < num_in; k += P::GROUP, w += PANEL * P::GROUP) {
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
            typename P::Weights part[VECS];
#pragma GCC unroll 16
            for (int v = 0; v < VECS; ++v) {
                const typename P::W* at = w + s * next + v * WIDTH * P::GROUP;
                __builtin_prefetch((const char*)at + AHEAD);
                part[v] = P::weights(at);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < VECS; ++v) P::multiply(sums[s][r][v], part[v], x + r * stride + k);
        }
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

// `out` [S][MOST_ROWS][PANEL]: R rows times S panels. `scales`: of the rows, for int8.
template <class P, int R, int S>
static void tile(const Linear& m, int panel, const typename P::X* x, int64_t stride, const float* scales, float* out) {
    typename P::Sum sums[S][R][VECS];
    sums_of<P, R, S>(panel_of<P>(m, panel), panel_of<P>(m, 1) - panel_of<P>(m, 0), x, stride, m.num_in, sums);
    for (int s = 0; s < S; ++s)
        for (int r = 0; r < R; ++r)
            finish_row<P>(sums[s][r], m, panel + s, scales[r], out + (s * MOST_ROWS + r) * PANEL);
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

// What the other three sums are for: nothing, a second panel, or 16 more rows.
enum Others { NONE, PANELS, ROWS };

// Tiles are named by literal numbers in the instructions, so this can't be a loop. Memory is asked for a little at a
// time: many requests at once hold up the loads that the unit waits for.
#define DOT(sum, weights, ahead)                               \
    _tile_loadd(7, weights, PANEL * 4);                        \
    if constexpr (P::GROUP == 2) { _tile_dpbf16ps(sum, 6, 7); } \
    else { _tile_dpbusd(sum, 6, 7); }                          \
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + line * 64);

template <class P, Others others>
static void matrix_tile(const Linear& m, int panel, const void* x, int64_t stride, const float* scales, int num,
                        float* out) {
    constexpr int STEP = 16 * PANEL * 4, LINES = others == ROWS ? STEP / 64 / 6 : STEP / 64 / 3, PART = LINES * 64;
    auto a = (const char*)x, b = (const char*)panel_of<P>(m, panel), b2 = b;
    if (others == PANELS) b2 = (const char*)panel_of<P>(m, panel + 1);
    stride *= sizeof(typename P::X);
    shape_tiles(num);  // and makes them 0
    for (int k = 0; k < m.num_in; k += 16 * P::GROUP, a += 64, b += STEP, b2 += STEP) {
        const char *ahead = b + TILES_AHEAD, *ahead2 = others == ROWS ? ahead + 3 * PART : b2 + TILES_AHEAD;
        _tile_loadd(6, a, stride);
        DOT(0, b, ahead)
        DOT(1, b + 64, ahead + PART)
        DOT(2, b + 128, ahead + 2 * PART)
        if constexpr (others == NONE) continue;
        if constexpr (others == ROWS) _tile_loadd(6, a + 16 * stride, stride);
        DOT(3, b2, ahead2)
        DOT(4, b2 + 64, ahead2 + PART)
        DOT(5, b2 + 128, ahead2 + 2 * PART)
    }
    alignas(64) int32_t sums[2][16][PANEL];
    _tile_stored(0, sums[0][0], PANEL * 4);
    _tile_stored(1, sums[0][0] + 16, PANEL * 4);
    _tile_stored(2, sums[0][0] + 32, PANEL * 4);
    if constexpr (others != NONE) {
        _tile_stored(3, sums[1][0], PANEL * 4);
        _tile_stored(4, sums[1][0] + 16, PANEL * 4);
        _tile_stored(5, sums[1][0] + 32, PANEL * 4);
    }
    auto keep = [&](const int32_t* from, int panel, int r, float* to) {
        typename P::Sum row[VECS];
        std::memcpy(row, from, sizeof row);
        finish_row<P>(row, m, panel, scales[r], to + r * PANEL);
    };
    for (int r = 0; r < num; ++r) keep(sums[r / 16][r % 16], panel, r, out);
    for (int r = 0; r < num && others == PANELS; ++r) keep(sums[1][r], panel + 1, r, out + MOST_ROWS * PANEL);
}
#undef DOT

// One row in bfloat16, rounded as the matrix unit rounds it: of each 32 inputs the even and the odd ones have sums of
// their own (Intel's instruction set reference, TDPBF16PS). A single row waits for memory, and this waits less.
template <int S>
static void row_as_tile(const Linear& m, int panel, const uint16_t* x, float* out) {
    const uint16_t* w = panel_of<BFloat16>(m, panel);
    int64_t next = panel_of<BFloat16>(m, 1) - panel_of<BFloat16>(m, 0);
    vec sums[S][VECS] = {};
    for (int k = 0; k < m.num_in; k += 32) {
        vec even[S][VECS] = {}, odd[S][VECS] = {};
        for (int pair = 0; pair < 32; pair += 2, w += 2 * PANEL) {
            float first = widen(x[k + pair]), second = widen(x[k + pair + 1]);
#pragma GCC unroll 2
            for (int s = 0; s < S; ++s)
#pragma GCC unroll 3
                for (int v = 0; v < VECS; ++v) {
                    const uint16_t* at = w + s * next + v * 2 * WIDTH;
                    __builtin_prefetch((const char*)at + AHEAD);
                    uvec pairs;
                    std::memcpy(&pairs, at, sizeof pairs);
                    even[s][v] += (vec)(pairs << 16) * first;
                    odd[s][v] += (vec)(pairs & 0xffff0000u) * second;
                }
        }
        for (int s = 0; s < S; ++s)
            for (int v = 0; v < VECS; ++v) sums[s][v] += even[s][v] + odd[s][v];
    }
    for (int s = 0; s < S; ++s) finish_row<BFloat16>(sums[s], m, panel + s, 1.0f, out + s * MOST_ROWS * PANEL);
}
#endif

// R rows, counted up to `num`: two panels together where the sums of both fit the registers.
template <class P, int R>
static void tile(const Linear& m, int panel, int num_panels, const typename P::X* x, int64_t stride,
                 const float* scales, int num, float* out) {
    if constexpr (R > 1)
        if (num < R) return tile<P, R - 1>(m, panel, num_panels, x, stride, scales, num, out);
    if constexpr (2 * R <= VECTOR_ROWS)
        if (num_panels == 2) return tile<P, R, 2>(m, panel, x, stride, scales, out);
    for (int s = 0; s < num_panels; ++s) tile<P, R, 1>(m, panel + s, x, stride, scales, out + s * MOST_ROWS * PANEL);
}

// `out` [2][MOST_ROWS][PANEL]: any number of rows up to MOST_ROWS times one panel, or two that follow each other: who
// reads from two places at once reads faster.
template <class P>
static void tile(const Linear& m, int panel, int num_panels, const void* rows, int64_t stride, const float* scales,
                 int num, float* out) {
    auto x = (const typename P::X*)rows;
#if defined(__AMX_TILE__)
    // bfloat16 always, since the unit rounds in its own way; int8 is exact either way, and faster so from a few rows on.
    if constexpr (P::GROUP == 2)
        if (num == 1) return num_panels == 2 ? row_as_tile<2>(m, panel, x, out) : row_as_tile<1>(m, panel, x, out);
    if constexpr (P::GROUP > 1)
        if (P::GROUP == 2 || num >= 4) {
            if (num <= 16 && num_panels == 2) return matrix_tile<P, PANELS>(m, panel, x, stride, scales, num, out);
            for (int s = 0; s < num_panels; ++s, ++panel, out += MOST_ROWS * PANEL)
                if (num <= 16) matrix_tile<P, NONE>(m, panel, x, stride, scales, num, out);
                else matrix_tile<P, ROWS>(m, panel, x, stride, scales, num, out);
            return;
        }
    for (; num > VECTOR_ROWS; num -= VECTOR_ROWS, scales += VECTOR_ROWS) {
        tile<P, VECTOR_ROWS>(m, panel, num_panels, x, stride, scales, VECTOR_ROWS, out);
        x += VECTOR_ROWS * stride, out += VECTOR_ROWS * PANEL;
    }
#endif
    tile<P, VECTOR_ROWS>(m, panel, num_panels, x, stride, scales, num, out);
}
