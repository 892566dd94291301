// A task is a band of rows of one crop, and a row goes through it in passes:
//
//   where each pixel lies in the image       vector   x, y (integers), along, down (fractions)
//   fetch the pixels around it               scalar   a word of two neighbours, R G B R G B
//   interpolate along x, a line a plane      vector   the upper and the lower line
//   interpolate along y, round, normalise    vector
//
// Fetching is left to scalar loads, of eight bytes at once: two of them a pixel, where gathers
// would need a lane each as well. Without rotation a row of the crop lies between two rows of the
// image, so that an interpolated line serves the next row of the crop too where both lie between
// the same.
//
// Compiled without contraction: the coordinates are those of the reference to the last bit.
#include "crop_normalize.h"

#include <atomic>
#include <climits>
#include <memory>
#include <new>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

constexpr int kBandRows = 64;
constexpr int kLanes = kWidth<float>;

typedef uint32_t WordVector __attribute__((vector_size(kVectorBytes)));

// The largest integer that is not above x, and how far x is above it; what lies outside [-2, size]
// is moved there, where both neighbours are black.
inline void split(float x, float size, int& whole, float& fraction) {
  x = x < -2.0f ? -2.0f : x;
  x = x > size ? size : x;
  const int truncated = static_cast<int>(x);
  whole = truncated - (static_cast<float>(truncated) > x ? 1 : 0);
  fraction = x - static_cast<float>(whole);
}

// Pixels x and x + 1 of a row: R G B R G B from the lowest byte. Reads eight bytes.
inline uint64_t pair_at(const uint8_t* row, int x) {
  uint64_t pair;
  std::memcpy(&pair, row + 3 * int64_t{x}, sizeof(pair));
  return pair;
}

// Where `pair_at` stays within the row.
inline bool inside(int x, int width) { return x >= 0 && x <= width - 3; }

// The same with black outside the image.
inline uint64_t pair_or_black(const uint8_t* row, int x, int width) {
  if (inside(x, width)) return pair_at(row, x);
  uint64_t pair = 0;
  for (int i = 0; i < 2; ++i) {
    if (x + i < 0 || x + i >= width) continue;
    uint64_t pixel = 0;
    std::memcpy(&pixel, row + 3 * int64_t{x + i}, 3);
    pair |= pixel << (24 * i);
  }
  return pair;
}

template <int... I>
inline WordVector even_words(WordVector a, WordVector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

template <int... I>
inline WordVector odd_words(WordVector a, WordVector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

inline FloatVector to_float(WordVector bytes) {
  IntVector numbers;
  std::memcpy(&numbers, &bytes, sizeof(numbers));
  return __builtin_convertvector(numbers, FloatVector);
}

// One row of the crop at a time; the memory is the thread's own.
class Rows {
 public:
  Rows(const CropShape& shape, const Image& image, const Warp& warp, void* memory)
      : shape_(shape),
        image_(image),
        warp_(warp),
        upright_(warp.xy == 0 && warp.yx == 0),
        padded_(static_cast<int>(round_up(shape.width, kLanes))) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](auto*& piece, int64_t count) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(next);
      next += count * sizeof(*piece);
    };
    take(pairs_, padded_);
    take(along_, padded_);
    take(down_, padded_);
    for (Line* line : {&upper_, &lower_}) take(line->values, 3 * padded_);
    take(normalized_, padded_);
    take(x_, padded_);
    take(y_, padded_);
    for (int j = shape.width; j < padded_; ++j) pairs_[j] = 0, along_[j] = down_[j] = 0;
    if (upright_) locate_columns();
  }

  static size_t bytes(const CropShape& shape) {
    const int64_t padded = round_up(shape.width, kLanes);
    return padded * (sizeof(uint64_t) + 9 * sizeof(float) + 2 * sizeof(int));
  }

  template <class Element>
  void write(int row, Element* crop) {
    interpolate(row);
    for (int c = 0; c < 3; ++c) {
      normalize(c);
      write_row(normalized_, shape_.width, 1.0f,
                crop + int64_t{c} * shape_.pixels() + int64_t{row} * shape_.width);
    }
  }

 private:
  struct Line {
    float* values;      // (3, padded)
    int row = INT_MIN;  // of the image, where it is one
  };

  // Without rotation: the columns of the image under the columns of the crop, for all rows, and
  // between which columns they need no check.
  void locate_columns() {
    split_row(warp_.xx, warp_.x0, image_.width, x_, along_);
    while (first_ < shape_.width && !inside(x_[first_], image_.width)) ++first_;
    end_ = first_;
    while (end_ < shape_.width && inside(x_[end_], image_.width)) ++end_;
  }

  // Leaves the lines above and below the row, and how far it is below the first.
  void interpolate(int row) {
    const float r = static_cast<float>(row);
    if (!upright_) {
      locate(r);
      fill_rotated(0, upper_);
      fill_rotated(1, lower_);
      return;
    }
    int top;
    float down;
    split(r * warp_.yy + warp_.y0, static_cast<float>(image_.height), top, down);
    for (int j = 0; j < shape_.width; ++j) down_[j] = down;
    if (lower_.row == top) std::swap(upper_, lower_);
    if (upper_.row != top) fill_upright(top, upper_);
    if (lower_.row != top + 1) fill_upright(top + 1, lower_);
  }

  void locate(float row) {
    const float x0 = row * warp_.xy + warp_.x0, y0 = row * warp_.yy + warp_.y0;
    split_row(warp_.xx, x0, image_.width, x_, along_);
    split_row(warp_.yx, y0, image_.height, y_, down_);
  }

  // Of the coordinates column * step + start.
  void split_row(float step, float start, int size, int* __restrict whole,
                 float* __restrict fraction) const {
    const int columns = shape_.width;
    const float end = static_cast<float>(size);
    for (int j = 0; j < columns; ++j) {
      split(static_cast<float>(j) * step + start, end, whole[j], fraction[j]);
    }
  }

  void fill_upright(int row, Line& line) {
    line.row = row;
    if (row < 0 || row >= image_.height) {
      for (int j = 0; j < 3 * padded_; ++j) line.values[j] = 0;
      return;
    }
    const uint8_t* pixels = image_.pixels + row * image_.row;
    int j = 0;
    for (; j < first_; ++j) pairs_[j] = pair_or_black(pixels, x_[j], image_.width);
    for (; j < end_; ++j) pairs_[j] = pair_at(pixels, x_[j]);
    for (; j < shape_.width; ++j) pairs_[j] = pair_or_black(pixels, x_[j], image_.width);
    interpolate_along(line);
  }

  void fill_rotated(int below, Line& line) {
    const auto fits = [&](int j) {
      return inside(x_[j], image_.width) && y_[j] >= 0 && y_[j] + 1 < image_.height;
    };
    // Coordinates run one way along a row: what holds at both ends holds between them.
    if (fits(0) && fits(shape_.width - 1)) {
      const uint8_t* pixels = image_.pixels + below * image_.row;
      for (int j = 0; j < shape_.width; ++j) {
        pairs_[j] = pair_at(pixels + y_[j] * image_.row, x_[j]);
      }
    } else {
      for (int j = 0; j < shape_.width; ++j) {
        const int y = y_[j] + below;
        const bool exists = y >= 0 && y < image_.height;
        const uint8_t* pixels = image_.pixels + (exists ? y : 0) * image_.row;
        pairs_[j] = exists ? pair_or_black(pixels, x_[j], image_.width) : 0;
      }
    }
    interpolate_along(line);
  }

  void interpolate_along(Line& line) const {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    for (int j = 0; j < padded_; j += kLanes) {
      WordVector a, b;
      std::memcpy(&a, pairs_ + j, sizeof(a));
      std::memcpy(&b, pairs_ + j + kLanes / 2, sizeof(b));
      const WordVector low = even_words(a, b, lanes), high = odd_words(a, b, lanes);
      const FloatVector along = load(along_ + j);
      const auto lerp = [&](int plane, WordVector left, WordVector right) {
        const FloatVector from = to_float(left & 255);
        store(line.values + plane * padded_ + j, from + along * (to_float(right & 255) - from));
      };
      lerp(0, low, low >> 24);
      lerp(1, low >> 8, high);
      lerp(2, low >> 16, high >> 8);
    }
  }

  void normalize(int plane) const {
    const FloatVector factor = broadcast(shape_.factor[plane]);
    const FloatVector offset = broadcast(shape_.offset[plane]);
    const FloatVector shifter = broadcast(12582912.0f);  // adding 1.5 * 2^23 rounds, half to even
    for (int j = 0; j < padded_; j += kLanes) {
      const FloatVector from = load(upper_.values + plane * padded_ + j);
      const FloatVector to = load(lower_.values + plane * padded_ + j);
      const FloatVector level = (from + load(down_ + j) * (to - from) + shifter) - shifter;
      store(normalized_ + j, level * factor + offset);
    }
  }

  const CropShape& shape_;
  const Image image_;
  const Warp warp_;
  const bool upright_;
  const int padded_;
  int first_ = 0, end_ = 0;
  uint64_t* pairs_;
  float *along_, *down_, *normalized_;
  int *x_, *y_;
  Line upper_, lower_;
};

template <class Element>
int64_t crop_normalize(const ImageSet& images, const Persons& persons, Element* crops,
                       const CropShape& shape, int threads) {
  const std::unique_ptr<Warp[]> warps(new (std::nothrow) Warp[shape.persons]);
  if (!warps) return kNoMemory;
  for (int64_t i = 0; i < shape.persons; ++i) {
    const Placement placement = place_crop(shape, persons, images.count, i);
    if (!placement.warp.usable) return i;
    warps[i] = placement.warp;
    for (int axis = 0; axis < 2; ++axis) {
      persons.centers[2 * i + axis] = placement.center[axis];
      persons.scales[2 * i + axis] = placement.scale[axis];
    }
  }
  prefer_huge_pages(crops, shape.persons * 3 * shape.pixels() * sizeof(Element));
  const int64_t bands = (shape.height + kBandRows - 1) / kBandRows;
  std::atomic<bool> enough_memory{true};
  parallel_for(shape.persons * bands, threads, [&](int64_t task) {
    const int64_t person = task / bands;
    void* memory = thread_scratch(Rows::bytes(shape));
    if (!memory) {
      enough_memory = false;
      return;
    }
    Rows rows(shape, images.at(persons.image_index[person]), warps[person], memory);
    const int first = static_cast<int>(task % bands) * kBandRows;
    const int end = first + kBandRows < shape.height ? first + kBandRows : shape.height;
    for (int row = first; row < end; ++row) rows.write(row, crops + person * 3 * shape.pixels());
  });
  return enough_memory ? kAllUsable : kNoMemory;
}

}  // namespace

int64_t crop_normalize(const ImageSet& images, const Persons& persons, void* crops,
                       const CropShape& shape, DType dtype, int threads) {
  switch (dtype) {
    case DType::kFloat16:
      return crop_normalize(images, persons, static_cast<Half*>(crops), shape, threads);
    case DType::kBFloat16:
      return crop_normalize(images, persons, static_cast<BFloat16*>(crops), shape, threads);
    default:
      return crop_normalize(images, persons, static_cast<float*>(crops), shape, threads);
  }
}

}  // namespace kernelpose::cpu::KP_ISA
