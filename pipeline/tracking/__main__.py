"""Run the sender process, as `python -m pipeline.tracking SPOOL`; it is not a command for people."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from pipeline.tracking.address import WithoutPasswords
from pipeline.tracking.process import deliver_once, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spool", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--node")
    parser.add_argument("--sample-only", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    sys.stderr = WithoutPasswords(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if given.once:
        print(json.dumps(deliver_once(given.spool, given.again)))
    else:
        serve(given.spool, given.parent, given.node, given.sample_only)


if __name__ == "__main__":
    main()
