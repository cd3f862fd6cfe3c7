// The guided step: what happens to one cell once its windows are merged. Free of torch; host and device.
#pragma once

#include "element.cuh"

namespace instantas {

// u + g (c - u): classifier-free guidance.
template <class A>
INSTANTAS_INLINE A guided(A conditional, A unconditional, A guidance) {
  return unconditional + guidance * (conditional - unconditional);
}

// a x + b m, the part of the update without history; also the new history entry d x + e m.
template <class A>
INSTANTAS_INLINE A combined(A of_sample, A sample, A of_merged, A merged) {
  return of_sample * sample + of_merged * merged;
}

// The scheduler's numbers: coefficients a, b, c_1 .. c_k and keep d, e, always given in float64.
struct Update {
  const double* coefficients;
  const double* keep;
  int history;  // k
};

}  // namespace instantas
