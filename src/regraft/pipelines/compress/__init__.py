"""Compress a model by low rank: decompose, choose ranks, factor, save."""

from regraft.pipelines.compress.compress import CompressResult, compress

__all__ = ["CompressResult", "compress"]
