// Vectors along the last dim of a tensor of any strides, read and written as floats.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "rows.h"

namespace lockstep {

// Floats that begin at a cache line.
class Lines {
 public:
  explicit Lines(int64_t count)
      : data_(static_cast<float*>(
            ::operator new (static_cast<size_t>(count) * sizeof(float), std::align_val_t{64}))) {}

  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { ::operator delete (data, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
};

struct Strided {
  char* data = nullptr;
  KVType type = KVType::kF32;
  std::vector<int64_t> shape, strides;  // strides in elements

  int width() const { return static_cast<int>(shape.back()); }
  int64_t num_values() const { return num_rows() * width(); }
  int64_t num_rows() const {
    int64_t num = 1;
    for (size_t d = 0; d + 1 < shape.size(); ++d) num *= shape[d];
    return num;
  }

  // The vector as floats: where it lies, or a copy in `buffer`.
  const float* row(const RowKernels& kernels, int64_t index, float* buffer) const {
    if (type == KVType::kF32 && is_dense()) return reinterpret_cast<const float*>(at(index));
    copy_row(kernels, index, buffer);
    return buffer;
  }

  void copy_row(const RowKernels& kernels, int64_t index, float* buffer) const {
    const char* from = at(index);
    if (is_dense()) return kernels.from_kv(type, from, width(), buffer);
    for (int i = 0; i < width(); ++i)
      kernels.from_kv(type, from + i * strides.back() * kv_bytes(type), 1, buffer + i);
  }

  void set_row(const RowKernels& kernels, int64_t index, const float* values) const {
    char* to = at(index);
    if (is_dense()) return kernels.to_kv(type, values, width(), to);
    for (int i = 0; i < width(); ++i)
      kernels.to_kv(type, values + i, 1, to + i * strides.back() * kv_bytes(type));
  }

 private:
  bool is_dense() const { return strides.back() == 1 || width() == 1; }

  char* at(int64_t index) const {
    int64_t place = 0;
    for (size_t d = shape.size() - 1; d-- > 0;) {
      place += index % shape[d] * strides[d];
      index /= shape[d];
    }
    return data + place * kv_bytes(type);
  }
};

}  // namespace lockstep
