// A grouped 3x3 and a dense 1x1 convolution, added, by Winograd's way. An image is divided in bands
// of rows where there are fewer images than threads.
#include "winograd_conv.h"

#include <algorithm>

#include "parallel.h"
#include "winograd.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// An image in channels_last memory.
struct Tokens {
  float* data;
  int64_t channels, height, width;

  int64_t blocks() const { return channels / kWidth<float>; }
  float* at(int64_t block, int64_t h, int64_t w) const {
    return data + (h * width + w) * channels + block * kWidth<float>;
  }
};

}  // namespace

int64_t winograd_conv_outputs() { return Winograd<float>::kOutputs; }

bool winograd_conv(const float* x, const float* packed, float* out, const WinogradConvShape& shape,
                   int threads) {
  const ImageLayout in = {shape.inputs, shape.height, shape.width, true};
  const Winograd<float> convolution = {shape.inputs, shape.outputs, shape.groups};
  const int64_t pairs = (shape.height + 1) / 2;  // of rows
  const int64_t bands = std::min(pairs, (threads + shape.batch - 1) / shape.batch);
  const int64_t tasks = shape.batch * bands, parts = std::min<int64_t>(threads, tasks);
  // The last tile of a row of odd width reads a pixel behind the map.
  const int64_t map_size = input_map<float>(nullptr, in, 1, 1).size() + kWidth<float>;
  const int64_t row_size = 2 * row_scratch<float>(shape.width);
  const int64_t part_size =
      round_up(map_size + row_size, kWidth<float>) + convolution.scratch_size();
  float* const memory =
      static_cast<float*>(thread_scratch(static_cast<size_t>(parts * part_size) * sizeof(float)));
  if (!memory) return false;
  parallel_for(parts, threads, [&](int64_t part) {
    float* const scratch = memory + part * part_size;
    float* const row = scratch + convolution.scratch_size();
    const BlockedMap<float> map = input_map(row + row_size, in, 1, 1);
    for (int64_t task = part * tasks / parts; task < (part + 1) * tasks / parts; ++task) {
      const int64_t image = task / bands, band = task % bands;
      const int64_t first = band * pairs / bands * 2;
      const int64_t end = std::min(shape.height, (band + 1) * pairs / bands * 2);
      read_map(x + image * in.size(), in, 0, map, row, std::max<int64_t>(0, first - 1),
               std::min(shape.height, end + 1));
      const Tokens to = {out + image * shape.outputs * shape.height * shape.width, shape.outputs,
                         shape.height, shape.width};
      convolution.run(map, 1, packed, false, to, first, end, scratch);
    }
  });
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
