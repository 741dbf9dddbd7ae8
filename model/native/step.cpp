// One step of a decoder on the CPU: rows of ids in, logits out, every phase of every layer shared out to a team.
//
// It knows nothing of requests or of who owns a block. The residual stream, norms, scores and sums are float32 whatever
// the weights are; `prepare` turns rows into what a matrix is multiplied with.
#include <cstdlib>

#include "core.h"
#include "linear.h"
#include "rows.h"
#include "team.h"
#include "tiles.h"
#include "vec.h"

namespace {

constexpr int ALIGNMENT = 64, FEW_ROWS = 16, MOST_AHEAD = 256 << 10;
int64_t padded(int64_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

template <class T> T* reserve(int64_t count) {  // zeros
    size_t bytes = padded(count * int64_t(sizeof(T)) + ALIGNMENT);
    void* memory = std::aligned_alloc(ALIGNMENT, bytes);
    std::memset(memory, 0, bytes);
    return (T*)memory;
}

struct Core {
    Network net;
    Team team;
    Layer* layers;
    int64_t hidden, heads_width, qkv_width, inner;  // numbers from one row to the next
    int64_t operand_width;                          // bytes
    float *x, *normed, *qkv, *mixed, *wide, *scales;
    char* operands;
    float** scratch;  // of each thread
    int* first_task;  // of attention, of each chunk

    Core(const Network& network, int num_threads) : net(network), team(num_threads) {
        layers = reserve<Layer>(net.num_layers);
        std::memcpy(layers, net.layers, sizeof(Layer) * net.num_layers);
        hidden = padded(net.hidden), inner = padded(net.inner);
        heads_width = padded(int64_t(net.num_heads) * net.head_dim);
        qkv_width = padded(int64_t(net.num_heads + 2 * net.num_kv_heads) * net.head_dim);
        int64_t widest = hidden > inner ? hidden : inner, rows = net.max_rows;
        operand_width = 2 * (widest > heads_width ? widest : heads_width) + 64;  // neighbours not in one set of the cache
        x = reserve<float>(rows * hidden), normed = reserve<float>(rows * hidden);
        qkv = reserve<float>(rows * qkv_width), mixed = reserve<float>(rows * heads_width);
        wide = reserve<float>(rows * inner), scales = reserve<float>(rows);
        operands = reserve<char>((rows + MOST_ROWS) * operand_width);  // rows beyond the last are multiplied too
        scratch = reserve<float*>(team.num());
        for (int i = 0; i < team.num(); ++i)
            scratch[i] = reserve<float>(MOST_QUERIES * (padded(net.max_len) + 2 * ALIGNMENT));
        first_task = reserve<int>(rows + 1);
    }
    ~Core() {
        for (int i = 0; i < team.num(); ++i) std::free(scratch[i]);
        for (void* memory : {(void*)layers, (void*)x, (void*)normed, (void*)qkv, (void*)mixed, (void*)wide,
                             (void*)scales, (void*)operands, (void*)scratch, (void*)first_task})
            std::free(memory);
    }
};

struct Rows {  // what a matrix is multiplied with
    const char* operands;
    int64_t width;  // numbers from one row to the next
    const float* scales;
    int num;
};

// Whether threads take two panels at a time: unless, dealt out in pairs, they would take more than a fifth longer.
bool in_pairs(int num_panels, int num_threads) {
    int rounds = (num_panels + num_threads - 1) / num_threads;
    int rounds_of_pairs = ((num_panels + 1) / 2 + num_threads - 1) / num_threads;
    return 2 * rounds_of_pairs * 5 <= rounds * 6;
}

// f(row, channel, values, up, count) for every row and every panel of a matrix. Long lists of rows are cut, so that a
// panel's weights meet rows that are still in the cache, and threads outnumbering panels have work too.
template <class P, class F>
void multiply(Core& c, Team::Member& me, const Linear& m, bool gated, const Rows& rows, const F& f) {
    constexpr int SLICE = 64;
    int num_panels = (m.num_out + PANEL - 1) / PANEL, num_slices = (rows.num + SLICE - 1) / SLICE;
    int each = !gated && in_pairs(num_panels, c.team.num()) ? 2 : 1;
    c.team.each(me, (num_panels + each - 1) / each * num_slices, [&](int task) {
        int panel = task / num_slices * each, begin = task % num_slices * SLICE;
        int end = begin + SLICE < rows.num ? begin + SLICE : rows.num;
        int num_here = panel + each <= num_panels ? each : 1;
        alignas(64) float out[2 * MOST_ROWS * PANEL];
        for (int row = begin; row < end; row += MOST_ROWS) {
            int num = end - row < MOST_ROWS ? end - row : MOST_ROWS;
            const void* x = (const typename P::X*)rows.operands + row * rows.width;
            tile<P>(m, gated ? 2 * panel : panel, gated ? 2 : num_here, x, rows.width, rows.scales + row, num, out);
            for (int i = 0; i < num_here; ++i) {
                int channel = (panel + i) * PANEL, count = m.num_out - channel < PANEL ? m.num_out - channel : PANEL;
                const float *first = out + i * MOST_ROWS * PANEL, *up = out + MOST_ROWS * PANEL;
                for (int r = 0; r < num; ++r) f(row + r, channel, first + r * PANEL, up + r * PANEL, count);
            }
        }
    });
}

int rows_per_task(const Network& net) {  // of attention: as many as share their keys in registers
    int rows = MOST_QUERIES * net.num_kv_heads / net.num_heads;
    return rows ? rows : 1;
}

int count_tasks(Core& c, const Step& step) {
    int sum = 0, each = rows_per_task(c.net);
    for (int i = 0; i < step.num_chunks; ++i) {
        c.first_task[i] = sum;
        sum += (step.chunks[i].num_rows + each - 1) / each * c.net.num_kv_heads;
    }
    return sum;
}

template <class P> struct Forward {
    Core& c;
    const Step step;      // a copy: see `Team::Job`
    const int num_tasks;  // of attention
    Team::Member& me;
    const Network& net = c.net;

    Rows operand(const float* rows, int64_t width, int num) const {
        if (net.precision == FLOAT32) return {(const char*)rows, width, c.scales, num};
        return {c.operands, c.operand_width / int64_t(sizeof(typename P::X)), c.scales, num};
    }
    void prepare_row(int row, const float* x, int num) const {
        prepare(net.precision, x, num, c.operands + row * c.operand_width, c.scales + row);
    }

    void embed(int row) const {
        int id = step.ids[row], num = net.hidden;
        float* x = c.x + row * c.hidden;
        if (net.embed_kind == ROWS_FLOAT32) {
            std::memcpy(x, (const float*)net.embed + int64_t(id) * num, num * sizeof(float));
        } else if (net.embed_kind == ROWS_BFLOAT16) {
            for (int i = 0; i < num; ++i) x[i] = widen(((const uint16_t*)net.embed)[int64_t(id) * num + i]);
        } else {
            int64_t groups = (num + P::GROUP - 1) / P::GROUP;
            auto w = (const typename P::W*)net.head.weights + (id / PANEL * groups * PANEL + id % PANEL) * P::GROUP;
            for (int i = 0; i < num; ++i) x[i] = as_float(w[i / P::GROUP * PANEL * P::GROUP + i % P::GROUP]);
        }
    }
    static float as_float(float w) { return w; }
    static float as_float(uint16_t w) { return widen(w); }
    static float as_float(int8_t w) { return w; }

    void place(const Chunk& chunk, int row) const {  // learned positions
        const float* position = net.positions + int64_t(chunk.start + row - chunk.first_row) * net.hidden;
        for (int i = 0; i < net.hidden; ++i) c.x[row * c.hidden + i] += position[i];
    }

    // One head of a row: normed, turned by its position, scaled.
    void finish_head(float* head, const float* weight, int position, float scale) const {
        int d = net.head_dim, half = d / 2;
        if (weight) norm({weight, nullptr}, head, d, net.eps, head);
        if (net.cosine) {
            const float *cosine = net.cosine + int64_t(position) * half, *sine = net.sine + int64_t(position) * half;
            for (int i = 0; i < half; ++i) {
                float a = head[i], b = head[i + half];
                head[i] = a * cosine[i] - b * sine[i];
                head[i + half] = b * cosine[i] + a * sine[i];
            }
        }
        for (int i = 0; i < d; ++i) head[i] *= scale;
    }

    static void put(float* at, float number) { *at = number; }
    static void put(uint16_t* at, float number) { *at = narrow(number); }

    // The heads of one row that share a kv head: finished, keys and values written to the cache.
    template <class T> void enter(const Layer& layer, const Chunk& chunk, int row, int kv) const {
        int d = net.head_dim, size = net.block_size, shared = net.num_heads / net.num_kv_heads;
        int position = chunk.start + row - chunk.first_row;
        constexpr int PAIR = Cache<T>::PAIR;
        float* qkv = c.qkv + row * c.qkv_width;
        float scale = 1.0f / std::sqrt(float(d));
        for (int i = 0; i < shared; ++i) {
            float* query = qkv + (kv * shared + i) * d;
            finish_head(query, layer.q_norm, position, scale);
            int done = 0;
            for (; PAIR == 2 && done + WIDTH <= d; done += WIDTH) store(query + done, rounded(load(query + done)));
            for (; PAIR == 2 && done < d; ++done) query[done] = widen(narrow(query[done]));
        }
        float *k = qkv + (net.num_heads + kv) * d, *v = qkv + (net.num_heads + net.num_kv_heads + kv) * d;
        finish_head(k, layer.k_norm, position, 1.0f);
        int64_t block = int64_t(kv) * net.num_blocks + step.tables[chunk.table + position / size];
        int at = position % size;
        T* keys = (T*)layer.keys + block * size * d + at * PAIR;
        T* values = (T*)layer.values + (block * size + at / PAIR * PAIR) * d + at % PAIR;
        for (int i = 0; i < d; ++i) {
            put(keys + i / PAIR * PAIR * size + i % PAIR, k[i]);
            put(values + i * PAIR, v[i]);
        }
    }

    template <class T> void attend_some(const Layer& layer, int task) const {
        int low = 0, high = step.num_chunks - 1;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (c.first_task[middle] <= task) low = middle;
            else high = middle - 1;
        }
        const Chunk& chunk = step.chunks[low];
        int shared = net.num_heads / net.num_kv_heads, d = net.head_dim, each = rows_per_task(net);
        int pieces = (chunk.num_rows + each - 1) / each;  // of one kv head in turn: they read the same keys and values
        int kv = (task - c.first_task[low]) / pieces, piece = (task - c.first_task[low]) % pieces;
        int begin = piece * each, end = begin + each < chunk.num_rows ? begin + each : chunk.num_rows;
        int64_t head = int64_t(kv) * net.num_blocks * net.block_size * d;
        Cache<T> cache{(T*)layer.keys + head, (T*)layer.values + head, step.tables + chunk.table, net.block_size, d};
        const float* queries[MOST_QUERIES];
        float* mixed[MOST_QUERIES];
        int first[MOST_QUERIES], last[MOST_QUERIES], num = 0;
        for (int i = begin; i < end; ++i)
            for (int h = kv * shared; h < (kv + 1) * shared; ++h) {
                int64_t row = chunk.first_row + i;
                queries[num] = c.qkv + row * c.qkv_width + h * d;
                mixed[num] = c.mixed + row * c.heads_width + h * d;
                last[num] = chunk.start + i;
                first[num] = layer.window && last[num] >= layer.window ? last[num] - int(layer.window) + 1 : 0;
                if (++num == MOST_QUERIES || (i == end - 1 && h == (kv + 1) * shared - 1)) {
                    attend(cache, num, queries, first, last, c.scratch[me.me], mixed);
                    num = 0;
                }
            }
    }

    template <class T> void attention(const Layer& layer) const {
        c.team.each(me, step.num_rows * net.num_kv_heads, [&](int task) {
            int row = task / net.num_kv_heads;
            enter<T>(layer, chunk_of(row), row, task % net.num_kv_heads);
        });
        c.team.each(me, num_tasks, [&](int task) { attend_some<T>(layer, task); });
    }

    const Chunk& chunk_of(int row) const {
        int low = 0, high = step.num_chunks - 1;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (step.chunks[middle].first_row <= row) low = middle;
            else high = middle - 1;
        }
        return step.chunks[low];
    }

    // x += rows times a matrix.
    void add(const Linear& m, const Rows& rows) const {
        multiply<P>(c, me, m, false, rows, [&](int row, int channel, const float* out, const float*, int count) {
            float* x = c.x + row * c.hidden + channel;
            for (int i = 0; i < count; ++i) x[i] += out[i];
        });
    }

    void norm_rows(const Norm& weights) const {
        c.team.each(me, step.num_rows, [&](int row) {
            float* out = c.normed + row * c.hidden;
            norm(weights, c.x + row * c.hidden, net.hidden, net.eps, out);
            prepare_row(row, out, net.hidden);
        });
    }

    void prepare_rows(const float* rows, int64_t width, int num) const {
        if (net.precision != FLOAT32)
            c.team.each(me, step.num_rows, [&](int row) { prepare_row(row, rows + row * width, num); });
    }

    // The beginning of this thread's share of a matrix is read next. It is fetched in the waits before: with few rows,
    // steps are as long as reading the weights takes, and memory must not rest meanwhile.
    void next(const Linear& m, bool gated = false) const {
        if (step.num_rows > FEW_ROWS) return;
        int num = (m.num_out + PANEL - 1) / PANEL, each = gated ? 2 : 1;
        int begin = int(int64_t(num) * me.me / c.team.num()), end = int(int64_t(num) * (me.me + 1) / c.team.num());
        me.ahead = (const char*)panel_of<P>(m, begin * each);
        int64_t share = (const char*)panel_of<P>(m, end * each) - me.ahead;
        me.ahead_end = me.ahead + (share < MOST_AHEAD ? share : MOST_AHEAD);
    }

    void layer(const Layer& layer, const Linear& following) const {
        int num = step.num_rows;
        norm_rows(layer.attn_norm);
        next(layer.out);
        multiply<P>(c, me, layer.qkv, false, operand(c.normed, c.hidden, num),
                    [&](int row, int channel, const float* out, const float*, int count) {
                        std::memcpy(c.qkv + row * c.qkv_width + channel, out, count * sizeof(float));
                    });
        if (net.cache_bfloat16) attention<uint16_t>(layer);
        else attention<float>(layer);
        prepare_rows(c.mixed, c.heads_width, net.num_heads * net.head_dim);
        next(layer.up, net.gated);
        add(layer.out, operand(c.mixed, c.heads_width, num));
        norm_rows(layer.mlp_norm);
        next(layer.down);
        multiply<P>(c, me, layer.up, net.gated, operand(c.normed, c.hidden, num),
                    [&](int row, int channel, const float* out, const float* up, int count) {
                        float* h = c.wide + row * c.inner + channel;
                        for (int i = 0; i < PANEL && i < count; i += WIDTH) {
                            vec part = activate(net.activation, load(out + i));
                            if (net.gated) part *= load(up + i);
                            float numbers[WIDTH];
                            store(numbers, part);
                            int some = count - i < WIDTH ? count - i : WIDTH;
                            std::memcpy(h + i, numbers, some * sizeof(float));
                        }
                    });
        prepare_rows(c.wide, c.inner, net.inner);
        next(following);
        add(layer.down, operand(c.wide, c.inner, num));
    }

    void logits() const {
        c.team.each(me, step.num_rows, [&](int row) {
            vec zeros = {};
            for (int i = 0; i < net.hidden; i += WIDTH) zeros += load(c.x + row * c.hidden + i) * 0.0f;
            step.finite[row] = total(zeros) == 0;
        });
        c.team.each(me, step.num_told, [&](int i) {
            float* out = step.hidden + int64_t(i) * net.hidden;
            norm(net.norm, c.x + step.told[i] * c.hidden, net.hidden, net.eps, out);
        });
        c.team.each(me, step.num_wanted, [&](int i) {
            float* out = c.normed + i * c.hidden;
            norm(net.norm, c.x + step.wanted[i] * c.hidden, net.hidden, net.eps, out);
            prepare_row(i, out, net.hidden);
        });
        multiply<P>(c, me, net.head, false, operand(c.normed, c.hidden, step.num_wanted),
                    [&](int row, int channel, const float* out, const float*, int count) {
                        std::memcpy(step.logits + int64_t(row) * net.vocab + channel, out, count * sizeof(float));
                    });
        c.team.each(me, step.num_wanted, [&](int i) { step.best[i] = best(step.logits + int64_t(i) * net.vocab); });
    }

    int best(const float* row) const {
        vec peaks = vec{} - INFINITY, zeros = {};
        for (int i = 0; i < net.vocab; i += WIDTH) {
            vec part = vec{} - INFINITY;
            if (net.vocab - i >= WIDTH) part = load(row + i);
            else for (int j = 0; j < net.vocab - i; ++j) part[j] = row[i + j];
            peaks = part > peaks ? part : peaks;
            zeros += part == part ? vec{} : part;  // a NaN stays
        }
        float peak = -INFINITY;
        for (int i = 0; i < WIDTH; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
        if (!(total(zeros) == 0 && std::fabs(peak) < INFINITY)) return -1;
        int at = 0;
        while (row[at] != peak) ++at;
        return at;
    }

    void run() const {
        c.team.each(me, step.num_rows, [&](int row) {
            embed(row);
            if (net.positions) place(chunk_of(row), row);
        });
        for (int i = 0; i < net.num_layers; ++i)
            layer(c.layers[i], i + 1 < net.num_layers ? c.layers[i + 1].qkv : net.head);
        logits();
    }
};

}  // namespace

extern "C" {

void* millrace_open(const Network* network, int num_threads) { return new Core(*network, num_threads); }

void millrace_step(void* core, const Step* step) {
    Core& c = *(Core*)core;
    constexpr int PHASES_PER_LAYER = 10, OTHER_PHASES = 6;
    int num_tasks = count_tasks(c, *step);
    c.team.run(c.net.num_layers * PHASES_PER_LAYER + OTHER_PHASES, [&c, copy = *step, num_tasks](Team::Member& me) {
        if (c.net.precision == FLOAT32) Forward<Float32>{c, copy, num_tasks, me}.run();
        else if (c.net.precision == BFLOAT16) Forward<BFloat16>{c, copy, num_tasks, me}.run();
        else Forward<Int8>{c, copy, num_tasks, me}.run();
    });
}

void millrace_close(void* core) { delete (Core*)core; }
}
