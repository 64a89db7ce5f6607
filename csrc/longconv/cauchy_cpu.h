// Cauchy matrices times vectors: a block of nodes at a time, and for it a few of the numerators that share poles.
#pragma once
#include "longconv/filters_kernels_cpu.h"
#include "longconv/pole_sums_cpu.h"

namespace packseq::PACKSEQ_ISA {

template <class Real, bool kConjugate>
class CauchySum {
  using Form = PoleForm<Real, kConjugate, false>;
  static constexpr int kGroups = 8;  // at a time

 public:
  CauchySum(const CauchyProblem& p, Scratch& s) : p_(p), nodes_(s) {
    numerators_ = s.take<Real>(2 * kGroups * int64_t(p.poles));
    sums_ = s.take<Real>(2 * kGroups * int64_t{kNodes});
    rows_ = s.take<Real>(2 * kNodes);
    gradients_ = s.take<double>(2 * kGroups * int64_t(p.poles));
  }

  void forward(void* out, const FilterPart& part) {
    for_blocks(part, [&](int64_t first) {
      for_groups(part.row, [&](int64_t group, int count) {
        pole_sums<Form>(nodes_, poles(part.row), p_.poles, numerators_, count, sums_);
        for (int q = 0; q < count; ++q) {
          const Real* const re = sums_ + 2 * q * kNodes;
          merge(re, re + kNodes, nodes_.count, static_cast<Real*>(out) + node(group + q, part.row, first));
        }
      });
    });
  }

  // dz: pairs of all nodes, may be nullptr
  void backward(const void* dout, const FilterPart& part, double* sums, double* dz) {
    double *const dw = sums, *const dv = sums + 2 * p_.poles;
    for_blocks(part, [&](int64_t first) {
      for_groups(part.row, [&](int64_t group, int count) {
        for (int q = 0; q < count; ++q) {
          Real* const re = sums_ + 2 * q * kNodes;
          __builtin_memset(re, 0, 2 * kNodes * sizeof(Real));
          split(static_cast<const Real*>(dout) + node(group + q, part.row, first), nodes_.count, re, re + kNodes);
        }
        __builtin_memset(gradients_, 0, 2 * count * int64_t(p_.poles) * sizeof(double));
        pole_sums_backward<Form>(nodes_, poles(part.row), p_.poles, numerators_, count, sums_, gradients_, dw,
                                 dz ? dz + 2 * first : nullptr, rows_);
        for (int n = 0; n < p_.poles; ++n) {
          for (int q = 0; q < count; ++q) {
            double* const to = dv + 2 * ((group + q) * p_.poles + n);
            to[0] += gradients_[2 * (n * count + q)], to[1] += gradients_[2 * (n * count + q) + 1];
          }
        }
      });
    });
  }

 private:
  const Real* poles(int64_t row) const { return static_cast<const Real*>(p_.w) + 2 * row * p_.poles; }
  int64_t node(int64_t group, int64_t row, int64_t i) const { return 2 * ((group * p_.rows + row) * p_.nodes + i); }

  // f(the first node) for every block, whose nodes it loads.
  template <class F>
  void for_blocks(const FilterPart& part, const F& f) {
    for (int64_t first = part.span.begin; first < part.span.end; first += kNodes) {
      nodes_.count = least(kNodes, part.span.end - first);
      split(static_cast<const Real*>(p_.z) + 2 * first, nodes_.count, nodes_.re, nodes_.im);
      nodes_.pad();
      f(first);
    }
  }

  // f(the first group, how many) for all groups, whose numerators it loads: [poles, groups].
  template <class F>
  void for_groups(int64_t row, const F& f) {
    for (int64_t group = 0; group < p_.groups; group += kGroups) {
      const int count = int(least(kGroups, p_.groups - group));
      for (int q = 0; q < count; ++q) {
        const Real* const v = static_cast<const Real*>(p_.v) + 2 * ((group + q) * p_.rows + row) * p_.poles;
        for (int n = 0; n < p_.poles; ++n) {
          numerators_[2 * (n * count + q)] = v[2 * n], numerators_[2 * (n * count + q) + 1] = v[2 * n + 1];
        }
      }
      f(group, count);
    }
  }

  const CauchyProblem& p_;
  Nodes<Real> nodes_;
  Real *numerators_, *sums_, *rows_;
  double* gradients_;
};

}  // namespace packseq::PACKSEQ_ISA
