"""`python -m tests.fuzz FIRST COUNT`: damaged input of every kind, each case in a process of its own with limits.

Case n is a function of n alone. It ends well when the readers give what the undamaged parts say, or say ValueError or
OSError; anything else (a crash, a hang, another exception, a wrong label, a file outside OUT) is printed and counted.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.datasets import DATASETS
from pipeline.data.shards import ShardSet, prepare, verify
from pipeline.images import check, decode
from tests.pipeline.data.test_datasets import encoded, grey, seen, tar_of, write_mnist, write_table
from tests.pipeline.planted import records

CPU_SECONDS, WALL_SECONDS, EXTRA_MEMORY = 10, 120, 1 << 30
SIZES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"77777777777\0", b"\x80" + b"\xff" * 11)


def damage(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few faults of one kind."""
    out, kind = bytearray(data), chance.randrange(7)
    place = chance.randrange(len(out))
    if kind == 0:
        del out[place:]
    elif kind in (1, 2):
        for _ in range(chance.choice((1, 1, 2, 8, 64))):
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    elif kind == 3:
        size = chance.choice(SIZES)
        place = chance.choice((place, chance.randrange(min(len(out), 600))))
        out[place : place + len(size)] = size
    elif kind == 4:
        out[place:place] = chance.randbytes(chance.choice((1, 7, 512)))
    elif kind == 5:
        del out[place : place + chance.choice((1, 16, 512, 5000))]
    else:
        other = chance.randrange(len(out))
        out[place : place + 100] = out[other : other + 100]
    return bytes(out)


def swollen(chance: random.Random) -> bytes:
    """A PNG of few bytes that declares, and may hold, very many pixels."""
    width, height = chance.choice(((60_000, 60_000), (9_000, 9_000), ((1 << 31) - 1, 1), (200_000, 20)))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(min((width + 1) * height, 40_000_000)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pictures(base: Path, work: Path, chance: random.Random) -> None:
    kinds = {"JPEG": {"quality": 80, "progressive": chance.random() < 0.5}, "PNG": {}, "WEBP": {}}
    kind = chance.choice(list(kinds))
    out = io.BytesIO()
    noise = np.random.default_rng(chance.randrange(99)).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(noise).resize((90, 70)).save(out, kind, **kinds[kind])
    data = swollen(chance) if chance.random() < 0.05 else damage(out.getvalue(), chance)
    found = check(data)
    assert decode(data, found.orientation).size == decode(data).size == (found.width, found.height)


def idx(base: Path, work: Path, chance: random.Random) -> None:
    names = sorted(path.name for path in (base / "mnist").iterdir())
    hurt = chance.choice(names)
    for name in names:
        data = (base / "mnist" / name).read_bytes()
        (work / name).write_bytes(damage(data, chance) if name == hurt else data)
    dataset = DATASETS["mnist"](work)
    for row in range(0, len(dataset), 11):
        part, _, number = dataset.locations[row].partition(" ")
        assert dataset.labels[row, 0] == (work / f"{part}-labels-idx1-ubyte").read_bytes()[8 + int(number)]
        data = (work / f"{part}-images-idx3-ubyte").read_bytes()
        height, width = struct.unpack(">II", data[8:16])
        if min(height, width) < 5:
            continue
        assert seen(dataset.read(dataset.locations[row])) == data[16 + int(number) * height * width + 3 * width + 3]


def tables(base: Path, work: Path, chance: random.Random) -> None:
    data = damage((base / "table/list.csv").read_bytes(), chance)
    (work / "list.csv").write_bytes(data)
    kinds = ["age=continuous:0:100", "Beard=k-way:none,full,moustache", "Smiling=binary"]
    dataset = DATASETS["table"](
        work / "list.csv",
        images=str(base / "table"),
        attributes=["Smiling", "Beard", "age"],
        kinds=kinds,
        skip_bad=True,
    )
    text = data.decode("utf-8-sig")
    for record in records(dataset):
        lines = [line for line in text.splitlines() if record.location in line]
        assert any(_cell_agrees(line, record.labels) for line in lines), (record, lines)
    prepare(dataset, work / "out", workers=1, skip_bad=True)
    verify(work / "out", workers=1)


def _cell_agrees(line: str, labels: np.ndarray) -> bool:
    """Whether a line of the CSV, read without our reader, may have given these labels."""
    cells = [cell.strip(' "') for cell in line.split(",")]
    smiling = {0.0: "0", 1.0: "1"}.get(float(labels[0]))
    beard = ("none", "full", "moustache")[int(labels[1])] if labels[1] >= 0 else None
    return all(word is None or any(word in cell for cell in cells) for word in (smiling, beard))


def tars(base: Path, work: Path, chance: random.Random) -> None:
    names = ["../up", "/abs/olute", "a/../../b", "x" * 120, "dot.", "sp ace", "ok"]
    members = []
    for n in range(8):
        name = chance.choice(names) + str(n) if chance.random() < 0.3 else f"{n:04d}"
        members += [(f"{name}.jpg", encoded(grey(n), "JPEG")), (f"{name}.json", json.dumps({"n": n / 10}).encode())]
    options = {"type": chance.choice((b"1", b"2", b"3", b"5"))} if chance.random() < 0.1 else {}
    if options:
        options["linkname"] = "/etc/passwd"
    data = tar_of(work / "0.tar", members, **options).read_bytes()
    hurt = chance.random() < 0.8
    (work / "0.tar").write_bytes(damage(data, chance) if hurt else data)
    dataset = DATASETS["wds"](work, skip_bad=True, kinds=["n=continuous"], attributes=["n"])
    prepare(dataset, work / "out", workers=1, skip_bad=True)
    assert verify(work / "out", workers=1).records <= 8
    if not hurt:
        for record in records(dataset):
            assert abs(seen(dataset.read(record.location)) / 10 - record.labels[0]) < 0.01


def sets(base: Path, work: Path, chance: random.Random) -> None:
    hurt = chance.choice(("manifest.parquet", "dataset.json", "train-000000.tar"))
    for path in (base / "set").iterdir():
        data = path.read_bytes()
        (work / path.name).write_bytes(damage(data, chance) if path.name == hurt else data)
    changed = (work / hurt).read_bytes() != (base / "set" / hurt).read_bytes()
    verify(work, workers=1)
    assert hurt == "dataset.json" or not changed, f"damage of {hurt} went unseen"
    mine, whole = ShardSet.open(work), ShardSet.open(base / "set")
    for name in ("train", "valid", "test"):
        a, b = mine.split(name), whole.split(name)
        assert np.array_equal(a.labels, b.labels) and np.array_equal(a.keys, b.keys)
        assert all(np.array_equal(a.bytes(row), b.bytes(row)) for row in range(len(a)))


KINDS: tuple[Callable[[Path, Path, random.Random], None], ...] = (pictures, idx, tables, tars, sets)


def in_child(job: Callable[[], None]) -> str | None:
    """Run in a process of its own, under limits; None, or what went wrong."""
    out_read, out_write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(out_read)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
            job()
            code = 0
        except (ValueError, OSError) as error:
            code = 0 if str(error) else 1
        except BaseException:
            os.write(out_write, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(code)
    os.close(out_write)
    until, status = time.monotonic() + WALL_SECONDS, None
    while status is None:
        done, status_ = os.waitpid(child, os.WNOHANG)
        if done:
            status = status_
        elif time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(out_read)
            return f"hangs: no end after {WALL_SECONDS} s"
        else:
            time.sleep(0.001)
    with open(out_read, "rb") as pipe:
        said = pipe.read().decode()
    return None if status == 0 else said or f"ended with status {status}"


def make_base(base: Path) -> None:
    write_table(base / "table")
    prepare(DATASETS["mnist"](write_mnist(base / "mnist", False)), base / "set", workers=1)


def main() -> None:
    first, count = map(int, sys.argv[1:])
    import pyarrow.parquet  # noqa: F401  once, rather than in every child

    resource_tracker.ensure_running()  # likewise
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        fault = in_child(lambda: make_base(base))
        assert fault is None and (base / "set/dataset.json").is_file(), fault
        for n in range(first, first + count):
            box = Path(folder) / f"case{n}"
            work = box / "inner/work"
            work.mkdir(parents=True)
            kind = KINDS[n % len(KINDS)]
            fault = in_child(lambda: kind(base, work, random.Random(n)))
            outside = [p for p in (*box.iterdir(), *(box / "inner").iterdir()) if p.name not in ("inner", "work")]
            if outside:
                fault = f"wrote {outside[0]}"
            if fault:
                wrong += 1
                print(f"case {n} ({kind.__name__}): {fault}", flush=True)
            shutil.rmtree(box)
    print(f"{count} cases, {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
