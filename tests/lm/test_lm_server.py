"""`qgraph serve` beside mlx-lm's own server: the same answers, two connections at once, streaming.

QGRAPH_REQUESTS=2000 python -m pytest -s tests/lm/test_lm_server.py asks an hour's worth, and prints
what the server holds after half of them and after all.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import platformdirs
import pytest

from qgraph.examples import checkpoint
from qgraph.examples import smollm2_files as files
from qgraph.kernels.cpu.library import library

pytest.importorskip("mlx_lm.models.cache")
pytest.importorskip("transformers")
REQUESTS = int(os.environ.get("QGRAPH_REQUESTS", "24"))
START = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.disable_compile()
if sys.argv.pop(1) == "qgraph":
    from qgraph.cli import main
    sys.argv[:1] = ["qgraph", "serve"]
else:
    from mlx_lm.server import main
main()
"""


@contextmanager
def server(kind: str, folder: Path) -> Iterator[tuple[str, int]]:
    """The address of a server that answers, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(folder), "--port", str(port), "--log-level", "ERROR"]
    env = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", START, kind, *words], env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(10)


def ask(address: str, number: int) -> str:
    """The text of an answer, streamed; some questions begin like others, and some are long."""
    question = f"{'once more ' * (number % 3 * 15)}what is {number % 7}?"
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 4 + number % 9,
        "temperature": 0.0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    url = f"{address}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    text = ""
    with urllib.request.urlopen(request, timeout=300) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                delta: Any = json.loads(line[6:])["choices"][0].get("delta", {})
                text += delta.get("content") or ""
    return text


def resident(pid: int) -> int:
    """MiB of memory that the process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_the_same_answers_on_two_connections(tmp_path: Path) -> None:
    folder = checkpoint.write(files.toy(), tmp_path, mx.float32)
    library()  # built by now: a server's first request does not wait for that
    if (kept := Path(platformdirs.user_cache_dir("qgraph")) / "cpu").is_dir():
        shutil.copytree(kept, folder / "qgraph" / "cpu")
    with (
        server("mlx-lm", folder) as (theirs, _),
        server("qgraph", folder) as (ours, pid),
        ThreadPoolExecutor(2) as two,
    ):
        expected = list(two.map(lambda i: ask(theirs, i), range(REQUESTS)))
        half = REQUESTS // 2
        found = list(two.map(lambda i: ask(ours, i), range(half)))
        before = resident(pid)
        found += list(two.map(lambda i: ask(ours, i), range(half, REQUESTS)))
        assert found == expected
        assert len(set(expected)) > 5
        after = resident(pid)
        print(f"{REQUESTS} requests: {before} MiB after half of them, {after} after all")
        assert after < before + 100
