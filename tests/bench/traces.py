"""`python -m tests.bench.traces [--requests N] [--seed S]`: the gate's sentence over millions of requests.

The real gate, batches and ledger under a load by lot (`tests.support.pipeline`), judged by a checker that
shares nothing with them (`tests.support.freshness`). Prints the seed and what was counted; exits with 1 if
the sentence was broken once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.support.freshness import Freshness, Rules
from tests.support.pipeline import World


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.traces", description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)), help="default: by lot")
    arguments = parser.parse_args()
    freshness = Freshness(Rules(tolerated=frozenset({"boot"})))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), arguments.seed, freshness.take)
        world.run(arguments.requests)
        freshness.end()
        found = {
            "seed": arguments.seed,
            "seconds": round(time.monotonic() - began, 1),
            "simulated_seconds": round(world.clock.now / 1e9, 1),
            **dict(sorted(freshness.counts.items())),
            "violations": len(freshness.violations) + len(world.missed),
        }
        world.close()
    print(json.dumps(found))
    for told in (*freshness.violations, *world.missed[:20]):
        print(told, file=sys.stderr)
    sys.exit(1 if found["violations"] else 0)


if __name__ == "__main__":
    main()
