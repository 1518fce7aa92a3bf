"""A blind study of two sampling runs: a page of picture pairs for raters, and a score of their ballots. See --help."""

import argparse
import base64
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.stats import binomtest  # noqa: E402
from tqdm import tqdm  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import versions  # noqa: E402
from autoregressive.sample.labels import Classes  # noqa: E402
from autoregressive.sample.options import ModelOptions, RunOptions  # noqa: E402
from autoregressive.sample.prompts import number  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.bootstrap import CONFIDENCE, RESAMPLES  # noqa: E402
from evaluations.extractors import EvaluationError  # noqa: E402
from evaluations.features import ImageSet, open_set  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from tokenizer.files import atomic_file, write_json  # noqa: E402

TEMPLATE = Path(__file__).with_name("user_study.html")
QUESTIONS = {"match": "fits the words better", "quality": "looks better"}
CHOICES = ("left", "same", "right")
A, B, TIE, MISSING = 0, 1, 2, -1  # what a vote is for
RATER = re.compile(r"[a-z0-9-]{1,32}")
SEED = 2020  # of the bootstrap
# What two runs must share for their images to make fair pairs; their classes or prompts are compared one by one.
SAME = ("model.gpt_type", "run.seed", "run.num_fid_samples", "run.image_size_eval")

EPILOG = """\
`make` writes DIR/raters/index.html, one page that holds its pictures and needs no network: give it to the raters, each
with a code of their own (r1, r2, ...). DIR/key.json tells which picture is of which run: keep it from them. Each rater
sees the pairs in an order, and on sides, that follow from the code; some pairs come twice, with sides changed, which
measures how consistent the rater is. At the end a rater saves ballot-CODE.json and sends it back.

`score` reads these ballots, prints Markdown and writes DIR/result.json.

examples:
  48 pairs and 4 of them twice, as many as in the paper's study
    python evaluations/user_study.py make samples/DENSE_RUN samples/ADSA_RUN --output samples/study
    python evaluations/user_study.py score samples/study ballots/ballot-*.json"""


# What a rater sees. user_study.html has the same three functions.


def text_hash(text: str) -> int:
    """32 bits of FNV-1a."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def numbers(state: int) -> Callable[[int], int]:
    """The generator mulberry32 with a 32-bit state, as a function that draws from 0 to limit - 1."""

    def draw(limit: int) -> int:
        nonlocal state
        state = (state + 0x6D2B79F5) & 0xFFFFFFFF
        z = (state ^ state >> 15) * (state | 1) & 0xFFFFFFFF
        z ^= (z + (z ^ z >> 7) * (z | 61)) & 0xFFFFFFFF
        return (z ^ z >> 14) * limit >> 32

    return draw


def trials(study: str, rater: str, pairs: int, repeats: int) -> list[tuple[int, int]]:
    """What a rater is shown, in order: (pair, which of its two pictures is on the left).

    All pairs in random order, on the left the second picture in half of them; then the first `repeats` of them again,
    with sides changed.
    """
    draw = numbers(text_hash(f"{study}:{rater}"))

    def shuffled() -> list[int]:
        items = list(range(pairs))
        for i in range(pairs - 1, 0, -1):
            j = draw(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    order, sides = shuffled(), shuffled()
    once = [(pair, side % 2) for pair, side in zip(order, sides, strict=True)]
    return once + [(pair, 1 - side) for pair, side in once[:repeats]]


def checksum(ballot: dict[str, Any]) -> str:
    """Of a ballot without its checksum. It finds slips and damage; it is no signature."""
    return f"{text_hash(json.dumps(ballot, separators=(',', ':'), ensure_ascii=False)):08x}"


# Make


@dataclass
class Run:
    """A finished sampling run.

    Attributes:
        path: its folder.
        settings: what run.json says that the images depend on.
        images: in order.
        conditions: the class or prompt of each image.
        words: what raters are told for it.
    """

    path: Path
    settings: dict[str, Any]
    images: ImageSet
    conditions: list[Hashable]
    words: list[str]


def open_run(path: Path, class_names: Path | None = None) -> Run:
    """Read a run of classes or prompts. Raises EvaluationError if it is not finished, or its classes have no names."""
    if not (path / "run.json").exists():
        raise EvaluationError(
            f"{path}: has no run.json; give a folder that sample_c2i_ddp.py or sample_t2i_ddp.py filled"
        )
    images = open_set(path, "")[0]
    try:
        record = json.loads((path / "run.json").read_text())
        settings, model, run = record["settings"], record["config"]["model"], record["config"]["run"]
        if model["gpt_type"] == "t2i":
            if class_names is not None:
                raise EvaluationError(f"{path}: a run of prompts, which --class-names {class_names} says nothing about")
            conditions = (path / "captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        else:
            conditions = np.load(path / "labels.npy").tolist()
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise EvaluationError(f"{path}: not readable as a run ({told}); sample it again") from error
    if len(images) != len(conditions):
        raise EvaluationError(f"{path}: {len(images)} images, {len(conditions)} classes or prompts; sample it again")
    words = conditions
    if model["gpt_type"] == "c2i":
        classes = Classes(
            ModelOptions(gpt_ckpt=model["gpt_ckpt"], num_classes=model["num_classes"]),
            RunOptions(class_names=run["class_names"] if class_names is None else str(class_names)),
        )
        if classes.names[0] == "class 0":  # which stands for a name that isn't known
            raise EvaluationError(
                f"{path}: its classes have no names to show to raters, as there is no classes.json beside "
                f"{model['gpt_ckpt']}; name one by --class-names FILE"
            )
        words = [classes.names[label] for label in conditions]
    return Run(path, settings, images, conditions, words)


def differences(a: Run, b: Run) -> dict[str, list[Any]]:
    """{setting: [A's, B's]} of what the runs don't share. Raises EvaluationError if they can't be compared in pairs."""
    differ = {
        key: [a.settings.get(key), b.settings.get(key)]
        for key in a.settings | b.settings
        if a.settings.get(key) != b.settings.get(key)
    }
    both = f"{a.path} and {b.path}"
    unfair = [f"{key} is {differ[key][0]!r} and {differ[key][1]!r}" for key in SAME if key in differ]
    if unfair:
        raise EvaluationError(f"{both} make no fair pairs: {'; '.join(unfair)}. Sample both with the same")
    for index, pair in enumerate(zip(a.conditions, b.conditions, strict=True)):
        if pair[0] != pair[1]:
            told = f"those of image {index} are {pair[0]!r} and {pair[1]!r}"
            raise EvaluationError(f"{both} have other classes or prompts: {told}. Sample both with the same")
    if not differ:
        raise EvaluationError(f"{both} have the same settings throughout: there is nothing to tell apart")
    return differ


def choose(conditions: Sequence[Hashable], pairs: int, seed: int) -> list[int]:
    """Images for a study, int [pairs]: of as many different classes or prompts as there are, and as evenly."""
    rng = np.random.default_rng(seed)
    groups: dict[Hashable, list[int]] = {}
    for index in rng.permutation(len(conditions)).tolist():
        groups.setdefault(conditions[index], []).append(index)
    names = sorted(groups)
    rounds = zip_longest(*(groups[names[i]] for i in rng.permutation(len(names))))
    return [index for some in rounds for index in some if index is not None][:pairs]


def make(
    run_a: Path,
    run_b: Path,
    output: Path,
    *,
    pairs: int = 48,
    repeats: int = 4,
    seed: int = 0,
    class_names: Path | None = None,
) -> dict[str, Any]:
    """Write a study of two runs into a folder; see the module's --help.

    Args:
        run_a, run_b: folders of finished runs with the same seeds and the same classes or prompts.
        output: the folder, made if need be.
        pairs: images of each run that are shown.
        repeats: how many pairs a rater sees twice.
        seed: of the choice of pairs. Names and sides of pictures are drawn from the system's entropy: what a rater
            could compute would not be blind.
        class_names: JSON list of names; None: as the run had them.

    Returns:
        What key.json holds.

    Raises:
        EvaluationError, OptionError: the message names the file or value and the way out.
    """
    a, b = open_run(run_a, class_names), open_run(run_b, class_names)
    differ = differences(a, b)
    worded = [index for index, words in enumerate(a.words) if words]
    if pairs > len(worded):
        raise EvaluationError(f"--pairs {pairs}: {run_a} has {len(worded)} images with words to show")
    if repeats > pairs:
        raise EvaluationError(f"--repeats {repeats} of {pairs} pairs: at most all of them can come twice")
    key_file, page_file = output / "key.json", output / "raters" / "index.html"
    if key_file.exists():
        raise EvaluationError(f"{key_file}: is a study already, whose ballots need it; choose another --output")
    page_file.parent.mkdir(parents=True, exist_ok=True)

    chance, study = secrets.SystemRandom(), secrets.token_hex(4)
    names = (f"{name:08x}" for name in chance.sample(range(2**32), 2 * pairs))
    key_pairs, page_pairs = [], []
    chosen = [worded[i] for i in choose([a.conditions[index] for index in worded], pairs, seed)]
    for index in tqdm(chosen, desc="pairs", unit=" pairs", disable=None):
        runs = chance.sample([A, B], 2)
        shown = [(next(names), _data_address((a, b)[run].images.read(index))) for run in runs]
        page_pairs.append({"what": a.words[index], "images": shown})
        told = {"image": index, "what": a.words[index], "images": [name for name, _ in shown]}
        key_pairs.append(told | {"runs": ["AB"[run] for run in runs]})
    page = json.dumps({"id": study, "repeats": repeats, "pairs": page_pairs}).replace("<", "\\u003c")
    with atomic_file(page_file) as file:
        file.write(TEMPLATE.read_text(encoding="utf-8").replace("STUDY", page, 1).encode())
    key = {
        "keep from raters": "tells which picture is of which run",
        "study": study,
        "command": _command(),
        "versions": versions(),
        "runs": {"A": str(run_a), "B": str(run_b)},
        "differ": differ,
        "seed": seed,
        "repeats": repeats,
        "pairs": key_pairs,
    }
    write_json(key_file, key)
    return key


def _data_address(image: np.ndarray) -> str:
    """A picture as a data: address, of a PNG that holds nothing but pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _command() -> str:
    return " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


# Score


@dataclass
class Ballot:
    """What a rater answered.

    Attributes:
        path: the file.
        rater: the code.
        synthetic: made by a program, for a test.
        votes: int {question: [pairs]}: A, B, TIE or MISSING.
        again: likewise of the pairs that came twice, the second time.
    """

    path: Path
    rater: str
    synthetic: bool
    votes: dict[str, np.ndarray]
    again: dict[str, np.ndarray]

    def count(self) -> int:
        """Answers to each question, repeats included."""
        return sum(int((votes["match"] != MISSING).sum()) for votes in (self.votes, self.again))


def read_key(folder: Path) -> dict[str, Any]:
    """The key of a study. Raises EvaluationError."""
    path = folder / "key.json"
    try:
        key = json.loads(path.read_text())
        lacking = {"study", "runs", "differ", "repeats", "pairs"} - key.keys()
        if lacking:
            raise ValueError(f"lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"{path}: not readable as a study's key ({error}); DIR is a folder that `user_study.py make` has written"
        ) from error
    return key


def read_ballot(path: Path, key: dict[str, Any]) -> Ballot:
    """Read a ballot strictly.

    Raises:
        EvaluationError: not a ballot, of another study, damaged or edited, or an answer that misses something. That a
            rater stopped early is no error here.
    """
    cure = "ask the rater to save the ballot again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: not readable as a ballot ({error}); {cure}") from error
    needed = {"study", "rater", "answers", "checksum"}
    if not isinstance(content, dict) or not needed <= content.keys() <= needed | {"synthetic"}:
        has = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise EvaluationError(f"{path}: not a ballot: expected {', '.join(sorted(needed))}, got {has}")
    if content["study"] != key["study"]:
        raise EvaluationError(f"{path}: a ballot of study {content['study']}, and this is study {key['study']}")
    told = content.pop("checksum")
    if told != checksum(content):
        raise EvaluationError(f"{path}: damaged or edited (checksum {told}, expected {checksum(content)}); {cure}")
    rater, answers, synthetic = content["rater"], content["answers"], content.get("synthetic", False)
    if not isinstance(rater, str) or not RATER.fullmatch(rater):
        raise EvaluationError(f"{path}: rater {rater!r}: expected up to 32 small letters, digits and hyphens")
    if type(synthetic) is not bool:
        raise EvaluationError(f"{path}: synthetic is {synthetic!r}, expected true or false")

    pairs, repeats = key["pairs"], key["repeats"]
    shown = trials(key["study"], rater, len(pairs), repeats)
    if not isinstance(answers, list) or len(answers) > len(shown):
        raise EvaluationError(f"{path}: expected a list of up to {len(shown)} answers")
    votes = {question: np.full(len(pairs), MISSING) for question in QUESTIONS}
    again = {question: np.full(len(pairs), MISSING) for question in QUESTIONS}
    for at, (answer, (pair, side)) in enumerate(zip(answers, shown, strict=False), 1):
        where = f"{path}: answer {at}"
        if not isinstance(answer, dict) or answer.keys() != {"left", "right", *QUESTIONS}:
            has = ", ".join(answer) if isinstance(answer, dict) else repr(answer)
            raise EvaluationError(f"{where}: expected left, right, {', '.join(QUESTIONS)}, got {has}; {cure}")
        names = [pairs[pair]["images"][i] for i in (side, 1 - side)]
        if [answer["left"], answer["right"]] != names:
            raise EvaluationError(
                f"{where} is about the pictures {answer['left']} and {answer['right']}, where rater {rater} saw "
                f"{' and '.join(names)}: edited, or of another rater; {cure}"
            )
        for question in QUESTIONS:
            choice = answer[question]
            if choice not in CHOICES:
                raise EvaluationError(
                    f"{where}: {question} is {choice!r}, expected one of {', '.join(CHOICES)}; {cure}"
                )
            run = pairs[pair]["runs"][side if choice == "left" else 1 - side]
            times = votes if at <= len(pairs) else again
            times[question][pair] = TIE if choice == "same" else "AB".index(run)
    return Ballot(path, rater, synthetic, votes, again)


def shares(votes: np.ndarray) -> dict[str, dict[str, Any]]:
    """Shares of the votes for A, for B and for neither, with 95 % intervals.

    These are percentiles of a bootstrap that draws raters and pairs anew, both with replacement (Owen, The pigeonhole
    bootstrap, 2007): answers of one rater, and about one pair, go together, which intervals for independent answers
    (Wilson's) would leave out.

    Args:
        votes: int [raters, pairs]: A, B, TIE or MISSING.
    """
    rng = np.random.default_rng(SEED)
    raters, pairs = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64) for n in votes.shape)

    def drawn(which: np.ndarray) -> np.ndarray:
        return ((raters @ which) * pairs).sum(1)  # [RESAMPLES]

    there, tail = drawn(votes != MISSING), 50 * (1 - CONFIDENCE)
    found = {}
    for name, value in (("A", A), ("B", B), ("tie", TIE)):
        low, high = np.percentile(drawn(votes == value)[there > 0] / there[there > 0], [tail, 100 - tail])
        share = (votes == value).sum() / (votes != MISSING).sum()
        found[name] = {"share": float(share), "interval": [float(low), float(high)]}
    return found


def sign_test(votes: np.ndarray) -> dict[str, Any]:
    """For how many pairs A, or B, has more votes, and how likely so unequal numbers are if neither is better.

    A pair counts once, however many raters saw it, since their answers about it are not independent.

    Args:
        votes: int [raters, pairs].

    Returns:
        A, B, even: pairs. p: two-sided, of the binomial test; None if all are even.
    """
    lead = (votes == A).sum(0) - (votes == B).sum(0)
    wins = {"A": int((lead > 0).sum()), "B": int((lead < 0).sum())}
    decided = wins["A"] + wins["B"]
    p = float(binomtest(wins["A"], decided).pvalue) if decided else None
    return wins | {"even": len(lead) - decided, "p": p}


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement of raters beyond chance: 1 is full, 0 is as chance has it (Fleiss, Psychological Bulletin 76, 1971).

    Args:
        counts: int [subjects, categories], how many raters chose what; of as many raters, 2 or more, for each subject.

    Returns:
        None if all answers are in one category, where it is not defined.
    """
    raters = counts[0].sum()
    if raters < 2 or (counts.sum(1) != raters).any():
        raise ValueError(f"each subject needs the same number of raters, 2 or more; they have {counts.sum(1).tolist()}")
    agreement = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    by_chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((agreement.mean() - by_chance) / (1 - by_chance)) if (counts.sum(0) > 0).sum() > 1 else None


def score(folder: Path, paths: Sequence[Path], *, use_incomplete: bool = False) -> dict[str, Any]:
    """Read a study's ballots and write its result.json; see the module's --help.

    Args:
        folder: the study.
        paths: the ballots.
        use_incomplete: take the answers of raters who stopped early; else their ballots are left out.

    Returns:
        What result.json holds.

    Raises:
        EvaluationError: see :func:`read_ballot`; also two ballots of one rater, synthetic ones among people's, or none
            that is complete.
    """
    key = read_key(folder)
    total, ballots = len(key["pairs"]) + key["repeats"], {}
    for path in paths:
        ballot = read_ballot(path, key)
        if ballot.rater in ballots:
            both = f"{ballots[ballot.rater].path} and {path}"
            raise EvaluationError(f"{both} are both of rater {ballot.rater}; give one ballot for each rater")
        ballots[ballot.rater] = ballot
    marks = {ballot.synthetic for ballot in ballots.values()}
    if len(marks) > 1:
        some = next(ballot.path for ballot in ballots.values() if ballot.synthetic)
        raise EvaluationError(f"{some} is synthetic, and others are not: give the ballots of people alone")
    short = {rater: ballot.count() for rater, ballot in ballots.items() if ballot.count() < total}
    left_out = {rater for rater, answers in short.items() if not (use_incomplete and answers)}
    used = {rater: ballot for rater, ballot in ballots.items() if rater not in left_out}
    if not used:
        cure = "; --use-incomplete takes what there is" if any(short.values()) else ""
        told = ", ".join(f"{rater} {answers}" for rater, answers in short.items())
        raise EvaluationError(f"{folder}: no ballot has all {total} answers ({told}){cure}")

    result = {
        "study": key["study"],
        "synthetic": marks == {True},
        "command": _command(),
        "versions": versions(),
        "runs": key["runs"],
        "differ": key["differ"],
        "pairs": len(key["pairs"]),
        "questions": {},
        "raters": {},
        "incomplete": {r: {"answers": n, "of": total, "used": r in used} for r, n in short.items()},
        "protocol": {"confidence": CONFIDENCE, "bootstrap_resamples": RESAMPLES, "seed": SEED},
    }
    for question in QUESTIONS:
        votes = np.stack([ballot.votes[question] for ballot in used.values()])
        by_all = votes[:, (votes != MISSING).all(0)]
        counts = np.stack([(by_all == value).sum(0) for value in (A, B, TIE)], 1)
        result["questions"][question] = {
            "answers": int((votes != MISSING).sum()),
            **shares(votes),
            "sign_test": sign_test(votes),
            "kappa": fleiss_kappa(counts) if len(used) > 1 and len(counts) else None,
            "kappa_pairs": len(counts),  # that all raters saw
        }
    for rater, ballot in used.items():
        twice = ballot.again["match"] != MISSING
        same = {q: int((ballot.votes[q] == ballot.again[q])[twice].sum()) for q in QUESTIONS}
        result["raters"][rater] = {"answers": ballot.count(), "repeats": int(twice.sum()), "same": same}
    write_json(folder / "result.json", result)
    return result


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""

    def percent(part: dict[str, Any]) -> str:
        low, high = part["interval"]
        return f"{100 * part['share']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    def rounded(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = []
    if result["synthetic"]:
        lines += ["**SYNTHETIC BALLOTS: made by a program for a test. Nobody was asked.**", ""]
    lines += [
        f"Study {result['study']}: {number(result['pairs'], 'pair')}, {number(len(result['raters']), 'rater')}",
        "",
        *(f"* {name}: {run}" for name, run in result["runs"].items()),
        *(f"* {key}: A {json.dumps(a)}, B {json.dumps(b)}" for key, (a, b) in result["differ"].items()),
        "",
    ]
    votes, raters = [], []
    for question, found in result["questions"].items():
        test = found["sign_test"]
        cells = [QUESTIONS[question], *(percent(found[name]) for name in ("A", "B", "tie"))]
        cells += [f"{test['A']}, {test['B']}, {test['even']}", rounded(test["p"], 4), rounded(found["kappa"], 3)]
        votes.append(cells)
    for rater, found in result["raters"].items():
        counts = (found["answers"], found["repeats"], *(found["same"][question] for question in QUESTIONS))
        raters.append([rater, *map(str, counts)])
    columns = ["question", "A", "B", "no difference", "pairs for A, for B, even", "sign test p", "Fleiss' kappa"]
    lines += [markdown.table(columns, votes), ""]
    lines.append(markdown.table(["rater", "answers", "pairs seen twice", "same words", "same looks"], raters))
    for rater, found in result["incomplete"].items():
        what = "used as far as they go" if found["used"] else "left out"
        lines += ["", f"Rater {rater} gave {found['answers']} of {found['of']} answers: {what}."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""

    def count(text: str) -> int:
        value = int(text)
        if value < 0:
            raise argparse.ArgumentTypeError(f"{text} is negative")
        return value

    looks = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.split(" See")[0], **looks)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|score")
    making = commands.add_parser("make", help="write the page and its key", description="Write the page and its key.")
    add = making.add_argument
    add("run_a", metavar="RUN_A", type=Path, help="folder of a finished sampling run")
    add("run_b", metavar="RUN_B", type=Path, help="another, with the same seeds and the same classes or prompts")
    add("--pairs", type=positive, default=48, metavar="N", help="pairs in the study (default: %(default)s)")
    add("--repeats", type=count, default=4, metavar="N", help="how many come twice (default: %(default)s)")
    add("--seed", type=count, default=0, metavar="N", help="of the choice of pairs (default: %(default)s)")
    add("--class-names", type=Path, metavar="FILE", help="JSON list of names for a run of classes (default: the run's)")
    add("--output", type=Path, default=Path("samples/user_study"), metavar="DIR", help="(default: %(default)s)")
    scoring = commands.add_parser("score", help="read ballots", description="Read ballots; write DIR/result.json.")
    add = scoring.add_argument
    add("folder", metavar="DIR", type=Path, help="the study, as `make` wrote it")
    add("ballots", metavar="BALLOT", type=Path, nargs="+", help="what raters sent: ballot-CODE.json")
    add("--use-incomplete", action="store_true", help="take the answers of raters who stopped early")
    args = vars(parser.parse_args(argv))
    if args.pop("command") == "score":
        print(table(score(args["folder"], args["ballots"], use_incomplete=args["use_incomplete"])))
        return
    key = make(**args)
    output = args["output"]
    print(f"for the raters, each with a code: {output / 'raters' / 'index.html'}")
    print(f"keep from the raters: {output / 'key.json'}")
    print("A and B differ in:", *(f"  {name}: {a} and {b}" for name, (a, b) in key["differ"].items()), sep="\n")


if __name__ == "__main__":
    guarded(main)
