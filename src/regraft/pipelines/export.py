"""Export a model or an adapter in the form of another program."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.adapters.peft_backed import layers_of, merge_stock, module_names, retrained_tokens, stock_factors, trained_whole
from regraft.atomic import atomic_folder, reserved
from regraft.errors import InputError, ModelError, OutputError
from regraft.export import EXPORTERS, AdapterFormat, Exportable, ModelFormat, Parity
from regraft.in_short import in_short
from regraft.models.card import model_card
from regraft.models.classifier import classes_of, head_parameters, is_classifier, save_classifier
from regraft.models.folder import write_folder
from regraft.models.live import ModelLike, fitting_tokenizer, lineage, place_of, plain, resting, take
from regraft.models.load import Loaded, locate_by
from regraft.models.provenance import parents_of, versions
from regraft.models.save import save
from regraft.models.view import fingerprint
from regraft.models.weights import stored_tensors
from regraft.pipelines.export_model import export_loaded, to_compare
from regraft.pipelines.export_streamed import export_streamed, why_not_compared
from regraft.pipelines.proved import prove_adapter, prove_model, text_ids
from regraft.pipelines.results import upload
from regraft.pipelines.texts import Texts
from regraft.plans import Provenance
from regraft.reading import read_object
from regraft.settings import ExportSettings, LoadSettings, takes_settings, with_keywords
from regraft.surgery.adapted import adapted_modules
from regraft.surgery.adapter_files import is_master, read_master
from regraft.surgery.adapter_folder import attached, base_record, is_adapter, load_adapted, load_master, named_base
from regraft.surgery.adapters import factors, merge
from regraft.surgery.probe import Probe, probe, refuse_other

MERGED = "merged"  # a format of its own: no adapter any more, so that every method has it


@dataclass(frozen=True, repr=False)
class ExportResult:
    """Result of an export.

    Attributes:
        words: What was written, in a few words.
        modules: Number of modules that the adapter changes.
        rank: Largest rank of their changes; 0 where the adapter was merged.
        notes: What the user should know, as sentences without a full stop.
        parity: Comparison of a model in its runtime; None for an adapter, or where no comparison was made.
        folder: The folder that was written.
    """

    words: str
    modules: int = 0
    rank: int = 0
    notes: tuple[str, ...] = ()
    parity: Parity | None = None
    folder: Path | None = None

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None) -> str:
        """Commits the folder that was written to a repository on the Hugging Face hub; the arguments are those of :func:`upload`.

        Raises:
            OutputError: The folder is gone, the hub cannot be reached, or it refuses.
        """
        if self.folder is None or not self.folder.is_dir():
            raise OutputError(f"there is no folder '{self.folder}' any more; export again")
        return upload(self.folder, repo_id, private=private, token=token, revision=revision)

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)


@takes_settings(ExportSettings, LoadSettings)
def export(
    model: ModelLike | PeftModel,
    output: str | Path,
    to: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: ExportSettings | None = None,
    load: LoadSettings | None = None,
    check: Texts | None = "",
    command: str = "regraft.export",
    **keywords: Any,
) -> ExportResult:
    """Writes a model or an adapter in a form that other programs read, and compares a model in its runtime.

    Args:
        model: A model folder, hub id or GGUF file; a model in memory, which is left as it is; or a ``PeftModel`` or the folder of an
            adapter, which is folded into its base where the format is one of whole models.
        output: A folder to write.
        to: Name of the format; ``merged`` for an adapter: the model with it folded in.
        tokenizer: The tokenizer for a model in memory; for a folder, a replacement for the folder's own.
        settings: How it is written.
        load: How the model, or the adapter's base, is loaded.
        check: Text of the comparison: a file, the text itself, texts or a data set as for other calls, or empty for text that the
            model writes (for seedling the built-in text), where the model fits into memory; None for no comparison. Without one, GGUF and
            ``hf`` are written from a folder tensor by tensor, and the model is never in memory.
        command: How this was called, for the record.
        **keywords: Single settings by name, such as ``quantize="Q8_0"``; they count before those in ``settings`` and ``load``.

    Raises:
        InputError: The format is not known, or cannot hold the model; the message says what can.
        ModelError: The model, the adapter or its base is missing or damaged.
        OutputError: The output exists or cannot be written, or the exported model computes something else.
    """
    options, loading = with_keywords(command, keywords, settings or ExportSettings(), load or LoadSettings())
    form = EXPORTERS.get(to) if to != MERGED else None
    output, place = Path(output), place_of(model)
    check = to_compare(check)
    if not isinstance(form, ModelFormat):
        _refuse_settings_of_models(options, check, to)
        match model:
            case PeftModel():
                return _of_live_adapter(model, output, to, tokenizer, loading, command)
            case str() | Path():
                return export_adapter(model, output, to, load=loading, command=command)
            case _:
                raise InputError(f"'{to}' is a form of adapters, not of a model in memory; give a PeftModel or the folder of an adapter")
    with reserved(output):
        given = _folded_live(model, tokenizer)[0] if isinstance(model, PeftModel) else model
        if place is not None and is_adapter(place):
            given = _folded(Path(place), loading)[0]
        elif (
            place is not None
            and _is_streamed(form, tokenizer, options, check)
            and not _needs_memory(form, folder := locate_by(place, loading))
        ):
            why = why_not_compared(folder, loading) if check is not None else ""
            if check is None or why:
                done = export_streamed(folder, output, to, form, options, loading, source=str(model), command=command)
                return ExportResult(done.words, notes=(*done.notes, *((why,) if why else ())), folder=output)
        loaded = take(given, tokenizer, loading)
        with resting(loaded.model):
            done = export_loaded(loaded, output, to, form, options, check=check, command=command)
    return ExportResult(done.words, notes=done.notes, parity=done.parity, folder=output)


def _is_streamed(form: ModelFormat, tokenizer: PreTrainedTokenizerBase | None, settings: ExportSettings, check: str | None) -> bool:
    """Returns whether a format may be written tensor by tensor, without the model in memory."""
    return form.stream is not None and tokenizer is None and settings.importance is None and not check


def _needs_memory(form: ModelFormat, folder: Path) -> bool:
    """Returns whether a folder is not written tensor by tensor: it stores two factors, or the format fills its layers up."""
    if not form.streams_uneven and str(read_object(folder / "config.json", ModelError).get("model_type")).startswith("regraft_"):
        return True
    return any(name.endswith(".expand.weight") for name in stored_tensors(folder))


def _refuse_settings_of_models(settings: ExportSettings, check: str | None, to: str) -> None:
    """Refuses settings that say how a whole model is written or compared, where an adapter is written or folded in.

    Raises:
        InputError: One is given.
    """
    given = [*settings.model_dump(exclude_defaults=True), *(["check"] if check else [])]
    if given:
        whole = ", ".join(name for name in EXPORTERS if isinstance(EXPORTERS.get(name), ModelFormat))
        raise InputError(f"`{given[0]}` is for formats of whole models, not for '{to}'; leave it out, or export with one of them: {whole}")


def export_adapter(
    source: str | Path,
    output: str | Path,
    to: str = "peft-lora",
    *,
    load: LoadSettings | None = None,
    command: str = "regraft.export",
) -> ExportResult:
    """Writes an adapter in a form that other programs read.

    Args:
        source: The folder of an adapter, ours or PEFT's; its base is loaded with it.
        output: A folder to write.
        to: Name of the format, or ``merged``: the model with the adapter folded in.
        load: How the base is loaded.
        command: How this was called, for the folder's record.

    Raises:
        InputError: The format is not known, or the adapter has no such form; the message offers the merge.
        ModelError: The adapter or its base is missing or damaged, or they do not fit.
        OutputError: The output exists or cannot be written.
    """
    folder, output = Path(source), Path(output)
    form = EXPORTERS.get(to) if to != MERGED else None
    with reserved(output):
        if not is_adapter(folder):
            raise ModelError(
                f"'{folder}' holds no adapter (neither adapter.json nor adapter_config.json), and '{to}' is a form of adapters; "
                "give the folder of one, or export a model with `to=hf` or `to=gguf`"
            )
        if not isinstance(form, AdapterFormat):
            return _merged(folder, output, load or LoadSettings(), command)
        return _factored(folder, output, form, to, load or LoadSettings(), command)


def _factored(folder: Path, output: Path, form: AdapterFormat, to: str, settings: LoadSettings, command: str) -> ExportResult:
    """Writes the factors of an adapter."""
    base, adapted, adapter = _exportable(folder, settings)
    classes = {"classes": list(classes_of(adapter.model))} if is_classifier(adapter.model) else {}
    trained = probe(adapted, texts=text_ids(base.tokenizer))
    with atomic_folder(output) as partial:
        words = form.write(adapter, partial)
        provenance = Provenance(
            command=command,
            source=str(folder),
            source_fingerprint=fingerprint(adapted),
            seed=0,
            versions=versions(),
            settings={"to": to, "base": base_record(adapter.base, base, output), **classes},
            parents=parents_of(base.provenance),
        )
        write_folder(partial, provenance, None)
        prove_adapter(partial, base, trained, settings)
    rank = max(factor.right.shape[0] for factor in adapter.factors.values())
    return ExportResult(words, len(adapter.factors), rank, folder=output)


def _of_live_adapter(
    adapted: PeftModel, output: Path, to: str, tokenizer: PreTrainedTokenizerBase | None, settings: LoadSettings, command: str
) -> ExportResult:
    """Writes the adapter of a model in memory, or that model with the adapter folded in."""
    if to == MERGED:
        with reserved(output):
            return _saved(*_folded_live(adapted, tokenizer), output, settings, command)
    named = adapted.active_peft_config.base_model_name_or_path
    if not named:
        raise InputError(
            f"'{to}' names the base of the adapter, which is in memory alone; save the base, load it from there, and adapt that"
        )
    with TemporaryDirectory(prefix="regraft-") as folder:
        adapted.save_pretrained(folder)
        return export_adapter(folder, output, to, load=settings, command=command)


def _folded_live(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Loaded, int, Probe]:
    """Returns a copy of a model in memory with its adapter in its weights, how many modules that changed, and what was computed before.

    Raises:
        OutputError: The model computes something else with the adapter in its weights.
    """
    base = plain(adapted)
    found, fitting = lineage(base), fitting_tokenizer(tokenizer, base)
    with resting(adapted):
        model, count, trained = _merged_stock(copy.deepcopy(adapted), fitting)
    _refuse_unlike(trained, model, "the adapter")
    return Loaded(model, fitting, found.source, fingerprint(model), found.provenance), count, trained


def _merged_stock(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[PreTrainedModel, int, Probe]:
    """Folds an adapter of PEFT in; returns the model, how many modules that changed, and what was computed before."""
    count, trained = sum(1 for _ in layers_of(adapted)), probe(adapted, retrained_tokens(adapted), text_ids(tokenizer))
    return merge_stock(adapted), count, trained


def _refuse_unlike(trained: Probe, model: PreTrainedModel, adapter: str) -> None:
    refuse_other(trained, model, f"{adapter}, folded in,", "keep it beside its base, and report this: it is a fault of ours")


def _merged(folder: Path, output: Path, settings: LoadSettings, command: str) -> ExportResult:
    """Folds an adapter into its base and saves a model folder."""
    loaded, count, trained = _folded(folder, settings)
    return _saved(replace(loaded, source=str(folder)), count, trained, output, settings, command)


def _saved(loaded: Loaded, count: int, trained: Probe, output: Path, settings: LoadSettings, command: str) -> ExportResult:
    """Saves a model that an adapter was folded into, and compares it with what was trained."""
    model = loaded.model
    provenance = Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=0,
        versions=versions(),
        settings={"to": MERGED},
        parents=parents_of(loaded.provenance),
    )
    keep = save_classifier if is_classifier(model) else save
    with atomic_folder(output) as partial:
        keep(model, loaded.tokenizer, partial, provenance, model_card(provenance))
        prove_model(partial, model, trained, settings)
    return ExportResult("the model with the adapter in its weights", count, 0, folder=output)


def _folded(folder: Path, settings: LoadSettings) -> tuple[Loaded, int, Probe]:
    """Returns the base of an adapter with the adapter in its weights, how many modules that changed, and what was computed before.

    Raises:
        OutputError: The model computes something else with the adapter in its weights.
    """
    if is_master(folder):
        loaded, injected = load_master(folder, settings)
        count, trained = len(adapted_modules(loaded.model)), probe(loaded.model, texts=text_ids(loaded.tokenizer))
        model = merge(injected)
    else:
        loaded = load_adapted(folder, settings)
        model, count, trained = _merged_stock(cast(PeftModel, loaded.model), loaded.tokenizer)
    _refuse_unlike(trained, model, f"the adapter '{folder}'")
    return replace(loaded, model=model), count, trained


def _exportable(folder: Path, settings: LoadSettings) -> tuple[Loaded, nn.Module, Exportable]:
    """Loads an adapter on its base; returns the base, the model with the adapter, and its factors."""
    if is_master(folder):
        loaded, injected = load_master(folder, settings)
        places = adapted_modules(loaded.model)
        modules: dict[str, nn.Module] = {name: place.base for name, place in places.items()}
        inside = {id(part) for place in places.values() for part in (place.base, place.deltas, *place.deltas.modules())}
        names = tuple(name for name, module in loaded.model.named_modules() if id(module) not in inside)
        head = dict(head_parameters(loaded.model))
        return loaded, loaded.model, Exportable(loaded.model, read_master(folder).base, factors(injected), modules, names, head)
    loaded, model = attached(folder, settings)
    adapted = cast(PeftModel, model)
    modules = {name: layer.get_base_layer() for name, layer in layers_of(adapted)}
    plain = cast(PreTrainedModel, adapted.get_base_model())
    base, head = named_base(folder), trained_whole(adapted)
    return loaded, model, Exportable(plain, base, stock_factors(adapted), modules, module_names(adapted), head)
