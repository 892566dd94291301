"""`kernelpose bench pipeline`: two paths with one answer, and where their time goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

from kernelpose.cli import main
from kernelpose.data.images import read_image, write_png
from kernelpose.pipeline import bench, outputs, plain
from kernelpose.pipeline.bench import STAGES


@pytest.mark.usefixtures("tiny_vitpose")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_table_chart_and_figures(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--persons", "1", "3", "--budget", "0", "--dtype", dtype, "--out", str(tmp_path)]
    assert main(["bench", "pipeline", *arguments]) == 0
    output = capsys.readouterr().out
    for heading in ("1 person, ms", "3 persons, ms", *STAGES, "all but forward"):
        assert f"\n{heading} " in output
    figures = json.loads((tmp_path / "pipeline.json").read_text())
    assert (figures["model"], figures["dtype"]) == ("vitpose-b", dtype)
    assert list(figures["seconds"]) == ["1", "3"]
    for paths in figures["seconds"].values():
        assert set(paths) == {"plain", "kernelpose"}
        for times in paths.values():
            assert tuple(times) == STAGES
            assert all(seconds > 0 for seconds in times.values())
    chart = read_image(tmp_path / "pipeline.png")
    assert len(np.unique(chart.reshape(-1, 3), axis=0)) > 50
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["mosaic", "simcc_mosaic"])
def test_both_paths_find_the_same(
    tmp_path: Path, pictures, kind: str, request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else their times would not compare; what they find is caught on its way."""
    found: dict[str, list[np.ndarray]] = {"ours": [], "plain": []}
    decode, to_image = outputs.decode, plain.to_image
    model = request.getfixturevalue(kind)

    def ours(*args, **options):
        keypoints, scores = decode(*args, **options)
        found["ours"].append(keypoints.numpy())
        return keypoints, scores

    def plainly(*args):
        found["plain"].append(to_image(*args))
        return found["plain"][-1]

    monkeypatch.setattr(outputs, "decode", ours)
    monkeypatch.setattr(plain, "to_image", plainly)
    monkeypatch.setattr(bench, "persons_a_pass", lambda model: 2)
    write_png(tmp_path / "a.png", np.kron(pictures(1)[0], np.ones((4, 4, 1), np.uint8)))
    boxes = bench._boxes(tmp_path / "a.png", 5)
    with torch.inference_mode():
        for path in (bench._ours, bench._plainly):
            path(model, tmp_path / "a.png", boxes)
    ours_, plain_ = (np.concatenate(found[name]) for name in ("ours", "plain"))
    assert ours_.shape == (5, 17, 2)
    assert [len(part) for part in found["ours"]] == [2, 2, 1]
    # A grey level of the crop may move a peak, of noise to another place.
    assert np.median(np.abs(ours_ - plain_)) < 1e-2
    assert (np.abs(ours_ - plain_).max(-1) < 0.5).mean() > 0.9


@pytest.mark.usefixtures("tiny_vitpose")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.jpg"], "missing.jpg is no file; expected an image"),
        (["--persons", "0"], "0 is not a number of persons"),
        (["--persons", "x"], "x is not a number of persons"),
    ],
)
def test_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = main(["bench", "pipeline", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
