"""A product with a dequantized weight becomes one quantized product.

Fuses:
    1. `x @ dequantize(q)` and `x @ dequantize(q).T`, through any transposes, reshapes and
       broadcasts that keep groups whole.
    2. casts on weight, activation or result, and scales of another dtype than x: the product runs
       in the wider of them, the result keeps its dtype.
    3. `addmm`, and `einsum`, `tensordot` and `inner` that are a product of matrices, in batches or
       not; weights scaled by a number, which then scales the product.
    4. the weight on the left, `dequantize(q) @ x`.
    5. weights in batches, and `gather_mm`, which becomes `gather_qmm`.
    7. each of several products of one `dequantize`; whatever needs it dense keeps it.
    9. fake quantization, `dequantize(quantize(w))`: the packed form of that very `quantize`.
Leaves alone:
    1. views that break a group or a row, with the reason in the ledger.
    2. `einsum` and `tensordot` that are no product of matrices with one summed axis.
    3. a `quantize` of a dequantized weight: the pair is not the identity.
    4. on the left, what is smaller than what it multiplies: rows of an embedding, or activations
       that are rounded, before a float weight.
Cases 6 and 8, indexing rows, are `sink-dequantize`'s; case 10 is `raise-dequantize`'s; case 11 is
`legalize`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.kinds import PRODUCTS
from qgraph.ir.ops import setting
from qgraph.rewrite.ledger import Decision, Entry, record, weight_name
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.tracing.tensor import Tensor, apply

from .shared.casts import cast
from .shared.contraction import Contraction, as_contraction
from .shared.products import QUANTIZED, indices_of
from .shared.weight_view import Packed, WeightView, as_operand, resolve

_NAME = "fuse-quantized-matmul"


@dataclass(frozen=True)
class FuseQuantizedMatmul:
    """See the module."""

    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite_each(graph, _fuse, self.name, PRODUCTS | {"quantize"})


def _fuse(node: Node) -> Sequence[Value] | None:
    if node.op == "gather_mm":
        return _fuse_gather(node)
    misses: list[tuple[str, WeightView | None]] = []
    product = None
    for product in as_contraction(node):
        weight = resolve(product.weight.value)
        if weight is None or _is_activation(product, weight):
            continue
        if isinstance(weight, str):
            misses.append((weight, None))
            continue
        packed = as_operand(weight)
        result = packed if isinstance(packed, str) else _product(node, product, packed)
        if isinstance(result, str):
            misses.append((result, weight))
            continue
        _note(node, "fused", "", weight, _case(product, weight, node.output.dtype))
        return [result.value]
    if product is None:
        _explain(node)
    for why, near in misses:
        _note(node, "refused", f"not fused: {why}", near)
    return None


def _is_activation(product: Contraction, weight: WeightView | str) -> bool:
    """A packed operand on the left is decoded once for each column of the right."""
    if not product.on_left or isinstance(weight, str):
        return False
    return weight.source.output.type.size < product.x.value.type.size


def _explain(node: Node) -> None:
    """Why a weight that `node` reads does not fuse into it."""
    if node.op not in PRODUCTS and node.op != "quantize":
        return
    found = [w for w in map(resolve, node.inputs) if isinstance(w, WeightView)]
    if not found or node.op in QUANTIZED:
        return
    why = "quantize of a dequantized weight is not the identity; use the packed weight itself"
    if node.op != "quantize":
        spelt = node.args.get("subscripts", "here")
        why = (
            f"{node.op} {spelt} is no product of matrices that sums one axis; "
            "write it with matmul on the weight"
        )
    _note(node, "refused", f"not fused: {why}", found[0])


def _case(product: Contraction, weight: WeightView, result: mx.Dtype) -> int:
    """The number above that says most of how the product was written."""
    w, scales = (weight.source.operand(name) for name in ("w", "scales"))
    dtypes = {product.x.dtype, weight.dtype, weight.source.output.dtype, result}
    if scales.dtype != mx.uint8:
        dtypes.add(scales.dtype)
    if w.node.op == "quantize":
        return 9
    if w.ndim > 2:
        return 5
    if product.case > 1 or weight.factors:
        return max(product.case, 3)
    return 2 if len(dtypes) > 1 or product.x.value.node.op == "astype" else 1


def _in_one_dtype(x: Tensor, parts: Sequence[Tensor], result: mx.Dtype) -> tuple[Tensor, ...]:
    """x and the parts in the dtype to multiply in: wide enough for the result and for affine
    scales, so never less exact than as written."""
    w, *scales = parts
    if scales[0].dtype == mx.uint8:
        return (cast(x, result), w, *scales)
    wide = mx.result_type(result, scales[0].dtype)
    return (cast(x, wide), w, *(cast(s, wide) for s in scales))


def _product(node: Node, product: Contraction, packed: Packed) -> Tensor | str:
    dtype = node.output.dtype
    if not mx.issubdtype(dtype, mx.floating) or dtype == mx.float64:
        return f"the product is {dtype}; quantized products are float16, bfloat16 or float32"
    if not product.x.size or not node.output.type.size:
        return "the product is empty; MLX's quantized products are not"
    axes = packed.parts[0].ndim
    if axes > 2 and product.x.ndim < 2:
        return "a vector times a batch of weights; give x a row axis"
    x = product.x
    if 2 < axes > x.ndim:
        # MLX 0.32 takes one matrix of a batch of weights for an x of two axes.
        x = x.reshape(*(1,) * (axes - x.ndim), *x.shape)
    args = _in_one_dtype(x, packed.parts, dtype)
    settings = {**packed.settings, "transpose": packed.transpose}
    y = apply("quantized_matmul", args, settings, node.stream)
    return product.finish(cast(packed.scaled(y), dtype))


def _fuse_gather(node: Node) -> Sequence[Value] | None:
    weight = resolve(node.operand("b"))
    if weight is None:
        return None
    if isinstance(weight, str):
        _note(node, "refused", f"not fused: {weight}")
        return None
    if not node.output.type.size:
        _note(node, "refused", "not fused: the product is empty; MLX's quantized ones are not")
        return None
    packed = as_operand(weight)
    if isinstance(packed, str):
        _note(node, "refused", f"not fused: {packed}", weight)
        return None
    matrices = prod(node.operand("b").shape[:-2])
    if prod(packed.parts[0].shape[:-2]) != matrices:
        why = "matrices of the weight are broadcast; let the indices repeat them instead"
        _note(node, "refused", f"not fused: {why}", weight)
        return None
    dtype = node.output.dtype
    x = Tensor(node.operand("a"))
    batch = [p if p.ndim > 2 else apply("expand_dims", (p, 0)) for p in packed.parts]
    options = {**packed.settings, "transpose": packed.transpose, **indices_of(node)}
    if setting(node, "sorted_indices"):
        options["sorted_indices"] = True
    y = apply("gather_qmm", _in_one_dtype(x, batch, dtype), options, node.stream)
    _note(node, "fused", "", weight, 5)
    return [cast(packed.scaled(y), dtype).value]


def _note(
    node: Node, decision: Decision, reason: str, weight: WeightView | None = None, case: int = 0
) -> None:
    types, name = [node.inputs[0].type], ""
    if weight is not None:
        name = weight_name(weight.source.operand("w"))
        types.append(weight.source.output.type)
    record(Entry.of(node, _NAME, decision, reason, case, name, types=tuple(types)))
