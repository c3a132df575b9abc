"""DALI's only home: decoding (`decoder`), the loaders made of it (`loader`, `sequential`), and DALI alone (`bare`)."""

from pipeline.loading.dali.bare import bare_pipeline
from pipeline.loading.dali.loader import DaliLoader, open_loader

__all__ = ["DaliLoader", "bare_pipeline", "open_loader"]
