"""YAML that means one thing."""

import pytest

from qzo_diffusion.system.strict_yaml import YamlError, read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["'a' stands twice", "line 1", "line 3"]),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 1\n", ["'b.c' stands twice", "line 3", "line 5"]),
        ("a: [{b: 1,\n b: 2}]", ["'a.0.b' stands twice", "line 1", "line 2"]),
        ("a: &a\n  b: 1\n  b: 2\nc:\n  <<: *a\n", ["'a.b' stands twice", "line 2", "line 3"]),
        ("a:\n  <<: {b: 1}\n  <<: {c: 1}\n", ["'a.<<' stands twice", "line 2", "line 3"]),
        ("a: &a {b: 1}\nc: &c {b: 2}\nd:\n  <<: [*a, *c]\n", ["'d.b' stands twice"]),
        ('1: a\n"1": b\n', ["'1' stands twice"]),
        ("on: a\nyes: b\n", ["on and yes", "one key"]),
        ("1: a\n1.0: b\n", ["1 and 1.0", "one key"]),
        ("&a [*a]", ["holds itself"]),
        ("{[a]: 1}", ["a list or a mapping"]),
        ("a: 2024-13-45", ["line 1", "month"]),
        ("\x00", ["special characters"]),
        ("a: !!python/name:os.system x", ["python/name"]),
        ("a:\n- &b [1]\n- !!int x", ["line 3"]),
    ],
)
def test_a_file_that_means_two_things_or_none_is_refused(text, words):
    with pytest.raises(YamlError) as error:
        read(text)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_small_file_that_stands_for_much_is_refused_before_it_is_built():
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(YamlError, match="more than 50000 values"):
        read("\n".join(lines))
    for text, words in (("[" * 10_000, "levels deep"), ("#" * 2**21, "characters")):
        with pytest.raises(YamlError, match=words):
            read(text)


def test_own_keys_win_over_merged_ones():
    found = read("a: &a {b: 1, c: 2}\nd:\n  <<: *a\n  b: 3\n").content
    assert found["d"] == {"c": 2, "b": 3}
    assert read('"<<": 1\n').content == {"<<": 1}


@pytest.mark.parametrize("text", ["007", "yes", "1e3", "2024-05-01", "0x10", "1:30", ".inf"])
def test_texts_stand_as_they_were_written(text):
    document = read(f"a: {text}\nb: [{text}]\n", lambda path: path in {("a",), ("b", "0")})
    assert document.content == {"a": text, "b": [text]}


@pytest.mark.parametrize("text", ["", "~", "null"])
def test_nothing_is_no_text(text):
    assert read(f"a: {text}\n", lambda path: True).content == {"a": None}
    assert read(f"a: '{text}'\n", lambda path: True).content == {"a": text}


def test_numbers_of_other_bases_stay_texts():
    found = read("[010, 1:30, 0o10, 0x10, 0.5, 1_000, -07]").content
    assert found == ["010", "1:30", "0o10", 16, 0.5, 1000, "-07"]


def test_lines_are_those_of_keys_and_items():
    document = read("a:\n  b: 1\n\n  c:\n  - 1\n  - 2\n")
    places = (("a",), ("a", "b"), ("a", "c", "1"), ("a", "c", "1", "x"), ("z",))
    assert [document.line_of(place) for place in places] == [1, 2, 6, 6, 1]
