"""A client as another user: `python -m tests.e2e.as_user UID SOCKET CA`, requests as JSON on standard input.

Each request is `[operation, args]`; each answer `{"ok": …}` or `{"code": …, "message": …}`. Bytes are
latin-1 text under a name that begins with `bytes:`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from guestlib.client import Client
from guestlib.errors import HostdError
from guestlib.trust import Trust


def main() -> None:
    uid, socket, ca = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_text()
    requests = json.load(sys.stdin)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    answers: list[dict[str, Any]] = []
    with Client(Trust.channel_ca(ca), f"unix:{socket}", timeout_s=10) as client:
        for operation, args in requests:
            given = {
                name.removeprefix("bytes:"): value.encode("latin-1") if name.startswith("bytes:") else value
                for name, value in args.items()
            }
            try:
                result = client.submit(operation, given).result()
                answers.append({"ok": dataclasses.asdict(result)})
            except HostdError as error:
                answers.append({"code": error.code, "message": error.message})
    json.dump(answers, sys.stdout, default=lambda data: data.decode("latin-1"))


if __name__ == "__main__":
    main()
