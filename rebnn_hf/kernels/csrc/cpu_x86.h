/* What the CPU has. gcc's and clang's built-ins also ask the operating system for the registers. Internal. */
#ifndef REBNN_CPU_X86_H
#define REBNN_CPU_X86_H

static inline int cpu_has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif
