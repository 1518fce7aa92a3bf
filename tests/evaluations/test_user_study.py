"""The user study: blind pages, and the score of ballots. All ballots here are synthetic and say so."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample.options import OptionError
from evaluations import user_study
from evaluations.extractors import EvaluationError
from evaluations.user_study import MISSING, QUESTIONS, checksum, choose, fleiss_kappa, main, shares, sign_test, trials

CLASSES = ["cat", "dog", "heart", "clock"]
PROMPTS = [f"{n} red apples </script><b>&" for n in range(24)]


@pytest.fixture
def sampled(run_folder, tmp_path):
    """A function that writes a finished run of 24 images, of classes or of prompts."""

    def write(name, policy="full", prompts=None, labels=None, seed=0, named=True, status="complete", **settings):
        run = run_folder(name, 24, status=status)
        kind = "c2i" if prompts is None else "t2i"
        if prompts is None:
            np.save(run / "labels.npy", np.arange(24) % 4 if labels is None else labels)
        else:
            (run / "captions.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        if named:
            (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
        same = {"model.gpt_type": kind, "run.seed": seed, "run.num_fid_samples": 24, "run.image_size_eval": 8}
        model = {"gpt_type": kind, "gpt_ckpt": str(tmp_path / "gpt.pt"), "num_classes": 4}
        record = {
            "status": status,
            "settings": same | {"cache.policy": policy} | settings,
            "config": {"model": model, "run": {"class_names": None}},
        }
        (run / "run.json").write_text(json.dumps(record))
        return run

    return write


@pytest.fixture
def study(sampled, tmp_path):
    """A study of 24 pairs, 3 of them twice: its folder and key."""
    runs = sampled("dense", "full", PROMPTS), sampled("sparse", "adsa", PROMPTS)
    main(["make", *map(str, runs), "--pairs", "24", "--repeats", "3", "--output", str(tmp_path / "study")])
    return tmp_path / "study", json.loads((tmp_path / "study" / "key.json").read_text())


@pytest.fixture
def cast(study, tmp_path):
    """A function that writes a synthetic ballot.

    `vote(pair, question, again)` is "A", "B", "same", "left" or "right"; `edit` may change the ballot before its
    checksum is taken.
    """
    _, key = study

    def write(rater, vote, count=27, edit=lambda ballot: None, file=None):
        answers = []
        for at, (pair, side) in enumerate(trials(key["study"], rater, 24, 3)[:count]):
            told = key["pairs"][pair]
            answer = {"left": told["images"][side], "right": told["images"][1 - side]}
            for question in QUESTIONS:
                choice = vote(pair, question, at >= 24)
                if choice in ("A", "B"):
                    choice = "left" if told["runs"][side] == choice else "right"
                answer[question] = choice
            answers.append(answer)
        ballot = {"study": key["study"], "rater": rater, "synthetic": True, "answers": answers}
        edit(ballot)
        path = tmp_path / (file or f"ballot-{rater}.json")
        path.write_text(json.dumps(ballot | {"checksum": checksum(ballot)}, indent=1))
        return path

    return write


@pytest.fixture
def score(study, capsys):
    """A function: ballots and flags -> result.json and what is printed."""

    def call(*arguments):
        capsys.readouterr()
        main(["score", str(study[0]), *map(str, arguments)])
        return json.loads((study[0] / "result.json").read_text()), capsys.readouterr().out

    return call


def page_of(folder):
    html = (folder / "raters" / "index.html").read_text()
    return html, json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', html)[1])


def pixels(address):
    return base64.b64decode(address.removeprefix("data:image/png;base64,"))


# The page


def test_page_shows_the_pictures_that_the_key_tells(study, tmp_path):
    folder, key = study
    _, page = page_of(folder)
    assert (page["id"], page["repeats"], len(page["pairs"])) == (key["study"], 3, 24)
    runs = {"A": tmp_path / "dense", "B": tmp_path / "sparse"}
    assert key["runs"] == {name: str(run) for name, run in runs.items()}
    assert key["differ"] == {"cache.policy": ["full", "adsa"]}
    images = {name: np.load(run / "samples.npz")["arr_0"] for name, run in runs.items()}
    assert sorted(pair["image"] for pair in key["pairs"]) == list(range(24))
    for shown, told in zip(page["pairs"], key["pairs"], strict=True):
        assert shown["what"] == told["what"] == PROMPTS[told["image"]]
        assert [name for name, _ in shown["images"]] == told["images"]
        assert sorted(told["runs"]) == ["A", "B"]
        for (_, address), run in zip(shown["images"], told["runs"], strict=True):
            with Image.open(io.BytesIO(pixels(address))) as picture:
                assert (np.asarray(picture) == images[run][told["image"]]).all()


def test_page_is_blind_and_alone(study):
    folder, key = study
    html, page = page_of(folder)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["key.json", "index.html"]
    rest = html.replace("data:image/png;base64,", "")
    for pair in page["pairs"]:
        for name, address in pair["images"]:
            assert re.fullmatch("[0-9a-f]{8}", name)
            content, chunks, at = pixels(address), [], 8
            while at < len(content):
                chunks.append(content[at + 4 : at + 8])
                at += 12 + int.from_bytes(content[at : at + 4], "big")
            assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
            rest = rest.replace(address.split(",")[1], "")
    for telling in ("dense", "sparse", "full", "adsa", "cache", "policy", "seed"):
        assert telling not in rest.lower()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|src *= *[\"']", rest)
    assert html.count("</script>") == 2
    assert len({tuple(pair["runs"]) for pair in key["pairs"]}) == 2


def test_seed_chooses_pairs_and_tells_nothing_of_sides(sampled, tmp_path):
    runs = [str(sampled("dense", "full")), str(sampled("sparse", "adsa"))]
    keys = {}
    for name, seed in (("first", "5"), ("same", "5"), ("other", "6")):
        main(["make", *runs, "--pairs", "12", "--seed", seed, "--output", str(tmp_path / name)])
        keys[name] = json.loads((tmp_path / name / "key.json").read_text())
    images = {name: [pair["image"] for pair in key["pairs"]] for name, key in keys.items()}
    assert images["first"] == images["same"] != images["other"]
    names = [{name for pair in key["pairs"] for name in pair["images"]} for key in keys.values()]
    assert len(set().union(*names)) == 3 * 24
    words = [pair["what"] for pair in keys["other"]["pairs"]]
    assert {word: words.count(word) for word in CLASSES} == dict.fromkeys(CLASSES, 3)


def test_choice_is_balanced():
    conditions = [0] * 50 + [1] * 3 + [2] * 50 + [3] * 50
    chosen = choose(conditions, 17, seed=1)
    assert len(set(chosen)) == 17
    assert np.bincount([conditions[index] for index in chosen]).tolist() in ([5, 3, 5, 4], [5, 3, 4, 5], [4, 3, 5, 5])
    rare = [choose(conditions, 1, seed)[0] in (50, 51, 52) for seed in range(200)]
    assert 30 < sum(rare) < 70  # a class with few images is as likely as the others


@pytest.mark.parametrize(
    "other, flags, told",
    [
        ({"seed": 1}, [], r"run\.seed is 0 and 1"),
        ({"run.image_size_eval": 16}, [], r"run\.image_size_eval is 8 and 16"),
        ({"run.num_fid_samples": 23}, [], r"run\.num_fid_samples is 24 and 23"),
        ({"prompts": PROMPTS}, [], r"model\.gpt_type is 'c2i' and 't2i'"),
        ({"labels": np.arange(24) // 6}, [], "other classes or prompts: those of image 1 are 1 and 0"),
        ({"policy": "full"}, [], "the same settings throughout"),
        ({"status": "sampled"}, [], "not complete.*run the same sampling command again"),
        ({}, ["--pairs", "25"], "--pairs 25: .*has 24 images"),
        ({}, ["--pairs", "3"], "--repeats 4 of 3 pairs"),
        ({}, ["--class-names", "none.json"], "none.json: .*No such file"),
        ({"named": False}, [], "no names to show to raters.*--class-names FILE"),
    ],
)
def test_runs_that_make_no_study(sampled, tmp_path, other, flags, told):
    named = other.get("named", True)
    runs = sampled("dense", named=named), sampled("other", **{"policy": "adsa"} | other)
    with pytest.raises((EvaluationError, OptionError), match=told):
        main(["make", *map(str, runs), "--pairs", "8", *flags, "--output", str(tmp_path / "study")])
    assert not (tmp_path / "study").exists()


def test_folders_that_make_no_study(study, sampled, folder, tmp_path):
    runs = [str(tmp_path / "dense"), str(tmp_path / "sparse")]
    with pytest.raises(EvaluationError, match="is a study already, whose ballots need it"):
        main(["make", *runs, "--pairs", "8", "--output", str(study[0])])
    with pytest.raises(EvaluationError, match="a run of prompts"):
        main(["make", *runs, "--class-names", "x.json", "--output", str(tmp_path / "new")])
    pictures, _ = folder("pictures")
    with pytest.raises(EvaluationError, match=r"pictures: has no run\.json"):
        main(["make", runs[0], str(pictures), "--output", str(tmp_path / "new")])
    (tmp_path / "dense" / "captions.txt").unlink()
    with pytest.raises(EvaluationError, match=r"dense: not readable as a run .*captions\.txt"):
        main(["make", *runs, "--output", str(tmp_path / "new")])


def test_names_of_classes_can_be_given(sampled, tmp_path):
    runs = [str(sampled("dense", named=False)), str(sampled("sparse", "adsa", named=False))]
    (tmp_path / "names.json").write_text(json.dumps([f"a {name}" for name in CLASSES]))
    flags = ["--pairs", "4", "--class-names", str(tmp_path / "names.json"), "--output", str(tmp_path / "study")]
    main(["make", *runs, *flags])
    _, page = page_of(tmp_path / "study")
    assert sorted(pair["what"] for pair in page["pairs"]) == ["a cat", "a clock", "a dog", "a heart"]


# What a rater sees


def test_order_is_that_of_the_page():
    """Numbers as node computes them by the page's own functions, and published ones of FNV-1a."""
    assert [user_study.text_hash(text) for text in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]
    draw = user_study.numbers(12345)
    assert [draw(1000), draw(1000), draw(7), draw(2**20)] == [979, 306, 3, 857666]
    assert trials("5eed", "r1", 6, 2) == [(0, 1), (5, 0), (3, 1), (4, 1), (2, 0), (1, 0), (0, 0), (5, 1)]
    assert trials("5eed", "r2", 6, 2) == [(1, 0), (2, 1), (4, 0), (0, 0), (5, 1), (3, 1), (1, 1), (2, 0)]
    answers = [{"left": "aa", "right": "bb", "match": "left", "quality": "same"}]
    assert checksum({"study": "5eed", "rater": "r1", "synthetic": True, "answers": answers}) == "8f5db870"
    html = user_study.TEMPLATE.read_text(encoding="utf-8")
    functions = html[html.index("function hash") : html.index("// localStorage may")]
    assert hashlib.sha256(functions.encode()).hexdigest().startswith("290f6078c2aca8dd"), (
        "the page's functions have changed: compute the numbers above by them, for example in node, and put them here"
    )


def test_trials():
    seen = trials("study", "r1", 48, 4)
    assert sorted(pair for pair, _ in seen[:48]) == list(range(48))
    assert sum(side for _, side in seen[:48]) == 24
    assert seen[48:] == [(pair, 1 - side) for pair, side in seen[:4]]
    others = [trials("study", f"r{n}", 48, 0) for n in range(2, 200)]
    assert len({tuple(pair for pair, _ in other) for other in others}) == len(others)
    first = np.bincount([other[0][0] for other in others], minlength=48)
    assert first.max() < 16  # of about 4
    sides = np.mean([[side for _, side in sorted(other)] for other in others], 0)
    assert abs(sides - 0.5).max() < 0.16


# The score


def test_preferences_are_recovered(cast, score):
    """Both prefer B's fit, whatever side it was on; of looks one prefers A, and one can't tell."""
    looks = {"r1": "A", "r2": "same"}
    ballots = [cast(r, lambda pair, question, again, r=r: "B" if question == "match" else looks[r]) for r in looks]
    result, told = score(*ballots)
    match, quality = result["questions"]["match"], result["questions"]["quality"]
    assert (match["answers"], match["B"], match["A"]["share"]) == (48, {"share": 1, "interval": [1, 1]}, 0)
    assert match["sign_test"] == {"A": 0, "B": 24, "even": 0, "p": pytest.approx(0.5**23)}
    assert (match["kappa"], match["kappa_pairs"]) == (None, 24)
    assert [quality[name]["share"] for name in ("A", "B", "tie")] == [0.5, 0, 0.5]
    assert quality["A"]["interval"] == [0, 1]  # either rater may be drawn twice
    assert quality["sign_test"]["A"] == 24
    assert quality["kappa"] == pytest.approx(-1)  # they never agree, as evenly as can be
    expected = {"answers": 27, "repeats": 3, "same": {"match": 3, "quality": 3}}
    assert result["raters"] == {"r1": expected, "r2": expected}
    assert result["synthetic"] is True
    assert "SYNTHETIC BALLOTS" in told
    assert "| fits the words better | 0.0 % (0.0 to 0.0) | 100.0 % (100.0 to 100.0) |" in told
    assert '* cache.policy: A "full", B "adsa"' in told


def test_consistency(cast, score):
    """Who always takes the left picture contradicts himself when sides are changed."""
    left = cast("left", lambda pair, question, again: "left")
    unsure = cast("unsure", lambda pair, question, again: "B" if again and question == "match" else "same")
    result, told = score(left, unsure)
    assert result["raters"]["left"]["same"] == {"match": 0, "quality": 0}
    assert result["raters"]["unsure"]["same"] == {"match": 0, "quality": 3}
    assert result["questions"]["match"]["tie"]["share"] == 0.5  # second answers to a pair don't count
    assert "| unsure | 27 | 3 | 0 | 3 |" in told


def test_incomplete_ballots(cast, score):
    whole = cast("r1", lambda pair, question, again: "A")
    part = cast("r2", lambda pair, question, again: "B", count=6)
    empty = cast("r3", lambda pair, question, again: "B", count=0)
    result, told = score(whole, part, empty)
    assert list(result["raters"]) == ["r1"]
    assert result["questions"]["match"]["answers"] == 24
    assert result["questions"]["match"]["kappa"] is None
    assert "Rater r2 gave 6 of 27 answers: left out." in told
    result, told = score(whole, part, empty, "--use-incomplete")
    assert result["questions"]["match"]["A"]["share"] == 24 / 30
    assert result["questions"]["match"]["sign_test"] == pytest.approx({"A": 18, "B": 0, "even": 6, "p": 0.5**17})
    assert result["questions"]["match"]["kappa_pairs"] == 6
    assert result["raters"]["r2"] == {"answers": 6, "repeats": 0, "same": {"match": 0, "quality": 0}}
    assert "Rater r2 gave 6 of 27 answers: used as far as they go." in told
    assert "Rater r3 gave 0 of 27 answers: left out." in told
    with pytest.raises(EvaluationError, match=r"no ballot has all 27 answers \(r2 6\); --use-incomplete"):
        score(part)
    with pytest.raises(EvaluationError, match=r"\(r3 0\)$"):
        score(empty, "--use-incomplete")


def _drop(ballot):
    del ballot["answers"][2]["quality"]


def _swap(ballot):
    answer = ballot["answers"][4]
    answer["left"], answer["right"] = answer["right"], answer["left"]


@pytest.mark.parametrize(
    "edit, told",
    [
        (lambda ballot: ballot.update(study="feed"), "of study feed, and this is study"),
        (lambda ballot: ballot.update(extra=1), "not a ballot: expected .*got .*extra"),
        (lambda ballot: ballot.update(synthetic="yes"), "synthetic is 'yes'"),
        (lambda ballot: ballot.update(rater="../r1"), "rater '../r1'"),
        (lambda ballot: ballot.update(rater="r2"), r"answer [1-9] is about the pictures .* where rater r2 saw"),
        (lambda ballot: ballot["answers"].append(ballot["answers"][0]), "a list of up to 27 answers"),
        (lambda ballot: ballot["answers"].__setitem__(1, None), "answer 2: expected left, right, .* got None"),
        (lambda ballot: ballot["answers"][3].update(match="both"), "answer 4: match is 'both'"),
        (_drop, "answer 3: expected left, right, match, quality, got left, right, match;"),
        (_swap, "answer 5 is about the pictures"),
    ],
)
def test_strict_reading(cast, score, study, edit, told):
    path = cast("r1", lambda pair, question, again: "A", edit=edit)
    with pytest.raises(EvaluationError, match=f"{path}.*{told}"):
        score(path)
    assert not (study[0] / "result.json").exists()


def test_files_that_are_no_ballots(cast, score, study, tmp_path):
    vote = lambda pair, question, again: "A"  # noqa: E731
    path = cast("r1", vote)
    twin = cast("r1", vote, file="twin.json")
    with pytest.raises(EvaluationError, match=f"{path} and {twin} are both of rater r1"):
        score(path, twin)
    person = cast("r2", vote, edit=lambda ballot: ballot.pop("synthetic"))
    with pytest.raises(EvaluationError, match=f"{path} is synthetic, and others are not"):
        score(person, path)
    path.write_text(path.read_text().replace('"match": "left"', '"match": "right"', 1))
    with pytest.raises(EvaluationError, match=r"r1\.json: damaged or edited"):
        score(path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(EvaluationError, match=r"r1\.json: not readable as a ballot"):
        score(path)
    with pytest.raises(EvaluationError, match=r"not readable as a study's key.*user_study\.py make"):
        main(["score", str(tmp_path), str(twin)])


# Statistics


def test_intervals_know_that_pairs_go_together():
    """Forty raters who all agree say as much as one: the interval is that of 64 pairs, not of 2560 answers."""
    votes = np.tile(np.arange(64) % 2, (40, 1))
    low, high = shares(votes)["A"]["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 64), rel=0.05)
    low, high = shares(votes.T)["A"]["interval"]  # 64 raters, each of one mind about 40 pairs
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 64), rel=0.05)


def test_shares_of_what_was_answered():
    found = shares(np.array([[0, 1, 2, MISSING], [0, MISSING, MISSING, MISSING]]))
    assert [found[name]["share"] for name in ("A", "B", "tie")] == [0.5, 0.25, 0.25]


def test_sign_test():
    """Pairs by majority: 8 for A, 2 for B, 2 even; the two-sided p of 2 in 10 is 2 (1 + 10 + 45) / 1024."""
    one = np.array([0] * 8 + [1] * 2 + [2, 0])
    two = np.array([0] * 4 + [2] * 4 + [1] * 2 + [2, 1])
    assert sign_test(np.stack([one, two])) == {"A": 8, "B": 2, "even": 2, "p": pytest.approx(112 / 1024)}
    assert sign_test(np.full((3, 5), 2))["p"] is None


# Fleiss 1971, table 1: psychiatrists of six who diagnose depression, personality disorder, schizophrenia, neurosis or
# another disease in each of 30 patients. The paper gives 0.430.
PSYCHIATRISTS = """
    00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
    00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""
# A widely used example of 14 raters, 10 subjects and 5 categories, whose kappa is 0.210.
FOURTEEN = """
    0,0,0,0,14 0,2,6,4,2 0,0,3,5,6 0,3,9,2,0 2,2,8,1,1 7,7,0,0,0 3,2,6,3,0 2,5,3,2,2 6,5,2,1,0 0,2,2,3,7"""


def test_fleiss_kappa():
    paper = np.array([list(row) for row in PSYCHIATRISTS.split()], int)
    assert paper.sum(0).tolist() == [26, 26, 30, 55, 43]
    assert fleiss_kappa(paper) == pytest.approx(0.430, abs=5e-4)
    example = np.array([row.split(",") for row in FOURTEEN.split()], int)
    assert fleiss_kappa(example) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None
    with pytest.raises(ValueError, match="same number of raters"):
        fleiss_kappa(np.array([[3, 0], [1, 1]]))
