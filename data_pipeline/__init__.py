"""Raw data in, training rows out: preparation, the stream of rows, and the loader; usable without a sibling.

Importing this package imports numpy, pydantic and xxhash, and nothing heavier.
"""

from data_pipeline.build import PrepareReport, prepare
from data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig, WorkersConfig
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError, DataConfigurationError, DataError
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import RowAddress
from data_pipeline.rows import RowBatch, rows_digest
from data_pipeline.stream import HeldOutRows, Stream
from data_pipeline.tokenizer import Piece, Tokenizer, train_tokenizer

__all__ = [
    "DamagedDataError",
    "DataConfig",
    "DataConfigurationError",
    "DataError",
    "Dataset",
    "HeldOutRows",
    "Loader",
    "Manifest",
    "Piece",
    "PrepareConfig",
    "PrepareReport",
    "RowAddress",
    "RowBatch",
    "SourceConfig",
    "Stream",
    "Tokenizer",
    "TokenizerConfig",
    "WorkersConfig",
    "prepare",
    "rows_digest",
    "train_tokenizer",
]
