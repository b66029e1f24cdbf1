"""Client processes that get ready each by itself and start together."""

from __future__ import annotations

import json
import subprocess
from typing import Any


def together(
    command: list[str], count: int, seconds: float, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What `count` processes of `command` print, each one JSON object, after some `seconds` of work.

    Each says `ready` on a line, and begins when it gets a line.
    """
    started = [
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"a client did not get ready: {command[:3]}")
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate(timeout=seconds + 60)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
