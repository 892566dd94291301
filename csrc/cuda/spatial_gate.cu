// SCConv's spatial gate: a block a unit (spatial_gate_units.cuh). The forward reads its unit once
// and keeps it in shared memory, where that fits: 2 x 192 channels of 16 x 12 pixels in half are
// 147 KB. Where it does not, and in the backward, which has x and grad_out to read, later passes
// find the unit in L2. Means first, squared differences from them next: a large mean costs no
// digits.
//
// Floor: x read and out written once, at 64 maps of 768 x 16 x 12 in half 38 MB, 13 us of an H100's
// memory; backward x and grad_out read and grad_x written, 57 MB, 19 us.
// budget: spatial_gate_forward_kernel<*> registers<=128
// budget: spatial_gate_backward_kernel<*> registers<=128
// budget: spatial_gate_parameters_kernel registers<=64
#include <type_traits>

#include "kernelpose/channel_passes.cuh"
#include "spatial_gate.h"
#include "spatial_gate_units.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kVector = 4;  // elements

// t = (x - mean) scale + offset for a channel.
struct GateFactors {
  float mean, scale, offset;
};

struct Parameters {
  const float* weight;
  const float* bias;

  __device__ __forceinline__ GateFactors factors(int channel, float inverse, float mean,
                                                 float deviation) const {
    const float share = weight[channel] * inverse;
    return {mean, share * weight[channel] * deviation, share * bias[channel]};
  }
};

__device__ __forceinline__ float sigmoid(float t) {
  const float e = __expf(-fabsf(t));
  return __fdividef(t < 0.f ? e : 1.f, 1.f + e);
}

// Numbers of shared memory that the forward needs, a multiple of 16 bytes, before what it keeps.
KP_HOST_DEVICE inline int forward_floats(const Unit& u) {
  return (u.sums() + 2 * u.groups + 1 + 3) / 4 * 4;
}

template <class T>
struct Forward {
  const T* x;
  T* out;
  Parameters parameters;
  float* statistics;
  Unit unit;
  int to_partner;
  float limit, eps;
};

template <class T, int N, bool kChannelsLast, bool kResident>
__global__ void __launch_bounds__(kThreads, 1) spatial_gate_forward_kernel(const Forward<T> args) {
  KP_DYNAMIC_SHARED(float, shared);
  constexpr int kOwn = kChannelsLast ? N : 1;
  const Unit& u = args.unit;
  const int64_t image = blockIdx.x / u.units;
  const int unit = blockIdx.x % u.units, warp = threadIdx.x / 32;
  const T* const x = args.x + image * u.image();
  T* const out = args.out + image * u.image();
  float* const partial = shared;  // (parts, 2 * count)
  float* const mean = partial + u.sums();
  float* const deviation = mean + u.groups;
  float* const inverse = deviation + u.groups;
  // (turns, steps, kThreads): what each thread has read
  Pair<T, N>* const kept = reinterpret_cast<Pair<T, N>*>(shared + forward_floats(u));
  const auto fetch = [&](const Lane& lane, int s) {
    return load_pair<T, N>(x, lane.offset + s * lane.step, args.to_partner);
  };
  const auto fetch_again = [&](const Lane& lane, int turn, int s) {
    if constexpr (kResident) return kept[(turn * u.steps + s) * kThreads + threadIdx.x];
    return fetch(lane, s);
  };

  if (warp == 0) {
    const float sum = inverse_sum(args.parameters.weight, u.channels);
    if (threadIdx.x == 0) *inverse = sum;
  }
  for (int task = warp, turn = 0; task < u.tasks; task += kWarps, ++turn) {
    const Lane lane = lane_of<N, kChannelsLast>(u, unit, task);
    float sums[kOwn][2][1] = {};
    for_each_step<4>(
        lane, [&](int s) { return fetch(lane, s); },
        [&](int s, const Pair<T, N>& pair) {
          if constexpr (kResident) kept[(turn * u.steps + s) * kThreads + threadIdx.x] = pair;
#pragma unroll
          for (int e = 0; e < N; ++e) {
#pragma unroll
            for (int h = 0; h < 2; ++h) sums[e % kOwn][h][0] += to_float(pair.of[h].values[e]);
          }
        });
    put_sums<N, kChannelsLast>(u, lane, sums, partial);
  }
  __syncthreads();
  const float inverse_size = 1.f / (static_cast<float>(u.size) * static_cast<float>(u.pixels));
  const auto add = [&](int j, float (&sums)[1]) { sums[0] += sum_of_parts<1>(u, partial, 0, j); };
  for_each_group<1>(
      u, add, [&](int group, const float (&sums)[1]) { mean[group] = sums[0] * inverse_size; });
  __syncthreads();
  for (int task = warp, turn = 0; task < u.tasks; task += kWarps, ++turn) {
    const Lane lane = lane_of<N, kChannelsLast>(u, unit, task);
    float means[kOwn][2], sums[kOwn][2][1] = {};
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int j = min(lane.j + e, u.count - 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) means[e][h] = mean[(j + h * u.count) / u.size];
    }
    for_each_step<4>(
        lane, [&](int s) { return fetch_again(lane, turn, s); },
        [&](int, const Pair<T, N>& pair) {
#pragma unroll
          for (int e = 0; e < N; ++e) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float difference = to_float(pair.of[h].values[e]) - means[e % kOwn][h];
              sums[e % kOwn][h][0] += difference * difference;
            }
          }
        });
    put_sums<N, kChannelsLast>(u, lane, sums, partial);
  }
  __syncthreads();
  for_each_group<1>(u, add, [&](int group, const float (&sums)[1]) {
    deviation[group] = 1.f / sqrtf(sums[0] * inverse_size + args.eps);
    const int of_image = u.channel(unit, group * u.size) / u.size;
    float* const to = args.statistics + 2 * (image * u.units * u.groups + of_image);
    to[0] = mean[group];
    to[1] = deviation[group];
  });
  __syncthreads();
  for (int task = warp, turn = 0; task < u.tasks; task += kWarps, ++turn) {
    const Lane lane = lane_of<N, kChannelsLast>(u, unit, task);
    GateFactors factors[kOwn][2];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = min(lane.j + e, u.count - 1) + h * u.count;
        factors[e][h] = args.parameters.factors(u.channel(unit, j), *inverse, mean[j / u.size],
                                                deviation[j / u.size]);
      }
    }
    for_each_step<4>(
        lane, [&](int s) { return fetch_again(lane, turn, s); },
        [&](int s, const Pair<T, N>& pair) {
          Pair<T, N> result;
#pragma unroll
          for (int e = 0; e < N; ++e) {
            float kept[2], rest[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const GateFactors& f = factors[e % kOwn][h];
              const float value = to_float(pair.of[h].values[e]);
              const float t = fmaf(value - f.mean, f.scale, f.offset);
              const float weak = sigmoid(t) * value;
              kept[h] = t > args.limit ? value : weak;
              rest[h] = t > args.limit ? 0.f : weak;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              result.of[h].values[e] = from_float<T>(kept[h] + rest[1 - h]);
            }
          }
          const int at = lane.offset + s * lane.step;
          store_vector(out + at, result.of[0]);
          store_vector(out + at + args.to_partner, result.of[1]);
        });
  }
}

template <class T>
struct Backward {
  const T* grad_out;
  const T* x;
  T* grad_x;
  Parameters parameters;
  const float* statistics;
  float* sums;    // (2, batch, channels): U0, U1 of kernelpose/spatial_gate.h
  float* shares;  // (batch, units): sum over the unit of share times its gradient
  int64_t batch;
  Unit unit;
  int to_partner;
  float limit;
};

struct Through {
  float to_t, to_x;
};

// What t and x themselves get from the gradients of a channel's result and its partner's.
__device__ __forceinline__ Through through_gate(float t, float x, float own, float partner,
                                                float limit) {
  const float r = sigmoid(t), weak = r * (own + partner);
  return t > limit ? Through{0.f, own} : Through{x * weak * (1.f - r), weak};
}

template <class T, int N>
struct Pairs {
  Pair<T, N> x, grad;
};

template <class T, int N, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1)
    spatial_gate_backward_kernel(const Backward<T> args) {
  KP_DYNAMIC_SHARED(float, shared);
  constexpr int kOwn = kChannelsLast ? N : 1;
  const Unit& u = args.unit;
  const int64_t image = blockIdx.x / u.units;
  const int unit = blockIdx.x % u.units, warp = threadIdx.x / 32;
  const T* const x = args.x + image * u.image();
  const T* const grad_out = args.grad_out + image * u.image();
  T* const grad_x = args.grad_x + image * u.image();
  const float* const statistics = args.statistics + 2 * image * u.units * u.groups;
  float* const partial = shared;  // (parts, 2, 2 * count)
  float* const slope = partial + 2 * u.sums();
  float* const constant = slope + u.groups;
  float* const of_shares = constant + u.groups;
  float* const inverse = of_shares + u.groups;
  const auto factors_of = [&](int j) {
    const int channel = u.channel(unit, j), group = channel / u.size;
    return args.parameters.factors(channel, *inverse, statistics[2 * group],
                                   statistics[2 * group + 1]);
  };
  const auto fetch = [&](const Lane& lane, int s) {
    const int at = lane.offset + s * lane.step;
    return Pairs<T, N>{load_pair<T, N>(x, at, args.to_partner),
                       load_pair<T, N>(grad_out, at, args.to_partner)};
  };

  if (warp == 0) {
    const float sum = inverse_sum(args.parameters.weight, u.channels);
    if (threadIdx.x == 0) *inverse = sum;
  }
  __syncthreads();
  for (int task = warp; task < u.tasks; task += kWarps) {
    const Lane lane = lane_of<N, kChannelsLast>(u, unit, task);
    GateFactors factors[kOwn][2];
    float sums[kOwn][2][2] = {};
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factors[e][h] = factors_of(min(lane.j + e, u.count - 1) + h * u.count);
      }
    }
    for_each_step<2>(
        lane, [&](int s) { return fetch(lane, s); },
        [&](int, const Pairs<T, N>& in) {
#pragma unroll
          for (int e = 0; e < N; ++e) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const GateFactors& f = factors[e % kOwn][h];
              const float value = to_float(in.x.of[h].values[e]), centred = value - f.mean;
              const float to_t = through_gate(fmaf(centred, f.scale, f.offset), value,
                                              to_float(in.grad.of[h].values[e]),
                                              to_float(in.grad.of[1 - h].values[e]), args.limit)
                                     .to_t;
              sums[e % kOwn][h][0] += to_t;
              sums[e % kOwn][h][1] += to_t * centred;
            }
          }
        });
    put_sums<N, kChannelsLast>(u, lane, sums, partial);
  }
  __syncthreads();
  const auto add = [&](int j, float (&sums)[3]) {
    const int channel = u.channel(unit, j);
    const float deviation = statistics[2 * (channel / u.size) + 1];
    const float u0 = sum_of_parts<2>(u, partial, 0, j);
    const float u1 = sum_of_parts<2>(u, partial, 1, j) * deviation;
    args.sums[image * u.channels + channel] = u0;
    args.sums[(args.batch + image) * u.channels + channel] = u1;
    const float weight = args.parameters.weight[channel], share = weight * *inverse;
    sums[0] += share * weight * u0;
    sums[1] += share * weight * u1;
    sums[2] += share * (weight * u1 + args.parameters.bias[channel] * u0);
  };
  for_each_group<3>(u, add, [&](int group, const float (&sums)[3]) {
    const int channel = u.channel(unit, group * u.size);
    const float deviation = statistics[2 * (channel / u.size) + 1];
    const float factor = -deviation / (static_cast<float>(u.size) * static_cast<float>(u.pixels));
    slope[group] = factor * deviation * sums[1];
    constant[group] = factor * sums[0];
    of_shares[group] = sums[2];
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int group = 0; group < u.groups; ++group) sum += of_shares[group];
    args.shares[blockIdx.x] = sum;
  }
  for (int task = warp; task < u.tasks; task += kWarps) {
    const Lane lane = lane_of<N, kChannelsLast>(u, unit, task);
    GateFactors factors[kOwn][2];
    float slopes[kOwn][2], constants[kOwn][2];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = min(lane.j + e, u.count - 1) + h * u.count;
        factors[e][h] = factors_of(j);
        slopes[e][h] = slope[j / u.size];
        constants[e][h] = constant[j / u.size];
      }
    }
    for_each_step<2>(
        lane, [&](int s) { return fetch(lane, s); },
        [&](int s, const Pairs<T, N>& in) {
          Pair<T, N> result;
#pragma unroll
          for (int e = 0; e < N; ++e) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const GateFactors& f = factors[e % kOwn][h];
              const float value = to_float(in.x.of[h].values[e]), centred = value - f.mean;
              const Through through = through_gate(
                  fmaf(centred, f.scale, f.offset), value, to_float(in.grad.of[h].values[e]),
                  to_float(in.grad.of[1 - h].values[e]), args.limit);
              const float of_group = fmaf(centred, slopes[e % kOwn][h], constants[e % kOwn][h]);
              result.of[h].values[e] =
                  from_float<T>(fmaf(through.to_t, f.scale, through.to_x) + of_group);
            }
          }
          const int at = lane.offset + s * lane.step;
          store_vector(grad_x + at, result.of[0]);
          store_vector(grad_x + at + args.to_partner, result.of[1]);
        });
  }
}

// The gradients of weight, which is in the normalisation and in every share, and of bias: a warp
// for 32 channels.
__global__ void __launch_bounds__(32)
    spatial_gate_parameters_kernel(const float* sums, const float* shares, Parameters parameters,
                                   float* grad_weight, float* grad_bias, int64_t batch, int units,
                                   int channels) {
  const int lane = threadIdx.x, channel = blockIdx.x * 32 + lane;
  const float inverse = inverse_sum(parameters.weight, channels);
  float shared = 0.f;
  for (int64_t i = lane; i < batch * units; i += 32) shared += shares[i];
  shared = warp_sum(shared);
  if (channel >= channels) return;
  float u0 = 0.f, u1 = 0.f;
#pragma unroll 8
  for (int64_t image = 0; image < batch; ++image) {
    u0 += sums[image * channels + channel];
    u1 += sums[(batch + image) * channels + channel];
  }
  const float weight = parameters.weight[channel], share = weight * inverse;
  const float of_share = weight * u1 + parameters.bias[channel] * u0;
  grad_weight[channel] = share * u1 + (of_share - shared) * inverse;
  grad_bias[channel] = share * u0;
}

int shared_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Whether the kernels can take the shape; fills blocks.
bool fits(const SpatialGateShape& shape, const Unit& unit, unsigned& blocks) {
  if (shape.maps.image() > INT32_MAX || 2 * unit.count > kMaxUnitChannels) return false;
  if (shape.maps.batch * unit.units > INT32_MAX) return false;
  blocks = static_cast<unsigned>(shape.maps.batch * unit.units);
  return true;
}

// Whether vectors of kVector elements lie within a channel, or within the channels of a unit.
bool in_vectors(const SpatialGateShape& shape) {
  if (!shape.maps.channels_last) return shape.maps.pixels % kVector == 0;
  const int64_t unit = shape.groups % 2 == 0 ? shape.group_channels() : shape.pairs();
  return unit % kVector == 0;
}

// run(vector, channels_last): as compile-time constants.
template <class T, int kCount, class Run>
cudaError_t with_layout(const SpatialGateShape& shape, T* const (&pointers)[kCount],
                        const Run& run) {
  const bool wide = in_vectors(shape) && channel_passes::aligned(pointers);
  const auto with_vector = [&](auto channels_last) {
    return wide ? run(std::integral_constant<int, kVector>{}, channels_last)
                : run(std::integral_constant<int, 1>{}, channels_last);
  };
  return shape.maps.channels_last ? with_vector(std::true_type{}) : with_vector(std::false_type{});
}

}  // namespace

cudaError_t spatial_gate_forward(const void* x, const float* weight, const float* bias, void* out,
                                 float* statistics, const SpatialGateShape& shape, DType dtype,
                                 cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const void* const pointers[] = {x, out};
    return with_layout(shape, pointers, [&](auto vector, auto channels_last) {
      constexpr int N = decltype(vector)::value;
      constexpr bool kLast = decltype(channels_last)::value;
      const Unit unit(shape, N);
      unsigned blocks;
      if (!fits(shape, unit, blocks)) return cudaErrorInvalidValue;
      const Forward<T> args = {static_cast<const T*>(x),
                               static_cast<T*>(out),
                               {weight, bias},
                               statistics,
                               unit,
                               static_cast<int>(shape.to_partner()),
                               static_cast<float>(shape.limit),
                               static_cast<float>(shape.eps)};
      const size_t bytes = forward_floats(unit) * sizeof(float);
      if constexpr (N > 1) {
        const size_t kept = sizeof(Pair<T, N>) * unit.turns() * unit.steps * kThreads;
        if (bytes + kept <= static_cast<size_t>(shared_limit())) {
          return launch(spatial_gate_forward_kernel<T, N, kLast, true>, dim3(blocks),
                        dim3(kThreads), bytes + kept, stream, args);
        }
      }
      return launch(spatial_gate_forward_kernel<T, N, kLast, false>, dim3(blocks), dim3(kThreads),
                    bytes, stream, args);
    });
  });
}

cudaError_t spatial_gate_backward(const void* grad_out, const void* x, const float* weight,
                                  const float* bias, const float* statistics, void* grad_x,
                                  float* grad_weight, float* grad_bias, float* scratch,
                                  const SpatialGateShape& shape, DType dtype, cudaStream_t stream) {
  const int channels = static_cast<int>(shape.maps.channels);
  const Parameters parameters = {weight, bias};
  float* const shares = scratch + 2 * shape.maps.batch * shape.maps.channels;
  int units = 0;
  const cudaError_t error = channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const void* const pointers[] = {grad_out, x, grad_x};
    return with_layout(shape, pointers, [&](auto vector, auto channels_last) {
      constexpr int N = decltype(vector)::value;
      constexpr bool kLast = decltype(channels_last)::value;
      const Unit unit(shape, N);
      unsigned blocks;
      if (!fits(shape, unit, blocks)) return cudaErrorInvalidValue;
      units = unit.units;
      const Backward<T> args = {static_cast<const T*>(grad_out),
                                static_cast<const T*>(x),
                                static_cast<T*>(grad_x),
                                parameters,
                                statistics,
                                scratch,
                                shares,
                                shape.maps.batch,
                                unit,
                                static_cast<int>(shape.to_partner()),
                                static_cast<float>(shape.limit)};
      const size_t floats = 2 * unit.sums() + 3 * unit.groups + 1;
      return launch(spatial_gate_backward_kernel<T, N, kLast>, dim3(blocks), dim3(kThreads),
                    floats * sizeof(float), stream, args);
    });
  });
  if (error != cudaSuccess) return error;
  return launch(spatial_gate_parameters_kernel, dim3((channels + 31) / 32), dim3(32), 0, stream,
                static_cast<const float*>(scratch), static_cast<const float*>(shares), parameters,
                grad_weight, grad_bias, shape.maps.batch, units, channels);
}

}  // namespace kernelpose::cuda
