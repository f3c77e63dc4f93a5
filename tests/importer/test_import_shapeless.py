"""Exports without shapes: imported at any shape, and not made."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import UnsupportedError
from tests.importer.test_import import X, agree


class TestShapeless:
    """Graphs have their shapes; what was exported without may still be imported."""

    def fn(self, x: mx.array) -> mx.array:
        scaled = x.mean(axis=0, keepdims=True) * x + mx.var(x)
        return mx.softmax(scaled.reshape(-1, 2), axis=0) + mx.broadcast_to(x[:1, :1], (1, 2))

    @pytest.mark.parametrize("shape", [(4, 6), (2, 6), (9, 6)])
    def test_exported_files_at_any_shape(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        file = str(tmp_path / "f.mlxfn")
        mx.export_function(file, lambda x: x.mean(0) * x + x.sum(1, keepdims=True), X,
                           shapeless=True)  # fmt: skip
        imported = mx.import_function(file)
        x = mx.random.normal(shape, key=mx.random.key(8))
        graph = agree(lambda a: imported(a)[0], x)
        assert graph.outputs[0].type.shape == shape

    def test_exported_files_of_one_shape(self, tmp_path: Path) -> None:
        file = str(tmp_path / "f.mlxfn")
        mx.export_function(file, self.fn, X)
        imported = mx.import_function(file)
        agree(lambda a: imported(a)[0], X)

    def test_the_keyword_is_refused_in_words(self) -> None:
        with pytest.raises(UnsupportedError, match="a graph has its shapes") as caught:
            qg.from_mlx(self.fn, X, shapeless=True)
        assert "once for each shape" in caught.value.hint

    def test_a_function_may_have_the_keyword(self) -> None:
        def fn(x: mx.array, shapeless: bool) -> mx.array:
            return x if shapeless else -x

        assert qg.from_mlx(fn, X, shapeless=True).count() == 0
