/* Maxima over windows of an image, without the places that they came from. */
#include <math.h>

#include "../native/native.h"
#include "../native/numbers.h"

typedef squall_numbers vector;

enum { WIDTH = SQUALL_WIDTH };

struct pool {
    const float *x;
    float *y, *scratch;
    int64_t height, width, out_height, out_width;
    int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int64_t num_scratch;
};

#define TEMPLATE "../max_pool/template.h"
#include "../native/each_isa.h"

/* scratch: a row of the padded image for each thread, num_scratch numbers: 48 more than the row. */
SQUALL_EXPORT void squall_max_pool(const float *x, float *y, float *scratch, int64_t num_scratch, int64_t images,
                                   int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                   int64_t kernel_y, int64_t kernel_x, int64_t stride_y, int64_t stride_x,
                                   int64_t padding_y, int64_t padding_x, int64_t dilation_y, int64_t dilation_x,
                                   int num_threads)
{
    struct pool pool = {x, y, scratch, height, width, out_height, out_width, kernel_y, kernel_x, stride_y, stride_x,
                        padding_y, padding_x, dilation_y, dilation_x, num_scratch};
    squall_parallel(SQUALL_PICK(pool), &pool, images, num_threads);
}
