/* 16 numbers in single precision: a register, or several of a lesser instruction set. */
#ifndef SQUALL_WIDTH
#define SQUALL_WIDTH 16

#include <string.h>

#include "native.h"

typedef float squall_numbers __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t squall_masks __attribute__((vector_size(64))); /* what comparing them gives */
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

/* Copy fewer numbers than that; too few for a call of memcpy. */
SQUALL_INLINE void squall_copy_few(float *to, const float *from, int64_t num)
{
    enum { HALF = SQUALL_WIDTH / 2, QUARTER = SQUALL_WIDTH / 4 };
    if (num >= HALF) { /* twice, what overlaps */
        memcpy(to, from, HALF * sizeof(float));
        memcpy(to + num - HALF, from + num - HALF, HALF * sizeof(float));
    } else if (num >= QUARTER) {
        memcpy(to, from, QUARTER * sizeof(float));
        memcpy(to + num - QUARTER, from + num - QUARTER, QUARTER * sizeof(float));
    } else
        for (int64_t i = 0; i < num; i++)
            to[i] = from[i];
}
#endif
