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
// budget: bias_gradient_kernel<*> registers<=208
// budget: sum_bias_parts registers<=24
#pragma once

#include "window_attention_tiles.cuh"

namespace kernelpose::cuda {

// How the sum is cut into tables. The row tiles of all cells are numbered through; each table
// covers a range of them and a range of images.
struct BiasParts {
  int heads, tiles, tile_parts, image_parts;
  int64_t entries;

  // kTargetBlocks fills the largest GPUs some times over.
  static constexpr int kTargetBlocks = 1024;
  static constexpr int64_t kMaxPartBytes = 32 << 20;

  BiasParts(const WindowAttentionShape& shape, int tile_rows)
      : heads(shape.heads),
        tiles(static_cast<int>(shape.cells() * ceil_div(largest_cell(shape), tile_rows))),
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

struct BiasGrid {
  int tile_parts, image_parts, cell_tiles, stages;
};

template <class T>
struct BiasGradientArguments {
  Problem problem;
  BiasGrid grid;
  Matrix<const T> query;
  Keys<T> keys;
  Matrix<const T> grad_out;
  const float *bias, *lse, *delta;
  float* parts;  // (tile part, image part, head, entry)
};

template <class T, int D>
struct BiasGradientShared {
  static constexpr int kTile = Tile<T>::kRows * kRowStride<T, D>;
  static constexpr int kSumStride = Tile<T>::kRows + 1;  // diagonals fall into different banks
  static constexpr int kSumBytes = Tile<T>::kRows * kSumStride * sizeof(float);
  static constexpr int kStage = 4 * kTile * sizeof(T) + Tile<T>::kRows * 2 * sizeof(float);
  static constexpr int kFixed = kSumBytes + Tile<T>::kRows * sizeof(int);
  static_assert(kFixed + kStage <= kSharedLimit);
};

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads, resident_blocks<T>(2))
    bias_gradient_kernel(const BiasGradientArguments<T> args) {
  using Shared = BiasGradientShared<T, D>;
  constexpr int kTile = Shared::kTile, kStride = kRowStride<T, D>;
  constexpr int kRows = Tile<T>::kRows, kChunk = Tile<T>::kChunk, kThreads = Tile<T>::kThreads;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  T* const ring = reinterpret_cast<T*>(shared);  // stages x (queries, dO, keys, values)
  float* const sums = reinterpret_cast<float*>(ring + args.grid.stages * 4 * kTile);
  int* const places = reinterpret_cast<int*>(sums + kRows * Shared::kSumStride);
  float* const row_lse = reinterpret_cast<float*>(places + kRows);
  float* const row_delta = row_lse + args.grid.stages * kRows;

  const Problem& problem = args.problem;
  const BiasGrid& grid = args.grid;
  const int heads = problem.shape.heads, bias_columns = problem.bias_columns;
  const int head = blockIdx.x % heads;
  const int image_part = blockIdx.x / heads % grid.image_parts;
  const int tile_part = blockIdx.x / heads / grid.image_parts;
  const int64_t batch = problem.shape.batch;
  const int64_t first_image = batch * image_part / grid.image_parts;
  const int images = static_cast<int>(batch * (image_part + 1) / grid.image_parts - first_image);
  const int64_t tiles = int64_t{1} * problem.shape.cells() * grid.cell_tiles;
  const int first_tile = static_cast<int>(tiles * tile_part / grid.tile_parts);
  const int end_tile = static_cast<int>(tiles * (tile_part + 1) / grid.tile_parts);

  const int lane = threadIdx.x & 31, tile_row = threadIdx.x >> 5 << 4;
  const int64_t entries = int64_t{1} * problem.shape.bias_rows() * bias_columns;
  const Bias bias = {args.bias + head, heads};
  float* const part = args.parts + blockIdx.x * entries;
  for (int64_t i = threadIdx.x; i < entries; i += kThreads) part[i] = 0.f;

  for (int numbered = first_tile; numbered < end_tile; ++numbered) {
    const int cell = numbered / grid.cell_tiles;
    const int first_query = numbered % grid.cell_tiles * kRows;
    const Tokens tokens = tokens_of(problem, cell);
    const int count = tokens.count(), columns = tokens.columns.count;
    if (first_query >= count) continue;
    const int own_query = first_query + tile_row;  // the warp's first row
    int row_place[2];
    row_places(row_place, bias, tokens, own_query + (lane >> 2), count, bias_columns);

    for (int first_key = 0; first_key < count; first_key += kRows) {
      const auto load = [&](int i, int stage) {
        T* const target = ring + stage * 4 * kTile + tile_row * kStride;
        const Unit unit = {first_image + i, head, true};
        const int query = own_query + (lane & 15), key = first_key + tile_row + (lane & 15);
        const RowPair<T> queries =
            token_row(problem, args.query, args.grad_out, unit, tokens, count, query);
        copy_rows<T, D, true>(target, target + kTile, queries, lane, problem.shape.head_dim,
                              problem.aligned);
        copy_rows<T, D, true>(
            target + 2 * kTile, target + 3 * kTile,
            token_row(problem, args.keys.key, args.keys.value, unit, tokens, count, key), lane,
            problem.shape.head_dim, problem.aligned);
        if (lane < 16) {
          const int64_t statistic =
              queries.exists ? statistic_of(problem, unit, tokens.at(query)) : 0;
          row_lse[stage * kRows + tile_row + lane] =
              queries.exists ? kLog2E * args.lse[statistic] : 0.f;
          row_delta[stage * kRows + tile_row + lane] = queries.exists ? args.delta[statistic] : 0.f;
        }
      };
      if (lane < 16) {
        const int key = first_key + tile_row + lane;
        places[tile_row + lane] = key < count ? tokens.bias_place(key, bias_columns) : 0;
      }

      float sum[kRows / 8][4] = {};
      const auto compute = [&](int, int stage) {
        if (own_query >= count) return;
        const T* const stage_rows = ring + stage * 4 * kTile;
        RowOperand<T, D, false> query, grad;
        query.load(stage_rows + tile_row * kStride, lane);
        grad.load(stage_rows + kTile + tile_row * kStride, lane);
        float lse2[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = stage * kRows + tile_row + (lane >> 2) + 8 * half;
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
          to_scores<false, kChunk>(s, problem.scale, bias, problem.bias_centre, row_place,
                                   places + c, count - first_key - c, count - first_key - c, lane);
#pragma unroll
          for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[c / 8 + j][i] += exp2_approx(s[j][i] - lse2[i >> 1]) * (dp[j][i] - delta[i >> 1]);
            }
          }
        }
      };
      for_each_tile(images, grid.stages, false, load, compute);

#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = tile_row + (lane >> 2) + 8 * (i >> 1);
          sums[row * Shared::kSumStride + 8 * j + 2 * (lane & 3) + (i & 1)] = sum[j][i];
        }
      }
      // The sums are there, places and ring are free. The barriers of the next tile pair keep its
      // sums, and the next turn of other threads at the table, behind this gathering.
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
        part[problem.bias_centre + dy * bias_columns + dx] += total;
      }
    }
  }
}

// One thread an entry of grad_bias (entry, head).
__global__ void __launch_bounds__(256)
    sum_bias_parts(const float* __restrict__ parts, float* __restrict__ grad_bias, int count,
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
  const WindowAttentionShape& shape = args.problem.shape;
  const BiasParts parts(shape, Tile<T>::kRows);
  const int stages =
      ring_stages(ceil_div(shape.batch, parts.image_parts), Shared::kStage, Shared::kFixed);
  args.grid = {parts.tile_parts, parts.image_parts,
               static_cast<int>(ceil_div(largest_cell(shape), Tile<T>::kRows)), stages};
  const cudaError_t error =
      launch_blocks(bias_gradient_kernel<T, D>, int64_t{1} * parts.parts() * parts.heads,
                    Tile<T>::kThreads, Shared::kFixed + stages * Shared::kStage, stream, args);
  if (error != cudaSuccess) return error;
  return launch_blocks(sum_bias_parts, ceil_div(parts.entries * parts.heads, 256), 256, 0, stream,
                       args.parts, grad_bias, parts.parts(), parts.heads, parts.entries);
}

}  // namespace kernelpose::cuda
