"""Track runs in MLflow: parameters, metrics, pictures, artifacts. What happens to the server never reaches the loop.

    loop ─put─▶ bounded queue ─thread─▶ RUN/spool/main.jsonl ─sender process─▶ MLflow

The loop only puts an event into a queue. A thread appends it to the run's spool, an append-only JSONL file, and a child
process reads the spool and delivers to MLflow. The child is a process and not a thread for two reasons: importing and
calling MLflow takes the interpreter's lock for milliseconds at a time, which a fast step would feel; and the short time
limits that delivery wants for HTTP are environment variables, which so stay the child's own (see `delivery`).

What was delivered is kept for each store (tracking URI) in `spool/state.json` as an offset into the spool. A store that
does not answer is asked again; one that lost the run gets a new run and all points again; a copied folder gets a run of
its own. `sync` delivers later, to the same store or to another one. Every point keeps the time and the step (images
seen) at which it was logged, so a point that is sent twice is the same row in MLflow. Pictures carry a name made from
their content for the same reason.

After a resume or a return to an older checkpoint the points past it are superseded. MLflow cannot delete points, so
they are marked: `points` says of each whether it is superseded, and the MLflow run has a tag `rewound.TIME` that says
from which images seen back to which, and why: what was logged before TIME past that checkpoint is superseded.

What is found out about a run afterwards (`add`) goes through a spool file of its own, `RUN/spool/later.jsonl`, and the
same sender. It is no part of the loop's story: it neither supersedes points nor changes the run's status.

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
from pipeline.tracking.spool import Point, flatten, points, run_id_of, spool_of, store_of, undelivered
from pipeline.tracking.tracker import MlflowTracker, NodeTracker, Status, Tracker, open_tracker
