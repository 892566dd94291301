// What flip_merge computes on: `maps` contiguous maps of rows x width pixels, a person's joints
// next to each other. Column x of a row meets column width - 1 - x of the mirrored one; with a
// shift column width - x, and the first column still the last.
#pragma once

#include <cstdint>

namespace kernelpose {

struct FlipMergeShape {
  int64_t maps;  // persons * joints
  int64_t rows, width;
  bool shift;

  int64_t pixels() const { return rows * width; }
};

}  // namespace kernelpose
