"""Does an export compute what its graph computes? An independent reader loads it in a fresh process and tells.

weights    exports of weights: transformers reads them
joint      exports of two models: transformers reads both, and modules of the reader's own what is between them
serving    exports for GPU servers: transformers reads them, and unpacks and rounds as their libraries do
gguf       GGUF files: transformers unpacks them with the package of that name
bitnet     ternary weights in BitNet's packing: transformers reads them, and rounds their tokens
ternary    ternary exports: their integers are read for themselves, their floats by transformers
packages   Core ML packages: the interpreter of runtimes/mil reads them
onnx       ONNX models: ONNX Runtime reads them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graph import Graph, QcError
from graph.joint import is_joint
from runtimes.serving.settings import TARGETS as SERVING
from runtimes.verify.findings import Finding, Report, read_about

__all__ = ["Finding", "Report", "verify"]


def verify(folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0) -> Report:
    """Check the export in ``folder`` against the ``graph`` it was made of; it may lie on disk still.

    ``tokenizer`` is that of the model, to compare the export's with; without it, the export's must agree with itself.
    ``timeout`` in seconds is for the process that reads the export.
    """
    target = read_about(folder)["target"]
    if target == "bitnet":
        from runtimes.verify.bitnet import verify_bitnet

        return verify_bitnet(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target == "ternary":
        from runtimes.verify.ternary import verify_ternary

        return verify_ternary(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target == "safetensors" and is_joint(graph):
        from runtimes.verify.joint import verify_joint

        return verify_joint(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target == "gguf":
        from runtimes.verify.gguf import verify_gguf

        return verify_gguf(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target == "safetensors":
        from runtimes.verify.weights import verify_weights

        return verify_weights(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target == "ane":
        from runtimes.verify.packages import verify_packages

        return verify_packages(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target in SERVING:
        from runtimes.verify.serving import verify_serving

        return verify_serving(folder, graph, tokenizer=tokenizer, timeout=timeout)
    if target == "onnx":
        from runtimes.verify.onnx import verify_onnx

        return verify_onnx(folder, graph, tokenizer=tokenizer, timeout=timeout)
    raise QcError(f"{folder} is written for {target!r}, which is not known", fix="verify it with the qc that wrote it")
