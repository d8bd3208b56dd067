/* The part of template.h that computes one number a live weight: the gradient by weights. */

/* Transpose some columns of x, or else of grad, of a chunk of the batch. */
ISA_TARGET static void F(live_spread)(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct live *live = context;
    int64_t width = live->num_columns + live->num_rows, blocks = (width + LIVE_SPREAD - 1) / LIVE_SPREAD;
    int64_t begin = index % blocks * LIVE_SPREAD, end = at_most(begin + LIVE_SPREAD, width), chunk = index / blocks;
    int64_t sample = chunk * 2 * LANE, lanes = F(vectors)(live->batch, chunk) * LANE;
    int64_t num = at_most(lanes, live->batch - sample), edge = live->num_columns;
    REAL *out = (REAL *)live->shared + sample * width;
    if (begin < edge)
        F(transpose)((const REAL *)live->x + sample * edge + begin, edge, at_most(end, edge) - begin, num, lanes,
                     out + begin * lanes);
    if (end > edge) {
        int64_t row = begin < edge ? 0 : begin - edge;
        F(transpose)((const REAL *)live->grad + sample * live->num_rows + row, live->num_rows, end - edge - row, num,
                     lanes, out + (edge + row) * lanes);
    }
}

/* Sums of LANE vectors, each into its own lane. */
ISA_TARGET SQUALL_INLINE VECTOR F(sums)(const VECTOR *parts)
{
    VECTOR total;
    for (int64_t i = 0; i < LANE; i++) {
        REAL sum = 0;
        for (int64_t lane = 0; lane < LANE; lane++)
            sum += parts[i][lane];
        total[i] = sum;
    }
    return total;
}

/* Add grad @ x of the weights `from` to `to` of a row. */
ISA_TARGET SQUALL_INLINE void F(run)(const struct live *live, int64_t from, int64_t to, const VECTOR *x,
                                     const VECTOR *grad, const int vectors)
{
    REAL *y = live->y;
    for (; from < to; from += LANE) {
        int64_t num = at_most(LANE, to - from);
        VECTOR parts[LANE];
        for (int64_t i = 0; i < LANE; i++) {
            const VECTOR *restrict here = x + (int64_t)live->columns[i < num ? from + i : to - 1] * vectors;
            parts[i] = here[0] * grad[0];
            if (vectors == 2)
                parts[i] += here[1] * grad[1];
        }
        VECTOR total = F(sums)(parts);
        for (int64_t i = 0; i < num; i++)
            y[from + i] += total[i];
    }
}

/* A block of rows: for each chunk of the batch and each range of columns, what lives there. */
ISA_TARGET static void F(live)(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct live *live = context;
    int64_t begin = index * LIVE_ROWS, num_rows = at_most(LIVE_ROWS, live->num_rows - begin);
    int64_t width = live->num_columns + live->num_rows;
    const int64_t *starts = live->row_starts + begin;
    memset((REAL *)live->y + starts[0], 0, (size_t)(starts[num_rows] - starts[0]) * sizeof(REAL));
    for (int64_t sample = 0; sample < live->batch; sample += 2 * LANE) {
        int vectors = F(vectors)(live->batch, sample / (2 * LANE));
        const VECTOR *x = (const VECTOR *)((const REAL *)live->shared + sample * width);
        const VECTOR *grad = x + (live->num_columns + begin) * vectors;
        int64_t at[LIVE_ROWS];
        memcpy(at, starts, (size_t)num_rows * sizeof(int64_t));
        for (int64_t edge = LIVE_COLUMNS; edge < live->num_columns + LIVE_COLUMNS; edge += LIVE_COLUMNS)
            for (int64_t row = 0; row < num_rows; row++) {
                int64_t from = at[row], to = from;
                while (to < starts[row + 1] && live->columns[to] < edge)
                    to++;
                at[row] = to;
                if (vectors == 2)
                    F(run)(live, from, to, x, grad + row * 2, 2);
                else
                    F(run)(live, from, to, x, grad + row, 1);
            }
    }
}
