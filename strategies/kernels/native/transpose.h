/* One instruction set of a transposition of 16 registers of 16 numbers, which is how 16 samples come to lie side by side
 * and apart again. No include guard: the TEMPLATE of whoever needs it includes it, where FN and ISA_TARGET are known.
 *
 * In step s numbers change places with those s rows and s columns further, as far as bit s of their places differs.
 */
#include "numbers.h"

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
