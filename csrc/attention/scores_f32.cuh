// Scores to float32's full accuracy, in units of the natural logarithm as the formula has them.
#pragma once
#include <cmath>

#include "attention/scores.cuh"

namespace packseq {

class ScoresF32 {
 public:
  __device__ ScoresF32(const AttentionProblem& p, int head)
      : scale_(float(p.softcap != 0 ? p.scale / p.softcap : p.scale)), cap_(float(p.softcap)) {
    set_head(p, head);
  }

  __device__ void set_head(const AttentionProblem& p, int head) {
    slope_ = p.alibi_slopes ? static_cast<const float*>(p.alibi_slopes)[head] : 0.0f;
  }

  __device__ bool capped() const { return cap_ != 0; }

  // From products q . k of a block of queries and one of keys to scores, -inf where a key is not visible. A thread's
  // place (i, j) in the tile stands for query row(i) and key col(j), or the other way round if kTransposed.
  // With a softcap, `slopes`, a tile of scores or null, gets the softcap's derivative.
  template <class Tile, bool kTransposed>
  __device__ __forceinline__ void transform(typename Tile::Scores& s, const Mask& mask, int32_t first_query,
                                            int32_t first_key, float* slopes) const {
    if (cap_ == 0) {
      Tile::for_each([&](int i, int j) { s[i][j] *= scale_; });
    } else {
      Tile::for_each([&](int i, int j) {
        const float x = tanhf(s[i][j] * scale_);
        if (slopes) Tile::score(slopes, i, j) = fmaf(-x, x, 1.0f);
        s[i][j] = x * cap_;
      });
    }
    if (slope_ != 0) {
      const int32_t level = first_query + mask.shift - first_key;
      Tile::for_each([&](int i, int j) {
        const int32_t ahead = kTransposed ? Tile::col(j) - Tile::row(i) : Tile::row(i) - Tile::col(j);
        s[i][j] = fmaf(-slope_, float(abs(level + ahead)), s[i][j]);
      });
    }
    const int32_t end = first_query + min(Tile::kSize, mask.len_q - first_query);
    if (mask.len_k - first_key >= Tile::kSize &&
        VisibleKeys(mask, first_query, end).hold(first_key, first_key + Tile::kSize)) {
      return;
    }
#pragma unroll
    for (int a = 0; a < (kTransposed ? 4 : Tile::kRows); ++a) {
      const int32_t query = first_query + (kTransposed ? Tile::col(a) : Tile::row(a));
      const VisibleKeys keys(mask, query, query + 1);
#pragma unroll
      for (int b = 0; b < (kTransposed ? Tile::kRows : 4); ++b) {
        float& x = kTransposed ? s[b][a] : s[a][b];
        x = keys.hold(first_key + (kTransposed ? Tile::row(b) : Tile::col(b))) ? x : -INFINITY;
      }
    }
  }

 private:
  float scale_, cap_, slope_;
};

// exp(x) with a relative error that grows with |x| by a rounding only.
__device__ __forceinline__ float exp_accurate(float x) { return exp2_approx(x * kLog2e); }

}  // namespace packseq
