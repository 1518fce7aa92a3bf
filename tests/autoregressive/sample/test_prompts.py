"""Prompts from every kind of file, and what is said about files that are none."""

import json

import pytest

from autoregressive.sample.options import OptionError, TextOptions
from autoregressive.sample.prompts import read_prompts


@pytest.fixture
def read(tmp_path):
    def read(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(TextOptions(prompt_file=str(path)))

    return read


def test_lines(read):
    prompts = read("Mine.txt", "\ufeffa red apple\r\n\r\n  two   words\t\n \nü 🍎")
    assert prompts.texts == ["a red apple", "two words", "ü 🍎"]
    assert prompts.name == "mine"
    assert [note.split(": ")[1] for note in prompts.notes(3)] == ["2 empty lines skipped"]


def test_llamagens_tables_are_separated_by_tabs(read):
    """PartiPrompts.tsv has more columns and bare quotation marks; coco_captions.csv is one column of bare commas."""
    parti = 'Prompt\tCategory\tNote\nA wall. The words "Fly, fly" on it.\tArts\t\nbond\tAbstract\tmeanings\nlife\n'
    assert read("PartiPrompts.tsv", parti).texts == ['A wall. The words "Fly, fly" on it.', "bond", "life"]
    coco = "Prompt\nThree women, two talking. \nA dog\n\nTwo cats\n"
    prompts = read("coco_captions.csv", coco)
    assert prompts.texts == ["Three women, two talking.", "A dog", "Two cats"]
    assert prompts.name == "coco_captions"
    assert "1 empty line skipped" in prompts.notes()[0]


def test_commas_and_quotation_marks(read):
    text = 'image_id,prompt\n7,"a dog, running"\n8,"a ""red""\napple"\n,a cat\nB9,x\n'
    prompts = read("some.csv", text)
    assert prompts.texts == ["a dog, running", 'a "red" apple', "a cat", "x"]
    assert prompts.image_ids == [7, 8, None, "B9"]


def test_jsonl(read):
    prompts = read("a.jsonl", '{"text": "a\\ncat", "image_id": 5}\n\n{"text": "dog", "image_path": "images/1.png"}\n')
    assert (prompts.texts, prompts.image_ids, prompts.skipped) == (["a cat", "dog"], [5, None], 1)


def test_inline():
    prompts = read_prompts(TextOptions(prompts=["a  cat", "", "a cat"]))
    assert prompts.texts == ["a cat", "", "a cat"]
    assert prompts.notes() == ["text.prompts: 1 empty prompt (index 1), sampled from no words"]


def test_empty_prompts_of_a_table_are_kept(read):
    prompts = read("a.tsv", "id\tPrompt\n" + "1\t\n" * 5 + "2\tx\n")
    assert prompts.texts == ["", "", "", "", "", "x"]
    assert "5 empty prompts (index 0, 1, 2, ...)" in prompts.notes()[0]
    assert prompts.first(2).notes(9)[1].endswith("2 prompts, so 2 images and not 9")


def test_files(read):
    prompts = read("a.csv", "Prompt,image_id\né,7\na cat,\n")
    files = prompts.files()
    assert files["captions.txt"].decode() == "é\na cat\n"
    rows = [json.loads(line) for line in files["result.jsonl"].decode().splitlines()]
    assert rows == [
        {"text": "é", "image_path": "images/000000.png", "image_id": 7},
        {"text": "a cat", "image_path": "images/000001.png"},
    ]
    again = read("result.jsonl", files["result.jsonl"])
    assert (again.texts, again.image_ids) == (prompts.texts, prompts.image_ids)
    assert again.digest() == prompts.digest() != prompts.first(1).digest()


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.txt", "\n \n", "a.txt: no prompts in it"),
        ("a.tsv", "", "a.tsv: no prompts in it"),
        ("a.tsv", "Prompt\tNote\n", "a.tsv: no prompts in it"),
        ("a.jsonl", "\n", "a.jsonl: no prompts in it"),
        ("a.csv", "id,caption\n1,x\n", "a.csv: no column Prompt; its columns: id, caption"),
        ("a.txt", b"caf\xc3\xa9 caf\xe9", r"a.txt: not UTF-8 text: byte 0xe9 at offset 9. Convert it"),
        ("a.tsv", "Prompt".encode("utf-16"), r"a.tsv: not UTF-8 text: byte 0xff at offset 0"),
        ("a.json", "{}", "not from .json.*scripts/coco_prompts.py"),
        ("a.tvs", "x", r"from .txt, .tsv, .csv, .jsonl, not from .tvs \(did you mean .tsv"),
        ("a", "x", "not from a file without ending"),
        ("a.jsonl", '{"text": "x"}\n{"text": 1', "a.jsonl, line 2: not JSON: "),
        ("a.jsonl", '\n{"txt": "x"}', 'a.jsonl, line 2: expected {"text": "a prompt", ...}, not {"txt": "x"}'),
        ("a.jsonl", "[1]", 'a.jsonl, line 1: expected {"text"'),
        ("a.jsonl", r'{"text": "\ud800"}', "index 0 is not Unicode text"),
        ("a.tsv", 'Prompt\nx\n"y\nz\n', "a.tsv, line 3: a quotation mark is left open"),
        ("a.csv", "id,Prompt\n1,x\n2,a dog, running\n", "line 3: 3 columns of the header's 2, with Prompt as number 2"),
        ("a.csv", "id,Prompt\n1\n", "line 2: 1 column of the header's 2"),
    ],
)
def test_refused(read, name, content, told):
    with pytest.raises(OptionError, match=told):
        read(name, content)


def test_no_such_file(tmp_path):
    with pytest.raises(OptionError, match=r"nowhere\.txt: No such file"):
        read_prompts(TextOptions(prompt_file=str(tmp_path / "nowhere.txt")))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(OptionError, match=r"folder\.txt: Is a directory"):
        read_prompts(TextOptions(prompt_file=str(tmp_path / "folder.txt")))
    with pytest.raises(OptionError, match="no prompts are given: name a file by --prompts"):
        read_prompts(TextOptions())
