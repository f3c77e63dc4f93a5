"""Running a program on a model's caches, and trying one that is new."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx

from ...runtime.executable import Executable
from ..caches.numbers import Numbers, Pool
from ..caches.of_call import Caches
from .call import Step
from .check import Check
from .form import Form
from .maker import Program


def run(
    executable: Executable,
    form: Form,
    tokens: mx.array,
    caches: Caches,
    numbers: Numbers,
    pool: Pool | None = None,
) -> mx.array:
    """The logits of a call; caches are handed over, and come back as they are after it.

    Args:
        tokens: (rows, tokens), as many as the form has or fewer.
        pool: the caches' numbers, where they were gathered already.
    """
    valid, count = tokens.shape[1], form.count
    if pool is None or caches.end:
        caches.settle()
        pool = numbers.pool(caches.kinds, caches.items)
    if tokens.dtype != mx.int32:
        tokens = tokens.astype(mx.int32)
    if count > valid:
        tokens = mx.pad(tokens, [(0, 0), (0, count - valid)])
    counts = [mx.array(valid, mx.int32)] if count > 1 else []
    given = executable.in_parts([tokens, *pool.values, *counts, *caches.hand_over()])
    logits, *results = executable.take(given)
    caches.put(form.kinds, results, form.arrays, Step(valid, count, pool.leaders))
    numbers.follow(pool, caches.kinds, caches.items)
    return logits[:, :valid] if count > valid else logits


def first_run(
    program: Program, model: Any, tokens: mx.array, caches: Caches, check: Check
) -> mx.array:
    """The logits of a program's first call, compared with the model's.

    Where they part the model's own are given, the caches are the model's, and the program is no
    more; or it has another chance, where rounding may have parted them.
    """
    assert program.executable is not None
    before = copy.deepcopy(caches.items)
    tried = Caches(copy.deepcopy(before), caches.kinds)
    # Of a program whose weights are quantized further, it is the graph before that is compared.
    form = program.form
    if program.reference is None:
        logits = run(program.executable, form, tokens, tried, Numbers())
    else:
        logits = run(program.reference, form, tokens, tried, Numbers())
    difference = check.difference(model, caches.kinds, tokens, before, (logits, tried.items))
    if difference is None and program.reference is not None:
        tried = Caches(before, caches.kinds)
        logits = run(program.executable, form, tokens, tried, Numbers())
    if difference is None:
        program.checked, program.reference = True, None
    else:
        program.chances -= 1
        if not difference.chance or not program.chances:
            program.executable, program.reason = None, str(difference)
        tried = Caches(before, caches.kinds)
        logits = check.own(model, tokens, cache=tried.items)
    for c, after in zip(caches.items, tried.items, strict=True):
        vars(c).update(vars(after))
    return logits
