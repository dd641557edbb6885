"""The text of a dry run: what each stage reads, writes and costs."""

from collections import Counter
from dataclasses import dataclass, field

from minima.planning.arithmetic import TrainingPlan


@dataclass
class StagePreview:
    """What a dry run says about one stage."""

    name: str
    kind: str
    state: str  # `finished`, `half-finished`, `not begun`
    reads: list[str] = field(default_factory=list)  # its inputs, each with what is known about it
    writes: str = ""  # its folder and what it leaves there
    # pairs of a short label and a line: shapes, tokens, steps, FLOPs
    facts: list[tuple[str, str]] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)  # lines of a memory table
    notes: list[str] = field(default_factory=list)  # what is not known yet, and why
    missing: list[str] = field(default_factory=list)  # inputs that are not on this machine
    refused: list[str] = field(default_factory=list)  # why the run would stop at this stage
    unplaced: str = ""  # why its teacher's placement is impossible on one machine of the planned ranks


def training_facts(plan: TrainingPlan, ranks: int, micro_batch_sequences: int) -> list[tuple[str, str]]:
    """The lines about tokens, steps and the batch of a training stage."""
    batch_tokens = plan.batch_sequences * plan.sequence_length
    accumulation = plan.batch_sequences // (micro_batch_sequences * ranks)
    facts = [
        ("tokens", f"{plan.tokens:,} in {plan.sequences:,} sequences of {plan.sequence_length:,}"),
        ("steps", f"{plan.steps:,} of {plan.batch_sequences:,} sequences ({batch_tokens:,} tokens); "
                  f"warm-up {plan.warmup_steps:,} steps"),
        ("batch", f"{ranks} ranks x {micro_batch_sequences} sequences x {accumulation} micro-batches"),
    ]  # fmt: skip
    if plan.masked_sequences and plan.steps:
        line = f"{plan.last_step_sequences:,} whole sequences, filled with {plan.masked_sequences:,} fully masked ones"
        facts.append(("last step", line))
    if plan.leftover_tokens:
        facts.append(("left over", f"{plan.leftover_tokens:,} tokens: less than a block, so not trained on"))
    return facts


def render(recipe_yaml: str, previews: list[StagePreview]) -> str:
    """The whole text of a dry run."""
    lines = ["# the resolved recipe", recipe_yaml.rstrip(), "", "# what would run"]
    for preview in previews:
        lines.append(f"{preview.name} ({preview.kind}): {preview.state}")
        lines += [f"  {'reads':<10} {text}" for text in preview.reads]
        lines.append(f"  {'writes':<10} {preview.writes}")
        lines += [f"  {label:<10} {text}" for label, text in preview.facts]
        lines += [f"  {'' if number else 'memory':<10} {text}" for number, text in enumerate(preview.memory)]
        lines += [f"  {'note':<10} {text}" for text in [*preview.missing, *preview.refused, *preview.notes]]
    return "\n".join([*lines, "", *_in_short(previews)])


def _in_short(previews: list[StagePreview]) -> list[str]:
    """The last lines: how many stages are in which state, and what stands in the way of the others."""
    states = Counter(preview.state for preview in previews)
    lines = ["# in short", "stages: " + ", ".join(f"{n} {state}" for state, n in states.items())]
    to_run = [preview for preview in previews if preview.state != "finished"]
    refused = [f"  {preview.name}: {text}" for preview in previews for text in preview.refused]
    missing = [f"  {preview.name}: {text}" for preview in to_run for text in preview.missing]
    lines += ["the run would be refused", *refused] if refused else []
    lines += ["missing here", *missing] if missing else []
    return lines
