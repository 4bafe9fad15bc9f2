# SPDX-License-Identifier: Apache-2.0
"""
Every image classifier of Transformers, as small as its architecture allows: its configuration, and its inputs.

Whatever draws random numbers (dropout, stochastic depth) is switched on.
"""

import torch
import transformers


NUM_LABELS = 4
_VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_CLIP_VISION = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "attention_dropout": 0.1,
}
_SIGLIP2_VISION = {key: value for key, value in _CLIP_VISION.items() if key != "image_size"}
_SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "drop_path_rate": 0.2,
}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2], "drop_path_rate": 0.2}
_LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 16, 16],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
_PERCEIVER = {
    "num_latents": 4,
    "d_latents": 16,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "image_size": 8,
    "attention_probs_dropout_prob": 0.1,
}

IMAGE_CLASSIFIERS = {
    "BeitForImageClassification": {**_VIT, "drop_path_rate": 0.2, "use_relative_position_bias": True},
    "BitForImageClassification": {**_STAGES, "embedding_size": 8, "num_groups": 2},
    "CLIPForImageClassification": {"vision_config": _CLIP_VISION},
    "ConvNextForImageClassification": {**_STAGES, "num_stages": 2, "patch_size": 2},
    "ConvNextV2ForImageClassification": {**_STAGES, "num_stages": 2, "patch_size": 2},
    "CvtForImageClassification": {
        "embed_dim": [8, 8, 16],
        "num_heads": [1, 2, 2],
        "depth": [1, 2, 3],
        "drop_rate": [0.1, 0.1, 0.1],
        "attention_drop_rate": [0.1, 0.1, 0.1],
        "drop_path_rate": [0.0, 0.1, 0.2],
    },
    "Data2VecVisionForImageClassification": {
        **_VIT,
        "drop_path_rate": 0.2,
        "use_shared_relative_position_bias": True,
        "out_indices": [0, 1],
    },
    "DeiTForImageClassification": _VIT,
    "DeiTForImageClassificationWithTeacher": _VIT,
    "Dinov2ForImageClassification": {**_VIT, "drop_path_rate": 0.2},
    "Dinov2WithRegistersForImageClassification": {**_VIT, "drop_path_rate": 0.2},
    "DonutSwinForImageClassification": _SWIN,
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.025,
        "depth_coefficient": 1.0,
        "hidden_dim": 32,
        "kernel_sizes": [3, 5],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 2],
        "drop_connect_rate": 0.5,
    },
    "FocalNetForImageClassification": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "hidden_dropout_prob": 0.1,
        "drop_path_rate": 0.2,
    },
    "HGNetV2ForImageClassification": {
        "embedding_size": 8,
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8],
        "stage_mid_channels": [8, 8],
        "stage_out_channels": [8, 16],
        "stage_num_blocks": [1, 1],
        "stage_downsample": [False, True],
        "stage_downsample_strides": [2, 2],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 3],
        "stage_numb_of_layers": [1, 1],
        "use_learnable_affine_block": True,
    },
    "HieraForImageClassification": {
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [4, 4],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "num_query_pool": 1,
        "masked_unit_size": [2, 2],
        "masked_unit_attention": [True, False],
        "drop_path_rate": 0.2,
    },
    "IJepaForImageClassification": _VIT,
    "ImageGPTForImageClassification": {"vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "LevitForImageClassification": _LEVIT,
    "LevitForImageClassificationWithTeacher": _LEVIT,
    "MetaClip2ForImageClassification": {"vision_config": _CLIP_VISION},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.125, "classifier_dropout_prob": 0.1},
    "MobileNetV2ForImageClassification": {
        "depth_multiplier": 0.125,
        "finegrained_output": False,
        "classifier_dropout_prob": 0.1,
    },
    "MobileViTForImageClassification": {
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
        "num_attention_heads": 2,
        "expand_ratio": 1.0,
        "attention_probs_dropout_prob": 0.1,
    },
    "MobileViTV2ForImageClassification": {
        "image_size": 64,
        "width_multiplier": 0.25,
        "base_attn_unit_dims": [32, 32, 32],
        "n_attn_blocks": [1, 1, 1],
        "attn_dropout": 0.1,
        "ffn_dropout": 0.1,
    },
    # The widths of their position encodings are fixed in the code.
    "PerceiverForImageClassificationLearned": {**_PERCEIVER, "d_model": 512},
    "PerceiverForImageClassificationFourier": {**_PERCEIVER, "d_model": 261},
    "PerceiverForImageClassificationConvProcessing": {**_PERCEIVER, "d_model": 322},
    "PoolFormerForImageClassification": {
        **_STAGES,
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "PPLCNetForImageClassification": {
        "stem_channels": 8,
        "block_configs": [[[3, 8, 8, 1, False]]] * 4 + [[[5, 8, 16, 2, True]]],
        "class_expand": 16,
    },
    "PvtForImageClassification": {
        **_STAGES,
        "image_size": 16,
        "num_encoder_blocks": 2,
        "sequence_reduction_ratios": [2, 1],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    "PvtV2ForImageClassification": {
        **_STAGES,
        "image_size": 16,
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "out_features": ["stage2"],
    },
    "RegNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "groups_width": 4,
    },
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "SegformerForImageClassification": {
        **_STAGES,
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    "ShieldGemma2ForImageClassification": {
        "vision_config": _CLIP_VISION,
        "text_config": {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": 4,
            "attention_dropout": 0.1,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 28,
        "eoi_token_index": 29,
        "image_token_index": 30,
        "yes_token_index": 3,
        "no_token_index": 4,
        "num_labels": 2,
    },
    "SiglipForImageClassification": {"vision_config": _CLIP_VISION},
    "Siglip2ForImageClassification": {"vision_config": {**_SIGLIP2_VISION, "num_patches": 4}},
    "SwiftFormerForImageClassification": {
        "depths": [1, 2],
        "embed_dims": [8, 16],
        "downsamples": [True, True],
        "mlp_ratio": 2,
        "drop_path_rate": 0.2,
        "drop_mlp_rate": 0.1,
        "drop_conv_encoder_rate": 0.1,
    },
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": {**_SWIN, "pretrained_window_sizes": [0, 0]},
    "TextNetForImageClassification": {
        "stem_out_channels": 8,
        "image_size": [16, 16],
        "conv_layer_kernel_sizes": [[[3, 3]], [[1, 3], [3, 1]]],
        "conv_layer_strides": [[2], [1, 2]],
        "hidden_sizes": [8, 8, 16],
    },
    "ViTForImageClassification": _VIT,
    "ViTMSNForImageClassification": _VIT,
}


def image_classifier(name: str) -> transformers.PreTrainedModel:
    """A tiny model of the class `name`, with the same weights every time."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**{"num_labels": NUM_LABELS, **IMAGE_CLASSIFIERS[name]}))


def inputs(name: str, count: int) -> dict[str, torch.Tensor]:
    """The inputs of `count` samples for the class `name`."""
    settings = IMAGE_CLASSIFIERS[name]
    if name == "ImageGPTForImageClassification":
        return {"input_ids": torch.randint(16, (count, 16))}
    if name == "Siglip2ForImageClassification":  # flattened patches; of the last sample's image one is padding
        mask = torch.ones(count, 4, dtype=torch.long)
        mask[-1, -1] = 0
        shapes = torch.tensor([[2, 2]] * (count - 1) + [[1, 3]])
        return {"pixel_values": torch.randn(count, 4, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if name == "ShieldGemma2ForImageClassification":
        prompt = torch.tensor([2, 28, 30, 30, 30, 30, 29, 5, 6])
        return {
            "input_ids": prompt.repeat(count, 1),
            "token_type_ids": (prompt == 30).long().repeat(count, 1),
            "attention_mask": torch.ones(count, len(prompt), dtype=torch.long),
            "pixel_values": torch.randn(count, 3, 8, 8),
        }
    size = settings.get("vision_config", settings).get("image_size", 32)
    images = torch.randn(count, 3, *(size if isinstance(size, list) else (size, size)))
    return {"inputs" if name.startswith("Perceiver") else "pixel_values": images}
