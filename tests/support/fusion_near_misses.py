"""What looks like a case of fusion and is none, with words of the reason in the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

import qgraph as qg
from tests.support.fusion import FORMATS, K, N, random
from tests.support.fusion_cases import EXPERTS, LOOKED_UP, Given, Model


@dataclass(frozen=True)
class NearMiss:
    """What looks like case `number` and must be left alone, with words of the reason."""

    number: int
    name: str
    model: Model
    words: str
    x: tuple[int, ...] | mx.array = (5, K)
    w: tuple[int, ...] = (N, K)
    dtype: mx.Dtype = mx.float32
    is_float: bool = False

    @property
    def id(self) -> str:
        return f"{self.number} {self.name}"


def _shared_slice(q: Given, x: Any) -> Any:
    w = q.dense()
    return [x @ w[:8].T, w]


def _two_formats(q: Given, x: Any) -> Any:
    other = FORMATS["affine-8-64" if q.weight.settings["bits"] == 4 else "affine-4-32"]
    again = qg.dequantize(*qg.quantize(random(N, K, seed=5), **other), **other)
    return x @ qg.concatenate([q.dense(), again]).T


def _requantized(q: Given, x: Any) -> Any:
    return qg.quantized_matmul(x, q.dense(), group_size=64, bits=8)


_LAST = "groups run along the last axis"
NEAR_MISSES = [
    NearMiss(1, "groups are split", lambda q, x: x @ q.dense().reshape(2 * N, K // 2).T,
             "groups do not run whole", (5, K // 2)),
    NearMiss(1, "rows are mixed",
             lambda q, x: x @ q.dense().reshape(N, 2, K // 2).swapaxes(0, 1).reshape(N, K).T,
             "reshape between dequantize and the product is no view"),
    NearMiss(1, "one row for all", lambda q, x: x @ qg.broadcast_to(q.dense()[:1], (9, K)).T,
             "one row of the weight is broadcast"),
    NearMiss(1, "columns are cut", lambda q, x: x @ q.dense()[:, :64].T, _LAST, (5, 64)),
    NearMiss(1, "scaled rows", lambda q, x: x @ (q.dense() * random(N, 1)).T,
             "scale x, the result"),
    NearMiss(1, "an added weight", lambda q, x: x @ (q.dense() + random(N, K)).T,
             "add the products instead"),
    NearMiss(2, "a cast to integers",
             lambda q, x: x @ q.dense().astype(mx.int32).T.astype(mx.float32),
             "a cast to int32 between"),
    NearMiss(3, "two summed axes", lambda q, x: qg.tensordot(x, q.dense()[:5], 2),
             "no product of matrices that sums one axis"),
    NearMiss(3, "a diagonal", lambda q, x: qg.einsum("mk,mk->m", x, q.dense()[:5]),
             "no product of matrices that sums one axis"),
    NearMiss(3, "three operands", lambda q, x: qg.einsum("mk,nk,mk->mn", x, q.dense(), x),
             "no product of matrices that sums one axis"),
    NearMiss(5, "experts that split groups",
             lambda q, x: qg.gather_mm(x, q.dense().reshape(4, 2 * N, K // 2).swapaxes(1, 2)),
             "groups do not run whole", (4, 5, K // 2), EXPERTS),
    NearMiss(5, "broadcast experts",
             lambda q, x: qg.gather_mm(x, qg.broadcast_to(q.dense(), (4, N, K)).swapaxes(1, 2)),
             "are broadcast; let the indices", (4, 5, K)),
    NearMiss(6, "columns", lambda q, ids: qg.take(q.dense(), ids, axis=1), _LAST, LOOKED_UP),
    NearMiss(6, "elements", lambda q, ids: qg.take(q.dense(), ids), _LAST, LOOKED_UP),
    NearMiss(6, "more than there are",
             lambda q, ids: qg.take(q.dense(), ids, axis=0), "is less work",
             mx.zeros((200,), mx.int32)),
    NearMiss(8, "a slice of what is needed dense", _shared_slice, "needed dense by something else"),
    NearMiss(8, "columns of the transpose", lambda q, x: x @ q.dense().T[:64], _LAST, (5, 64)),
    NearMiss(8, "columns are split", lambda q, x: x @ qg.split(q.dense(), 2, axis=1)[0].T, _LAST,
             (5, K // 2)),
    NearMiss(8, "two formats", _two_formats, "quantized differently"),
    NearMiss(9, "a second quantize", _requantized, "is not the identity"),
]  # fmt: skip
