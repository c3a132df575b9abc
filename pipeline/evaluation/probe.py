"""Table 3: what fresh probes, trained or solved in closed form, read of the attributes from frozen latents."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fader.method import Batch
from pipeline import metrics
from pipeline.data.shards import Split
from pipeline.evaluation.measure import PROBE_RECORDS, Pass, Records, Rows, flat_latent
from pipeline.evaluation.report import Leak
from pipeline.evaluation.specification import Specification


def leaks(
    pass_: Pass, records: Records, probe_split: Split, test: Tensor, labels: Tensor, specification: Specification,
    warnings: list[str],
) -> list[Leak]:
    """Let probes learn from the training split's latents and answer for the evaluated split's latents [N, F], whose
    labels are [N, A]. What cannot be probed is added to the warnings."""
    attributes, ranks = pass_.attributes, records.ranks
    learnt = Rows(min(PROBE_RECORDS, len(probe_split)), pass_.device)
    learnt.allocate("latent", test.shape[1:], torch.float32)

    def encode(batch: Batch) -> None:
        learnt.put("measured", batch.index, torch.ones_like(batch.index))
        learnt.put("latent", batch.index, flat_latent(pass_.editor.encode(batch.images, batch.attributes)))

    records.read(probe_split, learnt.records, encode)
    rows, measured = learnt.gathered(ranks.reduce_sum)
    train_labels = torch.from_numpy(probe_split.columns(attributes)[: learnt.records].copy()).float()[measured]
    hard_train, hard_test = (
        torch.stack([attribute.hard(own[:, j]) for j, attribute in enumerate(attributes)], 1)
        for own in (train_labels, labels[: len(test)])
    )
    preds = torch.zeros(len(test), len(attributes), dtype=torch.float64)
    kinds = torch.zeros(len(attributes), dtype=torch.float64)
    if ranks.rank == 0:  # training amplifies rounding, so one rank does it for all
        preds, kinds = answers(rows["latent"], hard_train, test, [a.k for a in attributes], seed=specification.seed)
    preds = ranks.reduce_sum(preds.to(pass_.device)).cpu().long()
    kinds = ranks.reduce_sum(kinds.to(pass_.device)).cpu()
    result = []
    for j, attribute in enumerate(attributes):
        if kinds[j] < 0:
            warnings.append(f"{attribute.name}: its training labels hold one value only; no probe can learn it")
            continue
        mask = torch.stack([hard_test[:, j] == value for value in attribute.values], 1)
        bits = torch.stack([preds[:, j] == value for value in attribute.values], 1)
        some = mask.any(0)
        resampled = metrics.bootstrap_means(bits, mask, seed=specification.seed, resamples=specification.resamples)
        resampled = resampled[:, some].nanmean(1)
        result.append(
            Leak(
                attribute.name, metrics.balanced_accuracy(preds[:, j], hard_test[:, j], attribute.k),
                *metrics.interval(resampled), chance=1 / attribute.k, probe=PROBES[int(kinds[j])],
                probe_records=int((hard_train[:, j] >= 0).sum()), records=int((hard_test[:, j] >= 0).sum()),
            )
        )
    return result


PROBES = ("linear", "mlp", "kernel")
_RIDGES = (1e-2, 1e-3, 1e-4, 1e-5)  # of the kernel readers
_STRENGTHS = (1.0, 0.1, 0.01, 0.001)  # of the L2 penalty of the linear probes, beside a mean loss

Classifier = Callable[[Tensor], Tensor]


def answers(
    train: Tensor, train_labels: Tensor, test: Tensor, ks: Sequence[int], *, seed: int, epochs: int = 30, hidden: int = 256
) -> tuple[Tensor, Tensor]:
    """What fresh classifiers, trained on frozen latents [N, F], say of other latents [M, F]; a pure function.

    Logistic regressions with several strengths of L2 and a network with one hidden layer learn every attribute with
    class-balanced cross-entropy, on latents standardised by what they learn from; kernel discriminants with several ridges
    (see `KernelReader`) are solved for them. For each attribute the classifier (and the network's epoch) is chosen by
    balanced accuracy on the last fifth of the training records, from which none of them learns.

    train_labels: [N, A] int64, -1 = unknown (left out). ks: values of each attribute. seed: of the network's first weights
    and its batches. Returns preds [M, A] float64, and the index in PROBES of the classifier chosen [A] float64, -1 where
    the part learnt from holds fewer than two values.
    """
    num_learn = max(1, len(train) - len(train) // 5)
    mean, std = train[:num_learn].mean(0), train[:num_learn].std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), 1 / std.clamp(min=1e-30), 0.0)
    learn, held, test = ((part - mean) * scale for part in (train[:num_learn], train[num_learn:], test))
    labels, held_labels = train_labels[:num_learn], train_labels[num_learn:]
    weights = [_balance(labels[:, j], k) for j, k in enumerate(ks)]
    learnable = [int((weight > 0).sum()) >= 2 for weight in weights]
    best = [(-1.0, 0)] * len(ks)
    preds = torch.zeros(len(test), len(ks), dtype=torch.float64)

    def loss(logits: Tensor, rows: Tensor | slice) -> Tensor:
        """Mean over these rows, weighted so that the values of an attribute count alike; summed over attributes."""
        total = logits.new_zeros(())
        for j, block in enumerate(logits.split(list(ks), 1)):
            if learnable[j]:
                total = total + torch.nn.functional.cross_entropy(
                    block, labels[rows, j], weights[j], ignore_index=-1, reduction="sum"
                )
        return total / len(logits)

    def consider(kind: str, classifier: Classifier) -> None:
        with torch.no_grad():
            held_blocks, test_blocks = (classifier(part).split(list(ks), 1) for part in (held, test))
        for j, k in enumerate(ks):
            value = metrics.balanced_accuracy(held_blocks[j].argmax(1), held_labels[:, j], k)
            if learnable[j] and value > best[j][0]:
                best[j] = (value, PROBES.index(kind))
                preds[:, j] = test_blocks[j].argmax(1).double()

    if any(learnable):
        with torch.inference_mode(False), torch.enable_grad():
            for classifier in _linear_probes(learn, loss, sum(ks)):
                consider("linear", classifier)
            for classifier in _mlp_probe(learn, loss, sum(ks), hidden, epochs, seed):
                consider("mlp", classifier)
            for classifier in _kernel_probes(learn, labels, ks):
                consider("kernel", classifier)
    kinds = [kind if can else -1 for (_, kind), can in zip(best, learnable)]
    return preds, torch.tensor(kinds, dtype=torch.float64)


def _balance(labels: Tensor, k: int) -> Tensor:
    """[k] weights by which the values of an attribute count alike; 0 of a value that no record has."""
    counts = torch.stack([(labels == value).sum() for value in range(k)]).float()
    return torch.where(counts > 0, counts.sum() / (k * counts.clamp(min=1)), 0.0)


def _linear_probes(learn: Tensor, loss: Callable[..., Tensor], width: int) -> Iterator[Classifier]:
    """A logistic regression for each strength of L2, from strong to weak, each from where the last one ended."""
    weight = torch.zeros(width, learn.shape[1], requires_grad=True)  # this way round both products run along rows
    bias = torch.zeros(width, requires_grad=True)
    for strength in _STRENGTHS:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(torch.nn.functional.linear(learn, weight, bias), slice(None)) + strength / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        yield lambda latents: torch.nn.functional.linear(latents, weight, bias)


def _mlp_probe(
    learn: Tensor, loss: Callable[..., Tensor], width: int, hidden: int, epochs: int, seed: int
) -> Iterator[Classifier]:
    generator = torch.Generator().manual_seed(seed)

    def layer(num_in: int, num_out: int) -> torch.nn.Linear:
        made = torch.nn.utils.skip_init(torch.nn.Linear, num_in, num_out)
        with torch.no_grad():
            made.weight.uniform_(-(num_in**-0.5), num_in**-0.5, generator=generator)
            made.bias.zero_()
        return made

    network = torch.nn.Sequential(layer(learn.shape[1], hidden), torch.nn.ReLU(), layer(hidden, width))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(learn), generator=generator).split(256):
            optimizer.zero_grad()
            loss(network(learn[rows]), rows).backward()
            optimizer.step()
        yield network


def _kernel_probes(learn: Tensor, labels: Tensor, ks: Sequence[int]) -> Iterator[Classifier]:
    """A kernel discriminant for each ridge, from coarse to fine."""
    edges = [sum(ks[:j]) for j in range(len(ks) + 1)]
    slices = [slice(start, stop) for start, stop in zip(edges, edges[1:])]
    members = torch.cat([(labels[:, j : j + 1] == torch.arange(k)).float() for j, k in enumerate(ks)], 1)
    for ridge in _RIDGES:
        yield KernelReader(learn, members, slices, ridge).logits


class KernelReader:
    """Reads which value of an attribute a latent has, by the kernel Fisher discriminant of several values.

    For a value v, μ_v is the mean feature vector of the records that have it. μ̄ is the mean of all μ_v, so that rare
    values count as much as common ones. Σ is the covariance of all records and ρ the ridge. The direction that tells v is
    d_v = (Σ + ρ)⁻¹ (μ_v - μ̄), and its separation is J_v = (μ_v - μ̄)ᵀ d_v. Features are those of the kernel exp(-|u -
    u'|² / 2F), where F numbers of a latent are standardised first.

    latents: [N, F] of the records that it learns from. members: [N, width], how far each record has each value, 0 where
    the label is unknown; slices: for each attribute, the columns of its values. ridge: ρ, as a share of the mean squared
    length of a feature vector about its mean: if it is too large, directions of small variance are missed; if too small,
    accidents learnt.

    Source: Mika, Rätsch, Weston, Schölkopf, Müller 1999, "Fisher discriminant analysis with kernels",
    doi:10.1109/NNSP.1999.788121; several values: Rao 1948, section 7.
    """

    def __init__(self, latents: Tensor, members: Tensor, slices: Sequence[slice], ridge: float) -> None:
        count, self.middle = len(latents), latents.sum(0) / len(latents)
        variance = (latents - self.middle).square().sum(0) / count
        self.spread = variance.sqrt().clamp(min=1e-3 * variance.mean().sqrt() + 1e-12)
        self.known = (latents - self.middle) / self.spread
        kernel = self._kernel(self.known)
        self.columns = kernel.sum(0) / count
        kernel = self._centred(kernel)
        shares = members / members.sum(0).clamp(min=1e-9)
        apart = shares.clone()
        for part in slices:
            apart[:, part] -= shares[:, part].mean(1, keepdim=True)
            apart[:, part] *= (members[:, part].sum(0) > 0).all()
        system = kernel / count
        system.diagonal().add_(ridge * system.diagonal().sum() + 1e-12)
        factor, _ = torch.linalg.cholesky_ex(system)  # latents that are not finite give a solution that is not, and no error
        self.alphas = torch.cholesky_solve(apart, factor).contiguous()
        read = kernel @ self.alphas
        self.separations = (apart * read).sum(0)
        self.centres = torch.cat([shares[:, part].mean(1) @ read[:, part] for part in slices])

    def read(self, latents: Tensor) -> Tensor:
        """[N, F] latents to [N, width]: for each value d_vᵀ (φ - φ̄), where φ̄ is the mean of the records learnt from."""
        return self._centred(self._kernel((latents - self.middle) / self.spread)) @ self.alphas

    def logits(self, latents: Tensor) -> Tensor:
        """[N, F] to [N, width]: the linear discriminant's log odds of each value, all of an attribute equally likely.

        Source: Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; Rao 1948, equation 7.1.
        """
        return self.read(latents) - self.centres - self.separations / 2

    def _kernel(self, standard: Tensor) -> Tensor:
        squares = standard.square().sum(1)[:, None] + self.known.square().sum(1) - 2 * standard @ self.known.T
        return (squares / (-2 * self.known.shape[1])).exp()

    def _centred(self, kernel: Tensor) -> Tensor:
        return kernel - kernel.sum(1, keepdim=True) / len(self.known) - self.columns + self.columns.sum() / len(self.known)
