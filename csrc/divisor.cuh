// Division of integers by a number that the host knows: a multiplication in place of some 20 instructions. Free of torch;
// host and device.
#pragma once

#include "element.cuh"

namespace instantas {

struct Parts {
  int quotient, remainder;
};

// Exact for divisors from 1 on and dividends from 0 on, each below 2^31.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (int64_t{1} << shift_ < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((((int64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }

  // n / d = n (2^32 + multiplier) / 2^(32 + shift), rounded down: the multiplier is off by too little to matter
  INSTANTAS_INLINE int quotient(int dividend) const {
    const uint32_t n = static_cast<uint32_t>(dividend);
    return static_cast<int>((static_cast<uint32_t>(uint64_t{n} * multiplier_ >> 32) + n) >> shift_);
  }

  INSTANTAS_INLINE Parts divide(int dividend) const {
    const int result = quotient(dividend);
    return {result, dividend - result * static_cast<int>(divisor_)};
  }

 private:
  uint32_t divisor_, multiplier_;
  int shift_ = 0;
};

}  // namespace instantas
