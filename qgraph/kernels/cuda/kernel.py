"""A CUDA kernel of ours, which is compiled once a machine.

MLX compiles a kernel of `mx.fast.cuda_kernel` at its first launch in each process.  It looks for
it in its cache first, but never writes there what is not its own (mlx 0.32.4).  So when MLX has
traced a program, what that will launch is compiled here, several kernels side by side, and put
where MLX looks.  Where something for that is missing, MLX compiles as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from ...target import as_target
from ..progress import progress
from .arch import compiled_for
from .kept import is_kept, keep
from .nvrtc import compiler
from .text import Module, Template, module_of

_asked: ContextVar[dict[str, Module] | None] = ContextVar("asked", default=None)
"""What was called and will be launched, by name, where someone compiles it."""


def bounded(name: str, arguments: str, threads: int, blocks: int = 1) -> str:
    """A declaration of MLX's kernel, which says that so many threads are a block and so many blocks
    are to live on a multiprocessor: without it a thread might be given too many registers."""
    return (
        f"namespace mlx::core::cu {{ __global__ void __launch_bounds__({threads}, {blocks}) "
        f"custom_kernel_{name}({arguments}); }}\n"
    )


class CudaKernel:
    """`mx.fast.cuda_kernel`, and what is called like it."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        *,
        header: str = "",
        shared_memory: int = 0,
    ) -> None:
        # MLX's names for compiled code do not tell for which GPU it is.
        header = f"// for {compiled_for()}\n{header}"
        self._text = name, tuple(inputs), tuple(outputs), source, header
        self._launch: Any = mx.fast.cuda_kernel(
            name=name, input_names=list(inputs), output_names=list(outputs), source=source,
            header=header, shared_memory=shared_memory,
        )  # fmt: skip

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Template = (),
        **launch: Any,
    ) -> list[mx.array]:
        if (asked := _asked.get()) is not None:
            module = module_of(*self._text, inputs, output_dtypes, template)
            asked[module.name] = module
        results: list[mx.array] = self._launch(
            inputs=list(inputs),
            output_dtypes=list(output_dtypes),
            template=list(template),
            **launch,
        )
        return results


@contextmanager
def compiled_together() -> Iterator[None]:
    """At its end, the kernels that were called inside are compiled, if they never were here."""
    if _asked.get() is not None or not mx.cuda.is_available() or compiler() is None:
        yield
        return
    asked: dict[str, Module] = {}
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)
    missing = [module for module in asked.values() if not is_kept(module)]
    if missing:
        _compile(missing)


def _compile(modules: Sequence[Module]) -> None:
    with (
        ThreadPoolExecutor(as_target("cpu").cores) as pool,
        progress("compiling its CUDA kernels, once for this machine", len(modules)) as done,
    ):
        for work in as_completed([pool.submit(_compile_one, module) for module in modules]):
            work.result()
            done()


def _compile_one(module: Module) -> None:
    compile = compiler()
    made = compile and compile(module, compiled_for())
    if made:
        keep(module, made)
