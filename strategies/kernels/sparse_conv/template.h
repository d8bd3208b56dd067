/* One instruction set of kernel.c. */

#include "../native/transpose.h"

/* Take 16 samples that lie side by side apart: of `num` pixels, no more than 16, to rows `distance` apart. */
ISA_TARGET static void FN(part)(const float *from, int64_t num, float *to, int64_t distance, int64_t present)
{
    vector rows[WIDTH];
    SQUALL_UNROLL
    for (int i = 0; i < WIDTH; i++)
        rows[i] = i < num ? *(const vector *)(from + i * WIDTH) : (vector){0};
    FN(transpose)(rows);
    for (int64_t lane = 0; lane < present; lane++)
        if (num == WIDTH)
            *(vector *)(to + lane * distance) = rows[lane];
        else
            copy_few(to + lane * distance, (const float *)&rows[lane], num);
}

/* Bring 16 samples side by side: of `num` pixels, no more than 16, from rows `distance` apart; memory ends at `end`. */
ISA_TARGET static void FN(join)(const float *from, int64_t distance, int64_t present, int64_t num, const float *end,
                                float *to)
{
    vector rows[WIDTH];
    for (int64_t lane = 0; lane < WIDTH; lane++) {
        rows[lane] = (vector){0};
        if (lane < present && end - from - lane * distance >= WIDTH) /* what is behind `num` goes nowhere */
            rows[lane] = *(const vector *)(from + lane * distance);
        else if (lane < present)
            copy_few((float *)&rows[lane], from + lane * distance, num);
    }
    FN(transpose)(rows);
    for (int64_t i = 0; i < num; i++)
        *(vector *)(to + i * WIDTH) = rows[i];
}

/* Pack one channel of a block of samples. */
ISA_TARGET static void FN(pack)(void *context, int64_t index, int thread)
{
    const struct pack *p = context;
    int64_t block = index / p->channels, channel = index % p->channels, lanes = p->lanes;
    float *out = p->packed + index * p->channel_size;
    (void)thread;
    memset(out, 0, (size_t)p->channel_size * sizeof(float));
    for (int64_t phase = 0; phase < p->num_phases; phase++) {
        float *plane = out + p->guard + phase * p->phase_size;
        int64_t phase_y = p->phases[2 * phase], phase_x = p->phases[2 * phase + 1];
        int64_t columns = p->width > phase_x ? (p->width - phase_x + p->stride_x - 1) / p->stride_x : 0;
        if (columns > p->columns)
            columns = p->columns;
        if (lanes == WIDTH && p->stride_x == 1) {
            int64_t distance = p->channels * p->height * p->width, left = p->samples - block * lanes;
            const float *images = p->x + (block * lanes * p->channels + channel) * p->height * p->width + phase_x;
            const float *end = p->x + p->samples * distance;
            for (int64_t row = 0; row < p->rows; row++) {
                int64_t y = (p->first_y + row) * p->stride_y + phase_y;
                if (y < 0 || y >= p->height)
                    continue;
                for (int64_t x = 0; x < columns; x += WIDTH)
                    FN(join)(images + y * p->width + x, distance, left < lanes ? left : lanes,
                             columns - x < WIDTH ? columns - x : WIDTH, end, plane + (row * p->pitch + x) * lanes);
            }
            continue;
        }
        for (int64_t lane = 0; lane < lanes && block * lanes + lane < p->samples; lane++) {
            const float *image = p->x + ((block * lanes + lane) * p->channels + channel) * p->height * p->width;
            for (int64_t row = 0; row < p->rows; row++) {
                int64_t y = (p->first_y + row) * p->stride_y + phase_y;
                if (y < 0 || y >= p->height)
                    continue;
                const float *in = image + y * p->width + phase_x;
                float *to = plane + row * p->pitch * lanes + lane;
                if (lanes == 1 && p->stride_x == 1)
                    memcpy(to, in, (size_t)columns * sizeof(float));
                else
                    for (int64_t x = 0; x < columns; x++)
                        to[x * lanes] = in[x * p->stride_x];
            }
        }
    }
}

/* Add some weights' products to a tile's sums of one output channel. */
ISA_TARGET SQUALL_INLINE void FN(add)(const int num, const float *in, const float *values, const int32_t *offsets,
                                      int64_t begin, int64_t end, float *sums, int is_first)
{
    vector total[MOST];
    SQUALL_UNROLL
    for (int i = 0; i < num; i++)
        total[i] = is_first ? (vector){0} : *(const vector *)(sums + i * WIDTH);
    for (int64_t at = begin; at < end; at++) {
        const float *from = in + offsets[at];
        float value = values[at];
        __asm__("" : "+r"(from)); /* a sum of registers in each product would be an instruction of its own */
        SQUALL_UNROLL
        for (int i = 0; i < num; i++)
            total[i] += value * *(const vector *)(from + i * WIDTH);
    }
    SQUALL_UNROLL
    for (int i = 0; i < num; i++)
        *(vector *)(sums + i * WIDTH) = total[i];
}

/* Some outputs of a group over one block of input channels. */
ISA_TARGET SQUALL_INLINE void FN(add_all)(const int num, const struct conv *c, int64_t first, int64_t num_outputs,
                                          const float *in, float *sums, int is_first)
{
    const int64_t *starts = c->starts + first;
    for (int64_t output = 0; output < num_outputs; output++)
        if (is_first || starts[output] < starts[output + 1])
            FN(add)(num, in, c->values, c->offsets, starts[output], starts[output + 1], sums + output * num * WIDTH,
                    is_first);
}

/* The number of registers has to be a constant for sums to stay in them. */
#define EACH_TILE(CALL)                                                                                                \
    switch (num) {                                                                                                     \
    case 1: CALL(1); break;                                                                                            \
    case 2: CALL(2); break;                                                                                            \
    case 3: CALL(3); break;                                                                                            \
    case 4: CALL(4); break;                                                                                            \
    case 5: CALL(5); break;                                                                                            \
    case 6: CALL(6); break;                                                                                            \
    case 7: CALL(7); break;                                                                                            \
    case 8: CALL(8); break;                                                                                            \
    case 9: CALL(9); break;                                                                                            \
    case 10: CALL(10); break;                                                                                          \
    case 11: CALL(11); break;                                                                                          \
    case 12: CALL(12); break;                                                                                          \
    case 13: CALL(13); break;                                                                                          \
    case 14: CALL(14); break;                                                                                          \
    }

ISA_TARGET static void FN(add_tile)(int64_t num, const struct conv *c, int64_t first, int64_t num_outputs,
                                    const float *in, float *sums, int is_first)
{
#define CALL(NUM) FN(add_all)(NUM, c, first, num_outputs, in, sums, is_first)
    EACH_TILE(CALL)
#undef CALL
}

/* A run of output pixels of a tile that are neighbours in a row of the image. */
struct FN(run) {
    int64_t from, to, num; /* numbers of the tile, pixels of the image, pixels */
};

/* Where a tile's numbers belong; returns how many runs there are. */
ISA_TARGET static int FN(runs_of)(const struct conv *c, int64_t begin, int64_t num, struct FN(run) *runs)
{
    int64_t place = begin / c->lanes, end = (begin + num) / c->lanes; /* in pixels, gaps included */
    int count = 0;
    for (int64_t y = place / c->pitch; y < c->height && place < end; y++, place = y * c->pitch) {
        int64_t last = y * c->pitch + c->width;
        if (last > end)
            last = end;
        if (place < last) {
            struct FN(run) run = {(place * c->lanes) - begin, y * c->width + place - y * c->pitch, last - place};
            runs[count++] = run;
        }
    }
    return count;
}

/* Bring a tile's sums of one output channel to where they belong, with bias and ReLU. */
ISA_TARGET static void FN(store)(const struct conv *c, int64_t block, int64_t channel, int64_t num, float *sums,
                                 const struct FN(run) *runs, int num_runs)
{
    if (c->bias || c->relu) {
        float bias = c->bias ? c->bias[channel] : 0;
        for (int64_t i = 0; i < num; i++) {
            float value = sums[i] + bias;
            sums[i] = c->relu && value < 0 ? 0 : value;
        }
    }
    int64_t channels = c->groups * c->outputs, lanes = c->lanes, pixels = c->height * c->width;
    int64_t present = c->samples - block * lanes < lanes ? c->samples - block * lanes : lanes;
    float *image = c->y + (block * lanes * channels + channel) * pixels;
    if (lanes == WIDTH) {
        for (int run = 0; run < num_runs; run++)
            FN(part)(sums + runs[run].from, runs[run].num, image + runs[run].to, channels * pixels, present);
        return;
    }
    for (int64_t lane = 0; lane < present; lane++, image += channels * pixels)
        for (int run = 0; run < num_runs; run++) {
            float *restrict to = image + runs[run].to;
            const float *restrict from = sums + runs[run].from + lane;
            if (lanes == 1)
                memcpy(to, from, (size_t)runs[run].num * sizeof(float));
            else
                for (int64_t i = 0; i < runs[run].num; i++)
                    to[i] = from[i * lanes];
        }
}

/* One tile of a group's outputs, or of a part of them. */
ISA_TARGET static void FN(forward)(void *context, int64_t index, int thread)
{
    const struct conv *c = context;
    int64_t part = index % c->parts, low = part * c->outputs / c->parts, high = (part + 1) * c->outputs / c->parts;
    index /= c->parts;
    int64_t tile = index % c->tiles, group = index / c->tiles % c->groups, block = index / c->tiles / c->groups;
    int64_t begin, num = tile_at(c, tile, &begin);
    float *sums = c->scratch + thread * c->num_scratch;
    const float *in = c->packed + (block * c->groups + group) * c->inputs * c->channel_size + c->guard + begin;
    struct FN(run) runs[MOST * WIDTH];
    int num_runs = FN(runs_of)(c, begin, num * WIDTH, runs);
    int64_t last = c->blocks - 1, first = group * c->blocks * c->outputs;
    for (int64_t inputs = 0; inputs < last; inputs++, in += c->block_size * c->channel_size, first += c->outputs)
        FN(add_tile)(num, c, first + low, high - low, in, sums, inputs == 0);
    /* While an output waits for the memory that it goes to, the next one is worked on. */
    for (int64_t output = low; output < high; output++, sums += num * WIDTH) {
        FN(add_tile)(num, c, first + output, 1, in, sums, last == 0);
        FN(store)(c, block, group * c->outputs + output, num * WIDTH, sums, runs, num_runs);
    }
}

/* Add each vector's sum to a number: 16 at a time, since the sum of one is a long chain of instructions. */
ISA_TARGET SQUALL_INLINE void FN(add_sums)(const vector *vectors, int64_t num, float *to)
{
    vector rows[WIDTH];
    SQUALL_UNROLL
    for (int i = 0; i < WIDTH; i++)
        rows[i] = vectors[i];
    FN(transpose)(rows);
    SQUALL_UNROLL
    for (int half = WIDTH / 2; half > 0; half /= 2)
        SQUALL_UNROLL
        for (int i = 0; i < half; i++)
            rows[i] += rows[i + half];
    if (num == WIDTH)
        *(vector *)to += rows[0];
    else
        for (int64_t i = 0; i < num; i++)
            to[i] += rows[0][i];
}

/* Add a tile's part of the gradients of some outputs' weights. */
ISA_TARGET SQUALL_INLINE void FN(gather_all)(const int num, const struct conv *c, int64_t first, const float *in,
                                             const float *grad, int64_t low, int64_t high)
{
    const int64_t *starts = c->starts + first;
    vector waiting[WIDTH] = {{0}};
    int64_t num_waiting = 0;
    for (int64_t output = low; output < high; output++) {
        if (starts[output] == starts[output + 1])
            continue;
        const float *from = grad + output * c->grad_channel_size;
        vector g[MOST];
        SQUALL_UNROLL
        for (int i = 0; i < num; i++)
            g[i] = *(const vector *)(from + i * WIDTH);
        for (int64_t at = starts[output]; at < starts[output + 1]; at++) {
            const float *x = in + c->offsets[at];
            vector even = {0}, odd = {0};
            SQUALL_UNROLL
            for (int i = 0; i < num; i++) {
                if (i % 2)
                    odd += g[i] * *(const vector *)(x + i * WIDTH);
                else
                    even += g[i] * *(const vector *)(x + i * WIDTH);
            }
            waiting[num_waiting++] = even + odd;
            if (num_waiting == WIDTH) {
                FN(add_sums)(waiting, WIDTH, c->result + at + 1 - WIDTH);
                num_waiting = 0;
            }
        }
    }
    FN(add_sums)(waiting, num_waiting, c->result + starts[high] - num_waiting);
}

ISA_TARGET static void FN(gather_tile)(int64_t num, const struct conv *c, int64_t first, const float *in,
                                       const float *grad, int64_t low, int64_t high)
{
#define CALL(NUM) FN(gather_all)(NUM, c, first, in, grad, low, high)
    EACH_TILE(CALL)
#undef CALL
}

/* A slice of a group's outputs, over all samples: threads write to weights of their own. */
ISA_TARGET static void FN(weight_grad)(void *context, int64_t index, int thread)
{
    const struct conv *c = context;
    int64_t group = index / c->slices, slice = index % c->slices;
    int64_t low = slice * c->outputs / c->slices, high = (slice + 1) * c->outputs / c->slices;
    int64_t num_blocks = (c->samples + c->lanes - 1) / c->lanes;
    (void)thread;
    for (int64_t block = 0; block < num_blocks; block++)
        for (int64_t tile = 0; tile < c->tiles; tile++) {
            int64_t begin, num = tile_at(c, tile, &begin);
            const float *in = c->packed + (block * c->groups + group) * c->inputs * c->channel_size + c->guard + begin;
            const float *grad = c->grad + (block * c->groups + group) * c->outputs * c->grad_channel_size + begin;
            for (int64_t part = 0; part < c->blocks; part++)
                FN(gather_tile)(num, c, (group * c->blocks + part) * c->outputs, in + part * c->block_size * c->channel_size, grad, low, high);
        }
}
#undef EACH_TILE
