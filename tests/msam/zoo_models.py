"""The models of the zoo: how each is built, and a batch for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import timm.models as tm
import torch
import torchvision.models as tv
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torchvision.models import mobilenetv3
from torchvision.models.googlenet import Inception

from tests.msam.zoo_texts import TRANSFORMERS

Entry = tuple[Callable[[], nn.Module], Callable[[int], Any]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def images(examples: int, size: int) -> tuple[Tensor, Tensor]:
    return random(examples, 3, size, size), torch.arange(examples) % 3


def of_timm(name: str, size: int = 32, **options: Any) -> Entry:
    return partial(timm.create_model, name, num_classes=3, **options), partial(images, size=size)


def of_images(build: Callable[..., nn.Module], size: int = 32, **options: Any) -> Entry:
    return partial(build, num_classes=3, **options), partial(images, size=size)


FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
ONE_EACH = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
NORMS = [tm.metaformer.LayerNorm2dNoBias, tm.metaformer.LayerNormNoBias]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)}
MLP = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2}
TWINS = {"img_size": 64, "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 2)}


def nfnet(num_classes: int) -> nn.Module:
    config = tm.nfnet.NfCfg(
        depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_type="3x3", stem_chs=8, group_size=8, num_features=32,
        attn_layer="se", attn_kwargs={"rd_ratio": 0.5}, act_layer="silu",
    )  # fmt: skip
    return tm.nfnet.NormFreeNet(config, num_classes=num_classes)


def stacked(*blocks: str, num_classes: int) -> nn.Module:
    """Blocks of the MobileNet and EfficientNet families, by timm's names for them."""
    described = decode_arch_def([[block] for block in blocks])
    return tm.efficientnet.EfficientNet(described, num_classes=num_classes, stem_size=8, num_features=16)


def ended(*blocks: nn.Module, channels: int, num_classes: int) -> nn.Module:
    """Blocks on a small stem, with a classifier behind them."""
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def mobilevit(kind: type[nn.Module], num_classes: int) -> nn.Module:
    options = {"transformer_dim": 16, "transformer_depth": 1, "patch_size": 2}
    options |= {"num_heads": 2} if kind is tm.mobilevit.MobileVitBlock else {}
    return ended(kind(8, 8, **options), channels=8, num_classes=num_classes)


def bottlenecks(num_classes: int) -> nn.Module:
    first, second = tv.resnet.Bottleneck(8, 2), tv.resnet.Bottleneck(8, 2, groups=2, base_width=128)
    return ended(first, second, channels=8, num_classes=num_classes)


TIMM: dict[str, Entry] = {
    "ResNet": of_timm("resnet18", channels=(8, 8, 16, 16)),
    "ResNeXt": of_timm("resnext50_32x4d", **ONE_EACH, cardinality=4, base_width=32),
    "SE-ResNet": of_timm("seresnet18", channels=(8, 8, 16, 16)),
    "ECA-ResNet": of_timm("ecaresnet26t", **ONE_EACH, stem_width=8),
    "ResNetV2": of_timm("resnetv2_18", **ONE_EACH, stem_chs=8),
    "Wide ResNet": of_timm("wide_resnet50_2", layers=(1, 1, 1, 1), channels=(4, 4, 8, 8)),
    "ResNeSt": of_timm("resnest14d", **ONE_EACH, stem_width=4),
    "SK-ResNet": of_timm("skresnet18", layers=(1, 1, 1, 1), channels=(32, 32, 32, 32)),
    "Res2Net": of_timm("res2net50_26w_4s", **ONE_EACH),
    "MobileNetV2": of_images(partial(stacked, "ds_r1_k3_s1_c8", "ir_r2_k3_s2_e3_c16")),
    "MobileNetV3": of_images(partial(stacked, "ds_r1_k3_s1_c8_se0.25_nre", "ir_r2_k5_s2_e3_c16_se0.25")),
    "MobileNetV4": of_images(partial(stacked, "uir_r1_a3_k5_s2_e2_c16", "uir_r1_a0_k3_s1_e2_c16")),
    "CondConv": of_images(partial(stacked, "ir_r1_k3_s2_e2_c16_cc2")),
    "MobileViT": of_images(partial(mobilevit, tm.mobilevit.MobileVitBlock)),
    "MobileViTv2": of_images(partial(mobilevit, tm.mobilevit.MobileVitV2Block)),
    "MaxViT": of_images(
        tm.maxxvit.MaxxVit, 32, img_size=32,
        cfg=tm.maxxvit.MaxxVitCfg(
            embed_dim=(32,), depths=(1,), block_type=("M",), stem_width=8,
            transformer_cfg=tm.maxxvit.MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4)),
        ),
    ),
    "CAFormer": of_images(
        tm.metaformer.MetaFormer, 32, depths=(1, 1), dims=(8, 32), norm_layers=NORMS,
        token_mixers=[tm.metaformer.SepConv, tm.metaformer.Attention],
    ),
    "VOLO": of_images(
        tm.volo.VOLO, layers=(1, 1), img_size=32, embed_dims=(8, 8), num_heads=(2, 2), downsamples=(True, False),
        outlook_attention=(True, False), stem_hidden_dim=8, post_layers=("ca",), use_mix_token=False,
    ),
    "EfficientNet": of_timm("test_efficientnet", 48),
    "DLA": of_timm("dla34", 64, channels=(4, 4, 8, 8, 8, 8)),
    "DenseNet": of_images(tm.densenet.DenseNet, 64, growth_rate=4, block_config=(2, 2, 1)),
    "NFNet": of_images(nfnet, 64),
    "ConvNeXt": of_timm("convnext_atto", **FOUR),
    "ConvNeXt V2": of_timm("convnextv2_atto", **FOUR),
    "ViT": of_timm("vit_tiny_patch16_224", **VIT),
    "ViT, no token, QK norm": of_timm(
        "vit_tiny_patch16_224", **VIT, class_token=False, global_pool="avg", qk_norm=True
    ),
    "ViT, relative positions": of_timm("vit_srelpos_small_patch16_224", **VIT),
    "DeiT distilled": of_timm("deit_tiny_distilled_patch16_224", **VIT),
    "DeiT III": of_timm("deit3_small_patch16_224", **VIT),
    "BEiT": of_timm("beit_base_patch16_224", **VIT),
    "EVA-02": of_timm("eva02_tiny_patch14_224", **VIT),
    "Swin": of_timm("swin_tiny_patch4_window7_224", **SWIN),
    "Swin V2": of_timm("swinv2_tiny_window8_256", **SWIN),
    "MLP-Mixer": of_images(tm.mlp_mixer.MlpMixer, **MLP),
    "ResMLP": of_images(
        tm.mlp_mixer.MlpMixer, **MLP, block_layer=tm.mlp_mixer.ResBlock, norm_layer=tm.mlp_mixer.Affine, mlp_ratio=4
    ),
    "gMLP": of_images(
        tm.mlp_mixer.MlpMixer, **MLP, block_layer=tm.mlp_mixer.SpatialGatingBlock, mlp_layer=timm.layers.GatedMlp,
        mlp_ratio=4
    ),
    "PoolFormer": of_images(
        tm.metaformer.MetaFormer, 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)
    ),
    "PiT": of_timm("pit_ti_224", 64, img_size=64, base_dims=(8, 8, 8), heads=(1, 2, 4), depth=(1, 1, 1)),
    "CaiT": of_timm("cait_xxs24_224", **VIT),
    "XCiT": of_timm("xcit_nano_12_p8_224", img_size=32, embed_dim=16, depth=2, num_heads=2),
    "ConViT": of_timm("convit_tiny", **(VIT | {"depth": 3}), local_up_to_layer=2),
    "TNT": of_timm("tnt_s_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads_outer=3),
    "Visformer": of_timm("visformer_tiny", 64, img_size=64, embed_dim=24, depth=(1, 1, 1), num_heads=3),
    "CoAtNet": of_images(
        tm.maxxvit.MaxxVit, 32, img_size=32,
        cfg=tm.maxxvit.MaxxVitCfg(embed_dim=(32, 32), depths=(1, 1), block_type=("C", "T"), stem_width=8),
    ),
    "LeViT": of_timm("levit_128s", 64, img_size=64, embed_dim=(16, 16, 32), num_heads=(2, 2, 2), depth=(1, 1, 1)),
    "CrossViT": of_images(
        tm.crossvit.CrossVit, 48, img_size=48, img_scale=(1.0, 1.0), patch_size=(12, 16), embed_dim=(12, 24),
        depth=((1, 1, 0),), num_heads=(2, 2), mlp_ratio=(2.0, 2.0, 1.0),
    ),
    "CoaT": of_timm("coat_lite_tiny", 64, img_size=64, embed_dims=(8, 8, 16, 16), serial_depths=(1, 1, 1, 1)),
    "Twins SVT": of_timm("twins_svt_small", 64, **TWINS, depths=(2, 2, 2, 2), wss=(2, 2, 2, 2)),
    "Twins PCPVT": of_timm("twins_pcpvt_small", 64, **TWINS, depths=(1, 1, 1, 1)),
    "PVT v2": of_timm("pvt_v2_b0", 64, embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1)),
    "EdgeNeXt": of_timm("edgenext_xx_small", 64, dims=(8, 8, 16, 32), depths=(2, 2, 2, 2)),
    "FocalNet": of_images(tm.focalnet.FocalNet, 64, embed_dim=8, depths=(1, 1, 1, 1)),
    "NesT": of_images(
        tm.nest.Nest, 64, img_size=64, num_levels=2, embed_dims=(16, 16), num_heads=(2, 2), depths=(1, 1)
    ),
    "FastViT": of_timm("fastvit_t8", 64, embed_dims=(8, 8, 16, 32), layers=(1, 1, 1, 1)),
    "RepVGG": of_timm("test_byobnet", 32),
    "RepViT": of_timm("repvit_m0_9", 64, embed_dim=(8, 8, 16, 16), depth=(1, 1, 1, 1)),
    "Hiera": of_timm("hiera_tiny_224", 64, img_size=64, embed_dim=8, num_heads=1, stages=(1, 1, 1, 1)),
    "MambaOut": of_timm("mambaout_femto", 64, **FOUR),
    "ConvMixer": of_images(tm.convmixer.ConvMixer, dim=16, depth=2),
    "InceptionNeXt": of_timm("inception_next_atto", 64, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1)),
    "FasterNet": of_timm("fasternet_t0", 64, embed_dim=16, depths=(1, 1, 1, 1)),
    "SwiftFormer": of_timm("swiftformer_xs", 64, embed_dims=(8, 8, 16, 16), layers=(1, 1, 1, 1)),
    "Sequencer": of_images(
        tm.sequencer.Sequencer2d, 28, img_size=28, layers=(1, 1), patch_sizes=(7, 1), embed_dims=(8, 8),
        hidden_sizes=(2, 2), mlp_ratios=(2.0, 2.0),
    ),
}  # fmt: skip


def segmentation(name: str, num_classes: int) -> nn.Module:
    """A head of torchvision on a small body."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    body = tv._utils.IntermediateLayerGetter(nn.Sequential(body), {"0": "out"})
    heads = {"deeplab": tv.segmentation.deeplabv3.DeepLabHead, "fcn": tv.segmentation.fcn.FCNHead}
    if name == "deeplab":
        pyramid = tv.segmentation.deeplabv3.ASPP(8, [2, 3], 8)
        head = nn.Sequential(pyramid, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        return tv.segmentation.DeepLabV3(body, nn.Sequential(head, nn.Conv2d(8, num_classes, 1)))
    return tv.segmentation.FCN(body, heads[name](8, num_classes))


def vgg(num_classes: int) -> nn.Module:
    """VGG's own classifier has a hundred million weights."""
    features = tv.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(1024, num_classes))


def inception(num_classes: int) -> nn.Module:
    """The block of GoogLeNet, whose whole is too large."""
    return ended(Inception(8, 4, 4, 8, 4, 8, 8), channels=28, num_classes=num_classes)


TORCHVISION: dict[str, Entry] = {
    "torchvision ResNet": of_images(bottlenecks),
    "torchvision MobileNetV2": of_images(
        tv.MobileNetV2, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [3, 24, 2, 2]], dropout=0.0
    ),
    "torchvision MobileNetV3": of_images(
        tv.MobileNetV3, last_channel=16, dropout=0.0,
        inverted_residual_setting=[mobilenetv3.InvertedResidualConfig(16, 3, 24, 16, True, "HS", 2, 1, 1.0)],
    ),
    "torchvision ViT": of_images(
        tv.VisionTransformer, image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24
    ),
    "torchvision Swin": of_images(
        tv.SwinTransformer, patch_size=[4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4],
        stochastic_depth_prob=0.0,
    ),
    "torchvision Swin V2": of_images(
        tv.SwinTransformer, patch_size=[4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4],
        stochastic_depth_prob=0.0, block=tv.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=tv.swin_transformer.PatchMergingV2,
    ),
    "torchvision ConvNeXt": of_images(
        tv.ConvNeXt,
        block_setting=[tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)],
    ),
    "torchvision MaxViT": of_images(
        tv.MaxVit, 32, input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[8, 8],
        block_layers=[1, 1], head_dim=4, stochastic_depth_prob=0.0,
    ),
    "torchvision EfficientNet": of_images(
        tv.EfficientNet, 48, dropout=0.0, stochastic_depth_prob=0.0,
        inverted_residual_setting=[
            tv.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1), tv.efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2),
        ],
    ),
    "torchvision SqueezeNet": of_images(tv.SqueezeNet, 32, version="1_1", dropout=0.0),
    "torchvision ShuffleNet": of_images(
        tv.ShuffleNetV2, 64, stages_repeats=[1, 1, 1], stages_out_channels=[8, 8, 16, 32, 32]
    ),
    "torchvision VGG": of_images(vgg, 32),
    "torchvision Inception block": of_images(inception, 32),
    "torchvision DenseNet": of_images(tv.DenseNet, 64, growth_rate=4, block_config=(2, 2), num_init_features=8),
    "torchvision RegNet": of_images(
        tv.RegNet, 48, block_params=tv.regnet.BlockParams.from_init_params(
            depth=2, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
        ), stem_width=8,
    ),
    "torchvision DeepLabV3": of_images(partial(segmentation, "deeplab")),
    "torchvision FCN": of_images(partial(segmentation, "fcn")),
}  # fmt: skip
ZOO: dict[str, Entry] = {**TIMM, **TORCHVISION, **TRANSFORMERS}
