"""The demo's pipeline before training: small models of diffusers' and transformers' own classes."""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffusers_draft.tools.demo.scenes import WORDS

LATENT_CHANNELS = 12
TEXT_DIM = 64
FLOW_SHIFT = 3.0
"""Shift of the noise levels towards high noise, in sampling and training, as in Wan."""


def untrained_pipeline(seed: int) -> WanPipeline:
    """Build the pipeline with random weights, on the CPU in float32.

    A token of its transformer is 8 x 8 pixels of two frames (of one in the beginning); captions are words of
    `scenes.WORDS`, which a text encoder of two layers reads.

    Args:
        seed: seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = WanPipeline(
            tokenizer=word_tokenizer(),
            text_encoder=UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(WORDS) + 4,
                    d_model=TEXT_DIM,
                    d_kv=16,
                    d_ff=192,
                    num_layers=2,
                    num_heads=4,
                    dropout_rate=0.0,
                )
            ),
            vae=AutoencoderKLWan(
                base_dim=16,
                decoder_base_dim=24,
                z_dim=LATENT_CHANNELS,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[True],
                latents_mean=[0.0] * LATENT_CHANNELS,
                latents_std=[1.0] * LATENT_CHANNELS,
                in_channels=12,  # 2 x 2 pixels
                out_channels=12,
                patch_size=2,
                scale_factor_temporal=2,
                scale_factor_spatial=4,
            ),
            transformer=WanTransformer3DModel(
                num_attention_heads=3,
                attention_head_dim=64,
                ffn_dim=768,
                num_layers=6,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                text_dim=TEXT_DIM,
                freq_dim=64,
                rope_max_seq_len=256,
            ),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
            ),
        )
        _start_well(pipe.vae)
    return pipe


@torch.no_grad()
def _start_well(vae: AutoencoderKLWan) -> None:
    """Initialize the autoencoder to train faster: convolutions that keep the variance, latents with little noise."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0  # log-variances


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each word of a caption and for the comma."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", ",", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
