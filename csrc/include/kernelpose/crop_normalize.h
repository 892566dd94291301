// What crop_normalize computes on: where images lie, and the affine map from a crop's pixels into
// its image.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kernelpose {

// (height, width, 3) bytes; the strides are in bytes.
struct Image {
  const uint8_t* pixels;
  int height, width;
  int64_t row, pixel, channel;
};

// Images of one size at equal distances, or, where there is a table, of a row of six numbers each:
// distance from the first image in bytes, height, width, and the strides of row, pixel and channel.
struct ImageSet {
  const int64_t* table;
  Image first;
  int64_t stride;
  int64_t count;

  KP_HOST_DEVICE Image at(int64_t index) const {
    Image image = first;
    if (table == nullptr) {
      image.pixels += index * stride;
      return image;
    }
    const int64_t* entry = table + 6 * index;
    image.pixels += entry[0];
    image.height = static_cast<int>(entry[1]);
    image.width = static_cast<int>(entry[2]);
    image.row = entry[3];
    image.pixel = entry[4];
    image.channel = entry[5];
    return image;
  }
};

struct CropShape {
  int64_t persons;
  int height, width;
  float padding;
  float aspect;  // width / height
  bool udp;
  float factor[3], offset[3];  // a grey level x becomes x * factor + offset

  KP_HOST_DEVICE int pixels() const { return height * width; }
};

// All tensors but the crops.
struct Persons {
  const double* boxes;         // (persons, 4)
  const int64_t* image_index;  // (persons)
  const double* turns;         // (persons, 2): cosine and sine of the rotation, or nullptr
  float* centers;              // (persons, 2)
  float* scales;               // (persons, 2)
};

// The image point under pixel (column, row) of a crop: x = column * xx + (row * xy + x0), and
// y = column * yx + (row * yy + y0), each operation rounded to float.
struct Warp {
  float xx, xy, x0;
  float yx, yy, y0;
  bool usable;  // else there is no such crop
};

struct Placement {
  float center[2], scale[2];  // x, y and width, height, in image pixels
  Warp warp;
};

// As box_to_center_scale, is_usable, warp_matrix and _source_coordinates of
// kernelpose/reference/crop_normalize.py, in their order and precision.
KP_HOST_DEVICE inline Placement place_crop(const CropShape& shape, const Persons& persons,
                                           int64_t images, int64_t person) {
  const double* box = persons.boxes + 4 * person;
  Placement result;
  float extent[2];
  for (int i = 0; i < 2; ++i) {
    const float low = static_cast<float>(box[i]), high = static_cast<float>(box[i] + box[2 + i]);
    result.center[i] = (high + low) * 0.5f;
    extent[i] = (high - low) * shape.padding;
  }
  const float wanted = extent[1] * shape.aspect;
  const bool wide = extent[0] > wanted;
  result.scale[0] = wide ? extent[0] : wanted;
  result.scale[1] = wide ? extent[0] / shape.aspect : extent[1];

  const double cosine = persons.turns ? persons.turns[2 * person] : 1.0;
  const double sine = persons.turns ? persons.turns[2 * person + 1] : 0.0;
  const int64_t index = persons.image_index[person];
  bool usable = index >= 0 && index < images && box[2] > 0 && box[3] > 0;
  usable = usable && cosine * cosine + sine * sine > 0.5;  // not a number: no rotation
  for (int i = 0; i < 2; ++i) {
    const float away = result.center[i] < 0 ? -result.center[i] : result.center[i];
    usable = usable && result.scale[i] >= 1e-6f && result.scale[i] <= 1e9f && away <= 1e9f;
  }
  result.warp = {0, 0, 0, 0, 0, 0, usable};
  if (!usable) return result;

  const double width = shape.width, height = shape.height;
  double fx, fy, middle_x, middle_y, turn = sine;
  if (shape.udp) {
    fx = (width - 1) / result.scale[0], fy = (height - 1) / result.scale[1];
    middle_x = (width - 1) / 2, middle_y = (height - 1) / 2;
  } else {
    fx = fy = width / result.scale[0];
    middle_x = width / 2, middle_y = height / 2;
    turn = -turn;
  }
  const double linear[4] = {cosine * fx, -turn * fx, turn * fy, cosine * fy};
  const double x = result.center[0], y = result.center[1];
  // The forward map is read as float, its inverse applied as float.
  const double a = static_cast<float>(linear[0]), b = static_cast<float>(linear[1]);
  const double c = static_cast<float>(linear[2]), d = static_cast<float>(linear[3]);
  const double tx = static_cast<float>(middle_x - (linear[0] * x + linear[1] * y));
  const double ty = static_cast<float>(middle_y - (linear[2] * x + linear[3] * y));
  const double factor = 1 / (a * d - b * c);
  const double xx = d * factor, xy = -b * factor, yx = -c * factor, yy = a * factor;
  result.warp.xx = static_cast<float>(xx);
  result.warp.xy = static_cast<float>(xy);
  result.warp.x0 = static_cast<float>(-xx * tx - xy * ty);
  result.warp.yx = static_cast<float>(yx);
  result.warp.yy = static_cast<float>(yy);
  result.warp.y0 = static_cast<float>(-yx * tx - yy * ty);
  return result;
}

}  // namespace kernelpose
