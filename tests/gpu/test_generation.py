"""mlx-lm's models through programs on a GPU: batches whose rows are padded on the left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from tests.support.arrays import to_numpy
from tests.support.reference import relative_error

pytest.importorskip("mlx_lm")

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(not mx.is_available(GPU), reason="needs a GPU")


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(GPU)
    yield
    mx.set_default_device(before)


def model(dtype: mx.Dtype) -> Any:
    from mlx_lm.models import llama

    mx.random.seed(0)
    made = llama.Model(llama.ModelArgs(
        model_type="llama", hidden_size=512, num_hidden_layers=3, intermediate_size=1024,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-5,
        vocab_size=1024,
    ))  # fmt: skip
    made.set_dtype(dtype)
    mx.eval(made.parameters())
    return made


def answer(model: Any, count: int) -> list[Any]:
    """Logits after a prompt of two rows, one of which is padded, and of the tokens after it."""
    from mlx_lm.models.cache import BatchKVCache

    cache = [BatchKVCache([0, 3]) for _ in range(3)]
    tokens, found = mx.arange(2 * count).reshape(2, count) % 1000, []
    for i in range(5):
        logits = model(tokens, cache=cache)[:, -1]
        found.append(to_numpy(logits))
        tokens = (mx.array([[7 * i], [9 * i]]) + 1) % 1000
    return found


@pytest.mark.parametrize("count", [16, 64])
def test_rows_that_are_padded(count: int) -> None:
    """MLX makes the masks of several tokens -infinity there, and all of a padding token's is."""
    wanted = answer(model(mx.float32), count)
    fast = qg.lm.accelerate(model(mx.bfloat16), background=False, keep=False)
    for made, right in zip(answer(fast, count), wanted, strict=True):
        assert relative_error(made, right) < 5e-2
    assert not fast.qgraph.eager
    assert {p.form.count for p in fast.qgraph.programs} == {1, count}
