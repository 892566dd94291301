// The kernel of cascaded_attention: one group, from what the one before it found to its own result,
// and to the next group's keys and values.
//
// A unit is a few places of an image's reduced map with the ratio x ratio queries of each, so that
// the block which attends for them has all that the next group's keys there are made of. Queries
// are numbered place by place and taken kRows at a time, 16 a warp; weights, keys and values stream
// through a ring of tiles of kRows rows in shared memory.
//
//   rows    kRows x D   x, then norm(x + found before), then x + found of the next group
//   found   kRows x D   found before, then the heads' results side by side, then the group's
//   result;
//                       at last norm(reduced), a row a place
//   ring    kStages tiles; in the order of use, for every kRows queries:
//             head by head { W_q of the head | keys, values | keys, values | ... }, W_out
//           and once for the unit: W_kv of the next group
//   sums    shares of the next group's reduced places, float32
//
// D is group_width rounded up to a width that is compiled, columns past it are zero. Heads are as
// wide as they are in x, in weights and in `found`; in keys, values and registers they are padded
// with zeros to a multiple of 16.
#pragma once

#include "cascaded_attention_norms.cuh"
#include "cascaded_attention_products.cuh"
#include "cascaded_attention_tiles.cuh"
#include "kernelpose/attention.cuh"

namespace kernelpose::cuda {

// Blocks of 4 warps a multiprocessor that the kernel gets registers for.
template <class T, int D>
constexpr int kCascadeBlocks =
    sizeof(T) == 2 ? (D <= 48 ? 4 : (D <= 96 ? 3 : 2)) : (D <= 64 ? 3 : 2);

template <class T, int D>
constexpr int kCascadeElements = (2 + kCascadeStages) * CascadeTiles<T, D>::kTile;

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads, resident_blocks<T>(kCascadeBlocks<T, D>))
    cascade_kernel(const CascadeProblem problem, const CascadeStep<T> step) {
  constexpr int kRows = Tile<T>::kRows, kStride = kRowStride<T, D>;
  constexpr int kUnroll = sizeof(T) == 4 ? 1 : D / 16;  // of products whose left factor is not held
  KP_DYNAMIC_SHARED(unsigned char, shared);
  T* const rows = reinterpret_cast<T*>(shared);
  T* const found = rows + kRows * kStride;
  float* const sums = reinterpret_cast<float*>(rows + kCascadeElements<T, D>);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  T* const own_rows = rows + 16 * warp * kStride;
  T* const own_found = found + 16 * warp * kStride;
  const CascadeUnit unit(problem);
  const int width = problem.width, head_span = problem.head_span;
  const int head_stride = head_span + kWidestVector<T>;  // of keys and values
  const int row_of_lane = lane >> 2, column = 2 * (lane & 3);
  CascadeTiles<T, D> tiles(problem, step, unit, found + kRows * kStride);

  tiles.start();  // lands with the first rows
  for (int first = 0; first < unit.rows; first += kRows) {
    const int row = first + 16 * warp + (lane & 15);
    const bool exists = row < unit.rows, active = first + 16 * warp < unit.rows;
    const int64_t at = exists ? unit.offset(problem, row) : 0;
    if (step.found == nullptr) {
      copy_rows<T, D, false>(own_rows, nullptr, {step.next_x + at, nullptr, exists}, lane, width,
                             true);
      cp_async_commit();
      cp_async_wait<0>();
    } else {
      const bool later = step.before != nullptr;
      copy_rows<T, D, false>(own_rows, nullptr, {step.x + at, nullptr, exists}, lane, width, true);
      copy_rows<T, D, false>(own_found, nullptr,
                             {later ? step.before + at : step.legal, nullptr, later && exists},
                             lane, width, true);
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      if (active) normalise<T, D>(own_rows, own_found, width / 8, problem.eps, lane);

      for (int head = 0; head < problem.heads; ++head) {
        Fragment<T> q[D / 16];
        const T* tile = nullptr;
#pragma unroll
        for (int e = 0; e < D; e += 16) {
          if (e >= head_span) break;
          if (e % kRows == 0) tile = tiles.next();
          if (!active) continue;
          float c[2][4] = {};
#pragma unroll kUnroll
          for (int k = 0; k < D; k += 16) {
            add_transposed<16>(c, load_fragment(own_rows + k, kStride, lane),
                               tile + e % kRows * kStride + k, kStride, lane);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int inner = e + 8 * (i >> 1) + column + (i & 1);
            if (inner >= problem.head_dim) continue;
            const float bias = to_float(step.q_bias[head * problem.head_dim + inner]);
            c[i >> 1][i & 1] += bias;
            c[i >> 1][2 + (i & 1)] += bias;
          }
          q[e / 16] = make_fragment<T>(c[0], c[1]);
        }
        if (head + 1 == problem.heads && step.next_x != nullptr) {  // lands before W_out does
          __syncwarp();
          copy_rows<T, D, false>(own_rows, nullptr, {step.next_x + at, nullptr, exists}, lane,
                                 width, true);
        }

        float o[D / 8][4] = {};
        float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // sum: of this lane's keys
        for (int key = 0; key < problem.keys; key += kRows) {
          const T* const keys = tiles.next();
          float s[kRows / 8][4] = {};
          if (active) {
#pragma unroll
            for (int e = 0; e < D; e += 16) {
              if (e >= head_span) break;
              add_transposed<kRows>(s, q[e / 16], keys + e, head_stride, lane);
            }
            scale_scores<kRows>(s, problem.scale);
            hide_columns<kRows>(s, problem.keys - key, lane);
            softmax_step<D, kRows>(s, o, maximum, sum);
          }
          const T* const values = tiles.next();
          if (active) {
#pragma unroll
            for (int k = 0; k < kRows; k += 16) {
              if (key + k >= problem.keys) break;
              const auto weights = make_fragment<T>(s[k / 8], s[k / 8 + 1]);
#pragma unroll
              for (int e = 0; e < D; e += 16) {
                if (e >= head_span) break;
                add_product(o + e / 8, weights, values + k * head_stride + e, head_stride, lane);
              }
            }
          }
        }
        if (!active) continue;
        const float factor[2] = {1.f / row_sum(sum[0]), 1.f / row_sum(sum[1])};
        T* const to = own_found + row_of_lane * kStride + head * problem.head_dim;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int inner = 8 * j + column + (i & 1);
            if (inner >= problem.head_dim) continue;
            to[8 * (i >> 1) * kStride + inner] = from_float<T>(o[j][i] * factor[i >> 1]);
          }
        }
      }

      float y[D / 8][4] = {};
#pragma unroll
      for (int b = 0; b < D; b += kRows) {
        const T* const weights = tiles.next();
        if (!active) continue;
#pragma unroll kUnroll
        for (int k = 0; k < D; k += 16) {
          const auto heads = load_fragment(own_found + k, kStride, lane);
#pragma unroll
          for (int n = b; n < D && n < b + kRows; n += 16) {
            add_transposed<16>(y + n / 8, heads, weights + (n - b) * kStride + k, kStride, lane);
          }
        }
      }
      if (active) {
        finish_rows<D>(y, step, width / 8, problem.eps, lane);
        const float one[2] = {1.f, 1.f};
        store_rows<T, D>(y, one, own_found, exists ? step.found + at : nullptr, lane, width, true);
        if (step.next_x != nullptr) {
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int place = (row_of_lane + 8 * half) * kStride + 8 * j + column;
              const float2 x = load_pair(own_rows + place), o = load_pair(own_found + place);
              store_pair(own_rows + place, x.x + o.x, x.y + o.y);
            }
          }
        }
      }
    }

    if (step.next_x == nullptr) continue;
    __syncthreads();
    if (problem.area % 4 == 0) {
      add_places<4, T, D>(problem, step, unit, rows, first, sums);
    } else {
      add_places<1, T, D>(problem, step, unit, rows, first, sums);
    }
    __syncthreads();  // the sums are there, the rows are free
  }
  if (step.next_x == nullptr) return;

  finish_places<T, D>(problem, step, unit, sums, found);
  const int span = problem.span();
  for (int b = 0; b < 2 * span; b += kRows) {
    const T* const weights = tiles.next();
    const int output = b + 16 * warp;  // keys of all heads, then values
    if (output >= 2 * span) continue;
    float c[2][4] = {};
#pragma unroll kUnroll
    for (int k = 0; k < D; k += 16) {
      add_transposed<16>(c, load_fragment(found + k, kStride, lane),
                         weights + 16 * warp * kStride + k, kStride, lane);
    }
    const int head = output / head_span;  // the 16 are of one: of keys, then of values
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float bias[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int inner = output - head * head_span + 8 * j + column + i;
        bias[i] = inner < problem.head_dim ? to_float(step.kv_bias[head * problem.head_dim + inner])
                                           : 0.f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = row_of_lane + 8 * half;
        if (place >= unit.places) continue;
        T* const to = step.next_keys_values +
                      (unit.image * problem.keys + unit.first + place) * 2 * span + output;
        store_pair(to + 8 * j + column, c[j][2 * half] + bias[0], c[j][2 * half + 1] + bias[1]);
      }
    }
  }
}

}  // namespace kernelpose::cuda
