// Python's view of packed weights.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "bind.h"
#include "packed.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lockstep {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Weight shape_of(Store store, size_t num_outputs, size_t num_inputs) {
  if (num_outputs == 0 || num_inputs == 0 || num_outputs > INT32_MAX || num_inputs > INT32_MAX) {
    throw std::invalid_argument("a weight has at least one output and one input");
  }
  Weight shape{};
  shape.store = store;
  shape.scale_inputs = kBlock;
  shape.num_outputs = static_cast<int32_t>(num_outputs);
  shape.num_inputs = static_cast<int32_t>(num_inputs);
  return shape;
}

PackedWeight* from_integers(const Bytes& q, const Scales& scale, nb::handle minimum, int zero, int bits) {
  if (bits != 4 && bits != 8) throw std::invalid_argument("packed integers have 4 or 8 bits");
  Weight shape = shape_of(bits == 4 ? Store::kU4 : Store::kU8, q.shape(0), q.shape(1));
  if (scale.shape(0) != q.shape(0) || scale.shape(1) == 0 || q.shape(1) % scale.shape(1) != 0) {
    throw std::invalid_argument("each output needs scales that divide its inputs evenly");
  }
  shape.scale_inputs = static_cast<int32_t>(q.shape(1) / scale.shape(1));
  if (shape.scale_inputs != kBlock && shape.scale_inputs != kBlock / 2) {
    throw std::invalid_argument("a scale serves 16 or 32 inputs");
  }
  shape.zero = zero;
  shape.has_minimum = !minimum.is_none();
  const float* minima = nullptr;
  Scales given;
  if (shape.has_minimum) {
    given = nb::cast<Scales>(minimum);
    if (given.shape(0) != scale.shape(0) || given.shape(1) != scale.shape(1)) {
      throw std::invalid_argument("there is one minimum for each scale");
    }
    minima = given.data();
  }
  auto* packed = new PackedWeight(shape);
  nb::gil_scoped_release unlocked;
  pack_quantised(packed->weight(), q.data(), scale.data(), minima, 0, packed->weight().num_groups, packed->data());
  return packed;
}

PackedWeight* from_bf16(const Halves& bits) {
  auto* packed = new PackedWeight(shape_of(Store::kBF16, bits.shape(0), bits.shape(1)));
  nb::gil_scoped_release unlocked;
  pack_bf16(packed->weight(), bits.data(), 0, packed->weight().num_groups, packed->data());
  return packed;
}

void take_rows(const PackedWeight& packed, const Numbers& numbers, const std::string& set, FloatRows out) {
  const Weight& weight = packed.weight();
  if (out.shape(0) != numbers.shape(0) || static_cast<int32_t>(out.shape(1)) != weight.num_inputs) {
    throw std::invalid_argument("rows are taken into a matrix of as many rows, as wide as the weight");
  }
  const ProductKernels& kernels = products_named(set);
  for (size_t i = 0; i < numbers.shape(0); ++i) {
    if (numbers.data()[i] < 0 || numbers.data()[i] >= weight.num_outputs) {
      throw std::out_of_range("a row number is out of range");
    }
    kernels.gather(weight, static_cast<int>(numbers.data()[i]), out.data() + i * out.shape(1));
  }
}

}  // namespace

void bind_packed(nb::module_& m) {
  nb::class_<PackedWeight>(m, "PackedWeight", "A constant weight in the order that products read it.")
      .def_static("from_integers", from_integers, "q"_a, "scale"_a, "minimum"_a.none(), "zero"_a, "bits"_a,
                  nb::rv_policy::take_ownership,
                  "Of q [outputs, inputs], scale and minimum [outputs, groups]: value = scale * (q - zero) + minimum.")
      .def_static("from_bf16", from_bf16, "bits"_a, nb::rv_policy::take_ownership,
                  "Of the bits of bfloat16 values [outputs, inputs].")
      .def("take_rows", take_rows, "numbers"_a, "instruction_set"_a, "out"_a,
           "Writes the weights of some outputs as float32.")
      .def_prop_ro("num_outputs", [](const PackedWeight& packed) { return packed.weight().num_outputs; })
      .def_prop_ro("num_inputs", [](const PackedWeight& packed) { return packed.weight().num_inputs; })
      .def_prop_ro("nbytes", &PackedWeight::num_bytes);
}

}  // namespace lockstep
