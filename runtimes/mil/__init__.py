"""A reference interpreter of Core ML programs: what a saved package computes, told without a Mac.

Reading: proto (protobuf definitions) -> package (manifest, model) + blob (weight.bin) -> program (plain values).
Running: prepare (checks, constants) -> interpreter, with ops/ (kernels), precision and quirks (modes), trace.
"""

from runtimes.mil.interpreter import Interpreter, State
from runtimes.mil.package import Package
from runtimes.mil.precision import MODES, Mode
from runtimes.mil.trace import Seen, Trace

__all__ = ["MODES", "Interpreter", "Mode", "Package", "Seen", "State", "Trace"]
