/* run.c: a Llama told by one C file: int8 (or fp32) inference on the CPU, with no dependencies.
 *
 *     cc -O3 run.c -o run -lm -pthread
 *     ./run model.bin -i "Once upon a time"
 *
 * How to read it. The file goes from the disk to the screen: the model file and its checks, the
 * threads, the state, the kernels and the forward pass, the tokenizer, the sampler, the loops
 * that generate, chat and measure, the command line.
 *
 * Where the time goes. To decode one token every weight is read once and used for one multiply
 * and one add, so a large model runs as fast as memory delivers its weights, and nothing else
 * matters; a model that fits a cache runs as fast as the arithmetic. Hence four decisions:
 *   1. Weights are int8, with one fp16 scale for every 16 to 64 of them: 1.03 to 1.13 bytes each.
 *   2. Weights lie in the file in the order in which they are used, so the file is mapped and
 *      used as it is. Sixteen rows are interleaved, four columns at a time: one vector register
 *      holds 4 columns of 16 rows, one instruction (vpdpbusd, sdot) multiplies them with 4
 *      activations, and each of the 16 lanes sums its own row. No sum across lanes, ever.
 *   3. A prompt goes through in blocks of rows, so that a weight is fetched once for many tokens;
 *      so do N stories (-b N). It is the same code: a row is a (token, position, sequence).
 *   4. All threads run the same forward pass, each on its share of every matrix's rows, and meet
 *      five times a layer. What is cheap (norms, quantization) each of them does for itself. No
 *      sum is ever split between threads, so the numbers are the same for any number of them.
 *
 * One text, several instruction sets. The kernels section is compiled once for each instruction
 * set that this compiler can target, by including this very file again; the program picks one
 * when it starts. Only dot4() and halves() know an instruction by name. Their plain C versions
 * are the specification, the fallback and the oracle of the tests. The vectors are the GNU C
 * vector extensions, so the compiler is gcc or clang (on Windows: mingw-w64).
 *
 * Files: llama2.c's version 0 (fp32) and version 2 (int8), which are repacked when loaded, and
 * version 3, which export.py writes and which is mapped. Whatever is wrong with a file is found
 * before a pointer is made from it, and is one line on stderr and exit status 1.
 *
 * Refused: -ffast-math (NaN checks depend on it), GPUs, assembly, other architectures, formats
 * with fewer bits, a server. Little-endian machines only.
 */

#ifndef ISA_LEVEL // ------ all up to the kernels is compiled once
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

// ------------------------------------------------------------------------------------------
// Errors, memory, time, files

// Formats a message and returns it. Functions that can fail return such a message, or NULL.
static const char *fail(const char *format, ...) {
    static char message[512];
    char text[sizeof message]; // since an argument may be the last message
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return memcpy(message, text, sizeof text);
}

static void die(const char *message) {
    fflush(stdout);
    fprintf(stderr, "error: %s\n", message);
    exit(1);
}

static void *need(void *block) { // for allocations that nothing hostile can enlarge
    if (!block) die("not enough memory");
    return block;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A zeroed block for tensors, in *raw, which is to be freed; returns its first whole cache line.
// The kernel's fresh pages: what is never touched is never there.
static uint8_t *new_block(void **raw, int64_t bytes) {
    *raw = calloc(1, (size_t)bytes + 64);
    return *raw ? (uint8_t *)*raw + -(uintptr_t)*raw % 64 : NULL;
}

typedef struct {
    uint8_t *data;
    int64_t size;
} File;

#ifdef _WIN32 // the whole shim: files are read instead of mapped
static const char *file_open(File *file, const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return fail("cannot open %s: %s", path, strerror(errno));
    _fseeki64(f, 0, SEEK_END);
    file->size = _ftelli64(f);
    rewind(f);
    file->data = _aligned_malloc((size_t)file->size + 1, 64);
    bool ok = file->data && fread(file->data, 1, (size_t)file->size, f) == (size_t)file->size;
    fclose(f);
    return ok ? NULL : fail("cannot read %s", path);
}
static void file_close(File *file) { _aligned_free(file->data); }
static int cores(void) {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
}
static void yield(void) { SwitchToThread(); }
#else
static const char *file_open(File *file, const char *path) {
    struct stat st;
    const char *error = NULL;
    int fd = open(path, O_RDONLY);
    if (fd < 0) return fail("cannot open %s: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) error = fail("%s is not a regular file", path);
    else if (st.st_size == 0) error = fail("%s is empty", path);
    else {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) error = fail("cannot map %s: %s", path, strerror(errno));
        else *file = (File){p, st.st_size};
    }
    close(fd);
    return error;
}
static void file_close(File *file) {
    if (file->data) munmap(file->data, (size_t)file->size);
}
static int cores(void) { // those that this process may use
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}
static void yield(void) { sched_yield(); }
#endif

// ------------------------------------------------------------------------------------------
// The model file
//
// Version 3, little-endian. A header of 256 bytes:
//      0 u32 magic "ak42" = 0x616b3432     28 i32 vocab_size (V)     56 f32 rope_theta
//      4 u32 version 3                     32 i32 max_seq_len        60 f32 norm_eps
//      8 i32 dim (D)                       36 i32 1 q8_0, 0 fp32     64 u64 tokenizer offset
//     12 i32 hidden_dim (F)                40 i32 group size (G)     72 u64 tokenizer bytes
//     16 i32 n_layers                      44 i32 tied               80 u64 file size
//     20 i32 n_heads (H)                   48 i32 bos id             88 u32 1: squeeze spaces
//     24 i32 n_kv_heads (K)                52 i32 eos id             rest zero
// then the tensors, each at the next multiple of 64 bytes, and the tokenizer in llama2.c's
// format (0 bytes if there is none):
//     tok_embeddings (V, D); for each layer: attention_norm (D), wq|wk|wv ((H+2K)E, D), wo (D, D),
//     ffn_norm (D), w1|w3 (2F, D), w2 (D, F); norm (D); output (V, D) unless tied.
// Norms are fp32. A matrix of (rows, cols) is cut into tiles of 16 rows, zero-padded at the end.
//   fp32: for each tile, for each column: 16 floats, one a row.
//   q8_0: columns zero-padded to a multiple of G. For each tile, for each 4 columns, for each of
//         the 16 rows: 4 bytes, value + 128. After all tiles, at a multiple of 64: for each tile,
//         for each group of G columns: 16 fp16 scales, one a row. weight = (byte - 128) * scale.
// wq|wk|wv are stacked row upon row; w1|w3 tile by tile: 16 rows of w1, 16 of w3, and so on, so
// that whoever computes one tile of w1 has the gate and the value of the SwiGLU side by side.

#define MAGIC 0x616b3432
#define HEADER 256
#define TILE 16 // rows of a matrix that are interleaved
#define AHEAD 8192 // bytes: prefetch across pages, at whose ends the processor's own stops

enum { FP32 = 0, Q8_0 = 1 };

typedef struct {
    int dim;        // D
    int hidden_dim; // F
    int n_layers;
    int n_heads;    // H query heads
    int n_kv_heads; // K key and value heads; H / K query heads share one
    int vocab_size; // V
    int seq_len;    // the context: positions that the model was trained for
    int format;     // FP32 or Q8_0
    int group;      // G
    int tied;       // the classifier is the token embedding
    int bos, eos;
    float rope_theta, norm_eps;
    int head_dim;   // E = D / H
    int kv_dim;     // K * E
} Config;

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
    Matrix wo;       // (D, D)
    float *ffn_norm; // (D,)
    Matrix w13;      // (2F, D), tiles of w1 and of w3 in turn
    Matrix w2;       // (D, F)
} Layer;

typedef struct {
    Config c;
    Matrix embed;  // (V, D)
    Layer *layers; // (n_layers,)
    float *norm;   // (D,)
    Matrix output; // (V, D); the embedding again if tied
    int64_t bytes; // read for one token
    const uint8_t *tokenizer; // within the file, or NULL
    int64_t tokenizer_size;
    int version, squeeze;
    File file;
    void *packed; // the repacked weights of versions 0 and 2
} Model;

static int64_t place_floats(float **p, uint8_t *base, int64_t at, int n) {
    at = round_up(at, 64);
    if (base) *p = (float *)(void *)(base + at);
    return at + 4 * (int64_t)n;
}

static int64_t place_matrix(Matrix *m, const Config *c, uint8_t *base, int64_t at, int64_t rows,
                            int cols) {
    at = round_up(at, 64);
    *m = (Matrix){.tiles = round_up(rows, TILE) / TILE,
                  .cols = c->format == FP32 ? cols : round_up(cols, c->group)};
    int64_t cells = m->tiles * TILE * m->cols;
    if (c->format == FP32) {
        if (base) m->f = (float *)(void *)(base + at);
        return at + 4 * cells;
    }
    int64_t scales = round_up(at + cells, 64);
    if (base) m->q = base + at, m->s = (uint16_t *)(void *)(base + scales);
    return scales + 2 * (cells / c->group);
}

// Walks over all tensors in file order, the first at byte `at`, and returns where they end. With
// a base it also points the model at them. Within the limits of check_config nothing overflows.
static int64_t place_tensors(Model *m, uint8_t *base, int64_t at) {
    const Config *c = &m->c;
    Layer scratch, *l = &scratch;
    int64_t start = at;
    at = place_matrix(&m->embed, c, base, at, c->vocab_size, c->dim);
    if (!c->tied) start = at; // then a token reads only one row of it
    for (int i = 0; i < c->n_layers; i++) {
        if (base) l = &m->layers[i];
        at = place_floats(&l->att_norm, base, at, c->dim);
        at = place_matrix(&l->wqkv, c, base, at, c->dim + 2 * c->kv_dim, c->dim);
        at = place_matrix(&l->wo, c, base, at, c->dim, c->dim);
        at = place_floats(&l->ffn_norm, base, at, c->dim);
        at = place_matrix(&l->w13, c, base, at, 2 * round_up(c->hidden_dim, TILE), c->dim);
        at = place_matrix(&l->w2, c, base, at, c->dim, c->hidden_dim);
    }
    at = place_floats(&m->norm, base, at, c->dim);
    if (c->tied) m->output = m->embed;
    else at = place_matrix(&m->output, c, base, at, c->vocab_size, c->dim);
    m->bytes = at - start;
    return at;
}

static int32_t read_i32(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

static float read_f32(const uint8_t *p) {
    float v;
    memcpy(&v, p, 4);
    return v;
}

static uint64_t read_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

// Every number that the forward pass depends on; derives head_dim and kv_dim.
static const char *check_config(Config *c, const char *path) {
    int last = c->vocab_size > 0 ? c->vocab_size - 1 : 0;
    const struct {
        const char *name;
        int value, min, max;
    } limits[] = {{"dim", c->dim, 1, 1 << 16},
                  {"hidden_dim", c->hidden_dim, 1, 1 << 20},
                  {"n_layers", c->n_layers, 1, 1 << 10},
                  {"n_heads", c->n_heads, 1, 1 << 14},
                  {"n_kv_heads", c->n_kv_heads, 1, 1 << 14},
                  {"vocab_size", c->vocab_size, 1, 1 << 22},
                  {"max_seq_len", c->seq_len, 1, 1 << 22},
                  {"format", c->format, FP32, Q8_0},
                  {"group size", c->group, 4, 256}, // above it 32 bits are too few for a sum
                  {"tied", c->tied, 0, 1},
                  {"BOS id", c->bos, 0, last},
                  {"EOS id", c->eos, 0, last}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].value < limits[i].min || limits[i].value > limits[i].max)
            return fail("%s: %s is %d, should be %d to %d", path, limits[i].name,
                        limits[i].value, limits[i].min, limits[i].max);
    if (c->dim % c->n_heads || c->dim / c->n_heads % 2)
        return fail("%s: dim %d is not %d heads of even size", path, c->dim, c->n_heads);
    if (c->n_heads % c->n_kv_heads)
        return fail("%s: %d heads cannot share %d key heads", path, c->n_heads, c->n_kv_heads);
    if (c->group % 4) return fail("%s: group size %d is no multiple of 4", path, c->group);
    if (!(c->rope_theta > 0 && c->rope_theta < 1e30f) || !(c->norm_eps >= 0 && c->norm_eps < 1))
        return fail("%s: rope_theta %g or norm_eps %g is absurd", path, c->rope_theta,
                    c->norm_eps);
    c->head_dim = c->dim / c->n_heads;
    c->kv_dim = c->n_kv_heads * c->head_dim;
    return NULL;
}

// fp32 -> fp16 bits, to nearest even, clamped to the largest finite. The multiplication moves
// the exponent's bias, and makes fp16's subnormals come out right.
static uint16_t to_half(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    memcpy(&x, &bits, 4);
    x = (x < 65504.0f ? x : 65504.0f) * 0x1p-112f;
    memcpy(&bits, &x, 4);
    return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

static float from_half(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, 4);
    x *= 0x1p112f;
    return h & 0x8000 ? -x : x;
}

// Writes one row of n values into a matrix of this model's format, quantizing if it is q8_0. Where
// they were quantized before, by the same groups, `scales` gives back the very same integers.
static void pack_row(const Config *c, Matrix *m, int64_t row, const float *values, int n,
                     const float *scales) {
    int64_t tile = row / TILE, lane = row % TILE, cols = m->cols, G = c->group;
    for (int i = 0; i < n && c->format == FP32; i++)
        m->f[(tile * cols + i) * TILE + lane] = values[i];
    for (int64_t g = 0; g < cols / G && c->format == Q8_0; g++) {
        float max = 0;
        for (int64_t i = g * G; i < (g + 1) * G && i < n; i++)
            if (fabsf(values[i]) > max) max = fabsf(values[i]);
        uint16_t half = to_half(scales ? scales[g] : max / 127);
        float scale = scales ? scales[g] : from_half(half);
        m->s[(tile * (cols / G) + g) * TILE + lane] = half;
        for (int64_t i = g * G; i < (g + 1) * G; i++) {
            float v = i < n && scale != 0 ? rintf(values[i] / scale) : 0;
            v = v < 127 ? v > -127 ? v : -127 : 127; // also where the scale was rounded down; NaN
            m->q[(tile * cols + i / 4 * 4) * TILE + lane * 4 + i % 4] = (uint8_t)(v + 128);
        }
    }
}

// Where versions 0 and 2 are read from: a tensor is a run of floats, or of int8 followed by one
// float scale for every `group` of them, counted over the flattened tensor.
typedef struct {
    const uint8_t *data; // NULL: only to see where it ends
    int64_t at;
    int version, group;
    bool whole;          // so far every tensor was a whole number of groups
    float *row, *scales; // one dequantized row, and its scales
} Source;

static void unpack_floats(float *out, Source *src, int64_t n) {
    if (src->data) memcpy(out, src->data + src->at, 4 * (size_t)n);
    src->at += 4 * n;
}

// Packs the next tensor of the source, of (rows, cols), into m; row r of it goes to at + r, or,
// with stride 2, into every second tile.
static void unpack_matrix(const Config *c, Matrix *m, Source *src, int rows, int cols, int at,
                          int stride) {
    const uint8_t *p = src->data ? src->data + src->at : NULL;
    int64_t total = (int64_t)rows * cols;
    bool q8 = src->version == 2, same = q8 && src->group == c->group;
    for (int64_t r = 0; r < rows && src->data; r++) {
        for (int64_t i = 0, k = r * cols; i < cols; i++, k++) {
            float scale = q8 ? read_f32(p + total + 4 * (k / src->group)) : 1;
            src->scales[i / c->group] = scale;
            src->row[i] = q8 ? (float)(int8_t)p[k] * scale : read_f32(p + 4 * k);
        }
        pack_row(c, m, at + r / TILE * TILE * stride + r % TILE, src->row, cols,
                 same ? src->scales : NULL);
    }
    src->at += q8 ? total + 4 * (total / src->group) : 4 * total;
    src->whole = src->whole && (!q8 || total % src->group == 0);
}

// Repacks a file of version 0 or 2. Both keep each kind of tensor together for all layers; the
// letters say in which order: Embedding, attention norms, q, k, v, o, ffn norms, 1, 2, 3, the last
// norm, version 0's unused RoPE tables, Classifier.
static void unpack(Model *m, Source *src) {
    const Config *c = &m->c;
    int D = c->dim, F = c->hidden_dim, kv = c->kv_dim, V = c->vocab_size;
    for (const char *kind = src->version == 0 ? "Eaqkvof123nrC" : "afnEqkvo123C"; *kind; kind++)
        for (int i = 0; i < (strchr("EnrC", *kind) ? 1 : c->n_layers); i++) {
            Layer *l = &m->layers[i];
            if (*kind == 'E') unpack_matrix(c, &m->embed, src, V, D, 0, 1);
            if (*kind == 'a') unpack_floats(l->att_norm, src, D);
            if (*kind == 'q') unpack_matrix(c, &l->wqkv, src, D, D, 0, 1);
            if (*kind == 'k') unpack_matrix(c, &l->wqkv, src, kv, D, D, 1);
            if (*kind == 'v') unpack_matrix(c, &l->wqkv, src, kv, D, D + kv, 1);
            if (*kind == 'o') unpack_matrix(c, &l->wo, src, D, D, 0, 1);
            if (*kind == 'f') unpack_floats(l->ffn_norm, src, D);
            if (*kind == '1') unpack_matrix(c, &l->w13, src, F, D, 0, 2);
            if (*kind == '2') unpack_matrix(c, &l->w2, src, D, F, 0, 1);
            if (*kind == '3') unpack_matrix(c, &l->w13, src, F, D, TILE, 2);
            if (*kind == 'n') unpack_floats(m->norm, src, D);
            if (*kind == 'r') src->at += 4 * (int64_t)c->seq_len * c->head_dim;
            if (*kind == 'C' && !c->tied) unpack_matrix(c, &m->output, src, V, D, 0, 1);
        }
}

static const char *open_old(Model *m, const char *path) {
    Config *c = &m->c;
    const uint8_t *p = m->file.data;
    int group = m->version == 2 ? read_i32(p + 37) : 32;
    if (group < 1) return fail("%s: group size %d", path, group);
    if (m->version == 0) { // llama2.c marks a classifier of its own by a negative V
        c->tied = c->vocab_size > 0;
        if (c->vocab_size < 0 && c->vocab_size > -(1 << 30)) c->vocab_size = -c->vocab_size;
    } else c->tied = p[36] != 0;
    c->format = m->version == 0 ? FP32 : Q8_0;
    // A group that straddles rows (the hidden size is no multiple of it) is dequantized as it
    // was meant, and quantized again by 32.
    bool fits = group % 4 == 0 && group <= 256 && c->dim % group == 0 && c->hidden_dim % group == 0;
    c->group = fits ? group : 32;
    c->bos = 1, c->eos = 2;
    c->rope_theta = 10000, c->norm_eps = 1e-5f;
    const char *error = check_config(c, path);
    if (error) return error;
    Source src = {.at = m->version == 0 ? 28 : HEADER, .version = m->version, .group = group,
                  .whole = true};
    int64_t start = src.at, widest = c->dim > c->hidden_dim ? c->dim : c->hidden_dim;
    m->layers = calloc((size_t)c->n_layers, sizeof *m->layers);
    if (!m->layers) return fail("%s: not enough memory", path);
    unpack(m, &src);
    if (!src.whole) return fail("%s: group size %d divides no tensor", path, group);
    if (m->file.size != src.at)
        return fail("%s: %lld bytes long, its header says %lld", path, (long long)m->file.size,
                    (long long)src.at);
    src.at = start, src.data = p;
    src.row = malloc(2 * sizeof(float) * (size_t)widest);
    uint8_t *base = new_block(&m->packed, place_tensors(m, NULL, 0));
    if (src.row && base) {
        src.scales = src.row + widest;
        place_tensors(m, base, 0);
        unpack(m, &src);
    } else error = fail("%s: not enough memory", path);
    free(src.row);
    return error;
}

static const char *open_v3(Model *m, const char *path) {
    Config *c = &m->c;
    const uint8_t *p = m->file.data;
    c->format = read_i32(p + 36), c->group = read_i32(p + 40), c->tied = read_i32(p + 44);
    c->bos = read_i32(p + 48), c->eos = read_i32(p + 52);
    c->rope_theta = read_f32(p + 56), c->norm_eps = read_f32(p + 60);
    m->squeeze = read_i32(p + 88) == 1;
    const char *error = check_config(c, path);
    if (error) return error;
    uint64_t offset = read_u64(p + 64), length = read_u64(p + 72), size = (uint64_t)m->file.size;
    if (read_u64(p + 80) != size)
        return fail("%s: %llu bytes long, its header says %llu", path, (unsigned long long)size,
                    (unsigned long long)read_u64(p + 80));
    int64_t end = place_tensors(m, NULL, HEADER);
    if (offset > size || offset < (uint64_t)end || length != size - offset)
        return fail("%s: the tensors end at byte %lld, the file at %llu", path, (long long)end,
                    (unsigned long long)size);
    m->layers = calloc((size_t)c->n_layers, sizeof *m->layers);
    if (!m->layers) return fail("%s: not enough memory", path);
    place_tensors(m, m->file.data, HEADER);
    if (length) m->tokenizer = p + offset, m->tokenizer_size = (int64_t)length;
    return NULL;
}

static void model_close(Model *m) {
    free(m->layers);
    free(m->packed);
    file_close(&m->file);
    memset(m, 0, sizeof *m);
}

// Makes a model of the file that m->file holds: version 0, 2 or 3.
static const char *model_parse(Model *m, const char *path) {
    const uint8_t *p = m->file.data;
    bool magic = m->file.size >= 4 && read_i32(p) == MAGIC;
    m->version = magic && m->file.size >= 8 ? read_i32(p + 4) : 0;
    if (m->file.size < (magic ? HEADER : 28)) return fail("%s is too short for a model", path);
    if (m->version != 0 && m->version != 2 && m->version != 3)
        return fail("%s: version %d, this program reads 0, 2 and 3", path, m->version);
    const uint8_t *h = magic ? p + 8 : p;
    m->c = (Config){.dim = read_i32(h), .hidden_dim = read_i32(h + 4),
                    .n_layers = read_i32(h + 8), .n_heads = read_i32(h + 12),
                    .n_kv_heads = read_i32(h + 16), .vocab_size = read_i32(h + 20),
                    .seq_len = read_i32(h + 24)};
    return m->version == 3 ? open_v3(m, path) : open_old(m, path);
}

static const char *model_open(Model *m, const char *path) { // on error it is closed again
    memset(m, 0, sizeof *m);
    const char *error = file_open(&m->file, path);
    if (!error) error = model_parse(m, path);
    if (error) model_close(m);
    return error;
}

// ------------------------------------------------------------------------------------------
// Threads: a team that runs one function together, and a barrier within it
//
// Members spin for the microseconds between two steps, and yield when it takes longer (another
// process may have the core); between calls they go to sleep.

typedef struct Team Team;
typedef void Work(void *arg, Team *team, int thread);

typedef struct {
    Team *team;
    int index;
    pthread_t thread;
} Member;

struct Team {
    int n;                // threads, the caller among them
    bool pinned;          // each to a core of its own
#ifdef __linux__
    cpu_set_t cores;
#endif
    Member *members;      // (n,), the first is the caller
    atomic_int arrived;   // at the barrier
    atomic_uint phase;    // how often the barrier has opened
    atomic_uint calls;    // how often team_run was called
    atomic_int sleepers;
    atomic_bool over;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    Work *work;
    void *arg;
};

static void pause_core(int spin) {
    if (spin > 2000) yield();
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// Returns when all n threads of the team have called it.
static void barrier(Team *t) {
    if (t->n == 1) return;
    unsigned phase = atomic_load_explicit(&t->phase, memory_order_acquire);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) == t->n - 1) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spin = 0; atomic_load_explicit(&t->phase, memory_order_acquire) == phase; spin++)
        pause_core(spin);
}

// On Linux, binds the calling thread to the index-th core of the team's, with -1 to all of them:
// two members on one core, where a busy machine likes to leave them, would wait for each other.
static void pin(const Team *t, int index) {
#ifdef __linux__
    cpu_set_t set = t->cores;
    for (int cpu = 0, i = 0; cpu < CPU_SETSIZE && index >= 0; cpu++)
        if (CPU_ISSET(cpu, &t->cores) && i++ != index) CPU_CLR(cpu, &set);
    if (t->pinned) sched_setaffinity(0, sizeof set, &set);
#else
    (void)t, (void)index;
#endif
}

static void *member_main(void *arg) {
    Member *me = arg;
    Team *t = me->team;
    pin(t, me->index);
    for (unsigned seen = 0;; seen++) {
        for (int spin = 0; atomic_load(&t->calls) == seen && spin < 4000; spin++) pause_core(0);
        pthread_mutex_lock(&t->lock);
        atomic_fetch_add(&t->sleepers, 1);
        while (atomic_load(&t->calls) == seen) pthread_cond_wait(&t->wake, &t->lock);
        atomic_fetch_sub(&t->sleepers, 1);
        pthread_mutex_unlock(&t->lock);
        if (atomic_load(&t->over)) return NULL;
        t->work(t->arg, t, me->index);
        barrier(t);
    }
}

// Calls work(arg, team, 0 .. n-1), each in its own thread, and returns when all have returned.
static void team_run(Team *t, Work *work, void *arg) {
    t->work = work;
    t->arg = arg;
    atomic_fetch_add(&t->calls, 1);
    if (atomic_load(&t->sleepers)) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->lock);
    }
    if (work) work(arg, t, 0);
    if (work) barrier(t);
}

static void team_close(Team *t) {
    atomic_store(&t->over, true);
    team_run(t, NULL, NULL);
    for (int i = 1; i < t->n; i++) pthread_join(t->members[i].thread, NULL);
    pin(t, -1);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->wake);
    free(t->members);
}

// Starts n - 1 threads; fewer where the system gives no more.
static void team_open(Team *t, int n) {
    memset(t, 0, sizeof *t);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->members = need(calloc((size_t)n, sizeof *t->members));
#ifdef __linux__
    t->pinned = n > 1 && n == cores() && !sched_getaffinity(0, sizeof t->cores, &t->cores);
#endif
    int made = 1;
    for (; made < n; made++) {
        t->members[made] = (Member){.team = t, .index = made};
        if (pthread_create(&t->members[made].thread, NULL, member_main, &t->members[made])) break;
    }
    t->n = made;
    pin(t, 0);
}

// The share of thread `thread` of `n` things: from lo to hi.
static void share(int64_t n, int thread, const Team *t, int64_t *lo, int64_t *hi) {
    *lo = n * thread / t->n;
    *hi = n * (thread + 1) / t->n;
}

// ------------------------------------------------------------------------------------------
// The state of a run: the rows of one forward pass, their activations, the KV cache

#define MAX_ROWS 64 // of a prompt that go through the model together
#define AT_ONCE 4   // heads whose attention is computed together

typedef struct {
    int token;
    int pos;   // in its sequence
    int seq;   // which sequence's cache
    int wants; // whether its logits are wanted
} Row;

// The input of a matrix product: B rows, as floats, or quantized by groups of G to 15 bits, in two
// int8 digits: f is close to s * (128 * high + low). The second digit costs no memory traffic,
// which is what decoding waits for, and leaves the weights as the only source of int8's error.
typedef struct {
    const float *f;     // (B, ld) normalized, or what was given
    int64_t ld;
    float *own;         // (B, width) where it is normalized to
    int8_t *high, *low; // (B, width)
    float *s;           // (B, width / 4), the first cols / G used
    int32_t *bias;      // likewise: -128 * sum of the group, takes back the weights' + 128
    int64_t width;
} Input;

typedef struct {
    const Model *m;
    Team *team;
    int max_rows, max_pos, n_seq;
    int B;              // rows of this pass
    const Row *row;     // (B,)
    int n_logits;       // rows that want logits
    int *wanted;        // (n_logits,) which
    // Activations. Each row is padded with zeros to a whole number of tiles and groups.
    float *x;           // (B, d_width) the residual stream
    float *qkv;         // (B, qkv_width) queries, keys, values
    float *att;         // (B, d_width) what attention returns
    float *h13;         // (B, h13_width) tiles of w1 x and of w3 x in turn
    float *h;           // (B, h_width) silu(w1 x) * w3 x
    float *logits;      // (n_logits, v_width)
    int64_t d_width, qkv_width, h13_width, h_width, v_width;
    Input *in;          // (threads,) each thread prepares its own
    float *scores;      // (threads, AT_ONCE, max_pos)
    float *rope;        // (max_pos, E / 2, 2) cos and sin
    // KV cache, in tiles of 16 positions, so that 16 scores are computed side by side. fp16 when
    // the weights are int8, fp32 when they are fp32.
    uint8_t *keys, *values; // (seq, layer, K, T / 16, E, 16)
    int half;           // the cache is fp16
    int64_t head_bytes; // of one head's keys, or values
    int64_t T;          // max_pos rounded up to 16
    void *block;        // all of the above
} State;

// Takes the next `bytes` of a block; where there is no block yet, only counts.
static void *take(uint8_t *base, int64_t *at, int64_t bytes) {
    void *p = base ? base + *at : NULL;
    *at += round_up(bytes, 64);
    return p;
}

static int64_t place_state(State *s, uint8_t *base) {
    const Config *c = &s->m->c;
    int64_t at = 0, B = s->max_rows, heads = (int64_t)s->n_seq * c->n_layers * c->n_kv_heads;
    int64_t widest = (s->d_width > s->h_width ? s->d_width : s->h_width) + 256;
    s->wanted = take(base, &at, B * (int64_t)sizeof *s->wanted);
    s->x = take(base, &at, 4 * B * s->d_width);
    s->qkv = take(base, &at, 4 * B * s->qkv_width);
    s->att = take(base, &at, 4 * B * s->d_width);
    s->h13 = take(base, &at, 4 * B * s->h13_width);
    s->h = take(base, &at, 4 * B * s->h_width);
    s->logits = take(base, &at, 4 * B * s->v_width);
    s->rope = take(base, &at, 4 * s->T * c->head_dim);
    s->scores = take(base, &at, 4 * s->team->n * AT_ONCE * s->T);
    s->keys = take(base, &at, heads * s->head_bytes);
    s->values = take(base, &at, heads * s->head_bytes);
    s->in = take(base, &at, s->team->n * (int64_t)sizeof *s->in);
    for (int i = 0; i < s->team->n; i++) {
        Input in = {.width = widest};
        in.own = take(base, &at, 4 * B * widest);
        in.high = take(base, &at, B * widest);
        in.low = take(base, &at, B * widest);
        in.s = take(base, &at, B * widest); // G is at least 4
        in.bias = take(base, &at, B * widest);
        if (base) s->in[i] = in;
    }
    return at;
}

// Prepares for n_seq sequences of up to max_pos positions, in passes of up to max_rows rows.
static const char *state_open(State *s, const Model *m, Team *team, int n_seq, int max_pos,
                              int max_rows) {
    const Config *c = &m->c;
    *s = (State){.m = m, .team = team, .n_seq = n_seq, .max_pos = max_pos, .max_rows = max_rows};
    s->half = c->format == Q8_0;
    s->T = round_up(max_pos, 16);
    s->head_bytes = s->T * c->head_dim * (s->half ? 2 : 4);
    s->d_width = round_up(c->dim + c->group, TILE);
    s->qkv_width = round_up(c->dim + 2 * c->kv_dim, TILE);
    s->h_width = round_up(c->hidden_dim + c->group, TILE);
    s->h13_width = 2 * round_up(c->hidden_dim, TILE);
    s->v_width = round_up(c->vocab_size, TILE);
    int64_t bytes = place_state(s, NULL);
    uint8_t *base = new_block(&s->block, bytes);
    if (!base) return fail("not enough memory for %d sequences of %d tokens", n_seq, max_pos);
    place_state(s, base);
    for (int pos = 0; pos < max_pos; pos++)
        for (int i = 0; i < c->head_dim; i += 2) {
            double angle = pos * pow(c->rope_theta, -(double)i / c->head_dim);
            s->rope[(int64_t)pos * c->head_dim + i] = (float)cos(angle);
            s->rope[(int64_t)pos * c->head_dim + i + 1] = (float)sin(angle);
        }
    return NULL;
}

typedef struct {
    const char *name;
    Work *forward; // arg is the State
    float (*exps)(float *x, int n, float scale, float shift);
    float (*above)(const float *x, int n, float least);
    float (*maximum)(const float *x, int n);
} Kernels;
#endif // ISA_LEVEL

// ------------------------------------------------------------------------------------------
// Kernels and forward pass, compiled once for each instruction set

#ifdef ISA_LEVEL
#if ISA_LEVEL == 0
#define ISA portable
#define ISA_NAME "portable C"
#define LANES 4 // 32-bit numbers in a register
#elif ISA_LEVEL == 1
#define ISA avx2
#define ISA_NAME "AVX2"
#define LANES 8
#elif ISA_LEVEL == 2
#define ISA avx512
#define ISA_NAME "AVX-512 VNNI"
#define LANES 16
#else
#define ISA neon
#define ISA_NAME "NEON dotprod"
#define LANES 4
#endif
#define PARTS (TILE / LANES) // registers for 16 lanes
#define BLOCK (LANES == 16 ? 8 : 2) // rows of input that share one pass over a tile
#define INLINE static inline __attribute__((always_inline))

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define MY(name) PASTE(name##_, ISA) // a name of this instruction set's own
#define vf MY(vf)
#define vi MY(vi)
#define vb MY(vb)
#define v4 MY(v4)
#define load MY(load)
#define store MY(store)
#define fill MY(fill)
#define pick MY(pick)
#define larger MY(larger)
#define sum MY(sum)
#define largest MY(largest)
#define dot_start MY(dot_start)
#define dot4 MY(dot4)
#define halves MY(halves)
#define cached MY(cached)
#define fast_exp MY(fast_exp)
#define normalize MY(normalize)
#define quantize_group MY(quantize_group)
#define quantize MY(quantize)
#define tile_q8 MY(tile_q8)
#define tile_f32 MY(tile_f32)
#define matmul MY(matmul)
#define prepare MY(prepare)
#define embed_row MY(embed_row)
#define store_heads MY(store_heads)
#define score MY(score)
#define softmax MY(softmax)
#define mix MY(mix)
#define attention MY(attention)
#define swiglu MY(swiglu)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));
typedef float v4 __attribute__((vector_size(16)));

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf fill(float x) { return x - (vf){0}; }

INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf larger(vf a, vf b) { return pick(a > b, a, b); } // b where either is NaN

INLINE float sum(vf v) { // of the lanes, folded to four, then to one
    v4 q[LANES / 4];
    memcpy(q, &v, sizeof v);
    for (int n = LANES / 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) q[i] += q[i + n];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

INLINE float largest(vf v) {
    float x[LANES];
    memcpy(x, &v, sizeof v);
    float q[4] = {x[0], x[1], x[2], x[3]};
    for (int i = 4; i < LANES; i++) q[i % 4] = q[i % 4] > x[i] ? q[i % 4] : x[i];
    for (int i = 1; i < 4; i++) q[0] = q[0] > q[i] ? q[0] : q[i];
    return q[0];
}

// The multiply-accumulate of int8, for LANES rows: acc[r] += sum over k < 4 of w[r][k] * x[k],
// with w stored as w + 128. dot_start gives the accumulator to begin a group with: vpdpbusd wants
// one operand unsigned, so there the + 128 stays in, and bias = -128 * (sum of x) takes it out.
INLINE vi dot_start(int32_t bias) { return (ISA_LEVEL == 2 ? bias : 0) - (vi){0}; }

INLINE vi dot4(vi acc, const uint8_t *w, const int8_t *x) {
#if ISA_LEVEL == 0 // the specification
    for (int r = 0; r < LANES; r++)
        for (int k = 0; k < 4; k++) acc[r] += (w[4 * r + k] - 128) * x[k];
    return acc;
#else
    int32_t x4;
    memcpy(&x4, x, 4);
#if ISA_LEVEL == 1 // |x| * (w with the sign of x) stays within 16 bits, twice 128 * 127
    __m256i xs = _mm256_set1_epi32(x4);
    __m256i ws = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(const void *)w),
                                  _mm256_set1_epi8((char)-128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(xs), _mm256_sign_epi8(ws, xs));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif ISA_LEVEL == 2
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(w), _mm512_set1_epi32(x4));
#else
    int8x16_t ws = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), vdupq_n_u8(128)));
    return (vi)vdotq_s32((int32x4_t)acc, ws, vreinterpretq_s8_s32(vdupq_n_s32(x4)));
#endif
#endif
}

INLINE vf halves(const uint16_t *p) { // LANES fp16 numbers as floats
#if ISA_LEVEL == 0
    vf v = {0};
    for (int i = 0; i < LANES; i++) v[i] = from_half(p[i]);
    return v;
#elif ISA_LEVEL == 1
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
#elif ISA_LEVEL == 2
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
#else
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}

INLINE vf cached(const void *p, int64_t i, int half) { // LANES numbers of a KV cache
    return half ? halves((const uint16_t *)p + i) : load((const float *)p + i);
}

// exp, to 2 ulp: 2^n * e^r with |r| <= ln(2) / 2, e^r by a polynomial (Cephes). NaN stays NaN.
INLINE vf fast_exp(vf x) {
    x = larger(fill(-87.0f), x);
    x = -larger(fill(-88.0f), -x);
    vf n = x * 1.44269504f + 12582912.0f; // + 1.5 * 2^23: to the nearest integer
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

// x = exp((x - shift) * scale), but 0 where x is NaN; returns the sum. Four at a time, since one
// exp is a long chain of steps that wait for each other.
static float MY(exps)(float *x, int n, float scale, float shift) {
    vf total[4], v[4];
    for (int j = 0; j < 4; j++) total[j] = v[j] = (vf){0};
    for (int i = 0; i < n; i += 4 * LANES) {
        size_t bytes = sizeof(float) * (size_t)(n - i < 4 * LANES ? n - i : 4 * LANES);
        if (bytes == sizeof v) memcpy(v, x + i, sizeof v);
        else memset(v, 255, sizeof v), memcpy(v, x + i, bytes); // the rest is NaN
        for (int j = 0; j < 4; j++) {
            vf e = fast_exp((v[j] - shift) * scale);
            v[j] = pick(v[j] == v[j], e, (vf){0});
            total[j] += v[j];
        }
        if (bytes == sizeof v) memcpy(x + i, v, sizeof v);
        else memcpy(x + i, v, bytes);
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

static float MY(maximum)(const float *x, int n) { // -inf for none, NaNs are skipped
    vf m = fill(-INFINITY);
    int i = 0;
    for (; i + LANES <= n; i += LANES) m = larger(load(x + i), m);
    float best = largest(m);
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

static float MY(above)(const float *x, int n, float least) { // the sum of those that are larger
    vf s[4];
    int i = 0;
    for (int j = 0; j < 4; j++) s[j] = (vf){0};
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            vf v = load(x + i + j * LANES);
            s[j] += pick(v > least, v, (vf){0});
        }
    float total = sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) total += x[i] > least ? x[i] : 0;
    return total;
}

// in.own[b] = x[b] * weight / rms(x[b]), of row which[b] of x where `which` is given. x (B, ld),
// weight (n,).
static void normalize(const Input *in, const float *x, int64_t ld, const int *which, int B,
                      const float *weight, int n, float eps) {
    for (int b = 0; b < B; b++) {
        const float *from = x + (which ? which[b] : b) * ld;
        float *to = in->own + b * in->width;
        vf s0 = {0}, s1 = {0};
        int i = 0;
        for (; i + 2 * LANES <= n; i += 2 * LANES) {
            vf v0 = load(from + i), v1 = load(from + i + LANES);
            s0 += v0 * v0, s1 += v1 * v1;
        }
        float squares = sum(s0 + s1);
        for (; i < n; i++) squares += from[i] * from[i];
        float scale = 1.0f / sqrtf(squares / (float)n + eps);
        for (i = 0; i < n; i++) to[i] = weight[i] * (scale * from[i]);
    }
}

// Quantizes one group of G floats: 128 * high + low = round(x / s), s = max|x| / (127 * 128).
// The maximum is taken over the bits as integers: non-negative floats order alike, and a NaN wins
// and makes the scale NaN instead of vanishing.
INLINE void quantize_group(const float *x, int G, int8_t *high, int8_t *low, float *s,
                           int32_t *bias) {
    vi top = {0}, total = {0};
    int32_t lane[LANES];
    float max;
    for (int i = 0; i < G; i += LANES) {
        vi bits = {0};
        memcpy(&bits, x + i, 4 * (size_t)(G - i < LANES ? G - i : LANES));
        bits &= 0x7fffffff;
        vi more = bits > top;
        top = (bits & more) | (top & ~more);
    }
    memcpy(lane, &top, sizeof top);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
    memcpy(&max, lane, 4);
    *s = max / 16256.0f;
    float inverse = max > 1e-30f && max < INFINITY ? 16256.0f / max : 0.0f; // else s tells
    for (int i = 0; i < G; i += LANES) {
        size_t count = (size_t)(G - i < LANES ? G - i : LANES);
        vf v = {0};
        if (inverse != 0) memcpy(&v, x + i, 4 * count);
        vi q = (vi)(v * inverse + 12582912.0f) - 0x4b400000; // + 1.5 * 2^23: to the nearest
        vi digit = (q + 64) >> 7;
        vb high_bytes = __builtin_convertvector(digit, vb);
        vb low_bytes = __builtin_convertvector(q - 128 * digit, vb);
        memcpy(high + i, &high_bytes, count);
        memcpy(low + i, &low_bytes, count);
        total += q;
    }
    memcpy(lane, &total, sizeof total);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    *bias = -128 * lane[0];
}

// Quantizes in.f (B, cols); what is beyond a row's end is zero there.
static void quantize(const Input *in, int B, int64_t cols, int G) {
    for (int b = 0; b < B; b++) {
        const float *x = in->f + b * in->ld;
        int8_t *high = in->high + b * in->width, *low = in->low + b * in->width;
        float *s = in->s + b * (in->width / 4);
        int32_t *bias = in->bias + b * (in->width / 4);
        for (int64_t i = 0; i < cols; i += G, s++, bias++)
            if (G == 64) quantize_group(x + i, 64, high + i, low + i, s, bias);
            else if (G == 32) quantize_group(x + i, 32, high + i, low + i, s, bias);
            else if (G == 16) quantize_group(x + i, 16, high + i, low + i, s, bias);
            else quantize_group(x + i, G, high + i, low + i, s, bias);
    }
}

// One tile of a q8_0 matrix times nb rows of the input, starting at row b0:
// out (nb, ld), 16 columns of it, = (or += if add) in (nb, cols) @ tile (16, cols)^T.
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
            vf ws = halves(scale);
            for (int b = 0; b < nb; b++)
                total[b][j] += __builtin_convertvector(hi[b][j] * 128 + lo[b][j], vf)
                               * (ws * xs[b * (width / 4) + g]);
        }
    }
    for (int b = 0; b < nb; b++)
        for (int j = 0; j < PARTS; j++) {
            float *to = out + (b0 + b) * ld + tile * TILE + j * LANES;
            store(to, add ? load(to) + total[b][j] : total[b][j]);
        }
}

// The same for an fp32 matrix. Four partial sums, so that additions need not wait for each other.
INLINE void tile_f32(float *out, int64_t ld, bool add, const Matrix *w, int64_t tile,
                     const Input *in, int b0, const int nb) {
    const float *x = in->f + b0 * in->ld;
    for (int j = 0; j < PARTS; j++) {
        const float *f = w->f + tile * TILE * w->cols + j * LANES;
        vf part[BLOCK][4];
        for (int b = 0; b < nb; b++)
            for (int k = 0; k < 4; k++) part[b][k] = (vf){0};
        int64_t i = 0;
        for (; i + 4 <= w->cols; i += 4)
            for (int k = 0; k < 4; k++, f += TILE)
                for (int b = 0; b < nb; b++) part[b][k] += load(f) * x[b * in->ld + i + k];
        for (; i < w->cols; i++, f += TILE)
            for (int b = 0; b < nb; b++) part[b][0] += load(f) * x[b * in->ld + i];
        for (int b = 0; b < nb; b++) {
            float *to = out + (b0 + b) * ld + tile * TILE + j * LANES;
            vf total = (part[b][0] + part[b][1]) + (part[b][2] + part[b][3]);
            store(to, add ? load(to) + total : total);
        }
    }
}

// out (B, ld)[:, rows of tiles lo to hi] = (or += if add) in (B, cols) @ w (rows, cols)^T
static void matmul(float *out, int64_t ld, bool add, const Matrix *w, int64_t lo, int64_t hi,
                   int G, const Input *in, int B) {
    enum { HALF = BLOCK / 2 };
    for (int64_t t = lo; t < hi; t++) {
        int b = 0;
        for (; b + HALF <= B && w->f; b += HALF) tile_f32(out, ld, add, w, t, in, b, HALF);
        for (; b < B && w->f; b++) tile_f32(out, ld, add, w, t, in, b, 1);
        for (; b + BLOCK <= B && G == 64; b += BLOCK) tile_q8(out, ld, add, w, t, 64, in, b, BLOCK);
        for (; b + BLOCK <= B && G == 32; b += BLOCK) tile_q8(out, ld, add, w, t, 32, in, b, BLOCK);
        for (; b + BLOCK <= B && G == 16; b += BLOCK) tile_q8(out, ld, add, w, t, 16, in, b, BLOCK);
        for (; b < B && G == 64; b++) tile_q8(out, ld, add, w, t, 64, in, b, 1);
        for (; b < B && G == 32; b++) tile_q8(out, ld, add, w, t, 32, in, b, 1);
        for (; b < B && G == 16; b++) tile_q8(out, ld, add, w, t, 16, in, b, 1);
        for (; b < B; b++) tile_q8(out, ld, add, w, t, G, in, b, 1);
    }
}

// Makes this thread's input of the next product: RMSNorm if there is a weight, int8 if q8_0.
static void prepare(State *s, Input *in, const float *x, int64_t ld, const int *which, int B,
                    const float *weight, const Matrix *w) {
    if (weight) normalize(in, x, ld, which, B, weight, s->m->c.dim, s->m->c.norm_eps);
    in->f = weight ? in->own : x;
    in->ld = weight ? in->width : ld;
    if (!w->f) quantize(in, B, w->cols, s->m->c.group);
}

static void embed_row(float *x, const Matrix *w, int token, int D, int G) { // x (D,)
    int64_t tile = token / TILE, lane = token % TILE, cols = w->cols;
    for (int64_t i = 0; i < D; i++)
        x[i] = w->f ? w->f[(tile * cols + i) * TILE + lane]
                    : (float)(w->q[(tile * cols + i / 4 * 4) * TILE + lane * 4 + i % 4] - 128)
                          * from_half(w->s[(tile * (cols / G) + i / G) * TILE + lane]);
}

// Of the H + K + K heads of qkv those from lo to hi: rotates queries and keys, pair by pair, by
// the angle of their position (RoFormer, eq. 34), scales queries, caches keys and values.
static void store_heads(State *s, int layer, int64_t lo, int64_t hi) {
    const Config *c = &s->m->c;
    const int H = c->n_heads, K = c->n_kv_heads, E = c->head_dim;
    for (int b = 0; b < s->B; b++) {
        const int64_t pos = s->row[b].pos, seq = s->row[b].seq;
        const float *rope = s->rope + pos * E;
        for (int64_t h = lo; h < hi; h++) {
            float *v = s->qkv + b * s->qkv_width + h * E;
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

// scores[t] = q . keys[t], for t < n rounded up to 16. q (E,) scaled, keys (T / 16, E, 16), E even.
INLINE void score(float *scores, const float *q, const void *keys, int n, int E, int half) {
    for (int64_t t = 0; t < n; t += 16)
        for (int j = 0; j < 16; j += LANES) {
            vf s0 = {0}, s1 = {0};
            int64_t k = t * E + j;
            for (int e = 0; e < E; e += 2, k += 32) {
                s0 += q[e] * cached(keys, k, half);
                s1 += q[e + 1] * cached(keys, k + 16, half);
            }
            store(scores + t + j, s0 + s1);
        }
}

// scores = exp(scores - their maximum), 0 from n up to a multiple of 16; returns the sum.
static float softmax(float *scores, int n) {
    vf top = fill(-INFINITY), total = {0};
    vi index = {0};
    for (int i = 0; i < LANES; i++) index[i] = i;
    for (int t = 0; t < n; t += LANES) { // what is beyond n in the last tile must not count
        vf v = pick(index < n - t, load(scores + t), fill(-INFINITY));
        top = larger(v, top);
    }
    top = fill(largest(top));
    for (int t = 0; t < round_up(n, 16); t += LANES) {
        vf v = pick(index < n - t, fast_exp(load(scores + t) - top), (vf){0});
        store(scores + t, v);
        total += v;
    }
    return sum(total);
}

// out[e] = sum over t < n of weight[t] * values[e][t] / total, for nb dimensions of a head from e;
// values (T / 16, E, 16).
INLINE void mix(float *out, const float *weight, float total, const void *values, int n, int E,
                int e, int half, const int nb) {
    vf acc[8]; // set by a loop, since gcc clears an initialized array by a slow string move
    for (int i = 0; i < nb; i++) acc[i] = (vf){0};
    int64_t from = 16 * (int64_t)e;
    for (int t = 0; t < n; t += 16, from += 16 * (int64_t)E)
        for (int j = 0; j < 16; j += LANES) {
            vf w = load(weight + t + j);
            for (int i = 0; i < nb; i++) acc[i] += w * cached(values, from + 16 * i + j, half);
        }
    float scale = 1.0f / total;
    for (int i = 0; i < nb; i++) out[e + i] = sum(acc[i]) * scale;
}

// Attention of the items lo to hi of the H * B (head, row) pairs: att = softmax(q . keys) @ values.
// A few at a time, step by step, so that the processor has independent work while it waits.
static void attention(State *s, int layer, int64_t lo, int64_t hi, float *scores) {
    const Config *c = &s->m->c;
    const int E = c->head_dim, B = s->B;
    struct {
        float *out, *scores, total;
        const float *q;
        const uint8_t *k, *v;
        int n;
    } item[AT_ONCE], *it;
    for (; lo < hi; lo += AT_ONCE) {
        int count = hi - lo < AT_ONCE ? (int)(hi - lo) : AT_ONCE;
        for (it = item; it < item + count; it++) {
            int64_t h = (lo + (it - item)) / B, b = (lo + (it - item)) % B, seq = s->row[b].seq;
            int64_t head = (seq * c->n_layers + layer) * c->n_kv_heads
                           + h / (c->n_heads / c->n_kv_heads);
            it->out = s->att + b * s->d_width + h * E;
            it->q = s->qkv + b * s->qkv_width + h * E;
            it->k = s->keys + head * s->head_bytes;
            it->v = s->values + head * s->head_bytes;
            it->n = s->row[b].pos + 1;
            it->scores = scores + (it - item) * s->T;
            if (!s->half) score(it->scores, it->q, it->k, it->n, E, 0);
            else if (E == 8) score(it->scores, it->q, it->k, it->n, 8, 1);
            else score(it->scores, it->q, it->k, it->n, E, 1);
        }
        for (it = item; it < item + count; it++) it->total = softmax(it->scores, it->n);
        for (it = item; it < item + count; it++)
            for (int e = 0, nb; e < E; e += nb) {
                nb = E - e >= 8 && s->half ? 8 : 1;
                if (nb == 8) mix(it->out, it->scores, it->total, it->v, it->n, E, e, 1, 8);
                else mix(it->out, it->scores, it->total, it->v, it->n, E, e, s->half, 1);
            }
    }
}

// h (B, F) = silu(w1 x) * w3 x, for the tiles of w1 from lo to hi.
static void swiglu(State *s, int64_t lo, int64_t hi) {
    for (int b = 0; b < s->B; b++)
        for (int64_t i = lo * TILE; i < hi * TILE; i += LANES) {
            const float *gate = s->h13 + b * s->h13_width + i / TILE * TILE + i;
            vf v = load(gate);
            store(s->h + b * s->h_width + i, v / (1.0f + fast_exp(-v)) * load(gate + TILE));
        }
}

// The forward pass: B rows through the model, by all threads of the team together. After it the
// keys and values of the rows are in the cache and s->logits has the logits of those that want
// them. Rows of one sequence must be in order of position.
static void MY(forward)(void *arg, Team *team, int thread) {
    State *s = arg;
    const Model *m = s->m;
    const Config *c = &m->c;
    const int B = s->B, E = c->head_dim, G = c->group, heads = c->n_heads + 2 * c->n_kv_heads;
    Input *in = &s->in[thread];
    float *scores = s->scores + thread * AT_ONCE * s->T;
    int64_t lo, hi;
    // Queries, keys and values are shared out in units of whole heads and whole tiles, so that
    // who computes a head can also rotate and cache it.
    int64_t unit = E;
    while (unit % TILE) unit += E;
    const int64_t units = (heads * E + unit - 1) / unit, per_unit = unit / TILE;

    share(B, thread, team, &lo, &hi);
    for (int64_t b = lo; b < hi; b++)
        embed_row(s->x + b * s->d_width, &m->embed, s->row[b].token, c->dim, G);
    barrier(team);
    for (int i = 0; i < c->n_layers; i++) {
        const Layer *l = &m->layers[i];
        prepare(s, in, s->x, s->d_width, NULL, B, l->att_norm, &l->wqkv);
        share(units, thread, team, &lo, &hi);
        int64_t tiles = l->wqkv.tiles, last = hi * per_unit < tiles ? hi * per_unit : tiles;
        matmul(s->qkv, s->qkv_width, false, &l->wqkv, lo * per_unit, last, G, in, B);
        store_heads(s, i, lo * unit / E, hi * unit / E < heads ? hi * unit / E : heads);
        barrier(team);

        share((int64_t)c->n_heads * B, thread, team, &lo, &hi);
        attention(s, i, lo, hi, scores);
        barrier(team);

        prepare(s, in, s->att, s->d_width, NULL, B, NULL, &l->wo);
        share(l->wo.tiles, thread, team, &lo, &hi);
        matmul(s->x, s->d_width, true, &l->wo, lo, hi, G, in, B);
        barrier(team);

        prepare(s, in, s->x, s->d_width, NULL, B, l->ffn_norm, &l->w13);
        share(l->w13.tiles / 2, thread, team, &lo, &hi);
        matmul(s->h13, s->h13_width, false, &l->w13, 2 * lo, 2 * hi, G, in, B);
        swiglu(s, lo, hi);
        barrier(team);

        prepare(s, in, s->h, s->h_width, NULL, B, NULL, &l->w2);
        share(l->w2.tiles, thread, team, &lo, &hi);
        matmul(s->x, s->d_width, true, &l->w2, lo, hi, G, in, B);
        barrier(team);
    }
    if (!s->n_logits) return;
    prepare(s, in, s->x, s->d_width, s->wanted, s->n_logits, m->norm, &m->output);
    share(m->output.tiles, thread, team, &lo, &hi);
    matmul(s->logits, s->v_width, false, &m->output, lo, hi, G, in, s->n_logits);
}

static const Kernels MY(kernels) = {ISA_NAME, MY(forward), MY(exps), MY(above), MY(maximum)};

#undef ISA
#undef ISA_NAME
#undef LANES
#endif // ISA_LEVEL

#ifndef ISA_LEVEL // ------ the rest is compiled once

// clang-format off
#define ISA_LEVEL 0
#include "run.c"
#undef ISA_LEVEL

#if defined __x86_64__ && defined __GNUC__
#include <immintrin.h>
#define ISA_LEVEL 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#include "run.c"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "run.c"
#pragma GCC pop_options
#endif
#undef ISA_LEVEL
#define ISA_LEVEL 2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq," \
                                                   "avx512vnni,fma,f16c"))), apply_to = function)
#include "run.c"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#include "run.c"
#pragma GCC pop_options
#endif
#undef ISA_LEVEL

#elif defined __aarch64__ && defined __GNUC__
#include <arm_neon.h>
#define ISA_LEVEL 3
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#include "run.c"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "run.c"
#pragma GCC pop_options
#endif
#undef ISA_LEVEL
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif
// clang-format on

// The kernels that this machine can run, the fastest first; RUN_ISA=portable (or another name's
// beginning) in the environment asks for others.
static const Kernels *pick_kernels(void) {
    const Kernels *able[4];
    int n = 0;
#if defined __x86_64__ && defined __GNUC__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        able[n++] = &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) able[n++] = &kernels_avx2;
#elif defined __aarch64__ && defined __GNUC__
#if defined __ARM_FEATURE_DOTPROD
    able[n++] = &kernels_neon;
#elif defined __linux__
    if (getauxval(AT_HWCAP) & 1 << 20) able[n++] = &kernels_neon; // HWCAP_ASIMDDP
#endif
#endif
    able[n++] = &kernels_portable;
    const char *name = getenv("RUN_ISA");
    for (int i = 0; name && i < n; i++)
        if (!strncmp(able[i]->name, name, strlen(name))) return able[i];
    return able[0];
}

// ------------------------------------------------------------------------------------------
// The tokenizer: byte pair encoding as SentencePiece does it
//
// The file is llama2.c's: u32 longest piece, then for each id f32 score, u32 length, bytes. Of
// all adjacent pairs whose concatenation is a piece, the one with the best score is merged, the
// leftmost of equals, until there is none; a character that is no piece becomes its bytes.

typedef struct {
    const uint8_t *text;
    uint32_t len;
    float score;
} Piece;

typedef struct {
    Piece *piece;     // (n,)
    int n, bos, eos;
    int squeeze;      // strip outer spaces and collapse runs, as this vocabulary was trained
    int32_t *table;   // (mask + 1,) hash table of ids, -1 empty
    uint32_t mask;
    int byte_id[256]; // ids of <0x00> to <0xFF>, or -1
} Tokenizer;

static const uint8_t *all_bytes(void) {
    static uint8_t bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (uint8_t)i;
    return bytes;
}

// The slot of a text in the hash table: where it is, or the empty one where it would be.
static uint32_t slot_of(const Tokenizer *t, const uint8_t *text, uint32_t len) {
    uint32_t h = 2166136261u;
    for (uint32_t i = 0; i < len; i++) h = (h ^ text[i]) * 16777619u;
    for (h &= t->mask;; h = (h + 1) & t->mask) {
        if (t->table[h] < 0) return h;
        const Piece *p = &t->piece[t->table[h]];
        if (p->len == len && !memcmp(p->text, text, len)) return h;
    }
}

static int hex(uint8_t c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static void tokenizer_close(Tokenizer *t) {
    free(t->piece);
    free(t->table);
    memset(t, 0, sizeof *t);
}

// Reads a tokenizer of n pieces from memory, which must stay. squeeze < 0: not known, so guess:
// a vocabulary that has a piece of two spaces has seen some.
static const char *tokenizer_open(Tokenizer *t, const uint8_t *data, int64_t size, int n,
                                  int bos, int eos, int squeeze) {
    *t = (Tokenizer){.n = n, .bos = bos, .eos = eos, .squeeze = squeeze < 0 ? 1 : squeeze};
    for (t->mask = 1; t->mask < 2 * (uint32_t)n; t->mask *= 2) {}
    t->piece = calloc((size_t)n, sizeof *t->piece);
    t->table = malloc(sizeof *t->table * t->mask);
    if (!t->piece || !t->table) return tokenizer_close(t), fail("not enough memory");
    memset(t->table, 255, sizeof *t->table * t->mask--); // all -1; from now on a mask
    memset(t->byte_id, 255, sizeof t->byte_id);
    int64_t at = 4;
    for (int i = 0; i < n; i++) {
        Piece *p = &t->piece[i];
        p->len = size - at >= 8 ? (uint32_t)read_i32(data + at + 4) : 0;
        if (size - at < 8 || p->len > size - at - 8) {
            tokenizer_close(t);
            return fail("the tokenizer ends within piece %d of %d", i, n);
        }
        p->score = read_f32(data + at);
        p->text = data + at + 8;
        at += 8 + (int64_t)p->len;
        if (p->len == 6 && !memcmp(p->text, "<0x", 3) && p->text[5] == '>'
            && hex(p->text[3]) >= 0 && hex(p->text[4]) >= 0) {
            int byte = hex(p->text[3]) * 16 + hex(p->text[4]);
            t->byte_id[byte] = i;
            *p = (Piece){all_bytes() + byte, 1, p->score};
        } else if (i != 0 && i != bos && i != eos && p->len) { // those are never text
            uint32_t slot = slot_of(t, p->text, p->len);
            if (t->table[slot] < 0) t->table[slot] = i;
            if (squeeze < 0 && p->len == 2 && !memcmp(p->text, "  ", 2)) t->squeeze = 0;
        }
    }
    if (at == size) return NULL;
    tokenizer_close(t);
    return fail("the tokenizer goes on after its %d pieces; it belongs to another model", n);
}

typedef struct {
    int at, len;    // bytes of the text; len 0: merged into its left neighbour
    int prev, next; // symbols, or -1
} Symbol;

typedef struct {
    float score;
    int left, right, len; // a merge is stale when the lengths no longer add up to len
} Merge;

static bool before(const Merge *a, const Merge *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

typedef struct {
    const Tokenizer *t;
    const uint8_t *text;
    Symbol *symbol;
    Merge *heap; // best first
    int n;
} Merger;

// Puts the pair (left, right) on the heap if together they are a piece.
static void consider(Merger *m, int left, int right) {
    if (left < 0 || right < 0) return;
    int len = m->symbol[left].len + m->symbol[right].len;
    int id = m->t->table[slot_of(m->t, m->text + m->symbol[left].at, (uint32_t)len)];
    if (id < 0) return;
    Merge new = {m->t->piece[id].score, left, right, len};
    int i = m->n++;
    for (; i > 0 && before(&new, &m->heap[(i - 1) / 2]); i = (i - 1) / 2)
        m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = new;
}

static Merge take_best(Merger *m) {
    Merge best = m->heap[0], last = m->heap[--m->n];
    int i = 0;
    for (int child; (child = 2 * i + 1) < m->n; i = child) {
        if (child + 1 < m->n && before(&m->heap[child + 1], &m->heap[child])) child++;
        if (!before(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = last;
    return best;
}

static int utf8_length(const uint8_t *s, size_t left) { // of the character at s; 1 if it is none
    int n = *s < 0x80 ? 1 : *s >= 0xc2 && *s < 0xe0 ? 2 : *s >= 0xe0 && *s < 0xf0 ? 3
          : *s >= 0xf0 && *s < 0xf5 ? 4 : 1;
    if ((size_t)n > left) return 1;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 1;
    return n;
}

// Copies text as SentencePiece normalizes it: a space in front, its word mark U+2581 as a space,
// and where the vocabulary wants it no outer spaces and no runs. `to` has room for len + 1.
static int normalize_text(const Tokenizer *t, const char *text, size_t len, uint8_t *to) {
    int n = 0;
    bool after_space = true;
    for (size_t i = 0; i < len; i++) {
        bool mark = len - i >= 3 && !memcmp(text + i, "\xe2\x96\x81", 3);
        if (t->squeeze && text[i] == ' ' && after_space) continue;
        if (n == 0) to[n++] = ' ';
        after_space = text[i] == ' ';
        to[n++] = mark ? ' ' : (uint8_t)text[i];
        if (mark) i += 2;
    }
    while (t->squeeze && n > 0 && to[n - 1] == ' ') n--;
    return n;
}

// Encodes len bytes of text, after BOS if `bos`. Returns the ids, to be freed, or NULL without
// memory, and their number in *count.
static int *encode(const Tokenizer *t, const char *text, size_t len, bool bos, int *count) {
    if (len > 1u << 30) return NULL;
    uint8_t *buffer = malloc(len + 1);
    int *ids = malloc(sizeof *ids * (len + 2));
    Symbol *symbol = malloc(sizeof *symbol * (len + 1));
    Merge *heap = malloc(sizeof *heap * 3 * (len + 1)); // each merge adds at most two
    *count = 0;
    if (buffer && ids && symbol && heap) {
        int bytes = normalize_text(t, text, len, buffer), n = 0;
        for (int at = 0; at < bytes; n++) {
            int length = utf8_length(buffer + at, (size_t)(bytes - at));
            symbol[n] = (Symbol){at, length, n - 1, n + 1};
            at += length;
        }
        if (n) symbol[n - 1].next = -1;
        Merger m = {t, buffer, symbol, heap, 0};
        for (int i = 0; i + 1 < n; i++) consider(&m, i, i + 1);
        while (m.n) {
            Merge best = take_best(&m);
            Symbol *left = &symbol[best.left], *right = &symbol[best.right];
            if (!left->len || !right->len || left->len + right->len != best.len
                || left->next != best.right) continue;
            left->len = best.len, left->next = right->next, right->len = 0;
            if (left->next >= 0) symbol[left->next].prev = best.left;
            consider(&m, left->prev, best.left);
            consider(&m, best.left, left->next);
        }
        if (bos) ids[(*count)++] = t->bos;
        for (int i = 0; i >= 0 && i < n; i = symbol[i].next) {
            int id = t->table[slot_of(t, buffer + symbol[i].at, (uint32_t)symbol[i].len)];
            if (id >= 0) ids[(*count)++] = id;
            else for (int k = 0; k < symbol[i].len; k++) {
                int byte = t->byte_id[buffer[symbol[i].at + k]];
                ids[(*count)++] = byte < 0 ? 0 : byte;
            }
        }
    } else free(ids), ids = NULL;
    free(buffer), free(symbol), free(heap);
    return ids;
}

// Writes the text of the tokens from lo to hi. After BOS SentencePiece drops the leading space.
// Control characters but white space are left out: a story should not move a terminal's cursor.
static void print_pieces(const Tokenizer *t, const int *ids, int lo, int hi) {
    for (; lo < hi; lo++) {
        const Piece *p = &t->piece[ids[lo]];
        bool strip = lo > 0 && ids[lo - 1] == t->bos && p->len && *p->text == ' ';
        for (uint32_t i = strip; i < p->len; i++)
            if (p->text[i] >= 32 ? p->text[i] != 127 : p->text[i] >= 9 && p->text[i] <= 13)
                putchar(p->text[i]);
    }
}

// ------------------------------------------------------------------------------------------
// The sampler

typedef struct {
    float temperature; // 0: the most likely token, always
    float topp;        // the smallest set of tokens with more than this probability; off at 0, 1
    uint64_t rng;
} Sampler;

static uint64_t seed_rng(uint64_t seed) { // splitmix64: neighbouring seeds, unrelated streams
    seed += 0x9e3779b97f4a7c15u;
    seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9u;
    seed = (seed ^ seed >> 27) * 0x94d049bb133111ebu;
    return (seed ^ seed >> 31) | 1;
}

static float random_float(uint64_t *rng) { // xorshift*, in [0, 1)
    *rng ^= *rng >> 12;
    *rng ^= *rng << 25;
    *rng ^= *rng >> 27;
    return (float)((*rng * 0x2545f4914f6cdd1du) >> 40) / 16777216.0f;
}

// Draws one of the x (n,) that are larger than least, each with probability x / total.
static int draw(const Kernels *k, const float *x, int n, float least, float total, uint64_t *rng) {
    enum { SKIP = 256 };
    float r = random_float(rng) * total;
    int last = -1; // the last that could be drawn, where rounding errors lead beyond the end
    for (int i = 0; i < n; i += SKIP) {
        int size = n - i < SKIP ? n - i : SKIP;
        float block = k->above(x + i, size, least);
        if (block <= r && i + SKIP < n) {
            r -= block;
            if (block > 0) last = i;
            continue;
        }
        for (int j = i; j < i + size; j++)
            if (x[j] > least) {
                last = j;
                if ((r -= x[j]) < 0) return j;
            }
    }
    while (last >= 0 && last + 1 < n && !(x[last] > least)) last++;
    return last;
}

// The next token, from logits (n,), which it overwrites; -1 if none of them is a finite number.
// Top-p (nucleus) sampling draws from the smallest set of most probable tokens whose probabilities
// exceed p. A token is in it if those that are more probable sum to p at most. So nothing has to
// be sorted: draw from all; if the token is not in the set, draw again from the more probable
// ones. It is in the set with probability p or more, so one or two passes do.
static int sample(Sampler *s, const Kernels *k, float *x, int n) {
    float max = k->maximum(x, n), least = 0;
    if (!(max > -INFINITY && max < INFINITY)) return -1;
    for (int i = 0; i < n && s->temperature < 1e-30f; i++)
        if (x[i] == max) return i;
    float total = k->exps(x, n, 1.0f / s->temperature, max), left = total;
    for (;;) {
        int i = draw(k, x, n, least, left, &s->rng);
        if (i < 0 || s->topp <= 0 || s->topp >= 1) return i;
        float more = k->above(x, n, x[i]);
        if (more <= s->topp * total) return i;
        least = x[i], left = more;
    }
}

// ------------------------------------------------------------------------------------------
// Generate, chat, perplexity, bench

typedef struct {
    Model model;
    Tokenizer tokenizer;
    File tokenizer_file;
    Team team;
    State state;
    const Kernels *kernels;
    float temperature, topp;
    uint64_t seed;
    int steps, stories;
    const char *prompt, *system;
} Run;

static void forward(Run *run, const Row *rows, int B) {
    State *s = &run->state;
    s->row = rows, s->B = B, s->n_logits = 0;
    for (int b = 0; b < B; b++)
        if (rows[b].wants) s->wanted[s->n_logits++] = b;
    team_run(&run->team, run->kernels->forward, s);
}

// Puts ids through sequence 0 from position pos on, in blocks; the last one's logits are left.
static void prefill(Run *run, const int *ids, int n, int pos) {
    Row rows[MAX_ROWS];
    for (int i = 0; i < n; i += MAX_ROWS) {
        int B = n - i < MAX_ROWS ? n - i : MAX_ROWS;
        for (int b = 0; b < B; b++) rows[b] = (Row){ids[i + b], pos + i + b, 0, i + b == n - 1};
        forward(run, rows, B);
    }
}

static void state_or_die(Run *run, int n_seq, int max_pos, int max_rows) {
    const char *error = state_open(&run->state, &run->model, &run->team, n_seq, max_pos, max_rows);
    if (error) die(error);
}

static int sample_or_die(Run *run, Sampler *s, float *logits) {
    int id = sample(s, run->kernels, logits, run->model.c.vocab_size);
    if (id < 0) die("the model's output is not a number: its file is damaged");
    return id;
}

// Bytes read from the KV cache for one token, when it holds n.
static double cache_bytes(const Run *run, int n) {
    const State *s = &run->state;
    return (double)run->model.c.n_layers * run->model.c.n_kv_heads * n
           * 2 * run->model.c.head_dim * (s->half ? 2 : 4);
}

typedef struct {
    Sampler sampler;
    int *ids, n; // what it has told, the prompt included
    bool done;
} Story;

// Tells `stories` stories at once: the same prompt, seeds seed, seed + 1, ... The first is written
// as it comes, the others when those before them have ended.
static void generate(Run *run) {
    const Config *c = &run->model.c;
    const Tokenizer *t = &run->tokenizer;
    const char *prompt = run->prompt ? run->prompt : "";
    State *s = &run->state;
    int n, N = run->stories, active = N, front = 0, told = 0;
    int *ids = need(encode(t, prompt, strlen(prompt), true, &n));
    if (n > run->steps)
        die(fail("the prompt has %d tokens, %s %d", n, run->steps == c->seq_len
                 ? "the model's context is" : "the limit (-n) is", run->steps));
    state_or_die(run, N, run->steps, N > MAX_ROWS ? N : MAX_ROWS);
    Story *story = need(calloc((size_t)N, sizeof *story));
    Row *rows = need(calloc((size_t)N, sizeof *rows));
    double start = seconds(), flushed = start, bytes = 0;
    prefill(run, ids, n, 0);
    double prompt_time = seconds() - start;
    size_t cache = (size_t)(s->head_bytes * c->n_layers * c->n_kv_heads);
    for (int i = 0; i < N; i++) { // every story starts from the same prompt
        uint64_t rng = seed_rng(run->seed + (uint64_t)i);
        story[i].sampler = (Sampler){run->temperature, run->topp, rng};
        story[i].ids = need(malloc(sizeof(int) * (size_t)(run->steps + 1)));
        memcpy(story[i].ids, ids, sizeof *ids * (size_t)n);
        story[i].n = n;
        if (i == 0) continue;
        memcpy(s->logits + i * s->v_width, s->logits, sizeof(float) * (size_t)c->vocab_size);
        memcpy(s->keys + (size_t)i * cache, s->keys, cache);
        memcpy(s->values + (size_t)i * cache, s->values, cache);
    }
    print_pieces(t, ids, 1, n);
    start = seconds();
    while (active) {
        float *logits = s->logits; // of the last pass, in the order of the active stories
        for (int i = 0; i < N; i++) {
            Story *y = &story[i];
            if (y->done) continue;
            int id = sample_or_die(run, &y->sampler, logits);
            logits += s->v_width;
            bool end = id == t->bos || id == t->eos;
            if (!end) y->ids[y->n++] = id;
            if (!end && i == front) print_pieces(t, y->ids, y->n - 1, y->n);
            y->done = end || y->n > run->steps;
            active -= y->done;
            told++;
        }
        for (; front < N && story[front].done; front++) {
            printf("\n");
            if (front + 1 == N) continue;
            printf("\n");
            print_pieces(t, story[front + 1].ids, 1, story[front + 1].n);
        }
        // A write for each token would cost more than the token; a hundredth of a second is soon.
        double now = seconds();
        if (now - flushed > 0.01) fflush(stdout), flushed = now;
        int B = 0;
        for (int i = 0; i < N; i++)
            if (!story[i].done) {
                rows[B++] = (Row){story[i].ids[story[i].n - 1], story[i].n - 1, i, 1};
                bytes += cache_bytes(run, story[i].n);
            }
        if (B) forward(run, rows, B), bytes += (double)run->model.bytes;
    }
    double time = seconds() - start;
    fflush(stdout);
    fprintf(stderr, "prompt: %d tokens at %.0f tokens/s; %s: %d tokens at %.0f tokens/s, "
            "%.1f GB/s (%s, %d thread%s)\n", n, n / prompt_time, N == 1 ? "story" : "stories",
            told, told / time, bytes / time * 1e-9, run->kernels->name, run->team.n,
            run->team.n == 1 ? "" : "s");
    for (int i = 0; i < N; i++) free(story[i].ids);
    free(story), free(rows), free(ids);
}

// Reads a line of any length without its end; NULL at the end of the input. To be freed.
static char *read_line(FILE *in) {
    size_t size = 256, n = 0;
    char *line = need(malloc(size));
    for (int c; (c = getc(in)) != EOF && c != '\n'; line[n++] = (char)c)
        if (n + 2 > size) line = need(realloc(line, size *= 2));
    if (n == 0 && feof(in)) return free(line), NULL;
    line[n] = 0;
    return line;
}

typedef struct {
    char *user;
    int *reply, n_reply; // tokens
} Turn;

// The ids of the turns from `first` to `last` in Llama 2's chat format, to be freed.
static int *render(Run *run, const Turn *turn, int first, int last, int *n) {
    int *ids = NULL;
    *n = 0;
    for (int i = first; i <= last; i++) {
        const char *sys = i == first && run->system ? run->system : "";
        const char *format = *sys ? "[INST] <<SYS>>\n%s\n<</SYS>>\n\n%s [/INST]"
                                  : "[INST] %s%s [/INST]";
        int count, len = snprintf(NULL, 0, format, sys, turn[i].user);
        char *text = need(malloc((size_t)len + 1));
        snprintf(text, (size_t)len + 1, format, sys, turn[i].user);
        int *more = need(encode(&run->tokenizer, text, (size_t)len, true, &count));
        ids = need(realloc(ids, sizeof *ids * (size_t)(*n + count + turn[i].n_reply)));
        memcpy(ids + *n, more, sizeof *ids * (size_t)count);
        memcpy(ids + *n + count, turn[i].reply, sizeof *ids * (size_t)turn[i].n_reply);
        *n += count + turn[i].n_reply;
        free(text), free(more);
    }
    return ids;
}

// A conversation. What the cache holds is kept in `seen`; each turn renders the whole dialogue
// and computes only what differs from it, also after the oldest turns had to go.
static void chat(Run *run) {
    const int context = run->model.c.seq_len;
    const Tokenizer *t = &run->tokenizer;
    state_or_die(run, 1, context, MAX_ROWS);
    Sampler sampler = {run->temperature, run->topp, seed_rng(run->seed)};
    Turn *turn = NULL;
    int *seen = need(malloc(sizeof *seen * (size_t)context)), n_seen = 0, first = 0, n, last = 0;
    for (;; last++) {
        turn = need(realloc(turn, sizeof *turn * (size_t)(last + 1)));
        turn[last] = (Turn){NULL, need(malloc(sizeof(int) * (size_t)context)), 0};
        if (!run->prompt) printf("User: ");
        fflush(stdout);
        turn[last].user = run->prompt ? strdup(run->prompt) : read_line(stdin);
        run->prompt = NULL;
        if (!turn[last].user) break;
        int *ids = render(run, turn, first, last, &n), dropped = first;
        while (n >= context && first < last) {
            free(ids);
            ids = render(run, turn, ++first, last, &n);
        }
        if (first > dropped)
            fprintf(stderr, "(the context of %d tokens is full: forgetting the first %d turns)\n",
                    context, first);
        if (n >= context) {
            fprintf(stderr, "(that has %d tokens, the context is %d: too long)\n", n, context);
            free(ids), free(turn[last].user), free(turn[last].reply);
            last--;
            continue;
        }
        int same = 0;
        while (same < n_seen && same < n - 1 && seen[same] == ids[same]) same++;
        prefill(run, ids + same, n - same, same);
        memcpy(seen, ids, sizeof *seen * (size_t)n);
        n_seen = n;
        printf("Assistant:");
        for (int said = 0; said < run->steps; said++) {
            int id = sample_or_die(run, &sampler, run->state.logits);
            turn[last].reply[turn[last].n_reply++] = id;
            if (id == t->bos || id == t->eos) break;
            print_pieces(t, &id, 0, 1);
            fflush(stdout);
            if (n_seen == context) {
                fprintf(stderr, "\n(the context of %d tokens is full)", context);
                break;
            }
            seen[n_seen] = id;
            forward(run, &(Row){id, n_seen++, 0, 1}, 1);
        }
        printf("\n");
        free(ids);
    }
    for (int i = 0; i <= last; i++) free(turn[i].user), free(turn[i].reply);
    free(turn), free(seen);
    printf("\n");
}

// -log softmax(logits)[target]; overwrites the logits.
static double cross_entropy(const Kernels *k, float *logits, int n, int target) {
    float max = k->maximum(logits, n), at_target = logits[target];
    return log(k->exps(logits, n, 1, max)) + max - at_target;
}

// The mean loss over a text file, in windows of the context's length, as in training: each
// document (they are separated by <|endoftext|>) after BOS, all of them one stream of tokens.
static void perplexity(Run *run) {
    const char *separator = "<|endoftext|>";
    const Config *c = &run->model.c;
    File file;
    const char *error = run->prompt ? file_open(&file, run->prompt) : "give the file with -i";
    if (error) die(error);
    const char *text = (const char *)file.data, *end = text + file.size;
    int *ids = NULL, count;
    int64_t n = 0, mark = (int64_t)strlen(separator);
    for (const char *stop = text; text < end; text = stop += mark) {
        while (stop < end && (end - stop < mark || memcmp(stop, separator, (size_t)mark))) stop++;
        const char *last = stop;
        while (text < last && (*text == '\n' || *text == ' ')) text++;
        while (last > text && (last[-1] == '\n' || last[-1] == ' ')) last--;
        if (last == text) continue;
        int *more = need(encode(&run->tokenizer, text, (size_t)(last - text), true, &count));
        ids = need(realloc(ids, sizeof *ids * (size_t)(n + count)));
        memcpy(ids + n, more, sizeof *ids * (size_t)count);
        n += count;
        free(more);
    }
    file_close(&file);
    if (n < 2) die(fail("%s: there is nothing to predict", run->prompt));
    state_or_die(run, 1, c->seq_len, MAX_ROWS);
    double loss = 0, start = seconds();
    Row rows[MAX_ROWS];
    for (int64_t i = 0, B; i + 1 < n; i += B) {
        int pos = (int)(i % c->seq_len);
        for (B = 0; B < MAX_ROWS && pos + B < c->seq_len && i + B + 1 < n; B++)
            rows[B] = (Row){ids[i + B], pos + (int)B, 0, 1};
        forward(run, rows, (int)B);
        for (int b = 0; b < B; b++)
            loss += cross_entropy(run->kernels, run->state.logits + b * run->state.v_width,
                                  c->vocab_size, ids[i + b + 1]);
    }
    loss /= (double)(n - 1);
    printf("loss %.5f, perplexity %.4f, %lld tokens in windows of %d, %.0f tokens/s\n", loss,
           exp(loss), (long long)n - 1, c->seq_len, (double)(n - 1) / (seconds() - start));
    free(ids);
}

typedef struct {
    uint64_t *data;
    int64_t n;
    atomic_ullong total; // so that the reading is not optimized away
} Reading;

static void read_share(void *arg, Team *team, int thread) {
    Reading *r = arg;
    uint64_t t[16] = {0}, all = 0;
    int64_t lo, hi;
    share(r->n / 16, thread, team, &lo, &hi);
    for (int64_t i = 16 * lo; i < 16 * hi; i += 16)
        for (int j = 0; j < 16; j++) t[j] += r->data[i + j];
    for (int j = 0; j < 16; j++) all += t[j];
    atomic_fetch_add(&r->total, all);
}

// Read bandwidth of the team in bytes/s, the best of some passes over a block of memory.
static double bandwidth(Team *team, int64_t bytes) {
    void *raw;
    Reading r = {need(new_block(&raw, bytes)), bytes / 8, 0};
    double best = 1e9;
    memset(r.data, 1, (size_t)bytes);
    for (int i = 0; i < 10; i++) {
        double start = seconds();
        team_run(team, read_share, &r);
        if (seconds() - start < best) best = seconds() - start;
    }
    free(raw);
    return (double)bytes / best;
}

// Speed of decoding, of prompts and of sampling beside the bandwidth that bounds them.
static void bench(Run *run) {
    const Config *c = &run->model.c;
    int n = run->steps < c->seq_len ? run->steps : c->seq_len;
    int *ids = need(malloc(sizeof *ids * (size_t)n));
    state_or_die(run, 1, n, MAX_ROWS);
    double roof = bandwidth(&run->team, 256 << 20), best = 1e9, sampling = 0, bytes = 0, begin;
    for (int i = 0; i < n; i++) ids[i] = (int)((unsigned)i * 2654435761u % (unsigned)c->vocab_size);
    begin = seconds();
    for (int tries = 0; tries < 2 || (tries < 200 && seconds() - begin < 2); tries++) {
        double start = seconds();
        prefill(run, ids, n, 0);
        if (seconds() - start < best) best = seconds() - start;
    }
    printf("%s, %d thread%s, weights %.1f MB, read bandwidth %.1f GB/s\n", run->kernels->name,
           run->team.n, run->team.n == 1 ? "" : "s", (double)run->model.bytes * 1e-6, roof * 1e-9);
    printf("prompt   %d tokens: %.1f tokens/s\n", n, n / best);
    best = 1e9;
    for (int i = 0; i < n; i++) bytes += cache_bytes(run, i + 1) + (double)run->model.bytes;
    begin = seconds();
    for (int tries = 0; tries < 2 || (tries < 200 && seconds() - begin < 3); tries++) {
        double start = seconds();
        for (int i = 0; i < n; i++) forward(run, &(Row){ids[i], i, 0, 1}, 1);
        if (seconds() - start < best) best = seconds() - start;
    }
    printf("decode   %d tokens: %.1f tokens/s, %.1f GB/s, %.0f %% of the bandwidth\n", n, n / best,
           bytes / best * 1e-9, 100 * bytes / best / roof);
    Sampler sampler = {run->temperature, run->topp, seed_rng(run->seed)};
    for (int i = 0; i < 50; i++) {
        forward(run, &(Row){ids[i % n], 0, 0, 1}, 1);
        double start = seconds();
        sample_or_die(run, &sampler, run->state.logits);
        sampling += (seconds() - start) / 50;
    }
    printf("sampling at t = %g, p = %g: %.1f us a token, %.1f %% of decoding\n", run->temperature,
           run->topp, sampling * 1e6, 100 * sampling * n / best);
    free(ids);
}

// ------------------------------------------------------------------------------------------
// The command line

#ifndef RUN_NO_MAIN // the tests include this file and have a main of their own
static void usage(FILE *out, int status) {
    fputs("usage: run MODEL.bin [options]\n"
          "  -i TEXT    the prompt; with -m perplexity: the text file\n"
          "  -n N       stop at N tokens, the prompt among them; 0: at the context; default 256\n"
          "  -t T       temperature; 0: always the most likely token; default 1.0\n"
          "  -p P       sample from the most likely tokens that sum to P; default 0.9, 1: all\n"
          "  -s SEED    of the random numbers; default: the time\n"
          "  -b N       tell N stories at once, with seeds SEED, SEED + 1, ...\n"
          "  -z FILE    the tokenizer, for models that do not bring their own\n"
          "  -m MODE    generate, chat, perplexity or bench; default generate\n"
          "  -y TEXT    system prompt of a chat\n"
          "  -j N       threads; default: all cores, but one for a model that fits a cache\n"
          "example: run model.bin -t 0.8 -i \"Once upon a time\"\n", out);
    exit(status);
}

static double number(char flag, const char *text, double min, double max, bool whole) {
    char *end;
    errno = 0;
    double v = strtod(text, &end);
    if (end == text || *end || errno || !(v >= min && v <= max) || (whole && v != floor(v))) {
        fprintf(stderr, "error: -%c %s: expected %s from %g to %g\n", flag, text,
                whole ? "a whole number" : "a number", min, max);
        exit(2);
    }
    return v;
}

int main(int argc, char **argv) {
    Run run = {.temperature = 1, .topp = 0.9f, .steps = 256, .stories = 1,
               .seed = (uint64_t)time(NULL), .kernels = pick_kernels()};
    const char *tokenizer = NULL, *mode = "generate", *path = argc > 1 ? argv[1] : "-h", *error;
    int threads = 0, n_cores = cores();
    if (!strcmp(path, "-h") || !strcmp(path, "--help")) usage(stdout, argc > 1 ? 0 : 2);
    for (int i = 2; i < argc; i += 2) {
        char flag = argv[i][0] == '-' && argv[i][1] && !argv[i][2] ? argv[i][1] : 0;
        const char *value = argv[i + 1];
        if (!flag || !strchr("tpsnizmybj", flag) || !value) {
            fprintf(stderr, "error: %s: %s\n", argv[i],
                    value ? "there is no such option" : "a value is missing, or no such option");
            usage(stderr, 2);
        }
        if (flag == 't') run.temperature = (float)number(flag, value, 0, 1e6, false);
        if (flag == 'p') run.topp = (float)number(flag, value, 0, 1, false);
        if (flag == 's') run.seed = (uint64_t)number(flag, value, 0, 1e15, true);
        if (flag == 'n') run.steps = (int)number(flag, value, 0, 1e9, true);
        if (flag == 'b') run.stories = (int)number(flag, value, 1, 1024, true);
        if (flag == 'j') threads = (int)number(flag, value, 1, 1024, true);
        if (flag == 'i') run.prompt = value;
        if (flag == 'z') tokenizer = value;
        if (flag == 'm') mode = value;
        if (flag == 'y') run.system = value;
    }
    if ((error = model_open(&run.model, path))) die(error);
    const Model *m = &run.model;
    if (tokenizer) {
        if ((error = file_open(&run.tokenizer_file, tokenizer))) die(error);
        error = tokenizer_open(&run.tokenizer, run.tokenizer_file.data, run.tokenizer_file.size,
                               m->c.vocab_size, m->c.bos, m->c.eos, -1);
        if (error) die(fail("%s: %s", tokenizer, error));
    } else if (m->tokenizer) {
        error = tokenizer_open(&run.tokenizer, m->tokenizer, m->tokenizer_size, m->c.vocab_size,
                               m->c.bos, m->c.eos, m->squeeze);
        if (error) die(fail("%s: %s", path, error));
    } else if (strcmp(mode, "bench")) die("the model brings no tokenizer: give one with -z");
    if (run.steps == 0) run.steps = m->c.seq_len;
    if (run.steps > m->c.seq_len && strcmp(mode, "chat")) {
        if (run.steps != 256)
            fprintf(stderr, "note: -n %d is past the model's context, stopping at %d\n",
                    run.steps, m->c.seq_len);
        run.steps = m->c.seq_len;
    }
    // Sharing a token costs five meetings a layer: not worth it below some megabytes of weights.
    if (!threads) threads = m->bytes < 3 << 20 && run.stories < 4 ? 1 : n_cores;
    if (threads > n_cores) {
        fprintf(stderr, "note: %d threads, one for each core\n", n_cores);
        threads = n_cores;
    }
    team_open(&run.team, threads);
    if (!strcmp(mode, "generate")) generate(&run);
    else if (!strcmp(mode, "chat")) chat(&run);
    else if (!strcmp(mode, "perplexity")) perplexity(&run);
    else if (!strcmp(mode, "bench")) bench(&run);
    else die(fail("-m %s: it is generate, chat, perplexity or bench", mode));
    free(run.state.block);
    team_close(&run.team);
    tokenizer_close(&run.tokenizer);
    file_close(&run.tokenizer_file);
    model_close(&run.model);
    return 0;
}
#endif // RUN_NO_MAIN
#endif // ISA_LEVEL
