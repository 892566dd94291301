"""The emulator itself, on small kernels: right results where they are right, reports where not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.emulator import build
from tests.emulator.run import Call, EmulatorError, run

KERNELS = Path(__file__).with_name("kernels")
SEEDS = range(4)  # two orders of the threads and their opposites

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


# One case a kernel: the calls, and whether the result of each is right.


def block_sum() -> tuple[list[Call], Callable[[int, Tensor], None]]:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    calls = [Call("block_sum", [x, poisoned(1024), 1000, 128])]

    def check(_: int, args: list[Tensor]) -> None:
        expected = torch.nn.functional.pad(x, (0, 24)).view(8, 128).sum(1)
        torch.testing.assert_close(args[1].view(8, 128), expected[:, None].expand(8, 128))

    return calls, check


def warp_sum() -> tuple[list[Call], Callable[[int, Tensor], None]]:
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    calls = [Call("warp_sum", [x, poisoned(6), 6, 100, 96])]
    return calls, lambda _, args: torch.testing.assert_close(args[1], x.sum(1))


def tile_matmul() -> tuple[list[Call], Callable[[int, Tensor], None]]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 80, generator=generator)
    b = torch.randn(80, 8, generator=generator)
    calls, expected = [], []
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        for transposed in (0, 1):
            x, y = a.to(dtype), b.to(dtype)
            args = [x, y, y.T.contiguous(), poisoned(16, 8), 80, transposed]
            calls.append(Call(f"tile_matmul_{name}", args))
            expected.append(x.float() @ y.float())
    return calls, lambda i, args: torch.testing.assert_close(args[3], expected[i])


CASES = {"block_sum": block_sum, "warp_sum": warp_sum, "tile_matmul": tile_matmul}


def run_case(case: str, library: Path, seeds: range = SEEDS, **settings: object) -> list[Tensor]:
    """Outputs of the case's calls with each seed, all of them right."""
    calls, check = CASES[case]()
    seeded = [Call(c.function, c.args, {"seed": s, **settings}) for s in seeds for c in calls]
    outputs = []
    for i, result in enumerate(run(library, seeded)):
        assert result.value == 0
        check(i % len(calls), result.args)
        outputs.append([arg for arg in result.args if isinstance(arg, Tensor)])
    return outputs


def is_caught(case: str, library: Path, **settings: object) -> bool:
    try:
        run_case(case, library, **settings)
    except (AssertionError, EmulatorError):
        return True
    return False


@pytest.fixture(scope="module")
def toys() -> Path:
    return build.library([KERNELS / f"{case}.cu" for case in CASES], "toys")


@pytest.mark.parametrize("case", CASES)
def test_right_and_the_same_with_every_seed(case: str, toys: Path) -> None:
    outputs = run_case(case, toys)
    calls = len(outputs) // len(SEEDS)
    for i, tensors in enumerate(outputs):
        for tensor, first in zip(tensors, outputs[i % calls], strict=True):
            assert torch.equal(tensor.nan_to_num(), first.nan_to_num())


MEETING_POINT = re.compile(r"^\s*(__syncthreads\(\)|cp_async_wait<\d+>\(\));$", re.MULTILINE)


def meeting_points() -> list[tuple[str, int]]:
    return [
        (case, i)
        for case in CASES
        for i in range(len(MEETING_POINT.findall((KERNELS / f"{case}.cu").read_text())))
    ]


@pytest.mark.parametrize(("case", "which"), meeting_points())
def test_removed_barrier_is_caught(case: str, which: int, tmp_path: Path) -> None:
    source = (KERNELS / f"{case}.cu").read_text()
    removed = list(MEETING_POINT.finditer(source))[which]
    mutant = tmp_path / f"{case}.cu"
    mutant.write_text(source[: removed.start(1)] + source[removed.end(1) :])
    library = build.library([mutant], "mutant")
    assert is_caught(case, library)
    # The order of the threads and the poison find it too, without the race check.
    assert is_caught(case, library, races=0)


def test_leaving_out_equals_removing(toys: Path) -> None:
    lines = (KERNELS / "block_sum.cu").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "__syncthreads" in text)
    assert is_caught("block_sum", toys, skip=f"block_sum.cu:{line}")
    assert not is_caught("block_sum", toys, skip=f"block_sum.cu:{line + 1}")


FAULTS = {  # in the order of enum Fault in faults.cu
    "none": None,
    "shared out of bounds": "use-after-poison",
    "global out of bounds": "heap-buffer-overflow",
    "divergent barrier": "deadlock.*\n.*threads 0..39: __syncthreads.*\n.*40..63: __syncwarp",
    "different barriers": "different barriers",
    "mismatched lanes": "different instructions(.*\n)*.*a shuffle(.*\n)*.*ldmatrix x4",
    "mask without caller": "mask 0000ffff leaves out",
    "exited lane": "deadlock.*\n(.*\n)*.*threads 7..7: have exited",
    "race in a warp": r"race on byte \d+",
    "race in a block": r"race on byte \d+",
    "read before wait": r"race on byte \d+",
    "unaligned copy": "misaligned address",
    "copy out of bounds": "heap-buffer-overflow",
    "unaligned row": "not aligned to 16 bytes",
    "row outside shared": "not in shared memory",
    "unwritten shared": None,
    "unaligned vector": "misaligned address",
}


@pytest.fixture(scope="module")
def faults() -> Path:
    return build.library([KERNELS / "faults.cu"], "faults")


@pytest.mark.parametrize("fault", [name for name, report in FAULTS.items() if report])
def test_fault_is_reported(fault: str, faults: Path) -> None:
    with pytest.raises(EmulatorError, match=FAULTS[fault]):
        run(faults, [Call("faulty", [torch.zeros(64), list(FAULTS).index(fault)])])


def test_shared_memory_starts_as_nan(faults: Path) -> None:
    call, poison = (
        Call("faulty", [torch.zeros(64), list(FAULTS).index(name)])
        for name in ("none", "unwritten shared")
    )
    call, poison = run(faults, [call, poison])
    assert torch.equal(call.args[0], torch.ones(64))
    assert poison.args[0].isnan().all()


@pytest.mark.parametrize(
    ("grid_x", "grid_y", "block_x", "block_z", "shared", "error"),
    [
        (1, 1, 1024, 1, 227 << 10, 0),
        (1, 1, 1025, 1, 0, 9),
        (1, 1, 1, 65, 0, 9),
        (0, 1, 32, 1, 0, 9),
        (1, 65536, 1, 1, 0, 9),
        (1, 1, 32, 1, (227 << 10) + 1, 1),
    ],
)
def test_launch_limits(
    grid_x: int, grid_y: int, block_x: int, block_z: int, shared: int, error: int, faults: Path
) -> None:
    """What the driver refuses comes back from the launch, and is not found again by another."""
    launch = Call("launch_empty", [grid_x, grid_y, block_x, block_z, shared])
    assert [r.value for r in run(faults, [launch, Call("last_error", [])])] == [error, 0]


def test_shared_limit_of_other_devices(faults: Path) -> None:
    limit = {"shared_limit": 163 << 10}
    inside, outside = run(
        faults, [Call("launch_empty", [1, 1, 32, 1, (163 << 10) + i], limit) for i in (0, 1)]
    )
    assert (inside.value, outside.value) == (0, 1)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(name: str, dtype: torch.dtype) -> None:
    """Every value of the type, everything halfway between two of them, and random floats."""
    library = build.library([KERNELS / "convert.cu"], "convert")
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    random = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    random = random * torch.logspace(-45, 38, 4096)
    x = torch.cat([values, middles, middles.nextafter(values[0]), random, 2 * random])
    narrow, wide = poisoned(len(x), dtype=dtype), poisoned(len(x))
    (result,) = run(library, [Call(f"convert_{name}", [x, narrow, wide, len(x)])])
    expected = x.to(dtype)
    assert torch.equal(result.args[1].isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(result.args[1][number].view(torch.int16), expected[number].view(torch.int16))
    assert torch.equal(result.args[2][number], expected[number].float())
