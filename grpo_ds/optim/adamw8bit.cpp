// Blockwise 8-bit AdamW in one pass: decode the moments of a block, update, encode them; no temporary is larger than a
// block. And SGD, which has none to decode. Plain C++ that the compiler vectorises three times (portable, AVX2,
// AVX-512); the best one for the processor is chosen at run time.
//
// Codes of moments are bitsandbytes' (Dynamic) or computed (Companded). With the first the arithmetic is bitsandbytes
// 0.50's CPU update, operation by operation, so that the codes are the same: contraction is off at compile time, and
// every fused multiply-add is written out. On encoding, bitsandbytes rounds value / absmax to a grid of 65536 points
// over [-1, 1] and takes the code nearest to the grid point.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int BLOCK = 256;             // values that share one scale
constexpr int64_t CHUNK = 1024;        // blocks that a thread takes at a time: enough for the processor to prefetch
constexpr float SMALLEST = 0x1p-127f;  // 1 / scale is finite above this
constexpr float LARGEST = 0x1.fffffep127f;  // the largest finite float

#define ALWAYS_INLINE inline __attribute__((always_inline))

ALWAYS_INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
ALWAYS_INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
ALWAYS_INLINE float widen(uint16_t bf16) { return float_of(uint32_t(bf16) << 16); }
ALWAYS_INLINE uint16_t nearest_bf16(float value) {  // ties to even, NaN stays NaN: torch's rounding
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Prefetches the next block while this one is computed; past the end of the data it is harmless.
template <class T> ALWAYS_INLINE void prefetch_next_block(const T* here) {
    for (size_t line = 0; line < BLOCK * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(here + BLOCK) + line);
}

ALWAYS_INLINE uint32_t noise(uint32_t x) {  // an integer hash: Wellons, "lowbias32"
    x = (x ^ (x >> 16)) * 0x7feb352d;
    x = (x ^ (x >> 15)) * 0x846ca68b;
    return x ^ (x >> 16);
}

// Layouts of gradients and parameters in memory. To add one, add a struct here and a line in choose_kernel.
struct Fp32 {
    float* data;
    ALWAYS_INLINE float load(int i) const { return data[i]; }
    ALWAYS_INLINE void store(int i, float value) const { data[i] = value; }
};
struct Bf16 {
    uint16_t* data;
    ALWAYS_INLINE float load(int i) const { return widen(data[i]); }
    ALWAYS_INLINE void store(int i, float value) const { data[i] = nearest_bf16(value); }
};
// fp32 as a nearest bf16 and the signed difference of the bit patterns. Ties are rounded away from zero, because the
// difference +32768 of a tie to even does not fit 16 bits.
struct Split {
    uint16_t* data;
    int16_t* residual;
    ALWAYS_INLINE float load(int i) const {
        return float_of((uint32_t(data[i]) << 16) + uint32_t(int32_t(residual[i])));
    }
    ALWAYS_INLINE void store(int i, float value) const {
        const uint32_t bits = bits_of(value), half = (bits + 0x8000) >> 16;
        data[i] = uint16_t(half);
        residual[i] = int16_t(bits - (half << 16));
    }
};
// fp32 without its last 8 bits: a nearest bf16 (ties away from zero) and the difference in 256ths of its last place. The
// bits that are lost are rounded up or down at random, as below.
struct Split8 {
    uint16_t* data;
    int8_t* residual;
    uint32_t key, start;
    ALWAYS_INLINE float load(int i) const {
        return float_of((uint32_t(data[i]) << 16) + (uint32_t(int32_t(residual[i])) << 8));
    }
    ALWAYS_INLINE void store(int i, float value) const {
        const uint32_t kept = (bits_of(value) + (noise((start + uint32_t(i)) ^ key) >> 24)) >> 8;
        const uint32_t half = (kept + 0x80) >> 8;
        data[i] = uint16_t(half);
        residual[i] = int8_t(kept - (half << 8));
    }
};
// bf16, rounded up with a probability that makes the mean equal to the value. The noise is a function of (key,
// element), so there is no generator to save, and blocks can be updated in any order.
struct Stochastic {
    uint16_t* data;
    uint32_t key, start;
    ALWAYS_INLINE float load(int i) const { return widen(data[i]); }
    ALWAYS_INLINE void store(int i, float value) const {
        data[i] = uint16_t((bits_of(value) + (noise((start + uint32_t(i)) ^ key) >> 16)) >> 16);
    }
};

}  // namespace

extern "C" {

struct Job {  // native.py has the same fields in the same order
    int64_t elements;
    void* gradient;
    void* parameter;
    void* residual;  // if not null, a bf16 parameter is the upper half of an fp32 one
    uint8_t *codes1, *codes2;  // null: no moments (SGD)
    float *absmax1, *absmax2;
    const float *qmap1, *qmap2;  // null: the codes are computed (Companded)
    const uint8_t *grid1, *grid2;  // code of each grid point, from build_grid
    float beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, eps;
    int32_t gradient_is_bf16, parameter_is_bf16, threads, path;  // path: -1 the best, 0 portable, 1 AVX2, 2 AVX-512
    int32_t stochastic;  // round what a bf16 parameter and its residual cannot hold with the noise of `key`
    int32_t residual_bits;  // 8 or 16
    uint32_t key;
};

}  // extern "C"

namespace {

// For a block whose scale has no finite inverse (subnormal, or not finite): the result of bitsandbytes' clamp and cast.
ALWAYS_INLINE void encode_odd_block(const float* values, int n, float absmax, const uint8_t* grid, uint8_t* codes) {
    const float inverse = 1.0f / absmax;
    for (int i = 0; i < n; i++) {
        const float t = values[i] * inverse;
        const float clamped = t < -1.0f ? -1.0f : t > 1.0f ? 1.0f : t;
        codes[i] = grid[clamped != clamped ? 0 : int32_t(__builtin_fmaf(clamped + 1.0f, 32767.5f, 0.5f))];
    }
}

ALWAYS_INLINE void encode(const float* values, int n, float absmax, const uint8_t* grid, uint8_t* codes) {
    if (absmax == 0.0f) { memset(codes, 0, n); return; }
    if (!(absmax > SMALLEST && absmax <= LARGEST)) { encode_odd_block(values, n, absmax, grid, codes); return; }
    const float inverse = 1.0f / absmax;
    alignas(64) uint32_t point[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        point[i] = uint32_t(int32_t(__builtin_fmaf(values[i] * inverse + 1.0f, 32767.5f, 0.5f)));
    int i = 0;
    for (; i + 8 <= n; i += 8) {  // one store of eight codes; eight stores would be the bottleneck
        uint64_t word = 0;
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) word |= uint64_t(grid[point[i + k]]) << (8 * k);
        memcpy(codes + i, &word, 8);
    }
    for (; i < n; i++) codes[i] = grid[point[i]];
}

ALWAYS_INLINE void decode(const uint8_t* codes, int n, const float* qmap, float* values) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, codes + i, 8);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) values[i + k] = qmap[uint8_t(word >> (8 * k))];
    }
    for (; i < n; i++) values[i] = qmap[codes[i]];
    for (; i < BLOCK; i++) values[i] = 0.0f;
}

// bitsandbytes' codes: look-ups in a table of 256 values.
struct Dynamic {
    static ALWAYS_INLINE void decode_block(const Job& job, int64_t block, int n, float* moment1, float* moment2) {
        decode(job.codes1 + block * BLOCK, n, job.qmap1, moment1);
        decode(job.codes2 + block * BLOCK, n, job.qmap2, moment2);
    }
    static ALWAYS_INLINE float moment(float decoded, float scale, float beta) { return (decoded * scale) * beta; }
    static ALWAYS_INLINE float variance(float decoded, float scale, float beta) { return (decoded * scale) * beta; }
    static ALWAYS_INLINE float kept(float v, float) { return v; }
    static ALWAYS_INLINE void encode_block(const Job& job, int64_t block, int n,
                                           const float* moment1, const float* moment2) {
        encode(moment1, n, job.absmax1[block], job.grid1, job.codes1 + block * BLOCK);
        encode(moment2, n, job.absmax2[block], job.grid2, job.codes2 + block * BLOCK);
    }
};

// Computed codes: companding as in telephony (mu-law, in straight pieces), by integer arithmetic, which vectorises. u in
// [0, 1] is shifted to y = OFFSET + u (TOP - OFFSET), and the code is the exponent and the first bits of the mantissa of
// y, counted from those of OFFSET. So steps are a fixed part of an octave of y, and fine near zero: 0 has code 0, and
// TOP the last one.
template <int SHIFT, uint32_t FIRST, uint32_t LAST> struct Law {  // SHIFT: bits of the mantissa that are rounded away
    static_assert((FIRST & LAST) == 0 && (FIRST << SHIFT & 0x7fffff) == 0);  // a power of 2, so that 0 stays exactly 0
    static ALWAYS_INLINE float offset() { return float_of(FIRST << SHIFT); }
    static ALWAYS_INLINE float range() { return float_of((FIRST | LAST) << SHIFT) - offset(); }
    // unit: a block's largest value / (TOP - OFFSET)
    static ALWAYS_INLINE float expand(uint32_t code, float unit) {
        return __builtin_fmaf(float_of((code | FIRST) << SHIFT), unit, -offset() * unit);
    }
    static ALWAYS_INLINE uint32_t compress(float size, float inverse) {
        constexpr uint32_t HALF = 1u << (SHIFT - 1);
        return (bits_of(__builtin_fmaf(size, inverse, offset())) - ((FIRST << SHIFT) - HALF)) >> SHIFT;
    }
    // 1 / unit; a block too small to have it becomes zero.
    static ALWAYS_INLINE float inverse(float* absmax) {
        if (*absmax > SMALLEST) return range() / *absmax;
        *absmax = 0.0f;
        return 0.0f;
    }
};

// First moment: a sign and 127 codes, 16 an octave. Second moment: its root, 255 codes, 32 an octave, as it changes by
// less in a step; only 0 has code 0, because a small root rounded to 0 would divide the first moment by eps alone.
struct Companded {
    using First = Law<19, 0x780, 127>;
    using Root = Law<18, 0xf00, 255>;
    static ALWAYS_INLINE void decode_block(const Job& job, int64_t block, int n, float* moment1, float* moment2) {
        const int8_t* codes1 = (const int8_t*)job.codes1 + block * BLOCK;
        const uint8_t* codes2 = job.codes2 + block * BLOCK;
        const float unit1 = job.absmax1[block] * job.beta1 / First::range();
        const float unit2 = job.absmax2[block] * __builtin_sqrtf(job.beta2) / Root::range();
        for (int i = 0; i < n; i++) {
            const int32_t c = codes1[i];
            const float size = First::expand(uint32_t(c < 0 ? -c : c), unit1);
            moment1[i] = float_of(bits_of(size) | (uint32_t(c) & 0x80000000u));
            moment2[i] = Root::expand(codes2[i], unit2);
        }
    }
    // Decoded values have their scale and beta in them.
    static ALWAYS_INLINE float moment(float decoded, float, float) { return decoded; }
    static ALWAYS_INLINE float variance(float decoded, float, float) { return decoded * decoded; }
    static ALWAYS_INLINE float kept(float, float root) { return root; }
    static ALWAYS_INLINE void encode_block(const Job& job, int64_t block, int n,
                                           const float* moment1, const float* moment2) {
        const float inverse1 = First::inverse(job.absmax1 + block), inverse2 = Root::inverse(job.absmax2 + block);
        int8_t* codes1 = (int8_t*)job.codes1 + block * BLOCK;
        uint8_t* codes2 = job.codes2 + block * BLOCK;
        for (int i = 0; i < n; i++) {
            const uint32_t bits = bits_of(moment1[i]), sign = uint32_t(int32_t(bits) >> 31);
            const uint32_t c = First::compress(float_of(bits & 0x7fffffff), inverse1);
            codes1[i] = int8_t((c ^ sign) - sign);
        }
        for (int i = 0; i < n; i++) {
            const uint32_t d = Root::compress(moment2[i], inverse2);
            const uint32_t least = (bits_of(moment2[i]) + 0x7fffffffu) >> 31;  // 1 for all but 0
            codes2[i] = uint8_t(d > least ? d : least);
        }
    }
};

struct NoMoments {};

template <int N, class Gradient, class Parameter>
ALWAYS_INLINE void sgd_block(const Job& job, int64_t block, Gradient gradient, Parameter parameter) {
    const int n = N ? N : int(job.elements - block * BLOCK);
    prefetch_next_block(gradient.data);
    prefetch_next_block(parameter.data);
    const float decay = job.decay, step_size = job.step_size;
#pragma GCC ivdep
    for (int i = 0; i < n; i++)
        parameter.store(i, __builtin_fmaf(step_size, gradient.load(i), parameter.load(i) * decay));
}

// N is the block's length if it is known at compile time, else 0. Assumes little-endian, as on all machines of torch.
template <int N, class Codes, class Gradient, class Parameter>
ALWAYS_INLINE void step_block(const Job& job, int64_t block, Gradient gradient, Parameter parameter) {
    const int64_t start = block * BLOCK;
    const int n = N ? N : int(job.elements - start);
    prefetch_next_block(job.codes1 + start);
    prefetch_next_block(job.codes2 + start);
    if constexpr (std::is_same_v<Codes, Dynamic>) {  // a block takes so long that the processor's own prefetching fails
        prefetch_next_block(gradient.data);
        prefetch_next_block(parameter.data);
    }
    alignas(64) float moment1[BLOCK], moment2[BLOCK];
    Codes::decode_block(job, block, n, moment1, moment2);
    const float scale1 = job.absmax1[block], scale2 = job.absmax2[block];
    const float beta1 = job.beta1, beta2 = job.beta2, rest1 = job.one_minus_beta1, rest2 = job.one_minus_beta2;
    const float decay = job.decay, step_size = job.step_size, eps = job.eps;
    int32_t largest1 = 0, largest2 = 0;  // bit patterns: positive floats have the order of integers, which vectorise
#pragma GCC ivdep
    for (int i = 0; i < n; i++) {
        const float g = gradient.load(i);
        const float m = __builtin_fmaf(g, rest1, Codes::moment(moment1[i], scale1, beta1));
        const float v = __builtin_fmaf(g * rest2, g, Codes::variance(moment2[i], scale2, beta2));
        const float root = __builtin_sqrtf(v), kept = Codes::kept(v, root);
        moment1[i] = m;
        moment2[i] = kept;
        const int32_t m_bits = int32_t(bits_of(m) & 0x7fffffff), v_bits = int32_t(bits_of(kept) & 0x7fffffff);
        largest1 = m_bits > largest1 ? m_bits : largest1;
        largest2 = v_bits > largest2 ? v_bits : largest2;
        parameter.store(i, parameter.load(i) * decay + (step_size * m) / (root + eps));
    }
    job.absmax1[block] = float_of(uint32_t(largest1));
    job.absmax2[block] = float_of(uint32_t(largest2));
    Codes::encode_block(job, block, n, moment1, moment2);
}

template <class T> ALWAYS_INLINE T at(const Job& job, void* data, int64_t start);
template <> ALWAYS_INLINE Fp32 at<Fp32>(const Job&, void* data, int64_t start) { return {(float*)data + start}; }
template <> ALWAYS_INLINE Bf16 at<Bf16>(const Job&, void* data, int64_t start) { return {(uint16_t*)data + start}; }
template <> ALWAYS_INLINE Split at<Split>(const Job& job, void* data, int64_t start) {
    return {(uint16_t*)data + start, (int16_t*)job.residual + start};
}
template <> ALWAYS_INLINE Split8 at<Split8>(const Job& job, void* data, int64_t start) {
    return {(uint16_t*)data + start, (int8_t*)job.residual + start, job.key, uint32_t(start)};
}
template <> ALWAYS_INLINE Stochastic at<Stochastic>(const Job& job, void* data, int64_t start) {
    return {(uint16_t*)data + start, job.key, uint32_t(start)};
}

template <class Codes, class Gradient, class Parameter>
ALWAYS_INLINE void step_blocks(const Job& job, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * BLOCK;
        const auto gradient = at<Gradient>(job, job.gradient, start);
        const auto parameter = at<Parameter>(job, job.parameter, start);
        const bool whole = start + BLOCK <= job.elements;
        if constexpr (std::is_same_v<Codes, NoMoments>)
            whole ? sgd_block<BLOCK>(job, block, gradient, parameter) : sgd_block<0>(job, block, gradient, parameter);
        else if (whole) step_block<BLOCK, Codes>(job, block, gradient, parameter);
        else step_block<0, Codes>(job, block, gradient, parameter);
    }
}

using Kernel = void (*)(const Job&, int64_t, int64_t);

template <class C, class G, class P> void portable(const Job& job, int64_t first, int64_t last) {
    step_blocks<C, G, P>(job, first, last);
}
#if defined(__x86_64__)
template <class C, class G, class P>
__attribute__((target("avx2,fma"))) void avx2(const Job& job, int64_t first, int64_t last) {
    step_blocks<C, G, P>(job, first, last);
}
template <class C, class G, class P>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
void avx512(const Job& job, int64_t first, int64_t last) {
    step_blocks<C, G, P>(job, first, last);
}
int best_path() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? 2 : 1;
}
template <class C, class G, class P> Kernel on_path(int path) {
    return path == 2 ? avx512<C, G, P> : path == 1 ? avx2<C, G, P> : portable<C, G, P>;
}
#else
int best_path() { return 0; }
template <class C, class G, class P> Kernel on_path(int) { return portable<C, G, P>; }
#endif

template <class C, class G> Kernel for_parameter(const Job& job, int path) {
    if (!job.parameter_is_bf16) return on_path<C, G, Fp32>(path);
    if (job.residual) return job.residual_bits == 8 ? on_path<C, G, Split8>(path) : on_path<C, G, Split>(path);
    return job.stochastic ? on_path<C, G, Stochastic>(path) : on_path<C, G, Bf16>(path);
}
template <class C> Kernel for_gradient(const Job& job, int path) {
    return job.gradient_is_bf16 ? for_parameter<C, Bf16>(job, path) : for_parameter<C, Fp32>(job, path);
}
Kernel choose_kernel(const Job& job) {
    const int best = best_path();
    const int path = job.path < 0 || job.path > best ? best : job.path;
    if (!job.codes1) return for_gradient<NoMoments>(job, path);
    return job.qmap1 ? for_gradient<Dynamic>(job, path) : for_gradient<Companded>(job, path);
}

// Largest absolute value of n elements, as a bit pattern. Bit patterns of absolute values are ordered like integers;
// infinities and NaN are above all numbers.
template <class T, T MASK> ALWAYS_INLINE T largest_size(const T* bits, int64_t n) {
    T largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const T size = T(bits[i] & MASK);  // cast to T: as int, 16-bit lanes would not vectorise
        largest = size > largest ? size : largest;
    }
    return largest;
}
template <class T, T MASK> T largest_portable(const T* bits, int64_t n) { return largest_size<T, MASK>(bits, n); }
#if defined(__x86_64__)
template <class T, T MASK> __attribute__((target("avx2"))) T largest_avx2(const T* bits, int64_t n) {
    return largest_size<T, MASK>(bits, n);
}
#else
template <class T, T MASK> T largest_avx2(const T* bits, int64_t n) { return largest_size<T, MASK>(bits, n); }
#endif

template <class T, T MASK, T LIMIT> int64_t first_bad(const T* bits, int64_t n, int threads) {
    constexpr int64_t STRIDE = CHUNK * BLOCK;
    const auto largest = best_path() ? largest_avx2<T, MASK> : largest_portable<T, MASK>;
    int64_t first = n;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : first) if (n > STRIDE)
    for (int64_t start = 0; start < n; start += STRIDE) {
        const int64_t length = start + STRIDE < n ? STRIDE : n - start;
        if (largest(bits + start, length) < LIMIT) continue;
        int64_t i = start;
        while ((bits[i] & MASK) < LIMIT) i++;
        first = i < first ? i : first;
    }
    return first < n ? first : -1;
}

}  // namespace

extern "C" {

int grpo_ds_best_path() { return best_path(); }

// Writes the code of each of the 65536 grid points, as bitsandbytes computes it.
void grpo_ds_build_grid(const float* qmap, uint8_t* grid) {
    int code = 0;
    for (int i = 0; i < 65536; i++) {
        const float value = (2.0f * i) / 65535.0f - 1.0f;
        while (code < 255 && 0.5f * (qmap[code] + qmap[code + 1]) < value) code++;
        grid[i] = uint8_t(code);
    }
}

// Index of the first value that is NaN, infinite, or 2^64 and more in size (its square overflows); -1 if all are good.
int64_t grpo_ds_first_bad(const void* data, int64_t n, int is_bf16, int threads) {
    if (is_bf16) return first_bad<int16_t, 0x7fff, 0x5f80>((const int16_t*)data, n, threads);
    return first_bad<int32_t, 0x7fffffff, 0x5f800000>((const int32_t*)data, n, threads);
}

void grpo_ds_step(const Job* job) {
    const Kernel kernel = choose_kernel(*job);
    const int64_t blocks = (job->elements + BLOCK - 1) / BLOCK, chunks = (blocks + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(job->threads) schedule(dynamic) if (chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t last = (chunk + 1) * CHUNK;
        kernel(*job, chunk * CHUNK, last < blocks ? last : blocks);
    }
}

}  // extern "C"
