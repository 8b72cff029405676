"""Every causal language model that transformers registers, made tiny from its configuration.

`NAMES` are the model types, `config` makes one's configuration and `save` writes a folder
with random weights, large enough (standard deviation 0.08) for attention and head to matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compute import patches

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 2048  # that of the shipped tokenizer
LAYERS = 2

# Sizes by the names that the configurations give them.
SIZES = {
    VOCABULARY: "vocab_size decoder_vocab_size unpadded_vocab_size "
    "vocab_size_per_layer_input",
    64: "hidden_size d_model n_embd dim embedding_size emb_dim embedding_dim lru_width "
    "word_embed_proj_dim input_embedding_size output_embedding_size encoder_width "
    "attention_hidden_size prompt_mid_dim pronunciation_embed_dim shape_embed_dim "
    "pronunciation_vocab_size shape_vocab_size qk_dim",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner "
    "dim_ff dff d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "classifier_proj_size",
    128: "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len "
    "context_length max_source_positions original_max_position_embeddings mamba_d_ssm",
    32: "qk_head_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size expert_ffn_hidden_size router_hidden_size "
    "moe_shared_expert_intermediate_size rel_extent hc_lowrank ple_embed_dim dim_model_base "
    "attention_head_dim",
    16: "head_dim swa_head_dim kv_channels dim_head d_head attention_head_size q_lora_rank "
    "kv_lora_rank o_lora_rank linear_head_dim linear_key_head_dim linear_value_head_dim "
    "laurel_rank gated_norm_rank adapter_rank index_head_dim index_topk query_pre_attn_scalar "
    "mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size chunk_size "
    "hidden_size_per_layer_input qk_nope_head_dim ssm_state_size num_centroids "
    "qk_rope_head_dim",
    12: "v_head_dim",
    8: "state_size mamba_d_state num_heads_mamba mamba_dt_rank "
    "time_step_rank rotary_dim d_rel mamba_num_heads mamba_n_heads index_block_size "
    "sliding_window sliding_window_size attention_window_size window_size local_attention "
    "attention_chunk_size lsh_attn_chunk_length local_attn_chunk_length block_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts swa_num_attention_heads linear_num_value_heads linear_num_heads "
    "linear_num_key_heads index_n_heads num_query_groups zero_expert_num",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_encoder_layers num_decoder_layers num_blocks num_key_value_heads num_kv_heads "
    "swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "o_groups attn_layer_period n_mamba_heads",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers "
    "moe_layer_start_index moe_layer_end_index attn_layer_offset expert_layer_offset "
    "n_groups index_topk_blocks num_shared_experts n_shared_experts",
    0: "num_kv_shared_layers mlp_only_layers num_nextn_predict_layers",
}
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}

# What some types need besides.
MORE: dict[str, dict[str, Any]] = {
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "num_hidden_layers": LAYERS,
        "layer_types": None,
        "mlp_layer_types": None,
    },
    "qwen4_exp_text": {"num_hidden_layers": LAYERS, "layer_types": None},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ["local", "local"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "gemma3n_text": {
        "intermediate_size": 96,
        "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "xlstm": {"num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}


# What cannot be made from its configuration alone, and why.
UNMADE = {
    "blt": "its patcher has sizes of its own",
    "dbrx": "transformers 5.23 cannot make it from its own configuration",
    "emu3": "saves its text model, which no auto class loads",
    "mllama": "saves its text model, which no auto class loads",
    "dots3_note": "lists each layer of its text model",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "musicgen": "its class takes another configuration",
    "musicgen_melody": "its class takes another configuration",
}


def config(name: str) -> PreTrainedConfig:
    """The tiny configuration of a model type, `is_decoder` where there is a choice."""
    return shrink(CONFIG_MAPPING[name], **MORE.get(name, {}))


def save(name: str, folder: Path, **settings: Any) -> Path:
    """Write a tiny base of a type into `folder`, with the `settings` of its configuration."""
    torch.manual_seed(0)
    made = config(name)
    for key, value in settings.items():
        setattr(made, key, value)
    net = AutoModelForCausalLM.from_config(made)
    for parameter in net.parameters():
        noise = torch.randn_like(parameter) * 0.08
        # Vectors of ones are norms; they and biases stay about where they are.
        parameter.data = parameter.data + noise if parameter.ndim < 2 else noise
    net.save_pretrained(folder)
    return folder


def shrink(kind: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A configuration of a kind with small sizes and the given settings."""
    usual = kind()
    known = usual.to_dict()
    settings = {
        name: BY_NAME[name]
        for name, value in known.items()
        if name in BY_NAME and type(value) in (int, type(None)) and value != 0
    }
    settings |= {
        name: TOKENS.get(name, 5)
        for name, value in known.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    # One layer of each kind that it usually has.
    for name in ("layer_types", "mlp_layer_types"):
        kinds = sorted(set(known.get(name) or ()))
        if len(kinds) > 1:
            settings[name] = kinds
            settings["num_hidden_layers"] = len(kinds)
    for name in ("layer_types", "mlp_layer_types"):
        if name in settings:
            layers = settings["num_hidden_layers"]
            settings[name] = (settings[name] * LAYERS)[:layers]
    if "kv_lora_rank" in known:  # latent attention: as many keys as queries
        settings["num_key_value_heads"] = 4
    if "is_decoder" in known:
        settings["is_decoder"] = True
    for name in usual.sub_configs:
        if name not in more and isinstance(
            getattr(usual, name, None), PreTrainedConfig
        ):
            sub = type(getattr(usual, name))
            settings[name] = shrink(sub, **MORE.get(sub.model_type, {}))
    return kind(**(settings | more))


@contextmanager
def plain_attention() -> Iterator[None]:
    """transformers' own "sdpa" in the place of ours."""
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    try:
        yield
    finally:
        patches.attend_in_blocks()
