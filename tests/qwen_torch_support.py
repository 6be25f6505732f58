"""transformers' Qwen2.5-VL with the sizes of ``qwen_support.TINY`` (needs torch)."""

import dataclasses

import torch
from qwen_support import MEDIA, SPECIAL, TINY, tokenizer
from torch_support import randomize
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig

PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO = (tokenizer().convert_tokens_to_ids(s) for s in SPECIAL)


def build(config: MllmConfig):
    """transformers' model with the sizes of ``config``."""
    text, vision = config.language, config.vision
    rope = {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": list(text.rope_sections)}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": text.vocab,
                "hidden_size": text.width,
                "intermediate_size": text.mlp,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "num_key_value_heads": text.kv_heads,
                "rms_norm_eps": text.norm_eps,
                "bos_token_id": START,
                "eos_token_id": END,
                "pad_token_id": PAD,
                "rope_parameters": rope,
            },
            vision_config={
                "depth": vision.depth,
                "hidden_size": vision.width,
                "intermediate_size": vision.mlp,
                "num_heads": vision.heads,
                "out_hidden_size": vision.out_width,
                "tokens_per_second": 2,
                "window_size": vision.window,
                "fullatt_block_indexes": list(vision.full_attention_layers),
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=text.tied,
        )
    )


def reference_model(tied: bool = False):
    """transformers' model with the sizes of ``TINY`` and random weights."""
    return randomize(build(MllmConfig(dataclasses.replace(TINY.language, tied=tied), TINY.vision)))


def run_reference(model, prompts, explicit_positions, dtype=torch.float32, media_config=MEDIA):
    """Features of every medium, and layers, hidden states and logits of the real tokens of every prompt."""
    inputs = Prompter(tokenizer(), PromptConfig(pad_left=True, media=media_config)).batch(
        prompts, length=max(len(prompt.tokens) for prompt in prompts)
    )
    ids, mask = torch.from_numpy(inputs.tokens).long(), torch.from_numpy(inputs.mask)
    media = [patches for prompt in prompts for patches, _ in prompt.media]
    images = [patches for patches in media if patches.seconds is None]
    videos = [patches for patches in media if patches.seconds is not None]

    def values(group):
        return torch.cat([torch.from_numpy(patches.values) for patches in group]).to(dtype)

    def grids(group):
        return torch.tensor([patches.grid for patches in group])

    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    arguments = {"input_ids": ids, "attention_mask": mask.long(), "mm_token_type_ids": kinds}
    if explicit_positions:
        arguments["position_ids"] = torch.from_numpy(inputs.positions).long()
    if images:
        arguments |= {"pixel_values": values(images), "image_grid_thw": grids(images)}
    if videos:
        arguments |= {"pixel_values_videos": values(videos), "video_grid_thw": grids(videos)}
    if videos and not media_config.timestamps:
        arguments["second_per_grid_ts"] = torch.tensor([patches.seconds for patches in videos])
    before_norm = []
    hook = model.model.language_model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.no_grad():
        model.model.rope_deltas = None
        out = model(**arguments, output_hidden_states=True, use_cache=False)
        features = [model.model.visual(values([p]), grid_thw=grids([p])).pooler_output for p in media]
    hook.remove()
    layers = torch.stack([*out.hidden_states[1:-1], before_norm[0]])
    return [x.float().numpy() for x in (*features, layers[:, mask], out.hidden_states[-1][mask], out.logits[mask])]


def arguments_of(prompt, timestamps=False):
    """What transformers reads of one prompt."""
    ids = torch.from_numpy(prompt.tokens).long()[None]
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    for kind, video in (("", False), ("_videos", True)):
        group = [patches for patches, _ in prompt.media if (patches.seconds is not None) == video]
        if group:
            arguments[f"pixel_values{kind}"] = torch.cat([torch.from_numpy(patches.values) for patches in group])
            arguments["video_grid_thw" if video else "image_grid_thw"] = torch.tensor([p.grid for p in group])
        if group and video and not timestamps:
            arguments["second_per_grid_ts"] = torch.tensor([patches.seconds for patches in group])
    return arguments


def greedy(model, prompt, most, timestamps=False):
    """The tokens that transformers writes after one prompt, without the one that ends the text."""
    arguments = arguments_of(prompt, timestamps)
    model.model.rope_deltas = None
    written = model.generate(**arguments, do_sample=False, max_new_tokens=most, eos_token_id=END, pad_token_id=PAD)
    text = written[0, arguments["input_ids"].shape[1] :].tolist()
    return text[: text.index(END)] if END in text else text
