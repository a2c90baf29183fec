// Numbers that attention multiplies, float32 or bfloat16, and products of small matrices of them; for native.cc.
//
// Products see words of 32 bits. A word holds kPack numbers that follow one another along the summed dimension, and one instruction
// multiplies and adds vectors of words: the same loops, half as many turns of them for bfloat16. Sums are float32.

#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

typedef uint32_t LooseWord __attribute__((may_alias));

inline Vec every(const float* word) { return (Vec)(Word{} + *reinterpret_cast<const LooseWord*>(word)); }

struct Float32 {
  using Number = float;
  static constexpr int kPack = 1;

  static Vec multiply_add(Vec left, Vec right, Vec sum) { return sum + left * right; }
  static Vec read(const Number* from) { return load(from); }
  static void write(Number* to, Vec x) { store(to, x); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Number = uint16_t;
  static constexpr int kPack = 2;

  static Vec multiply_add(Vec left, Vec right, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
  static Vec read(const Number* from) {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
  }
  static void write(Number* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  // Words of a number of ``low`` and one of ``high``.
  static Vec pair(Vec low, Vec high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const Word zipped = {0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006, 0x00170007,
                         0x00180008, 0x00190009, 0x001A000A, 0x001B000B, 0x001C000C, 0x001D000D, 0x001E000E, 0x001F000F};
    return (Vec)_mm512_permutexvar_epi16((__m512i)zipped, halves);
  }
};
#endif

template <class Operand>
constexpr int64_t words(int64_t numbers) {
  return (numbers + Operand::kPack - 1) / Operand::kPack;
}

template <class Operand>
inline const float* as_words(const typename Operand::Number* x) {
  return reinterpret_cast<const float*>(x);  // read by load() and every() only, which may alias
}

// Vector j of row i of a product's left factor, in place of float32 numbers: the row's numbers follow one another.
template <class Operand>
inline void store_left(float* row, int j, Vec x) {
  Operand::write(reinterpret_cast<typename Operand::Number*>(row) + j * kLanes, x);
}

// Vector j of kPack rows of a product's right factor.
template <class Operand>
inline void store_right(float* row, int j, const Vec (&x)[Operand::kPack]) {
  if constexpr (Operand::kPack == 1)
    store(row + j * kLanes, x[0]);
  else
    store(row + j * kLanes, Operand::pair(x[0], x[1]));
}

// Rows [n][size] as words [n / kPack][size] of numbers of one column, in ``out`` if they are not that already.
template <class Operand>
const float* rows_as_words(const typename Operand::Number* x, int64_t n, int64_t size, float* out) {
  if constexpr (Operand::kPack == 1) {
    return x;
  } else {
    for (int64_t i = 0; i < n; i += 2)
      for (int64_t h = 0; h < size; h += kLanes) {
        const Vec low = Operand::read(x + i * size + h), high = i + 1 < n ? Operand::read(x + (i + 1) * size + h) : Vec{};
        store(out + i / 2 * size + h, Operand::pair(low, high));
      }
    return out;
  }
}

// out[s][h] = factor[s] * x[h][s] for ``tokens`` rows.
template <class Operand>
void transpose_out(const float* x, const float* factor, int64_t tokens, int64_t size, typename Operand::Number* out) {
  for (int s = 0; s < tokens; s += kLanes) {
    const Vec scale = load(factor + s);
    for (int64_t h = 0; h < size; h += kLanes) {
      Vec part[kLanes];
      for (int i = 0; i < kLanes; ++i) part[i] = load(x + (h + i) * kQueries + s) * scale;
      transpose(part);
      for (int i = 0; i < kLanes && s + i < tokens; ++i) Operand::write(out + (s + i) * size + h, part[i]);
    }
  }
}

// c[i][:] (+)= sum over k of a[i * row + k * step] * b[k * ldb + :], for Rows rows and Cols vectors of columns.
template <class Operand, int Rows, int Cols>
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
      const Vec left = every(a + i * row + k * step);
#pragma GCC unroll 8
      for (int j = 0; j < Cols; ++j) sum[i][j] = Operand::multiply_add(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

// The same for any number of rows. Distances and ``count`` are in words.
template <class Operand, int Cols>
void product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
             int64_t count, bool add) {
  constexpr int kRows = 6;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    tile<Operand, kRows, Cols>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, count, add);
  for (; i + 2 <= rows; i += 2) tile<Operand, 2, Cols>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, count, add);
  if (i < rows) tile<Operand, 1, Cols>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, count, add);
}

// The same for any number of columns that vectors divide.
template <class Operand>
void wide_product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                  int64_t cols, int64_t count, bool add) {
  int64_t j = 0;
  for (; j + kQueries <= cols; j += kQueries)
    product<Operand, kWide>(a, row, step, b + j, ldb, c + j, ldc, rows, count, add);
  for (; j < cols; j += kLanes) product<Operand, 1>(a, row, step, b + j, ldb, c + j, ldc, rows, count, add);
}

}  // namespace
