"""Waiting for other processes, and finding what they have started."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 240) -> None:
    """Wait for what happens at once on a quiet machine; the limit only ends a hang, before pytest would."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def session(leader: int) -> list[int]:
    """Processes of the session that a process was started to lead, itself or not."""
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], stdout=subprocess.PIPE, text=True)
    return [int(line) for line in found.stdout.split()]


def without_privileges(command: Sequence[str]) -> list[str]:
    """The command as a user whom file permissions bind. They do not bind root."""
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
