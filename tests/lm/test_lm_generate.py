"""mlx-lm's functions over accelerated models: the same tokens as over the models themselves."""

from __future__ import annotations

import copy
import ctypes
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from typer.testing import CliRunner

import qgraph as qg
from qgraph.cli import app, main
from qgraph.examples import checkpoint
from qgraph.examples import smollm2_files as files
from qgraph.lm.caches.kind import same_length
from qgraph.lm.caches.of_call import Caches
from qgraph.lm.programs.background import settled
from qgraph.lm.programs.check import Check
from qgraph.lm.programs.compare import Difference
from qgraph.target import as_target
from tests.support.compiler import needs_compiler
from tests.support.zoo import build

pytest.importorskip("mlx_lm.models.cache")
pytest.importorskip("transformers")
generate: Any = pytest.importorskip("mlx_lm.generate")
lm_cache: Any = pytest.importorskip("mlx_lm.models.cache")

PROMPT = [(13 * i + 5) % 200 + 1 for i in range(21)]
CONFIG = replace(files.TOY_CONFIG, heads=2, kv_heads=1, head_dim=32)
Load = Callable[[], tuple[Any, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy in a folder as mlx-lm writes one, in float32: rounding then decides no token."""
    toy = files.Model(CONFIG, files.toy_weights(CONFIG), files.ByteTokenizer())
    return checkpoint.write(toy, tmp_path_factory.mktemp("toy"), mx.float32)


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """On the CPU, without a compiler for each fused kernel, and every warning an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    monkeypatch.setattr(generate, "generation_stream", mx.new_thread_local_stream(mx.cpu))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="qgraph")
        yield
    mx.enable_compile()
    mx.set_default_device(before)


@pytest.fixture
def load(folder: Path) -> Load:
    from mlx_lm import load

    return lambda: load(str(folder))


def tokens(model: Any, prompt: list[int] = PROMPT, count: int = 12, **settings: Any) -> list[int]:
    steps = generate.generate_step(mx.array(prompt), model, max_tokens=count, **settings)
    return [token for token, _ in steps]


def both(load: Load) -> tuple[Any, Any]:
    model, _ = load()
    return model, qg.lm.accelerate(load()[0], target="cpu", background=False, keep=False)


def test_it_is_the_same_model(load: Load) -> None:
    model, _ = load()
    fast = qg.lm.accelerate(model, keep=False)
    assert isinstance(fast, type(model))
    assert inspect.signature(fast.__call__) == inspect.signature(model.__call__)
    assert fast.layers is model.layers
    mine, theirs = (dict(tree_flatten(m.parameters())) for m in (fast, model))
    assert all(mine[path] is array for path, array in theirs.items())
    assert type(fast.layers[0]) is type(model.layers[0])
    assert [type(c) for c in lm_cache.make_prompt_cache(fast)] == [lm_cache.KVCache] * 2
    assert fast.qgraph.programs == []


def test_stream_generate_past_the_end_of_a_buffer(load: Load) -> None:
    model, fast = both(load)
    tokenizer = load()[1]
    tokenizer.eos_token_ids = {-1}

    def answer(model: Any) -> list[Any]:
        found = generate.stream_generate(model, tokenizer, PROMPT, max_tokens=300)
        return [(r.token, r.text) for r in found]

    assert answer(fast) == answer(model)
    assert {p.form.length for p in fast.qgraph.programs} == {256, 512}
    assert not fast.qgraph.eager


def test_the_program_for_the_next_buffer_is_made_ahead(load: Load) -> None:
    _, fast = both(load)
    tokens(fast, PROMPT * 9, count=6)  # 189 and 6 more of 256 positions
    settled()
    ahead = [p for p in fast.qgraph.programs if p.form.length == 512]
    assert [(p.form.count, p.calls, p.checked) for p in ahead] == [(1, 0, True)]
    tokens(fast, PROMPT * 9, count=70)
    assert ahead[0].calls > 0


@needs_compiler
def test_a_token_is_written_into_the_caches_own_buffers(load: Load) -> None:
    """Nothing of a call may hold what it hands over: MLX would copy it."""
    _, fast = both(load)
    cache = lm_cache.make_prompt_cache(fast)
    fast(mx.array([PROMPT]), cache=cache)
    for c in cache:  # small arrays are copied
        c.keys, c.values = same_length(c.keys, 4096), same_length(c.values, 4096)
    places = []
    for token in (5, 6, 7):
        mx.eval(fast(mx.array([[token]]), cache=cache))
        places.append([ctypes.addressof(ctypes.c_char.from_buffer(a))
                       for c in cache for a in (c.keys, c.values)])  # fmt: skip
    assert places[1] == places[2]


def test_the_model_answers_while_its_programs_are_made(load: Load) -> None:
    model, _ = load()
    fast = qg.lm.accelerate(load()[0], target="cpu", keep=False)
    expected = tokens(model, count=20)
    assert tokens(fast, count=20) == expected
    assert fast.qgraph.report().count("while a program was made")
    settled()
    programs = fast.qgraph.programs
    assert {p.form.count for p in programs} == {1, 4, 16}
    assert all(p.checked for p in programs)
    calls = sum(p.calls for p in programs)
    assert tokens(fast, count=20) == expected
    assert sum(p.calls for p in programs) == calls + 3 + 20
    assert len(fast.qgraph.programs) == 3
    assert not fast.qgraph.eager


def test_a_state_that_is_not_there_yet_stays_so_for_the_model() -> None:
    """A model does more with zeros: mamba2 took a sixth longer to its first token."""
    fast = qg.lm.accelerate(build("mamba2"), target="cpu", keep=False)
    cache = lm_cache.make_prompt_cache(fast)
    own, seen = fast.qgraph._maker.own, []

    def noting(model: Any, tokens: mx.array, cache: Any) -> mx.array:
        seen.append([c[0] is None for c in cache])
        return own(model, tokens, cache=cache)

    object.__setattr__(fast.qgraph._maker, "own", noting)
    for ids in ([PROMPT[:16]], [[3]]):
        fast(mx.array(ids), cache=cache)
    assert [set(states) for states in seen] == [{True}, {True}, {False}]  # first for shapes alone


def test_python_may_end_while_a_program_is_made(folder: Path) -> None:
    code = f"""
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.disable_compile()
import mlx_lm, qgraph as qg
from mlx_lm.models.cache import make_prompt_cache
fast = qg.lm.accelerate(mlx_lm.load({str(folder)!r})[0], keep=False)
cache = make_prompt_cache(fast)
for token in range(4):
    mx.eval(fast(mx.array([[token]]), cache=cache))
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_warm(load: Load) -> None:
    fast = qg.lm.accelerate(load()[0], target="cpu", warm=True, keep=False)
    made = {(p.form.count, p.form.fresh) for p in fast.qgraph.programs}
    assert made == {(1, False), (4, True), (16, True), (64, True)}
    tokens(fast, PROMPT[:16])
    assert len(fast.qgraph.programs) == 4


def test_prompts_of_any_length_and_kind(load: Load) -> None:
    model, fast = both(load)
    for length in (1, 2, 3, 5, 16, 17, 33, 64, 70, 100):
        prompt = (PROMPT * 5)[:length]
        assert tokens(fast, prompt, 4) == tokens(model, prompt, 4), length
    assert len({(p.form.count, p.form.fresh) for p in fast.qgraph.programs}) <= 8
    few = len(fast.qgraph.programs)
    for dtype in (mx.int32, mx.uint32, mx.int64):
        fast(mx.array([PROMPT], dtype), cache=lm_cache.make_prompt_cache(fast))
    assert len(fast.qgraph.programs) == few


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 24},
        {"max_kv_size": 16},
        {"prefill_step_size": 6},
    ],
    ids=str,
)
def test_settings(load: Load, settings: dict[str, Any]) -> None:
    model, fast = both(load)
    assert tokens(fast, count=30, **settings) == tokens(model, count=30, **settings)
    assert not fast.qgraph.eager


def test_prompt_caches_go_on(load: Load, tmp_path: Path) -> None:
    """Saved, loaded, copied and trimmed between calls; from one model to the other and back."""
    model, fast = both(load)

    def talk(first: Any, second: Any) -> list[int]:
        cache = lm_cache.make_prompt_cache(first)
        found = tokens(first, count=5, prompt_cache=cache)
        lm_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        cache = lm_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
        found += tokens(second, PROMPT[:3], 5, prompt_cache=copy.deepcopy(cache))
        lm_cache.trim_prompt_cache(cache, 4)
        return found + tokens(second, PROMPT[3:9], 5, prompt_cache=cache)

    expected = talk(model, model)
    for first, second in ((fast, fast), (model, fast), (fast, model)):
        assert talk(first, second) == expected


@pytest.mark.parametrize("as_draft", [True, False])
def test_speculative(load: Load, as_draft: bool) -> None:
    model, fast = both(load)
    draft, fast_draft = both(load)
    for one in (draft, fast_draft):  # near enough to the target that it guesses some tokens right
        one.update(tree_map(lambda a: a * 1.01 if a.ndim == 1 else a, one.parameters()))

    def found(model: Any, draft: Any) -> list[Any]:
        steps = generate.speculative_generate_step(
            mx.array(PROMPT), model, draft, num_draft_tokens=3, max_tokens=24
        )
        return [(token, from_draft) for token, _, from_draft in steps]

    expected = found(model, draft)
    assert {from_draft for _, from_draft in expected} == {True, False}
    assert found(fast, fast_draft if as_draft else draft) == expected
    assert not fast.qgraph.eager


def test_batches(load: Load) -> None:
    model, fast = both(load)
    tokenizer = load()[1]
    tokenizer.eos_token_ids = {-1}
    prompts = [PROMPT, PROMPT[:4], PROMPT[5:14], [7]]

    def answers(model: Any) -> Any:
        found = generate.batch_generate(
            model, tokenizer, prompts, max_tokens=[9, 14, 5, 12], return_prompt_caches=True
        )
        again = generate.batch_generate(
            model, tokenizer, [[3, 4], [5]], prompt_caches=found.caches[:2], max_tokens=4
        )
        return found.token_ids, again.token_ids

    assert answers(fast) == answers(model)
    assert not fast.qgraph.eager


def test_continuous_batches(load: Load) -> None:
    """Rows come and go while others are under way."""
    model, fast = both(load)

    def answers(model: Any) -> dict[int, list[int]]:
        batches = generate.BatchGenerator(model, max_tokens=8, stream=mx.default_stream(mx.cpu))
        found: dict[int, list[int]] = {}
        batches.insert([PROMPT[:5], PROMPT[:9]])
        for turn in range(60):
            if turn == 3:
                batches.insert([PROMPT[2:], PROMPT[:1]], max_tokens=[12, 3])
            for response in batches.next()[1]:
                found.setdefault(response.uid, []).append(response.token)
        batches.close()
        return found

    expected = answers(model)
    assert [len(expected[uid]) for uid in range(4)] == [8, 8, 12, 3]
    assert answers(fast) == expected


def test_scores_as_evaluate_computes_them(load: Load) -> None:
    model, fast = both(load)
    ids = mx.array([PROMPT * 3, PROMPT[::-1] * 3])

    def scores(model: Any) -> mx.array:
        cache = lm_cache.make_prompt_cache(model)
        found = [model(ids[:, i : i + 25], cache=cache) for i in range(0, ids.shape[1], 25)]
        return mx.concatenate(found, axis=1)

    expected = scores(model)
    assert mx.allclose(scores(fast), expected, rtol=1e-3, atol=1e-4).item()


def test_weights_are_looked_up(load: Load, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

    model, fast = both(load)
    first = tokens(model)
    assert tokens(fast) == first

    def change(weights: Callable[[Any], Any]) -> None:
        for one in (model, fast):
            weights(one)
        expected = tokens(model)
        assert tokens(fast) == expected

    def halve(one: Any) -> None:
        one.update(tree_map(lambda a: a * 0.5 if a.ndim == 1 else a, one.parameters()))

    def adapt(one: Any) -> None:
        settings = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        linear_to_lora_layers(one, 2, settings)
        for i, layer in enumerate(one.layers):
            adapter = layer.self_attn.q_proj
            for name in ("lora_a", "lora_b"):
                adapter[name] = mx.random.normal(adapter[name].shape, key=mx.random.key(i))

    def scale(one: Any) -> None:
        for layer in one.layers:
            layer.self_attn.q_proj.scale = -5.0

    def switch(one: Any) -> None:
        other = {"lora_a": lambda a: a[::-1] * 2, "lora_b": lambda b: -b}
        for layer in one.layers:
            adapter = layer.self_attn.q_proj
            adapter.update({name: change(adapter[name]) for name, change in other.items()})

    def fuse(one: Any) -> None:
        fused = [(name, part.fuse()) for name, part in one.named_modules() if hasattr(part, "fuse")]
        assert len(fused) == 2
        one.update_modules(tree_unflatten(fused))

    saved = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(saved), dict(tree_flatten(model.parameters())))
    for weights in (halve, adapt, scale, remove_lora_layers, adapt, switch, fuse):
        change(weights)
    change(lambda one: one.load_weights(str(saved)))
    assert tokens(fast) == first
    change(lambda one: one.set_dtype(mx.float16))
    assert "weights changed" in fast.qgraph.report()


def test_what_runs_without_a_program_says_so_once(load: Load) -> None:
    model, fast = both(load)
    ids = mx.array([PROMPT])
    with pytest.warns(UserWarning, match="a call without a cache"):
        assert mx.array_equal(fast(ids), model(ids)).item()
    assert mx.array_equal(fast(ids), model(ids)).item()
    assert fast.qgraph.eager["a call without a cache"] == 2
    assert "by the model itself, 2 times: a call without a cache" in fast.qgraph.report()


def test_a_program_that_is_wrong_is_not_used(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from qgraph.lm.programs.call import Call

    model, fast = both(load)
    expected = tokens(model)
    mask = Call.mask
    monkeypatch.setattr(Call, "mask", lambda *args, **kwargs: mask(*args, **kwargs) | True)
    with pytest.warns(UserWarning, match=r"part from the model's at layer 1"):
        assert tokens(fast) == expected
    assert any("layer 1" in why for why in fast.qgraph.eager)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_long_piece_in_half_precision_is_compared_by_its_ends(load: Load, factor: float) -> None:
    """Float32 decides, of the first tokens' caches alone, and raises nothing."""
    model, _ = load()
    model.set_dtype(mx.bfloat16)
    own, before = type(model).__call__, lm_cache.make_prompt_cache(model)
    after, ids = copy.deepcopy(before), mx.array([PROMPT[:16]])
    logits = own(model, ids, cache=after)
    for cache in after:
        cache.keys = cache.keys * factor
    kinds = Caches.of(before).kinds  # type: ignore[union-attr]
    found = Check(own, as_target("cpu")).difference(model, kinds, ids, before, (logits, after))
    assert (found is None) == (factor == 1)


@pytest.mark.parametrize("always", [False, True])
def test_rounding_gives_programs_another_chance(
    always: bool, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router in half precision chooses otherwise at some tokens, a wrong program at all."""
    model, fast = both(load)
    parted = {1, 2}  # of the comparisons
    compared = iter(range(1, 1000))

    def difference(self: Check, *_: Any) -> Difference | None:
        apart = always or next(compared) in parted
        return Difference("layer 1", 0.1, chance=True) if apart else None

    monkeypatch.setattr(Check, "difference", difference)
    with pytest.warns(UserWarning, match="part") if always else nullcontext():
        assert tokens(fast) == tokens(model)
    assert "rounding parted it from a new program" in fast.qgraph.report()
    assert bool(fast.qgraph.eager) == always
    assert any(p.checked for p in fast.qgraph.programs) != always


def test_quantized_by_qgraph(load: Load) -> None:
    """Float weights packed for the programs alone: nearly the numbers of the float model."""
    weights = files.dequantized(files.toy_weights(CONFIG))
    model = files.mlx_lm_model(weights, CONFIG)
    fast = qg.lm.accelerate(
        model, quantize=qg.Quantize(8, group_size=32), target="cpu", background=False
    )
    cache = [lm_cache.make_prompt_cache(m) for m in (model, fast)]
    for ids in ([PROMPT], [[3]], [[5]]):
        expected, actual = (
            m(mx.array(ids), cache=c) for m, c in zip((model, fast), cache, strict=True)
        )
        assert mx.abs(actual - expected).max() < 0.05 * mx.abs(expected).max()
    assert {w.bits for p in fast.qgraph.programs for w in p.plan.weights()} == {8}


@pytest.mark.parametrize(
    "words",
    [
        "generate --model /no/folder --prompt hi",
        "serve --model=/no/folder",
        "chat --model {folder} --adapter-path /no/folder",
        "generate --model {folder} --prompt hi --html /no/folder/plan.html",
        "generate --model {folder} --prompt hi --html plan.txt",
        "generate --model {empty} --prompt hi",
    ],
)
def test_the_command_line_says_what_is_not_there(
    folder: Path, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded or generated, in words."""
    given = words.format(folder=folder, empty=tmp_path).split()
    with pytest.raises(SystemExit) as ended:
        main(lambda: app(given))
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert any(w in told for w in ("there is no", "no page", "holds no model"))
    assert "site-packages" not in told


def test_what_the_system_refuses_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken() -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("mlx_lm.server.main", taken)
    with pytest.raises(SystemExit):
        main(lambda: app(["serve", "--model", str(folder)]))
    assert "serve: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--report"]])
def test_the_command_line(folder: Path, flags: list[str], tmp_path: Path) -> None:
    words = ["generate", *flags, "--model", str(folder), "--prompt", "hi", "--max-tokens", "4"]
    page = ["--html", str(tmp_path / "plan.html")] if flags else []
    result = CliRunner().invoke(app, [*words, *page])
    assert result.exit_code == 0, result.output
    assert "Generation: 4 tokens" in result.output
    assert ("a token, 256 positions" in result.output) == bool(flags)
    assert (tmp_path / "plan.html").exists() == bool(flags)
