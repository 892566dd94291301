// The two passes of the gradient. Probabilities are computed again from lse; nothing is summed by
// atomics.
//
//   queries' pass   rows q, dO    columns k, v (and the pooled ones)
//                   P = exp(q k^T - lse)   dS = P (dO v^T - delta)   dq = scale * dS k
//   keys' pass      rows k, v     columns q, dO, lse, delta
//                   P^T, dS^T likewise     dv = P^T dO               dk = scale * dS^T q
//
// Rows lie 16 a warp, columns pass through a ring of tiles, as in the forward kernel; a warp holds
// 16 x 16 scores at a time. delta = rowsum(dO * out) is found by the queries' pass. Where both
// share a block, the row tiles of the first pass become the columns of the second and its only
// column tile the rows: q, k, v, dO are read once. Pooled keys are the rows of a launch whose
// columns are all tokens of the map; their gradient goes to the workspace in float32, divided by
// the pool's tokens, and the keys' pass adds it to every token's.
#pragma once

#include "window_attention_pool.cuh"
#include "window_attention_tiles.cuh"

// budget: backward_kernel<16-bit, 32, *> registers<=144
// budget: backward_kernel<16-bit, 64, *> registers<=192
// budget: backward_kernel<16-bit, 80, *> registers<=200
// budget: backward_kernel<16-bit, 128, *> registers<=248
// budget: backward_kernel<float, 32, *> registers<=168
// budget: backward_kernel<float, 64, *> registers<=216
// budget: backward_kernel<float, 80, *> registers<=255
// budget: backward_kernel<float, 128, *> registers<=255
namespace kernelpose::cuda {

enum class Pass { kBoth, kQueries, kKeys, kPooledKeys };

template <class T>
struct BackwardArguments {
  Problem problem;
  Grid grid;
  Matrix<const T> query, out, grad_out;
  Keys<T> keys;
  Matrix<T> grad_query, grad_key, grad_value;
  Matrix<float> grad_pooled_key, grad_pooled_value;
  const float* bias;
  int bias_entries;  // in shared memory
  const float* lse;
  float* delta;
};

// Shared memory: the tiles of rows (one of each matrix), the ring of column tiles, a tile to stage
// dq if the rows are needed afterwards, then what belongs to each row that serves as a column (lse,
// delta, place in the bias table; of the row tiles first, then of the ring's), then bias tables.
template <class T, int D, Pass kPass>
struct BackwardShared {
  static constexpr int kRows = Tile<T>::kRows;
  static constexpr int kTile = kRows * kRowStride<T, D>;
  static constexpr int kColumns = kRows * (2 * sizeof(float) + sizeof(int));
  static constexpr int kStage = 2 * kTile * sizeof(T) + kColumns;

  T *rows, *ring, *staging;
  float *lse, *delta;
  int* places;
  float* bias;

  static constexpr int fixed(int bias_entries) {
    return (kPass == Pass::kBoth ? 3 : 2) * kTile * sizeof(T) + kColumns +
           2 * bias_entries * sizeof(float);
  }
  // A cell of one tile has a small table, at most 4 h w entries for h w tokens, unless the window
  // is larger than the map.
  static constexpr bool fits(int bias_entries) {
    return fixed(bias_entries) + kStage <= kSharedLimit;
  }
  static_assert(fits(kPass == Pass::kBoth ? 4 * kRows : kSharedBias));

  __device__ __forceinline__ BackwardShared(unsigned char* shared, int stages)
      : rows(reinterpret_cast<T*>(shared)),
        ring(rows + 2 * kTile),
        staging(kPass == Pass::kBoth ? ring + stages * 2 * kTile : rows),
        lse(reinterpret_cast<float*>(ring + stages * 2 * kTile +
                                     (kPass == Pass::kBoth ? kTile : 0))),
        delta(lse + (stages + 1) * kRows),
        places(reinterpret_cast<int*>(delta + (stages + 1) * kRows)),
        bias(reinterpret_cast<float*>(places + (stages + 1) * kRows)) {}
};

constexpr int kBackwardChunk = 16;  // columns of scores that a warp holds at a time

template <class T, int D, Pass kPass>
__device__ __forceinline__ void queries_pass(const BackwardArguments<T>& args,
                                             const BackwardShared<T, D, kPass>& shared,
                                             const Work<T>& work, const Tokens& tokens,
                                             const Bias& bias) {
  constexpr int kTile = BackwardShared<T, D, kPass>::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = kBackwardChunk;
  const Problem& problem = args.problem;
  const int lane = work.lane, slot_rows = work.slot_rows, tile_row = work.tile_row;
  const int count = tokens.count(), keys = count + problem.pools;
  const int width = problem.shape.head_dim;
  T* const own_rows = shared.rows + tile_row * kStride;

  const auto load = [&](int tile, int stage) {
    T* const target = shared.ring + stage * 2 * kTile + tile_row * kStride;
    const int i = tile * slot_rows + work.warp_row + (lane & 15);
    copy_rows<T, D, true>(target, target + kTile,
                          key_row(problem, args.keys, work.unit, tokens, count, i), lane, width,
                          problem.aligned);
    if (bias.table != nullptr && lane < 16) {
      shared.places[(stage + 1) * kRows + tile_row + lane] =
          i < count ? tokens.bias_place(i, problem.bias_columns) : 0;
    }
  };

  for (int row_tile = work.first_tile; row_tile < work.end_tile; ++row_tile) {
    const int first_row = row_tile * slot_rows + work.warp_row;
    const bool active = work.unit.exists && first_row < count;
    const bool later = row_tile > work.first_tile;
    copy_rows<T, D, true>(own_rows, own_rows + kTile,
                          token_row(problem, args.query, args.grad_out, work.unit, tokens, count,
                                    first_row + (lane & 15)),
                          lane, width, problem.aligned);
    cp_async_commit();

    // Two lanes a row sum dO * out and look up lse, then hand them to the lanes that need them.
    float delta = 0.f, lse2 = 0.f;
    const int row = first_row + lane / 2;
    const RowPair<T> pair =
        token_row(problem, args.grad_out, args.out, work.unit, tokens, count, row);
    int64_t statistic = 0;
    if (pair.exists) {
      statistic = statistic_of(problem, work.unit, tokens.at(row));
      lse2 = kLog2E * args.lse[statistic];
      delta = half_dot<T, D>(pair.a, pair.b, lane & 1, width, problem.aligned);
    }
    delta += __shfl_xor_sync(0xffffffffu, delta, 1);
    if ((lane & 1) == 0) {
      if (pair.exists) args.delta[statistic] = delta;
      if (kPass == Pass::kBoth) {  // the rows are the columns of the other pass
        shared.lse[tile_row + lane / 2] = lse2;
        shared.delta[tile_row + lane / 2] = delta;
        if (bias.table != nullptr) {
          shared.places[tile_row + lane / 2] =
              row < count ? tokens.bias_place(row, problem.bias_columns) : 0;
        }
      }
    }
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_lse[half] = __shfl_sync(0xffffffffu, lse2, 2 * (lane >> 2) + 16 * half);
      row_delta[half] = __shfl_sync(0xffffffffu, delta, 2 * (lane >> 2) + 16 * half);
    }
    int row_place[2];
    row_places(row_place, bias, tokens, first_row + (lane >> 2), count, problem.bias_columns);
    if (later) {
      cp_async_wait<0>();
      __syncwarp();
    }

    RowOperand<T, D, D <= 80> query, grad;
    float grad_query[D / 8][4] = {};
    const auto compute = [&](int tile, int stage) {
      if (!active) return;
      if (tile == 0) {
        query.load(own_rows, lane);
        grad.load(own_rows + kTile, lane);
      }
      const int left = keys - tile * slot_rows, end = min(left, slot_rows);
      const int slot_row = tile_row - work.warp_row;
      for (int c = 0; c < end; c += kChunk) {
        const T* const key_rows = shared.ring + stage * 2 * kTile + (slot_row + c) * kStride;
        float s[kChunk / 8][4], dp[kChunk / 8][4];
        multiply_transposed<kChunk>(s, query, key_rows, lane);
        multiply_transposed<kChunk>(dp, grad, key_rows + kTile, lane);
        to_scores<false, kChunk>(s, problem.scale, bias, problem.bias_centre, row_place,
                                 shared.places + (stage + 1) * kRows + slot_row + c,
                                 left - problem.pools - c, left - c, lane);
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[j][i] = exp2_approx(s[j][i] - row_lse[i >> 1]) * (dp[j][i] - row_delta[i >> 1]);
          }
        }
        add_product<D, kChunk>(grad_query, s, key_rows, lane);
      }
    };
    for_each_tile((keys + slot_rows - 1) / slot_rows, args.grid.stages, later, load, compute);
    if (!active) continue;
    const float factor[2] = {problem.scale, problem.scale};
    T* const to =
        target_row(problem, args.grad_query, work.unit, tokens, count, first_row + (lane & 15));
    store_rows<T, D>(grad_query, factor, shared.staging + tile_row * kStride, to, lane, width,
                     problem.aligned);
  }
}

// The gradient of pooled keys, two rows of `pools` a lane, in float32.
template <class T, int D>
__device__ __forceinline__ void store_pooled(const BackwardArguments<T>& args, const Unit& unit,
                                             const float (&grad_key)[D / 8][4],
                                             const float (&grad_value)[D / 8][4], int row,
                                             int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int pool = row + 8 * half;
    if (pool >= args.problem.pools) continue;
    const float share = 1.f / pool_tokens(args.problem.shape, pool);
    float* const to_key = row_of(args.problem, args.grad_pooled_key, unit, pool);
    float* const to_value = row_of(args.problem, args.grad_pooled_value, unit, pool);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * (lane & 3) + i;
        if (column >= args.problem.shape.head_dim) continue;
        to_key[column] = grad_key[j][2 * half + i] * share;
        to_value[column] = grad_value[j][2 * half + i] * share;
      }
    }
  }
}

template <int D>
__device__ __forceinline__ void add_pooled(float (&gradient)[D / 8][4], const float* pooled,
                                           int width, int lane) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * j + 2 * (lane & 3) + (i & 1);
      if (column < width) gradient[j][i] += pooled[column];
    }
  }
}

template <class T, int D, Pass kPass>
__device__ __forceinline__ void keys_pass(const BackwardArguments<T>& args,
                                          const BackwardShared<T, D, kPass>& shared,
                                          const Work<T>& work, const Tokens& tokens,
                                          const Bias& bias) {
  constexpr int kTile = BackwardShared<T, D, kPass>::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = kBackwardChunk;
  constexpr bool kPooled = kPass == Pass::kPooledKeys;
  const Problem& problem = args.problem;
  const int lane = work.lane, slot_rows = work.slot_rows, tile_row = work.tile_row;
  const int count = tokens.count(), rows = kPooled ? problem.pools : count;
  const int width = problem.shape.head_dim;
  T* const own_rows = shared.rows + tile_row * kStride;

  const auto load = [&](int tile, int stage) {
    T* const target = shared.ring + stage * 2 * kTile + tile_row * kStride;
    const int i = tile * slot_rows + work.warp_row + (lane & 15);
    const RowPair<T> pair =
        token_row(problem, args.query, args.grad_out, work.unit, tokens, count, i);
    copy_rows<T, D, true>(target, target + kTile, pair, lane, width, problem.aligned);
    if (lane < 16) {
      const int at = (stage + 1) * kRows + tile_row + lane;
      const int64_t statistic = pair.exists ? statistic_of(problem, work.unit, tokens.at(i)) : 0;
      shared.lse[at] = pair.exists ? kLog2E * args.lse[statistic] : 0.f;
      shared.delta[at] = pair.exists ? args.delta[statistic] : 0.f;
      if (bias.table != nullptr) {
        shared.places[at] = pair.exists ? tokens.bias_place(i, problem.bias_columns) : 0;
      }
    }
  };

  for (int row_tile = work.first_tile; row_tile < work.end_tile; ++row_tile) {
    const int first_row = row_tile * slot_rows + work.warp_row;
    const bool active = work.unit.exists && first_row < rows;
    const bool later = row_tile > work.first_tile;
    const T* key_rows = own_rows;
    if (kPass == Pass::kBoth) {
      key_rows = shared.ring + tile_row * kStride;
    } else {
      const int i = first_row + (lane & 15);
      copy_rows<T, D, true>(
          own_rows, own_rows + kTile,
          kPooled ? key_row(problem, args.keys, work.unit, tokens, 0, i)
                  : token_row(problem, args.keys.key, args.keys.value, work.unit, tokens, count, i),
          lane, width, problem.aligned);
      cp_async_commit();
      if (later) {
        cp_async_wait<0>();
        __syncwarp();
      }
    }
    int row_place[2];
    row_places(row_place, bias, tokens, first_row + (lane >> 2), count, problem.bias_columns);

    RowOperand<T, D, D <= 64> key, value;
    float grad_key[D / 8][4] = {}, grad_value[D / 8][4] = {};
    const auto compute = [&](int tile, int stage) {
      if (!active) return;
      if (tile == 0) {
        key.load(key_rows, lane);
        value.load(key_rows + kTile, lane);
      }
      const T* const columns = kPass == Pass::kBoth ? shared.rows : shared.ring + stage * 2 * kTile;
      const int first_column = kPass == Pass::kBoth ? 0 : (stage + 1) * kRows;
      const int left = count - tile * slot_rows, end = min(left, slot_rows);
      const int slot_row = tile_row - work.warp_row;
      for (int c = 0; c < end; c += kChunk) {
        const T* const query_rows = columns + (slot_row + c) * kStride;
        const int column = first_column + slot_row + c;
        float s[kChunk / 8][4], dp[kChunk / 8][4];
        multiply_transposed<kChunk>(s, key, query_rows, lane);
        multiply_transposed<kChunk>(dp, value, query_rows + kTile, lane);
        to_scores<true, kChunk>(s, problem.scale, bias, problem.bias_centre, row_place,
                                shared.places + column, left - c, left - c, lane);
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
          const int at = column + 8 * j + 2 * (lane & 3);
          const float2 lse2 = *reinterpret_cast<const float2*>(shared.lse + at);
          const float2 delta = *reinterpret_cast<const float2*>(shared.delta + at);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[j][i] = exp2_approx(s[j][i] - ((i & 1) ? lse2.y : lse2.x));
            dp[j][i] = s[j][i] * (dp[j][i] - ((i & 1) ? delta.y : delta.x));
          }
        }
        add_product<D, kChunk>(grad_value, s, query_rows + kTile, lane);
        add_product<D, kChunk>(grad_key, dp, query_rows, lane);
      }
    };
    if constexpr (kPass == Pass::kBoth) {
      compute(0, 0);
    } else {
      for_each_tile((count + slot_rows - 1) / slot_rows, args.grid.stages, later, load, compute);
    }
    if (!active) continue;

#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_key[j][i] *= problem.scale;
    }
    if constexpr (kPooled) {
      store_pooled<T, D>(args, work.unit, grad_key, grad_value, first_row + (lane >> 2), lane);
    } else {
      if (kPass == Pass::kKeys && problem.pools != 0) {
        const int pool = pool_of(problem, work.cell);
        add_pooled<D>(grad_key, row_of(problem, args.grad_pooled_key, work.unit, pool), width,
                      lane);
        add_pooled<D>(grad_value, row_of(problem, args.grad_pooled_value, work.unit, pool), width,
                      lane);
      }
      const float one[2] = {1.f, 1.f};
      const int i = first_row + (lane & 15);
      T* const staging = shared.staging + tile_row * kStride;
      T* const to_key = target_row(problem, args.grad_key, work.unit, tokens, count, i);
      store_rows<T, D>(grad_key, one, staging, to_key, lane, width, problem.aligned);
      T* const to_value = target_row(problem, args.grad_value, work.unit, tokens, count, i);
      store_rows<T, D>(grad_value, one, staging, to_value, lane, width, problem.aligned);
    }
  }
}

// Blocks of 4 warps a multiprocessor that a kernel gets registers for. Three with a ring need 228
// KB of shared memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kRingBlocks = 2;
#else
constexpr int kRingBlocks = 3;
#endif

template <class T, int D, Pass kPass>
constexpr int backward_blocks() {
  if (D <= 32) return 3;
  if (kPass == Pass::kQueries) return D <= (sizeof(T) == 2 ? 80 : 64) ? 3 : 2;
  if (kPass == Pass::kBoth) return D <= 64 ? 3 : 2;
  return D <= 64 && sizeof(T) == 2 ? kRingBlocks : 2;
}

template <class T, int D, Pass kPass>
__global__ void __launch_bounds__(Tile<T>::kThreads,
                                  resident_blocks<T>(backward_blocks<T, D, kPass>()))
    backward_kernel(const BackwardArguments<T> args) {
  constexpr bool kPooled = kPass == Pass::kPooledKeys;
  KP_DYNAMIC_SHARED(unsigned char, memory);
  const BackwardShared<T, D, kPass> shared(memory, args.grid.stages);
  const Problem& problem = args.problem;
  Work<T> work(args.grid);
  const Axis &rows = problem.shape.rows, &columns = problem.shape.columns;
  const Tokens tokens = kPooled ? Tokens({0, 1, rows.size}, {0, 1, columns.size}, columns.size)
                                : tokens_of(problem, work.cell);
  work.cut(problem, args.grid, kPooled ? problem.pools : tokens.count());
  if (work.first_tile >= work.end_tile) return;
  const Bias bias =
      load_bias(kPooled ? nullptr : args.bias, args.bias_entries, shared.bias, problem, work);
  if (kPass == Pass::kBoth || kPass == Pass::kQueries) {
    queries_pass(args, shared, work, tokens, bias);
  }
  // What the keys' pass reads of other warps was there at the queries' pass's first barrier.
  if (kPass != Pass::kQueries) keys_pass(args, shared, work, tokens, bias);
}

template <class T, int D, Pass kPass>
cudaError_t launch_pass(BackwardArguments<T> args, cudaStream_t stream) {
  using Shared = BackwardShared<T, D, kPass>;
  const WindowAttentionShape& shape = args.problem.shape;
  constexpr bool kPooled = kPass == Pass::kPooledKeys;
  const int cell = largest_cell(shape), pools = args.problem.pools;
  const int columns = kPooled ? args.problem.tokens : kPass == Pass::kQueries ? cell + pools : cell;
  if (!Shared::fits(args.bias_entries)) args.bias_entries = 0;  // read in place
  const int fixed = Shared::fixed(args.bias_entries);
  args.grid = make_grid<T>(shape, kPooled ? 1 : shape.cells(), kPooled ? pools : cell, columns,
                           Shared::kStage, fixed);
  return launch_blocks(backward_kernel<T, D, kPass>, args.grid.blocks, Tile<T>::kThreads,
                       fixed + args.grid.stages * Shared::kStage, stream, args);
}

}  // namespace kernelpose::cuda
