"""Checkpoints whose weights are packed already, read as packed weights of a graph.

compressed-tensors   integers, FP8, NVFP4, MXFP8 and MXFP4, and how inputs are rounded (compressed.py)
bitsandbytes         NF4, FP4, and the integers of LLM.int8() (bitsandbytes.py)
gptq, awq            integers with zero points (gptq.py)
fp8, mxfp8           FP8 in blocks and MXFP8, as transformers writes them itself (fp8.py)

The bytes stay what they are: no weight is unpacked and rounded again.
"""

from graph.prequantized.base import Held as Held
from graph.prequantized.base import Inputs as Inputs
from graph.prequantized.base import find as find
from graph.prequantized.put import put as put
