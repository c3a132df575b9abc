"""Shards: WebDataset tars, a Parquet manifest and dataset.json. Written, verified, opened here and nowhere else.

    OUT/train-000000.tar …   KEY.jpg + KEY.json for each record, picture bytes as they came
    OUT/manifest.parquet     one row a record, in the order of the tars: where its bytes lie, their digest, its labels
    OUT/dataset.json         names, counts, digests; written last: a folder without it is not a finished set

A set is a pure function of its data: the number of workers, kills and restarts leave no trace in any byte. Records are
dealt to shards by position in a fixed shuffle before anything is read, so that a bad record changes no other shard.
While it is being written OUT/.prepare holds a lock, unfinished files and a note on each finished shard.
"""

from pipeline.data.shards.preparing import finish, prepare, write_part
from pipeline.data.shards.reading import ShardSet, Split, upload
from pipeline.data.shards.verifying import Report, verify
