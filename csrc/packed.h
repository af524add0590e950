// A packed weight that owns its memory: what Python holds.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "product.h"

namespace lockstep {

class PackedWeight {
 public:
  // `shape` names everything but sizes that follow from it, and data.
  explicit PackedWeight(Weight shape) : weight_(shape) {
    shape_weight(weight_);
    num_bytes_ = weight_bytes(weight_);
    memory_.reset(static_cast<uint8_t*>(::operator new(num_bytes_ + 64, std::align_val_t{64})));
    std::memset(memory_.get(), 0, num_bytes_ + 64);
    weight_.data = memory_.get();
  }

  const Weight& weight() const { return weight_; }
  uint8_t* data() { return memory_.get(); }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  Weight weight_;
  int64_t num_bytes_ = 0;
  std::unique_ptr<uint8_t, Free> memory_;
};

}  // namespace lockstep
