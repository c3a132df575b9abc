"""Sample the machine's figures while a run is trained."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from pipeline.tracking.spool import Log, last_event, safe

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 10.0


def sample(spool: Path, node: str | None, stop: threading.Event) -> None:
    """Append the machine's figures to the spool every few seconds, under the names that MLflow's own monitor uses."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        logger.info("no GPU figures: %s", error)
    prefix = "system/" if node is None else f"system/{safe(node)}/"
    log = Log(spool / f"system{'' if node is None else '-' + safe(node)}.jsonl")
    monitors[0].collect_metrics()  # the first reading of a processor's use counts from nothing
    monitors[0].clear_metrics()
    wait = 1.0  # a short run gets a sample, too
    while not stop.wait(wait):
        wait, values = SAMPLE_SECONDS, {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {prefix + name: value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        step = (last_event(spool / "main.jsonl") or {}).get("step", 0)
        event = {"kind": "metrics", "time": int(time.time() * 1000), "step": step, "metrics": values}
        try:
            log.append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            logger.warning("system metrics are not written: %s", error)
    log.close()
