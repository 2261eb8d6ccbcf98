"""Loading of a model folder's tokenizer so that it behaves as its file specifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from regraft.errors import ModelError, shown
from regraft.models.quiet import in_one_line, quiet
from regraft.reading import check_text

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
# A text on which tokenizers differ: spaces, runs of spaces, line ends, capitals, digits, contractions, accents, scripts, code, symbols.
PROBE = (
    "The 3 quick  foxes didn't\n\n\tjump 12345.67 times; HELLO world-wide!  \r\n"
    "def f(x):\n    return x**2  # naïve café Ⅻ ﬁ\n日本語 Привет مرحبا 🙂 <s> [INST] e\u0301 \u00a0 end "
)


def load_tokenizer(folder: Path, rows: int, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a model folder, or None if the folder has none.

    AutoTokenizer chooses the class by the model's family, and that class may build its own text splitting instead of reading
    ``tokenizer.json``. If the two encode a probe differently, or only the class adds tokens beyond the embedding, the file is used
    directly: the model was trained with it, and other runtimes read it.

    Args:
        folder: Folder of the model.
        rows: Number of rows of the embedding.
        trust_remote_code: Whether code in the folder may run.

    Raises:
        ModelError: The tokenizer cannot be loaded, or has ids beyond the rows of the embedding.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    try:
        with quiet():
            settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **settings)
            file = folder / "tokenizer.json"
            if file.is_file() and (largest_id(tokenizer) >= rows or not _does_what_its_file_says(tokenizer, file)):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), **settings)
    except Exception as error:  # tokenizers raises plain Exception
        check_text(str(folder), f"the name of the folder '{shown(folder)}'", ModelError)  # tokenizers opens no other names
        reason = in_one_line(error)
        raise ModelError(f"the tokenizer of '{folder}' cannot be loaded: {reason}; copy its tokenizer files again") from error
    if largest_id(tokenizer) >= rows:
        raise ModelError(
            f"'{folder}': the tokenizer has ids up to {largest_id(tokenizer)}, the embedding has {rows} rows; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest token id, added tokens included; -1 for an empty vocabulary."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _does_what_its_file_says(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    stored = Tokenizer.from_file(str(file))
    stored.no_truncation()
    stored.no_padding()
    return stored.encode(PROBE, add_special_tokens=False).ids == tokenizer.encode(PROBE, add_special_tokens=False)
