// Python's view of the thread pool and of whole decoders.
#include "bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "packed.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lockstep {
namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntRows = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<float> copied(const Floats& values) { return {values.data(), values.data() + values.shape(0)}; }

std::vector<float> optional_floats(nb::handle given) {
  return given.is_none() ? std::vector<float>{} : copied(nb::cast<Floats>(given));
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

Norm norm_from(nb::handle given, float eps) { return {optional_floats(given), eps}; }

Products products_from(const nb::list& weights, nb::handle bias) {
  Products products;
  for (nb::handle weight : weights) products.weights.push_back(nb::cast<const PackedWeight&>(weight).weight());
  require(!products.weights.empty(), "a product needs a weight");
  for (size_t i = 0; i + 1 < products.weights.size(); ++i) {
    require(products.weights[i].num_outputs % kGroup == 0, "outputs of packed products must be multiples of 16");
  }
  for (const Weight& weight : products.weights) {
    require(weight.num_inputs == products.num_inputs(), "packed products must read the same inputs");
  }
  products.bias = optional_floats(bias);
  require(products.bias.empty() || static_cast<int>(products.bias.size()) == products.num_outputs(),
          "a bias must have one value for each output");
  return products;
}

// Gate and up as two weights, where they were packed as one: its halves are whole groups.
Products halved(Products products) {
  if (products.weights.size() != 1) return products;
  const Weight& whole = products.weights.front();
  require(whole.num_outputs % (2 * kGroup) == 0, "inner sizes must be multiples of 16");
  Weight gate = whole;
  gate.num_outputs /= 2;
  gate.num_groups /= 2;
  Weight up = gate;
  up.data = whole.block(gate.num_groups, 0);
  products.weights = {gate, up};
  return products;
}

KVType kv_type_from(const std::string& name) {
  if (name == "float32") return KVType::kF32;
  if (name == "bfloat16") return KVType::kBF16;
  if (name == "float16") return KVType::kF16;
  throw std::invalid_argument("unknown KV type " + name);
}

Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw std::invalid_argument("unknown activation " + name);
}

// A decoder that is being put together, and then one that runs. Keeps the Python objects whose memory it reads.
class BoundDecoder {
 public:
  BoundDecoder(nb::object pool, const std::string& instruction_set, int hidden_size, int num_heads, int num_kv_heads,
               int head_dim, int inner_size, const std::string& activation)
      : pool_(std::move(pool)), set_(instruction_set) {
    model_.hidden_size = hidden_size;
    model_.num_heads = num_heads;
    model_.num_kv_heads = num_kv_heads;
    model_.head_dim = head_dim;
    model_.inner_size = inner_size;
    model_.activation = activation_from(activation);
    require(num_heads % num_kv_heads == 0, "query heads must be shared out evenly over KV heads");
    require(head_dim % 16 == 0, "head dims must be multiples of 16");
  }

  void embed(const PackedWeight& weight, float scale) {
    require(weight.weight().num_inputs == model_.hidden_size, "the embedding has another width than the model");
    model_.embedding = weight.weight();
    model_.embedding_scale = scale;
  }

  int add_rope(const Table& cos, const Table& sin) {
    require(cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1), "cos and sin must have one shape");
    const size_t count = cos.shape(0) * cos.shape(1);
    model_.ropes.push_back({{cos.data(), cos.data() + count}, {sin.data(), sin.data() + count},
                            static_cast<int>(cos.shape(1))});
    return static_cast<int>(model_.ropes.size()) - 1;
  }

  void add_block(float eps, nb::object input_norm, const nb::list& qkv, nb::object qkv_bias, nb::object q_norm,
                 nb::object k_norm, const nb::list& out, nb::object out_bias, nb::object after_attention_norm,
                 nb::object post_norm, const nb::list& gate_up, nb::object gate_up_bias, const nb::list& down,
                 nb::object down_bias, nb::object after_mlp_norm, int rope, int window, float scale, float soft_cap) {
    Block block;
    block.input_norm = norm_from(input_norm, eps);
    block.q_norm = norm_from(q_norm, eps);
    block.k_norm = norm_from(k_norm, eps);
    block.after_attention_norm = norm_from(after_attention_norm, eps);
    block.post_norm = norm_from(post_norm, eps);
    block.after_mlp_norm = norm_from(after_mlp_norm, eps);
    block.qkv = products_from(qkv, qkv_bias);
    block.out = products_from(out, out_bias);
    block.gate_up = halved(products_from(gate_up, gate_up_bias));
    block.down = products_from(down, down_bias);
    block.rope = rope;
    block.window = window;
    block.scale = scale;
    block.soft_cap = soft_cap;
    check(block);
    model_.blocks.push_back(std::move(block));
    for (const nb::list& list : {qkv, out, gate_up, down}) kept_.push_back(list);
  }

  void finish(nb::object norm, float eps, const nb::list& head, float soft_cap) {
    require(decoder_ == nullptr && !model_.blocks.empty(), "a decoder is finished once, with its blocks");
    model_.final_norm = norm_from(norm, eps);
    model_.head = products_from(head, nb::none());
    require(static_cast<int>(model_.final_norm.weight.size()) == model_.hidden_size, "the last norm has another width");
    require(model_.head.num_inputs() == model_.hidden_size, "the head has another width than the model");
    model_.head_soft_cap = soft_cap;
    kept_.push_back(head);
    decoder_ = std::make_unique<Decoder>(std::move(model_), products_named(set_), rows_named(set_),
                                         nb::cast<Pool&>(pool_));
  }

  void set_pools(const nb::list& k_pools, const nb::list& v_pools, const std::string& type, int64_t num_pages,
                 int page_size) {
    require(decoder_ != nullptr, "finish the decoder first");
    require(k_pools.size() == decoder_->model().blocks.size() && v_pools.size() == k_pools.size(),
            "each block needs its pools");
    std::vector<void*> keys, values;
    const size_t num_bytes = static_cast<size_t>(decoder_->model().num_kv_heads) * num_pages * page_size *
                             decoder_->model().head_dim * kv_bytes(kv_type_from(type));
    for (size_t i = 0; i < k_pools.size(); ++i) {
      for (auto [list, into] : {std::pair{&k_pools, &keys}, std::pair{&v_pools, &values}}) {
        auto array = nb::cast<nb::ndarray<nb::device::cpu>>((*list)[i]);
        require(array.nbytes() == num_bytes, "a KV pool has another size than the model needs");
        into->push_back(array.data());
      }
    }
    pools_ = nb::make_tuple(k_pools, v_pools);
    decoder_->set_pools(keys, values, kv_type_from(type), num_pages, page_size);
  }

  void step(const Longs& token_ids, const Longs& positions, const Longs& slots, const IntRows& spans,
            const Ints& pages, int num_threads, FloatRows hidden) {
    require(decoder_ != nullptr && !pools_.is_none(), "the decoder has no pools yet");
    const DecoderModel& model = decoder_->model();
    const int num_rows = static_cast<int>(token_ids.shape(0));
    require(positions.shape(0) == token_ids.shape(0) && slots.shape(0) == token_ids.shape(0) &&
                static_cast<int>(hidden.shape(0)) == num_rows,
            "a step needs one position, slot and hidden row for each token");
    if (num_rows == 0) return;
    require(static_cast<int>(hidden.shape(1)) == model.hidden_size && hidden.stride(0) == model.hidden_size,
            "hidden rows have another width than the model");
    require(spans.shape(1) == 5, "a span is first row, rows, keys, first page, rows wanted");
    check_rows(num_rows, token_ids.data(), positions.data(), slots.data());
    const std::vector<Span> checked = spans_from(spans, pages, num_rows);
    nb::gil_scoped_release unlocked;
    decoder_->step(num_rows, token_ids.data(), positions.data(), slots.data(), checked, threads(num_threads),
                   hidden.data());
  }

  void scores(const FloatRows& hidden, int num_threads, FloatRows out) {
    require(decoder_ != nullptr, "finish the decoder first");
    const DecoderModel& model = decoder_->model();
    if (hidden.shape(0) == 0) return;
    require(static_cast<int>(hidden.shape(1)) == model.hidden_size && hidden.stride(0) == model.hidden_size,
            "hidden rows have another width than the model");
    require(out.shape(0) == hidden.shape(0) && out.stride(0) % kGroup == 0 &&
                out.stride(0) >= (model.head.num_outputs() + kGroup - 1) / kGroup * kGroup,
            "scores need a row for each hidden row, a multiple of 16 apart");
    nb::gil_scoped_release unlocked;
    decoder_->scores(static_cast<int>(hidden.shape(0)), hidden.data(), threads(num_threads), out.data(),
                     out.stride(0));
  }

 private:
  int threads(int wanted) const {
    return std::max(1, std::min(wanted, decoder_->max_threads()));
  }

  void check(const Block& block) const {
    const int width = model_.num_heads * model_.head_dim;
    require(static_cast<int>(block.input_norm.weight.size()) == model_.hidden_size &&
                static_cast<int>(block.post_norm.weight.size()) == model_.hidden_size,
            "a norm has another width than the model");
    require(block.qkv.num_inputs() == model_.hidden_size &&
                block.qkv.num_outputs() == width + 2 * model_.num_kv_heads * model_.head_dim,
            "the query, key and value product has another shape than the model");
    require(block.out.num_inputs() == width && block.out.num_outputs() == model_.hidden_size,
            "the output product has another shape than the model");
    require(block.gate_up.weights.size() == 2 && block.gate_up.num_inputs() == model_.hidden_size &&
                block.gate_up.weights[0].num_outputs == model_.inner_size &&
                block.gate_up.weights[1].num_outputs == model_.inner_size,
            "the gate and up products have other shapes than the model");
    require(block.down.num_inputs() == model_.inner_size && block.down.num_outputs() == model_.hidden_size,
            "the down product has another shape than the model");
    require(block.rope >= 0 && block.rope < static_cast<int>(model_.ropes.size()) &&
                2 * model_.ropes[block.rope].half <= model_.head_dim,
            "a block names a rotation that does not fit");
  }

  void check_rows(int num_rows, const int64_t* token_ids, const int64_t* positions, const int64_t* slots) const {
    const DecoderModel& model = decoder_->model();
    int64_t num_positions = INT64_MAX;
    for (const RopeTable& rope : model.ropes) {
      num_positions = std::min<int64_t>(num_positions, static_cast<int64_t>(rope.cos.size()) / rope.half);
    }
    const int64_t num_slots = model.num_pages * model.page_size;
    for (int row = 0; row < num_rows; ++row) {
      require(token_ids[row] >= 0 && token_ids[row] < model.embedding.num_outputs, "a token id is out of range");
      require(positions[row] >= 0 && positions[row] < num_positions, "a position is out of range");
      require(slots[row] >= 0 && slots[row] < num_slots, "a slot is out of range");
    }
  }

  std::vector<Span> spans_from(const IntRows& given, const Ints& pages, int num_rows) const {
    const DecoderModel& model = decoder_->model();
    const int64_t num_given = static_cast<int64_t>(pages.shape(0));
    for (int64_t i = 0; i < num_given; ++i) {
      require(pages.data()[i] >= 0 && pages.data()[i] < model.num_pages, "a page is out of range");
    }
    std::vector<Span> spans;
    int next_row = 0;
    for (size_t i = 0; i < given.shape(0); ++i) {
      const int32_t* at = given.data() + 5 * i;
      require(at[0] == next_row && at[1] > 0 && at[2] >= at[1], "spans must follow each other, with rows and keys");
      next_row += at[1];
      const int64_t num_pages = (static_cast<int64_t>(at[2]) + model.page_size - 1) / model.page_size;
      require(at[3] >= 0 && at[3] + num_pages <= num_given, "a span has fewer pages than keys");
      require(at[4] >= 0 && at[4] <= at[1], "a span wants more rows than it has");
      spans.push_back({at[0], at[1], at[2], pages.data() + at[3], at[4]});
    }
    require(next_row == num_rows, "the spans do not cover the rows");
    return spans;
  }

  nb::object pool_, pools_ = nb::none();
  std::vector<nb::object> kept_;
  std::string set_;
  DecoderModel model_;
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Pool>(m, "Pool")
      .def(nb::init<const std::vector<int>&>(), "cores"_a)
      .def_prop_ro("max_threads", &Pool::max_threads);
  nb::class_<BoundDecoder>(m, "Decoder")
      .def(nb::init<nb::object, const std::string&, int, int, int, int, int, const std::string&>(), "pool"_a,
           "instruction_set"_a, nb::kw_only(), "hidden_size"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
           "inner_size"_a, "activation"_a)
      .def("embed", &BoundDecoder::embed, "weight"_a, "scale"_a, nb::keep_alive<1, 2>())
      .def("add_rope", &BoundDecoder::add_rope, "cos"_a, "sin"_a)
      .def("add_block", &BoundDecoder::add_block, nb::kw_only(), "eps"_a, "input_norm"_a, "qkv"_a,
           "qkv_bias"_a.none(), "q_norm"_a.none(), "k_norm"_a.none(), "out"_a, "out_bias"_a.none(),
           "after_attention_norm"_a.none(), "post_norm"_a, "gate_up"_a, "gate_up_bias"_a.none(), "down"_a,
           "down_bias"_a.none(), "after_mlp_norm"_a.none(), "rope"_a, "window"_a, "scale"_a, "soft_cap"_a)
      .def("finish", &BoundDecoder::finish, nb::kw_only(), "norm"_a, "eps"_a, "head"_a, "soft_cap"_a)
      .def("set_pools", &BoundDecoder::set_pools, "k_pools"_a, "v_pools"_a, nb::kw_only(), "dtype"_a, "num_pages"_a,
           "page_size"_a)
      .def("step", &BoundDecoder::step, "token_ids"_a, "positions"_a, "slots"_a, "spans"_a, "pages"_a,
           "num_threads"_a, "hidden"_a)
      .def("scores", &BoundDecoder::scores, "hidden"_a, "num_threads"_a, "out"_a);
}

}  // namespace lockstep
