/* Local response normalisation, forward and backward: channels first or last, single or double precision.
 *
 * x is (samples, groups, channels, pixels) or, channels last, (samples, pixels, groups, channels). Work is dealt out in
 * blocks of pixels that fit the nearest cache; sums over the window are computed again in the backward pass, which
 * costs less than to keep them.
 */
#include <math.h>
#include <string.h>

#include "../native/native.h"

enum { BLOCK = 256 };

struct norm {
    const void *x, *grad;
    void *y; /* the result, or the gradient by x */
    void *scratch;
    int64_t num_scratch; /* numbers of a thread's own */
    int64_t samples, groups, channels, pixels;
    int64_t below, above; /* channels of the window on either side */
    double alpha, beta, k; /* alpha is divided by the size of the window */
    int relu, backward;
};

static int64_t num_blocks(const struct norm *norm)
{
    return (norm->pixels + BLOCK - 1) / BLOCK;
}

#define REAL float
#define SQRT sqrtf
#define POW powf
#define TYPED(name) SQUALL_JOIN(name, float)
#define TEMPLATE "../local_response_norm/template.h"
#include "../native/each_isa.h"
#undef REAL
#undef SQRT
#undef POW
#undef TYPED

#define REAL double
#define SQRT sqrt
#define POW pow
#define TYPED(name) SQUALL_JOIN(name, double)
#include "../native/each_isa.h"

/* scratch: num_scratch numbers for each thread. Channels first, the backward pass needs 2 x BLOCK of them a channel;
 * channels last, a few rows are enough. */
SQUALL_EXPORT void squall_local_response_norm(const void *x, const void *grad, void *y, void *scratch,
                                              int64_t num_scratch, int64_t samples, int64_t groups, int64_t channels,
                                              int64_t pixels, int64_t below, int64_t above, double alpha, double beta,
                                              double k, int relu, int channels_last, int is_double, int num_threads)
{
    struct norm norm = {.x = x, .grad = grad, .y = y, .scratch = scratch, .num_scratch = num_scratch,
                        .samples = samples, .groups = groups, .channels = channels, .pixels = pixels, .below = below,
                        .above = above, .alpha = alpha, .beta = beta, .k = k, .relu = relu, .backward = grad != NULL};
    squall_task task;
    int64_t num_tasks = samples * num_blocks(&norm);
    if (channels_last) {
        task = is_double ? SQUALL_PICK(last_double) : SQUALL_PICK(last_float);
    } else {
        task = is_double ? SQUALL_PICK(first_double) : SQUALL_PICK(first_float);
        num_tasks *= groups;
    }
    squall_parallel(task, &norm, num_tasks, num_threads);
}
