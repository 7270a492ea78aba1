"""Code that stands in for the process of an engine, and what has become of it."""

from __future__ import annotations

import time
from pathlib import Path

CHILD = """
import os, signal, subprocess, sys, time
from multiprocessing.connection import Connection
events = Connection(int(sys.argv[1]))
spec = events.recv()
"""
READY = 'events.send(("ready", {"spec": spec})); asked = events.recv()\n'


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def state(pid: int, wanted: str) -> bool:
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in wanted:
            return True
        time.sleep(0.05)
    return False
