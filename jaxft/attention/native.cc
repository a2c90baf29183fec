// Attention for CPUs: softmax(scale q k^T) v and its gradients, float32, called by XLA (jaxft/attention/native.py).
//
// A block of queries lies across the lanes of vector registers, keys follow one another: logits are made transposed, [t][s]. Then
// maxima and sums are one number per lane, and of the seven products none needs keys or values in another order than they have
// (only queries and cotangents are transposed, once). A block of logits never leaves the core's own caches; the softmax is
// a running one (Dao et al. 2022). Vectors are those of the GCC and Clang extension, as wide as the machine's.
//
// Dims: B rows, N query heads, K key heads, S tokens, H head size. s counts queries, t keys.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kKeys = 128;  // of a block, at most
constexpr float kMasked = -1e30f;  // finite: no row, not even one that may see nothing, makes a nan

uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// What is the same for all heads.
struct Call {
  const float *q, *k, *v;
  const int32_t* query_ids;  // [B, S]; null where every token may see every other
  const int32_t* key_ids;
  const uint32_t* words;  // of the dropout's key
  const uint32_t* rows;   // [B, N], its rows
  int64_t batch, heads, key_heads, length, size;
  bool causal;
  int64_t window;  // 0: none
  float scale;
  int32_t keep;  // of 65536; 0: no dropout

  float log_scale() const { return scale * 1.44269504f; }
  float kept_scale() const { return 65536.0f / static_cast<float>(keep); }
};

// A block of queries of one head: who sees whom, and what dropout keeps.
template <int Cols>
struct Block {
  Block(const Call& call, int64_t batch, int64_t head, int64_t first)
      : call(call), ids(call.key_ids ? call.key_ids + batch * call.length : nullptr), first(first) {
    const int64_t last = std::min(first + Cols * kLanes, call.length) - 1;
    const int64_t reach = call.window ? call.window - 1 : call.length;
    for (int j = 0; j < Cols; ++j)
      for (int i = 0; i < kLanes; ++i) {
        // Lanes beyond the row's end follow its last token: they see something, and no one uses it.
        const int64_t s = std::min(first + j * kLanes + i, last);
        place[j][i] = static_cast<int32_t>(s);
        low[j][i] = static_cast<int32_t>(std::max<int64_t>(s - reach, 0));
        high[j][i] = static_cast<int32_t>(call.causal ? s : std::min(s + reach, call.length - 1));
        id[j][i] = ids ? call.query_ids[batch * call.length + s] : 1;
      }
    least_low = low[0][0], most_low = low[Cols - 1][kLanes - 1];
    least_high = high[0][0], most_high = high[Cols - 1][kLanes - 1];
    if (ids) {
      least_id = most_id = id[0][0];
      for (int j = 0; j < Cols; ++j)
        for (int i = 0; i < kLanes; ++i) least_id = std::min(least_id, id[j][i]), most_id = std::max(most_id, id[j][i]);
    }
    if (call.keep) {
      const uint32_t row = call.rows[batch * call.heads + head];
      a = lowbias32(lowbias32(row ^ call.words[0]) ^ call.words[1]);
      b = lowbias32(a + call.words[0]);
    }
  }

  // Whether some query may see some of these keys, and whether every one sees all.
  enum Sight { kNone, kSome, kAll };
  Sight sight(int64_t t, int64_t count) const {
    if (t > most_high || t + count <= least_low) return kNone;
    bool whole = t >= most_low && t + count - 1 <= least_high;
    if (!ids) return whole ? kAll : kSome;
    const auto [least, most] = std::minmax_element(ids + t, ids + t + count);
    if (*least > most_id || *most < least_id || *most == 0) return kNone;
    whole = whole && *least == *most && least_id == most_id && *least == least_id;
    return whole ? kAll : kSome;
  }

  Int allowed(int64_t t, int j) const {
    const int32_t at = static_cast<int32_t>(t);
    const Int near = (low[j] <= at) & (high[j] >= at);
    if (!ids) return near;
    return ids[t] == 0 ? Int{} : near & (id[j] == ids[t]);
  }

  Int kept(int64_t t, int j) const {  // jaxft/layers/bits.py
    constexpr uint32_t kGolden = 0x9E3779B9u;
    Word x = (Word)place[j] * (static_cast<uint32_t>(call.length) * kGolden) + (static_cast<uint32_t>(t) * kGolden + a);
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ b) * 0x846CA68Bu;
    return (Int)(x >> 16) < call.keep;
  }

  const Call& call;
  const int32_t* ids;
  int64_t first;
  Int place[Cols], low[Cols], high[Cols], id[Cols];
  int64_t least_low, most_low, least_high, most_high;
  int32_t least_id = 1, most_id = 1;
  uint32_t a = 0, b = 0;
};

// Logits, still to be scaled, of keys t ... t + count - 1 as [t][s], kMasked where a query may not see a key.
template <int Cols>
void logits(const Block<Cols>& block, const float* keys, const float* queries, int64_t t, int64_t count, bool masked, float* out) {
  const int64_t size = block.call.size;
  product<Cols>(keys + t * size, size, 1, queries, kQueries, out, kQueries, count, size, false);
  if (!masked) return;
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < Cols; ++j) {
      float* at = out + i * kQueries + j * kLanes;
      store(at, block.allowed(t + i, j) ? load(at) : all(kMasked));
    }
}

template <int Cols>
void forward_block(const Call& call, int64_t batch, int64_t head, int64_t first, float* scratch, float* out, float* lse) {
  using B = Block<Cols>;
  const B block(call, batch, head, first);
  const int64_t size = call.size, tokens = std::min<int64_t>(kQueries, call.length - first);
  const int64_t of_query = (batch * call.heads + head) * call.length + first;
  const int64_t of_key = (batch * call.key_heads + head / (call.heads / call.key_heads)) * call.length * size;
  const float *keys = call.k + of_key, *values = call.v + of_key, c = call.log_scale();
  float *queries = scratch, *sums = queries + size * kQueries, *weights = sums + size * kQueries;
  float* factor = weights + kKeys * kQueries;
  transpose_in(call.q + of_query * size, tokens, size, queries);
  std::memset(sums, 0, 4 * size * kQueries);
  Vec most[Cols], total[Cols];
  for (int j = 0; j < Cols; ++j) most[j] = all(kMasked), total[j] = Vec{};
  for (int64_t t = 0; t < call.length; t += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, call.length - t);
    const auto sight = block.sight(t, count);
    if (sight == B::kNone) continue;
    const bool masked = sight == B::kSome;
    logits<Cols>(block, keys, queries, t, count, masked, weights);
    Vec highest[Cols];
    for (int j = 0; j < Cols; ++j) highest[j] = most[j];
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < Cols; ++j) highest[j] = larger(highest[j], load(weights + i * kQueries + j * kLanes));
    Vec shift[Cols], less[Cols], part[Cols];
    bool moved = false;
    for (int j = 0; j < Cols; ++j) {
      less[j] = exp2_of((most[j] - highest[j]) * c);
      for (int i = 0; i < kLanes; ++i) moved |= highest[j][i] != most[j][i];
      shift[j] = highest[j] * c;
      most[j] = highest[j];
      part[j] = Vec{};
    }
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < Cols; ++j) {
        float* at = weights + i * kQueries + j * kLanes;
        const Vec x = load(at);
        Vec p = exp2_of(x * c - shift[j]);
        if (masked) p = x < all(0.5f * kMasked) ? Vec{} : p;  // not where x is nan
        part[j] += p;
        if (call.keep) p = block.kept(t + i, j) ? p * call.kept_scale() : Vec{};
        store(at, p);
      }
    for (int j = 0; j < Cols; ++j) total[j] = total[j] * less[j] + part[j];
    if (moved)
      for (int64_t h = 0; h < size; ++h)
        for (int j = 0; j < Cols; ++j) {
          float* at = sums + h * kQueries + j * kLanes;
          store(at, load(at) * less[j]);
        }
    product<Cols>(values + t * size, 1, size, weights, kQueries, sums, kQueries, size, count, true);
  }
  for (int j = 0; j < Cols; ++j) {
    store(factor + j * kLanes, total[j] > Vec{} ? 1.0f / total[j] : Vec{});
    for (int i = 0; i < kLanes && j * kLanes + i < tokens; ++i)
      lse[of_query + j * kLanes + i] = total[j][i] > 0.0f ? most[j][i] * c + std::log2(total[j][i]) : 0.0f;
  }
  transpose_out(sums, factor, tokens, size, out + of_query * size);
}

// Calls f<1> ... f<kWide> with as many vectors as there are queries for.
template <typename F>
void with_columns(int64_t tokens, F&& f) {
  if (tokens > 3 * kLanes && kWide > 3) return f(std::integral_constant<int, kWide>{});
  if (tokens > 2 * kLanes && kWide > 2) return f(std::integral_constant<int, kWide < 3 ? kWide : 3>{});
  if (tokens > kLanes) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

struct Gradients {
  const float *out, *lse, *g;
  float *dq, *dk, *dv;
};

// What a head's backward pass keeps per thread.
struct Backward {
  Backward(const Call& call)
      : blocks((call.length + kQueries - 1) / kQueries),
        panel(call.size * kQueries),
        memory(blocks * (3 * panel + 2 * kQueries) + 2 * kKeys * kQueries) {
    queries = memory.data, cotangents = queries + blocks * panel, sums = cotangents + blocks * panel;
    mean = sums + blocks * panel, lse = mean + blocks * kQueries;
    weights = lse + blocks * kQueries, dlogits = weights + kKeys * kQueries;
  }
  int64_t blocks, panel;
  Memory memory;
  float *queries, *cotangents, *sums;  // blocks of [H][s]
  float *mean, *lse, *weights, *dlogits;
};

template <int Cols>
void backward_block(const Call& call, const Gradients& grads, Backward& own, const Block<Cols>& block, int64_t of_query,
                    const float* keys, const float* values, int64_t t, int64_t count, bool masked, float* dk, float* dv) {
  const int64_t size = call.size, index = block.first / kQueries;
  const int64_t tokens = std::min<int64_t>(kQueries, call.length - block.first);
  const float c = call.log_scale();
  const float *lse = own.lse + index * kQueries, *mean = own.mean + index * kQueries;
  logits<Cols>(block, keys, own.queries + index * own.panel, t, count, masked, own.weights);
  product<Cols>(values + t * size, size, 1, own.cotangents + index * own.panel, kQueries, own.dlogits, kQueries, count, size, false);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < Cols; ++j) {
      float *w = own.weights + i * kQueries + j * kLanes, *d = own.dlogits + i * kQueries + j * kLanes;
      const Vec x = load(w);
      Vec p = exp2_of(x * c - load(lse + j * kLanes)), dp = load(d);
      if (masked) p = x < all(0.5f * kMasked) ? Vec{} : p;  // not where x is nan
      Vec kept = p;
      if (call.keep) {
        const Int stays = block.kept(t + i, j);
        kept = stays ? p * call.kept_scale() : Vec{};
        dp = stays ? dp * call.kept_scale() : Vec{};
      }
      store(w, kept);
      store(d, p * (dp - load(mean + j * kLanes)));
    }
  wide_product(own.weights, kQueries, 1, grads.g + of_query * size, size, dv + t * size, size, count, size, tokens, true);
  wide_product(own.dlogits, kQueries, 1, call.q + of_query * size, size, dk + t * size, size, count, size, tokens, true);
  product<Cols>(keys + t * size, 1, size, own.dlogits, kQueries, own.sums + index * own.panel, kQueries, size, count, true);
}

void backward_head(const Call& call, const Gradients& grads, Backward& own, int64_t batch, int64_t head, const float* keys,
                   const float* values, float* dk, float* dv) {
  const int64_t size = call.size, row = (batch * call.heads + head) * call.length;
  for (int64_t index = 0; index < own.blocks; ++index) {
    const int64_t first = index * kQueries, tokens = std::min<int64_t>(kQueries, call.length - first);
    transpose_in(call.q + (row + first) * size, tokens, size, own.queries + index * own.panel);
    transpose_in(grads.g + (row + first) * size, tokens, size, own.cotangents + index * own.panel);
    for (int64_t s = 0; s < kQueries; ++s) {
      float* at = own.mean + first + s;
      *at = 0.0f, own.lse[first + s] = s < tokens ? grads.lse[row + first + s] : 0.0f;
      if (s >= tokens) continue;
      Vec sum{};
      const int64_t token = (row + first + s) * size;
      for (int64_t h = 0; h < size; h += kLanes) sum += load(grads.g + token + h) * load(grads.out + token + h);
      for (int i = 0; i < kLanes; ++i) *at += sum[i];
    }
  }
  std::memset(own.sums, 0, 4 * own.blocks * own.panel);
  for (int64_t t = 0; t < call.length; t += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, call.length - t);
    for (int64_t first = 0; first < call.length; first += kQueries)
      with_columns(call.length - first, [&](auto cols) {
        const Block<cols.value> block(call, batch, head, first);
        const auto sight = block.sight(t, count);
        if (sight == block.kNone) return;
        backward_block<cols.value>(call, grads, own, block, row + first, keys, values, t, count, sight == block.kSome, dk, dv);
      });
  }
  float scale[kQueries];
  std::fill_n(scale, kQueries, call.scale);
  for (int64_t index = 0; index < own.blocks; ++index) {
    const int64_t first = index * kQueries;
    transpose_out(own.sums + index * own.panel, scale, std::min<int64_t>(kQueries, call.length - first), size,
                  grads.dq + (row + first) * size);
  }
}

void backward_group(const Call& call, const Gradients& grads, Backward& own, int64_t batch, int64_t key_head) {
  const int64_t groups = call.heads / call.key_heads, count = call.length * call.size;
  const int64_t of_key = (batch * call.key_heads + key_head) * count;
  float *dk = grads.dk + of_key, *dv = grads.dv + of_key;
  std::memset(dk, 0, 4 * count);
  std::memset(dv, 0, 4 * count);
  for (int64_t g = 0; g < groups; ++g)
    backward_head(call, grads, own, batch, key_head * groups + g, call.k + of_key, call.v + of_key, dk, dv);
  for (int64_t i = 0; i < count; i += kLanes) store(dk + i, load(dk + i) * call.scale);
}

// Runs f(0) ... f(count - 1), on the caller's thread and those of XLA's pool that come in time. The caller waits only for tasks
// that some thread has begun, so that a pool whose threads all wait here is no deadlock.
template <typename Make>
void in_parallel(ffi::ThreadPool& pool, int64_t count, Make make) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, make]() {
    int64_t index = shared->next.fetch_add(1);
    if (index >= count) return;  // too late: what ``make`` refers to may be gone
    auto task = make();
    int64_t mine = 0;
    for (; index < count; index = shared->next.fetch_add(1), ++mine) task(index);
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += mine;
    if (shared->done == count) shared->all_done.notify_all();
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using Result = ffi::ResultBuffer<ffi::F32>;

Call call_of(F32& q, F32& k, F32& v, S32& query_ids, S32& key_ids, U32& words, U32& rows, int64_t causal, int64_t window,
             float scale, int64_t keep) {
  const auto dims = q.dimensions(), of_key = k.dimensions();
  const bool any = query_ids.element_count() > 0;
  return Call{q.typed_data(),
              k.typed_data(),
              v.typed_data(),
              any ? query_ids.typed_data() : nullptr,
              any ? key_ids.typed_data() : nullptr,
              words.typed_data(),
              rows.typed_data(),
              dims[0],
              dims[1],
              of_key[1],
              dims[2],
              dims[3],
              causal != 0,
              window,
              scale,
              static_cast<int32_t>(keep)};
}

// What both passes take first.
auto Inputs() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("causal")
      .Attr<int64_t>("window")
      .Attr<float>("scale")
      .Attr<int64_t>("keep")
      .Arg<F32>()
      .Arg<F32>()
      .Arg<F32>()
      .Arg<S32>()
      .Arg<S32>()
      .Arg<U32>()
      .Arg<U32>();
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t causal, int64_t window, float scale, int64_t keep, F32 q, F32 k, F32 v,
                   S32 query_ids, S32 key_ids, U32 words, U32 rows, Result out, Result lse) {
  const Call call = call_of(q, k, v, query_ids, key_ids, words, rows, causal, window, scale, keep);
  if (call.size % kLanes) return ffi::Error::InvalidArgument("head size is not a multiple of the vector width");
  const int64_t heads = call.batch * call.heads, blocks = (call.length + kQueries - 1) / kQueries;
  // Blocks of one head one after the other: its keys and values stay in the cache.
  const int64_t pieces = std::min<int64_t>(blocks, std::max<int64_t>(1, 4 * pool.num_threads() / std::max<int64_t>(heads, 1)));
  float *to = out->typed_data(), *sums = lse->typed_data();
  in_parallel(pool, heads * pieces, [&call, pieces, blocks, to, sums]() {
    auto memory = std::make_shared<Memory>((2 * call.size + kKeys + 1) * kQueries);
    return [=, &call](int64_t index) {
      const int64_t head = index / pieces, piece = index % pieces;
      for (int64_t i = piece * blocks / pieces; i < (piece + 1) * blocks / pieces; ++i)
        with_columns(call.length - i * kQueries, [&](auto cols) {
          forward_block<cols.value>(call, head / call.heads, head % call.heads, i * kQueries, memory->data, to, sums);
        });
    };
  });
  return ffi::Error::Success();
}

ffi::Error BackwardPass(ffi::ThreadPool pool, int64_t causal, int64_t window, float scale, int64_t keep, F32 q, F32 k, F32 v,
                        S32 query_ids, S32 key_ids, U32 words, U32 rows, F32 out, F32 lse, F32 g, Result dq, Result dk, Result dv) {
  const Call call = call_of(q, k, v, query_ids, key_ids, words, rows, causal, window, scale, keep);
  if (call.size % kLanes) return ffi::Error::InvalidArgument("head size is not a multiple of the vector width");
  const Gradients grads{out.typed_data(), lse.typed_data(), g.typed_data(), dq->typed_data(), dk->typed_data(), dv->typed_data()};
  in_parallel(pool, call.batch * call.key_heads, [&call, &grads]() {
    auto own = std::make_shared<Backward>(call);
    return [own, &call, &grads](int64_t index) {
      backward_group(call, grads, *own, index / call.key_heads, index % call.key_heads);
    };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_forward, Forward, Inputs().Ret<F32>().Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxft_attention_backward, BackwardPass,
                              Inputs().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>());
