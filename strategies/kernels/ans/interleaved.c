/* Symbols in and out of interleaved codes of asymmetric numeral systems: STATES states of 32 bits take turns, and share
 * one row of words of 16. Shares are of 2^-SHARE_BITS, and symbols bytes.
 *
 * States don't wait for one another, and what one looks up is one number: its symbol, how large the symbol's share is,
 * and where in the share it is. So as many states as a register has lanes are decoded at once, and while one register
 * waits for its look-up, the others have theirs.
 */
#include <string.h>

#include "../native/native.h"

enum { SHARE_BITS = 12, WHOLE = 1 << SHARE_BITS, STATES = 64, WORD_BITS = 16 };
static const uint32_t LOW = 1u << WORD_BITS; /* a state below this takes a word */

struct decoder {
    uint32_t states[STATES], table[WHOLE];
    const uint16_t *word, *end;
    uint8_t *symbols;
    int64_t num_symbols, done;
};

/* Whether frequencies are as they have to be is for who calls this to say: their sum is WHOLE, and none of them is. */
static void make_table(const uint16_t *frequencies, uint32_t *table)
{
    for (uint32_t at = 0, symbol = 0; at < WHOLE; symbol++)
        for (uint32_t i = 0; i < frequencies[symbol]; i++, at++)
            table[at] = symbol << 2 * SHARE_BITS | (uint32_t)frequencies[symbol] << SHARE_BITS | i;
}

SQUALL_INLINE uint32_t follow(const uint32_t *table, uint32_t state, uint8_t *symbol)
{
    uint32_t entry = table[state & (WHOLE - 1)];
    *symbol = (uint8_t)(entry >> 2 * SHARE_BITS);
    return (entry >> SHARE_BITS & (WHOLE - 1)) * (state >> SHARE_BITS) + (entry & (WHOLE - 1));
}

/* Decode as long as there certainly are words. Symbols are bytes, which may be anything to the compiler; not these. */
static void run(struct decoder *d)
{
    uint32_t states[STATES];
    const uint32_t *restrict table = d->table;
    uint8_t *restrict symbols = d->symbols;
    const uint16_t *word = d->word;
    int64_t at = d->done;
    memcpy(states, d->states, sizeof states);
    for (; at + STATES <= d->num_symbols && d->end - word >= STATES; at += STATES)
        for (int i = 0; i < STATES; i++) {
            uint32_t state = follow(table, states[i], symbols + at + i), refilled = state << WORD_BITS | *word;
            uint32_t refills = state < LOW; /* no branch: nobody can foresee it */
            states[i] = state ^ ((state ^ refilled) & -refills);
            word += refills;
        }
    memcpy(d->states, states, sizeof states);
    d->word = word;
    d->done = at;
}

#if SQUALL_HAS_X86
#include <immintrin.h>

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,popcnt"))) static void run_avx512(struct decoder *d)
{
    enum { GROUPS = STATES / 16 };
    const __m512i mask = _mm512_set1_epi32(WHOLE - 1), low = _mm512_set1_epi32((int)LOW);
    const uint16_t *word = d->word;
    __m512i states[GROUPS];
    int64_t at = d->done;
    SQUALL_UNROLL for (int i = 0; i < GROUPS; i++)
        states[i] = _mm512_loadu_si512(d->states + 16 * i);
    for (; at + STATES <= d->num_symbols && d->end - word >= STATES; at += STATES) {
        __m512i entries[GROUPS];
        SQUALL_UNROLL for (int i = 0; i < GROUPS; i++)
            entries[i] = _mm512_i32gather_epi32(_mm512_and_si512(states[i], mask), d->table, 4);
        SQUALL_UNROLL for (int i = 0; i < GROUPS; i++) {
            __m512i share = _mm512_and_si512(_mm512_srli_epi32(entries[i], SHARE_BITS), mask);
            __m512i state = _mm512_add_epi32(_mm512_mullo_epi32(share, _mm512_srli_epi32(states[i], SHARE_BITS)),
                                             _mm512_and_si512(entries[i], mask));
            __mmask16 refills = _mm512_cmplt_epu32_mask(state, low);
            __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)word));
            states[i] = _mm512_mask_or_epi32(state, refills, _mm512_slli_epi32(state, WORD_BITS),
                                             _mm512_maskz_expand_epi32(refills, words));
            word += __builtin_popcount(refills);
            _mm_storeu_si128((__m128i *)(d->symbols + at + 16 * i),
                             _mm512_cvtepi32_epi8(_mm512_srli_epi32(entries[i], 2 * SHARE_BITS)));
        }
    }
    SQUALL_UNROLL for (int i = 0; i < GROUPS; i++)
        _mm512_storeu_si512(d->states + 16 * i, states[i]);
    d->word = word;
    d->done = at;
}
#endif

/* Returns whether the code ends where its symbols do. */
SQUALL_EXPORT int squall_interleaved_decode(const uint16_t *words, int64_t num_words, const uint32_t *states,
                                            const uint16_t *frequencies, uint8_t *symbols, int64_t num_symbols)
{
    struct decoder d = {.word = words, .end = words + num_words, .symbols = symbols, .num_symbols = num_symbols};
    memcpy(d.states, states, sizeof d.states);
    make_table(frequencies, d.table);
#if SQUALL_HAS_X86
    if (squall_isa == 2)
        run_avx512(&d);
#endif
    run(&d);
    for (int64_t at = d.done; at < num_symbols; at++) {
        uint32_t *state = d.states + at % STATES;
        *state = follow(d.table, *state, symbols + at);
        if (*state < LOW && d.word < d.end)
            *state = *state << WORD_BITS | *d.word++;
    }
    int is_whole = d.word == d.end;
    for (int i = 0; i < STATES; i++)
        is_whole &= d.states[i] == LOW;
    return is_whole;
}

/* Returns how many words there are: the last ones of `words`, which has room for one a symbol. */
SQUALL_EXPORT int64_t squall_interleaved_encode(const int32_t *symbols, int64_t num_symbols,
                                                const uint16_t *frequencies, const uint16_t *starts, uint32_t *states,
                                                uint16_t *words)
{
    uint16_t *word = words + num_symbols;
    for (int i = 0; i < STATES; i++)
        states[i] = LOW;
    for (int64_t at = num_symbols - 1; at >= 0; at--) {
        uint32_t *state = states + at % STATES, share = frequencies[symbols[at]];
        if (*state >= share << (2 * WORD_BITS - SHARE_BITS)) {
            *--word = (uint16_t)*state;
            *state >>= WORD_BITS;
        }
        *state = (*state / share << SHARE_BITS) + *state % share + starts[symbols[at]];
    }
    return words + num_symbols - word;
}
