// SimCC decoding: one warp a joint, no shared memory, no barrier.
//
//   row of x   | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...      16 bytes a lane
//
// Each lane keeps its largest logit and the first bin that holds it, then five exchanges find the
// warp's: of equal logits the lower bin, so that the first maximum wins. kUnroll loads of a lane
// are in flight at a time; 512 float32 bins are one such round. A row that is not aligned to 16
// bytes is read one element a lane.
//
// Floor, per launch: the logits read once.
// budget: decode_simcc_kernel<*> registers<=64
#include <cstdint>

#include "decode_simcc.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/peak.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kWarps = 4;  // joints a block
constexpr int kUnroll = 4;

template <class T>
struct Arguments {
  const T* x;
  const T* y;
  const float* centers;
  const float* scales;
  float* points;
  float* scores;
  DecodeSimccShape shape;
  bool aligned_x, aligned_y;
};

// The peak of a row, the same in all lanes. Its length is a multiple of a vector if it is aligned.
template <class T>
__device__ __forceinline__ SimccPeak peak_of(const T* row, int bins, bool aligned, int lane) {
  Peak peak;
  if (aligned) {
    scan<kWidestVector<T>, 32, kUnroll>(peak, row, bins, lane);
  } else {
    scan<1, 32, kUnroll>(peak, row, bins, lane);
  }
  merge_lanes(peak);
  return {peak.nan ? NAN : peak.value, peak.place};
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) decode_simcc_kernel(const Arguments<T> args) {
  const DecodeSimccShape& shape = args.shape;
  const int lane = threadIdx.x % 32;
  const int64_t joint = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (joint >= shape.rows()) return;
  const SimccPeak x = peak_of(args.x + joint * shape.bins_x, shape.bins_x, args.aligned_x, lane);
  const SimccPeak y = peak_of(args.y + joint * shape.bins_y, shape.bins_y, args.aligned_y, lane);
  if (lane != 0) return;
  const int64_t crop = joint / shape.joints * 2;
  const bool cropped = args.centers != nullptr;
  write_simcc_joint(shape, x, y, cropped ? args.centers + crop : nullptr,
                    cropped ? args.scales + crop : nullptr, args.points + 2 * joint,
                    args.scores + joint);
}

template <class T>
cudaError_t decode(const void* x, const void* y, const float* centers, const float* scales,
                   float* points, float* scores, const DecodeSimccShape& shape,
                   cudaStream_t stream) {
  const auto aligned = [](const void* logits, int bins) {
    return reinterpret_cast<uintptr_t>(logits) % 16 == 0 && bins % kWidestVector<T> == 0;
  };
  const Arguments<T> args = {
      static_cast<const T*>(x), static_cast<const T*>(y), centers, scales, points, scores, shape,
      aligned(x, shape.bins_x), aligned(y, shape.bins_y)};
  const int64_t blocks = (shape.rows() + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(decode_simcc_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps), 0,
                stream, args);
}

}  // namespace

cudaError_t decode_simcc(const void* x, const void* y, const float* centers, const float* scales,
                         float* points, float* scores, const DecodeSimccShape& shape, DType dtype,
                         cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return decode<float>(x, y, centers, scales, points, scores, shape, stream);
    case DType::kFloat16:
      return decode<__half>(x, y, centers, scales, points, scores, shape, stream);
    case DType::kBFloat16:
      return decode<__nv_bfloat16>(x, y, centers, scales, points, scores, shape, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kernelpose::cuda
