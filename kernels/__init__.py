"""Triton kernels of pile_fast, installed as `pile_fast.kernels` (never as a top-level package: transformers imports
Hugging Face's `kernels`)."""
