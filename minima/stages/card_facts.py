"""What a model card tells, gathered from the recipe and from the stages' manifests. No torch."""

import logging
from typing import Any

from minima.models.shape import ModelShape
from minima.recipe.schema import AnyStage, BuildData, Evaluate, Export, ModelInput, Prune
from minima.report.cards import Card
from minima.stages.context import ResolvedModel, StageContext
from minima.stages.manifest import is_finished, read_manifest

logger = logging.getLogger(__name__)
_CHECKS = {
    "zero3": "its logits, loaded into sharded hosts, with the trained model's",
    "transformers": "its logits, as plain transformers loads it, with the trained model's",
}


def gather_card(
    context: StageContext, model: ResolvedModel, config: dict[str, Any], metrics: dict[str, Any], chat_template: bool
) -> Card:
    """The facts of one export.

    Args:
        context: of the export stage.
        model: what is exported.
        config: content of its config.json.
        metrics: what the export measured: parameters, dtype and the checks.
        chat_template: whether its tokenizer has one.
    """
    stage = context.stage
    assert isinstance(stage, Export)
    shape = ModelShape.from_config(config)
    stages = lineage(context, stage.model)
    return Card(
        name=stage.name,
        recipe=context.recipe.name,
        family=shape.family,
        parameters=metrics["parameters"],
        dtype=metrics["dtype"],
        shape={
            "vocabulary": shape.vocabulary_size,
            "width": shape.hidden_size,
            "layers": shape.num_layers,
            "query heads": shape.num_heads,
            "key-value heads": shape.num_key_value_heads,
            "neurons of one MLP": shape.intermediate_size,
        },
        stages=[(made.name, made.kind, _settings(made)) for made in stages],
        data=_data(context, stages),
        tokens=_tokens(context, stages, model.step),
        scores=_scores(context, stage.model),
        max_positions=shape.max_positions,
        licence=stage.licence,
        chat_template=chat_template,
        checked=["every tensor's bytes with the trained one, by SHA-256"]
        + [
            f"{_CHECKS[how]}: largest difference {metrics['max_logit_difference']:.2g}" for how in metrics["checked_by"]
        ],
    )


def lineage(context: StageContext, name: str) -> list[AnyStage]:
    """The stages of the recipe that a model came through, the first one first."""
    by_name = {stage.name: stage for stage in context.recipe.stages}
    found: list[AnyStage] = []
    reference: str | None = name
    while reference is not None:
        stage = by_name.get(reference) or by_name.get(reference.rpartition("@")[0])
        if stage is None or stage in found:
            break
        found.append(stage)
        source = getattr(stage, "model", None)
        reference = source.source if isinstance(source, ModelInput) else source
    return found[::-1]


def _settings(stage: AnyStage) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude_unset=True, exclude={"name", "kind"})


def _data(context: StageContext, stages: list[AnyStage]) -> list[str]:
    lines: list[str] = []
    for stage in stages:
        reference = getattr(stage, "data", None)
        if reference is None:
            continue
        built = next((other for other in context.recipe.stages if other.name == reference), None)
        if not isinstance(built, BuildData):
            lines.append(f"`{reference}`")
            continue
        for source in built.sources:
            weight = "" if source.weight is None else f", weight {source.weight:g}"
            lines.append(f"{source.label} (stage `{built.name}`{weight})")
    return list(dict.fromkeys(lines))


def _tokens(context: StageContext, stages: list[AnyStage], step: int | None) -> int | None:
    last = stages[-1] if stages else None
    if last is None or isinstance(last, BuildData | Prune | Evaluate | Export):
        return None
    if step is None:
        tokens = (read_manifest(context.run_folder / last.name).get("metrics") or {}).get("tokens")
        return None if tokens is None else int(tokens)
    data = next((stage for stage in context.recipe.stages if stage.name == last.data), None)
    return step * last.batch_sequences * data.sequence_length if isinstance(data, BuildData) else None


def _scores(context: StageContext, name: str) -> dict[str, dict[str, Any]]:
    """What finished evaluate stages measured of a model and of those beside it; says it where nothing was."""
    scores: dict[str, dict[str, Any]] = {}
    same = _same_weights(context, name)
    others: list[str] = []
    for stage in context.recipe.stages:
        if not isinstance(stage, Evaluate):
            continue
        if same & set(stage.models) and is_finished(context.run_folder / stage.name):
            scores |= read_manifest(context.run_folder / stage.name)["metrics"]
        others.append(f"{stage.name} scores {', '.join(stage.models)}")
    if not scores:
        why = f" ({'; '.join(others)})" if others else ""
        logger.warning("the card of %s shows no scores: no finished evaluate stage names %s%s", name, name, why)
    return scores


def _same_weights(context: StageContext, name: str) -> set[str]:
    """The ways in which a recipe can name these weights: a stage alone is its last step."""
    base, at, step = name.rpartition("@")
    stages = {stage.name for stage in context.recipe.stages}
    stage = name if name in stages else base if at and base in stages and step.isdigit() else None
    folder = context.run_folder / stage if stage is not None else None
    if folder is None or not is_finished(folder):
        return {name}
    last = (read_manifest(folder).get("metrics") or {}).get("step")
    if last is None or (stage != name and int(step) != last):
        return {name}
    return {name, str(stage), f"{stage}@{last}"}
