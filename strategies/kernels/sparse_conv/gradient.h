/* One instruction set of the weights' gradients. No include guard: template.h includes it. */

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
ISA_TARGET SQUALL_INLINE void FN(gather_all)(const int width, const int rows, const struct conv *c, int64_t first,
                                             const float *in, const float *grad, int64_t low, int64_t high)
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
        for (int row = 0; row < rows; row++, from += c->row_distance)
            SQUALL_UNROLL
            for (int i = 0; i < width; i++)
                g[row * width + i] = *(const vector *)(from + i * WIDTH);
        for (int64_t at = starts[output]; at < starts[output + 1]; at++) {
            const float *x = in + c->offsets[at];
            vector even = {0}, odd = {0};
            SQUALL_UNROLL
            for (int row = 0; row < rows; row++, x += c->row_distance) {
                __asm__("" : "+r"(x));
                SQUALL_UNROLL
                for (int i = 0; i < width; i++) {
                    if ((row * width + i) % 2)
                        odd += g[row * width + i] * *(const vector *)(x + i * WIDTH);
                    else
                        even += g[row * width + i] * *(const vector *)(x + i * WIDTH);
                }
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

ISA_TARGET static void FN(gather_tile)(struct tile tile, const struct conv *c, int64_t first, const float *in,
                                       const float *grad, int64_t low, int64_t high)
{
#define CALL(WIDE, ROWS) FN(gather_all)(WIDE, ROWS, c, first, in, grad, low, high)
    EACH_TILE(CALL)
#undef CALL
}

/* A slice of a group's outputs, over all samples: threads write to weights of their own. */
ISA_TARGET static void FN(weight_grad)(void *context, int64_t index, int thread)
{
    const struct conv *c = context;
    int64_t group = index / c->slices, slice = index % c->slices;
    int64_t low = slice * c->outputs / c->slices, high = (slice + 1) * c->outputs / c->slices;
    int64_t num_blocks = num_blocks_of(c);
    (void)thread;
    for (int64_t block = 0; block < num_blocks; block++)
        for (int64_t number = 0; number < c->tiles; number++) {
            struct tile tile = tile_at(c, number);
            int64_t first = block * c->groups + group;
            const float *in = c->packed + first * c->inputs * c->channel_size + c->guard + tile.begin;
            const float *grad = c->grad + first * c->outputs * c->grad_channel_size + tile.begin;
            for (int64_t part = 0; part < c->blocks; part++)
                FN(gather_tile)(tile, c, (group * c->blocks + part) * c->outputs,
                                in + part * c->block_size * c->channel_size, grad, low, high);
        }
}
