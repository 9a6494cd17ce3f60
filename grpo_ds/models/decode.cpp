// One token of Llama, Qwen2 or Qwen3 for B rows: all layers and the head in one parallel region.
//
// With few rows a token takes as long as its weights take to be read. torch reads them at that speed at best inside a
// product; between products it starts fifty small kernels a layer. Here threads meet eight times a layer.
//
// Weights are bf16, or int8 with one scale for each output. Sums are fp32, and so is the residual stream; what a product
// reads is bf16. Keys and values are those of models/prompt_cache.py.
//
// Letters: B = Q * G rows; K heads of keys, n queries for each (H = K * n), width D; P columns of the longest prompt, C of
// a row's own, `written` of them in use.

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define INLINE inline __attribute__((always_inline)) AVX512

constexpr int LANES = 16;            // outputs in a vector
constexpr int TILE = 2 * LANES;      // outputs that are computed together
constexpr int ROWS = 8;              // rows that are computed together: 16 sums in registers
constexpr int MOST_QUERIES = 16;     // n

typedef uint16_t bf16;

INLINE float widen(bf16 value) { uint32_t bits = uint32_t(value) << 16; float out; memcpy(&out, &bits, 4); return out; }
INLINE __m512 widen16(const bf16* from) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}
INLINE void narrow16(bf16* to, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

// exp by Cephes' polynomial: x = n ln 2 + r, e^x = 2^n e^r.
INLINE __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

// A weight [outputs, inputs] in tiles of TILE outputs: of each two inputs, 2 x LANES pairs side by side.
struct Weight {
    const void* data;
    const float* scales;  // one for each output; null: the weight is bf16
    const float* bias;    // null: none
    int64_t inputs, outputs;
};

INLINE __m512bh pairs(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
INLINE __m512bh pairs(const int8_t* from) {  // integers of 8 bits are exact in bf16
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}

// The TILE outputs of `R` rows, before scale and bias.
template <int R, class T>
INLINE void tile(const T* weight, const bf16* x, int64_t inputs, __m512 (&sums)[ROWS][2]) {
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += 2, weight += 2 * TILE) {
        const __m512bh one = pairs(weight), two = pairs(weight + TILE);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x + r * inputs + i, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], one, both);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], two, both);
        }
    }
}

template <class T>
INLINE void tile_of_rows(int rows, const T* weight, const bf16* x, int64_t inputs, __m512 (&sums)[ROWS][2]) {
    switch (rows) {
        case 1: return tile<1>(weight, x, inputs, sums);
        case 2: return tile<2>(weight, x, inputs, sums);
        case 3: return tile<3>(weight, x, inputs, sums);
        case 4: return tile<4>(weight, x, inputs, sums);
        case 5: return tile<5>(weight, x, inputs, sums);
        case 6: return tile<6>(weight, x, inputs, sums);
        case 7: return tile<7>(weight, x, inputs, sums);
        default: return tile<8>(weight, x, inputs, sums);
    }
}

// Calls finish(row, output, first 16 values, last 16 values) for each tile of this thread.
template <class T, class Finish>
INLINE void tiles(const Weight& w, const bf16* x, int rows, Finish finish) {
    const int64_t count = (w.outputs + TILE - 1) / TILE;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t t = count * thread / threads; t < count * (thread + 1) / threads; t++) {
        const T* weight = static_cast<const T*>(w.data) + t * TILE * w.inputs;
        for (int first = 0; first < rows; first += ROWS) {
            const int some = rows - first < ROWS ? rows - first : ROWS;
            __m512 sums[ROWS][2];
            tile_of_rows(some, weight, x + first * w.inputs, w.inputs, sums);
            for (int half = 0; half < 2; half++) {
                if (w.scales) {
                    const __m512 scale = _mm512_loadu_ps(w.scales + t * TILE + half * LANES);
                    for (int r = 0; r < some; r++) sums[r][half] = _mm512_mul_ps(sums[r][half], scale);
                }
                if (w.bias) {
                    const __m512 bias = _mm512_loadu_ps(w.bias + t * TILE + half * LANES);
                    for (int r = 0; r < some; r++) sums[r][half] = _mm512_add_ps(sums[r][half], bias);
                }
            }
            for (int r = 0; r < some; r++) finish(first + r, t * TILE, sums[r][0], sums[r][1]);
        }
    }
}

template <class Finish>
INLINE void product(const Weight& w, const bf16* x, int rows, Finish finish) {
    if (w.scales) tiles<int8_t>(w, x, rows, finish);
    else tiles<bf16>(w, x, rows, finish);
}

INLINE void put(float* to, int64_t left, __m512 value, bool add) {  // at most LANES values
    if (left <= 0) return;
    const __mmask16 mask = left >= LANES ? 0xffff : __mmask16((1u << left) - 1);
    if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, value);
}

INLINE void store_product(const Weight& w, const bf16* x, int rows, float* out, bool add) {
    product(w, x, rows, [=](int row, int64_t first, __m512 one, __m512 two) AVX512 {
        float* to = out + row * w.outputs + first;
        put(to, w.outputs - first, one, add);
        put(to + LANES, w.outputs - first - LANES, two, add);
    });
}

// Gate and up in turn, LANES outputs of each: silu(gate) * up.
INLINE void gated_product(const Weight& w, const bf16* x, int rows, bf16* out) {
    product(w, x, rows, [=](int row, int64_t first, __m512 gate, __m512 up) AVX512 {
        const __m512 one = _mm512_set1_ps(1.0f);
        const __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
        narrow16(out + row * (w.outputs / 2) + first / 2, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up));
    });
}

// Root-mean-square norm of one row; width is a multiple of LANES.
template <class Store>
INLINE void norm(const float* x, const float* weight, int width, float eps, Store store) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < width; i += LANES) { const __m512 v = _mm512_loadu_ps(x + i); sum = _mm512_fmadd_ps(v, v, sum); }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(width) + eps));
    for (int i = 0; i < width; i += LANES)
        store(i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i)));
}

struct Layer {
    Weight qkv, out, gate_up, down;
    const float *norm, *second_norm, *query_norm, *key_norm;  // the last two are Qwen3's, else null
    bf16 *prompt_keys, *prompt_values;                        // [Q K P D]
    bf16 *own_keys, *own_values;                              // [Q K G C D]
};

struct Token {
    const Layer* layers;
    Weight head;
    const float *last_norm, *cos, *sin;  // the last two [B D]
    const int64_t* prompt_lengths;       // [Q]
    float *hidden, *raw, *logits;        // [B hidden], [B (H + 2K) D], [B V]
    bf16 *x, *heads, *gated;             // [B hidden], [B H D], [B mlp]
    float* scores;                       // of each thread: n x (P + C)
    int32_t count, width, mlp, q, g, k, n, d, p, c, written, threads;
    float eps, scaling;
};

// One head of one row: norm (Qwen3), rotation by position, in place.
INLINE void rotate(float* head, const float* weight, const float* cos, const float* sin, int d, float eps) {
    if (weight) norm(head, weight, d, eps, [=](int i, __m512 v) AVX512 { _mm512_storeu_ps(head + i, v); });
    for (int i = 0; i < d / 2; i++) {
        const float low = head[i], high = head[i + d / 2];
        head[i] = low * cos[i] - high * sin[i];
        head[i + d / 2] = high * cos[i + d / 2] + low * sin[i + d / 2];
    }
}

INLINE void narrow(bf16* to, const float* from, int d) {
    for (int i = 0; i < d; i += LANES) narrow16(to + i, _mm512_loadu_ps(from + i));
}

// Scores of `keys` [count D] for n queries, at scores[query * stride + key].
INLINE void score(const bf16* queries, int n, const bf16* keys, int count, int d, float scaling, float* scores, int stride) {
    for (int key = 0; key < count; key++) {
        for (int query = 0; query < n; query++) {
            __m512 sum = _mm512_setzero_ps();
            for (int i = 0; i < d; i += 32) {
                const __mmask32 mask = d - i >= 32 ? 0xffffffffu : (1u << (d - i)) - 1;
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, queries + query * d + i),
                                       (__m512bh)_mm512_maskz_loadu_epi16(mask, keys + int64_t(key) * d + i));
            }
            scores[query * stride + key] = _mm512_reduce_add_ps(sum) * scaling;
        }
    }
}

// Softmax of `count` scores in place, without the division; returns its inverse.
INLINE float exponentials(float* scores, int count) {
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i += LANES) {
        const __mmask16 mask = count - i >= LANES ? 0xffff : __mmask16((1u << (count - i)) - 1);
        largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(largest, mask, scores + i));
    }
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int i = 0; i < count; i += LANES) {
        const __mmask16 mask = count - i >= LANES ? 0xffff : __mmask16((1u << (count - i)) - 1);
        const __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + i), most));
        _mm512_mask_storeu_ps(scores + i, mask, e);
        sum = _mm512_mask_add_ps(sum, mask, sum, e);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

// sums[query] += weights of `values` [count D], 16 of their D columns.
INLINE void weigh(const float* weights, int n, int stride, const bf16* values, int count, int d, __m512* sums) {
    for (int first = 0; first < n; first += ROWS) {
        const int some = n - first < ROWS ? n - first : ROWS;
        __m512 own[ROWS];
        for (int query = 0; query < some; query++) own[query] = sums[first + query];
        for (int key = 0; key < count; key++) {
            const __m512 value = widen16(values + int64_t(key) * d);
            for (int query = 0; query < some; query++)
                own[query] = _mm512_fmadd_ps(_mm512_set1_ps(weights[(first + query) * stride + key]), value, own[query]);
        }
        for (int query = 0; query < some; query++) sums[first + query] = own[query];
    }
}

// Attention of the n queries of one row that share a head of keys.
INLINE void attend(const Token& t, const Layer& layer, int prompt, int head, int row, float* scores) {
    const int d = t.d, n = t.n, seen = int(t.prompt_lengths[prompt]), own = t.written + 1, stride = t.p + t.c;
    const int64_t at_prompt = (int64_t(prompt) * t.k + head) * t.p * d;
    const int64_t at_own = ((int64_t(prompt) * t.k + head) * t.g + row) * t.c * d;
    bf16* queries = t.heads + (int64_t(prompt * t.g + row) * t.k + head) * n * d;
    score(queries, n, layer.prompt_keys + at_prompt, seen, d, t.scaling, scores, stride);
    score(queries, n, layer.own_keys + at_own, own, d, t.scaling, scores + seen, stride);
    float inverse[MOST_QUERIES];
    for (int query = 0; query < n; query++) inverse[query] = exponentials(scores + query * stride, seen + own);
    for (int i = 0; i < d; i += LANES) {
        __m512 sums[MOST_QUERIES];
        for (int query = 0; query < n; query++) sums[query] = _mm512_setzero_ps();
        weigh(scores, n, stride, layer.prompt_values + at_prompt + i, seen, d, sums);
        weigh(scores + seen, n, stride, layer.own_values + at_own + i, own, d, sums);
        // The result takes the place of the queries, which nobody reads any more.
        for (int query = 0; query < n; query++)
            narrow16(queries + query * d + i, _mm512_mul_ps(sums[query], _mm512_set1_ps(inverse[query])));
    }
}

// Rotates queries and keys; stores queries for `attend`, keys and values in the cache.
INLINE void spread(const Token& t, const Layer& layer, int b, int head) {
    const int d = t.d, h = t.k * t.n, prompt = b / t.g, row = b % t.g;
    float* raw = t.raw + (int64_t(b) * (h + 2 * t.k) + head) * d;
    const float *cos = t.cos + int64_t(b) * d, *sin = t.sin + int64_t(b) * d;
    if (head < h) {
        rotate(raw, layer.query_norm, cos, sin, d, t.eps);
        return narrow(t.heads + (int64_t(b) * h + head) * d, raw, d);
    }
    const bool value = head >= h + t.k;
    const int of = head - h - (value ? t.k : 0);
    if (!value) rotate(raw, layer.key_norm, cos, sin, d, t.eps);
    narrow((value ? layer.own_values : layer.own_keys)
               + ((((int64_t(prompt) * t.k + of) * t.g) + row) * t.c + t.written) * d, raw, d);
}

INLINE void normed(const Token& t, const float* weight) {
    const int rows = t.q * t.g;
#pragma omp for schedule(static)
    for (int b = 0; b < rows; b++) {
        bf16* to = t.x + int64_t(b) * t.width;
        norm(t.hidden + int64_t(b) * t.width, weight, t.width, t.eps, [=](int i, __m512 v) AVX512 { narrow16(to + i, v); });
    }
}

INLINE void layer_of(const Token& t, const Layer& layer) {
    const int rows = t.q * t.g, heads = t.k * (t.n + 2);
    normed(t, layer.norm);
    store_product(layer.qkv, t.x, rows, t.raw, false);
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
    for (int b = 0; b < rows; b++)
        for (int head = 0; head < heads; head++) spread(t, layer, b, head);
    float* scores = t.scores + int64_t(omp_get_thread_num()) * t.n * (t.p + t.c);
#pragma omp for collapse(3) schedule(static)
    for (int prompt = 0; prompt < t.q; prompt++)
        for (int head = 0; head < t.k; head++)
            for (int row = 0; row < t.g; row++) attend(t, layer, prompt, head, row, scores);
    store_product(layer.out, t.heads, rows, t.hidden, true);
#pragma omp barrier
    normed(t, layer.second_norm);
    gated_product(layer.gate_up, t.x, rows, t.gated);
#pragma omp barrier
    store_product(layer.down, t.gated, rows, t.hidden, true);
#pragma omp barrier
}

AVX512 void all_layers(const Token& t) {
    for (int i = 0; i < t.count; i++) layer_of(t, t.layers[i]);
    normed(t, t.last_norm);
    store_product(t.head, t.x, t.q * t.g, t.logits, false);
}

}  // namespace

extern "C" {

int grpo_ds_can_decode() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

void grpo_ds_decode(const Token* token) {
#pragma omp parallel num_threads(token->threads)
    all_layers(*token);
}

}  // extern "C"
