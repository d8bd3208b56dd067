/* int8 of one instruction set: one block, of BLOCK numbers at most. Loops are plain: the compiler vectorises them. */

/* The number of largest magnitude, with its sign; NaN if any isn't finite. As integers magnitudes are in order, and the
 * compiler may compare them in any: the lowest bit prefers a positive number to a negative one as large. */
ISA_TARGET SQUALL_INLINE float FN(scale_of)(const float *restrict x, int64_t num)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < num; i++) {
        union { float number; uint32_t bits; } value = {x[i]};
        uint32_t key = value.bits << 1 | (value.bits >> 31 ^ 1);
        largest = key > largest ? key : largest;
    }
    union { uint32_t bits; float number; } scale = {largest >> 1 | (~largest & 1) << 31};
    return scale.number + (scale.number - scale.number); /* infinity less itself is NaN */
}

/* codes: of every float16, by its bits, of 32768 times a number; all that float16 holds as subnormal has the code of
 * zero, and what isn't a number any. */
ISA_TARGET SQUALL_INLINE void FN(int8_encode)(const float *restrict x, int64_t num, const uint8_t *restrict codes,
                                       uint8_t *restrict header, uint8_t *restrict bits)
{
    float scale = FN(scale_of)(x, num);
    memcpy(header, &scale, sizeof scale);
    uint16_t index[BLOCK];
    for (int64_t i = 0; i < num; i++) {
        union { float number; uint32_t bits; } scaled = {x[i] / scale * 32768.0f};
        uint32_t size = scaled.bits & 0x7fffffff, half = (size + 0xfff + (size >> 13 & 1)) >> 13; /* to nearest even */
        half = size < 0x38800000 ? 0 : size > 0x7f800000 ? 0x7e00 : half - 0x1c000;
        index[i] = (uint16_t)((scaled.bits >> 16 & 0x8000) | half);
    }
    int64_t i = 0;
    for (; i + 8 <= num; i += 8) { /* eight bytes are stored at once: what stores take is what lookups would wait for */
        uint64_t eight = 0;
        SQUALL_UNROLL for (int byte = 0; byte < 8; byte++)
            eight |= (uint64_t)codes[index[i + byte]] << byte * 8;
        memcpy(bits + i, &eight, sizeof eight);
    }
    for (; i < num; i++)
        bits[i] = codes[index[i]];
}

/* values: what the codes stand for. */
ISA_TARGET SQUALL_INLINE void FN(int8_decode)(const uint8_t *restrict header, const uint8_t *restrict bits, int64_t num,
                                       const float *restrict values, float *restrict out)
{
    float scale, scaled[256];
    memcpy(&scale, header, sizeof scale);
    for (int i = 0; i < 256; i++)
        scaled[i] = values[i] * scale;
    int64_t i = 0;
    for (; i + 8 <= num; i += 8) {
        uint64_t eight; /* loaded at once, likewise; and not gathered, which takes longer */
        memcpy(&eight, bits + i, sizeof eight);
        SQUALL_UNROLL for (int byte = 0; byte < 8; byte++)
            memcpy(out + i + byte, scaled + (eight >> byte * 8 & 255), sizeof *out);
    }
    for (; i < num; i++)
        out[i] = scaled[bits[i]];
}
