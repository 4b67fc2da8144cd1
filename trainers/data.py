"""Texts for training: from the Hub, from files, or from Python's own library; split, shuffled, tokenized.

Everything streams through `datasets`; nothing is held but its shuffle buffer. The order depends on the
run's seed and the trainer's number, so trainers see different text. Held-out documents are those whose
hash falls into the last `validation_fraction`, or the files of `validation_path`.

I/O: reads files or the network; slow, so the trainer iterates it in a thread (`prefetch`).
"""

import glob
import hashlib
import queue
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from swarm.config import DataConfig, TrainingConfig
from swarm.errors import UserError
from swarm.threads import Worker
from trainers.packing import Tokenizer, microbatches, sequences

T = TypeVar("T")


class ByteTokenizer:
    """UTF-8 bytes; byte 0, which text does not contain, separates documents."""

    vocabulary, separator = 256, 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))


class FileTokenizer:
    """A Hugging Face tokenizer.json; documents are separated by its end-of-text token, or by id 0."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        if not Path(path).is_file():
            raise UserError(f"data.tokenizer: no such file: {path}")
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise UserError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None
        self.vocabulary = self._tokenizer.get_vocab_size()
        ends = (self._tokenizer.token_to_id(t) for t in ("<|endoftext|>", "</s>", "<eos>", "[SEP]"))
        self.separator = next((i for i in ends if i is not None), 0)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def make_tokenizer(data: DataConfig, vocabulary: int) -> Tokenizer:
    """The tokenizer of the run. Raises UserError when the model's vocabulary cannot hold its ids."""
    tokenizer: Tokenizer = ByteTokenizer() if data.tokenizer == "byte" else FileTokenizer(data.tokenizer)
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"model.vocabulary: {vocabulary} is too small for the tokenizer's {tokenizer.vocabulary} ids"
        )
    return tokenizer


def documents(data: DataConfig, *, validation: bool, seed: int, forever: bool) -> Iterator[str]:
    """Texts of one split in seeded order; with `forever`, reshuffled for every pass.

    Raises:
        UserError: there is no such source, or no text in it.
    """
    dataset = _dataset(data, validation)
    passes = 0
    while True:
        shuffled = (
            dataset if validation else dataset.shuffle(seed + passes, buffer_size=data.shuffle_documents)
        )
        found = 0
        for row in shuffled:
            text = row.get(data.field)
            if not isinstance(text, str):
                columns = ", ".join(sorted(row))
                raise UserError(f"data.field: no text column {data.field!r}; the columns are: {columns}")
            if text.strip() and (data.validation_path or _is_held_out(text, data) == validation):
                found += 1
                yield text
        if not found:
            split = "held-out" if validation else "training"
            raise UserError(f"data: no {split} text in {data.path or data.source}; is it empty?")
        if not forever:
            return
        passes += 1


def _is_held_out(text: str, data: DataConfig) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 >= 1 - data.validation_fraction


def _dataset(data: DataConfig, validation: bool):  # type: ignore[no-untyped-def]
    import datasets

    datasets.disable_progress_bars()
    if data.source == "stdlib":
        return datasets.IterableDataset.from_generator(_library_sources)
    path = data.validation_path if validation and data.validation_path else data.path
    assert path is not None, "checked by the configuration"
    if data.source == "hub":
        try:
            return datasets.load_dataset(path, data.subset, split="train", streaming=True)
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: cannot open dataset {path!r} on the Hub: {error}") from None
    files = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
    if not files:
        raise UserError(f"data.path: no such file: {path}")
    if data.source == "text":
        return datasets.IterableDataset.from_generator(_text_documents, gen_kwargs={"files": files})
    builder = {"jsonl": "json", "parquet": "parquet"}[data.source]
    try:
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: cannot read {path}: {error}") from None


def _library_sources() -> Iterator[dict[str, str]]:
    """The modules of Python's standard library, without its tests: several MB on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not skipped & set(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            # Whole modules differ in kind: held out by section, validation resembles training.
            for start in range(0, len(text), 8192):
                yield {"text": text[start : start + 8192]}


def _text_documents(files: list[str]) -> Iterator[dict[str, str]]:
    """Sections of plain text files: paragraphs until at least 4,096 characters have come together."""
    for file in files:
        section: list[str] = []
        length = 0
        with Path(file).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                section.append(line)
                length += len(line)
                if length >= 4096 and not line.strip():
                    yield {"text": "".join(section)}
                    section, length = [], 0
        if section:
            yield {"text": "".join(section)}


def training_microbatches(
    data: DataConfig, training: TrainingConfig, tokenizer: Tokenizer, *, trainer: int, since: int = 0
) -> Iterator[torch.Tensor]:
    """Endless [B, T + 1] microbatches of training text, different for every trainer number and for those that
    begin later, when the run has taken `since` steps."""
    seed = training.seed + 7919 * trainer + 104729 * since
    texts = documents(data, validation=False, seed=seed, forever=True)
    return microbatches(sequences(texts, tokenizer, training.sequence_tokens), training.microbatch_sequences)


def evaluation_microbatches(
    data: DataConfig, training: TrainingConfig, tokenizer: Tokenizer
) -> list[torch.Tensor]:
    """The run's fixed held-out microbatches: the same for every trainer and every evaluation.

    Raises:
        UserError: the held-out text does not fill a single microbatch.
    """
    texts = documents(data, validation=True, seed=0, forever=False)
    rows = sequences(texts, tokenizer, training.sequence_tokens)
    wanted = training.eval_microbatches * training.microbatch_sequences
    # Spread over the held-out text rather than its first pages.
    pool = [row for _, row in zip(range(8 * wanted), rows, strict=False)]
    chosen = pool[:: max(1, len(pool) // wanted)][:wanted]
    found = list(microbatches(chosen, training.microbatch_sequences))
    if not found:
        raise UserError(
            f"data: the held-out text of {data.path or data.source} is shorter than one microbatch of "
            f"{training.microbatch_tokens} tokens"
        )
    return found


class Prefetch(Iterable[T]):
    """Iterate `source` in a thread, a bounded number of items ahead."""

    def __init__(self, source: Iterator[T], ahead: int = 8) -> None:
        self._source = source
        self._items: queue.Queue[T | BaseException] = queue.Queue(ahead)
        self._closed = threading.Event()
        Worker(self._fill, name="data", stop=self.close)

    def _fill(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
            raise StopIteration
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: "T | BaseException") -> bool:
        while not self._closed.is_set():
            try:
                self._items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._items.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._closed.set()
