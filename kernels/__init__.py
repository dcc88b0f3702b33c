"""Triton kernels of pile_fast, installed as `pile_fast.kernels` (never as a top-level package: transformers imports
Hugging Face's `kernels`)."""

from pile_fast.extras import needs_extra

with needs_extra("gpu"):
    import triton  # noqa: F401
