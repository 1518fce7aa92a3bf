"""Flags and YAML files: one table, strict types, suggestions, precedence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from autoregressive.sample.options import OptionError, Options, markdown, parse_options, read_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def parse(*argv, script="job", text=False):
    defaults = Options.text_to_image() if text else Options()
    return parse_options(defaults, list(argv), script=script, description="d", examples="e")


def refused(capsys, *argv, **how):
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **how)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def config(tmp_path):
    def write(text, name="some.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("script", ["sample_c2i", "sample_t2i", "sample_c2i_ddp", "sample_t2i_ddp"])
def test_help_waits_for_no_torch(script):
    told = [sys.executable, "-X", "importtime", str(CONFIGS.parent / f"autoregressive/sample/{script}.py"), "--help"]
    done = subprocess.run(told, capture_output=True, text=True)
    assert done.returncode == 0 and "--cache-policy" in done.stdout
    assert "adsa.names" in done.stderr and not re.search(r"\| +torch\b", done.stderr)


def test_defaults_then_file_then_flags(config):
    path = config("sampling: {cfg_scale: 3, top_k: 7}\ncache: {policy: window, budget: 9}\nrun: {seed: 5}")
    options = parse("--config", path, "--top-k", "8", "--cache-budget", "10")
    assert (options.sampling.cfg_scale, options.sampling.top_k, options.sampling.top_p) == (3.0, 8, 1.0)
    assert isinstance(options.sampling.cfg_scale, float)
    assert options.cache_config().budget == 10
    assert options.run.seed == 5
    assert parse("--config", path, "--seed", "6").run.seed == parse("--global-seed", "6").run.seed == 6


def test_flag_turns_file_back(config):
    path = config("model: {compile: true, image_size: 64}\ncache: {policy: adsa, budget: 9, prefix: 2}")
    options = parse("--config", path, "--no-compile", "--image-size", "none", "--cache-policy", "full")
    assert options.model.compile is False
    assert options.model.image_size is None
    assert options.cache_config().budget is None, "the dense cache needs no budget from the file"


def test_base_is_overridden_key_by_key(config, tmp_path):
    config("sampling: {cfg_scale: 3.0, top_k: 7}\nmodel: {gpt_ckpt: ../weights/a.pt}", "base.yaml")
    options = parse("--config", config("base: base.yaml\nsampling: {top_k: 9}"))
    assert (options.sampling.cfg_scale, options.sampling.top_k) == (3.0, 9)
    assert options.model.gpt_ckpt == str(tmp_path.parent / "weights" / "a.pt"), "relative to the file"
    nested = config("base: some.yaml", "third.yaml")
    with pytest.raises(OptionError, match=r"some\.yaml: key 'base': a base has no base"):
        read_config(nested, Options())


@pytest.mark.parametrize(
    "text, told",
    [
        ("sampling: {cfg_scal: 2.0}", "unknown key 'sampling.cfg_scal' (did you mean cfg_scale?)"),
        ("sampling: {gpt_ckpt: a.pt}", "unknown key 'sampling.gpt_ckpt' (did you mean model.gpt_ckpt?)"),
        ("model: {gpt-ckpt: a.pt}", "unknown key 'model.gpt-ckpt' (did you mean gpt_ckpt?)"),
        ("text: {clean: true}", "section 'text' is not for c2i models"),
        ("model: {caption_dim: 8}", "unknown key 'model.caption_dim'"),
        ("smpling: {top_k: 1}", "unknown section 'smpling' (did you mean sampling?)"),
        ("sampling: {top_k: 2.5}", "key 'sampling.top_k': expected a whole number, got 2.5"),
        ("sampling: {top_k: true}", "key 'sampling.top_k': expected a whole number, got True"),
        (
            "sampling: {temperature: 1e-3}",
            "expected a number, got '1e-3' (YAML wants a point before the e, as in 1.0e-3)",
        ),
        ("model: {compile: 1}", "key 'model.compile': expected true or false, got 1"),
        ("model: {quantize: int4}", "key 'model.quantize': expected one of int8, got 'int4' (did you mean int8?)"),
        ("model: {precision: bf15}", "expected one of none, fp16, bf16, got 'bf15' (did you mean bf16?)"),
        ("run: {class_labels: 3}", "key 'run.class_labels': expected a list, got 3"),
        ("sampling: {top_k: null}", "key 'sampling.top_k': expected a whole number, got None"),
        ("sampling: 3", "section 'sampling': expected keys and values, got 3"),
        ("- 1", "expected the sections model, sampling, cache, run"),
        ("run: {seed: 1, seed: 2}", "key 'seed' is given twice"),
        ("a: [", "not valid YAML"),
        ("base: 3", "key 'base': expected a file, got 3"),
        ("cache: {policy: adsa}", "needs a budget"),
        ("cache: {policy: adsa, budget: 4, prefix: 3, local: 2}", "cache budget 4 is too small"),
        ("sampling: {top_p: 0.0}", "sampling.top_p must be above 0"),
        ("sampling: {zipar_window: 0}", "sampling.zipar_window must be at least 1"),
        ("sampling: {zipar_adaptive: true}", "sampling.zipar_adaptive needs sampling.zipar_window"),
        ("sampling: {zipar_window: 2}\nmodel: {compile: true}", "don't go together"),
        ("model: {compile: true, cuda_graphs: true}", "cuda_graphs doesn't go together with model.compile: give"),
        (
            "model: {cuda_graphs: true}\nsampling: {cfg_interval: 9}\ncache: {policy: adsa, budget: 9, mode: select}",
            "doesn't go together with sampling.cfg_interval, cache.mode select",
        ),
        ("run: {num_fid_samples: 0}", "run.num_fid_samples must be at least 1, not 0"),
        ("run: {class_labels: []}", "run.class_labels names no class"),
        ("run: {seed: -1}", "run.seed must be 0 to 2^63 - 1, not -1"),
    ],
)
def test_bad_file_is_named(capsys, config, text, told):
    message = refused(capsys, "--config", config(text))
    assert told in message
    if "key '" in told or "section" in told:
        assert "some.yaml" in message


def test_bad_flag_is_named(capsys):
    assert "unknown argument '--cfg-scal' (did you mean --cfg-scale?)" in refused(capsys, "--cfg-scal", "2")
    assert "--top-k: expected a whole number, got 'x'" in refused(capsys, "--top-k", "x")
    assert "--quantize: expected one of int8, got 'int4' (did you mean int8?)" in refused(capsys, "--quantize", "int4")
    assert "got 'adsaa' (did you mean adsa?)" in refused(capsys, "--cache-policy", "adsaa")
    assert "no/such.yaml: No such file" in refused(capsys, "--config", "no/such.yaml")
    assert "unknown argument '--num-fid-samples'" in refused(capsys, "--num-fid-samples", "3", script="grid")
    assert "unknown argument '--output'" in refused(capsys, "--output", "x.png", script="job")


def test_llamagen_flags_are_all_there():
    flags = "--gpt-model GPT-L --gpt-ckpt a.pt --gpt-type c2i --from-fsdp --cls-token-num 1 --precision bf16 --compile "
    flags += "--vq-model VQ-16 --vq-ckpt b.pt --codebook-size 16384 --codebook-embed-dim 8 --image-size 384 "
    flags += "--image-size-eval 256 --downsample-size 16 --num-classes 1000 --cfg-scale 2 --cfg-interval -1 --top-k 0 "
    flags += "--top-p 1.0 --temperature 1.0 --global-seed 0 --sample-dir samples --per-proc-batch-size 32 "
    options = parse(*(flags + "--num-fid-samples 50000").split())
    assert options.model.gpt_model == "GPT-L"
    assert options.model.compile is True
    assert options.sampling.cfg_interval == -1.0


def test_llamagen_flags_for_text_are_all_there():
    flags = "--gpt-model GPT-XL --gpt-ckpt a.pt --gpt-type t2i --cls-token-num 120 --precision bf16 --compile "
    flags += "--vq-model VQ-16 --vq-ckpt b.pt --codebook-size 16384 --codebook-embed-dim 8 --image-size 512 "
    flags += "--downsample-size 16 --num-classes 1000 --cfg-scale 7.5 --top-k 1000 --top-p 1.0 --temperature 1.0 "
    flags += "--t5-path t5-ckpt --t5-model-type flan-t5-xl --t5-feature-max-len 120 --t5-feature-dim 2048 "
    grid = parse(*(flags + "--no-left-padding --seed 0").split(), script="grid", text=True)
    assert (grid.text.encoder, grid.text.encoder_path, grid.text.max_length) == ("flan-t5-xl", "t5-ckpt", 120)
    assert (grid.model.caption_dim, grid.text.left_padding) == (2048, False)
    flags += "--prompt-csv coco.csv --sample-dir samples_coco --per-proc-batch-size 32 --num-fid-samples 30000 "
    job = parse(*(flags + "--global-seed 0").split(), text=True)
    assert (job.text.prompt_file, job.run.num_fid_samples, job.text.left_padding) == ("coco.csv", 30000, True)
    defaults = parse(text=True)
    assert (defaults.sampling.cfg_scale, defaults.sampling.top_k, defaults.run.num_fid_samples) == (7.5, 1000, 30000)


def test_prompts_of_a_flag_replace_those_of_a_file(capsys, config):
    path = config("text: {prompts: [a, b]}")
    assert parse("--config", path, text=True).text.prompts == ["a", "b"]
    options = parse("--config", path, "--prompt", "c", "--prompt", "d e", text=True)
    assert (options.text.prompts, options.text.prompt_file) == (["c", "d e"], None)
    options = parse("--config", path, "--prompts", "f.txt", text=True)
    assert (options.text.prompts, options.text.prompt_file) == ((), "f.txt")
    assert parse("--prompt", "none", text=True).text.prompts == ["none"], "which is a prompt like any other"
    assert parse("--compare", "none", script="grid").run.compare is None
    assert "give one of them" in refused(capsys, "--prompt", "c", "--prompts", "f.txt", text=True)
    assert "'run.class_labels'" in refused(capsys, "--config", config("run: {class_labels: [1]}"), text=True)
    assert "text.max_length must be at least 1" in refused(capsys, "--t5-feature-max-len", "0", text=True)


def test_help_is_whole(capsys):
    words = {"--config", "--cache-renew-every", "sampling:"}
    for text, own, other in ((False, "--label-distribution", "--prompt"), (True, "--prompt-csv", "--class-labels")):
        with pytest.raises(SystemExit):
            parse("--help", text=text)
        shown = capsys.readouterr().out
        assert all(word in shown for word in (*words, own))
        assert other not in shown


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs(path):
    options = parse("--config", str(path), text="t2i" in path.stem)
    assert Path(options.model.gpt_ckpt).parent.parts[-1] in ("pretrained_models", "demo")
    budget = options.cache_config().budget
    if "adsa" in path.stem:
        assert options.cache.policy == "adsa"
        assert str(budget) == path.stem.split("adsa")[1]
    elif "dense" in path.stem:
        assert options.cache.policy == "full"
    elif "fast" in path.stem:
        assert options.cache.policy == "adsa_plus" and options.sampling.zipar_window


def test_grids_show_what_jobs_sample():
    """The two class scripts have LlamaGen's different defaults of these keys, so files give both."""
    for path in CONFIGS.glob("*.yaml"):
        if "t2i" not in path.stem:
            assert read_config(path, Options())["sampling"].keys() >= {"cfg_scale", "top_k"}, path.name


# The values that LlamaGen's own numbers were measured with: guidance (and a best of 1.65 for 3B) from its README and
# GETTING_STARTED, all tokens, temperature 1, images of 384 resized to 256; for text the defaults of sample_t2i_ddp.py.
LLAMAGEN = {
    "c2i_B_384": ("GPT-B", 2.0, 0, 384, 256),
    "c2i_L_384": ("GPT-L", 2.0, 0, 384, 256),
    "c2i_XL_384": ("GPT-XL", 1.75, 0, 384, 256),
    "c2i_XXL_384": ("GPT-XXL", 1.75, 0, 384, 256),
    "c2i_3B_384": ("GPT-3B", 1.65, 0, 384, 256),
    "t2i_XL_stage1_256": ("GPT-XL", 7.5, 1000, 256, None),
    "t2i_XL_stage2_512": ("GPT-XL", 7.5, 1000, 512, None),
}


def test_released_models_are_sampled_as_llamagen_measured_them():
    found = set()
    for path in sorted(CONFIGS.glob("[ct]2i_*.yaml")):
        name = path.stem.rpartition("_")[0]
        options = parse("--config", str(path), text=name.startswith("t2i"))
        model, sampling = options.model, options.sampling
        values = (model.gpt_model, sampling.cfg_scale, sampling.top_k, model.image_size, options.run.image_size_eval)
        assert values == LLAMAGEN[name], path.name
        assert (sampling.top_p, sampling.temperature, sampling.cfg_interval) == (1.0, 1.0, -1.0)
        assert Path(model.gpt_ckpt).stem == name
        assert Path(model.vq_ckpt).name == f"vq_ds16_{name[:3]}.pt"
        found.add(name)
    assert found == LLAMAGEN.keys()


def test_keys_are_documented():
    """configs/README.md ends with what `python autoregressive/sample/options.py` prints."""
    assert (CONFIGS / "README.md").read_text().endswith("## Keys\n\n" + markdown() + "\n")
