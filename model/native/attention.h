// Attention of some query rows over one kv head's keys and values, straight from the cache's blocks.
//
// Keys lie transposed within a block, so that one register holds as many keys as it has lanes and a score is a chain
// of additions over the head's dimensions, never a sum across lanes. Whatever is masked is multiplied by an exact 0:
// neither neighbours nor the width of a chunk can show in a row.
//
// In bfloat16 the cache has pairs, as the matrix unit wants them: two dimensions of a key, two keys of a value. Queries
// and weights are rounded to bfloat16, and everything is added as that unit adds it: of each 32 dimensions, and of each
// GROUP_KEYS keys, the even and the odd ones have sums of their own. So rows computed with it are those computed with
// vectors, to the bit.
#pragma once
#include "linear.h"
#include "vec.h"

constexpr int MOST_QUERIES = 16, GROUP_KEYS = 16;

template <class T> struct Cache {  // one layer's, one kv head's
    const T *keys, *values;
    const int32_t* blocks;  // of the sequence
    int block_size, head_dim;
    static constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;  // numbers that stand together

    // `WIDTH` keys from position `at` on; dimensions, or pairs of them, are block_size keys apart.
    const T* key_lanes(int at) const {
        return keys + int64_t(blocks[at / block_size]) * block_size * head_dim + at % block_size * PAIR;
    }
    const T* value(int at) const {  // or the pair that begins there
        return values + (int64_t(blocks[at / block_size]) * block_size + at % block_size) * head_dim;
    }
};

struct Pairs {  // of bfloat16, as two registers of floats
    vec even, odd;
    Pairs() = default;
    Pairs(uvec both) : even((vec)(both << 16)), odd((vec)(both & 0xffff0000u)) {}
};
static inline Pairs load_pairs(const uint16_t* p, int num = WIDTH) {  // the first `num` of them, then zeros
    uvec both = {};
    if (num >= WIDTH) std::memcpy(&both, p, sizeof both);
    else std::memcpy(&both, p, num * 4);
    return both;
}

// scores[r][at - begin] for `N * WIDTH` keys from `at` on.
template <int R, int N>
static inline void scores_of(const Cache<float>& cache, const float* const* queries, int at, int end, float* scores,
                             int64_t width) {
    vec sums[R][N] = {};
    const float *keys[N], *next[N];
    for (int n = 0; n < N; ++n) {
        keys[n] = cache.key_lanes(at + n * WIDTH);
        int later = at + (N + n) * WIDTH;
        next[n] = later < end ? cache.key_lanes(later) : keys[n];
    }
    for (int d = 0; d < cache.head_dim; ++d) {
        vec lanes[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            lanes[n] = load(keys[n] + d * cache.block_size);
            __builtin_prefetch(next[n] + d * cache.block_size);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[r][n] += lanes[n] * queries[r][d];
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(scores + r * width + n * WIDTH, sums[r][n]);
}

template <int R, int N>
static inline void scores_of(const Cache<uint16_t>& cache, const float* const* queries, int at, int end, float* scores,
                             int64_t width) {
    vec sums[R][N] = {};
    const uint16_t *keys[N], *next[N];
    for (int n = 0; n < N; ++n) {
        keys[n] = cache.key_lanes(at + n * WIDTH);
        int later = at + (N + n) * WIDTH;
        next[n] = later < end ? cache.key_lanes(later) : keys[n];
    }
    for (int begin = 0; begin < cache.head_dim; begin += 32) {
        int stop = begin + 32 < cache.head_dim ? begin + 32 : cache.head_dim;
        vec even[R][N] = {}, odd[R][N] = {};
        for (int d = begin; d < stop; d += 2) {
            Pairs lanes[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                lanes[n] = load_pairs(keys[n] + d * cache.block_size);
                __builtin_prefetch(next[n] + d * cache.block_size);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    even[r][n] += lanes[n].even * queries[r][d];
                    odd[r][n] += lanes[n].odd * queries[r][d + 1];
                }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sums[r][n] += even[r][n] + odd[r][n];
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(scores + r * width + n * WIDTH, sums[r][n]);
}

// How the weights of keys are left where the scores were: as they are; rounded to bfloat16; as bfloat16 in half the room.
enum Form { PLAIN, ROUNDED, HALVES };

// A row's scores -> e**(score - highest) of the keys first .. last, 0 for the others; returns their sum.
template <Form form> static inline float weigh(float* scores, int begin, int end, int first, int last) {
    vec lane, lowest = vec{} - INFINITY;
    for (int i = 0; i < WIDTH; ++i) lane[i] = float(i);
    vec peaks = lowest;
    for (int at = begin; at < end; at += WIDTH) {
        vec here = load(scores + at - begin);
        if (at < first || at + WIDTH - 1 > last) {
            vec place = lane + float(at);
            here = place >= float(first) ? here : lowest;
            here = place <= float(last) ? here : lowest;
            store(scores + at - begin, here);
        }
        peaks = here > peaks ? here : peaks;
    }
    float peak = -INFINITY;
    for (int i = 0; i < WIDTH; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
    vec sums = {};
    for (int i = 0; i < end - begin; i += WIDTH) {
        vec weights = exponential(load(scores + i) - peak);
        sums += weights;
        if (form == PLAIN) store(scores + i, weights);
        if (form == ROUNDED) store(scores + i, rounded(weights));
        if (form == HALVES) store_halves((uint16_t*)scores + i, rounded(weights));  // before what is still to be read
    }
    return total(sums);
}

// mixed[r][dim ..] = sum of weights times values, for `V` registers of dimensions of which the last may be in part. Keys
// at even and at odd positions are summed apart: two chains, so that one need not wait for the other.
template <int R, int V, bool PART>
static inline void mix(const Cache<float>& cache, const float* weights, int64_t width, int begin, int end, int dim,
                       const float* totals, float* const* mixed) {
    vec sums[2][R][V] = {};
    int num = PART ? cache.head_dim - dim : V * WIDTH;
    for (int block = begin; block < end;) {
        int stop = block + cache.block_size - block % cache.block_size;
        const float* values = cache.value(block) + dim;
        const float* next = stop < end ? cache.value(stop) + dim : values;
        stop = stop < end ? stop : end + end % 2;  // a key too many has the weight 0
        for (; block < stop; block += 2) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd, values += cache.head_dim, next += cache.head_dim) {
                vec part[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    part[v] = PART && v == V - 1 ? load_some(values + v * WIDTH, num - v * WIDTH) : load(values + v * WIDTH);
                    __builtin_prefetch(next + v * WIDTH);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) sums[odd][r][v] += part[v] * weights[r * width + block + odd - begin];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        float out[V * WIDTH];
        for (int v = 0; v < V; ++v) store(out + v * WIDTH, (sums[0][r][v] + sums[1][r][v]) / totals[r]);
        std::memcpy(mixed[r] + dim, out, sizeof(float) * num);
    }
}

template <int R, int V, bool PART>
static inline void mix(const Cache<uint16_t>& cache, const float* weights, int64_t width, int begin, int end, int dim,
                       const float* totals, float* const* mixed) {
    vec sums[R][V] = {};
    int num = PART ? cache.head_dim - dim : V * WIDTH;
    for (int at = begin; at < end; at += GROUP_KEYS) {
        const uint16_t* values = cache.value(at) + 2 * dim;
        const uint16_t* next = at + GROUP_KEYS < end ? cache.value(at + GROUP_KEYS) + 2 * dim : values;
        vec even[R][V] = {}, odd[R][V] = {};
        for (int key = at - begin; key < at - begin + GROUP_KEYS; key += 2) {
            Pairs part[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                part[v] = load_pairs(values + 2 * v * WIDTH, PART && v == V - 1 ? num - v * WIDTH : WIDTH);
                __builtin_prefetch(next + 2 * v * WIDTH);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    even[r][v] += part[v].even * weights[r * width + key];
                    odd[r][v] += part[v].odd * weights[r * width + key + 1];
                }
            values += 2 * cache.head_dim, next += 2 * cache.head_dim;
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] += even[r][v] + odd[r][v];
    }
    for (int r = 0; r < R; ++r) {
        float out[V * WIDTH];
        for (int v = 0; v < V; ++v) store(out + v * WIDTH, sums[r][v] / totals[r]);
        std::memcpy(mixed[r] + dim, out, sizeof(float) * num);
    }
}

struct Span {  // of keys that some rows see together, in whole groups
    int begin, end;
    int64_t width;

    Span(int num, const int* first, const int* last) : begin(first[0]), end(last[0] + 1) {
        for (int r = 1; r < num; ++r) {
            begin = first[r] < begin ? first[r] : begin;
            end = last[r] >= end ? last[r] + 1 : end;
        }
        begin -= begin % GROUP_KEYS;
        width = (end - begin + GROUP_KEYS - 1) / GROUP_KEYS * GROUP_KEYS;
    }
};

// R queries that read the same kv head: row r may see keys first[r] .. last[r]. `scratch`: for R * (keys + GROUP_KEYS).
template <class T, int R>
static void attend(const Cache<T>& cache, const float* const* queries, const int* first, const int* last,
                   float* scratch, float* const* mixed) {
    constexpr int N = R >= 4 ? 2 : 4;
    Span span(R, first, last);
    int begin = span.begin, end = span.end, at = begin;
    int64_t width = span.width;
    for (; at + N * WIDTH <= begin + width; at += N * WIDTH)
        scores_of<R, N>(cache, queries, at, end, scratch + at - begin, width);
    for (; at < begin + width; at += WIDTH) scores_of<R, 1>(cache, queries, at, end, scratch + at - begin, width);
    float totals[R];
    for (int r = 0; r < R; ++r)
        totals[r] = weigh<sizeof(T) == 2 ? ROUNDED : PLAIN>(scratch + r * width, begin, begin + int(width), first[r],
                                                            last[r]);
    constexpr int V = WIDTH < 16 || R > 2 ? 1 : R > 1 ? 2 : 4;
    int dim = 0, d = cache.head_dim;
    for (; dim + V * WIDTH <= d; dim += V * WIDTH)
        mix<R, V, false>(cache, scratch, width, begin, end, dim, totals, mixed);
    if (V > 2 && dim + 3 * WIDTH <= d) {
        mix<R, V == 4 ? 3 : V, false>(cache, scratch, width, begin, end, dim, totals, mixed);
        dim += 3 * WIDTH;
    }
    for (; dim + WIDTH <= d; dim += WIDTH)
        mix<R, 1, false>(cache, scratch, width, begin, end, dim, totals, mixed);
    if (dim < d) mix<R, 1, true>(cache, scratch, width, begin, end, dim, totals, mixed);
}
