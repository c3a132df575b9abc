"""One shard set written by several processes on several machines: tasks write the shards, a finisher the rest.

Every task reads the same source and deals the same records to the same shards; task I of N writes every N-th of them.
OUT/.prepare holds a note on each finished shard, so a task may be killed and started again. The finisher holds every
shard against its note, names the tasks whose shards are missing, and writes what no task can know: the manifest and
dataset.json. Every byte is the one that a single `prepare` writes.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from pipeline.data.datasets import Dataset
from pipeline.data.datasets.workers import Progress, silent, tick
from pipeline.data.shards.files import DESCRIPTION, WORK
from pipeline.data.shards.reading import ShardSet
from pipeline.data.shards.writing import (
    ShardJob,
    Written,
    claim,
    describe_set,
    each_shard,
    finished_set,
    finished_shard,
    jobs_of,
    shard,
    source_digest,
)
from pipeline.files import write_json, write_whole
from pipeline.images import Check
from pipeline.ownership import owned

_MOST_NAMED = 3

logger = logging.getLogger(__name__)


def write_part(
    dataset: Dataset,
    out: Path | str,
    task: int,
    tasks: int,
    *,
    shard_records: int = 4096,
    workers: int | None = None,
    skip_bad: bool = False,
    check: Check = "full",
    progress: Progress = silent,
) -> list[str]:
    """Write the shards of one task, or those that an interrupted one left. Tasks may run at the same time.

    Args:
        task: which one, counted from 0.
        tasks: how many there are; every task must be told the same.
        others: as `prepare`.

    Returns:
        The names of the task's shards.

    Raises:
        ValueError: as `prepare`; the task runs already; or others were told another number of tasks.
    """
    out = Path(out)
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} of {tasks}: tasks are counted from 0 to {tasks - 1}")
    source = source_digest(dataset, shard_records, workers)
    mine = _of_task(jobs_of(dataset, out, shard_records, skip_bad, check), task, tasks)
    if (out / DESCRIPTION).is_file():
        finished_set(out, source)
        logger.info("%s is already complete; nothing to do", out)
        return [job.name for job in mine]
    claim(out)
    work, who = out / WORK, f"{out} as task {task} of {tasks}"
    with owned(work / "lock", str(out), shared=True), owned(work / f"task-{task}.lock", who):
        finished_set(out, source)
        _agree_on_tasks(out, tasks)
        _failure(out, task).unlink(missing_ok=True)
        for stale in (path for job in mine for path in work.glob(f"{job.name}*.part")):
            stale.unlink()
        try:
            each_shard(shard, mine, workers, progress)
        except (OSError, ValueError) as error:
            write_json(_failure(out, task), {"reason": str(error)}, work=work)
            raise
    return [job.name for job in mine]


def finish(
    dataset: Dataset,
    out: Path | str,
    *,
    shard_records: int = 4096,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
) -> ShardSet:
    """Make one set of what all tasks wrote.

    Raises:
        ValueError: as `prepare`; a task still runs; or one has not finished or has failed: it is named, with its
            reason, and nothing is written.
    """
    out = Path(out)
    source = source_digest(dataset, shard_records, workers)
    if not (out / WORK).is_dir() and not (out / DESCRIPTION).is_file():
        raise ValueError(f"{out} holds nothing that a task wrote; run the tasks first")
    claim(out)
    with owned(out / WORK / "lock", str(out)):
        finished = finished_set(out, source)
        if finished is not None:
            logger.info("%s is already complete; nothing to do", out)
        else:
            jobs = jobs_of(dataset, out, shard_records, skip_bad)
            found = each_shard(_found, jobs, workers, progress)
            _refuse_missing(out, jobs, [job for job, written in zip(jobs, found) if written is None])
            written = [one for one in found if one is not None]
            finished = describe_set(dataset, out, source, shard_records, jobs, written)
        shutil.rmtree(out / WORK)
    return finished


def _of_task(jobs: list[ShardJob], task: int, tasks: int) -> list[ShardJob]:
    return jobs[task::tasks]


def _found(job: ShardJob) -> Written | None:
    """What a task wrote; with bad records left out only where that is allowed."""
    written = finished_shard(job, short=job.skip_bad)
    for _ in job.keys:
        tick()
    return written


def _failure(out: Path, task: int) -> Path:
    return out / WORK / f"task-{task}.failed"


def _agree_on_tasks(out: Path, tasks: int) -> None:
    """Note the number of tasks, or hold it against the note."""
    note = out / WORK / "tasks"
    if not note.exists():
        write_whole(note, str(tasks))
    before = int(note.read_text())
    if before != tasks:
        raise ValueError(
            f"{out} is being written by {before} tasks, not by {tasks}: give all of them the same number, "
            "or remove the folder and start again"
        )


def _refuse_missing(out: Path, jobs: list[ShardJob], missing: list[ShardJob]) -> None:
    """Raises ValueError that names the tasks whose shards are missing, when some are."""
    if not missing:
        return
    note = out / WORK / "tasks"
    if not note.is_file():
        raise ValueError(f"{out} holds no shards of tasks; run the tasks first")
    tasks, absent, faults = int(note.read_text()), {job.name for job in missing}, []
    for task in range(tasks):
        theirs = [job for job in _of_task(jobs, task, tasks) if job.name in absent]
        names = [job.name for job in theirs]
        if names:
            failed, why = _failure(out, task), "did not finish"
            if failed.is_file():
                why = f"failed: {json.loads(failed.read_text())['reason']}"
            elif any(job.note.is_file() for job in theirs):
                why = "wrote shards that are damaged, or left bad records out, which --skip-bad must allow here too"
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            faults.append(f"task {task} of {tasks} {why} ({', '.join(names[:_MOST_NAMED])}{more})")
    raise ValueError(
        f"{out} lacks {len(missing)} of {len(jobs)} shards: {'; '.join(faults)}; run those tasks again, "
        "then the finisher"
    )
