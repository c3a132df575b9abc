"""Track runs in MLflow: parameters, metrics, pictures, artifacts. What happens to the server never reaches the loop.

    loop ─put─▶ bounded queue ─thread─▶ RUN/spool/main.jsonl ─sender process─▶ MLflow

A thread appends what the loop says to the run's spool, an append-only JSONL file, and a child process delivers that to
MLflow. It is a process because importing and calling MLflow takes the interpreter's lock for milliseconds at a time, and
because the short time limits that delivery wants for HTTP are environment variables (see `delivery`).

What was delivered to each store (tracking URI) is kept in `spool/state.json` as an offset into the spool. A store that
does not answer is asked again; one that lost the run gets a new run and all points; a copied folder gets a run of its
own. Every point keeps its time and step (images seen), and pictures a name made from their content, so what is sent twice
is the same.

After a resume or a return to an older checkpoint the points past it are superseded. MLflow cannot delete points, so
`points` says of each whether it is, and the MLflow run has a tag `rewound.TIME`: what was logged before TIME past that
checkpoint. What is found out about a run afterwards (`add`) goes through `RUN/spool/later.jsonl`, and supersedes nothing.

    tracker    what the loop uses: the queue and the thread that writes it to the spool
    spool      the spool on disk: its files, a run's points, what each store has received
    delivery   the sender process as others see it: the trainer's child, and `sync`
    process    the sender process itself
    sender     delivers the spool to MLflow, and says what MLflow does not take
    address    which store is in use; no password is written anywhere
    later      what is found out about a run afterwards
"""

from pipeline.tracking.address import without_password
from pipeline.tracking.delivery import Delivery, sync
from pipeline.tracking.later import Addition, add
from pipeline.tracking.sender import reason
from pipeline.tracking.spool import Point, flatten, points, run_id_of, safe, spool_of, store_of, undelivered
from pipeline.tracking.tracker import MlflowTracker, NodeTracker, Status, Tracker, open_tracker
