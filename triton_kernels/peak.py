"""The largest of a row of numbers and the first place that holds it, in Triton."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_peak(row, count, BLOCK: tl.constexpr):
    """(largest number, its first place, whether any is NaN), by one program."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    places = tl.full((BLOCK,), 0, tl.int32)
    nan = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        numbers = tl.load(row + place, mask=place < count, other=float("-inf")).to(tl.float32)
        nan |= (numbers != numbers).to(tl.int32)
        better = numbers > best
        best = tl.where(better, numbers, best)
        places = tl.where(better, place, places)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, places, count), 0), tl.max(nan, 0)
