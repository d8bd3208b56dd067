/* One instruction set of kernel.c. Loops are plain: the compiler vectorises them. */
#include "../block_codes/int8.h"
#include "../block_codes/sign.h"

/* What is written may be what is read, at the same place. */
#define EACH _Pragma("GCC ivdep") for (int64_t i = 0; i < num; i++)

/* Products and sums are rounded where Torch rounds them, so they are not left to the compiler. */
#if LANES >= 8
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

ISA_TARGET static void FN(scatter)(const struct update *u, int64_t begin, int64_t num, float *out)
{
    const int32_t *places = (const int32_t *)u->code;
    const float *numbers = (const float *)(places + u->num_kept);
    int64_t low = 0, high = u->num_kept;
    while (low < high) { /* the first place in this block */
        int64_t middle = (low + high) / 2;
        if (places[middle] < begin)
            low = middle + 1;
        else
            high = middle;
    }
    memset(out, 0, (size_t)num * sizeof(float));
    for (; low < u->num_kept && places[low] < begin + num; low++)
        out[places[low] - begin] = numbers[low];
}

/* A block's gradient: in the code itself, or in buffer. */
ISA_TARGET static const float *FN(gradient)(const struct update *u, int64_t begin, int64_t num, float *buffer)
{
    int64_t block = begin / BLOCK, num_blocks = (u->num + BLOCK - 1) / BLOCK;
    if (u->codec == FP32)
        return (const float *)u->code + begin;
    if (u->codec == BF16) {
        const uint16_t *halves = (const uint16_t *)u->code + begin;
        EACH {
            union { uint32_t bits; float number; } wide = {(uint32_t)halves[i] << 16};
            buffer[i] = wide.number;
        }
    } else if (u->codec == INT8) {
        FN(int8_decode)(u->code + block * 4, u->code + num_blocks * 4 + begin, num, u->values, buffer);
    } else if (u->codec == SIGN) {
        FN(sign_decode)(u->code + block * 8, u->code + num_blocks * 8 + begin / 8, num, buffer);
    } else {
        FN(scatter)(u, begin, num, buffer);
    }
    return buffer;
}

ISA_TARGET static void FN(sgd)(const struct update *u, const float *g, int64_t num, float *w, float *m)
{
    const float down = -u->rate, first = u->first, fresh = u->new_first;
    if (m && u->begins)
        memcpy(m, g, (size_t)num * sizeof(float));
    else if (m)
        EACH m[i] = MULTIPLY_ADD(fresh, g[i], m[i] * first);
    if (m && u->nesterov)
        EACH w[i] = MULTIPLY_ADD(MULTIPLY_ADD(m[i], first, g[i]), down, w[i]);
    else {
        const float *step = m ? m : g;
        EACH w[i] = MULTIPLY_ADD(step[i], down, w[i]);
    }
}

ISA_TARGET static void FN(adagrad)(const struct update *u, const float *g, int64_t num, float *w, float *sum)
{
    const float rate = u->rate, eps = u->eps;
    EACH {
        sum[i] = MULTIPLY_ADD(g[i], g[i], sum[i]);
        w[i] -= rate * g[i] / (sqrtf(sum[i]) + eps);
    }
}

ISA_TARGET static void FN(adam)(const struct update *u, const float *g, int64_t num, float *w, float *m, float *v,
                                float *largest)
{
    const float rate = u->rate, fresh = u->new_first, second = u->second, new_second = u->new_second;
    const float shrink = u->shrink, eps = u->eps, root = u->root;
    if (shrink != 1)
        EACH w[i] *= shrink;
    if (largest)
        EACH {
            m[i] = MULTIPLY_ADD(fresh, g[i] - m[i], m[i]);
            v[i] = MULTIPLY_ADD(new_second * g[i], g[i], v[i] * second);
            largest[i] = largest[i] >= v[i] ? largest[i] : v[i];
            w[i] -= rate * m[i] / (sqrtf(largest[i]) / root + eps);
        }
    else
        EACH {
            m[i] = MULTIPLY_ADD(fresh, g[i] - m[i], m[i]);
            v[i] = MULTIPLY_ADD(new_second * g[i], g[i], v[i] * second);
            w[i] -= rate * m[i] / (sqrtf(v[i]) / root + eps);
        }
}

ISA_TARGET static void FN(update)(void *context, int64_t index, int thread)
{
    const struct update *u = context;
    (void)thread;
    for (int64_t begin = index * BLOCKS * BLOCK; begin < (index + 1) * BLOCKS * BLOCK && begin < u->num; begin += BLOCK) {
        int64_t num = u->num - begin < BLOCK ? u->num - begin : BLOCK;
        float buffer[BLOCK], *w = u->weights + begin;
        const float *g = FN(gradient)(u, begin, num, buffer);
        if (u->sign < 0 || u->decay != 0) {
            const float sign = u->sign, decay = u->decay;
            EACH buffer[i] = MULTIPLY_ADD(w[i], decay, sign * g[i]);
            g = buffer;
        }
        float *states[3];
        for (int i = 0; i < 3; i++)
            states[i] = u->states[i] ? u->states[i] + begin : NULL;
        if (u->optimizer == SGD)
            FN(sgd)(u, g, num, w, states[0]);
        else if (u->optimizer == ADAGRAD)
            FN(adagrad)(u, g, num, w, states[0]);
        else
            FN(adam)(u, g, num, w, states[0], states[1], states[2]);
    }
}
#undef EACH
#undef MULTIPLY_ADD
