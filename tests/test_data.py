import json

import pytest

from swarm.config import DataConfig, TrainingConfig
from swarm.errors import UserError
from trainers.data import (
    ByteTokenizer,
    Prefetch,
    documents,
    evaluation_microbatches,
    make_tokenizer,
    training_microbatches,
)
from trainers.packing import microbatches, sequences

TRAINING = TrainingConfig(sequence_tokens=16, microbatch_sequences=2, eval_microbatches=2)


def text_file(tmp_path, count=200):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {i} " + "word " * 1000 for i in range(count)))
    return str(path)


def test_packing_wastes_nothing_and_shares_the_border_token():
    rows = list(sequences(["abcdef", "gh"], ByteTokenizer(), 4))
    text = b"abcdef\0gh\0"
    assert [bytes(r) for r in rows] == [text[0:5], text[4:9]]


def test_microbatches_are_stacks_of_whole_rows():
    batches = list(microbatches(([i] * 3 for i in range(5)), 2))
    assert [b.tolist() for b in batches] == [[[0] * 3, [1] * 3], [[2] * 3, [3] * 3]]


def test_training_and_held_out_text_do_not_overlap(tmp_path):
    data = DataConfig(source="text", path=text_file(tmp_path), validation_fraction=0.2)
    training = set(documents(data, validation=False, seed=0, forever=False))
    held_out = set(documents(data, validation=True, seed=0, forever=False))
    assert training and held_out and not training & held_out


def test_trainers_read_different_text_and_the_same_seed_the_same(tmp_path):
    data = DataConfig(source="text", path=text_file(tmp_path))

    def first(trainer):
        stream = training_microbatches(data, TRAINING, ByteTokenizer(), trainer=trainer)
        return [next(stream).tolist() for _ in range(3)]

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_tables_are_read(tmp_path, source):
    rows = [{"text": f"row {i} " * 50} for i in range(300)]
    if source == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = DataConfig(source=source, path=str(path))
    found = set(documents(data, validation=False, seed=0, forever=False))
    found |= set(documents(data, validation=True, seed=0, forever=False))
    assert found == {row["text"] for row in rows}


def test_the_standard_library_is_text_enough_without_any_download():
    data = DataConfig()
    batch = next(training_microbatches(data, TRAINING, ByteTokenizer(), trainer=0))
    assert batch.shape == (2, 17) and batch.min() >= 0 and batch.max() < 256
    assert len(evaluation_microbatches(data, TRAINING, ByteTokenizer())) == 2


def test_a_tokenizer_file_is_used_and_its_vocabulary_checked(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["hello world, hello swarm"] * 10, trainers.BpeTrainer(vocab_size=300))
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    data = DataConfig(tokenizer=str(path))
    loaded = make_tokenizer(data, 300)
    assert loaded.encode("hello swarm")
    with pytest.raises(UserError, match=r"model\.vocabulary"):
        make_tokenizer(data, 4)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"path": "/nowhere/*.txt"}, "no such file"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "no such file"),
    ],
)
def test_missing_files_are_one_clear_line(tmp_path, change, says):
    data = DataConfig(**({"source": "text", "path": text_file(tmp_path, 3)} | change))
    with pytest.raises(UserError, match=says):
        make_tokenizer(data, 256)
        evaluation_microbatches(data, TRAINING, ByteTokenizer())


def test_empty_data_is_one_clear_line(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    data = DataConfig(source="text", path=str(path))
    with pytest.raises(UserError, match="is it empty"):
        next(training_microbatches(data, TRAINING, ByteTokenizer(), trainer=0))


def test_a_wrong_column_names_those_that_exist(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "x"}\n')
    data = DataConfig(source="jsonl", path=str(path))
    with pytest.raises(UserError, match="body"):
        next(documents(data, validation=False, seed=0, forever=False))


def test_prefetch_hands_on_items_errors_and_the_end():
    assert list(Prefetch(iter([1, 2, 3]))) == [1, 2, 3]

    def failing():
        yield 1
        raise UserError("no more")

    items = iter(Prefetch(failing()))
    assert next(items) == 1
    with pytest.raises(UserError, match="no more"):
        next(items)
