// Gradient of the relative-position table: entry (dy, dx) of a head sums dS over all pairs of a
// query and a key that lie (dy, dx) apart in their cell, over all cells and images.
//
// A block takes one head, some tile pairs (64 queries x 64 keys of a cell; float: 32) and some
// images. It adds dS of a pair up over its images in registers, lays the sum out in shared memory,
// and each thread gathers the entries it owns along the diagonals of the tile, into a table of the
// block's own. A second kernel adds up the tables in the order of their numbers.
//
// Bytes: q, k, v, dO of every cell once (twice the tiles of a side for large cells), tables of at
// most kMaxPartBytes. Shared memory: stages * (4 * kRows * (D + 16 bytes) + 12 * kRows).
#pragma once

#include "window_attention_tiles.cuh"

namespace kernelpose::cuda {

// How the sum is cut into tables. The row tiles of all cells are numbered through; each table covers
// a range of them and a range of images.
struct BiasParts {
  int heads, tiles, tile_parts, image_parts;
  int64_t entries;

  // kTargetBlocks fills the largest GPUs some times over.
  static constexpr int kTargetBlocks = 1024;
  static constexpr int64_t kMaxPartBytes = 32 << 20;

  BiasParts(const WindowAttentionShape& shape, int tile_rows)
      : heads(shape.heads),
        tiles(shape.cells() * ceil_div(largest_cell(shape), tile_rows)),
        entries(int64_t{1} * shape.bias_rows() * shape.bias_columns()) {
    const int64_t bytes = entries * heads * sizeof(float);
    const int64_t fit = kMaxPartBytes / bytes, want = ceil_div(kTargetBlocks, heads);
    const int64_t parts = fit < 1 ? 1 : (fit < want ? fit : want);
    tile_parts = static_cast<int>(tiles < parts ? tiles : parts);
    const int64_t images = parts / tile_parts;
    image_parts = static_cast<int>(shape.batch < images ? shape.batch : images);
  }

  int parts() const { return tile_parts * image_parts; }
  int64_t elements() const { return entries * heads * parts(); }
};

template <class T>
struct BiasGradientArguments {
  WindowAttentionShape shape;
  float scale;
  int tile_parts, image_parts, cell_tiles, stages;
  Matrix<const T> query, key, value, grad_out;
  const float *bias, *lse, *delta;
  float* parts;  // (tile part, image part, head, entry)
  bool aligned;
};

template <class T, int D>
struct BiasGradientShared {
  static constexpr int kTile = Tile<T>::kRows * kRowStride<T, D>;
  static constexpr int kSumStride = Tile<T>::kRows + 1;  // diagonals fall into different banks
  static constexpr int kSumBytes = Tile<T>::kRows * kSumStride * sizeof(float);
  static constexpr int kStage = 4 * kTile * sizeof(T) + Tile<T>::kRows * 2 * sizeof(float);
  static constexpr int kFixed = kSumBytes + Tile<T>::kRows * sizeof(int);
};

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads)
    bias_gradient_kernel(const BiasGradientArguments<T> args) {
  using Shared = BiasGradientShared<T, D>;
  constexpr int kTile = Shared::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = Tile<T>::kChunk, kThreads = Tile<T>::kThreads;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  T* const ring = reinterpret_cast<T*>(shared);  // stages x (queries, dO, keys, values)
  float* const sums = reinterpret_cast<float*>(ring + args.stages * 4 * kTile);
  int* const places = reinterpret_cast<int*>(sums + kRows * Shared::kSumStride);
  float* const row_lse = reinterpret_cast<float*>(places + kRows);
  float* const row_delta = row_lse + args.stages * kRows;

  const WindowAttentionShape& shape = args.shape;
  const int head = blockIdx.x % shape.heads;
  const int image_part = blockIdx.x / shape.heads % args.image_parts;
  const int tile_part = blockIdx.x / shape.heads / args.image_parts;
  const int64_t first_image = shape.batch * image_part / args.image_parts;
  const int images =
      static_cast<int>(shape.batch * (image_part + 1) / args.image_parts - first_image);
  const int64_t tiles = int64_t{1} * shape.cells() * args.cell_tiles;
  const int first_tile = static_cast<int>(tiles * tile_part / args.tile_parts);
  const int end_tile = static_cast<int>(tiles * (tile_part + 1) / args.tile_parts);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int width = shape.head_dim, bias_columns = shape.bias_columns();
  const int centre = (shape.rows.extent() - 1) * bias_columns + shape.columns.extent() - 1;
  const int64_t entries = int64_t{1} * shape.bias_rows() * bias_columns;
  const Bias bias = {args.bias + head, shape.heads};
  float* const part = args.parts + int64_t{blockIdx.x} * entries;
  for (int64_t i = threadIdx.x; i < entries; i += kThreads) part[i] = 0.f;

  for (int numbered = first_tile; numbered < end_tile; ++numbered) {
    const int cell = numbered / args.cell_tiles;
    const int first_query = numbered % args.cell_tiles * kRows;
    const Tokens tokens(shape.rows.cell(cell / shape.columns.cells()),
                        shape.columns.cell(cell % shape.columns.cells()), shape.columns.size);
    const int count = tokens.count(), columns = tokens.columns.count;
    if (first_query >= count) continue;
    const int warp_row = first_query + warp * 16;
    int row_place[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + (lane >> 2) + 8 * half;
      row_place[half] = tokens.bias_place(row < count ? row : count - 1, bias_columns);
    }

    for (int first_key = 0; first_key < count; first_key += kRows) {
      const auto load = [&](int i, int stage) {
        T* const target = ring + stage * 4 * kTile;
        const Unit unit = {first_image + i, head, true};
        const auto load_pair = [&](T* to, int first, const Matrix<const T>& left,
                                   const Matrix<const T>& right) {
          copy_rows<T, D>(to, to + kTile, kRows, threadIdx.x, kThreads, width, args.aligned,
                          [&](int row, const T*& a, const T*& b) {
            a = left.data;
            b = right.data;
            if (first + row >= count) return false;
            const int64_t token = tokens.at(first + row);
            a = row_of(left, unit, token, width);
            b = row_of(right, unit, token, width);
            return true;
          });
        };
        load_pair(target, first_query, args.query, args.grad_out);
        load_pair(target + 2 * kTile, first_key, args.key, args.value);
        if (threadIdx.x < kRows) {
          const int row = first_query + threadIdx.x;
          const bool exists = row < count;
          const int64_t index = (unit.image * shape.heads + head) * shape.tokens() +
                                (exists ? tokens.at(row) : 0);
          row_lse[stage * kRows + threadIdx.x] = exists ? kLog2E * args.lse[index] : 0.f;
          row_delta[stage * kRows + threadIdx.x] = exists ? args.delta[index] : 0.f;
        }
      };
      if (threadIdx.x < kRows) {
        const int key = first_key + threadIdx.x;
        places[threadIdx.x] = key < count ? tokens.bias_place(key, bias_columns) : 0;
      }

      float sum[kRows / 8][4] = {};
      for_each_tile(images, args.stages, false, load, [&](int, int stage) {
        if (warp_row >= count) return;
        const T* const stage_rows = ring + stage * 4 * kTile;
        RowOperand<T, D, false> query, grad;
        query.load(stage_rows + warp * 16 * kStride, lane);
        grad.load(stage_rows + kTile + warp * 16 * kStride, lane);
        float lse2[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = stage * kRows + warp * 16 + (lane >> 2) + 8 * half;
          lse2[half] = row_lse[at];
          delta[half] = row_delta[at];
        }
#pragma unroll
        for (int c = 0; c < kRows; c += kChunk) {
          if (first_key + c >= count) break;
          const T* const key_rows = stage_rows + 2 * kTile + c * kStride;
          float s[kChunk / 8][4], dp[kChunk / 8][4];
          multiply_transposed<kChunk>(s, query, key_rows, lane);
          multiply_transposed<kChunk>(dp, grad, key_rows + kTile, lane);
          to_scores<false, kChunk>(s, args.scale, bias, centre, row_place, places + c,
                                   count - first_key - c, count - first_key - c, lane);
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[c / 8 + j][i] +=
                  exp2_approx(s[j][i] - lse2[i >> 1]) * (dp[j][i] - delta[i >> 1]);
            }
          }
        }
      });

#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp * 16 + (lane >> 2) + 8 * (i >> 1);
          sums[row * Shared::kSumStride + 8 * j + 2 * (lane & 3) + (i & 1)] = sum[j][i];
        }
      }
      __syncthreads();

      // A query at cell column x meets the key `shift` places before it, in the order of the cell,
      // if x - dx is in the cell.
      const int queries = count - first_query < kRows ? count - first_query : kRows;
      const int keys = count - first_key < kRows ? count - first_key : kRows;
      const int first_dy = tokens.y(first_query) - tokens.y(first_key + keys - 1);
      const int end_dy = tokens.y(first_query + queries - 1) - tokens.y(first_key) + 1;
      const int differences = 2 * columns - 1;
      for (int e = threadIdx.x; e < (end_dy - first_dy) * differences; e += kThreads) {
        const int dy = first_dy + e / differences, dx = e % differences - (columns - 1);
        const int to_key = first_query - first_key - (dy * columns + dx);  // from a query's row
        const int begin = to_key < 0 ? -to_key : 0;
        const int end = queries < keys - to_key ? queries : keys - to_key;
        int x = begin < end ? first_query + begin - tokens.y(first_query + begin) * columns : 0;
        float total = 0.f;
        for (int q = begin; q < end; ++q) {
          if (x >= dx && x - dx < columns) total += sums[q * Shared::kSumStride + q + to_key];
          if (++x == columns) x = 0;
        }
        part[centre + dy * bias_columns + dx] += total;
      }
      __syncthreads();  // sums, places and the ring are free, and the table is written
    }
  }
}

// One thread an entry of grad_bias (entry, head).
// budget: sum_bias_parts registers<=40
__global__ void __launch_bounds__(256) sum_bias_parts(const float* __restrict__ parts,
                                                      float* __restrict__ grad_bias, int count,
                                                      int heads, int64_t entries) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= entries * heads) return;
  float sum = 0.f;
#pragma unroll 4
  for (int p = 0; p < count; ++p) sum += parts[p * entries * heads + i];
  grad_bias[i % entries * heads + i / entries] = sum;
}

template <class T, int D>
cudaError_t launch_bias_gradient(BiasGradientArguments<T> args, float* grad_bias,
                                 cudaStream_t stream) {
  using Shared = BiasGradientShared<T, D>;
  const BiasParts parts(args.shape, Tile<T>::kRows);
  args.tile_parts = parts.tile_parts;
  args.image_parts = parts.image_parts;
  args.cell_tiles = ceil_div(largest_cell(args.shape), Tile<T>::kRows);
  const int images = ceil_div(args.shape.batch, parts.image_parts);
  args.stages = ring_stages(images, Shared::kStage, Shared::kFixed);
  const cudaError_t error =
      launch(bias_gradient_kernel<T, D>, grid_dim(int64_t{1} * parts.parts() * parts.heads),
             dim3(Tile<T>::kThreads), Shared::kFixed + args.stages * Shared::kStage, stream, args);
  if (error != cudaSuccess) return error;
  return launch(sum_bias_parts, grid_dim(ceil_div(parts.entries * parts.heads, 256)), dim3(256),
                0, stream, args.parts, grad_bias, parts.parts(), parts.heads, parts.entries);
}

}  // namespace kernelpose::cuda
