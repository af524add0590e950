// Products of rows with a constant weight on NVIDIA's Hopper: out[row, output] = sum over inputs of x * weight.
//
// A warp copies blocks of both matrices into shared memory, warpgroups multiply them there. The weight is the left
// matrix of the instruction, so that few rows fill it too (it takes 64 outputs and 8 to 256 rows), and the weight's
// first blocks are copied before the kernel's predecessor has ended. Thread blocks of a cluster share the inputs of
// their outputs (SPLITS) and add up what they have, in their order.
//
// With BEST only the largest result of each row is written, and where it is: of each warpgroup's share of the outputs.
//
// Set by whoever compiles (hopper.py): WARPGROUPS, TOKENS, STAGES, SPLITS, GATED, BIAS, BEST, HALF, RESULT_ROWS,
// REGISTERS of a thread that multiplies and COPY_REGISTERS of others (0: all have as many), and MULTIPLY, the instruction
// for 64 outputs, ROWS rows and 16 inputs.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".

constexpr u32 OUTPUTS = 64 * WARPGROUPS;
constexpr u32 BLOCK = 64;                // inputs of a stage: a line of shared memory as it is swizzled
constexpr u32 LINE = 2 * BLOCK;          // its bytes
constexpr u32 WEIGHT_BYTES = OUTPUTS * LINE;
constexpr u32 TOKEN_BYTES = TOKENS * LINE;
constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr u32 MULTIPLIERS = 128 * WARPGROUPS;
constexpr u32 TOTALS = TOKENS / 2;               // of one thread
constexpr u32 OWN = TOTALS / SPLITS;             // of those, what it finishes
constexpr u32 OWN_TOKENS = TOKENS / SPLITS;
constexpr u32 BLOCK_OUTPUTS = GATED ? OUTPUTS / 2 : OUTPUTS;  // of the result
constexpr u32 WIDTH = GATED ? 32 : 64;           // results of a row that one warpgroup has
constexpr u32 PITCH = 2 * WIDTH + 16;            // bytes between rows of results, so that banks differ
constexpr u32 RESULT_BYTES = RESULT_ROWS * PITCH;       // of one warpgroup
constexpr u32 SUM_BYTES = SPLITS > 1 ? OUTPUTS * TOKENS * 4 : 0;
constexpr u32 RESULTS = STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES;  // where they lie

__device__ __forceinline__ void copy_block(
    u32 to, const TensorMap* map, u32 input, u32 row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(input), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}

// Eight gates, the eight ups that belong to them, and so on: the matrix as input, of 8, gate or up, by 8.
__device__ __forceinline__ void copy_pairs(
    u32 to, const TensorMap* map, u32 input, u32 eight, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(to), "l"(map), "r"(input), "r"(0), "r"(eight), "r"(barrier),
        "l"(policy)
        : "memory");
}

// A matrix of lines of 128 swizzled bytes; eight lines are 1,024.
__device__ __forceinline__ u64 matrix_at(u32 address) {
    return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ float gated(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

#if BEST
constexpr u32 NUMBER_INFINITE = HALF ? 0x7c00 : 0x7f80;
constexpr u32 ROUNDS = (RESULT_ROWS + 15) / 16;                // in which a warpgroup reads results, sixteen rows each
constexpr u32 READ = TOKENS / RESULT_ROWS * ROUNDS;            // rows that a thread reads eight results of
constexpr u32 KEPT = (READ + 7) / 8;                           // of those, whose best it keeps
constexpr int NONE = -0x80000000;

// 16 bits in the order of the numbers that they are: both zeros are equal, what is no number is above all.
__device__ __forceinline__ int rank_of(u32 bits) {
    const u32 size = bits & 0x7fff;
    const int number = static_cast<short>(bits), rank = number ^ ((number >> 15) & 0x7fff);
    return size > NUMBER_INFINITE ? 0x7fff : size == 0 ? 0 : rank;
}

// The largest of eight results that lie side by side: its rank above, the complement of its place of 64 below.
__device__ __forceinline__ int best_of(const uint4& values, u32 eight) {
    const u32 pairs[4] = {values.x, values.y, values.z, values.w};
    int best = NONE;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const int place = 63 - static_cast<int>(8 * eight + 2 * i);
        best = max(best, (rank_of(pairs[i] & 0xffff) << 16) + place);
        best = max(best, (rank_of(pairs[i] >> 16) << 16) + place - 1);
    }
    return best;
}

// As ops/argmax has it: the rank of the value in float32 above, the complement of its place in the row below.
__device__ __forceinline__ long long candidate_of(int best, u32 first_output) {
    const int rank = best >> 16;
    const float value = widened(static_cast<u16>(rank ^ ((rank >> 15) & 0x7fff)));
    const int bits = __float_as_int(value);
    const int of_value = rank == 0x7fff ? 0x7fffffff : rank == 0 ? 0 : bits ^ ((bits >> 31) & 0x7fffffff);
    const u32 place = first_output + 63 - (best & 63);
    return (static_cast<long long>(of_value) << 32) | (place ^ 0x7fffffff);
}
#endif

struct Place {
    u32 token, output;  // the first of the weight's outputs, or of its gates
};

// Blocks that share weights follow each other.
__device__ __forceinline__ Place place_of(u32 turn, u32 token_blocks) {
    return {turn % token_blocks * TOKENS, turn / token_blocks * BLOCK_OUTPUTS};
}

extern "C" __global__ void __launch_bounds__(MULTIPLIERS + 128, 1) product(
    const __grid_constant__ TensorMap weight_map,
    const __grid_constant__ TensorMap token_map,
    const u16* __restrict__ bias,
    u16* __restrict__ out,  // [num_tokens, outputs]; with BEST int64 candidates [num_tokens, warpgroups of all blocks]
    u32 num_tokens,
    u32 outputs,  // of the result
    u32 inputs,
    u32 next_first) {  // the next kernel may start before this one waits
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 full_barriers[STAGES], empty_barriers[STAGES];

    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 split = SPLITS > 1 ? cluster_rank() : 0;
    const u32 stages = shared_address(memory);
    const u32 full = shared_address(full_barriers), empty = shared_address(empty_barriers);
    const bool copies = thread == MULTIPLIERS;

    const u32 all_blocks = (inputs + BLOCK - 1) / BLOCK;
    const u32 share = (all_blocks + SPLITS - 1) / SPLITS;
    const u32 first_block = min(split * share, all_blocks);
    const u32 blocks = min(share, all_blocks - first_block);

    const u32 token_blocks = (num_tokens + TOKENS - 1) / TOKENS;
    const u32 turns = token_blocks * ((outputs + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS);
    const u32 first_turn = blockIdx.x / SPLITS, step = gridDim.x / SPLITS;

    u64 read_once, read_often;
    u32 early = 0;  // blocks of weights that are on their way

    if (copies) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once));
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(read_often));
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, WARPGROUPS * 4);
        }
        barriers_made();
        const Place place = place_of(first_turn, token_blocks);
        for (; early < min(blocks, (u32)STAGES); ++early) {
            barrier_expect(full + 8 * early, STAGE_BYTES);
            const u32 to = stages + early * STAGE_BYTES, input = (first_block + early) * BLOCK;
            if (GATED) copy_pairs(to, &weight_map, input, place.output / 8, full + 8 * early, read_once);
            else copy_block(to, &weight_map, input, place.output, full + 8 * early, read_once);
        }
    }
    if (SPLITS > 1) {
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }

    if (thread >= MULTIPLIERS) {
#if REGISTERS > 0
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
#endif
        if (copies) {
            if (next_first) start_next();
            wait_for_inputs();
            if (!next_first) start_next();
            u32 stage = 0, parity = 0;
            for (u32 turn = first_turn; turn < turns; turn += step) {
                const Place place = place_of(turn, token_blocks);
                for (u32 block = 0; block < blocks; ++block) {
                    const u32 to = stages + stage * STAGE_BYTES, input = (first_block + block) * BLOCK;
                    const u32 barrier = full + 8 * stage;
                    if (early == 0) {
                        barrier_wait(empty + 8 * stage, parity ^ 1);
                        barrier_expect(barrier, STAGE_BYTES);
                        if (GATED) copy_pairs(to, &weight_map, input, place.output / 8, barrier, read_once);
                        else copy_block(to, &weight_map, input, place.output, barrier, read_once);
                    } else {
                        --early;
                    }
                    copy_block(to + WEIGHT_BYTES, &token_map, input, place.token, barrier, read_often);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
        if (SPLITS > 1) cluster_sync();
    } else {
#if REGISTERS > 0
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
        const u32 warpgroup = warp / 4;
        unsigned char* result_memory = memory + RESULTS + warpgroup * RESULT_BYTES;
        u32 stage = 0, parity = 0;
#if BEST
        long long kept[KEPT];
#pragma unroll
        for (u32 i = 0; i < KEPT; ++i) kept[i] = static_cast<long long>(1ull << 63);
#endif
        for (u32 turn = first_turn; turn < turns; turn += step) {
            const Place place = place_of(turn, token_blocks);
            float total[TOTALS];
#pragma unroll
            for (u32 i = 0; i < TOTALS; ++i) total[i] = 0.0f;
            u32 before = 0;
            for (u32 block = 0; block < blocks; ++block) {
                barrier_wait(full + 8 * stage, parity);
                const u32 at = stages + stage * STAGE_BYTES;
                const u64 weight = matrix_at(at + warpgroup * 64 * LINE), rows = matrix_at(at + WEIGHT_BYTES);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
#pragma unroll
                    for (u32 part = 0; part < TOKENS / ROWS; ++part) {
                        MULTIPLY((total + part * (ROWS / 2)), weight + 2 * i, rows + part * (ROWS * LINE >> 4) + 2 * i);
                    }
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (block > 0 && lane == 0) barrier_arrive(empty + 8 * before);
                before = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (u32 i = 0; i < TOTALS; ++i) asm volatile("" : "+f"(total[i])::"memory");
            if (blocks > 0 && lane == 0) barrier_arrive(empty + 8 * before);

            float own[OWN];
            if (SPLITS > 1) {
                // All of a thread's totals to shared memory, four at a time beside those of its neighbours.
                asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory");
                float4* totals = reinterpret_cast<float4*>(memory);
#pragma unroll
                for (u32 i = 0; i < TOTALS / 4; ++i) {
                    totals[i * MULTIPLIERS + thread] =
                        make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
                }
                cluster_sync();
#pragma unroll
                for (u32 i = 0; i < OWN; ++i) own[i] = 0.0f;
                const u32 mine = stages + (split * (OWN / 4) * MULTIPLIERS + thread) * 16;
#pragma unroll
                for (u32 other = 0; other < SPLITS; ++other) {
                    const u32 from = place_in(mine, other);
#pragma unroll
                    for (u32 i = 0; i < OWN / 4; ++i) {
                        float a, b, c, d;
                        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                                     : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
                                     : "r"(from + i * MULTIPLIERS * 16)
                                     : "memory");
                        own[4 * i] += a, own[4 * i + 1] += b, own[4 * i + 2] += c, own[4 * i + 3] += d;
                    }
                }
            } else {
#pragma unroll
                for (u32 i = 0; i < OWN; ++i) own[i] = total[i];
            }

            const u32 first_token = place.token + split * OWN_TOKENS;
            const u32 first_output = place.output + warpgroup * WIDTH;
            const u32 column = (GATED ? warp % 4 * 8 : warp % 4 * 16) + lane / 4;
            float low = 0.0f, high = 0.0f;
            if (BIAS) {
                const u32 output = first_output + column;
                if (GATED) {
                    if (output < outputs) low = widened(bias[output]), high = widened(bias[outputs + output]);
                } else {
                    if (output < outputs) low = widened(bias[output]);
                    if (output + 8 < outputs) high = widened(bias[output + 8]);
                }
            }
#pragma unroll
            for (u32 part = 0; part < OWN_TOKENS / RESULT_ROWS; ++part) {
#pragma unroll
                for (u32 i = 0; i < RESULT_ROWS / 8; ++i) {
                    const float* four = own + 4 * (part * (RESULT_ROWS / 8) + i);
                    unsigned char* to = result_memory + (8 * i + 2 * (lane % 4)) * PITCH + 2 * column;
                    if (GATED) {
                        *reinterpret_cast<u16*>(to) = rounded(gated(four[0] + low, four[2] + high));
                        *reinterpret_cast<u16*>(to + PITCH) = rounded(gated(four[1] + low, four[3] + high));
                    } else {
                        *reinterpret_cast<u16*>(to) = rounded(four[0] + low);
                        *reinterpret_cast<u16*>(to + PITCH) = rounded(four[1] + low);
                        *reinterpret_cast<u16*>(to + 16) = rounded(four[2] + high);
                        *reinterpret_cast<u16*>(to + PITCH + 16) = rounded(four[3] + high);
                    }
                }
                asm volatile("bar.sync %0, 128;" ::"r"(2 + warpgroup) : "memory");
#if BEST
                // Eight lanes have the results of a row. Each keeps the best of every eighth row that they read.
#pragma unroll
                for (u32 round = 0; round < ROUNDS; ++round) {
                    const u32 i = thread % 128 + 128 * round, row = i / 8, eight = i % 8, read = part * ROUNDS + round;
                    if (row < RESULT_ROWS) {
                        const uint4 values = *reinterpret_cast<const uint4*>(result_memory + row * PITCH + 16 * eight);
                        int best = first_output + 8 * eight < outputs ? best_of(values, eight) : NONE;
#pragma unroll
                        for (u32 distance = 1; distance < 8; distance *= 2)
                            best = max(best, __shfl_xor_sync(0xffffffff, best, distance));
                        if (eight == read % 8 && best != NONE)
                            kept[read / 8] = max(kept[read / 8], candidate_of(best, first_output));
                    }
                }
#else
                for (u32 i = thread % 128; i < RESULT_ROWS * (WIDTH / 8); i += 128) {
                    const u32 row = i / (WIDTH / 8), eight = i % (WIDTH / 8);
                    const u32 token = first_token + part * RESULT_ROWS + row, output = first_output + 8 * eight;
                    if (token < num_tokens && output < outputs) {
                        const uint4 values = *reinterpret_cast<const uint4*>(result_memory + row * PITCH + 16 * eight);
                        *reinterpret_cast<uint4*>(out + static_cast<u64>(token) * outputs + output) = values;
                    }
                }
#endif
                asm volatile("bar.sync %0, 128;" ::"r"(2 + warpgroup) : "memory");
            }
        }
#if BEST
        long long* candidates = reinterpret_cast<long long*>(out);
#pragma unroll
        for (u32 read = 0; read < READ; ++read) {
            const u32 i = thread % 128 + 128 * (read % ROUNDS), row = i / 8;
            const u32 token = read / ROUNDS * RESULT_ROWS + row;
            if (i % 8 == read % 8 && row < RESULT_ROWS && token < num_tokens)
                candidates[(token * gridDim.x + blockIdx.x) * WARPGROUPS + warpgroup] = kept[read / 8];
        }
#endif
    }
    // Nobody leaves while others read its memory.
    if (SPLITS > 1) {
        cluster_arrive();
        cluster_wait();
    }
}
