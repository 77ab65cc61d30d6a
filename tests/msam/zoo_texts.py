"""The models of transformers in the zoo."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Entry = tuple[Callable[[], nn.Module], Callable[[int], Any]]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, "dropout": 0.0,
}  # fmt: skip
PICTURE = {"image_size": 32, "patch_size": 8, "num_channels": 3}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def words(examples: int, labels: str = "labels", mask: bool = True, **more: Tensor) -> dict[str, Tensor]:
    """Texts of 6 words, every second one of 4, with a class."""
    ids = torch.randint(3, 50, (examples, 6), generator=torch.Generator().manual_seed(1))
    if mask:
        ids[::2, 4:] = 0
    masks = {"attention_mask": (ids > 0).long()} if mask else {}
    return {"input_ids": ids, **masks, labels: torch.arange(examples) % 3, **more}


def next_words(examples: int, **more: Any) -> dict[str, Tensor]:
    """The same with a label for each word, all of which count."""
    ids = words(examples, mask=False)["input_ids"]
    return {"input_ids": ids, "labels": ids.clone(), **more}


def pictures(examples: int) -> dict[str, Tensor]:
    return {"pixel_values": random(examples, 3, 32, 32), "labels": torch.arange(examples) % 3}


def pairs(examples: int) -> dict[str, Tensor]:
    """Pictures with texts, whose classes are only here so that the loss is by example."""
    return words(examples, labels="target") | {"pixel_values": random(examples, 3, 32, 32)}


def sounds(examples: int) -> dict[str, Tensor]:
    return {"input_values": random(examples, 400), "labels": torch.arange(examples) % 3}


def spectrograms(examples: int) -> dict[str, Tensor]:
    return {
        "input_features": random(examples, 8, 16),
        "labels": torch.arange(12 * examples).view(examples, -1)[:, :5] % 50,
    }


def of(
    kind: str, task: str = "ForSequenceClassification", batch: Callable[[int], Any] = words, **options: Any
) -> Entry:
    """A model by the names of its configuration and its class."""
    usual = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**(usual | options))
        return getattr(transformers, f"{kind}{task}")(config)

    return build, batch


def clip() -> nn.Module:
    text = SMALL | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | PICTURE, projection_dim=8)

    class Towers(nn.Module):
        """The two towers of CLIP. Its own loss compares every example with every other."""

        def __init__(self) -> None:
            super().__init__()
            self.clip = transformers.CLIPModel(config)

        def forward(self, **given: Tensor) -> Tensor:
            out = self.clip(**given)
            return out.image_embeds * out.text_embeds

    return Towers()


CAUSAL = {"task": "ForCausalLM", "batch": next_words}

TRANSFORMERS: dict[str, Entry] = {
    "BERT": of("Bert", **SMALL, **QUIET),
    "BERT, tied masked LM": of("Bert", "ForMaskedLM", next_words, **SMALL, **QUIET),
    "RoBERTa": of("Roberta", **SMALL, **QUIET),
    "DistilBERT": of("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, dropout=0.0, attention_dropout=0.0,
                     seq_classif_dropout=0.0),
    "ALBERT": of("Albert", **SMALL, **QUIET, embedding_size=8),
    "ELECTRA": of("Electra", **SMALL, **QUIET, embedding_size=8),
    "DeBERTa V2": of("DebertaV2", **SMALL, **QUIET, relative_attention=True, position_buckets=4, pooler_dropout=0.0,
                     pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", pooler_hidden_size=16),
    "MPNet": of("MPNet", **SMALL, **QUIET),
    "XLNet": of("XLNet", d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0.0, summary_last_dropout=0.0),
    "FNet": of("FNet", batch=partial(words, mask=False), **SMALL, hidden_dropout_prob=0.0),
    "ModernBERT": of("ModernBert", **SMALL, reference_compile=False, global_attn_every_n_layers=2, local_attention=4),
    "GPT-2": of("GPT2", n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0),
    "GPT-2, tied LM": of("GPT2", "LMHeadModel", next_words, n_embd=16, n_layer=2, n_head=2, n_positions=16,
                         resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "OPT": of("OPT", **CAUSAL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, dropout=0.0,
              word_embed_proj_dim=16, max_position_embeddings=16),
    "GPT-NeoX": of("GPTNeoX", **CAUSAL, **SMALL),
    "BLOOM": of("Bloom", **CAUSAL, hidden_size=16, n_layer=2, n_head=2),
    "Llama": of("Llama", **CAUSAL, **LLAMA),
    "Llama, classes": of("Llama", **LLAMA),
    "Mistral": of("Mistral", **CAUSAL, **LLAMA, sliding_window=4),
    "Mixtral": of("Mixtral", **CAUSAL, **LLAMA, num_local_experts=2, experts_implementation="eager"),
    "Qwen2": of("Qwen2", **CAUSAL, **LLAMA),
    "Qwen3": of("Qwen3", **CAUSAL, **LLAMA),
    "Gemma": of("Gemma", **CAUSAL, **LLAMA),
    "Gemma 2": of("Gemma2", **CAUSAL, **LLAMA),
    "Phi": of("Phi", **CAUSAL, **SMALL, resid_pdrop=0.0),
    "Cohere": of("Cohere", **CAUSAL, **LLAMA),
    "Falcon": of("Falcon", **CAUSAL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    "T5": of("T5", "ForConditionalGeneration", next_words, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
             dropout_rate=0.0, relative_attention_num_buckets=4, decoder_start_token_id=0),
    "BART": of("Bart", "ForConditionalGeneration", next_words, **BART, decoder_start_token_id=2),
    "Marian": of("Marian", "MTModel", next_words, **BART, decoder_start_token_id=2),
    "Mamba": of("Mamba", **CAUSAL, hidden_size=16, state_size=4, num_hidden_layers=1),
    "transformers ViT": of("ViT", "ForImageClassification", pictures, **SMALL, **PICTURE),
    "transformers Swin": of("Swin", "ForImageClassification", pictures, **PICTURE | {"patch_size": 4}, embed_dim=8,
                            depths=[1, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0),
    "transformers ConvNeXt": of("ConvNext", "ForImageClassification", pictures, hidden_sizes=[8, 8, 16, 16],
                                depths=[1, 1, 1, 1], num_stages=4),
    "DINOv2": of("Dinov2", "ForImageClassification", pictures, **SMALL, **PICTURE),
    "SegFormer": of("Segformer", "ForImageClassification", pictures, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                    num_attention_heads=[1, 1, 2, 2], drop_path_rate=0.0, classifier_dropout_prob=0.0),
    "CLIP": (clip, pairs),
    "Wav2Vec2": of("Wav2Vec2", batch=sounds, **SMALL, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4),
                   num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8, layerdrop=0.0,
                   hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0,
                   mask_time_prob=0.0, apply_spec_augment=False),
}  # fmt: skip
TRANSFORMERS["Whisper"] = of(
    "Whisper", "ForConditionalGeneration", spectrograms,
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    num_mel_bins=8, max_source_positions=8, max_target_positions=8, decoder_start_token_id=1,
)  # fmt: skip
