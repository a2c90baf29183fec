// Attention for CPUs: softmax(scale q k^T) v and its gradients, called by XLA (jaxft/attention/native/__init__.py).
//
// A block of queries lies across the lanes of vector registers, keys follow one another: logits are made transposed, [t][s]. Then
// maxima and sums are one number per lane, and of the seven products none needs keys or values in another order than they have
// (only queries and cotangents are transposed, once). A block of logits never leaves the core's own caches; the softmax is
// a running one (Dao et al. 2022). Vectors are those of the GCC and Clang extension, as wide as the machine's.
//
// Dims: B rows, N query heads, K key heads, S queries, T keys, H head size. s counts queries, t keys.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "blocks.h"
#include "operands.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kKeys = 128;  // of a block, at most
constexpr float kMasked = std::numeric_limits<float>::lowest();  // finite: not even a row that may see nothing makes a nan

template <class Operand>
struct Call : Geometry {
  const typename Operand::Number *q, *k, *v;
};

// Logits, still to be scaled, of keys t ... t + count - 1 as [t][s], kMasked where a query may not see a key.
template <class Operand, int Cols>
void logits(const Block<Cols>& block, const typename Operand::Number* keys, const float* queries, int64_t t, int64_t count,
            bool masked, float* out) {
  const int64_t size = block.call.size, width = words<Operand>(size);
  product<Operand, Cols>(as_words<Operand>(keys + t * size), width, 1, queries, kQueries, out, kQueries, count, width, false);
  if (!masked) return;
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < Cols; ++j) {
      float* at = out + i * kQueries + j * kLanes;
      store(at, block.allowed(t + i, j) ? load(at) : all(kMasked));
    }
}

template <class Operand, class Result, int Cols>
void forward_block(const Call<Operand>& call, int64_t batch, int64_t head, int64_t first, float* scratch,
                   typename Result::Number* out, float* rows) {
  using B = Block<Cols>;
  const B block(call, batch, head, first);
  const int64_t size = call.size, tokens = std::min<int64_t>(kQueries, call.length - first);
  const int64_t of_query = (batch * call.heads + head) * call.length + first;
  const int64_t of_key = (batch * call.key_heads + head / (call.heads / call.key_heads)) * call.keys * size;
  const auto *keys = call.k + of_key, *values = call.v + of_key;
  const float c = call.log_scale();
  float *queries = scratch, *sums = queries + size * kQueries, *weights = sums + size * kQueries;
  float *factor = weights + kKeys * kQueries, *value_words = factor + kQueries;
  transpose_in(as_words<Operand>(call.q + of_query * size), tokens, words<Operand>(size), queries);
  std::memset(sums, 0, 4 * size * kQueries);
  Vec most[Cols], total[Cols];
  for (int j = 0; j < Cols; ++j) most[j] = all(kMasked), total[j] = Vec{};
  for (int64_t t = 0; t < call.keys; t += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, call.keys - t);
    const auto sight = block.sight(t, count);
    if (sight == B::kNone) continue;
    const bool masked = sight == B::kSome;
    logits<Operand>(block, keys, queries, t, count, masked, weights);
    Vec highest[Cols];
    for (int j = 0; j < Cols; ++j) highest[j] = most[j];
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < Cols; ++j) highest[j] = larger(highest[j], load(weights + i * kQueries + j * kLanes));
    Vec less[Cols], part[Cols];
    bool moved = false;
    for (int j = 0; j < Cols; ++j) {
      less[j] = exp2_of((most[j] - highest[j]) * c);
      for (int i = 0; i < kLanes; ++i) moved |= highest[j][i] != most[j][i];
      most[j] = highest[j];
      part[j] = Vec{};
    }
    for (int64_t i = 0; i < count; i += Operand::kPack)
      for (int j = 0; j < Cols; ++j) {
        Vec p[Operand::kPack]{};
        for (int64_t r = 0; r < Operand::kPack && i + r < count; ++r) {
          const Vec x = load(weights + (i + r) * kQueries + j * kLanes);
          p[r] = exp2_of((x - most[j]) * c);  // not x * c - most * c: the rounding of a large one is no small exponent
          if (masked) p[r] = x == all(kMasked) ? Vec{} : p[r];
          part[j] += p[r];
          if (call.keep) p[r] = block.kept(t + i + r, j) ? p[r] * call.kept_scale() : Vec{};
        }
        store_right<Operand>(weights + i / Operand::kPack * kQueries, j, p);
      }
    for (int j = 0; j < Cols; ++j) total[j] = total[j] * less[j] + part[j];
    if (moved)
      for (int64_t h = 0; h < size; ++h)
        for (int j = 0; j < Cols; ++j) {
          float* at = sums + h * kQueries + j * kLanes;
          store(at, load(at) * less[j]);
        }
    const float* left = rows_as_words<Operand>(values + t * size, count, size, value_words);
    product<Operand, Cols>(left, 1, size, weights, kQueries, sums, kQueries, size, words<Operand>(count), true);
  }
  for (int j = 0; j < Cols; ++j) {
    store(factor + j * kLanes, total[j] > Vec{} ? 1.0f / total[j] : Vec{});
    for (int i = 0; i < kLanes && j * kLanes + i < tokens; ++i) {
      float* row = rows + 2 * (of_query + j * kLanes + i);
      row[0] = most[j][i], row[1] = total[j][i] != 0.0f ? std::log2(total[j][i]) : 0.0f;
    }
  }
  transpose_out<Result>(sums, factor, tokens, size, out + of_query * size);
}

// Calls f<1> ... f<kWide> with as many vectors as there are queries for.
template <typename F>
void with_columns(int64_t tokens, F&& f) {
  if (tokens > 3 * kLanes && kWide > 3) return f(std::integral_constant<int, kWide>{});
  if (tokens > 2 * kLanes && kWide > 2) return f(std::integral_constant<int, kWide < 3 ? kWide : 3>{});
  if (tokens > kLanes) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

template <class Operand, class Result>
struct Gradients {
  const typename Result::Number* out;
  const float* rows;  // of a query: its largest logit, still to be scaled, and log2 of the sum of exp2 beside it
  const typename Operand::Number* g;
  typename Result::Number *dq, *dk, *dv;
};

// What a thread keeps of a head for the backward pass.
template <class Operand>
struct Backward {
  explicit Backward(const Geometry& call)
      : blocks((call.length + kQueries - 1) / kQueries),
        panel(words<Operand>(call.size) * kQueries),
        sum_panel(call.size * kQueries),
        narrow(Operand::kPack > 1),
        memory(blocks * (2 * panel + sum_panel + 3 * kQueries) + 2 * kKeys * kQueries +
               narrow * (3 * blocks * sum_panel + 2 * call.keys * call.size + kKeys * (kQueries + call.size))) {
    queries = memory.data, cotangents = queries + blocks * panel, sums = cotangents + blocks * panel;
    mean = sums + blocks * sum_panel, top = mean + blocks * kQueries, log_total = top + blocks * kQueries;
    weights = log_total + blocks * kQueries, dlogits = weights + kKeys * kQueries;
    if (!narrow) return;
    dlogit_words = dlogits + kKeys * kQueries, key_words = dlogit_words + kKeys * kQueries;
    query_words = key_words + kKeys * call.size, cotangent_words = query_words + blocks * sum_panel;
    dk = cotangent_words + blocks * sum_panel, dv = dk + call.keys * call.size;
  }
  int64_t blocks, panel, sum_panel, narrow;
  Memory memory;
  float *queries, *cotangents;  // blocks of [words of H][s]
  float* sums;                  // blocks of [H][s]
  float *mean, *top, *log_total, *weights, *dlogits;
  // Only where numbers are narrower than words: words of numbers that lie in different rows, and sums in float32.
  float *dlogit_words, *key_words, *query_words, *cotangent_words, *dk, *dv;
};

// Of a head's gradients, those that a block of queries and one of keys add. ``rows`` are words of queries and of cotangents, ``left``
// of keys; see rows_as_words().
template <class Operand, int Cols>
void backward_block(const Call<Operand>& call, Backward<Operand>& own, const Block<Cols>& block, const typename Operand::Number* keys,
                    const typename Operand::Number* values, const float* left, const float* query_rows, const float* cotangent_rows,
                    int64_t t, int64_t count, bool masked, float* dk, float* dv) {
  constexpr int kPack = Operand::kPack;
  const int64_t size = call.size, width = words<Operand>(size), index = block.first / kQueries;
  const int64_t tokens = std::min<int64_t>(kQueries, call.length - block.first), of_rows = block.first / kPack * size;
  const float c = call.log_scale();
  const int64_t lane = index * kQueries;
  const float *top = own.top + lane, *log_total = own.log_total + lane, *mean = own.mean + lane;
  float* right = kPack == 1 ? own.dlogits : own.dlogit_words;
  logits<Operand>(block, keys, own.queries + index * own.panel, t, count, masked, own.weights);
  product<Operand, Cols>(as_words<Operand>(values + t * size), width, 1, own.cotangents + index * own.panel, kQueries, own.dlogits,
                         kQueries, count, width, false);
  for (int64_t i = 0; i < count; i += kPack)
    for (int j = 0; j < Cols; ++j) {
      Vec ds[kPack]{};
      for (int64_t r = 0; r < kPack && i + r < count; ++r) {
        float *w = own.weights + (i + r) * kQueries, *d = own.dlogits + (i + r) * kQueries;
        const Vec x = load(w + j * kLanes);
        Vec p = exp2_of((x - load(top + j * kLanes)) * c - load(log_total + j * kLanes)), dp = load(d + j * kLanes);
        if (masked) p = x == all(kMasked) ? Vec{} : p;
        Vec kept = p;
        if (call.keep) {
          const Int stays = block.kept(t + i + r, j);
          kept = stays ? p * call.kept_scale() : Vec{};
          dp = stays ? dp * call.kept_scale() : Vec{};
        }
        ds[r] = p * (dp - load(mean + j * kLanes));
        store_left<Operand>(w, j, kept);
        store_left<Operand>(d, j, ds[r]);
      }
      if (kPack > 1) store_right<Operand>(right + i / kPack * kQueries, j, ds);
    }
  const int64_t summed = words<Operand>(tokens);
  wide_product<Operand>(own.weights, kQueries, 1, cotangent_rows + of_rows, size, dv + t * size, size, count, size, summed, true);
  wide_product<Operand>(own.dlogits, kQueries, 1, query_rows + of_rows, size, dk + t * size, size, count, size, summed, true);
  product<Operand, Cols>(left, 1, size, right, kQueries, own.sums + index * own.sum_panel, kQueries, size, words<Operand>(count), true);
}

template <class Operand, class Result>
void backward_head(const Call<Operand>& call, const Gradients<Operand, Result>& grads, Backward<Operand>& own, int64_t batch,
                   int64_t head, const typename Operand::Number* keys, const typename Operand::Number* values, float* dk, float* dv) {
  const int64_t size = call.size, width = words<Operand>(size), row = (batch * call.heads + head) * call.length;
  const auto *queries = call.q + row * size, *cotangents = grads.g + row * size;
  for (int64_t index = 0; index < own.blocks; ++index) {
    const int64_t first = index * kQueries, tokens = std::min<int64_t>(kQueries, call.length - first);
    transpose_in(as_words<Operand>(queries + first * size), tokens, width, own.queries + index * own.panel);
    transpose_in(as_words<Operand>(cotangents + first * size), tokens, width, own.cotangents + index * own.panel);
    for (int64_t s = 0; s < kQueries; ++s) {
      float* at = own.mean + first + s;
      *at = own.top[first + s] = own.log_total[first + s] = 0.0f;
      if (s >= tokens) continue;
      const float* found = grads.rows + 2 * (row + first + s);
      own.top[first + s] = found[0], own.log_total[first + s] = found[1];
      Vec sum{};
      const int64_t token = (first + s) * size;
      for (int64_t h = 0; h < size; h += kLanes)
        sum += Operand::read(cotangents + token + h) * Result::read(grads.out + row * size + token + h);
      for (int i = 0; i < kLanes; ++i) *at += sum[i];
    }
  }
  std::memset(own.sums, 0, 4 * own.blocks * own.sum_panel);
  const float* query_rows = rows_as_words<Operand>(queries, call.length, size, own.query_words);
  const float* cotangent_rows = rows_as_words<Operand>(cotangents, call.length, size, own.cotangent_words);
  for (int64_t t = 0; t < call.keys; t += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, call.keys - t);
    const float* left = rows_as_words<Operand>(keys + t * size, count, size, own.key_words);
    for (int64_t first = 0; first < call.length; first += kQueries)
      with_columns(call.length - first, [&](auto cols) {
        const Block<cols.value> block(call, batch, head, first);
        const auto sight = block.sight(t, count);
        if (sight == block.kNone) return;
        backward_block<Operand>(call, own, block, keys, values, left, query_rows, cotangent_rows, t, count, sight == block.kSome, dk,
                                dv);
      });
  }
  float scale[kQueries];
  std::fill_n(scale, kQueries, call.scale);
  for (int64_t index = 0; index < own.blocks; ++index) {
    const int64_t first = index * kQueries;
    transpose_out<Result>(own.sums + index * own.sum_panel, scale, std::min<int64_t>(kQueries, call.length - first), size,
                           grads.dq + (row + first) * size);
  }
}

template <class Operand, class Result>
void backward_group(const Call<Operand>& call, const Gradients<Operand, Result>& grads, Backward<Operand>& own, int64_t batch,
                    int64_t key_head) {
  const int64_t groups = call.heads / call.key_heads, count = call.keys * call.size;
  const int64_t of_key = (batch * call.key_heads + key_head) * count;
  float *dk = own.dk, *dv = own.dv;
  if constexpr (Result::kPack == 1) dk = grads.dk + of_key, dv = grads.dv + of_key;
  std::memset(dk, 0, 4 * count);
  std::memset(dv, 0, 4 * count);
  for (int64_t g = 0; g < groups; ++g)
    backward_head(call, grads, own, batch, key_head * groups + g, call.k + of_key, call.v + of_key, dk, dv);
  for (int64_t i = 0; i < count; i += kLanes) {
    Result::write(grads.dk + of_key + i, load(dk + i) * call.scale);
    if (Result::kPack > 1) Result::write(grads.dv + of_key + i, load(dv + i));
  }
}

using Ids = ffi::Buffer<ffi::S32>;
using Words = ffi::Buffer<ffi::U32>;
using F32 = ffi::Buffer<ffi::F32>;
using Sums = ffi::ResultBuffer<ffi::F32>;

// Arrays of numbers that are not operands' are rounded first, by all threads.
template <class Operand, class Outer>
class Rounded {
 public:
  using Number = typename Operand::Number;

  const Number* add(const typename Outer::Number* x, int64_t count) {
    if constexpr (Operand::kPack == Outer::kPack) {
      return x;
    } else {
      copies.push_back(std::make_unique<Memory>(words<Operand>(count)));
      jobs.push_back({x, reinterpret_cast<Number*>(copies.back()->data), count / kLanes});
      return jobs.back().to;
    }
  }
  void run(ffi::ThreadPool& pool) {
    if (jobs.empty()) return;
    const int64_t pieces = 2 * std::max<int64_t>(pool.num_threads(), 1);
    in_parallel(pool, static_cast<int64_t>(jobs.size()) * pieces, [this, pieces]() {
      return [this, pieces](int64_t index) {
        const Job& job = jobs[index / pieces];
        const int64_t piece = index % pieces;
        for (int64_t i = piece * job.vectors / pieces; i < (piece + 1) * job.vectors / pieces; ++i)
          Operand::write(job.to + i * kLanes, Outer::read(job.from + i * kLanes));
      };
    });
  }

 private:
  struct Job {
    const typename Outer::Number* from;
    Number* to;
    int64_t vectors;
  };
  std::vector<Job> jobs;
  std::vector<std::unique_ptr<Memory>> copies;
};

// Products of one type of numbers, of and into arrays of another.
template <class Operand, class Outer, ffi::DataType Type>
struct Pass {
  using In = ffi::Buffer<Type>;
  using Out = ffi::ResultBuffer<Type>;
  using Rounder = Rounded<Operand, Outer>;

  static const typename Outer::Number* of(const In& x) { return reinterpret_cast<const typename Outer::Number*>(x.typed_data()); }
  static typename Outer::Number* of(Out& x) { return reinterpret_cast<typename Outer::Number*>(x->typed_data()); }
  static const typename Operand::Number* operand(Rounder& rounder, const In& x) { return rounder.add(of(x), x.element_count()); }

  static Call<Operand> call_of(Rounder& rounder, In& q, In& k, In& v, Ids& query_ids, Ids& key_ids, Words& words, Words& rows,
                               int64_t causal, int64_t window, float scale, int64_t keep) {
    const auto dims = q.dimensions(), of_key = k.dimensions();
    const bool any = query_ids.element_count() > 0;
    const Geometry geometry{any ? query_ids.typed_data() : nullptr,
                            any ? key_ids.typed_data() : nullptr,
                            words.typed_data(),
                            rows.typed_data(),
                            dims[0],
                            dims[1],
                            of_key[1],
                            dims[2],
                            of_key[2],
                            dims[3],
                            causal != 0,
                            window,
                            scale,
                            static_cast<int32_t>(keep < 0 ? words.typed_data()[2] : keep)};
    return {geometry, operand(rounder, q), operand(rounder, k), operand(rounder, v)};
  }

  static bool fits(const Geometry& call) { return call.size % (kLanes * Operand::kPack) == 0; }
  static ffi::Error misfit() { return ffi::Error::InvalidArgument("head size is not a multiple of the vector width"); }

  // What both passes take first.
  static auto Inputs() {
    return ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .template Attr<int64_t>("causal")
        .template Attr<int64_t>("window")
        .template Attr<float>("scale")
        .template Attr<int64_t>("keep")
        .template Arg<In>()
        .template Arg<In>()
        .template Arg<In>()
        .template Arg<Ids>()
        .template Arg<Ids>()
        .template Arg<Words>()
        .template Arg<Words>();
  }
  static auto ForwardBinding() { return Inputs().template Ret<In>().template Ret<F32>(); }
  static auto BackwardBinding() {
    return Inputs().template Arg<In>().template Arg<F32>().template Arg<In>()
        .template Ret<In>().template Ret<In>().template Ret<In>();
  }

  static ffi::Error Forward(ffi::ThreadPool pool, int64_t causal, int64_t window, float scale, int64_t keep, In q, In k, In v,
                            Ids query_ids, Ids key_ids, Words words, Words rows, Out out, Sums sums) {
    Rounder rounder;
    const auto call = call_of(rounder, q, k, v, query_ids, key_ids, words, rows, causal, window, scale, keep);
    if (!fits(call)) return misfit();
    rounder.run(pool);
    const int64_t heads = call.batch * call.heads, blocks = (call.length + kQueries - 1) / kQueries;
    // Blocks of one head one after the other: its keys and values stay in the cache.
    const int64_t pieces = std::min<int64_t>(blocks, std::max<int64_t>(1, 4 * pool.num_threads() / std::max<int64_t>(heads, 1)));
    auto* to = of(out);
    float* of_rows = sums->typed_data();
    in_parallel(pool, heads * pieces, [&call, pieces, blocks, to, of_rows]() {
      const int64_t value_words = Operand::kPack > 1 ? kKeys * call.size : 0;
      auto memory = std::make_shared<Memory>((2 * call.size + kKeys + 1) * kQueries + value_words);
      return [=, &call](int64_t index) {
        const int64_t head = index / pieces, piece = index % pieces;
        for (int64_t i = piece * blocks / pieces; i < (piece + 1) * blocks / pieces; ++i)
          with_columns(call.length - i * kQueries, [&](auto cols) {
            forward_block<Operand, Outer, cols.value>(call, head / call.heads, head % call.heads, i * kQueries, memory->data, to,
                                                       of_rows);
          });
      };
    });
    return ffi::Error::Success();
  }

  static ffi::Error BackwardPass(ffi::ThreadPool pool, int64_t causal, int64_t window, float scale, int64_t keep, In q, In k, In v,
                                 Ids query_ids, Ids key_ids, Words words, Words rows, In out, F32 sums, In g, Out dq, Out dk, Out dv) {
    Rounder rounder;
    const auto call = call_of(rounder, q, k, v, query_ids, key_ids, words, rows, causal, window, scale, keep);
    if (!fits(call)) return misfit();
    const Gradients<Operand, Outer> grads{of(out), sums.typed_data(), operand(rounder, g), of(dq), of(dk), of(dv)};
    rounder.run(pool);
    in_parallel(pool, call.batch * call.key_heads, [&call, &grads]() {
      auto own = std::make_shared<Backward<Operand>>(call);
      return [own, &call, &grads](int64_t index) {
        backward_group(call, grads, *own, index / call.key_heads, index % call.key_heads);
      };
    });
    return ffi::Error::Success();
  }
};

using AllFloat32 = Pass<Float32, Float32, ffi::F32>;
#if defined(__AVX512BF16__)
using AllBFloat16 = Pass<BFloat16, BFloat16, ffi::BF16>;
using OfBFloat16 = Pass<BFloat16, Float32, ffi::F32>;
#endif

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_forward, AllFloat32::Forward, AllFloat32::ForwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_backward, AllFloat32::BackwardPass, AllFloat32::BackwardBinding());
#if defined(__AVX512BF16__)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_forward_bfloat16, AllBFloat16::Forward, AllBFloat16::ForwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_backward_bfloat16, AllBFloat16::BackwardPass, AllBFloat16::BackwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_forward_bfloat16_float32, OfBFloat16::Forward, OfBFloat16::ForwardBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_backward_bfloat16_float32, OfBFloat16::BackwardPass, OfBFloat16::BackwardBinding());
#endif
