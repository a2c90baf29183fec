// Vectors as wide as the machine's (the extension of GCC and Clang), transposes, memory; for native.cc.

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
constexpr int kWide = 4;  // vectors of a block of queries: with six rows of a product 24 of 32 registers
#else
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

struct Memory {  // floats on a cache line's boundary
  explicit Memory(int64_t count) : data(static_cast<float*>(::operator new(4 * count, std::align_val_t{64}))) {}
  ~Memory() { ::operator delete(data, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  float* data;
};

}  // namespace
