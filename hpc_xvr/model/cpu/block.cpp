// A Swin block and its gradients for CPUs that multiply bf16 matrices themselves (AVX-512 BF16,
// AMX).
//
// Window by window: from the residual stream (float32) a window's tokens go through norm, attention
// and MLP in the cache, and only the stream is written again. What is kept for the backward pass is
// the input and, where wanted, queries, keys, values, mixed values and the MLP's inner layer before
// GELU (bf16); the rest is computed once more. Branches that stochastic depth drops are skipped.
//
// Shapes: T tokens in window order; groups of n windows of N tokens; A heads of c channels,
// C = A*c; H inner channels of the MLP. The tokens first..last of each window ask (M of them), all
// N answer.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "attention.h"

namespace {

constexpr int64_t kTile = 64;      // tokens that go through linear layers at a time
constexpr int64_t kColumns = 192;  // columns of a product at a time

// ---- Layers -------------------------------------------------------------------------------------

struct Norm {
    const float *weight, *bias;
    float eps;

    Norm(const Tensor& weight, const Tensor& bias, double eps)
        : weight(weight.const_data_ptr<float>()),
          bias(bias.const_data_ptr<float>()),
          eps(static_cast<float>(eps)) {}

    // Mean and 1 / deviation of a row.
    std::tuple<float, float> moments(const float* x, int64_t width) const {
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t j = 0; j < width; j += kLanes) sum += load(x + j);
        const float mean = _mm512_reduce_add_ps(sum) / width;
        for (int64_t j = 0; j < width; j += kLanes) {
            const __m512 away = load(x + j) - mean;
            squares = _mm512_fmadd_ps(away, away, squares);
        }
        return {mean, 1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps)};
    }

    void forward(const float* x, int64_t width, BFloat16* y) const {
        const auto [mean, scale] = moments(x, width);
        for_each_vector(width, y, [&](int64_t j) {
            return _mm512_fmadd_ps((load(x + j) - mean) * scale, load(weight + j), load(bias + j));
        });
    }

    // grad_x = add + what `grad` gives (may be x itself); sums of the parameters' gradients.
    void backward(const float* x, const float* grad, const float* add, int64_t width, float* grad_x,
                  float* grad_weight, float* grad_bias) const {
        const auto [mean, scale] = moments(x, width);
        __m512 sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
        for (int64_t j = 0; j < width; j += kLanes) {
            const __m512 unit = (load(x + j) - mean) * scale, g = load(grad + j);
            store(grad_weight + j, _mm512_fmadd_ps(g, unit, load(grad_weight + j)));
            store(grad_bias + j, load(grad_bias + j) + g);
            const __m512 weighted = g * load(weight + j);
            sum += weighted;
            product = _mm512_fmadd_ps(weighted, unit, product);
        }
        const float constant = _mm512_reduce_add_ps(sum) / width;
        const float slope = _mm512_reduce_add_ps(product) / width;
        for (int64_t j = 0; j < width; j += kLanes) {
            const __m512 unit = (load(x + j) - mean) * scale;
            __m512 g = (load(grad + j) * load(weight + j) - constant - unit * slope) * scale;
            if (add) g += load(add + j);
            store(grad_x + j, g);
        }
    }
};

struct Linear {
    int64_t in, out;
    Tensor forward_side, backward_side;  // weight^T and weight as right sides
    const float* bias;

    Linear(const Tensor& weight, const Tensor& bias, bool backward)
        : in(weight.size(1)), out(weight.size(0)), bias(bias.const_data_ptr<float>()) {
        const Tensor narrow = weight.to(at::kBFloat16).contiguous();
        const auto* from = narrow.const_data_ptr<BFloat16>();
        forward_side = at::empty({in * out}, narrow.options());
        pack_transposed(from, in, out, in, out, forward_side.data_ptr<BFloat16>());
        if (!backward) return;
        backward_side = at::empty({in * out}, narrow.options());
        pack(from, in, out, in, out, backward_side.data_ptr<BFloat16>());
    }

    // Columns from..from+count of x W^T, without the bias: (rows, in) -> (rows, count).
    void forward(const BFloat16* x, int64_t rows, int64_t from, int64_t count, float* y) const {
        brgemm(rows, count, in, in, out, count, false, x,
               forward_side.const_data_ptr<BFloat16>() + 2 * from, y);
    }

    // Numbers j..j+15 of a row of that, with the bias.
    __m512 with_bias(const float* row, int64_t j, int64_t from = 0) const {
        return load(row + j) + load(bias + from + j);
    }

    // Columns from..from+count of the gradient y W: (rows, out) -> (rows, count).
    void backward(const BFloat16* y, int64_t rows, int64_t from, int64_t count, float* x) const {
        brgemm(rows, count, out, out, in, count, false, y,
               backward_side.const_data_ptr<BFloat16>() + 2 * from, x);
    }
};

// Parameters, and their gradients, in this order.
enum Parameter {
    kNorm1, kNorm1Bias, kQkv, kQkvBias, kProj, kProjBias,
    kNorm2, kNorm2Bias, kFc1, kFc1Bias, kFc2, kFc2Bias,
    kParameters
};

struct Block {
    Norm norm1;
    Linear qkv, proj;
    Norm norm2;
    Linear fc1, fc2;

    // Parameters in the order of `Parameter`.
    Block(at::TensorList p, double eps1, double eps2, bool backward)
        : norm1(p[kNorm1], p[kNorm1Bias], eps1),
          qkv(p[kQkv], p[kQkvBias], backward),
          proj(p[kProj], p[kProjBias], backward),
          norm2(p[kNorm2], p[kNorm2Bias], eps2),
          fc1(p[kFc1], p[kFc1Bias], backward),
          fc2(p[kFc2], p[kFc2Bias], backward) {}
};

// ---- Windows ------------------------------------------------------------------------------------

struct Group {
    int64_t tokens, first, asking;  // N, the first token that asks, M
    int64_t row, out_row;           // of the group's first window
    int64_t windows, chunks;        // chunks: of windows that are worked on in one go
    Tensor bias, bias_t;            // as `attend` and `attend_backward` take them
};

struct Call {
    const Block block;
    const int64_t heads, width, channels, tokens;
    const float* x;
    const int64_t* there;
    const float *valid, *drop1, *drop2;
    std::vector<Group> groups;
    int64_t rows = 0;  // that come out

    Call(const Tensor& x, const Tensor& there, const std::optional<Tensor>& valid,
         const std::optional<Tensor>& drop1, const std::optional<Tensor>& drop2,
         at::TensorList parameters, double eps1, double eps2, at::TensorList biases,
         at::IntArrayRef counts, at::IntArrayRef first, at::IntArrayRef last, bool backward,
         bool forward)
        : block(parameters, eps1, eps2, backward),
          heads(biases[0].size(1)),
          width(x.size(1)),
          channels(width / heads),
          tokens(there.size(0)),
          x(x.const_data_ptr<float>()),
          there(there.const_data_ptr<int64_t>()),
          valid(data(valid)),
          drop1(data(drop1)),
          drop2(data(drop2)) {
        int64_t row = 0;
        TORCH_CHECK(tokens > 0 && width == heads * channels && channels % kLanes == 0 &&
                        block.fc1.out % kLanes == 0,
                    "swin_block: channels must be multiples of ", kLanes);
        // Gradients of parameters are summed by chunks: the result is the same in each run with as
        // many threads.
        const int64_t chunks = 4 * at::get_num_threads();
        for (size_t i = 0; i < biases.size(); ++i) {
            const int64_t n = biases[i].size(2), asking = last[i] - first[i], count = counts[i];
            TORCH_CHECK(0 <= first[i] && first[i] < last[i] && last[i] <= n &&
                            row + count * n <= tokens,
                        "swin_block: windows of ", n, " tokens do not fit ", tokens);
            const Tensor bias = biases[i][0].slice(1, first[i], last[i]);
            const int64_t share = std::max<int64_t>(1, chunks * count * n / tokens);
            groups.push_back({n, first[i], asking, row, rows, count,
                              backward ? std::min(share, count) : count,
                              forward ? arrange(bias, kFar) : Tensor(),
                              backward ? arrange(bias.transpose(1, 2), 0) : Tensor()});
            row += count * n;
            rows += count * asking;
        }
        TORCH_CHECK(row == tokens, "swin_block: windows of ", row, " tokens for ", tokens);
    }

    static const float* data(const std::optional<Tensor>& t) {
        return t ? t->const_data_ptr<float>() : nullptr;
    }

    const float* stream(int64_t token) const { return x + there[token] * width; }
    bool padding(int64_t token) const { return valid && valid[token] == 0; }
    float keep1(int64_t token) const { return drop1 ? drop1[token] : 1; }
    float keep2(int64_t token) const { return drop2 ? drop2[token] : 1; }
    Shape shape(const Group& group) const { return {group.tokens, group.asking, channels}; }
};

// Gives the matrix unit back at the end of a thread's work, whatever ends it.
struct Tiles {
    ~Tiles() { at::native::cpublas::brgemm_release(); }
};

// Run work(group, chunk, scratch) for all chunks. Threads take what is next, as cores need not be
// equally fast.
template <class Scratch, class Work>
void for_each_chunk(const std::vector<Group>& groups, const Work& work) {
    int64_t tasks = 0;
    for (const Group& group : groups) tasks += group.chunks;
    std::atomic<int64_t> next = 0;
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const Tiles tiles;
        Scratch scratch;
        size_t i = 0;
        int64_t before = 0;
        for (int64_t task = next++; task < tasks; task = next++) {
            while (task - before >= groups[i].chunks) before += groups[i++].chunks;
            work(groups[i], task - before, scratch);
        }
    });
}

// Run use(at, tile) for tiles of `rows`, or use(from, count) for parts of columns.
template <class Use>
void for_each_part(int64_t rows, int64_t size, const Use& use) {
    for (int64_t at = 0; at < rows; at += size) use(at, std::min(size, rows - at));
}

// What a window leaves for its backward pass. qkv: (token, part, head) lies at token * stride +
// part * part_step + head * head_step.
struct Kept {
    BFloat16* qkv;
    int64_t stride, part_step, head_step;
    BFloat16* mixed;    // (M, C)
    float* log_sums;    // M, those of the next head sums_step further
    int64_t sums_step;
    BFloat16* inner;    // (M, H) or null

    Rows<BFloat16> head(int64_t head, int64_t first) const {
        BFloat16* at = qkv + head * head_step;
        return {at + first * stride, at + part_step, at + 2 * part_step, stride};
    }
};

struct BlockScratch {
    AttentionScratch attention;
    Buffer<BFloat16> normed, qkv, mixed, hidden;
    Buffer<float> product, log_sums;
};

void normalise(const Call& call, const Group& group, int64_t token, BFloat16* normed) {
    const int64_t width = call.width;
    for (int64_t r = 0; r < group.tokens; ++r, normed += width)
        if (call.padding(token + r))
            std::fill_n(normed, width, BFloat16(0));
        else
            call.block.norm1.forward(call.stream(token + r), width, normed);
}

// Normalised tokens (N, C) -> qkv, mixed and log_sums of `kept`.
void attention_branch(const Call& call, const Group& group, const BFloat16* normed,
                      const Kept& kept, float* product, AttentionScratch& s) {
    const int64_t c = call.channels, width = call.width, full = round_up(group.tokens);
    const Linear& qkv = call.block.qkv;
    for (int64_t head = 0; head < call.heads; ++head) {
        for_each_part(group.tokens, kTile, [&](int64_t at, int64_t tile) {
            for (int64_t part = 0; part < 3; ++part) {
                const int64_t column = part * width + head * c;
                qkv.forward(normed + at * width, tile, column, c, product);
                BFloat16* to = kept.qkv + at * kept.stride + part * kept.part_step +
                               head * kept.head_step;
                for (int64_t r = 0; r < tile; ++r)
                    for_each_vector(c, to + r * kept.stride, [&](int64_t j) {
                        return qkv.with_bias(product + r * c, j, column);
                    });
            }
        });
        const auto rows = kept.head(head, group.first);
        attend({rows.q, rows.k, rows.v, rows.stride}, call.shape(group),
               group.bias.const_data_ptr<BFloat16>() + head * group.asking * full,
               kept.mixed + head * c, width, kept.log_sums + head * kept.sums_step, s);
    }
}

// Close the attention branch for a tile, from asking token `at` of a window on: the stream
// (tile, C) and its norm.
void close_attention(const Call& call, const Group& group, int64_t token, int64_t at, int64_t tile,
                     const BFloat16* mixed, float* sum, BFloat16* normed, float* product) {
    const int64_t width = call.width;
    const Linear& proj = call.block.proj;
    const float keep = call.keep1(token);
    if (keep != 0) proj.forward(mixed + at * width, tile, 0, width, product);
    for (int64_t r = 0; r < tile; ++r, sum += width, normed += width) {
        const float* old = call.stream(token + group.first + at + r);
        if (keep == 0)
            std::copy_n(old, width, sum);
        else
            for (int64_t j = 0; j < width; j += kLanes)
                store(sum + j, load(old + j) + proj.with_bias(product + r * width, j) * keep);
        call.block.norm2.forward(sum, width, normed);
    }
}

void forward_window(const Call& call, const Group& group, int64_t window, Kept kept, float* out,
                    BlockScratch& s) {
    const int64_t width = call.width, token = group.row + window * group.tokens;
    const Linear &fc1 = call.block.fc1, &fc2 = call.block.fc2;
    float* product = s.product.room(kTile * std::max(kColumns, width));
    BFloat16* normed = s.normed.room(group.tokens * width);
    BFloat16* hidden = s.hidden.room(kTile * fc1.out);
    if (call.keep1(token) != 0) {
        normalise(call, group, token, normed);
        attention_branch(call, group, normed, kept, product, s.attention);
    }
    for_each_part(group.asking, kTile, [&](int64_t at, int64_t tile) {
        float* sum = out + at * width;
        const float keep = call.keep2(token);
        close_attention(call, group, token, at, tile, kept.mixed, sum, normed, product);
        if (keep == 0) return;
        for_each_part(fc1.out, kColumns, [&](int64_t column, int64_t count) {
            fc1.forward(normed, tile, column, count, product);
            for (int64_t r = 0; r < tile; ++r) {
                const auto inner = [&](int64_t j) {
                    return fc1.with_bias(product + r * count, j, column);
                };
                if (kept.inner)
                    for_each_vector(count, kept.inner + (at + r) * fc1.out + column, inner);
                for_each_vector(count, hidden + r * fc1.out + column,
                                [&](int64_t j) { return gelu(inner(j)); });
            }
        });
        fc2.forward(hidden, tile, 0, width, product);
        for (int64_t r = 0; r < tile; ++r, sum += width)
            for (int64_t j = 0; j < width; j += kLanes)
                store(sum + j, load(sum + j) + fc2.with_bias(product + r * width, j) * keep);
    });
}

// The saved tensors (each empty where it was not saved) as a window sees them; attention's part in
// scratch memory where they do not hold it, all heads in turn in the same place if `overwrite`.
struct Saved {
    Tensor qkv, mixed, log_sums, inner;  // (T, 3*C), (rows, C), (A, rows), (rows, H)

    Kept window(const Call& call, const Group& group, int64_t window, bool overwrite,
                BlockScratch& s) const {
        const int64_t width = call.width, c = call.channels;
        const int64_t token = group.row + window * group.tokens;
        const int64_t row = group.out_row + window * group.asking;
        Kept kept{};
        if (inner.numel()) kept.inner = inner.data_ptr<BFloat16>() + row * inner.size(1);
        if (qkv.numel()) {
            kept.qkv = qkv.data_ptr<BFloat16>() + token * 3 * width;
            kept.mixed = mixed.data_ptr<BFloat16>() + row * width;
            kept.log_sums = log_sums.data_ptr<float>() + row;
            kept.sums_step = log_sums.size(1);
        } else {
            kept.qkv = s.qkv.room(group.tokens * 3 * (overwrite ? c : width));
            kept.mixed = s.mixed.room(group.asking * width);
            kept.log_sums = s.log_sums.room(call.heads * group.asking);
            kept.sums_step = group.asking;
        }
        kept.part_step = overwrite ? c : width;
        kept.head_step = overwrite ? 0 : c;
        kept.stride = 3 * kept.part_step;
        return kept;
    }
};

enum Save : int64_t { kNothing, kAttention, kAll };

// s = x[there] + proj(attention(qkv(LayerNorm(x[there])))); s + fc2(gelu(fc1(LayerNorm(s)))): the
// residual stream x (rows, C) -> (asking tokens, C), and what is saved. `valid` (T, 1): 0 zeroes a
// normalised row; `drop1`, `drop2` (T): factors of the branches.
std::tuple<Tensor, std::vector<Tensor>> swin_block(
    const Tensor& x, const Tensor& there, const std::optional<Tensor>& valid,
    const std::optional<Tensor>& drop1, const std::optional<Tensor>& drop2,
    at::TensorList parameters, double eps1, double eps2, at::TensorList biases,
    at::IntArrayRef counts, at::IntArrayRef first, at::IntArrayRef last, int64_t save) {
    const Call call(x, there, valid, drop1, drop2, parameters, eps1, eps2, biases, counts, first,
                    last, false, true);
    const auto narrow = x.options().dtype(at::kBFloat16);
    const int64_t all = save > kNothing, inner = save > kAttention;
    const Saved saved{at::empty({all * call.tokens, 3 * call.width}, narrow),
                      at::empty({all * call.rows, call.width}, narrow),
                      at::empty({call.heads, all * call.rows}, x.options()),
                      at::empty({inner * call.rows, call.block.fc1.out}, narrow)};
    Tensor out = at::empty({call.rows, call.width}, x.options());
    for_each_chunk<BlockScratch>(
        call.groups, [&](const Group& group, int64_t window, BlockScratch& s) {
            float* to = out.data_ptr<float>() +
                        (group.out_row + window * group.asking) * call.width;
            forward_window(call, group, window, saved.window(call, group, window, !all, s), to, s);
        });
    return {out, {saved.qkv, saved.mixed, saved.log_sums, saved.inner}};
}

// ---- Gradients ----------------------------------------------------------------------------------

struct GradScratch {
    BlockScratch forward;
    AttentionGradScratch attention;
    Buffer<BFloat16> normed1, normed2, hidden, inner, branch, grad_mixed, qkv, pairs, left, right;
    Buffer<float> stream, product;
};

// Sums of gradients over a chunk's windows: the parameters', all in one row, and the bias'.
struct Sums {
    float* parameters[kParameters];
    float* bias;  // (A, N, M filled up)
};

// sum (out, in) += a^T b for a (rows, out) and b (rows, in).
void add_outer_product(const BFloat16* a, int64_t out, const BFloat16* b, int64_t in, int64_t rows,
                       float* sum, GradScratch& s) {
    const int64_t full = round_up(rows);
    BFloat16* pairs = s.pairs.room(full * out);
    BFloat16* left = s.left.room(full * out);
    BFloat16* right = s.right.room(full * in);
    pack(a, out, rows, out, full, pairs);
    transpose(pairs, out, full / 2, out, full / 2, left);
    pack(b, in, rows, in, full, right);
    brgemm(out, in, full, full, in, in, true, left, right, sum);
}

void add_rows(const BFloat16* a, int64_t rows, int64_t width, float* sum) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < width; j += kLanes)
            store(sum + j, load(sum + j) + load(a + r * width + j));
}

// `stream` holds what close_attention left and takes the gradient there; above: that of the output.
void mlp_backward(const Call& call, const Group& group, const BFloat16* kept_inner, float keep,
                  const float* above, const BFloat16* normed, float* stream, const Sums& sums,
                  float* product, GradScratch& s) {
    const int64_t width = call.width, m = group.asking;
    const Linear &fc1 = call.block.fc1, &fc2 = call.block.fc2;
    BFloat16* branch = s.branch.room(m * width);
    BFloat16* hidden = s.hidden.room(m * fc1.out);
    BFloat16* inner = s.inner.room(m * fc1.out);  // before GELU, then its gradient
    for_each_vector(m * width, branch, [&](int64_t j) { return load(above + j) * keep; });
    add_rows(branch, m, width, sums.parameters[kFc2Bias]);
    for_each_part(m, kTile, [&](int64_t at, int64_t tile) {
        for_each_part(fc1.out, kColumns, [&](int64_t column, int64_t count) {
            const int64_t start = at * fc1.out + column;
            if (!kept_inner) {
                fc1.forward(normed + at * width, tile, column, count, product);
                for (int64_t r = 0; r < tile; ++r)
                    for_each_vector(count, inner + start + r * fc1.out, [&](int64_t j) {
                        return fc1.with_bias(product + r * count, j, column);
                    });
            }
            fc2.backward(branch + at * width, tile, column, count, product);
            for (int64_t r = 0; r < tile; ++r) {
                const int64_t there = start + r * fc1.out;
                const BFloat16* x = (kept_inner ? kept_inner : inner) + there;
                for_each_vector(count, hidden + there,
                                [&](int64_t j) { return gelu(load(x + j)); });
                for_each_vector(count, inner + there, [&](int64_t j) {
                    return load(product + r * count + j) * gelu_slope(load(x + j));
                });
            }
        });
        fc1.backward(inner + at * fc1.out, tile, 0, width, product);
        for (int64_t r = 0; r < tile; ++r) {
            float* row = stream + (at + r) * width;
            call.block.norm2.backward(row, product + r * width, above + (at + r) * width, width,
                                      row, sums.parameters[kNorm2], sums.parameters[kNorm2Bias]);
        }
    });
    add_rows(inner, m, fc1.out, sums.parameters[kFc1Bias]);
    add_outer_product(branch, width, hidden, fc1.out, m, sums.parameters[kFc2], s);
    add_outer_product(inner, fc1.out, normed, width, m, sums.parameters[kFc1], s);
}

// Gradient of the stream after the attention branch (M, C) -> that of the normalised tokens' linear
// layer (N, 3*C).
const BFloat16* attention_backward(const Call& call, const Group& group, const Kept& kept,
                                   float keep, const float* above, const Sums& sums, float* product,
                                   GradScratch& s) {
    const int64_t width = call.width, c = call.channels, n = group.tokens, m = group.asking;
    const Linear& proj = call.block.proj;
    BFloat16* branch = s.branch.room(m * width);
    BFloat16* grad_mixed = s.grad_mixed.room(m * width);
    BFloat16* qkv = s.qkv.room(n * 3 * width);
    for_each_vector(m * width, branch, [&](int64_t j) { return load(above + j) * keep; });
    add_rows(branch, m, width, sums.parameters[kProjBias]);
    add_outer_product(branch, width, kept.mixed, width, m, sums.parameters[kProj], s);
    for_each_part(m, kTile, [&](int64_t at, int64_t tile) {
        proj.backward(branch + at * width, tile, 0, width, product);
        for_each_vector(tile * width, grad_mixed + at * width,
                        [&](int64_t j) { return load(product + j); });
    });
    if (m < n) std::fill_n(qkv, n * 3 * width, BFloat16(0));
    const int64_t full = round_up(m);
    for (int64_t head = 0; head < call.heads; ++head) {
        const auto rows = kept.head(head, group.first);
        BFloat16* below = qkv + head * c;
        attend_backward({rows.q, rows.k, rows.v, rows.stride}, call.shape(group),
                        group.bias_t.const_data_ptr<BFloat16>() + head * n * full,
                        kept.mixed + head * c, grad_mixed + head * c, width,
                        kept.log_sums + head * kept.sums_step,
                        {below + group.first * 3 * width, below + width, below + 2 * width,
                         3 * width},
                        sums.bias + head * n * full, s.attention);
    }
    return qkv;
}

void backward_window(const Call& call, const Group& group, int64_t window, const Saved& saved,
                     const float* above, float* grad_x, bool whole, const Sums& sums,
                     GradScratch& s) {
    const int64_t width = call.width, n = group.tokens, m = group.asking;
    const int64_t token = group.row + window * n;
    const float keep1 = call.keep1(token), keep2 = call.keep2(token);
    const Kept kept = saved.window(call, group, window, false, s.forward);
    float* product = s.product.room(kTile * std::max(kColumns, width));
    float* stream = s.stream.room(m * width);
    BFloat16* normed1 = s.normed1.room(n * width);
    BFloat16* normed2 = s.normed2.room(m * width);
    if (keep1 != 0) {
        normalise(call, group, token, normed1);
        if (!saved.qkv.numel())
            attention_branch(call, group, normed1, kept, product, s.forward.attention);
    }
    if (keep2 == 0) {
        std::copy_n(above, m * width, stream);
    } else {
        for_each_part(m, kTile, [&](int64_t at, int64_t tile) {
            close_attention(call, group, token, at, tile, kept.mixed, stream + at * width,
                            normed2 + at * width, product);
        });
        mlp_backward(call, group, kept.inner, keep2, above, normed2, stream, sums, product, s);
    }
    const BFloat16* qkv = nullptr;
    if (keep1 != 0) {
        qkv = attention_backward(call, group, kept, keep1, stream, sums, product, s);
        add_rows(qkv, n, 3 * width, sums.parameters[kQkvBias]);
        add_outer_product(qkv, 3 * width, normed1, width, n, sums.parameters[kQkv], s);
    }
    for_each_part(n, kTile, [&](int64_t at, int64_t tile) {
        if (qkv) call.block.qkv.backward(qkv + at * 3 * width, tile, 0, width, product);
        for (int64_t r = at; r < at + tile; ++r) {
            const bool padding = call.padding(token + r);
            if (padding && !whole) continue;  // a copy of row 0, which has its own gradient
            const bool asks = r >= group.first && r < group.first + m;
            const float* add = asks ? stream + (r - group.first) * width : nullptr;
            float* to = grad_x + call.there[token + r] * width;
            if (qkv && !padding)
                call.block.norm1.backward(call.stream(token + r), product + (r - at) * width, add,
                                          width, to, sums.parameters[kNorm1],
                                          sums.parameters[kNorm1Bias]);
            else if (add)
                std::copy_n(add, width, to);
            else
                std::fill_n(to, width, 0.0f);
        }
    });
}

// Gradients of x, the parameters and the biases.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> swin_block_backward(
    const Tensor& grad, const Tensor& x, const Tensor& there, const std::optional<Tensor>& valid,
    const std::optional<Tensor>& drop1, const std::optional<Tensor>& drop2,
    at::TensorList parameters, double eps1, double eps2, at::TensorList biases,
    at::IntArrayRef counts, at::IntArrayRef first, at::IntArrayRef last, at::TensorList kept) {
    const Saved saved{kept[0], kept[1], kept[2], kept[3]};
    const Call call(x, there, valid, drop1, drop2, parameters, eps1, eps2, biases, counts, first,
                    last, true, !saved.qkv.numel());
    const bool whole = call.tokens == x.size(0);  // each row of x is one token
    int64_t size = 0, chunks = 0;
    for (const Tensor& p : parameters) size += p.numel();
    std::vector<int64_t> first_chunk;
    std::vector<Tensor> sums_of_biases;  // chunks, A, N, M filled up
    for (const Group& group : call.groups) {
        first_chunk.push_back(chunks);
        chunks += group.chunks;
        sums_of_biases.push_back(at::empty(
            {group.chunks, call.heads, group.tokens, group.bias_t.size(2)}, x.options()));
    }
    Tensor grad_x = at::empty(x.sizes(), x.options());
    Tensor sums = at::empty({chunks, size}, x.options());

    for_each_chunk<GradScratch>(
        call.groups, [&](const Group& group, int64_t chunk, GradScratch& s) {
            const int64_t i = &group - call.groups.data();
            Sums here;
            float* at = sums.data_ptr<float>() + (first_chunk[i] + chunk) * size;
            std::fill_n(at, size, 0.0f);
            for (size_t p = 0; p < parameters.size(); ++p) {
                here.parameters[p] = at;
                at += parameters[p].numel();
            }
            const int64_t bias_size = sums_of_biases[i].stride(0);
            here.bias = sums_of_biases[i].data_ptr<float>() + chunk * bias_size;
            std::fill_n(here.bias, bias_size, 0.0f);
            const int64_t end = (chunk + 1) * group.windows / group.chunks;
            for (int64_t window = chunk * group.windows / group.chunks; window < end; ++window)
                backward_window(call, group, window, saved,
                                grad.const_data_ptr<float>() +
                                    (group.out_row + window * group.asking) * call.width,
                                grad_x.data_ptr<float>(), whole, here, s);
        });

    std::vector<Tensor> grad_parameters, grad_biases;
    int64_t at = 0;
    for (const Tensor& p : parameters) {
        grad_parameters.push_back(sums.narrow(1, at, p.numel()).sum(0).view(p.sizes()));
        at += p.numel();
    }
    for (size_t i = 0; i < call.groups.size(); ++i) {
        const Group& group = call.groups[i];
        const Tensor sum = sums_of_biases[i].sum(0).slice(2, 0, group.asking).transpose(1, 2);
        Tensor all = sum.unsqueeze(0);  // 1, A, M, N
        if (group.asking < group.tokens) {
            all = at::zeros({1, call.heads, group.tokens, group.tokens}, x.options());
            all[0].slice(1, group.first, group.first + group.asking).copy_(sum);
        }
        grad_biases.push_back(all);
    }
    return {grad_x, grad_parameters, grad_biases};
}

}  // namespace

TORCH_LIBRARY(hpc_xvr, m) {
    m.def(
        "swin_block(Tensor x, Tensor there, Tensor? valid, Tensor? drop1, Tensor? drop2,"
        " Tensor[] parameters, float eps1, float eps2, Tensor[] biases, int[] counts, int[] first,"
        " int[] last, int save) -> (Tensor, Tensor[])");
    m.def(
        "swin_block_backward(Tensor grad, Tensor x, Tensor there, Tensor? valid, Tensor? drop1,"
        " Tensor? drop2, Tensor[] parameters, float eps1, float eps2, Tensor[] biases,"
        " int[] counts, int[] first, int[] last, Tensor[] saved)"
        " -> (Tensor, Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(hpc_xvr, CPU, m) {
    m.impl("swin_block", &swin_block);
    m.impl("swin_block_backward", &swin_block_backward);
}
