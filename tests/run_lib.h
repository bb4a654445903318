/* run.c as a library, for its tests. Two things differ from the program: an error comes back to the
 * caller instead of ending the process, and what the program keeps until its end can be freed.
 *
 *     if (!setjmp(died)) ...; // what may die
 *     free_all();
 */

#pragma GCC diagnostic ignored "-Wunused-function" // the command line's
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdlib.h>

static jmp_buf died;
static void **kept; // what calloc returned; of it run.c never frees anything
static size_t n_kept;

static void *keep(size_t n, size_t size) {
    void *block = calloc(n, size);
    kept = realloc(kept, sizeof *kept * (n_kept + 1));
    kept[n_kept++] = block;
    return block;
}

static void free_all(void) {
    while (n_kept) free(kept[--n_kept]);
}

#define RUN_NO_MAIN
#define exit(status) longjmp(died, status)
#define calloc keep
#include "../run.c"

// A team of n threads, once and for all. The caller stays free to move between cores.
static Team *team_of(int n) {
    static Team teams[9];
    Team *t = &teams[n];
    if (t->n) return t;
    team_open(t, n);
#ifdef __linux__
    if (t->pinned) sched_setaffinity(0, sizeof t->cores, &t->cores);
#endif
    return t;
}

static void tokenizer_of(Tokenizer *t, const Model *m) {
    if (m->tokenizer.size) tokenizer_open(t, m->tokenizer, &m->c, m->path);
}
