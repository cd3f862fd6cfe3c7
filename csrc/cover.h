// Merging windows on the host, a tile of the canvas at a time, in loops over cells that the compiler vectorises.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.cuh"
#include "processor.h"

namespace instantas {

template <class A>
struct Overlap {
  const A* weight;  // (h, w), or (n, h, w) with a stride; nullptr: 1 everywhere
  int64_t stride;
  bool has_zeros;  // whether a window may have no weight in a cell of which no other has some

  const A* row(const Plan& plan, int window, int i, int j) const {
    return weight ? weight + window * stride + int64_t{i} * plan.w + j : nullptr;
  }
};

// Cells of a tile, (rows, columns) from (y, x) of it: those of `window` from its (i, j), or of NONE, or of SEVERAL.
struct Block {
  int y, x, rows, columns, window, i, j;

  bool holds(int row, int column) const {
    return row >= y && row < y + rows && column >= x && column < x + columns;
  }
};

constexpr int NONE = -1, SEVERAL = -2;

// How the windows of a plan share the cells of one of its tiles.
template <class A>
class Cover {
 public:
  Span y, x;
  std::vector<Block> blocks;

  Cover(const Plan& plan, const Overlap<A>& overlap)
      : plan_(plan), overlap_(overlap), norm_(int64_t{plan.tile_y} * plan.tile_x) {}

  INSTANTAS_KERNEL void visit(int64_t tile) {
    const int top = static_cast<int>(tile / plan_.tiles_x()) * plan_.tile_y;
    const int left = static_cast<int>(tile % plan_.tiles_x()) * plan_.tile_x;
    y = {top, std::min(top + plan_.tile_y, plan_.height)};
    x = {left, std::min(left + plan_.tile_x, plan_.width)};
    find_parts(plan_.cover_index + plan_.cover_start[tile], plan_.cover_index + plan_.cover_start[tile + 1]);
    find_blocks();
    for (size_t n = 0, count = blocks.size(); n < count; ++n)
      if (blocks[n].window == SEVERAL) weigh(n);
  }

  // The weighted sums of the windows over a block's cells, of one image and channel, where these lie in (tile_y, tile_x).
  template <class T>
  INSTANTAS_KERNEL void sum(const Block& block, const T* windows, int64_t image, int channel, A* totals) const {
    for (int row = 0; row < block.rows; ++row) std::fill_n(totals + cell(block, row), block.columns, A(0));
    for (const Block& part : parts_) {
      const Block both = common(block, part);
      for (int row = 0; row < both.rows; ++row) {
        A* total = totals + cell(both, row);
        const T* from = windows + plan_.window_offset(image, part.window, channel, both.i + row, both.j);
        if (const A* weight = overlap_.row(plan_, part.window, both.i + row, both.j))
          for (int k = 0; k < both.columns; ++k) total[k] += weight[k] * widen(from[k]);
        else
          for (int k = 0; k < both.columns; ++k) total[k] += widen(from[k]);
      }
    }
  }

  // Their means: the window's own values where there is one alone.
  template <class T>
  INSTANTAS_KERNEL void average(const Block& block, const T* windows, int64_t image, int channel, A* means) const {
    if (block.window == SEVERAL) {
      sum(block, windows, image, channel, means);
      for (int row = 0; row < block.rows; ++row) {
        A* mean = means + cell(block, row);
        const A* norm = norm_.data() + cell(block, row);
        for (int k = 0; k < block.columns; ++k) mean[k] /= norm[k];
      }
    } else {
      const T* from = windows + plan_.window_offset(image, block.window, channel, block.i, block.j);
      for (int row = 0; row < block.rows; ++row, from += plan_.w) {
        A* mean = means + cell(block, row);
        for (int k = 0; k < block.columns; ++k) mean[k] = widen(from[k]);
      }
    }
  }

  int rows() const { return y.end - y.begin; }
  int columns() const { return x.end - x.begin; }

  // The number in (tile_y, tile_x) of a block's first cell in a row of it.
  int cell(const Block& block, int row) const { return (block.y + row) * plan_.tile_x + block.x; }

 private:
  // The cells that each window has of the tile.
  void find_parts(const int32_t* first, const int32_t* last) {
    parts_.clear();
    for (; first != last; ++first) {
      const int y0 = plan_.origins[2 * *first], x0 = plan_.origins[2 * *first + 1];
      for (int turn_y = 0; turn_y < 2; ++turn_y)
        for (int turn_x = 0; turn_x < 2; ++turn_x) {
          const Span down = covered(y, y0, plan_.h, plan_.height, turn_y);
          const Span across = covered(x, x0, plan_.w, plan_.width, turn_x);
          if (down.begin < down.end && across.begin < across.end)
            parts_.push_back({down.begin - y.begin, across.begin - x.begin, down.end - down.begin,
                              across.end - across.begin, *first, place_in_window(down.begin, y0, plan_.height),
                              place_in_window(across.begin, x0, plan_.width)});
        }
    }
  }

  // The tile, cut where parts begin and end; blocks of several windows stay together.
  void find_blocks() {
    edges_y_.assign({0, rows()});
    edges_x_.assign({0, columns()});
    for (const Block& part : parts_) {
      edges_y_.insert(edges_y_.end(), {part.y, part.y + part.rows});
      edges_x_.insert(edges_x_.end(), {part.x, part.x + part.columns});
    }
    for (std::vector<int>* edges : {&edges_y_, &edges_x_}) {
      std::sort(edges->begin(), edges->end());
      edges->erase(std::unique(edges->begin(), edges->end()), edges->end());
    }
    blocks.clear();
    for (size_t m = 0; m + 1 < edges_y_.size(); ++m)
      for (size_t n = 0; n + 1 < edges_x_.size(); ++n) {
        Block block{edges_y_[m], edges_x_[n], edges_y_[m + 1] - edges_y_[m], edges_x_[n + 1] - edges_x_[n], NONE, 0, 0};
        for (const Block& part : parts_) {
          if (!part.holds(block.y, block.x)) continue;
          const bool is_first = block.window == NONE && !overlap_.has_zeros;
          block.window = is_first ? part.window : SEVERAL;
          block.i = part.i + block.y - part.y;
          block.j = part.j + block.x - part.x;
        }
        if (n > 0 && block.window == SEVERAL && blocks.back().window == SEVERAL)
          blocks.back().columns += block.columns;
        else
          blocks.push_back(block);
      }
  }

  static Block common(const Block& block, const Block& part) {
    const int top = std::max(block.y, part.y), left = std::max(block.x, part.x);
    const int bottom = std::min(block.y + block.rows, part.y + part.rows);
    const int right = std::min(block.x + block.columns, part.x + part.columns);
    return {top, left, bottom - top, right - left, part.window, part.i + top - part.y, part.j + left - part.x};
  }

  // norm = the sums of the overlap weights over a block's cells; where they may be 0, rows are cut into those and others.
  INSTANTAS_KERNEL void weigh(size_t number) {
    const Block block = blocks[number];
    for (int row = 0; row < block.rows; ++row) std::fill_n(norm_.data() + cell(block, row), block.columns, A(0));
    for (const Block& part : parts_) {
      const Block both = common(block, part);
      for (int row = 0; row < both.rows; ++row) {
        A* norm = norm_.data() + cell(both, row);
        const A* weight = overlap_.row(plan_, part.window, both.i + row, both.j);
        for (int k = 0; k < both.columns; ++k) norm[k] += weight ? weight[k] : A(1);
      }
    }
    if (!overlap_.has_zeros) return;
    blocks[number].rows = 0;
    for (int row = 0; row < block.rows; ++row) {
      const A* norm = norm_.data() + cell(block, row);
      for (int k = 0, count; k < block.columns; k += count) {
        for (count = 1; k + count < block.columns && (norm[k + count] > 0) == (norm[k] > 0); ++count) {}
        blocks.push_back({block.y + row, block.x + k, 1, count, norm[k] > 0 ? SEVERAL : NONE, 0, 0});
      }
    }
  }

  const Plan plan_;
  const Overlap<A> overlap_;
  std::vector<Block> parts_;
  std::vector<int> edges_y_, edges_x_;
  std::vector<A> norm_;  // (tile_y, tile_x), where there are several windows: the sums of their overlap weights
};

}  // namespace instantas
