"""One pass over the records of a split, dealt to the processes that evaluate together: each is encoded once, decoded as often as
the tables need, and kept by its row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fader.method import Batch, Method, ReduceSum
from pipeline import metrics
from pipeline.data.shards import Split
from pipeline.evaluation.distribution import Classes, Features
from pipeline.evaluation.report import SLIDER_POSITIONS, slider_values
from pipeline.evaluation.specification import Specification
from pipeline.evaluation.twins import TwinErrors
from pipeline.loading.loader import Loader
from pipeline.loading.pillow import PillowLoader
from pipeline.loading.plan import sequential
from pipeline.models import Model, editor, readers_of, sampler

SLIDER_RECORDS = 256
PROBE_RECORDS = 4000
_DECODING = {"swap", "error", "fidelity", "distribution"}  # tables that look at decoded pictures


def makes_pictures(method: Method) -> bool:
    """Whether a method edits or samples; its pictures are judged. Without that it can only be a judge itself."""
    return editor(method) is not None or sampler(method) is not None


def pictures(method: Method, batch: Batch) -> tuple[Callable[[Tensor], Tensor], Any]:
    """Return the function from codes [N, code_width] to pictures, float32 in [-1, 1]; and the latent behind it, if any.
    They are edits of the batch's photos, each encoded once; of a method that only samples they are of each record's noise."""
    edits, samples = editor(method), sampler(method)
    if edits is not None:
        latent = edits.encode(batch.images, batch.attributes)
        return lambda code: edits.decode(latent, code).float().clamp(-1, 1), latent
    assert samples is not None
    noise = batch.draws.normal("sample", (samples.noise_width,))
    return lambda code: samples.sample(noise, code).float().clamp(-1, 1), None


def flat_latent(latent: Any) -> Tensor:
    """[N, F] float32: every tensor of what `encode` gave, flattened and joined: all the decoder knows of the image."""
    parts = [part.flatten(1).float() for part in pytree.tree_leaves(latent) if isinstance(part, Tensor)]
    if not parts:
        raise ValueError(f"encode gave {type(latent).__name__} without any tensor; the leak table cannot read it")
    return torch.cat(parts, 1)


@contextmanager
def evaluating(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Put every module into eval mode, and afterwards each back as it was."""
    before = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class Rows:
    """Results by name, one row a record of the split, allocated beforehand, because a rank that has no batch still takes
    part in every sum that gathers them."""

    def __init__(self, records: int, device: torch.device) -> None:
        self.records, self.device = records, device
        self.results: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # over records, which have no row of their own here
        self.allocate("measured", ())

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, most: int | None = None) -> None:
        """Make room for a result of this shape of each record, or of the first `most` records."""
        records = min(self.records, most) if most else self.records
        self.results[name] = torch.zeros((records, *shape), dtype=dtype, device=self.device)

    def put(self, name: str, index: Tensor, values: Tensor) -> None:
        """values [N, ...] become the rows `index` of a result; rows beyond its last are not wanted."""
        rows = self.results[name]
        wanted = index < len(rows)
        rows[index[wanted]] = values[wanted].to(rows.dtype)

    def gathered(self, reduce_sum: ReduceSum) -> tuple[dict[str, Tensor], Tensor]:
        """Return all results on the CPU, the same on every rank, of the records that were measured; and which were.

        A record that does not decode is not measured, and another stands in for it, which then may be measured twice.
        """
        results = {name: reduce_sum(rows).cpu() for name, rows in sorted(self.results.items())}
        times = results.pop("measured")
        if not bool((times == 1).all()):
            for name, rows in results.items():
                own = times[: len(rows)]
                results[name] = rows[own > 0] / own[own > 0].reshape(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)
        return results | {name: reduce_sum(total).cpu() for name, total in sorted(self.sums.items())}, times > 0


class Pass:
    """What one model's pictures are like, record by record, as the readers of a panel and pure measures see them."""

    def __init__(
        self, model: Model, judges: Sequence[Model], device: torch.device, tables: Sequence[str], records: int
    ) -> None:
        self.method, self.attributes, self.device = model.method, model.attributes, device
        self.editor, self.tables = editor(model.method), set(tables)
        self.readers = readers_of(judges, model.attributes)
        self.own = "reconstruction" if self.editor else "sample"  # what a picture of a record's own labels is
        self.features: Features | None = None
        self.classes: tuple[Classes, ...] = ()
        self.twins: TwinErrors | None = None
        self.rows = Rows(records, device)
        self._allocate(model.preprocessing.image_size)

    def _allocate(self, size: int) -> None:
        width, rows, method = len(self.attributes), self.rows, self.method
        for r in range(len(self.readers)):
            rows.allocate(f"real/{r}", (width,))
        for name in ("real_present", "real_confidence") if self.readers else ():
            rows.allocate(name, (width,))
        if not makes_pictures(method):
            return
        if self.editor and "leak" in self.tables:
            with torch.inference_mode():
                image = torch.zeros(1, method.channels, size, size, device=self.device)
                latent = self.editor.encode(image, torch.zeros(1, width, device=self.device))
            rows.allocate("latent", flat_latent(latent).shape[1:], torch.float32, PROBE_RECORDS)
        if self.editor and self.tables & {"error", "fidelity"}:
            rows.allocate("mse", ())
        if self.editor and "fidelity" in self.tables:
            for name, smallest in (("ssim", metrics.SSIM_FROM), ("ms_ssim", metrics.MS_SSIM_FROM)):
                if size >= smallest:
                    rows.allocate(name, ())
        for r in range(len(self.readers) if self.tables & _DECODING - {"error"} else 0):
            rows.allocate(f"{self.own}/{r}", (width,))
            rows.allocate(f"swap/{r}", (sum(attribute.k - 1 for attribute in self.attributes),))
        if self.readers and "fidelity" in self.tables:
            zeros = torch.zeros(width, len(self.readers[0].judged), 2, dtype=torch.float64, device=self.device)
            rows.sums |= {"preserved": zeros, "preserved_counts": zeros[:, 0, 0].clone()}
            sliders = len(list(slider_values(self.attributes)))
            rows.allocate("response", (sliders, len(SLIDER_POSITIONS)), most=SLIDER_RECORDS)

    def compare_with(self, twins: TwinErrors) -> None:
        """Keep how far each swap is from the twin of its record."""
        self.twins = twins
        self.rows.allocate("twins", (sum(attribute.k - 1 for attribute in self.attributes), 3))

    def describe_with(self, features: Features, classes: Sequence[Classes]) -> None:
        """Keep features and judged probabilities of real images, reconstructions, swaps and samples."""
        self.features, self.classes = features, tuple(classes)
        size = self.method.image_size
        with torch.inference_mode():
            width = features.extract(torch.zeros(1, self.method.channels, size, size, device=self.device)).shape[1]
        for name in self._described():
            self.rows.allocate(f"features/{name}", (width,), torch.float32)
            self.rows.allocate(f"probabilities/{name}", (self.attributes.code_width,), torch.float32)
        for definition in self.classes:
            if len(definition.columns) > 1:
                self.rows.allocate(f"classes/{definition.name}", ())

    def _described(self) -> list[str]:
        steps = [f"{attribute.name}/{step}" for attribute in self.attributes for step in range(1, attribute.k)]
        joint = [definition.name for definition in self.classes if len(definition.columns) > 1]
        samples = ["sample"] if sampler(self.method) else []
        return list(dict.fromkeys(["real", self.own, *steps, *joint, *samples]))

    def _describe(self, name: str, index: Tensor, images: Tensor, judged: Sequence[Tensor] | None = None) -> None:
        if self.features is None:
            return
        first = self.readers[0]
        blocks = first.own(first.probabilities(images) if judged is None else judged)
        self.rows.put(f"features/{name}", index, self.features.extract(images))
        self.rows.put(f"probabilities/{name}", index, torch.cat(blocks, 1))

    def _describe_classes(self, batch: Batch, picture: Callable[[Tensor], Tensor]) -> None:
        for definition in self.classes:
            if len(definition.columns) > 1:
                changed = definition.moved(batch.attributes, batch.draws)
                self._describe(definition.name, batch.index, picture(self.attributes.code(changed)))
                self.rows.put(f"classes/{definition.name}", batch.index, definition.of(changed))
        samples = sampler(self.method)
        if self.editor and samples and self.features is not None:
            noise = batch.draws.normal("sample", (samples.noise_width,))
            made = samples.sample(noise, self.attributes.code(batch.attributes)).float().clamp(-1, 1)
            self._describe("sample", batch.index, made)

    def measure(self, batch: Batch) -> None:
        """Take a batch through the model and the judge, and keep what the tables need."""
        images, index, rows = batch.images, batch.index, self.rows
        assert images is not None
        rows.put("measured", index, torch.ones_like(index))
        if self.readers:
            real = self._read("real", index, images)
            own = self.readers[0].own(real)
            rows.put("real_present", index, torch.stack([block[:, 1] for block in own], 1))
            rows.put("real_confidence", index, torch.stack([block.amax(1) for block in own], 1))
            self._describe("real", index, images, real)
        if not (makes_pictures(self.method) and self.tables - {"cost"}):
            return
        picture, latent = pictures(self.method, batch)
        if "latent" in rows:
            rows.put("latent", index, flat_latent(latent))
        if not self.tables & _DECODING:
            return
        code = self.attributes.code(batch.attributes)
        decoded = picture(code)
        for name, measure in (("mse", metrics.mse), ("ssim", metrics.ssim), ("ms_ssim", metrics.ms_ssim)):
            if name in rows:
                rows.put(name, index, measure(decoded, images))
        if "swap/0" in rows:
            self._judge_swaps(batch, picture, decoded)
        if self.twins is not None:
            rows.put("twins", index, self.twins(batch, picture, decoded))
        if "response" in rows and (index < SLIDER_RECORDS).any():
            rows.put("response", index, self._response(picture, code))
        self._describe_classes(batch, picture)

    def _judge_swaps(self, batch: Batch, picture: Callable[[Tensor], Tensor], decoded: Tensor) -> None:
        """Keep what the readers read off pictures of the records' own labels and off every swap."""
        labels, index = batch.attributes, batch.index
        before = self._read(self.own, index, decoded)
        self._describe(self.own, index, decoded, before)
        preds: list[list[Tensor]] = [[] for _ in self.readers]
        for j, step, changed, _ in self.attributes.swaps(labels):
            swap = picture(self.attributes.code(changed))
            read = [reader.probabilities(swap) for reader in self.readers]
            for reader, blocks, own in zip(self.readers, read, preds):
                own.append(reader.own(blocks)[j].argmax(1))
            after = read[0]
            self._describe(f"{self.attributes[j].name}/{step}", index, swap, after)
            if "preserved" in self.rows.sums:
                self._preserve(j, labels[:, j] >= 0, before, after)
        for r, own in enumerate(preds):
            self.rows.put(f"swap/{r}", index, torch.stack(own, 1))

    def _read(self, name: str, index: Tensor, images: Tensor) -> list[Tensor]:
        """Keep the value of each attribute that each reader reads off pictures; return the first reader's probabilities."""
        read = [reader.probabilities(images) for reader in self.readers]
        for r, (reader, blocks) in enumerate(zip(self.readers, read)):
            self.rows.put(f"{name}/{r}", index, torch.stack([block.argmax(1) for block in reader.own(blocks)], 1))
        return read[0]

    def _preserve(self, j: int, known: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Add, over the records whose label of attribute j is known, what its swap did to every judged attribute."""
        sums = self.rows.sums
        for a, (b, c) in enumerate(zip(before, after)):
            sums["preserved"][j, a, 0] += (b.argmax(1) == c.argmax(1))[known].sum()
            sums["preserved"][j, a, 1] += ((b - c).abs().sum(1) / 2)[known].double().sum()
        sums["preserved_counts"][j] += known.sum()

    def _response(self, picture: Callable[[Tensor], Tensor], code: Tensor) -> Tensor:
        """[N, sliders, positions]: the first reader's probability of each slider's value."""
        first, sliders = self.readers[0], []
        for j, attribute, value, category in slider_values(self.attributes):
            steps = []
            for position in SLIDER_POSITIONS:
                images = picture(self.attributes.with_slider(code, attribute.name, position, category))
                steps.append(first.own(first.probabilities(images))[j][:, value])
            sliders.append(torch.stack(steps, 1))
        return torch.stack(sliders, 1)


class Processes(Protocol):
    """The processes that evaluate together, as `pipeline.engine.Ranks` knows them."""

    rank: int
    world_size: int

    def reduce_sum(self, tensor: Tensor) -> Tensor: ...


class OneProcess:
    """A process that evaluates alone."""

    rank, world_size = 0, 1

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Records:
    """Reads the first records of a split, this rank's share of them, in whole batches, so that the result of a record
    cannot depend on the number of ranks. open_loader: gives a loader whose batches are whole. progress: called with
    (records read by this rank, records that it reads in all)."""

    batch_size: int
    ranks: Processes
    open_loader: Callable[[Split], Loader]
    progress: Callable[[int, int], None] | None = None

    def read(self, split: Split, records: int, each: Callable[[Batch], None]) -> None:
        requests = list(sequential(records, self.batch_size))[self.ranks.rank :: self.ranks.world_size]
        if not requests:
            return
        done, total = 0, sum(len(request.rows) for request in requests)
        for batch in self.open_loader(split).batches(iter(requests)):
            with torch.inference_mode():
                each(batch)
            done += len(batch.index)
            if self.progress:
                self.progress(done, total)


def pillow_loader(model: Model, specification: Specification) -> Callable[[Split], Loader]:
    device = torch.device(specification.device)
    return lambda split: PillowLoader(
        split, model.attributes, model.preprocessing,
        seed=specification.seed, device=device, threads=specification.threads,
    )  # fmt: skip
