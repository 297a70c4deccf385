"""Tiny diffusers pipelines with random weights, as a user would find them in a folder."""

import json

import torch

from d2o.interop.torchvision_compat import ensure

ensure()

SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
"""What the schedulers of SD1.5 and SDXL agree on."""


def clip_tokenizer(folder):
    """CLIP's tokenizer with bytes for a vocabulary."""
    from transformers import CLIPTokenizer

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )


def enlarge(network, part, factor):
    """Random weights as they come leave the text next to no influence on the image, and a test of it would see
    nothing."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if part in name and weight.ndim == 2:
                weight.mul_(factor)
    return network


def t5_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import T5TokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([(word, -i / 100) for i, word in enumerate(words)], unk_id=2)),
        extra_ids=0,
    )


def clip(width=32, projection=None, layers=2):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        projection_dim=projection or width,
    )
    encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    return enlarge(encoder, "token_embedding", 30)


def vae(channels=4, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **options,
    ).eval()


def unet(**options):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return enlarge(UNet2DConditionModel(**(settings | options)).eval(), "attn2.to_", 4)


def stable_diffusion(tmp_path, scheduler=None, **unet_options):
    """A StableDiffusionPipeline; `scheduler`: DDIM with SD1.5's settings unless given."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(tmp_path / "words"),
        unet=unet(**unet_options),
        scheduler=scheduler or DDIMScheduler(**SD_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(tmp_path, projection=24, **options):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    words = clip_tokenizer(tmp_path / "words")
    network = unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=projection + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(projection=projection),
        tokenizer=words,
        tokenizer_2=words,
        unet=network,
        scheduler=DDIMScheduler(**SD_SCHEDULER),
        add_watermarker=False,
        **options,
    )


def stable_diffusion_3(tmp_path, t5=False, shift=3.0):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = clip_tokenizer(tmp_path / "words")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=80,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
    ).eval()
    config = T5Config(vocab_size=600, d_model=80, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=16),
        tokenizer=words,
        text_encoder_2=clip(projection=24),
        tokenizer_2=words,
        text_encoder_3=T5EncoderModel(config).eval() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def unconditional(pipeline="DDPMPipeline", scheduler=None, **options):
    """A DDPMPipeline or DDIMPipeline with a UNet2DModel."""
    import diffusers

    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    network = diffusers.UNet2DModel(**(settings | options)).eval()
    return getattr(diffusers, pipeline)(network, scheduler or diffusers.DDPMScheduler())
