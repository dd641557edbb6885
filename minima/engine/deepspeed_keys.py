"""Which of DeepSpeed's keys a JSON may set, and who owns the others.

A JSON may change between two starts of one stage, so it may set nothing that changes a number. The names are those
 of https://www.deepspeed.ai/docs/config-json/ and `deepspeed.runtime.zero.config`.
"""

# Everything that determines what is computed, and where it is set instead. One owner each: a factor with two owners
# was the first bug of the original code.
RECIPE_OWNS = {
    "train_batch_size": "`batch_sequences`",
    "train_micro_batch_size_per_gpu": "`micro_batch_sequences`",
    "gradient_accumulation_steps": "`batch_sequences` and `micro_batch_sequences`",
    "gradient_clipping": "`gradient_clip`",
    "prescale_gradients": "never used",
    "gradient_predivide_factor": "never used",
    "gradient_allreduce_op": "always the mean",
    "communication_data_type": "always float32",  # in bf16 a gradient is rounded again for every rank that adds to it
    "optimizer": "`learning_rate`, `betas`, `epsilon` and `weight_decay`",
    "scheduler": "`schedule` and `warmup_fraction`",
    "bf16": "`precision`",
    "bfloat16": "`precision`",
    "fp16": "`precision`",
    "torch_autocast": "`precision`",
    "amp": "`precision`",
    "data_types": "`precision`",
    "activation_checkpointing": "`activation_checkpointing`",
    "zero_allow_untested_optimizer": "always true",
    "zero_force_ds_cpu_optimizer": "always false",
    "managed_gradient_accumulation": "`batch_sequences` and `micro_batch_sequences`",
    "data_efficiency": "never used",
    "curriculum_learning": "never used",
    "progressive_layer_drop": "never used",
}

# Top-level keys: sharding, profiling and logging.
TOP = (
    "zero_optimization",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "timers",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "tensor_parallel",  # for a split teacher
    "aio",  # how files on NVMe are read
)

# The Python package that each of these monitors needs.
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
DEVICES = ("none", "cpu", "nvme")

# Without `autotp_size`, which is the recipe's `tensor_parallel_ranks`.
TENSOR_PARALLEL = ("preset_model", "tp_grain_size")

AIO = (
    "block_size",
    "queue_depth",
    "intra_op_parallelism",
    "single_submit",
    "overlap_events",
    "use_gds",
)

# Sharding, offload and communication. Left out: quantised weights and gradients, and delayed updates (ZenFlow).
ZERO = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "round_robin_gradients",
    "sub_group_size",
    "offload_param",
    "offload_optimizer",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "memory_efficient_linear",
    "ignore_unused_parameters",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "zero_hpz_partition_size",  # accepted only with the value that turns it off
    "mics_shard_size",  # listed here because it is refused with a message of its own
)

# Those of ZERO that must be numbers of at least 0.
NUMBERS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
)

# Left out: `ratio` and `super_offload`, which update part of the weights with another optimiser.
OFFLOAD = (
    "device",
    "nvme_path",  # for a teacher; replaced by the run's own folder under the recipe's `nvme_path`
    "pin_memory",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
)
