"""Compress a model by low rank: decompose, choose ranks, factor, save."""

from regraft.pipelines.compress.compress import CompressReport, CompressResult, compress

__all__ = ["CompressReport", "CompressResult", "compress"]
