"""DALI's only home: decoding (`decoder`), the loaders made of it (`loader`, `sequential`), and DALI alone (`bare`)."""

from pipeline.dali_loader.bare import bare_pipeline
from pipeline.dali_loader.loader import DaliLoader, open_loader

__all__ = ["DaliLoader", "bare_pipeline", "open_loader"]
