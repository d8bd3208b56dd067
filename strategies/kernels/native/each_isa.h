/* Includes TEMPLATE once for every instruction set that one binary serves, with
 *
 *   ISA         its name, which FN(name) appends to a function's
 *   ISA_TARGET  what makes a function use it
 *   LANES       single-precision numbers in a register of it
 *
 * defined. No include guard: each kernel's source includes it, and may do so several times.
 */
#include "native.h"

#undef FN
#define FN(name) SQUALL_JOIN(name, ISA)

#if SQUALL_HAS_X86
#define ISA avx512
#define LANES 16
#ifdef __clang__
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#else
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#endif
#include TEMPLATE
#undef ISA
#undef LANES
#undef ISA_TARGET

#define ISA avx2
#define LANES 8
#define ISA_TARGET __attribute__((target("avx2,fma")))
#include TEMPLATE
#undef ISA
#undef LANES
#undef ISA_TARGET
#endif

#define ISA plain
#define LANES 4
#define ISA_TARGET
#include TEMPLATE
#undef ISA
#undef LANES
#undef ISA_TARGET
