"""launch/slurm/train.sbatch on a real Slurm: two nodes train, and a run goes on after whatever a cluster does to it.

One run is disturbed three times, each time by what really happens (kill -9 of a worker, Slurm's warning before the time
limit, `scontrol requeue`); the tests read what came of each. Its processes are held (SIGSTOP) while Slurm takes its
time, so that no run is over before it is disturbed.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.runs import make_store
from tests.slurm.cluster import Cluster

IMAGES, BETWEEN = 3200, 160
CONFIG = f"""
name: tiny
method: {{name: fader, preset: small, init_channels: 4, max_channels: 16, num_layers: 3,
         images: {IMAGES}, latent: {{weight: 0.01, ramp_images: 1000, hidden_channels: 16}}, ema_half_life: 200, encoder_dropout: 0.1}}
data: {{path: FACES, attributes: [Smiling, Blond_Hair], image_size: 32, threads: 1}}
batch_size: 8
run: {{log_images: 800, checkpoint_images: {BETWEEN}, picture_images: 0}}
tracking: {{experiment: slurm}}
"""
SCRIPT = "launch/slurm/train.sbatch"
ENVIRONMENT = {"FADER_PROCESSES_PER_NODE": "1"}


def newest(run: Path) -> int:
    """Images seen at the newest checkpoint; 0 when there is none."""
    names = sorted(path.name for path in (run / "checkpoints").glob("images-*"))
    return int(re.sub(r"\D", "", names[-1])) if names else 0


def final_state(run: Path) -> dict[str, torch.Tensor]:
    assert newest(run) == IMAGES
    last = sorted((run / "checkpoints").glob("images-*"))[-1]
    parts = ("networks", "ema", "optimizers")
    return {f"{part}:{key}": v for part in parts for key, v in load_file(last / f"{part}.safetensors").items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory, faces, cluster) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG.replace("FACES", str(faces)))
    return path


@dataclass
class Unbroken:
    run: Path
    output: str


@pytest.fixture(scope="module")
def unbroken(cluster, config, tmp_path_factory) -> Unbroken:
    """Two nodes, and nobody disturbs them. Slurm's GPUs say how many processes a node gets."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    words = (config, f"run.folder={run}", "tracking.enabled=false")
    job = cluster.submit(SCRIPT, *words, nodes=2, gpus_per_node=1, env={"FADER_PORT": port()})
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    return Unbroken(run, cluster.output(job))


def port() -> str:
    from tests.commands import free_port

    return str(free_port())


@dataclass
class Story:
    """What was done to a run and what it showed. stopped: images seen when its state was saved, by how it was ended."""

    run: Path
    store: str
    output: str = ""
    killed_at: int = 0
    workers: dict[str, set[int]] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def disturbed(cluster: Cluster, config, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("disturbed")
    story = Story(folder / "run", make_store(folder))
    told = ENVIRONMENT | {"FADER_PORT": port(), "MLFLOW_TRACKING_URI": story.store}
    job = cluster.submit(SCRIPT, config, f"run.folder={story.run}", nodes=2, env=told)

    def held(moment: str) -> list[psutil.Process]:
        """Both workers, stopped when a checkpoint newer than all before has appeared."""
        before = newest(story.run)
        cluster.until(lambda: newest(story.run) > before, 300, f"a checkpoint ({moment})", job, every=0.02)
        workers = cluster.until(lambda: len(found := cluster.processes(job)) == 2 and found, 60, "two workers", job)
        send(workers, signal.SIGSTOP)
        story.workers[moment] = {worker.pid for worker in workers}
        story.nodes |= {worker.environ()["SLURMD_NODENAME"] for worker in workers}
        return workers

    workers = held("kill -9")
    story.killed_at = newest(story.run)
    workers[1].kill()
    send(workers[:1], signal.SIGCONT)
    cluster.until(lambda: not {w.pid for w in cluster.processes(job)} & story.workers["kill -9"], 180, "new workers", job)

    workers = held("time limit")
    limit_in_minutes = int(cluster.seconds(job) // 60) + 2
    cluster.control("update", f"JobId={job}", f"TimeLimit={limit_in_minutes}")
    cluster.until(lambda: "asking all ranks to save" in cluster.output(job), 120, "Slurm's warning", job)
    cluster.control("update", f"JobId={job}", "TimeLimit=UNLIMITED")  # slow machines may save slowly
    send(workers, signal.SIGCONT)
    cluster.start_again(job)

    workers = held("requeue")
    cluster.control("requeue", job)
    send(workers, signal.SIGCONT)
    cluster.start_again(job)

    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    story.output = cluster.output(job)
    return story


def send(workers: list[psutil.Process], number: signal.Signals) -> None:
    for worker in workers:
        worker.send_signal(number)


def test_two_nodes_train(unbroken):
    card = json.loads((unbroken.run / "run.json").read_text())
    assert (card["world_size"], card["backend"]) == (2, "ddp")
    assert re.search(r"node 0 of 2: .* 1 processes, meeting at 127.0.0.1:", unbroken.output), unbroken.output
    assert re.search(r"node 1 of 2: ", unbroken.output)
    assert newest(unbroken.run) == IMAGES


def test_a_run_that_a_cluster_disturbed_ends_bit_for_bit_as_the_unbroken_one(unbroken, disturbed):
    found, whole = final_state(disturbed.run), final_state(unbroken.run)
    assert found.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(found[key], whole[key])] == []


def test_a_killed_worker_is_replaced_inside_the_job(disturbed):
    first_start = disturbed.output.split("start 1:")[0]
    assert first_start.count("of 2: ") == 2, "both nodes were set up once"
    assert not disturbed.workers["kill -9"] & disturbed.workers["time limit"], "all ranks start again, in new processes"
    assert disturbed.nodes == {"n1", "n2"}


def test_the_warning_before_the_time_limit_saves_every_image_and_requeues_the_job(disturbed):
    first_start, second_start, *_ = re.split(r"job \d+, start [12]:", disturbed.output)
    saved = re.search(r"stopped by SIGUSR1 after ([\d,]+) images, state saved", first_start)
    assert saved, disturbed.output
    assert "everything is saved; it goes on when Slurm starts it again" in first_start
    assert "resuming tiny" in second_start
    assert disturbed.killed_at < int(saved[1].replace(",", "")) < IMAGES


def test_a_requeued_job_saves_and_goes_on(disturbed):
    *_, second_start, third_start = re.split(r"job \d+, start [12]:", disturbed.output)
    assert re.search(r"stopped by SIGTERM after [\d,]+ images, state saved", second_start), second_start
    assert "resuming tiny" in third_start and "wrote" in third_start


def test_it_is_one_mlflow_run_that_hears_of_both_nodes(disturbed, monkeypatch):
    from mlflow import MlflowClient

    client = MlflowClient(disturbed.store)
    experiment = client.get_experiment_by_name("slurm")
    (run,) = client.search_runs([experiment.experiment_id])
    attempts = client.get_metric_history(run.info.run_id, "run/attempt")
    assert [point.value for point in attempts] == [1, 2, 3, 4] and run.info.status == "FINISHED"
    for node in ("n1", "n2"):
        assert f"system/{node}/cpu_utilization_percentage" in run.data.metrics, sorted(run.data.metrics)


@pytest.mark.parametrize(
    ("environment", "words", "says"),
    [
        ({"FADER_PYTHON": "/nowhere/python"}, ["config"], "/nowhere/python is not there: run 'make install' first"),
        ({"FADER_PROCESSES_PER_NODE": ""}, ["config"], "no GPU here: ask for some with --gpus-per-node=G"),
        ({}, [], "name an experiment: sbatch --nodes=N launch/slurm/train.sbatch"),
    ],
    ids=["no python", "no gpu", "no experiment"],
)
def test_what_cannot_start_says_why_and_fails(cluster, environment, words, says):
    job = cluster.submit(SCRIPT, *words, nodes=1, env=ENVIRONMENT | environment)
    assert cluster.wait(job) == "FAILED"
    assert says in cluster.output(job)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("NodeName=n1 NodeAddr=nowhere.invalid NodeHostName=n1", "the address of node n1 is not to be found"),
        ("NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=elsewhere", "127.0.0.1, which is every node's own"),
        ("", "scontrol does not say which nodes 'n"),
    ],
    ids=["no address", "everybody's address", "no answer"],
)
def test_nodes_that_cannot_find_each_other_fail_at_once(cluster, tmp_path, answer, says):
    """With a scontrol that answers so; meeting each at its own address, they would wait for each other for ever."""
    nodes = "echo n1; exit" if answer else "exit 1"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && {{ {nodes}; }}\necho "{answer}"\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{cluster.environment['PATH']}"
    job = cluster.submit(SCRIPT, "config", nodes=2, env=ENVIRONMENT | {"PATH": path, "FADER_PORT": port()})
    assert cluster.wait(job) == "FAILED"
    assert says in cluster.output(job)


def test_the_queue_is_empty_in_the_end(cluster, unbroken, disturbed):
    assert cluster.queue() == ""
