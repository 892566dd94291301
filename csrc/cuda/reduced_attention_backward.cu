// Backward of reduced_attention: probabilities are computed again from lse; nothing is summed by
// atomics.
//
//   queries' pass   rows q, dO    columns k, v, in shared memory as in the forward kernel
//                   delta = rowsum(P (dO v^T)), then dS = P (dO v^T - delta)    dq = scale * dS k
//   keys' pass      rows k, v     columns q, dO, lse, delta of a share of the queries
//                   P^T, dS^T likewise      dv = P^T dO             dk = scale * dS^T q
//   sums            of the shares' dk and dv, where there are several
//
// Rows lie 16 a warp, columns pass through a ring of tiles; a warp holds 16 x 16 scores at a time.
// delta is summed over the keys, which are few, twice through shared memory: `out` is not needed.
//
// Floor: q, k, v, dO read and dq, dk, dv written once, (3 * queries + 4 * keys) * batch * C *
// sizeof(T) bytes; q and dO are read twice here. 10 * D FLOP a query and key, 18 as done here.
// budget: reduced_queries_kernel<16-bit, 32> registers<=128
// budget: reduced_queries_kernel<16-bit, 64> registers<=168
// budget: reduced_queries_kernel<16-bit, 80> registers<=168
// budget: reduced_queries_kernel<16-bit, 128> registers<=248
// budget: reduced_queries_kernel<float, 32> registers<=168
// budget: reduced_queries_kernel<float, 64> registers<=168
// budget: reduced_queries_kernel<float, 80> registers<=248
// budget: reduced_queries_kernel<float, 128> registers<=255
// budget: reduced_keys_kernel<16-bit, 32> registers<=144
// budget: reduced_keys_kernel<16-bit, 64> registers<=192
// budget: reduced_keys_kernel<16-bit, 80> registers<=200
// budget: reduced_keys_kernel<16-bit, 128> registers<=248
// budget: reduced_keys_kernel<float, 32> registers<=168
// budget: reduced_keys_kernel<float, 64> registers<=216
// budget: reduced_keys_kernel<float, 80> registers<=255
// budget: reduced_keys_kernel<float, 128> registers<=255
// budget: reduced_sums_kernel<*> registers<=48
#include "kernelpose/vector.cuh"
#include "reduced_attention.h"
#include "reduced_attention_tiles.cuh"

namespace kernelpose::cuda {
namespace {

template <class T>
struct BackwardArguments {
  Problem problem;
  Grid grid;
  const T *grad_out, *q, *kv;
  const float* lse;
  T *grad_q, *grad_kv;
  float *delta, *partials;
  int key_tiles;  // of the keys' pass: row tiles of a unit
};

constexpr int kBackwardChunk = 16;  // columns of scores that a warp holds at a time

// Bytes of two strips a warp, of every warp, and of a stage of the ring.
template <class T, int D>
constexpr int kBackwardFixed = 2 * Tile<T>::kRows * kRowStride<T, D> * static_cast<int>(sizeof(T));
template <class T, int D>
constexpr int kQueriesStage = kBackwardFixed<T, D>;
template <class T, int D>
constexpr int kKeysStage =
    kQueriesStage<T, D> + 2 * Tile<T>::kRows * static_cast<int>(sizeof(float));

template <class T, int D>
constexpr int kQueriesBlocks = D > (sizeof(T) == 2 ? 80 : 64) ? 2
                               : D <= 32 && sizeof(T) == 2    ? 4
                                                              : 3;

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads, resident_blocks<T>(kQueriesBlocks<T, D>))
    reduced_queries_kernel(const BackwardArguments<T> args) {
  constexpr int kStride = kRowStride<T, D>, kStrip = 16 * kStride;
  constexpr int kRows = Tile<T>::kRows, kChunk = kBackwardChunk, kTile = kRows * kStride;
  static_assert(kBackwardFixed<T, D> + kQueriesStage<T, D> <= kSharedLimit);
  KP_DYNAMIC_SHARED(unsigned char, shared);
  const Problem& problem = args.problem;
  const Grid& grid = args.grid;
  const Unit unit(problem, grid);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, width = problem.head_dim;
  T* const own_rows = reinterpret_cast<T*>(shared) + warp * 2 * kStrip;  // queries, then dO
  T* const ring = reinterpret_cast<T*>(shared) + grid.warps * 2 * kStrip;
  const int tile_rows = 16 * grid.warps, key_tiles = (problem.keys + kRows - 1) / kRows;
  const int first_tile = unit.split * grid.tiles_per_block;
  const int end_tile =
      min(first_tile + grid.tiles_per_block, (problem.queries + tile_rows - 1) / tile_rows);
  const bool resident = key_tiles <= grid.stages;
  const float scale2 = problem.scale * kLog2E;

  const auto load = [&](int tile, int stage) {
    copy_keys<T, D, kChunk>(problem, unit, args.kv, tile, ring + stage * 2 * kTile, warp,
                            grid.warps, lane);
  };

  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int first_row = tile * tile_rows + 16 * warp;
    const bool active = first_row<problem.queries, later = tile> first_tile;
    copy_rows<T, D, true>(own_rows, own_rows + kStrip,
                          query_pair(problem, unit, args.q, args.grad_out, first_row + (lane & 15)),
                          lane, width, problem.aligned);
    cp_async_commit();
    float row_lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row + (lane >> 2) + 8 * half;
      row_lse[half] = i < problem.queries ? args.lse[unit.statistic(problem, i)] : 0.f;
    }
    if (later) {
      cp_async_wait<0>();
      __syncwarp();
    }

    RowOperand<T, D, D <= 80> query, grad;
    // Calls visit(p, dp, keys) with the probabilities of a chunk, their gradients and its keys.
    const auto for_each_chunk = [&](int key_tile, int stage, const auto& visit) {
      const int left = problem.keys - key_tile * kRows, end = min(left, kRows);
      for (int c = 0; c < end; c += kChunk) {
        const T* const keys = ring + stage * 2 * kTile + c * kStride;
        float p[kChunk / 8][4], dp[kChunk / 8][4];
        multiply_transposed<kChunk>(p, query, keys, lane);
        multiply_transposed<kChunk>(dp, grad, keys + kTile, lane);
        scale_scores<kChunk>(p, scale2);
        hide_columns<kChunk>(p, left - c, lane);
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) p[j][i] = exp2_approx(p[j][i] - row_lse[i >> 1]);
        }
        visit(p, dp, keys);
      }
    };

    float delta[2] = {0.f, 0.f};
    const auto add_delta = [&](int key_tile, int stage) {
      if (!active) return;
      if (key_tile == 0) {
        query.load(own_rows, lane);
        grad.load(own_rows + kStrip, lane);
      }
      for_each_chunk(key_tile, stage, [&](const auto& p, const auto& dp, const T*) {
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) delta[i >> 1] = fmaf(p[j][i], dp[j][i], delta[i >> 1]);
        }
      });
    };
    for_each_tile(key_tiles, grid.stages, later, load, add_delta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = row_sum(delta[half]);
      const int i = first_row + (lane >> 2) + 8 * half;
      if ((lane & 3) == 0 && i < problem.queries) {
        args.delta[unit.statistic(problem, i)] = delta[half];
      }
    }
    if (!resident) __syncthreads();  // every warp is done with the last stages

    float grad_query[D / 8][4] = {};
    const auto add_gradient = [&](int key_tile, int stage) {
      if (!active) return;
      for_each_chunk(key_tile, stage, [&](auto& p, const auto& dp, const T* keys) {
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) p[j][i] *= dp[j][i] - delta[i >> 1];
        }
        add_product<D, kChunk>(grad_query, p, keys, lane);
      });
    };
    for_each_tile(key_tiles, grid.stages, resident, load, add_gradient);
    if (!active) continue;
    const float factor[2] = {problem.scale, problem.scale};
    const int i = first_row + (lane & 15);
    T* const to = i < problem.queries ? unit.query(problem, args.grad_q, i) : nullptr;
    store_rows<T, D>(grad_query, factor, own_rows, to, lane, width, problem.aligned);
  }
}

// Where the gradients of key i of a share of the queries go: (share, unit, part, key, D).
template <int D>
__device__ __forceinline__ float* partial_row(float* partials, const Problem& problem,
                                              int64_t number, int share, int part, int i) {
  const int64_t units = problem.batch * problem.heads;
  return partials + (((share * units + number) * 2 + part) * problem.keys + i) * D;
}

template <class T, int D>
constexpr int kKeysBlocks = D <= 32 || (D <= 64 && sizeof(T) == 2) ? 3 : 2;

// A block's split is a tile of keys and a share of the query tiles.
template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads, resident_blocks<T>(kKeysBlocks<T, D>))
    reduced_keys_kernel(const BackwardArguments<T> args) {
  constexpr int kStride = kRowStride<T, D>, kStrip = 16 * kStride;
  constexpr int kRows = Tile<T>::kRows, kChunk = kBackwardChunk, kTile = kRows * kStride;
  static_assert(kBackwardFixed<T, D> + kKeysStage<T, D> <= kSharedLimit);
  KP_DYNAMIC_SHARED(unsigned char, shared);
  const Problem& problem = args.problem;
  const Grid& grid = args.grid;
  const Unit unit(problem, grid);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, width = problem.head_dim;
  T* const own_rows = reinterpret_cast<T*>(shared) + warp * 2 * kStrip;  // keys, then values
  T* const ring = reinterpret_cast<T*>(shared) + grid.warps * 2 * kStrip;
  float* const statistics = reinterpret_cast<float*>(ring + grid.stages * 2 * kTile);
  const int share = unit.split / args.key_tiles;
  const int first_row = 16 * (grid.warps * (unit.split - share * args.key_tiles) + warp);
  const bool active = first_row < problem.keys;
  const int first_tile = share * grid.tiles_per_block;
  const int tiles = min(grid.tiles_per_block, (problem.queries + kRows - 1) / kRows - first_tile);
  const float scale2 = problem.scale * kLog2E;

  const auto load = [&](int tile, int stage) {
    T* const queries = ring + stage * 2 * kTile;
    float* const lse = statistics + stage * 2 * kRows;  // then delta
    for (int row = 16 * warp; row < kRows; row += 16 * grid.warps) {
      const int i = (first_tile + tile) * kRows + row + (lane & 15);
      const RowPair<T> pair = query_pair(problem, unit, args.q, args.grad_out, i);
      copy_rows<T, D, true>(queries + row * kStride, queries + kTile + row * kStride, pair, lane,
                            width, problem.aligned);
      if (lane < 16) {  // a query that does not exist has no weights
        const int64_t at = unit.statistic(problem, i);
        lse[row + lane] = pair.exists ? args.lse[at] : INFINITY;
        lse[kRows + row + lane] = pair.exists ? args.delta[at] : 0.f;
      }
    }
  };

  copy_rows<T, D, true>(own_rows, own_rows + kStrip,
                        key_pair(problem, unit, args.kv, first_row + (lane & 15)), lane, width,
                        problem.aligned);  // joins the first tile's group
  RowOperand<T, D, D <= 64> key, value;
  float grad_key[D / 8][4] = {}, grad_value[D / 8][4] = {};
  const auto compute = [&](int tile, int stage) {
    if (!active) return;
    if (tile == 0) {
      key.load(own_rows, lane);
      value.load(own_rows + kStrip, lane);
    }
    const int end = min(problem.queries - (first_tile + tile) * kRows, kRows);
    for (int c = 0; c < end; c += kChunk) {
      const T* const queries = ring + stage * 2 * kTile + c * kStride;
      const float* const lse = statistics + stage * 2 * kRows + c;
      float p[kChunk / 8][4], dp[kChunk / 8][4];
      multiply_transposed<kChunk>(p, key, queries, lane);
      multiply_transposed<kChunk>(dp, value, queries + kTile, lane);
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const int at = 8 * j + 2 * (lane & 3);
        const float2 lse2 = *reinterpret_cast<const float2*>(lse + at);
        const float2 delta = *reinterpret_cast<const float2*>(lse + kRows + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[j][i] = exp2_approx(fmaf(p[j][i], scale2, -((i & 1) ? lse2.y : lse2.x)));
          dp[j][i] = p[j][i] * (dp[j][i] - ((i & 1) ? delta.y : delta.x));
        }
      }
      add_product<D, kChunk>(grad_value, p, queries + kTile, lane);
      add_product<D, kChunk>(grad_key, dp, queries, lane);
    }
  };
  for_each_tile(tiles, grid.stages, false, load, compute);
  if (!active) return;

  const auto store = [&](const float (&gradient)[D / 8][4], int part, float scale) {
    if (args.partials == nullptr) {
      const float factor[2] = {scale, scale};
      const int i = first_row + (lane & 15);
      T* const to = i < problem.keys ? unit.key(problem, args.grad_kv, part, i) : nullptr;
      store_rows<T, D>(gradient, factor, own_rows, to, lane, width, problem.aligned);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row + (lane >> 2) + 8 * half;
      if (i >= problem.keys) continue;
      float* const to = partial_row<D>(args.partials, problem, unit.number, share, part, i);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j + 2 * (lane & 3)) =
            make_float2(gradient[j][2 * half] * scale, gradient[j][2 * half + 1] * scale);
      }
    }
  };
  store(grad_key, 0, problem.scale);
  store(grad_value, 1, 1.f);
}

// A thread sums 4 neighbouring channels of one key or value over the shares, in order.
template <class T, int D>
__global__ void __launch_bounds__(256)
    reduced_sums_kernel(const Problem problem, float* __restrict__ partials, int shares,
                        T* __restrict__ grad_kv) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = index / (D / 4);  // (unit, part, key)
  const int c = static_cast<int>(index - row * (D / 4)) * 4;
  const int64_t entry = row / problem.keys, number = entry / 2;
  if (number >= problem.batch * problem.heads || c >= problem.head_dim) return;
  const int i = static_cast<int>(row - entry * problem.keys), part = static_cast<int>(entry & 1);
  float sum[4] = {};
  for (int share = 0; share < shares; ++share) {
    const auto values =
        load_vector<4>(partial_row<D>(partials, problem, number, share, part, i) + c);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += values.values[e];
  }
  const int64_t image = number / problem.heads, head = number - image * problem.heads;
  T* const to = grad_kv + ((image * problem.keys + i) * 2 + part) * problem.channels +
                head * problem.head_dim + c;
  if (problem.aligned) {
    ElementVector<T, 4> result;
#pragma unroll
    for (int e = 0; e < 4; ++e) result.values[e] = from_float<T>(sum[e]);
    store_vector(to, result);
    return;
  }
  for (int e = 0; e < 4 && c + e < problem.head_dim; ++e) to[e] = from_float<T>(sum[e]);
}

// How the keys' pass is cut, without the ring.
template <class T>
struct KeysCut {
  int warps, key_tiles, tiles_per_share, shares;

  explicit KeysCut(const ReducedAttentionShape& shape) {
    const int64_t units = shape.batch * shape.heads, strips = ceil_div(shape.keys, 16);
    warps = strips < Tile<T>::kWarps ? static_cast<int>(strips) : Tile<T>::kWarps;
    key_tiles = static_cast<int>(ceil_div(strips, warps));
    const int64_t query_tiles = ceil_div(shape.queries, Tile<T>::kRows);
    const int64_t wanted = ceil_div(kEnoughBlocks, units * key_tiles);
    tiles_per_share = static_cast<int>(ceil_div(query_tiles, wanted));
    shares = static_cast<int>(ceil_div(query_tiles, tiles_per_share));
  }
};

// Offsets in bytes, multiples of 256, and the sum.
struct BackwardWorkspace {
  int64_t partials, bytes;  // after delta

  template <class T>
  static BackwardWorkspace of(const ReducedAttentionShape& shape, int padded_width) {
    const auto round = [](int64_t floats) { return (floats * 4 + 255) / 256 * 256; };
    const int64_t units = shape.batch * shape.heads;
    const int shares = KeysCut<T>(shape).shares;
    const int64_t delta = round(units * shape.queries);
    const int64_t sums = shares > 1 ? units * shares * 2 * shape.keys * padded_width : 0;
    return {delta, delta + round(sums)};
  }
};

template <class T, int D>
cudaError_t launch_backward(const T* grad_out, const T* q, const T* kv, const float* lse, T* grad_q,
                            T* grad_kv, char* workspace, const ReducedAttentionShape& shape,
                            cudaStream_t stream) {
  constexpr int kFixed = kBackwardFixed<T, D>, kFixedWarp = kFixed / Tile<T>::kWarps;
  const KeysCut<T> cut(shape);
  const auto layout = BackwardWorkspace::of<T>(shape, D);
  float* const partials =
      cut.shares > 1 ? reinterpret_cast<float*>(workspace + layout.partials) : nullptr;
  const bool aligned =
      rows_aligned<T>(shape.head_dim, {grad_out, q, kv, grad_q, grad_kv, workspace});
  const Problem problem = make_problem(shape, aligned);
  BackwardArguments<T> args = {problem,
                               make_query_grid<T>(shape, kQueriesStage<T, D>, kFixed),
                               grad_out,
                               q,
                               kv,
                               lse,
                               grad_q,
                               grad_kv,
                               reinterpret_cast<float*>(workspace),
                               partials,
                               cut.key_tiles};
  cudaError_t error = launch_blocks(
      reduced_queries_kernel<T, D>, args.grid.blocks, 32 * args.grid.warps,
      kFixedWarp * args.grid.warps + args.grid.stages * kQueriesStage<T, D>, stream, args);
  if (error != cudaSuccess) return error;

  const int64_t units = shape.batch * shape.heads, splits = int64_t{cut.shares} * cut.key_tiles;
  args.grid = {units * splits, cut.warps, static_cast<int>(splits), cut.tiles_per_share,
               ring_stages(cut.tiles_per_share, kKeysStage<T, D>, kFixed)};
  error = launch_blocks(reduced_keys_kernel<T, D>, args.grid.blocks, 32 * cut.warps,
                        kFixedWarp * cut.warps + args.grid.stages * kKeysStage<T, D>, stream, args);
  if (error != cudaSuccess || partials == nullptr) return error;
  const int64_t threads = units * 2 * shape.keys * (D / 4);
  return launch_blocks(reduced_sums_kernel<T, D>, ceil_div(threads, 256), 256, 0, stream, problem,
                       partials, cut.shares, grad_kv);
}

}  // namespace

int64_t reduced_attention_backward_workspace(const ReducedAttentionShape& shape, DType dtype) {
  int64_t bytes = 0;
  if (shape.batch == 0 || shape.queries == 0) return bytes;
  dispatch_type(dtype, shape.head_dim, [&](auto type, auto width) {
    bytes = BackwardWorkspace::of<decltype(type)>(shape, decltype(width)::value).bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t reduced_attention_backward(const void* grad_out, const void* q, const void* kv,
                                       const float* lse, void* grad_q, void* grad_kv,
                                       void* workspace, const ReducedAttentionShape& shape,
                                       DType dtype, cudaStream_t stream) {
  if (shape.batch == 0 || shape.queries == 0) return cudaSuccess;  // the caller clears grad_kv
  return dispatch_type(dtype, shape.head_dim, [&](auto type, auto width) {
    using T = decltype(type);
    return launch_backward<T, decltype(width)::value>(
        static_cast<const T*>(grad_out), static_cast<const T*>(q), static_cast<const T*>(kv), lse,
        static_cast<T*>(grad_q), static_cast<T*>(grad_kv), static_cast<char*>(workspace), shape,
        stream);
  });
}

}  // namespace kernelpose::cuda
