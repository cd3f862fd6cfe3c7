// Regional attention: the operation's sizes and addresses, and which prompts have weight in a tile of queries.
//
// A block owns a tile of queries of one head. It looks at the weights of all regions once, and then visits only the
// prompts that have weight in the tile: the cost follows the regions that meet there, not their number.
#pragma once

#include "pack.cuh"

namespace instantas {

template <class T>
struct Attention {
  const T *query, *key, *value;  // (B, N, heads, D), (P, L, heads, D)
  T* out;
  const int32_t* prompt_ids;  // (B, R); an id outside 0 .. P - 1 is an unused slot
  const float* weights;       // (B, R, N)
  const int32_t* order;       // (B, N), the queries' numbers as they are visited; null: one after the other
  const int32_t* lengths;     // (P,), the tokens of each prompt that take part; null: all
  int queries, heads, depth, prompts, tokens, slots;
  float scale;        // of the logits
  float scale_base2;  // of the logits in base 2
  bool joint;    // one softmax over all prompts, not one for each
  bool aligned;  // rows are multiples of 16 bytes at multiples of 16 bytes

  // The number of the query that is visited at a place: `queries` past the last, and for what is no number of one.
  __device__ __forceinline__ int row(int64_t image, int place) const {
    if (place >= queries) return queries;
    const int number = order ? order[image * queries + place] : place;
    return static_cast<unsigned>(number) < static_cast<unsigned>(queries) ? number : queries;
  }
  __device__ __forceinline__ int64_t query_offset(int64_t image, int row, int head) const {
    return ((image * queries + row) * heads + head) * depth;
  }
  __device__ __forceinline__ int64_t key_offset(int64_t prompt, int token, int head) const {
    return ((prompt * tokens + token) * heads + head) * depth;
  }
  // The prompt of a slot, or -1.
  __device__ __forceinline__ int prompt(int64_t image, int slot) const {
    const int id = prompt_ids[image * slots + slot];
    return id < prompts ? id : -1;
  }
  // How many of a prompt's tokens take part.
  __device__ __forceinline__ int length(int prompt) const {
    const int length = lengths ? lengths[prompt] : tokens;
    return length < 1 ? 1 : length < tokens ? length : tokens;
  }
  __device__ __forceinline__ float weight(int64_t image, int slot, int row) const {
    return row < queries ? weights[(image * slots + slot) * queries + row] : 0.0f;
  }
};

// Which queries a tile's rows are, which of them have weight in which slot, and what a row's weights are relative to:
// their sum, or jointly the largest; 1 for a row without weight. Of TILES tiles at once it keeps the queries, of the one
// that was weighed last their weights. In shared memory: size(slots) bytes of it.
template <int ROWS, int TILES = 1>
class ActiveRows {
 public:
  static constexpr int WORDS = (ROWS + WARP - 1) / WARP;

  static INSTANTAS_INLINE int size(int slots) { return ((1 + TILES) * ROWS + slots * WORDS) * 4; }

  __device__ __forceinline__ explicit ActiveRows(char* shared)
      : norm_(reinterpret_cast<float*>(shared)),
        number_(reinterpret_cast<int*>(shared) + ROWS),
        words_(reinterpret_cast<unsigned*>(shared) + (1 + TILES) * ROWS) {}

  // By all threads of the block, at least as many as rows rounded up to whole warps; then the block has to meet.
  template <class T>
  __device__ __forceinline__ void find(const Attention<T>& attention, int64_t image, int first) {
    const int row = threadIdx.x;
    if (row >= WORDS * WARP) return;
    const int number = row < ROWS ? attention.row(image, first + row) : attention.queries;
    weigh(attention, image, number);
    if (row < ROWS) number_[row] = number;
  }

  // The same in two parts, for whole warps of rows: which queries a tile has, and later their weights.
  template <class T>
  __device__ __forceinline__ void locate(const Attention<T>& attention, int64_t image, int first, int tile) {
    const int row = threadIdx.x;
    if (row < ROWS) number_[tile * ROWS + row] = attention.row(image, first + row);
  }
  template <class T>
  __device__ __forceinline__ void weigh_located(const Attention<T>& attention, int64_t image, int tile) {
    static_assert(ROWS % WARP == 0, "warps vote");
    if (threadIdx.x < ROWS) weigh(attention, image, number_[tile * ROWS + threadIdx.x]);
  }

  __device__ __forceinline__ bool anywhere(int slot) const {
    unsigned rows = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) rows |= words_[slot * WORDS + i];
    return rows != 0;
  }

  // Among COUNT rows from `row`, a multiple of COUNT, which is less than 32.
  template <int COUNT>
  __device__ __forceinline__ bool among(int slot, int row) const {
    return (words_[slot * WORDS + row / WARP] >> row % WARP & ((1u << COUNT) - 1)) != 0;
  }

  __device__ __forceinline__ float norm(int row) const { return norm_[row]; }
  __device__ __forceinline__ int number(int row, int tile = 0) const { return number_[tile * ROWS + row]; }

 private:
  // Of the query whose row is the thread's.
  template <class T>
  __device__ __forceinline__ void weigh(const Attention<T>& attention, int64_t image, int number) {
    const int row = threadIdx.x;
    float norm = 0.0f;
#pragma unroll 4
    for (int slot = 0; slot < attention.slots; ++slot) {
      float weight = 0.0f;
      if (attention.prompt(image, slot) >= 0) weight = attention.weight(image, slot, number);
      norm = attention.joint ? fmaxf(norm, weight) : norm + weight;
      const unsigned rows = ballot(weight > 0.0f);
      if (row % WARP == 0) words_[slot * WORDS + row / WARP] = rows;
    }
    if (row < ROWS) norm_[row] = norm > 0.0f ? norm : 1.0f;
  }

  float* norm_;
  int* number_;
  unsigned* words_;
};

}  // namespace instantas
