"""GPTQ: columns are rounded one by one, and later columns make up for the error of each.

As in Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), with the Cholesky factor of the inverse Hessian; a group's scale
is chosen when its first column is reached, from the columns as they are by then.  Afterwards scales
and biases are fitted to the codes by least squares under the whole Hessian, and codes are visited
once more, each set to what is best for it given all others (coordinate descent, as in Behdin et
al., "QuantEase", arXiv:2309.01885); both only ever lower the error of the product.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .formats import Array, Format, Grid, of
from .grids import plain, searched, stored

DAMP = 0.01
"""What is added to the diagonal of a Hessian, as a share of its mean."""


def damped(hessian: Array, damp: float = DAMP) -> np.ndarray:
    """A Hessian that can be inverted; a column that never had an input counts as much as any."""
    h = np.array(hessian, dtype=np.float64)
    h[np.diag_indices_from(h)] += max(damp * float(np.diag(h).mean()), 1e-12)
    return h


def root(h: np.ndarray) -> np.ndarray:
    """The upper R with H = R Rᵀ; its squared diagonal is what an error in each column costs when
    later columns make up for it as well as they can."""
    return np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]


def factor(h: np.ndarray) -> np.ndarray:
    """The upper factor U of the inverse: inverse = Uᵀ U; float32."""
    return _inverse(root(h)).astype(np.float32)


def _inverse(upper: np.ndarray) -> np.ndarray:
    """Of a matrix that is zero below its diagonal, half by half: a sixth of the work of any."""
    size = len(upper)
    if size <= 128:
        return np.linalg.inv(upper)
    half = size // 2
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found = np.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -(first @ (upper[:half, half:] @ last))
    return found


class Rounded:
    """A weight on its grid.

    Attributes:
        places: as `Grid.places` gives them, (rows, columns).
        scales, biases: (rows, groups).
    """

    def __init__(self, form: Format, places: Array, scales: Array, biases: Array) -> None:
        self.form, self.places, self.scales, self.biases = form, places, scales, biases

    def grid(self, group: int) -> Grid:
        part = slice(group, group + 1)
        return Grid(self.form, self.scales[:, part], self.biases[:, part])

    def in_numpy(self) -> Rounded:
        return Rounded(self.form, *map(np.array, (self.places, self.scales, self.biases)))

    def values(self) -> Array:
        """The dense weight."""
        rows, columns = self.places.shape
        groups = self.places.reshape(rows, -1, self.form.group_size)
        grid = Grid(self.form, self.scales[..., None], self.biases[..., None])
        return grid.at(groups).reshape(rows, columns)


def nearest(w: Array, form: Format, dtype: mx.Dtype, importance: Array | None = None) -> Rounded:
    """Each number rounded by itself, on MLX's grid or, given what columns weigh, a searched one."""
    rows, columns = w.shape
    size = form.group_size
    groups = w.reshape(-1, size)
    if importance is None:
        grid = plain(groups, form, dtype)
    else:
        spread = of(w).broadcast_to(importance, w.shape).reshape(-1, size)
        grid = searched(groups, spread, form, dtype)
    places = grid.places(groups).reshape(rows, columns)
    return Rounded(form, places, grid.scale.reshape(rows, -1), grid.bias.reshape(rows, -1))


def gptq(w: Array, upper: Array, form: Format, dtype: mx.Dtype, *, search: bool = True) -> Rounded:
    """Round a weight column by column.

    Args:
        w: (rows, columns), float32; NumPy's or MLX's.
        upper: what `factor` gives for the Hessian of the columns, of the same library.
        dtype: of affine scales.
        search: for scales with weighted error instead of MLX's.
    """
    lib, size = of(w), form.group_size
    rest = lib.ascontiguousarray(w.T) if lib is np else w.T + 0.0  # a column is a row: it is whole
    scales, biases, places = [], [], []
    for start in range(0, w.shape[1], size):
        stop = start + size
        block = rest[start:stop] + 0.0
        factors = upper[start:stop, start:stop]
        columns, importance = block.T, lib.diag(factors) ** -2
        grid = searched(columns, importance, form, dtype) if search else plain(columns, form, dtype)
        one = Grid(form, grid.scale[:, 0], grid.bias[:, 0])
        errors, found = [], []
        for j in range(size):
            place = one.places(block[j])
            error = (block[j] - one.at(place)) / factors[j, j]
            if j + 1 < size:
                block[j + 1 :] -= factors[j, j + 1 :, None] * error
            errors.append(error)
            found.append(place)
        if stop < w.shape[1]:
            rest[stop:] -= upper[start:stop, stop:].T @ lib.stack(errors)
        places += found
        scales.append(grid.scale)
        biases.append(grid.bias)
        if lib is mx:
            mx.eval(rest, places, grid.scale, grid.bias)
    whole = lib.stack(places).T
    return Rounded(form, whole, *(lib.concatenate(parts, 1) for parts in (scales, biases)))


def refined(w: Array, h: Array, rounded: Rounded, dtype: mx.Dtype, rounds: int = 2) -> Rounded:
    """The same weight nearer to w under the Hessian: scales by least squares, then codes again.

    Args:
        w: (rows, columns), NumPy's or MLX's.
        h: the damped Hessian of the columns, float32.
    """
    lib = of(w)
    least = error(w, h, rounded)
    for _ in range(rounds):
        found = _codes_again(w, h, _scales_again(w, h, rounded, dtype))
        now = error(w, h, found)
        better = now < least
        if not better.any():
            break
        pick = better[:, None]
        rounded = Rounded(
            rounded.form,
            lib.where(pick, found.places, rounded.places),
            lib.where(pick, found.scales, rounded.scales),
            lib.where(pick, found.biases, rounded.biases),
        )
        least = lib.minimum(now, least)
    return rounded


def error(w: Array, h: Array, rounded: Rounded) -> Array:
    """What rounding costs each row: d H dᵀ for the difference d."""
    away = rounded.values() - w
    return ((away @ h) * away).sum(-1)


def _scales_again(w: Array, h: Array, rounded: Rounded, dtype: mx.Dtype) -> Rounded:
    """Scales and biases that fit the codes best, row by row, a small system of equations each."""
    form, lib = rounded.form, of(w)
    if form.mode != "affine":
        return rounded
    rows, columns = w.shape
    size, count = form.group_size, columns // form.group_size
    middle = (form.levels + 1) / 2  # codes about zero: scale and bias hang together less
    codes = lib.asarray(rounded.places, lib.float32) - middle

    def by_group(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], count, size).sum(-1)

    scale_scale, scale_bias, bias_bias = [], [], []
    for a in range(count):
        own = slice(a * size, (a + 1) * size)
        left = codes[:, own] @ h[own]
        scale_scale.append(by_group(left * codes))
        scale_bias.append(by_group(left))
        bias_bias.append(by_group(h[own].sum(0)))
        if lib is mx:
            mx.eval(scale_scale[-1], scale_bias[-1], bias_bias[-1])
    system = np.empty((rows, 2 * count, 2 * count), np.float32)
    system[:, :count, :count] = np.stack(list(map(np.asarray, scale_scale)), 1)
    system[:, :count, count:] = np.stack(list(map(np.asarray, scale_bias)), 1)
    system[:, count:, :count] = system[:, :count, count:].swapaxes(1, 2)
    system[:, count:, count:] = np.stack(list(map(np.asarray, bias_bias)))
    wanted = w @ h
    right = np.concatenate([np.asarray(by_group(each)) for each in (codes * wanted, wanted)], 1)
    diagonal = np.einsum("rii->ri", system)
    scales, biases = np.asarray(rounded.scales), np.asarray(rounded.biases)
    now = np.concatenate([scales, biases + middle * scales], 1)
    right += 1e-4 * diagonal * now  # near what it was, where the codes say nothing
    diagonal *= 1 + 1e-4
    diagonal += 1e-20
    found = np.linalg.solve(system, right[..., None])[..., 0].astype(np.float32)
    scales, biases = found[:, :count], found[:, count:] - middle * found[:, :count]
    grid = stored(Grid(form, lib.asarray(scales), lib.asarray(biases)), dtype)
    return Rounded(form, rounded.places, grid.scale, grid.bias)


def _codes_again(w: Array, h: Array, rounded: Rounded, block: int = 64) -> Rounded:
    """Each code set to what is best for it, the others as they are, from the first column on."""
    lib, form = of(w), rounded.form
    diagonal = lib.diag(h)
    values = rounded.values().T + 0.0  # a column is a row: it is whole
    scales, biases = rounded.scales.T + 0.0, rounded.biases.T + 0.0
    places = []
    pull = h @ (w.T - values)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        own = pull[start:stop] + 0.0
        moved = []
        for j in range(start, stop):
            group = j // form.group_size
            grid = Grid(form, scales[group], biases[group])
            place = grid.places(values[j] + own[j - start] / diagonal[j])
            step = grid.at(place) - values[j]
            if j + 1 < stop:
                own[j - start + 1 :] -= h[j + 1 : stop, j, None] * step
            moved.append(step)
            places.append(place)
        if stop < w.shape[1]:
            pull[stop:] -= h[stop:, start:stop] @ lib.stack(moved)
        if lib is mx:
            mx.eval(pull, places)
    return Rounded(form, lib.stack(places).T, rounded.scales, rounded.biases)
