// csrc/device.cuh for a CPU: the same functions, with the meaning that NVIDIA documents, so that the kernels themselves
// run where there is no GPU. Each thread of a block is a fiber; a fiber gives way where it waits for others.
//
// Stricter than a GPU: fresh shared memory holds NaN and ends at a page that nobody may touch, asynchronous copies arrive
// when they are waited for and not before, and the order in which threads run is chosen by a seed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "element.cuh"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

namespace instantas {

constexpr int WARP = 32;
constexpr int LARGEST_SHARED = 99 * 1024;  // the smallest limit of any architecture since sm_80

struct Index {
  unsigned x;
};

namespace emulation {

struct Barrier {
  int arrived = 0;
  int64_t passed = 0;
};

struct Copy {
  void* shared;
  const void* global;
  bool inside;
};

struct Fiber {
  ucontext_t beginning;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool begun = false, done = false;
  Barrier* waits = nullptr;
  int64_t until = 0;
  int64_t collectives = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  static constexpr size_t STACK = 128 * 1024;
};

using Words = std::array<uint64_t, 8>;

struct Warp {
  Barrier barrier;
  std::array<std::array<Words, WARP>, 2> deposits;  // two: a lane may be one collective ahead of another
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int votes[2] = {0, 0};
  int64_t ballots = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  char* shared = nullptr;
  int shared_size = 0;
};

inline Block* block = nullptr;
inline unsigned seed = 0;
inline int64_t copied = 0;  // bytes that asynchronous copies have read

}  // namespace emulation

inline Index threadIdx, blockIdx, blockDim;

namespace emulation {

inline Fiber& self() { return block->fibers[threadIdx.x]; }

// Goes to where another left; swapcontext would ask the system for the signal mask every time.
inline void leave(jmp_buf& here, jmp_buf& there) {
  if (!_setjmp(here)) _longjmp(there, 1);
}

inline void wait(Barrier& barrier, int count) {
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  Fiber& fiber = self();
  const unsigned me = threadIdx.x;
  fiber.waits = &barrier;
  fiber.until = barrier.passed + 1;
  leave(fiber.place, block->scheduler);
  threadIdx.x = me;
}

inline void start() {
  for (;;) {  // the blocks of a launch
    block->body();
    self().done = true;
    leave(self().place, block->scheduler);
  }
}

inline void enter(Fiber& fiber) {
  if (_setjmp(block->scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.beginning);
  fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
  fiber.beginning.uc_stack.ss_size = Fiber::STACK;
  makecontext(&fiber.beginning, start, 0);
  setcontext(&fiber.beginning);
}

inline void run_block() {
  const int threads = static_cast<int>(block->fibers.size());
  std::vector<unsigned> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (Fiber& fiber : block->fibers) {
    fiber.done = false;
    fiber.waits = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.collectives = 0;
  }
  for (int left = threads; left > 0;) {
    bool progress = false;
    for (unsigned i : order) {
      Fiber& fiber = block->fibers[i];
      if (fiber.done || (fiber.waits && fiber.waits->passed < fiber.until)) continue;
      fiber.waits = nullptr;
      threadIdx.x = i;
      enter(fiber);
      left -= fiber.done;
      progress = true;
    }
    if (!progress) throw std::runtime_error("threads of a block wait for each other for ever");
  }
}

// What every lane of the warp hands over, once all have.
inline const std::array<Words, WARP>& exchange(const Words& words) {
  Warp& warp = block->warps[threadIdx.x / WARP];
  auto& deposits = warp.deposits[self().collectives++ % 2];
  deposits[threadIdx.x % WARP] = words;
  wait(warp.barrier, WARP);
  return deposits;
}

inline unsigned lane() { return threadIdx.x % WARP; }

inline void check_shared(const void* address, int size) {
  const char* first = static_cast<const char*>(address);
  if (first < block->shared || first + size > block->shared + block->shared_size || (first - block->shared) % size)
    throw std::runtime_error("an address outside shared memory, or not aligned");
}

template <class T>
T element_of(unsigned word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void load_matrices(unsigned (&matrices)[4], const void* row, bool transposed) {
  check_shared(row, 16);
  const auto& rows = exchange({reinterpret_cast<uint64_t>(row)});
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], reinterpret_cast<const void*>(rows[8 * m + r][0]), 16);
    const unsigned i = lane() / 4, j = lane() % 4 * 2;
    const uint32_t low = transposed ? matrix[j][i] : matrix[i][j], high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
    matrices[m] = low | high << 16;
  }
}

}  // namespace emulation

inline int thread_of_block() { return static_cast<int>(threadIdx.x); }
inline int block_of_grid() { return static_cast<int>(blockIdx.x); }
inline char* shared_memory() { return emulation::block->shared; }

inline float shuffle(float value, int source) {
  return float_of(static_cast<uint32_t>(emulation::exchange({bits_of(value)})[source][0]));
}
inline float shuffle_xor(float value, int mask) {
  return float_of(static_cast<uint32_t>(emulation::exchange({bits_of(value)})[emulation::lane() ^ mask][0]));
}
inline unsigned ballot(bool value) {
  const auto& votes = emulation::exchange({value});
  unsigned result = 0;
  for (int i = 0; i < WARP; ++i) result |= static_cast<unsigned>(votes[i][0]) << i;
  return result;
}
inline void sync_warp() { emulation::exchange({}); }
inline void sync_block() { emulation::wait(emulation::block->barrier, static_cast<int>(emulation::block->fibers.size())); }
inline bool any_of_block(bool value) {
  sync_block();
  emulation::block->votes[0] = 0;
  sync_block();
  emulation::block->votes[0] |= value;
  sync_block();
  return emulation::block->votes[0];
}

inline float power_of_two(float exponent) { return std::exp2(exponent); }

template <class T>
unsigned pack_pair(float low, float high) {
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  unsigned word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

inline void copy_async(void* shared, const void* global, bool inside) {
  emulation::check_shared(shared, 16);
  if (inside && reinterpret_cast<uintptr_t>(global) % 16) throw std::runtime_error("a copy from an unaligned address");
  emulation::self().open.push_back({shared, global, inside});
}

inline void close_copy_group() {
  emulation::self().groups.push_back(std::move(emulation::self().open));
  emulation::self().open.clear();
}

template <int PENDING>
void wait_for_copies() {
  auto& groups = emulation::self().groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.inside) {
        std::memcpy(copy.shared, copy.global, 16);
        emulation::copied += 16;
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
  }
}

inline void load_matrices(unsigned (&matrices)[4], const void* row) { emulation::load_matrices(matrices, row, false); }
inline void load_matrices_transposed(unsigned (&matrices)[4], const void* row) {
  emulation::load_matrices(matrices, row, true);
}

// The fragments of mma.m16n8k16: lane 4 g + t holds rows g and g + 8 and columns 2 t, 2 t + 1 (and 8 further) of a; rows
// 2 t, 2 t + 1 (and 8 further) of column g of b; rows g and g + 8 and columns 2 t, 2 t + 1 of c.
template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
  const auto& lanes = emulation::exchange({a[0], a[1], a[2], a[3], b0, b1});
  const unsigned g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; ++k) {
      const auto& of_a = lanes[row % 8 * 4 + k % 8 / 2];
      const auto& of_b = lanes[column * 4 + k % 8 / 2];
      sum += widen(emulation::element_of<T>(static_cast<unsigned>(of_a[row / 8 + k / 8 * 2]), k % 2)) *
             widen(emulation::element_of<T>(static_cast<unsigned>(of_b[4 + k / 8]), k % 2));
    }
    c[i] += sum;
  }
}

struct Multiprocessors {
  int count, shared;
  static constexpr int RESERVED = 1024;
};

// One alone, so that a block has many tiles. Its memory has room for a second buffer at some head sizes, at others not.
inline cudaError_t find_multiprocessors(Multiprocessors& found) {
  found = {1, LARGEST_SHARED + Multiprocessors::RESERVED};
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t,
                   const Arguments&... arguments) {
  if (blocks > 0x7fffffff || blocks < 1) throw std::runtime_error("a launch needs 1 to 2^31 - 1 blocks");
  if (threads > 1024 || threads < 1) throw std::runtime_error("a block has 1 to 1024 threads");
  if (shared > LARGEST_SHARED) throw std::runtime_error("more shared memory than every architecture has");
  const int64_t page = sysconf(_SC_PAGESIZE), size = (shared + page - 1) / page * page;
  char* memory = static_cast<char*>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + size, page, PROT_NONE);
  emulation::Block block;
  block.fibers = std::vector<emulation::Fiber>(threads);
  block.warps.resize((threads + WARP - 1) / WARP);
  block.shared_size = (shared + 15) / 16 * 16;
  block.shared = memory + size - block.shared_size;
  block.body = [&] { kernel(arguments...); };
  emulation::block = &block;
  blockDim.x = threads;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(emulation::seed % 2 ? blocks - 1 - i : i);
    std::memset(block.shared, 0xff, block.shared_size);
    emulation::run_block();
  }
  munmap(memory, size + page);
  return cudaSuccess;
}

}  // namespace instantas
