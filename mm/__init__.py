"""Multimodal pre-training: encoders, tokenizers, packing and token-weighted losses around one language model."""

__version__ = "0.1.0"
