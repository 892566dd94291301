"""`kernelpose demo` leaves two pictures, and says when outputs differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

import kernelpose
from kernelpose.cli import main
from kernelpose.data.images import read_image, write_png
from kernelpose.models import HRPVT
from kernelpose.pipeline import demo
from kernelpose.pipeline.timing import interleaved


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tiny_vitpose: list[str]) -> None:
    def two_rounds(samplers, **_):
        return interleaved(samplers, budget_s=0, min_rounds=2, max_rounds=2)

    monkeypatch.setattr(demo, "interleaved", two_rounds)


def test_on_the_drawn_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("(equal to 1e-04)") == 2
    assert output.count("eager PyTorch") == 3
    picture = read_image(tmp_path / "demo_pose.png")
    assert picture.shape[1] > 3 * 480
    # The last panel differs from the first by the skeleton that was decoded.
    first, last = picture[50:600, 18 : 18 + 480], picture[50:600, -18 - 480 : -18]
    assert 0.01 < (np.abs(first.astype(int) - last) > 40).any(-1).mean() < 0.3
    chart = read_image(tmp_path / "demo_speed.png")
    assert len(np.unique(chart.reshape(-1, 3), axis=0)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo_pose.png", "demo_speed.png"]


def test_on_a_picture(tmp_path: Path, pictures, tiny_vitpose: list[str]) -> None:
    write_png(tmp_path / "a.png", pictures(1)[0])
    code = main(["demo", "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"),
                 "--model", "vitpose-s"])  # fmt: skip
    assert code == 0
    assert set(tiny_vitpose) == {"vitpose-s"}
    assert (tmp_path / "out/demo_pose.png").is_file()
    assert main(["demo", "--image", "missing.png", "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("image", [None, "a.png"])
def test_a_simcc_model(
    tmp_path: Path, image: str | None, pictures, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "image_size": (64, 48)}
    monkeypatch.setattr(kernelpose, "create_model", lambda name: HRPVT(**sizes))
    write_png(tmp_path / "a.png", pictures(1)[0])
    given = [] if image is None else ["--image", str(tmp_path / image)]
    assert main(["demo", "--model", "hrpvt-s", *given, "--out", str(tmp_path / "out")]) == 0
    assert "hrpvt-s\n  largest difference from eager" in capsys.readouterr().out
    assert (tmp_path / "out/demo_pose.png").is_file()


def test_a_backbone_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "pvtv2-b0", "--out", str(tmp_path / "out")]) == 2
    assert "pvtv2-b0 is a backbone alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_differing_outputs_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kernelpose.backend import choose
    from kernelpose.models import ViTPose

    forward = ViTPose.forward

    def off_unless_eager(self, images, dataset=None):
        heatmaps = forward(self, images, dataset)
        qkv = images.new_zeros(1, 2, 2, 6)
        eager = choose("window_attention", None, qkv, num_heads=1) == "eager"
        return heatmaps if eager else heatmaps + 1e-3 * (heatmaps.max() - heatmaps.min())

    monkeypatch.setattr(ViTPose, "forward", off_unless_eager)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "NOT EQUAL to 1e-04" in capsys.readouterr().out
