// The second product of a mixture of experts, for few tokens, on NVIDIA's Hopper:
// out[token, row] = sum over choices of share * sum over inputs of weight[expert, row, input] * inner[token, choice, input].
//
// A thread block has ROWS rows of one token, TURN_ROWS in a turn. Each warp copies AT_ONCE rows of one expert after the
// other into shared memory of its own, the first ones before the kernel's predecessor has ended. A turn has all choices:
// tokens with an expert in common read its rows at about the same time, all but the first from the device's cache.
// The order of sums is the same in every block: the inputs of a lane, choices, lanes.
//
// Set by whoever compiles (hopper_down.py): INPUTS (a multiple of 8), TOP_K (1 to 32), ROWS, WARPS, AT_ONCE, STAGES (of a
// warp, on their way), HALF.
// Source: PTX ISA, "cp.async.bulk".

constexpr u32 ROW_BYTES = 2 * INPUTS;
constexpr u32 STAGE_BYTES = AT_ONCE * ROW_BYTES;
constexpr u32 INNER_BYTES = TOP_K * ROW_BYTES;
constexpr u32 TURN_ROWS = WARPS * AT_ONCE;
constexpr u32 CHUNKS = INPUTS / 8;             // of 16 bytes, of a row
constexpr u32 LOADS = (CHUNKS + 31) / 32;      // of one lane
constexpr u32 UNROLLED = LOADS < 8 ? LOADS : 4;
constexpr u32 ALL = 0xffffffffu;

struct Choice {
    const u16* rows;  // of its expert
    u32 inner;        // where its inputs lie in shared memory
    float share;
};

__device__ __forceinline__ void copy(u32 to, const u16* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

__device__ __forceinline__ uint4 chunk_at(u32 address) {
    uint4 chunk;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w) : "r"(address) : "memory");
    return chunk;
}

struct Eight {
    float values[8];
};

__device__ __forceinline__ Eight eight_at(u32 address) {
    const uint4 chunk = chunk_at(address);
    const u32 pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    Eight eight;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        eight.values[2 * i] = widened(static_cast<u16>(pairs[i]));
        eight.values[2 * i + 1] = widened(static_cast<u16>(pairs[i] >> 16));
    }
    return eight;
}

// What one lane adds to the totals of AT_ONCE rows.
__device__ __forceinline__ void add_products(float (&total)[AT_ONCE], u32 rows, const Choice& choice, u32 lane) {
    float sum[AT_ONCE] = {};
#pragma unroll UNROLLED
    for (u32 load = 0; load < LOADS; ++load) {
        const u32 chunk = 32 * load + lane;
        if (CHUNKS % 32 != 0 && chunk >= CHUNKS) break;
        const Eight inputs = eight_at(choice.inner + 16 * chunk);
#pragma unroll
        for (u32 row = 0; row < AT_ONCE; ++row) {
            const Eight weights = eight_at(rows + row * ROW_BYTES + 16 * chunk);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) sum[row] = fmaf(weights.values[i], inputs.values[i], sum[row]);
        }
    }
#pragma unroll
    for (u32 row = 0; row < AT_ONCE; ++row) total[row] = fmaf(choice.share, sum[row], total[row]);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) weighted_down(
    const u16* weight,   // [expert, width, INPUTS]
    const u16* inner,    // [token, TOP_K, INPUTS]
    const float* shares, // [token, TOP_K]
    const int* ids,      // [token, TOP_K]: less than 0 for none
    u16* out,            // [token, width]
    u32 tokens,
    u32 width,
    u32 token_stride,    // of ids
    u32 choice_stride) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ __align__(8) u64 full_barriers[WARPS * STAGES], inner_barrier;
    __shared__ Choice choices_of[WARPS][TOP_K];

    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    // Blocks that may share weights follow each other.
    const u32 token = blockIdx.x % tokens, block_row = blockIdx.x / tokens * ROWS;
    const u32 first_row = block_row + warp * AT_ONCE, end = min(block_row + ROWS, width);
    const u32 inner_memory = shared_address(memory);
    const u32 ring = inner_memory + INNER_BYTES + warp * STAGES * STAGE_BYTES;
    const u32 full = shared_address(full_barriers + warp * STAGES), inner_there = shared_address(&inner_barrier);

    // The routing is older than the kernel before this one, the first product, which let this one start when it had waited
    // for all that was before it.
    int expert = -1;
    float share = 0.0f;
    if (lane < TOP_K) {
        expert = static_cast<int>(fresh_word(ids + static_cast<u64>(token) * token_stride + lane * choice_stride));
        share = __uint_as_float(fresh_word(shares + token * TOP_K + lane));
    }
    if (lane == 0) {
        for (u32 stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1);
        if (thread == 0) barrier_init(inner_there, 1);
        barriers_made();
    }
    const u32 chosen = __ballot_sync(ALL, expert >= 0), num_chosen = __popc(chosen);
    Choice* choices = choices_of[warp];
    if (expert >= 0) {
        const u16* rows = weight + static_cast<u64>(expert) * width * INPUTS;
        choices[__popc(chosen & ((1u << lane) - 1))] = {rows, inner_memory + lane * ROW_BYTES, share};
    }
    __syncwarp();

    u32 next_row = num_chosen > 0 ? first_row : end, next_choice = 0;
    auto request = [&](u32 stage) {
        if (next_row >= end) return;
        if (lane == 0) {
            const u32 bytes = min(end - next_row, (u32)AT_ONCE) * ROW_BYTES, barrier = full + 8 * stage;
            barrier_expect(barrier, bytes);
            const u16* from = choices[next_choice].rows + static_cast<u64>(next_row) * INPUTS;
            copy(ring + stage * STAGE_BYTES, from, bytes, barrier);
        }
        if (++next_choice == num_chosen) next_choice = 0, next_row += TURN_ROWS;
    };
    for (u32 stage = 0; stage < STAGES; ++stage) request(stage);
    __syncthreads();

    wait_for_inputs();
    start_next();
    if (thread == 0) {
        barrier_expect(inner_there, INNER_BYTES);
        copy(inner_memory, inner + static_cast<u64>(token) * TOP_K * INPUTS, INNER_BYTES, inner_there);
    }
    barrier_wait(inner_there, 0);

    u32 stage = 0, parity = 0;
    for (u32 row = first_row; row < end; row += TURN_ROWS) {
        float total[AT_ONCE] = {};
        for (u32 i = 0; i < num_chosen; ++i) {
            barrier_wait(full + 8 * stage, parity);
            add_products(total, ring + stage * STAGE_BYTES, choices[i], lane);
            __syncwarp();
            request(stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (u32 across = 16; across > 0; across /= 2) total[i] += __shfl_xor_sync(ALL, total[i], across);
            if (lane == i && row + i < end) out[static_cast<u64>(token) * width + row + i] = rounded(total[i]);
        }
    }
}
