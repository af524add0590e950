// What a decoder does between its products: norms, activations, rotation, attention over pages. All maths in float32,
// but for several rows over a bfloat16 pool where the instruction set multiplies pairs of bfloat16: there queries keep
// 16 bits (8 where the call allows) and weights 8.
//
// Every instruction set gives one table of these functions; callers choose a table once. Nothing here knows threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lockstep {

enum class KVType : uint8_t { kF32, kBF16, kF16 };

constexpr int64_t kv_bytes(KVType type) { return type == KVType::kF32 ? 4 : 2; }

// Queries of consecutive tokens of one sequence over the keys of one KV head.
//
// Row i (0 <= i < num_rows) sees keys [lo, num_keys - num_rows + 1 + i), lo = max(0, that end - window) where window is
// not 0. Only keys in [first_key, end_key) are looked at, so that long contexts can be split and merged;
// the whole is 0 and num_keys. Key t lies at slot t % page_size of page pages[t / page_size].
struct Attention {
  KVType type;
  const void* k;  // this KV head's [pages, page_size, head_dim]
  const void* v;
  const int32_t* pages;
  int32_t page_size;
  int32_t head_dim;       // a multiple of 16
  int32_t num_heads;      // query heads of this KV head
  int32_t num_rows;
  int32_t num_keys;
  int32_t first_key, end_key;
  int32_t window;         // 0: none
  float scale, soft_cap;  // soft_cap 0: none
  const float* sinks;     // [num_heads], or null; a call over part of the keys leaves them to `merge`
  const float* q;         // row i, head h at q + i * q_stride + h * head_dim
  int64_t q_stride;
  float* out;             // the same for results, normalised over the keys looked at; zeros where there are none
  int64_t out_stride;
  float* lse;             // null, or [num_rows, num_heads]: log of the sum of exp(score), -inf where there are no keys
  int64_t page_stride, slot_stride;  // elements between pages, and between their slots; 0: dense as above
  bool rounds_q;          // q may be rounded to the pool's type, which saves products where several rows share a call
};

struct RowKernels {
  const char* name;

  // out = x * weight / sqrt(mean(x^2) + eps)
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  // residual += update, then the norm of the sum
  void (*add_rms_norm)(float* residual, const float* update, const float* weight, float eps, int n, float* out);
  void (*add)(float* x, const float* y, int n);  // x += y
  // Rotates pairs (i, i + half), or (2 i, 2 i + 1) where interleaved, of num_heads heads that lie head_dim apart.
  void (*rope)(float* heads, int num_heads, int head_dim, const float* cos, const float* sin, int half,
               bool interleaved);
  void (*silu_and_mul)(const float* gate, const float* up, int n, float* out);
  void (*gelu_and_mul)(const float* gate, const float* up, int n, bool tanh, float* out);
  // Rounds to the pool's type (to nearest even) and back.
  void (*to_kv)(KVType type, const float* x, int n, void* out);
  void (*from_kv)(KVType type, const void* x, int n, float* out);

  // `scratch`: attention_scratch_bytes of the caller's thread, 64-byte aligned.
  void (*attend)(const Attention& call, uint8_t* scratch);
  int64_t (*attention_scratch_bytes)(const Attention& call);
  // Merges `num_parts` results of one row and head, `stride` floats apart, by their log-sums; `sink` (or -inf) takes
  // its share of the weight and adds nothing.
  void (*merge)(const float* parts, const float* lse, int num_parts, int64_t stride, int head_dim, float sink,
                float* out);
  // Index of the largest value, the first of equals.
  int (*argmax)(const float* x, int n);
};

const RowKernels* rows_scalar();
const RowKernels* rows_avx2();
const RowKernels* rows_avx512();
const RowKernels* rows_avx512_bf16();  // may be rows_avx512's functions where bfloat16 products bring nothing
const RowKernels* rows_neon();

}  // namespace lockstep
