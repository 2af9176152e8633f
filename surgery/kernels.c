/* The inner loops of the streaming edit: one pass over a chunk of pre and ft, nothing written but the result.
 *
 * Each function is the twin of the numpy function of the same name in kernels.py, which says what it computes and is used
 * where this file was not compiled. Bits are the same: IEEE float32, no contraction into fused multiply-add (the build sets
 * -ffp-contract=off). Loops work on blocks of BLOCK entries on the stack, so that compilers turn them into vector code. A
 * last block that is not full is filled up with zeros, which add nothing to any sum.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };
enum { FAPM, MAGNITUDE };
enum { BLOCK = 256, LANES = 16 };

typedef struct {
    double delta2, weight2; /* sums of (x - pre)^2 and pre^2 */
    int64_t differ;         /* entries where x != pre */
} Distance;

typedef struct {
    Distance before;
    double kept2;          /* sum of (ft - pre)^2 over the kept entries */
    int64_t changed, kept; /* kept entries where ft != pre, and all kept entries */
} Pruned;

typedef struct {
    int64_t above_low, above_high, collected;
} Counted;

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

/* Half to single by moving the fields and scaling the exponent, which is exact for subnormals too. */
INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t scaled = to_bits(from_bits(magnitude) * 0x1p112f);
    uint32_t special = 0x7f800000u | magnitude;
    return from_bits(((half & 0x7c00) == 0x7c00 ? special : scaled) | (uint32_t)(half & 0x8000) << 16);
}

INLINE void widen_block(int dtype, const void *source, size_t start, size_t n, float *restrict out) {
    if (dtype == BF16) {
        const uint16_t *x = (const uint16_t *)source + start;
        for (size_t i = 0; i < n; i++) out[i] = from_bits((uint32_t)x[i] << 16);
    } else if (dtype == F16) {
        const uint16_t *x = (const uint16_t *)source + start;
        for (size_t i = 0; i < n; i++) out[i] = half_to_float(x[i]);
    } else {
        memcpy(out, (const float *)source + start, n * 4);
    }
    for (size_t i = n; i < BLOCK; i++) out[i] = 0.0f;
}

INLINE double total(const double *lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

INLINE void add_squares(const float *x, double *lanes) {
    for (size_t i = 0; i < BLOCK; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++) lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
}

VECTOR double abs_sum(int dtype, const void *x, size_t n) {
    double lanes[LANES] = {0};
    float block[BLOCK];
    for (size_t start = 0; start < n; start += BLOCK) {
        widen_block(dtype, x, start, n - start < BLOCK ? n - start : BLOCK, block);
        for (size_t i = 0; i < BLOCK; i += LANES)
            for (size_t lane = 0; lane < LANES; lane++) lanes[lane] += (double)fabsf(block[i + lane]);
    }
    return total(lanes);
}

/* Widen a block of both, turn x into x - pre, and add up. */
INLINE void difference_block(int pre_dtype, const void *pre, int x_dtype, const void *x, size_t start, size_t size, float *p,
                             float *d, double *delta2, double *weight2, int64_t *differ) {
    uint32_t count = 0;
    widen_block(pre_dtype, pre, start, size, p);
    widen_block(x_dtype, x, start, size, d);
    for (size_t i = 0; i < BLOCK; i++) {
        d[i] -= p[i];
        count += d[i] != 0.0f;
    }
    add_squares(d, delta2);
    add_squares(p, weight2);
    *differ += count;
}

VECTOR void distance(int pre_dtype, const void *pre, int x_dtype, const void *x, size_t n, Distance *result) {
    double delta2[LANES] = {0}, weight2[LANES] = {0};
    float p[BLOCK], d[BLOCK];
    int64_t differ = 0;
    for (size_t start = 0; start < n; start += BLOCK)
        difference_block(pre_dtype, pre, x_dtype, x, start, n - start < BLOCK ? n - start : BLOCK, p, d, delta2, weight2, &differ);
    *result = (Distance){total(delta2), total(weight2), differ};
}

/* The twin of methods/fapm.py and methods/magnitude.py; delta and weight still have their signs. */
INLINE void score_block(int kind, const float *delta, const float *weight, float mean, float *restrict score) {
    if (kind == FAPM)
        for (size_t i = 0; i < BLOCK; i++) {
            float moved = fabsf(delta[i]), size = fabsf(weight[i]);
            float value = moved - mean * moved / size;
            score[i] = size != 0.0f ? value : moved != 0.0f ? -INFINITY : 0.0f;
        }
    else
        for (size_t i = 0; i < BLOCK; i++) score[i] = fabsf(delta[i]);
}

/* Append the few of a block's values that are flagged, looking at eight flags at a time. */
INLINE int64_t collect(const uint8_t *flags, const float *values, float *out, int64_t count) {
    for (size_t i = 0; i < BLOCK; i += 8) {
        uint64_t eight;
        memcpy(&eight, flags + i, 8);
        if (eight)
            for (size_t j = i; j < i + 8; j++)
                if (flags[j]) out[count++] = values[j];
    }
    return count;
}

/* `inside` has room for n, or is null. */
VECTOR void count(int kind, float mean, float low, float high, int pre_dtype, const void *pre, int ft_dtype, const void *ft,
                  size_t n, float *inside, Counted *result) {
    int64_t above_low = 0, above_high = 0, collected = 0;
    float p[BLOCK], d[BLOCK], score[BLOCK];
    uint8_t between[BLOCK];
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t size = n - start < BLOCK ? n - start : BLOCK;
        uint32_t lows = 0, highs = 0;
        widen_block(pre_dtype, pre, start, size, p);
        widen_block(ft_dtype, ft, start, size, d);
        for (size_t i = 0; i < BLOCK; i++) d[i] -= p[i];
        score_block(kind, d, p, mean, score);
        for (size_t i = size; i < BLOCK; i++) score[i] = -INFINITY;
        for (size_t i = 0; i < BLOCK; i++) {
            lows += score[i] > low;
            highs += score[i] > high;
            between[i] = (uint8_t)((score[i] > low) ^ (score[i] > high));
        }
        if (inside && lows != highs) collected = collect(between, score, inside, collected);
        above_low += lows, above_high += highs;
    }
    *result = (Counted){above_low, above_high, collected};
}

/* `base` is pre in ft's type. */
#define PRUNE(NAME, WORD)                                                                                            \
    VECTOR void NAME(int kind, float mean, float threshold, int pre_dtype, const void *pre, const WORD *base,        \
                     int ft_dtype, const WORD *ft, size_t n, WORD *restrict out, Pruned *result) {                   \
        double delta2[LANES] = {0}, weight2[LANES] = {0}, kept2[LANES] = {0};                                        \
        int64_t differ = 0, changed = 0, kept = 0;                                                                   \
        float p[BLOCK], d[BLOCK], score[BLOCK];                                                                      \
        for (size_t start = 0; start < n; start += BLOCK) {                                                          \
            size_t size = n - start < BLOCK ? n - start : BLOCK;                                                     \
            uint32_t keeps = 0, changes = 0;                                                                         \
            difference_block(pre_dtype, pre, ft_dtype, ft, start, size, p, d, delta2, weight2, &differ);             \
            score_block(kind, d, p, mean, score);                                                                    \
            for (size_t i = size; i < BLOCK; i++) score[i] = -INFINITY;                                              \
            for (size_t i = 0; i < BLOCK; i++) {                                                                     \
                int keep = score[i] > threshold;                                                                     \
                keeps += keep;                                                                                       \
                changes += keep & (d[i] != 0.0f);                                                                    \
                d[i] = keep ? d[i] : 0.0f;                                                                           \
            }                                                                                                        \
            for (size_t i = 0; i < size; i++) out[start + i] = score[i] > threshold ? ft[start + i] : base[start + i]; \
            add_squares(d, kept2);                                                                                   \
            kept += keeps, changed += changes;                                                                       \
        }                                                                                                            \
        *result = (Pruned){{total(delta2), total(weight2), differ}, total(kept2), changed, kept};                    \
    }

PRUNE(prune16, uint16_t)
PRUNE(prune32, uint32_t)

/* `out` has the type of ft: BF16 or F32. */
VECTOR void blend(float alpha, float rest, int pre_dtype, const void *pre, int ft_dtype, const void *ft, size_t n, void *out,
                  Distance *before, Distance *after) {
    double before2[LANES] = {0}, after2[LANES] = {0}, weight2[LANES] = {0}, again[LANES] = {0};
    int64_t differ_before = 0, differ_after = 0;
    float p[BLOCK], d[BLOCK], f[BLOCK];
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t size = n - start < BLOCK ? n - start : BLOCK;
        difference_block(pre_dtype, pre, ft_dtype, ft, start, size, p, d, before2, weight2, &differ_before);
        widen_block(ft_dtype, ft, start, size, f);
        for (size_t i = 0; i < BLOCK; i++) {
            float mixed = alpha * p[i] + rest * f[i];
            f[i] = p[i] == f[i] ? f[i] : mixed;
        }
        if (ft_dtype == BF16)
            for (size_t i = 0; i < size; i++) ((uint16_t *)out)[start + i] = float_to_bf16(f[i]);
        else
            memcpy((float *)out + start, f, size * sizeof(float));
        difference_block(pre_dtype, pre, ft_dtype, out, start, size, p, d, after2, again, &differ_after);
    }
    *before = (Distance){total(before2), total(weight2), differ_before};
    *after = (Distance){total(after2), total(again), differ_after};
}

/* Add the sums of w and of i * w, modulo 2^64, over the 32-bit words w at the positions i from `first` on. */
VECTOR void checksum(const uint32_t *words, size_t n, uint64_t first, uint64_t *sums) {
    uint64_t sum = 0, weighted = 0;
    for (size_t i = 0; i < n; i++) {
        sum += words[i];
        weighted += (first + i) * (uint64_t)words[i];
    }
    sums[0] += sum, sums[1] += weighted;
}

typedef struct {
    double delta2, weight2;     /* sums of (ft - pre)^2 and pre^2 */
    int64_t same, infinite;     /* entries that did not change; entries whose ratio is infinite */
    float max_delta, max_ratio; /* the largest that are finite */
} Compared;

INLINE uint32_t magnitude(float value) { return to_bits(value) & 0x7fffffff; }

INLINE float ratio(float delta, float weight) { return delta == 0.0f ? 0.0f : fabsf(delta) / fabsf(weight); }

/* Where in a stretch of 2^shift entries the sampled one lies: the low bits of a mixed stretch number. */
INLINE size_t draw(uint64_t stretch, int shift) {
    uint64_t x = (stretch + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (size_t)((x ^ x >> 31) & ((1u << shift) - 1));
}

/* The bits of the largest finite magnitude, if it is above `top`. */
INLINE uint32_t largest(const float *values, uint32_t top) {
    uint32_t sizes[BLOCK]; /* in two loops, or compilers make no vector code of it */
    for (size_t i = 0; i < BLOCK; i++) sizes[i] = magnitude(values[i]) < 0x7f800000 ? magnitude(values[i]) : 0;
    for (size_t i = 0; i < BLOCK; i++) top = sizes[i] > top ? sizes[i] : top;
    return top;
}

/* A division is dear: only a block that holds the largest yet, or nearly, is divided as a whole. */
VECTOR void compare(int pre_dtype, const void *pre, int ft_dtype, const void *ft, size_t n, uint64_t start, int shift,
                    int64_t *delta_bins, int64_t *ratio_bins, Compared *result) {
    double delta2[LANES] = {0}, weight2[LANES] = {0};
    float p[BLOCK], d[BLOCK], r[BLOCK], limit = 0.0f;
    uint32_t max_delta = 0, max_ratio = 0;
    int64_t same = 0, infinite = 0;
    for (size_t at = 0; at < n; at += BLOCK) {
        size_t size = n - at < BLOCK ? n - at : BLOCK;
        uint32_t equal = 0, high = 0, infinities = 0;
        widen_block(pre_dtype, pre, at, size, p);
        widen_block(ft_dtype, ft, at, size, d);
        for (size_t i = 0; i < BLOCK; i++) {
            /* widening keeps apart what has different bits */
            equal += pre_dtype == ft_dtype ? to_bits(p[i]) == to_bits(d[i]) : p[i] == d[i];
            d[i] -= p[i];
            high += (fabsf(d[i]) > limit * fabsf(p[i])) | (fabsf(d[i]) > from_bits(max_delta));
        }
        add_squares(d, delta2);
        add_squares(p, weight2);
        if (high) {
            max_delta = largest(d, max_delta);
            for (size_t i = 0; i < BLOCK; i++) r[i] = ratio(d[i], p[i]);
            for (size_t i = 0; i < BLOCK; i++) infinities += r[i] == INFINITY;
            max_ratio = largest(r, max_ratio);
            limit = from_bits(max_ratio) * (1.0f - 0x1p-20f); /* so that no rounding hides a larger one */
        }
        same += (int64_t)equal - (int64_t)(BLOCK - size);
        infinite += infinities;
        for (size_t stretch = 0; stretch < size; stretch += (size_t)1 << shift) {
            size_t i = stretch + draw((start + at + stretch) >> shift, shift);
            if (i < size) delta_bins[magnitude(d[i]) >> 16]++, ratio_bins[magnitude(ratio(d[i], p[i])) >> 16]++;
        }
    }
    *result = (Compared){total(delta2), total(weight2), same, infinite, from_bits(max_delta), from_bits(max_ratio)};
}

/* The twins of optim/kernels.py: Adam's moments, and the step of the entries that MoFO chose. Both work in place, and wait for
 * memory, so that they ask for it early: so many entries ahead, beyond the end too, where asking does nothing. */
enum { AHEAD = 2 * BLOCK, LINE = 64 };
enum { MOMENTUM, GRADIENT, RATIO, RANDOM };

INLINE void prefetch(const void *block, size_t bytes) {
    for (size_t i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)block + i);
}

/* The top 24 bits of the word that optim/noise.py has for a position. */
INLINE float uniform(uint64_t position, uint64_t key) {
    uint64_t x = position * 0x9e3779b97f4a7c15u + key;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (float)(int32_t)((x ^ x >> 31) >> 40);
}

/* Append the values of a block that are flagged with 1, looking at 64 flags at a time. */
INLINE int64_t collect_sparse(const uint8_t *flags, const float *values, float *out, int64_t count) {
    for (size_t i = 0; i < BLOCK; i += 64) {
        uint64_t set = 0;
        for (size_t j = 0; j < 64; j += 8) {
            uint64_t eight;
            memcpy(&eight, flags + i + j, 8);
            set |= (eight * 0x0102040810204080u >> 56) << j; /* byte 0 becomes bit 0 */
        }
        for (; set; set &= set - 1) out[count++] = values[i + (size_t)__builtin_ctzll(set)];
    }
    return count;
}

/* `scores`, if not null, takes the scores; `inside` has room for n, or is null. */
VECTOR void advance(int kind, uint64_t key, uint64_t first, float rest1, float beta2, float rest2, int dtype,
                    const void *gradient, size_t n, float *restrict m, float *restrict v, float *restrict scores, float low,
                    float high, float *restrict inside, Counted *result) {
    int64_t above_low = 0, above_high = 0, collected = 0;
    size_t width = dtype == F32 ? 4 : 2;
    float g[BLOCK], s[BLOCK];
    uint8_t between[BLOCK];
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t size = n - start < BLOCK ? n - start : BLOCK;
        uint32_t lows = 0, highs = 0;
        prefetch((const char *)gradient + (start + AHEAD) * width, BLOCK * width);
        prefetch(m + start + AHEAD, sizeof g);
        prefetch(v + start + AHEAD, sizeof g);
        widen_block(dtype, gradient, start, size, g);
        for (size_t i = 0; i < size; i++) {
            m[start + i] += rest1 * (g[i] - m[start + i]);
            v[start + i] = beta2 * v[start + i] + rest2 * (g[i] * g[i]);
        }
        if (kind == MOMENTUM)
            memcpy(s, m + start, size * sizeof(float));
        else if (kind == GRADIENT)
            memcpy(s, g, size * sizeof(float));
        else if (kind == RATIO)
            for (size_t i = 0; i < size; i++) {
                float value = m[start + i] / sqrtf(v[start + i]);
                s[i] = m[start + i] == 0.0f ? 0.0f : value;
            }
        else
            for (size_t i = 0; i < size; i++) s[i] = uniform(first + start + i, key);
        if (scores) memcpy(scores + start, s, size * sizeof(float));
        for (size_t i = 0; i < BLOCK; i++) s[i] = fabsf(s[i]);
        for (size_t i = size; i < BLOCK; i++) s[i] = -INFINITY;
        for (size_t i = 0; i < BLOCK; i++) {
            lows += s[i] > low;
            highs += s[i] > high;
            between[i] = (uint8_t)((s[i] > low) ^ (s[i] > high));
        }
        if (inside && lows != highs) collected = collect_sparse(between, s, inside, collected);
        above_low += lows, above_high += highs;
    }
    *result = (Counted){above_low, above_high, collected};
}

/* Chosen: a |score| above the threshold, or tied with it among the first `ties` entries. NaN counts as -inf. */
VECTOR void descend(const float *score, float threshold, size_t ties, float decay, float rate, float root, float epsilon,
                    const float *m, const float *v, size_t n, float *restrict p) {
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t end = n - start < BLOCK ? n : start + BLOCK;
        prefetch(m + start + AHEAD, BLOCK * sizeof(float));
        prefetch(v + start + AHEAD, BLOCK * sizeof(float));
        prefetch(p + start + AHEAD, BLOCK * sizeof(float));
        for (size_t i = start; i < end; i++) {
            float size = score[i] == score[i] ? fabsf(score[i]) : -INFINITY;
            float next = p[i] * decay - rate * (m[i] / (sqrtf(v[i]) / root + epsilon));
            int chosen = (size > threshold) | ((i < ties) & (size == threshold));
            p[i] = chosen ? next : p[i];
        }
    }
}
