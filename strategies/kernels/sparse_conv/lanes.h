/* One instruction set of how lanes come side by side, and apart again. No include guard: template.h includes it. */

#include "../native/transpose.h"

/* Where a row of each lane begins; one that there isn't is but zeros, of which none is further. */
struct FN(lines) {
    const float *from[WIDTH];
    int64_t mask[WIDTH]; /* of distances: all ones, or none */
};

/* Bring 16 lanes side by side: of `num` pixels, no more than 16, `distance` behind where their rows begin. What is
 * `next` numbers further will be read soon. Memory ends at `end`, and `is_far` says that it is far from here. */
ISA_TARGET static void FN(join)(const struct FN(lines) *lines, int is_far, int64_t distance, int64_t num,
                                const float *end, int64_t next, float *to)
{
    vector rows[WIDTH];
    if (is_far)
        SQUALL_UNROLL
        for (int lane = 0; lane < WIDTH; lane++) { /* what is behind `num` goes nowhere */
            const float *from = lines->from[lane] + (distance & lines->mask[lane]);
            rows[lane] = *(const vector *)from;
            __builtin_prefetch(from + (next & lines->mask[lane]), 0, 2);
        }
    else
        for (int lane = 0; lane < WIDTH; lane++) {
            const float *from = lines->from[lane] + (distance & lines->mask[lane]);
            rows[lane] = (vector){0};
            if (lines->mask[lane] && end - from >= WIDTH)
                rows[lane] = *(const vector *)from;
            else if (lines->mask[lane])
                squall_copy_few((float *)&rows[lane], from, num);
        }
    FN(transpose)(rows);
    if (num == WIDTH)
        SQUALL_UNROLL
        for (int i = 0; i < WIDTH; i++)
            *(vector *)(to + i * WIDTH) = rows[i];
    else
        for (int64_t i = 0; i < num; i++)
            *(vector *)(to + i * WIDTH) = rows[i];
}

/* Pack one channel of a block of images. */
ISA_TARGET static void FN(pack)(void *context, int64_t index, int thread)
{
    const struct pack *p = context;
    int64_t block = index / p->channels, channel = index % p->channels, lanes = p->lanes;
    static const float zeros[WIDTH];
    const float *end = p->x + p->samples * p->channels * p->height * p->width;
    struct FN(lines) lines;
    int64_t first[WIDTH];           /* where a lane's row 0 would begin */
    int64_t low[WIDTH], high[WIDTH]; /* its rows that lie in the image */
    float *out = p->packed + index * p->channel_size;
    (void)thread;
    float *to = out + p->guard, *last = to + p->num_phases * p->phase_size;
    fill_zero(out, lanes == 1 ? to : last); /* many lanes are put together faster where memory has been written to */
    fill_zero(last, out + p->channel_size);
    for (int64_t phase = 0; phase < p->num_phases; phase++) {
        int64_t phase_y = p->phases[2 * phase], phase_x = p->phases[2 * phase + 1];
        int64_t columns = p->width > phase_x ? (p->width - phase_x + p->stride_x - 1) / p->stride_x : 0;
        if (columns > p->columns)
            columns = p->columns;
        for (int64_t lane = 0; lane < lanes; lane++) {
            int64_t sample = block * p->images + p->lane[lane].image, top = p->first_y + p->lane[lane].top;
            int64_t y = top * p->stride_y + phase_y;
            first[lane] = ((sample * p->channels + channel) * p->height + y) * p->width + phase_x;
            low[lane] = -top;
            high[lane] = (p->height - phase_y + p->stride_y - 1) / p->stride_y - top;
            if (p->lane[lane].image >= p->images || sample >= p->samples)
                low[lane] = high[lane] = 0;
        }
        for (int64_t row = 0; row < p->rows; row++, to += p->pitch * lanes) {
            int is_far = 1, are_there = 0;
            for (int64_t lane = 0; lane < lanes; lane++) {
                int is_there = row >= low[lane] && row < high[lane];
                lines.from[lane] = is_there ? p->x + first[lane] + row * p->stride_y * p->width : zeros;
                lines.mask[lane] = -is_there;
                is_far &= !is_there || end - lines.from[lane] >= columns + WIDTH;
                are_there |= is_there;
            }
            if (lanes == WIDTH && !are_there)
                continue;
            if (lanes == WIDTH && p->stride_x == 1)
                for (int64_t x = 0; x < columns; x += WIDTH)
                    FN(join)(&lines, is_far, x, at_most(WIDTH, columns - x), end, p->height * p->width, to + x * WIDTH);
            else if (p->stride_x == 1 && lines.mask[0])
                memcpy(to, lines.from[0], (size_t)columns * sizeof(float));
            else
                for (int64_t lane = 0; lane < lanes; lane++)
                    for (int64_t x = 0; x < columns; x++)
                        to[x * lanes + lane] = lines.from[lane][x * p->stride_x & lines.mask[lane]];
            if (lanes == 1)
                fill_zero(to + columns, to + p->pitch);
        }
    }
}

/* Take the lanes of a block and output channel apart. */
ISA_TARGET static void FN(unstage)(void *context, int64_t index, int thread)
{
    const struct conv *c = context;
    int64_t channels = c->groups * c->outputs, block = index / channels, pixels = c->height * c->width;
    const float *from = c->staged + index * c->tiles * c->tile_size;
    float *strips[WIDTH];
    int64_t present[WIDTH]; /* pixels of each strip that are the image's */
    (void)thread;
    for (int lane = 0; lane < WIDTH; lane++) {
        int64_t image = c->lane[lane].image, sample = block * c->images + image, top = c->lane[lane].top;
        int is_there = image < c->images && sample < c->samples;
        present[lane] = is_there ? at_most(pixels, (c->image_height - top) * c->width) : 0;
        strips[lane] = c->y + ((sample * channels + index % channels) * c->image_height + top) * c->width;
    }
    for (int64_t i = 0; i < pixels; i += WIDTH) {
        vector rows[WIDTH];
        for (int64_t pixel = 0; pixel < WIDTH; pixel++)
            rows[pixel] = *(const vector *)(from + c->places[at_most(i + pixel, pixels - 1)]);
        FN(transpose)(rows);
        for (int lane = 0; lane < WIDTH; lane++)
            if (i + WIDTH <= present[lane]) {
                *(vector *)(strips[lane] + i) = rows[lane];
                __builtin_prefetch(strips[lane] + i + c->image_height * c->width, 1, 2); /* the next channel's */
            } else if (i < present[lane])
                squall_copy_few(strips[lane] + i, (const float *)&rows[lane], present[lane] - i);
    }
}
