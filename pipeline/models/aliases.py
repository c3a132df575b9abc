"""Move the alias `champion` of a registered model, also when several promotions happen at the same time."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline import tracking
from pipeline.models.store import open_store

log = logging.getLogger(__name__)

CHAMPION = "champion"
REPLACED, ROLLED_BACK = "promotion.replaced", "promotion.rolled_back"  # tags of a version
LEASE_SECONDS = 180.0  # a lock that stands longer was left by a process that died; longer than a request and its retries
_MOVE_SECONDS = 60.0  # within which the holder of a lock begins its last request


def promote(name: str, version: int, replaces: int | None, tags: Mapping[str, str]) -> None:
    """Make a version the champion and tag it. replaces: the champion as far as the caller knows; None: there is none.
    Raises ValueError: another version became the champion meanwhile; or the store does not answer."""
    with open_store(None) as mlflow, _alone(mlflow, name) as still_alone:
        client = mlflow.MlflowClient()
        now = _champion(client, name)
        if now != replaces:
            was, now_is = (f"version {v}" if v else "no version" for v in (replaces, now))
            raise ValueError(f"{name}@{CHAMPION} was {was} and is {now_is} now: somebody else promoted; promote again")
        for key, value in {**tags, REPLACED: str(replaces or "")}.items():
            client.set_model_version_tag(name, str(version), key, value)
        still_alone()
        client.set_registered_model_alias(name, CHAMPION, str(version))


def rollback(name: str) -> tuple[int, int]:
    """Make the version that the champion replaced the champion again; return the two versions, from and to. Raises
    ValueError: there is no champion, or it replaced none; or the store does not answer."""
    with open_store(None) as mlflow, _alone(mlflow, name) as still_alone:
        client = mlflow.MlflowClient()
        now = _champion(client, name)
        if now is None:
            raise ValueError(f"{name} has no champion to roll back")
        before = client.get_model_version(name, str(now)).tags.get(REPLACED)
        if not before:
            raise ValueError(f"version {now} of {name} replaced no other champion: there is none to go back to")
        still_alone()
        client.set_registered_model_alias(name, CHAMPION, before)
        client.set_model_version_tag(name, str(now), ROLLED_BACK, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
        return now, int(before)


def champion_of(name: str) -> int | None:
    with open_store(None) as mlflow:
        return _champion(mlflow.MlflowClient(), name)


def _champion(client: Any, name: str) -> int | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if version is None else int(version)


@contextlib.contextmanager
def _alone(mlflow: Any, name: str) -> Iterator[Callable[[], None]]:
    """Hold the lock on a model's champion; gives a function that raises when it was held too long to go on. A lock is a
    registered model NAME.promoting-NUMBER, because making one is what MLflow does for one caller only. The next number is
    taken when the newest lock is gone, or stands for `LEASE_SECONDS` of the waiting process's own time."""
    client, prefix = mlflow.MlflowClient(), f"{name}.promoting-"
    newest, since, told = 0, time.monotonic(), False
    while True:
        locks = _locks(client, prefix)
        if locks and locks[-1] != newest:
            newest, since = locks[-1], time.monotonic()
        if not locks or time.monotonic() - since >= LEASE_SECONDS:
            try:
                own = (locks or [0])[-1] + 1
                client.create_registered_model(f"{prefix}{own}", description="held while a champion is moved")
                break
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        if not told:
            store, told = tracking.without_password(mlflow.get_tracking_uri()), True
            log.info("another promotion of %s in %s holds %s%d; waiting for it", name, store, prefix, newest)
        time.sleep(0.5)
    began = time.monotonic()

    def still_alone() -> None:
        if time.monotonic() - began > _MOVE_SECONDS:
            raise ValueError(f"{name}@{CHAMPION} was not moved: the MLflow store took too long; promote again")

    try:
        yield still_alone
    finally:
        for number in _locks(client, prefix):
            if number <= own:
                with contextlib.suppress(mlflow.exceptions.MlflowException):
                    client.delete_registered_model(f"{prefix}{number}")


def _locks(client: Any, prefix: str) -> list[int]:
    models = client.search_registered_models(f"name LIKE '{prefix}%'", max_results=100)
    return sorted(int(number) for m in models if (number := m.name.removeprefix(prefix)).isdigit())
