// Where the windows (B, n, C, h, w) of a plan lie on the canvas (B, C, height, width). Free of torch; host and device.
#pragma once

#include "element.cuh"

namespace instantas {

struct Plan {
  int height, width, h, w;
  int tile_y, tile_x;          // the canvas tiles for which cover_start lists the covering windows
  int windows, channels;
  const int32_t* origins;      // (n, 2): y, x
  const int32_t* cover_start;  // (tiles + 1)
  const int32_t* cover_index;

  INSTANTAS_INLINE int tiles_y() const { return (height + tile_y - 1) / tile_y; }
  INSTANTAS_INLINE int tiles_x() const { return (width + tile_x - 1) / tile_x; }
  INSTANTAS_INLINE int64_t canvas_plane() const { return int64_t{height} * width; }
  INSTANTAS_INLINE int64_t window_plane() const { return int64_t{h} * w; }

  INSTANTAS_INLINE int64_t canvas_offset(int64_t image, int channel, int y, int x) const {
    return (image * channels + channel) * canvas_plane() + int64_t{y} * width + x;
  }
  INSTANTAS_INLINE int64_t window_offset(int64_t image, int window, int channel, int i, int j) const {
    return ((image * windows + window) * channels + channel) * window_plane() + int64_t{i} * w + j;
  }
};

// The place in a window of a canvas position on one axis, which is covered if this is less than the window's length.
// On an axis that wraps the window may lie on both ends; on any other the position is never moved into the window.
INSTANTAS_INLINE int place_in_window(int position, int origin, int length) {
  return position < origin ? position - origin + length : position - origin;
}

// The canvas position of a place in a window.
INSTANTAS_INLINE int position_on_canvas(int place, int origin, int length) {
  return origin + place < length ? origin + place : origin + place - length;
}

struct Span {
  int begin, end;
};

// The positions of [begin, end) that a window covers: turn 0 as it lies, turn 1 moved back once around the axis.
INSTANTAS_INLINE Span covered(Span tile, int origin, int window, int length, int turn) {
  const int first = origin - turn * length, last = first + window;
  return {first > tile.begin ? first : tile.begin, last < tile.end ? last : tile.end};
}

// Channels for which a thread of the device computes at once, so that the overlap weights are read once for them.
template <int WIDTH>
constexpr int CHANNELS_OF_THREAD = WIDTH >= 8 ? 2 : 4;

}  // namespace instantas
