"""A deconvolution of kernel 4 and stride 2, the BatchNorm of its result, and ReLU, as one call."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kernelpose import _native
from kernelpose.nn.folding import Folder, can_fold, fold
from kernelpose.nn.inference import core_infers
from kernelpose.nn.untouched import has_geometry, unhooked, untouched

_LEAST_OUTPUTS = 32  # with 16, torch's own takes 0.8 of the time


class DeconvNormRelu:
    """relu(norm(deconv(x))) for inference: maps (B, C, H, W) -> (B, outputs, 2 H, 2 W).

    The norm is folded, and Winograd's F(2x2, 2x2) takes 9 products in place of 16: in float32 on a
    CPU, where neither a gradient nor a graph is wanted and no backend is named. The factors made of
    the weight, 2.25 times as large as it, are kept until a tensor changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def suits(
        self, x: Tensor, deconv: nn.Module, norm: nn.Module, relu: nn.Module | None = None
    ) -> bool:
        """Whether that is so, and deconv is of kernel 4, stride 2, padding 1 and one group.

        relu: where it is a layer, too.
        """
        if not untouched(deconv, norm):
            return False
        if relu is not None and not (type(relu) is nn.ReLU and unhooked(relu)):
            return False
        assert isinstance(deconv, nn.ConvTranspose2d) and isinstance(norm, _BatchNorm)
        tensors = (x, deconv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (
            can_fold([norm])
            and core_infers(*tensors)
            and x.ndim == 4
            and x.shape[1] == deconv.in_channels
            and deconv.weight.shape[:2] == (x.shape[1], norm.num_features)
            and norm.num_features >= _LEAST_OUTPUTS
            and has_geometry(deconv, 4, stride=2, padding=1)
        )

    def __call__(self, x: Tensor, deconv: nn.Module, norm: nn.Module) -> Tensor:
        ((packed, bias),) = self._folder([(deconv, norm)])
        x = x.permute(0, 2, 3, 1).contiguous()
        batch, height, width, _ = x.shape
        out = x.new_empty(batch, 2 * height, 2 * width, len(bias))
        if out.numel():
            addresses = [t.data_ptr() for t in (x, packed, bias, out)]
            _native.call("deconvolution", x, *addresses, (*x.shape, len(bias)))
        return out.permute(0, 3, 1, 2)


def _pack(deconv: nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The weight's factors as the core takes them, and the bias."""
    weight, bias = fold(deconv, norm)
    weight = weight.contiguous()
    inputs, outputs = weight.shape[:2]
    packed = weight.new_empty(_native.call("deconvolution_packed_size", weight, inputs, outputs))
    addresses = weight.data_ptr(), packed.data_ptr()
    _native.call("deconvolution_pack", weight, *addresses, inputs, outputs)
    return packed, bias
