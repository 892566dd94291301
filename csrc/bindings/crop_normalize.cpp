#include "cpu/crop_normalize.h"

#include <tuple>

#include "bind.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/crop_normalize.h"
#endif

namespace kernelpose::bindings::crop_normalize {
namespace {

// (images, height, width, and in bytes the strides of image, row, pixel and channel)
using ImagesTuple = std::tuple<int64_t, int, int, int64_t, int64_t, int64_t, int64_t>;

ImageSet image_set_of(Address first, Address table, const ImagesTuple& t) {
  const auto& [count, height, width, stride, row, pixel, channel] = t;
  return {pointer<const int64_t>(table),
          {pointer<const uint8_t>(first), height, width, row, pixel, channel},
          stride,
          count};
}

// (persons, height, width, padding, udp, mean and std of R, G, B)
using CropTuple =
    std::tuple<int64_t, int, int, double, bool, double, double, double, double, double, double>;

CropShape crop_shape_of(const CropTuple& t) {
  const auto& [persons, height, width, padding, udp, mean_r, mean_g, mean_b, std_r, std_g, std_b] =
      t;
  CropShape shape = {persons,
                     height,
                     width,
                     static_cast<float>(padding),
                     static_cast<float>(static_cast<double>(width) / height),
                     udp,
                     {},
                     {}};
  const double mean[] = {mean_r, mean_g, mean_b}, std[] = {std_r, std_g, std_b};
  for (int c = 0; c < 3; ++c) {
    shape.factor[c] = static_cast<float>(1 / (255 * std[c]));
    shape.offset[c] = static_cast<float>(-mean[c] / std[c]);
  }
  return shape;
}

Persons persons_of(Address boxes, Address image_index, Address turns, Address centers,
                   Address scales) {
  return {pointer<const double>(boxes), pointer<const int64_t>(image_index),
          pointer<const double>(turns), pointer<float>(centers), pointer<float>(scales)};
}

}  // namespace

KP_BIND(m) {
  // The first person without a crop, or -1.
  m.def("cpu_crop_normalize", [](Address first, Address table, const ImagesTuple& images,
                                 Address boxes, Address image_index, Address turns, Address crops,
                                 Address centers, Address scales, const CropTuple& shape, int dtype,
                                 int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    const int64_t refused = KP_SELECT_ISA(crop_normalize)(
        image_set_of(first, table, images), persons_of(boxes, image_index, turns, centers, scales),
        pointer(crops), crop_shape_of(shape), static_cast<DType>(dtype), threads);
    check_memory(refused != kNoMemory, "crop_normalize");
    return refused;
  });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_crop_normalize",
        [](Address first, Address table, const ImagesTuple& images, Address boxes,
           Address image_index, Address turns, Address crops, Address centers, Address scales,
           const CropTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::crop_normalize(image_set_of(first, table, images),
                                          persons_of(boxes, image_index, turns, centers, scales),
                                          pointer(crops), crop_shape_of(shape),
                                          static_cast<DType>(dtype), stream_of(stream)),
                     "crop_normalize");
        });
#endif
}

}  // namespace kernelpose::bindings::crop_normalize
