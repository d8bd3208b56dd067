/* Lay a sparse matrix out as kernel.c reads it; packed.py says what that is. A run is a row's weights in one tile. */
#include <string.h>

#include "../native/native.h"

enum { TILE_COLUMNS = 127, SLICE = 64 };

/* Where a slot's byte is in a step; as in kernel.c. */
#define BYTE_OF(slot) (4 * ((slot) % 16) + (slot) / 16)

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

/* A counter that is read before the processor has written it makes it wait, so neighbours count in different ones. */
enum { COUNTERS = 4 };

static void add_up(uint8_t *restrict lengths, uint8_t *restrict counters, int64_t num_tiles)
{
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int i = 0; i < COUNTERS; i++)
            lengths[tile] = (uint8_t)(lengths[tile] + counters[i * num_tiles + tile]);
    memset(counters, 0, (size_t)(COUNTERS * num_tiles));
}

/* Count gaps 16 at a time, as far as they lead to weights of this row. Returns how many that was; `column` goes on. */
#if SQUALL_HAS_X86
#include <immintrin.h>

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2"))) static int64_t
count_avx512(const uint8_t *restrict gaps, int64_t num, int64_t num_columns, int64_t num_tiles,
             uint8_t *restrict counters, uint8_t *restrict columns, int64_t *column)
{
    enum { GROUP = 16 };
    const __m512i zero = _mm512_setzero_si512(), highest = _mm512_set1_epi32(GROUP - 1);
    __m512i before = _mm512_set1_epi32((int)*column);
    int64_t i = 0;
    for (; i + GROUP <= num; i += GROUP) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(gaps + i));
        __m512i at = _mm512_cvtepu8_epi32(bytes);
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 1));
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 2));
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 4));
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 8));
        __m512i after = _mm512_add_epi32(before, _mm512_permutexvar_epi32(highest, at));
        if (_mm_cmpeq_epi8_mask(bytes, _mm_setzero_si128()) || _mm512_cvtsi512_si32(after) >= num_columns)
            break;
        at = _mm512_add_epi32(at, before);
        before = after;
        /* A half keeps the quotient's error away from where it would count. */
        __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(at), _mm512_set1_ps(0.5f));
        __m512i tile = _mm512_cvttps_epi32(_mm512_mul_ps(middle, _mm512_set1_ps(1.0f / TILE_COLUMNS)));
        at = _mm512_sub_epi32(at, _mm512_mullo_epi32(tile, _mm512_set1_epi32(TILE_COLUMNS)));
        _mm_storeu_si128((__m128i *)(columns + i), _mm512_cvtepi32_epi8(at));
        int32_t tiles[GROUP];
        _mm512_storeu_si512(tiles, tile);
        SQUALL_UNROLL for (int k = 0; k < GROUP; k++)
            counters[(k % COUNTERS) * num_tiles + tiles[k]]++;
    }
    *column = _mm512_cvtsi512_si32(before);
    return i;
}
#define COUNT_SOME(GAPS, NUM, COLUMNS)                                                                                 \
    (sizeof *(GAPS) == 1 && squall_isa == 2 && num_columns < 1 << 20                                                   \
         ? count_avx512((const uint8_t *)(GAPS), NUM, num_columns, num_tiles, counters, COLUMNS, &column)              \
         : 0)
#else
#define COUNT_SOME(GAPS, NUM, COLUMNS) 0
#endif

/* As COUNT, of weights whose positions are sums of gaps: one goes on from the last weight, and one of 0 does so by
 * `longest` to no weight. `ends` tells how many weights there are, and where the last gap has led to; columns have room
 * for `num`, and what is behind those, or outside of the matrix, is but counted. `counters`, COUNTERS for each tile of a
 * row, are 0. */
#define COUNT_GAPS(NAME, GAP)                                                                                          \
    SQUALL_EXPORT void NAME(const GAP *restrict gaps, int64_t num_gaps, int64_t longest, int64_t num,                  \
                            int64_t num_rows, int64_t num_columns, int64_t num_tiles, uint8_t *restrict lengths,       \
                            uint8_t *restrict counters, uint8_t *restrict columns, int64_t *ends)                      \
    {                                                                                                                  \
        int64_t column = -1, row = 0, found = 0, i = 0;                                                                \
        for (int64_t again = 0; i < num_gaps && found < num; i++) {                                                    \
            if (i >= again && row < num_rows) {                                                                        \
                int64_t left = num_gaps - i < num - found ? num_gaps - i : num - found;                                \
                int64_t some = COUNT_SOME(gaps + i, left, columns + found);                                            \
                i += some;                                                                                             \
                found += some;                                                                                         \
                again = i + 16;                                                                                        \
                if (some == left)                                                                                      \
                    break;                                                                                             \
            }                                                                                                          \
            int64_t gap = gaps[i];                                                                                     \
            column += gap ? gap : longest;                                                                             \
            if (column >= num_columns) {                                                                               \
                if (row < num_rows)                                                                                    \
                    add_up(lengths + row * num_tiles, counters, num_tiles);                                            \
                for (; column >= num_columns && row < num_rows; row++)                                                 \
                    column -= num_columns;                                                                             \
                if (row >= num_rows) {                                                                                 \
                    found += gap != 0;                                                                                 \
                    i++;                                                                                               \
                    break;                                                                                             \
                }                                                                                                      \
            }                                                                                                          \
            uint64_t tile = (uint64_t)column / TILE_COLUMNS;                                                           \
            columns[found] = (uint8_t)((uint64_t)column - tile * TILE_COLUMNS);                                        \
            counters[(i % COUNTERS) * num_tiles + (int64_t)tile] += gap != 0;                                          \
            found += gap != 0;                                                                                         \
        }                                                                                                              \
        if (row < num_rows)                                                                                            \
            add_up(lengths + row * num_tiles, counters, num_tiles);                                                    \
        int64_t at = row * num_columns + column;                                                                       \
        for (; i < num_gaps; i++) {                                                                                    \
            at += gaps[i] ? gaps[i] : longest;                                                                         \
            found += gaps[i] != 0;                                                                                     \
        }                                                                                                              \
        ends[0] = found;                                                                                               \
        ends[1] = at;                                                                                                  \
    }
COUNT_GAPS(squall_pack_count_gaps_8, uint8_t)
COUNT_GAPS(squall_pack_count_gaps_16, uint16_t)

/* Sort the rows of each tile by the lengths of their runs, and cut them into slices. Returns how many there are. */
SQUALL_EXPORT int64_t squall_pack_slices(const uint8_t *lengths, int64_t num_rows, int64_t num_tiles, int64_t row_block,
                                         int16_t *rows, int64_t *starts, int64_t *tiles)
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
            /* A slice is as long as its first row, the longest. */
            for (int64_t row = begin; row < end; row++) {
                int length = lengths[row * num_tiles + tile];
                if (!length)
                    continue;
                int64_t rank = ranks[length]++;
                lanes[rank] = (int16_t)(row - begin);
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

/* Bring weights, in the order of their positions, to their slots, and fill the others up. Step after step is written as
 * far as all rows of a slice have weights, and what is left row by row. Of each row `next` is the weight that comes next,
 * its first one as this begins. */
#define FILL(NAME, TYPE)                                                                                               \
    SQUALL_EXPORT void NAME(const uint8_t *lengths, const int16_t *rows, const int64_t *starts, const int64_t *tiles,  \
                            int64_t num_rows, int64_t num_tiles, int64_t row_block, const uint8_t *restrict columns,   \
                            const TYPE *restrict values, int64_t *next, uint8_t *restrict to_columns,                  \
                            TYPE *restrict to_values)                                                                  \
    {                                                                                                                  \
        for (int64_t begin = 0; begin < num_rows; begin += row_block)                                                  \
            for (int64_t tile = 0; tile < num_tiles; tile++, tiles++)                                                  \
                for (int64_t slice = tiles[0]; slice < tiles[1]; slice++) {                                            \
                    int64_t slot = starts[slice] * SLICE, depth = starts[slice + 1] - starts[slice], at[SLICE];        \
                    int64_t length[SLICE], shared = depth;                                                             \
                    uint8_t *column = to_columns + slot;                                                               \
                    TYPE *value = to_values + slot;                                                                    \
                    for (int lane = 0; lane < SLICE; lane++) {                                                         \
                        int64_t row = begin + rows[slice * SLICE + lane];                                              \
                        length[lane] = at[lane] = 0;                                                                   \
                        if (row < begin + row_block) {                                                                 \
                            length[lane] = lengths[row * num_tiles + tile];                                            \
                            at[lane] = next[row];                                                                      \
                            next[row] += length[lane];                                                                 \
                        }                                                                                              \
                        shared = length[lane] < shared ? length[lane] : shared;                                        \
                    }                                                                                                  \
                    for (int64_t i = 0; i < shared; i++)                                                               \
                        SQUALL_UNROLL for (int lane = 0; lane < SLICE; lane++) {                                       \
                            column[i * SLICE + BYTE_OF(lane)] = columns[at[lane] + i];                                 \
                            value[i * SLICE + (sizeof(TYPE) == 1 ? BYTE_OF(lane) : lane)] = values[at[lane] + i];      \
                        }                                                                                              \
                    for (int lane = 0; shared < depth && lane < SLICE; lane++)                                         \
                        for (int64_t i = shared; i < depth; i++) {                                                     \
                            int there = i < length[lane];                                                              \
                            column[i * SLICE + BYTE_OF(lane)] = there ? columns[at[lane] + i] : TILE_COLUMNS;          \
                            value[i * SLICE + (sizeof(TYPE) == 1 ? BYTE_OF(lane) : lane)] =                            \
                                there ? values[at[lane] + i] : 0;                                                      \
                        }                                                                                              \
                }                                                                                                      \
    }
FILL(squall_pack_fill_1, uint8_t)
FILL(squall_pack_fill_4, uint32_t)
FILL(squall_pack_fill_8, uint64_t)
