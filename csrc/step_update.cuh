// The guided step: its arguments, and what happens to a cell once its windows are merged. Free of torch; host and device.
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

// q times the prediction m of which p x + q m was kept.
template <class A>
INSTANTAS_INLINE A recalled(A p, A sample, A kept) {
  return kept - p * sample;
}

// The scheduler's numbers: coefficients a, b, c_1 .. c_k keep d, e and carry p, q, always given in float64.
struct Update {
  const double* coefficients;
  const double* keep;
  const double* carry;
  int history;  // k
};

// The arguments of guided_step, and the results that it fills.
template <class T>
struct Step {
  const T *cond, *uncond, *sample, *history, *latest;
  T *new_sample, *new_history, *new_latest;
  const arithmetic_t<T>*weight, *guidance_map;
  int64_t weight_stride;   // elements from one window's overlap weight to the next one's
  int64_t history_stride;  // elements of one history entry, and of one branch of latest
  arithmetic_t<T> guidance;
  Update update;
  bool is_guided;  // whether there is uncond
  bool keeps;      // whether there is latest
};

}  // namespace instantas
