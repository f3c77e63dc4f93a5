"""compute-sanitizer over kernels of ours: python -m tests.sanitizer

Wants a GPU of NVIDIA's and CUDA's compute-sanitizer.  Each of its tools must first find a fault
that is planted, so that silence means something, and then nothing in some of `tests/gpu`.

`racecheck` is not among them: it did not find the fault that was planted for it, and displays
hazards that may be the polled flag of the barrier over the grid (decision 0030).
"""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import typer

from qgraph.kernels.cuda.kernel import CudaKernel

FAULTS = {
    "memcheck": "y[(1 << 30) + threadIdx.x] = x[threadIdx.x];",
    "synccheck": "if (threadIdx.x < 7) __syncthreads(); y[threadIdx.x] = x[threadIdx.x];",
}
"""By tool: the body of a kernel that it must complain of."""
TESTS = (
    "tests/gpu/test_grid_regions.py::test_a_step_gives_what_its_bodies_give",
    "tests/gpu/test_attention.py::test_a_tail",
    "tests/gpu/test_tiled.py::test_experts_of_one_token",
)
FOUND = 9
"""The exit code of what has a fault."""


def sanitized(tool: str, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python command whose kernels of ours the tool looks at."""
    return subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND),
         "--kernel-regex", "kns=qgraph", sys.executable, *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def planted(tool: str) -> None:
    """Launch the kernel with a tool's fault."""
    kernel = CudaKernel("qgraph_planted", ["x"], ["y"], FAULTS[tool])
    made = kernel(
        inputs=[mx.ones(64)], output_dtypes=[mx.float32], output_shapes=[(64,)],
        grid=(64, 1, 1), threadgroup=(64, 1, 1), stream=mx.gpu,
    )  # fmt: skip
    mx.eval(made)


def main() -> None:
    """Look for faults with each tool; exits with 1 if one finds any, or misses its own."""
    failed = False
    for tool in FAULTS:
        own = sanitized(tool, "-c", f"from tests.sanitizer import planted; planted({tool!r})")
        tests = sanitized(tool, "-m", "pytest", "-q", "-x", *TESTS)
        words = "finds its fault" if own.returncode == FOUND else "misses the planted fault"
        print(f"{tool}: {words}; tests: {_summary(tests)}")
        if tests.returncode:
            print(tests.stdout[-3000:], tests.stderr[-1000:])
        failed |= own.returncode != FOUND or tests.returncode != 0
    if failed:
        raise typer.Exit(1)


def _summary(run: subprocess.CompletedProcess[str]) -> str:
    """The tool's last line on errors."""
    lines = [line for line in run.stdout.splitlines() if "SUMMARY" in line]
    return lines[-1].strip("= ") if lines else f"no summary, exit code {run.returncode}"


if __name__ == "__main__":
    typer.run(main)
