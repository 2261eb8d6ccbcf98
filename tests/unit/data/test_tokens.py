from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from regraft.data.encoding import bos_id
from regraft.data.records import Record
from regraft.data.text import Corpus
from regraft.data.tokens import calibration_windows, check_context, context_limit, encode_documents, pack
from regraft.errors import DataError, InputError

Make = Callable[..., PreTrainedTokenizerFast]
BOS = 1


def stories(count: int, words: int = 12) -> Corpus:
    texts = tuple(f"story {number} " + " ".join(f"w{number}x{word}" for word in range(words)) for number in range(count))
    return Corpus("stories", "all", documents=texts)


def test_documents_are_encoded_one_by_one_as_the_tokenizer_would(make_tokenizer: Make) -> None:
    tokenizer, corpus = make_tokenizer(), stories(5)
    assert encode_documents(corpus, tokenizer) == [tokenizer(text)["input_ids"] for text in corpus.documents]
    assert [ids[0] for ids in encode_documents(corpus, tokenizer)] == [BOS] * 5


def test_bos_follows_the_tokenizer_unless_told(make_tokenizer: Make) -> None:
    with_bos, without = make_tokenizer(bos=True), make_tokenizer(bos=False)
    assert (bos_id(with_bos), bos_id(without)) == (BOS, None)
    assert (bos_id(with_bos, False), bos_id(without, True)) == (None, BOS)
    corpus = stories(2)
    assert encode_documents(corpus, with_bos, bos=False) == encode_documents(corpus, without)
    without.bos_token = None
    with pytest.raises(InputError, match="needs a BOS token"):
        bos_id(without, True)


def test_records_become_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    (ids,) = encode_documents(Corpus("r", "all", records=(Record("Say hi.", "", "hi"),)), tokenizer)
    text = "".join(tokenizer.convert_ids_to_tokens(ids[1:]))
    assert text.endswith("Say hi.\n\n### Response:\nhi")


def test_packing_joins_cuts_and_drops_the_rest() -> None:
    blocks = pack([[1, 10, 11], [1, 12], [1, 13, 14, 15]], block=4)
    assert blocks.tolist() == [[1, 10, 11, 1], [12, 1, 13, 14]]
    assert blocks.dtype == torch.int64
    assert pack([[10, 11], [12], [13]], block=3, separator=2).tolist() == [[10, 11, 2], [12, 2, 13]]
    with pytest.raises(DataError, match=r"3 tokens.*one window of 4"):
        pack([[1, 2, 3]], block=4)
    with pytest.raises(InputError, match="block of 0"):
        pack([[1, 2, 3]], block=0)


def test_short_documents_are_packed_with_bos_between_and_no_padding(make_tokenizer: Make) -> None:
    tokenizer, corpus = make_tokenizer(), stories(40)
    windows = calibration_windows(corpus, tokenizer, samples=8, seq_len=100, seed=0)
    assert windows.shape == (8, 100)
    assert windows.dtype == torch.int64
    assert (windows != 0).all()
    texts = {text for window in windows for text in tokenizer.decode(window, clean_up_tokenization_spaces=False).split("<s>")}
    assert len(texts) > 8
    assert all(any(text in document for document in corpus.documents) for text in texts)


@pytest.mark.slow
def test_long_documents_are_cut_into_windows_that_do_not_overlap(make_tokenizer: Make) -> None:
    text = " ".join(str(number) for number in range(60_000))
    windows = calibration_windows(Corpus("long", "all", documents=(text,)), make_tokenizer(bos=False), 64, 128, seed=1)
    read = make_tokenizer().batch_decode(windows, clean_up_tokenization_spaces=False)
    starts = sorted(text.find(window) for window in read if window in text)
    assert len(starts) > 50
    assert all(later - earlier >= 128 for earlier, later in itertools.pairwise(starts))
    assert starts[0] < len(text) / 4
    assert starts[-1] > len(text) * 3 / 4


def test_the_draw_depends_on_the_seed_and_on_nothing_else(make_tokenizer: Make) -> None:
    tokenizer, corpus = make_tokenizer(), stories(60)
    first = calibration_windows(corpus, tokenizer, 6, 64, seed=5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(calibration_windows(corpus, tokenizer, 6, 64, seed=5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(calibration_windows(corpus, tokenizer, 6, 64, seed=6), first)


def test_a_small_text_gives_what_it_has_and_a_smaller_one_is_refused(make_tokenizer: Make) -> None:
    corpus = Corpus("short.txt", "all", documents=("a" * 99,))
    assert calibration_windows(corpus, make_tokenizer(), 32, 30, seed=0).shape == (3, 30)
    assert calibration_windows(corpus, make_tokenizer(), 32, 100, seed=0).shape == (1, 100)
    with pytest.raises(DataError, match=r"'short.txt' has 100 tokens, fewer than one calibration window of 101"):
        calibration_windows(corpus, make_tokenizer(), 32, 101, seed=0)
    for samples, seq_len in ((0, 8), (8, 0)):
        with pytest.raises(InputError, match="at least 1"):
            calibration_windows(corpus, make_tokenizer(), samples, seq_len, seed=0)


@pytest.mark.slow
def test_no_more_text_is_encoded_than_it_takes(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    read: list[int] = []
    original = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, text: object, **options: object) -> object:
        read.extend(len(one) for one in text) if isinstance(text, list) else None
        return original(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    calibration_windows(Corpus("huge", "all", documents=("many words here\n" * 200_000,)), tokenizer, 4, 32, seed=0)
    assert 0 < sum(read) < 800_000 < 3_200_000


def test_the_context_of_a_model_is_known_and_kept() -> None:
    config = LlamaConfig(max_position_embeddings=64)
    assert context_limit(config) == 64
    assert context_limit(GPT2Config(n_positions=32)) == 32
    check_context(64, config, "seq_len")
    with pytest.raises(InputError, match="`seq_len=65` exceeds the model's context of 64 tokens; use at most 64"):
        check_context(65, config, "seq_len")
