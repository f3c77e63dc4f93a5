"""Who else runs the same work: llama.cpp, PyTorch, and one core alone."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from qgraph.target import as_target

from .row import Run


def llama_cpp() -> Any:
    """SmolLM2 in llama.cpp on all cores, or None.

    Without its extra buffers: those for AMX, which a build on a processor that has it uses, end
    with a segmentation fault on this file (llama-cpp-python 0.3.36).
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    from qgraph.examples import smollm2_files as files

    low: Any = llama_cpp.llama_cpp
    defaults = low.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    cores = as_target("cpu").cores
    low.llama_model_default_params = plain
    try:
        return llama_cpp.Llama(
            str(files.find_gguf()), n_ctx=1024, n_threads=cores, n_threads_batch=cores,
            verbose=False, logits_all=False,
        )  # fmt: skip
    finally:
        low.llama_model_default_params = defaults


def torch_encoder() -> Run | None:
    """An encoder of MiniLM's shape in PyTorch, or None."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    x = torch.randn(8, 64, 384)

    def run() -> None:
        with torch.inference_mode():
            encoder(x)

    return run


def on_one_core(run: Run) -> Run:
    """The same, held to the core that it finds itself on."""

    def held() -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            run()
        finally:
            os.sched_setaffinity(0, before)

    return held
