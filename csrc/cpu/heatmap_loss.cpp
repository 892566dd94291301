// A task is the map of one joint: two profiles, height + width exponentials, and then one pass that
// subtracts their product. The map of a joint of weight 0 is not read.
#include "heatmap_loss.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"
#include "part_vector.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int kBand = 32;  // rows

// Calls visit(x, count) for the vectors of a row; count is a constant for all but the last.
template <class T, class Visit>
inline void for_vectors(int width, Visit visit) {
  int x = 0;
  for (; x + kWidth<T> <= width; x += kWidth<T>) visit(x, kWidth<T>);
  if (x < width) visit(x, width - x);
}

// Up to a whole vector: zeros behind the last pixel, though the Gaussian may reach there.
template <class T>
inline void fill_profile(const Profile<T>& profile, T exponent, int size, T* to) {
  const T end = profile.end < T(size) ? profile.end : T(size);
  Vector<T> pixels;
  for (int i = 0; i < kWidth<T>; ++i) pixels[i] = T(i);
  for (int i = 0; i < size; i += kWidth<T>, pixels += T(kWidth<T>)) {
    const Vector<T> offsets = (pixels - profile.origin) - profile.shift;
    const Vector<T> exponents = offsets * offsets * exponent;
    const auto inside =
        (pixels >= profile.first) & (pixels < end) & (exponents >= T(kLeastProfileExponent));
    store(to + i, inside ? power_of_two(exponents) : Vector<T>{});
  }
}

template <class T>
struct Row {
  T peak;  // the row's entry of the other profile
  const T* profile;

  Vector<T> target(int x) const { return peak * load(profile + x); }
};

// Sum of (map - target)^2; in double from one band of rows to the next, or large maps lose digits.
template <class Element, class T = Compute<Element>>
double squared_error(const Element* map, const T* columns, const T* rows, int height, int width) {
  double sum = 0;
  for (int y = 0; y < height;) {
    Vector<T> sums[2] = {};
    for (const int end = std::min(height, y + kBand); y < end; ++y, map += width) {
      const Row<T> row = {rows[y], columns};
      for_vectors<T>(width, [&](int x, int count) {
        const Vector<T> difference = load_part(map + x, count) - row.target(x);
        sums[y & 1] += difference * difference;
      });
    }
    sum += double(reduce_sum<T>(sums[0] + sums[1]));
  }
  return sum;
}

// gradient = factor * (map - target)
template <class Element, class T = Compute<Element>>
void scaled_difference(const Element* map, const T* columns, const T* rows, T factor, int height,
                       int width, Element* gradient) {
  for (int y = 0; y < height; ++y, map += width, gradient += width) {
    const Row<T> row = {rows[y], columns};
    for_vectors<T>(width, [&](int x, int count) {
      const Vector<T> difference = load_part(map + x, count) - row.target(x);
      store_part(gradient + x, factor * difference, count);
    });
  }
}

// The joints of one call; profiles of the map at hand lie in the thread's scratch memory.
template <class T>
class Joints {
 public:
  Joints(const void* keypoints, const void* visible, const HeatmapLossShape& shape)
      : keypoints_(static_cast<const T*>(keypoints)),
        visible_(static_cast<const T*>(visible)),
        shape_(shape),
        targets_(shape) {}

  Joint<T> at(int64_t map) const { return targets_.joint(keypoints_ + 2 * map, visible_[map]); }

  // Calls use(columns, rows); false where there is no memory left.
  template <class Use>
  bool with_profiles(const Joint<T>& joint, Use use) const {
    const int64_t width = round_up(shape_.width, kWidth<T>);
    const int64_t height = round_up(shape_.height, kWidth<T>);
    T* columns = static_cast<T*>(thread_scratch((width + height) * sizeof(T)));
    if (columns == nullptr) return false;
    fill_profile(joint.x, targets_.exponent, shape_.width, columns);
    fill_profile(joint.y, targets_.exponent, shape_.height, columns + width);
    use(columns, columns + width);
    return true;
  }

 private:
  const T* keypoints_;
  const T* visible_;
  const HeatmapLossShape& shape_;
  const GaussianTargets<T> targets_;
};

template <class Element>
bool forward(const void* pred, const void* keypoints, const void* visible, void* loss,
             const HeatmapLossShape& shape, int threads) {
  using T = Compute<Element>;
  const Joints<T> joints(keypoints, visible, shape);
  const std::unique_ptr<double[]> sums(new (std::nothrow) double[shape.maps]);
  if (!sums) return false;
  std::atomic<bool> enough_memory{true};
  parallel_for(shape.maps, threads, [&](int64_t i) {
    const Joint<T> joint = joints.at(i);
    sums[i] = 0;
    if (joint.weight == 0) return;
    const Element* map = static_cast<const Element*>(pred) + i * shape.map_elements();
    const bool ran = joints.with_profiles(joint, [&](const T* columns, const T* rows) {
      const double sum = squared_error(map, columns, rows, shape.height, shape.width);
      sums[i] = double(joint.weight) * sum;
    });
    if (!ran) enough_memory = false;
  });
  double total = 0;
  for (int64_t i = 0; i < shape.maps; ++i) total += sums[i];
  *static_cast<T*>(loss) = T(total / (double(shape.maps) * double(shape.map_elements())));
  return enough_memory;
}

template <class Element>
bool backward(const void* grad_loss, const void* pred, const void* keypoints, const void* visible,
              void* grad_pred, const HeatmapLossShape& shape, int threads) {
  using T = Compute<Element>;
  const Joints<T> joints(keypoints, visible, shape);
  const double scale = 2 * double(*static_cast<const T*>(grad_loss)) /
                       (double(shape.maps) * double(shape.map_elements()));
  prefer_huge_pages(grad_pred, shape.maps * shape.map_elements() * sizeof(Element));
  std::atomic<bool> enough_memory{true};
  parallel_for(shape.maps, threads, [&](int64_t i) {
    const Joint<T> joint = joints.at(i);
    const int64_t first = i * shape.map_elements();
    Element* gradient = static_cast<Element*>(grad_pred) + first;
    if (joint.weight == 0) {
      std::memset(gradient, 0, shape.map_elements() * sizeof(Element));
      return;
    }
    const bool ran = joints.with_profiles(joint, [&](const T* columns, const T* rows) {
      scaled_difference(static_cast<const Element*>(pred) + first, columns, rows,
                        T(scale * double(joint.weight)), shape.height, shape.width, gradient);
    });
    if (!ran) enough_memory = false;
  });
  return enough_memory;
}

template <class Run>
bool dispatch(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat64:
      return run(double{});
  }
  return false;
}

}  // namespace

bool heatmap_loss_forward(const void* pred, const void* keypoints, const void* visible, void* loss,
                          const HeatmapLossShape& shape, DType dtype, int threads) {
  return dispatch(dtype, [&](auto element) {
    return forward<decltype(element)>(pred, keypoints, visible, loss, shape, threads);
  });
}

bool heatmap_loss_backward(const void* grad_loss, const void* pred, const void* keypoints,
                           const void* visible, void* grad_pred, const HeatmapLossShape& shape,
                           DType dtype, int threads) {
  return dispatch(dtype, [&](auto element) {
    return backward<decltype(element)>(grad_loss, pred, keypoints, visible, grad_pred, shape,
                                       threads);
  });
}

}  // namespace kernelpose::cpu::KP_ISA
