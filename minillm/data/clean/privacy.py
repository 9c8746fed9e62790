"""What must not be learned by heart: addresses, numbers of people and cards, keys. Found by form, and by check digits.

Each kind is a few patterns, and for those that alone would find too much a test of what was found. Better to miss one
than to destroy a text: dates, prices, versions, ISBNs and arithmetic stay. A pattern with a group named `secret`
replaces that group alone.

Sources: ITU-T E.164 (country codes), the North American Numbering Plan, GB 11643-1999 (Chinese identity numbers), the
US Social Security Administration (numbers never issued), ISO/IEC 7812 (cards, Luhn), ISO 13616 (IBAN, modulo 97),
and the formats of keys that their issuers publish.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from datetime import date
from typing import NamedTuple


class Detector(NamedTuple):
    """A form of one kind of secret."""

    kind: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = bool  # whether what was found is one
    sign: str = ""  # characters without which a text has none: looked for first, because that is fast
    before: re.Pattern[str] | None = None  # what must stand before it, such as the name of a variable

    def finds(self, match: re.Match[str]) -> bool:
        """Whether what the pattern matches is one."""
        context = match.string[max(0, match.start() - NEAR) : match.start()]
        found = match["secret"] if "secret" in self.pattern.groupindex else match[0]
        return self.holds(found) and (self.before is None or self.before.search(context) is not None)


# --- whether a number is what it looks like ---------------------------------------------------------------------------

# Two-digit country codes; 1 and 7 are codes of one digit, all others have three.
TWO_DIGIT_CODES = set(
    "20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 "
    "81 82 84 86 90 91 92 93 94 95 98".split()
)
THREE_DIGIT_CODES = ("21", "22", "23", "24", "25", "26", "29", "35", "37", "38", "42", "50", "59", "67", "68", "69")
THREE_DIGIT_CODES += ("80", "85", "87", "88", "96", "97", "99")
# Provinces that a Chinese identity number begins with.
PROVINCES = set("11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65".split())
PROVINCES |= {"71", "81", "82", "83"}
IDENTITY_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
IDENTITY_CHECKS = "10X98765432"
# Beginnings and lengths of card numbers: Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay.
CARDS = re.compile(
    r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|6(?:011|4[4-9]\d|5\d\d)\d{12}"
    r"|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14,17}"
)


def digits_of(text: str) -> str:
    """Its digits alone."""
    return "".join(re.findall("[0-9]", text))


def is_international(text: str) -> bool:
    """Whether digits after a plus sign are a telephone number: a country code, and no thousands or decimals."""
    number = digits_of(text)
    if not 8 <= len(number) <= 15 or re.fullmatch(r"\+\d+\.\d+", text):
        return False
    if number[0] == "1":
        return re.fullmatch("1[2-9][0-8][0-9][2-9][0-9]{6}", number) is not None
    return number[0] == "7" or number[:2] in TWO_DIGIT_CODES or number.startswith(THREE_DIGIT_CODES)


def is_mobile(text: str) -> bool:
    """Whether eleven digits are no round amount."""
    return not digits_of(text).endswith("0000")


def is_identity(text: str) -> bool:
    """Whether 18 characters have the province, date of birth and check digit of a Chinese identity number."""
    try:
        date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    weighted = sum(weight * int(digit) for weight, digit in zip(IDENTITY_WEIGHTS, text))
    return text[:2] in PROVINCES and text[-1].upper() == IDENTITY_CHECKS[weighted % 11]


def is_card(text: str) -> bool:
    """Whether digits are the number of a card: an issuer's beginning and length, and Luhn's check digit."""
    number = digits_of(text)
    return CARDS.fullmatch(number) is not None and luhn(number)


def luhn(number: str) -> bool:
    """Whether the sum of the digits, every second one from the right doubled (18 counting as 9), ends in 0."""
    doubled = [2 * int(digit) for digit in number[-2::-2]]
    return (sum(map(int, number[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether the remainder of an account number modulo 97 is 1, letters read as 10 to 35."""
    account = text.replace(" ", "")
    moved = account[4:] + account[:4]
    return 15 <= len(account) <= 34 and int("".join(str(int(sign, 36)) for sign in moved)) % 97 == 1


def is_public_address(text: str) -> bool:
    """Whether an IP address is one of the internet, and not of a local network, an example, or C++ (a::b)."""
    if "." not in text and (text.count(":") < 3 or not digits_of(text)):
        return False
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def is_email(text: str) -> bool:
    """Whether what stands around an @ is no file name (icon@2x.png) and no login for a repository (git@)."""
    name, _, domain = text.rpartition("@")
    return name != "git" and domain.rpartition(".")[2].lower() not in FILE_ENDINGS


FILE_ENDINGS = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "py", "html", "json", "md", "txt"}


def is_random(text: str) -> bool:
    """Whether letters and digits are mixed as only a machine does: 3.5 bits a character, by their frequencies."""
    counts = Counter(text).values()
    bits = -sum(count / len(text) * math.log2(count / len(text)) for count in counts)
    return bits >= 3.5 and re.search("[0-9]", text) is not None and re.search("[A-Za-z]", text) is not None


# --- the kinds, in the order in which they are looked for -------------------------------------------------------------

# What a number must not touch: an ASCII letter or digit, or a sign that makes it part of a longer number, a price, a
# path or a formula. Patterns begin with a character and not with what stands before it: the search is ten times faster.
AFTER = r"(?![A-Za-z0-9_]|[-.,/:+][0-9]|[%€£¥]| ?[=*×÷])"
LABEL = r"(?i:\b(?:tel|telephone|phone|mobile|cell|fax|whatsapp)\b|电话|手机|電話|手機|传真|傳真)"
LABEL += r"(?: number| no)?\.?\s?[:：]?\s?$"
NAMES = r"(?i:api[_-]?key|secret|token|passw(?:or)?d|access[_-]?key|private[_-]?key|auth)[\w-]{0,20}[\"']?\s?$"
AREA = "[2-9][0-8][0-9]"  # code of an area in North America
# Seven digits with little between them: what all kinds of numbers have, and most texts do not.
NUMBER = re.compile(r"[0-9](?:[ .\-()]{0,2}[0-9]){6}")


def number(first: str, rest: str) -> str:
    """The pattern of a number: one of the characters `first`, touched by nothing that makes it something else."""
    return rf"[{first}](?<![0-9][.,][{first}])(?<![A-Za-z0-9_+\-/=#$€£¥][{first}])(?:{rest}){AFTER}"


def word(first: str, rest: str) -> str:
    """The pattern of a word that begins with a letter of `first`."""
    return rf"[{first}](?<![A-Za-z0-9_-][{first}]){rest}"


def form(kind: str, pattern: str, holds: Callable[[str], bool] = bool, sign: str = "", before: str = "") -> Detector:
    """A row of the table."""
    return Detector(kind, re.compile(pattern, re.S), holds, sign, re.compile(before) if before else None)


DETECTORS = [
    form(
        "key",
        "-----BEGIN ([A-Z ]*)PRIVATE KEY( BLOCK|)-----(?:(?!-----).)*+-----END \\1PRIVATE KEY\\2-----",
        sign="-----BEGIN",
    ),
    form("key", word("e", r"yJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"), sign="eyJ"),
    form("key", word("A", r"(?:KI|SI)A[A-Z0-9]{16}(?![A-Za-z0-9])"), sign="IA"),
    form("key", word("g", r"h[pousr]_[A-Za-z0-9]{36,}"), sign="gh"),
    form("key", word("g", r"ithub_pat_[A-Za-z0-9_]{22,}"), sign="github_pat_"),
    form("key", word("s", r"k-[A-Za-z0-9_-]{20,}"), is_random, sign="sk-"),
    form("key", word("rs", r"k_(?:live|test)_[A-Za-z0-9]{16,}"), sign="k_"),
    form("key", word("A", r"Iza[A-Za-z0-9_-]{35}"), sign="AIza"),
    form("key", word("x", r"ox[abeoprs]-[A-Za-z0-9-]{10,}"), is_random, sign="xox"),
    form("key", word("h", r"f_[A-Za-z0-9]{30,}"), sign="hf_"),
    form("key", r"[:=]\s?[\"']?(?P<secret>[A-Za-z0-9+/_\-.]{16,}={0,2})", is_random, before=NAMES),
    form(
        "email",
        r"[A-Za-z0-9_](?<![A-Za-z0-9._%+@-].)[A-Za-z0-9._%+-]{0,63}@"
        r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])",
        is_email,
        sign="@",
    ),
    form("iban", word("A-Z", r"[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"), is_iban),
    form("identity", number("1-8", "[0-9]{5}(?:19|20)[0-9]{9}[0-9Xx]"), is_identity),
    form("identity", number("0-8", "[0-9]{2}(?<!000)(?<!666)-(?!00)[0-9]{2}-(?!0000)[0-9]{4}"), sign="-"),
    form("card", number("2-6", "[0-9]{13,18}"), is_card),
    form("card", number("2-6", r"[0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{6}\1[0-9]{4,5})"), is_card),
    form("phone", number("1", rf"[ .-]?(?:\({AREA}\)[ -]?|{AREA}[.-])[2-9][0-9]{{2}}[.-][0-9]{{4}}")),
    form("phone", number("(", rf"{AREA}\)[ -]?[2-9][0-9]{{2}}[ .-][0-9]{{4}}"), sign="("),
    form("phone", number("2-9", r"[0-8][0-9]([.-])[2-9][0-9]{2}\1[0-9]{4}")),
    form(
        "phone",
        r"\+(?<![A-Za-z0-9+].)(?:1(?:[ .\-()]{0,2}[0-9]){10}|[2-9](?:[ .\-()]{0,2}[0-9]){7,14})(?![0-9])",
        is_international,
        "+",
    ),
    form("phone", number("1", r"[3-9][0-9]([ -]?)[0-9]{4}\1[0-9]{4}") + "(?! ?[元万亿美])", is_mobile, sign="1"),
    form("phone", number("0", "[1-9][0-9]{1,2}-[1-9][0-9]{6,7}"), sign="0"),
    form("phone", r"[0-9(](?<![0-9(].)(?:[ .\-()]{0,2}[0-9]){6,14}" + AFTER, before=LABEL),
    form("ip", r"[0-9](?<![A-Za-z0-9.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9]|\.[0-9])", is_public_address, "."),
    form("ip", r"(?<![A-Za-z0-9:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![A-Za-z0-9:])", is_public_address, ":"),
]
IN_NUMBERS = {"iban", "identity", "card", "phone"}
NEAR = 40  # characters before it in which the name of a secret is looked for


def redact(text: str, kinds: Collection[str], placeholder: str = "<{kind}>") -> tuple[str, Counter[str]]:
    """(the text with each secret of these kinds replaced, how many of which). `{kind}` is the kind in capitals."""
    counts: Counter[str] = Counter()
    has_number = NUMBER.search(text) is not None
    for detector in DETECTORS:
        if detector.kind not in kinds or detector.sign not in text or (detector.kind in IN_NUMBERS and not has_number):
            continue
        name = placeholder.replace("{kind}", detector.kind.upper())

        def replace(match: re.Match[str], detector: Detector = detector, name: str = name) -> str:
            if not detector.finds(match):
                return match[0]
            counts[detector.kind] += 1
            if "secret" not in detector.pattern.groupindex:
                return name
            start, stop = (edge - match.start() for edge in match.span("secret"))
            return match[0][:start] + name + match[0][stop:]

        text = detector.pattern.sub(replace, text)
    return text, counts
