"""Reading, fitting and writing weight files, with real files, whole and broken."""

import argparse
import os
import pickle
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autoregressive.models.checkpoint import CheckpointError, load_model, read_state_dict, save_safetensors
from autoregressive.models.gpt import ModelArgs, Transformer
from tokenizer.tokenizer_image.vq_model import ModelArgs as VQArgs
from tokenizer.tokenizer_image.vq_model import VQModel

ROOT = Path(__file__).resolve().parents[3]


def gpt(**changes) -> Transformer:
    sizes = {
        "dim": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 24,
        "num_classes": 5,
        "block_size": 4,
        "caption_dim": 6,
    }
    return Transformer(ModelArgs(**{**sizes, **changes}))


def gpt_t2i(**changes) -> Transformer:
    return gpt(model_type="t2i", cls_token_num=3, **changes)


def vq(**changes) -> VQModel:
    sizes = {"ch": 8, "num_res_blocks": 1, "z_channels": 8, "codebook_size": 24, "codebook_embed_dim": 4}
    return VQModel(VQArgs(**{**sizes, "encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], **changes}))


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def failure(action, *args, **kwargs) -> str:
    """The message of the CheckpointError that the call must raise."""
    with pytest.raises(CheckpointError) as caught:
        action(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "steps": torch.arange(5)}


# Reading


@pytest.mark.parametrize("wrapper", ["ema", "model", "module", "state_dict", None])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_unwraps_every_layout(tmp_path, state, wrapper, suffix):
    path = tmp_path / f"file{suffix}"
    torch.save({wrapper: state, "steps": 7, "optimizer": {"state": {}}} if wrapper else state, path)
    assert_same(read_state_dict(path), state)


def test_reads_safetensors(tmp_path, state):
    save_file(state, tmp_path / "file.safetensors")
    assert_same(read_state_dict(tmp_path / "file.safetensors"), state)


def test_misnamed_files(tmp_path, state):
    save_file(state, tmp_path / "file.pt")
    assert_same(read_state_dict(tmp_path / "file.pt"), state)
    torch.save(state, tmp_path / "file.safetensors")
    assert "rename it to file.pt" in failure(read_state_dict, tmp_path / "file.safetensors")


def test_ema_is_preferred_only_when_asked(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}, path)
    assert read_state_dict(path)["w"].sum() == 2
    assert read_state_dict(path, ema=False)["w"].sum() == 0


def test_averaged_weights_alone_are_not_taken_for_plain_ones(tmp_path):
    torch.save({"ema": {"w": torch.ones(2)}, "steps": 3}, tmp_path / "file.pt")
    assert "ema=True" in failure(read_state_dict, tmp_path / "file.pt", ema=False)


def test_fsdp_file_with_tensor_attributes(tmp_path):
    """LlamaGen's 3B file is pickled through _rebuild_from_type_v2, as tensors with attributes are."""
    tensor = torch.randn(4)
    tensor.tag = "shard"
    torch.save({"w": tensor}, tmp_path / "consolidated.pth")
    assert torch.equal(read_state_dict(tmp_path / "consolidated.pth")["w"], tensor)


def test_training_checkpoint_with_a_command_line(tmp_path, state):
    """LlamaGen's training checkpoints carry an argparse.Namespace."""
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4, name="x"), "steps": 9}, tmp_path / "file.pt")
    assert_same(read_state_dict(tmp_path / "file.pt"), state)


def test_reads_the_format_of_old_torch(tmp_path, state):
    torch.save({"model": state}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(tmp_path / "file.pt"), state)


def test_stale_keys_and_prefixes_are_dropped(tmp_path):
    inner = {
        "module._orig_mod.layers.0.attention.wqkv.weight": torch.ones(1),
        "module._orig_mod.layers.0.attention.kv_cache.k_cache": torch.ones(1),
        "module._orig_mod.layers.0.attention.kv_cache.v_cache": torch.ones(1),
        "module._orig_mod.freqs_cis": torch.ones(1),
        "module.layers.1._orig_mod.w": torch.ones(1),
    }
    torch.save({"model": inner}, tmp_path / "file.pt")
    assert set(read_state_dict(tmp_path / "file.pt")) == {"layers.0.attention.wqkv.weight", "layers.1.w"}


def test_a_real_module_called_module_keeps_its_name(tmp_path):
    torch.save({"module.w": torch.ones(1), "other": torch.ones(1)}, tmp_path / "file.pt")
    assert set(read_state_dict(tmp_path / "file.pt")) == {"module.w", "other"}


# Files that are no checkpoint


def test_missing_file_names_its_neighbours_and_the_command(tmp_path):
    (tmp_path / "c2i_B_384.pt").write_bytes(b"x")
    message = failure(read_state_dict, tmp_path / "c2i_B_348.pt")
    assert "no file" in message and "c2i_B_384.pt" in message and "scripts/download_weights.sh c2i_B_348" in message


def test_missing_file_without_neighbours(tmp_path):
    assert "no weight files" in failure(read_state_dict, tmp_path / "mine.pt")
    assert "nowhere doesn't exist" in failure(read_state_dict, tmp_path / "nowhere" / "mine.pt")


def test_folder(tmp_path):
    (tmp_path / "consolidated.pth").write_bytes(b"x")
    message = failure(read_state_dict, tmp_path)
    assert "folder" in message and "consolidated.pth" in message


def test_empty_file(tmp_path):
    (tmp_path / "vq_ds16_c2i.pt").touch()
    message = failure(read_state_dict, tmp_path / "vq_ds16_c2i.pt")
    assert "empty" in message and "download_weights.sh vq_ds16_c2i" in message


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_truncated_file(tmp_path, name, kept):
    path = tmp_path / name
    tensors = {f"layer{i}": torch.randn(64, 64) for i in range(4)}
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    message = failure(read_state_dict, path)
    assert str(path) in message and "cut short or damaged" in message and "download_weights.sh" in message


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html><body>Sign in</body></html>", "\n  <html><head></head></html>"])
def test_web_page(tmp_path, page):
    (tmp_path / "c2i_B_256.pt").write_text(page)
    message = failure(read_state_dict, tmp_path / "c2i_B_256.pt")
    assert "HTML page" in message and "/resolve/" in message


def test_git_lfs_pointer(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:736cb92b\nsize 3099\n"
    (tmp_path / "c2i_XL_384.safetensors").write_text(pointer)
    message = failure(read_state_dict, tmp_path / "c2i_XL_384.safetensors")
    assert "git-LFS pointer" in message and "git lfs pull" in message


def test_some_other_file(tmp_path):
    (tmp_path / "file.pt").write_text("Entry not found, and nothing more than that")
    assert "no checkpoint" in failure(read_state_dict, tmp_path / "file.pt")


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, state, zipped):
    path, sprung = tmp_path / "file.pt", tmp_path / "sprung"
    torch.save({"model": state, "extra": Trap(str(sprung))}, path, _use_new_zipfile_serialization=zipped)
    message = failure(read_state_dict, path)
    assert "more than tensors" in message and "mkdir" in message and "weights_only=False" in message
    assert not sprung.exists()


def test_plain_pickle(tmp_path):
    (tmp_path / "file.pt").write_bytes(pickle.dumps({"w": [1, 2, 3]}, protocol=2))
    assert str(tmp_path / "file.pt") in failure(read_state_dict, tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("content", "told"), [([torch.ones(1)], "list"), ({"epoch": 3, "lr": 0.1}, "epoch, lr"), ({}, "nothing")]
)
def test_no_weights_inside(tmp_path, content, told):
    torch.save(content, tmp_path / "file.pt")
    assert told in failure(read_state_dict, tmp_path / "file.pt")


# Loading


@pytest.mark.parametrize("build", [gpt, gpt_t2i, vq])
@pytest.mark.parametrize("on_meta", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip(tmp_path, build, on_meta, suffix):
    source, path = build(), tmp_path / f"file{suffix}"
    state = {key: torch.randn_like(tensor) for key, tensor in source.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    with torch.device("meta" if on_meta else "cpu"):
        model = build()
    kinds = {name for name, _ in model.named_parameters()}, {name for name, _ in model.named_buffers()}
    assert load_model(model, path) is model
    assert_same(model.state_dict(), state)
    # Buffers such as uncond_embedding must stay buffers.
    assert kinds == ({name for name, _ in model.named_parameters()}, {name for name, _ in model.named_buffers()})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_from_the_meta_device_runs(tmp_path):
    source = gpt().eval()
    nn.init.normal_(source.output.weight)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    with torch.device("meta"):
        model = gpt().eval()
    load_model(model, tmp_path / "file.pt")
    batch = {"idx": torch.tensor([[1, 2, 3]]), "cond_idx": torch.tensor([4])}
    assert torch.equal(model(**batch)[0], source(**batch)[0])


@pytest.mark.parametrize("on_meta", [True, False])
def test_casts_on_load(tmp_path, on_meta):
    source = gpt()
    torch.save(source.state_dict(), tmp_path / "file.pt")
    with torch.device("meta" if on_meta else "cpu"):
        model = gpt()
    table = model.freqs_cis
    load_model(model, tmp_path / "file.pt", dtype=torch.bfloat16)
    assert_same(model.state_dict(), {key: tensor.bfloat16() for key, tensor in source.state_dict().items()})
    assert model.freqs_cis is table and table.dtype == torch.float32


def test_keeps_the_models_own_dtypes_unless_told(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2), requires_grad=False)
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
            self.register_buffer("table", torch.full((2,), 0.1), persistent=False)

    stored = {"weight": torch.tensor([0.5, 2], dtype=torch.float16), "count": torch.tensor([70000])}
    save_file(stored, tmp_path / "file.safetensors")
    model = load_model(Mixed(), tmp_path / "file.safetensors")
    assert model.weight.dtype == torch.float32 and model.weight.tolist() == [0.5, 2]
    assert not model.weight.requires_grad

    load_model(model, tmp_path / "file.safetensors", dtype=torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert model.count.tolist() == [70000]
    assert torch.equal(model.table, torch.full((2,), 0.1)), "non-persistent state must not be touched"

    with torch.device("meta"):
        model = Mixed()
    assert "table" in failure(load_model, model, tmp_path / "file.safetensors")


def test_a_loaded_model_is_independent_of_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"weight": torch.ones(4, 4)}, path)
    model = load_model(nn.Linear(4, 4, bias=False), path)
    with path.open("r+b") as file:  # in place, as a rewritten file would be
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    assert torch.equal(model.weight, torch.ones(4, 4))


def test_an_optimizer_made_before_still_trains_the_model(tmp_path):
    torch.save({"weight": torch.ones(1, 2)}, tmp_path / "file.pt")
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    load_model(model, tmp_path / "file.pt")
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.weight.tolist() == [[0.5, 0.5]]


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    model = nn.Linear(2, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.save({"bias": torch.ones(2), "weight": torch.ones(2, 3)}, tmp_path / "file.pt")
    failure(load_model, model, tmp_path / "file.pt")
    assert_same(model.state_dict(), before)


def test_stale_caches_do_not_count_as_unexpected(tmp_path):
    model = gpt()
    extra = {"freqs_cis": torch.ones(5, 8, 2), "layers.0.attention.kv_cache.k_cache": torch.ones(1)}
    torch.save({"model": {**model.state_dict(), **extra}}, tmp_path / "file.pt")
    load_model(model, tmp_path / "file.pt")


# Files of another model: what is said must help


def save_model(path: Path, model: nn.Module) -> Path:
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize(
    ("have", "want", "told"),
    [
        (vq, gpt, ["VQ tokenizer file", "--vq-ckpt"]),
        (gpt, vq, ["GPT file", "--gpt-ckpt"]),
        (gpt_t2i, gpt, ["t2i file", "cap_proj", "--gpt-type t2i"]),
        (gpt, gpt_t2i, ["c2i file", "--gpt-type c2i"]),
        (lambda: gpt(vocab_size=30), gpt, ["--codebook-size 30", "this is 24 now"]),
        (lambda: gpt(num_classes=7), gpt, ["--num-classes 7", "this is 5 now"]),
        (lambda: gpt_t2i(caption_dim=8), gpt_t2i, ["--t5-feature-dim 8"]),
        (lambda: vq(codebook_size=30), vq, ["--codebook-size 30"]),
        (lambda: vq(codebook_embed_dim=2), vq, ["--codebook-embed-dim 2"]),
        (lambda: vq(encoder_ch_mult=[1, 2, 2], decoder_ch_mult=[1, 2, 2]), vq, ["3 levels", "2 levels", "size"]),
        (lambda: gpt(n_layer=3), gpt, ["3 layers", "2 layers", "unexpected", "layers.2."]),
        (lambda: nn.Linear(2, 2), gpt, ["neither a GPT's nor a VQ", "bias, weight"]),
    ],
)
def test_another_model(tmp_path, have, want, told):
    path = save_model(tmp_path / "file.pt", have())
    message = failure(load_model, want(), path)
    assert str(path) in message
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("have", "want", "told"),
    [
        (
            {"dim": 1280, "n_layer": 36, "n_head": 20},
            {"dim": 768, "n_layer": 12, "n_head": 12},
            "--gpt-model GPT-XL, or",
        ),
        (
            {"dim": 768, "n_layer": 12, "n_head": 12},
            {"dim": 3200, "n_layer": 24, "n_head": 32},
            "--gpt-model GPT-B, or",
        ),
    ],
)
def test_another_registered_size(have, want, told):
    """From shapes alone: files of these sizes would be gigabytes."""
    from autoregressive.models import checkpoint

    with torch.device("meta"):
        found, expected = (checkpoint._shapes(gpt(**sizes).state_dict()) for sizes in (have, want))
    message = failure(checkpoint._check_fit, Path("c2i.pt"), found, expected)
    assert told in message
    for sizes in (have, want):
        assert f"{sizes['n_layer']} layers, dim {sizes['dim']}" in message


def test_the_null_prompt_must_come_from_the_file(tmp_path):
    model = gpt_t2i()
    state = {key: tensor for key, tensor in model.state_dict().items() if "uncond" not in key}
    torch.save(state, tmp_path / "file.pt")
    message = failure(load_model, model, tmp_path / "file.pt")
    assert "uncond_embedding must come from the checkpoint" in message and "never trained" in message


# Memory

MEMORY_PROBE = """
    import sys
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from autoregressive.models.checkpoint import load_model

    def private_mb():
        pages = open("/proc/self/statm").read().split()
        return (int(pages[1]) - int(pages[2])) * 4096 / 1e6  # resident without pages of files

    class Peak(TorchDispatchMode):
        value = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.value = max(self.value, private_mb())
            return result

    def peak_of_load(path, layers, device):
        with torch.device(device):
            model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(layers)])
        before = private_mb()
        with Peak() as peak:
            load_model(model, path, dtype=torch.bfloat16)
        return peak.value - before

    peak_of_load(sys.argv[1], 1, sys.argv[3])  # what torch imports on first use is not counted
    print(peak_of_load(sys.argv[2], 30, sys.argv[3]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize(("suffix", "built_on"), [(".pt", "meta"), (".safetensors", "meta"), (".pt", "cpu")])
def test_peak_memory_is_one_copy(tmp_path, suffix, built_on):
    """A 126 MB float32 file into a 63 MB bfloat16 model: private memory grows by the model, never by the file."""
    paths = []
    for layers in (1, 30):
        paths.append(tmp_path / f"{layers}{suffix}")
        state = {f"{i}.weight": torch.ones(1024, 1024) for i in range(layers)}
        save_file(state, paths[-1]) if suffix == ".safetensors" else torch.save(state, paths[-1])
        del state
    program = [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), *map(str, paths), built_on]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    # From the meta device 63 MB are new; a real float32 model shrinks as it goes. 30 MB are for the allocator.
    assert float(run.stdout) < (63 if built_on == "meta" else 0) + 30


# Writing


def test_save_and_read_back(tmp_path, state):
    state["a.transposed"] = state["a.weight"].t()  # not contiguous, and shares memory
    state["a.same"] = state["a.weight"]
    state["a.parameter"] = nn.Parameter(torch.ones(2))
    path = tmp_path / "new" / "file.safetensors"
    save_safetensors(path, state, {"name": "tiny", "steps": "12"})
    assert_same(read_state_dict(path), state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"name": "tiny", "steps": "12"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_content_makes_the_same_bytes(tmp_path, state):
    metadata = {f"key {i}": 'text, "quoted" and ünïcode\n' for i in range(8)}
    for name in ("a", "b", "c"):
        save_safetensors(tmp_path / name, state, metadata)
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
    save_safetensors(tmp_path / "without", state, {})
    assert_same(read_state_dict(tmp_path / "without"), state)


def test_saves_over_the_file_it_was_read_from(tmp_path, state):
    path = tmp_path / "file.safetensors"
    save_safetensors(path, state, {})
    save_safetensors(path, read_state_dict(path), {"again": "yes"})
    assert_same(read_state_dict(path), state)


def test_saved_files_have_ordinary_permissions(tmp_path, state):
    save_safetensors(tmp_path / "file.safetensors", state, {})
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.safetensors", "other")}
    assert len(modes) == 1


def test_metadata_must_be_strings(tmp_path, state):
    with pytest.raises(TypeError, match="'steps' is 12"):
        save_safetensors(tmp_path / "file.safetensors", state, {"steps": 12})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, state):
    """A limit on the size of files stands for the full disk: the system refuses in the middle of the write."""
    path = tmp_path / "file.safetensors"
    save_safetensors(path, state, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        message = failure(save_safetensors, path, {"big": torch.ones(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in message and "4.2 MB" in message and "are free" in message
    assert_same(read_state_dict(path), state)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_unwritable_folder(tmp_path, state):
    (tmp_path / "file").touch()
    message = failure(save_safetensors, tmp_path / "file" / "x.safetensors", state, {})
    assert "Could not write" in message and "File exists" in message
    message = failure(save_safetensors, tmp_path / "file" / "deeper" / "x.safetensors", state, {})
    assert "no folder that can be written to" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path, state):
    tmp_path.chmod(0o500)
    try:
        message = failure(save_safetensors, tmp_path / "x.safetensors", state, {})
    finally:
        tmp_path.chmod(0o700)
    assert "writable" in message
