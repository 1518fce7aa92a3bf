"""Captions of a small made-up data set."""

import json

import pytest
from PIL import Image

from scripts import caption_emoji_dataset as captioner

COLORS = {"red": (221, 46, 68), "yellow": (255, 204, 77), "green": (119, 178, 85), "brown": (122, 74, 40)}


def item(name, color="red", set_name="noto", split="train", subgroup="food-fruit", tone=0):
    file = f"{split}/{subgroup}_{set_name}/{name.replace(' ', '-')}-{tone}.png"
    fields = {"file": file, "name": name, "set": set_name, "split": split, "subgroup": subgroup, "tone": tone}
    return fields, COLORS.get(color)


@pytest.fixture
def data(tmp_path):
    """A few items in two sets; held out are plums and the flag of Chad."""
    items = []
    for set_name in ("noto", "twemoji"):
        items += [item("apple", "red", set_name), item("grapes", "green", set_name)]
        items += [item("plum", "brown", set_name, "val"), item("waving hand", "yellow", set_name, "train", "hand", 2)]
        items += [item("flag: Chad", "red", set_name, "val", "country-flag"), item("owl", None, set_name)]
    lines = []
    for fields, color in items:
        path = tmp_path / fields["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (64, 64), "white")
        if color:
            picture.paste(color, (8, 8, 56, 56))
        else:  # two colours, half each
            picture.paste(COLORS["red"], (8, 8, 56, 32))
            picture.paste(COLORS["green"], (8, 32, 56, 56))
        picture.save(path)
        lines.append(json.dumps(fields) + "\n")
    (tmp_path / "items.jsonl").write_text("".join(lines))
    return tmp_path


def read(data, split):
    rows = [json.loads(line) for line in (data / f"captions_{split}.jsonl").read_text().splitlines()]
    return {row["image"]: row["captions"] for row in rows}


def test_captions_are_drawn_by_seed_and_image(data):
    captioner.main(["--data", str(data)])
    first = read(data, "train")
    lines = (data / "items.jsonl").read_text().splitlines(keepends=True)
    (data / "items.jsonl").write_text("".join(lines[::-1]))
    captioner.main(["--data", str(data)])
    assert read(data, "train") == first and list(read(data, "train")) == list(first)[::-1]
    captioner.main(["--data", str(data), "--seed", "1"])
    assert read(data, "train") != first

    for image, captions in first.items():
        assert len(captions) == len(set(captions)) == 6, image
    noto, twemoji = (first[f"train/food-fruit_{s}/apple-0.png"] for s in ("noto", "twemoji"))
    assert noto[0] == "noto: apple" and twemoji[0] == "twemoji: apple"
    assert not any("twemoji" in caption for caption in noto)


def test_names_that_are_held_out_are_never_in_training(data):
    captioner.main(["--data", str(data), "--count", "30"])
    train, val = ([text for texts in read(data, split).values() for text in texts] for split in ("train", "val"))
    assert any("plum" in text for text in val) and any("Chad" in text for text in val)
    assert not any("plum" in text or "Chad" in text for text in train)
    assert not set(train) & set(val)


def test_words(data):
    captioner.main(["--data", str(data), "--count", "30"])
    captions = read(data, "train") | read(data, "val")
    apple = captions["train/food-fruit_noto/apple-0.png"]
    assert {"an apple", "a red apple", "a noto drawing of an apple", "food: apple", "noto: red apple"} <= set(apple)
    assert {"grapes", "green grapes"} <= set(captions["train/food-fruit_noto/grapes-0.png"])
    assert "a brown plum" in captions["val/food-fruit_noto/plum-0.png"]
    phrases = {"ewe": "a ewe", "unicorn": "a unicorn", "umbrella": "an umbrella", "glasses": "glasses", "bus": "a bus"}
    assert {name: captioner.with_article(name) for name in phrases} == phrases
    owl = captions["train/food-fruit_noto/owl-0.png"]
    assert "an owl emoji" in owl and not any("red" in text or "green" in text for text in owl)
    hand = captions["train/hand_noto/waving-hand-2.png"]
    assert "a waving hand, medium light skin tone" in hand and not any("yellow" in text for text in hand)
    assert "a picture of the flag of Chad" in captions["val/country-flag_noto/flag:-Chad-0.png"]


def test_classes_are_chosen_by_globs(data):
    captioner.main(["--data", str(data), "--classes", "*_noto", "--skip-classes", "hand*", "*flag*"])
    assert {image.split("/")[1] for image in read(data, "train") | read(data, "val")} == {"food-fruit_noto"}
    with pytest.raises(SystemExit, match=r"no image of .* is of --classes nothing_noto"):
        captioner.main(["--data", str(data), "--classes", "nothing_noto"])
    assert read(data, "train")  # as it was


def test_a_folder_without_the_data_set_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"items\.jsonl.*build_emoji_dataset"):
        captioner.main(["--data", str(tmp_path)])
