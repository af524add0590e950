// Python's view of the row kernels: one call for each operator, over tensors of any strides.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "pool.h"
#include "strided.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lockstep {
namespace {

using Given = nb::ndarray<nb::ro, nb::device::cpu>;
using Written = nb::ndarray<nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tables = nb::ndarray<const int32_t, nb::ndim<2>, nb::device::cpu>;

constexpr int64_t kValuesPerThread = 1 << 17;  // below it, waking another thread costs more than it saves
constexpr int kAttentionRows = 64;             // of one task

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

KVType type_of(nb::dlpack::dtype type) {
  const auto is = [type](nb::dlpack::dtype_code code, int bits) {
    return type.code == static_cast<uint8_t>(code) && type.bits == bits && type.lanes == 1;
  };
  if (is(nb::dlpack::dtype_code::Float, 32)) return KVType::kF32;
  if (is(nb::dlpack::dtype_code::Bfloat, 16)) return KVType::kBF16;
  if (is(nb::dlpack::dtype_code::Float, 16)) return KVType::kF16;
  throw std::invalid_argument("values are float32, bfloat16 or float16");
}

template <class Array>
Strided strided(const Array& array) {
  require(array.ndim() >= 1, "an array has a last dim");
  Strided view;
  view.data = static_cast<char*>(const_cast<void*>(static_cast<const void*>(array.data())));
  view.type = type_of(array.dtype());
  for (size_t d = 0; d < array.ndim(); ++d) {
    view.shape.push_back(static_cast<int64_t>(array.shape(d)));
    view.strides.push_back(array.stride(d));
  }
  return view;
}

std::vector<float> floats(const RowKernels& kernels, const Given& array) {
  const Strided view = strided(array);
  require(view.shape.size() == 1, "a weight has one dim");
  std::vector<float> values(view.width());
  view.copy_row(kernels, 0, values.data());
  return values;
}

// The threads and the kernels that a call asks for.
struct Means {
  Pool& pool;
  int num_threads;
  const RowKernels& kernels;

  // body(task, buffer) for each task, on as many threads as its values are worth; each has a buffer of its own.
  template <class Body>
  void run(int64_t num_tasks, int64_t num_values, int64_t buffer_floats, const Body& body) const {
    const int64_t useful = std::min(num_tasks, 1 + num_values / kValuesPerThread);
    const int most = std::min(std::max(num_threads, 1), pool.max_threads());
    const int threads = static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(useful, 1)));
    const int64_t stride = (buffer_floats + 15) / 16 * 16;
    const Lines buffers(threads * stride);
    const int64_t run_length = std::max<int64_t>(1, num_tasks / (threads * 8));
    nb::gil_scoped_release unlocked;
    pool.run(threads, 1, [&](int thread, Team& team) {
      float* buffer = buffers.data() + thread * stride;
      for (int64_t first; (first = team.next(0) * run_length) < num_tasks;) {
        const int64_t end = std::min(num_tasks, first + run_length);
        for (int64_t task = first; task < end; ++task) body(task, buffer);
      }
    });
  }
};

void rms_norm(Pool& pool, int num_threads, const std::string& set, const Given& x, const Given& weight,
              float eps, const Written& out) {
  const Means means{pool, num_threads, rows_named(set)};
  const Strided from = strided(x), to = strided(out);
  const std::vector<float> scales = floats(means.kernels, weight);
  require(from.shape == to.shape && from.width() == static_cast<int64_t>(scales.size()), "shapes do not fit");
  const int width = from.width();
  means.run(from.num_rows(), from.num_values(), 2 * width, [&](int64_t row, float* buffer) {
    means.kernels.rms_norm(from.row(means.kernels, row, buffer), scales.data(), eps, width, buffer + width);
    to.set_row(means.kernels, row, buffer + width);
  });
}

void add_rms_norm(Pool& pool, int num_threads, const std::string& set, const Given& update,
                  const Written& residual, const Given& weight, float eps, const Written& out) {
  const Means means{pool, num_threads, rows_named(set)};
  const Strided from = strided(update), total = strided(residual), to = strided(out);
  const std::vector<float> scales = floats(means.kernels, weight);
  require(from.shape == to.shape && from.shape == total.shape, "shapes do not fit");
  require(from.width() == static_cast<int64_t>(scales.size()), "there is one weight for each column");
  const int width = from.width();
  means.run(from.num_rows(), from.num_values(), 3 * width, [&](int64_t row, float* buffer) {
    float *sum = buffer + width, *normed = buffer + 2 * width;
    total.copy_row(means.kernels, row, sum);
    means.kernels.add(sum, from.row(means.kernels, row, buffer), width);
    // The norm is of the sum as it is kept.
    total.set_row(means.kernels, row, sum);
    means.kernels.rms_norm(total.row(means.kernels, row, sum), scales.data(), eps, width, normed);
    to.set_row(means.kernels, row, normed);
  });
}

template <class Gate>
void gate_rows(const Means& means, const Given& x, const Written& out, const Gate& gate) {
  const Strided from = strided(x), to = strided(out);
  require(from.num_rows() == to.num_rows() && from.width() == 2 * to.width(), "shapes do not fit");
  const int width = to.width();
  means.run(to.num_rows(), from.num_values(), 3 * width, [&](int64_t row, float* buffer) {
    const float* values = from.row(means.kernels, row, buffer);
    gate(values, values + width, width, buffer + 2 * width);
    to.set_row(means.kernels, row, buffer + 2 * width);
  });
}

void silu_and_mul(Pool& pool, int num_threads, const std::string& set, const Given& x, const Written& out) {
  const Means means{pool, num_threads, rows_named(set)};
  gate_rows(means, x, out, means.kernels.silu_and_mul);
}

void gelu_and_mul(Pool& pool, int num_threads, const std::string& set, const Given& x, bool tanh,
                  const Written& out) {
  const Means means{pool, num_threads, rows_named(set)};
  gate_rows(means, x, out, [&](const float* gate, const float* up, int n, float* result) {
    means.kernels.gelu_and_mul(gate, up, n, tanh, result);
  });
}

void rope(Pool& pool, int num_threads, const std::string& set, const Given& x, const Given& cos,
          const Given& sin, bool interleaved, const Written& out) {
  const Means means{pool, num_threads, rows_named(set)};
  const Strided from = strided(x), to = strided(out), cosines = strided(cos), sines = strided(sin);
  require(from.shape.size() == 3 && from.shape == to.shape, "heads are [token, head, head_dim]");
  require(cosines.shape.size() == 2 && cosines.shape == sines.shape && cosines.shape[0] == from.shape[0] &&
              2 * cosines.width() <= from.width(),
          "angles are [token, rotated / 2]");
  const int width = from.width(), half = cosines.width();
  const int64_t num_heads = from.shape[1];
  means.run(from.shape[0], from.num_values(), width + 2 * half, [&](int64_t token, float* buffer) {
    const float* c = cosines.row(means.kernels, token, buffer + width);
    const float* s = sines.row(means.kernels, token, buffer + width + half);
    for (int64_t head = token * num_heads; head < (token + 1) * num_heads; ++head) {
      from.copy_row(means.kernels, head, buffer);
      means.kernels.rope(buffer, 1, width, c, s, half, interleaved);
      to.set_row(means.kernels, head, buffer);
    }
  });
}

void kv_store(Pool& pool, int num_threads, const std::string& set, const Given& k, const Given& v,
              const Written& k_pool, const Written& v_pool, const Longs& slots) {
  const Means means{pool, num_threads, rows_named(set)};
  const Strided from[] = {strided(k), strided(v)}, to[] = {strided(k_pool), strided(v_pool)};
  require(to[0].shape.size() == 4 && to[0].shape == to[1].shape, "pools are [KV head, page, slot, head_dim]");
  const int64_t num_heads = to[0].shape[0], num_slots = to[0].shape[1] * to[0].shape[2];
  const std::vector<int64_t> rows = {static_cast<int64_t>(slots.shape(0)), num_heads, to[0].width()};
  require(from[0].shape == rows && from[1].shape == rows, "rows are [token, KV head, head_dim]");
  const int64_t* slot_of = slots.data();
  require(std::all_of(slot_of, slot_of + rows[0], [&](int64_t slot) { return slot < num_slots; }),
          "a slot lies beyond the pool");
  means.run(rows[0], 2 * from[0].num_values(), to[0].width(), [&](int64_t token, float* buffer) {
    if (slot_of[token] < 0) return;
    for (int which = 0; which < 2; ++which) {
      for (int64_t head = 0; head < num_heads; ++head) {
        const float* row = from[which].row(means.kernels, token * num_heads + head, buffer);
        to[which].set_row(means.kernels, head * num_slots + slot_of[token], row);
      }
    }
  });
}

// Rows of one sequence with the query heads of one KV head.
struct AttentionTask {
  int64_t sequence, kv_head;
  int first_row, num_rows, num_keys;
};

// The arguments of attention_extend and attention_decode, checked; rows of q and out are dense [row, heads *
// dim] views or go through buffers.
struct PagedCall {
  Strided q, k, v, out;
  const int32_t* page_table;
  int64_t table_stride;
  std::vector<float> sinks;
  Attention shape{};

  int64_t num_heads() const { return q.shape[1]; }
  int64_t num_kv_heads() const { return k.shape[0]; }

  void check() const {
    require(q.shape.size() == 3 && q.shape == out.shape, "queries and results are [row, head, head_dim]");
    require(k.shape.size() == 4 && k.shape == v.shape && k.type == v.type,
            "pools are [KV head, page, slot, head_dim]");
    require(k.strides == v.strides && k.strides[3] == 1, "pools have one layout, with dense head dims");
    require(num_heads() % num_kv_heads() == 0 && q.width() == k.width() && q.width() % 16 == 0,
            "heads do not fit");
    require(sinks.empty() || static_cast<int64_t>(sinks.size()) == num_heads(),
            "there is one sink for each head");
  }

  void check_pages(int64_t sequence, int64_t num_keys, int64_t table_width) const {
    const int64_t num_pages = (num_keys + k.shape[2] - 1) / k.shape[2];
    const int32_t* pages = page_table + sequence * table_stride;
    require(num_keys >= 0 && num_pages <= table_width, "a sequence has more keys than its pages");
    require(std::all_of(pages, pages + num_pages, [&](int32_t page) { return page >= 0 && page < k.shape[1]; }),
            "a page lies beyond the pool");
  }

  int64_t group() const { return num_heads() / num_kv_heads(); }
  int64_t group_width() const { return group() * q.width(); }

  Attention call_of(const AttentionTask& task) const {
    Attention call = shape;
    call.type = k.type;
    const int64_t head = task.kv_head * k.strides[0] * kv_bytes(k.type);
    call.k = k.data + head;
    call.v = v.data + head;
    call.page_stride = k.strides[1];
    call.slot_stride = k.strides[2];
    call.pages = page_table + task.sequence * table_stride;
    call.page_size = static_cast<int32_t>(k.shape[2]);
    call.head_dim = q.width();
    call.num_heads = static_cast<int32_t>(group());
    call.num_rows = task.num_rows;
    call.num_keys = call.end_key = task.num_keys;
    call.sinks = sinks.empty() ? nullptr : sinks.data() + task.kv_head * group();
    call.q_stride = call.out_stride = group_width();
    return call;
  }

  // Queries, results, then the kernel's scratch at a cache line.
  int64_t buffer_floats(const RowKernels& kernels, const AttentionTask& task) const {
    return scratch_at(task) + kernels.attention_scratch_bytes(call_of(task)) / 4;
  }

  void run(const RowKernels& kernels, const AttentionTask& task, float* buffer) const {
    Attention call = call_of(task);
    const int64_t rows_floats = task.num_rows * group_width();
    float *queries = buffer, *results = buffer + rows_floats;
    for (int64_t i = 0; i < task.num_rows * group(); ++i) {
      q.copy_row(kernels, row_of(task, i), queries + i * q.width());
    }
    call.q = queries;
    call.out = results;
    kernels.attend(call, reinterpret_cast<uint8_t*>(buffer + scratch_at(task)));
    for (int64_t i = 0; i < task.num_rows * group(); ++i) {
      out.set_row(kernels, row_of(task, i), results + i * q.width());
    }
  }

 private:
  int64_t scratch_at(const AttentionTask& task) const {
    return (2 * task.num_rows * group_width() + 15) / 16 * 16;
  }

  // Number of the vector along head_dim of q and out that is the i-th of a task.
  int64_t row_of(const AttentionTask& task, int64_t i) const {
    return (task.first_row + i / group()) * num_heads() + task.kv_head * group() + i % group();
  }
};

void set_zero(const RowKernels& kernels, const Strided& out, int64_t first_row, int64_t end_row) {
  const std::vector<float> zeros(out.width(), 0.0f);
  const int64_t num_heads = out.shape[1];
  for (int64_t i = first_row * num_heads; i < end_row * num_heads; ++i) out.set_row(kernels, i, zeros.data());
}

// The rows of one sequence as tasks, those that see the most keys first.
void add_tasks(int64_t sequence, int64_t first, int64_t end, int num_keys, int64_t num_kv_heads,
               std::vector<AttentionTask>& tasks) {
  for (int64_t last = end; last > first; last -= kAttentionRows) {
    const int num_rows = static_cast<int>(std::min<int64_t>(kAttentionRows, last - first));
    const int first_row = static_cast<int>(last - num_rows), seen = num_keys - static_cast<int>(end - last);
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      tasks.push_back({sequence, head, first_row, num_rows, seen});
    }
  }
}

// One row for each sequence where `cu_rows` is left out.
void attend(Pool& pool, int num_threads, const std::string& set, const Given& q, const Given& k_pool,
            const Given& v_pool, const Tables& page_table, const std::optional<Ints>& cu_rows,
            const Ints& num_keys, const std::optional<Given>& sinks, const Written& out, float scale,
            int window, float soft_cap) {
  const Means means{pool, num_threads, rows_named(set)};
  PagedCall call{
      strided(q), strided(k_pool), strided(v_pool), strided(out), page_table.data(), page_table.stride(0), {}};
  if (sinks) call.sinks = floats(means.kernels, *sinks);
  call.shape.scale = scale;
  call.shape.window = window;
  call.shape.soft_cap = soft_cap;
  call.check();
  const int64_t num_sequences = num_keys.shape(0), num_rows = call.q.shape[0];
  const int64_t num_tables = page_table.shape(0), table_width = page_table.shape(1);
  const int64_t num_bounds = cu_rows ? cu_rows->shape(0) : num_rows + 1;
  require(num_tables == num_sequences && (table_width < 2 || page_table.stride(1) == 1),
          "the page table has a dense row for each sequence");
  require(num_bounds == num_sequences + 1, "each sequence has its first row and its end");
  std::vector<AttentionTask> tasks;
  int64_t row = 0;
  for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
    const int64_t first = row, keys = num_keys.data()[sequence];
    row = cu_rows ? cu_rows->data()[sequence + 1] : sequence + 1;
    require(row >= first && row <= num_rows, "cu_rows grows up to the number of rows");
    call.check_pages(sequence, keys, table_width);
    if (keys == 0) {
      set_zero(means.kernels, call.out, first, row);
    } else {
      require(row - first <= keys, "new tokens are among a sequence's keys");
      add_tasks(sequence, first, row, static_cast<int>(keys), call.num_kv_heads(), tasks);
    }
  }
  set_zero(means.kernels, call.out, row, num_rows);
  int64_t num_values = 0, buffer_floats = 0;
  for (const AttentionTask& task : tasks) {
    num_values += 2LL * task.num_keys * call.q.width();
    buffer_floats = std::max(buffer_floats, call.buffer_floats(means.kernels, task));
  }
  means.run(static_cast<int64_t>(tasks.size()), num_values, buffer_floats,
            [&](int64_t task, float* buffer) { call.run(means.kernels, tasks[task], buffer); });
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rms_norm", rms_norm, "pool"_a, "num_threads"_a, "instruction_set"_a, "x"_a, "weight"_a, "eps"_a,
        "out"_a, "Writes the norms of the vectors along the last dim.");
  m.def("add_rms_norm", add_rms_norm, "pool"_a, "num_threads"_a, "instruction_set"_a, "update"_a, "residual"_a,
        "weight"_a, "eps"_a, "out"_a, "Adds `update` to `residual` and writes the norms of the sums.");
  m.def("silu_and_mul", silu_and_mul, "pool"_a, "num_threads"_a, "instruction_set"_a, "x"_a, "out"_a,
        "Writes silu(first half) * second half of the last dim.");
  m.def("gelu_and_mul", gelu_and_mul, "pool"_a, "num_threads"_a, "instruction_set"_a, "x"_a, "tanh"_a, "out"_a,
        "Writes gelu(first half) * second half of the last dim.");
  m.def("rope", rope, "pool"_a, "num_threads"_a, "instruction_set"_a, "x"_a, "cos"_a, "sin"_a, "interleaved"_a,
        "out"_a, "Writes heads [token, head, head_dim] with their first pairs rotated.");
  m.def("kv_store", kv_store, "pool"_a, "num_threads"_a, "instruction_set"_a, "k"_a, "v"_a, "k_pool"_a,
        "v_pool"_a, "slots"_a, "Writes keys and values into their slots; a negative slot is padding.");
  m.def("attend", attend, "pool"_a, "num_threads"_a, "instruction_set"_a, "q"_a, "k_pool"_a, "v_pool"_a,
        "page_table"_a, "cu_rows"_a.none(), "num_keys"_a, "sinks"_a.none(), "out"_a, "scale"_a, "window"_a,
        "soft_cap"_a,
        "Writes the attention of each sequence's last tokens, or of its last one without `cu_rows`.");
}

}  // namespace lockstep
