/* A sparse matrix times vectors: forward, gradient by the input, and gradient by the live weights.
 *
 * The matrix lies in tiles of TILE_COLUMNS columns by row_block rows. In each tile the rows are sorted by how many
 * weights they have there, and cut into slices of SLICE rows of (nearly) equal length. A slice is a list of steps, and
 * a step one weight of each of its rows: SLICE columns of a byte, and SLICE codes of a byte or values. What fills up
 * shorter rows has column TILE_COLUMNS, where x is zero. A tile's part of x is small enough for registers at batch 1,
 * and for the nearest cache, times the batch, else.
 *
 * Bytes of a step, columns and codes, are stored as BYTE_OF says: then a shift of registers of 32 bits is all it takes to
 * have the codes, or columns, of 16 neighbouring slots in the lowest bytes of their lanes.
 */
#include <stdatomic.h>
#include <string.h>

#include "../native/native.h"
#include "layout.h"

enum { LIVE_SPREAD = 128, LIVE_ROWS = 64, LIVE_COLUMNS = 192 };

struct linear {
    const uint8_t *columns, *codes;
    const void *values;    /* of slots; or of codes, if there are codes */
    const int16_t *rows;   /* of a slice's lanes, from the block's first; row_block where there is none */
    const int64_t *starts; /* first step of each slice, and the end */
    const int64_t *tiles;  /* first slice of each tile, and the end; blocks of rows are the slow index */
    const void *x, *bias;
    void *y, *shared, *own; /* own: num_own numbers for each thread, or for each task of batch 1 */
    int64_t num_codes, num_rows, num_columns, row_block, num_tiles, batch, num_own;
    int64_t parts;         /* of a block's tiles, each a thread's work at batch 1 */
    int relu;
};

struct live {
    const void *x, *grad;
    const int64_t *row_starts; /* where each row's weights start, and the end */
    const int32_t *columns;
    void *y, *shared;
    int64_t num_rows, num_columns, batch;
};

SQUALL_INLINE int64_t at_most(int64_t value, int64_t most)
{
    return value < most ? value : most;
}

/* Where a part of a block's tiles begins. */
SQUALL_INLINE int64_t first_tile(const struct linear *w, int64_t part)
{
    return part * w->num_tiles / w->parts;
}

#define REAL float
#define IS_SINGLE 1
#define TYPED(name) SQUALL_JOIN(name, float)
typedef float TYPED(vector) __attribute__((vector_size(64)));
#define TEMPLATE "../sparse_linear/template.h"
#include "../native/each_isa.h"
#undef REAL
#undef IS_SINGLE
#undef TYPED

#define REAL double
#define IS_SINGLE 0
#define TYPED(name) SQUALL_JOIN(name, double)
typedef double TYPED(vector) __attribute__((vector_size(64)));
#include "../native/each_isa.h"
#undef REAL
#undef IS_SINGLE
#undef TYPED

#include "vector.h"

/* Largest number of lanes that are worked on at once. */
static int64_t num_lanes(int is_double)
{
    return is_double ? 16 : 32;
}

enum { MOST_SUMS = 64 };

/* Batch 1: the parts of a block of rows and a sample, and whoever comes last adds them up: another parallel region would
 * have the other threads woken once more. */
struct summed {
    struct linear w; /* first: tasks take one for the other */
    squall_task part, finish;
    atomic_llong left[MOST_SUMS];
};

static void one_and_finish(void *context, int64_t index, int thread)
{
    struct summed *job = context;
    job->part(context, index, thread);
    if (atomic_fetch_sub(job->left + index / job->w.parts, 1) == 1)
        job->finish(context, index / job->w.parts, thread);
}

/* y = x @ weight.T + bias; `shared` has x, transposed, in tiles. One sample at a time if `one` is not 0. */
SQUALL_EXPORT void squall_sparse_linear(const void *columns, const void *codes, const void *values, const void *rows,
                                        const void *starts, const void *tiles, const void *x, const void *bias, void *y,
                                        void *shared, void *own, int64_t num_own, int64_t num_codes, int64_t num_rows,
                                        int64_t num_columns, int64_t row_block, int64_t batch, int64_t parts, int relu,
                                        int one, int is_double, int num_threads)
{
    struct linear w = {.columns = columns, .codes = codes, .values = values, .rows = rows, .starts = starts,
                       .tiles = tiles, .x = x, .bias = bias, .y = y, .shared = shared, .own = own, .num_own = num_own,
                       .num_codes = num_codes, .num_rows = num_rows, .num_columns = num_columns,
                       .row_block = row_block, .batch = batch, .parts = parts, .relu = relu,
                       .num_tiles = (num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS};
    int64_t num_blocks = (num_rows + row_block - 1) / row_block;
    if (one) {
        squall_task task = is_double ? SQUALL_PICK(one_double) : SQUALL_PICK(one_float);
#if SQUALL_HAS_X86
        if (!is_double && squall_isa == 2 && __builtin_cpu_supports("avx512vbmi"))
            task = one_float_vbmi;
#endif
        if (is_double)
            pad_double(&w);
        else
            pad_float(&w);
        squall_task finish = is_double ? SQUALL_PICK(finish_double) : SQUALL_PICK(finish_float);
        int64_t num_sums = num_blocks * batch;
        if (num_sums <= MOST_SUMS) {
            struct summed job = {.w = w, .part = task, .finish = finish};
            for (int64_t i = 0; i < num_sums; i++)
                atomic_init(job.left + i, parts);
            squall_parallel(one_and_finish, &job, num_sums * parts, num_threads);
            return;
        }
        squall_parallel(task, &w, num_sums * parts, num_threads);
        squall_parallel(finish, &w, num_sums, num_threads);
        return;
    }
    int64_t chunks = (batch + num_lanes(is_double) - 1) / num_lanes(is_double);
    squall_parallel(is_double ? SQUALL_PICK(spread_double) : SQUALL_PICK(spread_float), &w, chunks * w.num_tiles,
                    num_threads);
    squall_parallel(is_double ? SQUALL_PICK(many_double) : SQUALL_PICK(many_float), &w, chunks * num_blocks,
                    num_threads);
}

/* y = x @ weight, where x is the gradient by the output and y that by the input. */
SQUALL_EXPORT void squall_sparse_linear_input_grad(const void *columns, const void *codes, const void *values,
                                                   const void *rows, const void *starts, const void *tiles,
                                                   const void *x, void *y, void *shared, void *own, int64_t num_own,
                                                   int64_t num_rows, int64_t num_columns, int64_t row_block,
                                                   int64_t batch, int is_double, int num_threads)
{
    struct linear w = {.columns = columns, .codes = codes, .values = values, .rows = rows, .starts = starts,
                       .tiles = tiles, .x = x, .y = y, .shared = shared, .own = own, .num_own = num_own,
                       .num_rows = num_rows, .num_columns = num_columns, .row_block = row_block, .batch = batch,
                       .num_tiles = (num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS};
    int64_t num_blocks = (num_rows + row_block - 1) / row_block;
    int64_t chunks = (batch + num_lanes(is_double) - 1) / num_lanes(is_double);
    squall_parallel(is_double ? SQUALL_PICK(spread_rows_double) : SQUALL_PICK(spread_rows_float), &w,
                    chunks * num_blocks, num_threads);
    squall_parallel(is_double ? SQUALL_PICK(back_double) : SQUALL_PICK(back_float), &w, chunks * w.num_tiles,
                    num_threads);
}

/* y[i] = sum over the batch of grad[row i] * x[column i]; `shared` has x and grad, transposed. */
SQUALL_EXPORT void squall_sparse_weight_grad(const void *x, const void *grad, const void *row_starts,
                                             const void *columns, void *y, void *shared, int64_t num_rows,
                                             int64_t num_columns, int64_t batch, int is_double, int num_threads)
{
    struct live live = {.x = x, .grad = grad, .row_starts = row_starts, .columns = columns, .y = y, .shared = shared,
                        .num_rows = num_rows, .num_columns = num_columns, .batch = batch};
    int64_t blocks = (num_rows + num_columns + LIVE_SPREAD - 1) / LIVE_SPREAD;
    int64_t chunks = (batch + num_lanes(is_double) - 1) / num_lanes(is_double);
    squall_parallel(is_double ? SQUALL_PICK(live_spread_double) : SQUALL_PICK(live_spread_float), &live,
                    chunks * blocks, num_threads);
    squall_parallel(is_double ? SQUALL_PICK(live_double) : SQUALL_PICK(live_float), &live,
                    (num_rows + LIVE_ROWS - 1) / LIVE_ROWS, num_threads);
}
