/* The codes int8 and 1bit: numbers to blocks' headers and bits, and back; with error feedback in the same pass. */
#include <string.h>

#include "../native/native.h"

enum { BLOCK = 2048, BLOCKS = 8 }; /* of a header; of a piece of work */

struct code {
    const float *numbers;
    float *residual; /* or NULL */
    float *out;
    uint8_t *headers, *bits;
    int64_t num, header_bytes, num_bits;
    const uint8_t *codes; /* int8's tables; NULL for 1bit */
    const float *values;
};

typedef float singles __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(16)));
typedef double doubles __attribute__((vector_size(32)));

#define TEMPLATE "../block_codes/template.h"
#include "../native/each_isa.h"

static int64_t lay_out(struct code *code, uint8_t *data)
{
    int is_int8 = code->values != NULL;
    code->header_bytes = is_int8 ? 4 : 8;
    code->num_bits = is_int8 ? 8 : 1;
    code->headers = data;
    code->bits = data + (code->num + BLOCK - 1) / BLOCK * code->header_bytes;
    return (code->num + BLOCK * BLOCKS - 1) / (BLOCK * BLOCKS);
}

/* codes, values: int8's; NULL for 1bit. The code is all headers, then all bits, and may lie at any address. */
SQUALL_EXPORT void squall_encode_blocks(const float *numbers, float *residual, uint8_t *data, int64_t num,
                                        const uint8_t *codes, const float *values, int num_threads)
{
    struct code code = {.numbers = numbers, .residual = residual, .num = num, .codes = codes, .values = values};
    int64_t num_tasks = lay_out(&code, data);
    squall_parallel(SQUALL_PICK(encode), &code, num_tasks, num_threads);
}

SQUALL_EXPORT void squall_decode_blocks(const uint8_t *data, float *out, int64_t num, const float *values,
                                        int num_threads)
{
    struct code code = {.out = out, .num = num, .values = values};
    int64_t num_tasks = lay_out(&code, (uint8_t *)data);
    squall_parallel(SQUALL_PICK(decode), &code, num_tasks, num_threads);
}
