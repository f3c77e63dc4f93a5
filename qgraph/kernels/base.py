"""What a kernel is: one way of carrying out a quantized matmul on a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx

from ..target import Target
from ..types import SHORT_NAMES

Packed = tuple[mx.array, ...]
"""The arrays a kernel reads at each call, made once from the packed weight."""

EXACT = "exact"
HALF = (mx.float16, mx.bfloat16)
FREE_SHARE = 0.5
"""Extra memory, as a share of the packed weight, that needs no budget: float32 scales."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One quantized matmul: (m, k) by a packed (n, k), or (k, n) with `transpose=False`.

    Attributes:
        m: rows of x, its leading axes flattened.
        n: columns of the result.
        k: elements summed over.
        dtype: of x.
        scales_dtype: of affine scales and biases, by default that of x; of the other modes always
            uint8.
        backend: "cpu", "cuda" or "metal".
        arch: the processor, or the GPU's architecture and name; without a name that of an H100 is
            meant where that matters.
        cores: CPU cores, as many streams at most.
        experts: matrices a `gather_qmm` picks from; 0 for a plain product.

    >>> print(Problem(1, 4096, 2048, mx.float16, "affine", 4, 64))
    f16[1,2048] x affine4[4096,2048] g64 s:f16
    """

    m: int
    n: int
    k: int
    dtype: mx.Dtype
    mode: str
    bits: int
    group_size: int
    transpose: bool = True
    scales_dtype: mx.Dtype = None  # type: ignore[assignment]
    backend: str = "cpu"
    arch: str = "x86_64"
    cores: int = 1
    experts: int = 0

    def __post_init__(self) -> None:
        if self.scales_dtype is None:
            scales = self.dtype if self.mode == "affine" else mx.uint8
            object.__setattr__(self, "scales_dtype", scales)

    @staticmethod
    def of(
        x: Any,
        parts: Sequence[Any],
        *,
        target: Target,
        group_size: int,
        bits: int,
        mode: str,
        transpose: bool = True,
    ) -> Problem:
        """The problem of `x` (…, K) and packed `parts`; anything with shape and dtype will do."""
        w, scales = parts[0], parts[1]
        wide = w.shape[-1] * 32 // bits
        rows = 1
        for size in x.shape[:-1]:
            rows *= size
        n, k = (w.shape[-2], wide) if transpose else (wide, w.shape[-2])
        experts = w.shape[0] if w.ndim == 3 else 0
        return Problem(
            rows, n, k, x.dtype, mode, bits, group_size, transpose, scales.dtype,
            target.backend, target.arch, target.cores, experts,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of MLX's quantized functions."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def out_dtype(self) -> mx.Dtype:
        """The dtype MLX gives the result."""
        if self.mode != "affine" or self.scales_dtype == self.dtype:
            return self.dtype
        return mx.float32

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.n * self.k * max(1, self.experts)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight with scales and biases."""
        groups = self.weights // self.group_size
        scale = 1 if self.mode != "affine" else 2 * self.scales_dtype.size
        return self.weights * self.bits // 8 + groups * scale

    @property
    def moved_bytes(self) -> int:
        """The fewest bytes a call moves: weight and x read once, the result written once.

        Of experts as many are read as there are rows, at most.

        >>> p = Problem(2, 64, 64, mx.float32, "affine", 4, 64, experts=8)
        >>> p.moved_bytes - p.replace(experts=2).moved_bytes
        0
        """
        if self.m < self.experts:
            return self.replace(experts=self.m).moved_bytes
        x, y = self.m * self.k * self.dtype.size, self.m * self.n * self.out_dtype.size
        return self.packed_bytes + x + y

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def replace(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    def in_float32(self) -> Problem:
        """The same of float32 x and, in affine modes, float32 scales."""
        scales = mx.float32 if self.mode == "affine" else self.scales_dtype
        return self.replace(dtype=mx.float32, scales_dtype=scales)

    def __str__(self) -> str:
        x, s = SHORT_NAMES[self.dtype], SHORT_NAMES[self.scales_dtype]
        shape = f"{self.n},{self.k}" if self.transpose else f"{self.k},{self.n}"
        if self.experts:
            shape = f"{self.experts},{shape}"
        scales = f" s:{s}" if self.mode == "affine" else ""
        plain = "" if self.transpose else " transpose=False"
        kind = f"affine{self.bits}" if self.mode == "affine" else self.mode
        weight = f"{kind}[{shape}] g{self.group_size}"
        return f"{x}[{self.m},{self.k}] x {weight}{scales}{plain}"


def named_parts(parts: Sequence[mx.array]) -> dict[str, Any]:
    """Keyword arguments "scales" and "biases" (None if there are none) of packed parts."""
    return {"scales": parts[1], "biases": parts[2] if len(parts) > 2 else None}


class Streams(Protocol):
    """Streams by number, 0 for the default one: `qgraph.kernels.streams.Streams`."""

    def resolve(self, stream: Any) -> Any: ...


class Machine(Protocol):
    """Microseconds known of a machine, by kernel: `qgraph.kernels.choice.cost.CostTable`."""

    def measured(self, name: str, problem: Problem) -> float | None:
        """Of exactly this problem."""

    def interpolated(self, name: str, problem: Problem) -> float | None:
        """From problems like it; None where there are none."""


class Kernel:
    """One way of carrying out a product; subclasses are one small file each.

    All that others ask about a kernel it says itself; `qgraph/kernels/names.py` has its row.

    Attributes:
        name: as plans print it, such as "shard2+f32+qmm".
        backends: where it is worth trying.
        gathers: carries out `gather_qmm`, whose matrices are picked by index.
        host: runs in Python between two compiled stretches, on evaluated arrays.
        streams: how many it spreads over.
        layout: what it packs; kernels of one layout can share one packed copy.
        left_to_mlx: does what MLX's own op does in a graph, which need not choose it then.
        gives_rows: can give rows of what it packed as MLX packs them, so that nothing else need.
        mlx_form: the name of the kernel of MLX's own ops that reads the same packed arrays: what
            MLX's transformations and files take.
    """

    name: str = ""
    backends: tuple[str, ...] = ("cpu", "cuda", "metal")
    gathers: bool = False
    host: bool = False
    streams: int = 1
    layout: tuple[str, ...] = ()
    left_to_mlx: bool = False
    gives_rows: bool = False

    @property
    def mlx_form(self) -> str:
        return self.name

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        """The names under which it is worth trying on a backend that is one of `backends`."""
        return [cls.name]

    def applies(self, problem: Problem) -> str | None:
        """None if it can carry out `problem`, else why not."""
        return None

    def contract(self, problem: Problem) -> str:
        """How the result differs from `mx.quantized_matmul`'s; "exact" if it is the same bits."""
        return EXACT

    def extra_bytes(self, problem: Problem) -> int:
        """Memory it keeps beyond the packed weight as given."""
        return 0

    def free_bytes(self, problem: Problem) -> float:
        """Extra memory that needs no budget."""
        return FREE_SHARE * problem.packed_bytes

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        """Microseconds it takes on a machine; None where nothing tells.

        Measured, else interpolated, else by a model.
        """
        if (us := machine.measured(self.name, problem)) is not None:
            return us
        if (us := self.interpolated(problem, machine)) is not None:
            return us
        return self.modelled(problem)

    def interpolated(self, problem: Problem, machine: Machine) -> float | None:
        """Microseconds by what was measured of problems, or of kernels, like it."""
        return machine.interpolated(self.name, problem)

    def modelled(self, problem: Problem) -> float | None:
        """Microseconds by what is known of its structure on the problem's backend."""
        return None

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        """What `run` reads, made once of (w_q, scales) or (w_q, scales, biases); lazy."""
        return tuple(parts)

    def take_rows(self, packed: Sequence[mx.array], indices: mx.array, problem: Problem) -> Packed:
        """Rows (indices.shape, …) of what was packed, as they were, if it `gives_rows`."""
        raise NotImplementedError

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        """The product of x (m, k), shape (m, n), in `problem.out_dtype`."""
        raise NotImplementedError

    def bind(
        self, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> Callable[..., mx.array]:
        """`carry_out` with all but x given: kernels that run from the host prepare once here."""
        return lambda x: carry_out(self, x, packed, problem, streams)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


NUMBER = r"([1-9]\d*)"


class Wrapper(Kernel):
    """A kernel that prepares or splits the work of another.

    Attributes:
        prefix: what stands before the "+" of its name, a regular expression; a number in it goes
            to the constructor, before the inner kernel.
    """

    prefix: str = ""

    def __init__(self, prefix: str, inner: Kernel, *, packs: bool = False) -> None:
        self.inner = inner
        self.name = f"{prefix}+{inner.name}"
        self.host = inner.host
        self.streams = inner.streams
        self.layout = (prefix, *inner.layout) if packs else inner.layout

    @property
    def mlx_form(self) -> str:
        return self.name.removesuffix(self.inner.name) + self.inner.mlx_form

    def narrowed(self, problem: Problem) -> Problem:
        """The problem that the inner kernel sees."""
        return problem

    def applies(self, problem: Problem) -> str | None:
        return self.inner.applies(self.narrowed(problem))

    def contract(self, problem: Problem) -> str:
        return self.inner.contract(self.narrowed(problem))

    def extra_bytes(self, problem: Problem) -> int:
        return self.inner.extra_bytes(self.narrowed(problem))

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return self.inner.pack(parts, self.narrowed(problem))


def carry_out(
    kernel: Kernel, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
) -> mx.array:
    """Run a kernel on x (…, K): leading axes are flattened, so that MLX sees one matrix.

    MLX does not flatten (B, 1, K) by a 2-D weight and on CUDA and CPU then decodes it B times.
    """
    flat = kernel.run(x.reshape(-1, problem.k), packed, problem, streams)
    return flat.reshape(*x.shape[:-1], problem.n)
