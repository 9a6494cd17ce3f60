"""Tables of the keys that DeepSpeed 0.19.8 reads from its JSON, and of the values that cannot work here.

tests/settings/test_ds_config.py compares them with the installed DeepSpeed. Sources: runtime/config.py and constants.py
(top level, optimizer, scheduler, data_types), precision_config.py, zero/config.py, zero/offload_config.py and the
constructors of its Adams and schedules.
"""

from collections.abc import Callable
from typing import Any


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


KNOWN_KEYS = {
    "": names(
        """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
        communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
        datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
        gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
        hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
        prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel
        tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
        use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"""
    ),
    "zero_optimization": names(
        """allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm
        contiguous_gradients cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint
        enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module
        legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance
        memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer
        offload_param overlap_comm override_module_apply param_persistence_threshold parameter_alignment
        pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter
        round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
        stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
        stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
        use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights"""
    ),
    "zero_optimization.offload_optimizer": names(
        """buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write
        ratio super_offload"""
    ),
    "bf16": names(
        "bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update"
    ),
    "fp16": names(
        """auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis
        initial_scale_power loss_scale loss_scale_window min_loss_scale"""
    ),
    "data_types": names("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype"),
    "optimizer": names("legacy_fusion params type"),
    "scheduler": names("params type"),
}
ADAM_PARAMS = names("adam_w_mode amsgrad betas bias_correction eps fp32_optimizer_states lr torch_adam weight_decay")
WARMUP_PARAMS = names("warmup_min_lr warmup_max_lr warmup_num_steps warmup_type last_batch_iteration")
PARAMS_BY_TYPE = {
    "optimizer": {
        "AdamW8bit": names("lr betas eps weight_decay rounding moments share_staging"),
        "SGD": names("lr weight_decay rounding share_staging"),
        "Adam": ADAM_PARAMS,
        "AdamW": ADAM_PARAMS,
    },
    "scheduler": {
        "WarmupLR": WARMUP_PARAMS,
        "WarmupDecayLR": WARMUP_PARAMS | {"total_num_steps"},
        "WarmupCosineLR": names(
            "total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type last_batch_iteration"
        ),
    },
}

FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
# Real keys of DeepSpeed with a value that cannot work here: path, test of the value, the reason and what to do.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("bfloat16", lambda value: True, 'is DeepSpeed\'s old name: write "bf16"'),
    ("fp16.fp16_master_weights_and_grads", bool, "loses the steps that fp16 is too coarse for: remove it"),
    ("fp16.auto_cast", bool, "has no effect, as the inputs are token ids: remove it"),
    (
        "data_types.grad_accum_dtype",
        lambda value: value in FP32_NAMES,
        "takes 4 bytes of GPU memory per parameter: remove it, one backward per step needs no accumulator",
    ),
    (
        "zero_optimization.offload_param",
        lambda value: (
            value not in (None, False, {}) and not (isinstance(value, dict) and value.get("device") == "none")
        ),
        "exists in ZeRO stage 3 only: remove it",
    ),
    ("zero_optimization.cpu_offload", bool, 'is deprecated: write "offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.cpu_offload_param", bool, "exists in ZeRO stage 3 only: remove it"),
    ("zero_optimization.cpu_offload_use_pin_memory", bool, 'is deprecated: write "pin_memory" in "offload_optimizer"'),
    (
        "zero_optimization.elastic_checkpoint",
        bool,
        "saves and loads 8-bit moments wrongly, as if they had the length of the weights: remove it",
    ),
    ("zero_optimization.legacy_stage1", bool, "was removed from DeepSpeed: remove it"),
    ("zero_optimization.zenflow", bool, "cannot sum gradients over ranks, which token weights need: remove it"),
    ("compile.deepcompile", bool, "cannot sum gradients over ranks, which token weights need: remove it"),
    ("prescale_gradients", bool, "has no effect on summed gradients: remove it"),
    ("gradient_predivide_factor", lambda value: value != 1, "has no effect on summed gradients: remove it"),
    ("wandb.enabled", bool, "sends metrics to wandb without --report_to: remove it, use --report_to wandb"),
    ("comet.enabled", bool, "sends metrics to comet without --report_to: remove it"),
    ("optimizer.params.max_grad_norm", lambda value: True, 'belongs at the top level as "gradient_clipping"'),
    ("zero_optimization.offload_optimizer.ratio", lambda value: value != 1, "exists in ZeRO stage 3 only: remove it"),
    ("zero_optimization.offload_optimizer.super_offload", bool, "exists in ZeRO stage 3 only: remove it"),
)
