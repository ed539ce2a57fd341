// Softmax attention of one head of one window, and its gradients.
//
// A window holds N tokens; `asking` of them (M) ask, all N answer; a head has c channels. Keys and
// values are brought once into the order the matrix unit wants, and what a block of queries needs
// stays in the cache. The products are torch's own (at::native::cpublas::brgemm), their sums
// float32.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

using at::Tensor;

constexpr int64_t kQueries = 64;  // of a block, forward
constexpr int64_t kKeys = 64;     // of a block, backward
constexpr float kFar = -1e30f;    // the logit of a key that is not there

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

// Bias (A, rows, columns) -> the same in the order of `Biases`, rows filled up with `rest`.
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

// 32 logits of a query, to base 2, from products q k and their biases.
struct Logits {
    __m512 first, second;

    Logits(const float* product, float scale, const BFloat16* bias) {
        const Biases add(bias);
        first = _mm512_fmadd_ps(load(product), _mm512_set1_ps(scale), add.first);
        second = _mm512_fmadd_ps(load(product + kLanes), _mm512_set1_ps(scale), add.second);
    }
};

// 2^(logit - top) of a row -> bf16 weights and their sum.
template <bool kHasTop>
float weigh(const float* products, float scale, const BFloat16* bias, int64_t full, float top,
            BFloat16* weights) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < full; j += 2 * kLanes) {
        Logits x(products + j, scale, bias + j);
        if (kHasTop) x.first -= top, x.second -= top;
        const __m512 a = power_of_two(x.first), b = power_of_two(x.second);
        sums[0] += a;
        sums[1] += b;
        store(weights + j, a, b);
    }
    return _mm512_reduce_add_ps(sums[0] + sums[1]);
}

float largest(const float* products, float scale, const BFloat16* bias, int64_t full) {
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < full; j += 2 * kLanes) {
        const Logits x(products + j, scale, bias + j);
        top = _mm512_max_ps(top, _mm512_max_ps(x.first, x.second));
    }
    return _mm512_reduce_max_ps(top);
}

// Queries (M, c), keys and values (N, c): rows `stride` apart.
template <class T>
struct Rows {
    T *q, *k, *v;
    int64_t stride;
};

struct Shape {
    int64_t tokens, asking, channels;
    float scale() const { return 1 / std::sqrt(static_cast<float>(channels)); }
};

struct AttentionScratch {
    Buffer<BFloat16> keys, values, weights;
    Buffer<float> logits, mixed, shares;
};

// -> mixed values (M, c) in rows `width` apart, and log2 of each softmax's sum. bias: (M, N filled
// up) as `arrange` makes it.
void attend(const Rows<const BFloat16>& in, const Shape& shape, const BFloat16* bias, BFloat16* out,
            int64_t width, float* log_sums, AttentionScratch& s) {
    const int64_t n = shape.tokens, c = shape.channels, full = round_up(n);
    const float scale = kLog2e * shape.scale();
    BFloat16* keys = s.keys.room(full * c);
    BFloat16* values = s.values.room(full * c);
    BFloat16* weights = s.weights.room(kQueries * full);
    float* logits = s.logits.room(kQueries * full);
    float* mixed = s.mixed.room(kQueries * c);
    float* shares = s.shares.room(kQueries);
    pack_transposed(in.k, in.stride, n, c, full, keys);
    pack(in.v, in.stride, n, c, full, values);

    for (int64_t at = 0; at < shape.asking; at += kQueries) {
        const int64_t block = std::min(kQueries, shape.asking - at);
        brgemm(block, full, c, in.stride, full, full, false, in.q + at * in.stride, keys, logits);
        for (int64_t r = 0; r < block; ++r) {
            const float* products = logits + r * full;
            const BFloat16* add = bias + (at + r) * full;
            // Float32 and bf16 have room for most logits as they are; where they have not, the
            // largest is taken off first, as usual.
            float top = 0, sum = weigh<false>(products, scale, add, full, 0, weights + r * full);
            if (!(sum > 0x1p-64f && sum < 0x1p64f)) {
                top = largest(products, scale, add, full);
                sum = weigh<true>(products, scale, add, full, top, weights + r * full);
            }
            shares[r] = 1 / sum;
            log_sums[at + r] = top + std::log2(sum);
        }
        brgemm(block, c, full, full, c, c, false, weights, values, mixed);
        for (int64_t r = 0; r < block; ++r)
            for_each_vector(c, out + (at + r) * width,
                            [&](int64_t j) { return load(mixed + r * c + j) * shares[r]; });
    }
}

struct AttentionGradScratch {
    Buffer<BFloat16> queries, queries_t, grads, grads_t, keys, keys_t, weights, changes;
    Buffer<uint32_t> pairs;
    Buffer<float> logits, weight_grads, product, query_grads, query_grads_t, log_sums, deltas;
};

// Gradients of queries, keys and values, from that of the mixed values `out` (both in rows `width`
// apart); that of the bias (N, M filled up) is added to `grad_bias`. bias: (N, M filled up).
//
// Works on logits (keys, queries): rows of weights and of their changes are then the left sides of
// the products that give the gradients of values and keys.
void attend_backward(const Rows<const BFloat16>& in, const Shape& shape, const BFloat16* bias,
                     const BFloat16* out, const BFloat16* grad, int64_t width, const float* sums,
                     const Rows<BFloat16>& below, float* grad_bias, AttentionGradScratch& s) {
    const int64_t n = shape.tokens, m = shape.asking, c = shape.channels, stride = in.stride,
                  full = round_up(m), even = round_up(n);
    const float scale = shape.scale();
    BFloat16* queries = s.queries.room(full * c);
    BFloat16* queries_t = s.queries_t.room(full * c);
    BFloat16* grads = s.grads.room(full * c);
    BFloat16* grads_t = s.grads_t.room(full * c);
    BFloat16* keys = s.keys.room(even * c);
    BFloat16* keys_t = s.keys_t.room(even * c);  // (c, even)
    BFloat16* weights = s.weights.room(kKeys * full);
    BFloat16* changes = s.changes.room(kKeys * full);  // of the logits
    uint32_t* pairs = s.pairs.room(kKeys / 2 * full);  // the same as a right side
    float* logits = s.logits.room(kKeys * full);
    float* weight_grads = s.weight_grads.room(kKeys * full);
    float* product = s.product.room(kKeys * c);
    float* query_grads = s.query_grads.room(full * c);
    float* query_grads_t = s.query_grads_t.room(full * c);
    float* log_sums = s.log_sums.room(full);
    float* deltas = s.deltas.room(full);
    // Numbers 0, 0', 1, 1', ... of two vectors, and those of their second halves.
    const __m512i lower = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));

    pack(in.q, stride, m, c, full, queries);
    pack_transposed(in.q, stride, m, c, full, queries_t);
    pack(grad, width, m, c, full, grads);
    pack_transposed(grad, width, m, c, full, grads_t);
    pack(in.k, stride, n, c, even, keys);
    transpose(keys, c, even / 2, c, even / 2, keys_t);
    std::copy_n(sums, m, log_sums);
    for (int64_t r = 0; r < m; ++r) {  // what a softmax takes off its gradient
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < c; j += kLanes)
            sum = _mm512_fmadd_ps(load(grad + r * width + j), load(out + r * width + j), sum);
        deltas[r] = _mm512_reduce_add_ps(sum);
    }
    std::fill(log_sums + m, log_sums + full, 0.0f);
    std::fill(deltas + m, deltas + full, 0.0f);

    for (int64_t at = 0; at < n; at += kKeys) {
        const int64_t block = std::min(kKeys, n - at);
        brgemm(block, full, c, stride, full, full, false, in.k + at * stride, queries_t, logits);
        brgemm(block, full, c, stride, full, full, false, in.v + at * stride, grads_t,
               weight_grads);
        for (int64_t r = 0; r < block; r += 2)  // two keys make a pair
            for (int64_t j = 0; j < full; j += 2 * kLanes) {
                __m512i both[2] = {};
                for (int64_t key = r; key < std::min(r + 2, block); ++key) {
                    const int64_t there = key * full + j;
                    const Logits x(logits + there, kLog2e * scale, bias + at * full + there);
                    const __m512 a = power_of_two(x.first - load(log_sums + j));
                    const __m512 b = power_of_two(x.second - load(log_sums + j + kLanes));
                    store(weights + there, a, b);
                    const float* above = weight_grads + there;
                    const __m512 y = a * (load(above) - load(deltas + j));
                    const __m512 z = b * (load(above + kLanes) - load(deltas + j + kLanes));
                    float* sum = grad_bias + at * full + there;
                    store(sum, load(sum) + y);
                    store(sum + kLanes, load(sum + kLanes) + z);
                    both[key - r] = narrow(y, z);
                    _mm512_storeu_si512(changes + there, both[key - r]);
                }
                uint32_t* to = pairs + r / 2 * full + j;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(both[0], lower, both[1]));
                _mm512_storeu_si512(to + kLanes,
                                    _mm512_permutex2var_epi16(both[0], upper, both[1]));
            }
        brgemm(block, c, full, full, c, c, false, weights, grads, product);
        for (int64_t r = 0; r < block; ++r)
            for_each_vector(c, below.v + (at + r) * below.stride,
                            [&](int64_t j) { return load(product + r * c + j); });
        brgemm(block, c, full, full, c, c, false, changes, queries, product);
        for (int64_t r = 0; r < block; ++r)
            for_each_vector(c, below.k + (at + r) * below.stride,
                            [&](int64_t j) { return load(product + r * c + j) * scale; });
        brgemm(c, full, block + block % 2, even, full, full, at > 0, keys_t + at,
               reinterpret_cast<const BFloat16*>(pairs), query_grads_t);
    }
    transpose(query_grads_t, full, c, m, c, query_grads);
    for (int64_t r = 0; r < m; ++r)
        for_each_vector(c, below.q + r * below.stride,
                        [&](int64_t j) { return load(query_grads + r * c + j) * scale; });
}

}  // namespace
