"""A set written by several tasks is the set of one command, byte for byte; whoever is missing is named."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import finish, prepare, verify, write_part
from pipeline.ownership import owned
from tests.pipeline.planted import jpeg, write_celeba

COUNT, TASKS = 60, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_celeba(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """What one command writes."""
    out = tmp_path_factory.mktemp("whole") / "set"
    prepare(read_celeba(source), out, shard_records=8, workers=1)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def part(source: Path, out: Path, task: int, tasks: int = TASKS, **options: object) -> list[str]:
    return write_part(read_celeba(source), out, task, tasks, **({"shard_records": 8, "workers": 1} | options))


def end(source: Path, out: Path, **options: object):
    return finish(read_celeba(source), out, **({"shard_records": 8, "workers": 1} | options))


def test_tasks_at_the_same_time_and_a_finisher_write_the_bytes_of_one_command(source, whole, tmp_path):
    out = tmp_path / "set"
    with multiprocessing.get_context("fork").Pool(TASKS) as pool:
        names = pool.starmap(part, [(source, out, task) for task in range(TASKS)])
    assert sorted(name for names_of_one in names for name in names_of_one) == [n for n in sorted(whole) if ".tar" in n]
    assert all(names), "every task has some of them"
    assert end(source, out).digest == digest(whole)
    assert contents(out) == whole
    assert verify(out, workers=1).records == COUNT
    assert part(source, out, 1) and end(source, out), "again, when all is done, is no error"
    assert contents(out) == whole


def digest(whole: dict[str, bytes]) -> str:
    return json.loads(whole["dataset.json"])["digest"]


def test_a_task_that_was_not_run_is_named_and_nothing_is_written(source, whole, tmp_path):
    out = tmp_path / "set"
    part(source, out, 0)
    part(source, out, 2)
    with pytest.raises(ValueError, match=r"lacks \d of \d+ shards, .*: task 1 of 3: train-"):
        end(source, out)
    assert not (out / "dataset.json").exists() and not (out / "manifest.parquet").exists()
    part(source, out, 1)
    end(source, out)
    assert contents(out) == whole


def test_a_task_that_failed_is_named(whole, tmp_path):
    folder, out = write_celeba(tmp_path / "source", COUNT), tmp_path / "set"
    picture = folder / "img_align_celeba/000007.jpg"
    picture.write_bytes(b"no picture")
    failed = 0
    for task in range(TASKS):
        try:
            part(folder, out, task)
        except ValueError:
            failed = task
    with pytest.raises(ValueError, match=f"task {failed} of 3: train-"):
        end(folder, out)
    picture.write_bytes(jpeg(7))
    part(folder, out, failed)
    end(folder, out)
    assert contents(out) == whole


def test_left_out_records_are_the_ones_of_one_command(tmp_path):
    folder, out = write_celeba(tmp_path / "source", COUNT), tmp_path / "set"
    (folder / "img_align_celeba/000007.jpg").write_bytes(b"no picture")
    for task in range(TASKS):
        part(folder, out, task, skip_bad=True)
    with pytest.raises(ValueError, match="lack bad records .--skip-bad allows that here, too"):
        end(folder, out)
    end(folder, out, skip_bad=True)
    prepare(read_celeba(folder), tmp_path / "one", shard_records=8, workers=1, skip_bad=True)
    assert contents(out) == contents(tmp_path / "one")


def test_a_damaged_shard_counts_as_missing(source, tmp_path):
    out = tmp_path / "set"
    names = [part(source, out, task) for task in range(TASKS)]
    tar = out / names[1][0]
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"lacks 1 of .* are damaged.*task 1 of 3: {names[1][0]}"):
        end(source, out)


def test_tasks_agree_on_their_number_and_on_the_source(source, tmp_path):
    out = tmp_path / "set"
    with pytest.raises(ValueError, match="holds nothing that a task wrote"):
        end(source, out)
    part(source, out, 0)
    with pytest.raises(ValueError, match="is being written by 3 tasks, not by 4"):
        part(source, out, 0, tasks=4)
    with pytest.raises(ValueError, match="unfinished set of another source"):
        part(source, out, 0, shard_records=9)
    with pytest.raises(ValueError, match="task 3 of 3: tasks are counted from 0 to 2"):
        part(source, out, 3)


def test_no_finisher_and_no_whole_command_runs_beside_a_task(source, tmp_path):
    out = tmp_path / "set"
    part(source, out, 0)
    with owned(out / ".prepare" / "lock", "it", shared=True):
        part(source, out, 1)
        for other in (lambda: end(source, out), lambda: prepare(read_celeba(source), out, shard_records=8, workers=1)):
            with pytest.raises(ValueError, match="belongs to"):
                other()
    with owned(out / ".prepare" / "task-2.lock", "it"), pytest.raises(ValueError, match="as task 2 of 3 belongs to process"):
        part(source, out, 2)
