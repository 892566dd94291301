// Backward: probabilities are computed again from lse, nothing is summed by atomics.
//
//   queries' pass   rows q, dO    columns k, v (and the pooled ones)
//                   P = exp(q k^T - lse)   dS = P (dO v^T - delta)   dq = scale * dS k
//   keys' pass      rows k, v     columns q, dO, lse, delta
//                   P^T, dS^T likewise     dv = P^T dO               dk = scale * dS^T q
//
// delta = rowsum(dO * out) is found by the queries' pass. Cells of at most one tile take both passes
// in one launch, for which the tile of the first pass's rows becomes the second's column, and q, k,
// v, dO are read once; others take a launch each. Pooled keys are the rows of a launch whose columns
// are all tokens of the map; it leaves their gradient, divided by the pool's tokens, in the
// workspace, from where the keys' pass adds it to every token's.
//
// Floor: q, k, v, dO, out read and dq, dk, dv written once, 8 * batch * tokens * C * sizeof(T)
// bytes (launched apart, 12); 10 * D FLOP for each pair of tokens that meet, 14 as done here, since
// each pass has its own q k^T and dO v^T. Shared memory: (2 + 2 * stages) * kRows * (D + 16 bytes),
// one tile more to stage dq where both passes share a launch, 12 * kRows bytes a stage, bias table.
#include "window_attention.h"
#include "window_attention_bias_gradient.cuh"
#include "window_attention_dispatch.cuh"
#include "window_attention_pool.cuh"

namespace kernelpose::cuda {
namespace {

enum class Pass { kBoth, kQueries, kKeys, kPooledKeys };

template <class T>
struct BackwardArguments {
  WindowAttentionShape shape;
  float scale;
  Grid grid;
  Matrix<const T> query, key, value, pooled_key, pooled_value, out, grad_out;
  Matrix<T> grad_query, grad_key, grad_value;
  Matrix<float> grad_pooled_key, grad_pooled_value;
  const float* bias;
  int bias_entries;  // in shared memory
  const float* lse;
  float* delta;
  bool aligned;
};

template <class T, int D>
struct BackwardShared {
  static constexpr int kTile = Tile<T>::kRows * kRowStride<T, D>;
  static constexpr int kColumn = Tile<T>::kRows * (2 * sizeof(float) + sizeof(int));
  static constexpr int kStage = 2 * kTile * sizeof(T) + kColumn;

  static int64_t fixed(Pass pass, int bias_entries) {
    return (pass == Pass::kBoth ? 3 : 2) * kTile * sizeof(T) + kColumn +
           int64_t{2} * bias_entries * sizeof(float);
  }
};

template <class T, int D, Pass kPass>
__global__ void __launch_bounds__(Tile<T>::kThreads)
    backward_kernel(const BackwardArguments<T> args) {
  constexpr int kTile = BackwardShared<T, D>::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = Tile<T>::kChunk;
  constexpr bool kHeld = D <= 80;  // else registers run out
  constexpr bool kQueries = kPass == Pass::kBoth || kPass == Pass::kQueries;
  constexpr bool kKeys = kPass != Pass::kQueries;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  // The tiles of rows (one of each matrix), the ring of column tiles, a tile to stage dq, and what
  // belongs to each row that serves as a column: of the row tiles first, then of the ring's.
  T* const row_tiles = reinterpret_cast<T*>(shared);
  T* const ring = row_tiles + 2 * kTile;
  T* const staging_tile = ring + args.grid.stages * 2 * kTile;
  float* const column_lse =
      reinterpret_cast<float*>(staging_tile + (kPass == Pass::kBoth ? kTile : 0));
  float* const column_delta = column_lse + (args.grid.stages + 1) * kRows;
  int* const places = reinterpret_cast<int*>(column_delta + (args.grid.stages + 1) * kRows);
  float* const bias_rows = reinterpret_cast<float*>(places + (args.grid.stages + 1) * kRows);

  const WindowAttentionShape& shape = args.shape;
  Block<T> block(shape, args.grid);
  const int cell_y = block.cell / shape.columns.cells(), cell_x = block.cell % shape.columns.cells();
  const bool pooled_rows = kPass == Pass::kPooledKeys;
  const Tokens tokens = pooled_rows ? Tokens({0, 1, shape.rows.size}, {0, 1, shape.columns.size},
                                             shape.columns.size)
                                    : Tokens(shape.rows.cell(cell_y), shape.columns.cell(cell_x),
                                             shape.columns.size);
  const int count = tokens.count();
  const int rows = pooled_rows ? shape.pools() : count;
  block.cut(rows);
  if (block.first_tile >= block.end_tile) return;

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int slot = warp * 16 / block.slot_rows;
  const int warp_row = warp * 16 % block.slot_rows;  // in the slot
  const Unit unit = block.unit(slot);
  const int width = shape.head_dim, bias_columns = shape.bias_columns();
  const int centre = (shape.rows.extent() - 1) * bias_columns + shape.columns.extent() - 1;
  const Bias bias = load_bias(pooled_rows ? nullptr : args.bias, args.bias_entries, bias_rows,
                              block, slot);
  T* const own_rows = row_tiles + warp * 16 * kStride;  // of the first matrix; + kTile the second
  T* const staging = kPass == Pass::kBoth ? staging_tile + warp * 16 * kStride : own_rows;
  const auto statistic = [&](const Unit& of, int64_t token) {  // index into lse and delta
    return (of.image * shape.heads + of.head) * shape.tokens() + token;
  };
  const auto row_places = [&](int first_row, int(&place)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + (lane >> 2) + 8 * half;
      place[half] = bias.table == nullptr
                        ? 0
                        : tokens.bias_place(row < count ? row : count - 1, bias_columns);
    }
  };

  if constexpr (kQueries) {
    const int keys = count + shape.pools();
    const auto load_keys = [&](int tile, int stage) {
      T* const target = ring + stage * 2 * kTile;
      const int first = tile * block.slot_rows;
      const auto source = [&](int row, const T*& key, const T*& value) {
        const int in_slot = row >= block.slot_rows;
        const int i = first + row - in_slot * block.slot_rows;
        const Unit of = block.unit(in_slot);
        key = args.key.data;
        value = args.value.data;
        if (i >= keys || !of.exists) return false;
        const bool own = i < count;
        const int64_t at = own ? tokens.at(i) : i - count;
        key = row_of(own ? args.key : args.pooled_key, of, at, width);
        value = row_of(own ? args.value : args.pooled_value, of, at, width);
        return true;
      };
      copy_rows<T, D>(target, target + kTile, kRows, threadIdx.x, Tile<T>::kThreads, width,
                      args.aligned, source);
      if (bias.table != nullptr && threadIdx.x < kRows) {
        const int i = first + threadIdx.x % block.slot_rows;
        places[(stage + 1) * kRows + threadIdx.x] =
            i < count ? tokens.bias_place(i, bias_columns) : 0;
      }
    };

    for (int q_tile = block.first_tile; q_tile < block.end_tile; ++q_tile) {
      const int first_row = q_tile * block.slot_rows + warp_row;
      const bool active = unit.exists && first_row < count;
      const bool later = q_tile > block.first_tile;
      const auto source = [&](int row, const T*& query, const T*& grad) {
        query = args.query.data;
        grad = args.grad_out.data;
        if (!unit.exists || first_row + row >= count) return false;
        const int64_t token = tokens.at(first_row + row);
        query = row_of(args.query, unit, token, width);
        grad = row_of(args.grad_out, unit, token, width);
        return true;
      };
      copy_rows<T, D>(own_rows, own_rows + kTile, 16, lane, 32, width, args.aligned, source);
      cp_async_commit();

      // Two lanes a row sum dO * out and look up lse, then hand them to the lanes that need them.
      float delta = 0.f, lse2 = 0.f;
      if (const int row = first_row + lane / 2; unit.exists && row < count) {
        const int64_t token = tokens.at(row);
        const T* const grad = row_of(args.grad_out, unit, token, width);
        const T* const out = row_of(args.out, unit, token, width);
        delta = half_dot<T, D>(grad, out, lane & 1, width, args.aligned);
        lse2 = kLog2E * args.lse[statistic(unit, token)];
      }
      delta += __shfl_xor_sync(0xffffffffu, delta, 1);
      if ((lane & 1) == 0) {
        const int row = first_row + lane / 2;
        if (unit.exists && row < count) args.delta[statistic(unit, tokens.at(row))] = delta;
        if (kPass == Pass::kBoth) {  // the rows are the columns of the other pass
          column_lse[warp * 16 + lane / 2] = lse2;
          column_delta[warp * 16 + lane / 2] = delta;
          if (bias.table != nullptr) {
            places[warp * 16 + lane / 2] = row < count ? tokens.bias_place(row, bias_columns) : 0;
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
      row_places(first_row, row_place);
      if (later) {
        cp_async_wait<0>();
        __syncwarp();
      }

      RowOperand<T, D, kHeld> query, grad;
      float grad_query[D / 8][4] = {};
      for_each_tile((keys + block.slot_rows - 1) / block.slot_rows, args.grid.stages, later,
                    load_keys, [&](int tile, int stage) {
        if (!active) return;
        if (tile == 0) {
          query.load(own_rows, lane);
          grad.load(own_rows + kTile, lane);
        }
        const int first = tile * block.slot_rows;
        for (int c = 0; c < block.slot_rows && first + c < keys; c += kChunk) {
          const int column = slot * block.slot_rows + c;
          const T* const key_rows = ring + stage * 2 * kTile + column * kStride;
          float s[kChunk / 8][4], dp[kChunk / 8][4];
          multiply_transposed<kChunk>(s, query, key_rows, lane);
          multiply_transposed<kChunk>(dp, grad, key_rows + kTile, lane);
          to_scores<false, kChunk>(s, args.scale, bias, centre, row_place,
                                   places + (stage + 1) * kRows + column, count - first - c,
                                   keys - first - c, lane);
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              s[j][i] = exp2_approx(s[j][i] - row_lse[i >> 1]) * (dp[j][i] - row_delta[i >> 1]);
            }
          }
          add_product<D, kChunk>(grad_query, s, key_rows, lane);
        }
      });
      if (!active) continue;
      const float factor[2] = {args.scale, args.scale};
      store_rows<T, D>(grad_query, factor, staging, lane, width, args.aligned,
                       [&](int row, T*& to) {
        if (first_row + row >= count) return false;
        to = row_of(args.grad_query, unit, tokens.at(first_row + row), width);
        return true;
      });
    }
  }

  if constexpr (kKeys) {
    const auto load_queries = [&](int tile, int stage) {
      T* const target = ring + stage * 2 * kTile;
      const int first = tile * block.slot_rows;
      const auto source = [&](int row, const T*& query, const T*& grad) {
        const int in_slot = row >= block.slot_rows;
        const int i = first + row - in_slot * block.slot_rows;
        const Unit of = block.unit(in_slot);
        query = args.query.data;
        grad = args.grad_out.data;
        if (i >= count || !of.exists) return false;
        const int64_t token = tokens.at(i);
        query = row_of(args.query, of, token, width);
        grad = row_of(args.grad_out, of, token, width);
        return true;
      };
      copy_rows<T, D>(target, target + kTile, kRows, threadIdx.x, Tile<T>::kThreads, width,
                      args.aligned, source);
      if (threadIdx.x < kRows) {
        const int in_slot = threadIdx.x >= block.slot_rows;
        const int i = first + threadIdx.x - in_slot * block.slot_rows;
        const Unit of = block.unit(in_slot);
        const bool exists = i < count && of.exists;
        const int64_t index = exists ? statistic(of, tokens.at(i)) : 0;
        const int at = (stage + 1) * kRows + threadIdx.x;
        column_lse[at] = exists ? kLog2E * args.lse[index] : 0.f;
        column_delta[at] = exists ? args.delta[index] : 0.f;
        if (bias.table != nullptr) places[at] = exists ? tokens.bias_place(i, bias_columns) : 0;
      }
    };

    if (kPass == Pass::kBoth) __syncthreads();  // row tiles and their statistics turn columns
    for (int k_tile = block.first_tile; k_tile < block.end_tile; ++k_tile) {
      const int first_row = k_tile * block.slot_rows + warp_row;
      const bool active = unit.exists && first_row < rows;
      const bool later = k_tile > block.first_tile;
      T* const key_rows = kPass == Pass::kBoth ? ring + warp * 16 * kStride : own_rows;
      if (kPass != Pass::kBoth) {
        const auto source = [&](int row, const T*& key, const T*& value) {
          key = args.key.data;
          value = args.value.data;
          if (!unit.exists || first_row + row >= rows) return false;
          const int64_t at = pooled_rows ? first_row + row : tokens.at(first_row + row);
          key = row_of(pooled_rows ? args.pooled_key : args.key, unit, at, width);
          value = row_of(pooled_rows ? args.pooled_value : args.value, unit, at, width);
          return true;
        };
        copy_rows<T, D>(own_rows, own_rows + kTile, 16, lane, 32, width, args.aligned, source);
        cp_async_commit();
        if (later) {
          cp_async_wait<0>();
          __syncwarp();
        }
      }
      int row_place[2];
      row_places(first_row, row_place);

      RowOperand<T, D, kHeld> key, value;
      float grad_key[D / 8][4] = {}, grad_value[D / 8][4] = {};
      const auto compute = [&](int tile, int stage) {
        if (!active) return;
        if (tile == 0) {
          key.load(key_rows, lane);
          value.load(key_rows + kTile, lane);
        }
        const int first = tile * block.slot_rows;
        const T* const columns = kPass == Pass::kBoth ? row_tiles : ring + stage * 2 * kTile;
        const int statistics = kPass == Pass::kBoth ? 0 : (stage + 1) * kRows;
        for (int c = 0; c < block.slot_rows && first + c < count; c += kChunk) {
          const int column = slot * block.slot_rows + c;
          const T* const query_rows = columns + column * kStride;
          float s[kChunk / 8][4], dp[kChunk / 8][4];
          multiply_transposed<kChunk>(s, key, query_rows, lane);
          multiply_transposed<kChunk>(dp, value, query_rows + kTile, lane);
          to_scores<true, kChunk>(s, args.scale, bias, centre, row_place,
                                  places + statistics + column, count - first - c,
                                  count - first - c, lane);
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
            const int at = statistics + column + 8 * j + 2 * (lane & 3);
            const float2 lse2 = *reinterpret_cast<const float2*>(column_lse + at);
            const float2 delta = *reinterpret_cast<const float2*>(column_delta + at);
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
        for_each_tile((count + block.slot_rows - 1) / block.slot_rows, args.grid.stages, later,
                      load_queries, compute);
      }
      if (!active) continue;

      if constexpr (kPass == Pass::kPooledKeys) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pool = first_row + (lane >> 2) + 8 * half;
          if (pool >= rows) continue;
          const float share = 1.f / pool_tokens(shape, pool);
          float* const to_key = row_of(args.grad_pooled_key, unit, pool, width);
          float* const to_value = row_of(args.grad_pooled_value, unit, pool, width);
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int column = 8 * j + 2 * (lane & 3) + i;
              if (column >= width) continue;
              to_key[column] = grad_key[j][2 * half + i] * args.scale * share;
              to_value[column] = grad_value[j][2 * half + i] * share;
            }
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) grad_key[j][i] *= args.scale;
        }
        if (kPass == Pass::kKeys && shape.pooled) {
          const int pool =
              shape.rows.pool(cell_y) * shape.columns.pools() + shape.columns.pool(cell_x);
          const float* const from_key = row_of(args.grad_pooled_key, unit, pool, width);
          const float* const from_value = row_of(args.grad_pooled_value, unit, pool, width);
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int column = 8 * j + 2 * (lane & 3) + (i & 1);
              if (column >= width) continue;
              grad_key[j][i] += from_key[column];
              grad_value[j][i] += from_value[column];
            }
          }
        }
        const auto store = [&](const float(&gradient)[D / 8][4], const Matrix<T>& matrix) {
          store_rows<T, D>(gradient, {1.f, 1.f}, staging, lane, width, args.aligned,
                           [&](int row, T*& to) {
            if (first_row + row >= count) return false;
            to = row_of(matrix, unit, tokens.at(first_row + row), width);
            return true;
          });
        };
        store(grad_key, args.grad_key);
        store(grad_value, args.grad_value);
      }
    }
  }
}

template <class T, int D, Pass kPass>
cudaError_t launch_pass(BackwardArguments<T> args, cudaStream_t stream) {
  using Shared = BackwardShared<T, D>;
  const WindowAttentionShape& shape = args.shape;
  constexpr bool kPooled = kPass == Pass::kPooledKeys;
  const int cell = largest_cell(shape);
  const int rows = kPooled ? shape.pools() : cell;
  const int columns = kPooled                   ? static_cast<int>(shape.tokens())
                      : kPass == Pass::kQueries ? cell + shape.pools()
                                                : cell;
  const int slot_rows = rows <= Tile<T>::kRows / 2 ? Tile<T>::kRows / 2 : Tile<T>::kRows;
  const int tiles = ceil_div(columns, slot_rows);
  const int64_t fixed = Shared::fixed(kPass, args.bias_entries);
  const int stages = ring_stages(tiles, Shared::kStage, fixed);
  args.grid = make_grid<T>(shape, kPooled ? 1 : shape.cells(), rows, tiles <= stages, stages);
  if (args.grid.blocks > kMaxBlocks) return cudaErrorInvalidValue;
  return launch(backward_kernel<T, D, kPass>, grid_dim(args.grid.blocks),
                dim3(Tile<T>::kThreads), fixed + stages * Shared::kStage, stream, args);
}

// What the workspace holds, each from a multiple of 256 bytes on.
struct BackwardWorkspace {
  int64_t delta, means, grad_means, bias_parts, bytes;  // offsets, and the sum

  BackwardWorkspace(const WindowAttentionShape& shape, int element_size, bool bias_gradient) {
    const int tile_rows = element_size == 4 ? Tile<float>::kRows : Tile<__half>::kRows;
    int64_t end = 0;
    const auto take = [&end](int64_t size) {
      const int64_t offset = end;
      end += (size + 255) / 256 * 256;
      return offset;
    };
    delta = take(shape.batch * shape.heads * shape.tokens() * sizeof(float));
    means = take(pool_means_elements(shape) * element_size);
    grad_means = take(pool_means_elements(shape) * sizeof(float));
    bias_parts = take(bias_gradient ? BiasParts(shape, tile_rows).elements() * sizeof(float) : 0);
    bytes = end;
  }
};

template <class T, int D>
cudaError_t launch_backward(const void* grad_out, const void* qkv, const float* bias,
                            const void* out, const float* lse, void* grad_qkv, float* grad_bias,
                            void* workspace, const WindowAttentionShape& shape,
                            cudaStream_t stream) {
  const BackwardWorkspace layout(shape, sizeof(T), grad_bias != nullptr);
  const auto in_workspace = [workspace](int64_t offset) {
    return static_cast<void*>(static_cast<char*>(workspace) + offset);
  };
  BackwardArguments<T> args = {};
  args.shape = shape;
  args.scale = static_cast<float>(shape.scale);
  args.aligned = rows_aligned<T>(shape, {grad_out, qkv, out, grad_qkv, workspace});
  const PackedQkv<const T> packed(static_cast<const T*>(qkv), shape);
  args.query = packed.query;
  args.key = packed.key;
  args.value = packed.value;
  const PackedQkv<T> gradients(static_cast<T*>(grad_qkv), shape);
  args.grad_query = gradients.query;
  args.grad_key = gradients.key;
  args.grad_value = gradients.value;
  args.out = token_matrix(static_cast<const T*>(out), shape);
  args.grad_out = token_matrix(static_cast<const T*>(grad_out), shape);
  T* const means = static_cast<T*>(in_workspace(layout.means));
  args.pooled_key = pooled_matrix<const T>(means, 0, shape);
  args.pooled_value = pooled_matrix<const T>(means, 1, shape);
  float* const grad_means = static_cast<float*>(in_workspace(layout.grad_means));
  args.grad_pooled_key = pooled_matrix(grad_means, 0, shape);
  args.grad_pooled_value = pooled_matrix(grad_means, 1, shape);
  args.bias = bias;
  args.bias_entries = shared_bias(shape, bias);
  args.lse = lse;
  args.delta = static_cast<float*>(in_workspace(layout.delta));

  cudaError_t error = cudaSuccess;
  const auto step = [&error](auto enqueue) {
    if (error == cudaSuccess) error = enqueue();
  };
  if (!shape.pooled && largest_cell(shape) <= Tile<T>::kRows) {
    step([&] { return launch_pass<T, D, Pass::kBoth>(args, stream); });
  } else {
    if (shape.pooled) {
      step([&] {
        return launch_pool_means(static_cast<const T*>(qkv), means, shape, args.aligned, stream);
      });
    }
    step([&] { return launch_pass<T, D, Pass::kQueries>(args, stream); });
    if (shape.pooled) {
      step([&] { return launch_pass<T, D, Pass::kPooledKeys>(args, stream); });
    }
    step([&] { return launch_pass<T, D, Pass::kKeys>(args, stream); });
  }
  if (grad_bias != nullptr) {
    BiasGradientArguments<T> bias_args = {};
    bias_args.shape = shape;
    bias_args.scale = args.scale;
    bias_args.query = args.query;
    bias_args.key = args.key;
    bias_args.value = args.value;
    bias_args.grad_out = args.grad_out;
    bias_args.bias = bias;
    bias_args.lse = lse;
    bias_args.delta = args.delta;
    bias_args.parts = static_cast<float*>(in_workspace(layout.bias_parts));
    bias_args.aligned = args.aligned;
    step([&] { return launch_bias_gradient<T, D>(bias_args, grad_bias, stream); });
  }
  return error;
}

}  // namespace

int64_t window_attention_backward_workspace(const WindowAttentionShape& shape, DType dtype,
                                            bool bias_gradient) {
  return BackwardWorkspace(shape, element_size(dtype), bias_gradient).bytes;
}

cudaError_t window_attention_backward(const void* grad_out, const void* qkv, const float* bias,
                                      const void* out, const float* lse, void* grad_qkv,
                                      float* grad_bias, void* workspace,
                                      const WindowAttentionShape& shape, DType dtype,
                                      cudaStream_t stream) {
  if (shape.batch == 0) {  // the gradient of a sum over nothing
    if (grad_bias == nullptr) return cudaSuccess;
    const int64_t entries = int64_t{1} * shape.bias_rows() * shape.bias_columns() * shape.heads;
    return cudaMemsetAsync(grad_bias, 0, entries * sizeof(float), stream);
  }
  return dispatch(dtype, shape.head_dim, [&](auto type, auto width) {
    return launch_backward<decltype(type), decltype(width)::value>(
        grad_out, qkv, bias, out, lse, grad_qkv, grad_bias, workspace, shape, stream);
  });
}

}  // namespace kernelpose::cuda
