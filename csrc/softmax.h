// Attention of a tile of queries by one softmax, in the host's vector registers. Free of torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "processor.h"

namespace instantas {

constexpr int TILE_ROWS = 6;  // queries a tile: with strips of 4 vectors, 24 of the 32 registers are sums

// Vectors of BYTES with elements A, of which WIDTH for each query are summed at once.
template <class A, int BYTES, int WIDTH_>
struct Kind {
  using Element = A;
  typedef A Vector __attribute__((vector_size(BYTES)));
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Bits __attribute__((vector_size(BYTES)));
  static constexpr int LANES = BYTES / sizeof(A), WIDTH = WIDTH_;
};

inline int64_t padded(int64_t count, int64_t lanes) { return (count + lanes - 1) / lanes * lanes; }

template <class Vector, class A>
INSTANTAS_KERNEL void load(Vector& vector, const A* from) { std::memcpy(&vector, from, sizeof vector); }
template <class Vector, class A>
INSTANTAS_KERNEL void store(A* to, const Vector& vector) { std::memcpy(to, &vector, sizeof vector); }

constexpr double FACTORIAL[] = {1,     1,      2,       6,        24,        120,        720,
                                5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};

// x = e^x for x <= 0: 2^n times the series of what is left; 0 where that would be below the normal numbers.
template <class K>
INSTANTAS_KERNEL void exponential(typename K::Vector& x) {
  using A = typename K::Element;
  using Vector = typename K::Vector;
  using Limits = std::numeric_limits<A>;
  constexpr int MANTISSA = Limits::digits - 1, TERMS = sizeof(A) == 4 ? 7 : 13;
  constexpr double LN2 = 0x1.62e42fefa39efp-1, LN2_REST = 0x1.abc9e3b39803fp-56;
  constexpr A HIGH = sizeof(A) == 4 ? A(0x1.62ep-1) : A(0x1.62e42fep-1);  // few digits: products with n are exact
  constexpr A LOW = A(LN2 - double(HIGH) + LN2_REST);
  constexpr A SHIFT = A(int64_t{3} << (MANTISSA - 1)) + (Limits::max_exponent - 1);  // leaves the exponent of 2^n lowest
  const Vector shifted = x * A(1 / LN2) + SHIFT, n = shifted - SHIFT;
  const Vector rest = (x - n * HIGH) - n * LOW;
  Vector series = Vector{} + A(1 / FACTORIAL[TERMS]), scale;
#pragma GCC unroll 16
  for (int k = TERMS - 1; k >= 0; --k) series = series * rest + A(1 / FACTORIAL[k]);
  typename K::Bits power;
  std::memcpy(&power, &shifted, sizeof power);
  power <<= MANTISSA;
  std::memcpy(&scale, &power, sizeof scale);
  x = x < A(Limits::min_exponent * LN2) ? Vector{} : series * scale;  // NaN stays
}

// A strip of c (TILE_ROWS, width) = or += a (TILE_ROWS, depth) b (depth, width): as many sums as there are registers.
template <class K, int WIDTH, class A>
INSTANTAS_KERNEL void multiply_strip(const A* a, int64_t pitch_a, const A* b, int64_t pitch_b, A* c, int64_t pitch_c,
                                     int64_t depth, bool add) {
  typename K::Vector sum[TILE_ROWS][WIDTH], right[WIDTH];
#pragma GCC unroll 8
  for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) {
      sum[m][v] = typename K::Vector{};
      if (add) load(sum[m][v], c + m * pitch_c + v * K::LANES);
    }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) load(right[v], b + k * pitch_b + v * K::LANES);
#pragma GCC unroll 8
    for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < WIDTH; ++v) sum[m][v] += a[m * pitch_a + k] * right[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) store(c + m * pitch_c + v * K::LANES, sum[m][v]);
}

template <class K, class A>
INSTANTAS_KERNEL void multiply(const A* a, int64_t pitch_a, const A* b, int64_t width, A* c, int64_t pitch_c,
                               int64_t depth, bool add) {
  int64_t x = 0;
  for (; x + K::WIDTH * K::LANES <= width; x += K::WIDTH * K::LANES)
    multiply_strip<K, K::WIDTH>(a, pitch_a, b + x, width, c + x, pitch_c, depth, add);
  for (; x < width; x += K::LANES) multiply_strip<K, 1>(a, pitch_a, b + x, width, c + x, pitch_c, depth, add);
}

// A head of a prompt; lengths are padded to whole vectors.
template <class A>
struct Prompt {
  const A *keys, *values;  // (D, padded tokens), (tokens, padded D)
  int64_t tokens;
};

template <class A>
struct Tile {
  int64_t depth;    // D
  A scale;          // of the logits
  const A* queries; // (TILE_ROWS, D)
  A* results;       // (TILE_ROWS, padded D)
  A* logits;        // (TILE_ROWS, pitch)
  int64_t pitch;    // at least the sum of the padded tokens
};

// results += factor softmax(logits + bias) values, by one softmax over the tokens of all the prompts.
// bias: (prompts, TILE_ROWS); factor: (TILE_ROWS). Jointly, logits that are all -inf have no say; alone they give NaN.
template <class K, class A = typename K::Element>
INSTANTAS_KERNEL void attend_tile(const Tile<A>& tile, const Prompt<A>* prompts, int64_t count, const A* bias,
                                  const A* factor, bool joint) {
  using Vector = typename K::Vector;
  constexpr A NOTHING = -std::numeric_limits<A>::infinity();
  const int64_t width = padded(tile.depth, K::LANES);
  Vector top[TILE_ROWS], x;
  for (int m = 0; m < TILE_ROWS; ++m) top[m] = Vector{} + NOTHING;
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tokens = prompts[i].tokens, all = padded(tokens, K::LANES);
    multiply<K>(tile.queries, tile.depth, prompts[i].keys, all, tile.logits + end, tile.pitch, tile.depth, false);
    for (int m = 0; m < TILE_ROWS; ++m) {
      A* logits = tile.logits + m * tile.pitch + end;
      for (int64_t t = 0; t < all; t += K::LANES) {
        load(x, logits + t);
        x = x * tile.scale + bias[i * TILE_ROWS + m];
        store(logits + t, x);
        if (t + K::LANES > tokens) {  // after the scale, which may be 0 or less
          for (int64_t past = tokens; past < all; ++past) logits[past] = NOTHING;
          load(x, logits + t);
        }
        top[m] = x > top[m] ? x : top[m];
      }
    }
    end += all;
  }
  for (int m = 0; m < TILE_ROWS; ++m) {
    A* logits = tile.logits + m * tile.pitch;
    A largest = NOTHING, sum = 0;
    for (int lane = 0; lane < K::LANES; ++lane) largest = top[m][lane] > largest ? top[m][lane] : largest;
    if (joint && largest == NOTHING) largest = 0;
    Vector sums{};
    for (int64_t t = 0; t < end; t += K::LANES) {
      load(x, logits + t);
      x -= largest;
      exponential<K>(x);
      sums += x;
      store(logits + t, x);
    }
    for (int lane = 0; lane < K::LANES; ++lane) sum += sums[lane];
    if (joint && sum == 0) sum = 1;
    const A share = factor[m] / sum;
    for (int64_t t = 0; t < end; t += K::LANES) {
      load(x, logits + t);
      x *= share;
      store(logits + t, x);
    }
  }
  end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tokens = prompts[i].tokens;
    multiply<K>(tile.logits + end, tile.pitch, prompts[i].values, width, tile.results, width, tokens, true);
    end += padded(tokens, K::LANES);
  }
}

// `attend_tile` for the processor it runs on, and how many elements its vectors have.
template <class A>
struct Attend {
  using Function = void (*)(const Tile<A>&, const Prompt<A>*, int64_t, const A*, const A*, bool);
  Function run;
  int64_t lanes;
};

template <class A>
void attend_128(const Tile<A>& tile, const Prompt<A>* prompts, int64_t count, const A* bias, const A* factor,
                bool joint) {
  attend_tile<Kind<A, 16, 2>>(tile, prompts, count, bias, factor, joint);
}

#ifdef __x86_64__

template <class A>
__attribute__((target("avx2,fma"))) void attend_256(const Tile<A>& tile, const Prompt<A>* prompts, int64_t count,
                                                    const A* bias, const A* factor, bool joint) {
  attend_tile<Kind<A, 32, 2>>(tile, prompts, count, bias, factor, joint);
}

template <class A>
__attribute__((target("avx512f,avx512dq,fma"))) void attend_512(const Tile<A>& tile, const Prompt<A>* prompts,
                                                                int64_t count, const A* bias, const A* factor,
                                                                bool joint) {
  attend_tile<Kind<A, 64, 4>>(tile, prompts, count, bias, factor, joint);
}

template <class A>
Attend<A> attend() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return {attend_512<A>, 64 / sizeof(A)};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {attend_256<A>, 32 / sizeof(A)};
  return {attend_128<A>, 16 / sizeof(A)};
}

#else

template <class A>
Attend<A> attend() {
  return {attend_128<A>, 16 / sizeof(A)};
}

#endif

}  // namespace instantas
