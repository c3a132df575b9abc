"""`fader prepare` and `fader verify` as a user runs them: killed, interrupted, twice at once, on bad input."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import ShardSet, prepare, verify
from tests.commands import command, environment, interruptible, launch
from tests.pipeline.planted import jpeg, write_celeba

COUNT = 400


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_celeba(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "set"
    prepare(read_celeba(source), out, shard_records=16, workers=1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(*words: str | Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("launch.prepare", *words),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(out: Path, tars: int, process: subprocess.Popen[str]) -> None:
    """Until so many tars stand in their place, or the command has ended."""
    while process.poll() is None and len(list(out.glob("*.tar"))) < tars:
        time.sleep(0.002)


def test_killed_at_random_moments_with_other_worker_counts_the_digests_are_the_same(source, unbroken, tmp_path):
    chance = random.Random(time.time_ns())
    out, killed = tmp_path / "set", 0
    for workers in (2, 1, 3):
        process = start("celeba", source, out, "--shard-records", 16, "--workers", workers)
        wait_for(out, len(list(out.glob("*.tar"))) + chance.randrange(1, 6), process)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if not (out / "dataset.json").exists():
            with pytest.raises(ValueError, match="not finished"):
                ShardSet.open(out)
    assert killed >= 2
    launch("launch.prepare", "celeba", source, out, "--shard-records", 16, "--workers", 2)
    assert contents(out) == contents(unbroken)
    assert verify(out, workers=1).records == COUNT


def alive(process: str) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children_of(process: int) -> list[str]:
    """The processes that a process started; each stands with the thread that did."""
    found = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            found += (thread / "children").read_text().split()
    return found


def test_workers_of_a_killed_command_die_with_it(source, tmp_path):
    process = start("celeba", source, tmp_path / "set", "--shard-records", 16, "--workers", 3)
    children: list[str] = []
    while process.poll() is None and len(children) < 3:  # two workers, and what tracks the memory that they share
        children = children_of(process.pid)
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)  # ends only when no child holds the pipes any more
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(children) == 3 and not any(map(alive, children))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ctrl_c_ends_with_130_and_one_line_how_to_go_on(source, unbroken, tmp_path, workers):
    out = tmp_path / "set"
    words = ["celeba", source, out, "--shard-records", 8, "--workers", workers]
    process = start(*words, start_new_session=True, preexec_fn=interruptible)
    wait_for(out, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the children, too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"goes on where it stopped: python -m launch.prepare celeba {source} {out} --shard-records 8" in errors
    assert not (out / "dataset.json").exists()
    prepare(read_celeba(source), out, shard_records=8, workers=1)


def test_a_second_prepare_into_the_same_folder_is_refused(source, unbroken, tmp_path):
    out = tmp_path / "set"
    first = start("celeba", source, out, "--shard-records", 16, "--workers", 1)
    wait_for(out, 1, first)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        refused = launch("launch.prepare", "celeba", source, out, "--shard-records", 16, code=2)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert refused.stderr.strip().splitlines()[-1].startswith(f"error: {out} belongs to process {first.pid} on ")
    first.communicate(timeout=60)
    assert first.returncode == 0 and contents(out) == contents(unbroken)


def test_a_finished_set_says_so_and_another_source_gets_one_line(source, unbroken, tmp_path):
    again = launch("launch.prepare", "celeba", source, unbroken, "--shard-records", 16)
    assert "is already complete; nothing to do" in again.stderr
    other = write_celeba(tmp_path, 12)
    refused = launch("launch.prepare", "celeba", other, unbroken, code=2).stderr.strip().splitlines()
    assert len(refused) == 1 and "already holds a finished set of another source" in refused[0]


def test_bad_input_gets_one_line_and_skip_bad_goes_on(tmp_path):
    folder = write_celeba(tmp_path / "source", 30)
    (folder / "img_align_celeba/000004.jpg").write_bytes(jpeg(4)[:400])
    line = launch("launch.prepare", "celeba", folder, tmp_path / "set", code=2).stderr.strip()
    assert (
        "\n" not in line
        and "list_attr_celeba.txt line 6: picture 000004.jpg cannot be read" in line
        and "--skip-bad" in line
    )
    done = launch("launch.prepare", "celeba", folder, tmp_path / "set", "--skip-bad")
    assert "left out: 1, listed in" in done.stdout
    assert ShardSet.open(tmp_path / "set").info["left_out"][0]["key"] == "000004"
    gone = launch("launch.prepare", "celeba", tmp_path / "nowhere", tmp_path / "other", code=2).stderr.strip()
    assert "there is no such folder" in gone and "\n" not in gone and not (tmp_path / "other").exists()


def test_verify_says_what_it_read_or_names_the_damage_and_exits_with_2(unbroken, tmp_path):
    folder = Path(shutil.copytree(unbroken, tmp_path / "set"))
    assert "is whole: 400 records in 26 shards" in launch("launch.verify", folder).stdout
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    line = launch("launch.verify", folder, code=2).stderr.strip()
    assert "\n" not in line and "train-000001.tar: " in line and "differs from its digest" in line


def test_faces_are_drawn_and_sharded_in_one_command(tmp_path):
    done = launch("launch.prepare", "faces", tmp_path / "set", "--count", 40, "--seed", 2, "--workers", 2)
    assert "is complete: train 32, valid 4, test 4" in done.stdout
    whole = ShardSet.open(tmp_path / "set")
    assert (
        whole.name == "faces"
        and whole.attributes.names[-1] == "Beard"
        and (tmp_path / "set/source/faces.json").exists()
    )
    assert not (tmp_path / "set/source/twins").exists()
    launch("launch.prepare", "faces", tmp_path / "set", "--count", 40, "--seed", 2, "--twins")
    assert {path.name for path in (tmp_path / "set/source/twins").iterdir()} == {"valid-000000.tar", "test-000000.tar"}
    refused = launch("launch.prepare", "faces", tmp_path / "set", "--count", 40, "--seed", 3, code=2)
    assert "holds other drawn faces" in refused.stderr


def test_fruit_is_drawn_with_its_twins_in_one_command(tmp_path):
    done = launch("launch.prepare", "fruit", tmp_path / "set", "--count", 20, "--twins", "--workers", 1)
    assert "is complete: train 16, valid 2, test 2" in done.stdout and ShardSet.open(tmp_path / "set").name == "fruit"
    assert {path.name for path in (tmp_path / "set/source/twins").iterdir()} == {"valid-000000.tar", "test-000000.tar"}


def test_help_is_there_without_loading_torch():
    code = "import sys, launch.prepare, launch.verify; print('torch' in sys.modules or 'pyarrow' in sys.modules)"
    done = subprocess.run([command("x")[0], "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "drawn faces" in launch("launch.prepare", "--help").stdout.lower()


def test_tasks_and_a_finisher_are_commands_like_the_one(source, unbroken, tmp_path):
    words = ("celeba", source, tmp_path / "set", "--shard-records", 16, "--workers", 1)
    first = launch("launch.prepare", "--task", 0, "--tasks", 2, *words)
    assert "task 0 of 2 wrote" in first.stdout and "--finish in place of" in first.stdout
    refused = launch("launch.prepare", "--finish", *words, code=2).stderr
    assert "task 1 of 2: train-" in refused and "Traceback" not in refused
    launch("launch.prepare", "--task", 1, "--tasks", 2, *words)
    assert "is complete" in launch("launch.prepare", "--finish", *words).stdout
    assert contents(tmp_path / "set") == contents(unbroken)
    assert "--task and --tasks go together" in launch("launch.prepare", "--task", 1, *words, code=2).stderr
