"""Every configuration key that peft 0.21 writes for the kinds that are read; other keys are reported by name."""

_LORA = frozenset(
    [
        *(
            "alora_invocation_tokens",
            "alpha_pattern",
            "arrow_config",
            "auto_mapping",
            "base_model_name_or_path",
            "bias",
        ),
        *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config"),
        *("megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size"),
        *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
        *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config"),
    ]
)
_OTHERS = frozenset(
    [
        *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
        *("d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"),
        *("init_logits_std", "init_vector_bank_bound", "num_vectors", "save_only_topk_weights", "topk"),
        *("vblora_dropout", "vector_length"),
        *("alpha", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"),
        *("decompose_both", "decompose_factor"),
        *("init_theta_d_bound", "proj_seed", "save_indices", "theta_d_length", "unilora_dropout"),
        *("use_beamlora",),
    ]
)
KNOWN_KEYS = _LORA | _OTHERS
