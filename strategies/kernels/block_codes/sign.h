/* 1bit of one instruction set: one block, of BLOCK numbers at most. Loops are plain: the compiler vectorises them. */

ISA_TARGET SQUALL_INLINE void FN(sign_encode)(const float *restrict x, int64_t num, uint8_t *restrict header,
                                       uint8_t *restrict bits)
{
    /* In double precision, or large numbers' sum is infinite where their mean isn't; in lanes that are the same for
     * every instruction set, so that they agree. */
    double above[8] = {0}, below[8] = {0};
    uint8_t positive[BLOCK];
    int64_t i = 0, num_positive = 0;
    doubles sums[4] = {{0}};
    for (; i + 8 <= num; i += 8)
        SQUALL_UNROLL for (int half = 0; half < 2; half++) {
            singles value;
            memcpy(&value, x + i + half * 4, sizeof value);
            integers is_above = value >= 0;
            sums[half] += __builtin_convertvector((singles)((integers)value & is_above), doubles);
            sums[2 + half] += __builtin_convertvector((singles)((integers)value & ~is_above), doubles);
        }
    memcpy(above, sums, sizeof above);
    memcpy(below, sums + 2, sizeof below);
    for (; i < num; i++) {
        above[i % 8] += x[i] >= 0 ? (double)x[i] : 0;
        below[i % 8] += x[i] >= 0 ? 0 : (double)x[i];
    }
    for (int lane = 1; lane < 8; lane++) {
        above[0] += above[lane];
        below[0] += below[lane];
    }
    for (i = 0; i < num; i++)
        positive[i] = x[i] >= 0;
    for (; i % 8; i++)
        positive[i] = 0;
    for (int64_t byte = 0; byte < i / 8; byte++) {
        uint64_t eight;
        memcpy(&eight, positive + byte * 8, sizeof eight);
        /* Eight bytes of 0 or 1: their bits, the first byte's lowest, come together in the highest byte. */
        bits[byte] = (uint8_t)(eight * 0x0102040810204080u >> 56);
        num_positive += __builtin_popcount(bits[byte]);
    }
    float means[2] = {(float)(above[0] / (double)(num_positive ? num_positive : 1)),
                      (float)(below[0] / (double)(num_positive < num ? num - num_positive : 1))};
    float invalid = (means[0] - means[0]) + (means[1] - means[1]); /* infinity less itself is NaN */
    means[0] += invalid;
    means[1] += invalid;
    memcpy(header, means, sizeof means);
}

ISA_TARGET SQUALL_INLINE void FN(sign_decode)(const uint8_t *restrict header, const uint8_t *restrict bits, int64_t num,
                                       float *restrict out)
{
    float means[2];
    memcpy(means, header, sizeof means);
    float above = means[0], below = means[1];
    int64_t whole = num / 8;
    /* As bits, so that either value comes out as it is. */
    const integers is_set[2] = {{1, 2, 4, 8}, {16, 32, 64, 128}}, zero = {0};
    const integers first = (integers)(above - (singles){0}), second = (integers)(below - (singles){0});
    for (int64_t byte = 0; byte < whole; byte++)
        SQUALL_UNROLL for (int half = 0; half < 2; half++) {
            integers mask = ((bits[byte] + zero) & is_set[half]) != 0, number = (first & mask) | (second & ~mask);
            memcpy(out + byte * 8 + half * 4, &number, sizeof number);
        }
    for (int64_t i = whole * 8; i < num; i++)
        out[i] = bits[i / 8] >> i % 8 & 1 ? above : below;
}
