// For CPUs that multiply bf16 matrices themselves (AVX-512 BF16, AMX): window attention, and for
// inference a whole block.
//
// torch's fused attention looks its matrix products up in a library one small block at a time, and
// has no gradient for the bias. Here a task is one head of one window: keys and values are brought
// into the order the matrix unit wants once, and what a block of queries needs stays in the cache.
// The products are torch's own (at::native::cpublas::brgemm), with float32 sums.
//
// Shapes: T tokens in window order; groups of n windows of N tokens; A heads of c channels; the
// tokens first..last of each window ask (M of them), all N answer.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr float kLog2e = 1.44269504f;  // softmax is computed with powers of two
constexpr float kFar = -1e30f;         // the logit of a key that is not there
constexpr int64_t kLanes = 16;         // float32 numbers of a vector
constexpr int64_t kQueries = 64;       // queries of a block, forward
constexpr int64_t kKeys = 64;          // keys of a block, backward
constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

int64_t round_up(int64_t n) { return (n + 31) / 32 * 32; }

__m512 load(const BFloat16* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void store(BFloat16* at, __m512 x) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), bits);
}

__m512i narrow(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

void store(BFloat16* at, __m512 a, __m512 b) { _mm512_storeu_si512(at, narrow(a, b)); }

// 2^x to 8e-5 (bf16 keeps 2e-3): a cubic of the fraction, scaled by the whole part. NaN stays NaN.
__m512 power_of_two(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(7.80252892e-2f);
    for (const float factor : {2.26066051e-1f, 6.95833897e-1f, 9.99925238e-1f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, x);
}

// The right side of a bf16 product holds pairs of rows side by side: x[k][j] lies at
// [k / 2][j][k % 2], so a pair is one word. All take (rows, columns), `stride` apart.

// in as the right side, filled up with zeros: (rows, columns) -> (full / 2, columns, 2).
void pack(const BFloat16* in, int64_t stride, int64_t rows, int64_t columns, int64_t full,
          BFloat16* out) {
    const auto words = [&](int64_t r, int64_t j) {
        const auto* at = reinterpret_cast<const __m256i*>(in + r * stride + j);
        return r < rows ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(at)) : _mm512_setzero_si512();
    };
    for (int64_t r = 0; r < full; r += 2)
        for (int64_t j = 0; j < columns; j += kLanes)
            _mm512_storeu_si512(out + r * columns + 2 * j,
                                _mm512_or_si512(words(r, j), _mm512_slli_epi32(words(r + 1, j), 16)));
}

// Words transposed: (rows, columns) -> (columns, full).
void transpose(const void* in, int64_t stride, int64_t rows, int64_t columns, int64_t full,
               void* out) {
    const auto* from = static_cast<const uint32_t*>(in);
    auto* to = static_cast<uint32_t*>(out);
    const __m512i lanes =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i there = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride));
    for (int64_t r = 0; r < full; r += kLanes) {
        const __mmask16 mask = (1u << std::clamp(rows - r, int64_t(0), kLanes)) - 1;
        for (int64_t j = 0; j < columns; ++j)
            _mm512_storeu_si512(to + j * full + r,
                                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, there,
                                                            from + r * stride + j, 4));
    }
}

// in transposed as the right side: (rows, columns) -> (columns / 2, full, 2).
void pack_transposed(const BFloat16* in, int64_t stride, int64_t rows, int64_t columns,
                     int64_t full, BFloat16* out) {
    transpose(in, stride / 2, rows, columns / 2, full, out);
}

struct Group {
    int64_t tokens, first, asking;  // N, the first token that asks, M
    int64_t row, out_row;           // of the group's first window
    int64_t windows, chunks;        // chunks: of windows that are worked on in one go
    Tensor bias;                    // (A, M, N filled up) forward, (A, N, M filled up) backward
};

// The biases of 32 logits, times log2(e), in bf16: those of the first 16 in the lower halves of 16
// words, those of the others in the upper ones.
struct Biases {
    __m512 first, second;

    explicit Biases(const BFloat16* at) {
        const __m512i both = _mm512_loadu_si512(at);
        first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
    }
};

// (A, rows, columns) -> the same in the order of `Biases`, rows filled up with `rest`.
Tensor arrange(const Tensor& bias, float rest) {
    const Tensor from = bias.to(at::kFloat).contiguous();
    const int64_t columns = from.size(2), full = round_up(columns);
    Tensor out = at::empty({from.size(0), from.size(1), full}, from.options().dtype(at::kBFloat16));
    const auto* in = from.const_data_ptr<float>();
    auto* to = out.data_ptr<BFloat16>();
    const __m512i mixed = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    at::parallel_for(0, from.size(0) * from.size(1), 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t j = 0; j < full; j += 2 * kLanes) {
                __m512 half[2];
                for (int64_t h = 0; h < 2; ++h) {
                    const int64_t there = std::clamp(columns - j - h * kLanes, int64_t(0), kLanes);
                    const __mmask16 mask = (1u << there) - 1;
                    const float* at = in + r * columns + j + h * kLanes;
                    half[h] = _mm512_mask_mul_ps(_mm512_set1_ps(rest), mask,
                                                 _mm512_maskz_loadu_ps(mask, at),
                                                 _mm512_set1_ps(kLog2e));
                }
                const __m512i ordered = narrow(half[0], half[1]);
                _mm512_storeu_si512(to + r * full + j, _mm512_permutexvar_epi16(mixed, ordered));
            }
    });
    return out;
}

std::vector<Group> groups_of(at::TensorList biases, at::IntArrayRef counts, at::IntArrayRef first,
                             at::IntArrayRef last, bool transposed, int64_t chunks) {
    std::vector<Group> groups;
    int64_t row = 0, out_row = 0;
    for (size_t i = 0; i < biases.size(); ++i) {
        const int64_t tokens = biases[i].size(2), asking = last[i] - first[i];
        const Tensor bias = biases[i][0].slice(1, first[i], last[i]);
        groups.push_back({tokens, first[i], asking, row, out_row, counts[i],
                          std::min(chunks, counts[i]), transposed ? arrange(bias.transpose(1, 2), 0) : arrange(bias, kFar)});
        row += counts[i] * tokens;
        out_row += counts[i] * asking;
    }
    return groups;
}

// Run work(group, part, chunk, scratch) for `parts` parts of every group and chunks of its windows,
// the chunks of a part one after the other. Threads take what is next, as cores need not be equally
// fast.
template <class Scratch, class Work>
void for_each_chunk(const std::vector<Group>& groups, int64_t parts, const Work& work) {
    int64_t tasks = 0;
    for (const Group& group : groups) tasks += group.chunks * parts;
    std::atomic<int64_t> next = 0;
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        Scratch scratch;
        size_t i = 0;
        int64_t before = 0;
        for (int64_t task = next++; task < tasks; task = next++) {
            while (task - before >= groups[i].chunks * parts) before += groups[i++].chunks * parts;
            const int64_t at = task - before;
            work(groups[i], at / groups[i].chunks, at % groups[i].chunks, scratch);
        }
        at::native::cpublas::brgemm_release();
    });
}

template <class T>
T* room(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

struct AttentionScratch {
    std::vector<BFloat16> keys, values, weights;
    std::vector<float> logits, mixed, shares;
};

// Logits of a query, to base 2: 32 of them from products q k and their biases.
struct Logits {
    __m512 first, second;

    Logits(const float* product, __m512 scale, const BFloat16* bias) {
        const Biases add(bias);
        first = _mm512_fmadd_ps(_mm512_loadu_ps(product), scale, add.first);
        second = _mm512_fmadd_ps(_mm512_loadu_ps(product + kLanes), scale, add.second);
    }
};

// 2^(logit - top) of a row -> bf16 weights and their sum.
template <bool kHasTop>
float weigh(const float* products, __m512 scale, const BFloat16* bias, int64_t full, float top,
            BFloat16* weights) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < full; j += 2 * kLanes) {
        Logits x(products + j, scale, bias + j);
        if (kHasTop) {
            x.first = _mm512_sub_ps(x.first, _mm512_set1_ps(top));
            x.second = _mm512_sub_ps(x.second, _mm512_set1_ps(top));
        }
        const __m512 a = power_of_two(x.first), b = power_of_two(x.second);
        sums[0] = _mm512_add_ps(sums[0], a);
        sums[1] = _mm512_add_ps(sums[1], b);
        store(weights + j, a, b);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

float largest(const float* products, __m512 scale, const BFloat16* bias, int64_t full) {
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < full; j += 2 * kLanes) {
        const Logits x(products + j, scale, bias + j);
        top = _mm512_max_ps(top, _mm512_max_ps(x.first, x.second));
    }
    return _mm512_reduce_max_ps(top);
}

// One head of one window. q, k, v: first rows, `stride` apart -> mixed values (asking, c) in rows
// `width` apart and, where wanted, the logarithms of the softmax's sums.
void attend(const BFloat16* q, const BFloat16* k, const BFloat16* v, int64_t stride,
            const Group& group, int64_t head, int64_t c, BFloat16* out, int64_t width,
            float* log_sums, AttentionScratch& s) {
    const int64_t n = group.tokens, full = round_up(n);
    const __m512 scale = _mm512_set1_ps(kLog2e / std::sqrt(static_cast<float>(c)));
    BFloat16* keys = room(s.keys, full * c);
    BFloat16* values = room(s.values, full * c);
    BFloat16* weights = room(s.weights, kQueries * full);
    float* logits = room(s.logits, kQueries * full);
    float* mixed = room(s.mixed, kQueries * c);
    float* shares = room(s.shares, kQueries);
    pack_transposed(k, stride, n, c, full, keys);
    pack(v, stride, n, c, full, values);

    for (int64_t at = 0; at < group.asking; at += kQueries) {
        const int64_t block = std::min(kQueries, group.asking - at);
        const BFloat16* bias =
            group.bias.const_data_ptr<BFloat16>() + (head * group.asking + at) * full;
        brgemm(block, full, c, stride, full, full, false, q + at * stride, keys, logits);
        for (int64_t r = 0; r < block; ++r) {
            const float* logit = logits + r * full;
            // Float32 and bf16 have room for most logits as they are; where they have not, the
            // largest is taken off first, as usual.
            float top = 0;
            float sum = weigh<false>(logit, scale, bias + r * full, full, 0, weights + r * full);
            if (!(sum > 0x1p-64f && sum < 0x1p64f)) {
                top = largest(logit, scale, bias + r * full, full);
                sum = weigh<true>(logit, scale, bias + r * full, full, top, weights + r * full);
            }
            shares[r] = 1 / sum;
            if (log_sums) log_sums[at + r] = top + std::log2(sum);
        }
        brgemm(block, c, full, full, c, c, false, weights, values, mixed);
        for (int64_t r = 0; r < block; ++r) {
            const __m512 share = _mm512_set1_ps(shares[r]);
            for (int64_t j = 0; j < c; j += kLanes)
                store(out + (at + r) * width + j,
                      _mm512_mul_ps(_mm512_loadu_ps(mixed + r * c + j), share));
        }
    }
}

// qkv (T, 3*A*c) -> mixed values (asking tokens, A*c), log2 of the softmax's sum (A, asking
// tokens).
std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, at::TensorList biases,
                                            at::IntArrayRef counts, at::IntArrayRef first,
                                            at::IntArrayRef last) {
    const int64_t heads = biases[0].size(1), width = qkv.size(1) / 3, c = width / heads,
                  stride = 3 * width;
    const auto groups = groups_of(biases, counts, first, last, false, kAll);
    const int64_t rows = groups.back().out_row + groups.back().windows * groups.back().asking;
    Tensor out = at::empty({rows, width}, qkv.options());
    Tensor sums = at::empty({heads, rows}, qkv.options().dtype(at::kFloat));
    const auto* in = qkv.const_data_ptr<BFloat16>();
    auto* result = out.data_ptr<BFloat16>();
    auto* log_sums = sums.data_ptr<float>();

    for_each_chunk<AttentionScratch>(
        groups, heads,
        [&](const Group& group, int64_t head, int64_t window, AttentionScratch& s) {
            const int64_t row = group.out_row + window * group.asking;
            const BFloat16* q = in + (group.row + window * group.tokens) * stride + head * c;
            attend(q + group.first * stride, q + width, q + 2 * width, stride, group, head, c,
                   result + row * width + head * c, width, log_sums + head * rows + row, s);
        });
    return {out, sums};
}

struct BackwardScratch {
    std::vector<BFloat16> queries, queries_t, grads, grads_t, keys, keys_t, weights, inner, inner_pairs;
    std::vector<float> logits, weight_grads, product, query_grads, query_grads_t, log_sums, deltas;
};

// Gradients of qkv and of each bias (1, A, N, N), from that of the mixed values. Works on logits
// (keys, queries): rows of weights and of their gradients are then the left sides of the products
// that give the gradients of values and keys.
std::tuple<Tensor, std::vector<Tensor>> window_attention_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& sums,
    at::TensorList biases, at::IntArrayRef counts, at::IntArrayRef first, at::IntArrayRef last) {
    const int64_t heads = biases[0].size(1), width = qkv.size(1) / 3, c = width / heads,
                  stride = 3 * width;
    const int64_t rows = out.size(0);
    // The gradient of a bias is summed by chunks of windows: the result is the same in each run.
    const int64_t chunks = (6 * at::get_num_threads() + heads - 1) / heads;
    const auto groups = groups_of(biases, counts, first, last, true, chunks);
    const bool all_ask = rows == qkv.size(0);
    Tensor grad_qkv =
        all_ask ? at::empty(qkv.sizes(), qkv.options()) : at::zeros(qkv.sizes(), qkv.options());
    std::vector<Tensor> grad_biases;  // chunks, A, N, M filled up
    for (const Group& group : groups)
        grad_biases.push_back(at::empty({group.chunks, heads, group.tokens, group.bias.size(2)},
                                        sums.options()));
    const auto* in = qkv.const_data_ptr<BFloat16>();
    const auto* above = grad.const_data_ptr<BFloat16>();
    const auto* result = out.const_data_ptr<BFloat16>();
    auto* below = grad_qkv.data_ptr<BFloat16>();
    const float scale = 1 / std::sqrt(static_cast<float>(c));
    const __m512 scale_of_logits = _mm512_set1_ps(kLog2e * scale);
    // Numbers 0, 0', 1, 1', ... of two vectors, and those of their second halves.
    const __m512i lower = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));

    const auto one_window = [&](const Group& group, int64_t head, int64_t window, float* grad_bias,
                                BackwardScratch& s) {
        const int64_t n = group.tokens, m = group.asking, full = group.bias.size(2),
                      even = round_up(n);
        const int64_t row = group.out_row + window * m, token = group.row + window * n;
        const BFloat16* q = in + (token + group.first) * stride + head * c;
        const BFloat16* k = in + token * stride + width + head * c;
        const BFloat16* v = k + width;
        const BFloat16* g = above + row * width + head * c;
        const BFloat16* o = result + row * width + head * c;
        BFloat16* queries = room(s.queries, full * c);
        BFloat16* queries_t = room(s.queries_t, full * c);
        BFloat16* grads = room(s.grads, full * c);
        BFloat16* grads_t = room(s.grads_t, full * c);
        BFloat16* keys = room(s.keys, even * c);
        BFloat16* keys_t = room(s.keys_t, even * c);  // (c, even)
        BFloat16* weights = room(s.weights, kKeys * full);
        BFloat16* inner = room(s.inner, kKeys * full);
        auto* inner_pairs = reinterpret_cast<uint32_t*>(room(s.inner_pairs, kKeys * full));
        float* logits = room(s.logits, kKeys * full);
        float* weight_grads = room(s.weight_grads, kKeys * full);
        float* product = room(s.product, kKeys * c);
        float* query_grads = room(s.query_grads, full * c);
        float* query_grads_t = room(s.query_grads_t, full * c);
        float* log_sums = room(s.log_sums, full);
        float* deltas = room(s.deltas, full);
        const BFloat16* bias = group.bias.const_data_ptr<BFloat16>() + head * n * full;
        pack(q, stride, m, c, full, queries);
        pack_transposed(q, stride, m, c, full, queries_t);
        pack(g, width, m, c, full, grads);
        pack_transposed(g, width, m, c, full, grads_t);
        pack(k, stride, n, c, even, keys);
        transpose(keys, c, even / 2, c, even / 2, keys_t);
        std::copy_n(sums.const_data_ptr<float>() + head * rows + row, m, log_sums);
        for (int64_t r = 0; r < m; ++r) {  // what a softmax takes off its gradient
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < c; j += kLanes)
                sum = _mm512_fmadd_ps(load(g + r * width + j), load(o + r * width + j), sum);
            deltas[r] = _mm512_reduce_add_ps(sum);
        }
        std::fill(log_sums + m, log_sums + full, 0.0f);
        std::fill(deltas + m, deltas + full, 0.0f);

        for (int64_t at = 0; at < n; at += kKeys) {
            const int64_t block = std::min(kKeys, n - at), pairs = block + block % 2;
            brgemm(block, full, c, stride, full, full, false, k + at * stride, queries_t,
                   logits);
            brgemm(block, full, c, stride, full, full, false, v + at * stride, grads_t,
                   weight_grads);
            for (int64_t r = 0; r < block; r += 2) {  // two keys: a pair of the right side
                const int64_t key = at + r;
                const bool both = r + 1 < block;
                uint32_t* pairs_of = inner_pairs + r / 2 * full;
                for (int64_t j = 0; j < full; j += 2 * kLanes) {
                    __m512i changes[2] = {};
                    for (int64_t h = 0; h < 1 + both; ++h) {
                        const int64_t there = (r + h) * full + j;
                        const Logits x(logits + there, scale_of_logits,
                                       bias + (key + h) * full + j);
                        const __m512 a = power_of_two(
                            _mm512_sub_ps(x.first, _mm512_loadu_ps(log_sums + j)));
                        const __m512 b = power_of_two(
                            _mm512_sub_ps(x.second, _mm512_loadu_ps(log_sums + j + kLanes)));
                        store(weights + there, a, b);
                        const float* above = weight_grads + there;
                        const __m512 y =
                            _mm512_mul_ps(a, _mm512_sub_ps(_mm512_loadu_ps(above),
                                                           _mm512_loadu_ps(deltas + j)));
                        const __m512 z = _mm512_mul_ps(
                            b, _mm512_sub_ps(_mm512_loadu_ps(above + kLanes),
                                             _mm512_loadu_ps(deltas + j + kLanes)));
                        float* sum = grad_bias + (key + h) * full + j;
                        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), y));
                        sum += kLanes;
                        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), z));
                        changes[h] = narrow(y, z);
                        _mm512_storeu_si512(inner + there, changes[h]);
                    }
                    for (int64_t h = 0; h < 2; ++h)
                        _mm512_storeu_si512(
                            pairs_of + j + h * kLanes,
                            _mm512_permutex2var_epi16(changes[0], h ? upper : lower,
                                                      changes[1]));
                }
            }
            brgemm(block, c, full, full, c, c, false, weights, grads, product);
            for (int64_t r = 0; r < block; ++r)
                for (int64_t j = 0; j < c; j += kLanes)
                    store(below + (token + at + r) * stride + 2 * width + head * c + j,
                          _mm512_loadu_ps(product + r * c + j));
            brgemm(block, c, full, full, c, c, false, inner, queries, product);
            for (int64_t r = 0; r < block; ++r)
                for (int64_t j = 0; j < c; j += kLanes)
                    store(below + (token + at + r) * stride + width + head * c + j,
                          _mm512_mul_ps(_mm512_loadu_ps(product + r * c + j),
                                        _mm512_set1_ps(scale)));
            brgemm(c, full, pairs, even, full, full, at > 0, keys_t + at,
                   reinterpret_cast<BFloat16*>(inner_pairs), query_grads_t);
        }
        transpose(query_grads_t, full, c, m, c, query_grads);
        for (int64_t r = 0; r < m; ++r)
            for (int64_t j = 0; j < c; j += kLanes)
                store(below + (token + group.first + r) * stride + head * c + j,
                      _mm512_mul_ps(_mm512_loadu_ps(query_grads + r * c + j),
                                    _mm512_set1_ps(scale)));
    };
    for_each_chunk<BackwardScratch>(
        groups, heads, [&](const Group& group, int64_t head, int64_t chunk, BackwardScratch& s) {
            const int64_t size = group.tokens * group.bias.size(2);
            float* grad_bias = grad_biases[&group - groups.data()].data_ptr<float>() +
                               (chunk * heads + head) * size;
            std::fill_n(grad_bias, size, 0.0f);
            const int64_t end = (chunk + 1) * group.windows / group.chunks;
            for (int64_t window = chunk * group.windows / group.chunks; window < end; ++window)
                one_window(group, head, window, grad_bias, s);
        });
    for (size_t i = 0; i < groups.size(); ++i) {
        Tensor sum =
            grad_biases[i].sum(0).slice(2, 0, groups[i].asking).transpose(1, 2);  // A, M, N
        if (groups[i].asking < groups[i].tokens)
            sum = at::constant_pad_nd(sum, {0, 0, first[i], groups[i].tokens - last[i]});
        grad_biases[i] = sum.unsqueeze(0);
    }
    return {grad_qkv, grad_biases};
}

// ---- A whole block, for inference ---------------------------------------------------------------
//
// A window goes from its tokens to its tokens in the cache: of the residual stream (float32) each
// number is read and written once a block, and nothing else leaves.

constexpr int64_t kTile = 64;      // tokens
constexpr int64_t kColumns = 192;  // of a product at a time

struct Linear {
    int64_t in, out;
    Tensor packed;  // (in / 2, out, 2)
    const float* bias;

    Linear(const Tensor& weight, const Tensor& bias)
        : in(weight.size(1)),
          out(weight.size(0)),
          packed(at::empty({in * out}, weight.options().dtype(at::kBFloat16))),
          bias(bias.const_data_ptr<float>()) {
        const Tensor narrow = weight.to(at::kBFloat16);
        pack_transposed(narrow.const_data_ptr<BFloat16>(), in, out, in, out,
                        packed.data_ptr<BFloat16>());
    }

    // Numbers j..j+15 of a row of `product`, which starts at column `from`, with the bias.
    __m512 with_bias(const float* row, int64_t j, int64_t from = 0) const {
        return _mm512_add_ps(_mm512_loadu_ps(row + j), _mm512_loadu_ps(bias + from + j));
    }

    // Columns from..from+count of x W^T, without the bias, for `rows` rows of x -> (rows, count).
    void product(const BFloat16* x, int64_t rows, int64_t from, int64_t count, float* y) const {
        brgemm(rows, count, in, in, out, count, false, x,
               packed.const_data_ptr<BFloat16>() + 2 * from, y);
    }
};

// Numbers of f, 16 at a time, as bf16: f(j) -> those from j on.
template <class F>
void for_each_vector(int64_t count, BFloat16* to, const F& f) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= count; j += 2 * kLanes) store(to + j, f(j), f(j + kLanes));
    if (j < count) store(to + j, f(j));
}

struct Norm {
    const float *weight, *bias;
    float eps;

    Norm(const Tensor& weight, const Tensor& bias, double eps)
        : weight(weight.const_data_ptr<float>()),
          bias(bias.const_data_ptr<float>()),
          eps(static_cast<float>(eps)) {}

    void operator()(const float* x, int64_t width, BFloat16* y) const {
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t j = 0; j < width; j += kLanes)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + j));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (int64_t j = 0; j < width; j += kLanes) {
            const __m512 away = _mm512_sub_ps(_mm512_loadu_ps(x + j), mean);
            squares = _mm512_fmadd_ps(away, away, squares);
        }
        const __m512 scale =
            _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
        for (int64_t j = 0; j < width; j += kLanes) {
            const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + j), mean), scale);
            store(y + j,
                  _mm512_fmadd_ps(unit, _mm512_loadu_ps(weight + j), _mm512_loadu_ps(bias + j)));
        }
    }
};

// x times the normal distribution's integral up to x, to 1e-4 and 3e-4 of the result above x = -1
// (bf16 keeps 2e-3): an odd polynomial that reaches 1/2 at 4.25. NaN stays NaN.
__m512 gelu(__m512 x) {
    const __m512 end = _mm512_set1_ps(4.25f);
    const __m512 z =
        _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), end), _mm512_min_ps(end, x));
    const __m512 square = _mm512_mul_ps(z, z);
    __m512 y = _mm512_set1_ps(-8.91815066e-10f);
    for (const float factor : {7.91436179e-8f, -3.04413902e-6f, 6.72213937e-5f, -9.55688069e-4f,
                               9.33311973e-3f, -6.56377822e-2f, 3.98585498e-1f})
        y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(factor));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(z, y, _mm512_set1_ps(0.5f)));
}

struct BlockScratch {
    AttentionScratch attention;
    std::vector<BFloat16> normed, qkv, mixed, hidden;
    std::vector<float> product;
};

// s = x[there] + proj(attention(qkv(LayerNorm(x[there])))); s + fc2(gelu(fc1(LayerNorm(s)))): the
// residual stream x (rows, C) -> (asking tokens, C). `valid` (T, 1): 0 zeroes a normalised row.
// Parameters: weight and bias of norm1, qkv, proj, norm2, fc1, fc2.
Tensor swin_block(const Tensor& x, const Tensor& there, const std::optional<Tensor>& valid,
                  at::TensorList parameters, double eps1, double eps2, at::TensorList biases,
                  at::IntArrayRef counts, at::IntArrayRef first, at::IntArrayRef last) {
    const auto& p = parameters;
    const Norm norm1(p[0], p[1], eps1), norm2(p[6], p[7], eps2);
    const Linear qkv(p[2], p[3]), proj(p[4], p[5]), fc1(p[8], p[9]), fc2(p[10], p[11]);
    const int64_t heads = biases[0].size(1), width = x.size(1), c = width / heads;
    const auto groups = groups_of(biases, counts, first, last, false, kAll);
    const int64_t rows = groups.back().out_row + groups.back().windows * groups.back().asking;
    Tensor out = at::empty({rows, width}, x.options());
    const auto* in = x.const_data_ptr<float>();
    const float* inside = valid ? valid->const_data_ptr<float>() : nullptr;

    for_each_chunk<BlockScratch>(
        groups, 1, [&](const Group& group, int64_t, int64_t window, BlockScratch& s) {
            const int64_t n = group.tokens, token = group.row + window * n;
            const int64_t* from = there.const_data_ptr<int64_t>() + token;
            float* to = out.data_ptr<float>() + (group.out_row + window * group.asking) * width;
            BFloat16* normed = room(s.normed, n * width);
            BFloat16* head_qkv = room(s.qkv, n * 3 * c);
            BFloat16* mixed = room(s.mixed, group.asking * width);
            BFloat16* hidden = room(s.hidden, kTile * fc1.out);
            float* product = room(s.product, kTile * std::max(kColumns, width));

            for (int64_t r = 0; r < n; ++r)
                if (inside && inside[token + r] == 0)
                    std::fill_n(normed + r * width, width, BFloat16(0));
                else
                    norm1(in + from[r] * width, width, normed + r * width);
            for (int64_t head = 0; head < heads; ++head) {
                for (int64_t at = 0; at < n; at += kTile) {
                    const int64_t tile = std::min(kTile, n - at);
                    for (int64_t part = 0; part < 3; ++part) {
                        const int64_t column = part * width + head * c;
                        qkv.product(normed + at * width, tile, column, c, product);
                        for (int64_t r = 0; r < tile; ++r)
                            for_each_vector(c, head_qkv + ((at + r) * 3 + part) * c, [&](int64_t j) {
                                return qkv.with_bias(product + r * c, j, column);
                            });
                    }
                }
                attend(head_qkv + group.first * 3 * c, head_qkv + c, head_qkv + 2 * c, 3 * c, group,
                       head, c, mixed + head * c, width, nullptr, s.attention);
            }
            for (int64_t at = 0; at < group.asking; at += kTile) {
                const int64_t tile = std::min(kTile, group.asking - at);
                proj.product(mixed + at * width, tile, 0, width, product);
                for (int64_t r = 0; r < tile; ++r) {
                    const float* old = in + from[group.first + at + r] * width;
                    float* sum = to + (at + r) * width;
                    for (int64_t j = 0; j < width; j += kLanes)
                        _mm512_storeu_ps(sum + j, _mm512_add_ps(_mm512_loadu_ps(old + j),
                                                                proj.with_bias(product + r * width, j)));
                    norm2(sum, width, normed + r * width);
                }
                for (int64_t column = 0; column < fc1.out; column += kColumns) {
                    const int64_t count = std::min(kColumns, fc1.out - column);
                    fc1.product(normed, tile, column, count, product);
                    for (int64_t r = 0; r < tile; ++r)
                        for_each_vector(count, hidden + r * fc1.out + column, [&](int64_t j) {
                            return gelu(fc1.with_bias(product + r * count, j, column));
                        });
                }
                fc2.product(hidden, tile, 0, width, product);
                for (int64_t r = 0; r < tile; ++r)
                    for (int64_t j = 0; j < width; j += kLanes) {
                        float* sum = to + (at + r) * width + j;
                        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum),
                                                            fc2.with_bias(product + r * width, j)));
                    }
            }
        });
    return out;
}

}  // namespace

TORCH_LIBRARY(hpc_xvr, m) {
    m.def(
        "window_attention(Tensor qkv, Tensor[] biases, int[] counts, int[] first, int[] last)"
        " -> (Tensor, Tensor)");
    m.def(
        "window_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor sums,"
        " Tensor[] biases, int[] counts, int[] first, int[] last) -> (Tensor, Tensor[])");
    m.def(
        "swin_block(Tensor x, Tensor there, Tensor? valid, Tensor[] parameters, float eps1,"
        " float eps2, Tensor[] biases, int[] counts, int[] first, int[] last) -> Tensor");
}

TORCH_LIBRARY_IMPL(hpc_xvr, CPU, m) {
    m.impl("window_attention", &window_attention);
    m.impl("window_attention_backward", &window_attention_backward);
    m.impl("swin_block", &swin_block);
}
