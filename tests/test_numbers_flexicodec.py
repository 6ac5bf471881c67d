import random
import re
import sys

import pytest

from flexicodec_hf.numbers_flexicodec import spell_numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It costs $9.99.", "It costs nine dollars and ninety nine cents."),
        ("It costs $1.01!", "It costs one dollar and one cent!"),
        ("a $5 bill", "a five dollar bill"),
        ("$0.50", "fifty cents"),
        ("$5.00", "five dollars"),
        ("$3.5 million", "three point five million dollars"),
        ("$10k", "ten thousand dollars"),
        ("US$5", "five US dollars"),
        ("€1,234.56", "one thousand two hundred thirty four euros and fifty six cents"),
        ("50¢", "fifty cents"),
        ("-$5", "minus five dollars"),
        ("$5-10", "five to ten dollars"),
        ("In 1999 scientists found it.", "In nineteen ninety nine scientists found it."),
        ("1500 people", "one thousand five hundred people"),
        ("in 2005", "in two thousand five"),
        ("1905", "nineteen oh five"),
        ("the 1990s", "the nineteen nineties"),
        ("1914–18", "nineteen fourteen to eighteen"),
        ("2,024", "two thousand twenty four"),
        ("22nd", "twenty second"),
        ("3.14", "three point one four"),
        (".5", "point five"),
        ("-0.5", "minus zero point five"),
        ("1,000,000", "one million"),
        ("007", "zero zero seven"),
        ("1 km", "one kilometer"),
        ("a 5 km run", "a five kilometer run"),
        ("60 km/h", "sixty kilometers per hour"),
        ("5–10%", "five to ten percent"),
        ("-5°C", "minus five degrees Celsius"),
        ("25 m²", "twenty five square meters"),
        ("10:45", "ten forty five"),
        ("10:05 a.m.", "ten oh five a.m."),
        ("5pm", "five pm"),
        ("10:00", "ten o'clock"),
        ("16:9", "sixteen to nine"),
        ("May 5, 2024", "May fifth, twenty twenty four"),
        ("on 5 May 2024", "on the fifth of May twenty twenty four"),
        ("2024-05-17", "May seventeenth, twenty twenty four"),
        ("1/2", "one half"),
        ("1 1/2", "one and a half"),
        ("24/7", "twenty four seven"),
        ("555-1234", "five five five, one two three four"),
        ("10-20", "ten to twenty"),
        ("3.4.1", "three point four point one"),
        ("MP3", "MP three"),
        ("3D", "three D"),
        ("COVID-19", "COVID nineteen"),
        ("5-year-old", "five-year-old"),
        ("No. 5", "number five"),
        ("10k followers", "ten thousand followers"),
        ("9.99.", "nine point nine nine."),
        ("£5/kg", "five pounds per kilogram"),
        ("$100/month", "one hundred dollars per month"),
        ("$3,000-$4,000", "three thousand to four thousand dollars"),
    ],
)
def test_numbers_are_read_as_an_american_reads_them(text, words):
    assert spell_numbers(text) == words
    assert spell_numbers(f"Say {words}.") == f"Say {words}."


def test_no_digit_is_left():
    """Versions of phonemizer read digits in different ways."""
    random.seed(0)
    for _ in range(3000):
        text = "".join(random.choices("0123456789" * 3 + "$€.,:/-– %kmsth°²May", k=random.randint(1, 14)))
        assert not re.search("[0-9]", spell_numbers(text)), text


@pytest.mark.parametrize("text", ["1" * 5_000, "1,111" * 1_000, "1." * 2_000, "a 1 " * 1_000, "1-" * 2_000])
def test_endless_numbers_end(text):
    assert not re.search("[0-9]", spell_numbers(text))


def test_without_the_library_only_numbers_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    assert spell_numbers("No numbers, ½ a dozen.") == "No numbers, ½ a dozen."
    with pytest.raises(ImportError, match=r"num2words: `pip install num2words`"):
        spell_numbers("5")
