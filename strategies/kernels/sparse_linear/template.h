/* One instruction set and one type of kernel.c. */
#define F(name) SQUALL_JOIN(TYPED(name), ISA)
#define VECTOR TYPED(vector)
/* A vector has LANE numbers, whatever registers it takes; a chunk of the batch has one or two of them. */
#define LANE ((int64_t)(64 / sizeof(REAL)))
/* Rows whose sums are kept in registers. */
#define HELD (LANES / 4)

/* How many vectors chunk number `chunk` of a batch takes: two but for a short last one. */
ISA_TARGET SQUALL_INLINE int F(vectors)(int64_t batch, int64_t chunk)
{
    return batch - chunk * 2 * LANE > LANE ? 2 : 1;
}

#if IS_SINGLE
#include "../native/transpose.h"

/* out[column][lane] = in[lane][column] of 16 lanes and columns, as far as there are lanes. */
ISA_TARGET static void F(turn)(const float *in, int64_t stride, int64_t num, float *out, int64_t lanes)
{
    squall_numbers rows[SQUALL_WIDTH];
    SQUALL_UNROLL for (int i = 0; i < SQUALL_WIDTH; i++)
        rows[i] = i < num ? *(const squall_numbers *)(in + i * stride) : (squall_numbers){0};
    FN(transpose)(rows);
    SQUALL_UNROLL for (int i = 0; i < SQUALL_WIDTH; i++)
        *(squall_numbers *)(out + i * lanes) = rows[i];
}

/* out[lane][column] = in[column][lane] + bias[column] of 16 lanes and columns, as far as there are lanes. */
ISA_TARGET static void F(turn_back)(const float *in, int64_t lanes, int64_t num, int64_t stride, const float *bias,
                                    int relu, float *out)
{
    squall_numbers rows[SQUALL_WIDTH], added = {0};
    if (bias)
        added = *(const squall_numbers *)bias;
    SQUALL_UNROLL for (int i = 0; i < SQUALL_WIDTH; i++)
        rows[i] = *(const squall_numbers *)(in + i * lanes);
    FN(transpose)(rows);
    SQUALL_UNROLL for (int i = 0; i < SQUALL_WIDTH; i++) {
        squall_numbers value = rows[i] + added;
        if (relu)
            value = (squall_numbers)((squall_masks)value & ~(squall_masks)(value < 0));
        if (i < num)
            *(squall_numbers *)(out + i * stride) = value;
    }
}
#endif

/* out[column][lane] = in[lane][column] of `width` columns; lanes beyond `num` are zero. `stride` is between lanes. */
ISA_TARGET static void F(transpose)(const REAL *restrict in, int64_t stride, int64_t width, int64_t num, int64_t lanes,
                                    REAL *restrict out)
{
    int64_t done = 0;
#if IS_SINGLE
    for (; done + SQUALL_WIDTH <= width; done += SQUALL_WIDTH)
        for (int64_t lane = 0; lane < lanes; lane += SQUALL_WIDTH)
            F(turn)(in + lane * stride + done, stride, num - lane, out + done * lanes + lane, lanes);
#endif
    if (num < lanes)
        memset(out + done * lanes, 0, (size_t)((width - done) * lanes) * sizeof(REAL));
    for (int64_t lane = 0; lane < num; lane++)
        for (int64_t c = done; c < width; c++)
            out[c * lanes + lane] = in[lane * stride + c];
}

/* out[lane][column] = in[column][lane] + bias[column]. */
ISA_TARGET static void F(transpose_back)(const REAL *restrict in, int64_t lanes, int64_t width, int64_t num,
                                         int64_t stride, const REAL *restrict bias, int relu, REAL *restrict out)
{
    enum { SIDE = 16 };
    int64_t done = 0;
#if IS_SINGLE
    for (; lanes % SIDE == 0 && done + SIDE <= width; done += SIDE)
        for (int64_t lane = 0; lane < num; lane += SIDE)
            F(turn_back)(in + done * lanes + lane, lanes, num - lane, stride, bias ? bias + done : NULL, relu,
                         out + lane * stride + done);
#endif
    for (int64_t begin = done; begin < width; begin += SIDE) {
        int64_t end = at_most(begin + SIDE, width);
        for (int64_t lane = 0; lane < num; lane++)
            for (int64_t c = begin; c < end; c++) {
                REAL value = in[c * lanes + lane] + (bias ? bias[c] : 0);
                out[lane * stride + c] = relu && value < 0 ? 0 : value;
            }
    }
}

/* Batch 1: add the parts of one block of rows and one sample up. */
ISA_TARGET static void F(finish)(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct linear *w = context;
    int64_t sample = index % w->batch, block = index / w->batch, first = block * w->row_block;
    int64_t num = at_most(w->row_block, w->num_rows - first);
    REAL *restrict total = (REAL *)w->own + index * w->parts * w->num_own;
    for (int64_t part = 1; part < w->parts; part++) {
        const REAL *restrict more = total + part * w->num_own;
        for (int64_t i = 0; i < num; i++)
            total[i] += more[i];
    }
    F(transpose_back)(total, 1, num, 1, w->num_rows, w->bias ? (const REAL *)w->bias + first : NULL, w->relu,
                      (REAL *)w->y + sample * w->num_rows + first);
}

/* Batch 1: some tiles of one block of rows, and one sample. */
ISA_TARGET static void F(one)(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct linear *w = context;
    int64_t part = index % w->parts, sample = index / w->parts % w->batch, block = index / w->parts / w->batch;
    REAL *restrict total = (REAL *)w->own + index * w->num_own;
    const REAL *restrict values = w->values;
    memset(total, 0, (size_t)(w->row_block + 1) * sizeof(REAL));
    for (int64_t tile = first_tile(w, part); tile < first_tile(w, part + 1); tile++) {
        const REAL *restrict x = (const REAL *)w->shared + (sample * w->num_tiles + tile) * TILE;
        const int64_t *slices = w->tiles + block * w->num_tiles + tile;
        for (int64_t slice = slices[0]; slice < slices[1]; slice++) {
            REAL sum[SLICE] = {0};
            for (int64_t slot = w->starts[slice] * SLICE; slot < w->starts[slice + 1] * SLICE; slot += SLICE)
                for (int i = 0; i < SLICE; i++) {
                    int64_t byte = slot + BYTE_OF(i);
                    sum[i] += x[w->columns[byte]] * values[w->codes ? w->codes[byte] : slot + i];
                }
            const int16_t *restrict rows = w->rows + slice * SLICE;
            for (int i = 0; i < SLICE; i++)
                total[rows[i]] += sum[i];
        }
    }
}

/* Transpose a tile's columns of a chunk of the batch, and add columns of zeros. */
ISA_TARGET static void F(spread)(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct linear *w = context;
    int64_t tile = index % w->num_tiles, chunk = index / w->num_tiles, sample = chunk * 2 * LANE;
    int64_t lanes = F(vectors)(w->batch, chunk) * LANE, begin = tile * TILE_COLUMNS;
    int64_t width = at_most(TILE_COLUMNS, w->num_columns - begin);
    REAL *out = (REAL *)w->shared + (sample * w->num_tiles + tile * lanes) * TILE;
    F(transpose)((const REAL *)w->x + sample * w->num_columns + begin, w->num_columns, width,
                 at_most(lanes, w->batch - sample), lanes, out);
    memset(out + width * lanes, 0, (size_t)((TILE - width) * lanes) * sizeof(REAL));
}

/* The columns of HELD slots that are neighbours in the step at `slot`: each a byte, the first one the lowest. */
ISA_TARGET SQUALL_INLINE uint32_t F(columns)(const struct linear *w, int64_t slot, int byte)
{
    uint32_t columns = w->columns[slot + byte];
    if (HELD > 1) /* x86: its lowest byte is the first one */
        memcpy(&columns, w->columns + slot + byte, HELD);
    return columns;
}

/* Vectors of a column; to the compiler `from` is but an address, which it keeps in a register. */
ISA_TARGET SQUALL_INLINE VECTOR *F(of_column)(const char *from, uint32_t columns, int row, const int vectors)
{
    return (VECTOR *)(from + (size_t)(columns >> 8 * row & 255) * (size_t)vectors * sizeof(VECTOR));
}

/* Add a slice times the tile's x to the sums of its rows. */
ISA_TARGET SQUALL_INLINE void F(slice)(const struct linear *w, int64_t slice, const VECTOR *restrict x,
                                       VECTOR *restrict total, const int coded, const int vectors)
{
    int64_t begin = w->starts[slice] * SLICE, end = w->starts[slice + 1] * SLICE;
    const int16_t *restrict rows = w->rows + slice * SLICE;
    const REAL *restrict values = w->values;
    const char *from = (const char *)x;
    __asm__("" : "+r"(from));
    for (int byte = 0; byte < SLICE; byte += HELD) {
        VECTOR sum[HELD][2];
        SQUALL_UNROLL for (int row = 0; row < HELD; row++)
            SQUALL_UNROLL for (int v = 0; v < vectors; v++)
                sum[row][v] = total[rows[SLOT_OF(byte + row)] * vectors + v];
        /* The processor can't foresee where the next slice's steps are. */
        for (int64_t step = byte / HELD; step < (end - begin) / SLICE; step += SLICE / HELD) {
            int64_t at = end + step * SLICE;
            __builtin_prefetch(w->columns + at);
            if (coded)
                __builtin_prefetch(w->codes + at);
            else
                SQUALL_UNROLL for (int64_t i = 0; i < SLICE; i += LANE)
                    __builtin_prefetch(values + at + i);
        }
        for (int64_t slot = begin; slot < end; slot += SLICE) {
            uint32_t columns = F(columns)(w, slot, byte);
            SQUALL_UNROLL for (int row = 0; row < HELD; row++) {
                REAL value = values[coded ? w->codes[slot + byte + row] : slot + SLOT_OF(byte + row)];
                const VECTOR *restrict here = F(of_column)(from, columns, row, vectors);
                SQUALL_UNROLL for (int v = 0; v < vectors; v++)
                    sum[row][v] += value * here[v];
            }
        }
        SQUALL_UNROLL for (int row = 0; row < HELD; row++)
            SQUALL_UNROLL for (int v = 0; v < vectors; v++)
                total[rows[SLOT_OF(byte + row)] * vectors + v] = sum[row][v];
    }
}

ISA_TARGET SQUALL_INLINE void F(block)(const struct linear *w, int64_t block, const VECTOR *x, VECTOR *total,
                                       const int coded, const int vectors)
{
    for (int64_t tile = 0; tile < w->num_tiles; tile++, x += TILE * vectors) {
        const int64_t *slices = w->tiles + block * w->num_tiles + tile;
        for (int64_t slice = slices[0]; slice < slices[1]; slice++)
            F(slice)(w, slice, x, total, coded, vectors);
    }
}

/* Batches: one block of rows and one chunk of the batch, whose samples are the lanes. */
ISA_TARGET static void F(many)(void *context, int64_t index, int thread)
{
    const struct linear *w = context;
    int64_t num_blocks = (w->num_rows + w->row_block - 1) / w->row_block;
    int64_t block = index % num_blocks, chunk = index / num_blocks, sample = chunk * 2 * LANE;
    int vectors = F(vectors)(w->batch, chunk);
    const VECTOR *x = (const VECTOR *)((const REAL *)w->shared + sample * w->num_tiles * TILE);
    VECTOR *total = (VECTOR *)((REAL *)w->own + thread * w->num_own);
    memset(total, 0, (size_t)((w->row_block + 1) * vectors) * sizeof(VECTOR));
    if (w->codes && vectors == 2)
        F(block)(w, block, x, total, 1, 2);
    else if (w->codes)
        F(block)(w, block, x, total, 1, 1);
    else if (vectors == 2)
        F(block)(w, block, x, total, 0, 2);
    else
        F(block)(w, block, x, total, 0, 1);
    int64_t first = block * w->row_block;
    F(transpose_back)((const REAL *)total, vectors * LANE, at_most(w->row_block, w->num_rows - first),
                      at_most(vectors * LANE, w->batch - sample), w->num_rows,
                      w->bias ? (const REAL *)w->bias + first : NULL, w->relu,
                      (REAL *)w->y + sample * w->num_rows + first);
}

/* Transpose a block's rows of a chunk of the gradient, and add one of zeros. */
ISA_TARGET static void F(spread_rows)(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct linear *w = context;
    int64_t num_blocks = (w->num_rows + w->row_block - 1) / w->row_block, height = w->row_block + 1;
    int64_t block = index % num_blocks, chunk = index / num_blocks, sample = chunk * 2 * LANE;
    int64_t lanes = F(vectors)(w->batch, chunk) * LANE, begin = block * w->row_block;
    int64_t width = at_most(w->row_block, w->num_rows - begin);
    REAL *out = (REAL *)w->shared + (sample * num_blocks + block * lanes) * height;
    F(transpose)((const REAL *)w->x + sample * w->num_rows + begin, w->num_rows, width,
                 at_most(lanes, w->batch - sample), lanes, out);
    memset(out + width * lanes, 0, (size_t)((height - width) * lanes) * sizeof(REAL));
}

/* Add a slice, transposed, times the gradients of its rows to the tile's columns. */
ISA_TARGET SQUALL_INLINE void F(slice_back)(const struct linear *w, int64_t slice, const VECTOR *restrict grad,
                                            VECTOR *restrict total, const int coded, const int vectors)
{
    int64_t begin = w->starts[slice] * SLICE, end = w->starts[slice + 1] * SLICE;
    const int16_t *restrict rows = w->rows + slice * SLICE;
    const REAL *restrict values = w->values;
    const char *to = (const char *)total;
    __asm__("" : "+r"(to));
    for (int byte = 0; byte < SLICE; byte += HELD) {
        VECTOR held[HELD][2];
        SQUALL_UNROLL for (int row = 0; row < HELD; row++)
            SQUALL_UNROLL for (int v = 0; v < vectors; v++)
                held[row][v] = grad[rows[SLOT_OF(byte + row)] * vectors + v];
        for (int64_t slot = begin; slot < end; slot += SLICE) {
            uint32_t columns = F(columns)(w, slot, byte);
            SQUALL_UNROLL for (int row = 0; row < HELD; row++) {
                REAL value = values[coded ? w->codes[slot + byte + row] : slot + SLOT_OF(byte + row)];
                VECTOR *here = F(of_column)(to, columns, row, vectors);
                SQUALL_UNROLL for (int v = 0; v < vectors; v++)
                    here[v] += value * held[row][v];
            }
        }
    }
}

ISA_TARGET SQUALL_INLINE void F(tile_back)(const struct linear *w, int64_t tile, const VECTOR *grad, VECTOR *total,
                                           const int coded, const int vectors)
{
    int64_t num_blocks = (w->num_rows + w->row_block - 1) / w->row_block;
    for (int64_t block = 0; block < num_blocks; block++, grad += (w->row_block + 1) * vectors) {
        const int64_t *slices = w->tiles + block * w->num_tiles + tile;
        for (int64_t slice = slices[0]; slice < slices[1]; slice++)
            F(slice_back)(w, slice, grad, total, coded, vectors);
    }
}

/* The gradient by a tile's columns, of one chunk of the batch. */
ISA_TARGET static void F(back)(void *context, int64_t index, int thread)
{
    const struct linear *w = context;
    int64_t tile = index % w->num_tiles, chunk = index / w->num_tiles, sample = chunk * 2 * LANE;
    int64_t num_blocks = (w->num_rows + w->row_block - 1) / w->row_block, begin = tile * TILE_COLUMNS;
    int vectors = F(vectors)(w->batch, chunk);
    const VECTOR *grad = (const VECTOR *)((const REAL *)w->shared + sample * num_blocks * (w->row_block + 1));
    VECTOR *total = (VECTOR *)((REAL *)w->own + thread * w->num_own);
    memset(total, 0, (size_t)(TILE * vectors) * sizeof(VECTOR));
    if (w->codes && vectors == 2)
        F(tile_back)(w, tile, grad, total, 1, 2);
    else if (w->codes)
        F(tile_back)(w, tile, grad, total, 1, 1);
    else if (vectors == 2)
        F(tile_back)(w, tile, grad, total, 0, 2);
    else
        F(tile_back)(w, tile, grad, total, 0, 1);
    F(transpose_back)((const REAL *)total, vectors * LANE, at_most(TILE_COLUMNS, w->num_columns - begin),
                      at_most(vectors * LANE, w->batch - sample), w->num_columns, NULL, 0,
                      (REAL *)w->y + sample * w->num_columns + begin);
}

#include "live.h"

#undef F
#undef VECTOR
#undef LANE
#undef HELD
