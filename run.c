/* run.c: inference of Llama models on the CPU in one C file, int8 or fp32, without dependencies.
 *
 *     cc -O3 run.c -o run -lm -pthread
 *     ./run model.bin -i "Once upon a time"
 *
 * How to read it. The file is a portable program that reads from top to bottom: the model file and
 * its checks, the threads, the state, the kernels and the forward pass, the tokenizer, the sampler,
 * the loops that generate, chat and measure, and the command line. The last section includes this
 * file again, once for each wider instruction set that the compiler can target: these later passes
 * compile the kernels section only, and the program picks one of its versions when it starts. Only
 * vmax(), dot_start(), dot4() and load_fp16() know instructions by name. Their portable versions
 * are the specification, the fallback and the oracle of the tests. Vectors are the GNU C vector
 * extensions, so the compiler is gcc or clang (on Windows: mingw-w64).
 *
 * Where the time goes. Decoding one token reads every weight once and uses it for one multiply and
 * one add. A large model therefore runs as fast as memory delivers its weights; a model that fits
 * into a cache runs as fast as the arithmetic. Four decisions follow:
 *   1. Weights are int8, with one fp16 scale per 16 to 64 weights: 1.03 to 1.13 bytes per weight.
 *   2. Weights lie in the file in the order in which they are used, so the file is memory-mapped
 *      and used as it is. Sixteen rows are interleaved, four columns at a time: one vector register
 *      holds 4 columns of 16 rows, one instruction (vpdpbusd, sdot) multiplies them with 4
 *      activations, and each of the 16 lanes sums its own row. No product sums across lanes.
 *   3. A prompt goes through the model in blocks of rows, so that a weight is fetched once for many
 *      tokens; N stories (-b N) do the same. Both are one code: a row is a (token, position,
 *      sequence).
 *   4. All threads run the same forward pass, each on its share of every matrix's rows, and meet at
 *      five barriers per layer. Each thread does what is cheap (norms, quantization) for itself. No
 *      sum is split between threads, so the numbers do not depend on the number of threads.
 *
 * Files. The program reads llama2.c's version 0 (fp32) and version 2 (int8), which it repacks when
 * it loads them, and version 3, which export.py writes and which is memory-mapped. Every error in a
 * file is found before a pointer is made from it, and ends in one line on stderr and exit status 1.
 *
 * Refused: -ffast-math (the checks for NaN depend on its absence), GPUs, assembly, architectures
 * other than x86-64 and arm64 beyond portable C, big-endian machines, formats below 8 bits, a
 * server.
 *
 * Letters: D dim, F hidden dim, H query heads, K key/value heads, E head dim, V vocabulary, G group
 * size of the quantization, B rows of a pass, T positions of the cache. A comment like (B, width)
 * after an array is its shape.
 */

#ifndef LATER_PASS // ====== the first pass: the whole program, in portable C
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#ifdef _WIN32
#include <io.h>
#include <windows.h>
#define O_NONBLOCK 0
#else
#include <sys/mman.h>
#include <unistd.h>
#define O_BINARY 0
#endif
#if defined __x86_64__
#include <cpuid.h>
#include <immintrin.h>
// Before version 16 clang's header has sdot only where it may be used everywhere.
#elif defined __aarch64__ \
    && (defined __ARM_FEATURE_DOTPROD || !defined __clang__ || __clang_major__ > 15)
#define HAVE_NEON
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

// ------------------------------------------------------------------------------------------
// Errors, memory, time, files

// Every error ends here: one line on stderr and exit status 1, or 2 for a wrong command line.
#define die(...) fail(1, __VA_ARGS__)
static _Noreturn void fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(status);
}

// Flushes stdout. A full disk is an error; a closed pipe ends the program by a signal.
static void flush(void) {
    if (fflush(stdout) || ferror(stdout)) die("cannot write: %s", strerror(errno));
}

// Returns the block, or ends the program if the allocation failed.
static void *need(void *block) {
    if (!block) die("out of memory");
    return block;
}

// Zeroed memory that begins at a cache line. It is for data that lives until the program ends, and
// is never freed. Its pages come fresh from the system: those never touched take no memory.
static void *zeros(int64_t bytes) {
    uint8_t *p = need(calloc(1, (size_t)bytes + 64));
    return p + -(uintptr_t)p % 64;
}

// A monotonic clock, in seconds.
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// n rounded up to a multiple of `to`.
static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct { // a range of bytes, mostly of a file
    const uint8_t *data;
    int64_t size;
} Span;

// Maps a whole file into memory, where it stays.
static Span map_file(const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_BINARY | O_NONBLOCK); // a FIFO would wait for its writer
    if (fd < 0) die("cannot open %s: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) die("%s is not a regular file", path);
    if (st.st_size == 0) die("%s is empty", path);
#ifdef _WIN32
    HANDLE map = CreateFileMapping((HANDLE)_get_osfhandle(fd), NULL, PAGE_READONLY, 0, 0, NULL);
    void *p = map ? MapViewOfFile(map, FILE_MAP_READ, 0, 0, 0) : NULL;
    if (!p) die("cannot map %s", path);
#else
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
#endif
#ifdef MADV_HUGEPAGE // the page cache then holds pages of 2 MB, for later runs too
    madvise(p, (size_t)st.st_size, MADV_HUGEPAGE);
#endif
    close(fd);
    return (Span){p, st.st_size};
}

// Takes the first bytes off a span and returns a pointer to them, or NULL if it has fewer.
static const uint8_t *take(Span *from, uint64_t bytes) {
    const uint8_t *p = from->data;
    if (bytes > (uint64_t)from->size) return NULL;
    from->data += bytes, from->size -= (int64_t)bytes;
    return p;
}

// Whether a span starts with a text.
static bool starts_with(Span s, const char *prefix) {
    size_t n = strlen(prefix);
    return (uint64_t)s.size >= n && !memcmp(s.data, prefix, n);
}

static const char byte_order_mark[] = "\xef\xbb\xbf"; // some editors write it before a text

// The 32 bits at any address, aligned or not; also the bits of a float.
static uint32_t read_u32(const void *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The float at any address, or that 32 bits stand for.
static float read_f32(const void *p) {
    float v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The number of processor cores that this process may use.
static int count_cores(void) {
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
#ifdef _WIN32
    return pthread_num_processors_np();
#else
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
#endif
}

// ------------------------------------------------------------------------------------------
// The model file
//
// Version 3 is little-endian. The header, which is Config, comes first; then the tensors, each at
// the next multiple of 64 bytes; then the tokenizer and the chat template, of 0 bytes where there
// is none, each described where it is read. The tensors, in this order:
//     tok_embeddings (V, D); for each layer: attention_norm (D), wq|wk|wv ((H + 2K) E, D),
//     wo (D, H E), ffn_norm (D), w1|w3 (2F, D), w2 (D, F); norm (D); output (V, D) unless tied.
// Norms are fp32. A matrix (rows, cols) is cut into tiles of 16 rows, zero-padded at the end.
//   fp32: for each tile, for each column: 16 floats, one per row.
//   q8_0: columns are zero-padded to a multiple of G. For each tile, for each 4 columns, for each
//         of the 16 rows: 4 bytes, value + 128. After all tiles, at a multiple of 64 bytes: for
//         each tile, for each group of G columns: 16 fp16 scales, one per row.
//         weight = (byte - 128) * scale.
// wq|wk|wv are stacked row upon row. w1|w3 alternate tile by tile, 16 rows of w1, then 16 of w3, so
// that the thread that computes a tile of w1 has the gate and the value of the SwiGLU side by side.

#define MAGIC 0x616b3432
#define HEADER 256
#define MAX_VOCAB (1 << 22)
#define TILE 16 // rows of a matrix that are interleaved
#define AHEAD 8192 // bytes to prefetch: the processor's own prefetch stops at the end of a page

enum { FP32 = 0, Q8_0 = 1 };

typedef struct {        // the numbers are offsets in the file
    uint32_t magic;     //  0
    int32_t version;    //  4
    int32_t dim;        //  8 D
    int32_t hidden_dim; // 12 F
    int32_t n_layers;   // 16
    int32_t n_heads;    // 20 H query heads
    int32_t n_kv_heads; // 24 K key and value heads, each shared by H / K query heads
    int32_t vocab_size; // 28 V
    int32_t seq_len;    // 32 the context: positions the model was trained for
    int32_t format;     // 36 FP32 or Q8_0
    int32_t group;      // 40 G
    int32_t tied;       // 44 the classifier is the token embedding
    int32_t bos, eos;   // 48
    float rope_theta;   // 56
    float norm_eps;     // 60
    uint64_t tokenizer_at, tokenizer_bytes; // 64
    uint64_t file_bytes;                    // 80
    int32_t squeeze;    // 88 1: text is stripped, and runs of spaces become one
    int32_t kind;       // 92 of the tokenizer
    uint64_t chat_at, chat_bytes; // 96
    // RoPE's frequencies are divided by the factor unless it is 0; if low and high are set
    // (Llama 3), only those whose wavelength is long against the original context.
    float rope_factor, rope_low, rope_high; // 112
    int32_t rope_context;                   // 124
    int32_t ends[4];    // 128 more ids at which generation ends; 0: unused
    int32_t head_dim;   // 144 E, even; 0 in the file: D / H
    int32_t kv_dim;     // 148 K * E; 0 in the file
    int32_t no_bos;     // 152 1: text does not begin with BOS, which only separates texts
    int32_t end_zero;   // 156 1: generation ends at id 0 as well
    int32_t zero[16];
    uint8_t hash[32];   // 224 of the tokenizer, see tokenizer.py; zeros: unknown
} Config;

_Static_assert(sizeof(Config) == HEADER, "the file's header");

typedef struct {
    uint8_t *q;    // q8_0: (tiles, cols / 4, 16, 4) weight / scale + 128
    uint16_t *s;   // q8_0: (tiles, cols / G, 16) fp16
    float *f;      // fp32: (tiles, cols, 16)
    int64_t tiles; // ceil(rows / 16)
    int64_t cols;  // q8_0: padded to a multiple of G
} Matrix;

typedef struct {
    float *att_norm; // (D,)
    Matrix wqkv;     // ((H + 2K) * E, D)
    Matrix wo;       // (D, H * E)
    float *ffn_norm; // (D,)
    Matrix w13;      // (2F, D), tiles of w1 and of w3 alternate
    Matrix w2;       // (D, F)
} Layer;

typedef struct {
    Config c;
    Matrix embed;   // (V, D)
    Layer *layers;  // (n_layers,)
    float *norm;    // (D,)
    Matrix output;  // (V, D); the embedding again if tied
    int64_t bytes;  // of the weights that one token reads
    Span tokenizer; // empty if there is none
    Span chat[3];   // the template, see render
    const char *path;
} Model;

// Checks every number that the forward pass depends on; derives head_dim if it is 0, and kv_dim.
static void check_config(Model *m) {
    Config *c = &m->c;
    const int last_id = c->vocab_size > 0 ? c->vocab_size - 1 : 0;
    const float low = c->rope_low, high = c->rope_high;
    const struct {
        const char *name;
        int value, min, max;
    } limits[] = {{"dim", c->dim, 1, 1 << 16},
                  {"hidden_dim", c->hidden_dim, 1, 1 << 20},
                  {"n_layers", c->n_layers, 1, 1 << 10},
                  {"n_heads", c->n_heads, 1, 1 << 14},
                  {"n_kv_heads", c->n_kv_heads, 1, 1 << 14},
                  {"head_dim", c->head_dim, 0, 1 << 16},
                  {"vocab_size", c->vocab_size, 1, MAX_VOCAB},
                  {"max_seq_len", c->seq_len, 1, 1 << 22},
                  {"format", c->format, FP32, Q8_0},
                  {"group size", c->group, 4, 256}, // above 256 a sum overflows 32 bits
                  {"tied", c->tied, 0, 1},
                  {"tokenizer kind", c->kind, 0, 1},
                  {"no BOS", c->no_bos, 0, 1},
                  {"end at id 0", c->end_zero, 0, 1},
                  {"BOS id", c->bos, 0, last_id},
                  {"EOS id", c->eos, 0, last_id},
                  {"original context", c->rope_context, 0, 1 << 30}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].value < limits[i].min || limits[i].value > limits[i].max)
            die("%s%s: %s is %d, must be %d to %d", m->path,
                c->version ? "" : " is not a model file, or is damaged", limits[i].name,
                limits[i].value, limits[i].min, limits[i].max);
    for (int i = 0; i < 4; i++)
        if (c->ends[i] < 0 || c->ends[i] > last_id)
            die("%s: end id %d is %d, must be 0 to %d", m->path, i + 1, c->ends[i], last_id);
    if (!c->head_dim && (c->dim % c->n_heads || c->dim / c->n_heads % 2))
        die("%s: dim %d is not %d heads of an even size", m->path, c->dim, c->n_heads);
    if (!c->head_dim) c->head_dim = c->dim / c->n_heads;
    if (c->head_dim % 2 || c->head_dim > (1 << 16) / c->n_heads)
        die("%s: head_dim is %d, must be even and, times %d heads, at most %d", m->path,
            c->head_dim, c->n_heads, 1 << 16);
    if (c->n_heads % c->n_kv_heads)
        die("%s: %d heads cannot share %d key/value heads", m->path, c->n_heads, c->n_kv_heads);
    if (c->group % 4) die("%s: group size %d is not a multiple of 4", m->path, c->group);
    if (!(c->rope_theta > 0 && c->rope_theta < 1e30f) || !(c->norm_eps >= 0 && c->norm_eps < 1))
        die("%s: rope_theta %g or norm_eps %g is out of range", m->path, c->rope_theta,
            c->norm_eps);
    if (!(c->rope_factor >= 0 && c->rope_factor < 1e9f)
        || !((low == 0 && high == 0) || (low > 0 && high > low && high < 1e9f && c->rope_context)))
        die("%s: RoPE scaling (factor %g, low %g, high %g, original context %d) is out of range",
            m->path, c->rope_factor, low, high, c->rope_context);
    c->kv_dim = c->n_kv_heads * c->head_dim;
}

// The next tensor of a version-3 file, or zeroed memory for it if `in` is NULL.
static void *tensor(Model *m, Span *in, int64_t bytes) {
    const uint8_t *p = NULL;
    m->bytes += bytes;
    if (!in) return zeros(bytes);
    if (take(in, -(uintptr_t)in->data % 64)) p = take(in, (uint64_t)bytes);
    if (!p) die("%s: the tensors do not fit into the file", m->path);
    return (void *)p;
}

// Makes w a matrix (rows, cols) of the next tensors.
static void open_matrix(Model *m, Matrix *w, Span *in, int64_t rows, int cols) {
    const bool fp32 = m->c.format == FP32;
    *w = (Matrix){.tiles = round_up(rows, TILE) / TILE,
                  .cols = fp32 ? cols : round_up(cols, m->c.group)};
    int64_t cells = w->tiles * TILE * w->cols;
    if (fp32) w->f = tensor(m, in, 4 * cells);
    else w->q = tensor(m, in, cells), w->s = tensor(m, in, 2 * (cells / m->c.group));
}

// Opens all tensors, in the file's order. Within the limits of check_config nothing overflows.
static void open_tensors(Model *m, Span *in) {
    const Config *c = &m->c;
    const int q_dim = c->n_heads * c->head_dim;
    m->layers = zeros(c->n_layers * (int64_t)sizeof *m->layers);
    open_matrix(m, &m->embed, in, c->vocab_size, c->dim);
    if (!c->tied) m->bytes = 0; // a token reads one row of it only
    for (Layer *l = m->layers; l < m->layers + c->n_layers; l++) {
        l->att_norm = tensor(m, in, 4 * c->dim);
        open_matrix(m, &l->wqkv, in, q_dim + 2 * c->kv_dim, c->dim);
        open_matrix(m, &l->wo, in, c->dim, q_dim);
        l->ffn_norm = tensor(m, in, 4 * c->dim);
        open_matrix(m, &l->w13, in, 2 * round_up(c->hidden_dim, TILE), c->dim);
        open_matrix(m, &l->w2, in, c->dim, c->hidden_dim);
    }
    m->norm = tensor(m, in, 4 * c->dim);
    if (c->tied) m->output = m->embed;
    else open_matrix(m, &m->output, in, c->vocab_size, c->dim);
}

// fp32 to the bits of fp16, rounded to nearest even, clamped to the largest finite number. The
// multiplication moves the exponent's bias, and makes fp16's subnormal numbers come out right.
static uint16_t to_half(float x) {
    const uint32_t sign = read_u32(&x) >> 16 & 0x8000;
    x = (fabsf(x) < 65504.0f ? fabsf(x) : 65504.0f) * 0x1p-112f;
    const uint32_t bits = read_u32(&x);
    return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

// The bits of fp16 to fp32.
static float from_half(uint16_t h) {
    const uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    const float x = read_f32(&bits) * 0x1p112f;
    return h & 0x8000 ? -x : x;
}

// The index of (row, col) in a matrix of `cols` columns, of which `width` lie side by side.
static int64_t cell(int64_t cols, int width, int64_t row, int64_t col) {
    return (row / TILE * cols + col / width * width) * TILE + row % TILE * width + col % width;
}

// Writes one row of n values into a matrix of the model's format, quantized if that is q8_0. Values
// that were quantized before, in the same groups, get the same integers back from their `scales`
// (n / G,); otherwise scales is NULL.
static void pack_row(const Config *c, Matrix *m, int64_t row, const float *values, int n,
                     const float *scales) {
    const int64_t cols = m->cols, G = c->group;
    for (int i = 0; i < n && c->format == FP32; i++) m->f[cell(cols, 1, row, i)] = values[i];
    for (int64_t g = 0; g < cols / G && c->format == Q8_0; g++) {
        float max = 0;
        for (int64_t i = g * G; i < (g + 1) * G && i < n; i++)
            if (fabsf(values[i]) > max) max = fabsf(values[i]);
        uint16_t half = to_half(scales ? scales[g] : max / 127);
        float scale = scales ? scales[g] : from_half(half);
        m->s[cell(cols / G, 1, row, g)] = half;
        for (int64_t i = g * G; i < (g + 1) * G; i++) {
            float v = i < n && scale != 0 ? rintf(values[i] / scale) : 0;
            v = v < 127 ? v > -127 ? v : -127 : 127; // the scale may be rounded down; v may be NaN
            m->q[cell(cols, 4, row, i)] = (uint8_t)(v + 128);
        }
    }
}

// x (D,) = the embedding of a token.
static void embed_row(float *x, const Matrix *w, int token, int D, int G) {
    for (int i = 0; i < D; i++)
        x[i] = w->f ? w->f[cell(w->cols, 1, token, i)]
                    : (float)(w->q[cell(w->cols, 4, token, i)] - 128)
                          * from_half(w->s[cell(w->cols / G, 1, token, i / G)]);
}

// Packs a tensor (rows, cols) of version 0 or 2 at p into m. Its row r becomes row at + r, or, with
// stride 2, goes into every second tile. Version 0 has floats. Version 2 has int8, followed by one
// float scale per `group` values of the flattened tensor. Returns the end of the tensor.
static const uint8_t *repack(const Config *c, Matrix *m, const uint8_t *p, int group, int rows,
                             int cols, int at, int stride) {
    const int64_t total = (int64_t)rows * cols;
    float *row = need(malloc(2 * sizeof *row * (size_t)cols)), *scales = row + cols;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0, k = r * cols; i < cols; i++, k++) {
            float scale = c->version == 2 ? read_f32(p + total + 4 * (k / group)) : 1;
            scales[i / c->group] = scale;
            row[i] = c->version == 2 ? (float)(int8_t)p[k] * scale : read_f32(p + 4 * k);
        }
        pack_row(c, m, at + r / TILE * TILE * stride + r % TILE, row, cols,
                 c->version == 2 && group == c->group && cols % group == 0 ? scales : NULL);
    }
    free(row);
    return p + (c->version == 2 ? total + 4 * (total / group) : 4 * total);
}

// Repacks a file of version 0 or 2. Both keep each kind of tensor together for all layers. The
// letters below give the order: E embedding, a attention norms, q, k, v, o, f ffn norms, 1, 2, 3,
// n the last norm, r version 0's unused RoPE tables, C classifier.
static void open_v0_v2(Model *m, Span in) {
    Config *c = &m->c;
    const bool q8 = c->version == 2;
    const uint8_t *p = in.data + (q8 ? HEADER : 28);
    const int group = q8 ? (int)read_u32(in.data + 37) : 32;
    memcpy(&c->dim, in.data + (q8 ? 8 : 0), 28); // dim to seq_len are the same in all versions
    if (q8) memcpy(c->hash, in.data + HEADER - sizeof c->hash, sizeof c->hash);
    // Version 0 marks an untied classifier by a negative vocabulary size.
    c->tied = q8 ? in.data[36] != 0 : c->vocab_size > 0;
    if (!q8 && !c->tied) c->vocab_size = (int)-(unsigned)c->vocab_size;
    // Where a group straddles rows (the hidden size is not a multiple of it), the weights are
    // dequantized and quantized again in groups of 32.
    if (group < 1) die("%s: group size is %d, must be at least 1", m->path, group);
    bool fits = group % 4 == 0 && group <= 256 && c->dim % group == 0 && c->hidden_dim % group == 0;
    c->format = q8 ? Q8_0 : FP32, c->group = fits ? group : 32;
    c->bos = 1, c->eos = 2, c->rope_theta = 10000, c->norm_eps = 1e-5f;
    check_config(m);
    const int D = c->dim, F = c->hidden_dim, kv = c->kv_dim, V = c->vocab_size, L = c->n_layers;
    const int64_t tables = (int64_t)c->seq_len * c->head_dim, sizes[] = {V, D, kv, F};
    const int64_t times[] = {2 - c->tied, 2 * L, 2 * L, 3 * L};
    int64_t bytes = (q8 ? HEADER : 28 + 4 * tables) + 4 * (2 * (int64_t)L + 1) * D;
    for (int i = 0; i < 4; i++) { // each matrix has one of the sizes times D numbers
        int64_t n = sizes[i] * D;
        if (q8 && n % group)
            die("%s: a tensor is not a multiple of the group size %d", m->path, group);
        bytes += times[i] * (q8 ? n + n / group * 4 : 4 * n);
    }
    if (bytes != in.size)
        die("%s: %lld bytes long, its header says %lld%s", m->path, (long long)in.size,
            (long long)bytes, bytes > in.size ? ": it is cut short" : "");
    open_tensors(m, NULL);
    for (const char *kind = q8 ? "afnEqkvo123C" : "Eaqkvof123nrC"; *kind; kind++)
        for (int i = 0; i < (strchr("EnrC", *kind) ? 1 : L); i++) {
            Layer *l = &m->layers[i];
            float *norm = *kind == 'a' ? l->att_norm : *kind == 'f' ? l->ffn_norm : m->norm;
            if (strchr("afn", *kind)) memcpy(norm, p, 4 * (size_t)D), p += 4 * D;
            if (*kind == 'E') p = repack(c, &m->embed, p, group, V, D, 0, 1);
            if (*kind == 'q') p = repack(c, &l->wqkv, p, group, D, D, 0, 1);
            if (*kind == 'k') p = repack(c, &l->wqkv, p, group, kv, D, D, 1);
            if (*kind == 'v') p = repack(c, &l->wqkv, p, group, kv, D, D + kv, 1);
            if (*kind == 'o') p = repack(c, &l->wo, p, group, D, D, 0, 1);
            if (*kind == '1') p = repack(c, &l->w13, p, group, F, D, 0, 2);
            if (*kind == '2') p = repack(c, &l->w2, p, group, D, F, 0, 1);
            if (*kind == '3') p = repack(c, &l->w13, p, group, F, D, TILE, 2);
            if (*kind == 'r') p += 4 * tables;
            if (*kind == 'C' && !c->tied) p = repack(c, &m->output, p, group, V, D, 0, 1);
        }
}

// Takes `bytes` bytes off a span as a part of its own; false if it has fewer.
static bool take_span(Span *from, Span *part, uint64_t bytes) {
    *part = (Span){take(from, bytes), (int64_t)bytes};
    return part->data;
}

// Takes a text off a span: its length as u32, then its bytes.
static bool take_text(Span *from, Span *text) {
    const uint8_t *size = take(from, 4);
    return size && take_span(from, text, read_u32(size));
}

// Opens a file of version 3.
static void open_v3(Model *m, Span in) {
    Config *c = &m->c;
    const Span file = in;
    Span tensors;
    memcpy(c, take(&in, sizeof *c), sizeof *c);
    check_config(m);
    if (c->file_bytes != (uint64_t)file.size)
        die("%s: %lld bytes long, its header says %llu%s", m->path, (long long)file.size,
            (unsigned long long)c->file_bytes,
            c->file_bytes > (uint64_t)file.size ? ": it is cut short" : "");
    if (!take_span(&in, &tensors, c->tokenizer_at - sizeof *c)
        || !take_span(&in, &m->tokenizer, c->tokenizer_bytes) || c->chat_bytes != (uint64_t)in.size
        || (in.size && c->chat_at != (uint64_t)(in.data - file.data)))
        die("%s: the parts in its header do not fill it", m->path);
    open_tensors(m, &tensors);
    if (tensors.size) die("%s: the tensors do not fill their part of it", m->path);
    if (in.size && (!take_text(&in, &m->chat[0]) || !take_text(&in, &m->chat[1])
                    || (in.size && !take_text(&in, &m->chat[2])) || in.size))
        die("%s: the chat template does not fill its bytes", m->path);
}

static const char a_tokenizer[] = "a tokenizer, not a model: give it with -z";

// Recognizes a file of another kind by its first bytes. Returns a message with its kind and the
// remedy, or NULL if the kind is unknown. A version-0 model is not mistaken for another kind: it
// begins with its dim, at most 2^16.
static const char *other_kind(Span in) {
    static const struct {
        const char *first, *what;
    } known[] = {
        {"PK\3\4", "a checkpoint: export.py converts it for this program"}, // a zip file
        {"\x80\2\x8a\n", "a checkpoint: export.py converts it for this program"},
        {"GGUF", "a GGUF file, for llama.cpp: this program reads the .bin files of export.py"},
        {"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"},
        {"\x1f\x8b", "a gzip archive: unpack it first"},
        {"\x7f" "ELF", "a program, not a model"},
        {"\xff\xfe", "UTF-16 text: this program reads UTF-8"},
        {"\xfe\xff", "UTF-16 text: this program reads UTF-8"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (starts_with(in, known[i].first)) return known[i].what;
    if (in.size > 9 && in.data[8] == '{' && in.data[9] == '"' && !read_u32(in.data + 4))
        return "a safetensors file: export.py --hf=FOLDER imports the folder that it is in";
    for (int64_t at = 0; at <= 32 && at + 5 <= in.size; at++)
        if (!memcmp(in.data + at, "<unk>", 5) && (at == 12 || in.data[0] == '\n'))
            return at == 12 ? a_tokenizer
                            : "a SentencePiece model: tokenizer.py converts it for -z";
    bool text = in.size > 0, zero = true;
    for (int64_t i = 0; i < in.size && i < 4096; i++) {
        text &= in.data[i] >= ' ' || (in.data[i] >= '\t' && in.data[i] <= '\r');
        zero &= !in.data[i];
    }
    return text ? "a text file, not a model" : zero && in.size ? "empty: all zeros" : NULL;
}

// Opens a model file of version 0, 2 or 3. The model points into the file, which must stay mapped.
static void model_open(Model *m, Span in, const char *path) {
    const bool magic = in.size >= 8 && read_u32(in.data) == MAGIC;
    const int version = magic ? (int)read_u32(in.data + 4) : 0;
    const char *kind = magic ? NULL : other_kind(in);
    *m = (Model){.c.version = version, .path = path};
    if (kind) die("%s is %s", path, kind);
    if (in.size < (magic ? HEADER : 28)) die("%s is too short for a model, or is cut short", path);
    if (version == 3) open_v3(m, in);
    else if (version == 0 || version == 2) open_v0_v2(m, in);
    else
        die("%s: version %d, this program reads 0, 2 and 3, which export.py writes", path, version);
}

// ------------------------------------------------------------------------------------------
// Threads: a team that runs one function together, and a barrier within it
//
// A waiting thread spins during the microseconds between two steps, yields its core when the wait
// is longer (another process may need it), and sleeps most of the time when the wait is long.

typedef struct Team Team;
typedef void Work(void *arg, Team *team, int thread);

struct Team {
    int n;               // threads, including the caller
    bool pinned;         // each thread is bound to a core of its own
#ifdef __linux__
    cpu_set_t cores;
#endif
    atomic_int members;  // threads that have started, without the caller
    atomic_int arrived;  // threads at the barrier
    atomic_uint phase;   // how often the barrier has opened
    Work *work;
    void *arg;
};

// One step of waiting. `spin` counts the steps, and may wrap: a chat can wait for weeks.
static void pause_core(unsigned spin) {
    if (spin > 20000) nanosleep(&(struct timespec){0, 1000000}, NULL);
    else if (spin > 2000) sched_yield();
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// Waits until all n threads of the team have called it.
static void barrier(Team *t) {
    if (t->n == 1) return;
    unsigned phase = atomic_load_explicit(&t->phase, memory_order_acquire);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) == t->n - 1) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->phase, phase + 1, memory_order_release);
        return;
    }
    for (unsigned spin = 0; atomic_load_explicit(&t->phase, memory_order_acquire) == phase; spin++)
        pause_core(spin);
}

// On Linux, binds the calling thread to the team's core number `index`. A busy machine may leave
// two threads on one core, where they would wait for each other.
static void pin(const Team *t, int index) {
#ifdef __linux__
    cpu_set_t set = t->cores;
    for (int cpu = 0, i = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &t->cores) && i++ != index) CPU_CLR(cpu, &set);
    if (t->pinned) sched_setaffinity(0, sizeof set, &set);
#else
    (void)t, (void)index;
#endif
}

// The loop of each thread but the caller's.
static void *member_main(void *arg) {
    Team *t = arg;
    const int index = atomic_fetch_add(&t->members, 1) + 1; // 0 is the caller
    pin(t, index);
    for (;; barrier(t)) {
        barrier(t); // opens in team_run
        t->work(t->arg, t, index);
    }
    return NULL;
}

// Calls work(arg, team, thread) for thread 0 to n - 1, each in its own thread, and returns when all
// have returned.
static void team_run(Team *t, Work *work, void *arg) {
    t->work = work, t->arg = arg;
    barrier(t);
    work(arg, t, 0);
    barrier(t);
}

// Starts n - 1 threads, which live until the program ends.
static void team_open(Team *t, int n) {
    pthread_t thread;
    *t = (Team){.n = n};
#ifdef __linux__
    t->pinned = n > 1 && n == count_cores() && !sched_getaffinity(0, sizeof t->cores, &t->cores);
#endif
    for (int i = 1; i < n; i++)
        if (pthread_create(&thread, NULL, member_main, t) || pthread_detach(thread))
            die("the system allows %d threads only: set -j", i);
    pin(t, 0);
}

typedef struct {
    int64_t lo, hi; // the indices lo to hi - 1
} Range;

// The share of one thread of the indices 0 to n - 1, which are shared in units of `unit` indices.
static Range share(int64_t n, int64_t unit, int thread, const Team *t) {
    const int64_t units = round_up(n, unit) / unit;
    return (Range){min64(n, units * thread / t->n * unit),
                   min64(n, units * (thread + 1) / t->n * unit)};
}

// ------------------------------------------------------------------------------------------
// The state of a run: the rows of one forward pass, their activations, the KV cache

#define MAX_ROWS 64 // rows of a prompt that go through the model together

typedef struct {
    int token;
    int pos;   // position in its sequence
    int seq;   // index of its sequence in the cache
} Row;

// The input of a matrix product: B rows, as floats, or quantized in groups of G to 15 bits in two
// int8 digits: f is close to s * (128 * high + low). The second digit costs no memory traffic,
// which limits the speed of decoding, so that the error of int8 comes from the weights alone.
typedef struct {
    const float *f;     // (B, width) the rows: `own`, or the caller's array
    float *own;         // (B, width) the normalized rows
    int8_t *high, *low; // (B, width)
    float *s;           // (B, width / 4) scales, the first cols / G of each row used
    int32_t *bias;      // (B, width / 4) -128 * sum of the group, for the weights' + 128
    int64_t width;
} Input;

typedef struct {
    const Model *m;
    Team *team;
    int B;              // rows of this pass
    const Row *row;     // (B,)
    int n_logits;       // the number of last rows that get logits
    // Activations. Each row is padded with zeros to a whole number of tiles and groups.
    float *x;           // (B, width) the residual stream
    float *qkv;         // (B, width) queries, keys, values
    float *att;         // (B, width) the output of attention
    float *h13;         // (B, width) tiles of w1 x and of w3 x alternate
    float *h;           // (B, width) silu(w1 x) * w3 x
    float *logits;      // (n_logits, v_width)
    int64_t width, v_width;
    Input *in;          // (threads,) each thread prepares an input of its own
    float *scores;      // (threads, T)
    float *rope;        // (T, E / 2, 2) cos and sin
    double *frequency;  // (E / 2,) of RoPE, in radians per position
    int n_rope;         // positions that rope is filled for
    // KV cache, in tiles of 16 positions, so that 16 scores are computed side by side: fp16 where
    // the weights are int8, fp32 where they are fp32.
    uint8_t *keys, *values; // (seq, layer, K, T / 16, E, 16)
    int half;           // the cache is fp16
    int64_t head_bytes; // of the keys, or of the values, of one head
    int64_t T;          // positions, rounded up to a multiple of 16
} State;

// Allocates the state for n_seq sequences of up to max_pos positions, in passes of up to B rows.
static void state_open(State *s, const Model *m, Team *team, int n_seq, int max_pos, int64_t B) {
    const Config *c = &m->c;
    const int64_t heads = (int64_t)n_seq * c->n_layers * c->n_kv_heads;
    *s = (State){.m = m, .team = team, .T = round_up(max_pos, 16), .half = c->format == Q8_0};
    s->head_bytes = s->T * c->head_dim * (s->half ? 2 : 4);
    const int64_t qkv = c->n_heads * c->head_dim + 2 * c->kv_dim;
    const int64_t h13 = 2 * round_up(c->hidden_dim, TILE), inner = qkv > h13 ? qkv : h13;
    s->width = round_up((inner > c->dim ? inner : c->dim) + c->group, TILE);
    s->v_width = round_up(c->vocab_size, TILE);
    float **each[] = {&s->x, &s->qkv, &s->att, &s->h13, &s->h};
    for (int i = 0; i < 5; i++) *each[i] = zeros(4 * B * s->width);
    s->logits = zeros(4 * B * s->v_width);
    s->rope = zeros(4 * s->T * c->head_dim);
    s->scores = zeros(4 * team->n * s->T);
    s->keys = zeros(heads * s->head_bytes);
    s->values = zeros(heads * s->head_bytes);
    s->in = zeros(team->n * (int64_t)sizeof *s->in);
    for (Input *in = s->in; in < s->in + team->n; in++) {
        in->width = s->width;
        in->own = zeros(4 * B * s->width);
        in->high = zeros(B * s->width);
        in->low = zeros(B * s->width);
        in->s = zeros(B * s->width); // G is at least 4
        in->bias = zeros(B * s->width);
    }
    s->frequency = zeros(4 * c->head_dim);
    for (int i = 0; i < c->head_dim / 2; i++) {
        double f = pow(c->rope_theta, -2.0 * i / c->head_dim), scaled = 1;
        // Llama 3: a frequency that turns more than `high` times within the original context
        // stays as it is, one that turns less than `low` times is divided by the factor, and
        // between them the change is linear.
        if (c->rope_high > 0) {
            double turns = c->rope_context * f / 6.283185307179586;
            scaled = (c->rope_high - turns) / (c->rope_high - c->rope_low);
        }
        scaled = scaled < 0 ? 0 : scaled > 1 ? 1 : scaled;
        s->frequency[i] = c->rope_factor > 0 ? f * (1 - scaled + scaled / c->rope_factor) : f;
    }
}

// Fills x (n,) up to a multiple of 16 with -infinity, which has no weight in a softmax; returns
// that multiple.
static int pad(float *x, int n) {
    for (; n % 16; n++) x[n] = -INFINITY;
    return n;
}

// Sets the rows of the next pass, of which the last n_logits get logits, and fills in RoPE's angles
// up to their positions.
static void set_rows(State *s, const Row *rows, int B, int n_logits) {
    const int E = s->m->c.head_dim;
    s->row = rows, s->B = B, s->n_logits = n_logits;
    for (int b = 0; b < B; b++)
        for (; s->n_rope <= rows[b].pos; s->n_rope++)
            for (int i = 0; i < E; i += 2) {
                float *to = s->rope + (int64_t)s->n_rope * E + i;
                to[0] = (float)cos(s->n_rope * s->frequency[i / 2]);
                to[1] = (float)sin(s->n_rope * s->frequency[i / 2]);
            }
}

// The kernels that the rest of the program calls; each pass through this file defines one of these.
typedef struct {
    const char *name; // of the instruction set
    Work *forward;    // forward_pass, whose arg is the State
    float (*exps)(float *x, int n, float scale, float shift);
    float (*above)(const float *x, int n, float least);
    float (*maximum)(const float *x, int n);
} Kernels;

static const Kernels *pick_kernels(void); // defined after the last pass

#define LANES 4 // 32-bit numbers per vector register
#define TARGET  // the attribute that lets a function use an instruction set
#define ISA_NAME "portable C"
#endif // LATER_PASS

// ------------------------------------------------------------------------------------------
// Kernels and forward pass: the only section that the later passes compile again

#ifndef LATER_PASS // these macros depend on LANES and TARGET where they are used, not here
#define PARTS (TILE / LANES) // vector registers per 16 rows of a tile
#define BLOCK (LANES == 16 ? 8 : 2) // rows of input that share one pass over a tile
#define KERNEL TARGET static
#define INLINE TARGET static inline __attribute__((always_inline))
#define AT(p) (*(floats_at *)(p)) // the LANES floats from p on
#define SPLAT(x) ((x) - (vf){0}) // x in every lane
#define SELECT(mask, a, b) ((vf)(((vi)(a) & (mask)) | ((vi)(b) & ~(mask))))
#endif

// Vectors of LANES floats, 32-bit integers and bytes, of four floats, and of floats at any address.
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));
typedef float v4 __attribute__((vector_size(16)));
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// a > b ? a : b in each lane, so b where either is NaN.
INLINE vf vmax(vf a, vf b) {
#if defined ISA_AVX2
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined ISA_AVX512
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return SELECT(a > b, a, b);
#endif
}

// The sum of the lanes, which are folded to four, then to one.
INLINE float lane_sum(vf v) {
    v4 q[LANES / 4];
    memcpy(q, &v, sizeof v);
    for (int n = LANES / 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) q[i] += q[i + n];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// The maximum of the lanes, none of which is NaN.
INLINE float lane_max(vf v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    float q[4] = {x[0], x[1], x[2], x[3]};
    for (int i = 4; i < LANES; i++) q[i % 4] = q[i % 4] > x[i] ? q[i % 4] : x[i];
    for (int i = 1; i < 4; i++) q[0] = q[0] > q[i] ? q[0] : q[i];
    return q[0];
}

// The accumulator that a group begins with. vpdpbusd takes one operand as unsigned, so there the
// + 128 of the weights stays in, and bias = -128 * (sum of x) takes it out again.
INLINE vi dot_start(int32_t bias) {
#ifdef ISA_AVX512
    return bias - (vi){0};
#else
    (void)bias;
    return (vi){0};
#endif
}

// The multiply-accumulate of int8, for LANES rows: acc[r] += sum over k < 4 of w[r][k] * x[k],
// with w (LANES, 4) stored as w + 128, and x (4,).
INLINE vi dot4(vi acc, const uint8_t *w, const int8_t *x) {
#if defined ISA_AVX2 // |x| * (w with the sign of x) stays within 16 bits, twice 128 * 127
    __m256i xs = _mm256_set1_epi32((int32_t)read_u32(x));
    __m256i ws = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(const void *)w),
                                  _mm256_set1_epi8((char)-128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(xs), _mm256_sign_epi8(ws, xs));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined ISA_AVX512
    __m512i xs = _mm512_set1_epi32((int32_t)read_u32(x));
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(w), xs);
#elif defined ISA_NEON
    int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32((int32_t)read_u32(x)));
    int8x16_t ws = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), vdupq_n_u8(128)));
    return (vi)vdotq_s32((int32x4_t)acc, ws, xs);
#else // the specification
    for (int r = 0; r < LANES; r++)
        for (int k = 0; k < 4; k++) acc[r] += (w[4 * r + k] - 128) * x[k];
    return acc;
#endif
}

// LANES fp16 numbers as floats.
INLINE vf load_fp16(const uint16_t *p) {
#if defined ISA_AVX2
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
#elif defined ISA_AVX512
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
#elif defined ISA_NEON
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else // the specification
    vf v = {0};
    for (int i = 0; i < LANES; i++) v[i] = from_half(p[i]);
    return v;
#endif
}

// LANES numbers of a KV cache, from index i on.
INLINE vf load_cached(const void *p, int64_t i, int half) {
    if (half) return load_fp16((const uint16_t *)p + i);
    return AT((const float *)p + i);
}

// exp(x) to 2 ulp, for x from -88, where it returns 0, to 88; NaN stays NaN. It is 2^n * e^r with
// |r| <= ln(2) / 2, and e^r is a polynomial (Cephes).
INLINE vf fast_exp(vf x) {
    vf n = x * 1.44269504f + 12582912.0f; // + 1.5 * 2^23 rounds to nearest
    vi power = (((vi)n & 0xffff) + 127) << 23;
    n -= 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)power;
}

// x (n,) = exp((x - shift) * scale); returns the sum. NaN is kept if `keep`, else it becomes 0. n
// must be a multiple of 16 (see pad), here and in the next three functions.
INLINE float exp_sum(float *x, int n, float scale, float shift, bool keep) {
    vf total = {0}, least = SPLAT(-88.0f);
    for (int i = 0; i < n; i += LANES) {
        vf v = (AT(x + i) - shift) * scale;
        v = fast_exp(keep ? vmax(least, v) : vmax(v, least));
        total += AT(x + i) = v;
    }
    return lane_sum(total);
}

// exp_sum without NaN.
KERNEL float exps(float *x, int n, float scale, float shift) {
    return exp_sum(x, n, scale, shift, false);
}

// The maximum of x (n,). NaNs are skipped.
KERNEL float maximum(const float *x, int n) {
    vf top[4]; // four, since each vmax() waits for the one before
    int i = 0;
    for (int j = 0; j < 4; j++) top[j] = SPLAT(-INFINITY);
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) top[j] = vmax(AT(x + i + j * LANES), top[j]);
    for (; i < n; i += LANES) top[0] = vmax(AT(x + i), top[0]);
    return lane_max(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

// The sum of the x (n,) that are larger than `least`.
KERNEL float above(const float *x, int n, float least) {
    vf total = {0};
    for (int i = 0; i < n; i += LANES) total += SELECT(AT(x + i) > least, AT(x + i), (vf){0});
    return lane_sum(total);
}

// to = x * weight / rms(x), all (n,). x must be zero from n up to a multiple of LANES.
KERNEL void normalize(float *to, const float *x, const float *weight, int n, float eps) {
    vf squares = {0};
    for (int i = 0; i < n; i += LANES) squares += AT(x + i) * AT(x + i);
    float scale = 1.0f / sqrtf(lane_sum(squares) / (float)n + eps);
    for (int i = 0; i < n; i++) to[i] = weight[i] * (scale * x[i]);
}

// Quantizes one group of G floats: 128 * high + low = round(x / s), s = max|x| / (127 * 128); all
// of x, high, low are (G,). The maximum is taken over the bits as integers, which order
// non-negative floats alike. A NaN is above all numbers there, so it makes the scale NaN instead of
// vanishing.
INLINE void quantize(const float *x, int G, int8_t *high, int8_t *low, float *s, int32_t *bias) {
    vi top = {0}, total = {0};
    int32_t lane[LANES];
    for (int i = 0; i < G; i += LANES) {
        vi bits = {0};
        memcpy(&bits, x + i, 4 * (size_t)(G - i < LANES ? G - i : LANES));
        bits &= 0x7fffffff;
        vi is_larger = bits > top;
        top = (bits & is_larger) | (top & ~is_larger);
    }
    memcpy(lane, &top, sizeof top);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
    const float max = read_f32(lane);
    *s = max / 16256.0f;
    const float inverse = max > 1e-30f && max < INFINITY ? 16256.0f / max : 0.0f;
    for (int i = 0; i < G; i += LANES) {
        size_t count = (size_t)(G - i < LANES ? G - i : LANES);
        vf v = {0};
        if (inverse != 0) memcpy(&v, x + i, 4 * count);
        vi q = (vi)(v * inverse + 12582912.0f) - 0x4b400000; // + 1.5 * 2^23 rounds to nearest
        vi digit = (q + 64) >> 7;
        vb high_bytes = __builtin_convertvector(digit, vb);
        vb low_bytes = __builtin_convertvector(q - 128 * digit, vb);
        memcpy(high + i, &high_bytes, count);
        memcpy(low + i, &low_bytes, count);
        total += q;
    }
    *bias = -128 * (int32_t)lane_sum(__builtin_convertvector(total, vf)); // below 2^24, so exact
}

// to (LANES,) = v, or += v if add.
INLINE void store_lanes(float *to, vf v, bool add) {
    if (add) v += AT(to);
    AT(to) = v;
}

// One tile of a q8_0 matrix times nb rows of the input from row b0 on: the tile's 16 columns of
// out (nb, ld) = in (nb, cols) @ tile (16, cols)^T, or += if add.
INLINE void tile_q8(float *out, int64_t ld, bool add, const Matrix *w, int64_t tile, int G,
                    const Input *in, int b0, const int nb) {
    const int64_t groups = w->cols / G, width = in->width;
    const uint8_t *q = w->q + tile * TILE * w->cols;
    const uint16_t *scale = w->s + tile * TILE * groups;
    const int8_t *high = in->high + b0 * width, *low = in->low + b0 * width;
    const float *xs = in->s + b0 * (width / 4);
    const int32_t *bias = in->bias + b0 * (width / 4);
    vf total[BLOCK][PARTS];
    for (int b = 0; b < nb; b++)
        for (int j = 0; j < PARTS; j++) total[b][j] = (vf){0};
    for (int64_t g = 0; g < groups; g++, high += G, low += G) {
        vi hi[BLOCK][PARTS], lo[BLOCK][PARTS];
        for (int b = 0; b < nb; b++)
            for (int j = 0; j < PARTS; j++) {
                lo[b][j] = dot_start(bias[b * (width / 4) + g]);
                hi[b][j] = (vi){0};
            }
        for (int i = 0; i < G; i += 4, q += 4 * TILE)
            for (int j = 0; j < PARTS; j++)
                for (int b = 0; b < nb; b++) {
                    if (nb == 1) __builtin_prefetch(q + 4 * LANES * j + AHEAD);
                    hi[b][j] = dot4(hi[b][j], q + 4 * LANES * j, high + b * width + i);
                    lo[b][j] = dot4(lo[b][j], q + 4 * LANES * j, low + b * width + i);
                }
        for (int j = 0; j < PARTS; j++, scale += LANES) {
            vf ws = load_fp16(scale);
            for (int b = 0; b < nb; b++)
                total[b][j] += __builtin_convertvector(hi[b][j] * 128 + lo[b][j], vf)
                               * (ws * xs[b * (width / 4) + g]);
        }
    }
    for (int b = 0; b < nb; b++)
        for (int j = 0; j < PARTS; j++)
            store_lanes(out + (b0 + b) * ld + tile * TILE + j * LANES, total[b][j], add);
}

// tile_q8 for an fp32 matrix. It has four partial sums, so that additions do not wait for each
// other.
INLINE void tile_f32(float *out, int64_t ld, bool add, const Matrix *w, int64_t tile,
                     const Input *in, int b0, const int nb) {
    const float *x = in->f + b0 * in->width;
    for (int j = 0; j < PARTS; j++) {
        const float *f = w->f + tile * TILE * w->cols + j * LANES;
        vf part[BLOCK][4];
        for (int b = 0; b < nb; b++)
            for (int k = 0; k < 4; k++) part[b][k] = (vf){0};
        int64_t i = 0;
        for (; i + 4 <= w->cols; i += 4)
            for (int k = 0; k < 4; k++, f += TILE)
                for (int b = 0; b < nb; b++) part[b][k] += AT(f) * x[b * in->width + i + k];
        for (; i < w->cols; i++, f += TILE)
            for (int b = 0; b < nb; b++) part[b][0] += AT(f) * x[b * in->width + i];
        for (int b = 0; b < nb; b++)
            store_lanes(out + (b0 + b) * ld + tile * TILE + j * LANES,
                        (part[b][0] + part[b][1]) + (part[b][2] + part[b][3]), add);
    }
}

// product for groups of G; for fp32 if G is 0.
INLINE Range product_for_group(const int G, State *s, int thread, float *out, int64_t ld,
                               bool add, const float *x, int B, const float *norm, const Matrix *w,
                               int64_t unit) {
    const Config *c = &s->m->c;
    const int block = G ? BLOCK : BLOCK / 2;
    Input *in = &s->in[thread];
    in->f = norm ? in->own : x;
    for (int b = 0; b < B; b++) {
        const int64_t at = b * in->width, at_group = b * (in->width / 4);
        if (norm) normalize(in->own + at, x + at, norm, c->dim, c->norm_eps);
        for (int64_t g = 0; G && g < w->cols / G; g++)
            quantize(in->f + at + g * G, G, in->high + at + g * G, in->low + at + g * G,
                     in->s + at_group + g, in->bias + at_group + g);
    }
    const Range r = share(w->tiles, unit, thread, s->team);
    for (int64_t t = r.lo; t < r.hi; t++) {
        int b = 0;
        for (; b + block <= B; b += block)
            if (G) tile_q8(out, ld, add, w, t, G, in, b, block);
            else tile_f32(out, ld, add, w, t, in, b, block);
        for (; b < B; b++)
            if (G) tile_q8(out, ld, add, w, t, G, in, b, 1);
            else tile_f32(out, ld, add, w, t, in, b, 1);
    }
    return r;
}

// out (B, ld) = x (B, width) @ w (rows, cols)^T, or += if add. This thread computes its share of
// the tiles of w, in units of `unit` tiles, and returns it. Each thread prepares the input for
// itself: it applies RMSNorm if `norm` (D,) is not NULL, and quantizes it if w is quantized. x must
// be zero beyond the end of each row.
KERNEL Range product(State *s, int thread, float *out, int64_t ld, bool add, const float *x, int B,
                     const float *norm, const Matrix *w, int64_t unit) {
    switch (w->q ? s->m->c.group : 0) { // a constant G gives loops of constant length
    case 0: return product_for_group(0, s, thread, out, ld, add, x, B, norm, w, unit);
    case 16: return product_for_group(16, s, thread, out, ld, add, x, B, norm, w, unit);
    case 32: return product_for_group(32, s, thread, out, ld, add, x, B, norm, w, unit);
    case 64: return product_for_group(64, s, thread, out, ld, add, x, B, norm, w, unit);
    default: return product_for_group(s->m->c.group, s, thread, out, ld, add, x, B, norm, w, unit);
    }
}

// For a range of the H + K + K heads of qkv: rotates queries and keys, pair by pair, by the angle
// of their position (RoFormer, eq. 34), scales the queries, and writes keys and values to the
// cache.
KERNEL void store_heads(State *s, int layer, Range r) {
    const Config *c = &s->m->c;
    const int H = c->n_heads, K = c->n_kv_heads, E = c->head_dim;
    for (int b = 0; b < s->B; b++) {
        const int64_t pos = s->row[b].pos, seq = s->row[b].seq;
        const float *rope = s->rope + pos * E;
        for (int64_t h = r.lo; h < r.hi; h++) {
            float *v = s->qkv + b * s->width + h * E;
            float scale = h < H ? 1.0f / sqrtf((float)E) : 1.0f;
            for (int i = 0; i < E && h < H + K; i += 2) {
                float v0 = v[i] * scale, v1 = v[i + 1] * scale;
                v[i] = v0 * rope[i] - v1 * rope[i + 1];
                v[i + 1] = v0 * rope[i + 1] + v1 * rope[i];
            }
            if (h < H) continue;
            int64_t head = (seq * c->n_layers + layer) * K + (h < H + K ? h - H : h - H - K);
            void *to = (h < H + K ? s->keys : s->values) + head * s->head_bytes;
            for (int64_t e = 0, at = pos / 16 * 16 * E + pos % 16; e < E; e++, at += 16)
                if (s->half) ((uint16_t *)to)[at] = to_half(v[e]);
                else ((float *)to)[at] = v[e];
        }
    }
}

// scores[t] = q . keys[t] for t < n rounded up to 16; q (E,) scaled, keys (T / 16, E, 16), E even.
INLINE void score_keys(float *scores, const float *q, const void *keys, int n, int E, int half) {
    for (int64_t t = 0; t < n; t += 16)
        for (int j = 0; j < 16; j += LANES) {
            vf s0 = {0}, s1 = {0};
            int64_t k = t * E + j;
            for (int e = 0; e < E; e += 2, k += 32) {
                s0 += q[e] * load_cached(keys, k, half);
                s1 += q[e + 1] * load_cached(keys, k + 16, half);
            }
            AT(scores + t + j) = s0 + s1;
        }
}

// scores (n,) = exp(scores - their maximum), and 0 from n up to a multiple of 16; returns the sum.
// A NaN, of a damaged model, is kept, so that it reaches the logits.
KERNEL float softmax(float *scores, int n) {
    n = pad(scores, n);
    return exp_sum(scores, n, 1, maximum(scores, n), true);
}

// out[e] = sum over t < n of weight[t] * values[e][t] / total, for the nb dimensions of a head from
// e on; weight (n,), values (T / 16, E, 16).
INLINE void mix_values(float *out, const float *weight, float total, const void *values, int n,
                       int E, int e, int half, const int nb) {
    vf acc[8]; // set by a loop: gcc clears an initialized array by a slow string instruction
    for (int i = 0; i < nb; i++) acc[i] = (vf){0};
    int64_t from = 16 * (int64_t)e;
    for (int t = 0; t < n; t += 16, from += 16 * (int64_t)E)
        for (int j = 0; j < 16; j += LANES) {
            vf w = AT(weight + t + j);
            for (int i = 0; i < nb; i++) acc[i] += w * load_cached(values, from + 16 * i + j, half);
        }
    float scale = 1.0f / total;
    for (int i = 0; i < nb; i++) out[e + i] = lane_sum(acc[i]) * scale;
}

// Attention for a range of the H * B (head, row) pairs: att = softmax(q . keys) @ values.
// scores (T,) is the thread's own memory.
INLINE void attention_for_cache(const int half, State *s, int layer, Range r, float *scores) {
    const Config *c = &s->m->c;
    const int E = c->head_dim;
    for (int64_t i = r.lo; i < r.hi; i++) {
        int64_t h = i / s->B, b = i % s->B;
        int64_t head = ((int64_t)s->row[b].seq * c->n_layers + layer) * c->n_kv_heads
                       + h / (c->n_heads / c->n_kv_heads);
        const uint8_t *k = s->keys + head * s->head_bytes, *v = s->values + head * s->head_bytes;
        const float *q = s->qkv + b * s->width + h * E;
        float *out = s->att + b * s->width + h * E;
        int n = s->row[b].pos + 1, e = 0;
        score_keys(scores, q, k, n, E, half);
        float total = softmax(scores, n);
        for (; e + 8 <= E; e += 8) mix_values(out, scores, total, v, n, E, e, half, 8);
        for (; e < E; e++) mix_values(out, scores, total, v, n, E, e, half, 1);
    }
}

// attention_for_cache with `half` as a constant.
KERNEL void attention(State *s, int layer, Range r, float *scores) {
    if (s->half) attention_for_cache(1, s, layer, r, scores);
    else attention_for_cache(0, s, layer, r, scores);
}

// h (B, F) = silu(w1 x) * w3 x, for the tiles lo to hi - 1 of w1.
KERNEL void swiglu(State *s, int64_t lo, int64_t hi) {
    for (int b = 0; b < s->B; b++)
        for (int64_t i = lo * TILE; i < hi * TILE; i += LANES) {
            const float *gate = s->h13 + b * s->width + i / TILE * TILE + i;
            vf v = AT(gate), x = vmax(SPLAT(-88.0f), -vmax(SPLAT(-88.0f), v));
            AT(s->h + b * s->width + i) = v / (1.0f + fast_exp(x)) * AT(gate + TILE);
        }
}

// The forward pass: all threads of the team together compute B rows. It writes the keys and values
// of the rows to the cache, and to s->logits the logits of the last n_logits rows. Rows of one
// sequence must be in order of position.
KERNEL void forward_pass(void *arg, Team *team, int thread) {
    State *s = arg;
    const Model *m = s->m;
    const Config *c = &m->c;
    const int B = s->B, E = c->head_dim, heads = c->n_heads + 2 * c->n_kv_heads;
    const int64_t width = s->width;
    // Rows of wqkv are shared in units of whole heads and whole tiles, so that the thread that
    // computes a head can also rotate and cache it.
    int64_t unit = E;
    while (unit % TILE) unit += E;

    Range r = share(B, 1, thread, team);
    for (int64_t b = r.lo; b < r.hi; b++)
        embed_row(s->x + b * width, &m->embed, s->row[b].token, c->dim, c->group);
    barrier(team);
    for (int i = 0; i < c->n_layers; i++) {
        const Layer *l = &m->layers[i];
        r = product(s, thread, s->qkv, width, false, s->x, B, l->att_norm, &l->wqkv, unit / TILE);
        store_heads(s, i, (Range){r.lo * TILE / E, min64(heads, r.hi * TILE / E)});
        barrier(team);

        r = share((int64_t)c->n_heads * B, 1, thread, team);
        attention(s, i, r, s->scores + thread * s->T);
        barrier(team);

        product(s, thread, s->x, width, true, s->att, B, NULL, &l->wo, 1);
        barrier(team);

        r = product(s, thread, s->h13, width, false, s->x, B, l->ffn_norm, &l->w13, 2);
        swiglu(s, r.lo / 2, r.hi / 2);
        barrier(team);

        product(s, thread, s->x, width, true, s->h, B, NULL, &l->w2, 1);
        barrier(team);
    }
    if (s->n_logits)
        product(s, thread, s->logits, s->v_width, false, s->x + (B - s->n_logits) * width,
                s->n_logits, m->norm, &m->output, 1);
}

static const Kernels kernels = {ISA_NAME, forward_pass, exps, above, maximum};

#ifndef LATER_PASS // ====== the first pass continues to the end of the file
// ------------------------------------------------------------------------------------------
// The tokenizer: byte pair encoding
//
// The best of all adjacent pairs that can be merged is merged, the leftmost of equals, until no
// pair can be merged. Two kinds of tokenizer differ in what is cut into words first, and in which
// pairs can be merged:
//   0, SentencePiece: a text is one word of characters, with a space in front. Two symbols can be
//      merged if their concatenation is a piece, the piece with the best score first. A symbol that
//      is not a piece then becomes its bytes or, with its neighbours, one id 0 (unknown) if bytes
//      are no pieces. llama2.c's file: u32 longest piece; for each id f32 score, u32 length, bytes;
//      a score of -inf marks a control token.
//   1, byte-level BPE (GPT-2, Llama 3): a regular expression cuts a text into words of bytes. The
//      merges are a list in order of rank. The file:
//      u32 n, n * (u32 first, u32 last, u32 class): Unicode ranges, ascending; class 1 letters
//        (\p{L}), 2 numbers (\p{N}), 3 white space (\s); so that C needs no tables of its own
//      u32 pattern: the regular expression of 0 GPT-2, 1 Llama 3; 2: the text is not cut
//      u32 flags: 1 a word that is a piece is not merged, 2 each number is cut off first, 4 a space
//        is put in front of a text that does not begin with one
//      u32 n, n * (u32 left, u32 right, u32 merged): ids, in order of rank
//      for each id: u32 2 * length + (1 if it is special: no text ever becomes it); bytes

typedef struct {
    const uint8_t *text;
    uint32_t len;
    int what;    // TEXT, SPECIAL, ONE_BYTE or MERGE
    float score; // the highest is merged first
} Piece;

enum { TEXT, SPECIAL, ONE_BYTE, MERGE };       // of a Piece; the text of a MERGE is its two ids
enum { OTHER, LETTER, NUMBER, SPACE, END };    // classes of characters
enum { WHOLE_WORDS = 1, SPLIT_NUMBERS = 2, PREFIX_SPACE = 4 }; // flags of a tokenizer

typedef struct {
    Piece *piece;     // (n + n_merges,)
    int n, bos, kind;
    bool squeeze;     // text is stripped, and runs of spaces become one
    int32_t *table;   // (mask + 1,) hash table of indices of pieces, -1 where empty
    uint32_t mask;
    int byte_id[256]; // ids of <0x00> to <0xFF>, -1 where there is none
    const uint8_t *ranges; // (n_ranges, 3) u32; this and the rest are for kind 1
    uint32_t n_ranges, n_merges, pattern, flags, longest_special;
} Tokenizer;

// The slot of a text in the hash table, or the empty slot where it belongs.
static int32_t *slot_of(const Tokenizer *t, const void *text, int64_t len, int what) {
    uint32_t h = 2166136261u;
    for (int64_t i = 0; i < len; i++) h = (h ^ ((const uint8_t *)text)[i]) * 16777619u;
    for (h ^= h >> 15;; h++) {
        int32_t *slot = &t->table[h & t->mask];
        const Piece *p = &t->piece[*slot < 0 ? 0 : *slot];
        if (*slot < 0 || (p->len == len && p->what == what && !memcmp(p->text, text, p->len)))
            return slot;
    }
}

// Reads what kind 1 has between the number of ranges and the pieces; returns the merges.
static const uint8_t *read_tables(Tokenizer *t, Span *in, const char *path) {
    const uint8_t *merges = NULL, *p = t->ranges = take(in, 12 * (uint64_t)t->n_ranges);
    if (p && (p = take(in, 12))) {
        t->pattern = read_u32(p), t->flags = read_u32(p + 4), t->n_merges = read_u32(p + 8);
        merges = take(in, 12 * (uint64_t)t->n_merges);
    }
    if (!merges) die("%s: the tokenizer ends within its tables", path);
    if (t->pattern > 2 || t->flags > 7 || t->n_merges > 1 << 24) // 2^24: ranks are exact as floats
        die("%s: the tokenizer has pattern %u, flags %u and %u merges", path, t->pattern, t->flags,
            t->n_merges);
    int64_t done = -1;
    for (uint32_t i = 0; i < t->n_ranges; i++, done = read_u32(p + 4)) {
        p = t->ranges + 12 * (int64_t)i;
        if (read_u32(p) <= done || read_u32(p + 4) < read_u32(p)
            || read_u32(p + 8) < LETTER || read_u32(p + 8) > SPACE)
            die("%s: the tokenizer's Unicode range %u is wrong", path, i);
    }
    return merges;
}

// Opens the tokenizer of a model. It points into `in`, which must stay. If c->squeeze < 0 it is
// unknown, and guessed: a vocabulary with a piece of two spaces was not trained on squeezed text.
static void tokenizer_open(Tokenizer *t, Span in, const Config *c, const char *path) {
    static uint8_t bytes[256];
    const uint32_t n = (uint32_t)c->vocab_size;
    const uint8_t *p = take(&in, 4), *merges = NULL;
    *t = (Tokenizer){.n = (int)n, .bos = c->bos, .kind = c->kind,
                     .squeeze = c->squeeze == 1 || c->squeeze < 0};
    if (!p) die("%s: the tokenizer is empty", path);
    if (t->kind == 1) t->n_ranges = read_u32(p), merges = read_tables(t, &in, path);
    t->piece = zeros((n + t->n_merges) * (int64_t)sizeof *t->piece);
    for (t->mask = 1; t->mask < 2 * (n + t->n_merges); t->mask *= 2) {} // at most half used
    t->table = memset(zeros(4 * (int64_t)t->mask), 255, 4 * (size_t)t->mask);
    t->mask--;
    for (uint32_t i = 0; i < n; i++) {
        Piece *piece = &t->piece[i];
        if ((p = take(&in, t->kind == 0 ? 8 : 4))) {
            piece->len = t->kind == 0 ? read_u32(p + 4) : read_u32(p) >> 1;
            piece->text = take(&in, piece->len);
        }
        if (!piece->text) die("%s: the tokenizer ends within piece %u of %u", path, i, n);
        if (t->kind == 0) piece->score = read_f32(p);
        const bool special = t->kind == 0 ? piece->score == -INFINITY : read_u32(p) & 1;
        piece->what = special ? SPECIAL : TEXT;
        if (piece->what == SPECIAL && piece->len > t->longest_special)
            t->longest_special = piece->len;
        if (piece->len && (t->kind == 1 || (i && (int)i != t->bos && (int)i != c->eos))) {
            int32_t *slot = slot_of(t, piece->text, piece->len, piece->what);
            if (*slot < 0) *slot = (int32_t)i;
            if (c->squeeze < 0 && piece->len == 2 && !memcmp(piece->text, "  ", 2))
                t->squeeze = false;
        }
    }
    for (int b = 0; b < 256; b++) { // pieces that stand for a byte
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        int id = t->byte_id[b] = t->kind == 0 ? *slot_of(t, name, 6, TEXT) : -1;
        bytes[b] = (uint8_t)b;
        if (id >= 0) t->piece[id] = (Piece){&bytes[b], 1, ONE_BYTE, 0};
    }
    if (in.size)
        die("%s: the tokenizer has more than %u pieces: it is another model's", path, n);
    for (uint32_t i = 0; i < t->n_merges; i++, merges += 12) {
        const uint32_t id[3] = {read_u32(merges), read_u32(merges + 4), read_u32(merges + 8)};
        const Piece *left = t->piece + id[0], *right = t->piece + id[1], *both = t->piece + id[2];
        if (id[0] >= n || id[1] >= n || id[2] >= n || both->what == SPECIAL
            || (uint64_t)left->len + right->len != both->len
            || memcmp(both->text, left->text, left->len)
            || memcmp(both->text + left->len, right->text, right->len))
            die("%s: the tokenizer's merge %u is not the concatenation of its parts", path, i);
        t->piece[n + i] = (Piece){merges, 8, MERGE, -(float)i};
        *slot_of(t, merges, 8, MERGE) = (int32_t)(n + i);
    }
}

// The CRC-32 of a span, as zlib computes it.
static uint32_t crc32(Span s) {
    uint32_t crc = ~0u;
    for (int64_t i = 0; i < s.size; i++) {
        crc ^= s.data[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return ~crc;
}

// Checks that the file of -z is the tokenizer that the model was made with, if the model file says
// which: it contains the tokenizer, or its hash, whose last 4 bytes are the CRC-32 of the file for
// -z, big-endian.
static void check_same_tokenizer(const Model *m, Span file, const char *path) {
    const uint8_t *h = m->c.hash, *crc = h + 28;
    bool known = false;
    for (int i = 0; i < 32; i++) known |= h[i] != 0;
    uint32_t want = (uint32_t)crc[0] << 24 | (uint32_t)crc[1] << 16 | (uint32_t)crc[2] << 8;
    want |= crc[3];
    if (m->tokenizer.size && m->c.kind == 0) want = crc32(m->tokenizer), known = true;
    if (m->tokenizer.size && m->c.kind == 1) want = 0, known = true; // -z reads kind 0 only
    if (known && want != crc32(file))
        die("%s is not the tokenizer that %s was made with%s", path, m->path,
            m->tokenizer.size ? ", which it contains: leave out -z" : "");
}

// The length of the character at s, of which `left` bytes are there; 1 if it is not valid UTF-8.
static int utf8_length(const uint8_t *s, int64_t left) {
    int n = *s < 0x80 ? 1 : *s >= 0xc2 && *s < 0xe0 ? 2 : *s >= 0xe0 && *s < 0xf0 ? 3
          : *s >= 0xf0 && *s < 0xf5 ? 4 : 1;
    if (n > left) return 1;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 1;
    return n;
}

// The class of the character at `at` in a text that ends at `end`; *len becomes its length.
static int class_of(const Tokenizer *t, const uint8_t *text, int64_t at, int64_t end, int *len) {
    if (at >= end) return *len = 0, END;
    *len = utf8_length(text + at, end - at);
    uint32_t code = *len == 1 ? text[at] : text[at] & (0xffu >> (*len + 1)), lo = 0;
    for (int i = 1; i < *len; i++) code = code << 6 | (text[at + i] & 0x3f);
    if (*len == 1 && code >= 0x80) return OTHER;
    for (uint32_t hi = t->n_ranges; lo < hi;) { // find the first range that does not end before it
        uint32_t mid = lo + (hi - lo) / 2;
        if (read_u32(t->ranges + 12 * (int64_t)mid + 4) < code) lo = mid + 1;
        else hi = mid;
    }
    const uint8_t *range = t->ranges + 12 * (int64_t)lo;
    return lo < t->n_ranges && read_u32(range) <= code ? (int)read_u32(range + 8) : OTHER;
}

// The length of 's|'t|'re|'ve|'m|'ll|'d at s, in any case if `fold`; 0 if there is none.
static int contraction(const uint8_t *s, int64_t left, bool fold) {
    if (left < 2 || s[0] != '\'') return 0;
    int a = s[1] | fold << 5, b = left > 2 ? s[2] | fold << 5 : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l')
           || (fold && left > 2 && s[1] == 0xc5 && s[2] == 0xbf) ? 3 : 0; // the long s
}

// Returns the end of the word that begins at `at`, which is the match of the pattern there:
//   GPT-2:   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   Llama 3: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
//            | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
static int64_t word_end(const Tokenizer *t, const uint8_t *s, int64_t at, int64_t end) {
    const bool llama = t->pattern == 1;
    int len, next_len, skip = contraction(s + at, end - at, llama), count = 0;
    if (t->pattern == 2) return end;
    if (skip) return at + skip;
    int class = class_of(t, s, at, end, &len);
    int next = class_of(t, s, at + len, end, &next_len);
    bool prefix = llama && next == LETTER ? class != LETTER && class != NUMBER && s[at] != '\r'
                                            && s[at] != '\n'
                                          : s[at] == ' ' && next != SPACE && next != END
                                            && !(llama && next == NUMBER);
    if (prefix) at += len, class = next;
    if (class != SPACE) {
        while (class_of(t, s, at, end, &len) == class
               && !(llama && class == NUMBER && count++ == 3)) at += len;
        while (llama && class == OTHER && at < end && (s[at] == '\r' || s[at] == '\n')) at++;
        return at;
    }
    // White space: `last` is its last character, `line` the position after its last end of line.
    int64_t from = at, last = at, line = -1;
    for (; class_of(t, s, at, end, &len) == SPACE; at += len) {
        last = at;
        if (s[at] == '\r' || s[at] == '\n') line = at + 1;
    }
    return llama && line >= 0 ? line : at < end && last > from ? last : at;
}

typedef struct {
    int64_t at, len;    // its bytes in the word; len 0: merged into its left neighbour
    int64_t prev, next; // the neighbouring symbols, or -1
    int id;             // of the piece, -1 if it is none
} Symbol;

typedef struct {
    float score;
    int id; // of the piece, of len bytes, that symbol `left` and its right neighbour become
    int64_t left, len;
} Merge;

static bool is_better(const Merge *a, const Merge *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

typedef struct {
    const Tokenizer *t;
    const uint8_t *word;
    Symbol *symbol;
    Merge *heap; // (n,) binary heap, the best merge first
    int64_t n;
} Merger;

// Whether a symbol and its right neighbour can be merged; *merge becomes that merge.
static bool can_merge(const Merger *m, int64_t at, Merge *merge) {
    const Tokenizer *t = m->t;
    if (at < 0 || !m->symbol[at].len || m->symbol[at].next < 0) return false;
    const Symbol *left = &m->symbol[at], *right = &m->symbol[left->next];
    const int pair[2] = {left->id, right->id};
    *merge = (Merge){.left = at, .len = left->len + right->len};
    int piece = t->kind == 0 ? *slot_of(t, m->word + left->at, merge->len, TEXT)
                             : *slot_of(t, pair, 8, MERGE);
    if (piece < 0) return false;
    merge->score = t->piece[piece].score;
    merge->id = t->kind == 0 ? piece : (int)read_u32(t->piece[piece].text + 8);
    return true;
}

// Puts the merge of a symbol and its right neighbour on the heap, if there is one.
static void push_merge(Merger *m, int64_t left) {
    Merge merge;
    if (!can_merge(m, left, &merge)) return;
    int64_t i = m->n++;
    for (; i > 0 && is_better(&merge, &m->heap[(i - 1) / 2]); i = (i - 1) / 2)
        m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = merge;
}

// Takes the best merge off the heap.
static Merge pop_merge(Merger *m) {
    Merge best = m->heap[0], last = m->heap[--m->n];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < m->n; i = child) {
        if (child + 1 < m->n && is_better(&m->heap[child + 1], &m->heap[child])) child++;
        if (!is_better(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = last;
    return best;
}

// Encodes a word into ids; returns their number.
static int64_t encode_word(Merger *m, const uint8_t *word, int64_t bytes, int *ids) {
    const Tokenizer *t = m->t;
    Symbol *symbol = m->symbol;
    int64_t n = 0, count = 0;
    if (t->flags & WHOLE_WORDS && (*ids = *slot_of(t, word, bytes, TEXT)) >= 0) return 1;
    for (int64_t at = 0, len; at < bytes; at += len) {
        len = t->kind == 0 ? utf8_length(word + at, bytes - at) : 1;
        int id = *slot_of(t, word + at, len, TEXT);
        if (id >= 0 || t->kind == 0) symbol[n] = (Symbol){at, len, n - 1, n + 1, id}, n++;
    }
    if (n) symbol[n - 1].next = -1;
    m->word = word;
    for (int64_t i = 0; i < n; i++) push_merge(m, i);
    while (m->n) {
        Merge best = pop_merge(m), current; // best is stale if one of its symbols has changed
        if (!can_merge(m, best.left, &current) || current.id != best.id || current.len != best.len)
            continue;
        Symbol *left = &symbol[best.left], *right = &symbol[left->next];
        *left = (Symbol){left->at, best.len, left->prev, right->next, best.id};
        right->len = 0;
        if (left->next >= 0) symbol[left->next].prev = best.left;
        push_merge(m, left->prev);
        push_merge(m, best.left);
    }
    bool unknown = false; // whether the last id is that of unknown characters
    for (int64_t i = 0; i >= 0 && i < n; i = symbol[i].next) {
        if (symbol[i].id >= 0) {
            ids[count++] = symbol[i].id;
            unknown = false;
            continue;
        }
        for (int64_t k = 0; k < symbol[i].len; k++) {
            const int byte = t->byte_id[word[symbol[i].at + k]];
            if (byte >= 0 || !unknown) ids[count++] = byte < 0 ? 0 : byte;
            unknown = byte < 0;
        }
    }
    return count;
}

// Copies a text as SentencePiece normalizes it: with a space in front, its word mark U+2581 as a
// space, and squeezed if t->squeeze. `to` has room for len + 1 bytes. Returns the new length.
static int64_t normalize_text(const Tokenizer *t, const uint8_t *text, int64_t len, uint8_t *to) {
    int64_t n = 0;
    bool after_space = true;
    for (int64_t i = 0; i < len; i++) {
        bool mark = len - i >= 3 && !memcmp(text + i, "\xe2\x96\x81", 3);
        if (t->squeeze && text[i] == ' ' && after_space) continue;
        if (n == 0) to[n++] = ' ';
        after_space = text[i] == ' ';
        to[n++] = mark ? ' ' : text[i];
        if (mark) i += 2;
    }
    while (t->squeeze && n > 0 && to[n - 1] == ' ') n--;
    return n;
}

// Appends the ids of a text of len bytes, after BOS if `bos`, to the *count ids (NULL if none).
// Returns all ids, which the caller frees.
static int *encode(const Tokenizer *t, const char *string, size_t len, bool bos, int *ids,
                   size_t *count) {
    const uint8_t *text = (const uint8_t *)string;
    const int64_t size = (int64_t)len;
    if (len > 1u << 29) die("a text of %lld bytes is too long", (long long)size);
    uint8_t *buffer = need(malloc(len + 1));
    ids = need(realloc(ids, sizeof *ids * (*count + 2 * (len + 1)))); // PREFIX_SPACE: two per byte
    Merger m = {.t = t, .symbol = need(malloc(sizeof(Symbol) * (len + 1))),
                .heap = need(malloc(sizeof(Merge) * 3 * (len + 1)))}; // a merge adds at most two
    int64_t n = (int64_t)*count, used;
    if (bos) ids[n++] = t->bos;
    if (t->kind == 0 && (used = normalize_text(t, text, size, buffer)))
        n += encode_word(&m, buffer, used, ids + n);
    for (int64_t at = 0, end; at < size && t->kind == 1; at = end) {
        int step, number = class_of(t, text, at, size, &step) == NUMBER;
        for (end = t->flags & SPLIT_NUMBERS ? at + step : size; end < size && !number; end += step)
            if (class_of(t, text, end, size, &step) == NUMBER) break;
        used = 0;
        if (t->flags & PREFIX_SPACE && text[at] != ' ') buffer[used++] = ' ';
        memcpy(buffer + used, text + at, (size_t)(end - at));
        used += end - at;
        for (int64_t word = 0, stop; word < used; word = stop) {
            stop = word_end(t, buffer, word, used);
            n += encode_word(&m, buffer + word, stop - word, ids + n);
        }
    }
    free(buffer), free(m.symbol), free(m.heap);
    *count = (size_t)n;
    return ids;
}

// Prints the text of tokens lo to hi - 1 of ids; `previous` is the token before them. SentencePiece
// drops the leading space after BOS. Control characters other than newline and tab are left out,
// because generated text must not move the cursor of the terminal. Those of C1 are the bytes C2 80
// to C2 9F, so that the byte C2 is held back until the next one.
static void print_pieces(const Tokenizer *t, const int *ids, int lo, int hi, int previous) {
    static bool held;
    for (; lo < hi; previous = ids[lo++]) {
        const Piece *p = &t->piece[ids[lo]];
        uint32_t i = t->kind == 0 && previous == t->bos && p->len && *p->text == ' ';
        for (; i < p->len && p->what != SPECIAL; i++) {
            const int byte = (uint8_t)p->text[i];
            const bool c1 = held && byte >= 0x80 && byte < 0xa0;
            if (held && !c1) putchar(0xc2);
            held = byte == 0xc2;
            if (byte >= 32 ? byte != 127 && !held && !c1 : byte == '\n' || byte == '\t')
                putchar(byte);
        }
    }
}

// ------------------------------------------------------------------------------------------
// The sampler

typedef struct {
    float temperature; // 0: always the most likely token
    int topk;          // sample from the k most likely tokens and their equals; 0: from all
    float topp;        // and from the smallest set of these above this probability; 0, 1: all
    uint64_t rng;
} Sampler;

// The state of the random number generator for a seed, by splitmix64: neighbouring seeds give
// unrelated streams.
static uint64_t seed_rng(uint64_t seed) {
    seed += 0x9e3779b97f4a7c15u;
    seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9u;
    seed = (seed ^ seed >> 27) * 0x94d049bb133111ebu;
    return (seed ^ seed >> 31) | 1;
}

// The next random number in [0, 1), by xorshift*.
static float random_float(uint64_t *rng) {
    *rng ^= *rng >> 12;
    *rng ^= *rng << 25;
    *rng ^= *rng >> 27;
    return (float)((*rng * 0x2545f4914f6cdd1du) >> 40) / 16777216.0f;
}

#define BLOCK_SUM 256 // the sampler keeps one sum per block of so many numbers

// Samples the index of one of the x (n,) that are larger than `least`, each with probability
// x / total. sums (n / BLOCK_SUM,) are the sums of those x in each block.
static int sample_index(const float *x, int n, float least, const float *sums, float total,
                        uint64_t *rng) {
    float r = random_float(rng) * total;
    int last = -1; // the result where rounding errors lead beyond the end
    for (int i = 0; i < n; i += BLOCK_SUM, sums++) {
        if (*sums <= r && i + BLOCK_SUM < n) {
            r -= *sums;
            if (*sums > 0) last = i;
            continue;
        }
        for (int j = i; j < i + BLOCK_SUM && j < n; j++)
            if (x[j] > least) {
                last = j;
                if ((r -= x[j]) < 0) return j;
            }
    }
    while (last >= 0 && !(x[last] > least)) last++; // it may be the start of a block
    return last;
}

// sums (n / BLOCK_SUM,) = the sums of the x (n,) that are larger than `least`, in each block;
// returns the sum of all.
static float block_sums(const Kernels *k, const float *x, int n, float least, float *sums) {
    float all = 0;
    for (int i = 0; i < n; i += BLOCK_SUM)
        all += *sums++ = k->above(x + i, (int)min64(BLOCK_SUM, n - i), least);
    return all;
}

// A threshold that only the k largest of the x (n,), which are in [0, 1], and their equals exceed;
// 0 if fewer than k exceed 0. It bisects over the bits of floats, which order non-negative floats
// alike.
static float top_k_threshold(const float *x, int n, int k) {
    float least = 0;
    for (uint32_t bits = 0, bit = 1u << 29; bit; bit /= 2) {
        const uint32_t candidate_bits = bits | bit;
        const float candidate = read_f32(&candidate_bits);
        int count = 0;
        for (int i = 0; i < n; i++) count += x[i] > candidate;
        if (count >= k) bits = candidate_bits, least = candidate;
        if (count == k) break;
    }
    return least;
}

// Samples the next token from logits (n,), in memory for a multiple of 16, which it overwrites.
// Returns -1 if no logit is finite, or one is +infinity.
//
// Top-p (nucleus) sampling samples from the smallest set of most probable tokens whose
// probabilities sum to more than p. A token is in it if the more probable tokens sum to p at most.
// So nothing has to be sorted: sample from all tokens; if the token is not in the set, sample again
// from the more probable ones. It is in the set with probability p or more, so one or two passes
// suffice.
static int sample(Sampler *s, const Kernels *k, float *x, int n) {
    static float sums[MAX_VOCAB / BLOCK_SUM];
    n = pad(x, n);
    float max = k->maximum(x, n), least = 0, all = 0, left, *sum = sums;
    if (!(max > -INFINITY && max < INFINITY)) return -1;
    for (int i = 0; i < n && s->temperature < 1e-30f; i++)
        if (x[i] == max) return i;
    for (int i = 0; i < n; i += BLOCK_SUM)
        all += *sum++ = k->exps(x + i, (int)min64(BLOCK_SUM, n - i), 1 / s->temperature, max);
    if (s->topk > 0 && s->topk < n) {
        least = top_k_threshold(x, n, s->topk);
        all = block_sums(k, x, n, least, sums);
    }
    for (left = all;;) {
        int id = sample_index(x, n, least, sums, left, &s->rng);
        if (id < 0 || s->topp <= 0 || s->topp >= 1) return id;
        left = block_sums(k, x, n, least = x[id], sums);
        if (left <= s->topp * all) return id;
    }
}

// ------------------------------------------------------------------------------------------
// Generate, chat, perplexity, bench

typedef struct { // a run of the program
    Model model;
    Tokenizer tokenizer;
    Team team;
    State state;
    const Kernels *kernels;
    float temperature, topp;
    int topk;
    uint64_t seed;
    int steps, stories;
    int stop;   // the token that the chat template has after a reply, or -1
    const char *prompt, *system;
    float *memory; // (MEMORY / 4,) read by bench
} Run;

// Computes the logits of the last n_logits of B rows.
static void forward(Run *run, const Row *rows, int B, int n_logits) {
    set_rows(&run->state, rows, B, n_logits);
    team_run(&run->team, run->kernels->forward, &run->state);
}

// Computes the next block of n ids, in sequence 0 from position pos on; returns its size. It leaves
// the logits of the whole block if `all`, else those of the last of the n ids if it is in the
// block.
static int feed(Run *run, const int *ids, int64_t n, int pos, bool all) {
    Row rows[MAX_ROWS];
    const int B = (int)min64(n, MAX_ROWS);
    for (int b = 0; b < B; b++) rows[b] = (Row){ids[b], pos + b, 0};
    forward(run, rows, B, all ? B : B == n);
    return B;
}

// Computes n ids, in sequence 0 from position pos on, and leaves the logits of the last one.
static void prefill(Run *run, const int *ids, int n, int pos) {
    for (int i = 0; i < n;) i += feed(run, ids + i, n - i, pos + i, false);
}

// The sampler of the sequence with the index `story`.
static Sampler new_sampler(const Run *run, int story) {
    return (Sampler){run->temperature, run->topk, run->topp, seed_rng(run->seed + (uint64_t)story)};
}

static const char not_a_number[] = "the model's output is not a number: its file is damaged";

// sample, which ends the program if the logits are not numbers.
static int sample_or_die(Run *run, Sampler *s, float *logits) {
    int id = sample(s, run->kernels, logits, run->model.c.vocab_size);
    if (id < 0) die(not_a_number);
    return id;
}

// Whether a text ends when this id is sampled.
static bool is_end(const Run *run, int id) {
    const Config *c = &run->model.c;
    for (int i = 0; i < 4; i++)
        if (c->ends[i] && id == c->ends[i]) return true;
    return (c->end_zero && id == 0) || id == c->bos || id == c->eos || id == run->stop;
}

// The bytes that one token reads from a KV cache of n positions.
static double cache_bytes(const Run *run, int n) {
    const Config *c = &run->model.c;
    return 2.0 * (run->state.half ? 2 : 4) * c->n_layers * c->kv_dim * n;
}

// The instruction set and the number of threads in words.
static const char *describe_machine(const Run *run) {
    static char text[64];
    snprintf(text, sizeof text, "%s, %d thread%s", run->kernels->name, run->team.n,
             run->team.n == 1 ? "" : "s");
    return text;
}

typedef struct {
    Sampler sampler;
    int *ids, n; // its tokens, including the prompt
    bool done;
} Story;

// Generates `stories` stories at once, of the same prompt and with seeds seed, seed + 1, ... The
// first is printed as it comes, each other one when those before it have ended.
static void generate(Run *run) {
    const Config *c = &run->model.c;
    const Tokenizer *t = &run->tokenizer;
    const char *prompt = run->prompt ? run->prompt : "";
    State *s = &run->state;
    int N = run->stories, B = N, front = 0, generated = 0;
    size_t count = 0;
    int *ids = encode(t, prompt, strlen(prompt), !c->no_bos, NULL, &count), n = (int)count;
    if (!n) ids[n++] = c->bos; // there must be something to continue
    const int skip = ids[0] == c->bos; // BOS is not printed
    if (n > run->steps)
        die("the prompt has %d tokens, %s %d", n, run->steps == c->seq_len
            ? "the model's context is" : "the limit (-n) is", run->steps);
    state_open(s, &run->model, &run->team, N, run->steps, N > MAX_ROWS ? N : MAX_ROWS);
    Story *story = need(malloc(sizeof *story * (size_t)N));
    Row *rows = need(malloc(sizeof *rows * (size_t)N));
    double start = seconds(), flushed = start, bytes = 0;
    prefill(run, ids, n, 0);
    double prompt_time = seconds() - start;
    int64_t heads = (int64_t)c->n_layers * c->n_kv_heads;
    size_t used = (size_t)(s->head_bytes / s->T * round_up(n, 16)); // bytes of a head's cache
    for (int i = 0; i < N; i++) { // every story starts from the same prompt
        int *own = need(malloc(sizeof *own * (size_t)(run->steps + 1)));
        memcpy(own, ids, sizeof *ids * (size_t)n);
        story[i] = (Story){new_sampler(run, i), own, n, false};
        memmove(s->logits + i * s->v_width, s->logits, sizeof(float) * (size_t)c->vocab_size);
        for (int64_t h = 0; h < heads && i > 0; h++) {
            int64_t from = h * s->head_bytes, to = from + i * heads * s->head_bytes;
            memcpy(s->keys + to, s->keys + from, used);
            memcpy(s->values + to, s->values + from, used);
        }
    }
    print_pieces(t, ids, skip, n, c->bos);
    for (start = seconds(); B;) {
        float *logits = s->logits; // of the last pass, one row per unfinished story
        B = 0;
        for (int i = 0; i < N; i++) {
            Story *y = &story[i];
            if (y->done) continue;
            int id = sample_or_die(run, &y->sampler, logits);
            logits += s->v_width, generated++;
            if (!is_end(run, id)) {
                y->ids[y->n++] = id;
                if (i == front)
                    print_pieces(t, y->ids, y->n - 1, y->n, y->ids[y->n - 2]);
            }
            y->done = is_end(run, id) || y->n - skip >= run->steps;
            if (y->done) continue;
            rows[B++] = (Row){id, y->n - 1, i};
            bytes += cache_bytes(run, y->n);
        }
        for (; front < N && story[front].done; front++) {
            printf(front + 1 < N ? "\n\n" : "\n");
            if (front + 1 < N)
                print_pieces(t, story[front + 1].ids, skip, story[front + 1].n, c->bos);
        }
        // A write per token would cost more than the token, so output is flushed each 10 ms.
        double time = seconds();
        if (time - flushed > 0.01) flush(), flushed = time;
        if (B) forward(run, rows, B, B), bytes += (double)run->model.bytes;
    }
    double time = seconds() - start;
    flush();
    fprintf(stderr, "prompt: %d tokens at %.0f tokens/s; %s: %d tokens at %.0f tokens/s, "
            "%.1f GB/s (%s)\n", n, n / prompt_time, N == 1 ? "story" : "stories",
            generated, generated / time, bytes / time * 1e-9, describe_machine(run));
    for (int i = 0; i < N; i++) free(story[i].ids);
    free(story), free(rows), free(ids);
}

// Reads a line of any length, without its end of line; NULL at the end of the input. The caller
// frees it.
static char *read_line(FILE *in) {
    size_t size = 256, n = 0;
    char *line = need(malloc(size));
    int c;
    for (; (c = getc(in)) != EOF && c != '\n'; line[n++] = (char)c)
        if (n + 2 > size) line = need(realloc(line, size *= 2));
    if (ferror(in)) die("cannot read the input: %s", strerror(errno));
    if (n == 0 && c == EOF) return free(line), NULL;
    if (n >= 3 && !memcmp(line, byte_order_mark, 3)) n -= 3, memmove(line, line + 3, n);
    line[n] = 0;
    return line;
}

// A chat template is three texts in the model file, each as u32 length and bytes: an exchange, the
// first exchange if there is a system prompt, and every later exchange (if absent, the first text
// is used). {user}, {system} and {reply} are replaced by the messages, {bos} and {eos} by the
// tokens; with a byte-level tokenizer special tokens may be spelled out. A file without a template
// gets Llama 2's:
enum { BOS, EOS, SYSTEM, USER, REPLY, NO_NAME };
static const char *const names[NO_NAME] = {"{bos}", "{eos}", "{system}", "{user}", "{reply}"};
static const char *const llama2_chat[3] = {
    "{bos}[INST] {user} [/INST]{reply}{eos}",
    "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]{reply}{eos}", ""};

typedef struct {
    char *user;
    int *reply, n_reply; // the tokens of the reply
} Turn;

// Appends `count` elements of `bytes` bytes each to a block of *n elements; returns the new block.
static void *append(void *block, size_t *n, const void *more, size_t count, size_t bytes) {
    block = need(realloc(block, (*n + count + 1) * bytes));
    if (count) memcpy((char *)block + *n * bytes, more, count * bytes);
    *n += count;
    return block;
}

// Appends a turn to the *n_ids ids and returns them; a turn that is not finished ends where its
// reply begins. The template is cut at its tokens before anything is inserted, so text of a user
// never becomes a control token.
static int *render(Run *run, Span in, const Turn *turn, bool finished, int *ids, size_t *n_ids) {
    const Tokenizer *t = &run->tokenizer;
    char *text = NULL;
    for (size_t used = 0, n = 0;; take(&in, used)) {
        const char *insert = (const char *)in.data;
        int name = 0, id = -1;
        while (name < NO_NAME && !starts_with(in, names[name])) name++;
        used = name < NO_NAME ? strlen(names[name])
                              : (size_t)min64(in.size, t->longest_special);
        for (; name == NO_NAME && used && id < 0; used -= id < 0)
            id = *slot_of(t, in.data, (int64_t)used, SPECIAL);
        if (id < 0 && name == NO_NAME) used = 1;
        if (name == BOS) id = run->model.c.bos;
        if (name == EOS) id = run->model.c.eos;
        if (name == USER) insert = turn->user;
        if (name == SYSTEM) insert = run->system ? run->system : "";
        if (in.size && id < 0 && name != REPLY) {
            text = append(text, &n, insert, name == NO_NAME ? 1 : strlen(insert), 1);
            continue;
        }
        ids = encode(t, text, n, false, ids, n_ids);
        n = 0;
        if (!in.size || (name == REPLY && !finished)) break;
        if (name == REPLY) ids = append(ids, n_ids, turn->reply, (size_t)turn->n_reply, sizeof id);
        else ids = append(ids, n_ids, &id, 1, sizeof id);
    }
    free(text);
    return ids;
}

// The ids of the turns `first` to `last`, the last one without its reply. The caller frees them.
static int *render_all(Run *run, const Turn *turn, int first, int last, int *n) {
    const Span *chat = run->model.chat;
    int *ids = NULL;
    size_t count = 0;
    for (int i = first; i <= last; i++)
        ids = render(run, chat[i > first ? 2 : run->system != NULL], &turn[i], i < last, ids,
                     &count);
    *n = (int)min64((int64_t)count, INT32_MAX);
    return ids;
}

// Removes everything before the first `text`; false if there is none.
static bool skip_to(Span *in, const char *text) {
    while (in->size && !starts_with(*in, text)) take(in, 1);
    return in->size > 0;
}

// How often a text occurs.
static int count_of(Span in, const char *text) {
    int n = 0;
    for (; skip_to(&in, text); take(&in, strlen(text))) n++;
    return n;
}

// Whether a template has a token at the beginning of `in`.
static bool token_at(const Run *run, Span in) {
    if (starts_with(in, names[BOS]) || starts_with(in, names[EOS])) return true;
    for (int64_t n = min64(in.size, run->tokenizer.longest_special); n > 0; n--)
        if (*slot_of(&run->tokenizer, in.data, n, SPECIAL) >= 0) return true;
    return false;
}

// Checks one text of a template by the rule of Template.check in instruct.py. If only white space
// follows {reply}, {eos} is inserted after it.
static void check_template(const Run *run, Span *template, bool system) {
    Span rest = *template, name = *template, after;
    for (int i = SYSTEM; i <= REPLY; i++)
        if (count_of(rest, names[i]) != (i != SYSTEM || system))
            die("this model's chat template has %s for %s",
                !count_of(rest, names[i]) ? "no place"
                : i == SYSTEM && !system ? "a place" : "more than one place", names[i]);
    for (; skip_to(&name, "<|"); take(&name, 2)) {
        for (after = name, take(&after, 2); after.size && !memchr("|<>", *after.data, 3);)
            take(&after, 1);
        const int n = (int)(after.data + 2 - name.data);
        if (starts_with(after, "|>") && *slot_of(&run->tokenizer, name.data, n, SPECIAL) < 0)
            die("this model's chat template has %.*s, which is not a token", n,
                (const char *)name.data);
    }
    skip_to(&rest, names[REPLY]);
    take(&rest, strlen(names[REPLY]));
    for (after = rest; after.size && memchr(" \n\r\t", *after.data, 4);) take(&after, 1);
    if (!after.size) {
        const size_t head = (size_t)(rest.data - template->data), tail = (size_t)rest.size;
        char *text = need(malloc(head + 5 + tail));
        memcpy(text, template->data, head);
        memcpy(text + head, names[EOS], 5);
        memcpy(text + head + 5, rest.data, tail);
        *template = (Span){(const uint8_t *)text, (int64_t)(head + 5 + tail)}; // never freed
    } else if (!token_at(run, rest))
        die("this model's chat template has no token after {reply} to end it");
}

// Checks the template, or takes Llama 2's, and finds the token that ends a reply.
static void open_templates(Run *run) {
    const Turn nothing = {.user = (char[]){""}};
    Span *chat = run->model.chat;
    const bool none = !chat[0].data;
    size_t before = 0, after = 0;
    for (int i = 0; i < 3 && none; i++) { // {bos} is dropped if text does not begin with BOS
        const char *text = llama2_chat[i] + (*llama2_chat[i] && run->model.c.no_bos ? 5 : 0);
        chat[i] = (Span){(const uint8_t *)text, (int64_t)strlen(text)};
    }
    for (int i = 0; i < 3; i++)
        if (!i || chat[i].size) check_template(run, &chat[i], i == 1);
    if (run->system && !chat[1].size)
        die("this model's chat template has no place for %s", names[SYSTEM]);
    if (!chat[2].size) chat[2] = chat[0];
    free(render(run, chat[run->system != NULL], &nothing, false, NULL, &before));
    int *ids = render(run, chat[run->system != NULL], &nothing, true, NULL, &after);
    run->stop = after > before ? ids[before] : -1;
    free(ids);
}

// A conversation on the terminal. `seen` has the ids that the cache holds. Each turn renders the
// whole dialogue and computes only what differs from `seen`, also when the oldest turns were
// dropped.
static void chat(Run *run) {
    const int context = run->model.c.seq_len;
    Sampler sampler = new_sampler(run, 0);
    Turn *turn = NULL;
    const bool none = !run->model.chat[0].data;
    open_templates(run);
    state_open(&run->state, &run->model, &run->team, 1, context, MAX_ROWS);
    int *seen = NULL, n_seen = 0, first = 0, n, last = 0;
    for (;; last++) {
        turn = need(realloc(turn, sizeof *turn * (size_t)(last + 1)));
        turn[last] = (Turn){NULL, need(malloc(sizeof(int) * (size_t)context)), 0};
        if (!run->prompt) printf("User: ");
        flush();
        turn[last].user = run->prompt ? strdup(run->prompt) : read_line(stdin);
        run->prompt = NULL;
        if (!turn[last].user) break;
        if (!last && none)
            fprintf(stderr, "note: this model has no chat template: using Llama 2's\n");
        int start = first, *ids = render_all(run, turn, start, last, &n);
        for (; n >= context && start < last; ids = render_all(run, turn, ++start, last, &n))
            free(ids);
        if (!n || n >= context) {
            fprintf(stderr, "(the message has %d tokens, the context is %d: too %s)\n", n, context,
                    n ? "long" : "short");
            free(ids), free(turn[last].user), free(turn[last].reply);
            last--;
            continue;
        }
        if (start > first)
            fprintf(stderr, "(the context of %d tokens is full: forgetting the first %d turns)\n",
                    context, start);
        first = start;
        int same = 0;
        while (same < n_seen && same < n - 1 && seen[same] == ids[same]) same++;
        prefill(run, ids + same, n - same, same);
        free(seen);
        seen = need(realloc(ids, sizeof *seen * (size_t)context)), n_seen = n;
        printf("Assistant:%s", run->tokenizer.kind == 0 ? "" : " "); // tokens of the other bring it
        for (;;) {
            int id = sample_or_die(run, &sampler, run->state.logits);
            if (is_end(run, id)) break;
            if (turn[last].n_reply == run->steps) {
                fprintf(stderr, "\n(cut short: -n %d)", run->steps);
                break;
            }
            turn[last].reply[turn[last].n_reply++] = id;
            print_pieces(&run->tokenizer, &id, 0, 1, -1);
            flush();
            if (n_seen == context) {
                fprintf(stderr, "\n(the context of %d tokens is full)", context);
                break;
            }
            seen[n_seen] = id;
            forward(run, &(Row){id, n_seen++, 0}, 1, 1);
        }
        printf("\n");
    }
    for (int i = 0; i <= last; i++) free(turn[i].user), free(turn[i].reply);
    free(turn), free(seen);
    printf("\n");
}

// -log softmax(logits)[target], of logits (n,), which it overwrites.
static double cross_entropy(const Kernels *k, float *logits, int n, int target) {
    n = pad(logits, n);
    float max = k->maximum(logits, n), at_target = logits[target];
    return log(k->exps(logits, n, 1, max)) + max - at_target;
}

// The mean loss over a text file, in windows of the context's length. As in training, all documents
// are one stream of tokens, each document after BOS; <|endoftext|> separates documents. With no_bos
// the first one begins without BOS.
static void perplexity(Run *run) {
    const char *separator = "<|endoftext|>";
    const Config *c = &run->model.c;
    int *ids = NULL;
    size_t count = 0;
    if (!run->prompt) die("-m perplexity needs a text file: -i FILE");
    Span in = map_file(run->prompt);
    if (starts_with(in, "\xff\xfe") || starts_with(in, "\xfe\xff"))
        die("%s is %s", run->prompt, other_kind(in));
    if (starts_with(in, byte_order_mark)) take(&in, strlen(byte_order_mark));
    for (; in.size; take(&in, strlen(separator))) {
        const char *text = (const char *)in.data;
        while (in.size && !starts_with(in, separator)) take(&in, 1);
        const char *last = (const char *)in.data;
        while (text < last && (*text == '\n' || *text == ' ')) text++;
        while (last > text && (last[-1] == '\n' || last[-1] == ' ')) last--;
        if (last > text)
            ids = encode(&run->tokenizer, text, (size_t)(last - text), count || !c->no_bos, ids,
                         &count);
    }
    const int64_t n = (int64_t)count;
    if (n < 2) die("%s: there is nothing to predict", run->prompt);
    state_open(&run->state, &run->model, &run->team, 1, c->seq_len, MAX_ROWS);
    double loss = 0, start = seconds();
    for (int64_t i = 0, B; i + 1 < n; i += B) {
        int pos = (int)(i % c->seq_len);
        B = feed(run, ids + i, min64(n - 1 - i, c->seq_len - pos), pos, true);
        for (int b = 0; b < B; b++)
            loss += cross_entropy(run->kernels, run->state.logits + b * run->state.v_width,
                                  c->vocab_size, ids[i + b + 1]);
    }
    if (!isfinite(loss)) die(not_a_number);
    loss /= (double)(n - 1);
    printf("loss %.5f, perplexity %.4f, %lld tokens in windows of %d, %.0f tokens/s\n", loss,
           exp(loss), (long long)n - 1, c->seq_len, (double)(n - 1) / (seconds() - start));
    free(ids);
}

#define MEMORY (1 << 28) // bytes to measure the bandwidth with: more than a cache has

// Reads all of run->memory, by maximum(), which is as fast as memory.
static void read_memory(void *arg, Team *team, int thread) {
    Run *run = arg;
    const Range r = share(MEMORY / 4, 16, thread, team);
    run->kernels->maximum(run->memory + r.lo, (int)(r.hi - r.lo));
}

// The best time, over some tries, of 'm' reading memory, 'p' n ids as a prompt, or 'd' decoding n
// ids.
static double best_time(Run *run, char what, const int *ids, int n) {
    double best = 1e9, begin = seconds();
    for (int tries = 0; tries < 2 || (tries < 200 && seconds() - begin < 3); tries++) {
        double start = seconds();
        if (what == 'm') team_run(&run->team, read_memory, run);
        if (what == 'p') prefill(run, ids, n, 0);
        for (int i = 0; i < n && what == 'd'; i++) forward(run, &(Row){ids[i], i, 0}, 1, 1);
        best = fmin(best, seconds() - start);
    }
    return best;
}

// Prints the speed of decoding, of prompts and of sampling beside the bandwidth that bounds them.
static void bench(Run *run) {
    const Config *c = &run->model.c;
    int n = run->steps < c->seq_len ? run->steps : c->seq_len;
    int *ids = need(malloc(sizeof *ids * (size_t)n));
    state_open(&run->state, &run->model, &run->team, 1, n, MAX_ROWS);
    for (int i = 0; i < n; i++) ids[i] = (int)((unsigned)i * 2654435761u % (unsigned)c->vocab_size);
    run->memory = memset(zeros(MEMORY), 1, MEMORY);
    double bandwidth = MEMORY / best_time(run, 'm', NULL, 0), bytes = 0, sampling = 0;
    for (int i = 0; i < n; i++) bytes += cache_bytes(run, i + 1) + (double)run->model.bytes;
    printf("%s, weights %.1f MB, read bandwidth %.1f GB/s\n", describe_machine(run),
           (double)run->model.bytes * 1e-6, bandwidth * 1e-9);
    printf("prompt   %d tokens: %.1f tokens/s\n", n, n / best_time(run, 'p', ids, n));
    double best = best_time(run, 'd', ids, n);
    printf("decode   %d tokens: %.1f tokens/s, %.1f GB/s, %.0f %% of the bandwidth\n", n, n / best,
           bytes / best * 1e-9, 100 * bytes / best / bandwidth);
    Sampler sampler = new_sampler(run, 0);
    for (int i = 0; i < 50; i++) {
        forward(run, &(Row){ids[i % n], 0, 0}, 1, 1);
        double start = seconds();
        sample_or_die(run, &sampler, run->state.logits);
        sampling += (seconds() - start) / 50;
    }
    printf("sampling at t = %g, p = %g: %.1f us per token, %.1f %% of decoding\n", run->temperature,
           run->topp, sampling * 1e6, 100 * sampling * n / best);
    free(ids);
}

// ------------------------------------------------------------------------------------------
// The command line

#ifndef RUN_NO_MAIN // the tests include this file and have a main of their own
static const char usage[] =
    "usage: run MODEL.bin [options]\n"
    "  -i TEXT    prompt; with -m perplexity: the text file\n"
    "  -n N       maximum number of tokens, including the prompt, but not BOS; 0: the\n"
    "             model's context; default 256. With -m chat: of each reply; default 0\n"
    "  -t T       temperature; 0: always the most likely token; default 1.0\n"
    "  -k K       top-k: sample from the K most likely tokens; default 0: from all\n"
    "  -p P       top-p: sample from the smallest set of most likely tokens whose\n"
    "             probabilities exceed P; 0 or 1: from all; default 0.9\n"
    "  -s SEED    random seed; default: the time\n"
    "  -b N       number of stories to generate at once, with seeds SEED, SEED + 1, ...\n"
    "  -z FILE    tokenizer, for a model file without one\n"
    "  -m MODE    generate, chat, perplexity or bench; default generate\n"
    "  -y TEXT    system prompt of a chat\n"
    "  -j N       number of threads; default: one per core, but 1 for a model that fits a cache\n"
    "environment: RUN_ISA=portable (or AVX2, AVX-512 or NEON, if the processor has it)\n"
    "             sets the instruction set\n"
    "example: run model.bin -t 0.8 -i \"Once upon a time\"\n";

// The number that a flag's text is: decimal, without the exponents, spaces and plus signs that
// strtod accepts.
static double number(char flag, const char *text, double min, double max, bool whole) {
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || text[strspn(text, whole ? "-0123456789" : "-.0123456789")]
        || !(v >= min && v <= max))
        fail(2, "-%c %s: expected %s from %.0f to %.0f", flag, text,
             whole ? "a whole number" : "a number", min, max);
    return v;
}

static const struct {
    const char *name, *flags; // the flags that it uses
    void (*run)(Run *run);
} modes[] = {{"generate", "mjizntkpsb", generate},
             {"chat", "mjizntkpsy", chat},
             {"perplexity", "mjiz", perplexity},
             {"bench", "mjntkps", bench}};
enum { GENERATE, CHAT, PERPLEXITY, BENCH, NO_MODE };

int main(int argc, char **argv) {
    static Run run = {.temperature = 1, .topp = 0.9f, .steps = -1, .stories = 1, .stop = -1};
    const char *tokenizer = NULL, *path = argc > 1 ? argv[1] : "-h";
    int threads = 0, n_cores = count_cores(), mode = GENERATE;
    run.seed = (uint64_t)time(NULL), run.kernels = pick_kernels();
    if (!strcmp(path, "-h") || !strcmp(path, "--help")) {
        fputs(usage, stdout);
        flush();
        return argc > 1 ? 0 : 2;
    }
    for (int i = 2; i < argc; i += 2) {
        const char flag = argv[i][0] == '-' && argv[i][1] && !argv[i][2] ? argv[i][1] : 0;
        const char *value = argv[i + 1];
        if (!flag || !strchr("tkpsnizmybj", flag) || !value)
            fail(2, "%s: %s; -h lists all", argv[i],
                 argv[i][0] != '-' ? "give the model file first, and the prompt with -i"
                 : value           ? "there is no such option"
                                   : "a value is missing, or no such option");
        if (flag == 't') run.temperature = (float)number(flag, value, 0, 1e6, false);
        if (flag == 'k') run.topk = (int)number(flag, value, 0, 1e9, true);
        if (flag == 'p') run.topp = (float)number(flag, value, 0, 1, false);
        if (flag == 's') run.seed = (uint64_t)number(flag, value, 0, 1e15, true);
        if (flag == 'n') run.steps = (int)number(flag, value, 0, 1e9, true);
        if (flag == 'b') run.stories = (int)number(flag, value, 1, 1024, true);
        if (flag == 'j') threads = (int)number(flag, value, 1, 1024, true);
        if (flag == 'i') run.prompt = value;
        if (flag == 'z') tokenizer = value;
        if (flag == 'y') run.system = *value ? value : NULL;
        if (flag == 'm')
            for (mode = 0; mode < NO_MODE && strcmp(value, modes[mode].name); mode++) {}
        if (mode == NO_MODE) fail(2, "-m %s: must be generate, chat, perplexity or bench", value);
    }
    for (int i = 2; i < argc; i += 2)
        if (!strchr(modes[mode].flags, argv[i][1]))
            fail(2, "%s is not for -m %s", argv[i], modes[mode].name);
    Model *m = &run.model;
    model_open(m, map_file(path), path);
    if (tokenizer) { // llama2.c's format does not say whether spaces are squeezed
        Config c = m->c;
        c.kind = 0, c.squeeze = -1;
        const Span file = map_file(tokenizer);
        const char *kind = other_kind(file);
        if (kind && kind != a_tokenizer) die("%s is %s", tokenizer, kind);
        if (file.size >= 4 && read_u32(file.data) == MAGIC)
            die("%s is a model, not a tokenizer", tokenizer);
        tokenizer_open(&run.tokenizer, file, &c, tokenizer);
        check_same_tokenizer(m, file, tokenizer);
    } else if (m->tokenizer.size) tokenizer_open(&run.tokenizer, m->tokenizer, &m->c, path);
    else if (mode != BENCH) die("the model file has no tokenizer: give one with -z");
    const int context = m->c.seq_len;
    if (run.steps > context && mode != CHAT)
        fprintf(stderr, "note: -n %d is more than the model's context: stopping at %d\n", run.steps,
                context);
    if (run.steps < 0 && mode != CHAT) run.steps = 256;
    if (run.steps < 1 || run.steps > context) run.steps = context;
    // Sharing one token costs five barriers per layer, which some megabytes of weights are worth.
    if (!threads) threads = m->bytes < 3 << 20 && run.stories < 4 ? 1 : n_cores;
    if (threads > n_cores) {
        fprintf(stderr, "note: using %d threads, one per core\n", n_cores);
        threads = n_cores;
    }
    team_open(&run.team, threads);
    modes[mode].run(&run);
    flush();
    return 0;
}
#endif // RUN_NO_MAIN

// ------------------------------------------------------------------------------------------
// The later passes: the kernels section again, for each wider instruction set
//
// The compiler reads this file once more for each of them. The macros below give each pass names of
// its own for everything that the section defines, such as softmax_avx2.

#define LATER_PASS
#undef LANES
#undef TARGET
#undef ISA_NAME

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define MY(name) PASTE(name, ISA)

#define vf MY(vf)
#define vi MY(vi)
#define vb MY(vb)
#define v4 MY(v4)
#define floats_at MY(floats_at)
#define vmax MY(vmax)
#define lane_sum MY(lane_sum)
#define lane_max MY(lane_max)
#define dot_start MY(dot_start)
#define dot4 MY(dot4)
#define load_fp16 MY(load_fp16)
#define load_cached MY(load_cached)
#define fast_exp MY(fast_exp)
#define exp_sum MY(exp_sum)
#define exps MY(exps)
#define maximum MY(maximum)
#define above MY(above)
#define normalize MY(normalize)
#define quantize MY(quantize)
#define store_lanes MY(store_lanes)
#define tile_q8 MY(tile_q8)
#define tile_f32 MY(tile_f32)
#define product_for_group MY(product_for_group)
#define product MY(product)
#define store_heads MY(store_heads)
#define score_keys MY(score_keys)
#define softmax MY(softmax)
#define mix_values MY(mix_values)
#define attention_for_cache MY(attention_for_cache)
#define attention MY(attention)
#define swiglu MY(swiglu)
#define forward_pass MY(forward_pass)
#define kernels MY(kernels)

#if defined __x86_64__
#define ISA avx2
#define ISA_AVX2
#define ISA_NAME "AVX2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#include "run.c"
#undef ISA
#undef ISA_AVX2
#undef ISA_NAME
#undef TARGET
#undef LANES

#define ISA avx512
#define ISA_AVX512
#define ISA_NAME "AVX-512 VNNI"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#define LANES 16
#include "run.c"

#elif defined HAVE_NEON
#define ISA neon
#define ISA_NEON
#define ISA_NAME "NEON dotprod"
#ifdef __clang__
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define LANES 4
#include "run.c"
#endif

#undef MY
#define MY(name) name // from here on the names are the portable ones again

// The fastest kernels that this processor can run, or those whose name begins with RUN_ISA of the
// environment.
static const Kernels *pick_kernels(void) {
    const Kernels *able[4];
    int n = 0;
#if defined __x86_64__
    unsigned a, b, c = 0, d;
    __get_cpuid(1, &a, &b, &c, &d); // clang 14's builtin does not know f16c
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && c & bit_F16C;
    if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        able[n++] = &kernels_avx512;
    if (avx2) able[n++] = &kernels_avx2;
#elif defined HAVE_NEON && defined __linux__
    if (getauxval(AT_HWCAP) & 1 << 20) able[n++] = &kernels_neon; // HWCAP_ASIMDDP
#elif defined HAVE_NEON && defined __ARM_FEATURE_DOTPROD
    able[n++] = &kernels_neon;
#endif
    able[n++] = &kernels; // the portable ones
    const char *name = getenv("RUN_ISA");
    for (int i = 0; name && i < n; i++)
        if (!strncmp(able[i]->name, name, strlen(name))) return able[i];
    if (name)
        fail(2, "RUN_ISA=%s: on this processor it must be the beginning of %s%s%s%s%s", name,
             able[0]->name, n > 1 ? ", " : "", n > 1 ? able[1]->name : "", n > 2 ? ", " : "",
             n > 2 ? able[2]->name : "");
    return able[0];
}
#endif // LATER_PASS
