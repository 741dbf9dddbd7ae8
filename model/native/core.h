// What crosses the line between Python and the core: plain structs, all pointers owned by the caller.
//
// `library.py` mirrors them field by field. A matrix is packed in panels of PANEL output channels, and within a panel
// in the order in which it is read: [panel][input / group][PANEL][group], where `group` inputs (1 float, 2 bfloat16,
// 4 int8) stand together. A gated MLP's `up` has the panels of gate and up-projection in turn. Vectors that belong to
// a matrix (scales, sums, bias) have one number for each channel of its panels, in the same order.
#pragma once
#include <cstdint>

constexpr int PANEL = 48;  // output channels that are computed together: 3 registers of AVX-512

enum Precision : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum EmbedKind : int32_t { ROWS_FLOAT32 = 0, ROWS_BFLOAT16 = 1, IN_HEAD = 2 };  // IN_HEAD: read from the packed head

#define VISIBLE __attribute__((visibility("default")))

extern "C" {

struct Linear {
    const void* weights;
    const float* scales;   // int8 only: of each channel
    const int32_t* sums;   // int8 only: 128 * the sum of each channel's weights
    const float* bias;     // or null
    int32_t num_in, num_out;  // num_out: of the gate alone if the matrix is a gated MLP's `up`
};

struct Norm {
    const float* weight;
    const float* bias;  // null: RMSNorm; else LayerNorm
};

struct Layer {
    Norm attn_norm, mlp_norm;
    const float *q_norm, *k_norm;  // both or none
    Linear qkv, out, up, down;
    void *keys, *values;  // [kv_heads][num_blocks] blocks: keys [head_dim][block_size], values [block_size][head_dim]
    int64_t window;       // keys that a row sees, its own included; 0: all
};

struct Network {
    int32_t precision, cache_bfloat16, embed_kind, activation, gated;
    int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, inner, vocab;
    int32_t block_size, num_blocks, max_rows, max_len;
    float eps;
    const void* embed;
    const float* positions;     // [max_position][hidden], or null
    const float *cosine, *sine; // [max_position][head_dim / 2], or null
    Norm norm;
    Linear head;
    const Layer* layers;
};

struct Chunk {
    int32_t first_row, num_rows, start;  // rows of the step that are positions start .. start + num_rows - 1
    int32_t table;                       // where the sequence's blocks begin in `tables`
};

struct Step {
    int32_t num_rows, num_chunks, num_wanted, num_told;
    const int32_t* ids;     // [num_rows]
    const Chunk* chunks;    // cover all rows, in order
    const int32_t* tables;  // block numbers
    const int32_t* wanted;  // [num_wanted] rows whose logits are wanted
    float* logits;          // [num_wanted][vocab]
    int32_t* best;          // [num_wanted] the highest logit's id, the lowest among equals; -1: it is not finite
    uint8_t* finite;        // [num_rows]
    const int32_t* told;    // [num_told] rows whose final hidden numbers are wanted
    float* hidden;          // [num_told][hidden]
};

VISIBLE int millrace_level();  // 0: any processor, 1: AVX2, 2: AVX-512 with VNNI and bfloat16, 3: and AMX
VISIBLE void* millrace_open(const Network* network, int num_threads);
VISIBLE void millrace_step(void* core, const Step* step);
VISIBLE void millrace_close(void* core);
}
