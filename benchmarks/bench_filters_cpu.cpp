// The filters and the S4 step on the CPU through the C++ API: pairs of a pole and a node (a step, a token) a second,
// at S4's sizes.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "cpu_benchmark.h"
#include "longconv/filters.h"
#include "longconv/s4_step.h"

namespace packseq::bench {
namespace {

constexpr int kPoles = 32;  // of conjugate pairs: a state of 64

// A filter's parameters and results, as large as any call needs them.
struct Tensors {
  Tensors(int64_t rows_, int64_t length_, int rank_) : rows(rows_), length(length_), rank(rank_) {
    const size_t shared = size_t(2 * rows * kPoles);
    for (auto* x : {&P, &dP}) x->assign(size_t(rank) * shared, 0.5f);
    for (auto* x : {&v, &B, &dv, &dB}) x->assign(shared, 0.7f);
    for (auto* x : {&dt, &ddt}) x->assign(size_t(rows), 0.01f);
    for (auto* x : {&out, &dout}) x->assign(size_t(2 * rows * length), 0.1f);
    z.resize(size_t(2 * length)), dz.resize(z.size()), w.resize(shared), x.resize(shared), dw.resize(shared);
    for (int64_t l = 0; l < length; ++l) z[size_t(2 * l + 1)] = 200 * float(l) / float(length);
    for (size_t i = 0; i < shared; i += 2) {
      const float n = float(i / 2 % kPoles);
      w[i] = -0.5f, w[i + 1] = 3.1f * n;
      x[i] = -0.001f, x[i + 1] = 3.1f * n / kPoles;
    }
  }

  CauchyProblem cauchy() const { return {Dtype::f32, true, 1, rows, length, kPoles, v.data(), z.data(), w.data()}; }
  VandermondeProblem vandermonde() const { return {Dtype::f32, true, 1, rows, length, kPoles, x.data()}; }
  S4Problem s4() const {
    return {Dtype::f32, 1, rows, length, kPoles, rank, w.data(), P.data(), B.data(), v.data(), dt.data()};
  }

  int64_t rows, length;
  int rank;
  std::vector<float> v, z, w, x, P, B, dt, out, dout;
  std::vector<float> dv, dz, dw, dP, dB, ddt;
};

struct Call {
  std::string name;
  double pairs;
  std::function<void(const Executor&)> run;
};

std::vector<Call> calls_of(Tensors& t) {
  const std::string size = " H" + std::to_string(t.rows) + " L" + std::to_string(t.length);
  const double pairs = double(t.rows * t.length) * kPoles;
  const auto backward = [&](const Executor& e, float* dz) {
    cauchy_backward({t.cauchy(), t.dout.data(), t.dv.data(), dz, t.dw.data(), nullptr}, e);
  };
  return {
      {"cauchy" + size, pairs,
       [&](const Executor& e) {
         cauchy_forward({t.cauchy(), t.out.data()}, e);
       }},
      {"cauchy backward" + size, pairs, [&, backward](const Executor& e) { backward(e, nullptr); }},
      {"cauchy backward dz" + size, pairs, [&, backward](const Executor& e) { backward(e, t.dz.data()); }},
      {"vandermonde" + size, pairs,
       [&](const Executor& e) {
         vandermonde_forward({t.vandermonde(), t.v.data(), t.out.data()}, e);
       }},
      {"vandermonde backward" + size, pairs,
       [&](const Executor& e) {
         vandermonde_backward({t.vandermonde(), t.v.data(), t.dout.data(), t.dv.data(), t.dw.data(), nullptr}, e);
       }},
      {"s4" + size, pairs / 2,
       [&](const Executor& e) {
         s4_spectrum({t.s4(), t.out.data()}, e);
       }},
      {"s4 backward" + size, pairs / 2,
       [&](const Executor& e) {
         s4_spectrum_backward(
             {t.s4(), t.dout.data(), t.dw.data(), t.dP.data(), t.dB.data(), t.dv.data(), t.ddt.data(), nullptr}, e);
       }},
  };
}

// `tokens` of each of `sequences`.
Call step_call(Tensors& t, std::vector<int32_t>& cu, std::vector<float>& pool, int64_t sequences, int64_t tokens) {
  for (int64_t i = 0; i <= sequences; ++i) cu.push_back(int32_t(i * tokens));
  pool.assign(size_t(2 * sequences * t.rows * kPoles), 0.f);
  const auto run = [&, sequences, tokens](const Executor& e) {
    s4_step({.dtype = Dtype::f32,
             .total = sequences * tokens,
             .sequences = sequences,
             .channels = t.rows,
             .filters = 1,
             .poles = kPoles,
             .rank = t.rank,
             .zoh = false,
             .cu_seqlens = cu.data(),
             .u = {t.dout.data(), t.rows},
             .w = t.w.data(),
             .P = t.P.data(),
             .B = t.B.data(),
             .C = t.v.data(),
             .dt = t.dt.data(),
             .D = nullptr,
             .pool = pool.data(),
             .slots = sequences,
             .indices = nullptr,
             .out = t.out.data()},
            e);
  };
  return {"step " + std::to_string(sequences) + "x" + std::to_string(tokens) + " H" + std::to_string(t.rows),
          double(sequences * tokens * t.rows) * kPoles, run};
}

void measure(benchmark::State& state, const Call& call) {
  repeat(state, [&, executor = threads_executor()] { call.run(executor); });
  add_rate(state, "pairs", call.pairs);
}

void add_benchmarks() {
  static Tensors small(256, 4096, 1), large(64, 16384, 1);
  static std::vector<int32_t> boundaries[3];
  static std::vector<float> pools[3];
  std::vector<Call> calls;
  for (Tensors* t : {&small, &large})
    for (Call& call : calls_of(*t)) calls.push_back(std::move(call));
  calls.push_back(step_call(small, boundaries[0], pools[0], 1, 1));
  calls.push_back(step_call(small, boundaries[1], pools[1], 64, 1));
  calls.push_back(step_call(small, boundaries[2], pools[2], 4, 1024));
  for (const Call& call : calls) {
    add_benchmark_by_threads(call.name, [=](benchmark::State& state) { measure(state, call); });
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  return packseq::bench::run_benchmarks(argc, argv);
}
