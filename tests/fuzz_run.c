/* A libFuzzer target for what run.c reads from strangers: model file, tokenizer, prompt.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_run.c -o fuzz_run -lm -pthread
 *     ./fuzz_run -max_len=16384 -rss_limit_mb=2048 corpus tests/fuzz_corpus
 *
 * An input is one byte of options, one byte n, n bytes of prompt, and the model file. Option 1
 * writes the file's true length into the header, which otherwise stops most mutants; 2 gives the
 * portable kernels. What is accepted is then used: the prompt is encoded, also as two exchanges of
 * a chat, a few rows go through the model, a token is sampled and printed. Nothing may crash, hang
 * or exit.
 */

#pragma GCC diagnostic ignored "-Wunused-function" // the command line's
#define RUN_NO_MAIN
#include "../run.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2 || size - 2 < data[1]) return 0;
    const char *prompt = (const char *)data + 2;
    size_t prompt_size = data[1];
    void *raw;
    Model m;
    memset(&m, 0, sizeof m);
    m.file.size = (int64_t)(size - 2 - prompt_size);
    m.file.data = new_block(&raw, m.file.size);
    memcpy(m.file.data, prompt + prompt_size, (size_t)m.file.size);
    if (data[0] & 1 && m.file.size >= HEADER) memcpy(m.file.data + 80, &m.file.size, 8);
    Tokenizer t;
    memset(&t, 0, sizeof t);
    const char *error = model_parse(&m, "fuzz");
    if (!error && m.tokenizer.size)
        error = tokenizer_open(&t, m.tokenizer, m.kind, m.c.vocab_size, m.c.bos, m.c.eos,
                               m.squeeze);
    // A valid model may ask for more than a fuzzer has: one small matrix can belong to a header
    // with thousands of heads and layers.
    if (!error && m.c.vocab_size < 4096 && m.c.dim < 4096 && m.c.hidden_dim < 4096) {
        static Team team;
        if (!team.n) team_open(&team, 1);
        State s;
        Sampler sampler = {0.7f, 0.9f, seed_rng(1)};
        Row rows[3];
        int n = 0, ids[1] = {m.c.vocab_size - 1}, *encoded = NULL;
        if (t.n) encoded = encode(&t, prompt, prompt_size, true, &n);
        for (int i = 0; i < n; i++)
            if (encoded[i] < 0 || encoded[i] >= m.c.vocab_size) abort();
        int max_pos = m.c.seq_len < 3 ? m.c.seq_len : 3;
        if (!state_open(&s, &m, &team, 1, max_pos, 3)) {
            for (int i = 0; i < max_pos; i++)
                rows[i] = (Row){i < n ? encoded[i] : ids[0], i, 0, i == max_pos - 1};
            set_rows(&s, rows, max_pos);
            const Kernels *kernels = data[0] & 2 ? &kernels_portable : pick_kernels();
            team_run(&team, kernels->forward, &s);
            int id = sample(&sampler, kernels, s.logits, m.c.vocab_size);
            if (id < -1 || id >= m.c.vocab_size) abort();
            if (id >= 0 && t.n) print_pieces(&t, &id, 0, 1);
        }
        free(s.block);
        free(encoded);
        Run run = {.model = m, .tokenizer = t, .system = data[0] & 4 ? "<s>{bos}" : NULL};
        if (t.n && !open_templates(&run)) {
            char *user = need(calloc(1, prompt_size + 1));
            memcpy(user, prompt, prompt_size);
            Turn turn[2] = {{user, ids, 1}, {user, ids, 1}};
            encoded = render_all(&run, turn, 0, 1, &n);
            for (int i = 0; i < n; i++)
                if (encoded[i] < 0 || encoded[i] >= m.c.vocab_size) abort();
            free(encoded), free(user);
        }
    }
    tokenizer_close(&t);
    m.file.data = NULL;
    model_close(&m);
    free(raw);
    return 0;
}
