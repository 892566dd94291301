"""Checkpoint files: what is read, what is refused, what is written; the convert command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kernelpose import UserError, cli
from kernelpose.checkpoints import command
from kernelpose.checkpoints.files import read_state_dict, write_state_dict

StateDict = dict[str, torch.Tensor]
Make = dict[str, Callable[..., StateDict]]


class Code:
    """What a weights-only load must not build."""


def truncated(path: Path, content: bytes, keep: float) -> Path:
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def saved(path: Path, content: object, *, zipped: bool = True) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def bad_files(folder: Path, good: StateDict) -> dict[str, tuple[Path, str]]:
    """name: (file, what the sentence says)."""
    whole, old = saved(folder / "whole", good), saved(folder / "old", good, zipped=False)
    write_state_dict(folder / "whole.safetensors", good, wrap=False)
    tensors = (folder / "whole.safetensors").read_bytes()
    broken_header = tensors[:9] + b"#" + tensors[10:]
    (folder / "text").write_text("not a checkpoint, but a letter")
    (folder / "empty").touch()
    (folder / "header").write_bytes(broken_header)
    # The number 5 where the pickle names the kind of a storage.
    (folder / "storage").write_bytes(old.replace(b"ctorch\nFloatStorage\n", b"K\x05", 1))
    (folder / "rubbish").write_bytes(b"\x80\x02" + bytes(range(256)))
    saved(folder / "code", {"state_dict": good, "hook": Code()})
    saved(folder / "list", [1, 2, 3])
    saved(folder / "numbers", {"epoch": 3})
    saved(folder / "stranger", {"fc.weight": torch.zeros(2, 2)})
    saved(folder / "shape", {**good, "backbone.last_norm.weight": torch.zeros(13)})
    (folder / "folder").mkdir()
    damage = "is truncated or damaged"
    return {
        "absent": (folder / "absent", "cannot be read: No such file"),
        "folder": (folder / "folder", "cannot be read: Is a directory"),
        "empty": (folder / "empty", "is not a checkpoint"),
        "text": (folder / "text", "is not a checkpoint"),
        "rubbish": (folder / "rubbish", damage),
        "storage": (folder / "storage", damage),
        "half a zip": (truncated(folder / "a", whole, 0.5), damage),
        "most of a zip": (truncated(folder / "b", whole, 0.99), damage),
        "half a pickle": (truncated(folder / "c", old, 0.5), damage),
        "most of a pickle": (truncated(folder / "d", old, 0.99), damage),
        "half a safetensors": (truncated(folder / "e", tensors, 0.5), damage),
        "broken header": (folder / "header", damage),
        "code": (folder / "code", "needs code to unpickle"),
        "list": (folder / "list", "holds no state_dict"),
        "numbers": (folder / "numbers", "holds no state_dict"),
        "stranger": (folder / "stranger", "holds fc.weight; expected a model of MiTPOSE"),
        "shape": (folder / "shape", r"last_norm.weight has shape \(13,\); expected \(12,\)"),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_random_damage_never_gets_past_the_sentence(tmp_path: Path) -> None:
    good = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(2), "n": torch.tensor(3)}
    wrapped = {"state_dict": good, "meta": {"epoch": 1}}
    whole = [saved(tmp_path / "x", wrapped, zipped=zipped) for zipped in (True, False)]
    write_state_dict(tmp_path / "x.safetensors", good, wrap=False)
    whole.append((tmp_path / "x.safetensors").read_bytes())
    random = np.random.default_rng(0)
    read = refused = 0
    for number in range(600):
        content = np.frombuffer(whole[number % 3], np.uint8).copy()
        if random.random() < 0.3:
            content = content[: random.integers(len(content))]
        reach = min(len(content), (60, 400, len(content))[random.integers(3)])
        for place in random.integers(max(reach, 1), size=random.choice([1, 2, 8])):
            content[place : place + 1] = random.integers(256)
        (tmp_path / "x").write_bytes(content.tobytes())
        try:
            read_state_dict(tmp_path / "x")
            read += 1
        except UserError:
            refused += 1
    assert read + refused == 600
    assert refused > 300


# A name of a class that ends early reads like a class that is not allowed.
SENTENCE = r"is truncated or damaged|is not a checkpoint|needs code to unpickle"


def test_every_beginning_of_an_old_file_is_refused(tmp_path: Path) -> None:
    content = saved(tmp_path / "whole", {"a.weight": torch.randn(3, 4)}, zipped=False)
    for length in range(len(content)):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(UserError, match=SENTENCE):
            read_state_dict(tmp_path / "part")


BAD = [
    *("absent", "folder", "empty", "text", "rubbish", "storage", "code", "list"),
    *("numbers", "stranger", "shape"),
    *("half a zip", "most of a zip", "half a pickle", "most of a pickle"),
    *("half a safetensors", "broken header"),
]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_sentence_and_exit_code_2(
    make: Make, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = bad_files(tmp_path, make["official"]("simple"))
    assert sorted(files) == sorted(BAD)
    path, message = files[name]
    out = tmp_path / "out" / "converted.pth"
    out.parent.mkdir()
    with pytest.raises(UserError, match=message) as error:
        convert(path, out, "mmpose1")
    assert "\n" not in str(error.value)
    assert cli.main(["convert", str(path), str(out), "--to", "mmpose1"]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err
    assert list(out.parent.iterdir()) == []


def convert(source: Path, target: Path, to: str, *more: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(source), str(target), "--to", to, *more]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_round_trip_bit_for_bit(
    make: Make, layout: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make[layout]()
    source, ours, back = (tmp_path / f"{name}{suffix}" for name in ("in", "ours", "back"))
    write_state_dict(source, state, wrap=False)
    assert convert(source, ours, "kernelpose") == 0
    assert capsys.readouterr().out.startswith(f"{layout} layout: ")
    assert convert(ours, back, layout) == 0
    found = read_state_dict(back)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert {path.name for path in tmp_path.iterdir()} == {source.name, ours.name, back.name}


def test_the_prefix_of_data_parallel_training_is_taken_off(make: Make) -> None:
    state = make["official"]()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert read_state_dict({"state_dict": wrapped}).keys() == state.keys()
    assert read_state_dict({**wrapped, "extra": torch.zeros(1)}).keys() == {*wrapped, "extra"}


def test_official_and_mmpose1_files_are_wrapped_and_transformers_ones_are_not(
    make: Make, tmp_path: Path
) -> None:
    source = tmp_path / "in.pth"
    torch.save(make["official"](), source)
    for to, wrapped in (("official", True), ("mmpose1", True), ("transformers", False)):
        convert(source, tmp_path / to, to)
        content = torch.load(tmp_path / to, weights_only=True)
        assert ("state_dict" in content) is wrapped


def test_converting_in_place_replaces_the_file(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": make["mmpose1"]()}, path)
    assert convert(path, path, "official") == 0
    assert read_state_dict(path).keys() == make["official"]().keys()


def test_the_command_takes_a_data_set_and_a_grid(make: Make, tmp_path: Path) -> None:
    state = make["official"]("simple", (17, 14), 3)
    state["backbone.pos_embed"] = torch.zeros(1, 11, 12)
    torch.save(state, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "o", "kernelpose", "--dataset", "aic", "--grid", "5", "2")
    found = read_state_dict(tmp_path / "o")
    assert found["backbone.pos_grid"].tolist() == [5, 2]
    assert found["keypoint_head.final_layer.bias"].shape == (14,)


@pytest.mark.parametrize("target", ["nowhere/out.pth", "in.pth/out.safetensors", "folder"])
def test_a_target_that_cannot_be_written_is_named(make: Make, target: str, tmp_path: Path) -> None:
    torch.save(make["official"](), tmp_path / "in.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        convert(tmp_path / "in.pth", tmp_path / target, "mmpose1")
    assert {path.name for path in tmp_path.iterdir()} == {"in.pth", "folder"}


def test_a_target_without_a_name_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(make["official"](), tmp_path / "in.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\. is a directory; expected a file"):
        convert(tmp_path / "in.pth", Path(), "mmpose1")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * 100_000,
        b'{"a":{"dtype":"U8","shape":[-1,-4],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}}',
    ],
)
def test_a_header_that_describes_no_tensors_is_damage(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="expected a header that fits it"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        # As torch.save's writer of archives says it, with where in its sources below.
        RuntimeError("unexpected pos 64 vs 0: No space left on device\nframe #0: std::function"),
    ],
    ids=["system", "archive"],
)
def test_a_write_that_fails_leaves_the_old_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")

    def full_disk(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left on device\.$"):
        write_state_dict(path, make["official"](), wrap=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_arrays_beside_the_tensors_are_no_obstacle(
    make: Make, tmp_path: Path, zipped: bool
) -> None:
    meta = {
        "weights": np.ones(17, np.float32),
        "sigmas": np.arange(3.0),
        "links": np.array([[0, 1]]),
        "seen": np.int64(3),
    }
    path = tmp_path / "in.pth"
    saved(path, {"state_dict": make["mmpose1"](), "meta": meta}, zipped=zipped)
    assert read_state_dict(path).keys() == make["mmpose1"]().keys()


def test_safetensors_holds_every_dtype_and_odd_sizes(tmp_path: Path) -> None:
    state = {
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(5),
        "flag": torch.tensor([True, False, True]),
        "double": torch.randn(2, 2).double().t(),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    write_state_dict(path, state, wrap=True)
    found = read_state_dict(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with pytest.raises(UserError, match=r"x is torch\.complex64; expected a dtype"):
        write_state_dict(path, {"x": torch.zeros(1, dtype=torch.complex64)}, wrap=False)
    assert read_state_dict(path).keys() == state.keys()
