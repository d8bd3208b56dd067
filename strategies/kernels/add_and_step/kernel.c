/* Add a gradient to a sum and step weights with it, in one pass over all three. */
#include <string.h>

#include "../native/native.h"

enum { PIECE = 1 << 14 };

struct add {
    float *sums, *weights, *copy;
    const float *gradient;
    int64_t num;
    float rate;
    int begins;
};

#define TEMPLATE "../add_and_step/template.h"
#include "../native/each_isa.h"

/* copy: becomes what the weights have become; may be NULL. begins: the sum has no value yet, and becomes the gradient. */
SQUALL_EXPORT void squall_add_and_step(float *sums, const float *gradient, float *weights, float *copy, int64_t num,
                                       double rate, int begins, int num_threads)
{
    struct add add = {sums, weights, copy, gradient, num, (float)rate, begins};
    squall_parallel(SQUALL_PICK(add_and_step), &add, (num + PIECE - 1) / PIECE, num_threads);
}
