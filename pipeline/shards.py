"""Shards: WebDataset tars, a Parquet manifest and dataset.json. Written, verified, opened here and nowhere else.

    OUT/train-000000.tar …   KEY.jpg + KEY.json for each record, picture bytes as they came
    OUT/manifest.parquet     one row a record, in the order of the tars: where its bytes lie, their digest, its labels
    OUT/dataset.json         names, counts, digests; written last: a folder without it is not a finished set

A set is a pure function of its data: the number of workers, kills and restarts leave no trace in any byte. Records are
dealt to shards by position in a fixed shuffle before anything is read, so that a bad record changes no other shard.
While it is being written OUT/.prepare holds a lock, unfinished files and a note on each finished shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.datasets import SPLITS, Dataset, LeftOut
from pipeline.datasets.source import Place, is_remote
from pipeline.images import check
from pipeline.datasets.workers import Progress, in_processes, locked, silent, tick
from pipeline.remote import Remote, cache_folder, fetch, publish

if TYPE_CHECKING:  # packing processes import this file and need neither torch nor pyarrow
    import pyarrow as pa

    from fader.attributes import Attributes

FORMAT = 1
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Picture formats a shard may hold, as Pillow calls them, and the extension of their members."""
MANIFEST, DESCRIPTION, WORK = "manifest.parquet", "dataset.json", ".prepare"
SHARD_NAME = re.compile(r"(train|valid|test)-\d{6}\.tar")
FIXED_COLUMNS = ("key", "split", "shard", "offset", "size", "digest", "width", "height", "extension")
_BLOCK, _RECORD = 512, 10240
_MAP_TRIALS = 20

logger = logging.getLogger(__name__)


# --- tar members ------------------------------------------------------------------------------------------------------


def _header(name: str, size: int) -> bytes:
    """A ustar header, byte for byte what webdataset.TarWriter(mtime=0, user="fader", group="fader", mode=0o444) writes.

    Written here because a record costs TarWriter 56 µs and this 12, beside 100 for the proof that its picture decodes,
    and because webdataset loads torch into every process that packs.
    """
    fields = (
        name.encode("ascii").ljust(100, b"\0"), b"0000444\0", b"0000000\0", b"0000000\0", b"%011o\0" % size,
        b"00000000000\0", b"        ", b"0", bytes(100), b"ustar\x0000", b"fader".ljust(32, b"\0"),
        b"fader".ljust(32, b"\0"),
    )  # fmt: skip
    header = b"".join(fields)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:].ljust(_BLOCK - 156, b"\0")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _BLOCK)


def _label_members(names: Sequence[str], kinds: Sequence[str], labels: np.ndarray) -> Iterator[bytes]:
    """KEY.json of each row of labels [N, A]: whole numbers, except for continuous attributes."""
    columns = [
        column.tolist() if kind == "continuous" else column.astype(int).tolist()
        for kind, column in zip(kinds, labels.T)
    ]
    for values in zip(*columns) if columns else ((),) * len(labels):
        yield json.dumps(dict(zip(names, values))).encode()


def _member_json(key: str, labels: bytes) -> bytes:
    return _header(f"{key}.json", len(labels)) + _padded(labels)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- files that are whole or absent -----------------------------------------------------------------------------------


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _replacing(path: Path, work: Path) -> Iterator[Any]:
    """A binary file that takes its place under `path` only when it is whole and on the disk."""
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=work)
    try:
        with open(handle, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write_json(path: Path, work: Path, entries: Any, indent: int | None = None) -> None:
    with _replacing(path, work) as file:
        file.write(json.dumps(entries, indent=indent).encode() + b"\n")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ShardJob:
    """One shard to write: the records dealt to it, and where it goes."""

    out: Path
    name: str
    names: list[str]
    kinds: list[str]
    keys: list[str]
    locations: list[str]
    labels: np.ndarray
    places: list[str]
    read: Callable[[str], bytes]
    skip_bad: bool

    @property
    def note(self) -> Path:
        return self.out / WORK / f"{self.name}.json"

    def digest(self) -> str:
        """What decides the shard's content, apart from the pictures."""
        digest = hashlib.sha256(
            json.dumps([FORMAT, self.name, self.names, self.kinds, self.keys, self.locations]).encode()
        )
        digest.update(np.ascontiguousarray(self.labels, "<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Written:
    """A shard as it stands on the disk. rows: (index among the job's records, offset, size, digest, width, height,
    extension) of every record in it."""

    job: str
    size: int
    digest: str
    rows: list[tuple[int, int, int, str, int, int, str]]
    left_out: list[LeftOut]


def _picture(job: _ShardJob, i: int) -> tuple[bytes, int, int, str] | str:
    """Bytes, width, height and extension of a record's picture, or what is wrong with it."""
    try:
        data = job.read(job.locations[i])
        width, height, kind = check(data)
    except FileNotFoundError as error:
        return f"picture {job.locations[i]} is missing ({error.filename})"
    except (OSError, ValueError) as error:
        return f"picture {job.locations[i]} cannot be read: {error}"
    if kind not in EXTENSIONS:
        return f"picture {job.locations[i]} is {kind}; shards hold {', '.join(EXTENSIONS)}"
    return data, width, height, EXTENSIONS[kind]


def _write_shard(job: _ShardJob) -> _Written:
    """Write one tar and, when it stands in its place, the note that says so."""
    rows, left_out, offset, digest = [], [], 0, hashlib.sha256()
    with _replacing(job.out / job.name, job.out / WORK) as file:
        members = _label_members(job.names, job.kinds, job.labels)
        for i, (key, labels) in enumerate(zip(job.keys, members, strict=True)):
            tick()
            picture = _picture(job, i)
            if isinstance(picture, str):
                if not job.skip_bad:
                    raise ValueError(f"{job.places[i]}: {picture}; mend it, or leave such records out with --skip-bad")
                left_out.append(LeftOut(key, f"{job.places[i]}: {picture}"))
                continue
            data, width, height, extension = picture
            block = _header(f"{key}.{extension}", len(data)) + _padded(data) + _member_json(key, labels)
            rows.append((i, offset + _BLOCK, len(data), _sha256(data), width, height, extension))
            file.write(block)
            digest.update(block)
            offset += len(block)
        end = bytes(2 * _BLOCK + -(offset + 2 * _BLOCK) % _RECORD)
        file.write(end)
        digest.update(end)
    written = _Written(job.digest(), offset + len(end), digest.hexdigest(), rows, left_out)
    _write_json(job.note, job.out / WORK, vars(written))
    return written


def _finished_shard(job: _ShardJob) -> _Written | None:
    """The shard an earlier run finished, when it is whole, of the same records, and none of them was bad."""
    try:
        entries = json.loads(job.note.read_text())
        written = _Written(**{**entries, "rows": [tuple(row) for row in entries["rows"]], "left_out": []})
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    tar = job.out / job.name
    if entries["left_out"] or written.job != job.digest() or not tar.is_file() or tar.stat().st_size != written.size:
        return None
    return written if _file_sha256(tar) == written.digest else None


def _shard(job: _ShardJob) -> _Written:
    written = _finished_shard(job)
    if written is None:
        return _write_shard(job)
    for _ in job.keys:
        tick()
    return written


def _jobs(dataset: Dataset, out: Path, shard_records: int, skip_bad: bool) -> list[_ShardJob]:
    """Records dealt to shards: inside each split in the order of a digest of their keys, which is a fixed shuffle."""
    names = [entry["name"] for entry in dataset.attribute_list]
    kinds = [entry["kind"] for entry in dataset.attribute_list]
    order = [hashlib.blake2b(key.encode(), digest_size=16).digest() for key in dataset.keys]
    jobs = []
    for split in SPLITS:
        rows = sorted((row for row, s in enumerate(dataset.splits) if s == split), key=order.__getitem__)
        for number, start in enumerate(range(0, len(rows), shard_records)):
            part = rows[start : start + shard_records]
            jobs.append(
                _ShardJob(
                    out=out,
                    name=f"{split}-{number:06d}.tar",
                    names=names,
                    kinds=kinds,
                    keys=[dataset.keys[row] for row in part],
                    locations=[dataset.locations[row] for row in part],
                    labels=dataset.labels[part],
                    places=[dataset.places[row] for row in part],
                    read=dataset.read,
                    skip_bad=skip_bad,
                )
            )
    return jobs


def prepare(
    dataset: Dataset,
    out: Path | str,
    *,
    shard_records: int = 4096,
    workers: int | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
) -> ShardSet:
    """Write a shard set, or go on with one that was interrupted. Every byte is the same however often that happens.

    Args:
        dataset: the index of what to write.
        out: a folder that is absent, empty, or holds an unfinished set of the same source.
        shard_records: records a tar.
        workers: processes; None: one a core.
        skip_bad: leave out pictures that are missing or cannot be decoded and list them in dataset.json.
        progress: called now and then with (records done, records in all).

    Returns:
        The finished set; also when it was finished before.

    Raises:
        ValueError: the folder holds something else, another process is writing to it, or a picture is bad; the message
            names file and line.
    """
    out = Path(out)
    if shard_records < 1 or (workers is not None and workers < 1):
        raise ValueError(f"shard_records {shard_records} and workers {workers} must be at least 1")
    if not len(dataset):
        raise ValueError(f"{dataset.name}: not one record to write; is the source empty?")
    reserved = [e["name"] for e in dataset.attribute_list if e["name"] in FIXED_COLUMNS]
    if reserved:
        raise ValueError(f"attribute {reserved[0]!r} is called like a column of the manifest; rename it")
    source = hashlib.sha256(f"{FORMAT} {dataset.digest()} {shard_records}".encode()).hexdigest()
    _claim(out)
    with locked(out / WORK, str(out)):
        finished = _finished_set(out, source)
        if finished is not None:
            logger.info("%s is already complete; nothing to do", out)
        else:
            _write_set(dataset, out, source, shard_records, workers, skip_bad, progress)
            finished = ShardSet.open(out)
        shutil.rmtree(out / WORK)
    return finished


def _claim(out: Path) -> None:
    """Make the folder, or see that what lies in it is ours."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is needed")
    ours = (out / WORK).is_dir() or (out / DESCRIPTION).is_file()
    foreign = [] if ours or not out.exists() else [p.name for p in out.iterdir() if p.is_file()]
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]} and no shard set; choose a folder that is absent or empty")
    (out / WORK).mkdir(parents=True, exist_ok=True)


def _finished_set(out: Path, source: str) -> ShardSet | None:
    """The finished set that lies in `out`, when it is of this source; None when there is none yet."""
    started = out / WORK / "source"
    other = "of another source or shard size; choose another folder, or remove it first"
    if (out / DESCRIPTION).exists():
        finished = ShardSet.open(out)
        if finished.info.get("source_digest") != source:
            shutil.rmtree(out / WORK)
            raise ValueError(f"{out} already holds a finished set {other}")
        return finished
    if started.exists() and started.read_text() != source:
        raise ValueError(f"{out} holds an unfinished set {other}")
    for stale in (out / WORK).glob("*.part"):
        stale.unlink()
    if not started.exists():
        with _replacing(started, out / WORK) as file:
            file.write(source.encode())
    return None


def _write_set(
    dataset: Dataset,
    out: Path,
    source: str,
    shard_records: int,
    workers: int | None,
    skip_bad: bool,
    progress: Progress,
) -> None:
    jobs = _jobs(dataset, out, shard_records, skip_bad)
    large_first = sorted(jobs, key=lambda job: -len(job.keys))  # so that the last job to end is a small one
    results = in_processes(_shard, large_first, workers, len(dataset), progress)
    written = {job.name: result for job, result in zip(large_first, results)}
    left_out = [*dataset.left_out, *(entry for job in jobs for entry in written[job.name].left_out)]
    for job in jobs:
        if not written[job.name].rows:
            (out / job.name).unlink()
    jobs = [job for job in jobs if written[job.name].rows]
    if not jobs:
        raise ValueError(f"{dataset.name}: every record is bad, beginning with {left_out[0].reason}")

    import pyarrow.parquet as pq

    table = _manifest(dataset.attribute_list, jobs, written)
    with _replacing(out / MANIFEST, out / WORK) as file:
        pq.write_table(table, file)
    info = {
        "format": FORMAT,
        "name": dataset.name,
        "source": dataset.source,
        "source_digest": source,
        "digest": _data_digest(dataset.attribute_list, table),
        "attributes": [{**entry, "k": len(entry["categories"]) or 2} for entry in dataset.attribute_list],
        "shard_records": shard_records,
        "splits": {split: _describe(dataset.attribute_list, split, table, jobs, written) for split in SPLITS},
        "manifest": {"file": MANIFEST, "size": (out / MANIFEST).stat().st_size, "digest": _file_sha256(out / MANIFEST)},
        "left_out": [entry._asdict() for entry in left_out],
    }
    _write_json(out / DESCRIPTION, out / WORK, info, indent=1)


def _manifest(attribute_list: list[dict[str, Any]], jobs: list[_ShardJob], written: dict[str, _Written]) -> pa.Table:
    import pyarrow as pa

    rows = [(job, row) for job in jobs for row in written[job.name].rows]
    labels = np.concatenate([job.labels[[row[0] for row in written[job.name].rows]] for job in jobs])
    columns = {
        "key": pa.array([job.keys[row[0]] for job, row in rows], pa.string()),
        "split": pa.array([job.name.partition("-")[0] for job, _ in rows], pa.string()),
        "shard": pa.array([job.name for job, _ in rows], pa.string()),
        "offset": pa.array([row[1] for _, row in rows], pa.int64()),
        "size": pa.array([row[2] for _, row in rows], pa.int64()),
        "digest": pa.array([row[3] for _, row in rows], pa.string()),
        "width": pa.array([row[4] for _, row in rows], pa.int32()),
        "height": pa.array([row[5] for _, row in rows], pa.int32()),
        "extension": pa.array([row[6] for _, row in rows], pa.string()),
    }
    for j, entry in enumerate(attribute_list):
        kind = np.float32 if entry["kind"] == "continuous" else np.int8
        columns[entry["name"]] = pa.array(np.ascontiguousarray(labels[:, j], kind))
    return pa.table(columns)


def _data_digest(attribute_list: list[dict[str, Any]], table: pa.Table) -> str:
    """sha256 of what the data is: attributes, and each record's key, split, picture digest and labels, in order."""
    digest = hashlib.sha256(json.dumps([[e["name"], e["kind"], e["categories"]] for e in attribute_list]).encode())
    for column in ("key", "split", "digest"):
        digest.update("\n".join(table[column].to_pylist()).encode())
    for entry in attribute_list:
        kind = "<f4" if entry["kind"] == "continuous" else "<i1"
        digest.update(table[entry["name"]].to_numpy().astype(kind).tobytes())
    return digest.hexdigest()


def _describe(
    attribute_list: list[dict[str, Any]],
    split: str,
    table: pa.Table,
    jobs: list[_ShardJob],
    written: dict[str, _Written],
) -> dict[str, Any]:
    """What dataset.json says of a split: records, how many hold each value of each attribute, and its shards."""
    mask = np.array([name == split for name in table["split"].to_pylist()])
    counts: dict[str, dict[str, float]] = {}
    for entry in attribute_list:
        labels = table[entry["name"]].to_numpy()[mask]
        known = labels[labels >= 0]
        if entry["kind"] == "continuous":
            counts[entry["name"]] = {"mean": float(known.mean()) if len(known) else 0.0}
        else:
            values = entry["categories"] or ["0", "1"]
            counts[entry["name"]] = {value: int((known == v).sum()) for v, value in enumerate(values)}
        if len(known) < len(labels):
            counts[entry["name"]]["unknown"] = len(labels) - len(known)
    shards = [
        {
            "file": job.name,
            "records": len(written[job.name].rows),
            "size": written[job.name].size,
            "digest": written[job.name].digest,
        }
        for job in jobs
        if job.name.startswith(f"{split}-")
    ]
    return {"records": int(mask.sum()), "labels": counts, "shards": shards}


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_description(path: Path) -> dict[str, Any]:
    """dataset.json, checked as far as readers rely on it.

    Raises:
        ValueError: absent, unfinished or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not there; write it with 'fader prepare'")
    if not (path / DESCRIPTION).is_file():
        if (path / WORK).is_dir():
            raise ValueError(
                f"{path} is not finished: {DESCRIPTION} is missing; run the same 'fader prepare' again to finish it"
            )
        raise ValueError(f"{path} holds no shard set: {DESCRIPTION} is missing; write one with 'fader prepare'")
    try:
        info = json.loads((path / DESCRIPTION).read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']}, this version reads {FORMAT}")
        for split in SPLITS:
            for shard in info["splits"][split]["shards"]:
                if not SHARD_NAME.fullmatch(shard["file"]) or int(shard["size"]) < 0 or not str(shard["digest"]):
                    raise ValueError(f"shard {shard['file']!r}")
        for entry in info["attributes"]:
            str(entry["name"]), str(entry["kind"]), list(entry["categories"])
        str(info["manifest"]["digest"]), str(info["name"]), str(info["digest"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path / DESCRIPTION} is damaged ({error}); remove {path} and run 'fader prepare' again"
        ) from error
    return info


def _shards_of(info: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in SPLITS for shard in info["splits"][split]["shards"]]


def _size_fault(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        short = "written short" if path.stat().st_size < size else "not the file that was written"
        return f"{path.name} is {path.stat().st_size:,} bytes, {DESCRIPTION} says {size:,}: {short}"
    return None


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set. digest: the data digest: what the data is, not how it was cut or where it lies.

    path: its folder; of a set that lies elsewhere the folder of the cache, and `remote` fetches its tars to there.
    """

    path: Path
    info: dict[str, Any] = field(repr=False)
    remote: Remote | None = None

    @classmethod
    def open(cls, path: Path | str) -> ShardSet:
        """Open a set; sizes of all files and the manifest's digest are checked, the tars are not read (`verify` does).

        Args:
            path: a folder, or an address that fsspec knows.

        Raises:
            ValueError: not there, not finished, or damaged.
            OSError: the address does not answer.
        """
        if is_remote(path):
            return _open_remote(Place(os.fspath(path)))
        path = Path(path)
        info = _read_description(path)
        faults = [_size_fault(path / shard["file"], shard["size"]) for shard in _shards_of(info)]
        faults.append(_size_fault(path / MANIFEST, info["manifest"]["size"]))
        if not any(faults) and _file_sha256(path / MANIFEST) != info["manifest"]["digest"]:
            faults.append(f"{MANIFEST} differs from its digest in {DESCRIPTION}")
        faults = [fault for fault in faults if fault]
        if faults:
            raise ValueError(f"{path}: {'; '.join(faults[:5])}; remove {path} and run 'fader prepare' again")
        return cls(path, info)

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def digest(self) -> str:
        return self.info["digest"]

    @cached_property
    def attributes(self) -> Attributes:
        from fader.attributes import Attributes

        return Attributes.from_list(self.info["attributes"])

    @cached_property
    def manifest(self) -> pa.Table:
        """The manifest, one row a record.

        Raises:
            ValueError: a column is missing, or a row points outside its tar.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self.path / MANIFEST)
            table = table.select([*FIXED_COLUMNS, *(entry["name"] for entry in self.info["attributes"])])
        except (pa.ArrowException, KeyError, OSError) as error:
            raise ValueError(f"{self.path / MANIFEST} cannot be read: {error}") from error
        sizes = {shard["file"]: shard["size"] for shard in _shards_of(self.info)}
        limit = np.array([sizes.get(shard, -1) for shard in table["shard"].to_pylist()])
        offset, size = table["offset"].to_numpy(), table["size"].to_numpy()
        if ((offset < 0) | (size < 0) | (offset + size > limit)).any():
            raise ValueError(
                f"{self.path / MANIFEST} points outside the tars; remove {self.path} and run 'fader prepare' again"
            )
        return table

    def split(self, name: str) -> Split:
        """The records of one split.

        Raises:
            ValueError: no such split, or not one record in it.
        """
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; there are {', '.join(SPLITS)}")
        import pyarrow.compute as pc

        table = self.manifest.filter(pc.equal(self.manifest["split"], name))
        if not table.num_rows:
            counts = ", ".join(f"{split} {self.info['splits'][split]['records']:,}" for split in SPLITS)
            raise ValueError(f"{self.path} has no {name} records ({counts}); prepare a source that has some")
        names = [shard["file"] for shard in self.info["splits"][name]["shards"]]
        number = {shard: i for i, shard in enumerate(names)}
        attribute_list = self.info["attributes"]
        return Split(
            name=name,
            attributes=self.attributes,
            keys=np.array(table["key"].to_pylist()),
            labels=np.stack([table[e["name"]].to_numpy().astype(np.float32) for e in attribute_list], 1)
            if attribute_list
            else np.zeros((table.num_rows, 0), np.float32),
            shard=np.array([number[shard] for shard in table["shard"].to_pylist()], np.int32),
            offset=table["offset"].to_numpy(),
            size=table["size"].to_numpy(),
            width=table["width"].to_numpy(),
            height=table["height"].to_numpy(),
            shards=[self.path / shard for shard in names],
            digest=_data_digest(attribute_list, table),
            remote=self.remote,
        )


def _open_remote(place: Place) -> ShardSet:
    """The set at an address. Its description is always fetched, its manifest when the cache has another or none.

    Raises:
        ValueError, OSError: as `ShardSet.open`.
    """
    folder = cache_folder() / hashlib.sha256(place.address.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        description = (place / DESCRIPTION).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{place} holds no finished shard set: {DESCRIPTION} is missing") from error
    if not (folder / DESCRIPTION).is_file() or (folder / DESCRIPTION).read_bytes() != description:
        for stale in (*folder.glob("*.tar"), folder / MANIFEST):
            stale.unlink(missing_ok=True)
        with _replacing(folder / DESCRIPTION, folder) as file:
            file.write(description)
    info = _read_description(folder)
    manifest = info["manifest"]
    if _size_fault(folder / MANIFEST, manifest["size"]) or _file_sha256(folder / MANIFEST) != manifest["digest"]:
        fetch(place / MANIFEST, folder / MANIFEST, manifest["size"], manifest["digest"])
    files = {shard["file"]: (shard["size"], shard["digest"]) for shard in _shards_of(info)}
    return ShardSet(folder, info, Remote(place, folder, files))


def upload(path: Path | str, address: str) -> None:
    """Copy a finished set to an address, its description last, so that nobody takes a part of it for the whole.

    Raises:
        ValueError: `path` is no finished set, or another set lies at the address.
        OSError: the address cannot be written to.
    """
    whole, place = ShardSet.open(path), Place(address)
    there = place / DESCRIPTION
    if there.is_file() and there.read_bytes() != (whole.path / DESCRIPTION).read_bytes():
        raise ValueError(f"{address} already holds another set; choose another address, or remove it first")
    publish(whole.path, place, [*(shard["file"] for shard in _shards_of(whole.info)), MANIFEST, DESCRIPTION])


@dataclass(frozen=True, eq=False)
class Split:
    """The records of one split, in the order of its tars, which is a fixed shuffle.

    keys [n] str; labels [n, A] float32 in the order of `attributes`, -1 unknown; shard [n] int32 into `shards`;
    offset, size [n] int64: where the picture's bytes lie in that tar; width, height [n] int32, upright;
    digest: the data digest of these records alone.
    """

    name: str
    attributes: Attributes
    keys: np.ndarray
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    shards: list[Path]
    digest: str
    remote: Remote | None = None
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def columns(self, attributes: Attributes) -> np.ndarray:
        """Labels of the named attributes: [n, len(attributes)] float32.

        Raises:
            ValueError: the set has no such attribute, or one of another kind or other categories.
        """
        rows = [self.attributes.index(attribute.name) for attribute in attributes]
        for attribute, row in zip(attributes, rows):
            found = self.attributes[row]
            if found != attribute:
                raise ValueError(f"{attribute.name} is {_kind(found)} in this set, {_kind(attribute)} is asked for")
        return self.labels[:, rows]

    def bytes(self, row: int) -> np.ndarray:
        """The picture's bytes as they came: 1-D uint8, a view into the mapped tar. Safe from several threads."""
        number = int(self.shard[row])
        tar = self._maps.get(number)
        if tar is None:
            tar = self._maps.setdefault(number, self._mapped(self.shards[number]))
        offset = int(self.offset[row])
        return tar[offset : offset + int(self.size[row])]

    def _mapped(self, path: Path) -> np.ndarray:
        """A tar, mapped; fetched first where the set lies elsewhere."""
        if self.remote is None:
            return np.memmap(path, np.uint8, "r")
        gone = [number for number in list(self._maps) if not self.shards[number].exists()]
        for number in gone:  # another process, or this one, needed the room: give the disk back
            self._maps.pop(number, None)
        for _ in range(_MAP_TRIALS):
            local = self.remote.fetch(path.name)
            with contextlib.suppress(FileNotFoundError):  # it made room for another tar before it was mapped
                return np.memmap(local, np.uint8, "r")
        raise OSError(f"the cache has no room for {path.name} beside what others read; raise FADER_CACHE_GB")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _kind(attribute: Any) -> str:
    return f"{attribute.kind} ({', '.join(attribute.categories)})" if attribute.categories else attribute.kind


# --- verifying --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `verify` read."""

    records: int
    shards: int
    size: int


@dataclass(frozen=True)
class _VerifyJob:
    """One tar to check: what dataset.json and the manifest say of it. rows: (key, offset, size, digest, extension)."""

    path: Path
    size: int
    digest: str
    names: list[str]
    kinds: list[str]
    rows: list[tuple[str, int, int, str, str]]
    labels: np.ndarray


def _verify_shard(job: _VerifyJob) -> list[str]:
    """What is damaged in one tar. The whole tar follows from the manifest, except the pictures, whose digests do."""
    name, faults, position = job.path.name, [], 0
    fault = _size_fault(job.path, job.size)
    if fault:
        return [fault]
    digest = hashlib.sha256()
    with open(job.path, "rb") as file:

        def take(size: int) -> bytes:
            data = file.read(size)
            digest.update(data)
            return data

        members = _label_members(job.names, job.kinds, job.labels)
        for (key, offset, size, expected, extension), labels in zip(job.rows, members, strict=True):
            tick()
            if offset != position + _BLOCK:
                return [
                    *faults,
                    f"{name}: the manifest has {key} at byte {offset:,}, where it does not follow the record before",
                ]
            if take(_BLOCK) != _header(f"{key}.{extension}", size):
                faults.append(f"{name}: the header of {key}.{extension} is damaged")
            picture, padding = take(size), take(-size % _BLOCK)
            if _sha256(picture) != expected or padding.strip(b"\0"):
                faults.append(f"{name}: {key}.{extension} differs from its digest")
            member = _member_json(key, labels)
            if take(len(member)) != member:
                faults.append(f"{name}: {key}.json differs from the labels in the manifest")
            position = file.tell()
        rest = take(job.size - position)
        if len(rest) < 2 * _BLOCK or rest.strip(b"\0"):
            faults.append(f"{name}: the end of the tar is damaged")
    if digest.hexdigest() != job.digest and not faults:
        faults.append(f"{name} differs from its digest in {DESCRIPTION}")
    return faults


def verify(path: Path | str, *, workers: int | None = None, progress: Progress = silent) -> Report:
    """Read a set back whole: every picture against its digest, every label file against the columns, every tar, the
    manifest and the data digest against dataset.json.

    Raises:
        ValueError: not there, not finished, or damaged; names what is (the first 20 places).
    """
    if is_remote(path):
        raise ValueError(f"{path} lies elsewhere; verify reads local sets, and what is fetched is checked as it comes")
    path = Path(path)
    info = _read_description(path)
    shards = _shards_of(info)
    fault = _size_fault(path / MANIFEST, info["manifest"]["size"])
    if fault or _file_sha256(path / MANIFEST) != info["manifest"]["digest"]:
        raise ValueError(f"{path} is damaged: {fault or f'{MANIFEST} differs from its digest in {DESCRIPTION}'}")
    whole = ShardSet(path, info)
    jobs = _verify_jobs(whole, shards)
    found = in_processes(_verify_shard, jobs, workers, whole.manifest.num_rows, progress)
    faults = [fault for part in found for fault in part]
    if _data_digest(info["attributes"], whole.manifest) != info["digest"]:
        faults.append(f"{MANIFEST} does not give the data digest in {DESCRIPTION}")
    known = {shard["file"] for shard in shards}
    faults += [f"{p.name} does not belong to the set" for p in sorted(path.glob("*.tar")) if p.name not in known]
    if faults:
        more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{path} is damaged in {len(faults)} places: {'; '.join(faults[:20])}{more}")
    return Report(whole.manifest.num_rows, len(shards), sum(shard["size"] for shard in shards))


def _verify_jobs(whole: ShardSet, shards: Iterable[dict[str, Any]]) -> list[_VerifyJob]:
    table, attribute_list = whole.manifest, whole.info["attributes"]
    names = [entry["name"] for entry in attribute_list]
    labels = (
        np.stack([table[name].to_numpy().astype(np.float32) for name in names], 1)
        if names
        else np.zeros((table.num_rows, 0))
    )
    rows_of: dict[str, list[int]] = {shard["file"]: [] for shard in shards}
    for row, shard in enumerate(table["shard"].to_pylist()):
        rows_of[shard].append(row)
    columns = [table[name].to_pylist() for name in ("key", "offset", "size", "digest", "extension")]
    rows = list(zip(*columns))
    return [
        _VerifyJob(
            path=whole.path / shard["file"],
            size=shard["size"],
            digest=shard["digest"],
            names=names,
            kinds=[entry["kind"] for entry in attribute_list],
            rows=[rows[row] for row in rows_of[shard["file"]]],
            labels=labels[rows_of[shard["file"]]],
        )
        for shard in shards
    ]
