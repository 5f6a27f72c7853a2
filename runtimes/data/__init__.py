"""Text for training and evaluation: from files and data sets to rows of tokens that depend on nothing but a seed."""

from runtimes.data.batches import Batch as Batch
from runtimes.data.batches import Rows as Rows
from runtimes.data.corpus import Corpus as Corpus
from runtimes.data.sources import Document as Document
