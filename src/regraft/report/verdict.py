"""What a run came to, in words: the verdict, the worst text, and what did not help."""

from __future__ import annotations

from regraft.errors import shown
from regraft.plans import Measurement
from regraft.report.summary import RunReport, scaled, won_back


def verdict(report: RunReport) -> str:
    """Returns the result of a run in one sentence."""
    held = [point.held_out_nats for point in report.curve if point.held_out_nats is not None]
    if held and not report.measurements:
        lost = f"The held-out loss went from {held[0]:.3f} to {min(held):.3f} {report.unit}"
        return f"{lost} in {report.curve[-1].step} steps of training, of which step {report.best_step} was kept."
    won = won_back(report.measurements)
    if len(report.measurements) > 1:
        first, last = report.measurements[0], report.measurements[-1]
        removed = 1 - last.size.parameters / first.size.parameters
        change = last.loss.loss_nats - first.loss.loss_nats
        size = f"{removed:.1%} of the parameters are gone" if removed > 0 else "The model has as many parameters as before"
        loss = f"the loss went from {first.loss.loss_nats:.3f} to {last.loss.loss_nats:.3f} nats a token ({change:+.3f})"
        return f"{size}, and {loss}" + (f"; {won.sentence()}." if won is not None else ".")
    if report.factors is not None:
        return f"{report.factors.achieved:.1%} of the stored parameters are gone: {len(report.factors.factorings)} layers are factored."
    if report.plan is not None:
        before, after = report.plan.parameters_before, report.plan.parameters_after
        return f"{report.plan.achieved:.1%} of the parameters are gone: {scaled(before, '')} to {scaled(after, '')}."
    if report.ranks is not None:
        return f"{report.ranks.verdict[:1].upper()}{report.ranks.verdict[1:]}."
    if report.rank_plan is not None:
        return f"{scaled(report.rank_plan.trainable_parameters, '')} parameters were trained."
    return "One model was measured." if report.measurements else "Nothing was measured."


def worst_text(report: RunReport) -> str:
    """Returns on which of several texts the last model is worst, and on which it lost most; empty without several texts."""
    if not report.tasks or report.tasks[-1].worst is None:
        return ""
    first, last = report.tasks[0], report.tasks[-1]
    worst = last.worst
    assert worst is not None
    said = f"Worst text of {last.label}: {worst.text}, {worst.bits_per_byte:.3f} bits per byte at window {worst.window_tokens}."
    if len(report.tasks) > 1:
        changes = [(after.loss_nats - before.loss_nats, after) for before, after in zip(first.losses, last.losses, strict=True)]
        change, most = max(changes, key=lambda pair: pair[0])
        said += f" Most was lost on {most.text}, window {most.window_tokens}: {change:+.3f} nats a token."
    return said


def did_not_help(report: RunReport) -> list[str]:
    """Returns what was tried and did not help, one sentence each, as far as the measurements show it."""
    found: list[str] = []
    won = won_back(report.measurements)
    if won is not None and won.gain_nats <= 0:
        found.append(f"Recovery did not lower the loss ({won.gain_nats:+.4f} nats).")
    if len(report.measurements) > 1:
        found += _slower(report.measurements[0], report.measurements[-1])
    search = report.ranks
    if search is not None and search.confirmation is not None:
        confirmation = search.confirmation
        for finalist in confirmation.finalists:
            if finalist.low_nats <= 0:
                ranks = shown(" ".join(map(str, finalist.ranks)), 60)
                found.append(
                    f"Ranks {ranks} were not confirmed against one rank for all: gain {finalist.mean_nats:+.4f} nats, "
                    f"interval {finalist.low_nats:+.4f} to {finalist.high_nats:+.4f}."
                )
    if len(report.tasks) > 1:
        found += _lower_scores(report)
    return found


def _slower(first: Measurement, last: Measurement) -> list[str]:
    if first.speed is None or last.speed is None:
        return []
    pairs = (
        ("Decoding", first.speed.decode_seconds_per_token, last.speed.decode_seconds_per_token),
        ("The prefill", first.speed.prefill_seconds, last.speed.prefill_seconds),
    )
    return [
        f"{what} is not faster: {1e3 * before:.2f} ms before, {1e3 * after:.2f} ms after."
        for what, before, after in pairs
        if after >= before
    ]


def _lower_scores(report: RunReport) -> list[str]:
    """Returns the scores in which the last model is worse than the first by more than two standard errors of the difference."""
    found: list[str] = []
    for before, after in zip(report.tasks[0].scores, report.tasks[-1].scores, strict=True):
        sign = 1 if after.higher_is_better else -1
        if before.stderr is None or after.stderr is None:
            continue
        if sign * (before.value - after.value) > 2 * (before.stderr**2 + after.stderr**2) ** 0.5:
            found.append(
                f"{report.tasks[-1].label} is worse in {after.task}, {after.metric}: {before.value:.3f} before, {after.value:.3f} after."
            )
    return found
