// Element types that cross the Python boundary, as the integers of kernelpose/_native.py.
#pragma once

namespace kernelpose {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

}  // namespace kernelpose
