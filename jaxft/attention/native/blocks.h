// Who sees whom in a block of queries, and what dropout keeps of it; for native.cc.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// What is the same for all heads, but for what is multiplied.
struct Geometry {
  const int32_t* query_ids;  // [B, S]; null where every token may see every other
  const int32_t* key_ids;    // [B, T]
  const uint32_t* words;  // of the dropout's key, and its threshold where that is an argument
  const uint32_t* rows;   // [B, N], its rows
  int64_t batch, heads, key_heads, length, keys, size;  // B, N, K, S, T, H
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
  Block(const Geometry& call, int64_t batch, int64_t head, int64_t first)
      : call(call), ids(call.key_ids ? call.key_ids + batch * call.keys : nullptr), first(first) {
    const int64_t last = std::min(first + Cols * kLanes, call.length) - 1;
    const int64_t reach = call.window ? call.window - 1 : call.length + call.keys;
    for (int j = 0; j < Cols; ++j)
      for (int i = 0; i < kLanes; ++i) {
        // Lanes beyond the row's end follow its last token: they see something, and no one uses it.
        const int64_t s = std::min(first + j * kLanes + i, last);
        place[j][i] = static_cast<int32_t>(s);
        low[j][i] = static_cast<int32_t>(std::max<int64_t>(s - reach, 0));
        high[j][i] = static_cast<int32_t>(call.causal ? s : std::min(s + reach, call.keys - 1));
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
    Word x = (Word)place[j] * (static_cast<uint32_t>(call.keys) * kGolden) + (static_cast<uint32_t>(t) * kGolden + a);
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ b) * 0x846CA68Bu;
    return (Int)(x >> 16) < call.keep;
  }

  const Geometry& call;
  const int32_t* ids;
  int64_t first;
  Int place[Cols], low[Cols], high[Cols], id[Cols];
  int64_t least_low, most_low, least_high, most_high;
  int32_t least_id = 1, most_id = 1;
  uint32_t a = 0, b = 0;
};

}  // namespace
