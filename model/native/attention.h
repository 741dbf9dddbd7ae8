// Attention of some query rows over one kv head's keys and values, straight from the cache's blocks.
//
// Keys lie transposed within a block, so that one register holds as many keys as it has lanes and a score is a chain
// of additions over the head's dimensions, never a sum across lanes. Whatever is masked is multiplied by an exact 0:
// neither neighbours nor the width of a chunk can show in a row.
#pragma once
#include "vec.h"

constexpr int MOST_QUERIES = 8;

template <class T> struct Cache {  // one layer's, one kv head's
    const T *keys, *values;
    const int32_t* blocks;  // of the sequence
    int block_size, head_dim;

    const T* key_lanes(int at) const {  // `WIDTH` keys from position `at` on; dimensions are block_size apart
        return keys + int64_t(blocks[at / block_size]) * block_size * head_dim + at % block_size;
    }
    const T* value(int at) const {
        return values + (int64_t(blocks[at / block_size]) * block_size + at % block_size) * head_dim;
    }
};

// scores[r][at - begin] for `N * WIDTH` keys from `at` on.
template <class T, int R, int N>
static inline void scores_of(const Cache<T>& cache, const float* const* queries, int at, int end, float* scores,
                             int64_t width) {
    vec sums[R][N] = {};
    const T *keys[N], *next[N];
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

// scores[r] -> e**(score - highest) of the keys first .. last, 0 for the others; returns their sum.
static inline float weigh(float* scores, int begin, int end, int first, int last) {
    vec lane, lowest = vec{} - INFINITY;
    for (int i = 0; i < WIDTH; ++i) lane[i] = float(i);
    vec peaks = lowest;
    for (int at = begin; at < end; at += WIDTH) {
        vec here = load(scores + at - begin), place = lane + float(at);
        here = place >= float(first) ? here : lowest;
        here = place <= float(last) ? here : lowest;
        store(scores + at - begin, here);
        peaks = here > peaks ? here : peaks;
    }
    float peak = -INFINITY;
    for (int i = 0; i < WIDTH; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
    vec sums = {};
    for (int at = begin; at < end; at += WIDTH) {
        vec weights = exponential(load(scores + at - begin) - peak);
        store(scores + at - begin, weights);
        sums += weights;
    }
    return total(sums);
}

// mixed[r][dim ..] = sum of weights times values, for `V` registers of dimensions of which the last may be in part. Keys
// at even and at odd positions are summed apart: two chains, so that one need not wait for the other.
template <class T, int R, int V, bool PART>
static inline void mix(const Cache<T>& cache, const float* weights, int64_t width, int begin, int end, int dim,
                       const float* totals, float* const* mixed) {
    vec sums[2][R][V] = {};
    int num = PART ? cache.head_dim - dim : V * WIDTH;
    for (int block = begin; block < end;) {
        int stop = block + cache.block_size - block % cache.block_size;
        const T* values = cache.value(block) + dim;
        const T* next = stop < end ? cache.value(stop) + dim : values;
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

// R queries that read the same kv head: row r may see keys first[r] .. last[r]. `scratch`: for R * (keys + WIDTH).
template <class T, int R>
static void attend(const Cache<T>& cache, const float* const* queries, const int* first, const int* last,
                   float* scratch, float* const* mixed) {
    constexpr int N = R >= 4 ? 2 : 4;
    int begin = first[0], end = last[0] + 1;
    for (int r = 1; r < R; ++r) {
        begin = first[r] < begin ? first[r] : begin;
        end = last[r] >= end ? last[r] + 1 : end;
    }
    begin -= begin % WIDTH;
    int64_t width = (end - begin + WIDTH - 1) / WIDTH * WIDTH;
    int at = begin;
    for (; at + N * WIDTH <= begin + width; at += N * WIDTH)
        scores_of<T, R, N>(cache, queries, at, end, scratch + at - begin, width);
    for (; at < begin + width; at += WIDTH) scores_of<T, R, 1>(cache, queries, at, end, scratch + at - begin, width);
    float totals[R];
    for (int r = 0; r < R; ++r) totals[r] = weigh(scratch + r * width, begin, begin + int(width), first[r], last[r]);
    constexpr int V = WIDTH < 16 || R > 2 ? 1 : R > 1 ? 2 : 4;
    int dim = 0, d = cache.head_dim;
    for (; dim + V * WIDTH <= d; dim += V * WIDTH)
        mix<T, R, V, false>(cache, scratch, width, begin, end, dim, totals, mixed);
    if (V > 2 && dim + 3 * WIDTH <= d) {
        mix<T, R, V == 4 ? 3 : V, false>(cache, scratch, width, begin, end, dim, totals, mixed);
        dim += 3 * WIDTH;
    }
    for (; dim + WIDTH <= d; dim += WIDTH)
        mix<T, R, 1, false>(cache, scratch, width, begin, end, dim, totals, mixed);
    if (dim < d) mix<T, R, 1, true>(cache, scratch, width, begin, end, dim, totals, mixed);
}

// Any number of queries.
template <class T>
static void attend(const Cache<T>& cache, int num, const float* const* queries, const int* first, const int* last,
                   float* scratch, float* const* mixed) {
    for (int done = 0; done < num;) {
        int left = num - done, step = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        auto q = queries + done;
        auto f = first + done, l = last + done;
        auto out = mixed + done;
        if (step == 8) attend<T, 8>(cache, q, f, l, scratch, out);
        else if (step == 4) attend<T, 4>(cache, q, f, l, scratch, out);
        else if (step == 2) attend<T, 2>(cache, q, f, l, scratch, out);
        else attend<T, 1>(cache, q, f, l, scratch, out);
        done += step;
    }
}
