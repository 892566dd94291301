"""What tracing takes an op's results to be, forward and backward: shapes, strides, types.

Compiled code relies on it: torch.compile stops where a gradient lies otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_utils import CrossRefFakeMode
from torch.utils._pytree import tree_leaves, tree_map_only

import kernelpose.ops
from kernelpose.backend import OPS


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [name for name, spec in OPS.items() if "cpu" in spec.dtypes])
def test_results_lie_as_tracing_takes_them_to(name: str, channels_last: bool) -> None:
    spec, ran = OPS[name], []
    learns = spec.directions == "fwd+bwd"

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if channels_last and tensor.ndim == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        return torch.rand_like(tensor).add_(1).requires_grad_(learns)

    def ignored(function: Any) -> bool:
        if function.namespace == "kernelpose":
            ran.append(str(function))
        return bool(function.namespace != "kernelpose")

    torch.manual_seed(0)
    inputs, options = tree_map_only(Tensor, drawn, spec.example(torch.device("cpu"), torch.float32))
    with CrossRefFakeMode(ignored, only_check_ops_with_meta=False):
        results = getattr(kernelpose.ops, name)(*inputs, backend="cpu", **options)
        results = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        if learns:
            torch.autograd.backward(results, [torch.randn_like(result) for result in results])
    assert len(set(ran)) >= 1 + learns
