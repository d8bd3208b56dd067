/* One instruction set of kernel.c: rows first, which are neighbours in memory, then columns. */

/* What isn't a number wins, as in Torch. */
ISA_TARGET SQUALL_INLINE vector FN(larger)(vector a, vector b)
{
    squall_masks is_b = (squall_masks)(b > a) | (squall_masks)(b != b);
    return (vector)(((squall_masks)b & is_b) | ((squall_masks)a & ~is_b));
}

/* Every second number of 32. */
ISA_TARGET SQUALL_INLINE vector FN(every_second)(const float *from)
{
#if SQUALL_HAS_SHUFFLE
    return __builtin_shufflevector(*(const vector *)from, *(const vector *)(from + WIDTH), 0, 2, 4, 6, 8, 10, 12, 14,
                                   16, 18, 20, 22, 24, 26, 28, 30);
#else
    vector numbers;
    for (int i = 0; i < WIDTH; i++)
        numbers[i] = from[2 * i];
    return numbers;
#endif
}

/* The larger numbers of two rows. What is left at the end is done again with what is before it, which changes nothing. */
ISA_TARGET SQUALL_INLINE void FN(rows)(const float *a, const float *b, int64_t num, float *to)
{
    for (int64_t i = 0; i < num; i += WIDTH) {
        int64_t at = i + WIDTH <= num ? i : num - WIDTH;
        if (at < 0) {
            vector few[2] = {{0}};
            squall_copy_few((float *)&few[0], a, num);
            squall_copy_few((float *)&few[1], b, num);
            few[0] = FN(larger)(few[0], few[1]);
            squall_copy_few(to, (const float *)&few[0], num);
        } else {
            __builtin_prefetch(b + at + 2 * num);
            __builtin_prefetch(b + at + num);
            *(vector *)(to + at) = FN(larger)(*(const vector *)(a + at), *(const vector *)(b + at));
        }
    }
}

/* The largest numbers of each window of a row, which goes on behind its end for as long as registers reach. */
ISA_TARGET SQUALL_INLINE void FN(columns)(const struct pool *p, const float *row, float *to, const int64_t stride)
{
    for (int64_t i = 0; i < p->out_width; i += WIDTH) {
        vector largest = {0};
        for (int64_t place = 0; place < p->kernel_x; place++) {
            const float *from = row + i * stride + place * p->dilation_x;
            vector numbers = stride == 2 ? FN(every_second)(from) : *(const vector *)from;
            largest = place ? FN(larger)(largest, numbers) : numbers;
        }
        if (i + WIDTH <= p->out_width)
            *(vector *)(to + i) = largest;
        else
            squall_copy_few(to + i, (const float *)&largest, p->out_width - i);
    }
}

/* The same with any other stride. */
ISA_TARGET static void FN(columns_apart)(const struct pool *p, const float *row, float *to)
{
    for (int64_t i = 0; i < p->out_width; i++) {
        const float *from = row + i * p->stride_x;
        to[i] = from[0];
        for (int64_t place = 1; place < p->kernel_x; place++) {
            float number = from[place * p->dilation_x];
            to[i] = number > to[i] || number != number ? number : to[i];
        }
    }
}

ISA_TARGET static void FN(pool)(void *context, int64_t index, int thread)
{
    const struct pool *p = context;
    const float *x = p->x + index * p->height * p->width;
    float *y = p->y + index * p->out_height * p->out_width;
    float *padded = p->scratch + thread * p->num_scratch, *row = padded + p->padding_x;
    for (int64_t i = 0; i < p->num_scratch; i++)
        padded[i] = -INFINITY;
    for (int64_t out = 0; out < p->out_height; out++, y += p->out_width) {
        const float *largest = NULL; /* of the window's rows; the first one stays where it is */
        for (int64_t place = 0; place < p->kernel_y; place++) {
            int64_t at = out * p->stride_y - p->padding_y + place * p->dilation_y;
            if (at < 0 || at >= p->height)
                continue;
            if (largest)
                FN(rows)(largest, x + at * p->width, p->width, row);
            largest = largest ? row : x + at * p->width;
        }
        if (!largest) /* a window in the padding alone */
            for (int64_t i = 0; i < p->width; i++)
                row[i] = -INFINITY;
        else if (largest != row)
            memcpy(row, largest, (size_t)p->width * sizeof(float));
        if (p->stride_x == 1)
            FN(columns)(p, padded, y, 1);
        else if (p->stride_x == 2)
            FN(columns)(p, padded, y, 2);
        else
            FN(columns_apart)(p, padded, y);
    }
}
