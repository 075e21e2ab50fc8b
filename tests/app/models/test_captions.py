from app.models.captions import pack_captions


def test_lines_come_back() -> None:
    captions = ["a dog", "  a \t cat\u2028sat ", "", "\n", "a\x0bbird"]
    content, count = pack_captions(captions, samples=100)
    assert content.decode().splitlines() == ["a dog", "a cat sat", "a bird"]
    assert count == 3


def test_samples() -> None:
    assert pack_captions(iter(["a", " ", "b", "c"]), samples=2) == (b"a\nb\n", 2)
    assert pack_captions([], samples=2) == (b"", 0)


def test_captions_of_any_length_are_taken() -> None:
    content, count = pack_captions(["a " * 3_000, "x" * 200_000], samples=2)
    assert [len(line) for line in content.decode().splitlines()] == [5_999, 100_000]
    assert count == 2
