from app.models.captions import pack


def test_lines_come_back():
    captions = ["a dog", "  a \t cat\u2028sat ", "", "\n", "a\x0bbird"]
    content, count = pack(captions, samples=100)
    assert content.decode().splitlines() == ["a dog", "a cat sat", "a bird"]
    assert count == 3


def test_samples():
    assert pack(iter(["a", " ", "b", "c"]), samples=2) == (b"a\nb\n", 2)
    assert pack([], samples=2) == (b"", 0)
