"""Where the residual stream is, class by class. A layer that is not listed here is refused, never guessed.

``known`` lists the decoder-layer classes that were read, ``refused`` the models that cannot be read and why,
``stack`` finds the layers of a loaded model.
"""

from __future__ import annotations

from serving.engine.layers.convention import Convention, LayerClass, LayerError, source_digest
from serving.engine.layers.known import KNOWN
from serving.engine.layers.stack import Stack, decoder_stack, require_architecture, supported_architectures

__all__ = [
    "KNOWN",
    "Convention",
    "LayerClass",
    "LayerError",
    "Stack",
    "decoder_stack",
    "require_architecture",
    "source_digest",
    "supported_architectures",
]
