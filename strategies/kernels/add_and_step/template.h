/* One instruction set of kernel.c. Products and sums are rounded where Torch rounds them. */
#if LANES >= 8
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

ISA_TARGET static void FN(add_and_step)(void *context, int64_t index, int thread)
{
    const struct add *a = context;
    (void)thread;
    int64_t begin = index * PIECE, num = a->num - begin < PIECE ? a->num - begin : PIECE;
    float *restrict sums = a->sums + begin, *restrict weights = a->weights + begin;
    const float *restrict gradient = a->gradient + begin;
    const float down = -a->rate;
    if (a->begins)
        for (int64_t i = 0; i < num; i++) {
            sums[i] = gradient[i];
            weights[i] = MULTIPLY_ADD(gradient[i], down, weights[i]);
        }
    else
        for (int64_t i = 0; i < num; i++) {
            sums[i] += gradient[i];
            weights[i] = MULTIPLY_ADD(gradient[i], down, weights[i]);
        }
    if (a->copy) /* what was just written is still in the nearest cache */
        memcpy(a->copy + begin, weights, num * sizeof *weights);
}
#undef MULTIPLY_ADD
