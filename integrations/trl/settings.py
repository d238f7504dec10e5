"""Which settings of GRPOConfig keep trainer and rollout equal. What is not listed here must stand at its default.

FREE         changes neither a forward pass nor which tokens are drawn from which distribution
RULES        changes one of them, or could: the values that are covered, and why no others
everything else, a setting of a newer TRL too, is refused unless it stands at its default
"""

import dataclasses

import torch

FREE = frozenset(
    """
    output_dir run_name project trackio_space_id trackio_bucket_id trackio_static_space_id report_to
    per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps gradient_accumulation_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2
    adam_epsilon max_grad_norm average_tokens_across_devices bf16 bf16_full_eval tf32 gradient_checkpointing gradient_checkpointing_kwargs
    use_cache torch_empty_cache_steps fsdp fsdp_config full_determinism seed data_seed use_cpu accelerator_config
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm debug skip_memory_metrics logging_dir
    eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics prediction_loss_only metric_for_best_model greater_is_better load_best_model_at_end
    do_train do_eval do_predict
    save_strategy save_steps save_on_each_node save_total_limit save_only_model enable_jit_checkpoint resume_from_checkpoint
    restore_callback_states_from_checkpoint ignore_data_skip push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names train_sampling_strategy
    length_column_name shuffle_dataset
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank
    model_init_kwargs disable_dropout num_generations num_generations_eval max_completion_length chat_template_kwargs
    pad_to_multiple_of generation_batch_size steps_per_generation ds3_gather_for_generation
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size vllm_server_host vllm_server_port vllm_server_timeout
    vllm_group_port
    beta num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg
    vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards loss_type
    mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef
    use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    """.split()
)
GENERATION = frozenset({"ignore_eos", "stop_token_ids"})  # when a completion ends, not from what its tokens are drawn
FSDP_CONFIG = frozenset(
    """
    version auto_wrap_policy transformer_layer_cls_to_wrap min_num_params reshard_after_forward state_dict_type activation_checkpointing
    cpu_ram_efficient_loading
    """.split()
)
FSDP_OFF = frozenset({"xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"})  # transformers writes them


def _rules(args):
    """(holds, setting, why and fix)."""
    yield args.use_vllm is True, "use_vllm", "the rollout is vLLM's; set it to True"
    yield args.vllm_mode == "colocate", "vllm_mode", "a server's engine cannot be checked from the trainer; set it to 'colocate'"
    yield args.vllm_model_impl == "vllm", "vllm_model_impl", "tpinv's layers are those of vLLM's own models; set it to 'vllm'"
    yield args.temperature > 0, "temperature", "log-probabilities are of logits / temperature; set a positive one"
    why = "the engine would renormalise over the tokens that are left, and the trainer over all; leave it at"
    yield args.top_p == 1.0, "top_p", f"{why} 1.0"
    yield args.top_k in (0, -1), "top_k", f"{why} 0"
    yield args.min_p in (None, 0.0), "min_p", f"{why} None"
    yield args.repetition_penalty == 1.0, "repetition_penalty", "the engine would change logits which the trainer does not; leave it at 1.0"
    given = args.generation_kwargs or {}
    yield (
        isinstance(given, dict) and not set(given) - GENERATION,
        "generation_kwargs",
        f"what changes logits is the engine's alone; covered are {sorted(GENERATION)}",
    )
    yield not args.vllm_enable_sleep_mode, "vllm_enable_sleep_mode", "not tested; leave it False"
    yield not args.cast_lm_head_to_fp32, "cast_lm_head_to_fp32", "the engine's head computes in the model's dtype; leave it False"
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if getattr(args, "fsdp", None):
        yield int(config.get("version", 2)) == 2, "fsdp_config['version']", "FSDP1 flattens parameters, which was not tested; set it to 2"
        stray = {name for name, value in config.items() if name not in FSDP_CONFIG and not (name in FSDP_OFF and not value)}
        yield not stray, f"fsdp_config{sorted(stray)}", f"covered are {sorted(FSDP_CONFIG)}"


def check_config(args, **arguments) -> None:
    """ValueError naming every setting of a GRPOConfig, and every other argument of the trainer, that is not covered.

    ``arguments``: of GRPOTrainer, that must be None.
    """
    if args is None:
        raise ValueError("args=None: TRL's defaults generate with transformers; pass GRPOConfig(use_vllm=True, ...)")
    faults, ruled = [], set()
    for holds, name, why in _rules(args):
        ruled.add(name)
        if not holds:
            faults.append(f"{name}={getattr(args, name, '...')!r}: {why}")
    for field in dataclasses.fields(args):
        if field.name in FREE or field.name in ruled or not field.init:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        value = getattr(args, field.name)
        if value != default and (value or default):
            faults.append(f"{field.name}={value!r} is not known to keep trainer and rollout equal; leave it at {default!r}")
    for name, value in arguments.items():
        if value:
            faults.append(f"{name} is not covered: {ARGUMENTS[name]}; leave it out")
    if faults:
        raise ValueError("trainer and rollout would not be equal:\n  " + "\n  ".join(faults))


ARGUMENTS = {
    "quantization_config": "quantised weights are other numbers in the engine",
    "peft_config": "an adapter's products are not tpinv's, and merging rounds",
    "tools": "tokens of tools were not drawn by the engine",
    "rollout_func": "its log-probabilities are its own",
    "environment_factory": "tokens of an environment were not drawn by the engine",
}


def settle_fsdp(plugin) -> None:
    """Of accelerate's FSDP plugin: no rounding of what modules return. ValueError for what is not covered."""
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP {plugin.fsdp_version} flattens parameters, which was not tested; set fsdp_config={{'version': 2}}")
    offload = plugin.cpu_offload
    if offload and type(offload).__name__ != "OffloadPolicy":
        raise ValueError(f"cpu_offload={offload} was not tested; leave it out")
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype not in (None, torch.float32):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
