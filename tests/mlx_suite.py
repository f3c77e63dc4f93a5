"""MLX's own Python tests, with every op that they call on arrays run as a compiled program.

    QGRAPH_MLX_TESTS=mlx/python/tests python -m tests.mlx_suite [--constants] [test_ops …]

The folder is that of a checkout of MLX (https://github.com/ml-explore/mlx), of about the version
that is installed.  Each call of an `mx.<op>` of qgraph's table is traced, optimized, compiled and
run, and held against MLX: same result, or an error where MLX has one.  A test counts as a finding
if it passes on MLX alone and fails so.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
import unittest
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from qgraph.ir.ops import ALIASES, OPS, RANDOM
from qgraph.kernels.tracers import Tracers
from qgraph.tree import flatten

FOLDER = "QGRAPH_MLX_TESTS"
FILES = (
    *("test_ops", "test_quantized", "test_fast", "test_fast_sdpa", "test_reduce", "test_blas"),
    *("test_conv", "test_einsum", "test_linalg", "test_fft", "test_random"),
)
ROUNDED = dict.fromkeys(
    (f"test_quantized.TestQuantized.test_qmm_{name}" for name in ("vjp", "jvp")),
    "a transformation runs MLX's kernel, a plain call ours: two orders of adding, held to 1e-5 of "
    "each element; both are as near to float64",
)
ROUNDED["test_fast.TestFast.test_layer_norm_grad"] = (
    "it takes the mean of 6.5 million floats: MLX's is off by 3e-3, a region's by 3e-8"
)
"""Tests that ask of two of MLX's kernels that they round alike, and why a program need not."""
TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 3e-2, mx.float64: 1e-9}
"""Of the largest element: a program may round between two ops where MLX's op does not."""
ANGLE = 1e-3
"""The same for rotations: at position 4000 both are as far from float64, which rounds no angle."""


class Through:
    """Stands for an op of MLX; calls on arrays go through a program."""

    busy = False
    calls: dict[str, int] = {}  # noqa: RUF012
    tracers = Tracers()

    def __init__(self, name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
        self.name, self.ours, self.theirs = name, ours, theirs
        functools.update_wrapper(self, theirs, ("__doc__", "__name__"), ())

    constants = False
    """Are all arrays but the first known when the program is compiled, as weights are?"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if Through.busy or not _with_arrays((args, kwargs)):
            return self.theirs(*args, **kwargs)
        Through.busy = True
        try:
            return self._both(args, kwargs)
        finally:
            Through.busy = False

    def _both(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        drawn = mx.random.split(mx.random.state[0])[1]  # the key that MLX would draw
        Through.calls[self.name] = Through.calls.get(self.name, 0) + 1
        wanted = self.theirs(*args, **kwargs)
        arrays = [leaf for leaf in flatten(wanted)[0] if isinstance(leaf, mx.array)]
        if not self.tracers.among(_arrays((args, kwargs))):
            mx.eval(arrays)  # what MLX refuses, it refuses here
        if self.name in RANDOM and not _has_key(self.name, args, kwargs):
            kwargs["key"] = drawn
        found = self._program(args, kwargs)
        _same(self.name, found, wanted, evaluated=not self.tracers.among(arrays))
        return found

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same call as a program of its arrays."""
        arrays = _arrays((args, kwargs))
        first = arrays[:1] if self.constants and not self.tracers.among(arrays) else arrays

        def call(*given: Any) -> Any:
            leaves = iter([*given, *arrays[len(given) :]])
            again, settings = _replaced((args, kwargs), leaves)
            return self.ours(*again, **settings)

        return qg.compile(call, *first)(*first)


class ThroughMethod(Through):
    """The same for a method of arrays."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


def _with_arrays(tree: Any) -> bool:
    return bool(_arrays(tree))


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [array for item in tree for array in _arrays(item)]


def _replaced(tree: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(tree, mx.array):
        return next(leaves)
    if isinstance(tree, dict):
        return {key: _replaced(item, leaves) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_replaced(item, leaves) for item in tree)
    return tree


def _has_key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {key: arg for key, arg in kwargs.items() if key != "stream"}
    return OPS[name].signature.bind(*args, **given).arguments.get("key") is not None


def _same(name: str, found: Any, wanted: Any, evaluated: bool) -> None:
    ours, form = flatten(found)
    theirs, other = flatten(wanted)
    assert form == other or len(ours) == len(theirs) > 1, f"{name} gives {form}, MLX {other}"
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b), f"{name} gives a {type(a).__name__}, MLX a {type(b).__name__}"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name} gives {_type(a)}, MLX {_type(b)}"
        if evaluated:
            assert _close(name, a, b), f"{name} gives other numbers than MLX for {_type(b)}"


def _type(array: mx.array) -> str:
    return str(qg.TensorType(array.shape, array.dtype))


def _close(name: str, a: mx.array, b: mx.array) -> bool:
    if not mx.issubdtype(a.dtype, mx.inexact):
        return bool(np.array_equal(np.array(a), np.array(b)))
    wide = mx.complex64 if a.dtype == mx.complex64 else mx.float32
    one, other = (np.array(x.astype(wide) if x.dtype != mx.float64 else x) for x in (a, b))
    finite = np.abs(other[np.isfinite(other)])
    most = float(finite.max()) if finite.size else 0.0
    allowed = max(TOLERANCE.get(a.dtype, 2e-5), ANGLE if name == "fast.rope" else 0.0) * most
    return bool(np.allclose(one, other, 0.0, allowed, equal_nan=True))


def _method(name: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(tensor, name)(*args, **kwargs)


@contextmanager
def through_programs(constants: bool) -> Iterator[None]:
    """While this is open, MLX's ops are programs."""
    Through.constants = constants
    places: list[tuple[Any, str, Any]] = []
    for name in (*OPS, *ALIASES):
        *room, short = name.split(".")
        ours, theirs = qg, mx
        for part in room:
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        if not hasattr(theirs, short):
            continue  # an op of qgraph's own
        op = ALIASES.get(name, name)
        places.append((theirs, short, Through(op, getattr(ours, short), getattr(theirs, short))))
        if not room and callable(getattr(mx.array, short, None)):  # `real` is a property
            ours, theirs = functools.partial(_method, short), getattr(mx.array, short)
            places.append((mx.array, short, ThroughMethod(op, ours, theirs)))
    before = [(place, short, getattr(place, short)) for place, short, _ in places]
    for place, short, stand_in in places:
        setattr(place, short, stand_in)
    try:
        yield
    finally:
        for place, short, own in before:
            setattr(place, short, own)


def run(file: str, form: str, only: Sequence[str]) -> dict[str, str]:
    """Outcomes of the tests of a file by name, of a process of its own."""
    names = [word for name in only for word in ("--only", name)]
    command = [sys.executable, "-m", "tests.mlx_suite", "--outcomes", form, *names, file]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("outcomes ")]
    if not lines:
        return {file: f"the process ended with {done.returncode}"}
    found: dict[str, str] = json.loads(lines[-1].removeprefix("outcomes "))
    return found


class _Outcomes(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.found[test.id()] = ""
        print(f"  {test.id()}", file=sys.stderr, flush=True)

    def _failed(self, test: unittest.TestCase, error: Any) -> None:
        name = test.test_case.id() if hasattr(test, "test_case") else test.id()
        words = "".join(traceback.format_exception(*error, limit=-4))
        self.found[name] = self.found.get(name) or words

    def addError(self, test: Any, err: Any) -> None:
        self._failed(test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._failed(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._failed(test, err)


def outcomes(file: str, form: str, only: Sequence[str]) -> dict[str, str]:
    """Run a file's tests here; the text of what failed, by test, empty where it passed."""
    sys.path.insert(0, os.environ[FOLDER])
    module = importlib.import_module(file)
    loader = unittest.TestLoader()
    if only:
        loader.testNamePatterns = [f"*{name}*" for name in only]
    result = _Outcomes()
    suite = loader.loadTestsFromModule(module)
    if form == "mlx":
        suite.run(result)
    else:
        with through_programs(constants=form == "constants"):
            suite.run(result)
        print(f"{sum(Through.calls.values())} calls of {len(Through.calls)} ops", file=sys.stderr)
    return result.found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mlx_suite")
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--constants", action="store_true", help="arrays but the first are known")
    parser.add_argument("--only", action="append", default=[], help="tests with this in their name")
    parser.add_argument("--outcomes", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if FOLDER not in os.environ:
        parser.error(f"set {FOLDER} to python/tests of a checkout of MLX")
    if args.outcomes:
        print("\noutcomes " + json.dumps(outcomes(args.files[0], args.outcomes, args.only)))
        return 0
    findings = 0
    for file in args.files:
        ours = run(file, "constants" if args.constants else "arguments", args.only)
        failed = [name for name, words in ours.items() if words]
        alone = run(file, "mlx", failed) if failed else {}
        found = [name for name in failed if not alone.get(name) and name not in ROUNDED]
        findings += len(found)
        counts = len(ours) - len(failed), len(failed) - len(found), len(found)
        print(
            file,
            "{} pass, {} fail on MLX alone or round otherwise, {} found".format(*counts),
            flush=True,
        )
        for name in found:
            print(f"\n--- {name}\n{ours[name]}", flush=True)
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
