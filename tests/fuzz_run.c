/* A libFuzzer target for what run.c reads from strangers: model file, tokenizer, prompt.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_run.c -o fuzz_run -lm -pthread
 *     ./fuzz_run -close_fd_mask=3 -max_len=16384 -rss_limit_mb=2048 corpus tests/fuzz_corpus
 *
 * An input is one byte of options, one byte n, n bytes of prompt, and the model file. Option 1
 * writes the file's true length into the header, which otherwise stops most mutants; 2 gives the
 * portable kernels. What is accepted is then used: the prompt is encoded, also as two exchanges of
 * a chat, a few rows go through the model, a token is sampled and printed. Nothing may crash, hang
 * or leak.
 */

#include "run_lib.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_ids(int *ids, int n, int vocab_size) {
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab_size) abort();
}

static void use(uint8_t options, const char *prompt, size_t prompt_size, Span file) {
    static Run run; // as main has it
    run = (Run){.system = options & 4 ? "<s>{bos}" : NULL};
    Model *m = &run.model;
    Tokenizer *t = &run.tokenizer;
    model_open(m, file, "fuzz");
    const Config *c = &m->c;
    tokenizer_of(t, m);
    // A valid model may ask for more than a fuzzer has: one small matrix can belong to a header
    // with thousands of heads and layers.
    if (c->vocab_size >= 4096 || c->dim >= 4096 || c->hidden_dim >= 4096
        || c->n_heads * c->head_dim >= 4096)
        return;
    Sampler sampler = {0.7f, 50, 0.9f, seed_rng(1)};
    Row rows[3];
    size_t count = 0;
    int last = c->vocab_size - 1, max_pos = c->seq_len < 3 ? c->seq_len : 3;
    int *ids = t->n ? encode(t, prompt, prompt_size, true, NULL, &count) : NULL, n = (int)count;
    check_ids(ids, n, c->vocab_size);
    for (int i = 0; i < max_pos; i++)
        rows[i] = (Row){i < n ? ids[i] : last, i, 0};
    free(ids);
    state_open(&run.state, m, team_of(1), 1, max_pos, 3);
    set_rows(&run.state, rows, max_pos, 1);
    const Kernels *chosen = options & 2 ? &kernels : pick_kernels();
    team_run(run.state.team, chosen->forward, &run.state);
    int id = sample(&sampler, chosen, run.state.logits, c->vocab_size);
    if (id < -1 || id >= c->vocab_size) abort();
    if (id >= 0 && t->n) print_pieces(t, &id, 0, 1, -1);
    if (!t->n) return;
    open_templates(&run);
    char *user = need(malloc(prompt_size + 1));
    memcpy(user, prompt, prompt_size);
    user[prompt_size] = 0;
    ids = render_all(&run, (Turn[]){{user, &last, 1}, {user, &last, 1}}, 0, 1, &n);
    check_ids(ids, n, c->vocab_size);
    free(ids), free(user);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2 || size - 2 < data[1]) return 0;
    const char *prompt = (const char *)data + 2;
    int64_t bytes = (int64_t)size - 2 - data[1];
    uint8_t *file = zeros(bytes);
    memcpy(file, prompt + data[1], (size_t)bytes);
    if (data[0] & 1 && bytes >= HEADER) memcpy(file + 80, &bytes, 8);
    if (!setjmp(died)) use(data[0], prompt, data[1], (Span){file, bytes});
    free_all();
    return 0;
}
