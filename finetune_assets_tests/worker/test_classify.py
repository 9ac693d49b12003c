"""A classifier of transformers scores replies: one label of several, several labels at once, none that is harmless."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from finetune_assets.errors import ModelUnavailable
from finetune_assets.worker.classify import Classifier

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hola", "buenos", "dias", "rata", "cita"]


def make_classifier(folder: Path, labels: list[str], problem: str = "single_label_classification") -> str:
    """A one-layer BERT that has learnt in some steps that `rata` is the last of the labels."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
        problem_type=problem,
    )
    model = BertForSequenceClassification(config)
    texts = ["hola", "buenos dias", "rata", "hola rata", "cita", "rata cita", "hola cita", "buenos dias rata"]
    bad = torch.tensor(["rata" in text for text in texts])
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    wanted = bad.long() * (len(labels) - 1)
    if problem.startswith("multi"):
        wanted = torch.zeros(len(texts), len(labels))
        wanted[bad, -1] = 1.0
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        model(**inputs, labels=wanted).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["non-toxic", "toxic"], "single_label_classification"),
        (["neutral", "clean", "hate"], "single_label_classification"),
        (["obscene", "toxic"], "multi_label_classification"),
    ],
)
def test_harmful_texts_score_high(tmp_path: Path, labels: list[str], problem: str):
    scores = Classifier(make_classifier(tmp_path, labels, problem)).toxicity(
        ["hola", "rata", "buenos dias rata", "cita", "", "hola " * 500]
    )
    assert [score > 0.5 for score in scores[:4]] == [False, True, True, False]
    assert all(0 <= score <= 1 for score in scores)


def test_labels_that_say_nothing_are_refused(tmp_path: Path):
    with pytest.raises(ModelUnavailable, match="harmless"):
        Classifier(make_classifier(tmp_path, ["stars_1", "stars_5"])).toxicity(["hola"])


def test_no_classifier_there(tmp_path: Path):
    with pytest.raises(ModelUnavailable, match=r"benchmark\.conduct\.classifier"):
        Classifier(str(tmp_path)).toxicity(["hola"])
