// What attention over pages has in common on NVIDIA's Hopper: a warp multiplies tiles of 16 keys and values, which lie in
// shared memory as tensor maps swizzle them, by the query heads of one KV head.
//
// scores^T = K Q^T and out^T = V^T P^T by mma.m16n8k16, whose rows are keys, then dims, and whose columns are the heads.
// Set by whoever compiles: GROUP query heads of a KV head (1 to 8), HEAD_DIM (64 or 128), HALF.
// Source: PTX ISA, "mma.m16n8k16", "ldmatrix", "movmatrix".

constexpr u32 TILE = 16;                         // keys
constexpr u32 LINE = 128;                        // bytes of shared memory as it is swizzled: half of a head of 128
constexpr u32 SIDE_BYTES = TILE * HEAD_DIM * 2;  // of keys or values
constexpr u32 TILE_BYTES = 2 * SIDE_BYTES;
constexpr u32 STEPS = HEAD_DIM / 16;             // instructions over a head
constexpr u32 PITCH = HEAD_DIM + 4;              // between heads of a warp's result, so that banks differ
constexpr u32 PAIRS = GROUP * HEAD_DIM / 2;      // results of a KV head, two at a time
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ void copy_tile(
    u32 to, const TensorMap* map, u32 slot, u32 page, u32 head, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %2, %4, %5}], [%6], %7;"
        ::"r"(to), "l"(map), "r"(0), "r"(slot), "r"(page), "r"(head), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void load4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void load4_turned(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ u32 turned(u32 matrix) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 packed(float low, float high) {
    return rounded(low) | static_cast<u32>(rounded(high)) << 16;
}

__device__ __forceinline__ float low_of(u32 pair) { return widened(static_cast<u16>(pair)); }
__device__ __forceinline__ float high_of(u32 pair) { return widened(static_cast<u16>(pair >> 16)); }

__device__ __forceinline__ float power(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float nothing() { return __int_as_float(0xff800000); }  // minus infinity

__device__ __forceinline__ u32 pair_at(const u16* from) { return *reinterpret_cast<const u32*>(from); }

// Dim `dim` (even) of line `line` of a tile.
__device__ __forceinline__ u32 place_of(u32 line, u32 dim) {
    return dim / 64 * (TILE * LINE) + line * LINE + ((dim % 64 / 8 ^ line % 8) << 4) + dim % 8 * 2;
}

// A warp's heads as the right matrix: each lane has dims 2 (lane % 4), 1 more, and both 8 further, of each sixteen of
// head lane / 4.
struct Heads {
    u32 low[STEPS], high[STEPS];
};

__device__ __forceinline__ Heads heads_at(const u16* from, u32 lane, bool same) {
    Heads heads;
    const u32 head = lane / 4;
    if (!same) from += head * HEAD_DIM;
    from += lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < STEPS; ++i) {
        const bool exists = same || head < GROUP;
        heads.low[i] = exists ? pair_at(from + 16 * i) : 0;
        heads.high[i] = exists ? pair_at(from + 16 * i + 8) : 0;
    }
    return heads;
}

__device__ __forceinline__ float scale_of(float squares, float eps) { return rsqrtf(squares / HEAD_DIM + eps); }

__device__ __forceinline__ float squares_of(u32 pair) {
    return low_of(pair) * low_of(pair) + high_of(pair) * high_of(pair);
}

// The new token's key and value: each lane has two dims and the two half a head further.
struct NewKey {
    u32 k[2], v[2];
};

__device__ __forceinline__ NewKey new_key_at(const u16* k, const u16* v, u32 lane) {
    const u32 dim = 2 * lane % (HEAD_DIM / 2);
    return {{pair_at(k + dim), pair_at(k + dim + HEAD_DIM / 2)}, {pair_at(v + dim), pair_at(v + dim + HEAD_DIM / 2)}};
}

// What a warp has seen, of heads 2 (lane % 4) and 1 more: totals of dims lane / 4 and 8 further of each sixteen.
struct Seen {
    float total[STEPS][4], top[2], sum[2];
};

__device__ __forceinline__ void clear(Seen& seen) {
#pragma unroll
    for (u32 i = 0; i < STEPS; ++i) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) seen.total[i][j] = 0.0f;
    }
    seen.top[0] = seen.top[1] = nothing(), seen.sum[0] = seen.sum[1] = 0.0f;
}

// A tile that lies at `at`, its keys before its values; `keys` of the sequence's are there.
__device__ __forceinline__ void see(
    Seen& seen, const Heads& q, u32 at, u32 first_key, u32 keys, float scale_log2, u32 lane) {
    float score[4] = {0.0f, 0.0f, 0.0f, 0.0f}, more[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (u32 i = 0; i < STEPS; ++i) {
        // Rows of the left matrix: keys 0-7 and 8-15 of the first eight dims, then of the next eight.
        u32 a[4];
        load4(a, at + place_of(lane % 16, 16 * i + lane / 16 * 8));
        if (i % 2) multiply(more, a, q.low[i], q.high[i]);
        else multiply(score, a, q.low[i], q.high[i]);
    }
    const bool low_there = first_key + lane / 4 < keys, high_there = first_key + lane / 4 + 8 < keys;
    float p[4];
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
        p[j] = low_there ? (score[j] + more[j]) * scale_log2 : nothing();
        p[j + 2] = high_there ? (score[j + 2] + more[j + 2]) * scale_log2 : nothing();
        float top = fmaxf(p[j], p[j + 2]);
#pragma unroll
        for (u32 step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
        top = fmaxf(top, seen.top[j]);
        const float fade = power(seen.top[j] - top);
        seen.top[j] = top;
        p[j] = power(p[j] - top), p[j + 2] = power(p[j + 2] - top);
        seen.sum[j] = seen.sum[j] * fade + p[j] + p[j + 2];
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) seen.total[i][j] *= fade, seen.total[i][j + 2] *= fade;
    }
    const u32 b0 = turned(packed(p[0], p[1])), b1 = turned(packed(p[2], p[3]));
    const bool whole = first_key + TILE <= keys;
#pragma unroll
    for (u32 i = 0; i < STEPS; ++i) {
        // Turned: rows are dims. Dims 0-7 and 8-15 of keys 0-7, then of keys 8-15.
        u32 a[4];
        load4_turned(a, at + SIDE_BYTES + place_of(lane % 8 + lane / 16 * 8, 16 * i + lane / 8 % 2 * 8));
        if (!whole) {  // what lies behind the keys may be anything
            const u32 key = first_key + 2 * (lane % 4);
            const u32 low = (key < keys ? 0xffffu : 0) | (key + 1 < keys ? 0xffff0000u : 0);
            const u32 high = (key + 8 < keys ? 0xffffu : 0) | (key + 9 < keys ? 0xffff0000u : 0);
            a[0] &= low, a[1] &= low, a[2] &= high, a[3] &= high;
        }
        multiply(seen.total[i], a, b0, b1);
    }
}

// A warp's result to shared memory, PITCH between heads: its totals, and the top weight and the sum of each head.
__device__ __forceinline__ void keep(Seen& seen, float2* weights, float* result, u32 lane) {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
        const u32 head = 2 * (lane % 4) + j;
#pragma unroll
        for (u32 across = 4; across < 32; across *= 2) seen.sum[j] += __shfl_xor_sync(ALL, seen.sum[j], across);
        if (lane < 4) weights[head] = make_float2(seen.top[j], seen.sum[j]);
        if (head < GROUP) {
#pragma unroll
            for (u32 i = 0; i < STEPS; ++i) {
                result[head * PITCH + 16 * i + lane / 4] = seen.total[i][j];
                result[head * PITCH + 16 * i + lane / 4 + 8] = seen.total[i][j + 2];
            }
        }
    }
}

// A mean of means: what each part weighs, against the top of all.
template <typename Weights, typename Values>
__device__ __forceinline__ float2 merged(u32 count, Weights weights, Values values, float& top, float& sum) {
    top = nothing(), sum = 0.0f;
    for (u32 i = 0; i < count; ++i) top = fmaxf(top, weights(i).x);
    float2 result = make_float2(0.0f, 0.0f);
    for (u32 i = 0; i < count; ++i) {
        const float2 weight = weights(i);
        // Parts without keys have nothing; one whose scores are no numbers makes the result none.
        if (weight.y != 0.0f) {
            const float share = power(weight.x - top);
            const float2 value = values(i);
            sum += share * weight.y, result.x += share * value.x, result.y += share * value.y;
        }
    }
    return result;
}
