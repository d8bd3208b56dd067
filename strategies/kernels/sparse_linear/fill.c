/* Bring the weights of a sparse matrix to where kernel.c reads them; see pack.c. */
#include <string.h>

#include "../native/native.h"
#include "layout.h"

enum { GROUP = 16, LINE = 64 };

/* The runs of a slice: a row each, which begin somewhere in a row of bytes that ends at `num`. */
struct runs {
    int64_t at[SLICE], length[SLICE], depth, num;
};

/* Write a slice of bytes step by step: those of its runs, and behind their ends `filler`. May write 3 steps more. */
static void spread_plain(const struct runs *runs, const uint8_t *restrict from, uint8_t filler, uint8_t *restrict to)
{
    for (int lane = 0; lane < SLICE; lane++)
        for (int64_t i = 0; i < runs->depth; i++)
            to[i * SLICE + BYTE_OF(lane)] = i < runs->length[lane] ? from[runs->at[lane] + i] : filler;
}

#if SQUALL_HAS_X86
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

/* The next 16 bytes of a run; what lies behind its end is `filler`. */
AVX2 SQUALL_INLINE __m128i take(const struct runs *runs, int lane, int64_t begin, const uint8_t *from, uint8_t filler)
{
    int64_t left = runs->length[lane] - begin, at = runs->at[lane] + begin;
    uint8_t last[GROUP];
    if (left <= 0)
        return _mm_set1_epi8((char)filler);
    if (at + GROUP > runs->num) {
        memcpy(last, from + at, (size_t)left);
        from = last, at = 0;
    }
    const __m128i steps = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i there = _mm_cmpgt_epi8(_mm_set1_epi8((char)left), steps);
    return _mm_blendv_epi8(_mm_set1_epi8((char)filler), _mm_loadu_si128((const __m128i *)(from + at)), there);
}

/* Two lanes, 4 apart. */
AVX2 SQUALL_INLINE __m256i take_two(const struct runs *runs, int lane, int64_t begin, const uint8_t *from,
                                    uint8_t filler)
{
    __m256i low = _mm256_castsi128_si256(take(runs, lane, begin, from, filler));
    return _mm256_inserti128_si256(low, take(runs, lane + 4, begin, from, filler), 1);
}

/* Bytes of four lanes, 16 apart, are a number of 32 bits of each step; four neighbours of these are turned at once, in
 * both halves of registers. Larger ones gain nothing: it is memory that takes time. */
AVX2 static void spread_avx2(const struct runs *runs, const uint8_t *restrict from, uint8_t filler,
                             uint8_t *restrict to)
{
    for (int64_t begin = 0; begin < runs->depth; begin += GROUP, to += GROUP * SLICE)
        for (int lane = 0; lane < SLICE / 4; lane += 8) {
            __m256i numbers[4][4];
            SQUALL_UNROLL for (int i = 0; i < 4; i++) {
                __m256i a = take_two(runs, lane + i, begin, from, filler);
                __m256i b = take_two(runs, lane + i + 16, begin, from, filler);
                __m256i c = take_two(runs, lane + i + 32, begin, from, filler);
                __m256i d = take_two(runs, lane + i + 48, begin, from, filler);
                __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
                __m256i low_too = _mm256_unpacklo_epi8(c, d), high_too = _mm256_unpackhi_epi8(c, d);
                numbers[0][i] = _mm256_unpacklo_epi16(low, low_too);
                numbers[1][i] = _mm256_unpackhi_epi16(low, low_too);
                numbers[2][i] = _mm256_unpacklo_epi16(high, high_too);
                numbers[3][i] = _mm256_unpackhi_epi16(high, high_too);
            }
            SQUALL_UNROLL for (int i = 0; i < 4; i++) {
                if (begin + 4 * i >= runs->depth)
                    break;
                __m256i *four = numbers[i];
                __m256i low = _mm256_unpacklo_epi32(four[0], four[1]), high = _mm256_unpackhi_epi32(four[0], four[1]);
                __m256i low_too = _mm256_unpacklo_epi32(four[2], four[3]);
                __m256i high_too = _mm256_unpackhi_epi32(four[2], four[3]);
                __m256i steps[] = {_mm256_unpacklo_epi64(low, low_too), _mm256_unpackhi_epi64(low, low_too),
                                   _mm256_unpacklo_epi64(high, high_too), _mm256_unpackhi_epi64(high, high_too)};
                SQUALL_UNROLL for (int k = 0; k < 4; k++)
                    _mm256_storeu_si256((__m256i *)(to + (4 * i + k) * SLICE + 4 * lane), steps[k]);
            }
        }
}
#define SPREAD(...) (squall_isa ? spread_avx2(__VA_ARGS__) : spread_plain(__VA_ARGS__))
#else
#define SPREAD(...) spread_plain(__VA_ARGS__)
#endif

/* Values that are no codes are neighbours where their slots are. */
#define SPREAD_WIDE(TYPE)                                                                                              \
    static void spread_##TYPE(const struct runs *runs, const TYPE *restrict from, TYPE *restrict to)                   \
    {                                                                                                                  \
        int64_t shared = runs->depth;                                                                                  \
        for (int lane = 0; lane < SLICE; lane++)                                                                       \
            shared = runs->length[lane] < shared ? runs->length[lane] : shared;                                        \
        for (int64_t i = 0; i < shared; i++)                                                                           \
            SQUALL_UNROLL for (int lane = 0; lane < SLICE; lane++)                                                     \
                to[i * SLICE + lane] = from[runs->at[lane] + i];                                                       \
        for (int lane = 0; shared < runs->depth && lane < SLICE; lane++)                                               \
            for (int64_t i = shared; i < runs->depth; i++)                                                             \
                to[i * SLICE + lane] = i < runs->length[lane] ? from[runs->at[lane] + i] : 0;                          \
    }
SPREAD_WIDE(uint32_t)
SPREAD_WIDE(uint64_t)

/* Bring weights, in the order of their positions, to their slots, and fill the others up; `width` is a value's bytes,
 * those of 1 are codes. Slots are those of `rows`, whose runs have `lengths`. Of each row `next` is the weight that
 * comes next, its first one as this begins. Where there are bytes, there is room for 3 steps more than there are. */
SQUALL_EXPORT void squall_pack_fill(const int16_t *rows, const uint8_t *lengths, const int64_t *starts,
                                    const int64_t *tiles, int64_t num_rows, int64_t num_tiles, int64_t row_block,
                                    const uint8_t *columns, const void *values, int64_t num, int width, int64_t *next,
                                    uint8_t *to_columns, void *to_values)
{
    struct runs runs = {.num = num};
    for (int64_t begin = 0; begin < num_rows; begin += row_block)
        for (int64_t tile = 0; tile < num_tiles; tile++, tiles++)
            for (int64_t slice = tiles[0]; slice < tiles[1]; slice++) {
                int64_t slot = starts[slice] * SLICE;
                runs.depth = starts[slice + 1] - starts[slice];
                for (int lane = 0; lane < SLICE; lane++) {
                    int64_t length = lengths[slice * SLICE + lane], at = 0;
                    if (length) { /* else it isn't the lane of a row */
                        int64_t *of_row = next + begin + rows[slice * SLICE + lane];
                        at = *of_row;
                        *of_row += length;
                        /* The processor foresees no row's next line: there are too many rows. */
                        __builtin_prefetch(columns + at + LINE);
                        __builtin_prefetch((const char *)values + (at + LINE / width) * width);
                    }
                    runs.at[lane] = at;
                    runs.length[lane] = length;
                }
                SPREAD(&runs, columns, TILE_COLUMNS, to_columns + slot);
                if (width == 1)
                    SPREAD(&runs, (const uint8_t *)values, 0, (uint8_t *)to_values + slot);
                else if (width == 4)
                    spread_uint32_t(&runs, (const uint32_t *)values, (uint32_t *)to_values + slot);
                else
                    spread_uint64_t(&runs, (const uint64_t *)values, (uint64_t *)to_values + slot);
            }
}
