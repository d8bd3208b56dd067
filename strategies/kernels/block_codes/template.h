/* One instruction set of kernel.c. */
#include "int8.h"
#include "sign.h"

ISA_TARGET static void FN(encode_block)(const struct code *code, const float *x, int64_t num, uint8_t *header,
                                        uint8_t *bits)
{
    if (code->codes)
        FN(int8_encode)(x, num, code->codes, header, bits);
    else
        FN(sign_encode)(x, num, header, bits);
}

ISA_TARGET static void FN(decode_block)(const struct code *code, const uint8_t *header, const uint8_t *bits,
                                        int64_t num, float *out)
{
    if (code->values)
        FN(int8_decode)(header, bits, num, code->values, out);
    else
        FN(sign_decode)(header, bits, num, out);
}

ISA_TARGET static void FN(encode)(void *context, int64_t index, int thread)
{
    const struct code *code = context;
    (void)thread;
    for (int64_t block = index * BLOCKS; block < (index + 1) * BLOCKS && block * BLOCK < code->num; block++) {
        int64_t begin = block * BLOCK, num = code->num - begin < BLOCK ? code->num - begin : BLOCK;
        const float *restrict x = code->numbers + begin;
        uint8_t *header = code->headers + block * code->header_bytes, *bits = code->bits + begin * code->num_bits / 8;
        if (!code->residual) {
            FN(encode_block)(code, x, num, header, bits);
            continue;
        }
        float *restrict residual = code->residual + begin;
        float wanted[BLOCK], coded[BLOCK];
        for (int64_t i = 0; i < num; i++)
            wanted[i] = residual[i] + x[i];
        FN(encode_block)(code, wanted, num, header, bits);
        FN(decode_block)(code, header, bits, num, coded);
        for (int64_t i = 0; i < num; i++) {
            float lost = wanted[i] - coded[i];
            residual[i] = lost - lost == 0 ? lost : 0; /* what isn't finite would come back in every code */
        }
    }
}

ISA_TARGET static void FN(decode)(void *context, int64_t index, int thread)
{
    const struct code *code = context;
    (void)thread;
    for (int64_t block = index * BLOCKS; block < (index + 1) * BLOCKS && block * BLOCK < code->num; block++) {
        int64_t begin = block * BLOCK, num = code->num - begin < BLOCK ? code->num - begin : BLOCK;
        FN(decode_block)(code, code->headers + block * code->header_bytes, code->bits + begin * code->num_bits / 8,
                         num, code->out + begin);
    }
}
