"""Megatron's configuration names in our words: a table of what each becomes here, or why it has no meaning.

Names are those of Megatron-core's `ModelParallelConfig`, the parallel part of `TransformerConfig`, `DistributedDataParallelConfig`, and of
the training arguments that go with them (https://docs.nvidia.com/megatron-core).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from meshpar.config import Precision, Translation
from meshpar.errors import ConfigError, near, raise_all

AXES: Mapping[str, str] = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "data_parallel_size": "dp",
}
"""Name -> the mesh axis whose size it is."""

BLOCKS = "num_layers_per_virtual_pipeline_stage"
_LAYERS, _STAGES = "num_layers", "pipeline_model_parallel_size"
_SHARDING = {"no_shard": "replicate", "optim": "zero1", "optim_grads": "zero2", "optim_grads_params": "zero3"}
_PRECISION = "precision"
_BYTES_PER_GRADIENT = 4  # Megatron counts bucket_size in parameters; gradients are summed in fp32


def _recompute(value: Any) -> tuple[str, Any]:
    return "recompute", value or "none"


def _virtual(value: Any) -> tuple[str, Any]:
    return "virtual_stages", None if value in (None, 1) else value


def _sharding(value: Any) -> tuple[str, Any]:
    return "data_parallel", _SHARDING.get(value, value)


_CONTEXT = {"p2p": "ring", "all_gather": "gather", "a2a": "heads"}

FIELDS: Mapping[str, Callable[[Any], tuple[str, Any]]] = {
    "sequence_parallel": lambda value: ("sequence_parallel", bool(value)),
    "virtual_pipeline_model_parallel_size": _virtual,
    "num_virtual_stages_per_pipeline_rank": _virtual,
    "recompute_activations": lambda value: ("recompute", "selective" if value else None),
    "recompute_granularity": _recompute,
    "use_distributed_optimizer": lambda value: ("data_parallel", "zero1" if value else "replicate"),
    "use_megatron_fsdp": lambda value: ("data_parallel", "zero3" if value else None),
    "use_custom_fsdp": lambda value: ("data_parallel", "zero3" if value else None),
    "data_parallel_sharding_strategy": _sharding,
    "bucket_size": lambda value: ("bucket_bytes", None if value is None else value * _BYTES_PER_GRADIENT),
    "overlap_grad_reduce": lambda value: ("overlap_grad_reduce", bool(value)),
    "overlap_param_gather": lambda value: ("overlap_param_gather", bool(value)),
    "cp_comm_type": lambda value: ("context", _CONTEXT.get(value, "auto") if isinstance(value, str) else None),
    "overlap_p2p_comm": lambda value: ("overlap_p2p", bool(value)),
    "tp_comm_overlap": lambda value: ("overlap_tensor_parallel", bool(value)),
    "async_tensor_model_parallel_allreduce": lambda value: ("overlap_tensor_parallel", bool(value)),
    "num_microbatches": lambda value: ("microbatches", value),
    "seed": lambda value: ("seed", value),
}
"""Name -> (field of ParallelConfig, its value); a value of None leaves the default. Later entries win over earlier ones."""

_TP_OVERLAP = "overlap_tensor_parallel (tp_comm_overlap) switches all of it"
_CAPTURE = "the model's own code is captured, so the model itself decides"
_LOSS = "the loss is always the token-weighted mean over the whole global batch"
_P2P = "stages send without waiting (batch_isend_irecv), in the order of the schedule, and let go of what has arrived"
_FSDP = "FSDP2 manages its own buffers"
_OFFLOAD = "offloading to the CPU is not offered"
_LAYOUT = (
    "say it as ParallelConfig(stages=[8, 8, 8, 6]), blocks per stage, or as the modules at which stages begin; without, cost is balanced"
)
_BY_COST = "stages are balanced by estimated cost, embedding and loss included, unless ParallelConfig(stages=...) says otherwise"
_HOOK = "gradients are summed inside train_step, no hook is needed"
_MOE = "the model's own router and experts are captured, so the model itself decides"
_FP8 = "8-bit formats are not offered"

NOTHING: Mapping[str, str] = {
    BLOCKS: "beside num_layers it says how many stages a rank has, if more than one",
    "micro_batch_size": "the local batch is cut into `microbatches` parts: give num_microbatches",
    "global_batch_size": "every data rank passes its own local batch (mp.local_batch cuts a global one)",
    "params_dtype": "parameters keep the model's dtype unless bf16 or fp16 is set",
    "pipeline_dtype": "what a stage sends has the dtype it has in the model",
    "autocast_dtype": "use bf16 or fp16",
    "enable_autocast": "use bf16 or fp16",
    "expert_tensor_parallel_size": "experts are split over the same tp axis as the rest",
    "hierarchical_context_parallel_sizes": "context parallelism is flat",
    "moe_extended_tp": "experts are split over ep, and over tp inside each expert",
    "nccl_ub": "user-buffer registration belongs to NCCL: set it in NCCL's environment, torch allocates the buffers",
    "disable_symmetric_registration": "user-buffer registration belongs to NCCL",
    "fsdp_double_buffer": _FSDP,
    "suggested_communication_unit_size": _FSDP,
    "preserve_fp32_weights": "parameters are always kept in precision.param_dtype",
    "keep_fp8_transpose_cache": _FP8,
    "fp8": _FP8,
    "fp8_recipe": _FP8,
    "fp8_param_gather": _FP8,
    "reuse_grad_buf_for_mxfp8_param_ag": _FP8,
    "pad_buckets_for_high_nccl_busbw": "bucket sizes are in bytes and need no padding",
    "average_in_collective": "gradients are summed; the division is by the number of valid tokens, inside the loss",
    "gradient_reduce_div_fusion": "gradients are summed; the division is by the number of valid tokens, inside the loss",
    "num_distributed_optimizer_instances": "hybrid sharding is a mesh: dp_replicate=N,dp_shard=M",
    "outer_dp_sharding_strategy": "hybrid sharding is a mesh: dp_replicate=N,dp_shard=M",
    "check_for_nan_in_grad": "the norm that mp.clip_grad_norm_ returns shows it",
    "check_for_large_grads": "the norm that mp.clip_grad_norm_ returns shows it",
    "align_param_gather": _FSDP,
    "calculate_per_token_loss": _LOSS,
    "perform_initialization": "a model built on meta is always initialised or loaded",
    "use_cpu_initialization": "initial values are always those of one device",
    "init_model_with_meta_device": "build the model under mp.meta()",
    "deterministic_mode": "call torch.use_deterministic_algorithms",
    "use_te_rng_tracker": "random numbers follow from ParallelConfig.seed, the same on every mesh",
    "gradient_accumulation_fusion": "left to torch",
    "cross_entropy_loss_fusion": "the vocabulary-parallel loss is chosen by the plan",
    "cross_entropy_fusion_impl": "the vocabulary-parallel loss is chosen by the plan",
    "distribute_saved_activations": "recomputed blocks save the residual as it is split by the plan",
    "recompute_method": "recompute applies to every block alike",
    "recompute_num_layers": "recompute applies to every block alike",
    "recompute_modules": "selective recompute keeps matmul and attention outputs",
    "num_microbatches_with_partial_activation_checkpoints": "recompute applies to every microbatch alike",
    "tp_comm_overlap_cfg": _TP_OVERLAP,
    "tp_comm_bulk_wgrad": _TP_OVERLAP,
    "tp_comm_bulk_dgrad": _TP_OVERLAP,
    "tp_comm_overlap_ag": _TP_OVERLAP,
    "tp_comm_overlap_rs": _TP_OVERLAP,
    "tp_comm_overlap_rs_dgrad": _TP_OVERLAP,
    "tp_comm_split_ag": _TP_OVERLAP,
    "tp_comm_atomic_ag": _TP_OVERLAP,
    "tp_comm_split_rs": _TP_OVERLAP,
    "tp_comm_atomic_rs": _TP_OVERLAP,
    "tp_comm_overlap_disable_qkv": _TP_OVERLAP,
    "tp_comm_overlap_disable_fc1": _TP_OVERLAP,
    "tp_comm_bootstrap_backend": _TP_OVERLAP,
    "overlap_moe_expert_parallel_comm": "with overlap_tensor_parallel, gradients of rows go back beside the weight gradients of experts",
    "delay_wgrad_compute": 'schedule="zero-bubble" defers weight gradients',
    "defer_embedding_wgrad_compute": 'schedule="zero-bubble" defers weight gradients',
    "wgrad_deferral_limit": 'schedule="zero-bubble" defers weight gradients',
    "pipeline_model_parallel_comm_backend": "the mesh's process groups are used",
    "variable_seq_lengths": "graphs are cached per input shape",
    "overlap_p2p_comm_warmup_flush": _P2P,
    "batch_p2p_comm": _P2P,
    "batch_p2p_sync": _P2P,
    "use_ring_exchange_p2p": _P2P,
    "deallocate_pipeline_outputs": _P2P,
    "microbatch_group_size_per_vp_stage": "microbatches go in equal rounds of at least as many as pp has ranks",
    "pipeline_model_parallel_split_rank": _LAYOUT,
    "pipeline_model_parallel_layout": _LAYOUT,
    "num_layers_in_first_pipeline_stage": _LAYOUT,
    "num_layers_in_last_pipeline_stage": _LAYOUT,
    "account_for_embedding_in_pipeline_split": _BY_COST,
    "account_for_loss_in_pipeline_split": _BY_COST,
    "cpu_offloading": _OFFLOAD,
    "cpu_offloading_num_layers": _OFFLOAD,
    "cpu_offloading_activations": _OFFLOAD,
    "cpu_offloading_weights": _OFFLOAD,
    "timers": "use torch.profiler",
    "barrier_with_L1_time": "use torch.profiler",
    "finalize_model_grads_func": _HOOK,
    "grad_scale_func": "mp.GradScaler scales the gradients of a step",
    "no_sync_func": _HOOK,
    "grad_sync_func": _HOOK,
    "param_sync_func": _HOOK,
}
"""Name -> why it has no meaning here."""

MODEL = frozenset(
    """num_layers mtp_num_layers mtp_loss_scaling_factor hidden_size num_attention_heads attention_backend softmax_scale softmax_type
    num_query_groups ffn_hidden_size kv_channels hidden_dropout attention_dropout fp32_residual_connection
    apply_residual_connection_post_layernorm layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias
    gated_linear_unit activation_func activation_func_fp8_input_store activation_func_clamp_value glu_linear_offset num_moe_experts
    rotary_interleaved window_size window_attn_skip_freq normalization qk_layernorm qk_clip test_mode
    multi_latent_attention no_rope_freq moe_deepep_num_sms init_method output_layer_init_method init_method_std
    embedding_init_method embedding_init_method_std apply_query_key_layer_scaling attention_softmax_in_fp32
    disable_bf16_reduced_precision_matmul bias_activation_fusion masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm
    bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope use_fused_weighted_squared_relu inference_rng_tracker
    symmetric_ar_type mrope_section is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    use_mamba_mem_eff_path transformer_impl flash_decode batch_invariant_mode enable_cuda_graph cuda_graph_use_single_mempool
    cuda_graph_retain_backward_graph cuda_graph_warmup_steps external_cuda_graph cuda_graph_scope config_logger_dir
    clone_scatter_output_in_embedding
    vocab_size max_position_embeddings seq_length position_embedding_type rotary_base rotary_percent untie_embeddings_and_output_weights
    make_vocab_size_divisible_by heterogeneous_block_specs hetereogenous_dist_checkpoint quant_recipe inference_sampling_seed
    fallback_to_eager_attn experimental_attention_variant use_kitchen disable_parameter_transpose_cache
    num_experts swiglu squared_relu group_query_attention disable_bias_linear use_rotary_position_embeddings use_flash_attn
    padded_vocab_size no_position_embedding norm_epsilon use_mcore_models spec""".split()
)
"""Names that describe the model."""
LOOP = frozenset(
    """lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples lr_warmup_fraction weight_decay
    start_weight_decay end_weight_decay weight_decay_incr_style clip_grad optimizer adam_beta1 adam_beta2 adam_eps sgd_momentum train_iters
    train_samples rampup_batch_size eval_iters eval_interval log_interval log_throughput tensorboard_dir wandb_project save load
    save_interval ckpt_format no_load_optim no_load_rng data_path split num_workers tokenizer_type tokenizer_model vocab_file merge_file
    reset_position_ids reset_attention_mask eod_mask_loss mock_data exit_duration_in_mins exit_interval distributed_backend
    distributed_timeout_minutes loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis""".split()
)
"""Names of a training loop: its optimizer, data and files."""


def translate(config: object, ddp_config: object = None) -> tuple[dict[str, Any], tuple[Translation, ...]]:
    """Fields for `ParallelConfig`, and what every given name became. Raises `ConfigError` for unknown names and contradictions."""
    given = {**_values(config), **_values(ddp_config)}
    unknown = [name for name in given if not _known(name)]
    names = [*AXES, *FIELDS, *NOTHING, *MODEL, *LOOP, "bf16", "fp16", "grad_reduce_in_fp32"]
    complaints = [f"{name} is not a name of Megatron's configuration known here.{near(name, names)}" for name in unknown]
    complaints += _contradictions(given)
    raise_all(ConfigError, "from_megatron:", complaints)

    fields = {}
    for name, convert in FIELDS.items():
        if name in given:
            field, value = convert(given[name])
            if value is not None:
                fields[field] = value
    if (stages := _stages_of_blocks(given)) is not None and stages > 1:
        fields.setdefault("virtual_stages", stages)
    if fields.get("virtual_stages"):
        fields["schedule"] = "interleaved-1f1b"
    precision = _precision(given)
    if precision is not None:
        fields[_PRECISION] = precision
    return fields, tuple(_explain(name, value, fields) for name, value in given.items())


def megatron_mesh(config: object, world_size: int) -> str:
    """The text for `make_mesh` from Megatron's sizes; what is left of `world_size` is `dp`.

    >>> megatron_mesh({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}, 16)
    'pp=2,dp=2,tp=4'
    """
    given = _values(config)
    sizes = {axis: given.get(name) or 1 for name, axis in AXES.items() if axis != "dp"}
    ranks = sizes["pp"] * sizes["cp"] * sizes["ep"] * sizes["tp"]
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks are not divisible by {ranks} = pp {sizes['pp']} x cp {sizes['cp']} x ep {sizes['ep']} x tp {sizes['tp']}."
        )
    sizes["dp"] = world_size // ranks
    return ",".join(f"{axis}={sizes[axis]}" for axis in ("pp", "dp", "cp", "ep", "tp") if sizes[axis] > 1) or "tp=1"


def _values(config: object) -> dict[str, Any]:
    """The public values of a dict, a dataclass or a plain object (argparse's namespace, for instance)."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not f.name.startswith("_")}
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _known(name: str) -> bool:
    if name.startswith(("moe_", "fp8", "fp4", "first_last_layers_bf16", "num_layers_at_")):
        return True
    return any(name in names for names in (AXES, FIELDS, NOTHING, MODEL, LOOP, ("bf16", "fp16", "grad_reduce_in_fp32")))


def _contradictions(given: Mapping[str, Any]) -> list[str]:
    complaints = []
    expert, dense = given.get("expert_tensor_parallel_size"), given.get("tensor_model_parallel_size") or 1
    if expert not in (None, dense):
        complaints.append(
            f"expert_tensor_parallel_size={expert} differs from tensor_model_parallel_size={dense}: experts use the same tp axis."
        )
    if given.get("bf16") and given.get("fp16"):
        complaints.append("bf16 and fp16 are both set; choose one.")
    stages, ranks = _stages_of_blocks(given), given.get(_STAGES) or 1
    if stages is not None and given[_LAYERS] % (ranks * given[BLOCKS]):
        complaints.append(f"{_LAYERS}={given[_LAYERS]} is no multiple of {_STAGES} x {BLOCKS} = {ranks} x {given[BLOCKS]}.")
    for name, convert in FIELDS.items():
        if stages is not None and convert is _virtual and given.get(name) not in (None, stages):
            complaints.append(f"{name}={given[name]}, but {BLOCKS}={given[BLOCKS]} gives a rank {stages} stages.")
    strategy = given.get("data_parallel_sharding_strategy")
    if strategy is not None and strategy not in _SHARDING:
        complaints.append(f"data_parallel_sharding_strategy={strategy!r}: one of {', '.join(_SHARDING)}.{near(str(strategy), _SHARDING)}")
    return complaints


def _stages_of_blocks(given: Mapping[str, Any]) -> int | None:
    """How many stages a rank has, from the blocks of one; None where it is not said."""
    each, layers = given.get(BLOCKS), given.get(_LAYERS)
    return None if not each or not layers else layers // ((given.get(_STAGES) or 1) * each)


def _precision(given: Mapping[str, Any]) -> Precision | None:
    compute = torch.bfloat16 if given.get("bf16") else torch.float16 if given.get("fp16") else None
    if compute is None:
        return None
    return Precision(torch.float32, compute, compute if given.get("grad_reduce_in_fp32") is False else torch.float32)


def _explain(name: str, value: Any, fields: Mapping[str, Any]) -> Translation:
    if name in AXES:
        return Translation(name, value, f"mesh axis {AXES[name]}={value}", "mp.make_mesh takes sizes; megatron_mesh writes them")
    if name in ("bf16", "fp16", "grad_reduce_in_fp32"):
        if _PRECISION not in fields:
            return Translation(name, value, "", "without bf16 or fp16 the model's own dtypes are kept")
        used = fields[_PRECISION]
        what = "reduce_dtype" if name == "grad_reduce_in_fp32" else "compute_dtype"
        return Translation(name, value, f"precision.{what}={str(getattr(used, what)).removeprefix('torch.')}", "")
    if name in FIELDS:
        return _explain_field(name, value, fields)
    if name == BLOCKS and value and "virtual_stages" in fields:
        return Translation(name, value, f"virtual_stages={fields['virtual_stages']}", 'with schedule="interleaved-1f1b"')
    if name in NOTHING:
        return Translation(name, value, "", NOTHING[name])
    if name in LOOP:
        return Translation(name, value, "", "the training loop decides, which stays one's own")
    return Translation(name, value, "", _MOE if name.startswith("moe_") else _FP8 if name.startswith(("fp8", "fp4")) else _CAPTURE)


def _explain_field(name: str, value: Any, fields: Mapping[str, Any]) -> Translation:
    field, wanted = FIELDS[name](value)
    if wanted is None:
        return Translation(name, value, "", f"leaves {field} as it is")
    if fields[field] != wanted:
        return Translation(name, value, "", f"another name sets {field}={fields[field]!r}")
    why = {
        "bucket_bytes": f"counted in bytes, {_BYTES_PER_GRADIENT} for each parameter",
        "virtual_stages": 'with schedule="interleaved-1f1b"',
    }.get(field, "")
    return Translation(name, value, f"{field}={wanted!r}", why)
