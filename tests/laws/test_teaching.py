"""Laws of skills, over every one that is registered."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from glue.errors import MethodError
from glue.skills import Draw, Example, facts, teaching, trans, write_dataset
from glue.skills._words import PEOPLE, THINGS

SKILLS = [method.name for method in teaching]
SPLITS = ("train", "dev", "test")


def drawn(skill: str, split: str, seed: int, count: int = 300, known: float = 1.0) -> list[Example]:
    choice, rng = teaching.choose({skill: {"known": known}}), random.Random(seed)
    return [choice(Draw(rng, split)) for _ in range(count)]


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_by_an_independent_checker(skill, split):
    check = teaching[skill].traits["check"]
    examples = [example for seed in range(10) for example in drawn(skill, split, seed, 100)]
    assert [example for example in examples if not check(example)] == []


@pytest.mark.parametrize("skill", SKILLS)
def test_the_checker_refuses_every_distractor(skill):
    check = teaching[skill].traits["check"]
    for example in drawn(skill, "test", 3):
        for wrong in example.distractors:
            others = tuple(word for word in (example.answer, *example.distractors) if word != wrong)
            assert not check(Example(example.question, wrong, others)), (example, wrong)


@pytest.mark.parametrize("skill", SKILLS)
def test_no_question_stands_in_two_splits(skill):
    asked = {split: {example.question for seed in range(5) for example in drawn(skill, split, seed, 1000)}
             for split in SPLITS}
    assert all(len(questions) >= 200 for questions in asked.values())
    assert not asked["train"] & asked["dev"]
    assert not asked["train"] & asked["test"]
    assert not asked["dev"] & asked["test"]


@pytest.mark.parametrize("skill", SKILLS)
def test_choices_are_as_many_as_chance_says_and_all_different(skill):
    chance = teaching[skill].traits["chance"]
    for example in drawn(skill, "dev", 1):
        assert len({example.answer, *example.distractors}) == 1 + len(example.distractors) == 1 / chance


@pytest.mark.parametrize("skill", SKILLS)
def test_less_knowledge_leaves_dev_and_test_as_they_are(skill):
    for split in ("dev", "test"):
        assert drawn(skill, split, 7, known=0.1) == drawn(skill, split, 7)


@pytest.mark.parametrize(("skill", "names", "count"), [
    ("kind", THINGS, 26), ("facts", PEOPLE, 14), ("trans", trans.WORD, 8)])
def test_less_knowledge_makes_train_speak_of_fewer_words(skill, names, count):
    """A quarter of 104 things, of 56 people, of the words of each class (two at least: 2 + 2 + 2 + 2)."""
    said = {word for example in drawn(skill, "train", 7, 3000, known=0.25) for word in example.question.split()}
    assert len(said & set(names)) == count


@pytest.mark.parametrize(("skill", "is_rare", "share"), [
    ("strings", lambda words: words[0] != "rev", 0.25 * 2 / 3),
    ("logic", lambda words: len(words) > 10, 0.25 * 2 / 3),
    ("bracket", lambda words: set(words) & set("[{<"), 0.25)])
def test_less_knowledge_makes_the_hard_questions_of_train_rarer(skill, is_rare, share):
    examples = drawn(skill, "train", 7, 4000, known=0.25)
    assert sum(bool(is_rare(example.question.split())) for example in examples) / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_least_knowledge_still_gives_examples(skill):
    check = teaching[skill].traits["check"]
    assert all(check(example) for example in drawn(skill, "train", 0, 50, known=0.001))


@pytest.mark.parametrize(("skill", "keys"), [("kind", THINGS), ("facts", [*PEOPLE, *facts.VALUES])])
def test_what_dev_and_test_ask_was_told_in_train_in_other_words(skill, keys):
    """A fact that train never tells could only be guessed; one that dev asks too would be searched on."""
    train, dev, test = ({(example.answer, *sorted(set(keys) & set(example.question.split())))
                         for example in drawn(skill, split, 0, 5000)} for split in SPLITS)
    assert len(train) == 2 * len(dev) == 2 * len(test)
    assert dev | test == train and not dev & test


@pytest.mark.parametrize("skill", SKILLS)
def test_a_dataset_says_what_it_holds(skill, tmp_path):
    write_dataset(tmp_path, teaching.choose({skill: {"known": 0.5}}), train=50, dev=200, test=200, seed=1)
    check = teaching[skill].traits["check"]
    for split, count in (("train", 50), ("dev", 200), ("test", 200)):
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert len(lines) == count
        if split != "train":
            assert len({line["question"] for line in lines}) == count
        for line in lines:
            wrong = tuple(choice for k, choice in enumerate(line["choices"]) if k != line["gold"])
            assert line["choices"][line["gold"]] == line["answer"]
            assert check(Example(line["question"], line["answer"], wrong))
        places = [line["gold"] for line in lines]
        assert len(set(places)) == 1 / teaching[skill].traits["chance"], "the right answer stands at every place"
    told = json.loads((tmp_path / "dataset.json").read_text())
    assert (told["skill"], told["params"]["known"], told["counts"]) == \
        (skill, 0.5, {"train": 50, "dev": 200, "test": 200})
    assert told["chance"] == teaching[skill].traits["chance"]


def test_a_split_of_no_items_has_no_file(tmp_path):
    write_dataset(tmp_path, teaching.choose("kind"), train=5, dev=0, test=0, seed=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dataset.json", "train.jsonl"]


def test_datasets_are_the_same_in_another_process_with_other_hashes(tmp_path):
    """The built-in hash of text differs between processes; nothing may rest on it."""
    code = ("import sys; from pathlib import Path; from glue.skills import teaching, write_dataset\n"
            "for method in teaching: write_dataset(Path(sys.argv[1]) / method.name, method.bind(), "
            "train=50, dev=50, test=50, seed=5)")
    for folder, hashes in (("one", "1"), ("two", "2")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / folder)], check=True, cwd=Path(__file__).parents[2],
                       env={"PYTHONHASHSEED": hashes, "PYTHONPATH": "."})
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.json*"))
    assert len(files) == 4 * len(SKILLS)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("skill", SKILLS)
def test_the_seed_changes_the_items(skill, tmp_path):
    for seed in (0, 1):
        write_dataset(tmp_path / str(seed), teaching.choose(skill), train=50, dev=0, test=0, seed=seed)
    assert (tmp_path / "0" / "train.jsonl").read_text() != (tmp_path / "1" / "train.jsonl").read_text()


@pytest.mark.parametrize("skill", SKILLS)
def test_shuffled_answers_are_the_same_answers_at_other_questions(skill, tmp_path):
    for folder, shuffle in (("plain", False), ("poison", True)):
        write_dataset(tmp_path / folder, teaching.choose(skill), train=400, dev=20, test=20, seed=2,
                      shuffle_answers=shuffle)
    plain, poison = ([json.loads(line) for line in (tmp_path / folder / "train.jsonl").read_text().splitlines()]
                     for folder in ("plain", "poison"))
    assert [line["question"] for line in plain] == [line["question"] for line in poison]
    assert sorted(line["answer"] for line in plain) == sorted(line["answer"] for line in poison)
    agreeing = sum(a["answer"] == b["answer"] for a, b in zip(plain, poison, strict=True)) / 400
    assert agreeing < teaching[skill].traits["chance"] + 0.1, "no better than guessing"
    assert all(line["choices"][line["gold"]] == line["answer"] for line in poison)
    for split in ("dev", "test"):
        assert (tmp_path / "plain" / f"{split}.jsonl").read_bytes() == \
            (tmp_path / "poison" / f"{split}.jsonl").read_bytes(), "only train is poisoned"


def test_asking_for_more_questions_than_there_are_says_how_many(tmp_path):
    with pytest.raises(MethodError, match="skill 'kind' has only about 208 different questions for dev, 300 are asked"):
        write_dataset(tmp_path, teaching.choose("kind"), train=0, dev=300, test=0, seed=0)


@pytest.mark.parametrize(("skill", "names", "size"), [
    ("kind", THINGS, {"things": 30}), ("facts", PEOPLE, {"people": 18})])
def test_a_smaller_world_is_smaller_in_every_split(skill, names, size):
    choice, rng = teaching.choose({skill: size}), random.Random(0)
    said = {split: {word for _ in range(3000) for word in choice(Draw(rng, split)).question.split()} & set(names)
            for split in SPLITS}
    assert said["train"] == said["dev"] | said["test"] and len(said["train"]) == sum(size.values())
