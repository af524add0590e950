// One new token of each of a few sequences through every block of a decoder, in one launch on NVIDIA's Hopper.
//
// Thread blocks, at most one on each multiprocessor, stay from the first block's norm to the last one, each with its
// share of the outputs of every product. One warp copies: weights, keys and values, in the order in which the others
// will want them, through one ring that takes nearly all of shared memory and knows of no phases, so that memory is read
// while results travel. The other warps compute phase after phase; what they can hold of a product's weights they take
// out of the ring before its inputs are there.
//
// What a phase gives goes to all thread blocks through the device's memory, in words of 8 bytes: 4 bytes of it, and the
// number of the layer's pass since the memory was made. Whoever reads a word so sees whether it is there, and there are
// no other barriers between thread blocks. A word may be written again in the next layer: by then every thread block has
// published what it computed of it, since each has a share of every product. The residual stream is summed and
// normalised by each thread block on its own.
//
// Set by whoever compiles (hopper.py): HIDDEN, INNER and GROUP * KV_HEADS * HEAD_DIM (multiples of 256), LAYERS, PAGE
// slots of a page (a multiple of 16), ROWS (1, 2, 4 or 8), BLOCKS, SPLITS (thread blocks that share the keys of a KV head of a
// sequence; a power of two), STAGES, HELD (stages of a product that are taken early), NORMS, BIAS, HALF, and what
// hopper_attention.cu wants.
// Source: PTX ISA, "cp.async.bulk", "ld.relaxed", "mma.m16n8k16"; NCCL's protocol LL for words that carry their flag.

__device__ constexpr u32 larger(u32 a, u32 b) { return a > b ? a : b; }
__device__ constexpr u32 divided(u32 a, u32 b) { return (a + b - 1) / b; }

constexpr u32 WARPS = 8;                         // that compute
constexpr u32 THREADS = 32 * WARPS;
constexpr u32 QUERY = KV_HEADS * GROUP * HEAD_DIM;
constexpr u32 QKV = QUERY + 2 * KV_HEADS * HEAD_DIM;
constexpr u32 UNIT = 8;                          // outputs that are computed together
constexpr u32 CHUNK = 1024;                      // inputs of a stage
constexpr u32 LINE_OF_STAGE = CHUNK * 2 + 64;    // bytes of a weight's row in a stage, so that banks differ
constexpr u32 STAGE_BYTES = 17 * 1024;           // 8 such rows, or two tiles of keys and values
constexpr u32 STAGE_TILES = 2;
constexpr u32 STEPS_OF_STAGE = CHUNK / WARPS / 32;
constexpr u32 INPUT_PITCH = larger(larger(HIDDEN, INNER), QUERY) + 32;  // between inputs of rows, so that banks differ
constexpr u32 MOST_UNITS =
    larger(larger(divided(QKV / UNIT, BLOCKS), 2 * divided(INNER / UNIT, BLOCKS)), divided(HIDDEN / UNIT, BLOCKS));
constexpr u32 SUMS = WARPS * MOST_UNITS * ROWS * UNIT;
constexpr u32 RESULTS = WARPS * GROUP * PITCH;
constexpr u32 SLICE = GROUP * HEAD_DIM / SPLITS;  // dims that a thread block merges
constexpr u32 ITEMS = ROWS * KV_HEADS * SPLITS;
constexpr u32 PART_WORDS = GROUP * HEAD_DIM + 2 * GROUP;
constexpr u32 WARPS_OF_ROW = WARPS / ROWS;
constexpr u32 QUAD_STEP = 32 * WARPS_OF_ROW;
constexpr u32 QUADS = divided(HIDDEN / 4, QUAD_STEP);  // groups of four numbers of the residual stream that a lane has
static_assert(HIDDEN % 256 == 0 && INNER % 256 == 0 && QUERY % 256 == 0, "widths");
static_assert(ITEMS <= BLOCKS && SLICE % 2 == 0 && PAIRS % 32 == 0, "thread blocks of attention");
static_assert(HIDDEN / UNIT >= BLOCKS && INNER / UNIT >= BLOCKS && QKV / UNIT >= BLOCKS, "each has a share of all");

// Where phases leave their results, in words; those of a row side by side.
constexpr u32 QKV_AT = 0;
constexpr u32 PARTS_AT = QKV_AT + ROWS * QKV / 2;
constexpr u32 SEEN_AT = PARTS_AT + ITEMS * PART_WORDS;
constexpr u32 OUT_AT = SEEN_AT + ROWS * QUERY / 2;
constexpr u32 INNER_AT = OUT_AT + ROWS * HIDDEN / 2;
constexpr u32 DOWN_AT = INNER_AT + ROWS * INNER / 2;

struct Layer {
    const u16 *qkv, *out, *gate_up, *down;       // [outputs, inputs]; gates before ups
    const u16 *input_norm, *post_norm, *q_norm, *k_norm, *qkv_bias;
};

struct Step {
    const Layer* layers;
    const u16* embedded;                         // [rows, HIDDEN]
    const float *cos, *sin;                      // [rows, HEAD_DIM / 2]
    u16* pools;                                  // keys of a layer, its values, those of the next one: heads of all
    const int* table;
    const int* num_keys;
    const u16* last_norm;
    u16* out;                                    // [rows, HIDDEN]
    u64* words;
    u32* passes;                                 // that there have been
    u64 pool_head_stride, pool_page_stride, pool_slot_stride;
    u32 rows, table_stride;
    float eps, head_eps, scale_log2;
};

static_assert(sizeof(Layer) == LAYER_BYTES && sizeof(Step) == STEP_BYTES, "as hopper.py has them");

__device__ __forceinline__ void copy_line(u32 to, const u16* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

__device__ __forceinline__ uint4 four_at(u32 at) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at) : "memory");
    return r;
}

// Of what stays the same: not moved behind what waits.
__device__ __forceinline__ uint2 two_early(const u16* from) {
    uint2 r;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(from));
    return r;
}

// Read anew, so that no phase's addresses are kept in registers through the others.
__device__ __forceinline__ u32 thread_number() {
    u32 number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

// Warps that compute meet.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ void publish(u64* at, u32 value, u32 pass) {
    const u64 word = static_cast<u64>(pass) << 32 | value;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}

// Pairs of words, once all of them are there: pair number `of(i)` behind `at`. Those that are there are not read again.
template <u32 COUNT, typename Number>
__device__ __forceinline__ void receive(uint2 (&to)[COUNT], const u64* at, u32 pass, Number of) {
    u64 first[COUNT], second[COUNT];
    auto is_there = [&](u32 i) {
        return static_cast<u32>(first[i] >> 32) == pass && static_cast<u32>(second[i] >> 32) == pass;
    };
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) first[i] = second[i] = 0;  // no pass has this number
    u32 turns = 0;
    bool all;
    do {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
            if (COUNT == 1 || !is_there(i))
                asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                             : "=l"(first[i]), "=l"(second[i]) : "l"(at + 2 * of(i)) : "memory");
        all = true;
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) all = all && is_there(i);
        if (++turns == 1u << 24) __trap();  // after seconds: an error instead of a device that hangs
    } while (!all);
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) to[i] = make_uint2(static_cast<u32>(first[i]), static_cast<u32>(second[i]));
}

struct Share {
    u32 first, count;
};

__device__ __forceinline__ Share share(u32 units) {
    const u32 each = units / BLOCKS, rest = units % BLOCKS, block = blockIdx.x;
    return {block * each + min(block, rest), each + (block < rest)};
}

// What a thread block sees of the keys of one KV head of one sequence: tiles split, split + splits, ...
struct Item {
    u32 row, head, split, keys, splits, tiles;
};

__device__ __forceinline__ Item item_of(const int* num_keys, u32 rows) {
    Item item;
    const u32 block = blockIdx.x;
    item.row = block / (KV_HEADS * SPLITS), item.head = block / SPLITS % KV_HEADS, item.split = block % SPLITS;
    item.keys = item.row < rows ? num_keys[item.row] : 0;
    const u32 tiles = divided(item.keys, TILE);
    item.splits = min(static_cast<u32>(SPLITS), divided(tiles, STAGE_TILES));
    item.tiles = item.split < item.splits ? divided(tiles - item.split, item.splits) : 0;
    return item;
}

// Four dims of a new head, normalised and rotated; the lane half a head further has their partners.
__device__ __forceinline__ void make_ready(
    uint2& own, uint2 weight, float eps, const float* cos, const float* sin, u32 lane) {
    float dims[4] = {low_of(own.x), high_of(own.x), low_of(own.y), high_of(own.y)};
    if (NORMS) {
        float squares = squares_of(own.x) + squares_of(own.y);
#pragma unroll
        for (u32 step = 1; step < HEAD_DIM / 4; step *= 2) squares += __shfl_xor_sync(ALL, squares, step);
        const float scale = scale_of(squares, eps);
        dims[0] *= scale * low_of(weight.x), dims[1] *= scale * high_of(weight.x);
        dims[2] *= scale * low_of(weight.y), dims[3] *= scale * high_of(weight.y);
    }
    const u32 at = lane % (HEAD_DIM / 8);
    const bool is_first_half = lane % (HEAD_DIM / 4) < HEAD_DIM / 8;
    const float4 c = reinterpret_cast<const float4*>(cos)[at], s = reinterpret_cast<const float4*>(sin)[at];
    const float cosines[4] = {c.x, c.y, c.z, c.w}, sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const float partner = __shfl_xor_sync(ALL, dims[i], HEAD_DIM / 8);
        dims[i] = dims[i] * cosines[i] + (is_first_half ? -partner : partner) * sines[i];
    }
    own = make_uint2(packed(dims[0], dims[1]), packed(dims[2], dims[3]));
}

struct Ring {
    u32 stages, full, empty, slot, parity;
    u32 nothing;  // 0, which the compiler does not know
};

__device__ __forceinline__ void advance(Ring& ring) {
    if (++ring.slot == STAGES) ring.slot = 0, ring.parity ^= 1;
}

// The next stage, once it is full. Every warp takes each.
__device__ __forceinline__ u32 take(const Ring& ring) {
    barrier_wait(ring.full + 8 * ring.slot, ring.parity);
    return ring.stages + ring.slot * STAGE_BYTES;
}

// `read` are bits of what the warp read of the stage. The barrier's place depends on them, so that it is not told before
// they are here: what reads shared memory can wait for microseconds behind the loads of warps that look for words, and a
// barrier is told past it.
__device__ __forceinline__ void give_back(Ring& ring, u32 lane, u32 read) {
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty + 8 * ring.slot + (read & ring.nothing));
    advance(ring);
}

__device__ __forceinline__ u32 bits_of(uint4 four) { return four.x | four.y | four.z | four.w; }

// A thread block's share of a product; each warp multiplies an eighth of the inputs of every stage.
template <u32 INPUTS, u32 OUTPUTS_OF_ALL>
struct Product {
    static constexpr u32 CHUNKS = divided(INPUTS, CHUNK);
    static constexpr u32 EARLY = divided(OUTPUTS_OF_ALL / UNIT, BLOCKS) * CHUNKS < HELD
        ? divided(OUTPUTS_OF_ALL / UNIT, BLOCKS) * CHUNKS : HELD;
    uint4 held[EARLY][STEPS_OF_STAGE];

    __device__ static constexpr u32 own_inputs(u32 chunk) {
        return (INPUTS - chunk * CHUNK < CHUNK ? INPUTS - chunk * CHUNK : CHUNK) / WARPS;
    }

    __device__ __forceinline__ static u32 place(u32 stage, u32 own, u32 thread) {
        return stage + thread % 32 / 4 * LINE_OF_STAGE + (thread / 32 * own + 8 * (thread % 4)) * 2;
    }

    // Takes the first stages before the product's inputs are there.
    __device__ __forceinline__ void hold(Ring& ring, u32 units) {
        const u32 thread = thread_number();
#pragma unroll
        for (u32 s = 0; s < EARLY; ++s) {
            if (s / CHUNKS < units) {
                const u32 own = own_inputs(s % CHUNKS), at = place(take(ring), own, thread);
                u32 read = 0;
#pragma unroll
                for (u32 i = 0; i < STEPS_OF_STAGE; ++i)
                    if (i < own / 32) held[s][i] = four_at(at + 64 * i), read |= bits_of(held[s][i]);
                give_back(ring, thread % 32, read);
            }
        }
    }

    // Sums of the warp's inputs for every output of the share, into `sums`: [warp][unit][row][output].
    __device__ __forceinline__ void multiply(Ring& ring, u32 units, u32 inputs_at, float* sums) {
        const u32 thread = thread_number(), lane = thread % 32, warp = thread / 32, row = lane / 4;
        const bool is_row = row < ROWS;
        const u32 own_inputs_at = inputs_at + row * (INPUT_PITCH * 2) + 16 * (lane % 4);
        uint4 x[STEPS_OF_STAGE];
        auto fetch = [&](u32 chunk) {
            const u32 own = own_inputs(chunk);
#pragma unroll
            for (u32 i = 0; i < STEPS_OF_STAGE; ++i)
                if (i < own / 32)
                    x[i] = is_row ? four_at(own_inputs_at + (chunk * CHUNK + warp * own) * 2 + 64 * i)
                                  : make_uint4(0, 0, 0, 0);
        };
        float even[4], odd[4];
        auto clear = [&] {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) even[i] = odd[i] = 0.0f;
        };
        // A lane has eight inputs side by side of each 32, in the weight and in the row alike: which of them the
        // instruction takes for which number of its own does not matter.
        auto step = [&](uint4 w, uint4 v) {
            const u32 first[4] = {v.x, 0, v.y, 0}, second[4] = {v.z, 0, v.w, 0};
            ::multiply(even, first, w.x, w.y), ::multiply(odd, second, w.z, w.w);
        };
        auto store = [&](u32 unit) {
            if (is_row) {
                float2* to = reinterpret_cast<float2*>(sums + ((warp * MOST_UNITS + unit) * ROWS + row) * UNIT);
                to[lane % 4] = make_float2(even[0] + odd[0], even[1] + odd[1]);
            }
        };
        if (CHUNKS == 1) fetch(0);
#pragma unroll
        for (u32 s = 0; s < EARLY; ++s) {
            if (s / CHUNKS < units) {
                if (s % CHUNKS == 0) clear();
                if (CHUNKS > 1) fetch(s % CHUNKS);
#pragma unroll
                for (u32 i = 0; i < STEPS_OF_STAGE; ++i)
                    if (i < own_inputs(s % CHUNKS) / 32) step(held[s][i], x[i]);
                if (s % CHUNKS == CHUNKS - 1) store(s / CHUNKS);
            }
        }
        for (u32 s = EARLY; s < units * CHUNKS; ++s) {
            const u32 chunk = s % CHUNKS, own = own_inputs(chunk);
            if (chunk == 0) clear();
            if (CHUNKS > 1) fetch(chunk);
            const u32 at = place(take(ring), own, thread);
            u32 read = 0;
#pragma unroll
            for (u32 i = 0; i < STEPS_OF_STAGE; ++i) {
                if (i < own / 32) {
                    const uint4 w = four_at(at + 64 * i);
                    read |= bits_of(w);
                    step(w, x[i]);
                }
            }
            give_back(ring, lane, read);
            if (chunk == CHUNKS - 1) store(s / CHUNKS);
        }
        meet();
    }
};

// Of the warps, in their order: two outputs side by side.
__device__ __forceinline__ float2 summed(const float* sums, u32 unit, u32 row, u32 pair) {
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (u32 warp = 0; warp < WARPS; ++warp) {
        const float* of_warp = sums + ((warp * MOST_UNITS + unit) * ROWS + row) * UNIT;
        const float2 each = reinterpret_cast<const float2*>(of_warp)[pair];
        total.x += each.x, total.y += each.y;
    }
    return total;
}

// What `weigh` left out of a row.
__device__ __forceinline__ float factor_of(const float* squares_of_warps, u32 row, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < WARPS_OF_ROW; ++i) squares += squares_of_warps[row * WARPS_OF_ROW + i];
    return rsqrtf(squares / HIDDEN + eps);
}

// The share's results go to all: [row][outputs]. `squares_of_warps`: of inputs that came by `weigh`.
__device__ __forceinline__ void publish_share(
    u64* to, u32 outputs, Share of, const float* sums, const u16* bias, const float* squares_of_warps, float eps,
    u32 pass) {
    for (u32 i = thread_number(); i < of.count * ROWS * (UNIT / 2); i += THREADS) {
        const u32 pair = i % 4, row = i / 4 % ROWS, unit = i / 4 / ROWS;
        float2 total = summed(sums, unit, row, pair);
        if (squares_of_warps) {
            const float factor = factor_of(squares_of_warps, row, eps);
            total.x *= factor, total.y *= factor;
        }
        const u32 output = (of.first + unit) * UNIT + 2 * pair;
        if (bias) {
            const u32 two = pair_at(bias + output);
            total.x += low_of(two), total.y += high_of(two);
        }
        publish(to + (row * outputs + output) / 2, packed(total.x, total.y), pass);
    }
}

__device__ __forceinline__ float gated(float gate, float up) {
    const float rounded_gate = widened(rounded(gate));
    return __fdividef(rounded_gate, 1.0f + __expf(-rounded_gate)) * widened(rounded(up));
}

// Words of all rows to shared memory, as inputs of a product.
template <u32 WIDTH>
__device__ __forceinline__ void gather(const u64* from, u16* inputs, u32 pass) {
    constexpr u32 COUNT = ROWS * WIDTH / 4, EACH = divided(COUNT, THREADS), AT_ONCE = EACH < 6 ? EACH : 6;
    for (u32 first = thread_number(); first < COUNT; first += AT_ONCE * THREADS) {
        auto number = [&](u32 i) { return min(first + i * THREADS, COUNT - 1); };
        uint2 two[AT_ONCE];
        receive(two, from, pass, number);
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            const u32 at = number(i);
            *reinterpret_cast<uint2*>(inputs + at / (WIDTH / 4) * INPUT_PITCH + at % (WIDTH / 4) * 4) = two[i];
        }
    }
    meet();
}

// The lane's part of the residual stream of its warp's row.
struct Residual {
    uint2 own[QUADS];
};

__device__ __forceinline__ u32 row_of_thread() { return thread_number() / 32 / WARPS_OF_ROW; }

// Where the lane's i-th group of four lies in its row; past the end where it has none.
__device__ __forceinline__ u32 quad_of_thread(u32 i) { return thread_number() % QUAD_STEP + i * QUAD_STEP; }

__device__ __forceinline__ bool is_quad(u32 quad) { return HIDDEN / 4 % QUAD_STEP == 0 || quad < HIDDEN / 4; }

__device__ __forceinline__ u32 added(u32 a, u32 b) {
    return packed(low_of(a) + low_of(b), high_of(a) + high_of(b));
}

// What a product adds to the stream.
__device__ __forceinline__ void absorb(Residual& residual, const u64* words, u32 pass) {
    uint2 update[QUADS];
    receive(update, words, pass, [&](u32 i) {
        return row_of_thread() * (HIDDEN / 4) + min(quad_of_thread(i), HIDDEN / 4 - 1);
    });
#pragma unroll
    for (u32 i = 0; i < QUADS; ++i)
        if (is_quad(quad_of_thread(i)))
            residual.own[i] = make_uint2(
                added(residual.own[i].x, update[i].x), added(residual.own[i].y, update[i].y));
}

__device__ __forceinline__ void read_norm(uint2 (&weight)[QUADS], const u16* from) {
#pragma unroll
    for (u32 i = 0; i < QUADS; ++i)
        weight[i] = is_quad(quad_of_thread(i)) ? two_early(from + 4 * quad_of_thread(i)) : make_uint2(0, 0);
}

// rms_norm but for a factor of each row: the stream times the norm's weight, as inputs of a product. The factor is known
// when they have been multiplied.
__device__ __forceinline__ void weigh(
    const Residual& residual, const uint2 (&weight)[QUADS], u16* inputs, float* squares_of_warps) {
    auto product = [](u32 a, u32 b) { return packed(low_of(a) * low_of(b), high_of(a) * high_of(b)); };
    float squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < QUADS; ++i) {
        const uint2 own = residual.own[i];
        squares += squares_of(own.x) + squares_of(own.y);
        if (is_quad(quad_of_thread(i)))
            *reinterpret_cast<uint2*>(inputs + row_of_thread() * INPUT_PITCH + 4 * quad_of_thread(i)) =
                make_uint2(product(own.x, weight[i].x), product(own.y, weight[i].y));
    }
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(ALL, squares, step);
    if (thread_number() % 32 == 0) squares_of_warps[thread_number() / 32] = squares;
    meet();
}

// The warp that copies.
__device__ __forceinline__ void fill(
    const TensorMap* map, const Step& given, const Layer* layers, Ring ring, u32 lane) {
    u64 read_once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once));
    auto next = [&](u32 bytes) {  // a stage that may be filled; its barrier waits for so many bytes
        const u32 slot = ring.slot;
        // All stages are empty in the beginning: as if they had been given back once.
        barrier_wait(ring.empty + 8 * slot, ring.parity ^ 1);
        if (lane == 0) barrier_expect(ring.full + 8 * slot, bytes);
        __syncwarp();
        advance(ring);
        return slot;
    };
    auto unit = [&](const u16* weight, u32 inputs, u32 output) {
        for (u32 first = 0; first < inputs; first += CHUNK) {
            const u32 bytes = min(CHUNK, inputs - first) * 2, slot = next(UNIT * bytes);
            const u32 to = ring.stages + slot * STAGE_BYTES + lane * LINE_OF_STAGE;
            const u16* from = weight + static_cast<u64>(output + lane) * inputs + first;
            if (lane < UNIT) copy_line(to, from, bytes, ring.full + 8 * slot, read_once);
        }
    };
    auto product = [&](const u16* weight, u32 outputs, u32 inputs) {
        const Share of = share(outputs / UNIT);
        for (u32 i = 0; i < of.count; ++i) unit(weight, inputs, (of.first + i) * UNIT);
    };
    Item item;
    for (u32 layer = 0; layer < LAYERS; ++layer) {
        const Layer& own = layers[layer];
        product(own.qkv, QKV, HIDDEN);
        if (layer == 0) {  // what the step has before its first layer
            wait_for_inputs();
            item = item_of(given.num_keys, given.rows);
        }
        for (u32 first = 0; first < item.tiles; first += STAGE_TILES) {
            const u32 count = min(STAGE_TILES, item.tiles - first), slot = next(count * TILE_BYTES);
            if (lane < 2 * count) {
                const u32 key = (item.split + (first + lane / 2) * item.splits) * TILE, side = lane % 2;
                const u32 page = given.table[static_cast<u64>(item.row) * given.table_stride + key / PAGE];
                const u32 to = ring.stages + slot * STAGE_BYTES + lane / 2 * TILE_BYTES + side * SIDE_BYTES;
                const u32 head = (2 * layer + side) * KV_HEADS + item.head;
                copy_tile(to, map, key % PAGE, page, head, ring.full + 8 * slot, read_once);
            }
            __syncwarp();
        }
        product(own.out, HIDDEN, QUERY);
        const Share of = share(INNER / UNIT);
        for (u32 i = 0; i < of.count; ++i) {
            const u32 output = (of.first + i) * UNIT;
            unit(own.gate_up, HIDDEN, output), unit(own.gate_up, HIDDEN, INNER + output);
        }
        product(own.down, HIDDEN, INNER);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(
    const __grid_constant__ TensorMap map, const __grid_constant__ Step given) {
    extern __shared__ __align__(1024) unsigned char memory[];
    float* const sums = reinterpret_cast<float*>(memory + STAGES * STAGE_BYTES);
    float* const results = sums + SUMS;
    u16* const inputs = reinterpret_cast<u16*>(results + RESULTS);
    u16* const fresh = inputs + ROWS * INPUT_PITCH;  // query heads, key and value of the item's row
    Layer* const layers = reinterpret_cast<Layer*>(fresh + (GROUP + 2) * HEAD_DIM);
    __shared__ __align__(8) u64 full_barriers[STAGES], empty_barriers[STAGES];
    __shared__ __align__(16) float angles[2][HEAD_DIM / 2];
    __shared__ float2 weights_of[WARPS][8];
    __shared__ float squares_of_warps[WARPS];

    Ring ring = {shared_address(memory), shared_address(full_barriers), shared_address(empty_barriers), 0, 0, 0};
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(ring.nothing));
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(ring.full + 8 * stage, 1);
            barrier_init(ring.empty + 8 * stage, WARPS);
        }
        barriers_made();
    }
    for (u32 i = threadIdx.x; i < LAYERS * sizeof(Layer) / 8; i += THREADS + 32)
        reinterpret_cast<u64*>(layers)[i] = reinterpret_cast<const u64*>(given.layers)[i];
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        fill(&map, given, layers, ring, threadIdx.x % 32);
        return;
    }

    const u32 inputs_at = shared_address(inputs);
    const Share of_qkv = share(QKV / UNIT), of_hidden = share(HIDDEN / UNIT), of_inner = share(INNER / UNIT);
    uint2 norm[QUADS];
    read_norm(norm, layers[0].input_norm);
    wait_for_inputs();
    u32 pass = fresh_word(given.passes);
    const Item item = item_of(given.num_keys, given.rows);
    const u32 last_tile = item.tiles > 0 ? item.split + (item.tiles - 1) * item.splits : 0;
    const bool has_new = item.tiles > 0 && last_tile == (item.keys - 1) / TILE;
    const int* pages = given.table + static_cast<u64>(item.row) * given.table_stride;
    const u32 new_page = has_new ? pages[(item.keys - 1) / PAGE] : 0;
    if (item.tiles > 0) {
        for (u32 i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            const u32 of = i % (HEAD_DIM / 2);
            angles[i / (HEAD_DIM / 2)][of] = (i < HEAD_DIM / 2 ? given.cos : given.sin)[item.row * (HEAD_DIM / 2) + of];
        }
    }
    Residual residual;
#pragma unroll
    for (u32 i = 0; i < QUADS; ++i) {
        residual.own[i] = make_uint2(0, 0);
        if (row_of_thread() < given.rows && is_quad(quad_of_thread(i))) {
            const u16* from = given.embedded + row_of_thread() * HIDDEN + 4 * quad_of_thread(i);
            residual.own[i] = *reinterpret_cast<const uint2*>(from);
        }
    }

    for (u32 layer = 0; layer < LAYERS; ++layer) {
        const Layer& own = layers[layer];
        Product<HIDDEN, QKV> qkv;
        qkv.hold(ring, of_qkv.count);
        if (layer > 0) absorb(residual, given.words + DOWN_AT, pass);  // of the pass before
        if (++pass == 0) pass = 1;  // 0 is the number of no pass
        weigh(residual, norm, inputs, squares_of_warps);
        read_norm(norm, own.post_norm);
        uint2 q_weight = make_uint2(0, 0), k_weight = make_uint2(0, 0);  // of the lane's four dims
        if (NORMS && item.tiles > 0) {
            const u32 dim = 4 * thread_number() % HEAD_DIM;
            q_weight = two_early(own.q_norm + dim), k_weight = two_early(own.k_norm + dim);
        }
        qkv.multiply(ring, of_qkv.count, inputs_at, sums);
        const u16* bias = BIAS ? own.qkv_bias : nullptr;
        publish_share(given.words + QKV_AT, QKV, of_qkv, sums, bias, squares_of_warps, given.eps, pass);

        const u32 thread = thread_number(), lane = thread % 32, warp = thread / 32;
        if (item.tiles > 0) {
            for (u32 head = warp; head < GROUP + (has_new ? 2 : 0); head += WARPS) {
                const u32 number = head < GROUP ? item.head * GROUP + head
                                                : KV_HEADS * GROUP + (head - GROUP) * KV_HEADS + item.head;
                const u64* words = given.words + QKV_AT + (item.row * QKV + number * HEAD_DIM) / 2;
                uint2 two[1];
                receive(two, words, pass, [&](u32) { return lane % (HEAD_DIM / 4); });
                if (head <= GROUP)
                    make_ready(two[0], head < GROUP ? q_weight : k_weight, given.head_eps, angles[0], angles[1], lane);
                if (lane < HEAD_DIM / 4) *reinterpret_cast<uint2*>(fresh + head * HEAD_DIM + 4 * lane) = two[0];
            }
            meet();
            const bool works = warp < item.tiles, adds = has_new && (item.tiles - 1) % WARPS == warp;
            Heads q;
            Seen seen;
            if (works) {
                q = heads_at(fresh, lane, false);
                clear(seen);
            }
            for (u32 first = 0; first < item.tiles; first += STAGE_TILES) {
                const u32 stage = take(ring);
#pragma unroll 1
                for (u32 i = 0; i < STAGE_TILES; ++i) {
                    const u32 tile = first + i;
                    if (tile >= item.tiles || tile % WARPS != warp) continue;
                    const u32 at = stage + i * TILE_BYTES;
                    if (adds && tile == item.tiles - 1) {
                        if (lane < HEAD_DIM / 4) {
                            const u16* new_k = fresh + GROUP * HEAD_DIM;
                            const NewKey key = new_key_at(new_k, new_k + HEAD_DIM, lane);
                            u16* const k_pool = given.pools
                                + (2 * layer * KV_HEADS + item.head) * given.pool_head_stride
                                + new_page * given.pool_page_stride + (item.keys - 1) % PAGE * given.pool_slot_stride;
                            u16* const v_pool = k_pool + KV_HEADS * given.pool_head_stride;
                            unsigned char* in_memory = memory + (at - ring.stages);
#pragma unroll
                            for (u32 half = 0; half < 2; ++half) {
                                const u32 dim = 2 * lane + half * (HEAD_DIM / 2);
                                unsigned char* in_tile = in_memory + place_of((item.keys - 1) % TILE, dim);
                                *reinterpret_cast<u32*>(in_tile) = key.k[half];
                                *reinterpret_cast<u32*>(in_tile + SIDE_BYTES) = key.v[half];
                                *reinterpret_cast<u32*>(k_pool + dim) = key.k[half];
                                *reinterpret_cast<u32*>(v_pool + dim) = key.v[half];
                            }
                            // Copies will write there next.
                            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                        }
                        __syncwarp();
                    }
                    see(seen, q, at, (item.split + tile * item.splits) * TILE, item.keys, given.scale_log2, lane);
                }
                u32 read = 0;  // sums of all that was read
#pragma unroll
                for (u32 i = 0; i < STEPS; ++i) read |= __float_as_uint(seen.total[i][0]);
                give_back(ring, lane, works ? read : 0);
            }
            if (works) keep(seen, weights_of[warp], results + warp * GROUP * PITCH, lane);
            meet();
            u64* part = given.words + PARTS_AT + blockIdx.x * PART_WORDS;
            for (u32 pair = thread; pair < PAIRS; pair += THREADS) {
                const u32 head = pair / (HEAD_DIM / 2), dim = 2 * pair % HEAD_DIM;
                float top, sum;
                const float2 total = merged(
                    min(WARPS, item.tiles), [&](u32 w) { return weights_of[w][head]; },
                    [&](u32 w) { return *reinterpret_cast<float2*>(results + (w * GROUP + head) * PITCH + dim); },
                    top, sum);
                publish(part + 2 * pair, __float_as_uint(total.x), pass);
                publish(part + 2 * pair + 1, __float_as_uint(total.y), pass);
                if (dim == 0) {
                    publish(part + GROUP * HEAD_DIM + 2 * head, __float_as_uint(top), pass);
                    publish(part + GROUP * HEAD_DIM + 2 * head + 1, __float_as_uint(sum), pass);
                }
            }
        }
        Product<QUERY, HIDDEN> out;
        out.hold(ring, of_hidden.count);
        // Each merges its slice of the head's dims: lanes side by side have a pair of each split.
        if (blockIdx.x < ITEMS) {
            const u64* all = given.words + PARTS_AT + (blockIdx.x - item.split) * PART_WORDS;
            for (u32 i = thread_number(); i < PAIRS; i += THREADS) {
                const u32 split = i % SPLITS, dim = item.split * SLICE + i / SPLITS * 2;
                float2 weight = make_float2(nothing(), 0.0f), value = make_float2(0.0f, 0.0f);
                if (split < item.splits) {
                    uint2 two[2];
                    const u32 of_head = GROUP * HEAD_DIM / 2 + dim / HEAD_DIM;
                    receive(two, all + split * PART_WORDS, pass, [&](u32 k) { return k ? of_head : dim / 2; });
                    value = make_float2(__uint_as_float(two[0].x), __uint_as_float(two[0].y));
                    weight = make_float2(__uint_as_float(two[1].x), __uint_as_float(two[1].y));
                }
                float top = weight.x;
#pragma unroll
                for (u32 step = 1; step < SPLITS; step *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
                // A part whose scores are no numbers makes the result none.
                const float by = weight.y != 0.0f ? power(weight.x - top) : 0.0f;
                float sum = by * weight.y;
                value = weight.y != 0.0f ? make_float2(value.x * by, value.y * by) : make_float2(0.0f, 0.0f);
#pragma unroll
                for (u32 step = 1; step < SPLITS; step *= 2) {
                    sum += __shfl_xor_sync(ALL, sum, step);
                    value.x += __shfl_xor_sync(ALL, value.x, step), value.y += __shfl_xor_sync(ALL, value.y, step);
                }
                const float whole = sum != 0.0f ? 1.0f / sum : 0.0f;
                u64* to = given.words + SEEN_AT + (item.row * QUERY + item.head * GROUP * HEAD_DIM + dim) / 2;
                if (split == 0) publish(to, packed(value.x * whole, value.y * whole), pass);
            }
        }
        gather<QUERY>(given.words + SEEN_AT, inputs, pass);
        out.multiply(ring, of_hidden.count, inputs_at, sums);
        publish_share(given.words + OUT_AT, HIDDEN, of_hidden, sums, nullptr, nullptr, 0.0f, pass);

        Product<HIDDEN, 2 * INNER> gate_up;
        gate_up.hold(ring, 2 * of_inner.count);
        absorb(residual, given.words + OUT_AT, pass);
        weigh(residual, norm, inputs, squares_of_warps);
        read_norm(norm, layer + 1 < LAYERS ? layers[layer + 1].input_norm : given.last_norm);
        gate_up.multiply(ring, 2 * of_inner.count, inputs_at, sums);
        for (u32 i = thread_number(); i < of_inner.count * ROWS * (UNIT / 2); i += THREADS) {
            const u32 pair = i % 4, row = i / 4 % ROWS, unit = i / 4 / ROWS;
            const float factor = factor_of(squares_of_warps, row, given.eps);
            const float2 gate = summed(sums, 2 * unit, row, pair), up = summed(sums, 2 * unit + 1, row, pair);
            const u32 output = (of_inner.first + unit) * UNIT + 2 * pair;
            const u32 two = packed(
                gated(gate.x * factor, up.x * factor), gated(gate.y * factor, up.y * factor));
            publish(given.words + INNER_AT + (row * INNER + output) / 2, two, pass);
        }
        Product<INNER, HIDDEN> down;
        down.hold(ring, of_hidden.count);
        gather<INNER>(given.words + INNER_AT, inputs, pass);
        down.multiply(ring, of_hidden.count, inputs_at, sums);
        publish_share(given.words + DOWN_AT, HIDDEN, of_hidden, sums, nullptr, nullptr, 0.0f, pass);
    }
    start_next();
    if (blockIdx.x != 0) return;
    absorb(residual, given.words + DOWN_AT, pass);
    weigh(residual, norm, inputs, squares_of_warps);
    for (u32 at = threadIdx.x; at < given.rows * (HIDDEN / 4); at += THREADS) {
        const u32 row = at / (HIDDEN / 4), in_row = at % (HIDDEN / 4) * 4;
        const float factor = factor_of(squares_of_warps, row, given.eps);
        const uint2 four = *reinterpret_cast<const uint2*>(inputs + row * INPUT_PITCH + in_row);
        const uint2 scaled = make_uint2(
            packed(low_of(four.x) * factor, high_of(four.x) * factor),
            packed(low_of(four.y) * factor, high_of(four.y) * factor));
        // Rows of padding are zeros.
        *reinterpret_cast<uint2*>(given.out + row * HIDDEN + in_row) =
            given.num_keys[row] > 0 ? scaled : make_uint2(0, 0);
    }
    // All others have read it: their last results are here.
    if (threadIdx.x == 0) *given.passes = pass;
}
