/* CPU kernels for small Llama models, faster than PyTorch's: causal attention with rotary
 * embeddings for small heads (forward and backward), RMSNorm, SwiGLU, the gradient of a weight
 * matrix, and decoding over a KV cache. kernels.py compiles this file on first use and calls it
 * through ctypes. PyTorch's own functions serve where there is no compiler, and are the oracle of
 * the tests.
 *
 * Why it exists. PyTorch's attention puts the head dimension into the lanes of a vector register.
 * With the heads of 8 dimensions of a 260K-parameter model most of each register, and of the time,
 * is wasted: more than half of a training step went there. Here the lanes are *queries*, so that
 * the softmaxes of up to 16 queries lie side by side and no sum runs across a register; a decoding
 * step, which has one query per head, has keys in the lanes. Sequences are packed one after the
 * other, so that batches of different lengths (PPO rollouts) cost no padding. The other functions
 * make one pass over memory where PyTorch makes several.
 *
 * Letters as in model.py: N packed tokens, D dim, F hidden dim, S sequences, H query heads, K
 * key/value heads (each shared by H / K query heads), E head dim (even, at most MAX_E), T capacity
 * of the cache, V vocabulary, L layers, B rows of a batch. A comment like (N, H, E) is the shape of
 * an array. All arrays are row-major and contiguous, and float32 unless their type says otherwise.
 * Every output element is written by one thread in a fixed order, so the numbers do not depend on
 * the number of threads. A function that fails returns one of the codes below, else 0.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined __AVX512F__    /* LANES is the number of floats per vector of this processor */
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define MAX_E 16           /* wider heads suit PyTorch's own kernels */
#define MAX_R 2            /* queries that decode together */
#define NO_MEMORY (-1)
#define CACHE_FULL (-2)    /* a position is outside the KV cache */
#define BAD_TARGET (-3)    /* a target is outside the vocabulary */
#define LOG2_E 1.44269504f
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int64_t lvec __attribute__((vector_size(4 * LANES)));
typedef int64_t pair __attribute__((may_alias));  /* two floats, moved as one */

#define LOAD(p) (*(const vec_unaligned *)(p))
#define STORE(p, v) (*(vec_unaligned *)(p) = (v))
/* The constants R and E reach the innermost loops only if everything is inlined. */
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define OUT_OF_LINE __attribute__((noinline))
#else /* noclone: gcc 12 makes slower code of a copy for constants */
#define OUT_OF_LINE __attribute__((noinline, noclone))
#endif

/* INTERLEAVE is a[i], b[i], a[i + 1], b[i + 1], ...: as many as fill a vector. */
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

/* a in the lanes where mask is -1, b where it is 0. */
INLINE vec choose(ivec mask, vec a, vec b) {
    return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}

/* a > b ? a : b in each lane, so b where either is NaN. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16 /* one instruction; a chain of choose() has a longer latency */
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* The maximum of the lanes. */
INLINE float maximum(vec v) {
    for (int half = HALF; half; half /= 2)
        v = larger(INTERLEAVE(v, v, 0), INTERLEAVE(v, v, HALF));
    return v[0];
}

/* The sum of the lanes. */
INLINE float sum(vec v) {
    for (int half = HALF; half; half /= 2) v = INTERLEAVE(v, v, 0) + INTERLEAVE(v, v, HALF);
    return v[0];
}

/* A vector whose lane i is the sum of the lanes of v[i]; v (LANES) is overwritten. */
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

/* 2^x for x <= 0, with a relative error below 2e-7; 0 for x < -64, NaN for NaN. A smaller result
 * would be lost in any sum with 1, and its products with gradients would be subnormal, which takes
 * Intel's processors 100 cycles or more.
 * x = n + r with an integer n and |r| <= 1/2: 2^r is its minimax polynomial, 2^n the exponent. */
INLINE vec exp2_nonpositive(vec x) {
    vec shifted = x + 12582912.0f; /* + 1.5 * 2^23 rounds, and the last bits are n */
    vec r = x - (shifted - 12582912.0f);
    vec p = r * 1.326472604e-3f + 9.671512722e-3f;
    p = p * r + 5.550733747e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return choose(x < -64.0f, (vec){0}, (vec)((ivec)p + ((ivec)shifted << 23)));
}

/* out (E) = RoPE of x (E): the pairs (x[0], x[1]), (x[2], x[3]), ... rotated by the angles of
 * their position, whose cosine and sine are (E / 2). direction is +1, or -1 for the inverse, which
 * is also the backward pass. */
INLINE void rotate(float *out, const float *x, const float *cosine, const float *sine,
                   float direction, const int E) {
    for (int i = 0; i < E / 2; i++) {
        float c = cosine[i], s = direction * sine[i], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = a * c - b * s;
        out[2 * i + 1] = a * s + b * c;
    }
}

/* rotate for LANES rows in place: x (E), c and s (E / 2) are vectors with one row per lane. */
INLINE void rotate_tile(vec *x, const vec *c, const vec *s, float direction, const int E) {
    for (int i = 0; i < E / 2; i++) {
        vec a = x[2 * i], b = x[2 * i + 1], sine = s[i] * direction;
        x[2 * i] = a * c[i] - b * sine;
        x[2 * i + 1] = a * sine + b * c[i];
    }
}

/* tile (E) = up to LANES rows of x, stride floats apart, one row per lane; lanes without a row are
 * 0. */
INLINE void load_tile(vec *tile, const float *x, int64_t stride, int rows, const int E) {
    float a[MAX_E][LANES];
    if (rows < LANES) memset(a, 0, sizeof a);
    for (int i = 0; i < rows; i++)
        for (int e = 0; e < E; e++) a[e][i] = x[i * stride + e];
    for (int e = 0; e < E; e++) tile[e] = LOAD(a[e]);
}

/* The inverse of load_tile: writes the rows of a tile to x. */
INLINE void store_tile(float *x, const vec *tile, int64_t stride, int rows, const int E) {
    float a[MAX_E][LANES];
    for (int e = 0; e < E; e++) STORE(a[e], tile[e]);
    for (int i = 0; i < rows; i++)
        for (int e = 0; e < E; e++) x[i * stride + e] = a[e][i];
}

/* keys (n, E) = the rotated keys of one head, whose rows are stride floats apart in x; cosine and
 * sine are (n, E / 2). */
INLINE void rotate_keys(float *keys, const float *x, int64_t stride, int n, const float *cosine,
                        const float *sine, const int E) {
    for (int j = 0; j < n; j++)
        rotate(keys + j * E, x + j * stride, cosine + j * (E / 2), sine + j * (E / 2), 1, E);
}

/* x, or `hidden` in the lanes whose query, at position first + lane, comes before key j. */
INLINE vec hide(vec x, float hidden, int first, int j) {
    return j > first ? choose(lane_numbers() < j - first, (vec){0} + hidden, x) : x;
}

/* The keys and values of one kv head of a sequence. */
typedef struct {
    const float *keys;  /* (n, E), rotated */
    const float *v;     /* n rows of E, stride floats apart */
    int64_t stride;
} Head;

/* LANES queries q (E), at positions first, first + 1, ..., rotated and scaled by LOG2_E / sqrt(E),
 * against the first n keys of a head: out (E) = softmax(q . keys) v; for each query the highest
 * score and inverse = 1 / sum of 2^(score - highest). scores (n) is memory for the scores. */
INLINE void forward_tile(vec *out, vec *highest, vec *inverse, const vec *q, Head head, int first,
                         int n, vec *scores, const int E) {
    const float *keys = head.keys, *v = head.v;
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
        for (int e = 0; e < E; e++) acc[e] += p * v[j * head.stride + e];
    }
    *highest = top;
    *inverse = 1.0f / total;
    for (int e = 0; e < E; e++) out[e] = acc[e] * *inverse;
}

/* The backward pass of forward_tile, for the same queries q (E). dout (E) is multiplied by
 * `inverse`, so that 2^(score - highest) stands for the probability, and delta = sum_j p_j dp_j =
 * dout . out. Writes dq (E) / scale, and adds the gradients of each key to dkv (n, W, LANES), where
 * they lie as dk[0], dv[0], dk[1], dv[1], ... rows (LANES, W, LANES) has what these are sums of, W
 * vectors per query: q[0], dout[0], q[1], ... */
INLINE void backward_tile(vec *dq, float *dkv, const vec *dout, vec delta, vec highest,
                          const vec *q, const float *rows, Head head, int first, int n,
                          const int W, const int E) {
    const float *keys = head.keys;
    vec acc[MAX_E], ds[LANES], weights[LANES][2]; /* weights: ds, p of query 0, of query 1, ... */
    for (int e = 0; e < E; e++) acc[e] = (vec){0};
    for (int from = 0; from < n; from += LANES) { /* three loops, each with few enough registers */
        int count = n - from < LANES ? n - from : LANES;
        for (int j = 0; j < count; j++) {
            const float *key = keys + (from + j) * E, *value = head.v + (from + j) * head.stride;
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

/* The arguments of attention_forward and attention_backward. */
typedef struct {
    float *out;           /* (N, H, E) softmax(q . k / sqrt(E)) v, over RoPE of q and k */
    float *softmax;       /* (N, H, 2) highest score, in bits, and 1 / sum of 2^(score - highest) */
    const float *q;       /* (N, H, E) unrotated */
    const float *k, *v;   /* (N, K, E) unrotated */
    const int64_t *starts; /* (S + 1) offsets of the sequences in the N tokens */
    const float *cosine, *sine; /* (N, E / 2) of the position of each token */
    const float *dout;    /* (N, H, E) the gradient of out; this and the rest for backward only */
    float *dq;            /* (N, H, E) */
    float *dk, *dv;       /* (N, K, E) */
    int S, H, K, E;
} Attention;

/* The arguments for sequence s alone: the arrays of tokens begin at its first token. */
INLINE Attention sequence(const Attention *all, int s) {
    Attention a = *all;
    const int64_t from = a.starts[s], at_q = from * a.H * a.E, at_k = from * a.K * a.E;
    a.out += at_q, a.softmax += from * a.H * 2, a.q += at_q, a.k += at_k, a.v += at_k;
    a.cosine += from * (a.E / 2), a.sine += from * (a.E / 2);
    if (a.dout) a.dout += at_q, a.dq += at_q, a.dk += at_k, a.dv += at_k;
    return a;
}

/* attention_forward for kv head kh of one sequence of n tokens; work (n, LANES + E). This function
 * and the next are compiled once for each constant E, so that their loops unroll. */
INLINE void forward_head(const Attention a, int n, int kh, float *work, const int E) {
    const int H = a.H, K = a.K;
    vec *scores = (vec *)work;
    float *keys = work + (int64_t)n * LANES;
    const Head head = {keys, a.v + kh * E, K * E};
    rotate_keys(keys, a.k + kh * E, K * E, n, a.cosine, a.sine, E);
    for (int i = 0; i < n; i += LANES) {
        int rows = n - i < LANES ? n - i : LANES;
        vec c[MAX_E / 2], s[MAX_E / 2], x[MAX_E], y[MAX_E], norm[2];
        load_tile(c, a.cosine + i * (E / 2), E / 2, rows, E / 2);
        load_tile(s, a.sine + i * (E / 2), E / 2, rows, E / 2);
        for (int h = kh * (H / K); h < (kh + 1) * (H / K); h++) {
            int64_t at = (int64_t)i * H + h;
            load_tile(x, a.q + at * E, H * E, rows, E);
            rotate_tile(x, c, s, 1, E);
            for (int e = 0; e < E; e++) x[e] *= LOG2_E / sqrtf((float)E);
            forward_tile(y, norm, norm + 1, x, head, i, i + rows, scores, E);
            store_tile(a.out + at * E, y, H * E, rows, E);
            store_tile(a.softmax + at * 2, norm, H * 2, rows, 2);
        }
    }
}

/* attention_backward for kv head kh of one sequence of n tokens; work (n, W LANES + E). */
INLINE void backward_head(const Attention a, int n, int kh, float *work, const int E) {
    const int H = a.H, K = a.K, W = (2 * E + LANES - 1) / LANES; /* vectors per dk and dv */
    const float scale = 1.0f / sqrtf((float)E);
    float *dkv = work, *keys = work + (int64_t)n * W * LANES;
    const Head head = {keys, a.v + kh * E, K * E};
    rotate_keys(keys, a.k + kh * E, K * E, n, a.cosine, a.sine, E);
    memset(dkv, 0, sizeof(float) * n * W * LANES);
    for (int i = 0; i < n; i += LANES) {
        int count = n - i < LANES ? n - i : LANES;
        vec c[MAX_E / 2], s[MAX_E / 2], x[MAX_E], d[MAX_E], y[MAX_E], norm[2];
        load_tile(c, a.cosine + i * (E / 2), E / 2, count, E / 2);
        load_tile(s, a.sine + i * (E / 2), E / 2, count, E / 2);
        for (int h = kh * (H / K); h < (kh + 1) * (H / K); h++) {
            int64_t at = (int64_t)i * H + h;
            float rows[LANES * 2 * MAX_E] = {0};
            vec delta = {0};
            load_tile(x, a.q + at * E, H * E, count, E);
            load_tile(d, a.dout + at * E, H * E, count, E);
            load_tile(y, a.out + at * E, H * E, count, E);
            load_tile(norm, a.softmax + at * 2, H * 2, count, 2);
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
            backward_tile(y, dkv, d, delta, norm[0], x, rows, head, i, i + count, W, E);
            for (int e = 0; e < E; e++) y[e] *= scale;
            rotate_tile(y, c, s, -1, E);
            store_tile(a.dq + at * E, y, H * E, count, E);
        }
    }
    for (int j = 0; j < n; j++) {
        float grad[MAX_E];
        int64_t at = ((int64_t)j * K + kh) * E;
        for (int e = 0; e < E; e++) {
            grad[e] = dkv[j * W * LANES + 2 * e];
            a.dv[at + e] = dkv[j * W * LANES + 2 * e + 1];
        }
        rotate(a.dk + at, grad, a.cosine + j * (E / 2), a.sine + j * (E / 2), -1, E);
    }
}

/* Calls BODY(E) with a constant E where there is a case for it; other even head dimensions take the
 * general loop. */
#define FOR_E(BODY) \
    switch (E) { \
    case 4: BODY(4); break; \
    case 8: BODY(8); break; \
    case 16: BODY(16); break; \
    default: BODY(E); \
    }
/* Memory for so many floats, aligned for vectors; NULL if there is none. */
static void *vectors(int64_t floats) {
    return aligned_alloc(sizeof(vec), (floats / LANES + 1) * sizeof(vec));
}

/* Computes out and softmax from q, k and v. */
int attention_forward(const Attention *all) {
    const int S = all->S, K = all->K, E = all->E;
    int failed = 0;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < S * K; job++) {
        const Attention a = sequence(all, job / K);
        const int n = (int)(a.starts[job / K + 1] - a.starts[job / K]);
        float *work = vectors((int64_t)n * (LANES + E));
        if (!work) { failed = NO_MEMORY; continue; }
        #define FORWARD(E) forward_head(a, n, job % K, work, E)
        FOR_E(FORWARD)
        free(work);
    }
    return failed;
}

/* Computes the gradients dq, dk and dv from dout, and from out and softmax of attention_forward. */
int attention_backward(const Attention *all) {
    const int S = all->S, K = all->K, E = all->E;
    int failed = 0;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < S * K; job++) {
        const Attention a = sequence(all, job / K);
        const int n = (int)(a.starts[job / K + 1] - a.starts[job / K]);
        float *work = vectors((int64_t)n * (2 * MAX_E + E));
        if (!work) { failed = NO_MEMORY; continue; }
        #define BACKWARD(E) backward_head(a, n, job % K, work, E)
        FOR_E(BACKWARD)
        free(work);
    }
    return failed;
}

/* How many positions of a KV cache lie side by side. */
int attention_lanes(void) { return LANES; }

/* ---- RMSNorm, and products of matrices */

/* out (D) = x / rms(x) * weight, all (D); returns 1 / rms. D is a multiple of LANES from here to
 * the section on decoding. */
INLINE float norm_row(float *out, const float *x, const float *weight, int D, float eps) {
    vec squares = {0};
    for (int d = 0; d < D; d += LANES) squares += LOAD(x + d) * LOAD(x + d);
    const float inverse = 1 / sqrtf(sum(squares) / D + eps);
    for (int d = 0; d < D; d += LANES) STORE(out + d, LOAD(x + d) * inverse * LOAD(weight + d));
    return inverse;
}

/* The gradient of norm_row, all (D), from g, that of its output. With y = x inverse:
 * dx = inverse (g w - y mean(g w y)); g y is added to dweight. dx may be g. */
INLINE void norm_row_gradient(float *dx, float *dweight, const float *g, const float *x,
                              float inverse, const float *weight, int D) {
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

/* out (n) = the sum of `parts` partial sums (n), stride floats apart, in their order. */
static void add_up(float *out, const float *partial, int64_t n, int64_t parts, int64_t stride) {
    if (!parts) { /* of an empty batch */
        memset(out, 0, n * sizeof(float));
        return;
    }
    #pragma omp parallel for schedule(static) if (n >= 16384)
    for (int64_t i = 0; i < n; i += 1024) {
        const int64_t count = n - i < 1024 ? n - i : 1024;
        memmove(out + i, partial + i, count * sizeof(float)); /* out may be the first partial sum */
        for (int64_t p = 1; p < parts; p++)
            for (int64_t j = i; j < i + count; j++) out[j] += partial[p * stride + j];
    }
}

/* out (N, D) = x (N, D) / rms(x) * weight (D), and inverse (N) = 1 / rms. */
int rms_norm_forward(float *out, float *inverse, const float *x, const float *weight, int N, int D,
                     float eps) {
    #pragma omp parallel for schedule(static) if (N >= 256)
    for (int64_t n = 0; n < N; n++) inverse[n] = norm_row(out + n * D, x + n * D, weight, D, eps);
    return 0;
}

/* dx (N, D) and dweight (D), the sum over all rows, from g (N, D), the gradient of out. */
int rms_norm_backward(float *dx, float *dweight, const float *g, const float *x,
                      const float *inverse, const float *weight, int N, int D) {
    const int rows = 256, blocks = (N + rows - 1) / rows; /* one partial sum per block of rows */
    float *partial = calloc((size_t)blocks * D + 1, sizeof(float));
    if (!partial) return NO_MEMORY;
    #pragma omp parallel for schedule(static)
    for (int b = 0; b < blocks; b++)
        for (int64_t n = b * rows; n < N && n < (b + 1) * rows; n++)
            norm_row_gradient(dx + n * D, partial + b * D, g + n * D, x + n * D, inverse[n], weight,
                              D);
    add_up(dweight, partial, D, blocks, D);
    free(partial);
    return 0;
}

/* 1 / (1 + e^-x), from e^-|x|, which does not overflow. */
INLINE vec sigmoid(vec x) {
    vec e = exp2_nonpositive(choose(x > 0.0f, -x, x) * LOG2_E);
    return choose(x > 0.0f, (vec){0} + 1.0f, e) / (e + 1.0f);
}

/* c (rows, vectors LANES) = a (rows, K) times b (K, vectors LANES), or += if add. Rows of c and b
 * are c_row and b_row floats apart; element (r, k) of a is a[r * a_row + k * a_col], which makes a
 * a matrix or its transpose. */
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

/* c (M, N) = a (M, K) times b (K, N), or += if add, with the strides of product_block; N is a
 * multiple of LANES. It is for matrices that stay in a cache. */
OUT_OF_LINE static void product(float *c, int64_t c_row, const float *a, int64_t a_row,
                                int64_t a_col, const float *b, int64_t b_row, int M, int N, int K,
                                int add) {
    const int pair = LANES == 8 ? 1 : 2; /* 8 lanes come with 16 registers, the others with 32 */
    for (int n = 0; n < N; n += pair * LANES) {
        #define BLOCK(rows, vectors) \
            product_block(c + m * c_row + n, c_row, a + m * a_row, a_row, a_col, b + n, b_row, K, \
                          add, rows, vectors)
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

/* out (columns, rows) = x (rows, columns) transposed, with rows out_row and x_row floats apart:
 * blocks of LANES vectors are shuffled perfectly log2(LANES) times. */
static void transpose(float *out, int64_t out_row, const float *x, int64_t x_row, int rows,
                      int columns) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES) {
            const int n = rows - i < LANES ? rows - i : LANES;
            const int m = columns - j < LANES ? columns - j : LANES;
            const float *from = x + i * x_row + j;
            float *to = out + j * out_row + i;
            if (n < LANES || m < LANES) {
                for (int k = 0; k < n * m; k++)
                    to[k % m * out_row + k / m] = from[k / m * x_row + k % m];
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

/* dw (N, D) = g^T x for g (M, N) and x (M, D), without a transpose in memory. A job is a chunk of
 * rows of g and x, which has a partial sum of its own, and a range of columns of g. */
int weight_gradient(float *dw, const float *g, const float *x, int M, int N, int D) {
    const int chunk = 1024, block = 256, columns = 256; /* a block of rows stays in the cache */
    const int chunks = (M + chunk - 1) / chunk, parts = (N + columns - 1) / columns;
    const int64_t size = (int64_t)N * D;
    float *partial = vectors(chunks * size);
    if (!partial) return NO_MEMORY;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < chunks * parts; job++) {
        const int first = job % parts * columns, n = N - first < columns ? N - first : columns;
        const int from = job / parts * chunk, to = from + chunk < M ? from + chunk : M;
        for (int64_t m = from; m < to; m += block)
            product(partial + job / parts * size + first * D, D, g + m * N + first, 1, N, x + m * D,
                    D, n, D, to - m < block ? to - m : block, m > from);
    }
    add_up(dw, partial, size, chunks, size);
    free(partial);
    return 0;
}

/* ---- Layers that begin with a norm: n = norm(x), followed by products
 *
 * TILE rows of x go through the whole layer while they are in the cache, in the forward pass and
 * again in the backward pass, so that only x is kept in between. Inside, a tile is transposed, with
 * rows in lanes, so that weights are used as they lie in memory. Where the last tile has fewer than
 * TILE rows, no sum over rows reads the rest, and nothing stores it.
 */
#define TILE 64

/* n (rows, D) = norm(x) of x (rows, D), inverse (rows) its 1 / rms, and, unless it is NULL,
 * transposed (D, TILE) = n transposed. norm (D) is the weight. */
static void norm_tile(float *n, float *transposed, float *inverse, const float *x,
                      const float *norm, int rows, int D, float eps) {
    for (int r = 0; r < rows; r++) inverse[r] = norm_row(n + r * D, x + r * D, norm, D, eps);
    if (transposed) transpose(transposed, TILE, n, D, rows, D);
}

/* The rows per partial sum in a backward pass, which makes 16 to 31 sums, or one per tile. */
static int rows_of_a_sum(int N) { return (N / (16 * TILE) + (N < 16 * TILE)) * TILE; }

/* Zeroed memory (columns, TILE), or NULL. */
static float *tile_memory(int64_t columns) {
    float *p = vectors(columns * TILE);
    return p ? memset(p, 0, columns * TILE * sizeof(float)) : NULL;
}

/* The arguments of feed_forward and feed_forward_backward. */
typedef struct {
    float *out;            /* (N, D) w2 (silu(w1 n) * w3 n), with n = norm(x) */
    const float *x;        /* (N, D) */
    const float *norm;     /* (D) */
    const float *w1, *w3;  /* (F, D) */
    const float *w2;       /* (D, F) */
    const float *g;        /* (N, D) the gradient of out; this and the rest for backward only */
    float *dx, *dnorm, *dw1, *dw3, *dw2; /* the gradients of x, norm, ..., of the same shapes */
    int N, D, F;
    float eps;
} FeedForward;

/* Computes out. */
int feed_forward(const FeedForward *a) {
    const int N = a->N, D = a->D, F = a->F;
    const float *x = a->x;
    int failed = 0;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(2 * D + 2 * F), inverse[TILE];
        float *t = n + TILE * D, *gate = t + TILE * D, *up = gate + TILE * F;
        if (!n) failed = NO_MEMORY;
        #pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < N; from += TILE) {
            const int rows = N - from < TILE ? N - from : TILE;
            if (!n) continue;
            norm_tile(n, t, inverse, x + from * D, a->norm, rows, D, a->eps);
            product(gate, TILE, a->w1, D, 1, t, TILE, F, TILE, D, 0);
            product(up, TILE, a->w3, D, 1, t, TILE, F, TILE, D, 0);
            for (int i = 0; i < F * TILE; i += LANES)
                STORE(gate + i, LOAD(gate + i) * sigmoid(LOAD(gate + i)) * LOAD(up + i));
            product(t, TILE, a->w2, F, 1, gate, TILE, D, TILE, F, 0);
            transpose(a->out + from * D, D, t, TILE, D, rows);
        }
        free(n);
    }
    return failed;
}

/* Computes the gradients of x, norm and the weights from g. */
int feed_forward_backward(const FeedForward *a) {
    const int N = a->N, D = a->D, F = a->F;
    const float *x = a->x;
    const int chunk = rows_of_a_sum(N), chunks = (N + chunk - 1) / chunk;
    const int64_t matrix = (int64_t)F * D, size = 3 * matrix + D;
    float *sums = vectors(chunks * size);
    int failed = sums ? 0 : NO_MEMORY;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(4 * D + 3 * F), inverse[TILE];
        float *t = n + TILE * D, *dn = t + TILE * D, *gt = dn + TILE * D;
        float *gate = gt + TILE * D, *up = gate + TILE * F, *h = up + TILE * F;
        if (!n) failed = NO_MEMORY;
        #pragma omp for schedule(dynamic)
        for (int c = 0; c < chunks; c++) {
            float *sum1 = sums + c * size, *sum3 = sum1 + matrix, *sum2 = sum3 + matrix;
            float *sum = sum2 + matrix; /* of dw1, dw3, dw2 transposed, dnorm */
            const int64_t end = N - (int64_t)c * chunk < chunk ? N : (int64_t)(c + 1) * chunk;
            if (!sums || !n) continue;
            memset(sum1, 0, size * sizeof(float));
            for (int64_t from = (int64_t)c * chunk; from < end; from += TILE) {
                const int rows = end - from < TILE ? end - from : TILE;
                const float *gr = a->g + from * D;
                norm_tile(n, t, inverse, x + from * D, a->norm, rows, D, a->eps);
                product(gate, TILE, a->w1, D, 1, t, TILE, F, TILE, D, 0);
                product(up, TILE, a->w3, D, 1, t, TILE, F, TILE, D, 0);
                transpose(gt, TILE, gr, D, rows, D);
                product(h, TILE, a->w2, 1, F, gt, TILE, F, TILE, D, 0);
                for (int i = 0; i < F * TILE; i += LANES) {
                    const vec y = LOAD(gate + i), b = LOAD(up + i), dh = LOAD(h + i);
                    const vec s = sigmoid(y);
                    STORE(h + i, y * s * b);
                    STORE(gate + i, dh * b * s * (y * (1.0f - s) + 1.0f));
                    STORE(up + i, dh * y * s);
                }
                product(sum1, D, gate, TILE, 1, n, D, F, D, rows, 1);
                product(sum3, D, up, TILE, 1, n, D, F, D, rows, 1);
                product(sum2, D, h, TILE, 1, gr, D, F, D, rows, 1);
                product(dn, D, gate, 1, TILE, a->w1, D, rows, D, F, 0);
                product(dn, D, up, 1, TILE, a->w3, D, rows, D, F, 1);
                for (int r = 0; r < rows; r++)
                    norm_row_gradient(a->dx + (from + r) * D, sum, dn + r * D, x + (from + r) * D,
                                      inverse[r], a->norm, D);
            }
        }
        free(n);
    }
    if (!failed) {
        add_up(a->dw1, sums, matrix, chunks, size);
        add_up(a->dw3, sums + matrix, matrix, chunks, size);
        add_up(sums + 2 * matrix, sums + 2 * matrix, matrix, chunks, size);
        transpose(a->dw2, F, sums + 2 * matrix, D, F, D);
        add_up(a->dnorm, sums + 3 * matrix, D, chunks, size);
    }
    free(sums);
    return failed;
}

/* The arguments of norm_qkv and norm_qkv_backward. K is the width of k and v here. */
typedef struct {
    float *q, *k, *v;      /* (N, Q), (N, K), (N, K): n = norm(x) times wq, wk, wv transposed */
    const float *x;        /* (N, D) */
    const float *norm;     /* (D) */
    const float *wq, *wk, *wv; /* (Q, D), (K, D), (K, D) */
    const float *dq, *dk, *dv; /* the gradients of q, k, v; these and the rest for backward only */
    float *dx, *dnorm, *dwq, *dwk, *dwv; /* the gradients of x, norm, ..., of the same shapes */
    int N, D, Q, K;
    float eps;
} NormQKV;

/* Computes q, k and v. */
int norm_qkv(const NormQKV *a) {
    const int N = a->N, D = a->D, Q = a->Q, K = a->K;
    int failed = 0;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(2 * D + Q + 2 * K), inverse[TILE];
        float *t = n + TILE * D, *y = t + TILE * D;
        if (!n) failed = NO_MEMORY;
        #pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < N; from += TILE) {
            const int rows = N - from < TILE ? N - from : TILE;
            if (!n) continue;
            norm_tile(n, t, inverse, a->x + from * D, a->norm, rows, D, a->eps);
            product(y, TILE, a->wq, D, 1, t, TILE, Q, TILE, D, 0);
            product(y + Q * TILE, TILE, a->wk, D, 1, t, TILE, K, TILE, D, 0);
            product(y + (Q + K) * TILE, TILE, a->wv, D, 1, t, TILE, K, TILE, D, 0);
            transpose(a->q + from * Q, Q, y, TILE, Q, rows);
            transpose(a->k + from * K, K, y + Q * TILE, TILE, K, rows);
            transpose(a->v + from * K, K, y + (Q + K) * TILE, TILE, K, rows);
        }
        free(n);
    }
    return failed;
}

/* Computes the gradients of x, norm and the weights from dq, dk and dv. */
int norm_qkv_backward(const NormQKV *a) {
    const int N = a->N, D = a->D, Q = a->Q, K = a->K;
    const float *x = a->x, *dq = a->dq, *dk = a->dk, *dv = a->dv;
    const int chunk = rows_of_a_sum(N), chunks = (N + chunk - 1) / chunk;
    const int64_t size = (int64_t)(Q + 2 * K + 1) * D;
    float *sums = vectors(chunks * size);
    int failed = sums ? 0 : NO_MEMORY;
    #pragma omp parallel if (N > TILE)
    {
        float *n = tile_memory(2 * D), inverse[TILE];
        float *dn = n + TILE * D;
        if (!n) failed = NO_MEMORY;
        #pragma omp for schedule(dynamic)
        for (int c = 0; c < chunks; c++) {
            float *sumq = sums + c * size, *sumk = sumq + Q * D, *sumv = sumk + K * D;
            float *sum = sumv + K * D; /* of dwq, dwk, dwv, dnorm */
            const int64_t end = N - (int64_t)c * chunk < chunk ? N : (int64_t)(c + 1) * chunk;
            if (!sums || !n) continue;
            memset(sumq, 0, size * sizeof(float));
            for (int64_t from = (int64_t)c * chunk; from < end; from += TILE) {
                const int rows = end - from < TILE ? end - from : TILE;
                norm_tile(n, NULL, inverse, x + from * D, a->norm, rows, D, a->eps);
                product(sumq, D, dq + from * Q, 1, Q, n, D, Q, D, rows, 1);
                product(sumk, D, dk + from * K, 1, K, n, D, K, D, rows, 1);
                product(sumv, D, dv + from * K, 1, K, n, D, K, D, rows, 1);
                product(dn, D, dq + from * Q, Q, 1, a->wq, D, rows, D, Q, 0);
                product(dn, D, dk + from * K, K, 1, a->wk, D, rows, D, K, 1);
                product(dn, D, dv + from * K, K, 1, a->wv, D, rows, D, K, 1);
                for (int r = 0; r < rows; r++)
                    norm_row_gradient(a->dx + (from + r) * D, sum, dn + r * D, x + (from + r) * D,
                                      inverse[r], a->norm, D);
            }
        }
        free(n);
    }
    if (!failed) {
        add_up(a->dwq, sums, Q * D, chunks, size);
        add_up(a->dwk, sums + Q * D, K * D, chunks, size);
        add_up(a->dwv, sums + (Q + K) * D, K * D, chunks, size);
        add_up(a->dnorm, sums + (Q + 2 * K) * D, D, chunks, size);
    }
    free(sums);
    return failed;
}

/* ---- The terms of a loss that depend on a distribution over the vocabulary */

/* norm[0] = the maximum of a row x (V), norm[1] = log of the sum of e^(x - maximum). They are kept
 * apart so that log softmax close to 0 is exact where x is large. */
INLINE void softmax_norm(float norm[2], const float *x, int V) {
    vec top = LOAD(x), total = {0};
    for (int v = 0; v < V; v += LANES) top = larger(LOAD(x + v), top);
    norm[0] = maximum(top);
    for (int v = 0; v < V; v += LANES) total += exp2_nonpositive((LOAD(x + v) - norm[0]) * LOG2_E);
    norm[1] = logf(sum(total));
}

/* For each row of logits (N, V): logprob (N), the log-probability of its target (N), 0 where that
 * is -1; entropy (N); kl (N), the KL to softmax(ref), with ref (N, V), 0 if ref is NULL; and norms
 * (N, 4), the softmax_norm of logits and of ref, for the backward pass. Returns 0 or BAD_TARGET. */
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
            const vec logp = LOAD(x + v) - norm[0] - norm[1];
            const vec logq = LOAD(y + v) - norm[2] - norm[3];
            const vec p = exp2_nonpositive(logp * LOG2_E);
            h -= p * logp;
            d += p * (logp - logq);
        }
        entropy[n] = sum(h);
        kl[n] = sum(d);
        if (target[n] < -1 || target[n] >= V) failed = BAD_TARGET;
        else logprob[n] = target[n] < 0 ? 0 : x[target[n]] - norm[0] - norm[1];
    }
    return failed;
}

/* dlogits (N, V) from of_logprob, of_entropy and of_kl (N), the gradients of the three terms, and
 * from what token_terms read and wrote. The formula is in kernels.py. */
int token_terms_backward(float *dlogits, const float *of_logprob, const float *of_entropy,
                         const float *of_kl, const float *entropy, const float *kl,
                         const float *norms, const float *logits, const float *ref,
                         const int64_t *target, int N, int V) {
    #pragma omp parallel for schedule(static) if (N >= 64)
    for (int64_t n = 0; n < N; n++) {
        const float *x = logits + n * V, *y = ref ? ref + n * V : x, *norm = norms + 4 * n;
        const float of_target = target[n] < 0 ? 0 : of_logprob[n], of_ref = ref ? of_kl[n] : 0;
        const float constant = of_target + of_entropy[n] * entropy[n] + of_ref * kl[n];
        for (int v = 0; v < V; v += LANES) {
            const vec logp = LOAD(x + v) - norm[0] - norm[1];
            const vec logq = LOAD(y + v) - norm[2] - norm[3];
            const vec g = logp * (of_ref - of_entropy[n]) - logq * of_ref - constant;
            STORE(dlogits + n * V + v, g * exp2_nonpositive(logp * LOG2_E));
        }
        if (target[n] >= 0) dlogits[n * V + target[n]] += of_target;
    }
    return 0;
}

/* ---- Decoding: the whole model for one or several new tokens of each of B rows of a batch
 *
 * LANES rows go through all layers together, one per lane, so that no sum runs across lanes and
 * weights are used as they lie in memory: a weight is one number for all lanes. Activations stay in
 * the first-level cache, and the keys and values of these rows in the last-level cache, while the
 * rows sample several tokens. The numbers of a row do not depend on its neighbours.
 */

/* The arguments of decode_hidden and decode_tokens. */
typedef struct {
    /* The model and the KV cache */
    const float *weights;    /* for each layer: attention_norm (D), wq|wk|wv (D + 2 K E, D),
                                wo (D, D), ffn_norm (D), w1|w3 (2 F, D), w2 (D, F) */
    const float *cosine, *sine; /* (positions, E / 2) */
    float *keys, *values;    /* (L, capacity, K, T / LANES, E, LANES) */
    int64_t *positions;      /* (B) the position of the newest token of each row */
    float *x;                /* (steps, B, D) for decode_hidden: embeddings, then hidden states */
    /* The rest of the pointers is for decode_tokens, with N prompts. */
    const float *embedding;  /* (V, D) */
    const float *norm;       /* (D) the last norm */
    const float *output;     /* (V, D) the classifier */
    int64_t *tokens;         /* (N, max_new) the sampled tokens */
    float *probabilities;    /* (N, max_new) their probabilities */
    int64_t *lengths;        /* (N) how many tokens each prompt has */
    int64_t *current;        /* (B) the newest token of each row, not yet in the cache */
    const float *uniform;    /* (N, max_new) random numbers in [0, 1) */
    const int64_t *prompt;   /* (B) the prompt that each row continues */
    const int64_t *stop_ids; /* (n_stops) tokens that end a text */
    float *survival;         /* (N) or NULL, see `sample` */
    int B, capacity;         /* rows of the batch, rows that the cache has room for */
    int L, F, H, K, E, T;    /* D = H E */
    int steps;               /* tokens per row */
    int V, max_new, n_stops, context; /* for decode_tokens */
    float eps, temperature;
} Decoding;

/* The activations of one thread; vectors have one row per lane. */
typedef struct {
    vec *x, *normed;     /* (D) */
    vec *qkv;            /* (M), M = D + 2 K E */
    vec *gate;           /* (2 F) */
    vec *scores;         /* (T, MAX_R) */
    vec *logits;         /* (V) */
    float *flat;         /* (LANES, M) qkv, row after row */
    float *out;          /* (LANES, D) the output of attention, row after row */
} Work;

/* out (R, E) = attention of R queries q (R, E) of one kv head, rotated and scaled, to n keys. keys
 * and values (n / LANES, E, LANES) lie in blocks of positions, those of the next head `next`
 * floats on. They do not fit into a cache together, so those of the next head are prefetched
 * meanwhile. R queries share their loads. scores (T / LANES, R) is memory for the scores. */
INLINE void decode_queries(float *out, const float *q, const float *keys, const float *values,
                           int n, int64_t next, vec *scores, const int R, const int E) {
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

/* Attention of the H / K query heads q (H / K, E) of one kv head of a row at `position`, all
 * unrotated: out (H / K, E). Appends k and v (E) to the cache, keys and values (T / LANES, E,
 * LANES). */
INLINE void decode_head(float *out, float *keys, float *values, const float *q, const float *k,
                        const float *v, const Decoding *s, int position, vec *scores, const int R,
                        const int E) {
    const int G = s->H / s->K, at = position / LANES * LANES * E + position % LANES;
    const int64_t angle = (int64_t)position * (E / 2), next = (int64_t)E * s->T;
    const float *cosine = s->cosine + angle, *sine = s->sine + angle;
    float rotated[MAX_R * MAX_E];
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

/* Calls BODY(R, E) with constants where there is a case for them. R is 2 where an even number of
 * query heads shares a kv head, else 1. */
#define FOR_R_E(BODY) \
    if (H / K % 2 == 0) \
        switch (E) { \
        case 4: BODY(2, 4); break; \
        case 8: BODY(2, 8); break; \
        default: BODY(2, E); \
        } \
    else \
        switch (E) { \
        case 4: BODY(1, 4); break; \
        case 8: BODY(1, 8); break; \
        default: BODY(1, E); \
        }

/* out (rows) += w (rows, K) times x (K). */
INLINE void product_rows(vec *out, const float *w, const vec *x, int K, const int rows) {
    vec acc[8];
    for (int r = 0; r < rows; r++) acc[r] = out[r];
    for (int k = 0; k < K; k++)
        for (int r = 0; r < rows; r++) acc[r] += w[(int64_t)r * K + k] * x[k];
    for (int r = 0; r < rows; r++) out[r] = acc[r];
}

/* out (N) += w (N, K) times x (K); returns the end of w. */
static const float *tile_product(vec *out, const float *w, const vec *x, int N, int K) {
    int n = 0;
    for (; n + 8 <= N; n += 8) product_rows(out + n, w + (int64_t)n * K, x, K, 8);
    for (; n < N; n++) product_rows(out + n, w + (int64_t)n * K, x, K, 1);
    return w + (int64_t)N * K;
}

/* out (D) = x / rms(x) * weight, all (D); returns the end of the weight. */
static const float *tile_norm(vec *out, const vec *x, const float *weight, int D, float eps) {
    vec squares = {0}, inverse = {0};
    for (int d = 0; d < D; d++) squares += x[d] * x[d];
    for (int i = 0; i < LANES; i++) inverse[i] = 1 / sqrtf(squares[i] / D + eps);
    for (int d = 0; d < D; d++) out[d] = x[d] * inverse * weight[d];
    return weight + D;
}

/* w->x (D), of up to LANES rows, goes through all layers. These rows are the rows `first`,
 * first + 1, ... of the cache, which gets their keys and values at positions (rows); a row whose
 * position is -1 is left out. */
static void stack_tile(const Decoding *s, const Work *w, int64_t first, const int64_t *positions,
                       int rows) {
    const int F = s->F, K = s->K, H = s->H, E = s->E, G = H / K, D = H * E, M = D + 2 * K * E;
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
            const float *q = w->flat + r * M + h * G * E, *k = w->flat + r * M + D + h * E;
            #define DECODE(R, E) \
                decode_head(w->out + r * D + h * G * E, s->keys + at, s->values + at, q, k, \
                            k + K * E, s, position, w->scores, R, E)
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

/* Activations with V logits, or none. All lie in one block of memory, which is freed as w.x; w.x is
 * NULL if there is no memory. */
static Work new_work(const Decoding *s, int V) {
    const int64_t D = s->H * s->E, M = D + 2 * s->K * s->E;
    Work w = {.x = vectors((3 * D + 2 * M + 2 * s->F + (int64_t)s->T * MAX_R + V) * LANES)};
    if (!w.x) return w;
    w.normed = w.x + D;
    w.qkv = w.normed + D;
    w.gate = w.qkv + M;
    w.scores = w.gate + 2 * s->F;
    w.logits = w.scores + (int64_t)s->T * MAX_R;
    w.flat = (float *)(w.logits + V);
    w.out = w.flat + M * LANES;
    return w;
}

/* `steps` tokens of each row, the first B rows of the cache: x goes through all layers, which write
 * its keys and values to the cache. Returns 0, NO_MEMORY or CACHE_FULL. */
int decode_hidden(const Decoding *s) {
    const int B = s->B, E = s->E, D = s->H * E;
    int failed = 0;
    for (int b = 0; b < B; b++)
        if (s->positions[b] < 0 || s->positions[b] > s->T - s->steps) return CACHE_FULL;
    #pragma omp parallel if (B > LANES)
    {
        Work w = new_work(s, 0);
        if (!w.x) failed = NO_MEMORY;
        #pragma omp for schedule(dynamic)
        for (int b = 0; b < B; b += LANES) {
            const int rows = B - b < LANES ? B - b : LANES;
            int64_t at[LANES];
            for (int r = 0; r < rows; r++) at[r] = s->positions[b + r];
            for (int step = 0; step < s->steps && w.x; step++) {
                float *to = s->x + ((int64_t)step * B + b) * D;
                for (int d = 0; d < D; d += E) load_tile(w.x + d, to + d, D, rows, E);
                stack_tile(s, &w, b, at, rows);
                for (int d = 0; d < D; d += E) store_tile(to + d, w.x + d, D, rows, E);
                for (int r = 0; r < rows; r++) at[r]++;
            }
        }
        free(w.x);
    }
    return failed;
}

static int is_stop(const Decoding *s, int64_t token) {
    for (int j = 0; j < s->n_stops; j++)
        if (token == s->stop_ids[j]) return 1;
    return 0;
}

/* Samples one token per lane from softmax(logits / temperature) by its random number u in [0, 1):
 * the first token at which the sum of the probabilities exceeds u. Overwrites logits (V);
 * *probability becomes the probabilities of the tokens. With `survival`, the tokens are not among
 * the stop_ids: *survival is multiplied by the probability of the others, and once it is below 1,
 * the tokens are among the stop_ids alone. */
INLINE ivec sample(vec *logits, vec *probability, vec *survival, const Decoding *s, vec u) {
    const int V = s->V;
    const float temperature = s->temperature;
    vec top = (vec){0} - INFINITY, total = {0}, sum = {0}, ends = {0}, range;
    ivec id = {0};
    for (int v = 0; v < V; v++) top = larger(logits[v], top);
    for (int v = 0; v < V; v++) {
        logits[v] = exp2_nonpositive((logits[v] - top) * (LOG2_E / temperature));
        total += logits[v];
    }
    range = total; /* the sum over the tokens to choose from; the logits of others become 0 */
    if (survival) {
        for (int j = 0; j < s->n_stops; j++)
            if (s->stop_ids[j] < V) ends += logits[s->stop_ids[j]];
        *survival *= 1 - ends / total;
        for (int i = 0; i < LANES; i++) {
            const int over = (*survival)[i] < 1;
            for (int v = 0; over && v < V; v++)
                if (!is_stop(s, v)) logits[v][i] = 0;
            for (int j = 0; !over && j < s->n_stops; j++)
                if (s->stop_ids[j] < V) logits[s->stop_ids[j]][i] = 0;
        }
        range = (vec){0}; /* not total - ends, which is rounded differently from `sum` */
        for (int v = 0; v < V; v++) range += logits[v];
    }
    for (int v = 0; v < V - 1; v++) { /* the last token if rounding leads beyond the end */
        sum += logits[v];
        id -= sum <= u * range;
    }
    for (int i = 0; i < LANES; i++) (*probability)[i] = logits[id[i]][i] / total[i];
    return id;
}

/* Samples up to `steps` tokens for each of B rows, the first rows of the cache. A row ends at one
 * of the stop_ids, after max_new tokens, or where the cache holds `context` positions. Updates
 * tokens, probabilities, lengths, current and positions. Returns 0, NO_MEMORY or CACHE_FULL. */
int decode_tokens(const Decoding *s) {
    const int B = s->B, E = s->E, D = s->H * E, V = s->V, max_new = s->max_new;
    int64_t *const current = s->current, *const lengths = s->lengths;
    int failed = 0;
    #pragma omp parallel for schedule(dynamic) if (B > LANES)
    for (int first = 0; first < B; first += LANES) {
        const int rows = B - first < LANES ? B - first : LANES;
        int64_t at[LANES]; /* the position of each row, -1 if it has ended */
        Work w = new_work(s, V);
        if (!w.x) failed = NO_MEMORY;
        for (int r = 0; r < rows; r++) at[r] = s->positions[first + r];
        for (int step = 0, alive = rows; step < s->steps && alive && !failed; step++) {
            vec u = {0}, probability, survival = (vec){0} + INFINITY;
            for (int r = 0; r < rows; r++) {
                const int64_t i = s->prompt[first + r];
                if (at[r] >= s->T) failed = CACHE_FULL, at[r] = -1;
                if (at[r] < 0) continue;
                u[r] = s->uniform[i * max_new + lengths[i]];
                if (s->survival) survival[r] = s->survival[i];
                memcpy(w.out + r * D, s->embedding + current[first + r] * D, D * sizeof(float));
            }
            for (int d = 0; d < D; d += E) load_tile(w.x + d, w.out + d, D, rows, E);
            stack_tile(s, &w, first, at, rows);
            tile_norm(w.normed, w.x, s->norm, D, s->eps);
            memset(w.logits, 0, V * sizeof(vec));
            tile_product(w.logits, s->output, w.normed, V, D);
            const ivec id =
                sample(w.logits, &probability, s->survival ? &survival : NULL, s, u);
            for (int r = 0; r < rows; r++) {
                const int64_t i = s->prompt[first + r], to = i * max_new + lengths[i];
                if (at[r] < 0) continue;
                s->tokens[to] = current[first + r] = id[r];
                s->probabilities[to] = probability[r];
                if (s->survival) s->survival[i] = survival[r];
                s->positions[first + r] = ++at[r];
                const int full = ++lengths[i] >= max_new || at[r] >= s->context;
                if (full || is_stop(s, id[r])) at[r] = -1, alive--;
            }
        }
        free(w.x);
    }
    return failed;
}
