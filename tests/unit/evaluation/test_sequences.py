from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from regraft.data.instructions import prompt_of
from regraft.data.records import Record
from regraft.data.text import Corpus
from regraft.evaluation.sequences import TokenSequence, sequences_of, windows_of

Make = Callable[..., PreTrainedTokenizerFast]


@given(length=st.integers(2, 60), first=st.integers(1, 60), window=st.integers(1, 40), data=st.data())
def test_every_target_is_predicted_once_with_the_context_that_is_promised(
    length: int, first: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    sequence = TokenSequence(tuple(range(length)), first, 0)
    seen: list[int] = []
    for part in windows_of(sequence, window, stride):
        assert 0 < len(part) <= window
        assert part.scored > 0
        for position in range(part.first_scored, part.end):
            seen.append(position + 1)
            context = position + 1 - part.start
            assert context >= min(position + 1, window - stride + 1)
    assert seen == list(range(first, length))


def test_a_text_is_cut_where_enough_tokens_are_predicted(make_tokenizer: Make) -> None:
    corpus = Corpus("t", "all", documents=("abc", "éfgh", "ijk"))
    whole = sequences_of(corpus, make_tokenizer(), "auto", None)
    assert [(one.targets, one.n_bytes) for one in whole] == [(3, 3), (4, 5), (3, 3)]
    cut = sequences_of(corpus, make_tokenizer(), "auto", 5)
    assert [(one.targets, one.n_bytes) for one in cut] == [(3, 3), (2, 3)]
    assert cut[1].ids == whole[1].ids[:3]


def test_without_bos_the_first_token_and_its_bytes_are_not_predicted(make_tokenizer: Make) -> None:
    corpus = Corpus("t", "all", documents=("éfgh", "x", "ab"))
    found = sequences_of(corpus, make_tokenizer(bos=False), "auto", None)
    assert [(one.targets, one.n_bytes) for one in found] == [(3, 3), (1, 1)]
    cut = sequences_of(corpus, make_tokenizer(bos=False), "auto", 2)
    assert [(one.targets, one.n_bytes) for one in cut] == [(2, 2)]


def test_a_token_that_stands_for_no_text_has_no_bytes(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("#")
    found = sequences_of(Corpus("t", "all", documents=("x", "éa")), tokenizer, "auto", None)
    assert [(one.targets, one.n_bytes) for one in found] == [(1, 1), (2, 3)]


def test_of_a_record_only_the_response_is_predicted(make_tokenizer: Make) -> None:
    record = Record("Say hi.", "", "hé hi")
    (one,) = sequences_of(Corpus("r", "all", records=(record,)), make_tokenizer(), "auto", None)
    assert one.first_target == 1 + len(prompt_of(record))
    assert one.targets == len("hé hi") + 1
    assert one.n_bytes == len("hé hi".encode())
    (cut,) = sequences_of(Corpus("r", "all", records=(record,)), make_tokenizer(), "auto", 2)
    assert (cut.targets, cut.n_bytes) == (2, 3)


def test_a_tokenizer_without_offsets_counts_the_bytes_of_what_it_decodes(make_tokenizer: Make, monkeypatch) -> None:
    corpus = Corpus("t", "all", documents=("éfgh", "ab"))
    expected = sequences_of(corpus, make_tokenizer(bos=False), "auto", 2)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert sequences_of(corpus, make_tokenizer(bos=False), "auto", 2) == expected
