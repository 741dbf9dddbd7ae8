// One row at a time: its norm, and its numbers as what a matrix of some precision is multiplied with.
#pragma once
#include <cmath>
#include <cstring>

#include "core.h"
#include "vec.h"

// Row `x` as a matrix's operand. In float32 it is one already.
static inline void prepare(int precision, const float* x, int num, char* operand, float* scale) {
    if (precision == BFLOAT16) {
        auto out = (uint16_t*)operand;
        for (int i = 0; i < num; ++i) out[i] = narrow(x[i]);
        std::memset(out + num, 0, (32 - num % 32) % 32 * sizeof *out);  // matrix units take 64 bytes at a time
    } else if (precision == INT8) {
        auto out = (uint8_t*)operand;
        vec peaks = {}, zeros = {};
        for (int i = 0; i < num; i += WIDTH) {  // beyond `num` there are zeros
            vec part = load(x + i);
            peaks = larger(peaks, larger(part, -part));
            zeros += part * 0.0f;
        }
        float largest = 0;
        for (int i = 0; i < WIDTH; ++i) largest = peaks[i] > largest ? peaks[i] : largest;
        float one = largest / 127.0f;
        *scale = one + total(zeros);  // NaN if anything is not finite, and so is the whole product
        if (!(largest > 0)) one = 1;
        for (int i = 0; i < num; ++i) {
            float rounded = x[i] / one + 12582912.0f;  // to even: the sum's lowest bits are the whole number
            int32_t bits;
            std::memcpy(&bits, &rounded, 4);
            out[i] = uint8_t((bits & 0xff) + 128);
        }
        std::memset(out + num, 0, (64 - num % 64) % 64);
    }
}

static inline void norm(const Norm& n, const float* x, int num, float eps, float* out) {
    vec squares = {}, sums = {};
    float mean = 0;
    if (n.bias) {
        for (int i = 0; i < num; i += WIDTH) sums += load_some(x + i, num - i);
        mean = total(sums) / num;
    }
    for (int i = 0; i < num; i += WIDTH) {
        vec part = load_some(x + i, num - i) - mean;
        if (num - i < WIDTH)
            for (int j = num - i; j < WIDTH; ++j) part[j] = 0;
        squares += part * part;
    }
    float factor = 1.0f / std::sqrt(total(squares) / num + eps);
    for (int i = 0; i < num; ++i) out[i] = (x[i] - mean) * factor * n.weight[i] + (n.bias ? n.bias[i] : 0.0f);
}
