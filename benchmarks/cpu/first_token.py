"""Seconds from weights in memory to SmolLM2's first token, in a fresh process.

python -m benchmarks.cpu.first_token    prints them: traced, optimized, made ready, and run once
"""

from __future__ import annotations

import subprocess
import sys
import time

import mlx.core as mx

from qgraph.examples import smollm2, smollm2_files


def seconds() -> float:
    """Of this process, which has compiled nothing before."""
    found = smollm2_files.load()
    mx.eval(list(found.weights.values()))
    chat = found.tokenizer.chat_prompt(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    ids = found.tokenizer.encode(chat)
    start = time.perf_counter()
    model = smollm2.Llama(found.config, found.weights)
    next(smollm2.Generator(model, target="cpu").tokens(ids, 1))
    return time.perf_counter() - start


def of_fresh_processes(count: int = 3) -> float:
    """The shortest of some; the kernels are built by then."""
    command = [sys.executable, "-m", "benchmarks.cpu.first_token"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True)
            for _ in range(count)]  # fmt: skip
    return min(float(run.stdout) for run in runs)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(seconds())
