// Sums over poles at many nodes, which Cauchy matrices and S4's spectra are made of:
//
//   sum[q] = sum over n of p[n, q] / d[n]    and, in pairs,    + conj(p[n, q]) / d'[n]
//
// with d = z - w and d' = z - conj(w), or S4's d = i z - c w, whose weights c belong to the nodes. One denominator
// serves all numerators q. With 1 / d = x - i y, a pair adds to a sum's parts (re p, im p) times a real matrix,
//
//   re: x + x',  y - y'      im: -y - y',  x - x'
//
// through which the gradients go back. Nodes lie in the lanes.
#pragma once
#include "core/cpu/complex.h"
#include "core/cpu/scratch.h"

namespace packseq::PACKSEQ_ISA {

constexpr int kNodes = 512;   // of one block: what is added up in the type of the tensors goes to double after these
constexpr int kPoleRun = 32;  // poles that are summed before they are added to the rest

template <class Real_, bool kConjugate_, bool kWeighted_>
struct PoleForm {
  using Real = Real_;
  static constexpr bool kConjugate = kConjugate_, kWeighted = kWeighted_;
};

// Rows of kNodes; nodes beyond `count` repeat the last one, up to a whole number of vectors.
template <class Real>
struct Nodes {
  int64_t count;
  Real *re, *im, *weight;

  explicit Nodes(Scratch& s) : re(s.take<Real>(kNodes)), im(s.take<Real>(kNodes)), weight(s.take<Real>(kNodes)) {}
  int64_t padded() const { return round_up(count, kLanes<Real>); }
  void pad() const {
    for (int64_t i = count; i < padded(); ++i) {
      re[i] = re[count - 1], im[i] = im[count - 1], weight[i] = weight[count - 1];
    }
  }
};

template <class Form, class V = Vec<typename Form::Real>>
struct PoleTerms {
  V x, y, x2, y2;

  PACKSEQ_INLINE PoleTerms(const Nodes<typename Form::Real>& nodes, int64_t i, const typename Form::Real* w) {
    V re, im = load(nodes.im + i), shift = w[1] - V{};
    if constexpr (Form::kWeighted) {
      const V c = load(nodes.weight + i);
      re = -(c * w[0]), shift = c * w[1];
    } else {
      re = load(nodes.re + i) - w[0];
    }
    const V below = im - shift, r = 1 / (re * re + below * below);
    x = re * r, y = below * r;
    if constexpr (Form::kConjugate) {
      const V above = im + shift, r2 = 1 / (re * re + above * above);
      x2 = re * r2, y2 = above * r2;
    }
  }

  PACKSEQ_INLINE V re_re() const { return Form::kConjugate ? x + x2 : x; }
  PACKSEQ_INLINE V re_im() const { return Form::kConjugate ? y - y2 : y; }
  PACKSEQ_INLINE V im_re() const { return Form::kConjugate ? -(y + y2) : -y; }
  PACKSEQ_INLINE V im_im() const { return Form::kConjugate ? x - x2 : x; }
};

// f<how many>(the first of them) for all sums, a few at a time.
template <class F>
PACKSEQ_INLINE void for_sums(int count, const F& f) {
  int q = 0;
  for (; q + 4 <= count; q += 4) f.template operator()<4>(q);
  if (count - q == 3) f.template operator()<3>(q);
  if (count - q == 2) f.template operator()<2>(q);
  if (count - q == 1) f.template operator()<1>(q);
}

// Poles and numerators are pairs; `stride` numbers from one pole's numerators to the next's. A sum is two rows of
// kNodes: real parts, imaginary parts.
template <class Form, int kSums, class Real = typename Form::Real>
__attribute__((noinline)) void add_poles(const Nodes<Real>& nodes, const Real* poles, int count, const Real* numerators,
                                         int64_t stride, Real* sums) {
  const int64_t padded = nodes.padded();
  for (int64_t i = 0; i < padded; i += kLanes<Real>) {
    Complex<Vec<Real>> sum[kSums] = {};
    const Real* p = numerators;
    for (int n = 0; n < count; ++n, p += stride) {
      const PoleTerms<Form> terms(nodes, i, poles + 2 * n);
      const Vec<Real> re_re = terms.re_re(), re_im = terms.re_im(), im_re = terms.im_re(), im_im = terms.im_im();
      PACKSEQ_UNROLL
      for (int q = 0; q < kSums; ++q) {
        sum[q].re += p[2 * q] * re_re + p[2 * q + 1] * re_im;
        sum[q].im += p[2 * q] * im_re + p[2 * q + 1] * im_im;
      }
    }
    PACKSEQ_UNROLL
    for (int q = 0; q < kSums; ++q) {
      Real *const re = sums + 2 * q * kNodes + i, *const im = re + kNodes;
      store_complex(re, im, load_complex(re, im) + sum[q]);
    }
  }
}

template <class Form, class Real = typename Form::Real>
inline void pole_sums(const Nodes<Real>& nodes, const Real* poles, int count, const Real* numerators, int sums_count,
                      Real* sums) {
  __builtin_memset(sums, 0, int64_t(sums_count) * 2 * kNodes * sizeof(Real));
  const int64_t stride = 2 * sums_count;
  for (int n = 0; n < count; n += kPoleRun) {
    const int run = int(least(kPoleRun, count - n));
    for_sums(sums_count, [&]<int kSums>(int q) {
      add_poles<Form, kSums>(nodes, poles + 2 * n, run, numerators + n * stride + 2 * q, stride, sums + 2 * q * kNodes);
    });
  }
}

// One pole's gradients from the sums' at the nodes of a block: those of kSums numerators, then the pole's own, pairs
// all. The nodes' are added to dz, two rows.
template <class Form, int kSums, bool kNodesToo, class Real = typename Form::Real>
__attribute__((noinline)) void pole_gradients(const Nodes<Real>& nodes, const Real* pole, const Real* p,
                                              const Real* dsums, Real* gradients, Real* dz) {
  using V = Vec<Real>;
  const int64_t padded = nodes.padded();
  Complex<V> dp[kSums] = {}, dw = {};
  for (int64_t i = 0; i < padded; i += kLanes<Real>) {
    const PoleTerms<Form> terms(nodes, i, pole);
    const V re_re = terms.re_re(), re_im = terms.re_im(), im_re = terms.im_re(), im_im = terms.im_im();
    V dre_re{}, dre_im{}, dim_re{}, dim_im{};
    PACKSEQ_UNROLL
    for (int q = 0; q < kSums; ++q) {
      const Complex<V> d = load_complex(dsums + 2 * q * kNodes + i, dsums + (2 * q + 1) * kNodes + i);
      dp[q].re += re_re * d.re + im_re * d.im;
      dp[q].im += re_im * d.re + im_im * d.im;
      dre_re += p[2 * q] * d.re, dre_im += p[2 * q + 1] * d.re;
      dim_re += p[2 * q] * d.im, dim_im += p[2 * q + 1] * d.im;
    }
    // Through 1 / d, whose derivative is -1 / d^2.
    const Complex<V> r = {terms.x, terms.y};
    Complex<V> below = r * r * Complex<V>{dre_re + dim_im, dim_re - dre_im}, all = below;
    if constexpr (Form::kConjugate) {
      const Complex<V> r2 = {terms.x2, terms.y2}, above = r2 * r2 * Complex<V>{dre_re - dim_im, dre_im + dim_re};
      all = below + above;
      below = {all.re, below.im - above.im};
    }
    if constexpr (Form::kWeighted) below = scaled(below, load(nodes.weight + i));
    dw = dw + below;
    if constexpr (kNodesToo) store_complex(dz + i, dz + kNodes + i, load_complex(dz + i, dz + kNodes + i) - all);
  }
  PACKSEQ_UNROLL
  for (int q = 0; q < kSums; ++q) {
    gradients[2 * q] = sum<Real>(dp[q].re);
    gradients[2 * q + 1] = sum<Real>(dp[q].im);
  }
  gradients[2 * kSums] = sum<Real>(dw.re);
  gradients[2 * kSums + 1] = sum<Real>(dw.im);
}

// Adds a block's part to the gradients of the numerators, [poles, sums], of the poles, and where dz is given of the
// nodes. `rows` are two of kNodes.
template <class Form, class Real = typename Form::Real>
inline void pole_sums_backward(const Nodes<Real>& nodes, const Real* poles, int count, const Real* numerators,
                               int sums_count, const Real* dsums, double* dnumerators, double* dpoles, double* dz,
                               typename Form::Real* rows) {
  const int64_t stride = 2 * sums_count;
  for (int n = 0; n < count; n += kPoleRun) {
    const int end = int(least(n + kPoleRun, count));
    if (dz) __builtin_memset(rows, 0, 2 * kNodes * sizeof(Real));
    for (int pole = n; pole < end; ++pole) {
      for_sums(sums_count, [&]<int kSums>(int q) {
        Real gradients[2 * kSums + 2];
        const Real *const w = poles + 2 * pole, *const p = numerators + pole * stride + 2 * q;
        const Real* const d = dsums + 2 * q * kNodes;
        if (dz) {
          pole_gradients<Form, kSums, true>(nodes, w, p, d, gradients, rows);
        } else {
          pole_gradients<Form, kSums, false>(nodes, w, p, d, gradients, rows);
        }
        for (int i = 0; i < 2 * kSums; ++i) dnumerators[pole * stride + 2 * q + i] += gradients[i];
        dpoles[2 * pole] += gradients[2 * kSums];
        dpoles[2 * pole + 1] += gradients[2 * kSums + 1];
      });
    }
    for (int64_t i = 0; dz && i < nodes.count; ++i) dz[2 * i] += rows[i], dz[2 * i + 1] += rows[kNodes + i];
  }
}

}  // namespace packseq::PACKSEQ_ISA
