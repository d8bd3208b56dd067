/* One instruction set and one type of kernel.c. Loops are plain: the compiler vectorises them. */
#define F(name) SQUALL_JOIN(TYPED(name), ISA)

/* total ** -beta, in place; roots for the exponents in use, which are many times as fast as pow. */
ISA_TARGET static void F(negative_power)(REAL *restrict total, int64_t num, REAL beta)
{
    if (beta == (REAL)0.75)
        for (int64_t i = 0; i < num; i++) {
            REAL root = SQRT(total[i]);
            total[i] = (REAL)1 / (root * SQRT(root));
        }
    else if (beta == (REAL)0.5)
        for (int64_t i = 0; i < num; i++)
            total[i] = (REAL)1 / SQRT(total[i]);
    else if (beta == (REAL)1)
        for (int64_t i = 0; i < num; i++)
            total[i] = (REAL)1 / total[i];
    else
        for (int64_t i = 0; i < num; i++)
            total[i] = POW(total[i], -beta);
}

/* total = k + alpha * (sum of the squares of rows low to high); a row is `stride` after the one before it. */
ISA_TARGET static void F(window)(const REAL *restrict x, int64_t stride, int64_t low, int64_t high, int64_t num,
                                 REAL alpha, REAL k, int relu, REAL *restrict total)
{
    for (int64_t i = 0; i < num; i++)
        total[i] = 0;
    for (int64_t row = low; row <= high; row++) {
        const REAL *restrict values = x + row * stride;
        if (relu)
            for (int64_t i = 0; i < num; i++) {
                REAL value = values[i] < 0 ? 0 : values[i];
                total[i] += value * value;
            }
        else
            for (int64_t i = 0; i < num; i++)
                total[i] += values[i] * values[i];
    }
    for (int64_t i = 0; i < num; i++)
        total[i] = k + alpha * total[i];
}

/* Channels first: a block of pixels of one group; its rows lie `pixels` apart. */
ISA_TARGET static void F(first)(void *context, int64_t index, int thread)
{
    const struct norm *norm = context;
    int64_t blocks = num_blocks(norm), channels = norm->channels, stride = norm->pixels;
    int64_t begin = index % blocks * BLOCK, num = stride - begin < BLOCK ? stride - begin : BLOCK;
    int64_t offset = index / blocks * channels * stride + begin; /* index / blocks is sample and group in one */
    const REAL *restrict x = (const REAL *)norm->x + offset;
    REAL *restrict y = (REAL *)norm->y + offset;
    REAL alpha = (REAL)norm->alpha, beta = (REAL)norm->beta, k = (REAL)norm->k;
    REAL total[BLOCK], scale[BLOCK];
    const REAL *restrict grad = norm->backward ? (const REAL *)norm->grad + offset : NULL;
    REAL *restrict direct = (REAL *)norm->scratch + thread * norm->num_scratch, *restrict through = direct + channels * BLOCK;
    for (int64_t c = 0; c < channels; c++) {
        int64_t low = c < norm->below ? 0 : c - norm->below;
        int64_t high = c + norm->above < channels ? c + norm->above : channels - 1;
        const REAL *restrict here = x + c * stride;
        /* Channels lie too far apart for the processor to foresee the next one. */
        for (int64_t i = 0; i < num && c + 1 < channels; i += 64 / (int64_t)sizeof(REAL)) {
            __builtin_prefetch(x + (high + 1) * stride + i);
            if (grad)
                __builtin_prefetch(grad + (c + 1) * stride + i);
            __builtin_prefetch(y + (c + 1) * stride + i, 1);
        }
        F(window)(x, stride, low, high, num, alpha, k, norm->relu, total);
        memcpy(scale, total, (size_t)num * sizeof(REAL));
        F(negative_power)(scale, num, beta);
        if (grad) {
            const REAL *restrict g = grad + c * stride;
            REAL *restrict d = direct + c * BLOCK, *restrict t = through + c * BLOCK;
            for (int64_t i = 0; i < num; i++) {
                REAL value = norm->relu && here[i] < 0 ? 0 : here[i];
                d[i] = scale[i] * g[i];
                t[i] = d[i] * value / total[i];
            }
        } else {
            REAL *restrict out = y + c * stride;
            for (int64_t i = 0; i < num; i++)
                out[i] = (norm->relu && here[i] < 0 ? 0 : here[i]) * scale[i];
        }
    }
    if (!grad)
        return;
    REAL factor = 2 * alpha * beta;
    for (int64_t c = 0; c < channels; c++) {
        /* A channel counts for those whose window it is in: the window turned round. */
        int64_t low = c < norm->above ? 0 : c - norm->above;
        int64_t high = c + norm->below < channels ? c + norm->below : channels - 1;
        for (int64_t i = 0; i < num; i++)
            total[i] = 0;
        for (int64_t row = low; row <= high; row++) {
            const REAL *restrict t = through + row * BLOCK;
            for (int64_t i = 0; i < num; i++)
                total[i] += t[i];
        }
        const REAL *restrict d = direct + c * BLOCK, *restrict here = x + c * stride;
        REAL *restrict out = y + c * stride;
        if (norm->relu)
            for (int64_t i = 0; i < num; i++)
                out[i] = here[i] > 0 ? d[i] - factor * here[i] * total[i] : 0;
        else
            for (int64_t i = 0; i < num; i++)
                out[i] = d[i] - factor * here[i] * total[i];
    }
}

/* Sum num windows of `size` neighbours; values has size - 1 more than num. */
ISA_TARGET static void F(slide)(const REAL *restrict values, int64_t num, int64_t size, REAL *restrict total)
{
    for (int64_t i = 0; i < num; i++)
        total[i] = values[i];
    for (int64_t shift = 1; shift < size; shift++)
        for (int64_t i = 0; i < num; i++)
            total[i] += values[i + shift];
}

/* Channels last: a block of pixels, whose channels are neighbours in memory. */
ISA_TARGET static void F(last)(void *context, int64_t index, int thread)
{
    const struct norm *norm = context;
    int64_t blocks = num_blocks(norm), channels = norm->channels, size = norm->below + norm->above + 1;
    int64_t begin = index % blocks * BLOCK, num = norm->pixels - begin < BLOCK ? norm->pixels - begin : BLOCK;
    int64_t first = (index / blocks * norm->pixels + begin) * norm->groups * channels;
    REAL alpha = (REAL)norm->alpha, beta = (REAL)norm->beta, k = (REAL)norm->k, factor = 2 * alpha * beta;
    /* Neighbours on either side of a row are zero; the windows that the backward pass sums are turned round. */
    REAL *padded = (REAL *)norm->scratch + thread * norm->num_scratch;
    REAL *restrict squares = padded + norm->below, *restrict through = padded + norm->above;
    int64_t num_padded = channels + size - 1;
    REAL *restrict total = padded + num_padded, *restrict scale = total + channels, *restrict direct = scale + channels;
    for (int64_t row = 0; row < num * norm->groups; row++) {
        int64_t offset = first + row * channels;
        const REAL *restrict x = (const REAL *)norm->x + offset;
        REAL *restrict y = (REAL *)norm->y + offset;
        memset(padded, 0, (size_t)num_padded * sizeof(REAL));
        for (int64_t c = 0; c < channels; c++) {
            REAL value = norm->relu && x[c] < 0 ? 0 : x[c];
            squares[c] = value * value;
        }
        F(slide)(padded, channels, size, total);
        for (int64_t c = 0; c < channels; c++)
            total[c] = k + alpha * total[c];
        memcpy(scale, total, (size_t)channels * sizeof(REAL));
        F(negative_power)(scale, channels, beta);
        if (!norm->backward) {
            for (int64_t c = 0; c < channels; c++)
                y[c] = (norm->relu && x[c] < 0 ? 0 : x[c]) * scale[c];
            continue;
        }
        const REAL *restrict grad = (const REAL *)norm->grad + offset;
        memset(padded, 0, (size_t)num_padded * sizeof(REAL));
        for (int64_t c = 0; c < channels; c++) {
            REAL value = norm->relu && x[c] < 0 ? 0 : x[c];
            direct[c] = scale[c] * grad[c];
            through[c] = direct[c] * value / total[c];
        }
        F(slide)(padded, channels, size, total);
        for (int64_t c = 0; c < channels; c++) {
            REAL value = direct[c] - factor * x[c] * total[c];
            y[c] = norm->relu && !(x[c] > 0) ? 0 : value;
        }
    }
}
#undef F
