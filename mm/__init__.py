"""Multimodal pre-training: encoders and tokenizers, packing, experts and token-weighted losses around one language model."""

__version__ = "0.1.0"
