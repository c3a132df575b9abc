"""Data sets: each a function that reads a source and gives a Dataset, the light index that shards are written from."""

from collections.abc import Callable

from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.datasets.daynight import read_daynight
from pipeline.data.datasets.digits import read_digits
from pipeline.data.datasets.faces import read_faces
from pipeline.data.datasets.folders import read_folders
from pipeline.data.datasets.fruit import read_fruit
from pipeline.data.datasets.mnist import read_mnist
from pipeline.data.datasets.record import SPLITS, Dataset, LeftOut
from pipeline.data.datasets.splits import Shares
from pipeline.data.datasets.table import read_table
from pipeline.data.datasets.wds import read_wds

_READERS = (read_celeba, read_daynight, read_digits, read_faces, read_folders, read_fruit, read_mnist, read_table, read_wds)
DATASETS: dict[str, Callable[..., Dataset]] = {read.__name__.removeprefix("read_"): read for read in _READERS}
