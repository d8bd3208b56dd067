/* The largest numbers and their places, with error feedback: one pass over memory, and then over few of them.
 *
 * A sample tells a threshold that a bit more than k numbers should reach. The pass adds the numbers to what is owed,
 * and notes down where the threshold is reached; which of these are the largest is found by their bits, 11 at a time.
 */
#include <string.h>

#include "../native/native.h"

enum { PIECE = 1 << 14, GROUP = 32, DIGITS = 1 << 11 };

static const uint32_t INFINITE = 0x7f800000;

struct top_k {
    const float *numbers;
    float *residual; /* or NULL */
    int64_t num;
    uint32_t threshold;
    int32_t *places; /* PIECE for each piece of work */
    int64_t *num_found;
};

/* A magnitude in the order of integers; NaN counts as infinite. */
static inline uint32_t magnitude(float number)
{
    union { float number; uint32_t bits; } both = {number};
    uint32_t size = both.bits & 0x7fffffff;
    return size < INFINITE ? size : INFINITE;
}

#define TEMPLATE "../top_k/template.h"
#include "../native/each_isa.h"

/* The rank-th largest of magnitudes, counted from 1, which are overwritten. */
static uint32_t find_rank(uint32_t *sizes, int64_t num, int64_t rank)
{
    uint32_t found = 0;
    static const int shifts[] = {20, 9, 0}, widths[] = {11, 11, 9};
    for (int digit = 0; digit < 3; digit++) {
        int64_t counts[DIGITS] = {0}, left = 0;
        uint32_t last = (1u << widths[digit]) - 1;
        for (int64_t i = 0; i < num; i++)
            counts[sizes[i] >> shifts[digit] & last]++;
        uint32_t value = last;
        while (counts[value] < rank)
            rank -= counts[value--];
        found |= value << shifts[digit];
        for (int64_t i = 0; i < num; i++) {
            sizes[left] = sizes[i];
            left += (sizes[i] >> shifts[digit] & last) == value;
        }
        num = left;
    }
    return found;
}

/* Writes k places, ascending, and then k numbers to data, at any address; of equal magnitudes the first count.
 *
 * residual: becomes, in place, itself and the numbers, but for what is sent; or NULL.
 * stride, rank: the threshold is the rank-th largest of every stride-th number; no threshold if rank is 0.
 * places: room for num and PIECE more; sizes: for num; num_found: for one of every PIECE.
 */
SQUALL_EXPORT void squall_top_k(const float *numbers, float *residual, uint8_t *data, int64_t num, int64_t k,
                                int64_t stride, int64_t rank, int32_t *places, uint32_t *sizes, int64_t *num_found,
                                int num_threads)
{
    struct top_k top_k = {numbers, residual, num, 0, places, num_found};
    if (rank) {
        int64_t num_sampled = 0;
        for (int64_t i = 0; i < num; i += stride)
            sizes[num_sampled++] = magnitude(residual ? residual[i] + numbers[i] : numbers[i]);
        top_k.threshold = find_rank(sizes, num_sampled, rank);
    }
    int64_t num_pieces = (num + PIECE - 1) / PIECE, num_places = 0;
    squall_parallel(SQUALL_PICK(add_and_look), &top_k, num_pieces, num_threads);
    for (int64_t piece = 0; piece < num_pieces; piece++) {
        memmove(places + num_places, places + piece * PIECE, (size_t)num_found[piece] * sizeof(int32_t));
        num_places += num_found[piece];
    }
    const float *wanted = residual ? residual : numbers;
    if (num_places < k) { /* the sample was none of the whole */
        for (int64_t i = 0; i < num; i++)
            places[i] = (int32_t)i;
        num_places = num;
    }
    for (int64_t i = 0; i < num_places; i++)
        sizes[i] = magnitude(wanted[places[i]]);
    uint32_t least = find_rank(sizes, num_places, k);
    int64_t num_equal = k, num_sent = 0; /* of those that are as large as the least, how many are sent */
    for (int64_t i = 0; i < num_places; i++)
        num_equal -= magnitude(wanted[places[i]]) > least;
    uint8_t *values = data + k * (int64_t)sizeof(int32_t);
    for (int64_t i = 0; i < num_places; i++) {
        int32_t place = places[i];
        uint32_t size = magnitude(wanted[place]);
        if (size > least || (size == least && num_equal-- > 0)) {
            memcpy(data + num_sent * 4, &place, 4);
            memcpy(values + num_sent * 4, wanted + place, 4);
            num_sent++;
            if (residual)
                residual[place] = 0;
        } else if (residual && size == INFINITE) {
            residual[place] = 0; /* it would come back in every code */
        }
    }
}
