"""What tokens do to a state, in other steps than mlx-lm's: one token as a step, many by chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.ssm import compute_dt

CHUNK = 64
"""Tokens that the gated delta rule takes at once; a power of two."""
LEAST = -100.0
"""Of the logarithm of a decay: what it leaves of a number is nothing, and it can be subtracted."""


def ssm_step(
    hidden_states: mx.array, A_log: mx.array, B: mx.array, C: mx.array, D: mx.array, dt: mx.array,
    dt_bias: mx.array, state: mx.array, time_step_limit: Any = (0.001, 100.0),
    mask: None = None, lengths: None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """One token of mlx-lm's `ssm_attn`: state' = exp(dt A) state + dt x B, y = C state' + D x.

    Args:
        hidden_states: x, (rows, 1, heads, dim).
        B, C: (rows, 1, groups, n).
        state: (rows, heads, dim, n).
    """
    rows, _, heads, dim = hidden_states.shape
    repeats = heads // B.shape[2]
    dt = compute_dt(dt, dt_bias, time_step_limit)
    decay = mx.exp(dt * -mx.exp(A_log).astype(dt.dtype)).reshape(rows, heads, 1, 1)
    x = (dt.reshape(rows, 1, heads, 1) * hidden_states).reshape(rows, heads, dim, 1)
    b, c = (mx.repeat(a.reshape(rows, -1, a.shape[-1]), repeats, axis=1) for a in (B, C))
    state = state * decay + x * b[:, :, None]
    y = (state @ c[..., None]).reshape(rows, 1, heads, dim)
    return y.astype(hidden_states.dtype) + hidden_states * D.reshape(1, 1, heads, 1), state


def delta_rule(
    scan: Callable[..., Any], q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array,
    state: mx.array, mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """mlx-lm's `gated_delta_ops`, `scan`, of which a prompt of 512 tokens is 5,000 nodes a layer.

    A token makes of the state S' = g S + d k^T with d = beta (v - g S k), and y = S' q.  With G the
    product of a chunk's decays up to a token, the d of all its tokens solve the triangular system
    d_t + beta_t sum_(i<t) G_t/G_i (k_t.k_i) d_i = beta_t (v_t - G_t S k_t): a chunk is a few
    products (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024).

    Args:
        q, k: (rows, tokens, key heads, dim).
        v: (rows, tokens, heads, dim of values).
        g, beta: (rows, tokens, heads); a decay for each number of a key is left to `scan`.
        state: (rows, heads, dim of values, dim).
        mask: (rows, tokens); what is no token reads the state and leaves it alone.
    """
    rows, count, heads, _ = v.shape
    chunk = min(count, CHUNK)
    if count == 1 and mask is None and g.ndim == 3:
        return _delta_step(q, k, v, g, beta, state)
    if count == 1 or count % chunk or chunk & (chunk - 1) or g.ndim != 3:
        return scan(q, k, v, g, beta, state, mask)  # type: ignore[no-any-return]
    dtype = q.dtype

    def cut(x: mx.array) -> mx.array:
        """(rows, heads, chunks, tokens of a chunk, …) in float32."""
        x = mx.repeat(x.astype(mx.float32), heads // x.shape[2], axis=2).swapaxes(1, 2)
        return x.reshape(rows, heads, -1, chunk, *x.shape[3:])

    q, k, v, g, beta = (cut(x) for x in (q, k, v, g, beta))
    there = mx.ones_like(g) if mask is None else cut(mask[..., None])
    beta, logs = beta[..., None], mx.maximum(mx.log(g), LEAST)
    before, kept = mx.array(np.tri(chunk, k=-1, dtype=bool)), logs * there
    own = (logs - kept)[..., None]  # the decay of what is no token: it alone sees that
    # Sums of logarithms from one token to another, without the difference of two long sums.
    between = mx.cumsum(mx.where(before, kept[..., None], 0.0), axis=-2)
    decay = mx.where(before, mx.exp(between + own) * there[..., None, :], _one(chunk))
    until = mx.cumsum(kept, axis=-1)[..., None]
    from_start, whole = mx.exp(until + own), mx.exp(until[..., -1:, :])
    solve = _inverse(mx.where(before, beta * decay * (k @ k.swapaxes(-1, -2)), 0.0))
    of_values, of_state = solve @ (beta * v), solve @ (beta * from_start * k)
    seen, start = decay * (q @ k.swapaxes(-1, -2)), from_start * q
    keys = (mx.exp(between[..., -1, :]) * there)[..., None] * k
    ys, now = [], state.astype(mx.float32)
    for i in range(count // chunk):
        before_it = now.swapaxes(-1, -2)
        d = of_values[:, :, i] - of_state[:, :, i] @ before_it
        ys.append(start[:, :, i] @ before_it + seen[:, :, i] @ d)
        now = whole[:, :, i] * now + d.swapaxes(-1, -2) @ keys[:, :, i]
    y = mx.concatenate(ys, axis=2).swapaxes(1, 2)
    return y.astype(dtype), now.astype(state.dtype)


def _delta_step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Of one token; heads that share a key read it where it is."""
    rows, _, heads, size = v.shape
    apart = (rows, k.shape[2], heads // k.shape[2])
    q, k = (x.reshape(*apart[:2], 1, 1, -1) for x in (q, k))
    now = state.reshape(*apart, *state.shape[2:]) * g.reshape(*apart, 1, 1)
    d = (v.reshape(*apart, size) - (now * k).sum(axis=-1)) * beta.reshape(*apart, 1)
    now = now + k * d[..., None]
    y = (now * q).sum(axis=-1).astype(q.dtype)
    return y.reshape(v.shape), now.reshape(state.shape)


def _inverse(lower: mx.array) -> mx.array:
    """Of 1 + lower, which is zero on and above the diagonal, of a power of two of rows.

    From blocks on the diagonal to blocks twice as wide: [[A, 0], [B, D]] has the inverse
    [[A', 0], [-D' B A', D']].
    """
    size, width = lower.shape[-1], 1
    at, found = np.arange(size), _one(size)
    while width < size:
        of_both, own = at // (2 * width), at // width
        beside = mx.array((of_both[:, None] == of_both) & (own[:, None] != own))
        step = mx.where(beside, lower, 0.0)
        found = found - (step if width == 1 else found @ step @ found)
        width *= 2
    return found


def _one(size: int) -> mx.array:
    return mx.array(np.eye(size, dtype=np.float32))
