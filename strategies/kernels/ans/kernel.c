/* Symbols out of codes of asymmetric numeral systems, and positions out of gaps: what files of sparse weights are made
 * of. A code is the library constriction's `AnsCoder`: words of 32 bits, a state of 64, shares of 2^-24.
 *
 * One code can't be decoded faster than a multiplication and two look-ups follow each other. So a thread decodes LANES
 * of them side by side, and most of that waiting overlaps.
 */
#include <stdatomic.h>

#include "../native/native.h"

enum { SHARE_BITS = 24, BUCKET_BITS = 12, LANES = 4, MOST_STEPS = 4 };

/* One code. */
struct code {
    const uint32_t *words;  /* the last one is read first; words[0] isn't one, so that it can be read in vain */
    const uint32_t *starts; /* where each symbol's share begins, and the end of all */
    const uint16_t *first;  /* the symbol at the beginning of each bucket of 2^BUCKET_BITS, and the last symbol */
    uint16_t *symbols;
    int64_t num_words, num_symbols;
    int64_t is_whole; /* out: whether it ends where its symbols do */
};

struct lane {
    struct code *code;
    uint64_t state;
    const uint32_t *word; /* the next one */
    int64_t done;
};

struct job {
    struct code *codes;
    int64_t num_codes;
    atomic_llong next;
};

/* Take the next code, if there is one. */
static int begin(struct job *job, struct lane *lane)
{
    int64_t index = atomic_fetch_add(&job->next, 1);
    if (index >= job->num_codes)
        return 0;
    struct code *code = job->codes + index;
    int64_t num = code->num_words;
    lane->code = code;
    lane->done = 0;
    lane->state = num > 1 ? (uint64_t)code->words[num] << 32 | code->words[num - 1] : num ? code->words[num] : 0;
    lane->word = code->words + (num > 2 ? num - 2 : 0);
    return 1;
}

/* Decode some symbols of each lane; `num` is a constant where this is inlined. */
SQUALL_INLINE void run(const int num, struct lane *lanes, int64_t num_symbols)
{
    uint64_t state[LANES];
    const uint32_t *word[LANES], *bottom[LANES], *starts[LANES];
    const uint16_t *first[LANES];
    uint16_t *out[LANES];
    SQUALL_UNROLL for (int i = 0; i < num; i++) {
        state[i] = lanes[i].state;
        word[i] = lanes[i].word;
        bottom[i] = lanes[i].code->words;
        starts[i] = lanes[i].code->starts;
        first[i] = lanes[i].code->first;
        out[i] = lanes[i].code->symbols + lanes[i].done;
    }
    for (int64_t at = 0; at < num_symbols; at++)
        SQUALL_UNROLL for (int i = 0; i < num; i++) {
            uint32_t share = state[i] & ((1u << SHARE_BITS) - 1);
            const uint16_t *bucket = first[i] + (share >> BUCKET_BITS);
            uint32_t symbol = bucket[0];
            if (__builtin_expect(bucket[1] - bucket[0] > MOST_STEPS, 0)) {
                uint32_t end = bucket[1] + 1u; /* it is below this */
                while (end - symbol > 1) {
                    uint32_t middle = (symbol + end) / 2;
                    if (starts[i][middle] <= share)
                        symbol = middle;
                    else
                        end = middle;
                }
            } else
                while (__builtin_expect(starts[i][symbol + 1] <= share, 0))
                    symbol++;
            uint32_t start = starts[i][symbol];
            out[i][at] = (uint16_t)symbol;
            uint64_t next = (state[i] >> SHARE_BITS) * (starts[i][symbol + 1] - start) + (share - start);
            /* No branch: nobody can foresee it. */
            int refills = (next < (uint64_t)1 << 32) & (word[i] != bottom[i]);
            uint64_t refilled = next << 32 | *word[i];
            state[i] = refills ? refilled : next;
            word[i] -= refills;
        }
    SQUALL_UNROLL for (int i = 0; i < num; i++) {
        lanes[i].state = state[i];
        lanes[i].word = word[i];
        lanes[i].done += num_symbols;
    }
}

static void work(void *context, int64_t index, int thread)
{
    struct job *job = context;
    struct lane lanes[LANES];
    int num = 0;
    (void)index;
    (void)thread;
    for (;;) {
        while (num < LANES && begin(job, lanes + num))
            num++;
        if (!num)
            return;
        int64_t left = INT64_MAX;
        for (int i = 0; i < num; i++) {
            int64_t mine = lanes[i].code->num_symbols - lanes[i].done;
            left = mine < left ? mine : left;
        }
        switch (num) {
        case 1: run(1, lanes, left); break;
        case 2: run(2, lanes, left); break;
        case 3: run(3, lanes, left); break;
        default: run(4, lanes, left);
        }
        for (int i = num - 1; i >= 0; i--)
            if (lanes[i].done == lanes[i].code->num_symbols) {
                lanes[i].code->is_whole = !lanes[i].state && lanes[i].word == lanes[i].code->words;
                lanes[i] = lanes[--num];
            }
    }
}

/* Decode codes, the longest ones first. */
SQUALL_EXPORT void squall_ans_decode(void *codes, int64_t num_codes, int num_threads)
{
    struct job job = {.codes = codes, .num_codes = num_codes};
    atomic_init(&job.next, 0);
    squall_parallel(work, &job, num_codes < num_threads ? num_codes : num_threads, num_threads);
}

/* Sum gaps up: one goes on from the last position, and one of 0 does so by `longest` without stopping. Returns nothing:
 * the number of positions, and where the last gap has led to, are in `ends`. Gaps beyond `num_positions` are left out. */
#define POSITIONS(NAME, GAP, TYPE)                                                                                     \
    SQUALL_EXPORT void NAME(const GAP *gaps, int64_t num_gaps, int64_t longest, int64_t num_positions,                 \
                            TYPE *positions, int64_t *ends)                                                            \
    {                                                                                                                  \
        int64_t at = -1, found = 0;                                                                                    \
        for (int64_t i = 0; i < num_gaps; i++) {                                                                       \
            at += gaps[i] ? gaps[i] : longest;                                                                         \
            if (found < num_positions)                                                                                 \
                positions[found] = (TYPE)at;                                                                           \
            found += gaps[i] != 0;                                                                                     \
        }                                                                                                              \
        ends[0] = found;                                                                                               \
        ends[1] = at;                                                                                                  \
    }
POSITIONS(squall_positions_8_32, uint8_t, int32_t)
POSITIONS(squall_positions_8_64, uint8_t, int64_t)
POSITIONS(squall_positions_16_32, uint16_t, int32_t)
POSITIONS(squall_positions_16_64, uint16_t, int64_t)

/* Bring weights from the order of columns into that of rows: those of a row stay in their order, so it is enough to
 * know how many there are in the rows before. `next` has room for a number a row and one more. */
#define TURN(NAME, PLACE, VALUE)                                                                                       \
    SQUALL_EXPORT void NAME(const PLACE *places, int64_t num, int64_t num_rows, int64_t num_columns,                   \
                            const VALUE *values, PLACE *turned, VALUE *ordered, int64_t *next)                         \
    {                                                                                                                  \
        for (int64_t row = 0; row <= num_rows; row++)                                                                  \
            next[row] = 0;                                                                                             \
        for (int twice = 0; twice < 2; twice++) { /* count, and then each weight has its place */                      \
            int64_t column = -1, begin = 0, end = 0;                                                                   \
            for (int64_t i = 0; i < num; i++) {                                                                        \
                if (places[i] >= end) {                                                                                \
                    column = places[i] / num_rows;                                                                     \
                    begin = column * num_rows;                                                                         \
                    end = begin + num_rows;                                                                            \
                }                                                                                                      \
                int64_t row = places[i] - begin;                                                                       \
                if (!twice) {                                                                                          \
                    next[row + 1]++;                                                                                   \
                    continue;                                                                                          \
                }                                                                                                      \
                int64_t to = next[row]++;                                                                              \
                turned[to] = (PLACE)(row * num_columns + column);                                                      \
                ordered[to] = values[i];                                                                               \
            }                                                                                                          \
            for (int64_t row = 0; row < num_rows && !twice; row++)                                                     \
                next[row + 1] += next[row];                                                                            \
        }                                                                                                              \
    }
#define TURNS(BITS, PLACE)                                                                                             \
    TURN(squall_turn_##BITS##_1, PLACE, uint8_t)                                                                       \
    TURN(squall_turn_##BITS##_2, PLACE, uint16_t)                                                                      \
    TURN(squall_turn_##BITS##_4, PLACE, uint32_t)                                                                      \
    TURN(squall_turn_##BITS##_8, PLACE, uint64_t)
TURNS(32, int32_t)
TURNS(64, int64_t)
