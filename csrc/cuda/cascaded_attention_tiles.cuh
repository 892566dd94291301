// What a launch of cascaded_attention works on: the problem, the queries of a block, and the tiles
// that stream through its shared memory.
#pragma once

#include "kernelpose/vector.cuh"
#include "kernelpose/warp_tile.cuh"

namespace kernelpose::cuda {

constexpr int kUnitPlaces = 16;  // at most: the rows of a product
constexpr int kCascadeStages = 3;

struct CascadeProblem {
  int64_t tokens;  // of an image
  int channels, map_width, ratio, area, reduced_width, keys;
  int width, heads, head_dim, head_span;  // of a group; head_span: head_dim, padded
  int places;                             // of a unit
  int units;                              // of an image
  float scale, eps;

  __host__ __device__ int span() const { return heads * head_span; }
};

// Of one launch. The first has no group of its own, the last no next one.
template <class T>
struct CascadeStep {
  const T *x, *before;  // this group's channels; what the group before it found, or nullptr
  T* found;             // nullptr: no group
  const T *q_weight, *q_bias, *keys_values, *out_weight, *out_bias, *norm_weight, *norm_bias;
  // Of the next group; next_x == nullptr: none.
  const T *next_x, *reduce_weight, *reduce_bias, *kv_weight, *kv_bias;
  T* next_keys_values;
  const T* legal;  // an address of global memory, for copies of nothing
};

// The queries of a unit.
struct CascadeUnit {
  int64_t image;
  int first, places, rows;

  __device__ __forceinline__ explicit CascadeUnit(const CascadeProblem& problem) {
    const int block = static_cast<int>(blockIdx.x);
    image = block / problem.units;
    first = block % problem.units * problem.places;
    places = min(problem.places, problem.keys - first);
    rows = places * problem.area;
  }

  // Where row i begins in a tensor like x.
  __device__ __forceinline__ int64_t offset(const CascadeProblem& problem, int i) const {
    const int place = first + i / problem.area, inner = i % problem.area;
    const int y = place / problem.reduced_width * problem.ratio + inner / problem.ratio;
    const int x = place % problem.reduced_width * problem.ratio + inner % problem.ratio;
    return (image * problem.tokens + static_cast<int64_t>(y) * problem.map_width + x) *
           problem.channels;
  }
};

// The tiles of a unit, in the order of their use, through a ring.
template <class T, int D>
class CascadeTiles {
 public:
  static constexpr int kRows = Tile<T>::kRows, kTile = kRows * kRowStride<T, D>;
  static_assert(Tile<T>::kThreads == 2 * kRows);

  __device__ __forceinline__ CascadeTiles(const CascadeProblem& problem, const CascadeStep<T>& step,
                                          const CascadeUnit& unit, T* ring)
      : problem_(problem), step_(step), image_(unit.image), ring_(ring) {
    if (step.next_x != nullptr) total_ = (2 * problem.span() + kRows - 1) / kRows;
    if (step.found == nullptr) return;
    passes_ = (unit.rows + kRows - 1) / kRows;
    query_tiles_ = (problem.head_span + kRows - 1) / kRows;
    of_head_ = query_tiles_ + 2 * ((problem.keys + kRows - 1) / kRows);
    of_pass_ = problem.heads * of_head_ + (D + kRows - 1) / kRows;
    total_ += passes_ * of_pass_;
  }

  // The first tiles; the caller waits for them, and copies rows of its own meanwhile.
  __device__ __forceinline__ void start() {
    for (int i = 0; i < kCascadeStages - 1; ++i) load(i);
  }

  // The next tile; the one before it is given up. Called by all threads of the block. What a thread
  // copied before it called this the time before last has landed, and can be seen by all.
  __device__ __forceinline__ const T* next() {
    cp_async_wait<kCascadeStages - 2>();
    __syncthreads();
    const T* const tile = ring_ + taken_ % kCascadeStages * kTile;
    load(taken_ + kCascadeStages - 1);
    cp_async_commit();
    ++taken_;
    return tile;
  }

 private:
  // Tile number `tile` of all, if there is one, to its place in the ring. Two threads copy a row,
  // zeros where there is none.
  __device__ __forceinline__ void load(int tile) {
    constexpr int kVector = kWidestVector<T>;
    if (tile >= total_) return;
    T* const to = ring_ + tile % kCascadeStages * kTile;
    const int width = problem_.width, head_dim = problem_.head_dim, span = problem_.span();
    int row = static_cast<int>(threadIdx.x) >> 1, columns = D, valid = width;
    const T* from = nullptr;
    if (tile >= passes_ * of_pass_) {
      row += (tile - passes_ * of_pass_) * kRows;
      const int head = row / problem_.head_span;  // of keys, then of values
      row -= head * problem_.head_span;
      if (head < 2 * problem_.heads && row < head_dim) {
        from = step_.kv_weight + (head * head_dim + row) * width;
      }
    } else {
      tile %= of_pass_;
      const int head = tile / of_head_;
      tile -= head * of_head_;
      if (head >= problem_.heads) {
        row += (tile + (head - problem_.heads) * of_head_) * kRows;
        if (row < width) from = step_.out_weight + row * width;
      } else if (tile < query_tiles_) {
        row += tile * kRows;
        if (row < head_dim) from = step_.q_weight + (head * head_dim + row) * width;
      } else {
        tile -= query_tiles_;
        row += tile / 2 * kRows;
        columns = valid = problem_.head_span;
        if (row < problem_.keys) {
          from = step_.keys_values + ((image_ * problem_.keys + row) * 2 + (tile & 1)) * span +
                 head * columns;
        }
      }
    }
    T* const own = to + static_cast<int>(threadIdx.x >> 1) * (columns + kVector);
    if (from == nullptr) valid = 0;
#pragma unroll 1
    for (int c = (threadIdx.x & 1) * kVector; c < columns; c += 2 * kVector) {
      cp_async_16(own + c, c < valid ? from + c : step_.legal, c < valid);
    }
  }

  const CascadeProblem& problem_;
  const CascadeStep<T>& step_;
  const int64_t image_;
  T* const ring_;
  int passes_ = 0, query_tiles_ = 0, of_head_ = 0, of_pass_ = 1;
  int total_ = 0, taken_ = 0;
};

}  // namespace kernelpose::cuda
