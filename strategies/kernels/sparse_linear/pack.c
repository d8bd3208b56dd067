/* Lay a sparse matrix out as kernel.c reads it; packed.py says what that is. A run is a row's weights in one tile. */
#include <string.h>

#include "../native/native.h"
#include "layout.h"

/* Count the weights of each run (rows are the slow index), and find each one's column in its tile. Returns how many
 * positions ascend within the matrix: what comes behind is not looked at. */
#define COUNT(NAME, TYPE)                                                                                              \
    SQUALL_EXPORT int64_t NAME(const TYPE *positions, int64_t num, int64_t num_rows, int64_t num_columns,              \
                               int64_t num_tiles, uint8_t *lengths, uint8_t *columns)                                  \
    {                                                                                                                  \
        int64_t row = -1, end = 0, last = -1, all = num_rows * num_columns;                                            \
        for (int64_t i = 0; i < num; i++) {                                                                            \
            int64_t at = positions[i];                                                                                 \
            if (at <= last || at >= all)                                                                               \
                return i;                                                                                              \
            last = at;                                                                                                 \
            if (at >= end) {                                                                                           \
                row = at / num_columns;                                                                                \
                end = (row + 1) * num_columns;                                                                         \
            }                                                                                                          \
            uint64_t column = (uint64_t)(at - (end - num_columns)), tile = column / TILE_COLUMNS;                      \
            columns[i] = (uint8_t)(column - tile * TILE_COLUMNS);                                                      \
            lengths[row * num_tiles + (int64_t)tile]++;                                                                \
        }                                                                                                              \
        return num;                                                                                                    \
    }
COUNT(squall_pack_count_32, int32_t)
COUNT(squall_pack_count_64, int64_t)

/* Sort the rows of each tile by the lengths of their runs, and cut them into slices: `rows`, and the lengths of theirs.
 * Returns how many there are. */
SQUALL_EXPORT int64_t squall_pack_slices(const uint8_t *restrict lengths, int64_t num_rows, int64_t num_tiles,
                                         int64_t row_block, int16_t *rows, uint8_t *sorted, int64_t *starts,
                                         int64_t *tiles)
{
    int64_t num_slices = 0, num_steps = 0, *next_tile = tiles;
    for (int64_t begin = 0; begin < num_rows; begin += row_block)
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            int64_t end = begin + row_block < num_rows ? begin + row_block : num_rows, ranks[TILE_COLUMNS + 2] = {0};
            /* How many rows are longer: the rank of the first one of each length. */
            for (int64_t row = begin; row < end; row++)
                ranks[lengths[row * num_tiles + tile]]++;
            int64_t num_longer = 0;
            for (int length = TILE_COLUMNS; length > 0; length--) {
                int64_t num = ranks[length];
                ranks[length] = num_longer;
                num_longer += num;
            }
            int64_t num = (num_longer + SLICE - 1) / SLICE;
            int16_t *lanes = rows + num_slices * SLICE;
            for (int64_t lane = num_longer; lane < num * SLICE; lane++)
                lanes[lane] = (int16_t)row_block;
            memset(sorted + num_slices * SLICE + num_longer, 0, (size_t)(num * SLICE - num_longer));
            /* A slice is as long as its first row, the longest. */
            for (int64_t row = begin; row < end; row++) {
                int length = lengths[row * num_tiles + tile];
                if (!length)
                    continue;
                int64_t rank = ranks[length]++;
                lanes[rank] = (int16_t)(row - begin);
                sorted[num_slices * SLICE + rank] = (uint8_t)length;
                if (rank % SLICE == 0)
                    starts[num_slices + rank / SLICE] = length;
            }
            for (int64_t slice = num_slices; slice < num_slices + num; slice++) {
                int64_t depth = starts[slice];
                starts[slice] = num_steps;
                num_steps += depth;
            }
            *next_tile++ = num_slices;
            num_slices += num;
        }
    *next_tile = num_slices;
    starts[num_slices] = num_steps;
    return num_slices;
}
