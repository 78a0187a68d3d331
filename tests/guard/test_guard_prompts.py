"""Each form a prompt can have, and each mistake by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.errors import PromptsError
from guard.prompts import Prompt, read_prompts, read_reviewed


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def user(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},), None)


def test_every_form_is_read_in_order(tmp_path: Path) -> None:
    text = """plain text, "quoted"

    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "id": 7}
{"prompt": " raw {text}\\n"}
  [1, 2] is a text too
"""
    assert read_prompts(write(tmp_path, text)) == [
        user('plain text, "quoted"'),
        Prompt(({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), None),
        Prompt(None, " raw {text}\n"),
        user("[1, 2] is a text too"),
    ]


def test_messages_win_over_a_prompt_beside_them(tmp_path: Path) -> None:
    line = '{"prompt": "x", "messages": [{"role": "user", "content": "u"}]}'
    assert read_prompts(write(tmp_path, line)) == [user("u")]


def test_windows_line_ends_and_byte_order_marks_change_nothing(tmp_path: Path) -> None:
    text = '{"prompt": "a"}\r\nb\r\n'
    assert read_prompts(write(tmp_path, b"\xef\xbb\xbf" + text.encode())) == [Prompt(None, "a"), user("b")]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "one\u2028line\x0bstill\n")) == [user("one\u2028line\x0bstill")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON: .* at column 2"),
        ('{"prompt": "a"} x', "not JSON: Extra data at column 17"),
        ('{"prompt": ' + 9999 * "1" + "}", "JSON with a number too long"),
        ('{"prompt": ' * 99_999, "JSON with .* nested too deep"),
        ("{}", r"expected a key `messages` .* found \[\]"),
        ('{"text": "a", "id": 1}', r"expected .* found \['id', 'text'\]"),
        ('{"prompt": ""}', "expected a key"),
        ('{"prompt": 5}', "expected a key"),
        ('{"messages": []}', "`messages` must be a list"),
        ('{"messages": "hi"}', "`messages` must be a list"),
        ('{"messages": ["hi"]}', r"`messages\[0\]` must be an object"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}', r"`messages\[1\]`"),
        ('{"messages": [{"role": 1, "content": "a"}]}', r"`messages\[0\]`"),
    ],
    ids=range(13),
)
def test_a_mistake_is_named_by_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(PromptsError, match=rf"prompts\.jsonl:3: {problem}"):
        read_prompts(write(tmp_path, f"a prompt\n\n{line}\nanother\n"))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PromptsError, match=r"prompts\.jsonl: holds no prompts"):
        read_prompts(write(tmp_path, text))


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=r"prompts\.jsonl: not UTF-8 at byte 4"):
        read_prompts(write(tmp_path, b"good\xff"))
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(PromptsError, match=f"{path.name}: cannot be read"):
            read_prompts(path)


CLEAN = '{"prompt": "a", "label": "clean"}'


def test_reviewed_prompts_are_read_as_others_are(tmp_path: Path) -> None:
    text = f"""\ufeff{CLEAN}\r

  {{"messages": [{{"role": "user", "content": "u"}}], "label": "clean", "by": "someone"}}
"""
    assert read_reviewed(write(tmp_path, text)) == [Prompt(None, "a"), user("u")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a text", "None"),
        ('{"prompt": "b"}', "None"),
        ('{"prompt": "b", "label": null}', "None"),
        ('{"prompt": "b", "label": "attack"}', "'attack'"),
        ('{"prompt": "b", "label": "Clean"}', "'Clean'"),
        ('{"prompt": "b", "label": ["clean"]}', r"\['clean'\]"),
        ('{"prompt": "b", "label": true}', "True"),
    ],
)
def test_what_nobody_called_clean_is_refused_by_file_and_line(tmp_path: Path, line: str, found: str) -> None:
    with pytest.raises(PromptsError, match=rf'prompts\.jsonl:3: label is {found}, expected "clean" on every line'):
        read_reviewed(write(tmp_path, f"{CLEAN}\n\n{line}\n{CLEAN}\n"))


@pytest.mark.parametrize("text", ["", '{"label": "clean"}', '{"prompt": 5, "label": "clean"}', '{"label": "clean", '])
def test_a_mistake_among_reviewed_prompts_is_named_as_elsewhere(tmp_path: Path, text: str) -> None:
    with pytest.raises(PromptsError, match=r"prompts\.jsonl:"):
        read_reviewed(write(tmp_path, text))
