"""MobileViTPose as a module: recorded, counted, both variants, sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernelpose
from kernelpose.backend import OPS
from kernelpose.models import MobileViT, MobileViTPose
from kernelpose.models.counting import count
from kernelpose.nn.mobilevit_block import VARIANTS
from kernelpose.ops import inverted_bottleneck
from tests.nn.test_mobilevit_block import shaken

TINY: dict[str, Any] = {
    "features_list": (8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 32),
    "d_list": (16, 20, 24),
    "transformer_depth": (1, 2, 1),
    "expansion": 2,
}


def tiny(**options: Any) -> MobileViTPose:
    torch.manual_seed(0)
    defaults = {**TINY, "image_size": (128, 64), "num_keypoints": 5}
    model = MobileViTPose(**{**defaults, **options})
    for part in model.keypoint_head.modules() if hasattr(model, "keypoint_head") else ():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(part.weight, std=0.02)
    shaken(model)
    return model


def image(batch: int = 2, size: tuple[int, int] = (128, 64)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_products_are_those_that_run(variant: str) -> None:
    backbone = tiny(variant=variant).backbone
    with torch.no_grad(), kernelpose.backend("eager"), FlopCounterMode(display=False) as counter:
        backbone(image(1))
    assert 2 * count(backbone, (128, 64)).all == counter.get_total_flops()


def test_the_released_backbone(shared: Path) -> None:
    golden = torch.load(shared / "golden" / "mobilevit_mini_released.pt", weights_only=True)
    sizes = {name: golden["config"][name] for name in TINY}
    model = MobileViT(**sizes).eval()
    model.load_state_dict(golden["state_dict"])
    with torch.no_grad():
        found = model(golden["input"])
    torch.testing.assert_close(found, golden["output"], rtol=1e-5, atol=1e-5)


def test_names_of_the_paper_variant_are_timms() -> None:
    """With those of its parameters that a MobileViT of timm has in each part."""
    names = set(MobileViT(**TINY, variant="apple").state_dict())
    for name in (
        "stem.conv.weight",
        "stem.bn.running_var",
        "stages.0.0.conv1_1x1.conv.weight",
        "stages.1.2.conv2_kxk.bn.weight",
        "stages.1.2.conv3_1x1.bn.bias",
        "stages.2.1.conv_kxk.conv.weight",
        "stages.2.1.conv_1x1.weight",
        "stages.3.1.transformer.1.attn.qkv.bias",
        "stages.4.1.transformer.0.mlp.fc2.weight",
        "stages.4.1.norm.bias",
        "stages.4.1.conv_fusion.bn.num_batches_tracked",
        "final_conv.bn.weight",
    ):
        assert name in names
    assert {name.split(".")[0] for name in names} == {"stem", "stages", "final_conv"}


@pytest.mark.parametrize("decoder", ["classic", "simple"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_heatmaps_are_a_quarter_of_any_image(variant: str, decoder: str) -> None:
    model = tiny(variant=variant, decoder=decoder)
    assert model.heatmap_size == (32, 16)
    sizes = [(64, 128)] if variant == "apple" else [(32, 32), (96, 160)]
    for size in sizes:
        assert model(image(size=size)).shape == (2, 5, size[0] // 4, size[1] // 4)


@pytest.mark.parametrize(("variant", "unit"), [("released", 32), ("apple", 64)])
def test_images_that_the_strides_do_not_divide_are_refused(variant: str, unit: int) -> None:
    message = rf"images has shape \(2, 3, 128, {3 * unit // 2}\); .* divisible by {unit}\."
    with pytest.raises(ValueError, match=message):
        tiny(variant=variant)(image(size=(128, 3 * unit // 2)))


def test_live_norms_and_folded_ones_give_one_gradient_in_eval_mode() -> None:
    model, x = tiny().double(), image().double()
    names = ["backbone.stem.1.conv.2.weight", "backbone.stage1.0.conv.1.norm_layer.weight"]
    parameters = [model.get_parameter(name) for name in names]
    found = torch.autograd.grad(model(x).square().mean(), parameters)
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()  # live to `can_fold`, yet with the kept statistics
            module.forward = lambda y, n=module: nn.functional.batch_norm(
                y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps
            )
    expected = torch.autograd.grad(model(x).square().mean(), parameters)
    torch.testing.assert_close(found, expected)


def test_a_decoder_a_data_set() -> None:
    model = tiny(num_keypoints={"coco": 5, "mpii": 4})
    assert model(image(), dataset="mpii").shape == (2, 4, 32, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "timm"}, "variant is 'timm'; expected one of released, apple"),
        ({"image_size": (256, 200)}, r"image_size is \(256, 200\); expected .* divisible by 32"),
        (
            {"image_size": (96, 64), "variant": "apple"},
            r"image_size is \(96, 64\); expected .* divisible by 64",
        ),
        ({"decoder": "simcc"}, "decoder is 'simcc'; expected 'classic' or 'simple'"),
        ({"deconv_channels": (8,)}, r"deconv_channels is \(8,\); expected 3 widths"),
        ({"features_list": (8,) * 10}, r"features_list is .*; expected 11 positive integers"),
        ({"d_list": (8, 0, 8)}, r"d_list is \(8, 0, 8\); expected 3 positive integers"),
        ({"expansion": 1.5}, "expansion is 1.5; expected a positive integer"),
        ({"num_keypoints": 0}, "num_keypoints is 0; expected"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpus_kernels_take_every_inverted_residual(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each gives to its op has one dtype and no objection, in inference."""
    backbone = tiny(variant=variant).eval().backbone.to(dtype)
    spec = OPS["inverted_bottleneck"]
    calls: list[set[torch.dtype]] = []

    def spy(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append({t.dtype for t in tensors})
        for backend in ("cuda", "triton"):
            assert dtype in spec.dtypes[backend] and backend in spec.automatic(gpu)
            assert spec.objection(backend, *tensors, **options) is None
        return inverted_bottleneck(*tensors, **options)

    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(kernelpose.ops, "inverted_bottleneck", spy)
    with torch.no_grad():
        found = backbone(image(1).to(dtype))
    assert found.dtype == dtype and calls == 7 * [{dtype}]
