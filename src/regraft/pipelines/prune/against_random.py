"""The comparison of a pruned model with random removal of the same size: a choice that is no better than chance ends with a warning.

The pruned model, models that lost random units, the same share of every layer, and the dense one, from whose loss harm is counted, read a
few windows of text. A choice is better than chance where it does a tenth less harm than they do on average, and less than each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from regraft.data.own_text import write_own_text
from regraft.data.text import Corpus
from regraft.data.tokens import calibration_windows, context_limit
from regraft.errors import DataError, InputError, ModelError
from regraft.models.load import Loaded, free_bytes, require_tokenizer
from regraft.models.precision import float32_on_cpu
from regraft.pipelines.prune.resolved import layers_in
from regraft.plans import WHOLE, Cut, GroupKind, Groups, PrunePlan, Scores
from regraft.selection import Budget, select
from regraft.selection.budget import best_units
from regraft.surgery.cut import cut

BASELINE = "random"  # whoever asks for the baseline is not warned of it
FEWEST_TOKENS, MOST_TOKENS = 512, 2048  # that each of the models reads
TOKENS_BY_PARAMETERS = 1e11  # over the parameters: as many tokens as take seconds, on 135 M parameters as on 3 M
FEWEST_WINDOWS, MOST_WINDOWS = 4, 16
LONGEST_WINDOW = 256
_OTHER_WINDOWS = 104_729  # added to the seed that drew the calibration windows
OWN_WINDOWS, OWN_TOKENS = 8, 32  # of text that the model writes, where nothing else read any
CLEARLY = 0.9  # share of the harm of chance that a clearly better choice stays below; few windows show no smaller difference
PLAINLY = 0.25  # a choice that stays below this share of the harm of the first draw is not compared with others
DRAWS = 5  # of random removals: on a small model the losses of single draws differ by half a nat
LEAST_HARM_NATS = 0.01  # random removal that does less harm is no measure of anything, as in a model that was never trained
_SURE = 3.0  # standard errors
_FLOAT32_BYTES = 4
_MOST_LOGITS = 1 << 24  # of one forward pass
CutModel = Callable[[PreTrainedModel, Groups, PrunePlan], PreTrainedModel]


def windows_to_judge(loaded: Loaded, seed: int, windows_NT: Tensor | None, corpus: Corpus | None = None) -> Tensor:
    """Returns the windows that choices are judged by, int64 (windows, tokens).

    They are other windows of the calibration text than those that the choice was made on, which flatter it, and longer ones where the model
    is small: heads matter more where there is more to look back at.

    Args:
        loaded: The dense model.
        seed: Seed that drew the calibration windows.
        windows_NT: The calibration windows; None for choices that read no text, which are judged by text that the model writes. There are
            no windows where it cannot write.
        corpus: The calibration text; None where it is not a single one, or is too short: the calibration windows judge then.
    """
    if windows_NT is None:
        return _own_windows(loaded, seed)
    if corpus is None:
        return windows_NT
    limit = min(LONGEST_WINDOW, context_limit(loaded.model.config) or LONGEST_WINDOW)
    tokens = max(windows_NT.shape[1], min(limit, _tokens_to_read(loaded.model) // (2 * FEWEST_WINDOWS)))
    try:
        found = calibration_windows(corpus, require_tokenizer(loaded), _count(loaded.model, tokens), tokens, seed + _OTHER_WINDOWS)
    except DataError:
        return windows_NT
    return found if len(found) >= FEWEST_WINDOWS else windows_NT


def _own_windows(loaded: Loaded, seed: int) -> Tensor:
    limit = context_limit(loaded.model.config)
    tokens = min(OWN_TOKENS, limit) if limit else OWN_TOKENS
    try:
        return write_own_text(loaded.model, loaded.tokenizer, OWN_WINDOWS, tokens, seed).windows_NT
    except ModelError:  # it predicts no numbers
        return torch.zeros(0, tokens, dtype=torch.int64)


@dataclass(frozen=True)
class Chosen:
    """A choice that is compared with chance.

    Attributes:
        model: The dense model; it is left as it is.
        groups: Groups of the dense model.
        plan: What was removed.
        pruned: The pruned model.
        windows_NT: Tokens, int64 (windows, tokens), of which a few are read.
        seed: Seed for the random units.
        cut: What cuts the random model.
    """

    model: PreTrainedModel
    groups: Groups
    plan: PrunePlan
    pruned: PreTrainedModel
    windows_NT: Tensor
    seed: int
    cut: CutModel = cut


def worse_than_random(chosen: Chosen) -> tuple[str, ...]:
    """Returns a warning where a pruned model is not clearly better than one that lost as many parameters in random units of the same kinds.

    The random one is cut and nothing more, so that a warning is never the fault of the re-fit. Nothing is compared where it has no room in
    memory, nor where random removal does no harm that these windows show.
    """
    windows = chosen.windows_NT[: _count(chosen.model, chosen.windows_NT.shape[1])]
    if windows.shape[1] < 2 or len(windows) < 2 or not _has_room(chosen):
        return ()
    dense_W, ours_W = _losses(chosen.model, windows), _losses(chosen.pruned, windows)
    drawn: list[Tensor] = []
    for plan in _chances(chosen):
        drawn.append(_losses(chosen.cut(chosen.model, chosen.groups, plan), windows))
        harm_W = drawn[-1] - dense_W
        if len(drawn) == 1 and _sure(harm_W) and float((ours_W - dense_W).mean()) < PLAINLY * float(harm_W.mean()):
            return ()
    if not drawn:
        return ()
    theirs_W = torch.stack(drawn).mean(dim=0)
    luckiest = min(float(losses_W.mean()) for losses_W in drawn)
    harm_W = theirs_W - dense_W
    harm = float(harm_W.mean())
    if not _sure(harm_W):
        return ()
    ours, theirs, dense = (float(losses_W.mean()) for losses_W in (ours_W, theirs_W, dense_W))
    if ours - dense <= CLEARLY * harm and ours < luckiest:
        return ()
    how = "hardly better than" if ours < theirs else "worse than"
    what = "layers or parts of layers" if _whole(chosen) else "units"
    return (
        f"{how} random removal of the same size: {ours:.3f} nats a token on the text that was read, against {theirs:.3f} where random "
        f"{what} go and {dense:.3f} before; choose another `criterion` or `select`",
    )


def _sure(harm_W: Tensor) -> bool:
    """Returns whether the harm on each window is that of more than chance and more than nothing."""
    return float(harm_W.mean()) > max(LEAST_HARM_NATS, _SURE * float(harm_W.std()) / len(harm_W) ** 0.5)


def _tokens_to_read(model: PreTrainedModel) -> int:
    """Returns how many tokens each of the models reads."""
    return int(min(MOST_TOKENS, max(FEWEST_TOKENS, TOKENS_BY_PARAMETERS / model.num_parameters())))


def _count(model: PreTrainedModel, tokens: int) -> int:
    """Returns how many windows of so many tokens are read."""
    return min(max(_tokens_to_read(model) // max(1, tokens), FEWEST_WINDOWS), MOST_WINDOWS)


def _has_room(chosen: Chosen) -> bool:
    """Returns whether another pruned model fits into memory, in the precision that it is computed in."""
    sizes = [parameter.numel() * max(_FLOAT32_BYTES, parameter.element_size()) for parameter in chosen.pruned.parameters()]
    return 2 * sum(sizes) < free_bytes(chosen.model.device)


def _whole(chosen: Chosen) -> bool:
    named = chosen.groups.named()
    return any(named[entry.group].kind in WHOLE for entry in chosen.plan.cuts)


def _chances(chosen: Chosen) -> Iterator[PrunePlan]:
    """Yields plans that remove as many parameters from the same kinds of groups at random, the same share of every layer."""
    groups, plan = chosen.groups, chosen.plan
    named = groups.named()
    kinds: tuple[GroupKind, ...] = tuple(dict.fromkeys(named[entry.group].kind for entry in plan.cuts))
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(chosen.seed + draw)
        values = {group.name: tuple(torch.rand(group.units, generator=generator).tolist()) for group in groups.groups}
        if "experts" in kinds:
            yield replace(plan, cuts=tuple(Cut(entry.group, best_units(values[entry.group], len(entry.kept))) for entry in plan.cuts))
            continue
        budget = Budget(plan.achieved, plan.shape, _layers(chosen), kinds, plan.align)
        try:
            yield select("uniform", groups, Scores(groups.fingerprint, "random", values), budget)
        except InputError:  # no even share of so few units comes near the ratio
            return


def _layers(chosen: Chosen) -> tuple[int, ...]:
    """Returns the layers that could be cut: those of the plan's settings, or of its cuts where it brings none."""
    named = chosen.groups.named()
    asked = chosen.plan.made_with.get("settings", {}).get("layers")
    if asked is not None:
        return layers_in(str(asked), chosen.groups.layers)
    cuts = {layer for entry in chosen.plan.cuts if (layer := named[entry.group].layer) is not None}
    return tuple(sorted(cuts)) or tuple(range(chosen.groups.layers))


@torch.no_grad()
def _losses(model: PreTrainedModel, windows_WT: Tensor) -> Tensor:
    """Returns the mean loss over each window, float64 (windows,), in nats for each token."""
    at_once = max(1, _MOST_LOGITS // (windows_WT.shape[1] * model.config.get_text_config().vocab_size))
    found: list[Tensor] = []
    with float32_on_cpu(model):
        for ids in windows_WT.to(model.device).split(at_once):
            logits_BTV = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            found.append(functional.cross_entropy(logits_BTV.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(dim=1).cpu())
    return torch.cat(found)
