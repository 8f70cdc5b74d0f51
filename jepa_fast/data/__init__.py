"""Data: sources of images with captions and labels, and the loader that makes batches of them.

source = load_in_memory(ShardSource("cifar10/train-*.tar"))
loader = Loader(source, 128, train=True, transform=Transform(32, flip=0.5))
for batch in loader: ...
"""

from __future__ import annotations

from jepa_fast.data.batch import Batch, Sample
from jepa_fast.data.digits import DigitScenes
from jepa_fast.data.images import CocoCaptions, ImageFolder
from jepa_fast.data.loader import Loader
from jepa_fast.data.shards import ShardSource
from jepa_fast.data.skips import CorruptSample
from jepa_fast.data.sources import MemorySource, load_in_memory
from jepa_fast.data.text import HashedWords, TextBatch, sample_captions
from jepa_fast.data.transforms import Transform

__all__ = [
    "Batch",
    "CocoCaptions",
    "CorruptSample",
    "DigitScenes",
    "HashedWords",
    "ImageFolder",
    "Loader",
    "MemorySource",
    "Sample",
    "ShardSource",
    "TextBatch",
    "Transform",
    "load_in_memory",
    "sample_captions",
]
