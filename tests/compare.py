"""Two ways to compare tensors: bit for bit, and against float64 by the error that plain torch makes."""

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    """Equal to the last bit: the sign of a zero and NaN count too."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    if got.is_complex():
        got, expected = torch.view_as_real(got), torch.view_as_real(expected)
    bits = _INTEGERS[got.element_size()]
    differ = got.contiguous().view(bits) != expected.contiguous().view(bits)
    if differ.any():
        index = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ, first at {list(index)}: "
            f"got {got[index].item()!r}, must be {expected[index].item()!r}"
        )


def assert_same_places(name: str, got: Tensor, exact: Tensor) -> None:
    """NaN, inf and -inf stand where they stand in `exact`."""
    for kind, is_kind in (("nan", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = is_kind(got) != is_kind(exact)
        if differ.any():
            index = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {kind} in other places, first at {list(index)}: "
                f"got {got[index].item()!r}, must be {exact[index].item()!r}"
            )


# Two ulps of the largest value: over few elements, plain torch's error is small by luck.
ULPS = 2
ULPS_OF_FLOAT64 = 64  # there plain torch is the reference itself, without an error to measure by


def assert_accurate(
    name: str, got: Tensor, exact: Tensor, plain: Tensor, *, relative: float = 0.0, floor: float = 0.0
) -> None:
    """At most twice the error of `plain` (torch in the same dtype) against `exact` (float64), plus ULPS of the
    largest value, and what the caller adds: relative to that value, and absolute."""
    assert got.shape == exact.shape == plain.shape, name
    assert_same_places(name, got, exact)
    finite = exact.isfinite()
    if not finite.any():
        return

    def error(x: Tensor) -> Tensor:
        return torch.where(finite, (x.double() - exact).abs(), 0)

    ulps = ULPS_OF_FLOAT64 if got.dtype == torch.float64 else ULPS
    relative += ulps * torch.finfo(got.dtype).eps
    floor += relative * exact[finite].abs().max().item()
    theirs, ours = error(plain).max().item(), error(got)
    limit = 2 * theirs + floor
    worst = tuple(torch.unravel_index(ours.argmax(), ours.shape))
    assert ours[worst].item() <= limit, (
        f"{name}: error {ours[worst].item():.3e} > {limit:.3e} (plain torch's: {theirs:.3e}) "
        f"at {[int(i) for i in worst]}: got {got[worst].item()!r}, must be {exact[worst].item()!r}"
    )


# ---- what else an error may be, where the test says so

# A sum of terms that cancel keeps their rounding: so many ulps of their norm, which plain torch escapes by luck where
# there are few sums.
ULPS_OF_TERMS = 4
# Of a power of two by a GPU's special-function unit, relative (PTX manual, ex2.approx.ftz.f32). What that does to a
# result depends on which errors meet: the real ones are between all the same and each its own.
EXP2_ERROR = 2**-22.5
