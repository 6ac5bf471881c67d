import random

import pytest

from flexicodec_hf.splitting_flexicodec import split_text


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("en", ["Dr. Smith paid $3.50 to Mr. J. R. Jones, on Jan. 5, at 10 a.m. sharp.", "It was dear, he said."]),
        (
            "en",
            ['He asked: "Why should I do that?" and left the room in a rage.', "“Go away now!” she cried… and wept."],
        ),
        ("en", ["It was in the summer of the year 1815.", "He came back with no. 5 of the old series."]),
        (
            "en",
            ["I told you that the answer was no.", "Version 2.0.1 is at www.example.com (for now).", "Is it good?!"],
        ),
        ("de", ["Am 3. Mai kam Hr. Meyer, z. B. mit dem Zug.", "Das war im Jahr 1815.", "Er blieb bis zum Herbst."]),
        ("fr", ["M. Dupont et Mme. Durand sont arrivés hier soir.", "« Pourquoi si tard ? »", "Personne ne le sait."]),
        ("es", ["¿Dónde vive ahora el Sr. García Márquez?", "¡Vive en la avenida principal, núm. 7 del barrio!"]),
        ("ru", ["Он живёт на ул. Ленина, в доме с садом.", "Это было в 1815 г. осенью, кажется."]),
        ("hi", ["यह पहला लंबा वाक्य है और बस।", "यह दूसरा लंबा वाक्य है और बस।"]),
        ("ar", ["كيف حالك اليوم يا صديقي العزيز؟", "أنا بخير والحمد لله رب العالمين."]),
    ],
)
def test_sentences_are_found(language, sentences):
    # A piece may be as long as the longest sentence, and no sentence is under a quarter of that.
    assert split_text(" ".join(sentences), max(map(len, sentences)), language) == sentences


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_east_asian_sentences_need_no_spaces(language):
    sentences = ["今天天气很好，我们去公园。", "“你看见他了吗？”", "他说：没有！", "那就算了吧。"]
    assert split_text("".join(sentences), 39, language) == sentences
    # 500 characters without a mark: three count as nine.
    pieces = split_text("字" * 500, 30, language)
    assert "".join(pieces) == "字" * 500 and {len(piece) for piece in pieces} <= set(range(5, 11))


def test_line_breaks_are_spaces_and_empty_lines_end_sentences():
    text = "A heading without a mark\n\nA paragraph that is\nwrapped at a few\r\ncharacters, as files are.\n \t\nThe end of the text"
    assert split_text(text, 80) == [
        "A heading without a mark",
        "A paragraph that is wrapped at a few characters, as files are.",
        "The end of the text",
    ]


def test_long_sentences_are_cut_at_clauses_then_at_words():
    assert split_text("When the long day was over, they went home; nobody had seen them, and nobody asked.", 50) == [
        "When the long day was over, they went home;",
        "nobody had seen them, and nobody asked.",
    ]
    # A comma near an end is no place for a cut.
    assert split_text("Oh, the very long day without any pause was over at last", 40) == [
        "Oh, the very long day without",
        "any pause was over at last",
    ]
    assert split_text("a" * 100, 60) == ["a" * 50, "a" * 50]


def test_short_sentences_go_with_their_neighbours():
    assert split_text("Yes. No. I think that this is the better answer. Oh.", 60) == [
        "Yes. No. I think that this is the better answer. Oh."
    ]
    long = "I think that this is by far the better one of the two answers."
    assert split_text(f"Yes. {long} {long}", 70) == [f"Yes. {long}", long]
    assert split_text(f"{long} Oh.", 64) == [long, "Oh."]


def test_what_cannot_be_spoken_goes_with_what_can():
    assert split_text("* * *\n\nHello there, you\n\n---\n\nand you\n\n***", 24) == [
        "* * * Hello there, you ---",
        "and you ***",
    ]
    assert split_text("?!") == ["?!"]
    assert split_text(" \n\n\t ") == split_text("") == []


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost_and_no_piece_is_too_long(seed):
    draw = random.Random(seed)
    alphabet = [
        "a",
        "B",
        "é",
        "字",
        "。",
        ". ",
        "! ",
        "? ",
        ", ",
        "; ",
        " ",
        " ",
        "\n",
        "\n\n",
        "7",
        "“",
        "”",
        "…",
        "Dr. ",
    ]
    text = "".join(draw.choices(alphabet, k=400)) + "a"
    max_length = draw.randint(12, 80)
    pieces = split_text(text, max_length)
    assert squeezed("".join(pieces)) == squeezed(text)
    for piece in pieces:
        assert piece == piece.strip() and any(map(str.isalnum, piece))
        # Marks alone may lengthen a piece, which random text has many of.
        assert sum(3 if character == "字" else 1 for character in piece if character.isalnum()) <= max_length
    assert split_text(text, max_length) == pieces


def test_a_long_text_is_split_fast():
    sentence = "The quick brown fox jumps over the lazy dog, and then it runs away. "
    pieces = split_text(sentence * 5_000)  # a third of a million characters in one paragraph
    assert len(pieces) == 5_000 and set(pieces) == {sentence.strip()}


def test_a_piece_has_room_for_a_word():
    with pytest.raises(ValueError, match="`max_length` must be at least 12 characters, got 3"):
        split_text("text", 3)
