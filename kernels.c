/* What a small Llama needs on a CPU and PyTorch does slowly: causal attention with rotary embeddings
 * for small heads (forward and backward), RMSNorm, SwiGLU, the gradient of a weight matrix, and
 * decoding over a KV cache. kernels.py compiles this file on first use and calls it through ctypes;
 * where there is no compiler model.py takes PyTorch's own, the oracle of the tests.
 *
 * Why it exists. PyTorch's attention puts the head dimension in the lanes of a vector register. With
 * the 8 wide heads of a 260K-parameter model most of each register, and of the time, is empty:
 * more than half of a training step went there. Here the lanes are *queries*, so that the softmaxes of
 * up to 16 queries lie side by side and no sum runs across a register; a decoding step, which has one
 * query a head, has keys in them. Sequences are packed one after the other, so that ragged batches (PPO
 * rollouts) cost nothing for padding. The rest is one pass over memory where PyTorch makes several.
 *
 * Letters as in model.py: N packed tokens, D dim, S sequences, H query heads, K key/value heads (H / K
 * queries share one), E head dimension (even, at most MAX_E), T cache capacity. All tensors are
 * float32, row-major and contiguous. Every output element is written by one thread in a fixed order:
 * the numbers do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined __AVX512F__                           /* floats in a vector: what the processor has */
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define MAX_E 16                                  /* wider heads suit PyTorch's own kernels */
#define MAX_R 2                                   /* queries that decode together */
#define LOG2_E 1.44269504f
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int64_t lvec __attribute__((vector_size(4 * LANES)));
typedef int64_t pair __attribute__((may_alias));  /* two floats, moved as one */

#define LOAD(p) (*(const vec_unaligned *)(p))
#define STORE(p, v) (*(vec_unaligned *)(p) = (v))
/* Constants R and E reach the innermost loops only where everything is inlined. */
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define OUT_OF_LINE __attribute__((noinline))
#else                                             /* gcc 12 makes slower code of a copy for constants */
#define OUT_OF_LINE __attribute__((noinline, noclone))
#endif

/* a[i], b[i], a[i + 1], b[i + 1], ... as many as fill a vector. */
#define HALF (LANES / 2)
#define TWO(i) i, i + LANES, i + 1, i + 1 + LANES
#if LANES == 16
#define ORDER(i) TWO(i), TWO(i + 2), TWO(i + 4), TWO(i + 6)
#elif LANES == 8
#define ORDER(i) TWO(i), TWO(i + 2)
#else
#define ORDER(i) TWO(i)
#endif
#ifdef __clang__
#define INTERLEAVE(a, b, i) __builtin_shufflevector(a, b, ORDER(i))
#else
#define INTERLEAVE(a, b, i) __builtin_shuffle(a, b, (ivec){ORDER(i)})
#endif

INLINE vec choose(ivec mask, vec a, vec b) {                  /* mask lane is 0 or -1 */
    return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}

/* a > b ? a : b, so b where one is a NaN. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16                                   /* one instruction; choose() waits longer for itself */
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float maximum(vec v) {
    for (int half = HALF; half; half /= 2)
        v = larger(INTERLEAVE(v, v, 0), INTERLEAVE(v, v, HALF));
    return v[0];
}

INLINE float sum(vec v) {
    for (int half = HALF; half; half /= 2) v = INTERLEAVE(v, v, 0) + INTERLEAVE(v, v, HALF);
    return v[0];
}

/* Lane i is the sum of the lanes of v[i], for LANES vectors, which it overwrites. */
INLINE vec sums(vec *v) {
    for (int half = HALF; half; half /= 2)
        for (int i = 0; i < half; i++)
            v[i] = INTERLEAVE(v[i], v[i + half], 0) + INTERLEAVE(v[i], v[i + half], HALF);
    return v[0];
}

INLINE ivec lane_numbers(void) {
    ivec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}

/* 2^x for x <= 0, relative error below 2e-7; 2^-126 for all that is less, a NaN for a NaN.
 * x = n + r, n whole and |r| <= 1/2: 2^r by its polynomial of least error, 2^n through the exponent. */
INLINE vec exp2_nonpositive(vec x) {
    x = larger((vec){0} - 126.0f, x);
    vec shifted = x + 12582912.0f;                /* 1.5 * 2^23: rounds, and the last bits are n */
    vec r = x - (shifted - 12582912.0f);
    vec p = r * 1.326472604e-3f + 9.671512722e-3f;
    p = p * r + 5.550733747e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

/* Rotates the pairs (x[0], x[1]), (x[2], x[3]), ... of a row x (E) by the angles of its position: RoPE.
 * direction is +1, or -1 for the inverse, which is also the backward pass. */
INLINE void rotate(float *out, const float *x, const float *cosine, const float *sine,
                   float direction, const int E) {
    for (int i = 0; i < E / 2; i++) {
        float c = cosine[i], s = direction * sine[i], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = a * c - b * s;
        out[2 * i + 1] = a * s + b * c;
    }
}

/* The same of LANES rows at once, x (E), c and s (E / 2) vectors with a row in each lane. */
INLINE void rotate_tile(vec *x, const vec *c, const vec *s, float direction, const int E) {
    for (int i = 0; i < E / 2; i++) {
        vec a = x[2 * i], b = x[2 * i + 1], sine = s[i] * direction;
        x[2 * i] = a * c[i] - b * sine;
        x[2 * i + 1] = a * sine + b * c[i];
    }
}

/* Up to LANES rows of x, stride floats apart, to E vectors with a row in each lane; where there is no
 * row the lane is 0. */
INLINE void load_tile(vec *tile, const float *x, int64_t stride, int rows, const int E) {
    float a[MAX_E][LANES];
    if (rows < LANES) memset(a, 0, sizeof a);
    for (int i = 0; i < rows; i++)
        for (int e = 0; e < E; e++) a[e][i] = x[i * stride + e];
    for (int e = 0; e < E; e++) tile[e] = LOAD(a[e]);
}

INLINE void store_tile(float *x, const vec *tile, int64_t stride, int rows, const int E) {
    float a[MAX_E][LANES];
    for (int e = 0; e < E; e++) STORE(a[e], tile[e]);
    for (int i = 0; i < rows; i++)
        for (int e = 0; e < E; e++) x[i * stride + e] = a[e][i];
}

/* The keys of one head, rotated, as rows of E: x has n rows, stride floats apart. */
INLINE void rotate_keys(float *keys, const float *x, int64_t stride, int n, const float *cosine,
                        const float *sine, const int E) {
    for (int j = 0; j < n; j++)
        rotate(keys + j * E, x + j * stride, cosine + j * (E / 2), sine + j * (E / 2), 1, E);
}

/* Lanes of x whose query, first + lane, is before key j, become `hidden`. */
INLINE vec hide(vec x, float hidden, int first, int j) {
    return j > first ? choose(lane_numbers() < j - first, (vec){0} + hidden, x) : x;
}

/* LANES queries at positions `first` and on, rotated and scaled by LOG2_E / sqrt(E), against n keys:
 * out (E) = softmax(q k) v, the highest score of each, and 1 / sum of 2^(score - highest). */
INLINE void forward_tile(vec *out, vec *highest, vec *inverse, const vec *q, const float *keys,
                         const float *v, int64_t stride, int first, int n, vec *scores, const int E) {
    vec top = (vec){0} - INFINITY, total = {0}, acc[MAX_E];
    for (int j = 0; j < n; j++) {
        vec s = q[0] * keys[j * E];
        for (int e = 1; e < E; e++) s += q[e] * keys[j * E + e];
        scores[j] = s = hide(s, -INFINITY, first, j);
        top = larger(s, top);
    }
    for (int e = 0; e < E; e++) acc[e] = (vec){0};
    for (int j = 0; j < n; j++) {
        vec p = hide(exp2_nonpositive(scores[j] - top), 0, first, j);
        total += p;
        for (int e = 0; e < E; e++) acc[e] += p * v[j * stride + e];
    }
    *highest = top;
    *inverse = 1.0f / total;
    for (int e = 0; e < E; e++) out[e] = acc[e] * *inverse;
}

/* Backward of the same queries q (E). dout (E) is times `inverse`, so that 2^(score - highest) may stand
 * for the probability, and delta = sum_j p_j dp_j = dout . out. Writes dq (E) / scale, and adds each
 * key's gradients to dkv, W vectors a key: dk[0], dv[0], dk[1], dv[1], ... rows has what they are sums
 * of, W vectors a query: q[0], dout[0], q[1], ... */
INLINE void backward_tile(vec *dq, float *dkv, const vec *dout, vec delta, vec highest, const vec *q,
                          const float *rows, const float *keys, const float *v, int64_t stride,
                          int first, int n, const int W, const int E) {
    vec acc[MAX_E], ds[LANES], weights[LANES][2]; /* weights of a key: ds, p of query 0, of query 1, ... */
    for (int e = 0; e < E; e++) acc[e] = (vec){0};
    for (int from = 0; from < n; from += LANES) { /* three loops, each with few enough registers */
        int count = n - from < LANES ? n - from : LANES;
        for (int j = 0; j < count; j++) {
            const float *key = keys + (from + j) * E, *value = v + (from + j) * stride;
            vec s = q[0] * key[0], dp = dout[0] * value[0];
            for (int e = 1; e < E; e++) {
                s += q[e] * key[e];
                dp += dout[e] * value[e];
            }
            vec p = hide(exp2_nonpositive(s - highest), 0, first, from + j);
            ds[j] = p * (dp - delta);
            weights[j][0] = INTERLEAVE(ds[j], p, 0);
            weights[j][1] = INTERLEAVE(ds[j], p, HALF);
        }
        for (int j = 0; j < count; j++)
            for (int e = 0; e < E; e++) acc[e] += ds[j] * keys[(from + j) * E + e];
        for (int j = 0; j < count; j++)
            for (int w = 0; w < W; w++) {
                float *to = dkv + ((from + j) * W + w) * LANES;
                vec even = LOAD(to), odd = {0};
                for (int i = 0; i < LANES; i += 2) {
                    const pair *both = (const pair *)weights[j] + i;
                    even += (vec)((lvec){0} + both[0]) * LOAD(rows + (i * W + w) * LANES);
                    odd += (vec)((lvec){0} + both[1]) * LOAD(rows + ((i + 1) * W + w) * LANES);
                }
                STORE(to, even + odd);
            }
    }
    for (int e = 0; e < E; e++) dq[e] = acc[e];
}

/* The three entry points' bodies for one sequence and one kv head (or row and kv head), made once for
 * each constant E so that their loops unroll. */
INLINE void forward_head(float *out, float *softmax, const float *q, const float *k, const float *v,
                         const float *cosine, const float *sine, int n, int H, int K, int kh,
                         float *work, const int E) {
    vec *scores = (vec *)work;
    float *keys = work + (int64_t)n * LANES;
    rotate_keys(keys, k + kh * E, K * E, n, cosine, sine, E);
    for (int i = 0; i < n; i += LANES) {
        int rows = n - i < LANES ? n - i : LANES;
        vec c[MAX_E / 2], s[MAX_E / 2], x[MAX_E], y[MAX_E], norm[2];
        load_tile(c, cosine + i * (E / 2), E / 2, rows, E / 2);
        load_tile(s, sine + i * (E / 2), E / 2, rows, E / 2);
        for (int h = kh * (H / K); h < (kh + 1) * (H / K); h++) {
            int64_t at = (int64_t)i * H + h;
            load_tile(x, q + at * E, H * E, rows, E);
            rotate_tile(x, c, s, 1, E);
            for (int e = 0; e < E; e++) x[e] *= LOG2_E / sqrtf((float)E);
            forward_tile(y, norm, norm + 1, x, keys, v + kh * E, K * E, i, i + rows, scores, E);
            store_tile(out + at * E, y, H * E, rows, E);
            store_tile(softmax + at * 2, norm, H * 2, rows, 2);
        }
    }
}

INLINE void backward_head(float *dq, float *dk, float *dv, const float *dout, const float *out,
                          const float *softmax, const float *q, const float *k, const float *v,
                          const float *cosine, const float *sine, int n, int H, int K, int kh,
                          float *work, const int E) {
    const int W = (2 * E + LANES - 1) / LANES;
    const float scale = 1.0f / sqrtf((float)E);
    float *dkv = work, *keys = work + (int64_t)n * W * LANES;
    rotate_keys(keys, k + kh * E, K * E, n, cosine, sine, E);
    memset(dkv, 0, sizeof(float) * n * W * LANES);
    for (int i = 0; i < n; i += LANES) {
        int count = n - i < LANES ? n - i : LANES;
        vec c[MAX_E / 2], s[MAX_E / 2], x[MAX_E], d[MAX_E], y[MAX_E], norm[2];
        load_tile(c, cosine + i * (E / 2), E / 2, count, E / 2);
        load_tile(s, sine + i * (E / 2), E / 2, count, E / 2);
        for (int h = kh * (H / K); h < (kh + 1) * (H / K); h++) {
            int64_t at = (int64_t)i * H + h;
            float rows[LANES * 2 * MAX_E] = {0};
            vec delta = {0};
            load_tile(x, q + at * E, H * E, count, E);
            load_tile(d, dout + at * E, H * E, count, E);
            load_tile(y, out + at * E, H * E, count, E);
            load_tile(norm, softmax + at * 2, H * 2, count, 2);
            rotate_tile(x, c, s, 1, E);
            for (int e = 0; e < E; e++) {
                x[e] *= scale;
                d[e] *= norm[1];
                delta += d[e] * y[e];
            }
            for (int r = 0; r < count; r++)
                for (int e = 0; e < E; e++) {
                    rows[r * W * LANES + 2 * e] = x[e][r];
                    rows[r * W * LANES + 2 * e + 1] = d[e][r];
                }
            for (int e = 0; e < E; e++) x[e] *= LOG2_E;
            backward_tile(y, dkv, d, delta, norm[0], x, rows, keys, v + kh * E, K * E, i, i + count,
                          W, E);
            for (int e = 0; e < E; e++) y[e] *= scale;
            rotate_tile(y, c, s, -1, E);
            store_tile(dq + at * E, y, H * E, count, E);
        }
    }
    for (int j = 0; j < n; j++) {
        float grad[MAX_E];
        int64_t at = ((int64_t)j * K + kh) * E;
        for (int e = 0; e < E; e++) {
            grad[e] = dkv[j * W * LANES + 2 * e];
            dv[at + e] = dkv[j * W * LANES + 2 * e + 1];
        }
        rotate(dk + at, grad, cosine + j * (E / 2), sine + j * (E / 2), -1, E);
    }
}

/* R queries of one kv head, q (R, E), rotated and scaled, against n keys: out (R, E). keys and values
 * lie in blocks of positions, (n / LANES, E, LANES), those of the next head `next` floats on: too much
 * for a cache, so they are asked for while this one works. R queries at once share their loads. */
INLINE void decode_queries(float *out, const float *q, const float *keys, const float *values, int n,
                           int64_t next, vec *scores, const int R, const int E) {
    vec top[MAX_R], total[MAX_R] = {{0}}, acc[MAX_R * MAX_E];
    float highest[MAX_R], numerators[MAX_R * MAX_E], denominators[MAX_R];
    for (int r = 0; r < R; r++) top[r] = (vec){0} - INFINITY;
    const float *ahead = keys + next;
    for (int j = 0; j < n; j += LANES, keys += E * LANES, ahead += E * LANES)
        for (int r = 0; r < R; r++) {
            vec s = {0};
            for (int e = 0; e < E; e++) {
                if (r == 0) __builtin_prefetch(ahead + e * LANES);
                s += q[r * E + e] * LOAD(keys + e * LANES);
            }
            if (n - j < LANES) s = choose(lane_numbers() < n - j, s, (vec){0} - INFINITY);
            scores[j / LANES * R + r] = s;
            top[r] = larger(s, top[r]);
        }
    for (int r = 0; r < R; r++) highest[r] = maximum(top[r]);
    for (int i = 0; i < R * E || i % LANES; i++) acc[i] = (vec){0};
    ahead = values + next;
    for (int j = 0; j < n; j += LANES, values += E * LANES, ahead += E * LANES)
        for (int r = 0; r < R; r++) {
            vec p = exp2_nonpositive(scores[j / LANES * R + r] - highest[r]);
            if (n - j < LANES) p = choose(lane_numbers() < n - j, p, (vec){0});
            total[r] += p;
            for (int e = 0; e < E; e++) {
                if (r == 0) __builtin_prefetch(ahead + e * LANES);
                acc[r * E + e] += p * LOAD(values + e * LANES);
            }
        }
    for (int i = 0; i < R * E; i += LANES) STORE(numerators + i, sums(acc + i));
    for (int r = 0; r < R; r++) denominators[r] = sum(total[r]);
    for (int i = 0; i < R * E; i++) out[i] = numerators[i] / denominators[i / E];
}

INLINE void decode_head(float *out, float *keys, float *values, const float *q, const float *k,
                        const float *v, const float *cosine, const float *sine, int position, int G,
                        int64_t next, vec *scores, const int R, const int E) {
    float rotated[MAX_R * MAX_E];
    int at = position / LANES * LANES * E + position % LANES;
    rotate(rotated, k, cosine, sine, 1, E);
    for (int e = 0; e < E; e++) {
        keys[at + e * LANES] = rotated[e];
        values[at + e * LANES] = v[e];
    }
    for (int g = 0; g < G; g += R) {
        for (int r = 0; r < R; r++) rotate(rotated + r * E, q + (g + r) * E, cosine, sine, 1, E);
        for (int i = 0; i < R * E; i++) rotated[i] *= LOG2_E / sqrtf((float)E);
        decode_queries(out + g * E, rotated, keys, values, position + 1, next, scores, R, E);
    }
}

/* Calls BODY(E), or BODY(R, E), with constants where there is a case for them: pairs of queries where
 * an even number of heads shares a kv head; other even head dimensions take the general loop. */
#define FOR_E(BODY) \
    switch (E) { case 4: BODY(4); break; case 8: BODY(8); break; case 16: BODY(16); break; \
                 default: BODY(E); }
#define FOR_R_E(BODY) \
    if (H / K % 2 == 0) \
        switch (E) { case 4: BODY(2, 4); break; case 8: BODY(2, 8); break; default: BODY(2, E); } \
    else \
        switch (E) { case 4: BODY(1, 4); break; case 8: BODY(1, 8); break; default: BODY(1, E); }

static void *vectors(int64_t floats) {
    return aligned_alloc(sizeof(vec), (floats / LANES + 1) * sizeof(vec));
}

/* q (N, H, E), k and v (N, K, E), unrotated; starts (S + 1) token offsets of the sequences; cosine and
 * sine (N, E / 2) of each token's position -> out (N, H, E), and for the backward pass softmax (N, H, 2): highest
 * score, in bits, and 1 / sum of 2^(score - highest). Returns 0, or -1 without memory. */
int attention_forward(float *out, float *softmax, const float *q, const float *k, const float *v,
                      const int64_t *starts, const float *cosine, const float *sine, int S, int H,
                      int K, int E) {
    int failed = 0;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < S * K; job++) {
        int64_t from = starts[job / K];
        int n = (int)(starts[job / K + 1] - from);
        float *work = vectors((int64_t)n * (LANES + E));
        if (!work) { failed = -1; continue; }
        #define FORWARD(E) forward_head(out + from * H * E, softmax + from * H * 2, q + from * H * E, \
            k + from * K * E, v + from * K * E, cosine + from * (E / 2), sine + from * (E / 2), \
            n, H, K, job % K, work, E)
        FOR_E(FORWARD)
        free(work);
    }
    return failed;
}

/* Gradients of attention_forward's inputs, of the same shapes, from dout and its two outputs. */
int attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out,
                       const float *softmax, const float *q, const float *k, const float *v,
                       const int64_t *starts, const float *cosine, const float *sine, int S, int H,
                       int K, int E) {
    int failed = 0;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < S * K; job++) {
        int64_t from = starts[job / K];
        int n = (int)(starts[job / K + 1] - from);
        float *work = vectors((int64_t)n * (2 * MAX_E + E));
        if (!work) { failed = -1; continue; }
        #define BACKWARD(E) backward_head(dq + from * H * E, dk + from * K * E, dv + from * K * E, \
            dout + from * H * E, out + from * H * E, softmax + from * H * 2, q + from * H * E, \
            k + from * K * E, v + from * K * E, cosine + from * (E / 2), sine + from * (E / 2), \
            n, H, K, job % K, work, E)
        FOR_E(BACKWARD)
        free(work);
    }
    return failed;
}

int attention_lanes(void) { return LANES; }

/* ---- RMSNorm, and products of matrices */

/* out (D) = x / rms(x) * weight; returns 1 / rms. D is a multiple of LANES, here and below. */
INLINE float norm_row(float *out, const float *x, const float *weight, int D, float eps) {
    vec squares = {0};
    for (int d = 0; d < D; d += LANES) squares += LOAD(x + d) * LOAD(x + d);
    const float inverse = 1 / sqrtf(sum(squares) / D + eps);
    for (int d = 0; d < D; d += LANES) STORE(out + d, LOAD(x + d) * inverse * LOAD(weight + d));
    return inverse;
}

/* With y = x inverse: dx = inverse (g w - y mean(g w y)); adds g y to dweight. dx may be g. */
INLINE void norm_row_gradient(float *dx, float *dweight, const float *g, const float *x, float inverse,
                              const float *weight, int D) {
    vec dots = {0};
    for (int d = 0; d < D; d += LANES) {
        vec gy = LOAD(g + d) * LOAD(x + d) * inverse;
        STORE(dweight + d, LOAD(dweight + d) + gy);
        dots += gy * LOAD(weight + d);
    }
    const float mean = sum(dots) / D * inverse;
    for (int d = 0; d < D; d += LANES)
        STORE(dx + d, (LOAD(g + d) * LOAD(weight + d) - LOAD(x + d) * mean) * inverse);
}

/* out (n) = the sum of `parts` partial sums, stride floats apart, in their order. */
static void add_up(float *out, const float *partial, int64_t n, int64_t parts, int64_t stride) {
    #pragma omp parallel for schedule(static) if (n >= 16384)
    for (int64_t i = 0; i < n; i += 1024) {
        const int64_t count = n - i < 1024 ? n - i : 1024;
        memmove(out + i, partial + i, count * sizeof(float)); /* out may be the first of them */
        for (int64_t p = 1; p < parts; p++)
            for (int64_t j = i; j < i + count; j++) out[j] += partial[p * stride + j];
    }
}

/* out (N, D) = x / rms(x) * weight, and inverse (N) = 1 / rms. */
int rms_norm_forward(float *out, float *inverse, const float *x, const float *weight, int N, int D,
                     float eps) {
    #pragma omp parallel for schedule(static) if (N >= 256)
    for (int64_t n = 0; n < N; n++) inverse[n] = norm_row(out + n * D, x + n * D, weight, D, eps);
    return 0;
}

/* dweight (D) is the sum over all rows. */
int rms_norm_backward(float *dx, float *dweight, const float *g, const float *x, const float *inverse,
                      const float *weight, int N, int D) {
    const int rows = 256, blocks = (N + rows - 1) / rows;     /* a partial sum each */
    float *partial = calloc((size_t)blocks * D + 1, sizeof(float));
    if (!partial) return -1;
    #pragma omp parallel for schedule(static)
    for (int b = 0; b < blocks; b++)
        for (int64_t n = b * rows; n < N && n < (b + 1) * rows; n++)
            norm_row_gradient(dx + n * D, partial + b * D, g + n * D, x + n * D, inverse[n], weight, D);
    add_up(dweight, partial, D, blocks, D);
    free(partial);
    return 0;
}

INLINE vec sigmoid(vec x) {                       /* by e^-|x|, which does not overflow */
    vec e = exp2_nonpositive(choose(x > 0.0f, -x, x) * LOG2_E);
    return choose(x > 0.0f, (vec){0} + 1.0f, e) / (e + 1.0f);
}

/* c (rows, some vectors) = or += a (rows, K) times b (K, the same vectors). Element (r, k) of a is
 * a[r * a_row + k * a_col]: a matrix or its transpose. */
INLINE void product_block(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_col,
                          const float *b, int64_t b_row, int K, int add, const int rows,
                          const int vectors) {
    vec acc[8][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            acc[r][v] = add ? (vec)LOAD(c + r * c_row + v * LANES) : (vec){0};
    for (int k = 0; k < K; k++, a += a_col, b += b_row)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) acc[r][v] += a[r * a_row] * LOAD(b + v * LANES);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) STORE(c + r * c_row + v * LANES, acc[r][v]);
}

/* c (M, N) = or += a (M, K) times b (K, N), N a multiple of LANES. For what stays in a cache. */
OUT_OF_LINE static void product(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_col,
                                const float *b, int64_t b_row, int M, int N, int K, int add) {
    const int pair = LANES == 8 ? 1 : 2;          /* 8 lanes have 16 registers, the others 32 */
    for (int n = 0; n < N; n += pair * LANES) {
        #define BLOCK(rows, vectors) product_block(c + m * c_row + n, c_row, a + m * a_row, a_row, \
            a_col, b + n, b_row, K, add, rows, vectors)
        int m = 0;
        if (n + pair * LANES <= N) {
            for (; m + 8 <= M; m += 8) BLOCK(8, pair);
            for (; m + 4 <= M; m += 4) BLOCK(4, pair);
            for (; m < M; m++) BLOCK(1, pair);
        } else {
            for (; m + 8 <= M; m += 8) BLOCK(8, 1);
            for (; m < M; m++) BLOCK(1, 1);
        }
    }
}

/* out (columns, rows) = x (rows, columns) transposed: a perfect shuffle of LANES vectors, log2(LANES)
 * times. */
static void transpose(float *out, int64_t out_row, const float *x, int64_t x_row, int rows, int columns) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES) {
            const int n = rows - i < LANES ? rows - i : LANES, m = columns - j < LANES ? columns - j : LANES;
            const float *from = x + i * x_row + j;
            float *to = out + j * out_row + i;
            if (n < LANES || m < LANES) {
                for (int k = 0; k < n * m; k++) to[k % m * out_row + k / m] = from[k / m * x_row + k % m];
                continue;
            }
            vec a[LANES], b[LANES];
            for (int k = 0; k < LANES; k++) a[k] = LOAD(from + k * x_row);
            for (int step = 1; step < LANES; step *= 2) {
                for (int k = 0; k < HALF; k++) {
                    b[2 * k] = INTERLEAVE(a[k], a[k + HALF], 0);
                    b[2 * k + 1] = INTERLEAVE(a[k], a[k + HALF], HALF);
                }
                memcpy(a, b, sizeof a);
            }
            for (int k = 0; k < LANES; k++) STORE(to + k * out_row, a[k]);
        }
}

/* dw (N, D) = g^T x of g (M, N) and x (M, D), neither turned in memory. A job is a chunk of rows of g and
 * x, for a sum of its own, and of columns of g. */
int weight_gradient(float *dw, const float *g, const float *x, int M, int N, int D) {
    const int chunk = 1024, block = 256, columns = 256;       /* a block stays in the cache */
    const int chunks = (M + chunk - 1) / chunk, parts = (N + columns - 1) / columns;
    const int64_t size = (int64_t)N * D;
    float *partial = vectors(chunks * size);
    if (!partial) return -1;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < chunks * parts; job++) {
        const int first = job % parts * columns, n = N - first < columns ? N - first : columns;
        const int from = job / parts * chunk, to = from + chunk < M ? from + chunk : M;
        for (int64_t m = from; m < to; m += block)
            product(partial + job / parts * size + first * D, D, g + m * N + first, 1, N, x + m * D, D,
                    n, D, to - m < block ? to - m : block, m > from);
    }
    add_up(dw, partial, size, chunks, size);
    free(partial);
    return 0;
}

/* ---- Layers that begin with a norm: n = norm(x), and then products
 *
 * TILE rows of x go through all of a layer while they are in the cache, forward and again backward, so
 * that nothing but x is kept in between. Inside, a tile is transposed, rows in lanes: that way weights
 * are used as they lie. Where the last tile has less than TILE rows, what is beyond them is never read
 * by a sum over rows nor stored. */
#define TILE 64

/* n (rows, D) = norm(x), and, unless it is NULL, its transpose (D, TILE). */
static void norm_tile(float *n, float *transposed, float *inverse, const float *x, const float *norm,
                      int rows, int D, float eps) {
    for (int r = 0; r < rows; r++) inverse[r] = norm_row(n + r * D, x + r * D, norm, D, eps);
    if (transposed) transpose(transposed, TILE, n, D, rows, D);
}

/* Rows to a sum of their own in a backward pass: 16 to 31 sums, or one a tile. */
static int rows_of_a_sum(int N) { return (N / (16 * TILE) + (N < 16 * TILE)) * TILE; }

static float *tile_memory(int64_t columns) {      /* (columns, TILE), all 0 */
    float *p = vectors(columns * TILE);
    return p ? memset(p, 0, columns * TILE * sizeof(float)) : NULL;
}

/* x and out (N, D), norm (D), w1 and w3 (F, D), w2 (D, F): out = w2 (silu(w1 n) * w3 n). */
int feed_forward(float *out, const float *x, const float *norm, const float *w1, const float *w2,
                 const float *w3, int N, int D, int F, float eps) {
    int failed = 0;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(2 * D + 2 * F), inverse[TILE];
        float *t = n + TILE * D, *gate = t + TILE * D, *up = gate + TILE * F;
        if (!n) failed = -1;
        #pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < N; from += TILE) {
            const int rows = N - from < TILE ? N - from : TILE;
            if (!n) continue;
            norm_tile(n, t, inverse, x + from * D, norm, rows, D, eps);
            product(gate, TILE, w1, D, 1, t, TILE, F, TILE, D, 0);
            product(up, TILE, w3, D, 1, t, TILE, F, TILE, D, 0);
            for (int i = 0; i < F * TILE; i += LANES)
                STORE(gate + i, LOAD(gate + i) * sigmoid(LOAD(gate + i)) * LOAD(up + i));
            product(t, TILE, w2, F, 1, gate, TILE, D, TILE, F, 0);
            transpose(out + from * D, D, t, TILE, D, rows);
        }
        free(n);
    }
    return failed;
}

/* Gradients of feed_forward's inputs, of the same shapes, from g (N, D). */
int feed_forward_backward(float *dx, float *dnorm, float *dw1, float *dw2, float *dw3, const float *g,
                          const float *x, const float *norm, const float *w1, const float *w2,
                          const float *w3, int N, int D, int F, float eps) {
    const int chunk = rows_of_a_sum(N), chunks = (N + chunk - 1) / chunk;
    const int64_t matrix = (int64_t)F * D, size = 3 * matrix + D;
    float *sums = vectors(chunks * size);
    int failed = sums ? 0 : -1;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(4 * D + 3 * F), inverse[TILE];
        float *t = n + TILE * D, *dn = t + TILE * D, *gt = dn + TILE * D;
        float *gate = gt + TILE * D, *up = gate + TILE * F, *h = up + TILE * F;
        if (!n) failed = -1;
        #pragma omp for schedule(dynamic)
        for (int c = 0; c < chunks; c++) {
            float *sum1 = sums + c * size, *sum3 = sum1 + matrix, *sum2 = sum3 + matrix;
            float *sum = sum2 + matrix;           /* of dw1, dw3, dw2 transposed, dnorm */
            const int64_t end = N - (int64_t)c * chunk < chunk ? N : (int64_t)(c + 1) * chunk;
            if (!sums || !n) continue;
            memset(sum1, 0, size * sizeof(float));
            for (int64_t from = (int64_t)c * chunk; from < end; from += TILE) {
                const int rows = end - from < TILE ? end - from : TILE;
                const float *gr = g + from * D;
                norm_tile(n, t, inverse, x + from * D, norm, rows, D, eps);
                product(gate, TILE, w1, D, 1, t, TILE, F, TILE, D, 0);
                product(up, TILE, w3, D, 1, t, TILE, F, TILE, D, 0);
                transpose(gt, TILE, gr, D, rows, D);
                product(h, TILE, w2, 1, F, gt, TILE, F, TILE, D, 0);
                for (int i = 0; i < F * TILE; i += LANES) {
                    const vec a = LOAD(gate + i), b = LOAD(up + i), dh = LOAD(h + i), s = sigmoid(a);
                    STORE(h + i, a * s * b);
                    STORE(gate + i, dh * b * s * (a * (1.0f - s) + 1.0f));
                    STORE(up + i, dh * a * s);
                }
                product(sum1, D, gate, TILE, 1, n, D, F, D, rows, 1);
                product(sum3, D, up, TILE, 1, n, D, F, D, rows, 1);
                product(sum2, D, h, TILE, 1, gr, D, F, D, rows, 1);
                product(dn, D, gate, 1, TILE, w1, D, rows, D, F, 0);
                product(dn, D, up, 1, TILE, w3, D, rows, D, F, 1);
                for (int r = 0; r < rows; r++)
                    norm_row_gradient(dx + (from + r) * D, sum, dn + r * D, x + (from + r) * D, inverse[r],
                                      norm, D);
            }
        }
        free(n);
    }
    if (!failed) {
        add_up(dw1, sums, matrix, chunks, size);
        add_up(dw3, sums + matrix, matrix, chunks, size);
        add_up(sums + 2 * matrix, sums + 2 * matrix, matrix, chunks, size);
        transpose(dw2, F, sums + 2 * matrix, D, F, D);
        add_up(dnorm, sums + 3 * matrix, D, chunks, size);
    }
    free(sums);
    return failed;
}

/* Attention's q (N, Q), k and v (N, K): n times wq (Q, D), wk and wv (K, D) transposed. */
int norm_qkv(float *q, float *k, float *v, const float *x, const float *norm, const float *wq,
             const float *wk, const float *wv, int N, int D, int Q, int K, float eps) {
    int failed = 0;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(2 * D + Q + 2 * K), inverse[TILE];
        float *t = n + TILE * D, *y = t + TILE * D;
        if (!n) failed = -1;
        #pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < N; from += TILE) {
            const int rows = N - from < TILE ? N - from : TILE;
            if (!n) continue;
            norm_tile(n, t, inverse, x + from * D, norm, rows, D, eps);
            product(y, TILE, wq, D, 1, t, TILE, Q, TILE, D, 0);
            product(y + Q * TILE, TILE, wk, D, 1, t, TILE, K, TILE, D, 0);
            product(y + (Q + K) * TILE, TILE, wv, D, 1, t, TILE, K, TILE, D, 0);
            transpose(q + from * Q, Q, y, TILE, Q, rows);
            transpose(k + from * K, K, y + Q * TILE, TILE, K, rows);
            transpose(v + from * K, K, y + (Q + K) * TILE, TILE, K, rows);
        }
        free(n);
    }
    return failed;
}

/* Gradients of norm_qkv's inputs, of the same shapes. */
int norm_qkv_backward(float *dx, float *dnorm, float *dwq, float *dwk, float *dwv, const float *dq,
                      const float *dk, const float *dv, const float *x, const float *norm,
                      const float *wq, const float *wk, const float *wv, int N, int D, int Q, int K,
                      float eps) {
    const int chunk = rows_of_a_sum(N), chunks = (N + chunk - 1) / chunk;
    const int64_t size = (int64_t)(Q + 2 * K + 1) * D;
    float *sums = vectors(chunks * size);
    int failed = sums ? 0 : -1;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(2 * D), inverse[TILE];
        float *dn = n + TILE * D;
        if (!n) failed = -1;
        #pragma omp for schedule(dynamic)
        for (int c = 0; c < chunks; c++) {
            float *sumq = sums + c * size, *sumk = sumq + Q * D, *sumv = sumk + K * D, *sum = sumv + K * D;
            const int64_t end = N - (int64_t)c * chunk < chunk ? N : (int64_t)(c + 1) * chunk;
            if (!sums || !n) continue;
            memset(sumq, 0, size * sizeof(float));
            for (int64_t from = (int64_t)c * chunk; from < end; from += TILE) {
                const int rows = end - from < TILE ? end - from : TILE;
                norm_tile(n, NULL, inverse, x + from * D, norm, rows, D, eps);
                product(sumq, D, dq + from * Q, 1, Q, n, D, Q, D, rows, 1);
                product(sumk, D, dk + from * K, 1, K, n, D, K, D, rows, 1);
                product(sumv, D, dv + from * K, 1, K, n, D, K, D, rows, 1);
                product(dn, D, dq + from * Q, Q, 1, wq, D, rows, D, Q, 0);
                product(dn, D, dk + from * K, K, 1, wk, D, rows, D, K, 1);
                product(dn, D, dv + from * K, K, 1, wv, D, rows, D, K, 1);
                for (int r = 0; r < rows; r++)
                    norm_row_gradient(dx + (from + r) * D, sum, dn + r * D, x + (from + r) * D, inverse[r],
                                      norm, D);
            }
        }
        free(n);
    }
    if (!failed) {
        add_up(dwq, sums, Q * D, chunks, size);
        add_up(dwk, sums + Q * D, K * D, chunks, size);
        add_up(dwv, sums + (Q + K) * D, K * D, chunks, size);
        add_up(dnorm, sums + (Q + 2 * K) * D, D, chunks, size);
    }
    free(sums);
    return failed;
}

/* ---- What a loss needs of a distribution over the vocabulary */

/* The highest of a row x (V), and the log of the sum of e^(x - highest): each is exact where log softmax
 * is all but 0 and x is large. */
INLINE void softmax_norm(float norm[2], const float *x, int V) {
    vec top = LOAD(x), total = {0};
    for (int v = 0; v < V; v += LANES) top = larger(LOAD(x + v), top);
    norm[0] = maximum(top);
    for (int v = 0; v < V; v += LANES) total += exp2_nonpositive((LOAD(x + v) - norm[0]) * LOG2_E);
    norm[1] = logf(sum(total));
}

/* Of each row of logits (N, V), V a multiple of LANES: log-probability of its target (N), 0 where that
 * is -1; entropy (N); KL to softmax(ref) (N), 0 where ref is NULL; and, for the backward pass, the norms
 * of logits and of ref (N, 4). Returns 0, or -3 if a target is none. */
int token_terms(float *logprob, float *entropy, float *kl, float *norms, const float *logits,
                const float *ref, const int64_t *target, int N, int V) {
    int failed = 0;
    #pragma omp parallel for schedule(static) if (N >= 64)
    for (int64_t n = 0; n < N; n++) {
        const float *x = logits + n * V, *y = ref ? ref + n * V : x;
        float *norm = norms + 4 * n;
        vec h = {0}, d = {0};
        softmax_norm(norm, x, V);
        if (ref) softmax_norm(norm + 2, y, V);
        else memcpy(norm + 2, norm, 2 * sizeof(float));
        for (int v = 0; v < V; v += LANES) {
            const vec logp = LOAD(x + v) - norm[0] - norm[1], logq = LOAD(y + v) - norm[2] - norm[3];
            const vec p = exp2_nonpositive(logp * LOG2_E);
            h -= p * logp;
            d += p * (logp - logq);
        }
        entropy[n] = sum(h);
        kl[n] = sum(d);
        if (target[n] < -1 || target[n] >= V) failed = -3;
        else logprob[n] = target[n] < 0 ? 0 : x[target[n]] - norm[0] - norm[1];
    }
    return failed;
}

/* Gradient of the logits (N, V) from those of the three; the formula is in kernels.py. */
int token_terms_backward(float *dlogits, const float *of_logprob, const float *of_entropy,
                         const float *of_kl, const float *entropy, const float *kl, const float *norms,
                         const float *logits, const float *ref, const int64_t *target, int N, int V) {
    #pragma omp parallel for schedule(static) if (N >= 64)
    for (int64_t n = 0; n < N; n++) {
        const float *x = logits + n * V, *y = ref ? ref + n * V : x, *norm = norms + 4 * n;
        const float of_target = target[n] < 0 ? 0 : of_logprob[n], of_ref = ref ? of_kl[n] : 0;
        const float constant = of_target + of_entropy[n] * entropy[n] + of_ref * kl[n];
        for (int v = 0; v < V; v += LANES) {
            const vec logp = LOAD(x + v) - norm[0] - norm[1], logq = LOAD(y + v) - norm[2] - norm[3];
            const vec g = logp * (of_ref - of_entropy[n]) - logq * of_ref - constant;
            STORE(dlogits + n * V + v, g * exp2_nonpositive(logp * LOG2_E));
        }
        if (target[n] >= 0) dlogits[n * V + target[n]] += of_target;
    }
    return 0;
}

/* ---- Decoding: the whole model for one new token, or several, of each of B rows of a batch
 *
 * LANES rows go through all layers together, each in a lane, so that no sum runs across lanes, and
 * weights lie as they are: one is a number for all lanes. Activations stay in the first cache of the
 * processor, and the rows' keys and values in its last one while they draw several tokens. A row's
 * numbers do not depend on its neighbours. */

typedef struct {
    const float *weights;  /* for each layer attention_norm (D), wq|wk|wv (D + 2 K E, D), wo (D, D),
                              ffn_norm (D), w1|w3 (2 F, D), w2 (D, F) */
    const float *cosine, *sine;
    float *keys, *values;  /* (L, capacity, K, T / LANES, E, LANES) */
    int64_t capacity;      /* rows */
    int L, D, F, H, K, E, T;
    float eps;
} Stack;

typedef struct {           /* of one thread */
    vec *x, *normed, *qkv, *gate, *scores, *logits;
    float *flat, *out;     /* qkv and the heads' outputs, a row after the other */
} Work;

/* Adds w (rows, K) times x (K) to out (rows). */
INLINE void product_rows(vec *out, const float *w, const vec *x, int K, const int rows) {
    vec acc[8];
    for (int r = 0; r < rows; r++) acc[r] = out[r];
    for (int k = 0; k < K; k++)
        for (int r = 0; r < rows; r++) acc[r] += w[(int64_t)r * K + k] * x[k];
    for (int r = 0; r < rows; r++) out[r] = acc[r];
}

/* Adds w (N, K) times x (K) to out (N); returns what lies behind w. */
static const float *tile_product(vec *out, const float *w, const vec *x, int N, int K) {
    int n = 0;
    for (; n + 8 <= N; n += 8) product_rows(out + n, w + (int64_t)n * K, x, K, 8);
    for (; n < N; n++) product_rows(out + n, w + (int64_t)n * K, x, K, 1);
    return w + (int64_t)N * K;
}

static const float *tile_norm(vec *out, const vec *x, const float *weight, int D, float eps) {
    vec squares = {0}, inverse = {0};
    for (int d = 0; d < D; d++) squares += x[d] * x[d];
    for (int i = 0; i < LANES; i++) inverse[i] = 1 / sqrtf(squares[i] / D + eps);
    for (int d = 0; d < D; d++) out[d] = x[d] * inverse * weight[d];
    return weight + D;
}

/* w->x (D), up to LANES rows, becomes what all layers make of it. They are the rows `first` and on of
 * the caches, which get their keys and values of positions (rows), -1 for a row that is left out. */
static void stack_tile(const Stack *s, const Work *w, int64_t first, const int64_t *positions, int rows) {
    const int D = s->D, F = s->F, K = s->K, H = s->H, E = s->E, M = D + 2 * K * E, G = H / K;
    const int64_t head = (int64_t)E * s->T;
    const float *p = s->weights;
    for (int layer = 0; layer < s->L; layer++) {
        p = tile_norm(w->normed, w->x, p, D, s->eps);
        memset(w->qkv, 0, M * sizeof(vec));
        p = tile_product(w->qkv, p, w->normed, M, D);
        for (int i = 0; i < M; i += E) store_tile(w->flat + i, w->qkv + i, M, rows, E);
        for (int job = 0; job < rows * K; job++) {
            const int r = job / K, h = job % K, position = (int)positions[r];
            if (position < 0) continue;
            const int64_t at = ((layer * s->capacity + first) * K + job) * head;
            const int64_t angle = (int64_t)position * (E / 2);
            const float *q = w->flat + r * M + h * G * E, *k = w->flat + r * M + D + h * E;
            #define DECODE(R, E) decode_head(w->out + r * D + h * G * E, s->keys + at, s->values + at, \
                q, k, k + K * E, s->cosine + angle, s->sine + angle, position, G, head, w->scores, R, E)
            FOR_R_E(DECODE)
        }
        for (int d = 0; d < D; d += E) load_tile(w->normed + d, w->out + d, D, rows, E);
        p = tile_product(w->x, p, w->normed, D, D);
        p = tile_norm(w->normed, w->x, p, D, s->eps);
        memset(w->gate, 0, 2 * F * sizeof(vec));
        p = tile_product(w->gate, p, w->normed, 2 * F, D);
        for (int f = 0; f < F; f++) w->gate[f] *= sigmoid(w->gate[f]) * w->gate[F + f];
        p = tile_product(w->x, p, w->gate, D, F);
    }
}

/* Points into one block of memory, to be freed as w.x; NULL if there is none. V logits, or 0. */
static Work new_work(const Stack *s, int V) {
    const int64_t M = s->D + 2 * s->K * s->E;
    Work w = {.x = vectors((3 * s->D + 2 * M + 2 * s->F + (int64_t)s->T * MAX_R + V) * LANES)};
    if (!w.x) return w;
    w.normed = w.x + s->D;
    w.qkv = w.normed + s->D;
    w.gate = w.qkv + M;
    w.scores = w.gate + 2 * s->F;
    w.logits = w.scores + (int64_t)s->T * MAX_R;
    w.flat = (float *)(w.logits + V);
    w.out = w.flat + M * LANES;
    return w;
}

/* x (B, D), D = H E, the embeddings of a token each, becomes what all layers make of it: the first B
 * rows of the caches get its key and value at positions (B). Returns 0, -1 without memory, or -2 where a
 * position is outside the caches. */
int decode_hidden(float *x, float *keys, float *values, const int64_t *positions, const float *weights,
                  const float *cosine, const float *sine, int B, int capacity, int L, int F, int H, int K,
                  int E, int T, float eps) {
    const Stack s = {weights, cosine, sine, keys, values, capacity, L, H * E, F, H, K, E, T, eps};
    int failed = 0;
    for (int b = 0; b < B; b++)
        if (positions[b] < 0 || positions[b] >= T) return -2;
    #pragma omp parallel if (B > LANES)
    {
        Work w = new_work(&s, 0);
        if (!w.x) failed = -1;
        #pragma omp for schedule(dynamic)
        for (int b = 0; b < B; b += LANES) {
            const int rows = B - b < LANES ? B - b : LANES;
            float *to = x + (int64_t)b * s.D;
            if (!w.x) continue;
            for (int d = 0; d < s.D; d += E) load_tile(w.x + d, to + d, s.D, rows, E);
            stack_tile(&s, &w, b, positions + b, rows);
            for (int d = 0; d < s.D; d += E) store_tile(to + d, w.x + d, s.D, rows, E);
        }
        free(w.x);
    }
    return failed;
}

/* A token of each row from softmax(logits / temperature), by its number u in [0, 1): the first at which
 * the sum of the probabilities exceeds u. Overwrites the logits (V); *probability becomes theirs. */
INLINE ivec draw(vec *logits, vec *probability, int V, vec u, float temperature) {
    vec top = (vec){0} - INFINITY, total = {0}, sum = {0};
    ivec id = {0};
    for (int v = 0; v < V; v++) top = larger(logits[v], top);
    for (int v = 0; v < V; v++) {
        logits[v] = exp2_nonpositive((logits[v] - top) * (LOG2_E / temperature));
        total += logits[v];
    }
    for (int v = 0; v < V - 1; v++) {             /* the last one, where rounding leads beyond the end */
        sum += logits[v];
        id -= sum <= u * total;
    }
    for (int i = 0; i < LANES; i++) (*probability)[i] = logits[id[i]][i] / total[i];
    return id;
}

/* Draws up to `steps` tokens for each of B rows, the first of the caches. Row b continues prompt row[b],
 * for which lengths (N) of tokens (N, max_new) are there, with probabilities, and random numbers uniform
 * of the same shape. current (B) is its newest token, not yet in the caches, which hold positions (B). It
 * ends with one of stops (n_stops), after max_new tokens, or where the caches hold `context`. Returns 0,
 * -1 without memory, or -2 where a position is outside the caches. */
int decode_tokens(int64_t *tokens, float *probabilities, int64_t *lengths, int64_t *current,
                  int64_t *positions, const float *uniform, const int64_t *row, const int64_t *stops,
                  float *keys, float *values, const float *embedding, const float *weights,
                  const float *norm, const float *output, const float *cosine, const float *sine, int B,
                  int steps, int max_new, int n_stops, int context, int V, int capacity, int L, int F,
                  int H, int K, int E, int T, float eps, float temperature) {
    const Stack s = {weights, cosine, sine, keys, values, capacity, L, H * E, F, H, K, E, T, eps};
    int failed = 0;
    #pragma omp parallel for schedule(dynamic) if (B > LANES)
    for (int first = 0; first < B; first += LANES) {
        const int rows = B - first < LANES ? B - first : LANES;
        int64_t at[LANES];                        /* -1: ended */
        Work w = new_work(&s, V);
        if (!w.x) failed = -1;
        for (int r = 0; r < rows; r++) at[r] = positions[first + r];
        for (int step = 0, alive = rows; step < steps && alive && !failed; step++) {
            vec u = {0}, probability;
            for (int r = 0; r < rows; r++) {
                const int64_t i = row[first + r];
                if (at[r] >= T) failed = -2, at[r] = -1;
                if (at[r] < 0) continue;
                u[r] = uniform[i * max_new + lengths[i]];
                memcpy(w.out + r * s.D, embedding + current[first + r] * s.D, s.D * sizeof(float));
            }
            for (int d = 0; d < s.D; d += E) load_tile(w.x + d, w.out + d, s.D, rows, E);
            stack_tile(&s, &w, first, at, rows);
            tile_norm(w.normed, w.x, norm, s.D, eps);
            memset(w.logits, 0, V * sizeof(vec));
            tile_product(w.logits, output, w.normed, V, s.D);
            const ivec id = draw(w.logits, &probability, V, u, temperature);
            for (int r = 0; r < rows; r++) {
                const int64_t i = row[first + r], to = i * max_new + lengths[i];
                if (at[r] < 0) continue;
                tokens[to] = current[first + r] = id[r];
                probabilities[to] = probability[r];
                positions[first + r] = ++at[r];
                int ended = ++lengths[i] >= max_new || at[r] >= context;
                for (int j = 0; j < n_stops; j++) ended |= id[r] == stops[j];
                if (ended) at[r] = -1, alive--;
            }
        }
        free(w.x);
    }
    return failed;
}
