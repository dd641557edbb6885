"""Gathers the facts of a model card from the recipe and the stages' manifests. No torch."""

import logging
import re
from pathlib import Path
from typing import Any

from minima.engine.metrics import records_from_end
from minima.models.shape import ModelShape
from minima.recipe.references import STEPPED, Ancestor, lineage, stage_and_step
from minima.recipe.schema import AnyStage, BuildData, Evaluate, Export
from minima.report.cards import TRAINING, Card, code_span
from minima.stages.context import StageContext
from minima.stages.manifest import is_finished, read_manifest

logger = logging.getLogger(__name__)
_CHECKS = {
    "zero3": "its logits, when loaded with ZeRO-3, against the trained model's",
    "transformers": "its logits, when loaded by plain transformers, against the trained model's",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def gather_card(
    context: StageContext,
    config: dict[str, Any],
    metrics: dict[str, Any],
    chat_template: bool,
    misread_as: str | None = None,
) -> Card:
    """The model card of one export.

    Args:
        config: content of its config.json.
        metrics: what the export measured: parameters, dtype and the checks.
        chat_template: whether its tokenizer has one.
        misread_as: the class as which `AutoTokenizer` wrongly loads its tokenizer.
    """
    stage = context.stage
    assert isinstance(stage, Export)
    shape = ModelShape.from_config(config)
    ancestors, root = lineage(context.recipe, stage.model)
    built = _data_stages(context, ancestors)
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
        stages=[(made.name, made.kind, _settings(made)) for made, _ in ancestors],
        training={made.name: _trained(context, made, step) for made, step in ancestors if made.kind in STEPPED},
        data=_data_lines(built),
        scores=_scores(context, stage.model),
        chat=taught_to_chat(context, stage.model),
        max_positions=shape.max_positions,
        licence=stage.licence,
        languages=stage.languages,
        datasets=_without_folders(list(dict.fromkeys([*stage.datasets, *_hub_datasets(built)]))),
        base_model=_without_folders(stage.base_model) or (root if root is not None and _on_hub(root) else None),
        chat_template=chat_template,
        misread_as=misread_as,
        checked=["every tensor's bytes against the trained model's, by SHA-256"]
        + [
            f"{_CHECKS[how]}: largest difference {metrics['max_logit_difference']:.2g}" for how in metrics["checked_by"]
        ],
    )


def taught_to_chat(context: StageContext, name: str) -> bool:
    """Whether a stage of the recipe trained this model, or one it was made from, on conversations.

    A chat template alone does not prove it: pruning keeps a chat model's tokenizer, but not what the model knew.
    """
    return any(
        made.kind in ("instruct", "align")
        or (made.kind in ("adapt", "distil") and _format(context, made.data) == "conversations")
        for made, _ in lineage(context.recipe, name)[0]
    )


def _format(context: StageContext, reference: str) -> str | None:
    """The format of the data that a stage reads, given as a stage of the recipe or as the folder of another run's."""
    stage = next((stage for stage in context.recipe.stages if stage.name == reference), None)
    if stage is not None:
        return getattr(stage, "format", None)
    folder = Path(reference).expanduser()
    return read_manifest(folder).get("stage", {}).get("format") if is_finished(folder) else None


def _settings(stage: AnyStage) -> dict[str, Any]:
    return _without_folders(stage.model_dump(mode="json", exclude_unset=True, exclude={"name", "kind"}))


def _without_folders(value: Any) -> Any:
    """The settings with absolute paths reduced to their last part: a published card must not reveal local paths."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) and value.startswith(("/", "~")) else value


def _data_stages(context: StageContext, ancestors: list[Ancestor]) -> list[BuildData | str]:
    """The data that the ancestors read: stages of the recipe, or folders of other runs."""
    by_name = {stage.name: stage for stage in context.recipe.stages}
    found: list[BuildData | str] = []
    for reference in dict.fromkeys(getattr(stage, "data", None) for stage, _ in ancestors):
        stage = by_name.get(reference) if reference is not None else None
        if reference is not None:
            found.append(stage if isinstance(stage, BuildData) else reference)
    return found


def _data_lines(built: list[BuildData | str]) -> list[str]:
    lines: list[str] = []
    for stage in built:
        if isinstance(stage, str):
            lines.append(code_span(_without_folders(stage)))
            continue
        what = "" if stage.format == "text" else f" of {stage.format}"
        for source in stage.sources:
            weight = "" if source.weight is None else f", weight {source.weight:g}"
            lines.append(f"{code_span(_without_folders(source.label))} (stage `{stage.name}`{what}{weight})")
    return list(dict.fromkeys(lines))


def _hub_datasets(built: list[BuildData | str]) -> list[str]:
    sources = [source for stage in built if isinstance(stage, BuildData) for source in stage.sources]
    return [source.hub for source in sources if source.hub is not None and _on_hub(source.hub)]


def _on_hub(name: str) -> bool:
    """Whether a name refers to the Hub: an existing folder of that name takes precedence."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()


def _trained(context: StageContext, stage: AnyStage, step: int | None) -> dict[str, Any]:
    """The metrics of a training stage, at its end or at the checkpoint that was used."""
    folder = context.run_folder / stage.name
    metrics: dict[str, Any] = (read_manifest(folder).get("metrics") or {}) if is_finished(folder) else {}
    if step is not None and metrics.get("step") != step:
        metrics = {}
        for record, _ in records_from_end(folder / "metrics.jsonl"):
            metrics = (record if record["step"] == step else {}) | metrics  # the last one comes first
    metrics = metrics | ({"steps": metrics["step"]} if "step" in metrics else {})
    return {name: metrics[name] for name in TRAINING if metrics.get(name) is not None}


def _scores(context: StageContext, name: str) -> dict[str, dict[str, Any]]:
    """The scores of a model, and of those evaluated along with it, from finished evaluate stages; warns if none."""
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
    told: dict[str, dict[str, Any]] = {}
    for model, row in scores.items():
        short = _without_folders(model)
        told[f"{short} ({len(told) + 1})" if short in told else short] = row
    return told


def _same_weights(context: StageContext, name: str) -> set[str]:
    """All names by which a recipe can refer to these weights: a stage's bare name means its last step."""
    stage, step = stage_and_step(context.recipe, name)
    if stage is None or not is_finished(context.run_folder / stage.name):
        return {name}
    last = (read_manifest(context.run_folder / stage.name).get("metrics") or {}).get("step")
    if last is None or step not in (None, last):
        return {name}
    return {name, stage.name, f"{stage.name}@{last}"}
