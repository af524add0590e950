// Python's view of single products.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "packed.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lockstep {
namespace {

using Inputs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Outputs = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Rows whose activations stay in the second-level cache.
constexpr int kRowBlock = 256;
// With less to do for each, waiting for another thread costs more than it saves.
constexpr int64_t kProductsPerThread = 1 << 17;

struct AlignedDelete {
  void operator()(uint8_t* memory) const { ::operator delete (memory, std::align_val_t{64}); }
};

std::unique_ptr<uint8_t, AlignedDelete> aligned_bytes(int64_t size) {
  return std::unique_ptr<uint8_t, AlignedDelete>(
      static_cast<uint8_t*>(::operator new (static_cast<size_t>(size), std::align_val_t{64})));
}

// One product that a team of threads shares: its rows first, then its groups of outputs.
class SharedProduct {
 public:
  SharedProduct(const ProductKernels& kernels, const Weight& weight, const Inputs& x, Outputs& out)
      : kernels_(kernels),
        weight_(weight),
        x_(x.data()),
        out_(out.data()),
        num_rows_(static_cast<int>(x.shape(0))),
        out_stride_(static_cast<int64_t>(out.shape(1))),
        row_bytes_(kernels.row_bytes(weight)),
        rows_(aligned_bytes(row_bytes_ * num_rows_)) {}

  int64_t num_products() const {
    return static_cast<int64_t>(num_rows_) * weight_.num_outputs * weight_.num_inputs;
  }

  void operator()(int thread, Team& team) const {
    const Range rows = share(num_rows_, thread, team.num_threads());
    for (int row = rows.begin; row < rows.end; ++row) {
      kernels_.prepare(weight_, x_ + static_cast<int64_t>(row) * weight_.num_inputs,
                       rows_.get() + row * row_bytes_);
    }
    team.wait();
    const Range groups = share(weight_.num_groups, thread, team.num_threads());
    for (int first = 0; first < num_rows_; first += kRowBlock) {
      kernels_.product(weight_, groups.begin, groups.end, rows_.get() + first * row_bytes_,
                       std::min(kRowBlock, num_rows_ - first), out_ + first * out_stride_, out_stride_);
    }
  }

 private:
  const ProductKernels& kernels_;
  const Weight& weight_;
  const float* x_;
  float* out_;
  int num_rows_;
  int64_t out_stride_, row_bytes_;
  std::unique_ptr<uint8_t, AlignedDelete> rows_;
};

void product(Pool& pool, int num_threads, const PackedWeight& packed, const Inputs& x, const std::string& set,
             Outputs out) {
  const Weight& weight = packed.weight();
  if (static_cast<int64_t>(x.shape(1)) != weight.num_inputs) {
    throw std::invalid_argument("rows are as wide as the weight has inputs");
  }
  if (out.shape(0) != x.shape(0) || static_cast<int64_t>(out.shape(1)) != int64_t{weight.num_groups} * kGroup) {
    throw std::invalid_argument("results are as many rows, as wide as the outputs padded to a multiple of 16");
  }
  if (x.shape(0) == 0) return;
  const SharedProduct shared(products_named(set), weight, x, out);
  const int64_t useful = 1 + shared.num_products() / kProductsPerThread;
  nb::gil_scoped_release unlocked;
  const int most = std::min(std::max(num_threads, 1), pool.max_threads());
  pool.run(static_cast<int>(std::min<int64_t>(most, useful)), 0, shared);
}

}  // namespace

void bind_product(nb::module_& m) {
  m.def("product", product, "pool"_a, "num_threads"_a, "weight"_a, "x"_a, "instruction_set"_a, "out"_a,
        "Writes x [rows, inputs] times the weight's transpose to out [rows, outputs padded to a multiple of "
        "16].");
}

}  // namespace lockstep
