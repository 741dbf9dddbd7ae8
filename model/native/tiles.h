// Attention of up to 16 query rows at a time with the processor's matrix unit, where it has one and the cache is in
// bfloat16; and the choice between this and vectors.
#pragma once
#include "attention.h"

#if defined(__AMX_TILE__)
constexpr int MOST_TILE_DIM = 256;

// Tiles 0 to 3: sums; 4, 5: 32 or 16 numbers of each row; 6, 7: what they are multiplied with, 16 or 8 pairs deep.
static inline void shape_attention(int num) {
    alignas(64) Tiles tiles;
    for (int i = 0; i < 8; ++i) tiles.bytes[i] = i == 5 ? 32 : 64, tiles.rows[i] = uint8_t(i < 6 ? num : i == 6 ? 16 : 8);
    _tile_loadconfig(&tiles);
}

// Tiles are named by literal numbers in the instructions, so these can't be loops.
#define EACH(N, DO) \
    DO(0)           \
    if constexpr (N > 1) { DO(1) } \
    if constexpr (N > 2) { DO(2) } \
    if constexpr (N > 3) { DO(3) }
#define DEEP(n) _tile_loadd(6, keys[n] + d * size, size * 4); _tile_dpbf16ps(n, 4, 6);
#define FLAT(n) _tile_loadd(7, keys[n] + d * size, size * 4); _tile_dpbf16ps(n, 5, 7);
#define MIX(n) _tile_loadd(7, values + n * 32, d * 4); _tile_dpbf16ps(n, 5, 7);
#define CLEAR(n) _tile_zero(n);
#define KEEP(n) _tile_stored(n, out + n * 16, stride);

template <int N>  // groups of keys
static inline void tile_scores(const Cache<uint16_t>& cache, const uint16_t* queries, int at, int end, float* out,
                               int64_t stride) {
    int size = cache.block_size, d = 0;
    const uint16_t* keys[N];
    for (int n = 0; n < N; ++n) {
        keys[n] = cache.key_lanes(at + n * GROUP_KEYS);
        int later = at + (N + n) * GROUP_KEYS;
        if (later >= end) continue;
        auto next = cache.key_lanes(later);
        for (int i = 0; i < cache.head_dim; i += 2) __builtin_prefetch(next + i * size);
    }
    EACH(N, CLEAR)
    for (; d + 32 <= cache.head_dim; d += 32) {
        _tile_loadd(4, queries + d, cache.head_dim * 2);
        EACH(N, DEEP)
    }
    if (d < cache.head_dim) {
        _tile_loadd(5, queries + d, cache.head_dim * 2);
        EACH(N, FLAT)
    }
    EACH(N, KEEP)
}

template <int N>  // times 16 dimensions
static inline void tile_mix(const Cache<uint16_t>& cache, const uint16_t* weights, int64_t width, int begin, int end,
                            int dim, float* out, int64_t stride) {
    int d = cache.head_dim;
    EACH(N, CLEAR)
    for (int at = begin; at < end; at += GROUP_KEYS) {
        auto values = cache.value(at) + 2 * dim;
        if (at + 2 * GROUP_KEYS < end) {
            auto next = cache.value(at + 2 * GROUP_KEYS) + 2 * dim;
            for (int i = 0; i < GROUP_KEYS / 2; ++i)
                for (int n = 0; n < N; ++n) __builtin_prefetch(next + (i * d + n * 16) * 2);
        }
        _tile_loadd(5, weights + at - begin, width * 4);
        EACH(N, MIX)
    }
    EACH(N, KEEP)
}
#undef EACH
#undef DEEP
#undef FLAT
#undef MIX
#undef CLEAR
#undef KEEP

// At most MOST_QUERIES queries with the matrix unit; heads are a multiple of 16 wide.
static void attend_tiles(const Cache<uint16_t>& cache, int num, const float* const* queries, const int* first,
                         const int* last, float* scratch, float* const* mixed) {
    Span span(num, first, last);
    int d = cache.head_dim, begin = span.begin, end = span.end, at = begin;
    int64_t width = span.width, stride = width + GROUP_KEYS;  // so that rows are not all in one set of the cache
    alignas(64) uint16_t narrowed[MOST_QUERIES * MOST_TILE_DIM];
    alignas(64) float out[MOST_QUERIES * MOST_TILE_DIM];
    for (int r = 0; r < num; ++r)
        for (int i = 0; i < d; i += WIDTH) store_halves(narrowed + r * d + i, load(queries[r] + i));
    shape_attention(num);
    for (; at + 4 * GROUP_KEYS <= begin + width; at += 4 * GROUP_KEYS)
        tile_scores<4>(cache, narrowed, at, end, scratch + at - begin, stride * 4);
    for (; at < begin + width; at += GROUP_KEYS)
        tile_scores<1>(cache, narrowed, at, end, scratch + at - begin, stride * 4);
    float totals[MOST_QUERIES];
    for (int r = 0; r < num; ++r)
        totals[r] = weigh<HALVES>(scratch + r * stride, begin, begin + int(width), first[r], last[r]);
    auto weights = (const uint16_t*)scratch;
    int dim = 0;
    for (; dim + 64 <= d; dim += 64) tile_mix<4>(cache, weights, stride, begin, end, dim, out + dim, d * 4);
    if (dim + 48 <= d) tile_mix<3>(cache, weights, stride, begin, end, dim, out + dim, d * 4), dim += 48;
    for (; dim < d; dim += 16) tile_mix<1>(cache, weights, stride, begin, end, dim, out + dim, d * 4);
    for (int r = 0; r < num; ++r)
        for (int i = 0; i < d; i += WIDTH) store(mixed[r] + i, load(out + r * d + i) / totals[r]);
}
#endif

// Any number of queries, at most MOST_QUERIES.
template <class T>
static void attend(const Cache<T>& cache, int num, const float* const* queries, const int* first, const int* last,
                   float* scratch, float* const* mixed) {
    constexpr int MOST = sizeof(T) == 2 ? 4 : 8;
#if defined(__AMX_TILE__)
    if constexpr (sizeof(T) == 2)
        if (num > 1 && cache.head_dim % 16 == 0 && cache.head_dim <= MOST_TILE_DIM)
            return attend_tiles(cache, num, queries, first, last, scratch, mixed);
#endif
    for (int done = 0; done < num;) {
        int left = num - done, step = left >= MOST ? MOST : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        auto q = queries + done;
        auto f = first + done, l = last + done;
        auto out = mixed + done;
        if (step == 8) attend<T, MOST>(cache, q, f, l, scratch, out);
        else if (step == 4) attend<T, 4>(cache, q, f, l, scratch, out);
        else if (step == 2) attend<T, 2>(cache, q, f, l, scratch, out);
        else attend<T, 1>(cache, q, f, l, scratch, out);
        done += step;
    }
}
