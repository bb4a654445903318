/* Causal attention with rotary embeddings for small heads on a CPU: forward, backward, and one
 * decoding step over a KV cache. model.py compiles this file on first use and calls it through
 * ctypes; where there is no compiler it uses PyTorch's scaled_dot_product_attention instead,
 * which is also the oracle of the tests.
 *
 * Why it exists. PyTorch's kernels put the head dimension in the lanes of a vector register. With
 * the 8 wide heads of a 260K-parameter model most of each register, and of the time, is empty:
 * more than half of a training step went there. Here the lanes are 16 *keys*, so keys and values
 * are turned once a sequence into E-major rows, and everything else is plain multiply-adds. Sequences
 * are packed one after the other, so that ragged batches (PPO rollouts) cost nothing for padding.
 *
 * Letters as in model.py: N packed tokens, S sequences, H query heads, K key/value heads (H / K
 * queries share one), E head dimension (even, at most MAX_E), T cache capacity. All tensors are
 * float32, row-major and contiguous. Every output element is written by one thread in a fixed order:
 * the numbers do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16                                  /* keys handled at once */
#define MAX_E 16                                  /* wider heads suit PyTorch's own kernels */
#define MAX_R 2                                   /* queries handled at once */
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define ROUND_UP(n) (((n) + LANES - 1) / LANES * LANES)
#define LOAD(p) (*(const vec_unaligned *)(p))
#define STORE(p, v) (*(vec_unaligned *)(p) = (v))

static inline vec choose(ivec mask, vec a, vec b) {           /* mask lane is 0 or -1 */
    return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}

/* Sum and maximum of the lanes by halving: a chain of 16 dependent additions would take as long as
 * the rest of a query. */
static inline float sum(vec v) {
    float a[LANES];
    STORE(a, v);
    for (int i = 0; i < 8; i++) a[i] += a[i + 8];
    for (int i = 0; i < 4; i++) a[i] += a[i + 4];
    return (a[0] + a[2]) + (a[1] + a[3]);
}

static inline float maximum(vec v) {
    float a[LANES];
    STORE(a, v);
    for (int i = 0; i < 8; i++) a[i] = a[i] > a[i + 8] ? a[i] : a[i + 8];
    for (int i = 0; i < 4; i++) a[i] = a[i] > a[i + 4] ? a[i] : a[i + 4];
    float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}

/* e^x for x <= 0, relative error below 2e-7; exactly 0 below -87 (where masked lanes lie).
 * x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial, 2^n through the exponent. */
static inline vec exp_nonpositive(vec x) {
    ivec alive = x > -87.0f;
    x = choose(alive, x, (vec){0});
    vec n = x * 1.44269504f - 0.5f;
    ivec whole = __builtin_convertvector(n, ivec);             /* rounds towards zero, and n <= 0 */
    n = __builtin_convertvector(whole, vec);
    vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;       /* ln 2 in two parts */
    vec p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return choose(alive, p * (vec)((whole + 127) << 23), (vec){0});
}

/* Rotates the pairs (x[0], x[1]), (x[2], x[3]), ... of each row of x (R, E) by the angles of one
 * position: RoPE. direction is +1, or -1 for the inverse, which is also the backward pass. */
static inline void rotate(float *out, const float *x, const float *cosine, const float *sine,
                          float direction, const int R, const int E) {
    for (int r = 0; r < R; r++)
        for (int i = 0; i < E / 2; i++) {
            float c = cosine[i], s = direction * sine[i];
            float a = x[r * E + 2 * i], b = x[r * E + 2 * i + 1];
            out[r * E + 2 * i] = a * c - b * s;
            out[r * E + 2 * i + 1] = a * s + b * c;
        }
}

/* Turns one head of keys and values, n rows of x (stride floats apart), into E-major rows of
 * length padded; keys are rotated on the way. The padding is zero. */
static inline void transpose_head(float *kt, float *vt, const float *k, const float *v, int stride,
                                  int n, int padded, const float *cosine, const float *sine,
                                  const int E) {
    for (int j = 0; j < n; j++) {
        float rotated[MAX_E];
        rotate(rotated, k + (int64_t)j * stride, cosine + j * (E / 2), sine + j * (E / 2), 1, 1, E);
        for (int e = 0; e < E; e++) {
            kt[e * padded + j] = rotated[e];
            vt[e * padded + j] = v[(int64_t)j * stride + e];
        }
    }
    for (int e = 0; e < E; e++) {
        memset(kt + e * padded + n, 0, sizeof(float) * (padded - n));
        memset(vt + e * padded + n, 0, sizeof(float) * (padded - n));
    }
}

/* R queries of one kv head, rotated, q (R, E), against n keys: out (R, E) = softmax(q k^T / sqrt(E)) v
 * and lse (R), the log-sum-exp of the scores. kt, vt are E-major with rows `stride` floats apart,
 * readable up to ROUND_UP(n). R queries at once share the loads of keys and values. */
static inline void attend(float *out, float *lse, const float *q, const float *kt, const float *vt,
                          int n, int64_t stride, float *scores, const int R, const int E) {
    const float scale = 1.0f / sqrtf((float)E);
    const int padded = ROUND_UP(n);
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vec top[MAX_R], total[MAX_R], acc[MAX_R][MAX_E];
    float max[MAX_R];
    for (int r = 0; r < R; r++) top[r] = (vec){0} - INFINITY;
    for (int j = 0; j < n; j += LANES) {
        vec s[MAX_R];
        for (int r = 0; r < R; r++) s[r] = (vec){0};
        for (int e = 0; e < E; e++) {
            vec k = LOAD(kt + e * stride + j);
            for (int r = 0; r < R; r++) s[r] += q[r * E + e] * k;
        }
        for (int r = 0; r < R; r++) {
            s[r] = choose(lane < n - j, s[r] * scale, (vec){0} - INFINITY);
            STORE(scores + r * padded + j, s[r]);
            top[r] = choose(s[r] > top[r], s[r], top[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        max[r] = maximum(top[r]);
        total[r] = (vec){0};
        for (int e = 0; e < E; e++) acc[r][e] = (vec){0};
    }
    for (int j = 0; j < n; j += LANES) {
        vec p[MAX_R];
        for (int r = 0; r < R; r++) {
            p[r] = exp_nonpositive(LOAD(scores + r * padded + j) - max[r]);
            total[r] += p[r];
        }
        for (int e = 0; e < E; e++) {
            vec v = LOAD(vt + e * stride + j);
            for (int r = 0; r < R; r++) acc[r][e] += p[r] * v;
        }
    }
    for (int r = 0; r < R; r++) {
        float denominator = sum(total[r]), inverse = 1.0f / denominator;
        for (int e = 0; e < E; e++) out[r * E + e] = sum(acc[r][e]) * inverse;
        lse[r] = max[r] + logf(denominator);
    }
}

/* Backward of R queries: adds to dkt, dvt (E-major, like kt), writes dq (R, E) of rotated queries. */
static inline void attend_backward(float *dq, float *dkt, float *dvt, const float *dout,
                                   const float *out, const float *q, const float *lse,
                                   const float *kt, const float *vt, int n, int stride,
                                   const int R, const int E) {
    const float scale = 1.0f / sqrtf((float)E);
    float delta[MAX_R];                           /* sum_j p_j dp_j = dout . out */
    vec acc[MAX_R][MAX_E];
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int r = 0; r < R; r++) {
        delta[r] = 0;
        for (int e = 0; e < E; e++) {
            delta[r] += dout[r * E + e] * out[r * E + e];
            acc[r][e] = (vec){0};
        }
    }
    for (int j = 0; j < n; j += LANES) {
        vec p[MAX_R], ds[MAX_R];
        for (int r = 0; r < R; r++) p[r] = ds[r] = (vec){0};
        for (int e = 0; e < E; e++) {
            vec k = LOAD(kt + e * stride + j), v = LOAD(vt + e * stride + j);
            for (int r = 0; r < R; r++) {
                p[r] += q[r * E + e] * k;
                ds[r] += dout[r * E + e] * v;
            }
        }
        for (int r = 0; r < R; r++) {
            p[r] = choose(lane < n - j, exp_nonpositive(p[r] * scale - lse[r]), (vec){0});
            ds[r] = p[r] * (ds[r] - delta[r]) * scale;
        }
        for (int e = 0; e < E; e++) {
            vec k = LOAD(kt + e * stride + j);
            vec dk = LOAD(dkt + e * stride + j), dv = LOAD(dvt + e * stride + j);
            for (int r = 0; r < R; r++) {
                acc[r][e] += ds[r] * k;
                dk += ds[r] * q[r * E + e];
                dv += p[r] * dout[r * E + e];
            }
            STORE(dkt + e * stride + j, dk);
            STORE(dvt + e * stride + j, dv);
        }
    }
    for (int r = 0; r < R; r++)
        for (int e = 0; e < E; e++) dq[r * E + e] = sum(acc[r][e]);
}

/* The three entry points' bodies for one sequence and one kv head, made once for each pair of
 * constants R and E so that their loops unroll. */
static inline void forward_head(float *out, float *lse, const float *q, const float *k, const float *v,
                                const float *cosine, const float *sine, int n, int H, int K, int kh,
                                float *work, const int R, const int E) {
    int padded = ROUND_UP(n), G = H / K;
    float *kt = work, *vt = kt + E * padded, *scores = vt + E * padded;
    transpose_head(kt, vt, k + kh * E, v + kh * E, K * E, n, padded, cosine, sine, E);
    for (int i = 0; i < n; i++)
        for (int h = kh * G; h < (kh + 1) * G; h += R) {
            float rotated[MAX_R * MAX_E];
            int64_t at = (int64_t)i * H + h;
            rotate(rotated, q + at * E, cosine + i * (E / 2), sine + i * (E / 2), 1, R, E);
            attend(out + at * E, lse + at, rotated, kt, vt, i + 1, padded, scores, R, E);
        }
}

static inline void backward_head(float *dq, float *dk, float *dv, const float *dout, const float *out,
                                 const float *lse, const float *q, const float *k, const float *v,
                                 const float *cosine, const float *sine, int n, int H, int K, int kh,
                                 float *work, const int R, const int E) {
    int padded = ROUND_UP(n), G = H / K;
    float *kt = work, *vt = kt + E * padded, *dkt = vt + E * padded, *dvt = dkt + E * padded;
    transpose_head(kt, vt, k + kh * E, v + kh * E, K * E, n, padded, cosine, sine, E);
    memset(dkt, 0, sizeof(float) * 2 * E * padded);
    for (int i = 0; i < n; i++)
        for (int h = kh * G; h < (kh + 1) * G; h += R) {
            float rotated[MAX_R * MAX_E], grad[MAX_R * MAX_E];
            int64_t at = (int64_t)i * H + h;
            const float *c = cosine + i * (E / 2), *s = sine + i * (E / 2);
            rotate(rotated, q + at * E, c, s, 1, R, E);
            attend_backward(grad, dkt, dvt, dout + at * E, out + at * E, rotated, lse + at, kt, vt,
                            i + 1, padded, R, E);
            rotate(dq + at * E, grad, c, s, -1, R, E);
        }
    for (int j = 0; j < n; j++) {
        float grad[MAX_E];
        int64_t at = ((int64_t)j * K + kh) * E;
        for (int e = 0; e < E; e++) {
            grad[e] = dkt[e * padded + j];
            dv[at + e] = dvt[e * padded + j];
        }
        rotate(dk + at, grad, cosine + j * (E / 2), sine + j * (E / 2), -1, 1, E);
    }
}

static inline void decode_head(float *out, float *kt, float *vt, const float *q, const float *k,
                               const float *v, const float *cosine, const float *sine, int position,
                               int G, int T, float *scores, const int R, const int E) {
    float rotated[MAX_R * MAX_E], lse[MAX_R];
    rotate(rotated, k, cosine, sine, 1, 1, E);
    for (int e = 0; e < E; e++) {
        kt[(int64_t)e * T + position] = rotated[e];
        vt[(int64_t)e * T + position] = v[e];
    }
    for (int g = 0; g < G; g += R) {
        rotate(rotated, q + g * E, cosine, sine, 1, R, E);
        attend(out + g * E, lse, rotated, kt, vt, position + 1, T, scores, R, E);
    }
}

/* Calls BODY(R, E) with constants where there is a case for them: pairs of queries where an even
 * number of heads shares a kv head; other even head dimensions up to MAX_E take the general loop. */
#define SPECIALIZE(BODY) \
    if (H / K % 2 == 0) \
        switch (E) { case 4: BODY(2, 4); break; case 8: BODY(2, 8); break; default: BODY(2, E); } \
    else \
        switch (E) { case 4: BODY(1, 4); break; case 8: BODY(1, 8); break; default: BODY(1, E); }

/* q (N, H, E), k and v (N, K, E), unrotated; starts (S + 1) token offsets of the sequences;
 * cosine and sine (max position, E / 2) -> out (N, H, E), lse (N, H). Returns 0, or -1 without memory. */
int attention_forward(float *out, float *lse, const float *q, const float *k, const float *v,
                      const int64_t *starts, const float *cosine, const float *sine, int S, int H,
                      int K, int E) {
    int failed = 0;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < S * K; job++) {
        int64_t from = starts[job / K];
        int n = (int)(starts[job / K + 1] - from);
        float *work = malloc(sizeof(float) * (2 * E + MAX_R) * ROUND_UP(n) + 1);
        if (!work) { failed = -1; continue; }
        #define FORWARD(R, E) forward_head(out + from * H * E, lse + from * H, q + from * H * E, \
            k + from * K * E, v + from * K * E, cosine, sine, n, H, K, job % K, work, R, E)
        SPECIALIZE(FORWARD)
        free(work);
    }
    return failed;
}

/* Gradients of attention_forward's inputs, of the same shapes, from dout and its two outputs. */
int attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out,
                       const float *lse, const float *q, const float *k, const float *v,
                       const int64_t *starts, const float *cosine, const float *sine, int S, int H,
                       int K, int E) {
    int failed = 0;
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < S * K; job++) {
        int64_t from = starts[job / K];
        int n = (int)(starts[job / K + 1] - from);
        float *work = malloc(sizeof(float) * 4 * E * ROUND_UP(n) + 1);
        if (!work) { failed = -1; continue; }
        #define BACKWARD(R, E) backward_head(dq + from * H * E, dk + from * K * E, dv + from * K * E, \
            dout + from * H * E, out + from * H * E, lse + from * H, q + from * H * E, \
            k + from * K * E, v + from * K * E, cosine, sine, n, H, K, job % K, work, R, E)
        SPECIALIZE(BACKWARD)
        free(work);
    }
    return failed;
}

/* One new token a row: writes its key and value at positions[b] of the caches (B, K, E, T), T a
 * multiple of 16, and attends to all up to it. q (B, H, E), k and v (B, K, E) -> out (B, H, E). */
int attention_decode(float *out, float *k_cache, float *v_cache, const float *q, const float *k,
                     const float *v, const int64_t *positions, const float *cosine, const float *sine,
                     int B, int H, int K, int E, int T) {
    int failed = 0;
    #pragma omp parallel for schedule(static) if (B * K >= 64)  /* a thread costs a few rows */
    for (int job = 0; job < B * K; job++) {
        int64_t position = positions[job / K], cache = (int64_t)job * E * T;
        const float *c = cosine + position * (E / 2), *s = sine + position * (E / 2);
        float *scores = malloc(sizeof(float) * MAX_R * ROUND_UP(position + 1));
        if (!scores) { failed = -1; continue; }
        int G = H / K;
        #define DECODE(R, E) decode_head(out + (int64_t)job * G * E, k_cache + cache, \
            v_cache + cache, q + (int64_t)job * G * E, k + (int64_t)job * E, \
            v + (int64_t)job * E, c, s, (int)position, G, T, scores, R, E)
        SPECIALIZE(DECODE)
        free(scores);
    }
    return failed;
}
