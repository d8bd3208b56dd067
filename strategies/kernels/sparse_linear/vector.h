/* Batch 1 in single precision where registers can be looked up by bytes (AVX-512 VBMI).
 *
 * A tile's x is held in eight registers, as four planes of bytes: a lookup of each, and unpacking, gives 64 numbers in
 * a sixth of the time that gathering them from the nearest cache takes. Codebooks are held likewise.
 */
#define PAD(REAL)                                                                                                     \
    static void pad_##REAL(struct linear *w)                                                                          \
    {                                                                                                                 \
        REAL *out = w->shared;                                                                                        \
        for (int64_t sample = 0; sample < w->batch; sample++)                                                         \
            for (int64_t tile = 0; tile < w->num_tiles; tile++, out += TILE) {                                        \
                int64_t begin = tile * TILE_COLUMNS, width = at_most(TILE_COLUMNS, w->num_columns - begin);           \
                memcpy(out, (const REAL *)w->x + sample * w->num_columns + begin, (size_t)width * sizeof(REAL));      \
                memset(out + width, 0, (size_t)(TILE - width) * sizeof(REAL));                                        \
            }                                                                                                         \
    }
/* Put samples into tiles, with columns of zeros. */
PAD(float)
PAD(double)
#undef PAD

#if SQUALL_HAS_X86
#include <immintrin.h>

#define VBMI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma")))

/* 128 numbers as four planes of bytes, two registers each. */
VBMI_TARGET SQUALL_INLINE void planes(const float *numbers, __m512i *table)
{
    /* Byte `plane` of numbers 0 to 15 of a register is brought together; four registers make one of a plane. */
    const __m512i order = _mm512_set_epi8(
        63, 59, 55, 51, 47, 43, 39, 35, 31, 27, 23, 19, 15, 11, 7, 3, 62, 58, 54, 50, 46, 42, 38, 34, 30, 26, 22, 18,
        14, 10, 6, 2, 61, 57, 53, 49, 45, 41, 37, 33, 29, 25, 21, 17, 13, 9, 5, 1, 60, 56, 52, 48, 44, 40, 36, 32, 28,
        24, 20, 16, 12, 8, 4, 0);
    SQUALL_UNROLL for (int half = 0; half < 2; half++) {
        __m512i r[4];
        SQUALL_UNROLL for (int i = 0; i < 4; i++)
            r[i] = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(numbers + half * 64 + i * 16));
        __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
        __m512i c = _mm512_shuffle_i32x4(r[0], r[1], 0xee), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
        table[0 + half] = _mm512_shuffle_i32x4(a, b, 0x88);
        table[2 + half] = _mm512_shuffle_i32x4(a, b, 0xdd);
        table[4 + half] = _mm512_shuffle_i32x4(c, d, 0x88);
        table[6 + half] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

/* Bytes of four planes to numbers: lanes' groups of four come out as a 4 x 4 matrix transposed. */
VBMI_TARGET SQUALL_INLINE void join(__m512i p0, __m512i p1, __m512i p2, __m512i p3, __m512 *out)
{
    __m512i low = _mm512_unpacklo_epi8(p0, p1), high = _mm512_unpackhi_epi8(p0, p1);
    __m512i low2 = _mm512_unpacklo_epi8(p2, p3), high2 = _mm512_unpackhi_epi8(p2, p3);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, low2));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, low2));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high, high2));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high, high2));
}

VBMI_TARGET SQUALL_INLINE void look_up(__m512i index, const __m512i *t, __m512 *out)
{
    join(_mm512_permutex2var_epi8(t[0], index, t[1]), _mm512_permutex2var_epi8(t[2], index, t[3]),
         _mm512_permutex2var_epi8(t[4], index, t[5]), _mm512_permutex2var_epi8(t[6], index, t[7]), out);
}

/* From 256 numbers, in two tables. */
VBMI_TARGET SQUALL_INLINE void look_up_wide(__m512i index, const __m512i *t, const __m512i *u, __m512 *out)
{
    __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i p[4];
    SQUALL_UNROLL for (int i = 0; i < 4; i++)
        p[i] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t[2 * i], index, t[2 * i + 1]),
                                      _mm512_permutex2var_epi8(u[2 * i], index, u[2 * i + 1]));
    join(p[0], p[1], p[2], p[3], out);
}

/* Ask for steps further on, by far for codes, which are soon read: slices are too short for the processor to foresee. */
VBMI_TARGET SQUALL_INLINE void prefetch(const struct linear *w, int64_t slot, const int codes)
{
    const int64_t ahead = slot + (codes ? 96 : 32) * SLICE;
    __builtin_prefetch(w->columns + ahead);
    if (codes)
        __builtin_prefetch(w->codes + ahead);
    else
        SQUALL_UNROLL for (int i = 0; i < SLICE; i += 16)
            __builtin_prefetch((const float *)w->values + ahead + i);
}

/* Codes: 0 none, but values; else the size of the codebook that registers have room for: 32, 128 or 256. */
VBMI_TARGET SQUALL_INLINE void one_block(const struct linear *w, int64_t block, int64_t part, int64_t sample,
                                         float *total, const int codes)
{
    float book[256] = {0};
    __m512 few[2] = {0};
    __m512i many[8], more[8];
    /* Groups of 16 bytes as 4 x 4 matrices, transposed: undoes what `join` does to the order of bytes. */
    const __m512i turn = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    if (codes)
        memcpy(book, w->values, (size_t)w->num_codes * sizeof(float));
    if (codes == 32) {
        few[0] = _mm512_loadu_ps(book);
        few[1] = _mm512_loadu_ps(book + 16);
    } else if (codes) {
        planes(book, many);
        if (codes == 256)
            planes(book + 128, more);
    }
    for (int64_t tile = first_tile(w, part); tile < first_tile(w, part + 1); tile++) {
        const int64_t *slices = w->tiles + block * w->num_tiles + tile;
        if (slices[0] == slices[1])
            continue;
        __m512i table[8];
        planes((const float *)w->shared + (sample * w->num_tiles + tile) * TILE, table);
        for (int64_t slice = slices[0]; slice < slices[1]; slice++) {
            __m512 sum[4] = {0};
            int64_t end = w->starts[slice + 1] * SLICE;
            for (int64_t slot = w->starts[slice] * SLICE; slot < end; slot += SLICE) {
                __m512 x[4], value[4];
                prefetch(w, slot, codes);
                look_up(_mm512_shuffle_epi8(_mm512_loadu_si512(w->columns + slot), turn), table, x);
                if (codes == 0) {
                    SQUALL_UNROLL for (int i = 0; i < 4; i++)
                        value[i] = _mm512_loadu_ps((const float *)w->values + slot + 16 * i);
                } else if (codes == 32) {
                    __m512i four = _mm512_loadu_si512(w->codes + slot); /* only a lane's lowest 5 bits are looked at */
                    SQUALL_UNROLL for (int i = 0; i < 4; i++)
                        value[i] = _mm512_permutex2var_ps(few[0], _mm512_srli_epi32(four, 8 * i), few[1]);
                } else {
                    __m512i index = _mm512_shuffle_epi8(_mm512_loadu_si512(w->codes + slot), turn);
                    if (codes == 128)
                        look_up(index, many, value);
                    else
                        look_up_wide(index, many, more, value);
                }
                SQUALL_UNROLL for (int i = 0; i < 4; i++)
                    sum[i] = _mm512_fmadd_ps(x[i], value[i], sum[i]);
            }
            const int16_t *rows = w->rows + slice * SLICE;
            float sums[SLICE];
            SQUALL_UNROLL for (int i = 0; i < 4; i++)
                _mm512_storeu_ps(sums + 16 * i, sum[i]);
            __asm__("" : "+m"(sums)); /* else the compiler takes registers apart, lane by lane */
            SQUALL_UNROLL for (int i = 0; i < SLICE; i++)
                total[rows[i]] += sums[i];
        }
    }
}

VBMI_TARGET static void one_float_vbmi(void *context, int64_t index, int thread)
{
    (void)thread;
    const struct linear *w = context;
    int64_t part = index % w->parts, sample = index / w->parts % w->batch, block = index / w->parts / w->batch;
    float *total = (float *)w->own + index * w->num_own;
    memset(total, 0, (size_t)(w->row_block + 1) * sizeof(float));
    if (!w->codes)
        one_block(w, block, part, sample, total, 0);
    else if (w->num_codes <= 32)
        one_block(w, block, part, sample, total, 32);
    else if (w->num_codes <= 128)
        one_block(w, block, part, sample, total, 128);
    else
        one_block(w, block, part, sample, total, 256);
}
#endif
