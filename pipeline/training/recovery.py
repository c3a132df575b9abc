"""Watch for updates that were not finite, and take the run back to a checkpoint from before them."""

import logging
from collections.abc import Mapping

import torch

from pipeline.config import build_method
from pipeline.engine import State
from pipeline.models import checkpoint
from pipeline.training.assembly import Run
from pipeline.training.retention import restore
from pipeline.training.steps import ResumePoint

log = logging.getLogger(__name__)


class NonFinite(FloatingPointError):
    """Too many updates were not finite. None of them changed anything."""


class Recovery:
    """Counts the updates that were left out, and takes the run back.
    finite_at: images seen at the last log interval at which all updates were finite."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.finite_at = run.images
        self._skipped: dict[str, int] = {}

    def check(self, metrics: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Count the updates left out since the last interval at which all were finite.
        Raises NonFinite: they are too many. Ranks see the same means, so all of them raise it."""
        run, left_out = self.run, {name: share for name, share in metrics.items() if name.endswith("/skipped") and share > 0}
        self._skipped = {name: self._skipped.get(name, 0) + round(share * counts[name]) for name, share in left_out.items()}
        for name, number in self._skipped.items():
            phase = name.removesuffix("/skipped")
            log.warning("%s: %d updates were not finite lately and left out", phase, number)
            if number >= run.experiment.run.nonfinite_updates:
                shown = ", ".join(f"{k.split('/')[-1]} {v:g}" for k, v in metrics.items() if k.startswith(phase))
                raise NonFinite(
                    f"{phase}: {number} updates up to {run.images:,} images were not finite ({shown}) "
                    f"and left out, after {run.point.salt} returns to an older checkpoint: lower the learning rate"
                )
        if not left_out:
            self.finite_at = run.images

    def go_back(self, fault: NonFinite) -> None:
        """Go to the last checkpoint from before the trouble, or to the start; from there on the run sees other batches.
        Raises NonFinite: the run went back too often already."""
        run, salt, came_to = self.run, self.run.point.salt + 1, self.run.images
        if run.writer:
            run.writer.wait()
        if salt > run.experiment.run.rollbacks:
            if run.writer:
                run.writer.forget_after(self.finite_at)  # a resume then begins before the trouble
            raise fault
        point = restore(run.engine, run.folder, run.experiment.seed, self.finite_at)
        if point is None:
            point = ResumePoint()
            run.engine.load(self._first_state())
        run.go_to(point)
        point.salt = salt
        self.finite_at, self._skipped = run.images, {}
        if run.writer:
            run.writer.forget_after(run.images)
        self._forget_a_best_that_is_gone()
        text = f"went back from {came_to:,} to {run.images:,} images, salt {salt}: {fault}"
        log.warning("%s", text)
        run.tracker.rewound(run.images, str(fault))
        run.tracker.tags({"rollbacks": salt, f"rollback.{salt}": text})

    def _forget_a_best_that_is_gone(self) -> None:
        """Let the next validation be the best, if the best before the return was removed for one that is gone now, too."""
        best_so_far, engine = self.run.best_so_far, self.run.engine
        if best_so_far and best_so_far.best:
            gone = engine.is_main and checkpoint.at(self.run.folder, best_so_far.best.images) is None
            if engine.largest(gone):
                best_so_far.best = None

    def _first_state(self) -> State:
        """Return the weights that the seed gives, and optimizers that have seen nothing."""
        experiment = self.run.experiment
        torch.manual_seed(experiment.seed)
        networks = build_method(experiment, self.run.engine.method.attributes).networks
        weights = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
        return State(weights, weights, {})
