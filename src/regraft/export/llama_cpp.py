"""llama.cpp as a separate process that serves a GGUF file, with requests over its HTTP routes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from regraft.errors import MissingDependencyError, OutputError

PATIENCE_SECONDS = 600.0
WIDEST = 65_536  # next-token probabilities are asked for in full up to this vocabulary


def require_runtime() -> None:
    """Refuses to go on where llama.cpp is not installed.

    Raises:
        MissingDependencyError: It is not.
    """
    if find_spec("xllamacpp") is None:
        raise MissingDependencyError("xllamacpp", "gguf")


class Runtime:
    """A GGUF file served by llama.cpp on this machine; a context manager.

    Args:
        file: The GGUF file.
        context: Tokens of context; 0 for what the file says.
        threads: Number of processor threads.
        exact: Whether keys, values and attention are computed in float32, for comparisons.

    Raises:
        MissingDependencyError: ``xllamacpp`` is not installed.
        OutputError: On entering: llama.cpp does not load the file; the message holds its own words.
    """

    def __init__(self, file: Path, *, context: int = 0, threads: int = 1, exact: bool = False) -> None:
        require_runtime()
        self.file = file
        self.wanted = {"file": str(file), "context": context, "threads": threads, "exact": exact}
        self.address = ""
        self._letter: int | None = None

    def __enter__(self) -> Runtime:
        # With `-P` the folder of the script is not searched for modules, as ours have the names of packages.
        command = [sys.executable, "-P", str(Path(__file__).with_name("llama_server.py")), json.dumps(self.wanted)]
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:  # llama.cpp may print before the address
                if line.startswith(b'{"address"'):
                    self.address = json.loads(line)["address"]
                    return self
            self._process.wait()
            words = self.last_words()
        except BaseException:  # an interruption while it starts
            self.close()
            raise
        self.close()
        raise OutputError(f"llama.cpp does not load '{self.file.name}': {words}; export without `quantize`, or with `to=hf`")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()

    def last_words(self) -> str:
        """Returns llama.cpp's last error message, in one line."""
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").splitlines()
        telling = [line.strip() for line in lines if any(word in line.lower() for word in ("error", "failed", "assert", "unknown"))]
        return (telling or lines or ["it ended without a word"])[0][:300]

    def ask(self, route: str, question: dict[str, Any]) -> Any:
        """Returns the answer of one HTTP route to a JSON object.

        Raises:
            OutputError: llama.cpp refuses, or has ended.
        """
        request = urllib.request.Request(
            self.address + route, json.dumps(question).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:300]
            raise OutputError(f"llama.cpp refuses {route} for '{self.file.name}': {said}; export with another `to`") from error
        except (OSError, ValueError) as error:
            raise OutputError(f"llama.cpp ended while serving '{self.file.name}': {self.last_words()}; export with another `to`") from error

    def token_ids(self, text: str) -> list[int]:
        """Returns the ids of a text, special tokens read as such, with what the file puts in front."""
        return self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> Tensor:
        """Returns llama.cpp's log-probabilities of the token after a sequence of tokens.

        Args:
            ids: Token ids, at least one.
            vocabulary: Number of tokens in the vocabulary.

        Returns:
            Natural logarithms, (vocabulary,), float64; NaN beyond the likeliest :data:`WIDEST`.
        """
        if self._letter is None:
            self._letter = self.token_ids("a")[-1]
        question = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": min(vocabulary, WIDEST),
            "temperature": 0.0,
            "samplers": [],
            "cache_prompt": True,
            # The probabilities are those before this bias. Nothing is said of a token that ends the text, or of one that is a part of
            # a character, so a plain letter is drawn.
            "logit_bias": [[self._letter, 1000.0]],
            "ignore_eos": True,
        }
        answer = self.ask("/completion", question)
        (step,) = answer["completion_probabilities"]
        found = torch.full((vocabulary,), torch.nan, dtype=torch.float64)
        places = torch.tensor([entry["id"] for entry in step["top_logprobs"]])
        found[places] = torch.tensor([entry["logprob"] for entry in step["top_logprobs"]], dtype=torch.float64)
        return found

    def continuation(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Returns the greedy continuation of a sequence of tokens."""
        question = {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", question)["tokens"]
