// Vectors of 16 float32 numbers, and the orders of bf16 matrices that the matrix unit wants.

#pragma once

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;

constexpr int64_t kLanes = 16;
constexpr float kLog2e = 1.44269504f;

// Memory at the beginning of a cache line, so that no vector lies across two.
template <class T>
struct Buffer {
    T* data = nullptr;
    int64_t size = 0;

    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data); }

    // Room for `wanted` numbers, which are whatever they are; the old ones are lost.
    T* room(int64_t wanted) {
        if (wanted > size) {
            std::free(data);
            size = (wanted + 63) / 64 * 64;
            data = static_cast<T*>(std::aligned_alloc(64, size * sizeof(T)));
            if (!data) throw std::bad_alloc();
        }
        return data;
    }
};

int64_t round_up(int64_t n) { return (n + 31) / 32 * 32; }

__m512 load(const float* at) { return _mm512_loadu_ps(at); }

__m512 load(const BFloat16* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void store(float* at, __m512 x) { _mm512_storeu_ps(at, x); }

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
            _mm512_storeu_si512(
                out + r * columns + 2 * j,
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

// Numbers of f, 16 at a time, as bf16: f(j) -> those from j on.
template <class F>
void for_each_vector(int64_t count, BFloat16* to, const F& f) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= count; j += 2 * kLanes) store(to + j, f(j), f(j + kLanes));
    if (j < count) store(to + j, f(j));
}

// The normal distribution's integral up to x, less 1/2: an odd polynomial that reaches 1/2 at 4.25.
// x times it is exact to 1e-4, and to 3e-4 of GELU above x = -1 (bf16 keeps 2e-3). NaN stays NaN.
__m512 integral(__m512 x) {
    const __m512 end = _mm512_set1_ps(4.25f);
    const __m512 z = _mm512_max_ps(_mm512_set1_ps(-4.25f), _mm512_min_ps(end, x));
    const __m512 square = _mm512_mul_ps(z, z);
    __m512 y = _mm512_set1_ps(-8.91815066e-10f);
    for (const float factor : {7.91436179e-8f, -3.04413902e-6f, 6.72213937e-5f, -9.55688069e-4f,
                               9.33311973e-3f, -6.56377822e-2f, 3.98585498e-1f})
        y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(factor));
    return _mm512_mul_ps(z, y);
}

// GELU and its derivative.
__m512 gelu(__m512 x) {
    return _mm512_mul_ps(x, _mm512_add_ps(integral(x), _mm512_set1_ps(0.5f)));
}

__m512 gelu_slope(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 bell = _mm512_mul_ps(
        power_of_two(_mm512_mul_ps(square, _mm512_set1_ps(-0.5f * kLog2e))),
        _mm512_set1_ps(0.398942280f));
    return _mm512_fmadd_ps(x, bell, _mm512_add_ps(integral(x), _mm512_set1_ps(0.5f)));
}

}  // namespace
