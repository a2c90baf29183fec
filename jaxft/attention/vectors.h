// Vectors as wide as the machine's (the extension of GCC and Clang), products of small matrices, transposes; for native.cc.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;  // with four vectors of columns 24 of the 32 registers
constexpr int kWide = 4;
#else
constexpr int kTileRows = 6;
constexpr int kWide = 2;
#endif
constexpr int kQueries = kWide * kLanes;  // of a block

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t LooseInt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }
inline Int load_int(const int32_t* p) { return *reinterpret_cast<const LooseInt*>(p); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^y for y <= 127; below 2^-126 it stays there. Relative error 2e-7; a nan stays one.
inline Vec exp2_of(Vec y) {
  y = y < all(-126.0f) ? all(-126.0f) : y;
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers, which then are the lowest bits
  const Vec shifted = y + magic;
  const Vec f = y - (shifted - magic);
  Vec p = all(1.5403530e-4f);  // ln(2)^i / i!
  p = p * f + all(1.3333558e-3f);
  p = p * f + all(9.6181291e-3f);
  p = p * f + all(5.5504109e-2f);
  p = p * f + all(2.4022651e-1f);
  p = p * f + all(6.9314718e-1f);
  p = p * f + all(1.0f);
  return (Vec)((Int)p + ((Int)shifted << 23));
}

// c[i][:] (+)= sum over k of a[i * row + k * step] * b[k * ldb + :], for Rows rows and Cols vectors of columns.
template <int Rows, int Cols>
inline void tile(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t count,
                 bool add) {
  Vec sum[Rows][Cols];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j) sum[i][j] = add ? load(c + i * ldc + j * kLanes) : Vec{};
  for (int64_t k = 0; k < count; ++k) {
    Vec right[Cols];
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec left = all(a[i * row + k * step]);
#pragma GCC unroll 8
      for (int j = 0; j < Cols; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

// The same for any number of rows.
template <int Cols>
void product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
             int64_t count, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    tile<kTileRows, Cols>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, count, add);
  for (; i + 2 <= rows; i += 2) tile<2, Cols>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, count, add);
  if (i < rows) tile<1, Cols>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, count, add);
}

// The same for any number of columns that vectors divide.
void wide_product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                  int64_t cols, int64_t count, bool add) {
  int64_t j = 0;
  for (; j + kQueries <= cols; j += kQueries)
    product<kWide>(a, row, step, b + j, ldb, c + j, ldc, rows, count, add);
  for (; j < cols; j += kLanes) product<1>(a, row, step, b + j, ldb, c + j, ldc, rows, count, add);
}

// Element j of a pair of vectors after halves of D elements have changed places.
template <int D, bool High, size_t... J>
inline Vec exchanged(Vec a, Vec b, std::index_sequence<J...>) {
#if defined(__clang__)
  return High ? __builtin_shufflevector(a, b, ((J & D) ? kLanes + J : (J | D))...)
              : __builtin_shufflevector(a, b, ((J & D) ? kLanes + (J ^ D) : J)...);
#else
  return High ? __builtin_shuffle(a, b, Int{((J & D) ? kLanes + int(J) : int(J | D))...})
              : __builtin_shuffle(a, b, Int{((J & D) ? kLanes + int(J ^ D) : int(J))...});
#endif
}

// Transposes kLanes vectors in registers: log2(kLanes) times, halves of pairs change places.
template <int D = kLanes / 2>
inline void transpose(Vec (&x)[kLanes]) {
  constexpr auto places = std::make_index_sequence<kLanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & D) continue;
    const Vec a = x[i], b = x[i | D];
    x[i] = exchanged<D, false>(a, b, places);
    x[i | D] = exchanged<D, true>(a, b, places);
  }
  if constexpr (D > 1) transpose<D / 2>(x);
}

// out[h][s] = x[s][h] for ``tokens`` <= kQueries rows; other columns are zeros.
void transpose_in(const float* x, int64_t tokens, int64_t size, float* out) {
  for (int s = 0; s < kQueries; s += kLanes)
    for (int64_t h = 0; h < size; h += kLanes) {
      Vec part[kLanes];
      for (int i = 0; i < kLanes; ++i) part[i] = s + i < tokens ? load(x + (s + i) * size + h) : Vec{};
      transpose(part);
      for (int i = 0; i < kLanes; ++i) store(out + (h + i) * kQueries + s, part[i]);
    }
}

// out[s][h] = factor[s] * x[h][s] for ``tokens`` rows.
void transpose_out(const float* x, const float* factor, int64_t tokens, int64_t size, float* out) {
  for (int s = 0; s < tokens; s += kLanes) {
    const Vec scale = load(factor + s);
    for (int64_t h = 0; h < size; h += kLanes) {
      Vec part[kLanes];
      for (int i = 0; i < kLanes; ++i) part[i] = load(x + (h + i) * kQueries + s) * scale;
      transpose(part);
      for (int i = 0; i < kLanes && s + i < tokens; ++i) store(out + (s + i) * size + h, part[i]);
    }
  }
}

struct Memory {  // floats on a cache line's boundary
  explicit Memory(int64_t count) : data(static_cast<float*>(::operator new(4 * count, std::align_val_t{64}))) {}
  ~Memory() { ::operator delete(data, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  float* data;
};

}  // namespace
