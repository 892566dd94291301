"""Checkpoints of other people's code, and the heatmaps that it computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernelpose.checkpoints import LAYOUTS, convert_state_dict, infer_config, load_checkpoint
from kernelpose.models import ViTPose

GOLDEN = [
    (f"vitpose_mini_{host}_{decoder}.pt", layout, decoder)
    for host, layout in (("mmpose1x", "mmpose1"), ("hf", "transformers"))
    for decoder in ("classic", "simple")
]


def heatmaps(golden: dict[str, Any], checkpoint: Any, **options: Any) -> torch.Tensor:
    model = ViTPose(**{**infer_config(checkpoint, num_heads=4), **options}).eval()
    report = load_checkpoint(model, checkpoint)
    assert not report.missing and not report.left_over
    with torch.no_grad():
        found: torch.Tensor = model(golden["input"].float())
    return found


@pytest.mark.parametrize(("file", "layout", "decoder"), GOLDEN)
def test_heatmaps_are_reproduced(shared: Path, file: str, layout: str, decoder: str) -> None:
    path = shared / "golden" / file
    golden = torch.load(path, weights_only=True)
    config = infer_config(path, num_heads=4)
    assert config["decoder"] == decoder
    assert (config["embed_dim"], config["depth"], config["image_size"]) == (64, 3, (256, 192))
    expected = golden["heatmaps"]
    tolerance = 1e-4 * (expected.max() - expected.min())
    found = heatmaps(golden, path)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance
    assert load_checkpoint(ViTPose(**config), path).layout == layout


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize(("file", "layout", "decoder"), GOLDEN)
def test_every_layout_gives_the_same_heatmaps(
    shared: Path, file: str, layout: str, decoder: str, to: str
) -> None:
    golden = torch.load(shared / "golden" / file, weights_only=True)
    converted, _ = convert_state_dict(golden, to)
    expected = golden["heatmaps"]
    tolerance = 1e-4 * (expected.max() - expected.min())
    eps = infer_config(golden, num_heads=4)["layer_norm_eps"]
    found = heatmaps(golden, converted, layer_norm_eps=eps)
    assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize(("file", "layout", "decoder"), GOLDEN)
def test_round_trips_bit_for_bit(shared: Path, file: str, layout: str, decoder: str) -> None:
    state = torch.load(shared / "golden" / file, weights_only=True)["state_dict"]
    ours, _ = convert_state_dict(state, "kernelpose")
    back, _ = convert_state_dict(ours, layout)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_epsilon_of_transformers_matters(shared: Path) -> None:
    golden = torch.load(shared / "golden" / "vitpose_mini_hf_classic.pt", weights_only=True)
    model = ViTPose(**{**infer_config(golden, num_heads=4), "layer_norm_eps": 1e-6})
    report = load_checkpoint(model, golden)
    assert report.notes == ("transformers runs it with layer_norm_eps=1e-12, the model has 1e-06",)
