/* One instruction set of kernel.c: how lanes come together and apart, weights' products, and weights' gradients. */

#include "lanes.h"

/* Add some weights' products to a tile's sums of one output channel; `finishes` them if these are the last. */
ISA_TARGET SQUALL_INLINE void FN(add)(const int width, const int rows, const struct conv *c, const float *in,
                                      int64_t begin, int64_t end, const float *sums, int is_first, const int finishes,
                                      float bias, float *to)
{
    vector total[MOST];
    SQUALL_UNROLL
    for (int i = 0; i < rows * width; i++)
        total[i] = is_first ? (vector){0} : *(const vector *)(sums + i * WIDTH);
    for (int64_t at = begin; at < end; at++) {
        const float *from = in + c->offsets[at];
        float value = c->values[at];
        SQUALL_UNROLL
        for (int row = 0; row < rows; row++, from += c->row_distance) {
            __asm__("" : "+r"(from)); /* a sum of registers in each product would be an instruction of its own */
            SQUALL_UNROLL
            for (int i = 0; i < width; i++)
                total[row * width + i] += value * *(const vector *)(from + i * WIDTH);
        }
    }
    SQUALL_UNROLL
    for (int i = 0; i < rows * width; i++) {
        if (finishes) {
            total[i] += bias;
            total[i] = (vector)((squall_masks)total[i] & ~((squall_masks)(total[i] < 0) & -c->relu));
        }
        *(vector *)(to + i * WIDTH) = total[i];
    }
}

/* Some outputs of a group over one block of input channels. */
ISA_TARGET SQUALL_INLINE void FN(add_all)(const int width, const int rows, const struct conv *c, int64_t first,
                                          int64_t num_outputs, const float *in, float *sums, int is_first)
{
    const int64_t *starts = c->starts + first;
    for (int64_t output = 0; output < num_outputs; output++, sums += rows * width * WIDTH)
        if (is_first || starts[output] < starts[output + 1])
            FN(add)(width, rows, c, in, starts[output], starts[output + 1], sums, is_first, 0, 0, sums);
}

/* The number of registers has to be a constant for sums to stay in them. */
#define EACH_TILE(CALL)                                                                                                \
    switch (tile.width + MOST * (tile.rows - 1)) {                                                                     \
    case 1: CALL(1, 1); break;                                                                                         \
    case 2: CALL(2, 1); break;                                                                                         \
    case 3: CALL(3, 1); break;                                                                                         \
    case 4: CALL(4, 1); break;                                                                                         \
    case 5: CALL(5, 1); break;                                                                                         \
    case 6: CALL(6, 1); break;                                                                                         \
    case 7: CALL(7, 1); break;                                                                                         \
    case 8: CALL(8, 1); break;                                                                                         \
    case 9: CALL(9, 1); break;                                                                                         \
    case 10: CALL(10, 1); break;                                                                                       \
    case 11: CALL(11, 1); break;                                                                                       \
    case 12: CALL(12, 1); break;                                                                                       \
    case 13: CALL(13, 1); break;                                                                                       \
    case 14: CALL(14, 1); break;                                                                                       \
    case MOST + 1: CALL(1, 2); break;                                                                                  \
    case MOST + 2: CALL(2, 2); break;                                                                                  \
    case MOST + 3: CALL(3, 2); break;                                                                                  \
    case MOST + 4: CALL(4, 2); break;                                                                                  \
    case MOST + 5: CALL(5, 2); break;                                                                                  \
    case MOST + 6: CALL(6, 2); break;                                                                                  \
    case MOST + 7: CALL(7, 2); break;                                                                                  \
    }

ISA_TARGET static void FN(add_tile)(struct tile tile, const struct conv *c, int64_t first, int64_t num_outputs,
                                    const float *in, float *sums, int is_first)
{
#define CALL(WIDE, ROWS) FN(add_all)(WIDE, ROWS, c, first, num_outputs, in, sums, is_first)
    EACH_TILE(CALL)
#undef CALL
}

/* The same for one output and the last block. */
ISA_TARGET static void FN(finish_tile)(struct tile tile, const struct conv *c, int64_t first, const float *in,
                                       const float *sums, int is_first, float bias, float *to)
{
    const int64_t *starts = c->starts + first;
#define CALL(WIDE, ROWS) FN(add)(WIDE, ROWS, c, in, starts[0], starts[1], sums, is_first, 1, bias, to)
    EACH_TILE(CALL)
#undef CALL
}

/* One tile of a group's outputs, or of a part of them. */
ISA_TARGET static void FN(forward)(void *context, int64_t index, int thread)
{
    const struct conv *c = context;
    int64_t part = index % c->parts, low = part * c->outputs / c->parts, high = (part + 1) * c->outputs / c->parts;
    index /= c->parts;
    int64_t number = index % c->tiles, group = index / c->tiles % c->groups, block = index / c->tiles / c->groups;
    struct tile tile = tile_at(c, number);
    int64_t num = tile.width * tile.rows * WIDTH;
    float *sums = c->scratch + thread * c->num_scratch;
    const float *in = c->packed + (block * c->groups + group) * c->inputs * c->channel_size + c->guard + tile.begin;
    struct run runs[MOST * WIDTH];
    int num_runs = c->staged ? 0 : runs_of(c, tile, runs);
    int64_t last = c->blocks - 1, first = group * c->blocks * c->outputs;
    for (int64_t inputs = 0; inputs < last; inputs++, in += c->block_size * c->channel_size, first += c->outputs)
        FN(add_tile)(tile, c, first + low, high - low, in, sums, inputs == 0);
    /* While an output waits for the memory that it goes to, the next one is worked on. */
    for (int64_t output = low; output < high; output++, sums += num) {
        int64_t channel = group * c->outputs + output, image = block * c->groups * c->outputs + channel;
        float bias = c->bias ? c->bias[channel] : 0;
        float *to = c->staged ? c->staged + (image * c->tiles + number) * c->tile_size : sums;
        FN(finish_tile)(tile, c, first + output, in, sums, last == 0, bias, to);
        for (int run = 0; run < num_runs; run++)
            memcpy(c->y + image * c->height * c->width + runs[run].to, sums + runs[run].from,
                   (size_t)runs[run].num * sizeof(float));
    }
}

#include "gradient.h"

#undef EACH_TILE
