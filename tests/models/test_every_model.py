"""What every model with every decoder does: learn, save, compile, export, autocast, any batch.

Quickly of thin models, one for each form of each family; with --full of every model of the zoo,
as large as it is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import kernelpose
from kernelpose.models import ModelInfo, create_model, list_models
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.vit import DropPath
from tests.models import (
    test_hevitpose,
    test_hrpvt,
    test_mitpose,
    test_mobilevitpose,
    test_vitpose,
)
from tests.parity import assert_parity

Forms = dict[str, tuple[Callable[..., PoseModel], Sequence[str]]]

THIN: Forms = {
    "vitpose": (test_vitpose.tiny, ("classic", "simple")),
    "mitpose": (test_mitpose.tiny, ("simple", "classic")),
    "mitpose released": (partial(test_mitpose.tiny, layout="released"), ("simple", "classic")),
    "hevitpose": (test_hevitpose.tiny, ("classic", "simple")),
    "mobilevitpose": (test_mobilevitpose.tiny, ("classic", "simple")),
    "hrpvt": (partial(test_hrpvt.tiny, image_size=(96, 64)), ("simcc", "classic", "simple")),
}
OTHER_THIN: Forms = {
    "vitpose windows": (
        partial(test_vitpose.tiny, patch_stride=8, attention="window+shift+pool", window=(4, 3)),
        ("classic", "simple"),
    ),
    "mobilevitpose apple": (partial(test_mobilevitpose.tiny, variant="apple"), ("classic",)),
    "hrpvt stage": (partial(test_hrpvt.tiny, image_size=(96, 64), insertion="stage"), ("simcc",)),
}

# Each family with its first decoder first: every decoder is among them.
FORMS = [
    (form, decoder)
    for thin, chosen in ((THIN, slice(1)), (THIN, slice(1, None)), (OTHER_THIN, slice(None)))
    for form, (_, decoders) in thin.items()
    for decoder in decoders[chosen]
]

# Softmax cancels what is the same in every key, but for rounding.
CANCELLED = (".k.bias", ".norm_k.bias")


def few(number: int) -> pytest.MarkDecorator:
    """For what takes long: quickly of so many forms alone."""
    params = [
        pytest.param(each, id=" ".join(each), marks=[] if i < number else [pytest.mark.full])
        for i, each in enumerate(FORMS)
    ]
    return pytest.mark.parametrize("thin", params, indirect=True)


class Made(NamedTuple):
    """A model in eval mode, and how to make it again."""

    model: PoseModel
    again: Callable[[], PoseModel]

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, *self.model.image_size, generator=generator)


@pytest.fixture(scope="module", params=FORMS, ids=" ".join)
def thin(request: pytest.FixtureRequest) -> Made:
    form, decoder = request.param
    again = partial((THIN | OTHER_THIN)[form][0], decoder=decoder)
    return Made(again(), again)


def _image_size(info: ModelInfo) -> tuple[int, int]:
    return info.image_size if info.gmacs < 20 else (128, 64)


@pytest.fixture(
    scope="module",
    params=[(info, decoder) for info in list_models() for decoder in info.decoders],
    ids=lambda param: f"{param[0].name} {param[1]}",
)
def whole(request: pytest.FixtureRequest) -> Made:
    info, decoder = request.param
    again = partial(create_model, info.name, decoder=decoder, image_size=_image_size(info))
    torch.manual_seed(0)
    model = again().eval()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.probability = 0.0  # else whole layers may have no gradient
    return Made(model, again)


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def squares(found: Any) -> Tensor:
    return sum((y.square().mean() for y in outputs(found)), torch.zeros(()))


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """No further off than so much of the spread."""
    for y, reference in zip(outputs(found), outputs(expected), strict=True):
        assert y.shape == reference.shape
        if y.numel():
            spread = reference.max() - reference.min()
            assert (y.float() - reference).abs().max() <= tolerance * spread


def learns(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    try:
        squares(model.train()(images)).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if not n.endswith(CANCELLED)}
        still = [n for n, grad in gradients.items() if grad is None or not grad.any()]
        assert still == []
        assert all(grad.isfinite().all() for grad in gradients.values())
    finally:
        model.eval().zero_grad()


def comes_back(made: Made) -> None:
    file = io.BytesIO()
    torch.save(made.model.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        other = made.again().eval()
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    with torch.no_grad():
        for found, expected in zip(
            outputs(other(made.images(1))), outputs(made.model(made.images(1))), strict=True
        ):
            assert torch.equal(found, expected)


def compiles(made: Made, backend: str) -> None:
    x = made.images(2)
    compiled = torch.compile(made.model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_near(compiled(x), made.model(x), 1e-4)


def autocasts(made: Made) -> None:
    """At most twice as far from float32 as eager is."""
    x = made.images(2)
    with torch.no_grad():
        exact = made.model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = made.model(x)
            with kernelpose.backend("eager"):
                eager = made.model(x)
    for y, in_bfloat16, in_float32 in zip(*map(outputs, (found, eager, exact)), strict=True):
        assert y.dtype == in_bfloat16.dtype == torch.bfloat16
        assert_parity(y, in_bfloat16, in_float32)


def test_every_family_is_there_with_its_decoders() -> None:
    families = {re.sub("-[a-z]+(-|$)", " ", info.name).strip(): info for info in list_models()}
    assert {name: info.decoders for name, info in families.items()} == {
        form: decoders for form, (_, decoders) in THIN.items()
    }


def test_every_parameter_of_a_thin_model_learns(thin: Made) -> None:
    state = {name: tensor.clone() for name, tensor in thin.model.state_dict().items()}
    learns(thin.model, thin.images(2))
    with torch.autocast("cpu", torch.bfloat16):
        learns(thin.model, thin.images(2))
    thin.model.load_state_dict(state)  # the norms' statistics


def test_a_hook_on_any_layer_of_a_thin_model_sees_it_called(thin: Made) -> None:
    lists = (nn.Sequential, nn.ModuleList)  # of which some are gone through
    layers = {n: m for n, m in thin.model.named_modules() if n and not isinstance(m, lists)}
    called: set[str] = set()
    handles = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        expected = thin.model(thin.images(1))
        for handle in handles:
            handle.remove()
        assert called == set(layers)
        assert_near(thin.model(thin.images(1)), expected, 1e-5)


def test_a_thin_model_comes_back_from_a_file(thin: Made) -> None:
    comes_back(thin)


@few(len(THIN))
def test_a_thin_model_compiles_whole(thin: Made) -> None:
    compiles(thin, "aot_eager")


def test_a_thin_model_autocasts(thin: Made) -> None:
    autocasts(thin)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_thin_model_is_its_eager_twin(thin: Made, batch: int) -> None:
    """By the rule for ops: at most twice as far from float64 as eager is."""
    x = thin.images(batch)
    with torch.no_grad():
        found = thin.model(x)
        with kernelpose.backend("eager"):
            eager = thin.model(x)
            exact = thin.again().double()(x.double())
    for y, in_float32, in_float64 in zip(*map(outputs, (found, eager, exact)), strict=True):
        assert_parity(y, in_float32, in_float64)


@pytest.mark.parametrize("batch", [0, 3])
def test_a_thin_model_has_its_eager_twins_gradients(thin: Made, batch: int) -> None:
    def gradients() -> list[Tensor]:
        parameters = dict(thin.model.named_parameters())
        kept = [p for n, p in parameters.items() if not n.endswith(CANCELLED)]
        return list(torch.autograd.grad(squares(thin.model(thin.images(batch))), kept))

    found = gradients()
    with kernelpose.backend("eager"):
        expected = gradients()
    for gradient, reference in zip(found, expected, strict=True):
        scale = reference.abs().max() if batch else 0.0
        torch.testing.assert_close(gradient, reference, rtol=0, atol=float(1e-4 * scale))


@pytest.mark.full
def test_a_thin_model_compiles_to_code(thin: Made) -> None:
    compiles(thin, "inductor")
    compiled = torch.compile(thin.model, fullgraph=True)
    state = {name: tensor.clone() for name, tensor in thin.model.state_dict().items()}
    learns(compiled, thin.images(2))
    thin.model.load_state_dict(state)


@few(1)
@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_a_thin_model_exports_with_its_kernels(thin: Made) -> None:
    """As docs/export.md has it."""
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(
            thin.model, (thin.images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        assert any("kernelpose" in str(node.target) for node in loaded.graph.nodes)
        for batch in (1, 3):
            x = thin.images(batch)
            assert_near(loaded.module()(x), thin.model(x), 1e-5)


@few(1)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_thin_model_exports_to_onnx(thin: Made, tmp_path: Path) -> None:
    """As docs/export.md has it."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs what was exported")
    path = tmp_path / "model.onnx"
    with torch.no_grad(), kernelpose.backend("eager"):
        torch.onnx.export(
            thin.model,
            (thin.images(2),),
            path,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = thin.images(batch)
        found = tuple(map(torch.from_numpy, session.run(None, {"images": x.numpy()})))
        with torch.no_grad(), kernelpose.backend("eager"):
            assert_near(found, thin.model(x), 1e-5)


@pytest.mark.full
def test_every_parameter_learns(whole: Made) -> None:
    learns(whole.model, whole.images(2))


@pytest.mark.full
def test_comes_back_from_a_file(whole: Made) -> None:
    comes_back(whole)


@pytest.mark.full
def test_compiles_whole(whole: Made) -> None:
    compiles(whole, "aot_eager")


@pytest.mark.full
def test_autocasts(whole: Made) -> None:
    autocasts(whole)


@pytest.mark.full
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_is_its_eager_twin(whole: Made, batch: int) -> None:
    x = whole.images(batch)
    with torch.no_grad():
        found = whole.model(x)
        with kernelpose.backend("eager"):
            assert_near(found, whole.model(x), 1e-4)
