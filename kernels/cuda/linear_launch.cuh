// Launches the products of linear.cuh: tensor maps, the number of warpgroups.
#pragma once

#include "linear.cuh"

namespace dcngen::linear {

inline cudaError_t encode_rows(CUtensorMap& map, const void* first, int64_t rows, int64_t features, int rows_of_box) {
  return encode_box_map(map, {first, 2, 1, 1, rows, features, features}, {kPanel, rows_of_box, 1, true});
}

// Sizes and maps of a product that sums over `inner` features.
inline cudaError_t fill(LinearProblem& problem, const LinearArgs& args, int inner, int outer) {
  problem.tiles = static_cast<int>((args.rows + kTileRows - 1) / kTileRows);
  problem.inner_panels = inner / kPanel;
  problem.all_panels = outer / kPanel;
  problem.shares = shares(problem.inner_panels, problem.all_panels);
  problem.outer_panels = (problem.all_panels + problem.shares - 1) / problem.shares;
  cudaError_t error = encode_rows(problem.left_map, args.left, args.rows, inner, kTileRows);
  if (error == cudaSuccess) error = encode_rows(problem.weight_map, args.weight, outer, inner, kPanel);
  if (error == cudaSuccess) error = encode_rows(problem.result_map, args.result, args.rows, outer, 16);
  return error;
}

// As many blocks as the device has multiprocessors. In the backward each of their warpgroups leaves a row of sums.
template <auto KERNEL>
cudaError_t launch_linear(const LinearProblem& problem, cudaStream_t stream) {
  const int inner = problem.inner_panels, outer = problem.outer_panels;
  static OncePerDevice prepared;
  const cudaError_t error = prepared.run(
      [] { return cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory); });
  if (error != cudaSuccess) return error;
  return launch(KERNEL, multiprocessors() / problem.shares * problem.shares, LinearMemory::warpgroups(inner, outer) * 128,
                LinearMemory::bytes(inner, outer), stream, true, problem);
}

template <typename T>
cudaError_t forward_typed(const LinearArgs& args, cudaStream_t stream) {
  LinearProblem problem = {};
  problem.bias = args.bias;
  const cudaError_t error = fill(problem, args, args.in_features, args.out_features);
  if (error != cudaSuccess) return error;
  return problem.inner_panels == 2 ? launch_linear<linear_forward_kernel<T, 2>>(problem, stream)
                                   : launch_linear<linear_forward_kernel<T, 4>>(problem, stream);
}

template <typename T>
cudaError_t backward_typed(const LinearArgs& args, cudaStream_t stream) {
  LinearProblem problem = {};
  problem.sums = args.sums;
  const cudaError_t error = fill(problem, args, args.out_features, args.in_features);
  if (error != cudaSuccess) return error;
  if (problem.outer_panels == 4) return launch_linear<linear_backward_kernel<T, 4, 4>>(problem, stream);
  switch (problem.inner_panels) {
    case 2: return launch_linear<linear_backward_kernel<T, 2, 2>>(problem, stream);
    case 3: return launch_linear<linear_backward_kernel<T, 3, 2>>(problem, stream);
    case 4: return launch_linear<linear_backward_kernel<T, 4, 2>>(problem, stream);
    case 5: return launch_linear<linear_backward_kernel<T, 5, 2>>(problem, stream);
    default: return launch_linear<linear_backward_kernel<T, 6, 2>>(problem, stream);
  }
}

}  // namespace dcngen::linear
