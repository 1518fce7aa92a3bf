"""Sizes, names, shapes, initial values and positions of the registered models, against the released ones' facts."""

import math

import pytest
import torch
from torch import nn

from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.models.rope import apply_rope, rope_table

# name: layers, heads, dim, FFN, parameters with 1000 classes, parameters with 2048-dimensional text features
SIZES = {
    "GPT-B": (12, 12, 768, 2048, 110_888_448, 112_282_368),
    "GPT-L": (24, 16, 1024, 2816, 342_910_976, 345_031_680),
    "GPT-XL": (36, 20, 1280, 3584, 774_699_520, 777_678_080),
    "GPT-XXL": (48, 24, 1536, 4096, 1_410_972_672, 1_414_940_160),
    "GPT-XXXL": (48, 40, 2560, 6912, 3_893_027_840, 3_902_261_760),
    "GPT-1B": (22, 32, 2048, 5632, 1_199_616_000, 1_205_954_560),
    "GPT-3B": (24, 32, 3200, 8704, 3_096_659_200, 3_110_249_600),
    "GPT-7B": (32, 32, 4096, 11008, 6_614_589_440, 6_635_655_168),
}
TEXT = {"model_type": "t2i", "cls_token_num": 120}


def on_meta(name: str, **kwargs) -> Transformer:
    with torch.device("meta"):
        return GPT_models[name](**kwargs)


def tiny(**changes) -> Transformer:
    sizes = {"dim": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500, "num_classes": 300, "block_size": 16}
    return Transformer(ModelArgs(**{**sizes, **changes}))


def expected_shapes(name: str, text: bool, vocab: int = 16384, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    layers, _, dim, ffn, *_ = SIZES[name]
    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    if text:
        shapes |= {
            "cls_embedding.uncond_embedding": (120, 2048),
            "cls_embedding.cap_proj.fc1.weight": (dim, 2048),
            "cls_embedding.cap_proj.fc2.weight": (dim, dim),
        }
    else:
        shapes["cls_embedding.embedding_table.weight"] = (classes + 1, dim)
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * dim, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (ffn, dim),
            f"layers.{i}.feed_forward.w3.weight": (ffn, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, ffn),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    return shapes


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_registered_size(name, text):
    model = on_meta(name, **(TEXT if text else {}))
    layers, heads, dim, ffn, *parameters = SIZES[name]
    config = model.config
    assert (config.n_layer, config.n_head, config.dim, config.ffn_dim) == (layers, heads, dim, ffn)
    assert config.head_dim == dim // heads
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters[text]
    assert shapes_of(model) == expected_shapes(name, text)
    assert len(model.state_dict()) == 7 * layers + (6 if text else 4)
    # The null prompt is a buffer: saved and loaded, never trained.
    buffers = {key: tensor.numel() for key, tensor in model.named_buffers()}
    assert buffers == ({"cls_embedding.uncond_embedding": 245_760} if text else {})


def test_key_counts_of_released_files():
    assert len(expected_shapes("GPT-B", text=False)) == 88
    assert len(expected_shapes("GPT-XL", text=True)) == 258


def test_the_demo_is_registered_beside_the_official_sizes():
    assert GPT_models.keys() >= SIZES.keys() | {"GPT-Demo"}
    assert sum(tensor.numel() for tensor in on_meta("GPT-Demo").parameters()) < 50e6


def test_image_size_touches_no_weight():
    assert shapes_of(on_meta("GPT-B", block_size=256)) == shapes_of(on_meta("GPT-B", block_size=576))


def test_vocabulary_and_classes():
    model = on_meta("GPT-B", vocab_size=4096, num_classes=98)
    assert shapes_of(model) == expected_shapes("GPT-B", text=False, vocab=4096, classes=98)
    without_null = on_meta("GPT-B", num_classes=98, class_dropout_prob=0.0)
    assert without_null.cls_embedding.embedding_table.num_embeddings == 98


def test_grouped_query_attention_shapes():
    model = on_meta("GPT-B", n_kv_head=4)
    assert model.layers[0].attention.wqkv.weight.shape == ((12 + 2 * 4) * 64, 768)
    assert model.layers[0].attention.wo.weight.shape == (768, 768)


@pytest.mark.parametrize(
    ("changes", "ffn"),
    [({}, 2048), ({"ffn_dim_multiplier": 1.3}, 2816), ({"multiple_of": 1000}, 3000), ({"dim": 64, "n_head": 1}, 256)],
)
def test_ffn_size(changes, ffn):
    """int(2 / 3 * 4 * dim), times the multiplier, rounded up: 2048 (2662.4 with 1.3, so 11 * 256)."""
    assert ModelArgs(**{"dim": 768, "n_head": 12, **changes}).ffn_dim == ffn


def test_defaults():
    args = ModelArgs()
    expected = {
        "dim": 4096,
        "n_layer": 32,
        "n_head": 32,
        "n_kv_head": None,
        "multiple_of": 256,
        "ffn_dim_multiplier": None,
        "rope_base": 10000,
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
        "token_dropout_p": 0.1,
        "attn_dropout_p": 0.0,
        "resid_dropout_p": 0.1,
        "ffn_dropout_p": 0.1,
        "drop_path_rate": 0.0,
        "num_classes": 1000,
        "caption_dim": 2048,
        "class_dropout_prob": 0.1,
        "model_type": "c2i",
        "vocab_size": 16384,
        "cls_token_num": 1,
        "block_size": 256,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "changes", [{"model_type": "i2t"}, {"block_size": 250}, {"dim": 66}, {"n_kv_head": 3}], ids=lambda c: next(iter(c))
)
def test_impossible_arguments(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        tiny(**changes)


# Initial values


@pytest.mark.parametrize("text", [False, True])
def test_initial_values(text):
    torch.manual_seed(0)
    model = tiny(**({**TEXT, "caption_dim": 96} if text else {}))
    for key, tensor in model.state_dict().items():
        if key == "output.weight":
            assert not tensor.any()
        elif "norm" in key:
            assert (tensor == 1).all()
        else:
            std = 1 / math.sqrt(96) if "uncond" in key else 0.02
            # five standard errors of the estimate
            assert abs(tensor.std().item() / std - 1) < 5 / math.sqrt(2 * tensor.numel()), key
            assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel()), key
    assert model.output.weight is not model.tok_embeddings.weight


def test_a_new_model_predicts_uniformly():
    """As its output weights are zero."""
    tokens = torch.randint(500, (2, 16))
    _, loss = tiny().eval()(tokens[:, :-1], torch.tensor([0, 7]), targets=tokens)
    assert loss.item() == pytest.approx(math.log(500))


# Positions


def test_rope_values():
    table = rope_table(grid_size=4, head_dim=16, cls_token_num=1)
    assert table.shape == (17, 8, 2) and table.dtype == torch.float32
    still = [[1.0, 0.0]] * 4
    turned = [[0.540302, 0.841471], [0.995004, 0.099833], [0.99995, 0.01], [1.0, 0.001]]
    assert not table[0].any()
    for row, expected in ((1, still + still), (2, still + turned), (5, turned + still), (6, turned + turned)):
        torch.testing.assert_close(table[row], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("grid", "head_dim", "condition"), [(16, 64, 1), (24, 100, 1), (32, 64, 120), (24, 128, 120)])
def test_rope_for_every_position(grid, head_dim, condition):
    """Row r and column c at every place, in double precision; 100 is the head dimension of GPT-3B."""
    table = rope_table(grid, head_dim, cls_token_num=condition)
    assert table.shape == (condition + grid * grid, head_dim // 2, 2)
    assert not table[:condition].any()
    half = head_dim // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2).double() / half)
    assert len(frequencies) == half // 2
    positions = torch.arange(grid * grid)
    angles = torch.cat([torch.outer(positions // grid, frequencies), torch.outer(positions % grid, frequencies)], dim=1)
    expected = torch.stack([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(table[condition:].double(), expected, atol=1e-5, rtol=0)


def test_rotation_turns_neighbouring_dimensions():
    table = rope_table(grid_size=2, head_dim=4, cls_token_num=1)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 5, 1, 4)
    out = apply_rope(x, table)[0, :, 0]
    cos, sin = math.cos(1), math.sin(1)
    row, column = [cos - 2 * sin, 2 * cos + sin], [3 * cos - 4 * sin, 4 * cos + 3 * sin]
    expected = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [1, 2, *column], [*row, 3, 4], [*row, *column]])
    torch.testing.assert_close(out, expected.float())


def test_rotation_is_computed_in_float32():
    torch.manual_seed(0)
    table, x = rope_table(4, 16, cls_token_num=1), torch.randn(2, 17, 3, 16)
    half = x.bfloat16()
    assert apply_rope(half, table).dtype == torch.bfloat16
    assert torch.equal(apply_rope(half, table), apply_rope(half.float(), table).bfloat16())


def test_the_position_table_is_no_weight():
    """So it is neither saved nor cast, and is there even in a model that was built on the meta device."""
    model = tiny()
    table = model.freqs_cis.clone()
    model.to(torch.bfloat16)
    assert model.freqs_cis.dtype == torch.float32 and torch.equal(model.freqs_cis, table)
    assert not any("freqs_cis" in key for key in model.state_dict())
    with torch.device("meta"):
        assert torch.equal(tiny().freqs_cis, table)


def test_blocks_for_fsdp():
    model = tiny()
    assert model.get_fsdp_wrap_module_list() == list(model.layers) and len(model.layers) == 2
