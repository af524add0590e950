// Included inside the anonymous namespace of each unit of the row kernels, first.

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
