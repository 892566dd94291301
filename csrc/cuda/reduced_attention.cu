// Forward: keys and values resident in shared memory, queries streamed, scores in registers.
//
//        keys and values, a ring of column tiles (64 x D each, 16-bit elements; float: 32)
//        |<- tile 0 ->|<- tile 1 ->| ...        resident when a unit's tiles fit the ring, as those
//   q    +------------+------------+            of 48 and 108 keys do; else streamed
//   16 rows a warp    | S = 16 x 32 in registers -> P, rounded to T -> O (16 x D) += P V
//   next rows on      |
//   their way         +--
//
// Floor, per launch: q, k, v read and out written once, (2 * queries + 2 * keys) * batch * C *
// sizeof(T) bytes; 4 * D FLOP a query and key. Shared memory: (32 * warps + stages * 2 * kRows) *
// (D
// + 16 bytes); 36.9 KB for D = 64, 48 keys, 16-bit elements.
// budget: reduced_forward_kernel<16-bit, 32> registers<=104
// budget: reduced_forward_kernel<16-bit, 64> registers<=168
// budget: reduced_forward_kernel<16-bit, 80> registers<=160
// budget: reduced_forward_kernel<16-bit, 128> registers<=208
// budget: reduced_forward_kernel<float, 32> registers<=128
// budget: reduced_forward_kernel<float, 64> registers<=168
// budget: reduced_forward_kernel<float, 80> registers<=168
// budget: reduced_forward_kernel<float, 128> registers<=192
#include "reduced_attention.h"
#include "reduced_attention_tiles.cuh"

namespace kernelpose::cuda {
namespace {

template <class T>
struct ForwardArguments {
  Problem problem;
  Grid grid;
  const T *q, *kv;
  T* out;
  float* lse;
};

// Shared memory in bytes: two strips of queries a warp, then the ring.
template <class T, int D>
constexpr int kForwardFixed = 2 * Tile<T>::kRows * kRowStride<T, D> * static_cast<int>(sizeof(T));
template <class T, int D>
constexpr int kForwardStage = 2 * Tile<T>::kRows * kRowStride<T, D> * static_cast<int>(sizeof(T));

// Blocks of 4 warps a multiprocessor that the kernel gets registers for.
template <class T, int D>
constexpr int kForwardBlocks = D <= 32 ? 4 : (D <= 80 ? 3 : 2);

template <class T, int D>
__global__ void __launch_bounds__(Tile<T>::kThreads, resident_blocks<T>(kForwardBlocks<T, D>))
    reduced_forward_kernel(const ForwardArguments<T> args) {
  constexpr int kStride = kRowStride<T, D>, kStrip = 16 * kStride;
  constexpr int kRows = Tile<T>::kRows, kChunk = Tile<T>::kChunk, kTile = kRows * kStride;
  static_assert(kForwardFixed<T, D> + kForwardStage<T, D> <= kSharedLimit);
  KP_DYNAMIC_SHARED(unsigned char, shared);
  const Problem& problem = args.problem;
  const Grid& grid = args.grid;
  const Unit unit(problem, grid);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, width = problem.head_dim;
  T* const own_rows = reinterpret_cast<T*>(shared) + warp * 2 * kStrip;
  T* const ring = reinterpret_cast<T*>(shared) + grid.warps * 2 * kStrip;
  const int tile_rows = 16 * grid.warps;
  const int first_tile = unit.split * grid.tiles_per_block;
  const int end_tile =
      min(first_tile + grid.tiles_per_block, (problem.queries + tile_rows - 1) / tile_rows);

  const auto first_row = [&](int tile) { return tile * tile_rows + 16 * warp; };
  const auto copy_queries = [&](int tile) {
    copy_rows<T, D, false>(own_rows + (tile & 1) * kStrip, nullptr,
                           query_pair(problem, unit, args.q, args.q, first_row(tile) + (lane & 15)),
                           lane, width, problem.aligned);
  };
  const auto load = [&](int tile, int stage) {
    copy_keys<T, D, kChunk>(problem, unit, args.kv, tile, ring + stage * 2 * kTile, warp,
                            grid.warps, lane);
  };

  copy_queries(first_tile);
  if (first_tile + 1 < end_tile) copy_queries(first_tile + 1);  // both join the first tile's group
  for (int tile = first_tile; tile < end_tile; ++tile) {
    T* const rows = own_rows + (tile & 1) * kStrip;
    const int row = first_row(tile);
    const bool active = row<problem.queries, later = tile> first_tile;
    if (later) {  // keys and values are there already
      cp_async_wait<0>();
      __syncwarp();
      if (tile + 1 < end_tile) copy_queries(tile + 1);
      cp_async_commit();
    }

    RowOperand<T, D, true> query;
    float o[D / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // sum: of this lane's columns
    const auto compute = [&](int key_tile, int stage) {
      if (!active) return;
      if (key_tile == 0) query.load(rows, lane);
      const int left = problem.keys - key_tile * kRows, end = min(left, kRows);
      for (int c = 0; c < end; c += kChunk) {
        const T* const keys = ring + stage * 2 * kTile + c * kStride;
        float s[kChunk / 8][4];
        multiply_transposed<kChunk>(s, query, keys, lane);
        scale_scores<kChunk>(s, problem.scale * kLog2E);
        hide_columns<kChunk>(s, left - c, lane);
        softmax_step<D, kChunk>(s, o, maximum, sum);
        add_product<D, kChunk>(o, s, keys + kTile, lane);
      }
    };
    for_each_tile((problem.keys + kRows - 1) / kRows, grid.stages, later, load, compute);
    if (!active) continue;

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(sum[half]);
      factor[half] = 1.f / total;
      const int i = row + (lane >> 2) + 8 * half;
      if (args.lse != nullptr && (lane & 3) == 0 && i < problem.queries) {
        args.lse[unit.statistic(problem, i)] = maximum[half] + log2f(total);
      }
    }
    const int i = row + (lane & 15);
    T* const to = i < problem.queries ? unit.query(problem, args.out, i) : nullptr;
    store_rows<T, D>(o, factor, rows, to, lane, width, problem.aligned);
  }
}

template <class T, int D>
cudaError_t launch_forward(const T* q, const T* kv, T* out, float* lse,
                           const ReducedAttentionShape& shape, cudaStream_t stream) {
  constexpr int kStage = kForwardStage<T, D>, kFixed = kForwardFixed<T, D>;
  const bool aligned = rows_aligned<T>(shape.head_dim, {q, kv, out});
  const Grid grid = make_query_grid<T>(shape, kStage, kFixed);
  const ForwardArguments<T> args = {make_problem(shape, aligned), grid, q, kv, out, lse};
  return launch_blocks(reduced_forward_kernel<T, D>, grid.blocks, 32 * grid.warps,
                       kFixed / Tile<T>::kWarps * grid.warps + grid.stages * kStage, stream, args);
}

}  // namespace

cudaError_t reduced_attention_forward(const void* q, const void* kv, void* out, float* lse,
                                      const ReducedAttentionShape& shape, DType dtype,
                                      cudaStream_t stream) {
  if (shape.batch == 0 || shape.queries == 0) return cudaSuccess;
  return dispatch_type(dtype, shape.head_dim, [&](auto type, auto width) {
    using T = decltype(type);
    return launch_forward<T, decltype(width)::value>(static_cast<const T*>(q),
                                                     static_cast<const T*>(kv),
                                                     static_cast<T*>(out), lse, shape, stream);
  });
}

}  // namespace kernelpose::cuda
