// Forward: one pass over the keys with a running maximum, scores in registers.
//
//        keys and values, a ring of column tiles (64 x D each, 16-bit elements; float: 32)
//        |<- tile 0 ->|<- tile 1 ->| ...        resident when the unit's tiles fit the ring,
//   q    +------------+------------+            else streamed, copies running ahead
//   16 rows a warp    | S = 16 x 32 in registers -> P, rounded to T -> O (16 x D) += P V
//   4 warps a block   |
//   (float: 2)        +--
//
// Floor, per launch: q, k, v read and out written once, 4 * batch * tokens * C * sizeof(T) bytes;
// 4 * D FLOP for each pair of tokens that meet. Shared memory: (kRows + stages * 2 * kRows) *
// (D + 16 bytes) plus 4 * kRows bytes a stage and the bias table; 64.5 KB for D = 64, 192 keys.
// budget: forward_kernel<16-bit, 32> registers<=104
// budget: forward_kernel<16-bit, 64> registers<=128
// budget: forward_kernel<16-bit, 80> registers<=160
// budget: forward_kernel<16-bit, 128> registers<=208
// budget: forward_kernel<float, 32> registers<=128
// budget: forward_kernel<float, 64> registers<=168
// budget: forward_kernel<float, 80> registers<=168
// budget: forward_kernel<float, 128> registers<=192
#include "window_attention.h"
#include "window_attention_dispatch.cuh"
#include "window_attention_pool.cuh"

namespace kernelpose::cuda {
namespace {

template <class T>
struct ForwardArguments {
  Problem problem;
  Grid grid;
  Matrix<const T> query;
  Keys<T> keys;
  Matrix<T> out;
  const float* bias;
  int bias_entries;  // in shared memory
  float* lse;
};

template <class T, int D>
struct ForwardShared {
  static constexpr int kTile = Tile<T>::kRows * kRowStride<T, D>;
  static constexpr int kStage = 2 * kTile * sizeof(T) + Tile<T>::kRows * sizeof(int);

  static constexpr int fixed(int bias_entries) {
    return kTile * sizeof(T) + 2 * bias_entries * sizeof(float);
  }
  static_assert(fixed(kSharedBias) + kStage <= kSharedLimit);
};

// Blocks of 4 warps a multiprocessor that the kernel gets registers for.
template <class T, int D>
constexpr int kForwardBlocks = D <= 32 || (D <= 64 && sizeof(T) == 2) ? 4 : (D <= 80 ? 3 : 2);

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads, resident_blocks<T>(kForwardBlocks<T, D>))
    forward_kernel(const ForwardArguments<T> args) {
  constexpr int kTile = ForwardShared<T, D>::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = Tile<T>::kChunk;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  T* const query_rows = reinterpret_cast<T*>(shared);
  T* const ring = query_rows + kTile;  // stages x (keys, values)
  int* const places = reinterpret_cast<int*>(ring + args.grid.stages * 2 * kTile);
  float* const bias_rows = reinterpret_cast<float*>(places + args.grid.stages * kRows);

  const Problem& problem = args.problem;
  Work<T> work(args.grid);
  const Tokens tokens = tokens_of(problem, work.cell);
  const int count = tokens.count(), keys = count + problem.pools;
  work.cut(problem, args.grid, count);
  if (work.first_tile >= work.end_tile) return;
  const int lane = work.lane, slot_rows = work.slot_rows, tile_row = work.tile_row;
  const int width = problem.shape.head_dim;
  const Bias bias = load_bias(args.bias, args.bias_entries, bias_rows, problem, work);
  T* const own_rows = query_rows + tile_row * kStride;

  const auto load = [&](int tile, int stage) {
    T* const target = ring + stage * 2 * kTile + tile_row * kStride;
    const int i = tile * slot_rows + work.warp_row + (lane & 15);
    copy_rows<T, D, true>(target, target + kTile,
                          key_row(problem, args.keys, work.unit, tokens, count, i), lane, width,
                          problem.aligned);
    if (bias.table != nullptr && lane < 16) {
      places[stage * kRows + tile_row + lane] =
          i < count ? tokens.bias_place(i, problem.bias_columns) : 0;
    }
  };

  for (int row_tile = work.first_tile; row_tile < work.end_tile; ++row_tile) {
    const int first_row = row_tile * slot_rows + work.warp_row;
    const bool active = work.unit.exists && first_row < count;
    const bool later = row_tile > work.first_tile;  // keys and values are there already
    copy_rows<T, D, false>(own_rows, nullptr,
                           token_row(problem, args.query, args.query, work.unit, tokens, count,
                                     first_row + (lane & 15)),
                           lane, width, problem.aligned);
    cp_async_commit();
    if (later) {
      cp_async_wait<0>();
      __syncwarp();
    }

    RowOperand<T, D, true> query;
    int row_place[2];
    row_places(row_place, bias, tokens, first_row + (lane >> 2), count, problem.bias_columns);
    float o[D / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // sum: of this lane's columns

    const auto compute = [&](int tile, int stage) {
      if (!active) return;
      if (tile == 0) query.load(own_rows, lane);
      const int left = keys - tile * slot_rows, end = min(left, slot_rows);
      const int slot_row = tile_row - work.warp_row;
      for (int c = 0; c < end; c += kChunk) {
        const T* const key_rows = ring + stage * 2 * kTile + (slot_row + c) * kStride;
        float s[kChunk / 8][4];
        multiply_transposed<kChunk>(s, query, key_rows, lane);
        to_scores<false, kChunk>(s, problem.scale, bias, problem.bias_centre, row_place,
                                 places + stage * kRows + slot_row + c, left - problem.pools - c,
                                 left - c, lane);
        softmax_step<D, kChunk>(s, o, maximum, sum);
        add_product<D, kChunk>(o, s, key_rows + kTile, lane);
      }
    };
    for_each_tile((keys + slot_rows - 1) / slot_rows, args.grid.stages, later, load, compute);
    if (!active) continue;

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(sum[half]);
      factor[half] = 1.f / total;
      const int row = first_row + (lane >> 2) + 8 * half;
      if ((lane & 3) == 0 && row < count) {
        args.lse[statistic_of(problem, work.unit, tokens.at(row))] =
            kLn2 * maximum[half] + logf(total);
      }
    }
    T* const to = target_row(problem, args.out, work.unit, tokens, count, first_row + (lane & 15));
    store_rows<T, D>(o, factor, own_rows, to, lane, width, problem.aligned);
  }
}

template <class T, int D>
cudaError_t launch_forward(const T* qkv, const float* bias, T* out, float* lse, T* means,
                           const WindowAttentionShape& shape, cudaStream_t stream) {
  using Shared = ForwardShared<T, D>;
  const bool aligned = rows_aligned<T>(shape, {qkv, out, means});
  if (shape.pooled) {
    const cudaError_t error = launch_pool_means(qkv, means, shape, aligned, stream);
    if (error != cudaSuccess) return error;
  }
  const int bias_entries = shared_bias(shape, bias), rows = largest_cell(shape);
  const int fixed = Shared::fixed(bias_entries);
  const Grid grid =
      make_grid<T>(shape, shape.cells(), rows, rows + shape.pools(), Shared::kStage, fixed);
  const ForwardArguments<T> args = {make_problem(shape, aligned),
                                    grid,
                                    packed_matrix(qkv, 0, shape),
                                    packed_keys(qkv, means, shape),
                                    token_matrix(out, shape),
                                    bias,
                                    bias_entries,
                                    lse};
  return launch_blocks(forward_kernel<T, D>, grid.blocks, Tile<T>::kThreads,
                       fixed + grid.stages * Shared::kStage, stream, args);
}

}  // namespace

int64_t window_attention_forward_workspace(const WindowAttentionShape& shape, DType dtype) {
  return pool_means_elements(shape) * element_size(dtype);
}

cudaError_t window_attention_forward(const void* qkv, const float* bias, void* out, float* lse,
                                     void* workspace, const WindowAttentionShape& shape,
                                     DType dtype, cudaStream_t stream) {
  if (shape.batch == 0) return cudaSuccess;
  return dispatch(dtype, shape, [&](auto type, auto width) {
    using T = decltype(type);
    return launch_forward<T, decltype(width)::value>(static_cast<const T*>(qkv), bias,
                                                     static_cast<T*>(out), lse,
                                                     static_cast<T*>(workspace), shape, stream);
  });
}

}  // namespace kernelpose::cuda
