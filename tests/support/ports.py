"""Where processes of this machine find one another."""

from __future__ import annotations

import json
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in servers]
    for server in servers:
        server.close()
    return ports


def hosts(ranks: int, folder: Path) -> Path:
    """A file that says where the ranks of a ring on this machine listen."""
    found = folder / "hosts.json"
    found.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    return found
