"""Damaged tars, sets, pictures, tables and idx files: a clear error or a record left out, never a crash or a hang.

FADER_FUZZ=5000 runs so many cases, for the long form.
"""

from __future__ import annotations

import os
import subprocess

from tests.commands import command, environment

SHORT = 120


def test_damaged_input_gives_a_clear_error_or_is_left_out():
    count = int(os.environ.get("FADER_FUZZ", SHORT))
    line = command("tests.fuzz", "0", str(count))
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=600 + count)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f"{count} cases, 0 wrong" in done.stdout
