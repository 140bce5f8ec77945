"""Tiny pipelines with text encoders, saved to disk as a hub repository is, without downloads."""

from pathlib import Path
from typing import Any

import models
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a", "red", "green", "blue", "circle", "square", "moves", "left", "right", "over", "stripes"]


def seeded(build: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(config).eval()


def tokenizer(before: int = 0) -> PreTrainedTokenizerFast:
    """One token for each known word, after a number of tokens that are always there."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words_only = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("<|eot_id|>", "isolated")]
    )
    template = "<unk> " * before + "$A </s>"
    words_only.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", 1), ("<unk>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )


def text_encoder() -> UMT5EncoderModel:
    config = dict(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    return seeded(UMT5EncoderModel, UMT5Config(**config))


def wan(folder: Path, **config: Any) -> Path:
    base = models.wan_pipeline()
    parts = base.components | {"tokenizer": tokenizer(), "text_encoder": text_encoder()}
    WanPipeline(**parts | config).save_pretrained(folder)
    return folder


def wan_i2v(folder: Path) -> Path:
    """Of Wan 2.1: the image enters as channels of the latents and, through CLIP, by cross-attention."""
    transformer = dict(models.wan_i2v().config) | {"in_channels": 4 + 4 + 4, "image_dim": 8}
    vision = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    size = dict(image_size=8, patch_size=4)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=models.wan_vae(),
        scheduler=models.wan_scheduler(),
        image_processor=CLIPImageProcessor(crop_size=8, size=8),
        image_encoder=seeded(CLIPVisionModel, CLIPVisionConfig(**vision, **size)),
        transformer=models.build(WanTransformer3DModel, transformer),
    )
    pipe.save_pretrained(folder)
    return folder


def hunyuan_video(folder: Path, **sizes: int) -> Path:
    system = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    # The pipeline cuts off as many tokens as the real tokenizer makes of the system's part.
    before = DEFAULT_PROMPT_TEMPLATE["crop_start"] - (len(tokenizer()(system).input_ids) - 1)
    assert before > 0
    small = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2)
    llama = LlamaConfig(vocab_size=32, num_hidden_layers=3, num_key_value_heads=2, **small)
    clip = CLIPTextConfig(
        vocab_size=32, num_hidden_layers=1, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, **small
    )
    vae = dict(latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    pipe = HunyuanVideoPipeline(
        text_encoder=seeded(LlamaModel, llama),
        tokenizer=tokenizer(before),
        text_encoder_2=seeded(CLIPTextModel, clip),
        tokenizer_2=tokenizer(),
        vae=seeded(lambda config: AutoencoderKLHunyuanVideo(**config), vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=models.hunyuan_video(**sizes),
    )
    pipe.save_pretrained(folder)
    return folder
