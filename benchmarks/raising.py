"""Norms, rotations and attention as one op each, over the primitives that an import on a CPU gives.

    python -m benchmarks.raising [cpu|gpu]

Models of mlx-lm with random weights, imported with the CPU as default device and compiled for the
target with and without the passes that raise; beside them the model itself under `mx.compile`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import qgraph as qg
from benchmarks.measure import interleaved, milliseconds, paired_ratio
from qgraph.compiler.pipeline import default_passes
from qgraph.target import as_target

SHAPE: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 12),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), 1e-5),
    **dict.fromkeys(("n_positions", "n_ctx"), 1024),
    "num_key_value_heads": 2, "intermediate_size": 768, "vocab_size": 1000, "head_dim": 64,
    "tie_word_embeddings": True, "rope_theta": 1e4,
}  # fmt: skip
MODELS = ("llama", "gemma3_text", "gpt2")
ROWS = (1, 64)


def build(name: str) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SHAPE}))
    mx.eval(model.parameters())
    return model


def main(device: str = "cpu") -> None:
    target = as_target(device)
    table = Table(title=f"milliseconds on {target}", title_justify="left")
    for heading in ("model", "rows", "nodes", "raised", "expanded", "raised", "ratio",
                    "mx.compile"):  # fmt: skip
        table.add_column(heading, justify="right")
    passes = default_passes(target)
    without = [run for run in passes if not run.name.startswith("raise-")]
    for name in MODELS:
        for rows in ROWS:
            mx.set_default_device(mx.cpu)
            model, ids = build(name), mx.arange(rows)[None]
            graph = qg.from_mlx(model, ids)
            mx.set_default_device(target.device)
            raised = qg.compile(graph, target=target, passes=passes)
            expanded = qg.compile(graph, target=target, passes=without)
            own = mx.compile(model)
            ways = {
                "expanded": lambda f=expanded, x=ids: mx.eval(f(x)),
                "raised": lambda f=raised, x=ids: mx.eval(f(x)),
                "own": lambda f=own, x=ids: mx.eval(f(x)),
            }
            found = interleaved(ways, repeats=31 if rows == 1 else 15, warmup=3)
            table.add_row(
                name,
                str(rows),
                str(expanded.plan.graph.count()),
                str(raised.plan.graph.count()),
                milliseconds(found["expanded"].median),
                milliseconds(found["raised"].median),
                f"{paired_ratio(found['raised'], found['expanded']):.3f}",
                milliseconds(found["own"].median),
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
