"""Is MLX transforming a call?  `mx.grad`, `vmap`, `compile` and their like pass *tracers*.

MLX has no word for it in Python, but a compiled function is called in Python for tracers alone,
once it has been traced for the types of its arguments.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence

import mlx.core as mx

from .compiled import Compiled

_seen = threading.local()


def _note(*arrays: mx.array) -> list[mx.array]:
    _seen.called = True
    return []


class Tracers:
    """Tells tracers from arrays, for calls of the same types in a few microseconds.

    >>> import mlx.core as mx
    >>> tracers, found = Tracers(), []
    >>> _ = mx.grad(lambda x: (found.append(tracers.among([x])), x)[1])(mx.array(1.0))
    >>> found, tracers.among([mx.array(1.0)])
    ([True], False)
    """

    def __init__(self) -> None:
        self._probe = Compiled(_note)

    def among(self, arrays: Sequence[mx.array]) -> bool:
        """Is one of `arrays` a tracer?  Without `mx.compile` it evaluates them to find out."""
        if not self.called_for(arrays):
            return False
        return not self.called_for([mx.array(0)]) or _keep_their_graph(arrays)

    def called_for(self, arrays: Sequence[mx.array]) -> bool:
        """Is a compiled function called in Python for `arrays`?  Without `mx.compile` for all."""
        for _ in range(2):  # the first time for these types it is traced
            _seen.called = False
            self._probe.call(*arrays)
            if not _seen.called:
                return False
        return True


def is_shapeless() -> bool:
    """Is a call traced for all shapes, by `mx.compile` or `mx.export_function(shapeless=True)`?

    MLX then makes a broadcast that follows its operands' shapes, which tells.

    >>> import mlx.core as mx
    >>> found = []
    >>> for shapeless in (False, True):
    ...     fn = mx.compile(lambda x: (found.append(is_shapeless()), x)[1], shapeless=shapeless)
    ...     _ = fn(mx.zeros(2))
    >>> found
    [False, True]
    """
    text = io.StringIO()
    mx.export_to_dot(text, *mx.broadcast_arrays(mx.array(0), mx.zeros(1)))
    return "StopGradient" in text.getvalue()


def _keep_their_graph(arrays: Sequence[mx.array]) -> bool:
    """Do arrays computed from these know what from, once they are evaluated?  Tracers' do."""
    made = [mx.stop_gradient(array) for array in arrays]
    try:
        mx.eval(made)
    except ValueError:  # so says MLX inside of vmap and compile
        return True
    text = io.StringIO()
    mx.export_to_dot(text, *made)
    return "StopGradient" in text.getvalue()
