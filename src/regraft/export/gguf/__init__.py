"""GGUF, the files of llama.cpp, Ollama, LM Studio and others: one file with weights, tokenizer and chat template."""

from regraft.export.contract import EXPORTERS
from regraft.export.gguf.format import FORMAT

EXPORTERS.add("gguf", FORMAT)
