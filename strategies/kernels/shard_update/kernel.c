/* Decode a gradient and step an optimizer with it: the gradient of a block never leaves the nearest cache. */
#include <math.h>
#include <string.h>

#include "../native/native.h"

enum { BLOCK = 2048, BLOCKS = 8 }; /* of a header; of a piece of work */

typedef float singles __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(16)));
typedef double doubles __attribute__((vector_size(32)));

enum codec { FP32, BF16, INT8, SIGN, TOP_K };
enum optimizer { SGD, ADAGRAD, ADAM };

struct update {
    int codec, optimizer;
    const uint8_t *code;
    const float *values; /* of int8 */
    int64_t num_kept;    /* of topk */
    float *weights, *states[3];
    int64_t num;
    float sign, decay, shrink, rate, first, new_first, second, new_second, eps, root;
    int begins, nesterov;
};

#define TEMPLATE "../shard_update/template.h"
#include "../native/each_isa.h"

/* states: SGD's momentum, or NULL; Adagrad's sum; Adam's two means, and their maximum or NULL.
 * numbers: in the order of struct update. */
SQUALL_EXPORT void squall_shard_update(int codec, int optimizer, const uint8_t *code, const float *values,
                                       int64_t num_kept, float *weights, float *state0, float *state1, float *state2,
                                       int64_t num, const double *numbers, int begins, int nesterov, int num_threads)
{
    struct update update = {codec, optimizer, code, values, num_kept, weights, {state0, state1, state2}, num,
                            (float)numbers[0], (float)numbers[1], (float)numbers[2], (float)numbers[3],
                            (float)numbers[4], (float)numbers[5], (float)numbers[6], (float)numbers[7],
                            (float)numbers[8], (float)numbers[9], begins, nesterov};
    squall_parallel(SQUALL_PICK(update), &update, (num + BLOCK * BLOCKS - 1) / (BLOCK * BLOCKS), num_threads);
}
