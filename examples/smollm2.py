"""SmolLM2-135M-Instruct in qgraph: a llama-type model as a person would write it.

    python -m qgraph.examples.smollm2 "What is the capital of France?"

The decode loop is one traced graph that carries its key-value cache.  The weights come in two
forms: packed, with the dequantize written out before each product (which qgraph fuses), and float,
quantized in the loop (which qgraph hoists out of it).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.examples import smollm2_files as files

Cache = list[tuple[Any, Any]]
"""For each layer keys and values, (batch, kv_heads, length, head_dim)."""


@dataclass(frozen=True)
class Llama:
    """The model: sizes, weights by name, and how a product with a weight is written.

    Attributes:
        config: sizes and constants.
        weights: packed (`.weight`, `.scales`, `.biases`) or float (`.weight`) arrays by name.
        length: positions that the cache holds.
        dtype: of everything between the products.
    """

    config: files.Config
    weights: files.Weights
    length: int = 512
    dtype: mx.Dtype = mx.float32

    def linear(self, name: str, x: Any) -> Any:
        """`x @ weight.T`: from packed weights written out, from float ones quantized here."""
        weight = self.weights[f"{name}.weight"]
        if f"{name}.scales" in self.weights:
            return x @ self.dense(name).T
        bits = 8 if name == "model.embed_tokens" else 4
        return qg.quantized_matmul(x, weight, group_size=self.config.group_size, bits=bits)

    def dense(self, name: str) -> Any:
        """The weight as a dense matrix."""
        if f"{name}.scales" not in self.weights:
            return qg.tensor(self.weights[f"{name}.weight"])
        w, scales, biases = (
            self.weights[f"{name}.{part}"] for part in ("weight", "scales", "biases")
        )
        group_size = self.config.group_size
        bits = files.bits_of(self.weights, name, group_size)
        return qg.dequantize(w, scales, biases, group_size, bits)

    def norm(self, name: str, x: Any) -> Any:
        return qg.fast.rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_eps)

    def attention(
        self, name: str, x: Any, cache: tuple[Any, Any], position: Any, mask: Any
    ) -> tuple[Any, tuple[Any, Any]]:
        c = self.config

        def heads(part: str, count: int) -> Any:
            y = self.linear(f"{name}.{part}_proj", x)
            return y.reshape(x.shape[0], -1, count, c.head_dim).transpose(0, 2, 1, 3)

        def rope(y: Any) -> Any:
            return qg.fast.rope(y, c.head_dim, traditional=c.rope_traditional, base=c.rope_base,
                                scale=1.0, offset=position)  # fmt: skip

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        q, k, start = rope(q), rope(k), position.reshape(1)
        after = (
            qg.slice_update(cache[0], k, start, axes=(2,)),
            qg.slice_update(cache[1], v, start, axes=(2,)),
        )
        keys, values = (k, v) if isinstance(mask, str) else after
        y = qg.fast.scaled_dot_product_attention(q, keys, values, scale=c.head_dim**-0.5, mask=mask)
        y = y.transpose(0, 2, 1, 3).reshape(x.shape[0], -1, c.heads * c.head_dim)
        return self.linear(f"{name}.o_proj", y), after

    def mlp(self, name: str, x: Any) -> Any:
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate * qg.sigmoid(gate)
                           * self.linear(f"{name}.up_proj", x))  # fmt: skip

    def forward(self, tokens: Any, cache: Cache, position: Any = None) -> tuple[Any, Cache]:
        """The last layer's output (batch, count, hidden) of `tokens` (batch, count), and the cache.

        `position`, int32 without axes, is where the first of the tokens stands; without it they
        are the first, and see nothing but one another.
        """
        h = qg.take(self.dense("model.embed_tokens"), tokens, axis=0).astype(self.dtype)
        if position is None:
            position, mask = qg.zeros((), mx.int32), "causal"
        else:
            rows = qg.arange(tokens.shape[1])[:, None] + position
            mask = qg.arange(self.length)[None, :] <= rows
        after = []
        for i in range(self.config.layers):
            layer = f"model.layers.{i}"
            y, kept = self.attention(
                f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", h), cache[i],
                position, mask,
            )  # fmt: skip
            after.append(kept)
            h = h + y
            h = h + self.mlp(f"{layer}.mlp", self.norm(f"{layer}.post_attention_layernorm", h))
        return self.norm("model.norm", h), after

    def logits(self, h: Any) -> Any:
        """For each position of h (..., hidden) the scores of all tokens, (..., vocab)."""
        return self.linear("model.embed_tokens" if self.config.tied else "lm_head", h)

    def empty_cache(self, batch: int = 1) -> Cache:
        c = self.config
        shape = (batch, c.kv_heads, self.length, c.head_dim)
        return [(mx.zeros(shape, self.dtype), mx.zeros(shape, self.dtype)) for _ in range(c.layers)]

    def prefill(self, tokens: Any, count: Any, cache: Cache) -> tuple[Any, Cache]:
        """Read a prompt of `count` tokens, padded at the end: logits of the last, and the cache."""
        h, cache = self.forward(tokens, cache)
        return self.logits(qg.take(h, count - 1, axis=1)), cache

    def decode(self, steps: int, temperature: float = 0.0) -> Callable[..., Any]:
        """The decode loop for `steps` tokens: (token, position, key, cache) in and out.

        The token has no axes, or one of the batch.  Greedy at temperature 0, else sampled with the
        key that is carried along.
        """

        def loop(token: Any, position: Any, key: Any, cache: Cache) -> Any:
            def step(carry: Any, _: Any) -> Any:
                token, position, key, cache = carry
                h, cache = self.forward(token.reshape(-1, 1), cache, position)
                logits = self.logits(h).reshape(*token.shape, -1)
                token, key = choose(logits, key, temperature)
                return (token, position + 1, key, cache), token

            return qg.scan(step, (token, position, key, cache), length=steps)

        return loop


def choose(logits: Any, key: Any, temperature: float) -> tuple[Any, Any]:
    """The next token for logits (..., vocab), int32, and the key for the one after."""
    if temperature == 0:
        return qg.argmax(logits, axis=-1).astype(mx.int32), key
    now, later = qg.split(qg.random.split(key), 2)
    token = qg.random.categorical(logits / temperature, key=now.reshape(2))
    return token.astype(mx.int32), later.reshape(2)


class Generator:
    """Two programs, for the prompt and for the loop, that share one packed copy of the weights."""

    def __init__(
        self, model: Llama, *, temperature: float = 0.0, chunk: int = 8, **options: Any
    ) -> None:
        self.model, self.temperature, self.chunk = model, temperature, chunk
        # Caches are handed over, and written where they are.
        self.prefill = qg.jit(model.prefill, donate=[2], **options)
        self.decode = qg.jit(
            model.decode(chunk, temperature), donate=[3], share=self.prefill, **options
        )

    def tokens(self, prompt: Sequence[int], count: int, seed: int = 0) -> Iterator[int]:
        """Up to `count` tokens after `prompt`, as they come; ends at the end token.

        Raises:
            ValueError: prompt and tokens do not fit the cache; MLX would write past its end.
        """
        needed = len(prompt) + -len(prompt) % 16 + count + self.chunk
        if needed > self.model.length:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and {count} more need a cache of {needed} "
                f"positions, this one has {self.model.length}: make Llama(..., length={needed})"
            )
        padded = -len(prompt) % 16
        ids = mx.array([[*prompt, *([0] * padded)]])
        length = mx.array(len(prompt), mx.int32)
        logits, cache = self.prefill(ids, length, self.model.empty_cache())
        token, key = choose(logits[0], mx.random.key(seed), self.temperature)
        produced = [int(token.item())]
        position = length
        while True:
            for value in produced:
                if value == self.model.config.eos_id or count == 0:
                    return
                count -= 1
                yield value
            (token, position, key, cache), made = self.decode(token, position, key, cache)
            produced = made.tolist()


def main(prompt: str) -> None:
    found = files.load()
    model = Llama(found.config, found.weights)
    chat = found.tokenizer.chat_prompt([{"role": "user", "content": prompt}])
    text = files.TextStream(found.tokenizer)
    for token in Generator(model).tokens(found.tokenizer.encode(chat), count=64):
        print(text.feed(token), end="", flush=True)
    print(text.finish())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?")
