// One mistake each, that the emulator has to report.
#include "kernelpose/launch.cuh"
#include "kernelpose/ptx.cuh"

namespace kernelpose {

enum Fault {
  kNone,
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kDivergentBarrier,
  kDifferentBarriers,
  kMismatchedLanes,
  kMaskWithoutCaller,
  kExitedLane,
  kWarpRace,
  kBlockRace,
  kReadBeforeWait,
  kUnalignedCopy,
  kCopyOutOfBounds,
  kUnalignedRow,
  kRowOutsideShared,
  kUnwrittenShared,
  kUnalignedVector,
};

// 64 threads, 256 bytes of shared memory, 64 floats of `global`.
__global__ void faulty_kernel(float* global, int fault) {
  KP_DYNAMIC_SHARED(float, shared);
  const int thread = threadIdx.x, lane = thread % 32;
  uint32_t fragment[4];
  float value = 1.0f;
  switch (fault) {
    case kNone:
      break;
    case kSharedOutOfBounds:
      if (thread == 5) shared[64] = 1.0f;
      break;
    case kGlobalOutOfBounds:
      if (thread == 5) value = global[64];
      break;
    case kDivergentBarrier:
      if (thread < 40) __syncthreads();
      __syncwarp();
      break;
    case kDifferentBarriers:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kMismatchedLanes:
      if (lane < 16) {
        value = __shfl_sync(0xffffffffu, value, 0);
      } else {
        ldmatrix_x4(fragment, shared);
      }
      break;
    case kMaskWithoutCaller:
      value = __shfl_sync(0x0000ffffu, value, 0);
      break;
    case kExitedLane:
      if (lane == 7) return;
      value = __shfl_sync(0xffffffffu, value, 0);
      break;
    case kWarpRace:
      shared[thread] = 1.0f;
      value = shared[thread ^ 1];
      break;
    case kBlockRace:
      shared[thread] = 1.0f;
      __syncwarp();
      value = shared[thread ^ 32];
      break;
    case kReadBeforeWait:
      if (thread < 16) cp_async_16(shared + 4 * thread, global + 4 * thread, true);
      cp_async_commit();
      value = shared[thread < 16 ? 4 * thread : 0];
      break;
    case kUnalignedCopy:
      if (thread == 0) cp_async_16(shared, global + 1, true);
      break;
    case kCopyOutOfBounds:
      if (thread == 0) cp_async_16(shared, global + 64, true);
      break;
    case kUnalignedRow:
      ldmatrix_x4(fragment, shared + 1);
      break;
    case kRowOutsideShared:
      ldmatrix_x4(fragment, global);
      break;
    case kUnwrittenShared:
      value = shared[thread];
      break;
    case kUnalignedVector:
      if (thread == 0) value = reinterpret_cast<const float4*>(global + 1)->x;
      break;
  }
  global[thread] = value;
}

__global__ void empty_kernel() {}

}  // namespace kernelpose

extern "C" int faulty(float* global, int fault) {
  return kernelpose::launch(kernelpose::faulty_kernel, dim3(1), dim3(64), 256, nullptr, global,
                            fault);
}

// What a launch of ours left for the next call of the runtime to find.
extern "C" int last_error() { return cudaGetLastError(); }

extern "C" int launch_empty(int64_t grid_x, int64_t grid_y, int64_t block_x, int64_t block_z,
                            int64_t shared_bytes) {
  return kernelpose::launch(kernelpose::empty_kernel, dim3(grid_x, grid_y),
                            dim3(block_x, 1, block_z), shared_bytes, nullptr);
}
