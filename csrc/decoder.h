// A decoder-only model as one call: every block of a step, its attention over pages, and the head.
//
// The call computes what a model's layers compute one after the other; between its phases its threads wait for each
// other. Hidden rows are float32 throughout. A row's result is the same bits whatever shares the step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pool.h"
#include "product.h"
#include "rows.h"

namespace lockstep {

// Products that read the same rows, one after the other in their output: query, key and value, or gate and up.
// Each weight's number of outputs is a multiple of 16, or it is the last.
struct Products {
  std::vector<Weight> weights;
  std::vector<float> bias;  // of all outputs, or empty

  int num_outputs() const;
  int num_inputs() const { return weights.front().num_inputs; }
};

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh };

struct Norm {
  std::vector<float> weight;  // empty: no such norm
  float eps = 0;
};

struct Block {
  Norm input_norm, q_norm, k_norm, after_attention_norm, post_norm, after_mlp_norm;
  Products qkv, out, gate_up, down;
  int rope = 0;  // which of the model's tables
  int window = 0;
  float scale = 1, soft_cap = 0;
  void* k_pool = nullptr;  // [KV heads, pages, page size, head dim]
  void* v_pool = nullptr;
};

// cos and sin [positions, half] of one rotation.
struct RopeTable {
  std::vector<float> cos, sin;
  int half = 0;
};

struct DecoderModel {
  int hidden_size = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, inner_size = 0;
  Activation activation = Activation::kSilu;
  Weight embedding{};
  float embedding_scale = 1;
  std::vector<RopeTable> ropes;
  std::vector<Block> blocks;
  Norm final_norm;
  Products head;
  float head_soft_cap = 0;
  KVType kv_type = KVType::kBF16;
  int64_t num_pages = 0;
  int page_size = 0;
};

// Consecutive tokens of one sequence: its rows of the step, the keys that it has with them, its pages, and how many of
// its rows, the last ones, somebody wants to see.
struct Span {
  int first_row, num_rows, num_keys;
  const int32_t* pages;
  int num_wanted;
};

class Decoder {
 public:
  Decoder(DecoderModel model, const ProductKernels& products, const RowKernels& rows, Pool& pool);
  ~Decoder();

  const DecoderModel& model() const { return model_; }

  // Keys and values of every block: the model's memory, whose pages `step` writes and reads.
  void set_pools(const std::vector<void*>& k_pools, const std::vector<void*>& v_pools, KVType type, int64_t num_pages,
                 int page_size);

  int max_threads() const { return pool_.max_threads(); }

  // Computes the rows of `spans`; hidden [num_rows, hidden_size] are the rows after the final norm. Those that nobody
  // wants are left as they are.
  void step(int num_rows, const int64_t* token_ids, const int64_t* positions, const int64_t* slots,
            const std::vector<Span>& spans, int num_threads, float* hidden);

  // Scores of hidden rows: [num_rows, scores_stride], scores_stride a multiple of 16 that holds the vocabulary.
  void scores(int num_rows, const float* hidden, int num_threads, float* scores, int64_t scores_stride);

 private:
  class Step;
  struct Buffers;
  DecoderModel model_;
  const ProductKernels& products_;
  const RowKernels& rows_;
  Pool& pool_;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace lockstep
