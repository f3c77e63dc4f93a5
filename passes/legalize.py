"""Products that the target cannot carry out, or gets wrong, in a form that it can.

Rewrites (facts of MLX 0.32, from its source and issues; the rest of its kernels take every shape):
    1. CPU: `gather_mm` of half precision, which MLX has in float32 alone: cast up, and down after.
    2. CUDA: packed weights that may not lie row by row, such as slices and transposed batches, for
       which MLX raises "No implementation": made contiguous first, which costs nothing where they
       already are.
    3. Metal: `quantized_matmul` with `transpose=False`, K of 1024 or more and N no multiple of 64,
       which leaves columns unwritten (MLX issue 4250): dequantize and matmul.
    4. Hopper GPUs: `quantized_matmul` of several rows by a weight whose rows are one group each,
       for which MLX's `qmm_sm90` writes nothing (mlx 0.32.4, on an H100): dequantize and matmul.
Leaves alone:
    1. K and N that CUDA's tiles do not divide: `qmv` takes every multiple of 8, so every group
       size; it is `choose-kernel` that picks the fast form.
    2. inputs and carried values that hold packed weights: nothing says how they lie.
    3. one row by such a weight, and what `qmm_sm90` does not take: formats other than affine of 4
       and 8 bits, N that 4 does not divide, `transpose=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.kinds import STRIDED
from qgraph.ir.ops import setting
from qgraph.kernels.cuda.arch import capability
from qgraph.kernels.streams import as_device
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from .shared.casts import cast, in_float32
from .shared.products import PARTS, QUANTIZED, parts_of

_NAME = "legalize"
_WHOLE = 64
_DEEP = 1024
_QMV_MOST = 16384
"""Numbers of one row up to which MLX takes `qmv` on Hopper GPUs."""
_PRODUCTS = QUANTIZED | {"gather_mm"}


@dataclass(frozen=True)
class Legalize:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        rules: dict[str, Callable[[Node], Sequence[Value] | None]] = {
            "cpu": _for_cpu,
            "cuda": _for_hopper if capability(target.arch) == 90 else _for_cuda,
            "metal": _for_metal,
        }
        rule = rules[target.backend]
        return rewrite_each(graph, partial(_unless_on_cpu, rule), self.name, _PRODUCTS)


def _unless_on_cpu(
    rule: Callable[[Node], Sequence[Value] | None], node: Node
) -> Sequence[Value] | None:
    """A node that the user put on the CPU follows the CPU's rules."""
    stream = as_device(node.stream)
    device = stream.device if isinstance(stream, mx.Stream) else stream
    on_cpu = isinstance(device, mx.Device) and device.type == mx.cpu
    return _for_cpu(node) if on_cpu else rule(node)


def _for_cpu(node: Node) -> Sequence[Value] | None:
    dtype = node.output.dtype if node.outputs else None
    if node.op != "gather_mm" or dtype == mx.float32:
        return None
    _note(node, "in float32: on CPUs MLX has no gather_mm of half precision")
    return [in_float32(node, ("a", "b"))]


def _for_cuda(node: Node) -> Sequence[Value] | None:
    if node.op not in QUANTIZED:
        return None
    given = {name: v for name in PARTS if (v := node.value(name)) is not None}
    loose = {name: v for name, v in given.items() if v.node.op in STRIDED}
    if not loose:
        return None
    whole = {name: apply("contiguous", (Tensor(v),)).value for name, v in loose.items()}
    _note(node, "the packed weight is made contiguous: CUDA kernels read whole rows one by one")
    return [node.replace(args={**node.args, **whole}).output]


def _for_hopper(node: Node) -> Sequence[Value] | None:
    if node.op != "quantized_matmul" or not _is_for_qmm_sm90(node):
        return _for_cuda(node)
    return _dequantized(node, "dequantized: MLX's kernel for rows of one group writes nothing")


def _is_for_qmm_sm90(node: Node) -> bool:
    """Does MLX take it, by `supports_qmm_sm90` and `QuantizedMatmul::eval_gpu` of its source?"""
    group, bits, mode = (setting(node, s) for s in ("group_size", "bits", "mode"))
    n, k = node.output.shape[-1], node.operand("x").shape[-1]
    is_its_form = setting(node, "transpose") and mode == "affine" and bits in (4, 8)
    is_one_row = node.output.type.size == n and n <= _QMV_MOST
    return bool(is_its_form and k == group and k % 64 == 0 and n % 4 == 0 and not is_one_row)


def _for_metal(node: Node) -> Sequence[Value] | None:
    if node.op != "quantized_matmul" or setting(node, "transpose"):
        return None
    n, k = node.output.shape[-1], node.operand("x").shape[-1]
    if n % _WHOLE == 0 or k < _DEEP:
        return None
    return _dequantized(
        node, f"dequantized: with N={n}, Metal's kernel leaves columns unwritten; pad N to 64"
    )


def _dequantized(node: Node, reason: str) -> Sequence[Value]:
    settings = {s: setting(node, s) for s in ("group_size", "bits", "mode")}
    dtype = node.output.dtype
    dense = cast(apply("dequantize", parts_of(node), settings, node.stream), dtype)
    if setting(node, "transpose"):
        dense = apply("swapaxes", (dense, -1, -2), None, node.stream)
    x = cast(Tensor(node.operand("x")), dtype)
    _note(node, reason)
    return [apply("matmul", (x, dense), None, node.stream).value]


def _note(node: Node, reason: str) -> None:
    record(Entry.of(node, _NAME, "chosen", reason, 11))
