import random

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import byte_tokenizer
from flexicodec_hf.speech_lm import FlexiCodecSpeechVocabulary, SpeechChatCollator, SpeechTextCollator
from test_vocabulary import SIZES, draw


CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make(layout: str = "parallel", num_quantizers: int = 1, **kwargs) -> FlexiCodecSpeechVocabulary:
    vocabulary = FlexiCodecSpeechVocabulary(
        byte_tokenizer(), layout=layout, num_quantizers=num_quantizers, **SIZES, **kwargs
    )
    vocabulary.tokenizer.chat_template = CHAT_TEMPLATE
    return vocabulary


def make_rows(vocabulary: FlexiCodecSpeechVocabulary, num_rows: int = 3) -> list[dict]:
    """Rows as `datasets` gives them: lists, with more codebooks than the vocabulary uses."""
    rng = random.Random(0)
    rows = []
    for index in range(num_rows):
        codes, lengths = draw(vocabulary, rng, rng.randint(2, 9))
        rows.append(
            {
                "text": f"Text {index}" * (index + 1),
                "audio_codes": [*codes.tolist(), [7] * codes.shape[1]],
                "token_lengths": lengths.tolist(),
            }
        )
    return rows


def labeled_text(vocabulary: FlexiCodecSpeechVocabulary, batch: dict, row: int) -> str:
    """What has labels, as the names of tokens."""
    return vocabulary.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])


@pytest.mark.parametrize("layout", ["separate", "joint", "parallel"])
@pytest.mark.parametrize(
    "parts, labels_on",
    [
        (("text", "speech"), ("speech",)),
        (("speech", "text"), ("text",)),
        (("speech",), ("speech",)),
        (("text", "speech"), ("text", "speech")),
    ],
)
def test_batches_hold_the_parts_and_label_what_is_asked(layout, parts, labels_on):
    vocabulary = make(layout)
    rows = make_rows(vocabulary)
    batch = SpeechTextCollator(vocabulary, parts=parts, labels_on=labels_on, pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[1] % 16 == 0
    for index, row in enumerate(rows):
        length = int(batch["attention_mask"][index].sum())
        assert batch["attention_mask"][index, :length].all()
        assert (batch["input_ids"][index, length:] == vocabulary.tokenizer.pad_token_id).all()
        assert (batch["labels"][index, length:] == -100).all()

        speech = vocabulary.encode(row["audio_codes"], row["token_lengths"])
        sections = {"text": row["text"], "speech": vocabulary.tokenizer.decode(speech["input_ids"])}
        expected = "".join(sections[part] for part in parts) + "<|endoftext|>"
        assert vocabulary.tokenizer.decode(batch["input_ids"][index, :length]) == expected
        labeled = "".join(sections[part] for part in parts if part in labels_on)
        assert labeled_text(vocabulary, batch, index) == labeled + "<|endoftext|>" * (parts[-1] in labels_on)
        if layout == "parallel":
            durations = batch["token_lengths"][index]
            assert durations[durations > 0].tolist() == row["token_lengths"]
            labels = batch["duration_labels"][index]
            assert labels[labels != -100].tolist() == (row["token_lengths"] if "speech" in labels_on else [])
            assert ((labels == -100) | (labels == durations)).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | (
        {"token_lengths", "duration_labels"} if layout == "parallel" else set()
    )


def test_acoustic_codes_ride_along():
    vocabulary = make("parallel", num_quantizers=3)
    rows = make_rows(vocabulary)
    batch = SpeechTextCollator(vocabulary, padding_side="left")(rows)
    assert batch["acoustic_codes"].shape == batch["acoustic_labels"].shape == (3, 2, batch["labels"].shape[1])
    for index, row in enumerate(rows):
        stream = {name: batch[name][index] for name in ("input_ids", "token_lengths", "acoustic_codes")}
        (span,) = vocabulary.speech_spans(stream["input_ids"])
        codes, _ = vocabulary.decode(**{name: value[..., span] for name, value in stream.items()})
        assert codes.tolist() == row["audio_codes"][:3]
        for labels, expected in zip(batch["acoustic_labels"][index], row["audio_codes"][1:3], strict=True):
            assert labels[labels != -100].tolist() == expected
        assert batch["attention_mask"][index, -1] == 1


def test_works_in_a_data_loader_with_workers():
    vocabulary = make()
    rows = make_rows(vocabulary, 4)
    collator = SpeechTextCollator(vocabulary)
    batches = list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=1))
    assert len(batches) == 2
    assert torch.equal(batches[1]["labels"], collator(rows[2:])["labels"])


def conversation(rows: list[dict]) -> list[dict]:
    def audio(row: dict) -> dict:
        return {"type": "audio", "audio_codes": row["audio_codes"], "token_lengths": row["token_lengths"]}

    return [
        {"role": "user", "content": [{"type": "text", "text": "What is this? "}, audio(rows[0])]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "This:"}, audio(rows[1]), {"type": "text", "text": "!"}],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": [audio(rows[2])]},
    ]


@pytest.mark.parametrize("layout", ["separate", "joint", "parallel"])
def test_conversations_are_laid_out_by_the_chat_template(layout):
    vocabulary = make(layout)
    rows = make_rows(vocabulary)
    names = [
        vocabulary.tokenizer.decode(vocabulary.encode(row["audio_codes"], row["token_lengths"])["input_ids"])
        for row in rows
    ]
    messages = conversation(rows)
    expected = (
        f"[user]What is this? {names[0]}<|endoftext|>[assistant]This:{names[1]}!<|endoftext|>"
        f"[user]Thanks<|endoftext|>[assistant]{names[2]}<|endoftext|>"
    )
    batch = SpeechChatCollator(vocabulary, pad_to_multiple_of=8)([{"messages": messages}, {"messages": messages[2:]}])
    length = int(batch["attention_mask"][0].sum())
    assert vocabulary.tokenizer.decode(batch["input_ids"][0, :length]) == expected
    assert labeled_text(vocabulary, batch, 0) == f"This:{names[1]}!<|endoftext|>{names[2]}<|endoftext|>"
    assert labeled_text(vocabulary, batch, 1) == f"{names[2]}<|endoftext|>"
    if layout == "parallel":
        labels = batch["duration_labels"][0]
        assert labels[labels != -100].tolist() == rows[1]["token_lengths"] + rows[2]["token_lengths"]

    batch = SpeechChatCollator(vocabulary, labels_on=("speech",))([{"messages": messages}])
    assert labeled_text(vocabulary, batch, 0) == names[1] + names[2]
    batch = SpeechChatCollator(vocabulary, labels_on=("text",), roles=("assistant",))([{"messages": messages}])
    assert labeled_text(vocabulary, batch, 0) == "This:!<|endoftext|><|endoftext|>"

    prompt = SpeechChatCollator(vocabulary).prompt(messages[:1])
    assert (
        vocabulary.tokenizer.decode(prompt["input_ids"]) == f"[user]What is this? {names[0]}<|endoftext|>[assistant]"
    )
    assert not any(name.endswith("labels") for name in prompt)


def test_wrong_rows_are_refused():
    vocabulary = make()
    rows = make_rows(vocabulary)
    chat = SpeechChatCollator(vocabulary)
    spoken = {"role": "user", "content": "say <|speech|>"}
    coded = {"role": "user", "content": "say <|s_3|>"}
    video = {"role": "user", "content": [{"type": "video"}]}
    for call, message in (
        (lambda: SpeechTextCollator(vocabulary, parts=("image",)), "`parts` must name 'text', 'speech' or both"),
        (lambda: SpeechTextCollator(vocabulary, labels_on=()), "`labels_on` must name 'text', 'speech' or both"),
        (lambda: SpeechTextCollator(vocabulary, parts=("speech",), labels_on=("text",)), "names what `parts`"),
        (lambda: SpeechTextCollator(vocabulary)([{**rows[0], "text": None}]), "Row 0 of the batch has no `text`"),
        (lambda: SpeechTextCollator(vocabulary)([{"text": "a"}]), "Row 0 of the batch has no `audio_codes`"),
        (
            lambda: SpeechChatCollator(vocabulary, labels_on=("audio",)),
            "`labels_on` must name 'text', 'speech' or both",
        ),
        (lambda: chat([{"messages": [spoken]}]), "The text of message 0 holds the name of a speech token"),
        (lambda: chat([{"messages": [coded]}]), "A text holds the name of a speech token"),
        (lambda: chat([{"messages": [video]}]), "Message 0: a part must be of type 'text' or 'audio', got 'video'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

    # This template drops what the assistant said before the last turn, as those of reasoning models do.
    vocabulary.tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}"
        "[{{ message['role'] }}]{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(ValueError, match="The chat template does not append message 1"):
        chat([{"messages": messages}])
