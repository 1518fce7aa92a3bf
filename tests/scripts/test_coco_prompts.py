"""Prompts drawn from COCO's annotations."""

import json
import random

import pytest

from autoregressive.sample.options import TextOptions
from autoregressive.sample.prompts import read_prompts
from scripts import coco_prompts

IMAGES = 40


@pytest.fixture
def annotations(tmp_path):
    """As COCO has them: about five captions an image, in no order, with stray white space and quotation marks."""
    rows = [
        {
            "id": 1000 + 7 * i,
            "image_id": i % IMAGES + 500,
            "caption": f'"Caption" {i} of\n {i % IMAGES + 500}, a\tdog. ',
        }
        for i in range(5 * IMAGES + 3)
    ]
    rows.append({"id": 1, "image_id": 999, "caption": " \n"})
    random.Random(0).shuffle(rows)
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": [], "annotations": rows}))
    return path


def drawn(annotations, *flags):
    output = annotations.parent / "new/coco.tsv"
    coco_prompts.main(["--annotations", str(annotations), "--output", str(output), *flags])
    return output.read_bytes(), read_prompts(TextOptions(prompt_file=str(output)))


def test_one_caption_each_of_different_images(annotations, capsys):
    table, prompts = drawn(annotations, "--count", "30")
    assert "30 prompts in" in capsys.readouterr().out
    assert len(prompts.texts) == len(set(prompts.image_ids)) == 30
    assert all(
        text.endswith(f" of {image}, a dog.") for text, image in zip(prompts.texts, prompts.image_ids, strict=True)
    )
    assert prompts.image_ids != sorted(prompts.image_ids)
    which = {int(text.split()[1]) // IMAGES for text in prompts.texts}
    assert which >= {0, 1, 2, 3, 4}, "not always an image's first"

    content = json.loads(annotations.read_text())
    content["annotations"].reverse()
    annotations.write_text(json.dumps(content))
    assert drawn(annotations, "--count", "30")[0] == table, "by seed and id alone"
    assert drawn(annotations, "--count", "20")[0] == b"".join(table.splitlines(keepends=True)[:21])
    assert drawn(annotations, "--count", "30", "--seed", "1")[0] != table
    assert len(drawn(annotations, "--count", str(IMAGES))[1].texts) == IMAGES


@pytest.mark.parametrize(
    "content, flags, told",
    [
        (None, [], "captions_val2014.json: No such file or directory; --help tells where"),
        ('{"annotations"', [], "captions_val2014.json: not JSON"),
        (
            '{"annotations": [{"id": 1, "image_id": 2, "bbox": []}]}',
            [],
            "no captions in it; wanted is captions_val2014",
        ),
        ("[]", [], "no captions in it"),
        (
            '{"annotations": [{"id": 1, "image_id": 2, "caption": "x"}]}',
            [],
            "1 images have captions, and 30000 are wanted",
        ),
    ],
)
def test_refused(tmp_path, content, flags, told):
    path = tmp_path / "captions_val2014.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=told):
        drawn(path, *flags)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, told", [(["--count", "0"], "--count must be"), (["--output", "a.csv"], "end in .tsv")])
def test_flags_are_checked(annotations, capsys, flags, told):
    with pytest.raises(SystemExit):
        drawn(annotations, *flags)
    assert told in capsys.readouterr().err
