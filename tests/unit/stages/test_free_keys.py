"""Which keys of a recipe may change between two starts of a stage."""

from minima.recipe.chat import Align, Instruct
from minima.recipe.distillation import Distil
from minima.recipe.pruning import Prune
from minima.recipe.release import Benchmark, Evaluate, Export, Publish
from minima.recipe.schema import Adapt, BuildData
from minima.recipe.vocabulary import ExpandVocabulary
from minima.stages.identity import free_keys

FREE = {  # what may be changed between two starts; whoever adds a key to a recipe says here which it is
    "micro_batch_sequences", "activation_checkpointing", "compile", "kernels", "deterministic", "chunk_tokens",
    "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps", "watchdog_seconds", "log_every_steps",
    "evaluate_every_steps", "evaluate_sequences", "tensorboard", "wandb_project", "deepspeed", "reference_deepspeed",
    "precompute_reference",
}  # fmt: skip
DECIDING = {
    "name", "kind", "model", "data", "batch_sequences", "steps", "tokens", "epochs", "learning_rate", "warmup_steps",
    "warmup_fraction", "schedule", "final_learning_rate_fraction", "weight_decay", "betas", "epsilon", "gradient_clip",
    "precision", "patience", "seed", "teacher", "hard_weight", "soft_weight", "temperature", "divergence", "beta",
    "alpha", "top_k", "top_p", "neftune_alpha", "reference", "loss", "label_smoothing", "length_normalised",
    "reference_precision",
}  # fmt: skip


def test_every_key_of_a_training_stage_is_known_to_decide_its_result_or_not():
    keys = {}
    for stage in (Adapt, Distil, Instruct, Align):
        free = free_keys(stage.model_construct(kind=stage.__name__.lower(), patience=None))
        keys |= {key: key in free for key in stage.model_fields}
    assert {key for key, is_free in keys.items() if is_free} == FREE
    assert {key for key, is_free in keys.items() if not is_free} == DECIDING


def test_of_other_stages_only_these_keys_do_not_decide():
    found = {}
    for stage in (BuildData, ExpandVocabulary, Prune, Evaluate, Export, Benchmark, Publish):
        free = free_keys(stage.model_construct(kind=stage.__name__.lower()))
        found[stage] = free & stage.model_fields.keys()
    assert found == {
        BuildData: {"processes"}, ExpandVocabulary: set(), Prune: {"deepspeed"}, Export: {"deepspeed"},
        Evaluate: {"deepspeed", "micro_batch_sequences"}, Benchmark: {"batch_size"}, Publish: set(),
    }  # fmt: skip
