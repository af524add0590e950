#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

namespace lockstep {
namespace {

// Up to kAloneRows each thread takes its fixed part of a product's outputs and streams through the weights once, up to
// kFewRows threads take some groups of outputs as they become free, so that one that loses its core for a moment does
// not hold up the others for as long. Above, rows are cut in blocks that stay in cache too.
constexpr int kAloneRows = 4;
constexpr int kFewRows = 32;
constexpr int kFewRowGroups = 6;
constexpr int kRowBlock = 256;
constexpr int kPanelGroups = 3;
constexpr int kScoreGroups = 48;
// Query rows of one attention task, and keys of one part of a long context.
constexpr int kAttentionRows = 32;
constexpr int kSplitKeys = 256;
constexpr int kMaxSplits = 16;

int64_t padded(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }

// Floats or bytes that begin at a cache line; contents are lost when it grows.
template <class T>
class Aligned {
 public:
  ~Aligned() { release(); }
  Aligned() = default;
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;

  void need(int64_t count) {
    if (count <= count_) return;
    release();
    data_ = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
    count_ = count;
  }
  T* data() const { return data_; }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    count_ = 0;
  }
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Some groups of a weight as a weight.
Weight groups_of(const Weight& weight, int begin, int end) {
  Weight part = weight;
  part.num_groups = end - begin;
  part.num_outputs = std::min(part.num_groups * kGroup, weight.num_outputs - begin * kGroup);
  part.data = weight.block(begin, 0);
  return part;
}

}  // namespace

int Products::num_outputs() const {
  int total = 0;
  for (const Weight& weight : weights) total += weight.num_outputs;
  return total;
}

struct Decoder::Buffers {
  Aligned<float> residual, normed, qkv, attended, update, gate_up, inner, parts, lse, twice;
  Aligned<uint8_t> rows[2];  // activations as quantised and as bfloat16 weights read them
  Aligned<uint8_t> scratch;  // of attention, each thread's
};

// One attention task: rows of one span that read one KV head, over one part of the keys.
struct Task {
  int span, kv_head, first_row, num_rows, part, num_parts;
};

// The end of a step of which not every row is wanted: these rows, and the attention tasks that compute them.
struct Ending {
  std::vector<int> rows;
  std::vector<Task> tasks;
};

// What one thread does in a step. Every thread makes one, and all of them walk through the same phases.
class Decoder::Step {
 public:
  Step(Decoder& decoder, Team& team, int thread, int num_rows)
      : model_(decoder.model_), products_(decoder.products_), rows_(decoder.rows_), buffers_(*decoder.buffers_),
        team_(team), thread_(thread) {
    take_rows(num_rows);
  }

  void set_inputs(const int64_t* token_ids, const int64_t* positions, const int64_t* slots,
                  const std::vector<Span>* spans, const std::vector<Task>* tasks, const Ending* ending,
                  int64_t scratch_bytes) {
    token_ids_ = token_ids;
    positions_ = positions;
    slots_ = slots;
    spans_ = spans;
    tasks_ = tasks;
    ending_ = ending;
    scratch_ = buffers_.scratch.data() + thread_ * scratch_bytes;
  }

  void run(float* hidden) {
    embed();
    for (const Block& block : model_.blocks) {
      const bool is_first = &block == &model_.blocks.front();
      normalise(block.input_norm, is_first ? nullptr : buffers_.update.data());
      prepare(buffers_.normed.data(), model_.hidden_size, block.qkv);
      team_.wait();
      multiply(block.qkv, buffers_.qkv.data(), qkv_width());
      team_.wait();
      rotate_and_store(block);
      team_.wait();
      if (ending_ != nullptr && &block == &model_.blocks.back()) {
        narrow();
        if (num_rows_ == 0) return;
      }
      attend(block);
      prepare(buffers_.attended.data(), model_.num_heads * model_.head_dim, block.out, rows_wanted());
      team_.wait();
      multiply(block.out, buffers_.update.data(), hidden_width());
      team_.wait();
      finish(block.out, block.after_attention_norm);
      normalise(block.post_norm, buffers_.update.data());
      prepare(buffers_.normed.data(), model_.hidden_size, block.gate_up);
      team_.wait();
      multiply_gated(block.gate_up);
      team_.wait();
      prepare(buffers_.inner.data(), model_.inner_size, block.down);
      team_.wait();
      multiply(block.down, buffers_.update.data(), hidden_width());
      team_.wait();
      finish(block.down, block.after_mlp_norm);
    }
    for (int row = mine_.begin; row < mine_.end; ++row) {
      rows_.add_rms_norm(residual(row), buffers_.update.data() + row * hidden_width(),
                         model_.final_norm.weight.data(), model_.final_norm.eps, model_.hidden_size,
                         hidden + static_cast<int64_t>(origin(row)) * model_.hidden_size);
    }
  }

  // The scores of a row decide between tokens, and few rows want any: quantised inputs are taken twice, first as they
  // are rounded and then what the rounding left, which makes 16 bits of them.
  void run_head(const float* hidden, float* scores, int64_t stride) {
    for (int row = mine_.begin; row < mine_.end; ++row) prepare_twice(hidden, row);
    team_.wait();
    int first_group = 0;
    for (const Weight& weight : model_.head.weights) {
      score(weight, scores + first_group * kGroup, stride);
      first_group += weight.num_groups;
    }
    if (model_.head.bias.empty() && model_.head_soft_cap == 0) return;
    team_.wait();
    for (int row = mine_.begin; row < mine_.end; ++row) {
      float* out = scores + row * stride;
      if (!model_.head.bias.empty()) rows_.add(out, model_.head.bias.data(), model_.head.num_outputs());
      if (model_.head_soft_cap == 0) continue;
      for (int i = 0; i < model_.head.num_outputs(); ++i) {
        out[i] = model_.head_soft_cap * std::tanh(out[i] / model_.head_soft_cap);
      }
    }
  }

 private:
  int64_t hidden_width() const { return padded(model_.hidden_size); }
  int64_t qkv_width() const {
    return padded(static_cast<int64_t>(model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim);
  }
  float* residual(int row) const { return buffers_.residual.data() + origin(row) * hidden_width(); }

  void take_rows(int num_rows) {
    num_rows_ = num_rows;
    mine_ = share(num_rows, thread_, team_.num_threads());
  }

  // The last block stores the keys and values of every row; what follows is computed for those that are wanted. From
  // here on row i is the i-th of these, in buffers that a phase fills anew.
  void narrow() {
    narrowed_ = true;
    tasks_ = &ending_->tasks;
    take_rows(static_cast<int>(ending_->rows.size()));
  }
  const int* rows_wanted() const { return narrowed_ ? ending_->rows.data() : nullptr; }
  int origin(int row) const { return narrowed_ ? ending_->rows[row] : row; }

  void prepare_twice(const float* hidden, int row) {
    const float* x = hidden + static_cast<int64_t>(row) * model_.hidden_size;
    for (const Weight& weight : model_.head.weights) {
      const int64_t bytes = products_.row_bytes(weight);
      uint8_t* rows = buffers_.rows[weight.store == Store::kBF16].data();
      if (weight.store == Store::kBF16) {
        products_.prepare(weight, x, rows + row * bytes);
        continue;
      }
      products_.prepare(weight, x, rows + 2 * row * bytes);
      float* left = buffers_.normed.data() + static_cast<int64_t>(row) * model_.hidden_size;
      products_.remainder(weight, x, rows + 2 * row * bytes, left);
      products_.prepare(weight, left, rows + (2 * row + 1) * bytes);
    }
  }

  void score(const Weight& weight, float* out, int64_t stride) {
    const uint8_t* rows = buffers_.rows[weight.store == Store::kBF16].data();
    if (weight.store == Store::kBF16) {
      const Range mine = share(weight.num_groups, thread_, team_.num_threads());
      if (mine.begin < mine.end) {
        products_.product(weight, mine.begin, mine.end, rows, num_rows_, out, stride);
      }
      return;
    }
    // A few groups at a time, so that both sums of a row meet in cache.
    float* both = buffers_.twice.data() + static_cast<int64_t>(thread_) * 2 * num_rows_ * kScoreGroups * kGroup;
    const int phase = phase_++, num_tasks = (weight.num_groups + kScoreGroups - 1) / kScoreGroups;
    for (int task = team_.next(phase); task < num_tasks; task = team_.next(phase)) {
      const int begin = task * kScoreGroups, end = std::min(begin + kScoreGroups, weight.num_groups);
      const int width = (end - begin) * kGroup;
      products_.product(groups_of(weight, begin, end), 0, end - begin, rows, 2 * num_rows_, both,
                        kScoreGroups * kGroup);
      for (int row = 0; row < num_rows_; ++row) {
        const float* sums = both + 2 * row * kScoreGroups * kGroup;
        float* to = out + row * stride + begin * kGroup;
        std::memcpy(to, sums, width * sizeof(float));
        rows_.add(to, sums + kScoreGroups * kGroup, width);
      }
    }
  }

  void embed() {
    for (int row = mine_.begin; row < mine_.end; ++row) {
      products_.gather(model_.embedding, static_cast<int>(token_ids_[row]), residual(row));
      if (model_.embedding_scale == 1) continue;
      for (int i = 0; i < model_.hidden_size; ++i) residual(row)[i] *= model_.embedding_scale;
    }
  }

  // Adds an update, where there is one, and normalises the sum.
  void normalise(const Norm& norm, const float* update) {
    for (int row = mine_.begin; row < mine_.end; ++row) {
      float* out = buffers_.normed.data() + static_cast<int64_t>(row) * model_.hidden_size;
      if (update == nullptr) {
        rows_.rms_norm(residual(row), norm.weight.data(), norm.eps, model_.hidden_size, out);
      } else {
        rows_.add_rms_norm(residual(row), update + row * hidden_width(), norm.weight.data(), norm.eps,
                           model_.hidden_size, out);
      }
    }
  }

  // What a product leaves to be done with its rows: the bias, and a norm of the update itself.
  void finish(const Products& products, const Norm& norm) {
    for (int row = mine_.begin; row < mine_.end; ++row) {
      float* update = buffers_.update.data() + row * hidden_width();
      if (!products.bias.empty()) rows_.add(update, products.bias.data(), model_.hidden_size);
      if (!norm.weight.empty()) {
        rows_.rms_norm(update, norm.weight.data(), norm.eps, model_.hidden_size, update);
      }
    }
  }

  // This thread's rows in the forms that the weights read. Row i lies at origins[i] of x, or where it should.
  void prepare(const float* x, int width, const Products& products, const int* origins = nullptr) {
    bool done[2] = {false, false};
    for (const Weight& weight : products.weights) {
      const int form = weight.store == Store::kBF16;
      if (done[form]) continue;
      done[form] = true;
      const int64_t bytes = products_.row_bytes(weight);
      for (int row = mine_.begin; row < mine_.end; ++row) {
        const int64_t at = origins == nullptr ? row : origins[row];
        products_.prepare(weight, x + at * width, buffers_.rows[form].data() + row * bytes);
      }
    }
  }

  void multiply_part(const Weight& weight, int begin, int end, int first_row, int num_rows, float* out,
                     int64_t stride) {
    const uint8_t* rows = buffers_.rows[weight.store == Store::kBF16].data();
    products_.product(weight, begin, end, rows + first_row * products_.row_bytes(weight), num_rows,
                      out + first_row * stride, stride);
  }

  // Calls body(begin, end, first row, number of rows) for this thread's tasks of `num_groups` groups of outputs.
  template <class Body>
  void for_groups(int num_groups, const Body& body) {
    if (num_rows_ <= kAloneRows) {
      const Range part = share(num_groups, thread_, team_.num_threads());
      if (part.begin < part.end) body(part.begin, part.end, 0, num_rows_);
      return;
    }
    const int panel_groups = num_rows_ <= kFewRows ? kFewRowGroups : kPanelGroups;
    const int panels = (num_groups + panel_groups - 1) / panel_groups;
    const int row_blocks = (num_rows_ + kRowBlock - 1) / kRowBlock;
    const int phase = phase_++;
    for (int task = team_.next(phase); task < panels * row_blocks; task = team_.next(phase)) {
      const int panel = task % panels, first_row = task / panels * kRowBlock;
      body(panel * panel_groups, std::min((panel + 1) * panel_groups, num_groups), first_row,
           std::min(kRowBlock, num_rows_ - first_row));
    }
  }

  void multiply(const Products& products, float* out, int64_t stride) {
    int total = 0;
    for (const Weight& weight : products.weights) total += weight.num_groups;
    for_groups(total, [&](int begin, int end, int first_row, int num_rows) {
      int first_group = 0;
      for (const Weight& weight : products.weights) {
        const int low = std::max(begin - first_group, 0);
        const int high = std::min(end - first_group, weight.num_groups);
        if (low < high) {
          multiply_part(weight, low, high, first_row, num_rows, out + first_group * kGroup, stride);
        }
        first_group += weight.num_groups;
      }
    });
  }

  // Gate and up of the same outputs, and their activation, by the thread that has just computed them.
  void multiply_gated(const Products& products) {
    const Weight &gate = products.weights[0], &up = products.weights[1];
    const int64_t width = padded(model_.inner_size), stride = 2 * width;
    for_groups(gate.num_groups, [&](int begin, int end, int first_row, int num_rows) {
      multiply_part(gate, begin, end, first_row, num_rows, buffers_.gate_up.data(), stride);
      multiply_part(up, begin, end, first_row, num_rows, buffers_.gate_up.data() + width, stride);
      const int from = begin * kGroup, count = std::min(end * kGroup, model_.inner_size) - from;
      for (int row = first_row; row < first_row + num_rows; ++row) {
        float* gates = buffers_.gate_up.data() + row * stride + from;
        float* ups = gates + width;
        if (!products.bias.empty()) {
          rows_.add(gates, products.bias.data() + from, count);
          rows_.add(ups, products.bias.data() + model_.inner_size + from, count);
        }
        activate(gates, ups, count, buffers_.inner.data() + static_cast<int64_t>(row) * model_.inner_size + from);
      }
    });
  }

  void activate(const float* gate, const float* up, int count, float* out) {
    if (model_.activation == Activation::kSilu) {
      rows_.silu_and_mul(gate, up, count, out);
    } else {
      rows_.gelu_and_mul(gate, up, count, model_.activation == Activation::kGeluTanh, out);
    }
  }

  void rotate_and_store(const Block& block) {
    const int head_dim = model_.head_dim, num_heads = model_.num_heads, num_kv_heads = model_.num_kv_heads;
    const RopeTable& rope = model_.ropes[block.rope];
    const int64_t head_bytes = kv_bytes(model_.kv_type) * head_dim;
    const int64_t pool_stride = model_.num_pages * model_.page_size * head_bytes;
    for (int row = mine_.begin; row < mine_.end; ++row) {
      float* q = buffers_.qkv.data() + row * qkv_width();
      float* k = q + static_cast<int64_t>(num_heads) * head_dim;
      float* v = k + static_cast<int64_t>(num_kv_heads) * head_dim;
      if (!block.qkv.bias.empty()) rows_.add(q, block.qkv.bias.data(), block.qkv.num_outputs());
      normalise_heads(block.q_norm, q, num_heads);
      normalise_heads(block.k_norm, k, num_kv_heads);
      const int64_t angle = positions_[row] * rope.half;
      rows_.rope(q, num_heads + num_kv_heads, head_dim, rope.cos.data() + angle, rope.sin.data() + angle, rope.half,
                 false);
      for (int head = 0; head < num_kv_heads; ++head) {
        const int64_t at = head * pool_stride + slots_[row] * head_bytes;
        rows_.to_kv(model_.kv_type, k + head * head_dim, head_dim, static_cast<uint8_t*>(block.k_pool) + at);
        rows_.to_kv(model_.kv_type, v + head * head_dim, head_dim, static_cast<uint8_t*>(block.v_pool) + at);
      }
    }
  }

  void normalise_heads(const Norm& norm, float* heads, int count) {
    if (norm.weight.empty()) return;
    for (int head = 0; head < count; ++head) {
      float* at = heads + static_cast<int64_t>(head) * model_.head_dim;
      rows_.rms_norm(at, norm.weight.data(), norm.eps, model_.head_dim, at);
    }
  }

  void attend(const Block& block) {
    const int num_tasks = static_cast<int>(tasks_->size());
    const int phase = phase_++;
    bool has_parts = false;
    for (int index = team_.next(phase); index < num_tasks; index = team_.next(phase)) {
      attend_task(block, (*tasks_)[index]);
    }
    for (const Task& task : *tasks_) has_parts |= task.num_parts > 1;
    team_.wait();
    if (!has_parts) return;
    const Range mine = share(num_tasks, thread_, team_.num_threads());
    for (int index = mine.begin; index < mine.end; ++index) {
      if ((*tasks_)[index].num_parts > 1 && (*tasks_)[index].part == 0) merge((*tasks_)[index]);
    }
    team_.wait();
  }

  int group() const { return model_.num_heads / model_.num_kv_heads; }
  int64_t attended_width() const { return static_cast<int64_t>(model_.num_heads) * model_.head_dim; }

  void attend_task(const Block& block, const Task& task) {
    const Span& span = (*spans_)[task.span];
    const int64_t kv_head_bytes = model_.num_pages * model_.page_size * kv_bytes(model_.kv_type) * model_.head_dim;
    const int num_keys = span.num_keys - (span.num_rows - task.first_row - task.num_rows);
    const int row = span.first_row + task.first_row;
    const int64_t head_at = static_cast<int64_t>(task.kv_head) * group() * model_.head_dim;
    Attention call{};
    call.type = model_.kv_type;
    call.k = static_cast<const uint8_t*>(block.k_pool) + task.kv_head * kv_head_bytes;
    call.v = static_cast<const uint8_t*>(block.v_pool) + task.kv_head * kv_head_bytes;
    call.pages = span.pages;
    call.page_size = model_.page_size;
    call.head_dim = model_.head_dim;
    call.num_heads = group();
    call.num_rows = task.num_rows;
    call.num_keys = num_keys;
    call.first_key = share(num_keys, task.part, task.num_parts).begin;
    call.end_key = share(num_keys, task.part, task.num_parts).end;
    call.window = block.window;
    call.scale = block.scale;
    call.soft_cap = block.soft_cap;
    call.q = buffers_.qkv.data() + row * qkv_width() + head_at;
    call.q_stride = qkv_width();
    call.rounds_q = true;
    if (task.num_parts == 1) {
      call.out = buffers_.attended.data() + row * attended_width() + head_at;
      call.out_stride = attended_width();
    } else {
      call.out = part_of(task, task.part);
      call.out_stride = static_cast<int64_t>(group()) * model_.head_dim;
      call.lse = lse_of(task, task.part);
    }
    rows_.attend(call, scratch_);
  }

  // Split tasks have one row each, in a decode span: their parts lie by row, KV head and part.
  int64_t split_index(const Task& task, int part) const {
    const int row = (*spans_)[task.span].first_row + task.first_row;
    return (static_cast<int64_t>(row) * model_.num_kv_heads + task.kv_head) * kMaxSplits + part;
  }
  float* part_of(const Task& task, int part) const {
    return buffers_.parts.data() + split_index(task, part) * group() * model_.head_dim;
  }
  float* lse_of(const Task& task, int part) const { return buffers_.lse.data() + split_index(task, part) * group(); }

  void merge(const Task& task) {
    const int row = (*spans_)[task.span].first_row + task.first_row;
    float logs[kMaxSplits];
    for (int head = 0; head < group(); ++head) {
      for (int part = 0; part < task.num_parts; ++part) logs[part] = lse_of(task, part)[head];
      const int64_t at = (static_cast<int64_t>(task.kv_head) * group() + head) * model_.head_dim;
      rows_.merge(part_of(task, 0) + head * model_.head_dim, logs, task.num_parts,
                  static_cast<int64_t>(group()) * model_.head_dim, model_.head_dim,
                  -std::numeric_limits<float>::infinity(),
                  buffers_.attended.data() + row * attended_width() + at);
    }
  }

  const DecoderModel& model_;
  const ProductKernels& products_;
  const RowKernels& rows_;
  Buffers& buffers_;
  Team& team_;
  const int thread_;
  int num_rows_ = 0;
  Range mine_{};  // rows that this thread alone prepares
  int phase_ = 0;
  bool narrowed_ = false;
  const int64_t* token_ids_ = nullptr;
  const int64_t* positions_ = nullptr;
  const int64_t* slots_ = nullptr;
  const std::vector<Span>* spans_ = nullptr;
  const std::vector<Task>* tasks_ = nullptr;
  const Ending* ending_ = nullptr;
  uint8_t* scratch_ = nullptr;  // of attention
};

Decoder::Decoder(DecoderModel model, const ProductKernels& products, const RowKernels& rows, Pool& pool)
    : model_(std::move(model)), products_(products), rows_(rows), pool_(pool), buffers_(new Buffers) {}

Decoder::~Decoder() = default;

void Decoder::set_pools(const std::vector<void*>& k_pools, const std::vector<void*>& v_pools, KVType type,
                        int64_t num_pages, int page_size) {
  for (size_t i = 0; i < model_.blocks.size(); ++i) {
    model_.blocks[i].k_pool = k_pools[i];
    model_.blocks[i].v_pool = v_pools[i];
  }
  model_.kv_type = type;
  model_.num_pages = num_pages;
  model_.page_size = page_size;
}

namespace {

// Parts of one decode task's keys. They depend on its own length alone: the number of threads, or what else is in the
// step, must not change the order of its sums.
int splits_of(int num_keys) { return std::clamp(num_keys / kSplitKeys, 1, kMaxSplits); }

std::vector<Task> plan_attention(const std::vector<Span>& spans, int num_kv_heads) {
  std::vector<Task> tasks;
  for (size_t index = 0; index < spans.size(); ++index) {
    const Span& span = spans[index];
    // The last rows see the most keys: first the long tasks, so that threads end together.
    for (int end = span.num_rows; end > 0; end -= kAttentionRows) {
      const int first = std::max(0, end - kAttentionRows);
      const int num_parts = span.num_rows == 1 ? splits_of(span.num_keys) : 1;
      for (int head = 0; head < num_kv_heads; ++head) {
        for (int part = 0; part < num_parts; ++part) {
          tasks.push_back({static_cast<int>(index), head, first, end - first, part, num_parts});
        }
      }
    }
  }
  return tasks;
}

Ending plan_ending(const std::vector<Span>& spans, const std::vector<Task>& tasks) {
  Ending ending;
  for (const Span& span : spans) {
    for (int row = span.num_rows - span.num_wanted; row < span.num_rows; ++row) {
      ending.rows.push_back(span.first_row + row);
    }
  }
  for (const Task& task : tasks) {
    const Span& span = spans[task.span];
    if (task.first_row + task.num_rows > span.num_rows - span.num_wanted) ending.tasks.push_back(task);
  }
  return ending;
}

}  // namespace

void Decoder::step(int num_rows, const int64_t* token_ids, const int64_t* positions, const int64_t* slots,
                   const std::vector<Span>& spans, int num_threads, float* hidden) {
  const std::vector<Task> tasks = plan_attention(spans, model_.num_kv_heads);
  const Ending ending = plan_ending(spans, tasks);
  const bool wants_all = static_cast<int>(ending.rows.size()) == num_rows;
  const int64_t heads = model_.num_heads + 2 * model_.num_kv_heads, rows = num_rows;
  Buffers& buffers = *buffers_;
  buffers.residual.need(rows * padded(model_.hidden_size));
  buffers.update.need(rows * padded(model_.hidden_size));
  buffers.normed.need(rows * model_.hidden_size);
  buffers.qkv.need(rows * padded(heads * model_.head_dim));
  buffers.attended.need(rows * model_.num_heads * model_.head_dim);
  buffers.gate_up.need(rows * 2 * padded(model_.inner_size));
  buffers.inner.need(rows * model_.inner_size);
  int64_t num_split_rows = 0;
  for (const Block& block : model_.blocks) {
    for (const Products* products : {&block.qkv, &block.out, &block.gate_up, &block.down}) {
      for (const Weight& weight : products->weights) {
        buffers.rows[weight.store == Store::kBF16].need(rows * products_.row_bytes(weight));
      }
    }
  }
  for (const Task& task : tasks) {
    if (task.num_parts > 1) num_split_rows = std::max<int64_t>(num_split_rows, spans[task.span].first_row + 1);
  }
  buffers.parts.need(num_split_rows * model_.num_heads * kMaxSplits * model_.head_dim);
  buffers.lse.need(num_split_rows * model_.num_heads * kMaxSplits);
  Attention widest{};
  widest.type = model_.kv_type;
  widest.page_size = model_.page_size;
  widest.head_dim = model_.head_dim;
  widest.num_heads = model_.num_heads / model_.num_kv_heads;
  widest.num_rows = std::min(num_rows, kAttentionRows);
  for (const Span& span : spans) widest.num_keys = std::max(widest.num_keys, span.num_keys);
  widest.end_key = widest.num_keys;
  const int64_t scratch_bytes = (rows_.attention_scratch_bytes(widest) + 63) / 64 * 64;
  buffers.scratch.need(scratch_bytes * num_threads);
  const int phases_of_block = num_rows <= kAloneRows ? 1 : 5;
  pool_.run(num_threads, static_cast<int>(model_.blocks.size()) * phases_of_block, [&](int thread, Team& team) {
    Step step(*this, team, thread, num_rows);
    step.set_inputs(token_ids, positions, slots, &spans, &tasks, wants_all ? nullptr : &ending, scratch_bytes);
    step.run(hidden);
  });
}

void Decoder::scores(int num_rows, const float* hidden, int num_threads, float* scores, int64_t scores_stride) {
  Buffers& buffers = *buffers_;
  for (const Weight& weight : model_.head.weights) {
    buffers.rows[weight.store == Store::kBF16].need(2 * num_rows * products_.row_bytes(weight));
  }
  buffers.normed.need(static_cast<int64_t>(num_rows) * model_.hidden_size);
  buffers.twice.need(static_cast<int64_t>(num_threads) * 2 * num_rows * kScoreGroups * kGroup);
  pool_.run(num_threads, static_cast<int>(model_.head.weights.size()), [&](int thread, Team& team) {
    Step step(*this, team, thread, num_rows);
    step.run_head(hidden, scores, scores_stride);
  });
}

}  // namespace lockstep
