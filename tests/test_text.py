"""Reading text: every format, every way to cut documents, bounded memory, and each kind of broken input."""

import csv
import gzip
import io
import json
import random
import sys
import tracemalloc
from pathlib import Path

import pytest

from minillm.data import tables
from minillm.data import text as text_module
from minillm.data.config import DataConfig
from minillm.data.text import Document, cut_point, documents, find_files
from minillm.tokenizer import TokenizerConfig, train_tokenizer

WORDS = "the cat sat on a mat und die Katze saß da 猫坐在垫子上。 🙂 x\t2 don't".split(" ")


def whole(files, config=None) -> list[tuple[str, str]]:
    """(source, text) of each document, pieces put together."""
    found: list[list[str]] = []
    for document in documents(files, config or DataConfig()):
        if document.starts:
            found.append([document.source, ""])
        found[-1][1] += document.text
    return [tuple(item) for item in found]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path, columns: dict[str, list], **settings):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def csv_of(rows: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return file.getvalue()


def error_of(path, **settings) -> str:
    with pytest.raises(ValueError, match=str(path)) as caught:
        whole([path], DataConfig(**settings))
    return str(caught.value)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_unless_lines_or_blank_lines_separate(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\n\n \n  three\nfour\n\n")
    assert whole([path]) == [(f"{path}:1", "one\ntwo\n\n \n  three\nfour\n\n")]
    lines = whole([path], DataConfig(document="line"))
    assert lines == [(f"{path}:{n}", t) for n, t in ((1, "one"), (2, "two"), (5, "  three"), (6, "four"))]
    paragraphs = whole([path], DataConfig(document="blank"))
    assert paragraphs == [(f"{path}:1", "one\ntwo"), (f"{path}:5", "  three\nfour")]


def test_rows_of_jsonl_and_json_are_documents(tmp_path):
    rows = [{"text": "one\ntwo"}, {"id": 3, "text": "三"}, "just text", {"text": "  "}]
    jsonl = write(tmp_path / "a.jsonl", "\n".join([json.dumps(rows[0]), "", *map(json.dumps, rows[1:])]))
    assert whole([jsonl]) == [(f"{jsonl}:1", "one\ntwo"), (f"{jsonl}:3", "三"), (f"{jsonl}:4", "just text")]
    as_list = write(tmp_path / "a.json", json.dumps(rows, indent=1, ensure_ascii=False))
    assert whole([as_list]) == [(f"{as_list}:2", "one\ntwo"), (f"{as_list}:5", "三"), (f"{as_list}:9", "just text")]
    for setting in ("line", "blank"):
        assert whole([jsonl], DataConfig(document=setting)) == whole([jsonl])


def test_another_field_can_hold_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "hello", "text": 3}\n')
    assert whole([path], DataConfig(text_field="body")) == [(f"{path}:1", "hello")]


def test_rows_of_csv_are_documents(tmp_path):
    content = 'id,text\n1,one\n\n2,"two, with ""quotes""\r\nand\n\na second line"\n3,\n4,"四"\n5,5" wide\n'
    path = write(tmp_path / "a.csv", content)
    expected = [(2, "one"), (4, 'two, with "quotes"\nand\n\na second line'), (9, "四"), (10, '5" wide')]
    assert whole([path]) == [(f"{path}:{line}", text) for line, text in expected]
    assert [text for _, text in whole([path], DataConfig(text_field="id"))] == ["1", "2", "3", "4", "5"]
    for ending in ("\r\n", "\n"):
        path = write(tmp_path / "b.csv", f"text{ending}one{ending}  {ending}two")
        assert whole([path]) == [(f"{path}:2", "one"), (f"{path}:4", "two")]


def test_rows_of_parquet_are_documents_known_by_their_number(tmp_path):
    texts = ["one\r\ntwo", "  ", "三", "four"]
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "text": texts}, row_group_size=3)
    assert whole([path]) == [(f"{path}:1", "one\ntwo"), (f"{path}:3", "三"), (f"{path}:4", "four")]


def test_every_way_to_store_text_in_parquet_reads_alike(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    dice = random.Random(0)
    texts = [dice.choice(WORDS) * dice.randrange(1, 30) for _ in range(300)]
    plain = pyarrow.array(texts)
    for number, (array, settings) in enumerate(
        [
            (plain, {"use_dictionary": False, "data_page_size": 100}),
            (plain.cast(pyarrow.large_string()), {"compression": "zstd", "row_group_size": 7}),
            (plain.dictionary_encode(), {"data_page_version": "2.0", "write_page_checksum": True}),
        ]
    ):
        path = write_parquet(tmp_path / f"{number}.parquet", {"text": array, "other": texts}, **settings)
        assert whole([path]) == [(f"{path}:{n}", text) for n, text in enumerate(texts, 1)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_gz_reads_as_what_it_packs(tmp_path, name):
    content = {"a.txt": "one\ntwo", "a.jsonl": '{"text": "one"}\n"two"\n', "a.json": '["one", "two"]'}
    content = (content | {"a.csv": "text\none\ntwo"})[name]
    plain = write(tmp_path / name, content)
    packed = write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
    assert [text for _, text in whole([packed])] == [text for _, text in whole([plain])]


def test_bom_is_not_text(tmp_path):
    bom = b"\xef\xbb\xbf"
    for name, content in (
        ("a.txt", b"hello"),
        ("a.jsonl", b'"hello"'),
        ("a.json", b'["hello"]'),
        ("a.csv", b"text\nhello"),
    ):
        assert [text for _, text in whole([write(tmp_path / name, bom + content)])] == ["hello"]


def test_crlf_reads_as_lf(tmp_path):
    path = write(tmp_path / "a.txt", b"one\r\ntwo\r\n\r\nthree\rfour")
    assert whole([path])[0][1] == "one\ntwo\n\nthree\rfour"
    assert [t for _, t in whole([path], DataConfig(document="line"))] == ["one", "two", "three\rfour"]
    assert [t for _, t in whole([path], DataConfig(document="blank"))] == ["one\ntwo", "three\rfour"]
    rows = write(tmp_path / "a.jsonl", b'{"text": "one\\r\\ntwo"}\r\n\r\n"three"\r\n')
    assert whole([rows]) == [(f"{rows}:1", "one\ntwo"), (f"{rows}:3", "three")]


def test_a_file_without_text_has_no_documents(tmp_path):
    for name, content in (("a.txt", ""), ("b.txt", " \n\t\n"), ("a.jsonl", "\n"), ("a.json", ""), ("b.json", " [ ] ")):
        assert whole([write(tmp_path / name, content)]) == []
    for content in ("", "\n\n", "id,text\n", "id,text"):
        assert whole([write(tmp_path / "a.csv", content)]) == []


# --- paths ------------------------------------------------------------------------------------------------------------


def test_folders_are_searched_to_the_bottom_in_order(tmp_path):
    for name in (
        "b.txt",
        "a.jsonl.gz",
        "sub/deep/c.JSON",
        ".hidden.txt",
        ".git/x.txt",
        "README.md",
        "dataset_info.json",
    ):
        write(tmp_path / name, "")
    assert [str(p.relative_to(tmp_path)) for p in find_files(tmp_path)] == ["a.jsonl.gz", "b.txt", "sub/deep/c.JSON"]


def test_an_index_is_left_out_only_where_it_is_that_of_prepared_tokens(tmp_path):
    for name, content in {
        "mine/index.json": '["a text"]',
        "mine/plan.json": '[{"text": "another"}]',
        "tokens/index.json": '{\n "format": "minillm tokens 1"}',
        "tokens/packing-32/plan.json": "{}",
    }.items():
        write(tmp_path / name, content)
    assert [str(p.relative_to(tmp_path)) for p in find_files(tmp_path)] == ["mine/index.json", "mine/plan.json"]
    assert [text for _, text in whole(find_files(tmp_path))] == ["a text", "another"]


def test_globs_and_lists_keep_their_order_and_take_a_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md"):
        write(tmp_path / name, "")
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*"), str(tmp_path / "**" / "c.*")])
    assert [p.name for p in found] == ["b.txt", "a.txt", "c.txt"]


def test_a_path_that_is_not_there_is_named_with_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(ValueError, match=r"trian\.jsonl: no such file or folder; did you mean .*train\.jsonl\?"):
        find_files(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match=r"\*\.txt: no text there"):
        find_files(tmp_path / "*.txt")


def test_a_format_that_is_not_read_is_refused(tmp_path):
    for name in ("a.docx", "a.parquet.gz", "parquet", "a.gz", ".gz", "a.csv.zip"):
        with pytest.raises(ValueError, match=rf"{name}: cannot tell the format .* \.csv, .* or \.parquet"):
            find_files(write(tmp_path / name, "x"))


# --- broken input -----------------------------------------------------------------------------------------------------


def test_invalid_utf8_is_named_by_line_and_byte(tmp_path):
    path = write(tmp_path / "a.txt", b"fine\nnot \xff fine\n")
    assert error_of(path).startswith(f"{path}:2: not UTF-8 at byte 9 (invalid start byte 0xff)")
    path = write(tmp_path / "a.jsonl", b'"fine"\n"caf\xe9"\n')
    assert error_of(path).startswith(f"{path}:2: not UTF-8 at byte 11 ")
    path = write(tmp_path / "a.json", b'["fine",\n"caf\xe9"]')
    assert error_of(path).startswith(f"{path}:2: not UTF-8 at byte 13")
    path = write(tmp_path / "cut.txt", "naïve"[:3].encode()[:-1])
    assert error_of(path).startswith(f"{path}:1: not UTF-8 at byte 2 (unexpected end of data")


def test_invalid_utf8_far_into_a_file_has_its_true_place(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK", 64)
    content = ("line of text\n" * 50).encode()
    path = write(tmp_path / "a.txt", content + b"\xff")
    for document in ("file", "line"):
        assert error_of(path, document=document).startswith(f"{path}:51: not UTF-8 at byte {len(content)} ")


def test_utf16_is_recognised(tmp_path):
    path = write(tmp_path / "a.txt", "hello".encode("utf-16"))
    assert "it looks like UTF-16" in error_of(path)


def test_nul_is_refused_with_its_place(tmp_path):
    path = write(tmp_path / "a.txt", b"one\ntwo\0three")
    assert error_of(path).startswith(f"{path}:2: a NUL character at byte 7")
    path = write(tmp_path / "a.jsonl", b'"fine"\n{"text": "a\\u0000b"}\n')
    assert error_of(path).startswith(f"{path}:2: a NUL character")


def test_broken_json_is_named_by_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n{"text": "cut\n')
    assert error_of(path).startswith(f"{path}:3: not valid JSON: ")
    path = write(tmp_path / "b.jsonl", '{"text": "fine"} {"text": "two"}\n')
    assert error_of(path).startswith(f"{path}:1: not valid JSON: Extra data (column 18)")
    path = write(tmp_path / "c.jsonl", '"fine"\n' + "[" * 100_000 + "\n")
    assert error_of(path).startswith(f"{path}:2: not valid JSON: ")


def test_rows_that_are_whole_only_together_are_refused(tmp_path):
    for rows in (
        '{"text": "a"\n"x": 1}',
        '["a"\n"b"]',
        '"a", "b"\n["c"\n"d"]',
        '{"text": "a"}, 0, {"text": "b"}\n[1\n2]',
    ):
        path = write(tmp_path / "a.jsonl", rows)
        assert error_of(path).startswith(f"{path}:1: not valid JSON: ")


def test_broken_json_list_is_named_by_line(tmp_path):
    cases = {
        '[\n"a",\n{"text": }\n]': (3, "Expecting value"),
        '["a",\n"b"\n"c"]': (3, "',' or ']' is expected, found '\"'"),
        '["a",\n"b"\n': (3, "the file ends inside the list"),
        '["a",\n{"text": "b"': (2, "Expecting"),
        '["a",\n]': (2, "Expecting value"),
        '["a"]\n"b"': (2, "text after the end of the list"),
        '\n{"text": "a"}\n{"text": "b"}': (2, "name the file .jsonl"),
    }
    for content, (line, message) in cases.items():
        path = write(tmp_path / "a.json", content)
        error = error_of(path)
        assert error.startswith(f"{path}:{line}: "), (content, error)
        assert message in error, (content, error)


def test_missing_field_is_named_with_what_was_found(tmp_path):
    path = write(tmp_path / "train.jsonl", '"fine"\n{"title": "a", "body": "b"}\n')
    advice = "; set data.text_field or fix the line"
    assert error_of(path) == f'{path}:2: field "text" is missing (found: title, body){advice}'


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"text": 3}', 'field "text" is a number'),
        ('{"text": null}', 'field "text" is null'),
        ('{"text": ["a"]}', 'field "text" is a list'),
        ('{"text": {"a": "b"}}', 'field "text" is an object'),
        ("{}", 'field "text" is missing (found: no fields)'),
        ("true", "the row is true or false"),
        ('["a"]', "the row is a list"),
    ],
)
def test_a_row_without_text_is_refused(tmp_path, row, what):
    jsonl = write(tmp_path / "a.jsonl", f'"fine"\n{row}\n')
    assert error_of(jsonl).startswith(f"{jsonl}:2: {what}")
    as_list = write(tmp_path / "a.json", f'["fine",\n{row}]')
    assert error_of(as_list).startswith(f"{as_list}:2: {what}")


def test_broken_csv_is_named_by_the_line_where_the_row_begins(tmp_path):
    expected = {
        'id,text\n1,"one\n\nmore"\n2,two,too,many\n': (5, "4 fields, expected 2"),
        "id,text\n1,one\n2\n": (3, "1 field, expected 2"),
        'id,text\n1,one\n2,"never\nclosed\n3,three\n': (3, "not valid CSV: unexpected end of data"),
        'id,text\n1,"one" more\n': (2, "not valid CSV: ',' expected after '\"'"),
        "\n\na,b\n1,2\n": (3, 'column "text" is missing (found: a, b); set data.text_field'),
        "id;text\n1;a\n": (1, "column \"text\" is missing (found: id;text); separate columns by commas, not ';'"),
        "text\tid\na\t1\n": (1, "column \"text\" is missing (found: text\tid); separate columns by commas, not '\\t'"),
        "text,b,text\n": (1, 'column "text" is there more than once (found: text, b, text); set data.text_field'),
        b"text\nfine\ncaf\xe9\n": (3, "not UTF-8 at byte 13; convert the file to UTF-8"),
        'text\nfine\n"two\nlines \0"\n': (3, "a NUL character in the text"),
    }
    for content, (line, message) in expected.items():
        path = write(tmp_path / "a.csv", content)
        assert error_of(path).startswith(f"{path}:{line}: {message}"), content


def test_a_line_of_csv_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE", 10**6)
    text = "x" * 900_000
    path = write(tmp_path / "a.csv", f"text\n{text}\n")
    assert whole([path]) == [(f"{path}:2", text)]
    path = write(tmp_path / "a.csv", f"text\nfine\n{text}{text}\n")
    assert error_of(path).startswith(f"{path}:3: a line of more than 1,000,000 bytes")


def test_parquet_without_the_column_is_refused_with_what_was_found(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"title": ["a"], "n": [1], "tags": [["a"]]})
    found = 'column "text" is missing (found: title, n, tags); set data.text_field'
    assert error_of(path) == f"{path}: {found}"
    for field, kind in (("n", "int64"), ("tags", "list<")):
        assert error_of(path, text_field=field).startswith(f'{path}: column "{field}" is {kind}')
    assert [text for _, text in whole([path], DataConfig(text_field="title"))] == ["a"]


def test_a_row_of_parquet_without_text_is_named_by_its_number(tmp_path):
    texts = [f"text {n}" for n in range(100)]
    path = write_parquet(tmp_path / "a.parquet", {"text": [*texts, None, "end"]}, row_group_size=30)
    assert error_of(path) == f'{path}:101: column "text" is null; fix the row or leave it out'
    path = write_parquet(tmp_path / "a.parquet", {"text": [*texts, "a\0b"]})
    assert error_of(path).startswith(f"{path}:101: a NUL character")
    pyarrow = pytest.importorskip("pyarrow")
    latin = pyarrow.array([text.encode() for text in texts] + [b"caf\xe9"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "a.parquet", {"text": latin})
    assert error_of(path) == f'{path}:101: column "text" is not UTF-8 at byte 3; fix the row or leave it out'


def test_damaged_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"text {n}" for n in range(100)]})
    content = path.read_bytes()
    for damaged in (b"", b"no parquet at all", content[:-20], content[:4] + content[20:]):
        assert error_of(write(path, damaged)).startswith(f"{path}: the parquet data is damaged or cut short: ")


def test_a_letter_changed_in_parquet_with_checksums_is_noticed(tmp_path):
    settings = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a red hen"]}, **settings)
    path.write_bytes(path.read_bytes().replace(b"a red hen", b"a bed hen"))
    assert "the parquet data is damaged" in error_of(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "a.parquet", b"PAR1")
    assert error_of(path) == f"{path}: to read parquet, pyarrow is needed: pip install 'minillm[data]'"


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '"\\ud83d\\ude42"\n{"text": "\\ud83d"}\n"\\ude42"\n')
    assert error_of(path).startswith(f"{path}:2: half a character, \\ud83d, in the text")


def test_damaged_gzip_is_named(tmp_path):
    packed = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
    for content in (packed[:-100], b"no gzip at all", packed[:50] + b"\0\0\0" + packed[53:]):
        path = write(tmp_path / "a.txt.gz", content)
        assert error_of(path).startswith(f"{path}: the gzip data is damaged or cut short")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz"])
def test_damage_of_any_kind_is_refused_by_name_or_harmless(tmp_path, name):
    dice = random.Random(0)
    rows = [{"text": "Größe 猫 🙂\n" * n, "id": n} for n in range(8)]
    good = {
        "a.txt": "Größe 猫 🙂\r\n\r\n".encode() * 8,
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)).encode(),
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.csv": csv_of([["id", "text"], *([str(row["id"]), row["text"]] for row in rows)]).encode(),
        "a.txt.gz": gzip.compress("Größe 猫 🙂\n".encode() * 50),
    }.get(name)
    if name == "a.parquet":
        columns = {"id": [row["id"] for row in rows], "text": [row["text"] for row in rows]}
        good = write_parquet(tmp_path / name, columns, write_page_checksum=True).read_bytes()
    errors = []
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(bad))
            bad[at : at + dice.choice([0, 1, 1, 5])] = dice.randbytes(dice.choice([0, 1, 1, 3]))
        path = write(tmp_path / name, bytes(bad[: dice.choice([len(bad), dice.randrange(len(bad) + 1)])]))
        try:
            whole([path], DataConfig(document=dice.choice(["file", "line", "blank"])))
        except ValueError as error:
            errors.append(error)
    assert len(errors) > 100
    assert [error for error in errors if type(error) is not ValueError or not str(error).startswith(f"{path}:")] == []


def test_a_row_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK", 256)
    monkeypatch.setattr(text_module, "MAX_ROW", 1000)
    path = write(tmp_path / "a.jsonl", '"fine"\n' + json.dumps({"text": "x" * 2000}) + "\n")
    assert error_of(path).startswith(f"{path}:2: a row of more than 1,000 bytes")


# --- long documents ---------------------------------------------------------------------------------------------------


def random_text(dice: random.Random) -> str:
    joins = [" ", " ", " ", "\n", "\n\n", "\n \n", "  ", "\r\n", ""]
    return "".join(dice.choice(WORDS) + dice.choice(joins) for _ in range(dice.randrange(60)))


def test_blocks_and_pieces_of_any_size_make_the_same_documents(tmp_path, monkeypatch):
    dice = random.Random(0)
    for trial in range(150):
        text = random_text(dice)
        path = write(tmp_path / "a.txt", text)
        rows = [random_text(dice) for _ in range(5)]
        jsonl = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        as_csv = write(tmp_path / "a.csv", csv_of([["text"], *([row] for row in rows)]))
        for document in ("file", "line", "blank"):
            config = DataConfig(document=document)
            monkeypatch.setattr(text_module, "BLOCK", 2**20)
            monkeypatch.setattr(text_module, "PIECE", 2**14)
            expected = whole([path, jsonl, as_csv], config)
            monkeypatch.setattr(text_module, "BLOCK", dice.choice([8, 16, 40]))
            monkeypatch.setattr(text_module, "PIECE", dice.choice([8, 12, 30]))
            found = whole([path, jsonl, as_csv], config)
            assert found == expected, (trial, document, text)


def test_a_line_of_10_mb_comes_in_pieces(tmp_path):
    sentence = "A line without an end, 没有换行, "
    path = write(tmp_path / "a.txt", "short\n" + sentence * (10**7 // len(sentence.encode())) + "\nlast")
    for document, count in (("file", 1), ("line", 3), ("blank", 1)):
        pieces = list(documents([path], DataConfig(document=document)))
        assert sum(piece.starts for piece in pieces) == sum(piece.ends for piece in pieces) == count
        assert max(len(piece.text.encode()) for piece in pieces) <= text_module.PIECE
        if document == "line":
            assert [piece.source for piece in pieces if piece.starts] == [f"{path}:{n}" for n in (1, 2, 3)]
            assert "".join(piece.text for piece in pieces[1:-1]) == sentence * (10**7 // len(sentence.encode()))


@pytest.mark.parametrize(
    "name", ["one_line.txt", "lines.txt", "one_line.txt.gz", "rows.jsonl", "rows.json", "rows.csv"]
)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    block = ("x " * 500).strip()
    part = {"one_line": block + " ", "lines": block + "\n"}.get(name.split(".")[0], json.dumps({"text": block}) + ",")
    content = part * 24_000  # 24 MB
    if name == "rows.json":
        content = f"[{content[:-1]}]"
    if name == "rows.jsonl":
        content = content.replace(",", "\n")
    if name == "rows.csv":
        content = "text\n" + (block + "\n") * 24_000
    path = tmp_path / name
    with gzip.open(path, "wt", compresslevel=1) if name.endswith(".gz") else open(path, "w") as file:
        file.write(content)
    del content
    tracemalloc.start()
    size = sum(len(document.text) for document in documents([path], DataConfig(document="line")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size >= 23_000_000
    assert peak < 13 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_a_long_row_does_not_make_the_blocks_after_it_large(tmp_path):
    short, long = '{"text": "a short row"}\n', json.dumps({"text": "a long row " * 2**19}) + "\n"  # 5.5 MiB
    path = write(tmp_path / "a.jsonl", (long + short * 200_000) * 3 + short * 10)
    blocks = [block.raw for block in text_module.blocks(path, DataConfig())]
    assert b"".join(blocks) == path.read_bytes()
    assert [block.count(b"\n") for block in blocks if len(block) > 2**21] == [1, 1, 1]


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    dice = random.Random(0)
    texts = [dice.randbytes(500).hex() for _ in range(24_000)]  # 24 MB that hardly pack, as one row group
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, use_dictionary=False)
    before, peak, size = pyarrow.total_allocated_bytes(), 0, 0
    for document in documents([path], DataConfig()):
        size += len(document.text)
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert size == 24_000_000
    assert peak < 8 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_pieces_have_the_tokens_of_the_whole(monkeypatch, tmp_path):
    dice = random.Random(1)
    english = " ".join(dice.choice(WORDS[:10]) + dice.choice(["", ".", ",\n", "\n\n", " "]) for _ in range(5000))
    tokenizer = train_tokenizer([english], TokenizerConfig(vocab_size=600))
    monkeypatch.setattr(text_module, "PIECE", 1000)
    path = write(tmp_path / "a.txt", english)
    pieces = [document.text for document in documents([path], DataConfig())]
    assert len(pieces) > 20
    assert [id for ids in tokenizer.encode_batch(pieces) for id in ids] == tokenizer.encode(english)


def test_a_cut_never_falls_inside_a_character_or_between_cr_and_lf():
    assert cut_point(b"one two three") == 7
    assert cut_point(b"one two  ") == 3
    assert cut_point(b"aa\nbb\n\n") == 3
    for text in ("没有空格的汉字", "🙂🙂🙂", "a\r\n", "ab", "\n\n\n", "é\r\n"):
        at = cut_point(text.encode())
        assert 0 < at < len(text.encode())
        assert text.encode()[:at].decode() + text.encode()[at:].decode() == text
        assert text.encode()[at - 1 : at + 1] != b"\r\n"


def test_a_document_knows_its_source():
    assert Document("text", "data/a.txt", 3).source == "data/a.txt:3"


def test_the_examples_read_as_their_readme_says():
    data = Path(__file__).parent.parent / "data"
    counts = {"file": 1, "line": 11, "blank": 6}
    for document, count in counts.items():
        assert len(whole([data / "fables.txt"], DataConfig(document=document))) == count
    assert len(whole([data / "facts.jsonl"])) == 6
    assert len(whole([data / "notes.json"])) == 3
    assert len(whole([data / "proverbs.csv"])) == 6
    pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    assert len(whole([data / "riddles.parquet"])) == 4


# --- real text --------------------------------------------------------------------------------------------------------


def test_real_files_read_as_they_are(real_data):
    shakespeare = real_data / "tinyshakespeare.txt"
    assert whole([shakespeare]) == [(f"{shakespeare}:1", shakespeare.read_text())]
    assert len(whole([real_data / "wiki_en.txt"], DataConfig(document="line"))) == 30
    poems = whole([real_data / "tang_poems.jsonl"])
    lines = (real_data / "tang_poems.jsonl").read_text().splitlines()
    assert [text for _, text in poems] == [json.loads(line)["text"] for line in lines]
    with open(real_data / "crows_pairs.csv", newline="", encoding="utf-8") as file:
        expected = [row["sent_more"] for row in csv.DictReader(file)]
    assert [text for _, text in whole([real_data / "crows_pairs.csv"], DataConfig(text_field="sent_more"))] == expected
    answers = whole([real_data / "alpaca_zh.json"], DataConfig(text_field="output"))
    rows = json.loads((real_data / "alpaca_zh.json").read_text())
    assert [text for _, text in answers] == [row["output"] for row in rows if row["output"].strip()]
