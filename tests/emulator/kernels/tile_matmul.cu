// out (16 x 8) = a (16 x K) * b (K x 8), K a multiple of 16: one warp multiplies, two load, with
// a pipeline of two tiles; b as it lies (ldmatrix trans) or given as its transpose (plain).
#include "kernelpose/launch.cuh"
#include "kernelpose/ptx.cuh"

namespace kernelpose {

template <class T>
struct Tile {
  T a[16][16], b[16][8], b_transposed[8][16];
};

template <class T>
__global__ void tile_matmul_kernel(const T* a, const T* b, const T* b_transposed, float* out,
                                   int depth, int use_transposed) {
  KP_DYNAMIC_SHARED(Tile<T>, tile);
  const int thread = threadIdx.x, lane = thread % 32;
  const auto load = [&](int k) {
    Tile<T>& t = tile[k / 16 % 2];
    const bool valid = k < depth;
    if (thread < 32) {
      cp_async_16(&t.a[thread / 2][thread % 2 * 8],
                  a + (valid ? thread / 2 * depth + k : 0) + thread % 2 * 8, valid);
    } else if (thread < 48) {
      cp_async_16(&t.b[thread - 32][0], b + (valid ? (k + thread - 32) * 8 : 0), valid);
    } else {
      const int i = thread - 48;
      cp_async_16(&t.b_transposed[i / 2][i % 2 * 8],
                  b_transposed + (valid ? i / 2 * depth + k : 0) + i % 2 * 8, valid);
    }
    cp_async_commit();
  };
  float sum[4] = {};
  load(0);
  for (int k = 0; k < depth; k += 16) {
    load(k + 16);
    cp_async_wait<1>();
    __syncthreads();
    const Tile<T>& t = tile[k / 16 % 2];
    if (thread < 32) {
      uint32_t ra[4], both[4];  // both: the two halves of b, twice
      ldmatrix_x4(ra, &t.a[lane % 16][lane / 16 * 8]);
      if (use_transposed) {
        ldmatrix_x4(both, &t.b_transposed[lane % 8][lane / 8 % 2 * 8]);
      } else {
        ldmatrix_x4_trans(both, &t.b[lane % 16][0]);
      }
      const uint32_t rb[2] = {both[0], both[1]};
      mma_m16n8k16<T>(sum, ra, rb, sum);
    }
    __syncthreads();
  }
  if (thread < 32) {
    for (int r = 0; r < 4; ++r) out[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
  }
}

template <class T>
int tile_matmul(const void* a, const void* b, const void* b_transposed, float* out, int depth,
                int use_transposed) {
  return launch(tile_matmul_kernel<T>, dim3(1), dim3(64), 2 * sizeof(Tile<T>), nullptr,
                static_cast<const T*>(a), static_cast<const T*>(b),
                static_cast<const T*>(b_transposed), out, depth, use_transposed);
}

}  // namespace kernelpose

extern "C" int tile_matmul_half(const void* a, const void* b, const void* b_transposed, float* out,
                                int depth, int use_transposed) {
  return kernelpose::tile_matmul<__half>(a, b, b_transposed, out, depth, use_transposed);
}

extern "C" int tile_matmul_bfloat16(const void* a, const void* b, const void* b_transposed,
                                    float* out, int depth, int use_transposed) {
  return kernelpose::tile_matmul<__nv_bfloat16>(a, b, b_transposed, out, depth, use_transposed);
}
