"""Weights that GPTQ and AWQ packed, in MLX's affine format: the same codes and scales.

Both store the transpose of MLX's weight, w[column, row] = (code - zero) · scale, in 32-bit words:

- GPTQ packs codes along the columns and zeros along the rows, as one little-endian stream of bits,
  which is MLX's own layout.  Zeros are stored less one, unless the file says `gptq_v2`.  `g_idx`
  has the group of each column; with `desc_act` groups are scattered.
- AWQ (`gemm`) packs eight rows of 4 bits in a word, in the order 0 2 4 6 1 3 5 7.

MLX has w = scale · code + bias, so bias = -zero · scale.  Where that product does not fit the dtype
of the scales, both are float32, and the weight is what the file says to the last bit.
Formats: https://github.com/AutoGPTQ/AutoGPTQ (auto_gptq/nn_modules/qlinear) and
https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import QuantizationError

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word of AWQ's each of eight rows lies."""

_GROUP_SIZES = (128, 64, 32)
_BITS = (2, 3, 4, 5, 6, 8)
_PARTS = ("qweight", "scales", "qzeros", "g_idx")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Repacked:
    """A weight of shape [rows, columns] as `mx.quantized_matmul` takes it.

    Attributes:
        weight: codes, uint32 [rows, columns · bits / 32].
        scales, biases: [rows, columns / group_size].
        group_size, bits: as for `mx.quantize`.
        order: int32 [columns] where groups were scattered, else None: the product is that of
            `x[..., order]`.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int
    order: mx.array | None = None


def from_gptq(
    qweight: mx.array,
    scales: mx.array,
    qzeros: mx.array | None = None,
    g_idx: mx.array | None = None,
    *,
    v2: bool = False,
    symmetric: bool = False,
) -> Repacked:
    """A weight as GPTQ's tools store it.

    Args:
        qweight: codes, 32-bit [columns · bits / 32, rows].
        scales: floats [groups, rows].
        qzeros: 32-bit [groups, rows · bits / 32]; without them zeros are half of the codes' range.
        g_idx: the group of each column, int32 [columns]; without it groups are equally long.
        v2: zeros are stored as they are (`checkpoint_format` "gptq_v2").
        symmetric: all zeros are half of the range (`sym`).  Some tools write them as v2 and say v1.

    Raises:
        QuantizationError: shapes that do not belong together, or groups that MLX has no size for.

    >>> import mlx.core as mx
    >>> words = mx.full((4, 64), 0x76543210, dtype=mx.uint32)  # codes 0 to 7 down the columns
    >>> packed = from_gptq(words, mx.ones((1, 64), dtype=mx.float16))
    >>> settings = {"bits": packed.bits, "group_size": packed.group_size}
    >>> mx.dequantize(packed.weight, packed.scales, packed.biases, **settings)[0, :9].tolist()
    [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, -8.0]
    """
    _check("GPTQ", qweight, scales, qzeros)
    groups, rows = scales.shape
    if qzeros is not None:
        bits = _bits("GPTQ", 32 * qzeros.shape[1], rows)
    elif g_idx is not None:
        bits = _bits("GPTQ", 32 * qweight.shape[0], g_idx.size)
    else:
        bits = 4
    columns = 32 * qweight.shape[0] // bits
    weight = _words(qweight).T
    zeros = np.full((groups, rows), 2 ** (bits - 1))
    if qzeros is not None:
        stored = unpack_codes(_words(qzeros), bits).astype(np.int64)
        if not (symmetric and ((stored == zeros).all() or (stored == zeros - 1).all())):
            zeros = stored if v2 else (stored + 1) % 2**bits
    group = np.arange(columns) * groups // columns if g_idx is None else np.array(g_idx)
    if group.shape != (columns,) or group.min() < 0 or group.max() >= groups:
        raise _refusal(
            "GPTQ", f"g_idx of shape {group.shape} names groups outside of the {groups} there are"
        )
    order = np.argsort(group, kind="stable")
    if (order == np.arange(columns)).all():
        return _affine(weight, bits, group, scales, zeros)
    weight = pack_codes(unpack_codes(np.ascontiguousarray(weight), bits)[:, order], bits)
    return _affine(weight, bits, group[order], scales, zeros, mx.array(order, mx.int32))


def from_awq(qweight: mx.array, scales: mx.array, qzeros: mx.array | None = None) -> Repacked:
    """A weight as AutoAWQ stores it in its version `gemm`, 4 bits.

    Args:
        qweight: codes, 32-bit [columns, rows / 8].
        scales: floats [groups, rows].
        qzeros: 32-bit [groups, rows / 8]; without them zeros are 8.

    Raises:
        QuantizationError: shapes that do not belong together, or groups that MLX has no size for.

    >>> import mlx.core as mx
    >>> words = mx.full((64, 8), 0x75316420, dtype=mx.uint32)  # codes 0 to 7 down the rows
    >>> packed = from_awq(words, mx.ones((1, 64), dtype=mx.float16))
    >>> mx.dequantize(packed.weight, packed.scales, packed.biases)[:9, 0].tolist()
    [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, -8.0]
    """
    _check("AWQ", qweight, scales, qzeros)
    groups, rows = scales.shape
    columns = qweight.shape[0]
    if 8 * qweight.shape[1] != rows or columns % groups:
        raise _refusal("AWQ", f"qweight {qweight.shape} has no codes for scales {scales.shape}")
    weight = pack_codes(np.ascontiguousarray(_awq_codes(qweight).T), 4)
    zeros = np.full((groups, rows), 8) if qzeros is None else _awq_codes(qzeros)
    return _affine(weight, 4, np.arange(columns) * groups // columns, scales, zeros)


def repacked(weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, Any]:
    """All arrays of a checkpoint by name: each packed weight a `Repacked`, the others as they are.

    Args:
        weights: the arrays as files of Hugging Face have them, `….qweight` and its parts.  They are
            taken out one by one, so that one packed weight at most is held twice.
        config: what the checkpoint says under `quantization_config`.

    Raises:
        QuantizationError: a layout that is neither GPTQ's nor AWQ's `gemm`, or damaged arrays; it
            names the weight.
    """
    method, version = config.get("quant_method"), str(config.get("version", "gemm")).lower()
    if method not in ("gptq", "awq") or (method == "awq" and version != "gemm"):
        raise QuantizationError(
            f"weights of quant_method={method!r}, version={version!r}",
            hint="GPTQ's layout and AWQ's gemm are read",
        )
    found: dict[str, Any] = {}
    for name in list(weights):
        layer, _, part = name.rpartition(".")
        if part not in _PARTS:
            found[name] = weights.pop(name)
        elif part == "qweight":
            try:
                found[layer] = _one(layer, weights, config)
            except QuantizationError as error:
                raise QuantizationError(f"{layer}: {error}") from None
    if weights:
        raise QuantizationError(f"{min(weights)} belongs to no qweight")
    return found


def _one(layer: str, weights: dict[str, mx.array], config: Mapping[str, Any]) -> Repacked:
    qweight, scales, qzeros, g_idx = (weights.pop(f"{layer}.{part}", None) for part in _PARTS)
    if qweight is None or scales is None:
        raise QuantizationError("it has no scales")
    if config["quant_method"] == "awq":
        return from_awq(qweight, scales, qzeros)
    v2, symmetric = config.get("checkpoint_format") == "gptq_v2", bool(config.get("sym"))
    return from_gptq(qweight, scales, qzeros, g_idx, v2=v2, symmetric=symmetric)


def _affine(
    weight: Array,
    bits: int,
    group: Array,
    scales: mx.array,
    zeros: Array,
    order: mx.array | None = None,
) -> Repacked:
    """Put together; `group` has the group of each column of `weight`."""
    for size in _GROUP_SIZES:
        if group.size % size == 0:
            each = group.reshape(-1, size)
            if (each == each[:, :1]).all():
                break
    else:
        raise _refusal(
            "MLX", f"{group.size} columns in groups that neither of {_GROUP_SIZES} divides"
        )
    places = mx.array(each[:, 0], mx.int32)
    by_row = scales[places].T
    zero = mx.array(zeros[each[:, 0]].T.astype(np.float32))
    exact = -zero * by_row.astype(mx.float32)
    dtype = by_row.dtype if _fits(exact, by_row.dtype) else mx.float32
    codes = mx.array(np.ascontiguousarray(weight))
    by_row = mx.contiguous(by_row.astype(dtype))
    return Repacked(codes, by_row, exact.astype(dtype), size, bits, order)


def _fits(exact: mx.array, dtype: mx.Dtype) -> bool:
    return bool((exact.astype(dtype).astype(mx.float32) == exact).all())


def _check(method: str, qweight: mx.array, scales: mx.array, qzeros: mx.array | None) -> None:
    words = [qweight] if qzeros is None else [qweight, qzeros]
    wrong = [a for a in (*words, scales) if a.ndim != 2 or 0 in a.shape]
    wrong += [a for a in words if a.dtype not in (mx.int32, mx.uint32)]
    if wrong or not mx.issubdtype(scales.dtype, mx.floating):
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (*words, scales))
        raise _refusal(method, f"it has words of 32 bits and floats, in two axes; this is {given}")
    along_rows = qweight if method == "GPTQ" else scales
    if along_rows.shape[1] != scales.shape[1] or (
        qzeros is not None and qzeros.shape[0] != scales.shape[0]
    ):
        raise _refusal(method, f"qweight {qweight.shape}, scales {scales.shape} and zeros differ")


def _bits(method: str, stream: int, codes: int) -> int:
    if codes == 0 or stream % codes or stream // codes not in _BITS:
        raise _refusal(method, f"{stream} bits for {codes} codes")
    return stream // codes


def _refusal(method: str, words: str) -> QuantizationError:
    return QuantizationError(f"this is no weight of {method}: {words}")


def _words(array: mx.array) -> Array:
    return np.array(array.view(mx.uint32))


def _awq_codes(words: mx.array) -> Array:
    """One code an element, in the order of rows."""
    codes = unpack_codes(_words(words), 4)
    return codes.reshape(len(codes), -1, 8)[..., _AWQ_ORDER].reshape(len(codes), -1)


def unpack_codes(words: Array, bits: int) -> Array:
    """The codes of a little-endian stream of bits along the last axis, uint8."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    each = stream.reshape(*words.shape[:-1], -1, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]


def pack_codes(codes: Array, bits: int) -> Array:
    """The inverse of `unpack_codes`: words of 32 bits."""
    each = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=bits)
    stream = each.reshape(*codes.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
