// Device kernel of regional attention on the tensor cores, for float16 and bfloat16. Free of torch.
//
// Each warp owns 16 queries. Logits and probabilities stay in registers in the layout of mma.m16n8k16, where 77 tokens
// pad to 80. Probabilities enter the second product as a sum of two 16-bit numbers: rounded to one they would double the
// error of the result. Every architecture since sm_80 runs this kernel, sm_90a too: whether wgmma is faster there is not
// measured.
#pragma once

#include "attention_tiles.cuh"
#include "walk.cuh"

namespace instantas {

// What a block computes with mma.m16n8k16. DEPTH: the head size, padded to a multiple of 16.
template <int DEPTH>
struct MmaShape {
  static constexpr int WARPS = DEPTH <= 64 ? 8 : 4;
  static constexpr int ROWS = 16 * WARPS;
  static constexpr int BLOCKS = DEPTH <= 64 ? 2 : DEPTH <= 128 ? 3 : 2;  // that share a multiprocessor's registers
  static constexpr int TOKENS = DEPTH <= 160 ? 80 : 48;  // staged at a time
  static constexpr int PITCH = DEPTH + 8;  // elements between rows: the 8 rows of a matrix lie in different banks
  static constexpr int QUERIES = ROWS * PITCH * 2, MATRICES = QUERIES + 2 * TOKENS * PITCH * 2;  // bytes
};

// Rows of `depth` elements, `stride` apart in memory, into shared memory, the one of number(i) as the i-th: zeros past
// the last element, and for numbers from `count` on.
template <int ROWS, int DEPTH, class T, class Number>
__device__ __forceinline__ void stage(T* shared, const T* rows, const Number& number, int count, int64_t stride,
                                      int depth, bool aligned) {
  constexpr int PITCH = DEPTH + 8, PACKS = DEPTH / 8, THREADS = MmaShape<DEPTH>::WARPS * WARP;
  const int thread = thread_of_block();
  if (aligned) {
#pragma unroll 2  // copies wait for nothing: all of them at once would take registers
    for (int i = thread; i < ROWS * PACKS; i += THREADS) {
      const int row = i / PACKS, d = i % PACKS * 8;
      const int source = number(row);
      const bool inside = source < count && d < depth;
      copy_async(shared + row * PITCH + d, inside ? rows + source * stride + d : rows, inside);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < ROWS * DEPTH; i += THREADS) {
      const int row = i / DEPTH, d = i % DEPTH;
      const int source = number(row);
      shared[row * PITCH + d] = source < count && d < depth ? rows[source * stride + d] : narrow<T>(0.0f);
    }
  }
  close_copy_group();
}

// logits = query key^T for the 16 rows at `query` and the first `count` tokens at `key`, scaled; -inf past them.
template <int DEPTH, int PAIRS, class T>
__device__ __forceinline__ void find_logits(float (&logits)[2 * PAIRS][4], const T* query, const T* key, int count,
                                            float scale) {
  constexpr int PITCH = DEPTH + 8;
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int fragment = 0; fragment < 2 * PAIRS; ++fragment)
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[fragment][i] = 0.0f;
#pragma unroll
  for (int d = 0; d < DEPTH; d += 16) {
    unsigned a[4];
    load_matrices(a, query + lane % 16 * PITCH + d + lane / 16 * 8);
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      if (pair * 16 >= count) break;
      unsigned b[4];
      load_matrices(b, key + (pair * 16 + lane / 16 * 8 + lane % 8) * PITCH + d + lane / 8 % 2 * 8);
      multiply_add(logits[2 * pair], a, b[0], b[1], T{});
      multiply_add(logits[2 * pair + 1], a, b[2], b[3], T{});
    }
  }
  const int left = count - lane % 4 * 2;  // compared with constants: a token's number takes a register
#pragma unroll
  for (int fragment = 0; fragment < 2 * PAIRS; ++fragment)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logits[fragment][i] = fragment * 8 + i % 2 < left ? logits[fragment][i] * scale : -INFINITY;
}

// result += probabilities value for the first `count` tokens at `value`.
template <int DEPTH, int PAIRS, class T>
__device__ __forceinline__ void add_values(float (&result)[DEPTH / 8][4], const float (&probabilities)[2 * PAIRS][4],
                                           const T* value, int count) {
  constexpr int PITCH = DEPTH + 8;
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair) {
    if (pair * 16 >= count) break;
    unsigned high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = probabilities[2 * pair + i / 2][i % 2 * 2], second = probabilities[2 * pair + i / 2][i % 2 * 2 + 1];
      high[i] = pack_pair<T>(first, second);
      low[i] = pack_pair<T>(first - widen_low<T>(high[i]), second - widen_high<T>(high[i]));
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d += 16) {
      unsigned b[4];
      load_matrices_transposed(b, value + (pair * 16 + lane % 16) * PITCH + d + lane / 16 * 8);
      multiply_add(result[d / 8], high, b[0], b[1], T{});
      multiply_add(result[d / 8 + 1], high, b[2], b[3], T{});
      multiply_add(result[d / 8], low, b[0], b[1], T{});
      multiply_add(result[d / 8 + 1], low, b[2], b[3], T{});
    }
  }
}

// The running softmax of rows g and g + 8, held by the 4 lanes that share them: the largest logit so far, and the sum
// of the exponentials relative to it.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Takes in logits + bias: the factors of what was summed before.
  template <int FRAGMENTS>
  __device__ __forceinline__ void raise(const float (&logits)[FRAGMENTS][4], const float (&bias)[2],
                                        float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value = -INFINITY;
#pragma unroll
      for (int fragment = 0; fragment < FRAGMENTS; ++fragment)
        value = fmaxf(value, fmaxf(logits[fragment][2 * half], logits[fragment][2 * half + 1]));
      value = fmaxf(value, shuffle_xor(value, 1));
      value = fmaxf(value, shuffle_xor(value, 2));
      const float raised = fmaxf(largest[half], value + bias[half]);
      factor[half] = power_of_two(largest[half] - (raised == -INFINITY ? 0.0f : raised));
      sum[half] *= factor[half];
      largest[half] = raised;
    }
  }

  // logits -> exponentials, which go into the sum if `summing`.
  template <int FRAGMENTS>
  __device__ __forceinline__ void exponentiate(float (&logits)[FRAGMENTS][4], const float (&bias)[2], bool summing) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = bias[half] - (largest[half] == -INFINITY ? 0.0f : largest[half]);
      float value = 0.0f;
#pragma unroll
      for (int fragment = 0; fragment < FRAGMENTS; ++fragment)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          logits[fragment][i] = power_of_two(logits[fragment][i] + offset);
          value += logits[fragment][i];
        }
      value += shuffle_xor(value, 1);
      value += shuffle_xor(value, 2);
      if (summing) sum[half] += value;
    }
  }
};

// The block's rows of `result` to where number(i) says, if it is less than `count`: through each warp's own rows of
// shared memory, so that they leave in packs of 16 bytes.
template <int DEPTH, class T, class Number>
__device__ __forceinline__ void store_result(T* out, T* shared, const float (&result)[DEPTH / 8][4],
                                             const Number& number, int count, int64_t stride, int depth, bool aligned) {
  constexpr int PITCH = DEPTH + 8, PACKS = DEPTH / 8;
  const int thread = thread_of_block(), lane = thread % WARP, warp_row = thread / WARP * 16;
  T* const rows = shared + warp_row * PITCH;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = rows + (lane / 4 + 8 * half) * PITCH + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < PACKS; ++d) {
      const unsigned word = pack_pair<T>(result[d][2 * half], result[d][2 * half + 1]);
      memcpy(row + d * 8, &word, sizeof word);
    }
  }
  sync_warp();
  if (aligned) {
    for (int i = lane; i < 16 * PACKS; i += WARP) {
      const int row = i / PACKS, d = i % PACKS * 8, to = number(warp_row + row);
      if (to < count && d < depth) store<8>(out + to * stride + d, load<8>(rows + row * PITCH + d));
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < 16 * DEPTH; i += WARP) {
      const int row = i / DEPTH, d = i % DEPTH, to = number(warp_row + row);
      if (to < count && d < depth) out[to * stride + d] = rows[row * PITCH + d];
    }
  }
}

template <class T, int DEPTH>
__global__ void __launch_bounds__(MmaShape<DEPTH>::WARPS* WARP, MmaShape<DEPTH>::BLOCKS)
    attention_kernel(Attention<T> attention, Walk walk) {
  using Shape = MmaShape<DEPTH>;
  constexpr int ROWS = Shape::ROWS, TOKENS = Shape::TOKENS, PITCH = Shape::PITCH, PAIRS = TOKENS / 16;
  T* const queries = reinterpret_cast<T*>(shared_memory());
  T* const keys = queries + ROWS * PITCH;
  T* const values = keys + TOKENS * PITCH;
  ActiveRows<ROWS, 2> active(shared_memory() + Shape::MATRICES);
  const int64_t stride = int64_t{attention.heads} * attention.depth;
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;  // the warp's first row

  const int end = walk.begin(block_of_grid() + 1);
  int staged = -1;  // the prompt whose keys and values are all there, for the present head
  for (int tile = walk.begin(block_of_grid()) - walk.ahead; tile < end; ++tile) {
    sync_block();  // nobody reads what the tile before left
    if (const int next = tile + walk.ahead; next < end) {
      const auto [image, head, number] = walk.place(next);
      const int first = number * ROWS, buffer = walk.buffer(next);
      active.locate(attention, image, first, buffer);
      sync_block();
      // rows are told from the tile's first in raster order: told from the first of all they take registers
      stage<ROWS, DEPTH>(queries + buffer * walk.second, attention.query + attention.query_offset(image, first, head),
                         [&](int row) { return active.number(row, buffer) - first; }, attention.queries - first, stride,
                         attention.depth, attention.aligned);
    } else {
      close_copy_group();
    }
    if (tile < walk.begin(block_of_grid())) continue;

    const auto [image, head, number] = walk.place(tile);
    const int first = number * ROWS, left = attention.queries - first;
    T* const warp_queries = queries + walk.buffer(tile) * walk.second + warp_row * PITCH;
    if (first == 0) staged = -1;
    active.weigh_located(attention, image, walk.buffer(tile));
    sync_block();

    float result[DEPTH / 8][4] = {};
    Softmax softmax;  // jointly of all prompts, else of the present one
    for (int slot = 0; slot < attention.slots; ++slot) {
      if (!active.anywhere(slot)) continue;
      const int prompt = attention.prompt(image, slot);
      const bool warp_active = active.template among<16>(slot, warp_row);
      float share[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + 8 * half;
        share[half] = 0.0f;
        if (warp_active)
          share[half] = attention.weight(image, slot, active.number(row, walk.buffer(tile))) / active.norm(row);
      }
      if (!attention.joint) softmax = Softmax();

      // a softmax of its own over more tokens than are staged at once takes two passes: its sum, then its terms
      const bool twice = !attention.joint && attention.length(prompt) > TOKENS;
      for (int pass = twice ? 0 : 1; pass < 2; ++pass) {
        const bool summing = !twice || pass == 0;
        // the length is looked up again: kept beside the results it spills at D = 128
        for (int start = 0; start < attention.length(prompt); start += TOKENS) {
          const int count = attention.length(prompt) - start;
          const bool fresh = prompt != staged;
          if (fresh) {
            const int64_t offset = attention.key_offset(prompt, start, head);
            sync_block();
#pragma unroll 1  // one code for both
            for (int i = 0; i < 2; ++i) {
              if (i == 0 || pass == 1)
                stage<TOKENS, DEPTH>(i == 0 ? keys : values, (i == 0 ? attention.key : attention.value) + offset,
                                     [](int token) { return token; }, count, stride, attention.depth,
                                     attention.aligned);
              else
                close_copy_group();
            }
            staged = attention.length(prompt) <= TOKENS ? prompt : -1;
          } else if (!walk.ahead) {
            close_copy_group();  // after the queries
          }
          if (fresh || !walk.ahead) {  // queries copied ahead were there when the last tile ended
            wait_for_copies<1>();
            sync_block();
          }
          float logits[2 * PAIRS][4];
          if (warp_active) {
            find_logits<DEPTH, PAIRS>(logits, warp_queries, keys, count, attention.scale_base2);
            // jointly the share is a term of the exponent, so that no term exceeds 1
            const float bias[2] = {attention.joint ? log2f(share[0]) : 0.0f, attention.joint ? log2f(share[1]) : 0.0f};
            if (summing) {
              float factor[2];
              softmax.raise(logits, bias, factor);
              if (attention.joint) {
#pragma unroll
                for (int d = 0; d < DEPTH / 8; ++d)
#pragma unroll
                  for (int i = 0; i < 4; ++i) result[d][i] *= factor[i / 2];
              }
            }
            softmax.exponentiate(logits, bias, summing);
            if (!attention.joint && pass == 1) {
#pragma unroll
              for (int fragment = 0; fragment < 2 * PAIRS; ++fragment)
#pragma unroll
                for (int i = 0; i < 4; ++i) logits[fragment][i] *= share[i / 2] / softmax.sum[i / 2];
            }
          }
          if (fresh) {
            wait_for_copies<0>();
            sync_block();
          }
          if (warp_active && pass == 1) add_values<DEPTH, PAIRS>(result, logits, values, count);
        }
      }
    }

    if (attention.joint) {  // blended, each prompt's terms are divided by their own sum already
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = softmax.sum[half] > 0.0f ? 1.0f / softmax.sum[half] : 1.0f;
#pragma unroll
        for (int d = 0; d < DEPTH / 8; ++d) {
          result[d][2 * half] *= factor;
          result[d][2 * half + 1] *= factor;
        }
      }
    }

    // into the rows of the tile's queries, which are on their way still if no prompt was visited
    wait_for_copies<0>();
    sync_block();
    store_result<DEPTH>(attention.out + attention.query_offset(image, first, head),
                        queries + walk.buffer(tile) * walk.second, result,
                        [&](int row) { return active.number(row, walk.buffer(tile)) - first; }, left, stride,
                        attention.depth, attention.aligned);
  }
}

}  // namespace instantas
