"""Finding or making the environment, without any network; and what the sampling script runs in it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def project(tmp_path):
    """A project of the scripts alone, whose requirements are pip's, and a Python that says it lacks them."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup_env.sh", "check_requirements.py"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("pip>=1\n")
    lacking = tmp_path / "python"
    lacking.write_text(f'#!/bin/sh\ncase "$1" in *check_requirements.py) exit 1;; esac\nexec {sys.executable} "$@"\n')
    lacking.chmod(0o755)
    return tmp_path


def run(project, python=None, command='echo "$PYTHON"'):
    """Call setup_env as the scripts do; pip finds no index, as when the network is broken."""
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "$0"; setup_env; {command}', project / "scripts" / "setup_env.sh"],
        env=environment | offline | {"PYTHON": str(python or project / "python")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check(path):
    return subprocess.run(
        [sys.executable, SCRIPTS / "check_requirements.py", path], capture_output=True, text=True, timeout=60
    )


def test_requirements_are_checked(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("# comment\npip>=1  # and more\nno-such-thing>=3; python_version < '3'\n")
    assert (check(path).returncode, check(path).stdout) == (0, "")
    (tmp_path / "other.txt").write_text("-r some.txt\npip>=9999\nno-such-thing<2\n")
    result = check(tmp_path / "other.txt")
    assert result.returncode == 1
    assert "pip>=9999: installed is" in result.stdout
    assert "no-such-thing<2: not installed" in result.stdout


def test_active_python_is_used_as_it_is(project):
    result = run(project, python=sys.executable)
    assert (result.returncode, result.stdout) == (0, f"{sys.executable}\n")
    assert not (project / ".venv").exists()


def test_venv_is_made_once(project):
    result = run(project)
    assert (result.returncode, result.stdout) == (0, f"{project}/.venv/bin/python\n"), result.stderr
    made = (project / ".venv/pyvenv.cfg").stat().st_mtime_ns
    start = time.perf_counter()
    assert run(project).stdout == f"{project}/.venv/bin/python\n"
    assert time.perf_counter() - start < 5, "a fraction of a second on an idle machine"

    # New requirements, and no network; the second time too, as what failed isn't taken for done.
    (project / "requirements.txt").write_text("no-such-thing-as-this==1\n")
    for _ in range(2):
        result = run(project)
        assert result.returncode == 1
        assert "error: pip could not install the requirements" in result.stderr
        assert "check the network" in result.stderr
        assert result.stdout == ""
    assert (project / ".venv/pyvenv.cfg").stat().st_mtime_ns == made, "the same one, mended and not made anew"


def test_unusable_python_is_told(project):
    result = run(project, python="no-python-of-this-name")
    assert result.returncode == 1
    assert "'no-python-of-this-name' is no Python 3.10 or newer" in result.stderr


def test_preload_is_harmless(project):
    result = run(project, python=sys.executable, command='"$PYTHON" -c "print(7)"')
    assert (result.stdout, result.stderr) == ("7\n", "")


@pytest.mark.parametrize("kind, demo", [("c2i", "configs/demo.yaml"), ("t2i", "configs/demo_t2i.yaml")])
@pytest.mark.parametrize(
    "variables, flags, expected",
    [
        ({}, [], "sample_{kind}.py --config {demo}"),
        ({}, ["--help"], "sample_{kind}_ddp.py --help"),
        ({"CONFIG": "configs/demo.yaml"}, [], "sample_{kind}_ddp.py --config {root}/configs/demo.yaml"),
        ({"CONFIG": "my.yaml"}, ["--top-k", "3"], "sample_{kind}_ddp.py --config my.yaml --top-k 3"),
        ({"NPROC": "2"}, [], "--nproc-per-node 2 {job} --config {demo}"),
        ({"NPROC": "2", "CONFIG": "my.yaml"}, [], "--nproc-per-node 2 {job} --config my.yaml"),
    ],
)
def test_sampling_scripts(sampling, variables, flags, expected, kind, demo):
    """From another folder; a config is looked for there, and then in the project."""
    root = SCRIPTS.parent
    result = sampling(f"sample_{kind}.sh", *flags, **variables)
    assert result.returncode == 0, result.stderr
    job = root / f"autoregressive/sample/sample_{kind}_ddp.py"
    assert result.stdout.strip().endswith(expected.format(kind=kind, root=root, job=job, demo=root / demo))


@pytest.fixture
def sampling(tmp_path):
    """Run one of the sampling scripts, in a folder with my.yaml, by a Python that only tells its arguments."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\ncase "$1" in *check_requirements.py) exit 0;; esac\necho "$@"\n')
    echo.chmod(0o755)
    (tmp_path / "my.yaml").touch()
    names = ("CONFIG", "NPROC", "PROMPTS", "ANNOTATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in names}

    def run(script, *flags, scripts=SCRIPTS, **variables):
        return subprocess.run(
            ["bash", scripts / script, *flags],
            cwd=tmp_path,
            env=environment | {"PYTHON": str(echo)} | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("name", ["coco", "parti"])
def test_prompt_scripts(sampling, name):
    root = SCRIPTS.parent
    result = sampling(f"sample_t2i_{name}.sh", "--top-k", "9", PROMPTS="my.csv", NPROC="2")
    config = root / "configs/t2i_XL_stage2_512_adsa512.yaml"
    wanted = f"--nproc-per-node 2 {root}/autoregressive/sample/sample_t2i_ddp.py --config {config} "
    assert result.stdout.strip().endswith(f"{wanted}--prompts my.csv --sample-dir samples_{name} --top-k 9")
    result = sampling(f"sample_t2i_{name}.sh", PROMPTS="my.csv", CONFIG="my.yaml")
    assert "sample_t2i_ddp.py --config my.yaml --prompts my.csv" in result.stdout
    assert "--help" in sampling(f"sample_t2i_{name}.sh", "--help").stdout


def test_prompts_are_made_once(sampling, tmp_path):
    """In a copy of the project, without data: COCO's are drawn, Parti's fetched, by what stands for curl."""
    copy = tmp_path / "copy"
    shutil.copytree(SCRIPTS, copy / "scripts")
    drawn = copy / "data/coco/coco_val2014.tsv"
    first, then = sampling("sample_t2i_coco.sh", scripts=copy / "scripts", ANNOTATIONS="some.json").stdout.splitlines()
    assert first == f"{copy}/scripts/coco_prompts.py --output {drawn} --annotations some.json"
    assert then.endswith(f"--prompts {drawn} --sample-dir samples_coco")
    drawn.parent.mkdir(parents=True)
    drawn.touch()
    assert len(sampling("sample_t2i_coco.sh", scripts=copy / "scripts").stdout.splitlines()) == 1

    curl = tmp_path / "curl"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "scripts": copy / "scripts"}
    curl.write_text("#!/bin/sh\nexit 22\n")
    curl.chmod(0o755)
    result = sampling("sample_t2i_parti.sh", **path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "could not fetch https://raw.githubusercontent.com/google-research/parti" in result.stderr
    fetched = copy / "data/PartiPrompts.tsv"
    curl.write_text('#!/bin/sh\nwhile [ "$1" != --output ]; do shift; done\necho Prompt > "$2"\n')
    assert f"--prompts {fetched} " in sampling("sample_t2i_parti.sh", **path).stdout
    assert fetched.read_text() == "Prompt\n"
    curl.write_text("#!/bin/sh\nexit 22\n")
    assert sampling("sample_t2i_parti.sh", **path).returncode == 0
