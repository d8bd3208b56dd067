/* Find where weights go whose positions are sums of gaps, as compressed files have them; see pack.c. */
#include <string.h>

#include "../native/native.h"
#include "layout.h"

static const int64_t MOST = 1 << 30; /* gaps that are counted at once, by numbers of 32 bits */

/* Where weights are as they are counted: how far the row is, and which one. */
struct place {
    int64_t column, row;
};

#if SQUALL_HAS_X86
#include <immintrin.h>

enum { GROUP = 16, MOST_RUNS = 1024 };

/* The runs of a row, or of a part of one: their tiles, and where they begin. */
struct row {
    int32_t tiles[MOST_RUNS + GROUP], begins[MOST_RUNS + GROUP];
    int64_t num;
};

static void count_row(struct row *row, int64_t end, uint8_t *restrict lengths)
{
    row->begins[row->num] = (int32_t)end;
    for (int64_t i = 0; i < row->num; i++)
        lengths[row->tiles[i]] = (uint8_t)(lengths[row->tiles[i]] + row->begins[i + 1] - row->begins[i]);
    row->num = 0;
}

/* Count gaps 16 at a time, up to one that leads to no weight. Where a run begins is all that has to be known of it.
 * Columns of what turns out to be in the next row are written again. Returns how many that was. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,popcnt"))) static int64_t
count_avx512(const uint8_t *restrict gaps, int64_t num, int64_t num_rows, int64_t num_columns, int64_t num_tiles,
             uint8_t *restrict lengths, uint8_t *restrict columns, struct place *place)
{
    const __m512i zero = _mm512_setzero_si512(), none = _mm512_set1_epi32(-1);
    const __m512i end = _mm512_set1_epi32((int)num_columns);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i highest = _mm512_set1_epi32(GROUP - 1);
    __m512i before = _mm512_set1_epi32((int)place->column), tile_before = none;
    struct row row;
    row.num = 0;
    int64_t i = 0;
    while (i + GROUP <= num && place->row < num_rows) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(gaps + i));
        if (_mm_cmpeq_epi8_mask(bytes, _mm_setzero_si128()))
            break;
        __m512i at = _mm512_cvtepu8_epi32(bytes);
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 1));
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 2));
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 4));
        at = _mm512_add_epi32(at, _mm512_alignr_epi32(at, zero, GROUP - 8));
        __m512i after = _mm512_add_epi32(before, _mm512_permutexvar_epi32(highest, at));
        at = _mm512_add_epi32(at, before);
        __mmask16 here = _mm512_cmplt_epi32_mask(at, end);
        /* A half keeps the quotient's error away from where it would count. */
        __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(at), _mm512_set1_ps(0.5f));
        __m512i tile = _mm512_cvttps_epi32(_mm512_mul_ps(middle, _mm512_set1_ps(1.0f / TILE_COLUMNS)));
        __m512i column = _mm512_add_epi32(_mm512_sub_epi32(at, _mm512_slli_epi32(tile, 7)), tile);
        _mm_storeu_si128((__m128i *)(columns + i), _mm512_cvtepi32_epi8(column));
        __mmask16 begins = here & _mm512_cmpneq_epi32_mask(tile, _mm512_alignr_epi32(tile, tile_before, GROUP - 1));
        __m512i number = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(row.tiles + row.num, _mm512_maskz_compress_epi32(begins, tile));
        _mm512_storeu_si512(row.begins + row.num, _mm512_maskz_compress_epi32(begins, number));
        row.num += __builtin_popcount(begins);
        if (here == 0xffff) {
            before = after;
            tile_before = tile;
            i += GROUP;
            if (row.num <= MOST_RUNS - GROUP)
                continue;
        } else { /* positions ascend, so it is the first ones that are in this row */
            int num_here = __builtin_popcount(here);
            int32_t last[1 + GROUP] = {_mm512_cvtsi512_si32(before)};
            _mm512_storeu_si512(last + 1, at);
            before = _mm512_set1_epi32(last[num_here] - (int32_t)num_columns);
            i += num_here;
        }
        count_row(&row, i, lengths + place->row * num_tiles);
        place->row += here != 0xffff;
        tile_before = none;
    }
    if (place->row < num_rows)
        count_row(&row, i, lengths + place->row * num_tiles);
    place->column = _mm512_cvtsi512_si32(before);
    return i;
}
#define COUNT_SOME(GAPS, NUM, COLUMNS)                                                                                 \
    (sizeof *(GAPS) == 1 && squall_isa == 2 && num_columns < 1 << 20                                                   \
         ? count_avx512((const uint8_t *)(GAPS), NUM, num_rows, num_columns, num_tiles, lengths, COLUMNS, &at)         \
         : 0)
#else
#define COUNT_SOME(GAPS, NUM, COLUMNS) 0
#endif

/* A counter that is read before the processor has written it makes it wait, so neighbours count in different ones. */
enum { COUNTERS = 4 };

static void add_up(uint8_t *restrict lengths, uint8_t *restrict counters, int64_t num_tiles)
{
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int i = 0; i < COUNTERS; i++)
            lengths[tile] = (uint8_t)(lengths[tile] + counters[i * num_tiles + tile]);
    memset(counters, 0, (size_t)(COUNTERS * num_tiles));
}

/* Count the weights of each run, and find each one's column in its tile, where positions are sums of gaps: one goes on
 * from the last weight, and one of 0 does so by `longest` to no weight. `ends` tells how many weights there are, and
 * where the last gap has led to; columns have room for `num`, and what is behind those, or outside of the matrix, is
 * but counted. `counters`, COUNTERS for each tile of a row, are 0. */
#define COUNT_GAPS(NAME, GAP)                                                                                          \
    SQUALL_EXPORT void NAME(const GAP *restrict gaps, int64_t num_gaps, int64_t longest, int64_t num,                  \
                            int64_t num_rows, int64_t num_columns, int64_t num_tiles, uint8_t *restrict lengths,       \
                            uint8_t *restrict counters, uint8_t *restrict columns, int64_t *ends)                      \
    {                                                                                                                  \
        struct place at = {.column = -1};                                                                              \
        int64_t found = 0, i = 0;                                                                                      \
        for (int64_t again = 0; i < num_gaps && found < num && at.row < num_rows; i++) {                               \
            if (i >= again) {                                                                                          \
                int64_t left = num_gaps - i < num - found ? num_gaps - i : num - found, row = at.row;                  \
                int64_t some = COUNT_SOME(gaps + i, left < MOST ? left : MOST, columns + found);                       \
                if (at.row != row)                                                                                     \
                    add_up(lengths + row * num_tiles, counters, num_tiles);                                            \
                i += some;                                                                                             \
                found += some;                                                                                         \
                again = i + 16;                                                                                        \
                if (some == left || at.row == num_rows)                                                                \
                    break;                                                                                             \
            }                                                                                                          \
            int64_t gap = gaps[i];                                                                                     \
            at.column += gap ? gap : longest;                                                                          \
            if (at.column >= num_columns) {                                                                            \
                add_up(lengths + at.row * num_tiles, counters, num_tiles);                                             \
                for (; at.column >= num_columns && at.row < num_rows; at.row++)                                        \
                    at.column -= num_columns;                                                                          \
                if (at.row == num_rows) {                                                                              \
                    found += gap != 0;                                                                                 \
                    i++;                                                                                               \
                    break;                                                                                             \
                }                                                                                                      \
            }                                                                                                          \
            uint64_t tile = (uint64_t)at.column / TILE_COLUMNS;                                                        \
            columns[found] = (uint8_t)((uint64_t)at.column - tile * TILE_COLUMNS);                                     \
            counters[(i % COUNTERS) * num_tiles + (int64_t)tile] += gap != 0;                                          \
            found += gap != 0;                                                                                         \
        }                                                                                                              \
        if (at.row < num_rows)                                                                                         \
            add_up(lengths + at.row * num_tiles, counters, num_tiles);                                                 \
        int64_t last = at.row * num_columns + at.column;                                                               \
        for (; i < num_gaps; i++) {                                                                                    \
            last += gaps[i] ? gaps[i] : longest;                                                                       \
            found += gaps[i] != 0;                                                                                     \
        }                                                                                                              \
        ends[0] = found;                                                                                               \
        ends[1] = last;                                                                                                \
    }
COUNT_GAPS(squall_pack_count_gaps_8, uint8_t)
COUNT_GAPS(squall_pack_count_gaps_16, uint16_t)
