"""Photos of places by day and by night, as webcams take them (AMOS, SkyFinder): one binary attribute, Night.

Pictures of one camera are alike, so a camera must not stand on both sides of a split: where the list of labels has a
camera column, records are split by it.

Source: Mihail et al. 2016, "Sky segmentation in the wild: an empirical study", cs.valdosta.edu/~rpmihail/skyfinder.
"""

import logging
import os

from pipeline.data.datasets.folders import read_folders
from pipeline.data.datasets.record import Dataset
from pipeline.data.datasets.source import Place
from pipeline.data.datasets.splits import Shares
from pipeline.data.datasets.table import read_header, read_table

ATTRIBUTE, LABELS = "Night", "labels.csv"
CAMERAS = ("camera", "cam", "camid", "camera_id", "cameraid")

logger = logging.getLogger(__name__)


def read_daynight(
    source: os.PathLike[str] | str, *, labels: str = "label", camera: str | None = None, shares: Shares | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """The index of a folder with labels.csv, of such a file (CSV or Parquet: path, label, maybe split and camera), or of a
    tree of folders day/ and night/. Records are split by the column `camera`, by default one of CAMERAS."""
    place = Place(os.fspath(source))
    table = place / LABELS if place.is_dir() else place
    if not table.is_file() and place.is_dir():
        if camera:
            raise ValueError(f"{place} has no {LABELS}, so no column {camera!r} to split by")
        _warn()
        dataset = read_folders(place.address, attribute=ATTRIBUTE, shares=shares, skip_bad=skip_bad, name="daynight")
        classes = [name.lower() for name in dataset.source["classes"]]
        if classes != ["day", "night"]:
            raise ValueError(f"{place} has the classes {', '.join(classes)}; day and night are needed")
        return dataset
    header = read_header(table)
    camera = camera or next((column for column in header if column.lower() in CAMERAS), None)
    if camera is None:
        _warn()
    dataset = read_table(
        table.address, group=camera, attributes=[labels], kinds=[f"{labels}=binary:day,night"],
        shares=shares or (Shares() if camera else None), skip_bad=skip_bad, name="daynight",
    )
    dataset.attribute_list[0]["name"] = ATTRIBUTE
    return dataset


def _warn() -> None:
    logger.warning("no camera column: pictures of one place may stand on both sides of a split")
