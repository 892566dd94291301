"""One forward and backward of every op's example on the GPU, for compute-sanitizer to watch.

`compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize`
"""

from __future__ import annotations

import torch

import kernelpose
from kernelpose.backend import OPS


def main() -> None:
    device = torch.device("cuda")
    for name, spec in OPS.items():
        for dtype in spec.dtypes.get("cuda", ()):
            inputs, options = spec.example(device, dtype)
            leaves = [x.normal_().requires_grad_() for x in inputs if x.is_floating_point()]
            output = getattr(kernelpose.ops, name)(*inputs, **options, backend="cuda")
            torch.autograd.grad(output.sum(), leaves)
            torch.cuda.synchronize()
            print(f"{name} {dtype}: ran")


if __name__ == "__main__":
    main()
