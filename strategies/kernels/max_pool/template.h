/* One instruction set of kernel.c: rows first, which are neighbours in memory, then columns. */

/* What isn't a number wins, as in Torch. */
#define LARGER(a, b) ((b) > (a) || (b) != (b) ? (b) : (a))

ISA_TARGET static void FN(columns)(const struct pool *p, const float *restrict row, float *restrict to, int64_t stride)
{
    for (int64_t i = 0; i < p->out_width; i++)
        to[i] = row[i * stride];
    for (int64_t place = 1; place < p->kernel_x; place++) {
        const float *restrict from = row + place * p->dilation_x;
        for (int64_t i = 0; i < p->out_width; i++)
            to[i] = LARGER(to[i], from[i * stride]);
    }
}

ISA_TARGET static void FN(pool)(void *context, int64_t index, int thread)
{
    const struct pool *p = context;
    const float *x = p->x + index * p->height * p->width;
    float *y = p->y + index * p->out_height * p->out_width;
    float *restrict padded = p->scratch + thread * p->num_scratch, *restrict row = padded + p->padding_x;
    for (int64_t i = 0; i < p->num_scratch; i++)
        padded[i] = -INFINITY;
    for (int64_t out = 0; out < p->out_height; out++) {
        int is_first = 1;
        for (int64_t place = 0; place < p->kernel_y; place++) {
            int64_t at = out * p->stride_y - p->padding_y + place * p->dilation_y;
            if (at < 0 || at >= p->height)
                continue;
            const float *restrict from = x + at * p->width;
            if (is_first)
                memcpy(row, from, (size_t)p->width * sizeof(float));
            else
                for (int64_t i = 0; i < p->width; i++)
                    row[i] = LARGER(row[i], from[i]);
            is_first = 0;
        }
        if (is_first) /* a window in the padding alone */
            for (int64_t i = 0; i < p->width; i++)
                row[i] = -INFINITY;
        /* With the stride known the compiler knows what to shuffle. */
        if (p->stride_x == 2)
            FN(columns)(p, padded, y + out * p->out_width, 2);
        else
            FN(columns)(p, padded, y + out * p->out_width, p->stride_x);
    }
}
#undef LARGER
