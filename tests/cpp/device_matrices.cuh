// Copies of a call's matrices on the GPU.
#pragma once
#include <map>
#include <memory>

#include "device_array.cuh"
#include "matrix.h"

namespace packseq::testing {

// At the same offsets, with the call's boundaries.
class OnDevice {
 public:
  template <class Call>
  explicit OnDevice(Call& v) : cu_(v.cu) {
    for (const Matrix* m : v.all()) add(*m);
  }
  void add(const Matrix& m) {
    const std::vector<char> bytes(m.memory.data(), m.memory.data() + m.memory.bytes());
    arrays_[&m] = std::make_unique<DeviceArray<char>>(bytes);
  }
  void* operator()(const Matrix& m) const { return arrays_.at(&m)->data() + m.first_byte(); }
  int32_t* cu() const { return cu_.data(); }

  // Back to the host: what was written there.
  void fetch(const Matrix& m) const {
    const std::vector<char> bytes = arrays_.at(&m)->values();
    std::memcpy(const_cast<Matrix&>(m).memory.data(), bytes.data(), bytes.size());
  }
  void fetch(const std::vector<const Matrix*>& some) const {
    for (const Matrix* m : some) fetch(*m);
  }

 private:
  DeviceArray<int32_t> cu_;
  std::map<const Matrix*, std::unique_ptr<DeviceArray<char>>> arrays_;
};

}  // namespace packseq::testing
