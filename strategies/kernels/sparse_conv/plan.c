/* Where the weights of a sparse convolution are, and where each reads: plan.py says for what. */
#include <string.h>

#include "../native/native.h"

/* Whether positions ascend, from 0 or more. */
SQUALL_EXPORT int squall_ascends(const int64_t *positions, int64_t num)
{
    /* Of numbers that aren't negative a difference has no room to run over, so a sign tells. */
    int64_t signs = num ? positions[0] : 0;
    for (int64_t i = 1; i < num; i++)
        signs |= positions[i] | (int64_t)((uint64_t)positions[i] - (uint64_t)positions[i - 1] - 1);
    return signs >= 0;
}

/* Weights lie output by output, and in the kernel's order group by group, block by block of channels, and then output
 * by output: so those of an output and a block, a run, keep together. `key` counts runs in the kernel's order. */
#define EACH_RUN                                                                                                       \
    for (int64_t output = 0, i = 0; output < groups * outputs; output++)                                               \
        for (int64_t block = 0, key = output / outputs * blocks * outputs + output % outputs; block < blocks;          \
             block++, key += outputs)

/* Where runs start in the kernel's order, and what each live weight reads. `starts` has room for one more than there
 * are runs, and is all zeros; `taps` are the offsets of a kernel's places. Positions ascend; `inputs` and `outputs` are
 * those of a group. Where a weight reads depends on its place among its output's weights alone: `reads` has room for a
 * number for each, and spares a division. */
SQUALL_EXPORT void squall_sparse_conv_plan(const int64_t *restrict positions, int64_t num, int64_t inputs,
                                           int64_t outputs, int64_t groups, int64_t blocks, int64_t block_size,
                                           int64_t channel_size, const int64_t *taps, int64_t area,
                                           int64_t *restrict starts, int32_t *restrict offsets, int32_t *restrict reads)
{
    int64_t size = inputs * area;
    for (int64_t channel = 0; channel < inputs; channel++)
        for (int64_t tap = 0; tap < area; tap++)
            reads[channel * area + tap] = (int32_t)(channel % block_size * channel_size + taps[tap]);
    EACH_RUN
    {
        int64_t within = (block + 1) * block_size * area, first = i;
        int64_t last = output * size + (within < size ? within : size);
        while (i + 4 <= num && positions[i + 3] < last)
            i += 4;
        while (i < num && positions[i] < last)
            i++;
        starts[key + 1] = i - first;
    }
    for (int64_t key = 0; key < groups * blocks * outputs; key++)
        starts[key + 1] += starts[key];
    EACH_RUN
    {
        int64_t at = starts[key], run = starts[key + 1] - at;
        for (int64_t k = 0; k < run; k++)
            offsets[at + k] = reads[positions[i + k] - output * size];
        i += run;
    }
}

/* Bring a number a weight into the kernel's order, or `back` from there. */
SQUALL_EXPORT void squall_sparse_conv_move(const float *restrict from, float *restrict to, const int64_t *starts,
                                           int64_t outputs, int64_t groups, int64_t blocks, int back)
{
    EACH_RUN
    {
        int64_t at = starts[key], run = starts[key + 1] - at;
        if (run) /* there may be no memory where there are no weights */
            memcpy(to + (back ? i : at), from + (back ? at : i), (size_t)run * sizeof *to);
        i += run;
    }
}
