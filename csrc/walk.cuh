// Which tiles of queries each block of attention computes, one after the other. Free of torch; host and device.
#pragma once

#include "divisor.cuh"

namespace instantas {

// Consecutive ones, where those of a head of an image follow each other: they need the same keys and values as long as
// they are of the same prompt.
struct Walk {
  struct Place {
    int64_t image;
    int head, tile;
  };

  Divisor tiles, heads;  // tiles of a head
  int share, longer;     // tiles of a block; the first `longer` blocks have one more
  int second;            // elements from one buffer for queries to the other
  int ahead;             // 1: the next tile's queries are copied there while a tile is computed; 0: there is one buffer

  INSTANTAS_INLINE int begin(int block) const { return block * share + (block < longer ? block : longer); }
  INSTANTAS_INLINE int buffer(int tile) const { return tile & ahead; }

  INSTANTAS_INLINE Place place(int tile) const {
    const Parts line = tiles.divide(tile), image = heads.divide(line.quotient);
    return {image.quotient, image.remainder, line.remainder};
  }
};

}  // namespace instantas
