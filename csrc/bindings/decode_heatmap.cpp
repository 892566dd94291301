#include "kernelpose/decode_heatmap.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bind.h"
#include "cpu/decode_heatmap.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/decode_heatmap.h"
#endif

namespace kernelpose::bindings::decode_heatmap {
namespace {

// (persons, joints, height, width, mode, udp, weights of the blur along an axis)
using ProblemTuple = std::tuple<int64_t, int64_t, int, int, int, bool, std::vector<float>>;

DecodeHeatmap problem_of(const ProblemTuple& t) {
  const auto& [persons, joints, height, width, mode, udp, weights] = t;
  if (weights.size() > kMaxTaps) throw std::invalid_argument("the blur is too wide");
  DecodeHeatmap problem = {
      persons, joints, height, width, static_cast<DecodeMode>(mode), udp, int(weights.size()), {}};
  std::copy(weights.begin(), weights.end(), problem.weights);
  return problem;
}

DecodedPoints points_of(Address centers, Address scales, Address keypoints, Address scores) {
  return {pointer<float>(centers), pointer<float>(scales), pointer<float>(keypoints),
          pointer<float>(scores)};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_decode_heatmap",
        [](Address heatmaps, Address centers, Address scales, Address keypoints, Address scores,
           const ProblemTuple& problem, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(decode_heatmap)(
                           pointer(heatmaps), points_of(centers, scales, keypoints, scores),
                           problem_of(problem), static_cast<DType>(dtype), threads),
                       "decode_heatmap");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_decode_heatmap", [](Address heatmaps, Address centers, Address scales,
                                  Address keypoints, Address scores, const ProblemTuple& problem,
                                  int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(
        cuda::decode_heatmap(pointer(heatmaps), points_of(centers, scales, keypoints, scores),
                             problem_of(problem), static_cast<DType>(dtype), stream_of(stream)),
        "decode_heatmap");
  });
#endif
}

}  // namespace kernelpose::bindings::decode_heatmap
