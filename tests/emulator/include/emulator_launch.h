// kernelpose::launch and KP_DYNAMIC_SHARED of kernelpose/launch.cuh, emulated.
#pragma once

#include <tuple>
#include <utility>

#include "cuda_runtime.h"

// Dynamic shared memory of the block: 16-byte aligned, and no more than that.
#define KP_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(kernelpose::emulator::dynamic_shared())

namespace kernelpose {

// Runs the whole grid before it returns; every thread gets its own copy of the parameters.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t /*stream*/, A&&... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters are limited to 4 KB");
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto thread = [](void* argument) {
    const Call& c = *static_cast<const Call*>(argument);
    std::apply(c.first, c.second);
  };
  return cudaError_t(emulator::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                                        shared_bytes, thread, &call));
}

}  // namespace kernelpose
