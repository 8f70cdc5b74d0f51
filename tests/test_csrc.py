"""Parts of the CPU kernels by themselves, compiled into a small library that ctypes calls."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jepa_fast.ops import _normal

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Werror",
]
PANEL = 32

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

_EXPONENTIAL = """
#include "common/exponential.h"
#define LOOP(name)                                            \\
  extern "C" void name(const float* x, float* y, long count) { \\
    for (long i = 0; i < count; ++i) y[i] = jepa_fast::name(x[i]); \\
  }
LOOP(exponential) LOOP(small_exponential) LOOP(exponential_of_negative) LOOP(logarithm)
LOOP(softplus) LOOP(sigmoid) LOOP(hyperbolic_tangent)
"""

_NORMAL = """
#include "common/normal.h"
using namespace jepa_fast;

extern "C" void normal_pairs(
    const uint32_t* radius, const uint32_t* angle, float* first, float* second, long count) {
  for (long i = 0; i < count; ++i) normal_pair(radius[i], angle[i], first + i, second + i);
}

extern "C" void normal_group(int wide, uint64_t seed, uint64_t row, uint32_t group, float* out) {
  for (int lane = 0; lane < kNormalLanes; ++lane) {
    (wide ? draw_lane<uint64_t> : draw_lane<uint32_t>)(seed, row, group, lane, out);
    normal_lane(lane, out);
  }
}
"""

_PRODUCT = """
#include "cpu/panel_product.h"
using namespace jepa_fast;

extern "C" int supported(int set) {
#if defined(JEPA_FAST_HAS_ARCHITECTURES)
  if (set == 4) return __builtin_cpu_supports("x86-64-v4") != 0;
  if (set == 3) return __builtin_cpu_supports("x86-64-v3") != 0;
#endif
  return set == 0;
}

template <int row_stride, int step>
PanelProduct of(int set) {
#if defined(JEPA_FAST_HAS_ARCHITECTURES)
  if (set == 4) return &v4::panel_product<row_stride, step>;
  if (set == 3) return &v3::panel_product<row_stride, step>;
#endif
  return &baseline::panel_product<row_stride, step>;
}

extern "C" void multiply_by(
    int set, int transposed, const float* left, long rows, long depth, long block_depth,
    long block_stride, const float* right, long columns, float* out) {
  const Left matrix{left, rows, depth, block_depth, block_stride};
  (transposed ? of<1, kPanel>(set) : of<kPanel, 1>(set))(matrix, right, columns, out);
}

extern "C" void multiply_by_widest(
    int transposed, const float* left, long rows, long depth, long block_depth, long block_stride,
    const float* right, long columns, float* out) {
  const Left matrix{left, rows, depth, block_depth, block_stride};
  (transposed ? multiply_transposed : multiply)(matrix, right, columns, out);
}
"""

Floats = NDArray[np.float32]


def _library(folder: Path, source: str, *flags: str) -> ctypes.CDLL:
    (folder / "part.cpp").write_text(source)
    library = folder / "part.so"
    command = ["g++", *FLAGS, *flags, "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*command, str(folder / "part.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _pointer(x: NDArray[np.float32]) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


# The exponential and the logarithm.


@pytest.fixture(scope="module", params=["", "-march=native"], ids=["plain", "native"])
def exponential(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """Without and with fused multiply-adds, where the machine has them."""
    return _library(tmp_path_factory.mktemp("exp"), _EXPONENTIAL, *request.param.split())


def _values(library: ctypes.CDLL, name: str, x: Floats) -> Floats:
    y = np.empty_like(x)
    getattr(library, name)(_pointer(x), _pointer(y), ctypes.c_long(len(x)))
    return y


def _units_off(got: Floats, want: NDArray[np.float64]) -> float:
    """The largest error, in units of the last place of the result; subnormal results have one."""
    smallest = np.finfo(np.float32).tiny
    unit = np.spacing(np.maximum(np.abs(want), smallest).astype(np.float32)).astype(np.float64)
    return float((np.abs(got.astype(np.float64) - want) / unit).max())


def _grid() -> Floats:
    """Numbers of every exponent and both signs, and all that matter densely."""
    bits = np.arange(0, 0x42D00000, 4099, dtype=np.uint32)  # up to 104
    positive = bits.view(np.float32)
    dense = np.linspace(-104, 88.7, 2_000_003, dtype=np.float32)
    return np.concatenate([positive[positive < 88.7], -positive, dense])


def test_exponential_is_off_by_one_unit_at_the_most(exponential: ctypes.CDLL) -> None:
    x = _grid()
    assert _units_off(_values(exponential, "exponential", x), np.exp(x.astype(np.float64))) <= 1.0
    x = x[np.abs(x) <= 87]
    got = _values(exponential, "small_exponential", x)
    np.testing.assert_array_equal(got, _values(exponential, "exponential", x))


def test_exponential_of_negative_numbers(exponential: ctypes.CDLL) -> None:
    x = _grid()
    x = x[(x <= 0) & (x >= -87)]
    got = _values(exponential, "exponential_of_negative", x)
    assert _units_off(got, np.exp(x.astype(np.float64))) <= 1.0
    ends = np.array([-87.4, -1e9, -np.inf, np.nan, -0.0], np.float32)
    want = np.array([0, 0, 0, np.nan, 1], np.float32)
    got = _values(exponential, "exponential_of_negative", ends)
    np.testing.assert_array_equal(got, want)


def test_logarithm_is_off_by_one_unit_at_the_most(exponential: ctypes.CDLL) -> None:
    bits = np.arange(1, 0x7F800000, 499, dtype=np.uint32)  # of all positive numbers
    x = np.concatenate([bits.view(np.float32), np.linspace(0.5, 2, 2_000_003, dtype=np.float32)])
    want = np.log(x.astype(np.float64))
    assert _units_off(_values(exponential, "logarithm", x), want) <= 1.0


def test_softplus_is_off_by_three_units_at_the_most(exponential: ctypes.CDLL) -> None:
    x = _grid()
    want = np.logaddexp(0, x.astype(np.float64))
    assert _units_off(_values(exponential, "softplus", x), want) <= 3.0


def test_sigmoid_is_off_by_three_units_at_the_most(exponential: ctypes.CDLL) -> None:
    x = _grid()
    x = x[x > -87]  # below, 1 + exp(-x) is no float32 but the result still is
    want = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert _units_off(_values(exponential, "sigmoid", x), want) <= 3.0


def test_hyperbolic_tangent_is_off_by_three_units_at_the_most(exponential: ctypes.CDLL) -> None:
    near = np.linspace(-1, 1, 1_000_003, dtype=np.float32)
    x = np.concatenate([_grid(), near])
    got = _values(exponential, "hyperbolic_tangent", x)
    assert _units_off(got, np.tanh(x.astype(np.float64))) <= 3.0
    assert np.array_equal(np.signbit(got), np.signbit(x))


def test_the_exponentials_ends(exponential: ctypes.CDLL) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([0, -0.0, inf, -inf, nan, 88.8, 3e38, -104.1, -3e38, 1e-45], np.float32)
    want = np.array([1, 1, inf, 0, nan, inf, inf, 0, 0, 1], np.float32)
    np.testing.assert_array_equal(_values(exponential, "exponential", x), want)
    want = np.array([inf, 0, nan, 3e38], np.float32)
    given = np.array([inf, -inf, nan, 3e38], np.float32)
    np.testing.assert_array_equal(_values(exponential, "softplus", given), want)
    want = np.array([1, 0, nan], np.float32)
    np.testing.assert_array_equal(_values(exponential, "sigmoid", given[:3]), want)
    want = np.array([1, -1, nan, 1], np.float32)
    np.testing.assert_array_equal(_values(exponential, "hyperbolic_tangent", given), want)


def test_the_logarithms_ends(exponential: ctypes.CDLL) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([0, -0.0, 1, inf, -inf, nan, -1, -1e-45], np.float32)
    want = np.array([-inf, -inf, 0, inf, nan, nan, nan, nan], np.float32)
    np.testing.assert_array_equal(_values(exponential, "logarithm", x), want)


# Normal numbers.


@pytest.fixture(scope="module", params=["", "-march=native"], ids=["plain", "native"])
def normal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return _library(tmp_path_factory.mktemp("normal"), _NORMAL, *request.param.split())


def test_normal_numbers_are_off_by_four_units_at_the_most(normal: ctypes.CDLL) -> None:
    """Of all lengths, up to the largest, and all quarters of the circle."""
    words = np.random.default_rng(0).integers(0, 2**32, (2, 1_000_000), dtype=np.uint32)
    words[0, :64], words[1, 0] = np.arange(64), 0  # the longest, along an axis
    words[0, 64:128] = 2**32 - 1 - np.arange(64)  # of length 0, nearly
    words[1, 128:192] = np.arange(64) << 26
    radius, angle = words
    first, second = (np.empty(len(radius), np.float32) for _ in range(2))
    arguments = map(_pointer, (radius, angle, first, second))
    normal.normal_pairs(*arguments, ctypes.c_long(len(radius)))

    u, f = _normal.uniforms(*(torch.from_numpy(x.astype(np.int64)) for x in words))
    u, f = u.double().numpy(), f.double().numpy()
    r = np.sqrt(-2 * np.log(u))
    cosine, sine = r * np.cos(np.pi / 2 * f), r * np.sin(np.pi / 2 * f)
    cosine[angle >> 31 == 1] *= -1
    swap = (angle >> 30 & 1) == 1
    assert _units_off(first, np.where(swap, sine, cosine)) <= 4.0
    assert _units_off(second, np.where(swap, cosine, sine)) <= 4.0
    assert 6.6 < np.abs(first).max() < 6.7


@pytest.mark.parametrize("wide", [False, True])
def test_lanes_of_either_width_draw_the_same(normal: ctypes.CDLL, wide: bool) -> None:
    for seed, row, group in ((0, 0, 0), (2**64 - 5, 2**40 + 3, 7), (2**63, 2**64 - 1, 2**31)):
        out = np.empty(_normal.GROUP, np.float32)
        place = (ctypes.c_uint64(seed), ctypes.c_uint64(row), ctypes.c_uint32(group))
        normal.normal_group(ctypes.c_int(wide), *place, _pointer(out))
        key = torch.tensor([seed - 2**64 if seed >> 63 else seed])
        counter = (row & 0xFFFFFFFF, row >> 32, group, torch.arange(_normal.LANES))
        words = _normal.philox(key, tuple(torch.as_tensor(x) for x in counter))
        want = _normal.pairs(torch.stack(words[::2]), torch.stack(words[1::2]))
        np.testing.assert_allclose(out, want.flatten().numpy(), rtol=1e-6, atol=1e-7)


# The product, by every instruction set.


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return _library(tmp_path_factory.mktemp("product"), _PRODUCT)


def _left(rows: int, depth: int, transposed: bool) -> tuple[Floats, Floats, int]:
    """A matrix, the same in panels of 32, and how far these are from one to the next."""
    matrix = np.random.default_rng(rows * 1000 + depth).standard_normal((rows, depth))
    matrix = matrix.astype(np.float32)
    panels = -(-depth // PANEL)
    if transposed:  # of one block, all of whose rows are as long as a panel is wide
        assert rows <= PANEL
        memory = np.full((depth, PANEL), np.nan, np.float32)
        memory[:, :rows] = matrix.T
        return matrix, memory, 0
    memory = np.full((panels, rows, PANEL), np.nan, np.float32)
    for panel in range(panels):
        part = matrix[:, panel * PANEL : (panel + 1) * PANEL]
        memory[panel, :, : part.shape[1]] = part
    return matrix, memory, rows * PANEL


@pytest.mark.parametrize("columns", [1, 4, 5, 8, 9, 16, 17, 31, 32])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("instructions", [0, 3, 4], ids=["baseline", "v3", "v4"])
def test_product(product: ctypes.CDLL, instructions: int, transposed: bool, columns: int) -> None:
    if not product.supported(instructions):
        pytest.skip(f"this machine has not the instructions of x86-64-v{instructions}")
    for rows in (1, 2, 5, 6, 7, 11, 12, 13, 24, 25, *(() if transposed else (37, 100))):
        for depth in (1, 3, 31, 32, 33, 64, 65, 130, 384):
            left, memory, stride = _left(rows, depth, transposed)
            right = np.random.default_rng(depth).standard_normal((depth, PANEL))
            right = right.astype(np.float32)
            out = np.full((rows + 1, PANEL), 7, np.float32)
            arguments = (
                ctypes.c_int(transposed),
                _pointer(memory),
                *map(ctypes.c_long, (rows, depth, depth if transposed else PANEL, stride)),
                _pointer(right),
                ctypes.c_long(columns),
                _pointer(out),
            )
            product.multiply_by(ctypes.c_int(instructions), *arguments)
            exact = left.astype(np.float64) @ right.astype(np.float64)
            # Every product and every sum is off by half a unit at the most.
            bound = (depth + 1) * 2.0**-24 * (np.abs(left) @ np.abs(right)) * 1.001
            wrong = ~(np.abs(out[:rows] - exact) <= bound)  # NaN, too, which padding is
            assert not wrong[:, :columns].any(), (rows, depth)
            # Beyond, a column is multiplied up to a whole vector, or it is 0.
            assert not (wrong & (out[:rows] != 0))[:, columns:].any(), (rows, depth)
            assert (out[rows] == 7).all(), (rows, depth)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_the_widest_product_of_the_machine_is_taken(product: ctypes.CDLL, transposed: bool) -> None:
    best = max(each for each in (0, 3, 4) if product.supported(each))
    _, memory, stride = _left(12, 100, transposed)
    right = np.random.default_rng(0).standard_normal((100, PANEL)).astype(np.float32)
    found = []
    for call in (
        product.multiply_by_widest,
        lambda *arguments: product.multiply_by(ctypes.c_int(best), *arguments),
    ):
        out = np.empty((12, PANEL), np.float32)
        call(
            ctypes.c_int(transposed),
            _pointer(memory),
            *map(ctypes.c_long, (12, 100, 100 if transposed else PANEL, stride)),
            _pointer(right),
            ctypes.c_long(PANEL),
            _pointer(out),
        )
        found.append(out)
    np.testing.assert_array_equal(*found)
