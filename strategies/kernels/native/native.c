/* Which instruction set, which threads; and the module that Python finds the library by. */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>

#include "native.h"

int squall_isa = 0;

/* What this machine can. */
static int best_isa(void)
{
#if SQUALL_HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

/* Choose an instruction set: 0, 1, 2, or -1 for the best. Returns the one in use, or -1 if this machine lacks it. */
SQUALL_EXPORT int squall_set_isa(int isa)
{
    int best = best_isa();
    if (isa > best)
        return -1;
    squall_isa = isa < 0 ? best : isa;
    return squall_isa;
}

/* GOMP_parallel of the OpenMP that Torch runs on. Its threads are there, and two pools would get in each other's way. */
typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
static parallel_region region;

SQUALL_EXPORT void squall_set_parallel_region(void *function)
{
    region = (parallel_region)function;
}

struct job {
    squall_task task;
    void *context;
    int64_t num_tasks;
    atomic_llong next;
    atomic_int num_here;
};

static void *work(void *data)
{
    struct job *job = data;
    int thread = atomic_fetch_add(&job->num_here, 1);
    for (;;) {
        int64_t index = atomic_fetch_add(&job->next, 1);
        if (index >= job->num_tasks)
            return NULL;
        job->task(job->context, index, thread);
    }
}

static void work_in_region(void *data)
{
    work(data);
}

void squall_parallel(squall_task task, void *context, int64_t num_tasks, int num_threads)
{
    if (num_threads > num_tasks)
        num_threads = (int)num_tasks;
    if (num_threads <= 1) {
        for (int64_t index = 0; index < num_tasks; index++)
            task(context, index, 0);
        return;
    }
    struct job job = {.task = task, .context = context, .num_tasks = num_tasks};
    atomic_init(&job.next, 0);
    atomic_init(&job.num_here, 0);
    if (region) {
        region(work_in_region, &job, (unsigned)num_threads, 0);
        return;
    }
    enum { MOST = 255 };
    pthread_t threads[MOST];
    int num_started = 0;
    while (num_started < num_threads - 1 && num_started < MOST &&
           pthread_create(&threads[num_started], NULL, work, &job) == 0)
        num_started++;
    work(&job);
    for (int i = 0; i < num_started; i++)
        pthread_join(threads[i], NULL);
}

/* The module is empty: functions are called by ctypes, which lets go of the interpreter's lock meanwhile. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_library", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__library(void)
{
    squall_set_isa(-1);
    return PyModule_Create(&module);
}
