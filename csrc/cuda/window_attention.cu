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
// budget: forward_kernel<half,32> registers<=128
// budget: forward_kernel<half,64> registers<=128
// budget: forward_kernel<half,80> registers<=168
// budget: forward_kernel<half,128> registers<=200
// budget: forward_kernel<float,32> registers<=128
// budget: forward_kernel<float,64> registers<=168
// budget: forward_kernel<float,80> registers<=168
// budget: forward_kernel<float,128> registers<=200
#include "window_attention.h"

#include "window_attention_dispatch.cuh"
#include "window_attention_pool.cuh"

namespace kernelpose::cuda {
namespace {

template <class T>
struct ForwardArguments {
  WindowAttentionShape shape;
  float scale;
  Grid grid;
  Matrix<const T> query, key, value, pooled_key, pooled_value;
  Matrix<T> out;
  const float* bias;
  int bias_entries;  // in shared memory
  float* lse;
  bool aligned;
};

template <class T, int D>
struct ForwardShared {
  static constexpr int kTile = Tile<T>::kRows * kRowStride<T, D>;
  static constexpr int kStage = 2 * kTile * sizeof(T) + Tile<T>::kRows * sizeof(int);

  static int64_t fixed(int bias_entries) {
    return kTile * sizeof(T) + int64_t{2} * bias_entries * sizeof(float);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads)
    forward_kernel(const ForwardArguments<T> args) {
  constexpr int kTile = ForwardShared<T, D>::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = Tile<T>::kChunk;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  T* const query_rows = reinterpret_cast<T*>(shared);
  T* const ring = query_rows + kTile;  // stages x (keys, values)
  int* const places = reinterpret_cast<int*>(ring + args.grid.stages * 2 * kTile);
  float* const bias_rows = reinterpret_cast<float*>(places + args.grid.stages * kRows);

  const WindowAttentionShape& shape = args.shape;
  Block<T> block(shape, args.grid);
  const int cell_columns = shape.columns.cells();
  const Tokens tokens(shape.rows.cell(block.cell / cell_columns),
                      shape.columns.cell(block.cell % cell_columns), shape.columns.size);
  const int count = tokens.count(), keys = count + shape.pools();
  block.cut(count);
  if (block.first_tile >= block.end_tile) return;

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int slot = warp * 16 / block.slot_rows;
  const int warp_row = warp * 16 % block.slot_rows;  // in the slot
  const Unit unit = block.unit(slot);
  const int width = shape.head_dim, bias_columns = shape.bias_columns();
  const int centre = (shape.rows.extent() - 1) * bias_columns + shape.columns.extent() - 1;
  const Bias bias = load_bias(args.bias, args.bias_entries, bias_rows, block, slot);
  T* const own_rows = query_rows + warp * 16 * kStride;

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
      places[stage * kRows + threadIdx.x] = i < count ? tokens.bias_place(i, bias_columns) : 0;
    }
  };

  for (int q_tile = block.first_tile; q_tile < block.end_tile; ++q_tile) {
    const int first_row = q_tile * block.slot_rows + warp_row;
    const bool active = unit.exists && first_row < count;
    const bool later = q_tile > block.first_tile;  // keys and values are there already
    const auto source = [&](int row, const T*& query, const T*& none) {
      query = none = args.query.data;
      if (!unit.exists || first_row + row >= count) return false;
      query = row_of(args.query, unit, tokens.at(first_row + row), width);
      return true;
    };
    copy_rows<T, D>(own_rows, static_cast<T*>(nullptr), 16, lane, 32, width, args.aligned, source);
    cp_async_commit();
    if (later) {
      cp_async_wait<0>();
      __syncwarp();
    }

    RowOperand<T, D, true> query;
    int row_place[2] = {};
    if (bias.table != nullptr) {
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + (lane >> 2) + 8 * half;
        row_place[half] = tokens.bias_place(row < count ? row : count - 1, bias_columns);
      }
    }
    float o[D / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // sum: of this lane's columns

    for_each_tile((keys + block.slot_rows - 1) / block.slot_rows, args.grid.stages, later,
                  load_keys, [&](int tile, int stage) {
      if (!active) return;
      if (tile == 0) query.load(own_rows, lane);
      const int first = tile * block.slot_rows;
      for (int c = 0; c < block.slot_rows && first + c < keys; c += kChunk) {
        const int column = slot * block.slot_rows + c;
        const T* const key_rows = ring + stage * 2 * kTile + column * kStride;
        float s[kChunk / 8][4];
        multiply_transposed<kChunk>(s, query, key_rows, lane);
        to_scores<false, kChunk>(s, args.scale, bias, centre, row_place,
                                 places + stage * kRows + column, count - first - c,
                                 keys - first - c, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = maximum[half];
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
            top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
          }
          top = row_max(top);
          const float rescale = exp2_approx(maximum[half] - top);
          maximum[half] = top;
          sum[half] *= rescale;
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
            o[j][2 * half] *= rescale;
            o[j][2 * half + 1] *= rescale;
          }
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              s[j][i] = exp2_approx(s[j][i] - top);
              sum[half] += s[j][i];
            }
          }
        }
        add_product<D, kChunk>(o, s, key_rows + kTile, lane);
      }
    });
    if (!active) continue;

    float factor[2];
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(sum[half]);
      factor[half] = 1.f / total;
      const int row = first_row + (lane >> 2) + 8 * half;
      if ((lane & 3) == 0 && row < count) {
        args.lse[(unit.image * shape.heads + unit.head) * shape.tokens() + tokens.at(row)] =
            kLn2 * maximum[half] + logf(total);
      }
    }
    store_rows<T, D>(o, factor, own_rows, lane, width, args.aligned, [&](int row, T*& to) {
      if (first_row + row >= count) return false;
      to = row_of(args.out, unit, tokens.at(first_row + row), width);
      return true;
    });
  }
}

template <class T, int D>
cudaError_t launch_forward(const void* qkv, const float* bias, void* out, float* lse,
                           void* workspace, const WindowAttentionShape& shape,
                           cudaStream_t stream) {
  using Shared = ForwardShared<T, D>;
  ForwardArguments<T> args = {};
  args.shape = shape;
  args.scale = static_cast<float>(shape.scale);
  args.aligned = rows_aligned<T>(shape, {qkv, out, workspace});
  const PackedQkv<const T> packed(static_cast<const T*>(qkv), shape);
  args.query = packed.query;
  args.key = packed.key;
  args.value = packed.value;
  args.out = token_matrix(static_cast<T*>(out), shape);
  T* const means = static_cast<T*>(workspace);
  args.pooled_key = pooled_matrix<const T>(means, 0, shape);
  args.pooled_value = pooled_matrix<const T>(means, 1, shape);
  args.bias = bias;
  args.bias_entries = shared_bias(shape, bias);
  args.lse = lse;

  const int rows = largest_cell(shape);
  const int slot_rows = rows <= Tile<T>::kRows / 2 ? Tile<T>::kRows / 2 : Tile<T>::kRows;
  const int tiles = ceil_div(rows + shape.pools(), slot_rows);
  const int64_t fixed = Shared::fixed(args.bias_entries);
  const int stages = ring_stages(tiles, Shared::kStage, fixed);
  args.grid = make_grid<T>(shape, shape.cells(), rows, tiles <= stages, stages);
  if (args.grid.blocks > kMaxBlocks) return cudaErrorInvalidValue;
  if (shape.pooled) {
    const cudaError_t error = launch_pool_means(static_cast<const T*>(qkv), means, shape,
                                                args.aligned, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(forward_kernel<T, D>, grid_dim(args.grid.blocks), dim3(Tile<T>::kThreads),
                fixed + stages * Shared::kStage, stream, args);
}

}  // namespace

int64_t window_attention_forward_workspace(const WindowAttentionShape& shape, DType dtype) {
  return pool_means_elements(shape) * element_size(dtype);
}

cudaError_t window_attention_forward(const void* qkv, const float* bias, void* out, float* lse,
                                     void* workspace, const WindowAttentionShape& shape,
                                     DType dtype, cudaStream_t stream) {
  if (shape.batch == 0) return cudaSuccess;
  return dispatch(dtype, shape.head_dim, [&](auto type, auto width) {
    return launch_forward<decltype(type), decltype(width)::value>(qkv, bias, out, lse, workspace,
                                                                  shape, stream);
  });
}

}  // namespace kernelpose::cuda
