/* One instruction set of kernel.c: a piece of the one pass over all numbers. */
ISA_TARGET static void FN(add_and_look)(void *context, int64_t index, int thread)
{
    const struct top_k *t = context;
    (void)thread;
    int64_t begin = index * PIECE, end = t->num - begin < PIECE ? t->num : begin + PIECE, found = 0;
    int32_t *restrict places = t->places + begin;
    const uint32_t threshold = t->threshold;
    for (int64_t start = begin; start < end; start += GROUP) {
        int64_t num = end - start < GROUP ? end - start : GROUP;
        uint32_t sizes[GROUP], largest = 0;
        if (num < GROUP)
            memset(sizes, 0, sizeof sizes);
        const float *restrict numbers = t->numbers + start;
        if (t->residual) {
            float *restrict residual = t->residual + start;
            if (num == GROUP)
                for (int i = 0; i < GROUP; i++)
                    sizes[i] = magnitude(residual[i] += numbers[i]);
            else
                for (int64_t i = 0; i < num; i++)
                    sizes[i] = magnitude(residual[i] += numbers[i]);
        } else if (num == GROUP) {
            for (int i = 0; i < GROUP; i++)
                sizes[i] = magnitude(numbers[i]);
        } else {
            for (int64_t i = 0; i < num; i++)
                sizes[i] = magnitude(numbers[i]);
        }
        for (int i = 0; i < GROUP; i++)
            largest = sizes[i] > largest ? sizes[i] : largest;
        if (largest < threshold)
            continue;
        for (int64_t i = 0; i < num; i++) { /* written always, kept if it counts: a branch would be guessed wrong */
            places[found] = (int32_t)(start + i);
            found += sizes[i] >= threshold;
        }
    }
    t->num_found[index] = found;
}
