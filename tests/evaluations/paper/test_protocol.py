from pathlib import Path

import pytest
import yaml

from autoregressive.sample.options import OptionError
from evaluations.paper.protocol import CONFIGS, load_protocol


def test_paths_start_from_the_file(protocol_file, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    path = protocol_file(c2i={"reference": "../somewhere/ref.npz"})
    found = load_protocol(str(path))
    assert found.name == "tiny"
    assert found.c2i.config.resolve() == tmp_path / "c2i.yaml"
    assert found.c2i.reference.resolve() == tmp_path.parent / "somewhere" / "ref.npz"
    assert (found.c2i.budgets, found.c2i.seeds, found.c2i.resizes) == ((18, 9), (0, 1), ())
    assert found.t2i.clip_prefix == "A photo depicts"
    folder = Path(found.t2i.clip_model.removeprefix("local-dir:"))
    assert (folder / "open_clip_config.json").exists()


def test_flags_from_the_environment(protocol_file, monkeypatch):
    path = str(protocol_file())
    own = load_protocol(path).c2i
    monkeypatch.setenv("FLAGS", "--compile --per-proc-batch-size 77")
    found = load_protocol(path)
    assert found.c2i.flags == (*own.flags, "--compile", "--per-proc-batch-size", "77")
    for task in (found.c2i, found.t2i):
        assert (task.options().run.per_proc_batch_size, task.options().model.compile) == (77, True)


@pytest.mark.parametrize("name", ["demo", "XL"])
def test_protocols_that_ship(name):
    """Their configurations and budgets are there; what is downloaded or made need not be."""
    found = load_protocol(name)
    assert found.c2i.budgets == (384, 256)
    assert found.t2i.budgets == (768, 640, 512)
    assert len(found.c2i.seeds) >= 3
    assert found.c2i.config.exists()
    assert found.t2i.config.exists()


def test_prompts_of_the_demo():
    found = load_protocol("demo").t2i
    prompts = found.prompts.read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == found.images


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"budget": [3]}, r"tiny.yaml: unknown key 'c2i.budget' \(did you mean budgets\?\)"),
        ({"budgets": 3}, "key 'c2i.budgets': expected a list, got 3"),
        ({"budgets": []}, "key 'budgets': expected one or more different numbers"),
        ({"budgets": [0]}, "budgets are at least 1"),
        ({"seeds": [1, 1]}, r"key 'seeds': expected one or more different numbers, got \[1, 1\]"),
        ({"ablation_seeds": [2]}, r"expected some of the seeds \[0, 1\], got \[2\]"),
        ({"images": "many"}, "key 'c2i.images': expected a whole number, got 'many'"),
        ({"images": True}, "expected a whole number, got True"),
        ({"reference": 3}, "key 'c2i.reference': expected a path, got 3"),
        (
            {"resizes": ["antialiased"]},
            r"expected llamagen or antialias, got 'antialiased' \(did you mean antialias\?\)",
        ),
    ],
)
def test_mistakes_are_told(protocol_file, changes, told):
    with pytest.raises(OptionError, match=told):
        load_protocol(str(protocol_file(c2i=changes)))


def test_missing_keys_and_sections_are_told(protocol_file):
    path = protocol_file()
    content = yaml.safe_load(path.read_text())
    del content["c2i"]["reference"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match=r"key 'c2i.reference' is missing"):
        load_protocol(str(path))
    path.write_text(yaml.safe_dump({"c2i": content["c2i"] | {"reference": "x"}}))
    with pytest.raises(OptionError, match="section 't2i': expected keys and values, got None"):
        load_protocol(str(path))
    path.write_text("c2i: {images: 3, images: 4}")
    with pytest.raises(OptionError, match="key 'images' is given twice"):
        load_protocol(str(path))


def test_unknown_models_are_told(tmp_path):
    with pytest.raises(OptionError, match=r"--model dem: expected XL, demo or a .yaml file \(did you mean demo\?\)"):
        load_protocol("dem")
    with pytest.raises(OptionError, match=r"nothing.yaml: No such file"):
        load_protocol(str(tmp_path / "nothing.yaml"))
    assert CONFIGS.name == "paper"
