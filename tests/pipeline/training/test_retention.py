"""Checkpoints are written while training goes on, some are kept, and a full disk costs nothing older."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from pipeline.engine import State
from pipeline.models import checkpoint
from pipeline.training.retention import CheckpointWriter
from tests.commands import environment


def state(value: float) -> State:
    return State(
        {"encoder/weight": torch.full((3,), value), "decoder/bias": torch.zeros(2)},
        {"encoder/weight": torch.full((3,), -value)},
        {"encoder/weight/exp_avg": torch.full((3,), value / 2)},
    )


def test_a_full_disk_leaves_the_older_one_and_is_told_at_the_end(tmp_path, monkeypatch, caplog):
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(10, state(1.0), {})
    writer.wait()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer.save(20, state(2.0), {})
    with pytest.raises(OSError, match="last checkpoint could not be saved"):
        writer.close()
    assert "older ones are intact" in caplog.text
    assert checkpoint.latest(tmp_path).name.endswith("10")


def test_the_newest_are_kept_and_what_a_kill_left_is_cleared(tmp_path):
    litter = checkpoint.folder(tmp_path) / ".images-000000000005.99.tmp"
    litter.mkdir(parents=True)
    writer = CheckpointWriter(tmp_path, keep=2)
    assert not litter.exists()
    for images in (10, 20, 30):
        writer.save(images, state(images), {})
    writer.close()
    assert [path.name[-2:] for path in checkpoint.kept(tmp_path)] == ["30", "20"]


def kept(run) -> list[int]:
    return [checkpoint.images_of(path) for path in checkpoint.kept(run)]


def test_the_best_by_each_metric_and_every_nth_are_kept_beside_the_newest(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2, every_images=30, best={"valid/mse": "min", "valid/swap": "max"})
    mse = {10: 5.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: float("nan"), 60: 4.0, 70: 3.0}
    swap = {10: 0.9, 20: 0.1, 50: 0.2, 60: float("inf")}
    for images in range(10, 80, 10):
        metrics = {"valid/mse": mse[images]} | ({"valid/swap": swap[images]} if images in swap else {})
        writer.save(images, state(images), {}, metrics)
    writer.close()
    assert kept(tmp_path) == [70, 60, 30, 20, 10], "newest 70, 60; best 20 (the earlier of equals), 10; every 30th 30, 60"
    best = {name: checkpoint.by_metric(checkpoint.kept(tmp_path), name, mode) for name, mode in writer.best.items()}
    assert {name: checkpoint.images_of(paths[0]) for name, paths in best.items()} == {"valid/mse": 20, "valid/swap": 10}
    assert not checkpoint.by_metric(checkpoint.kept(tmp_path), "valid/psnr", "max")


def test_every_nth_is_the_first_at_or_past_it(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1, every_images=100)
    for images in range(30, 400, 30):
        writer.save(images, state(images), {})
    writer.close()
    assert kept(tmp_path) == [390, 300, 210, 120]


def test_what_stands_past_the_newest_is_of_a_past_that_was_given_up(tmp_path):
    """A damaged newest one takes no place among those that are kept; going back removes the later ones at once."""
    writer = CheckpointWriter(tmp_path, keep=2)
    for images in (10, 20, 30, 40):
        writer.save(images, state(images), {})
    writer.wait()
    (checkpoint.at(tmp_path, 40) / "state.json").unlink()
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(35, state(3.5), {})
    writer.wait()
    assert kept(tmp_path) == [35, 30]
    writer.forget_after(30)
    assert kept(tmp_path) == [30]
    assert checkpoint.images_of(checkpoint.latest(tmp_path, up_to=30)) == 30 and checkpoint.latest(tmp_path, up_to=29) is None
    writer.close()


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    path = checkpoint.write(tmp_path, 10, state(1.0), {})
    path.rename(path.with_name(f".{path.name}.123.old"))
    assert kept(tmp_path) == [10]
    assert checkpoint.read(checkpoint.latest(tmp_path))[0].networks["encoder/weight"].tolist() == [1.0] * 3
    CheckpointWriter(tmp_path, keep=1).close()
    assert [path.name for path in checkpoint.folder(tmp_path).iterdir()] == ["images-000000000010"]


def test_a_kill_while_one_is_removed_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(10, state(1.0), {})
    writer.wait()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: None)
    writer.save(20, state(2.0), {})
    writer.close()
    assert kept(tmp_path) == [20] and len(list(checkpoint.folder(tmp_path).iterdir())) == 2
    monkeypatch.undo()
    CheckpointWriter(tmp_path, keep=1).close()
    assert len(list(checkpoint.folder(tmp_path).iterdir())) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk ({mounted.stderr.strip()}); the limit on file sizes is tried instead")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def large(value: float) -> State:
    """400 kB."""
    return State({"encoder/weight": torch.full((100_000,), value)}, {}, {})


def test_a_disk_that_is_really_full_and_has_room_again(small_disk, caplog):
    writer = CheckpointWriter(small_disk, keep=1)
    writer.save(10, large(1.0), {})
    writer.wait()
    (small_disk / "other").write_bytes(bytes(500_000))
    writer.save(20, large(2.0), {})
    writer.wait()
    assert "not saved" in caplog.text and "No space left" in caplog.text
    assert [path.name[-2:] for path in checkpoint.folder(small_disk).iterdir()] == ["10"], "what was begun is cleared away"
    assert checkpoint.read(checkpoint.latest(small_disk))[0].networks["encoder/weight"][0] == 1.0
    (small_disk / "other").unlink()
    writer.save(30, large(3.0), {})
    writer.close()
    assert kept(small_disk) == [30], "and training went on to its end without an error"
    (small_disk / "other").write_bytes(bytes(500_000))
    writer = CheckpointWriter(small_disk, keep=1)
    writer.save(40, large(4.0), {})
    with pytest.raises(OSError, match="(?s)could not be saved.*No space left.*0000030 is the newest there is"):
        writer.close()


def test_a_file_that_may_grow_no_further(tmp_path):
    """The same without a right to mount: the system refuses writes past a limit, in a process of its own."""
    lines = """
        import resource, signal, sys, torch
        from pathlib import Path
        from pipeline.engine import State
        from pipeline.training.retention import CheckpointWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = Path(sys.argv[1])
        writer = CheckpointWriter(run, keep=2)
        writer.save(10, State({"encoder/weight": torch.zeros(1000)}, {}, {}), {})
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        writer.save(20, State({"encoder/weight": torch.zeros(100_000)}, {}, {}), {})
        try:
            writer.close()
        except OSError as error:
            print("told:", error)
    """
    line = [sys.executable, "-c", textwrap.dedent(lines), str(tmp_path)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    assert "told: the last checkpoint could not be saved" in done.stdout and "File too large" in done.stdout
    assert kept(tmp_path) == [10] and len(list(checkpoint.folder(tmp_path).iterdir())) == 1


def test_a_folder_that_takes_nothing_more(small_disk, caplog):
    """Mounted read-only under the writer: the older one stays, and is read."""
    writer = CheckpointWriter(small_disk, keep=1)
    writer.save(10, state(1.0), {})
    writer.wait()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    writer.save(20, state(2.0), {})
    with pytest.raises(OSError, match="Read-only file system"):
        writer.close()
    assert "training goes on" in caplog.text
    assert checkpoint.images_of(checkpoint.latest(small_disk)) == 10


