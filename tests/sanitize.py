"""Every op's example on the GPU, forward and, where there is one, backward, for compute-sanitizer.

`compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize`
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernelpose
from kernelpose.backend import OPS


def main() -> None:
    device = torch.device("cuda")
    for name, spec in OPS.items():
        for dtype in spec.dtypes.get("cuda", ()):
            inputs, options = spec.example(device, dtype)
            backward = spec.directions == "fwd+bwd"
            tensors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
            leaves = [x.normal_().requires_grad_(backward) for x in tensors]
            output = getattr(kernelpose.ops, name)(*inputs, **options, backend="cuda")
            if backward:
                torch.autograd.grad(output.sum(), leaves)
            torch.cuda.synchronize()
            print(f"{name} {dtype}: ran")


if __name__ == "__main__":
    main()
