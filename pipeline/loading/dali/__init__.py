"""DALI's only home: decoding (`decoder`), the loader made of it (`loader`), and DALI alone (`alone`)."""

from pipeline.loading.dali.alone import dali_alone
from pipeline.loading.dali.loader import DaliLoader, open_loader
