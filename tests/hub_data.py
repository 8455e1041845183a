"""Small data sets under the names of real ones, kept as the datasets library keeps what it has loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def keep(cache: Path, path: str, name: str, splits: Mapping[str, Rows]) -> Path:
    """Write the rows of each split into `cache`, which is what HF_DATASETS_CACHE says; path, name: as the hub's."""
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter
    from datasets.naming import camelcase_to_snakecase

    owner, dataset = path.split("/")[0], camelcase_to_snakecase(path.split("/")[1])
    folder = cache / f"{owner}___{dataset}" / name / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    told, features = SplitDict(), None
    for split, rows in splits.items():
        features = Dataset.from_list(list(map(dict, rows))).features
        with ArrowWriter(features=features, path=str(folder / f"{dataset}-{split}.arrow")) as writer:
            for row in rows:
                writer.write(dict(row))
            writer.finalize()
        told.add(SplitInfo(split, num_examples=len(rows), dataset_name=dataset))
    DatasetInfo(features=features, builder_name="parquet", dataset_name=dataset, config_name=name, version="0.0.0",
                splits=told).write_to_directory(str(folder))
    return folder


def arc(items: int, first: int = 0) -> Rows:
    """Questions as those of ARC, in the words w3 to w39."""
    return [{"id": str(k), "question": f"w{3 + k % 37} w{3 + k * 7 % 31}", "answerKey": "ABCD"[k % 4],
             "choices": {"text": [f"w{3 + (5 * k + j) % 37}" for j in range(4)], "label": list("ABCD")}}
            for k in range(first, first + items)]


def gsm8k(answers: Sequence[str], first: int = 0) -> Rows:
    """Questions as those of GSM8K, with these answers."""
    return [{"question": f"w{3 + (first + k) % 37} w{3 + (first + k) * 7 % 31}", "answer": f"so #### {answer}"}
            for k, answer in enumerate(answers)]


def gpqa(items: int, first: int = 0) -> Rows:
    """Questions as those of GPQA, whose choices lm-eval shuffles."""
    return [{"Question": f"w{3 + k % 37}", "Correct Answer": f"w{3 + (k + 1) % 37}",
             **{f"Incorrect Answer {j}": f"w{3 + (k + 9 * j) % 37}" for j in (1, 2, 3)}}
            for k in range(first, first + items)]
