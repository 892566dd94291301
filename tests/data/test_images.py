"""Reading pictures: upright, in RGB, and with a sentence for what is none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from kernelpose.data.files import make_directory, replacing
from kernelpose.data.images import read_image, write_png
from kernelpose.errors import UserError

Image = pytest.importorskip("PIL.Image")

COLORS = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


def test_png_round_trip(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", COLORS)
    assert np.array_equal(read_image(tmp_path / "a.png"), COLORS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(COLORS).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert np.array_equal(image, np.rot90(COLORS, -1))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLORS).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        upright = np.array(pytest.importorskip("PIL.ImageOps").exif_transpose(image))
    assert np.array_equal(read_image(tmp_path / "turned.png"), upright)


def test_exif_that_cannot_be_written_again(tmp_path: Path) -> None:
    """A tag of another type than EXIF's, beside the orientation, costs nobody the picture."""
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.fromarray(COLORS).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(COLORS, -1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.fromarray(COLORS).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (5, 4, 3)
    assert image.dtype == np.uint8


def test_what_is_no_picture(tmp_path: Path) -> None:
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.png"
    text.write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_png(cut, noise)
    cut.write_bytes(cut.read_bytes()[:5000])
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, message in (
        (tmp_path / "none.jpg", "none.jpg is no file; expected an image"),
        (tmp_path, "is no file; expected an image"),
        (text, "text.jpg is no image that Pillow knows"),
        (empty, "empty.png is no image that Pillow knows"),
        (cut, "cut.png is damaged or too large"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_image(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_without_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Pillow writes no such file, and newer ones open none."""
    (tmp_path / "a.bmp").touch()
    monkeypatch.setattr(Image, "open", lambda path: Image.new("RGB", size))
    with pytest.raises(UserError, match=r"a\.bmp is a picture of [05]x[05]; expected one with pix"):
        read_image(tmp_path / "a.bmp")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/deeper cannot be made a directory"):
        make_directory(tmp_path / "file" / "deeper")
    with pytest.raises(UserError, match=r"missing/a\.png cannot be written"):
        write_png(tmp_path / "missing" / "a.png", COLORS)
    with pytest.raises(UserError, match=r"a\.png cannot be written: File name too long\."):
        write_png(tmp_path / ("a" * 300 + ".png"), COLORS)
