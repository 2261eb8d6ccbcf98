"""Cache of a teacher's outputs on disk: the log-probabilities of its K likeliest tokens at each position of the training rows.

    FOLDER/FINGERPRINT/teacher.json                     teacher, temperature, K and dtype, for people
    FOLDER/FINGERPRINT/rows-DIGEST.safetensors          for each row KEY: KEY.log_p float32 (n, K), KEY.tokens int32 (n, K)

n is the number of positions of the row that predict a token. KEY is a hash of the row's contents, so that runs with other seeds, learning
rates or students share their common rows; the folder's name is a hash of teacher, temperature, K and dtype. Every file is either complete
or absent, so that a stopped run continues with the missing rows. All tokens besides the K count as one outcome
(:func:`regraft.training.losses.divergence_of_top`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regraft.atomic import atomic_file, write_text
from regraft.errors import DataError, OutputError
from regraft.settings import RecoverSettings
from regraft.training.batches import Example, collate
from regraft.training.distill import TEACHER_LOG_P, TEACHER_TOKENS, Readout, Teacher, vocabulary_of
from regraft.training.distributed import process_count, process_index, wait_for_all
from regraft.training.losses import predicting

_ROWS_OF_A_FILE = 64
_BLOCK_VALUES = 1 << 24


def key_of(example: Example) -> str:
    """Returns a hash of a row: its tokens, its predicting positions, and its position ids."""
    found = hashlib.sha256(example.input_ids.numpy().tobytes())
    found.update(predicting(example.labels[None]).numpy().tobytes())
    if example.position_ids is not None:
        found.update(example.position_ids.numpy().tobytes())
    return found.hexdigest()[:24]


@final
class TeacherCache:
    """A folder with a teacher's outputs for rows.

    Args:
        folder: Folder that all runs and processes share.
        teacher: The teacher, not yet released.
        settings: Temperature and K; K is limited to the teacher's vocabulary.
        compute: Dtype of matrix products.
    """

    def __init__(self, folder: Path, teacher: Teacher, settings: RecoverSettings, compute: torch.dtype) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"`teacher_cache` '{folder}' is a file; name a folder")
        self._kept = min(settings.teacher_top_k, vocabulary_of(teacher.present()))
        self._temperature = settings.temperature
        self._compute = compute
        self._facts = {"teacher": teacher.fingerprint, "temperature": self._temperature, "top_k": self._kept, "products": str(compute)}
        name = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / name
        self._places: dict[str, Path] = {}

    def fill(self, teacher: Teacher, rows: Sequence[Example], batch: int, padding: int, say: Callable[[int, int], None]) -> None:
        """Computes the teacher's outputs for all missing rows; several processes share the work.

        Args:
            teacher: The teacher, not yet released, with weights in a dtype that it can compute in.
            rows: Rows in the order of training, perhaps with repetitions.
            batch: Number of rows in one forward pass.
            padding: Padding token of shorter rows.
            say: Called with the number of finished rows and of all rows.

        Raises:
            OutputError: A file cannot be written; existing files remain valid.
            DataError: A file is damaged.
        """
        self._look()
        wanted = {key_of(row): row for row in rows}
        missing = [key for key in wanted if key not in self._places]
        wait_for_all()  # no process may add files while others still list them
        if missing:
            write_text(self.folder / "teacher.json", json.dumps(self._facts, indent=1) + "\n")
        mine = [missing[start : start + _ROWS_OF_A_FILE] for start in range(0, len(missing), _ROWS_OF_A_FILE)]
        done = 0
        readout = Readout(teacher.present(), self._compute)
        for keys in mine[process_index() :: process_count()]:
            tensors: dict[str, Tensor] = {}
            for start in range(0, len(keys), batch):
                part = keys[start : start + batch]
                tensors |= self._asked(teacher, readout, part, [wanted[key] for key in part], padding)
                done += len(part)
                say(done, len(missing))
            with atomic_file(self.folder / f"rows-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors") as partial:
                save_file(tensors, partial)
        wait_for_all()
        self._look()

    def of(self, examples: Iterable[Example]) -> dict[str, Tensor]:
        """Returns the cached tensors of a batch: log-probabilities float32 and tokens int32, (N, K) each, row after row.

        Raises:
            DataError: A file is damaged or missing.
        """
        found = [self._read(key_of(example)) for example in examples]
        return {TEACHER_LOG_P: torch.cat([log_p for log_p, _ in found]), TEACHER_TOKENS: torch.cat([tokens for _, tokens in found])}

    def _asked(self, teacher: Teacher, readout: Readout, keys: Sequence[str], rows: Sequence[Example], padding: int) -> dict[str, Tensor]:
        model = teacher.present()
        batch = {name: value.to(model.device) for name, value in collate(rows, padding).items()}
        chosen_BL = predicting(batch.pop("labels"))
        with torch.no_grad(), torch.autocast(model.device.type, dtype=self._compute, enabled=self._compute != torch.float32):
            last, _ = readout(model, batch, layers=False)
        found: dict[str, Tensor] = {}
        for row, key in enumerate(keys):
            last_nD = last[row][chosen_BL[row]]
            log_p, tokens = [], []
            for part in last_nD.split(max(1, _BLOCK_VALUES // readout.vocabulary)):
                with torch.no_grad():
                    top = torch.log_softmax(readout.logits(part) / self._temperature, dim=-1).topk(self._kept)
                log_p.append(top.values.cpu())
                tokens.append(top.indices.to("cpu", torch.int32))
            found[f"{key}.log_p"], found[f"{key}.tokens"] = torch.cat(log_p), torch.cat(tokens)
        return found

    def _look(self) -> None:
        """Reads the names of the rows in every file."""
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            with _opened(path) as stored:
                self._places |= {name.removesuffix(".log_p"): path for name in stored.keys() if name.endswith(".log_p")}  # noqa: SIM118

    def _read(self, key: str) -> tuple[Tensor, Tensor]:
        path = self._places[key]
        with _opened(path) as stored:
            log_p, tokens = stored.get_tensor(f"{key}.log_p"), stored.get_tensor(f"{key}.tokens")
        if log_p.shape != tokens.shape or log_p.shape[-1] != self._kept:
            raise _damaged(path, f"row {key} has shapes {tuple(log_p.shape)} and {tuple(tokens.shape)}")
        return log_p, tokens


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"the teacher's cache '{path}' is damaged ({reason}); remove that file and go on with `resume`")
