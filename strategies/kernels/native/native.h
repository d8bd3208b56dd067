/* What all kernels have in common: instruction sets, and threads. */
#ifndef SQUALL_NATIVE_H
#define SQUALL_NATIVE_H

#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SQUALL_HAS_X86 1
#else
#define SQUALL_HAS_X86 0
#endif

#if defined(_WIN32)
#define SQUALL_EXPORT __declspec(dllexport)
#else
#define SQUALL_EXPORT __attribute__((visibility("default")))
#endif

#define SQUALL_JOIN2(a, b) a##_##b
#define SQUALL_JOIN(a, b) SQUALL_JOIN2(a, b)
#define SQUALL_INLINE static inline __attribute__((always_inline))
/* A loop over the elements of registers, which the compiler has to take apart to keep them there. */
#define SQUALL_UNROLL _Pragma("GCC unroll 64")

/* The best instruction set of this machine, or the one that was asked for: 0 plain, 1 AVX2, 2 AVX-512. */
extern int squall_isa;

/* Picks the implementation of a function that each_isa.h has made. */
#if SQUALL_HAS_X86
#define SQUALL_PICK(name) (squall_isa == 2 ? name##_avx512 : squall_isa == 1 ? name##_avx2 : name##_plain)
#else
#define SQUALL_PICK(name) (name##_plain)
#endif

/* One piece of work; thread counts from 0, so that scratch memory can be a thread's own. */
typedef void (*squall_task)(void *context, int64_t index, int thread);

/* Call task for every index below num_tasks, on at most num_threads threads, this one among them. */
void squall_parallel(squall_task task, void *context, int64_t num_tasks, int num_threads);

#endif
