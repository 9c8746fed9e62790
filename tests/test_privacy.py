"""Secrets are found by their form and check digits; what only looks like one stays."""

import json

import pytest

from minillm.data.clean.config import KINDS
from minillm.data.clean.privacy import DETECTORS, is_random, luhn, redact

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA75\nqx9Sd0\n-----END RSA PRIVATE KEY-----"
PGP = PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK")

# Numbers in use by nobody: the examples of their standards, reserved ranges, or made up with the right check digit.
SECRETS = [
    ("email", "write to jane.doe+news@mail.example.co.uk. Thanks", "write to <EMAIL>. Thanks"),
    ("email", "邮箱zhang@example.cn，电话见下", "邮箱<EMAIL>，电话见下"),
    ("email", "<a_b@x-y.org>", "<<EMAIL>>"),
    ("phone", "call +44 (0)20 7946 0958 now", "call <PHONE> now"),
    ("phone", "+86 138 0013 8000", "+86 138 0013 8000".replace("+86 138 0013 8000", "<PHONE>")),
    ("phone", "+1 415 555 0132 2 rooms", "<PHONE> 2 rooms"),
    ("phone", "(415) 555-0132, 415-555-0133 or 415.555.0134.", "<PHONE>, <PHONE> or <PHONE>."),
    ("phone", "Call:1-800-555-0199", "Call:<PHONE>"),
    ("phone", "手机13912345678或139 1234 5678", "手机<PHONE>或<PHONE>"),
    ("phone", "电话：010-62345678。", "电话：<PHONE>。"),
    ("phone", "Tel: 020 7946 0958\nFax 555-0134 22", "Tel: <PHONE>\nFax <PHONE>"),
    ("identity", "身份证11010519491231002X", "身份证<IDENTITY>"),
    ("identity", "id 440524188001010014? no: 1880; 11010519491231002x yes", None),
    ("identity", "SSN 078-05-1120.", "SSN <IDENTITY>."),
    ("card", "pay 4111 1111 1111 1111, 5555-5555-5555-4444 or 378282246310005", "pay <CARD>, <CARD> or <CARD>"),
    ("card", "银联6222021001122337775。", None),
    ("iban", "to GB82 WEST 1234 5698 7654 32 or DE89370400440532013000", "to <IBAN> or <IBAN>"),
    ("key", "AKIAIOSFODNN7EXAMPLE", "<KEY>"),
    ("key", f"token ghp_{'a1B2' * 9} end", "token <KEY> end"),
    ("key", "OPENAI sk-proj-Ab3dEf6hIj9kLm2nOp5qRs8t", "OPENAI <KEY>"),
    ("key", f"Bearer {JWT}", "Bearer <KEY>"),
    ("key", f"a\n{PEM}\nb\n{PGP}", "a\n<KEY>\nb\n<KEY>"),
    ("key", 'API_KEY = "9f8A7c6B5d4E3f2a1b0C"', 'API_KEY = "<KEY>"'),
    ("key", "password: hunter2Hunter2x9Zq8", "password: <KEY>"),
    ("ip", "from 8.8.8.8, 2001:4860:4860::8888", "from <IP>, <IP>"),
]


@pytest.mark.parametrize(("kind", "text", "expected"), SECRETS)
def test_secrets_are_replaced_and_counted(kind, text, expected):
    cleaned, counts = redact(text, KINDS)
    if expected is not None:
        assert cleaned == expected
        assert counts == {kind: expected.count("<" + kind.upper() + ">")}
    unasked = set(KINDS) - {kind}
    assert kind not in redact(text, unasked)[1]


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11.4, torch 2.13.0+cpu, v1.2.3.4567890123",
        "on 2024-01-31, 31.01.2024, 01/31/2024 at 12:30:45 and 20240131123045",
        "1914-1918, 1939-1945, pages 123-456-789",
        "ISBN 978-0-306-40615-7, 9780306406157, 0-306-40615-2; ISSN 0317-8471",
        "$1,234,567.89, €1.234.567,89, 100000000 yen, 13800000000 of them, ¥13912345678, 13912345678元",
        "3.14159265358979323846 and 0.13912345678, 1e-10, +3.1415926535",
        "415-555-0132=-272, 12345678 + 87654321 = 99999999, 48/2=24, 2^32=4294967296, x=4111111111111111",
        "+10 000 000 people, +12345678 points, +5 -3",
        "git clone git@github.com:a/b.git; icon@2x.png; user @ home; @name; a@b",
        "key: value; token = the_next_word_in_line; secret: aaaaaaaaaaaaaaaaaaaaaaaa; password: correct-horse-battery",
        "risk-taking-behaviour-in-2020-and-later, sk-learn, AKIA, ghp_short, eyJ.eyJ.x",
        "110105194912310021, 110105194913310020, 990105194912310029",  # wrong check digit, month, province
        "078-05-1120-1, 000-12-3456, 666-12-3456, 912-34-5678, 123-00-4567",
        "4111 1111 1111 1112, 1234 5678 9012 3456, 0000000000000000",
        "GB82 WEST 1234 5698 7654 33, AB12 CDEF 1234, GATTACAGATTACA12",
        "Call of Duty 4 and 5; phone 12 sold 1,000,000 times; the telephone of 1876",
        "https://example.com/a/415-555-0132/13912345678?x=4111111111111111",
        "#415-555-0132 order 00000123-4567-89ab-cdef-415555013200",
        "192.168.0.1, 10.0.0.1, 127.0.0.1, 1.2.3, 999.1.1.1, section 1.2.3.4.5; 12:30:45; std::vector; a::b",
        "4 + 4111 = 4115; 139 + 1234 - 5678; 62 22 02",
    ],
)
def test_what_only_looks_like_a_secret_stays(text):
    assert redact(text, KINDS) == (text, {})


def test_the_placeholder_is_the_users():
    assert redact("a@b.com!", ["email"], "")[0] == "!"
    assert redact("a@b.com!", ["email"], "[{kind} {0}]")[0] == "[EMAIL {0}]!"


def test_check_digits():
    """The example of ISO/IEC 7812-1, annex B, and what one digit makes of it."""
    assert luhn("79927398713")
    assert sum(luhn(f"7992739871{digit}") for digit in range(10)) == 1
    assert is_random("9f8A7c6B5d4E3f2a1b0C")
    assert not is_random("correct-horse-battery")


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1 ", "a", "a.", "a@", "+1 ", "AB12 ", "1-", "a:", "1.", "(", "eyJ", "sk-"),
        *("-----BEGIN ", "-----BEGIN PRIVATE KEY-----\n"),
    ],
)
def test_no_text_takes_long(piece):
    """No pattern backtracks without bound: with one that does, this would not end."""
    text = piece * 50_000
    cleaned, counts = redact(text, KINDS)
    assert (cleaned == text) == (not counts)


def test_real_texts_without_secrets_stay(real_data):
    """5 MB of an encyclopaedia, novels, plays, poems and sums, full of numbers and names."""
    for name in ("wiki_en.txt", "pride_and_prejudice.txt", "tinyshakespeare.txt", "gsm8k_train.jsonl"):
        text = (real_data / name).read_text()
        assert redact(text, KINDS)[1] == {}, name


def test_real_web_text_loses_its_addresses_and_numbers(real_data):
    texts = [json.loads(line)["text"] for line in (real_data / "c4.jsonl").open()]
    counts = sum((redact(text, KINDS)[1] for text in texts), start=redact("", KINDS)[1])
    assert counts == {"phone": 23, "email": 7}  # each was looked at


def test_every_kind_has_an_example():
    assert {row[0] for row in SECRETS} == {detector.kind for detector in DETECTORS} == set(KINDS)
