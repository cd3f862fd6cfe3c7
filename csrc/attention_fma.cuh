// Device kernel of regional attention in float32 arithmetic, for float32; what it shares with the backward pass. Free of
// torch.
//
// A warp owns a few queries, a lane one of 32 staged tokens; for products with values a lane owns every 32nd element.
#pragma once

#include "attention_tiles.cuh"

namespace instantas {

constexpr int FMA_WARPS = 4;
constexpr int FMA_THREADS = FMA_WARPS * WARP;
constexpr int FMA_DEPTH = 256;               // the largest head size
constexpr int FMA_CHUNKS = FMA_DEPTH / WARP;  // of a row, with an element in every lane
constexpr int FMA_TOKENS = WARP;             // staged at a time
constexpr int FMA_TERMS = 8;                 // of a dot product, near the square root of the usual lengths

// Between the rows of tokens, odd: the lanes' rows lie in different banks.
INSTANTAS_INLINE int pitch_of(int depth) { return depth | 1; }

// `rows` rows of float32 into shared memory, the one of number(i) as the i-th: zeros for numbers from `count` on.
template <class T, class Number>
__device__ __forceinline__ void stage_floats(float* shared, int rows, int pitch, const T* source, const Number& number,
                                             int count, int64_t stride, int depth) {
  for (int i = threadIdx.x; i < rows * depth; i += blockDim.x) {
    const int row = i / depth, d = i % depth, from = number(row);
    shared[row * pitch + d] = from < count ? widen(source[from * stride + d]) : 0.0f;
  }
}

// The rows of tokens in their order.
template <class T>
__device__ __forceinline__ void stage_tokens(float* shared, int pitch, const T* source, int count, int64_t stride,
                                             int depth) {
  stage_floats(shared, FMA_TOKENS, pitch, source, [](int token) { return token; }, count, stride, depth);
}

// dots[r] = rows[r] . column, for rows `depth` apart. A few products are added up by themselves first: long sums keep
// their digits.
template <int ROWS>
__device__ __forceinline__ void find_dots(float (&dots)[ROWS], const float* rows, const float* column, int depth) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) dots[r] = 0.0f;
  for (int start = 0; start < depth; start += FMA_TERMS) {
    float staged[ROWS] = {};
#pragma unroll
    for (int i = 0; i < FMA_TERMS; ++i) {
      const int d = start + i;
      if (d >= depth) break;
      const float element = column[d];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) staged[r] = fmaf(rows[r * depth + d], element, staged[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) dots[r] += staged[r];
  }
}

// sums[r] += the lanes' factors[r] times their rows at `tokens`, a few of which are added up by themselves first.
template <int ROWS>
__device__ __forceinline__ void add_rows(float (&sums)[ROWS][FMA_CHUNKS], const float (&factors)[ROWS],
                                         const float* tokens, int count, int pitch, int depth) {
  const int lane = threadIdx.x % WARP;
  for (int start = 0; start < FMA_TOKENS && start < count; start += FMA_TERMS) {
    float staged[ROWS][FMA_CHUNKS] = {};
#pragma unroll
    for (int i = 0; i < FMA_TERMS; ++i) {
      if (start + i >= count) break;
      float factor[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) factor[r] = shuffle(factors[r], start + i);
#pragma unroll
      for (int chunk = 0; chunk < FMA_CHUNKS; ++chunk) {
        const int d = chunk * WARP + lane;
        if (d >= depth) break;
        const float element = tokens[(start + i) * pitch + d];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) staged[r][chunk] = fmaf(factor[r], element, staged[r][chunk]);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int chunk = 0; chunk < FMA_CHUNKS; ++chunk) sums[r][chunk] += staged[r][chunk];
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_largest(float value) {
#pragma unroll
  for (int mask = WARP / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// The softmax of one row so far, over its weighted terms: exponentials relative to the largest, times the share.
struct RunningSoftmax {
  float largest = -INFINITY;
  float sum = 0.0f;

  // Takes in a logit per lane that counts, which is its dot product times `scale`: returns the lane's term, and the
  // factor of what was summed before. The product is rounded with the difference, and the share is a factor and not a
  // logarithm in the exponent: either would cost digits. No term exceeds 1 all the same.
  __device__ __forceinline__ float add(float dot, bool counts, float scale, float share, float& factor) {
    float raised = warp_largest(counts ? dot * scale : -INFINITY);
    if (share > 0.0f) raised += log2f(share);
    raised = fmaxf(largest, raised);
    const float anchor = raised == -INFINITY ? 0.0f : raised;
    factor = exp2f(largest - anchor);
    const float term = counts ? share * exp2f(fmaf(dot, scale, -anchor)) : 0.0f;
    sum = sum * factor + warp_sum(term);
    largest = raised;
    return term;
  }
};

// A block's tile of queries, and the tokens it has staged.
template <class T, int ROWS_OF_WARP>
struct FmaTile {
  static constexpr int ROWS = FMA_WARPS * ROWS_OF_WARP;
  const Attention<T>& attention;
  float *queries, *keys, *values;
  int pitch, head, first, warp_row;  // the tile's first query, the warp's first row in the tile
  int64_t image, stride;

  __device__ __forceinline__ FmaTile(const Attention<T>& given, float* shared)
      : attention(given), queries(shared), keys(queries + ROWS * given.depth), pitch(pitch_of(given.depth)) {
    values = keys + FMA_TOKENS * pitch;
    const int tiles = (given.queries + ROWS - 1) / ROWS;
    head = blockIdx.x % given.heads;
    first = blockIdx.x / given.heads % tiles * ROWS;
    image = blockIdx.x / given.heads / tiles;
    warp_row = threadIdx.x / WARP * ROWS_OF_WARP;
    stride = int64_t{given.heads} * given.depth;
    stage_rows(queries, given.query);
  }

  // The tile's rows of a tensor like the queries.
  __device__ __forceinline__ void stage_rows(float* shared, const T* source) const {
    stage_floats(shared, ROWS, attention.depth, source + attention.query_offset(image, 0, head),
                 [&](int row) { return attention.row(image, first + row); }, attention.queries, stride,
                 attention.depth);
  }

  __device__ __forceinline__ float* end() const { return values + FMA_TOKENS * pitch; }

  __device__ __forceinline__ void stage_tokens(int prompt, int start, int count) const {
    const int64_t offset = attention.key_offset(prompt, start, head);
    sync_block();
    instantas::stage_tokens(keys, pitch, attention.key + offset, count, stride, attention.depth);
    instantas::stage_tokens(values, pitch, attention.value + offset, count, stride, attention.depth);
    sync_block();
  }

  // Of the warp's rows with the lane's token.
  __device__ __forceinline__ void find_key_dots(float (&dots)[ROWS_OF_WARP]) const {
    find_dots(dots, queries + warp_row * attention.depth, keys + threadIdx.x % WARP * pitch, attention.depth);
  }

  // Whether the lane's token is one of `count`, and the row has a share in its prompt.
  __device__ __forceinline__ bool counts(int count, float share) const {
    return static_cast<int>(threadIdx.x % WARP) < count && share > 0.0f;
  }

  template <class Active>
  __device__ __forceinline__ void find_shares(float (&share)[ROWS_OF_WARP], const Active& active, int slot) const {
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; ++r)
      share[r] = attention.weight(image, slot, active.number(warp_row + r)) / active.norm(warp_row + r);
  }

  // result[row of the warp][every 32nd element] into the rows of `out`.
  template <class Active>
  __device__ __forceinline__ void store_rows(T* out, const Active& active,
                                             const float (&result)[ROWS_OF_WARP][FMA_CHUNKS]) const {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; ++r) {
      const int number = active.number(warp_row + r);
      if (number >= attention.queries) continue;
      T* row = out + attention.query_offset(image, number, head);
#pragma unroll
      for (int chunk = 0; chunk < FMA_CHUNKS; ++chunk)
        if (chunk * WARP + lane < attention.depth) row[chunk * WARP + lane] = narrow<T>(result[r][chunk]);
    }
  }
};

constexpr int FMA_ROWS_OF_WARP = 4;
constexpr int FMA_ROWS = FMA_WARPS * FMA_ROWS_OF_WARP;

inline int fma_shared(int rows, int depth) { return (rows * depth + 2 * FMA_TOKENS * pitch_of(depth)) * 4; }

__global__ void __launch_bounds__(FMA_THREADS) attention_fma_kernel(Attention<float> attention) {
  constexpr int ROWS = FMA_ROWS_OF_WARP;
  const FmaTile<float, ROWS> tile(attention, reinterpret_cast<float*>(shared_memory()));
  ActiveRows<FMA_ROWS> active(reinterpret_cast<char*>(tile.end()));
  active.find(attention, tile.image, tile.first);
  sync_block();

  float result[ROWS][FMA_CHUNKS] = {}, mixed[ROWS][FMA_CHUNKS] = {};
  RunningSoftmax softmax[ROWS];
  for (int slot = 0; slot < attention.slots; ++slot) {
    if (!active.anywhere(slot)) continue;
    const bool warp_active = active.template among<ROWS>(slot, tile.warp_row);
    float share[ROWS];
    tile.find_shares(share, active, slot);
    const int prompt = attention.prompt(tile.image, slot), tokens = attention.length(prompt);
    for (int start = 0; start < tokens; start += FMA_TOKENS) {
      tile.stage_tokens(prompt, start, tokens - start);
      if (!warp_active) continue;
      float terms[ROWS];
      tile.find_key_dots(terms);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float factor;
        const float weight = attention.joint ? share[r] : 1.0f;
        terms[r] = softmax[r].add(terms[r], tile.counts(tokens - start, share[r]), attention.scale_base2, weight, factor);
#pragma unroll
        for (int chunk = 0; chunk < FMA_CHUNKS; ++chunk) mixed[r][chunk] *= factor;
      }
      add_rows(mixed, terms, tile.values, tokens - start, tile.pitch, attention.depth);
    }
    if (attention.joint || !warp_active) continue;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int chunk = 0; chunk < FMA_CHUNKS; ++chunk) {
        if (share[r] > 0.0f) result[r][chunk] += mixed[r][chunk] * (share[r] / softmax[r].sum);
        mixed[r][chunk] = 0.0f;
      }
      softmax[r] = RunningSoftmax();
    }
  }
  if (attention.joint) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int chunk = 0; chunk < FMA_CHUNKS; ++chunk)
        result[r][chunk] = softmax[r].sum == 0.0f ? 0.0f : mixed[r][chunk] / softmax[r].sum;
  }
  tile.store_rows(attention.out, active, result);
}

}  // namespace instantas
