// One code for several kinds of processor, of which the right one is chosen when it runs. Free of torch.
#pragma once

namespace instantas {

// Compiled into each of the functions that are made for a kind of processor, with its instructions.
#define INSTANTAS_KERNEL inline __attribute__((always_inline))

// Kernel::run(arguments...), a KERNEL, whose loops over cells the compiler vectorises. Without fused multiplications: a
// cell has the same bits on every x86 processor, in a vector or in what is left of a row.
template <class Kernel, class... Arguments>
void run_128(const Arguments&... arguments) {
  Kernel::run(arguments...);
}

#ifdef __x86_64__

template <class Kernel, class... Arguments>
__attribute__((target("avx2"))) void run_256(const Arguments&... arguments) {
  Kernel::run(arguments...);
}

#ifndef __clang__

// AVX-512 has fused multiplications of its own, which GCC can be told to leave alone; clang's build takes AVX2.
template <class Kernel, class... Arguments>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), optimize("fp-contract=off"))) void run_512(
    const Arguments&... arguments) {
  Kernel::run(arguments...);
}

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif

template <class Kernel, class... Arguments>
void run_for_processor(const Arguments&... arguments) {
#ifndef __clang__
  if (has_avx512()) return run_512<Kernel>(arguments...);
#endif
  if (__builtin_cpu_supports("avx2")) return run_256<Kernel>(arguments...);
  run_128<Kernel>(arguments...);
}

#else

template <class Kernel, class... Arguments>
void run_for_processor(const Arguments&... arguments) {
  run_128<Kernel>(arguments...);
}

#endif

}  // namespace instantas
