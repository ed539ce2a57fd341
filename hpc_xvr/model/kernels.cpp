// For CPUs that multiply bf16 matrices themselves (AVX-512 BF16, AMX): window attention, and for
// inference the linear layers around it.
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
constexpr int64_t kLanes = 16;         // float32 numbers of a vector
constexpr int64_t kQueries = 64;       // queries of a block, forward
constexpr int64_t kKeys = 32;          // keys of a block, backward

int64_t round_up(int64_t n) { return (n + 31) / 32 * 32; }

__m512 load(const BFloat16* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void store(BFloat16* at, __m512 x) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), bits);
}

// 2^x to 2e-7, or 2^-126 below that: a polynomial between -1/2 and 1/2, scaled by the whole part.
__m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order NaN stays NaN
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.33335581e-3f);
    for (const float factor :
         {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, whole);
}

// The right side of a bf16 product holds pairs of rows side by side: x[k][j] lies at
// [k / 2][j][k % 2]. Both take (rows, columns) with `stride` between the rows, and fill up with
// zeros to `full` rows.

// in as the right side: (rows, columns) -> (full / 2, columns, 2).
void pack(const BFloat16* in, int64_t stride, int64_t rows, int64_t columns, int64_t full,
          BFloat16* out) {
    const auto* from = reinterpret_cast<const uint16_t*>(in);
    auto* to = reinterpret_cast<uint32_t*>(out);
    for (int64_t r = 0; r < full; r += 2) {
        const uint16_t* even = from + r * stride;
        const uint16_t* odd = even + stride;
        for (int64_t j = 0; j < columns; ++j) {
            const uint32_t low = r < rows ? even[j] : 0, high = r + 1 < rows ? odd[j] : 0;
            to[r / 2 * columns + j] = low | high << 16;
        }
    }
}

// in transposed as the right side: (rows, columns) -> (columns / 2, full, 2).
void pack_transposed(const BFloat16* in, int64_t stride, int64_t rows, int64_t columns,
                     int64_t full, BFloat16* out) {
    auto* to = reinterpret_cast<uint32_t*>(out);
    for (int64_t r = 0; r < full; ++r) {
        const auto* from = reinterpret_cast<const uint32_t*>(in + r * stride);
        for (int64_t j = 0; j < columns / 2; ++j) to[j * full + r] = r < rows ? from[j] : 0;
    }
}

struct Group {
    int64_t tokens, first, asking;  // N, the first token that asks, M
    int64_t row, out_row;           // of the group's first window
    int64_t tasks;                  // windows * heads
    Tensor bias;  // forward (A, M, N filled up with -inf), backward (A, N, M filled up)
};

std::vector<Group> groups_of(at::TensorList biases, at::IntArrayRef counts, at::IntArrayRef first,
                             at::IntArrayRef last, bool transposed) {
    std::vector<Group> groups;
    int64_t row = 0, out_row = 0;
    for (size_t i = 0; i < biases.size(); ++i) {
        const int64_t tokens = biases[i].size(2), asking = last[i] - first[i];
        Tensor bias = biases[i][0].slice(1, first[i], last[i]);
        if (transposed) bias = bias.transpose(1, 2);
        const int64_t missing = round_up(bias.size(2)) - bias.size(2);
        if (missing)
            bias = at::constant_pad_nd(bias, {0, missing},
                                       transposed ? 0 : -std::numeric_limits<float>::infinity());
        groups.push_back({tokens, first[i], asking, row, out_row, counts[i] * biases[i].size(1),
                          bias.contiguous()});
        row += counts[i] * tokens;
        out_row += counts[i] * asking;
    }
    return groups;
}

// Run work(group, window, head, scratch) for every head of every window; the windows of a head
// follow each other, so that a thread keeps its bias in the cache.
template <class Scratch, class Work>
void for_each_head(const std::vector<Group>& groups, int64_t heads, const Work& work) {
    int64_t tasks = 0;
    for (const Group& group : groups) tasks += group.tasks;
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        size_t i = 0;
        int64_t before = 0;
        for (int64_t task = begin; task < end; ++task) {
            while (task - before >= groups[i].tasks) before += groups[i++].tasks;
            const int64_t windows = groups[i].tasks / heads;
            work(i, (task - before) % windows, (task - before) / windows, scratch);
        }
        at::native::cpublas::brgemm_release();
    });
}

template <class T>
T* room(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

struct ForwardScratch {
    std::vector<BFloat16> keys, values, weights;
    std::vector<float> logits, mixed;
};

// qkv (T, 3*A*c) -> mixed values (asking tokens, A*c), log2 of the softmax's sum (A, asking
// tokens).
std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, at::TensorList biases,
                                            at::IntArrayRef counts, at::IntArrayRef first,
                                            at::IntArrayRef last) {
    const int64_t heads = biases[0].size(1), width = qkv.size(1) / 3, c = width / heads,
                  stride = 3 * width;
    const auto groups = groups_of(biases, counts, first, last, false);
    const int64_t rows = groups.back().out_row + groups.back().tasks / heads * groups.back().asking;
    Tensor out = at::empty({rows, width}, qkv.options());
    Tensor sums = at::empty({heads, rows}, qkv.options().dtype(at::kFloat));
    const auto* in = qkv.const_data_ptr<BFloat16>();
    auto* result = out.data_ptr<BFloat16>();
    auto* log_sums = sums.data_ptr<float>();
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(static_cast<float>(c)));

    for_each_head<ForwardScratch>(
        groups, heads, [&](size_t i, int64_t window, int64_t head, ForwardScratch& s) {
            const Group& group = groups[i];
            const int64_t n = group.tokens, full = round_up(n);
            const BFloat16* q = in + (group.row + window * n) * stride + head * c;
            BFloat16* keys = room(s.keys, full * c);
            BFloat16* values = room(s.values, full * c);
            BFloat16* weights = room(s.weights, kQueries * full);
            float* logits = room(s.logits, kQueries * full);
            float* mixed = room(s.mixed, kQueries * c);
            pack_transposed(q + width, stride, n, c, full, keys);
            pack(q + 2 * width, stride, n, c, full, values);

            for (int64_t at = 0; at < group.asking; at += kQueries) {
                const int64_t block = std::min(kQueries, group.asking - at);
                const int64_t row = group.out_row + window * group.asking + at;
                float* log_sum = log_sums + head * rows + row;
                brgemm(block, full, c, stride, full, full, false, q + (group.first + at) * stride,
                       keys, logits);
                for (int64_t r = 0; r < block; ++r) {
                    const BFloat16* bias = group.bias.const_data_ptr<BFloat16>() +
                                           (head * group.asking + at + r) * full;
                    float* logit = logits + r * full;
                    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
                    for (int64_t j = 0; j < full; j += kLanes) {
                        const __m512 x =
                            _mm512_fmadd_ps(_mm512_loadu_ps(logit + j), scale, load(bias + j));
                        largest = _mm512_max_ps(largest, x);
                        _mm512_storeu_ps(logit + j, x);
                    }
                    const float top = _mm512_reduce_max_ps(largest) * kLog2e;
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t j = 0; j < full; j += kLanes) {
                        const __m512 x =
                            _mm512_fmsub_ps(_mm512_loadu_ps(logit + j), _mm512_set1_ps(kLog2e),
                                            _mm512_set1_ps(top));
                        const __m512 weight = power_of_two(x);
                        sum = _mm512_add_ps(sum, weight);
                        store(weights + r * full + j, weight);
                    }
                    log_sum[r] = top + std::log2(_mm512_reduce_add_ps(sum));
                    logit[0] = 1 / _mm512_reduce_add_ps(sum);
                }
                brgemm(block, c, full, full, c, c, false, weights, values, mixed);
                for (int64_t r = 0; r < block; ++r) {
                    BFloat16* to = result + (row + r) * width + head * c;
                    const __m512 share = _mm512_set1_ps(logits[r * full]);
                    for (int64_t j = 0; j < c; j += kLanes)
                        store(to + j, _mm512_mul_ps(_mm512_loadu_ps(mixed + r * c + j), share));
                }
            }
        });
    return {out, sums};
}

struct BackwardScratch {
    std::vector<BFloat16> queries, queries_t, grads, grads_t, keys_t, weights, inner, inner_pairs;
    std::vector<float> logits, weight_grads, product, query_grads, log_sums, deltas;
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
    const auto groups = groups_of(biases, counts, first, last, true);
    const bool all_ask = rows == qkv.size(0);
    Tensor grad_qkv =
        all_ask ? at::empty(qkv.sizes(), qkv.options()) : at::zeros(qkv.sizes(), qkv.options());
    const int64_t threads = at::get_num_threads();
    std::vector<Tensor> grad_biases;  // threads, A, N, M filled up
    for (const Group& group : groups)
        grad_biases.push_back(
            at::zeros({threads, heads, group.tokens, group.bias.size(2)}, sums.options()));
    const auto* in = qkv.const_data_ptr<BFloat16>();
    const auto* above = grad.const_data_ptr<BFloat16>();
    const auto* result = out.const_data_ptr<BFloat16>();
    auto* below = grad_qkv.data_ptr<BFloat16>();
    const float scale = 1 / std::sqrt(static_cast<float>(c));

    for_each_head<BackwardScratch>(
        groups, heads, [&](size_t i, int64_t window, int64_t head, BackwardScratch& s) {
            const Group& group = groups[i];
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
            BFloat16* keys_t = room(s.keys_t, even * c);
            BFloat16* weights = room(s.weights, kKeys * full);
            BFloat16* inner = room(s.inner, kKeys * full);
            auto* inner_pairs = reinterpret_cast<uint32_t*>(room(s.inner_pairs, kKeys * full));
            float* logits = room(s.logits, kKeys * full);
            float* weight_grads = room(s.weight_grads, kKeys * full);
            float* product = room(s.product, kKeys * c);
            float* query_grads = room(s.query_grads, full * c);
            float* log_sums = room(s.log_sums, full);
            float* deltas = room(s.deltas, full);
            pack(q, stride, m, c, full, queries);
            pack_transposed(q, stride, m, c, full, queries_t);
            pack(g, width, m, c, full, grads);
            pack_transposed(g, width, m, c, full, grads_t);
            for (int64_t r = 0; r < n; ++r)
                for (int64_t j = 0; j < c; ++j) keys_t[j * even + r] = k[r * stride + j];
            for (int64_t j = 0; j < c; ++j)
                std::fill(keys_t + j * even + n, keys_t + (j + 1) * even, BFloat16(0));
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
                for (int64_t r = 0; r < block; ++r) {
                    const int64_t key = head * n + at + r;
                    uint32_t* pair =
                        inner_pairs + r / 2 * full;  // the even row of a pair zeroes the odd one
                    const BFloat16* bias = group.bias.const_data_ptr<BFloat16>() + key * full;
                    float* grad_bias = grad_biases[i].data_ptr<float>() +
                                       (at::get_thread_num() * heads * n + key) * full;
                    for (int64_t j = 0; j < full; j += kLanes) {
                        const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(logits + r * full + j),
                                                         _mm512_set1_ps(scale), load(bias + j));
                        const __m512 weight = power_of_two(_mm512_fmsub_ps(
                            x, _mm512_set1_ps(kLog2e), _mm512_loadu_ps(log_sums + j)));
                        const __m512 change =
                            _mm512_sub_ps(_mm512_loadu_ps(weight_grads + r * full + j),
                                          _mm512_loadu_ps(deltas + j));
                        const __m512 y = _mm512_mul_ps(weight, change);
                        const __m256i bits = (__m256i)_mm512_cvtneps_pbh(y);
                        _mm512_storeu_ps(grad_bias + j,
                                         _mm512_add_ps(_mm512_loadu_ps(grad_bias + j), y));
                        store(weights + r * full + j, weight);
                        _mm256_storeu_si256(reinterpret_cast<__m256i*>(inner + r * full + j), bits);
                        const __m512i wide = _mm512_cvtepu16_epi32(bits);
                        auto* both = pair + j;
                        _mm512_storeu_si512(both, r % 2
                                                      ? _mm512_or_si512(_mm512_loadu_si512(both),
                                                                        _mm512_slli_epi32(wide, 16))
                                                      : wide);
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
                       reinterpret_cast<BFloat16*>(inner_pairs), query_grads);
            }
            for (int64_t r = 0; r < m; ++r)
                for (int64_t j = 0; j < c; ++j)
                    below[(token + group.first + r) * stride + head * c + j] =
                        query_grads[j * full + r] * scale;
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

// ---- What surrounds attention in a block, for inference ----------------------------------------
//
// A tile of tokens goes from one product to the next in the cache; of the residual stream (float32)
// each element is read and written once a block.

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

    // Columns from..from+count of x W^T, without the bias, for `rows` rows of x -> (rows, count).
    void product(const BFloat16* x, int64_t rows, int64_t from, int64_t count, float* y) const {
        brgemm(rows, count, in, in, out, count, false, x,
               packed.const_data_ptr<BFloat16>() + 2 * from, y);
    }
};

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

// x/2 (1 + erf(x / sqrt 2)); erf to 2e-7 by Abramowitz and Stegun 7.1.26.
__m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    const __m512 z = _mm512_abs_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
    const __m512 below = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one);
    __m512 t = _mm512_rcp14_ps(below);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(below, t, _mm512_set1_ps(2.0f)));  // a Newton step
    __m512 sum = _mm512_set1_ps(1.061405429f);
    for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(factor));
    const __m512 fall = power_of_two(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-kLog2e)));
    const __m512 erf = _mm512_fnmadd_ps(_mm512_mul_ps(sum, t), fall, one);  // of |x|
    return _mm512_fmadd_ps(_mm512_abs_ps(half), erf, half);
}

template <class Work>
void for_each_tile(int64_t tokens, const Work& work) {
    at::parallel_for(0, (tokens + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
        work(begin * kTile, std::min(end * kTile, tokens));
        at::native::cpublas::brgemm_release();
    });
}

// Linear(LayerNorm(x[there])): (rows, C) -> (T, K) bf16. `valid` (T, 1): 0 zeroes a normalised row.
Tensor norm_linear(const Tensor& x, const Tensor& there, const std::optional<Tensor>& valid,
                   const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                   const Tensor& weight, const Tensor& bias) {
    const int64_t tokens = there.size(0), width = x.size(1);
    const Norm norm(norm_weight, norm_bias, eps);
    const Linear linear(weight, bias);
    Tensor out = at::empty({tokens, linear.out}, x.options().dtype(at::kBFloat16));
    const auto* in = x.const_data_ptr<float>();
    const auto* from = there.const_data_ptr<int64_t>();
    const float* inside = valid ? valid->const_data_ptr<float>() : nullptr;
    auto* to = out.data_ptr<BFloat16>();

    for_each_tile(tokens, [&](int64_t begin, int64_t end) {
        std::vector<BFloat16> normed(kTile * width);
        std::vector<float> product(kTile * kColumns);
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t rows = std::min(kTile, end - at);
            for (int64_t r = 0; r < rows; ++r) {
                BFloat16* y = normed.data() + r * width;
                if (inside && inside[at + r] == 0)
                    std::fill_n(y, width, BFloat16(0));
                else
                    norm(in + from[at + r] * width, width, y);
            }
            for (int64_t column = 0; column < linear.out; column += kColumns) {
                const int64_t count = std::min(kColumns, linear.out - column);
                linear.product(normed.data(), rows, column, count, product.data());
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t j = 0; j < count; j += kLanes)
                        store(to + (at + r) * linear.out + column + j,
                              _mm512_add_ps(_mm512_loadu_ps(product.data() + r * count + j),
                                            _mm512_loadu_ps(linear.bias + column + j)));
            }
        }
    });
    return out;
}

// s = x[there] + proj(y); s + fc2(gelu(fc1(LayerNorm(s)))): attention's result y (T, C) bf16 and
// the residual stream x (rows, C) -> (T, C).
Tensor close_attention_and_mlp(const Tensor& y, const Tensor& x, const Tensor& there,
                               const Tensor& proj_weight, const Tensor& proj_bias,
                               const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                               const Tensor& fc1_weight, const Tensor& fc1_bias,
                               const Tensor& fc2_weight, const Tensor& fc2_bias) {
    const int64_t tokens = there.size(0), width = x.size(1);
    const Norm norm(norm_weight, norm_bias, eps);
    const Linear proj(proj_weight, proj_bias), fc1(fc1_weight, fc1_bias), fc2(fc2_weight, fc2_bias);
    Tensor out = at::empty({tokens, width}, x.options());
    const auto* mixed = y.const_data_ptr<BFloat16>();
    const auto* in = x.const_data_ptr<float>();
    const auto* from = there.const_data_ptr<int64_t>();
    auto* to = out.data_ptr<float>();

    for_each_tile(tokens, [&](int64_t begin, int64_t end) {
        std::vector<BFloat16> normed(kTile * width), hidden(kTile * fc1.out);
        std::vector<float> product(kTile * std::max(kColumns, width));
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t rows = std::min(kTile, end - at);
            proj.product(mixed + at * width, rows, 0, width, product.data());
            for (int64_t r = 0; r < rows; ++r) {
                const float* old = in + from[at + r] * width;
                float* sum = to + (at + r) * width;
                for (int64_t j = 0; j < width; j += kLanes) {
                    const __m512 branch =
                        _mm512_add_ps(_mm512_loadu_ps(product.data() + r * width + j),
                                      _mm512_loadu_ps(proj.bias + j));
                    _mm512_storeu_ps(sum + j, _mm512_add_ps(_mm512_loadu_ps(old + j), branch));
                }
                norm(sum, width, normed.data() + r * width);
            }
            for (int64_t column = 0; column < fc1.out; column += kColumns) {
                const int64_t count = std::min(kColumns, fc1.out - column);
                fc1.product(normed.data(), rows, column, count, product.data());
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t j = 0; j < count; j += kLanes)
                        store(hidden.data() + r * fc1.out + column + j,
                              gelu(_mm512_add_ps(_mm512_loadu_ps(product.data() + r * count + j),
                                                 _mm512_loadu_ps(fc1.bias + column + j))));
            }
            fc2.product(hidden.data(), rows, 0, width, product.data());
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t j = 0; j < width; j += kLanes) {
                    float* sum = to + (at + r) * width + j;
                    const __m512 branch =
                        _mm512_add_ps(_mm512_loadu_ps(product.data() + r * width + j),
                                      _mm512_loadu_ps(fc2.bias + j));
                    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), branch));
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
        "norm_linear(Tensor x, Tensor there, Tensor? valid, Tensor norm_weight, Tensor norm_bias,"
        " float eps, Tensor weight, Tensor bias) -> Tensor");
    m.def(
        "close_attention_and_mlp(Tensor y, Tensor x, Tensor there, Tensor proj_weight,"
        " Tensor proj_bias, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight,"
        " Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(hpc_xvr, CPU, m) {
    m.impl("window_attention", &window_attention);
    m.impl("window_attention_backward", &window_attention_backward);
    m.impl("norm_linear", &norm_linear);
    m.impl("close_attention_and_mlp", &close_attention_and_mlp);
}
