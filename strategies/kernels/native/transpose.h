/* One instruction set of a transposition of 16 registers of 16 numbers, which is how 16 samples come to lie side by side
 * and apart again. No include guard: the TEMPLATE of whoever needs it includes it, where FN and ISA_TARGET are known.
 *
 * In step s numbers change places with those s rows and s columns further, as far as bit s of their places differs.
 */
#ifndef SQUALL_WIDTH
#define SQUALL_WIDTH 16
typedef float squall_numbers __attribute__((vector_size(64), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SQUALL_HAS_SHUFFLE 1
#define SQUALL_LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define SQUALL_HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define SQUALL_LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define SQUALL_HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define SQUALL_LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define SQUALL_HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define SQUALL_LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define SQUALL_HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#else
#define SQUALL_HAS_SHUFFLE 0
#endif
#endif

ISA_TARGET SQUALL_INLINE void FN(transpose)(squall_numbers *rows)
{
#if SQUALL_HAS_SHUFFLE
#define STEP(S)                                                                                                        \
    SQUALL_UNROLL                                                                                                      \
    for (int i = 0; i < SQUALL_WIDTH; i++)                                                                             \
        if (!(i & S)) {                                                                                                \
            squall_numbers low = __builtin_shufflevector(rows[i], rows[i | S], SQUALL_LOW_##S);                        \
            rows[i | S] = __builtin_shufflevector(rows[i], rows[i | S], SQUALL_HIGH_##S);                              \
            rows[i] = low;                                                                                             \
        }
    STEP(1)
    STEP(2)
    STEP(4)
    STEP(8)
#undef STEP
#else
    squall_numbers turned[SQUALL_WIDTH];
    for (int i = 0; i < SQUALL_WIDTH; i++)
        for (int j = 0; j < SQUALL_WIDTH; j++)
            turned[i][j] = rows[j][i];
    memcpy(rows, turned, sizeof turned);
#endif
}
