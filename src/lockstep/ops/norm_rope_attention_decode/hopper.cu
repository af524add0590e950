// One new token of each sequence on NVIDIA's Hopper: its heads normalised and rotated, its key and value stored, and
// attention over all keys of the sequence.
//
// A cluster of thread blocks shares the keys of one KV head of a sequence. Each warp copies tiles of 16 keys and values
// into shared memory of its own, the first ones before the kernel's predecessor has ended: earlier tokens are there.
// Then scores^T = K Q^T and out^T = V^T P^T by mma.m16n8k16, whose rows are keys, then dims, and whose columns are the
// query heads of the KV head. The warps' results are merged in shared memory, those of blocks by messages between them.
//
// Set by whoever compiles (hopper.py): GROUP query heads of a KV head (1 to 8), HEAD_DIM (64 or 128), PAGE slots of a
// page (a multiple of 16), WARPS, STAGES (tiles of a warp on their way), CLUSTER, NORMS, HALF.
// Source: PTX ISA, "mma.m16n8k16", "ldmatrix", "movmatrix", "st.async".

constexpr u32 OWN_PAIRS = PAIRS / CLUSTER;       // of those, what a block finishes
constexpr u32 MESSAGE_BYTES = CLUSTER * (OWN_PAIRS + GROUP) * 8;  // that a block receives

// One half of a head is rotated against the other: x cos - y sin, y cos + x sin.
__device__ __forceinline__ void rotate(
    u32& first, u32& second, const float (&x)[2], const float (&y)[2], float2 cos, float2 sin) {
    first = packed(x[0] * cos.x - y[0] * sin.x, x[1] * cos.y - y[1] * sin.y);
    second = packed(y[0] * cos.x + x[0] * sin.x, y[1] * cos.y + x[1] * sin.y);
}

__device__ __forceinline__ void scaled(float (&to)[2], u32 pair, u32 weights, float scale) {
    to[0] = low_of(pair), to[1] = high_of(pair);
    if (NORMS) to[0] *= scale * low_of(weights), to[1] *= scale * high_of(weights);
}

__device__ __forceinline__ void normalise_and_rotate(
    Heads& heads, const Heads& weights, float eps, const float* cos, const float* sin, u32 lane) {
    float scale = 1.0f;
    if (NORMS) {
        float squares = 0.0f;
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) squares += squares_of(heads.low[i]) + squares_of(heads.high[i]);
        squares += __shfl_xor_sync(ALL, squares, 1);
        squares += __shfl_xor_sync(ALL, squares, 2);
        scale = scale_of(squares, eps);
    }
    const float2* cos_at = reinterpret_cast<const float2*>(cos) + lane % 4;
    const float2* sin_at = reinterpret_cast<const float2*>(sin) + lane % 4;
#pragma unroll
    for (u32 i = 0; i < STEPS / 2; ++i) {
        const u32 j = i + STEPS / 2;
        float x[2], y[2];
        scaled(x, heads.low[i], weights.low[i], scale), scaled(y, heads.low[j], weights.low[j], scale);
        rotate(heads.low[i], heads.low[j], x, y, cos_at[8 * i], sin_at[8 * i]);
        scaled(x, heads.high[i], weights.high[i], scale), scaled(y, heads.high[j], weights.high[j], scale);
        rotate(heads.high[i], heads.high[j], x, y, cos_at[8 * i + 4], sin_at[8 * i + 4]);
    }
}

__device__ __forceinline__ void normalise_and_rotate(
    NewKey& key, const u32 (&weights)[2], float eps, const float* cos, const float* sin, u32 lane) {
    const u32 dim = 2 * lane % (HEAD_DIM / 2);
    float scale = 1.0f;
    if (NORMS) {
        float squares = squares_of(key.k[0]) + squares_of(key.k[1]);
#pragma unroll
        for (u32 step = 1; step < HEAD_DIM / 4; step *= 2) squares += __shfl_xor_sync(ALL, squares, step);
        scale = scale_of(squares, eps);
    }
    float x[2], y[2];
    scaled(x, key.k[0], weights[0], scale), scaled(y, key.k[1], weights[1], scale);
    const float2 angles_cos = *reinterpret_cast<const float2*>(cos + dim);
    rotate(key.k[0], key.k[1], x, y, angles_cos, *reinterpret_cast<const float2*>(sin + dim));
}

// Two results, or a head's log2 of the top weight and the sum, to another block; its barrier counts them.
__device__ __forceinline__ void send(u32 place, u32 barrier, u32 rank, float first, float second) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 ::"r"(place_in(place, rank)), "f"(first), "f"(second), "r"(place_in(barrier, rank)) : "memory");
}

// No pointer is __restrict__: what the compiler knows to stay the same it reads as late as it can, the norms' weights
// behind the wait for the predecessor.
extern "C" __global__ void __launch_bounds__(32 * WARPS) attend(
    const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map,
    const u16* heads,  // [row, query, key and value heads, HEAD_DIM]
    const u16* q_weight,
    const u16* k_weight,
    const float* cos,
    const float* sin,
    u16* k_pool,
    u16* v_pool,
    const int* table,
    const int* num_keys,
    u16* out,
    u64 pool_head_stride,
    u64 pool_page_stride,
    u64 pool_slot_stride,
    u32 kv_heads,
    u32 heads_stride,
    u32 cos_stride,
    u32 sin_stride,
    u32 table_stride,
    u32 out_stride,
    float eps,
    float scale_log2) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 full_barriers[WARPS * STAGES], message_barrier;
    __shared__ float2 weights_of[WARPS][8];
    __shared__ __align__(16) float2 received[CLUSTER > 1 ? PAIRS : 1];
    __shared__ float2 received_weights[CLUSTER > 1 ? CLUSTER * GROUP : 1];

    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const u32 row = blockIdx.x / CLUSTER / kv_heads, kv_head = blockIdx.x / CLUSTER % kv_heads;
    const u32 ring = shared_address(memory) + warp * STAGES * TILE_BYTES;
    const u32 full = shared_address(full_barriers + warp * STAGES), messages = shared_address(&message_barrier);

    // A step's tables are known before its first layer.
    const u32 keys = fresh_word(num_keys + row);
    const u32 tiles = (keys + TILE - 1) / TILE;
    const u32 first_tile = warp * CLUSTER + rank, step = WARPS * CLUSTER;
    const u32 turns = first_tile < tiles ? (tiles - first_tile + step - 1) / step : 0;
    const bool has_new = turns > 0 && first_tile + (turns - 1) * step == tiles - 1;
    const int* pages = table + static_cast<u64>(row) * table_stride;
    // Of 32 turns, one a lane.
    auto page_of_lane = [&](u32 turn) {
        return turn + lane < turns ? fresh_word(pages + (first_tile + (turn + lane) * step) * TILE / PAGE) : 0;
    };
    u32 lane_page = page_of_lane(0);

    if (lane == 0) {
        for (u32 stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1);
        if (CLUSTER > 1 && thread == 0) {
            barrier_init(messages, 1);
            barrier_expect(messages, MESSAGE_BYTES);
        }
        barriers_made();
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_arrive();
    u64 read_once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once));
    auto copy = [&](u32 turn) {
        if (turn > 0 && turn % 32 == 0) lane_page = page_of_lane(turn);
        const u32 page = __shfl_sync(ALL, lane_page, turn % 32);
        if (lane == 0) {
            const u32 slot = (first_tile + turn * step) * TILE % PAGE, stage = turn % STAGES;
            const u32 to = ring + stage * TILE_BYTES, barrier = full + 8 * stage;
            barrier_expect(barrier, TILE_BYTES);
            copy_tile(to, &k_map, slot, page, kv_head, barrier, read_once);
            copy_tile(to + SIDE_BYTES, &v_map, slot, page, kv_head, barrier, read_once);
        }
    };
    for (u32 turn = 0; turn < min(turns, (u32)STAGES); ++turn) copy(turn);

    Heads q_weights;
    u32 k_weights[2], new_page = 0;
    if (NORMS) q_weights = heads_at(q_weight, lane, true);
    if (has_new) {
        new_page = fresh_word(pages + (keys - 1) / PAGE);
        const u32 dim = 2 * lane % (HEAD_DIM / 2);
        if (NORMS) k_weights[0] = pair_at(k_weight + dim), k_weights[1] = pair_at(k_weight + dim + HEAD_DIM / 2);
    }
    wait_for_inputs();
    start_next();

    if (turns > 0) {
        const u16* own_heads = heads + static_cast<u64>(row) * heads_stride;
        const u16* new_k = own_heads + (kv_heads * GROUP + kv_head) * HEAD_DIM;
        cos += static_cast<u64>(row) * cos_stride, sin += static_cast<u64>(row) * sin_stride;
        NewKey key;
        if (has_new) key = new_key_at(new_k, new_k + kv_heads * HEAD_DIM, lane);
        Heads q = heads_at(own_heads + kv_head * GROUP * HEAD_DIM, lane, false);
        normalise_and_rotate(q, q_weights, eps, cos, sin, lane);
        if (has_new) normalise_and_rotate(key, k_weights, eps, cos, sin, lane);

        Seen seen;
        clear(seen);
        for (u32 turn = 0; turn < turns; ++turn) {
            const u32 stage = turn % STAGES, at = ring + stage * TILE_BYTES;
            barrier_wait(full + 8 * stage, turn / STAGES % 2);
            if (has_new && turn == turns - 1) {
                if (lane < HEAD_DIM / 4) {
                    const u64 slot = new_page * pool_page_stride + (keys - 1) % PAGE * pool_slot_stride;
                    const u64 place = kv_head * pool_head_stride + slot;
                    unsigned char* tile = memory + (warp * STAGES + stage) * TILE_BYTES;
#pragma unroll
                    for (u32 half = 0; half < 2; ++half) {
                        const u32 dim = 2 * lane + half * (HEAD_DIM / 2);
                        unsigned char* in_tile = tile + place_of((keys - 1) % TILE, dim);
                        *reinterpret_cast<u32*>(in_tile) = key.k[half];
                        *reinterpret_cast<u32*>(in_tile + SIDE_BYTES) = key.v[half];
                        *reinterpret_cast<u32*>(k_pool + place + dim) = key.k[half];
                        *reinterpret_cast<u32*>(v_pool + place + dim) = key.v[half];
                    }
                }
                __syncwarp();
            }
            see(seen, q, at, (first_tile + turn * step) * TILE, keys, scale_log2, lane);
            __syncwarp();
            if (turn + STAGES < turns) copy(turn + STAGES);
        }
        float* result = reinterpret_cast<float*>(memory + warp * STAGES * TILE_BYTES);
        keep(seen, weights_of[warp], result, lane);
    } else if (lane < 8) {
        weights_of[warp][lane] = make_float2(nothing(), 0.0f);
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_wait();

    u16* own_out = out + static_cast<u64>(row) * out_stride + kv_head * GROUP * HEAD_DIM;
    auto write = [&](u32 pair, float2 total, float sum) {
        const float by = sum != 0.0f ? 1.0f / sum : 0.0f;
        *reinterpret_cast<u32*>(own_out + 2 * pair) = packed(total.x * by, total.y * by);
    };
    for (u32 pair = thread; pair < PAIRS; pair += 32 * WARPS) {
        const u32 head = pair / (HEAD_DIM / 2), dim = 2 * pair % HEAD_DIM;
        float top, sum;
        const float2 total = merged(
            WARPS, [&](u32 w) { return weights_of[w][head]; },
            [&](u32 w) {
                return *reinterpret_cast<float2*>(memory + w * STAGES * TILE_BYTES + (head * PITCH + dim) * 4);
            },
            top, sum);
        if (CLUSTER == 1) {
            write(pair, total, sum);
        } else {
            const u32 place = rank * OWN_PAIRS + pair % OWN_PAIRS, to = pair / OWN_PAIRS;
            send(shared_address(received + place), messages, to, total.x, total.y);
            // The head's first pairs tell the blocks of it, one each.
            const u32 weight = shared_address(received_weights + rank * GROUP + head);
            if (dim < 2 * CLUSTER) send(weight, messages, dim / 2, top, sum);
        }
    }
    if (CLUSTER > 1) {
        barrier_wait_in_cluster(messages, 0);
        for (u32 own = thread; own < OWN_PAIRS; own += 32 * WARPS) {
            const u32 pair = rank * OWN_PAIRS + own, head = pair / (HEAD_DIM / 2);
            float top, sum;
            const float2 total = merged(
                CLUSTER, [&](u32 other) { return received_weights[other * GROUP + head]; },
                [&](u32 other) { return received[other * OWN_PAIRS + own]; }, top, sum);
            write(pair, total, sum);
        }
    }
}
