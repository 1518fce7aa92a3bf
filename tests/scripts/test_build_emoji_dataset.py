"""The data set builder on a small made-up source folder, with a stand-in for the font."""

import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

try:
    import cairosvg  # noqa: F401
except (ImportError, OSError):
    pytest.skip("CairoSVG is only for building the data set: requirements-data.txt", allow_module_level=True)

from scripts import build_emoji_dataset as builder

TONES = {1: "1F3FB", 2: "1F3FC", 3: "1F3FD", 4: "1F3FE", 5: "1F3FF"}


def svg(color="red", side=36, inset=0):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">'
        f'<rect x="{inset}" y="{inset}" width="{side - 2 * inset}" height="{side - 2 * inset}" fill="{color}"/></svg>'
    )


def row(hexcode, name, subgroup, group="objects", tone="", base=""):
    return {
        "hexcode": hexcode,
        "annotation": name,
        "group": group,
        "subgroups": subgroup,
        "skintone": tone,
        "skintone_base_hexcode": base,
    }


class FakeNoto:
    """Has a blue square for every code point below U+1F700."""

    def __init__(self, path):
        pass

    def draw(self, text):
        image = Image.new("RGBA", (builder.ADVANCE, builder.ADVANCE))
        image.paste((0, 0, 255, 255), (8, 20, 128, 120))
        return image

    def has(self, text):
        return ord(text[0]) < 0x1F700


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A node_modules folder with 20 tools, one keycap, one frog, a toned hand, a handshake of two tones, and extras."""
    monkeypatch.setattr(builder, "Noto", FakeNoto)
    rows = [row(f"1F6{n:02X}", f"tool {n}", "tool") for n in range(20)]
    rows.append(row("0023-FE0F-20E3", "keycap: #", "keycap"))
    rows.append(row("1F438", "frog", "animal-amphibian"))
    rows.append(row("1F44B", "waving hand", "hands"))
    rows += [row(f"1F44B-{c}", f"waving hand: {t}", "hands", tone=t, base="1F44B") for t, c in TONES.items()]
    rows.append(row("1FAF1-1F3FB-200D-1FAF2-1F3FC", "handshake: two tones", "hands", tone="1,2", base="1F91D"))
    rows.append(row("E000", "brand", "brand", group="extras-openmoji"))
    rows.append(row("1F3FB", "light skin tone", "skin-tone", group="component"))

    root = tmp_path / "node_modules"
    folders = {
        "twemoji": root / "@twemoji/svg",
        "openmoji": root / "openmoji/color/svg",
        "fluent": root / "fluentui-emoji/icons/flat",
    }
    for folder in (*folders.values(), root / "openmoji/data"):
        folder.mkdir(parents=True)
    for package in ("@twemoji/svg", "openmoji", "fluentui-emoji"):
        (root / package / "package.json").write_text('{"version": "1.0.0"}')
    (root / "openmoji/data/openmoji.json").write_text(json.dumps(rows))
    for r in rows:
        (folders["openmoji"] / f"{r['hexcode']}.svg").write_text(svg("lime", 72, 12))
        (folders["twemoji"] / f"{builder.short_hex(r['hexcode'])}.svg").write_text(svg())
    for name in ("frog", "keycap-hashtag", "waving-hand-default", "waving-hand-medium-light", "waving-hand-dark"):
        (folders["fluent"] / f"{name}.svg").write_text(svg("black", 32, 2))
    font = tmp_path / "font.ttf"
    font.write_bytes(b"a font")
    return {"source": root, "font": font}


def build(sources, out, **settings):
    return builder.build(**sources, out=out, size=48, **settings)


def test_layout_and_records(sources, tmp_path):
    out = tmp_path / "emoji"
    items = build(sources, out)
    records = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert records == [i.record() for i in items]

    classes = json.loads((out / "classes.json").read_text())
    assert classes["subgroups"] == ["tool", "keycap", "animal-amphibian", "hands"]
    assert classes["classes"] == [f"{g}_{s}" for g in classes["subgroups"] for s in builder.SETS]
    expected = [f"{n:03d}_{name}" for n, name in enumerate(classes["classes"])]
    for split in ("train", "val"):  # the empty ones too: ids have to agree
        assert sorted(p.name for p in (out / split).iterdir()) == expected

    assert {str(p.relative_to(out)) for p in out.glob("*/*/*.png")} == {r["file"] for r in records}
    for r in records:
        assert r["class_id"] == 4 * r["subgroup_id"] + builder.SETS.index(r["set"])
        split, folder, file = r["file"].split("/")
        assert (split, folder, file) == (r["split"], expected[r["class_id"]], f"{r['hexcode']}_{r['set']}.png")
        with Image.open(out / r["file"]) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
    sides = defaultdict(set)
    for r in records:
        sides[r["name"]].add(r["split"])
    assert set(map(tuple, sides.values())) == {("train",), ("val",)}  # all sets of a name on one side
    with Image.open(out / "preview.png") as sheet:
        assert np.asarray(sheet).min() == 0


def test_choice(sources):
    items = builder.choose_items(**sources, tones=1, seed=0)
    by_name = defaultdict(set)
    for i in items:
        by_name[i.name].add((i.set, i.tone))
    assert not {"brand", "light skin tone", "handshake: two tones"} & set(by_name)
    assert {s for s, _ in by_name["tool 3"]} == {"twemoji", "openmoji", "noto"}
    # leading zeros, variation selectors and Fluent's own name are all bridged
    assert {s for s, _ in by_name["keycap: #"]} == set(builder.SETS)
    tones = {tone for _, tone in by_name["waving hand"]}
    assert len(tones) == 2 and 0 in tones

    def count(tones):
        found = builder.choose_items(**sources, tones=tones, seed=0)
        return len({i.tone for i in found if i.name == "waving hand"})

    assert [count(t) for t in range(6)] == [1, 2, 3, 4, 5, 6]
    every = builder.choose_items(**sources, tones=5, seed=0)
    assert {i.tone for i in every if i.name == "waving hand" and i.set == "fluent"} == {0, 2, 5}


def test_split_keeps_names_together(sources):
    items = builder.choose_items(**sources, tones=5, seed=0)
    held = builder.validation_keys(items, 0.1, seed=0)
    assert held == builder.validation_keys(items[::-1], 0.1, seed=0)
    assert any(held != builder.validation_keys(items, 0.1, seed) for seed in range(1, 5))
    # 23 names: 2 are held out, none of a subgroup of one
    assert len(held) == 2 and all(key.startswith("tool") for key in held)
    assert not builder.validation_keys(items, 0.0, seed=0)


@pytest.mark.parametrize("variant", ["man artist", "woman artist", "artist"])
def test_variants_share_a_split_key(variant):
    assert builder.split_key(variant) == "artist"


def test_split_key_of_plain_people():
    assert builder.split_key("woman") == builder.split_key("person") == "person"
    assert builder.split_key("woman running: facing right") == builder.split_key("man running")
    assert builder.split_key("mango") == "mango"


def test_pictures_fill_the_canvas_alike(sources, tmp_path):
    out = tmp_path / "emoji"
    colors = {"twemoji": (255, 0, 0), "openmoji": (0, 255, 0), "fluent": (0, 0, 0)}
    for item in build(sources, out):
        pixels = np.asarray(Image.open(out / item.file))
        assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()
        ink = np.argwhere((pixels < 128).any(-1))
        side = (ink.max(0) - ink.min(0) + 1).max()
        assert abs(side - 0.9 * 48) <= 1.5, item
        assert abs(ink.max(0) + ink.min(0) - 47).max() <= 1  # centred
        if item.set in colors:
            assert tuple(pixels[24, 24]) == colors[item.set]


def test_small_pictures_stay_small():
    dot = Image.new("RGBA", (100, 100))
    dot.paste((0, 0, 0, 255), (45, 45, 55, 55))
    ink = np.argwhere(np.asarray(builder.fit(dot, 100, typical=1.0))[..., 0] < 128)
    assert 10 <= np.ptp(ink, axis=0).max() + 1 <= 14
    with pytest.raises(ValueError, match="empty"):
        builder.fit(Image.new("RGBA", (100, 100)), 100, typical=1.0)


def test_resumes_and_is_deterministic(sources, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    items = build(sources, first)
    build(sources, second)
    for item in items:
        assert (first / item.file).read_bytes() == (second / item.file).read_bytes()

    lost = items[5]
    (second / lost.file).unlink()
    drawn = []
    real = builder.load_art
    monkeypatch.setattr(builder, "load_art", lambda item, *rest: drawn.append(item) or real(item, *rest))
    build(sources, second)
    assert drawn == [lost]
    assert (first / lost.file).read_bytes() == (second / lost.file).read_bytes()
    assert (first / "items.jsonl").read_text() == (second / "items.jsonl").read_text()


def test_a_broken_picture_is_named_and_left_out(sources, tmp_path, capsys):
    (sources["source"] / "@twemoji/svg/1f438.svg").write_text("<svg>")
    items = build(sources, tmp_path / "emoji")
    assert "1F438 of twemoji" in capsys.readouterr().err
    assert {i.set for i in items if i.name == "frog"} == {"openmoji", "fluent", "noto"}


def test_other_settings_are_refused(sources, tmp_path):
    build(sources, tmp_path / "emoji")
    with pytest.raises(builder.SourceError, match="other sources or settings"):
        build(sources, tmp_path / "emoji", seed=1)


@pytest.mark.parametrize("missing", ["@twemoji/svg", "openmoji/data/openmoji.json", "fluentui-emoji/icons/flat"])
def test_a_missing_package_is_named(sources, tmp_path, missing):
    (sources["source"] / missing).rename(tmp_path / "away")
    with pytest.raises(builder.SourceError, match=missing + " is missing.*--source"):
        build(sources, tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()


def test_a_missing_font_is_named(sources, tmp_path):
    sources["font"].unlink()
    with pytest.raises(builder.SourceError, match="fonts-noto-color-emoji"):
        build(sources, tmp_path / "emoji")


@pytest.mark.skipif(not builder.DEBIAN_FONT.is_file(), reason="fonts-noto-color-emoji isn't installed")
def test_font_joins_sequences():
    noto = builder.Noto(builder.DEBIAN_FONT)
    for text in (
        "\U0001f600",
        "\U0001f469\u200d\U0001f680",
        "\U0001f1eb\U0001f1f7",
        "\U0001f44b\U0001f3fd",
        "#\ufe0f\u20e3",
    ):
        assert noto.has(text), text
    for text in ("\U0001f600\U0001f600", "\U0010ffff", "\U0001f600\u200d\U0001f680"):
        assert not noto.has(text), text


def test_a_file_that_is_no_font(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"<html>")
    with pytest.raises(builder.SourceError, match=r"font\.ttf"):
        builder.Noto(tmp_path / "font.ttf")
