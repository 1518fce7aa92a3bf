"""Small models of the families that ADSACache is for, with random weights, and one way to draw with each."""

import torch
import transformers

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PROMPT, TOKENS = 6, 25


def llama_config():
    return transformers.LlamaConfig(vocab_size=64, **TEXT, **SPECIAL)


def janus_config():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 20, "patch_size": 4}
    vq = {"embed_dim": 4, "num_embeddings": 64, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1]}
    return transformers.JanusConfig(
        text_config={"model_type": "llama", "vocab_size": 64, **TEXT, **SPECIAL},
        vision_config={**vision, "projection_dim": 32, "num_image_tokens": TOKENS},
        vq_config={**vq, "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32},
        image_token_id=5,
    )


def emu3_config():
    vocabulary = {"<image>": 3, "<|extra_200|>": 4, **{f"<|visual token {i:06d}|>": 16 + i for i in range(48)}}
    vq = {"codebook_size": 48, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    return transformers.Emu3Config(
        text_config={"vocab_size": 64, **TEXT, **SPECIAL},
        vq_config={**vq, "attn_resolutions": [], "hidden_size": 32, "embed_dim": 4, "latent_channels": 4},
        vocabulary_map=vocabulary,
    )


def chameleon_config():
    vocabulary = {"<image>": 3, **{f"IMGIMG{'ABCDEFGHIJ'[i]}Z": 50 + i for i in range(8)}}
    vq = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1]}
    return transformers.ChameleonConfig(
        vocab_size=64, vocabulary_map=vocabulary, vq_config={**vq, "num_res_blocks": 1}, **TEXT, **SPECIAL
    )


def glm_image_config():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 4}
    return transformers.GlmImageConfig(
        text_config={**TEXT, "vocab_size": 64, "vision_vocab_size": 40, "rope_parameters": rope, "pad_token_id": 0}
        | {"eos_token_id": 39},
        vision_config=vision,
        vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 16},
        image_token_id=60,
        image_start_token_id=38,
        image_end_token_id=39,
    )


CLASSES = {
    "llama": ("LlamaForCausalLM", llama_config),
    "janus": ("JanusForConditionalGeneration", janus_config),
    "emu3": ("Emu3ForConditionalGeneration", emu3_config),
    "chameleon": ("ChameleonForConditionalGeneration", chameleon_config),
    "glm_image": ("GlmImageForConditionalGeneration", glm_image_config),
}
FAMILIES = list(CLASSES)
if not hasattr(getattr(transformers, "GlmImageModel", None), "get_image_grids_for_generation"):
    FAMILIES.remove("glm_image")  # not there before transformers 5, and drawing single images in 5.0


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64):
    name, config = CLASSES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config()).to(dtype).eval()
    model.set_attn_implementation(attention)
    if family == "janus":
        model.generation_config.generation_kwargs = {"boi_token_id": 4}
    return model


def prompts(rows: int = 3, length: int = PROMPT):
    """Ids and mask ``[rows, length]``, padded on the left."""
    ids = torch.randint(6, 38, (rows, length), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(length) >= torch.tensor([0, 2, 4, 1])[:rows, None]
    return ids * valid, valid.long()


def draw(family: str, model, cache=None, seed: int = 0, inputs=None, **kwargs) -> torch.Tensor:
    """``[rows, TOKENS]``, through the model's own ``generate``."""
    ids, mask = inputs or prompts()
    arguments = {"max_new_tokens": TOKENS, "do_sample": True, "pad_token_id": 0, "bos_token_id": 1}
    arguments |= {"past_key_values": cache} if cache is not None else {}
    if family == "janus":  # 5.0 has no defaults for the last two
        arguments |= {"generation_mode": "image", "guidance_scale": 2.0, "num_return_sequences": 1}
        arguments |= {"max_length": ids.shape[1] + TOKENS}
    elif family == "glm_image":
        grids = torch.tensor([[1, 5, 5]]).repeat(len(ids), 1)
        arguments |= {"image_grid_thw": grids, "images_per_sample": torch.ones(len(ids), dtype=torch.long)}
    if family != "janus":
        arguments |= {"min_new_tokens": TOKENS, "suppress_tokens": [0]}  # of padding, embedding and values are zero
    torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=mask, **(arguments | kwargs))
    return out if family == "janus" or not torch.is_tensor(out) else out[:, ids.shape[1] :]
