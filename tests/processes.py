"""Processes that share work: started by a launcher, or side by side without one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ON_CPU = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
# With --cpu and no mpirun, Accelerate starts one process, whatever --num_processes says.
ONE, TWO = ["--cpu", "--num_processes", "1"], ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
LIMIT = 240  # seconds; whoever waits for ever fails


def call(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(command, env=ON_CPU, capture_output=True, text=True, timeout=LIMIT, cwd=cwd)


def two_processes(
    *words: object, cwd: tuple[Path, Path], env: Mapping[str, str] = MappingProxyType({})
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes that no launcher stops, each in a directory of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, *(str(word) for word in words)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(
            command, env={**ON_CPU, **env, **group, "RANK": rank, "LOCAL_RANK": rank}, cwd=place, **options
        )
        for rank, place in zip("01", cwd, strict=True)
    ]
    try:
        return [(process.returncode, *said) for process in started for said in [process.communicate(timeout=LIMIT)]]
    finally:
        for process in started:
            process.kill()
