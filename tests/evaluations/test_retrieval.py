import json

import numpy as np
import pytest
from PIL import Image

from evaluations.extractors import EvaluationError
from evaluations.retrieval import CaptionedImages, main, r_precision, retrieval
from tests.evaluations.conftest import pictures


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_recall_counts_who_comes_before():
    """Texts are the axes. Image 2 is nearer to text 0 than to its own; text 0 then has two images before its own."""
    texts = np.eye(8, dtype=np.float32)
    images = np.eye(8, dtype=np.float32)
    images[0] = unit([[0.5, 1, 1, 1, 1, 1, 0, 0]])
    images[2] = unit([[2, 0, 1, 0, 0, 0, 0, 0]])
    images[6] = unit([[2, 0, 0, 0, 0, 0, 3, 0]])
    found = retrieval(images, texts)
    assert found["image_to_text_r1"] == 6 / 8  # 0 and 2 have another text first
    assert found["image_to_text_r5"] == 7 / 8  # 0 has five others first
    assert found["text_to_image_r1"] == 7 / 8  # 0 has images 2 and 6 first
    assert found["text_to_image_r5"] == 1
    cosines = images @ texts.T
    assert found["cosine"] == pytest.approx(np.diag(cosines).mean())
    assert found["cosine_of_others"] == pytest.approx(cosines[~np.eye(8, dtype=bool)].mean(), abs=1e-6)


def test_ties_are_lost():
    same = unit(np.ones((4, 3)))
    assert retrieval(same, same)["image_to_text_r1"] == 0
    assert not r_precision(same, same, range(4)).any()


def test_r_precision_is_among_a_hundred():
    """Of 299 other texts 99 are drawn. If 30 are nearer than the own, one of them is hardly ever missing; if a single
    one is, it is missing in two of three cases."""
    texts = np.eye(300, dtype=np.float32)
    hopeless, close, sure = texts.copy(), texts.copy(), texts.copy()
    for shift in range(1, 31):
        hopeless += 2 * np.roll(texts, shift, axis=1)
    close += 2 * np.roll(texts, 1, axis=1)
    own = np.arange(300)
    assert r_precision(unit(hopeless), texts, own).mean() < 0.02
    assert r_precision(unit(close), texts, own).mean() == pytest.approx(1 - 99 / 299, abs=0.08)
    assert r_precision(sure, texts, own).all()
    assert np.array_equal(r_precision(unit(close), texts, own), r_precision(unit(close), texts, own))


def test_r_precision_of_few_texts_is_among_all():
    texts = np.eye(4, dtype=np.float32)
    images = unit([[1, 0, 0, 0], [0, 1, 0, 2], [0, 0, 1, 0], [0, 3, 0, 1], [0, 0, 1, 0]])
    assert r_precision(images, texts, [0, 1, 2, 3, 2]).tolist() == [True, False, True, False, True]


@pytest.fixture
def captioned(tmp_path):
    """Twelve images and a captions file, in another order than that of their names."""
    images = pictures(12, 3, size=32)
    lines = []
    for index in (5, 0, *range(1, 5), *range(6, 12)):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "captions": [f"thing {index}", "other words"]}) + "\n")
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    return tmp_path / "captions.jsonl", images


def test_captions_file_through_a_clip(captioned, tiny_clip, capsys):
    path, images = captioned
    pairs = CaptionedImages(path)
    assert pairs.texts[:3] == ["thing 5", "thing 0", "thing 1"]
    assert np.array_equal(pairs.read(0), images[5])
    main([str(path), "--clip-model", f"local-dir:{tiny_clip}", "--cpu", "--num-workers", "0", "--batch-size", "5"])
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 12, "captions": 12}
    assert found["clip_model"] == "/".join(tiny_clip.parts[-2:])
    assert found["r_precision_candidates"] == 12
    assert found["r_precision"] == found["image_to_text_r1"]  # with no more than a hundred captions they are the same
    assert -1 < found["cosine"] < 1
    assert len(list(path.parent.glob("captions.features-clip-*.npz"))) == 1


def test_what_cannot_be_retrieved(captioned):
    path, _ = captioned
    with pytest.raises(EvaluationError, match=r"none\.jsonl: no readable captions file"):
        main([str(path.parent / "none.jsonl"), "--cpu"])
    path.write_text("".join(json.dumps({"image": f"{i}.png", "captions": ["a thing"]}) + "\n" for i in range(3)))
    with pytest.raises(EvaluationError, match="first captions are all the same"):
        main([str(path), "--cpu"])
