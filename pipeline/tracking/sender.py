"""Deliver a spool to MLflow, in order; say what MLflow does not take, and what helps."""

import getpass
import hashlib
import json
import logging
import uuid
from pathlib import Path
from typing import Any

from pipeline.tracking.address import asked_for, check, named, without_password
from pipeline.tracking.spool import State, last_event, read_events, safe, spool_files

logger = logging.getLogger(__name__)

_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARACTERS, _MAX_TAG_CHARACTERS = 1000, 100, 6000, 5000


class Sender:
    """Delivers a spool to one MLflow store, in order, from where the store stands. failure: of the last attempt."""

    def __init__(self, spool: Path) -> None:
        import mlflow  # here: the import takes seconds, and only the sender process pays them
        from mlflow.exceptions import MlflowException

        self.spool = spool
        check(asked_for() or "")
        self.state = State.read(spool, default_uri=named(mlflow.get_tracking_uri()))
        self.error = MlflowException
        uri = asked_for() or self.state.uri
        mlflow.set_tracking_uri(uri)
        self._client = mlflow.MlflowClient(uri)
        self._stuck: tuple[str, int] = ("", 0)
        self.sent = 0
        self.failure: Exception | None = None

    def deliver(self) -> None:
        """Deliver everything that the spool holds now. What was delivered stays noted when MLflow raises something.
        Raises Deleted: the run or its experiment was deleted there."""
        if self.state.run_id is None:
            begin = next((e for e, _ in read_events(self.spool / "main.jsonl") if e and e["kind"] == "start"), None)
            if begin is None:
                return
            self.state.run_id = self._find_or_create(begin)
            self.state.save()
        try:
            for path in spool_files(self.spool):
                self._deliver_file(path)
        except self.error as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" and not self._run_exists():
                logger.warning("the store no longer has run %s: everything is sent to a new one", self.state.run_id)
                self.state.forget()
            raise
        self.state.problem = None
        self.state.save()

    def _find_or_create(self, begin: dict[str, Any]) -> str:
        """Return the id of this spool's run: the one tagged with the spool's key, else a new one."""
        client, key = self._client, self.state.key or begin["key"]
        experiment = client.get_experiment_by_name(begin["experiment"])
        if experiment is not None:
            self._refuse_deleted(experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(begin["experiment"])
        # A server may have created the run and died before it said so: the key finds that one.
        tagged = client.search_runs([experiment_id], f"tags.`fader.key` = '{key}'", max_results=1)
        if tagged:
            return tagged[0].info.run_id
        tags = {"fader.key": key, "mlflow.source.name": "fader train", "mlflow.source.type": "LOCAL"}
        tags["mlflow.user"] = getpass.getuser()
        return client.create_run(experiment_id, begin["time"], tags, begin["name"]).info.run_id

    def _refuse_deleted(self, experiment: Any, run: Any = None) -> None:
        """Raise Deleted when one of them was deleted in MLflow, from where both can be restored."""
        restore = f"MLFLOW_TRACKING_URI={self.state.uri} mlflow"
        if experiment.lifecycle_stage == "deleted":
            raise Deleted(
                f"its experiment {experiment.name} was deleted there: restore it by "
                f"'{restore} experiments restore --experiment-id {experiment.experiment_id}'"
            )
        if run is not None and run.info.lifecycle_stage == "deleted":
            raise Deleted(
                f"its run was deleted there: restore it on MLflow's page, where the experiment lists deleted runs, or by "
                f"'{restore} runs restore --run-id {self.state.run_id}'"
            )

    def _refuse_deleted_run(self) -> None:
        run = self._client.get_run(self.state.run_id)
        self._refuse_deleted(self._client.get_experiment(run.info.experiment_id), run)

    def answers(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
        except self.error:
            return False
        return True

    def _run_exists(self) -> bool:
        try:
            self._client.get_run(self.state.run_id)
        except self.error as error:
            return error.error_code != "RESOURCE_DOES_NOT_EXIST"
        return True

    def _deliver_file(self, path: Path) -> None:
        waiting: list[dict[str, Any]] = []
        number = 0
        behind = start = self.state.offsets.get(path.name, 0)
        for event, end in read_events(path, start):
            if event is None:
                logger.warning("%s: the line before byte %d is broken and left out", path.name, end)
            metrics = event["metrics"] if event and event["kind"] == "metrics" else None
            if waiting and (metrics is None or number + len(metrics) + 1 > _MAX_METRICS):
                self._deliver_metrics(path, waiting, behind)
                waiting, number = [], 0
            if metrics is not None:
                waiting.append(event)
                number += len(metrics) + 1
            elif event is not None:
                self._attempt(path, event)
                self._note(path, end, 1)
            behind = end
        if waiting or behind != start:
            self._deliver_metrics(path, waiting, behind)

    def _note(self, path: Path, offset: int, events: int) -> None:
        self.state.offsets[path.name] = offset
        self.sent += events
        self.state.save()

    def _deliver_metrics(self, path: Path, events: list[dict[str, Any]], end: int) -> None:
        try:
            self._log_metrics(events)
        except self.error as error:
            if error.error_code not in _REFUSALS:
                raise
            self._refuse_deleted_run()
            for event in events:  # one of them is the reason: find it and let the others through
                self._attempt(path, event)
        self._note(path, end, len(events))

    def _attempt(self, path: Path, event: dict[str, Any]) -> None:
        """Deliver one event; leave it out, with a word in the log, when the store will never take it.

        An error that is no clear refusal is raised, to be tried again; after five times at the same event, while the
        store answers otherwise, it counts as one: an artifact store without rights must not hold up the metrics.
        """
        try:
            getattr(self, f"_send_{event['kind']}")(event)
        except Exception as error:
            code = getattr(error, "error_code", None)
            if code in _REFUSALS:
                self._refuse_deleted_run()
            elif not isinstance(error, FileNotFoundError):
                if is_absent(error) or not self.answers():
                    raise
                if code in _STATES and event["kind"] not in ("picture", "artifact"):
                    raise
                here = f"{path.name} {event['time']} {event['kind']}"
                self._stuck = (here, self._stuck[1] + 1 if self._stuck[0] == here else 1)
                if self._stuck[1] < 5:
                    raise
            logger.warning("refused: %s of step %s: %s", event["kind"], event["step"], reason(error))
            self.state.refused += 1

    def _log_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        rows = []
        for event in events:
            values = event["metrics"] | ({"run/updates": event["updates"]} if "updates" in event else {})
            rows += [Metric(safe(name), value, event["time"], event["step"]) for name, value in values.items()]
        self._log(_MAX_METRICS, metrics=rows)

    def _send_metrics(self, event: dict[str, Any]) -> None:
        self._log_metrics([event])

    def _send_start(self, event: dict[str, Any]) -> None:
        self._client.update_run(self.state.run_id, status="RUNNING")
        self._client.log_metric(self.state.run_id, "run/attempt", event["attempt"], event["time"], event["step"])
        self._send_rewound(event | {"why": "resumed from a checkpoint"})

    def _send_rewound(self, event: dict[str, Any]) -> None:
        if event["from"] > event["step"]:
            about = {"to_images": event["step"], "from_images": event["from"], "why": event["why"]}
            self._client.set_tag(self.state.run_id, f"rewound.{event['time']}", json.dumps(about))

    def _send_params(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self.state.run_id).data.params
        new = []
        for key, value in event["params"].items():
            key, value = safe(key), _cut(value, _MAX_PARAM_CHARACTERS)
            if key not in there:
                new.append(Param(key, value))
            elif there[key] != value:  # MLflow lets no parameter change
                about = _cut(f"{there[key]} -> {value} at {event['step']} images", _MAX_TAG_CHARACTERS)
                self._client.set_tag(self.state.run_id, f"changed.{key}", about)
        self._log(_MAX_PARAMS, params=new)

    def _send_tags(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = {safe(key): _cut(value, _MAX_TAG_CHARACTERS) for key, value in event["tags"].items()}
        if "commit" in tags:
            tags["mlflow.source.git.commit"] = tags["commit"]
        self._log(_MAX_PARAMS, tags=[RunTag(key, value) for key, value in tags.items()])

    def _log(self, most: int, **rows: list[Any]) -> None:
        """Log rows of one kind, at most so many at once."""
        [(kind, items)] = rows.items()
        for first in range(0, len(items), most):
            self._client.log_batch(self.state.run_id, **{kind: items[first : first + most]})

    def _send_picture(self, event: dict[str, Any]) -> None:
        """As MLflow's `log_image` stores it, so that its page shows the steps, under a name made from the content."""
        import tempfile

        from PIL import Image

        source = self.spool / event["file"]
        name = safe(event["name"]).replace("/", "~")
        mark = hashlib.sha256(source.read_bytes()).hexdigest()[:32]
        stem = f"{name}+step+{event['step']}+timestamp+{event['time']}+{uuid.UUID(mark)}"
        with tempfile.TemporaryDirectory() as folder:
            full, small = Path(folder) / f"{stem}.png", Path(folder) / f"{stem}+compressed.webp"
            full.write_bytes(source.read_bytes())
            with Image.open(full) as image:
                image.thumbnail((256, 256))
                image.save(small)
            for path in (full, small):
                self._client.log_artifact(self.state.run_id, str(path), "images")
        self._client.set_tag(self.state.run_id, "mlflow.loggedImages", True)

    def _send_artifact(self, event: dict[str, Any]) -> None:
        path = self.spool.parent / event["path"]
        self._client.log_artifact(self.state.run_id, str(path), event.get("folder") or None)

    def _send_finish(self, event: dict[str, Any]) -> None:
        self._client.set_terminated(self.state.run_id, event["status"], event["time"])

    def killed(self) -> None:
        if self.state.run_id is not None:
            last = last_event(self.spool / "main.jsonl")
            if last is not None and last["kind"] != "finish":
                self._client.set_terminated(self.state.run_id, "KILLED", last["time"])


_ABSENT = {  # signs, in an error's text, of a server that is not there, and what they mean
    "Connection refused": "connection refused",
    "Connection aborted": "connection broken off",
    "timed out": "no answer in time",
    "Name or service not known": "no such host",
    "Temporary failure in name resolution": "no such host",
}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # final, unless the run or its experiment was deleted
_STATES = ("INVALID_STATE", "PERMISSION_DENIED", "UNAUTHENTICATED", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")


class Deleted(Exception):
    """The run or its experiment was deleted in MLflow; everything waits until it is restored."""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def is_absent(error: BaseException | None) -> bool:
    """Whether an error says that no server is there."""
    return any(sign in str(error) for sign in _ABSENT)


def reason(error: BaseException) -> str:
    """Return why MLflow did not take something: a word for a dead server, else its own text with the remedy in it."""
    text = str(error)
    for sign, words in _ABSENT.items():
        if sign in text:
            return words
    text = " ".join(text.partition("\n[SQL")[0].split()) or "no message"
    own = isinstance(error, (Deleted, ValueError))
    return without_password(_cut(text if own else f"{type(error).__name__}: {text}", 1000))
