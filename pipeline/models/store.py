"""Open an MLflow store with short waits and clear errors."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.files import ensure_home


@contextlib.contextmanager
def open_store(uri: str | None, create: bool = False) -> Iterator[Any]:
    """Give MLflow for one store, by default MLFLOW_TRACKING_URI or MLflow's own, which is made only with `create`. It
    waits seconds, not minutes, for a store that is gone, by environment variables that are set while this lasts, where
    the user has not set them; its errors become ValueErrors."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    wanted |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
    ours = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(ours)
    ensure_home()
    import mlflow

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    store = mlflow.get_tracking_uri()
    try:
        database = store.removeprefix("sqlite:///")
        if database != store and not create and not Path(database).exists():
            raise ValueError(
                f"there is no MLflow store here ({database}); run this in the folder where the model was registered, "
                "or set MLFLOW_TRACKING_URI"
            )
        yield mlflow
    except mlflow.exceptions.MlflowException as error:
        raise ValueError(f"MLflow at {tracking.without_password(store)}: {tracking.reason(error)}") from None
    finally:
        for key in ours:
            os.environ.pop(key, None)
