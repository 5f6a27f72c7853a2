"""Questions whose answers stand in chunks beside them: made up by a seed, batched, and scored."""

from runtimes.retrieval.example import Asked as Asked
from runtimes.retrieval.example import Example as Example
from runtimes.retrieval.questions import AskedBatch as AskedBatch
from runtimes.retrieval.questions import Questions as Questions
